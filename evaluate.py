"""Quality: AttentionPredictor and its rivals on the same model, text and budget, through the same sparse decode path.

    python evaluate.py --out results
    python evaluate.py --out results --longbench hotpotqa.jsonl lcc.jsonl --gsm8k test.jsonl

Tasks on text that the bundled predictor has not seen (or on --text):

    perplexity  of a long continuation, in closed loop: every token is decoded, from what the methods let it see; what
                share of the true attention they attended (recovery), by layer and step, is measured on the way
    agreement   with the greedy tokens of full attention, each method being fed those
    retrieval   of a pass-key, and of one needle among several, by depth and length of the text

and on files that you downloaded:

    --longbench FILE ...   LongBench's jsonl, a file a dataset; of each line are read `dataset` (which settles prompt
                           and metric: see LONGBENCH), `context`, `input`, `answers`, `all_classes` and `_id`
    --gsm8k FILE           GSM8K's jsonl: `question`, and `answer`, which ends in "#### number"; the first lines of the
                           file are the worked examples of the prompt

A prompt is read once, densely; all methods decode on from there, in lockstep. Every outcome is a line of
OUT/outcomes.jsonl as soon as it is known: a run that is started again does what is missing. The end writes
results.json, results.md and pictures.

Reading order: `METHODS`, `Prompt`, `Outcomes`, the tasks, the metrics, the summary.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import pathlib
import random
import re
import statistics
import string
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from operator import itemgetter

import torch
import torch.nn.functional as F
from tqdm import tqdm

from attnpred import (
    DEFAULT_PREDICTOR,
    Config,
    InputError,
    OneLineParser,
    ShownDefaults,
    exit_status,
    load_predictor,
    prefill,
)
from model import load_model
from rivals import RIVALS, DecayedMean, Rival, RivalDecoder
from train_predictor import draw_contexts, python_documents, read_texts, refuse_changes
from weights.fetch_llm import DEFAULT_LLM, fetch_default_llm

# --------------------------------------------------------------------------------------------------------------------
# Methods, and decoding with many of them at once
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    name: str
    rival: Rival | None = None  # None: the predictor chooses
    select_heads: str = "kv"
    dense: bool = False

    @property
    def calibrates(self):
        """Whether it rests on the history, for which true rows are read."""
        return not self.dense and (self.rival is None or isinstance(self.rival, DecayedMean))

    def config(self, config: Config, budget: int, capacity: int) -> Config:
        """Full attention is a budget that covers everything."""
        if self.dense:
            budget = config.sink_tokens + config.local_tokens + config.n_blocks(capacity) * config.block_size
        return replace(config, budget=budget, select_heads=self.select_heads)


FULL = Method("full attention", dense=True)
OURS = Method("AttentionPredictor, kv"), Method("AttentionPredictor, q", select_heads="q")
RIVAL_NAMES = "StreamingLLM", "H2O", "SnapKV", "Quest", "decayed mean", "oracle"
METHODS = {method.name: method for method in (FULL, *OURS, *(Method(name, RIVALS[name]()) for name in RIVAL_NAMES))}


class Prompt:
    """A prompt, read once. `logits` (V,) are of the token behind it; `decoder` makes a decoder that goes on from there.

    It is read with a history for every query head; their mean over a group is what "kv" selection would have kept.
    """

    def __init__(self, model, predictor, config, tokens, n_new, methods):
        self.model, self.predictor, self.config, self.capacity = model, predictor, config, len(tokens) + n_new
        everything = FULL.config(config, 0, self.capacity)
        rivals = tuple(method.rival for method in methods if method.rival) or (None,)
        self.base = RivalDecoder(replace(everything, select_heads="q"), model, predictor, self.capacity, rivals)
        self.logits = prefill(model, self.base, torch.tensor(tokens))

    def decoder(self, method: Method, budget: int) -> RivalDecoder:
        c, base = method.config(self.config, budget, self.capacity), self.base
        decoder = RivalDecoder(c, self.model, self.predictor, self.capacity, (method.rival,))
        decoder.cache.k.copy_(base.cache.k)
        decoder.cache.v.copy_(base.cache.v)
        decoder.history.copy_(base.history.unflatten(1, (decoder.heads, -1)).mean(2))  # (L', heads, H, capacity)
        decoder.notes = {method.rival: base.notes[method.rival]} if method.rival else {}
        decoder.n_tokens, decoder.newest = base.n_tokens, base.newest
        decoder.begin()
        decoder.finish_token()
        return decoder


@torch.inference_mode()
def decode_together(model, decoders, tokens):
    """One token each, tokens (M,), for M decoders of the same length: the weights are read once. -> logits (M, V)"""
    for decoder in decoders:
        decoder.begin_token()

    def attend(layer, q, k, v):  # (Hq, M, D), (Hk, M, D), (Hk, M, D)
        columns = zip(decoders, *(x.split(1, 1) for x in (q, k, v)))
        return torch.cat([decoder.decode_attention(layer, *qkv) for decoder, *qkv in columns], 1)  # (Hq, M, D)

    positions = torch.tensor([decoder.n_tokens - 1 for decoder in decoders])
    logits = model.logits(model.hidden(tokens, positions, attend))  # (M, V)
    for decoder in decoders:
        decoder.finish_token()
    return logits


def decode_greedily(model, prompt, decoders, n_new, eos=()):
    """Up to n_new greedy tokens of each decoder, as lists, each ending before an end-of-sequence token."""
    answers = [[] for _ in decoders]
    token = prompt.logits.argmax().expand(len(decoders))  # (M,)
    running = list(range(len(decoders)))
    for step in range(n_new):
        ended = [token[i].item() in eos for i in range(len(running))]
        token = token[[i for i, end in enumerate(ended) if not end]]
        running = [index for index, end in zip(running, ended) if not end]
        for index, value in zip(running, token.tolist()):
            answers[index].append(value)
        if step == n_new - 1 or not running:
            break
        token = decode_together(model, [decoders[index] for index in running], token).argmax(-1)  # (M,)
    return answers


# --------------------------------------------------------------------------------------------------------------------
# Outcomes on disk
# --------------------------------------------------------------------------------------------------------------------


class Outcomes:
    """OUT/outcomes.jsonl: a line per example, method and budget. What is there is not computed again."""

    key = "task", "example", "method", "budget"

    def __init__(self, folder, settings):
        self.path = pathlib.Path(folder) / "outcomes.jsonl"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            text = self.path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot use {self.path} ({error}): give another folder with --out") from None
        lines = text.split("\n")
        self.torn = bool(lines.pop())  # a run was stopped while it wrote: that one line is lost, and computed again
        try:
            noted, *self.rows = [json.loads(line) for line in lines] or [{"settings": settings}]
            noted = noted["settings"]
            self.done = {tuple(row[name] for name in self.key) for row in self.rows}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path} is damaged ({error}): move it away, or give another --out") from None
        refuse_changes(noted, settings, f"{self.path} was made with", "give another --out")
        if self.torn:
            self.path.write_text("".join(line + "\n" for line in lines))
        if not lines:
            self.append({"settings": settings})

    def append(self, row):
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {self.path} ({error.strerror}): what is there stays") from None

    def missing(self, task, example, methods, budgets):
        """The (method, budget) pairs that have no outcome yet. Full attention knows no budget: its is 0."""
        pairs = [(method, budget) for budget in budgets for method in methods if not method.dense]
        pairs = [(method, 0) for method in methods if method.dense] + pairs
        return [(m, b) for m, b in pairs if (task, example, m.name, b) not in self.done]

    def add(self, task, example, method, budget, **values):
        row = dict(zip(self.key, (task, example, method.name, budget))) | values
        self.append(row)
        self.rows.append(row)
        self.done.add(tuple(row[name] for name in self.key))

    def of(self, task):
        return [row for row in self.rows if row["task"] == task]


# --------------------------------------------------------------------------------------------------------------------
# Tasks on text: perplexity, agreement, retrieval
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """What every task needs."""

    model: object
    tokenizer: object
    predictor: object
    config: Config
    methods: list[Method]
    outcomes: Outcomes
    args: argparse.Namespace

    def prompt(self, tokens, n_new, pairs):
        methods = {method.name: method for method, _ in pairs}
        return Prompt(self.model, self.predictor, self.config, tokens, n_new, methods.values())

    def batches(self, pairs):
        """Pairs with the same budget decode together."""
        for budget in sorted({budget for _, budget in pairs}):
            yield budget, [method for method, b in pairs if b == budget]

    def bar(self, name, total, unit="example"):
        return tqdm(desc=name, total=total, unit=unit, disable=self.args.quiet)


def texts_of(args, tokenizer, length, count):
    """`count` stretches of `length` tokens, named: of --text one behind another, else of the held-out reference."""
    if not args.text:
        documents = {"reference": python_documents()["reference"]}
        contexts = list(draw_contexts(documents, "test", [length], count, 1, 64, tokenizer, args.seed))
        return [(f"{context.name.split(': ')[0]}, {length} tokens", context.tokens[:length]) for context in contexts]
    tokens = tokenizer.encode("\n\n".join(document.text for document in read_texts(args.text)), special_tokens=False)
    if len(tokens) < length * count:
        raise InputError(
            f"--text holds {len(tokens)} tokens, {length * count} are needed: give more, or --contexts fewer"
        )
    return [(f"text {i}, {length} tokens", tokens[i * length : (i + 1) * length]) for i in range(count)]


def follow(bench, prompt, decoders, tokens):
    """Feed tokens, n of them, to all decoders. Yields logits (M, V) n - 1 times: after each token but the last."""
    for value in tokens[:-1].tolist():
        yield decode_together(bench.model, decoders, torch.full((len(decoders),), value))


def run_texts(bench):
    """Perplexity and agreement share their prompts."""
    args = bench.args
    tasks = [task for task in ("perplexity", "agreement") if task in args.tasks]
    if not tasks:
        return
    texts = texts_of(args, bench.tokenizer, args.context + args.continuation + 1, args.contexts)
    budgets = {"perplexity": args.budgets, "agreement": [args.budget]}
    work = [
        (name, tokens, {task: bench.outcomes.missing(task, name, bench.methods, budgets[task]) for task in tasks})
        for name, tokens in texts
    ]
    with bench.bar("text", sum(len(pairs) for *_, missing in work for pairs in missing.values()), "run") as bar:
        for name, tokens, missing in work:
            if not any(missing.values()):
                continue
            n_new = max(args.continuation, args.greedy_tokens) + 1
            prompt = bench.prompt(tokens[: args.context], n_new, [pair for pairs in missing.values() for pair in pairs])
            continuation = torch.tensor(tokens[args.context :])
            full = [prompt.decoder(FULL, 0)] if missing.get("perplexity") else []
            wanted = [logits.log_softmax(-1) for logits in follow(bench, prompt, full, continuation)] if full else []
            for budget, methods in bench.batches(missing.get("perplexity", [])):
                run_perplexity(bench, prompt, name, continuation, wanted, budget, methods)
                bar.update(len(methods))
            if missing.get("agreement"):
                run_agreement(bench, prompt, name, missing["agreement"])
                bar.update(len(missing["agreement"]))


def run_perplexity(bench, prompt, name, continuation, wanted, budget, methods):
    """continuation (n + 1,) tokens, of which n are read and n predicted; wanted: full attention's n log p, (1, V) each.

    The first token follows the dense prompt and is the same for all, hence not predicted here.
    """
    decoders = [prompt.decoder(method, budget) for method in methods]
    nll, kl = [], []  # n of (M,) each
    for logits, target, log_p in zip(follow(bench, prompt, decoders, continuation), continuation[1:], wanted):
        nll.append(F.cross_entropy(logits, target.expand(len(decoders)), reduction="none"))
        kl.append(divergence(log_p, logits))
    for i, (method, decoder) in enumerate(zip(methods, decoders)):
        recovery = torch.stack(decoder.recovery).mean(2)  # (steps, L')
        stats = decoder.stats
        calibration_bytes = stats.calibration_bytes if method.calibrates else 0
        bench.outcomes.add(
            "perplexity",
            name,
            method,
            budget,
            nll=rounded(torch.stack(nll)[:, i]),
            kl=rounded(torch.stack(kl)[:, i]),
            recovery_by_step=rounded(recovery.mean(1)),
            recovery_by_layer=rounded(recovery.mean(0)),
            kv_bytes=(stats.kv_bytes + calibration_bytes) / len(nll),
        )


def divergence(log_p, logits):
    """Kullback-Leibler divergence of softmax(logits), (M, V), from p: log_p (1, V) -> (M,), in nats."""
    return (log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1)


def run_agreement(bench, prompt, name, pairs):
    """Each method reads what full attention wrote: how often would it have written the same, and how far is it from it?

    Up to the first difference this is what the method would write by itself, so that is known too.
    """
    full, token, wanted = prompt.decoder(FULL, 0), prompt.logits.argmax()[None], []
    tokens = [token]
    for _ in range(bench.args.greedy_tokens):
        wanted.append(decode_together(bench.model, [full], token)[0])  # (V,)
        token = wanted[-1].argmax()[None]
        tokens.append(token)
    for budget, methods in bench.batches(pairs):
        decoders = [prompt.decoder(method, budget) for method in methods]
        same, kl = [], []
        for logits, true in zip(follow(bench, prompt, decoders, torch.cat(tokens)), wanted):
            same.append(logits.argmax(-1) == true.argmax())  # (M,)
            kl.append(divergence(true.log_softmax(-1)[None], logits))  # (M,)
        for i, method in enumerate(methods):
            agrees = torch.stack(same)[:, i]
            identical = int(agrees.int().cumprod(0).sum())
            values = dict(same=agrees.float().mean().item(), identical_tokens=identical)
            values |= dict(kl=round(torch.stack(kl)[:, i].mean().item(), 6))
            bench.outcomes.add("agreement", name, method, budget, **values)


COLOURS = "red", "blue", "green", "yellow"


def hidden_keys(tokenizer, filler, length, depth, n_keys, rng):
    """A prompt of `length` tokens with `n_keys` five-digit keys, and the one that it asks for, at `depth` (0 ... 1).

    The others lie at random depths. A single one is called the pass key.
    """
    names = [f"{colour} key" for colour in COLOURS[:n_keys]] if n_keys > 1 else ["pass key"]
    values = [str(rng.randrange(10000, 100000)) for _ in names]
    asked = rng.randrange(n_keys)
    needles = [
        f"\n\nThe {name} is {value}. Remember it: {value} is the {name}.\n\n" for name, value in zip(names, values)
    ]
    needles = [tokenizer.encode(needle, special_tokens=False) for needle in needles]
    question = f"\n\nWhat is the {names[asked]}? The {names[asked]} is"
    opening = "Some keys are hidden in the text that follows. Remember them.\n\n"
    opening, question = (tokenizer.encode(text, special_tokens=False) for text in (opening, question))
    room = length - len(opening) - len(question) - sum(map(len, needles))
    if room < 0:
        raise InputError(f"a text of {length} tokens has no room for {n_keys} keys: {length - room} would do")
    offset = rng.randrange(len(filler))
    body = (filler * (2 + room // len(filler)))[offset : offset + room]
    depths = [depth if i == asked else rng.random() for i in range(n_keys)]
    for place, needle in sorted(((round(d * room), needle) for d, needle in zip(depths, needles)), reverse=True):
        body[place:place] = needle
    return opening + body + question, values[asked]


def run_retrieval(bench):
    args = bench.args
    if "retrieval" not in args.tasks:
        return
    documents = read_texts(args.text) if args.text else python_documents()["reference"]
    text = "\n\n".join(document.text for document in documents if args.text or document.split == "test")
    filler = bench.tokenizer.encode(text, special_tokens=False)
    places = [
        (n_keys, length, depth, trial)
        for n_keys in args.keys
        for length in args.lengths
        for depth in args.depths
        for trial in range(args.trials)
    ]
    for n_keys, length, depth, trial in (bar := tqdm(places, "retrieval", unit="prompt", disable=args.quiet)):
        bar.set_postfix(keys=n_keys, length=length, depth=depth)
        example = f"{n_keys} keys, {length} tokens, depth {depth:g}, trial {trial}"
        pairs = bench.outcomes.missing("retrieval", example, bench.methods, [args.budget])
        if not pairs:
            continue
        rng = random.Random(f"{args.seed} {example}")
        tokens, key = hidden_keys(bench.tokenizer, filler, length, depth, n_keys, rng)
        n_new = len(bench.tokenizer.encode(f" {key}.", special_tokens=False))
        prompt = bench.prompt(tokens, n_new, pairs)
        decoders = [prompt.decoder(method, budget) for method, budget in pairs]
        for (method, budget), answer in zip(pairs, decode_greedily(bench.model, prompt, decoders, n_new)):
            text = bench.tokenizer.decode(answer)
            place = dict(keys=n_keys, length=length, depth=depth)
            found = first_number(text) == key
            bench.outcomes.add("retrieval", example, method, budget, answer=text, score=float(found), **place)


def rounded(x):
    return [round(value, 5) for value in x.tolist()]


# --------------------------------------------------------------------------------------------------------------------
# Tasks on downloaded files, and their metrics
# --------------------------------------------------------------------------------------------------------------------


def words(text):
    """Lower case, without punctuation and articles, as SQuAD and LongBench compare answers."""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return [word for word in text.split() if word not in ("a", "an", "the")]


def token_f1(answer, truth, classes=None):
    mine, true = words(answer), words(truth)
    common = sum((Counter(mine) & Counter(true)).values())
    return 2 * common / (len(mine) + len(true)) if common else 0.0


def rouge_l(answer, truth, classes=None):
    """F-measure of the longest common subsequence of words."""
    from rapidfuzz.distance import LCSseq

    mine, true = (re.findall(r"[a-z0-9]+", text.lower()) for text in (answer, truth))
    return 2 * LCSseq.similarity(mine, true) / max(1, len(mine) + len(true))


def code_similarity(answer, truth, classes=None):
    """Edit similarity of the first line that is code."""
    from rapidfuzz import fuzz

    lines = [
        line for line in answer.lstrip("\n").split("\n") if line and not any(mark in line for mark in ("`", "#", "//"))
    ]
    return fuzz.ratio(lines[0] if lines else "", truth) / 100


def first_number(text):
    found = re.search(r"\d+", text)
    return found and found[0]


def number_match(answer, truth, classes=None):
    """Share of the answer's numbers that are the true one."""
    numbers = re.findall(r"\d+", answer)
    return numbers.count(first_number(truth)) / len(numbers) if numbers else 0.0


