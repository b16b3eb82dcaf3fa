"""The other ways to choose blocks, each a small class with one scoring method, run through the same sparse decode path.

Reading order: `Seen` (what a rival may look at), the rivals, `RIVALS` (all by name), `RivalDecoder` (decodes with a
rival's choice in the place of the prediction, and measures recovery at every step).

Common to all are whole blocks, sink and local window always attended, and a budget that counts all three. The rivals
only rank the middle blocks; where that makes them differ from their papers, the docstring says so.
"""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

import kernels
from attnpred import SparseDecoder, Stats

SNAPKV_WINDOW = 64  # last queries of the prompt that vote
SNAPKV_KERNEL = 7  # tokens over which votes are pooled


def block_mass(q, k_cache, n_tokens):
    """Share of each row's attention that each block carries: the sum where `kernels.pool_history` has the maximum.

    q (Hq, rows, D), k_cache (Hk, capacity, b, D) and n_tokens as there -> (Hq, rows, N) float32. Holds all logits.
    """
    n_heads, rows, head_dim = q.shape
    n_kv_heads, _, block_size, _ = k_cache.shape
    k = k_cache.flatten(1, 2)[:, :n_tokens].float()  # (Hk, T, D)
    q = q.reshape(n_kv_heads, -1, head_dim).float() * head_dim**-0.5  # (Hk, G * rows, D)
    logits = (q @ k.mT).view(n_heads, rows, n_tokens)  # (Hq, rows, T)
    position = torch.arange(n_tokens - rows, n_tokens, device=q.device)[:, None]  # (rows, 1)
    future = (
        torch.arange(n_tokens - rows, n_tokens, device=q.device) > position
    )  # (rows, rows): only the last keys can be
    logits[..., n_tokens - rows :].masked_fill_(future, float("-inf"))
    p = F.pad(logits.softmax(-1), (0, -n_tokens % block_size))  # (Hq, rows, N * b)
    return p.unflatten(-1, (-1, block_size)).sum(-1)


# --------------------------------------------------------------------------------------------------------------------
# What a rival may look at, and the rivals
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """One layer, just before a step; or in it, for a rival with `needs_query`. `heads` are selection heads."""

    history: torch.Tensor  # (heads, H, N) pooled attention rows as decoding kept them, oldest first
    k_cache: torch.Tensor  # (Hk, capacity, b, D)
    n_tokens: int  # of the step that chooses, its own token counted
    start: int  # the middle blocks that are to be ranked are start ... end - 1
    end: int
    memory: dict = field(default_factory=dict)  # what the rival noted in `prefill` and `observe`, for this layer
    q: torch.Tensor | None = None  # (Hq, D): the step's query, only for a rival with `needs_query`

    def group_mean(self, per_query):
        """(Hq, n) -> (heads, n): queries that select together share the mean."""
        return per_query.unflatten(0, (self.history.shape[0], -1)).mean(1)


class Rival:
    """Ranks the middle blocks: `score` -> what broadcasts to (heads, end - start). The rest is optional."""

    name = paper = ""
    needs_query = False  # True: scores with the query of the very step, so nothing can be prefetched

    def score(self, seen: Seen) -> torch.Tensor:
        raise NotImplementedError

    def prefill(self, q, k_cache, n_tokens, memory):
        """Take note of the prompt: q (Hq, n_tokens, D)."""

    def observe(self, mass, memory):
        """Take note of a decoded token's attention: mass (Hq, N), zeros where it did not attend."""


class Oracle(Rival):
    """The step's own true attention, summed over each block: the most that any choice of blocks can carry."""

    name, paper, needs_query = "oracle", "upper bound", True

    def score(self, seen):
        mass = block_mass(seen.q[:, None], seen.k_cache, seen.n_tokens)[:, 0]  # (Hq, N)
        return seen.group_mean(mass[:, seen.start : seen.end])


class LastRow(Rival):
    name, paper = "last row", "baseline"

    def score(self, seen):
        return seen.history[:, -1, seen.start : seen.end]


class Mean(Rival):
    name, paper = "mean", "baseline"

    def score(self, seen):
        return seen.history[..., seen.start : seen.end].mean(1)


class DecayedMean(Rival):
    name, paper, decay = "decayed mean", "baseline", 0.9

    def score(self, seen):
        rows = seen.history[..., seen.start : seen.end]  # (heads, H, n)
        age = torch.arange(rows.shape[1] - 1, -1, -1, device=rows.device)  # (H,)
        return torch.einsum("hrn,r->hn", rows, self.decay**age)


class StreamingLLM(Rival):
    """Sink and the most recent tokens: the whole budget goes to them."""

    name, paper = "StreamingLLM", "Xiao et al. 2024, arXiv 2309.17453"

    def score(self, seen):
        return torch.arange(seen.start, seen.end, dtype=torch.float32, device=seen.history.device)


