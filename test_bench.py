"""The benchmarks at a tiny size on the CPU: what is compared is the same, the model of the link adds up, bad input."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench
from attnpred import Config, InputError, decode_one_token
from test_attnpred import random_predictor, tiny_llama

CPU = torch.device("cpu")
TINY = dict(n_heads=4, n_kv_heads=2, head_dim=16)


def test_every_path_runs():
    ceilings = bench.measure_ceilings(CPU, size=1 << 12, n=16)
    results = bench.bench_kernels(CPU, "torch", contexts=(1024,), layers=2, model=TINY, ceilings=ceilings)
    rows = json.loads(json.dumps(results))["kernels"]
    assert {row["path"].split(",")[0] for row in rows} >= {
        "pool_history",
        "predict",
        "predict_incremental",
        "select_blocks",
        "sparse_decode",
        "copy_blocks",
    }
    for row in rows:
        times = row["seconds"], *row["rivals"].values()
        assert all(math.isfinite(t) and t > 0 for t in times), row


def test_rivals_compute_the_same():
    """A rival that does less work would flatter no one."""
    torch.manual_seed(0)
    s = bench.Setting(1024, **TINY, layers=1, device=CPU, backend="torch", dtype=torch.float32, budgets=(256, 512))
    for group in bench.GROUPS:
        for path in group(s):
            for name, (rival,) in path.rivals.items():
                if name == "SDPA over the full cache" and "every block" not in path.name:
                    continue  # another result, at another price: that is the point
                ours, theirs = path.calls[0](), rival()
                if ours is None:  # copies write in place; both write the same slots
                    continue
                ours = ours[0] if isinstance(ours, tuple) else ours
                torch.testing.assert_close(ours.double(), theirs.view(ours.shape).double(), atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    command = [sys.executable, "bench.py", "--kernels"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, cwd=Path(bench.__file__).parent, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "no GPU" in done.stderr


# End to end

SMALL = Config(
    block_size=8, history_len=8, sink_tokens=8, local_tokens=16, budget=40, calibration_interval=3, dense_layers=1
)


def test_transformers_computes_the_same():
    """With the same random cache, the same logits as ours, dense; and the weights are ours, not a copy."""
    pytest.importorskip("transformers")
    predictor = random_predictor()
    for tied in (False, True):
        model = tiny_llama()
        model.config = bench.replace(model.config, tie_embeddings=tied)
        if tied:
            model.head.weight = model.embed
        dense = bench.replace(SMALL, dense_layers=3)
        torch.manual_seed(0)
        ours = bench.Ours(model, predictor, dense, 100, 4, "torch")
        torch.manual_seed(0)
        theirs = bench.Transformers(model, 100)
        assert theirs.model.model.embed_tokens.weight.data_ptr() == model.embed.data_ptr()
        with torch.inference_mode():
            for token in (3, 5):
                expected = theirs.model(torch.tensor([[token]]), past_key_values=theirs.cache).logits[0, -1]
                logits = decode_one_token(model, ours.decoder, torch.tensor([token]))
                torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_end_to_end(capsys, tmp_path):
    plots = pytest.importorskip("plots")
    model = tiny_llama()
    results = bench.bench_end_to_end(
        model, "tiny", random_predictor(), SMALL, [200, 300], 3, "torch", copy_size=1 << 16
    )
    printed = capsys.readouterr().out
    rows = json.loads(json.dumps(results))["rows"]
    names = {row["name"] for row in rows}
    assert names >= {"dense", "sparse"} and len(rows) == 2 * len(names)
    for row in rows:
        assert row["seconds"] > 0 and row["least_seconds"] > 0 and len(row["rounds"]) == 2, row
        assert f"| {row['context']:,} | {row['name']} |" in printed
    assert all(row["speedup"] == 1 for row in rows if row["name"] == "dense")
    for row in rows:
        if row["name"] == "sparse":
            assert min(row["stages"][stage] for stage in row["stages"] if stage != "fetching") > 0
    dense, sparse = (next(r for r in rows if r["name"] == name and r["context"] == 300) for name in ("dense", "sparse"))
    assert sparse["least_seconds"] < dense["least_seconds"]
    plots.draw_speed(results, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size < 200_000


def test_memory_is_noticed():
    with bench.peak_memory(CPU) as peak:
        held = torch.ones(40_000_000, dtype=torch.uint8)
        del held
    if peak.taken is None:
        pytest.skip("this system does not tell")
    assert 30e6 < peak.taken < 60e6


def test_stages_add_up_and_leave_the_kernels_as_they_were():
    before = {name: getattr(bench.kernels, name) for name in bench.STAGES}
    ours = bench.Ours(tiny_llama(), random_predictor(), SMALL, 150, 8, "torch", offload=True)
    begun = bench.time.perf_counter()
    spent = bench.stage_seconds(ours, 3, CPU)
    took = (bench.time.perf_counter() - begun) / 3
    assert min(spent.values()) > 0 and 0.9 * took < sum(spent.values()) <= took
    assert before == {name: getattr(bench.kernels, name) for name in bench.STAGES}


def test_late_fetching_attends_to_the_same():
    outcomes = []
    for prefetch in (True, False):
        torch.manual_seed(0)
        ours = bench.Ours(tiny_llama(), random_predictor(), SMALL, 150, 8, "torch", offload=True, prefetch=prefetch)
        assert isinstance(ours.decoder.cache, bench.FetchedLate) != prefetch
        outcomes.append(([ours.step() for _ in range(6)], int(ours.decoder.cache.fetched), ours.decoder.history))
    (tokens, fetched, history), (late_tokens, late_fetched, late_history) = outcomes
    assert tokens == late_tokens and fetched == late_fetched > 0 and torch.equal(history, late_history)


# The offloaded cache

LLAMA = bench.LLAMA_31_8B


def test_bytes_of_the_link():
    """By hand, for Llama-3.1-8B in 16 bits at 32,768 tokens and budget 1024."""
    link = bench.Link.of(LLAMA, Config(), 32768, 0.25)
    assert link.full == 2 * 8 * 32768 * 128 * 2 and link.keys == link.full / 2
    assert link.wanted == 2 * 8 * 56 * 16 * 128 * 2 and link.fetched == link.wanted / 4
    assert link.written == 2 * 8 * 128 * 2
    assert bench.Link.of(LLAMA, Config(select_heads="q"), 32768, 1).fetched == 4 * link.wanted
    assert bench.Link.of(LLAMA, Config(), 64, 1).wanted == 0


def test_times_follow_from_the_bytes():
    link = bench.Link.of(LLAMA, Config(), 32768, 0.25)
    times = bench.offload_times(LLAMA, Config(), link, 1e9, 0.0)
    streamed = 2 * link.full + 30 * link.keys / 5
    assert times["everything, streamed"] == (32 * link.full, pytest.approx(32 * link.full / 1e9))
    assert times["the selection anew, awaited"][0] == streamed + 30 * link.wanted
    for name in ("the difference, awaited", "the difference, ahead of time"):
        assert times[name] == (pytest.approx(streamed + 30 * link.fetched), pytest.approx(times[name][0] / 1e9))


def test_staggered_calibration_moves_as_much_more_evenly():
    link, config = bench.Link.of(LLAMA, Config(), 32768, 0.0), Config(stagger_calibration=True)
    plain, even = (bench.schedule(LLAMA, c, link, 1e9, 0.0, 41)[1] for c in (Config(), config))
    assert plain[-1] == pytest.approx(even[-1], rel=0.05)
    longest = [max(b - a for a, b in zip(ends, ends[1:])) for ends in (plain, even)]
    assert longest[1] < 0.4 * longest[0]


def test_prefetching_hides_behind_compute():
    """With nothing to stream: hidden while a token's copies are shorter than its compute, else the link decides."""
    config, compute = Config(dense_layers=0, calibration_interval=10**6), 0.01
    for fetched, expected in ((100, compute), (10**6, 32 * 10**6 / 1e9)):
        link = bench.Link(full=0, keys=0, wanted=fetched, fetched=fetched, written=0)
        lanes, ends = bench.schedule(LLAMA, config, link, 1e9, compute, 30)
        assert ends[-1] - ends[-2] == pytest.approx(expected, rel=1e-3)
        for spans in lanes.values():  # a lane does one thing at a time
            assert all(a + took <= b + 1e-9 for (a, took, _), (b, *_) in zip(spans, spans[1:]))
        assert sum(took for _, took, _ in lanes["compute"]) == pytest.approx(30 * compute)


