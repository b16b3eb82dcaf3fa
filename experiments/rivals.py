"""Other methods to select blocks. Each is a small class with one `score`; all decode through the same sparse path.

Reading order: `attention`, `Rival`, the rivals, `RIVALS` (all by name), `RivalDecoder` (decodes with a rival's scores
and measures recovery), `PaperDecoder` (the setting of AttentionPredictor's paper).

All rivals select whole blocks and always attend to sink and local window; the budget counts all three. A rival only
ranks the middle blocks. If this makes a rival differ from its paper, its docstring says so.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F

import kernels
from attnpred import Config, History, KVCache, SparseDecoder


def attention(q, k, n_tokens):
    """Causal attention probabilities of the last rows of a text, in float32. All logits are in memory at once.

    q (Hq, rows, D): the queries of tokens n_tokens - rows ... n_tokens - 1; k (Hk, >= n_tokens, D) -> (Hq, rows, T)
    """
    n_heads, n_rows, head_dim = q.shape
    q = q.reshape(len(k), -1, head_dim).float() * head_dim**-0.5  # (Hk, G * rows, D)
    logits = (q @ k[:, :n_tokens].float().mT).view(n_heads, n_rows, n_tokens)  # (Hq, rows, T)
    future = torch.ones(n_rows, n_rows, dtype=torch.bool, device=q.device).triu(1)  # (rows, rows)
    logits[..., n_tokens - n_rows :].masked_fill_(future, -torch.inf)
    return logits.softmax(-1)


def block_mass(q, k, n_tokens, block_size):
    """The share of each row's attention that each block gets: (Hq, rows, N) float32. Arguments as for `attention`."""
    p = F.pad(attention(q, k, n_tokens), (0, -n_tokens % block_size))  # (Hq, rows, N * b)
    return p.unflatten(-1, (-1, block_size)).sum(-1)


# --------------------------------------------------------------------------------------------------------------------
# The rivals
# --------------------------------------------------------------------------------------------------------------------


class Rival:
    """Ranks the middle blocks of a layer with `score`."""

    # Its defaults, without echoes. Without a history, M is only the interval of selections.
    config = Config(calibration_interval=16, echo_blocks=0)
    has_history = False  # True: every M-th token, a true row enters the history
    needs_query = False  # True: it selects with the query of each token, so nothing can be prefetched
    needs_future = False  # True: `foresee` gets the whole text
    share = "head"  # what shares a budget: "head" (every head has its own K blocks), "layer", or "ours"

    def __init__(self):
        self.notes = []  # what `prefill` returned for each layer; `score` may update it

    def prefill(self, q, k_cache, n_tokens):
        """Returns what `score` needs to know of a layer's prompt: q (Hq, n_tokens, D), k_cache (Hk, N, b, D)."""

    def foresee(self, q, k, n_prompt, block_size):
        """Takes a layer's q (Hq, T, D), k (Hk, T, D) of the whole text, of which n_prompt tokens are the prompt."""

    def score(self, decoder, layer, middle, q) -> torch.Tensor:
        """Scores of the blocks in the slice `middle`, of a shape that broadcasts to (Hk, n).

        decoder: a RivalDecoder; q (Hq, D): this step's, if `needs_query`.
        """
        raise NotImplementedError

    def bytes_per_block(self, vector_bytes):
        """Bytes that a selection reads per middle block and KV head; vector_bytes: bytes of one key."""
        return 0


class DecayedRMS(Rival):
    """A baseline: scores a block by the sum of its squared history rows, weighted by decay ** age.

    It ranks as a decayed root mean square does. With a decay of 0 that is the last row, with 1 no row decays.
    """

    config, has_history, share = Config(), True, "ours"

    def __init__(self, decay=0.9):
        super().__init__()
        self.decay = decay

    def score(self, decoder, layer, middle, q):
        rows = decoder.rows(layer)[..., middle]  # (Hk, H, n)
        age = torch.arange(rows.shape[1] - 1, -1, -1, device=rows.device)  # (H,)
        return torch.einsum("hrn,r->hn", rows**2, self.decay**age)

    def bytes_per_block(self, vector_bytes):
        """The newest row, and a running sum of the earlier ones, in 16 bits."""
        return 2 * 2


