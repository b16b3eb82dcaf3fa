"""AttentionPredictor: decode a Llama, reading only the KV blocks that a small convolution expects to matter next.

    python attnpred.py --prompt "Why is the sky blue?"

Reading order: `Config` (the method's parameters), `Predictor` (the network), `SparseDecoder` (what one sequence keeps
between tokens, and the method's five steps: prefill, predict, select, attend, calibrate), `generate`, the command line.
The arithmetic is in kernels.py, the language model in model.py.

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
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels
from model import Llama, LlamaConfig, ModelError, TextStream, causal_attention, load_model
from offload import OffloadedCache
from weights.fetch_llm import DEFAULT_LLM, FetchError, fetch_default_llm

DEFAULT_PREDICTOR = pathlib.Path(__file__).parent / "weights" / "predictor.safetensors"


class InputError(Exception):
    """Something that the user gave cannot be used; the message says, in one line, what is wrong and what would do."""


# --------------------------------------------------------------------------------------------------------------------
# Parameters and predictor
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """The method's parameters, in tokens unless said otherwise. Raises InputError where they contradict each other."""

    block_size: int = 16  # b: tokens to a block
    history_len: int = 64  # H: rows of pooled attention kept
    sink_tokens: int = 64  # S: first tokens, always attended
    local_tokens: int = 64  # R: last tokens, always attended
    budget: int = 1024  # B: tokens attended per head and step, sink and local counted in
    calibration_interval: int = 5  # M: every M-th step the true row enters the history
    dense_layers: int = 2  # the first layers, always dense
    select_heads: str = "kv"  # "kv": a group of queries selects together; "q": each query head for itself
    stagger_calibration: bool = False  # calibrate when (step + layer) mod M = 0: no token pays for all layers

    def __post_init__(self):
        b = self.block_size
        if not (8 <= b <= 64 and b & (b - 1) == 0):
            raise InputError(f"block size {b} is not supported: 8, 16, 32 or 64 would do")
        for name in ("sink_tokens", "local_tokens", "budget"):
            value = getattr(self, name)
            if value < 0 or value % b:
                raise InputError(
                    f"{name} = {value} is not a multiple of the block size: {max(0, value) // b * b + b} would do"
                )
        if self.local_tokens < b:
            raise InputError(f"local_tokens = {self.local_tokens} must hold at least one block: {b} would do")
        if self.budget < self.sink_tokens + self.local_tokens:
            raise InputError(
                f"budget = {self.budget} is below sink_tokens + local_tokens, which are always attended: "
                f"at least {self.sink_tokens + self.local_tokens} would do"
            )
        if self.history_len < 5:
            raise InputError(f"history_len = {self.history_len} is too short for the convolution: at least 5 would do")
        if self.calibration_interval < 1:
            raise InputError(f"calibration_interval = {self.calibration_interval} must be at least 1")
        if self.dense_layers < 0:
            raise InputError(f"dense_layers = {self.dense_layers} must not be negative")
        if self.select_heads not in ("kv", "q"):
            raise InputError(f"select_heads = {self.select_heads!r} is not known: kv or q would do")

    @property
    def topk_blocks(self) -> int:
        """K: blocks chosen from the middle."""
        return (self.budget - self.sink_tokens - self.local_tokens) // self.block_size

    def n_blocks(self, n_tokens: int) -> int:
        """N: blocks in a cache of n_tokens, the last one perhaps partial."""
        return -(-n_tokens // self.block_size)

    def middle(self, n_tokens: int) -> tuple[int, int]:
        """The blocks [start, end) between sink and local window. end <= start when there are none.

        The local window is block-aligned: the last R / b full blocks, and the partial one behind them.
        """
        return self.sink_tokens // self.block_size, (n_tokens - self.local_tokens) // self.block_size


class Predictor(nn.Module):
    """The shared convolution, 4,833 parameters: an image of pooled attention rows -> one score a block."""

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
    """A predictor from a .safetensors file, or from a pickled state dict such as the authors publish, read as data.

    Raises InputError for a file that is missing, unreadable, or holds other keys or shapes, NaN or infinity.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise InputError(f"predictor {path} does not exist: give a .safetensors file or a pickled state dict")
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged input the restricted unpickler raises whatever it trips over
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"predictor {path} cannot be read ({reason}); a whole, plain state dict would do") from None
    predictor = Predictor()
    wanted = {name: tuple(tensor.shape) for name, tensor in predictor.state_dict().items()}
    if not isinstance(state, dict) or set(state) != set(wanted):
        found = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise InputError(f"predictor {path} holds other keys ({found}): {', '.join(wanted)} would do")
    for name, shape in wanted.items():
        if not isinstance(state[name], torch.Tensor) or tuple(state[name].shape) != shape:
            raise InputError(f"predictor {path}: {name} has another shape than {shape}")
        if not state[name].isfinite().all():
            raise InputError(f"predictor {path}: {name} holds NaN or infinity; train or fetch it again")
    predictor.load_state_dict(state)
    return predictor.requires_grad_(False).to(memory_format=torch.channels_last)  # a CPU convolves faster so


# --------------------------------------------------------------------------------------------------------------------
# The state of one sequence
# --------------------------------------------------------------------------------------------------------------------


class KVCache:
    """K and V of all layers, resident on the device, in blocks. Capacity is fixed; memory is touched as tokens come."""

    overlaps = False  # nothing to fetch, so the next selection can wait for the end of the token

    def __init__(self, c: Config, m: LlamaConfig, capacity_tokens, dtype, device, backend):
        self.backend = backend
        shape = (m.n_layers, m.n_kv_heads, c.n_blocks(capacity_tokens), c.block_size, m.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)  # (L, Hk, capacity, b, D)
        self.v = torch.zeros(shape, dtype=dtype, device=device)  # (L, Hk, capacity, b, D)

    def write(self, layer, k, v, start):
        """Store k, v (Hk, T, D) as the tokens start ... start + T - 1 of a layer. Returns its keys, for pooling."""
        end = start + k.shape[1]
        self.k[layer].flatten(1, 2)[:, start:end] = k
        self.v[layer].flatten(1, 2)[:, start:end] = v
        return self.k[layer]  # (Hk, capacity, b, D)

    def on_side(self, *tensors):
        """There is no side stream."""
        return nullcontext()

    def begin_counting(self):
        """Nothing moves."""

    def select(self, layer, blocks, n_tokens):
        """Every block is there already."""

    def attend(self, layer, q, blocks, n_tokens, row):
        """`kernels.sparse_decode` over a layer's blocks."""
        if row is None and self.backend == "torch":  # a dense layer leaves no row: the library's attention does
            k, v = (cache[layer].flatten(1, 2)[None, :, :n_tokens] for cache in (self.k, self.v))  # (1, Hk, T, D)
            out = F.scaled_dot_product_attention(q.unflatten(0, (k.shape[1], -1))[None], k, v)  # (1, Hk, G, D)
            return out[0].flatten(0, 1), None
        return kernels.sparse_decode(q, self.k[layer], self.v[layer], blocks, n_tokens, row, self.backend)

    def pool(self, layer, q, n_tokens):
        """`kernels.pool_history` over all of a layer's keys."""
        return kernels.pool_history(q, self.k[layer], n_tokens, self.backend)


@dataclass
class Stats:
    """What decoding cost and how well it went: exact counters, wall-clock seconds, and recovery."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    kv_bytes: int = 0  # K and V read by attention, over all decoded tokens
    calibration_bytes: int = 0  # K read once more by calibration
    dense_kv_bytes: int = 0  # what dense attention would have read
    finish_seconds: float = 0.0  # prediction and selection, where the host waits for them: on a CPU
    predict_multiply_adds: int = 0
    full_multiply_adds: int = 0  # had the whole image been convolved at each step
    recovery: list = field(default_factory=list)  # (Hq,) tensors: share of true attention, on calibration steps


class SparseDecoder:
    """One sequence being decoded: cache, attention history, prediction and selection, for all layers.

    `prefill` and `decode_one_token` drive it; its two attention methods are what the model calls in each layer. Layers
    from `dense_layers` on are sparse and have a history; their tensors are indexed by layer - dense_layers.
    """

    def __init__(
        self, config: Config, model: Llama, predictor: Predictor, capacity_tokens: int, backend="torch", offload=False
    ):
        c, m = config, model.config
        dtype, device = model.embed.dtype, model.embed.device
        self.config, self.model_config, self.backend = c, m, backend
        self.itemsize = dtype.itemsize
        self.heads = m.n_kv_heads if c.select_heads == "kv" else m.n_heads
        self.weights = {name: w.to(device) for name, w in predictor.state_dict().items()}
        if offload:
            self.cache = OffloadedCache(c, m, self.heads, capacity_tokens, dtype, device, backend)
        else:
            self.cache = KVCache(c, m, capacity_tokens, dtype, device, backend)
        sparse_layers = max(0, m.n_layers - c.dense_layers)
        ring = (sparse_layers, self.heads, c.history_len, c.n_blocks(capacity_tokens))
        self.history = torch.zeros(ring, device=device)  # (L', heads, H, capacity): ring of pooled attention rows
        self.contributions = torch.zeros(ring, device=device)  # as history; see kernels.predict_incremental
        self.newest = c.history_len - 1  # the ring slot of the last row
        self.predicted_end = 0  # end of the middle at the last prediction; 0: there was none
        self.blocks = [None] * sparse_layers  # (heads, A) int32: what the next token attends to; None: everything
        self.n_tokens = 0
        self.step = 0  # decode steps since prefill
        self.stats = Stats()

    def prefill_attention(self, layer, q, k, v):
        """Dense causal attention over the prompt; leaves K and V in the cache and the last H rows in the history.

        q (Hq, T, D), k and v (Hk, T, D) -> (Hq, T, D)
        """
        k_cache = self.cache.write(layer, k, v, 0)  # (Hk, capacity, b, D)
        if layer >= self.config.dense_layers:
            rows = min(self.config.history_len, self.n_tokens)  # a shorter prompt leaves zero rows at the old end
            pooled, _ = kernels.pool_history(q[:, -rows:], k_cache, self.n_tokens, self.backend)  # (Hq, rows, N)
            image = self.history[layer - self.config.dense_layers, :, -rows:, : pooled.shape[-1]]  # (heads, rows, N)
            image.copy_(self.group_mean(pooled))
        return causal_attention(layer, q, k, v)

    def begin_token(self):
        """One more token: its row takes the oldest one's slot."""
        self.n_tokens += 1
        self.step += 1
        self.newest = (self.newest + 1) % self.config.history_len

    def decode_attention(self, layer, q, k, v):
        """Attention of one token over its selected blocks; the row that it leaves, or the true one, enters the history.

        q (Hq, 1, D), k and v (Hk, 1, D) -> (Hq, 1, D)
        """
        c = self.config
        self.cache.write(layer, k, v, self.n_tokens - 1)
        if layer < c.dense_layers:
            self.count_reads(None, False)
            return self.cache.attend(layer, q[:, 0], None, self.n_tokens, None)[0][:, None]
        blocks = self.blocks_for(layer, q)  # (heads, A)
        row = self.history[layer - c.dense_layers, :, self.newest]  # (heads, capacity)
        out, lse = self.cache.attend(layer, q[:, 0], blocks, self.n_tokens, row)
        turn = self.step + layer if c.stagger_calibration else self.step
        calibrate = blocks is not None and turn % c.calibration_interval == 0
        self.count_reads(blocks, calibrate)
        with self.cache.on_side(q, lse):  # nothing from here on is needed for this token
            if calibrate:
                pooled, true_lse = self.cache.pool(layer, q, self.n_tokens)  # (Hq, 1, N), (Hq, 1)
                row[:, : pooled.shape[-1]] = self.group_mean(pooled)[:, 0]  # (heads, N)
                self.stats.recovery.append(torch.exp(lse - true_lse[:, 0]))  # (Hq,)
            if self.cache.overlaps:
                self.predict_next(slice(layer - c.dense_layers, layer - c.dense_layers + 1))
        return out[:, None]

    def finish_token(self):
        """Predict for the next token, in the layers where that has not been done yet."""
        if self.step == 0 or not self.cache.overlaps:
            self.predict_next()
        start, end = self.config.middle(self.n_tokens + 1)
        self.predicted_end = end if end - start > self.config.topk_blocks else 0

    def blocks_for(self, layer, q):
        """The blocks (heads, A) that a sparse layer attends to for q (Hq, 1, D); None: all. A prediction needs no q."""
        return self.blocks[layer - self.config.dense_layers]

    def group_mean(self, pooled):
        """(Hq, rows, N) -> (heads, rows, N): with "kv" selection a group's queries share the mean of their rows."""
        return pooled.unflatten(0, (self.heads, -1)).mean(1)

    def predict_next(self, layers=slice(None)):
        """Predict and select, for a slice of the sparse layers, the blocks that the next token will attend to."""
        c, n_tokens = self.config, self.n_tokens + 1
        start, end = c.middle(n_tokens)
        selected = range(len(self.blocks))[layers]
        tables = [None] * len(selected)
        if end - start > c.topk_blocks and selected:
            if c.topk_blocks:
                scores = self.score_blocks(start, end, layers)  # (layers * heads, n)
                chosen = kernels.select_blocks(scores, c.topk_blocks, self.backend) + start  # (layers * heads, K)
            else:
                shape = len(selected) * self.heads, 0
                chosen = torch.empty(shape, dtype=torch.int32, device=self.history.device)
            sink, local = (
                torch.arange(*ends, dtype=torch.int32, device=chosen.device).expand(len(chosen), -1)
                for ends in ((0, start), (end, c.n_blocks(n_tokens)))
            )
            tables = torch.cat([sink, chosen, local], 1).unflatten(0, (len(selected), self.heads))  # (layers, heads, A)
        for layer, table in zip(selected, tables):
            self.blocks[layer] = table
            self.cache.select(layer, table, n_tokens)

    def score_blocks(self, start, end, layers=slice(None)):
        """Predicted scores of the middle blocks [start, end) of some sparse layers: (layers * heads, end - start)."""
        history = self.history[layers].flatten(0, 1)  # (layers * heads, H, capacity)
        contributions = self.contributions[layers].flatten(0, 1)  # (layers * heads, H, capacity)
        window = self.newest, start, end, max(start, self.predicted_end)
        if self.step:  # the first prediction, of the whole image, belongs to prefill
            shape = len(history), self.config.history_len, start, end
            self.stats.predict_multiply_adds += kernels.predict_multiply_adds(*shape, window[-1])
            self.stats.full_multiply_adds += kernels.predict_multiply_adds(*shape)
        return kernels.predict_incremental(history, contributions, *window, self.weights, self.backend)

    def count_reads(self, blocks, calibrate):
        """Count the cache bytes that one layer's attention reads for one token."""
        n_kv_heads, block_size = self.model_config.n_kv_heads, self.config.block_size
        key_bytes = self.model_config.head_dim * self.itemsize
        heads, attended = n_kv_heads, self.n_tokens
        if blocks is not None:
            padding = -self.n_tokens % block_size  # places behind the last token, in its block
            heads, attended = len(blocks), blocks.shape[1] * block_size - padding
        self.stats.kv_bytes += 2 * heads * attended * key_bytes
        self.stats.dense_kv_bytes += 2 * n_kv_heads * self.n_tokens * key_bytes
        self.stats.calibration_bytes += n_kv_heads * self.n_tokens * key_bytes if calibrate else 0


# --------------------------------------------------------------------------------------------------------------------
# Decoding
# --------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def prefill(model: Llama, decoder: SparseDecoder, tokens: torch.Tensor) -> torch.Tensor:
    """Run the prompt, tokens (T,), and predict for the first new token. Returns the next token's logits (vocab,)."""
    decoder.n_tokens = len(tokens)
    logits = model(tokens, torch.arange(len(tokens), device=tokens.device), decoder.prefill_attention)  # (vocab,)
    decoder.finish_token()
    decoder.cache.begin_counting()
    return logits


@torch.inference_mode()
def decode_one_token(model: Llama, decoder: SparseDecoder, token: torch.Tensor) -> torch.Tensor:
    """Append token (1,), attend sparsely, predict for the token after it. Returns the next token's logits (vocab,)."""
    decoder.begin_token()
    position = torch.full((1,), decoder.n_tokens - 1, device=token.device)
    logits = model(token, position, decoder.decode_attention)  # (vocab,)
    began = time.perf_counter()
    decoder.finish_token()
    decoder.stats.finish_seconds += time.perf_counter() - began
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
    stats, device = decoder.stats, model.embed.device
    generator = torch.Generator(device).manual_seed(seed)
    ahead = device.type == "cuda"  # the next step is launched before the host has seen this step's token

    def step(token):
        stats.decode_tokens += 1
        return sample(decode_one_token(model, decoder, token), temperature, top_p, generator)  # (1,)

    began = time.perf_counter()
    token = sample(prefill(model, decoder, torch.tensor(tokens, device=device)), temperature, top_p, generator)  # (1,)
    token.item()  # wait for it
    stats.prefill_tokens, stats.prefill_seconds = len(tokens), time.perf_counter() - began
    for left in reversed(range(max_new_tokens)):
        began = time.perf_counter()
        following = step(token) if left and ahead else None
        value = token.item()
        stats.decode_seconds += time.perf_counter() - began
        if value in model.config.eos_token_ids:
            return
        yield value
        began = time.perf_counter()
        token = step(token) if left and not ahead else following
        stats.decode_seconds += time.perf_counter() - began


# --------------------------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------------------------


def format_stats(decoder: SparseDecoder) -> str:
    """The counters as a few lines for people."""
    if decoder.history.is_cuda:
        torch.cuda.synchronize(decoder.history.device)
    stats, steps = decoder.stats, max(1, decoder.stats.decode_tokens)
    megabytes = {
        name: getattr(stats, name) / steps / 1e6 for name in ("kv_bytes", "calibration_bytes", "dense_kv_bytes")
    }
    read = megabytes["kv_bytes"] + megabytes["calibration_bytes"]
    prefill_speed = stats.prefill_tokens / max(stats.prefill_seconds, 1e-9)
    decode_speed = stats.decode_tokens / max(stats.decode_seconds, 1e-9)
    lines = [
        f"prefill    {stats.prefill_tokens:,} tokens, {prefill_speed:,.0f} tokens/s",
        f"decode     {stats.decode_tokens:,} tokens, {decode_speed:,.1f} tokens/s",
    ]
    if stats.decode_tokens:
        lines.append(
            f"KV read    {read:,.2f} MB a token ({megabytes['kv_bytes']:,.2f} attention + "
            f"{megabytes['calibration_bytes']:,.2f} calibration), dense {megabytes['dense_kv_bytes']:,.2f} MB: "
            f"{megabytes['dense_kv_bytes'] / read:.1f}x compression"
        )
    if stats.recovery:
        recovery = torch.stack(stats.recovery).mean().item()
        lines.append(
            f"recovery   {recovery:.3f} of the true attention, over {len(stats.recovery)} calibrated layer steps"
        )
    if stats.predict_multiply_adds:
        lines.append(
            f"predictor  {stats.predict_multiply_adds / steps / 1e6:,.0f} M multiply-adds a token, "
            f"{stats.full_multiply_adds / stats.predict_multiply_adds:.1f}x fewer than recomputing; "
            f"{1e3 * stats.finish_seconds / steps:.1f} ms, {stats.finish_seconds / stats.decode_seconds:.0%} of time"
        )
    else:
        lines.append("predictor  not needed: every token fits the budget, or every layer is dense")
    if isinstance(decoder.cache, OffloadedCache):
        lines += decoder.cache.format_stats(decoder.n_tokens, steps)
    return "\n".join(lines)


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (--help lists the options)")


class ShownDefaults(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def parse_args(argv):
    parser = OneLineParser(description=__doc__.splitlines()[0], formatter_class=ShownDefaults)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="the text to answer")
    source.add_argument("--prompt-file", help="read the text from this file; - for standard input")
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="stop after so many tokens")
    parser.add_argument("--stats", action="store_true", help="end with speed, bytes read, recovery and predictor cost")
    parser.add_argument("--plot", metavar="FILE.png", help="draw history, predictions, blocks, recovery, bytes")

    group = parser.add_argument_group("model")
    group.add_argument("--model", help=f"Hugging Face folder or hub id (default: {DEFAULT_LLM}, fetched once)")
    group.add_argument("--predictor", default=DEFAULT_PREDICTOR, help="the convolution: safetensors or state dict")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...; auto takes a GPU if there is one")
    dtypes, backends = ["auto", "float32", "bfloat16", "float16"], ["auto", "torch", "triton"]
    group.add_argument("--dtype", default="auto", choices=dtypes, help="auto: bfloat16 on a GPU, else float32")
    group.add_argument("--backend", default="auto", choices=backends, help="auto: triton on a GPU, else torch")

    group.add_argument("--offload", action="store_true", help="keep the KV cache in host memory, fetch ahead")

    group = parser.add_argument_group("method (see the README)")
    group.add_argument("--dense", action="store_true", help="attend to everything in every layer")
    group.add_argument("--select-heads", default=Config.select_heads, choices=["kv", "q"], help=HELP["select_heads"])
    group.add_argument("--stagger-calibration", action="store_true", help=HELP["stagger_calibration"])
    for parameter in dataclasses.fields(Config):
        if parameter.type is int:
            option = "--" + parameter.name.replace("_", "-")
            group.add_argument(option, type=int, default=parameter.default, help=HELP[parameter.name])

    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, default=0.0, help="0: always the most probable token")
    group.add_argument(
        "--top-p", type=float, default=1.0, help="sample from the most probable tokens of this total probability"
    )
    group.add_argument("--seed", type=int, default=0, help="of the sampling")
    return parser.parse_args(argv)


