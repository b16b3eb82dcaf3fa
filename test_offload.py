"""The offloaded cache against the resident one, its slots against a dictionary, its counters against arithmetic."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attnpred
import kernels
from attnpred import Config, InputError, SparseDecoder, decode_one_token, prefill
from offload import OffloadedCache
from test_attnpred import PROMPT_LENGTHS, SLOW, configurations, random_predictor, tiny_llama

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(model, config, tokens, steps, offload, blocks=None):
    """Logits of `steps` random tokens after a prompt, and the decoder. `blocks` forces each step's selection."""
    decoder = SparseDecoder(config, model, random_predictor().to(DEVICE), len(tokens) + steps, offload=offload)
    selections, logits = [], [prefill(model, decoder, tokens)]
    generator = torch.Generator().manual_seed(len(tokens))
    for step in range(steps):
        if blocks is not None:
            decoder.blocks = blocks[step]
            for layer, table in enumerate(blocks[step]):
                decoder.cache.select(layer, table, decoder.n_tokens + 1)
        selections.append([None if table is None else table.clone() for table in decoder.blocks])
        token = torch.randint(61, (1,), generator=generator).to(DEVICE)
        logits.append(decode_one_token(model, decoder, token))
    return torch.stack(logits), selections, decoder


@SLOW
@given(configurations(), PROMPT_LENGTHS, st.integers(0, 2**31), st.sampled_from([(2, 2), (1, 3), (3, 1)]))
def test_offloaded_decoding_equals_resident_decoding(config, prompt_len, seed, heads):
    model = tiny_llama(n_kv_heads=heads[0], group=heads[1], seed=seed).to(DEVICE)
    tokens = torch.randint(61, (prompt_len,)).to(DEVICE)
    resident, selections, _ = run(model, config, tokens, 40, offload=False)
    offloaded, _, decoder = run(model, config, tokens, 40, offload=True, blocks=selections)
    torch.testing.assert_close(offloaded, resident, atol=1e-4, rtol=1e-4)
    if config.dense_layers == 0:  # a dense layer adds its chunks in another order
        assert torch.equal(offloaded, resident)
    assert decoder.cache.slots.shape[2] * config.block_size == config.budget + config.block_size


