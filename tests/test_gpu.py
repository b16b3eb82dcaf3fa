"""The first run on a GPU, rehearsed without one: every step, what fails, and bad input."""

import json

import pytest
import torch

from experiments import bench, gpu
from experiments.gpu import Step
from tests.helpers import assert_refused


def test_rehearsal(tmp_path, capsys):
    out = tmp_path / "results" / "gpu"
    assert gpu.main(["--rehearse", "--out", str(out)]) == 0, capsys.readouterr().err
    report = (out / "report.md").read_text()
    assert "a rehearsal, whose figures mean nothing" in report
    steps = [line.split(" | ")[0] for line in report.splitlines() if line.endswith("| done |")]
    assert steps == ["| tests", "| kernels", "| speed-8K", "| trace"]
    for name in ("kernels", "speed-8K", "trace"):
        assert (
            json.loads((out / f"{name}.json").read_text())["rows"]
            and (out / f"{name}.md").read_text().strip() in report
        )
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG" and f"![{name}]({name}.png)" in report
    rows = {row["name"]: row for row in json.loads((out / "speed-8K.json").read_text())["rows"]}
    assert list(rows) == list(bench.ON_GPU)
    for one, other in (("sparse", "sparse, no graph"), ("sparse, late", "sparse, offloaded")):
        assert rows[one]["answer"] == rows[other]["answer"] and rows[other]["same_as"]
    assert json.loads((out / "trace.perfetto.json").read_text())["traceEvents"]


def test_real_steps_are_commands_within_ten_minutes(tmp_path):
    tests, *others = gpu.steps_of(tmp_path, rehearse=False)
    assert tests.limit + sum(step.limit for step in others) <= 600 and "-k" not in tests.command
    assert all((gpu.ROOT / path).exists() for path in gpu.TESTS)
    contexts = set()
    for step in others:
        module, *options = step.command
        args = bench.make_parser().parse_args([*options, "--model-shape", "llama-3.1-8b"])
        assert module == "experiments.bench" and not hasattr(args, "block_size")  # the default settings
        contexts |= set(args.contexts)
    assert contexts == {8192, 32768, 131072}


def test_a_failure_is_noted_and_the_next_step_is_tried(tmp_path, monkeypatch, capsys):
    (tmp_path / "module.py").write_text(
        "import json, sys, time\n"
        "print('| a table |', flush=True), print('what happened', file=sys.stderr, flush=True)\n"
        "time.sleep(60) if 'slow' in sys.argv else sys.exit(3) if 'fails' in sys.argv else None\n"
        "json.dump({}, open(sys.argv[1], 'w'))\n"
    )
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    out = tmp_path / "out"
    pictures = dict(fails="", slow="", undrawn="speed", fine="")  # {} holds nothing that can be drawn
    steps = [Step(name, 8, ["module", str(out / f"{name}.json"), name], pictures[name]) for name in pictures]
    monkeypatch.setattr(gpu, "steps_of", lambda *args: steps)
    with pytest.raises(SystemExit, match="1"):
        gpu.main(["--rehearse", "--out", str(out)])
    summary, *sections = (out / "report.md").read_text().split("\n## ")
    results = dict(zip(pictures, [line.strip("| ").split(" | ")[2] for line in summary.splitlines()[4:]], strict=True))
    assert results["fails"] == "failed, status 3: what happened" and results["slow"] == "stopped after 8 s"
    assert results["undrawn"].startswith("failed: KeyError") and results["fine"] == "done"
    fenced = "\n\n```\n| a table |\nwhat happened\n```\n"
    assert sections == [*(name + fenced for name in ("fails", "slow", "undrawn")), "fine\n\n| a table |\n"]
    assert capsys.readouterr().err.count("gpu: ") == 8


@pytest.mark.parametrize(
    "options, message",
    [
        (["--out", "new"], "no GPU was found"),
        (["--rehearse"], "--out"),
        (["--rehearse", "--out", "full"], "not empty"),
        (["--rehearse", "--out", "full/file"], "cannot be made"),
    ],
)
def test_bad_input_is_one_line(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("a user's")
    assert_refused(gpu.main, "gpu", options, message, capsys)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "file"]
