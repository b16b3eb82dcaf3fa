"""Tests windows, targets and histories against naive computations, resuming, and refusals."""

import argparse
import functools
import importlib.metadata
import json
import pathlib
import random
import shutil
from dataclasses import replace

import pytest
import safetensors
import torch
import torch.nn.functional as F

import train_predictor
from attnpred import Config, InputError, Predictor, SparseDecoder, load_predictor
from model import Tokenizer, causal_attention
from tests.helpers import LetterTokenizer, assert_refused, random_predictor, tiny_llama
from weights.fetch_llm import fetch_default_llm


def naive_attention(model, tokens):
    """The attention of a dense pass, by softmax in float64: {layer: p (Hq, T, T)}."""
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


@pytest.mark.parametrize("interval, queries, per_row", [(1, 4, 1), (3, 1, 1), (4, 2, 2), (4, 16, 4)])
def test_recorded_rows_equal_a_full_softmax(interval, queries, per_row, monkeypatch):
    monkeypatch.setattr(train_predictor, "ROWS", 20)
    model, tokens = tiny_llama(n_layers=2, group=3), torch.randint(0, 61, (200,)).tolist()
    config = Config(calibration_interval=interval, calibration_queries=queries)
    for end, rows in zip([90, 200], train_predictor.record(model, config, tokens, [90, 200])):
        for layer, p in naive_attention(model, tokens).items():
            for row in range(20):
                last = end - 1 - (19 - row) * interval
                positions = [last - i * interval // per_row for i in range(per_row)]
                true = by_block(p[:, positions, :end], "amax").square().mean(1)  # (Hq, N)
                true = true.unflatten(0, (2, 3)).mean(1).sqrt()  # of the queries of a KV head
                assert (rows[layer, :, row].double() - true).abs().max() < 1e-3  # float16, numbers up to 1


def test_recorded_rows_equal_a_decoders(monkeypatch):
    monkeypatch.setattr(train_predictor, "ROWS", 8)
    model, tokens = tiny_llama(n_layers=2), torch.randint(0, 61, (300,))
    config = Config(history_len=8, calibration_interval=4, calibration_queries=2, budget=160)
    (rows,) = train_predictor.record(model, config, tokens.tolist(), [len(tokens)])
    decoder = SparseDecoder(config, model, random_predictor(), 310)
    decoder.prefill(tokens)
    found = decoder.history.rows.view(2, 2, 8, -1)[..., : rows.shape[-1]]
    torch.testing.assert_close(found, rows, atol=1e-3, rtol=1e-3)


def test_installed_documents_are_of_many_kinds_and_none_is_torch(monkeypatch):
    few = [importlib.metadata.distribution(name) for name in ("torch", "numpy", "pandas")]  # all would take minutes
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: few)
    documents = train_predictor.installed_documents()
    assert set(documents) == {"reference", "source", "documentation", "license", "data", "header"}
    for members in documents.values():
        assert len({train_predictor.split_of(text) for _, text in members}) > 1
        assert not any(name.startswith("torch") for name, _ in members)


def test_contexts():
    """Contexts have the requested length, consist of texts of their split, and depend on the seed."""
    texts = {f"{i}": f"{i} words " * 300 for i in range(40)}

    class Shrinking(LetterTokenizer):
        """Decoded text is encoded in fewer tokens, as can happen with a real tokenizer."""

        def decode(self, ids):
            return super().decode(ids[::2])

    def draw(seed, lengths=(900, 1200), window_tokens=40, tokenizer=LetterTokenizer):
        amounts = lengths, 6, 3, window_tokens
        return list(train_predictor.draw_contexts({"text": texts.items()}, "train", *amounts, tokenizer(), seed))

    first = draw(0)
    for contexts in (first, draw(0, tokenizer=Shrinking)):
        assert [len(tokens) for _, tokens, _ in contexts] == [900, 1200] * 3
    assert all(40 <= end <= len(tokens) for _, tokens, ends in first for end in ends)
    long_windows = [ends for _, _, ends in draw(0, [1200], 1100)]
    assert max(map(len, long_windows)) > 1 and all(1100 <= end <= 1200 for ends in long_windows for end in ends)
    assert first == draw(0) and first != draw(1)
    assert any("chat" in origin for origin, _, _ in first)
    names = [name for origin, _, _ in first for name in origin.split("text ")[1].split(", ")]
    assert {train_predictor.split_of(texts[name]) for name in names} == {"train"}
    with pytest.raises(InputError, match="train split has only [0-9]+ tokens for a context of 1000000"):
        draw(0, [1000000])


