"""Counts what decoding launches and reads without a GPU, by running the decoder on tensors that have no memory.

Reading order: `Counting` counts launches and copies; `decode` runs a decoder inside of it; `bytes_per_token` reads the
decoder's own counters. tests/test_bench.py compares the counts with counts by hand.
"""

from collections import Counter, namedtuple
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import attnpred
import kernels
from attnpred import Config, Predictor, SparseDecoder
from model import LlamaConfig

LLAMA_31_8B = LlamaConfig(
    n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, d_model=4096, d_ff=14336, vocab_size=128256,
    context_len=131072, rope_theta=5e5, rms_eps=1e-5, tie_embeddings=False, attention_bias=False, mlp_bias=False,
    rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    | dict(original_max_position_embeddings=8192.0), eos_token_ids=(),
)  # fmt: skip
META, DTYPE = torch.device("meta"), torch.bfloat16

# --------------------------------------------------------------------------------------------------------------------
# Launches
# --------------------------------------------------------------------------------------------------------------------

Launch = namedtuple("Launch", "kernel grid arguments")  # arguments: {name: value}, with options such as num_warps
aten = torch.ops.aten


class Counting(TorchDispatchMode):
    """Counts the launches and copies that a GPU would get. Tensors made inside have no memory.

    `host` records which of them stand for host memory. An operation of PyTorch counts as one launch if it writes device
    memory, so views and allocations do not count. (A few operations, such as sort, launch several kernels.)
    """

    def __init__(self, host):
        super().__init__()
        self.host = host  # the storages that stand for host memory: {address: a tensor that keeps it alive}
        self.launches = []  # of Triton kernels
        self.operations = Counter()  # of PyTorch, by name
        # Bytes copied between device and host. Selected blocks are not counted, because which ones must be copied
        # depends on values.
        self.link_bytes = 0

    def on_host(self, tensor):
        return tensor.is_cpu or tensor.untyped_storage()._cdata in self.host

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, operation = dict(kwargs or {}), func.overloadpacket
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        device = kwargs.get("device")
        on_host = device.type == "cpu" if device else all(map(self.on_host, inputs))
        if operation is aten._assert_async:
            return None
        if operation is not aten.rms_norm:  # one kernel on a GPU; on the meta device PyTorch decomposes it
            with self:
                if operation is aten.to and on_host != self.on_host(inputs[0]):  # to PyTorch, both are on one device
                    return aten._to_copy(inputs[0], device=device, dtype=kwargs.get("dtype"))
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if device or not inputs:
            kwargs["device"] = META
        out = func(*args, **kwargs)
        tensor, known = tree_leaves(out)[0], {x.untyped_storage()._cdata for x in inputs}
        fresh = tensor.untyped_storage()._cdata not in known
        if fresh and on_host:
            self.host[tensor.untyped_storage()._cdata] = tensor
        ends = {self.on_host(x) for x in (tensor, *inputs)}
        writes = func._schema.is_mutable or fresh and "empty" not in str(operation)
        if not writes or ends == {True}:
            return out
        self.operations[str(operation)] += 1
        if operation in (aten.copy_, aten._to_copy) and len(ends) == 2:
            self.link_bytes += tensor.nbytes
        return out


