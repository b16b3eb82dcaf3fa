"""Train the predictor: collect attention histories of an LLM, and fit the shared convolution to them.

    python train_predictor.py collect --data data
    python train_predictor.py train --data data --out predictor.safetensors

The predictor ranks all blocks of the model by the attention that they will get. Its input is the history: rows of
attention, each of which belongs to M consecutive tokens. It is trained to predict the next row.

Reading order: the corpus, `record` (one dense pass -> windows of rows), `Window` (a file that training reads),
`scores_of_rows` (many predictions in one pass), the losses, `train`. Both commands may be interrupted: the same command
continues. The method is in attnpred.py; experiments/evaluate.py measures what a predictor is worth.
"""

import hashlib
import importlib.metadata
import io
import itertools
import json
import math
import os
import pathlib
import random
import statistics
import sys
import sysconfig
from dataclasses import replace

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from tqdm import tqdm

import attnpred
import kernels
from attnpred import Config, InputError, OneLineParser, Predictor, ShownDefaults, load_predictor, require
from model import causal_attention, checkpoint_targets, load_model
from weights.fetch_llm import DEFAULT_LLM, fetch_default_llm

# --------------------------------------------------------------------------------------------------------------------
# Corpus
# --------------------------------------------------------------------------------------------------------------------

SPLITS = ["train"] * 8 + ["validation", "test"]  # by the last digit of a document's hash
MIN_DOCUMENT_CHARS, MAX_DOCUMENT_CHARS = 1000, 20000
KINDS = {".md": "documentation", ".rst": "documentation", "METADATA": "documentation", ".h": "header"}
KINDS |= {".json": "data", ".csv": "data", ".yaml": "data"}


def split_of(text) -> str:
    """The split that a text belongs to. It follows from a hash of the text, so no text is in two splits."""
    return SPLITS[int(hashlib.sha256(text.encode()).hexdigest(), 16) % 10]


def installed_documents() -> dict[str, list[tuple[str, str]]]:
    """{kind of text: [(name, text)]} of CPython's language reference, its library, and the texts of all packages.

    The torch package is left out, because evaluate.py tests with its texts.
    """
    from pydoc_data import topics

    root = pathlib.Path(sysconfig.get_path("stdlib"))
    excluded = {"site-packages", "test", "tests", "pydoc_data", "idlelib", "lib2to3", "__pycache__"}
    found = {"reference": [(f"topic {name}", text) for name, text in sorted(topics.topics.items())]}
    sources = [path for path in sorted(root.rglob("*.py")) if not excluded & set(path.relative_to(root).parts)]
    found["source"] = [(str(path.relative_to(root)), read_start(path)) for path in sources]
    for package in sorted(importlib.metadata.distributions(), key=lambda package: package.name):
        for file in (package.files or []) if package.name != "torch" else []:
            kind = "license" if "LICENSE" in file.name.upper() else KINDS.get(file.suffix or file.name)
            if kind and (path := pathlib.Path(file.locate())).is_file():
                found.setdefault(kind, []).append((f"{package.name}/{file}", read_start(path)))
    return found


