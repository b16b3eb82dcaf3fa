"""Ahead-of-time compilation: in a process of its own, where Triton compiles instead of interpreting."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import compile


def python(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_one_kernel_on_one_target():
    """More than once if the rows of a ring are not all aligned."""
    options = "sm_90", "--kernel", "_write_rows_kernel", "--model", "SmolLM2-135M 4K"
    heads, _, *rows = python("-m", "experiments.compile", *options).splitlines()
    assert heads == "| kernel | grid | model | target | registers | spilled | shared |" and rows
    for row in rows:
        *names, registers, spilled, shared = (cell.strip() for cell in row.strip("|").split("|"))
        assert names == ["_write_rows_kernel", "87×4", "SmolLM2-135M 4K", "sm_90"]
        assert 0 < int(registers) < 255 and int(spilled) == 0 and 0 <= int(shared) < 99 * 1024


def test_every_kernel_is_launched():
    """On NVIDIA and on AMD; recorded only."""
    python(
        "-c",
        """
from experiments.compile import MODELS, kernel_names, record
for model, amd in (("Llama-3.1-8B 8K", False), ("SmolLM2-135M 4K", True)):
    assert {launch.kernel.__name__ for launch in record(model, amd)} == set(kernel_names()), (model, amd)
""",
    )


@pytest.mark.parametrize("arguments, message", [(["sm_7"], "unknown target sm_7"), (["--kernel", "x"], "'x'")])
def test_errors_are_one_line(arguments, message, capsys):
    assert compile.main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1 and message in err


def test_spills_are_an_error(monkeypatch, capsys):
    row = dict(kernel="_x_kernel", target="sm_86", spilled=0, shared=100 * 1024)
    monkeypatch.setattr(compile, "compile_all", lambda *arguments: [row])
    monkeypatch.setattr(compile.kernels, "interpreted", lambda: False)
    with pytest.raises(SystemExit, match="_x_kernel on sm_86: spilled 0, shared 102400"):
        compile.main(["sm_86"])
    row["shared"] = 99 * 1024
    assert compile.main(["sm_86"]) == compile.main([]) == 0  # without a name: all targets
    row["spilled"] = 4
    with pytest.raises(SystemExit, match="spilled 4"):
        compile.main(["sm_86"])
