"""Recording does not change a run, pictures show what was measured, and every kind of file can be drawn."""

import io
import json
import re

import pytest
import torch
import torch.nn.functional as F

import attnpred
from attnpred import Config, InputError, SparseDecoder, generate
from experiments import plots
from model import causal_attention
from tests.helpers import LetterTokenizer, assert_refused, random_predictor, tiny_llama

SHAPE = dict(
    block_size=8, history_len=8, sink_tokens=8, local_tokens=16, budget=56, echo_blocks=2, calibration_interval=3
)


@pytest.fixture
def figures(monkeypatch):
    """All figures, which are neither rendered nor saved."""
    saved = []
    monkeypatch.setattr(plots, "save", lambda figure, *args, **options: saved.append(figure))
    return saved


def test_patterns_are_told_apart():
    """There is one head of each pattern among heads of noise."""
    torch.manual_seed(0)
    rows = torch.rand(64, 7, 40) * 0.3  # (R, heads, n)
    time, block = torch.arange(64)[:, None], torch.arange(40)
    rows[:, 1] += torch.rand(40)  # the same blocks again and again
    rows[:, 2] += ((block + time // 16) % 10 == 0).float()  # one block back every 16 steps, which is no pattern
    rows[:, 3] += ((block - time // 16) % 10 == 0).float()  # one block forward every 16 steps
    rows[:, 5] += ((time % 7 == 0) & (block % 5 == 0)).float()  # every 7 steps
    assert plots.find_patterns(rows, 16) == {"re-access": 1, "sequential": 3, "seasonal": 5}
    for few in (torch.zeros(20, 7, 40), rows[:12], rows[:1, :, :1]):  # even without a pattern, no head occurs twice
        assert len(set(plots.find_patterns(few, 16).values())) == 3


def recorded(n_prompt=120, n_new=10, **changes):
    """A run with a Recorder: (model, prompt, answer, recorder)."""
    model, config = tiny_llama(), Config(**SHAPE | changes)
    recorder = plots.Recorder(config, model, random_predictor(), n_prompt + n_new, "torch")
    tokens = torch.randint(0, 61, (n_prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    return model, tokens, list(generate(recorder, tokens, n_new)), recorder


def test_watching_changes_nothing():
    model, tokens, out, recorder = recorded()
    alone = SparseDecoder(recorder.config, model, random_predictor(), len(tokens) + 10, "torch")
    assert list(generate(alone, tokens, 10)) == out
    assert torch.equal(alone.history.rows, recorder.history.rows)
    assert len(recorder.recovery) == len(recorder.chosen) == 9 and len(recorder.bytes) == 10
    s = alone.stats
    read = s.attention_bytes, s.echo_bytes, s.calibration_bytes, s.choosing_bytes
    assert recorder.bytes[-1] == (*read, s.dense_bytes) and s.echo_bytes > 0
    found = [torch.stack(layers) for layers in recorder.recovery[2::3]]  # (L, Hq) each
    torch.testing.assert_close(found, alone.stats.recovery, atol=1e-5, rtol=1e-4)
    start, end = recorder.config.middle(120)
    middle = [blocks[..., start:end] == 1 for blocks in recorder.chosen]  # (L, Hk, n) per step
    changed = {i for i in range(1, 9) if not torch.equal(middle[i], middle[i - 1])}
    assert changed and changed <= {3, 6}  # steps 4 and 7, after the selections of steps 3 and 6
    assert sum(int((blocks == 2).sum()) for blocks in recorder.chosen) == int(alone.cache.echoes.sum())
    assert [id(row) for row in recorder.prediction[-1]] == [id(recorder.true_rows[i]) for i in (6, 7, 8)]


def test_what_is_drawn_is_what_happened():
    """The first layer's true row, from a plain pass; the prediction, from the image; the blocks, from the scores."""
    model, tokens, out, recorder = recorded(n_new=2)  # one decode step, which the prompt's selection serves
    n, seen = recorder.n_tokens, {}

    def attend(layer, q, k, v):
        seen[layer] = q, k
        return causal_attention(layer, q, k, v)

    model.hidden(torch.tensor(tokens + out[: n - len(tokens)]), torch.arange(n), attend)
    q, k = seen[0]  # the first layer's input does not depend on attention
    p = (q[:, -1:] @ k.repeat_interleave(2, 0).mT * q.shape[-1] ** -0.5).softmax(-1)[:, 0]  # (Hq, T)
    pooled = F.pad(p, (0, -n % 8)).unflatten(-1, (-1, 8)).amax(-1)  # (Hq, N)
    pooled = pooled.unflatten(0, (2, 2)).square().mean(1).sqrt()  # (Hk, N)
    torch.testing.assert_close(recorder.true_rows[-1][0], pooled, atol=1e-5, rtol=1e-4)
    history, start, scores, served = recorder.prediction
    assert served[0] is recorder.true_rows[-1] and len(served) == 1
    image = history[0, :, :, start : start + scores.shape[-1]]  # (Hk, H, n)
    torch.testing.assert_close(scores[0], random_predictor()(image), atol=1e-3, rtol=1e-3)
    best = scores.flatten().topk(3 * 2 * recorder.config.topk_blocks).indices  # of all layers and heads
    best = torch.zeros(scores.numel()).index_fill(0, best, 1).bool().view(scores.shape)
    assert torch.equal(recorder.chosen[-1][..., start : start + scores.shape[-1]] == 1, best)


@pytest.mark.parametrize("n_prompt", [60, 120])
def test_a_run_is_drawn(n_prompt, tmp_path, figures):
    *_, recorder = recorded(n_prompt)
    plots.draw_run(recorder, tmp_path / "run.png")
    recovery, megabytes = figures[0].axes[-2:]
    means = [torch.stack(layers).mean().item() for layers in recorder.recovery]
    assert recovery.lines[0].get_ydata() == pytest.approx(means)
    dense = [2 * 3 * 2 * 16 * 4 * n / 1e6 for n in range(n_prompt + 1, n_prompt + 10)]  # K and V, L, Hk, D, float32
    assert megabytes.lines[0].get_ydata() == pytest.approx(dense)
    history, predicted, actual, blocks = (axes.images[0] for axes in figures[0].axes[:4])
    layer, head = map(int, re.match(r".*: layer (\d), KV head (\d)", figures[0].axes[0].get_title()).groups())
    seen, start, scores, served = recorder.prediction
    scores = scores[layer, head]
    middle = slice(start, start + len(scores))
    true_row = sum(row[layer, head, middle].square() for row in served).div(len(served)).sqrt()
    assert torch.equal(torch.tensor(history.get_array().data), seen[layer, head])
    for strip, row in ((predicted, scores - scores.min()), (actual, true_row)):
        torch.testing.assert_close(torch.tensor(strip.get_array().data[0]), row / row.max())
        assert strip.get_extent()[:2] == [start - 0.5, middle.stop - 0.5]
    n = recorder.config.n_blocks(recorder.n_tokens)
    drawn = torch.stack([blocks[layer, head, :n] for blocks in recorder.chosen])
    assert torch.equal(torch.tensor(blocks.get_array().data), drawn) and len(drawn) == 9


def test_without_a_prediction_there_is_nothing_to_draw(tmp_path):
    recorder = recorded(30)[-1]
    with pytest.raises(InputError, match="nothing was predicted: the text fits the budget"):
        plots.draw_run(recorder, tmp_path / "run.png")
    with pytest.raises(InputError, match="no echo adds a block"):
        plots.draw_echo(recorder, LetterTokenizer(), tmp_path / "echo.png")


def test_an_echo_is_drawn(tmp_path, figures):
    """The bars count heads; each line has the match of a block, and what follows it there."""
    _, tokens, out, recorder = recorded()
    plots.draw_echo(recorder, LetterTokenizer(), tmp_path / "echo.png")
    figures[0].savefig(io.BytesIO())  # any text can be rendered
    top, bottom = figures[0].axes
    letters = LetterTokenizer().decode(tokens + out)
    (_, context, following), *lines = zip(*3 * [iter(text.get_text() for text in bottom.texts)])
    n = letters.index(context[1:]) + 10
    assert following == f"→ {letters[n]}" and len(lines) >= 1
    blocks = recorder.chosen[n - 121][..., : recorder.config.n_blocks(n)]  # the prompt has 120 tokens
    heights = [bar.get_height() for bar in top.patches]
    assert heights == [*(blocks == 1).sum((0, 1)).tolist(), *(blocks == 2).sum((0, 1)).tolist()]
    for label, match, following in lines:
        p = letters.index(match + following[2:-1]) + len(match)
        assert label == f"block {p // 8}" and letters[n - len(match) : n] == match != ""
        assert p + len(following) - 3 == p // 8 * 8 + 8


RESULT = dict(model="tiny", dtype="float32", predictor="")  # as of a rival
RESULT |= dict(setting="ours", budget=512, n_prompt=4096, n_new=4, bytes_share="", text="a", sha256="a")
TEXTS = [
    RESULT
    | dict(
        task="texts",
        text=text,
        sha256=text,
        setting=setting,
        budget=budget,
        kl=[kl / budget] * 4,
        read_bytes=budget * 1e4,
    )
    for setting in ("ours", "paper", "quest", "quest+echo")
    for text, kl in (("a", 1.0), ("b", 3.0))
    for budget in (512, 256)
]
NAMES = ("dense", "sparse", "sparse, offloaded")
SPEED = [
    dict(context=n, dtype=dtype, name=name, ms=10.0, tokens_s=100.0, of_copy=0.5, memory_mb=n / 10)
    | dict(device="CPU", threads=2, weights="tiny")
    | (dict(stages=dict(attention=4.0, selection=0.0, rest=6.0)) if name == "sparse" else {})
    for n in (128, 4096)
    for dtype in ("float32", "bfloat16")
    for name in NAMES
]
FILES = {
    "pareto": TEXTS,
    "training": [dict(step=step, loss=4 - step, recovery=0.9 + step / 100) for step in range(3)],
    "speed": SPEED,
    "kernels": [dict(path="predict", context=n, of_copy=0.4, of_matmul=0.1, device="a GPU") for n in (8192, 32768)],
}


@pytest.mark.parametrize("picture", FILES)
def test_pictures_of_files(picture, tmp_path):
    """From two files, of an object per line if `evaluate` wrote them, else of a list."""
    files, path = [tmp_path / "first.json", tmp_path / "others.json"], tmp_path / f"{picture}.png"
    for file, rows in zip(files, (FILES[picture][:1], FILES[picture][1:])):
        file.write_text("\n".join(map(json.dumps, rows)) if picture == "pareto" else json.dumps(rows, indent=1))
    assert set(FILES) == set(plots.FROM_FILES)
    assert plots.main([picture, *map(str, files), "--out", str(path)]) == 0
    assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size < 200_000


def test_what_is_drawn_of_speed_is_what_was_measured(tmp_path, figures):
    rows = [row | dict(tokens_s=n + 1.0) for n, row in enumerate(SPEED)]
    plots.draw_speed(rows, tmp_path / "x.png")
    kept = "name", "context", "dtype", "tokens_s", "of_copy", "device", "threads", "weights"
    plots.draw_speed([{key: row[key] for key in kept} for row in rows if row["dtype"] == "float32"], tmp_path / "x.png")
    first, second, memory, stages = figures[0].axes
    for axes, dtype in ((first, "float32"), (second, "bfloat16")):
        drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
        for name in NAMES:
            assert drawn[name] == [r["tokens_s"] for r in rows if (r["dtype"], r["name"]) == (dtype, name)]
        assert drawn["sparse: bandwidth's limit"] == [2 * n for n in drawn["sparse"]]
    assert {tuple(line.get_ydata()) for line in memory.lines} == {(12.8, 409.6)}
    assert [bar.get_height() for bar in stages.patches] == [4, 4, 6, 6] and len(figures[1].axes) == 1


def test_a_validation_loss_of_zero_is_drawn(tmp_path, figures):
    plots.draw_training(
        [{"step": 0, "loss": 1.0, "left out": 0.0}, {"step": 1, "loss": 0.5, "left out": 0.0}], tmp_path
    )
    assert list(figures[0].axes[1].lines[0].get_ydata()) == [0, 0]


def test_pareto_points_are_means_over_texts(tmp_path, figures):
    others = [TEXTS[0] | change for change in (dict(setting="full"), dict(setting="ours M=5"), dict(task="needles"))]
    shares = [row | dict(bytes_share=f"1/{4096 // row['budget']}", n_prompt=8192) for row in TEXTS]
    plots.draw_pareto([*TEXTS, *others, *shares], tmp_path / "x.png")
    for axes in figures[0].axes:
        ours, paper, quest, with_echoes = axes.lines
        names = [line.get_label() for line in axes.lines]
        assert names == ["ours", "paper", "quest", "quest+echo"] and ours.get_color() != paper.get_color()
        assert quest.get_color() == with_echoes.get_color() and quest.get_linestyle() != with_echoes.get_linestyle()
        for line in axes.lines:
            assert list(line.get_xdata()) == [2.56, 5.12] and line.get_ydata() == pytest.approx((2 / 256, 2 / 512))
    assert [axes.get_title() for axes in figures[0].axes] == ["4,096 tokens", "8,192 tokens"]


@pytest.mark.parametrize("name", ["model", "dtype", "predictor"])
def test_pareto_is_of_one_model_dtype_and_predictor(name, tmp_path):
    rows = [TEXTS[0] | {name: "one"}, TEXTS[1] | {name: "other"}, *TEXTS[2:]]
    with pytest.raises(InputError, match=f"more than one {name} .*one, other"):
        plots.draw_pareto(rows, tmp_path / "x.png")
    rows[1] |= {"predictor": ""}
    plots.draw_pareto([row | {"model": "m", "dtype": "d"} for row in rows], tmp_path / "x.png")  # a rival beside ours


def test_a_run_from_the_command_line(tmp_path, capsys):
    """It prints the answer of attnpred.py, and draws."""
    command = ["--prompt", "Name three colours.", "--max-new-tokens", "8", "--budget", "24"]
    command += ["--block-size", "8", "--sink-tokens", "8", "--local-tokens", "8", "--echo-blocks", "1"]
    assert attnpred.main(command) == 0
    answer = capsys.readouterr().out
    assert plots.main(["run", *command, "--out", str(tmp_path / "run.png")]) == 0
    assert capsys.readouterr().out == answer and (tmp_path / "run.png").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["run", "--prompt", "x", "--out", "nowhere/run.png"], "in a folder that exists"),
        (["run", "--prompt", "x", "--out", "run.jpg"], "ending in .png"),
        (["run", "--prompt", "x", "--out", "run.png", "--dense"], "leave out --dense"),
        (["speed", "none.json", "--out", "x.png"], "cannot be read"),
        (["pareto", "none.json", "--out", "x.png"], "cannot read none.json"),
        (["pareto", "some.json", "--out", "x.png"], "some.json holds no results"),
        (["speed", "some.json", "--out", "x.png"], "do not hold the numbers of speed"),
        (["speed", "some.json", "--out", "x.png", "--budget", "512"], "unknown option"),
    ],
)
def test_bad_input_is_one_line(options, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.json").write_text('[{"a": 1}]')
    monkeypatch.setattr(attnpred, "load_model", None)  # nothing is loaded for it
    assert_refused(plots.main, "plots", options, message, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["some.json"]