def read_start(path):
    """The first MAX_DOCUMENT_CHARS characters of a file."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(MAX_DOCUMENT_CHARS)


def text_documents(paths) -> dict[str, list[tuple[str, str]]]:
    """{"text": [(name, text)]} of the user's UTF-8 files. Each is cut into sections, so that one file fills all splits.

    Raises InputError for a file that cannot be read.
    """
    sections = []
    for path in paths:
        try:
            text = pathlib.Path(path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"text {path} cannot be read ({error}): give UTF-8 files") from None
        size = max(MIN_DOCUMENT_CHARS, min(MAX_DOCUMENT_CHARS, len(text) // 100))
        sections += [(f"{path}:{start}", text[start : start + size]) for start in range(0, len(text), size)]
    return {"text": sections}


def draw_contexts(documents, split, lengths, count, n_windows, window_tokens, tokenizer, seed):
    """Yield `count` contexts of a split: (what it consists of, its tokens, the text lengths at which its windows end).

    Kinds of text and lengths alternate; every third context is a chat. Documents, in an order drawn from the seed, are
    concatenated until a context is full. Raises InputError if a split has too little text for a context.
    """
    rng, pools = random.Random(f"{seed} {split}"), {}
    for kind, members in documents.items():
        names = {text: name for name, text in members if split_of(text) == split and len(text) >= MIN_DOCUMENT_CHARS}
        if names:
            pools[kind] = sorted(names.items(), key=lambda document: document[1])
    if not pools:
        raise InputError(f"no text in the {split} split: give more documents of {MIN_DOCUMENT_CHARS} characters")
    shuffled = {kind: endless(pool, rng) for kind, pool in pools.items()}
    for index in range(count):
        kind, length = list(pools)[index % len(pools)], lengths[index // len(pools) % len(lengths)]
        names, ids = [], []
        for text, name in itertools.islice(shuffled[kind], 2 * len(pools[kind])):  # each document at most twice
            names.append(name)
            ids += tokenizer.encode(text + "\n\n", special_tokens=False, control_tokens=False)
            if len(ids) >= length:
                break
        else:
            raise InputError(f"the {split} split has only {len(ids)} tokens for a context of {length}: give more text")
        chat = (index + index // len(pools)) % 3 == 2 and tokenizer.has_chat_template
        tokens = chat_about(tokenizer, ids, length, rng) if chat else ids[:length]
        low = min(max(window_tokens, 1024), length)
        ends = sorted({rng.randint(low, length) for _ in range(n_windows - 1)} | {length})
        yield f"{split} {index}: {'chat about ' if chat else ''}{kind} {', '.join(names)}", tokens, ends


def endless(pool, rng):
    """The documents of a pool in random order, again and again."""
    while True:
        yield from reversed(rng.sample(pool, len(pool)))


def chat_about(tokenizer, ids, length, rng):
    """Exactly `length` tokens: a document, the request to repeat a passage of it, and that passage as the answer."""
    answer_len = min(256, length // 4)
    start = rng.randint(0, max(0, length - 3 * answer_len))
    answer = ids[start : start + answer_len]
    opening = tokenizer.decode(answer[:12])
    question = f"\n\nRepeat the passage that begins with: {opening}"
    frame = tokenizer.chat_tokens([{"role": "user", "content": question}])
    document = tokenizer.decode(ids[: length - answer_len - len(frame)])
    prompt = tokenizer.chat_tokens([{"role": "user", "content": document + question}])
    return (prompt + answer + ids)[:length]


# --------------------------------------------------------------------------------------------------------------------
# Recording
# --------------------------------------------------------------------------------------------------------------------

ROWS = 128  # rows of a window


@torch.inference_mode()
def record(model, config: Config, tokens, ends):
    """One dense pass over tokens -> a window for each end: rows (layers, Hk, ROWS, N) float16, as decoding makes them.

    Row r belongs to the M tokens up to position end - 1 - (ROWS - 1 - r) * M. Each layer is pooled as soon as its q and
    k are known, so no attention matrix is kept.
    """
    m, interval = model.config, config.calibration_interval
    per_row = config.queries(interval)
    distance = interval // per_row  # tokens from one query of a row to the next
    shape = m.n_layers, m.n_kv_heads, ROWS
    windows = [torch.zeros(*shape, config.n_blocks(end), dtype=attnpred.HISTORY_DTYPE) for end in ends]

    def attend(layer, q, k, v):
        padded = F.pad(k, (0, 0, 0, -k.shape[1] % config.block_size))
        keys = padded.unflatten(1, (-1, config.block_size))[None]  # (1, Hk, N, b, D)
        for end, rows in zip(ends, windows):
            last = q[None, :, end - 1 - (ROWS * per_row - 1) * distance : end : distance]  # (1, Hq, ROWS * Q, D)
            rows[layer] = attnpred.pool_rows(last, keys, end, distance, per_row, "torch")[0][0]
        return causal_attention(layer, q, k, v)

    model(torch.tensor(tokens, device=model.device), torch.arange(len(tokens), device=model.device), attend)
    return windows


def collect(args):
    """Record windows of training and validation contexts in --data; existing windows are kept."""
    config = config_of_rows(vars(args))
    if min(args.lengths) < ROWS * args.interval:
        needed = f"{ROWS} rows of {args.interval} tokens need {ROWS * args.interval}"
        raise InputError(f"a context of {min(args.lengths)} tokens is too short: {needed}")
    documents = text_documents(args.text) if args.text else installed_documents()
    device, dtype, _ = attnpred.choose_device(args)
    model, tokenizer = load_model(args.model or str(fetch_default_llm()), dtype, device)
    if max(args.lengths) > model.config.context_len:
        raise InputError(f"the model's context is {model.config.context_len} tokens: {max(args.lengths)} is too long")
    installed = f"CPython {sys.version.split()[0]} and the packages beside it, without torch"
    settings = {name: str(getattr(args, name)) for name in WINDOW_SETTINGS}
    settings["llm"] = pathlib.Path(args.model).name if args.model else DEFAULT_LLM
    settings["weights"] = digest_of_model(model)
    settings["corpus"] = "own files" if args.text else installed
    settings["texts"] = digest(*sorted(text for members in documents.values() for _, text in members))
    data = make_folder(args.data)
    for path in data.glob("*.safetensors"):
        check_settings(Window(path).metadata, settings, f"{data} was collected", "give another --data")
    work = []
    for split, count in (("train", args.contexts), ("validation", args.validation_contexts)):
        amounts = args.lengths, count, args.windows, ROWS * args.interval
        for index, (origin, tokens, ends) in enumerate(draw_contexts(documents, split, *amounts, tokenizer, args.seed)):
            paths = [data / f"{split}-{index:03d}-{end:05d}.safetensors" for end in ends]
            if not all(path.exists() for path in paths):
                work.append((origin, tokens, ends, paths))
    for origin, tokens, ends, paths in tqdm(work, "collecting", unit="context", disable=None):
        for path, end, rows in zip(paths, ends, record(model, config, tokens, ends)):
            if not rows.isfinite().all():
                raise InputError(f"the attention over {origin[:60]!r} is not finite: use --dtype float32")
            write_tensors(path, {"rows": rows}, settings | {"origin": origin, "n_tokens": end})


def config_of_rows(settings) -> Config:
    """The Config of a decoder that makes rows with these settings, by name."""
    block_size, interval, queries = (int(settings[name]) for name in ("block_size", "interval", "queries"))
    return Config(block_size=block_size, calibration_interval=interval, calibration_queries=queries)


# --------------------------------------------------------------------------------------------------------------------
# Files: each notes options and digests of the data that it was made from; a run that continues it must have the same
# --------------------------------------------------------------------------------------------------------------------

WINDOW_SETTINGS = "seed", "lengths", "windows", "dtype", "block_size", "interval", "queries"
METHOD_SETTINGS = "block_size", "history_len", "calibration_interval", "calibration_queries"
TRAIN_SETTINGS = "seed", "dtype", "loss", "steps", "lr", "validate_every"


def digest(*parts) -> str:
    """The first 12 hexadecimal digits of a SHA-256 of the bytes of tensors, and of the JSON of other data."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            found.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        else:
            found.update(json.dumps(part).encode())
    return found.hexdigest()[:12]


