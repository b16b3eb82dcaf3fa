"""The share of the true attention that the attended tokens carry: the predictor against every rival, on unseen text.

    python recovery.py

prints Markdown tables and draws pictures into images/. Reading order: `DensePass` (one pass over a text judges with
true histories, and leaves decoders at the end of the prompt), `closed_loop`, the tables, the pictures, the command
line.

True history: every row so far is known, and each step is judged by itself. Closed loop: the tokens behind the prompt
are decoded one by one, sparsely, so the history holds what earlier choices let through, and a true row each M-th
step.
"""

import argparse
import hashlib
import json
import os
import pathlib
import statistics
import sys
from dataclasses import replace

import torch
from tqdm import tqdm

import kernels
from attnpred import DEFAULT_PREDICTOR, Config, InputError, OneLineParser, decode_one_token, exit_status, load_predictor
from model import causal_attention, load_model
from rivals import RIVALS, Convolution, RivalDecoder, Seen, block_mass
from train_predictor import (
    add_corpus,
    draw_contexts,
    in_blocks,
    make_folder,
    python_documents,
    refuse_changes,
    save_figure,
    scores_of_rows,
    text_documents,
)
from weights.fetch_llm import fetch_default_llm

OURS = "AttentionPredictor"


SHOWN_HEADS = 3  # in the picture of predicted rows


# --------------------------------------------------------------------------------------------------------------------
# One text
# --------------------------------------------------------------------------------------------------------------------


class DensePass:
    """The `attend` of one dense pass over a text: fills decoders up to the prompt, and judges the rows behind it."""

    def __init__(self, decoders, methods, n_prompt, predictor, args):
        self.decoders, self.methods, self.n_prompt = decoders, methods, n_prompt
        self.predictor, self.args = predictor, args
        self.recovery = {}  # (select_heads, budget, method) -> mean recovery, a sparse layer each
        self.pictures = []  # (attention of the middle, layer, head, actual rows, predicted rows), a sparse layer each

    def __call__(self, layer, q, k, v):
        prompt = [x[:, : self.n_prompt] for x in (q, k, v)]
        for decoder in self.decoders:
            decoder.n_tokens = self.n_prompt
            decoder.prefill_attention(layer, *prompt)
        if layer >= self.decoders[0].config.dense_layers:
            self.judge(layer, q, k)
        return causal_attention(layer, q, k, v)

    def judge(self, layer, q, k):
        """Recovery of every `stride`-th row behind the prompt, with true histories: q (Hq, T, D), k (Hk, T, D)."""
        config, n_tokens = self.decoders[0].config, q.shape[1]
        n_judged = n_tokens - self.n_prompt
        k_cache = in_blocks(k, config.block_size)  # (Hk, N, b, D)
        pooled, _ = kernels.pool_history(
            q[:, -n_judged - config.history_len :], k_cache, n_tokens
        )  # (Hq, H + n_judged, N)
        mass = block_mass(q[:, self.n_prompt :], k_cache, n_tokens)  # (Hq, n_judged, N)
        notes = self.decoders[0].notes
        memory = {method: dict(notes[method][layer - config.dense_layers]) for method in notes}
        self.draw(layer, self.decoders[0].group_mean(pooled))
        sums = {}
        for i in range(n_judged):
            if i % self.args.stride == 0:
                n_seen = self.n_prompt + i + 1
                start, end = config.middle(n_seen)
                for decoder in self.decoders:
                    rows = pooled[:, i : i + config.history_len, : config.n_blocks(n_seen)]  # (Hq, H, N)
                    true = decoder.group_mean(mass[:, i : i + 1])[:, 0]  # (heads, N)
                    seen = Seen(decoder.group_mean(rows), k_cache, n_seen, start, end, q=q[:, n_seen - 1])
                    for method in self.methods:
                        seen.memory = memory.get(method)
                        scores = method.score(seen).expand(decoder.heads, -1)  # (heads, n)
                        for budget in self.args.budgets:
                            recovery = recovered(scores, true, start, end, replace(config, budget=budget).topk_blocks)
                            sums.setdefault((decoder.config.select_heads, budget, method.name), []).append(recovery)
            for method in memory:
                method.observe(mass[:, i], memory[method])
        for key, values in sums.items():
            self.recovery.setdefault(key, []).append(statistics.fmean(values))

    def draw(self, layer, rows):
        """Note actual and predicted rows of the head whose middle carries the most: rows (heads, R, N)."""
        config = self.decoders[0].config
        start, end = config.middle(self.n_prompt)
        middle = rows[..., start:end]  # (Hk, R, n)
        head = middle.sum((1, 2)).argmax().item()
        targets = torch.arange(config.history_len, rows.shape[1])
        predicted = scores_of_rows(middle[head, None], targets, self.predictor.state_dict(), config.history_len)[0]
        self.pictures.append((middle[head].sum().item(), layer, head, middle[head, targets], predicted))


