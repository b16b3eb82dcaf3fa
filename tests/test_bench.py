"""The counts against counts by hand; every benchmark at a tiny size; bad input."""

import gc
import json
import math
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch

import kernels
from attnpred import Config, InputError, SparseDecoder, Stats, decode_one_token, prefill
from experiments import bench, hot_paths, roofline
from tests.helpers import random_predictor, tiny_llama

CPU = torch.device("cpu")
SHAPE = dict(block_size=8, history_len=8, sink_tokens=8, local_tokens=16, budget=40)
LLAMA = roofline.LLAMA_31_8B


def test_work_by_hand():
    """Llama-3.1-8B: 32 query heads, 8 KV heads of 128; 32,768 tokens in 2,048 blocks of 16; bfloat16."""
    work = {}
    for paths in bench.PATHS:
        found = paths(LLAMA, Config(), 32768, torch.bfloat16, roofline.META, "triton")
        work |= {name: least for name, least, *_ in found}
    pooled = work["pool_history, prompt, one layer"]
    assert pooled.bytes == 2 * 8 * 32768 * 128 + 2 * 32 * 64 * 128 + 4 * 32 * 64 * 2049
    assert pooled.multiply_adds == 32 * 64 * 32768 * 128
    assert work["pool_history, calibration, all layers"].multiply_adds == 32 * 32 * 32768 * 128
    attended = work["sparse_decode, heads alike, one layer"]  # 1,024 tokens for each KV head: 64 blocks
    assert attended.bytes == 2 * 8 * 1024 * 128 * 2 + 2 * 32 * 128 * 2 + 8 * 64 * 4 * 5
    assert attended.multiply_adds == 2 * 32 * 1024 * 128
    assert work["select_blocks, 448 per layer, all layers"].bytes == 4 * 32 * (8 * (2044 - 4) + 448)
    assert work["copy_blocks, a tenth of 448"].bytes == 44 * 8192
    whole, new = (work[f"predict, {what}, all layers"].multiply_adds for what in ("whole image", "1 new rows"))
    assert whole > new


def test_prediction_reads_what_its_rows_need():
    """The rows of history and contributions that new rows touch, marked one by one."""
    history_len, start, end = 16, 2, 12
    for new_rows in (1, 3, 8):
        computed = {0, 1, *range(history_len - 2 - new_rows, history_len)}
        history = {row + near for row in computed for near in (-2, -1, 0, 1, 2)} & set(range(history_len))
        moved = len(history) + (history_len - len(computed)) + len(computed)  # contributions: read or written
        work = hot_paths.prediction_work(3, history_len, new_rows, start, end, end)
        assert work.bytes == 3 * (end - start) * (2 * moved + 4)
        assert work.multiply_adds == kernels.predict_multiply_adds(3, history_len, new_rows, start, end, end)
    assert hot_paths.prediction_work(3, history_len, 0, start, end, start).bytes == 3 * (end - start) * (2 * 32 + 4)


def test_launches_by_hand():
    with torch.inference_mode(), roofline.counting() as counts:
        x = torch.zeros(4, 6, device="meta")  # one launch, as every line that says nothing else
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
        assert x.sum().item() == 0  # the sum; the value is anything
        kernels.pool_history(x[:, None, :], torch.empty(4, 2, 8, 6), 13)  # none: on the host
        kernels.select_blocks(x, 2, "triton")  # a kernel
    operations = dict(zeros=1, _to_copy=3, copy_=3, clone=1, cat=1, sum=1)
    assert counts.operations == {f"aten.{name}": count for name, count in operations.items()}
    assert counts.link_bytes == 12 + 12 + 96 + 12
    ((kernel, grid, arguments, options),) = counts.launches
    assert kernel is kernels._select_kernel and grid == (4,) and options == dict(num_warps=4)
    assert arguments["n"] == 6 and arguments["k"] == 2 and arguments["TILE"] == 256
    assert kernels.pool_history.__module__ == "kernels" and torch.zeros(2).is_cpu  # as before


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(
    "changes", [dict(), dict(dense_layers=1, select_heads="q", share_budget="head", selection_delay=2)]
)
def test_tensors_without_memory_are_counted_like_real_ones(changes, offload):
    """The decoder's own counters, over two intervals; every layer launches its attention for every token."""
    config, model, steps = Config(**SHAPE | changes), tiny_llama(), 16
    late = config.delay(150)
    real = SparseDecoder(config, model, random_predictor(), 150 + steps, offload=offload)
    prefill(model, real, torch.arange(150 - late) % 61)
    for step in range(late + steps):
        real.stats = Stats() if step == late else real.stats
        decode_one_token(model, real, torch.tensor([3]))
    decoder, (_, *tokens) = roofline.decode(roofline.Stub(model.config), config, 150 + steps, steps, offload)
    for name, scale in dict(attention=2, calibration=2, dense=2, choosing=1).items():  # 16 bits in place of 32
        assert scale * getattr(decoder.stats, f"{name}_bytes") == getattr(real.stats, f"{name}_bytes") > 0
    names = [[launch.kernel.__name__ for launch in token.launches] for token in tokens]
    assert all(token.count("_decode_kernel") == 3 for token in names)
    assert sum(token.count("_contributions_kernel") > 0 for token in names) == 2  # selections


