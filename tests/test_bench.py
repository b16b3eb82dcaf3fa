"""Compares counts with counts by hand, runs every benchmark at a tiny size, and checks refusals."""

import gc
import json
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import experiments
import kernels
from attnpred import Config, InputError, SparseDecoder, Stats
from experiments import bench, evaluate, hot_paths, roofline
from tests.helpers import assert_refused, random_predictor, tiny_llama

CPU = torch.device("cpu")
ROOT = pathlib.Path(bench.__file__).parents[1]
SHAPE = dict(block_size=8, history_len=8, sink_tokens=8, local_tokens=16, budget=56, echo_blocks=2)
LLAMA = roofline.LLAMA_31_8B
SMALL = "--model-shape toy --block-size 8 --sink-tokens 8 --local-tokens 16 --budget 56 --echo-blocks 2".split()


def test_work_by_hand():
    """Llama-3.1-8B: 32 query heads, 8 KV heads of 128; 32,768 tokens in 2,048 blocks of 16; bfloat16."""
    moved, multiply_adds = {}, {}
    for paths in bench.PATHS:
        for name, *work, _, _ in paths(LLAMA, Config(), 32768, torch.bfloat16, roofline.META, "triton"):
            moved[name], multiply_adds[name] = work
    pooled, attended = "pool_history, prompt, one layer", "sparse_decode, heads alike, one layer"
    assert moved["find_echoes"] == 8 * 32768 + 8 * 4
    assert moved["rotate_and_write"] == 2 * (2 * 40 + 3 * 8) * 128 and moved["swiglu"] == 2 * 3 * 14336
    assert moved[pooled] == 2 * 8 * 32768 * 128 + 2 * 32 * 256 * 128 + 4 * 32 * 256 * 2049  # 4 queries for a row
    assert multiply_adds[pooled] == 32 * 256 * 32768 * 128
    assert multiply_adds["pool_history, calibration, all layers"] == 32 * 32 * 4 * 32768 * 128
    assert moved[attended] == 2 * 8 * 1024 * 128 * 2 + 2 * 32 * 128 * 2 + 8 * 64 * 4  # 64 blocks for each KV head
    assert multiply_adds[attended] == 2 * 32 * 1024 * 128
    assert moved["select_blocks, 14080 of all layers"] == 4 * (32 * 8 * (2044 - 1) + 14080)  # 55 for each head
    assert moved["copy_blocks, a tenth of 440"] == 44 * 8192
    columns = 32 * 8 * (2044 - 1)  # of all images
    assert moved["predict, whole image, all layers"] == columns * (128 * 2 + 4)  # 64 rows read, 64 written; a score
    # computed: rows 0, 1, 61, 62, 63; read for that: rows 0-3 and 59-63; the contributions of rows 2-60 are kept
    assert moved["predict, a new row, all layers"] == columns * ((9 + 59 + 5) * 2 + 4)


def test_predict_multiply_adds():
    """Cells counted by hand: 144 multiply-adds in conv1, 4,608 in conv2 and 32 in conv3."""
    conv1, conv2 = 144, 4608 + 32

    def count(new_rows, valid_end):
        return hot_paths.predict_multiply_adds(2, 8, new_rows, 3, 13, valid_end)

    assert count(0, 3) == count(4, 13) == 2 * 80 * (conv1 + conv2)  # nothing is kept: 8 x 10 cells
    edges = (3 + 4) * 10 * conv1 + (2 + 3) * 10 * conv2  # rows 0-1 need rows 0-2 of conv1, rows 5-7 need rows 4-7
    assert count(1, 13) == 2 * edges
    assert count(1, 11) == 2 * (edges + 5 * 5 * conv1 + 3 * 4 * conv2)  # and rows 2-4 of the last 2 + 2 columns


