"""Draws all pictures of the project, from a run or from the numbers that other programs wrote.

    python -m experiments.plots run --prompt-file text.txt --budget 512 --out run.png
    python -m experiments.plots echo --prompt-file text.txt --budget 512 --raw --out echo.png
    python -m experiments.plots speed speed.json --out speed.png

Reading order: `Recorder`, `find_patterns`, `draw_run` and `draw_echo` show a run from inside; then one function per
kind of file.
"""

import io
import json
import pathlib
import sys
from collections import deque
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.colors import ListedColormap, PowerNorm

import attnpred
from attnpred import InputError, OneLineParser, exit_status, require
from experiments.bench import output_file
from experiments.rivals import RivalDecoder
from experiments.tables import read_results
from model import load_model
from train_predictor import write_atomically
from weights.fetch_llm import fetch_default_llm

OURS, ORANGE, BLUE, GREY = "#c2185b", "#e08e0b", "#2a6fbb", "#888888"
RECENT_BLOCKS = 10  # nearly every head attends to the blocks before the local window


def save(figure, path, dpi=100):
    """Write a figure as a PNG. If that fails, an earlier file at `path` stays."""
    figure.savefig(image := io.BytesIO(), dpi=dpi, format="png", metadata={"Software": None})
    plt.close(figure)
    write_atomically(path, image.getvalue())


def bare(*all_axes):
    """Remove the upper and right spines, and draw a faint grid."""
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)


def thousands(n):
    """A number of tokens as text: 4K for 4096."""
    return f"{n / 1024:g}K" if n % 1024 == 0 else str(n)


# --------------------------------------------------------------------------------------------------------------------
# A run from inside
# --------------------------------------------------------------------------------------------------------------------


class Recorder(RivalDecoder):
    """A SparseDecoder that records for each step what it predicts, selects and reads, and the true attention.

    Computing the true attention takes time but does not change the decoding.
    """

    def __init__(self, *args):
        super().__init__(*args, measure_every=1)
        self.captured = None  # nothing can be recorded while a graph is captured or replayed
        self.true_rows = deque(maxlen=self.config.history_len + 1)  # (L, Hk, capacity) each
        self.chosen = []  # (L, Hk, capacity) uint8 per step: 0 not attended, 1 attended, 2 attended as an echo
        self.echoes = []  # per step: the numbers of the echo blocks, -1 for none
        self.bytes = []  # (attention, echoes, calibration, choosing, dense), totals after the prompt and each step
        self.next_prediction = None  # history (L, Hk, H, N), start, scores (L, Hk, n)
        self.prediction = None  # the same, of the selection in use, and a list of the true rows of its steps

    def scores(self, start, end):
        scores = super().scores(start, end)  # (L, Hk, n)
        if self.selecting:
            rows = self.history.rows[..., : self.config.n_blocks(self.n_tokens)]  # (L * Hk, H, N)
            self.next_prediction = rows.unflatten(0, self.cache.heads).float().cpu(), start, scores.cpu()
        return scores

    def begin_token(self):
        super().begin_token()
        self.true_rows.append(torch.zeros(self.cache.address.shape))
        self.chosen.append(torch.zeros(self.cache.address.shape, dtype=torch.uint8))
        if self.next_prediction:
            self.prediction, self.next_prediction = (*self.next_prediction, []), None
        if self.prediction:
            self.prediction[-1].append(self.true_rows[-1])

    def attend(self, layer, q, k, v, written=False):
        out = super().attend(layer, q, k, v, written)  # (Hq, 1, D)
        rows, _ = attnpred.pool_rows(q[None], self.keys(layer)[None], self.n_tokens, 1, 1, self.backend)
        n = rows.shape[-1]
        self.true_rows[-1][layer, :, :n] = rows[0, :, 0].cpu()  # of (1, Hk, 1, N)
        self.chosen[-1][layer, :, :n] = (
            2 * self.attended(layer, n).cpu() - self.cache.attended[layer, :, :n].int().cpu()
        )
        return out

    def end_prompt(self):
        super().end_prompt()
        self.note_bytes()

    def advance(self, token):
        super().advance(token)
        self.echoes.append(self.echo_block.tolist() if self.config.echo_blocks and self.sparse else [])

    def end_token(self):
        super().end_token()
        self.note_bytes()

    def note_bytes(self):
        s = self.stats
        read = s.attention_bytes, s.echo_bytes, s.calibration_bytes, s.choosing_bytes
        self.bytes.append((*read, s.dense_bytes))


