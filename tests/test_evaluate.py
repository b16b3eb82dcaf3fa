"""Tests lockstep decoding against single decoders, bytes, KL and intervals against hand counts, resuming, refusals."""

import json
import pathlib
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from attnpred import DEFAULT_PREDICTOR, InputError, SparseDecoder, generate, load_predictor
from experiments import evaluate, tables
from experiments.evaluate import Setting, Store, counted_bytes, main, parse_grid, read_on
from model import causal_attention, load_model
from tests.helpers import LetterTokenizer, assert_refused, random_predictor, tiny_llama
from tests.test_transformers_adapter import save_tiny

SHAPE = "block_size=8 history_len=8 sink_tokens=8 local_tokens=16"
TOKENS = torch.randint(0, 61, (200,), generator=torch.Generator().manual_seed(3))
GRIDS = [  # every way to count bytes
    "ours budget=64 M=1,3,auto",
    "ours budget=64 E=0,2 Q=1",
    "full,paper,quest,quest+echo,snapkv,snapkv+echo,ada-snapkv,streaming-llm,oracle,future budget=64",
    "quest,oracle,snapkv,streaming-llm budget=64 Q=16 M=1",  # options that they have no use for
    "decayed-rms:0.5,decayed-rms:0 budget=64 M=3",
    "ours,mean-std+echo budget=56,152",  # nothing selected, and outgrown while decoding
    "mean-std,paper budget=24,152",
]


def settings_of(*grids):
    return [setting for grid in grids for setting in parse_grid(f"{grid} {SHAPE}")]


def test_lockstep_is_each_setting_alone():
    """Each row is compared with a decoder of its own, one dense pass and `counted_bytes`, which counts every echo."""
    model, predictor, choices = tiny_llama(), random_predictor(), settings_of(*GRIDS)
    log_p = model.logits(model.hidden(TOKENS[:180], torch.arange(180), causal_attention))[150:].log_softmax(-1)
    for setting, row in zip(choices, read_on(model, predictor, choices, TOKENS[:181], 150, 2)):
        sparse_steps = {1 << 24: 0, 152: 14}.get(setting.config.budget, 30)
        echo_blocks = 3 * 2 * setting.config.echo_blocks * sparse_steps  # L * Hk * E for each of these steps, at most
        most = 2 * 8 * 16 * 4 * echo_blocks / 30  # K and V, b, D, float32
        counted = counted_bytes(setting, model.config, 4, 150, 30)
        assert row["read_bytes"] - row["echo_bytes"] == pytest.approx(counted - most), setting
        assert 0 < row["echo_bytes"] < most if most else row["echo_bytes"] == 0
        if setting.method == "full":
            assert row["dense_bytes"] == row["read_bytes"] and max(map(abs, row["kl"])) < 1e-4
        else:
            assert len(row["recovery"]) == 15
        if setting.method != "ours":
            continue
        alone, log_q = SparseDecoder(setting.config, model, predictor, 192), []
        alone.prefill(TOKENS[:150])
        for token in TOKENS[150:180]:
            log_q.append(alone.decode(token[None]).log_softmax(-1))
        log_q = torch.stack(log_q)  # (30, V)
        assert row["kl"] == pytest.approx((log_p.exp() * (log_p - log_q)).sum(1).tolist(), abs=1e-3)
        assert row["nll"] == pytest.approx((-log_q[range(30), TOKENS[151:181]]).tolist(), abs=1e-3)
        assert row["same"] == (log_q.argmax(1) == log_p.argmax(1)).tolist()


@pytest.mark.parametrize("method, share", [("ours", 0.3), ("paper", 0.9), ("quest", 0.6), ("snapkv", 0.3)])
def test_budget_for_is_the_nearest_of_all(method, share):
    shape = tiny_llama().config, 4, 400, 50
    setting, full = settings_of(f"{method} bytes={share}", "full")
    least = 24 + 8 * setting.config.echo_blocks
    candidates = settings_of(f"{method} budget={','.join(map(str, range(least, 440, 8)))}")
    error = {s.config.budget: abs(counted_bytes(s, *shape) - share * counted_bytes(full, *shape)) for s in candidates}
    assert error[evaluate.budget_for(setting, *shape).config.budget] == min(error.values())
    assert evaluate.budget_for(replace(setting, bytes_share="1/1000"), *shape) is None


# Statistics and tables


def texts_row(setting, budget, kl, read, text="a", **more):
    row = dict(task="texts", text=text, sha256=text, n_prompt=100, n_new=len(kl), bytes_share="")
    row |= dict(setting=setting, budget=budget)
    return row | dict(kl=kl, nll=[1.0] * len(kl), same=[1] * len(kl), read_bytes=read, dense_bytes=4e6) | more


