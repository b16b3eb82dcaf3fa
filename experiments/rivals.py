"""Other methods to select blocks. Each is a small class with one `score`; all decode through the same sparse path.

Reading order: `Rival`, the rivals, `RIVALS` (all by name), `RivalDecoder` (decodes with a rival's scores and measures
recovery).

All rivals select whole blocks and always attend to sink and local window; the budget counts all three. A rival only
ranks the middle blocks. If this makes a rival differ from its paper, its docstring says so.
"""

import torch
import torch.nn.functional as F

import kernels
from attnpred import SparseDecoder
from train_predictor import attention, block_mass

# Methods without a history: they never calibrate, write no row and select every 16 tokens.
NO_HISTORY = dict(calibration_interval=1 << 30, selection_interval=16, history_rows="true")

# --------------------------------------------------------------------------------------------------------------------
# The rivals
# --------------------------------------------------------------------------------------------------------------------


class Rival:
    """Ranks the middle blocks of a sparse layer with `score`."""

    needs_query = False  # True: it selects with the query of each token, so nothing can be prefetched
    changes = {}  # the Config fields that its paper fixes

    def __init__(self):
        self.notes = []  # what `prefill` returned for each sparse layer; `score` may update it

    def prefill(self, q, k_cache, n_tokens):
        """Returns what `score` needs to know of a layer's prompt: q (Hq, n_tokens, D), k_cache (Hk, N, b, D)."""

    def score(self, decoder, layer, middle, q) -> torch.Tensor:
        """Scores of the blocks in the slice `middle`, of a shape that broadcasts to (heads, n).

        decoder: a RivalDecoder; layer: an index of the sparse layers; q (Hq, D): this step's, if `needs_query`.
        """
        raise NotImplementedError

    def bytes_per_block(self, new_rows, vector_bytes):
        """Bytes that a selection reads per middle block and selection head.

        new_rows: history rows since the last selection; vector_bytes: bytes of one key.
        """
        return 0


class DecayedMean(Rival):
    """A baseline: scores a block by the sum of its history rows, weighted by decay ** age.

    With a decay of 0 that is the last row, with 1 the plain mean.
    """

    power = 1

    def __init__(self, decay=0.9):
        super().__init__()
        self.decay = decay

    def score(self, decoder, layer, middle, q):
        rows = decoder.rows(layer, decoder.config.history_len)[..., middle]  # (heads, H, n)
        age = torch.arange(rows.shape[1] - 1, -1, -1, device=rows.device)  # (H,)
        return torch.einsum("hrn,r->hn", rows**self.power, self.decay**age)

    def bytes_per_block(self, new_rows, vector_bytes):
        """The rows since the last selection, and a running sum of the earlier ones, in 16 bits."""
        return 2 * (1 + new_rows)


class DecayedRMS(DecayedMean):
    """A baseline: DecayedMean of the squared rows, which ranks as a decayed root mean square does."""

    power = 2


class Oracle(Rival):
    """Scores a block by its true attention in the same step, as an upper bound. Its reads are not counted."""

    needs_query, changes = True, NO_HISTORY

    def score(self, decoder, layer, middle, q):
        return decoder.group_mean(decoder.mass(layer, q)[:, middle])


