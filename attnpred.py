"""AttentionPredictor: decode a Llama, reading only the KV blocks that a small convolution expects to matter next.

    python attnpred.py --prompt "Why is the sky blue?"

Reading order: `Config` (the parameters), `Predictor` (the network), `SparseDecoder` (the method: prefill, attend,
calibrate, predict, select), `KVCache` and `OffloadedCache` (where K and V are), `generate`, the command line. The
arithmetic is in kernels.py, the language model in model.py.

Source: Yang et al., AttentionPredictor: Temporal Patterns Matter for KV Cache Compression, NeurIPS 2025
(arXiv 2502.04077).
"""

import argparse
import dataclasses
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels
from model import Llama, LlamaConfig, ModelError, TextStream, causal_attention, load_model
from weights.fetch_llm import DEFAULT_LLM, FetchError, fetch_default_llm

DEFAULT_PREDICTOR = pathlib.Path(__file__).parent / "weights" / "predictor.safetensors"
HISTORY_DTYPE = torch.float16  # of the history and of the contributions; predictions are computed in float32


class InputError(Exception):
    """The user gave something that cannot be used; the message says in one line what is wrong and what to do."""


# --------------------------------------------------------------------------------------------------------------------
# Parameters and predictor
# --------------------------------------------------------------------------------------------------------------------


def parameter(default, symbol, paper, help, choices=None):
    return field(default=default, metadata=dict(symbol=symbol, paper=paper, help=help, choices=choices))


@dataclass(frozen=True)
class Config:
    """The method's parameters. Raises InputError where they contradict each other."""

    block_size: int = parameter(16, "b", 16, "tokens per block")
    history_len: int = parameter(64, "H", 64, "rows of pooled attention kept")
    sink_tokens: int = parameter(64, "S", 64, "first tokens, always attended")
    local_tokens: int = parameter(64, "R", 64, "last tokens, always attended")
    budget: int = parameter(1024, "B", 1024, "tokens attended per head, sink and local tokens included")
    calibration_interval: int | str = parameter(
        "auto", "M", 5, "every M-th step the true attention row enters the history; auto: 8, doubled while T / M > 2 B"
    )
    selection_interval: int | None = parameter(
        None, "P", 1, "every P-th step the blocks for the next P tokens are predicted and selected; default: M"
    )
    history_rows: str = parameter(
        "true", "", "every", "every: each step leaves a row, true or sparse; true: only calibrated steps do",
        ("every", "true"),
    )  # fmt: skip
    dense_layers: int = parameter(0, "", 2, "first layers, always dense")
    share_budget: str = parameter(
        "layer", "", "head", "layer: a layer's heads share their blocks, the best scores of all; head: K blocks each",
        ("layer", "head"),
    )  # fmt: skip
    select_heads: str = parameter(
        "kv", "", "q", "kv: the query heads of a KV head select together; q: each for itself", ("kv", "q")
    )

    @classmethod
    def paper(cls, **changes) -> "Config":
        """The paper's setting, with changes."""
        return cls(**({f.name: f.metadata["paper"] for f in dataclasses.fields(cls)} | changes))

    def __post_init__(self):
        b = self.block_size
        if not (8 <= b <= 64 and b & (b - 1) == 0):
            raise InputError(f"block_size = {b} is not supported: use 8, 16, 32 or 64")
        for name in ("sink_tokens", "local_tokens", "budget"):
            value = getattr(self, name)
            if value < 0 or value % b:
                raise InputError(
                    f"{name} = {value} is not a multiple of the block size: try {max(0, value) // b * b + b}"
                )
        if self.local_tokens < b:
            raise InputError(f"local_tokens = {self.local_tokens} must hold at least one block: try {b}")
        if self.budget < self.sink_tokens + self.local_tokens:
            least = self.sink_tokens + self.local_tokens
            raise InputError(f"budget = {self.budget} is below sink_tokens + local_tokens: use at least {least}")
        if self.history_len < 5:
            raise InputError(f"history_len = {self.history_len} is too short for the convolution: use at least 5")
        if self.calibration_interval != "auto" and self.calibration_interval < 1:
            raise InputError(f"calibration_interval = {self.calibration_interval} must be auto or at least 1")
        if self.selection_interval is not None and self.selection_interval < 1:
            raise InputError(f"selection_interval = {self.selection_interval} must be at least 1")
        if self.dense_layers < 0:
            raise InputError(f"dense_layers = {self.dense_layers} must not be negative")
        for f in dataclasses.fields(self):
            if f.metadata["choices"] and getattr(self, f.name) not in f.metadata["choices"]:
                raise InputError(
                    f"{f.name} = {getattr(self, f.name)!r} is unknown: use {' or '.join(f.metadata['choices'])}"
                )

    @property
    def topk_blocks(self) -> int:
        """K: blocks selected from the middle, per head."""
        return (self.budget - self.sink_tokens - self.local_tokens) // self.block_size

    def n_blocks(self, n_tokens: int) -> int:
        """N: blocks in a cache of n_tokens, the last one perhaps partial."""
        return -(-n_tokens // self.block_size)

    def middle(self, n_tokens: int) -> tuple[int, int]:
        """The blocks [start, end) between the sink and the local window; end <= start when there are none.

        The local window is block-aligned: the last R / b full blocks and the partial block after them.
        """
        return self.sink_tokens // self.block_size, (n_tokens - self.local_tokens) // self.block_size

    def fits(self, n_tokens: int) -> bool:
        """Whether the budget covers a text of n_tokens, so that there is nothing to select."""
        start, end = self.middle(n_tokens)
        return end - start <= self.topk_blocks

    def intervals(self, n_tokens: int) -> tuple[int, int]:
        """M and P at n_tokens. With "auto", calibration (T / M keys a token) never reads more than attention does."""
        m = self.calibration_interval
        if m == "auto":
            m = 8
            while n_tokens > 2 * self.budget * m:
                m *= 2
        return m, self.selection_interval or m

    def tail_blocks(self, n_tokens: int) -> int:
        """The local window, partial block included, and the blocks that begin before the next selection."""
        longest_wait = self.intervals(n_tokens + 2 * self.intervals(n_tokens)[1])[1]
        return self.local_tokens // self.block_size + 1 + self.n_blocks(longest_wait)

    def row_stride(self, n_tokens: int) -> int:
        """Tokens from one row of the history to the next."""
        return 1 if self.history_rows == "every" else self.intervals(n_tokens)[0]


class Predictor(nn.Module):
    """The shared convolution, 4,833 parameters: an image of pooled attention rows -> one score per block."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv1d(32, 1, 1)

    def forward(self, image):  # (heads, H, n) -> (heads, n)
        x = F.relu(self.conv1(image[:, None]))  # (heads, 16, H, n)
        x = F.relu(self.conv2(x))  # (heads, 32, H, n)
        return self.conv3(x.mean(2))[:, 0]  # (heads, n)


def load_predictor(path) -> Predictor:
    """Read a predictor from a .safetensors file or from a pickled state dict, such as the authors publish.

    Pickles are read with weights_only=True, so that no code in them runs. Raises InputError for a file that is missing,
    unreadable, or holds other keys or shapes, NaN or infinity.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise InputError(f"predictor {path} does not exist: give a .safetensors file or a pickled state dict")
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises many types of exception on damaged input
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"predictor {path} cannot be read ({reason}): give a complete state dict") from None
    predictor = Predictor()
    try:
        predictor.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError):
        wanted = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in predictor.state_dict().items())
        raise InputError(f"predictor {path} must hold these tensors and no others: {wanted}") from None
    if not all(tensor.isfinite().all() for tensor in predictor.state_dict().values()):
        raise InputError(f"predictor {path} holds NaN or infinity; train or fetch it again")
    return predictor.requires_grad_(False)


