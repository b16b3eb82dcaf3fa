"""Without a GPU, Triton's kernels run in its interpreter, which must be asked for before Triton is first imported. All
random numbers are the same in every run, those of hypothesis included."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile(
    "deterministic", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("deterministic")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
