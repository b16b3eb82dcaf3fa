"""The page of a run shows the run's numbers, in a real browser, and can be played with by mouse and keyboard."""

import json
import pathlib
import re
import shutil

import pytest
import torch

import attnpred
from attnpred import Config, InputError, SparseDecoder, generate
from experiments import page
from model import Tokenizer
from tests.helpers import assert_refused, random_predictor, tiny_llama
from weights.fetch_llm import fetch_default_llm

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SHAPE = dict(
    block_size=8, history_len=8, sink_tokens=8, local_tokens=16, budget=56, echo_blocks=2, calibration_interval=3
)
N_PROMPT = 120


def recorded(n_prompt=N_PROMPT, n_new=30):
    """A run of 3 layers and 2 KV heads: (recorder, the text of its tokens)."""
    config = Config(**SHAPE)
    recorder = page.PageRecorder(config, tiny_llama(), random_predictor(), n_prompt + n_new, "torch")
    tokens = torch.randint(0, 61, (n_prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    list(generate(recorder, tokens, n_new))
    pieces = [f"{i}:{token} " for i, token in enumerate(recorder.ids[: recorder.n_tokens].tolist())]
    pieces[40:42] = "</script><script>alert(1)</script>", "<b>&amp;\n{{DATA}}"
    return recorder, pieces


@pytest.fixture(scope="module")
def run():
    return recorded()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    if not CHROMIUM:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def show(browser, tmp_path):
    """show(html, width, scheme): the open page. In the end, nothing was written to the console or fetched."""
    problems, url = [], f"file://{tmp_path}/run.html"

    def show(html, width=1280, scheme="light"):
        (tmp_path / "run.html").write_text(html)
        tab = browser.new_page(viewport=dict(width=width, height=900), color_scheme=scheme)
        tab.on("console", lambda message: problems.append(message.text))
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
        tab.on("request", lambda request: problems.append(request.url))
        tab.goto(url)
        tab.wait_for_function("spans[state.block]?.classList.contains('here')")
        return tab

    yield show
    assert not [problem for problem in problems if problem not in (url, "data:,")]  # the page and its empty icon


def choose(tab, layer, head, step):
    """Choose by the page's own controls; step 0 is the first."""
    tab.select_option("#layer", str(layer))
    tab.select_option("#head", str(head))
    tab.locator("#slider").fill(str(step + 1))
    tab.wait_for_function(f"state.layer === {layer} && state.head === {head} && state.step === {step}")


def point_at(tab, block, n_blocks, canvas="#history"):
    """Move the mouse over a block's column."""
    box = tab.locator(canvas).bounding_box()
    tab.locator(canvas).hover(position=dict(x=(block + 0.5) * box["width"] / n_blocks, y=box["height"] / 2))
    assert tab.text_content("#block-title").startswith(f"Block {block}:")


def shown_number(tab, selector):
    return float(tab.text_content(selector).split(" ")[0].replace(",", ""))


def history(recorder):
    """All rows of all predictions: (L, Hk, rows, N)."""
    return torch.cat([torch.nn.functional.pad(rows, (0, 19 - rows.shape[-1])) for rows in recorder.history_rows], 2)


def test_recording_changes_nothing(run):
    recorder, _ = run
    alone = SparseDecoder(recorder.config, tiny_llama(), random_predictor(), N_PROMPT + 30, "torch")
    tokens = recorder.ids[:N_PROMPT].tolist()
    assert list(generate(alone, tokens, 30))[:29] == recorder.ids[N_PROMPT:149].tolist()
    assert torch.equal(alone.history.rows, recorder.history.rows)
    newest = alone.history.rows.view(3, 2, 8, 19)  # the last steps made no row
    assert torch.equal(history(recorder)[:, :, -8:], newest.float())


def test_shares_are_those_of_a_plain_pass(run):
    recorder, _ = run
    n, seen = recorder.n_tokens, {}

    def attend(layer, q, k, v):
        seen[layer] = q, k
        return v.repeat_interleave(2, 0)

    recorder.model.hidden(recorder.ids[:n], torch.arange(n), attend)
    q, k = seen[0]  # the first layer's input does not depend on attention
    for step in (0, 11, 28):
        n = N_PROMPT + step + 1
        p = (q[:, n - 1 : n] @ k[:, :n].repeat_interleave(2, 0).mT * q.shape[-1] ** -0.5).softmax(-1)[:, 0]  # (Hq, n)
        for block in range(recorder.config.n_blocks(n)):
            mass = p[:, block * 8 : block * 8 + 8].sum(1).view(2, 2).mean(1)  # (Hk,)
            torch.testing.assert_close(recorder.shares[step][0, :, block], mass, atol=1e-5, rtol=1e-4)


def test_reasons(run):
    recorder, _ = run
    reasons = torch.from_numpy(page.reasons(recorder))  # (L, Hk, steps, N)
    assert reasons.shape == (3, 2, 29, 19)
    for step, chosen in enumerate(recorder.chosen):
        start, end = recorder.config.middle(N_PROMPT + step // 3 * 3 + 1)  # at the selection in use
        now, here = recorder.config.n_blocks(N_PROMPT + step + 1), reasons[:, :, step]
        assert (here[..., :start] == page.SINK).all() and (here[..., end:now] == page.LOCAL).all()
        middle, chosen = here[..., start:end], chosen[..., start:end]
        assert torch.equal(middle == page.SELECTED, chosen == 1) and torch.equal(middle == page.ECHO, chosen == 2)
        assert int((middle == page.SELECTED).sum()) == 3 * 2 * recorder.config.topk_blocks
    assert (reasons == page.ECHO).any()


@pytest.mark.parametrize("layer, head, step", [(0, 0, 0), (1, 1, 13), (2, 0, 28)])
def test_the_numbers_shown_are_those_of_the_run(layer, head, step, run, show):
    recorder, pieces = run
    tab = show(page.make_page(recorder, pieces, "tiny"))
    choose(tab, layer, head, step)
    n = N_PROMPT + step + 1
    now, reasons = recorder.config.n_blocks(n), page.reasons(recorder)[layer, head, step]
    share = 100 * recorder.shares[step][layer, head]  # percent
    assert tab.text_content("#at") == f"step {step + 1} of 29"
    assert f"“{pieces[n - 1].strip()}”" in tab.text_content("#sentence")
    assert shown_number(tab, "#n-read") == (reasons > 0).sum()
    recovery = 100 * recorder.recovery[step][layer].view(2, 2)[head].mean().item()
    assert shown_number(tab, "#recovery") == pytest.approx(recovery, abs=0.0501)
    for reason in range(5):
        cells = tab.locator(f"#legend-{reason} td").all_text_contents()
        assert int(cells[2]) == (reasons[:now] == reason).sum()
        assert float(cells[3][:-2]) == pytest.approx(share[:19][reasons == reason].sum().item(), abs=0.0501)
    start, end, scores, lowest = recorder.predictions[step // 3]
    scores, names = scores[layer, head], ("not read", "sink", "local", "selected", "echo")
    for block in range(now):
        point_at(tab, block, 19)
        assert tab.text_content("#reason b") == names[reasons[block]]
        assert shown_number(tab, "#share") == pytest.approx(share[block].item(), abs=0.0501)
        assert tab.text_content("#quote") == "".join(pieces[8 * block : min(n, 8 * block + 8)]).strip()
        if start <= block < end:
            assert shown_number(tab, "#score") == pytest.approx(scores[block - start].item(), abs=0.0000501)
            assert shown_number(tab, "#lowest") == pytest.approx(lowest, abs=0.0000501)
            rank = (scores.round(decimals=4) > scores[block - start].round(decimals=4)).sum() + 1
            assert tab.text_content("#rank") == f"{rank} of {end - start}"
        else:
            assert tab.text_content("#score") == "none: always read" and not tab.locator("#rank").count()
    *parts, dense = recorder.bytes[step + 1]
    megabytes = [float(cell.split()[0]) for cell in tab.locator("#bytes-table td.n").all_text_contents()]
    assert megabytes == pytest.approx([x / 1e6 for x in (dense, *parts)], abs=0.0501)
    assert f"{dense / sum(parts):.1f}x as much" in tab.text_content("#saved")


def pixels(tab, canvas, columns, rows):
    """The colours (rows, columns, 3) at the centres of a canvas's cells."""
    code = """([id, columns, rows]) => {
        const canvas = document.querySelector(id);
        const context = element("canvas", {width: canvas.width, height: canvas.height}).getContext("2d", READ);
        context.drawImage(canvas, 0, 0);
        const at = (x, y) => Array.from(context.getImageData((x + 0.5) * canvas.width / columns,
                                                             (y + 0.5) * canvas.height / rows, 1, 1).data);
        return Array.from({length: rows}, (_, y) => Array.from({length: columns}, (_, x) => at(x, y)));
    }""".replace("READ", "{willReadFrequently: true}")
    return torch.tensor(tab.evaluate(code, [canvas, columns, rows]))


def hex_color(tab, name):
    value = tab.evaluate(f"color('{name}')")
    return [int(value[i : i + 2], 16) for i in (1, 3, 5)]


def test_the_pictures_are_those_of_the_run(run, show):
    """History, scores and attention of a head, cell by cell and bar by bar."""
    recorder, pieces = run
    tab = show(page.make_page(recorder, pieces, "tiny"))
    layer, head = 0, 1
    peaks = [share[layer, head].max() for share in recorder.shares]
    step = peaks.index(max(peaks))
    now = recorder.config.n_blocks(N_PROMPT + step + 1)
    choose(tab, layer, head, step)
    image = history(recorder)[layer, head, step // 3 : step // 3 + 8]  # (H, N)
    light = pixels(tab, "#history", 19, 8)[..., :3].sum(-1)  # (H, N)
    assert (light.flatten()[image.flatten().argsort()].diff() <= 0).all() and light.unique().numel() > 5
    assert light[image == 0].eq(3 * 255).all()

    reasons = torch.from_numpy(page.reasons(recorder)[layer, head]).long()  # (steps, N)
    names = ("--bar", "--sink", "--local", "--selected", "--echo")
    colours = torch.tensor([hex_color(tab, name) for name in names])
    strip = pixels(tab, "#attention", 19, 40)[-1, :, :3]
    assert torch.equal(strip[:now], colours[reasons[step]][:now])
    share = recorder.shares[step][layer, head, :now]
    bars = (pixels(tab, "#attention", 19, 84)[:78, :now, 3] > 0).sum(0)  # of 78 pixels
    torch.testing.assert_close(bars.float(), 78 * (share / max(peaks)).sqrt(), atol=1.5, rtol=0)
    start, end, scores, _ = recorder.predictions[step // 3]
    bars = (pixels(tab, "#scores", 19, 64)[:58, start:end, 3] > 0).sum(0)
    above = (1e4 * scores[layer, head]).round()
    above -= above.min()
    expected = 58 * (above / above.max()).sqrt()
    torch.testing.assert_close(bars.float(), expected, atol=3, rtol=0)  # the dashed line adds to some
    lines = pixels(tab, "#steps", 19, 29)[..., :3]
    colours[0] = torch.tensor(hex_color(tab, "--page"))
    others = torch.arange(29) != step  # its line has a frame
    assert torch.equal(lines[others], colours[reasons][others])


def highlighted(tab):
    """The numbers of the blocks that are shown as read."""
    return [int(span) for span in tab.eval_on_selector_all("#text .read", "all => all.map(x => x.dataset.block)")]


def test_slider_keyboard_and_play(run, show):
    recorder, pieces = run
    tab = show(page.make_page(recorder, pieces, "tiny"))
    reasons = page.reasons(recorder)
    choose(tab, 2, 1, 0)
    for press, step in (("ArrowRight", 1), ("End", 28), ("ArrowLeft", 27), ("Home", 0), ("ArrowLeft", 0)):
        tab.keyboard.press(press)
        tab.wait_for_function(f"state.step === {step}")
        assert highlighted(tab) == reasons[2, 1, step].nonzero()[0].tolist()
        assert tab.locator("#text .new:visible").all_text_contents() == pieces[N_PROMPT : N_PROMPT + step + 1]
        assert tab.text_content("#text .query") == pieces[N_PROMPT + step]
        assert tab.input_value("#slider") == str(step + 1)
    for press, layer, head in (("h", 2, 0), ("ArrowUp", 1, 0), ("ArrowDown", 2, 0), ("ArrowDown", 2, 0), ("h", 2, 1)):
        tab.keyboard.press(press)
        tab.wait_for_function(f"state.layer === {layer} && state.head === {head}")
        assert (tab.input_value("#layer"), tab.input_value("#head")) == (str(layer), str(head))
        assert highlighted(tab) == reasons[layer, head, 0].nonzero()[0].tolist()
    block = tab.evaluate("state.block")
    tab.keyboard.press("j")
    assert tab.text_content("#block-title").startswith(f"Block {block + 1}:")
    tab.keyboard.press("k")
    assert tab.text_content("#block-title").startswith(f"Block {block}:")

    tab.clock.install()
    tab.click("#play")
    assert "Pause" in tab.text_content("#play")
    tab.clock.run_for(1600)
    assert tab.evaluate("state.step") == 3
    tab.keyboard.press("Home")  # the focus is on the button, which has the space bar for itself
    tab.keyboard.press(" ")
    tab.clock.run_for(1600)
    assert tab.evaluate("state.step") == 0 and "Play" in tab.text_content("#play")
    tab.locator("#slider").fill("28")
    tab.evaluate("document.activeElement.blur()")
    tab.keyboard.press(" ")
    tab.clock.run_for(1600)  # it stops at the end
    assert tab.evaluate("state.step") == 28 and "Play" in tab.text_content("#play")


@pytest.mark.parametrize("width", [1280, 400])
def test_pointing_at_a_block_jumps_to_its_text(width, run, show):
    recorder, pieces = run
    tab = show(page.make_page(recorder, pieces, "tiny"), width)
    tab.add_style_tag(content="#right { height: auto !important } #text { height: 90px; flex: none !important }")
    for canvas, block in (("#history", 1), ("#scores", 14), ("#attention", 9), ("#steps", 3)):
        point_at(tab, block, 19, canvas)
        assert tab.get_attribute("#text .here", "data-block") == str(block)
        pane, span = (tab.locator(selector).bounding_box() for selector in ("#text", "#text .here"))
        assert pane["y"] - 30 < span["y"] and span["y"] + span["height"] < pane["y"] + pane["height"] + 30
    tab.locator("#text .block").nth(5).scroll_into_view_if_needed()
    tab.locator("#text .block").nth(5).hover()
    assert tab.text_content("#block-title").startswith("Block 5:")
    cursor, canvas = (tab.locator(selector).bounding_box() for selector in ("#cursor", "#scores"))
    middle = cursor["x"] + cursor["width"] / 2 - canvas["x"]
    assert middle == pytest.approx(5.5 * canvas["width"] / 19, abs=1.5)


def test_clicks_choose_a_step_and_a_head(run, show):
    tab = show(page.make_page(*run, "tiny"))
    box = tab.locator("#steps").bounding_box()
    tab.locator("#steps").click(position=dict(x=100, y=20.5 * box["height"] / 29))
    tab.wait_for_function("state.step === 20")
    box = tab.locator("#heads").bounding_box()
    tab.locator("#heads").click(position=dict(x=2.5 * box["width"] / 3, y=8))
    tab.wait_for_function("state.layer === 2 && state.head === 0")
    button = tab.locator("#patterns button").nth(1)
    button.click()
    layer, head = button.get_attribute("value").split(".")
    tab.wait_for_function(f"state.layer === {layer} && state.head === {head}")
    assert button.get_attribute("aria-pressed") == "true"


def test_an_echo_is_explained(run, show):
    recorder, pieces = run
    step, block = next(
        (i, b) for i, x in enumerate(page.reasons(recorder)[0, 0]) for b in (x == page.ECHO).nonzero()[0]
    )
    tab = show(page.make_page(recorder, pieces, "tiny"))
    choose(tab, 0, 0, step)
    point_at(tab, int(block), 19)
    words = re.search(r"follows “(.*)”, with which the text ends now \((\d) token", tab.text_content("#reason"))
    ids, n, run = recorder.ids.tolist(), N_PROMPT + step + 1, int(words[2])
    ends = [i for i in range(8 * block, 8 * block + 8) if ids[i - run : i] == ids[n - run : n]]
    assert any(words[1] == "".join(pieces[i - run : i]).strip() for i in ends)


@pytest.mark.parametrize("width", [1280, 400])
def test_both_widths_and_schemes(width, run, show):
    html, backgrounds = page.make_page(*run, "tiny"), []
    for scheme in ("light", "dark"):
        tab = show(html, width, scheme)
        assert tab.evaluate("document.scrollingElement.scrollWidth") == width
        colour = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        backgrounds.append(sum(map(int, re.findall(r"\d+", colour))))
        zero = pixels(tab, "#history", 19, 8)[0, -1, :3].sum()  # the future of an old row
        assert (zero > 700) == (scheme == "light")
    assert backgrounds[0] > 700 > 100 > backgrounds[1]


def test_a_text_that_fits_at_first(show):
    """Until the first prediction, all blocks are read."""
    recorder, pieces = recorded(50, 40)
    first = recorder.serving.index(0)
    assert first > 3
    tab = show(page.make_page(recorder, pieces, "tiny"))
    choose(tab, 0, 1, first - 1)
    point_at(tab, 2, recorder.config.n_blocks(recorder.n_tokens))
    assert "everything fits the budget so far" in tab.text_content("#reason")
    assert tab.text_content("#score") == "none yet" and shown_number(tab, "#recovery") == 100
    choose(tab, 0, 1, first)
    assert shown_number(tab, "#lowest") == pytest.approx(recorder.predictions[0][3], abs=1e-4)


def test_a_page_that_would_be_too_large_shows_fewer_layers(run, show, monkeypatch):
    html = page.make_page(*run, "tiny")
    layers = json.loads(re.search(r'id="data">(.*)</script>', html)[1])["layers"]
    assert sorted(layers) == ["0", "1", "2"]
    monkeypatch.setattr(page, "PAGE_BYTES", len(html.encode()) - 100)
    smaller = page.make_page(*run, "tiny")
    assert len(smaller.encode()) <= page.PAGE_BYTES
    tab = show(smaller)
    assert tab.locator("#layer option").count() == 2 and "room for 2 of 3 layers" in tab.text_content("#heads-caption")
    monkeypatch.setattr(page, "PAGE_BYTES", len(html.encode()) - sum(map(len, layers.values())))
    with pytest.raises(InputError, match="cannot hold the run"):
        page.make_page(*run, "tiny")


def test_the_sample_is_a_page_of_today():
    """Its data were written by the command that experiments/README.md shows; the rest is page.html."""
    template, images = pathlib.Path(page.__file__).with_suffix(".html"), pathlib.Path(page.__file__).parent / "images"
    before, after = template.read_text().split("{{DATA}}")
    sample = (images / "run.html").read_text()
    assert sample.startswith(before) and sample.endswith(after) and len(sample.encode()) < 1_500_000
    made, _ = recorded(n_new=5)
    for html in (sample, page.make_page(made, ["x"] * made.n_tokens, "tiny")):
        data = json.loads(html[len(before) : len(html) - len(after)])
        assert list(data) == list(json.loads(sample[len(before) : len(sample) - len(after)]))


def test_without_a_prediction_there_is_no_page():
    with pytest.raises(InputError, match="nothing was predicted: the text fits the budget"):
        page.make_page(*recorded(20, 5), "tiny")


def test_from_the_command_line(tmp_path, capsys, monkeypatch):
    """The page has the prompt and the answer that was printed, without the control tokens of the chat template."""
    loaded = tiny_llama(vocab_size=49152), Tokenizer(fetch_default_llm())
    for module in (attnpred, page):
        monkeypatch.setattr(module, "load_model", lambda *_: loaded)
    command = ["--prompt", "Name three colours of the rainbow 🌈.", "--max-new-tokens", "8", "--budget", "24"]
    command += ["--block-size", "8", "--sink-tokens", "8", "--local-tokens", "8", "--echo-blocks", "1"]
    assert page.main([*command, "--out", str(tmp_path / "run.html")]) == 0
    data = json.loads(re.search(r'id="data">(.*)</script>', (tmp_path / "run.html").read_text())[1])
    text, answer = "".join(data["pieces"]), capsys.readouterr().out
    assert "Name three colours of the rainbow 🌈." in text and "<|im_start|>" not in text
    assert answer.startswith("".join(data["pieces"][data["nPrompt"] :])) and len(data["serving"]) == 7 == len(
        data["bytes"]
    )
    assert data["model"] == "SmolLM2-135M-Instruct"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--prompt", "x", "--out", "nowhere/run.html"], "in a folder that exists"),
        (["--prompt", "x", "--out", "run.png"], "ending in .html"),
        (["--prompt", "x", "--out", "run.html", "--dense"], "leave out --dense"),
        (["--prompt", "x", "--out", "run.html", "--max-new-tokens", "1"], "decode 2 tokens or more"),
        (["--prompt", "x", "--out", "run.html", "--budgets", "512"], "unrecognized arguments"),
        (["--prompt", "x"], "--out"),
    ],
)
def test_bad_input_is_one_line(options, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(attnpred, "load_model", None)  # nothing is loaded for it
    assert_refused(page.main, "page", options, message, capsys)
    assert not list(tmp_path.iterdir())
