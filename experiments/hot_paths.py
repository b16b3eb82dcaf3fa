"""The calls that `experiments.bench kernels` times: the kernels with the inputs of a decode step, and PyTorch code.

Each function of PATHS takes a LlamaConfig m, a Config c, the number of tokens, the dtype of K and V, a device and a
backend. It yields tuples of a name, the fewest bytes that the kernel can move (each input and output once), its
multiply-adds, a function that launches it, and rivals {name: a function that computes the same, or serves the same
purpose}. Keys, values and histories are random.
"""

from functools import partial

import torch
import torch.nn.functional as F

import attnpred
import kernels
from attnpred import Predictor


def echo_paths(m, c, n_tokens, dtype, device, backend):
    """Looks up the echoes of the newest token, in a text of a thousand different tokens."""
    ids, position = torch.randint(1000, (n_tokens,), device=device), torch.tensor([n_tokens - 1], device=device)
    n_blocks, b = c.n_blocks(n_tokens), c.block_size
    shape = ids, position, c.sink_tokens // b, c.local_tokens // b, b, n_blocks, c.echo_blocks
    rivals = {"PyTorch": partial(kernels.find_echoes_reference, *shape)}
    yield "find_echoes", ids.nbytes + 8 * c.echo_blocks, 0, partial(kernels.find_echoes, *shape, backend), rivals


def softmax_then_max(q, k_cache, n_tokens, distance):
    """`pool_history` with all logits in memory: q (Hq, rows, D), k_cache (Hk, N, b, D) -> (Hq, rows, N)."""
    n_kv_heads, n_blocks, b, head_dim = k_cache.shape
    rows = q.shape[1]
    k = k_cache.flatten(1, 2)[:, :n_tokens]  # (Hk, T, D)
    logits = (q.reshape(n_kv_heads, -1, head_dim) @ k.mT).float() * head_dim**-0.5  # (Hk, G * rows, T)
    position = n_tokens - 1 - distance * torch.arange(rows - 1, -1, -1, device=q.device)  # (rows,)
    future = torch.arange(n_tokens, device=q.device) > position[:, None]  # (rows, T)
    p = logits.unflatten(1, (-1, rows)).masked_fill_(future, -torch.inf).softmax(-1)  # (Hk, G, rows, T)
    return F.pad(p, (0, n_blocks * b - n_tokens)).unflatten(-1, (-1, b)).amax(-1).flatten(0, 1)


def pooling_paths(m, c, n_tokens, dtype, device, backend):
    """Pools the queries that fill a history in one layer, and those of a calibration in all layers."""
    keys = torch.randn(m.n_layers, m.n_kv_heads, c.n_blocks(n_tokens), c.block_size, m.head_dim, device=device)
    keys = keys.to(dtype)  # (L, Hk, N, b, D)
    interval = c.interval(n_tokens)
    queries = c.queries(interval)
    distance = interval // queries  # from one query to the next
    in_prompt = min(c.history_len * queries, kernels.cdiv(n_tokens, distance))
    for name, rows, layers in (("prompt, one layer", in_prompt, 1), ("calibration, all layers", queries, m.n_layers)):
        k = keys[:layers].flatten(0, 1)  # (layers * Hk, N, b, D)
        q = torch.randn(layers * m.n_heads, rows, m.head_dim, device=device).to(dtype)
        written = 4 * len(q) * rows * (k.shape[1] + 1)  # block maxima and log-sum-exp
        multiply_adds = len(q) * rows * n_tokens * m.head_dim
        call = partial(lambda q, k: kernels.pool_history(q, k, n_tokens, distance, backend)[0], q, k)
        rivals = {"softmax, then max": partial(softmax_then_max, q, k, n_tokens, distance)}
        yield f"pool_history, {name}", k.nbytes + q.nbytes + written, multiply_adds, call, rivals


