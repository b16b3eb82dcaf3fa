"""The five hot paths of a sparse decode step, in the order in which data flows through it.

    1. pool_history         queries x keys      ->  block-max attention probabilities, one row a query
    2. predict              history image       ->  one score a block; and `predict_incremental`, the same numbers
                                                    from five rows instead of all
    3. select_blocks        scores              ->  the best blocks of each head
    4. sparse_decode        query, those blocks ->  attention output and the next history row
    5. copy_blocks          host memory         ->  device slots, only the blocks that are not there yet

Each section gives the mathematics, a PyTorch reference that can be checked by eye, and a launcher: the function that the
rest of the project calls. Reference and launcher share shapes and meaning; `backend` says which code runs.

Shapes: Hq query heads, Hk KV heads, G = Hq / Hk queries to a KV head, D head dimension, T tokens in the cache, b tokens to
a block, N = ceil(T / b) blocks. A cache is (Hk, capacity, b, D) with capacity >= N blocks; what lies behind token T is
never read. `heads` stands for selection heads: Hk of them when a group selects together, Hq when each query does.

Source: Yang et al., AttentionPredictor, NeurIPS 2025, arXiv 2502.04077. The incremental prediction is this project's own.
"""

import torch
import torch.nn.functional as F

POOL_CHUNK_TOKENS = 1024  # keys whose logits the reference pooling holds at once


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


def pool_history(q, k_cache, n_tokens, backend="torch"):
    """Block-max-pooled causal attention probabilities of the last `rows` queries (METHOD: prefill and calibration).

    q        (Hq, rows, D): queries of positions n_tokens - rows ... n_tokens - 1, rotated
    k_cache  (Hk, capacity, b, D): keys, rotated; the first n_tokens are read
    returns  pooled (Hq, rows, N) float32, and the rows' log-sum-exp of scaled logits (Hq, rows) float32
    """
    _check_cache(q, k_cache, n_tokens)
    if not 1 <= q.shape[1] <= n_tokens:
        raise ValueError(f"rows must lie in 1 ... n_tokens = {n_tokens}, not {q.shape[1]}")
    return pool_history_reference(q, k_cache, n_tokens)


# --------------------------------------------------------------------------------------------------------------------
# 2. Convolutional prediction.   score = conv3(mean over rows(relu(conv2(relu(conv1(image))))))
#
# The last row of convolution is linear and per cell, so it may go before the mean: with
#     p[r, n] = sum over c of w3[c] * relu(conv2)[c, r, n]        the score is        b3 + (1/H) * sum over r of p[r, n].
# p[r, n] looks two rows and two columns around it. Rows 2 ... H-3 of the window therefore see no vertical padding, and keep
# their p while the window slides: a step has to compute only rows 0 and 1, whose upper padding has come nearer, and rows
# H-3 ... H-1. When the middle grows by a column, the two columns before it lose their right padding: three columns.
#
# The history is a ring of H rows: row r of the window (0 the oldest) lies in slot (newest + 1 + r) mod H. The
# contributions p live in a ring of the same shape and slots.
# --------------------------------------------------------------------------------------------------------------------