class H2O(Rival):
    """Half of the choice to the blocks that drew most attention from all queries so far, half to the most recent ones.

    What was dropped once never returns. The paper drops during the prompt too; here the prompt is dense, as for all.
    """

    name, paper = "H2O", "Zhang et al. 2023, arXiv 2306.14048"
    chunk_rows = 128  # query rows of a prompt whose masses are held at once

    def prefill(self, q, k_cache, n_tokens, memory):
        total = q.new_zeros(q.shape[0], -(-n_tokens // k_cache.shape[2]), dtype=torch.float32)  # (Hq, N)
        for end in range(n_tokens, 0, -self.chunk_rows):
            rows = q[:, max(0, end - self.chunk_rows) : end]  # (Hq, rows, D)
            mass = block_mass(rows, k_cache, end).sum(1)  # (Hq, blocks of end)
            total[:, : mass.shape[1]] += mass
        memory["total"] = total

    def observe(self, mass, memory):
        total = memory["total"]
        memory["total"] = F.pad(total, (0, mass.shape[1] - total.shape[1])) + mass  # (Hq, N)
        memory["dropped"] = mass == 0  # (Hq, N)

    def score(self, seen):
        total = seen.memory["total"]  # (Hq, N)
        if "dropped" in seen.memory:
            total = total.masked_fill(seen.memory["dropped"], 0.0)
        total = seen.group_mean(total[:, seen.start : seen.end])  # (heads, n)
        heavy = total.argsort(descending=True).argsort()  # (heads, n): 0 for the heaviest
        recent = torch.arange(total.shape[1] - 1, -1, -1, device=total.device)  # (n,): 0 for the most recent
        return -torch.minimum(heavy, recent).float()  # the first K are both kinds in turn, whatever K is


class SnapKV(Rival):
    """The prompt's last queries vote, once; votes are max-pooled over tokens. Generated tokens are all kept.

    The paper ranks single tokens; a block stands where its best token does.
    """

    name, paper = "SnapKV", "Li et al. 2024, arXiv 2404.14469"

    def prefill(self, q, k_cache, n_tokens, memory):
        rows = q[:, -min(SNAPKV_WINDOW, n_tokens) :]  # (Hq, rows, D)
        by_token = k_cache.flatten(1, 2)[:, :, None]  # blocks of one token: (Hk, capacity * b, 1, D)
        pooled, _ = kernels.pool_history(rows, by_token, n_tokens)  # (Hq, rows, n_tokens)
        votes = F.max_pool1d(pooled.mean(1), SNAPKV_KERNEL, stride=1, padding=SNAPKV_KERNEL // 2)  # (Hq, n_tokens)
        block_size = k_cache.shape[2]
        votes = F.pad(votes, (0, -n_tokens % block_size)).unflatten(-1, (-1, block_size))  # (Hq, N, b)
        memory["votes"] = votes.amax(-1)  # (Hq, N)

    def score(self, seen):
        votes = seen.memory["votes"]  # (Hq, N of the prompt)
        generated = max(0, seen.end - votes.shape[1])
        return seen.group_mean(F.pad(votes, (0, generated), value=torch.inf)[:, seen.start : seen.end])


class Quest(Rival):
    """An upper bound of the query's logit in each block, from the block's elementwise smallest and largest key."""

    name, paper, needs_query = "Quest", "Tang et al. 2024, arXiv 2406.10774", True

    def score(self, seen):
        k = seen.k_cache[:, seen.start : seen.end].float()  # (Hk, n, b, D)
        q = seen.q.float().unflatten(0, (k.shape[0], -1))[:, :, None]  # (Hk, G, 1, D)
        low, high = k.amin(2)[:, None], k.amax(2)[:, None]  # (Hk, 1, n, D)
        bound = torch.maximum(q * low, q * high).sum(-1) * q.shape[-1] ** -0.5  # (Hk, G, n)
        return seen.group_mean(bound.flatten(0, 1).softmax(-1))


class Random(Rival):
    name, paper = "random", "lower bound"

    def score(self, seen):
        generator = torch.Generator().manual_seed(seen.n_tokens)
        return torch.rand(seen.history.shape[0], seen.end - seen.start, generator=generator).to(seen.history.device)


class Convolution(Rival):
    """This project's predictor, as it stands before it is made incremental: for tables in which all go one way."""

    name, paper = "AttentionPredictor", "Yang et al. 2025, arXiv 2502.04077"

    def __init__(self, predictor):
        self.weights = predictor.state_dict()

    def score(self, seen):
        newest = seen.history.shape[1] - 1
        return kernels.predict(seen.history, newest, seen.start, seen.end, self.weights)


RIVALS = {rival.name: rival for rival in (Oracle, LastRow, Mean, DecayedMean, StreamingLLM, H2O, SnapKV, Quest, Random)}


# --------------------------------------------------------------------------------------------------------------------
# The sparse decode path with a rival's choice
# --------------------------------------------------------------------------------------------------------------------


class RivalDecoder(SparseDecoder):
    """A SparseDecoder whose blocks a rival chooses (None: the predictor), and which measures recovery at every step.

    All `rivals` take note of the prompt, the first of them chooses; `restart` goes back to the end of the prompt with
    another one or another budget. `recovery` holds a (L', Hq) tensor a decoded token: the share of the true attention,
    given the hidden states that sparse decoding has led to, that the attended blocks carry. It is exp(lse_sparse -
    lse_true).
    """

    def __init__(self, config, model, predictor, capacity_tokens, rivals=(None,), backend="torch"):
        super().__init__(config, model, predictor, capacity_tokens, backend)
        self.rivals, self.rival = rivals, rivals[0]
        self.notes = {rival: [{} for _ in self.history] for rival in rivals if rival}  # of the prompt
        self.after_prompt = None
        self.begin()

    def begin(self):
        """What one rival leaves behind while it decodes."""
        self.memory = [dict(note) for note in self.notes[self.rival]] if self.rival else None
        self.attended = {}  # sparse layer -> blocks (heads, A) of this step; None: all
        self.recovery = []

    def restart(self, rival, budget):
        """Back to the end of the prompt; from here `rival` chooses, within `budget` tokens."""
        if self.after_prompt is None:
            self.after_prompt = self.n_tokens, self.newest, self.history.clone()
        self.n_tokens, self.newest, history = self.after_prompt
        self.history.copy_(history)
        self.step = self.predicted_end = 0
        self.config, self.rival, self.stats = replace(self.config, budget=budget), rival, Stats()
        self.begin()
        self.finish_token()

    def prefill_attention(self, layer, q, k, v):
        out = super().prefill_attention(layer, q, k, v)
        if layer >= self.config.dense_layers:
            for rival in filter(None, self.rivals):
                notes = self.notes[rival][layer - self.config.dense_layers]
                rival.prefill(q, self.cache.k[layer], self.n_tokens, notes)
            self.begin()
        return out

    def score_blocks(self, start, end, layers=slice(None)):
        if self.rival is None:
            return super().score_blocks(start, end, layers)
        indices = range(len(self.history))[layers]
        if self.rival.needs_query:  # the choice is made in `blocks_for`
            return torch.zeros(len(indices) * self.heads, end - start, device=self.history.device)
        slots = kernels.window_slots(self.newest, self.config.history_len, self.history.device)  # (H,)
        scores = [self.score(index, slots, start, end).expand(self.heads, -1) for index in indices]
        return torch.cat(scores)  # (layers * heads, n)

    def score(self, index, slots, start, end, n_tokens=None, q=None):
        """The rival's scores for sparse layer `index`."""
        n_tokens = n_tokens or self.n_tokens + 1
        history = self.history[index][:, slots, : self.config.n_blocks(n_tokens)]  # (heads, H, N)
        k_cache = self.cache.k[index + self.config.dense_layers]  # (Hk, capacity, b, D)
        return self.rival.score(Seen(history, k_cache, n_tokens, start, end, self.memory[index], q))

    def blocks_for(self, layer, q):
        blocks, index = super().blocks_for(layer, q), layer - self.config.dense_layers
        if blocks is not None and self.rival and self.rival.needs_query and self.config.topk_blocks:
            start, end = self.config.middle(self.n_tokens)
            scores = self.score(index, slice(0, 0), start, end, self.n_tokens, q[:, 0])  # (heads, n)
            chosen = kernels.select_blocks(scores, self.config.topk_blocks, self.backend) + start  # (heads, K)
            blocks = torch.cat([blocks[:, :start], chosen, blocks[:, start + chosen.shape[1] :]], 1)  # (heads, A)
        self.attended[index] = blocks
        return blocks

    def decode_attention(self, layer, q, k, v):
        out = super().decode_attention(layer, q, k, v)
        if layer >= self.config.dense_layers:
            self.measure(layer - self.config.dense_layers, q, self.cache.k[layer])
        return out

    def measure(self, index, q, k_cache):
        """Recovery of the step that just attended in sparse layer `index`, and the rival's own look at it."""
        mass = block_mass(q, k_cache, self.n_tokens)[:, 0]  # (Hq, N)
        if self.attended[index] is not None:
            listed = torch.zeros(self.heads, mass.shape[1], device=mass.device)
            listed.scatter_(1, self.attended[index].long(), 1.0)
            mass = mass * listed.repeat_interleave(len(mass) // self.heads, 0)  # (Hq, N)
        recovery = mass.sum(1)  # (Hq,)
        if index == 0:
            self.recovery.append(recovery.new_zeros(len(self.history), len(recovery)))
        self.recovery[-1][index] = recovery
        if self.rival:
            self.rival.observe(mass / recovery[:, None], self.memory[index])
