"""Compares every rival's scores with its definition, and decoding with each rival with attention by hand."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from experiments.evaluate import Setting, base_config, prefill_together
from experiments.rivals import RIVALS
from model import causal_attention
from tests.helpers import random_predictor, tiny_llama

SHAPE = dict(block_size=8, history_len=8, sink_tokens=8, local_tokens=16, budget=64)
N_PROMPT = 150
TOKENS = torch.randint(0, 61, (200,), generator=torch.Generator().manual_seed(3))


def decoded(name, n_new=20, n_layers=3, **changes):
    """A RivalDecoder that has read a prompt and decoded n_new tokens."""
    model, setting = tiny_llama(n_layers), Setting(name, replace(base_config(name), **SHAPE | changes))
    (decoder,), _ = prefill_together(model, random_predictor(), [setting], TOKENS, N_PROMPT, 50, measure_every=1)
    for token in TOKENS[N_PROMPT : N_PROMPT + n_new]:
        decoder.decode(token[None])
    return decoder


def scored(decoder, layer, q=None):
    """The middle blocks [start, end), and the rival's scores of them: (Hk, n)."""
    start, end = decoder.config.middle(decoder.n_tokens)
    return start, end, decoder.rival.score(decoder, layer, slice(start, end), q)


def dense_pass(layer):
    """All queries and keys of a layer in a dense pass over TOKENS: (Hq, T, D), (Hk, T, D)."""
    seen = []

    def attend(layer, q, k, v):
        seen.append((q, k))
        return causal_attention(layer, q, k, v)

    tiny_llama().hidden(TOKENS, torch.arange(len(TOKENS)), attend)
    return seen[layer]


def probabilities(q, k_cache, n_tokens):
    """One head's attention: q (D,), k_cache (capacity, b, D) -> (n_tokens,)."""
    return (k_cache.flatten(0, 1)[:n_tokens] @ q / math.sqrt(len(q))).softmax(0)


def group_means(per_query):
    """Rows (n,) of the four query heads -> (2, n)."""
    return torch.stack(per_query).unflatten(0, (2, 2)).mean(1)


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_scores_from_the_history(decay):
    decoder = decoded("decayed-rms", calibration_interval=3)
    decoder.rival = RIVALS["decayed-rms"](decay)
    for layer in range(2):
        start, end, found = scored(decoder, layer)
        window = decoder.rows(layer)[..., start:end]  # (Hk, H, n), oldest first
        torch.testing.assert_close(found, sum(window[:, 7 - age] ** 2 * decay**age for age in range(8)))


@pytest.mark.parametrize("name", ["quest", "mean-std", "oracle"])
def test_scores_with_the_query(name):
    decoder, layer, q = decoded(name), 1, torch.randn(4, 16)
    start, end, found = scored(decoder, layer, q)
    k_cache, rows = decoder.cache.kv[0, layer], []
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


