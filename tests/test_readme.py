"""What the README shows is true: its tables, options, files and functions."""

import dataclasses
import pathlib
import re

import attnpred
import kernels
from attnpred import Config, OffloadedCache, SparseDecoder

ROOT = pathlib.Path(attnpred.__file__).parent
README = (ROOT / "README.md").read_text()


def test_the_table_of_parameters_is_the_code():
    for f in dataclasses.fields(Config):
        meta = f.metadata
        cells = meta["symbol"], f"`--{f.name.replace('_', '-')}`", f.default, meta["help"]
        row = "| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |"
        assert row in README, f"put this row into README.md:\n{row}"


def test_every_option_named_exists():
    options = {option for action in attnpred.make_parser()._actions for option in action.option_strings}
    elsewhere = {
        "--out",
        "--contexts",
        "--rounds",
        "--n-new",
        "--dtypes",
        "--check",
        "--format",
        "--exercise",
    }  # not ours
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - elsewhere <= options


def test_every_function_and_file_named_exists():
    owners = {"kernels": kernels, "SparseDecoder": SparseDecoder, "OffloadedCache": OffloadedCache}
    names = re.findall(r"`(kernels|SparseDecoder|OffloadedCache)\.([A-Za-z_]+)`", README)
    assert len(names) > 8
    for owner, name in names:
        assert name == "py" or hasattr(owners[owner], name), f"{owner}.{name}"
    files = re.findall(r"[`(]([a-z_A-Z/]+\.(?:py|md|txt|png))[`)]", README)
    assert len(files) > 5 and all((ROOT / file).is_file() for file in files), files


def test_the_line_counts_are_about_right():
    counts = re.findall(r"^\| `([\w/.]+)` \| ([\d,]+) \|", README, re.M)
    assert len(counts) >= 5
    for file, count in counts:
        lines = len((ROOT / file).read_text().splitlines())
        assert abs(lines - int(count.replace(",", ""))) <= 0.1 * lines, f"{file} has {lines} lines"
