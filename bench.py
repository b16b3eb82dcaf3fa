"""How fast: the kernels, decoding end to end, and the offloaded cache, on the machine that it is run on.

    python bench.py --kernels [--json FILE]
    python bench.py --end-to-end [--json FILE] [--png FILE]
    python bench.py --offload --model-shape llama-3.1-8b --context 32768 --link-gb-s 55 [--json FILE] [--png FILE]

--end-to-end decodes, dense and sparse, next to transformers with the same weights. The caches are filled with random
keys and values instead of a prompt's, on which the time of a step does not depend. --offload works out what crosses the
link to the host, from exact counters; on a GPU it measures too.

Of the kernels, the ceilings are measured, not quoted: a copy on the device, a large matrix product, a copy from pinned
host memory. The
bytes and multiply-adds held against them are the least that a path could do with, so waste shows as a lower share.
Every call of a measurement has the tensors of a layer of its own, as in a decode step: nothing is found in the L2 cache
that would not be there. The calls are captured into one CUDA graph, so the launches' cost on the host is left out.
"""

import ctypes
import importlib.util
import json
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import torch
import torch.nn.functional as F

import kernels
from attnpred import (
    DEFAULT_PREDICTOR,
    Config,
    InputError,
    OneLineParser,
    SparseDecoder,
    decode_one_token,
    exit_status,
    load_predictor,
    prefill,
)
from model import Llama, LlamaConfig, checkpoint_targets, load_model
from offload import OffloadedCache
from weights.fetch_llm import fetch_default_llm

LLAMA_8B = dict(n_heads=32, n_kv_heads=8, head_dim=128)
CONTEXTS = (8192, 32768, 131072)
LAYERS = 32
HOST_LAYERS = 4  # of pinned host memory, which is dear, and which the L2 cache does not keep
BLOCK_SIZE, HISTORY_LEN, SINK_TOKENS, LOCAL_TOKENS = 16, 64, 64, 64


# --------------------------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------------------------


def seconds(calls, device, graph=True, least=0.2):
    """Mean time of one of `calls`, made in turn, over at least `least` seconds. On a CPU each is made once."""
    if device.type != "cuda":
        begun = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - begun) / len(calls)

    def run():
        for call in calls:
            call()

    run()  # compiles, allocates, chooses algorithms
    torch.cuda.synchronize()
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            run()
        run = captured.replay
    begun = time.perf_counter()
    run()
    torch.cuda.synchronize()
    rounds = max(2, math.ceil(least / (time.perf_counter() - begun)))
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(rounds):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / rounds / len(calls)


@dataclass
class Ceilings:
    """What this card does at best. Bytes are counted as read plus written, or once if they cross to the device."""

    copy: float  # bytes / s, device to device
    matmul: float  # multiply-adds / s, bf16
    matmul_tf32: float
    host_copy: float  # bytes / s, pinned host memory to device


def measure_ceilings(device, size=1 << 30, n=8192):
    """A copy of `size` bytes, a product of two n x n matrices."""
    here, there = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    copy = 2 * size / seconds([lambda: there.copy_(here)], device)
    host_copy = size / seconds([lambda: there.copy_(host, non_blocking=True)], device)
    rates = []
    for dtype in (torch.bfloat16, torch.float32):
        x, y = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        with tf32(True):
            rates.append(n**3 / seconds([lambda x=x, y=y: x @ y], device))
    return Ceilings(copy, *rates, host_copy)


class tf32:
    """Whether PyTorch's float32 products and convolutions may round their inputs to tf32."""

    def __init__(self, allowed):
        self.allowed = allowed

    def __enter__(self):
        self.before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.allowed

    def __exit__(self, *error):
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = self.before


# --------------------------------------------------------------------------------------------------------------------
# What is measured
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Path:
    """One hot path at one context length: a call for every layer, and as many for each rival."""

    name: str
    calls: list[Callable]
    rivals: dict[str, list[Callable]] = field(default_factory=dict)
    fetched: int = 0  # bytes over the link to the host, where that is the bound; the rivals then work on the host


