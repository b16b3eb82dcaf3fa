"""Every launcher, with both backends, against a float64 reference written here: hypothesis draws shapes and values.

The kernels run natively where there is a GPU, and in Triton's interpreter elsewhere. The interpreter needs about half
a millisecond for each operation of each program, so shapes are small there, and tile sizes are patched small where a
loop must run several times. Fresh memory is poisoned and has guard cells around it; inputs must stay as they are.
"""

import math
import os
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

NATIVE = torch.cuda.is_available()
DEVICE = torch.device("cuda" if NATIVE else "cpu")
if not NATIVE:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton looks at this when it is first imported

import hypothesis.strategies as st  # noqa: E402
from hypothesis import HealthCheck, example, given, settings  # noqa: E402
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule  # noqa: E402

import kernels  # noqa: E402

settings.register_profile(
    "kernels",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=60 if NATIVE else 30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("kernels")
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # log2(0) in the interpreter
torch.backends.cudnn.allow_tf32 = False  # of the torch backend's convolutions

INF, NAN = math.inf, math.nan
EPSILON = {
    torch.float32: 2e-6,
    torch.bfloat16: 4e-3,
    torch.float16: 1e-3,
}  # allowed error relative to the largest value
LSE_ALLOWED = {torch.float32: 2e-5, torch.bfloat16: 1e-4, torch.float16: 1e-4}  # of `attend_padded`
BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])
# dtype, D, b, G: few combinations, because a GPU compiles each of them anew
ATTENTION = st.sampled_from(
    [
        (torch.float32, 16, 8, 1),
        (torch.float32, 64, 16, 3),
        (torch.float32, 32, 64, 2),
        (torch.bfloat16, 128, 16, 4),
        (torch.bfloat16, 16, 8, 17),
        (torch.float16, 64, 32, 7),
    ]
)
SEEDS = st.integers(0, 2**31)
MARGIN = 3  # elements around an embedded tensor, in every dimension


def int32(values):
    return torch.as_tensor(values, dtype=torch.int32, device=DEVICE)


def poisoned(shape, dtype=torch.float32):
    """NaN everywhere, or the lowest integer."""
    bad = NAN if dtype.is_floating_point else torch.iinfo(dtype).min
    return torch.full(shape, bad, dtype=dtype, device=DEVICE)


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


class Embedded:
    """A tensor as a view of a larger, poisoned one, so that it is strided and has guard cells on all sides."""

    def __init__(self, values, margin=MARGIN):
        self.whole = poisoned([n + 2 * margin for n in values.shape], values.dtype)
        self.inner = tuple(slice(margin, margin + n) for n in values.shape)
        self.view = self.whole[self.inner]
        self.view.copy_(values)
        self.before = self.whole.clone()

    def assert_intact(self):
        """Nothing changed but the view itself."""
        self.before[self.inner] = self.view
        assert same_bits(self.whole, self.before), "written out of bounds"


@contextmanager
def guarded(*inputs, **constants):
    """Fresh memory is poisoned and guarded, the inputs must stay, and constants of kernels.py are patched."""
    allocated = []

    def fresh(shape, dtype):
        n = math.prod(shape)
        whole = poisoned((n + 128,), dtype)
        allocated.append((whole, n))
        return whole[64 : 64 + n].view(shape)

    def new_empty(tensor, *shape, dtype=None, device=None):
        return fresh(shape[0] if not isinstance(shape[0], int) else shape, dtype or tensor.dtype)

    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.Tensor, "new_empty", new_empty))
        stack.enter_context(patch.object(torch, "empty", lambda shape, dtype, device: fresh(shape, dtype)))
        stack.enter_context(patch.object(torch, "empty_like", lambda tensor: fresh(tensor.shape, tensor.dtype)))
        for name, value in constants.items():
            stack.enter_context(patch.object(kernels, name, value))
        before = [tensor.clone() for tensor in inputs]
        yield
    for tensor, old in zip(inputs, before):
        assert same_bits(tensor, old), "an input was changed"
    for whole, n in allocated:
        guards = torch.cat([whole[:64], whole[64 + n :]])
        assert same_bits(guards, poisoned(guards.shape, guards.dtype)), "written out of bounds"


def processors(n):
    """A machine of n multiprocessors, with small tiles of K and V in the interpreter: many splits."""
    return dict(n_multiprocessors=lambda device: n) | ({} if NATIVE else dict(TILE_BYTES=1024))


def assert_close(actual, expected, allowed, context=""):
    """Each value is within `allowed` of the expected one; NaN never is, and infinity equals only itself."""
    assert actual.shape == expected.shape, (context, actual.shape, expected.shape)
    error = (actual.double() - expected).abs()
    bad = ~((error <= allowed) | (actual == expected))
    at = bad.nonzero()[:1].tolist()
    assert not bad.any(), f"{context}: {int(bad.sum())} of {bad.numel()} are off, the first at {at}: {actual[bad][:1]}"


