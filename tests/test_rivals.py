"""Rivals: every score against its definition written as loops, and decoding with each against attention by hand."""

import math

import pytest
import torch

from attnpred import Config, decode_one_token, prefill
from experiments.rivals import RIVALS, RivalDecoder, Seen
from tests.helpers import random_predictor, tiny_llama
from train_predictor import attention, block_mass

SHAPE = dict(block_size=8, history_len=8, sink_tokens=8, local_tokens=16, budget=64, dense_layers=1)
N_PROMPT = 150


def decoded(rival, n_new=20, **changes):
    """A decoder after a prompt and n_new tokens with the rival's choices; `prompt` has each layer's q (Hq, T, D)."""
    model = tiny_llama()
    defaults = dict(calibration_interval=3, selection_interval=2) | rival.changes
    decoder = RivalDecoder(Config(**SHAPE | defaults | changes), model, random_predictor(), 200, rival=rival)
    tokens = torch.randint(0, 61, (N_PROMPT + n_new,), generator=torch.Generator().manual_seed(3))
    decoder.prompt = {}

    def note(layer, q, k, v, original=decoder.prefill_attention):
        out = original(layer, q, k, v)
        decoder.prompt[layer] = q
        if layer >= 1:
            decoder.notes[layer - 1] = rival.prefill(q, decoder.cache.k[layer], N_PROMPT)
        return out

    decoder.prefill_attention = note
    prefill(model, decoder, tokens[:N_PROMPT])
    for token in tokens[N_PROMPT:]:
        decode_one_token(model, decoder, token[None])
    return decoder


def naive_logits(q, k_cache, n_tokens):
    """One head's logits: q (D,), k_cache (capacity, b, D) -> a list of n_tokens numbers."""
    k = k_cache.flatten(0, 1)
    return [sum(a * b for a, b in zip(q.tolist(), k[t].tolist())) / math.sqrt(len(q)) for t in range(n_tokens)]


def naive_softmax(x):
    total = sum(math.exp(value) for value in x)
    return [math.exp(value) / total for value in x]


def group_means(per_query, heads):
    """Lists of all query heads -> (heads, n)."""
    return torch.tensor(per_query).view(heads, -1, len(per_query[0])).mean(1)


