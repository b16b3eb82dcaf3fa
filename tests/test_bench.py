"""The formulas against counts by hand and the decoder's own counters; every benchmark at a tiny size; bad input."""

import dataclasses
import json
import math

import pytest
import torch

import kernels
from attnpred import Config, InputError, SparseDecoder, decode_one_token, prefill
from experiments import bench, roofline
from tests.helpers import random_predictor, tiny_llama

CPU = torch.device("cpu")
SHAPE = dict(block_size=8, history_len=8, sink_tokens=8, local_tokens=16, budget=40)
LLAMA = roofline.LLAMA_31_8B


def test_work_by_hand():
    """Llama-3.1-8B: 32 query heads, 8 KV heads of 128; 32,768 tokens in 2,048 blocks of 16; bfloat16."""
    pooled = roofline.pool_history(32, 8, 64, 32768, 128, 16, 2)
    assert pooled.bytes == 2 * 8 * 32768 * 128 + 2 * 32 * 64 * 128 + 4 * 32 * 64 * 2049
    assert pooled.multiply_adds == 32 * 64 * 32768 * 128
    attended = roofline.sparse_decode(32, 8, 8 * 1024, 128, 16, 2)  # 1,024 tokens for each KV head
    assert attended.bytes == 2 * 8 * 1024 * 128 * 2 + 2 * 32 * 128 * 2 + 8 * 64 * 4 * 5
    assert attended.multiply_adds == 2 * 32 * 1024 * 128
    assert roofline.select_blocks(8, 2000, 56).bytes == 4 * 8 * 2056
    assert roofline.copy_blocks(100, 8192).bytes == 819200


def test_prediction_reads_what_its_rows_need():
    """The rows of history and contributions that new rows touch, marked one by one."""
    history_len, start, end = 16, 2, 12
    for new_rows in (1, 3, 8):
        computed = {0, 1, *range(history_len - 2 - new_rows, history_len)}
        history = {row + near for row in computed for near in (-2, -1, 0, 1, 2)} & set(range(history_len))
        moved = len(history) + (history_len - len(computed)) + len(computed)  # contributions: read or written
        work = roofline.predict(3, history_len, new_rows, start, end, end)
        assert work.bytes == 3 * (end - start) * (2 * moved + 4)
        assert work.multiply_adds == kernels.predict_multiply_adds(3, history_len, new_rows, start, end, end)
    assert roofline.predict(3, history_len, 0, start, end, start).bytes == 3 * (end - start) * (2 * 32 + 4)


@pytest.mark.parametrize("n_prompt, steps", [(30, 24), (100, 16), (150, 33)])
@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(calibration_interval=4, selection_interval=2, dense_layers=1),
        dict(calibration_interval=5, selection_interval=1, select_heads="q", share_budget="head"),
        dict(calibration_interval=4, history_rows="true"),
        dict(dense_layers=9),
    ],
)
def test_reads_are_the_decoders_counters(changes, n_prompt, steps):
    model, config = tiny_llama(), Config(**SHAPE | changes)
    decoder = SparseDecoder(config, model, random_predictor(), n_prompt + steps)
    prefill(model, decoder, torch.arange(n_prompt) % 61)
    for _ in range(steps):
        decode_one_token(model, decoder, torch.tensor([3]))
    reads = roofline.decode_reads(model.config, config, n_prompt, steps, model.kv_dtype.itemsize)
    for name in ("attention", "calibration", "choosing", "dense"):
        assert steps * getattr(reads, name) == pytest.approx(getattr(decoder.stats, f"{name}_bytes")), name
    assert steps * reads.total == pytest.approx(decoder.stats.read_bytes)


def test_bytes_do_not_grow_with_the_text():
    """Counted on Llama-3.1-8B's shape: at 128K within 10 % of 32K. The paper's setting grows."""
    default, paper = (
        [roofline.token_reads(LLAMA, c, n).total for n in (32768, 131072)] for c in (Config(), Config.paper())
    )
    assert abs(default[1] / default[0] - 1) < 0.1 and paper[1] > 2 * paper[0]
    reads = roofline.token_reads(LLAMA, Config(), 32768)
    assert reads.calibration == 32 * 8 * 32768 * 128 * 2 / 16  # M = 16: the keys of 32 layers


