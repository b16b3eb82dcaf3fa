"""The comparison: lockstep is each setting alone, bytes, divergence and intervals by hand, resuming, bad input."""

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpred import Config, InputError, SparseDecoder, decode_one_token, prefill
from experiments import evaluate, tables
from experiments.evaluate import Prompt, Setting, Store, decode_together, main, parse_grid
from model import causal_attention
from tests.helpers import random_predictor, tiny_llama

SHAPE = dict(block_size=8, history_len=8, sink_tokens=8, local_tokens=16, budget=64)
TOKENS = torch.randint(0, 61, (200,), generator=torch.Generator().manual_seed(3))
GRIDS = [  # every way to count bytes
    "ours M=1,3,auto P=1,2,M share=head,layer",
    "ours rows=true M=4 P=1,M dense=0,1 heads=q,kv",
    "full,paper,quest,snapkv,ada-snapkv,h2o,streaming-llm,oracle,random",
    "decayed-mean:0.5,last-row M=3 P=2 dense=1",
    "ours M=4 P=4,8 delay=1,3 swap=0.3",
    "ours,mean-std budget=24,176",  # nothing selected, and outgrown while decoding
]


def tiny_settings():
    for grid in GRIDS:
        for method, changes, _ in parse_grid(grid):
            yield Setting(method, replace(Setting.base(method), **SHAPE | changes))


def tiny_prompt(settings, n_prompt=150, model=None):
    return Prompt(model or tiny_llama(), random_predictor(), TOKENS[:190], n_prompt, 190, settings)


def test_lockstep_is_each_setting_alone():
    """Decoders that share a prompt have the logits of decoders of their own, and read what `counted_bytes` expects."""
    model, predictor, choices = tiny_llama(), random_predictor(), list(tiny_settings())
    prompt = tiny_prompt(choices, model=model)
    together = [prompt.decoder(setting) for setting in choices]
    alone = [
        SparseDecoder(s.config, model, predictor, 192) if s.method in ("ours", "paper", "full") else None
        for s in choices
    ]
    for decoder in filter(None, alone):
        prefill(model, decoder, TOKENS[:150])
    for token in TOKENS[150:180]:
        logits = decode_together(model, together, token.expand(len(together)))
        for found, decoder in zip(logits, alone):
            if decoder:
                torch.testing.assert_close(found, decode_one_token(model, decoder, token[None]), atol=2e-3, rtol=2e-3)
    for setting, decoder in zip(choices, together):
        stats = decoder.stats
        expected = evaluate.counted_bytes(setting, model.config, 4, 150, 30)
        counted = stats.attention_bytes, stats.calibration_bytes, stats.choosing_bytes
        assert [30 * x for x in expected] == pytest.approx(counted), setting
        assert stats.dense_bytes == pytest.approx(30 * evaluate.dense_bytes(model.config, 4, 150, 30))


def test_a_second_batch_is_unaffected_by_the_first():
    choices = [s for s in tiny_settings() if s.method in ("h2o", "quest", "ours")]
    prompt = tiny_prompt(choices)

    def decode():
        decoders = [prompt.decoder(setting) for setting in choices]
        return torch.stack([decode_together(prompt.model, decoders, t.expand(len(choices))) for t in TOKENS[150:180]])

    assert torch.equal(decode(), decode())


def test_rows_by_one_dense_pass():
    """KL, negative log-likelihood and greedy tokens against all logits of one plain pass."""
    model = tiny_llama()
    full, ours = Setting("full", Setting.base("full")), Setting("ours", Config(**SHAPE))
    prompt = tiny_prompt([full, ours], model=model)
    logits = model.logits(model.hidden(TOKENS[:190], torch.arange(190), causal_attention))[150:]  # (40, V)
    dense, sparse = evaluate.read_on(prompt, [full, ours], TOKENS[150:191], measure_every=2)
    log_p = logits.log_softmax(-1)
    assert dense["nll"] == pytest.approx((-log_p.gather(1, TOKENS[151:191, None])[:, 0]).tolist(), abs=1e-4)
    assert max(map(abs, dense["kl"])) < 1e-4 and min(dense["same"]) == 1
    assert np.mean(sparse["kl"]) > 1e-3 and len(sparse["recovery"]) == 20 and len(sparse["recovery_by_layer"]) == 3

    alone = prompt.decoder(ours)
    for i, token in enumerate(TOKENS[150:190]):
        q, p = decode_together(model, [alone], token[None])[0].softmax(-1).tolist(), log_p[i].exp().tolist()
        assert sparse["kl"][i] == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q)), abs=1e-4)
        assert sparse["nll"][i] == pytest.approx(-math.log(q[TOKENS[151 + i]]), abs=1e-4)
        assert sparse["same"][i] == (q.index(max(q)) == p.index(max(p)))
    total = alone.stats.attention_bytes + alone.stats.calibration_bytes + alone.stats.choosing_bytes
    assert sparse["read_bytes"] == total / 40 and sparse["dense_bytes"] == dense["read_bytes"]