def digest_of_model(model) -> str:
    """A digest of a Llama's configuration and weights."""
    return digest(repr(model.config), *itertools.chain(*checkpoint_targets(model).items()))


def digest_of_windows(windows) -> str:
    """A digest of the rows and the settings of windows."""
    return digest(*(part for window in windows for part in (sorted(window.metadata.items()), window.rows[:])))


def noted_in(path, name):
    """A value in the metadata of a safetensors file, or None."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return (file.metadata() or {}).get(name)
    except (OSError, safetensors.SafetensorError):
        return None


def make_folder(path) -> pathlib.Path:
    """Create a folder, if it does not exist, and its parents. Raises InputError."""
    path = pathlib.Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create folder {path}: {error.strerror}") from None
    return path


def write_atomically(path, data: bytes):
    """Write a temporary file, then give it the name `path`: readers see the old file or the new one."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path, tensors, metadata):
    """Write a safetensors file; the values of `metadata` are written as text."""
    write_atomically(path, safetensors.torch.save(tensors, {name: str(value) for name, value in metadata.items()}))


def check_settings(noted, settings, what, remedy):
    """Raise InputError for the first of `settings` that has another value in `noted`; `what` begins the message."""
    for name, value in settings.items():
        if noted.get(name) != value:
            raise InputError(f"{what} with {name} = {noted.get(name)}, not {value}: {remedy}")