class Oracle(Rival):
    """Scores a block by its true attention in the same step, as an upper bound. Its reads are not counted."""

    needs_query, share = True, "layer"

    def score(self, decoder, layer, middle, q):
        return decoder.group_mean(decoder.mass(layer, q)[:, middle])


class Future(Rival):
    """Scores a block by its true attention from the next M tokens: the bound of all predictions for M tokens.

    Its scores are the root mean square of the rows of these tokens in a dense run of the whole text, which has the same
    tokens. It calibrates as the method does, so that it reads as much.
    """

    config, has_history, needs_future, share = Config(), True, True, "ours"

    def foresee(self, q, k, n_prompt, block_size):
        group, total = len(q) // len(k), q.shape[1]
        keys = F.pad(k, (0, 0, 0, -total % block_size)).unflatten(1, (-1, block_size))  # (Hk, N, b, D)
        squares = [keys.new_zeros(len(k), 0, keys.shape[1])]  # (Hk, rows, N) each
        for first in range(n_prompt, total, 64):
            last = min(first + 64, total)
            pooled, _ = kernels.pool_history(q[:, first:last], keys, last)  # (Hq, rows, N)
            some = pooled.unflatten(0, (-1, group)).square().mean(1)  # (Hk, rows, N)
            squares.append(F.pad(some, (0, keys.shape[1] - some.shape[2])))
        self.notes.append(torch.cat(squares, 1))  # (Hk, T - n_prompt, N)

    def score(self, decoder, layer, middle, q):
        first = decoder.n_tokens - decoder.stats.prefill_tokens
        squares = self.notes[layer][:, first : first + decoder.interval].float().sum(1)  # (Hk, N)
        squares = F.pad(squares, (0, max(0, middle.stop - squares.shape[1])))  # after the text's end nothing is known
        return squares[:, middle].sqrt()  # ranks as the root mean square does

    def bytes_per_block(self, vector_bytes):
        """As the method's own prediction."""
        return 2 * (self.config.history_len + 4)


class Quest(Rival):
    """Scores a block by an upper bound of its logits, computed from the smallest and largest value of each key channel.

    Tang et al. 2024, arXiv 2406.10774.
    """

    needs_query = True

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

    def bytes_per_block(self, vector_bytes):
        return 2 * vector_bytes


class MeanStd(Quest):
    """A baseline: a likely bound of a block's logits, from the mean and standard deviation of each key channel.

    If each channel of a key differs from its mean by at most one standard deviation, the key's logit differs from the
    mean key's by at most |q| * std, summed over the channels.
    """

    def summarise(self, k):
        return torch.cat([k.mean(2), k.std(2, correction=0)], -1)

    def logits(self, q, mean, std):
        return q @ mean.mT + q.abs() @ std.mT


class StreamingLLM(Rival):
    """Selects the most recent blocks. Xiao et al. 2024, arXiv 2309.17453."""

    def score(self, decoder, layer, middle, q):
        return torch.arange(middle.start, middle.stop, dtype=torch.float32, device=decoder.model.device)