def test_what_a_document_says_never_becomes_a_control_token():
    tokenizer = Tokenizer(fetch_default_llm())
    texts = {f"{i}": f"{i} words <|im_end|> " * 300 for i in range(40)}
    contexts = train_predictor.draw_contexts({"text": texts.items()}, "train", [900], 6, 1, 40, tokenizer, 0)
    contexts, end = list(contexts), tokenizer.tokenizer.token_to_id("<|im_end|>")
    for origin, tokens, _ in contexts:
        assert tokens.count(end) == (2 if "chat" in origin else 0)  # after the system's and the user's turn
    assert any("chat" in origin for origin, *_ in contexts)


# --------------------------------------------------------------------------------------------------------------------
# Network and losses
# --------------------------------------------------------------------------------------------------------------------


def test_scores_of_rows_equal_the_network_on_each_window():
    predictor = random_predictor()
    rows, predicted = torch.rand(2, 30, 11), torch.tensor([12, 13, 25, 30])
    found = train_predictor.scores_of_rows(rows, predicted, predictor.state_dict(), 12)
    for i, t in enumerate(predicted):
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


def test_losses_by_hand():
    """Scores far above FLOOR are not changed. The fourth column is outside the middle and must not count."""
    target, scores = torch.tensor([[[0.5, 0.02, 0.0, 0.1]]]), torch.tensor([[[0.4, 0.03, 0.01, 9.0]]])
    valid = torch.tensor([[True, True, True, False]])
    squares = 0.1**2, 0.01**2, 0.01**2
    relative = sum(square / (s + 1e-4) for square, s in zip(squares, (0.4, 0.03, 0.01)))
    for name, value in (("relative", relative), ("mse", 1000 * sum(squares) / 3)):
        assert train_predictor.LOSSES[name](scores, target, valid).item() == pytest.approx(value, rel=0.02)
    low = torch.full_like(target, -0.01, requires_grad=True)
    train_predictor.relative_loss(low, target, valid).backward()
    assert low.grad.isfinite().all() and low.grad[0, 0, 0] < 0 and low.grad[0, 0, 3] == 0


# --------------------------------------------------------------------------------------------------------------------
# Histories and targets
# --------------------------------------------------------------------------------------------------------------------


def test_left_out_by_plain_python(tmp_path, monkeypatch):
    """The budget is shared by all layers and heads."""
    monkeypatch.setattr(train_predictor, "BUDGETS", (160, 208))
    monkeypatch.setattr(train_predictor, "ROWS", 12)
    model, predictor, tokens = tiny_llama(n_layers=2), random_predictor(), torch.randint(0, 61, (290,))
    config = Config(history_len=8, calibration_interval=4, calibration_queries=2)
    (rows,) = train_predictor.record(model, config, tokens.tolist(), [len(tokens)])
    metadata = dict(n_tokens=len(tokens), interval=4, queries=2, block_size=16)
    train_predictor.write_tensors(tmp_path / "window", {"rows": rows}, metadata)
    window = train_predictor.Window(tmp_path / "window")
    lengths = [290 - 12 * 4 + row * 4 + 1 for row in range(12)]  # at the first of the M tokens of each row
    assert window.middle == [config.middle(length) for length in lengths]
    for row, (start, end) in enumerate(window.middle):
        assert window.in_middle[row].nonzero().flatten().tolist() == [*range(start, end)]
    rows = rows.float()
    for t in range(8, 12):
        found = train_predictor.left_out(window, predictor.state_dict(), config, torch.tensor([t]))
        start, end = window.middle[t]
        scores = predictor(rows[:, :, t - 8 : t, start:end].flatten(0, 1)).flatten()  # (L * Hk * n,)
        squares = rows[:, :, t, start:end].square().flatten()
        for budget, topk in ((160, 1), (208, 4)):  # blocks besides sink, local window and echoes
            left = scores.argsort(descending=True)[4 * topk :]
            assert found[budget].item() == pytest.approx(squares[left].sum().item() / 4, rel=1e-3, abs=1e-6)
    together = train_predictor.left_out(window, predictor.state_dict(), config, torch.arange(8, 12))
    assert all(sums.shape == (4,) and (sums >= 0).all() for sums in together.values())