def predict_multiply_adds(heads, history_len, new_rows, start, end, valid_end):
    """Multiply-adds of a call of `kernels.predict` in the network, without the mean. Padding counts as data."""
    total = 0
    for top, bottom, first in kernels.stale_strips(history_len, new_rows, start, end, valid_end):
        conv1 = (min(bottom + 1, history_len) - max(top - 1, 0)) * (end - max(first - 1, start))  # cells
        conv2 = (bottom - top) * (end - first)
        total += heads * (conv1 * 16 * 9 + conv2 * (32 * 16 * 9 + 32))
    return total


def prediction_paths(m, c, n_tokens, dtype, device, backend):
    """Predicts from a whole image, and from a new row and kept contributions."""
    weights = kernels.prepare_weights(Predictor().requires_grad_(False).state_dict(), device)
    heads, (start, end) = m.n_layers * m.n_kv_heads, c.middle(n_tokens)
    history = torch.rand(heads, c.history_len, c.n_blocks(n_tokens), device=device).to(attnpred.HISTORY_DTYPE)
    contributions = torch.zeros_like(history)  # (L * Hk, H, N)

    def convolve(tf32):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
            parts = history.float().split(m.n_kv_heads)
            return torch.cat([kernels.predict_reference(part, start, end, weights) for part in parts])

    rivals = {"convolutions, float32": partial(convolve, False)}
    if device.type == "cuda":
        rivals["convolutions, tf32"] = partial(convolve, True)
    # After a new row, 9 rows of history are read (two around each computed row) and H - 5 contributions, and 5
    # contributions are written.
    for name, new, valid_end, rows in (
        ("whole image", 0, start, 2 * c.history_len),
        ("a new row", 1, end, c.history_len + 9),
    ):
        moved = heads * (end - start) * (rows * history.element_size() + 4)  # the scores have 4 bytes
        window = new, start, end, valid_end
        multiply_adds = predict_multiply_adds(heads, c.history_len, *window)
        call = partial(kernels.predict, history, contributions, *window, weights, backend)
        yield f"predict, {name}, all layers", moved, multiply_adds, call, rivals


def selection_paths(m, c, n_tokens, dtype, device, backend):
    """Selects the best blocks of the whole model."""
    (start, end), heads = c.middle(n_tokens), m.n_layers * m.n_kv_heads
    scores, k = torch.randn(1, heads * (end - start), device=device), heads * c.topk_blocks
    rivals = {"topk, then sort": lambda: scores.topk(k, sorted=False).indices.sort(1).values}
    call = partial(kernels.select_blocks, scores, k, backend)
    yield f"select_blocks, {k} of all layers", scores.nbytes + 4 * k, 0, call, rivals


def table_of(counts, n_echoes, c, n_tokens, device):
    """A table of addresses (Hk, width) int32 and lengths in tokens (Hk,) int64, of random blocks.

    KV head h attends to counts[h] blocks of the middle, to sink and local window, and to n_echoes others of the middle.
    """
    (start, end), n_blocks = c.middle(n_tokens), c.n_blocks(n_tokens)
    outside, n_none = torch.tensor([*range(start), *range(end, n_blocks)]), c.echo_blocks - n_echoes
    table = torch.full((len(counts), c.echo_blocks + max(counts) + len(outside)), -1)
    for head, (row, count) in enumerate(zip(table, counts)):
        echoes, blocks = torch.randperm(end - start)[: n_echoes + count].add(start).tensor_split([n_echoes])
        row[:n_echoes] = head * n_blocks + echoes
        listed = head * n_blocks + torch.cat([outside, blocks]).sort().values
        row[n_echoes + n_none :][: len(listed)] = listed
    lengths = (c.echo_blocks + torch.tensor(counts) + len(outside)) * c.block_size
    return table.int().to(device), lengths.to(device)