HELP = {
    "block_size": "tokens to a block",
    "history_len": "rows of pooled attention kept",
    "sink_tokens": "first tokens, always attended",
    "local_tokens": "last tokens, always attended",
    "budget": "tokens attended per head and step, sink and local counted in",
    "calibration_interval": "every so many steps the true attention row enters the history",
    "dense_layers": "first layers, always dense",
    "select_heads": "kv: the queries that share a KV head select together; q: each for itself",
    "stagger_calibration": "spread calibration over steps by layer",
}


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
        raise InputError(f"device {name} is not available: cpu would do")
    dtype = {"auto": torch.bfloat16 if device.type == "cuda" else torch.float32}.get(args.dtype) or getattr(
        torch, args.dtype
    )
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
        raise InputError(f"temperature {args.temperature} must be a number from 0 up")
    if not 0 < args.top_p <= 1:
        raise InputError(f"top-p {args.top_p} must lie above 0 and at most at 1")
    if not 0 <= args.seed < 2**63:
        raise InputError(f"seed {args.seed} must lie in 0 ... 2^63 - 1")


def free_memory(device) -> int | None:
    """Bytes that can still be had on a device; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return int(re.search(r"MemAvailable: *(\d+) kB", pathlib.Path("/proc/meminfo").read_text())[1]) * 1024
    except (OSError, TypeError):
        return None


def check_memory(config: Config, m: LlamaConfig, capacity_tokens, dtype, device, offload):
    """Raise InputError, before anything is computed, where the cache does not fit; say what would."""

    def fits(what, need, place, free, remedy):
        if free is not None and need > free:
            raise InputError(f"{what} needs {need / 1e9:,.2f} GB {place}, {free / 1e9:,.2f} GB are free: {remedy}")

    token = 2 * m.n_layers * m.n_kv_heads * m.head_dim * dtype.itemsize
    host, free = torch.device("cpu"), free_memory(device)
    if not offload:
        remedy = "--offload, a shorter prompt or fewer --max-new-tokens would do"
        fits(f"a KV cache of {capacity_tokens:,} tokens", token * capacity_tokens, f"on {device}", free, remedy)
        return
    room = free_memory(host)
    remedy = f"{(room or 0) // token:,} tokens, prompt and answer together, would fit"
    fits(f"a KV cache of {capacity_tokens:,} tokens", token * capacity_tokens, "of host memory", room, remedy)
    heads = m.n_kv_heads if config.select_heads == "kv" else m.n_heads
    block = max(1, m.n_layers - config.dense_layers) * heads * 2 * config.block_size * m.head_dim * dtype.itemsize
    fewer = config.topk_blocks - -(-(OffloadedCache.device_bytes(config, m, heads, dtype) - (free or 0)) // block)
    least = config.sink_tokens + config.local_tokens
    remedy = f"--budget {least + fewer * config.block_size} would fit" if fewer >= 0 else "no budget would fit"
    what = f"the slots for a budget of {config.budget:,} tokens"
    fits(what, OffloadedCache.device_bytes(config, m, heads, dtype), f"on {device}", free, remedy)


def run(args):
    """Answer the prompt on standard output; statistics go to standard error."""
    check_limits(args)
    names = [f.name for f in dataclasses.fields(Config)]
    config = Config(**{name: getattr(args, name) for name in names})
    text = read_prompt(args)
    plots = import_plots(args) if args.plot else None
    device, dtype, backend = choose_device(args)
    predictor = load_predictor(args.predictor)
    model, tokenizer = load_model(args.model or str(fetch_default_llm()), dtype, device)
    if args.dense:
        config = dataclasses.replace(config, dense_layers=model.config.n_layers)
    if not args.raw:
        text = tokenizer.chat([{"role": "user", "content": text}]) if tokenizer.has_chat_template else text
    tokens = tokenizer.encode(text)
    room = model.config.context_len - len(tokens)
    if room < 1:
        raise InputError(
            f"the prompt has {len(tokens):,} tokens, the model's context {model.config.context_len:,}: shorten it"
        )
    max_new_tokens = min(args.max_new_tokens, room)
    check_memory(config, model.config, len(tokens) + max_new_tokens, dtype, device, args.offload)
    decoder = SparseDecoder(config, model, predictor, len(tokens) + max_new_tokens, backend, args.offload)
    recorder = plots.Recorder(decoder) if args.plot else None
    stream = TextStream(tokenizer)
    try:
        for token in generate(model, decoder, tokens, max_new_tokens, args.temperature, args.top_p, args.seed):
            print(stream.push(token), end="", flush=True)
    finally:
        print(stream.flush(), flush=True)
        if args.stats:
            print(format_stats(decoder), file=sys.stderr)
    if args.plot:
        draw_run(plots, recorder, args.plot)


def import_plots(args):
    """plots.py, once it is clear that --plot can be drawn. The module is not needed otherwise, nor is matplotlib."""
    folder = pathlib.Path(args.plot).parent
    if not args.plot.endswith(".png") or not os.access(folder, os.W_OK) or pathlib.Path(args.plot).is_dir():
        raise InputError(f"cannot write the plot {args.plot}: FILE.png in a folder that exists would do")
    if args.dense or args.max_new_tokens < 2:
        raise InputError("--plot shows sparse decoding: leave out --dense, and generate 2 tokens or more")
    try:
        import plots
    except ImportError as error:
        raise InputError(f"--plot needs {error.name}: pip install {error.name}") from None
    return plots


def draw_run(plots, recorder, path):
    if not recorder.recovery:
        raise InputError("nothing to plot: the answer ended before a second token was decoded")
    try:
        plots.draw_run(recorder, path)
    except OSError as error:
        raise InputError(f"cannot write the plot {path} ({error.strerror})") from None


def exit_status(program, command) -> int:
    """Call `command`; 2 and one line on standard error for what a user can mend, 130 for Ctrl-C, else 0."""
    try:
        command()
    except (InputError, ModelError, FetchError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has left; nothing is to be said to it at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def main(argv=None) -> int:
    return exit_status("attnpred", lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
