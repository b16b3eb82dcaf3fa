"""How fast: decoding end to end, the kernels, the offloaded cache; and how many bytes a token reads.

    python -m experiments.bench speed      ms per token, dense, sparse and transformers, and peak memory
    python -m experiments.bench kernels    each hot path against PyTorch and against the machine's ceilings
    python -m experiments.bench offload    bytes over the link to the host, measured times, and a model of time
    python -m experiments.bench bytes      bytes read per token on Llama-3.1-8B's shape

Each prints its table and writes all numbers with --out FILE.json. A long context's keys, values and history are random
numbers, because a step's time does not depend on them; weights are the default LLM's, or random for --model-shape
llama-3.1-8b. The ceilings are measured: a copy on the device, a matrix product, a copy from pinned host memory. The
bytes and multiply-adds compared with them are the lower bounds of experiments/roofline.py.
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
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

import attnpred
import kernels
from attnpred import Config, InputError, KVCache, OneLineParser, SparseDecoder, decode_one_token, prefill
from experiments import roofline
from experiments.hot_paths import PATHS
from model import Llama, LlamaConfig, checkpoint_targets, load_model
from weights.fetch_llm import fetch_default_llm

SHAPES = ("smollm2-135m", "llama-3.1-8b")
TEXT = pathlib.Path(kernels.__file__)  # a long text for counting what a selection fetches

# --------------------------------------------------------------------------------------------------------------------
# Measuring and printing
# --------------------------------------------------------------------------------------------------------------------


def show(rows, columns):
    """Print dicts as a markdown table while they arrive; `columns` maps a header to a row's cell. Returns the rows."""
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    shown = []
    for row in rows:
        print("| " + " | ".join(cell(row) for cell in columns.values()) + " |", flush=True)
        shown.append(row)
    print()
    return shown


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call, device):
    """The median time of a call: on a GPU with a cold L2 cache."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return 1e-3 * do_bench(call, return_mode="median")
    from torch.utils.benchmark import Timer

    return Timer("call()", globals=dict(call=call), num_threads=torch.get_num_threads()).blocked_autorange().median


def copy_bandwidth(device, size=1 << 28):
    """Bytes / s of a copy on the device, read plus written."""
    x, y = torch.ones(2, size, dtype=torch.uint8, device=device)
    return 2 * size / seconds(lambda: y.copy_(x), device)


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
# bytes
# --------------------------------------------------------------------------------------------------------------------


def paper(config):
    """The paper's setting with the same blocks, history and budget."""
    same = ("block_size", "history_len", "sink_tokens", "local_tokens", "budget")
    return Config.paper(**{name: getattr(config, name) for name in same})


def read_rows(m, config, contexts):
    """What a token reads in 16 bits, by context and setting."""
    for context in contexts:
        for name, c in {"default": config, "--paper": paper(config)}.items():
            reads = roofline.token_reads(m, c, context)
            yield dict(context=context, name=name, total=reads.total, **dataclasses.asdict(reads))


READ_COLUMNS = {
    "context": lambda row: f"{row['context']:,}",
    "setting": lambda row: row["name"],
    **{
        f"{name}, MB": (lambda row, name=name: f"{row[name] / 1e6:,.1f}")
        for name in ("attention", "calibration", "choosing", "total", "dense")
    },
    "dense / total": lambda row: f"{row['dense'] / row['total']:.1f}x",
}

# --------------------------------------------------------------------------------------------------------------------
# speed
# --------------------------------------------------------------------------------------------------------------------


def shape_of(name):
    if name == "llama-3.1-8b":
        return roofline.LLAMA_31_8B
    return LlamaConfig.from_json(json.loads((pathlib.Path(fetch_default_llm()) / "config.json").read_text()))


def model_of(shape, dtype, device):
    """(model, what its weights are)."""
    if shape == "smollm2-135m":
        return load_model(str(fetch_default_llm()), dtype, device)[0], "SmolLM2-135M-Instruct"
    model = Llama(roofline.LLAMA_31_8B, dtype, device)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.02)
    return model.eval(), f"random weights in the shape of {shape}"