@pytest.mark.parametrize(
    "method, share", [("ours", 0.5), ("ours", 0.2), ("paper", 0.9), ("quest", 0.6), ("snapkv", 0.3)]
)
def test_budget_for_is_the_nearest_of_all(method, share):
    llm = tiny_llama().config
    base = Setting(method, replace(Setting.base(method), **SHAPE | dict(sink_tokens=8, dense_layers=0)))
    target = share * evaluate.dense_bytes(llm, 4, 400, 50)
    by_budget = {
        budget: sum(evaluate.counted_bytes(replace(base, config=replace(base.config, budget=budget)), llm, 4, 400, 50))
        for budget in range(24, 440, 8)
    }
    found = evaluate.budget_for(base, share, llm, 4, 400, 50)
    assert abs(by_budget[found.config.budget] - target) == min(abs(x - target) for x in by_budget.values())
    assert evaluate.budget_for(base, 0.001, llm, 4, 400, 50) is None


# Statistics and tables


def test_bootstrap_is_resampling():
    values = np.random.default_rng(1).exponential(size=(2, 300))
    found = tables.bootstrap(values, 4000)
    rng = np.random.default_rng(2)
    naive = [np.mean([rng.choice(text, len(text)).mean() for text in values]) for _ in range(4000)]
    np.testing.assert_allclose(np.percentile(found, [2.5, 50, 97.5]), np.percentile(naive, [2.5, 50, 97.5]), rtol=0.02)
    np.testing.assert_allclose(tables.bootstrap(values + 3, 4000) - found, 3)  # the same draws: a paired difference


def texts_row(setting, budget, kl, read, text="a", **more):
    row = dict(task="texts", text=text, n_prompt=100, n_new=len(kl), setting=setting, bytes_share="", budget=budget)
    return row | dict(kl=kl, nll=[1.0] * len(kl), same=[1] * len(kl), read_bytes=read, dense_bytes=4e6) | more


def test_texts_table():
    rows = [texts_row("paper", 64, [0.4, 0.8], 2e6, text="b"), texts_row("ours", 64, [0.1, 0.2], 1e6, recovery=[0.5])]
    rows += [texts_row("ours", 128, [0.3, 0.3], 3e6), texts_row("paper", 64, [0.5, 0.5], 2e6)]
    rows += [
        texts_row(name, 96, kl, 1e6, bytes_share="1/8") for name, kl in (("ours", [0.2, 0.4]), ("h2o", [1.2, 0.6]))
    ]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables.texts(rows, "ours").split("\n")[2:]]
    head, _, *body = lines
    order = [["ours", "96"], ["h2o", "96"], ["ours", "64"], ["ours", "128"], ["paper", "64"]]
    assert [line[2:0:-1] for line in body] == order  # by bytes, at equal bytes by KL
    best, h2o, ours, _, paper = (dict(zip(head, line)) for line in body)
    assert (ours["MB"], ours["KL"], ours["perplexity"], ours["recovery"]) == ("1.00", "0.1500", "2.718", "0.500")
    assert (h2o["KL ratio"], h2o["bytes"], h2o["99th percentile"]) == ("3.0000", "1/8", "1.1940")
    assert h2o["ratio 95 %"] == "1.5000 to 6.0000" and best["ratio 95 %"] == "1.0000 to 1.0000"
    assert paper["KL"] == "0.5500" and paper["KL ratio"] == "–"  # paper was measured on more texts
    swapped = [texts_row("ours", 64, [0.2, 0.4], 2e6, text=text) for text in "ab"]  # paper's texts, in another order
    assert "1.8333" in tables.texts([rows[0], rows[3], *swapped], "ours")


# Grids


def test_grids_multiply_out():
    found = list(parse_grid("ours,quest M=auto,16 P=M bytes=1/8"))
    changes = [dict(calibration_interval=m, selection_interval=None) for m in ("auto", 16)]
    assert found == [(method, change, "1/8") for method in ("ours", "quest") for change in changes]
    assert (
        Setting("ours", Config(calibration_interval=5, share_budget="head", budget=512)).name == "ours M=5 share=head"
    )
    assert Setting("paper", Config.paper(dense_layers=0)).name == "paper dense=0"
    llm = tiny_llama().config
    assert len(evaluate.settings_of(["ours budget=256", "ours budget=256,512"], llm, 4, 400, 50)) == 2


# Prompts with keys


