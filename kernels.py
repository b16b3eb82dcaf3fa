"""The hot paths of a sparse decode step, in the order in which data flows through them.

    1. find_echoes        token ids           ->  the blocks that continue earlier matches of the text's end
    2. pool_history       queries x keys      ->  block-max attention probabilities, one row per query
    3. predict            rows of history     ->  one score per block
    4. select_blocks      scores              ->  the best blocks
    5. rotate_and_write   q, k, v of a token  ->  rotated q; rotated k and v in the cache
    6. sparse_decode      q, selected blocks  ->  attention output
    7. swiglu             gate, up            ->  what the layer's last product multiplies
    8. copy_blocks        host memory         ->  device slots, for the blocks that `assign_slots` does not find there

Each section gives the mathematics, a PyTorch reference, the Triton kernel, and the launcher that the rest of the
project calls, whose argument `backend` ("torch" or "triton") says which code runs. What launchers share is at the end.

For readers who know PyTorch and no Triton. A kernel is a function that runs many times side by side, as many
*programs*. `kernel[grid](...)` launches them; the *grid*, a tuple of numbers, says how many, and `tl.program_id(axis)`
tells a program which of them it is. A program works on *tiles*: small tensors in registers, with operations like
PyTorch's. Global memory has no shape: `tl.load(ptr + offsets, mask=..., other=...)` reads a tile from the addresses
that a tensor of offsets gives, and `tl.store` writes one. Where the *mask* is False nothing is read, and the value is
`other`; so the last, ragged tile needs no code of its own. Arguments in capitals are `tl.constexpr`: constants when the
kernel is compiled, because tile shapes must be known then; it is compiled anew for each of their values. Programs do
not see each other's tiles, and nobody waits for anybody within a launch, so work that needs all results is a second
launch. A variable that a loop changes keeps its dtype and shape, and `break` does not exist; the interpreter checks
neither. `_echo_kernel`, the first one below, has all of this in fifteen lines.

Shapes: L layers, Hq query heads, Hk KV heads, G = Hq / Hk, D head dimension, T cached tokens, b tokens per block,
N = ceil(T / b) blocks. The kernels need D and b to be powers of two.

Conventions. Integers that change from token to token are marked `do_not_specialize`: Triton would otherwise compile a
kernel anew when such a number becomes 1 or a multiple of 16. An index that multiplies a large stride is int64, because
offsets may exceed 2^31. OPERAND is the dtype in which tl.dot multiplies: the inputs' own, but float32 in the
interpreter; input_precision="ieee" forbids TF32 for float32 inputs. Running softmaxes keep a maximum `m`, a sum of
exponentials `l` and a weighted sum `acc`; a split that sees no key ends with l = 0, so its log-sum-exp is -inf and it
weighs nothing.

Source: Yang et al., AttentionPredictor, NeurIPS 2025, arXiv 2502.04077. The incremental prediction and the echoes are
this project's.
"""

import os
from functools import cache
from types import SimpleNamespace

import torch
import torch.nn.functional as F

# a * b + c rounds once; newer Triton versions turn this off by default
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
try:
    import triton
    import triton.language as tl
except ImportError:  # the torch backend works without Triton
    tl = SimpleNamespace(constexpr=lambda value: value)
    triton = SimpleNamespace(jit=lambda kernel=None, **_: kernel or (lambda function: function), knobs=None)

LOWEST = tl.constexpr(-3.0e38)  # a running maximum starts here: finite, so that LOWEST - LOWEST is not NaN
PROGRAMS_PER_MULTIPROCESSOR = 2  # how many a split pass over K launches, about
TILE_BYTES = 16384  # of K or of V that a program loads at once; several such loads are in flight


# --------------------------------------------------------------------------------------------------------------------
# 1. Echoes.   run[p] = how many tokens up to position p equal those up to the text's end, 8 at most
#
# Position p + 1 continues the match that ends at p. Its score is run[p] * T + p + 1: the longest match first, then the
# latest one. A block has the largest score of its positions. A match may begin before the block.
# --------------------------------------------------------------------------------------------------------------------

MATCH_TOKENS = tl.constexpr(8)  # longer matches count as this long
ECHO_TILE = 1024  # tokens of a program


