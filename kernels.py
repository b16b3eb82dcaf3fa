"""The five hot paths of a sparse decode step, in the order in which data flows through it.

    1. pool_history         queries x keys      ->  block-max attention probabilities, one row a query
    2. predict              history image       ->  one score a block; and `predict_incremental`, the same numbers
                                                    from five rows instead of all
    3. select_blocks        scores              ->  the best blocks of each head
    4. sparse_decode        query, those blocks ->  attention output and the next history row
    5. copy_blocks          host memory         ->  device slots, only the blocks that are not there yet

Each section gives the mathematics, a PyTorch reference that can be checked by eye, the Triton kernel, and a launcher:
the function that the rest of the project calls. They share shapes and meaning; `backend` says which code runs.

Shapes: Hq query heads, Hk KV heads, G = Hq / Hk queries to a KV head, D head dimension, T tokens in the cache, b tokens
to a block, N = ceil(T / b) blocks. A cache is (Hk, capacity, b, D) with capacity >= N blocks; what lies behind token T
is never read. `heads` stands for selection heads: Hk of them when a group selects together, Hq when each query does.

`python kernels.py` compiles every kernel for GPUs that need not be there, and prints what became of it.

Source: Yang et al., AttentionPredictor, NeurIPS 2025, arXiv 2502.04077. The incremental prediction is this project's.
"""

import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # the torch backend does without
    triton, tl = None, SimpleNamespace(constexpr=lambda value: value)

POOL_CHUNK_TOKENS = 1024  # keys whose logits the reference pooling holds at once
CONVOLVED_CELLS = 1 << 18  # cells of the image that the reference convolves at once
PROGRAMS_PER_MULTIPROCESSOR = 2  # that the splits of a KV cache aim at
TILE_BYTES = 16384  # of K or of V that a program loads at once; several such loads are in flight
COPY_PROGRAMS = 16  # a copy occupies so many multiprocessors, no more
LOG2_E = tl.constexpr(math.log2(math.e))  # kernels take exponentials and logarithms to base 2, as the hardware does
LOWEST = tl.constexpr(-3.0e38)  # a running maximum starts here: finite, so that LOWEST - LOWEST is no NaN


# --------------------------------------------------------------------------------------------------------------------
# How a kernel is launched.   Every kernel goes through `_launch`. Inside `recorded_launches` it notes the launch
# instead of making it, so launchers can be called on meta tensors of any size, and what is compiled ahead of time at
# the end of this file is by construction what a decode step launches.
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Launch:
    kernel: Callable
    grid: tuple
    arguments: tuple  # the runtime arguments, in the kernel's order
    constants: dict  # its tl.constexpr arguments
    num_warps: int
    num_stages: int
    cost: "Cost"


@dataclass
class Cost:
    """What a launch reads and writes in bytes, and multiplies; and the least that its hot path could do with."""

    bytes_moved: int
    multiply_adds: int = 0
    least_bytes: int = 0  # 0 for a helper kernel: the least of a path stands at its main kernel
    least_multiply_adds: int = 0


_recording: list[Launch] | None = None


@contextmanager
def recorded_launches():
    """The list of launches that the launchers called inside would make; none is made."""
    global _recording
    outer, _recording = _recording, []
    try:
        yield _recording
    finally:
        _recording = outer


def _launch(kernel, grid, *arguments, cost, num_warps=4, num_stages=1, **constants):
    """`cost` is a function of nothing that returns the launch's `Cost`; it is called only when recording."""
    if _recording is not None:
        _recording.append(Launch(kernel, grid, arguments, constants, num_warps, num_stages, cost()))
    else:
        kernel[grid](*arguments, **constants, **_options(num_warps, num_stages, hip=torch.version.hip is not None))


def _options(num_warps, num_stages, hip):
    """Compiler options: AMD's 64 KB of local memory hold fewer tiles in flight."""
    return dict(num_warps=num_warps, num_stages=min(num_stages, 2) if hip else num_stages)


def _jit(*varying):
    """`triton.jit`, if there is Triton. `varying` names integers that change every step: no recompiling for those."""
    return triton.jit(do_not_specialize=varying) if triton else lambda kernel: kernel


def interpreted():
    return triton is not None and triton.knobs.runtime.interpret


def use_triton(backend, device):
    """Whether the kernel is to run, not the reference; an error where it cannot."""
    if backend not in ("triton", "torch"):
        raise ValueError(f'backend must be "triton" or "torch", not {backend!r}')
    if backend == "torch":
        return False
    if triton is None:
        raise RuntimeError('backend="triton" needs Triton (pip install triton); backend="torch" does without')
    if device.type == "cpu" and not interpreted():
        raise RuntimeError('backend="triton" needs a GPU, or its interpreter: set TRITON_INTERPRET=1')
    return True


def _operand(dtype):
    """What tl.dot multiplies: the inputs' own dtype, but float32 in the interpreter, which has no bfloat16 products."""
    if interpreted():
        return tl.float32
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


def _power_of_two(n):
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()