def recovered(scores, mass, start, end, topk_blocks):
    """Mean over heads of what sink, local and the best blocks carry: scores (heads, n), mass (heads, N)."""
    blocks = kernels.select_blocks(scores, min(topk_blocks, end - start)).long() + start if topk_blocks else None
    chosen = mass.gather(1, blocks).sum(1) if topk_blocks else 0.0
    return (mass[:, :start].sum(1) + mass[:, end:].sum(1) + chosen).mean().item()


class Results:
    """Recovery of all runs so far, and multiply-adds; in a JSON file, if one is named, for a later call to go on from.

    An entry is one text, mode, selection, budget and method, with the recovery of each sparse layer.
    """

    def __init__(self, path, settings, predictor):
        self.path = pathlib.Path(path) if path else None
        self.content = {"settings": settings, "entries": [], "multiply_adds": {}}
        if self.path and self.path.exists():
            try:
                self.content = json.loads(self.path.read_text())
                noted = self.content["settings"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path} is no file of earlier results ({error}): give another --json") from None
            refuse_changes(noted, settings, f"{path} was made with", "give another --json")
        weights = b"".join(w.numpy().tobytes() for w in predictor.state_dict().values())
        self.predictor = hashlib.sha256(weights).hexdigest()[:16]
        known = self.content["entries"]
        self.content["entries"] = [e for e in known if e["method"] != OURS or e["predictor"] == self.predictor]

    def missing(self, methods, **run):
        """Those of the methods that have no entry for this run: length, text, mode, select_heads, budget."""
        known = {e["method"] for e in self.content["entries"] if all(e[name] == run[name] for name in run)}
        return [method for method in methods if method.name not in known]

    def add(self, method, layers, **run):
        entry = {"method": method.name, "predictor": self.predictor, "layers": [round(x, 6) for x in layers]}
        self.content["entries"].append(run | entry)
        if self.path:
            scratch = self.path.with_name(f".{self.path.name}.partial")
            try:
                scratch.write_text(json.dumps(self.content, indent=0))
                os.replace(scratch, self.path)
            except OSError as error:
                raise InputError(f"cannot write {self.path} ({error}): what was there stays") from None

    def layers(self, **wanted):
        """Recovery by layer, the mean of the entries with these properties."""
        found = [e["layers"] for e in self.content["entries"] if all(e[name] == wanted[name] for name in wanted)]
        return [statistics.fmean(values) for values in zip(*found)]

    def mean(self, **wanted):
        return statistics.fmean(self.layers(**wanted))


def judge(args):
    """All lengths, texts, selections, budgets and methods: Results, and what `draw_rows` draws."""
    predictor = load_predictor(args.predictor)
    documents = text_documents(args.text) if args.text else python_documents()
    model, tokenizer = load_model(args.model or str(fetch_default_llm()), getattr(torch, args.dtype), "cpu")
    config = Config(dense_layers=args.dense_layers)
    if max(args.lengths) > model.config.context_len:
        raise InputError(f"the model's context is {model.config.context_len} tokens: {max(args.lengths)} is too long")
    if min(args.lengths) - args.steps < max(args.budgets) + config.history_len:
        raise InputError(
            f"{min(args.lengths)} tokens, {args.steps} of them decoded, are too few for a budget of {max(args.budgets)}"
        )
    settings = {name: getattr(args, name) for name in ("model", "dtype", "dense_layers", "steps", "stride", "seed")}
    results, pictures = Results(args.json, settings, predictor), []
    methods = [Convolution(predictor), *(rival() for rival in RIVALS.values())]
    n_runs = len(args.lengths) * args.contexts * len(args.select_heads) * len(args.budgets) * len(methods)
    with tqdm(total=n_runs, desc="judging", unit="run", disable=args.quiet) as bar:
        for length in args.lengths:
            for context in draw_contexts(documents, "test", [length], args.contexts, 1, 1, tokenizer, args.seed):
                found = judge_context(model, predictor, config, context, methods, results, args, bar)
                pictures = pictures or found
    return results, pictures


