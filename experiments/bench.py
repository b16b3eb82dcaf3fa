"""How fast: decoding end to end, and each kernel; what a token launches, reads, and sends over the link to the host.

    python -m experiments.bench speed      ms per token of several ways to decode, and peak memory
    python -m experiments.bench kernels    each hot path against PyTorch and against the machine's ceilings
    python -m experiments.bench offload    bytes over the link, counted on a text, and a model of time
    python -m experiments.bench bytes      bytes read per token
    python -m experiments.bench launches   launches per token

Each prints its tables and writes all numbers with --out FILE.json. The first two measure; a long context's keys, values
and history are random numbers, because a step's time does not depend on them. The ceilings are measured, too: a copy on
the device, a matrix product, a copy from pinned host memory. The others count, on tensors that have no memory
(experiments/roofline.py).
"""

import ctypes
import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import statistics
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pandas as pd
import torch
import torch.nn.functional as F

import attnpred
import kernels
from attnpred import Config, InputError, KVCache, OneLineParser, SparseDecoder, decode_one_token, prefill
from experiments import roofline
from experiments.hot_paths import PATHS
from experiments.tables import markdown
from model import Llama, LlamaConfig, checkpoint_targets, load_model
from weights.fetch_llm import fetch_default_llm

TEXT = pathlib.Path(kernels.__file__)  # a long text for counting what a selection fetches
TOY = replace(
    roofline.LLAMA_31_8B, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=16, d_model=32, d_ff=48, vocab_size=64
)
SHAPES = {"smollm2-135m": None, "llama-3.1-8b": roofline.LLAMA_31_8B, "toy": TOY}

# --------------------------------------------------------------------------------------------------------------------
# Models, measuring and printing
# --------------------------------------------------------------------------------------------------------------------


def shape_of(name) -> LlamaConfig:
    config = pathlib.Path(fetch_default_llm()) / "config.json" if SHAPES[name] is None else None
    return SHAPES[name] or LlamaConfig.from_json(json.loads(config.read_text()))


def model_of(name, dtype, device):
    """(model, what its weights are)."""
    if SHAPES[name] is None:
        return load_model(str(fetch_default_llm()), dtype, device)[0], "SmolLM2-135M-Instruct"
    model = Llama(SHAPES[name], dtype, device)
    for parameter_name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if parameter_name.endswith("norm.weight") else 0.0, 0.02)
    return model.eval(), f"random weights in the shape of {name}"


def paper(config):
    """The paper's setting with the same blocks, history and budget."""
    same = ("block_size", "history_len", "sink_tokens", "local_tokens", "budget")
    return Config.paper(**{name: getattr(config, name) for name in same})


def show(rows, columns):
    """Print dicts as a table, and return them; `columns` maps a header to a format, missing numbers are dashes."""

    def cell(form, row):
        try:
            return form.format(**{key: value for key, value in row.items() if value is not None})
        except KeyError:
            return None

    rows = list(rows)
    print(markdown(pd.DataFrame([{head: cell(form, row) for head, form in columns.items()} for row in rows])) + "\n")
    return rows


def seconds(call, device):
    """The median time of a call: on a GPU with a cold L2 cache."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return 1e-3 * do_bench(call, return_mode="median")
    from torch.utils.benchmark import Timer

    return Timer("call()", globals=dict(call=call), num_threads=torch.get_num_threads()).blocked_autorange().median


def ceilings(dtype, device, size=1 << 28, n=4096):
    """Bytes / s of a copy on the device (read plus written) and from pinned host memory, multiply-adds / s of an n x n
    matrix product."""
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    x, y = torch.ones(2, size, dtype=torch.uint8, device=device)
    found = {"copy": 2 * size / seconds(lambda: y.copy_(x), device)}
    found["host copy"] = size / seconds(lambda: y.copy_(host, non_blocking=True), device)
    for name, kind in (("matmul", dtype), ("matmul tf32", torch.float32)):
        x = torch.randn(n, n, device=device).to(kind)
        found[name] = n**3 / seconds(lambda x=x: x @ x, device)
    return found


def machine(device):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return dict(device=name, threads=torch.get_num_threads(), torch=torch.__version__)


def with_peak_memory(call, device):
    """call()'s result, and the bytes allocated at the peak above those before; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return call(), torch.cuda.max_memory_allocated() - before

    def resident(key):
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))

    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps would hide new allocations
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        before = resident("VmRSS")
    except (OSError, AttributeError):  # not Linux, or not glibc
        return call(), None
    return call(), resident("VmHWM") - before