@cache
def _n_multiprocessors(device):
    """Processors to keep busy: the GPU's own number; an H200's when recording; few for the sequential interpreter."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 4


# --------------------------------------------------------------------------------------------------------------------
# 1. History pooling.   pooled[h, r, n] = max over the keys t of block n, t <= position of r, of softmax(q k / sqrt(D))
#
# One pass over K: every block keeps its largest logit, every row its running log-sum-exp, and
# pooled = exp(block_max - lse). Nothing of size rows x T exists.
# --------------------------------------------------------------------------------------------------------------------


def pool_history_reference(q, k_cache, n_tokens):
    """See `pool_history`. Logits of `POOL_CHUNK_TOKENS` keys are held at a time."""
    n_heads, rows, head_dim = q.shape
    n_kv_heads, _, block_size, _ = k_cache.shape
    n_blocks = -(-n_tokens // block_size)
    dtype = torch.promote_types(q.dtype, torch.float32)
    q = q.reshape(n_kv_heads, -1, head_dim).to(dtype) * head_dim**-0.5  # (Hk, G * rows, D)
    position = torch.arange(n_tokens - rows, n_tokens, device=q.device)  # (rows,)
    block_max = q.new_empty(n_kv_heads, n_heads // n_kv_heads, rows, n_blocks)
    lse = q.new_full(block_max.shape[:3], float("-inf"))  # (Hk, G, rows)
    chunk = max(1, POOL_CHUNK_TOKENS // block_size)
    for first in range(0, n_blocks, chunk):
        last = min(first + chunk, n_blocks)
        k = k_cache[:, first:last].flatten(1, 2).to(dtype)  # (Hk, chunk * b, D)
        logits = (q @ k.mT).unflatten(1, (-1, rows))  # (Hk, G, rows, chunk * b)
        key = torch.arange(first * block_size, last * block_size, device=q.device)
        logits = logits.masked_fill(key > position[:, None], float("-inf"))
        block_max[..., first:last] = logits.unflatten(-1, (-1, block_size)).amax(-1)
        lse = torch.logaddexp(lse, logits.logsumexp(-1))
    pooled = torch.exp(block_max - lse[..., None])  # (Hk, G, rows, N)
    return pooled.flatten(0, 1), lse.flatten(0, 1)


@_jit()
def _merged_lse(parts, splits, MAX_SPLITS: tl.constexpr):
    """Base-2 log-sum-exp over the `splits` partial ones behind each of the pointers `parts` (rows,)."""
    split = tl.arange(0, MAX_SPLITS)[None, :]
    part = tl.load(parts[:, None] + split, mask=split < splits, other=float("-inf"))  # (rows, MAX_SPLITS)
    top = tl.max(part, 1)  # (rows,)
    return top + tl.log2(tl.sum(tl.exp2(part - top[:, None]), 1))


# Grid: (row tiles, splits, Hk). The G * rows queries of a KV head are one matrix, cut into tiles of TILE_ROWS; the keys
# are cut into `splits` runs of tiles of TILE_BLOCKS blocks, so that a single query, too, occupies the whole machine.
# Traffic: K once per row tile (tiles run side by side and share it in L2), the block maxima written once.
@_jit("n_tokens", "n_blocks", "splits")
def _pool_kernel(
    q, k, block_max, partial_lse,
    n_tokens, n_blocks, splits, rows, group_rows, scale,
    q_head, q_row, k_head, k_block, k_token,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_PAD: tl.constexpr, TILE_BLOCKS: tl.constexpr, TILE_ROWS: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    split, kv_head = tl.program_id(1), tl.program_id(2).to(tl.int64)
    m = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)  # (TILE_ROWS,) row of the group's query matrix
    d = tl.arange(0, HEAD_PAD)
    token = tl.arange(0, TILE_BLOCKS * BLOCK_PAD)  # (TILE,) of a tile
    place, slot = token // BLOCK_PAD, token % BLOCK_PAD  # block in the tile, token in the block
    in_group, in_head = m < group_rows, d < HEAD_DIM

    q += (kv_head * GROUP + m // rows) * q_head + (m % rows) * q_row  # (TILE_ROWS,)
    q_tile = tl.load(q[:, None] + d[None, :], mask=in_group[:, None] & in_head[None, :], other=0.0).to(OPERAND)
    position = n_tokens - rows + m % rows  # (TILE_ROWS,) the last key that each row may see
    row = kv_head * group_rows + m  # (TILE_ROWS,) of the outputs
    k += kv_head * k_head
    top = tl.full((TILE_ROWS,), LOWEST, tl.float32)
    total = tl.zeros((TILE_ROWS,), tl.float32)

    n_tiles = tl.cdiv(n_blocks, TILE_BLOCKS)
    for tile in range(split * n_tiles // splits, (split + 1) * n_tiles // splits):
        first = tile * TILE_BLOCKS
        key = (first + place) * BLOCK_SIZE + slot  # (TILE,)
        there = (key < n_tokens) & (slot < BLOCK_SIZE)
        offset = first.to(tl.int64) * k_block + place * k_block + slot * k_token
        k_tile = tl.load(k + offset[None, :] + d[:, None], mask=there[None, :] & in_head[:, None], other=0.0)
        logits = tl.dot(q_tile, k_tile.to(OPERAND), input_precision="ieee") * scale  # (TILE_ROWS, TILE)
        seen = (key[None, :] <= position[:, None]) & (slot < BLOCK_SIZE)[None, :]
        logits = tl.where(seen, logits, float("-inf"))
        best = tl.max(tl.reshape(logits, (TILE_ROWS, TILE_BLOCKS, BLOCK_PAD)), 2)  # (TILE_ROWS, TILE_BLOCKS)
        block = first + tl.arange(0, TILE_BLOCKS)
        inside = in_group[:, None] & (block < n_blocks)[None, :]
        tl.store(block_max + row[:, None] * n_blocks + block[None, :], best, mask=inside)
        higher = tl.maximum(top, tl.max(best, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)
        top = higher
    tl.store(partial_lse + row * splits + split, top + tl.log2(total), mask=in_group)


# Grid: (row tiles, column tiles). Turns block maxima into probabilities where they lie: one read, one write.
@_jit("n_rows", "n_blocks", "splits")
def _pool_normalize_kernel(
    block_max, partial_lse, lse, n_rows, n_blocks, splits,
    MAX_SPLITS: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    merged = _merged_lse(partial_lse + tl.minimum(row, n_rows - 1) * splits, splits, MAX_SPLITS)  # (TILE_ROWS,)
    if tl.program_id(1) == 0:
        tl.store(lse + row, merged / LOG2_E, mask=row < n_rows)
    pointer = block_max + row[:, None] * n_blocks + column[None, :]  # (TILE_ROWS, TILE_COLUMNS)
    inside = (row < n_rows)[:, None] & (column < n_blocks)[None, :]
    tl.store(pointer, tl.exp2(tl.load(pointer, mask=inside, other=0.0) - merged[:, None]), mask=inside)


def _tiles(head_dim, block_size, element_size):
    """Padded head, padded block, the number of blocks in a tile of K or V, and how many stages its loads may take."""
    head_pad, block_pad = max(16, _power_of_two(head_dim)), _power_of_two(block_size)
    tokens = max(32, block_pad, min(128, TILE_BYTES // (head_pad * element_size)))
    stages = 3 if tokens * head_pad * element_size <= TILE_BYTES else 2  # what fits into shared memory
    return head_pad, block_pad, tokens // block_pad, stages


def _splits(device, programs, n_tiles):
    """Into how many runs `n_tiles` tiles are cut if `programs` share each run; the power of two that bounds it."""
    wanted = -(-PROGRAMS_PER_MULTIPROCESSOR * _n_multiprocessors(device) // programs)
    return min(wanted, n_tiles), _power_of_two(wanted)


def pool_history(q, k_cache, n_tokens, backend="torch"):
    """Block-max-pooled causal attention probabilities of the last `rows` queries (README: prefill and calibration).

    q        (Hq, rows, D): queries of positions n_tokens - rows ... n_tokens - 1, rotated
    k_cache  (Hk, capacity, b, D): keys, rotated; the first n_tokens are read
    returns  pooled (Hq, rows, N) float32, and the rows' log-sum-exp of scaled logits (Hq, rows) float32
    """
    _check_cache(q, k_cache, n_tokens)
    if not 1 <= q.shape[1] <= n_tokens:
        raise ValueError(f"rows must lie in 1 ... n_tokens = {n_tokens}, not {q.shape[1]}")
    if not use_triton(backend, q.device):
        return pool_history_reference(q, k_cache, n_tokens)
    _check_layout(q, k_cache)
    n_heads, rows, head_dim = q.shape
    n_kv_heads, _, block_size, _ = k_cache.shape
    group = n_heads // n_kv_heads
    n_blocks = -(-n_tokens // block_size)
    size = q.element_size()
    head_pad, block_pad, tile_blocks, stages = _tiles(head_dim, block_size, size)
    tile_rows = max(16, min(64 if size == 2 else 16, _power_of_two(group * rows)))
    row_tiles = -(-group * rows // tile_rows)
    n_tiles = -(-n_blocks // tile_blocks)
    splits, max_splits = _splits(q.device, row_tiles * n_kv_heads, n_tiles)
    pooled = q.new_empty((n_heads, rows, n_blocks), dtype=torch.float32)  # block maxima first, then probabilities
    lse = q.new_empty((n_heads, rows), dtype=torch.float32)
    partial_lse = q.new_empty((n_heads, rows, splits), dtype=torch.float32)

    def cost():
        k_bytes = n_kv_heads * n_tokens * head_dim * size
        outside = q.numel() * size + 4 * pooled.numel()
        computed = n_kv_heads * row_tiles * tile_rows * n_tiles * tile_blocks * block_pad * head_pad
        return Cost(row_tiles * k_bytes + outside, computed, k_bytes + outside, n_heads * rows * n_tokens * head_dim)

    _launch(
        _pool_kernel, (row_tiles, splits, n_kv_heads),
        q, k_cache, pooled, partial_lse,
        n_tokens, n_blocks, splits, rows, group * rows, head_dim**-0.5 * math.log2(math.e),
        *q.stride()[:2], *k_cache.stride()[:3],
        GROUP=group, HEAD_DIM=head_dim, HEAD_PAD=head_pad,
        BLOCK_SIZE=block_size, BLOCK_PAD=block_pad, TILE_BLOCKS=tile_blocks, TILE_ROWS=tile_rows,
        OPERAND=_operand(q.dtype),
        num_warps=4, num_stages=stages, cost=cost,
    )  # fmt: skip
    n_rows = n_heads * rows
    _launch(
        _pool_normalize_kernel, (-(-n_rows // 16), -(-n_blocks // 128)),
        pooled, partial_lse, lse, n_rows, n_blocks, splits,
        MAX_SPLITS=max_splits, TILE_ROWS=16, TILE_COLUMNS=128,
        cost=lambda: Cost(8 * pooled.numel()),
    )  # fmt: skip
    return pooled, lse


# --------------------------------------------------------------------------------------------------------------------
# 2. Convolutional prediction.   score = conv3(mean over rows(relu(conv2(relu(conv1(image))))))
#
# The last row of convolution is linear and per cell, so it may go before the mean: with
#     p[r, n] = sum over c of w3[c] * relu(conv2)[c, r, n]      the score is      b3 + (1/H) * sum over r of p[r, n].
# p[r, n] looks two rows and two columns around it. Rows 2 ... H-3 of the window therefore see no vertical padding, and
# keep their p while the window slides: a step has to compute only rows 0 and 1, whose upper padding has come nearer,
# and rows H-3 ... H-1. When the middle grows by a column, the two columns before it lose their right padding: three
# columns.
#
# The history is a ring of H rows: row r of the window (0 the oldest) lies in slot (newest + 1 + r) mod H. The
# contributions p live in a ring of the same shape and slots.
# --------------------------------------------------------------------------------------------------------------------


def window_slots(newest, history_len, device=None):
    """Ring slots of the window's rows, oldest first: (H,) int64."""
    return (torch.arange(history_len, device=device) + newest + 1) % history_len


def predict_reference(history, newest, start, end, weights):
    """See `predict`: the network as the paper draws it."""
    image = history[:, window_slots(newest, history.shape[1], history.device), start:end]  # (heads, H, n)
    x = F.relu(F.conv2d(image[:, None], weights["conv1.weight"], weights["conv1.bias"], padding=1))  # (heads, 16, H, n)
    x = F.relu(F.conv2d(x, weights["conv2.weight"], weights["conv2.bias"], padding=1))  # (heads, 32, H, n)
    return F.conv1d(x.mean(2), weights["conv3.weight"], weights["conv3.bias"])[:, 0]  # (heads, n)