@torch.inference_mode()
def fill(decoder, n_tokens):
    """Random K, V and history in place of a prompt of n_tokens. Blocks that attract attention go on attracting it."""
    m, device = decoder.model_config, decoder.history.device
    decoder.begin_prompt(n_tokens)
    for layer in range(m.n_layers):
        k, v = torch.randn(2, m.n_kv_heads, n_tokens, m.head_dim, device=device).to(decoder.queries.dtype)
        decoder.cache.write_prompt(layer, k, v)  # (Hk, T, D) each
    rows = decoder.history[..., : decoder.config.n_blocks(n_tokens)]  # (L', heads, H, N)
    rows.uniform_(0.5, 1).mul_(torch.rand_like(rows[:, :, :1]) ** 8)
    decoder.queries.normal_()
    decoder.fits = not decoder.sparse_layers or decoder.config.fits(n_tokens + 1)  # False: keep this history
    decoder.finish_token()


class Ours:
    """A SparseDecoder with a random cache; `step` decodes a token."""

    def __init__(self, model, predictor, config, n_tokens, n_steps, backend, offload=False, streamed=False):
        self.model = model
        self.decoder = SparseDecoder(config, model, predictor, n_tokens + n_steps, backend, offload)
        if streamed:
            self.decoder.cache = StreamedCache(self.decoder)
        fill(self.decoder, n_tokens)
        self.token = torch.zeros(1, dtype=torch.int64, device=model.device)
        self.weight_bytes = roofline.weight_bytes(model.config, model.dtype.itemsize)

    def step(self):
        self.token = decode_one_token(self.model, self.decoder, self.token).argmax(-1, keepdim=True)
        return self.token.item()  # waits for a GPU

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


def race(contenders, rounds, device):
    """Decode in turns. contenders: {name: (make, tokens)}; make() returns a contender, which decodes `tokens` tokens in
    each round: whole intervals of selection and calibration, so that a mean pays for both.

    Returns {name: {"rounds": [seconds per token], "seconds": their median, "memory": peak bytes, "contender"}}.
    """

    def warmed_up(make, tokens):
        contender = make()
        for _ in range(tokens):
            contender.step()
        return contender

    rows = {}
    for name, (make, tokens) in contenders.items():
        try:
            contender, memory = with_peak_memory(partial(warmed_up, make, tokens), device)
            rows[name] = dict(contender=contender, memory=memory, rounds=[])
        except torch.OutOfMemoryError:
            print(f"bench: {name}: out of memory, left out", file=sys.stderr)
            torch.cuda.empty_cache()
    for _ in range(rounds):
        for name, row in rows.items():
            begun, tokens = time.perf_counter(), contenders[name][1]
            for _ in range(tokens):
                row["contender"].step()
            row["rounds"].append((time.perf_counter() - begun) / tokens)
    for row in rows.values():
        row["seconds"] = statistics.median(row["rounds"])
    return rows


def stage_seconds(contender, n_steps, device):
    """{stage: seconds per token} of an `Ours`. Each call is waited for, so on a GPU the sum exceeds a token's time."""
    decoder, cache = contender.decoder, contender.decoder.cache
    stages = [(cache, "attend", "attention"), (cache, "attend_all", "attention"), (cache, "select", "gathering")]
    stages += [(cache, "write_rows", "history rows"), (cache, "pool", "calibration")]
    stages += [(decoder, "scores", "prediction"), (decoder, "choose", "selection")]
    spent = dict.fromkeys(stage for *_, stage in stages)
    spent = dict.fromkeys([*spent, "rest of the model"], 0.0)

    def timed(original, stage):
        def call(*args, **kwargs):
            synchronize(device)
            begun, before = time.perf_counter(), sum(spent.values())
            result = original(*args, **kwargs)
            synchronize(device)
            spent[stage] += time.perf_counter() - begun - (sum(spent.values()) - before)  # without calls inside
            return result

        return call

    begun = time.perf_counter()
    try:
        for owner, name, stage in stages:
            setattr(owner, name, timed(getattr(owner, name), stage))
        for _ in range(n_steps):
            contender.step()
    finally:
        for owner, name, _ in stages:
            vars(owner).pop(name, None)
    spent["rest of the model"] = time.perf_counter() - begun - sum(spent.values())
    return {stage: amount / n_steps for stage, amount in spent.items()}


def whole_intervals(c, context):
    """The fewest tokens that hold whole intervals of selection and of calibration."""
    return math.lcm(*c.intervals(context))


