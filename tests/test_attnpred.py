"""The method against a naive simulation of it, the command line on the real model, and bad input."""

import dataclasses
import io
import itertools
import json
import os
import pathlib
import re
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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import attnpred
from attnpred import Config, InputError, SparseDecoder, generate, sample
from model import TextStream, checkpoint_targets
from tests.helpers import assert_refused, random_predictor, tiny_llama
from weights.fetch_llm import FetchError, fetch_default_llm

ROOT = pathlib.Path(attnpred.__file__).parent
PROMPT_LENGTHS = st.one_of(st.integers(150, 300), st.integers(1, 60))
HEADS = st.sampled_from([(2, 2), (1, 3), (3, 1)])  # KV heads, query heads to each
N_NEW, VOCABULARY = 40, 13  # tokens decoded; few different ones, so that they echo


class NaiveMethod:
    """The method as a simulation: the whole attention matrix in float64, masked. Only the selected blocks, among nearly
    equal scores, are asked from the decoder: `choose(layers' scores, start, end)` returns them, (L, Hk, n) bool.
    """

    def __init__(self, config, model, predictor, capacity_tokens, choose):
        self.c, self.m, self.predictor, self.choose = config, model.config, predictor, choose
        self.ids, self.k, self.v, self.queries, self.rows = [], {}, {}, {}, {}
        self.chosen = None  # (L, Hk, n) bool, of the middle blocks from the sink's end on; None: all blocks
        self.sparse = not self.fits(capacity_tokens)
        self.left = self.prompt_start = 0

    def middle(self, n_tokens):
        start = self.c.sink_tokens // self.c.block_size
        return start, max(start, n_tokens // self.c.block_size - self.c.local_tokens // self.c.block_size)

    def fits(self, n_tokens):
        start, end = self.middle(n_tokens)
        return end - start <= (self.c.budget - self.c.sink_tokens - self.c.local_tokens) // self.c.block_size

    def interval(self, n_tokens):
        if self.c.calibration_interval != "auto":
            return self.c.calibration_interval
        return next(2**i for i in range(4, 30) if n_tokens / 2**i <= self.c.budget / 2)

    def attend(self, layer, q, k, v):
        """Attention of the newest tokens; q (Hq, new, D), k and v (Hk, new, D) -> (Hq, new, D)."""
        for kept, new in ((self.queries, q), (self.k, k), (self.v, v)):
            kept[layer] = torch.cat([kept[layer], new], 1) if layer in kept else new
        logits = self.logits(layer, q)  # (Hq, new, T)
        if self.chosen is not None:
            mask = self.blocks(layer).repeat_interleave(self.c.block_size, 1)[:, : logits.shape[2]]  # (Hk, T)
            logits = logits.masked_fill(~mask.repeat_interleave(len(q) // len(k), 0)[:, None], -torch.inf)
        values = self.v[layer].repeat_interleave(len(q) // len(v), 0).double()  # (Hq, T, D)
        return (logits.softmax(-1) @ values).float()

    def logits(self, layer, q):
        """Causal logits of the last queries q (Hq, new, D): (Hq, new, T)."""
        keys = self.k[layer].repeat_interleave(len(q) // len(self.k[layer]), 0).double()  # (Hq, T, D)
        new, total = q.shape[1], keys.shape[1]
        causal = torch.ones(new, total, dtype=torch.bool).tril(total - new)
        return (q.double() @ keys.mT / q.shape[2] ** 0.5).masked_fill(~causal, -torch.inf)

    def blocks(self, layer):
        """Which blocks (Hk, N) the newest token attends to: sink, chosen ones, all after the middle, and echoes."""
        start, n = self.c.sink_tokens // self.c.block_size, self.chosen.shape[2]
        mask = torch.ones(self.m.n_kv_heads, -(-len(self.ids) // self.c.block_size), dtype=torch.bool)
        mask[:, start : start + n] = self.chosen[layer]
        mask[:, self.echoes()] = True
        return mask

    def echoes(self):
        """The first E middle blocks that continue matches of the text's end: long matches first, then late ones."""
        ids, n, found = self.ids, len(self.ids), []
        start, end = self.middle(n)
        for p in range(1, n):
            run = 0
            while run < min(8, p) and ids[p - 1 - run] == ids[n - 1 - run]:
                run += 1
            if run and start <= p // self.c.block_size < end:
                found.append((run, p))
        return list(dict.fromkeys(p // self.c.block_size for _, p in sorted(found, reverse=True)))[: self.c.echo_blocks]

    def push_rows(self, count, interval, distance):
        """Each layer gets rows of the last `count` intervals: root mean squares over their queries, (Hk, N)."""
        n, b = len(self.ids), self.c.block_size
        for layer in range(self.m.n_layers):
            squares = self.logits(layer, self.queries[layer]).softmax(-1)  # (Hq, T, T), the whole attention
            squares = F.pad(squares, (0, -n % b)).unflatten(-1, (-1, b)).amax(-1).square()  # (Hq, T, N)
            squares = squares.unflatten(0, (self.m.n_kv_heads, -1)).mean(1)  # (Hk, T, N)
            for row in reversed(range(count)):
                last = n - 1 - row * interval
                positions = [p for p in range(last, last - interval, -distance) if p >= self.prompt_start]
                total = squares[:, positions].sum(1) / (interval // distance)  # those before it count as zeros
                self.rows.setdefault(layer, []).append(total.sqrt())

    def image(self, layer, width):
        """The last H rows, oldest first, zero rows before the first: (Hk, H, width)."""
        rows = self.rows[layer][-self.c.history_len :]
        image = torch.zeros(len(rows[0]), self.c.history_len, width)
        for i, row in enumerate(rows, self.c.history_len - len(rows)):
            image[:, i, : row.shape[-1]] = row[:, :width]
        return image

    def end_token(self, n_prompt=0):
        """After a prompt and after every M-th token: rows of the tokens since the last time, then a selection."""
        n, rows, queries = len(self.ids), 1, self.c.calibration_queries
        interval = self.interval(n) if n_prompt else self.due
        distance = interval // max(q for q in range(1, interval + 1) if interval % q == queries % q == 0)
        self.left -= 1
        if n_prompt:
            if n_prompt < min(n, interval):  # a later, short prompt is a row by itself
                distance = n_prompt // min(n_prompt, queries)
                interval = n_prompt = min(n_prompt, queries) * distance
            self.left, self.prompt_start, rows = 0, n - n_prompt, min(self.c.history_len, -(-n_prompt // interval))
        if self.left == 0:
            if self.sparse:
                self.push_rows(rows, interval, distance)
            self.due = self.left = self.interval(n)
            start, end = self.middle(n + 1)
            if not self.fits(n + 1):
                images = [self.image(layer, end)[:, :, start:] for layer in range(self.m.n_layers)]
                self.chosen = self.choose(torch.stack([self.predictor(image) for image in images]), start, end)


@st.composite
def configurations(draw):
    b = draw(st.sampled_from([8, 16]))
    sink, local, echoes = b * draw(st.integers(0, 2)), b * draw(st.integers(1, 2)), draw(st.integers(0, 3))
    return Config(
        block_size=b,
        history_len=draw(st.integers(5, 12)),
        sink_tokens=sink,
        local_tokens=local,
        echo_blocks=echoes,
        budget=sink + local + b * (echoes + draw(st.integers(0, 4))),
        calibration_interval=draw(st.sampled_from([1, 2, 3, 4, 6, "auto"])),
        calibration_queries=draw(st.sampled_from([1, 2, 4, 16])),
    )


SMALL = dict(block_size=8, sink_tokens=8, local_tokens=8, history_len=6)
GROWS = Config(
    block_size=8, sink_tokens=0, local_tokens=8, budget=64, history_len=6, echo_blocks=1
)  # M: 16, from 513 on 32
OUTGROWS = Config(**SMALL, budget=48, calibration_interval=2, echo_blocks=2, calibration_queries=2)
NOTHING = Config(**SMALL, budget=32, calibration_interval=4, echo_blocks=2)  # K = 0: only echoes


@settings(max_examples=30)
@given(configurations(), PROMPT_LENGTHS, st.integers(1, 20), st.integers(0, 2**31), HEADS, st.booleans())
@example(GROWS, 495, 16, 0, (2, 2), False)
@example(OUTGROWS, 30, 1, 1, (2, 2), False)
@example(NOTHING, 100, 20, 2, (1, 3), False)
@example(OUTGROWS, 200, 7, 3, (3, 1), True)
@example(dataclasses.replace(OUTGROWS, calibration_interval=6), 150, 5, 0, (2, 2), False)  # 2 queries of 5 tokens
def test_a_conversation_equals_the_naive_simulation(config, prompt_len, later, seed, heads, narrow):
    """A prompt, tokens that are decoded, a later prompt of `later` tokens, and again tokens that are decoded."""
    model, predictor = (
        tiny_llama(n_kv_heads=heads[0], group=heads[1], n_layers=2, seed=seed, context_len=600),
        random_predictor(seed),
    )
    sizes = [prompt_len, *[1] * 15, later, *[1] * (N_NEW - 15 - later)]
    tokens = torch.randint(VOCABULARY, (sum(sizes),))
    tolerance = 2e-3 if narrow else 1e-5
    with mock.patch.object(attnpred, "HISTORY_DTYPE", torch.float16 if narrow else torch.float32):
        decoder = SparseDecoder(config, model, predictor, len(tokens))

    def choose(scores, start, end):  # (L, Hk, n)
        chosen = decoder.cache.attended[..., start:end]
        assert chosen.sum() == config.topk_blocks * scores[..., 0].numel()
        if config.topk_blocks:
            best_left_out = scores.masked_fill(chosen, -torch.inf).amax()
            assert scores[chosen].amin() >= best_left_out - tolerance, "a block with a lower score was selected"
        return chosen.clone()

    naive, n = NaiveMethod(config, model, predictor, len(tokens), choose), 0
    for step, size in enumerate(sizes):
        is_prompt, new = step in (0, 16), tokens[n : n + size]
        naive.ids = tokens[: n + size].tolist()
        naive.chosen = None if is_prompt else naive.chosen
        want = model(new, torch.arange(n, n + size), naive.attend)  # before ours selects anew
        got = decoder.prefill(new) if is_prompt else decoder.decode(new)
        n += size
        naive.end_token(size if is_prompt else 0)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        if decoder.history:
            images = decoder.history.rows.float().unflatten(0, (2, -1))  # (L, Hk, H, capacity)
            for layer, image in enumerate(images):
                torch.testing.assert_close(image, naive.image(layer, image.shape[-1]), atol=tolerance, rtol=tolerance)


@settings(max_examples=30)
@given(configurations(), st.integers(1, 200), st.sampled_from([16, 48, 64]), st.booleans(), st.integers(0, 2**31))
@example(OUTGROWS, 16, 16, False, 0)
@example(OUTGROWS, 129, 64, True, 1)
@example(GROWS, 192, 48, True, 2)
def test_a_prompt_in_chunks_equals_one_in_one_piece(config, prompt_len, chunk, offload, seed):
    model, tokens = tiny_llama(n_layers=2, seed=seed), torch.randint(VOCABULARY, (prompt_len,))
    runs = []
    for size in (1024, chunk):
        with mock.patch.multiple(attnpred, PREFILL_CHUNK=size, OFFLOADED_CHUNK=size):
            decoder = SparseDecoder(config, model, random_predictor(), prompt_len + 9, offload=offload)
            logits = decoder.prefill(tokens)
        cache = decoder.cache
        rows = [decoder.history.rows] if decoder.history else []
        runs.append([logits, *rows, *([cache.host, cache.fixed] if offload else [cache.kv])])
    for piece, chunked in zip(*runs, strict=True):
        torch.testing.assert_close(chunked, piece, atol=1e-3, rtol=1e-3)


@settings(max_examples=20)
@given(configurations(), st.integers(1, 150), st.integers(1, 5), st.sampled_from([16, 1024]), st.booleans())
@example(OUTGROWS, 100, 4, 16, True)
def test_two_prompts_equal_one(config, first_len, n_rows, chunk, offload):
    """A later prompt of whole intervals: the same K, V, history, logits as those of the whole text at once."""
    interval = config.interval(first_len + 5 * 16)
    model, tokens, runs = tiny_llama(n_layers=2), torch.randint(VOCABULARY, (first_len + n_rows * interval,)), []
    for sizes in ([len(tokens)], [first_len, n_rows * interval]):
        with mock.patch.object(attnpred, "PREFILL_CHUNK", chunk):
            decoder = SparseDecoder(config, model, random_predictor(), len(tokens) + 9, offload=offload)
            logits = [decoder.prefill(piece) for piece in tokens.split(sizes)][-1]
        cache = decoder.cache
        n_before = first_len if config.interval(first_len) == interval else 0
        rows = min(config.history_len, n_rows + n_before // interval)  # later ones begin before the first prompt
        history = [decoder.history.rows[:, -rows:]] if decoder.history else []
        runs.append([logits, *history, *([cache.host, cache.fixed] if offload else [cache.kv])])
        assert decoder.stats.prefill_tokens == decoder.n_tokens == len(tokens) and decoder.stats.choosing_bytes == 0
    for whole, parts in zip(*runs, strict=True):
        torch.testing.assert_close(parts, whole, atol=1e-3, rtol=1e-3)


@given(configurations(), st.integers(1, 2000))
def test_sink_middle_and_local_tile_the_cache(config, n_tokens):
    start, end = config.middle(n_tokens)
    n_blocks = config.n_blocks(n_tokens)
    assert (n_blocks - 1) * config.block_size < n_tokens <= n_blocks * config.block_size
    assert start * config.block_size == config.sink_tokens and end >= start
    if end > start:
        local = n_tokens - end * config.block_size
        assert config.local_tokens <= local < config.local_tokens + config.block_size
        attended = config.sink_tokens + (config.topk_blocks + config.echo_blocks) * config.block_size + local
        assert config.budget <= attended < config.budget + config.block_size
        late = n_tokens + config.interval(n_tokens) + 1  # a selection for n_tokens is in use up to here
        assert config.n_blocks(late) - end <= config.tail_blocks(n_tokens)


def test_the_interval_grows_with_the_text():
    lengths = [1, 8192, 8193, 16384, 16385, 131072]
    assert [Config().interval(n) for n in lengths] == [16, 16, 32, 32, 64, 256]
    assert Config(calibration_interval=3).interval(20000) == 3
    assert [Config(calibration_queries=4).queries(m) for m in (1, 2, 6, 16, 128)] == [1, 2, 2, 4, 4]


def test_blocks_outside_the_table_are_never_read():
    """Poison what is not attended between two selections, echoes of these tokens apart: no logit changes."""
    config = Config(**SMALL, budget=48, calibration_interval=20, echo_blocks=2)
    model, runs, n_blocks = tiny_llama(), [], 19  # of 150 tokens
    prompt, tokens = torch.arange(150) * 7 % 61, (torch.arange(11) * 7 % 61).split(1)
    echoes = {(p + 1) // 8 for p in range(149) for token in tokens if prompt[p] == token}
    for poison in (False, True):
        decoder = SparseDecoder(config, model, random_predictor(), 200)
        decoder.prefill(prompt)
        if poison:
            decoder.cache.kv[:, :, :, n_blocks:] = 1e4  # for later tokens: may be read, but must not matter
            unread = ~decoder.cache.attended[..., :n_blocks]  # (L, Hk, N)
            unread[..., list(echoes)] = False
            decoder.cache.kv[:, :, :, :n_blocks][:, unread] = torch.nan
        runs.append(torch.stack([decoder.decode(token) for token in tokens]))
    assert decoder.cache.kv.isnan().any() and torch.equal(*runs) and decoder.cache.echoes.any()


@given(configurations(), PROMPT_LENGTHS, st.booleans(), st.integers(0, 2**31))
@example(OUTGROWS, 30, False, 1)
@example(OUTGROWS, 120, True, 2)
def test_a_cpus_working_set_is_the_table(config, prompt_len, offload, seed):
    """After every token: the tokens that are attended are those of the table's blocks, bit for bit, in its order."""
    model = tiny_llama(n_layers=2, seed=seed)
    decoder = SparseDecoder(config, model, random_predictor(), prompt_len + 20, offload=offload)
    decoder.prefill(torch.randint(VOCABULARY, (prompt_len,)))
    cache, b = decoder.cache, config.block_size
    for token in torch.randint(VOCABULARY, (20, 1)):
        decoder.decode(token)
        if cache.whole:
            continue
        work = cache.working_set
        for layer, head in itertools.product(range(2), range(model.config.n_kv_heads)):
            entries, length = cache.table[layer, head].tolist(), int(cache.lengths[layer, head])
            cells = [(n, i) for j, n in enumerate(entries) for i in range(b) if n >= 0 and j * b + i < length]
            attended = work.mask[layer, head, : work.longest[layer] + decoder.n_tokens] == 0
            for kv, blocks in zip(work.kv[:, layer, head], cache.blocks):
                assert torch.equal(kv[: len(attended)][attended], torch.stack([blocks[cell] for cell in cells]))


def test_the_triton_backend_decodes_the_same(monkeypatch):
    monkeypatch.setattr(attnpred, "PREFILL_CHUNK", 16)
    config = Config(**SMALL, budget=32, calibration_interval=2, calibration_queries=2, echo_blocks=1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, logits, tokens = tiny_llama(n_layers=2).to(device), [], torch.arange(46, device=device) % 9
    for backend in ("torch", "triton"):
        decoder = SparseDecoder(config, model, random_predictor(), 100, backend)
        steps = [decoder.prefill(tokens[:31])]  # fits the budget; outgrows it while decoding
        steps += [decoder.decode(token).clone() for token in tokens[31:].split(1)]
        logits.append(torch.stack(steps))
    assert decoder.selecting and decoder.cache.echoes.any()
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_counters_are_exact():
    model, config = tiny_llama(), Config(**SMALL, budget=48, calibration_interval=4, echo_blocks=2)
    decoder, attended = SparseDecoder(config, model, random_predictor(), 200), {}
    attend = decoder.cache.attend
    tokens = torch.arange(70) % 7

    def count(layer, q, n_tokens):
        row, lengths = decoder.cache.table[layer], decoder.cache.lengths[layer]
        for h in range(2):
            n = -(-int(lengths[h]) // 8)
            listed = row[h, :n]
            assert len(set(listed[listed >= 0].tolist())) == (listed >= 0).sum(), "a block is read twice"
            attended[n_tokens] = attended.get(n_tokens, 0) + int(lengths[h]) - 8 * int((listed < 0).sum())
        return attend(layer, q, n_tokens)

    decoder.cache.attend = count
    decoder.prefill(tokens[:60])
    for token in tokens[60:].split(1):
        decoder.decode(token)
    stats, key = decoder.stats, 16 * 4  # a head's key, in bytes
    assert stats.attention_bytes + stats.echo_bytes == 2 * key * sum(attended.values()) and stats.echo_bytes > 0
    assert stats.dense_bytes == sum(2 * 2 * key * 3 * n for n in range(61, 71))
    assert stats.calibration_bytes == sum(3 * 2 * key * n for n in (64, 68))
    columns = [(n + 1 - 8) // 8 - 1 for n in (64, 68)]
    assert stats.choosing_bytes == sum(3 * 2 * (6 + 4) * n * 2 for n in columns)
    assert stats.read_bytes == stats.attention_bytes + stats.echo_bytes + stats.calibration_bytes + stats.choosing_bytes
    assert len(stats.recovery) == 2
    assert all((r > 0).all() and (r <= 1 + 1e-5).all() and r.shape == (3, 4) for r in stats.recovery)
    assert attnpred.format_summary(decoder).endswith(f": {stats.dense_bytes / stats.read_bytes:.1f}x less")
    before = dataclasses.replace(stats)
    decoder.prefill(tokens[:20])  # a later prompt counts as prefill
    assert stats == dataclasses.replace(before, prefill_tokens=80) and decoder.queries == []


def test_a_text_that_fits_is_decoded_densely():
    model = tiny_llama()
    decoder = SparseDecoder(Config(budget=256), model, random_predictor(), 200)
    list(generate(decoder, list(range(50)), 10))
    stats = decoder.stats
    assert stats.attention_bytes == stats.dense_bytes == stats.read_bytes and stats.decode_tokens == 9
    assert decoder.history is None and "fit the budget of 256" in attnpred.format_summary(decoder)


def test_sampling():
    logits = torch.tensor([0.0, 3.0, 2.0, -1.0])
    assert [x.item() for x in sample(logits)] == [1, logits.max()]
    generator = torch.Generator().manual_seed(0)
    for temperature in (1.0, 2.0):
        draws = torch.cat([sample(logits, temperature, 1.0, generator)[0] for _ in range(4000)]).bincount(minlength=4)
        torch.testing.assert_close(draws / 4000, (logits / temperature).softmax(-1), atol=0.03, rtol=0)
    nucleus = {sample(logits, 1.0, 0.9, generator)[0].item() for _ in range(200)}
    assert nucleus == {1, 2}  # .696 + .256 reaches .9
    assert {sample(logits, 5.0, 1e-6, generator)[0].item() for _ in range(20)} == {1}
    for temperature in (1e-6, 1e-40, 1e-300):
        assert {sample(100 * logits, temperature, 1.0, generator)[0].item() for _ in range(20)} == {1}
    assert {sample(logits, 1e300, 1.0, generator)[0].item() for _ in range(100)} == {0, 1, 2, 3}


def test_generation_ends_before_an_end_of_sequence_token():
    model, predictor = tiny_llama(), random_predictor()
    answer = list(generate(SparseDecoder(Config(), model, predictor, 60), [1, 2, 3], 20))
    assert len(answer) == 20
    ending = tiny_llama(eos_token_ids=(answer[7],))
    first = answer.index(answer[7])
    assert list(generate(SparseDecoder(Config(), ending, predictor, 60), [1, 2, 3], 20)) == answer[:first]


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

TEMPLATE = "<s>{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}<assistant>"


def attnpred_main(capsys, *args):
    status = attnpred.main(list(args))
    out, err = capsys.readouterr()
    return status, out, err


REFUSED = {
    "": "there is no prompt",
    "--prompt-file /dev/null": "empty",
    "--prompt-file /nonexistent/file": "cannot be read",
    "--budget many": "invalid int",
    "--budget 64": "at least 144",
    "--budget -16": "at least 144",
    "--budget 1000": "try 1008",
    "--sink-tokens -16": "at least 0",
    "--local-tokens 0": "at least 16",
    "--block-size 12": "8, 16, 32",
    "--calibration-queries 0": "at least 1",
    "--echo-blocks -1": "at least 0",
    "--dense --offload": "leave --offload out",
    "--chat --raw": "leave --raw out",
    "--chat --prompt-file -": "must be a file",
    "--prompt \ufeff": "empty",
    "--prompt caf\udce9": "not UTF-8 text (byte 3)",
    "--history-len 1000000000000000": "at most 4096",
    "--history-len 4": "at least 5",
    "--calibration-interval 0": "at least 1",
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
    with pytest.raises(InputError):
        attnpred.parse_options([*prompt, *options.split()])
    assert_refused(attnpred.main, "attnpred", [*prompt, *options.split()], REFUSED[options], capsys)


def start(folder, torch, *arguments):
    """Start the command line with another module, of the source `torch`, in PyTorch's place."""
    (folder / "torch.py").write_text(torch)
    environment = os.environ | {"PYTHONPATH": str(folder)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # a parent that ignores the signal, as a shell's background job does, would pass that on
    act = dict(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, **pipes, **act)


def test_options_are_checked_before_pytorch_is_imported(tmp_path):
    for flags in ([], ["-OO"]):
        process = start(tmp_path, "raise ImportError('too early')", *flags, "attnpred.py", "--help")
        out, err = process.communicate()
        assert (process.returncode, err) == (0, "") and "--temperature" in out
    process = start(tmp_path, "raise ImportError('too early')", "attnpred.py", "--prompt", "a", "--budget", "1000")
    assert process.communicate() == ("", "attnpred: budget = 1000 is not a multiple of the block size: try 1008\n")
    assert process.returncode == 2


def test_ctrl_c_while_pytorch_is_imported(tmp_path):
    slow = "import time; print('started', flush=True); time.sleep(60)"
    process = start(tmp_path, slow, "attnpred.py", "--prompt", "a")
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", "") and process.returncode == -signal.SIGINT


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
    given = "--budget 512 --calibration-interval 8 --echo-blocks 2 --sink-tokens 32 --calibration-queries 8"
    changed = dict(budget=512, calibration_interval=8, echo_blocks=2, sink_tokens=32, calibration_queries=8)
    assert config(*given.split()) == Config(**changed)
    assert config("--calibration-interval", "auto", "--offload") == Config()


@pytest.mark.parametrize("content, complaint", [(b"\xe9", "UTF-8"), (b"word " * 9000, "8,192")])
def test_a_prompt_file_that_is_no_text_or_too_long(capsys, tmp_path, content, complaint):
    fetch_default_llm()  # fetching prints its progress
    (tmp_path / "prompt").write_bytes(content)
    assert_refused(attnpred.main, "attnpred", ["--prompt-file", str(tmp_path / "prompt")], complaint, capsys)


# The command line on a tiny model


def save_tiny(folder, context_len=512, template=TEMPLATE, broken=False):
    """Save a random model whose tokens are bytes, and four more. Returns the options that name it."""
    model = tiny_llama(n_layers=2, vocab_size=260, context_len=context_len)
    if broken:
        model.head.weight[7] = torch.nan
    tensors = {name: tensor.clone().contiguous() for name, tensor in checkpoint_targets(model).items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    c, letters = model.config, sorted(pre_tokenizers.ByteLevel.alphabet())
    sizes = dict(num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads)
    sizes |= dict(hidden_size=c.d_model, intermediate_size=c.d_ff, vocab_size=260, head_dim=c.head_dim)
    config = dict(model_type="llama", max_position_embeddings=context_len, **sizes)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<user>", "<assistant>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": template}))
    return ["--model", str(folder), "--dtype", "float32", "--temperature", "2"]


@pytest.fixture
def tiny(tmp_path):
    return save_tiny(tmp_path)


def give_input(monkeypatch, text):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


@pytest.mark.parametrize("new, said", [(1, "1 token: speed and"), (2, "2 tokens, "), (3, "3 tokens, ")])
def test_counts_of_tokens(tiny, capsys, new, said):
    options = ["--budget", "144", "--max-new-tokens", str(new)]
    status, _, err = attnpred_main(capsys, *tiny, "--prompt", "a" * 200, *options)
    assert status == 0 and err.startswith(f"attnpred: {said}") and err.count("\n") == 1 and "room" not in err
    assert re.search(r": [\d.]+x (less|more)$", err) if new > 1 else "x less" not in err


def test_the_ratio_is_never_below_one(tiny, capsys):
    """Just beyond the budget, calibration reads more than is left out."""
    options = "--budget 144 --calibration-interval 1 --max-new-tokens 9 --local-tokens 16 --echo-blocks 7".split()
    _, _, err = attnpred_main(capsys, *tiny, "--prompt", "a" * 150, *options)
    assert float(re.search(r": ([\d.]+)x more\n$", err)[1]) > 1


def test_what_ends_an_answer_is_told(tmp_path, capsys, monkeypatch):
    tiny = save_tiny(tmp_path, context_len=40)
    status, out, err = attnpred_main(capsys, *tiny, "--raw", "--prompt", "a" * 30)
    assert status == 0 and err.startswith("attnpred: the answer ends here: there is room for 40 tokens\n")
    assert "10 tokens, " in err and "fit the budget of 1,024" in err
    _, _, err = attnpred_main(capsys, *tiny, "--raw", "--prompt", "a" * 30, "--max-new-tokens", "10", "--dense")
    assert "room" not in err and "budget" not in err
    monkeypatch.setattr(SparseDecoder, "prefill", mock.Mock(side_effect=KeyboardInterrupt))
    assert attnpred_main(capsys, *tiny, "--prompt", "a", "--stats") == (130, "", "")


def test_logits_that_are_not_finite_are_one_line(tmp_path, capsys):
    options = [*save_tiny(tmp_path, broken=True), "--prompt", "a"]
    assert_refused(attnpred.main, "attnpred", options, "not finite", capsys)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_characters_that_the_terminal_lacks(tiny, monkeypatch, encoding):
    outputs = []
    for terminal in ("utf-8", encoding):
        shown = io.BytesIO()
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(shown, encoding=terminal))
        assert attnpred.main([*tiny, "--prompt", "a", "--max-new-tokens", "30"]) == 0
        outputs.append(shown.getvalue().decode(terminal))
    assert "\ufffd" in outputs[0] and outputs[1] == outputs[0].encode(encoding, "replace").decode(encoding)


@pytest.mark.parametrize("closed", ["stdin", "stdout", "stderr"])
def test_a_closed_stream(tiny, capsys, monkeypatch, closed):
    monkeypatch.setattr(sys, closed, None)
    prompt = ["--prompt-file", "-"] if closed == "stdin" else ["--prompt", "a" * 200, "--budget", "144"]
    status, out, err = attnpred_main(capsys, *tiny, *prompt, "--max-new-tokens", "30")
    assert status == (2 if closed == "stdin" else 0) and "Traceback" not in err
    assert (out != "", err.count("\n")) == {"stdin": (False, 1), "stdout": (False, 1), "stderr": (True, 0)}[closed]


def test_a_full_disk_is_one_line(tiny, capsys, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        status = attnpred.main([*tiny, "--prompt", "a", "--max-new-tokens", "3"])
    assert status == 2 and capsys.readouterr().err.endswith("\nattnpred: output: No space left on device\n")


class Prompts(SparseDecoder):
    """Keeps the prompts and the logits after them."""

    def prefill(self, tokens):
        logits = super().prefill(tokens)
        self.prompts = [*getattr(self, "prompts", []), (tokens.tolist(), self.ids[: self.n_tokens].clone(), logits)]
        return logits


@pytest.mark.parametrize("option", ["--chat", "--offload", "--dense"])
def test_a_conversation_costs_each_question_once(tiny, tmp_path, monkeypatch, option):
    """Each question attends to all before it, as in one prompt of the whole conversation."""
    (tmp_path / "report").write_text("\ufeffIt rained </s>.\n")
    give_input(monkeypatch, "Why?\n\n  And then: é? \nReally?\n")
    options = ["--prompt-file", str(tmp_path / "report"), "--chat", option, "--max-new-tokens", "6"]
    decoder = attnpred.run(attnpred.parse_options([*tiny, *options]), Prompts)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    first, *later = (tokenizer.decode(tokens, skip_special_tokens=False) for tokens, _, _ in decoder.prompts)
    assert first == "<s><user>It rained </s>.\n\nWhy?</s><assistant>"
    for prompt, question in zip(later, ("And then: é?", "Really?"), strict=True):
        end = f"<user>{question}</s><assistant>"  # before it: the answer's last token, which was not decoded, and </s>
        assert prompt.endswith(end) and len(tokenizer.encode(prompt).ids) <= len(tokenizer.encode(end).ids) + 4
    assert decoder.stats.prefill_tokens == sum(len(tokens) for tokens, _, _ in decoder.prompts)
    for tokens, whole, logits in decoder.prompts:
        assert whole[-len(tokens) :].tolist() == tokens
        one = SparseDecoder(Config(), decoder.model, random_predictor(), len(whole)).prefill(whole)
        torch.testing.assert_close(logits, one, atol=1e-4, rtol=1e-4)


def test_a_conversation_fills_the_context_and_then_ends(tmp_path, capsys, monkeypatch):
    tiny = save_tiny(tmp_path, context_len=100)
    give_input(monkeypatch, "a\n" * 20)
    status, out, err = attnpred_main(capsys, *tiny, "--chat", "--prompt", "b", "--max-new-tokens", "15")
    assert status == 2 and err.count("\n") in (2, 3) and re.search("has 10. tokens, but there is room for 100", err)
    for options in (["--chat"], []):
        monkeypatch.setattr(attnpred, "lacks_memory", lambda c, m, n, *_: f"no room for {n}" if n > 60 else None)
        give_input(monkeypatch, "")
        args = attnpred.parse_options([*tiny, "--prompt", "b", "--max-new-tokens", "90", *options])
        with pytest.raises(InputError, match="no room for 9."):
            attnpred.run(args)
        args.max_new_tokens = 20
        assert len(attnpred.run(args).ids) == (50 if options else 25)


def test_a_conversation_needs_a_template_and_a_question(tmp_path, capsys, monkeypatch):
    give_input(monkeypatch, "\n \n")
    assert attnpred_main(capsys, *save_tiny(tmp_path), "--chat", "--prompt-file", "README.md") == (0, "", "")
    assert_refused(attnpred.main, "attnpred", [*save_tiny(tmp_path, template=None), "--chat"], "instruct model", capsys)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_is_asked_for_questions(tiny, capsys, monkeypatch, terminal):
    give_input(monkeypatch, "a\n\nb\n")
    monkeypatch.setattr("sys.stdin.isatty", lambda: terminal)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    status, out, err = attnpred_main(capsys, *tiny, "--chat", "--max-new-tokens", "2")
    assert status == 0 and err.startswith("> > > > \nattnpred: " if terminal else "attnpred: ")
    assert "4 tokens, " in err


def test_ctrl_c_ends_an_answer_and_then_the_program(tiny, capsys, monkeypatch):
    presses, tokens, push = {3: 1, 5: 2}, [], TextStream.push  # {number of a token: how often Ctrl-C is pressed}

    def pressing(stream, token):
        tokens.append(token)
        for _ in range(presses.get(len(tokens), 0)):
            signal.raise_signal(signal.SIGINT)
        return push(stream, token)

    monkeypatch.setattr(TextStream, "push", pressing)
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.default_int_handler)
    give_input(monkeypatch, "a\nb\nc\n")
    status, out, err = attnpred_main(capsys, *tiny, "--chat", "--max-new-tokens", "20")
    assert status == 130 and len(tokens) == 5 and err.startswith("attnpred: 5 tokens") and out.endswith("\n")
    assert out.count("\n") == 2  # two answers
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_the_default_model_answers(capsys):
    fetch_default_llm()
    args = ["--prompt", "What is the capital of France?", "--max-new-tokens", "6"]
    status, out, err = attnpred_main(capsys, *args)
    assert status == 0 and "Paris" in out
    assert err.count("\n") == 1 and err.startswith("attnpred: 6 tokens, ") and "fit the budget" in err


def test_the_default_model_has_a_conversation(capsys, monkeypatch):
    give_input(monkeypatch, "What is the capital of France?\nAnd of Italy?\n")
    status, out, err = attnpred_main(capsys, "--chat", "--max-new-tokens", "12")
    answers = out.splitlines()
    assert status == 0 and len(answers) == 2 and "Paris" in answers[0] and "Rome" in answers[1]


def test_a_long_prompt_is_decoded_sparsely_and_covering_budgets_agree_with_dense(capsys, tmp_path):
    text = "".join(f"The box number {i} holds {i * i % 97} apples.\n" for i in range(30))
    (tmp_path / "prompt.txt").write_text(text)
    args = ["--prompt-file", str(tmp_path / "prompt.txt"), *"--raw --max-new-tokens 10 --stats".split()]
    args += ["--calibration-interval", "8"]
    sparse = attnpred_main(capsys, *args, "--budget", "256")
    covering = attnpred_main(capsys, *args, "--budget", "2048")
    dense = attnpred_main(capsys, *args, "--budget", "256", "--dense")
    offloaded = attnpred_main(capsys, *args, "--budget", "256", "--offload")
    assert sparse[0] == covering[0] == dense[0] == offloaded[0] == 0
    assert covering[1] == dense[1] != ""
    assert "recovery" in sparse[2] and "overhead" in sparse[2] and "recovery" not in dense[2]
    assert sparse[1] and offloaded[1] and "fetched" in offloaded[2] and "fetched" not in sparse[2]


def test_a_question_about_a_document(tmp_path, monkeypatch):
    """The file, a blank line, the question; either alone as it is."""
    (tmp_path / "report").write_text("It rained.\n\n")

    def prompt(*args):
        give_input(monkeypatch, "Es regnet — schön.\n")
        (question,) = attnpred.read_questions(attnpred.parse_options(args))
        return question

    file, question = ("--prompt-file", str(tmp_path / "report")), ("--prompt", " Why?\n")
    assert prompt(*file, *question) == "It rained.\n\n Why?\n"
    assert prompt(*file) == "It rained.\n\n" and prompt(*question) == " Why?\n"
    assert prompt("--prompt-file", "-", *question) == "Es regnet — schön.\n\n Why?\n"


@pytest.mark.parametrize("terminal, chunk, shown", [(True, 16, True), (False, 16, False), (True, 64, False)])
def test_a_long_prompt_shows_its_progress_on_a_terminal(capsys, monkeypatch, terminal, chunk, shown):
    monkeypatch.setattr(attnpred, "PREFILL_CHUNK", chunk)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    model = tiny_llama()
    SparseDecoder(Config(), model, random_predictor(), 60).prefill(torch.arange(50))
    out, err = capsys.readouterr()
    assert out == "" and ("Reading the prompt" in err) == shown == bool(err) and "\n" not in err


def test_standard_input_and_sampling_with_a_seed(tiny, capsys, monkeypatch):
    texts = []
    for seed in ("1", "1", "2"):
        give_input(monkeypatch, "Name a colour — any.")
        sampling = ["--temperature", "1.5", "--top-p", "0.95", "--seed", seed, "--max-new-tokens", "20"]
        status, out, _ = attnpred_main(capsys, *tiny, "--prompt-file", "-", *sampling)
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