def judge_context(model, predictor, config, context, methods, results, args, bar):
    """One text, with true histories and in closed loop; returns the heads to draw."""
    length, n_prompt = len(context.tokens), len(context.tokens) - args.steps
    decoders = [
        RivalDecoder(replace(config, select_heads=select), model, predictor, length, methods[1:])
        for select in args.select_heads
    ]
    for decoder in decoders[1:]:
        decoder.rivals, decoder.notes = (), decoders[0].notes  # what is noted of a prompt holds for any selection
    dense = DensePass(decoders, methods, n_prompt, predictor, args)
    model.hidden(torch.tensor(context.tokens), torch.arange(length), dense)
    for decoder in decoders:
        for budget in args.budgets:
            run = {
                "length": length,
                "text": context.name,
                "select_heads": decoder.config.select_heads,
                "budget": budget,
            }
            for method in results.missing(methods, mode="true history", **run):
                layers = dense.recovery[run["select_heads"], budget, method.name]
                results.add(method, layers, mode="true history", **run)
            missing = results.missing(methods, mode="closed loop", **run)
            bar.update(len(methods) - len(missing))
            for method in missing:
                layers = closed_loop(model, decoder, method, budget, context.tokens[n_prompt:])
                if method.name == OURS:
                    spent = decoder.stats.predict_multiply_adds, decoder.stats.full_multiply_adds, args.steps
                    results.content["multiply_adds"][f"{length}, {run['select_heads']}"] = spent
                results.add(method, layers, mode="closed loop", **run)
                bar.update()
    return sorted(dense.pictures, key=lambda picture: -picture[0])[:SHOWN_HEADS]


def closed_loop(model, decoder, method, budget, tokens):
    """Decode the tokens behind the prompt with a method: mean recovery of each sparse layer."""
    decoder.restart(None if method.name == OURS else method, budget)
    for token in tokens:
        decode_one_token(model, decoder, torch.tensor([token]))
    return torch.stack(decoder.recovery).mean((0, 2)).tolist()  # of (steps, L', Hq)


# --------------------------------------------------------------------------------------------------------------------
# Tables and pictures
# --------------------------------------------------------------------------------------------------------------------


BY_LAYER = OURS, "oracle", "decayed mean", "Quest", "SnapKV", "H2O", "StreamingLLM"  # compared layer by layer