def test_offload_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    command = ["--offload", "--context", "4096", "32768", "--link-gb-s", "55", "--fetched-fraction", "0.1"]
    command += ["--json", str(tmp_path / "o.json"), "--png", str(tmp_path / "o.png")]
    assert bench.main(command) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("A model, not a measurement") and "a lower bound" in printed
    rows = json.loads((tmp_path / "o.json").read_text())["modelled"]
    assert len(rows) == 10 and {row["context"] for row in rows} == {4096, 32768}
    assert (tmp_path / "o.png").stat().st_size < 200_000


def test_fetched_fraction_is_measured():
    """Of the default LLM: some of the selection changes, most of it stays."""
    config = Config(budget=256)
    fraction, chosen, blocks = bench.measure_fetched_fraction(
        bench.load_predictor(bench.DEFAULT_PREDICTOR), config, 480, 6
    )
    assert 0 < fraction < 0.5 and chosen == 8 and blocks == (486 - 64) // 16 - 4


def test_lanes_of_a_trace():
    events = [
        {"cat": "kernel", "name": "_sparse_decode_kernel", "ts": 100.0, "dur": 5.0, "args": {"stream": 7}},
        {"cat": "kernel", "name": "_copy_blocks_kernel", "ts": 102.0, "dur": 8.0, "args": {"stream": 13}},
        {"cat": "cpu_op", "name": "aten::mm", "ts": 0.0, "dur": 500.0},
        {"name": "process_name", "ph": "M"},
    ]
    lanes, window = bench.lanes_of_trace({"traceEvents": events})
    assert lanes == {
        "stream 7": [(0, pytest.approx(5e-6), "kernel")],
        "stream 13": [(pytest.approx(2e-6), pytest.approx(8e-6), "copy")],
    }
    assert window == (0.0, pytest.approx(10e-6))
    with pytest.raises(InputError, match="nothing on the GPU"):
        bench.lanes_of_trace({"traceEvents": events[2:]})


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "is required"),
        (["--kernels", "--offload"], "not allowed with"),
        (["--end-to-end", "--contexts", "16"], "128 tokens or more"),
        (["--end-to-end", "--contexts", "9000", "--model-shape", "smollm2-135m"], "is too long"),
        (["--end-to-end", "--json", "nowhere/x.json"], "a file in a folder that exists"),
        (["--end-to-end", "--rounds", "1"], "at least 2"),
        (["--offload", "--link-gb-s", "0"], "above 0"),
        (["--offload", "--fetched-fraction", "1.5"], "lies in 0 ... 1"),
        (["--offload", "--text-tokens", "512"], "at least the budget"),
        (["--offload", "--predictor", "nowhere"], "does not exist"),
        (["--end-to-end", "--budget", "1000"], "multiple of the block size"),
    ],
)
def test_bad_input_is_one_line(options, message, capsys):
    assert bench.main(options) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench: ") and error.count("\n") == 1 and message in error