@dataclass
class Setting:
    """A model's shapes at one context length, where its tensors live, and which backend is measured."""

    n_tokens: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    layers: int
    device: torch.device
    backend: str
    dtype: torch.dtype = torch.bfloat16
    budgets: tuple = (1024, 4096)

    @property
    def n_blocks(self):
        return -(-self.n_tokens // BLOCK_SIZE)

    @property
    def window(self):
        """The middle: first block, and the one behind the last."""
        return SINK_TOKENS // BLOCK_SIZE, (self.n_tokens - LOCAL_TOKENS) // BLOCK_SIZE

    def caches(self):
        """K and V of every layer."""
        shape = 2, self.n_kv_heads, self.n_blocks, BLOCK_SIZE, self.head_dim
        return [torch.randn(shape, device=self.device, dtype=self.dtype) for _ in range(self.layers)]

    def random_blocks(self, budget):
        """A selection with sink and local window, (Hk, budget / b)."""
        start, end = self.window
        wanted = (budget - SINK_TOKENS - LOCAL_TOKENS) // BLOCK_SIZE
        chosen = torch.rand(self.n_kv_heads, end - start, device=self.device).topk(min(wanted, end - start)).indices
        outside = [*range(start), *range(end, self.n_blocks)]
        outside = torch.tensor(outside, device=self.device).expand(self.n_kv_heads, -1)
        return torch.cat([outside, chosen + start], 1).sort(1).values.int()


def pooling_paths(s):
    caches = s.caches()
    for rows, name in ((HISTORY_LEN, "prefill"), (1, "calibration")):
        q = torch.randn(s.n_heads, rows, s.head_dim, device=s.device, dtype=s.dtype)

        def naive(k, q=q):  # softmax of all logits, then its maximum over each block
            k = k.flatten(1, 2)[:, : s.n_tokens].repeat_interleave(s.n_heads // s.n_kv_heads, 0)  # (Hq, T, D)
            logits = (q @ k.mT).float() * s.head_dim**-0.5  # (Hq, rows, T)
            future = torch.ones(q.shape[1], s.n_tokens, dtype=torch.bool, device=s.device).triu(
                s.n_tokens - q.shape[1] + 1
            )
            p = logits.masked_fill_(future, float("-inf")).softmax(-1)
            return F.pad(p, (0, s.n_blocks * BLOCK_SIZE - s.n_tokens)).unflatten(-1, (-1, BLOCK_SIZE)).amax(-1)

        yield Path(
            f"pool_history, {name}",
            [lambda k=k, q=q: kernels.pool_history(q, k, s.n_tokens, s.backend) for k, _ in caches],
            {"softmax, then max": [lambda k=k, naive=naive: naive(k) for k, _ in caches]},
        )


def prediction_paths(s):
    start, end = s.window
    shapes = {"conv1": (16, 1, 3, 3), "conv2": (32, 16, 3, 3), "conv3": (1, 32, 1)}
    weights = {}
    for layer, shape in shapes.items():
        weights[f"{layer}.weight"] = torch.randn(shape, device=s.device) / math.prod(shape[1:]) ** 0.5
        weights[f"{layer}.bias"] = torch.randn(shape[0], device=s.device)
    rings = [torch.rand(2, s.n_kv_heads, HISTORY_LEN, s.n_blocks, device=s.device) for _ in range(s.layers)]

    def network(allowed):
        def call(history):
            with tf32(allowed):
                return kernels.predict_reference(history, 0, start, end, weights)

        return [lambda history=history: call(history) for history, _ in rings]

    for history, contributions in rings:  # a first call fills the ring of contributions
        kernels.predict_incremental(history, contributions, 0, start, end, start, weights, s.backend)
    rivals = {"cuDNN, tf32": network(True), "cuDNN, float32": network(False)}
    calls = [lambda h=h: kernels.predict(h, 0, start, end, weights, s.backend) for h, _ in rings]
    yield Path("predict", calls, rivals)
    for name, valid_end in (("", end), (", a block more", end - 1)):
        calls = [
            lambda h=h, p=p, v=valid_end: kernels.predict_incremental(h, p, 0, start, end, v, weights, s.backend)
            for h, p in rings
        ]
        yield Path(f"predict_incremental{name}", calls, rivals if not name else {})


def selection_paths(s):
    start, end = s.window
    rows = [torch.randn(s.n_kv_heads, end - start, device=s.device) for _ in range(s.layers)]
    for budget in s.budgets:
        k = min(end - start, (budget - SINK_TOKENS - LOCAL_TOKENS) // BLOCK_SIZE)
        yield Path(
            f"select_blocks, k = {k}",
            [lambda x=x, k=k: kernels.select_blocks(x, k, s.backend) for x in rows],
            {"topk, then sort": [lambda x=x, k=k: x.topk(k, sorted=False).indices.sort(1).values for x in rows]},
        )


def attention_paths(s):
    caches = s.caches()
    q = torch.randn(s.n_heads, s.head_dim, device=s.device, dtype=s.dtype)
    history = torch.empty(s.n_kv_heads, s.n_blocks, device=s.device)

    def sdpa(k, v):  # (Hk, tokens, D)
        return F.scaled_dot_product_attention(q[None, :, None], k[None], v[None], enable_gqa=True)

    def full(cache):
        return sdpa(*cache.flatten(2, 3)[:, :, : s.n_tokens])

    def gathered(cache, blocks):
        head = torch.arange(s.n_kv_heads, device=s.device)[:, None]
        return sdpa(*cache[:, head, blocks].flatten(2, 3))

    everything = [lambda c=c: full(c) for c in caches]
    for budget in s.budgets:
        if budget >= s.n_tokens:
            continue
        tables = [s.random_blocks(budget) for _ in caches]
        yield Path(
            f"sparse_decode, B = {budget}",
            [
                lambda c=c, b=b: kernels.sparse_decode(q, c[0], c[1], b, s.n_tokens, history, s.backend)
                for c, b in zip(caches, tables)
            ],
            {
                "SDPA over the gathered blocks": [
                    lambda c=c, b=b: gathered(c, b.long()) for c, b in zip(caches, tables)
                ],
                "SDPA over the full cache": everything,
            },
        )
    yield Path(
        "sparse_decode, every block",
        [lambda c=c: kernels.sparse_decode(q, c[0], c[1], None, s.n_tokens, None, s.backend) for c in caches],
        {"SDPA over the full cache": everything},
    )


def copy_paths(s):
    """Every slot of a selection, and the quarter of them that a step may have to fetch."""
    elements = 2 * BLOCK_SIZE * s.head_dim
    shape = s.n_kv_heads * s.n_blocks, elements
    pinned = s.device.type == "cuda"
    hosts = [torch.zeros(shape, dtype=s.dtype, pin_memory=pinned) for _ in range(min(s.layers, HOST_LAYERS))]
    start, end = s.window
    n = s.n_kv_heads * min(end - start, (max(s.budgets) - SINK_TOKENS - LOCAL_TOKENS) // BLOCK_SIZE)
    slots = torch.empty(n, elements, device=s.device, dtype=s.dtype)
    place = torch.arange(n, dtype=torch.int32, device=s.device)
    for name, wanted in (("all", n), ("a quarter", max(1, n // 4))):
        lists = [torch.randperm(shape[0])[:wanted] for _ in hosts]
        sources = [F.pad(chosen, (0, n - wanted), value=-1).int().to(s.device) for chosen in lists]
        yield Path(
            f"copy_blocks, {name} of {n}",
            [lambda h=h, i=i: kernels.copy_blocks(h, slots, i, place, s.backend) for h, i in zip(hosts, sources)],
            {
                "index_select, then copy": [
                    lambda h=h, i=i, w=wanted: slots[:w].copy_(h.index_select(0, i)) for h, i in zip(hosts, lists)
                ]
            },
            fetched=wanted * elements * slots.element_size(),
        )


GROUPS = (pooling_paths, prediction_paths, selection_paths, attention_paths, copy_paths)


# --------------------------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------------------------


def least_cost(path, s):
    """Least bytes and multiply-adds of one call, as the launchers count them; of a copy, the bytes fetched."""
    if path.fetched:
        return path.fetched, 0
    if s.backend != "triton":
        return 0, 0
    with kernels.recorded_launches() as launches:
        path.calls[0]()
    return sum(x.cost.least_bytes for x in launches), sum(x.cost.least_multiply_adds for x in launches)


def measure(path, s, ceilings):
    """One row of the table, as a dict."""
    took = seconds(path.calls, s.device)
    n_bytes, multiply_adds = least_cost(path, s)
    copy = ceilings.host_copy if path.fetched else ceilings.copy
    matmul = ceilings.matmul_tf32 if path.name.startswith("predict") else ceilings.matmul
    rivals = {name: seconds(calls, s.device, graph=not path.fetched) for name, calls in path.rivals.items()}
    return {
        "path": path.name,
        "n_tokens": s.n_tokens,
        "seconds": took,
        "bytes_per_second": n_bytes / took,
        "share_of_copy": n_bytes / took / copy,
        "multiply_adds_per_second": multiply_adds / took,
        "share_of_matmul": multiply_adds / took / matmul,
        "rivals": rivals,
    }


def format_row(row):
    rivals = "; ".join(f"{name} {1e6 * t:,.1f} µs ({t / row['seconds']:.1f}x)" for name, t in row["rivals"].items())
    cells = (
        row["path"],
        f"{row['n_tokens'] // 1024}K",
        f"{1e6 * row['seconds']:,.1f}",
        f"{row['bytes_per_second'] / 1e9:,.0f} ({row['share_of_copy']:.0%})",
        f"{2 * row['multiply_adds_per_second'] / 1e12:,.2f} ({row['share_of_matmul']:.0%})",
        rivals or "–",
    )
    return "| " + " | ".join(cells) + " |"


def bench_kernels(device, backend, contexts=CONTEXTS, layers=LAYERS, model=LLAMA_8B, ceilings=None, **changes):
    """Measures every path at every context length, printing the table as it grows; returns what `--json` writes."""
    ceilings = ceilings or measure_ceilings(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"{name}: copy {ceilings.copy / 1e9:,.0f} GB/s; matrix product {2 * ceilings.matmul / 1e12:,.0f} TFLOP/s in "
        f"bf16, {2 * ceilings.matmul_tf32 / 1e12:,.0f} in tf32; pinned host to device "
        f"{ceilings.host_copy / 1e9:,.0f} GB/s\n"
    )
    print("| path | tokens | µs | GB/s (of copy) | TFLOP/s (of product) | instead, and how many times longer |")
    print("|---|---|---|---|---|---|")
    rows = []
    for n_tokens in contexts:
        s = Setting(n_tokens, **model, layers=layers, device=device, backend=backend, **changes)
        for group in GROUPS:
            for path in group(s):
                rows.append(measure(path, s, ceilings))
                print(format_row(rows[-1]), flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": kernels.triton.__version__ if kernels.triton else None,
        "layers": layers,
        "ceilings": asdict(ceilings),
        "kernels": rows,
    }


# --------------------------------------------------------------------------------------------------------------------
# End to end
# --------------------------------------------------------------------------------------------------------------------

LLAMA_31_8B = LlamaConfig(
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    d_model=4096,
    d_ff=14336,
    vocab_size=128256,
    context_len=131072,
    rope_theta=500000.0,
    rope_scaling=dict(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192.0,
    ),
    rms_eps=1e-5,
    tie_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
    eos_token_ids=(),
)
SHAPES = {"smollm2-135m": None, "llama-3.1-8b": LLAMA_31_8B}  # None: the default LLM with its own weights


def default_llm_config():
    return LlamaConfig.from_json(json.loads((pathlib.Path(fetch_default_llm()) / "config.json").read_text()))


def model_of(shape, dtype, device):
    """(model, what its weights are)."""
    if SHAPES[shape] is None:
        return load_model(str(fetch_default_llm()), dtype, device)[0], "SmolLM2-135M-Instruct"
    model = Llama(SHAPES[shape], dtype, device)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.02)
    return model.eval(), f"random weights in the shape of {shape}"


def fill(decoder, n_tokens, dtype):
    """Random keys, values and history in the place of a prompt of n_tokens. A block's weight in the history lasts."""
    m = decoder.model_config
    for layer in range(m.n_layers):
        shape = 2, m.n_kv_heads, n_tokens, m.head_dim
        k, v = torch.randn(shape, device=decoder.history.device).to(dtype)  # (Hk, T, D) each
        decoder.cache.write(layer, k, v, 0)
    rows = decoder.history[..., : decoder.config.n_blocks(n_tokens)]  # (L', heads, H, N)
    rows.uniform_(0.5, 1).mul_(torch.rand_like(rows[:, :, :1]) ** 8)
    decoder.n_tokens = n_tokens
    decoder.finish_token()
    decoder.cache.begin_counting()


class Ours:
    """A SparseDecoder with a random cache, a token at a time."""

    def __init__(self, model, predictor, config, n_tokens, n_steps, backend, offload=False, prefetch=True):
        self.model = model
        self.decoder = SparseDecoder(config, model, predictor, n_tokens + n_steps, backend, offload)
        if offload and not prefetch:
            self.decoder.cache.__class__ = FetchedLate
        with torch.inference_mode():
            fill(self.decoder, n_tokens, model.embed.dtype)
        self.token = torch.zeros(1, dtype=torch.int64, device=model.embed.device)

    def step(self):
        self.token = decode_one_token(self.model, self.decoder, self.token).argmax(-1, keepdim=True)
        return self.token.item()  # waits for a GPU


class FetchedLate(OffloadedCache):
    """Selects and fetches at the end of a token, on the stream that computes."""

    overlaps = False


class Transformers:
    """The same weights, not copied, in transformers' LlamaForCausalLM, with its default cache, random too."""

    def __init__(self, model, n_tokens):
        import transformers

        m, self.device = model.config, model.embed.device
        rope = (m.rope_scaling or {"rope_type": "default"}) | {"rope_theta": m.rope_theta}
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
            rope_parameters=rope,
            tie_word_embeddings=m.tie_embeddings,
            attn_implementation="sdpa",
        )
        with torch.device("meta"):
            self.model = transformers.LlamaForCausalLM(config)
        self.model.load_state_dict(hugging_face_names(model), assign=True, strict=not m.tie_embeddings)
        self.model.tie_weights()
        self.model.model.rotary_emb = type(self.model.model.rotary_emb)(config).to(self.device)
        self.model.eval()
        self.cache = transformers.DynamicCache(config=config)
        for layer in range(m.n_layers):
            kv = torch.randn(2, 1, m.n_kv_heads, n_tokens, m.head_dim, device=self.device).to(model.embed.dtype)
            self.cache.update(*kv, layer)  # (1, Hk, T, D) each
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)

    @torch.inference_mode()
    def step(self):
        logits = self.model(self.token, past_key_values=self.cache, use_cache=True).logits  # (1, 1, V)
        self.token = logits[:, -1].argmax(-1, keepdim=True)
        return self.token.item()


def hugging_face_names(model):
    """{tensor's name in a checkpoint: the part of the model's parameters that it is}."""
    return {name: part.data for name, part in checkpoint_targets(model).items()}


class peak_memory:
    """`taken`: bytes at the peak of the block above what was held before; None where the system does not tell."""

    def __init__(self, device):
        self.device = device

    def now(self, key):
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated() if key == "VmRSS" else torch.cuda.max_memory_allocated()
        with open("/proc/self/status") as file:
            return 1024 * next(int(line.split()[1]) for line in file if line.startswith(key))

    def __enter__(self):
        try:
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            else:
                ctypes.CDLL(None).malloc_trim(0)  # what the allocator holds back would hide what is taken
                with open("/proc/self/clear_refs", "w") as file:
                    file.write("5")
            self.before = self.now("VmRSS")
        except (OSError, AttributeError):  # not Linux, or not glibc
            self.before = None
        return self

    def __exit__(self, *error):
        self.taken = None if self.before is None else self.now("VmHWM") - self.before


STAGES = {
    "sparse_decode": "attention",
    "predict_incremental": "prediction",
    "select_blocks": "selection",
    "pool_history": "calibration",
    "assign_slots": "fetching",
    "copy_blocks": "fetching",
}


def stage_seconds(contender, n_steps, device):
    """{stage: seconds a token}: each kernel is waited for, so that on a GPU the sum is more than a token takes."""
    spent = dict.fromkeys([*STAGES.values(), "rest of the model"], 0.0)

    def timed(original, stage):
        def call(*args, **kwargs):
            synchronize(device)
            begun = time.perf_counter()
            result = original(*args, **kwargs)
            synchronize(device)
            spent[stage] += time.perf_counter() - begun
            return result

        return call

    originals = {name: getattr(kernels, name) for name in STAGES}
    begun = time.perf_counter()
    try:
        for name, stage in STAGES.items():
            setattr(kernels, name, timed(originals[name], stage))
        for _ in range(n_steps):
            contender.step()
    finally:
        for name, original in originals.items():
            setattr(kernels, name, original)
    spent["rest of the model"] = time.perf_counter() - begun - sum(spent.values())
    return {stage: amount / n_steps for stage, amount in spent.items()}


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def copy_bandwidth(device, size):
    """Bytes / s, read plus written: the best of several copies."""
    here, there = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / min(seconds([lambda: there.copy_(here)], device) for _ in range(5))


def least_bytes(model, decoder, n_tokens):
    """Bytes that a token cannot do without: the weights, and the K and V that it attends to (decoder None: all)."""
    m = model.config
    weights = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if name != "embed")
    weights += model.embed.numel() * model.embed.element_size() if m.tie_embeddings else 0
    if decoder is not None:
        stats = decoder.stats
        return weights + (stats.kv_bytes + stats.calibration_bytes) / decoder.step
    return weights + 2 * m.n_layers * m.n_kv_heads * n_tokens * m.head_dim * model.embed.element_size()


def interleaved(contenders, rounds, group):
    """{name: [[seconds of each token], one list a round]}: the contenders take turns, `group` tokens each."""
    times = {name: [] for name in contenders}
    for contender in contenders.values():
        contender.step()
    for _ in range(rounds):
        for name, contender in contenders.items():
            marks = [time.perf_counter()]
            for _ in range(group):
                contender.step()
                marks.append(time.perf_counter())
            times[name].append([b - a for a, b in zip(marks, marks[1:])])
    return times


def a_token(rounds):
    """Seconds a token: the median over rounds of their means."""
    return statistics.median(statistics.mean(tokens) for tokens in rounds)


def bench_end_to_end(model, weights, predictor, config, contexts, rounds, backend, copy_size=1 << 28):
    """Measures every contender at every context, printing the table as it grows; returns what `--json` writes."""
    device, group = model.embed.device, config.calibration_interval  # a round holds one calibrating step
    n_steps = 1 + (rounds + 1) * group
    bandwidth = copy_bandwidth(device, copy_size)
    results = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "weights": weights,
        "dtype": str(model.embed.dtype).removeprefix("torch."),
        "copy_bytes_per_second": bandwidth,
        "config": asdict(config),
        "rows": [],
    }
    print(
        f"{results['device']}, {results['threads']} threads, {weights}, {results['dtype']}, budget {config.budget}; "
        f"a copy moves {bandwidth / 1e9:,.1f} GB/s\n"
    )
    print(
        "| context | | ms a token | slowest of a round | tokens/s | against dense | of the bandwidth's limit "
        "| memory beside weights, MB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    kinds = {
        "dense": lambda n: Ours(model, predictor, dense, n, n_steps, backend),
        "sparse": lambda n: Ours(model, predictor, config, n, n_steps, backend),
        "sparse, staggered": lambda n: Ours(model, predictor, staggered, n, n_steps, backend),
        "transformers": lambda n: Transformers(model, n),
    }
    dense = replace(config, dense_layers=model.config.n_layers)
    staggered = replace(config, stagger_calibration=True)
    if importlib.util.find_spec("transformers") is None:
        print("bench: transformers is not installed: left out", file=sys.stderr)
        kinds.pop("transformers")
    else:
        Transformers(model, 16).step()  # what importing it takes is no part of a measurement
    for n_tokens in contexts:
        contenders, memory = {}, {}
        for name, make in kinds.items():
            try:
                with peak_memory(device) as peak:
                    contenders[name] = make(n_tokens - n_steps)
                    contenders[name].step()
                memory[name] = peak.taken
            except torch.OutOfMemoryError:
                print(f"bench: {name} at {n_tokens} tokens: out of memory, left out", file=sys.stderr)
                torch.cuda.empty_cache()
        times = interleaved(contenders, rounds - 1, group)
        for name, took in times.items():
            decoder = contenders[name].decoder if name.startswith("sparse") else None
            row = {"context": n_tokens, "name": name, "seconds": a_token(took), "memory": memory[name], "rounds": took}
            row["slowest"] = statistics.median(map(max, took))
            row["least_seconds"] = least_bytes(model, decoder, n_tokens) / bandwidth
            if "dense" in times:
                row["speedup"] = statistics.median(sum(d) / sum(t) for d, t in zip(times["dense"], took))
            results["rows"].append(row)
        if "sparse" in contenders:
            sparse = next(row for row in results["rows"] if row["context"] == n_tokens and row["name"] == "sparse")
            sparse["stages"] = stage_seconds(contenders["sparse"], group, device)
        for row in results["rows"][-len(times) :]:
            print(format_speed(row), flush=True)
    print_stages(results["rows"])
    return results


def print_stages(rows):
    """What a sparse token's time goes into."""
    rows = [row for row in rows if "stages" in row]
    stages = [stage for stage in dict.fromkeys(STAGES.values()) if any(row["stages"][stage] for row in rows)]
    stages.append("rest of the model")
    print("\n| context | " + " | ".join(f"{stage}, ms" for stage in stages) + " |")
    print("|---" * (1 + len(stages)) + "|")
    for row in rows:
        cells = " | ".join(f"{1e3 * row['stages'][stage]:,.2f}" for stage in stages)
        print(f"| {row['context']:,} | {cells} |", flush=True)


def format_speed(row):
    cells = (
        f"{row['context']:,}",
        row["name"],
        f"{1e3 * row['seconds']:,.1f}",
        f"{1e3 * row['slowest']:,.1f}",
        f"{1 / row['seconds']:,.1f}",
        f"{row['speedup']:.2f}x" if "speedup" in row else "–",
        f"{row['least_seconds'] / row['seconds']:.0%}",
        f"{row['memory'] / 1e6:,.0f}" if row["memory"] else "–",
    )
    return "| " + " | ".join(cells) + " |"


# --------------------------------------------------------------------------------------------------------------------
# The offloaded cache
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Link:
    """Bytes that cross between host and device in a decode step of one layer, and what they are for."""

    full: float  # all K and V of a layer
    keys: float  # all K of a layer: what calibration streams
    wanted: float  # a selection
    fetched: float  # what of it is not in a slot yet
    written: float  # to the host: a token's K and V

    @classmethod
    def of(cls, m: LlamaConfig, c: Config, n_tokens, fetched_fraction, itemsize=2):
        heads = m.n_kv_heads if c.select_heads == "kv" else m.n_heads
        token = 2 * m.n_kv_heads * m.head_dim * itemsize
        start, end = c.middle(n_tokens)
        blocks = min(c.topk_blocks, max(0, end - start))
        wanted = 2 * heads * blocks * c.block_size * m.head_dim * itemsize
        return cls(n_tokens * token, n_tokens * token / 2, wanted, fetched_fraction * wanted, token)


def schedule(m: LlamaConfig, c: Config, link: Link, bytes_per_second, compute_seconds, n_tokens_decoded):
    """When what happens with prefetching: ({lane: [(start, seconds, kind)]}, [when each token ends]).

    A model: layers take the same time; dense layers wait for what they stream; as soon as a layer has attended and the
    link is free, the keys that calibrate it are streamed, and what its next selection lacks is copied.
    """
    compute, copies, ends = [], [], []
    now = free = 0.0
    ready = [0.0] * m.n_layers
    for step in range(1, n_tokens_decoded + 1):
        for layer in range(m.n_layers):
            dense = layer < c.dense_layers
            turn = step + layer if c.stagger_calibration else step
            now = max(now, ready[layer])
            compute.append((now, compute_seconds / m.n_layers, "layer"))
            copied = [("fetched for the next token", link.fetched)]
            if dense:
                free = max(now, free)
                copied = [("streamed: dense layer", link.full)]
            elif turn % c.calibration_interval == 0:
                copied.insert(0, ("streamed: calibration", link.keys))
            now += compute_seconds / m.n_layers
            free = free if dense else max(now, free)
            for kind, amount in copied:
                copies.append((free, amount / bytes_per_second, kind))
                free += amount / bytes_per_second
            if dense:
                now = max(now, free)
            else:
                ready[layer] = free
        ends.append(now)
    return {"compute": compute, "link to the host": copies}, ends


def offload_times(m, c, link, bytes_per_second, compute_seconds):
    """{strategy: (bytes a token, seconds a token)}, averaged over a calibration interval."""
    dense = min(c.dense_layers, m.n_layers)
    sparse = m.n_layers - dense
    streamed = dense * link.full + sparse * link.keys / c.calibration_interval
    moved = {
        "everything, streamed": m.n_layers * link.full,
        "the selection anew, awaited": streamed + sparse * link.wanted,
        "the difference, awaited": streamed + sparse * link.fetched,
        "the difference, ahead of time": streamed + sparse * link.fetched,
        "the same, calibration staggered": streamed + sparse * link.fetched,
    }
    seconds_of = {name: compute_seconds + amount / bytes_per_second for name, amount in moved.items()}
    seconds_of["everything, streamed"] = max(compute_seconds, m.n_layers * link.full / bytes_per_second)
    for name, stagger in (("the difference, ahead of time", False), ("the same, calibration staggered", True)):
        config, interval = replace(c, stagger_calibration=stagger), c.calibration_interval
        ends = schedule(m, config, link, bytes_per_second, compute_seconds, 3 * interval)[1]
        seconds_of[name] = (ends[-1] - ends[interval - 1]) / (2 * interval)
    return {name: (amount, seconds_of[name]) for name, amount in moved.items()}


def measure_fetched_fraction(predictor, config, n_prompt, n_steps):
    """Share of the selection that is not in a slot yet, in the default LLM's decoding of a held-out text."""
    from train_predictor import draw_contexts, python_documents

    model, tokenizer = load_model(str(fetch_default_llm()), torch.float32, "cpu")
    documents = {"reference": python_documents()["reference"]}
    (context,) = draw_contexts(documents, "test", [n_prompt + n_steps], 1, 1, 64, tokenizer, 0)
    tokens = torch.tensor(context.tokens)
    decoder = SparseDecoder(config, model, predictor, len(tokens), "torch", offload=True)
    prefill(model, decoder, tokens[:n_prompt])
    for token in tokens[n_prompt:].split(1):
        decode_one_token(model, decoder, token)
    start, end = config.middle(len(tokens))
    return int(decoder.cache.fetched) / max(1, decoder.cache.wanted), min(config.topk_blocks, end - start), end - start


def bench_offload(args, predictor, config):
    """Prints what the model says; returns what `--json` writes, a timeline included."""
    m = SHAPES[args.model_shape] or default_llm_config()
    fraction, origin = args.fetched_fraction, "given"
    if fraction is None:
        fraction, k, n = measure_fetched_fraction(predictor, config, args.text_tokens, args.text_steps)
        origin = (
            f"measured: SmolLM2-135M, {k} of {n} blocks chosen, {args.text_steps} tokens behind {args.text_tokens:,}"
        )
    weights = m.n_layers * (m.d_model * m.head_dim * 2 * (m.n_heads + m.n_kv_heads) + 3 * m.d_model * m.d_ff)
    weights = 2 * (weights + m.vocab_size * m.d_model)
    compute = weights / (1e9 * args.memory_gb_s) if args.memory_gb_s else 0.0
    basis = f"{weights / 1e9:.1f} GB of weights at {args.memory_gb_s:g} GB/s" if compute else "none: a lower bound"
    results = {
        "model_shape": args.model_shape,
        "link_gb_s": args.link_gb_s,
        "fetched_fraction": fraction,
        "fetched_fraction_origin": origin,
        "compute_seconds": compute,
        "config": asdict(config),
        "modelled": [],
    }
    print(
        f"A model, not a measurement: {args.model_shape} in bfloat16, budget {config.budget}, "
        f"link {args.link_gb_s:g} GB/s, {fraction:.1%} of the selection fetched anew ({origin}); "
        f"compute a token: {1e3 * compute:.1f} ms ({basis})\n"
    )
    print("| context | what crosses the link | MB a token | ms a token | against everything |")
    print("|---|---|---|---|---|")
    for n_tokens in args.contexts:
        link = Link.of(m, config, n_tokens, fraction)
        times = offload_times(m, config, link, 1e9 * args.link_gb_s, compute)
        slowest = times["everything, streamed"][1]
        for name, (amount, took) in times.items():
            row = {"context": n_tokens, "name": name, "bytes": amount, "seconds": took}
            results["modelled"].append(row)
            print(f"| {n_tokens:,} | {name} | {amount / 1e6:,.1f} | {1e3 * took:,.2f} | {slowest / took:.1f}x |")
    lanes, ends = schedule(m, config, link, 1e9 * args.link_gb_s, compute, 2 * config.calibration_interval)
    results["timeline"] = lanes
    results["window"] = ends[-3:] if len(ends) > 2 else [0.0, *ends]  # the last two steps: one plain, one calibrating
    return results


MEASURED = {
    "dense, resident": dict(),
    "dense, everything streamed": dict(offload=True),
    "sparse, the difference, awaited": dict(offload=True, prefetch=False),
    "sparse, the difference, ahead of time": dict(offload=True),
}


def measure_offload(args, predictor, config, results):
    """On a GPU: latency of a token, one cache at a time; then a trace of two tokens with prefetching."""
    device = torch.device("cuda")
    model, weights = model_of(args.model_shape, torch.bfloat16, device)
    group = config.calibration_interval
    n_steps = 1 + args.rounds * group + 2
    dense = replace(config, dense_layers=model.config.n_layers)
    results["measured"], results["weights"], results["device"] = [], weights, torch.cuda.get_device_name(device)
    print(f"\nMeasured on {results['device']}: {weights}\n")
    print("| context | cache | ms a token | of the selection fetched anew |")
    print("|---|---|---|---|")
    for n_tokens in args.contexts:
        for name, how in MEASURED.items():
            c = dense if name.startswith("dense") else config
            try:
                contender = Ours(model, predictor, c, n_tokens - n_steps, n_steps, "triton", **how)
                took = a_token(interleaved({name: contender}, args.rounds, group)[name])
            except torch.OutOfMemoryError:
                print(f"bench: {name} at {n_tokens} tokens: out of memory, left out", file=sys.stderr)
                contender = None
                torch.cuda.empty_cache()
                continue
            cache = contender.decoder.cache
            fraction = int(cache.fetched) / cache.wanted if getattr(cache, "wanted", 0) else None
            row = {"context": n_tokens, "name": name, "seconds": took, "fetched_fraction": fraction}
            results["measured"].append(row)
            shown = "–" if fraction is None else f"{fraction:.1%}"
            print(f"| {n_tokens:,} | {name} | {1e3 * took:,.2f} | {shown} |", flush=True)
            if args.trace and name == list(MEASURED)[-1] and n_tokens == args.contexts[-1]:
                results["timeline"], results["window"] = trace(contender, args.trace)
            del contender, cache
            torch.cuda.empty_cache()


def trace(contender, path):
    """Two tokens in torch.profiler, exported for Perfetto, and the same as the lanes of a timeline, a lane a stream."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        contender.step()
        contender.step()
    profiled.export_chrome_trace(str(path))
    return lanes_of_trace(json.loads(pathlib.Path(path).read_text()))


def lanes_of_trace(trace):
    """A chrome trace -> ({stream: [(start, seconds, kind)]}, (start, end)); only what ran on the GPU."""
    events = [event for event in trace["traceEvents"] if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not events:
        raise InputError("the profiler saw nothing on the GPU: it needs CUPTI, or permission to use it")
    origin = min(event["ts"] for event in events)
    lanes = {}
    for event in events:
        kind = "copy" if "copy_blocks" in event["name"] or event["cat"] == "gpu_memcpy" else "kernel"
        span = 1e-6 * (event["ts"] - origin), 1e-6 * event["dur"], kind
        lanes.setdefault(f"stream {event['args']['stream']}", []).append(span)
    return lanes, (0.0, *[max(start + took for spans in lanes.values() for start, took, _ in spans)])


# --------------------------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------------------------


def parse_args(argv):
    parser = OneLineParser(description=__doc__.splitlines()[0])
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument(
        "--kernels", action="store_true", help="each kernel, at Llama-3.1-8B's shapes in bf16: needs a GPU"
    )
    mode.add_argument("--end-to-end", action="store_true", help="decoding, dense and sparse, next to transformers")
    mode.add_argument("--offload", action="store_true", help="what crosses the link to the host, and how long it takes")
    parser.add_argument("--contexts", "--context", type=int, nargs="+", metavar="TOKENS", help="context lengths")
    parser.add_argument("--json", metavar="FILE", help="write every number to FILE")
    parser.add_argument("--png", metavar="FILE", help="draw the chart, or the timeline of --offload")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of --kernels: layers, each with a cache of its own")
    group = parser.add_argument_group("end to end, and offload")
    shapes = (
        "the default LLM, or random weights in the shape given (default: by device, and llama-3.1-8b for --offload)"
    )
    group.add_argument("--model-shape", choices=list(SHAPES), help=shapes)
    group.add_argument("--budget", type=int, default=Config.budget, help="tokens attended")
    group.add_argument("--calibration-interval", type=int, default=Config.calibration_interval, help="M")
    group.add_argument("--dense-layers", type=int, default=Config.dense_layers, help="first layers, always dense")
    group.add_argument("--stagger-calibration", action="store_true", help="spread calibration over steps by layer")
    group.add_argument("--rounds", type=int, default=7, help="of M tokens; the median counts")
    group.add_argument("--predictor", default=DEFAULT_PREDICTOR, help="the convolution")
    group = parser.add_argument_group("offload")
    group.add_argument("--link-gb-s", type=float, default=55.0, help="host to device; 55: PCIe 5 x16 (default: 55)")
    group.add_argument(
        "--memory-gb-s", type=float, default=0.0, help="a token's compute is the weights' bytes over this; 0: none"
    )
    group.add_argument(
        "--fetched-fraction", type=float, help="of the selection, a step (default: measured, default LLM)"
    )
    group.add_argument("--text-tokens", type=int, default=4096, help="context of that measurement (default: 4096)")
    group.add_argument("--text-steps", type=int, default=40, help="tokens decoded for it (default: 40)")
    group.add_argument("--trace", metavar="FILE.json", help="on a GPU: two tokens, for Perfetto and for the timeline")
    return parser.parse_args(argv)


def check(args):
    for path in (args.json, args.png, args.trace):
        if path and not (os.access(pathlib.Path(path).parent, os.W_OK) and not pathlib.Path(path).is_dir()):
            raise InputError(f"cannot write {path}: a file in a folder that exists would do")
    shortest = 128 if args.end_to_end else 1024
    if args.contexts and min(args.contexts) < shortest or args.layers < 1:
        raise InputError(f"contexts must be of {shortest} tokens or more, and layers 1 or more")
    if args.rounds < 2:
        raise InputError(f"--rounds {args.rounds}: at least 2 would do")
    if not (0 < args.link_gb_s < float("inf") and 0 <= args.memory_gb_s < float("inf")):
        raise InputError("--link-gb-s must be above 0, and --memory-gb-s not below it")
    if args.fetched_fraction is not None and not 0 <= args.fetched_fraction <= 1:
        raise InputError(f"--fetched-fraction {args.fetched_fraction}: it lies in 0 ... 1")
    if args.text_tokens < args.budget or args.text_steps < 1:
        raise InputError("--text-tokens must be at least the budget, or everything is kept, and --text-steps 1 or more")
    if args.png and importlib.util.find_spec("matplotlib") is None:
        raise InputError("--png needs matplotlib: pip install matplotlib")


def run(args):
    check(args)
    on_gpu = torch.cuda.is_available()
    if (args.kernels or on_gpu) and (kernels.triton is None or kernels.interpreted()) and (on_gpu or not args.kernels):
        raise InputError("needs Triton, and TRITON_INTERPRET unset")
    if args.kernels:
        if not on_gpu:
            raise InputError("no GPU here; the kernels are measured on one only")
        return bench_kernels(torch.device("cuda"), "triton", args.contexts or CONTEXTS, args.layers)
    config = Config(
        budget=args.budget,
        calibration_interval=args.calibration_interval,
        dense_layers=args.dense_layers,
        stagger_calibration=args.stagger_calibration,
    )
    predictor = load_predictor(args.predictor)
    if args.offload:
        args.model_shape = args.model_shape or "llama-3.1-8b"
        args.contexts = args.contexts or (4096, 8192, 16384, 32768, 65536, 131072)
        results = bench_offload(args, predictor, config)
        if on_gpu:
            measure_offload(args, predictor, config, results)
        return results
    shape = args.model_shape or ("llama-3.1-8b" if on_gpu else "smollm2-135m")
    m = SHAPES[shape] or default_llm_config()
    longest = m.context_len if on_gpu else 8192
    contexts = args.contexts or [n for n in (1024, 2048, 4096, 8192, 32768, 131072) if n <= min(longest, m.context_len)]
    if max(contexts) > m.context_len:
        raise InputError(f"the model's context is {m.context_len} tokens: {max(contexts)} is too long")
    dtype, device, backend = (torch.bfloat16, "cuda", "triton") if on_gpu else (torch.float32, "cpu", "torch")
    model, weights = model_of(shape, dtype, torch.device(device))
    return bench_end_to_end(model, weights, predictor, config, contexts, args.rounds, backend)


def write(results, args):
    try:
        if args.json:
            scratch = pathlib.Path(f"{args.json}.partial")
            scratch.write_text(json.dumps(results, indent=1))
            os.replace(scratch, args.json)
        if args.png:
            import plots

            draw = plots.draw_timeline if args.offload else plots.draw_kernels if args.kernels else plots.draw_speed
            draw(results, args.png)
    except OSError as error:
        raise InputError(f"cannot write the results ({error}): make room and run again") from None


def main(argv=None) -> int:
    def command():
        args = parse_args(argv)
        write(run(args), args)

    return exit_status("bench", command)


if __name__ == "__main__":
    sys.exit(main())
