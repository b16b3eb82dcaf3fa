"""Plant small bugs, one at a time, and see whether the tests notice: python -m tests.faults [FILE.py ...]

faults.toml lists them: the file, a text that occurs in it once, its replacement, what that breaks, and the tests that
should fail. Each is planted in a scratch copy of the project. Prints the survivors; the exit status is their number.
"""

import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib

ROOT = pathlib.Path(__file__).parent.parent
COPIED = ["*.py", "pyproject.toml", "experiments/*.py", "tests/*.py", "weights/*.py", "weights/*.safetensors"]


def survives(fault, folder) -> bool:
    """Whether the tests pass with this bug planted in the copy at `folder`."""
    path = folder / fault["file"]
    text = path.read_text()
    assert text.count(fault["text"]) == 1, f"{fault['file']} must hold this text once: {fault['text']}"
    path.write_text(text.replace(fault["text"], fault["replacement"]))
    try:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *shlex.split(fault["tests"])]
        return subprocess.run(command, cwd=folder, capture_output=True).returncode == 0
    finally:
        path.write_text(text)


def main(files):
    faults = tomllib.loads((ROOT / "tests/faults.toml").read_text())["fault"]
    faults = [fault for fault in faults if not files or fault["file"] in files]
    survivors = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        for path in (path for pattern in COPIED for path in ROOT.glob(pattern)):
            (folder / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
            shutil.copy(path, folder / path.relative_to(ROOT))
        for number, fault in enumerate(faults, 1):
            survived = survives(fault, folder)
            survivors += [fault] * survived
            verdict = "SURVIVES" if survived else "caught"
            print(f"{number}/{len(faults)} {verdict}: {fault['file']}, {fault['breaks']}", flush=True)
    print(f"{len(faults)} faults, {len(survivors)} survivors")
    return len(survivors)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
