"""Every kernel against its reference, property-based: hypothesis draws the shapes, the dtypes and the nasty values.

The kernels run natively where there is a GPU, with larger shapes, and in Triton's interpreter elsewhere. The reference
is computed in float64 from the same inputs, and is itself held against a naive implementation.
"""

import json
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


def poison_unlisted(case, blocks):
    """K and V of the blocks that no query of a KV head attends to become NaN."""
    n_kv_heads, capacity = case.k.shape[:2]
    listed = torch.zeros(blocks.shape[0], capacity, dtype=torch.bool, device=DEVICE)
    listed.scatter_(1, blocks.long(), True)
    unlisted = ~listed.view(n_kv_heads, -1, capacity).any(1)
    case.k[unlisted] = case.v[unlisted] = float("nan")


def naive_sparse_attention(case, blocks):
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
        row[head] += p.view(capacity, block_size).amax(1) / (n_heads // heads)
    return torch.stack(out), torch.stack(lse), row


@given(cases(), st.data())
def test_sparse_decode_reference_is_masked_attention(case, data):
    blocks = data.draw(selections(case))
    out, lse, row = naive_sparse_attention(case, blocks)
    actual_row = poison(*row.shape, dtype=torch.float64)
    caches = case.k.double(), case.v.double()
    actual = kernels.sparse_decode_reference(case.q[:, 0].double(), *caches, blocks, case.n_tokens, actual_row)
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
    expected_row = poison(heads, capacity, dtype=torch.float64)
    out, lse = kernels.sparse_decode_reference(q.double(), *caches, blocks, case.n_tokens, expected_row)
    history = poison(heads, 3, capacity)
    row = history[:, 1] if with_row else None
    table = torch.zeros(1, dtype=torch.int32, device=DEVICE) if blocks is None else blocks
    with unchanged(case.q, case.k, case.v, table, history[:, 0], history[:, 2]), machine(multiprocessors):
        actual = kernels.sparse_decode(q, case.k, case.v, blocks, case.n_tokens, row, backend="triton")
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
