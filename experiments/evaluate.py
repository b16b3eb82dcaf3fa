"""Compares the quality of the method and its rivals, on the same model and texts, at equal bytes read per token.

    python -m experiments.evaluate texts
    python -m experiments.evaluate texts --grid "ours,paper,quest bytes=1/16,1/8,1/4"
    python -m experiments.evaluate texts --grid "ours M=5,8,16 budget=256,512"
    python -m experiments.evaluate lm-eval --lm-tasks my_task --include-path FOLDER
    python -m experiments.evaluate table

texts     The prompt is read densely, once for all settings. Then each setting decodes the text's own next tokens one by
          one. Each token gives a KL divergence from full attention's prediction, and a negative log-likelihood.
lm-eval   Runs tasks of the `lm-eval` package that generate text, with their own metrics (transformers_adapter.py).
table     Prints the tables of earlier results and computes nothing.

A grid is a method, or several with commas, and values for Config's fields by name, or by symbol for M, Q and E. All
combinations of comma-separated values are compared. `bytes=1/8` finds the budget with which the setting reads an eighth
of the bytes that dense attention reads. The methods are ours, paper (`PaperDecoder`), full, and the rivals by name;
`decayed-rms:0.6` has a decay of .6, and `quest+echo` attends to our echoes beside Quest's selection.

Results are lines of JSON, one per text and setting. Each is appended when it is measured, so a run that was stopped can
be continued by the same command. Runs that share a file take turns. A row of `texts` has

    task text sha256 n_prompt n_new dtype model predictor       the text, and digests of its tokens and of both weights
    setting method bytes_share, and Config's fields by name     `setting` is the method and its changes, but the budget
    kl nll same                                                 lists, one value per decoded token: nats, nats, 0 or 1
    recovery                                                    a list, one mean over layers and heads per measured step
    attention_bytes echo_bytes calibration_bytes choosing_bytes bytes read per decoded token, counted
    read_bytes dense_bytes                                      their sum, and the bytes that dense attention would read

Reading order: `Setting` and `parse_grid`, `counted_bytes`, `prefill_together` and `decode_together` (the closed loop),
`Store`, the tasks, the command line. The tables are in tables.py.
"""

import argparse
import bisect
import importlib.metadata
import itertools
import json
import pathlib
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

import torch
import torch.nn.functional as F
from filelock import FileLock
from tqdm import tqdm

import attnpred
from attnpred import Config, InputError, OneLineParser, require
from experiments import tables
from experiments.rivals import RIVALS, PaperDecoder, RivalDecoder
from model import causal_attention, load_model, not_finite
from train_predictor import digest, digest_of_model, make_folder
from weights.fetch_llm import fetch_default_llm, wait_for

GRIDS = {  # the default of --grid for each task
    "texts": [
        "ours,decayed-rms:0.8,mean-std,mean-std+echo,quest,quest+echo,ada-snapkv,snapkv,streaming-llm,future,oracle,"
        "paper bytes=1/16,1/8,1/4,1/3"
    ],
    "lm-eval": ["full,ours"],
}
METHODS = {"ours": Config(), "paper": PaperDecoder.config, "full": Config(budget=1 << 24)}  # methods without a rival
SHORT = {"M": "calibration_interval", "Q": "calibration_queries", "E": "echo_blocks"}

# --------------------------------------------------------------------------------------------------------------------
# Settings, and the bytes that they read
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    method: str
    config: Config
    bytes_share: str = ""  # such as "1/8": the budget follows from this share of dense attention's bytes

    @property
    def name(self):
        """The method and its changed fields, except the budget: "ours M=5 block_size=8"."""
        base, short = base_config(self.method), {field: short for short, field in SHORT.items()}
        changed = {f: value for f, value in vars(self.config).items() if f != "budget" and value != getattr(base, f)}
        return " ".join([self.method, *(f"{short.get(f, f)}={value}" for f, value in changed.items())])