@pytest.mark.parametrize("M, Q", [(1, 1), (4, 2), (8, 8)])
def test_validation_leaves_out_what_decoding_does(M, Q, tmp_path, monkeypatch):
    """Layer 0's q and k do not depend on earlier attention, so decoding leaves out exactly what `left_out` reports."""
    monkeypatch.setattr(train_predictor, "BUDGETS", (160, 192))
    model, predictor, n_prompt, n_steps = tiny_llama(n_layers=1), random_predictor(), 267, 24
    tokens, n_rows = torch.randint(0, 61, (n_prompt + n_steps,)), 8 + n_steps // M
    monkeypatch.setattr(train_predictor, "ROWS", n_rows)
    config = Config(history_len=8, calibration_interval=M, calibration_queries=Q)
    (rows,) = train_predictor.record(model, config, tokens.tolist(), [len(tokens)])
    metadata = dict(n_tokens=len(tokens), interval=M, queries=Q, block_size=16)
    train_predictor.write_tensors(tmp_path / "window", {"rows": rows}, metadata)
    window = train_predictor.Window(tmp_path / "window")
    predicted = torch.arange(8, n_rows)
    for budget in train_predictor.BUDGETS:
        decoder, true = SparseDecoder(replace(config, budget=budget), model, predictor, 300), []
        decoder.prefill(tokens[:n_prompt])
        for first in range(n_prompt, len(tokens), M):
            attended = decoder.cache.attended[0].clone()  # (Hk, capacity), without echoes
            for token in tokens[first : first + M].split(1):
                decoder.decode(token)
            true.append((decoder.history.rows[:, -1].float().square() * ~attended).sum(-1).mean())
        leave_out = functools.partial(train_predictor.left_out, window, predictor.state_dict(), config)
        found = [leave_out(row[None])[budget] for row in predicted]  # images end as in decoding
        torch.testing.assert_close(torch.cat(found), torch.stack(true), atol=1e-5, rtol=1e-2)  # float16
        middle = (rows[0, :, predicted].float().square() * window.in_middle[predicted]).sum(-1).mean(0)
        assert (leave_out(predicted)[budget] <= middle + 1e-4).all()  # at most what is in the middle of each row


def test_a_batch_is_a_crop_of_a_layer(monkeypatch):
    """Each cell's number encodes its layer and head (10,000s), row (100s) and block, so a batch shows its position."""
    for name, value in dict(SPAN=12, COLUMNS=20, SELECTIONS=3).items():
        monkeypatch.setattr(train_predictor, name, value)
    numbers = torch.arange(3 * 2 * 100 * 100.0).view(3, 2, 100, 100)[:, :, :24, :60]  # (layers, heads, rows, N)
    ends = [21 + row // 4 for row in range(24)]
    in_middle = torch.tensor([[4 <= block < end for block in range(60)] for end in ends])  # (rows, N)
    window = argparse.Namespace(n_layers=3, n_rows=24, middle=[(4, end) for end in ends], in_middle=in_middle)
    window.load, places = lambda layer: numbers[layer], []
    for seed in range(300):
        rows, predicted, target, valid = train_predictor.draw_batch([window], random.Random(seed), 8)
        layer, place = divmod(int(rows[0, 0, 0]), 20000)
        first, left = divmod(place, 100)
        last = first + int(predicted.max())
        columns = slice(left, min(left + 20, ends[last]))
        assert torch.equal(rows, numbers[layer, :, first : first + 20, columns])
        assert len(set(predicted.tolist())) == 3 and predicted.min() >= 8
        assert torch.equal(target, numbers[layer, :, first + predicted, columns])
        assert torch.equal(valid, in_middle[first + predicted, columns])
        places.append((layer, first, last, left, ends[last] - columns.stop))
    layers, firsts, lasts, lefts, cut_off = map(set, zip(*places))
    assert layers == {0, 1, 2} and firsts == {0, 1, 2, 3, 4} and max(lasts) == 23
    assert lefts == {4, 5, 6} and cut_off == {0, 1, 2}  # of 22 columns


# --------------------------------------------------------------------------------------------------------------------
# The commands
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a text, and the windows of 100 rows that `collect` records of it with a random model."""
    folder, rng = tmp_path_factory.mktemp("collected"), random.Random(0)
    (folder / "text.txt").write_text("".join(rng.choice("abcdefgh ") for _ in range(60000)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_predictor, "load_model", lambda *_: (tiny_llama(context_len=1200), LetterTokenizer()))
        patch.setattr(train_predictor, "fetch_default_llm", lambda: "tiny")
        patch.setattr(train_predictor, "ROWS", 100)
        patch.chdir(folder)
        assert train_predictor.main(COLLECT) == 0
        assert train_predictor.main([*COLLECT, "--lengths", "800", "--data", "short"]) == 0
        yield folder


COLLECT = "collect --contexts 2 --validation-contexts 1 --lengths 1200 --interval 8 --dtype float32".split()
COLLECT += ["--device", "cpu", "--text", "text.txt"]
TRAIN = "train --steps 4 --validate-every 2 --device cpu".split()


def train(out, *more):
    return train_predictor.main([*TRAIN, "--out", str(out), *more])


def content(path):
    """A file's metadata and tensors. (The order of metadata in the file is random.)"""
    with safetensors.safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name).tolist() for name in file.keys()}


