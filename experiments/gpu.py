"""Everything that a first run on a GPU should show, in one command of less than ten minutes.

    python -m experiments.gpu --out results/gpu

Tests the kernels natively, times them against the card's measured ceilings and against PyTorch, decodes end to end at
8K, 32K and 128K tokens, and traces one interval. Each step is a command in a process of its own, with a time limit: if
one fails, that is noted and the next one is tried. The folder gets every step's numbers (.json), tables (.md), log and
picture, and report.md with all of them. Llama-3.1-8B's shape has random weights. `--rehearse` runs the same steps at
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
TOY = "--contexts 128 --model-shape toy --block-size 8 --sink-tokens 8 --local-tokens 8 --budget 40 --history-len 5"
TOY += " --calibration-interval 2 --backend triton"


@dataclass
class Step:
    name: str
    limit: int  # seconds
    command: list[str]  # after `python -m`
    picture: str = ""  # of experiments.plots, from the step's NAME.json


def steps_of(out, rehearse) -> list[Step]:
    """In the order in which they run. The limits sum up to less than ten minutes; a rehearsal has its time."""

    def bench(name, limit, command, *options):
        toy = TOY.split() if rehearse else []  # in place of the same options before them
        options = ["experiments.bench", command, "--out", str(out / f"{name}.json"), *options, *toy]
        return Step(name, 600 if rehearse else limit, options, command)

    def speed(name, limit, context, contenders, *options):
        rounds = "1" if rehearse else "3"
        options = ["--dtypes", "bfloat16", "--rounds", rounds, "--contenders", *contenders, *options]
        return bench(name, limit, "speed", "--contexts", str(context), *options)

    tests = ["pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    tests += ["-k", "real_chunks"] if rehearse else []
    return [
        Step("tests", 600 if rehearse else 240, tests),
        bench("kernels", 100, "kernels", "--contexts", *map(str, CONTEXTS)),
        *(speed(f"speed-{n // 1024}K", CONTEXTS[n], n, ON_GPU) for n in ([8192] if rehearse else CONTEXTS)),
        speed("trace", 40, 32768, ["sparse, offloaded"], "--trace", str(out / "trace.perfetto.json")),
    ]


def run_step(step, out, rehearse) -> str:
    """Run a step and draw its picture: "done", or what went wrong. What it prints is in NAME.md and NAME.log."""
    environment = os.environ | ({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if rehearse else {})
    tables, log = out / f"{step.name}.md", out / f"{step.name}.log"
    try:
        with tables.open("w") as output, log.open("w") as errors:
            done = subprocess.run(
                [sys.executable, "-m", *step.command], cwd=ROOT, env=environment, timeout=step.limit,
                stdin=subprocess.DEVNULL, stdout=output, stderr=errors,
            )  # fmt: skip
        if done.returncode:
            last = (log.read_text().strip() or tables.read_text().strip() or "no output").splitlines()[-1]
            return f"failed, status {done.returncode}: {last}"
        if step.picture:
            numbers = json.loads((out / f"{step.name}.json").read_text())
            plots.FROM_FILE[step.picture](numbers, out / f"{step.name}.png")
    except subprocess.TimeoutExpired:
        return f"stopped after {step.limit} s"
    except Exception as error:  # whatever a picture or a file went wrong with, the next step is tried
        return f"failed: {type(error).__name__}: {error}"
    return "done"


def report(title, results, out) -> str:
    """Markdown: what became of each step, {name: (seconds, result)}, then its tables and its picture."""
    lines = [f"# {title}", "", "| step | seconds | result |", "|---|---|---|"]
    lines += [f"| {name} | {seconds:.0f} | {result} |" for name, (seconds, result) in results.items()]
    for name, (_, result) in results.items():
        lines += ["", f"## {name}", ""]
        output, log = ((out / f"{name}.{suffix}").read_text().strip() for suffix in ("md", "log"))
        lines += [output] if result == "done" else ["```", output, *log.splitlines()[-20:], "```"]
        if (out / f"{name}.png").exists():
            lines += ["", f"![{name}]({name}.png)"]
    return "\n".join(lines) + "\n"


def run(argv):
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
    results = {}
    for step in steps_of(out, args.rehearse):
        print(f"gpu: {step.name}, at most {step.limit} s: python -m {shlex.join(step.command)}", file=sys.stderr)
        begun = time.perf_counter()
        result = run_step(step, out, args.rehearse)
        results[step.name] = time.perf_counter() - begun, result
        print(f"gpu: {step.name}: {result}, {results[step.name][0]:.0f} s", file=sys.stderr)
        write_atomically(out / "report.md", lambda path: path.write_text(report(title, results, out)))
    if any(result != "done" for _, result in results.values()):
        sys.exit(1)


def main(argv=None) -> int:
    return exit_status("gpu", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
