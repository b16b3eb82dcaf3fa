"""What decoding must move and multiply, as formulas of shapes: nothing here touches a tensor.

Reading order: `Work` and one formula for each launch of kernels.py, the lower bounds that `experiments.bench kernels`
divides by measured times; `decode_reads`, the bytes that a token reads; `link_bytes` and `token_seconds`, the model of
the offloaded cache. tests/test_bench.py holds them to counts by hand and to the counters of attnpred.Stats.

Hq query heads, Hk KV heads, D head_dim, T tokens, b block size, N blocks, H history rows, M and P the intervals of
calibration and of selection. `itemsize` is the bytes of one number in K and V.
"""

import math
from dataclasses import dataclass

import kernels
from attnpred import HISTORY_DTYPE, Config
from model import LlamaConfig

LLAMA_31_8B = LlamaConfig(
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    d_model=4096,
    d_ff=14336,
    vocab_size=128256,
    context_len=131072,
    rope_theta=500000.0,
    rope_scaling=dict(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192.0,
    ),
    rms_eps=1e-5,
    tie_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
    eos_token_ids=(),
)

# --------------------------------------------------------------------------------------------------------------------
# The launches of kernels.py
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """The least that a launch can do: bytes of its inputs and outputs, each once, and its multiply-adds."""

    bytes: int
    multiply_adds: int = 0