def speed_rows(models, predictor, config, contexts, rounds, backend, bandwidth):
    """A row per context, dtype and contender. models: {name of a dtype: model}."""
    device = next(iter(models.values())).device
    settings = dict(dense=replace(config, dense_layers=10**6), sparse=config)
    settings["sparse --paper"] = paper(config)
    transformers = importlib.util.find_spec("transformers")
    if not transformers:
        print("bench: transformers is not installed: left out", file=sys.stderr)
    for model in models.values():  # what the first call of a library allocates belongs to no contender
        contenders = [Ours(model, predictor, config, 64, 64, backend)] + [Transformers(model, 64)] * bool(transformers)
        for contender in contenders:
            contender.step()
    for context in contexts:
        tokens = {name: whole_intervals(c, context) for name, c in settings.items()}
        n_steps = (rounds + 2) * max(tokens.values())  # warming up, the rounds, and the stages
        start, contenders = context - n_steps, {}
        if start < 1:
            raise InputError(f"{n_steps} tokens are decoded at {context}: use longer --contexts or fewer --rounds")
        for dtype, model in models.items():
            for name, c in settings.items():
                make = partial(Ours, model, predictor, c, start, n_steps, backend)
                contenders[dtype, name] = make, tokens[name]
            if transformers:
                contenders[dtype, "transformers"] = partial(Transformers, model, start), tokens["sparse"]
        rows = race(contenders, rounds, device)
        for (dtype, name), row in rows.items():
            contender = row.pop("contender")
            row |= dict(context=context, dtype=dtype, name=name, bytes=contender.bytes_per_token())
            row["least_seconds"] = row["bytes"] / bandwidth
            if (dtype, "dense") in rows:
                row["speedup"] = statistics.median(d / t for d, t in zip(rows[dtype, "dense"]["rounds"], row["rounds"]))
            if name == "sparse":
                row["stages"] = stage_seconds(contender, tokens[name], device)
            yield row
        rows, contenders, contender = {}, {}, None  # frees their caches


SPEED_COLUMNS = {
    "context": lambda row: f"{row['context']:,}",
    "weights": lambda row: row["dtype"],
    "": lambda row: row["name"],
    "ms per token": lambda row: f"{1e3 * row['seconds']:,.1f}",
    "tokens/s": lambda row: f"{1 / row['seconds']:,.1f}",
    "against dense": lambda row: f"{row['speedup']:.2f}x" if "speedup" in row else "–",
    "GB/s read (of a copy's)": lambda row: (
        f"{row['bytes'] / row['seconds'] / 1e9:,.1f} ({row['least_seconds'] / row['seconds']:.0%})"
    ),
    "peak memory beside weights, MB": lambda row: f"{row['memory'] / 1e6:,.0f}" if row["memory"] else "–",
}


def stage_columns(rows):
    """Columns for what a sparse token's time goes into, for stages that take any."""
    stages = [stage for stage in rows[0]["stages"] if any(row["stages"][stage] for row in rows)]
    columns = {name: SPEED_COLUMNS[name] for name in ("context", "weights")}
    return columns | {f"{s}, ms": (lambda row, s=s: f"{1e3 * row['stages'][s]:,.2f}") for s in stages}


def bench_speed(args, config, device, backend):
    models, results = {}, machine(device)
    for dtype in args.dtypes:
        models[dtype], results["weights"] = model_of(args.model_shape, getattr(torch, dtype), device)
    predictor, bandwidth = attnpred.load_predictor(args.predictor), copy_bandwidth(device)
    longest = models[dtype].config.context_len
    if max(args.contexts) > longest:
        raise InputError(f"the model's context is {longest:,} tokens: --contexts {max(args.contexts)} is too long")
    print(
        f"{results['device']}, {results['threads']} threads, {results['weights']}, budget {config.budget}; "
        f"a copy moves {bandwidth / 1e9:,.1f} GB/s, read plus written\n"
    )
    rows = speed_rows(models, predictor, config, args.contexts, args.rounds, backend, bandwidth)
    results |= dict(copy_bytes_per_second=bandwidth, rows=show(rows, SPEED_COLUMNS))
    timed = [row for row in results["rows"] if "stages" in row]
    show(timed, stage_columns(timed))
    return results


# --------------------------------------------------------------------------------------------------------------------
# kernels
# --------------------------------------------------------------------------------------------------------------------


def kernel_rows(m, c, contexts, dtype, device, backend, ceilings):
    for context in contexts:
        for name, work, call, rivals in (path for f in PATHS for path in f(m, c, context, dtype, device, backend)):
            took, row = seconds(call, device), dict(path=name, context=context)
            copy = ceilings["host copy" if name.startswith("copy") else "copy"]
            matmul = ceilings["matmul tf32" if name.startswith("predict") else "matmul"]
            row |= dict(
                seconds=took, bytes_per_second=work.bytes / took, multiply_adds_per_second=work.multiply_adds / took
            )
            row |= dict(share_of_copy=work.bytes / took / copy, share_of_matmul=work.multiply_adds / took / matmul)
            yield row | dict(rivals={rival: seconds(rival_call, device) for rival, rival_call in rivals.items()})


