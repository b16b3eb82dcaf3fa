"""The decoder with a CUDA graph, on a machine without a GPU: a fake graph, which freezes what a real one freezes.

A real graph records launches while it captures, and runs none. Every number of the host and every address is then
fixed: a replay reads and writes the memory of the capture, whatever the program's variables have come to mean.
"""

import itertools
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import attnpred
import kernels
from attnpred import Config, SparseDecoder, decode_one_token, prefill
from tests.helpers import random_predictor, tiny_llama
from tests.test_attnpred import GROWS

HOST_READS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select"}
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
    a replay overwrites. Only the threads that capture are seen, as with "thread_local".
    """

    under_way = False

    def __init__(self, graph, capture_error_mode="global"):
        super().__init__()
        assert capture_error_mode == "thread_local", "the thread that pools would spoil the capture"
        self.launches, self.capture_stream = graph.launches, FakeStream()
        launch = self.later(KERNEL.run)
        self.patches = mock.patch.object(KERNEL, "run", launch), mock.patch.object(Capture, "under_way", True)

    def __enter__(self):
        assert self.capture_stream.used, "no step ran on this stream before: libraries are not ready"
        for patch in self.patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        for patch in self.patches:
            patch.stop()
        return super().__exit__(*error)

    def later(self, run):
        """A function that launches a kernel when the graph is replayed."""
        return lambda *args, **kwargs: self.launches.append(partial(run, *args, **kwargs))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, operation = func.overloadpacket.__name__, partial(func, *args, **(kwargs or {}))
        assert name not in HOST_READS, f"{name}: the host waits for a step that is captured"
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
    """A stream or an event; nothing is asynchronous here. A step that is captured must not wait for others' work."""

    used = False

    def record_event(self):
        assert not Capture.under_way
        return self

    def wait_event(self, event):
        assert not Capture.under_way

    wait_stream = wait_event

    def synchronize(self):
        assert not Capture.under_way or threading.current_thread() is not threading.main_thread()


@contextmanager
def use_stream(stream):
    stream.used = True
    yield


@contextmanager
def fake_gpu():
    current = FakeStream()
    fakes = dict(
        CUDAGraph=FakeGraph, graph=Capture, Stream=lambda _: FakeStream(), stream=use_stream,
        current_stream=lambda: current,
    )  # fmt: skip
    patches = [(torch.cuda, name, fake) for name, fake in fakes.items()]
    patches.append((attnpred, "uses_streams", lambda _: True))
    patches.append((kernels, "n_multiprocessors", lambda _: 1))  # fewer programs to interpret
    patches.append((FakeGraph, "made", []))
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch))
        yield


# --------------------------------------------------------------------------------------------------------------------
# The fake on small programs, then the decoder
# --------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_a_graph_freezes_numbers_and_addresses():
    with fake_gpu():
        x, counter, number, graph = torch.arange(3.0), torch.zeros(1), 5, torch.cuda.CUDAGraph()
        kept, capture = x, torch.cuda.graph(graph, capture_error_mode="thread_local")
        with torch.cuda.stream(capture.capture_stream):
            x + 1
        with capture:
            counter += 1
            y = x.view(3, 1)[1:].flatten() * number + counter
            y[0] = -1
        assert y.isnan().all() and counter.item() == 0 and kept.tolist() == [0, 1, 2]  # nothing ran
        address = y.data_ptr()
        x.fill_(7)
        x, number = torch.zeros(3), 6  # the graph knows the old ones
        for turn in (1, 2):
            graph.replay()
            assert y.tolist() == [-1, 35 + turn] and y.data_ptr() == address and counter.item() == turn
        with pytest.raises(AssertionError, match="the host waits"), capture:
            (x + 1).sum().item()


def decode(config, prompt_len, n_tokens, offload, graph):
    """Logits and recoveries after a prompt and n_tokens; how often each graph was replayed; for each token the shapes
    of its lists, and whether it keeps a query."""
    model, steps = tiny_llama(n_layers=2, group=1), []
    model.rope_by_matrix = True  # as on a GPU
    tokens = torch.arange(prompt_len + n_tokens) * 7 % 61
    with fake_gpu():
        decoder = SparseDecoder(config, model, random_predictor(), len(tokens), "triton", offload, graph)
        decoder.backend = "torch"  # of prediction and selection, which no graph holds: the interpreter is slow
        logits = [prefill(model, decoder, tokens[:prompt_len])]
        for token in tokens[prompt_len:, None]:
            logits.append(decode_one_token(model, decoder, token).clone())
            steps.append((decoder.lists and decoder.lists.shapes(), decoder.last_query == decoder.n_tokens))
        assert decoder.position.item() == len(tokens) - 1
        recovery = decoder.stats.recovery
        del decoder  # while the streams are faked: it waits for its own
        return torch.stack(logits), torch.stack(recovery), [graph.replays for graph in FakeGraph.made], steps


def expected_replays(steps):
    """The first plain step after a change of shape is captured, the others replay it; no step that keeps a query is."""
    by_shape = [list(group) for _, group in itertools.groupby(steps, lambda step: str(step[0]))]
    plain = [sum(not keeps_query for _, keeps_query in group) for group in by_shape]
    return [count - 1 for count in plain if count]


CONFIG = Config(block_size=8, sink_tokens=8, local_tokens=8, budget=40, history_len=6, calibration_interval=4)
LONG, GROWING = 90, 41  # prompts: the budget is 40 tokens and a partial block
CASES = [  # offloaded or not, the prompt, selection_delay, dense_layers
    (False, LONG, 0, 0), (True, LONG, 2, 0), (False, GROWING, 1, 0), (False, GROWING, 2, 1), (True, GROWING, 1, 0)
]  # fmt: skip


@pytest.mark.parametrize("offload, prompt_len, delay, dense_layers", CASES)
def test_a_graph_changes_nothing(offload, prompt_len, delay, dense_layers):
    config = replace(CONFIG, selection_delay=delay, dense_layers=dense_layers)
    logits, recovery, none, steps = decode(config, prompt_len, 15, offload, graph=False)
    with_graph, its_recovery, replays, _ = decode(config, prompt_len, 15, offload, graph=True)
    assert torch.equal(with_graph, logits) and torch.equal(its_recovery, recovery)
    assert not none and replays == expected_replays(steps)
    if prompt_len == LONG:  # steps 4, 8 and 12 keep a query, step 1 is captured
        assert replays == [11]
    elif not offload:  # there are lists from step 9, 10 or 7 on: the selections end after steps 4 and 8, or later
        assert replays == [[5, 5], [6, 4], [4, 6]][delay]


def test_lists_that_grow_with_the_interval():
    """At 257 tokens M goes from 8 to 16: new lists have more room, and a new graph."""
    logits, recovery, _, steps = decode(GROWS, 232, 28, True, graph=False)
    with_graph, its_recovery, replays, _ = decode(GROWS, 232, 28, True, graph=True)
    assert torch.equal(with_graph, logits) and torch.equal(its_recovery, recovery)
    assert replays == expected_replays(steps) == [13, 10]  # new lists at step 17; steps 8, 16 and 24 keep a query


@pytest.mark.parametrize("changes", [dict(history_rows="every"), dict(calibration_interval=1)])
def test_steps_that_keep_queries_are_never_captured(changes):
    *_, replays, steps = decode(replace(CONFIG, **changes), LONG, 4, False, graph=True)
    assert not replays and all(keeps_query for _, keeps_query in steps)