def test_texts_table():
    """A bootstrap of two tokens draws one of them twice, or both."""
    rows = [texts_row("paper", 64, [0.4, 0.8], 2e6, text="b"), texts_row("ours", 64, [0.1, 0.2], 1e6, recovery=[0.5])]
    rows += [texts_row("ours", 128, [0.3, 0.3], 3e6), texts_row("paper", 64, [0.5, 0.5], 2e6)]
    rows += [texts_row("ours", 96, [0.2, 0.4], 1e6, bytes_share="1/8")]
    rows += [texts_row("quest", 96, [1.2, 0.6], 1e6, bytes_share="1/8")]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables.texts(rows).split("\n")[2:]]
    head, _, *body = lines
    order = [["ours", "96"], ["quest", "96"], ["ours", "64"], ["ours", "128"], ["paper", "64"]]
    assert [line[2:0:-1] for line in body] == order  # by bytes, at equal bytes by KL
    best, quest, ours, _, paper = (dict(zip(head, line)) for line in body)
    assert (ours["MB"], ours["KL"], ours["recovery"]) == ("1.00", "0.1500", "0.500")
    assert (quest["KL ratio"], quest["bytes"]) == ("3.0000", "1/8") and "of the way" not in head
    assert quest["ratio 95 %"] == "1.5000 to 6.0000" and best["ratio 95 %"] == "1.0000 to 1.0000"
    assert paper["KL"] == "0.5500" and paper["KL ratio"] == "–"  # paper was measured on more texts
    swapped = [texts_row("ours", 64, [0.2, 0.4], 2e6, text=text) for text in "ab"]  # paper's texts, in another order
    assert "1.8333" in tables.texts([rows[0], rows[3], *swapped])
    ends = [texts_row(name, 96, [kl], 1e6, bytes_share="1/8") for name, kl in [("streaming-llm", 0.8), ("oracle", 0.1)]]
    assert "50%" in tables.texts([*ends, texts_row("ours", 96, [0.08**0.5], 1e6, bytes_share="1/8")])
    changed = tables.texts([texts_row("ours", 96, [0.0], 1e6), texts_row("ours", 96, [0.0], 1e6, sha256="later")])
    assert "of 2 texts" in changed and "ratio" not in changed  # to a KL of zero
    later = texts_row("paper", 96, [0.4], 1e6, sha256="later")  # another text of the same name: no ratio
    assert "2.0000" not in tables.texts([texts_row("ours", 96, [0.2], 1e6), later])


# Grids


def test_grids_multiply_out(capsys):
    found = list(parse_grid("ours,quest M=auto,16 history_len=32 bytes=1/8"))
    assert found == [
        Setting(method, replace(evaluate.base_config(method), calibration_interval=m, history_len=32), "1/8")
        for method in ("ours", "quest")
        for m in ("auto", 16)
    ]
    names = [setting.name for setting in parse_grid("ours,paper,quest+echo M=1 sink_tokens=64 E=0 budget=512")]
    assert names == ["ours sink_tokens=64 M=1 E=0", "paper", "quest+echo sink_tokens=64 M=1 E=0"]
    wanted = [*parse_grid("ours budget=256,512"), *parse_grid("ours budget=256"), *parse_grid("ours bytes=1/1000")]
    assert [setting.config.budget for setting in evaluate.with_budgets(wanted, tiny_llama(), 400, 50)] == [256, 512]
    assert capsys.readouterr().err == "skipped: no budget of 'ours' reads 1/1000 of dense's bytes\n"


def test_the_published_rows_are_of_the_default():
    """The first table of experiments/README.md has rows of the default settings, ours among them."""
    published = (pathlib.Path(evaluate.__file__).parent / "README.md").read_text().split(" decoded, of ")[1]
    published = {tuple(line.split(" | ")[:3:2]) for line in published.splitlines() if line.startswith("| 1/")}
    default = {(f"| {setting.bytes_share}", setting.name) for setting in evaluate.parse_args(["texts"]).settings}
    assert published < default and ("| 1/8", "ours") in published


# Results on disk