class Window:
    """One file of `collect`: the rows of `record` for all layers and heads.

    config: the Config of a decoder with such a history; middle: per row, the (start, end) of the middle blocks when the
    selection before that row is made; in_middle (ROWS, N) bool: the same as a mask. Raises InputError.
    """

    def __init__(self, path):
        try:
            file = safetensors.safe_open(path, "pt")
            metadata = self.metadata = file.metadata()
            self.config, n_tokens = config_of_rows(metadata), int(metadata["n_tokens"])
            self.rows = file.get_slice("rows")  # (layers, Hk, ROWS, N)
            self.n_layers, _, self.n_rows, n_blocks = self.rows.get_shape()
            if n_blocks != self.config.n_blocks(n_tokens):
                raise ValueError(f"{n_tokens} tokens in {n_blocks} blocks")
        except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
            raise InputError(f"{path} is not a window of `collect` ({error}): remove it, and collect again") from None
        interval = self.config.calibration_interval
        lengths = range(n_tokens - self.n_rows * interval + 1, n_tokens + 1, interval)  # at each row's first token
        self.middle = [self.config.middle(length) for length in lengths]
        start, end = torch.tensor(self.middle).T[..., None]  # (ROWS, 1) each
        block = torch.arange(n_blocks)
        self.in_middle = (block >= start) & (block < end)  # (ROWS, N)

    def load(self, layers):
        """Rows of a layer, or of a slice of layers: (..., Hk, ROWS, N) float32."""
        return self.rows[layers].float()


# --------------------------------------------------------------------------------------------------------------------
# Network and losses
# --------------------------------------------------------------------------------------------------------------------


def starting_point(seed, last_rows=1.5, noise=0.3) -> Predictor:
    """A Predictor whose score is the mean row + last_rows * (1, 0.8, 0.16) times the last three rows + small noise.

    Channel 1 of the first layer is 1 in every row of the image and 0 in the padding below the last row. This lets the
    second layer tell the last rows from the others; the architecture has no other information on the position in time.
    """
    predictor = Predictor()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in predictor.parameters():
            bound = noise * p[0].numel() ** -0.5 if p.ndim > 1 else noise / 3
            p.uniform_(-bound, bound, generator=generator)
        w1, b1, w2, b2, w3, b3 = predictor.parameters()
        w1[:3] = b1[:3] = 0
        w1[0, 0, 1, 1] = 1  # channel 0: the image
        b1[1] = 1  # channel 1: the constant 1
        w1[2, 0, :2, 1] = torch.tensor([0.4, 1.0])  # channel 2: the image and the row above
        w2[:2] = b2[:2] = b3[:] = 0
        w2[0, 0, 1, 1] = 1  # channel 0: the image
        w2[1, 2, 1, 1], w2[1, 2, 0, 1] = 1, 0.4
        w2[1, 1, 2, 1] = -4  # channel 1: the last rows at the lower edge, 0 elsewhere
        w3[0, 2:] *= 0.1
        w3[0, 0], w3[0, 1] = 1, last_rows * Config.history_len
    return predictor


def scores_of_rows(rows, predicted, weights, history_len):
    """The predictor's scores for many rows at once. Row t is predicted from the history t - H ... t - 1.

    rows (B, R, n), predicted (T,) int64 -> (B, T, n) float32. A row in the interior of a history contributes the
    same to the scores of every history that has it in its interior (kernels.py, section 2). So all rows are convolved
    once, and each selection adds the contributions of the two rows at each edge of its own history.
    """
    inner = torch.arange(2, rows.shape[1] - 2, device=rows.device)  # (R - 4,), rows with two rows on both sides
    last = predicted[:, None] - 1  # (T, 1), the last row of each history
    in_interior = (inner > last - history_len + 2) & (inner < last - 1)  # (T, R - 4)
    p = kernels.contributions_reference(rows, (2, rows.shape[1] - 2, 0), weights).float()  # (B, R - 4, n)
    total = torch.einsum("tr,brn->btn", in_interior.float(), p)  # (B, T, n)
    for first, strip in ((predicted - history_len, (0, 2, 0)), (predicted - 4, (2, 4, 0))):
        edge = rows[:, first[:, None] + torch.arange(4, device=rows.device)]  # (B, T, 4, n)
        outer = kernels.contributions_reference(edge.flatten(0, 1), strip, weights).float()  # (B * T, 2, n)
        total = total + outer.sum(1).view_as(total)
    return total / history_len + weights["conv3.bias"]


def scaled(state, factor):
    """Return weights w' with score(w', factor * image) = factor * score(w, image); `state` has w by name."""
    powers = {"conv1.weight": -1, "conv3.weight": 1, "conv3.bias": 1}
    return {name: w.detach().contiguous() * factor ** powers.get(name, 0) for name, w in state.items()}


