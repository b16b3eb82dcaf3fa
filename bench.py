"""How fast the kernels are: against the card's own ceilings, and against what a user would take instead.

    python bench.py --kernels [--json FILE]

The ceilings are measured, not quoted: a copy on the device, a large matrix product, a copy from pinned host memory. The
bytes and multiply-adds held against them are the least that a path could do with, so waste shows as a lower share.
Every call of a measurement has the tensors of a layer of its own, as in a decode step: nothing is found in the L2 cache
that would not be there. The calls are captured into one CUDA graph, so the launches' cost on the host is left out.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F

import kernels

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


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", action="store_true", help="each kernel, at Llama-3.1-8B's shapes in bf16")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, metavar="TOKENS", help="context lengths")
    parser.add_argument("--layers", type=int, default=LAYERS, help="layers, each with a cache of its own")
    parser.add_argument("--json", metavar="FILE", help="write every number to FILE")
    args = parser.parse_args(argv)
    if not args.kernels:
        parser.error("nothing to measure: give --kernels")
    if min(args.contexts) < 1024 or args.layers < 1:
        parser.error("contexts must be of 1024 tokens or more, and layers 1 or more")
    if not torch.cuda.is_available():
        print("bench.py: no GPU here; the kernels are measured on one only", file=sys.stderr)
        return 2
    if kernels.triton is None or kernels._interpreted():
        print("bench.py: needs Triton, and TRITON_INTERPRET unset", file=sys.stderr)
        return 2
    results = bench_kernels(torch.device("cuda"), "triton", args.contexts, args.layers)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