def class_match(answer, truth, classes=None):
    """1 / the number of classes that the answer names, if the true one is among them."""
    named = [name for name in classes or [] if name in answer]
    named = [name for name in named if name == truth or name not in truth]
    return 1 / len(named) if truth in named else 0.0


def first_line(answer):
    return answer.lstrip("\n").split("\n")[0]


ASK = "Answer the question from the text alone, in as few words as you can.\n\n{context}\n\nQuestion: {input}\nAnswer:"
SUMMARISE = "Summarise the text on a page.\n\n{context}\n\nSummary:"
SHOTS = "Here are examples of a task. Solve the last one in the same way.\n\n{context}\n{input}"
PARAGRAPH = "{context}\n\nWhich of the paragraphs above is summarised here?\n\n{input}\n\nThe answer is: Paragraph"
COUNT = "{context}\n\nSome of the paragraphs above repeat others. How many different ones are there? The number is:"

# dataset -> prompt, new tokens, metric, whether only the answer's first line counts
LONGBENCH = {
    **dict.fromkeys(("narrativeqa", "qasper", "multifieldqa_en"), (ASK, 64, token_f1, False)),
    **dict.fromkeys(("hotpotqa", "2wikimqa", "musique"), (ASK, 32, token_f1, False)),
    **dict.fromkeys(("gov_report", "multi_news"), (SUMMARISE, 512, rouge_l, False)),
    "qmsum": ("{context}\n\nAnswer about this meeting in some sentences: {input}\nAnswer:", 512, rouge_l, False),
    "trec": (SHOTS, 64, class_match, True),
    "triviaqa": (SHOTS, 32, token_f1, True),
    "samsum": (SHOTS, 128, rouge_l, True),
    "passage_retrieval_en": (PARAGRAPH, 32, number_match, False),
    "passage_count": (COUNT, 32, number_match, False),
    "lcc": ("Write the next line of this program.\n{context}", 64, code_similarity, False),
    "repobench-p": ("Write the next line of this program.\n{context}{input}", 64, code_similarity, False),
}
AS_THEY_ARE = "trec", "triviaqa", "samsum", "lcc", "repobench-p"  # continued as text, without the chat template