def attention_paths(m, c, n_tokens, dtype, device, backend):
    """Attends to the listed blocks of one layer."""
    n_blocks, group, k = c.n_blocks(n_tokens), m.n_heads // m.n_kv_heads, c.topk_blocks
    pool = torch.randn(2, m.n_kv_heads * n_blocks, c.block_size, m.head_dim, device=device).to(dtype)
    q = torch.randn(m.n_heads, m.head_dim, device=device).to(dtype)

    def sdpa(blocks):  # (2, Hk * blocks of a head, b, D)
        k, v = blocks.reshape(2, 1, m.n_kv_heads, -1, m.head_dim)
        return F.scaled_dot_product_attention(q.unflatten(0, (m.n_kv_heads, -1))[None], k, v)[0].flatten(0, 1)

    half = m.n_kv_heads // 2  # half of the heads select K / 2 blocks, the other half 3 K / 2
    uneven = [k - k // 2] * half + [k] * (m.n_kv_heads - 2 * half) + [k + k // 2] * half
    for name, counts, n_echoes in (
        ("heads alike", [k] * m.n_kv_heads, c.echo_blocks),
        ("uneven, no echoes", uneven, 0),
    ):
        table, lengths = table_of(counts, n_echoes, c, n_tokens, device)
        work = kernels.divide_work(lengths[None], c.block_size)[0]
        call = partial(lambda *lists: kernels.sparse_decode(q, *pool, *lists, backend)[0], table, lengths, work)
        rivals = {"SDPA over gathered blocks": partial(lambda address: sdpa(pool[:, address]), table.flatten().long())}
        rivals |= {"SDPA over all blocks": lambda: sdpa(pool)}
        outside = n_blocks - len(range(*c.middle(n_tokens)))  # blocks of sink and local window
        listed = sum(counts) + m.n_kv_heads * (n_echoes + outside)
        elements = pool[:, :1].numel() * listed  # of K and V
        moved = elements * pool.element_size() + 2 * q.nbytes + 4 * table.numel()
        yield f"sparse_decode, {name}, one layer", moved, group * elements, call, rivals if n_echoes else {}


def layer_paths(m, c, n_tokens, dtype, device, backend):
    """Rotates a layer's q and k and writes K and V; multiplies its gates."""
    qk, v = (torch.randn(n, m.head_dim, device=device).to(dtype) for n in (m.n_heads + m.n_kv_heads, m.n_kv_heads))
    freq, cache = torch.randn(m.head_dim, device=device), torch.zeros(2, *v.shape[:1], 64, m.head_dim, device=device)
    row = torch.zeros(1, dtype=torch.int64, device=device)
    arguments = qk, v, freq, 1.0, row, *cache.to(dtype), row
    rivals = {"PyTorch": partial(kernels.rotate_and_write_reference, *arguments)}
    call = partial(kernels.rotate_and_write, *arguments, backend)
    yield "rotate_and_write", 2 * qk.nbytes + v.nbytes * 3, 0, call, rivals
    gate_up = torch.randn(1, 2 * m.d_ff, device=device).to(dtype)
    rivals = {"PyTorch": partial(kernels.swiglu_reference, gate_up)}
    yield "swiglu", gate_up.nbytes * 3 // 2, 0, partial(kernels.swiglu, gate_up, backend), rivals


def copy_paths(m, c, n_tokens, dtype, device, backend):
    """Copies all blocks of a layer's selection, or a tenth of them."""
    n_blocks, elements, k = c.n_blocks(n_tokens), 2 * c.block_size * m.head_dim, m.n_kv_heads * c.topk_blocks
    ids, slot = torch.randperm(m.n_kv_heads * n_blocks).int(), torch.arange(k, device=device).int()
    host = torch.zeros(m.n_kv_heads * n_blocks, elements, dtype=dtype, pin_memory=device.type == "cuda")
    slots = torch.empty(k, elements, device=device, dtype=dtype)
    for name, n in (("all", k), ("a tenth", max(1, k // 10))):
        chosen = ids[:n]
        source = F.pad(chosen, (0, k - n), value=-1).to(device)  # (k,)
        call = partial(kernels.copy_blocks, host, slots, source, slot, backend)
        rivals = {"index_select": partial(lambda n, chosen: slots[:n].copy_(host.index_select(0, chosen)), n, chosen)}
        yield f"copy_blocks, {name} of {k}", n * host[0].nbytes, 0, call, rivals


PATHS = (echo_paths, pooling_paths, prediction_paths, selection_paths, layer_paths, attention_paths, copy_paths)
