"""Lets the `lm-eval` package (EleutherAI's lm-evaluation-harness) measure a setting on its tasks, such as RULER's.

The prompt of a request is read densely; every later token is decoded with the setting. Only tasks that generate text
are supported, because the score of a given answer depends mostly on the token after the prompt, which is always dense.
"""

import sys

import lm_eval
import torch
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from attnpred import InputError, require


class SparseLM(LM):
    """lm-eval's interface to a model and its tokenizer.

    read_prompt(tokens (T,), n_new) returns a decoder that has read the prompt, and the next token's logits (V,).
    """

    def __init__(self, model, tokenizer, read_prompt):
        super().__init__()
        self.model, self.tokenizer, self.read_prompt = model, tokenizer, read_prompt

    def generate_until(self, requests):
        return [self.generate(*r.args) for r in tqdm(requests, "generate_until", disable=None)]

    def generate(self, context, options):
        """Greedy text before the first of the stop strings. The beginning of a prompt that is too long is cut off."""
        if options.get("do_sample") and options.get("temperature", 1):
            raise InputError("tasks of lm-eval that sample are not supported: use one that decodes greedily")
        stops, limit = options.get("until") or [], options.get("max_gen_toks", 256)
        room = self.model.config.context_len - limit
        require(room >= 1, f"max_gen_toks {limit} of the task leaves no room for a prompt: set a smaller one")
        tokens = self.tokenizer.encode(context, control_tokens=False)
        if len(tokens) > room:
            print(f"evaluate: a prompt of {len(tokens)} tokens is cut to its last {room}", file=sys.stderr)
        tokens = torch.tensor(tokens[-room:])  # (T,)
        decoder, logits = self.read_prompt(tokens, limit)
        ids, text = [], ""
        while len(ids) < limit and (token := logits.argmax().item()) not in self.model.config.eos_token_ids:
            ids.append(token)
            text = self.tokenizer.decode(ids)
            cuts = [text.index(stop) for stop in ([stops] if isinstance(stops, str) else stops) if stop in text]
            if cuts:
                return text[: min(cuts)]
            logits = decoder.decode(torch.tensor([token]))  # (V,)
        return text

    def loglikelihood(self, requests):
        raise InputError("tasks of lm-eval that rate given answers are not supported: use one that generates text")

    loglikelihood_rolling = loglikelihood


class Questions(SparseLM):
    """Answers nothing, and keeps what was asked."""

    def __init__(self):
        super().__init__(None, None, None)
        self.asked = []

    def generate(self, context, options):
        self.asked.append((context, options))
        return ""


def content(task, manager, limit) -> list:
    """What identifies the texts of a task: its prompts, options and targets."""
    lm = Questions()
    samples = lm_eval.simple_evaluate(lm, tasks=[task], task_manager=manager, limit=limit, bootstrap_iters=0)["samples"]
    return [lm.asked, *([sample["target_hash"] for sample in part] for part in samples.values())]


def find_tasks(names, include_path, metadata) -> TaskManager:
    """A TaskManager that knows the tasks of these names. Raises InputError."""
    manager = TaskManager(include_path=include_path, metadata=metadata)
    for name in names:
        if not manager.match_tasks([name]):
            raise InputError(f"task {name!r} of lm-eval is unknown: give the folder of your own with --include-path")
    return manager


def scores(task, manager, limit, *lm) -> dict[str, float]:
    """The scores of one task by metric, for at most `limit` examples. lm: the arguments of SparseLM."""
    options = dict(tasks=[task], task_manager=manager, limit=limit, bootstrap_iters=0)
    found = lm_eval.simple_evaluate(SparseLM(*lm), **options)["results"][task]
    return {name: value for name, value in found.items() if isinstance(value, float)}
