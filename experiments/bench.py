"""Benchmarks of decoding, prefill and each kernel; counts of a token's launches, bytes read and bytes over the link.

    python -m experiments.bench speed --out speed.json

`--help` lists the commands, in the order of this file. `speed`, `prefill` and `kernels` measure times; --out writes all
numbers. A context's keys, values and history are random, because a step's time does not depend on their values.
`speed` and `kernels` also measure ceilings: a copy on the device, a matrix product, a copy from pinned host memory.
`offload`, `bytes` and `launches` count; the last two run on tensors without memory (roofline.py).
"""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import os
import pathlib
import signal
import statistics
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch.utils.benchmark import Timer

import attnpred
from attnpred import InputError, OneLineParser, SparseDecoder
from experiments import roofline
from experiments.hot_paths import PATHS
from model import FourBitLinear, Llama, LlamaConfig, checkpoint_targets, load_model
from train_predictor import write_atomically
from weights.fetch_llm import fetch_default_llm

TEXTS = {"api": "API documentation", "gpl": "a licence in prose"}  # `offload` counts on these texts of evaluate.py
TEXT_TOKENS, TEXT_STEPS = 4096, 64  # tokens of a prompt, and tokens that are decoded after it
SHAPES = {"smollm2-135m": None, "llama-3.1-8b": roofline.LLAMA_31_8B}  # None: the default model, with its weights
TOY = dict(n_layers=1, n_heads=4, n_kv_heads=2, head_dim=16, d_model=32, d_ff=48, vocab_size=64)
SHAPES["toy"] = replace(roofline.LLAMA_31_8B, **TOY)  # to try a command out

# --------------------------------------------------------------------------------------------------------------------
# Models, measuring and printing
# --------------------------------------------------------------------------------------------------------------------


def shape_of(name) -> LlamaConfig:
    """The LlamaConfig of a name in SHAPES."""
    return SHAPES[name] or LlamaConfig.from_json(json.loads((fetch_default_llm() / "config.json").read_text()))


def models_of(args, device):
    """{name of a dtype: model}, the default model or one with random weights. Raises InputError."""
    models, shape, limit = {}, SHAPES[args.model_shape], shape_of(args.model_shape).context_len
    if "transformers" in args.contenders and not importlib.util.find_spec("transformers"):
        raise InputError("this comparison needs transformers: pip install -r requirements-dev.txt")
    if max(args.contexts) > limit:
        raise InputError(f"--contexts {max(args.contexts)}: the model's context is {limit:,} tokens")
    for name in args.dtypes:
        placement = getattr(torch, name), device
        model = Llama(shape, *placement).eval() if shape else load_model(str(fetch_default_llm()), *placement)[0]
        models[name] = model
        for part, parameter in model.named_parameters() if shape else ():
            parameter.data.normal_(1.0 if part.endswith("norm.weight") else 0.0, 0.02)
    return models


def conditions(args, config, device):
    """A dict of what a measurement depends on: device, threads, version of torch, weights and Config."""
    random = f"random weights in the shape of {args.model_shape}"
    return dict(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        weights=random if SHAPES[args.model_shape] else "SmolLM2-135M-Instruct",
        config=dataclasses.asdict(config),
    )


def predictor():
    """The bundled predictor."""
    return attnpred.load_predictor(attnpred.DEFAULT_PREDICTOR)


def show(rows, columns=None):
    """Print rows (dicts) as a table. `columns` is {head: format of a row}; a cell is a dash if an entry is missing."""

    def cell(form, row):
        try:
            return form.format(row, **row)
        except KeyError:
            return "–"

    columns = columns or {head: f"{{0[{head}]}}" for head in rows[0]}
    lines = [columns, ["---"] * len(columns), *([cell(form, row) for form in columns.values()] for row in rows)]
    print("\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n", flush=True)


def seconds(call, device, graph=True):
    """The median time of a call in seconds. On a GPU, the L2 cache is cold.

    graph: on a GPU, replay a CUDA graph of the call, because a launch from Python can take longer than its kernel
    """
    if device.type == "cuda":
        from triton.testing import do_bench

        call()  # compiles, and prepares libraries
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                call()
            call = captured.replay
        return 1e-3 * do_bench(call, return_mode="median")
    return Timer("call()", globals=dict(call=call), num_threads=torch.get_num_threads()).blocked_autorange().median