KERNEL_COLUMNS = {
    "path": lambda row: row["path"],
    "context": lambda row: f"{row['context']:,}",
    "µs": lambda row: f"{1e6 * row['seconds']:,.1f}",
    "GB/s (of copy)": lambda row: f"{row['bytes_per_second'] / 1e9:,.1f} ({row['share_of_copy']:.0%})",
    "TFLOP/s (of matmul)": lambda row: (
        f"{2 * row['multiply_adds_per_second'] / 1e12:.3g} ({row['share_of_matmul']:.0%})"
    ),
    "rivals, µs": lambda row: (
        "; ".join(f"{name} {1e6 * t:,.1f} ({t / row['seconds']:.1f}x)" for name, t in row["rivals"].items()) or "–"
    ),
}


def bench_ceilings(dtype, device, size=1 << 28, n=4096):
    """Bytes / s of a copy on the device and from pinned host memory, multiply-adds / s of an n x n matrix product."""
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(size, dtype=torch.uint8, device=device)
    ceilings = {"copy": copy_bandwidth(device, size)}
    ceilings["host copy"] = size / seconds(lambda: target.copy_(host, non_blocking=True), device)
    for name, kind in (("matmul", dtype), ("matmul tf32", torch.float32)):
        x = torch.randn(n, n, device=device).to(kind)
        ceilings[name] = n**3 / seconds(lambda x=x: x @ x, device)
    return ceilings


def bench_kernels(args, config, device, backend):
    on_gpu, results = device.type == "cuda", machine(device)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    torch.set_float32_matmul_precision("high")
    m = shape_of(args.model_shape)
    if any(context % config.block_size or config.fits(context) for context in args.contexts):
        raise InputError(f"--contexts must be multiples of {config.block_size} and longer than the budget")
    ceilings = bench_ceilings(dtype, device, *([] if on_gpu else [1 << 26, 1024]))
    print(
        f"{results['device']}, {results['threads']} threads, shapes of {args.model_shape}, budget {config.budget}; "
        f"copy {ceilings['copy'] / 1e9:,.0f} GB/s, host to device {ceilings['host copy'] / 1e9:,.0f} GB/s, matrix "
        f"product {2e-12 * ceilings['matmul']:,.1f} TFLOP/s ({str(dtype)[6:]}), {2e-12 * ceilings['matmul tf32']:,.1f} "
        f"({'tf32' if on_gpu else 'float32'})\n"
    )
    rows = kernel_rows(m, config, args.contexts, dtype, device, backend, ceilings)
    return results | dict(ceilings=ceilings, rows=show(rows, KERNEL_COLUMNS))


# --------------------------------------------------------------------------------------------------------------------
# offload
# --------------------------------------------------------------------------------------------------------------------


class StreamedCache(KVCache):
    """All K and V in host memory, copied to the device layer by layer for every token: offloading without selection."""

    def __init__(self, decoder):
        c, m, device = decoder.config, decoder.model_config, decoder.history.device
        capacity_tokens, dtype = decoder.capacity * c.block_size, decoder.queries.dtype
        super().__init__(c, m, decoder.heads, capacity_tokens, dtype, "cpu", "torch")
        self.kv = self.kv.pin_memory() if device.type == "cuda" else self.kv
        self.k, self.v = self.kv
        self.staging = torch.empty_like(self.kv[:, 0], device=device)  # (2, Hk, capacity, b, D)

    def attend_all(self, layer, q):
        n_blocks = -(-self.n_tokens // self.block_size)
        self.staging[:, :, :n_blocks].copy_(self.kv[:, layer, :, :n_blocks], non_blocking=True)
        k, v = self.staging.flatten(2, 3)[:, None, :, : self.n_tokens]  # (1, Hk, T, D) each
        return F.scaled_dot_product_attention(q.unflatten(0, (self.n_kv_heads, -1))[None], k, v)[0].flatten(0, 1)


def count_link(model, tokenizer, predictor, config, n_prompt, n_steps):
    """What crosses the link while real text is decoded: a row of exact counts, bytes per token."""
    tokens = torch.tensor(tokenizer.encode(TEXT.read_text())[: n_prompt + n_steps], device=model.device)
    if len(tokens) < n_prompt + n_steps:
        raise InputError(f"{TEXT.name} has only {len(tokens):,} tokens: lower --text-tokens")
    decoder = SparseDecoder(config, model, predictor, len(tokens), "torch", offload=True)
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
        fetched=fetched * cache.block_bytes / n_steps,
        selected=selected * cache.block_bytes / n_steps,
        written=(cache.written_bytes - before[2]) / n_steps,
        whole=whole,
        on_device=cache.device_bytes,
    )


