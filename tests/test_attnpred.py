"""The method against a naive simulation of it, the command line on the real model, and bad input."""

import io
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
from attnpred import Config, InputError, SparseDecoder, generate, sample
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
        return next(2**i for i in range(4, 30) if n_tokens / 2**i <= self.c.budget)

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
                interval, distance = n_prompt, max(1, n_prompt // queries)
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
    block_size=8, sink_tokens=0, local_tokens=8, budget=32, history_len=6, echo_blocks=1
)  # M: 16, from 513 on 32
OUTGROWS = Config(**SMALL, budget=48, calibration_interval=2, echo_blocks=2, calibration_queries=2)
NOTHING = Config(**SMALL, budget=32, calibration_interval=4, echo_blocks=2)  # K = 0: only echoes


@settings(max_examples=30)
@given(configurations(), PROMPT_LENGTHS, st.integers(1, 20), st.integers(0, 2**31), HEADS, st.booleans())
@example(GROWS, 495, 16, 0, (2, 2), False)
@example(OUTGROWS, 30, 1, 1, (2, 2), False)
@example(NOTHING, 100, 20, 2, (1, 3), False)
@example(OUTGROWS, 200, 7, 3, (3, 1), True)
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
        with mock.patch.object(attnpred, "PREFILL_CHUNK", size):
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
    lengths = [1, 16384, 16385, 32768, 32769, 131072]
    assert [Config().interval(n) for n in lengths] == [16, 16, 32, 32, 64, 128]
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
    assert decoder.cache.kv.isnan().any() and torch.equal(*runs) and decoder.cache.echoes > 0


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
    assert decoder.selecting and decoder.cache.echoes > 0
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


def test_a_text_that_fits_is_decoded_densely():
    model = tiny_llama()
    decoder = SparseDecoder(Config(budget=256), model, random_predictor(), 200)
    list(generate(decoder, list(range(50)), 10))
    stats = decoder.stats
    assert stats.attention_bytes == stats.dense_bytes == stats.read_bytes and stats.decode_tokens == 9
    assert decoder.history is None and "fit the budget of 256" in attnpred.format_summary(decoder)


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
    given = "--budget 512 --calibration-interval 8 --echo-blocks 2 --sink-tokens 32 --calibration-queries 8"
    changed = dict(budget=512, calibration_interval=8, echo_blocks=2, sink_tokens=32, calibration_queries=8)
    assert config(*given.split()) == Config(**changed)
    assert config("--calibration-interval", "auto", "--offload") == Config()


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
    assert err.count("\n") == 1 and err.startswith("attnpred: 6 tokens, ") and "fit the budget" in err


def test_a_long_prompt_is_decoded_sparsely_and_covering_budgets_agree_with_dense(capsys, tmp_path):
    text = "".join(f"The box number {i} holds {i * i % 97} apples.\n" for i in range(60))
    (tmp_path / "prompt.txt").write_text(text)
    args = ["--prompt-file", str(tmp_path / "prompt.txt"), "--raw", "--max-new-tokens", "20", "--stats"]
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
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("Es regnet — schön.\n".encode())))
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