def pool_history(n_heads, n_kv_heads, rows, n_tokens, head_dim, block_size, itemsize) -> Work:
    """Reads K and the queries; writes a float32 row of block maxima per query. q @ K for every query."""
    read = itemsize * head_dim * (n_kv_heads * n_tokens + n_heads * rows)
    return Work(read + 4 * n_heads * rows * (-(-n_tokens // block_size) + 1), n_heads * rows * n_tokens * head_dim)


def predict(heads, history_len, new_rows, start, end, valid_end, itemsize=HISTORY_DTYPE.itemsize) -> Work:
    """Reads history and contributions, writes the contributions that changed and the float32 scores.

    From scratch, a column reads H rows of history and writes H contributions. After P new rows it reads P + 8 rows of
    history (two around each computed row) and the other H - 4 - P contributions, and writes P + 4.
    """
    n = end - start
    first = valid_end <= start or new_rows >= history_len - 4
    rows = 2 * history_len if first else history_len + 4 + new_rows + 4
    work = kernels.predict_multiply_adds(heads, history_len, new_rows, start, end, valid_end)
    return Work(heads * n * (rows * itemsize + 4), work)


def select_blocks(rows, n, k) -> Work:
    """Reads float32 scores, writes int32 indices."""
    return Work(4 * rows * (n + k))


def sparse_decode(n_heads, heads, listed_tokens, head_dim, block_size, itemsize) -> Work:
    """Reads the K and V of `listed_tokens` tokens (all selection heads together) and their addresses; writes each
    listed block's largest logit. q @ K and p @ V for each query of the group."""
    group, blocks = n_heads // heads, -(-listed_tokens // block_size)
    kv, q = 2 * listed_tokens * head_dim * itemsize, 2 * n_heads * head_dim * itemsize
    return Work(kv + q + 4 * blocks * (1 + group), 2 * group * listed_tokens * head_dim)


def write_rows(rows, group, listed_blocks, capacity, itemsize=HISTORY_DTYPE.itemsize) -> Work:
    """Reads the listed blocks' logits and columns, writes whole rows."""
    return Work(4 * listed_blocks * (group + 1) + itemsize * rows * capacity, listed_blocks * group)


def assign_slots(rows, k) -> Work:
    """Reads two int32 lists per row, writes three."""
    return Work(4 * 5 * rows * k)


def copy_blocks(n, block_bytes) -> Work:
    """Each of n blocks crosses the link to the host once."""
    return Work(n * block_bytes)


# --------------------------------------------------------------------------------------------------------------------
# What a token reads
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Reads:
    """Bytes of device memory read in order to attend; attnpred.Stats counts the same."""

    attention: float = 0  # K and V
    calibration: float = 0  # K once more
    choosing: float = 0  # history and contributions
    dense: float = 0  # what dense attention would read

    @property
    def total(self):
        return self.attention + self.calibration + self.choosing


def decode_reads(m: LlamaConfig, c: Config, n_prompt: int, steps: int, itemsize: int = 2) -> Reads:
    """The mean bytes that a token reads, over `steps` tokens decoded after a prompt of n_prompt tokens."""
    reads = Reads()
    heads = m.n_kv_heads if c.select_heads == "kv" else m.n_heads
    dense = min(c.dense_layers, m.n_layers)
    sparse = m.n_layers - dense
    token = m.head_dim * itemsize  # one head's key or value of one token
    fits, selected_at = True, 0
    for step in range(steps + 1):
        n_tokens = n_prompt + step
        calibration_interval, selection_interval = c.intervals(n_tokens)
        if step:
            every = 2 * m.n_kv_heads * n_tokens * token  # one layer's K and V
            start, end = c.middle(selected_at + 1)
            attended = n_tokens - (end - start - c.topk_blocks) * c.block_size  # sink, selection, and all after it
            reads.dense += m.n_layers * every
            reads.attention += dense * every + sparse * (every if fits else 2 * heads * attended * token)
            if not fits and step % calibration_interval == 0:
                reads.calibration += sparse * every / 2
        if step % selection_interval == 0 and sparse:
            selected_at = n_tokens
            fits = c.fits(n_tokens + 1)
            start, end = c.middle(n_tokens + 1)
            if step and not fits and c.topk_blocks:
                rows = c.history_len + 4  # P + 8 of history and H - 4 - P of contributions
                reads.choosing += sparse * heads * rows * (end - start) * HISTORY_DTYPE.itemsize
    return Reads(*(getattr(reads, name) / steps for name in ("attention", "calibration", "choosing", "dense")))


def token_reads(m: LlamaConfig, c: Config, n_tokens: int, itemsize: int = 2) -> Reads:
    """`decode_reads` over the interval of calibration and of selection that ends at n_tokens."""
    steps = math.lcm(*c.intervals(n_tokens))
    return decode_reads(m, c, n_tokens - steps, steps, itemsize)


# --------------------------------------------------------------------------------------------------------------------
# The offloaded cache: a model of time
# --------------------------------------------------------------------------------------------------------------------


def weight_bytes(m: LlamaConfig, itemsize: int = 2) -> int:
    """Weights that a token reads: all matrices of the layers, and the head (of the embeddings, one row)."""
    attention = 2 * m.d_model * m.head_dim * (m.n_heads + m.n_kv_heads)
    return itemsize * (m.n_layers * (attention + 3 * m.d_model * m.d_ff) + m.vocab_size * m.d_model)


def link_bytes(m: LlamaConfig, c: Config, n_tokens: int, fetched_fraction: float, itemsize: int = 2) -> float:
    """Bytes that cross the link to the host for a token of offloaded decoding, both directions together.

    Every P tokens the part of the selection that no slot holds yet; every M tokens the sparse layers' queries and the
    rows pooled from them; and each token's own K and V once. Dense layers are on the device.
    """
    calibration_interval, selection_interval = c.intervals(n_tokens)
    heads = m.n_kv_heads if c.select_heads == "kv" else m.n_heads
    token = 2 * m.head_dim * itemsize  # one head's key and value of one token
    start, end = c.middle(n_tokens)
    selected = min(c.topk_blocks, max(0, end - start)) * c.block_size
    fetched = heads * selected * token * fetched_fraction / selection_interval
    row = m.n_heads * (m.head_dim * itemsize + 4 * (c.n_blocks(n_tokens) + 1))  # query, block maxima, log-sum-exp
    calibrated = 0 if c.fits(n_tokens) else row / calibration_interval
    return max(0, m.n_layers - c.dense_layers) * (fetched + calibrated + m.n_kv_heads * token)


def token_seconds(moved: dict[str, float], bandwidth: dict[str, float], overlap=True) -> float:
    """The model: bytes over bandwidth of "memory", "link" and "host"; the longest of the three where all overlap, else
    their sum."""
    times = [moved[name] / bandwidth[name] for name in moved]
    return max(times) if overlap else sum(times)


def offload_strategies(m: LlamaConfig, c: Config, n_tokens: int, fetched_fraction: float) -> dict[str, tuple]:
    """What decoding a token moves, in 16 bits, for ways to keep the cache: {name: (moved, overlap)}."""
    reads, weights = token_reads(m, c, n_tokens), weight_bytes(m)
    sparse = weights + reads.attention + reads.choosing
    difference, selection = (link_bytes(m, c, n_tokens, fraction) for fraction in (fetched_fraction, 1.0))
    host = reads.calibration
    return {
        "dense, resident": (dict(memory=weights + reads.dense, link=0, host=0), True),
        "sparse, resident": (dict(memory=sparse + host, link=0, host=0), True),
        "dense, everything streamed": (dict(memory=weights + reads.dense, link=reads.dense, host=0), True),
        "sparse, selection copied anew": (dict(memory=sparse, link=selection, host=host), False),
        "sparse, difference, awaited": (dict(memory=sparse, link=difference, host=host), False),
        "sparse, difference, ahead": (dict(memory=sparse, link=difference, host=host), True),
    }
