"""The happens-before checker on small programs and against brute force; then the decoder under it."""

import dataclasses
import functools
import itertools
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attnpred
import kernels
from attnpred import Config, SparseDecoder, decode_one_token, prefill
from tests.happens_before import Checker, tensors
from tests.helpers import random_predictor, tiny_llama

# --------------------------------------------------------------------------------------------------------------------
# What functions that launch kernels read and write, other than the results that they return
# --------------------------------------------------------------------------------------------------------------------


def touched_by_pool_history(a):
    full, more = divmod(a.n_tokens, a.k_cache.shape[2])
    return [a.q, a.k_cache[:, :full], a.k_cache[:, full : full + 1, :more]], []


def touched_by_predict(a):
    columns = slice(a.start, a.end)
    return [a.history[:, :, columns], *tensors(a.weights)], [a.contributions[:, :, columns]]


def touched_by_sparse_decode(a):
    reads, writes, block_size = [a.q, a.starts, a.lengths], [], a.k_pool.shape[1]
    for start, length in zip(a.starts.tolist(), a.lengths.tolist()):
        blocks = a.table[start : start - (-length // block_size)]
        for i, block in enumerate(blocks.tolist()):
            valid = slice(min(block_size, length - i * block_size))
            reads += [a.k_pool[block, valid], a.v_pool[block, valid]]
        reads.append(blocks)
        writes += [] if a.block_max is None else [a.block_max[:, start : start + len(blocks)]]
    return reads, writes


def touched_by_copy_blocks(a):
    pairs = [(i, j) for i, j in zip(a.source_index.tolist(), a.destination_index.tolist()) if i >= 0]
    return [a.source_index, a.destination_index, *(a.source[i] for i, _ in pairs)], [a.destination[j] for _, j in pairs]


def touched_by_write_at(a):
    return [a.position, a.values], [a.memory[..., at : at + 1, :] for at in a.position.tolist()]


DECLARED = {
    (kernels, "pool_history"): touched_by_pool_history,
    (kernels, "predict"): touched_by_predict,
    (kernels, "select_blocks"): lambda a: ([a.scores], []),
    (kernels, "sparse_decode"): touched_by_sparse_decode,
    (kernels, "write_rows"): lambda a: ([a.block_max, a.lse, a.columns, a.starts, a.lengths], [a.rows]),
    (kernels, "assign_slots"): lambda a: ([a.wanted, a.held], []),
    (kernels, "copy_blocks"): touched_by_copy_blocks,
    (attnpred, "causal_attention"): lambda a: ([a.q, a.k, a.v], []),
    (attnpred, "write_at"): touched_by_write_at,
}


# --------------------------------------------------------------------------------------------------------------------
# Small programs, each correct if `ordered`, else with one defect; the random programs below have all other orders
# --------------------------------------------------------------------------------------------------------------------


def side_stream():
    """A side stream, which waits for what the current stream has done until now."""
    side = torch.cuda.Stream()
    side.wait_event(torch.cuda.current_stream().record_event())
    return side


def other_dtype(ordered):
    x = torch.zeros(6, dtype=torch.int32, device="cuda")
    side = side_stream()
    x[1:3].fill_(1)
    with torch.cuda.stream(side):
        x.view(torch.int16)[6 if ordered else 5 :].zero_()
    return "zero_ .* writes what that fill_ .* writes"


def copy_to_new_host_memory(ordered):
    x = torch.ones(4, device="cuda")
    host = x.to("cpu", non_blocking=not ordered)
    host += 1
    return r"add_ \(.*, host\) writes what that to .* writes"


def copy_to_pageable_memory(ordered):
    x, host = torch.ones(4, device="cuda"), torch.zeros(4, pin_memory=not ordered)
    host.copy_(x, non_blocking=True)
    assert host.tolist() == [1] * 4
    return r"tolist \(.*, host\) reads what that copy_ .* writes"


def copy_from_pageable_memory(ordered):
    x, host = torch.zeros(4, device="cuda"), torch.ones(4)
    x.copy_(host, non_blocking=not ordered)
    host.fill_(2)  # was copied at the launch
    with torch.cuda.stream(torch.cuda.Stream()):
        x.add_(1)
    return "add_ .* writes what that copy_ .* writes"


def number_of_the_host(ordered):
    x, number, side = torch.zeros(4, device="cuda"), torch.tensor(2.0), torch.cuda.Stream()
    x.mul_(number)
    x.copy_(number)
    number.fill_(3)  # was passed at the launch
    if ordered:
        side.wait_event(torch.cuda.current_stream().record_event())
    with torch.cuda.stream(side):
        x.add_(1)
    return "add_ .* writes what that copy_ .* writes"


def freed_while_another_stream_uses_it(ordered):
    x, side = torch.ones(4, device="cuda"), side_stream()
    with torch.cuda.stream(side):
        x.add_(1)
    view = x[1:]
    del x
    torch.ones(1, device="cuda")  # elsewhere: the view keeps the memory
    del view
    if ordered:
        torch.cuda.current_stream().wait_event(side.record_event())
    torch.ones(1, device="cuda")
    return "ones .* is given the freed memory that add_ .* writes"


def registered_memory_released(ordered):
    host, x = torch.zeros(4), torch.ones(4, device="cuda")
    torch.cuda.cudart().cudaHostRegister(host.data_ptr(), 16, 0)
    x.copy_(host, non_blocking=True)
    if ordered:
        torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(host.data_ptr())
    return r"cudaHostUnregister \(.*, host\) of the memory that copy_ .* reads"


def copy_blocks_on_a_side_stream():
    """Blocks 3 and 0 of five go to slots 1 and 4 of six. Returns both pools."""
    host, slots = torch.ones(5, 4, pin_memory=True), torch.zeros(6, 4, device="cuda")
    source, slot = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([3, -1, 0], [1, 2, 4]))
    with torch.cuda.stream(side_stream()):
        kernels.copy_blocks(host, slots, source, slot, "triton")
    return host, slots


def blocks_written(ordered):
    _, slots = copy_blocks_on_a_side_stream()
    slots[2:4].zero_()
    slots[0 if ordered else 1].zero_()
    return "zero_ .* writes what that copy_blocks .* writes"


def blocks_read(ordered):
    host, _ = copy_blocks_on_a_side_stream()
    host[4].zero_()
    host[1 if ordered else 0 : 3].zero_()
    return r"zero_ \(.*, host\) writes what that copy_blocks .* reads"


def blocks_attended_to(ordered):
    pool = torch.rand(6, 8, 16, device="cuda")
    table, starts, lengths = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([4, 2, 0], [0, 1], [5, 10]))
    q, block_max, side = torch.rand(2, 16, device="cuda"), torch.zeros(1, 3, device="cuda"), side_stream()
    out, lse = kernels.sparse_decode(q, pool, pool, table, starts, lengths, block_max, "triton")
    with torch.cuda.stream(side):
        pool[1::2].zero_()
        pool[4, 5:].zero_()
        pool[0, 2 if ordered else 1 :].zero_()
    assert out.isfinite().all()
    return "zero_ .* writes what that sparse_decode .* reads"