COUNT_COLUMNS = {
    "prompt": lambda row: f"{row['tokens']:,}",
    "selected, MB per token": lambda row: f"{row['selected'] / 1e6:,.3f}",
    "of it fetched": lambda row: f"{row['fetched'] / 1e6:,.3f} ({row['fetched_fraction']:.1%})",
    "written back": lambda row: f"{row['written'] / 1e6:,.3f}",
    "whole cache, MB": lambda row: f"{row['whole'] / 1e6:,.1f}",
    "on the device": lambda row: f"{row['on_device'] / 1e6:,.1f}",
}

CACHES = {
    "dense, resident": dict(),
    "dense, everything streamed": dict(streamed=True),
    "sparse, resident": dict(),
    "sparse, offloaded": dict(offload=True),
}


def cache_rows(model, predictor, config, contexts, rounds, backend, trace=None):
    """Measured time of each way to keep the cache; an interval of the last, offloaded, is traced into a file."""
    for context in contexts:
        tokens = whole_intervals(config, context)
        n_steps, contenders = (rounds + 2) * tokens, {}
        for name, how in CACHES.items():
            c = replace(config, dense_layers=10**6) if name.startswith("dense") else config
            make = partial(Ours, model, predictor, c, max(1, context - n_steps), n_steps, backend, **how)
            contenders[name] = make, tokens
        for name, row in race(contenders, rounds, model.device).items():
            contender = row.pop("contender")
            yield row | dict(context=context, name=name)
    if trace:
        from torch.profiler import profile

        with profile() as profiled:
            for _ in range(tokens):
                contender.step()
        profiled.export_chrome_trace(str(trace))


