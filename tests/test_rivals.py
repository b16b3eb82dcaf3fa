"""Compares every rival's scores with its definition, and decoding with each rival with attention by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from attnpred import Config, decode_one_token
from experiments.evaluate import Setting, prefill_together
from experiments.rivals import RIVALS
from model import causal_attention
from tests.helpers import random_predictor, tiny_llama

SHAPE = dict(block_size=8, history_len=8, sink_tokens=8, local_tokens=16, budget=64, dense_layers=1)
N_PROMPT = 150
TOKENS = torch.randint(0, 61, (200,), generator=torch.Generator().manual_seed(3))


def decoded(name, n_new=20, **changes):
    """A RivalDecoder that has read a prompt and decoded n_new tokens."""
    intervals = dict(calibration_interval=3, selection_interval=2)
    model, setting = tiny_llama(), Setting(name, Config(**SHAPE | intervals | RIVALS[name]().changes | changes))
    prompt = TOKENS[:N_PROMPT]
    (decoder,), _ = prefill_together(model, random_predictor(), [setting], prompt, N_PROMPT, 50, measure_every=1)
    for token in TOKENS[N_PROMPT : N_PROMPT + n_new]:
        decode_one_token(model, decoder, token[None])
    return decoder


def scored(decoder, layer, q=None):
    """The middle blocks [start, end), and the rival's scores of them: (heads, n)."""
    start, end = decoder.config.middle(decoder.n_tokens)
    return start, end, decoder.rival.score(decoder, layer, slice(start, end), q)


def prompt_queries(layer):
    """All queries of the prompt in a layer: (Hq, N_PROMPT, D)."""
    queries = []

    def attend(layer, q, k, v):
        queries.append(q)
        return causal_attention(layer, q, k, v)

    tiny_llama().hidden(TOKENS[:N_PROMPT], torch.arange(N_PROMPT), attend)
    return queries[layer]


def probabilities(q, k_cache, n_tokens):
    """One head's attention: q (D,), k_cache (capacity, b, D) -> (n_tokens,)."""
    return (k_cache.flatten(0, 1)[:n_tokens] @ q / math.sqrt(len(q))).softmax(0)


def group_means(per_query):
    """Rows (n,) of the four query heads -> (2, n)."""
    return torch.stack(per_query).unflatten(0, (2, 2)).mean(1)


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("name, power", [("decayed-mean", 1), ("decayed-rms", 2)])
def test_scores_from_the_history(name, power, decay):
    decoder = decoded(name)
    decoder.rival = RIVALS[name](decay)
    for layer in range(2):
        start, end, found = scored(decoder, layer)
        window = decoder.window()[layer, ..., start:end]  # (heads, H, n), oldest first
        torch.testing.assert_close(found, sum(window[:, 7 - age] ** power * decay**age for age in range(8)))