def test_bytes_do_not_grow_with_the_text():
    """Counted on Llama-3.1-8B's shape: at 128K within 10 % of 32K. The paper's setting grows."""
    default, paper = (
        [roofline.bytes_per_token(LLAMA, c, n) for n in (32768, 131072)] for c in (Config(), Config.paper())
    )
    assert abs(default[1]["total"] / default[0]["total"] - 1) < 0.1 and paper[1]["total"] > 2 * paper[0]["total"]
    assert default[0]["calibration"] == 32 * 8 * 32768 * 128 * 2 / 32  # M = 32: the keys of 32 layers


def test_model_of_time(monkeypatch):
    """By hand: Llama-3.1-8B, 32K, M = P = 32; a quarter of 32 * 8 * 56 blocks of 8 KB is fetched for 32 tokens."""
    reads = dict(attention=1e9, choosing=1e9, calibration=2e9, dense=9e9, link=1e6)
    monkeypatch.setattr(roofline, "bytes_per_token", lambda *args, **kwargs: reads)
    monkeypatch.setattr(roofline, "weight_bytes", lambda m: 8e9)
    ways = roofline.strategies(LLAMA, Config(), 32768, 0.25, memory=1e10, link=1e8, host=1e10)
    fetched = 32 * 8 * 56 * 8192 / 4
    device = 1.0  # of a second: weights, attention and history
    assert ways["dense, resident"] == (pytest.approx(1.7), 0)
    assert ways["dense, everything streamed"] == (90, 9e9)
    assert ways["sparse, resident"] == (pytest.approx(1.2), 0)
    took, crossing = ways["sparse, offloaded, awaited"]
    assert took == pytest.approx(device + 6.4 / 32 + fetched / 1e8 / 32) and crossing == 1e6 + fetched / 32
    (late,) = [name for name in ways if "late" in name]
    assert late.endswith(" 4") and ways[late][0] == pytest.approx(device + (6.4 - 4 * device) / 32)


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


def ours(model=None, n_tokens=100, n_steps=8, **changes):
    config = Config(**SHAPE | changes)
    return bench.Ours(model or tiny_llama(), config, n_tokens, n_steps, "torch")


def test_transformers_computes_the_same():
    """With the same random cache, the same logits as our dense decoding; the weights are ours, not a copy."""
    pytest.importorskip("transformers")
    model = tiny_llama()
    dense = ours(model=model, dense_layers=9)
    torch.manual_seed(0)
    theirs = bench.Transformers(model, 100)
    with torch.inference_mode():
        for token in (3, 5):
            expected = theirs.model(torch.tensor([[token]]), past_key_values=theirs.cache).logits[0, -1]
            logits = decode_one_token(model, dense.decoder, torch.tensor([token]))
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    pointers = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert {parameter.untyped_storage().data_ptr() for parameter in theirs.model.parameters()} <= pointers


def test_speed_pays_for_whole_intervals(capsys):
    model, config, rounds = tiny_llama(), Config(**SHAPE), 2
    names = "dense", "sparse", "sparse, no graph", "sparse, offloaded"
    found = bench.speed_rows(names, {"float32": model}, config, [300], rounds, "torch", 1e9)
    rows = bench.show(found, bench.SPEED_COLUMNS)
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("| context | weights |  | ms per token |") and len(rows) == len(names)
    for row, line in zip(rows, lines):
        assert line.startswith(f"| {row['context']:,} | float32 | {row['name']} | {row['ms']:,.1f} |")
        assert len(row["rounds"]) == rounds and row["ms"] > 0
    dense, sparse, again, offloaded = rows
    assert dense["speedup"] == 1 and again["same_as"] == "sparse" and offloaded["memory"] != sparse["memory"]
    assert sparse["same_as"] is None and len(sparse["answer"]) == config.intervals(300)[0]
    assert min(sparse["stages"][s] for s in ("attention", "calibration", "prediction", "selection", "gathering")) > 0
    weights = 4 * (3 * (32 * 16 * (4 + 2 + 2 + 4) + 3 * 32 * 48) + 61 * 32)  # q, k, v, out; gate, up, down; the head
    assert roofline.weight_bytes(model.config, 4) == weights
    kv = 2 * 3 * 2 * 16 * 4  # bytes of a token's K and V
    assert dense["bytes"] == weights + kv * (300 - 8 * (rounds + 2) + sum(range(1, 25)) / 24)
    assert 0 < sparse["bytes"] - weights < dense["bytes"] - weights
    json.dumps(rows)


