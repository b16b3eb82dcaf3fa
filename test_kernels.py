"""Every kernel against its reference, property-based: hypothesis draws the shapes, the dtypes and the nasty values.

The kernels run natively where there is a GPU, with larger shapes, and in Triton's interpreter elsewhere. The reference
is computed in float64 from the same inputs, and is itself held against a naive implementation.
"""

import json
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import hypothesis.strategies as st  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import kernels  # noqa: E402

NATIVE = DEVICE == "cuda"
settings.register_profile(
    "kernels",
    deadline=None,
    max_examples=200 if NATIVE else 40,
    derandomize=not NATIVE,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("kernels")

# Largest error allowed against float64, relative to the largest value that the result could take. Probabilities and
# scores are float32 whatever the inputs, which are exact in float32; an output in the inputs' dtype is rounded to it.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
DTYPES = st.sampled_from(list(TOLERANCE))
HEAD_DIMS = st.sampled_from([64, 80, 96, 128, 256] if NATIVE else [64, 80, 128])
BLOCK_SIZES = st.sampled_from([8, 16, 24, 32, 64])
SEEDS = st.integers(0, 2**31)


def poison(*shape, dtype=torch.float32):
    """An output before it is written: NaN everywhere, or the most negative integer."""
    bad = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
    return torch.full(shape, bad, dtype=dtype, device=DEVICE)


def assert_close(actual, expected, dtype=torch.float32, scale=1.0, slack=0.0, context=""):
    """actual within TOLERANCE[dtype] * scale + slack of expected, and no NaN."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    error = (actual.double() - expected.double()).abs()
    allowed = TOLERANCE[dtype] * scale + slack
    bad = ~(error <= allowed)
    if bad.any():
        worst = error.nan_to_num(float("inf")).max()
        raise AssertionError(f"{context}: {int(bad.sum())} of {bad.numel()} off by {worst:.3g}, allowed {allowed:.3g}")


class unchanged:
    """A context in which the given tensors must keep every bit."""

    def __init__(self, *tensors):
        self.tensors = tensors

    def __enter__(self):
        self.before = [tensor.clone() for tensor in self.tensors]

    def __exit__(self, *error):
        for tensor, before in zip(self.tensors, self.before):
            assert torch.equal(tensor.view(torch.uint8), before.view(torch.uint8)), "an input was changed"


# --------------------------------------------------------------------------------------------------------------------
# What the tests of sections 1, 4 and 5 draw
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """Queries and caches of a drawn shape. Whatever lies behind token n_tokens is NaN."""

    q: torch.Tensor  # (Hq, rows, D)
    k: torch.Tensor  # (Hk, capacity, b, D)
    v: torch.Tensor
    n_tokens: int
    n_blocks: int
    slack: float  # what float32 logits of this size may cost, relative to a probability


@st.composite
def cases(draw, max_rows=1):
    dtype, head_dim, block_size = draw(DTYPES), draw(HEAD_DIMS), draw(BLOCK_SIZES)
    n_kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 4, 7, 17]))
    n_tokens = draw(st.integers(1, 5000 if NATIVE else 300))
    rows = min(n_tokens, draw(st.integers(1, max_rows)))
    n_blocks = -(-n_tokens // block_size)
    capacity = n_blocks + draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(draw(SEEDS))

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)

    q = normal(n_kv_heads * group, rows, head_dim)
    if draw(st.booleans()):  # logits of +-1e4
        q *= 1e4 / 3
    if draw(st.booleans()):  # block-major, a block's K and V contiguous, as in the offloaded cache
        k, v = normal(capacity, n_kv_heads, 2, block_size, head_dim).permute(2, 1, 0, 3, 4)
    else:
        k, v = normal(2, n_kv_heads, capacity, block_size, head_dim)
    largest = q.double().abs().amax((0, 1)) @ k.double().abs().amax((0, 1, 2)) * head_dim**-0.5
    key = torch.arange(capacity * block_size, device=DEVICE).view(capacity, block_size)
    k.masked_fill_((key >= n_tokens)[..., None], float("nan"))
    v.masked_fill_((key >= n_tokens)[..., None], float("nan"))
    return Case(q, k, v, n_tokens, n_blocks, float(largest) * 2**-23)


@contextmanager
def machine(multiprocessors):
    """A GPU of so many multiprocessors, to be filled by splits; the interpreter has small tiles, so more splits."""
    tile_bytes = kernels.TILE_BYTES if NATIVE else 2048
    with (
        patch.object(kernels, "_n_multiprocessors", lambda device: multiprocessors),
        patch.object(kernels, "TILE_BYTES", tile_bytes),
    ):
        yield


MULTIPROCESSORS = st.sampled_from([1, 3, 8])


@pytest.fixture(autouse=True, scope="module")
def fresh_memory_is_poisoned():
    """torch.empty fills with NaN, so that an output or a partial result that a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


# --------------------------------------------------------------------------------------------------------------------
# 1. History pooling
# --------------------------------------------------------------------------------------------------------------------


def naive_attention(case):
    """Causal attention probabilities in float64, all of them: (Hq, rows, T), and the logits' log-sum-exp."""
    rows, head_dim = case.q.shape[1:]
    k = case.k.double().flatten(1, 2)[:, : case.n_tokens].repeat_interleave(case.q.shape[0] // case.k.shape[0], 0)
    logits = case.q.double() @ k.mT / head_dim**0.5  # (Hq, rows, T)
    future = torch.ones(rows, case.n_tokens, dtype=torch.bool, device=DEVICE).triu(case.n_tokens - rows + 1)
    logits = logits.masked_fill(future, float("-inf"))
    return logits.softmax(-1), logits.logsumexp(-1)


@given(cases(max_rows=12))
def test_pool_reference_is_the_maximum_of_a_softmax(case):
    probabilities, lse = naive_attention(case)
    pooled = torch.stack([part.amax(-1) for part in probabilities.split(case.k.shape[2], -1)], -1)
    with patch.object(kernels, "POOL_CHUNK_TOKENS", 32):
        actual = kernels.pool_history_reference(case.q.double(), case.k.double(), case.n_tokens)
    assert_close(actual[0], pooled, scale=1e-3)
    assert_close(actual[1], lse, scale=1e-3 * max(1.0, float(lse.abs().max())))


@given(cases(max_rows=12), MULTIPROCESSORS)
def test_pool_history(case, multiprocessors):
    expected, lse = kernels.pool_history_reference(case.q.double(), case.k.double(), case.n_tokens)
    with unchanged(case.q, case.k), machine(multiprocessors):
        actual = kernels.pool_history(case.q, case.k, case.n_tokens, backend="triton")
    assert actual[0].dtype == actual[1].dtype == torch.float32
    assert_close(actual[0], expected, slack=case.slack, context="pooled")
    assert_close(actual[1], lse, scale=max(1.0, float(lse.abs().max())), slack=case.slack, context="lse")


def test_pool_history_of_a_whole_window():
    """64 rows of a group of 4: several tiles of rows."""
    torch.manual_seed(0)
    q, k = torch.randn(8, 64, 64, device=DEVICE), torch.randn(2, 9, 16, 64, device=DEVICE)
    actual = kernels.pool_history(q.transpose(0, 1).contiguous().transpose(0, 1), k, 133, backend="triton")
    expected = kernels.pool_history_reference(q.double(), k.double(), 133)
    assert_close(actual[0], expected[0])
    assert_close(actual[1], expected[1], scale=10)


# --------------------------------------------------------------------------------------------------------------------
# 2. Convolutional prediction
# --------------------------------------------------------------------------------------------------------------------


PREDICTIONS = 200 if NATIVE else 25  # examples: the interpreter takes a second or two for one
torch.backends.cudnn.allow_tf32 = False  # the references in float32 are to be so


@dataclass
class Window:
    """A ring of history, every column outside the window NaN, and a predictor."""

    history: torch.Tensor  # (heads, H, capacity)
    newest: int
    start: int
    end: int
    weights: dict

    def double(self):
        """History, place and weights for a reference in float64."""
        weights = {name: tensor.double() for name, tensor in self.weights.items()}
        return self.history.double(), self.newest, self.start, self.end, weights

    def scale(self):
        """The largest score, were none of its last terms to cancel another."""
        *image, weights = self.double()
        last = {name: weights[name].abs() for name in ("conv3.weight", "conv3.bias")}
        return float(kernels.predict_reference(*image, weights | last).max())


def draw_weights(generator):
    """A predictor whose layers all matter: neither dead nor linear."""
    shapes = {"conv1": (16, 1, 3, 3), "conv2": (32, 16, 3, 3), "conv3": (1, 32, 1)}
    weights = {}
    for layer, shape in shapes.items():
        weights[f"{layer}.weight"] = torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5
        weights[f"{layer}.bias"] = torch.randn(shape[0], generator=generator) / 4
    return {name: tensor.to(DEVICE) for name, tensor in weights.items()}


def draw_rows(generator, kind, *shape):
    """Pooled attention as it comes: all blocks, a few of them, or something no softmax gives."""
    rows = torch.rand(shape, generator=generator)
    if kind == "sparse":
        rows *= torch.rand(shape, generator=generator) < 0.1
    return rows * {"sparse": 1.0, "dense": 1.0, "tiny": 1e-6, "huge": 1e6}[kind]


TILE_EDGES = st.sampled_from([1, 2, 3, 4, 5, 63, 64, 65, 66, 127, 128, 129])
KINDS = st.sampled_from(["sparse", "dense", "tiny", "huge"])


@st.composite
def windows(draw, min_rows=1):
    heads, history_len = draw(st.integers(1, 2)), draw(st.integers(min_rows, 64 if NATIVE else 11))
    n = draw(TILE_EDGES | st.integers(1, 2000 if NATIVE else 150))
    start, spare = draw(st.integers(0, 5)), draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    history = torch.full((heads, history_len, start + n + spare), float("nan"))
    history[:, :, start : start + n] = draw_rows(generator, draw(KINDS), heads, history_len, n)
    newest = draw(st.integers(0, history_len - 1))
    return Window(history.to(DEVICE), newest, start, start + n, draw_weights(generator))


def naive_convolution(x, weight, bias):
    """3 x 3 cross-correlation with zero padding, tap by tap: (heads, c, H, n) -> (heads, c', H, n)."""
    *_, rows, columns = x.shape
    padded = x.new_zeros(*x.shape[:2], rows + 2, columns + 2)
    padded[..., 1:-1, 1:-1] = x
    out = bias[:, None, None].expand(x.shape[0], -1, rows, columns).clone()
    for dy in range(3):
        for dx in range(3):
            shifted = padded[..., dy : dy + rows, dx : dx + columns]
            out += torch.einsum("oc,hcyx->hoyx", weight[:, :, dy, dx], shifted)
    return out


def naive_contributions(history, newest, start, end, weights):
    """the contributions p: (heads, H, n), rows oldest first."""
    history_len = history.shape[1]
    rows = [history[:, (newest + 1 + r) % history_len, start:end] for r in range(history_len)]
    x = naive_convolution(torch.stack(rows, 1)[:, None], weights["conv1.weight"], weights["conv1.bias"]).clamp(min=0)
    x = naive_convolution(x, weights["conv2.weight"], weights["conv2.bias"]).clamp(min=0)  # (heads, 32, H, n)
    return torch.einsum("c,hcyx->hyx", weights["conv3.weight"][0, :, 0], x)


@given(windows())
def test_predict_reference_is_the_network(window):
    p = naive_contributions(*window.double())
    expected = p.mean(1) + window.weights["conv3.bias"].double()
    assert_close(kernels.predict_reference(*window.double()), expected, scale=1e-6 * window.scale())


@settings(max_examples=PREDICTIONS)
@given(windows(), MULTIPROCESSORS)
def test_predict(window, multiprocessors):
    expected = kernels.predict_reference(*window.double())
    inputs = window.history, window.newest, window.start, window.end, window.weights
    with unchanged(window.history, *window.weights.values()), machine(multiprocessors):
        scores = kernels.predict(*inputs, backend="triton")
    assert scores.dtype == torch.float32
    assert_close(scores, expected, scale=window.scale(), context="scores")


@settings(max_examples=PREDICTIONS // 2)
@given(windows(min_rows=5), st.integers(0, 3), KINDS, SEEDS, MULTIPROCESSORS, st.sampled_from([2, 8]))
def test_predict_incremental(window, growth, kind, seed, multiprocessors, interior_rows):
    """A first call, then one more row, and perhaps more columns: scores, and every p that they leave behind."""
    heads, history_len, capacity = window.history.shape
    pushed = draw_rows(torch.Generator().manual_seed(seed), kind, heads, capacity).to(DEVICE)
    for backend in ("torch", "triton"):
        contributions = poison(*window.history.shape)
        w = Window(window.history.clone(), window.newest, window.start, window.end, window.weights)
        valid_end = w.start
        for step in range(2):
            expected = naive_contributions(*w.double())
            rows = patch.object(kernels, "INTERIOR_ROWS", interior_rows)
            with unchanged(w.history, *w.weights.values()), machine(multiprocessors), rows:
                scores = kernels.predict_incremental(
                    w.history, contributions, w.newest, w.start, w.end, valid_end, w.weights, backend=backend
                )
            context = f"{backend}, step {step}"
            scale = w.scale()
            assert_close(scores, expected.mean(1) + w.weights["conv3.bias"], scale=scale, context=context)
            slots = kernels.window_slots(w.newest, history_len, DEVICE)
            largest = history_len * scale
            assert_close(contributions[:, slots, w.start : w.end], expected, scale=largest, context=f"p, {context}")
            assert contributions[:, :, : w.start].isnan().all() and contributions[:, :, w.end :].isnan().all()
            valid_end, w.end = w.end, min(capacity, w.end + growth)
            w.newest = (w.newest + 1) % history_len
            w.history[:, :, valid_end : w.end] = pushed[:, None, valid_end : w.end] / 2
            w.history[:, w.newest, w.start : w.end] = pushed[:, w.start : w.end]


def test_predict_with_the_bundled_weights():
    """The real predictor, a window of its real length; strided history, as of one layer among several."""
    path = Path(__file__).parent / "weights/predictor.safetensors"
    weights = {name: tensor.to(DEVICE) for name, tensor in load_file(path).items()}
    generator = torch.Generator().manual_seed(0)
    layers = draw_rows(generator, "sparse", 1, 3, 64, 60).to(DEVICE)
    window = Window(layers[:, 1], 17, 4, 57, weights)
    inputs = window.history, 17, 4, 57, weights
    expected, scale = kernels.predict_reference(*window.double()), window.scale()
    assert_close(kernels.predict(*inputs, backend="triton"), expected, scale=scale, context="full")
    contributions = torch.full_like(layers, float("nan"))[:, 1]
    scores = kernels.predict_incremental(*inputs[:1], contributions, *inputs[1:4], 4, weights, backend="triton")
    assert_close(scores, expected, scale=scale, context="incremental")


def test_predict_follows_its_weights():
    """Packed weights are reused as long as they are the same, and no longer."""
    generator = torch.Generator().manual_seed(0)
    history = torch.rand(1, 3, 8, generator=generator).to(DEVICE)
    weights = draw_weights(generator)
    packed = kernels._pack_weights(weights)
    assert kernels._pack_weights(dict(weights)) is packed
    for change in (lambda: weights["conv1.weight"].mul_(2), lambda: weights.update(draw_weights(generator))):
        change()
        window = Window(history, 0, 0, 8, weights)
        scores = kernels.predict(history, 0, 0, 8, weights, backend="triton")
        assert_close(scores, kernels.predict_reference(*window.double()), scale=window.scale())


def test_predictors_refuse_what_they_cannot_do():
    history = torch.rand(2, 6, 9, device=DEVICE)
    weights = draw_weights(torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="newest"):
        kernels.predict(history, 6, 0, 9, weights)
    with pytest.raises(ValueError, match="window"):
        kernels.predict(history, 0, 3, 3, weights)
    with pytest.raises(ValueError, match="window"):
        kernels.predict(history, 0, 0, 10, weights)
    with pytest.raises(ValueError, match="float32"):
        kernels.predict(history.double(), 0, 0, 9, weights, backend="triton")
    with pytest.raises(ValueError, match="side by side"):
        kernels.predict(history.mT, 0, 0, 6, weights, backend="triton")
    with pytest.raises(ValueError, match="float32"):
        kernels.predict(history, 0, 0, 9, weights | {"conv1.bias": weights["conv1.bias"].half()}, backend="triton")
    with pytest.raises(ValueError, match="agree"):
        kernels.predict_incremental(history, history[:, :5], 0, 0, 9, 0, weights)
    with pytest.raises(ValueError, match="history_len"):
        kernels.predict_incremental(history[:, :4], history[:, :4], 0, 0, 9, 0, weights)
    with pytest.raises(ValueError, match="valid_end"):
        kernels.predict_incremental(history, history.clone(), 0, 2, 9, 1, weights)
    with pytest.raises(ValueError, match="k must"):
        kernels.select_blocks(history[:, 0], 10)
    with pytest.raises(ValueError, match="float32"):
        kernels.select_blocks(history[:, 0].half(), 1, backend="triton")


# --------------------------------------------------------------------------------------------------------------------
# 3. Block top-k
# --------------------------------------------------------------------------------------------------------------------


@st.composite
def score_rows(draw):
    """Scores (heads, n): smooth, or with ties, neighbouring floats, infinities, NaN and both zeros."""
    heads, tile = draw(st.integers(1, 3)), kernels.SELECT_TILE
    large = st.sampled_from([tile, tile + 1, 2 * tile + 3] + [65536] * NATIVE)
    n = draw(st.sampled_from([1, 2, 255, 256, 257, 511, 513]) | st.integers(3, 900) | st.integers(257, 900) | large)
    generator = torch.Generator().manual_seed(draw(SEEDS))
    kind = draw(st.sampled_from(["normal", "ties", "zeros", "one value", "neighbours", "special", "bits"]))
    if kind in ("normal", "special"):
        scores = torch.randn(heads, n, generator=generator)
    elif kind == "ties":
        scores = torch.randint(-2, 3, (heads, n), generator=generator) / 4
    elif kind == "zeros":  # of either sign, and all equal
        scores = torch.randint(0, 2, (heads, n), generator=generator) * -0.0
        scores[torch.rand(heads, n, generator=generator) < 0.3] = 0.0
    elif kind == "one value":
        scores = torch.full((heads, n), draw(st.floats(width=32)))
    elif kind == "neighbours":  # equal but for the last digit of the radix
        scores = (torch.randint(0, 4, (heads, n), generator=generator).int() + 0x3F000000).view(torch.float32)
    else:  # any 32 bits: subnormals and every NaN
        scores = torch.randint(-(2**31), 2**31, (heads, n), generator=generator).int().view(torch.float32)
    if kind == "special":
        values = torch.tensor([float("nan"), -float("nan"), float("inf"), -float("inf"), 0.0, -0.0])
        special = values[torch.randint(0, len(values), (heads, n), generator=generator)]
        scores = torch.where(torch.rand(heads, n, generator=generator) < 0.6, special, scores)
    padded = torch.full((heads, n + draw(st.integers(0, 2))), float("inf"))  # a row's end is not the next row's start
    padded[:, :n] = scores
    return padded.to(DEVICE)[:, :n]


def naive_selection(scores, k):
    """Python's own sort, which is stable."""
    best = []
    for row in scores.tolist():
        row = [float("-inf") if x != x else x for x in row]
        best.append(sorted(sorted(range(len(row)), key=lambda n: -row[n])[:k]))  # noqa: B023
    return torch.tensor(best, dtype=torch.int32, device=DEVICE)


@settings(max_examples=200 if NATIVE else 120)
@given(score_rows(), st.data(), st.sampled_from([256, kernels.SELECT_TILE]))
def test_select_blocks(scores, data, tile):
    n = scores.shape[1]
    k = data.draw(st.sampled_from([1, n]) | st.integers(1, n))
    expected = naive_selection(scores, k)
    for backend in ("torch", "triton"):
        with unchanged(scores), patch.object(kernels, "SELECT_TILE", tile):
            blocks = kernels.select_blocks(scores, k, backend=backend)
        assert blocks.dtype == torch.int32
        assert torch.equal(blocks, expected), (backend, scores.shape, k)


# --------------------------------------------------------------------------------------------------------------------
# 2 and 3 over many steps. Rows are pushed, the middle grows past the local window, scores are predicted and blocks
# selected: the incremental prediction, by either backend, must never leave the full one.
# --------------------------------------------------------------------------------------------------------------------


class Decoding(RuleBasedStateMachine):
    @initialize(history_len=st.sampled_from([5, 6, 7, 9]), seed=SEEDS, n=TILE_EDGES, heads=st.integers(1, 2))
    def prefill(self, history_len, seed, n, heads):
        self.generator = torch.Generator().manual_seed(seed)
        history = torch.zeros(heads, history_len, n + 40)
        rows = int(torch.randint(0, history_len + 1, (), generator=self.generator))  # of a short prompt, fewer
        history[:, history_len - rows :, : n + 6] = draw_rows(self.generator, "dense", heads, rows, n + 6)
        weights = draw_weights(self.generator)
        self.window = Window(history.to(DEVICE), history_len - 1, 2, 2 + n, weights)
        self.contributions = {backend: poison(*history.shape) for backend in ("torch", "triton")}
        self.valid_end = self.window.start
        self.score()

    @rule(kind=KINDS, growth=st.sampled_from([0, 0, 0, 1, 1, 2, 5]))
    def step(self, kind, growth):
        w = self.window
        w.newest = (w.newest + 1) % w.history.shape[1]
        w.end = min(w.end + growth, w.history.shape[2] - 4)
        row = draw_rows(self.generator, kind, w.history.shape[0], w.end + 4).to(DEVICE)  # with the local window
        w.history[:, w.newest, : w.end + 4] = row
        self.score()

    def score(self):
        w = self.window
        self.expected, self.scale = kernels.predict_reference(*w.double()), w.scale()
        for backend, contributions in self.contributions.items():
            self.scores = kernels.predict_incremental(
                w.history, contributions, w.newest, w.start, w.end, self.valid_end, w.weights, backend=backend
            )
            assert_close(self.scores, self.expected, scale=self.scale, context=f"incremental, {backend}")
        self.valid_end = w.end

    @rule()
    def predict_in_full(self):
        w = self.window
        scores = kernels.predict(w.history, w.newest, w.start, w.end, w.weights, backend="triton")
        assert_close(scores, self.expected, scale=self.scale, context="full, triton")

    @rule(share=st.floats(0, 1))
    def select(self, share):
        n = self.scores.shape[1]
        k = max(1, round(share * n))
        blocks = kernels.select_blocks(self.scores, k, backend="triton")
        assert torch.equal(blocks, naive_selection(self.scores, k))
        worst = self.expected.gather(1, blocks.long()).amin(
            1
        )  # what was chosen is as good as the best, but for rounding
        best = self.expected.topk(k).values.amin(1)
        assert_close(worst, best, scale=2 * self.scale, context="selection")

    @rule()
    def start_afresh(self):
        """As after a change of the first column: nothing of the ring holds any more."""
        for contributions in self.contributions.values():
            contributions.fill_(float("nan"))
        self.valid_end = self.window.start
        self.score()


test_decoding = Decoding.TestCase
test_decoding.settings = settings(
    settings.get_profile("kernels"),
    max_examples=50 if NATIVE else 6,
    stateful_step_count=40 if NATIVE else 10,
)


# --------------------------------------------------------------------------------------------------------------------
# 4. Sparse flash-decoding
# --------------------------------------------------------------------------------------------------------------------


@st.composite
def selections(draw, case):
    """None, or ascending block lists (heads, A) for Hk or Hq heads, each ending in the last block."""
    heads = draw(st.sampled_from([None, case.k.shape[0], case.q.shape[0]]))
    if heads is None:
        return None
    chosen = draw(st.integers(0, case.n_blocks - 1))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    middle = [torch.randperm(case.n_blocks - 1, generator=generator)[:chosen].sort().values for _ in range(heads)]
    last = torch.full((heads, 1), case.n_blocks - 1)
    return torch.cat([torch.stack(middle), last], 1).int().to(DEVICE)


@st.composite
def slots(draw, blocks, capacity, n_tokens, block_size):
    """row_blocks and n_tokens: nothing new, or as where `blocks` are slots that hold other blocks than their number."""
    if blocks is None or not draw(st.booleans()):
        return None, n_tokens
    generator = torch.Generator().manual_seed(draw(SEEDS))
    heads, listed = blocks.shape
    places = torch.stack([torch.randperm(capacity, generator=generator)[:listed] for _ in range(heads)])
    return places.int().to(DEVICE), listed * block_size - (-n_tokens % block_size)


def poison_unlisted(case, blocks):
    """K and V of the blocks that no query of a KV head attends to become NaN."""
    n_kv_heads, capacity = case.k.shape[:2]
    listed = torch.zeros(blocks.shape[0], capacity, dtype=torch.bool, device=DEVICE)
    listed.scatter_(1, blocks.long(), True)
    unlisted = ~listed.view(n_kv_heads, -1, capacity).any(1)
    case.k[unlisted] = case.v[unlisted] = float("nan")


def naive_sparse_attention(case, blocks, row_blocks):
    """Output, log-sum-exp and history row in float64, from the logits of all tokens, masked."""
    n_heads, _, head_dim = case.q.shape
    n_kv_heads, capacity, block_size, _ = case.k.shape
    heads = n_kv_heads if blocks is None else blocks.shape[0]
    attended = torch.zeros(heads, capacity, dtype=torch.bool, device=DEVICE)
    if blocks is None:
        attended[:, : case.n_blocks] = True
    else:
        attended.scatter_(1, blocks.long(), True)
    attended = attended.repeat_interleave(block_size, 1) & (torch.arange(capacity * block_size) < case.n_tokens).to(
        DEVICE
    )
    out, lse, row = [], [], torch.zeros(heads, capacity, dtype=torch.float64, device=DEVICE)
    for h in range(n_heads):
        kv_head, head = h * n_kv_heads // n_heads, h * heads // n_heads
        k = case.k[kv_head].double().flatten(0, 1)[attended[head]]  # (attended, D)
        v = case.v[kv_head].double().flatten(0, 1)[attended[head]]
        logits = k @ case.q[h, 0].double() / head_dim**0.5
        p = torch.zeros(capacity * block_size, dtype=torch.float64, device=DEVICE)
        p[attended[head]] = logits.softmax(0)
        out.append(logits.softmax(0) @ v)
        lse.append(logits.logsumexp(0))
        block_max = p.view(capacity, block_size).amax(1) / (n_heads // heads)  # (capacity,)
        if row_blocks is None:
            row[head] += block_max
        else:
            row[head, row_blocks[head].long()] += block_max[blocks[head].long()]
    return torch.stack(out), torch.stack(lse), row


@given(cases(), st.data())
def test_sparse_decode_reference_is_masked_attention(case, data):
    blocks = data.draw(selections(case))
    sizes = case.k.shape[1], case.n_tokens, case.k.shape[2]
    row_blocks, n_tokens = data.draw(slots(blocks, *sizes))
    out, lse, row = naive_sparse_attention(case, blocks, row_blocks)
    actual_row = poison(*row.shape, dtype=torch.float64)
    caches = case.k.double(), case.v.double()
    inputs = case.q[:, 0].double(), *caches, blocks, n_tokens
    actual = kernels.sparse_decode_reference(*inputs, actual_row, row_blocks)
    assert_close(actual[0], out, scale=1e-3)
    assert_close(actual[1], lse, scale=1e-3 * max(1.0, float(lse.abs().max())))
    assert_close(actual_row, row, scale=1e-3)


@given(cases(), st.data(), MULTIPROCESSORS, st.booleans())
def test_sparse_decode(case, data, multiprocessors, with_row):
    blocks = data.draw(selections(case))
    q = case.q[:, 0]
    heads, capacity = case.k.shape[:2]
    if blocks is not None:
        poison_unlisted(case, blocks)
        heads = blocks.shape[0]
    caches = case.k.double(), case.v.double()
    row_blocks, n_tokens = data.draw(slots(blocks, capacity, case.n_tokens, case.k.shape[2]))
    expected_row = poison(heads, capacity, dtype=torch.float64)
    inputs = q.double(), *caches, blocks, n_tokens
    out, lse = kernels.sparse_decode_reference(*inputs, expected_row, row_blocks)
    history = poison(heads, 3, capacity)
    row = history[:, 1] if with_row else None
    table = torch.zeros(1, dtype=torch.int32, device=DEVICE) if blocks is None else blocks
    with unchanged(case.q, case.k, case.v, table, history[:, 0], history[:, 2]), machine(multiprocessors):
        inputs = q, case.k, case.v, blocks, n_tokens, row
        actual = kernels.sparse_decode(*inputs, backend="triton", row_blocks=row_blocks)
    assert actual[0].dtype == q.dtype and actual[1].dtype == torch.float32
    largest = float(case.v.double().nan_to_num(0).abs().max())
    assert_close(actual[0], out, q.dtype, scale=largest, slack=case.slack * largest, context="out")
    assert_close(actual[1], lse, scale=max(1.0, float(lse.abs().max())), slack=case.slack, context="lse")
    if with_row:
        assert_close(row, expected_row, slack=case.slack, context="row")
        assert not row[expected_row == 0].any(), "the row must be zero where nothing was attended"


# --------------------------------------------------------------------------------------------------------------------
# 5. Asynchronous copy
# --------------------------------------------------------------------------------------------------------------------


@given(st.data())
def test_copy_blocks(data):
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float64]))
    elements, spare = data.draw(st.integers(1, 2000)), data.draw(st.sampled_from([0, 1, 8]))
    n_blocks, n_slots = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    n = data.draw(st.integers(0, n_slots))
    generator = torch.Generator().manual_seed(data.draw(SEEDS))

    def bits(rows):
        """Rows of random bits, so every kind of NaN is among them; `spare` elements lie between two rows."""
        row = torch.randint(0, 256, (rows, (elements + spare) * dtype.itemsize), generator=generator)
        return row.to(torch.uint8).view(dtype)

    source, destination = bits(n_blocks), bits(n_slots).to(DEVICE)
    if NATIVE:
        source = source.pin_memory()
    source_index = torch.randint(-1, n_blocks, (n,), generator=generator).int()
    source_index[torch.rand(n, generator=generator) < data.draw(st.sampled_from([0.0, 0.5, 0.9]))] = -1
    destination_index = torch.randperm(n_slots, generator=generator)[:n].int()
    expected = destination.cpu().view(torch.uint8)
    for come, go in zip(source_index.tolist(), destination_index.tolist()):
        if come >= 0:
            wanted = slice(0, elements * dtype.itemsize)
            expected[go, wanted] = source.view(torch.uint8)[come, wanted]
    indices = source_index.to(DEVICE), destination_index.to(DEVICE)
    both = {"torch": destination.clone(), "triton": destination}
    for backend, target in both.items():
        with unchanged(source, *indices):
            kernels.copy_blocks(source[:, :elements], target[:, :elements], *indices, backend=backend)
        assert torch.equal(target.cpu().view(torch.uint8), expected), backend


def test_copy_blocks_numbers_rows_across_chunks():
    """More indices than a program looks at in one go, few of them wanted."""
    n = 2500
    source_index = torch.full((n,), -1, dtype=torch.int32)
    wanted = torch.arange(0, n, 97)
    source_index[wanted] = torch.arange(len(wanted), dtype=torch.int32)
    source = torch.arange(3 * len(wanted), dtype=torch.int32).view(-1, 3)
    destination = torch.full((n, 3), -7, dtype=torch.int32)
    expected = destination.clone()
    expected[wanted] = source
    destination = destination.to(DEVICE)
    index = torch.arange(n, dtype=torch.int32)
    kernels.copy_blocks(source.to(DEVICE), destination, source_index.to(DEVICE), index.to(DEVICE), backend="triton")
    assert torch.equal(destination.cpu(), expected)


# --------------------------------------------------------------------------------------------------------------------
# What the launchers refuse, and compiling ahead of time
# --------------------------------------------------------------------------------------------------------------------


def test_launchers_refuse_what_they_cannot_do():
    q, k = torch.randn(4, 2, 64, device=DEVICE), torch.randn(2, 3, 16, 64, device=DEVICE)
    blocks = torch.tensor([[0, 2], [1, 2]], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="backend"):
        kernels.pool_history(q, k, 40, backend="cuda")
    with pytest.raises(ValueError, match="rows"):
        kernels.pool_history(q, k, 1, backend="triton")
    with pytest.raises(ValueError, match="n_tokens"):
        kernels.pool_history(q, k, 49, backend="triton")
    with pytest.raises(ValueError, match="float"):
        kernels.pool_history(q.double(), k.double(), 40, backend="triton")
    with pytest.raises(ValueError, match="share"):
        kernels.sparse_decode(q[:, 0].half(), k, k, blocks, 40, backend="triton")
    with pytest.raises(ValueError, match="contiguous"):
        kernels.sparse_decode(q[:, 0], k.mT.contiguous().mT, k, blocks, 40, backend="triton")
    with pytest.raises(ValueError, match="heads"):
        kernels.sparse_decode(q[:, 0], k, k, blocks[:1], 40, backend="triton")
    with pytest.raises(ValueError, match="row"):
        kernels.sparse_decode(q[:, 0], k, k, blocks, 40, row=q.new_empty(2, 3, 2)[..., 0], backend="triton")
    with pytest.raises(ValueError, match="agree"):
        kernels.copy_blocks(q[0], q[0].half(), blocks[0], blocks[0], backend="triton")
    with patch.object(kernels, "triton", None), pytest.raises(RuntimeError, match="needs Triton"):
        kernels.pool_history(q, k, 40, backend="triton")


SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}  # a program's most
COMPILE = """
import json, sys, kernels
rows = [(model, launch.kernel.__name__, *resources)
        for model, launch, _, resources in kernels.ahead_of_time(sys.argv[1:])]
print(json.dumps({"rows": rows, "kernels": [name for name in vars(kernels) if name.endswith("_kernel")]}))
"""


@pytest.mark.parametrize("target", kernels.TARGETS)
def test_every_kernel_compiles_without_spills(target):
    """In a process of its own, where Triton compiles instead of interpreting."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, target]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    compiled = json.loads(done.stdout)
    assert {kernel for _, kernel, *_ in compiled["rows"]} == set(compiled["kernels"])
    assert {model for model, *_ in compiled["rows"]} == set(kernels.MODELS)
    for model, kernel, registers, spilled, shared in compiled["rows"]:
        assert 0 < registers and shared <= SHARED_MEMORY[target], (model, kernel, registers, shared)
        assert target == "gfx942" or spilled == 0, (model, kernel, spilled)