def reason(error):
    """One line about an exception, which leaves a row out but not the table."""
    if isinstance(error, InputError):
        raise error
    return "out of memory" if isinstance(error, torch.OutOfMemoryError) else repr(error).splitlines()[0]


def collect(rows, columns, args):
    """The rows of an iterator. They are written to --out as they come, and shown at the end, also at an early one."""
    done = []
    try:
        for row in rows:
            done.append(args.setup | row)
            if args.out:
                write_atomically(args.out, json.dumps(done, indent=1).encode())
    finally:
        if done:
            show(done, columns)
    return done


def ceilings(dtype, device, size=1 << 28, n=4096):
    """Rates that no kernel can exceed, measured with copies of `size` bytes and products of n x n matrices.

    Returns {"copy": bytes/s read plus written on the device, "host copy": bytes/s from pinned host memory, "matmul":
    multiply-adds/s in dtype, "matmul tf32": the same in float32, with tf32 if a GPU uses it}.
    """
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    x, y = torch.ones(2, size, dtype=torch.uint8, device=device)
    rates = {"copy": 2 * size / seconds(lambda: y.copy_(x), device)}
    rates["host copy"] = size / seconds(lambda: y.copy_(host, non_blocking=True), device)
    for name, kind in (("matmul", dtype), ("matmul tf32", torch.float32)):
        x = torch.randn(n, n, device=device).to(kind)
        rates[name] = n**3 / seconds(lambda x=x: x @ x, device)
    return rates


# --------------------------------------------------------------------------------------------------------------------
# speed and prefill
# --------------------------------------------------------------------------------------------------------------------


dense = partial(replace, budget=1 << 24)  # a budget that covers every text

CONTENDERS = {  # name: (a function that returns its Config, whether its cache is offloaded)
    "dense": (dense, False),
    "sparse": (replace, False),
    "sparse, offloaded": (replace, True),
    "transformers": (dense, False),
    "adapter": (replace, False),
}
ON_CPU, ON_GPU = ["dense", "sparse", "transformers"], ["dense", "sparse", "sparse, offloaded"]


class Ours:
    """A SparseDecoder with random K and V; each block's attention is similar in all rows of the prompt's history."""

    @torch.inference_mode()
    def __init__(self, model, config, n_tokens, context, n_round, backend, offload):
        self.model, self.n_round, m = model, n_round, model.config
        self.token = torch.zeros(1, dtype=torch.int64, device=model.device)
        self.decoder = decoder = SparseDecoder(config, model, predictor(), context, backend, offload)
        torch.manual_seed(0)
        kv = torch.randn(2, m.n_kv_heads, n_tokens, m.head_dim, device=model.device).to(model.kv_dtype)
        decoder.begin_prompt(torch.randint(m.vocab_size, (n_tokens,), device=model.device))
        for layer in range(m.n_layers):
            decoder.cache.write_prompt(layer, 0, *kv)  # (Hk, T, D) each
        queries = decoder.prompt_queries  # (L, Hq, rows, D)
        queries.copy_(torch.randn_like(queries[:, :, :1]))  # one query makes all rows
        decoder.n_tokens = n_tokens
        decoder.end_prompt()

    def step(self):
        """Decode a token and return the one before, which the host reads after the launch, as in `generate`."""
        value = attnpred.read_later(self.token)
        self.token = attnpred.sample(self.decoder.decode(self.token))[0]
        return value()[0]

    def round(self):
        return [self.step() for _ in range(self.n_round)]

    def weight_bytes(self):
        four_bits = [part for part in self.model.modules() if isinstance(part, FourBitLinear)]
        widened = sum(part.blocks.shape[:2].numel() * 32 for part in four_bits) * self.model.dtype.itemsize
        kept = sum(part.packed.nbytes + part.scales.nbytes for part in four_bits)
        return roofline.weight_bytes(self.model.config, self.model.dtype.itemsize) - widened + kept

    def kv_bytes(self):
        return self.decoder.stats.read_bytes / (self.decoder.n_tokens - self.decoder.stats.prefill_tokens)