class Characters:
    """A tokenizer for tests: a token is a character."""

    def __init__(self, vocabulary=1 << 20):
        self.vocabulary = vocabulary

    def encode(self, text, special_tokens=True):
        return [ord(char) % self.vocabulary for char in text]

    def decode(self, tokens):
        return "".join(map(chr, tokens))


@settings(deadline=None, max_examples=40)
@given(st.integers(700, 3000), st.floats(0, 1), st.integers(1, 4), st.integers())
def test_hidden_keys(length, depth, n_keys, seed):
    tokens, key = evaluate.hidden_keys(
        Characters(), list(map(ord, "~" * 50)), length, depth, n_keys, random.Random(seed)
    )
    text = "".join(map(chr, tokens))
    assert len(tokens) == length and text.count("Remember it:") == n_keys
    name = text.rsplit("The ", 1)[1].removesuffix(" is")
    assert f"The {name} is {key}. Remember it: {key} is the {name}." in text and text.count(f"is {key}.") == 1
    filler = text[text.index("\n\n") + 2 : text.rindex("\n\nWhat")]
    before = filler[: filler.index(f"The {name}")].count("~")
    assert abs(before - depth * text.count("~")) <= 0.5


# Results on disk


def test_results_survive_a_stop_and_two_runs_share_a_file(tmp_path):
    path, values = tmp_path / "r.jsonl", dict(task="texts", text="a", sha256="x", n_prompt=8, n_new=2)
    identity = dict(model="m", dtype="float32", predictor="p")
    ours, paper = Setting("ours", Config()), Setting("paper", Config.paper())
    store, other = Store(path, identity), Store(path, identity)
    store.add(ours, **values, kl=[1.0])
    path.write_text(path.read_text() + '{"task": "te')  # another run was stopped while it wrote
    other.add(paper, **values, kl=[2.0])
    again = Store(path, identity)
    assert again.rows == [*store.rows, *other.rows] and again.missing([ours, paper], **values) == []
    changed = Setting("ours", Config(budget=512)), ours
    assert again.missing(changed, **values) == [changed[0]]
    assert again.missing([ours], **values | dict(text="b")) == [ours]
    renewed = Store(path, identity | dict(predictor="q"))
    assert renewed.missing([ours], **values) == [ours] and renewed.of("texts") == []
    quest = Setting("quest", Setting.base("quest"))
    again.add(quest, **values, kl=[3.0])  # it does not depend on the predictor
    assert Store(path, identity | dict(predictor="q")).missing([quest], **values) == []
    assert len(Store(path, identity).of("texts")) == 3
    path.write_text("# not results\n")
    with pytest.raises(InputError, match="holds no results"):
        Store(path, identity)


# The command, on a tiny model


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The command with a Llama of random weights and a text of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "load_model", lambda *args: (tiny_llama(context_len=1024), Characters(61)))
    monkeypatch.setattr(evaluate, "fetch_default_llm", lambda: "tiny")
    (tmp_path / "text.txt").write_text("".join(random.Random(0).choices("abcdefg hij", k=600)))
    return tmp_path


SHORT = ["--texts", "text.txt", "--lengths", "300", "--n-new", "8", "--quiet", "--together", "2"]


