"""Every launcher, with both backends, against a float64 reference written here: hypothesis draws shapes and values.

The kernels run natively where there is a GPU, and in Triton's interpreter elsewhere (conftest.py asks for it). It needs
about half a millisecond for each operation of each program, so shapes are small there, and tile sizes are patched small
where a loop must run several times. Fresh memory is poisoned and has guard cells around it; inputs must stay as they
are.
"""

import math
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings

import kernels

NATIVE = torch.cuda.is_available()
DEVICE = torch.device("cuda" if NATIVE else "cpu")
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
EPSILON = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # of the largest value: two roundings
BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])


class Heads(NamedTuple):
    dtype: torch.dtype
    head_dim: int
    block_size: int
    group: int  # query heads of a KV head


ATTENTION = st.sampled_from(  # few combinations, because a GPU compiles each of them anew
    [
        Heads(torch.float32, 16, 8, 1),
        Heads(torch.float32, 64, 16, 3),
        Heads(torch.float32, 32, 64, 2),
        Heads(torch.bfloat16, 128, 16, 4),
        Heads(torch.bfloat16, 16, 8, 17),
        Heads(torch.float16, 64, 32, 7),
    ]
)
SEEDS = st.integers(0, 2**31)
MARGIN = 3  # elements around an embedded tensor, in every dimension


def int32(values):
    return torch.as_tensor(values, dtype=torch.int32, device=DEVICE)


def rng(seed):
    return torch.Generator().manual_seed(seed)


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


def assert_close(actual, expected, allowed=0.0, name="out"):
    """Each value is within `allowed` of the expected one; NaN never is, and infinity equals only itself."""
    assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
    bad = ~(((actual.double() - expected.double()).abs() <= allowed) | (actual == expected))
    if not bad.any():
        return
    *row, column = bad.nonzero()[0].tolist()
    first = max(0, column - 1)
    shown = (*row, slice(first, first + 4))
    lines = {
        "at": range(first, actual.shape[-1]),
        "expected": expected[shown].tolist(),
        "actual": actual[shown].tolist(),
    }
    text = f"{name}: {int(bad.sum())} of {bad.numel()} values are wrong, the first is {name}{[*row, column]}"
    for title, values in lines.items():
        text += f"\n    {title:10}" + "".join(
            f"{value:{14 if type(value) is int else '14.8g'}}" for value in values[:4]
        )
    fresh = poisoned((), actual.dtype).item()
    if f"{fresh}" in map(str, lines["actual"]):
        text += f"\n    ({fresh} fills memory that must not be read, or was never written)"
    raise AssertionError(text)


def normal(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=rng(seed)).to(dtype).to(DEVICE)


def rounding(*tensors, head_dim):
    """What float32 costs in a logit, and hence in a probability: the largest possible |q k| / sqrt(D) times 2^-22."""
    q, k = (tensor.double().nan_to_num(0).flatten(0, -2).abs().amax(0) for tensor in tensors)
    return float(q @ k) * head_dim**-0.5 * 2**-22


# --------------------------------------------------------------------------------------------------------------------
# 1. Echoes
# --------------------------------------------------------------------------------------------------------------------