def test_prefill_is_read_by_both(monkeypatch):
    """Both predict the same token; tokens per second are of the fastest round."""
    pytest.importorskip("transformers")
    clock, prompts, read = [0.0], [], bench.prefill

    def now():
        clock[0] += 0.125
        return clock[0]

    def timed(model, decoder, tokens):
        prompts.append(len(tokens))
        clock[0] += 0.5 if len(prompts) == 5 else 0.25  # seconds; the first round takes longer
        return read(model, decoder, tokens)

    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=now))
    monkeypatch.setattr(bench, "prefill", timed)
    models = {"float32": tiny_llama(), "bfloat16": tiny_llama().bfloat16()}
    rows = list(bench.prefill_rows(models, Config(**SHAPE), [300], 2, "torch"))
    ours, _, theirs, _ = rows
    assert prompts == [128] * 2 + [300] * 6 and ours["rounds"] == [625, 375] and ours["tokens_s"] == 800
    assert ours["name"] == "ours" and theirs["name"] == "transformers" and ours["answer"] == theirs["answer"]
    assert [row["dtype"] for row in rows] == ["float32", "bfloat16"] * 2
    assert theirs["rounds"] == [125, 125] and theirs["tokens_s"] == 300 / 0.125


def test_what_does_not_fit_is_left_out(capsys, monkeypatch):
    """Memory runs out when it is made, or in its first step: the others are timed, and nothing keeps it alive."""
    alive, clock = [], [0.0]
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    class Contender:
        def __init__(self, fails=None):
            self.fails = fails
            alive.append(weakref.ref(self))
            self.step() if fails == "made" else None

        def step(self):
            if self.fails:
                raise torch.OutOfMemoryError("too little")
            clock[0] += 0.25  # seconds a token
            return 0

    makers = {name: (lambda name=name: Contender(name), 2) for name in ("made", "stepped")} | {"fine": (Contender, 2)}
    rows = bench.race(makers, 2, CPU)
    assert list(rows) == ["fine"] and rows["fine"] | dict(rounds=[250, 250], ms=250, answer=[0, 0]) == rows["fine"]
    gc.collect()
    assert [contender() is None for contender in alive] == [True, True, False]
    assert capsys.readouterr().err.count("out of memory, left out") == 2


def test_stages_leave_the_decoder_as_it_was():
    sparse = ours(n_tokens=150, n_steps=40)
    spent = bench.stage_ms(sparse, 8)
    assert all(math.isfinite(took) and took >= 0 for took in spent.values())
    assert not {"attend", "select", "pool"} & set(vars(sparse.decoder.cache)) and "choose" not in vars(sparse.decoder)


def test_link_is_counted(monkeypatch, tmp_path):
    """What the offloaded cache counts, per token, in one row."""
    for name, value in dict(TEXT=tmp_path / "text", TEXT_TOKENS=200, TEXT_STEPS=17).items():
        monkeypatch.setattr(bench, name, value)
    bench.TEXT.write_text("7 " * 400)
    encode = SimpleNamespace(encode=lambda text: [(i * i) % 61 for i, _ in enumerate(text.split())])
    row, fraction = bench.count_link(tiny_llama(d_model=512, head_dim=512), encode, Config(**SHAPE))
    selected = 2 * 3 * 2 * 2 * 2 * 8 * 512 * 4 / 17  # 2 selections; 3 layers, 2 heads, 2 blocks of K and V
    assert row["selected, MB per token"] == f"{1e-6 * selected:.3f}" and 0 < fraction <= 1
    assert row["of it fetched"] == f"{1e-6 * selected * fraction:.3f} ({fraction:.1%})"
    assert row["whole cache, MB"] == f"{1e-6 * 2 * 3 * 2 * 217 * 512 * 4:.1f}" and float(row["on the device"]) > 0


def test_a_trace_without_the_gpu_is_an_error(tmp_path):
    contender, path = ours(n_steps=4), str(tmp_path / "trace.json")
    bench.write_trace(lambda: contender, 2, path)
    assert contender.decoder.step == 4 and "aten::" in (tmp_path / "trace.json").read_text()
    elsewhere = SimpleNamespace(model=SimpleNamespace(device=torch.device("cuda")), step=lambda: None)
    with pytest.raises(InputError, match="nothing on the GPU"):
        bench.write_trace(lambda: elsewhere, 1, path)


def table(text):
    """The rows of the last table printed, as dicts of text."""
    head, _, *rows = [line.strip("| ").split(" | ") for line in text.split("\n\n")[-2].splitlines()]
    return [dict(zip(head, row)) for row in rows]


