"""The comparison: methods in lockstep are each method alone, metrics, resuming, bad input, a small run of it all."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
from attnpred import Config, InputError, decode_one_token, load_predictor, prefill
from evaluate import FULL, METHODS, Method, Outcomes, Prompt, decode_together, hidden_keys, main
from model import causal_attention, load_model
from rivals import RivalDecoder
from test_attnpred import random_predictor, tiny_llama
from weights.fetch_llm import fetch_default_llm

TINY = Config(
    block_size=8, history_len=8, sink_tokens=8, local_tokens=16, budget=40, calibration_interval=3, dense_layers=1
)


def fresh_rival(method):
    return type(method.rival)() if method.rival else None


def test_lockstep_is_each_method_alone():
    """From one prompt, read with all rivals looking on: the same logits as a decoder of its own, that read it alone."""
    model, predictor = tiny_llama(), random_predictor()
    tokens = torch.randint(0, 61, (150,), generator=torch.Generator().manual_seed(3))
    methods = list(METHODS.values())
    prompt = Prompt(model, predictor, TINY, tokens[:130].tolist(), 20, methods)
    together = [prompt.decoder(method, 40) for method in methods]
    alone = []
    for method in methods:
        config = method.config(TINY, 40, 150)
        alone.append(RivalDecoder(config, model, predictor, 150, (fresh_rival(method),)))
        torch.testing.assert_close(prefill(model, alone[-1], tokens[:130]), prompt.logits)
    for token in tokens[130:].split(1):
        logits = decode_together(model, together, token.expand(len(methods)))
        expected = torch.stack([decode_one_token(model, decoder, token) for decoder in alone])
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(together, alone):
        torch.testing.assert_close(torch.stack(ours.recovery), torch.stack(theirs.recovery), atol=1e-4, rtol=1e-4)
    full = torch.stack(together[0].recovery)
    assert full.min() > 0.9999 and torch.stack(together[1].recovery).min() < 0.99


def test_a_second_branch_is_unaffected_by_the_first():
    model, predictor = tiny_llama(), random_predictor()
    method = METHODS["H2O"]
    prompt = Prompt(model, predictor, TINY, list(range(60)) * 2, 12, [method])

    def decode():
        decoder = prompt.decoder(method, 40)
        return torch.stack([decode_together(model, [decoder], torch.tensor([t])) for t in range(12)])

    first = decode()
    assert torch.equal(first, decode())


def test_greedy_answers_end_apart():
    """A sequence that ends leaves the others running, and its own answer as it was."""
    model, predictor = tiny_llama(), random_predictor()
    methods = [FULL, METHODS["StreamingLLM"], METHODS["AttentionPredictor, kv"]]
    prompt = Prompt(model, predictor, TINY, list(range(60)) * 2, 20, methods)
    long = evaluate.decode_greedily(model, prompt, [prompt.decoder(m, 40) for m in methods], 20)
    assert [len(answer) for answer in long] == [20] * 3
    eos = long[1][-1], long[2][7]
    short = evaluate.decode_greedily(model, prompt, [prompt.decoder(m, 40) for m in methods], 20, eos)
    for whole, cut in zip(long, short):
        end = next((i for i, token in enumerate(whole) if token in eos), len(whole))
        assert cut == whole[:end]


# Metrics


def test_metrics():
    pytest.importorskip("rapidfuzz")
    assert evaluate.token_f1("The cat sat.", "a cat sat down") == pytest.approx(2 * 2 / (2 + 3))
    assert evaluate.token_f1("dog", "cat") == evaluate.token_f1("", "cat") == 0
    assert evaluate.rouge_l("police killed the gunman", "police kill the gunman") == pytest.approx(3 / 4)
    assert evaluate.rouge_l("the gunman police killed", "police killed the gunman") == pytest.approx(2 / 4)
    assert evaluate.code_similarity("# a comment\nx = 1\ny = 2", "x = 1") == 1
    assert 0.5 < evaluate.code_similarity("x = 12", "x = 1") < 1 and evaluate.code_similarity("", "x = 1") == 0
    assert evaluate.number_match("Paragraph 3, or 4", "Paragraph 3") == 0.5
    assert evaluate.number_match("13", "3") == evaluate.number_match("none", "3") == 0
    assert evaluate.class_match("Location or Person", "Person", ["Person", "Location", "Food"]) == 0.5
    assert evaluate.class_match("Food", "Person", ["Person", "Food"]) == 0
    assert evaluate.class_match("Human group", "Human group", ["Human", "Human group"]) == 1
    assert evaluate.final_number("6 * 7 = 42 apples\n#### 1,042") == 1042
    assert evaluate.final_number("so 3 and then -4.5 remain.") == -4.5
    assert evaluate.final_number("no") is None


def test_divergence_is_zero_only_for_the_same():
    logits = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    same, other = evaluate.divergence(logits[:1].log_softmax(-1), logits)
    p = logits[0].softmax(0)
    assert same.abs() < 1e-6
    assert other == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p.tolist(), p.flip(0).tolist())), rel=1e-4)


# Prompts with keys


class Characters:
    def encode(self, text, special_tokens=True):
        return list(map(ord, text))


@settings(deadline=None, max_examples=40)
@given(st.integers(700, 3000), st.floats(0, 1), st.integers(1, 4), st.integers())
def test_hidden_keys(length, depth, n_keys, seed):
    rng = evaluate.random.Random(seed)
    tokens, key = hidden_keys(Characters(), list(map(ord, "~" * 50)), length, depth, n_keys, rng)
    text = "".join(map(chr, tokens))
    assert len(tokens) == length
    assert text.count("Remember it:") == n_keys
    name = text.rsplit("The ", 1)[1].removesuffix(" is")
    assert f"The {name} is {key}. Remember it: {key} is the {name}." in text and text.count(f"is {key}.") == 1
    filler = text[text.index("\n\n") + 2 : text.rindex("\n\nWhat")]
    before = filler[: filler.index(f"The {name}")].count("~")
    assert abs(before - depth * text.count("~")) <= 0.5


def test_no_room_for_keys():
    with pytest.raises(InputError, match="no room for 4 keys"):
        hidden_keys(Characters(), [1], 200, 0.5, 4, evaluate.random.Random(0))


# Outcomes


def test_outcomes_survive_a_stop_and_refuse_other_settings(tmp_path):
    outcomes = Outcomes(tmp_path, {"seed": 0})
    outcomes.add("perplexity", "a", FULL, 0, nll=[1.0])
    ours = METHODS["AttentionPredictor, kv"]
    outcomes.add("perplexity", "a", ours, 256, nll=[2.0])
    path = tmp_path / "outcomes.jsonl"
    path.write_text(path.read_text()[:-9])  # stopped while it wrote the second
    again = Outcomes(tmp_path, {"seed": 0})
    assert again.rows == [outcomes.rows[0]]
    assert again.missing("perplexity", "a", [FULL, ours], [256]) == [(ours, 256)]
    again.add("perplexity", "a", ours, 256, nll=[2.0])
    assert Outcomes(tmp_path, {"seed": 0}).rows == outcomes.rows
    kept = path.read_text()
    with pytest.raises(InputError, match="seed = 0, not 1"):
        Outcomes(tmp_path, {"seed": 1})
    path.write_text("{\n" + kept)
    with pytest.raises(InputError, match="damaged"):
        Outcomes(tmp_path, {"seed": 0})
    assert path.read_text() == "{\n" + kept


# The command


def test_a_small_run(tmp_path, capsys):
    """Every task with the real model; a second run computes nothing anew, and what was lost only."""
    command = ["--quick", "--quiet", "--out", str(tmp_path)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert (tmp_path / "results.md").read_text().strip() == printed.strip()
    by_method = {entry["method"]: entry for entry in results["perplexity"]}
    assert set(by_method) == set(METHODS) and all(f"| {name} |" in printed for name in METHODS)
    full = by_method[FULL.name]
    assert full["perplexity"] == pytest.approx(dense_perplexity(), rel=1e-3)
    assert full["recovery"] == pytest.approx(1) and abs(full["kl"]) < 1e-4
    sparse = [entry for name, entry in by_method.items() if name != FULL.name]
    assert max(sparse, key=lambda entry: entry["recovery"])["method"] == "oracle"
    assert all(entry["kl"] > 1e-3 and entry["kv_bytes"] > 0 for entry in sparse)
    assert by_method["AttentionPredictor, kv"]["recovery"] > by_method["StreamingLLM"]["recovery"] + 0.03
    agreement = {entry["method"]: entry for entry in results["agreement"]}
    assert agreement[FULL.name]["same"] == 1 and agreement[FULL.name]["identical_tokens"] == 6
    found = {entry["method"]: entry["score"] for entry in results["retrieval"]}
    assert found[FULL.name] == found["AttentionPredictor, kv"] == 1 and found["StreamingLLM"] == 0
    for name in ("perplexity.png", "recovery.png", "pass-key.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG" and (tmp_path / name).stat().st_size < 200_000

    path = tmp_path / "outcomes.jsonl"
    kept = path.read_text()
    assert len(kept.splitlines()) == 1 + 3 * len(METHODS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "Prompt", None)
        assert main(command) == 0
    assert capsys.readouterr().out == printed and path.read_text() == kept


def dense_perplexity():
    """Of the same twelve tokens, by one plain pass over all."""
    model, tokenizer = load_model(str(fetch_default_llm()), torch.float32, "cpu")
    args = evaluate.parse_args(["--quick", "--out", "unused"])
    ((_, tokens),) = evaluate.texts_of(args, tokenizer, 512 + 12 + 1, 1)
    tokens = torch.tensor(tokens)
    hidden = model.hidden(tokens, torch.arange(len(tokens)), causal_attention)
    log_p = model.logits(hidden[512:-1]).log_softmax(-1)  # (12, V)
    return math.exp(-log_p.gather(1, tokens[513:, None]).mean())


def test_downloaded_files(tmp_path, capsys):
    pytest.importorskip("rapidfuzz")
    fact = (
        "The lighthouse of Brannock was built by Ada Quill in 1802. " + "The sea was calm and the wind was low. " * 40
    )
    row = {"dataset": "hotpotqa", "context": fact, "input": "Who built the lighthouse of Brannock?", "_id": "q1"}
    longbench, gsm8k = tmp_path / "hotpotqa.jsonl", tmp_path / "gsm8k.jsonl"
    longbench.write_text(json.dumps(row | {"answers": ["Ada Quill", "nobody"], "all_classes": None}) + "\n\n")
    gsm8k.write_text("".join(json.dumps({"question": f"{n} + 1?", "answer": f"#### {n + 1}"}) + "\n" for n in range(4)))
    shot, solved = list(evaluate.gsm8k_questions(gsm8k, None, 2))
    assert shot.text.count("Question:") == 3 and shot.text.endswith("Question: 2 + 1?\nAnswer:")
    assert solved.score("3 + 1 = 4\nQuestion: 9") == 1 and shot.score("4") == 0
    out = tmp_path / "out"
    command = ["--tasks", "--quiet", "--out", str(out), "--longbench", str(longbench), "--budget", "256"]
    assert main([*command, "--methods", FULL.name, "AttentionPredictor, kv"]) == 0
    rows = [json.loads(line) for line in (out / "outcomes.jsonl").read_text().splitlines()[1:]]
    assert [(row["task"], row["example"]) for row in rows] == [("hotpotqa", "q1")] * 2
    assert "Ada Quill" in rows[0]["answer"] and rows[0]["score"] > 0.2
    assert "hotpotqa (1)" in capsys.readouterr().out


BAD = {
    "no such method": ["--methods", "magic"],
    "does not exist": ["--predictor", "nowhere.safetensors"],
    "multiple of the block size": ["--budgets", "257"],
    "below sink_tokens": ["--budget", "64"],
    "is too long": ["--context", "9000"],
    "at least 1": ["--continuation", "0"],
    "lie in 0": ["--depths", "2"],
    "cannot be read": ["--longbench", "nowhere.jsonl"],
    "not a JSON object": ["--gsm8k", "README.md"],
    "invalid choice": ["--tasks", "everything"],
    "required": None,
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line(message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("# not json\n")
    options = BAD[message]
    assert main([] if options is None else ["--out", "out", "--quiet", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("evaluate: ") and error.count("\n") == 1
    assert message in error or message == "no such method" and "'magic' is not known" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"dataset": "dureader", "context": "", "input": "", "answers": []}', "'dureader' is not known"),
        ('{"context": ""}', "the fields dataset"),
        ("[1]", "the fields dataset"),
        ("3", "not a JSON object"),
        ("", "no example"),
    ],
)
def test_bad_lines(line, message, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InputError, match=message):
        list(evaluate.longbench_questions(path, None))


def test_predictor_is_what_decides():
    """The table's own row rests on the weights given: other weights, other blocks."""
    model, tokens = tiny_llama(), list(range(60)) * 3
    tables = []
    for predictor in (random_predictor(0), random_predictor(1), load_predictor(evaluate.DEFAULT_PREDICTOR)):
        prompt = Prompt(model, predictor, TINY, tokens, 4, [Method("ours")])
        tables.append(torch.stack(prompt.decoder(Method("ours"), 40).blocks))
    assert not torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])