def make_rival(method):
    """The Rival of a method such as "quest" or "decayed-rms:0.6"; None for those in METHODS. Raises InputError."""
    name, _, parameter = method.removesuffix("+echo").partition(":")
    if method in METHODS:
        return None
    try:
        return RIVALS[name](*([float(parameter)] if parameter else []))
    except (KeyError, ValueError, TypeError):
        raise InputError(f"method {method!r} is unknown: use {', '.join([*METHODS, *RIVALS])}") from None


def base_config(method) -> Config:
    """The Config of a method without further changes. Raises InputError."""
    config = METHODS[method] if method in METHODS else make_rival(method).config
    return replace(config, echo_blocks=Config.echo_blocks) if method.endswith("+echo") else config


def parse_grid(text):
    """Yield a Setting for each combination: "ours,quest M=5,8 bytes=1/8" gives four. Raises InputError."""
    parser = OneLineParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--bytes", type=bytes_share, default=argparse.SUPPRESS)
    attnpred.add_method_options(parser)
    methods, axes = [], []
    for word in text.split():
        name, equals, values = word.partition("=")
        if equals:
            option = "--" + SHORT.get(name, name).replace("_", "-")
            axes.append([f"{option}={value}" for value in values.split(",")])
        else:
            methods += name.split(",")
    for method, *options in itertools.product(methods or ["ours"], *axes):
        changes = vars(parser.parse_args(options))
        share = changes.pop("bytes", "")
        if method == "full":  # reads everything
            share, _ = "", changes.pop("budget", None)
        require(not share or "budget" not in changes, f"the grid {text!r} has both bytes and budget: leave one out")
        yield Setting(method, replace(base_config(method), **changes), share)


def bytes_share(text):
    """An argparse type: a fraction above 0 and at most 1, kept as text."""
    try:
        if 0 < Fraction(text) <= 1:
            return text
    except (ValueError, ZeroDivisionError):
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no fraction such as 1/8")


def counted_bytes(setting, llm, itemsize, n_prompt, n_new):
    """The bytes that a setting reads per decoded token, as `SparseDecoder` counts them, but without decoding.

    llm: the model's LlamaConfig; itemsize: bytes of an element of K and V.
    """
    c, rival, vector = setting.config, make_rival(setting.method), llm.head_dim * itemsize
    dense, heads, true_row_interval = 0, llm.n_kv_heads, 1  # selections from one true row to the next
    if setting.method == "paper":
        dense, heads = min(PaperDecoder.dense_layers, llm.n_layers), llm.n_heads
        true_row_interval = PaperDecoder.true_row_interval
    sparse = llm.n_layers - dense
    block = rival.bytes_per_block(vector) if rival else 2 * (c.history_len + 4)
    calibrates = not c.fits(n_prompt + n_new) and (rival is None or rival.has_history)
    read, due, selections, middle = 0, 0, 0, None  # middle: how many blocks the last selection was made from
    for step, n in enumerate(range(n_prompt, n_prompt + n_new + 1)):
        if step:
            attended = llm.n_kv_heads * n  # tokens that a layer's heads attend to
            read += 2 * vector * dense * attended
            if middle and rival and rival.needs_query:  # a selection for this token
                middle = len(range(*c.middle(n)))
                read += sparse * heads * middle * block
            if middle:
                attended = heads * (n - (middle - c.topk_blocks) * c.block_size)
                attended += heads * c.echo_blocks * c.block_size  # at most
            read += 2 * vector * sparse * attended
        if step == due:
            if step and calibrates and selections % true_row_interval == 0:
                read += sparse * llm.n_kv_heads * n * vector
            due, selections = step + c.interval(n), selections + 1
            if not c.fits(n + 1):
                middle = len(range(*c.middle(n + 1)))
                if step and not (rival and rival.needs_query):
                    read += sparse * heads * middle * block
    return read / n_new