class Quest(Rival):
    """Scores a block by an upper bound of its logits, computed from the smallest and largest value of each key channel.

    Tang et al. 2024, arXiv 2406.10774.
    """

    needs_query, changes = True, NO_HISTORY | dict(share_budget="head")

    def summarise(self, k):  # (Hk, n, b, D) -> (Hk, n, 2D)
        return torch.cat([k.amin(2), k.amax(2)], -1)

    def logits(self, q, low, high):  # (Hk, G, D), (Hk, n, D), (Hk, n, D) -> (Hk, G, n)
        return q.clamp(min=0) @ high.mT + q.clamp(max=0) @ low.mT

    def prefill(self, q, k_cache, n_tokens):
        return self.summarise(k_cache[:, : n_tokens // k_cache.shape[2]].float())  # full blocks only

    def score(self, decoder, layer, middle, q):
        known = self.notes[layer]  # (Hk, full blocks so far, 2D)
        if known.shape[1] < middle.stop:
            new = self.summarise(decoder.keys(layer)[:, known.shape[1] : middle.stop].float())
            self.notes[layer] = known = torch.cat([known, new], 1)
        q = q.float().unflatten(0, (len(known), -1))  # (Hk, G, D)
        logits = self.logits(q, *known[:, middle].chunk(2, -1)) * q.shape[-1] ** -0.5  # (Hk, G, n)
        return decoder.group_mean(logits.flatten(0, 1).softmax(-1))

    def bytes_per_block(self, new_rows, vector_bytes):
        return 2 * vector_bytes


class MeanStd(Quest):
    """Scores a block by a likely bound of its logits, from the mean and standard deviation of each key channel.

    If each channel of a key differs from its mean by at most one standard deviation, the key's logit differs from the
    mean key's by at most |q| * std, summed over the channels.
    """

    def summarise(self, k):
        return torch.cat([k.mean(2), k.std(2, correction=0)], -1)

    def logits(self, q, mean, std):
        return q @ mean.mT + q.abs() @ std.mT


class StreamingLLM(Rival):
    """Selects the most recent blocks. Xiao et al. 2024, arXiv 2309.17453."""

    changes = NO_HISTORY | dict(share_budget="head")

    def score(self, decoder, layer, middle, q):
        return torch.arange(middle.start, middle.stop, dtype=torch.float32, device=decoder.history.device)


class H2O(Rival):
    """Selects half of the blocks by the attention they received so far and half by recency.

    Zhang et al. 2023, arXiv 2306.14048. A block that was not selected is never selected again. The paper sums each
    token's attention and drops tokens during the prompt, too; here a block's attention is that of its largest token, as
    in the history, and the prompt is dense, as for all rivals.
    """

    changes = StreamingLLM.changes | dict(history_rows="every")
    bytes_per_block = DecayedMean.bytes_per_block
    chunk_rows = 256  # a prompt's query rows are pooled in pieces of this size

    def prefill(self, q, k_cache, n_tokens):
        """Returns each block's attention so far (Hq, N), and the step of the last selection."""
        total = torch.zeros(len(q), k_cache.shape[1], device=q.device)  # (Hq, N)
        for end in range(n_tokens, 0, -self.chunk_rows):
            pooled, _ = kernels.pool_history(q[:, max(0, end - self.chunk_rows) : end], k_cache, end)  # (Hq, rows, N)
            total[:, : pooled.shape[-1]] += pooled.sum(1)
        return total, 0

    def score(self, decoder, layer, middle, q):
        total, chosen_at = self.notes[layer]
        total = decoder.group_mean(total)  # (heads, N of the last selection)
        n_blocks = decoder.config.n_blocks(decoder.n_tokens)
        rows = decoder.rows(layer, min(decoder.step - chosen_at, decoder.config.history_len))  # (heads, rows, capacity)
        total = F.pad(total, (0, n_blocks - total.shape[1])) + rows.sum(1)[:, :n_blocks]  # (heads, N)
        if decoder.step:
            dropped = ~decoder.attended(layer, n_blocks)  # (heads, N)
            total[:, middle] = total[:, middle].masked_fill(dropped[:, middle], 0.0)
        self.notes[layer] = total, decoder.step
        heavy = total[:, middle].argsort(descending=True, stable=True).argsort()  # (heads, n): rank, 0 the heaviest
        recent = torch.arange(heavy.shape[1] - 1, -1, -1, device=total.device)  # (n,): rank, 0 the most recent
        return -torch.minimum(heavy, recent).float()  # for every K, the first K alternate between both kinds


class SnapKV(Rival):
    """Scores blocks once, by the attention of the prompt's last queries, max-pooled over neighbouring tokens.

    Blocks of the answer are always selected first. Li et al. 2024, arXiv 2404.14469. The paper ranks single tokens and
    keeps the answer in addition to its budget; here a block has the score of its best token, and the budget includes
    the blocks of the answer.
    """

    changes = StreamingLLM.changes
    voters, pooled_tokens = 64, 7

    def prefill(self, q, k_cache, n_tokens):
        votes = attention(q[:, -self.voters :], k_cache.flatten(1, 2), n_tokens).mean(1)  # (Hq, n_tokens)
        votes = F.max_pool1d(votes, self.pooled_tokens, stride=1, padding=self.pooled_tokens // 2)
        votes = F.pad(votes, (0, -n_tokens % k_cache.shape[2]))
        return votes.unflatten(-1, (-1, k_cache.shape[2])).amax(-1)  # (Hq, N)

    def score(self, decoder, layer, middle, q):
        votes = decoder.group_mean(self.notes[layer])  # (heads, N of the prompt)
        answer = max(0, middle.stop - votes.shape[1])
        return F.pad(votes, (0, answer), value=torch.inf)[:, middle]


class AdaKV(SnapKV):
    """Selects the best of a layer by SnapKV's scores, but gives every head at least the share `floor` of K blocks.

    Feng et al. 2024, arXiv 2407.11550.
    """

    floor = 0.2
    changes = SnapKV.changes | dict(share_budget="layer")

    def score(self, decoder, layer, middle, q):
        scores = super().score(decoder, layer, middle, q)  # (heads, n)
        # Adding 1 puts a head's first blocks above the others, because the scores of the prompt's blocks are at most 1.
        safe = scores.topk(int(self.floor * decoder.config.topk_blocks), -1).indices  # (heads, floor * K)
        return scores.scatter_add(1, safe, torch.ones_like(safe, dtype=scores.dtype))


RIVALS = {
    "oracle": Oracle,
    "decayed-mean": DecayedMean,
    "decayed-rms": DecayedRMS,
    "quest": Quest,
    "mean-std": MeanStd,
    "snapkv": SnapKV,
    "ada-snapkv": AdaKV,
    "h2o": H2O,
    "streaming-llm": StreamingLLM,
}


# --------------------------------------------------------------------------------------------------------------------
# The sparse decode path with a rival's selection
# --------------------------------------------------------------------------------------------------------------------


class RivalDecoder(SparseDecoder):
    """A SparseDecoder that selects blocks by a rival's scores (None: the predictor's) and measures recovery.

    `recovery` has a tensor (L', Hq) for every `measure_every`-th decoded token (0: for none): the share of the true
    attention that the attended blocks get, where q and k are those of this decoding.
    """

    def __init__(self, *args, rival=None, measure_every=0):
        super().__init__(*args)
        self.rival, self.measure_every = rival, measure_every
        self.recovery = []

    def take_prompt(self, layer, q, k, v):
        k, v = super().take_prompt(layer, q, k, v)  # (Hk, T, D) each
        if self.rival and layer >= self.dense_layers:  # a rival's prompt is read in one piece
            blocks = self.keys(layer - self.dense_layers)[:, : self.config.n_blocks(self.n_tokens)]  # (Hk, N, b, D)
            self.rival.notes.append(self.rival.prefill(q, blocks, self.n_tokens))
        return k, v

    # What a rival may read

    def keys(self, layer):
        return self.cache.k[layer + self.dense_layers]  # (Hk, capacity, b, D)

    def rows(self, layer, count):
        """The last `count` rows of a layer's history, oldest first: (heads, count, capacity) float32."""
        history = self.history[layer]  # (heads, H, capacity)
        slots = kernels.window_slots(self.newest, history.shape[1], history.device)  # (H,)
        return history[:, slots[len(slots) - count :]].float()

    def mass(self, layer, q):
        """The share of this step's true attention in each block of a layer: q (Hq, D) -> (Hq, N)."""
        return block_mass(q[:, None], self.keys(layer).flatten(1, 2), self.n_tokens, self.config.block_size)[:, 0]

    def group_mean(self, per_query):
        """(Hq, n) -> (heads, n): queries that select together share their mean. (heads, n) stays as it is."""
        return per_query.unflatten(0, (self.heads, -1)).mean(1)

    # What it selects

    def scores(self, start, end):
        if self.rival is None:
            return super().scores(start, end)
        if self.rival.needs_query:  # `decode_attention` replaces this selection
            return torch.zeros(self.sparse_layers, self.heads, end - start, device=self.history.device)
        return torch.stack([self.rank(layer, start, end) for layer in range(self.sparse_layers)])  # (L', heads, n)

    def rank(self, layer, start, end, q=None):
        """The rival's scores of a layer's blocks [start, end): (heads, n). Counts the bytes that it reads for them."""
        if self.step:  # the reads of the first selection belong to the prompt
            vector_bytes = self.model_config.head_dim * self.queries.element_size()
            block_bytes = self.rival.bytes_per_block(self.new_rows, vector_bytes)
            self.stats.choosing_bytes += self.heads * (end - start) * block_bytes
        return self.rival.score(self, layer, slice(start, end), q).expand(self.heads, -1)

    def decode_attention(self, layer, q, k, v):
        index = layer - self.dense_layers
        if index >= 0 and self.rival and self.rival.needs_query and self.selecting and self.config.topk_blocks:
            start, end = self.config.middle(self.n_tokens)
            chosen = self.make_lists(self.rank(index, start, end, q[:, 0])[None], start, end)
            self.attended_tokens -= self.heads  # `count_reads` adds this token
            self.cache.select(chosen, index)
            chosen.table_starts += index * len(chosen.table)
            for all_layers, one in zip(self.lists.tensors(), chosen.tensors()):  # this layer's part of the lists
                all_layers.view(self.sparse_layers, -1)[index] = one.flatten()
            self.cache.advance(self.position)
        out = super().decode_attention(layer, q, k, v)  # (Hq, 1, D)
        if index >= 0 and self.measure_every and self.step % self.measure_every == 0:
            self.measure(index, q)
        return out

    def measure(self, index, q):
        """Record the recovery of the sparse layer `index` in this step: q (Hq, 1, D)."""
        mass = self.mass(index, q[:, 0])  # (Hq, N)
        attended = self.attended(index, mass.shape[1]).repeat_interleave(len(mass) // self.heads, 0)  # (Hq, N)
        if index == 0:
            self.recovery.append(mass.new_zeros(self.sparse_layers, len(mass)))
        self.recovery[-1][index] = (mass * attended).sum(1)