def test_results_survive_a_stop(tmp_path, capsys):
    path, values = tmp_path / "r.jsonl", dict(task="texts", text="a", sha256="x", n_prompt=8, n_new=1)
    identity = dict(model="m", dtype="float32", predictor="p")
    ours, paper, quest, smaller = *parse_grid("ours,paper,quest"), *parse_grid("ours budget=512")
    path.touch()
    store, other = Store(path, identity), Store(path, identity)
    store.add(ours, values, dict(kl=[1.0], read_bytes=1.0))
    path.write_text(path.read_text() + '\n{"task": "te')  # another run was stopped while it wrote
    other.add(paper, values, dict(kl=[2.0], read_bytes=1.0))
    again = Store(path, identity)
    assert "1 incomplete rows are left out, measure them again\n" in capsys.readouterr().err
    assert again.rows == [*store.rows, *other.rows] and again.missing([ours, paper], values) == []
    assert again.missing([smaller, ours], values) == [smaller]
    assert again.missing([ours], values | dict(text="b")) == [ours]
    again.add(ours, values, dict(kl=[4.0], read_bytes=1.0))  # measured twice
    assert [row["kl"] for row in Store(path, identity).rows] == [[4.0], [2.0]]
    again.add(quest, values, dict(kl=[3.0], read_bytes=1.0))
    renewed = Store(path, identity | dict(predictor="q"))
    assert renewed.missing([ours, quest], values) == [ours]  # quest does not depend on the predictor
    assert [row["method"] for row in renewed.rows] == ["quest"] and len(Store(path, identity).rows) == 3
    assert Store(path, identity | dict(dtype="bfloat16")).rows == []
    path.write_text("# not results\n[1]\n")
    with pytest.raises(InputError, match="holds no results"):
        Store(path, identity)


FULL = texts_row("ours", 64, [0.5], 1e6, model="m", dtype="float32", predictor="p")


@pytest.mark.parametrize(
    "row",
    [FULL | change for change in (dict(task="needles"), dict(kl=[]), dict(kl=["x"]), dict(kl=[float("nan")]))]
    + [FULL | change for change in (dict(n_prompt="9"), dict(recovery=0.5), dict(task=[]), dict(setting=None))]
    + [{key: value for key, value in FULL.items() if key != left_out} for left_out in ("budget", "sha256", "kl")],
)
def test_a_row_that_is_not_complete_is_left_out(row, tmp_path, capsys):
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, (row, FULL))))
    assert tables.read_results(tmp_path / "r.jsonl") == [FULL]
    assert capsys.readouterr().err.endswith("r.jsonl: 1 incomplete rows are left out, measure them again\n")


# The command, on a tiny model


class DocumentTokenizer(LetterTokenizer):
    """What it encodes is never read as control tokens."""

    def encode(self, text, special_tokens=True, *, control_tokens):
        assert not control_tokens
        return super().encode(text)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The command with a Llama of random weights and a text of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "load_model", lambda *args: (tiny_llama(context_len=1024), DocumentTokenizer()))
    monkeypatch.setattr(evaluate, "fetch_default_llm", lambda: "tiny")
    (tmp_path / "text.txt").write_text("".join(random.Random(0).choices("abcdefg hij", k=600)))
    return tmp_path


def results(folder):
    return [json.loads(line) for line in (folder / "results/evaluate.jsonl").read_text().splitlines() if line]


SHORT = ["--texts", "text.txt", "--lengths", "300", "--n-new", "8", "--together", "2"]
GRID = ["--grid", "full,ours budget=176"]


def test_texts_and_a_second_run(tiny, capsys, monkeypatch):
    command = ["texts", *SHORT, "--grid", "full,ours,paper,quest budget=176"]
    assert main(command) == 0
    printed, rows = capsys.readouterr().out, results(tiny)
    assert [row["setting"] for row in rows] == ["full", "ours", "paper", "quest"] and printed.count("\n| ") == 2 + 4
    assert all(len(row["kl"]) == 8 and row["text"] == "text.txt" and row["n_prompt"] == 292 for row in rows)
    assert max(map(abs, rows[0]["kl"])) < 1e-4 < np.mean(rows[1]["kl"])
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "prefill_together", None)  # nothing may be computed again
        assert main(command) == 0 and capsys.readouterr().out == printed
        assert main(["table"]) == 0 and capsys.readouterr().out == printed
    (tiny / "text.txt").write_text("another text of the same name " * 20)
    assert main(command) == 0 and "of 2 texts" in capsys.readouterr().out and len(results(tiny)) == 8
    monkeypatch.setattr(evaluate, "load_model", lambda *_: (tiny_llama(context_len=1024, seed=1), DocumentTokenizer()))
    assert main(command) == 0 and "of 1 texts" in capsys.readouterr().out and len(results(tiny)) == 12  # another model


def test_runs_that_share_a_file_take_turns(tiny, capsys):
    """The second one waits, says so, and measures only what the first has not."""
    command, path = ["texts", *SHORT, *GRID], tiny / "results/evaluate.jsonl"
    assert main(command) == 0
    first, said = path.read_text(), ""
    path.write_text("")
    with ThreadPoolExecutor() as threads:
        with evaluate.sole_user("results/evaluate.jsonl"):
            capsys.readouterr()
            second = threads.submit(main, command)
            while not said and not second.done():
                said = capsys.readouterr().err
            path.write_text(first)
    assert said.startswith("Waiting for another process that writes results/evaluate.jsonl")
    assert second.result() == 0 and path.read_text() == first