@pytest.mark.parametrize(
    "collecting, training, noted",
    [
        (["--block-size", "8"], [], ["8", "64", "8", "4"]),
        (["--interval", "1"], ["--loss", "mse"], ["16", "64", "1", "4"]),
    ],
)
def test_pipeline(tmp_path, folder, collecting, training, noted):
    data, out = tmp_path / "data", tmp_path / "out" / "p.safetensors"
    collecting = [*COLLECT, "--data", str(data), *collecting]
    assert train_predictor.main(collecting) == 0
    files = sorted(data.iterdir())
    assert [path.name[:5] for path in files] == ["train"] * 4 + ["valid"] * 2  # two windows of each context
    times, whole = [path.stat().st_mtime_ns for path in files], content(files[0])
    files[0].unlink()
    assert train_predictor.main(collecting) == 0  # completes the context, keeps the others
    assert [path.stat().st_mtime_ns for path in files[2:]] == times[2:] and content(files[0]) == whole
    assert train(out, "--data", str(data), *training) == 0
    load_predictor(out)
    metadata, weights = content(out)
    assert [metadata[name] for name in train_predictor.METHOD_SETTINGS] == noted
    curve = json.loads(out.with_suffix(".json").read_text())
    assert [row["step"] for row in curve] == [0, 2, 4] and len({tuple(row) for row in curve}) == 1
    names = [f"left out, {budget}" for budget in train_predictor.BUDGETS]
    best = min(curve, key=lambda row: sum(row[name] for name in names))
    assert json.loads(metadata["validation"]) == {name: round(best[name], 4) for name in names}
    out.unlink()
    assert train(out, "--data", str(data), *training) == 0 and content(out) == (metadata, weights)  # of the checkpoint


def test_training_lowers_the_loss(tmp_path, folder):
    assert train(tmp_path / "p.safetensors", "--steps", "50", "--validate-every", "25", "--lr", "0.005") == 0
    losses = [row["loss"] for row in json.loads((tmp_path / "p.json").read_text())]
    assert losses[-1] < 0.95 * losses[1]  # the first row's loss is of a single batch