# --------------------------------------------------------------------------------------------------------------------
# The method
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class BlockLists:
    """What each selection head of each sparse layer attends to: its blocks in the order sink, selected, tail.

    The lists of one layer lie one after another, A blocks in all. The tail is the local window and room for the tokens
    that come before the next selection. All blocks are full but the one that holds the current token, which is the last
    one that a length reaches.
    """

    ids: torch.Tensor  # (L', A) int64: head * capacity + block
    starts: torch.Tensor  # (L', heads) int64: where each head's list starts in ids
    lengths: torch.Tensor  # (L', heads) int64: tokens attended; one more with each token
    places: torch.Tensor  # (L', k) int64: where the selected blocks stand in ids
    capacity: int

    @classmethod
    def build(cls, selected, heads, capacity, n_tokens, sink, end, tail, block_size):
        """From the selected blocks (L', k) int64, as ids, ascending; `sink` and `tail` blocks, those from `end` on."""
        device, k = selected.device, selected.shape[1]
        head = selected // capacity  # (L', k)
        count = F.one_hot(head, heads).sum(1)  # (L', heads): a head has 0 ... k of them
        size = sink + count + tail  # (L', heads)
        starts = size.cumsum(1) - size  # (L', heads)
        rank = torch.arange(k, device=device) - (count.cumsum(1) - count).gather(1, head)  # (L', k) in the head's own
        places = starts.gather(1, head) + sink + rank  # (L', k)
        first = torch.arange(heads, device=device)[:, None] * capacity  # (heads, 1): the id of each head's block 0
        block = torch.arange(max(sink, tail), device=device)
        sink_ids = (first + block[:sink]).flatten().expand(len(selected), -1)  # (L', heads * sink)
        tail_ids = (first + (end + block[:tail]).clamp(max=capacity - 1)).flatten().expand(len(selected), -1)
        ids = selected.new_empty(len(selected), heads * (sink + tail) + k)  # (L', A)
        ids.scatter_(1, places, selected)
        ids.scatter_(1, (starts[..., None] + block[:sink]).flatten(1), sink_ids)
        ids.scatter_(1, ((starts + sink + count)[..., None] + block[:tail]).flatten(1), tail_ids)
        return cls(ids, starts, (sink + count) * block_size + n_tokens - end * block_size, places, capacity)

    def replace(self, other, layers):
        """Take over the lists of some layers, of the same size."""
        for name in ("ids", "starts", "lengths", "places"):
            getattr(self, name)[layers] = getattr(other, name)

    def flat(self):
        """For kernels: block numbers (L' * A,) int32, and where each list starts among them (L', heads) int32."""
        layer = torch.arange(len(self.ids), device=self.ids.device)[:, None]  # (L', 1)
        return (self.ids % self.capacity).flatten().int(), (self.starts + layer * self.ids.shape[1]).int()