@pytest.mark.parametrize("n_new", [0, 4, 49])
def test_future_scores_with_the_next_tokens_of_a_dense_pass(n_new):
    """After 49 of 50 tokens, one is left of the interval's five."""
    decoder, layer, (q, k) = decoded("future", n_new, calibration_interval=5), 1, dense_pass(1)
    start, end, found = scored(decoder, layer)
    rows = []
    for head in range(4):
        squares = torch.zeros(25)
        for position in range(N_PROMPT + n_new, min(N_PROMPT + n_new + 5, 200)):
            p = probabilities(q[head, position], k[head // 2][:, None], position + 1)  # (T,)
            squares += F.pad(p, (0, 199 - position)).view(25, 8).amax(1).square()
        rows.append(squares[start:end])
    torch.testing.assert_close(found, group_means(rows).sqrt(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["quest+echo", "mean-std+echo"])
def test_echoes_for_a_rival(name):
    """Its own blocks, and those of the same echoes as ours; those that it attends to already are not read twice."""
    shape = SHAPE | dict(budget=96, calibration_interval=64)
    model, setting = tiny_llama(), Setting(name, replace(base_config(name), **shape))
    text = TOKENS[:N_PROMPT] % 11
    (decoder,), _ = prefill_together(model, random_predictor(), [setting], text, N_PROMPT, 20)
    read = 0
    for token in text[:20].split(1):
        decoder.decode(token)
        blocks = set(decoder.echo_block.tolist())
        for layer in range(3):
            entries = decoder.cache.table[layer, :, :4] - decoder.cache.address[layer, :, :1]  # (Hk, E)
            for head in range(2):
                new = {n for n in blocks if n < 25 and not decoder.cache.attended[layer, head, n]}
                assert {block for block in entries[head].tolist() if block >= 0} == new
                read += len(new)
    assert int(decoder.cache.echoes.sum()) == read > 0


def test_snapkv_votes():
    decoder, queries, rows = decoded("snapkv", n_new=40), dense_pass(1)[0], []
    start, end, found = scored(decoder, 1)
    for head in range(4):
        votes = torch.zeros(N_PROMPT)
        for voter in range(N_PROMPT - 64, N_PROMPT):
            votes[: voter + 1] += probabilities(queries[head, voter], decoder.cache.kv[0, 1, head // 2], voter + 1) / 64
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
    counts = decoder.choose(decoder.scores(start, end)).sum(-1).tolist()  # (L, Hk)
    assert counts[0] == [2, 8] and min(counts[1]) >= 2 and sum(counts[1]) == 10  # K = 5


def attended_row(decoder, layer, head, mask):
    """The largest probability of each block in the newest token's attention: (N,). mask (N,) bool restricts it."""
    p = probabilities(decoder.q[layer][head, 0], decoder.cache.kv[0, layer, head // 2], decoder.n_tokens)
    p = F.pad(p, (0, -len(p) % 8)).view(-1, 8)  # (N, b)
    if mask is not None:
        p = p * mask[: len(p), None] / p[mask[: len(p)]].sum()
    return p.amax(1)


def test_the_papers_rows_and_selections():
    """Every token leaves a row for each query head, a true one every fifth; K blocks of each head are the next ones."""
    decoder, layer, predictor = decoded("paper", n_new=0, n_layers=4, sink_tokens=16), 3, random_predictor()
    for step in range(1, 12):
        mask = decoder.attended(layer, 25).clone()  # (Hq, 25)
        decoder.decode(TOKENS[step][None])
        history = decoder.history.rows[4:].float()  # (Hq, H, capacity), of the second sparse layer
        for head in range(4):
            expected = attended_row(decoder, layer, head, None if step % 5 == 0 else mask[head])
            torch.testing.assert_close(history[head, -1, : len(expected)], expected, atol=1e-3, rtol=1e-3)
        start, end = decoder.config.middle(decoder.n_tokens + 1)
        scores = predictor(history[..., start:end])  # (Hq, n)
        chosen = decoder.attended(layer, 25)[:, start:end]  # (Hq, n)
        assert chosen.sum(1).tolist() == 4 * [4]
        lowest = scores.masked_fill(~chosen, torch.inf).amin(1)
        assert (scores.masked_fill(chosen, -torch.inf).amax(1) <= lowest + 1e-6).all()
    assert (mask != mask[:1]).any()  # the query heads of a KV head differ


def test_streaming_llm_attends_to_the_latest():
    decoder = decoded("streaming-llm")
    attended = decoder.attended(0, decoder.config.n_blocks(decoder.n_tokens))
    last = attended.shape[1] - attended[0, 1:].sum()
    assert attended[:, 0].all() and attended[:, last:].all() and attended.sum() == 2 * (1 + attended.shape[1] - last)


def echoes(ids, config):
    """The first E middle blocks that continue earlier occurrences of the last id: long matches first, then late."""
    n, found = len(ids), []
    for p in range(n - 1):
        run = 0
        while run < min(8, p + 1) and ids[p - run] == ids[n - 1 - run]:
            run += 1
        found += [(run, p + 1)] if run else []
    blocks = [p // config.block_size for _, p in sorted(found, reverse=True)]
    return list(dict.fromkeys(n for n in blocks if n in range(*config.middle(len(ids)))))[: config.echo_blocks]


@pytest.mark.parametrize("name", ["ours", "paper", *RIVALS, "quest+echo", "snapkv+echo"])
def test_decoding_attends_to_what_was_chosen(name):
    """Outputs and recovery are computed by hand from the blocks that `attended` reports."""
    decoder, steps = decoded(name), []
    attend, first = decoder.attend, decoder.dense_layers

    def check(layer, q, k, v):
        out = attend(layer, q, k, v)  # (Hq, 1, D)
        n, expected, recovery, mass = decoder.n_tokens, [], [], []
        attended = torch.ones(4, 25, dtype=bool) if layer < first else decoder.attended(layer, 25)  # (heads, N)
        per_query = attended.repeat_interleave(4 // len(attended), 0)  # (Hq, N)
        for head in range(4):
            k_cache, v_cache = decoder.cache.kv[:, layer, head // 2]
            p = probabilities(q[head, 0], k_cache, n)  # (T,)
            mass.append(F.pad(p, (0, 200 - n)).view(25, 8).sum(1))  # (N,)
            p = p * per_query[head].repeat_interleave(8)[:n]
            expected.append(p / p.sum() @ v_cache.flatten(0, 1)[:n])
            recovery.append(p.sum())
        torch.testing.assert_close(out[:, 0], torch.stack(expected), atol=1e-5, rtol=1e-4)
        if layer >= first:
            found = decoder.recovery[-1][layer - first]  # (Hq,)
            torch.testing.assert_close(found, torch.stack(recovery), atol=1e-5, rtol=1e-4)
            assert found.max() < 1  # something is left out
        chosen, middle = decoder.cache.attended[layer], slice(*decoder.config.middle(n))  # without echoes
        if name in ("oracle", "quest", "quest+echo"):
            chosen, mass = chosen[:, middle], group_means(mass)[:, middle]  # (Hk, n) each
            k = 1 if name == "quest+echo" else 5
            assert chosen.sum() == 2 * k
            assert mass[chosen].min() >= mass[~chosen].max() if name == "oracle" else chosen.sum(1).tolist() == [k, k]
        if decoder.config.echo_blocks:
            expected = decoder.cache.attended[layer, :, :25].clone()
            expected[:, echoes(decoder.ids[:n].tolist(), decoder.config)] = True
            assert torch.equal(attended, expected)
        steps.append(layer)
        return out

    decoder.attend = check
    for token in range(4):
        decoder.decode(torch.tensor([token]))
    assert steps == [0, 1, 2] * 4
    calibrates = name in ("ours", "paper") or RIVALS[name.removesuffix("+echo")].has_history
    assert (decoder.stats.calibration_bytes > 0) == calibrates
    assert (decoder.stats.echo_bytes > 0) == (decoder.config.echo_blocks > 0)
