"""AttentionPredictor: decode a Llama, reading only the KV blocks that a small convolution expects to matter next.

    python attnpred.py --prompt "Why is the sky blue?"

Reading order: `Config` (the parameters), `Predictor` (the network), `History` (its input), `SparseDecoder` (the
method), `generate`, `KVCache` and `OffloadedCache` (K and V on the device or in host memory), the command line. The
arithmetic is in kernels.py, the language model in model.py.

Source: Yang et al., AttentionPredictor: Temporal Patterns Matter for KV Cache Compression, NeurIPS 2025
(arXiv 2502.04077).
"""

import argparse
import dataclasses
import itertools
import math
import os
import pathlib
import re
import signal
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

DEFAULT_PREDICTOR = pathlib.Path(__file__).parent / "weights" / "predictor.safetensors"


class InputError(Exception):
    """The user gave something that cannot be used; the message says in one line what is wrong and what to do."""


def require(condition, message):
    if not condition:
        raise InputError(message)


# --------------------------------------------------------------------------------------------------------------------
# Parameters, and options, which are checked before PyTorch is imported, because that takes seconds
# --------------------------------------------------------------------------------------------------------------------


def param(default, symbol, help, least=0):
    return field(default=default, metadata=dict(symbol=symbol, help=help, least=least))


@dataclass(frozen=True)
class Config:
    """The method's parameters. Raises InputError where they contradict each other."""

    block_size: int = param(16, "b", "tokens per block: 8, 16, 32 or 64")
    history_len: int = param(64, "H", "rows of attention kept", least=5)
    sink_tokens: int | None = param(None, "S", "first tokens, always attended; default: one block")
    local_tokens: int = param(64, "R", "last tokens, always attended")
    budget: int = param(1024, "B", "tokens attended per head, in the mean over all heads; S, R and E blocks included")
    calibration_interval: int | str = param(
        "auto", "M", "every M-th token, all keys are read and blocks selected; auto: 16, doubled while T / M > B / 2", 1
    )
    calibration_queries: int = param(4, "Q", "queries of the last M that make a row of attention", least=1)
    echo_blocks: int = param(4, "E", "blocks attended because they continue earlier occurrences of the token")

    def __post_init__(self):
        b = self.block_size
        require(b in (8, 16, 32, 64), f"block_size = {b} is unknown: use 8, 16, 32 or 64")
        if self.sink_tokens is None:
            object.__setattr__(self, "sink_tokens", b)
        least = {f.name: f.metadata["least"] for f in dataclasses.fields(self)}
        least |= dict(local_tokens=b, budget=self.sink_tokens + self.local_tokens + self.echo_blocks * b)
        for name, lowest in least.items():
            value = getattr(self, name)
            require(value == "auto" or value >= lowest, f"{name} = {value} is too small: use at least {lowest}")
        require(self.history_len <= 4096, f"history_len = {self.history_len} is too large: use at most 4096")
        for name in ("sink_tokens", "local_tokens", "budget"):
            value = getattr(self, name)
            require(value % b == 0, f"{name} = {value} is not a multiple of the block size: try {value // b * b + b}")

    @property
    def topk_blocks(self) -> int:
        """K: blocks selected from the middle, per head, in the mean."""
        return (self.budget - self.sink_tokens - self.local_tokens) // self.block_size - self.echo_blocks

    def n_blocks(self, n_tokens: int) -> int:
        """N: blocks in a cache of n_tokens, the last one perhaps partial."""
        return -(-n_tokens // self.block_size)

    def middle(self, n_tokens: int) -> tuple[int, int]:
        """The blocks [start, end) between the sink and the local window; start = end when there are none.

        The local window is block-aligned: the last R / b full blocks and the partial block after them.
        """
        start = self.sink_tokens // self.block_size
        return start, max(start, (n_tokens - self.local_tokens) // self.block_size)

    def fits(self, n_tokens: int) -> bool:
        """Whether the budget covers a text of n_tokens, so that there is nothing to select."""
        start, end = self.middle(n_tokens)
        return end - start <= self.topk_blocks + self.echo_blocks

    def interval(self, n_tokens: int) -> int:
        """M at n_tokens. With "auto", calibration, T / M keys a token, reads at most a quarter of attention's."""
        m = self.calibration_interval
        if m == "auto":
            m = 16
            while 2 * n_tokens > self.budget * m:
                m *= 2
        return m

    def queries(self, interval: int) -> int:
        """Q: how many of an interval's M queries make a row. They are evenly spaced, so their number divides M."""
        return math.gcd(self.calibration_queries, interval)

    def tail_blocks(self, n_tokens: int) -> int:
        """Blocks from the middle's end on, at most, while a selection for a text of n_tokens is in use.

        They are the local window, its partial block, and the blocks that begin in M tokens and the one of a late copy.
        """
        return self.local_tokens // self.block_size + 1 + self.n_blocks(self.interval(n_tokens) + 1)


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (--help lists the options)")


class ShownDefaults(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def auto_or_int(text):
    return text if text == "auto" else int(text)


def add_method_options(parser):
    """An option for each parameter of Config; unless given, it is not in the namespace."""
    group = parser.add_argument_group("method (README.md explains the parameters)")
    for f in dataclasses.fields(Config):
        default = "" if f.default is None else f" (default: {f.default})"
        kind = auto_or_int if f.type == int | str else int
        options = dict(type=kind, default=argparse.SUPPRESS, metavar=f.metadata["symbol"])
        group.add_argument("--" + f.name.replace("_", "-"), help=f.metadata["help"] + default, **options)


def config_of(args) -> Config:
    return Config(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if hasattr(args, f.name)})


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=(__doc__ or "").split("\n")[0], formatter_class=ShownDefaults)
    parser.add_argument("--prompt", help="the text to answer, or a question about --prompt-file")
    parser.add_argument("--prompt-file", help="a file to answer, or to ask --prompt about; - for standard input")
    parser.add_argument("--chat", action="store_true", help="go on with questions, one a line of standard input")
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="end an answer after this many tokens")
    parser.add_argument("--stats", action="store_true", help="end with bytes read, recovery and predictor cost")

    group = parser.add_argument_group("model")
    group.add_argument("--model", help="Hugging Face folder or hub id (default: SmolLM2-135M-Instruct, fetched once)")
    group.add_argument("--predictor", default=DEFAULT_PREDICTOR, help="the convolution: safetensors or state dict")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...; auto takes a GPU if there is one")
    dtypes, backends = ["auto", "float32", "bfloat16", "float16"], ["auto", "torch", "triton"]
    group.add_argument("--dtype", default="auto", choices=dtypes, help="of the weights; auto: bfloat16")
    group.add_argument("--backend", default="auto", choices=backends, help="auto: triton on a GPU, else torch")
    group.add_argument("--offload", action="store_true", help="keep the KV cache in host memory")
    group.add_argument("--dense", action="store_true", help="attend to everything")

    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, default=0.0, help="0: always the most probable token")
    group.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this total")
    group.add_argument("--seed", type=int, default=0, help="of the sampling")
    add_method_options(parser)
    return parser


def parse_options(argv=None) -> argparse.Namespace:
    """The options and, in addition, `config` and the text of the `document`. Raises InputError."""
    args = make_parser().parse_args(argv)
    require(args.max_new_tokens >= 1, f"max-new-tokens {args.max_new_tokens} must be at least 1")
    require(0 <= args.temperature < math.inf, f"temperature {args.temperature} must be at least 0")
    require(0 < args.top_p <= 1, f"top-p {args.top_p} must be above 0 and at most 1")
    require(0 <= args.seed < 2**63, f"seed {args.seed} must lie in 0 ... 2^63 - 1")
    require(not (args.dense and args.offload), "--dense reads the whole cache for each token: leave --offload out")
    require(not (args.chat and args.raw), "--chat needs the chat template: leave --raw out")
    require(not (args.chat and args.prompt_file == "-"), "--chat reads standard input: --prompt-file must be a file")
    known = re.fullmatch(r"auto|cpu|cuda(:\d+)?", args.device)
    require(known, f"device {args.device} is not available: try cpu")
    require(os.path.isfile(args.predictor), f"predictor {args.predictor} does not exist: give a file of weights")
    found = not args.model or os.path.exists(args.model) or re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", args.model)
    require(found, f"model {args.model} is neither a folder nor an id of the hub: give a Hugging Face folder")
    prompts = [text for text in (args.prompt, args.prompt_file) if text is not None]
    require(prompts or args.chat, "there is no prompt: give --prompt, --prompt-file or both (--help lists the options)")
    args.config = config_of(args)
    args.document = None if args.prompt_file is None else read_document(args.prompt_file)
    if args.prompt is not None:
        args.prompt = to_text(args.prompt.encode(errors="surrogateescape"))
    return args