def as_transformers(model):
    """transformers' LlamaForCausalLM with the model's weights, which are not copied."""
    import transformers

    m = model.config
    rope = (m.rope_scaling or {"rope_type": "default"}) | {"rope_theta": m.rope_theta}
    config = transformers.LlamaConfig(
        hidden_size=m.d_model, intermediate_size=m.d_ff, num_hidden_layers=m.n_layers, num_attention_heads=m.n_heads,
        num_key_value_heads=m.n_kv_heads, head_dim=m.head_dim, vocab_size=m.vocab_size, rms_norm_eps=m.rms_eps,
        max_position_embeddings=m.context_len, tie_word_embeddings=m.tie_embeddings, rope_parameters=rope,
        attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config)
    weights = {name: part.data for name, part in checkpoint_targets(model).items()}
    theirs.load_state_dict(weights, assign=True, strict=not m.tie_embeddings)
    theirs.tie_weights()
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config).to(model.device)
    return theirs.eval()


class Transformers:
    """transformers' model with its default cache, which has random K and V."""

    def __init__(self, model, n_tokens, n_round):
        from transformers import DynamicCache

        self.model, self.n_round, m = as_transformers(model), n_round, model.config
        self.weight_bytes = partial(roofline.weight_bytes, m, model.dtype.itemsize)
        self.cache = DynamicCache(config=self.model.config)
        torch.manual_seed(0)  # the same K and V as in `Ours`
        kv = torch.randn(2, 1, m.n_kv_heads, n_tokens, m.head_dim, device=model.device).to(model.dtype)
        for layer in range(m.n_layers):
            self.cache.update(*kv, layer)  # (1, Hk, T, D) each
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)

    @torch.inference_mode()
    def step(self):
        logits = self.model(self.token, past_key_values=self.cache, use_cache=True).logits  # (1, 1, V)
        value, self.token = self.token.item(), logits[:, -1].argmax(-1, keepdim=True)
        return value

    def round(self):
        return [self.step() for _ in range(self.n_round)]

    def kv_bytes(self):
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


class Adapter(Ours):
    """transformers' model with transformers_adapter.py: its cache has the decoder of `Ours`."""

    def __init__(self, model, config, n_tokens, context, n_round, backend):
        from experiments.transformers_adapter import SparseCache, attach

        shape = SimpleNamespace(config=model.config, device=model.device, kv_dtype=model.dtype)
        super().__init__(shape, config, n_tokens, context, n_round, backend, False)
        self.theirs = as_transformers(model)
        attach(self.theirs, predictor(), **vars(config))
        self.cache = SparseCache(self.theirs, context)
        self.cache.decoder, self.cache.n_tokens = self.decoder, n_tokens
        self.cache.shape = model.config.n_heads, model.config.n_kv_heads, model.config.head_dim, model.device

    def weight_bytes(self):
        return roofline.weight_bytes(self.model.config, self.theirs.dtype.itemsize)

    @torch.inference_mode()
    def step(self):
        logits = self.theirs(self.token[None], cache=self.cache, use_cache=True).logits  # (1, 1, V)
        value, self.token = self.token.item(), logits[0, -1].argmax(-1, keepdim=True)
        return value


def contender_of(name, model, config, context, args):
    """Returns a function that makes the contender of that name. Raises InputError if the context is too short.

    A round of sparse decoding is an interval, so that its mean includes a calibration and a selection. The last round
    ends at the context's last token.
    """
    setting, offload = CONTENDERS[name]
    c = setting(config)
    n_round = min(8, c.interval(context)) if c.fits(context) else c.interval(context)
    n_steps = (args.rounds + 2) * n_round  # a round to warm up, the rounds, and one for the stages or a trace
    if context <= n_steps:
        raise InputError(f"{n_steps} tokens are decoded at {context}: use longer --contexts or fewer --rounds")
    if name == "transformers":
        return partial(Transformers, model, context - n_steps, n_round)
    if name == "adapter":
        return partial(Adapter, model, c, context - n_steps, context, n_round, args.backend)
    return partial(Ours, model, c, context - n_steps, context, n_round, args.backend, offload)


