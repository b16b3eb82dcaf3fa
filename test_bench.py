"""The benchmark's every path at a tiny size on the CPU, and its refusal where there is no GPU."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench

CPU = torch.device("cpu")
TINY = dict(n_heads=4, n_kv_heads=2, head_dim=16)


def test_every_path_runs():
    ceilings = bench.measure_ceilings(CPU, size=1 << 12, n=16)
    results = bench.bench_kernels(CPU, "torch", contexts=(1024,), layers=2, model=TINY, ceilings=ceilings)
    rows = json.loads(json.dumps(results))["kernels"]
    assert {row["path"].split(",")[0] for row in rows} >= {
        "pool_history",
        "predict",
        "predict_incremental",
        "select_blocks",
        "sparse_decode",
        "copy_blocks",
    }
    for row in rows:
        times = row["seconds"], *row["rivals"].values()
        assert all(math.isfinite(t) and t > 0 for t in times), row


def test_rivals_compute_the_same():
    """A rival that does less work would flatter no one."""
    torch.manual_seed(0)
    s = bench.Setting(1024, **TINY, layers=1, device=CPU, backend="torch", dtype=torch.float32, budgets=(256, 512))
    for group in bench.GROUPS:
        for path in group(s):
            for name, (rival,) in path.rivals.items():
                if name == "SDPA over the full cache" and "every block" not in path.name:
                    continue  # another result, at another price: that is the point
                ours, theirs = path.calls[0](), rival()
                if ours is None:  # copies write in place; both write the same slots
                    continue
                ours = ours[0] if isinstance(ours, tuple) else ours
                torch.testing.assert_close(ours.double(), theirs.view(ours.shape).double(), atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    command = [sys.executable, "bench.py", "--kernels"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, cwd=Path(bench.__file__).parent, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "no GPU" in done.stderr