def budget_for(setting, llm, itemsize, n_prompt, n_new) -> Setting | None:
    """The setting with the budget whose counted bytes are nearest to its share of dense attention's.

    None if they differ from the share by more than 10 %. The arguments are those of `counted_bytes`.
    """
    c, shape = setting.config, (llm, itemsize, n_prompt, n_new)
    target = float(Fraction(setting.bytes_share)) * counted_bytes(Setting("full", METHODS["full"]), *shape)

    def with_topk(topk):
        budget = c.sink_tokens + c.local_tokens + (topk + c.echo_blocks) * c.block_size
        return replace(setting, config=replace(c, budget=budget))

    def error(topk):
        return counted_bytes(with_topk(topk), *shape) - target

    most = bisect.bisect_left(range(c.n_blocks(n_prompt)), 0, key=error)  # the smallest number that reads the target
    best = min((max(0, most - 1), most), key=lambda topk: abs(error(topk)))
    return with_topk(best) if abs(error(best)) <= 0.1 * target else None


def with_budgets(settings, model, n_prompt, n_new) -> list[Setting]:
    """Each distinct setting once, with `bytes` replaced by a budget.

    Settings that cannot read so little are reported on standard error and left out.
    """
    shape = model.config, model.kv_dtype.itemsize, n_prompt, n_new
    found = {setting: budget_for(setting, *shape) if setting.bytes_share else setting for setting in settings}
    for setting in (setting for setting, fitted in found.items() if not fitted):
        print(f"skipped: no budget of {setting.name!r} reads {setting.bytes_share} of dense's bytes", file=sys.stderr)
    return list(filter(None, found.values()))


# --------------------------------------------------------------------------------------------------------------------
# Many decoders, one text
# --------------------------------------------------------------------------------------------------------------------


def make_decoder(method, *args, **options):
    """A decoder that selects by a method."""
    kind = PaperDecoder if method == "paper" else RivalDecoder
    return kind(*args, rival=make_rival(method), **options)


@torch.inference_mode()
def prefill_together(model, predictor, settings, tokens, n_prompt, n_new, measure_every=0):
    """Read tokens (T,) densely, once for all settings.

    Returns a decoder per setting, which has read the first n_prompt tokens and has room for n_new more, and the logits
    (1 + T - n_prompt, V) that full attention predicts after the prompt and after each later token.
    """
    decoders = []
    for setting in settings:
        shape = setting.config, model, predictor, n_prompt + n_new
        decoders.append(make_decoder(setting.method, *shape, measure_every=measure_every))
        decoders[-1].begin_prompt(tokens[:n_prompt])

    def attend(layer, q, k, v):  # (Hq, T, D), (Hk, T, D), (Hk, T, D)
        for decoder in decoders:
            if decoder.rival and decoder.rival.needs_future:
                decoder.rival.foresee(q, k, n_prompt, decoder.config.block_size)
            decoder.take_prompt(layer, *(x[:, :n_prompt] for x in (q, k, v)))
        return causal_attention(layer, q, k, v)

    hidden = model.hidden(tokens, torch.arange(len(tokens)), attend)  # (T, C)
    for decoder in decoders:
        decoder.n_tokens = n_prompt
        decoder.end_prompt()
    return decoders, model.logits(hidden[n_prompt - 1 :])


@torch.inference_mode()
def decode_together(model, decoders, tokens):
    """Decode tokens (M,), one for each of M decoders of the same length -> logits (M, V). The weights are read once."""
    for decoder, token in zip(decoders, tokens.split(1)):
        decoder.begin_token()
        decoder.advance(token)

    def attend(layer, q, k, v):  # (Hq, M, D), (Hk, M, D), (Hk, M, D)
        columns = zip(decoders, *(x.split(1, 1) for x in (q, k, v)))
        return torch.cat([decoder.attend(layer, *qkv) for decoder, *qkv in columns], 1)  # (Hq, M, D)

    positions = torch.tensor([decoder.n_tokens - 1 for decoder in decoders])
    logits = model.logits(model.hidden(tokens, positions, attend))  # (M, V)
    for decoder in decoders:
        decoder.end_token()
    return logits


