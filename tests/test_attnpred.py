"""The method against a naive simulation of it, the command line on the real model, and bad input."""

import io
import math
import os
import pathlib
import signal
import subprocess
import sys
from unittest import mock

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

import attnpred
import kernels
from attnpred import Config, InputError, SparseDecoder, decode_one_token, generate, prefill, sample
from tests.helpers import assert_refused, random_predictor, tiny_llama
from weights.fetch_llm import FetchError, fetch_default_llm

ROOT = pathlib.Path(attnpred.__file__).parent
PROMPT_LENGTHS = st.one_of(st.integers(150, 300), st.integers(1, 60))
HEADS = st.sampled_from([(2, 2), (1, 3), (3, 1)])  # KV heads, query heads to each


class NaiveMethod:
    """The method as a simulation: the whole attention matrix, masked. Only `choose`, among ties, asks the decoder."""

    def __init__(self, config, model, predictor, choose):
        self.c, self.m, self.predictor, self.choose = config, model.config, predictor, choose
        self.k, self.v, self.rows, self.selected = {}, {}, {}, {}
        self.recovery = {}  # by layer: shares of the true attention in calibrated steps, (Hq,) each
        self.due, self.late = {}, {}  # by layer: the step after which a selection is made; (a step, a true row)
        self.step = 0

    def intervals(self, n_tokens):
        m = self.c.calibration_interval
        if m == "auto":
            m = next(2**i for i in range(3, 30) if n_tokens / 2**i <= self.c.budget)
        return m, self.c.selection_interval or m

    def delay(self, n_tokens):
        longest = min(*self.intervals(n_tokens), self.c.local_tokens) - 1
        auto = self.c.selection_delay == "auto"
        return min(max(1, self.intervals(n_tokens)[0] // 8), longest) if auto else self.c.selection_delay

    def attend(self, layer, q, k, v):
        c, m, b = self.c, self.m, self.c.block_size
        self.k[layer] = torch.cat([self.k[layer], k], 1) if layer in self.k else k
        self.v[layer] = torch.cat([self.v[layer], v], 1) if layer in self.v else v
        keys = self.k[layer].repeat_interleave(m.n_heads // m.n_kv_heads, 0).double()  # (Hq, T, D)
        values = self.v[layer].repeat_interleave(m.n_heads // m.n_kv_heads, 0).double()
        new, total = q.shape[1], keys.shape[1]
        logits = q.double() @ keys.mT / m.head_dim**0.5  # (Hq, new, T)
        causal = torch.ones(new, total, dtype=torch.bool).tril(total - new)
        true = logits.masked_fill(~causal, -torch.inf).softmax(-1)
        mask = self.mask(layer, total) if self.step and layer >= c.dense_layers else None
        p = true if mask is None else logits.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
        interval, selection_interval = self.intervals(total)
        calibrated, fits = self.step % interval == 0, layer not in self.selected
        pooled = F.pad(true if calibrated else p, (0, -total % b)).unflatten(-1, (-1, b)).amax(-1)
        if c.select_heads == "kv":
            pooled = pooled.unflatten(0, (m.n_kv_heads, -1)).square().mean(1).sqrt()  # (heads, new, N)
        rows = self.rows.setdefault(layer, [])
        due = self.step + self.delay(total) if self.step else 0
        if self.step % selection_interval == 0:
            self.due[layer] = due
        if calibrated and self.step and not fits:
            self.late[layer] = due, pooled[:, 0]
            self.recovery.setdefault(layer, []).append((true * mask[:, None]).sum((1, 2)))
        else:
            for i in range(new):
                if c.history_rows == "every" or (calibrated and (new - 1 - i) % interval == 0):
                    rows.append(pooled[:, i])
        if self.late.get(layer, (-1,))[0] == self.step:
            rows.append(self.late[layer][1])
        return (p @ values).float()

    def mask(self, layer, total):
        """Which tokens (Hq, T) a sparse layer attends to in this step; None: all."""
        c, b = self.c, self.c.block_size
        start, end = c.sink_tokens // b, total // b - c.local_tokens // b
        if self.due[layer] == self.step - 1 and end - start > c.topk_blocks:
            scores = self.predictor(self.image(layer, end)[:, :, start:])  # (heads, n)
            before = torch.zeros(len(scores), end - start, dtype=torch.bool)  # (heads, n)
            if layer in self.selected:
                before[:, : self.selected[layer][0].shape[1]] = self.selected[layer][0]
            self.selected[layer] = self.choose(layer, scores, before, start, end), end  # (heads, n) bool
        if layer not in self.selected:
            return None
        chosen, end = self.selected[layer]
        blocks = torch.ones(len(chosen), -(-total // b), dtype=torch.bool)  # sink, and all from `end` on
        blocks[:, start:end] = chosen
        return blocks.repeat_interleave(b, 1)[:, :total].repeat_interleave(self.m.n_heads // len(chosen), 0)

    def image(self, layer, width):
        """The last H rows, oldest first, zero rows before the first: (heads, H, width)."""
        rows = self.rows[layer][-self.c.history_len :]
        image = torch.zeros(len(rows[0]), self.c.history_len, width)
        for i, row in enumerate(rows, self.c.history_len - len(rows)):
            image[:, i, : row.shape[-1]] = row[:, :width]
        return image


def check_selection(c, kept, scores, before, tolerance):
    """Are the kept blocks those of the highest scores, but for the limit to those that were not selected before?

    Three tensors (heads, n), two of them bool.
    """
    k, rows = c.topk_blocks, zip(kept, scores, before)
    if c.share_budget == "layer":
        k, rows = k * len(kept), [(kept.flatten(), scores.flatten(), before.flatten())]
    for kept, scores, before in rows:  # (n,) each, of which k are kept
        new, allowed = kept & ~before, torch.ones_like(kept)
        limit = math.ceil(c.swap_share * k) if before.any() else k
        assert kept.sum() == k and new.sum() <= limit
        if new.sum() == limit:  # the new ones must be the best of all others, the rest the best of the old ones
            assert scores[new].amin() >= scores.masked_fill(before | kept, -torch.inf).amax() - tolerance
            allowed = before | new
        best_left = scores.masked_fill(kept | ~allowed, -torch.inf).amax()
        assert scores[kept].amin() >= best_left - tolerance, "a block with a lower score was selected"


@st.composite
def configurations(draw):
    b = draw(st.sampled_from([8, 16]))
    sink, local = b * draw(st.integers(0, 2)), b * draw(st.integers(1, 2))
    m, p = draw(st.sampled_from([1, 2, 3, 4, 5, "auto"])), draw(st.sampled_from([None, None, 1, 2, 3, 7, 19]))
    shortest = min(8 if m == "auto" else m, p or 8)
    return Config(
        selection_delay=draw(st.sampled_from([0, "auto", shortest - 1, shortest // 2])),
        swap_share=draw(st.sampled_from([1.0, 0.4, 0.01])),
        block_size=b,
        history_len=draw(st.integers(5, 12)),
        sink_tokens=sink,
        local_tokens=local,
        budget=sink + local + b * draw(st.integers(0, 4)),
        calibration_interval=m,
        selection_interval=p,
        history_rows=draw(st.sampled_from(["every", "true"])),
        dense_layers=draw(st.sampled_from([0, 0, 1, 3])),
        share_budget=draw(st.sampled_from(["layer", "head"])),
        select_heads=draw(st.sampled_from(["kv", "q"])),
    )


GROWS = Config(block_size=8, sink_tokens=0, local_tokens=8, budget=32, history_len=6)  # auto M goes from 8 to 16 at 257
OUTGROWS = Config(block_size=8, sink_tokens=8, local_tokens=8, budget=48, history_len=7, calibration_interval=2)
LATE = Config(block_size=8, sink_tokens=8, local_tokens=8, budget=48, calibration_interval=8, selection_delay=7,
              swap_share=0.3, history_rows="every", history_len=6)  # fmt: skip
QUERIES = Config(block_size=8, sink_tokens=8, local_tokens=8, budget=40, calibration_interval=4, select_heads="q",
                 share_budget="head", history_len=6)  # fmt: skip
STRIDES = Config(block_size=8, sink_tokens=8, local_tokens=8, budget=40, calibration_interval=5, history_rows="true",
                 selection_interval=3, history_len=6)  # fmt: skip


@settings(max_examples=40)
@given(configurations(), PROMPT_LENGTHS, st.integers(0, 2**31), HEADS, st.booleans())
@example(GROWS, 238, 0, (2, 2), False)
@example(OUTGROWS, 30, 1, (2, 2), False)
@example(STRIDES, 31, 2, (2, 2), False)
@example(LATE, 150, 5, (2, 2), False)
@example(QUERIES, 100, 6, (2, 2), False)
@example(STRIDES, 200, 3, (3, 1), True)
def test_decoding_equals_the_naive_simulation(config, prompt_len, seed, heads, narrow):
    model, predictor = tiny_llama(n_kv_heads=heads[0], group=heads[1], seed=seed), random_predictor(seed)
    tokens = torch.randint(61, (prompt_len,))
    tolerance = 2e-3 if narrow else 1e-5
    with mock.patch.object(attnpred, "HISTORY_DTYPE", torch.float16 if narrow else torch.float32):
        decoder = SparseDecoder(config, model, predictor, prompt_len + 40)

    def choose(layer, scores, before, start, end):
        kept = decoder.attended(layer - decoder.dense_layers, end)[:, start:]  # (heads, n)
        if config.topk_blocks:
            check_selection(config, kept, scores, before, tolerance)
        return kept

    naive = NaiveMethod(config, model, predictor, choose)
    got = prefill(model, decoder, tokens)
    want = model(tokens, torch.arange(prompt_len), naive.attend)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    for step in range(1, 40):
        token = torch.randint(61, (1,))
        naive.step = step
        want = model(token, torch.tensor([prompt_len + step - 1]), naive.attend)  # first: `choose` reads our blocks
        got = decode_one_token(model, decoder, token)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        if decoder.selecting:
            for layer in range(decoder.dense_layers, 3):
                image = decoder.window()[layer - decoder.dense_layers]  # (heads, H, capacity)
                torch.testing.assert_close(image, naive.image(layer, image.shape[-1]), atol=tolerance, rtol=tolerance)
    for layer in range(decoder.dense_layers, 3):
        for ours, share in zip(decoder.stats.recovery, naive.recovery.get(layer, [])):
            torch.testing.assert_close(ours[layer - decoder.dense_layers], share.float(), atol=1e-4, rtol=1e-4)


@settings(max_examples=40)
@given(configurations(), st.integers(1, 200), st.sampled_from([16, 48, 64]), st.booleans(), st.integers(0, 2**31))
@example(STRIDES, 16, 16, False, 0)
@example(STRIDES, 129, 64, True, 1)
@example(OUTGROWS, 192, 48, True, 2)
def test_a_prompt_in_chunks_equals_one_in_one_piece(config, prompt_len, chunk, offload, seed):
    model, tokens = tiny_llama(n_kv_heads=2, group=2, seed=seed), torch.randint(61, (prompt_len,))
    runs = []
    for size in (1024, chunk):
        with mock.patch.object(attnpred, "PREFILL_CHUNK", size):
            decoder = SparseDecoder(config, model, random_predictor(), prompt_len + 9, offload=offload)
            decoder.queries.fill_(torch.nan), decoder.history.fill_(0.25)  # what is not written shows
            logits = prefill(model, decoder, tokens)
        cache = decoder.cache
        tensors = [cache.host, cache.fixed, cache.kv] if offload else [cache.kv]
        rows = decoder.queries[:, :, : decoder.n_queries], decoder.history
        if decoder.sparse_layers:
            assert not rows[0].isnan().any() and decoder.queries[:, :, decoder.n_queries :].isnan().all()
            assert decoder.selecting != config.fits(prompt_len + 1)
        runs.append([logits, *rows, *tensors])
    for piece, chunked in zip(*runs, strict=True):
        torch.testing.assert_close(chunked, piece, atol=1e-3, rtol=1e-3, equal_nan=True)


@given(configurations(), st.integers(1, 2000))
def test_sink_middle_and_local_tile_the_cache(config, n_tokens):
    start, end = config.middle(n_tokens)
    n_blocks = config.n_blocks(n_tokens)
    assert (n_blocks - 1) * config.block_size < n_tokens <= n_blocks * config.block_size
    if end > start:
        local = n_tokens - end * config.block_size
        assert config.local_tokens <= local < config.local_tokens + config.block_size
        assert start * config.block_size == config.sink_tokens
        attended = config.sink_tokens + config.topk_blocks * config.block_size + local
        assert config.budget <= attended < config.budget + config.block_size


def test_intervals_grow_with_the_text():
    config = Config()
    lengths = [1, 8192, 8193, 16384, 16385, 131072]
    assert [config.intervals(n)[0] for n in lengths] == [8, 8, 16, 16, 32, 128]
    assert all(config.intervals(n)[0] == config.intervals(n)[1] for n in lengths)
    assert Config(selection_interval=3).intervals(20000) == (32, 3)
    assert Config.paper().intervals(20000) == (5, 1) and Config.paper(sink_tokens=0).sink_tokens == 0
    assert Config.paper(budget=512) == Config(
        sink_tokens=64, budget=512, calibration_interval=5, selection_interval=1, dense_layers=2, share_budget="head",
        select_heads="q", history_rows="every",
    )  # fmt: skip


@pytest.mark.parametrize("share_budget, select_heads", [("layer", "kv"), ("head", "q")])
def test_blocks_outside_the_selection_are_never_read(share_budget, select_heads):
    """Poison what is not attended between two selections: no token changes."""
    config = Config(block_size=8, sink_tokens=8, local_tokens=8, budget=32, calibration_interval=20,
                    share_budget=share_budget, select_heads=select_heads)  # fmt: skip
    model, runs, n_blocks = tiny_llama(), [], 19  # of 150 tokens
    for poison in (False, True):
        decoder = SparseDecoder(config, model, random_predictor(), 200)
        prefill(model, decoder, torch.arange(150) % 61)
        if poison:
            decoder.cache.kv[:, :, :, n_blocks:] = 1e4  # for later tokens: may be read, but must not matter
            for layer in range(3):
                unread = ~decoder.attended(layer, n_blocks).view(2, -1, n_blocks).any(1)  # (Hk, N)
                decoder.cache.kv[:, layer, :, :n_blocks][:, unread] = torch.nan
        tokens = torch.arange(11).split(1)
        runs.append(torch.stack([decode_one_token(model, decoder, token) for token in tokens]))
    assert decoder.cache.kv.isnan().any() and torch.equal(*runs)


@given(st.integers(1, 3), st.integers(1, 30), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**31))
@settings(max_examples=100)
@example(1, 9, 0.5, 0.0, 6)
def test_limit_exchange(rows, n, share, limit, seed):
    """Against sets and sorted lists, with ties, infinity and NaN."""
    generator = torch.Generator().manual_seed(seed)
    lowest = torch.finfo(torch.float32).min  # stands for NaN and -infinity
    values = torch.tensor([torch.nan, -torch.inf, torch.inf, lowest, 0.0, 1.0, 2.0, 3.0])
    scores = values[torch.randint(len(values), (rows, n), generator=generator)]
    k = max(1, round(share * n))
    limit = max(1, round(limit * k))
    best = kernels.select_blocks(scores, k).long()
    held = torch.stack([torch.randperm(n, generator=generator)[:k] for _ in range(rows)])
    found = attnpred.limit_exchange(scores, best, held, limit, "torch")
    for row in range(rows):
        value = [max(lowest, x) if x == x else lowest for x in scores[row].tolist()]

        def ranked(blocks, value=value):
            return sorted(blocks, key=lambda block: (-value[block], block))

        let_in = ranked(set(best[row].tolist()) - set(held[row].tolist()))[:limit]
        assert found[row].tolist() == sorted(ranked({*held[row].tolist(), *let_in})[:k])


@pytest.mark.parametrize("history_rows, dense_layers", [("every", 1), ("true", 0)])
def test_the_triton_backend_decodes_the_same(history_rows, dense_layers, monkeypatch):
    monkeypatch.setattr(attnpred, "PREFILL_CHUNK", 16)
    config = Config(block_size=8, sink_tokens=8, local_tokens=8, budget=32, history_len=6, calibration_interval=2,
                    dense_layers=dense_layers, history_rows=history_rows)  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, logits, tokens = tiny_llama(n_layers=2).to(device), [], torch.arange(46, device=device) % 61
    for backend in ("torch", "triton"):
        decoder = SparseDecoder(config, model, random_predictor(), 100, backend)
        steps = [prefill(model, decoder, tokens[:36])]  # fits the budget; outgrows it while decoding
        steps += [decode_one_token(model, decoder, token).clone() for token in tokens[36:].split(1)]
        logits.append(torch.stack(steps))
    assert decoder.selecting
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("select_heads, heads", [("kv", 2), ("q", 4)])
def test_counters_are_exact(select_heads, heads):
    """Calibration reads a key once, however heads select."""
    model = tiny_llama()
    config = Config(block_size=8, sink_tokens=8, local_tokens=8, budget=32, dense_layers=1, calibration_interval=4,
                    selection_interval=2, history_len=10, history_rows="every", select_heads=select_heads)  # fmt: skip
    decoder = SparseDecoder(config, model, random_predictor(), 200)
    with mock.patch.object(kernels, "predict", wraps=kernels.predict) as predict:
        list(generate(model, decoder, list(range(50)), 10))
    steps = range(1, 10)
    key = 16 * 4  # a head's key, in bytes
    end = {s: (50 + 1 + (s - 1) // 2 * 2 - 8) // 8 for s in steps}  # of the middle at the selection that serves step s
    attended = {s: 8 + 2 * 8 + 50 + s - 8 * end[s] for s in steps}  # sink, selected, and everything from `end` on
    assert decoder.stats.decode_tokens == 9 and decoder.stats.prefill_tokens == 50
    assert decoder.stats.attention_bytes == sum(2 * key * (2 * (50 + s) + 2 * heads * attended[s]) for s in steps)
    assert decoder.stats.dense_bytes == sum(2 * 2 * key * 3 * (50 + s) for s in steps)
    assert decoder.stats.calibration_bytes == sum(2 * 2 * key * (50 + s) for s in (4, 8))
    ends = [end[s] for s in (1, 3, 5, 7, 9)]  # of the middle at the selections after steps 0, 2, 4, 6 and 8
    expected = [(0, 1, ends[0], 1), *((2, 1, new, old) for old, new in zip(ends, ends[1:]))]
    assert [call.args[3:7] for call in predict.call_args_list] == expected  # new_rows, start, end, valid_end
    columns = {s: (50 + s + 1 - 8) // 8 - 1 for s in (2, 4, 6, 8)}
    assert decoder.stats.choosing_bytes == sum(2 * heads * (10 + 4) * n * 2 for n in columns.values())
    assert decoder.stats.read_bytes == sum(
        getattr(decoder.stats, f"{name}_bytes") for name in ("attention", "calibration", "choosing")
    )
    assert len(decoder.stats.recovery) == 2
    saved = decoder.stats.dense_bytes / decoder.stats.read_bytes
    assert attnpred.format_summary(decoder).endswith(f": {saved:.1f}x less")
    assert all((r > 0).all() and (r <= 1 + 1e-5).all() and r.shape == (2, 4) for r in decoder.stats.recovery)


def test_nothing_is_counted_as_chosen_while_everything_fits():
    model = tiny_llama()
    decoder = SparseDecoder(Config(budget=256), model, random_predictor(), 200)
    list(generate(model, decoder, list(range(50)), 10))
    assert (
        not decoder.selecting and decoder.stats.attention_bytes == decoder.stats.dense_bytes == decoder.stats.read_bytes
    )
    assert decoder.history.count_nonzero() == 0
    assert "fit the budget of 256" in attnpred.format_summary(decoder)


def test_sampling():
    logits = torch.tensor([0.0, 3.0, 2.0, -1.0])
    assert sample(logits).tolist() == [1]
    generator = torch.Generator().manual_seed(0)
    for temperature in (1.0, 2.0):
        draws = torch.cat([sample(logits, temperature, 1.0, generator) for _ in range(4000)]).bincount(minlength=4)
        torch.testing.assert_close(draws / 4000, (logits / temperature).softmax(-1), atol=0.03, rtol=0)
    nucleus = {sample(logits, 1.0, 0.9, generator).item() for _ in range(200)}
    assert nucleus == {1, 2}  # .696 + .256 reaches .9
    assert {sample(logits, 5.0, 1e-6, generator).item() for _ in range(20)} == {1}


def test_generation_ends_before_an_end_of_sequence_token():
    model, predictor = tiny_llama(), random_predictor()
    answer = list(generate(model, SparseDecoder(Config(), model, predictor, 60), [1, 2, 3], 20))
    assert len(answer) == 20
    ending = tiny_llama(eos_token_ids=(answer[7],))
    first = answer.index(answer[7])
    assert list(generate(ending, SparseDecoder(Config(), ending, predictor, 60), [1, 2, 3], 20)) == answer[:first]


# Predictor files


def test_predictor_round_trip(tmp_path):
    predictor = random_predictor()
    assert sum(p.numel() for p in predictor.parameters()) == 4833
    safetensors.torch.save_file(predictor.state_dict(), tmp_path / "p.safetensors")
    torch.save(predictor.state_dict(), tmp_path / "p.pt")
    image = torch.rand(3, 64, 20)
    for name in ("p.safetensors", "p.pt"):
        loaded = attnpred.load_predictor(tmp_path / name)
        assert all(torch.equal(loaded.state_dict()[key], value) for key, value in predictor.state_dict().items())
        torch.testing.assert_close(loaded(image), predictor(image))


class Dangerous:
    def __reduce__(self):
        return (os.system, ("echo unpickled",))


def test_bad_predictors_are_refused_in_one_line(tmp_path, capfd):
    state = random_predictor().state_dict()
    torch.save({"conv1.weight": Dangerous()}, tmp_path / "dangerous.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(state | {"extra": torch.zeros(1)}, tmp_path / "keys.pt")
    torch.save(state | {"conv1.bias": torch.zeros(3)}, tmp_path / "shape.pt")
    torch.save(state | {"conv2.bias": torch.full((32,), torch.nan)}, tmp_path / "nan.pt")
    whole = safetensors.torch.save(state)
    (tmp_path / "short.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("hello")
    for name in [*os.listdir(tmp_path), "none.pt"]:
        with pytest.raises(InputError) as caught:
            attnpred.load_predictor(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    assert "unpickled" not in capfd.readouterr().out


# Command line


def attnpred_main(capsys, *args):
    status = attnpred.main(list(args))
    out, err = capsys.readouterr()
    return status, out, err


REFUSED = {
    "": "there is no prompt",
    "--prompt-file /dev/null": "empty",
    "--prompt-file /nonexistent/file": "cannot be read",
    "--budget many": "invalid int",
    "--budget 64": "at least 80",
    "--budget -16": "at least 80",
    "--budget 1000": "try 1008",
    "--sink-tokens -16": "at least 0",
    "--local-tokens 0": "at least 16",
    "--block-size 12": "8, 16, 32",
    "--history-len 4": "at least 5",
    "--calibration-interval 0": "at least 1",
    "--selection-interval 0": "at least 1",
    "--dense-layers -1": "at least 0",
    "--selection-delay 8": "0 ... 7",
    "--selection-delay -1": "0 ... 7",
    "--calibration-interval 70 --selection-delay 64": "0 ... 63",
    "--swap-share 0": "above 0",
    "--swap-share 1.01": "at most 1",
    "--max-new-tokens 0": "at least 1",
    "--temperature nan": "temperature",
    "--top-p 0": "top-p",
    "--device abacus": "not available",
    "--device meta": "not available",
    f"--seed {2**64}": "seed",
    "--predictor /nonexistent/p.pt": "does not exist",
    "--model /nonexistent/model": "neither a folder",
}


@pytest.mark.parametrize("options", REFUSED)
def test_bad_input_is_one_line_and_status_2(capsys, options):
    prompt = [] if options == "" or "prompt" in options else ["--prompt", "a"]
    assert_refused(attnpred.main, "attnpred", [*prompt, *options.split()], REFUSED[options], capsys)


@pytest.mark.parametrize(
    "error, complaint",
    [
        (FetchError("no network"), "no network"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), "a shorter text"),
    ],
)
def test_a_failure_is_one_line_and_status_2(capsys, monkeypatch, error, complaint):
    monkeypatch.setattr(attnpred, "fetch_default_llm", mock.Mock(side_effect=error))
    assert_refused(attnpred.main, "attnpred", ["--prompt", "a"], complaint, capsys)


def test_options_change_the_setting():
    def config(*args):
        return attnpred.config_of(attnpred.make_parser().parse_args(["--prompt", "a", *args]))

    assert config() == Config()
    assert config("--paper") == Config.paper()
    assert config("--paper", "--budget", "512", "--calibration-interval", "auto") == Config.paper(
        budget=512, calibration_interval="auto"
    )
    assert config("--selection-interval", "4", "--history-rows", "every") == Config(
        selection_interval=4, history_rows="every"
    )
    assert config("--offload", "--budget", "512") == Config(selection_delay="auto", swap_share=0.15, budget=512)
    assert config("--swap-share", "1", "--offload", "--selection-delay", "3") == Config(selection_delay=3)


@pytest.mark.parametrize("content, complaint", [(b"\xe9", "UTF-8"), (b"word " * 9000, "8,192")])
def test_a_prompt_file_that_is_no_text_or_too_long(capsys, tmp_path, content, complaint):
    fetch_default_llm()  # fetching prints its progress
    (tmp_path / "prompt").write_bytes(content)
    assert_refused(attnpred.main, "attnpred", ["--prompt-file", str(tmp_path / "prompt")], complaint, capsys)


def test_the_default_model_answers(capsys):
    fetch_default_llm()
    args = ["--prompt", "What is the capital of France?", "--max-new-tokens", "6"]
    status, out, err = attnpred_main(capsys, *args)
    assert status == 0 and "Paris" in out
    assert err.count("\n") == 1 and err.startswith("attnpred: 5 tokens, ") and "fit the budget" in err


def test_a_long_prompt_is_decoded_sparsely_and_covering_budgets_agree_with_dense(capsys, tmp_path):
    text = "".join(f"The box number {i} holds {i * i % 97} apples.\n" for i in range(60))
    (tmp_path / "prompt.txt").write_text(text)
    args = ["--prompt-file", str(tmp_path / "prompt.txt"), "--raw", "--max-new-tokens", "16", "--stats"]
    sparse = attnpred_main(capsys, *args, "--budget", "256")
    covering = attnpred_main(capsys, *args, "--budget", "2048")
    dense = attnpred_main(capsys, *args, "--dense")
    resident = "--selection-delay", "0", "--swap-share", "1"
    offloaded = attnpred_main(capsys, *args, "--budget", "256", "--offload", *resident)
    assert sparse[0] == covering[0] == dense[0] == offloaded[0] == 0
    assert covering[1] == dense[1] != ""
    assert "recovery" in sparse[2] and "overhead" in sparse[2] and "recovery" not in dense[2]
    assert sparse[1] == offloaded[1] and "fetched" in offloaded[2] and "fetched" not in sparse[2]


def test_a_question_about_a_document(tmp_path, monkeypatch):
    """The file, a blank line, the question; either alone as it is."""
    (tmp_path / "report").write_text("It rained.\n\n")

    def prompt(*args):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("Es regnet — schön.\n".encode())))
        return attnpred.read_prompt(attnpred.make_parser().parse_args(args))

    file, question = ("--prompt-file", str(tmp_path / "report")), ("--prompt", " Why?\n")
    assert prompt(*file, *question) == "It rained.\n\n Why?\n"
    assert prompt(*file) == "It rained.\n\n" and prompt(*question) == " Why?\n"
    assert prompt("--prompt-file", "-", *question) == "Es regnet — schön.\n\n Why?\n"


@pytest.mark.parametrize("terminal, chunk, shown", [(True, 16, True), (False, 16, False), (True, 64, False)])
def test_a_long_prompt_shows_its_progress_on_a_terminal(capsys, monkeypatch, terminal, chunk, shown):
    monkeypatch.setattr(attnpred, "PREFILL_CHUNK", chunk)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    model = tiny_llama()
    prefill(model, SparseDecoder(Config(), model, random_predictor(), 60), torch.arange(50))
    out, err = capsys.readouterr()
    assert out == "" and ("Reading the prompt" in err) == shown == bool(err) and "\n" not in err


def test_standard_input_and_sampling_with_a_seed(capsys, monkeypatch):
    texts = []
    for seed in ("1", "1", "2"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("Name a colour — any.".encode())))
        sampling = ["--temperature", "1.5", "--top-p", "0.95", "--seed", seed, "--max-new-tokens", "20"]
        status, out, _ = attnpred_main(capsys, "--prompt-file", "-", *sampling)
        assert status == 0
        texts.append(out)
    assert texts[0] == texts[1] != texts[2]


def test_interrupt_keeps_the_text_so_far():
    fetch_default_llm()
    command = [sys.executable, "attnpred.py", "--prompt", "Tell me a very long story.", "--max-new-tokens", "4000"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    # a parent that ignores the signal, as a shell's background job does, would pass that on
    process = subprocess.Popen(
        command, cwd=ROOT, **pipes, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )
    assert len(process.stdout.read(8)) == 8
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate()
    assert process.returncode == 130 and err.count(b"\n") == 1 and rest.endswith(b"\n")


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} attnpred.py --prompt 'Tell me a long story.' --max-new-tokens 60 | head -c 1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True)
    assert b"Error" not in done.stderr and done.stderr.count(b"\n") <= 1 and len(done.stdout) == 1
