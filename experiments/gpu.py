"""Everything that a first run on a GPU should show, in one command of less than ten minutes.

    python -m experiments.gpu --out results/gpu

Tests the kernels natively, times them against the card's measured ceilings and against PyTorch, decodes end to end at
8K, 32K and 128K tokens, and traces one interval. Each step is a command in a process of its own, with a time limit: if
one fails, that is noted and the next one is tried. The folder gets every step's numbers (.json), output (.log) and
pictures, and report.md with all tables. Llama-3.1-8B's shape has random weights. `--rehearse` runs the same steps at
toy size, in Triton's interpreter, without a GPU. The exit status is 1 if a step failed.
"""

import importlib.metadata
import json
import os
import pathlib
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass

import torch

from attnpred import InputError, OneLineParser, exit_status, write_atomically
from experiments import plots
from experiments.bench import ON_GPU

ROOT = pathlib.Path(__file__).parent.parent
TESTS = ("test_kernels.py", "tests/test_offload.py", "tests/test_streams.py")
CONTEXTS = {8192: 40, 32768: 50, 131072: 100}  # seconds that decoding may take
TOY = "--model-shape toy --block-size 8 --sink-tokens 8 --local-tokens 8 --budget 40 --history-len 5 --backend triton"


@dataclass
class Step:
    name: str
    limit: int  # seconds
    command: list[str]  # after `python -m`
    picture: str = ""  # of experiments.plots, from the step's NAME.json


def steps_of(out, rehearse) -> list[Step]:
    """In the order in which they run. The limits sum up to less than ten minutes; a rehearsal has its time."""

    def bench(name, limit, command, contexts, *options):
        options = ["experiments.bench", command, "--out", str(out / f"{name}.json"), *options, "--contexts"]
        options += ["128", *shlex.split(TOY)] if rehearse else map(str, contexts)
        return Step(name, 600 if rehearse else limit, options, command)

    def speed(name, limit, context, contenders, *options):
        options = ["--dtypes", "bfloat16", "--contenders", *contenders, *options]
        options += ["--rounds", "1", "--calibration-interval", "2"] if rehearse else ["--rounds", "3"]
        return bench(name, limit, "speed", [context], *options)

    tests = ["pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    tests += ["-k", "real_chunks or test_attend_lists"] if rehearse else []
    contexts = {8192: 40} if rehearse else CONTEXTS
    return [
        Step("tests", 600 if rehearse else 240, tests),
        bench("kernels", 100, "kernels", CONTEXTS),
        *(speed(f"speed-{n // 1024}K", limit, n, ON_GPU) for n, limit in contexts.items()),
        speed("trace", 40, 32768, ["sparse, offloaded"], "--trace", str(out / "trace.perfetto.json")),
    ]


def run_step(step, out, rehearse) -> dict:
    """Run a step, draw its picture; returns {"step", "seconds", "result": "done" or what went wrong, "output"}."""
    print(f"gpu: {step.name}, at most {step.limit} s: python -m {shlex.join(step.command)}", file=sys.stderr)
    environment = os.environ | ({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if rehearse else {})
    begun, log = time.perf_counter(), out / f"{step.name}.log"
    output, result = "", "done"
    try:
        with log.open("w") as errors:
            done = subprocess.run(
                [sys.executable, "-m", *step.command], cwd=ROOT, env=environment, timeout=step.limit,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True,
            )  # fmt: skip
        output = done.stdout
        if done.returncode:
            last = (log.read_text().strip() or output.strip() or "no output").splitlines()[-1:]
            result = f"failed, status {done.returncode}: {last[0]}"
        elif step.picture:
            numbers = json.loads((out / f"{step.name}.json").read_text())
            plots.FROM_FILE[step.picture](numbers, out / f"{step.name}.png")
    except subprocess.TimeoutExpired as late:
        output, result = (late.stdout or b"").decode(), f"stopped after {step.limit} s"
    except Exception as error:  # whatever a picture or a file went wrong with, the next step is tried
        result = f"failed: {type(error).__name__}: {error}"
    if result != "done":
        output = "\n".join(["```", output, *log.read_text().splitlines()[-20:], "```"])
    return dict(step=step.name, seconds=time.perf_counter() - begun, result=result, output=output)


def report(title, rows, out) -> str:
    """Markdown: what became of each step, then its tables and its picture."""
    lines = [f"# {title}", "", "| step | seconds | result |", "|---|---|---|"]
    lines += [f"| {row['step']} | {row['seconds']:.0f} | {row['result']} |" for row in rows]
    for row in rows:
        lines += ["", f"## {row['step']}", "", row["output"].strip()]
        if (out / f"{row['step']}.png").exists():
            lines += ["", f"![{row['step']}]({row['step']}.png)"]
    return "\n".join(lines) + "\n"


def run(argv) -> bool:
    parser = OneLineParser(prog="gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder, or an empty one")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes, in Triton's interpreter")
    args = parser.parse_args(argv)
    if not (args.rehearse or torch.cuda.is_available()):
        raise InputError("no GPU was found: --rehearse runs the same steps at toy size without one")
    out = pathlib.Path(args.out).absolute()
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise InputError(f"{args.out} is not empty: give a new folder")
    except OSError as error:
        raise InputError(f"{args.out} cannot be made: {error.strerror}") from None
    device = "a CPU: a rehearsal, whose figures mean nothing" if args.rehearse else torch.cuda.get_device_name()
    title = f"attnpred on {device}, torch {torch.__version__}, triton {importlib.metadata.version('triton')}"
    rows = []
    for step in steps_of(out, args.rehearse):
        rows.append(run_step(step, out, args.rehearse))
        print(f"gpu: {step.name}: {rows[-1]['result']}, {rows[-1]['seconds']:.0f} s", file=sys.stderr)
        write_atomically(out / "report.json", lambda path: path.write_text(json.dumps(rows, indent=1)))
        write_atomically(out / "report.md", lambda path: path.write_text(report(title, rows, out)))
    return all(row["result"] == "done" for row in rows)


def main(argv=None) -> int:
    results = []
    return exit_status("gpu", lambda: results.append(run(argv))) or int(results != [True])


if __name__ == "__main__":
    sys.exit(main())