def mse_loss(scores, target, valid):
    """Squared error, the paper's loss, in units of 1e-3: scores and target (B, T, n), valid (T, n) bool -> scalar."""
    return (scores - target).square()[valid.expand_as(target)].mean() * 1e3


def relative_loss(scores, target, valid):
    """The sum of (target - s)^2 / s over a row, Pearson's chi-squared, where s > 0 is a softplus of the score.

    scores and target (B, T, n), valid (T, n) bool -> scalar. The minimum is at s = sqrt(E[target^2]). Of two blocks
    with the same mean attention, the one that gets it in rare large amounts scores higher, because leaving it out costs
    more.
    """
    s = F.softplus(scores / FLOOR) * FLOOR + FLOOR / 10  # (B, T, n): equals the score far above FLOOR
    return ((target - s).square() / s * valid).sum(-1).mean()


FLOOR = 1e-3
LOSSES = {"relative": relative_loss, "mse": mse_loss}


# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------

# The image is scaled by this and conv1 by its inverse, so that Adam's steps are larger relative to conv1's weights.
INPUT_SCALE = 32.0
SPAN, SELECTIONS, COLUMNS = 64, 16, 256  # at most, of a step: rows after the first history, selections, blocks
AVERAGE = 0.998  # decay of the running mean of the weights; --out gets this mean
BUDGETS = (256, 512, 1024)
MIN_MIDDLE_BLOCKS = 32  # windows with fewer blocks in the middle are not used


def draw_batch(windows, rng, history_len):
    """Consecutive rows of one layer of one window, and predictions of some of them from the rows before.

    Returns rows (Hk, H + span, n), predicted (T,), the indices in rows of the predicted ones, target (Hk, T, n), which
    are these rows, and valid (T, n) bool, which blocks are in the middle at each selection. The n columns are a random
    range of the blocks.
    """
    window = rng.choice(windows)
    rows = window.load(rng.randrange(window.n_layers))  # (Hk, window.n_rows, N)
    first = rng.randrange(max(1, window.n_rows - history_len - SPAN + 1))
    stop = min(first + history_len + SPAN, window.n_rows)
    candidates = range(first + history_len, stop)
    predicted = torch.tensor(sorted(rng.sample(candidates, min(SELECTIONS, len(candidates)))))  # (T,)
    start, end = window.middle[predicted[-1]]
    left = rng.randrange(start, max(start, end - COLUMNS) + 1)
    columns = slice(left, min(end, left + COLUMNS))
    valid = window.in_middle[predicted, columns]  # (T, n)
    return rows[:, first:stop, columns], predicted - first, rows[:, predicted, columns], valid


@torch.no_grad()
def left_out(window, weights, config, predicted, device="cpu"):
    """The squared attention of the blocks that selections before the rows `predicted` (T,) leave out: {budget: (T,)}.

    It is summed over the blocks, and the mean over heads and layers. All images have the columns of the middle at the
    last selection. A selection takes the best scores of all layers and heads, as SparseDecoder.choose does.
    """
    middle = slice(*window.middle[predicted[-1]])
    valid = window.in_middle[predicted, middle]  # (T, n)
    scores, target = [], []
    for layer in range(window.n_layers):
        rows = window.load(layer)[..., middle]  # (Hk, ROWS, n)
        scores.append(scores_of_rows(rows.to(device), predicted.to(device), weights, config.history_len).cpu())
        target.append(rows[:, predicted])  # (Hk, T, n)
    scores, target = (torch.cat(x).transpose(0, 1) for x in (scores, target))  # (T, L * Hk, n)
    scores = scores.masked_fill(~valid[:, None], -torch.inf).flatten(1)  # (T, L * Hk * n)
    squares, heads = (target.square() * valid[:, None]).flatten(1), target.shape[1]
    found = {}
    for budget in BUDGETS:
        k = min(heads * replace(config, budget=budget).topk_blocks, scores.shape[1])
        best = kernels.select_blocks(scores, k).long()  # (T, k)
        found[budget] = (squares.sum(1) - squares.gather(1, best).sum(1)) / heads  # (T,)
    return found


def validate(windows, weights, config, device="cpu"):
    """{name: root mean square of the attention that selections leave out} for each of BUDGETS."""
    weights, found = kernels.prepare_weights(weights, device), {budget: [] for budget in BUDGETS}
    for window in windows:
        predicted = torch.arange(config.history_len, window.n_rows, 4)
        for budget, sums in left_out(window, weights, config, predicted, device).items():
            found[budget].append(sums.mean().item())
    return {f"left out, {budget}": math.sqrt(statistics.fmean(means)) for budget, means in found.items()}