def similarity(x, y):
    """Correlation of rows over their last dimension: (..., n), (..., n) -> (...)."""
    x, y = (z - z.mean(-1, keepdim=True) for z in (x, y))
    return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1)).clamp_min(1e-9)


def find_patterns(rows, block_size):
    """Rows (R, heads, n) of true attention -> {pattern: head}, the clearest example of each. No head occurs twice.

    re-access   a row resembles the row before it, because the same blocks are attended again
    sequential  a row resembles the row block_size steps before, shifted by a block, more than the unshifted row
    seasonal    the difference from a head's mean recurs after some steps, but not before
    """
    n_rows, _, n_blocks = rows.shape
    spread = rows.amax(2).mean(0).clamp(max=0.05)  # (heads,): low for heads that attend to other blocks
    shift = min(block_size, n_rows - 1)
    new, old = rows[shift:], rows[: n_rows - shift]
    rest = rows.sqrt() - rows.sqrt().mean(0)  # (R, heads, n): without the root, a few large cells would decide
    power = rest.square().mean((0, 2)).clamp_min(1e-9)  # (heads,)
    lags = range(1, max(2, n_rows // 2))
    echo = torch.stack([(rest[lag:] * rest[:-lag]).sum((0, 2)) / max(1, n_rows - lag) for lag in lags])
    echo = echo / n_blocks / power  # (lags, heads)
    found = {}
    for pattern, score in {
        "seasonal": (echo - echo.cummin(0).values).amax(0),
        "sequential": (similarity(new[..., 1:], old[..., :-1]) - similarity(new, old)).mean(0),
        "re-access": similarity(rows[1:], rows[:-1]).sum(0),
    }.items():
        score = score * spread
        score[list(found.values())] = -torch.inf
        found[pattern] = int(score.argmax())
    return found


def clear_heads(recorder):
    """{pattern: (layer, KV head)}: the clearest example of each in the true attention of a run's last steps."""
    r, (start, end) = recorder, recorder.config.middle(recorder.n_tokens)
    shown_end = end - RECENT_BLOCKS if end - start > 4 * RECENT_BLOCKS else end
    rows = torch.stack(list(r.true_rows))[..., start:shown_end].flatten(1, 2)  # (R, L * Hk, n)
    patterns = find_patterns(rows, r.config.block_size)
    return {pattern: divmod(head, r.cache.heads[1]) for pattern, head in patterns.items()}


def draw_run(recorder, path):
    """Draw history, prediction, true attention and selection of three heads, and recovery and bytes of all heads."""
    r, c = recorder, recorder.config
    if not r.prediction:
        why = "the text fits the budget (use a smaller --budget), or the answer ended before a second token was decoded"
        raise InputError(f"nothing was predicted: {why}")
    heads = clear_heads(r)

    figure = plt.figure(figsize=(13, 9), layout="constrained")
    grid = figure.add_gridspec(5, 6, height_ratios=(4, 0.35, 0.35, 3, 2.6))
    for column, pattern in enumerate(("re-access", "sequential", "seasonal")):
        layer, head = heads[pattern]
        columns = slice(2 * column, 2 * column + 2)
        axes = figure.add_subplot(grid[0, columns])
        axes = [axes, *(figure.add_subplot(grid[i, columns], sharex=axes) for i in (1, 2, 3))]
        draw_head(axes, r, layer, head, column == 0)
        title = f"{pattern}: layer {layer}, KV head {head}"
        sizes = [int((blocks[layer, head] > 0).sum()) for blocks in r.chosen]
        axes[0].set_title(f"{title}, {min(sizes)} to {max(sizes)} blocks", fontsize=11)
    draw_steps(figure.add_subplot(grid[4, :3]), figure.add_subplot(grid[4, 3:]), r)
    figure.suptitle(
        f"{r.n_tokens:,} tokens in {c.n_blocks(r.n_tokens)} blocks of {c.block_size}; budget {c.budget}:\n"
        f"{c.topk_blocks} blocks per head in the mean, the best ones of all heads, every {r.interval} steps; "
        f"up to {c.echo_blocks} echoes a step; {c.sink_tokens} + {c.local_tokens} tokens always",
        fontsize=11,
    )
    save(figure, path)


def draw_head(axes, recorder, layer, head, labelled):
    """Draw a column: a history, the row predicted from it, the true row of the steps served, and each step's blocks."""
    r, (top, *strips, bottom) = recorder, axes
    history, start, scores, served = r.prediction
    image, scores, n = history[layer, head], scores[layer, head], r.config.n_blocks(r.n_tokens)
    middle = slice(start, start + len(scores))
    norm = PowerNorm(0.4, 0, max(1e-3, float(image[:, middle].max())))
    cells = dict(cmap="magma", aspect="auto", interpolation="nearest")
    top.imshow(image, norm=norm, extent=(-0.5, image.shape[1] - 0.5, -0.5, -len(image) - 0.5), **cells)
    true_row = torch.stack([row[layer, head, middle] for row in served]).square().mean(0).sqrt()  # (n,)
    rows = scores - scores.min(), true_row
    for strip, row, name in zip(strips, rows, ("predicted", "actual")):
        strip.set_facecolor("#dddddd")
        row = row / row.max().clamp_min(1e-12)  # (n,)
        strip.imshow(row[None], norm=PowerNorm(0.5, 0, 1), extent=(start - 0.5, middle.stop - 0.5, 0, 1), **cells)
        strip.set(yticks=[], ylim=(0, 1))
        if labelled:
            strip.set_ylabel(name, rotation=0, ha="right", va="center")
    chosen = torch.stack([blocks[layer, head, :n] for blocks in r.chosen])  # (steps, N)
    cells["cmap"] = ListedColormap(["#f3eef0", OURS, BLUE])
    bottom.imshow(chosen, extent=(-0.5, n - 0.5, len(chosen) + 0.5, 0.5), vmin=0, vmax=2, **cells)
    bottom.set(xlim=(-0.5, n - 0.5), xlabel=f"block of {r.config.block_size} tokens")
    for upper in (top, *strips):
        upper.tick_params(labelbottom=False)
    if labelled:
        top.set_ylabel("history, by row before\nthe row that is predicted")
        bottom.set_ylabel("blocks attended by\ndecode step, echoes blue")


def draw_steps(left, right, recorder):
    """Draw recovery (left) and bytes read (right) for each step."""
    steps = range(1, len(recorder.recovery) + 1)
    left.plot(steps, [torch.stack(layers).mean().item() for layers in recorder.recovery], color=OURS)
    left.set(title="recovery: share of the true attention attended", xlabel="decode step")
    left.set_ylim(top=1.005)
    *parts, dense = np.diff(recorder.bytes, axis=0).T / 1e6  # (steps,) each
    names = "attention", "echoes", "calibration", "choosing"
    right.stackplot(steps, parts, labels=names, colors=(OURS, BLUE, ORANGE, GREY), step="mid")
    right.plot(steps, dense, color="black", label="dense attention")
    right.set(title="MB of KV cache and history read", xlabel="decode step")
    right.set_ylim(0, 1.3 * max(*dense, *sum(parts)))
    right.legend(fontsize=8, ncols=5, loc="upper left", frameon=False)
    for axes in (left, right):
        axes.set_xlim(1, max(2, len(recorder.recovery)))
    bare(left, right)


def matches(recorder, step):
    """Of each echo block of a step: (how many tokens match the text's last ones, the position that follows them)."""
    r, b, n = recorder, recorder.config.block_size, recorder.stats.prefill_tokens + step + 1
    ids = r.ids[:n].tolist()

    def match(p):
        return next((j for j in range(8) if j == p or ids[p - 1 - j] != ids[n - 1 - j]), 8)

    return [
        max((match(p), p) for p in range(block * b, block * b + b))
        for block in r.echoes[step]
        if block < r.cache.capacity
    ]


def draw_echo(recorder, tokenizer, path):
    """Draw the step with the longest matches that most heads would miss: each block's heads, and the text."""
    r, b = recorder, recorder.config.block_size
    gains = [int((r.chosen[i] == 2).sum()) * max(matches(r, i), default=[0])[0] for i in range(len(r.chosen))]
    if not any(gains):
        raise InputError("no echo adds a block: use a text that repeats itself, or a smaller --budget")
    step = int(np.argmax(gains))
    n, ids = r.stats.prefill_tokens + step + 1, r.ids[: r.n_tokens].tolist()

    def text(first, end):
        return tokenizer.decode(ids[first:end]).replace("\n", "↵")

    lines = [("this step", "…" + text(n - 10, n), text(n, n + 1))]
    for run, p in matches(r, step):
        lines.append((f"block {p // b}", text(p - run, p), text(p, (p // b + 1) * b) + "…"))

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(11, 2.6 + 0.3 * len(lines)), layout="constrained")
    blocks = r.chosen[step][..., : r.config.n_blocks(n)]  # (L, Hk, N)
    selected, echoes = ((blocks == kind).sum((0, 1)) for kind in (1, 2))  # (N,)
    top.bar(range(len(selected)), selected, 1, color=OURS, label="selected, sink and local window")
    top.bar(range(len(echoes)), echoes, 1, selected, color=BLUE, label="in addition, as echoes")
    top.set(
        xlabel=f"block of {b} tokens", ylabel=f"heads, of {blocks[..., 0].numel()}", xlim=(-0.5, len(selected) - 0.5)
    )
    top.legend(fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    bare(top)
    bottom.axis("off")
    for i, (label, matched, following) in enumerate(lines):
        style = dict(y=1 - (i + 0.5) / len(lines), fontsize=9, family="monospace", va="center", parse_math=False)
        bottom.text(0, s=label, color=BLUE if i else OURS, **style)
        bottom.text(0.45, s=matched, ha="right", weight="bold", **style)
        bottom.text(0.46, s=f"→ {following}", **style)
    save(figure, path)


# --------------------------------------------------------------------------------------------------------------------
# Quality: experiments.evaluate and train_predictor
# --------------------------------------------------------------------------------------------------------------------


def draw_pareto(rows, path):
    """draw KL against bytes read, means over texts, from `evaluate texts`"""
    points = pd.DataFrame([row for row in rows if row["task"] == "texts"])
    for name in ("model", "dtype", "predictor"):
        if len(values := {*points[name]} - {""}) > 1:  # the predictor of a rival is ""
            raise InputError(f"results of more than one {name} ({', '.join(sorted(values))}): give those of one")
    points = points[(points.setting != "full") & ~points.setting.str.contains(" ")]  # methods without changes
    require(len(points), "there are no results of `evaluate texts` for a method without changes, other than full")
    points["KL"], points["MB"] = points.kl.map(np.mean), points.read_bytes / 1e6
    points["level"] = points.bytes_share.where(points.bytes_share != "", points.budget.astype(str))
    means = points.groupby(["n_prompt", "setting", "level"])[["MB", "KL"]].mean()
    methods = sorted({setting.removesuffix("+echo") for setting in points.setting})
    colours = {method: plt.cm.tab20(i) for i, method in enumerate(methods)}
    lengths = sorted(points.n_prompt.unique())
    size = 1.5 + 5 * len(lengths), 4.6
    figure, all_axes = plt.subplots(1, len(lengths), figsize=size, layout="constrained", squeeze=False, sharey=True)
    for axes, length in zip(all_axes[0], lengths):
        for setting, line in means.loc[length].groupby("setting"):
            style = dict(lw=2.4, zorder=5) if setting == "ours" else dict(ls="--" if "+echo" in setting else "-")
            line, colour = line.sort_values("MB"), colours[setting.removesuffix("+echo")]
            axes.plot(line.MB, line.KL, marker="o", ms=4, color=colour, label=setting, **style)
        axes.set(xscale="log", yscale="log", title=f"{length:,} tokens", xlabel="MB read per token, all reads")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        bare(axes)
    all_axes[0][0].set_ylabel("KL to full attention, nats")
    all_axes[0][0].legend(fontsize=7, loc="lower left")
    save(figure, path)


def draw_training(rows, path):
    """draw the loss and the validation measures by step, from the curve that train_predictor.py writes"""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    steps = [row["step"] for row in rows]
    left.plot(steps[1:], [row["loss"] for row in rows[1:]], marker=".")  # the first row's loss is of a single batch
    left.set(title="loss, running mean", xlabel="step")
    for name, start in rows[0].items():
        if name not in ("step", "loss"):
            right.plot(steps, [r[name] / (start or 1) for r in rows], marker=".", label=f"{name}: from {start:.4f}")
    right.set(title="attention left out in validation, over the start's", xlabel="step")
    right.legend(fontsize=7)
    save(figure, path, dpi=90)


# --------------------------------------------------------------------------------------------------------------------
# Speed: experiments.bench
# --------------------------------------------------------------------------------------------------------------------


def draw_speed(rows, path):
    """draw tokens/s and the bandwidth's limit, a GPU's memory, and a sparse token's stages, from `bench speed`"""
    rows = pd.DataFrame(rows)
    rows["limit"] = rows["tokens_s"] / rows["of_copy"]
    dtypes, contexts = rows["dtype"].unique(), sorted(rows["context"].unique())
    panels = [(f"tokens/s, {dtype}", "tokens_s", dtype) for dtype in dtypes]
    panels += [(f"peak memory beside the weights, MB, {dtypes[0]}", "memory_mb", dtypes[0])] * ("memory_mb" in rows)
    panels += [(f"a sparse token's time, ms, {dtypes[-1]}", "stages", dtypes[-1])] * ("stages" in rows)
    size = 4.3 * len(panels), 4
    figure, (all_axes,) = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axes, (title, value, dtype) in zip(all_axes, panels):
        part = rows[rows["dtype"] == dtype]
        if value == "stages":
            timed = part[part["stages"].notna()]
            stages = pd.DataFrame(list(timed["stages"]), index=timed["context"].map(thousands))
            stages.loc[:, stages.any()].plot.bar(ax=axes, stacked=True, rot=0)
        else:
            part.pivot(index="context", columns="name", values=value).plot(ax=axes, marker="o", ms=4)
            for line in list(axes.lines) if value == "tokens_s" else ():
                if (name := line.get_label()) in ("dense", "sparse"):
                    limit = part[part["name"] == name].set_index("context")["limit"].sort_index()
                    axes.plot(limit, color=line.get_color(), ls=":", label=f"{name}: bandwidth's limit")
            axes.set_ylim(0)
            axes.set_xscale("log", base=2)
            axes.set_xticks(contexts, [thousands(n) for n in contexts])
            axes.minorticks_off()
        axes.set_title(title, fontsize=10)
        bare(axes)
        axes.legend(fontsize=7)
    threads = f", {rows.threads[0]} threads" if rows.device[0] == "CPU" else ""
    figure.suptitle(f"{rows.device[0]}{threads}, {rows.weights[0]}", fontsize=10)
    save(figure, path)


def draw_kernels(rows, path):
    """draw each kernel's share of its ceiling by context length, from `bench kernels`"""
    rows = pd.DataFrame(rows)
    rows["share"] = 100 * rows[["of_copy", "of_matmul"]].max(axis=1)
    table = rows.pivot_table("share", "path", "context", sort=False).rename(columns=lambda n: f"{thousands(n)} tokens")
    figure, axes = plt.subplots(figsize=(9, 0.4 * len(table) + 1.4), layout="constrained")
    table.plot.barh(ax=axes, xlabel="% of a copy's bandwidth or of a matrix product's speed, whichever is nearer")
    axes.invert_yaxis()
    axes.set(title=rows.device[0], ylabel="")
    axes.legend(fontsize=8)
    bare(axes)
    save(figure, path)


# --------------------------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------------------------

FROM_FILES = {"speed": draw_speed, "kernels": draw_kernels, "pareto": draw_pareto, "training": draw_training}


def read_list(path) -> list[dict]:
    """The rows in a file that holds a JSON list. Raises InputError."""
    try:
        rows = json.loads(pathlib.Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    require(isinstance(rows, list), f"{path} is no JSON list")
    return rows


def run(argv):
    parser = OneLineParser(prog="plots", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="PICTURE")
    output = OneLineParser(add_help=False)
    output.add_argument("--out", required=True, type=partial(output_file, ".png"), metavar="FILE.png")
    more = "draw a run from inside; it takes all options of attnpred.py (python attnpred.py --help)"
    commands.add_parser("run", parents=[output], help=more, epilog=more, allow_abbrev=False)
    more = "draw one token's echoes and the text around them; it takes all options of attnpred.py"
    commands.add_parser("echo", parents=[output], help=more, epilog=more, allow_abbrev=False)
    for name, draw in FROM_FILES.items():
        picture = commands.add_parser(name, parents=[output], help=draw.__doc__)
        picture.add_argument("files", nargs="+", metavar="FILE.json")
    args, rest = parser.parse_known_args(argv)
    if args.command in ("run", "echo"):
        options = attnpred.parse_options(rest)
        if options.dense or options.offload or options.chat or options.max_new_tokens < 2:
            why = "leave out --dense, --offload and --chat, decode 2 tokens or more"
            raise InputError(f"the picture shows sparse decoding: {why}")
        recorder = attnpred.run(options, Recorder)
        if args.command == "run":
            return draw_run(recorder, args.out)
        tokenizer = load_model(options.model or str(fetch_default_llm()), torch.bfloat16, "cpu")[1]
        return draw_echo(recorder, tokenizer, args.out)
    if rest:
        raise InputError(f"unknown option {rest[0]} (--help lists the options)")
    read = read_results if args.command == "pareto" else read_list
    rows = [row for file in args.files for row in read(file)]
    try:
        FROM_FILES[args.command](rows, args.out)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, ArithmeticError) as error:
        raise InputError(f"{args.files} do not hold the numbers of {args.command} ({error!r})") from None


def main(argv=None) -> int:
    return exit_status("plots", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
