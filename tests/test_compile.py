"""Tests ahead-of-time compilation, in a process of its own, where Triton compiles instead of interpreting."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import compile
from tests.helpers import assert_refused

PROGRAM = """
import sys
from experiments import compile, roofline

every_kernel = {name for name in vars(compile.kernels) if name.endswith("_kernel")}
for model, amd in (("Llama-3.1-8B 8K", True), ("SmolLM2-135M 4K", False)):
    launches = compile.record(model, amd)
    assert {launch.kernel.__name__ for launch in launches} == every_kernel, (model, amd)
compile.pretend("sm_90")
hashes = set()
for n in (16240, 16241):  # the middle grows by a block
    with roofline.counting() as counts:
        compile.kernels.select_blocks(compile.kernels.torch.empty(3, n, device="meta"), 7, "triton")
    hashes |= {launch.kernel.warmup(**launch.arguments, grid=launch.grid).hash for launch in counts.launches}
assert len(hashes) == len(counts.launches) == 5, "compiled anew while the text grows"
launches = [launch for launch in launches if launch.kernel.__name__ == "_copy_kernel"]
compile.MODELS, compile.DTYPES = [model], compile.DTYPES[:1]
compile.record = lambda model, amd, dtype: launches
sys.exit(compile.main(["sm_90"]))
"""


def test_every_kernel_is_launched_and_one_is_compiled():
    """The program records launches of all kernels, and prints each distinct kernel once."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    heads, _, row = done.stdout.splitlines()
    assert heads == "| kernel | grid | model | dtype | target | registers | spilled | shared |"
    *names, registers, spilled, shared = (cell.strip() for cell in row.strip("|").split("|"))
    assert names == ["_copy_kernel", "16", "SmolLM2-135M 4K", "bfloat16", "sm_90"]
    assert 0 < int(registers) < 255 and int(spilled) == 0 and 0 <= int(shared) < 99 * 1024


def test_a_spill_or_too_much_shared_memory_is_an_error(monkeypatch):
    row = dict(kernel="_x_kernel", target="sm_86", spilled=0, shared=100 * 1024)
    monkeypatch.setattr(compile, "compile_all", lambda targets: [row] if "sm_86" in targets else [])
    monkeypatch.setattr(compile.kernels, "interpreted", lambda: False)
    with pytest.raises(SystemExit, match="_x_kernel on sm_86: spilled 0, shared 102400"):
        compile.main(["sm_86"])
    row["shared"] = 99 * 1024
    assert compile.main(["sm_86"]) == 0
    row["spilled"] = 4
    with pytest.raises(SystemExit, match="spilled 4"):
        compile.main([])  # all targets


def test_bad_input_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(compile.kernels, "interpreted", lambda: True)
    assert_refused(compile.main, "compile", [], "TRITON_INTERPRET unset", capsys)
