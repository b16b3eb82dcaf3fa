"""AttentionPredictor: decode a Llama, reading only the KV blocks that a small convolution expects to matter next.

    python attnpred.py --prompt "Why is the sky blue?"

Reading order: `Config` (the parameters), `Predictor` (the network), `SparseDecoder` (the method: prefill, attend,
calibrate, predict, select), `generate`, `KVCache` and `OffloadedCache` (K and V on the device or in host memory), the
command line. The arithmetic is in kernels.py, the language model in model.py.

Source: Yang et al., AttentionPredictor: Temporal Patterns Matter for KV Cache Compression, NeurIPS 2025
(arXiv 2502.04077).
"""

import argparse
import dataclasses
import math
import os
import pathlib
import re
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import kernels
from model import Llama, LlamaConfig, ModelError, TextStream, causal_attention, load_model
from weights.fetch_llm import DEFAULT_LLM, FetchError, fetch_default_llm

DEFAULT_PREDICTOR = pathlib.Path(__file__).parent / "weights" / "predictor.safetensors"
HISTORY_DTYPE = torch.float16  # of the history and of the contributions; predictions are computed in float32
PREFILL_CHUNK = 2048  # tokens of the prompt that run together: a multiple of every block size


# --------------------------------------------------------------------------------------------------------------------
# Parameters and predictor
# --------------------------------------------------------------------------------------------------------------------


def parameter(default, symbol, paper, help, choices=None):
    return field(default=default, metadata=dict(symbol=symbol, paper=paper, help=help, choices=choices))