def normal(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def rounding(*tensors, head_dim):
    """What float32 costs in a logit, and hence in a probability: the largest possible |q k| / sqrt(D) times 2^-22."""
    q, k = (tensor.double().nan_to_num(0).flatten(0, -2).abs().amax(0) for tensor in tensors)
    return float(q @ k) * head_dim**-0.5 * 2**-22


# --------------------------------------------------------------------------------------------------------------------
# 1. History pooling
# --------------------------------------------------------------------------------------------------------------------


def naive_pool(q, k, n_tokens, stride):
    """A softmax for each row over the keys that it sees, in float64; the largest probability of each block."""
    n_heads, rows, head_dim = q.shape
    n_kv_heads, _, block_size, _ = k.shape
    pooled = torch.zeros(n_heads, rows, -(-n_tokens // block_size), dtype=torch.float64, device=DEVICE)
    lse = torch.zeros(n_heads, rows, dtype=torch.float64, device=DEVICE)
    for h in range(n_heads):
        keys = k[h * n_kv_heads // n_heads].double().flatten(0, 1)  # (capacity * b, D)
        for r in range(rows):
            logits = keys[: n_tokens - (rows - 1 - r) * stride] @ q[h, r].double() / head_dim**0.5
            lse[h, r] = logits.logsumexp(0)
            for n, part in enumerate(logits.softmax(0).split(block_size)):
                pooled[h, r, n] = part.max()
    return pooled, lse


@BACKENDS
@given(
    ATTENTION, st.integers(1, 3), st.integers(1, 200), st.integers(1, 12), st.integers(1, 7), st.booleans(), SEEDS,
    st.sampled_from([1, 3, 8]),
)  # fmt: skip
@example((torch.float32, 16, 8, 1), 3, 1, 1, 1, False, 0, 8)  # a single token
@example((torch.float32, 16, 8, 1), 1, 48, 2, 1, False, 0, 8)  # one key is in the future of one row
@example((torch.float32, 64, 16, 3), 2, 133, 12, 11, False, 0, 3)  # 36 rows: ragged tiles of rows; all of the text
@example((torch.bfloat16, 16, 8, 17), 1, 90, 5, 1, True, 0, 8)  # 85 rows
@example((torch.float32, 16, 8, 1), 1, 1100, 2, 9, False, 0, 8)  # more blocks than one tile of the normalisation
def test_pool_history(backend, combination, n_kv_heads, n_tokens, rows, stride, large, seed, n_processors):
    dtype, head_dim, block_size, group = combination
    rows = min(rows, (n_tokens - 1) // stride + 1)
    n_blocks = -(-n_tokens // block_size)
    q = normal(seed, rows, n_kv_heads * group, head_dim, dtype=dtype) * (3e3 if large else 1)
    q = Embedded(q, margin=8).view.transpose(0, 1)  # (Hq, rows, D), not contiguous
    k = Embedded(normal(seed + 1, n_kv_heads, n_blocks + 2, block_size, head_dim, dtype=dtype)).view
    token = torch.arange((n_blocks + 2) * block_size, device=DEVICE).view(-1, block_size, 1)
    k.masked_fill_(token >= n_tokens, NAN)  # must not matter
    expected, lse = naive_pool(q, k, n_tokens, stride)
    with guarded(q, k, **processors(n_processors), POOL_CHUNK_HEADS=2, POOL_CHUNK_TOKENS=3 * block_size):
        actual = kernels.pool_history(q, k, n_tokens, stride, backend)
    slack = rounding(q, k[:, :n_blocks].masked_fill(token[:n_blocks] >= n_tokens, 0), head_dim=head_dim)
    assert actual[0].dtype == actual[1].dtype == torch.float32
    assert_close(actual[0], expected, 2e-6 + slack, "pooled")
    assert_close(actual[1], lse, 2e-6 * max(1, float(lse.abs().max())) + slack, "lse")


# --------------------------------------------------------------------------------------------------------------------
# 2. Prediction
# --------------------------------------------------------------------------------------------------------------------


def draw_weights(seed):
    """A state dict whose layers all matter: neither dead nor linear."""
    shapes = {"conv1": (16, 1, 3, 3), "conv2": (32, 16, 3, 3), "conv3": (1, 32, 1)}
    weights = {}
    for layer, shape in shapes.items():
        weights[f"{layer}.weight"] = normal(seed + len(weights), *shape) / math.prod(shape[1:]) ** 0.5
        weights[f"{layer}.bias"] = normal(seed + len(weights), shape[0]) / 4
    return weights


def naive_contributions(image, weights):
    """p (heads, H, n) of an image (heads, H, n), in float64; and what it would be if none of its terms cancelled."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = F.conv2d(image.double()[:, None], w["conv1.weight"], w["conv1.bias"], padding=1).relu()  # (heads, 16, H, n)
    x = F.conv2d(x, w["conv2.weight"], w["conv2.bias"], padding=1).relu()  # (heads, 32, H, n)
    w3 = w["conv3.weight"][0, :, 0]  # (32,)
    return torch.einsum("c,hcrn->hrn", w3, x), torch.einsum("c,hcrn->hrn", w3.abs(), x)


class Decoding:
    """A ring of history into which rows are pushed and whose image grows by columns; p and scores are compared."""

    def __init__(self, backend, dtype, heads, history_len, start, n, seed):
        self.backend, self.heads, self.start, self.end = backend, heads, start, start + n
        self.generator = torch.Generator().manual_seed(seed)
        self.newest, self.valid_end = seed % history_len, start
        capacity = self.end + 12
        self.window = self.draw_rows(history_len, capacity)  # (heads, H, capacity), oldest row first
        self.history = Embedded(poisoned((heads, history_len, capacity), dtype))
        self.p = Embedded(poisoned((heads, history_len, capacity), dtype), margin=2)  # strides unlike the history's
        self.state_dict = draw_weights(seed)
        self.weights = kernels.prepare_weights(self.state_dict, DEVICE)

    def draw_rows(self, rows, capacity):
        """Some rows are sparse, as sparse attention leaves them, some dense."""
        values = torch.rand(self.heads, rows, capacity, generator=self.generator)
        kept = (
            torch.rand(values.shape, generator=self.generator) < torch.tensor([0.2, 1.0])[torch.arange(rows) % 2, None]
        )
        return (values * kept).to(DEVICE)

    def step(self, new_rows, growth, invalidate=False, **constants):
        _, history_len, capacity = self.window.shape
        self.window = torch.cat([self.window, self.draw_rows(new_rows, capacity)], 1)[:, new_rows:]
        self.newest = (self.newest + new_rows) % history_len
        self.end = min(self.end + growth, capacity - 1)
        image = self.window[:, :, self.start : self.end].to(self.history.view.dtype)
        slots = (torch.arange(history_len) + self.newest + 1) % history_len
        self.history.view.fill_(NAN)
        self.history.view[:, slots, self.start : self.end] = image
        if invalidate:
            self.valid_end = self.start
        window = self.newest, new_rows, self.start, self.end, self.valid_end
        with guarded(self.history.whole, *self.weights.values(), **constants):
            scores = kernels.predict(self.history.view, self.p.view, *window, self.weights, self.backend)
        self.valid_end = self.end

        p, without_cancelling = naive_contributions(image, self.state_dict)
        largest = without_cancelling.max()
        allowed = (2e-6 if self.p.view.dtype == torch.float32 else 6e-4) * (1 + largest)
        self.p.assert_intact()
        columns = self.p.view[:, :, : self.start], self.p.view[:, :, self.end :]
        assert all(outside.isnan().all() for outside in columns), "p written outside of the image"
        assert_close(self.p.view[:, slots, self.start : self.end], p, allowed, "p")
        assert scores.dtype == torch.float32
        assert_close(scores, p.mean(1) + self.state_dict["conv3.bias"], allowed, "scores")


@BACKENDS
@settings(max_examples=12)
@given(
    st.sampled_from([torch.float32, torch.float16]), st.integers(1, 2), st.integers(5, 9), st.integers(0, 4),
    st.sampled_from([1, 2, 3, 4, 5, 6, 17, 63, 64, 65]), SEEDS,
    st.lists(st.tuples(st.integers(0, 6), st.sampled_from([0, 0, 1, 1, 2, 5])), min_size=1, max_size=3),
)  # fmt: skip
@example(torch.float32, 1, 9, 1, 3, 0, [(1, 1), (1, 0), (4, 1), (2, 2)])  # starts narrower than a convolution
@example(torch.float32, 1, 8, 0, 126, 1, [(3, 5), (4, 0)])  # grows past a tile; new_rows = H - 5 and H - 4
@example(torch.float16, 3, 6, 2, 9, 2, [(0, 0), (0, 3), (1, 1), (6, 1), (1, 0)])  # nothing new; a whole window
def test_predict_over_many_steps(backend, dtype, heads, history_len, start, n, seed, steps):
    decoding = Decoding(backend, dtype, heads, history_len, start, n, seed)
    constants = dict(ROWS_PER_PROGRAM=3, PREDICT_CELLS=90, n_multiprocessors=lambda device: 1 + seed % 4)
    decoding.step(0, 0, **constants)
    for new_rows, growth in steps:
        decoding.step(new_rows, growth, **constants)
    assert_close(  # the reference to learn from is the same network
        kernels.predict_reference(decoding.history.view, decoding.newest, start, decoding.end, decoding.weights),
        naive_contributions(decoding.window[:, :, start : decoding.end].to(dtype), decoding.state_dict)[0].mean(1)
        + decoding.state_dict["conv3.bias"],
        1e-5,
    )


def test_predict_a_long_window():
    """Ragged tiles in the mean over rows, and in a program's rows."""
    decoding = Decoding("triton", torch.float32, 1, 19, 0, 5, 0)
    for step in range(3):
        decoding.step(2, 1, invalidate=step == 1)


def test_predict_multiply_adds():
    """Cells counted by hand: 144 multiply-adds in conv1, 4,608 in conv2 and 32 in conv3."""
    conv1, conv2 = 144, 4608 + 32

    def count(new_rows, valid_end, history_len=8, end=13):
        return kernels.predict_multiply_adds(2, history_len, new_rows, 3, end, valid_end)

    assert count(0, 3) == 2 * (80 * conv1 + 80 * conv2)  # nothing is valid: 8 x 10 cells
    assert count(4, 13) == count(0, 3) != count(3, 13)  # with H - 4 new rows, no kept row is left
    edges = (3 + 4) * 10 * conv1 + (2 + 3) * 10 * conv2  # rows 0-1 need rows 0-2 of conv1, rows 5-7 need rows 4-7
    assert count(1, 13) == 2 * edges
    assert count(1, 11) == 2 * (edges + 5 * 5 * conv1 + 3 * 4 * conv2)  # and rows 2-4 of the last 2 + 2 columns
    assert count(1, 6) == 2 * (edges + 5 * 10 * conv1 + 3 * 10 * conv2)  # too few valid columns to keep any


# --------------------------------------------------------------------------------------------------------------------
# 3. Block selection
# --------------------------------------------------------------------------------------------------------------------


def draw_scores(kind, rows, n, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([NAN, -NAN, INF, -INF, 0.0, -0.0])
    if kind == "normal":
        return torch.randn(rows, n, generator=generator)
    if kind == "ties":
        return torch.randint(-2, 3, (rows, n), generator=generator) / 4
    if kind == "one value":
        return values[seed % len(values)].expand(rows, n).clone()
    if kind == "neighbours":  # equal but for the last two bits
        return (torch.randint(0, 4, (rows, n), generator=generator).int() + 0x3F000000).view(torch.float32)
    if kind == "bits":  # any 32 bits: subnormals and every NaN
        return torch.randint(-(2**31), 2**31, (rows, n), generator=generator).int().view(torch.float32)
    special = values[torch.randint(0, len(values), (rows, n), generator=generator)]
    return torch.where(
        torch.rand(rows, n, generator=generator) < 0.6, special, torch.randn(rows, n, generator=generator)
    )


KINDS = ["normal", "ties", "one value", "neighbours", "bits", "special"]


def naive_selection(scores, k):
    """Python's own sort, which is stable."""
    best = []
    for row in scores.tolist():
        row = [-INF if x != x else x for x in row]
        best.append(sorted(sorted(range(len(row)), key=lambda n: -row[n])[:k]))  # noqa: B023
    return int32(best)


@BACKENDS
@settings(max_examples=40)
@given(
    st.sampled_from(KINDS), st.integers(1, 3), st.sampled_from([1, 2, 255, 256, 257, 512]) | st.integers(3, 700),
    st.floats(0, 1), SEEDS,
)  # fmt: skip
@example("ties", 2, 700, 0.5, 0)  # ties across three tiles
@example("special", 2, 600, 1.0, 1)  # k = n
@example("special", 2, 600, 0.4, 1)  # the last one is 0.0 or -0.0
@example("normal", 2, 513, 0.0, 2)  # k = 1
@example("one value", 1, 600, 0.6, 0)  # all NaN
@example("one value", 1, 300, 0.9, 3)  # all -inf
@example("one value", 2, 600, 0.7, 5)  # all -0.0
def test_select_blocks(backend, kind, rows, n, share, seed):
    scores = Embedded(draw_scores(kind, rows, n, seed).to(DEVICE))
    scores.whole.nan_to_num_(INF)  # the guards would be chosen first
    scores.view.copy_(draw_scores(kind, rows, n, seed))
    k = max(1, round(share * n))
    with guarded(scores.whole, SELECT_TILE=256):
        blocks = kernels.select_blocks(scores.view, k, backend)
    assert blocks.dtype == torch.int32 and torch.equal(blocks, naive_selection(scores.view, k)), (kind, n, k)


@BACKENDS
def test_select_blocks_of_a_whole_layer(backend):
    """Several tiles of the real size, one score of which is shared by many blocks."""
    scores = (normal(0, 1, 2 * kernels.SELECT_TILE + 77) * 20).round()
    for k in (5, 3000):
        assert torch.equal(kernels.select_blocks(scores, k, backend), naive_selection(scores, k))


# --------------------------------------------------------------------------------------------------------------------
# 4. Sparse flash-decoding
# --------------------------------------------------------------------------------------------------------------------


class Lists:
    """Ragged lists in a larger table: between them lie entries of no list, which must not be looked at."""

    def __init__(self, lengths, n_pool, block_size, seed):
        generator = torch.Generator().manual_seed(seed)
        blocks = [-(-length // block_size) for length in lengths]
        gaps = [int(torch.randint(0, 4, (), generator=generator)) for _ in lengths]
        order = torch.randperm(len(lengths), generator=generator).tolist()  # lists may lie in any order in the table
        starts, used = [0] * len(lengths), 0
        for h in order:
            starts[h] = used + gaps[h]
            used = starts[h] + blocks[h]
        self.table = torch.full((used + 2,), 2**30)  # an address out of bounds
        self.listed = torch.zeros(len(lengths), used + 2, dtype=torch.bool, device=DEVICE)  # (heads, A)
        for h, start in enumerate(starts):
            self.table[start : start + blocks[h]] = torch.randperm(n_pool, generator=generator)[: blocks[h]]
            self.listed[h, start : start + blocks[h]] = True
        whole = int32(torch.cat([self.table, self.table]))
        self.table = whole[: len(self.table)]  # a slice of a larger table
        self.starts, self.lengths = int32(starts), int32(lengths)


def naive_sparse_decode(q, k, v, lists):
    """One softmax a query, over the tokens of its list, in float64; each block's largest logit (G, A), or NaN."""
    heads, (_, block_size, head_dim) = len(lists.starts), k.shape
    group = len(q) // heads
    out = torch.zeros(q.shape, dtype=torch.float64, device=DEVICE)
    lse = torch.full((len(q),), -INF, dtype=torch.float64, device=DEVICE)
    block_max = torch.full((group, len(lists.table)), NAN, dtype=torch.float64, device=DEVICE)
    for h in range(heads):
        length, places = int(lists.lengths[h]), lists.listed[h].nonzero()[:, 0].tolist()
        if not places:
            continue
        blocks = lists.table[places].long()
        keys, values = (pool[blocks].double().flatten(0, 1)[:length] for pool in (k, v))  # (length, D)
        for g in range(group):
            logits = keys @ q[h * group + g].double() / head_dim**0.5
            out[h * group + g] = logits.softmax(0) @ values
            lse[h * group + g] = logits.logsumexp(0)
            for place, part in zip(places, logits.split(block_size)):
                block_max[g, place] = part.max()
    return out, lse, block_max


def check_sparse_decode(backend, combination, lengths, large, seed, n_processors, interleaved=True, merge_tile=2):
    dtype, head_dim, block_size, group = combination
    n_pool = max(1, *(-(-length // block_size) for length in lengths)) + 2
    lists = Lists(lengths, n_pool, block_size, seed)
    q = Embedded(normal(seed, len(lengths) * group, head_dim, dtype=dtype) * (3e3 if large else 1)).view
    kv = normal(seed + 1, n_pool, 2, block_size, head_dim, dtype=dtype)  # an offloaded block's K and V lie together
    k, v = kv.unbind(1) if interleaved else kv.transpose(0, 1).contiguous().unbind(0)
    unlisted = torch.ones(n_pool, dtype=torch.bool, device=DEVICE)
    unlisted[lists.table[lists.listed.any(0)].long()] = False
    kv[unlisted] = NAN
    expected = naive_sparse_decode(q, k, v, lists)
    block_max = Embedded(poisoned((group, len(lists.table))))
    inputs = q, kv, lists.table, lists.starts, lists.lengths
    with guarded(*inputs, **processors(n_processors), MERGE_TILE=merge_tile):
        out, lse = kernels.sparse_decode(
            q, k, v, lists.table, lists.starts, lists.lengths, block_max.view, backend=backend
        )
    block_max.assert_intact()
    if backend == "torch":
        without = kernels.sparse_decode(q, k, v, lists.table, lists.starts, lists.lengths, None)
    slack, largest = rounding(q, k, head_dim=head_dim), float(v.double().nan_to_num(0).abs().max())
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_close(out, expected[0], EPSILON[dtype] * largest + slack * largest, "out")
    assert_close(lse, expected[1], 2e-6 * 10 + slack, "lse")
    if backend == "torch":
        assert_close(without[0], expected[0], 2 * EPSILON[dtype] * largest + slack * largest, "out without block_max")
        assert_close(without[1], expected[1], LSE_ALLOWED[dtype] + slack, "lse without block_max")
    listed = lists.listed.any(0)
    assert block_max.view[:, ~listed].isnan().all(), "block_max written outside of the lists"
    assert_close(block_max.view[:, listed], expected[2][:, listed], 1e-5 + slack, "block_max")


@BACKENDS
@given(
    ATTENTION, st.lists(st.sampled_from([0, 1, 200]) | st.integers(0, 200), min_size=1, max_size=5), st.booleans(),
    SEEDS, st.sampled_from([1, 2, 4]), st.booleans(),
)  # fmt: skip
@example((torch.float32, 16, 8, 1), [0], False, 0, 1, False)  # nothing at all
@example((torch.float32, 16, 8, 1), [0, 500, 1, 0, 33], False, 1, 4, True)  # uneven: 6 splits in merge tiles of 2
@example((torch.bfloat16, 16, 8, 17), [450], True, 2, 4, True)  # one head, more queries than a tile pads to
@example((torch.float32, 32, 64, 2), [320, 64, 65, 63, 0], False, 3, 2, False)  # full and ragged blocks
def test_sparse_decode(backend, combination, lengths, large, seed, n_processors, interleaved):
    check_sparse_decode(backend, combination, lengths, large, seed, n_processors, interleaved)


def test_sparse_decode_with_more_splits_than_a_merge_tile():
    """35 splits of one list and the real tile of 32: an H100 gives each head of Llama-3.1-8B 33 splits."""
    with patch.object(kernels, "DECODE_PROGRAMS_PER_MULTIPROCESSOR", 9):
        check_sparse_decode("triton", (torch.float32, 16, 8, 1), [35 * 32], False, 0, n_processors=4, merge_tile=32)


@pytest.mark.skipif(NATIVE, reason="attend_padded is a CPU's")
@given(
    ATTENTION, st.lists(st.tuples(st.integers(1, 90), st.integers(0, 3)), min_size=1, max_size=4), st.booleans(), SEEDS
)
@example((torch.bfloat16, 16, 8, 17), [(1, 0), (90, 2)], True, 0)
@example((torch.float32, 16, 8, 1), [(64, 3), (1, 0), (65, 1)], False, 1)
def test_attend_padded(combination, lists, large, seed):
    """Lists with blocks to spare after their last token: what these hold must not matter, as long as it is finite."""
    dtype, head_dim, block_size, group = combination
    lengths = [length for length, _ in lists]
    sizes = [-(-length // block_size) + spare for length, spare in lists]  # blocks
    q = Embedded(normal(seed, len(lists) * group, head_dim, dtype=dtype) * (3e3 if large else 1)).view
    kv = normal(seed + 1, sum(sizes) + 2, 2, block_size, head_dim, dtype=dtype)
    slack, largest = rounding(q, kv[:, 0], head_dim=head_dim), float(kv.abs().max())
    order = torch.randperm(len(kv), generator=torch.Generator().manual_seed(seed)).int()
    *blocks, unlisted = order.split([*sizes, 2])
    expected = []
    for queries, own, length in zip(q.double().split(group), blocks, lengths):
        k, v = kv[own].transpose(0, 1).double().flatten(1, 2)[:, :length]  # (length, D) each
        logits = queries @ k.mT / head_dim**0.5  # (G, length)
        expected.append((logits.softmax(-1) @ v, logits.logsumexp(-1)))
        after = torch.arange(len(own) * block_size).view(-1, 1, block_size, 1) >= length  # (blocks, 1, b, 1)
        kv[own] = kv[own].masked_fill(after, 1e4)
    kv[unlisted] = NAN
    address = kernels.pad_lists(blocks)
    assert address.shape == (len(lists), max(sizes)) and address.dtype == torch.int32
    mask = kernels.length_mask(int32(lengths), max(sizes) * block_size)
    with guarded(q, kv, address, mask):
        out, lse = kernels.attend_padded(q, *kv.unbind(1), address, mask)
    expected_out, expected_lse = (torch.cat(parts) for parts in zip(*expected))  # (Hq, D), (Hq,)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_close(out, expected_out, 2 * EPSILON[dtype] * largest + slack * largest, "out")
    assert_close(lse, expected_lse, LSE_ALLOWED[dtype] + slack, "lse")


@BACKENDS
@given(ATTENTION, st.lists(st.integers(1, 70), min_size=1, max_size=3), st.sampled_from([1, 2, 3]), SEEDS)
def test_append_token(backend, combination, lengths, shared, seed):
    """Each of `shared` lists in a row gets the same key and value, behind its last token; all else stays."""
    dtype, head_dim, block_size, _ = combination
    lengths, n_kv_heads = [n for n in lengths for _ in range(shared)], len(lengths)
    n_blocks = sum(-(-length // block_size) for length in lengths)
    lists = Lists(lengths, n_blocks, block_size, seed)
    order = int32(torch.randperm(n_blocks, generator=torch.Generator().manual_seed(seed)))
    lists.table[lists.listed.any(0)] = order  # no block is in two lists
    pool = Embedded(normal(seed, n_blocks, 2, block_size, head_dim, dtype=dtype))
    k, v = (Embedded(normal(seed + 1 + i, n_kv_heads, head_dim, dtype=dtype), margin=MARGIN + i) for i in range(2))
    expected = pool.view.clone()
    for h, length in enumerate(lengths):
        block = lists.table[lists.starts[h] + (length - 1) // block_size]
        for i in range(2):
            expected[block, i, (length - 1) % block_size] = (k, v)[i].view[h // shared]
    with guarded(k.whole, v.whole, lists.table, lists.starts, lists.lengths):
        pools = pool.view.unbind(1)
        kernels.append_token(k.view, v.view, *pools, lists.table, lists.starts, lists.lengths, backend=backend)
    pool.assert_intact()
    assert same_bits(pool.view, expected)


@BACKENDS
@given(
    st.lists(st.sampled_from([0, 1]) | st.integers(0, 300), min_size=1, max_size=4), st.sampled_from([1, 3, 4, 17]),
    st.sampled_from([torch.float32, torch.float16]), SEEDS,
)  # fmt: skip
@example([0, 0], 3, torch.float32, 0)
@example([2200, 0, 7], 3, torch.float16, 1)  # more than four tiles of 64 blocks
def test_write_rows(backend, lengths, group, dtype, seed):
    block_size, capacity = 8, 290
    lists = Lists(lengths, capacity - 3, block_size, seed)
    columns = lists.table.where(lists.listed.any(0), int32(capacity + 1000))
    block_max = Embedded(normal(seed, group, len(lists.table)) * 3)
    block_max.view.masked_fill_(~lists.listed.any(0), NAN)
    lse = normal(seed + 1, len(lengths) * group) + 5
    ring = Embedded(poisoned((len(lengths), 3, capacity), dtype))  # rows is one row of a ring
    expected = torch.zeros(len(lengths), capacity, dtype=torch.float64, device=DEVICE)
    for h in range(len(lengths)):
        for place in lists.listed[h].nonzero()[:, 0].tolist():
            p = (block_max.view[:, place].double() - lse.view(-1, group)[h].double()).exp()
            expected[h, columns[place]] = p.mean()
    inputs = (
        block_max.whole,
        lse,
        columns,
        lists.starts,
        lists.lengths,
        ring.whole[:, MARGIN],
        ring.whole[:, MARGIN + 2],
    )
    with guarded(*inputs):
        arguments = block_max.view, lse, columns, lists.starts, lists.lengths, ring.view[:, 1], block_size
        assert kernels.write_rows(*arguments, backend=backend) is None
    ring.assert_intact()
    rounded = 1e-6 if dtype == torch.float32 else 6e-4
    assert_close(ring.view[:, 1], expected, rounded * (1 + expected), "rows")
    assert not ring.view[:, 1][expected == 0].any(), "a row must be zero where nothing was attended"


# --------------------------------------------------------------------------------------------------------------------
# 5. Copying
# --------------------------------------------------------------------------------------------------------------------


class Slots(RuleBasedStateMachine):
    """Blocks wanted again and again, against a dictionary from slots to blocks for each row."""

    @initialize(
        rows=st.integers(1, 3), k=st.sampled_from([1, 2, 3, 15, 16, 17, 40]), spare=st.integers(0, 9), seed=SEEDS
    )
    def empty_slots(self, rows, k, spare, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.k, self.spare = k, spare
        self.held = [{slot: -1 for slot in range(k + spare)} for _ in range(rows)]
        if seed % 2:  # the slots as some earlier selection left them, in any order
            for held in self.held:
                blocks = torch.randperm(3 * k, generator=self.generator)[:k].tolist() + [-1] * spare
                held.update(enumerate(blocks[i] for i in torch.randperm(k + spare, generator=self.generator)))

    @rule(share=st.sampled_from([0.0, 0.3, 0.9, 1.0]), spread=st.sampled_from([1, 2, 5]))
    def want(self, share, spread):
        """Any blocks, no more of them new than there are empty slots."""
        wanted = torch.full((len(self.held), self.k), -1)
        for row, held in zip(wanted, self.held):
            blocks = torch.randperm(self.k * spread, generator=self.generator)[: int(share * self.k)]
            new = [block for block in blocks.tolist() if block not in held.values()]
            refused = new[list(held.values()).count(-1) :]
            row[: len(blocks)] = torch.where(torch.isin(blocks, torch.tensor(refused, dtype=torch.int64)), -1, blocks)
            row.copy_(row[torch.randperm(self.k, generator=self.generator)])
        self.check(int32(wanted))

    @rule()
    def want_the_same_in_another_order(self):
        wanted = [[block for block in held.values() if block >= 0] for held in self.held]
        wanted = [blocks + [-1] * (self.k - len(blocks)) for blocks in wanted]
        order = torch.randperm(self.k, generator=self.generator).tolist()
        self.check(int32([[blocks[i] for i in order] for blocks in wanted]))

    def check(self, wanted):
        before = int32([list(held.values()) for held in self.held])
        expected_slots, expected_fetch = torch.full_like(wanted, -1), torch.full_like(wanted, -1)
        for row, (held, blocks) in enumerate(zip(self.held, wanted.tolist())):
            slot_of = {block: slot for slot, block in held.items() if block >= 0}
            empty = [slot for slot, block in held.items() if block < 0]
            for i, block in enumerate(blocks):
                if block >= 0:
                    if block not in slot_of:
                        slot_of[block], expected_fetch[row, i] = empty.pop(0), block
                        held[slot_of[block]] = block
                    expected_slots[row, i] = slot_of[block]
            held.update({slot: -1 for slot, block in held.items() if block not in blocks})
        after = int32([list(held.values()) for held in self.held])
        for backend in ("torch", "triton"):
            with guarded(wanted, before, ASSIGN_CELLS=256):  # 16 slots at once, or fewer
                slots, fetch, new_held = kernels.assign_slots(wanted, before, backend)
            assert slots.dtype == fetch.dtype == new_held.dtype == torch.int32
            assert torch.equal(slots, expected_slots), backend
            assert torch.equal(fetch, expected_fetch), backend
            assert torch.equal(new_held, after), backend


test_assign_slots = Slots.TestCase
test_assign_slots.settings = settings(settings.get_profile("kernels"), max_examples=25, stateful_step_count=8)


@BACKENDS
def test_assign_many_slots(backend):
    """2,048 blocks, half of them new, and as many spare slots; and rows of nothing."""
    held = int32(F.pad(torch.randperm(2048, generator=torch.Generator().manual_seed(0))[None], (0, 1024), value=-1))
    wanted = (held[:, :2048].flip(1) + 1024).contiguous()
    cells = {} if NATIVE else dict(ASSIGN_CELLS=2**18)  # few turns; such a tile takes a GPU's compiler a minute
    with guarded(wanted, held, **cells):
        slots, fetch, new_held = kernels.assign_slots(wanted, held, backend)
    assert torch.equal(new_held[0, slots[0].long()], wanted[0])
    assert torch.equal(fetch >= 0, wanted >= 2048) and torch.equal(fetch[fetch >= 0], wanted[wanted >= 2048])
    assert torch.equal(new_held[0, held[0] >= 1024], held[0, held[0] >= 1024]), "a wanted block left its slot"
    assert (new_held >= 0).sum() == 2048, "a block that nobody wants kept its slot"
    empty = int32(torch.zeros(4, 0))
    assert all(result.shape[0] == 4 for result in kernels.assign_slots(empty, held[:, :9].expand(4, 9), backend))
    assert (kernels.assign_slots(empty, held[:, :9].expand(4, 9), backend)[2] == -1).all()


def random_bits(generator, rows, elements, dtype):
    """Every kind of NaN is among them."""
    bits = torch.randint(0, 256, (rows, elements * dtype.itemsize), generator=generator).to(torch.uint8)
    return bits.view(dtype).to(DEVICE)


@BACKENDS
@given(
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float64]),
    st.sampled_from([1, 2, 3, 16, 31, 33, 64, 1025]) | st.integers(1, 100), st.integers(0, 30),
    st.sampled_from([0.0, 0.4, 1.0]), st.sampled_from([0, 1, 8]), st.sampled_from([0, 1, 2, 7]), SEEDS,
)  # fmt: skip
@example(torch.float16, 1500, 30, 0.5, 1, 0, 0)  # odd: moved by 2 bytes, in two tiles a row; two chunks of indices
@example(torch.bfloat16, 2048, 20, 0.0, 8, 0, 1)  # nothing to copy
@example(torch.int8, 4096, 3, 1.0, 8, 0, 2)  # fewer tiles than programs
@example(torch.float64, 7, 100, 0.1, 3, 3, 3)
@example(
    torch.float16, 6, 5, 1.0, 0, 2, 4
)  # a row's length is less aligned than its start  # several chunks, most of them empty
def test_copy_blocks(backend, dtype, elements, n, share, left, right, seed):
    generator = torch.Generator().manual_seed(seed)
    source = random_bits(generator, 7, left + elements + right, dtype)[:, left : left + elements]
    whole = random_bits(generator, n + 4, left + elements + right, dtype)
    destination = whole[1 : n + 3, left : left + elements]  # (n + 2, elements)
    source_index = torch.randint(0, 7, (n,), generator=generator)
    source_index[torch.rand(n, generator=generator) >= share] = -1
    destination_index = torch.randperm(n + 2, generator=generator)[:n]
    expected = whole.clone()
    for i, j in zip(source_index.tolist(), destination_index.tolist()):
        if i >= 0:
            expected[1 + j, left : left + elements] = source[i]
    indices = int32(source_index), int32(destination_index)
    if NATIVE:
        source = source.cpu().pin_memory()
    with guarded(source, *indices, COPY_CHUNK=16, COPY_PROGRAMS=3):
        kernels.copy_blocks(source, destination, *indices, backend=backend)
    assert same_bits(whole, expected)


@BACKENDS
def test_copy_blocks_with_the_real_chunks(backend):
    """More indices than a program looks at in one go, few of them to be copied."""
    n = 2500
    copied = torch.arange(0, n, 97)
    source = int32(torch.arange(3 * len(copied)).view(-1, 3))
    source_index = torch.full((n,), -1)
    source_index[copied] = torch.arange(len(copied))
    destination, expected = (torch.full((n, 3), -7, dtype=torch.int32, device=DEVICE) for _ in range(2))
    expected[copied.to(DEVICE)] = source
    kernels.copy_blocks(source, destination, int32(source_index), int32(torch.arange(n)), backend=backend)
    assert torch.equal(destination, expected)


# --------------------------------------------------------------------------------------------------------------------
# Offsets beyond 2^31: a tensor whose first index counts for 2^30 + 16 elements touches few pages of memory
# --------------------------------------------------------------------------------------------------------------------

I = int32
WEIGHTS = kernels.prepare_weights(draw_weights(0), DEVICE)
Q, HALF = normal(0, 6, 16, dtype=torch.float16), torch.float16
LIST, MAXIMA = (I([2, 0, 1]), I([0]), I([24])), poisoned((6, 3))
DISTANT = {  # shapes and dtype of the distant tensors; what is done with them, and returned or changed
    "pool, heads": ([(2, 8, 16)], HALF, lambda k: kernels.pool_history(Q[:, None], k, 13, backend="triton")),
    "pool, blocks": (
        [(8, 16)], HALF, lambda k: kernels.pool_history(Q[:, None], k[None], 21, backend="triton"),
    ),
    "predict": ([(5, 4)] * 2, HALF, lambda x, p: kernels.predict(x, p, 2, 0, 0, 4, 0, WEIGHTS, "triton")),
    "select": ([(40,)], torch.float32, lambda scores: kernels.select_blocks(scores, 7, "triton")),
    "append": (
        [(8, 16)] * 2, HALF, lambda k, v: kernels.append_token(Q[:1], Q[1:2], k, v, I([2]), I([0]), I([5]), "triton")
    ),
    "decode": ([(8, 16)] * 2, HALF, lambda k, v: kernels.sparse_decode(Q, k, v, *LIST, MAXIMA, "triton")),
    "rows": (
        [(6,)], HALF,
        lambda rows: kernels.write_rows(
            Q[:1, :6].float(), Q[1, :3].float(), I([5, 0, 1, 3, 2, 4]), I([0, 2, 4]), I([16, 9, 16]), rows, 8, "triton"
        ),
    ),
    "copy": ([(9,)] * 2, torch.int8, lambda x, y: kernels.copy_blocks(x, y, I([2, 0, -1]), I([2, 1, 0]), "triton")),
}  # fmt: skip


@pytest.mark.parametrize("name", DISTANT)
def test_offsets_beyond_2_31(name):
    shapes, dtype, call = DISTANT[name]
    distant, distance = [], 2**30 + 16
    for i, shape in enumerate(shapes):
        n, strides = math.prod(shape), [math.prod(shape[j + 1 :]) for j in range(len(shape))]
        memory = torch.empty(2 * distance + n, dtype=dtype, device=DEVICE)
        distant.append(memory.as_strided((3, *shape), (distance, *strides)))
        distant[i].copy_(normal(i, 3, *shape) * 9)
    close = [tensor.clone(memory_format=torch.contiguous_format) for tensor in distant]
    for tensors in (distant, close):
        outputs = call(*tensors)
        tensors += outputs if isinstance(outputs, tuple) else () if outputs is None else (outputs,)
    assert all(map(torch.equal, distant, close))


# --------------------------------------------------------------------------------------------------------------------
# What the launchers refuse
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amd", [False, True])
def test_supports(amd):
    """D, b and bytes of an element. A tile has 32 tokens at least, however small the blocks are."""
    with patch.object(kernels, "is_amd", lambda: amd):
        assert all(
            kernels.supports(*shape) for shape in [(16, 8, 4), (64, 64, 4), (128, 32, 4), (128, 64, 2), (256, 8, 2)]
        )
        assert all(kernels.supports(*shape) != amd for shape in [(128, 64, 4), (256, 8, 4), (256, 16, 4), (256, 64, 2)])
        assert not any(kernels.supports(*shape) for shape in [(256, 64, 4), (8, 16, 4), (80, 16, 2), (512, 8, 2)])
        assert not any(kernels.supports(64, block_size, 2) for block_size in (4, 24, 128))


def test_launchers_refuse_what_they_cannot_do():
    q, k = torch.zeros(4, 2, 64, device=DEVICE), torch.zeros(2, 3, 16, 64, device=DEVICE)
    pool, lists, block_max = k[0], (int32([0, 1, 2]), int32([0]), int32([40])), torch.zeros(4, 3, device=DEVICE)
    history = torch.zeros(2, 6, 9, device=DEVICE)
    weights = kernels.prepare_weights(draw_weights(0), DEVICE)
    with pytest.raises(ValueError, match="backend"):
        kernels.pool_history(q, k, 40, backend="cuda")
    refused = [
        lambda: kernels.pool_history(q, k, 1),  # more rows than tokens
        lambda: kernels.pool_history(q, k, 49),  # more tokens than the cache has room for
        lambda: kernels.pool_history(q[..., :48], k[..., :48], 40, backend="triton"),  # D is no power of two
        lambda: kernels.pool_history(q, k[:, :, :12], 30, backend="triton"),  # neither is b
        lambda: kernels.pool_history(q.double(), k.double(), 40, backend="triton"),
        lambda: kernels.pool_history(q, k.mT.contiguous().mT, 40, backend="triton"),
        lambda: kernels.predict(history, history.clone(), 6, 0, 0, 9, 0, weights),  # newest is no slot
        lambda: kernels.predict(history, history.clone(), 0, 0, 3, 3, 3, weights),  # no columns
        lambda: kernels.predict(history, history.clone(), 0, 0, 2, 9, 1, weights),  # valid_end before start
        lambda: kernels.predict(history[:, :4], history[:, :4], 0, 0, 0, 9, 0, weights),  # H < 5
        lambda: kernels.select_blocks(history[0], 10),  # k > n
        lambda: kernels.sparse_decode(q[:, 0].half(), pool, pool, *lists, block_max, backend="triton"),
        lambda: kernels.write_rows(block_max, block_max[0], *lists, history[0, :2], 16),  # two rows of one list
        lambda: kernels.copy_blocks(q[:, 0], pool[:, 0].half(), lists[0], lists[0]),
    ]
    for call in refused:
        with pytest.raises(AssertionError):
            call()
    with patch.object(kernels.triton, "knobs", None), pytest.raises(RuntimeError, match="needs Triton"):
        kernels.pool_history(q, k, 40, backend="triton")