def read_on(model, predictor, settings, tokens, n_prompt, measure_every=16):
    """Decode tokens[n_prompt:-1] one by one; the last token is only a prediction target.

    Yields one dict per setting: kl, nll and same, lists of a value per decoded token; recovery, a list of a value per
    `measure_every` tokens; the counters of attnpred.Stats, in bytes per token.
    """
    n_new = len(tokens) - 1 - n_prompt
    decoders, dense = prefill_together(model, predictor, settings, tokens[:-1], n_prompt, n_new, measure_every)
    if not dense.isfinite().all():
        raise not_finite(model.dtype)
    kl, nll, same = [], [], []  # n_new tensors (M,) each; the token after the prompt is left out, as it is dense
    for token, target, full in zip(tokens[n_prompt:-1], tokens[n_prompt + 1 :], dense[1:]):
        logits = decode_together(model, decoders, token.expand(len(decoders)))  # (M, V)
        log_p = full.log_softmax(-1).expand_as(logits)  # (M, V)
        kl.append(F.kl_div(logits.log_softmax(-1), log_p, reduction="none", log_target=True).sum(-1))
        nll.append(F.cross_entropy(logits, target.expand(len(decoders)), reduction="none"))
        same.append((logits.argmax(-1) == full.argmax()).int())
    for i, decoder in enumerate(decoders):
        row = {name: rounded(torch.stack(x)[:, i]) for name, x in (("kl", kl), ("nll", nll), ("same", same))}
        if decoder.recovery:
            row["recovery"] = rounded(torch.stack([torch.stack(step).mean() for step in decoder.recovery]))
        counters = ("attention_bytes", "echo_bytes", "calibration_bytes", "choosing_bytes", "dense_bytes", "read_bytes")
        yield row | {name: getattr(decoder.stats, name) / n_new for name in counters}


def rounded(x):
    """A tensor (n,) as a list with six decimals."""
    return [round(value, 6) + 0.0 for value in x.tolist()]  # + 0.0 turns -0.0 into 0.0


# --------------------------------------------------------------------------------------------------------------------
# Results on disk
# --------------------------------------------------------------------------------------------------------------------


def sole_user(path):
    """A context in which no other run writes the results file; waits for it. Creates the file. Raises InputError."""
    path = pathlib.Path(path)
    try:
        make_folder(path.parent)
        path.open("ab").close()
        return wait_for(FileLock(path.with_name(f".{path.name}.lock")), f"writes {path}")
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): give another file with --results") from None


class Store:
    """A results file. `rows` are those of one identity, a dict of model, dtype and predictor. Raises InputError."""

    def __init__(self, path, identity):
        self.path, self.identity = pathlib.Path(path), identity
        wanted = (identity, identity | dict(predictor=""))  # see `key`
        self.rows = [row for row in tables.read_results(path) if any(row.items() >= one.items() for one in wanted)]

    def key(self, setting, values):
        """The entries that identify a row."""
        key = self.identity | values | dict(method=setting.method, bytes_share=setting.bytes_share)
        if setting.method not in ("ours", "paper"):
            key["predictor"] = ""  # a rival's results do not depend on the predictor
        return key | vars(setting.config)

    def missing(self, settings, values):
        """The settings for which no row has these values."""
        return [s for s in settings if not any(row.items() >= self.key(s, values).items() for row in self.rows)]

    def add(self, setting, values, measured):
        """Append a row to the file. Raises InputError."""
        row = self.key(setting, values) | dict(setting=setting.name) | measured
        try:
            with self.path.open("ab") as file:
                file.write(f"\n{json.dumps(row)}".encode())  # \n first: it ends the line of a run that was stopped
        except OSError as error:
            raise InputError(f"cannot write {self.path} ({error.strerror}): earlier results stay") from None
        self.rows.append(row)