def test_texts_and_a_second_run(tiny, capsys, monkeypatch):
    command = ["texts", *SHORT, "--grid", "full,ours,paper,quest budget=176", "--worst", "2"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    path = tiny / "results" / "evaluate.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["setting"] for row in rows] == ["full", "ours", "paper", "quest"]
    assert all(len(row["kl"]) == 8 and row["text"] == "text.txt" and row["n_prompt"] == 292 for row in rows)
    assert max(map(abs, rows[0]["kl"])) < 1e-4 < np.mean(rows[1]["kl"]) and "highest KL: text.txt" in printed
    assert printed.count("\n| ") == 2 * (1 + 1) + 4 + 2
    path.write_text("\n".join(path.read_text().split("\n")[:3]) + "\n")  # the last one is lost
    assert main(command) == 0
    printed = capsys.readouterr().out
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert again[:3] == rows[:3] and again[3]["kl"] == pytest.approx(rows[3]["kl"], abs=1e-4)
    monkeypatch.setattr(evaluate, "Prompt", None)  # nothing is computed anew
    assert main(command) == 0 and capsys.readouterr().out == printed


def test_needles_and_recovery(tiny, capsys):
    options = ["--texts", "text.txt", "--quiet"]
    assert main(["needles", *options, "--lengths", "400", "--keys", "1", "--depths", "0.5", "--grid", "full,ours"]) == 0
    assert "| full | 1024 | 0% |" in capsys.readouterr().out
    assert main(["recovery", *SHORT, "--grid", "oracle,ours,random M=1 P=1 budget=176"]) == 0
    means = {line.split()[1]: float(line.split("|")[2]) for line in capsys.readouterr().out.splitlines()[4:7]}
    assert 1 > means["oracle"] > max(means["ours"], means["random"])


MADE_TEXTS = """
import datasets

def texts(tokenizer, max_seq_lengths, **_):
    return {"test": datasets.Dataset.from_list([{"question": n * "a"} for n in max_seq_lengths])}
"""  # as RULER's tasks make theirs


def test_lm_eval_on_a_local_task(tiny, capsys, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tiny / "cache"))
    (tiny / "data.jsonl").write_text('{"question": "abc", "choices": ["d", "ef"], "answer": 0}\n')
    text = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tiny / 'data.jsonl'}}}}}\ntest_split: test\n"
    text += "doc_to_text: '{{question}}'\n"
    choice = "task: choose\noutput_type: multiple_choice\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\n"
    (tiny / "made.py").write_text(MADE_TEXTS)
    write = "task: write\noutput_type: generate_until\ndoc_to_target: d\n"
    write += "generation_kwargs: {until: ['!'], max_gen_toks: 4}\n"
    (tiny / "choose.yaml").write_text(text + choice + "metric_list: [{metric: acc}]\n")
    made = "custom_dataset: !function made.texts\ntest_split: test\ndoc_to_text: '{{question}}'\n"
    (tiny / "write.yaml").write_text(made + write + "metric_list: [{metric: exact_match}]\n")
    command = ["lm-eval", "--quiet", "--grid", "full,ours", "--include-path", str(tiny), "--lengths", "30", "20"]
    assert main([*command, "--lm-tasks", "choose", "write"]) == 0
    rows = [json.loads(line) for line in (tiny / "results" / "evaluate.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == ["choose", "choose", "write", "write"]
    assert "acc,none" in rows[0]["scores"] and "exact_match,none" in rows[3]["scores"]
    assert "| ours | 1024 |" in capsys.readouterr().out


def test_log_likelihood_by_one_dense_pass(tiny):
    pytest.importorskip("lm_eval")
    from experiments.lm_eval_adapter import SparseLM

    model, tokenizer = tiny_llama(), Characters(61)
    args = type("Args", (), dict(quiet=True))
    bench = evaluate.Bench(model, tokenizer, random_predictor(), None, args)
    lm = SparseLM(bench, Setting("full", Setting.base("full")))
    text, end = "some words", " and more"
    tokens = torch.tensor(tokenizer.encode(text + end))
    log_p = model.logits(model.hidden(tokens, torch.arange(len(tokens)), causal_attention)).log_softmax(-1)
    expected = log_p[len(text) - 1 : -1].gather(1, tokens[len(text) :, None]).sum().item()
    assert lm.judge(text, end)[0] == pytest.approx(expected, abs=1e-3)
    assert lm.judge(text + " ", end[1:])[0] == pytest.approx(expected, abs=1e-3)
    answer = lm.generate(text, dict(until=[], max_gen_toks=6))
    assert len(answer) == 6 and lm.judge(text, answer)[1]
    assert lm.generate(text, dict(until=[answer[3]], max_gen_toks=6)) == answer[: answer.index(answer[3])]


REFUSED = {
    "invalid choice: 'everything'": ["everything"],
    "required": [],
    "method 'magic' is unknown": ["texts", "--grid", "ours,magic"],
    "method 'quest:1' is unknown": ["texts", "--grid", "quest:1"],
    "'size=3' in the grid": ["texts", "--grid", "ours size=3"],
    "both bytes and budget": ["texts", "--grid", "bytes=1/8 budget=512"],
    "bytes = '0' in the grid": ["texts", "--grid", "bytes=0"],
    "budget = 'x' in the grid": ["texts", "--grid", "budget=x"],
    "multiple of the block size": ["texts", "--grid", "budget=257"],
    "'some' is unknown: use": ["texts", "--grid", "share=some"],
    "--n-new must be at least 1": ["texts", "--n-new", "0"],
    "--depths must lie in 0": ["needles", "--depths", "2"],
    "must exceed --n-new and fit": ["texts", *SHORT, "--lengths", "9000"],
    "fit the model's context of 1024": ["needles", *SHORT, "--lengths", "1020"],
    "text nowhere cannot be read": ["texts", *SHORT, "--texts", "nowhere"],
    "text text.txt has 600 tokens, 801 are needed": ["texts", *SHORT, "--lengths", "800"],
    "300 tokens have no room": ["needles", *SHORT, "--keys", "4"],
    "does not exist": ["texts", "--predictor", "nowhere.safetensors"],
    "cannot use": ["texts", *SHORT, "--results", "text.txt/results"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_input_is_one_line(message, tiny, capsys):
    assert main(REFUSED[message]) == 2
    error = capsys.readouterr().err
    assert error.startswith("evaluate: ") and error.count("\n") == 1 and message in error