def shown_by_layer(args):
    """The runs that are: the first selection and length, the middle budget."""
    budget = args.budgets[len(args.budgets) // 2]
    return dict(mode="closed loop", select_heads=args.select_heads[0], length=args.lengths[0], budget=budget)


def tables(results, args) -> str:
    """Markdown: methods by length and budget for each mode and selection, then layers, then multiply-adds."""
    methods = [OURS, *RIVALS]
    lines = []
    for mode in ("closed loop", "true history"):
        for select in args.select_heads:
            columns = [(length, budget) for length in args.lengths for budget in args.budgets]
            lines += ["", f"Recovery, {mode}, `--select-heads {select}`:", ""]
            lines += [
                "| method | " + " | ".join(f"{b} of {n}" for n, b in columns) + " |",
                "|---" * (len(columns) + 1) + "|",
            ]
            where = [dict(mode=mode, select_heads=select, length=n, budget=b) for n, b in columns]
            values = {m: [results.mean(method=m, **at) for at in where] for m in methods}
            best = [max(values[m][i] for m in methods if m != "oracle") for i in range(len(columns))]
            for m in sorted(methods, key=lambda m: -statistics.fmean(values[m])):
                cells = [f"**{x:.4f}**" if x == top else f"{x:.4f}" for x, top in zip(values[m], best)]
                lines.append(f"| {m} | " + " | ".join(cells) + " |")
            gaps = zip(values[OURS], values["decayed mean"], values["oracle"])
            cells = [f"{(ours - decayed) / (oracle - decayed):.0%}" for ours, decayed, oracle in gaps]
            lines.append("| *gap from decayed mean to oracle closed* | " + " | ".join(cells) + " |")
    at = shown_by_layer(args)
    by_layer = [results.layers(method=m, **at) for m in BY_LAYER]
    title = "Recovery by layer, {mode}, `--select-heads {select_heads}`, {budget} of {length}:".format(**at)
    lines += ["", title, "", "| layer | " + " | ".join(BY_LAYER) + " |", "|---" * (len(BY_LAYER) + 1) + "|"]
    for i, row in enumerate(zip(*by_layer)):
        lines.append(f"| {i + args.dense_layers} | " + " | ".join(f"{x:.3f}" for x in row) + " |")
    lines += ["", "Multiply-adds of the predictor, a decoded token:", ""]
    lines += ["| tokens, selection | done | by recomputing | fewer |", "|---|---|---|---|"]
    for name, (done, full, steps) in results.content["multiply_adds"].items():
        lines.append(f"| {name} | {done / steps / 1e6:,.0f} M | {full / steps / 1e6:,.0f} M | {full / done:.1f}x |")
    return "\n".join(lines).strip()


def draw_layers(results, args, path):
    import matplotlib.pyplot as plt

    at = shown_by_layer(args)
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for name in BY_LAYER:
        layers = results.layers(method=name, **at)
        first = args.dense_layers
        style = dict(color="black", linewidth=2) if name == OURS else dict(linewidth=1)
        axes.plot(range(first, first + len(layers)), layers, label=f"{name} {statistics.fmean(layers):.3f}", **style)
    axes.set(xlabel="layer", title="recovery by layer, {mode}, {budget} of {length} tokens".format(**at))
    axes.legend(fontsize=7, ncols=2)
    save_figure(figure, path)


def draw_rows(pictures, path):
    """Actual rows above, predicted rows below, for some heads: steps downwards, blocks of the middle to the right."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    figure, axes = plt.subplots(2, len(pictures), figsize=(4 * len(pictures), 5), layout="constrained", squeeze=False)
    for column, (_, layer, head, actual, predicted) in enumerate(pictures):
        for row, (name, image) in enumerate((("actual", actual), ("predicted", predicted))):
            top = image.max().item()
            norm = LogNorm(top * 1e-4, top, clip=True)
            axes[row, column].imshow(image.clamp_min(top * 1e-4), aspect="auto", norm=norm, interpolation="nearest")
            axes[row, column].set(title=f"layer {layer}, head {head}: {name}", xlabel="block", ylabel="step")
    save_figure(figure, path)


# --------------------------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------------------------


def run(args):
    import matplotlib

    matplotlib.use("Agg")
    images = make_folder(args.images)
    results, pictures = judge(args)
    print(tables(results, args))
    draw_rows(pictures, images / "predicted_rows.png")
    draw_layers(results, args, images / "recovery_by_layer.png")


def parse_args(argv):
    parser = OneLineParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--predictor", default=DEFAULT_PREDICTOR)
    add_corpus(parser)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192], help="tokens, decoded ones included")
    parser.add_argument("--budgets", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--select-heads", nargs="+", default=["kv", "q"], choices=["kv", "q"])
    parser.add_argument("--dense-layers", type=int, default=Config.dense_layers, help="the first layers, not judged")
    parser.add_argument("--contexts", type=int, default=2, help="texts of each length")
    parser.add_argument("--steps", type=int, default=64, help="tokens decoded, and judged, behind the prompt")
    parser.add_argument("--stride", type=int, default=4, help="with true histories, judge every so many of them")
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float32"])
    parser.add_argument("--images", default="images", help="folder for the pictures")
    parser.add_argument("--json", help="keep the figures in this file; another call goes on from it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    return exit_status("recovery", lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