def read_document(name) -> str:
    try:
        return to_text(sys.stdin.buffer.read() if name == "-" else pathlib.Path(name).read_bytes())
    except OSError as error:
        raise InputError(f"prompt file {name} cannot be read: {error.strerror}") from None


def to_text(data: bytes) -> str:
    """Text of a prompt, which must be UTF-8 and not empty, without a byte order mark."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt is not UTF-8 text (byte {error.start}): convert it first") from None
    require(text.strip(), "the prompt is empty: give it some text")
    return text


def read_questions(args) -> Iterator[str]:
    """The prompt: the document, a blank line and the question, or one of them as it is. With --chat, more questions."""
    given = [] if args.prompt is None else [args.prompt]
    questions = itertools.chain(given, read_lines() if args.chat else ())
    if args.document is not None:
        question = next(questions, None)
        if question is not None:
            yield args.document.rstrip() + "\n\n" + question
        elif not args.chat:
            yield args.document
    yield from questions


def read_lines() -> Iterator[str]:
    """The lines of standard input that are not blank. On a terminal, standard error shows when one is awaited."""
    terminal = sys.stdin.isatty() and sys.stderr.isatty()

    def read():
        print("> " * terminal, end="", file=sys.stderr, flush=True)
        return sys.stdin.buffer.readline()

    try:
        yield from (to_text(line.strip()) for line in iter(read, b"") if line.strip())
    finally:  # also after Ctrl-C
        print("\n" * terminal, end="", file=sys.stderr)


def exit_status(program, command) -> int:
    """Run `command`. Returns 2, and prints one line, for errors that a user can correct; 130 for Ctrl-C; else 0."""
    for name, mode in dict(stdin="r", stdout="w", stderr="w").items():
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, mode))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without a character shows ?
    try:
        command()
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return 130
    except OSError as error:  # stdout was closed (for example by `head`), or a disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # avoid a second error at exit
        if isinstance(error, BrokenPipeError):
            return 0
        message = f"{error.filename or 'output'}: {error.strerror}"
    except InputError as error:
        message = error
    except SystemExit:  # of --help
        raise
    except (ModelError, FetchError) as error:
        message = error
    except torch.OutOfMemoryError:
        message = "out of GPU memory: try a shorter text, a smaller model or, where there is that option, --offload"
    print(f"{program}: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while PyTorch is imported: no traceback
    options = []
    if status := exit_status("attnpred", lambda: options.append(parse_options())):
        sys.exit(status)

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import kernels
from model import Llama, LlamaConfig, ModelError, TextStream, causal_attention, load_model, not_finite
from weights.fetch_llm import FetchError, fetch_default_llm

HISTORY_DTYPE = torch.float16  # of the history and of the contributions; predictions are computed in float32
PREFILL_CHUNK = 2048  # tokens of the prompt that run together: a multiple of every block size
OFFLOADED_CHUNK = 8192  # with the cache in host memory, from where each chunk needs all earlier K and V

# --------------------------------------------------------------------------------------------------------------------
# The method
# --------------------------------------------------------------------------------------------------------------------


class Predictor(nn.Module):
    """The shared convolution, 4,833 parameters: an image of pooled attention rows -> one score per block."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv1d(32, 1, 1)

    def forward(self, image):  # (heads, H, n) -> (heads, n)
        x = F.relu(self.conv1(image[:, None]))  # (heads, 16, H, n)
        x = F.relu(self.conv2(x))  # (heads, 32, H, n)
        return self.conv3(x.mean(2))[:, 0]  # (heads, n)


def load_predictor(path) -> Predictor:
    """Read a predictor: a .safetensors file, or a pickled state dict, such as the authors publish. No code in it runs.

    Raises InputError for a file that is missing, unreadable, or holds other keys or shapes, NaN or infinity.
    """
    path = pathlib.Path(path)
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises many types of exception on damaged input
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"predictor {path} cannot be read ({reason}): give a complete state dict") from None
    predictor = Predictor()
    try:
        predictor.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError):
        wanted = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in predictor.state_dict().items())
        raise InputError(f"predictor {path} must hold these tensors and no others: {wanted}") from None
    finite = all(tensor.isfinite().all() for tensor in predictor.state_dict().values())
    require(finite, f"predictor {path} holds NaN or infinity; train or fetch it again")
    return predictor.requires_grad_(False)


class History:
    """The last H rows of attention of every head, and the convolution's scores from them.

    A row belongs to M tokens. It has the largest attention probability in each block, as the root mean square over Q of
    the tokens' queries and over the G query heads of a KV head.
    """

    def __init__(self, config: Config, m: LlamaConfig, capacity, predictor: Predictor, device, backend):
        shape = m.n_layers * m.n_kv_heads, config.history_len, capacity
        self.rows = torch.zeros(shape, dtype=HISTORY_DTYPE, device=device)  # (L * Hk, H, capacity), oldest row first
        self.contributions = torch.zeros_like(self.rows)  # see kernels.predict
        self.weights, self.backend = kernels.prepare_weights(predictor.state_dict(), device), backend
        self.new_rows = self.predicted_end = 0  # rows since the last prediction; the end of its middle

    def push(self, rows):
        """Make rows (L, Hk, r, N) the last ones; the others move up, and the oldest are dropped."""
        rows = rows.flatten(0, 1)  # (L * Hk, r, N)
        for image in (self.rows, self.contributions):
            image.copy_(image.roll(-rows.shape[1], 1))
        self.rows[:, -rows.shape[1] :, : rows.shape[2]] = rows
        self.new_rows += rows.shape[1]

    def scores(self, start, end):
        """Predicted scores of the blocks [start, end): (L * Hk, end - start) float32."""
        state = self.rows, self.contributions, self.new_rows, start, end, max(start, self.predicted_end)
        self.new_rows, self.predicted_end = 0, end
        return kernels.predict(*state, self.weights, self.backend)