# --------------------------------------------------------------------------------------------------------------------
# speed
# --------------------------------------------------------------------------------------------------------------------


class StreamedCache(KVCache):
    """All K and V in host memory, copied to the device layer by layer for every token: offloading without selection."""

    def __init__(self, decoder):
        c, m, device = decoder.config, decoder.model_config, decoder.history.device
        capacity_tokens, dtype = decoder.capacity * c.block_size, decoder.queries.dtype
        super().__init__(c, m, decoder.heads, capacity_tokens, dtype, "cpu", "torch", n_layers=0)
        shape = 2, m.n_layers, m.n_kv_heads, self.capacity, c.block_size, m.head_dim
        self.kv = attnpred.host_memory(shape, dtype, device, self)
        self.k, self.v = self.kv
        self.staging = torch.empty_like(self.kv[:, 0], device=device)  # (2, Hk, capacity, b, D)

    def attend_all(self, layer, q):
        n_blocks = -(-self.n_tokens // self.block_size)
        self.staging[:, :, :n_blocks].copy_(self.kv[:, layer, :, :n_blocks], non_blocking=True)
        k, v = self.staging.flatten(2, 3)[:, None, :, : self.n_tokens]  # (1, Hk, T, D) each
        return F.scaled_dot_product_attention(q.unflatten(0, (self.n_kv_heads, -1))[None], k, v)[0].flatten(0, 1)


class Ours:
    """A SparseDecoder with a random cache; `step` decodes a token. `words` say how: see CONTENDERS."""

    def __init__(self, words, model, predictor, config, n_tokens, n_steps, backend):
        self.model = model
        offload, graph = "offloaded" in words, not {"no graph", "streamed"} & set(words)
        self.decoder = SparseDecoder(config, model, predictor, n_tokens + n_steps, backend, offload, graph)
        if "streamed" in words:
            self.decoder.cache = StreamedCache(self.decoder)
        self.fill(n_tokens)
        self.token = torch.zeros(1, dtype=torch.int64, device=model.device)
        self.weight_bytes = roofline.weight_bytes(model.config, model.dtype.itemsize)

    @torch.inference_mode()
    def fill(self, n_tokens):
        """Random K, V and history in place of a prompt. Blocks that attract attention go on attracting it."""
        decoder, m = self.decoder, self.model.config
        torch.manual_seed(0)
        decoder.begin_prompt(n_tokens)
        for layer in range(m.n_layers):
            k, v = torch.randn(2, m.n_kv_heads, n_tokens, m.head_dim, device=self.model.device).to(self.model.kv_dtype)
            decoder.cache.write_prompt(layer, k, v)  # (Hk, T, D) each
        rows = decoder.history[..., : decoder.config.n_blocks(n_tokens)]  # (L', heads, H, N)
        rows.uniform_(0.5, 1).mul_(torch.rand_like(rows[:, :, :1]) ** 8)
        decoder.queries.normal_()
        decoder.fits = not decoder.sparse_layers or decoder.config.fits(n_tokens + 1)  # False: keep this history
        decoder.finish_token()

    def step(self):
        """Returns the token that it follows: as in `generate`, the host reads it after launching the next step."""
        value = attnpred.read_later(self.token)
        self.token = attnpred.sample(decode_one_token(self.model, self.decoder, self.token))
        return value()

    def bytes_per_token(self):
        return self.weight_bytes + self.decoder.stats.read_bytes / self.decoder.step


class Transformers:
    """The same weights, not copied, in transformers' LlamaForCausalLM, with its default cache, random too."""

    def __init__(self, model, n_tokens):
        import transformers

        m, device = model.config, model.device
        config = transformers.LlamaConfig(
            hidden_size=m.d_model,
            intermediate_size=m.d_ff,
            num_hidden_layers=m.n_layers,
            num_attention_heads=m.n_heads,
            num_key_value_heads=m.n_kv_heads,
            head_dim=m.head_dim,
            vocab_size=m.vocab_size,
            max_position_embeddings=m.context_len,
            rms_norm_eps=m.rms_eps,
            rope_parameters=(m.rope_scaling or {"rope_type": "default"}) | {"rope_theta": m.rope_theta},
            tie_word_embeddings=m.tie_embeddings,
            attn_implementation="sdpa",
        )
        with torch.device("meta"):
            self.model = transformers.LlamaForCausalLM(config)
        weights = {name: part.data for name, part in checkpoint_targets(model).items()}
        self.model.load_state_dict(weights, assign=True, strict=not m.tie_embeddings)
        self.model.tie_weights()
        self.model.model.rotary_emb = type(self.model.model.rotary_emb)(config).to(device)
        self.model.eval()
        self.cache = transformers.DynamicCache(config=config)
        for layer in range(m.n_layers):
            kv = torch.randn(2, 1, m.n_kv_heads, n_tokens, m.head_dim, device=device).to(model.dtype)
            self.cache.update(*kv, layer)  # (1, Hk, T, D) each
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.m, self.itemsize = m, model.dtype.itemsize

    @torch.inference_mode()
    def step(self):
        logits = self.model(self.token, past_key_values=self.cache, use_cache=True).logits  # (1, 1, V)
        self.token = logits[:, -1].argmax(-1, keepdim=True)
        return self.token.item()

    def bytes_per_token(self):
        kv = 2 * self.m.n_layers * self.m.n_kv_heads * self.cache.get_seq_length() * self.m.head_dim
        return roofline.weight_bytes(self.m, self.itemsize) + kv * self.itemsize


SETTINGS = {"dense": lambda c: replace(c, dense_layers=10**6), "sparse": lambda c: c, "sparse --paper": paper}
HOW = ("offloaded", "late", "streamed", "no graph")  # late: selections as of an offloaded cache
CONTENDERS = ("dense", "sparse", "sparse --paper", "transformers")
ON_GPU = ("dense", "dense, streamed", "sparse", "sparse, no graph")
ON_GPU += ("sparse, late", "sparse, offloaded", "sparse, offloaded, no graph")


def contender_of(name, model, predictor, config, context, rounds, backend):
    """(a function that makes the contender of that name, tokens that it decodes in a round).

    A round of sparse decoding is whole intervals of selection and calibration, so that its mean pays for both. The last
    of all rounds ends at the context.
    """
    setting, *words = name.split(", ")
    if name != "transformers" and (setting not in SETTINGS or set(words) - set(HOW)):
        raise InputError(f"unknown contender {name}: use transformers, or {', '.join(SETTINGS)} with {', '.join(HOW)}")
    c = SETTINGS.get(setting, SETTINGS["dense"])(config)
    c = roofline.offloaded(c) if {"offloaded", "late"} & set(words) else c
    tokens = roofline.intervals(c, context)
    tokens = tokens if c.dense_layers < model.config.n_layers else min(8, tokens)
    n_steps = (rounds + 2) * tokens  # warming up, the rounds, and the stages or a trace
    if context <= n_steps:
        raise InputError(f"{n_steps} tokens are decoded at {context}: use longer --contexts or fewer --rounds")
    if name == "transformers":
        return partial(Transformers, model, context - n_steps), tokens
    return partial(Ours, words, model, predictor, c, context - n_steps, n_steps, backend), tokens


def race(contenders, rounds, device):
    """Decode in turns. contenders: {name: (make, tokens in each round)}, as from `contender_of`.

    Returns {name: {"rounds": [ms per token], "ms": their median, "memory": peak bytes, "answer": the first tokens,
    "contender"}}.
    """

    def warmed_up(make, tokens):
        contender = make()
        return contender, [contender.step() for _ in range(tokens)]

    rows = {}
    for name, (make, tokens) in contenders.items():
        try:
            (contender, answer), memory = with_peak_memory(partial(warmed_up, make, tokens), device)
            rows[name] = dict(contender=contender, answer=answer, memory=memory, rounds=[])
            continue
        except torch.OutOfMemoryError:
            print(f"bench: {name}: out of memory, left out", file=sys.stderr)
        torch.cuda.empty_cache()  # not above: the exception would keep the contender alive
    for _ in range(rounds):
        for name, row in rows.items():
            begun, tokens = time.perf_counter(), contenders[name][1]
            for _ in range(tokens):
                row["contender"].step()
            row["rounds"].append(1e3 * (time.perf_counter() - begun) / tokens)
    return {name: row | dict(ms=statistics.median(row["rounds"])) for name, row in rows.items()}


STAGES = dict(attend="attention", attend_all="attention", select="gathering", write_rows="history rows")
STAGES |= dict(pool="calibration", scores="prediction", choose="selection")


def stage_ms(contender, n_steps):
    """{stage: ms per token} of an `Ours` on a CPU; a stage does not count others that it calls."""
    spent = dict.fromkeys([*STAGES.values(), "rest of the model"], 0.0)

    def timed(original, stage):
        def call(*args, **kwargs):
            begun, before = time.perf_counter(), sum(spent.values())
            result = original(*args, **kwargs)
            spent[stage] += time.perf_counter() - begun - (sum(spent.values()) - before)
            return result

        return call

    with ExitStack() as patches:
        for owner in (contender.decoder, contender.decoder.cache):
            for name in STAGES.keys() & set(dir(owner)):
                patches.enter_context(patch.object(owner, name, timed(getattr(owner, name), STAGES[name])))
        step = timed(contender.step, "rest of the model")
        for _ in range(n_steps):
            step()
    return {stage: 1e3 * took / n_steps for stage, took in spent.items()}


def speed_rows(names, models, predictor, config, contexts, rounds, backend, bandwidth):
    """A row per context, dtype and contender, its "contender" included. models: {name of a dtype: model}."""
    device = next(iter(models.values())).device
    for name, model in ((name, model) for model in models.values() for name in names if backend == "torch"):
        contender_of(name, model, predictor, config, 4 * 64, 1, backend)[0]().step()  # a library's first allocations
    for context in contexts:
        contenders = {
            (dtype, name): contender_of(name, model, predictor, config, context, rounds, backend)
            for dtype, model in models.items()
            for name in names
        }
        # a CPU's speed drifts, so all take turns; a GPU's memory holds one of them at a time
        groups = [contenders] if device.type == "cpu" else [{key: value} for key, value in contenders.items()]
        dense, answers = {}, {}
        for group in groups:
            rows = race(group, rounds, device)
            dense |= {dtype: row["rounds"] for (dtype, name), row in rows.items() if name == "dense"}
            for (dtype, name), row in rows.items():
                contender = row["contender"]
                row |= dict(context=context, dtype=dtype, name=name, bytes=contender.bytes_per_token())
                row |= dict(tokens_s=1e3 / row["ms"], gb_s=1e-6 * row["bytes"] / row["ms"])
                row |= dict(least_ms=1e3 * row["bytes"] / bandwidth, memory_mb=row["memory"] and 1e-6 * row["memory"])
                row["of_copy"] = row["least_ms"] / row["ms"]
                if dtype in dense:
                    row["speedup"] = statistics.median(d / t for d, t in zip(dense[dtype], row["rounds"]))
                answers[dtype, name] = row["answer"]
                same = [n for (d, n), answer in answers.items() if (d, answer) == (dtype, row["answer"])]
                row["same_as"] = same[0] if same[0] != name else None
                if name == "sparse" and backend == "torch":
                    row["stages"] = stage_ms(contender, group[dtype, name][1])
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


def trace_of(contender, n_steps, path):
    """Write a profiler's trace of some steps for Perfetto; {stream: [(start, seconds, "copy" or "kernel")]} of it."""
    from torch.profiler import profile

    with profile() as profiled:
        for _ in range(n_steps):
            contender.step()
    profiled.export_chrome_trace(str(path))
    return lanes_of_trace(json.loads(pathlib.Path(path).read_text()), contender.model.device)


def lanes_of_trace(trace, device):
    on_gpu = ("kernel", "gpu_memcpy", "gpu_memset") if device.type == "cuda" else ("cpu_op",)
    events = [event for event in trace["traceEvents"] if event.get("cat") in on_gpu]
    if not events:
        raise InputError("the profiler saw nothing on the GPU: it needs CUPTI and permission to use it")
    origin, lanes = min(event["ts"] for event in events), {}
    for event in events:
        kind = "copy" if kernels._copy_kernel.__name__ in event["name"] or event["cat"] == "gpu_memcpy" else "kernel"
        span = 1e-6 * (event["ts"] - origin), 1e-6 * event["dur"], kind
        lanes.setdefault(f"stream {event['args'].get('stream', event.get('tid'))}", []).append(span)
    return lanes


def bench_speed(args, config, device, backend):
    """ms per token of several ways to decode, and peak memory"""
    models, results = {}, machine(device)
    for dtype in args.dtypes:
        models[dtype], results["weights"] = model_of(args.model_shape, getattr(torch, dtype), device)
    predictor = attnpred.load_predictor(args.predictor)
    bandwidth = ceilings(torch.float32, device, n=64)["copy"]
    longest = models[dtype].config.context_len
    if max(args.contexts) > longest:
        raise InputError(f"the model's context is {longest:,} tokens: --contexts {max(args.contexts)} is too long")
    names = [name for name in args.contenders if name != "transformers" or importlib.util.find_spec("transformers")]
    rows = []
    for row in speed_rows(names, models, predictor, config, args.contexts, args.rounds, backend, bandwidth):
        contender = row.pop("contender")
        print(f"bench: {row['name']}, {row['dtype']}, {row['context']} tokens: {row['ms']:.1f} ms", file=sys.stderr)
        rows.append(row)
    print(
        f"{results['device']}, {results['threads']} threads, {results['weights']}, budget {config.budget}; "
        f"a copy moves {bandwidth / 1e9:,.1f} GB/s, read plus written\n"
    )
    results |= dict(copy_bytes_per_second=bandwidth, rows=show(rows, SPEED_COLUMNS))
    if timed := [row for row in rows if "stages" in row]:
        stages = [stage for stage in timed[0]["stages"] if any(row["stages"][stage] for row in timed)]
        columns = {name: SPEED_COLUMNS[name] for name in ("context", "weights")}
        show(timed, columns | {f"{stage}, ms": f"{{stages[{stage}]:,.2f}}" for stage in stages})
    if args.trace:
        results["timeline"] = trace_of(contender, roofline.intervals(config, args.contexts[-1]), args.trace)
    return results


# --------------------------------------------------------------------------------------------------------------------
# kernels
# --------------------------------------------------------------------------------------------------------------------


def kernel_rows(m, c, contexts, dtype, device, backend, found):
    for context in contexts:
        for name, work, call, rivals in (path for f in PATHS for path in f(m, c, context, dtype, device, backend)):
            print(f"bench: {name}, {context} tokens", file=sys.stderr)
            took, others = (
                seconds(call, device),
                {rival: seconds(rival_call, device) for rival, rival_call in rivals.items()},
            )
            copy = found["host copy" if name.startswith("copy") else "copy"]
            matmul = found["matmul tf32" if name.startswith("predict") else "matmul"]
            row = dict(path=name, context=context, us=1e6 * took, rivals_us={n: 1e6 * t for n, t in others.items()})
            row |= dict(gb_s=1e-9 * work.bytes / took, of_copy=work.bytes / took / copy)
            row |= dict(tflop_s=2e-12 * work.multiply_adds / took, of_matmul=work.multiply_adds / took / matmul)
            yield row | dict(rivals="; ".join(f"{n} {1e6 * t:,.1f} ({t / took:.1f}x)" for n, t in others.items()))


KERNEL_COLUMNS = {
    "path": "{path}",
    "context": "{context:,}",
    "µs": "{us:,.1f}",
    "GB/s (of copy)": "{gb_s:,.1f} ({of_copy:.0%})",
    "TFLOP/s (of matmul)": "{tflop_s:.3g} ({of_matmul:.0%})",
    "rivals, µs": "{rivals}",
}


def bench_kernels(args, config, device, backend):
    """each hot path against PyTorch and against the machine's ceilings"""
    on_gpu, results = device.type == "cuda", machine(device)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    torch.set_float32_matmul_precision("high")
    if any(context % config.block_size or config.fits(context) for context in args.contexts):
        raise InputError(f"--contexts must be multiples of {config.block_size} and longer than the budget")
    found = ceilings(dtype, device, *([] if on_gpu else [1 << 26, 1024]))
    print(
        f"{results['device']}, {results['threads']} threads, shapes of {args.model_shape}, budget {config.budget}; "
        f"copy {found['copy'] / 1e9:,.0f} GB/s, host to device {found['host copy'] / 1e9:,.0f} GB/s, matrix "
        f"product {2e-12 * found['matmul']:,.1f} TFLOP/s ({str(dtype)[6:]}), {2e-12 * found['matmul tf32']:,.1f} "
        f"({'tf32' if on_gpu else 'float32'})\n"
    )
    rows = kernel_rows(shape_of(args.model_shape), config, args.contexts, dtype, device, backend, found)
    return results | dict(ceilings=found, rows=show(rows, KERNEL_COLUMNS))


# --------------------------------------------------------------------------------------------------------------------
# offload, bytes, launches
# --------------------------------------------------------------------------------------------------------------------


def count_link(model, tokenizer, predictor, config, n_prompt, n_steps):
    """What crosses the link while real text is decoded: a row of exact counts, MB per token."""
    tokens = torch.tensor(tokenizer.encode(TEXT.read_text())[: n_prompt + n_steps], device=model.device)
    if len(tokens) < n_prompt + n_steps:
        raise InputError(f"{TEXT.name} has only {len(tokens):,} tokens: lower --text-tokens")
    decoder = SparseDecoder(roofline.offloaded(config), model, predictor, len(tokens), "torch", offload=True)
    prefill(model, decoder, tokens[:n_prompt])
    cache, m = decoder.cache, model.config
    before = int(cache.fetched), cache.selected, cache.written_bytes
    for token in tokens[n_prompt:].split(1):
        decode_one_token(model, decoder, token)
    fetched, selected = int(cache.fetched) - before[0], cache.selected - before[1]
    whole = 2 * m.n_layers * m.n_kv_heads * len(tokens) * m.head_dim * model.kv_dtype.itemsize
    return dict(
        tokens=n_prompt,
        fetched_fraction=fetched / max(1, selected),
        fetched_mb=1e-6 * fetched * cache.block_bytes / n_steps,
        selected_mb=1e-6 * selected * cache.block_bytes / n_steps,
        written_mb=1e-6 * (cache.written_bytes - before[2]) / n_steps,
        whole_mb=1e-6 * whole,
        on_device_mb=1e-6 * cache.device_bytes,
    )


COUNT_COLUMNS = {
    "prompt": "{tokens:,}",
    "selected, MB per token": "{selected_mb:,.3f}",
    "of it fetched": "{fetched_mb:,.3f} ({fetched_fraction:.1%})",
    "written back": "{written_mb:,.3f}",
    "whole cache, MB": "{whole_mb:,.1f}",
    "on the device": "{on_device_mb:,.1f}",
}


def modelled_rows(m, config, contexts, fetched_fraction, **rates):
    """roofline's model of time, by context and way to keep the cache."""
    for context in contexts:
        ways = roofline.strategies(m, config, context, fetched_fraction, **rates)
        slowest, resident = (ways[name][0] for name in ("dense, everything streamed", "sparse, resident"))
        for name, (took, link_bytes) in ways.items():
            row = dict(context=context, name=name, ms=1e3 * took, link_mb=1e-6 * link_bytes)
            yield row | dict(speedup=slowest / took, of_resident=took / resident)


MODEL_COLUMNS = {
    "context": "{context:,}",
    "cache": "{name}",
    "ms per token": "{ms:,.2f}",
    "MB over the link per token": "{link_mb:,.1f}",
    "against everything streamed": "{speedup:.1f}x",
    "time of sparse, resident": "{of_resident:.2f}",
}


def bench_offload(args, config, device, backend):
    """bytes over the link, counted on a text, and a model of time"""
    predictor, results, fraction = attnpred.load_predictor(args.predictor), machine(device), args.fetched_fraction
    if fraction is None:
        model, tokenizer = load_model(str(fetch_default_llm()), torch.bfloat16, device)
        print(f"Counted: SmolLM2-135M-Instruct on {TEXT.name}, {args.text_steps} tokens decoded\n")
        counted = [count_link(model, tokenizer, predictor, config, args.text_tokens, args.text_steps)]
        results["counted"], fraction = show(counted, COUNT_COLUMNS), counted[0]["fetched_fraction"]
    gb_s = dict(memory=args.memory_gb_s, link=args.link_gb_s, host=args.host_gb_s)
    print(
        f"A model, not a measurement: {args.model_shape} in 16 bits, budget {config.budget}, {fraction:.1%} of a "
        f"selection fetched; GB/s: {', '.join(f'{name} {rate:g}' for name, rate in gb_s.items())}\n"
    )
    rates = {name: 1e9 * rate for name, rate in gb_s.items()}
    rows = modelled_rows(shape_of(args.model_shape), config, args.contexts, fraction, **rates)
    return results | dict(gb_s=gb_s, fetched_fraction=fraction, modelled=show(rows, MODEL_COLUMNS))


def bench_bytes(args, config, device, backend):
    """bytes read per token"""
    print(f"Bytes read per token, {args.model_shape} in 16 bits, budget {config.budget}\n")
    m, rows = shape_of(args.model_shape), []
    for context in args.contexts:
        for name, c in {"default": config, "--paper": paper(config)}.items():
            reads = roofline.bytes_per_token(m, c, context)
            megabytes = {f"{kind}_mb": 1e-6 * amount for kind, amount in reads.items()}
            rows.append(dict(context=context, name=name, less=reads["dense"] / reads["total"], **megabytes))
    kinds = ("attention", "calibration", "choosing", "total", "dense")
    columns = {"context": "{context:,}", "setting": "{name}"} | {f"{n}, MB": f"{{{n}_mb:,.1f}}" for n in kinds}
    return dict(rows=show(rows, columns | {"dense / total": "{less:.1f}x"}))


def launch_rows(m, config, contexts):
    """Tokens of one interval of calibration and selection, by what they launch."""
    model = Llama(m, torch.bfloat16, "meta")
    for context in contexts:
        steps = roofline.intervals(config, context)
        for name in ("resident", "offloaded"):
            offload = name == "offloaded"
            c = roofline.offloaded(config) if offload else config
            decoder, counts = roofline.decode(model, c, context, steps, offload)
            kv = decoder.cache.device_bytes if offload else decoder.cache.kv.nbytes
            kinds = Counter(
                (len(token.launches), token.operations.total(), token.link_bytes) for token in counts[-steps:]
            )
            for (triton, operations, link), count in kinds.most_common():
                row = dict(context=context, name=name, tokens=count, of=steps, triton=triton, pytorch=operations)
                yield row | dict(total=triton + operations, link_mb=1e-6 * link, kv_mb=1e-6 * kv)


LAUNCH_COLUMNS = {
    "context": "{context:,}",
    "cache": "{name}",
    "tokens": "{tokens} of {of}",
    "Triton": "{triton:,}",
    "PyTorch": "{pytorch:,}",
    "launches": "{total:,}",
    "MB over the link, selected blocks apart": "{link_mb:,.2f}",
    "KV on the device, MB": "{kv_mb:,.0f}",
}


def bench_launches(args, config, device, backend):
    """launches per token"""
    print(f"Launches per token, sampling included, without a CUDA graph: {args.model_shape}, budget {config.budget}\n")
    return dict(rows=show(launch_rows(shape_of(args.model_shape), config, args.contexts), LAUNCH_COLUMNS))


# --------------------------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------------------------

LONG = (8192, 32768, 131072)


def make_parser():
    parser = OneLineParser(prog="bench", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    gpu = torch.cuda.is_available()
    for command, contexts, shape in (
        (bench_speed, LONG if gpu else (128, 1024, 4096, 8192), "llama-3.1-8b" if gpu else "smollm2-135m"),
        (bench_kernels, LONG if gpu else LONG[:1], "llama-3.1-8b" if gpu else "smollm2-135m"),
        (bench_offload, LONG, "llama-3.1-8b"),
        (bench_bytes, LONG, "llama-3.1-8b"),
        (bench_launches, LONG[1:], "llama-3.1-8b"),
    ):
        name = command.__name__.removeprefix("bench_")
        sub = commands.add_parser(name, help=command.__doc__)
        sub.set_defaults(bench=command)
        sub.add_argument("--out", metavar="FILE.json", help="write all numbers there")
        sub.add_argument("--contexts", type=int, nargs="+", default=contexts, metavar="TOKENS", help="context lengths")
        sub.add_argument("--model-shape", choices=SHAPES, default=shape, help="smollm2-135m, or random weights")
        if name in ("speed", "kernels"):
            backend = "triton" if gpu else "torch"
            sub.add_argument("--backend", choices=("triton", "torch"), default=backend, help="of the kernels")
        if name in ("speed", "offload"):
            sub.add_argument("--predictor", default=attnpred.DEFAULT_PREDICTOR, help="the convolution")
        if name == "speed":
            names, dtypes = ON_GPU if gpu else CONTENDERS, ["bfloat16"] if gpu else ["float32", "bfloat16"]
            how = f"{', '.join(SETTINGS)}, each with any of: {', '.join(HOW)}; or transformers"
            sub.add_argument("--contenders", nargs="+", default=names, metavar="NAME", help=how)
            sub.add_argument("--dtypes", nargs="+", default=dtypes, choices=["float32", "bfloat16"], help="of weights")
            sub.add_argument("--rounds", type=int, default=7, help="the contenders take turns; the median counts")
            sub.add_argument("--trace", metavar="FILE.json", help="trace an interval of the last contender")
        if name == "offload":
            sub.add_argument("--link-gb-s", type=float, default=55.0, help="host to device; 55: PCIe 5 x16")
            sub.add_argument("--memory-gb-s", type=float, default=3350.0, help="of the device; 3350: H100")
            sub.add_argument("--host-gb-s", type=float, default=200.0, help="of host memory")
            sub.add_argument("--fetched-fraction", type=float, help="of a selection (default: counted, default LLM)")
            sub.add_argument("--text-tokens", type=int, default=4096, help="prompt of that count")
            sub.add_argument("--text-steps", type=int, default=64, help="tokens decoded for that count")
        attnpred.add_method_options(sub)
    return parser


def check(args, config):
    for path in filter(None, (args.out, getattr(args, "trace", None))):
        if not os.access(pathlib.Path(path).parent, os.W_OK) or pathlib.Path(path).is_dir():
            raise InputError(f"cannot write {path}: give a file in a folder that exists")
    if min(args.contexts) < 128:
        raise InputError(f"--contexts {min(args.contexts)} is too short: use at least 128 tokens")
    if getattr(args, "rounds", 1) < 1:
        raise InputError(f"--rounds {args.rounds}: use at least 1")
    if args.command == "offload":
        if not all(0 < rate < math.inf for rate in (args.link_gb_s, args.memory_gb_s, args.host_gb_s)):
            raise InputError("--link-gb-s, --memory-gb-s and --host-gb-s must be above 0")
        if args.fetched_fraction is not None and not 0 <= args.fetched_fraction <= 1:
            raise InputError(f"--fetched-fraction {args.fetched_fraction} must lie in 0 ... 1")
        if config.fits(args.text_tokens) or args.text_steps < 1:
            raise InputError("--text-tokens must exceed the budget, and --text-steps be at least 1")


def run(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, backend = attnpred.config_of(args), getattr(args, "backend", None)
    check(args, config)
    try:
        kernels.use_triton(backend or "torch", device)
    except RuntimeError as error:
        raise InputError(str(error)) from None
    results = args.bench(args, config, device, backend)
    if args.out:
        results["config"] = dataclasses.asdict(config)
        attnpred.write_atomically(args.out, lambda path: path.write_text(json.dumps(results, indent=1)))


def main(argv=None) -> int:
    return attnpred.exit_status("bench", lambda: run(make_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