class SnapKV(Rival):
    """Scores blocks once, by the attention of the prompt's last queries, max-pooled over neighbouring tokens.

    Blocks of the answer are always selected first. Li et al. 2024, arXiv 2404.14469. The paper ranks single tokens and
    keeps the answer in addition to its budget; here a block has the score of its best token, and the budget includes
    the blocks of the answer.
    """

    voters, pooled_tokens = 64, 7

    def prefill(self, q, k_cache, n_tokens):
        votes = attention(q[:, -self.voters :], k_cache.flatten(1, 2), n_tokens).mean(1)  # (Hq, n_tokens)
        votes = F.max_pool1d(votes, self.pooled_tokens, stride=1, padding=self.pooled_tokens // 2)
        votes = F.pad(votes, (0, -n_tokens % k_cache.shape[2]))
        return votes.unflatten(-1, (-1, k_cache.shape[2])).amax(-1)  # (Hq, N)

    def score(self, decoder, layer, middle, q):
        votes = decoder.group_mean(self.notes[layer])  # (Hk, N of the prompt)
        answer = max(0, middle.stop - votes.shape[1])
        return F.pad(votes, (0, answer), value=torch.inf)[:, middle]


class AdaKV(SnapKV):
    """Selects the best of a layer by SnapKV's scores, but gives every head at least the share `floor` of K blocks.

    Feng et al. 2024, arXiv 2407.11550.
    """

    floor, share = 0.2, "layer"

    def score(self, decoder, layer, middle, q):
        scores = super().score(decoder, layer, middle, q)  # (Hk, n)
        # Adding 1 puts a head's first blocks above the others, because the scores of the prompt's blocks are at most 1.
        safe = scores.topk(int(self.floor * decoder.config.topk_blocks), -1).indices  # (Hk, floor * K)
        return scores.scatter_add(1, safe, torch.ones_like(safe, dtype=scores.dtype))


RIVALS = {
    "oracle": Oracle,
    "future": Future,
    "decayed-rms": DecayedRMS,
    "quest": Quest,
    "mean-std": MeanStd,
    "snapkv": SnapKV,
    "ada-snapkv": AdaKV,
    "streaming-llm": StreamingLLM,
}


# --------------------------------------------------------------------------------------------------------------------
# The sparse decode path with a rival's selection
# --------------------------------------------------------------------------------------------------------------------


class RivalDecoder(SparseDecoder):
    """A SparseDecoder that selects blocks by a rival's scores (None: the predictor's) and measures recovery.

    `recovery` has a list of tensors (Hq,), one per sparse layer, for every `measure_every`-th decoded token (0: for
    none): the share of the true attention that the attended blocks get, where q and k are those of this decoding.
    """

    dense_layers = 0

    def __init__(self, *args, rival=None, measure_every=0):
        super().__init__(*args)
        self.rival, self.measure_every, self.recovery = rival, measure_every, []
        self.share = rival.share if rival else "ours"
        if rival and not rival.has_history:
            self.history = None  # so it never calibrates

    def take_prompt(self, layer, q, k, v):
        k, v = super().take_prompt(layer, q, k, v)  # (Hk, T, D) each
        if self.rival and not self.rival.needs_future:  # a rival's prompt is read in one piece
            blocks = self.keys(layer)[:, : self.config.n_blocks(k.shape[1])]  # (Hk, N, b, D)
            self.rival.notes.append(self.rival.prefill(q, blocks, k.shape[1]))
        return k, v

    # What a rival may read

    def keys(self, layer):
        return self.cache.kv[0, layer]  # (Hk, capacity, b, D)

    def rows(self, layer):
        """A layer's history, oldest row first: (Hk, H, capacity) float32."""
        return self.history.rows.unflatten(0, self.cache.heads)[layer].float()

    def mass(self, layer, q):
        """The share of this step's true attention in each block of a layer: q (Hq, D) -> (Hq, N)."""
        return block_mass(q[:, None], self.keys(layer).flatten(1, 2), self.n_tokens, self.config.block_size)[:, 0]

    def group_mean(self, per_query):
        """(Hq, n) -> (Hk, n): queries that select together share their mean. (Hk, n) stays as it is."""
        return per_query.unflatten(0, (self.cache.heads[1], -1)).mean(1)

    def attended(self, layer, n_blocks):
        """Which blocks (Hk, n_blocks) bool a layer attends to: in this step or, after it, in the next."""
        cache, n_echoes = self.cache, self.config.echo_blocks
        echoes = cache.table[layer, :, :n_echoes] - cache.address[layer, :, :1]  # (Hk, E): blocks, below 0 for none
        mask = F.pad(cache.attended[layer], (0, 1))  # (Hk, capacity + 1)
        return mask.scatter_(1, torch.where(echoes < 0, cache.capacity, echoes).long(), True)[:, :n_blocks]

    # What it selects

    def scores(self, start, end):
        if self.rival is None:
            return super().scores(start, end)
        if self.rival.needs_query:  # `attend` replaces this selection
            return torch.zeros(*self.cache.heads, end - start, device=self.model.device)
        return torch.stack([self.rank(layer, start, end) for layer in range(self.cache.heads[0])])  # (L, Hk, n)

    def rank(self, layer, start, end, q=None):
        """The rival's scores of a layer's blocks [start, end): (Hk, n). Counts the bytes that it reads for them."""
        heads = self.cache.heads[1]
        if self.n_tokens > self.stats.prefill_tokens:  # the reads of the first selection belong to the prompt
            vector_bytes = self.model.config.head_dim * self.model.kv_dtype.itemsize
            self.stats.choosing_bytes += heads * (end - start) * self.rival.bytes_per_block(vector_bytes)
        return self.rival.score(self, layer, slice(start, end), q).expand(heads, -1)

    def choose(self, scores):
        """The best blocks by scores (L, heads, n), as bool: those of a layer, or of each head, share a budget."""
        if self.share == "ours":
            return super().choose(scores)
        rows = scores.flatten(0, 1) if self.share == "head" else scores.flatten(1)  # a row shares a budget
        k = self.config.topk_blocks * scores.numel() // (len(rows) * scores.shape[-1])
        best = kernels.select_blocks(rows, k, self.backend).long() if k else rows[:, :0].long()  # (rows, k)
        return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, best, True).view(scores.shape)

    def attend(self, layer, q, k, v, written=False):
        if self.rival and self.rival.needs_query and self.selecting:
            self.cache.write(layer, k, v)
            self.select_now(layer, q[:, 0])
        out = super().attend(layer, q, k, v, written)  # (Hq, 1, D)
        n_blocks = self.config.n_blocks(self.n_tokens)
        if self.measure_every and (self.n_tokens - self.stats.prefill_tokens) % self.measure_every == 0:
            if layer == 0:
                self.recovery.append([])
            if layer >= self.dense_layers:
                mass, attended = self.mass(layer, q[:, 0]), self.attended(layer, n_blocks)  # (Hq, N), (heads, N)
                self.recovery[-1].append((mass * attended.repeat_interleave(len(q) // len(attended), 0)).sum(1))
        return out

    def select_now(self, layer, q):
        """Select a layer's blocks for this token, by its query q (Hq, D)."""
        cache, one = self.cache, slice(layer, layer + 1)
        start, end = self.config.middle(self.n_tokens)
        chosen = self.choose(self.rank(layer, start, end, q)[None])  # (1, Hk, n)
        lists = cache.lists(cache.address[one], chosen, start, end, self.n_tokens)
        cache.attend_to(*lists, one)
        if self.config.echo_blocks:
            cache.echoes[one] -= (cache.table[one, :, : self.config.echo_blocks] >= 0).int()
            cache.attend_also(self.echo_block, one)


# --------------------------------------------------------------------------------------------------------------------
# The setting of the paper
# --------------------------------------------------------------------------------------------------------------------


def attend_masked(q, k, v, mask, n_tokens):
    """Attention of q (Hq, D) to the first n_tokens of k and v (Hk, capacity, b, D), in the blocks of mask (Hq, N).

    Returns the output (Hq, D), and the largest probability of each block (Hq, N).
    """
    block_size, group = k.shape[2], len(q) // len(k)
    k, v = (x[:, : mask.shape[1]].flatten(1, 2).float() for x in (k, v))  # (Hk, N * b, D)
    tokens = mask.repeat_interleave(block_size, 1) & (torch.arange(k.shape[1], device=q.device) < n_tokens)
    logits = q.unflatten(0, (-1, group)).float() @ k.mT * q.shape[1] ** -0.5  # (Hk, G, N * b)
    p = logits.flatten(0, 1).masked_fill(~tokens, -torch.inf).softmax(-1)  # (Hq, N * b)
    out = (p.unflatten(0, (-1, group)) @ v).flatten(0, 1)  # (Hq, D)
    return out.to(q.dtype), p.unflatten(1, (-1, block_size)).amax(-1)


class PaperCache(KVCache):
    """Each query head attends to blocks of its own, by a mask; the first layers attend to all."""

    def __init__(self, c, m, *args):
        super().__init__(c, m, *args)
        self.dense_layers = min(PaperDecoder.dense_layers, m.n_layers)
        shape = m.n_layers - self.dense_layers, m.n_heads, self.capacity
        self.mask = torch.ones(shape, dtype=torch.bool, device=self.device)  # (L', Hq, capacity): attended blocks
        self.rows = [None] * len(self.mask)  # (Hq, N) each: what the newest token attended to

    def attend(self, layer, q, n_tokens):
        if layer < self.dense_layers:
            return super().attend(layer, q, n_tokens)
        layer -= self.dense_layers
        mask = self.mask[layer, :, : self.config.n_blocks(n_tokens)]  # (Hq, N)
        out, self.rows[layer] = attend_masked(q, *self.kv[:, layer + self.dense_layers], mask, n_tokens)
        return out, None

    def pool(self, layers, q, n_tokens, distance, per_row):
        """Rows of each query head in the sparse ones of the layers: q (layers, Hq, r, D) -> (L', Hq, r, N)."""
        skipped = max(0, self.dense_layers - (layers.start or 0))  # dense layers among them
        q, keys = q[skipped:], self.kv[0, layers][skipped:]
        if not len(q):
            return q.new_zeros(0, q.shape[1], q.shape[2], self.config.n_blocks(n_tokens), dtype=torch.float32), None
        pooled, lse = kernels.pool_history(q.flatten(0, 1), keys.flatten(0, 1), n_tokens, distance, self.backend)
        return pooled.unflatten(0, q.shape[:2]), lse

    def select(self, chosen, start, end, n_tokens):
        if chosen is not None:
            self.mask[..., start:end] = chosen
            self.left_out = end - start - self.n_chosen(start, end)  # of each query head


class PaperDecoder(RivalDecoder):
    """The setting of AttentionPredictor's paper (arXiv 2502.04077), by masks: for its quality, not for speed.

    Every token leaves a row in the history, a true one every fifth token, else that of its sparse attention. Every
    query head has its own rows, and selects K blocks for every token. The first two layers are dense.
    """

    # its defaults; M = 1: a row and a selection for every token
    config = Config(sink_tokens=64, calibration_interval=1, calibration_queries=1, echo_blocks=0)
    dense_layers, true_row_interval = 2, 5

    def __init__(self, config, model, predictor, capacity_tokens, backend="torch", **options):
        super().__init__(config, model, predictor, capacity_tokens, backend, **options)
        m, place = model.config, (model.device, backend)
        self.share = "head"
        self.cache = PaperCache(config, m, self.cache.capacity, model.kv_dtype, *place)
        if self.history:
            heads = replace(m, n_layers=len(self.cache.mask), n_kv_heads=m.n_heads)  # those that have a history
            self.history = History(config, heads, self.cache.capacity, predictor, *place)

    def attended(self, layer, n_blocks):
        return self.cache.mask[layer - self.dense_layers, :, :n_blocks]

    def calibrate(self):
        rows = torch.stack(self.cache.rows)[:, :, None]  # (L', Hq, 1, N)
        if (self.n_tokens - self.stats.prefill_tokens) % self.true_row_interval == 0:
            rows, _ = self.pool(torch.stack(self.q))
            self.stats.calibration_bytes += self.key_bytes * self.n_tokens * len(rows) // self.model.config.n_layers
        self.history.push(rows)
        self.queries = []

    def scores(self, start, end):
        if self.n_tokens > self.stats.prefill_tokens:  # the first prediction belongs to prefill
            read = self.history.rows.itemsize * (self.config.history_len + 4) * (end - start)
            self.stats.choosing_bytes += len(self.history.rows) * read
        return self.history.scores(start, end).unflatten(0, self.cache.mask.shape[:2])  # (L', Hq, n)

    def count_reads(self):
        m, n = self.model.config, self.n_tokens
        heads = m.n_heads if self.selecting else m.n_kv_heads  # a query head that selects for itself reads for itself
        tokens = self.cache.dense_layers * m.n_kv_heads * n
        tokens += len(self.cache.mask) * heads * (n - self.cache.left_out * self.config.block_size)
        self.stats.dense_bytes += 2 * self.key_bytes * n
        self.stats.attention_bytes += 2 * self.key_bytes * tokens // (m.n_layers * m.n_kv_heads)
