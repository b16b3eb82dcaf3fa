"""The offloaded cache against the resident one, its slots and counters against plain Python."""

import dataclasses

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import attnpred
from attnpred import Config, InputError, SparseDecoder, decode_one_token, prefill
from tests.helpers import random_predictor, tiny_llama
from tests.test_attnpred import GROWS, HEADS, OUTGROWS, PROMPT_LENGTHS, STRIDES, configurations

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = Config(
    block_size=8, sink_tokens=8, local_tokens=8, budget=48, history_len=8, calibration_interval=3, dense_layers=1
)
SHORT = Config(block_size=8, sink_tokens=16, local_tokens=8, budget=32, history_len=6, calibration_interval=3)
FAR = dataclasses.replace(OUTGROWS, calibration_interval=30, selection_interval=5)
RARELY = dataclasses.replace(OUTGROWS, selection_interval=19, swap_share=0.01)  # more is new than may be swapped


def run(model, config, tokens, steps, offload):
    """Logits of `steps` random tokens after a prompt, the blocks attended to, and the decoder."""
    decoder = SparseDecoder(config, model, random_predictor().to(DEVICE), len(tokens) + steps, offload=offload)
    logits, attended = [prefill(model, decoder, tokens)], []
    generator = torch.Generator().manual_seed(len(tokens))
    for _ in range(steps):
        token = torch.randint(61, (1,), generator=generator).to(DEVICE)
        logits.append(decode_one_token(model, decoder, token))
        attended.append([decoder.attended(layer, decoder.capacity) for layer in range(decoder.sparse_layers)])
    return torch.stack(logits), attended, decoder


@settings(max_examples=40)
@given(configurations(), PROMPT_LENGTHS, st.integers(0, 2**31), HEADS)
@example(GROWS, 238, 0, (2, 2))
@example(OUTGROWS, 30, 1, (2, 2))
@example(STRIDES, 200, 2, (3, 1))
@example(SHORT, 9, 3, (2, 2))
@example(SHORT, 20, 3, (2, 2))
@example(FAR, 100, 5, (2, 2))
@example(RARELY, 49, 4, (2, 2))
def test_offloaded_decoding_equals_resident_decoding(config, prompt_len, seed, heads):
    model = tiny_llama(n_kv_heads=heads[0], group=heads[1], seed=seed).to(DEVICE)
    tokens = torch.randint(61, (prompt_len,)).to(DEVICE)
    resident, wanted, one = run(model, config, tokens, 40, offload=False)
    offloaded, chosen, two = run(model, config, tokens, 40, offload=True)
    close, dense = dict(atol=1e-4, rtol=1e-4), one.dense_layers
    if config.fits(prompt_len + 1):  # dense attention and lists of every block add up in another order
        torch.testing.assert_close(offloaded, resident, **close)
    else:
        assert torch.equal(offloaded, resident)
        for ours, theirs in zip(chosen, wanted, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert torch.equal(one.history, two.history)
    full = two.cache.written // config.block_size
    host = two.cache.host[:, :, :full].movedim(3, 0)  # (2, L', Hk, full, b, D)
    torch.testing.assert_close(host.to(DEVICE), one.cache.kv[:, dense:, :, :full], **close)
    torch.testing.assert_close(two.cache.kv, one.cache.kv[:, :dense], **close)


def test_counters_are_exact():
    model, tokens = tiny_llama(), torch.arange(150) % 61
    decoder = SparseDecoder(CONFIG, model, random_predictor(), 180, offload=True)
    prefill(model, decoder, tokens)
    sets, written, wrote = [[set(), set()]], 150, 0  # of the selected blocks, layer by layer
    for step in range(22):
        if step % 3 == 0:  # a selection has just been made, and the host has everything
            lists = decoder.next_lists
            sets.append([set(row.tolist()) for row in lists.ids.gather(1, lists.entries)])
            wrote += -(-decoder.n_tokens // 8) - written // 8 if step else 0
            written = decoder.n_tokens
        if step < 21:
            decode_one_token(model, decoder, torch.tensor([step % 61]))
    fetched = sum(len(new - old) for now, before in zip(sets[1:], sets) for new, old in zip(now, before))
    cache, block = decoder.cache, 2 * 8 * 16 * 4  # K and V of eight tokens of sixteen float32
    assert int(cache.fetched) == fetched and cache.selected == 8 * 2 * len(sets[1:])
    assert cache.written_bytes == wrote * 2 * 2 * block and cache.block_bytes == block
    megabytes = [f"{blocks * block / 21 / 1e6:,.3f}" for blocks in (fetched, cache.selected)]
    assert "{} MB a token fetched, of {} MB selected".format(*megabytes) in cache.format_stats(171, 21)[1]


def test_memory_of_prefill_is_counted(monkeypatch):
    """By hand, in float32: 4 heads and 2 KV heads of 16, a model of 32, 3 layers."""
    monkeypatch.setattr(attnpred, "PREFILL_CHUNK", 64)
    m, long_history = tiny_llama().config, dataclasses.replace(CONFIG, history_len=600)
    token = 32 * (4 + 2 * 4) + (64 + 2 * 32) * 4 + (64 + 32) * (8 + 4)  # two residuals and norms; q, k, v; rotated q, k
    for config, n_tokens, offload, expected in (
        (CONFIG, 50, False, 50 * token),
        (CONFIG, 150, False, 64 * token),
        (CONFIG, 150, True, 64 * token + 150 * 4 * 2 * 16 * 4),  # K and V of a layer twice
        (long_history, 150, True, 2 * 4 * 600 * 19 * 4),  # rows of two sparse layers, 19 blocks
        (long_history, 40, True, 40 * token + 40 * 4 * 2 * 16 * 4),  # nothing to pool
    ):
        assert attnpred.prefill_memory(config, m, n_tokens, torch.float32, offload) == expected


def test_memory_is_checked_before_anything_is_computed(monkeypatch):
    m, cpu = tiny_llama().config, torch.device("cpu")
    for offload in (False, True):
        needs = attnpred.memory_needed(CONFIG, m, 1000, torch.float32, offload)
        assert needs[1] == (2 * 2 * 2 * 1000 * 16 * 4 if offload else 0)  # on the host: K and V of two sparse layers
        monkeypatch.setattr(attnpred, "free_memory", lambda device, needs=needs: max(needs))
        attnpred.check_memory(CONFIG, m, 1000, torch.float32, cpu, offload)
        monkeypatch.setattr(attnpred, "free_memory", lambda device, needs=needs: max(needs) - 1)
        with pytest.raises(InputError, match="a shorter prompt"):
            attnpred.check_memory(CONFIG, m, 1000, torch.float32, cpu, offload)
    monkeypatch.setattr(attnpred, "free_memory", lambda device: None)
    attnpred.check_memory(CONFIG, m, 1000, torch.float32, cpu, False)