# --------------------------------------------------------------------------------------------------------------------
# Tasks
# --------------------------------------------------------------------------------------------------------------------

# Held-out texts, by the ends of their paths in the torch wheel, of which training reads nothing: documentation of an
# API, Python, C++, a licence in legal prose, and the package's description. requirements.txt pins the version.
TEXTS = {
    "api": "torch/_tensor_docs.py",
    "python": "torch/_inductor/cudagraph_trees.py",
    "cpp": "torch/include/pybind11/numpy.h",
    "gpl": "third_party/cpr/test/LICENSE",
    "readme": ".dist-info/METADATA",
}


def read_text(name):
    """The held-out text of that name in TEXTS, or a file's. Raises InputError."""
    try:
        path = pathlib.Path(name)
        if name in TEXTS:
            path = next(file.locate() for file in importlib.metadata.files("torch") if str(file).endswith(TEXTS[name]))
        text = pathlib.Path(path).read_text("utf-8")
        return text.partition("\n\n")[2] if name == "readme" else text  # without the headers
    except (OSError, StopIteration) as error:
        raise InputError(f"text {name} cannot be read ({error}): use {', '.join(TEXTS)} or a file")
    except UnicodeDecodeError as error:
        raise InputError(f"text {name} is not UTF-8 (byte {error.start}): convert it first")


def run_texts(args, store, model, tokenizer, predictor):
    """Measure the settings that the store does not have yet, for each text and length. Raises InputError."""
    context, needed = model.config.context_len, max(args.lengths) + 1
    require(needed <= context + 1, f"--lengths must fit the model's context of {context} tokens")
    encode = partial(tokenizer.encode, special_tokens=False, control_tokens=False)
    texts = {name: encode(read_text(name))[:needed] for name in args.texts}
    for name, tokens in texts.items():
        enough = len(tokens) == needed
        require(enough, f"text {name} has {len(tokens)} tokens, {needed} are needed: use shorter --lengths")
    for (name, tokens), length in itertools.product(texts.items(), args.lengths):
        tokens, n_prompt, n_new = tokens[: length + 1], length - args.n_new, args.n_new
        values = dict(task="texts", text=pathlib.Path(name).name, sha256=digest(tokens), n_prompt=n_prompt, n_new=n_new)
        settings = store.missing(with_budgets(args.settings, model, n_prompt, n_new), values)
        if not settings:
            continue
        tokens = torch.tensor(tokens)  # (length + 1,)
        batches = [settings[i : i + args.together] for i in range(0, len(settings), args.together)]
        for batch in tqdm(batches, f"{name}, {length} tokens", unit="batch", leave=False, disable=None):
            for setting, measured in zip(batch, read_on(model, predictor, batch, tokens, n_prompt)):
                store.add(setting, values, measured)


def run_lm_eval(args, store, model, tokenizer, predictor):
    """Add a row of `scores` per task and setting. RULER's tasks make texts of `--lengths` tokens of the tokenizer."""
    for setting in args.settings:
        require(not setting.bytes_share, "lm-eval has texts of many lengths: give budget= in place of bytes=")
        require(setting.method != "future", "lm-eval's texts have no known future: leave that method out")
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        from experiments.transformers_adapter import attach, readable
    except ImportError as error:
        raise InputError(f"lm-eval needs {error.name}: pip install -r requirements-dev.txt") from None
    path = args.model or str(readable(fetch_default_llm()))
    metadata = {"tokenizer": path, "max_seq_lengths": args.lengths}
    manager = TaskManager(include_path=args.include_path, metadata=metadata)
    for task in args.lm_tasks:
        known = manager.match_tasks([task])
        require(known, f"task {task!r} of lm-eval is unknown: give the folder of your own with --include-path")
    lm = HFLM(path, dtype=args.dtype, device="cpu", batch_size=1)
    lm.loglikelihood = lm.loglikelihood_rolling = refuse_ratings
    for task in args.lm_tasks:
        options = dict(tasks=[task], task_manager=manager, limit=args.limit, bootstrap_iters=0)
        values = dict(task=args.task, text=task, sha256=digest(texts_of_task(options)), n_prompt=0, n_new=0)
        for setting in store.missing(args.settings, values):
            attach(lm.model, predictor, make_decoder=partial(make_decoder, setting.method), **vars(setting.config))
            found = lm_eval.simple_evaluate(lm, **options)["results"][task]
            store.add(setting, values, dict(scores={k: v for k, v in found.items() if isinstance(v, float)}))


