"""Every picture that the project draws, and what `attnpred.py --plot` has to watch for its own.

Reading order: `Recorder`, `find_patterns`, `draw_run`; then the pictures of evaluate.py, then those of bench.py.

The functions raise OSError where a picture cannot be written; what was at its place stays.
"""

import os
import pathlib
from collections import deque

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap, PowerNorm

import kernels

OURS, GREY = "#c2185b", "#8a8f98"
COLOURS = {
    "full attention": "black",
    "AttentionPredictor, kv": OURS,
    "AttentionPredictor, q": "#ef7fab",
    "oracle": GREY,
    "decayed mean": "#e08e0b",
    "Quest": "#1b7f5c",
    "H2O": "#2a6fbb",
    "SnapKV": "#7a52b3",
    "StreamingLLM": "#6d4c41",
}
ATTENTION = "magma"
RECENT_BLOCKS = 10


def save(figure, path, dpi=100):
    """As a PNG, under a scratch name first."""
    path = pathlib.Path(path)
    scratch = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(scratch, dpi=dpi, format="png", metadata={"Software": None})
        os.replace(scratch, path)
    finally:
        plt.close(figure)
        scratch.unlink(missing_ok=True)


def bare(axes):
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


# --------------------------------------------------------------------------------------------------------------------
# What a run looks like from inside
# --------------------------------------------------------------------------------------------------------------------


class Recorder:
    """Watches an attnpred.SparseDecoder: true rows beside predicted ones, blocks chosen, recovery and bytes by step.

    The true row of every layer is pooled at every step, which takes time but changes nothing; the decoder's counters
    are kept free of it. L' sparse layers; `heads` are selection heads.
    """

    def __init__(self, decoder):
        self.decoder, self.cache = decoder, decoder.cache
        self.scores, self.used = (
            {},
            {},
        )  # sparse layer -> (start, (heads, n)): predicted for the next step, and for this one
        self.true_rows = deque(maxlen=decoder.config.history_len + 1)  # (L', heads, N) each, the oldest from the prompt
        self.seen = None  # (L', heads, H, N): the history that the last prediction rested on
        self.chosen = []  # a step's tables, [(heads, A) or None for everything] * L'
        self.recovery, self.bytes = [], []  # a step's mean over layers and heads; its (attention, calibration, dense)
        self.lse = None
        for name in ("begin_token", "decode_attention", "score_blocks", "finish_token"):
            setattr(decoder, name, self.around(getattr(decoder, name), getattr(self, name)))
        self.cache.attend = self.around(self.cache.attend, self.attend)

    @staticmethod
    def around(original, watcher):
        return lambda *args, **kwargs: watcher(original, *args, **kwargs)

    def counters(self):
        stats = self.decoder.stats
        return torch.tensor([stats.kv_bytes, stats.calibration_bytes, stats.dense_kv_bytes])

    def history(self):
        """(L', heads, H, N), oldest row first."""
        d = self.decoder
        slots = kernels.window_slots(d.newest, d.config.history_len, d.history.device)  # (H,)
        return d.history[:, :, slots, : d.config.n_blocks(d.n_tokens)].cpu()

    def begin_token(self, original):
        d = self.decoder
        self.seen = self.history()
        if not self.true_rows:
            self.true_rows.extend(self.seen.unbind(2))
        self.used, self.scores = self.scores, {}
        original()
        self.before = self.counters()
        self.row = torch.zeros(len(d.history), d.heads, d.config.n_blocks(d.n_tokens))  # (L', heads, N)
        self.step_recovery, self.step_chosen = [], []

    def attend(self, original, *args):
        out, self.lse = original(*args)
        return out, self.lse

    def decode_attention(self, original, layer, q, k, v):
        d, index = self.decoder, layer - self.decoder.config.dense_layers
        blocks = None if index < 0 else d.blocks_for(layer, q)
        out = original(layer, q, k, v)
        if index >= 0:
            streamed = getattr(self.cache, "streamed_bytes", None)
            pooled, lse = self.cache.pool(layer, q, d.n_tokens)  # (Hq, 1, N), (Hq, 1)
            if streamed is not None:
                self.cache.streamed_bytes = streamed
            self.row[index] = d.group_mean(pooled)[:, 0].cpu()
            self.step_recovery.append(torch.exp(self.lse - lse[:, 0]).mean().item())
            self.step_chosen.append(None if blocks is None else blocks.cpu())
        return out

    def score_blocks(self, original, start, end, layers=slice(None)):
        scores = original(start, end, layers)  # (layers * heads, n)
        for layer, of_layer in zip(
            range(len(self.decoder.history))[layers], scores.cpu().unflatten(0, (-1, self.decoder.heads))
        ):
            self.scores[layer] = start, of_layer  # (heads, n)
        return scores

    def finish_token(self, original):
        original()
        if self.decoder.step:
            self.true_rows.append(self.row)
            self.chosen.append(self.step_chosen)
            self.recovery.append(sum(self.step_recovery) / max(1, len(self.step_recovery)))
            self.bytes.append((self.counters() - self.before).tolist())


