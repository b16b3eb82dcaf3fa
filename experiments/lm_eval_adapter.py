"""Lets the `lm-eval` package (EleutherAI's lm-evaluation-harness) measure a setting on its tasks, such as RULER's.

The prompt of a request is read densely; every later token is decoded with the setting. Only tasks that generate text
are supported, because the score of a given answer depends mostly on the token after the prompt, which is always dense.
"""

import lm_eval
import torch
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from attnpred import InputError
from experiments.evaluate import decode_together, digest, prefill_together, with_budgets
from weights.fetch_llm import fetch_default_llm


class SparseLM(LM):
    """lm-eval's interface to a Setting of evaluate.py, on a model with a predictor."""

    def __init__(self, setting, model, tokenizer, predictor):
        super().__init__()
        self.setting, self.model, self.tokenizer, self.predictor = setting, model, tokenizer, predictor

    def generate_until(self, requests):
        return [self.generate(*r.args) for r in tqdm(requests, "generate_until", disable=None)]

    def generate(self, context, options):
        """Greedy text before the first of the stop strings. The beginning of a prompt that is too long is cut off."""
        if options.get("do_sample") and options.get("temperature", 1):
            raise InputError("tasks of lm-eval that sample are not supported: use one that decodes greedily")
        stops, limit = options.get("until") or [], options.get("max_gen_toks", 256)
        tokens = torch.tensor(self.tokenizer.encode(context)[-(self.model.config.context_len - limit) :])  # (T,)
        decoders, logits = prefill_together(self.model, self.predictor, [self.setting], tokens, len(tokens), limit)
        ids, text = [], ""
        while len(ids) < limit and (token := logits.argmax().item()) not in self.model.config.eos_token_ids:
            ids.append(token)
            text = self.tokenizer.decode(ids)
            cuts = [text.index(stop) for stop in ([stops] if isinstance(stops, str) else stops) if stop in text]
            if cuts:
                return text[: min(cuts)]
            logits = decode_together(self.model, decoders, torch.tensor([token]))  # (1, V)
        return text

    def loglikelihood(self, requests):
        raise InputError("tasks of lm-eval that rate given answers are not supported: use one that generates text")

    loglikelihood_rolling = loglikelihood


def run_tasks(args, store, model, tokenizer, predictor):
    """Add a row of `scores` per task and setting. RULER's tasks make texts of `--lengths` tokens of the tokenizer."""
    metadata = {"tokenizer": args.model or str(fetch_default_llm()), "max_seq_lengths": args.lengths}
    manager, length = TaskManager(include_path=args.include_path, metadata=metadata), model.config.context_len
    for task in args.lm_tasks:
        if not manager.match_tasks([task]):
            raise InputError(f"task {task!r} of lm-eval is unknown: give the folder of your own with --include-path")
        values = dict(task=args.task, text=task, sha256=digest([args.limit, args.lengths]), n_prompt=length, n_new=0)
        for setting in store.missing(with_budgets(args.settings, model, length - 1, 1), values):
            lm = SparseLM(setting, model, tokenizer, predictor)
            options = dict(tasks=[task], task_manager=manager, limit=args.limit, bootstrap_iters=0)
            found = lm_eval.simple_evaluate(lm, **options)["results"][task]
            scores = {name: value for name, value in found.items() if isinstance(value, float)}
            store.add(setting, values, dict(scores=scores))