@pytest.mark.parametrize("theirs", [False, True])
def test_training_at_a_rate_of_zero_keeps_the_starting_point(theirs, tmp_path, folder):
    torch.save(random_predictor().state_dict(), tmp_path / "theirs.pt")
    options = ["--init-from", str(tmp_path / "theirs.pt")] if theirs else []
    assert train(tmp_path / "p.safetensors", "--lr", "0", "--dtype", "float32", *options) == 0
    start = (random_predictor() if theirs else train_predictor.starting_point(0)).state_dict()
    weights = load_predictor(tmp_path / "p.safetensors")
    assert all(torch.allclose(w, start[name], atol=1e-6) for name, w in weights.state_dict().items())
    windows = train_predictor.open_windows(folder / "data", "train")
    rows, predicted, target, valid = train_predictor.draw_batch(windows, random.Random("0 0"), 64)
    scores = train_predictor.scores_of_rows(rows, predicted, start, 64)
    loss = train_predictor.relative_loss(scores, target, valid)
    assert json.loads((tmp_path / "p.json").read_text())[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_the_mean_of_the_weights_moves_at_first_by_nine_tenths(tmp_path, folder):
    assert train(tmp_path / "p.safetensors", "--steps", "1", "--lr", "10") == 0  # 10 / 50 at the first step
    state = torch.load(tmp_path / "p.checkpoint", weights_only=True)
    start = train_predictor.starting_point(0).state_dict()
    start = train_predictor.scaled(start, train_predictor.INPUT_SCALE)
    for name, w in state["predictor"].items():
        assert torch.allclose(state["average"][name], start[name].lerp(w, 0.9), atol=1e-5)


@pytest.mark.parametrize("draws", [2, 4])
def test_an_interrupted_training_continues_to_the_same_weights(draws, tmp_path, folder, monkeypatch):
    def written(out):
        state = torch.load(out.with_suffix(".checkpoint"), weights_only=True)
        weights = {(part, name): w.tolist() for part in ("predictor", "average") for name, w in state[part].items()}
        return content(out), weights, state["curve"], state["done"], out.with_suffix(".json").read_text()

    draw, drawn = train_predictor.draw_batch, []

    def interrupted(*args):
        drawn.append(1)
        if len(drawn) == draws:
            raise KeyboardInterrupt
        return draw(*args)

    whole, part = tmp_path / "whole.safetensors", tmp_path / "part.safetensors"
    assert train(whole) == 0
    with monkeypatch.context() as patch:
        patch.setattr(train_predictor, "draw_batch", interrupted)
        assert train(part) == 130 and written(part) != written(whole)
    assert train(part) == 0 and written(part) == written(whole)
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize(
    "text, options, message",
    [
        (b"\xff\xfe\x00", "", "give UTF-8 files"),
        (b"too little to learn from", "", "no text in the train split"),
        (b"a text", "--lengths 60", "100 rows of 8 tokens need 800"),
        (b"a text", "--interval 0", "--interval: invalid int in [1, inf) value: '0'"),
        (b"a text", "--seed 99999999999999999999", "--seed: invalid int in [0, 9.22337e+18) value: '99999"),
        (b"a text", "--lengths 9000", "context is 1200"),
        (b"a text", "--data text.txt", "cannot create folder text.txt"),
        (b"a text", "--data {folder}/data --lengths 1100", "lengths = [1200], not [1100]: give another --data"),
        (b"a text", "--data {folder}/data --windows 3", "windows = 2, not 3: give another --data"),
        (b"a text", "--data {folder}/data --dtype bfloat16", "dtype = float32, not bfloat16: give another --data"),
        (b"another text", "--data {folder}/data", "was collected with texts = "),
    ],
)
def test_collect_refuses(text, options, message, tmp_path, folder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_bytes(text)
    options = options.format(folder=folder).split()
    assert_refused(train_predictor.main, "train_predictor", [*COLLECT, *options], message, capsys)
    assert not list(tmp_path.glob("data/*"))


@pytest.mark.parametrize(
    "file, spoilt, options, message",
    [
        ("data/train-000-01200.safetensors", b"cut off", "", "is not a window of `collect`"),
        ("p.safetensors", b"somebody's work", "", "exists, without a checkpoint"),
        ("p.checkpoint", b"torn", "", "checkpoint p.checkpoint cannot be read"),
        (None, b"", "--steps 6", "with steps = 4, not 6: give another --out"),
        (None, b"", "--data {folder}/short", "short has no train windows with 32 blocks to choose from"),
        (None, b"", "--out q.safetensors --loss mse --lr 1e30 --steps 60", "lower --lr"),
        (None, b"", "--out p.pt", "--out p.pt must be a file whose name ends in .safetensors"),
        (None, b"", "--lr -1", "--lr: invalid float in [0, inf) value: '-1'"),
        (None, b"", "--lr nan", "--lr: invalid float in [0, inf) value: 'nan'"),
    ],
)
def test_train_refuses(file, spoilt, options, message, tmp_path, folder, capsys, monkeypatch):
    shutil.copytree(folder / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    if file:
        (tmp_path / file).write_bytes(spoilt)
    else:
        assert train("p.safetensors") == 0
    kept = {path: path.read_bytes() for path in tmp_path.glob("p.*")}
    capsys.readouterr()
    arguments = [*TRAIN, "--out", "p.safetensors", *options.format(folder=folder).split()]
    assert_refused(train_predictor.main, "train_predictor", arguments, message, capsys)
    assert kept == {path: path.read_bytes() for path in tmp_path.glob("p.*")}


def test_a_full_disk_at_any_write_can_be_continued(tmp_path, folder, monkeypatch, capsys):
    write, whole = train_predictor.write_atomically, tmp_path / "whole.safetensors"
    assert train(whole) == 0
    for failing in (0, 1, 2, 4):  # the first checkpoint, weights and curve; the second weights
        writes, out = [], tmp_path / f"{failing}.safetensors"

        def full(path, data, writes=writes, failing=failing):
            writes.append(path)
            train_predictor.require(len(writes) != failing + 1, "cannot write: the disk is full")
            write(path, data)

        with monkeypatch.context() as patch:
            patch.setattr(train_predictor, "write_atomically", full)
            assert train(out) == 2 and "the disk is full" in capsys.readouterr().err
        assert train(out) == 0 and content(out) == content(whole)


def test_a_file_of_the_same_name_is_not_continued(tmp_path, folder, capsys, monkeypatch):
    """Whatever is in the place of the weights, the windows or the start, its content is compared."""
    shutil.copytree(folder / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    torch.save(random_predictor(0).state_dict(), "start.pt")
    options = [*TRAIN, "--out", "p.safetensors", "--init-from", "start.pt"]
    assert train_predictor.main(options) == 0
    shutil.copy("p.safetensors", "kept")

    def refused(message):
        capsys.readouterr()
        assert_refused(train_predictor.main, "train_predictor", options, message, capsys)

    train_predictor.write_tensors("p.safetensors", random_predictor(1).state_dict(), {})
    refused("p.safetensors exists and is not of this training")
    shutil.copy("kept", "p.safetensors")
    torch.save(random_predictor(1).state_dict(), "start.pt")
    refused("checkpoint p.checkpoint was written with start = ")
    torch.save(random_predictor(0).state_dict(), "start.pt")
    windows = [train_predictor.Window(path) for path in sorted(pathlib.Path("data").glob("*"))]
    path, rows, metadata = sorted(pathlib.Path("data").glob("*"))[0], windows[0].rows[:], windows[0].metadata
    train_predictor.write_tensors(path, {"rows": rows * 0.5}, metadata)
    refused("checkpoint p.checkpoint was written with data = ")
    train_predictor.write_tensors(path, {"rows": rows}, metadata | {"weights": "of another model"})
    refused("a window in data was collected with weights = ")
    train_predictor.write_tensors(path, {"rows": rows[..., 1:].contiguous()}, metadata)
    refused("is not a window of `collect` (1075 tokens in 67 blocks)")
    train_predictor.write_tensors(path, {"rows": rows}, metadata)
    assert train_predictor.main(options) == 0


def test_another_model_of_the_same_name_is_not_continued(tmp_path, folder, capsys, monkeypatch):
    other = tiny_llama(context_len=1200, seed=1)
    monkeypatch.setattr(train_predictor, "load_model", lambda *_: (other, LetterTokenizer()))
    assert_refused(train_predictor.main, "train_predictor", COLLECT, "data was collected with weights = ", capsys)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    train_predictor.write_atomically(path, b"old")

    def interrupted(temporary, data):
        temporary.open("wb").write(data[:2])
        raise KeyboardInterrupt

    with pytest.raises(InputError, match="cannot write"):
        train_predictor.write_atomically(tmp_path / "none" / "file", b"x")
    monkeypatch.setattr(pathlib.Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_predictor.write_atomically(path, b"new")
    assert path.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["file.txt"]
