"""The happens-before checker on small programs; then the decoder under it."""

import functools
import re

import pytest
import torch

import attnpred
import kernels
from attnpred import Config, SparseDecoder
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
    reads, block_size = [a.q, a.lengths], a.k_blocks.shape[1]
    for row, length in zip(a.table, a.lengths.tolist()):
        blocks = row[: -(-length // block_size)]
        reads.append(blocks)
        for block in blocks.tolist():
            if block >= 0:
                reads += [a.k_blocks[block, :length], a.v_blocks[block, :length]]
            length -= block_size
    return reads, []


def touched_by_find_echoes(a):
    return [a.ids[: int(a.position) + 1], a.position], []


def touched_by_copy_blocks(a):
    pairs = [(i, j) for i, j in zip(a.source_index.tolist(), a.destination_index.tolist()) if i >= 0]
    return [a.source_index, a.destination_index, *(a.source[i] for i, _ in pairs)], [a.destination[j] for _, j in pairs]


DECLARED = {
    (kernels, "pool_history"): touched_by_pool_history,
    (kernels, "predict"): touched_by_predict,
    (kernels, "select_blocks"): lambda a: ([a.scores], []),
    (kernels, "sparse_decode"): touched_by_sparse_decode,
    (kernels, "find_echoes"): touched_by_find_echoes,
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
    blocks = torch.rand(6, 8, 16, device="cuda")
    table, lengths = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([[4, 5], [-1, 0]], [5, 10]))
    q, side = torch.rand(2, 16, device="cuda"), side_stream()
    out, lse = kernels.sparse_decode(q, blocks, blocks, table, lengths, "triton")
    q[0, 0] = 1  # a number goes along with the launch: the host waits for nothing
    with torch.cuda.stream(side):
        blocks[1::2].zero_()
        blocks[4, 5:].zero_()
        blocks[0, 2 if ordered else 1 :].zero_()
        (table if ordered else out).sum()
    assert out.isfinite().all()
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

SHAPE = dict(block_size=8, sink_tokens=8, local_tokens=8, history_len=8, calibration_queries=2)
# With an interval of 1, a selection is made before the last one has taken effect. With a budget of 32, K is 0.
CASES = [(1, 64), (3, 64), (4, 48), (4, 32)]  # calibration_interval, budget


def to_device(module):
    for part in module.modules():
        for named in (part._parameters, part._buffers):
            named.update({name: tensor.data.to("cuda") for name, tensor in named.items() if tensor is not None})
    return module


def decode(model, predictor, case, backend, offload=True):
    """Logits of a prompt that fits the budget or not, and of 40 tokens or so; then the decoder is dropped.

    The host never waits for a token. The copies of the last selection may be under way.
    """
    config = Config(**SHAPE, calibration_interval=case[0], budget=case[1], echo_blocks=2)
    tokens = torch.arange(37 + 10 * case[0] + case[1] // 2, device=model.device) * 7 % 13
    decoder = SparseDecoder(config, model, predictor, len(tokens), backend, offload)
    decoder.captured = None  # without a CUDA graph
    logits = [decoder.prefill(tokens[:37])]
    logits += [decoder.decode(token) for token in tokens[37:, None]]
    assert decoder.selecting
    return torch.stack(logits), decoder.cache.echoes


@functools.cache
def checked(case, removed=None, offload=True):
    """The checker after a decoder's run, and the logits."""
    model = tiny_llama(n_layers=2)
    with Checker(DECLARED, removed) as checker:
        logits, echoes = decode(to_device(model), to_device(random_predictor()), case, "triton", offload)
        torch.zeros(1, device="cuda")  # may be given the dropped decoder's memory
        return checker, logits.cpu(), int(echoes)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decoding_has_no_race(case):
    checker, logits, echoes = checked(case)
    assert not checker.races and echoes > 0
    assert len(checker.streams) == 2 and all(len(stream.operations) > 50 for stream in checker.streams)
    expected, _ = decode(tiny_llama(n_layers=2), random_predictor(), case, "torch")
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_a_resident_cache_uses_one_stream():
    checker, _, _ = checked(CASES[1], offload=False)
    assert not checker.races and len(checker.streams) == 1


def test_every_wait_is_needed():
    """Each call that orders something: without it there is a race, in one case at least."""
    sites = set.union(*(checked(case)[0].sites for case in CASES))
    assert {site.split()[1] for site in sites} == {"record_event", "wait_event", "synchronize"}
    for site in sorted(sites):
        those = (case for case in CASES if site in checked(case)[0].sites)
        assert any(checked(case, site)[0].races for case in those), f"{site} is not needed"


def test_the_host_waits_for_the_tokens_that_it_reads():
    def run(removed=None):
        model = tiny_llama(n_layers=1)
        with Checker(DECLARED, removed) as checker:
            model = to_device(model)
            config = Config(**SHAPE, budget=48, echo_blocks=2)
            decoder = SparseDecoder(config, model, to_device(random_predictor()), 60, "triton")
            decoder.captured = None
            assert len(list(attnpred.generate(decoder, list(range(40)), 6))) == 6
            del decoder
            return checker

    checker = run()
    assert not checker.races
    assert len(checker.sites) == 2 and all(run(site).races for site in checker.sites)  # those of read_later
