"""Plant small bugs, one at a time, and see whether the tests notice: python -m tests.faults [--jobs N] [WORD ...]

faults.toml lists them: the file, a text that occurs in it once, its replacement, what that breaks, and the tests that
should fail. Each is planted in a scratch copy of the project, after the tests have passed there without it. The exit
status is the number of bugs that no test notices.
"""

import argparse
import multiprocessing
import os
import pathlib
import shlex
import shutil
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor

os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
import hypothesis
import pytest
import torch  # noqa: F401  imported once: every run of tests is a fork of this process
import transformers  # noqa: F401
import triton  # noqa: F401

ROOT = pathlib.Path(__file__).parent.parent
COPIED = ["*.py", "*.md", "pyproject.toml", "experiments/*.py", "tests/*.py", "weights/*.py", "weights/*.safetensors"]
LIMIT = 900  # seconds: tests that do not end by then have noticed the bug


def copy_project(folder):
    for path in (path for pattern in COPIED for path in ROOT.glob(pattern)):
        (folder / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, folder / path.relative_to(ROOT))
    for model in (path.parent for path in ROOT.glob("weights/*/config.json")):
        (folder / "weights" / model.name).symlink_to(model)


def run_tests(folder, tests):
    """In a forked process: pytest's exit status is the process's."""
    os.chdir(folder)
    sys.path[0] = str(folder)  # where `python -m` put the project
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    torch.set_num_threads(1)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1), os.dup2(output, 2)
    one_failure = dict(phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate], report_multiple_bugs=False)
    hypothesis.settings.register_profile("one failure is enough", **one_failure)
    hypothesis.settings.load_profile("one failure is enough")
    os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *shlex.split(tests)])))


def status(tests, fault=None):
    """pytest's exit status, with a bug planted or without; None if it does not end."""
    with tempfile.TemporaryDirectory() as scratch:
        copy_project(folder := pathlib.Path(scratch))
        if fault:
            path = folder / fault["file"]
            path.write_text(path.read_text().replace(fault["text"], fault["replacement"]))
        process = multiprocessing.get_context("fork").Process(target=run_tests, args=(folder, tests))
        process.start()
        process.join(LIMIT)
        if process.exitcode is None:
            process.kill()
            process.join()
            return None
        if process.exitcode and not fault:
            print((folder / "output.txt").read_text()[-3000:])
        return process.exitcode


def main(words, jobs):
    faults = tomllib.loads((ROOT / "tests/faults.toml").read_text())["fault"]
    faults = [fault for fault in faults if any(word in f"{fault['file']}: {fault['breaks']}" for word in words or [""])]
    for fault in faults:
        count = (ROOT / fault["file"]).read_text().count(fault["text"])
        assert count == 1, f"{fault['file']} holds this text {count} times: {fault['text']}"
    selections, survivors = list(dict.fromkeys(fault["tests"] for fault in faults)), 0
    with ThreadPoolExecutor(jobs) as pool:
        for tests, code in zip(selections, pool.map(status, selections)):
            assert code == 0, f"without a bug, `pytest {tests}` ends with {code}"
        codes = pool.map(status, (fault["tests"] for fault in faults), faults)
        for number, (fault, code) in enumerate(zip(faults, codes), 1):
            survivors += code == 0
            verdict = "caught: no end" if code is None else "caught" if code else "SURVIVES"
            print(f"{number}/{len(faults)} {verdict}: {fault['file']}, {fault['breaks']}", flush=True)
    print(f"{survivors} of {len(faults)} survive")
    return survivors


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="WORD", help="only bugs with one of these in FILE: WHAT IT BREAKS")
    parser.add_argument("--jobs", type=int, default=2, help="how many are tried at the same time")
    args = parser.parse_args()
    sys.exit(main(args.words, args.jobs))