PROGRAMS = [
    other_dtype, copy_to_new_host_memory, copy_to_pageable_memory, copy_from_pageable_memory, number_of_the_host,
    freed_while_another_stream_uses_it, registered_memory_released, blocks_written, blocks_read, blocks_attended_to,
]  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_a_defect_is_reported_and_nothing_else(program):
    with Checker(DECLARED) as checker:
        program(True)
    assert not checker.races
    with Checker(DECLARED) as checker:
        expected = program(False)
    assert len(checker.races) == 1, checker.races
    assert re.search(expected, *checker.races)


def test_devices_do_not_mix():
    with Checker(), pytest.raises(RuntimeError, match="test_streams.py:.* on the host and on the device"):
        torch.ones(4, device="cuda") + torch.ones(4)
    with Checker(DECLARED), pytest.raises(RuntimeError, match="copy_blocks .*test_streams.py:.* pageable host memory"):
        index = torch.zeros(1, dtype=torch.int32, device="cuda")
        kernels.copy_blocks(torch.ones(2, 4), torch.ones(2, 4, device="cuda"), index, index, "triton")


# --------------------------------------------------------------------------------------------------------------------
# Random programs, against a graph of what precedes what
# --------------------------------------------------------------------------------------------------------------------

STREAMS, THREADS = range(2), ["host", "worker"]
KINDS = [*["touch"] * 6, "record", "record", "wait", "wait", "synchronize", "result", "item", "all"]
AREAS = [np.s_[:2, :], np.s_[2:, :], np.s_[:, ::2], np.s_[:, 1:2], np.s_[1:3, 2:], np.s_[3:, 3:]]  # of shared memory
ACTION = st.tuples(
    st.sampled_from(KINDS), st.sampled_from([*THREADS, *STREAMS]), st.booleans(), st.sampled_from(AREAS),
    st.sampled_from(STREAMS), st.sampled_from(THREADS), st.integers(0, 1),
)  # fmt: skip