def find_echoes_reference(ids, position, start, local_blocks, block_size, n_blocks, n_echoes):
    """See `find_echoes`."""
    p, run, matches = torch.arange(len(ids), device=ids.device), 0, True
    for j in range(8):  # matches: the tokens p - j ... p equal the last j + 1 of the text
        matches = matches & (ids[(p - j).clamp(min=0)] == ids[(position - j).clamp(min=0)]) & (p >= j)
        run = run + matches.int()  # (T,)
    score = torch.where((run > 0) & (p < position), run * len(ids) + p + 1.0, float("-inf"))  # of position p + 1
    score = F.pad(score[:-1], (1, n_blocks * block_size - len(ids)), value=float("-inf"))  # of position p
    block = torch.arange(n_blocks, device=ids.device)
    in_middle = (block >= start) & (block < (position + 1) // block_size - local_blocks)
    score = score.view(n_blocks, block_size).amax(1).masked_fill(~in_middle, float("-inf"))  # (n_blocks,)
    best, echo = F.pad(score, (0, n_echoes), value=float("-inf")).topk(n_echoes)  # (E,), (E,)
    return torch.where(best > float("-inf"), echo, n_blocks)


# Grid: (tiles of TILE tokens). Each program compares its tokens, and those up to eight before them, with the text's
# last eight. Traffic: the ids once (eight times from the cache); one score per block.
@triton.jit(do_not_specialize=["start", "local_blocks", "n_ids", "n_blocks"])
def _echo_kernel(
    ids_ptr, position_ptr, scores_ptr, start, local_blocks, n_ids, n_blocks,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    TILE_BLOCKS: tl.constexpr = TILE // BLOCK_SIZE
    position = tl.load(position_ptr)  # of the newest token
    p = tl.program_id(0) * TILE + tl.arange(0, TILE)  # (TILE,) position that may continue a match
    matches = p <= position  # (TILE,)
    run = tl.zeros((TILE,), tl.int32)
    for j in range(1, MATCH_TOKENS + 1):
        last = tl.load(ids_ptr + position + 1 - j, mask=position + 1 >= j, other=-1)
        matches = matches & (p >= j) & (tl.load(ids_ptr + p - j, mask=matches & (p >= j), other=-2) == last)
        run += matches.to(tl.int32)
    score = tl.where(run > 0, run.to(tl.float32) * n_ids + p, float("-inf"))  # (TILE,)
    score = tl.max(tl.reshape(score, (TILE_BLOCKS, BLOCK_SIZE)), 1)  # (TILE_BLOCKS,)
    block = tl.program_id(0) * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
    in_middle = (block >= start) & (block < (position + 1) // BLOCK_SIZE - local_blocks)
    tl.store(scores_ptr + block, tl.where(in_middle, score, float("-inf")), mask=block < n_blocks)


# Grid: (1,). The best score, n_echoes times. Traffic: the scores once; 32 KB at 128K tokens.
@triton.jit(do_not_specialize=["n_blocks"])
def _best_echoes_kernel(scores_ptr, echo_ptr, n_blocks, N_ECHOES: tl.constexpr, SIZE: tl.constexpr):
    block = tl.arange(0, SIZE)
    scores = tl.load(scores_ptr + block, mask=block < n_blocks, other=float("-inf"))  # (SIZE,)
    for i in range(N_ECHOES):
        best, echo = tl.max(scores, 0, return_indices=True)
        tl.store(echo_ptr + i, tl.where(best > float("-inf"), echo, n_blocks).to(tl.int64))
        scores = tl.where(block == echo, float("-inf"), scores)


def find_echoes(ids, position, start, local_blocks, block_size, n_blocks, n_echoes, backend="torch"):
    """The blocks that continue earlier occurrences of the text's end: the longest match first, then the latest
    (README: echo).

    ids           (T,) int64: the text's token ids, and room for later ones
    position      (1,) int64 on the device: of the newest token. Nothing here waits for its value
    start         the first middle block; the middle ends `local_blocks` before the newest token's block
    returns       the best blocks of the middle, (n_echoes,) int64; n_blocks where no other block continues anything
    """
    assert ids.dtype == position.dtype == torch.int64 and len(ids) <= n_blocks * block_size
    assert 9 * len(ids) + 9 < 2**24, "scores must be exact in float32"
    if not use_triton(backend, ids.device):
        return find_echoes_reference(ids, position, start, local_blocks, block_size, n_blocks, n_echoes)
    assert ids.is_contiguous() and ECHO_TILE % block_size == 0
    scores = ids.new_empty(n_blocks, dtype=torch.float32)
    _echo_kernel[(cdiv(n_blocks * block_size, ECHO_TILE),)](
        ids, position, scores, start, local_blocks, len(ids), n_blocks,
        BLOCK_SIZE=block_size, TILE=ECHO_TILE, num_warps=4,
    )  # fmt: skip
    echo = ids.new_empty(n_echoes)
    _best_echoes_kernel[(1,)](
        scores, echo, n_blocks, N_ECHOES=n_echoes, SIZE=triton.next_power_of_2(n_blocks), num_warps=8
    )
    return echo


# --------------------------------------------------------------------------------------------------------------------
# 2. History pooling.   pooled[h, r, n] = max over the keys t of block n, t <= position of r, of softmax(q k / sqrt(D))
#
# One pass over K: every block keeps its largest logit, every row its running log-sum-exp, and
# pooled = exp(block_max - lse). Nothing of size rows x T exists.
# --------------------------------------------------------------------------------------------------------------------

POOL_CHUNK_HEADS, POOL_CHUNK_TOKENS = 8, 1024  # of a step of the reference: its keys stay in a CPU's cache


def pool_history_reference(q, k_cache, n_tokens, row_distance):
    """See `pool_history`. In short: logits = q @ k.mT / sqrt(D), -inf for keys in a row's future, and then
    pooled = softmax(logits).unflatten(-1, (N, b)).amax(-1). It runs in chunks of keys that stay in a CPU's cache.
    """
    (n_heads, rows, head_dim), (n_kv_heads, _, block_size, _) = q.shape, k_cache.shape
    n_blocks = cdiv(n_tokens, block_size)
    dtype = torch.promote_types(q.dtype, torch.float32)
    q = q.reshape(n_kv_heads, -1, head_dim).to(dtype) * head_dim**-0.5  # (Hk, G * rows, D)
    position = n_tokens - 1 - row_distance * torch.arange(rows - 1, -1, -1, device=q.device)  # (rows,)
    pooled = q.new_empty(n_kv_heads, n_heads // n_kv_heads, rows, n_blocks)  # the block maxima first
    lse = q.new_full(pooled.shape[:3], float("-inf"))  # (Hk, G, rows)
    chunk = max(1, POOL_CHUNK_TOKENS // block_size)  # blocks
    for some_q, some_k, some_max, some_lse in zip(*(x.split(POOL_CHUNK_HEADS) for x in (q, k_cache, pooled, lse))):
        for first in range(0, n_blocks, chunk):
            last = min(first + chunk, n_blocks)
            k = some_k[:, first:last].flatten(1, 2).to(dtype)  # (heads, chunk * b, D)
            logits = (some_q @ k.mT).unflatten(1, (-1, rows))  # (heads, G, rows, chunk * b)
            if last * block_size > position[0] + 1:  # some of the keys are in the future of some rows
                key = torch.arange(first * block_size, last * block_size, device=q.device)  # (chunk * b,)
                logits = logits.masked_fill(key > position[:, None], float("-inf"))
            some_max[..., first:last] = logits.unflatten(-1, (-1, block_size)).amax(-1)
            some_lse.copy_(torch.logaddexp(some_lse, logits.logsumexp(-1)))
    return pooled.sub_(lse[..., None]).exp_().flatten(0, 1), lse.flatten(0, 1)


# Grid: (row tiles, splits, Hk). The G * rows queries of a KV head are one matrix, cut into tiles of TILE_ROWS; the keys
# are cut into `splits` runs of tiles of TILE_BLOCKS blocks, so that even a single query occupies the whole GPU.
# Traffic: K once per row tile (row tiles run side by side and share it in L2); block maxima and partial lse written.
# The launcher combines the splits' lse, and reads and writes the maxima twice to make probabilities of them.
@triton.jit(do_not_specialize=["n_tokens", "n_blocks", "splits"])
def _pool_kernel(
    q_ptr, k_ptr, block_max_ptr, partial_lse_ptr,
    n_tokens, n_blocks, splits, rows, row_distance, scale,
    stride_qh, stride_qr, stride_kh, stride_kn, stride_kt,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE_BLOCKS: tl.constexpr, TILE_ROWS: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    split, kv_head = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)  # (TILE_ROWS,) row of the group's query matrix
    d = tl.arange(0, HEAD_DIM)
    token = tl.arange(0, TILE_BLOCKS * BLOCK_SIZE)  # (TILE,) of a tile
    in_group = i < GROUP * rows
    position = n_tokens - 1 - (rows - 1 - i % rows) * row_distance  # (TILE_ROWS,) the last key that each row may see
    out_row = kv_head * GROUP * rows + i  # (TILE_ROWS,)
    q_row = (kv_head * GROUP + i // rows) * stride_qh + (i % rows) * stride_qr  # (TILE_ROWS,)
    q = tl.load(q_ptr + q_row[:, None] + d[None, :], mask=in_group[:, None], other=0.0).to(OPERAND)
    m = tl.full((TILE_ROWS,), LOWEST, tl.float32)
    l = tl.zeros((TILE_ROWS,), tl.float32)

    n_tiles = tl.cdiv(n_blocks, TILE_BLOCKS)
    for tile in range(split * n_tiles // splits, (split + 1) * n_tiles // splits):
        block = tile * TILE_BLOCKS + token // BLOCK_SIZE  # (TILE,)
        key = block * BLOCK_SIZE + token % BLOCK_SIZE  # (TILE,)
        k_row = kv_head * stride_kh + block.to(tl.int64) * stride_kn + token % BLOCK_SIZE * stride_kt  # (TILE,)
        k = tl.load(k_ptr + k_row[None, :] + d[:, None], mask=(key < n_tokens)[None, :], other=0.0).to(OPERAND)
        logits = tl.dot(q, k, input_precision="ieee") * scale  # (TILE_ROWS, TILE)
        logits = tl.where(key[None, :] <= position[:, None], logits, float("-inf"))
        block_max = tl.max(tl.reshape(logits, (TILE_ROWS, TILE_BLOCKS, BLOCK_SIZE)), 2)  # (TILE_ROWS, TILE_BLOCKS)
        column = tile * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
        inside = in_group[:, None] & (column < n_blocks)[None, :]
        tl.store(block_max_ptr + out_row[:, None] * n_blocks + column[None, :], block_max, mask=inside)
        m_new = tl.maximum(m, tl.max(block_max, 1))
        l = l * tl.exp(m - m_new) + tl.sum(tl.exp(logits - m_new[:, None]), 1)
        m = m_new
    tl.store(partial_lse_ptr + out_row * splits + split, m + tl.log(l), mask=in_group)


def pool_history(q, k_cache, n_tokens, row_distance=1, backend="torch"):
    """Block-max-pooled causal attention probabilities of past queries (README: prefill and calibrate).

    q        (Hq, rows, D), rotated; row r is the query of position n_tokens - 1 - (rows - 1 - r) * row_distance
    k_cache  (Hk, capacity, b, D), rotated; the first n_tokens keys are read. Several layers may be flattened into the
             heads of both.
    returns  pooled (Hq, rows, N) float32, and the rows' log-sum-exp of scaled logits (Hq, rows) float32
    """
    n_heads, rows, head_dim = q.shape
    n_kv_heads, capacity, block_size, _ = k_cache.shape
    assert n_heads % n_kv_heads == 0 and 1 <= n_tokens <= capacity * block_size
    assert rows >= 1 and (rows - 1) * row_distance < n_tokens, (
        f"{rows} rows, {row_distance} apart, in {n_tokens} tokens"
    )
    if not use_triton(backend, q.device):
        return pool_history_reference(q, k_cache, n_tokens, row_distance)
    check_caches(q, k_cache)
    group, n_blocks = n_heads // n_kv_heads, cdiv(n_tokens, block_size)
    tile_blocks, stages = kv_tile(head_dim, block_size, q.element_size())
    tile_rows = max(16, min(64 if q.element_size() == 2 else 16, triton.next_power_of_2(group * rows)))
    row_tiles = cdiv(group * rows, tile_rows)
    splits = cdiv(PROGRAMS_PER_MULTIPROCESSOR * n_multiprocessors(q.device), row_tiles * n_kv_heads)
    splits = min(splits, cdiv(n_blocks, tile_blocks))
    pooled = q.new_empty((n_heads, rows, n_blocks), dtype=torch.float32)  # the block maxima first
    partial_lse = q.new_empty((n_heads, rows, splits), dtype=torch.float32)
    _pool_kernel[(row_tiles, splits, n_kv_heads)](
        q, k_cache, pooled, partial_lse,
        n_tokens, n_blocks, splits, rows, row_distance, head_dim**-0.5,
        q.stride(0), q.stride(1), k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        GROUP=group, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, TILE_BLOCKS=tile_blocks, TILE_ROWS=tile_rows,
        OPERAND=dot_operand(q.dtype), num_warps=4 if q.element_size() == 2 else 8, num_stages=stages,
    )  # fmt: skip
    lse = partial_lse.logsumexp(-1)  # (Hq, rows)
    return pooled.sub_(lse[..., None]).exp_(), lse


# --------------------------------------------------------------------------------------------------------------------
# 3. Prediction.   score[n] = conv3(mean over rows(relu(conv2(relu(conv1(image))))))[n]
#
# The last convolution is linear and works on single cells, so it may be applied before the mean. With
#     p[r, n] = sum over c of w3[c] * relu(conv2)[c, r, n]      the score is      b3 + (1/H) * sum over r of p[r, n].
# p[r, n] depends on the image two rows and two columns around (r, n). Rows 2 ... H-3 of the window see no vertical
# padding, so their p stays the same while the window slides. After k rows have entered, k + 4 rows are recomputed:
#
#     row        0 1          | 2 ......... H-3-k | H-2-k ........... H-3 | H-2 H-1
#     p          recomputed   | kept              | recomputed            | recomputed
#     because    padding is     no padding within   padding was below them, padding is
#                above them     two rows            now rows are            below them
#
# When the middle has grown by columns, the two columns before the new ones had padding on their right: from there on
# the kept rows are recomputed, too.
#
# The oldest row comes first. When rows enter, the history and the contributions p both move up.
# --------------------------------------------------------------------------------------------------------------------

PREDICT_CELLS = 1 << 14  # cells of the image that the reference convolves at once: about what fits in a CPU's cache
ROWS_PER_PROGRAM = 8  # of contributions; more would share more of the convolutions and use fewer processors


def prepare_weights(state_dict, device="cpu"):
    """The predictor's weights as `predict` takes them: the state dict itself, float32, and the kernels' layouts.

    "conv1.taps" (16, 16): the nine taps, row by row, and seven rows of zeros; "conv2.taps" (9, 16, 32).
    """
    weights = {name: tensor.detach().to(device, torch.float32) for name, tensor in state_dict.items()}
    for name in ("conv1.weight", "conv2.weight"):  # a CPU convolves faster with channels last
        weights[name] = weights[name].contiguous(memory_format=torch.channels_last)
    weights["conv1.taps"] = F.pad(weights["conv1.weight"].reshape(16, 9).T, (0, 0, 0, 7)).contiguous()  # (16, 16)
    weights["conv2.taps"] = weights["conv2.weight"].permute(2, 3, 1, 0).reshape(9, 16, 32).contiguous()
    return weights


def predict_reference(history, start, end, weights):
    """The whole network, as the paper draws it: scores (heads, end - start). It is here to read and to test `predict`
    against; decoding does not call it.
    """
    image = history[:, :, start:end].float()  # (heads, H, n)
    x = F.relu(F.conv2d(image[:, None], weights["conv1.weight"], weights["conv1.bias"], padding=1))  # (heads, 16, H, n)
    x = F.relu(F.conv2d(x, weights["conv2.weight"], weights["conv2.bias"], padding=1))  # (heads, 32, H, n)
    return F.conv1d(x.mean(2), weights["conv3.weight"], weights["conv3.bias"])[:, 0]  # (heads, n)


def stale_strips(history_len, new_rows, start, end, valid_end):
    """What `predict` recomputes: strips (top, bottom, left) of the window, rows top ... bottom - 1 from column left on.

    A strip begins at the image's left edge or at least two columns inside, so that its two columns of context exist.
    """
    if valid_end <= start or new_rows >= history_len - 4:
        return [(0, history_len, start)]
    bottom = history_len - 2 - new_rows
    strips = [(0, 2, start), (bottom, history_len, start)]
    if valid_end < end:
        strips.append((2, bottom, valid_end - 2 if valid_end - start >= 4 else start))
    return strips


def contributions_reference(image, strip, weights):
    """p of one strip: image (heads, H, n) -> (heads, rows, columns).

    Each of the two convolutions needs a row or column around its output: of the image, or zeros at the image's edge.
    """
    top, bottom, left = strip
    context = image[:, max(0, top - 2) : bottom + 2, max(0, left - 2) :]  # (heads, rows', columns')
    pad = (int(left == 0), 1, int(top == 0), int(bottom == image.shape[1]))  # a strip ends at the right edge
    x = F.pad(context[:, None].float(), pad).contiguous(memory_format=torch.channels_last)
    x = F.relu_(F.conv2d(x, weights["conv1.weight"], weights["conv1.bias"]))  # (heads, 16, rows'', columns'')
    x = F.relu_(F.conv2d(F.pad(x, pad), weights["conv2.weight"], weights["conv2.bias"]))  # (heads, 32, rows, columns)
    return x.permute(0, 2, 3, 1) @ weights["conv3.weight"][0, :, 0]  # (heads, rows, columns)


def update_contributions_reference(history, contributions, strips, start, end, weights):
    """Compute the strips of p anew, a few heads at a time, to bound the memory."""
    chunk = max(1, PREDICT_CELLS // max((bottom - top + 4) * (end - left) for top, bottom, left in strips))
    for image, p in zip(history[:, :, start:end].split(chunk), contributions[:, :, start:end].split(chunk)):
        for top, bottom, left in strips:
            left -= start
            p[:, top:bottom, left:] = contributions_reference(
                image, (top, bottom, left), weights
            )  # (chunk, rows, columns)


# Grid: (heads, tiles of TILE columns, chunks of ROWS rows). A program walks down its columns. Both convolutions are
# matrix products on tensor cores: a cell's 3 x 3 patch (9 of 16 columns) times conv1's taps (16, 16), then conv1's 16
# channels times (16, 32) for each of conv2's 9 taps. A row of conv1 enters three rows of conv2, through the bottom,
# middle and top row of taps; only history and p touch global memory. Outside the image conv1's output is zero, as
# conv2's padding demands. Traffic: ROWS + 4 rows of history read (each value 27 times, from the cache all but once),
# ROWS rows of p written; weights stay cached.
@triton.jit(do_not_specialize=["left", "end", "top", "bottom"])
def _contributions_kernel(
    history_ptr, contributions_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, w3_ptr,
    stride_hh, stride_hr, stride_ph, stride_pr, start, left, end, top, bottom, history_len,
    ROWS: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    TAP_ROW: tl.constexpr = 3 * 16 * 32  # weights in a row of conv2's taps
    column = left + tl.program_id(1) * TILE + tl.arange(0, TILE)  # (TILE,)
    first_row = top + tl.program_id(2) * ROWS
    last_row = tl.minimum(first_row + ROWS, bottom)
    tap, c1, c2 = tl.arange(0, 16), tl.arange(0, 16), tl.arange(0, 32)
    w1 = tl.load(w1_ptr + tap[:, None] * 16 + c1[None, :])  # (16 taps, 16 channels)
    b1, b2, w3 = tl.load(b1_ptr + c1), tl.load(b2_ptr + c2), tl.load(w3_ptr + c2)
    bias = tl.zeros([TILE, 32], tl.float32) + b2[None, :]  # (TILE, 32): a row of conv2 before any tap
    acc_previous, acc = bias, bias  # conv2's rows row - 1 and row, as far as they are complete
    for row in range(first_row - 1, last_row + 1):  # of conv1
        acc_next = bias
        tap_row = row - 1 + tap // 3  # (16,)
        row_mask = (tap < 9) & (tap_row >= 0) & (tap_row < history_len)
        for dx in range(3):  # not unrolled: three sets of conv2 weights would spill registers
            x_column = column + dx - 1  # (TILE,) of conv1, as this tap of conv2 sees it
            tap_column = x_column[:, None] - 1 + tap[None, :] % 3  # (TILE, 16)
            patch_mask = row_mask[None, :] & (tap_column >= start) & (tap_column < end)
            cell = head * stride_hh + tap_row[None, :] * stride_hr + tap_column
            patch = tl.load(history_ptr + cell, mask=patch_mask, other=0.0).to(tl.float32)  # (TILE, 16)
            x = tl.dot(patch, w1, input_precision=PRECISION) + b1[None, :]  # (TILE, 16)
            in_image = (x_column >= start) & (x_column < end) & (row >= 0) & (row < history_len)
            x = tl.where(in_image[:, None], tl.maximum(x, 0.0), 0.0)
            tap_ptr = w2_ptr + (dx * 16 + c1[:, None]) * 32 + c2[None, :]  # (16, 32) of tap (0, dx)
            acc_previous = tl.dot(x, tl.load(tap_ptr + 2 * TAP_ROW), acc_previous, input_precision=PRECISION)
            acc = tl.dot(x, tl.load(tap_ptr + TAP_ROW), acc, input_precision=PRECISION)
            acc_next = tl.dot(x, tl.load(tap_ptr), acc_next, input_precision=PRECISION)
        if row > first_row:  # row - 1 is complete, and the program's own
            p = tl.sum(tl.maximum(acc_previous, 0.0) * w3[None, :], 1)  # (TILE,)
            out = head * stride_ph + (row - 1) * stride_pr + column
            tl.store(contributions_ptr + out, p, mask=column < end)
        acc_previous, acc = acc, acc_next


def predict(history, contributions, new_rows, start, end, valid_end, weights, backend="torch"):
    """Scores of the middle blocks (README: predict).

    history        (heads, H, capacity), oldest row first, float32 or float16; columns start ... end - 1 are the image
    contributions  the same shape and dtype, updated in place. It must hold what the previous call left, moved up by the
                   rows that have entered since; that call had the same `start`, and its `end` is now passed as
                   `valid_end`. A first call passes valid_end = start
    new_rows       rows that have entered since that call
    weights        from `prepare_weights`
    returns        scores (heads, end - start) float32
    """
    heads, history_len, capacity = history.shape
    assert contributions.shape == history.shape and history_len >= 5
    assert 0 <= start < end <= capacity and start <= valid_end <= end and new_rows >= 0
    strips = stale_strips(history_len, new_rows, start, end, valid_end)
    if use_triton(backend, history.device):
        assert history.stride(2) == contributions.stride(2) == 1
        tile = 128 if heads * cdiv(end - start, 128) >= n_multiprocessors(history.device) else 64
        precision = "ieee" if interpreted() or is_amd() else "tf32x3"  # float32's accuracy, on tensor cores if possible
        for top, bottom, left in strips:
            grid = heads, cdiv(end - left, tile), cdiv(bottom - top, ROWS_PER_PROGRAM)
            _contributions_kernel[grid](
                history, contributions, weights["conv1.taps"], weights["conv1.bias"],
                weights["conv2.taps"], weights["conv2.bias"], weights["conv3.weight"],
                history.stride(0), history.stride(1), contributions.stride(0), contributions.stride(1),
                start, left, end, top, bottom, history_len,
                ROWS=ROWS_PER_PROGRAM, TILE=tile, PRECISION=precision, num_warps=tile // 16,
            )  # fmt: skip
    else:
        update_contributions_reference(history, contributions, strips, start, end, weights)
    return contributions[:, :, start:end].mean(1, dtype=torch.float32) + weights["conv3.bias"]


# --------------------------------------------------------------------------------------------------------------------
# 4. Block selection.   The k highest scores of each row; equal scores: the lower index first; NaN counts as -inf.
#
# A row may be long: all scores of a model. Its scores, as integers that sort alike, have four digits of 8 bits. Each of
# four launches counts, in every program's chunk of the row, how often each value of a digit occurs among the keys that
# agree with the k-th largest one in all higher digits; from these counts the next launch knows that digit, too. In the
# end the k-th largest key is known, and how many keys above it and equal to it each chunk has: where a program writes.
# --------------------------------------------------------------------------------------------------------------------

SELECT_TILE = 2048  # scores that a program holds at once
SELECT_PROGRAMS = 32  # of a row, at most; a power of two


def select_blocks_reference(scores, k):
    """See `select_blocks`: all scores above the k-th largest one, and the first of those that equal it."""
    scores = scores.masked_fill(scores.isnan(), float("-inf"))
    kth = scores.topk(k, sorted=False).values.amin(-1, keepdim=True)  # (rows, 1)
    larger, equal = scores > kth, scores == kth  # (rows, n)
    ties = k - larger.sum(-1, keepdim=True)  # (rows, 1): how many of the equal ones belong to the best k
    taken = larger | (equal & (equal.cumsum(-1) <= ties))
    return taken.nonzero()[:, 1].view(-1, k).int()


@triton.jit
def _sortable(scores_ptr, index, n):
    """Unsigned integers that sort like the scores: NaN as -inf, -0 as +0."""
    bits = tl.load(scores_ptr + index, mask=index < n, other=0.0).to(tl.int32, bitcast=True)  # (TILE,)
    bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, -0x800000, bits)  # any NaN gets the bits of -inf
    bits = tl.where(bits == -0x80000000, 0, bits)
    key = bits ^ ((bits >> 31) | -0x80000000)  # flip all bits of a negative number, of others the sign bit
    return key.to(tl.uint32, bitcast=True)  # (TILE,)


@triton.jit
def _kth_key(counts_ptr, row, rows, programs, k, DIGITS: tl.constexpr, PROGRAMS: tl.constexpr):
    """The first DIGITS digits of the k-th largest key, from the counts of so many launches.

    Returns these digits; how many of the keys that agree with them belong to the best k; and, of each program, how many
    keys are above them, and how many agree with them.
    """
    program, value = tl.arange(0, PROGRAMS), tl.arange(0, 256)
    key = tl.full([], 0, tl.uint32)
    larger, equal = tl.zeros((PROGRAMS,), tl.int32), tl.zeros((PROGRAMS,), tl.int32)
    for digit in tl.static_range(DIGITS):
        cell = ((digit * rows + row) * programs + program[:, None]) * 256 + value[None, :]
        counts = tl.load(counts_ptr + cell, mask=(program < programs)[:, None], other=0)  # (PROGRAMS, 256)
        total = tl.sum(counts, 0)  # (256,)
        at_least = tl.sum(total, 0) - tl.cumsum(total, 0) + total  # (256,) keys whose digit is value or larger
        kth = tl.sum((at_least >= k).to(tl.int32), 0) - 1  # the k-th largest key's digit
        above = tl.sum(tl.where(value[None, :] > kth, counts, 0), 1)  # (PROGRAMS,)
        larger += above
        equal = tl.sum(tl.where(value[None, :] == kth, counts, 0), 1)
        k -= tl.sum(above, 0)
        key = key | (kth.to(tl.uint32) << (24 - 8 * digit))
    return key, k, larger, equal


# Grid: (programs, rows). A program counts the values of digit DIGIT in its chunk of a row, in tiles of TILE scores.
# Traffic: the row's scores, and 256 counts per program.
@triton.jit(do_not_specialize=["stride_row", "n", "programs"])
def _count_kernel(
    scores_ptr, counts_ptr, stride_row, n, k, programs,
    DIGIT: tl.constexpr, TILE: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    program, row, rows = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row_ptr = scores_ptr + row.to(tl.int64) * stride_row
    prefix, _, _, _ = _kth_key(counts_ptr, row, rows, programs, k, DIGIT, PROGRAMS)
    KNOWN: tl.constexpr = (0xFFFFFFFF << (32 - 8 * DIGIT)) & 0xFFFFFFFF  # the bits of the digits before this one
    counts = tl.zeros((256,), tl.int32)
    tiles = tl.cdiv(n, TILE)
    for tile in range(program * tiles // programs, (program + 1) * tiles // programs):
        index = tile * TILE + tl.arange(0, TILE)  # (TILE,)
        key = _sortable(row_ptr, index, n)
        value = ((key >> (24 - 8 * DIGIT)) & 0xFF).to(tl.int32)
        counts += tl.histogram(value, 256, mask=(index < n) & ((key & KNOWN) == prefix))
    cell = ((DIGIT * rows + row) * programs + program) * 256 + tl.arange(0, 256)
    tl.store(counts_ptr + cell, counts)


# Grid: (programs, rows). A program writes the selected indices of its chunk, after those of the chunks before it.
# Traffic: the row's scores, the counts, and k indices per row.
@triton.jit(do_not_specialize=["stride_row", "n", "programs"])
def _select_kernel(
    scores_ptr, counts_ptr, blocks_ptr, stride_row, n, k, programs, TILE: tl.constexpr, PROGRAMS: tl.constexpr
):
    program, row = tl.program_id(0), tl.program_id(1)
    row_ptr = scores_ptr + row.to(tl.int64) * stride_row
    kth, ties, larger, equal = _kth_key(counts_ptr, row, tl.num_programs(1), programs, k, 4, PROGRAMS)
    before = tl.arange(0, PROGRAMS) < program  # (PROGRAMS,)
    equal_before = tl.sum(tl.where(before, equal, 0), 0)
    written = tl.sum(tl.where(before, larger, 0), 0) + tl.minimum(equal_before, ties)
    ties -= equal_before  # how many of the chunk's own keys that equal the k-th largest are selected
    tiles = tl.cdiv(n, TILE)
    for tile in range(program * tiles // programs, (program + 1) * tiles // programs):
        index = tile * TILE + tl.arange(0, TILE)  # (TILE,)
        key = _sortable(row_ptr, index, n)
        ties_here = ((key == kth) & (index < n)).to(tl.int32)
        taken = ((key > kth) & (index < n)) | ((ties_here > 0) & (tl.cumsum(ties_here, 0) <= ties))
        rank = written + tl.cumsum(taken.to(tl.int32), 0) - 1  # (TILE,)
        tl.store(blocks_ptr + row.to(tl.int64) * k + rank, index, mask=taken)
        ties -= tl.sum(ties_here, 0)
        written += tl.sum(taken.to(tl.int32), 0)


def select_blocks(scores, k, backend="torch"):
    """Indices of the k best scores of each row, ascending (README: select).

    scores   (rows, n) float32
    returns  (rows, k) int32, in 0 ... n - 1
    """
    rows, n = scores.shape
    assert 1 <= k <= n, f"k = {k} of {n} scores"
    if not use_triton(backend, scores.device):
        return select_blocks_reference(scores, k)
    assert scores.dtype == torch.float32 and scores.stride(1) == 1
    programs = min(SELECT_PROGRAMS, cdiv(n, SELECT_TILE))
    counts = scores.new_empty((4, rows, programs, 256), dtype=torch.int32)
    blocks = scores.new_empty((rows, k), dtype=torch.int32)
    options = dict(TILE=SELECT_TILE, PROGRAMS=SELECT_PROGRAMS, num_warps=8)
    for digit in range(4):
        _count_kernel[(programs, rows)](
            scores, counts, scores.stride(0), n, k, programs, DIGIT=digit, **options
        )  # fmt: skip
    _select_kernel[(programs, rows)](scores, counts, blocks, scores.stride(0), n, k, programs, **options)
    return blocks


# --------------------------------------------------------------------------------------------------------------------
# 5. Rotary embedding.   q and k turn by the angles position * freq, two components at a time; k and v enter the cache
# --------------------------------------------------------------------------------------------------------------------


def rotate_and_write_reference(qk, v, freq, scale, position, k_rows, v_rows, row):
    """See `rotate_and_write`."""
    angle, x = position * freq, qk.float()  # (D,), (Hq + Hk, D)
    halves_swapped = x.roll(x.shape[1] // 2, 1)  # (Hq + Hk, D)
    rotated = ((x * angle.cos() + halves_swapped * angle.sin()) * scale).to(qk.dtype)
    k_rows[:, row[0]], v_rows[:, row[0]] = rotated[-len(v) :], v
    return rotated


# Grid: (Hq + Hk,). A program rotates one head, and writes K and V of a KV head into the cache. Traffic: each number
# once; what counts is that five launches become one.
@triton.jit(do_not_specialize=["n_heads"])
def _rotate_kernel(
    qk_ptr, v_ptr, freq_ptr, position_ptr, row_ptr, rotated_ptr, k_rows_ptr, v_rows_ptr,
    scale, n_heads, stride_qkh, stride_vh, stride_rh, stride_rt, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    d = tl.arange(0, HEAD_DIM)
    angle = tl.load(position_ptr).to(tl.float32) * tl.load(freq_ptr + d)  # (D,)
    x = tl.load(qk_ptr + head * stride_qkh + d).to(tl.float32)
    halves_swapped = tl.load(qk_ptr + head * stride_qkh + (d + HEAD_DIM // 2) % HEAD_DIM).to(tl.float32)
    rotated = (x * tl.cos(angle) + halves_swapped * tl.sin(angle)) * scale
    rotated = rotated.to(rotated_ptr.dtype.element_ty)
    tl.store(rotated_ptr + head * HEAD_DIM + d, rotated)
    if head >= n_heads:  # after the query heads come the KV heads
        head -= n_heads
        cell = head.to(tl.int64) * stride_rh + tl.load(row_ptr) * stride_rt + d
        tl.store(k_rows_ptr + cell, rotated)
        tl.store(v_rows_ptr + cell, tl.load(v_ptr + head * stride_vh + d))


def rotate_and_write(qk, v, freq, scale, position, k_rows, v_rows, row, backend="torch"):
    """Rotate the query and the keys of one token, and write its K and V into the cache.

    qk            (Hq + Hk, D): query heads, then key heads; v (Hk, D)
    freq          (D,) float32: radians per position. Component d turns with component (d + D / 2) % D, so the first
                  half is negative; 0 for layers without rotation
    scale         a factor of q and k
    position      (1,) int64: of the token in the text; row (1,) int64: where its K and V go
    k_rows        (Hk, rows, D) views of the cache; v_rows alike, with the same strides
    returns       the rotated qk
    """
    assert position.dtype == row.dtype == torch.int64 and freq.dtype == torch.float32
    assert k_rows.stride() == v_rows.stride() and qk.dtype == v.dtype == k_rows.dtype == v_rows.dtype
    if not use_triton(backend, qk.device):
        return rotate_and_write_reference(qk, v, freq, scale, position, k_rows, v_rows, row)
    assert qk.stride(1) == v.stride(1) == freq.stride(0) == k_rows.stride(2) == 1
    rotated = qk.new_empty(qk.shape)
    _rotate_kernel[(len(qk),)](
        qk, v, freq, position, row, rotated, k_rows, v_rows,
        scale, len(qk) - len(v), qk.stride(0), v.stride(0), k_rows.stride(0), k_rows.stride(1),
        HEAD_DIM=qk.shape[1], num_warps=1,
    )  # fmt: skip
    return rotated


# --------------------------------------------------------------------------------------------------------------------
# 6. Sparse flash-decoding.   out[h] = softmax(q k / sqrt(D)) v over the tokens of the blocks in the row of h's KV head
#
# A row of the table lists blocks: their numbers in k_blocks and v_blocks, which are the whole cache or the slots of an
# offloaded one. -1 stands for no block. Rows of different heads list different numbers of tokens. The G queries of a KV
# head share each block that is read.
# --------------------------------------------------------------------------------------------------------------------

DECODE_TILE = 32  # tokens of a tile: small ones fill the multiprocessors even where lists are short
MIN_TILES = 2  # of a split: the second tile is on its way while the first one is multiplied
MERGE_ELEMENTS = 4096  # of partial results that a program holds at once while it merges


def sparse_decode_reference(q, k_blocks, v_blocks, table, lengths):
    """See `sparse_decode`. What follows a list in its last block must be finite."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    block, listed = read_table(table, lengths, k_blocks.shape[1])  # (Hk, width), (Hk, tokens)
    k, v = (blocks[block.long()].flatten(1, 2).to(dtype) for blocks in (k_blocks, v_blocks))  # (Hk, tokens, D) each
    groups = q.view(len(table), -1, q.shape[1]).to(dtype) * q.shape[1] ** -0.5  # (Hk, G, D)
    logits = (groups @ k.mT).masked_fill(~listed[:, None], float("-inf"))  # (Hk, G, tokens)
    lse = logits.logsumexp(-1)  # (Hk, G)
    p = torch.exp(logits - lse[..., None])  # (Hk, G, tokens)
    return (p @ v).to(q.dtype).view(q.shape), lse.view(-1).float()


def read_table(table, lengths, block_size):
    """The blocks of a table (Hk, n), another listed one in the place of those that are not, and which of their tokens
    (Hk, n * b) belong to the lists.
    """
    token = torch.arange(table.shape[1] * block_size, device=table.device)
    listed = (token < lengths[:, None]) & (table >= 0).repeat_interleave(block_size, 1)  # (Hk, n * b)
    block = torch.where(listed[:, ::block_size], table, -1)  # (Hk, n)
    return torch.where(block < 0, block.amax(1, keepdim=True), block), listed


def divide_work(lengths, block_size):
    """Which program of a layer's `_decode_kernel` takes which part of which list, made once for many tokens.

    All lists are cut into tiles, and a list's tiles into splits; program p takes the p-th split of all. Example: lists
    of 5, 1, 2 and 9 tiles and 4 programs per layer give ceil(17 / 4) = 5 tiles a split and 1, 1, 1 and 2 splits:
    programs 3 and 4 share the last list, and 5 to 7 have nothing to do.

    lengths       (L, Hk) int64: the lists' lengths, in tokens. Lists that grow later have a longer last split
    returns       (L, programs, 4) int32: head or -1, the first tile, the list's first program, its number of splits
    """
    programs = PROGRAMS_PER_MULTIPROCESSOR * n_multiprocessors(lengths.device)
    tiles = cdiv(lengths, max(DECODE_TILE, block_size)).clamp(min=1)  # (L, Hk)
    per_split = cdiv(tiles.sum(-1, keepdim=True), programs).clamp(min=MIN_TILES)  # (L, 1)
    splits = cdiv(tiles, per_split)  # (L, Hk): programs + Hk in all, at most
    end = splits.cumsum(-1)  # (L, Hk): the program after a list's last one
    program = torch.arange(programs + lengths.shape[1], device=lengths.device).expand(len(lengths), -1).contiguous()
    owner = torch.searchsorted(end, program, right=True)  # (L, programs): Hk for none
    head = owner.clamp(max=lengths.shape[1] - 1)
    first, n_splits = (end - splits).gather(-1, head), splits.gather(-1, head)
    head = torch.where(owner == head, head, -1)
    return torch.stack((head, (program - first) * per_split, first, n_splits), -1).int()


# The last program of a list to end merges the list's partial results, each weighted by its share of the exponentials.
@triton.jit
def _merge_splits(
    head, first_program, splits, done_ptr, partial_out_ptr, partial_lse_ptr, out_ptr, lse_ptr,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    tl.debug_barrier()  # all threads have stored; the atomic addition makes that visible to the program that merges
    if tl.atomic_add(done_ptr + head, 1, sem="acq_rel") + 1 == splits:
        tl.store(done_ptr + head, 0)  # for the next launch
        query = tl.arange(0, QUERIES)  # GROUP, rounded up to a power of two
        d = tl.arange(0, HEAD_DIM)
        m = tl.full((QUERIES,), LOWEST, tl.float32)
        l = tl.zeros((QUERIES,), tl.float32)
        acc = tl.zeros((QUERIES, HEAD_DIM), tl.float32)
        for first in range(0, splits, MERGE):
            split = first + tl.arange(0, MERGE)  # (MERGE,)
            valid = (split < splits)[:, None] & (query < GROUP)[None, :]  # (MERGE, QUERIES)
            cell = (first_program + split)[:, None] * GROUP + query[None, :]  # (MERGE, QUERIES)
            lse = tl.load(partial_lse_ptr + cell, mask=valid, other=float("-inf"), cache_modifier=".cg")
            out_cell = cell[:, :, None] * HEAD_DIM + d[None, None, :]  # (MERGE, QUERIES, D)
            out = tl.load(partial_out_ptr + out_cell, mask=valid[:, :, None], other=0.0, cache_modifier=".cg")
            m_new = tl.maximum(m, tl.max(lse, 0))  # (QUERIES,)
            p = tl.exp(lse - m_new[None, :])  # (MERGE, QUERIES)
            acc = acc * tl.exp(m - m_new)[:, None] + tl.sum(out * p[:, :, None], 0)  # (QUERIES, D)
            l = l * tl.exp(m - m_new) + tl.sum(p, 0)
            m = m_new
        merged = (acc / l[:, None]).to(out_ptr.dtype.element_ty)
        head_query = head * GROUP + query
        tl.store(out_ptr + head_query[:, None] * HEAD_DIM + d[None, :], merged, mask=(query < GROUP)[:, None])
        tl.store(lse_ptr + head_query, m + tl.log(l), mask=query < GROUP)


# Grid: (programs,). A program walks its split of one list in tiles of TILE tokens with a running softmax; the GROUP
# queries that share the list are the rows of one tl.dot, padded to 16. Traffic: it reads K and V of the listed blocks
# once; partial results, which it writes and merges, are a few percent of that.
@triton.jit
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, lengths_ptr, work_ptr, done_ptr, partial_out_ptr, partial_lse_ptr, out_ptr, lse_ptr,
    scale, stride_qh, stride_table, stride_n, stride_t,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, OPERAND: tl.constexpr, QUERIES: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    work_ptr += tl.program_id(0) * 4
    head, first_tile = tl.load(work_ptr), tl.load(work_ptr + 1)
    first_program, splits = tl.load(work_ptr + 2), tl.load(work_ptr + 3)
    if head < 0:
        return
    row_ptr, length = table_ptr + head * stride_table, tl.load(lengths_ptr + head).to(tl.int32)
    end_tile = tl.cdiv(length, TILE)  # of the list
    if tl.program_id(0) + 1 < first_program + splits:
        end_tile = tl.load(work_ptr + 5)  # where the next program's split begins
    g = tl.arange(0, GROUP_PAD)  # (GROUP_PAD,) query of the group
    d = tl.arange(0, HEAD_DIM)
    token = tl.arange(0, TILE)  # of a tile
    in_group = g < GROUP
    q_cell = (head * GROUP + g).to(tl.int64)[:, None] * stride_qh + d[None, :]
    q = tl.load(q_ptr + q_cell, mask=in_group[:, None], other=0.0).to(OPERAND)  # (GROUP_PAD, D)
    m = tl.full((GROUP_PAD,), LOWEST, tl.float32)
    l = tl.zeros((GROUP_PAD,), tl.float32)
    acc = tl.zeros((GROUP_PAD, HEAD_DIM), tl.float32)

    list_pos = first_tile * TILE + token  # (TILE,) of tokens in the list
    # (TILE,): block numbers, -1 for none
    block = tl.load(row_ptr + list_pos // BLOCK_SIZE, mask=list_pos < length, other=-1)
    for _ in range(first_tile, end_tile):
        listed = block >= 0  # (TILE,)
        kv_offset = block.to(tl.int64) * stride_n + token % BLOCK_SIZE * stride_t  # (TILE,)
        list_pos += TILE  # load the next tile's block numbers now, to hide their latency
        block = tl.load(row_ptr + list_pos // BLOCK_SIZE, mask=list_pos < length, other=-1)
        k = tl.load(k_ptr + kv_offset[None, :] + d[:, None], mask=listed[None, :], other=0.0).to(OPERAND)  # (D, TILE)
        logits = tl.dot(q, k, input_precision="ieee") * scale  # (GROUP_PAD, TILE)
        logits = tl.where(listed[None, :], logits, float("-inf"))
        m_new = tl.maximum(m, tl.max(logits, 1))  # (GROUP_PAD,)
        p = tl.exp(logits - m_new[:, None])  # (GROUP_PAD, TILE)
        rescale = tl.exp(m - m_new)
        l = l * rescale + tl.sum(p, 1)
        v = tl.load(v_ptr + kv_offset[:, None] + d[None, :], mask=listed[:, None], other=0.0)  # (TILE, D)
        p = p.to(v.dtype).to(OPERAND)  # rounded as v is, in the interpreter too
        acc = tl.dot(p, v.to(OPERAND), acc * rescale[:, None], input_precision="ieee")
        m = m_new
    partial = tl.program_id(0) * GROUP + g  # (GROUP_PAD,)
    tl.store(partial_lse_ptr + partial, m + tl.log(l), mask=in_group)
    out = acc / tl.where(l > 0.0, l, 1.0)[:, None]  # 0 for a split of entries that are all -1
    tl.store(partial_out_ptr + partial[:, None] * HEAD_DIM + d[None, :], out, mask=in_group[:, None])

    _merge_splits(
        head, first_program, splits, done_ptr, partial_out_ptr, partial_lse_ptr, out_ptr, lse_ptr,
        GROUP, QUERIES, HEAD_DIM, MERGE,
    )  # fmt: skip


@cache
def finished_splits(device):
    """Counters of `_decode_kernel`, which is 0 before and after each launch: of up to 1,024 KV heads, int32."""
    return torch.zeros(1024, dtype=torch.int32, device=device)


def sparse_decode(q, k_blocks, v_blocks, table, lengths, work=None, backend="torch"):
    """Attention of one token to the blocks of a table (README: attend).

    q          (Hq, D), rotated
    k_blocks   (blocks, b, D), v_blocks alike, with the same strides
    table      (Hk, width) int32: the blocks that each KV head attends to; -1 for none, which is skipped without a read
    lengths    (Hk,) int64: tokens in each row of the table, all in full blocks but the last; -1 counts as a full block
    work       (programs, 4) int32: a layer's rows of `divide_work`, which the torch backend does not need
    returns    out (Hq, D) in q's dtype, and the log-sum-exp of scaled logits (Hq,) float32
    """
    (n_heads, head_dim), heads = q.shape, len(table)
    assert n_heads % heads == 0 and len(lengths) == heads and k_blocks.shape == v_blocks.shape
    if not use_triton(backend, q.device):
        return sparse_decode_reference(q, k_blocks, v_blocks, table, lengths)
    check_caches(q, k_blocks, v_blocks)
    check_numbers(table, work)
    assert lengths.dtype == torch.int64 and lengths.is_contiguous() and work.is_contiguous() and heads <= 1024
    group, block_size = n_heads // heads, k_blocks.shape[1]
    tile_blocks, stages = kv_tile(head_dim, block_size, q.element_size(), DECODE_TILE)
    queries = triton.next_power_of_2(group)
    out, lse = q.new_empty((n_heads, head_dim)), q.new_empty(n_heads, dtype=torch.float32)
    partial_out = q.new_empty((len(work), group, head_dim), dtype=torch.float32)
    partial_lse = q.new_empty((len(work), group), dtype=torch.float32)
    _decode_kernel[(len(work),)](
        q, k_blocks, v_blocks, table, lengths, work, finished_splits(q.device), partial_out, partial_lse, out, lse,
        head_dim**-0.5, q.stride(0), table.stride(0), k_blocks.stride(0), k_blocks.stride(1),
        GROUP=group, GROUP_PAD=max(16, queries), QUERIES=queries, HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
        TILE=tile_blocks * block_size, MERGE=max(1, MERGE_ELEMENTS // (queries * head_dim)),
        OPERAND=dot_operand(q.dtype), num_warps=4, num_stages=stages,
    )  # fmt: skip
    return out, lse


# --------------------------------------------------------------------------------------------------------------------
# 7. SwiGLU.   y = silu(gate) * up,   silu(x) = x / (1 + exp(-x))
# --------------------------------------------------------------------------------------------------------------------

SWIGLU_TILE = 1024


def swiglu_reference(gate_up):
    """See `swiglu`."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


# Grid: (rows, tiles of TILE numbers). Traffic: each number once.
@triton.jit(do_not_specialize=["n"])
def _swiglu_kernel(gate_up_ptr, out_ptr, n, stride_row, TILE: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)  # (TILE,)
    gate = tl.load(gate_up_ptr + row * stride_row + i, mask=i < n, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride_row + n + i, mask=i < n, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * n + i, out.to(out_ptr.dtype.element_ty), mask=i < n)


def swiglu(gate_up, backend="torch"):
    """gate_up (rows, 2 n): the gates, then what they multiply -> (rows, n)."""
    if not use_triton(backend, gate_up.device):
        return swiglu_reference(gate_up)
    assert gate_up.stride(1) == 1
    rows, n = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty((rows, n))
    _swiglu_kernel[(rows, cdiv(n, SWIGLU_TILE))](gate_up, out, n, gate_up.stride(0), TILE=SWIGLU_TILE, num_warps=4)
    return out


# --------------------------------------------------------------------------------------------------------------------
# 8. Copying.   destination[to[i]] = source[from[i]]   for every i with from[i] >= 0
#
# `assign_slots` decides what to copy, and where: a wanted block that a slot holds stays there, and the others take the
# empty slots in order. A slot whose block is no longer wanted counts as empty from the next call on, not in this one,
# because the token that runs during the copy still reads it. So there are more slots than wanted blocks: spare ones
# for the new blocks.
# --------------------------------------------------------------------------------------------------------------------

COPY_PROGRAMS = 16  # use at most 16 multiprocessors, leaving the rest for compute
COPY_CHUNK = 1024  # indices that a program counts at once


def assign_slots(wanted, held):
    """Slots for the wanted blocks, and which of them must be copied (README: offloaded cache).

    wanted   (rows, k) int32: different blocks in each row, -1 for none
    held     (rows, s) int32: the block in each slot, -1 for none. There must be an empty slot for each wanted block
             that no slot holds
    returns  slots (rows, k) int32, -1 where nothing is wanted; the blocks to copy (rows, k) int32, -1 where there is
             nothing to do; and what each slot holds afterwards (rows, s) int32, -1 for blocks that nobody wants

    It runs once per selection, and for the echoes of each token: a few operations of PyTorch on every backend.
    """
    assert len(wanted) == len(held) and wanted.dtype == held.dtype == torch.int32
    held_blocks, slot_of = held.sort(dim=1, stable=True)  # (rows, s): the empty slots first, in ascending order
    index = torch.searchsorted(held_blocks, wanted).clamp(max=held.shape[1] - 1)  # (rows, k)
    missing = (wanted >= 0) & (held_blocks.gather(1, index) != wanted)  # (rows, k)
    index = torch.where(missing, missing.cumsum(1) - 1, index)  # the r-th missing block takes the r-th empty slot
    slots = slot_of.gather(1, index)  # (rows, k)
    new_held = torch.full_like(held, -1).scatter_reduce(1, slots, wanted, "amax")  # -1 loses
    return torch.where(wanted >= 0, slots, -1).int(), torch.where(missing, wanted, -1), new_held


def copy_blocks_reference(source, destination, source_index, destination_index):
    """See `copy_blocks`."""
    copied = source_index >= 0
    rows = source[source_index[copied].long().to(source.device)]
    destination[destination_index[copied].long().to(destination.device)] = rows.to(destination.device)


# Grid: (COPY_PROGRAMS,). The launcher has sorted the indices: the rows to copy come first. Each program counts them and
# takes every COPY_PROGRAMS-th tile of them, so that all share the work however few there are. A tile is TILE words of 4
# bytes, moved as integers whatever the dtype. Traffic: the indices; those rows, read and written once.
@triton.jit(do_not_specialize=["n"])
def _copy_kernel(
    source_ptr, destination_ptr, source_index_ptr, destination_index_ptr, n, stride_source, stride_destination,
    WORDS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = tl.cdiv(WORDS, TILE)  # of a row
    n_copied = 0  # rows
    for first in range(0, n, CHUNK):
        i = first + tl.arange(0, CHUNK)  # (CHUNK,)
        n_copied += tl.sum((tl.load(source_index_ptr + i, mask=i < n, other=-1) >= 0).to(tl.int32), 0)
    for tile in tl.range(tl.program_id(0), n_copied * TILES, tl.num_programs(0), num_stages=3):
        source_row = tl.load(source_index_ptr + tile // TILES).to(tl.int64)
        destination_row = tl.load(destination_index_ptr + tile // TILES).to(tl.int64)
        word = tile % TILES * TILE + tl.arange(0, TILE)  # (TILE,)
        bits = tl.load(source_ptr + source_row * stride_source + word, mask=word < WORDS)
        tl.store(destination_ptr + destination_row * stride_destination + word, bits, mask=word < WORDS)


def copy_blocks(source, destination, source_index, destination_index, backend="torch"):
    """Copy blocks from (pinned) host memory into device slots, or back (README: offloaded cache).

    source             (blocks, elements): one block's K and V in each row
    destination        (slots, elements), same dtype, written in place
    source_index       (n,) int32; -1: nothing to copy
    destination_index  (n,) int32, no slot twice
    """
    assert source.dtype == destination.dtype and source.shape[1] == destination.shape[1]
    if not use_triton(backend, source_index.device):
        return copy_blocks_reference(source, destination, source_index, destination_index)
    check_numbers(source_index, destination_index)
    assert source.stride(1) == destination.stride(1) == 1
    source, destination = source.view(torch.int32), destination.view(torch.int32)
    source_index, order = source_index.sort(descending=True)
    words = source.shape[1]
    _copy_kernel[(COPY_PROGRAMS,)](
        source, destination, source_index, destination_index[order],
        len(source_index), source.stride(0), destination.stride(0),
        WORDS=words, TILE=min(2048, triton.next_power_of_2(words)), CHUNK=COPY_CHUNK, num_warps=4,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# What the launchers share
# --------------------------------------------------------------------------------------------------------------------


def cdiv(a, b):
    """a / b, rounded up."""
    return -(-a // b)


def interpreted():
    return triton.knobs is not None and triton.knobs.runtime.interpret


def use_triton(backend, device):
    """Whether to run the kernel rather than the reference. Raises RuntimeError where the kernel cannot run."""
    if backend not in ("triton", "torch"):
        raise ValueError(f'backend must be "triton" or "torch", not {backend!r}')
    if backend == "torch":
        return False
    if triton.knobs is None:
        raise RuntimeError('backend="triton" needs Triton (pip install triton); backend="torch" works without it')
    if device.type == "cpu" and not interpreted():
        raise RuntimeError('backend="triton" needs a GPU, or the interpreter: set TRITON_INTERPRET=1')
    return True


def is_amd():
    """Whether kernels are compiled for AMD: 64 KB of local memory, and no tf32x3 products."""
    return torch.version.hip is not None


@cache
def n_multiprocessors(device):
    """Processors to keep busy: the GPU's own number, an H100's for the meta device, few for the interpreter."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 4


def kv_tile(head_dim, block_size, element_size, most=128):
    """How many blocks of K or V, `most` tokens, a program loads at once, and over how many pipeline stages."""
    tokens = max(32, block_size, min(most, TILE_BYTES // (head_dim * element_size)))
    fits = tokens * head_dim * element_size <= TILE_BYTES and not is_amd()
    return tokens // block_size, 3 if fits else 2


def dot_operand(dtype):
    """The dtype in which tl.dot multiplies: the inputs' own, but float32 in the interpreter, which has no bfloat16."""
    if interpreted():
        return tl.float32
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


def supports(head_dim, block_size, element_size):
    """Whether there are attention kernels: powers of two, and tiles of 32 tokens or more that fit in shared memory."""
    tile_bytes = max(32, block_size) * head_dim * element_size
    powers_of_two = head_dim in (16, 32, 64, 128, 256) and block_size in (8, 16, 32, 64)
    return powers_of_two and tile_bytes <= (16384 if is_amd() else 32768)


def check_caches(q, *caches):
    """What the attention kernels assume of q (..., D) and of caches (..., b, D)."""
    block_size, head_dim = caches[0].shape[-2:]
    assert supports(head_dim, block_size, q.element_size()), f"no kernel for D = {head_dim}, b = {block_size}"
    assert q.dtype in (torch.float32, torch.float16, torch.bfloat16), f"no kernel for {q.dtype}"
    for x in (q, *caches):
        assert x.dtype == q.dtype and x.shape[-1] == head_dim and x.stride(-1) == 1, "a head must be contiguous"
    assert all(cache.stride() == caches[0].stride() for cache in caches)


def check_numbers(*tensors):
    """What the kernels assume of numbers of blocks, and of lengths."""
    assert all(x.dtype == torch.int32 and x.stride(-1) == 1 for x in tensors), "rows must be contiguous int32"
