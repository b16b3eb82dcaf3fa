"""The pictures: patterns found are there, watching changes nothing, --plot draws or says why not."""

import json
import sys

import pytest
import torch

import attnpred
import plots
from attnpred import Config, SparseDecoder, decode_one_token, generate, prefill
from model import causal_attention
from test_attnpred import random_predictor, tiny_llama

SMALL = dict(
    block_size=8, history_len=8, sink_tokens=8, local_tokens=16, budget=40, calibration_interval=3, dense_layers=1
)


def test_patterns_are_told_apart():
    """One head of each kind among heads of noise."""
    torch.manual_seed(0)
    rows = torch.rand(64, 7, 40) * 0.3  # (R, heads, n)
    time, block = torch.arange(64)[:, None], torch.arange(40)
    rows[:, 1] += torch.rand(40)  # the same blocks again and again
    rows[:, 3] += ((block - time // 16) % 10 == 0).float()  # a block on every 16 steps
    rows[:, 5] += ((time % 7 == 0) & (block % 5 == 0)).float()  # every 7 steps
    assert plots.find_patterns(rows, 16) == {"re-access": 1, "sequential": 3, "seasonal": 5}
    assert len(set(plots.find_patterns(torch.zeros(20, 7, 40), 16).values())) == 3  # no pattern: still no head twice
    assert "sequential" not in plots.find_patterns(rows[:12], 16)


def watched(select_heads="kv", offload=False, n_prompt=120, n_new=9):
    model = tiny_llama()
    config = Config(**SMALL, select_heads=select_heads)
    decoder = SparseDecoder(config, model, random_predictor(), n_prompt + n_new, "torch", offload)
    recorder = plots.Recorder(decoder)
    tokens = torch.randint(0, 61, (n_prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    out = list(generate(model, decoder, tokens, n_new))
    return model, config, tokens, out, decoder, recorder


@pytest.mark.parametrize("select_heads, offload", [("kv", False), ("q", False), ("kv", True)])
def test_watching_changes_nothing(select_heads, offload):
    model, config, tokens, out, decoder, recorder = watched(select_heads, offload)
    alone = SparseDecoder(config, model, random_predictor(), len(tokens) + 9, "torch", offload)
    assert list(generate(model, alone, tokens, 9)) == out
    assert torch.equal(alone.history, decoder.history)
    for name in ("kv_bytes", "calibration_bytes", "predict_multiply_adds"):
        assert getattr(alone.stats, name) == getattr(decoder.stats, name), name
    if offload:
        assert alone.cache.streamed_bytes == decoder.cache.streamed_bytes
        assert int(alone.cache.fetched) == int(decoder.cache.fetched)
    steps = decoder.stats.decode_tokens
    assert len(recorder.recovery) == len(recorder.bytes) == len(recorder.chosen) == steps
    assert sum(step[0] for step in recorder.bytes) == decoder.stats.kv_bytes
    calibrated = [r for i, r in enumerate(recorder.recovery, 1) if i % config.calibration_interval == 0]
    assert sum(calibrated) / len(calibrated) == pytest.approx(
        torch.stack(decoder.stats.recovery).mean().item(), rel=1e-5
    )


def test_what_is_drawn_is_what_happened():
    """The true row of the first sparse layer, from a plain pass; the prediction, from the image that was seen."""
    model, config, tokens, out, decoder, recorder = watched(n_new=3)
    n = decoder.n_tokens
    seen = {}

    def attend(layer, q, k, v):
        seen[layer] = q, k
        return causal_attention(layer, q, k, v)

    model.hidden(torch.tensor(tokens + out[: n - len(tokens)]), torch.arange(n), attend)
    q, k = seen[1]  # layer 0 is dense, so layer 1 sees what a dense model's would
    p = (q[:, -1:] @ k.repeat_interleave(2, 0).mT * 8**-0.5).softmax(-1)[:, 0]  # (Hq, T)
    pooled = torch.nn.functional.pad(p, (0, -n % 8)).unflatten(-1, (-1, 8)).amax(-1)  # (Hq, N)
    torch.testing.assert_close(recorder.true_rows[-1][0], pooled.unflatten(0, (2, 2)).mean(1), atol=1e-5, rtol=1e-4)
    start, scores = recorder.used[0]
    image = recorder.seen[0][:, :, start : start + scores.shape[1]]
    torch.testing.assert_close(scores, random_predictor()(image), atol=1e-5, rtol=1e-4)
    chosen = recorder.chosen[-1][0]
    middle = chosen[:, start : start + config.topk_blocks].sort(1).values
    assert torch.equal(middle, (scores.topk(config.topk_blocks).indices + start).sort(1).values.int())


@pytest.mark.parametrize("n_prompt", [4, 30, 120])
@pytest.mark.parametrize("offload", [False, True])
def test_draws_prompts_of_any_length(n_prompt, offload, tmp_path):
    *_, recorder = watched(n_prompt=n_prompt, offload=offload)
    path = tmp_path / "run.png"
    plots.draw_run(recorder, path)
    assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size < 200_000
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_drawing_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "run.png"
    path.write_bytes(b"before")
    *_, recorder = watched()
    monkeypatch.setattr(plots.os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        plots.draw_run(recorder, path)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_plot_option(tmp_path, capsys):
    """The command draws, and answers as without --plot."""
    command = ["--prompt", "Name three colours.", "--max-new-tokens", "8", "--budget", "128"]
    assert attnpred.main(command) == 0
    answer = capsys.readouterr().out
    assert attnpred.main([*command, "--plot", str(tmp_path / "run.png")]) == 0
    assert capsys.readouterr().out == answer and (tmp_path / "run.png").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--plot", "nowhere/run.png"], "in a folder that exists"),
        (["--plot", "run.jpg"], "FILE.png"),
        (["--plot", "run.png", "--dense"], "leave out --dense"),
        (["--plot", "run.png", "--max-new-tokens", "1"], "2 tokens or more"),
    ],
)
def test_bad_plot_options_are_refused_at_once(options, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(attnpred, "load_model", None)  # nothing is loaded for it
    assert attnpred.main(["--prompt", "hello", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_without_matplotlib(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "plots")
    assert attnpred.main(["--prompt", "hello", "--plot", str(tmp_path / "run.png")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_no_second_token(capsys, monkeypatch, tmp_path):
    model, config = tiny_llama(), Config(**SMALL)
    decoder = SparseDecoder(config, model, random_predictor(), 60, "torch")
    recorder = plots.Recorder(decoder)
    prefill(model, decoder, torch.arange(50))
    with pytest.raises(attnpred.InputError, match="nothing to plot"):
        attnpred.draw_run(plots, recorder, str(tmp_path / "run.png"))
    decode_one_token(model, decoder, torch.tensor([1]))
    attnpred.draw_run(plots, recorder, str(tmp_path / "run.png"))
    assert json.dumps(recorder.bytes)