def contributions_reference(strip, weights, left, right, top, bottom):
    """p of the inner cells of a strip of the image.

    strip  (heads, rows, columns); each flag says whether that side is the image's own edge, hence zero-padded. A side
           that is not gives two rows or columns of the strip for context.
    """
    parts = strip.split(max(1, CONVOLVED_CELLS // strip[0].numel()))
    if len(parts) > 1:
        return torch.cat([contributions_reference(part, weights, left, right, top, bottom) for part in parts])
    pad = (int(left), int(right), int(top), int(bottom))
    x = F.relu(F.conv2d(F.pad(strip[:, None], pad), weights["conv1.weight"], weights["conv1.bias"]))
    x = F.relu(F.conv2d(F.pad(x, pad), weights["conv2.weight"], weights["conv2.bias"]))  # (heads, 32, rows', columns')
    return F.conv2d(x, weights["conv3.weight"][..., None])[:, 0]  # (heads, rows', columns')


def predict_incremental_reference(history, contributions, newest, start, end, valid_end, weights):
    """See `predict_incremental`."""
    slots = window_slots(newest, history.shape[1], history.device)  # (H,)
    if valid_end < end:
        first = max(start, valid_end - 4)  # two stale columns, and two more for context
        left = first == start
        p = contributions_reference(history[:, slots, first:end], weights, left, True, False, False)
        contributions[:, slots[2:-2], first if left else first + 2 : end] = p
    top = contributions_reference(history[:, slots[:4], start:end], weights, True, True, True, False)  # rows 0, 1
    bottom = contributions_reference(history[:, slots[-5:], start:end], weights, True, True, False, True)  # H-3 ... H-1
    contributions[:, slots[:2], start:end] = top
    contributions[:, slots[-3:], start:end] = bottom
    return contributions[:, :, start:end].mean(1) + weights["conv3.bias"]  # (heads, n)


# The kernels. A tile is a strip of columns, and walks down the window. Both convolutions are matrix products on tensor
# cores: a cell's 3 x 3 patch (9 of 16 places) times conv1's (16, 16), then conv1's 16 channels times (16, 32), once for
# each of conv2's 9 taps. conv1's row is added to the three rows of conv2 that look at it: three rows of conv2 are held
# and one of conv1, and nothing but history, p and scores touches global memory. conv1's output outside the image is
# zero, as conv2's padding demands, and not what conv1 would make of padding.

W2_LOW, W1, W1_LOW = tl.constexpr(4608), tl.constexpr(9216), tl.constexpr(9472)  # places in the packed weights
B1, B2, W3, B3 = tl.constexpr(9728), tl.constexpr(9744), tl.constexpr(9776), tl.constexpr(9808)
INTERIOR_ROWS = 8  # rows that a program of `_interior_kernel` computes: few, as one tile's walk is the step's delay

_packed = ([], [], None)  # the weights last packed, their stamps, and what became of them


def _tf32_parts(x):
    """x = high + low, high being exact in tf32's 10 bits of mantissa."""
    high = (x.contiguous().view(torch.int32) & -8192).view(torch.float32)
    return high, x - high


def _pack_weights(weights):
    """The predictor as one vector: conv2 (3, 3, 16, 32) and conv1 (16 taps, 16), each in tf32 parts; b1; b2; w3; b3.

    Packed anew only when the weights are others, or have been written to.
    """
    global _packed
    tensors = [weights[f"conv{i}.{kind}"] for i in (1, 2, 3) for kind in ("weight", "bias")]
    stamps = [(t.device, t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
    if stamps != _packed[1]:  # the tensors are held, so no others can come to lie at their addresses
        if any(tensor.dtype != torch.float32 for tensor in tensors):
            raise ValueError(f"the predictor must be float32, not {[tensor.dtype for tensor in tensors]}")
        w1, b1, w2, b2, w3, b3 = (tensor.detach() for tensor in tensors)
        w1 = F.pad(w1.reshape(16, 9).T, (0, 0, 0, 7))  # (16 taps, 16)
        parts = *_tf32_parts(w2.permute(2, 3, 1, 0)), *_tf32_parts(w1), b1, b2, w3, b3
        packed = torch.cat([part.flatten() for part in parts])  # (9809,)
        if packed.is_cuda:
            torch.cuda.synchronize(packed.device)  # later calls may come on other streams
        _packed = (tensors, stamps, packed)
    return _packed[2]


@_jit()
def _dot_parts(x_high, x_low, w_high, w_low, acc):
    """acc + x @ w to float32's accuracy from three tf32 products; low @ low is below it."""
    acc = tl.dot(x_low, w_high, acc, input_precision="tf32")
    acc = tl.dot(x_high, w_low, acc, input_precision="tf32")
    return tl.dot(x_high, w_high, acc, input_precision="tf32")


@_jit()
def _split(x):
    """`_tf32_parts`."""
    high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, x - high


@_jit()
def _bias_rows(weights, BLOCK: tl.constexpr):
    """conv2's row before any tap is added."""
    b2 = tl.load(weights + B2 + tl.arange(0, 32))  # (32,)
    return tl.zeros([BLOCK, 32], tl.float32) + b2[None, :]  # (BLOCK, 32)


@_jit()
def _convolve_row(row, above, here, history, row_stride, weights, column, newest, start, end, H):
    """Adds conv1's row `row` to conv2's rows row - 1, row, row + 1; the first of them is then complete."""
    tap = tl.arange(0, 16)[None, :]  # (1, 16), a patch's places, those from 9 on empty
    c1 = tl.arange(0, 16)
    c2 = tl.arange(0, 32)
    w1 = weights + W1 + c1[:, None] * 16 + c1[None, :]  # (16 taps, 16)
    w1_high, w1_low = tl.load(w1), tl.load(w1 + (W1_LOW - W1))
    b1 = tl.load(weights + B1 + c1)[None, :]  # (1, 16)
    tap_row = row - 1 + tap // 3  # (1, 16)
    slot = newest + 1 + tap_row
    slot = tl.where(slot >= H, slot - H, slot)  # rows outside the window are masked
    in_window = (tap < 9) & (tap_row >= 0) & (tap_row < H)
    below = _bias_rows(weights, column.shape[0])  # (BLOCK, 32)
    for dx in range(3):  # a loop that stays one: unrolled, conv2's weights would fill the registers
        x_column = column[:, None] + (dx - 1)  # (BLOCK, 1), where this tap of conv2 looks
        tap_column = x_column - 1 + tap % 3  # (BLOCK, 16)
        in_image = in_window & (tap_column >= start) & (tap_column < end)
        patch = tl.load(history + slot * row_stride + tap_column, in_image, 0.0)  # (BLOCK, 16)
        high, low = _split(patch)
        x = tl.maximum(_dot_parts(high, low, w1_high, w1_low, tl.zeros_like(patch)) + b1, 0.0)  # (BLOCK, 16)
        high, low = _split(tl.where((x_column >= start) & (x_column < end), x, 0.0))
        w2 = weights + dx * 512 + c1[:, None] * 32 + c2[None, :]  # (16, 32), tap (0, dx); a row of taps is 1536
        above = _dot_parts(high, low, tl.load(w2 + 3072), tl.load(w2 + (W2_LOW + 3072)), above)
        here = _dot_parts(high, low, tl.load(w2 + 1536), tl.load(w2 + (W2_LOW + 1536)), here)
        below = _dot_parts(high, low, tl.load(w2), tl.load(w2 + W2_LOW), below)
    return above, here, below


@_jit()
def _contribution(conv2_row, weights):
    """p of a complete row of conv2."""
    w3 = tl.load(weights + W3 + tl.arange(0, 32))  # (32,)
    return tl.sum(tl.maximum(conv2_row, 0.0) * w3[None, :], 1)  # (BLOCK,)


# Grid: (heads, tiles of BLOCK columns). A program reads its columns of the history once from memory, with two more on
# either side, and then from the cache for each of 27 taps; it writes BLOCK scores. The weights, 39 KB, stay cached.
@_jit("newest", "start", "end")
def _predict_kernel(history, scores, weights, head_stride, row_stride, newest, start, end, H, BLOCK: tl.constexpr):
    head = tl.program_id(0)
    column = start + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    history += head.to(tl.int64) * head_stride
    total = tl.zeros([BLOCK], tl.float32)
    blank = _bias_rows(weights, BLOCK)  # (BLOCK, 32)
    _, above, here = _convolve_row(0, blank, blank, history, row_stride, weights, column, newest, start, end, H)
    for row in range(1, H):
        done, above, here = _convolve_row(row, above, here, history, row_stride, weights, column, newest, start, end, H)
        total += _contribution(done, weights)
    total += _contribution(above, weights)  # row H - 1: all zero below it
    score = total / H + tl.load(weights + B3)
    tl.store(scores + head * (end - start) + column - start, score, column < end)


# Grid: (heads, tiles of BLOCK stale columns, chunks of ROWS interior rows), on the steps on which the middle grows.
# Rewrites p of rows 2 ... H-4 there; `_edge_rows_kernel` computes the other five rows everywhere.
@_jit("newest", "start", "first", "end")
def _interior_kernel(
    history, contributions, weights, head_stride, row_stride, p_head_stride, p_row_stride,
    newest, start, first, end, H, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    column = first + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    top = 2 + tl.program_id(2) * ROWS
    bottom = tl.minimum(top + ROWS, H - 3)
    history += head * head_stride
    contributions += head * p_head_stride
    above = _bias_rows(weights, BLOCK)  # (BLOCK, 32)
    here = above
    for row in range(top - 1, bottom + 1):
        done, above, here = _convolve_row(row, above, here, history, row_stride, weights, column, newest, start, end, H)
        if row > top:  # row - 1 is complete; the first two lack what lies above the chunk
            slot = (newest + row) % H
            tl.store(contributions + slot * p_row_stride + column, _contribution(done, weights), column < end)


# Grid: (heads, tiles of BLOCK columns). A program reads the H - 5 rows of p that still hold, and 4 + 5 rows of history;
# writes p of the five rows at the edges, and BLOCK scores. What it writes it keeps in registers for the mean.
@_jit("newest", "start", "end")
def _edge_rows_kernel(
    history, contributions, scores, weights, head_stride, row_stride, p_head_stride, p_row_stride,
    newest, start, end, H, BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    column = start + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    inside = column < end
    history += head.to(tl.int64) * head_stride
    contributions += head.to(tl.int64) * p_head_stride
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(2, H - 3, 16):
        row = first + tl.arange(0, 16)[:, None]  # (16, 1)
        kept = contributions + ((newest + 1 + row) % H) * p_row_stride + column[None, :]  # (16, BLOCK)
        total += tl.sum(tl.load(kept, (row < H - 3) & inside[None, :], 0.0), 0)
    blank = _bias_rows(weights, BLOCK)  # (BLOCK, 32)
    above, here = blank, blank
    for row in tl.static_range(3):  # completes rows 0 and 1 of the window
        done, above, here = _convolve_row(row, above, here, history, row_stride, weights, column, newest, start, end, H)
        if row >= 1:
            p = _contribution(done, weights)  # (BLOCK,)
            total += p
            tl.store(contributions + ((newest + row) % H) * p_row_stride + column, p, inside)
    above, here = blank, blank
    for i in tl.static_range(5):  # completes rows H-3, H-2 and, with nothing below it, H-1
        row = H - 4 + i
        if i < 4:
            done, above, here = _convolve_row(
                row, above, here, history, row_stride, weights, column, newest, start, end, H
            )
        else:
            done = above
        if i >= 2:
            p = _contribution(done, weights)  # (BLOCK,)
            total += p
            tl.store(contributions + ((newest + row) % H) * p_row_stride + column, p, inside)
    tl.store(scores + head * (end - start) + column - start, total / H + tl.load(weights + B3), inside)


_ROW_MULTIPLY_ADDS = 3 * (3 * 16 * 16 + 9 * 16 * 32)  # a cell of `_convolve_row`: three tf32 products each


def _column_tile(heads, columns, device):
    """Wide tiles waste less on their borders and weights; narrow ones occupy a GPU when there are few columns."""
    return 128 if heads * -(-columns // 128) >= _n_multiprocessors(device) else 64


def predict(history, newest, start, end, weights, backend="torch"):
    """Scores of the middle blocks for the next token, the whole network computed (README: predict).

    history  (heads, H, capacity) float32 ring, see above; columns start ... end - 1 are the image
    weights  the predictor's state dict, float32
    returns  scores (heads, end - start) float32
    """
    _check_window(history, newest, start, end)
    if not use_triton(backend, history.device):
        return predict_reference(history, newest, start, end, weights)
    _check_ring(history)
    heads, history_len, _ = history.shape
    n = end - start
    tile = _column_tile(heads, n, history.device)
    grid = heads, -(-n // tile)
    scores = history.new_empty(heads, n)

    def cost():
        columns, read = heads * grid[1] * tile, heads * (n + 4 * grid[1])
        return Cost(
            bytes_moved=4 * (read * history_len + scores.numel()),
            multiply_adds=columns * history_len * _ROW_MULTIPLY_ADDS,
            least_bytes=4 * (heads * n * history_len + scores.numel()),
            least_multiply_adds=predict_multiply_adds(heads, history_len, start, end),
        )

    _launch(
        _predict_kernel, grid, history, scores, _pack_weights(weights), *history.stride()[:2], newest, start, end,
        history_len, cost=cost, BLOCK=tile,
    )  # fmt: skip
    return scores


def predict_incremental(history, contributions, newest, start, end, valid_end, weights, backend="torch"):
    """The scores of `predict`, from the contributions that the previous steps left: five rows a step.

    contributions  (heads, H, capacity) float32 ring, updated in place. Must come from the call of the step before, with
                   the same start and one row pushed since; columns from valid_end on (that call's `end`) are new. A
                   first call passes valid_end = start, and computes everything.
    The rest is as in `predict`. Raises ValueError for H < 5, where no row is free of padding.
    """
    _check_window(history, newest, start, end)
    if contributions.shape != history.shape:
        raise ValueError(f"contributions {tuple(contributions.shape)} and history {tuple(history.shape)} must agree")
    if history.shape[1] < 5:
        raise ValueError(f"incremental prediction needs history_len >= 5, not {history.shape[1]}")
    if not start <= valid_end <= end:
        raise ValueError(f"valid_end must lie in start ... end = {start} ... {end}, not {valid_end}")
    if not use_triton(backend, history.device):
        return predict_incremental_reference(history, contributions, newest, start, end, valid_end, weights)
    _check_ring(history)
    _check_ring(contributions)
    heads, history_len, _ = history.shape
    packed = _pack_weights(weights)
    strides = *history.stride()[:2], *contributions.stride()[:2]
    if valid_end < end and history_len > 5:
        first = max(start, valid_end - 2)
        tile = _column_tile(heads, end - first, history.device)
        grid = heads, -(-(end - first) // tile), -(-(history_len - 5) // INTERIOR_ROWS)

        def interior_cost():
            rows = history_len - 5 + 2 * grid[2]  # of conv1
            return Cost(
                bytes_moved=4 * heads * (end - first) * (rows + history_len - 5),
                multiply_adds=heads * grid[1] * tile * rows * _ROW_MULTIPLY_ADDS,
            )

        _launch(
            _interior_kernel, grid, history, contributions, packed, *strides, newest, start, first, end,
            history_len, cost=interior_cost, ROWS=INTERIOR_ROWS, BLOCK=tile,
        )  # fmt: skip
    n = end - start
    tile = _column_tile(heads, n, history.device)
    grid = heads, -(-n // tile)
    scores = history.new_empty(heads, n)

    def cost():
        least = 4 * heads * n * (history_len + 10)  # H - 5 rows of p and 9 of history read, 5 of p and a score written
        cell = 3 * (7 * 3 * 16 * 16 + (5 * 9 - 2 * 3) * 16 * 32)  # 7 rows of conv1; of conv2 5, less taps on padding
        return Cost(
            bytes_moved=least + 4 * heads * grid[1] * 4 * 9,
            multiply_adds=heads * grid[1] * tile * cell,
            least_bytes=least,
            least_multiply_adds=predict_multiply_adds(heads, history_len, start, end, end),
        )

    _launch(
        _edge_rows_kernel, grid, history, contributions, scores, packed, *strides, newest, start, end, history_len,
        cost=cost, BLOCK=tile,
    )  # fmt: skip
    return scores


def predict_multiply_adds(heads, history_len, start, end, valid_end=None):
    """Multiply-adds of `predict` (valid_end None) or of one `predict_incremental`, padding counted as data."""

    def strip(rows1, columns1, rows2, columns2):  # cells that conv1 and conv2 compute
        return heads * (rows1 * columns1 * 16 * 9 + rows2 * columns2 * (32 * 16 * 9 + 32))

    n = end - start
    if valid_end is None:
        return strip(history_len, n, history_len, n)
    new = end - max(start, valid_end - 2) if valid_end < end else 0
    grown = strip(history_len - 2, min(n, new + 1), history_len - 4, new) if new else 0
    return grown + strip(3, n, 2, n) + strip(4, n, 3, n)


# --------------------------------------------------------------------------------------------------------------------
# 3. Block top-k.   The k highest scores of each row; equal scores: the lower block first; NaN counts as -inf.
# --------------------------------------------------------------------------------------------------------------------


def select_blocks_reference(scores, k):
    """See `select_blocks`: a stable sort keeps the lower index first among equals."""
    scores = scores.masked_fill(scores.isnan(), float("-inf"))
    best = scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]  # (heads, k)
    return best.sort(dim=-1).values.int()


# Radix selection: as an integer that sorts like the score, the k-th largest key is found digit by digit, high digits
# first: a histogram of the digit over the keys that agree with the digits found so far tells in which bin it lies. Four
# passes of 8 bits; a fifth writes the indices of all larger keys, and of the first few equal ones, as it meets them.

SELECT_TILE = 4096  # scores that a program holds at once


@_jit()
def _sortable(scores, index, n):
    """Keys that sort, as unsigned integers, like the scores: NaN as -inf, -0 as +0. Places behind n: to be masked."""
    bits = tl.load(scores + index, index < n, 0.0).to(tl.int32, bitcast=True)  # (BLOCK,)
    bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, -0x800000, bits)  # any NaN: -inf
    bits = tl.where(bits == -0x80000000, 0, bits)
    return (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)  # (BLOCK,)


# Grid: (heads,). A program walks its head's scores five times in tiles of BLOCK, from the cache after the first.
@_jit("n", "stride")
def _select_kernel(scores, blocks, stride, n, k, BLOCK: tl.constexpr):
    head = tl.program_id(0)
    scores += head.to(tl.int64) * stride
    digit = tl.arange(0, 256)
    wanted = k  # how many of the keys that agree with `threshold` so far are among the k best
    threshold = tl.full([], 0, tl.uint32)
    for shift in tl.static_range(24, -1, -8):
        counts = tl.zeros([256], tl.int32)
        for first in range(0, n, BLOCK):
            index = first + tl.arange(0, BLOCK)  # (BLOCK,)
            key = _sortable(scores, index, n)
            agrees = index < n
            if shift < 24:
                agrees &= (key >> (shift + 8)) == (threshold >> (shift + 8))
            counts += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, agrees)  # (256,)
        at_least = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts  # (256,), keys with this digit or a higher one
        found = tl.sum((at_least >= wanted).to(tl.int32), 0) - 1  # the highest digit with enough keys
        wanted -= tl.sum(tl.where(digit > found, counts, 0), 0)
        threshold |= found.to(tl.uint32) << shift
    written = 0
    for first in range(0, n, BLOCK):
        index = first + tl.arange(0, BLOCK)  # (BLOCK,)
        key = _sortable(scores, index, n)
        equal = ((key == threshold) & (index < n)).to(tl.int32)
        take = ((key > threshold) & (index < n)) | ((equal > 0) & (tl.cumsum(equal, 0) <= wanted))
        place = written + tl.cumsum(take.to(tl.int32), 0) - 1  # (BLOCK,)
        tl.store(blocks + head * k + place, index, take)
        wanted -= tl.sum(equal, 0)
        written += tl.sum(take.to(tl.int32), 0)


def select_blocks(scores, k, backend="torch"):
    """Indices of the k best blocks of each head, ascending (README: select).

    scores   (heads, n) float32
    returns  (heads, k) int32, in 0 ... n - 1
    """
    if scores.ndim != 2 or not 1 <= k <= scores.shape[1]:
        raise ValueError(f"k must lie in 1 ... n and scores be (heads, n), not k = {k}, {tuple(scores.shape)}")
    if not use_triton(backend, scores.device):
        return select_blocks_reference(scores, k)
    heads, n = scores.shape
    if scores.dtype != torch.float32 or scores.stride(1) != 1:
        raise ValueError(f"a head's scores must be float32 and lie side by side, not {scores.dtype}, {scores.stride()}")
    blocks = torch.empty(heads, k, dtype=torch.int32, device=scores.device)
    tile = max(256, min(_power_of_two(n), SELECT_TILE))
    moved = 4 * (scores.numel() + blocks.numel())
    _launch(
        _select_kernel, (heads,), scores, blocks, scores.stride(0), n, k,
        BLOCK=tile, num_warps=max(4, tile // 256), cost=lambda: Cost(moved, 0, moved),
    )  # fmt: skip
    return blocks


# --------------------------------------------------------------------------------------------------------------------
# 4. Sparse flash-decoding.   out = softmax over the listed blocks' tokens; row[n] = the largest probability in block n
#
# Whole blocks are gathered through a table; the queries of a group share each KV read.
# --------------------------------------------------------------------------------------------------------------------


def sparse_decode_reference(q, k_cache, v_cache, blocks, n_tokens, row=None, row_blocks=None):
    """See `sparse_decode`. Copies the listed blocks together, then attends to the copy."""
    n_heads, head_dim = q.shape
    n_kv_heads, _, block_size, _ = k_cache.shape
    n_blocks = -(-n_tokens // block_size)
    dtype = torch.promote_types(q.dtype, torch.float32)
    if blocks is None:
        heads = n_kv_heads
        k, v = k_cache[:, :n_blocks], v_cache[:, :n_blocks]  # (Hk, N, b, D)
    else:
        heads = blocks.shape[0]
        kv_head = torch.arange(heads, device=q.device) * n_kv_heads // heads  # the KV head that a selection head reads
        place = (kv_head[:, None] * k_cache.shape[1] + blocks).flatten()  # (heads * A,): rows of the cache's blocks
        k = k_cache.flatten(0, 1).index_select(0, place).unflatten(0, (heads, -1))  # (heads, A, b, D)
        v = v_cache.flatten(0, 1).index_select(0, place).unflatten(0, (heads, -1))  # (heads, A, b, D)
    padding = n_blocks * block_size - n_tokens  # places behind the last token, in the last block of every list
    length = k.shape[1] * block_size - padding
    k, v = k.flatten(1, 2)[:, :length].to(dtype), v.flatten(1, 2)[:, :length].to(dtype)  # (heads, length, D)
    logits = (q.view(heads, -1, head_dim).to(dtype) * head_dim**-0.5) @ k.mT  # (heads, G, length)
    largest = logits.amax(-1, keepdim=True)  # (heads, G, 1)
    p = torch.exp(logits - largest)  # (heads, G, length), not normalised yet
    total = p.sum(-1, keepdim=True)  # (heads, G, 1)
    if row is not None:
        block_max = F.pad(p, (0, padding)).unflatten(-1, (-1, block_size)).amax(-1)  # (heads, G, A)
        block_max = (block_max / total).mean(1)  # (heads, A)
        if blocks is None:
            blocks = torch.arange(n_blocks, device=q.device).expand(heads, -1)
        place = blocks if row_blocks is None else row_blocks  # (heads, A)
        row.zero_().scatter_(1, place.long(), block_max.to(row.dtype))
    out, lse = (p @ v) / total, largest + total.log()  # (heads, G, D), (heads, G, 1)
    return out.view(n_heads, head_dim).to(q.dtype), lse.view(n_heads)


# Grid: (splits, heads). A program walks its run of the head's block list in tiles of TILE_BLOCKS whole blocks, gathered
# through the table (None: the identity), with a running softmax; the GROUP queries that share the list are the rows of
# one tl.dot, padded to 16. It leaves its normalised output, its log-sum-exp and each block's largest logit, and blanks
# its share of the history row, into which the merge then scatters. Traffic: K and V of the listed blocks once.
@_jit("n_attended", "n_listed", "splits", "capacity", "table_head")
def _decode_kernel(
    q, k, v, blocks, row, partial_out, partial_lse, block_max,
    n_attended, n_listed, splits, capacity, kv_sharing, scale,
    q_head, k_head, k_block, k_token, v_head, v_block, v_token, table_head, row_head,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_PAD: tl.constexpr, TILE_BLOCKS: tl.constexpr, TILE_BLANK: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    split, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    g = tl.arange(0, GROUP_PAD)  # (GROUP_PAD,) query of the group
    d = tl.arange(0, HEAD_PAD)
    token = tl.arange(0, TILE_BLOCKS * BLOCK_PAD)  # (TILE,) of a tile
    slot = token % BLOCK_PAD  # (TILE,) token in its block
    in_group, in_head = g < GROUP, d < HEAD_DIM
    if row is not None:
        blank = tl.arange(0, TILE_BLANK)
        for tile in range(split, tl.cdiv(capacity, TILE_BLANK), splits):
            column = tile * TILE_BLANK + blank
            tl.store(row + head * row_head + column, tl.zeros((TILE_BLANK,), tl.float32), mask=column < capacity)

    query = head * GROUP + g  # (GROUP_PAD,)
    q += query[:, None] * q_head + d[None, :]  # (GROUP_PAD, HEAD_PAD)
    q_tile = tl.load(q, mask=in_group[:, None] & in_head[None, :], other=0.0).to(OPERAND)
    k += head // kv_sharing * k_head
    v += head // kv_sharing * v_head
    top = tl.full((GROUP_PAD,), LOWEST, tl.float32)
    total = tl.zeros((GROUP_PAD,), tl.float32)
    out = tl.zeros((GROUP_PAD, HEAD_PAD), tl.float32)

    n_tiles = tl.cdiv(n_listed, TILE_BLOCKS)
    first, last = split * n_tiles // splits, (split + 1) * n_tiles // splits
    place = first * TILE_BLOCKS + token // BLOCK_PAD  # (TILE,) in the list
    if blocks is not None:  # looked up a tile ahead, lest the loads of K and V wait for their addresses
        blocks += head * table_head
        ahead = tl.load(blocks + place, mask=place < n_listed, other=0)  # (TILE,)
    for tile in range(first, last):
        there = (slot < BLOCK_SIZE) & (place * BLOCK_SIZE + slot < n_attended)  # (TILE,)
        block = place.to(tl.int64)  # (TILE,)
        place += TILE_BLOCKS
        if blocks is not None:
            block = ahead.to(tl.int64)
            ahead = tl.load(blocks + place, mask=place < n_listed, other=0)
        k_offset, v_offset = block * k_block + slot * k_token, block * v_block + slot * v_token
        k_tile = tl.load(k + k_offset[None, :] + d[:, None], mask=there[None, :] & in_head[:, None], other=0.0)
        logits = tl.dot(q_tile, k_tile.to(OPERAND), input_precision="ieee") * scale  # (GROUP_PAD, TILE)
        logits = tl.where(there[None, :], logits, float("-inf"))
        best = tl.max(tl.reshape(logits, (GROUP_PAD, TILE_BLOCKS, BLOCK_PAD)), 2)  # (GROUP_PAD, TILE_BLOCKS)
        if row is not None:
            at = tile * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
            inside = in_group[:, None] & (at < n_listed)[None, :]
            tl.store(block_max + query[:, None] * n_listed + at[None, :], best, mask=inside)
        higher = tl.maximum(top, tl.max(best, 1))  # (GROUP_PAD,)
        p = tl.exp2(logits - higher[:, None])  # (GROUP_PAD, TILE)
        rescale = tl.exp2(top - higher)
        total = total * rescale + tl.sum(p, 1)
        v_tile = tl.load(v + v_offset[:, None] + d[None, :], mask=there[:, None] & in_head[None, :], other=0.0)
        p = p.to(v_tile.dtype).to(OPERAND)
        out = tl.dot(p, v_tile.to(OPERAND), out * rescale[:, None], input_precision="ieee")
        top = higher
    part = query * splits + split  # (GROUP_PAD,)
    tl.store(partial_lse + part, top + tl.log2(total), mask=in_group)
    partial_out += part[:, None] * HEAD_DIM + d[None, :]  # (GROUP_PAD, HEAD_PAD)
    tl.store(partial_out, out / total[:, None], mask=in_group[:, None] & in_head[None, :])


# Grid: (GROUP + tiles of the list, heads). A head's first GROUP programs combine one query's splits each, weighted by
# their log-sum-exp; the others turn a tile of block maxima into probabilities, average them over the group, and scatter
# them. Traffic: the partial results, a few percent of the KV read.
@_jit("n_listed", "splits", "table_head")
def _merge_kernel(
    partial_out, partial_lse, block_max, row_blocks, out, lse, row,
    n_listed, splits, table_head, row_head,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
    MAX_SPLITS: tl.constexpr, TILE_SPLITS: tl.constexpr, TILE_LIST: tl.constexpr,
):  # fmt: skip
    part, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if part < GROUP:
        query = head * GROUP + part
        parts = partial_lse + query * splits
        merged = tl.sum(_merged_lse(parts + tl.arange(0, 1), splits, MAX_SPLITS), 0)  # of one row: a scalar
        tl.store(lse + query, merged / LOG2_E)
        d = tl.arange(0, HEAD_PAD)
        in_head = d < HEAD_DIM
        mixed = tl.zeros((HEAD_PAD,), tl.float32)
        for first in range(0, splits, TILE_SPLITS):
            split = first + tl.arange(0, TILE_SPLITS)
            exists = split < splits
            weight = tl.exp2(tl.load(parts + split, mask=exists, other=float("-inf")) - merged)  # (TILE_SPLITS,)
            some = partial_out + (query * splits + split)[:, None] * HEAD_DIM + d[None, :]  # (TILE_SPLITS, HEAD_PAD)
            mixed += tl.sum(tl.load(some, mask=exists[:, None] & in_head[None, :], other=0.0) * weight[:, None], 0)
        tl.store(out + query * HEAD_DIM + d, mixed.to(out.dtype.element_ty), mask=in_head)
    elif row is not None:
        g = tl.arange(0, GROUP_PAD)
        queries = head * GROUP + tl.minimum(g, GROUP - 1)  # (GROUP_PAD,)
        lses = _merged_lse(partial_lse + queries * splits, splits, MAX_SPLITS)  # (GROUP_PAD,)
        place = (part - GROUP) * TILE_LIST + tl.arange(0, TILE_LIST)  # (TILE_LIST,) in the list
        listed = place < n_listed
        best = block_max + queries[:, None] * n_listed + place[None, :]  # (GROUP_PAD, TILE_LIST)
        best = tl.load(best, mask=(g < GROUP)[:, None] & listed[None, :], other=float("-inf"))
        p = tl.sum(tl.exp2(best - lses[:, None]), 0) / GROUP  # (TILE_LIST,)
        if row_blocks is not None:
            place = tl.load(row_blocks + head * table_head + place, mask=listed, other=0)
        tl.store(row + head * row_head + place, p, mask=listed)


def sparse_decode(q, k_cache, v_cache, blocks, n_tokens, row=None, backend="torch", row_blocks=None):
    """Attention of one token over the listed blocks only, and the history row that it leaves (README: attend).

    q        (Hq, D), rotated
    k_cache  (Hk, capacity, b, D), v_cache alike
    blocks   (heads, A) int32: each head's blocks, the last of them the current token's. heads = Hk: the group shares
             the list; heads = Hq: one list a query. None: every block, dense attention.
    row      (heads, capacity) float32 or None: overwritten with each attended block's largest probability, averaged
             over the queries that share the row; zero elsewhere. May be a strided view, such as a slot of the ring.
             Where blocks is None, heads may be either.
    row_blocks  (heads, A) int32 or None: where each listed block's probability goes in row, for a cache of slots, whose
             places are not the tokens' order (n_tokens then counts the listed tokens). None: at the block itself.
    returns  out (Hq, D) in q's dtype, and the log-sum-exp of the attended scaled logits (Hq,) float32
    """
    _check_cache(q, k_cache, n_tokens)
    if v_cache.shape != k_cache.shape:
        raise ValueError(f"k_cache {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)} must agree")
    if blocks is not None and blocks.shape[0] not in (k_cache.shape[0], q.shape[0]):
        raise ValueError(f"blocks must list Hk = {k_cache.shape[0]} or Hq = {q.shape[0]} heads, not {blocks.shape[0]}")
    if row is not None and blocks is None and row.shape[0] != k_cache.shape[0]:  # a row for each query, not each group
        everything = torch.arange(-(-n_tokens // k_cache.shape[2]), dtype=torch.int32, device=q.device)
        blocks = everything.expand(q.shape[0], -1).contiguous()  # (Hq, N)
    if row is not None and row.shape[0] != (k_cache if blocks is None else blocks).shape[0]:
        raise ValueError(f"row has {row.shape[0]} heads, the block lists another number")
    if row is not None and (row.dtype != torch.float32 or row.stride(1) != 1):
        raise ValueError("row must be float32, and contiguous along the blocks")
    if not use_triton(backend, q.device):
        return sparse_decode_reference(q, k_cache, v_cache, blocks, n_tokens, row, row_blocks)
    _check_layout(q, k_cache, v_cache)
    n_heads, head_dim = q.shape
    n_kv_heads, _, block_size, _ = k_cache.shape
    heads, n_listed = (n_kv_heads, -(-n_tokens // block_size)) if blocks is None else blocks.shape
    group = n_heads // heads
    size = q.element_size()
    head_pad, block_pad, tile_blocks, stages = _tiles(head_dim, block_size, size)
    group_pad = max(16, _power_of_two(group))
    n_tiles = -(-n_listed // tile_blocks)
    splits, max_splits = _splits(q.device, heads, n_tiles)
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(n_heads, dtype=torch.float32)
    partial_out = q.new_empty((n_heads, splits, head_dim), dtype=torch.float32)
    partial_lse = q.new_empty((n_heads, splits), dtype=torch.float32)
    block_max = None if row is None else q.new_empty((n_heads, n_listed), dtype=torch.float32)
    capacity, row_head = (0, 0) if row is None else (row.shape[1], row.stride(0))
    table_head = 0 if blocks is None else blocks.stride(0)
    if row_blocks is not None and (blocks is None or row_blocks.stride() != blocks.stride()):
        raise ValueError("row_blocks must be laid out as blocks")
    row_bytes = 0 if row is None else 4 * row.numel()
    partial_bytes = 4 * (partial_out.numel() + partial_lse.numel() + (0 if row is None else block_max.numel()))

    def cost():
        tokens = min(n_listed * block_size, n_tokens)
        least = 2 * heads * tokens * head_dim * size + 2 * q.numel() * size + row_bytes
        computed = 2 * heads * n_tiles * tile_blocks * block_pad * group_pad * head_pad
        return Cost(least + partial_bytes, computed, least, 2 * n_heads * tokens * head_dim)

    shape = dict(GROUP=group, HEAD_DIM=head_dim, HEAD_PAD=head_pad)
    _launch(
        _decode_kernel, (splits, heads),
        q, k_cache, v_cache, blocks, row, partial_out, partial_lse, block_max,
        n_listed * block_size - (-n_tokens % block_size),
        n_listed, splits, capacity, heads // n_kv_heads, head_dim**-0.5 * math.log2(math.e),
        q.stride(0), *k_cache.stride()[:3], *v_cache.stride()[:3], table_head, row_head,
        **shape, GROUP_PAD=group_pad, BLOCK_SIZE=block_size, BLOCK_PAD=block_pad, TILE_BLOCKS=tile_blocks,
        TILE_BLANK=1024, OPERAND=_operand(q.dtype), num_warps=4, num_stages=stages, cost=cost,
    )  # fmt: skip
    tile_list = 128
    _launch(
        _merge_kernel, (group if row is None else group - (-n_listed // tile_list), heads),
        partial_out, partial_lse, block_max, blocks if row_blocks is None else row_blocks, out, lse, row,
        n_listed, splits, table_head, row_head,
        **shape, GROUP_PAD=_power_of_two(group), MAX_SPLITS=max_splits,
        TILE_SPLITS=min(max_splits, 4096 // head_pad), TILE_LIST=tile_list,
        num_warps=4, cost=lambda: Cost(partial_bytes + q.numel() * size),
    )  # fmt: skip
    return out, lse


# --------------------------------------------------------------------------------------------------------------------
# 5. Asynchronous copy.   First the difference: a wanted block that has a slot keeps it; the others, in order, take the
# slots, in order, of blocks that are not wanted any more. Then destination[to[i]] = source[from[i]], for every i with
# from[i] >= 0.
# --------------------------------------------------------------------------------------------------------------------


def assign_slots_reference(wanted, slot_of, block_of):
    """See `assign_slots`."""
    wanted = wanted.long()  # (heads, k)
    held = slot_of.gather(1, wanted)  # (heads, k): -1 where a block has no slot
    missing = held < 0
    is_wanted = torch.zeros_like(slot_of, dtype=torch.bool).scatter_(1, wanted, True)  # (heads, capacity)
    in_use = (block_of >= 0) & is_wanted.gather(1, block_of.clamp(min=0).long())  # (heads, slots)
    free = in_use.int().sort(dim=1, stable=True).indices  # (heads, slots): the free slots first, ascending
    slot = torch.where(missing, free.gather(1, (missing.cumsum(1) - 1).clamp(min=0)), held.long())  # (heads, k)
    left = block_of.gather(1, slot).long()  # (heads, k): who was there; -1: nobody
    left = torch.where(left < 0, wanted, left)
    slot_of.scatter_(1, left, -1).scatter_(1, wanted, slot.int())
    block_of.scatter_(1, slot, wanted.int())
    return slot.int(), torch.where(missing, wanted, -1).int()


# Grid: (heads,). A program holds a head's list and slots in one tile. What one of its threads leaves in `scratch` for
# another is stored before a barrier and loaded behind it: first which slots stay in use, then the free ones in order.
@_jit("k", "capacity", "n_slots")
def _assign_kernel(wanted, slot_of, block_of, scratch, slots, fetch, k, capacity, n_slots, TILE: tl.constexpr):
    head = tl.program_id(0)
    place = tl.arange(0, TILE)
    is_wanted, is_slot = place < k, place < n_slots
    slot_of += head.to(tl.int64) * capacity
    block_of += head * n_slots
    scratch += head * n_slots
    block = tl.load(wanted + head * k + place, is_wanted, 0)  # (TILE,)
    held = tl.load(slot_of + block, is_wanted, 0)  # (TILE,): -1 where a block has no slot
    missing = is_wanted & (held < 0)
    tl.store(scratch + place, tl.zeros((TILE,), tl.int32), is_slot)
    tl.debug_barrier()
    tl.store(scratch + held, tl.full((TILE,), 1, tl.int32), is_wanted & (held >= 0))
    tl.debug_barrier()
    free = is_slot & (tl.load(scratch + place, is_slot, 1) == 0)
    tl.debug_barrier()
    tl.store(scratch + tl.cumsum(free.to(tl.int32), 0) - 1, place, free)
    tl.debug_barrier()
    taken = tl.load(scratch + tl.cumsum(missing.to(tl.int32), 0) - 1, missing, 0)  # (TILE,)
    slot = tl.where(missing, taken, held)
    left = tl.load(block_of + slot, missing, -1)  # (TILE,): who was there; -1: nobody
    tl.store(slot_of + left, tl.full((TILE,), -1, tl.int32), left >= 0)
    tl.store(slot_of + block, slot, missing)
    tl.store(block_of + slot, block, missing)
    tl.store(slots + head * k + place, slot, is_wanted)
    tl.store(fetch + head * k + place, tl.where(missing, block, -1), is_wanted)


def assign_slots(wanted, slot_of, block_of, backend="torch"):
    """Slots for the wanted blocks, and which of them have to be fetched (README: prefetch).

    wanted    (heads, k) int32: different blocks in each row, k <= slots
    slot_of   (heads, capacity) int32: the slot of each block, -1 for none; updated in place
    block_of  (heads, slots) int32: the block in each slot, -1 for none; updated in place
    returns   slots (heads, k) int32, and the blocks to fetch (heads, k) int32: the wanted one, -1 where it is there
    """
    if wanted.shape[1] > block_of.shape[1]:
        raise ValueError(f"{wanted.shape[1]} blocks are wanted, but there are {block_of.shape[1]} slots")
    if not use_triton(backend, wanted.device):
        return assign_slots_reference(wanted, slot_of, block_of)
    if any(table.dtype != torch.int32 for table in (wanted, slot_of, block_of)):
        raise ValueError("wanted, slot_of and block_of must be int32")
    if not slot_of.is_contiguous() or not block_of.is_contiguous():
        raise ValueError("slot_of and block_of must be contiguous")
    wanted = wanted.contiguous()
    (heads, k), n_slots = wanted.shape, block_of.shape[1]
    slots, fetch, scratch = torch.empty_like(wanted), torch.empty_like(wanted), torch.empty_like(block_of)
    if k:
        least = 4 * (5 * wanted.numel() + 2 * block_of.numel())
        _launch(
            _assign_kernel, (heads,), wanted, slot_of, block_of, scratch, slots, fetch, k, slot_of.shape[1], n_slots,
            TILE=_power_of_two(n_slots), num_warps=4, cost=lambda: Cost(least + 16 * scratch.numel(), 0, least),
        )  # fmt: skip
    return slots, fetch


def copy_blocks_reference(source, destination, source_index, destination_index):
    """See `copy_blocks`."""
    wanted = source_index >= 0
    rows = source[source_index[wanted].long().to(source.device)]
    destination[destination_index[wanted].long()] = rows.to(destination.device)


# Grid: COPY_PROGRAMS, few, so that most of the machine stays free for the compute that it runs beside. Each program
# numbers the wanted rows and takes every COPY_PROGRAMS-th tile of them: however few are wanted, all share the work. A
# tile is TILE lanes of 8 bytes (fewer where a row's length or alignment asks for it), moved as bits whatever the dtype.
# Traffic: the wanted rows, read once over the bus and written once; the index lists once a program.
@_jit("n")
def _copy_kernel(
    source, destination, source_index, destination_index, n, source_row, destination_row,
    LANES: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    TILES: tl.constexpr = (LANES + TILE - 1) // TILE  # to a row
    place, lane = tl.arange(0, CHUNK), tl.arange(0, TILE)
    before = 0  # rows wanted in the chunks before
    for first in range(0, n, CHUNK):
        here = first + place < n
        index = tl.load(source_index + first + place, mask=here, other=-1)  # (CHUNK,)
        slot = tl.load(destination_index + first + place, mask=here, other=0)
        wanted = (index >= 0).to(tl.int32)
        number = tl.where(wanted == 1, tl.cumsum(wanted) - 1, -1)  # (CHUNK,) among the wanted of this chunk
        count = tl.sum(wanted)
        start = (program + programs - before * TILES % programs) % programs
        for tile in tl.range(start, count * TILES, programs, num_stages=STAGES):
            mine = number == tile // TILES  # (CHUNK,) true at one place
            come = tl.sum(tl.where(mine, index, 0)).to(tl.int64)
            go = tl.sum(tl.where(mine, slot, 0)).to(tl.int64)
            at = tile % TILES * TILE + lane  # (TILE,)
            bits = tl.load(source + come * source_row + at, mask=at < LANES)
            tl.store(destination + go * destination_row + at, bits, mask=at < LANES)
        before += count


def copy_blocks(source, destination, source_index, destination_index, backend="torch"):
    """Gather blocks of (pinned host) memory into device slots (README: prefetch).

    source             (n_blocks, elements): one block's K and V a row, contiguous
    destination        (n_slots, elements), same dtype, written in place
    source_index       (n,) int32; -1: nothing to copy at this place
    destination_index  (n,) int32, no slot twice
    """
    if source.dtype != destination.dtype or source.shape[1:] != destination.shape[1:]:
        raise ValueError("source and destination must agree in dtype and in the size of a block")
    if not use_triton(backend, destination.device):
        return copy_blocks_reference(source, destination, source_index, destination_index)
    if source.stride(1) != 1 or destination.stride(1) != 1:
        raise ValueError("a block must be contiguous, in source and in destination")
    size = source.element_size()
    aligned = math.gcd(8, source.shape[1] * size)
    for rows in (source, destination):
        aligned = math.gcd(aligned, rows.stride(0) * size, rows.data_ptr())
    lane = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[aligned]
    source, destination = source.view(lane), destination.view(lane)
    lanes = source.shape[1]
    moved = 2 * source_index.numel() * lanes * aligned
    _launch(
        _copy_kernel, (COPY_PROGRAMS,),
        source, destination, source_index, destination_index,
        source_index.numel(), source.stride(0), destination.stride(0),
        LANES=lanes, TILE=min(1024, _power_of_two(lanes)), CHUNK=1024, STAGES=3,
        num_warps=4, cost=lambda: Cost(moved + 8 * COPY_PROGRAMS * source_index.numel(), 0, moved),
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# What the launchers check
# --------------------------------------------------------------------------------------------------------------------


def _check_cache(q, k_cache, n_tokens):
    n_kv_heads, capacity, block_size, head_dim = k_cache.shape
    if q.shape[0] % n_kv_heads or q.shape[-1] != head_dim:
        raise ValueError(f"q {tuple(q.shape)} does not fit a cache of {n_kv_heads} KV heads and head_dim {head_dim}")
    if not 1 <= n_tokens <= capacity * block_size:
        raise ValueError(f"n_tokens must lie in 1 ... {capacity * block_size} (the cache's capacity), not {n_tokens}")


def _check_layout(q, *caches):
    """What the kernels ask for beyond the references."""
    for cached in caches:
        if cached.dtype != q.dtype or q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"q and cache must share float32, float16 or bfloat16, not {q.dtype} and {cached.dtype}")
        if cached.stride(3) != 1 or q.stride(-1) != 1:
            raise ValueError("q and cache must be contiguous along head_dim")
        if cached.shape[2] > 128 or cached.shape[3] > 256:
            raise ValueError(f"block_size must be at most 128 and head_dim 256, not {tuple(cached.shape[2:])}")


def _check_ring(ring):
    if ring.dtype != torch.float32 or ring.stride(2) != 1:
        raise ValueError(f"a ring's rows must be float32 and lie side by side, not {ring.dtype}, {ring.stride()}")


def _check_window(history, newest, start, end):
    _, history_len, capacity = history.shape
    if not 0 <= newest < history_len:
        raise ValueError(f"newest must be a slot of the ring, 0 ... {history_len - 1}, not {newest}")
    if not 0 <= start < end <= capacity:
        raise ValueError(f"the window {start} ... {end} must not be empty, nor leave the {capacity} columns")


# --------------------------------------------------------------------------------------------------------------------
# Ahead of time.   `python kernels.py [target ...]` compiles every kernel for GPUs that need not be there, exactly as a
# decode step of the models below would launch it, and prints what the compilers made of it.
# --------------------------------------------------------------------------------------------------------------------

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
TYPE_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
}


def decode_launches(n_heads, n_kv_heads, head_dim, n_tokens, block_size=16, budget=1024, history_len=64):
    """Every launch of prefill's pooling and of a decode step, for a bf16 model of this shape and default settings."""

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    n_blocks = -(-n_tokens // block_size)
    q = empty(n_heads, history_len, head_dim, dtype=torch.bfloat16)
    k_cache = v_cache = empty(n_kv_heads, n_blocks, block_size, head_dim, dtype=torch.bfloat16)
    history = empty(n_kv_heads, history_len, n_blocks)
    shapes = (16, 1, 3, 3), (16,), (32, 16, 3, 3), (32,), (1, 32, 1), (1,)
    names = (f"conv{i}.{kind}" for i in (1, 2, 3) for kind in ("weight", "bias"))
    weights = {name: empty(*shape) for name, shape in zip(names, shapes)}
    start, end = 64 // block_size, n_blocks - 64 // block_size  # between sink and local window
    topk = (budget - 128) // block_size
    blocks = empty(n_kv_heads, budget // block_size, dtype=torch.int32)
    copied = empty(n_kv_heads * budget // block_size, dtype=torch.int32)
    slots = empty(copied.shape[0], 2 * block_size * head_dim, dtype=torch.bfloat16)
    host = empty(n_kv_heads * n_blocks, 2 * block_size * head_dim, dtype=torch.bfloat16)
    with recorded_launches() as launches:
        pool_history(q, k_cache, n_tokens, backend="triton")
        pool_history(q[:, -1:], k_cache, n_tokens, backend="triton")
        predict(history, 0, start, end, weights, backend="triton")
        predict_incremental(history, history, 0, start, end, end - 1, weights, backend="triton")
        scores = predict_incremental(history, history, 0, start, end, end, weights, backend="triton")
        select_blocks(scores, min(topk, end - start), backend="triton")
        sparse_decode(q[:, 0], k_cache, v_cache, blocks, n_tokens, history[:, 0], backend="triton")
        sparse_decode(q[:, 0], k_cache, v_cache, None, n_tokens, backend="triton")
        middle = blocks[:, : (budget - 128) // block_size]
        slot_of, block_of = (empty(n_kv_heads, n, dtype=torch.int32) for n in (n_blocks, topk))
        assign_slots(middle, slot_of, block_of, backend="triton")
        copy_blocks(host, slots, copied, copied, backend="triton")
    return launches


MODELS = {
    "Llama-3.1-8B 8K": dict(n_heads=32, n_kv_heads=8, head_dim=128, n_tokens=8192),
    "Llama-3.1-8B 32K": dict(n_heads=32, n_kv_heads=8, head_dim=128, n_tokens=32768),
    "Llama-3.1-8B 128K": dict(n_heads=32, n_kv_heads=8, head_dim=128, n_tokens=131072),
    "SmolLM2-135M 4K": dict(n_heads=9, n_kv_heads=3, head_dim=64, n_tokens=4096),
}


def _specialized(launch):
    """Signature, constants and attributes with which Triton compiles: it folds ones and notes multiples of 16."""
    signature, constants, attributes = {}, {}, {}
    arguments = dict(zip(launch.kernel.arg_names, launch.arguments), **launch.constants)
    for place, parameter in enumerate(launch.kernel.params):
        value = arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{TYPE_NAMES[value.dtype]}"
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[parameter.name], aligned = "constexpr", value, False
        elif isinstance(value, float):
            signature[parameter.name], aligned = "fp32", False
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0 and not parameter.do_not_specialize
        if aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _resources(compiled, backend):
    """Registers a thread, bytes spilled a thread, bytes of shared memory a program."""
    if backend == "hip":
        registers, spills = (
            int(re.search(rf"\.{name}:\s+(\d+)", compiled.asm["amdgcn"])[1])
            for name in ("vgpr_count", "vgpr_spill_count")
        )
        return registers, 4 * spills, compiled.metadata.shared
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    return registers, stack + local, compiled.metadata.shared


def ahead_of_time(targets=tuple(TARGETS), models=tuple(MODELS)):
    """Compiles each distinct launch of the models once a target; yields (model, Launch, target, resources) rows."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    known = {}
    for model in models:
        for launch in decode_launches(**MODELS[model]):
            source = ASTSource(launch.kernel, *_specialized(launch))
            for target in targets:
                options = _options(launch.num_warps, launch.num_stages, hip=TARGETS[target][0] == "hip")
                key = (source.hash(), *options.values(), target)
                if key not in known:
                    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
                    known[key] = _resources(compiled, TARGETS[target][0])
                yield model, launch, target, known[key]


def main(targets):
    if unknown := set(targets) - set(TARGETS):
        sys.exit(f"kernels.py: unknown target {', '.join(unknown)}; known: {', '.join(TARGETS)}")
    if triton is None or interpreted():
        sys.exit("kernels.py: compiling needs Triton, and TRITON_INTERPRET unset")
    print(
        "| kernel, grid | model, tokens | target | registers | spilled | shared | MB (x least) | M mul-adds (x least) |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for model, launch, target, resources in ahead_of_time(targets or tuple(TARGETS)):
        cost = launch.cost
        moved = _against(cost.bytes_moved, cost.least_bytes)
        multiplied = _against(cost.multiply_adds, cost.least_multiply_adds)
        cells = f"{launch.kernel.__name__} {launch.grid}", model, target, *resources, moved, multiplied
        print("|", " | ".join(map(str, cells)), "|")


def _against(amount, least):
    return f"{amount / 1e6:.3f} ({amount / least:.2f})" if least else f"{amount / 1e6:.3f} (-)"


if __name__ == "__main__":
    main(sys.argv[1:])