def test_launches_by_hand():
    with torch.inference_mode(), roofline.counting() as counts:
        x = torch.zeros(4, 6, device="meta")  # one launch, as each line without a comment
        y = x.to(torch.float16)
        x[1:].copy_(x[:-1])
        x.view(-1)[3:].t().unsqueeze(0), x.float(), torch.empty_like(x), x.new_empty(3)  # none
        x.transpose(0, 1).reshape(-1)
        host = torch.zeros(6, dtype=torch.float16)  # none: the host's memory
        host.add_(1)  # none
        y[0].copy_(host)  # 12 bytes over the link
        host.copy_(y[1])  # and 12
        x.cpu()  # and 96
        host.to("meta")  # and 12
        torch.cat([x, x])
        x.sum()
        F.rms_norm(x, (6,))
        kernels.pool_history(x[:, None, :], torch.empty(4, 2, 8, 6), 13)  # none: on the host
        kernels.select_blocks(x, 2, "triton")  # five kernels
    operations = dict(zeros=1, _to_copy=3, copy_=3, clone=1, cat=1, sum=1, rms_norm=1)
    assert counts.operations == {f"aten.{name}": count for name, count in operations.items()}
    assert counts.link_bytes == 12 + 12 + 96 + 12
    *counting, (kernel, grid, arguments) = counts.launches
    assert [one.kernel for one in counting] == 4 * [kernels._count_kernel] and kernel is kernels._select_kernel
    assert grid == (1, 4) and [arguments[name] for name in ("n", "k", "num_warps")] == [6, 2, 8]
    assert kernels.pool_history.__module__ == "kernels" and torch.zeros(2).is_cpu  # as before


@pytest.mark.parametrize("offload", [False, True])
def test_tensors_without_memory_are_counted_like_real_ones(offload):
    """The decoder's counters agree over two intervals, and every layer launches its attention for every token."""
    config, model, steps, late = Config(**SHAPE, calibration_interval=8), tiny_llama(), 16, 2 * offload
    real = SparseDecoder(config, model, random_predictor(), 150 + steps, offload=offload)
    real.prefill(torch.arange(150 - late) % 61)
    for step in range(late + steps):
        real.stats = Stats() if step == late else real.stats
        real.decode(torch.tensor([3]))
    decoder, (_, *tokens) = roofline.decode(roofline.Stub(model.config), config, 150 + steps, steps, offload)
    for name, scale in dict(attention=2, calibration=2, dense=2, choosing=1).items():  # 16 bits in place of 32
        assert scale * getattr(decoder.stats, f"{name}_bytes") == getattr(real.stats, f"{name}_bytes") > 0
    names = [[launch.kernel.__name__ for launch in token.launches] for token in tokens]
    assert all(token.count("_decode_kernel") == 3 and token.count("_echo_kernel") == 1 for token in names)
    assert sum(token.count("_contributions_kernel") > 0 for token in names) == 2  # selections


def test_rivals_compute_the_same():
    """A rival that did less work would make the comparison unfair."""
    torch.manual_seed(0)
    m, config, compared = tiny_llama().config, Config(**SHAPE), 0
    for paths in bench.PATHS:
        for name, moved, _, call, rivals in paths(m, config, 256, torch.float32, CPU, "torch"):
            assert moved > 0
            for rival, rival_call in rivals.items():
                if rival != "SDPA over all blocks" and not name.startswith("copy"):
                    ours, theirs = call().double(), rival_call().double()
                    torch.testing.assert_close(ours, theirs.view(ours.shape), atol=1e-3, rtol=1e-3)
                    compared += 1
    assert compared >= 6


def test_transformers_computes_the_same():
    """With the same random cache, its logits are those of our dense decoding. The weights are shared, not copied."""
    model = tiny_llama()
    dense = bench.Ours(model, Config(**SHAPE | dict(budget=128)), 100, 108, 2, "torch", False)
    theirs = bench.Transformers(model, 100, 2)
    with torch.inference_mode():
        for token in (3, 5):
            expected = theirs.model(torch.tensor([[token]]), past_key_values=theirs.cache).logits[0, -1]
            logits = dense.decoder.decode(torch.tensor([token]))
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    pointers = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert {parameter.untyped_storage().data_ptr() for parameter in theirs.model.parameters()} <= pointers