def racy_by_brute_force(program):
    """Whether each action races with an earlier one: by the paths of a graph whose edges order two steps."""
    before, last, events, futures, touches, racy = {}, {}, {}, {}, [], []

    def step(actor, *others):
        """The next node of an actor, after these other nodes and after its launch by the host."""
        others = [node for node in (last.get(actor), *others) if node is not None]
        if actor != "host":
            others.append(step("host"))
        node = last[actor] = len(before)
        before[node] = set(others).union(*(before[other] for other in others))
        return node

    for kind, actor, writes, area, stream, thread, number in program:
        racy.append(False)
        if kind == "touch":
            node, cells = step(actor), np.zeros((4, 4), bool)
            cells[area] = True
            for other, other_actor, other_writes, other_cells in touches:
                if actor != other_actor and (writes or other_writes) and (cells & other_cells).any():
                    racy[-1] |= other not in before[node]
            touches.append((node, actor, writes, cells))
        elif kind == "record":
            events[number] = step(stream)
        elif kind == "wait":
            step(stream, events.get(number))
        elif kind == "synchronize":
            step(thread, events.get(number))
        elif kind == "result":
            step("host", futures.get(number))
        elif kind == "item":
            step("host", step(stream))
        elif kind == "all":
            step("host", *(last.get(stream) for stream in STREAMS))
        if "worker" == (actor if kind == "touch" else thread if kind == "synchronize" else None):
            futures[number] = last["worker"]
    return racy


def racy_by_the_checker(program):
    racy = []
    with Checker() as checker:
        shared, executor, futures = torch.zeros(4, 4, dtype=torch.int16, pin_memory=True), ThreadPoolExecutor(1), {}
        checker.memory(shared).last.clear()
        streams, own = [torch.cuda.Stream() for _ in STREAMS], []
        events = [streams[0].record_event() for _ in range(2)]  # nothing has been done yet
        for each in streams:
            with torch.cuda.stream(each):
                own.append(torch.zeros(4, 4, dtype=torch.int16, device="cuda"))
        for kind, actor, writes, area, stream, thread, number in program:
            job = None
            if kind == "touch" and actor in STREAMS:
                target, source = (shared, own[actor]) if writes else (own[actor], shared)
                with torch.cuda.stream(streams[actor]):
                    target[area].copy_(source[area], non_blocking=True)
            elif kind == "touch":
                thread, job = actor, shared[area].zero_ if writes else shared[area].tolist
            elif kind == "record":
                events[number] = streams[stream].record_event()
            elif kind == "wait":
                streams[stream].wait_event(events[number])
            elif kind == "synchronize":
                job = events[number].synchronize
            elif kind == "result" and number in futures:
                futures[number].result()
            elif kind == "item":
                with torch.cuda.stream(streams[stream]):
                    own[stream][0, 0].item()
            elif kind == "all":
                torch.cuda.synchronize()
            if job and thread == "worker":
                futures[number] = executor.submit(job)
            elif job:
                job()
            racy.append(bool(checker.races))
            checker.races.clear()
    return racy


