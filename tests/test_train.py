"""Collecting and training: windows, targets and histories against naive computations, resuming, refusals."""

import argparse
import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

import train_predictor
from attnpred import (
    DEFAULT_PREDICTOR,
    Config,
    InputError,
    Predictor,
    SparseDecoder,
    decode_one_token,
    load_predictor,
    prefill,
)
from experiments import evaluate
from model import causal_attention
from tests.helpers import random_predictor, tiny_llama

CONFIG = Config(block_size=16, sink_tokens=16, local_tokens=16, budget=64, history_len=8, dense_layers=1)


class LetterTokenizer:
    """One token per character, for random models."""

    has_chat_template = True

    def encode(self, text, special_tokens=True):
        return [ord(c) % 61 for c in text]

    def decode(self, ids):
        return "".join(chr(48 + i) for i in ids)

    def chat(self, messages):
        return f"<{messages[0]['content']}>"


def naive_attention(model, tokens):
    """Softmax of everything in float64: {layer: p (Hq, T, T)}."""
    found = {}

    def attend(layer, q, k, v):
        keys = k.repeat_interleave(len(q) // len(k), 0).double()
        logits = q.double() @ keys.mT / q.shape[-1] ** 0.5
        found[layer] = logits.masked_fill(torch.ones(logits.shape[1:]).triu(1).bool(), -torch.inf).softmax(-1)
        return causal_attention(layer, q, k, v)

    with torch.inference_mode():
        model(torch.tensor(tokens), torch.arange(len(tokens)), attend)
    return found


def by_block(p, how, b=16):
    return getattr(F.pad(p, (0, -p.shape[-1] % b)).unflatten(-1, (-1, b)), how)(-1)


# --------------------------------------------------------------------------------------------------------------------
# Collecting
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("select", ["kv", "q"])
@pytest.mark.parametrize("stride", [1, 3])
def test_recorded_rows_equal_a_full_softmax(select, stride, monkeypatch):
    monkeypatch.setattr(train_predictor, "MAX_LOGITS", 4 * 200 * 9 * 3)  # nine rows at a time
    model, tokens, rows = tiny_llama(), torch.randint(0, 61, (200,)).tolist(), 29
    config = replace(CONFIG, select_heads=select)
    windows = train_predictor.record(model, config, tokens, [90, 200], rows, stride)
    p = naive_attention(model, tokens)
    for end, (pooled, mass) in zip([90, 200], windows):
        for layer in (1, 2):
            for row in range(rows):
                pos = end - 1 - (rows - 1 - row) * stride
                true_row = by_block(p[layer][:, pos, :end], "amax")  # (Hq, N)
                true_mass = by_block(p[layer][:, pos - stride + 1 : pos + 1, :end], "sum")  # (Hq, stride, N)
                for found, true in ((pooled, true_row.square()), (mass, true_mass.square().mean(1))):
                    true = (true.unflatten(0, (2, 2)).mean(1) if select == "kv" else true).sqrt()
                    assert (found[layer - 1, :, row].double() - true).abs().max() < 1e-3  # float16, numbers up to 1


def test_no_text_is_in_two_splits():
    texts = [f"{i} " * 600 for i in range(60)]
    documents = {"text": [(f"{i}", text) for i, text in enumerate(texts + texts)]}
    numbers = {}
    for split in ("train", "validation", "test"):
        contexts = train_predictor.draw_contexts(documents, split, [800], 8, 1, 1, LetterTokenizer(), 0)
        names = {name for origin, _, _ in contexts for name in origin.split("text ")[1].split(", ")}
        numbers[split] = {int(name) % 60 for name in names}
    assert all(numbers.values()) and len(set.union(*numbers.values())) == sum(map(len, numbers.values()))


def test_installed_documents_are_of_many_kinds_and_none_is_torch():
    documents = train_predictor.installed_documents()
    assert set(documents) == {"reference", "source", "documentation", "license", "data", "header"}
    for members in documents.values():
        assert {train_predictor.split_of(text) for _, text in members} == {"train", "validation", "test"}
        assert not any(name.startswith("torch") for name, _ in members)


def test_contexts_have_the_length_asked_for_and_are_drawn_from_the_seed():
    documents = {"text": [(f"{i}", f"{i} words " * 300) for i in range(40)]}

    class Shrinking(LetterTokenizer):
        """What it decodes, it encodes in fewer tokens, as a real tokenizer may."""

        def decode(self, ids):
            return super().decode(ids[::2])

    def draw(seed, lengths=(900, 1200), window_tokens=40, tokenizer=LetterTokenizer):
        amounts = lengths, 6, 3, window_tokens
        return list(train_predictor.draw_contexts(documents, "train", *amounts, tokenizer(), seed))

    first = draw(0)
    for contexts in (first, draw(0, tokenizer=Shrinking)):
        assert [len(tokens) for _, tokens, _ in contexts] == [900, 1200] * 3
    assert all(40 <= end <= len(tokens) for _, tokens, ends in first for end in ends)
    long_windows = [ends for _, _, ends in draw(0, [1200], 1100)]
    assert max(map(len, long_windows)) > 1 and all(1100 <= end <= 1200 for ends in long_windows for end in ends)
    assert first == draw(0) and first != draw(1)
    assert any("chat" in origin for origin, _, _ in first)
    with pytest.raises(InputError, match="train split has only [0-9]+ tokens for a context of 1000000"):
        draw(0, [1000000])


# --------------------------------------------------------------------------------------------------------------------
# Network and losses
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
    last = image[:, -1] + 0.8 * image[:, -2] + 0.16 * image[:, -3]
    assert torch.allclose(found, image.mean(1) + 0.6 * last, atol=1e-5)


def test_the_shipped_predictor_is_better_than_mean_and_last_row():
    """On made-up rows of blocks that drift, with noise: a check that the file is whole."""
    generator = torch.Generator().manual_seed(0)
    level = 4 * torch.rand(1, 200, generator=generator).pow(4)
    drift, noise = torch.randn(2, 96, 200, generator=generator)
    rows, targets = (level + 0.15 * drift.cumsum(0) + 0.6 * noise).softmax(-1)[None], torch.arange(64, 96)
    ours = train_predictor.scores_of_rows(rows, targets, load_predictor(DEFAULT_PREDICTOR).state_dict(), 64)[0]
    mean, last = torch.stack([rows[0, t - 64 : t].mean(0) for t in targets]), rows[0, targets - 1]
    found = [rows[0, targets].gather(1, s.topk(24).indices).sum(1).mean().item() for s in (ours, mean, last)]
    assert found[0] > max(found[1:])


def test_losses_by_hand():
    """Far above FLOOR a positive score is the score. The fourth column is outside the middle and must not count."""
    mass, scores = torch.tensor([[[0.5, 0.02, 0.0, 0.1]]]), torch.tensor([[[0.4, 0.03, 0.01, 9.0]]])
    valid = torch.tensor([[True, True, True, False]])
    squares = 0.1**2, 0.01**2, 0.01**2
    relative = sum(square / (s + 1e-4) for square, s in zip(squares, (0.4, 0.03, 0.01)))
    for name, value in (("relative", relative), ("mse", 1000 * sum(squares) / 3)):
        assert train_predictor.LOSSES[name](scores, mass, valid).item() == pytest.approx(value, rel=0.02)
    low = torch.full_like(mass, -0.01, requires_grad=True)
    train_predictor.relative_loss(low, mass, valid).backward()
    assert low.grad.isfinite().all() and low.grad[0, 0, 0] < 0 and low.grad[0, 0, 3] == 0


def test_the_relative_loss_is_least_at_the_root_of_the_expected_square():
    mass, valid = torch.rand(1, 1, 5000) ** 4, torch.ones(1, 5000, dtype=torch.bool)
    levels = torch.linspace(0.1, 0.6, 101)
    losses = [train_predictor.relative_loss(torch.full_like(mass, level), mass, valid).item() for level in levels]
    assert levels[np.argmin(losses)] == pytest.approx(mass.square().mean().sqrt().item(), abs=0.006)


# --------------------------------------------------------------------------------------------------------------------
# Histories and targets
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share, M, P", [("layer", 1, 1), ("layer", 4, 4), ("head", 4, 8)])
def test_validation_leaves_out_what_decoding_does(share, M, P, tmp_path, monkeypatch):
    """Layer 0's q and k do not depend on earlier attention, so its real decoding leaves out what `left_out` says."""
    monkeypatch.setattr(train_predictor, "BUDGETS", (160, 192))
    model, predictor, n_prompt, n_steps = tiny_llama(n_layers=1), random_predictor(), 267, 24
    config = Config(history_len=8, share_budget=share, calibration_interval=M, selection_interval=P, select_heads="q")
    tokens = torch.randint(0, 61, (n_prompt + n_steps,))
    mass = by_block(naive_attention(model, tokens.tolist())[0], "sum").float()  # (Hq, T, N)
    rows = 8 + n_steps // M
    (pooled, block_mass), *_ = train_predictor.record(model, config, tokens.tolist(), [len(tokens)], rows, M)
    write_window(tmp_path / "w.safetensors", pooled, block_mass, n_tokens=len(tokens), stride=M)
    window = train_predictor.Window(tmp_path / "w.safetensors")
    text_lengths = [n_prompt + 1 + (row - 8) * M for row in range(rows)]  # at the first of the M tokens of each row
    assert window.middle == [config.middle(length) for length in text_lengths]
    for budget in train_predictor.BUDGETS:
        decoder, true = SparseDecoder(replace(config, budget=budget), model, predictor, 300), []
        prefill(model, decoder, tokens[:n_prompt])
        for pos in range(n_prompt, len(tokens)):
            attended = decoder.attended(0, mass.shape[2])
            decode_one_token(model, decoder, tokens[pos : pos + 1])
            true.append((mass[:, pos].square() * ~attended).sum(-1))  # (Hq,)
        expected = torch.stack(true, 1).unflatten(1, (-1, P)).mean(2)  # (Hq, selections)
        for i in range(n_steps // P):  # one by one, so that each image ends where decoding ends it
            at = torch.tensor([8 + i * P // M])
            found = train_predictor.left_out(window, predictor.state_dict(), config, P // M, at)[budget]  # (1, Hq, 1)
            torch.testing.assert_close(found[0, :, 0], expected[:, i], atol=1e-5, rtol=1e-2)  # float16
        at = torch.arange(8, rows, P // M)  # all at once: no more is left out than each one's middle has
        found = train_predictor.left_out(window, predictor.state_dict(), config, P // M, at)[budget][0]  # (Hq, n)
        for i, pos in enumerate(range(n_prompt, len(tokens), P)):
            middle = mass[:, pos : pos + P, slice(*config.middle(pos + 1))].square().sum(-1).mean(1)  # (Hq,)
            assert (found[:, i] <= middle + 1e-4).all()


def write_window(path, pooled, mass, **about):
    defaults = dict(llm="x", corpus="x", seed=0, block_size=16, dense_layers=0, select_heads="q", rows=pooled.shape[2])
    train_predictor.write_tensors(path, {"pooled": pooled.half(), "mass": mass.half()}, defaults | about)


@pytest.mark.parametrize("selection", [1, 3])
def test_targets_are_the_mass_of_the_next_tokens(selection, monkeypatch):
    """Each squared mass tells its layer and head (10,000s), row (100s) and block, so a batch shows its place."""
    for name, value in dict(SPAN=12, COLUMNS=20, TARGETS=3).items():
        monkeypatch.setattr(train_predictor, name, value)
    layer, head, row, block = (torch.arange(n).view(-1, *[1] * (3 - i)) for i, n in enumerate((5, 2, 60, 60)))
    mass = (layer * 2 + head) * 1e4 + row * 1e2 + block + 0.0  # (5, 2, 60, 60)
    window, places = argparse.Namespace(layers=5, rows=60, middle=[(4, 40 + row // 4) for row in range(60)]), []
    window.load = lambda layers: (mass[list(layers)] + 1, mass[list(layers)].double().sqrt())
    for seed in range(40):
        rows, targets, ahead, valid = train_predictor.draw_batch([window], random.Random(seed), 3, 8, selection)
        ahead = ahead.square().float()
        assert rows.shape == (6, 8 + 12, 20) and ahead.shape == (6, 3, 20)
        heads = (ahead[:, 0, 0] // 1e4).view(3, 2)
        assert len(set(heads[:, 0].tolist())) == 3 and (heads[:, 1] - heads[:, 0] == 1).all()  # whole layers
        place = ahead[0, :, 0] % 1e4 - 100 * (selection - 1) / 2  # (T,): 100 times the row before which one is made
        t, columns = (place // 100).long(), (place[0] % 100).long() + torch.arange(20)
        first = (t - targets)[0]
        naive = sum(mass.flatten(0, 1)[:, t + later] for later in range(selection)) / selection  # (10, T, 60)
        assert torch.allclose(ahead, naive[heads.flatten().long()][..., columns], atol=0.02)
        assert torch.equal(t, targets + first) and (targets >= 8).all() and len(set(targets.tolist())) == 3
        assert columns[0] >= 4 and torch.equal(valid, torch.stack([columns < window.middle[i][1] for i in t]))
        true = mass.flatten(0, 1)[heads.flatten().long()][:, first : first + 20, columns] + 1  # (6, 20, 20)
        assert torch.equal(rows, true)
        places.append((first.item(), t.max().item(), columns[0].item()))
    assert len(set(places)) > 20 and max(last for _, last, _ in places) > 55 - selection


def test_batches_reach_both_ends_of_the_middle(monkeypatch):
    for name, value in dict(SPAN=12, COLUMNS=20, TARGETS=3).items():
        monkeypatch.setattr(train_predictor, name, value)
    mass = torch.arange(60.0).expand(1, 1, 60, 60)
    window = argparse.Namespace(layers=1, rows=60, middle=[(4, 25)] * 60, load=lambda layers: (mass, mass))
    batches = (train_predictor.draw_batch([window], random.Random(seed), 1, 8, 1) for seed in range(40))
    assert {rows[0, 0, 0].item() for rows, *_ in batches} == {4, 5}  # the first column of 20, of a middle of 21


# --------------------------------------------------------------------------------------------------------------------
# The commands
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_llm(monkeypatch):
    """The commands with a random model in the place of the default LLM."""
    model = tiny_llama(context_len=1024)
    monkeypatch.setattr(train_predictor, "load_model", lambda *_: (model, LetterTokenizer()))
    monkeypatch.setattr(train_predictor, "fetch_default_llm", lambda: "tiny")


@pytest.fixture
def text(tmp_path):
    rng = random.Random(0)
    path = tmp_path / "text.txt"
    path.write_text("".join(rng.choice("abcdefgh ") for _ in range(60000)))
    return str(path)


def content(path):
    """A file's metadata and tensors; the order of metadata in the file is random."""
    with safetensors.safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name).tolist() for name in file.keys()}


def command(defaults, *more):
    return train_predictor.main([*defaults.split(), "--quiet", "--device", "cpu", *map(str, more)])


def collect(tmp_path, text, *more):
    counts = "--contexts 2 --validation-contexts 1 --windows 1 --lengths 1000 --rows 100 --dense-layers 1"
    return command(f"collect {counts} --dtype float32", "--data", tmp_path / "data", "--text", text, *more)


def train(tmp_path, *more):
    files = "--data", tmp_path / "data", "--out", tmp_path / "out" / "p.safetensors"
    return command("train --steps 4 --validate-every 2", *files, *more)


@pytest.mark.parametrize(
    "collecting, training, noted",
    [
        ([], ["--share-budget", "head"], ["8", "8", "true", "head"]),
        (["--stride", "10"], ["--selection-interval", "20"], ["10", "20", "true", "layer"]),
        (["--stride", "1", "--select-heads", "q"], ["--loss", "mse"], ["1", "1", "every", "layer"]),
    ],
)
def test_pipeline(tmp_path, text, tiny_llm, collecting, training, noted):
    assert collect(tmp_path, text, *collecting) == 0
    files = sorted((tmp_path / "data").iterdir())
    times, whole = [path.stat().st_mtime_ns for path in files], content(files[0])
    assert [path.name[:5] for path in files] == ["train", "train", "valid"]
    files[0].unlink()
    assert collect(tmp_path, text, *collecting) == 0  # fills the hole, keeps the rest
    assert [path.stat().st_mtime_ns for path in files[1:]] == times[1:] and content(files[0]) == whole
    assert train(tmp_path, *training) == 0
    out = tmp_path / "out" / "p.safetensors"
    load_predictor(out)
    about, _ = content(out)
    assert [about[name] for name in train_predictor.METHOD_SETTINGS[1:]] == noted and about["block_size"] == "16"
    curve = json.loads(out.with_suffix(".json").read_text())
    assert [row["step"] for row in curve] == [0, 2, 4] and len({tuple(row) for row in curve}) == 1
    names = [f"left out, {budget}" for budget in train_predictor.BUDGETS]
    best = min(curve, key=lambda row: sum(row[name] for name in names))
    assert json.loads(about["validation"]) == {name: round(best[name], 4) for name in names}


def test_collect_train_evaluate_table(tmp_path, text, tiny_llm, monkeypatch, capsys):
    """The three commands that weights/README.md names, and the table of their results."""
    monkeypatch.setattr(evaluate, "load_model", train_predictor.load_model)
    monkeypatch.setattr(evaluate, "fetch_default_llm", train_predictor.fetch_default_llm)
    assert collect(tmp_path, text) == 0 and train(tmp_path) == 0
    options = f"--texts {text} --lengths 600 --n-new 16 --results {tmp_path}/results.jsonl --quiet"
    options += f" --predictor {tmp_path}/out/p.safetensors"
    capsys.readouterr()
    assert evaluate.main(["texts", *options.split(), "--grid", "ours,decayed-mean:0.6 bytes=1/2"]) == 0
    printed = capsys.readouterr().out
    assert "| ours |" in printed and "| decayed-mean:0.6 |" in printed
    assert evaluate.main(["table", *options.split()]) == 0 and capsys.readouterr().out == printed


def test_training_lowers_the_loss(tmp_path, text, tiny_llm):
    assert collect(tmp_path, text) == 0
    assert train(tmp_path, "--steps", 60, "--validate-every", 20) == 0
    losses = [row["loss"] for row in json.loads((tmp_path / "out" / "p.json").read_text())]
    assert losses[-1] < 0.85 * losses[0]


def test_the_mean_of_the_weights_moves_at_first_by_nine_tenths(tmp_path, text, tiny_llm):
    assert collect(tmp_path, text) == 0
    assert train(tmp_path, "--steps", 1, "--lr", 10) == 0  # 10 / 50 at the first step
    state = torch.load(tmp_path / "out" / "p.checkpoint", weights_only=True)
    start = train_predictor.starting_point(0).state_dict()
    start = train_predictor.scaled(start, train_predictor.INPUT_SCALE)
    for name, w in state["predictor"].items():
        assert torch.allclose(state["average"][name], start[name].lerp(w, 0.9), atol=1e-5)


def test_an_interrupted_training_continues_to_the_same_weights(tmp_path, text, tiny_llm, monkeypatch):
    assert collect(tmp_path, text) == 0
    assert train(tmp_path) == 0
    out = tmp_path / "out" / "p.safetensors"

    def written():
        state = torch.load(out.with_suffix(".checkpoint"), weights_only=True)
        weights = {(part, name): w.tolist() for part in ("predictor", "average") for name, w in state[part].items()}
        return content(out), weights, state["curve"], state["done"], out.with_suffix(".json").read_text()

    whole = written()
    draw, drawn = train_predictor.draw_batch, []

    def interrupted(*args):
        drawn.append(1)
        if len(drawn) == 4:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(train_predictor, "draw_batch", interrupted)
    assert train(tmp_path, "--restart") == 130
    assert written() != whole
    monkeypatch.setattr(train_predictor, "draw_batch", draw)
    assert train(tmp_path) == 0
    assert written() == whole and len(list(out.parent.iterdir())) == 3


def test_training_continues_from_other_weights(tmp_path, text, tiny_llm):
    assert collect(tmp_path, text) == 0
    torch.save(random_predictor().state_dict(), tmp_path / "theirs.pth")
    assert train(tmp_path, "--init-from", tmp_path / "theirs.pth", "--lr", "0") == 0
    weights = load_predictor(tmp_path / "out" / "p.safetensors").state_dict()
    assert all(torch.allclose(weights[name], w, atol=1e-6) for name, w in random_predictor().state_dict().items())


def one_line(capsys, words):
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("train_predictor: "), error
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    "content, options, words",
    [
        (b"\n ", "", ["empty"]),
        (b"\xff\xfe\x00", "", ["UTF-8"]),
        (None, "", ["cannot be read"]),
        (b"too little to learn from", "", ["no text in the train split"]),
        (b"too little to learn from. " * 60, "--lengths 1024", ["no text in the validation split"]),
        (b"a text", "--lengths 60", ["60 tokens", "100 rows"]),
        (b"a text", "--stride 20", ["1000 tokens", "stride of 20", "2000"]),
        (b"a text", "--stride 0", ["--stride", "positive", "0"]),
        (b"a text", "--rows 64", ["no row after a history", "192"]),
        (b"a text", "--lengths 9000", ["context is 1024"]),
        (b"a text", "--dense-layers 3", ["dense layers 3"]),
        (b"a text", "--block-size 7", ["block_size"]),
        (b"a text", "--data text.txt", ["cannot create folder text.txt"]),
    ],
)
def test_collect_refuses(content, options, words, tmp_path, tiny_llm, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    assert collect(tmp_path, "text.txt", *options.split()) == 2
    one_line(capsys, words)
    assert not list(tmp_path.glob("data/*"))


def spoil_windows(data):
    for path in data.glob("train-*"):
        about, tensors = content(path)
        train_predictor.write_tensors(path, {name: torch.tensor(x) * math.nan for name, x in tensors.items()}, about)


@pytest.mark.parametrize(
    "spoil, options, words",
    [
        (lambda data, out: [path.unlink() for path in data.iterdir()], "", ["no train windows", "collect"]),
        (lambda data, out: spoil_windows(data), "", ["NaN", "collect again"]),
        (
            lambda data, out: next(data.glob("train-*")).write_bytes(b"cut off"),
            "",
            ["not a window of `collect`", "collect again"],
        ),
        (lambda data, out: out.write_bytes(b"somebody's work"), "", ["exists", "--out"]),
        (lambda data, out: out.with_suffix(".checkpoint").write_bytes(b"torn"), "", ["checkpoint", "--restart"]),
        (lambda data, out: train(data.parent), "--steps 6", ["checkpoint", "steps = 4, not 6", "--restart"]),
        (None, "--init-from text.txt", ["cannot be read"]),
        (None, "--selection-interval 12", ["P = 12", "a multiple of the windows' stride, 8", "at most 288"]),
        (None, "--selection-interval 296", ["P = 296", "at most 288"]),
        (None, "--loss mse --lr 1e30 --steps 60", ["the loss is", "--lr"]),
    ],
)
def test_train_refuses(spoil, options, words, tmp_path, text, tiny_llm, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert collect(tmp_path, text) == 0
    out = tmp_path / "out" / "p.safetensors"
    out.parent.mkdir()
    if spoil:
        spoil(tmp_path / "data", out)
    kept = out.read_bytes() if out.exists() else None
    capsys.readouterr()
    assert train(tmp_path, *options.split()) == 2
    one_line(capsys, words)
    assert kept is None or out.read_bytes() == kept


def test_an_interrupted_context_is_completed(tmp_path, text, monkeypatch):
    model = tiny_llama(context_len=1200)
    monkeypatch.setattr(train_predictor, "load_model", lambda *_: (model, LetterTokenizer()))
    monkeypatch.setattr(train_predictor, "fetch_default_llm", lambda: "tiny")
    more = "--windows", 2, "--lengths", 1200
    assert collect(tmp_path, text, *more) == 0
    files = sorted((tmp_path / "data").iterdir())
    assert len(files) == 6  # two windows of each of three contexts
    whole = content(files[0])
    files[0].unlink()
    assert collect(tmp_path, text, *more) == 0 and content(files[0]) == whole


def test_windows_of_other_settings_do_not_mix(tmp_path, text, tiny_llm, capsys):
    assert collect(tmp_path, text, "--stride", "10") == 0
    assert collect(tmp_path, text, "--stride", "10", "--block-size", "32") == 2
    one_line(capsys, ["block_size = 16, not 32", "--data"])


def test_full_disk(tmp_path, text, tiny_llm, capsys, monkeypatch):
    def full(path, data):
        path.open("wb").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_predictor.pathlib.Path, "write_bytes", full)
    assert collect(tmp_path, text) == 2
    one_line(capsys, ["cannot write", "No space left on device"])
    assert not list((tmp_path / "data").iterdir())