def similarity(x, y):
    """Correlation of rows over their last dimension: (..., n), (..., n) -> (...)."""
    x, y = (z - z.mean(-1, keepdim=True) for z in (x, y))
    return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1)).clamp_min(1e-9)


def find_patterns(rows, block_size):
    """Rows (R, heads, n) of true attention -> {pattern: head}, the clearest example of each, no head twice.

    re-access   a row resembles the one before: the same blocks again
    sequential  a row resembles the one of block_size steps before, shifted by a block, more than that one itself
    seasonal    what differs from a head's mean comes back after some steps, and not before
    """
    spread = rows.amax(2).mean(0).clamp(max=0.05)  # (heads,): heads that look elsewhere show nothing
    scores = {"re-access": similarity(rows[1:], rows[:-1]).mean(0)}
    if rows.shape[0] > block_size and rows.shape[2] > 2:
        new, old = rows[block_size:], rows[:-block_size]
        scores["sequential"] = (similarity(new[..., 1:], old[..., :-1]) - similarity(new, old)).mean(0)
    rest = rows.sqrt() - rows.sqrt().mean(0)  # (R, heads, n): without the root, a few bright cells decide
    power = rest.square().mean((0, 2)).clamp_min(1e-9)  # (heads,)
    lags = range(1, max(2, rows.shape[0] // 2))
    echo = torch.stack([(rest[lag:] * rest[:-lag]).mean((0, 2)) / power for lag in lags])  # (lags, heads)
    scores["seasonal"] = (echo - echo.cummin(0).values).amax(0)
    found = {}
    for pattern in ("seasonal", "sequential", "re-access"):
        if pattern in scores:
            score = scores[pattern] * spread
            score[list(found.values())] = -torch.inf
            found[pattern] = int(score.argmax())
    return {pattern: found[pattern] for pattern in ("re-access", "sequential", "seasonal") if pattern in found}


def draw_run(recorder, path):
    """The picture of `attnpred.py --plot`. Needs at least one decoded token and one sparse layer."""
    d = recorder.decoder
    heads, c = d.heads, d.config
    n = recorder.true_rows[-1].shape[-1]
    rows = torch.stack([torch.nn.functional.pad(row, (0, n - row.shape[-1])) for row in recorder.true_rows])
    rows = rows.flatten(1, 2)  # (R, L' * heads, N)
    start, end = c.middle(d.n_tokens)
    far = end - RECENT_BLOCKS if end - start > 4 * RECENT_BLOCKS else end  # nearly every head looks back a little
    patterns = find_patterns(rows[..., start:far] if far - start > 3 else rows, c.block_size)

    figure = plt.figure(figsize=(13, 9), layout="constrained")
    grid = figure.add_gridspec(5, 6, height_ratios=(4, 0.35, 0.35, 3, 2.6))
    span = 6 // len(patterns)
    for column, (pattern, head) in enumerate(patterns.items()):
        layer, place = head // heads, slice(column * span, (column + 1) * span)
        top = figure.add_subplot(grid[0, place])
        draw_head(figure, grid, place, top, recorder, layer, head % heads, column == 0)
        kind = "KV head" if c.select_heads == "kv" else "head"
        top.set_title(f"{pattern}: layer {layer + c.dense_layers}, {kind} {head % heads}", fontsize=11)
    draw_steps(figure.add_subplot(grid[4, :3]), figure.add_subplot(grid[4, 3:]), recorder)
    figure.suptitle(
        f"{d.n_tokens:,} tokens in {n} blocks of {c.block_size}; budget {c.budget}: {c.topk_blocks} blocks chosen "
        f"a step, beside {c.sink_tokens} + {c.local_tokens} tokens always attended",
        fontsize=11,
    )
    save(figure, path)


def draw_head(figure, grid, place, top, recorder, layer, head, labelled):
    """A column: the history, the row predicted from it, the actual next row, the blocks chosen at every step."""
    d, n = recorder.decoder, recorder.true_rows[-1].shape[-1]
    start, end = d.config.middle(d.n_tokens)
    image = recorder.seen[layer, head]  # (H, N of then)
    norm = PowerNorm(0.4, 0, max(1e-3, float(image[:, start:end].max()) if end > start else float(image.max())))
    window = (-0.5, image.shape[1] - 0.5, -0.5, -len(image) - 0.5)
    top.imshow(image, cmap=ATTENTION, norm=norm, aspect="auto", interpolation="nearest", extent=window)
    predicted = torch.full((n,), torch.nan)
    if layer in recorder.used:
        first, scores = recorder.used[layer]
        of_head = scores[head] - scores[head].min()
        predicted[first : first + of_head.numel()] = of_head / of_head.max().clamp_min(1e-12)
    actual = recorder.true_rows[-1][layer, head].clone()
    actual[:start], actual[max(start, end) :] = (torch.nan, torch.nan) if end > start else (0, 0)
    actual = actual / actual.nan_to_num().max().clamp_min(1e-12)
    strips = [figure.add_subplot(grid[i, place], sharex=top) for i in (1, 2)]
    for axes, row, name in zip(strips, (predicted, actual), ("predicted", "actual")):
        axes.set_facecolor("#dddddd")
        strip = (-0.5, n - 0.5, 0, 1)
        axes.imshow(
            row[None], cmap=ATTENTION, norm=PowerNorm(0.5, 0, 1), aspect="auto", interpolation="nearest", extent=strip
        )
        axes.set_yticks([])
        if labelled:
            axes.set_ylabel(name, rotation=0, ha="right", va="center")
        if name == "predicted" and layer not in recorder.used:
            axes.text(
                0.5, 0.45, "everything fits the budget", ha="center", va="center", transform=axes.transAxes, fontsize=8
            )
    chosen = torch.zeros(len(recorder.chosen), n)
    for step, tables in enumerate(recorder.chosen):
        blocks = tables[layer]
        chosen[step, : d.config.n_blocks(d.n_tokens - len(recorder.chosen) + step + 1) if blocks is None else 0] = 1
        if blocks is not None:
            chosen[step, blocks[head].long()] = 1
    bottom = figure.add_subplot(grid[3, place], sharex=top)
    extent = (-0.5, n - 0.5, len(chosen) + 0.5, 0.5)
    bottom.imshow(
        chosen,
        cmap=ListedColormap(["#f3eef0", OURS]),
        aspect="auto",
        interpolation="nearest",
        extent=extent,
        vmin=0,
        vmax=1,
    )
    bottom.set_xlim(-0.5, n - 0.5)
    bottom.set_xlabel(f"block of {d.config.block_size} tokens")
    for axes in (top, *strips):
        axes.tick_params(labelbottom=False)
    if labelled:
        top.set_ylabel("history, by step before\nthe row that is predicted")
        bottom.set_ylabel("blocks attended,\nby decode step")


def draw_steps(left, right, recorder):
    """Recovery, and bytes read, by step."""
    steps = range(1, len(recorder.recovery) + 1)
    left.plot(steps, recorder.recovery, color=OURS)
    left.set(title="recovery: share of the true attention attended", xlabel="decode step")
    left.set_ylim(top=1.005)
    attention, calibration, dense = (torch.tensor(column) / 1e6 for column in zip(*recorder.bytes))
    right.fill_between(steps, attention, step="mid", color=OURS, label="attention")
    right.fill_between(
        steps, attention, attention + calibration, step="mid", color=COLOURS["decayed mean"], label="calibration"
    )
    right.plot(steps, dense, color="black", label="dense attention would read")
    right.set(title="MB of KV cache read", xlabel="decode step")
    right.set_ylim(0, 1.3 * float(dense.max()))
    right.legend(fontsize=8, ncols=3, loc="upper left", frameon=False)
    for axes in (left, right):
        axes.set_xlim(1, max(2, len(recorder.recovery)))
        bare(axes)


# --------------------------------------------------------------------------------------------------------------------
# Quality: evaluate.py
# --------------------------------------------------------------------------------------------------------------------


def line_of(method):
    return dict(color=COLOURS.get(method), ls="--" if method in ("oracle", "full attention") else "-", label=method) | (
        dict(lw=2.4, zorder=5) if method == "AttentionPredictor, kv" else {}
    )


def draw_perplexity(entries, path):
    """Increase over full attention by budget (or perplexity itself, without full attention), and recovery."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    value = "increase" if any("increase" in entry for entry in entries) else "perplexity"
    scale = 100 if value == "increase" else 1
    for method in dict.fromkeys(entry["method"] for entry in entries if entry["budget"]):
        of_method = sorted((e for e in entries if e["method"] == method and e["budget"]), key=lambda e: e["budget"])
        budgets = [entry["budget"] for entry in of_method]
        known = [entry for entry in of_method if value in entry]
        left.plot(
            [e["budget"] for e in known], [scale * e[value] for e in known], marker="o", ms=3.5, **line_of(method)
        )
        right.plot(budgets, [entry["recovery"] for entry in of_method], marker="o", ms=3.5, **line_of(method))
    left.set_ylabel("perplexity over full attention's, %" if scale > 1 else "perplexity")
    if scale > 1:
        left.axhline(0, color="black", lw=0.8)
        left.set_yscale("symlog", linthresh=1)
    right.set_ylabel("recovery")
    ticks = sorted({entry["budget"] for entry in entries if entry["budget"]})
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlabel("budget: tokens attended")
        bare(axes)
    left.legend(fontsize=8)
    save(figure, path)


def draw_recovery(entries, path, budget=512):
    """By layer and by step, at one budget: that of 512, or else the smallest."""
    budgets = sorted({entry["budget"] for entry in entries if entry["budget"]})
    if not budgets:
        return
    budget = budget if budget in budgets else budgets[0]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for entry in entries:
        if entry["budget"] == budget:
            left.plot(entry["recovery_by_layer"], **line_of(entry["method"]))
            smooth = torch.tensor(entry["recovery_by_step"])
            width = min(8, len(smooth))
            smooth = smooth.unfold(0, width, 1).mean(1)
            right.plot(range(width, width + len(smooth)), smooth, **line_of(entry["method"]))
    left.set(xlabel="sparse layer", ylabel=f"recovery, budget {budget}")
    right.set(xlabel=f"decode step (mean of the last {width})")
    right.legend(fontsize=8)
    for axes in (left, right):
        bare(axes)
    save(figure, path)


def draw_retrieval(entries, path):
    """A heat map for each method: depth of the key against length of the text."""
    methods = list(dict.fromkeys(entry["method"] for entry in entries))
    lengths, depths = (sorted({entry[name] for entry in entries}) for name in ("length", "depth"))
    columns = min(5, len(methods))
    rows = -(-len(methods) // columns)
    size = (2.3 * columns + 0.6, (0.9 + 0.32 * len(depths)) * rows + 0.4)
    figure, axes = plt.subplots(
        rows, columns, figsize=size, layout="constrained", squeeze=False, sharex=True, sharey=True
    )
    for panel, method in zip(axes.flat, methods):
        image = torch.full((len(depths), len(lengths)), torch.nan)
        for entry in entries:
            if entry["method"] == method:
                image[depths.index(entry["depth"]), lengths.index(entry["length"])] = entry["score"]
        panel.imshow(image, cmap="RdYlGn", vmin=-0.4, vmax=1.4, aspect="auto")
        for row in range(len(depths)):
            for column in range(len(lengths)):
                if not image[row, column].isnan():
                    text = f"{100 * image[row, column].item():.0f}"
                    panel.text(column, row, text, ha="center", va="center", fontsize=7)
        panel.set_title(f"{method}: {image.nanmean().item():.0%}", fontsize=8)
        panel.set_xticks(range(len(lengths)), [f"{length / 1024:g}K" for length in lengths], fontsize=8)
        panel.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=8)
    for panel in axes.flat[len(methods) :]:
        panel.set_visible(False)
    n_keys = entries[0]["keys"]
    what = "pass-key" if n_keys == 1 else f"one of {n_keys} needles"
    budget = max(entry["budget"] for entry in entries)
    figure.suptitle(f"{what} found, % (budget {budget}); depth of the key by length of the text", fontsize=9)
    save(figure, path)


# --------------------------------------------------------------------------------------------------------------------
# Speed: bench.py
# --------------------------------------------------------------------------------------------------------------------

CONTENDERS = {"dense": GREY, "sparse": OURS, "transformers": COLOURS["H2O"]}
KINDS = {
    "layer": GREY,
    "kernel": GREY,
    "streamed: dense layer": "#2a6fbb",
    "streamed: calibration": "#e08e0b",
    "fetched for the next token": OURS,
    "copy": OURS,
}


def draw_speed(results, path):
    """Tokens/s with what the bandwidth allows, memory, and where a sparse token's time goes, by context length."""
    figure, (speed, memory, stages) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    rows = results["rows"]
    contexts = sorted({row["context"] for row in rows})
    for name, colour in CONTENDERS.items():
        mine = [row for row in rows if row["name"] == name]
        x = [row["context"] for row in mine]
        if not mine:
            continue
        speed.plot(x, [1 / row["seconds"] for row in mine], marker="o", ms=4, color=colour, label=name)
        if name != "transformers":
            least = [1 / row["least_seconds"] for row in mine]
            speed.plot(x, least, ls=":", color=colour, label=f"{name}: bandwidth's limit")
        known = [row for row in mine if row["memory"]]
        memory.plot(
            [r["context"] for r in known],
            [r["memory"] / 1e6 for r in known],
            marker="o",
            ms=4,
            color=colour,
            label=name,
        )
    speed.set(title="tokens/s")
    speed.set_ylim(0)
    memory.set(title="peak memory beside the weights, MB")
    with_stages = [row for row in rows if "stages" in row]
    base = [0.0] * len(with_stages)
    for stage in dict.fromkeys(stage for row in with_stages for stage in row["stages"]):
        height = [1e3 * row["stages"][stage] for row in with_stages]
        if any(height):
            stages.bar(range(len(height)), height, bottom=base, label=stage, width=0.6)
            base = [low + more for low, more in zip(base, height)]
    stages.set_xticks(range(len(with_stages)), [f"{row['context'] / 1024:g}K" for row in with_stages])
    stages.set(title="a sparse token's time, ms", xlabel="context")
    for axes in (speed, memory):
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, [f"{n / 1024:g}K" for n in contexts])
        axes.set_xlabel("context")
    for axes in (speed, memory, stages):
        bare(axes)
        axes.legend(fontsize=7)
    threads = f", {results['threads']} threads" if results["device"] == "CPU" else ""
    figure.suptitle(f"{results['device']}{threads}, {results['weights']}, {results['dtype']}", fontsize=10)
    save(figure, path)


def draw_kernels(results, path):
    """Each kernel's share of its ceiling, by context length."""
    rows = results["kernels"]
    names = list(dict.fromkeys(row["path"] for row in rows))
    contexts = sorted({row["n_tokens"] for row in rows})
    figure, axes = plt.subplots(figsize=(9, 0.4 * len(names) + 1.4), layout="constrained")
    for i, n_tokens in enumerate(contexts):
        mine = {
            row["path"]: 100 * max(row["share_of_copy"], row["share_of_matmul"])
            for row in rows
            if row["n_tokens"] == n_tokens
        }
        places = [names.index(name) + (i - (len(contexts) - 1) / 2) * 0.25 for name in mine]
        axes.barh(places, list(mine.values()), height=0.22, label=f"{n_tokens / 1024:g}K tokens")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("% of a copy's bandwidth or of a matrix product's speed, whichever is nearer")
    axes.set_title(results["device"])
    axes.legend(fontsize=8)
    bare(axes)
    save(figure, path)


def draw_timeline(results, path):
    """Two tokens: what computes, and what crosses the link meanwhile."""
    lanes, (start, *borders, end) = results["timeline"], results["window"]
    figure, axes = plt.subplots(figsize=(12, 0.9 + 0.6 * len(lanes)), layout="constrained")
    shown = {}
    for place, spans in enumerate(lanes.values()):
        for kind in dict.fromkeys(kind for *_, kind in spans):
            bars = [
                (1e3 * (s - start), 1e3 * took) for s, took, k in spans if k == kind and s + took >= start and s <= end
            ]
            shown[kind] = axes.broken_barh(
                bars, (place - 0.35, 0.7), color=KINDS[kind], edgecolor=KINDS[kind], linewidth=0.6
            )
    axes.set_yticks(range(len(lanes)), list(lanes))
    axes.invert_yaxis()
    for border in borders:
        axes.axvline(1e3 * (border - start), color="black", lw=0.8, ls="--")
    axes.set_xlim(0, 1e3 * (end - start))
    axes.set_xlabel("ms")
    axes.legend(
        shown.values(),
        shown,
        fontsize=8,
        ncols=len(shown),
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        frameon=False,
    )
    measured = "traced on " + results["device"] if "device" in results else "drawn from a model, not measured"
    last = results["modelled"][-1]["context"]
    link = "" if "device" in results else f", link {results['link_gb_s']:g} GB/s"
    figure.suptitle(f"Two tokens, {results['model_shape']} at {last:,} tokens{link}: {measured}", fontsize=10)
    for spine in ("top", "right", "left"):
        axes.spines[spine].set_visible(False)
    save(figure, path)
