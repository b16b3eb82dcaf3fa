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
import json
import pathlib
import statistics
import sys
from dataclasses import replace

import torch
from tqdm import tqdm

import kernels
from attnpred import DEFAULT_PREDICTOR, Config, InputError, OneLineParser, decode_one_token, load_predictor
from model import ModelError, causal_attention, load_model
from rivals import RIVALS, Convolution, RivalDecoder, Seen, block_mass
from train_predictor import (
    add_corpus,
    draw_contexts,
    in_blocks,
    make_folder,
    python_documents,
    save_figure,
    scores_of_rows,
    text_documents,
)
from weights.fetch_llm import FetchError, fetch_default_llm

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


def closed_loop(model, decoder, tokens, methods, args, bar):
    """Decode tokens with each method and budget: {(select_heads, budget, method): recovery by layer}."""
    recovery = {}
    for budget in args.budgets:
        for method in methods:
            rival = None if method.name == OURS else method
            decoder.restart(rival, budget)
            for token in tokens:
                decode_one_token(model, decoder, torch.tensor([token]))
            rows = torch.stack(decoder.recovery)  # (steps, L', Hq)
            recovery[decoder.config.select_heads, budget, method.name] = rows.mean((0, 2)).tolist()
            if rival is None:
                spent = decoder.stats.predict_multiply_adds, decoder.stats.full_multiply_adds, len(tokens)
            bar.update()
    return recovery, spent


def judge(args):
    """All contexts, lengths and selections -> results: a dict that goes to JSON as it is."""
    predictor = load_predictor(args.predictor)
    documents = text_documents(args.text) if args.text else python_documents()
    model, tokenizer = load_model(args.model or str(fetch_default_llm()), getattr(torch, args.dtype), "cpu")
    if max(args.lengths) > model.config.context_len:
        raise InputError(f"the model's context is {model.config.context_len} tokens: {max(args.lengths)} is too long")
    config = Config(dense_layers=args.dense_layers)
    if min(args.lengths) - args.steps < max(args.budgets) + config.history_len:
        raise InputError(
            f"{min(args.lengths)} tokens, {args.steps} of them decoded, are too few for a budget of {max(args.budgets)}"
        )
    methods = [Convolution(predictor), *(rival() for rival in RIVALS.values())]
    n_runs = len(args.lengths) * args.contexts * len(args.select_heads) * len(args.budgets) * len(methods)
    bar = tqdm(total=n_runs, desc="judging", unit="run", disable=args.quiet)
    results = {"texts": [], "recovery": [], "multiply_adds": {}, "steps": args.steps, "dense_layers": args.dense_layers}
    pictures = []
    for length in args.lengths:
        for context in draw_contexts(documents, "test", [length], args.contexts, 1, 1, tokenizer, args.seed):
            n_prompt = length - args.steps
            decoders = [
                RivalDecoder(replace(config, select_heads=select), model, predictor, length, methods[1:])
                for select in args.select_heads
            ]
            for decoder in decoders[1:]:
                decoder.rivals, decoder.notes = (
                    (),
                    decoders[0].notes,
                )  # what is noted of a prompt holds for any selection
            dense = DensePass(decoders, methods, n_prompt, predictor, args)
            model.hidden(torch.tensor(context.tokens), torch.arange(length), dense)
            pictures = pictures or sorted(dense.pictures, key=lambda p: -p[0])[:SHOWN_HEADS]
            results["texts"].append(f"{length} tokens, {context.name}")
            modes = [("true history", dense.recovery)]
            for decoder in decoders:
                loop, spent = closed_loop(model, decoder, context.tokens[n_prompt:], methods, args, bar)
                modes.append(("closed loop", loop))
                results["multiply_adds"][f"{length} {decoder.config.select_heads}"] = spent
            for mode, recovery in modes:
                for (select, budget, method), layers in recovery.items():
                    entry = {"length": length, "mode": mode, "select_heads": select, "budget": budget, "method": method}
                    results["recovery"].append(entry | {"text": context.name, "layers": layers})
    bar.close()
    return results, pictures


# --------------------------------------------------------------------------------------------------------------------
# Tables and pictures
# --------------------------------------------------------------------------------------------------------------------


def mean_layers(results, **wanted):
    """Recovery by layer of the entries with these properties, mean over texts."""
    entries = [e["layers"] for e in results["recovery"] if all(e[name] == value for name, value in wanted.items())]
    return [statistics.fmean(values) for values in zip(*entries)]


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
            values = {m: [statistics.fmean(mean_layers(results, method=m, **at)) for at in where] for m in methods}
            best = [max(values[m][i] for m in methods if m != "oracle") for i in range(len(columns))]
            for m in sorted(methods, key=lambda m: -statistics.fmean(values[m])):
                cells = [f"**{x:.4f}**" if x == top else f"{x:.4f}" for x, top in zip(values[m], best)]
                lines.append(f"| {m} | " + " | ".join(cells) + " |")
            gaps = zip(values[OURS], values["decayed mean"], values["oracle"])
            cells = [f"{(ours - decayed) / (oracle - decayed):.0%}" for ours, decayed, oracle in gaps]
            lines.append("| *gap from decayed mean to oracle closed* | " + " | ".join(cells) + " |")
    at = dict(
        mode="closed loop",
        select_heads=args.select_heads[0],
        length=args.lengths[0],
        budget=args.budgets[len(args.budgets) // 2],
    )
    shown = [OURS, "oracle", "decayed mean", "Quest", "SnapKV", "H2O", "StreamingLLM"]
    by_layer = [mean_layers(results, method=m, **at) for m in shown]
    title = "Recovery by layer, {mode}, `--select-heads {select_heads}`, {budget} of {length}:".format(**at)
    lines += ["", title, "", "| layer | " + " | ".join(shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for i, row in enumerate(zip(*by_layer)):
        lines.append(f"| {i + args.dense_layers} | " + " | ".join(f"{x:.3f}" for x in row) + " |")
    lines += ["", "Multiply-adds of the predictor, a decoded token:", ""]
    lines += ["| tokens, selection | done | by recomputing | fewer |", "|---|---|---|---|"]
    for name, (done, full, steps) in results["multiply_adds"].items():
        lines.append(f"| {name} | {done / steps / 1e6:,.0f} M | {full / steps / 1e6:,.0f} M | {full / done:.1f}x |")
    return "\n".join(lines).strip()


def draw_layers(results, args, path):
    import matplotlib.pyplot as plt

    at = dict(
        mode="closed loop",
        select_heads=args.select_heads[0],
        length=args.lengths[0],
        budget=args.budgets[len(args.budgets) // 2],
    )
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for name in ("oracle", OURS, "decayed mean", "Quest", "SnapKV", "H2O", "StreamingLLM"):
        layers = mean_layers(results, method=name, **at)
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
    if args.json:
        try:
            pathlib.Path(args.json).write_text(json.dumps(results, indent=1))
        except OSError as error:
            raise InputError(f"cannot write {args.json}: {error.strerror}") from None


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
    parser.add_argument("--json", help="write all figures to this file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    try:
        run(parse_args(argv))
    except (InputError, ModelError, FetchError) as error:
        print(f"recovery: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