def race(makers, rounds, device):
    """Time contenders in turn. makers is {(dtype, name): a function that makes one}; `round` returns a list of tokens.

    Returns a row for each contender: {"dtype", "name", "rounds": [ms per token], "ms": their median, "answer": the
    tokens of the first round, "contender", and of a GPU "memory_mb": allocated at the peak of the first round}.
    Contenders that run out of memory, or fail in another way, are left out.
    """

    def warmed_up(make):
        if on_gpu := device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        contender = make()
        row = dict(contender=contender, answer=contender.round(), rounds=[])
        return row | dict(memory_mb=1e-6 * (torch.cuda.max_memory_allocated() - before)) if on_gpu else row

    rows = []
    for (dtype, name), make in makers.items():
        try:
            rows.append(warmed_up(make) | dict(dtype=dtype, name=name))
            continue
        except Exception as error:
            print(f"bench: {name}, {dtype}: {reason(error)}, left out", file=sys.stderr)
        torch.cuda.empty_cache()  # outside of the except clause, whose exception refers to the contender
    for row in rows * rounds:  # in each round, all contenders take turns
        begun = time.perf_counter()
        tokens = row["contender"].round()
        row["rounds"].append(1e3 * (time.perf_counter() - begun) / len(tokens))
    return [row | dict(ms=statistics.median(row["rounds"])) for row in rows]


STAGES = {  # name: a method of the decoder, or of its cache
    "echoes": "advance",
    "attention": "cache.attend",
    "calibration": "calibrate",
    "prediction": "scores",
    "selection": "choose",
    "block table": "cache.select",
}


def stage_ms(contender):
    """{stage: ms per token} of a round of an `Ours` on a CPU. The stages are disjoint: none calls another."""
    spent = dict.fromkeys(STAGES, 0.0)

    def timed(original, stage):
        def call(*args, **kwargs):
            begun = time.perf_counter()
            result = original(*args, **kwargs)
            spent[stage] += time.perf_counter() - begun
            return result

        return call

    with ExitStack() as patches:
        for stage, method in STAGES.items():
            owner = contender.decoder.cache if method.startswith("cache.") else contender.decoder
            name = method.removeprefix("cache.")
            patches.enter_context(patch.object(owner, name, timed(getattr(owner, name), stage)))
        begun = time.perf_counter()
        tokens = contender.round()
        spent["rest of the model"] = time.perf_counter() - begun - sum(spent.values())
    return {stage: 1e3 * took / len(tokens) for stage, took in spent.items()}


def speed_rows(args, models, config, bandwidth):
    """Yield a row per context, dtype and contender. models: {name of a dtype: model}; bandwidth: a copy's, bytes/s."""
    device = next(iter(models.values())).device
    names = sorted(args.contenders, key=lambda name: name != "dense")  # first what the others are compared with
    keys = [(dtype, name) for dtype in models for name in names]
    for dtype, name in keys if args.backend == "torch" else ():
        contender_of(name, models[dtype], config, min(args.contexts), args)().step()  # libraries allocate at first
    for context in args.contexts:
        makers = {(dtype, name): contender_of(name, models[dtype], config, context, args) for dtype, name in keys}
        # A CPU's speed drifts, so all contenders take turns. A GPU's memory has room for one at a time.
        groups = [makers] if device.type == "cpu" else [{key: makers[key]} for key in keys]
        done = []
        for row in (row for group in groups for row in race(group, args.rounds, device)):
            contender = row.pop("contender")
            row["bytes"] = contender.weight_bytes() + contender.kv_bytes()
            row |= dict(context=context, tokens_s=1e3 / row["ms"], gb_s=1e-6 * row["bytes"] / row["ms"])
            row["of_copy"] = 1e9 * row["gb_s"] / bandwidth
            if row["name"] in ("sparse", "adapter") and args.backend == "torch":
                row["stages"] = stage_ms(contender)
            done.append(row)
            del contender
            same_weights = {other["name"]: other for other in done if other["dtype"] == row["dtype"]}
            if base := same_weights.get("dense"):
                pairs = zip(base["rounds"], row["rounds"])
                row["speedup"] = statistics.median(dense_ms / ms for dense_ms, ms in pairs)
            same = next(name for name, other in same_weights.items() if other["answer"] == row["answer"])
            if same != row["name"]:
                row["same_as"] = same
            print("bench: {name}, {dtype}, {context} tokens: {ms:.1f} ms".format(**row), file=sys.stderr)
            yield row


SPEED_COLUMNS = {
    "context": "{context:,}",
    "weights": "{dtype}",
    "": "{name}",
    "ms per token": "{ms:,.1f}",
    "tokens/s": "{tokens_s:,.1f}",
    "against dense": "{speedup:.2f}x",
    "GB/s read (of a copy's)": "{gb_s:,.1f} ({of_copy:.0%})",
    "peak memory beside weights, MB": "{memory_mb:,.0f}",
    "same tokens as": "{same_as}",
}


