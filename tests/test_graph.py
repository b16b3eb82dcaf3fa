"""The decoder with a CUDA graph, on a machine without a GPU: a fake graph, which freezes what a real one freezes.

A real graph records launches while it captures, and runs none. Every number of the host and every address is then
fixed: a replay reads and writes the memory of the capture, whatever the program's variables have come to mean.
"""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import attnpred
import kernels
from attnpred import Config, SparseDecoder
from tests.happens_before import HOST_WAITS
from tests.helpers import random_predictor, tiny_llama

# Of a step; each runs its PyTorch reference.
LAUNCHERS = "find_echoes", "rotate_and_write", "sparse_decode", "swiglu", "copy_blocks"


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
        self.launches, self.capture_stream = graph.launches, FakeStream()
        recorded = {name: partial(self.launch, getattr(kernels, name)) for name in LAUNCHERS}
        self.no_launch = mock.patch.multiple(kernels, **recorded)

    def __enter__(self):
        assert self.capture_stream.used, "no step ran on this stream before: libraries are not ready"
        self.no_launch.start()
        Capture.under_way = True
        return super().__enter__()

    def __exit__(self, *error):
        self.no_launch.stop()
        Capture.under_way = False
        return super().__exit__(*error)

    def launch(self, launcher, *args):
        operation = partial(launcher, *args)
        if launcher.__name__ == "rotate_and_write":  # it writes K and V, too
            return self.poison(torch.empty_like(args[0]), operation)
        if launcher.__name__ != "copy_blocks":
            with _disable_current_modes():
                return self.poison(operation(), operation)
        self.launches.append(operation)

    def poison(self, out, operation):
        for tensor in tree_leaves(out):
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
        self.launches.append(partial(compute_into, out, operation))
        return out

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, operation = func.overloadpacket.__name__, partial(func, *args, **(kwargs or {}))
        assert name not in HOST_WAITS, f"{name}: the host waits for a step that is captured"
        if func._schema.is_mutable:
            self.launches.append(operation)
            if "out" in (kwargs or {}):
                return kwargs["out"]
            assert name.endswith("_"), f"{name} may not return its first argument"
            return args[0]
        out = operation()
        if storages(out) <= storages((args, kwargs)):  # a view
            return out
        return self.poison(out, operation)


def storages(x):
    return {tensor.untyped_storage()._cdata for tensor in tree_leaves(x) if isinstance(tensor, torch.Tensor)}


def compute_into(out, operation):
    for old, new in zip(tree_leaves(out), tree_leaves(operation())):
        old.copy_(new)


class FakeStream:
    """A stream or an event. A step that is captured must not wait for others' work."""

    used = False

    def record_event(self, other=None):
        assert not Capture.under_way
        return self

    wait_event = wait_stream = record_event


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
        mock.patch.object(kernels, "use_triton", lambda *_: False),
        mock.patch.object(kernels, "n_multiprocessors", lambda _: 4),
        mock.patch.object(FakeGraph, "made", []),
    ):
        yield


def decode(config, prompt_len, n_tokens, offload, graph):
    """Logits, recoveries and echoes after a prompt and n_tokens; how often each graph was replayed."""
    model = tiny_llama(n_layers=2, group=1, context_len=600)
    tokens = torch.randint(3, (prompt_len + n_tokens,), generator=torch.Generator().manual_seed(0))
    with fake_gpu():
        decoder = SparseDecoder(config, model, random_predictor(), len(tokens), "triton", offload)
        assert decoder.captured
        decoder.captured = decoder.captured if graph else None
        logits = [decoder.prefill(tokens[:prompt_len])]
        logits += [decoder.decode(token).clone() for token in tokens[prompt_len:, None]]
        assert decoder.position.item() == len(tokens) - 1 and decoder.interval == config.interval(len(tokens))
        stats = decoder.stats
        del decoder  # while the streams are faked: it waits for its own
        return torch.stack(logits), torch.stack(stats.recovery), stats.echoes.sum(), [g.replays for g in FakeGraph.made]


CONFIG = Config(
    block_size=8, sink_tokens=8, local_tokens=8, budget=40, history_len=6, calibration_interval=4, echo_blocks=2
)
GROWS = replace(CONFIG, calibration_interval="auto", budget=32, echo_blocks=1)
CASES = [(CONFIG, 90, 15), (CONFIG, 41, 22), (GROWS, 505, 40)]  # config, tokens of the prompt, tokens decoded


@pytest.mark.parametrize("offload", [False, True], ids=["resident", "offloaded"])
@pytest.mark.parametrize("case", CASES, ids=["long", "outgrows the budget", "M goes from 16 to 32"])
def test_a_graph_changes_nothing(case, offload):
    *expected, none = decode(*case, offload, graph=False)
    *found, replays = decode(*case, offload, graph=True)
    assert all(map(torch.equal, found, expected)) and expected[-1] > 0
    assert not none and replays == [case[2] - 1]  # one graph, of the second token