@dataclass
class Stats:
    """What decoding cost and how well it went: bytes, wall-clock seconds, and recovery."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    new_tokens: int = 0  # of answers, tokens that end one included
    decode_tokens: int = 0  # steps: all new tokens but an answer's last, which may not be decoded
    decode_seconds: float = 0.0
    attention_bytes: int = 0  # K and V read by attention without echoes, over all decoded tokens
    calibration_bytes: int = 0  # K read by calibration
    choosing_bytes: int = 0  # history and contributions read by prediction
    dense_bytes: int = 0  # K and V that dense attention would have read
    overhead_seconds: float = 0.0  # calibration, prediction and selection; on a GPU the host does not wait for them
    echoes: torch.Tensor | None = None  # (L, Hk, E) int64: echo blocks that attention read
    echo_block_bytes: int = 0  # K and V of one of them
    recovery: list = field(default_factory=list)  # (L, Hq) each: the share of the true attention that was attended

    @property
    def read_bytes(self) -> int:
        """Everything that decoding read instead of the dense cache."""
        return self.attention_bytes + self.echo_bytes + self.calibration_bytes + self.choosing_bytes

    @property
    def echo_bytes(self) -> int:
        """K and V of echoes, which attention reads in addition. The host waits for their number."""
        return int(self.echoes.sum()) * self.echo_block_bytes


class SparseDecoder:
    """One sequence being decoded: `prefill`, then `decode` token by token. Both return the next token's logits (V,).

        prefill             per chunk: run the model with `attend_prompt`;   then fill the history, select
        decode              look up echoes, run the model with `attend`;   after every M-th token: calibrate, select

    `decode` is `begin_token`, `run_model` and `end_token`, for callers that run the model themselves. On a GPU, the
    model's device must be the current one, because Triton launches there.
    """

    def __init__(
        self, config: Config, model: Llama, predictor: Predictor, capacity_tokens: int, backend="torch", offload=False
    ):
        c, m, device = config, model.config, model.device
        self.config, self.model, self.backend = c, model, backend
        cache = OffloadedCache if offload else KVCache
        self.cache = cache(c, m, c.n_blocks(capacity_tokens), model.kv_dtype, device, backend)
        self.history = None
        self.sparse = not c.fits(capacity_tokens)  # a text that always fits its budget needs neither history nor echoes
        if self.sparse:
            self.history = History(c, m, self.cache.capacity, predictor, device, backend)
        self.n_tokens = 0  # of the text, on the host
        self.ids = torch.zeros(capacity_tokens, dtype=torch.int64, device=device)  # the text
        self.prompt_end = 0  # tokens of the text up to the last prompt's end
        self.due = 0  # tokens until the next calibration and selection
        self.interval = self.distance = 0  # M since the last selection; tokens from one query of a row to the next
        self.queries = []  # (L, Hq, 1, D) each: of the next row
        self.selecting = False  # from the first prediction on
        self.key_bytes = m.n_layers * m.n_kv_heads * m.head_dim * model.kv_dtype.itemsize  # of a token, in all layers
        self.q, self.lse = [None] * m.n_layers, [None] * m.n_layers  # (Hq, 1, D) and (Hq,) each: of the newest token
        self.captured = CapturedStep() if has_streams(device) and backend == "triton" else None
        self.stats = Stats(echoes=self.cache.echoes)
        self.stats.echo_block_bytes = 2 * self.key_bytes * c.block_size // (m.n_layers * m.n_kv_heads)

    @property
    def position(self):
        """Of the newest token, on the device: (1,) int64."""
        return self.cache.position

    @torch.inference_mode()
    def prefill(self, tokens):
        """Run a prompt, tokens (T,), with dense attention, in chunks that bound the memory for activations.

        The text may have tokens already: then this goes on, and the prompt attends to all of them.
        On a terminal, standard error shows the progress through a prompt of several chunks.
        """
        self.begin_prompt(tokens)
        size = OFFLOADED_CHUNK if isinstance(self.cache, OffloadedCache) else PREFILL_CHUNK
        chunks, form = tokens.split(size), "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"
        hide = True if len(chunks) == 1 else None  # None: unless standard error is a terminal
        for chunk in tqdm(chunks, "Reading the prompt", disable=hide, leave=False, bar_format=form):
            positions = torch.arange(self.n_tokens, self.n_tokens + len(chunk), device=tokens.device)
            hidden = self.model.hidden(chunk, positions, self.attend_prompt)  # (chunk, C)
            self.n_tokens += len(chunk)
        self.end_prompt()
        return self.model.logits(hidden[-1:])[0]

    @torch.inference_mode()
    def decode(self, token):
        """Append token (1,): attend to the selected blocks; after every M-th token, calibrate and select."""
        self.begin_token()
        logits = self.captured.run(self.run_model, token) if self.captured else self.run_model(token)
        self.end_token()
        return logits

    # The prompt

    def begin_prompt(self, tokens):
        """Append the prompt to the text. The history gets a row for each M of its last H * M tokens, of Q queries.

        A later prompt of fewer than M tokens makes a row by itself.
        """
        c, m, n_tokens = self.config, self.model.config, self.n_tokens + len(tokens)
        self.ids[self.n_tokens : n_tokens] = tokens
        self.stats.prefill_tokens += len(tokens)
        self.prompt_end, self.queries = n_tokens, []
        self.set_interval(n_tokens)
        n_queries = min(c.history_len * (self.interval // self.distance), kernels.cdiv(len(tokens), self.distance))
        if self.n_tokens and len(tokens) < self.interval:
            n_queries = min(len(tokens), c.calibration_queries)
            self.distance = len(tokens) // n_queries
            self.interval = n_queries * self.distance
        self.first_query = n_tokens - 1 - (n_queries - 1) * self.distance  # the position of the oldest one
        shape = m.n_layers, m.n_heads, n_queries, m.head_dim
        self.prompt_queries = torch.zeros(shape, dtype=self.model.kv_dtype, device=tokens.device)

    def set_interval(self, n_tokens):
        self.interval = self.due = self.config.interval(n_tokens)
        self.distance = self.interval // self.config.queries(self.interval)

    def attend_prompt(self, layer, q, k, v):
        """Dense causal attention of the T tokens after n_tokens, to all tokens so far: one layer, one chunk.

        q (Hq, T, D), k and v (Hk, T, D) -> (Hq, T, D)
        """
        return causal_attention(layer, q, *self.take_prompt(layer, q, k, v))

    def take_prompt(self, layer, q, k, v):
        """Write a chunk's K and V, and keep queries for rows. Returns K and V of all tokens so far: (Hk, T', D)."""
        i = max(0, kernels.cdiv(self.n_tokens - self.first_query, self.distance))  # the first one in this chunk
        kept = q[:, self.first_query + i * self.distance - self.n_tokens :: self.distance]  # (Hq, queries, D)
        self.prompt_queries[layer, :, i : i + kept.shape[1]] = kept
        return self.cache.write_prompt(layer, self.n_tokens, k, v)

    def end_prompt(self):
        """After all chunks: fill the history, and select blocks for the first new tokens."""
        self.cache.end_prompt(self.n_tokens)
        if self.history:  # one layer at a time, to bound the memory
            rows = [self.pool(q[None], slice(i, i + 1))[0] for i, q in enumerate(self.prompt_queries)]
            self.history.push(torch.cat(rows))  # (L, Hk, H or fewer, N)
        self.select()
        self.cache.take_over()  # the first selection is not late
        self.warm_up()
        del self.prompt_queries

    # A token

    def begin_token(self):
        """Count a token on the host."""
        self.n_tokens += 1
        self.cache.begin_token()

    def run_model(self, token):
        """Run the model on token (1,) -> logits (V,). All of it runs on the device, and may be part of a CUDA graph."""
        self.advance(token)
        if self.backend == "torch":
            return self.model(token, self.position, self.attend)
        return self.model(token, self.position, partial(self.attend, written=True), fused=self)

    def advance(self, token):
        """Append token (1,) on the device, and look up its echoes."""
        c = self.config
        self.cache.advance()
        self.ids.index_copy_(0, self.position, token)
        if self.sparse and c.echo_blocks:
            shape = c.sink_tokens // c.block_size, c.local_tokens // c.block_size, c.block_size, self.cache.capacity
            self.echo_block = kernels.find_echoes(self.ids, self.position, *shape, c.echo_blocks, self.backend)  # (E,)
            self.cache.attend_also(self.echo_block)

    def rotate(self, layer, qk, v):
        """In the place of the model's RoPE: rotate qk (Hq + Hk, 1, D), and write K and V, in one launch."""
        freq, scale = self.model.rope(layer)
        rows = self.cache.token_rows(layer)
        return kernels.rotate_and_write(qk[:, 0], v[:, 0], freq, scale, self.position, *rows, self.backend)[:, None]

    def multiply_gates(self, gate_up):
        """In the place of the model's silu(gate) * up: gate_up (1, 2 I) -> (1, I)."""
        return kernels.swiglu(gate_up, self.backend)

    def attend(self, layer, q, k, v, written=False):
        """Attention of one token to its head's blocks: q (Hq, 1, D), k and v (Hk, 1, D) -> (Hq, 1, D).

        written: K and V are in the cache already (see `rotate`).
        """
        if not written:
            self.cache.write(layer, k, v)
        self.q[layer] = q
        out, self.lse[layer] = self.cache.attend(layer, q[:, 0], self.n_tokens)  # (Hq, D), (Hq,)
        return out[:, None]

    def end_token(self):
        """After every M-th token: calibrate and select."""
        began = time.perf_counter()
        self.count_reads()
        self.due -= 1
        if self.history and self.due % self.distance == 0:
            self.queries.append(torch.stack(self.q))
        if self.due == 0:
            if self.history:
                self.calibrate()
            self.select()
        self.stats.overhead_seconds += time.perf_counter() - began

    def calibrate(self):
        """The true attention row of the last M tokens, over all keys, enters the history."""
        rows, true_lse = self.pool(torch.cat(self.queries, 2))  # (L, Hk, 1, N), (L, Hq, Q)
        self.history.push(rows)
        self.queries = []
        self.stats.calibration_bytes += self.key_bytes * self.n_tokens
        if self.selecting and not self.cache.whole:  # recovery: the attended keys' share of the sum of all exponentials
            self.stats.recovery.append(torch.exp(torch.stack(self.lse) - true_lse[..., -1]))  # (L, Hq)

    def pool(self, queries, layers=slice(None)):
        """Rows of the last tokens' queries (L', Hq, n, D): (L', Hk, rows, N), and log-sum-exps (L', Hq, n)."""
        return self.cache.pool(layers, queries, self.n_tokens, self.distance, self.interval // self.distance)

    def select(self):
        """Predict, and select the blocks that the next M tokens attend to."""
        self.set_interval(self.n_tokens)
        n_next = self.n_tokens + 1  # tokens of the text when the next token, the first one that is served, attends
        start, end = self.config.middle(n_next)
        chosen = None  # the whole middle
        if not self.config.fits(n_next):
            self.selecting = True
            chosen = self.choose(self.scores(start, end))  # (L, Hk, n) bool
        self.cache.select(chosen, start, end, self.n_tokens)

    def scores(self, start, end):
        """Predicted scores of the middle blocks [start, end): (L, Hk, end - start) float32."""
        if self.n_tokens > self.prompt_end:  # a prompt's prediction belongs to prefill
            read = len(self.history.rows) * (self.config.history_len + 4) * (end - start)  # see kernels.predict
            self.stats.choosing_bytes += read * self.history.rows.itemsize
        return self.history.scores(start, end).unflatten(0, (self.model.config.n_layers, -1))

    def choose(self, scores):
        """The L * Hk * K best scores of the whole model: scores (L, Hk, n) -> (L, Hk, n) bool."""
        chosen, k = torch.zeros_like(scores, dtype=torch.bool), math.prod(scores.shape[:2]) * self.config.topk_blocks
        if k:
            chosen.view(-1)[kernels.select_blocks(scores.view(1, -1), k, self.backend)[0].long()] = True
        return chosen

    def count_reads(self):
        """Count the bytes of K and V that attention read for this token, and what dense attention would have read."""
        self.stats.dense_bytes += 2 * self.key_bytes * self.n_tokens
        m, left_out = self.model.config, self.cache.left_out * self.config.block_size  # tokens, of all heads
        left_out_bytes = 2 * self.key_bytes * left_out // (m.n_layers * m.n_kv_heads)
        self.stats.attention_bytes += 2 * self.key_bytes * self.n_tokens - left_out_bytes

    def warm_up(self):
        """On a GPU: compile now what would otherwise be compiled in the middle of an answer."""
        start = self.config.sink_tokens // self.config.block_size
        if self.history and not self.selecting and self.backend == "triton" and self.cache.capacity > start:
            self.pool(self.prompt_queries[:, :, -self.config.queries(self.interval) :])
            self.choose(self.scores(start, self.cache.capacity))
            self.history.predicted_end = 0


class CapturedStep:
    """A step as a CUDA graph: the first call runs it, which compiles the kernels; the second captures and replays it.

    A replay uses the memory of the capture and the numbers that the host had then, so what changes from token to token
    must be in tensors that keep their addresses.
    """

    def __init__(self):
        self.token = self.capture = None

    def run(self, step, token):
        """step(token (1,)) -> logits (V,), which the next call may overwrite."""
        if self.token is None:
            self.graph, self.token = torch.cuda.CUDAGraph(), token.clone()
            self.capture = torch.cuda.graph(self.graph)
            stream, current = self.capture.capture_stream, torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):  # AMD's library makes a handle for each stream, which a capture forbids
                logits = step(token)
            current.wait_stream(stream)
            return logits
        if self.capture:
            with self.capture:  # waits for the whole device first; records, and computes nothing
                self.logits = step(self.token)
            self.capture = None
        self.token.copy_(token)
        self.graph.replay()
        return self.logits