@pytest.fixture
def on_cpu(monkeypatch):
    """The tests that count what a CPU does run on it also where there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def table(text):
    """The rows of the first table printed, as dicts of text."""
    part = next(part for part in text.split("\n\n") if part.startswith("|"))
    head, _, *rows = [line.strip("| ").split(" | ") for line in part.splitlines()]
    return [dict(zip(head, row)) for row in rows]


def rows_of(tmp_path, command, *options):
    """The rows that a command writes with --out."""
    out = tmp_path / "numbers.json"
    assert bench.main([command, *SMALL, *options, "--out", str(out)]) == 0
    return json.loads(out.read_text())


def test_speed_pays_for_whole_intervals(on_cpu, tmp_path, capsys):
    names = "dense", "sparse", "sparse, offloaded", "transformers", "adapter"
    options = "--contexts", "256", "--rounds", "2", "--calibration-interval", "16", "--dtypes", "float32", "bfloat16"
    rows = rows_of(tmp_path, "speed", *options, "--contenders", *names)
    assert [row["name"] for row in rows] == [*names, *names] and rows[0]["speedup"] == rows[5]["speedup"] == 1
    for row, cells in zip(rows, table(capsys.readouterr().out), strict=True):
        assert row["config"]["budget"] == 56 and row["weights"] == "random weights in the shape of toy"
        assert row["ms"] == sum(row["rounds"]) / len(row["rounds"]) > 0 and row["tokens_s"] == 1e3 / row["ms"]
        assert [cells["context"], cells["weights"], cells[""]] == ["256", row["dtype"], row["name"]]
        assert cells["ms per token"] == f"{row['ms']:,.1f}" and cells["tokens/s"] == f"{row['tokens_s']:,.1f}"
        assert cells["GB/s read (of a copy's)"].startswith(f"{1e-6 * row['bytes'] / row['ms']:,.1f} (")
        assert cells["same tokens as"] == row.get("same_as", "–")
    dense, sparse, _, transformers, adapter = rows[:5]
    assert len(sparse["rounds"]) == 2 and len(sparse["answer"]) == 16
    assert "same_as" not in sparse and transformers["same_as"] == "dense"
    assert adapter["same_as"] == "sparse" and adapter["stages"]["attention"] > 0
    ratios = [dense_ms / ms for dense_ms, ms in zip(dense["rounds"], sparse["rounds"])]
    assert sparse["speedup"] == sum(ratios) / 2
    assert sparse["stages"].keys() == bench.STAGES.keys() | {"rest of the model"} and min(sparse["stages"].values()) > 0
    weights = 4 * (32 * 16 * (4 + 2 + 2 + 4) + 3 * 32 * 48 + 64 * 32)  # q, k, v, out; gate, up, down; the head
    kv = 2 * 2 * 16 * 4  # bytes of a token's K and V
    assert dense["bytes"] == weights + kv * (256 - 8 * 4 + sum(range(1, 25)) / 24)
    assert 0 < sparse["bytes"] - weights < dense["bytes"] - weights


def test_prefill_is_read_by_both(on_cpu, tmp_path, capsys):
    """Both predict the same token; tokens per second are of the fastest round."""
    rows = rows_of(tmp_path, "prefill", "--contexts", "256", "--rounds", "3", "--dtypes", "float32", "bfloat16")
    names = [(row["dtype"], row["name"]) for row in rows]
    assert names == [(dtype, name) for dtype in ("float32", "bfloat16") for name in ("ours", "transformers")]
    assert rows[0]["answer"] == rows[1]["answer"]
    for row, cells in zip(rows, table(capsys.readouterr().out), strict=True):
        assert row["tokens_s"] == 256e3 / min(row["rounds"])
        assert cells["tokens/s, fastest round"] == f"{row['tokens_s']:,.1f}"


def test_what_does_not_fit_is_left_out(capsys):
    """If memory runs out, as a contender is made or in its first round, it is freed and the others are timed."""
    alive = []

    class Contender:
        def __init__(self, fails):
            self.fails = fails
            alive.append(weakref.ref(self))
            self.round() if fails == "made" else None

        def round(self):
            if self.fails != "never":
                raise torch.OutOfMemoryError("too little")
            return [7, 7]

    makers = {("float32", name): partial(Contender, name) for name in ("made", "decoding", "never")}
    (row,) = bench.race(makers, 3, CPU)
    assert row["name"] == "never" and row["answer"] == [7, 7] and len(row["rounds"]) == 3
    gc.collect()
    assert [contender() is None for contender in alive] == [True, True, False]
    assert capsys.readouterr().err.count("out of memory, left out") == 2


def test_link_is_counted(on_cpu, monkeypatch, capsys):
    """MB over the link per token after the prompt, for 3 layers, 2 heads, K and V in float32, with K = E = 2."""
    texts = {"words": "7 " * 400, "numbers": "8 " * 400}
    for name, value in dict(TEXTS={name: name for name in texts}, TEXT_TOKENS=200, TEXT_STEPS=17).items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(evaluate, "read_text", texts.get)
    alone = [0] * 190 + [*range(10)] + [10 + i for i in range(17)]  # the last 17 tokens occur once

    def encode(text, control_tokens):
        assert not control_tokens
        return alone if text[0] == "7" else [(i * i) % 61 for i in range(217)]

    model = tiny_llama(d_model=512, head_dim=512)
    monkeypatch.setattr(bench, "load_model", lambda *args: (model, SimpleNamespace(encode=encode)))
    assert bench.main(["offload", *SMALL, "--calibration-interval", "8"]) == 0
    out = capsys.readouterr().out
    block = 3 * 2 * 2 * 8 * 512 * 4 / 17e6  # MB of each head of each layer, per token
    assert f"the whole cache is {217 / 8 * 17 * block:,.2f} MB" in out
    for row, echoes in zip(table(out), (False, True)):
        assert row["selected, MB"] == f"{2 * 2 * block:,.3f}"  # 2 selections of 2 blocks a head
        assert row["written back, MB"] == f"{2 * block:,.3f}"  # 2 full blocks
        copied, found, copied_echoes = (float(row[f"{kind}, MB"]) for kind in COPIED)
        assert 0 < copied < 2 * 2 * block  # slots have some already
        assert 0 < copied_echoes < found <= 17 * 2 * block if echoes else copied_echoes == found == 0


COPIED = "of these copied", "echoes", "of the echoes copied"


def test_a_trace_without_the_gpu_is_an_error(tmp_path):
    elsewhere = SimpleNamespace(model=SimpleNamespace(device=torch.device("cuda")), round=lambda: None)
    with pytest.raises(InputError, match="nothing on the GPU"):
        bench.write_trace(lambda: elsewhere, tmp_path / "trace.json")


def test_counted_launches(on_cpu, capsys):
    """Most tokens launch the least."""
    assert bench.main(["launches", *SMALL, "--contexts", "256"]) == 0
    rows = table(capsys.readouterr().out)
    for name in ("resident", "offloaded"):
        counts = [int(row["tokens"].removesuffix(" of 16")) for row in rows if row["cache"] == name]
        launches = [int(row["launches"]) for row in rows if row["cache"] == name]
        assert sum(counts) == 16 and counts[0] > 8 and launches[0] == min(launches) > 20


def test_readme_shows_the_bytes(on_cpu, capsys):
    """The defaults are Llama-3.1-8B at 8K, 32K and 128K tokens."""
    assert bench.main(["bytes"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3 and not set(lines[2:]) - set((ROOT / "experiments/README.md").read_text().splitlines())


def test_readme_shows_the_launches(on_cpu, capsys):
    """The README says that its counts at 131,072 tokens are those at 16,384."""
    assert bench.main(["launches", "--contexts", "16384"]) == 0
    readme = (ROOT / "experiments/README.md").read_text().split("## Launches per token")[1]
    heads = "cache", "Triton", "PyTorch", "launches"
    printed = capsys.readouterr().out
    found, shown = ([[row[head] for head in heads] for row in table(text)] for text in (printed, readme))
    assert found == shown


@pytest.mark.parametrize(
    "options, message",
    [
        (["bytes", "--contexts", "16"], "at least 128 tokens"),
        (["speed", "--rounds", "0"], "--rounds at least 1"),
        (["speed", "--out", "nowhere/x.json"], "in a folder that exists"),
        (["speed", "--trace", "x.txt"], "ending in .json"),
        (["speed", "--contexts", "128", "--rounds", "20"], "fewer --rounds"),
        (["speed", "--contexts", "9000"], "context is 8,192 tokens"),
        (["kernels", "--contexts", "1000"], "multiples of 16"),
        (["offload", "--budget", "8192"], "covers the 4,096 tokens"),
    ],
)
def test_bad_input_is_one_line(on_cpu, options, message, capsys, monkeypatch):
    monkeypatch.setattr(bench, "load_model", lambda *args: (tiny_llama(), None))
    assert_refused(bench.main, "bench", options, message, capsys)


def test_a_missing_package_is_named_before_anything_is_measured(capsys, monkeypatch):
    monkeypatch.setattr(bench, "load_model", None)
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    for command in (["speed", "--contenders", "dense", "transformers"], ["prefill"]):
        assert_refused(bench.main, "bench", [*command, "--contexts", "128"], "this comparison needs transf", capsys)
    assert sys.excepthook is experiments.name_what_is_missing
    sys.excepthook(ModuleNotFoundError, ModuleNotFoundError(name="pandas"), None)
    assert capsys.readouterr().err == "the package pandas is missing: pip install -r requirements-dev.txt\n"
    sys.excepthook(ZeroDivisionError, ZeroDivisionError("x"), None)
    assert "ZeroDivisionError: x" in capsys.readouterr().err


def rehearse(*arguments, **environment):
    """The finished process of a call of gpu.sh."""
    command = ["bash", ROOT / "experiments/gpu.sh", *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


ON_CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal; run gpu.sh itself")


@ON_CPU_ONLY
@pytest.mark.parametrize("call, n_steps", [("check", 2), ("measure", 4)])
def test_a_rehearsal_of_the_first_run(call, n_steps, tmp_path):
    """Every step runs, in the interpreter; a second run refuses to overwrite its results."""
    done = rehearse(call, tmp_path / call, "toy")
    report = (tmp_path / call / "report.md").read_text()
    assert done.returncode == 0 and report.count("| ok |") == n_steps, report
    with tarfile.open(tmp_path / f"{call}.tar.gz") as tar:
        names = set(tar.getnames())
    assert f"{call}/report.md" in names
    if call == "measure":
        assert len(json.loads((tmp_path / call / "kernels.json").read_text())) == 12
        (dense, sparse), (offloaded,) = (
            json.loads((tmp_path / call / f"{name}.json").read_text()) for name in ("speed-128", "offloaded")
        )
        assert [row["name"] for row in (dense, sparse, offloaded)] == bench.ON_GPU
        assert json.loads((tmp_path / call / "trace.perfetto.json").read_text())["traceEvents"]
        assert "measure/trace.perfetto.json" in names
    again = rehearse(call, tmp_path / call, "toy")
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and "not an empty folder" in again.stderr


@ON_CPU_ONLY
@pytest.mark.parametrize("call, limit", [("check", 240), ("measure", 400)])
def test_the_first_run_has_time_and_continues_after_a_failure(call, limit, tmp_path):
    """With a python that only records its arguments, and fails at first, the other steps run valid commands."""
    python, notes, out = tmp_path / "python", tmp_path / "notes", tmp_path / "results" / call
    python.write_text(
        f'#!/bin/sh\nprintf "%s\\037" "$@" >>{notes}; echo >>{notes}\n'
        'case "$3" in kernels|--model-shape) echo "| half a table |"; echo "no luck" >&2; exit 3;; *) echo ok;; esac\n'
    )
    python.chmod(0o755)
    done = rehearse(call, out, PATH=f"{tmp_path}:{os.environ['PATH']}")
    limits = [int(seconds) for seconds in re.findall(r"at most (\d+) s", done.stderr)]
    steps = [line.split("\037")[:-1] for line in notes.read_text().splitlines()][1:]  # the first names the GPU
    assert done.returncode == 1 and len(limits) == len(steps) and sum(limits) <= limit
    report = (out / "report.md").read_text()
    assert report.count("| failed, status 3: no luck |") == 1 and "| half a table |" in report
    assert report.count("| ok |") == len(steps) - 1
    commands = [options for _, module, *options in steps if module == "experiments.bench"]
    contexts = [bench.make_parser().parse_args(options).contexts for options in commands]
    assert contexts == ([[8192, 32768, 131072], [8192], [32768], [131072], [8192], [131072]] if commands else [])
    tests = [argument for _, module, *options in steps if module == "pytest" for argument in options]
    assert all((ROOT / test).exists() for test in tests if test.endswith(".py"))


@ON_CPU_ONLY
@pytest.mark.parametrize(
    "arguments, message",
    [(["check"], "a folder for"), (["chekc", "x", "toy"], "check or measure"), (["check", "x"], "no GPU")],
)
def test_the_first_run_refuses(arguments, message, tmp_path):
    arguments = [str(tmp_path / "x") if argument == "x" else argument for argument in arguments]
    done = rehearse(*arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr


def test_a_row_that_fails_loses_no_other(tmp_path, capsys, monkeypatch):
    """Neither a path, nor a rival, nor a contender; what an interruption leaves is shown and written."""
    monkeypatch.setattr(bench, "seconds", lambda call, device, graph=True: call() is None or 1.0)

    def paths(m, c, n_tokens, *others):
        yield "first", 1, 0, int, {"rival": lambda: 1 // 0, "other": int}
        yield "second", 1, 0, lambda: torch.ones(2) @ torch.ones(3), {}

    def interrupted(*arguments):
        yield "last", 1, 0, int, {}
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "PATHS", (paths, interrupted))
    monkeypatch.setattr(
        bench, "ceilings", lambda *args: dict.fromkeys(("copy", "host copy", "matmul", "matmul tf32"), 1.0)
    )
    out = tmp_path / "numbers.json"
    assert bench.main(["kernels", *SMALL, "--contexts", "256", "--out", str(out)]) == 130
    shown, complaints = capsys.readouterr()
    rows = json.loads(out.read_text())
    assert [row["path"] for row in rows] == ["first", "last"] and rows[0]["rivals"].startswith("other 1,000,000.0")
    assert [row["path"] for row in table(shown[shown.index("| path") :])] == ["first", "last"]
    assert "rival: ZeroDivisionError" in complaints and "paths, 256 tokens: RuntimeError" in complaints
