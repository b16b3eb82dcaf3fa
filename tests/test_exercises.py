"""Each exercise is solved by kernels.py's own kernel, and a beginner's mistake in it gets a verdict that helps."""

import inspect
import pathlib
import re

import pytest
from hypothesis import Phase

import exercises.judge as judge
import kernels

ROOT = pathlib.Path(judge.__file__).parents[1]
FILES = sorted((ROOT / "exercises").glob("[0-9]_*.py"))
RIGHT, WRONG = (
    r"OUT OF BOUNDS: line \d+ {}.*\n.*The values are right",
    r"{}: \d+ of .*\n.*at .*\n.*expected .*\n.*actual",
)
INSIDE, OUTSIDE = r"[\s\S]*Nothing was read or written out", r"[\s\S]*OUT OF BOUNDS: line \d+ {}"

MISTAKES = {  # in which exercise; in the kernel's text: what, replaced by what; the verdict
    "echo: no mask before the text": ("mask=matches & (p >= j), ", "mask=matches, ", RIGHT.format("reads ids_ptr - 1")),
    "echo: no mask after the last block": (", mask=block < n_blocks", "", RIGHT.format(r"writes scores_ptr \+ 1,")),
    "echo: one match too few": (
        "range(1, MATCH_TOKENS + 1)",
        "range(1, MATCH_TOKENS)",
        WRONG.format("blocks") + INSIDE,
    ),
    "copy: no mask after the row": ("bits, mask=word < WORDS)", "bits)", r"writes destination_ptr \+ \d+, .* strides"),
    "copy: one tile too few": ("tl.cdiv(WORDS, TILE)", "WORDS // TILE", WRONG.format("destination") + INSIDE),
    "copy: another stride": ("_row * stride_destination", "_row * stride_source", WRONG.format("destination")),
    "select: earlier ties forgotten": ("        ties -= tl.sum(ties_here, 0)\n", "", r"writes blocks_ptr \+"),
    "select: one too far": (
        "tl.cumsum(taken.to(tl.int32), 0) - 1",
        "tl.cumsum(taken.to(tl.int32), 0)",
        WRONG.format("blocks") + OUTSIDE.format(r"writes blocks_ptr \+ 1,"),
    ),
    "select: no mask after the row": (
        "taken = ((key > kth) & (index < n))",
        "taken = (key > kth)",
        "writes blocks_ptr",
    ),
    "pool: the future": (
        "key[None, :] <= position[:, None]",
        "(key < n_tokens)[None, :]",
        WRONG.format("pooled") + INSIDE,
    ),
    "pool: l not rescaled": ("l = l * tl.exp(m - m_new) + ", "l = l + ", WRONG.format("pooled") + INSIDE),
    "pool: no mask after the last block": ("column < n_blocks", "column >= 0", RIGHT.format("writes block_max_ptr")),
    "decode: acc not rescaled": ("acc * rescale[:, None]", "acc", WRONG.format("out") + INSIDE),
    "decode: another stride": (
        "% BLOCK_SIZE * stride_t",
        "% BLOCK_SIZE * stride_n",
        WRONG.format("out") + OUTSIDE.format(r"reads [kv]_ptr \+"),
    ),
    "decode: -1 attended": (
        "tl.where(listed[None, :], logits,",
        "tl.where(True, logits,",
        WRONG.format("out") + INSIDE,
    ),
    "predict: one row too few": (", last_row + 1):", ", last_row):", WRONG.format("p") + r"[\s\S]*nan" + INSIDE),
    "predict: no bias": ("acc_next = bias", "acc_next = tl.zeros([TILE, 32], tl.float32)", WRONG.format("p") + INSIDE),
    "predict: no mask after the image": (" & (tap_column < end)", "", WRONG.format("p")),
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
    assert status == 1 and re.search(expected, out) and "Traceback" not in out, out
    told = out.partition(f"{kernel_of(file)[0]} is not right yet. ")[2].partition("\n===")[0]
    assert 3 < len(told.splitlines()) < 12, out


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_exercise_has_the_signature_of_kernels_py_and_no_body(file):
    name, function = kernel_of(file)
    own = judge.load_kernel(str(file))[1].fn
    assert inspect.signature(own) == inspect.signature(function)
    assert inspect.getsource(own).endswith("    pass  # your code\n") and f"exercises/{file.name}\n" in file.read_text()


REFUSED = {  # a change of the solved first exercise; the line that says what is wrong
    "the syntax": ("run = tl", "run = = tl", r"^ERROR: \S+mine.py, line \d+: SyntaxError: "),
    "an import": (
        "import MATCH_TOKENS",
        "import MATCH",
        r"^ERROR: \S+mine.py, line \d+: ImportError: cannot import name 'MATCH'",
    ),
    "a name": (
        "def _echo_kernel",
        "def my_kernel",
        r"^ERROR: \S+mine.py: one kernel of kernels.py must be defined here",
    ),
    "a parameter": (
        "ids_ptr, position_ptr, scores_ptr",
        "ids_ptr, scores_ptr",
        r"^ERROR: .*_echo_kernel\(ids_ptr, position_ptr,",
    ),
    "a variable": (
        "matches = p <= position",
        "matches = p <= end",
        r"^ +\S+mine.py, line \d+: NameError: name 'end' is",
    ),
    "a shape": ("(TILE_BLOCKS, BLOCK_SIZE))", "(TILE, BLOCK_SIZE))", r"^ +\S+mine.py, line \d+: ValueError: "),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_run_is_refused_in_a_line(what, verdict):
    old, new, expected = REFUSED[what]
    text = solved(FILES[0])
    assert old in text
    status, out = verdict(text.replace(old, new))
    assert status in (1, 4) and re.search(expected, out, re.M) and "Traceback" not in out, out


def test_a_missing_file_is_refused_in_a_line(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert pytest.main(["test_kernels.py", "--exercise", "exercises/7.py"]) == 4
    assert "there is no file exercises/7.py" in capsys.readouterr().err


def test_kernels_py_is_as_before(verdict):
    before = dict(vars(kernels))
    assert verdict("def _echo_kernel(:")[0] == 4 and vars(kernels) == before
    assert (
        verdict(solved(FILES[1]), [dict(phases=[Phase.generate], max_examples=1)])[0] == 0 and vars(kernels) == before
    )