@contextmanager
def counting(host=None):
    """Enter a `Counting` in which Triton kernels are recorded instead of launched, and the host pools no keys."""
    counts, pool_history = Counting({} if host is None else host), kernels.pool_history

    def launch(kernel, *arguments, grid, warmup, **options):
        given = dict(zip(kernel.arg_names, arguments)) | options
        counts.launches.append(Launch(kernel, grid, given))
        if kernel is kernels._copy_kernel and counts.on_host(given["destination_ptr"]):  # every block is copied
            counts.link_bytes += given["n"] * given["WORDS"] * given["destination_ptr"].element_size()

    def pool(q, k_cache, n_tokens, stride=1, backend="torch"):
        if backend == "triton":
            return pool_history(q, k_cache, n_tokens, stride, backend)
        rows = *q.shape[:2], -(-n_tokens // k_cache.shape[2])
        return q.new_empty(rows, dtype=torch.float32), q.new_empty(rows[:2], dtype=torch.float32)

    kind = type(kernels._pool_kernel)  # JITFunction, or the interpreter's substitute for it
    with patch.object(kind, "run", launch), patch.object(kernels, "pool_history", pool), counts:
        yield counts


class Stub:
    """Replaces a Llama where only the attention is counted."""

    def __init__(self, m: LlamaConfig, dtype=DTYPE):
        self.config, self.device, self.kv_dtype = m, META, dtype

    def __call__(self, tokens, positions, attend, fused=None):
        m = self.config
        for layer in range(m.n_layers):
            q, k, v = empty_heads(m, len(tokens), self.kv_dtype)
            if fused:
                fused.rotate(layer, torch.cat((q, k)), v)
                fused.multiply_gates(torch.empty(1, 2 * m.d_ff, dtype=self.kv_dtype, device=META))
            attend(layer, q, k, v)
        return torch.empty(self.config.vocab_size, device=META)

    def rope(self, layer):
        return torch.empty(self.config.head_dim, device=META), 1.0


def empty_heads(m, n_tokens, dtype):
    """q, k, v of n_tokens, without memory: (heads, T, D) each."""
    heads = torch.empty(n_tokens, m.n_heads + 2 * m.n_kv_heads, m.head_dim, dtype=dtype, device=META)
    return heads.transpose(0, 1).split((m.n_heads, m.n_kv_heads, m.n_kv_heads))


def decode(model, c: Config, n_tokens: int, steps: int, offload=False) -> tuple[SparseDecoder, list[Counting]]:
    """Decode up to n_tokens on tensors without memory.

    Returns the decoder and a `Counting` for the prompt and for each token. The decoder's Stats cover the last `steps`
    tokens. With an offloaded cache, two tokens are decoded before them: then the last ones include a whole selection,
    whose blocks are copied beside the token after it and attended to from the next one on.
    """
    late, counts, token = 2 * offload, [], torch.zeros(1, dtype=torch.int64, device=META)
    n_prompt = n_tokens - late - steps
    with counting() as making:
        decoder = SparseDecoder(c, model, Predictor(), n_tokens, "triton", offload)
    for step in range(late + steps + 1):
        with counting(making.host) as one:
            if step:
                attnpred.sample(decoder.decode(token))
            else:
                decoder.begin_prompt(torch.zeros(n_prompt, dtype=torch.int64, device=META))
                for layer in range(model.config.n_layers):
                    decoder.take_prompt(layer, *empty_heads(model.config, n_prompt, model.kv_dtype))
                decoder.n_tokens = n_prompt
                decoder.end_prompt()
        counts.append(one)
        if step == late:
            decoder.stats = attnpred.Stats(prefill_tokens=n_prompt)
    return decoder, counts


# --------------------------------------------------------------------------------------------------------------------
# Bytes
# --------------------------------------------------------------------------------------------------------------------


def weight_bytes(m: LlamaConfig, itemsize: int = 2) -> int:
    """Bytes of the weights that a token reads: all matrices of the layers and the head, but not the embeddings."""
    attention = 2 * m.d_model * m.head_dim * (m.n_heads + m.n_kv_heads)
    return itemsize * (m.n_layers * (attention + 3 * m.d_model * m.d_ff) + m.vocab_size * m.d_model)


def bytes_per_token(m: LlamaConfig, c: Config, n_tokens: int) -> dict[str, float]:
    """Bytes per token, on average over the interval that ends at n_tokens. K and V have 16 bits.

    Returns the counters of attnpred.Stats: attention, echo, calibration, choosing, their sum as total, and dense. Every
    echo is counted for every head, though some heads attend to its block already.
    """
    steps = c.interval(n_tokens)
    stats = decode(Stub(m), c, n_tokens, steps)[0].stats
    counted = {name: getattr(stats, f"{name}_bytes") / steps for name in ("attention", "calibration", "choosing")}
    block_bytes = 2 * c.block_size * m.head_dim * DTYPE.itemsize
    counted["echo"] = 0 if c.fits(n_tokens) else c.echo_blocks * m.n_layers * m.n_kv_heads * block_bytes
    return counted | dict(total=sum(counted.values()), dense=stats.dense_bytes / steps)