@pytest.mark.parametrize("name", ["quest", "mean-std", "oracle"])
def test_scores_with_the_query(name):
    decoder, layer, q = decoded(name), 1, torch.randn(4, 16)
    start, end, found = scored(decoder, layer, q)
    k_cache, rows = decoder.cache.k[layer + 1], []
    for head in range(4):
        keys = k_cache[head // 2, start:end]  # (n, b, D)
        if name == "oracle":
            p = probabilities(q[head], k_cache[head // 2], decoder.n_tokens)
            rows.append(torch.stack([p[8 * block : 8 * block + 8].sum() for block in range(start, end)]))
        elif name == "quest":
            rows.append(((q[head] * keys).amax(1).sum(-1) / 4).softmax(0))  # D ** .5 = 4
        else:
            rows.append(((keys.mean(1) @ q[head] + keys.var(1, correction=0).sqrt() @ q[head].abs()) / 4).softmax(0))
    torch.testing.assert_close(found, group_means(rows), atol=1e-4, rtol=1e-3)


def test_snapkv_votes():
    decoder, queries, rows = decoded("snapkv", n_new=40), prompt_queries(2), []
    start, end, found = scored(decoder, 1)
    for head in range(4):
        votes = torch.zeros(N_PROMPT)
        for voter in range(N_PROMPT - 64, N_PROMPT):
            votes[: voter + 1] += probabilities(queries[head, voter], decoder.cache.k[2, head // 2], voter + 1) / 64
        pooled = [votes[max(0, t - 3) : t + 4].max().item() for t in range(N_PROMPT)]
        rows.append(torch.tensor([max(pooled[8 * b : 8 * b + 8], default=math.inf) for b in range(start, end)]))
    assert end > 19  # 19 blocks are the prompt's
    torch.testing.assert_close(found, group_means(rows))


def test_ada_snapkv_keeps_a_floor_per_head():
    decoder = decoded("ada-snapkv")
    decoder.rival.floor = 0.5
    scale = torch.tensor([1e-3, 1e-3, 1, 1])[:, None]  # the first head's votes are too low to get anything
    decoder.rival.notes[0] = decoder.rival.notes[0] * scale
    start, end = decoder.config.middle(decoder.n_tokens)
    with torch.inference_mode():
        decoder.next_lists = decoder.make_lists(decoder.scores(start, end), start, end)
    counts = [decoder.attended(layer, end)[:, start:].sum(1).tolist() for layer in range(2)]
    assert counts[0] == [2, 8] and min(counts[1]) >= 2 and sum(counts[1]) == 10  # K = 5


def test_h2o_keeps_heavy_and_recent_and_never_returns(monkeypatch):
    """The test simulates H2O from the history rows, one selection after another."""
    monkeypatch.setattr(RIVALS["h2o"], "chunk_rows", 64)
    decoder, queries = decoded("h2o", n_new=0, selection_interval=4), prompt_queries(1)
    model, layer, k = tiny_llama(), 0, 5
    total = torch.zeros(19)
    for position in range(N_PROMPT):
        for head in range(2):  # of the first selection head
            p = probabilities(queries[head, position], decoder.cache.k[1, 0], position + 1)
            total += F.pad(p, (0, 19 * 8 - len(p))).view(19, 8).amax(1) / 2
    total = total.tolist()
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
            found = decoder.rival.notes[layer][0][0]  # (N,)
            torch.testing.assert_close(found, torch.tensor(total[: len(found)]), atol=5e-3, rtol=2e-3)
            dropped |= set(range(start, end)) - attended
            for block in dropped:
                total[block] = 0.0
        decode_one_token(model, decoder, torch.tensor([step]))
        row = decoder.window()[layer, 0, -1].tolist()
        total = [a + b for a, b in zip(total + [0.0] * (len(row) - len(total)), row)]


def test_streaming_llm_attends_to_the_latest():
    decoder = decoded("streaming-llm")
    attended = decoder.attended(0, decoder.config.n_blocks(decoder.n_tokens))
    last = attended.shape[1] - attended[0, 1:].sum()
    assert attended[:, 0].all() and attended[:, last:].all() and attended.sum() == 2 * (1 + attended.shape[1] - last)


@pytest.mark.parametrize("name, rows", [*((name, None) for name in RIVALS), ("quest", "every")])
def test_decoding_attends_to_what_was_chosen(name, rows):
    """Outputs and recovery are computed by hand from the blocks that `attended` reports."""
    decoder, steps = decoded(name, **({"history_rows": rows} if rows else {})), []
    decode_attention = decoder.decode_attention

    def check(layer, q, k, v):
        out = decode_attention(layer, q, k, v)  # (Hq, 1, D)
        n, expected, recovery, mass = decoder.n_tokens, [], [], []
        attended = torch.ones(2, 25, dtype=bool) if layer == 0 else decoder.attended(layer - 1, 25)
        tokens = attended.repeat_interleave(8, 1)[:, :n]  # (heads, T)
        for head in range(4):
            p = probabilities(q[head, 0], decoder.cache.k[layer, head // 2], n)  # (T,)
            mass.append(F.pad(p, (0, 200 - n)).view(25, 8).sum(1))  # (N,)
            p = p * tokens[head // 2]
            expected.append(p / p.sum() @ decoder.cache.v[layer, head // 2].flatten(0, 1)[:n])
            recovery.append(p.sum())
        torch.testing.assert_close(out[:, 0], torch.stack(expected), atol=1e-5, rtol=1e-4)
        if layer:
            torch.testing.assert_close(decoder.recovery[-1][layer - 1], torch.stack(recovery), atol=1e-5, rtol=1e-4)
        if layer and name == "oracle":
            middle = slice(*decoder.config.middle(n))
            chosen, mass = attended[:, middle], group_means(mass)[:, middle]  # (heads, n) each
            assert chosen.sum() == 10 and mass[chosen].min() >= mass[~chosen].max()  # K = 5, shared
        steps.append(layer)
        return out

    decoder.decode_attention = check
    for token in range(4):
        decode_one_token(tiny_llama(), decoder, torch.tensor([token]))
    assert steps == [0, 1, 2] * 4