def test_link():
    """By hand, for 32K: 56 blocks of 8 KV heads, a quarter fetched, every 16 tokens; and the model of time."""
    config, layer = Config(), 8 * 128 * 2 * 2  # K and V of a token
    fetched = 56 * 16 * layer / 4 / 16
    row = 32 * (128 * 2 + 4 * 2049) / 16
    assert roofline.link_bytes(LLAMA, config, 32768, 0.25) == 32 * (fetched + row + layer)
    assert (
        roofline.link_bytes(LLAMA, config, 512, 0.25) > 0 == roofline.link_bytes(LLAMA, Config(dense_layers=32), 512, 1)
    )
    moved, rates = dict(memory=6e9, link=1e9, host=0), dict(memory=3e9, link=1e8, host=1e9)
    assert roofline.token_seconds(moved, rates) == 10 and roofline.token_seconds(moved, rates, overlap=False) == 12
    ways = roofline.offload_strategies(LLAMA, config, 32768, 0.25)
    assert ways["dense, everything streamed"][0]["link"] == pytest.approx(32 * 32768 * layer, rel=1e-3)
    assert ways["sparse, difference, ahead"][0]["link"] == roofline.link_bytes(LLAMA, config, 32768, 0.25)


def test_rivals_compute_the_same():
    """A rival that does less work would flatter no one."""
    torch.manual_seed(0)
    m, config, compared = tiny_llama().config, Config(**SHAPE), 0
    for paths in bench.PATHS:
        for name, work, call, rivals in paths(m, config, 256, torch.float32, CPU, "torch"):
            assert work.bytes > 0
            for rival, rival_call in rivals.items():
                if rival != "SDPA over all blocks" and not name.startswith("copy"):
                    ours, theirs = call().double(), rival_call().double()
                    torch.testing.assert_close(ours, theirs.view(ours.shape), atol=1e-3, rtol=1e-3)
                    compared += 1
    assert compared >= 6


def test_transformers_computes_the_same():
    """With the same random cache, the same logits as our dense decoding; the weights are ours, not a copy."""
    pytest.importorskip("transformers")
    model, predictor = tiny_llama(), random_predictor()
    torch.manual_seed(0)
    ours = bench.Ours(model, predictor, Config(**SHAPE, dense_layers=9), 100, 4, "torch")
    torch.manual_seed(0)
    theirs = bench.Transformers(model, 100)
    with torch.inference_mode():
        for token in (3, 5):
            expected = theirs.model(torch.tensor([[token]]), past_key_values=theirs.cache).logits[0, -1]
            logits = decode_one_token(model, ours.decoder, torch.tensor([token]))
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    pointers = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert {parameter.untyped_storage().data_ptr() for parameter in theirs.model.parameters()} <= pointers


def test_speed_pays_for_whole_intervals(capsys):
    model, config, rounds = tiny_llama(), Config(**SHAPE), 2
    models = {"float32": model}
    rows = bench.show(
        bench.speed_rows(models, random_predictor(), config, [128, 300], rounds, "torch", 1e9), bench.SPEED_COLUMNS
    )
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0].startswith("| context | weights |  | ms per token |")
        and lines[1] == "|---|---|---|---|---|---|---|---|"
    )
    for row, line in zip(rows, lines[2:]):
        assert line.startswith(f"| {row['context']:,} | float32 | {row['name']} | {1e3 * row['seconds']:,.1f} |")
        assert len(row["rounds"]) == rounds and row["seconds"] > 0
    by_name = {row["name"]: row for row in rows if row["context"] == 300}
    assert {"dense", "sparse", "sparse --paper"} <= set(by_name) and by_name["dense"]["speedup"] == 1
    sparse = by_name["sparse"]
    assert min(sparse["stages"][s] for s in ("attention", "calibration", "prediction", "selection", "gathering")) > 0
    m, (interval, _) = model.config, config.intervals(300)
    reads = roofline.decode_reads(m, config, 300 - (rounds + 2) * interval, (rounds + 1) * interval, 4)
    assert sparse["bytes"] == pytest.approx(roofline.weight_bytes(m, 4) + reads.total)  # calibrations included
    json.dumps(rows)


def test_stages_leave_the_decoder_as_it_was():
    ours = bench.Ours(tiny_llama(), random_predictor(), Config(**SHAPE), 150, 40, "torch")
    spent = bench.stage_seconds(ours, 8, CPU)
    assert all(math.isfinite(took) and took >= 0 for took in spent.values())
    assert not {"attend", "select", "pool"} & set(vars(ours.decoder.cache)) and "choose" not in vars(ours.decoder)


