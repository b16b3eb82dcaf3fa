"""Each exercise is solved by kernels.py's own kernel; with a beginner's mistake in it, the verdict says what is wrong."""

import inspect
import pathlib
import re

import pytest
from hypothesis import Phase

import exercises.judge as judge
import kernels

ROOT = pathlib.Path(judge.__file__).parents[1]
FILES = sorted((ROOT / "exercises").glob("[0-9]_*.py"))
NO_STRAY = "Nothing was read or written out of bounds"

MISTAKES = {  # in which exercise; in the kernel's text: what, replaced by what; a part of the verdict
    "echo: no mask before the text": (
        "mask=matches & (p >= j), other=-2",
        "mask=matches, other=-2",
        r"line \d+ reads ids_ptr \+ -1, but this tensor has the shape \(\d+,\)",
    ),
    "echo: no mask after the last block": (", mask=block < n_blocks", "", r"line \d+ writes scores_ptr \+ \d+, but"),
    "echo: the last match is left out": ("range(1, MATCH_TOKENS + 1)", "range(1, MATCH_TOKENS)", NO_STRAY),
    "copy: no mask after the row": (
        "bits, mask=word < WORDS)",
        "bits)",
        r"line \d+ writes destination_ptr \+ \d+, but .* strides",
    ),
    "copy: the last tile is left out": ("tl.cdiv(WORDS, TILE)", "WORDS // TILE", NO_STRAY),
    "copy: the other tensor's stride": ("destination_row * stride_destination", "destination_row * stride_source", ""),
    "select: the ties of earlier tiles are forgotten": ("        ties -= tl.sum(ties_here, 0)\n", "", ""),
    "select: one too far": ("tl.cumsum(taken.to(tl.int32), 0) - 1", "tl.cumsum(taken.to(tl.int32), 0)", "blocks_ptr"),
    "select: no mask after the last score": ("taken = ((key > kth) & (index < n))", "taken = (key > kth)", ""),
    "pool: keys of the future": ("key[None, :] <= position[:, None]", "(key < n_tokens)[None, :]", NO_STRAY),
    "pool: the sum is not rescaled": ("l = l * tl.exp(m - m_new) + ", "l = l + ", "pooled"),
    "pool: no mask after the last block": ("(column < n_blocks)[None, :]", "(column >= 0)[None, :]", "block_max_ptr"),
    "decode: acc is not rescaled": ("acc * rescale[:, None]", "acc", NO_STRAY),
    "decode: the stride of blocks for tokens": ("% BLOCK_SIZE * stride_t", "% BLOCK_SIZE * stride_n", "OUT OF BOUNDS"),
    "decode: no mask where no block is": ("tl.where(listed[None, :], logits, float(", "tl.where(True, logits, float(", ""),
    "predict: the last row is left out": ("range(first_row - 1, last_row + 1)", "range(first_row - 1, last_row)", "p"),
    "predict: the next row has no bias": ("acc_next = bias", "acc_next = tl.zeros([TILE, 32], tl.float32)", NO_STRAY),
    "predict: no mask after the image": (" & (tap_column < end)", "", ""),
}


def kernel_of(file):
    name, _ = judge.load_kernel(str(file))
    return name, getattr(kernels, name).fn


def solved(file, old="", new=""):
    """The text of an exercise with kernels.py's own kernel in it, in which `old` is replaced."""
    source = inspect.getsource(kernel_of(file)[1])
    assert old in source, f"kernels.py has no longer: {old}"
    return file.read_text().partition("@triton.jit")[0] + source.replace(old, new)


@pytest.fixture
def verdict(tmp_path, capsys, monkeypatch):
    """A function that judges a text, and returns the exit status and what is printed. Few examples, to save time."""
    monkeypatch.chdir(ROOT)

    def run(text, runs=judge.RUNS):
        monkeypatch.setattr(judge, "RUNS", runs)
        path = tmp_path / "mine.py"
        path.write_text(text)
        status = pytest.main(["test_kernels.py", "--exercise", str(path), "-p", "no:cacheprovider"])
        out, err = capsys.readouterr()
        return int(status), out + err

    return run


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_solution_is_kernels_py(file, verdict):
    status, out = verdict(solved(file), [dict(phases=[Phase.generate], max_examples=4)])
    assert status == 0 and "mine.py: solved" in out, out


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_a_verdict(mistake, verdict):
    old, new, expected = MISTAKES[mistake]
    (file,) = (ROOT / "exercises").glob(f"?_{mistake.partition(':')[0]}.py")
    status, out = verdict(solved(file, old, new))
    print(out)
    assert status == 1 and re.search(expected, out), out