def write_trace(make, path):
    """Write a profiler's trace of a contender's second round, for https://ui.perfetto.dev. Raises InputError."""
    contender = make()
    contender.round()
    with torch.profiler.profile() as profiled:
        contender.round()
    if contender.model.device.type == "cuda" and not any(e.device_time_total for e in profiled.key_averages()):
        raise InputError("the profiler saw nothing on the GPU: it needs CUPTI and permission to use it")
    profiled.export_chrome_trace(str(path))


def bench_speed(args, config, device):
    """measure ms per token of several ways to decode, and peak memory"""
    models, bandwidth = models_of(args, device), ceilings(torch.float32, device, n=64)["copy"]
    rows = collect(speed_rows(args, models, config, bandwidth), SPEED_COLUMNS, args)
    print(f"A copy moves {bandwidth / 1e9:,.1f} GB/s, read plus written.\n")
    if timed := [row for row in rows if "stages" in row]:
        stages = [stage for stage in timed[0]["stages"] if any(row["stages"][stage] for row in timed)]
        columns = {head: SPEED_COLUMNS[head] for head in ("context", "weights", "")}
        show(timed, columns | {f"{stage}, ms": f"{{stages[{stage}]:,.2f}}" for stage in stages})
    if args.trace:
        model, context = models[args.dtypes[-1]], args.contexts[-1]
        write_trace(contender_of(args.contenders[-1], model, config, context, args), args.trace)


def bench_prefill(args, config, device):
    """measure tokens per second through a prompt, and peak memory"""

    def ours(model, tokens):
        decoder = SparseDecoder(config, model, predictor(), len(tokens), args.backend)
        return [decoder.prefill(tokens).argmax().item()]

    @torch.inference_mode()
    def theirs(model, tokens):
        return [model(tokens[None], use_cache=True, logits_to_keep=1).logits[0, -1].argmax().item()]

    readers = {}
    for dtype, model in models_of(args, device).items():
        readers[dtype, "ours"] = partial(ours, model)
        readers[dtype, "transformers"] = partial(theirs, as_transformers(model))

    def rows():
        for context in args.contexts:
            tokens = torch.randint(model.config.vocab_size, (context,), device=device)
            for read in readers.values():
                read(tokens[:128])  # libraries allocate at first
            makers = {key: partial(SimpleNamespace, round=partial(read, tokens)) for key, read in readers.items()}
            for row in race(makers, args.rounds, device):  # a round reads the whole prompt
                del row["contender"]
                yield row | dict(context=context, tokens_s=1e3 * context / min(row["rounds"]))

    columns = {head: SPEED_COLUMNS[head] for head in ("context", "weights", "")}
    columns |= {"tokens/s, fastest round": SPEED_COLUMNS["tokens/s"]}
    collect(rows(), columns | {head: SPEED_COLUMNS[head] for head in ("peak memory beside weights, MB",)}, args)


# --------------------------------------------------------------------------------------------------------------------
# kernels
# --------------------------------------------------------------------------------------------------------------------


def kernel_row(path, context, device, ceilings_found):
    """Time a tuple of hot_paths.py and its rivals. Returns a row with rates and their shares of the ceilings."""
    name, moved, multiply_adds, call, rivals = path
    print(f"bench: {name}, {context} tokens", file=sys.stderr)
    took, others = seconds(call, device), {}
    for rival, other in rivals.items():
        try:
            others[rival] = seconds(other, device, graph=not name.startswith("copy"))  # such a rival waits for the host
        except Exception as error:
            print(f"bench: {rival}: {reason(error)}, left out", file=sys.stderr)
    copy = ceilings_found["host copy" if name.startswith("copy") else "copy"]
    matmul = ceilings_found["matmul tf32" if name.startswith("predict") else "matmul"]
    row = dict(path=name, context=context, us=1e6 * took, gb_s=1e-9 * moved / took, of_copy=moved / took / copy)
    row |= dict(tflop_s=2e-12 * multiply_adds / took, of_matmul=multiply_adds / took / matmul)
    return row | dict(rivals="; ".join(f"{rival} {1e6 * t:,.1f} ({t / took:.1f}x)" for rival, t in others.items()))