@settings(max_examples=300)
@given(st.lists(ACTION, min_size=10, max_size=40))
def test_random_programs_race_where_nothing_orders_them(program):
    assert racy_by_the_checker(program) == racy_by_brute_force(program)


# --------------------------------------------------------------------------------------------------------------------
# The decoder
# --------------------------------------------------------------------------------------------------------------------

CONFIG = Config(block_size=8, sink_tokens=8, local_tokens=8, budget=48, history_len=8)
CACHES, ROWS = (False, True), ("true", "every")  # offloaded or not; history_rows
CASES = [  # the cache, history_rows, selection_delay, calibration_interval, selection_interval
    *itertools.product(CACHES, ROWS, (0, 1, 2), [4], [4]),
    *itertools.product(CACHES, ROWS, [1], [3], [4]),
    *itertools.product(CACHES, ["true"], [2], [6], [3]),
]


def to_device(module):
    for part in module.modules():
        for named in (part._parameters, part._buffers):
            named.update({name: tensor.data.to("cuda") for name, tensor in named.items() if tensor is not None})
    return module


def decode(model, predictor, offload, rows, delay, calibration, selection, backend):
    """Logits of a prompt that fits the budget and of 60 tokens or more; then the decoder is dropped.

    The host never waits for a token. The last selection has just ended (delay 0 and 1) or is under way (2).
    """
    config = dataclasses.replace(
        CONFIG, history_rows=rows, selection_delay=delay, calibration_interval=calibration, selection_interval=selection
    )
    tokens = torch.arange(97 + min(delay, 1), device=model.device) * 7 % 61
    decoder = SparseDecoder(config, model, predictor, len(tokens), backend=backend, offload=offload, graph=False)
    logits = [prefill(model, decoder, tokens[:37])]
    logits += [decode_one_token(model, decoder, token) for token in tokens[37:, None]]
    assert not decoder.fits
    return torch.stack(logits)


@functools.cache
def checked(case, removed=None):
    """The checker after a decoder's run, and the logits."""
    with Checker(DECLARED, removed) as checker:
        logits = decode(to_device(tiny_llama(n_layers=2)), to_device(random_predictor()), *case, "triton")
        torch.zeros(1, device="cuda")  # may be given the dropped decoder's memory
        return checker, logits.cpu()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decoding_has_no_race(case):
    checker, logits = checked(case)
    assert not checker.races
    assert len(checker.streams) == 2 and all(len(stream.operations) > 100 for stream in checker.streams)
    assert bool(checker.worker.operations) == case[0]
    expected = decode(tiny_llama(n_layers=2), random_predictor(), *case, "torch")
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


STREAM_WAITS, THREAD_WAITS = {"record_event", "wait_event"}, {"synchronize", "result"}


@pytest.mark.parametrize("offload, kinds", [(False, STREAM_WAITS), (True, STREAM_WAITS | THREAD_WAITS)])
def test_every_wait_is_needed(offload, kinds):
    """Each call that orders something: without it there is a race, in one case at least."""
    cases = [case for case in CASES if case[0] == offload]
    sites = set.union(*(checked(case)[0].sites for case in cases))
    assert {site.split()[1] for site in sites} == kinds
    for site in sorted(sites):
        those = (case for case in cases if site in checked(case)[0].sites)
        assert any(checked(case, site)[0].races for case in those), f"{site} is not needed"


def test_the_host_waits_for_the_tokens_that_it_reads():
    def run(removed=None):
        with Checker(DECLARED, removed) as checker:
            model = to_device(tiny_llama(n_layers=1))
            decoder = SparseDecoder(CONFIG, model, to_device(random_predictor()), 60, backend="triton", graph=False)
            assert len(list(attnpred.generate(model, decoder, list(range(40)), 6))) == 6
            del decoder
            return checker

    checker = run()
    assert not checker.races
    sites = checker.sites - checked(CASES[0])[0].sites  # those of read_later
    assert len(sites) == 2 and all(run(site).races for site in sites)