def texts_of_task(options) -> list:
    """What identifies the texts of a task of lm-eval: its prompts, their options and the targets."""
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM

    asked = []

    class Questions(LM):
        """Answers nothing, and keeps what was asked."""

        def generate_until(self, requests):
            asked.extend(request.args for request in requests)
            return [""] * len(requests)

        loglikelihood = loglikelihood_rolling = lambda self, requests: refuse_ratings(requests)

    samples = simple_evaluate(Questions(), **options)["samples"]
    return [asked, *([sample["target_hash"] for sample in part] for part in samples.values())]


def refuse_ratings(requests):
    raise InputError("tasks of lm-eval that rate given answers are not supported: use one that generates text")


TASKS = {"texts": run_texts, "lm-eval": run_lm_eval}

# --------------------------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------------------------


def parse_args(argv):
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=[*TASKS, "table"])
    parser.add_argument("--grid", action="append", help="settings to compare (see above); may be repeated")
    parser.add_argument("--results", default="results/evaluate.jsonl", metavar="FILE", help="results are added to it")
    parser.add_argument("--texts", nargs="+", default=list(TEXTS), help="held-out texts by name, or files")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096], help="tokens per text, with the decoded ones")
    parser.add_argument("--n-new", type=int, default=512, help="tokens decoded after the prompt")
    parser.add_argument("--lm-tasks", nargs="+", default=[], metavar="TASK", help="tasks of lm-eval")
    parser.add_argument("--include-path", metavar="FOLDER", help="your own tasks of lm-eval")
    parser.add_argument("--limit", type=int, help="at most so many examples of each lm-eval task")
    parser.add_argument("--together", type=int, default=12, help="settings decoded in lockstep; each takes memory")
    parser.add_argument("--model", help="Hugging Face folder or hub id; default: the bundled one")
    parser.add_argument("--predictor", default=attnpred.DEFAULT_PREDICTOR, help="weights of the convolution")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    args = parser.parse_args(argv)
    args.settings = [setting for grid in args.grid or GRIDS.get(args.task, []) for setting in parse_grid(grid)]
    for name in ("n_new", "together", "limit"):
        value = getattr(args, name)
        require(value is None or value >= 1, f"--{name.replace('_', '-')} must be at least 1")
    require(args.task != "texts" or min(args.lengths) > args.n_new, "--lengths must exceed --n-new")
    return args


def run(args):
    predictor = attnpred.load_predictor(args.predictor)
    require(args.task in TASKS or pathlib.Path(args.results).is_file(), f"there is no results file {args.results}")
    with sole_user(args.results) if args.task in TASKS else nullcontext():
        model, tokenizer = load_model(args.model or str(fetch_default_llm()), getattr(torch, args.dtype), "cpu")
        identity = dict(model=digest_of_model(model), dtype=args.dtype, predictor=digest(*predictor.parameters()))
        store = Store(args.results, identity)
        if args.task in TASKS:
            TASKS[args.task](args, store, model, tokenizer, predictor)
    found = {task: [row for row in store.rows if row["task"] == task] for task in TASKS if args.task in (task, "table")}
    require(any(found.values()), f"{args.results} has no results of this --model, --dtype and --predictor")
    for task, rows in found.items():
        if rows:
            print(tables.TABLES[task](rows), end="\n\n")


def main(argv=None) -> int:
    return attnpred.exit_status("evaluate", lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
