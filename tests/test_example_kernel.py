"""How to write a kernel: a complete example, in the order in which kernels.py presents its own.

The task is to merge the partial results of split-K attention by their log-sum-exp. On a GPU run
`pytest tests/test_example_kernel.py`; without one the same command runs the kernel in Triton's interpreter.
"""

import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st


# 1. The reference: each split's output weighs as much as its share of the exponentials.
def merge_reference(out, lse):  # (splits, heads, D), (splits, heads)
    return (out * lse.softmax(0)[..., None]).sum(0)  # (heads, D)


# 2. The kernel. Grid: (heads,); a program holds all splits of a head in one tile. Traffic: out and lse, read once.
@triton.jit
def merge_kernel(
    out_ptr, lse_ptr, merged_ptr, splits, heads, D: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr
):
    head = tl.program_id(0)
    s, d = tl.arange(0, SPLITS), tl.arange(0, TILE)  # powers of two that cover splits and D
    lse = tl.load(lse_ptr + s * heads + head, mask=s < splits, other=float("-inf"))  # (SPLITS,)
    weight = tl.exp(lse - tl.max(lse, 0))  # (SPLITS,), without overflow
    weight = weight / tl.sum(weight, 0)
    mask = (s < splits)[:, None] & (d < D)[None, :]
    out = tl.load(out_ptr + (s[:, None] * heads + head) * D + d[None, :], mask=mask, other=0.0)  # (SPLITS, TILE)
    tl.store(merged_ptr + head * D + d, tl.sum(out * weight[:, None], 0), mask=d < D)


# 3. The launcher: assert what the kernel assumes, allocate, pick the tiles.
def merge(out, lse):
    splits, heads, head_dim = out.shape
    assert out.is_contiguous() and lse.is_contiguous() and lse.shape == (splits, heads)
    merged = torch.full((heads, head_dim), float("nan"), device=out.device)  # poisoned: an unwritten value shows
    tiles = dict(SPLITS=triton.next_power_of_2(splits), TILE=triton.next_power_of_2(head_dim))
    merge_kernel[(heads,)](out, lse, merged, splits, heads, D=head_dim, **tiles)
    return merged


# 4. The property: for any sizes and any logits, however extreme, kernel and float64 reference agree.
@settings(deadline=None, max_examples=20)
@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 40), st.sampled_from([1, 1e4]), st.integers(0, 2**31))
def test_merge(splits, heads, head_dim, scale, seed):
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out, lse = torch.randn(splits, heads, head_dim, device=device), scale * torch.randn(splits, heads, device=device)
    torch.testing.assert_close(merge(out, lse).double(), merge_reference(out.double(), lse.double()), rtol=0, atol=1e-5)