Weights = dict[str, torch.Tensor]  # the predictor's state dict, see attnpred.Predictor


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

    strip  (heads, rows, columns); each flag says whether that side is the image's own edge, hence zero-padded. A side that
           is not gives two rows or columns of the strip for context.
    """
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


def predict(history, newest, start, end, weights, backend="torch"):
    """Scores of the middle blocks for the next token, the whole network computed (METHOD: predict).

    history  (heads, H, capacity) float32 ring, see above; columns start ... end - 1 are the image
    weights  the predictor's state dict, float32
    returns  scores (heads, end - start) float32
    """
    _check_window(history, newest, start, end)
    return predict_reference(history, newest, start, end, weights)


def predict_incremental(history, contributions, newest, start, end, valid_end, weights, backend="torch"):
    """The scores of `predict`, from the contributions that the previous steps left: five rows a step.

    contributions  (heads, H, capacity) float32 ring, updated in place. Must come from the call of the step before, with the
                   same start and one row pushed since; columns from valid_end on (that call's `end`) are new. A first call
                   passes valid_end = start, and computes everything.
    The rest is as in `predict`. Raises ValueError for H < 5, where no row is free of padding.
    """
    _check_window(history, newest, start, end)
    if contributions.shape != history.shape:
        raise ValueError(f"contributions {tuple(contributions.shape)} and history {tuple(history.shape)} must agree")
    if history.shape[1] < 5:
        raise ValueError(f"incremental prediction needs history_len >= 5, not {history.shape[1]}")
    if not start <= valid_end <= end:
        raise ValueError(f"valid_end must lie in start ... end = {start} ... {end}, not {valid_end}")
    return predict_incremental_reference(history, contributions, newest, start, end, valid_end, weights)


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


def select_blocks(scores, k, backend="torch"):
    """Indices of the k best blocks of each head, ascending (METHOD: select).

    scores   (heads, n) float32
    returns  (heads, k) int32, in 0 ... n - 1
    """
    if scores.ndim != 2 or not 1 <= k <= scores.shape[1]:
        raise ValueError(f"k must lie in 1 ... n and scores be (heads, n), not k = {k}, {tuple(scores.shape)}")
    return select_blocks_reference(scores, k)


# --------------------------------------------------------------------------------------------------------------------
# 4. Sparse flash-decoding.   out = softmax over the listed blocks' tokens; row[n] = the largest probability in block n
#
# Whole blocks are gathered through a table; the queries of a group share each KV read.
# --------------------------------------------------------------------------------------------------------------------


def sparse_decode_reference(q, k_cache, v_cache, blocks, n_tokens, row=None):
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
        k, v = k_cache[kv_head[:, None], blocks], v_cache[kv_head[:, None], blocks]  # (heads, A, b, D)
    padding = n_blocks * block_size - n_tokens  # places behind the last token, in the last block of every list
    length = k.shape[1] * block_size - padding
    k, v = k.flatten(1, 2)[:, :length].to(dtype), v.flatten(1, 2)[:, :length].to(dtype)  # (heads, length, D)
    logits = (q.view(heads, -1, head_dim).to(dtype) * head_dim**-0.5) @ k.mT  # (heads, G, length)
    lse = logits.logsumexp(-1, keepdim=True)  # (heads, G, 1)
    p = torch.exp(logits - lse)  # (heads, G, length)
    if row is not None:
        block_max = F.pad(p, (0, padding)).unflatten(-1, (-1, block_size)).amax(-1).mean(1)  # (heads, A)
        if blocks is None:
            blocks = torch.arange(n_blocks, device=q.device).expand(heads, -1)
        row.zero_().scatter_(1, blocks.long(), block_max.to(row.dtype))
    return (p @ v).view(n_heads, head_dim).to(q.dtype), lse.view(n_heads)


def sparse_decode(q, k_cache, v_cache, blocks, n_tokens, row=None, backend="torch"):
    """Attention of one token over the listed blocks only, and the history row that it leaves (METHOD: attend).

    q        (Hq, D), rotated
    k_cache  (Hk, capacity, b, D), v_cache alike
    blocks   (heads, A) int32: each head's blocks, ascending, the last of them N - 1 (the current token's). heads = Hk: the
             group shares the list; heads = Hq: one list a query. None: every block, dense attention.
    row      (heads, capacity) float32 or None: overwritten with each attended block's largest probability, averaged over
             the queries that share the list; zero elsewhere. May be a strided view, such as a slot of the history ring.
    returns  out (Hq, D) in q's dtype, and the log-sum-exp of the attended scaled logits (Hq,) float32
    """
    _check_cache(q, k_cache, n_tokens)
    if v_cache.shape != k_cache.shape:
        raise ValueError(f"k_cache {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)} must agree")
    if blocks is not None and blocks.shape[0] not in (k_cache.shape[0], q.shape[0]):
        raise ValueError(f"blocks must list Hk = {k_cache.shape[0]} or Hq = {q.shape[0]} heads, not {blocks.shape[0]}")
    return sparse_decode_reference(q, k_cache, v_cache, blocks, n_tokens, row)


# --------------------------------------------------------------------------------------------------------------------
# 5. Asynchronous copy.   destination[to[i]] = source[from[i]], for every i with from[i] >= 0
# --------------------------------------------------------------------------------------------------------------------


def copy_blocks_reference(source, destination, source_index, destination_index):
    """See `copy_blocks`."""
    wanted = source_index >= 0
    destination[destination_index[wanted].long()] = source[source_index[wanted].long()].to(destination.device)


def copy_blocks(source, destination, source_index, destination_index, backend="torch"):
    """Gather blocks of (pinned host) memory into device slots (METHOD: cross-token prefetch).

    source             (n_blocks, elements): one block's K and V a row, contiguous
    destination        (n_slots, elements), same dtype, written in place
    source_index       (n,) int32; -1: nothing to copy at this place
    destination_index  (n,) int32, no slot twice
    """
    if source.dtype != destination.dtype or source.shape[1:] != destination.shape[1:]:
        raise ValueError("source and destination must agree in dtype and in the size of a block")
    copy_blocks_reference(source, destination, source_index, destination_index)


# --------------------------------------------------------------------------------------------------------------------
# What the launchers check
# --------------------------------------------------------------------------------------------------------------------


def _check_cache(q, k_cache, n_tokens):
    n_kv_heads, capacity, block_size, head_dim = k_cache.shape
    if q.shape[0] % n_kv_heads or q.shape[-1] != head_dim:
        raise ValueError(f"q {tuple(q.shape)} does not fit a cache of {n_kv_heads} KV heads and head_dim {head_dim}")
    if not 1 <= n_tokens <= capacity * block_size:
        raise ValueError(f"n_tokens must lie in 1 ... {capacity * block_size} (the cache's capacity), not {n_tokens}")


def _check_window(history, newest, start, end):
    _, history_len, capacity = history.shape
    if not 0 <= newest < history_len:
        raise ValueError(f"newest must be a slot of the ring, 0 ... {history_len - 1}, not {newest}")
    if not 0 <= start < end <= capacity:
        raise ValueError(f"the window {start} ... {end} must not be empty, nor leave the {capacity} columns")