KERNEL_COLUMNS = {
    "path": "{path}",
    "context": "{context:,}",
    "µs": "{us:,.1f}",
    "GB/s (of copy)": "{gb_s:,.1f} ({of_copy:.0%})",
    "TFLOP/s (of matmul)": "{tflop_s:.3g} ({of_matmul:.0%})",
    "rivals, µs": "{rivals}",
}


def bench_kernels(args, config, device):
    """compare each hot path with PyTorch and with the machine's ceilings"""
    if any(context % config.block_size or config.fits(context) for context in args.contexts):
        raise InputError(f"--contexts must be multiples of {config.block_size} and longer than the budget")
    torch.set_float32_matmul_precision("high")
    dtype, sizes = (torch.bfloat16, ()) if device.type == "cuda" else (torch.float32, (1 << 26, 1024))
    ceilings_found = ceilings(dtype, device, *sizes)
    rates = {name: rate / 1e9 for name, rate in ceilings_found.items()}
    print(
        f"copy {rates['copy']:,.0f} GB/s, host to device {rates['host copy']:,.0f} GB/s, matrix product "
        f"{2e-3 * rates['matmul']:,.1f} TFLOP/s, of float32 {2e-3 * rates['matmul tf32']:,.1f} (a GPU uses tf32)\n"
    )

    def rows():
        for context, paths in itertools.product(args.contexts, PATHS):
            try:
                for path in paths(shape_of(args.model_shape), config, context, dtype, device, args.backend):
                    yield kernel_row(path, context, device, ceilings_found)
            except Exception as error:
                print(f"bench: {paths.__name__}, {context} tokens: {reason(error)}, left out", file=sys.stderr)

    collect(rows(), KERNEL_COLUMNS, args)


# --------------------------------------------------------------------------------------------------------------------
# offload, bytes, launches
# --------------------------------------------------------------------------------------------------------------------


def bench_offload(args, config, device):
    """count bytes over the link, on API documentation and on prose"""
    from experiments.evaluate import read_text

    if config.fits(TEXT_TOKENS):
        raise InputError(f"--budget {config.budget} covers the {TEXT_TOKENS:,} tokens counted: use a smaller one")
    (model, tokenizer), rows = load_model(str(fetch_default_llm()), torch.bfloat16, device), []
    for name, what in TEXTS.items():
        ids = tokenizer.encode(read_text(name), control_tokens=False)
        tokens = torch.tensor(ids[: TEXT_TOKENS + TEXT_STEPS], device=model.device)
        assert len(tokens) == TEXT_TOKENS + TEXT_STEPS, f"{name} is too short"
        decoder = SparseDecoder(config, model, predictor(), len(tokens), "torch", offload=True)
        decoder.prefill(tokens[:TEXT_TOKENS])
        cache = decoder.cache
        cache.fetched.zero_()
        cache.selected = 0
        for token in tokens[TEXT_TOKENS:].split(1):
            decoder.decode(token)
        counts = {"selected": cache.selected, "of these copied": cache.fetched, "echoes": cache.echoes.sum()}
        counts |= {"of the echoes copied": cache.echoes_fetched, "written back": cache.written_back}
        mb = 1e-6 * cache.slots[0].nbytes / TEXT_STEPS
        rows.append({"text": what} | {f"{kind}, MB": f"{int(count) * mb:,.3f}" for kind, count in counts.items()})
    whole = 2e-6 * decoder.key_bytes * len(tokens)
    print(f"Per token of the {TEXT_STEPS} after {TEXT_TOKENS:,}, SmolLM2-135M-Instruct, budget {config.budget}.")
    print(f"The device has {cache.slots.nbytes / 1e6:,.2f} MB of KV slots; the whole cache is {whole:,.2f} MB.\n")
    show(rows)


def bench_bytes(args, config, device):
    """count bytes read per token"""
    print(f"Bytes read per token, {args.model_shape} in 16 bits, budget {config.budget}\n")
    rows = []
    for context in args.contexts:
        reads = roofline.bytes_per_token(shape_of(args.model_shape), config, context)
        row = {f"{kind}, MB": f"{1e-6 * amount:,.1f}" for kind, amount in reads.items()}
        rows.append({"context": f"{context:,}"} | row | {"dense / total": f"{reads['dense'] / reads['total']:.1f}x"})
    show(rows)


