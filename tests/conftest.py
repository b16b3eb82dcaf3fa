"""Without a GPU, Triton's kernels run in its interpreter, which must be asked for before Triton is first imported. Each
process of pytest has one thread. All random numbers are the same in every run, those of hypothesis included."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch is imported

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