SMALL = "--model-shape toy --block-size 8 --sink-tokens 8 --local-tokens 16 --budget 40 --contexts 256".split()


def test_counting_commands(capsys, monkeypatch):
    assert bench.main(["launches", *SMALL]) == 0
    rows = table(capsys.readouterr().out)
    for name in ("resident", "offloaded"):
        mine = [row for row in rows if row["cache"] == name]
        counts = [int(row["tokens"].removesuffix(" of 8")) for row in mine]
        launches = [int(row["launches"]) for row in mine]
        assert sum(counts) == 8 and counts[0] > 4 and launches[0] == min(launches) > 20  # most tokens launch the least
    kinds = ("attention", "calibration", "choosing", "total", "dense")
    amounts = dict(true=(1, 2, 3, 6, 15), every=range(5))  # GB of each kind, by history_rows

    def counted(m, c, n_tokens):
        return {kind: 1e9 * amount for kind, amount in zip(kinds, amounts[c.history_rows])}

    monkeypatch.setattr(roofline, "bytes_per_token", counted)
    assert bench.main(["bytes", "--contexts", "32768"]) == 0
    default, paper = table(capsys.readouterr().out)
    assert [*default.values()] == ["32,768", "default", *(f"{x},000.0" for x in (1, 2, 3, 6, 15)), "2.5x"]
    assert [*paper.values()] == ["32,768", "--paper", "0.0", *(f"{x},000.0" for x in (1, 2, 3, 4)), "1.3x"]
    ways = {"dense, everything streamed": (8e-3, 2e6), "sparse, resident": (2e-3, 0.0)}
    given = []
    monkeypatch.setattr(roofline, "strategies", lambda *args, **rates: given.append((args[3], rates)) or ways)
    monkeypatch.setattr(bench, "load_model", lambda *args: (None, None))
    monkeypatch.setattr(bench, "count_link", lambda *args: ({}, 0.1))
    assert bench.main(["offload", "--contexts", "32768", "--gb-s", "1000", "10", "100"]) == 0
    streamed, resident = (list(row.values()) for row in table(capsys.readouterr().out))
    assert given == [(0.1, dict(memory=1e12, link=1e10, host=1e11))]
    assert streamed == ["32,768", "dense, everything streamed", "8.00", "2.0", "1.0x", "4.00"]
    assert resident == ["32,768", "sparse, resident", "2.00", "0.0", "4.0x", "1.00"]


def test_numbers_are_written(tmp_path, capsys):
    out = tmp_path / "numbers.json"
    assert bench.main(["prefill", *SMALL, "--dtypes", "float32", "--rounds", "1", "--out", str(out)]) == 0
    numbers = json.loads(out.read_text())
    assert numbers["config"]["budget"] == 40 and numbers["weights"] == "random weights in the shape of toy"
    for row, cells in zip(numbers["rows"], table(capsys.readouterr().out), strict=True):
        assert [cells["weights"], cells["tokens/s"]] == ["float32", f"{row['tokens_s']:,.1f}"]
        assert cells["peak memory beside weights, MB"] == f"{row['memory_mb']:,.0f}"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells the peak of memory")
def test_peak_memory_is_what_is_allocated():
    """Whatever was freed before: 8 tensors of 8 MB at a time, and 512 of 128 KB."""
    for n, size in ((8, 1 << 23), (512, 1 << 17)):
        for _ in range(3):
            total = bench.with_peak_memory(lambda n=n, size=size: [torch.ones(size // 4) for _ in range(n)], CPU)[1]
            assert abs(total - 2**26) < 2**23


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "required"),
        (["everything"], "invalid choice"),
        (["bytes", "--contexts", "16"], "use at least 128"),
        (["speed", "--out", "nowhere/x.json"], "in a folder that exists"),
        (["speed", "--trace", "nowhere/x.json"], "in a folder that exists"),
        (["bytes", "--budget", "1000"], "multiple of the block size"),
        (["speed", "--rounds", "0"], "use at least 1"),
        (["speed", "--contexts", "128", "--rounds", "20"], "fewer --rounds"),
        (["speed", "--contexts", "9000"], "too long"),
        (["speed", "--contexts", "512", "--contenders", "sparse, fast"], "invalid choice: 'sparse, fast'"),
        (["kernels", "--contexts", "1000"], "multiples of 16"),
        (["offload", "--gb-s", "1", "nan", "1"], "use at least 0.001"),
        (["offload", "--gb-s", "1", "x", "1"], "invalid float value"),
        (["offload", "--budget", "8192"], "covers the 4,096 tokens"),
    ],
)
def test_bad_input_is_one_line(options, message, capsys, monkeypatch):
    monkeypatch.setattr(bench, "load_model", lambda *args: (tiny_llama(), None))
    assert bench.main(options) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench: ") and error.count("\n") == 1 and message in error
