"""The happens-before checker on small programs; then the decoder under it."""

import dataclasses
import functools
import re

import pytest
import torch

import attnpred
import kernels
from attnpred import Config, SparseDecoder, generate
from tests.fake_gpu import tensors, to_device
from tests.happens_before import Checker
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
    reads, block_size = [a.q, a.lengths, *([a.work] if a.work is not None else [])], a.k_blocks.shape[1]
    for row, length in zip(a.table, a.lengths.tolist()):
        row = row[: -(-length // block_size)]
        reads.append(row)
        for block in row.tolist():
            if block >= 0:
                reads += [a.k_blocks[block, :length], a.v_blocks[block, :length]]
            length -= block_size
    return reads, []


def touched_by_rotate_and_write(a):
    row = a.row.item()
    return [a.qk, a.v, a.freq, a.position, a.row], [a.k_rows[:, row], a.v_rows[:, row]]


def touched_by_copy_blocks(a):
    pairs = [(i, j) for i, j in zip(a.source_index.tolist(), a.destination_index.tolist()) if i >= 0]
    return [a.source_index, a.destination_index, *(a.source[i] for i, _ in pairs)], [a.destination[j] for _, j in pairs]


DECLARED = {
    (kernels, "find_echoes"): lambda a: ([a.ids, a.position], []),
    (kernels, "pool_history"): touched_by_pool_history,
    (kernels, "predict"): touched_by_predict,
    (kernels, "select_blocks"): lambda a: ([a.scores], []),
    (kernels, "sparse_decode"): touched_by_sparse_decode,
    (kernels, "rotate_and_write"): touched_by_rotate_and_write,
    (kernels, "swiglu"): lambda a: ([a.gate_up], []),
    (kernels, "assign_slots"): lambda a: ([a.wanted, a.held], []),
    (kernels, "copy_blocks"): touched_by_copy_blocks,
    (attnpred, "causal_attention"): lambda a: ([a.q, a.k, a.v], []),
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
    pool, q, side = torch.rand(6, 8, 16, device="cuda"), torch.rand(2, 16, device="cuda"), torch.cuda.Stream()
    table, lengths = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([[-1, 4], [2, 0]], [13, 10]))
    side.wait_event(torch.cuda.current_stream().record_event())
    out, lse = kernels.sparse_decode(q, pool, pool, table, lengths, None, "triton")
    q[0, 0] = 1  # a number goes along with the launch: the host waits for nothing
    with torch.cuda.stream(side):
        pool[1::2].zero_()
        pool[4, 5:].zero_()
        pool[0, 2 if ordered else 1 :].zero_()
        (table if ordered else out).sum()
    return ["sum .* reads what that sparse_decode .* writes", "zero_ .* writes what that sparse_decode .* reads"]


PROGRAMS = [neighbouring_bytes, freed_while_another_stream_uses_it, blocks_copied, blocks_attended_to]


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

CONFIG = Config(block_size=8, sink_tokens=8, local_tokens=8, budget=48, history_len=8, echo_blocks=2)
INTERVALS = 3, 4, 1  # M


def decode(model, predictor, interval, backend):
    """Logits of a prompt, which fits the budget unless M = 3, and of later tokens; then the decoder is dropped.

    The host never waits for a token. The last selection is under way at the end, but if M = 3, the counters are read.
    """
    config, tokens = dataclasses.replace(CONFIG, calibration_interval=interval), torch.randint(3, (85,))
    decoder, tokens = SparseDecoder(config, model, predictor, 85, backend, True), tokens.to(model.device)
    prompt, first, *others = tokens.split([n := 61 if interval == 3 else 37] + [1] * (85 - n))
    logits = [decoder.prefill(prompt), decoder.decode(first)]
    decoder.captured = None  # the first token has had the stream that would capture a graph
    logits += [decoder.decode(token) for token in others]
    if interval == 3:
        decoder.cache.format_stats(decoder.n_tokens, 24)
    assert decoder.selecting and decoder.stats.echo_bytes > 0
    return torch.stack(logits)


@functools.cache
def checked(interval, removed=None):
    """The checker after an offloaded decoder's run, and the logits."""
    torch.manual_seed(0)
    model, predictor = tiny_llama(n_layers=2), random_predictor()
    with Checker(DECLARED, removed) as checker:
        logits = decode(to_device(model), to_device(predictor), interval, "triton")
        torch.zeros(1, device="cuda")  # may be given the dropped decoder's memory
        return checker, logits.cpu()


@pytest.mark.parametrize("interval", INTERVALS)
def test_decoding_has_no_race(interval):
    checker, logits = checked(interval)
    assert not checker.races
    work = [len(stream.operations) for stream in checker.streams if stream.used]
    assert len(work) == 3 and min(work) > 30
    expected = decode(tiny_llama(n_layers=2), random_predictor(), interval, "torch")
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_every_wait_is_needed():
    """Each call that orders something: without it there is a race, in one case at least."""
    sites = set.union(*(checked(interval)[0].sites for interval in INTERVALS))
    assert {site.split()[1] for site in sites} == {"record_event", "wait_event", "wait_stream", "synchronize"}
    for site in sorted(sites):
        assert any(checked(interval, site)[0].races for interval in INTERVALS), f"{site} is not needed"


def test_the_host_waits_for_the_tokens_that_it_reads():
    def run(removed=None):
        model = tiny_llama(n_layers=1)
        with Checker(DECLARED, removed) as checker:
            decoder = SparseDecoder(CONFIG, to_device(model), to_device(random_predictor()), 60, "triton")
            decoder.captured = None
            assert len(list(generate(decoder, list(range(40)), 8))) == 8
            del decoder
            return checker

    checker = run()
    assert not checker.races
    assert sum(stream.used for stream in checker.streams) == 1  # a resident decoder needs no other stream
    assert len(checker.sites) == 2 and all(run(site).races for site in checker.sites)
