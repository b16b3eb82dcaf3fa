"""The offloaded cache against the resident one, its slots and counters against plain Python."""

import dataclasses

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import attnpred
from attnpred import Config, KVCache, Predictor, SparseDecoder
from experiments import roofline
from tests.helpers import random_predictor, tiny_llama
from tests.test_attnpred import GROWS, HEADS, NOTHING, OUTGROWS, PROMPT_LENGTHS, SMALL, VOCABULARY, configurations

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = Config(**SMALL, budget=64, calibration_interval=3, echo_blocks=2)
EVERY_TOKEN = Config(
    **SMALL, budget=48, calibration_interval=1, echo_blocks=1
)  # a selection before the last took effect


class LateCache(KVCache):
    """A KVCache whose selections take effect one token late, but for the first."""

    waiting, age = None, 0

    def select(self, *selection):
        self.take_over()
        self.waiting, self.age = selection, 0

    def begin_token(self):
        if self.age == 1:
            self.take_over()
        self.age += 1

    def take_over(self):
        if self.waiting:
            super().select(*self.waiting)
            self.waiting = None

    def attend_to(self, attended, table, lengths, left_out):
        super().attend_to(attended, table, lengths + self.age, left_out)  # made for a text that is shorter by `age`


def run(model, config, tokens, prompt_len, later, offload):
    decoder = SparseDecoder(config, model, random_predictor().to(DEVICE), len(tokens), offload=offload)
    if not offload:
        old = decoder.cache
        decoder.cache = LateCache(config, model.config, old.capacity, model.kv_dtype, model.device, "torch")
    logits = []
    for size in (prompt_len, later):  # a conversation: each prompt is followed by tokens that are decoded
        logits += [decoder.prefill(tokens[:size]), *map(decoder.decode, tokens[size : size + 20].split(1))]
        tokens = tokens[size + 20 :]
    return torch.stack(logits), decoder


@settings(max_examples=40)
@given(configurations(), PROMPT_LENGTHS, st.integers(1, 40), st.integers(0, 2**31), HEADS)
@example(GROWS, 495, 20, 0, (2, 2))
@example(OUTGROWS, 30, 1, 1, (2, 2))
@example(NOTHING, 100, 7, 2, (1, 3))
@example(CONFIG, 9, 16, 3, (2, 2))
@example(EVERY_TOKEN, 49, 40, 4, (2, 2))
def test_offloaded_decoding_is_resident_decoding_with_late_selections(config, prompt_len, later, seed, heads):
    model = tiny_llama(n_kv_heads=heads[0], group=heads[1], n_layers=2, seed=seed, context_len=600).to(DEVICE)
    tokens = torch.randint(VOCABULARY, (prompt_len + later + 40,)).to(DEVICE)
    resident, one = run(model, config, tokens, prompt_len, later, offload=False)
    offloaded, two = run(model, config, tokens, prompt_len, later, offload=True)
    if config.fits(prompt_len + 1):  # dense attention and lists of every block add up in another order
        torch.testing.assert_close(offloaded, resident, atol=1e-4, rtol=1e-4)
    else:
        assert torch.equal(offloaded, resident) and torch.equal(one.history.rows, two.history.rows)
        assert torch.equal(one.cache.attended, two.cache.attended) and torch.equal(one.cache.echoes, two.cache.echoes)
        assert torch.equal(one.cache.lengths, two.cache.lengths) and one.cache.left_out == two.cache.left_out
    full = two.cache.written // config.block_size
    host = two.cache.host[:, :, :full].movedim(3, 0)  # (2, L, Hk, full, b, D)
    torch.testing.assert_close(host.to(DEVICE), one.cache.kv[:, :, :, :full], atol=1e-4, rtol=1e-4)


def test_counters_are_exact():
    model, tokens = tiny_llama(), torch.arange(172) % 13
    decoder = SparseDecoder(CONFIG, model, random_predictor(), 172, offload=True)
    decoder.prefill(tokens[:150])
    cache, written, wrote, fetched, echoes = decoder.cache, 150, 0, 0, 0
    heads = [(layer, head) for layer in range(3) for head in range(2)]
    start = 1

    def selected(attended, end):
        return {(*h, block) for h in heads for block in range(start, end) if attended[h][block]}

    before, held = selected(cache.attended, (151 - 8) // 8), {h: set() for h in heads}
    fetched += len(before)
    for step in range(1, 23):
        attended = cache.next[1] if cache.next and cache.age == 1 else cache.attended  # what this token attends to
        decoder.decode(tokens[149 + step : 150 + step])
        for layer, head in heads:
            new = {int(n) for n in decoder.echo_block.tolist() if n < cache.capacity and not attended[layer, head][n]}
            echoes += len(new - held[layer, head])
            held[layer, head] = new
        if step % 3 == 0:
            now = selected(cache.next[1], (decoder.n_tokens + 1 - 8) // 8)
            fetched, before = fetched + len(now - before), now
            wrote += -(-decoder.n_tokens // 8) - written // 8
            written = decoder.n_tokens
    block = 2 * 8 * 16 * 4  # K and V of eight tokens of sixteen float32
    assert int(cache.fetched) == fetched and cache.selected == 8 * CONFIG.topk_blocks * 6
    assert int(cache.echoes_fetched) == echoes > 0 and cache.written_back == wrote * 6
    counts = fetched, cache.selected, echoes, wrote * 6
    text = "{} MB a token fetched of {} selected, {} for echoes; {} written back"
    numbers = [f"{n * block / 22 / 1e6:,.3f}" for n in counts]
    found = cache.format_stats(172, 22)[1].replace(" MB", "").split("link       ")[1]
    assert found == text.format(*numbers).replace(" MB", "")


def test_slots_follow_the_text_not_the_options():
    big = Config(budget=1 << 20, local_tokens=1 << 19)
    cache = SparseDecoder(big, tiny_llama(), random_predictor(), 34, offload=True).cache
    assert len(cache.slots) <= 6 * (2 * 3 + 1 + 3 + big.echo_blocks)  # 3 blocks of text


@pytest.mark.parametrize("offload", [False, True])
def test_memory_is_checked_before_anything_is_computed(monkeypatch, offload):
    m, cpu = tiny_llama().config, torch.device("cpu")
    kv = 2 * 3 * 2 * 1000 * 16 * 4  # K and V of three layers and two heads

    def check(free):
        monkeypatch.setattr(attnpred, "free_memory", lambda device: free)
        return attnpred.lacks_memory(CONFIG, m, 1000, torch.float32, cpu, offload)

    assert check(None) is check(8 * kv) is None
    assert "GB are free: try a shorter prompt, fewer --max-new-tokens" in check(kv - 1)


def test_a_prompt_crosses_the_link_as_often_as_it_must():
    """K and V of each chunk go to the host once, and all earlier ones come back once per chunk and layer."""
    m, token = roofline.LLAMA_31_8B, torch.zeros(1024, dtype=torch.int64, device="meta")
    stub = roofline.Stub(dataclasses.replace(m, n_layers=2))
    with roofline.counting() as counts:
        decoder = SparseDecoder(Config(), stub, Predictor(), 1024, "triton", offload=True)
        decoder.begin_prompt(token)
        for chunk in (512, 256, 256):
            for layer in range(2):
                decoder.take_prompt(layer, *roofline.empty_heads(m, chunk, torch.bfloat16))
            decoder.n_tokens += chunk
    assert counts.link_bytes == 2 * (1024 + 512 + 768) * 2 * 8 * 128 * 2  # layers, tokens, K and V, heads, D, bytes
