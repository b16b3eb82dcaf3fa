"""Collecting, training and judging: each against a naive computation on random models or rows; bad input."""

import json
import math
import random
from dataclasses import replace

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

import recovery
import rivals
import train_predictor
from attnpred import DEFAULT_PREDICTOR, Config, Predictor, decode_one_token, load_predictor, prefill
from model import causal_attention
from rivals import RIVALS, RivalDecoder, Seen
from test_attnpred import random_predictor, tiny_llama

CONFIG = Config(block_size=16, sink_tokens=16, local_tokens=16, budget=64, history_len=8, dense_layers=1)


class LetterTokenizer:
    """One token a character, for random models."""

    has_chat_template = True

    def encode(self, text, special_tokens=True):
        return [ord(c) % 61 for c in text]

    def decode(self, ids):
        return "".join(chr(48 + i) for i in ids)

    def chat(self, messages):
        return f"<{messages[0]['content']}>"


def naive_attention(model, tokens):
    """Softmax of everything, in float64: {layer: p (Hq, T, T)}, and q, k of each layer."""
    found = {}

    def attend(layer, q, k, v):
        keys = k.repeat_interleave(len(q) // len(k), 0).double()
        logits = q.double() @ keys.mT / q.shape[-1] ** 0.5
        causal = torch.ones(logits.shape[1:], dtype=torch.bool).tril()
        found[layer] = logits.masked_fill(~causal, -torch.inf).softmax(-1), q.clone(), k.clone()
        return causal_attention(layer, q, k, v)

    model.hidden(torch.tensor(tokens), torch.arange(len(tokens)), attend)
    return found


def by_block(p, b, how):
    return getattr(F.pad(p, (0, -p.shape[-1] % b)).unflatten(-1, (-1, b)), how)(-1)


# --------------------------------------------------------------------------------------------------------------------
# Collecting
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("select", ["kv", "q"])
def test_recorded_rows_equal_a_full_softmax(select):
    model = tiny_llama()
    tokens = torch.randint(0, 61, (200,)).tolist()
    config = replace(CONFIG, select_heads=select)
    windows = train_predictor.record(model, config, tokens, [90, 200], 40)
    p = naive_attention(model, tokens)
    for end, (pooled, mass) in zip([90, 200], windows):
        for layer in (1, 2):
            rows = p[layer][0][:, end - 40 : end, :end]
            for found, how in ((pooled, "amax"), (mass, "sum")):
                true = by_block(rows, 16, how)
                true = true.unflatten(0, (2, 2)).mean(1) if select == "kv" else true
                assert (found[layer - 1].double() - true).abs().max() < 1e-3  # float16, of numbers up to 1


def test_no_text_is_on_two_sides():
    texts = [f"{i} " * 600 for i in range(60)]
    documents = {"text": [train_predictor.Document(f"{i}", t) for i, t in enumerate(texts + texts)]}
    names = {}
    for split in train_predictor.SPLITS:
        contexts = train_predictor.draw_contexts(documents, split, [800], 8, 1, 1, LetterTokenizer(), 0)
        names[split] = {name for c in contexts for name in c.name.split(": ")[1].split("text ")[-1].split(", ")}
    numbers = {split: {int(name) % 60 for name in members} for split, members in names.items()}
    assert all(numbers.values())
    assert not numbers["train"] & numbers["test"] and not numbers["train"] & numbers["validation"]
    assert not numbers["validation"] & numbers["test"]


def test_python_documents_split():
    splits = {}
    for documents in train_predictor.python_documents().values():
        for document in documents:
            splits.setdefault(document.split, set()).add(document.text)
    assert set(splits) == {"train", "validation", "test"}
    assert not splits["train"] & splits["validation"] and not (splits["train"] | splits["validation"]) & splits["test"]


def test_contexts_have_the_length_asked_for_and_are_drawn_from_the_seed():
    documents = {"text": [train_predictor.Document(f"{i}", f"{i} words " * 300) for i in range(40)]}

    def draw(seed):
        return list(train_predictor.draw_contexts(documents, "train", [900, 1200], 6, 3, 40, LetterTokenizer(), seed))

    first = draw(0)
    assert [len(c.tokens) for c in first] == [900, 1200] * 3
    assert all(40 <= end <= len(c.tokens) for c in first for end in c.ends)
    assert first == draw(0) and first != draw(1)
    assert any("chat" in c.name for c in first)


# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------


def test_scores_of_rows_equal_the_network_on_each_window():
    predictor = random_predictor()
    rows, targets = torch.rand(2, 30, 11), torch.tensor([12, 13, 25, 30])
    found = train_predictor.scores_of_rows(rows, targets, predictor.state_dict(), 12)
    for i, t in enumerate(targets):
        assert torch.allclose(found[:, i], predictor(rows[:, t - 12 : t]), atol=1e-6)


def test_scaling_is_folded_into_the_weights():
    predictor, image = random_predictor(), torch.rand(2, 16, 9)
    other = Predictor()
    other.load_state_dict(train_predictor.scaled(predictor.state_dict(), 32.0))
    assert torch.allclose(other(image * 32) / 32, predictor(image), atol=1e-6)


def test_starting_point_scores_with_mean_and_last_rows():
    image = torch.rand(2, 64, 9)
    found = train_predictor.starting_point(0, 0.6, 0.0)(image)
    last = image[:, -1] + 1.2 * image[:, -2] + 0.35 * image[:, -3]
    assert torch.allclose(found, image.mean(1) + 0.6 * last, atol=1e-5)


def test_partially_observed_rows_are_what_sparse_attention_gives():
    """Against a softmax over the seen tokens only; heads are single queries, so renormalising is exact."""
    torch.manual_seed(0)
    b, n_rows, n_tokens = 16, 20, 320
    logits = 3 * torch.randn(1, n_rows, n_tokens)
    p = logits.softmax(-1)
    pooled, mass = by_block(p, b, "amax"), by_block(p, b, "sum")
    middle = [(1, 18)] * n_rows
    rows = train_predictor.partially_observed(pooled, mass, middle, 5, 6, 0, 0.9, 5)
    ema = pooled[0, 0]
    for r in range(1, n_rows):
        if r < 6 or r % 5 == 0:
            true = pooled[0, r]
        else:
            chosen = ema[1:18].topk(5).indices + 1
            blocks = [0, *chosen.tolist(), 18, 19]
            tokens = [t for block in blocks for t in range(block * b, block * b + b)]
            masked = torch.full((n_tokens,), -torch.inf)
            masked[tokens] = logits[0, r, tokens]
            true = by_block(masked.softmax(-1), b, "amax")
        assert torch.allclose(rows[0, r], true, atol=1e-6)
        ema = 0.9 * ema + 0.1 * rows[0, r]


def test_intensity_loss_is_least_at_the_true_shares():
    mass = torch.tensor([[[0.5, 0.02, 0.003, 0.1]]])
    valid = torch.tensor([[True, True, True, False]])
    best = train_predictor.intensity_loss(mass, mass, valid)
    share = torch.tensor([0.5, 0.02, 0.003]) / 0.523
    assert best.item() == pytest.approx(-(share * share.log()).sum().item(), abs=2e-3)
    for other in (mass.sqrt(), mass.flip(-1), mass * torch.tensor([1, 2, 1, 1])):
        assert train_predictor.intensity_loss(other, mass, valid) > best


# --------------------------------------------------------------------------------------------------------------------
# Rivals
# --------------------------------------------------------------------------------------------------------------------


def naive_scores(name, p, q, k, i, n_prompt, start, end, history_len):
    """A rival's scores for row i of the naive p (Hq, T, T), heads for themselves, from tokens up and written out."""
    pooled, mass = by_block(p, 16, "amax")[..., start:end], by_block(p, 16, "sum")[..., start:end]
    rows = pooled[:, i - history_len : i]
    if name == "oracle":
        return mass[:, i]
    if name == "last row":
        return rows[:, -1]
    if name == "mean":
        return sum(rows[:, r] for r in range(history_len)) / history_len
    if name == "decayed mean":
        return sum(rows[:, r] * 0.9 ** (history_len - 1 - r) for r in range(history_len))
    if name == "StreamingLLM":
        return torch.arange(start, end).expand(len(p), -1)
    if name == "H2O":
        total = mass[:, :i].sum(1)
        order = torch.stack([torch.tensor([(row > x).sum() for x in row]) for row in total])
        return -torch.minimum(order, torch.arange(end - start).flip(0))
    if name == "SnapKV":
        votes = p[:, max(0, n_prompt - rivals.SNAPKV_WINDOW) : n_prompt, :n_prompt].mean(1)
        around = torch.stack([votes[:, max(0, t - 3) : t + 4].amax(-1) for t in range(n_prompt)], -1)
        return by_block(around, 16, "amax")[:, start:end]
    if name == "Quest":
        scores = torch.zeros(len(q), end - start, dtype=torch.float64)
        for h in range(len(q)):
            for block in range(start, end):
                keys = k[h * len(k) // len(q), 16 * block : 16 * block + 16].double()
                products = torch.stack([q[h, i].double() * keys.amin(0), q[h, i].double() * keys.amax(0)])
                scores[h, block - start] = products.amax(0).sum() / q.shape[-1] ** 0.5
        return scores.softmax(-1)


@pytest.mark.parametrize("select", ["kv", "q"])
@pytest.mark.parametrize("name", [name for name in RIVALS if name != "random"])
def test_rivals_score_as_naively(name, select):
    """With true histories: the prompt is noted, then rows behind it, then a row is scored."""
    model, n_prompt, i = tiny_llama(), 150, 163
    tokens = torch.randint(0, 61, (180,)).tolist()
    p, q, k = naive_attention(model, tokens)[1]
    rival, memory, config = RIVALS[name](), {}, Config(sink_tokens=16, local_tokens=16)
    cache = train_predictor.in_blocks(k, 16)
    rival.prefill(q[:, :n_prompt], cache, n_prompt, memory)
    for row in range(n_prompt, i):
        rival.observe(by_block(p[:, row].float(), 16, "sum"), memory)
    start, end = config.middle(i + 1)

    def group(x):
        return x.unflatten(0, (2, -1)).mean(1) if select == "kv" else x

    history = group(by_block(p, 16, "amax").float()[:, i - 64 : i])
    found = rival.score(Seen(history, cache, i + 1, start, end, memory, q[:, i])).expand(len(history), -1)
    true = naive_scores(name, p, q, k, i, n_prompt, start, end, 64)
    if name == "H2O" and select == "kv":  # ranks are taken of the group's mean
        total = group(by_block(p, 16, "sum")[:, :i].sum(1))[:, start:end]
        order = torch.stack([torch.tensor([(row > x).sum() for x in row]) for row in total])
        true = -torch.minimum(order, torch.arange(end - start).flip(0))
    else:
        true = group(true.double()) if name != "StreamingLLM" else true[: len(history)]
    assert torch.allclose(found.double(), true.double(), atol=1e-5)


@pytest.mark.parametrize("select", ["kv", "q"])
def test_rivals_decode_sparsely_and_recovery_is_measured(select):
    """Recovery against exp(lse_sparse - lse_true) on calibration steps; the oracle best; budgets kept."""
    model = tiny_llama()
    tokens = torch.randint(0, 61, (260,))
    config = replace(CONFIG, select_heads=select, calibration_interval=2)
    methods = [rival() for rival in RIVALS.values()]
    decoder = RivalDecoder(config, model, random_predictor(), 300, methods)
    prefill(model, decoder, tokens[:240])
    means = {}
    for rival in [*methods, None, *methods[::-1]]:
        decoder.restart(rival, 64)
        for token in tokens[240:]:
            decode_one_token(model, decoder, token[None])
            assert all(len(set(row.tolist())) == len(row) for row in decoder.attended[0])
            assert decoder.attended[0].shape[1] in (1 + 2 + 1, 1 + 2 + 2)  # sink, chosen, local: its partial block too
        measured = torch.stack(decoder.recovery)[1::2].flatten(0, 1)
        assert torch.allclose(measured, torch.stack(decoder.stats.recovery), atol=1e-5)
        name = rival.name if rival else "ours"
        means.setdefault(name, []).append(measured.mean().item())
    assert all(len({round(m, 6) for m in found}) == 1 for found in means.values())  # `restart` leaves nothing behind
    assert max(means, key=means.get) == "oracle"


def test_the_incremental_prediction_selects_what_the_whole_network_does():
    model, predictor = tiny_llama(), random_predictor()
    tokens = torch.randint(0, 61, (280,))
    chosen = []
    for rival in (None, rivals.Convolution(predictor)):
        decoder = RivalDecoder(CONFIG, model, predictor, 300, [rival])
        prefill(model, decoder, tokens[:200])
        steps = []
        for token in tokens[200:]:
            decode_one_token(model, decoder, token[None])
            steps.append(torch.stack(decoder.blocks))
        chosen.append(steps)
    assert all(torch.equal(a, b) for a, b in zip(*chosen))


def test_h2o_never_takes_back_what_it_dropped():
    model = tiny_llama()
    tokens = torch.randint(0, 61, (330,))
    decoder = RivalDecoder(replace(CONFIG, budget=96), model, random_predictor(), 330, [rivals.H2O()])
    prefill(model, decoder, tokens[:240])
    before = None
    for token in tokens[240:]:
        decode_one_token(model, decoder, token[None])
        now = [set(row.tolist()) for row in decoder.attended[0]]
        known = (decoder.n_tokens - 1) // 16  # a block that begins with this token is new
        assert before is None or all(new - {known} <= old | {known - 1} for new, old in zip(now, before))
        before = now


# --------------------------------------------------------------------------------------------------------------------
# The whole pipeline, and bad input
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_llm(monkeypatch):
    """The commands with a random model in the place of the default LLM."""
    model = tiny_llama(context_len=1024)
    for module in (train_predictor, recovery):
        monkeypatch.setattr(module, "load_model", lambda *_: (model, LetterTokenizer()))
        monkeypatch.setattr(module, "fetch_default_llm", lambda: "tiny")
    return model


@pytest.fixture
def text(tmp_path):
    rng = random.Random(0)
    path = tmp_path / "text.txt"
    path.write_text("".join(rng.choice("abcdefgh ") for _ in range(60000)))
    return str(path)


def collect(tmp_path, text, *more):
    command = [
        "collect",
        "--data",
        str(tmp_path / "data"),
        "--text",
        text,
        "--quiet",
        "--lengths",
        "900",
        "--rows",
        "100",
    ]
    command += ["--contexts", "2", "--validation-contexts", "1", "--windows", "1", "--dtype", "float32"]
    return train_predictor.main(command + ["--dense-layers", "1", *more])


def train(tmp_path, *more):
    command = ["train", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out" / "p.safetensors"), "--quiet"]
    return train_predictor.main(command + ["--steps", "4", "--validate-every", "2", "--columns", "24", *more])


def test_pipeline(tmp_path, text, tiny_llm, capsys):
    assert collect(tmp_path, text) == 0
    files = sorted((tmp_path / "data").glob("*.safetensors"))
    times = [path.stat().st_mtime_ns for path in files]
    assert len(files) == 3
    files[0].unlink()
    assert collect(tmp_path, text) == 0  # fills the hole, keeps the rest
    assert [path.stat().st_mtime_ns for path in files[1:]] == times[1:]
    assert train(tmp_path) == 0
    out = tmp_path / "out" / "p.safetensors"
    load_predictor(out)
    with safetensors.safe_open(out, "pt") as file:
        about = file.metadata()
    assert about["block_size"] == "16" and about["seed"] == "0" and json.loads(about["validation_recovery"])
    assert out.with_suffix(".png").stat().st_size > 1000
    command = [
        "--predictor",
        str(out),
        "--text",
        text,
        "--quiet",
        "--lengths",
        "600",
        "--contexts",
        "1",
        "--steps",
        "8",
    ]
    command += [
        "--budgets",
        "256",
        "--dense-layers",
        "1",
        "--images",
        str(tmp_path / "images"),
        "--json",
        str(tmp_path / "r.json"),
    ]
    capsys.readouterr()
    assert recovery.main(command) == 0
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in ["AttentionPredictor", *RIVALS])
    assert all((tmp_path / "images" / name).stat().st_size for name in ("predicted_rows.png", "recovery_by_layer.png"))
    entries = json.loads((tmp_path / "r.json").read_text())["entries"]
    assert recovery.main(command) == 0 and capsys.readouterr().out == printed  # goes on from the file: nothing to do
    assert len(entries) == 2 * 2 * (len(RIVALS) + 1) and all(0 < x <= 1.0001 for e in entries for x in e["layers"])


def test_an_interrupted_training_goes_on_to_the_same_weights(tmp_path, text, tiny_llm, monkeypatch):
    assert collect(tmp_path, text) == 0
    assert train(tmp_path) == 0
    whole = torch.load(tmp_path / "out" / "p.checkpoint", weights_only=True)
    draw, drawn = train_predictor.draw_batch, []

    def interrupted(*args):
        drawn.append(1)
        if len(drawn) == 4:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(train_predictor, "draw_batch", interrupted)
    assert train(tmp_path, "--restart") == 130
    monkeypatch.setattr(train_predictor, "draw_batch", draw)
    assert train(tmp_path) == 0
    again = torch.load(tmp_path / "out" / "p.checkpoint", weights_only=True)
    assert all(torch.equal(again["average"][name], w) for name, w in whole["average"].items())
    assert again["curve"] == whole["curve"]


def test_training_continues_from_other_weights(tmp_path, text, tiny_llm):
    assert collect(tmp_path, text) == 0
    published = tmp_path / "theirs.pth"
    torch.save(random_predictor().state_dict(), published)
    assert train(tmp_path, "--init-from", str(published), "--lr", "0") == 0
    weights = load_predictor(tmp_path / "out" / "p.safetensors").state_dict()
    assert all(torch.allclose(weights[name], w, atol=1e-6) for name, w in random_predictor().state_dict().items())


def one_line(capsys, *words):
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("train_predictor: "), error
    assert all(word in error for word in words), error


def test_bad_text(tmp_path, tiny_llm, capsys):
    empty, short, binary = (tmp_path / name for name in ("empty", "short", "binary"))
    empty.write_text("\n ")
    short.write_text("too little to learn from")
    binary.write_bytes(b"\xff\xfe\x00")
    for path, words in ((empty, ["empty"]), (short, ["no text"]), (binary, ["UTF-8"]), (tmp_path / "none", ["none"])):
        assert collect(tmp_path, str(path)) == 2
        one_line(capsys, *words)
    short.write_text("too little to learn from. " * 40)
    assert collect(tmp_path, str(short), "--lengths", "9000") == 2
    one_line(capsys, "context")
    assert collect(tmp_path, str(short), "--lengths", "60") == 2
    one_line(capsys, "60 tokens", "100 rows")
    assert not list(tmp_path.glob("data/*.safetensors"))


def test_bad_data(tmp_path, text, tiny_llm, capsys):
    assert train(tmp_path) == 2
    one_line(capsys, "no train windows", "collect")
    assert collect(tmp_path, text) == 0
    assert collect(tmp_path, text, "--block-size", "32") == 2
    one_line(capsys, "block_size = 16, not 32")
    out = tmp_path / "out" / "p.safetensors"
    out.parent.mkdir(exist_ok=True)
    out.write_bytes(b"somebody's work")
    assert train(tmp_path) == 2
    one_line(capsys, "exists", "--out")
    assert out.read_bytes() == b"somebody's work"
    assert train(tmp_path, "--restart") == 0
    capsys.readouterr()
    before = out.read_bytes()
    assert train(tmp_path, "--steps", "6") == 2
    one_line(capsys, "checkpoint", "steps", "--restart")
    (tmp_path / "out" / "p.checkpoint").write_bytes(b"something else")
    assert train(tmp_path) == 2
    one_line(capsys, "checkpoint", "--restart")
    assert train(tmp_path, "--restart", "--init-from", text) == 2
    one_line(capsys, "cannot be read")
    path = next(tmp_path.glob("data/train-*"))
    with safetensors.safe_open(path, "pt") as file:
        tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    for path in tmp_path.glob("data/train-*"):
        safetensors.torch.save_file({name: torch.full_like(t, math.nan) for name, t in tensors.items()}, path, about)
    assert train(tmp_path, "--restart") == 2
    one_line(capsys, "NaN")
    path.write_bytes(b"cut off")
    assert train(tmp_path, "--restart") == 2
    one_line(capsys, "no window of `collect`")
    assert out.read_bytes() == before


def test_diverging_training_keeps_the_best(tmp_path, text, tiny_llm, capsys):
    assert collect(tmp_path, text) == 0
    assert train(tmp_path, "--loss", "mse", "--lr", "1e30", "--steps", "60") == 2
    one_line(capsys, "loss is", "--lr")


def test_full_disk(tmp_path, text, tiny_llm, capsys, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_predictor.safetensors.torch, "save_file", full)
    assert collect(tmp_path, text) == 2
    one_line(capsys, "No space left on device", "make room")
    assert not list(tmp_path.glob("data/*.safetensors*")) and not list(tmp_path.glob("data/.*"))


def test_bad_judging(tmp_path, text, tiny_llm, capsys):
    assert recovery.main(["--text", text, "--lengths", "300", "--quiet"]) == 2
    assert "too few" in capsys.readouterr().err
    assert recovery.main(["--predictor", text]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_shipped_predictor_is_better_than_mean_and_last_row():
    """On made-up rows of steady blocks and noise: a check that the file is whole, no more."""
    generator = torch.Generator().manual_seed(0)
    n, n_rows = 200, 96
    level = torch.rand(1, n, generator=generator).pow(8)
    noise = torch.rand(n_rows, n, generator=generator).pow(3)
    rows = (level * 6 + noise * 3).softmax(-1)[None]
    ours = load_predictor(DEFAULT_PREDICTOR).state_dict()
    targets = torch.arange(64, n_rows)
    scores = train_predictor.scores_of_rows(rows, targets, ours, 64)[0]
    mean = torch.stack([rows[0, t - 64 : t].mean(0) for t in targets])
    last = rows[0, targets - 1]
    found = [rows[0, targets].gather(1, s.topk(24).indices).sum(1).mean().item() for s in (scores, mean, last)]
    assert found[0] > found[2] and found[0] > found[1] - 0.01