def read_jsonl(path, fields):
    """The lines of a jsonl file, as dicts that have the fields."""
    rows = []
    try:
        lines = pathlib.Path(path).read_text("utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            lacking = [field for field in fields if field not in row]
        except (ValueError, TypeError):
            raise InputError(f"{path}, line {number}: this is not a JSON object") from None
        if not isinstance(row, dict) or lacking:
            raise InputError(f"{path}, line {number}: the fields {', '.join(fields)} are needed")
        rows.append(row)
    if not rows:
        raise InputError(f"{path} holds no example")
    return rows


@dataclass
class Question:
    task: str
    name: str
    text: str
    chat: bool
    n_new: int
    score: object  # answer -> 0 ... 1


def longbench_questions(path, limit):
    for number, row in enumerate(read_jsonl(path, ("dataset", "context", "input", "answers"))[:limit]):
        if row["dataset"] not in LONGBENCH:
            raise InputError(f"{path}: the dataset {row['dataset']!r} is not known: {', '.join(LONGBENCH)} are")
        template, n_new, metric, one_line = LONGBENCH[row["dataset"]]

        def score(answer, row=row, metric=metric, one_line=one_line):
            answer = first_line(answer) if one_line else answer
            return max((metric(answer, truth, row.get("all_classes")) for truth in row["answers"]), default=0.0)

        text = template.format(context=row["context"], input=row["input"])
        name = f"{row.get('_id') or number}"
        yield Question(row["dataset"], name, text, row["dataset"] not in AS_THEY_ARE, n_new, score)


def gsm8k_questions(path, limit, n_shots):
    rows = read_jsonl(path, ("question", "answer"))
    if len(rows) <= n_shots:
        raise InputError(f"{path} holds {len(rows)} examples, too few for {n_shots} in the prompt and one to solve")
    shots = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in rows[:n_shots])
    for number, row in enumerate(rows[n_shots:][:limit], n_shots):
        truth = final_number(row["answer"])
        if truth is None:
            raise InputError(f"{path}, example {number + 1}: its answer holds no number")

        def score(answer, truth=truth):
            return float(final_number(answer.split("\nQuestion:")[0]) == truth)

        yield Question("gsm8k", str(number), f"{shots}Question: {row['question']}\nAnswer:", False, 256, score)