# --------------------------------------------------------------------------------------------------------------------
# Decoding
# --------------------------------------------------------------------------------------------------------------------


def sample(logits, temperature=0.0, top_p=1.0, generator=None):
    """The next token (1,) from logits (V,): greedy at temperature 0, else from the likeliest of total top_p.

    Returns it and the largest logit (1,), which is NaN or infinite if the logits make no sense.
    """
    largest, token = logits.max(-1, keepdim=True)
    if temperature > 0:
        logits = (logits.nan_to_num() - largest.nan_to_num()).clamp(max=0)
        temperature = max(temperature, torch.finfo(logits.dtype).tiny)  # 0 / 0 is no probability
        p, tokens = torch.softmax(logits / temperature, -1).sort(descending=True)  # (V,), (V,)
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)  # the most probable token always stays
        token = tokens[torch.multinomial(p, 1, generator=generator)]
    return token, largest


def generate(
    decoder: SparseDecoder, tokens: list[int], max_new_tokens: int, temperature=0.0, top_p=1.0, seed=0
) -> Iterator[int]:
    """Yield up to max_new_tokens tokens that continue the text and `tokens`, ending before an end-of-sequence token."""
    stats, device = decoder.stats, decoder.model.device
    generator = torch.Generator(device).manual_seed(seed)
    began = time.perf_counter()
    token, largest = sample(decoder.prefill(torch.tensor(tokens, device=device)), temperature, top_p, generator)  # (1,)
    token.item()  # waits for a GPU
    stats.prefill_seconds += time.perf_counter() - began

    for left in reversed(range(max_new_tokens)):
        began, wait_for = time.perf_counter(), read_later(token, largest)
        if left:  # on a GPU the next step is launched before the host knows the token that it follows
            stats.decode_tokens += 1
            token, largest = sample(decoder.decode(token), temperature, top_p, generator)  # (1,)
        value, logit = wait_for()
        stats.decode_seconds += time.perf_counter() - began
        if not math.isfinite(logit):
            raise not_finite(decoder.model.dtype)
        stats.new_tokens += 1
        if value in decoder.model.config.eos_token_ids:
            return
        yield value


def read_later(*numbers) -> Callable[[], list]:
    """Begin to copy tensors of one number each to the host; returns a function that waits for their values."""
    if not has_streams(numbers[0].device):
        return lambda: [number.item() for number in numbers]
    pinned = numbers[0].is_cuda
    values = [torch.empty(1, dtype=x.dtype, pin_memory=pinned).copy_(x, non_blocking=True) for x in numbers]
    copied = torch.cuda.current_stream().record_event()

    def wait():
        copied.synchronize()
        return [value.item() for value in values]

    return wait


# --------------------------------------------------------------------------------------------------------------------
# The KV cache: on the device, or in host memory
# --------------------------------------------------------------------------------------------------------------------


def has_streams(device) -> bool:
    """Whether work on this device runs asynchronously, on streams."""
    return device.type == "cuda"


