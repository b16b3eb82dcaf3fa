"""The happens-before checker on small programs; then the decoder under it."""

import dataclasses
import functools
import itertools
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

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
        reads.append(blocks)
        writes.append(a.block_max[:, start : start + len(blocks)])
        for block in blocks.tolist():
            reads += [a.k_pool[block, :length], a.v_pool[block, :length]]
            length -= block_size
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
    (kernels, "write_rows"): lambda a: ([a.block_max, a.lse, a.block, a.starts, a.lengths], [a.rows]),
    (kernels, "assign_slots"): lambda a: ([a.wanted, a.held], []),
    (kernels, "copy_blocks"): touched_by_copy_blocks,
    (attnpred, "causal_attention"): lambda a: ([a.q, a.k, a.v], []),
    (attnpred, "write_at"): touched_by_write_at,
}


# --------------------------------------------------------------------------------------------------------------------
# Small programs, each correct if `ordered`, else with the races that it returns, in the order of its lines
# --------------------------------------------------------------------------------------------------------------------


def side_stream():
    """A side stream, which waits for what the current stream has done until now."""
    side = torch.cuda.Stream()
    side.wait_event(torch.cuda.current_stream().record_event())
    return side


def neighbouring_bytes(ordered):
    x, side = torch.zeros(3, 4, dtype=torch.int32, device="cuda"), torch.cuda.Stream()
    event = torch.cuda.current_stream().record_event()
    x[:, 1:3].fill_(1)  # bytes 4 ... 11 of each row, after the event
    side.wait_event(event)
    with torch.cuda.stream(side):
        x.view(torch.int8)[:, : 4 if ordered else 5].zero_()
        x.view(torch.int8)[:, 12 if ordered else 11 :].zero_()
    return ["zero_ .* writes what that fill_ .* writes"] * 2


def freed_while_another_stream_uses_it(ordered):
    x, y, side = torch.ones(4, device="cuda"), torch.ones(4, device="cuda"), side_stream()
    with torch.cuda.stream(side):
        x.add_(1)
    view = x[1:]
    del x
    torch.ones(1, device="cuda")  # elsewhere: the view keeps the memory
    del view
    y.cpu()  # allocates nothing on the device
    del y
    torch.cuda.current_stream().record_event().synchronize()  # not the side stream
    if ordered:
        torch.cuda.synchronize()
    torch.ones(1, device="cuda")
    return ["ones .* is given the freed memory that add_ .* writes"]


def blocks_copied(ordered):
    host, slots = torch.ones(5, 4, pin_memory=True), torch.zeros(6, 4, device="cuda")
    source, slot = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([3, -1, 0], [1, 2, 4]))
    with torch.cuda.stream(side_stream()):
        kernels.copy_blocks(host, slots, source, slot, "triton")
    slots[0::5].zero_()
    slots[2 if ordered else 1 : 4].zero_()
    host[1 if ordered else 0 : 3].zero_()
    host[4].zero_()
    return [f"zero_ .* writes what that copy_blocks .* {how}" for how in ("writes", "reads")]


def blocks_attended_to(ordered):
    pool = torch.rand(6, 8, 16, device="cuda")
    table, starts, lengths = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([4, 2, 0], [0, 1], [5, 10]))
    q, block_max, side = torch.rand(2, 16, device="cuda"), torch.zeros(1, 3, device="cuda"), side_stream()
    out, lse = kernels.sparse_decode(q, pool, pool, table, starts, lengths, block_max, "triton")
    q[0, 0] = 1  # a number goes along with the launch: the host waits for nothing
    with torch.cuda.stream(side):
        pool[1::2].zero_()
        pool[4, 5:].zero_()
        pool[0, 2 if ordered else 1 :].zero_()
        (table if ordered else out).sum()
    assert out.isfinite().all()
    return ["sum .* reads what that sparse_decode .* writes", "zero_ .* writes what that sparse_decode .* reads"]


def jobs(ordered):
    host, executor = torch.zeros(4, pin_memory=True), ThreadPoolExecutor(1)
    host.copy_(torch.ones(4, device="cuda"))  # the host waits
    first, second = (executor.submit(half.add_, 1) for half in host.split(2))
    (second if ordered else first).result()
    assert host[2:].tolist() == [2, 2]
    return [r"resolve_conj \(.*, host\) reads what that add_ \(.*, worker\) writes"]


PROGRAMS = [neighbouring_bytes, freed_while_another_stream_uses_it, blocks_copied, blocks_attended_to, jobs]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_a_race_is_reported_and_nothing_else(program):
    with Checker(DECLARED) as checker:
        program(True)
    assert not checker.races
    with Checker(DECLARED) as checker:
        expected = program(False)
    assert len(checker.races) == len(expected), checker.races
    assert all(map(re.search, expected, sorted(checker.races)))


def test_streams_use_no_pageable_memory():
    host = torch.ones(2, 4)
    with Checker(DECLARED):
        device, index = torch.ones(2, 4, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
        with pytest.raises(RuntimeError, match="copy_ .*test_streams.py:.* pageable"):
            device.copy_(host, non_blocking=True)
        with pytest.raises(RuntimeError, match="copy_blocks .*test_streams.py:.* pageable"):
            kernels.copy_blocks(host, device, index, index, "triton")


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
    assert decoder.selecting
    return torch.stack(logits)


@functools.cache
def checked(case, removed=None):
    """The checker after a decoder's run, and the logits."""
    model = tiny_llama(n_layers=2)
    with Checker(DECLARED, removed) as checker:
        logits = decode(to_device(model), to_device(random_predictor()), *case, "triton")
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


def test_every_wait_is_needed():
    """Each call that orders something: without it there is a race, in one case at least."""
    sites = set.union(*(checked(case)[0].sites for case in CASES))
    assert {site.split()[1] for site in sites} == {"record_event", "wait_event", "synchronize", "result"}
    for site in sorted(sites):
        those = (case for case in CASES if site in checked(case)[0].sites)
        assert any(checked(case, site)[0].races for case in those), f"{site} is not needed"


def test_the_host_waits_for_the_tokens_that_it_reads():
    def run(removed=None):
        model = tiny_llama(n_layers=1)
        with Checker(DECLARED, removed) as checker:
            model = to_device(model)
            decoder = SparseDecoder(CONFIG, model, to_device(random_predictor()), 60, backend="triton", graph=False)
            assert len(list(attnpred.generate(model, decoder, list(range(40)), 6))) == 6
            del decoder
            return checker

    checker = run()
    assert not checker.races
    sites = checker.sites - checked(CASES[0])[0].sites  # those of read_later
    assert len(sites) == 2 and all(run(site).races for site in sites)