def test_streaming_everything_is_dense_attention():
    model, tokens = tiny_llama(), []
    for streamed in (False, True):
        torch.manual_seed(0)
        config = Config(**SHAPE, dense_layers=9)
        ours = bench.Ours(model, random_predictor(), config, 100, 8, "torch", streamed=streamed)
        tokens.append([ours.step() for _ in range(8)])
    assert tokens[0] == tokens[1]


def test_link_is_counted(monkeypatch, tmp_path):
    """What the offloaded cache counts, per token, in one row."""
    monkeypatch.setattr(bench, "TEXT", tmp_path / "text")
    bench.TEXT.write_text("7 " * 400)

    class Numbers:
        encode = staticmethod(lambda text: [(i * i) % 61 for i, _ in enumerate(text.split())])

    row = bench.count_link(tiny_llama(), Numbers, random_predictor(), Config(**SHAPE), 200, 16)
    assert (
        row["selected"] == 2 * 3 * 2 * 2 * 2 * 8 * 16 * 4 / 16
    )  # 2 selections, 3 layers, 2 heads, 2 blocks of K and V
    assert row["fetched"] == pytest.approx(row["fetched_fraction"] * row["selected"]) and 0 < row["on_device"]
    assert row["whole"] == 3 * 2 * 2 * 216 * 16 * 4 and json.dumps(row)


def test_lanes_of_a_trace():
    events = [
        {"cat": "kernel", "name": "_decode_kernel", "ts": 100.0, "dur": 5.0, "args": {"stream": 7}},
        {"cat": "kernel", "name": kernels._copy_kernel.__name__, "ts": 102.0, "dur": 8.0, "args": {"stream": 13}},
        {"cat": "cpu_op", "name": "aten::mm", "ts": 0.0, "dur": 500.0},
        {"name": "process_name", "ph": "M"},
    ]
    lanes = bench.lanes_of_trace({"traceEvents": events})
    assert lanes == {
        "stream 7": [(0, pytest.approx(5e-6), "kernel")],
        "stream 13": [(pytest.approx(2e-6), pytest.approx(8e-6), "copy")],
    }
    with pytest.raises(InputError, match="nothing on the GPU"):
        bench.lanes_of_trace({"traceEvents": events[2:]})


def test_commands_write_their_numbers(tmp_path, capsys):
    out = str(tmp_path / "numbers.json")
    assert bench.main(["bytes", "--contexts", "32768", "131072", "--out", out]) == 0
    rows = json.loads((tmp_path / "numbers.json").read_text())["rows"]
    for row, line in zip(rows, capsys.readouterr().out.splitlines()[4:]):
        assert line.startswith(f"| {row['context']:,} | {row['name']} | {row['attention'] / 1e6:,.1f} |")
        assert line.endswith(f"| {row['dense'] / row['total']:.1f}x |")
    assert bench.main(["offload", "--fetched-fraction", "0.1", "--contexts", "32768", "--out", out]) == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["config"] == dataclasses.asdict(Config()) and len(numbers["modelled"]) == 6


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "required"),
        (["everything"], "invalid choice"),
        (["bytes", "--contexts", "16"], "use at least 128"),
        (["bytes", "--out", "nowhere/x.json"], "in a folder that exists"),
        (["bytes", "--budget", "1000"], "multiple of the block size"),
        (["speed", "--rounds", "0"], "use at least 1"),
        (["speed", "--contexts", "128", "--rounds", "20"], "fewer --rounds"),
        (["speed", "--contexts", "9000"], "too long"),
        (["kernels", "--contexts", "1000"], "multiples of 16"),
        (["offload", "--link-gb-s", "0"], "above 0"),
        (["offload", "--fetched-fraction", "1.5"], "0 ... 1"),
        (["offload", "--text-tokens", "512"], "exceed the budget"),
        (["offload", "--predictor", "nowhere"], "does not exist"),
    ],
)
def test_bad_input_is_one_line(options, message, capsys, monkeypatch):
    monkeypatch.setattr(bench, "model_of", lambda *args: (tiny_llama(), "tiny"))
    assert bench.main(options) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench: ") and error.count("\n") == 1 and message in error