def lanes_of_trace(trace):
    """A chrome trace -> {stream: [(start, seconds, kind)]} of what ran on the GPU."""
    events = [event for event in trace["traceEvents"] if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not events:
        raise InputError("the profiler saw nothing on the GPU: it needs CUPTI and permission to use it")
    origin, lanes = min(event["ts"] for event in events), {}
    for event in events:
        kind = "copy" if kernels._copy_kernel.__name__ in event["name"] or event["cat"] == "gpu_memcpy" else "kernel"
        span = 1e-6 * (event["ts"] - origin), 1e-6 * event["dur"], kind
        lanes.setdefault(f"stream {event['args']['stream']}", []).append(span)
    return lanes


def modelled_rows(m, config, contexts, fetched_fraction, gb_s):
    """roofline's model of time, by context and way to keep the cache."""
    rates = {name: 1e9 * rate for name, rate in gb_s.items()}
    for context in contexts:
        ways = roofline.offload_strategies(m, config, context, fetched_fraction)
        times = {name: roofline.token_seconds(moved, rates, overlap) for name, (moved, overlap) in ways.items()}
        for name, took in times.items():
            row = dict(context=context, name=name, link_bytes=ways[name][0]["link"], seconds=took)
            yield row | dict(speedup=times["dense, everything streamed"] / took)


TIME_COLUMNS = {
    "context": lambda row: f"{row['context']:,}",
    "cache": lambda row: row["name"],
    "ms per token": lambda row: f"{1e3 * row['seconds']:,.2f}",
}
MODEL_COLUMNS = TIME_COLUMNS | {
    "MB over the link per token": lambda row: f"{row['link_bytes'] / 1e6:,.1f}",
    "against everything streamed": lambda row: f"{row['speedup']:.1f}x",
}


def bench_offload(args, config, device, backend):
    predictor, results, fraction = attnpred.load_predictor(args.predictor), machine(device), args.fetched_fraction
    if fraction is None:
        model, tokenizer = load_model(str(fetch_default_llm()), torch.bfloat16, device)
        print(f"Counted: SmolLM2-135M-Instruct on {TEXT.name}, {args.text_steps} tokens decoded\n")
        counted = [count_link(model, tokenizer, predictor, config, args.text_tokens, args.text_steps)]
        results["counted"], fraction = show(counted, COUNT_COLUMNS), counted[0]["fetched_fraction"]
    if args.measure:
        model, weights = model_of(args.model_shape, torch.bfloat16, device)
        print(f"Measured: {results['device']}, {results['threads']} threads, {weights}, budget {config.budget}\n")
        rows = cache_rows(model, predictor, config, args.measure, args.rounds, backend, args.trace)
        results["measured"] = show(rows, TIME_COLUMNS)
    if args.trace:
        results["timeline"] = lanes_of_trace(json.loads(pathlib.Path(args.trace).read_text()))
    gb_s = dict(memory=args.memory_gb_s, link=args.link_gb_s, host=args.host_gb_s)
    print(
        f"A model, not a measurement: {args.model_shape} in 16 bits, budget {config.budget}, {fraction:.1%} of a "
        f"selection fetched; GB/s: {', '.join(f'{name} {rate:g}' for name, rate in gb_s.items())}\n"
    )
    rows = modelled_rows(shape_of(args.model_shape), config, args.contexts, fraction, gb_s)
    results |= dict(model_shape=args.model_shape, gb_s=gb_s, fetched_fraction=fraction)
    return results | dict(modelled=show(rows, MODEL_COLUMNS))


# --------------------------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------------------------


def bench_bytes(args, config, device, backend):
    print(f"Bytes read per token, {args.model_shape} in 16 bits, budget {config.budget}\n")
    return dict(rows=show(read_rows(shape_of(args.model_shape), config, args.contexts), READ_COLUMNS))


def make_parser():
    parser = OneLineParser(prog="bench", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    gpu = torch.cuda.is_available()
    for name, command, contexts, shape in (
        ("speed", bench_speed, (128, 1024, 4096, 8192), "smollm2-135m"),
        ("kernels", bench_kernels, (8192, 32768, 131072) if gpu else (8192,), SHAPES[gpu]),
        ("offload", bench_offload, (8192, 32768, 131072), "llama-3.1-8b"),
        ("bytes", bench_bytes, (8192, 32768, 131072), "llama-3.1-8b"),
    ):
        sub = commands.add_parser(name, help=command.__doc__)
        sub.set_defaults(bench=command)
        sub.add_argument("--out", metavar="FILE.json", help="write all numbers there")
        sub.add_argument("--contexts", type=int, nargs="+", default=contexts, metavar="TOKENS", help="context lengths")
        sub.add_argument("--model-shape", choices=SHAPES, default=shape, help="llama-3.1-8b has random weights")
        if name in ("speed", "offload"):
            sub.add_argument("--rounds", type=int, default=7, help="the contenders take turns; the median counts")
            sub.add_argument("--predictor", default=attnpred.DEFAULT_PREDICTOR, help="the convolution")
        if name == "speed":
            dtypes = ["float32", "bfloat16"]
            sub.add_argument("--dtypes", nargs="+", default=dtypes, choices=dtypes, help="of the weights")
        if name == "offload":
            sub.add_argument("--link-gb-s", type=float, default=55.0, help="host to device; 55: PCIe 5 x16")
            sub.add_argument("--memory-gb-s", type=float, default=3350.0, help="of the device; 3350: H100")
            sub.add_argument("--host-gb-s", type=float, default=200.0, help="of host memory")
            sub.add_argument("--fetched-fraction", type=float, help="of a selection (default: counted, default LLM)")
            sub.add_argument("--text-tokens", type=int, default=4096, help="prompt of that count")
            sub.add_argument("--text-steps", type=int, default=64, help="tokens decoded for that count")
            sub.add_argument("--measure", type=int, nargs="+", default=[], metavar="TOKENS", help="decode there, timed")
            sub.add_argument("--trace", metavar="FILE.json", help="on a GPU: a trace of one interval, for Perfetto")
        attnpred.add_method_options(sub)
    return parser


def check(args, config, device):
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
        if args.trace and (device.type != "cuda" or not args.measure):
            raise InputError("--trace needs a GPU and --measure")


def run(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = attnpred.config_of(args)
    check(args, config, device)
    if device.type == "cuda" and (kernels.triton is None or kernels.interpreted()):
        raise InputError("a GPU is measured with Triton: install it, and unset TRITON_INTERPRET")
    results = args.bench(args, config, device, "triton" if device.type == "cuda" else "torch")
    if args.out:
        results["config"] = dataclasses.asdict(config)
        attnpred.write_atomically(args.out, lambda path: path.write_text(json.dumps(results, indent=1)))


def main(argv=None) -> int:
    return attnpred.exit_status("bench", lambda: run(make_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
