"""The method against a naive simulation of it, the command line on the real model, and bad input."""

import io
import os
import pathlib
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import attnpred
from attnpred import Config, InputError, KVCache, Predictor, SparseDecoder, decode_one_token, generate, prefill, sample
from model import Llama, LlamaConfig
from weights.fetch_llm import FetchError, fetch_default_llm

ROOT = pathlib.Path(attnpred.__file__).parent
SLOW = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])


PROMPT_LENGTHS = st.one_of(st.integers(150, 300), st.integers(1, 40))


def tiny_llama(n_layers=3, n_kv_heads=2, group=2, head_dim=8, context_len=512, seed=0):
    """A Llama with random weights, for comparing computations only."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        n_layers=n_layers,
        n_heads=n_kv_heads * group,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        d_model=32,
        d_ff=48,
        vocab_size=61,
        context_len=context_len,
        rope_theta=10000.0,
        rope_scaling=None,
        rms_eps=1e-5,
        tie_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        eos_token_ids=(),
    )
    model = Llama(config)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.3)
    return model


def random_predictor(seed=0):
    torch.manual_seed(seed)
    return Predictor().requires_grad_(False)


class NaiveMethod:
    """The method as a simulation: the whole attention matrix, masked. Shares no code with the decoder but `choose`."""

    def __init__(self, config, model, predictor, choose):
        self.c, self.m, self.predictor, self.choose = config, model.config, predictor, choose
        self.k, self.v, self.rows = {}, {}, {}
        self.step = 0

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
        turn = self.step + layer if c.stagger_calibration else self.step
        entering = true if turn % c.calibration_interval == 0 else p  # (Hq, new, T)
        pooled = torch.nn.functional.pad(entering, (0, -total % b)).unflatten(-1, (-1, b)).amax(-1)  # (Hq, new, N)
        if c.select_heads == "kv":
            pooled = pooled.unflatten(0, (m.n_kv_heads, -1)).mean(1)
        self.rows.setdefault(layer, []).extend(pooled[:, i] for i in range(new))
        return (p @ values).float()

    def mask(self, layer, total):
        """Which tokens (Hq, T) a sparse layer attends to; None: all. `choose` picks among equals up to rounding."""
        c, b = self.c, self.c.block_size
        start, end = c.sink_tokens // b, total // b - c.local_tokens // b
        if end - start <= c.topk_blocks:
            return None
        scores = self.predictor(self.image(layer, end)[:, :, start:])  # (heads, n)
        chosen = self.choose(layer, scores, c.topk_blocks)  # (heads, K)
        token_block = torch.arange(total) // b
        attended = (token_block < start) | (token_block >= end) | (chosen[..., None] + start == token_block).any(1)
        return attended.repeat_interleave(self.m.n_heads // len(chosen), 0)

    def image(self, layer, width):
        """The last H rows, oldest first, zero rows before the first: (heads, H, width)."""
        rows = self.rows[layer][-self.c.history_len :]
        image = torch.zeros(len(rows[0]), self.c.history_len, width)
        for i, row in enumerate(rows, self.c.history_len - len(rows)):
            image[:, i, : row.shape[-1]] = row[:, :width]
        return image


@st.composite
def configurations(draw):
    b = draw(st.sampled_from([8, 16]))
    sink, local = b * draw(st.integers(0, 2)), b * draw(st.integers(1, 2))
    return Config(
        block_size=b,
        history_len=draw(st.integers(5, 12)),
        sink_tokens=sink,
        local_tokens=local,
        budget=sink + local + b * draw(st.integers(1, 4)),
        calibration_interval=draw(st.integers(1, 4)),
        dense_layers=draw(st.sampled_from([0, 0, 1, 3])),
        select_heads=draw(st.sampled_from(["kv", "q"])),
        stagger_calibration=draw(st.booleans()),
    )


@SLOW
@given(configurations(), PROMPT_LENGTHS, st.integers(0, 2**31), st.sampled_from([(2, 2), (1, 3), (3, 1)]))
def test_decoding_equals_the_naive_simulation(config, prompt_len, seed, heads):
    model, predictor = tiny_llama(n_kv_heads=heads[0], group=heads[1], seed=seed), random_predictor(seed)
    tokens = torch.randint(61, (prompt_len,))
    decoder = SparseDecoder(config, model, predictor, prompt_len + 40)

    def choose(layer, scores, k):
        table = decoder.blocks[layer - config.dense_layers].long()
        chosen = table[:, config.sink_tokens // config.block_size :][:, :k] - config.sink_tokens // config.block_size
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)
        assert (kept.sum(1) == k).all() and (chosen.diff(dim=1) > 0).all()
        worst, best_left = scores.masked_fill(~kept, torch.inf).amin(1), scores.masked_fill(kept, -torch.inf).amax(1)
        assert (worst >= best_left - 1e-5).all(), "a block with a lower score was selected"
        return chosen

    naive = NaiveMethod(config, model, predictor, choose)
    got = prefill(model, decoder, tokens)
    want = model(tokens, torch.arange(prompt_len), naive.attend)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    for step in range(1, 40):
        token = torch.randint(61, (1,))
        naive.step = step
        want = model(
            token, torch.tensor([prompt_len + step - 1]), naive.attend
        )  # before ours: `choose` reads its blocks
        got = decode_one_token(model, decoder, token)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        window = (decoder.newest + 1 + torch.arange(config.history_len)) % config.history_len
        for layer in range(config.dense_layers, 3):
            image = decoder.history[layer - config.dense_layers][:, window]  # (heads, H, capacity)
            torch.testing.assert_close(image, naive.image(layer, image.shape[-1]), atol=1e-5, rtol=1e-4)


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


@pytest.mark.parametrize("select_heads", ["kv", "q"])
def test_a_budget_that_covers_everything_equals_dense(select_heads):
    model, predictor = tiny_llama(), random_predictor()
    tokens = torch.randint(61, (200,)).tolist()
    config = Config(budget=256, select_heads=select_heads)
    runs = [
        list(generate(model, SparseDecoder(c, model, predictor, 240), tokens, 40))
        for c in (config, Config(budget=256, dense_layers=3))
    ]
    assert runs[0] == runs[1]


def test_blocks_outside_the_selection_are_never_read():
    model = tiny_llama()
    config = Config(block_size=8, sink_tokens=8, local_tokens=8, budget=32, dense_layers=0, calibration_interval=99)
    runs = []
    for poison in (False, True):
        decoder = SparseDecoder(config, model, random_predictor(), 200)
        prefill(model, decoder, torch.arange(150) % 61)
        for token in range(12):
            if poison:
                for layer, kv_head in ((layer, h) for layer in range(3) for h in range(2)):
                    unread = torch.ones(decoder.cache.k.shape[2], dtype=torch.bool)
                    unread[decoder.blocks[layer][kv_head].long()] = False
                    held = [t[layer, kv_head, unread].clone() for t in (decoder.cache.k, decoder.cache.v)]
                    decoder.cache.k[layer, kv_head, unread] = torch.nan
                    decoder.cache.v[layer, kv_head, unread] = torch.nan
                    decoder.held = getattr(decoder, "held", []) + [(layer, kv_head, unread, held)]
            runs.append(decode_one_token(model, decoder, torch.tensor([token])))
            for layer, kv_head, unread, (k, v) in decoder.__dict__.pop("held", []):
                decoder.cache.k[layer, kv_head, unread], decoder.cache.v[layer, kv_head, unread] = k, v
    for clean, poisoned in zip(runs[:12], runs[12:], strict=True):
        assert torch.equal(clean, poisoned)


def test_counters_are_exact():
    model = tiny_llama()
    config = Config(block_size=8, sink_tokens=8, local_tokens=8, budget=32, dense_layers=1, calibration_interval=3)
    decoder = SparseDecoder(config, model, random_predictor(), 200)
    list(generate(model, decoder, list(range(50)), 10))
    lengths = range(51, 60)
    key = 2 * 8 * 4  # two KV heads of eight float32
    attended = [32 + t % 8 for t in lengths]
    assert decoder.stats.decode_tokens == 9
    assert decoder.stats.kv_bytes == sum(2 * key * (t + 2 * a) for t, a in zip(lengths, attended, strict=True))
    assert decoder.stats.dense_kv_bytes == sum(2 * key * 3 * t for t in lengths)
    assert decoder.stats.calibration_bytes == sum(2 * key * t for step, t in enumerate(lengths, 1) if step % 3 == 0)
    assert len(decoder.stats.recovery) == 2 * 3
    assert all((r > 0).all() and (r <= 1 + 1e-5).all() for r in decoder.stats.recovery)


def test_cache_writes_where_told():
    shape = SimpleNamespace(n_layers=2, n_kv_heads=3, head_dim=4)
    cache = KVCache(Config(block_size=8), shape, 30, torch.float32, "cpu", "torch")
    assert cache.k.shape == (2, 3, 4, 8, 4)
    k, v = torch.randn(3, 13, 4), torch.randn(3, 13, 4)
    cache.write(1, k, v, 5)
    assert torch.equal(cache.k[1].flatten(1, 2)[:, 5:18], k) and torch.equal(cache.v[1].flatten(1, 2)[:, 5:18], v)
    assert cache.k.count_nonzero() == k.numel() and cache.v[0].count_nonzero() == 0


def test_sampling():
    logits = torch.tensor([0.0, 3.0, 2.0, -1.0])
    assert sample(logits).tolist() == [1]
    generator = torch.Generator().manual_seed(0)
    draws = torch.cat([sample(logits, 1.0, 1.0, generator) for _ in range(4000)]).bincount(minlength=4) / 4000
    torch.testing.assert_close(draws, logits.softmax(-1), atol=0.03, rtol=0)
    nucleus = {sample(logits, 1.0, 0.9, generator).item() for _ in range(200)}
    assert nucleus == {1, 2}  # .696 + .256 reaches .9
    assert {sample(logits, 5.0, 1e-6, generator).item() for _ in range(20)} == {1}


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


def bad_predictors(folder):
    state = random_predictor().state_dict()
    torch.save({"conv1.weight": Dangerous()}, folder / "dangerous.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save(state | {"extra": torch.zeros(1)}, folder / "keys.pt")
    torch.save(state | {"conv1.bias": torch.zeros(3)}, folder / "shape.pt")
    torch.save(state | {"conv2.bias": torch.full((32,), torch.nan)}, folder / "nan.pt")
    whole = safetensors.torch.save(state)
    (folder / "short.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.pt").write_bytes(b"")
    (folder / "text.pt").write_text("hello")
    return [
        "dangerous.pt",
        "list.pt",
        "keys.pt",
        "shape.pt",
        "nan.pt",
        "short.safetensors",
        "empty.pt",
        "text.pt",
        "none.pt",
    ]


def test_bad_predictors_are_refused_in_one_line(tmp_path, capfd):
    for name in bad_predictors(tmp_path):
        with pytest.raises(InputError) as caught:
            attnpred.load_predictor(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    assert "unpickled" not in capfd.readouterr().out


# Command line


def attnpred_main(capsys, *args):
    status = attnpred.main(list(args))
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize(
    "args, complaint",
    [
        ([], "--prompt"),
        (["--prompt", "  \n"], "empty"),
        (["--prompt", "a", "--prompt-file", "b"], "not allowed"),
        (["--prompt-file", "/nonexistent/file"], "cannot be read"),
        (["--prompt", "a", "--budget", "many"], "invalid int"),
        (["--prompt", "a", "--budget", "112"], "at least 128"),
        (["--prompt", "a", "--budget", "1000"], "multiple of the block size: 1008"),
        (["--prompt", "a", "--sink-tokens", "-16"], "multiple"),
        (["--prompt", "a", "--local-tokens", "0"], "at least one block"),
        (["--prompt", "a", "--block-size", "12"], "8, 16, 32 or 64"),
        (["--prompt", "a", "--history-len", "4"], "at least 5"),
        (["--prompt", "a", "--calibration-interval", "0"], "at least 1"),
        (["--prompt", "a", "--dense-layers", "-1"], "negative"),
        (["--prompt", "a", "--select-heads", "x"], "invalid choice"),
        (["--prompt", "a", "--max-new-tokens", "0"], "at least 1"),
        (["--prompt", "a", "--temperature", "-1"], "temperature"),
        (["--prompt", "a", "--temperature", "nan"], "temperature"),
        (["--prompt", "a", "--top-p", "0"], "top-p"),
        (["--prompt", "a", "--device", "abacus"], "not available"),
        (["--prompt", "a", "--device", "meta"], "not available"),
        (["--prompt", "a", "--seed", str(2**64)], "seed"),
        (["--prompt", "a", "--predictor", "/nonexistent/p.pt"], "does not exist"),
        (["--prompt", "a", "--model", "/nonexistent/model"], "no such folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, args, complaint):
    status, out, err = attnpred_main(capsys, *args)
    assert status == 2 and out == "" and err.count("\n") == 1 and complaint in err and err.startswith("attnpred: ")


def test_a_failed_fetch_is_one_line(capsys, monkeypatch):
    def offline():
        raise FetchError("no network")

    monkeypatch.setattr(attnpred, "fetch_default_llm", offline)
    assert attnpred_main(capsys, "--prompt", "a") == (2, "", "attnpred: no network\n")


def test_prompt_that_is_not_text_and_one_that_is_too_long(capsys, tmp_path):
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    status, _, err = attnpred_main(capsys, "--prompt-file", str(tmp_path / "latin"))
    assert status == 2 and "UTF-8" in err
    (tmp_path / "long").write_text("word " * 9000)
    status, out, err = attnpred_main(capsys, "--prompt-file", str(tmp_path / "long"))
    assert status == 2 and "8,192" in err and out == "" and err.count("\n") == 1


def test_the_default_model_answers(capsys):
    args = ["--prompt", "What is the capital of France?", "--max-new-tokens", "24", "--stats"]
    status, out, err = attnpred_main(capsys, *args)
    assert status == 0 and "Paris" in out
    assert [line.split()[0] for line in err.splitlines()] == ["prefill", "decode", "KV", "predictor"]


def test_a_long_prompt_is_decoded_sparsely_and_covering_budgets_agree_with_dense(capsys, tmp_path):
    text = "".join(f"The box number {i} holds {i * i % 97} apples.\n" for i in range(60))
    (tmp_path / "prompt.txt").write_text(text)
    args = ["--prompt-file", str(tmp_path / "prompt.txt"), "--raw", "--max-new-tokens", "16", "--stats"]
    sparse = attnpred_main(capsys, *args, "--budget", "256")
    covering = attnpred_main(capsys, *args, "--budget", "2048")
    dense = attnpred_main(capsys, *args, "--dense")
    assert sparse[0] == covering[0] == dense[0] == 0
    assert covering[1] == dense[1] != ""
    assert "recovery" in sparse[2] and "multiply-adds" in sparse[2] and "recovery" not in dense[2]


def test_standard_input_and_sampling_with_a_seed(capsys, monkeypatch):
    texts = []
    for seed in ("1", "1", "2"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("Name a colour — any.".encode())))
        args = [
            "--prompt-file",
            "-",
            "--temperature",
            "1.5",
            "--top-p",
            "0.95",
            "--seed",
            seed,
            "--max-new-tokens",
            "20",
        ]
        status, out, _ = attnpred_main(capsys, *args, "--max-new-tokens", "20")
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
    first = process.stdout.read(8)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == b"" and len(first + rest) > 10 and rest.endswith(b"\n")


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} attnpred.py --prompt 'Tell me a long story.' --max-new-tokens 60 | head -c 1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, timeout=120)
    assert done.stderr == b"" and len(done.stdout) == 1