@dataclass
class Stats:
    """What decoding cost and how well it went: exact counters, wall-clock seconds, and recovery."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    attention_bytes: int = 0  # K and V read by attention, over all decoded tokens
    calibration_bytes: int = 0  # K read by calibration
    choosing_bytes: int = 0  # history and contributions read by prediction
    dense_bytes: int = 0  # K and V that dense attention would have read
    choosing_seconds: float = 0.0  # calibration, prediction and selection, where the host waits for them: on a CPU
    predict_multiply_adds: int = 0
    recovery: list = field(default_factory=list)  # (L', Hq) tensors: share of true attention, on calibrated steps

    @property
    def read_bytes(self) -> int:
        """Everything that decoding read instead of the dense cache."""
        return self.attention_bytes + self.calibration_bytes + self.choosing_bytes


class SparseDecoder:
    """One sequence being decoded: cache, attention history, prediction and selection, for all layers.

    `prefill` and `decode_one_token` drive it; its two attention methods are what the model calls in each layer. Layers
    from `dense_layers` on are sparse and have a history; the tensors of these L' layers are indexed by layer -
    dense_layers. After every P-th token the blocks for the next P tokens are selected; between, a token only attends.
    """

    def __init__(
        self, config: Config, model: Llama, predictor: Predictor, capacity_tokens: int, backend="torch", offload=False
    ):
        c, m, device, dtype = config, model.config, model.device, model.kv_dtype
        self.config, self.model_config, self.backend = c, m, backend
        self.dense_layers = min(c.dense_layers, m.n_layers)
        self.sparse_layers = m.n_layers - self.dense_layers  # L'
        self.heads = m.n_kv_heads if c.select_heads == "kv" else m.n_heads
        self.capacity = c.n_blocks(capacity_tokens)
        self.weights = kernels.prepare_weights(predictor.state_dict(), device)
        cache = OffloadedCache if offload else KVCache
        self.cache = cache(c, m, self.heads, capacity_tokens, dtype, device, backend)
        ring = self.sparse_layers, self.heads, c.history_len, self.capacity
        self.history = torch.zeros(ring, dtype=HISTORY_DTYPE, device=device)  # ring of pooled attention rows
        self.contributions = torch.zeros_like(self.history)  # (L', heads, H, capacity); see kernels.predict
        self.newest = c.history_len - 1  # the ring slot of the last row
        self.new_rows = 0  # rows that entered since the last prediction
        self.predicted_end = 0  # end of the middle at the last prediction; 0: there was none
        kept = self.sparse_layers, m.n_heads, c.history_len, m.head_dim
        self.queries = torch.zeros(kept, dtype=dtype, device=device)  # (L', Hq, H, D): ring of the rows' queries
        self.n_queries, self.last_query = 0, 0  # how many there have been; n_tokens at the newest one
        self.lse = torch.zeros(self.sparse_layers, m.n_heads, device=device)  # of this step's sparse attention
        self.fits = True  # the budget covers the text: nothing is selected, no row is written
        self.lists = None  # BlockLists of the next token
        self.n_tokens = 0
        self.step = 0  # decode steps since prefill
        self.stats = Stats()

    # Prefill

    def begin_prompt(self, n_tokens):
        self.n_tokens = n_tokens
        self.fits = not self.sparse_layers or self.config.fits(n_tokens + 1)
        stride = self.config.row_stride(n_tokens)
        self.count_query(min(self.config.history_len, -(-n_tokens // stride)))

    def prefill_attention(self, layer, q, k, v):
        """Dense causal attention over the prompt; K and V enter the cache, the last H rows the history.

        q (Hq, T, D), k and v (Hk, T, D) -> (Hq, T, D)
        """
        k_cache = self.cache.write_prompt(layer, k, v)  # (Hk, capacity, b, D)
        if layer >= self.dense_layers:
            sparse, rows, stride = layer - self.dense_layers, self.n_queries, self.config.row_stride(self.n_tokens)
            last = q[:, q.shape[1] - 1 - (rows - 1) * stride :: stride]  # (Hq, rows, D)
            if self.fits:  # pooled when the text outgrows the budget, together with the rows of later tokens
                self.queries[sparse, :, :rows] = last
            else:
                pooled, _ = kernels.pool_history(last, k_cache, self.n_tokens, stride, self.backend)  # (Hq, rows, N)
                self.store_rows(pooled[None], slice(sparse, sparse + 1))
        return causal_attention(layer, q, k, v)

    # One token

    def begin_token(self):
        self.n_tokens += 1
        self.step += 1
        if self.step % self.config.row_stride(self.n_tokens) == 0:
            self.count_query(1)
        if self.lists is not None:
            self.lists.lengths += 1
        self.cache.begin_token(self.n_tokens)

    def decode_attention(self, layer, q, k, v):
        """Attention of one token over its selected blocks: q (Hq, 1, D), k and v (Hk, 1, D) -> (Hq, 1, D)."""
        self.cache.write_token(layer, k, v)
        if layer < self.dense_layers or (self.fits and self.cache.holds_everything):
            out = self.cache.attend_all(layer, q[:, 0])  # (Hq, D)
        else:
            out, self.lse[layer - self.dense_layers] = self.cache.attend(layer - self.dense_layers, q[:, 0])
        if layer >= self.dense_layers and self.last_query == self.n_tokens:
            self.queries[layer - self.dense_layers, :, (self.n_queries - 1) % self.config.history_len] = q[:, 0]
        return out[:, None]

    def finish_token(self):
        """After a step, or the prompt (step 0): calibrate, then predict and select where it is time to."""
        calibration_interval, selection_interval = self.config.intervals(self.n_tokens)
        self.cache.end_token(self.n_tokens)
        if self.step:
            self.count_reads()
        if self.step and not self.fits:
            if self.step % calibration_interval == 0:
                self.calibrate()
            elif self.config.history_rows == "every":
                self.push_row()
                self.cache.write_rows(self.lse, self.history.flatten(0, 1)[:, self.newest])
        if self.step % selection_interval == 0 and self.sparse_layers:
            self.select_next()

    def calibrate(self):
        """The true attention row of this step enters the history."""
        newest = (self.n_queries - 1) % self.config.history_len
        pooled, lse = self.cache.pool(self.queries[:, :, newest : newest + 1], self.n_tokens)  # (L', Hq, 1, N)
        self.push_row()
        self.store_rows(pooled)
        self.stats.recovery.append(torch.exp(self.lse - lse[..., 0]))  # (L', Hq)
        m = self.model_config
        keys = self.sparse_layers * m.n_kv_heads * self.n_tokens
        self.stats.calibration_bytes += keys * m.head_dim * self.queries.element_size()

    def select_next(self):
        """Predict and select the blocks that the tokens up to the next selection attend to."""
        start, end = self.config.middle(self.n_tokens + 1)
        if self.config.fits(self.n_tokens + 1):
            if not self.cache.holds_everything:
                self.choose(None, start, max(start, end))
            return
        if self.fits:  # the text outgrows the budget now: pool the rows of the queries kept so far
            self.fits = False
            rows = min(self.n_queries, self.config.history_len)
            order = (self.n_queries - rows + torch.arange(rows, device=self.queries.device)) % self.config.history_len
            stride = self.config.row_stride(self.n_tokens)
            pooled, _ = self.cache.pool(self.queries[:, :, order], self.last_query, stride)  # (L', Hq, rows, N)
            self.store_rows(pooled)
        self.choose(self.scores(start, end) if self.config.topk_blocks else None, start, end)
        self.predicted_end, self.new_rows = end, 0

    def scores(self, start, end, layers=slice(None)):
        """Predicted scores of the middle blocks [start, end): (layers, heads, end - start) float32."""
        history = self.history[layers].flatten(0, 1)  # (layers * heads, H, capacity)
        contributions = self.contributions[layers].flatten(0, 1)  # (layers * heads, H, capacity)
        valid_end = max(start, self.predicted_end)
        if self.step:  # the first prediction belongs to prefill
            shape = *history.shape[:2], self.new_rows, start, end, valid_end
            self.stats.predict_multiply_adds += kernels.predict_multiply_adds(*shape)
            rows = history.shape[1] + 4  # H - 4 - new rows of contributions, new rows + 8 of history
            self.stats.choosing_bytes += len(history) * rows * (end - start) * history.element_size()
        scores = kernels.predict(
            history, contributions, self.newest, self.new_rows, start, end, valid_end, self.weights, self.backend
        )  # (layers * heads, n)
        return scores.unflatten(0, (-1, self.heads))

    def choose(self, scores, start, end, layers=slice(None)):
        """Select the blocks with the highest scores (layers, heads, n), and have the cache make them ready.

        scores is None where all of the middle is selected, or nothing.
        """
        c, n, device = self.config, end - start, self.history.device
        head = torch.arange(self.heads, device=device)[:, None]  # (heads, 1)
        if scores is not None and c.share_budget == "layer":
            k = self.heads * c.topk_blocks
            best = kernels.select_blocks(scores.flatten(1), k, self.backend).long()  # (layers, heads * K)
            selected = best // n * self.capacity + best % n + start
        else:
            if scores is not None:
                best = kernels.select_blocks(scores.flatten(0, 1), c.topk_blocks, self.backend)  # (layers * heads, K)
            else:
                kept = torch.arange(n if self.fits else 0, device=device)
                best = kept.expand(len(range(self.sparse_layers)[layers]) * self.heads, -1)
            best = best.unflatten(0, (-1, self.heads)).long()  # (layers, heads, k)
            selected = (head * self.capacity + best + start).flatten(1)  # (layers, heads * k)
        tail = c.tail_blocks(self.n_tokens)
        sink = min(start, c.n_blocks(self.n_tokens + 1)) if self.fits else start
        end = max(sink, end)
        lists = BlockLists.build(selected, self.heads, self.capacity, self.n_tokens, sink, end, tail, c.block_size)
        self.attended_tokens = selected.shape[1] * c.block_size + self.heads * (
            self.n_tokens - (end - sink) * c.block_size
        )
        if layers == slice(None):
            self.lists = lists
        else:
            self.lists.replace(lists, layers)
        self.cache.select(self.lists, layers)

    # What it knows of itself

    def count_query(self, rows):
        self.n_queries, self.last_query = self.n_queries + rows, self.n_tokens

    def push_row(self):
        """The next row takes the oldest one's slot in the ring."""
        self.newest = (self.newest + 1) % self.config.history_len
        self.new_rows += 1

    def store_rows(self, pooled, layers=slice(None)):
        """Make pooled (layers, Hq, rows, N) the last rows of the history."""
        rows, n_blocks = pooled.shape[2:]
        slots = (self.newest - rows + 1 + torch.arange(rows, device=pooled.device)) % self.config.history_len  # (rows,)
        self.history[layers, :, slots, :n_blocks] = self.group_mean(pooled).to(self.history.dtype)

    def group_mean(self, pooled):
        """(layers, Hq, ...) -> (layers, heads, ...): with "kv" selection a group's queries share their mean row."""
        return pooled.unflatten(1, (self.heads, -1)).mean(2)

    def window(self):
        """The history, oldest row first: (L', heads, H, capacity) float32."""
        order = (self.newest + 1 + torch.arange(self.config.history_len)) % self.config.history_len  # (H,)
        return self.history[:, :, order.to(self.history.device)].float()

    def attended(self, layer, n_blocks):
        """Which blocks (heads, n_blocks) bool a sparse layer attends to in this step."""
        if self.lists is None:
            return torch.ones(self.heads, n_blocks, dtype=torch.bool, device=self.history.device)
        ids, starts, lengths = (x[layer] for x in (self.lists.ids, self.lists.starts, self.lists.lengths))
        place = torch.arange(len(ids), device=ids.device)  # (A,)
        listed = (place >= starts[:, None]) & (place < (starts + -(-lengths // self.config.block_size))[:, None])
        mask = torch.zeros(self.heads * self.capacity, dtype=torch.bool, device=ids.device)
        mask[ids[listed.any(0)]] = True
        return mask.view(self.heads, -1)[:, :n_blocks]

    def count_reads(self):
        """Count the cache bytes that attention read for one token."""
        m = self.model_config
        row_bytes = 2 * m.head_dim * self.queries.element_size()  # a token's K and V of one head
        dense = m.n_kv_heads * self.n_tokens
        sparse = dense
        if self.lists is not None:
            self.attended_tokens += self.heads
            sparse = self.attended_tokens
        self.stats.attention_bytes += row_bytes * (self.dense_layers * dense + self.sparse_layers * sparse)
        self.stats.dense_bytes += row_bytes * m.n_layers * dense


# --------------------------------------------------------------------------------------------------------------------
# Where K and V are
# --------------------------------------------------------------------------------------------------------------------


class KVCache:
    """K and V of all layers, resident on the device, in blocks. Capacity is fixed; memory is touched as tokens come."""

    holds_everything = True  # so while the text fits the budget, attend_all serves

    def __init__(self, c: Config, m: LlamaConfig, heads, capacity_tokens, dtype, device, backend, n_layers=None):
        self.block_size, self.heads, self.backend = c.block_size, heads, backend
        self.n_kv_heads, self.group = m.n_kv_heads, m.n_heads // heads
        self.capacity = c.n_blocks(capacity_tokens)
        n_layers = m.n_layers if n_layers is None else n_layers
        shape = (2, n_layers, m.n_kv_heads, self.capacity, c.block_size, m.head_dim)
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self.k, self.v = self.kv  # (L, Hk, capacity, b, D) each
        self.dense_layers = min(c.dense_layers, m.n_layers)
        self.keeps_rows = c.history_rows == "every"
        self.lists = None
        padded = backend == "torch" and self.kv.is_cpu and not self.keeps_rows  # so kernels.attend_padded serves
        self.padded = [] if padded else None  # a sparse layer's addresses (heads, n) each

    def write_prompt(self, layer, k, v):
        """Store k, v (Hk, T, D). Returns the layer's keys (Hk, capacity, b, D)."""
        self.kv[0, layer].flatten(1, 2)[:, : k.shape[1]] = k
        self.kv[1, layer].flatten(1, 2)[:, : k.shape[1]] = v
        return self.k[layer]

    def begin_token(self, n_tokens):
        """The next writes and reads belong to token n_tokens - 1."""
        self.n_tokens = n_tokens
        if self.lists is None:
            return
        self.lengths = self.lists.lengths.int()  # (L', heads)
        if self.padded:
            self.longest = (-(-self.lengths // self.block_size)).amax(1).tolist()  # of a layer's lists, in blocks
            self.mask.scatter_(2, self.lists.lengths[..., None] - 1, 0.0)  # the current token is attended

    def write_token(self, layer, k, v):
        """Store k, v (Hk, 1, D) of the current token."""
        self.kv[:, layer].flatten(2, 3)[:, :, self.n_tokens - 1] = torch.stack((k, v))[:, :, 0]  # (2, Hk, D)

    def end_token(self, n_tokens):
        """Nothing is left to do."""

    def select(self, lists, layers=slice(None)):
        """Make the blocks of these sparse layers' lists ready for attention."""
        self.lists, ids = lists, lists.ids  # (L', A)
        layer = torch.arange(len(ids), device=ids.device)[:, None] + self.dense_layers  # (L', 1)
        kv_head = ids // self.capacity * self.n_kv_heads // self.heads  # (L', A)
        address = (layer * self.n_kv_heads + kv_head) * self.capacity + ids % self.capacity  # (L', A)
        self.table = address.flatten().int()
        self.columns, self.starts = lists.flat()
        if self.padded is None:
            self.block_max = self.kv.new_zeros(self.group, ids.numel(), dtype=torch.float32)  # (G, L' * A)
        else:
            end = torch.full_like(lists.starts[:, :1], ids.shape[1])  # (L', 1)
            sizes = lists.starts.diff(append=end).tolist()  # blocks, with room for the tokens up to the next selection
            rows = zip(self.table.view(ids.shape)[layers], sizes[layers])
            self.padded[layers] = [kernels.pad_lists(row.split(size)) for row, size in rows]
            longest = max(address.shape[1] for address in self.padded) * self.block_size  # tokens
            self.mask = kernels.length_mask(lists.lengths, longest)  # (L', heads, longest)

    def attend(self, layer, q):
        """Attention of q (Hq, D) over the lists of a sparse layer -> out (Hq, D), log-sum-exp (Hq,)."""
        k, v = self.kv.flatten(1, 3)  # (L * Hk * capacity, b, D) each
        if self.padded is not None:
            n = self.longest[layer]
            address, mask = self.padded[layer][:, :n], self.mask[layer, :, : n * self.block_size]
            return kernels.attend_padded(q, k, v, address, mask)  # of (heads, n), (heads, n * b)
        return kernels.sparse_decode(
            q, k, v, self.table, self.starts[layer], self.lengths[layer], self.block_max, self.backend
        )

    def attend_all(self, layer, q):
        """Dense attention of q (Hq, D) -> (Hq, D)."""
        if self.backend == "triton":  # every block is in the list
            k, v = self.kv[:, layer].flatten(1, 2)  # (Hk * capacity, b, D) each
            table = torch.arange(len(k), dtype=torch.int32, device=q.device)  # (Hk * capacity,)
            starts = table[:: self.capacity].contiguous()  # (Hk,)
            lengths = torch.full_like(starts, self.n_tokens)  # (Hk,)
            block_max = q.new_empty(len(q) // self.n_kv_heads, len(k), dtype=torch.float32)
            return kernels.sparse_decode(q, k, v, table, starts, lengths, block_max, self.backend)[0]
        k, v = self.kv[:, layer].flatten(2, 3)[:, None, :, : self.n_tokens]  # (1, Hk, T, D) each
        return F.scaled_dot_product_attention(q.unflatten(0, (self.n_kv_heads, -1))[None], k, v)[0].flatten(0, 1)

    def pool(self, q, n_tokens, stride=1):
        """`kernels.pool_history` in all sparse layers: q (L', Hq, rows, D) -> (L', Hq, rows, N), (L', Hq, rows)."""
        keys = self.kv[0, self.dense_layers :].flatten(0, 1)  # (L' * Hk, capacity, b, D)
        pooled, lse = kernels.pool_history(q.flatten(0, 1), keys, n_tokens, stride, self.backend)
        return pooled.unflatten(0, q.shape[:2]), lse.unflatten(0, q.shape[:2])

    def write_rows(self, lse, rows):
        """The rows (L' * heads, capacity) that this step's attention leaves, from its lse (L', Hq)."""
        lists = self.columns, self.starts.flatten(), self.lengths.flatten()
        kernels.write_rows(self.block_max, lse.flatten(), *lists, rows, self.block_size, self.backend)


class OffloadedCache:
    """Stands in for KVCache where K and V live in host memory, a block's K and V side by side.

    The device has slots: for each sparse layer heads * K that hold the selected blocks, and for each head those of the
    sink and of the tail. A new selection copies only the blocks that no slot holds yet. A block is written to the host
    when it is full. Calibration pools the keys in host memory, where they are. Dense layers stay on the device.
    """

    holds_everything = False

    def __init__(self, c: Config, m: LlamaConfig, heads, capacity_tokens, dtype, device, backend):
        self.block_size, self.heads, self.backend = c.block_size, heads, backend
        self.n_kv_heads, self.group = m.n_kv_heads, m.n_heads // heads
        self.capacity, self.device = c.n_blocks(capacity_tokens), torch.device(device)
        self.dense_layers = min(c.dense_layers, m.n_layers)
        self.dense = KVCache(c, m, heads, capacity_tokens, dtype, device, backend, n_layers=self.dense_layers)
        self.keeps_rows = c.history_rows == "every"
        self.sink = c.sink_tokens // c.block_size
        self.ring = c.tail_blocks(capacity_tokens)
        self.selectable = heads * c.topk_blocks  # slots of a layer that hold selected blocks
        sparse, block = m.n_layers - self.dense_layers, (2, c.block_size, m.head_dim)
        pinned = self.device.type == "cuda"
        self.host = torch.zeros(sparse, m.n_kv_heads, self.capacity, *block, dtype=dtype, pin_memory=pinned)
        n_slots = self.selectable + heads * (self.sink + self.ring)
        self.slots = torch.zeros(sparse, n_slots, *block, dtype=dtype, device=device)  # (L', slots, 2, b, D)
        self.home = self.slots[:, self.selectable :].unflatten(1, (heads, -1))  # (L', heads, sink + ring, 2, b, D)
        self.held = torch.full((sparse, self.selectable), -1, dtype=torch.int32, device=device)  # ids in the slots
        self.lists = None
        self.fetched = torch.zeros((), dtype=torch.int64, device=device)  # blocks copied into slots, of all heads
        self.selected = 0  # blocks selected, of all heads
        self.written_bytes = 0  # to the host

    @property
    def block_bytes(self) -> int:
        """K and V of one head's block."""
        return self.slots[0, 0].numel() * self.slots.element_size()

    @property
    def device_bytes(self) -> int:
        """K and V that the device has room for."""
        return sum(t.numel() * t.element_size() for t in (self.slots, self.dense.kv))

    def home_of(self, block):
        """The place in `home` of a block, an int or a tensor, of the sink or the tail."""
        if isinstance(block, int):
            return block if block < self.sink else self.sink + block % self.ring
        return torch.where(block < self.sink, block, self.sink + block % self.ring)

    def write_prompt(self, layer, k, v):
        """Store k, v (Hk, T, D). Returns the keys in blocks (Hk, N, b, D)."""
        if layer < self.dense_layers:
            return self.dense.write_prompt(layer, k, v)
        blocks = torch.stack((k, v), 1)  # (Hk, 2, T, D)
        blocks = F.pad(blocks, (0, 0, 0, -k.shape[1] % self.block_size)).unflatten(2, (-1, self.block_size))
        blocks = blocks.transpose(1, 2)  # (Hk, N, 2, b, D)
        n_blocks, layer = blocks.shape[1], layer - self.dense_layers
        self.host[layer, :, :n_blocks].copy_(blocks)
        for block in {*range(min(self.sink, n_blocks)), *range(max(0, n_blocks - self.ring), n_blocks)}:
            each = blocks[:, block].repeat_interleave(self.heads // self.n_kv_heads, 0)  # (heads, 2, b, D)
            self.home[layer, :, self.home_of(block)] = each
        return blocks[:, :, 0]

    def begin_token(self, n_tokens):
        self.n_tokens = self.dense.n_tokens = n_tokens
        if self.lists is not None:
            self.lengths = self.lists.lengths.int()  # (L', heads)

    def write_token(self, layer, k, v):
        """Store k, v (Hk, 1, D) of the current token in its block's slots."""
        if layer < self.dense_layers:
            return self.dense.write_token(layer, k, v)
        block, offset = divmod(self.n_tokens - 1, self.block_size)
        kv = torch.cat((k, v), 1).repeat_interleave(self.heads // self.n_kv_heads, 0)  # (heads, 2, D)
        self.home[layer - self.dense_layers, :, self.home_of(block), :, offset] = kv

    def end_token(self, n_tokens):
        if n_tokens % self.block_size == 0:
            self.write_back(n_tokens // self.block_size - 1)

    def write_back(self, block):
        """Copy a block of the tail to the host, in all layers."""
        source = self.home[:, :: self.heads // self.n_kv_heads, self.home_of(block)]  # (L', Hk, 2, b, D)
        self.host[:, :, block].copy_(source)
        self.written_bytes += source.numel() * source.element_size()

    def select(self, lists, layers=slice(None)):
        """Copy the selected blocks that no slot holds yet, and note which slots the lists are in."""
        assert layers == slice(None)
        self.lists, n_layers = lists, len(lists.ids)
        layer = torch.arange(n_layers, device=lists.ids.device)[:, None]  # (L', 1)
        wanted = lists.ids.gather(1, lists.places).int()  # (L', k)
        wanted = F.pad(wanted, (0, self.selectable - wanted.shape[1]), value=-1)  # (L', heads * K)
        slots, fetch, self.held = kernels.assign_slots(wanted, self.held, self.backend)
        source = (layer * self.n_kv_heads + fetch // self.capacity * self.n_kv_heads // self.heads) * self.capacity
        source = torch.where(fetch < 0, -1, source + fetch % self.capacity)  # (L', heads * K): blocks of the host
        row = layer * self.slots.shape[1]  # (L', 1): a layer's first slot
        kernels.copy_blocks(
            self.host.flatten(0, 2).flatten(1), self.slots.flatten(0, 1).flatten(1),
            source.flatten().int(), (row + slots).flatten().int(), self.backend,
        )  # fmt: skip
        self.fetched += (fetch >= 0).sum()
        self.selected += lists.places.numel()
        head, block = lists.ids // self.capacity, lists.ids % self.capacity  # (L', A)
        table = self.selectable + head * (self.sink + self.ring) + self.home_of(block)
        table.scatter_(1, lists.places, slots[:, : lists.places.shape[1]].long())
        self.table = (row + table).flatten().int()  # (L' * A,)
        self.columns, self.starts = lists.flat()
        self.block_max = self.slots.new_zeros(self.group, lists.ids.numel(), dtype=torch.float32)  # (G, L' * A)

    def attend(self, layer, q):
        """As KVCache.attend."""
        k, v = self.slots.flatten(0, 1).unbind(1)  # (L' * slots, b, D) each
        block_max = self.block_max if self.keeps_rows or self.backend == "triton" else None
        lists = self.table, self.starts[layer], self.lengths[layer], block_max
        return kernels.sparse_decode(q, k, v, *lists, self.backend)

    def attend_all(self, layer, q):
        """A dense layer's attention."""
        return self.dense.attend_all(layer, q)

    def pool(self, q, n_tokens, stride=1):
        """As KVCache.pool, on the host: the queries go there, the rows come back."""
        self.write_back((self.n_tokens - 1) // self.block_size)
        keys = self.host.flatten(0, 1)[:, :, 0]  # (L' * Hk, capacity, b, D)
        pooled, lse = kernels.pool_history(q.flatten(0, 1).cpu(), keys, n_tokens, stride, "torch")
        return pooled.unflatten(0, q.shape[:2]).to(q.device), lse.unflatten(0, q.shape[:2]).to(q.device)

    write_rows = KVCache.write_rows

    def format_stats(self, n_tokens, steps) -> list[str]:
        """Lines for people about `steps` decoded tokens, n_tokens in all."""
        whole = self.host.numel() // self.capacity * n_tokens // self.block_size * self.host.element_size()
        whole += self.dense.kv.numel() // self.capacity * n_tokens // self.block_size * self.host.element_size()
        fetched, selected = (int(n) * self.block_bytes / steps / 1e6 for n in (self.fetched, self.selected))
        return [
            f"device     {self.device_bytes / 1e6:,.2f} MB of KV slots; the whole cache is {whole / 1e6:,.2f} MB",
            f"link       {fetched:,.3f} MB a token fetched, of {selected:,.3f} MB selected; "
            f"{self.written_bytes / steps / 1e6:,.3f} MB a token written back",
        ]


# --------------------------------------------------------------------------------------------------------------------
# Decoding
# --------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def prefill(model: Llama, decoder: SparseDecoder, tokens: torch.Tensor) -> torch.Tensor:
    """Run the prompt, tokens (T,), and select blocks for the first new tokens. Returns the next logits (vocab,)."""
    decoder.begin_prompt(len(tokens))
    logits = model(tokens, torch.arange(len(tokens), device=tokens.device), decoder.prefill_attention)  # (vocab,)
    decoder.finish_token()
    return logits


@torch.inference_mode()
def decode_one_token(model: Llama, decoder: SparseDecoder, token: torch.Tensor) -> torch.Tensor:
    """Append token (1,), attend sparsely, and select for later tokens when it is time. Returns logits (vocab,)."""
    decoder.begin_token()
    position = torch.full((1,), decoder.n_tokens - 1, device=token.device)
    logits = model(token, position, decoder.decode_attention)  # (vocab,)
    began = time.perf_counter()
    decoder.finish_token()
    decoder.stats.choosing_seconds += time.perf_counter() - began
    return logits


def sample(logits, temperature=0.0, top_p=1.0, generator=None):
    """The next token (1,) from logits (vocab,): greedy at temperature 0, else from the likeliest of total top_p."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    p, token = torch.softmax(logits / temperature, -1).sort(descending=True)  # (vocab,), (vocab,)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)  # the most probable token always stays
    return token[torch.multinomial(p, 1, generator=generator)]


def generate(
    model: Llama, decoder: SparseDecoder, tokens: list[int], max_new_tokens: int, temperature=0.0, top_p=1.0, seed=0
) -> Iterator[int]:
    """Yield up to max_new_tokens tokens that continue `tokens`, ending before an end-of-sequence token."""
    stats, device = decoder.stats, model.device
    generator = torch.Generator(device).manual_seed(seed)
    began = time.perf_counter()
    token = sample(prefill(model, decoder, torch.tensor(tokens, device=device)), temperature, top_p, generator)  # (1,)
    value = token.item()
    stats.prefill_tokens, stats.prefill_seconds = len(tokens), time.perf_counter() - began
    for left in reversed(range(max_new_tokens)):
        if value in model.config.eos_token_ids:
            return
        yield value
        if left:
            began = time.perf_counter()
            token = sample(decode_one_token(model, decoder, token), temperature, top_p, generator)  # (1,)
            value = token.item()
            stats.decode_tokens += 1
            stats.decode_seconds += time.perf_counter() - began


# --------------------------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------------------------


def format_stats(decoder: SparseDecoder) -> str:
    """The counters as a few lines for people."""
    stats, steps = decoder.stats, max(1, decoder.stats.decode_tokens)
    prefill_speed = stats.prefill_tokens / max(stats.prefill_seconds, 1e-9)
    attention, calibration, choosing = (
        getattr(stats, f"{name}_bytes") / steps / 1e6 for name in ("attention", "calibration", "choosing")
    )
    lines = [
        f"prefill    {stats.prefill_tokens:,} tokens, {prefill_speed:,.0f} tokens/s",
        f"KV read    {attention:,.2f} MB a token by attention + {calibration:,.2f} by calibration + "
        f"{choosing:,.2f} to choose",
    ]
    if stats.recovery:
        recovery = torch.stack(stats.recovery).mean().item()
        lines.append(f"recovery   {recovery:.3f} of the true attention, mean of {len(stats.recovery)} calibrated steps")
    if stats.predict_multiply_adds:
        lines.append(
            f"predictor  {stats.predict_multiply_adds / steps / 1e6:,.1f} M multiply-adds a token; calibrating, "
            f"predicting and selecting took {stats.choosing_seconds / stats.decode_seconds:.0%} of the time"
        )
    if isinstance(decoder.cache, OffloadedCache):
        lines += decoder.cache.format_stats(decoder.n_tokens, steps)
    return "\n".join(lines)


def format_summary(decoder: SparseDecoder) -> str:
    """One line: speed, and bytes read against dense decoding."""
    stats, steps = decoder.stats, max(1, decoder.stats.decode_tokens)
    line = (
        f"{decoder.stats.decode_tokens:,} tokens, {stats.decode_tokens / max(stats.decode_seconds, 1e-9):,.1f} tokens/s"
    )
    if stats.decode_tokens:
        read, dense = stats.read_bytes / steps / 1e6, stats.dense_bytes / steps / 1e6
        line += f", KV read {read:,.1f} MB a token, dense {dense:,.1f} MB"
    if not decoder.sparse_layers:
        return line
    if decoder.fits:
        budget = decoder.config.budget
        return f"{line}: all {decoder.n_tokens:,} tokens fit the budget of {budget:,}; a longer text shows the method"
    return f"{line}: {stats.dense_bytes / max(stats.read_bytes, 1):.1f}x less"


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (--help lists the options)")


class ShownDefaults(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def auto_or_int(text):
    return text if text == "auto" else int(text)


def add_method_options(parser):
    """An option for each parameter of Config; unless given, it is not in the namespace."""
    group = parser.add_argument_group("method (README.md explains the parameters)")
    group.add_argument("--paper", action="store_true", help="the paper's setting; other options change it")
    for f in dataclasses.fields(Config):
        paper = "" if f.metadata["paper"] == f.default else f"; paper: {f.metadata['paper']}"
        default = "" if f.default is None else f" (default: {f.default}{paper})"
        kind = str if f.metadata["choices"] else auto_or_int if f.type == int | str else int
        option = "--" + f.name.replace("_", "-")
        group.add_argument(
            option,
            type=kind,
            choices=f.metadata["choices"],
            default=argparse.SUPPRESS,
            help=f.metadata["help"] + default,
        )


def config_of(args) -> Config:
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if hasattr(args, f.name)}
    return Config.paper(**given) if args.paper else Config(**given)


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__.splitlines()[0], formatter_class=ShownDefaults)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="the text to answer")
    source.add_argument("--prompt-file", help="read the text from this file; - for standard input")
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="stop after this many tokens")
    parser.add_argument("--stats", action="store_true", help="end with bytes read, recovery and predictor cost")

    group = parser.add_argument_group("model")
    group.add_argument("--model", help=f"Hugging Face folder or hub id (default: {DEFAULT_LLM}, fetched once)")
    group.add_argument("--predictor", default=DEFAULT_PREDICTOR, help="the convolution: safetensors or state dict")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...; auto takes a GPU if there is one")
    dtypes, backends = ["auto", "float32", "bfloat16", "float16"], ["auto", "torch", "triton"]
    group.add_argument("--dtype", default="auto", choices=dtypes, help="of the weights; auto: bfloat16")
    group.add_argument("--backend", default="auto", choices=backends, help="auto: triton on a GPU, else torch")
    group.add_argument("--offload", action="store_true", help="keep the KV cache in host memory")
    group.add_argument("--dense", action="store_true", help="attend to everything in every layer")

    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, default=0.0, help="0: always the most probable token")
    group.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this total")
    group.add_argument("--seed", type=int, default=0, help="of the sampling")
    add_method_options(parser)
    return parser


def read_prompt(args) -> str:
    if args.prompt_file is None:
        text = args.prompt
    elif args.prompt_file == "-":
        text = sys.stdin.buffer.read()
    else:
        try:
            text = pathlib.Path(args.prompt_file).read_bytes()
        except OSError as error:
            raise InputError(f"prompt file {args.prompt_file} cannot be read: {error.strerror}") from None
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"the prompt is not UTF-8 text (byte {error.start}): convert it first") from None
    if not text.strip():
        raise InputError("the prompt is empty: give it some text")
    return text


def choose_device(args) -> tuple[torch.device, torch.dtype, str]:
    """Device, dtype and backend from the command line's names."""
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name} is not available: try cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # Triton launches on the current device
    dtype = torch.bfloat16 if args.dtype == "auto" else getattr(torch, args.dtype)
    backend = args.backend if args.backend != "auto" else "triton" if device.type == "cuda" else "torch"
    try:
        kernels.use_triton(backend, device)
    except RuntimeError as error:
        raise InputError(str(error)) from None
    return device, dtype, backend


def check_limits(args):
    if args.max_new_tokens < 1:
        raise InputError(f"max-new-tokens {args.max_new_tokens} must be at least 1")
    if not (0 <= args.temperature < float("inf")):
        raise InputError(f"temperature {args.temperature} must be at least 0")
    if not 0 < args.top_p <= 1:
        raise InputError(f"top-p {args.top_p} must be above 0 and at most 1")
    if not 0 <= args.seed < 2**63:
        raise InputError(f"seed {args.seed} must lie in 0 ... 2^63 - 1")


def free_memory(device) -> int | None:
    """Bytes that can still be allocated on a device; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return int(re.search(r"MemAvailable: *(\d+) kB", pathlib.Path("/proc/meminfo").read_text())[1]) * 1024
    except (OSError, TypeError):
        return None


def memory_needed(c: Config, m: LlamaConfig, capacity_tokens, dtype, backend, offload) -> tuple[int, int]:
    """Bytes that decoding allocates on the device and in host memory, beside weights and activations."""
    heads = m.n_kv_heads if c.select_heads == "kv" else m.n_heads
    dense = min(c.dense_layers, m.n_layers)
    block = 2 * c.block_size * m.head_dim * dtype.itemsize  # K and V of one head
    every_block = m.n_kv_heads * c.n_blocks(capacity_tokens) * block  # of one layer
    rows = 2 * heads * c.history_len * c.n_blocks(capacity_tokens) * HISTORY_DTYPE.itemsize  # history, contributions
    kept = m.n_heads * c.history_len * m.head_dim * dtype.itemsize  # queries
    slots = heads * (c.sink_tokens // c.block_size + c.topk_blocks + c.tail_blocks(capacity_tokens)) * block
    sparse = rows + kept + slots * offload
    resident = m.n_layers - (m.n_layers - dense) * offload
    return resident * every_block + (m.n_layers - dense) * sparse, (m.n_layers - resident) * every_block


def check_memory(c: Config, m: LlamaConfig, capacity_tokens, dtype, device, backend, offload):
    """Raise InputError, before anything is computed, where decoding would not fit into memory; say what to do."""
    needs = zip(memory_needed(c, m, capacity_tokens, dtype, backend, offload), (device, torch.device("cpu")))
    for need, place in needs:
        free = free_memory(place)
        if free is not None and need > free:
            where = "host memory" if place.type == "cpu" else f"memory of {place}"
            remedy = "a shorter prompt, fewer --max-new-tokens" + ("" if offload else " or --offload")
            raise InputError(
                f"decoding {capacity_tokens:,} tokens needs {need / 1e9:,.2f} GB of {where}, {free / 1e9:,.2f} GB are "
                f"free: try {remedy}"
            )


def run(args, make_decoder=SparseDecoder) -> SparseDecoder:
    """Answer the prompt on standard output; statistics go to standard error. Returns the decoder."""
    check_limits(args)
    config = config_of(args)
    text = read_prompt(args)
    device, dtype, backend = choose_device(args)
    predictor = load_predictor(args.predictor)
    model, tokenizer = load_model(args.model or str(fetch_default_llm()), dtype, device)
    m = model.config
    if args.dense:
        config = dataclasses.replace(config, dense_layers=m.n_layers)
    if backend == "triton" and not kernels.supports(m.head_dim, config.block_size, model.kv_dtype.itemsize):
        shape = f"head dimension {m.head_dim}, blocks of {config.block_size} tokens"
        print(f"attnpred: there is no kernel for {shape}: using the torch backend", file=sys.stderr)
        backend = "torch"
    if not args.raw:
        text = tokenizer.chat([{"role": "user", "content": text}]) if tokenizer.has_chat_template else text
    tokens = tokenizer.encode(text)
    room = m.context_len - len(tokens)
    if room < 1:
        raise InputError(f"the prompt has {len(tokens):,} tokens, the model's context {m.context_len:,}: shorten it")
    max_new_tokens = min(args.max_new_tokens, room)
    check_memory(config, m, len(tokens) + max_new_tokens, model.kv_dtype, device, backend, args.offload)
    decoder = make_decoder(config, model, predictor, len(tokens) + max_new_tokens, backend, args.offload)
    stream = TextStream(tokenizer)
    try:
        for token in generate(model, decoder, tokens, max_new_tokens, args.temperature, args.top_p, args.seed):
            print(stream.push(token), end="", flush=True)
    finally:
        print(stream.flush(), flush=True)
        if args.stats:
            print(format_stats(decoder), file=sys.stderr)
        print(f"attnpred: {format_summary(decoder)}", file=sys.stderr)
    return decoder


def write_atomically(path, write: Callable[[pathlib.Path], object]):
    """Have `write` fill a temporary file beside `path`, then give it that name: readers see the old file or the new."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def exit_status(program, command) -> int:
    """Call `command`; 2 and one line on standard error for what a user can mend, 130 for Ctrl-C, else 0."""
    try:
        command()
    except (InputError, ModelError, FetchError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # stdout was closed (for example by `head`); avoid a second error at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def main(argv=None) -> int:
    return exit_status("attnpred", lambda: run(make_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
