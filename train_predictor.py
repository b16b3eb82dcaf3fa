"""Trains the predictor: collects attention histories of an LLM, and fits the shared convolution to them.

    python train_predictor.py collect --data data
    python train_predictor.py train --data data --out weights/predictor.safetensors

Reading order: the corpus (documents, their split, contexts), `record` (one dense pass -> windows of pooled rows),
`Window` (a file that training reads), `partially_observed` (what sparse decoding would see of it), `scores_of_rows`
(many predictions in one pass), the losses, `train`, the command line. The method is in attnpred.py; recovery.py judges
the outcome.
"""

import argparse
import hashlib
import json
import math
import os
import pathlib
import random
import statistics
import sys
import sysconfig
from dataclasses import dataclass, replace

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from tqdm import tqdm

import kernels
from attnpred import Config, InputError, OneLineParser, Predictor, exit_status, load_predictor
from model import causal_attention, load_model
from rivals import block_mass
from weights.fetch_llm import DEFAULT_LLM, fetch_default_llm

# --------------------------------------------------------------------------------------------------------------------
# Corpus
# --------------------------------------------------------------------------------------------------------------------

SPLITS = {
    "train": range(0, 8),
    "validation": range(8, 9),
    "test": range(9, 10),
}  # by the last digit of a document's hash
MIN_DOCUMENT_CHARS = 1000


@dataclass(frozen=True)
class Document:
    name: str
    text: str

    @property
    def split(self) -> str:
        """By a hash of the text, so that no text is on two sides, whatever its name."""
        digit = int(hashlib.sha256(self.text.encode()).hexdigest(), 16) % 10
        return next(split for split, digits in SPLITS.items() if digit in digits)


def python_documents() -> dict[str, list[Document]]:
    """What every CPython installation has: the language reference, and the standard library's sources."""
    from pydoc_data import topics

    root = pathlib.Path(sysconfig.get_path("stdlib"))
    outside = {"site-packages", "test", "tests", "pydoc_data", "idlelib", "lib2to3", "__pycache__"}
    paths = [path for path in sorted(root.rglob("*.py")) if not outside & set(path.relative_to(root).parts)]
    return {
        "reference": [Document(f"topic {name}", text) for name, text in sorted(topics.topics.items())],
        "source": [Document(str(path.relative_to(root)), path.read_text("utf-8", "replace")) for path in paths],
    }