def open_windows(folder, split):
    """The windows of a split with at least MIN_MIDDLE_BLOCKS blocks to choose from at their first selection."""
    windows = [Window(path) for path in sorted(pathlib.Path(folder).glob(f"{split}-*.safetensors"))]
    windows = [window for window in windows if window.in_middle[Config.history_len :][:1].sum() >= MIN_MIDDLE_BLOCKS]
    enough = f"with {MIN_MIDDLE_BLOCKS} blocks to choose from"
    require(windows, f"{folder} has no {split} windows {enough}: run `collect`, or collect longer contexts")
    return windows


def train(args):
    """Fit the predictor to the windows in --data; --out gets the weights that leave out the least in validation."""
    out = pathlib.Path(args.out)
    suffix_fits = out.suffix == ".safetensors" and not out.is_dir()
    require(suffix_fits, f"--out {out} must be a file whose name ends in .safetensors")
    checkpoint = out.with_suffix(".checkpoint")
    make_folder(out.parent)
    device, dtype, _ = attnpred.choose_device(args)
    training, validation = open_windows(args.data, "train"), open_windows(args.data, "validation")
    config, collected = training[0].config, training[0].metadata
    same = {name: value for name, value in collected.items() if name not in ("origin", "n_tokens")}
    for window in training + validation:
        check_settings(window.metadata, same, f"a window in {args.data} was collected", "collect into one folder each")
    predictor = load_predictor(args.init_from) if args.init_from else starting_point(args.seed)
    predictor.load_state_dict(scaled(predictor.state_dict(), INPUT_SCALE))
    parameters = dict(predictor.to(device).requires_grad_(True).named_parameters())
    optimizer = torch.optim.Adam(predictor.parameters(), lr=args.lr, betas=(0.9, 0.98))
    average = {name: p.detach().clone() for name, p in parameters.items()}  # running mean of the weights
    settings = {name: str(getattr(args, name)) for name in TRAIN_SETTINGS}
    settings["start"] = digest(*itertools.chain(*predictor.state_dict().items()))
    settings["data"] = digest_of_windows(training + validation)
    curve, best, done = [], None, 0  # best: weights and metadata

    def write_results():
        write_tensors(out, *best)
        write_atomically(out.with_suffix(".json"), json.dumps(curve, indent=1).encode())

    if checkpoint.exists():
        state = load_checkpoint(checkpoint, settings, device)
        predictor.load_state_dict(state["predictor"])
        optimizer.load_state_dict(state["optimizer"])
        average, curve, best, done = state["average"], state["curve"], state["best"], state["done"]
        ours = not out.exists() or noted_in(out, "training") == digest(settings)
        require(ours, f"{out} exists and is not of this training: give another --out")
        write_results()  # they may have been deleted since, or never written
    elif out.exists():
        raise InputError(f"{out} exists, without a checkpoint to continue from: give another --out")

    def assess(loss, step):
        """Validate, and add a row to the curve. The checkpoint is written first: if a write fails, it may continue."""
        nonlocal best
        weights = {name: w.cpu() for name, w in scaled(average, 1 / INPUT_SCALE).items()}
        measured = validate(validation, weights, config, device)
        curve.append({"step": step, "loss": loss} | measured)
        errors = [sum(row[name] for name in measured) for row in curve]
        if errors[-1] == min(errors):
            metadata = {name: collected.get(name) for name in ("llm", "corpus")}
            metadata |= {name: getattr(config, name) for name in METHOD_SETTINGS}
            metadata |= {"seed": args.seed, "loss": args.loss, "steps": step, "training": digest(settings)}
            metadata["validation"] = json.dumps({name: round(value, 4) for name, value in measured.items()})
            best = weights, metadata
        state = {"predictor": predictor.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
        state |= {"curve": curve, "best": best, "done": step, "settings": settings}
        torch.save(state, buffer := io.BytesIO())
        write_atomically(checkpoint, buffer.getvalue())
        write_results()

    running = curve[-1]["loss"] if done else None  # running mean of the loss
    bar = tqdm(range(done, args.steps), "training", args.steps, initial=done, unit="step", disable=None)
    for step in bar:
        rng = random.Random(f"{args.seed} {step}")  # depends on nothing else: a resumed run draws the same batches
        rows, predicted, target, valid = (x.to(device) for x in draw_batch(training, rng, config.history_len))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            scores = scores_of_rows(rows * INPUT_SCALE, predicted, parameters, config.history_len) / INPUT_SCALE
        loss = LOSSES[args.loss](scores, target, valid)
        if not loss.isfinite():
            raise InputError(f"the loss is {loss.item()} at step {step}: lower --lr; {out} keeps the best weights")
        if not curve:
            assess(loss.item(), 0)
        cosine = (1 + math.cos(math.pi * step / args.steps)) / 2
        optimizer.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / 50) * cosine
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(predictor.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for name, p in parameters.items():
                average[name].lerp_(p, 1 - min(AVERAGE, (step + 1) / (step + 10)))
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % args.validate_every == 0 or step + 1 == args.steps:
            assess(running, step + 1)
            bar.set_postfix({name: f"{value:.4f}" for name, value in curve[-1].items() if name != "step"})
    print(", ".join(f"{name}: {value:.4g}" for name, value in curve[-1].items()))


def load_checkpoint(path, settings, device):
    """The dict that `train` saved. Raises InputError if it cannot be read or was written with other settings."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        noted = state["settings"]
    except Exception as error:  # the unpickler raises many types of exception on damaged input
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"checkpoint {path} cannot be read ({reason}): give another --out") from None
    check_settings(noted, settings, f"checkpoint {path} was written", "give another --out")
    return state


# --------------------------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------------------------


def number(kind, low, high=math.inf):
    """An argparse type: a number of that kind, int or float, from low to below high."""

    def parse(text):
        value = kind(text)
        if not low <= value < high:
            raise ValueError
        return value

    parse.__name__ = f"{kind.__name__} in [{low}, {high:g})"
    return parse


positive = number(int, 1)


def parse_args(argv):
    parser = OneLineParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, parser_class=OneLineParser)

    def add_command(function):
        """Add a command with the options that both have; returns the method that adds its own options."""
        text = function.__doc__.splitlines()[0]
        sub = commands.add_parser(function.__name__, help=text, description=text, formatter_class=ShownDefaults)
        sub.set_defaults(function=function, backend="torch")  # training differentiates the references of kernels.py
        sub.add_argument("--data", default="data", help="folder of the windows")
        sub.add_argument("--seed", type=number(int, 0, 2**63), default=0, help="seed of all random draws")
        sub.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...; auto takes a GPU if there is one")
        dtypes = ["auto", "float32", "bfloat16"]
        sub.add_argument("--dtype", default="auto", choices=dtypes, help="of the LLM or convolutions; auto: bfloat16")
        return sub.add_argument

    add = add_command(collect)
    add("--text", nargs="+", metavar="FILE", help="UTF-8 files to use instead of the installed texts")
    add("--model", help=f"Hugging Face folder or hub id of a Llama (default: {DEFAULT_LLM}, fetched once)")
    add("--lengths", nargs="+", type=positive, default=[4096], help="tokens per context; several lengths alternate")
    add("--contexts", type=positive, default=24, help="number of training contexts")
    add("--validation-contexts", type=positive, default=6, help="number of validation contexts")
    add("--windows", type=positive, default=2, help=f"windows of {ROWS} rows per context")
    add("--interval", type=positive, default=16, help="M, the tokens that a row belongs to")
    add("--queries", type=positive, default=Config.calibration_queries, help="Q, queries that make a row")
    add("--block-size", type=int, default=Config.block_size, help="tokens per block")
    add = add_command(train)
    add("--out", default="predictor.safetensors", help="the best weights; next to it go a checkpoint and a curve")
    add("--init-from", metavar="FILE", help="start from this predictor, such as one that the authors published")
    add("--loss", default="relative", choices=LOSSES, help="relative: (target - s)^2 / s for score s; mse: the paper's")
    add("--steps", type=positive, default=12000, help="training steps")
    add(
        "--lr",
        type=number(float, 0),
        default=1e-3,
        help="highest learning rate; it rises over 50 steps and falls as a cosine",
    )
    add("--validate-every", type=positive, default=2000, help="steps from one validation and checkpoint to the next")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    def run():
        args = parse_args(argv)
        args.function(args)

    return attnpred.exit_status("train_predictor", run)


if __name__ == "__main__":
    sys.exit(main())
