"""Lets the `lm-eval` package (EleutherAI's lm-evaluation-harness) measure a setting on its tasks, such as LongBench.

The context of a request is read densely; every token after it is decoded as the setting says.
"""

import lm_eval
import torch
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from attnpred import InputError
from experiments.evaluate import Prompt, decode_together, digest
from weights.fetch_llm import fetch_default_llm


class SparseLM(LM):
    def __init__(self, bench, setting):
        super().__init__()
        self.bench, self.model, self.tokenizer = bench, bench.model, bench.tokenizer
        self.setting, self.tokens = setting, None

    def read(self, tokens, n_new):
        """A decoder after the prompt `tokens`, and the next token's logits (V,). The last prompt is kept for reuse."""
        tokens = tokens[-(self.model.config.context_len - n_new) :]  # as the package does for other models
        if self.tokens != tokens:
            self.tokens = tokens
            self.prompt = Prompt(self.model, self.bench.predictor, torch.tensor(tokens), len(tokens), [self.setting])
        return self.prompt.decoder(self.setting, n_new), self.prompt.logits[-1]

    def loglikelihood(self, requests):
        return [self.judge(*r.args) for r in tqdm(requests, "loglikelihood", disable=self.bench.args.quiet)]

    def judge(self, context, continuation):
        """(log-probability of the continuation, whether it is the greedy one)."""
        text = context.rstrip()  # the blanks before the continuation belong to it
        tokens = self.tokenizer.encode(text) or list(self.model.config.eos_token_ids[:1])
        targets = self.tokenizer.encode(context + continuation)[len(self.tokenizer.encode(text)) :]
        decoder, logits = self.read(tokens, len(targets))
        rows = [logits]  # (V,) each
        for token in targets[:-1]:
            rows.append(decode_together(self.model, [decoder], torch.tensor([token]))[0])
        log_p, targets = torch.stack(rows).log_softmax(-1), torch.tensor(targets)  # (n, V), (n,)
        return log_p.gather(1, targets[:, None]).sum().item(), bool((log_p.argmax(-1) == targets).all())

    def generate_until(self, requests):
        return [self.generate(*r.args) for r in tqdm(requests, "generate_until", disable=self.bench.args.quiet)]

    def generate(self, context, options):
        """Greedy text up to the first of the stop strings."""
        if options.get("do_sample") and options.get("temperature", 1):
            raise InputError("tasks of lm-eval that sample are not supported: use one that decodes greedily")
        stops, limit = options.get("until") or [], options.get("max_gen_toks", 256)
        decoder, logits = self.read(self.tokenizer.encode(context), limit)
        ids, text = [], ""
        while len(ids) < limit and (token := logits.argmax().item()) not in self.model.config.eos_token_ids:
            ids.append(token)
            text = self.tokenizer.decode(ids)
            cuts = [text.index(stop) for stop in ([stops] if isinstance(stops, str) else stops) if stop in text]
            if cuts:
                return text[: min(cuts)]
            logits = decode_together(self.model, [decoder], torch.tensor([token]))[0]
        return text

    def loglikelihood_rolling(self, requests):
        raise InputError("tasks of lm-eval that rate whole texts are not supported: use `evaluate texts`")


def run_tasks(bench):
    """Adds a row of scores per task and setting. RULER's tasks make texts of `--lengths` tokens of the tokenizer."""
    args, length = bench.args, bench.model.config.context_len
    metadata = {"tokenizer": args.model or str(fetch_default_llm()), "max_seq_lengths": args.lengths}
    manager = TaskManager(include_path=args.include_path, metadata=metadata)
    for task in args.lm_tasks:
        if not manager.match_tasks([task]):
            raise InputError(f"task {task!r} of lm-eval is unknown: give the folder of your own with --include-path")
        values = dict(task=args.task, text=task, sha256=digest([args.limit, args.lengths]), n_prompt=length, n_new=0)
        for setting in bench.store.missing(bench.settings(length - 1, 1), **values):
            model, options = SparseLM(bench, setting), dict(limit=args.limit, bootstrap_iters=0)
            found = lm_eval.simple_evaluate(model, tasks=[task], task_manager=manager, **options)["results"][task]
            scores = {name: value for name, value in found.items() if isinstance(value, float)}
            bench.store.add(setting, **values, scores=scores)
