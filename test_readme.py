"""What the README shows is true: its example runs, its options exist, the functions that it names are there."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

import attnpred
import kernels
import offload

ROOT = pathlib.Path(__file__).parent
README = (ROOT / "README.md").read_text()


def test_the_worked_example_passes_and_can_fail(tmp_path):
    [example] = re.findall(r"```python\n(.*?)```", README, re.S)
    for broken in (False, True):
        code = example.replace("weight / tl.sum(weight, 0)", "weight") if broken else example
        (tmp_path / "test_merge.py").write_text(code)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_merge.py"]
        done = subprocess.run(command, cwd=tmp_path, env=os.environ.copy(), capture_output=True, text=True)
        assert done.returncode == broken, done.stdout


def test_every_option_and_only_options_are_named():
    with pytest.raises(SystemExit):
        attnpred.parse_args(["--help"])
    named = set(re.findall(r"`(--[a-z-]+)", README.split("## Every option")[1])) | set(
        re.findall(r"\| `(--[a-z-]+)` \|", README)
    )
    parser_options = set(re.findall(r"--[a-z][a-z-]+", subprocess_help()))
    assert named == parser_options - {"--help"}


def subprocess_help():
    return subprocess.run(
        [sys.executable, "attnpred.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def test_every_function_named_exists():
    modules = {"kernels": kernels, "offload": offload, "attnpred": attnpred, "SparseDecoder": attnpred.SparseDecoder}
    names = re.findall(r"`(kernels|offload|attnpred|SparseDecoder)\.([A-Za-z_]+)`", README)
    assert len(names) > 8
    for owner, name in names:
        assert name == "py" or hasattr(modules[owner], name), f"{owner}.{name}"
    for file in re.findall(r"`([a-z_/]+\.(?:py|md|txt))`", README):
        assert (ROOT / file).is_file() or file == "test_merge.py", file
