"""Lets the `lm-eval` package (EleutherAI's lm-evaluation-harness) measure a setting on its tasks, such as LongBench.

The context of a request is read densely; every token after it is decoded as the setting says.
"""

import lm_eval
import torch
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from attnpred import InputError
from experiments.evaluate import Prompt, decode_together
from weights.fetch_llm import fetch_default_llm


class SparseLM(LM):
    def __init__(self, bench, setting):
        super().__init__()
        self.model, self.tokenizer, self.predictor = bench.model, bench.tokenizer, bench.predictor
        self.setting, self.quiet, self.prompt = setting, bench.args.quiet, None

    def read(self, tokens, n_new):
        """A decoder after the prompt `tokens`, and the next token's logits (V,). The last prompt is kept for reuse."""
        tokens = tokens[-(self.model.config.context_len - n_new) :]  # as the package does for other models
        capacity = len(tokens) + n_new
        if self.prompt is None or self.tokens != tokens or self.prompt.capacity < capacity:
            self.tokens = tokens
            self.prompt = Prompt(
                self.model, self.predictor, torch.tensor(tokens), len(tokens), capacity, [self.setting]
            )
        return self.prompt.decoder(self.setting), self.prompt.logits[-1]

    def loglikelihood(self, requests):
        return [self.judge(*r.args) for r in tqdm(requests, "loglikelihood", disable=self.quiet)]

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
        return [self.generate(*r.args) for r in tqdm(requests, "generate_until", disable=self.quiet)]

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

    @property
    def tokenizer_name(self):
        return "attnpred"

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return self.tokenizer.chat(chat_history)


def evaluate_tasks(bench, setting, task) -> dict:
    """The task's metrics by name. RULER's tasks make texts of `--lengths` tokens of the model's tokenizer."""
    args = bench.args
    metadata = {"tokenizer": args.model or str(fetch_default_llm()), "max_seq_lengths": args.lengths}
    options = dict(include_path=args.include_path, metadata=metadata)
    manager = TaskManager(include_defaults=not args.include_path, **options)  # the defaults take a while
    if args.include_path and not manager.match_tasks([task]):
        manager = TaskManager(**options)
    if not manager.match_tasks([task]):
        raise InputError(f"task {task!r} of lm-eval is unknown: give the folder of your own with --include-path")
    found = lm_eval.simple_evaluate(
        SparseLM(bench, setting), tasks=[task], task_manager=manager, limit=args.limit, bootstrap_iters=0
    )
    return {name: value for name, value in found["results"][task].items() if isinstance(value, float)}