def read_texts(paths) -> list[Document]:
    """The user's own files, whole. Raises InputError for one that cannot be read as UTF-8."""
    documents = []
    for path in paths:
        try:
            documents.append(Document(str(path), pathlib.Path(path).read_text("utf-8")))
        except OSError as error:
            raise InputError(f"text {path} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise InputError(f"text {path} is not UTF-8 (byte {error.start}): convert it first") from None
    return documents


def text_documents(paths) -> dict[str, list[Document]]:
    """The user's own files, cut into sections, so that there are documents to split even where there is one file."""
    documents = read_texts(paths)
    if not any(document.text.strip() for document in documents):
        raise InputError("the text is empty: give files with some text")
    sections = []
    for document in documents:
        size = max(MIN_DOCUMENT_CHARS, min(20000, len(document.text) // 100))
        for start in range(0, len(document.text), size):
            sections.append(Document(f"{document.name}:{start}", document.text[start : start + size]))
    return {"text": sections}


@dataclass(frozen=True)
class Context:
    """Tokens for one dense pass, and where they come from."""

    name: str
    tokens: list[int]
    ends: list[int]  # a window of rows is recorded up to each of these positions


def draw_contexts(documents, split, lengths, count, n_windows, rows, tokenizer, seed):
    """Yield `count` contexts of a split: kinds of text and lengths take turns, every third one is a chat if it can be.

    Documents are packed one behind another until a context is full, in an order drawn from the seed. Raises
    InputError where a split holds too little text for its longest context.
    """
    rng = random.Random(f"{seed} {split}")
    pools = {}
    for kind, members in documents.items():
        kept = {d.text: d for d in members if d.split == split and len(d.text) >= MIN_DOCUMENT_CHARS}
        pools[kind] = sorted(kept.values(), key=lambda d: d.name)
    queues = {kind: [] for kind in pools}
    kinds = [kind for kind in pools if pools[kind]]
    if not kinds:
        raise InputError(
            f"no text in the {split} split: give more, or longer, documents (from {MIN_DOCUMENT_CHARS} characters)"
        )
    for index in range(count):
        kind, length = kinds[index % len(kinds)], lengths[index // len(kinds) % len(lengths)]
        names, ids = [], []
        for _ in range(2 * len(pools[kind])):  # no document more than twice in a context
            if len(ids) >= length:
                break
            if not queues[kind]:
                queues[kind] = rng.sample(pools[kind], len(pools[kind]))
            document = queues[kind].pop()
            names.append(document.name)
            ids += tokenizer.encode(document.text + "\n\n", special_tokens=False)
        if len(ids) < length:
            raise InputError(
                f"the {split} split holds only {len(ids)} tokens for a context of {length}: give more text"
            )
        chat = index % 3 == 2 and tokenizer.has_chat_template
        tokens = chat_tokens(tokenizer, ids, length, rows, rng) if chat else ids[:length]
        low = min(max(rows, 1024), length)
        ends = sorted({rng.randint(low, length) for _ in range(n_windows - 1)} | {length})
        yield Context(f"{split} {index}: {'chat about ' if chat else ''}{kind} {', '.join(names)}", tokens, ends)


def chat_tokens(tokenizer, ids, length, rows, rng):
    """Exactly `length` tokens: a document, the request to repeat a passage of it, and that passage as the answer."""
    answer_len = min(rows + 64, length // 4)
    start = rng.randint(0, max(0, length - 3 * answer_len))
    answer = ids[start : start + answer_len]
    opening = tokenizer.decode(answer[:12])
    question = f"\n\nRepeat the passage that begins with: {opening}"
    frame = tokenizer.encode(tokenizer.chat([{"role": "user", "content": question}]))
    document = tokenizer.decode(ids[: length - answer_len - len(frame)])
    prompt = tokenizer.encode(tokenizer.chat([{"role": "user", "content": document + question}]))
    return (prompt + answer + ids)[:length]


# --------------------------------------------------------------------------------------------------------------------
# Recording
# --------------------------------------------------------------------------------------------------------------------


def in_blocks(k, block_size):
    """Keys (Hk, T, D) as a cache (Hk, N, b, D), the last block padded with zeros."""
    k = F.pad(k, (0, 0, 0, -k.shape[1] % block_size))
    return k.unflatten(1, (-1, block_size))


@torch.inference_mode()
def record(model, config: Config, tokens, ends, rows):
    """One dense pass over tokens -> for each end: pooled rows and block masses, both (L', heads, rows, N) float16.

    The rows are those of the positions end - rows ... end - 1. Everything is pooled as soon as a layer has its q and
    k, so that memory holds the outcome, never an attention matrix.
    """
    m = model.config
    heads = m.n_kv_heads if config.select_heads == "kv" else m.n_heads
    shape = m.n_layers - config.dense_layers, heads, rows
    windows = [[torch.empty(*shape, config.n_blocks(end), dtype=torch.float16) for _ in range(2)] for end in ends]

    def attend(layer, q, k, v):
        if layer >= config.dense_layers:
            k_cache = in_blocks(k, config.block_size)  # (Hk, N, b, D)
            for end, (pooled, mass) in zip(ends, windows):
                last = q[:, end - rows : end]  # (Hq, rows, D)
                maxima, _ = kernels.pool_history(last, k_cache, end)  # (Hq, rows, N)
                sums = block_mass(last, k_cache, end)  # (Hq, rows, N)
                pooled[layer - config.dense_layers] = maxima.unflatten(0, (heads, -1)).mean(1)
                mass[layer - config.dense_layers] = sums.unflatten(0, (heads, -1)).mean(1)
        return causal_attention(layer, q, k, v)

    model.hidden(torch.tensor(tokens), torch.arange(len(tokens)), attend)
    return windows


def save_atomically(tensors, path, metadata):
    """Write a safetensors file under a scratch name first: what has the right name is whole. Raises InputError."""
    scratch = path.with_name(f".{path.name}.partial")
    try:
        safetensors.torch.save_file(tensors, scratch, {name: str(value) for name, value in metadata.items()})
        os.replace(scratch, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"cannot write {path} ({error}): what was there stays; make room and run again") from None
    finally:
        scratch.unlink(missing_ok=True)


def collect(args):
    """Record windows of training and validation contexts into args.data; those that are there already are kept."""
    config = Config(select_heads=args.select_heads, block_size=args.block_size, dense_layers=args.dense_layers)
    if args.rows < config.history_len + 1:
        raise InputError(
            f"a window of {args.rows} rows holds no row behind a history: at least {config.history_len + 1} would do"
        )
    if min(args.lengths) < args.rows:
        raise InputError(
            f"a context of {min(args.lengths)} tokens is shorter than a window of {args.rows} rows: give longer ones"
        )
    documents = text_documents(args.text) if args.text else python_documents()
    model, tokenizer = load_model(args.model or str(fetch_default_llm()), getattr(torch, args.dtype), "cpu")
    if max(args.lengths) > model.config.context_len:
        raise InputError(f"the model's context is {model.config.context_len} tokens: {max(args.lengths)} is too long")
    corpus = (
        "own files" if args.text else f"CPython {sys.version.split()[0]}: pydoc_data.topics and the standard library"
    )
    common = {"llm": pathlib.Path(args.model).name if args.model else DEFAULT_LLM, "corpus": corpus, "seed": args.seed}
    common |= {name: getattr(config, name) for name in WINDOW_SETTINGS} | {"rows": args.rows}
    data = make_folder(args.data)
    settle(data / "settings.json", common)
    for split, count in (("train", args.contexts), ("validation", args.validation_contexts)):
        contexts = draw_contexts(documents, split, args.lengths, count, args.windows, args.rows, tokenizer, args.seed)
        for index, context in enumerate(
            tqdm(contexts, f"collecting {split}", count, unit="context", disable=args.quiet)
        ):
            paths = [data / f"{split}-{index:03d}-{end:05d}.safetensors" for end in context.ends]
            if all(path.exists() for path in paths):
                continue
            windows = record(model, config, context.tokens, context.ends, args.rows)
            for path, end, (pooled, mass) in zip(paths, context.ends, windows):
                if not (pooled.isfinite().all() and mass.isfinite().all()):
                    raise InputError(f"the model's attention over {context.name[:60]!r} is not finite: it is not kept")
                about = common | {"origin": context.name, "n_tokens": end}
                save_atomically({"pooled": pooled, "mass": mass}, path, about)


def refuse_changes(noted, settings, what, remedy):
    """InputError for the first of the settings that is not as it was noted."""
    for name, value in settings.items():
        if noted.get(name) != value:
            raise InputError(f"{what} {name} = {noted.get(name)}, not {value}: {remedy}")


def settle(path, settings):
    """One folder, one kind of data: note the settings, or insist on those noted before."""
    try:
        if not path.exists():
            scratch = path.with_name(f".{path.name}.partial")
            scratch.write_text(json.dumps(settings, indent=1))
            os.replace(scratch, path)
        noted = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be written or read ({error}): give another folder with --data") from None
    refuse_changes(noted, settings, f"{path.parent} was collected with", "give another --data")


def make_folder(path) -> pathlib.Path:
    path = pathlib.Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder {path} cannot be made: {error.strerror}") from None
    return path


# --------------------------------------------------------------------------------------------------------------------
# Training data
# --------------------------------------------------------------------------------------------------------------------

WINDOW_SETTINGS = ("block_size", "dense_layers", "select_heads", "sink_tokens", "local_tokens")


class Window:
    """One file of `collect`: consecutive rows of every sparse layer and head, read a head at a time."""

    def __init__(self, path):
        try:
            file = safetensors.safe_open(path, "pt")
            about = file.metadata()
            self.n_tokens = int(about["n_tokens"])
            self.pooled, self.mass = file.get_slice("pooled"), file.get_slice("mass")  # (L', heads, rows, N) each
        except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
            raise InputError(f"{path} is no window of `collect` ({error}): remove it, and collect again") from None
        self.path, self.about = path, about
        self.config = Config(**{name: type(getattr(Config, name))(about[name]) for name in WINDOW_SETTINGS})
        self.layers, self.heads, self.rows, self.n_blocks = self.pooled.get_shape()
        first = self.n_tokens - self.rows + 1
        self.middle = [self.config.middle(first + row) for row in range(self.rows)]  # (start, end) when row is computed

    def all_heads(self):
        return [(layer, head) for layer in range(self.layers) for head in range(self.heads)]

    def load(self, heads):
        """pooled and mass of [(sparse layer, head), ...]: (B, rows, N) float32 each. Raises InputError for NaN."""
        tensors = [
            torch.stack([part[layer : layer + 1, head : head + 1][0, 0] for layer, head in heads]).float()
            for part in (self.pooled, self.mass)
        ]
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise InputError(f"{self.path} holds NaN or infinity: remove it, and collect again")
        return tensors


def open_windows(folder, split) -> list[Window]:
    paths = sorted(pathlib.Path(folder).glob(f"{split}-*.safetensors"))
    if not paths:
        raise InputError(f"{folder} holds no {split} windows: `train_predictor.py collect --data {folder}` makes them")
    return [Window(path) for path in paths]


def partially_observed(pooled, mass, middle, topk_blocks, first, phase, decay, interval):
    """What sparse decoding would have seen of true rows: pooled, mass (B, rows, N) -> (B, rows, N).

    From row `first` on, only sink, local window and the `topk_blocks` best by a decayed mean of the rows before are
    seen, the others are zero, and what is seen is renormalised; every interval-th row is true. The history that the
    choice rests on is the one observed so far, as in decoding.
    """
    rows = pooled.clone()
    score = pooled[:, 0].clone()  # (B, N)
    for r in range(1, pooled.shape[1]):
        start, end = middle[r]
        if r >= first and (r + phase) % interval and end - start > topk_blocks:
            seen = torch.ones_like(score)  # (B, N)
            seen[:, start:end] = 0
            seen.scatter_(1, score[:, start:end].topk(topk_blocks).indices + start, 1.0)
            recovery = (mass[:, r] * seen).sum(1, keepdim=True)  # (B, 1)
            rows[:, r] = pooled[:, r] * seen / recovery.clamp_min(1e-6)
        score.lerp_(rows[:, r], 1 - decay)
    return rows


# --------------------------------------------------------------------------------------------------------------------
# Network and loss
# --------------------------------------------------------------------------------------------------------------------


def starting_point(seed, last_rows=0.6, noise=0.3) -> Predictor:
    """Scores with the mean row plus last_rows times (1, 1.2, 0.35) of the last three; all else is small and random.

    Channel 1 of the first layer is 1 everywhere. Behind the image's lower edge it is padding, 0: so the second layer
    can tell the last row from all others, which is the only place in time that this architecture knows.
    """
    predictor = Predictor()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in predictor.parameters():
            bound = noise * p[0].numel() ** -0.5 if p.ndim > 1 else noise / 3
            p.uniform_(-bound, bound, generator=generator)
        w1, b1, w2, w3 = (
            predictor.get_parameter(name) for name in ("conv1.weight", "conv1.bias", "conv2.weight", "conv3.weight")
        )
        w1[:3] = b1[:3] = 0
        w1[0, 0, 1, 1] = 1  # channel 0: the image
        b1[1] = 1  # channel 1: 1
        w1[2, 0, :2, 1] = torch.tensor([0.7, 1.0])  # channel 2: the image and the row above
        w2[:2] = predictor.conv2.bias[:2] = predictor.conv3.bias[:] = 0
        w2[0, 0, 1, 1] = 1  # channel 0: the image
        w2[1, 2, 1, 1], w2[1, 2, 0, 1] = 1, 0.5
        w2[1, 1, 2, 1] = -4  # channel 1: the last rows at the lower edge, 0 elsewhere
        w3[0, 2:] *= 0.1
        w3[0, 0], w3[0, 1] = 1, last_rows * Config.history_len
    return predictor


def contributions(rows, weights, top, bottom):
    """kernels.contributions_reference over the whole width: (B, rows, n) -> p where no unknown row is touched."""
    return kernels.contributions_reference(rows, weights, True, True, top, bottom)


def scores_of_rows(rows, targets, weights, history_len):
    """The predictor's scores for many targets at once: what it says of row t when it sees rows t - H ... t - 1.

    rows (B, R, n), targets (T,) int64 -> (B, T, n). Inside its window a row's contribution is the same for every
    target (see kernels.py, section 2), so the slab is convolved once, and each target adds the four rows whose
    padding is its own.
    """
    n_batch, n_rows, n = rows.shape
    inner = torch.arange(2, n_rows - 2)  # rows with context on both sides
    within = (inner >= targets[:, None] - history_len + 2) & (inner <= targets[:, None] - 3)  # (T, R - 4)
    p = contributions(rows, weights, False, False).float()  # (B, R - 4, n)
    total = torch.einsum("tr,brn->btn", within.float(), p)
    for first, top in ((targets - history_len, True), (targets - 4, False)):
        edge = rows[:, first[:, None] + torch.arange(4)].flatten(0, 1)  # (B * T, 4, n)
        total = total + contributions(edge, weights, top, not top).float().sum(1).view(n_batch, -1, n)
    return total / history_len + weights["conv3.bias"]


def mse_loss(scores, mass, valid):
    """Of scores against block masses, as the paper trains."""
    return (scores - mass).square()[valid.expand_as(mass)].mean() * 1e3


def intensity_loss(scores, mass, valid):
    """Cross-entropy of softplus(scores) over its sum against the masses over theirs, all heads weighing the same.

    The best score is the expected mass itself, up to a factor; unlike with a squared error, small ones count too.
    """
    floor = 3e-4  # far below it a score acts as a logit, so that a negative one still learns
    u = scores / floor
    log_intensity = torch.where(u < -15, u, torch.log(F.softplus(u) + 1e-9))
    log_p = F.log_softmax(log_intensity.masked_fill(~valid, -1e4), -1)  # (B, T, n)
    share = F.normalize(mass * valid, p=1, dim=-1, eps=1e-9)  # (B, T, n)
    return -(log_p * share).sum(-1).mean()


LOSSES = {"mse": mse_loss, "intensity": intensity_loss}


# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------

INPUT_SCALE = 32.0  # rows are multiplied by it and conv1 divided, so that Adam's steps there are relatively larger
BUDGETS = (256, 512, 1024)
MIN_MIDDLE_BLOCKS = 32  # a window with fewer teaches no choice


def scaled(state, factor):
    """Weights whose scores of image * factor are factor times those of `state` of image."""
    powers = {"conv1.weight": -1, "conv3.weight": 1, "conv3.bias": 1}
    return {name: w.detach().contiguous() * factor ** powers.get(name, 0) for name, w in state.items()}


def draw_batch(windows, rng, args, history_len):
    """A slab of rows of args.batch heads of one window, partly observed, and its targets.

    Returns rows (B, H + args.span, n), targets (T,) rows of it, their masses (B, T, n), and which columns are of the
    middle (T, n).
    """
    window = rng.choice(windows)
    heads = rng.choices(window.all_heads(), k=args.batch)
    pooled, mass = window.load(heads)  # (B, rows, N) each
    first = rng.randrange(window.rows - history_len - args.span + 1)
    kind = rng.random()
    if kind < args.observed:  # decoding for long, or only since some row of the slab
        since = 0 if kind < args.observed / 2 else rng.randrange(first, first + history_len)
        topk = int(math.exp(rng.uniform(math.log(6), math.log(64))))
        phase, decay = rng.randrange(args.calibration_interval), rng.uniform(0.7, 0.97)
        pooled = partially_observed(pooled, mass, window.middle, topk, since, phase, decay, args.calibration_interval)
    targets = torch.arange(history_len + rng.randrange(args.stride), history_len + args.span, args.stride)  # (T,)
    ends = torch.tensor([window.middle[first + t][1] for t in targets])  # (T,)
    start, end = window.middle[first + targets[-1]]
    left = rng.randrange(start, max(start, end - args.columns) + 1)
    columns = torch.arange(left, min(end, left + args.columns))  # (n,)
    rows = pooled[:, first : first + history_len + args.span, columns]
    return rows, targets, mass[:, first + targets][..., columns], columns < ends[:, None]


def recovered(scores, mass, middle, topk_blocks):
    """Recovery, and the blocks, of one row: scores (B, n) of its middle, mass (B, N) -> (B,), and (B, K) int64."""
    start, end = middle
    blocks = scores.topk(min(topk_blocks, end - start)).indices + start  # (B, K)
    return mass[:, :start].sum(1) + mass[:, end:].sum(1) + mass.gather(1, blocks).sum(1), blocks


@torch.no_grad()
def validate(windows, weights, config, stride=16):
    """Mean recovery at each of BUDGETS, with true histories, over all heads and every stride-th row."""
    sums = {budget: [] for budget in BUDGETS}
    for window in windows:
        pooled, mass = window.load(window.all_heads())  # (B, rows, N) each
        targets = torch.arange(config.history_len + stride // 2, window.rows, stride)
        start, end = window.middle[-1]
        scores = scores_of_rows(pooled[..., start:end], targets, weights, config.history_len)  # (B, T, n)
        for i, t in enumerate(targets.tolist()):
            start, end = window.middle[t]
            for budget, values in sums.items():
                topk = replace(config, budget=budget).topk_blocks
                values.append(recovered(scores[:, i, : end - start], mass[:, t], (start, end), topk)[0].mean().item())
    return {budget: statistics.fmean(values) for budget, values in sums.items()}


@torch.no_grad()
def validate_closed_loop(windows, weights, config, seed, budget=512, n_heads=24, steps=64):
    """Mean recovery where the history is what the predictor's own choices let it see, on some heads."""
    values = []
    topk = replace(config, budget=budget).topk_blocks
    for window in windows:
        heads = random.Random(seed).sample(window.all_heads(), min(n_heads, len(window.all_heads())))
        pooled, mass = window.load(heads)
        history = pooled[:, : config.history_len].clone()  # (B, H, N)
        ring = torch.zeros_like(history)
        newest, known_end = config.history_len - 1, 0
        for step, t in enumerate(range(config.history_len, min(window.rows, config.history_len + steps)), 1):
            start, end = window.middle[t]
            known_end = max(start, known_end)
            scores = kernels.predict_incremental(history, ring, newest, start, end, known_end, weights)  # (B, n)
            recovery, blocks = recovered(scores, mass[:, t], (start, end), topk)
            values.append(recovery.mean().item())
            newest, known_end = (newest + 1) % config.history_len, end
            history[:, newest] = pooled[:, t]
            if step % config.calibration_interval:
                seen = torch.ones_like(mass[:, t])  # (B, N)
                seen[:, start:end] = 0
                seen.scatter_(1, blocks, 1.0)
                history[:, newest] *= seen / recovery[:, None]
    return statistics.fmean(values)


def open_data(args):
    """Config, training windows, and the few validation windows that a curve is drawn from."""
    training, validation = open_windows(args.data, "train"), open_windows(args.data, "validation")
    config = replace(training[0].config, calibration_interval=args.calibration_interval)
    training = [window for window in training if window.middle[0][1] - window.middle[0][0] >= MIN_MIDDLE_BLOCKS]
    if not training:
        raise InputError(f"the windows in {args.data} leave too few blocks to choose from: collect longer contexts")
    if training[0].rows < config.history_len + args.span:
        raise InputError(f"windows of {training[0].rows} rows are shorter than H + --span = H + {args.span}: lower it")
    largest = 2 * replace(config, budget=max(BUDGETS)).topk_blocks
    long = [window for window in validation if window.middle[0][1] - window.middle[0][0] >= largest] or validation
    return config, training, long[:: max(1, len(long) // args.validation_windows)][: args.validation_windows]


def train(args):
    """Fit the predictor to args.data; args.out gets the weights of the best validation recovery. Resumes."""
    out = pathlib.Path(args.out)
    checkpoint = out.with_suffix(".checkpoint")
    make_folder(out.parent)
    config, training, validation = open_data(args)
    predictor = load_predictor(args.init_from) if args.init_from else starting_point(args.seed)
    predictor.load_state_dict(scaled(predictor.state_dict(), INPUT_SCALE))
    parameters = dict(predictor.requires_grad_(True).named_parameters())
    optimizer = torch.optim.Adam(predictor.parameters(), lr=args.lr, betas=(0.9, 0.98))
    average = {name: p.detach().clone() for name, p in parameters.items()}
    settings = {
        name: str(getattr(args, name)) for name in vars(args) if name not in ("out", "quiet", "function", "restart")
    }
    curve, done = [], 0
    if checkpoint.exists() and not args.restart:
        state = load_checkpoint(checkpoint, settings)
        predictor.load_state_dict(state["predictor"])
        optimizer.load_state_dict(state["optimizer"])
        average, curve, done = state["average"], state["curve"], state["done"]
    elif out.exists() and not args.restart:
        raise InputError(f"{out} exists, with no checkpoint to go on from: give another --out, or --restart")
    running = curve[-1]["loss"] if curve else None
    bar = tqdm(range(done, args.steps), "training", args.steps, initial=done, unit="step", disable=args.quiet)
    for step in bar:
        rng = random.Random(f"{args.seed} {step}")  # of the step alone: a resumed run draws the same batches
        rows, targets, mass, valid = draw_batch(training, rng, args, config.history_len)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bfloat16):
            scores = scores_of_rows(rows * INPUT_SCALE, targets, parameters, config.history_len) / INPUT_SCALE
        loss = LOSSES[args.loss](scores, mass, valid)
        if not loss.isfinite():
            raise InputError(
                f"the loss is {loss.item()} at step {step}: lower --lr; {out} keeps the best weights so far"
            )
        if step == 0:
            curve.append(assess(average, loss.item(), 0, validation, config, args))
            keep_best(average, curve, training[0].about, config, args)
        cosine = (1 + math.cos(math.pi * step / args.steps)) / 2
        optimizer.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / 50) * cosine
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(predictor.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for name, p in parameters.items():
                average[name].lerp_(p, 1 - min(args.average, (step + 1) / (step + 10)))
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % args.validate_every and step + 1 < args.steps:
            continue
        curve.append(assess(average, running, step + 1, validation, config, args))
        bar.set_postfix({name: f"{value:.4f}" for name, value in curve[-1].items() if name.endswith("512")})
        keep_best(average, curve, training[0].about, config, args)
        state = {"predictor": predictor.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
        save_checkpoint(state | {"curve": curve, "done": step + 1, "settings": settings}, checkpoint)
        draw_curve(curve, out.with_suffix(".png"))
    print(", ".join(f"{name}: {value:.4g}" for name, value in curve[-1].items()))


def assess(weights, loss, step, validation, config, args):
    """A row of the curve."""
    weights = scaled(weights, 1 / INPUT_SCALE)
    closed = validate_closed_loop(validation[:2], weights, config, args.seed)
    true = validate(validation, weights, config)
    return {"step": step, "loss": loss, "closed loop, 512": closed} | {f"true history, {b}": r for b, r in true.items()}


def keep_best(weights, curve, about, config, args):
    """Write the weights, if the last row of the curve is the best: at 512, true history and closed loop together."""
    quality = [row["true history, 512"] + row["closed loop, 512"] for row in curve]
    if quality[-1] < max(quality):
        return
    about = {name: about[name] for name in ("llm", "corpus", "block_size", "select_heads")}
    about |= {"history_len": config.history_len, "seed": args.seed, "steps": curve[-1]["step"], "loss": args.loss}
    about |= {"validation_recovery": json.dumps({name: round(value, 4) for name, value in curve[-1].items()})}
    save_atomically(scaled(weights, 1 / INPUT_SCALE), pathlib.Path(args.out), about)


def load_checkpoint(path, settings):
    try:
        state = torch.load(path, weights_only=True)
        noted = state["settings"]
    except Exception as error:  # unpickling a foreign file can fail in any way
        raise InputError(f"checkpoint {path} cannot be read ({first_line(error)}): --restart begins anew") from None
    refuse_changes(noted, settings, f"checkpoint {path} has", "--restart begins anew")
    return state


def save_checkpoint(state, path):
    scratch = path.with_name(f".{path.name}.partial")
    try:
        torch.save(state, scratch)
        os.replace(scratch, path)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"cannot write {path} ({first_line(error)}): what was there stays; make room and run again"
        ) from None
    finally:
        scratch.unlink(missing_ok=True)


def first_line(error):
    return str(error).strip().split("\n")[0]


def draw_curve(curve, path):
    """Loss and validation recovery over the steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    steps = [row["step"] for row in curve]
    left.plot(steps[1:], [row["loss"] for row in curve[1:]], marker=".")  # the start's loss is of one batch only
    left.set(title="loss, running mean", xlabel="step")
    for name, start in curve[0].items():
        if name not in ("step", "loss"):
            gains = [100 * (row[name] - start) for row in curve]
            right.plot(steps, gains, marker=".", label=f"{name}: from {start:.4f}")
    right.set(title="validation recovery, points above the start", xlabel="step")
    right.legend(fontsize=7)
    save_figure(figure, path)


def save_figure(figure, path):
    import plots

    try:
        plots.save(figure, path, dpi=90)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror})") from None


# --------------------------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------------------------


def parse_args(argv):
    parser = OneLineParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, parser_class=OneLineParser)
    defaults = Config()

    def command(function, text):
        sub = commands.add_parser(
            function.__name__, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        sub.set_defaults(function=function)
        sub.add_argument("--seed", type=int, default=0)
        sub.add_argument("--quiet", action="store_true", help="no progress bar")
        return sub

    sub = command(collect, "record attention rows of an LLM, of training and validation texts")
    sub.add_argument("--data", default="data", help="folder for the windows; an interrupted run goes on there")
    add_corpus(sub)
    sub.add_argument(
        "--lengths", type=int, nargs="+", default=[4096, 8192, 4096], help="tokens of a context; they take turns"
    )
    sub.add_argument("--contexts", type=int, default=20, help="for training")
    sub.add_argument("--validation-contexts", type=int, default=6)
    sub.add_argument("--windows", type=int, default=4, help="windows of rows recorded of each context")
    sub.add_argument("--rows", type=int, default=192, help="consecutive rows in a window")
    sub.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    sub.add_argument("--select-heads", default=defaults.select_heads, choices=["kv", "q"])
    sub.add_argument("--block-size", type=int, default=defaults.block_size)
    sub.add_argument("--dense-layers", type=int, default=defaults.dense_layers)

    sub = command(train, "fit the predictor to what collect recorded")
    sub.add_argument("--data", default="data", help="folder that collect filled")
    sub.add_argument(
        "--out", default="predictor.safetensors", help="the best weights; checkpoint and curve lie beside it"
    )
    sub.add_argument(
        "--init-from", help="continue from this predictor: safetensors, or a state dict such as the authors publish"
    )
    sub.add_argument("--restart", action="store_true", help="ignore a checkpoint")
    sub.add_argument("--loss", default="intensity", choices=sorted(LOSSES))
    sub.add_argument("--steps", type=int, default=4000)
    sub.add_argument("--lr", type=float, default=1e-3, help="the highest; it rises over 50 steps and falls as a cosine")
    sub.add_argument("--batch", type=int, default=12, help="heads to a step")
    sub.add_argument(
        "--span", type=int, default=32, help="rows behind the first target's history that targets are drawn from"
    )
    sub.add_argument("--stride", type=int, default=4, help="every so many of those rows is a target")
    sub.add_argument("--columns", type=int, default=160, help="blocks to a crop")
    sub.add_argument(
        "--observed", type=float, default=0.66, help="share of the steps with partially observed histories"
    )
    sub.add_argument("--calibration-interval", type=int, default=defaults.calibration_interval)
    sub.add_argument(
        "--average", type=float, default=0.995, help="decay of the running mean of the weights, which is what is kept"
    )
    sub.add_argument("--bfloat16", action=argparse.BooleanOptionalAction, default=True, help="convolve in bfloat16")
    sub.add_argument("--validate-every", type=int, default=1000)
    sub.add_argument("--validation-windows", type=int, default=4)
    return parser.parse_args(argv)


def add_corpus(sub):
    sub.add_argument("--text", nargs="+", metavar="FILE", help="own texts, instead of what CPython has")
    sub.add_argument("--model", help=f"Hugging Face folder or hub id of a Llama (default: {DEFAULT_LLM}, fetched once)")


def main(argv=None) -> int:
    def command():
        args = parse_args(argv)
        args.function(args)

    return exit_status("train_predictor", command)


if __name__ == "__main__":
    sys.exit(main())