def bench_launches(args, config, device):
    """count launches per token"""
    print(f"Launches per token, sampling included, without a CUDA graph: {args.model_shape}, budget {config.budget}\n")
    model, rows = Llama(shape_of(args.model_shape), torch.bfloat16, "meta"), []
    for context, name in ((context, name) for context in args.contexts for name in ("resident", "offloaded")):
        steps = config.interval(context)
        decoder, counts = roofline.decode(model, config, context, steps, name == "offloaded")
        tokens = Counter((len(one.launches), one.operations.total(), one.link_bytes) for one in counts[-steps:])
        for (triton, operations, link), count in tokens.most_common():
            row = {"context": f"{context:,}", "cache": name, "tokens": f"{count} of {steps}", "Triton": f"{triton:,}"}
            row |= {"PyTorch": f"{operations:,}", "launches": f"{triton + operations:,}"}
            row |= {"MB over the link, selected blocks and echoes apart": f"{1e-6 * link:,.2f}"}
            on_device = sum(part.nbytes for part in decoder.cache.blocks)
            rows.append(row | {"KV on the device, MB": f"{1e-6 * on_device:,.0f}"})
    show(rows)


# --------------------------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------------------------

LONG = (8192, 32768, 131072)


def output_file(suffix, text):
    """An argparse type: a path that can be written. It is checked before the measurement, not after it."""
    path = pathlib.Path(text)
    if path.suffix != suffix or path.is_dir() or not os.access(path.parent, os.W_OK):
        error = f"cannot write {text}: give a file name ending in {suffix}, in a folder that exists"
        raise argparse.ArgumentTypeError(error)
    return path


def make_parser():
    parser = OneLineParser(prog="bench", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    gpu, json_file = torch.cuda.is_available(), partial(output_file, ".json")
    measured = "llama-3.1-8b" if gpu else "smollm2-135m"
    for command, contexts, shape in (
        (bench_speed, LONG if gpu else (128, 1024, 4096, 8192), measured),
        (bench_prefill, (2048, 8192), measured),
        (bench_kernels, LONG if gpu else LONG[:1], measured),
        (bench_offload, LONG, "llama-3.1-8b"),
        (bench_bytes, LONG, "llama-3.1-8b"),
        (bench_launches, LONG[-1:], "llama-3.1-8b"),
    ):
        name = command.__name__.removeprefix("bench_")
        sub = commands.add_parser(name, help=command.__doc__)
        sub.set_defaults(device="auto", dtype="auto", backend="auto")
        sub.set_defaults(bench=command, rounds=1, out=None, contenders=["transformers"])
        add = sub.add_argument
        add("--contexts", type=int, nargs="+", default=contexts, metavar="TOKENS", help="context lengths")
        add("--model-shape", choices=SHAPES, default=shape, help="smollm2-135m has its weights, others random ones")
        if name in ("speed", "prefill", "kernels"):
            add("--out", type=json_file, metavar="FILE.json", help="write all numbers to this file")
            add("--backend", choices=("auto", "triton", "torch"), help="auto: triton on a GPU, else torch")
        if name in ("speed", "prefill"):
            dtypes = ["float32", "bfloat16"]
            add("--dtypes", nargs="+", default=dtypes[gpu:], choices=dtypes, help="dtypes of the weights")
            add("--rounds", type=int, default=7, help="rounds, in which all contenders take turns")
        if name == "speed":
            names, default = ", ".join(CONTENDERS), ON_GPU if gpu else ON_CPU
            add("--contenders", nargs="+", default=default, choices=CONTENDERS, metavar="NAME", help=names)
            add("--trace", type=json_file, metavar="FILE.json", help="trace the last contender")
        attnpred.add_method_options(sub)
    return parser


def run(args):
    if min(args.contexts) < 128 or args.rounds < 1:
        raise InputError("--contexts must be at least 128 tokens, and --rounds at least 1")
    device, _, args.backend = attnpred.choose_device(args)
    config = attnpred.config_of(args)
    args.setup = conditions(args, config, device)
    args.bench(args, config, device)
    if args.command in ("speed", "prefill", "kernels"):
        print("{device}, {threads} threads, {weights}, budget {config[budget]}".format(**args.setup))


def main(argv=None) -> int:
    return attnpred.exit_status("bench", lambda: run(make_parser().parse_args(argv)))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # at a time limit, too, the table is printed
    sys.exit(main())