def pool_rows(q, keys, n_tokens, distance, per_row, backend):
    """Pool rows of attention, as the history has them, from `per_row` queries each.

    q (L', Hq, n, D): the last queries, `distance` tokens apart; keys (L', Hk, capacity, b, D). Returns rows (L', Hk,
    rows, N), where queries before the text count as zeros, and log-sum-exps (L', Hq, n).
    """
    pooled, lse = kernels.pool_history(q.flatten(0, 1), keys.flatten(0, 1), n_tokens, distance, backend)
    pooled = F.pad(pooled, (0, 0, -q.shape[2] % per_row, 0))  # (L' * Hq, rows * Q, N)
    pooled = pooled.view(*keys.shape[:2], -1, pooled.shape[1] // per_row, per_row, pooled.shape[2])
    return pooled.square().mean((2, 4)).sqrt(), lse.unflatten(0, q.shape[:2])  # mean over G and Q


class KVCache:
    """K and V of all layers on the device, in blocks, and the blocks that each head attends to."""

    def __init__(self, c: Config, m: LlamaConfig, capacity, dtype, device, backend):
        self.config, self.backend, self.capacity = c, backend, capacity
        self.device, self.heads = torch.device(device), (m.n_layers, m.n_kv_heads)  # (L, Hk)
        ids = torch.arange(math.prod(self.heads) * capacity, dtype=torch.int32, device=device)
        self.block_ids = ids.view(*self.heads, capacity)  # (L, Hk, capacity): a number for each block of each head
        self.address = self.block_ids  # (L, Hk, capacity): where each block of the text is stored
        # (L, Hk, E + capacity): addresses of the blocks that a head attends to: echoes or -1, then the others in order
        self.table = F.pad(self.address, (c.echo_blocks, 0), value=-1)
        counters = torch.zeros(1 + math.prod(self.heads), dtype=torch.int64, device=device)
        self.counters = counters  # one tensor, which a single launch increments
        self.position = counters[:1]  # (1,): of the newest token
        self.lengths = counters[1:].view(self.heads)  # (L, Hk): tokens in the blocks of a row of the table
        self.work = kernels.divide_work(self.lengths, c.block_size)  # (L, programs, 4): of the decode kernel
        # (L, Hk, capacity + 1): ids of the blocks that a head does not attend to, echoes apart, else -1
        self.absent = torch.full((*self.heads, capacity + 1), -1, dtype=torch.int32, device=device)
        self.echoes = torch.zeros((*self.heads, c.echo_blocks), dtype=torch.int64, device=device)  # attended so far
        self.whole = True  # nothing was selected yet, and K and V are one tensor: no table is needed
        self.left_out = 0  # blocks that are not attended, of all heads
        self.allocate((c.block_size, m.head_dim), dtype)
        on_cpu = self.device.type == "cpu" and backend == "torch"
        self.working_set = WorkingSet(self, m.head_dim, dtype) if on_cpu else None

    def allocate(self, block, dtype):
        """Make the memory for K and V."""
        self.kv = torch.zeros(2, *self.heads, self.capacity, *block, dtype=dtype, device=self.device)
        self.blocks = self.kv.flatten(1, 3)  # (2, L * Hk * capacity, b, D): what addresses count

    def write_prompt(self, layer, first, k, v):
        """Store k, v (Hk, T, D) of the tokens from `first` on. Returns K and V up to there: (Hk, first + T, D) each."""
        tokens = self.kv[:, layer].flatten(2, 3)[:, :, : first + k.shape[1]]  # (2, Hk, first + T, D)
        tokens[0, :, first:], tokens[1, :, first:] = k, v
        return tokens

    def end_prompt(self, n_tokens):
        self.position.fill_(n_tokens - 1)
        self.lengths.fill_(n_tokens + self.config.echo_blocks * self.config.block_size)

    def begin_token(self):
        """What the host does before a token."""

    def advance(self):
        """The next writes and reads belong to the next token."""
        self.counters += 1
        if self.working_set and not self.whole:
            self.working_set.advance()

    def write(self, layer, k, v):
        """Store k, v (Hk, 1, D) of the current token."""
        k_rows, v_rows, row = self.token_rows(layer)
        k_rows.index_copy_(1, row, k)
        v_rows.index_copy_(1, row, v)
        if self.working_set and not self.whole:
            self.working_set.write(layer, k, v)

    def token_rows(self, layer):
        """Where the current token's K and V go: two views (Hk, rows, D), and the row (1,) int64."""
        return *self.kv[:, layer].flatten(2, 3), self.position

    def attend(self, layer, q, n_tokens):
        """Attention of q (Hq, D) to the blocks of the table -> out (Hq, D), log-sum-exp (Hq,).

        While all blocks are attended, the torch backend needs no table, and gives no log-sum-exp (None).
        """
        if self.whole and self.backend == "torch":
            k, v = self.kv[:, layer].flatten(2, 3)[:, None, :, :n_tokens]  # (1, Hk, T, D) each
            groups = q.unflatten(0, (self.heads[1], -1))[None]  # (1, Hk, G, D)
            return F.scaled_dot_product_attention(groups, k, v)[0].flatten(0, 1), None
        if self.working_set:
            return self.working_set.attend(layer, q, n_tokens)
        lists = self.table[layer], self.lengths[layer], self.work[layer]
        return kernels.sparse_decode(q, *self.blocks, *lists, self.backend)

    def attend_also(self, block, layers=slice(None)):
        """The current token attends to echoes, too: block (E,) int64, `capacity` for none. No block is read twice."""
        entries = self.table[layers, :, : len(block)]  # (L', Hk, E)
        self.write_echoes(block, entries, layers)
        self.echoes[layers].add_(entries >= 0)
        if self.working_set and not self.whole:
            self.working_set.gather_echoes(entries, layers)

    def write_echoes(self, block, entries, layers):
        """Write the addresses of blocks (E,) to the table's entries (L', Hk, E), -1 for those attended already."""
        torch.index_select(self.absent[layers], 2, block, out=entries)

    def pool(self, layers, q, *args):
        """See pool_rows; q (L', Hq, n, D) of the slice `layers`."""
        return pool_rows(q, self.kv[0, layers], *args, self.backend)

    def select(self, chosen, start, end, n_tokens):
        """From the next token on, attend to the `chosen` blocks of the middle [start, end), and to all others.

        chosen (L, Hk, end - start) bool, or None for all of them
        """
        if chosen is not None:
            self.attend_to(*self.lists(self.address, chosen, start, end, n_tokens))
        elif self.backend == "triton":
            self.plan()

    def lists(self, address, chosen, start, end, n_tokens):
        """The arguments of `attend_to`, from chosen (L, Hk, end - start) and address (L, Hk, capacity).

        All blocks outside of the middle are attended, future ones too: they come last in the table, and are read only
        when `lengths`, which grows by 1 a token, reaches them. Each echo entry counts as b tokens, also if it is -1.
        """
        block = torch.arange(self.capacity, device=self.device)
        attended = torch.ones_like(address, dtype=torch.bool)
        attended[..., start:end] = chosen
        # Attended blocks in order; the others sort last, beyond every length, and get any valid number.
        order = torch.where(attended, block, self.capacity).sort(-1).values.clamp(max=self.capacity - 1)
        extra = self.config.echo_blocks - (~chosen).sum(-1)  # (L, Hk) blocks
        left_out = math.prod(self.heads) * (end - start - self.n_chosen(start, end))
        return attended, address.gather(-1, order), n_tokens + extra * self.config.block_size, left_out

    def n_chosen(self, start, end):
        """Blocks chosen from the middle [start, end) per head, in the mean."""
        fits = end - start <= self.config.topk_blocks + self.config.echo_blocks
        return end - start if fits else self.config.topk_blocks

    def attend_to(self, attended, table, lengths, left_out, layers=slice(None)):
        """Attend to these lists from now on. The tensors keep their addresses, which a CUDA graph has captured."""
        self.absent[layers, :, :-1] = torch.where(attended, -1, self.block_ids[layers])
        self.table[layers, :, self.config.echo_blocks :] = table
        self.lengths[layers] = lengths
        self.whole, self.left_out = False, left_out
        if self.working_set:
            self.working_set.gather(layers)
        elif self.backend == "triton":
            self.plan()

    @property
    def attended(self):
        """The blocks that are attended, echoes apart: (L, Hk, capacity) bool."""
        return self.absent[..., :-1] < 0

    def plan(self):
        """Divide the work of the decode kernel for the next tokens."""
        self.work.copy_(kernels.divide_work(self.lengths, self.config.block_size))

    def take_over(self):
        """There is nothing to wait for: a selection takes effect at once."""


class WorkingSet:
    """On a CPU, which reads fastest in order: the listed tokens of each head, copied together once a selection.

    The rows are those of the table: the places of echoes first, then the other blocks, of which the newest one grows.
    """

    def __init__(self, cache: KVCache, head_dim, dtype):
        self.cache, (layers, heads) = cache, cache.heads
        self.kv = torch.zeros(2, layers, heads, 0, head_dim, dtype=dtype)  # (2, L, Hk, tokens, D): see `grow`
        self.mask = torch.zeros(layers, heads, 0)  # (L, Hk, tokens): 0 for tokens that are attended, else -inf
        self.newest = torch.zeros(layers, heads, dtype=torch.int64)  # the newest token's place in each row
        self.index = torch.arange(layers)[:, None], torch.arange(heads)  # with `newest`: of one token in each row
        self.longest = [0] * layers  # the longest row's tokens, less those of the text

    def grow(self, n_tokens):
        """Make room for rows of n_tokens."""
        missing = n_tokens - self.mask.shape[2]
        if missing > 0:
            missing += n_tokens // 4
            self.kv = F.pad(self.kv, (0, 0, 0, missing))
            self.mask = F.pad(self.mask, (0, missing), value=-torch.inf)

    def gather(self, layers):
        """Copy the listed blocks of a slice of the layers together."""
        b, n_tokens = self.cache.config.block_size, int(self.cache.position) + 1
        more = self.cache.config.interval(n_tokens) + 2 * b  # until the next selection, which may be late
        self.grow(int(self.cache.lengths[layers].max()) + more)
        for layer in range(len(self.longest))[layers]:
            length = self.cache.lengths[layer]  # (Hk,)
            table = self.cache.table[layer, :, : kernels.cdiv(int(length.max()), b)]  # (Hk, n)
            block, listed = kernels.read_table(table, length, b)  # (Hk, n), (Hk, n * b)
            self.mask[layer] = -torch.inf
            self.mask[layer, :, : listed.shape[1]].masked_fill_(listed, 0.0)
            for target, blocks in zip(self.kv[:, layer], self.cache.blocks):
                copied = blocks.index_select(0, block.flatten())  # (Hk * n, b, D)
                target[:, : listed.shape[1]] = copied.view(len(table), -1, target.shape[2])
            self.newest[layer], self.longest[layer] = length - 1, int(length.max()) - n_tokens

    def gather_echoes(self, entries, layers):
        """Copy a token's echoes to their places: entries (L', Hk, E) of the table."""
        b, n_echoes, new = self.cache.config.block_size, entries.shape[2], entries >= 0
        mask = torch.where(new, 0.0, -torch.inf).repeat_interleave(b, 2)  # (L', Hk, E * b)
        self.mask[layers, :, : n_echoes * b] = mask
        index, source = new.nonzero(as_tuple=True), entries[new]  # (n,) each
        for target, blocks in zip(self.kv[:, layers], self.cache.blocks):
            target[:, :, : n_echoes * b].unflatten(2, (n_echoes, b))[index] = blocks.index_select(0, source)

    def advance(self):
        self.newest += 1
        self.mask[*self.index, self.newest] = 0.0

    def write(self, layer, k, v):
        """Append k, v (Hk, 1, D) of the newest token to each row."""
        index = self.index[1], self.newest[layer]
        self.kv[0, layer][index], self.kv[1, layer][index] = k[:, 0], v[:, 0]

    def attend(self, layer, q, n_tokens):
        """As KVCache.attend."""
        n = self.longest[layer] + n_tokens
        k, v = self.kv[:, layer, :, None, :n]  # (Hk, 1, n, D) each
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # unlike F's, it returns the log-sum-exp
        groups = q.view(len(k), 1, -1, q.shape[1])  # (Hk, 1, G, D)
        out, lse = attend(groups, k, v, attn_mask=self.mask[layer, :, None, None, :n])  # (Hk, 1, G, D), (Hk, 1, G)
        return out.view(q.shape), lse.view(-1)


class OffloadedCache(KVCache):
    """A KVCache in host memory, a block's K and V side by side, with slots on the device for the attended blocks.

    Each head has fixed slots for its sink and for its tail: the local window, and the blocks that begin until the next
    selection. The others form one pool for all layers and heads, twice as large as a selection, because a selection
    takes effect one token late: its blocks are copied into free slots, on a stream of their own, while the next token
    still attends to the blocks selected before. Only blocks that no slot holds are copied.
    """

    def allocate(self, block, dtype):
        c, n_heads = self.config, math.prod(self.heads)
        # Slots: of selected blocks, of any head; each head's of the sink, and a ring for the tail; each head's echoes.
        self.whole, self.written = False, 0  # K and V are not one tensor on the device; tokens that the host has
        self.next, self.age = None, 0  # a selection whose copies may still run; tokens since it was made
        self.sink = min(c.sink_tokens // c.block_size, self.capacity)
        self.ring = min(c.tail_blocks(self.capacity * c.block_size), self.capacity)
        self.n_free = 2 * n_heads * min(c.topk_blocks + c.echo_blocks, self.capacity)  # slots of selected blocks
        n_fixed, n_echo = n_heads * (self.sink + self.ring), n_heads * c.echo_blocks
        self.host = host_memory((*self.heads, self.capacity, 2, *block), dtype, self.device, self)
        n_slots = self.n_free + n_fixed + n_echo
        self.slots = torch.zeros(n_slots, 2, *block, dtype=dtype, device=self.device)  # (slots, 2, b, D)
        self.blocks = self.slots.unbind(1)  # (slots, b, D): K's, V's
        fixed = self.slots[self.n_free : self.n_free + n_fixed]
        self.fixed = fixed.view(*self.heads, -1, 2, *block)  # (L, Hk, sink + ring, 2, b, D)
        head = torch.arange(n_heads, device=self.device).view(*self.heads, 1)  # (L, Hk, 1)
        all_blocks = torch.arange(self.capacity, device=self.device)
        self.address = (self.n_free + head * (self.sink + self.ring) + self.fixed_slot(all_blocks)).int()
        self.table[..., c.echo_blocks :] = self.address
        self.first_echo = self.n_free + n_fixed + torch.arange(n_heads, device=self.device)[:, None] * c.echo_blocks
        held = torch.full((n_heads, c.echo_blocks), -1, dtype=torch.int32, device=self.device)
        self.echo_held = held  # (L * Hk, E): the blocks in each head's slots for echoes, which begin at first_echo
        self.held = torch.full((1, self.n_free), -1, dtype=torch.int32, device=self.device)  # blocks in the free slots
        # Blocks copied into slots, of all heads: two counters, because selections and echoes are copied on two streams.
        self.fetched, self.echoes_fetched = torch.zeros(2, dtype=torch.int64, device=self.device)
        self.selected = self.written_back = 0  # blocks selected, and blocks copied to the host, of all heads
        self.stream = torch.cuda.Stream(self.device) if has_streams(self.device) else None
        self.copied = None  # event: the copies of the last selection have ended

    def fixed_slot(self, block):
        """Where blocks of the sink or the tail are among a head's fixed slots."""
        return torch.where(block < self.sink, block, self.sink + block % self.ring)

    def write_prompt(self, layer, first, k, v):
        """As KVCache.write_prompt. Earlier K and V are copied back from the host.

        Each head's are contiguous there, so that copies run at the link's rate.
        """
        b, start, end = self.config.block_size, first // self.config.block_size, self.config.n_blocks(first)
        self.write_back(first)  # what was decoded before
        earlier = torch.empty_like(self.host[layer, :, :end], device=self.device)  # (Hk, blocks, 2, b, D)
        for host, old in zip(self.host[layer], earlier):
            old.copy_(host[:end], non_blocking=True)
        k, v = (torch.cat((old.flatten(1, 2)[:, :first], new), 1) for old, new in zip(earlier.unbind(2), (k, v)))
        kv = torch.stack((k[:, start * b :], v[:, start * b :]), 1)  # (Hk, 2, tokens, D), from the start of a block
        blocks = F.pad(kv, (0, 0, 0, -k.shape[1] % b)).unflatten(2, (-1, b)).transpose(1, 2)  # (Hk, blocks, 2, b, D)
        end = start + blocks.shape[1]
        for host, new in zip(self.host[layer], blocks):
            host[start:end].copy_(new.contiguous(), non_blocking=True)
        kept = [block for block in range(start, end) if block < self.sink or block >= end - self.ring]  # sink and tail
        block = torch.tensor(kept, device=self.device)  # (n,); a mask on the device would make the host wait
        self.fixed[layer][:, self.fixed_slot(block)] = blocks[:, block - start]
        self.written = k.shape[1]
        return k, v

    def begin_token(self):
        """A selection takes effect one token late."""
        if self.next and self.age == 1:
            self.take_over()
        self.age += 1

    def advance(self):
        super().advance()
        b = self.config.block_size
        self.row = self.fixed_slot(self.position // b) * 2 * b + self.position % b  # (1,): of K in a head's fixed slots

    def token_rows(self, layer):
        rows = self.fixed[layer].flatten(1, 3)  # (Hk, (sink + ring) * 2 b, D): a block's K, then its V
        return rows, rows[:, self.config.block_size :], self.row

    def pool(self, layers, q, n_tokens, *args):
        """As KVCache.pool, on the host, which waits: the queries go there, the rows come back."""
        self.write_back(n_tokens)
        # q.cpu() also waits for what was written back
        rows = pool_rows(q.cpu(), self.host[layers, ..., 0, :, :], n_tokens, *args, "torch")
        return [x.to(self.device) for x in rows]

    def write_echoes(self, block, entries, layers):
        """As KVCache.write_echoes. Echoes that no slot holds yet are copied into slots first."""
        wanted = self.absent[layers].index_select(2, block).flatten(0, 1)  # (L * Hk, E): ids in the host's memory
        still_wanted = (self.echo_held[..., None] == wanted[:, None]).any(-1)  # (L * Hk, E)
        held = torch.where(still_wanted, self.echo_held, -1)  # earlier tokens have been attended: slots may be reused
        slots, fetch, held = kernels.assign_slots(wanted, held)
        self.echo_held.copy_(held)
        slots = (self.first_echo + slots).int()
        self.echoes_fetched += self.copy(fetch, slots)
        entries.copy_(torch.where(wanted >= 0, slots, -1).view(entries.shape))

    def copy(self, source, target):
        """Copy blocks of the host, by id or -1 for none, into slots, both (..., n) int32. Returns their number, ()."""
        host, slots = self.host.flatten(0, 2).flatten(1), self.slots.flatten(1)
        kernels.copy_blocks(host, slots, source.flatten(), target.flatten(), self.backend)
        return (source >= 0).sum()

    def write_back(self, n_tokens):
        """Copy from the slots to the host what it does not have of the first n_tokens yet, in whole blocks."""
        if n_tokens > self.written:
            block = torch.arange(self.written // self.config.block_size, self.config.n_blocks(n_tokens))
            block = block.to(self.device)
            source, target = (
                x[..., block].flatten() for x in (self.address, self.block_ids)
            )  # (L * Hk * blocks,) each
            kernels.copy_blocks(self.slots.flatten(1), self.host.flatten(0, 2).flatten(1), source, target, self.backend)
            self.written, self.written_back = n_tokens, self.written_back + len(source)

    def select(self, chosen, start, end, n_tokens):
        """As KVCache.select, but one token late: the blocks are copied while the next token runs."""
        self.take_over()  # with M = 1 the selection before is not in use yet
        self.write_back(n_tokens)
        if chosen is None:
            chosen = torch.ones(*self.heads, end - start, dtype=torch.bool, device=self.device)
        with self.copying():
            address = self.fetch(chosen, start, end)
            # `chosen` is kept because the copies read it: its memory must not be given to another tensor yet
            self.next, self.age = (chosen, *self.lists(address, chosen, start, end, n_tokens)), 0

    def fetch(self, chosen, start, end):
        """Copy the chosen blocks that no slot holds into free slots. Returns where each block is: (L, Hk, capacity)."""
        n_wanted = math.prod(self.heads) * self.n_chosen(start, end)
        # The wanted ids, one after another: chosen[...] by its mask would make the host wait for their number.
        rank = torch.where(chosen.flatten(), chosen.flatten().cumsum(0) - 1, n_wanted)
        wanted = torch.empty(n_wanted + 1, dtype=torch.int32, device=self.device)
        wanted = wanted.scatter_(0, rank, self.block_ids[..., start:end].flatten())[None, :n_wanted]  # (1, n_wanted)
        slots, fetch, held = kernels.assign_slots(wanted, self.held)
        self.held.copy_(held)
        self.fetched += self.copy(fetch, slots)
        self.selected += n_wanted
        return self.address.flatten().scatter(0, wanted[0].long(), slots[0]).view(self.address.shape)

    def take_over(self):
        """Attend to the newest selection, once its copies have ended."""
        if self.next:
            self.join()
            _, attended, table, lengths, left_out = self.next
            self.attend_to(attended, table, lengths + self.age, left_out)
            self.next = None

    @contextmanager
    def copying(self):
        """Run the body on the stream of copies, after what the current stream has been given."""
        if not self.stream:
            yield
            return
        self.stream.wait_event(torch.cuda.current_stream().record_event())
        with torch.cuda.stream(self.stream):
            yield
            self.copied = self.stream.record_event()

    def join(self):
        """Have the current stream wait for the copies."""
        if self.copied:
            torch.cuda.current_stream().wait_event(self.copied)
            self.copied = None

    def __del__(self):
        """The next tensors may be given a dropped cache's memory: wait until the copies have ended."""
        if getattr(self, "copied", None) and not sys.is_finalizing():
            self.join()

    def format_stats(self, n_tokens, steps) -> list[str]:
        """Lines for people about `steps` decoded tokens, n_tokens in all."""
        self.join()
        block_bytes = self.slots[0].nbytes
        whole = self.host.nbytes // (self.capacity * self.config.block_size) * n_tokens
        counts = int(self.fetched), self.selected, int(self.echoes_fetched), self.written_back
        fetched, selected, echoes, written = (f"{count * block_bytes / steps / 1e6:,.3f} MB" for count in counts)
        return [
            f"device     {self.slots.nbytes / 1e6:,.2f} MB of KV slots; the whole cache is {whole / 1e6:,.2f} MB",
            f"link       {fetched} a token fetched of {selected} selected, {echoes} for echoes; {written} written back",
        ]


def host_memory(shape, dtype, device, owner) -> torch.Tensor:
    """Zeros in host memory, which a GPU may read and write as long as `owner` exists. PyTorch would round pinned memory
    up to a power of two."""
    memory = torch.zeros(shape, dtype=dtype)
    if device.type == "cuda" and memory.numel():
        cuda = torch.cuda.cudart()
        error = int(cuda.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
        if error:
            with suppress(RuntimeError):  # CUDA keeps the error until the next launch reports it
                torch.ones(1, device=device)
        require(not error, f"{memory.nbytes / 1e9:,.2f} GB of host memory cannot be pinned: try a shorter text")
        weakref.finalize(owner, lambda: (torch.cuda.synchronize(device), cuda.cudaHostUnregister(memory.data_ptr())))
    return memory


# --------------------------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------------------------


def format_stats(decoder: SparseDecoder) -> str:
    """The counters as a few lines for people."""
    stats, steps = decoder.stats, max(1, decoder.stats.decode_tokens)
    prefill_speed = stats.prefill_tokens / max(stats.prefill_seconds, 1e-9)
    counts = stats.attention_bytes, stats.echo_bytes, stats.calibration_bytes, stats.choosing_bytes
    read = [f"{count / steps / 1e6:,.2f}" for count in counts]
    lines = [
        f"prefill    {stats.prefill_tokens:,} tokens, {prefill_speed:,.0f} tokens/s",
        "KV read    {} MB a token by attention + {} by echoes + {} by calibration + {} to choose".format(*read),
    ]
    if stats.recovery:
        recovery = torch.stack(stats.recovery).mean().item()
        lines.append(f"recovery   {recovery:.3f} of the true attention, mean of {len(stats.recovery)} calibrated steps")
        if not has_streams(decoder.model.device):
            share = stats.overhead_seconds / stats.decode_seconds
            lines.append(f"overhead   {share:.0%} of the time: calibration, prediction and selection")
    if isinstance(decoder.cache, OffloadedCache):
        lines += decoder.cache.format_stats(decoder.n_tokens, steps)
    return "\n".join(lines)


def format_summary(decoder: SparseDecoder, dense=False) -> str:
    """One line: speed, and bytes read against dense decoding."""
    stats, steps = decoder.stats, max(1, decoder.stats.decode_tokens)
    line = f"{stats.new_tokens:,} token{'s' * (stats.new_tokens != 1)}"
    if not stats.dense_bytes:
        return f"{line}: speed and bytes are measured from the second one on"
    read, dense_read = (f"{count / steps / 1e6:,.1f} MB" for count in (stats.read_bytes, stats.dense_bytes))
    speed = steps / max(stats.decode_seconds, 1e-9)
    line += f", {speed:,.1f} tokens/s, KV read {read} a token, dense {dense_read}"
    if decoder.selecting:
        less = stats.dense_bytes / stats.read_bytes
        return f"{line}: {less:.1f}x less" if less >= 1 else f"{line}: {1 / less:.1f}x more"
    fits = f"all {decoder.n_tokens:,} tokens fit the budget of {decoder.config.budget:,}"
    return line if dense else f"{line}: {fits}; a longer text shows the method"


def choose_device(args) -> tuple[torch.device, torch.dtype, str]:
    """Device, dtype and backend from the command line's names."""
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device  # with its index
    except (RuntimeError, AssertionError):
        device = torch.device("meta")
    require(device.type in ("cpu", "cuda"), f"device {name} is not available: try cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # Triton launches on the current device
    dtype = torch.bfloat16 if args.dtype == "auto" else getattr(torch, args.dtype)
    backend = args.backend if args.backend != "auto" else "triton" if device.type == "cuda" else "torch"
    try:
        kernels.use_triton(backend, device)
    except RuntimeError as error:
        raise InputError(str(error)) from None
    return device, dtype, backend


def free_memory(device) -> int | None:
    """Bytes that can still be allocated on a device; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return int(re.search(r"MemAvailable: *(\d+) kB", pathlib.Path("/proc/meminfo").read_text())[1]) * 1024
    except (OSError, TypeError):
        return None


def lacks_memory(c: Config, m: LlamaConfig, n_tokens, dtype, device, offload) -> str | None:
    """What to do where the cache and prefill's largest activations would not fit into memory."""
    heads, n_blocks = m.n_layers * m.n_kv_heads, c.n_blocks(n_tokens)
    kv, sparse = 2 * heads * n_tokens * m.head_dim * dtype.itemsize, not c.fits(n_tokens)
    history = 2 * heads * c.history_len * n_blocks * HISTORY_DTYPE.itemsize
    rows = c.history_len * c.queries(c.interval(n_tokens))
    pooled = 3 * 4 * m.n_heads * rows * n_blocks  # of a layer of the prompt, in float32, and copies
    queries = m.n_layers * m.n_heads * rows * m.head_dim * dtype.itemsize  # the prompt's, of the history's rows
    chunk = min(n_tokens, OFFLOADED_CHUNK if offload else PREFILL_CHUNK)
    activations = chunk * (3 * m.d_ff + 5 * m.d_model) * dtype.itemsize
    if dtype == torch.float32 and has_streams(device):  # causal_attention repeats K and V for each query head
        activations += 2 * m.n_heads * n_tokens * m.head_dim * dtype.itemsize
    needed = max(activations, sparse * pooled) + sparse * (history + queries)
    slots = min(kv, 2 * heads * c.budget * m.head_dim * 2 * dtype.itemsize)
    for need, memory in ((needed + (slots if offload else kv), device), (kv if offload else 0, torch.device("cpu"))):
        free = free_memory(memory)
        if free is not None and need > free:
            remedy = f"try a shorter prompt, fewer --max-new-tokens{'' if offload else ' or --offload'}"
            needs = f"a text of {n_tokens:,} tokens needs {need / 1e9:,.2f} GB of memory on {memory}"
            return f"{needs}, {free / 1e9:,.2f} GB are free: {remedy}"


def answer(args, decoder: SparseDecoder, tokenizer, ids: list[int]) -> str:
    """Print and return what continues the text `ids`, to which the tokens are appended. With --chat, the first Ctrl-C
    ends the answer; only the second one interrupts."""
    stream, limit = TextStream(tokenizer), min(len(decoder.ids) - len(ids), args.max_new_tokens)
    interrupted, interrupt = [], signal.getsignal(signal.SIGINT)
    if args.chat:
        signal.signal(signal.SIGINT, lambda *_: interrupted.append(signal.signal(signal.SIGINT, interrupt)))
    try:
        for token in generate(decoder, ids[decoder.n_tokens :], limit, args.temperature, args.top_p, args.seed):
            ids.append(token)
            print(stream.push(token), end="", flush=True)
            if interrupted:
                break
    finally:
        if args.chat:
            signal.signal(signal.SIGINT, interrupt)
        if decoder.stats.new_tokens:
            print(stream.flush(), flush=True)
    if len(ids) == len(decoder.ids) and limit < args.max_new_tokens:
        print(f"attnpred: the answer ends here: there is room for {len(ids):,} tokens", file=sys.stderr)
    ids += decoder.ids[len(ids) : decoder.n_tokens].cpu().tolist()  # the token that ended the answer
    return stream.shown


def run(args, make_decoder=SparseDecoder) -> SparseDecoder | None:
    """Answer the questions of args, from `parse_options`, on standard output. Returns the decoder, if one was made."""
    device, dtype, backend = choose_device(args)
    predictor = load_predictor(args.predictor)
    model, tokenizer = load_model(args.model or str(fetch_default_llm()), dtype, device)
    m, config = model.config, args.config
    if backend == "triton" and not kernels.supports(m.head_dim, config.block_size, model.kv_dtype.itemsize):
        shape = f"head dimension {m.head_dim}, blocks of {config.block_size} tokens"
        print(f"attnpred: there is no kernel for {shape}: using the torch backend", file=sys.stderr)
        backend = "torch"
    if args.dense:  # a budget that covers every text
        config = dataclasses.replace(config, budget=config.budget + config.block_size * m.context_len)
    has_template = tokenizer.has_chat_template and not args.raw
    require(has_template or not args.chat, "--chat needs a model with a chat template: use an instruct model")
    decoder, messages, ids = None, [], []  # the conversation's text, and its tokens
    try:
        for question in read_questions(args):
            messages.append({"role": "user", "content": question})
            if has_template:
                ids += tokenizer.chat_tokens(messages, ids)
            else:
                ids = tokenizer.encode(question, control_tokens=args.raw)
            require(ids, "the prompt has no tokens: the tokenizer drops all of its characters")
            room = len(decoder.ids) if decoder else m.context_len
            require(len(ids) < room, f"the text has {len(ids):,} tokens, but there is room for {room:,}: shorten it")
            if decoder is None:  # a conversation may fill the context, or as much of it as fits into memory
                least = min(len(ids) + args.max_new_tokens, m.context_len)
                capacity = m.context_len if args.chat else least
                place = model.kv_dtype, device, args.offload
                while (problem := lacks_memory(config, m, capacity, *place)) and capacity > least:
                    capacity = max(least, capacity // 2)
                require(not problem, problem)
                decoder = make_decoder(config, model, predictor, capacity, backend, args.offload)
            messages.append({"role": "assistant", "content": answer(args, decoder, tokenizer, ids)})
    finally:
        if decoder and decoder.stats.new_tokens:
            if args.stats:
                print(format_stats(decoder), file=sys.stderr)
            print(f"attnpred: {format_summary(decoder, args.dense)}", file=sys.stderr)
    return decoder


def main(argv=None) -> int:
    return exit_status("attnpred", lambda: run(parse_options(argv)))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, handler)
    sys.exit(exit_status("attnpred", lambda: run(*options)))