def test_weights_that_are_not_finite_are_refused(tiny, capsys, monkeypatch):
    model = tiny_llama(context_len=1024)
    model.norm.weight.data[0] = torch.nan
    monkeypatch.setattr(evaluate, "load_model", lambda *_: (model, LetterTokenizer()))
    assert_refused(
        main, "evaluate", ["texts", *SHORT, *GRID], "logits are not finite in float32: its weights are dam", capsys
    )


MADE_TEXTS = """
import datasets

def texts(tokenizer, max_seq_lengths, **_):
    rows = [dict(question=q[-n:], answer=a) for n in max_seq_lengths for q, a in %s]
    return {"test": datasets.Dataset.from_list(rows)}
"""  # as RULER's tasks make theirs


def test_lm_eval_on_a_local_task(tiny, capsys, monkeypatch):
    """lm-eval's own model, which uses the adapter for transformers, gives the answer of our own loop."""
    pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tiny / "cache"))
    setting, question = f"ours budget=56 {SHAPE}", "".join(random.Random(1).choices("abcdefghij", k=90))
    model, tokenizer = load_model(str(save_tiny(tiny / "model")), torch.float32, torch.device("cpu"))
    decoder = SparseDecoder(*[s.config for s in parse_grid(setting)], model, load_predictor(DEFAULT_PREDICTOR), 100)
    answer = tokenizer.decode(list(generate(decoder, tokenizer.encode(question), 6)))
    assert decoder.selecting and len(answer) == 6 and "z" not in answer  # z ends a text
    (tiny / "made.py").write_text(MADE_TEXTS % [(question, answer)])
    own_tasks = partial(TaskManager, include_defaults=False)  # lm-eval's own are thousands of files
    monkeypatch.setattr("lm_eval.tasks.TaskManager", own_tasks)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # starts a dozen processes
    task = dict(task="write", output_type="generate_until", metric_list=[dict(metric="exact_match")], test_split="test")
    task |= dict(doc_to_text="{{question}}", doc_to_target="{{answer}}", generation_kwargs=dict(max_gen_toks=6))
    yaml = json.dumps(task)[:-1] + ', "custom_dataset": !function made.texts}'  # JSON is YAML
    (tiny / "write.yaml").write_text(yaml)
    command = ["lm-eval", "--grid", setting, "--grid", f"streaming-llm budget=56 {SHAPE}", "--include-path", str(tiny)]
    command += ["--lengths", "90", "--model", str(tiny / "model"), "--dtype", "float32"]
    assert main([*command, "--lm-tasks", "write"]) == 0
    assert [row["scores"]["exact_match,none"] for row in results(tiny)] == [1.0, 0.0]
    assert "local_tokens=16 | 56 | 1.000 |" in capsys.readouterr().out
    assert main([*command, "--lm-tasks", "write"]) == 0 and len(results(tiny)) == 2
    (tiny / "made.py").write_text(MADE_TEXTS % [(question, "other")])  # another text under the same name
    assert main([*command, "--lm-tasks", "write"]) == 0 and len(results(tiny)) == 4
    with pytest.raises(InputError, match="that rate"):
        evaluate.refuse_ratings([])


REFUSED = {
    "method 'magic' is unknown": ["texts", "--grid", "ours,magic"],
    "method 'quest:1' is unknown": ["texts", "--grid", "quest:1"],
    "unrecognized arguments: --size=3": ["texts", "--grid", "ours size=3"],
    "both bytes and budget": ["texts", "--grid", "bytes=1/8 budget=512"],
    "'0' is no fraction": ["texts", "--grid", "bytes=0"],
    "'1/0' is no fraction": ["texts", "--grid", "bytes=1/0"],
    "--n-new must be at least 1": ["texts", "--n-new", "0"],
    "must exceed --n-new": ["texts", *SHORT, "--lengths", "8"],
    "fit the model's context of 1024 tokens": ["texts", *SHORT, "--lengths", "1025"],
    "text nowhere cannot be read": ["texts", *SHORT, "--texts", "nowhere"],
    "text text.txt has 600 tokens, 801 are needed": ["texts", *SHORT, "--lengths", "800"],
    "give budget= in place of bytes=": ["lm-eval", "--grid", "ours bytes=1/8"],
    "have no known future": ["lm-eval", "--grid", "future"],
    "there is no results file nowhere/r.jsonl": ["table", "--results", "nowhere/r.jsonl"],
    "cannot create folder text.txt": ["texts", *SHORT, "--results", "text.txt/results"],
    "cannot write .": ["texts", *SHORT, "--results", "."],
    "text.txt holds no results": ["table", "--results", "text.txt"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_input_is_one_line(message, tiny, capsys):
    assert_refused(main, "evaluate", REFUSED[message], message, capsys)
    assert not (tiny / "nowhere").exists()