def final_number(text):
    """The number behind ####, else the last one; None if there is none."""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", text.partition("####")[2].replace(",", "")) or re.findall(
        r"-?\d+(?:\.\d+)?", text.replace(",", "")
    )
    return float(numbers[0] if "####" in text else numbers[-1]) if numbers else None


def run_questions(bench, questions):
    """Too long a prompt loses its middle, as in LongBench."""
    tokenizer, args = bench.tokenizer, bench.args
    for question in tqdm(questions, "questions", unit="example", disable=args.quiet):
        pairs = bench.outcomes.missing(question.task, question.name, bench.methods, [args.budget])
        if not pairs:
            continue
        tokens = tokenizer.encode(question.text, special_tokens=False)
        room = bench.model.config.context_len - question.n_new - 64  # 64: for the chat template
        if len(tokens) > room:
            tokens = tokens[: room // 2] + tokens[-(room - room // 2) :]
        text = tokenizer.decode(tokens)
        if question.chat and tokenizer.has_chat_template:
            text = tokenizer.chat([{"role": "user", "content": text}])
        tokens = tokenizer.encode(text)
        prompt = bench.prompt(tokens, question.n_new, pairs)
        decoders = [prompt.decoder(method, budget) for method, budget in pairs]
        answers = decode_greedily(bench.model, prompt, decoders, question.n_new, bench.model.config.eos_token_ids)
        for (method, budget), answer in zip(pairs, answers):
            answer = tokenizer.decode(answer)
            values = dict(answer=answer, score=round(question.score(answer), 4), n_tokens=len(tokens))
            bench.outcomes.add(question.task, question.name, method, budget, **values)


# --------------------------------------------------------------------------------------------------------------------
# Summary
# --------------------------------------------------------------------------------------------------------------------


def mean_of(rows, value):
    return statistics.fmean(value(row) for row in rows)


def grouped(rows, *names):
    """{values of `names`: rows}, in order of appearance."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def summarise_perplexity(rows):
    """Per method and budget: perplexity, its increase over full attention's with a standard error, KL, recovery, bytes.

    A method is compared with full attention on the tokens of the texts that both have.
    """
    full = {row["example"]: row["nll"] for row in rows if row["method"] == FULL.name}
    summary = []
    for (method, budget), members in grouped(rows, "method", "budget").items():
        nll = [value for row in members for value in row["nll"]]
        entry = {"method": method, "budget": budget, "perplexity": math.exp(statistics.fmean(nll)), "tokens": len(nll)}
        extra = [a - b for row in members if row["example"] in full for a, b in zip(row["nll"], full[row["example"]])]
        if len(extra) > 1:
            mean, error = statistics.fmean(extra), statistics.stdev(extra) / math.sqrt(len(extra))
            entry |= {"increase": math.expm1(mean), "standard_error": math.exp(mean) * error}
        entry["kl"] = mean_of(members, lambda row: statistics.fmean(row["kl"]))
        entry["recovery"] = mean_of(members, lambda row: statistics.fmean(row["recovery_by_step"]))
        for axis in ("recovery_by_layer", "recovery_by_step"):
            columns = zip(*(row[axis] for row in members))  # as long as the shortest
            entry[axis] = [round(statistics.fmean(column), 5) for column in columns]
        entry["kv_bytes"] = mean_of(members, lambda row: row["kv_bytes"])
        summary.append(entry)
    return summary


def summarise(outcomes):
    tasks = {task for (task,) in grouped(outcomes.rows, "task")}
    results = {"perplexity": summarise_perplexity(outcomes.of("perplexity"))}
    results["agreement"] = [
        {"method": method, "budget": budget, "texts": len(rows)}
        | {name: mean_of(rows, itemgetter(name)) for name in ("same", "identical_tokens", "kl")}
        for (method, budget), rows in grouped(outcomes.of("agreement"), "method", "budget").items()
    ]
    results["retrieval"] = [
        dict(zip(("method", "budget", "keys", "length", "depth"), key))
        | {"score": mean_of(rows, lambda row: row["score"])}
        for key, rows in grouped(outcomes.of("retrieval"), "method", "budget", "keys", "length", "depth").items()
    ]
    results["questions"] = [
        {"task": task, "method": method, "budget": budget, "examples": len(rows)}
        | {"score": mean_of(rows, lambda row: row["score"])}
        for task in sorted(tasks - set(results))
        for (method, budget), rows in grouped(outcomes.of(task), "method", "budget").items()
    ]
    return results


def markdown_table(rows, columns, corner="method"):
    """rows {name: {column: text}}."""
    lines = [[corner, *map(str, columns)], ["---"] * (1 + len(columns))]
    lines += [[name, *(cells.get(column, "–") for column in columns)] for name, cells in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tabulate(entries, column, text):
    """{method: {column(entry): text(entry)}}; what full attention has under budget 0 goes into every column."""
    columns = list(dict.fromkeys(column(entry) for entry in entries if entry["budget"]))
    rows = {}
    for entry in entries:
        places = [column(entry)] if entry["budget"] or column(entry) in columns else columns
        rows.setdefault(entry["method"], {}).update(dict.fromkeys(places, text(entry)))
    return rows, columns


def write_markdown(results, settings):
    parts = [", ".join(f"{name} {value}" for name, value in settings.items())]
    if entries := results["perplexity"]:

        def cell(entry):
            plain = f"{entry['perplexity']:.3f}"
            more = f" ({entry['increase']:+.1%} ± {entry['standard_error']:.1%})" if "increase" in entry else ""
            return plain + more * (entry["method"] != FULL.name)

        by_budget = itemgetter("budget")
        title = (
            f"Perplexity of {entries[0]['tokens']:,} tokens (increase over full attention ± standard error), by budget"
        )
        parts += [f"## {title}", markdown_table(*tabulate(entries, by_budget, cell))]
        table = tabulate(entries, by_budget, lambda entry: f"{entry['kl']:.4f}")
        parts += ["## KL divergence from full attention, nats a token, by budget", markdown_table(*table)]
        table = tabulate(entries, by_budget, lambda entry: f"{entry['recovery']:.3f}")
        parts += ["## Recovery: share of the true attention that was attended, by budget", markdown_table(*table)]
        table = tabulate(entries, by_budget, lambda entry: f"{entry['kv_bytes'] / 1e6:.1f}")
        parts += [
            "## MB of K and V read a token by attention and calibration, by budget (what Quest and the oracle read to "
            "choose is not counted)",
            markdown_table(*table),
        ]
    if entries := results["agreement"]:
        rows = {
            entry["method"]: {
                "same token": f"{entry['same']:.1%}",
                "tokens up to the first difference": f"{entry['identical_tokens']:.1f}",
                "KL divergence": f"{entry['kl']:.4f}",
            }
            for entry in entries
        }
        budget = max(entry["budget"] for entry in entries)
        columns = list(next(iter(rows.values())))
        parts += [f"## Agreement with full attention's greedy tokens, budget {budget}", markdown_table(rows, columns)]
    if entries := results["retrieval"]:
        means = [
            {
                "method": method,
                "budget": budget,
                "keys": keys,
                "length": length,
                "score": mean_of(members, lambda e: e["score"]),
            }
            for (method, budget, keys, length), members in grouped(
                entries, "method", "budget", "keys", "length"
            ).items()
        ]
        table = tabulate(
            means,
            lambda e: f"{'pass-key' if e['keys'] == 1 else str(e['keys']) + ' needles'}, {e['length']}",
            lambda e: f"{e['score']:.0%}",
        )
        budget = max(entry["budget"] for entry in entries)
        parts += [f"## Keys found, by task and length, mean over depths, budget {budget}", markdown_table(*table)]
    if entries := results["questions"]:
        table = tabulate(entries, lambda e: f"{e['task']} ({e['examples']})", lambda e: f"{100 * e['score']:.1f}")
        parts += ["## LongBench and GSM8K: score (examples)", markdown_table(*table)]
    return "\n\n".join(parts) + "\n"


def write_results(outcomes, settings):
    import plots

    folder = outcomes.path.parent
    results = summarise(outcomes)
    text = write_markdown(results, settings)
    try:
        (folder / "results.json").write_text(json.dumps({"settings": settings} | results, indent=1))
        (folder / "results.md").write_text(text)
        if results["perplexity"]:
            plots.draw_perplexity(results["perplexity"], folder / "perplexity.png")
            plots.draw_recovery(results["perplexity"], folder / "recovery.png")
        for keys in sorted({entry["keys"] for entry in results["retrieval"]}):
            name = "pass-key" if keys == 1 else f"{keys}-needles"
            plots.draw_retrieval([e for e in results["retrieval"] if e["keys"] == keys], folder / f"{name}.png")
    except OSError as error:
        raise InputError(
            f"cannot write to {folder} ({error.strerror}): the outcomes stay; make room and run again"
        ) from None
    return text


# --------------------------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------------------------

TASKS = "perplexity", "agreement", "retrieval"
QUICK = dict(context=512, continuation=12, contexts=1, budgets=[256], budget=256, greedy_tokens=6)
QUICK |= dict(lengths=[512], depths=[0.3], keys=[1], trials=1)


def parse_args(argv):
    parser = OneLineParser(
        description=__doc__, formatter_class=type("Help", (ShownDefaults, argparse.RawDescriptionHelpFormatter), {})
    )
    parser.add_argument("--out", required=True, help="folder for outcomes, results and pictures")
    parser.add_argument("--tasks", nargs="*", default=TASKS, choices=TASKS, help="none: only the files given")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD", help="; ".join(METHODS))
    parser.add_argument("--quick", action="store_true", help="a small version of every task, for a test")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of texts and keys")
    group = parser.add_argument_group("model and method")
    group.add_argument("--model", help=f"Hugging Face folder or hub id (default: {DEFAULT_LLM}, fetched once)")
    group.add_argument("--predictor", default=DEFAULT_PREDICTOR, help="the convolution: safetensors or state dict")
    group.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    group.add_argument("--calibration-interval", type=int, default=Config.calibration_interval, help="M")
    group.add_argument("--dense-layers", type=int, default=Config.dense_layers)
    group = parser.add_argument_group("perplexity and agreement")
    group.add_argument(
        "--text", nargs="+", metavar="FILE", help="your own texts (default: Python's language reference)"
    )
    group.add_argument("--context", type=int, default=4096, help="tokens of a prompt")
    group.add_argument("--continuation", type=int, default=128, help="tokens decoded behind it")
    group.add_argument("--contexts", type=int, default=2, help="number of texts")
    group.add_argument("--budgets", type=int, nargs="+", default=[256, 512, 1024, 2048], help="for perplexity")
    group.add_argument("--greedy-tokens", type=int, default=64, help="for agreement")
    group = parser.add_argument_group("retrieval")
    group.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096], help="tokens of a prompt")
    group.add_argument("--depths", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75, 1], help="0: the beginning")
    group.add_argument("--keys", type=int, nargs="+", default=[1, 4], choices=range(1, 5), help="hidden in a text")
    group.add_argument("--trials", type=int, default=1, help="prompts for each place")
    group = parser.add_argument_group("downloaded files (see above)")
    group.add_argument("--longbench", nargs="+", default=[], metavar="FILE", help="a jsonl file a dataset")
    group.add_argument("--gsm8k", metavar="FILE", help="a jsonl file")
    group.add_argument("--gsm8k-shots", type=int, default=8, help="worked examples in the prompt")
    group.add_argument("--limit", type=int, help="only the first so many examples of a file")
    group.add_argument("--budget", type=int, default=512, help="for agreement, retrieval and files")
    args = parser.parse_args(argv)
    return argparse.Namespace(**vars(args) | (QUICK if args.quick else {}))


def check(args, context_len):
    for name in ("context", "continuation", "contexts", "greedy_tokens", "trials", "limit"):
        if (getattr(args, name) or 1) < 1 or getattr(args, name) == 0:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1")
    if args.gsm8k_shots < 0:
        raise InputError("--gsm8k-shots must not be negative")
    unknown = [name for name in args.methods if name not in METHODS]
    if unknown:
        raise InputError(f"method {unknown[0]!r} is not known: {'; '.join(METHODS)} are")
    if not all(0 <= depth <= 1 for depth in args.depths):
        raise InputError("--depths lie in 0 ... 1")
    longest = args.context + max(args.continuation, args.greedy_tokens) + 1, max(args.lengths) + 16
    if max(longest) > context_len:
        raise InputError(f"the model's context is {context_len} tokens: {max(longest)} is too long")


def run(args):
    questions = [q for path in args.longbench for q in longbench_questions(path, args.limit)]
    questions += list(gsm8k_questions(args.gsm8k, args.limit, args.gsm8k_shots)) if args.gsm8k else []
    for library in ("matplotlib", *["rapidfuzz"] * bool(questions)):
        if importlib.util.find_spec(library) is None:
            raise InputError(f"this needs {library}: pip install {library}")
    config = Config(calibration_interval=args.calibration_interval, dense_layers=args.dense_layers)
    for budget in (*args.budgets, args.budget):
        replace(config, budget=budget)  # raises where a budget does not fit
    predictor = load_predictor(args.predictor)
    model, tokenizer = load_model(args.model or str(fetch_default_llm()), getattr(torch, args.dtype), "cpu")
    check(args, model.config.context_len)
    digest = hashlib.sha256(pathlib.Path(args.predictor).read_bytes()).hexdigest()[:12]
    settings = {"model": pathlib.Path(args.model).name if args.model else DEFAULT_LLM, "predictor": digest}
    settings |= {"dtype": args.dtype, "seed": args.seed, "text": [*map(str, args.text)] if args.text else "held out"}
    settings |= {name: value for name, value in asdict(config).items() if name not in ("budget", "select_heads")}
    methods = [METHODS[name] for name in args.methods]
    outcomes = Outcomes(args.out, settings)
    bench = Bench(model, tokenizer, predictor, config, methods, outcomes, args)
    torch.manual_seed(args.seed)
    run_texts(bench)
    run_retrieval(bench)
    run_questions(bench, questions)
    print(write_results(outcomes, settings))


def main(argv=None) -> int:
    return exit_status("evaluate", lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