def test_offloaded_decoding_selects_for_itself_as_the_resident_does():
    config = Config(block_size=8, sink_tokens=8, local_tokens=8, budget=48, history_len=8, calibration_interval=3)
    for select_heads in ("kv", "q"):
        config = Config(**(config.__dict__ | {"select_heads": select_heads, "dense_layers": 1}))
        model, tokens = tiny_llama(), torch.arange(150) % 61
        resident, wanted, _ = run(model, config, tokens, 60, offload=False)
        offloaded, chosen, _ = run(model, config, tokens, 60, offload=True)
        torch.testing.assert_close(offloaded, resident, atol=1e-4, rtol=1e-4)
        for ours, theirs in zip(chosen, wanted, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@settings(deadline=None, max_examples=40)
@given(st.data())
def test_slots_follow_a_dictionary(backend, data):
    """Random selections through the slot table; a dictionary a head says what each slot holds."""
    heads, n_slots = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    capacity = data.draw(st.integers(n_slots, 40))
    slot_of = torch.full((heads, capacity), -1, dtype=torch.int32, device=DEVICE)
    block_of = torch.full((heads, n_slots), -1, dtype=torch.int32, device=DEVICE)
    model = [{} for _ in range(heads)]  # slot -> block
    for _ in range(data.draw(st.integers(1, 6))):
        k = data.draw(st.integers(0, n_slots))
        chosen = [
            sorted(data.draw(st.sets(st.integers(0, capacity - 1), min_size=k, max_size=k))) for _ in range(heads)
        ]
        wanted = torch.tensor(chosen, dtype=torch.int32, device=DEVICE).view(heads, k)
        slots, fetch = kernels.assign_slots(wanted, slot_of, block_of, backend)
        assert slots.dtype == fetch.dtype == torch.int32
        for head in range(heads):
            there = {block: slot for slot, block in model[head].items()}
            free = [slot for slot in range(n_slots) if model[head].get(slot) not in chosen[head]]
            for block, slot, fetched in zip(chosen[head], slots[head].tolist(), fetch[head].tolist(), strict=True):
                if block in there:
                    assert (slot, fetched) == (there[block], -1)
                else:
                    assert (slot, fetched) == (free.pop(0), block)
                    model[head][slot] = block
            assert {s: b for s, b in enumerate(block_of[head].tolist()) if b >= 0} == model[head]
            assert {s: b for b, s in enumerate(slot_of[head].tolist()) if s >= 0} == model[head]


@pytest.mark.parametrize("select_heads, dense_layers", [("kv", 1), ("q", 0)])
def test_the_host_holds_every_full_block_and_grows_in_place(select_heads, dense_layers, monkeypatch):
    monkeypatch.setattr("offload.SEGMENT_BLOCKS", 2)
    monkeypatch.setattr("offload.STAGED_BLOCKS", 3)
    config = Config(
        block_size=8, sink_tokens=8, local_tokens=8, budget=32, select_heads=select_heads, dense_layers=dense_layers
    )
    model, tokens = tiny_llama(), torch.arange(45) % 61
    _, selections, resident = run(model, config, tokens, 60, offload=False)
    logits, _, offloaded = run(model, config, tokens, 60, offload=True, blocks=selections)
    cache = offloaded.cache
    assert len(cache.segments) > 3 and cache.segments[0][1].shape[1] == 6
    host = torch.cat([segment for _, segment in cache.segments], 1)  # (L, blocks, Hk, 2, b, D)
    full, close = 105 // 8, dict(atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(host[:, :full, :, 0].transpose(1, 2), resident.cache.k[:, :, :full], **close)
    torch.testing.assert_close(host[:, :full, :, 1].transpose(1, 2), resident.cache.v[:, :, :full], **close)


def test_counters_are_exact(monkeypatch):
    monkeypatch.setattr("offload.STAGED_BLOCKS", 4)
    config = Config(block_size=8, sink_tokens=8, local_tokens=8, budget=48, dense_layers=1, calibration_interval=3)
    model, tokens = tiny_llama(), torch.arange(150) % 61
    _, selections, decoder = run(model, config, tokens, 20, offload=True)
    cache, block = decoder.cache, 2 * 8 * 8 * 4  # K and V of eight tokens of eight float32
    selections.append(decoder.blocks)
    chosen = [[set(row[1:5].tolist()) for layer in step for row in layer] for step in selections]
    fetched = sum(len(new - old) for old, new in zip(chosen, chosen[1:]) for old, new in zip(old, new, strict=True))
    assert int(cache.fetched) == fetched and cache.wanted == 20 * 2 * 2 * 4
    assert cache.written_bytes == 3 * 2 * block * sum((150 + i) % 8 == 7 for i in range(20))
    streamed = [2 * block * ((150 + i) // 8) * (1 + (2 * 0.5 if i % 3 == 0 else 0)) for i in range(1, 21)]
    assert cache.streamed_bytes == sum(streamed)
    slots = 2 * 2 * (1 + 4 + 2) * block
    assert cache.resident_bytes == slots + 2 * block + 2 * 4 * 2 * block
    assert cache.resident_bytes == OffloadedCache.device_bytes(config, model.config, 2, torch.float32)
    assert cache.block_bytes == block and isinstance(cache, OffloadedCache)


def test_command_line_offloads_with_the_same_text(capsys, tmp_path):
    text = "".join(f"The box number {i} holds {i * i % 97} apples.\n" for i in range(60))
    (tmp_path / "prompt.txt").write_text(text)
    args = [
        "--prompt-file",
        str(tmp_path / "prompt.txt"),
        "--raw",
        "--max-new-tokens",
        "24",
        "--stats",
        "--budget",
        "256",
    ]
    texts = []
    for extra in ([], ["--offload"]):
        assert attnpred.main(args + extra) == 0
        texts.append(capsys.readouterr())
    assert texts[0].out == texts[1].out != ""
    assert "resident" in texts[1].err and "fetched" in texts[1].err and "resident" not in texts[0].err


def test_memory_is_checked_before_anything_is_computed(monkeypatch):
    m, cpu = tiny_llama().config, torch.device("cpu")
    token = 2 * 3 * 2 * 8 * 4  # K and V, three layers, two KV heads, eight float32
    config = Config(block_size=8, sink_tokens=8, local_tokens=8, budget=256, dense_layers=1)

    def check(free, offload):
        monkeypatch.setattr(attnpred, "free_memory", lambda device: free)
        attnpred.check_memory(config, m, 1000, torch.float32, cpu, offload)

    check(1000 * token, False)
    check(None, False)
    with pytest.raises(InputError, match="--offload"):
        check(1000 * token - 1, False)
    check(1000 * token, True)
    with pytest.raises(InputError, match=f"{999:,} tokens, prompt"):
        check(1000 * token - 1, True)
    need = OffloadedCache.device_bytes(config, m, 2, torch.float32)
    block = 2 * 2 * 2 * 8 * 8 * 4  # two sparse layers, two heads, K and V of a block
    frees = {"device": need - 3 * block, "host": 10**9}
    monkeypatch.setattr(attnpred, "free_memory", lambda device: frees["host" if device is not gpu else "device"])
    gpu = torch.device("cuda")
    with pytest.raises(InputError, match=f"--budget {256 - 3 * 8} would fit"):
        attnpred.check_memory(config, m, 1000, torch.float32, gpu, True)
    fitting = Config(**(config.__dict__ | {"budget": 256 - 3 * 8}))
    attnpred.check_memory(fitting, m, 1000, torch.float32, gpu, True)
    frees["device"] = 1000
    with pytest.raises(InputError, match="no budget"):
        attnpred.check_memory(config, m, 1000, torch.float32, gpu, True)


@pytest.mark.skipif(DEVICE != "cuda", reason="streams need a GPU")
@pytest.mark.parametrize("late", ["compute", "side"])
def test_a_late_stream_changes_nothing(late, monkeypatch):
    config = Config(block_size=16, sink_tokens=16, local_tokens=16, budget=128, history_len=8, dense_layers=1)
    model, tokens = tiny_llama(head_dim=64, context_len=2048).to(DEVICE), torch.randint(61, (700,), device=DEVICE)
    resident, selections, _ = run(model, config, tokens, 40, offload=False)
    attend, fetch = OffloadedCache.attend, OffloadedCache.fetch

    def slowly(method):
        def call(*args):
            torch.cuda._sleep(2_000_000)
            return method(*args)

        return call

    if late == "compute":
        monkeypatch.setattr(OffloadedCache, "attend", slowly(attend))
    else:
        monkeypatch.setattr(OffloadedCache, "fetch", slowly(fetch))
    offloaded, chosen, _ = run(model, config, tokens, 40, offload=True)
    torch.testing.assert_close(offloaded, resident, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(chosen, selections, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