@dataclass(frozen=True)
class Config:
    """The method's parameters. Raises InputError where they contradict each other."""

    block_size: int = parameter(16, "b", 16, "tokens per block", (8, 16, 32, 64))
    history_len: int = parameter(64, "H", 64, "rows of pooled attention kept")
    sink_tokens: int | None = parameter(None, "S", 64, "first tokens, always attended; default: one block")
    local_tokens: int = parameter(64, "R", 64, "last tokens, always attended")
    budget: int = parameter(
        1024, "B", 1024, "tokens attended per head, in the mean of those that share; sink and local tokens included"
    )
    calibration_interval: int | str = parameter(
        "auto", "M", 5, "every M-th step the true attention row enters the history; auto: 8, doubled while T / M > B"
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
    selection_delay: int | str = parameter(
        0, "", 0, "a selection takes effect this many tokens after its step; auto: M / 8, at least 1 (with --offload)"
    )
    swap_share: float = parameter(
        1.0,
        "",
        1.0,
        "largest share of the blocks that one selection may replace, which bounds the copy (with --offload: 0.15)",
    )

    OFFLOADED = dict(selection_delay="auto", swap_share=0.15)  # what --offload changes

    @classmethod
    def paper(cls, **changes) -> "Config":
        """The paper's setting, with changes."""
        return cls(**({f.name: f.metadata["paper"] for f in dataclasses.fields(cls)} | changes))

    def __post_init__(self):
        if self.sink_tokens is None:
            object.__setattr__(self, "sink_tokens", self.block_size)
        b = self.block_size
        least = dict(sink_tokens=0, local_tokens=b, budget=self.sink_tokens + self.local_tokens, history_len=5)
        least |= dict(dense_layers=0, calibration_interval=1, selection_interval=1)
        for f in dataclasses.fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            require(not choices or value in choices, f"{f.name} = {value!r} is unknown: use one of {choices}")
            if f.name in least and value not in ("auto", None):
                require(value >= least[f.name], f"{f.name} = {value} is too small: use at least {least[f.name]}")
        for name in ("sink_tokens", "local_tokens", "budget"):
            value = getattr(self, name)
            require(value % b == 0, f"{name} = {value} is not a multiple of the block size: try {value // b * b + b}")
        delay, longest = self.selection_delay, self.delay_limit(0)
        require(
            delay == "auto" or 0 <= delay < longest,
            f"selection_delay = {delay} must be auto or 0 ... {longest - 1}, below both intervals and the local window",
        )
        require(0 < self.swap_share <= 1, f"swap_share = {self.swap_share} must be above 0 and at most 1")

    @property
    def topk_blocks(self) -> int:
        """K: blocks selected from the middle, per head."""
        return (self.budget - self.sink_tokens - self.local_tokens) // self.block_size

    def n_blocks(self, n_tokens: int) -> int:
        """N: blocks in a cache of n_tokens, the last one perhaps partial."""
        return kernels.cdiv(n_tokens, self.block_size)

    def selection_heads(self, m: LlamaConfig) -> int:
        """Heads that select for themselves: KV heads, or query heads."""
        return m.n_kv_heads if self.select_heads == "kv" else m.n_heads

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
        """M and P at n_tokens. With "auto", calibration (T / M keys) reads at most half of what attention reads."""
        m = self.calibration_interval
        if m == "auto":
            m = 8
            while n_tokens > self.budget * m:
                m *= 2
        return m, self.selection_interval or m

    def delay_limit(self, n_tokens: int) -> int:
        """A delay must be below this: then a selection ends before the next one begins, and the blocks that it may
        choose were complete when its calibration began."""
        return min(*self.intervals(n_tokens), self.local_tokens)

    def delay(self, n_tokens: int) -> int:
        """How many tokens after its step a selection takes effect, if the text has n_tokens then."""
        if self.selection_delay == "auto":
            return min(max(1, self.intervals(n_tokens)[0] // 8), self.delay_limit(n_tokens) - 1)
        return self.selection_delay

    def new_blocks(self, n_tokens: int) -> int:
        """Blocks that begin, at most, between a selection for a text of n_tokens and the next one."""
        later = n_tokens + 2 * self.intervals(n_tokens)[1]  # M may double until then
        return self.n_blocks(self.intervals(later)[1] + self.delay(later))

    def tail_blocks(self, n_tokens: int) -> int:
        """The local window, partial block included, and the blocks that begin before the next selection."""
        return self.local_tokens // self.block_size + 1 + self.new_blocks(n_tokens)

    def exchanged(self, n_selected: int) -> int:
        """How many of the selected blocks one selection may exchange."""
        return math.ceil(self.swap_share * n_selected)

    def row_distance(self, n_tokens: int) -> int:
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
    require(path.is_file(), f"predictor {path} does not exist: give a .safetensors file or a pickled state dict")
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
    finite = all(tensor.isfinite().all() for tensor in predictor.state_dict().values())
    require(finite, f"predictor {path} holds NaN or infinity; train or fetch it again")
    return predictor.requires_grad_(False)


# --------------------------------------------------------------------------------------------------------------------
# The method
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class BlockLists:
    """What each selection head of each sparse layer attends to: its blocks in the order sink, selected, tail.

    The lists of a layer are stored one after another, A blocks in all. The tail is the local window and room for the
    tokens until the next selection. A list's length counts the tokens written so far: every block within it is full but
    the last one, which holds the current token.
    """

    ids: torch.Tensor  # (L', A) int64: head * capacity + block
    starts: torch.Tensor  # (L', heads) int64: where each head's list starts in ids
    lengths: torch.Tensor  # (L', heads) int32: tokens attended; one more with each token
    entries: torch.Tensor  # (L', k) int64: where the selected blocks are in ids
    table: torch.Tensor  # (L' * A,) int32: the blocks' numbers in the cache's pool, for kernels; cache.select fills it
    table_starts: torch.Tensor  # (L', heads) int32: where each list starts in the table
    capacity: int

    @classmethod
    def build(cls, selected, heads, capacity, n_tokens, sink, end, tail, block_size):
        """Make the lists of all sparse layers from the selected blocks (L', k) int64: ids, ascending in each layer.

        Every list begins with `sink` blocks and ends with `tail` blocks from block `end` on. Example: of 2 heads, the
        first selects blocks 3 and 5, the second none; sink 1, tail 2, end 8 give the lists 0 3 5 8 9 and 0 8 9.
        """
        device, (layers, k) = selected.device, selected.shape
        head = selected // capacity  # (L', k)
        count = F.one_hot(head, heads).sum(1)  # (L', heads): a head has 0 ... k of them
        size = sink + count + tail  # (L', heads)
        starts = size.cumsum(1) - size  # (L', heads)
        rank = torch.arange(k, device=device) - (count.cumsum(1) - count).gather(1, head)  # (L', k) in the head's own
        entries = starts.gather(1, head) + sink + rank  # (L', k)
        block_0 = torch.arange(heads, device=device)[:, None] * capacity  # (heads, 1): its id
        block = torch.arange(max(sink, tail), device=device)
        sink_ids = (block_0 + block[:sink]).flatten().expand(layers, -1)  # (L', heads * sink)
        tail_ids = (block_0 + (end + block[:tail]).clamp(max=capacity - 1)).flatten().expand(layers, -1)
        ids = selected.new_empty(layers, heads * (sink + tail) + k)  # (L', A)
        ids.scatter_(1, entries, selected)
        ids.scatter_(1, (starts[..., None] + block[:sink]).flatten(1), sink_ids)
        ids.scatter_(1, ((starts + sink + count)[..., None] + block[:tail]).flatten(1), tail_ids)
        lengths = ((sink + count) * block_size + n_tokens - end * block_size).int()
        table = torch.empty(ids.numel(), dtype=torch.int32, device=device)
        table_starts = (starts + torch.arange(layers, device=device)[:, None] * ids.shape[1]).int()
        return cls(ids, starts, lengths, entries, table, table_starts, capacity)

    def tensors(self):
        return [value for value in vars(self).values() if isinstance(value, torch.Tensor)]

    def shapes(self):
        return [tensor.shape for tensor in self.tensors()]

    def copy_(self, other):
        """Take over other lists of the same shapes, in place, so that a captured CUDA graph reads them."""
        for mine, theirs in zip(self.tensors(), other.tensors()):
            mine.copy_(theirs)


@dataclass
class Stats:
    """What decoding cost and how well it went: bytes, wall-clock seconds, and recovery."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    attention_bytes: int = 0  # K and V read by attention, over all decoded tokens
    calibration_bytes: int = 0  # K read by calibration
    choosing_bytes: int = 0  # history and contributions read by prediction
    dense_bytes: int = 0  # K and V that dense attention would have read
    overhead_seconds: float = 0.0  # calibration, prediction and selection; on a GPU the host does not wait for them
    recovery: list = field(default_factory=list)  # (L', Hq) tensors: share of true attention, on calibrated steps

    @property
    def read_bytes(self) -> int:
        """Everything that decoding read instead of the dense cache."""
        return self.attention_bytes + self.calibration_bytes + self.choosing_bytes


class SparseDecoder:
    """One sequence being decoded: cache, attention history, prediction and selection, for all layers.

        prefill                        decode_one_token
          begin_prompt                   begin_token        count the token, take over newly selected lists
          prefill_attention, by layer    forward            run the model, or replay its CUDA graph:
          finish_token                     run_layers         the lists grow by a token; then, layer by layer,
                                             decode_attention   write K and V, attend to the listed blocks
                                         finish_token       calibrate, predict and select, where it is due

    Layers from `dense_layers` on are sparse and have a history; the tensors of these L' layers are indexed by layer -
    dense_layers. On a GPU, the model's device must be the current one, because Triton launches there.
    """

    def __init__(
        self,
        config: Config,
        model: Llama,
        predictor: Predictor,
        capacity_tokens: int,
        backend="torch",
        offload=False,
        graph=True,
    ):
        c, m, device, dtype = config, model.config, model.device, model.kv_dtype
        self.config, self.model_config, self.backend = c, m, backend
        self.dense_layers = min(c.dense_layers, m.n_layers)
        self.sparse_layers = m.n_layers - self.dense_layers  # L'
        self.heads = c.selection_heads(m)
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
        self.n_queries, self.query_tokens = 0, 0  # how many there have been; n_tokens at the newest one
        self.lse = [None] * self.sparse_layers  # (Hq,) each: of this step's sparse attention
        self.sparse_lse = torch.zeros(self.sparse_layers, m.n_heads, device=device)  # the same of the calibrated step
        self.selecting = False  # from the token on with which the text exceeds the budget: blocks are selected
        self.attended_tokens = 0  # that a sparse layer attends to in this step, summed over its heads
        self.lists = self.next_lists = None  # BlockLists of this token, and those that the next token takes over
        self.selected = None  # (L', k) int64: ids of the selected blocks, once the text exceeds the budget
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # of the newest token
        self.n_tokens, self.n_prefilled = 0, 0  # of the text; of the prompt, those that have run
        self.step = 0  # decode steps since prefill
        self.calibration = None  # the calibration under way: a function that waits for its rows
        self.calibration_due = self.selection_due = -1  # the steps after which they end
        self.side_stream = torch.cuda.Stream(device) if backend == "triton" and uses_streams(device) else None
        self.token_started = self.side_done = None  # events: this token begins; the side stream's work ends
        self.graph = self.graph_token = self.graph_logits = None  # a captured step, its input and its output
        self.uses_graph = graph and self.side_stream is not None
        self.stats = Stats()

    # Prefill

    def begin_prompt(self, n_tokens):
        self.n_tokens = n_tokens
        self.position.fill_(n_tokens - 1)
        distance = self.config.row_distance(n_tokens)
        self.count_query(min(self.config.history_len, kernels.cdiv(n_tokens, distance)))

    def prefill_attention(self, layer, q, k, v):
        """Dense causal attention of the prompt's next T tokens, to all tokens so far: one layer, one chunk.

        q (Hq, T, D), k and v (Hk, T, D) -> (Hq, T, D)
        """
        return causal_attention(layer, q, *self.take_prompt(layer, q, k, v))

    def take_prompt(self, layer, q, k, v):
        """Write K and V to the cache; returns those of all tokens up to the end of this chunk: (Hk, first + T, D) each.

        The queries of the rows that the history may need are kept; `begin_history` pools them once the text exceeds the
        budget.
        """
        first, distance = self.n_prefilled, self.config.row_distance(self.n_tokens)
        k, v = self.cache.write_prompt(layer, k, v, first)  # (Hk, first + T, D) each
        if layer >= self.dense_layers:
            oldest = self.n_tokens - 1 - (self.n_queries - 1) * distance  # position of row 0
            row = max(0, kernels.cdiv(first - oldest, distance))  # the first row whose query is in this chunk
            kept = q[:, oldest + row * distance - first :: distance]  # (Hq, rows in this chunk, D)
            self.queries[layer - self.dense_layers, :, row : row + kept.shape[1]] = kept
        return k, v

    # One token

    def begin_token(self):
        """Count a token, and take over the lists that were selected while earlier tokens ran."""
        self.n_tokens += 1
        self.step += 1
        if self.step % self.config.row_distance(self.n_tokens) == 0:
            self.count_query(1)
        self.join()
        if self.next_lists is not None:
            if self.lists is not None and self.lists.shapes() == self.next_lists.shapes():
                self.lists.copy_(self.next_lists)
            else:
                self.lists, self.graph = self.next_lists, None
            self.next_lists = None
        if self.side_stream:
            self.token_started = torch.cuda.current_stream().record_event()
        self.cache.begin_token(self.n_tokens, self.lists)

    def forward(self, model, token):
        """Run the model on token (1,) -> logits (V,), which the next step may overwrite.

        A step is captured once and then replayed; one that keeps its query is not, because the ring slot which it
        writes is a number of the host.
        """
        if not self.uses_graph or self.keeps_query:
            return self.run_layers(model, token)
        if self.graph is None:  # run this step, which compiles the kernels; capture it for the next ones
            self.graph, self.graph_token = torch.cuda.CUDAGraph(), token.clone()
            capture = torch.cuda.graph(self.graph, capture_error_mode="thread_local")  # a thread may pool beside it
            stream = capture.capture_stream
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # AMD's library makes a handle for each stream, which a capture forbids
                logits = self.run_layers(model, token)
            with capture:  # waits for the whole device first
                self.graph_logits = self.run_layers(model, self.graph_token)
            return logits
        self.graph_token.copy_(token)
        self.graph.replay()
        return self.graph_logits

    def run_layers(self, model, token):
        self.advance()
        return model(token, self.position, self.decode_attention)

    def advance(self):
        """What begins a token on the device, and so is part of a CUDA graph."""
        self.position += 1
        if self.lists is not None:
            self.lists.lengths += 1
        self.cache.advance(self.position)

    def decode_attention(self, layer, q, k, v):
        """Attention of one token over its selected blocks: q (Hq, 1, D), k and v (Hk, 1, D) -> (Hq, 1, D)."""
        self.cache.write_token(layer, k, v)
        if layer < self.dense_layers or self.lists is None:
            out = self.cache.attend_all(layer, q[:, 0])  # (Hq, D)
        else:
            out, self.lse[layer - self.dense_layers] = self.cache.attend(layer - self.dense_layers, q[:, 0])
        if layer >= self.dense_layers and self.keeps_query:
            self.queries[layer - self.dense_layers, :, (self.n_queries - 1) % self.config.history_len] = q[:, 0]
        return out[:, None]

    def finish_token(self):
        """After a step, or after the prompt (step 0): count reads, begin a calibration, finish what is due.

        A calibration begins now. `delay` tokens later its row enters the history, and the next blocks are selected. The
        token after that is the first one to use them.
        """
        calibration_interval, selection_interval = self.config.intervals(self.n_tokens)
        delay = self.config.delay(self.n_tokens) if self.step else 0
        calibrates = self.step and self.selecting and self.step % calibration_interval == 0
        selects = self.sparse_layers and self.step % selection_interval == 0
        if self.step:
            self.count_reads()
        if calibrates:
            self.cache.write_back(self.n_tokens)
            self.begin_calibration()
            self.calibration_due = self.step + delay
        elif self.step and self.selecting and self.config.history_rows == "every":
            self.push_row()
            self.cache.write_rows(torch.cat(self.lse), self.history.flatten(0, 1)[:, self.newest])
        if selects:
            self.selection_due = self.step + delay
        if self.step in (self.calibration_due, self.selection_due):
            with self.on_side_stream(delay):
                if self.step == self.calibration_due:
                    self.end_calibration()
                if self.step == self.selection_due:
                    self.select_next()

    # After a token: calibrate, predict, select

    def begin_calibration(self):
        """Pool the true attention row of this step: on the device at once, of an offloaded cache on the host."""
        newest = (self.n_queries - 1) % self.config.history_len
        torch.stack(self.lse, out=self.sparse_lse)
        self.calibration = self.cache.begin_pooling(self.queries[:, :, newest : newest + 1], self.n_tokens)
        m = self.model_config
        keys = self.sparse_layers * m.n_kv_heads * self.n_tokens
        self.stats.calibration_bytes += keys * m.head_dim * self.queries.element_size()

    def end_calibration(self):
        """The true row enters the history."""
        rows, true_lse = self.calibration()  # (L', heads, 1, N), (L', Hq, 1)
        self.push_row()
        self.store_rows(rows)
        # the attended keys' share of the sum of all exponentials
        self.stats.recovery.append(torch.exp(self.sparse_lse - true_lse[..., 0]))  # (L', Hq)

    def select_next(self):
        """Predict and select the blocks that the tokens up to the next selection attend to."""
        c, n_tokens = self.config, self.n_tokens + 1  # the next token is the first one that the lists serve
        start, end = c.middle(n_tokens)
        end, scores = max(start, end), None
        if c.fits(n_tokens) and self.cache.holds_everything:
            return
        if not c.fits(n_tokens):
            if not self.selecting:
                self.begin_history()
            if c.topk_blocks:
                scores = self.scores(start, end)
            self.predicted_end, self.new_rows = end, 0
        self.cache.write_back(min(self.n_tokens, end * c.block_size))  # the sink may end after the text
        self.next_lists = self.make_lists(scores, start, end)
        self.cache.select(self.next_lists)

    def begin_history(self):
        """From now on the text exceeds the budget: pool the rows of the queries kept so far."""
        self.selecting = True
        rows = min(self.n_queries, self.config.history_len)
        order = (self.n_queries - rows + torch.arange(rows, device=self.queries.device)) % self.config.history_len
        distance = self.config.row_distance(self.n_tokens)
        self.cache.write_back(self.query_tokens)
        self.store_rows(self.cache.pool(self.queries[:, :, order], self.query_tokens, distance)[0])

    def scores(self, start, end):
        """Predicted scores of the middle blocks [start, end): (L', heads, end - start) float32."""
        history = self.history.flatten(0, 1)  # (L' * heads, H, capacity)
        contributions = self.contributions.flatten(0, 1)  # (L' * heads, H, capacity)
        valid_end = max(start, self.predicted_end)
        if self.step:  # the first prediction belongs to prefill
            rows = history.shape[1] + 4  # H - 4 - new rows of contributions, new rows + 8 of history
            self.stats.choosing_bytes += len(history) * rows * (end - start) * history.element_size()
        scores = kernels.predict(
            history, contributions, self.newest, self.new_rows, start, end, valid_end, self.weights, self.backend
        )  # (L' * heads, n)
        return scores.unflatten(0, (-1, self.heads))

    def choose(self, scores, start):
        """The blocks with the best scores: ids (layers, heads * K) int64.

        scores (layers, heads, n) of the blocks from `start` on
        """
        c, (layers, heads, n) = self.config, scores.shape
        shared = c.share_budget == "layer"
        rows = scores.flatten(1) if shared else scores.flatten(0, 1)  # (rows, n'): a row's blocks share a budget
        k = c.topk_blocks * (heads if shared else 1)
        best = kernels.select_blocks(rows, k, self.backend).long()  # (rows, k) in n'
        if self.selected is not None and c.swap_share < 1:
            current = self.selected // self.capacity * n + self.selected % self.capacity - start  # (layers, heads * K)
            current = (current if shared else current % n).view(best.shape)  # (rows, k) in n'
            best = limit_exchange(rows, best, current, c.exchanged(k), self.backend)
        if not shared:
            best = best.view(layers, heads, k) + torch.arange(heads, device=best.device)[:, None] * n
        best = best.flatten(1)  # (layers, heads * K) in heads * n
        return best // n * self.capacity + best % n + start

    def make_lists(self, scores, start, end) -> BlockLists:
        """Lists with the best blocks by their scores (layers, heads, end - start), for the tokens from the next one on.

        Without scores (None), all of the middle is attended while the text fits the budget, or else nothing of it.
        """
        c, device = self.config, self.history.device
        if scores is None:
            block = torch.arange(start, start if self.selecting else end, device=device)
            head = torch.arange(self.heads, device=device)[:, None]
            selected = (head * self.capacity + block).flatten().expand(self.sparse_layers, -1)  # (L', heads * blocks)
        else:
            selected = self.choose(scores, start)
        self.selected = None if scores is None else selected
        sink = min(start, c.n_blocks(self.n_tokens + 1))
        end = end if end > start else sink  # without a middle, the tail follows the sink
        left_out = self.heads * (end - sink) - selected.shape[1]  # blocks of a layer's middle
        self.attended_tokens = self.heads * self.n_tokens - left_out * c.block_size
        tail = c.tail_blocks(self.n_tokens)
        return BlockLists.build(selected, self.heads, self.capacity, self.n_tokens, sink, end, tail, c.block_size)

    # The history, and what is attended and counted

    @property
    def keeps_query(self) -> bool:
        """Whether a row of the history may be pooled with the query of this step."""
        return self.query_tokens == self.n_tokens

    def count_query(self, rows):
        self.n_queries, self.query_tokens = self.n_queries + rows, self.n_tokens

    def push_row(self):
        """The next row takes the oldest one's slot in the ring."""
        self.newest = (self.newest + 1) % self.config.history_len
        self.new_rows += 1

    def store_rows(self, rows):
        """Make rows (L', heads, rows, N) the last ones of the history."""
        count, n_blocks = rows.shape[2:]
        slots = kernels.window_slots(self.newest, self.config.history_len, rows.device)[-count:]  # (count,)
        self.history[:, :, slots, :n_blocks] = rows.to(self.history.dtype)

    def window(self):
        """The history, oldest row first: (L', heads, H, capacity) float32."""
        slots = kernels.window_slots(self.newest, self.config.history_len, self.history.device)  # (H,)
        return self.history[:, :, slots].float()

    def attended(self, layer, n_blocks):
        """Which blocks (heads, n_blocks) bool a sparse layer attends to: in this step or, after it, in the next."""
        lists = self.next_lists or self.lists
        if lists is None:
            return torch.ones(self.heads, n_blocks, dtype=torch.bool, device=self.history.device)
        ids, starts, lengths = (x[layer] for x in (lists.ids, lists.starts, lists.lengths))
        entry = torch.arange(len(ids), device=ids.device)  # (A,)
        ends = starts + kernels.cdiv(lengths, self.config.block_size)  # (heads,)
        listed = (entry >= starts[:, None]) & (entry < ends[:, None])  # (heads, A)
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

    # On a GPU: calibration and selection run on a stream of their own, while tokens run

    @contextmanager
    def on_side_stream(self, delay):
        """Run the body on the side stream, while the current token runs.

        It waits for the start of that token, or for its end if it needs the token's query, keys or row.
        """
        if not self.side_stream:
            yield
            return
        needs_end = not delay or not self.selecting or self.config.history_rows == "every"
        if needs_end:
            self.token_started = torch.cuda.current_stream().record_event()
        self.side_stream.wait_event(self.token_started)
        with torch.cuda.stream(self.side_stream):
            yield
            self.side_done = self.side_stream.record_event()

    def join(self):
        """Have the current stream wait for what the side stream has been given."""
        if self.side_done:
            torch.cuda.current_stream().wait_event(self.side_done)
            self.side_done = None

    def warm_up(self):
        """On a GPU: compile now what calibration and selection would else compile in the middle of an answer."""
        start = self.config.sink_tokens // self.config.block_size
        if self.side_stream is None or self.capacity - start <= self.config.topk_blocks:
            return
        if self.cache.holds_everything:
            self.cache.pool(self.queries[:, :, :1], 1)
        if not self.selecting and self.config.topk_blocks:  # else the prompt's own selection has compiled them
            self.make_lists(self.scores(start, self.capacity), start, self.capacity)
            self.selected = None

    def __del__(self):
        """The next tensors may be given a dropped decoder's memory: wait until the side stream is done with it."""
        if getattr(self, "side_done", None) and not sys.is_finalizing():
            self.join()


def limit_exchange(scores, best, current, limit, backend):
    """The k best blocks of each row, of which at most `limit` are new: (rows, k) int64.

    scores (rows, n); best and current (rows, k) int64: the highest scores, and the blocks that are selected now
    """
    lowest = torch.finfo(scores.dtype).min  # of any score: below, -inf means that a block may not be selected
    scores = scores.nan_to_num(nan=lowest, neginf=lowest)
    is_current, is_new = (torch.zeros_like(scores, dtype=torch.bool).scatter_(1, x, True) for x in (current, best))
    is_new &= ~is_current
    admitted = kernels.select_blocks(scores.masked_fill(~is_new, -torch.inf), limit, backend).long()  # (rows, limit)
    is_new &= torch.zeros_like(is_new).scatter_(1, admitted, True)
    allowed = scores.masked_fill(~(is_current | is_new), -torch.inf)
    return kernels.select_blocks(allowed, best.shape[1], backend).long()


# --------------------------------------------------------------------------------------------------------------------
# Decoding
# --------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def prefill(model: Llama, decoder: SparseDecoder, tokens: torch.Tensor) -> torch.Tensor:
    """Run the prompt, tokens (T,), and select blocks for the first new tokens. Returns the next logits (vocab,).

    The prompt runs in chunks, so that the memory for activations does not grow with it. On a terminal, standard error
    shows the progress through a prompt of several chunks.
    """
    decoder.begin_prompt(len(tokens))
    chunks, form = tokens.split(PREFILL_CHUNK), "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"
    hide = True if len(chunks) == 1 else None  # None: unless standard error is a terminal
    for chunk in tqdm(chunks, "Reading the prompt", disable=hide, leave=False, bar_format=form):
        positions = decoder.n_prefilled + torch.arange(len(chunk), device=tokens.device)  # (chunk,)
        hidden = model.hidden(chunk, positions, decoder.prefill_attention)  # (chunk, C)
        decoder.n_prefilled += len(chunk)
    decoder.finish_token()
    decoder.warm_up()
    return model.logits(hidden[-1:])[0]


@torch.inference_mode()
def decode_one_token(model: Llama, decoder: SparseDecoder, token: torch.Tensor) -> torch.Tensor:
    """Append token (1,), attend sparsely, and select for later tokens when it is time. Returns logits (vocab,)."""
    decoder.begin_token()
    logits = decoder.forward(model, token)  # (vocab,)
    began = time.perf_counter()
    decoder.finish_token()
    decoder.stats.overhead_seconds += time.perf_counter() - began
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
    token.item()  # waits for a GPU
    stats.prefill_tokens, stats.prefill_seconds = len(tokens), time.perf_counter() - began

    for left in reversed(range(max_new_tokens)):
        began, wait_for = time.perf_counter(), read_later(token)
        if left:  # on a GPU the next step is launched before the host knows the token that it follows
            stats.decode_tokens += 1
            token = sample(decode_one_token(model, decoder, token), temperature, top_p, generator)  # (1,)
        value = wait_for()
        stats.decode_seconds += time.perf_counter() - began
        if value in model.config.eos_token_ids:
            return
        yield value


def read_later(token) -> Callable[[], int]:
    """Begin to copy a token (1,) to the host; returns a function that waits for its value."""
    if not uses_streams(token.device):
        return token.item
    value = torch.empty(1, dtype=token.dtype, pin_memory=token.is_cuda).copy_(token, non_blocking=True)
    copied = torch.cuda.current_stream().record_event()

    def wait():
        copied.synchronize()
        return value.item()

    return wait


# --------------------------------------------------------------------------------------------------------------------
# The KV cache: on the device, or in host memory
# --------------------------------------------------------------------------------------------------------------------


def uses_streams(device) -> bool:
    """Whether work on this device runs asynchronously, on streams."""
    return device.type == "cuda"


def group_rms(pooled, heads):
    """(L', Hq, ...) -> (L', heads, ...): with "kv" selection a group's queries share one row, their root mean square.

    A query's error grows with the probability that it misses, and KL with the square of the error.
    """
    return pooled.unflatten(1, (heads, -1)).square().mean(2).sqrt()


def pool_rows(q, keys, heads, n_tokens, row_distance, backend):
    """Pool rows of all sparse layers, as the history has them.

    q (L', Hq, rows, D), keys (L' * Hk, capacity, b, D) -> (L', heads, rows, N), and log-sum-exps (L', Hq, rows)
    """
    pooled, lse = kernels.pool_history(q.flatten(0, 1), keys, n_tokens, row_distance, backend)  # (L' * Hq, rows, N)
    return group_rms(pooled.unflatten(0, q.shape[:2]), heads), lse.unflatten(0, q.shape[:2])


def write_at(memory, position, values):
    """Store values (..., n, D) at the positions (n,) int64 of memory (..., capacity, D), known on the device only."""
    memory.index_copy_(-2, position, values)


def host_memory(shape, dtype, device, owner) -> torch.Tensor:
    """Zeros in host memory, which a GPU may read and write as long as `owner` exists. PyTorch would round pinned memory
    up to a power of two."""
    memory = torch.zeros(shape, dtype=dtype)
    if device.type == "cuda" and memory.numel():
        cuda = torch.cuda.cudart()
        error = int(cuda.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
        require(not error, f"{memory.nbytes / 1e9:,.2f} GB of host memory cannot be pinned")
        weakref.finalize(owner, lambda: (torch.cuda.synchronize(device), cuda.cudaHostUnregister(memory.data_ptr())))
    return memory


class KVCache:
    """K and V of all layers, or of the first n_layers, on the device, in blocks. The capacity is fixed."""

    holds_everything = True  # so attend_all serves while the text fits the budget

    def __init__(self, c: Config, m: LlamaConfig, heads, capacity_tokens, dtype, device, backend, n_layers=None):
        self.block_size, self.heads, self.backend = c.block_size, heads, backend
        self.n_kv_heads, self.group = m.n_kv_heads, m.n_heads // heads
        self.capacity = c.n_blocks(capacity_tokens)
        n_layers = m.n_layers if n_layers is None else n_layers
        shape = (2, n_layers, m.n_kv_heads, self.capacity, c.block_size, m.head_dim)
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self.k, self.v = self.kv  # (L, Hk, capacity, b, D) each
        self.blocks = self.kv.flatten(1, 3)  # (2, L * Hk * capacity, b, D): the pool of lists.table
        self.dense_layers = min(c.dense_layers, m.n_layers)
        self.lists = self.block_max = None
        self.needs_max = backend == "triton" or c.history_rows == "every"  # each block's largest logit
        self.pads = self.kv.is_cpu and not self.needs_max  # so kernels.attend_padded serves
        self.padded = []  # a sparse layer's pool blocks (heads, n) each
        if backend == "triton":  # a dense layer's lists: every block of each head
            self.dense_table = torch.arange(m.n_kv_heads * self.capacity, dtype=torch.int32, device=device)
            self.dense_starts = self.dense_table[:: self.capacity].contiguous()  # (Hk,)
            self.dense_lengths = torch.zeros_like(self.dense_starts)  # (Hk,)
            self.dense_max = self.kv.new_empty(m.n_heads // m.n_kv_heads, len(self.dense_table), dtype=torch.float32)

    @property
    def device_bytes(self) -> int:
        """K and V that the device has room for."""
        return self.kv.nbytes

    def write_prompt(self, layer, k, v, first=0):
        """Store k, v (Hk, T, D) of the tokens from `first` on. Returns K and V up to there: (Hk, first + T, D) each."""
        self.n_tokens = first + k.shape[1]
        tokens = self.kv[:, layer].flatten(2, 3)[:, :, : self.n_tokens]  # (2, Hk, first + T, D)
        tokens[0, :, first:], tokens[1, :, first:] = k, v
        if self.backend == "triton":
            self.dense_lengths.fill_(self.n_tokens)
        return tokens

    def begin_token(self, n_tokens, lists):
        """The next writes and reads belong to token n_tokens - 1, which attends to these lists."""
        self.n_tokens = n_tokens
        if lists is not self.lists:
            self.lists = lists
            if self.needs_max:
                self.block_max = self.kv.new_zeros(self.group, lists.ids.numel(), dtype=torch.float32)  # (G, L' * A)

    def advance(self, position):
        """The token is at position (1,) int64; all lists have grown by it."""
        self.position = position
        if self.backend == "triton" and (self.dense_layers or self.lists is None):
            self.dense_lengths.add_(1)
        elif self.pads and self.lists is not None:  # one operation for all layers
            lengths = self.lists.lengths  # (L', heads)
            self.longest = kernels.cdiv(lengths, self.block_size).amax(1).tolist()  # of a layer's lists, in blocks
            self.mask = kernels.length_mask(lengths, max(self.longest) * self.block_size)  # (L', heads, tokens)

    def write_token(self, layer, k, v):
        """Store k, v (Hk, 1, D) of the current token."""
        write_at(self.kv[:, layer].flatten(2, 3), self.position, torch.stack((k, v)))

    def write_back(self, n_tokens):
        """There is nothing to do: K and V have one copy."""

    def select(self, lists, first_layer=0):
        """Note where the blocks of these lists are, which belong to the sparse layers from first_layer on."""
        ids = lists.ids  # (layers, A)
        layers = slice(first_layer, first_layer + len(ids))
        layer = torch.arange(layers.start, layers.stop, device=ids.device)[:, None] + self.dense_layers  # (layers, 1)
        kv_head = ids // self.capacity * self.n_kv_heads // self.heads  # (layers, A)
        lists.table.copy_(((layer * self.n_kv_heads + kv_head) * self.capacity + ids % self.capacity).flatten())
        self.pad(lists, layers)

    def pad(self, lists, layers):
        """On a CPU: note the pool blocks of these sparse layers as rectangles."""
        if self.pads:
            end = torch.full_like(lists.starts[:, :1], lists.ids.shape[1])  # (layers, 1)
            sizes = lists.starts.diff(append=end).tolist()  # blocks, with room for the tokens up to the next selection
            rows = zip(lists.table.view(lists.ids.shape), sizes)
            self.padded[layers] = [kernels.pad_lists(row.split(size)) for row, size in rows]

    def attend(self, layer, q):
        """Attention of q (Hq, D) over the lists of a sparse layer -> out (Hq, D), log-sum-exp (Hq,)."""
        if self.pads:
            n = self.longest[layer]  # blocks
            pool_block, mask = self.padded[layer][:, :n], self.mask[layer, :, : n * self.block_size]
            return kernels.attend_padded(q, *self.blocks, pool_block, mask)  # of (heads, n), (heads, n * b)
        lists = self.lists.table, self.lists.table_starts[layer], self.lists.lengths[layer]
        return kernels.sparse_decode(q, *self.blocks, *lists, self.block_max, self.backend)

    def attend_all(self, layer, q):
        """Dense attention of q (Hq, D) -> (Hq, D)."""
        if self.backend == "triton":
            pool = self.kv[:, layer].flatten(1, 2)  # (2, Hk * capacity, b, D)
            lists = self.dense_table, self.dense_starts, self.dense_lengths, self.dense_max
            return kernels.sparse_decode(q, *pool, *lists, self.backend)[0]
        k, v = self.kv[:, layer].flatten(2, 3)[:, None, :, : self.n_tokens]  # (1, Hk, T, D) each
        return F.scaled_dot_product_attention(q.unflatten(0, (self.n_kv_heads, -1))[None], k, v)[0].flatten(0, 1)

    def pool(self, q, n_tokens, row_distance=1):
        """See pool_rows."""
        return pool_rows(
            q, self.kv[0, self.dense_layers :].flatten(0, 1), self.heads, n_tokens, row_distance, self.backend
        )

    def begin_pooling(self, q, n_tokens):
        """Pool one row per layer; returns a function that gives it."""
        pooled = self.pool(q, n_tokens)
        return lambda: pooled

    def write_rows(self, lse, rows):
        """The rows (L' * heads, capacity) that this step's attention leaves, from its lse (L' * Hq,)."""
        block, starts = self.lists.ids.flatten() % self.capacity, self.lists.table_starts.flatten()
        kernels.write_rows(self.block_max, lse, block, starts, self.lists.lengths.flatten(), rows, self.block_size)


class OffloadedCache(KVCache):
    """A KVCache whose sparse layers have their K and V in host memory, a block's K and V side by side.

    The device has slots: for each sparse layer those of the selected blocks and spare ones, and for each head those of
    the sink and of the tail, which are fixed. A new selection copies only the blocks that no slot holds yet, into spare
    slots, while tokens still attend to the selection before it. A calibration runs where the keys are: a thread pools
    them in host memory. Before a calibration and before a selection the tail's new blocks are written to the host.
    """

    holds_everything = False

    def __init__(self, c: Config, m: LlamaConfig, heads, capacity_tokens, dtype, device, backend):
        dense_layers = min(c.dense_layers, m.n_layers)
        super().__init__(c, m, heads, capacity_tokens, dtype, device, backend, n_layers=dense_layers)
        self.device = self.kv.device
        self.sink, self.ring = c.sink_tokens // c.block_size, c.tail_blocks(capacity_tokens)
        rows, k = (1, heads * c.topk_blocks) if c.share_budget == "layer" else (heads, c.topk_blocks)
        spare = max(rows * c.exchanged(k), heads * c.new_blocks(capacity_tokens))  # a selection's new blocks, at most
        self.selectable = heads * c.topk_blocks + spare  # slots of a layer for selected blocks
        n_layers, block = m.n_layers - dense_layers, (2, c.block_size, m.head_dim)
        host = n_layers, m.n_kv_heads, self.capacity, *block
        self.host = host_memory(host, dtype, self.device, self)  # (L', Hk, capacity, 2, b, D)
        n_slots = self.selectable + heads * (self.sink + self.ring)
        self.slots = torch.zeros(n_layers, n_slots, *block, dtype=dtype, device=device)  # (L', slots, 2, b, D)
        self.blocks = self.slots.flatten(0, 1).unbind(1)  # (L' * slots, b, D): K's, V's
        self.fixed = self.slots[:, self.selectable :].unflatten(1, (heads, -1))  # (L', heads, sink + ring, 2, b, D)
        self.fixed_cells = self.fixed.unflatten(1, (m.n_kv_heads, -1)).flatten(3, 5)  # (L', Hk, heads / Hk, cells, D)
        self.held = torch.full((n_layers, self.selectable), -1, dtype=torch.int32, device=device)  # ids in the slots
        self.written = 0  # tokens that the host has
        self.worker = None
        if uses_streams(self.device):
            self.worker = ThreadPoolExecutor(1, "pooling")
            self.host_q = host_memory((n_layers, m.n_heads, 1, m.head_dim), dtype, self.device, self)
            row = n_layers, heads, 1, self.capacity
            self.host_rows = host_memory(row, torch.float32, self.device, self)
            self.host_lse = host_memory((n_layers, m.n_heads, 1), torch.float32, self.device, self)
        self.fetched = torch.zeros((), dtype=torch.int64, device=device)  # blocks copied into slots, of all heads
        self.selected = 0  # blocks selected, of all heads
        self.written_bytes = 0  # to the host

    @property
    def block_bytes(self) -> int:
        """K and V of one head's block."""
        return self.slots[0, 0].nbytes

    @property
    def device_bytes(self) -> int:
        return self.kv.nbytes + self.slots.nbytes

    def fixed_slot(self, block):
        """Where blocks of the sink or the tail are among a head's fixed slots."""
        return torch.where(block < self.sink, block, self.sink + block % self.ring)

    def write_prompt(self, layer, k, v, first=0):
        """As KVCache.write_prompt, `first` the start of a block. Earlier K and V are copied back from the host."""
        if layer < self.dense_layers:
            return super().write_prompt(layer, k, v, first)
        blocks = torch.stack((k, v), 1)  # (Hk, 2, T, D)
        blocks = F.pad(blocks, (0, 0, 0, -k.shape[1] % self.block_size)).unflatten(2, (-1, self.block_size))
        blocks = blocks.transpose(1, 2)  # (Hk, blocks, 2, b, D)
        start, layer = first // self.block_size, layer - self.dense_layers
        end = start + blocks.shape[1]
        earlier = self.host[layer, :, :start].to(self.device)  # (Hk, start, 2, b, D)
        self.host[layer, :, start:end].copy_(blocks)
        kept = [block for block in range(start, end) if block < self.sink or block >= end - self.ring]  # sink and tail
        block = torch.tensor(kept, device=self.device)  # (n,); a mask on the device would make the host wait
        each = blocks[:, block - start].repeat_interleave(self.heads // self.n_kv_heads, 0)  # (heads, n, 2, b, D)
        self.fixed[layer, :, self.fixed_slot(block)] = each
        self.written = first + k.shape[1]
        return [torch.cat((old.flatten(1, 2), new), 1) for old, new in zip(earlier.unbind(2), (k, v))]

    def advance(self, position):
        super().advance(position)
        cell = self.fixed_slot(position // self.block_size) * 2 * self.block_size + position % self.block_size  # (1,)
        self.cells = torch.cat((cell, cell + self.block_size))  # (2,): of the token's K and V in a head's fixed slots

    def write_token(self, layer, k, v):
        """Store k, v (Hk, 1, D) of the current token in its block's slots."""
        if layer < self.dense_layers:
            return super().write_token(layer, k, v)
        cells = self.fixed_cells[layer - self.dense_layers]  # (Hk, heads / Hk, cells, D)
        write_at(cells, self.cells, torch.cat((k, v), 1)[:, None].expand(-1, cells.shape[1], -1, -1))

    def write_back(self, n_tokens):
        """Copy from the slots to the host what it does not have of the first n_tokens yet, in whole blocks."""
        if n_tokens <= self.written:
            return
        end = kernels.cdiv(n_tokens, self.block_size)
        block = torch.arange(self.written // self.block_size, end, device=self.device)
        layer = torch.arange(len(self.slots), device=self.device)[:, None, None]  # (L', 1, 1)
        kv_head = torch.arange(self.n_kv_heads, device=self.device)[:, None]  # (Hk, 1)
        head = kv_head * (self.heads // self.n_kv_heads)  # the first of those that share a KV head
        slot = self.selectable + head * (self.sink + self.ring) + self.fixed_slot(block)  # (Hk, blocks)
        source = (layer * self.slots.shape[1] + slot).flatten().int()  # (L' * Hk * blocks,)
        target = ((layer * self.n_kv_heads + kv_head) * self.capacity + block).flatten().int()
        blocks = self.slots.flatten(0, 1).flatten(1), self.host.flatten(0, 2).flatten(1)
        kernels.copy_blocks(*blocks, source, target, self.backend)
        self.written = n_tokens
        self.written_bytes += len(source) * self.block_bytes

    def select(self, lists):
        """Copy the selected blocks that no slot holds yet, and note which slots the lists are in."""
        layer = torch.arange(len(lists.ids), device=lists.ids.device)[:, None]  # (L', 1)
        wanted = lists.ids.gather(1, lists.entries).int()  # (L', k)
        slots, fetch, held = kernels.assign_slots(wanted, self.held)
        self.held.copy_(held)
        source = (layer * self.n_kv_heads + fetch // self.capacity * self.n_kv_heads // self.heads) * self.capacity
        source = torch.where(fetch < 0, -1, source + fetch % self.capacity)  # (L', k): blocks of the host
        row = layer * self.slots.shape[1]  # (L', 1): a layer's first slot
        kernels.copy_blocks(
            self.host.flatten(0, 2).flatten(1), self.slots.flatten(0, 1).flatten(1),
            source.flatten().int(), (row + slots).flatten().int(), self.backend,
        )  # fmt: skip
        self.fetched += (fetch >= 0).sum()
        self.selected += lists.entries.numel()
        head, block = lists.ids // self.capacity, lists.ids % self.capacity  # (L', A)
        table = self.selectable + head * (self.sink + self.ring) + self.fixed_slot(block)
        lists.table.copy_((row + table.scatter_(1, lists.entries, slots.long())).flatten())
        self.pad(lists, slice(None))

    def pool(self, q, n_tokens, row_distance=1):
        """As KVCache.pool, on the host: the queries go there, the rows come back."""
        rows, lse = self.pool_on_host(q.cpu(), n_tokens, row_distance)
        return rows.to(q.device), lse.to(q.device)

    @torch.inference_mode()
    def pool_on_host(self, q, n_tokens, row_distance=1):
        """`pool` with q and results in host memory; the keys must be there already."""
        return pool_rows(q, self.host.flatten(0, 1)[:, :, 0], self.heads, n_tokens, row_distance, "torch")

    def begin_pooling(self, q, n_tokens):
        """As KVCache.begin_pooling. With a GPU, a thread pools as soon as queries and keys are in host memory."""
        if not self.worker:
            return super().begin_pooling(q, n_tokens)
        self.host_q.copy_(q.contiguous(), non_blocking=True)  # (L', Hq, 1, D)
        pooled = self.worker.submit(self.pool_after, torch.cuda.current_stream().record_event(), n_tokens)
        return lambda: [x.to(self.device, non_blocking=True) for x in pooled.result()]

    def pool_after(self, event, n_tokens):
        """What the thread does: pool, and leave the results in pinned memory."""
        event.synchronize()
        results = self.pool_on_host(self.host_q, n_tokens)
        pinned = self.host_rows, self.host_lse
        return [p.flatten()[: x.numel()].view(x.shape).copy_(x) for p, x in zip(pinned, results)]

    def format_stats(self, n_tokens, steps) -> list[str]:
        """Lines for people about `steps` decoded tokens, n_tokens in all."""
        whole = (self.host.nbytes + self.kv.nbytes) // (self.capacity * self.block_size) * n_tokens
        fetched, selected = (int(n) * self.block_bytes / steps / 1e6 for n in (self.fetched, self.selected))
        return [
            f"device     {self.device_bytes / 1e6:,.2f} MB of KV slots; the whole cache is {whole / 1e6:,.2f} MB",
            f"link       {fetched:,.3f} MB a token fetched, of {selected:,.3f} MB selected; "
            f"{self.written_bytes / steps / 1e6:,.3f} MB a token written back",
        ]


# --------------------------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------------------------


class InputError(Exception):
    """The user gave something that cannot be used; the message says in one line what is wrong and what to do."""


def require(condition, message):
    if not condition:
        raise InputError(message)


def format_stats(decoder: SparseDecoder) -> str:
    """The counters as a few lines for people."""
    decoder.join()  # the side stream may still be at the last recovery
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
        if not decoder.side_stream:
            share = stats.overhead_seconds / stats.decode_seconds
            lines.append(f"overhead   {share:.0%} of the time: calibration, prediction and selection")
    if isinstance(decoder.cache, OffloadedCache):
        lines += decoder.cache.format_stats(decoder.n_tokens, steps)
    return "\n".join(lines)


def format_summary(decoder: SparseDecoder) -> str:
    """One line: speed, and bytes read against dense decoding."""
    stats, steps = decoder.stats, max(1, decoder.stats.decode_tokens)
    speed = stats.decode_tokens / max(stats.decode_seconds, 1e-9)
    line = f"{stats.decode_tokens:,} tokens, {speed:,.1f} tokens/s"
    if stats.decode_tokens:
        read, dense = stats.read_bytes / steps / 1e6, stats.dense_bytes / steps / 1e6
        line += f", KV read {read:,.1f} MB a token, dense {dense:,.1f} MB"
    if not decoder.sparse_layers:
        return line
    if not decoder.selecting:
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
        kind = auto_or_int if f.type == int | str else int if f.type == int | None else f.type
        shown = dict(choices=f.metadata["choices"], help=f.metadata["help"] + default)
        group.add_argument("--" + f.name.replace("_", "-"), type=kind, default=argparse.SUPPRESS, **shown)


def config_of(args) -> Config:
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if hasattr(args, f.name)}
    given = (Config.OFFLOADED if getattr(args, "offload", False) else {}) | given
    return Config.paper(**given) if args.paper else Config(**given)


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__.splitlines()[0], formatter_class=ShownDefaults)
    parser.add_argument("--prompt", help="the text to answer, or a question about --prompt-file")
    parser.add_argument("--prompt-file", help="a file to answer, or to ask --prompt about; - for standard input")
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
    group.add_argument("--no-graph", action="store_true", help="launch every kernel anew, without a CUDA graph")
    group.add_argument("--dense", action="store_true", help="attend to everything in every layer")

    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, default=0.0, help="0: always the most probable token")
    group.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this total")
    group.add_argument("--seed", type=int, default=0, help="of the sampling")
    add_method_options(parser)
    return parser


def read_prompt(args) -> str:
    """The document, a blank line and the question; or the one of the two that is given, as it is."""
    parts = []
    if args.prompt_file is not None:
        parts.append(read_document(args.prompt_file))
    if args.prompt is not None:
        parts.append(args.prompt)
    require(parts, "there is no prompt: give --prompt, --prompt-file or both (--help lists the options)")
    require(all(part.strip() for part in parts), "the prompt is empty: give it some text")
    return parts[0].rstrip() + "\n\n" + parts[1] if len(parts) == 2 else parts[0]


def read_document(name) -> str:
    try:
        return (sys.stdin.buffer.read() if name == "-" else pathlib.Path(name).read_bytes()).decode()
    except OSError as error:
        raise InputError(f"prompt file {name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt is not UTF-8 text (byte {error.start}): convert it first") from None


def choose_device(args) -> tuple[torch.device, torch.dtype, str]:
    """Device, dtype and backend from the command line's names."""
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        device = None
    require(device is not None and device.type in ("cpu", "cuda"), f"device {name} is not available: try cpu")
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
    require(args.max_new_tokens >= 1, f"max-new-tokens {args.max_new_tokens} must be at least 1")
    require(0 <= args.temperature < math.inf, f"temperature {args.temperature} must be at least 0")
    require(0 < args.top_p <= 1, f"top-p {args.top_p} must be above 0 and at most 1")
    require(0 <= args.seed < 2**63, f"seed {args.seed} must lie in 0 ... 2^63 - 1")


def free_memory(device) -> int | None:
    """Bytes that can still be allocated on a device; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return int(re.search(r"MemAvailable: *(\d+) kB", pathlib.Path("/proc/meminfo").read_text())[1]) * 1024
    except (OSError, TypeError):
        return None


def prefill_memory(c: Config, m: LlamaConfig, n_tokens, dtype, offload) -> int:
    """Bytes on the device for the activations of one chunk, or for the rows that are pooled after the last one."""
    q, kv = m.n_heads * m.head_dim, m.n_kv_heads * m.head_dim
    qkv = (q + 2 * kv) * dtype.itemsize + (q + kv) * (8 + dtype.itemsize)  # RoPE holds two float32 copies
    mlp = 3 * m.d_ff * dtype.itemsize  # gate, up and their product
    chunk = min(n_tokens, PREFILL_CHUNK) * (m.d_model * (4 + 2 * dtype.itemsize) + max(qkv, mlp))
    earlier = 4 * kv * n_tokens * dtype.itemsize if offload else 0  # K and V of a layer, as copied and in order
    sparse = m.n_layers - min(c.dense_layers, m.n_layers)
    pooled = 0 if c.fits(n_tokens) else 4 * sparse * m.n_heads * c.history_len * c.n_blocks(n_tokens)
    return max(chunk + earlier, pooled)


def memory_needed(c: Config, m: LlamaConfig, capacity_tokens, dtype, offload) -> tuple[int, int]:
    """Bytes that prefill and decoding allocate on the device and in host memory, beside the weights.

    It makes a decoder on the meta device, whose tensors have sizes but no memory, and adds up the sizes.
    """
    with torch.device("meta") as meta:  # takes what would be host memory as well
        model = SimpleNamespace(config=m, device=meta, kv_dtype=dtype)
        decoder = SparseDecoder(c, model, Predictor(), capacity_tokens, offload=offload)
    cache, rings = decoder.cache, (decoder.history, decoder.contributions, decoder.queries)
    device = cache.device_bytes + sum(ring.nbytes for ring in rings)
    return device + prefill_memory(c, m, capacity_tokens, dtype, offload), cache.host.nbytes if offload else 0


def check_memory(c: Config, m: LlamaConfig, capacity_tokens, dtype, device, offload):
    """Raise InputError, before anything is computed, where decoding would not fit into memory; say what to do."""
    needs = zip(memory_needed(c, m, capacity_tokens, dtype, offload), (device, torch.device("cpu")))
    for need, memory in needs:
        free = free_memory(memory)
        if free is not None and need > free:
            where = "host memory" if memory.type == "cpu" else f"memory of {memory}"
            remedy = "a shorter prompt, fewer --max-new-tokens" + ("" if offload else " or --offload")
            raise InputError(
                f"a text of {capacity_tokens:,} tokens needs {need / 1e9:,.2f} GB of {where}, {free / 1e9:,.2f} GB are "
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
    require(room >= 1, f"the prompt has {len(tokens):,} tokens, the model's context {m.context_len:,}: shorten it")
    max_new_tokens = min(args.max_new_tokens, room)
    capacity_tokens = len(tokens) + max_new_tokens
    check_memory(config, m, capacity_tokens, model.kv_dtype, device, args.offload)
    decoder = make_decoder(config, model, predictor, capacity_tokens, backend, args.offload, not args.no_graph)
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


def exit_status(program, command) -> int:
    """Run `command`. Returns 2, and prints one line, for errors that a user can correct; 130 for Ctrl-C; else 0."""
    try:
        command()
    except (InputError, ModelError, FetchError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        remedy = "try a shorter text, a smaller model or, where there is that option, --offload"
        print(f"{program}: out of GPU memory: {remedy}", file=sys.stderr)
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