def test_attention_is_causal_softmax_and_block_mass_its_sum():
    q, k_cache = torch.randn(4, 3, 16), torch.randn(2, 4, 8, 16)
    p, mass = attention(q, k_cache.flatten(1, 2), 27), block_mass(q, k_cache.flatten(1, 2), 27, 8)
    for head in range(4):
        for row, n in ((0, 25), (1, 26), (2, 27)):
            expected = torch.tensor(naive_softmax(naive_logits(q[head, row], k_cache[head // 2], n)) + [0.0] * (32 - n))
            torch.testing.assert_close(p[head, row], expected[:27], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(mass[head, row], expected.view(4, 8).sum(1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name, weight", [("last-row", lambda age: age == 0), ("decayed-mean", lambda age: 0.9**age)])
def test_scores_from_the_history(name, weight):
    decoder = decoded(RIVALS[name]())
    start, end = decoder.config.middle(decoder.n_tokens)
    window = decoder.window()  # (L', heads, H, capacity), oldest first
    for layer in range(2):
        expected = sum(window[layer, :, 7 - age, start:end] * weight(age) for age in range(8))
        torch.testing.assert_close(decoder.rival.score(Seen(decoder, layer, start, end)), expected)
    assert (
        RIVALS["decayed-mean"](1.0).score(Seen(decoder, 0, start, end)) - window[0, :, :, start:end].sum(1)
    ).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["quest", "mean-std", "oracle"])
def test_scores_with_the_query(name):
    decoder, layer = decoded(RIVALS[name]()), 1
    start, end = decoder.config.middle(decoder.n_tokens)
    k_cache, q = decoder.cache.k[layer + 1], torch.randn(4, 16)
    found = decoder.rival.score(Seen(decoder, layer, start, end, q))
    rows = []
    for head in range(4):
        logits = []
        for block in range(start, end):
            k = k_cache[head // 2, block]  # (b, D)
            bound = 0.0
            for d in range(16):
                column = k[:, d].tolist()
                if name == "quest":
                    bound += max(q[head, d].item() * min(column), q[head, d].item() * max(column))
                else:
                    mean = sum(column) / 8
                    std = math.sqrt(sum((x - mean) ** 2 for x in column) / 8)
                    bound += q[head, d].item() * mean + abs(q[head, d].item()) * std
            logits.append(bound / 4)
        if name == "oracle":
            p = naive_softmax(naive_logits(q[head], k_cache[head // 2], decoder.n_tokens))
            rows.append([sum(p[8 * block : 8 * block + 8]) for block in range(start, end)])
        else:
            rows.append(naive_softmax(logits))
    torch.testing.assert_close(found, group_means(rows, 2), atol=1e-4, rtol=1e-3)


def test_snapkv_votes():
    decoder = decoded(RIVALS["snapkv"](), n_new=40)
    start, end = decoder.config.middle(decoder.n_tokens)
    rows = []
    for head in range(4):
        mean = [0.0] * N_PROMPT
        for voter in range(N_PROMPT - 64, N_PROMPT):
            p = naive_softmax(naive_logits(decoder.prompt[2][head, voter], decoder.cache.k[2, head // 2], voter + 1))
            mean = [a + b / 64 for a, b in zip(mean, p + [0.0] * 64)]
        pooled = [max(mean[max(0, t - 3) : t + 4]) for t in range(N_PROMPT)]
        rows.append([max(pooled[8 * b : 8 * b + 8], default=math.inf) for b in range(start, end)])
    assert end > 19  # 19 blocks are the prompt's
    torch.testing.assert_close(decoder.rival.score(Seen(decoder, 1, start, end)), group_means(rows, 2))


def test_ada_snapkv_keeps_a_floor_per_head():
    rival = RIVALS["ada-snapkv"]()
    rival.floor = 0.5
    decoder = decoded(rival)
    scale = torch.tensor([1e-3, 1e-3, 1, 1])[:, None]  # the first head's votes are too low to get anything
    decoder.notes[0]["votes"] = decoder.notes[0]["votes"] * scale
    start, end = decoder.config.middle(decoder.n_tokens)
    with torch.inference_mode():
        decoder.next_lists = decoder.choose(decoder.scores(start, end), start, end)
    counts = [decoder.attended(layer, end)[:, start:].sum(1).tolist() for layer in range(2)]
    assert counts[0] == [2, 8] and min(counts[1]) >= 2 and sum(counts[1]) == 10  # K = 5


def test_h2o_keeps_heavy_and_recent_and_never_returns():
    """Simulated from the rows that decoding leaves, one selection after the other."""
    rival = RIVALS["h2o"]()
    decoder = decoded(rival, n_new=0, selection_interval=4)
    model, layer, b, k = tiny_llama(), 0, 8, 5
    total = [0.0] * 19
    for position in range(N_PROMPT):
        for head in range(2):  # of the first selection head
            p = naive_softmax(naive_logits(decoder.prompt[1][head, position], decoder.cache.k[1, 0], position + 1))
            for block in range(-(-len(p) // b)):
                total[block] += max(p[b * block : b * block + b]) / 2
    dropped = set()
    for step in range(25):
        if step % 4 == 0:
            start, end = decoder.config.middle(decoder.n_tokens + 1)
            total += [0.0] * (end - len(total))
            kept = [block for block in range(start, end) if block not in dropped]
            heavy = sorted(range(start, end), key=lambda x: (-total[x] if x in kept else 0, x))
            chosen, recent = [], list(range(end - 1, start - 1, -1))
            for pair in zip(heavy, recent):  # one of each kind in turn
                chosen += [x for x in pair if x not in chosen]
            attended = set(decoder.attended(layer, end)[0, start:].nonzero()[:, 0].add(start).tolist())
            assert set(chosen[: k - 1]) <= attended <= set(chosen[: k + 1]) and len(attended) == k
            assert not dropped & attended
            found = decoder.notes[layer]["total"][0]  # (N,)
            torch.testing.assert_close(found, torch.tensor(total[: len(found)]), atol=5e-3, rtol=2e-3)
            dropped |= set(range(start, end)) - attended
            for block in dropped:
                total[block] = 0.0
        decode_one_token(model, decoder, torch.tensor([step]))
        row = decoder.window()[layer, 0, -1].tolist()
        total = [a + b for a, b in zip(total + [0.0] * (len(row) - len(total)), row)]


def test_streaming_llm_attends_to_the_latest():
    decoder = decoded(RIVALS["streaming-llm"]())
    attended = decoder.attended(0, decoder.config.n_blocks(decoder.n_tokens))
    last = attended.shape[1] - attended[0, 1:].sum()
    assert attended[:, 0].all() and attended[:, last:].all() and attended.sum() == 2 * (1 + attended.shape[1] - last)


@pytest.mark.parametrize("name", RIVALS)
def test_decoding_attends_to_what_was_chosen(name):
    """Outputs, recovery and counted bytes by hand, from the blocks that the decoder says it attends to."""
    decoder, model = decoded(RIVALS[name]()), tiny_llama()
    decoder.measure_every, steps = 1, []
    before = decoder.stats.attention_bytes
    counted = 0

    def check(layer, q, k, v, original=decoder.decode_attention):
        nonlocal counted
        out = original(layer, q, k, v)  # (Hq, 1, D)
        n, expected, recovery = decoder.n_tokens, [], []
        attended = torch.ones(2, 25, dtype=bool) if layer == 0 else decoder.attended(layer - 1, 25)
        tokens = attended.repeat_interleave(8, 1)[:, :n]  # (heads, T)
        for head in range(4):
            logits = torch.tensor(naive_logits(q[head, 0], decoder.cache.k[layer, head // 2], n))
            p = logits.exp() * tokens[head // 2]
            expected.append(p / p.sum() @ decoder.cache.v[layer, head // 2].flatten(0, 1)[:n])
            recovery.append(p.sum() / logits.exp().sum())
        torch.testing.assert_close(out[:, 0], torch.stack(expected), atol=1e-5, rtol=1e-4)
        if layer:
            torch.testing.assert_close(decoder.recovery[-1][layer - 1], torch.stack(recovery), atol=1e-5, rtol=1e-4)
        counted += int(tokens.sum()) * 2 * 16 * 4
        steps.append(layer)
        return out

    decoder.decode_attention = check
    for token in range(4):
        decode_one_token(model, decoder, torch.tensor([token]))
    assert steps == [0, 1, 2] * 4
    assert decoder.stats.attention_bytes - before == counted


def test_following_dense_attention_leaves_its_logits():
    model, outputs = tiny_llama(), []
    for budget in (64, 1024):
        config = Config(**SHAPE | dict(budget=budget, calibration_interval=2))
        options = dict(rival=RIVALS["random"](), follow_dense=True, measure_every=1)
        decoder = RivalDecoder(config, model, random_predictor(), 200, **options)
        prefill(model, decoder, torch.arange(150) % 61)
        outputs.append(torch.stack([decode_one_token(model, decoder, torch.tensor([t])) for t in range(5)]))
        assert (torch.stack(decoder.recovery).min() < 0.99) == (budget == 64)
    torch.testing.assert_close(*outputs)
