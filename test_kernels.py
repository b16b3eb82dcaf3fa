"""Every kernel against its reference, property-based: hypothesis draws the shapes, the dtypes and the nasty values.

The kernels run natively where there is a GPU, with larger shapes, and in Triton's interpreter elsewhere. The reference is
computed in float64 from the same inputs, and is itself held against a naive implementation.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

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
    max_examples=200 if NATIVE else 12,
    derandomize=not NATIVE,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("kernels")

# Largest error allowed against float64, relative to the largest value that the result could take. Probabilities and scores
# are float32 whatever the inputs, which are exact in float32; an output in the inputs' dtype is rounded to it.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
DTYPES = st.sampled_from(list(TOLERANCE))
HEAD_DIMS = st.sampled_from([64, 80, 96, 128, 256] if NATIVE else [64, 80, 128])
BLOCK_SIZES = st.sampled_from([8, 16, 24, 32, 64])
SEEDS = st.integers(0, 2**31)


def poison(*shape, dtype=torch.float32):
    """An output before it is written: NaN everywhere, or the most negative integer."""
    bad = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
    return torch.full(shape, bad, dtype=dtype, device=DEVICE)


def assert_close(actual, expected, dtype=torch.float32, scale=1.0, context=""):
    """actual within TOLERANCE[dtype] * scale of expected, and no NaN where expected has none."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    error = (actual.double() - expected.double()).abs()
    allowed = TOLERANCE[dtype] * scale
    bad = ~(error <= allowed)
    if bad.any():
        worst = error.nan_to_num(float("inf")).argmax()
        raise AssertionError(
            f"{context} {int(bad.sum())} of {bad.numel()} off; worst {error.flatten()[worst]:.3g}, allowed {allowed:.3g}"
        )


class unchanged:
    """A context in which the given tensors must keep every bit."""

    def __init__(self, *tensors):
        self.tensors = tensors

    def __enter__(self):
        self.before = [tensor.clone() for tensor in self.tensors]

    def __exit__(self, *error):
        for tensor, before in zip(self.tensors, self.before):
            assert torch.equal(tensor.view(torch.uint8), before.view(torch.uint8)), "an input was changed"