def naive_echoes(ids, position, start, local_blocks, block_size, n_blocks, n_echoes):
    """A loop over positions and the lengths of matches."""
    found, end = [], (position + 1) // block_size - local_blocks
    for p in range(1, position + 1):  # p continues the match that ends at p - 1
        run = 0
        while run < 8 and run < p and ids[p - 1 - run] == ids[position - run]:
            run += 1
        if run and start <= p // block_size < end:
            found.append((run, p))
    blocks = dict.fromkeys(p // block_size for _, p in sorted(found, reverse=True))
    return [*blocks, *[n_blocks] * n_echoes][:n_echoes]


@BACKENDS
@given(
    st.sampled_from([8, 16, 64]), st.integers(1, 300), st.integers(0, 40), st.integers(0, 3), st.integers(0, 4),
    st.sampled_from([1, 2, 5, 60]), st.integers(1, 8), SEEDS,
)  # fmt: skip
@example(8, 100, 0, 0, 0, 1, 8, 0)  # one token again and again: longer matches than are counted
@example(8, 1, 0, 0, 0, 2, 1, 0)  # a single token
@example(8, 280, 9, 1, 2, 3, 4, 5)  # two programs
@example(8, 100, 0, 0, 0, 60, 1, 3)  # a match of 7 tokens follows one of 8
def test_find_echoes(backend, block_size, n_tokens, room, start, local_blocks, vocabulary, n_echoes, seed):
    ids = torch.randint(vocabulary, (n_tokens + room,), generator=rng(seed))  # what follows the text must not matter
    if seed % 3 == 0 and n_tokens > 60:
        ids[20:28], ids[41:48], ids[40] = ids[n_tokens - 8 : n_tokens], ids[n_tokens - 7 : n_tokens], 99
    n_blocks = -(-len(ids) // block_size) + seed % 2
    shape = start, local_blocks, block_size, n_blocks, n_echoes
    expected = naive_echoes(ids.tolist(), n_tokens - 1, *shape)
    ids, position = ids.to(DEVICE), torch.tensor([n_tokens - 1], device=DEVICE)
    with guarded(ids, position, ECHO_TILE=256):
        blocks = kernels.find_echoes(ids, position, *shape, backend)
    assert blocks.dtype == torch.int64
    assert_close(blocks, torch.tensor(expected, device=DEVICE), name="blocks")


# --------------------------------------------------------------------------------------------------------------------
# 2. History pooling
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
@example(Heads(torch.float32, 16, 8, 1), 3, 1, 1, 1, False, 0, 8)  # a single token
@example(Heads(torch.float32, 16, 8, 1), 1, 48, 2, 1, False, 0, 8)  # one key is in the future of one row
@example(Heads(torch.float32, 64, 16, 3), 2, 133, 12, 11, False, 0, 3)  # 36 rows: ragged tiles of rows; all of the text
@example(Heads(torch.bfloat16, 16, 8, 17), 1, 90, 5, 1, True, 0, 8)  # 85 rows
@example(Heads(torch.float32, 16, 8, 1), 1, 1100, 2, 9, False, 0, 8)  # many tiles in a split
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
# 3. Prediction
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
    """Rows enter the history, and its image grows by columns; p and scores are compared after each step."""
    generator, end, valid_end, capacity = rng(seed), start + n, start, start + n + 12
    state_dict = draw_weights(seed)
    weights = kernels.prepare_weights(state_dict, DEVICE)

    def draw_rows(rows):
        """Some rows are sparse, as sparse attention leaves them, some dense."""
        values = torch.rand(heads, rows, capacity, generator=generator)
        share = torch.tensor([0.2, 1.0])[torch.arange(rows) % 2, None]  # (rows, 1)
        return (values * (torch.rand(values.shape, generator=generator) < share)).to(DEVICE)

    window = draw_rows(history_len)  # (heads, H, capacity), oldest row first
    history = Embedded(poisoned((heads, history_len, capacity), dtype))
    p = Embedded(poisoned((heads, history_len, capacity), dtype), margin=2)  # strides unlike the history's
    constants = dict(ROWS_PER_PROGRAM=3, PREDICT_CELLS=90, n_multiprocessors=lambda device: 1 + seed % 4)
    for new_rows, growth in [(0, 0), *steps]:
        window = torch.cat([window, draw_rows(new_rows)], 1)[:, new_rows:]
        p.view.copy_(p.view.roll(-new_rows, 1))
        p.before = p.whole.clone()
        end = min(end + growth, capacity - 1)
        image = window[:, :, start:end].to(dtype)
        history.view.fill_(NAN)
        history.view[:, :, start:end] = image
        with guarded(history.whole, *weights.values(), **constants):
            scores = kernels.predict(history.view, p.view, new_rows, start, end, valid_end, weights, backend)
        valid_end = end

        expected_p, without_cancelling = naive_contributions(image, state_dict)
        expected = expected_p.mean(1) + state_dict["conv3.bias"]
        allowed = (2e-6 if dtype == torch.float32 else 6e-4) * (1 + without_cancelling.max())
        p.assert_intact()
        outside = p.view[:, :, :start], p.view[:, :, end:]
        assert all(columns.isnan().all() for columns in outside), "p written outside of the image"
        assert_close(p.view[:, :, start:end], expected_p, allowed, "p")
        assert scores.dtype == torch.float32
        assert_close(scores, expected, allowed, "scores")
        whole = kernels.predict_reference(history.view, start, end, weights)
        assert_close(whole, expected, 1e-5, "the whole network")


# --------------------------------------------------------------------------------------------------------------------
# 4. Block selection
# --------------------------------------------------------------------------------------------------------------------


SPECIAL = torch.tensor([NAN, -NAN, INF, -INF, 0.0, -0.0])
SCORES = {  # shape, generator -> float32
    "normal": lambda shape, g: torch.randn(shape, generator=g),
    "ties": lambda shape, g: torch.randint(-2, 3, shape, generator=g) / 4,
    "one value": lambda shape, g: SPECIAL[g.initial_seed() % len(SPECIAL)].expand(shape),
    # equal but for the last two bits
    "neighbours": lambda shape, g: (torch.randint(0, 4, shape, generator=g) + 0x3F000000).int().view(torch.float32),
    # any 32 bits: subnormals and every NaN
    "bits": lambda shape, g: torch.randint(-(2**31), 2**31, shape, generator=g).int().view(torch.float32),
    "special": lambda shape, g: torch.where(
        torch.rand(shape, generator=g) < 0.6,
        SPECIAL[torch.randint(0, len(SPECIAL), shape, generator=g)],
        torch.randn(shape, generator=g),
    ),
}


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
    st.sampled_from(list(SCORES)), st.integers(1, 3), st.integers(1, 200) | st.sampled_from([255, 256, 257, 512, 700]),
    st.floats(0, 1), SEEDS, st.sampled_from([1, 2, 4]),
)  # fmt: skip
@example("ties", 2, 700, 0.5, 0, 2)  # ties across many tiles
@example("special", 2, 600, 1.0, 1, 4)  # k = n
@example("special", 2, 600, 0.4, 1, 4)  # the last one is 0.0 or -0.0
@example("normal", 2, 513, 0.0, 2, 4)  # k = 1
@example("one value", 1, 600, 0.6, 0, 2)  # all NaN
@example("one value", 1, 300, 0.9, 3, 4)  # all -inf
@example("one value", 2, 600, 0.7, 5, 4)  # all -0.0
@example("ties", 1, 2 * kernels.SELECT_TILE + 77, 0.4, 3, 2)  # tiles of the real size
def test_select_blocks(backend, kind, rows, n, share, seed, n_programs):
    values = SCORES[kind]((rows, n), rng(seed)).to(DEVICE)
    scores = Embedded(values)
    scores.whole.nan_to_num_(INF)  # the guards would be chosen first
    scores.view.copy_(values)
    k = max(1, round(share * n))
    tile = kernels.SELECT_TILE if n > kernels.SELECT_TILE else 256 if NATIVE else 32
    with guarded(scores.whole, SELECT_TILE=tile, SELECT_PROGRAMS=n_programs):
        blocks = kernels.select_blocks(scores.view, k, backend)
    assert blocks.dtype == torch.int32
    assert_close(blocks, naive_selection(scores.view, k), name="blocks")


# --------------------------------------------------------------------------------------------------------------------
# 5. Rotary embedding
# --------------------------------------------------------------------------------------------------------------------


@BACKENDS
@given(ATTENTION, st.integers(1, 3), st.integers(0, 131072), st.sampled_from([1.0, 1.3]), st.booleans(), SEEDS)
@example(Heads(torch.float32, 16, 8, 1), 1, 0, 1.0, False, 0)
def test_rotate_and_write(backend, combination, n_kv_heads, position, scale, interleaved, seed):
    dtype, head_dim, block_size, group = combination
    qk = Embedded(normal(seed, n_kv_heads * (group + 1), head_dim, dtype=dtype)).view
    v = Embedded(normal(seed + 1, n_kv_heads, head_dim, dtype=dtype)).view
    freq = 10000.0 ** (-torch.arange(0, head_dim, 2, device=DEVICE) / head_dim)  # (D/2,)
    freq = torch.cat((-freq, freq)) * (seed % 4 > 0)  # 0: no rotation
    caches = Embedded(
        normal(seed + 2, *((n_kv_heads, 2 * 9) if interleaved else (2, n_kv_heads, 9)), head_dim).to(dtype)
    )
    k_rows, v_rows = (caches.view, caches.view[:, 9:]) if interleaved else caches.view
    k_rows, row = k_rows[:, :9], torch.tensor([seed % 9], device=DEVICE)
    k_before, v_before, where = k_rows.clone(), v_rows.clone(), torch.tensor([position], device=DEVICE)
    with guarded(qk, v, freq, where, row):
        rotated = kernels.rotate_and_write(qk, v, freq, scale, where, k_rows, v_rows, row, backend)
    turn = torch.polar(torch.ones(()).double(), (position * freq.float()[head_dim // 2 :]).double().cpu()).to(DEVICE)
    x, y = qk.double().chunk(2, 1)
    turned = torch.complex(x, y) * turn * scale
    expected = torch.cat((turned.real, turned.imag), 1)
    assert rotated.dtype == dtype
    assert_close(rotated, expected, EPSILON[dtype] * float(expected.abs().max()) + 1e-6)
    k_before[:, row], v_before[:, row] = rotated[-n_kv_heads:, None], v[:, None]
    assert same_bits(k_rows, k_before) and same_bits(v_rows, v_before)
    caches.assert_intact()


# --------------------------------------------------------------------------------------------------------------------
# 5. Sparse flash-decoding
# --------------------------------------------------------------------------------------------------------------------


class Lists:
    """Random lists of blocks as a table, in a wider one; after a list come blocks out of bounds.

    The first n_echoes columns of each row are -1 where `echoed` is False, as drawn; these count as full blocks.
    """

    def __init__(self, tokens, n_blocks, block_size, n_echoes, share, seed):
        generator, self.blocks = rng(seed), []  # real ones, of each head
        columns = [n_echoes + -(-n // block_size) for n in tokens]
        table = torch.full((len(tokens) + 1, max(columns) + 3), 2**30, dtype=torch.int32)
        for h, n_columns in enumerate(columns):
            row = torch.randperm(n_blocks, generator=generator)[:n_columns].int()
            row[:n_echoes][torch.rand(n_echoes, generator=generator) >= share] = -1
            table[h, :n_columns] = row
            self.blocks.append(row[row >= 0].tolist())
        self.table = table.to(DEVICE)[:-1, : max(columns)]  # a slice of a wider table
        self.lengths = torch.tensor([n + n_echoes * block_size for n in tokens], device=DEVICE)
        echoed = [len(blocks) - -(-n // block_size) for blocks, n in zip(self.blocks, tokens)]
        self.tokens = [n + count * block_size for n, count in zip(tokens, echoed)]  # real ones, of each head


def naive_sparse_decode(q, k, v, lists):
    """One softmax a query, over the tokens of its list, in float64."""
    group, head_dim = len(q) // len(lists.blocks), q.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float64, device=DEVICE)
    lse = torch.zeros(len(q), dtype=torch.float64, device=DEVICE)
    for h, (blocks, n_tokens) in enumerate(zip(lists.blocks, lists.tokens)):
        keys, values = (x[blocks].double().flatten(0, 1)[:n_tokens] for x in (k, v))  # (n_tokens, D)
        for i in range(h * group, (h + 1) * group):
            logits = keys @ q[i].double() / head_dim**0.5
            out[i], lse[i] = logits.softmax(0) @ values, logits.logsumexp(0)
    return out, lse


@BACKENDS
@given(
    ATTENTION, st.lists(st.integers(1, 200) | st.sampled_from([1, 200]), min_size=1, max_size=5), st.booleans(),
    SEEDS, st.sampled_from([1, 2, 4]), st.booleans(), st.integers(0, 5), st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(0, 150),
)  # fmt: skip
@example(Heads(torch.float32, 16, 8, 1), [1], False, 0, 1, False, 0, 0.0, 0)  # one token
@example(
    Heads(torch.float32, 16, 8, 1), [2, 500, 1, 9, 33], False, 1, 4, True, 2, 0.5, 0
)  # 6 splits, merged 4 at a time
@example(Heads(torch.bfloat16, 16, 8, 17), [450], True, 2, 4, True, 0, 0.0, 0)  # one head; queries exceed a tile's
@example(Heads(torch.float32, 32, 64, 2), [320, 64, 65, 63, 1], False, 3, 2, False, 4, 1.0, 0)  # full and ragged blocks
@example(Heads(torch.bfloat16, 16, 8, 17), [1, 90], True, 0, 1, True, 3, 0.5, 20)
@example(Heads(torch.float32, 16, 8, 1), [3, 9], False, 0, 4, False, 40, 0.0, 0)  # whole splits of entries that are -1
@example(Heads(torch.float32, 16, 8, 1), [200, 300], False, 0, 4, False, 1, 0.0, 150)  # two tiles more than planned
def test_sparse_decode(backend, combination, tokens, large, seed, n_processors, interleaved, n_echoes, share, grown):
    dtype, head_dim, block_size, group = combination
    n_blocks = max(-(-n // block_size) for n in tokens) + n_echoes + 2
    lists = Lists(tokens, n_blocks, block_size, n_echoes, share, seed)
    q = Embedded(normal(seed, len(tokens) * group, head_dim, dtype=dtype) * (3e3 if large else 1)).view
    kv = normal(seed + 1, n_blocks, 2, block_size, head_dim, dtype=dtype)  # an offloaded block's K and V lie together
    k, v = kv.unbind(1) if interleaved else kv.transpose(0, 1).contiguous().unbind(0)
    unlisted = sorted({*range(n_blocks)} - {block for blocks in lists.blocks for block in blocks})
    k[unlisted], v[unlisted] = NAN, NAN
    expected = naive_sparse_decode(q, k, v, lists)
    arguments = q, k, v, lists.table, lists.lengths
    with guarded(*arguments, **processors(n_processors), MERGE_ELEMENTS=4 * head_dim):
        work = kernels.divide_work((lists.lengths - grown).clamp(min=1)[None], block_size)[0]  # lists grow afterwards
        actual = kernels.sparse_decode(*arguments, work, backend)
    slack, largest = rounding(q, k, head_dim=head_dim), float(v.double().nan_to_num(0).abs().max())
    assert actual[0].dtype == dtype and actual[1].dtype == torch.float32
    assert_close(actual[0], expected[0], EPSILON[dtype] * largest + slack * largest, "out")
    assert_close(actual[1], expected[1], 2e-5 + slack, "lse")
    assert not kernels.finished_splits(DEVICE).any()


@given(
    st.lists(st.lists(st.integers(1, 400), min_size=3, max_size=3), min_size=1, max_size=3), st.integers(1, 9),
    st.sampled_from([8, 64]),
)  # fmt: skip
def test_divide_work(lengths, n_processors, block_size):
    """Every tile of every list belongs to one program, and no program has more tiles than it must."""
    tile = max(32, block_size)
    with patch.object(kernels, "n_multiprocessors", lambda device: n_processors):
        work = kernels.divide_work(torch.tensor(lengths, device=DEVICE), block_size)
    assert work.shape == (len(lengths), 2 * n_processors + 3, 4)
    for rows, layer in zip(work.tolist(), lengths):
        tiles = [-(-n // tile) for n in layer]
        each, expected = max(-(-sum(tiles) // (2 * n_processors)), 2), []
        for head, n in enumerate(tiles):
            first, splits = len(expected), -(-n // each)
            expected += [[head, i * each, first, splits] for i in range(splits)]
        assert rows[: len(expected)] == expected and all(row[0] == -1 for row in rows[len(expected) :])


@BACKENDS
def test_sparse_decode_skips_a_last_column(backend):
    """-1 in the last column of a list, where it counts as a full block; a list of which one block is left."""
    q, (k, v) = normal(0, 4, 16), normal(1, 2, 5, 8, 16)
    k[0], v[0] = NAN, NAN  # in no list
    table, lengths = int32([[4, -1, 2, -1], [-1, 3, -1, 2**30]]), torch.tensor([32, 24], device=DEVICE)
    lists = SimpleNamespace(blocks=[[4, 2], [3]], tokens=[16, 8])
    work = kernels.divide_work(lengths[None], 8)[0]
    actual = kernels.sparse_decode(q, k, v, table, lengths, work, backend)
    for one, expected in zip(actual, naive_sparse_decode(q, k, v, lists)):
        assert_close(one, expected, 2e-5)


# --------------------------------------------------------------------------------------------------------------------
# 7. SwiGLU
# --------------------------------------------------------------------------------------------------------------------


@BACKENDS
@given(st.sampled_from([torch.float32, torch.bfloat16]), st.integers(1, 3), st.integers(1, 600), SEEDS)
@example(torch.float32, 2, 256, 0)  # full tiles only
@example(torch.bfloat16, 1, 511, 1)
def test_swiglu(backend, dtype, rows, n, seed):
    values = normal(seed, rows, 2 * n, dtype=dtype) * 10
    values[0, 0], values[0, n] = -3e38, 0.5  # exp overflows, and silu is 0
    gate_up = Embedded(values).view
    with guarded(gate_up, SWIGLU_TILE=128):
        out = kernels.swiglu(gate_up, backend)
    gate, up = gate_up.double().split(n, 1)
    expected = gate * torch.sigmoid(gate) * up
    assert out.dtype == dtype
    assert_close(out, expected, (2 if backend == "torch" else 1) * EPSILON[dtype] * expected.abs() + 1e-30)


# --------------------------------------------------------------------------------------------------------------------
# 8. Copying
# --------------------------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 3), st.sampled_from([0, 1, 2, 3, 17, 40]), st.integers(0, 9), st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([0.0, 0.3, 0.9, 1.0]), st.sampled_from([1, 2, 5]), SEEDS,
)  # fmt: skip
@example(2, 40, 3, 1.0, 1.0, 1, 0)  # the same blocks in another order
def test_assign_slots(rows, k, spare, filled, share, spread, seed):
    """Random blocks in random slots, and random blocks wanted, against a dictionary from blocks to slots."""
    generator = rng(seed)
    wanted, held = torch.full((rows, k), -1), torch.full((rows, k + spare), -1)
    slots, fetch, new_held = torch.full_like(wanted, -1), torch.full_like(wanted, -1), torch.full_like(held, -1)
    for r in range(rows):
        blocks = torch.randperm(spread * k, generator=generator)[: round(filled * k)]
        held[r, torch.randperm(k + spare, generator=generator)[: len(blocks)]] = blocks
        slot_of = {block: slot for slot, block in enumerate(held[r].tolist()) if block >= 0}
        empty = [slot for slot, block in enumerate(held[r].tolist()) if block < 0]
        blocks = torch.randperm(spread * k, generator=generator)[: round(share * k)].tolist()
        entries = torch.randperm(k, generator=generator)[: len(blocks)].sort().values.tolist()
        for i, block in zip(entries, blocks):
            if block not in slot_of:
                if not empty:
                    continue  # no more new blocks are wanted than there are empty slots
                slot_of[block], fetch[r, i] = empty.pop(0), block
            wanted[r, i], slots[r, i], new_held[r, slot_of[block]] = block, slot_of[block], block
    wanted, held, *expected = map(int32, (wanted, held, slots, fetch, new_held))
    with guarded(wanted, held):
        results = kernels.assign_slots(wanted, held)
    assert all(x.dtype == torch.int32 for x in results) and all(map(torch.equal, results, expected))


@BACKENDS
@given(
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float64]),
    st.integers(1, 50).map(lambda n: 2 * n) | st.sampled_from([2, 4, 32, 64, 2050]), st.integers(0, 30),
    st.sampled_from([0.0, 0.4, 1.0]), st.sampled_from([0, 2, 8]), st.sampled_from([0, 2, 14]), SEEDS,
)  # fmt: skip
@example(torch.float16, 3000, 30, 0.5, 2, 0, 0)  # two tiles a row; two chunks of indices
@example(torch.bfloat16, 64, 20, 0.0, 8, 0, 1)  # nothing to copy
@example(torch.int8, 1024, 3, 0.5, 8, 0, 2)  # fewer tiles than programs
@example(torch.float32, 7, 100, 0.1, 3, 3, 3)  # several chunks, few of them to be copied; rows of 28 bytes
def test_copy_blocks(backend, dtype, lanes, n, share, left, right, seed):
    """Rows of `lanes` times 4 bytes, in wider ones of two widths. The bits are random: any NaN is among them."""
    generator = rng(seed)

    def random_rows(rows, right):
        bits = torch.randint(0, 256, (rows, 4 * (left + lanes + right)), generator=generator).to(torch.uint8)
        return bits.view(dtype).to(DEVICE)

    columns = slice(left * 4 // dtype.itemsize, (left + lanes) * 4 // dtype.itemsize)
    source, whole = random_rows(7, right)[:, columns], random_rows(n + 4, right + 2)
    destination = whole[1 : n + 3, columns]  # (n + 2, elements)
    source_index = torch.randint(0, 7, (n,), generator=generator)
    source_index[torch.rand(n, generator=generator) >= share] = -1
    destination_index = torch.randperm(n + 2, generator=generator)[:n]
    expected = whole.clone()
    for i, j in zip(source_index.tolist(), destination_index.tolist()):
        if i >= 0:
            expected[1 + j, columns] = source[i]
    indices = int32(source_index), int32(destination_index)
    if NATIVE:
        source = source.cpu().pin_memory()
    with guarded(source, *indices, COPY_CHUNK=16, COPY_PROGRAMS=3):
        kernels.copy_blocks(source, destination, *indices, backend=backend)
    words = [x.view(torch.int32)[1 : n + 3, left : left + lanes] for x in (whole, expected)]
    assert_close(*words, name="destination")
    assert same_bits(whole, expected), "written out of bounds"


@BACKENDS
def test_copy_blocks_with_the_real_chunks(backend):
    """More indices than a program counts at once, few of them to be copied."""
    source, source_index = int32(range(78)).view(26, 3), torch.full((2500,), -1)
    source_index[::97] = torch.arange(26)
    destination, expected = (torch.full((2500, 3), -7, dtype=torch.int32, device=DEVICE) for _ in range(2))
    expected[::97] = source
    kernels.copy_blocks(source, destination, int32(source_index), int32(range(2500)), backend=backend)
    assert_close(destination, expected, name="destination")


# --------------------------------------------------------------------------------------------------------------------
# Offsets beyond 2^31: a tensor whose first index counts for 2^30 + 16 elements touches few pages of memory
# --------------------------------------------------------------------------------------------------------------------


def copied(source, destination):
    kernels.copy_blocks(source, destination, int32([2, 0, -1]), int32([2, 1, 0]), "triton")
    return destination


I = int32
WEIGHTS = kernels.prepare_weights(draw_weights(0), DEVICE)
Q, HALF = normal(0, 6, 16, dtype=torch.float16), torch.float16
LIST = I([[2, 0, 1]]), torch.tensor([24], device=DEVICE)
FREQ, ONE = normal(2, 16), torch.tensor([1], device=DEVICE)
WORK = kernels.divide_work(LIST[1][None], 8)[0]
DISTANT = {  # shapes and dtype of the distant tensors; what is done with them, and returned or changed
    "pool_history, heads": ([(2, 8, 16)], HALF, lambda k: kernels.pool_history(Q[:, None], k, 13, backend="triton")),
    "pool_history, blocks": (
        [(8, 16)], HALF, lambda k: kernels.pool_history(Q[:, None], k[None], 21, backend="triton"),
    ),
    "predict": ([(5, 4)] * 2, HALF, lambda x, p: kernels.predict(x, p, 0, 0, 4, 0, WEIGHTS, "triton")),
    "select_blocks": ([(40,)], torch.float32, lambda scores: kernels.select_blocks(scores, 7, "triton")),
    "rotate_and_write": (
        [(3, 16)] * 2, HALF, lambda k, v: kernels.rotate_and_write(Q, Q[:3], FREQ, 1, ONE, k, v, ONE, "triton"),
    ),
    "sparse_decode": ([(8, 16)] * 2, HALF, lambda k, v: kernels.sparse_decode(Q, k, v, *LIST, WORK, "triton")),
    "copy_blocks, source": ([(9,)], torch.int32, lambda x: copied(x, I([[0] * 9] * 3))),
    "copy_blocks, destination": ([(9,)], torch.int32, lambda x: copied(I(range(27)).view(3, 9), x)),
}  # fmt: skip


@pytest.mark.parametrize("name", DISTANT)
def test_offsets_beyond_2_31(name):
    shapes, dtype, call = DISTANT[name]
    distant, distance = [], 2**30 + 16
    for i, shape in enumerate(shapes):
        n, strides = math.prod(shape), [math.prod(shape[j + 1 :]) for j in range(len(shape))]
        memory = torch.empty(2 * distance + n, dtype=dtype, device=DEVICE)
        distant.append(memory.as_strided((3, *shape), (distance, *strides)))
        distant[i].copy_(normal(i + 1, 3, *shape))  # of another seed than Q: no block wins every softmax
    close = [tensor.clone(memory_format=torch.contiguous_format) for tensor in distant]
    for tensors in (distant, close):
        outputs = call(*tensors)
        tensors += outputs if isinstance(outputs, tuple) else () if outputs is None else (outputs,)
    for actual, expected in zip(distant, close):
        assert_close(actual, expected)


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
    blocks, lists = k[0], (int32([[0, 1, 2]]), torch.tensor([40], device=DEVICE))
    work, ids = kernels.divide_work(lists[1][None], 16)[0], int32([0, 1])
    history = torch.zeros(2, 6, 9, device=DEVICE)
    with pytest.raises(ValueError, match="backend"):
        kernels.pool_history(q, k, 40, backend="cuda")
    refused = [
        lambda: kernels.pool_history(q, k, 1),  # more rows than tokens
        lambda: kernels.pool_history(q, k, 49),  # more tokens than the cache has room for
        lambda: kernels.pool_history(q[..., :48], k[..., :48], 40, backend="triton"),  # D is no power of two
        lambda: kernels.pool_history(q, k[:, :, :12], 30, backend="triton"),  # neither is b
        lambda: kernels.pool_history(q.double(), k.double(), 40, backend="triton"),
        lambda: kernels.pool_history(q, k.mT.contiguous().mT, 40, backend="triton"),
        lambda: kernels.find_echoes(I([1, 2]), torch.tensor([1]), 0, 0, 8, 1, 1),  # ids are no int64
        lambda: kernels.find_echoes(torch.zeros(17).long(), torch.tensor([1]), 0, 0, 8, 2, 1),  # more ids than blocks
        lambda: kernels.predict(history, history.clone(), 0, 3, 3, 3, WEIGHTS),  # no columns
        lambda: kernels.predict(history, history.clone(), 0, 2, 9, 1, WEIGHTS),  # valid_end before start
        lambda: kernels.predict(history[:, :4], history[:, :4], 0, 0, 9, 0, WEIGHTS),  # H < 5
        lambda: kernels.select_blocks(history[0], 10),  # k > n
        lambda: kernels.sparse_decode(q[:, 0].half(), blocks, blocks, *lists, work, "triton"),
        lambda: kernels.sparse_decode(q[:, 0], blocks, blocks, lists[0].long(), lists[1], work, "triton"),
        lambda: kernels.sparse_decode(q[:, 0], blocks, blocks, lists[0], lists[1].int(), work, "triton"),
        lambda: kernels.rotate_and_write(q[:, 0], k[0, 0, :2], q[0, 0], 1.0, ids, k[0], k[1], ids),  # ids are no int64
        lambda: kernels.copy_blocks(q[:, 0], blocks[:, 0].half(), ids, ids),
    ]
    for call in refused:
        with pytest.raises(AssertionError):
            call()
    with patch.object(kernels.triton, "knobs", None), pytest.raises(RuntimeError, match="needs Triton"):
        kernels.pool_history(q, k, 40, backend="triton")
