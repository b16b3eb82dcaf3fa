"""Without a GPU, Triton's kernels run in its interpreter, which must be asked for before Triton is first imported. All
random numbers are the same in every run, those of hypothesis included. Each process of pytest has one thread.
`--exercise` is in exercises/judge.py."""

import os
from contextlib import suppress

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch is imported

import pytest
import torch
from hypothesis import HealthCheck, settings

pytest_plugins = ["exercises.judge"]

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    with suppress(ImportError):
        from triton.runtime import interpreter

        patched = set()

        def call(function, *args, **kwargs):
            """Patch `tl` for a helper once: the interpreter does so at each call, for half of its time."""
            if function.fn not in patched:
                interpreter._patch_lang(function.fn)
                patched.add(function.fn)
            return function.rewrite()(*args, **kwargs)

        interpreter.InterpretedFunction.__call__ = call

settings.register_profile(
    "deterministic", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("deterministic")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
