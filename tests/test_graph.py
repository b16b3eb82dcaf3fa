"""The decoder with a CUDA graph, on a machine without a GPU: a fake graph, which freezes what a real one freezes.

A real graph records launches while it captures, and runs none. Every number of the host and every address is then
fixed: a replay reads and writes the memory of the capture, whatever the program's variables have come to mean.
"""

from contextlib import contextmanager
from functools import partial
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import attnpred
import kernels
from attnpred import Config, SparseDecoder
from tests.happens_before import HOST_WAITS
from tests.helpers import random_predictor, tiny_llama

KERNEL = type(kernels._decode_kernel)  # of all kernels, in Triton's interpreter


class FakeGraph:
    """Stands in for torch.cuda.CUDAGraph."""

    made = []

    def __init__(self):
        self.launches, self.replays = [], 0
        self.made.append(self)

    def replay(self):
        assert self.launches
        self.replays += 1
        for launch in self.launches:
            launch()


class Capture(TorchDispatchMode):
    """Stands in for torch.cuda.graph: the graph is given what would be launched; existing memory stays as it is.

    Operations that change a tensor do not run. Others run for the shapes of their results, which are poisoned and which
    a replay overwrites.
    """

    under_way = False

    def __init__(self, graph):
        super().__init__()
        self.launches, self.capture_stream, run = graph.launches, FakeStream(), KERNEL.run

        def run_later(*args, **kwargs):
            self.launches.append(partial(run, *args, **kwargs))

        self.no_launch = mock.patch.object(KERNEL, "run", run_later)

    def __enter__(self):
        assert self.capture_stream.used, "no step ran on this stream before: libraries are not ready"
        self.no_launch.start()
        Capture.under_way = True
        return super().__enter__()

    def __exit__(self, *error):
        self.no_launch.stop()
        Capture.under_way = False
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, operation = func.overloadpacket.__name__, partial(func, *args, **(kwargs or {}))
        assert name not in HOST_WAITS, f"{name}: the host waits for a step that is captured"
        if func._schema.is_mutable:
            assert name.endswith("_"), f"{name} may not return its first argument"
            self.launches.append(operation)
            return args[0]
        out = operation()
        if storages(out) <= storages((args, kwargs)):  # a view
            return out
        for tensor in tree_leaves(out):
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
        if "empty" not in name:
            self.launches.append(partial(compute_into, out, operation))
        return out


def storages(x):
    return {tensor.untyped_storage()._cdata for tensor in tree_leaves(x) if isinstance(tensor, torch.Tensor)}


def compute_into(out, operation):
    for old, new in zip(tree_leaves(out), tree_leaves(operation())):
        old.copy_(new)


class FakeStream:
    """A stream or an event. A step that is captured must not wait for others' work."""

    used = False

    def record_event(self):
        assert not Capture.under_way
        return self

    def wait_event(self, event):
        assert not Capture.under_way

    wait_stream = wait_event

    def synchronize(self):
        """Nothing is asynchronous here."""


@contextmanager
def use_stream(stream):
    stream.used = True
    yield


@contextmanager
def fake_gpu():
    current = FakeStream()
    cuda = dict(
        CUDAGraph=FakeGraph, graph=Capture, Stream=lambda _: FakeStream(), stream=use_stream,
        current_stream=lambda: current,
    )  # fmt: skip
    with (
        mock.patch.multiple(torch.cuda, **cuda),
        mock.patch.object(attnpred, "has_streams", lambda _: True),
        mock.patch.object(kernels, "n_multiprocessors", lambda _: 1),  # fewer programs to interpret
        mock.patch.object(FakeGraph, "made", []),
    ):
        yield


def decode(config, prompt_len, n_tokens, offload, graph):
    """Logits and recoveries after a prompt and n_tokens; how often each graph was replayed."""
    model = tiny_llama(n_layers=2, group=1, context_len=600)
    model.rope_by_matrix = True  # as on a GPU
    tokens = torch.arange(prompt_len + n_tokens) * 7 % 13
    with fake_gpu():
        decoder = SparseDecoder(config, model, random_predictor(), len(tokens), "triton", offload)
        if not graph:
            decoder.captured = None
        if decoder.history:
            decoder.history.backend = "torch"  # of predictions, which no graph holds: the interpreter is slow
        logits = [decoder.prefill(tokens[:prompt_len])]
        logits += [decoder.decode(token).clone() for token in tokens[prompt_len:, None]]
        assert decoder.position.item() == len(tokens) - 1 and decoder.cache.echoes > 0
        recovery = decoder.stats.recovery
        del decoder  # while the streams are faked: it waits for its own
        return torch.stack(logits), torch.stack(recovery), [graph.replays for graph in FakeGraph.made]


CONFIG = Config(block_size=8, sink_tokens=8, local_tokens=8, budget=48, history_len=6, calibration_interval=3,
                calibration_queries=3, echo_blocks=1)  # fmt: skip


@pytest.mark.parametrize("prompt_len, offload", [(90, False), (90, True), (50, False), (50, True)])
def test_a_graph_changes_nothing(prompt_len, offload):
    """The first prompt exceeds the budget; the second one's text outgrows it while the captured step is replayed."""
    assert CONFIG.fits(51) and not CONFIG.fits(58)
    logits, recovery, none = decode(CONFIG, prompt_len, 15, offload, graph=False)
    with_graph, its_recovery, found = decode(CONFIG, prompt_len, 15, offload, graph=True)
    assert torch.equal(with_graph, logits) and torch.equal(its_recovery, recovery)
    assert not none and found == [14]  # the first token ran before the capture
