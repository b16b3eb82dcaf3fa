"""The KV cache in host memory: the device holds sink, local window and the selected blocks, fetched ahead.

    host     segments of (layers, blocks, Hk, 2, b, D), pinned: a block's K and V lie side by side; a longer text adds
             a segment
    device   a sparse layer has, for each selection head, slots of (2, b, D): S/b for the sink, K for the selection,
             and R/b + 1 that the local window goes round in; a dense layer has just the block that is not full yet

A new selection is compared with what the slots hold: blocks that stay keep their slot, the others are copied into the
slots of those that left. On a GPU that happens on a side stream, layer by layer, while the token's later layers run;
the next token's attention in that layer waits for one event. Dense layers, and the keys that calibration needs, stream
through two buffers, the keys on the side stream too, as no token waits for its own calibration.

Reading order: `OffloadedCache.write`, `select`, `attend`, and `stream` with its two users.

Source: the cross-token prefetching that arXiv 2502.04077 describes; layout and slots are this project's own.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F

import kernels

SEGMENT_BLOCKS = 64  # the host's memory grows by at least so many blocks
STAGED_BLOCKS = 64  # blocks that one of the two streaming buffers holds


class OffloadedCache:
    """Stands in for attnpred.KVCache: the same methods.

    c, m      attnpred.Config and model.LlamaConfig
    heads     selection heads, Hk or Hq
    """

    def __init__(self, c, m, heads, capacity_tokens, dtype, device, backend):
        self.c, self.n_layers, self.n_kv_heads, self.head_dim = c, m.n_layers, m.n_kv_heads, m.head_dim
        self.dtype, self.device, self.backend, self.heads = dtype, torch.device(device), backend, heads
        self.dense = min(c.dense_layers, m.n_layers)
        self.sink, self.ring = c.sink_tokens // c.block_size, c.local_tokens // c.block_size + 1
        sparse, block = m.n_layers - self.dense, (2, c.block_size, m.head_dim)
        factory = dict(dtype=dtype, device=device)
        self.slots = torch.zeros(sparse, heads, self.sink + c.topk_blocks + self.ring, *block, **factory)
        self.tail = torch.zeros(self.dense, m.n_kv_heads, 1, *block, **factory)
        self.staging = torch.zeros(2, STAGED_BLOCKS, m.n_kv_heads, *block, **factory)
        tables = dict(dtype=torch.int32, device=device)
        self.slot_of = torch.full((sparse, heads, c.n_blocks(capacity_tokens)), -1, **tables)  # of each block; -1: none
        self.block_of = torch.full((sparse, heads, c.topk_blocks), -1, **tables)  # in each slot; -1: none
        self.listed = [None] * sparse  # (heads, A) int32: the blocks that the next token attends to
        self.table = [None] * sparse  # (heads, A) int32: the slots that hold them
        self.segments = []  # (first block, host tensor), in order
        self.side = torch.cuda.Stream(device) if self.device.type == "cuda" else None
        self.ready = [torch.cuda.Event() for _ in range(sparse)] if self.side else None
        self.fetched = torch.zeros((), dtype=torch.int64, device=device)  # blocks copied into slots, all heads together
        self.wanted = 0  # blocks selected, all heads together
        self.streamed_bytes = self.written_bytes = 0  # through staging; to the host

    @property
    def overlaps(self) -> bool:
        """Whether a layer's next selection is made on the side stream as soon as the layer has attended."""
        return self.side is not None

    @property
    def block_bytes(self) -> int:
        """Of one head's K and V."""
        return 2 * self.c.block_size * self.head_dim * self.dtype.itemsize

    @staticmethod
    def device_bytes(c, m, heads, dtype) -> int:
        """What such a cache's K and V take on the device: slots, unfinished blocks of dense layers, staging."""
        dense = min(c.dense_layers, m.n_layers)
        slots = (c.sink_tokens + c.local_tokens) // c.block_size + 1 + c.topk_blocks
        blocks = (m.n_layers - dense) * heads * slots + (dense + 2 * STAGED_BLOCKS) * m.n_kv_heads
        return blocks * 2 * c.block_size * m.head_dim * dtype.itemsize

    @property
    def resident_bytes(self) -> int:
        """K and V that the device has room for, staging included."""
        return sum(t.numel() * t.element_size() for t in (self.slots, self.tail, self.staging))

    def begin_counting(self):
        """Counters at zero: what follows is decoding."""
        self.fetched.zero_()
        self.wanted = self.streamed_bytes = self.written_bytes = 0

    def format_stats(self, n_tokens, steps) -> list[str]:
        """Lines for people about `steps` decoded tokens, n_tokens in all."""
        full = n_tokens * self.n_layers * 2 * self.n_kv_heads * self.head_dim * self.dtype.itemsize
        per_token = {"fetched": int(self.fetched) * self.block_bytes, "wanted": self.wanted * self.block_bytes}
        per_token |= {"streamed": self.streamed_bytes, "written": self.written_bytes}
        per_token = {name: amount / steps / 1e6 for name, amount in per_token.items()}
        held = 1 - per_token["fetched"] / max(per_token["wanted"], 1e-9)
        fewer = f"{full / self.resident_bytes:.1f}x fewer"
        if full < self.resident_bytes:
            fewer = "at this length nothing is saved"
        return [
            f"resident   {self.resident_bytes / 1e6:,.2f} MB of KV, the whole cache {full / 1e6:,.2f} MB: {fewer}",
            f"host       {per_token['fetched']:,.2f} MB a token fetched, {held:.1%} of the selection was there already "
            f"(refetching all of it: {per_token['wanted']:,.2f} MB)",
            f"           {per_token['streamed']:,.2f} MB streamed for dense layers and calibration, "
            f"{per_token['written']:,.3f} MB written back",
        ]

    def on_side(self, *tensors):
        """The side stream, once it has waited for what the compute stream was given; without a GPU, nothing to do.

        `tensors` of the compute stream are read there: their memory is not given away before that.
        """
        if not self.side:
            return nullcontext()
        for tensor in tensors:
            tensor.record_stream(self.side)
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.side)

    # Writing

    def reserve(self, n_blocks):
        """Make room on the host: a further segment, if any is needed; the others stay where they are."""
        have = sum(segment.shape[1] for _, segment in self.segments)
        if n_blocks > have:
            blocks = max(n_blocks - have, SEGMENT_BLOCKS)
            shape = (self.n_layers, blocks, self.n_kv_heads, 2, self.c.block_size, self.head_dim)
            self.segments.append((have, torch.empty(shape, dtype=self.dtype, pin_memory=self.side is not None)))

    def write(self, layer, k, v, start):
        """Store k, v (Hk, T, D): the whole prompt when start is 0, else the one token at that position.

        Returns the prompt's keys (Hk, N, b, D), for pooling.
        """
        if start == 0:
            return self.write_prompt(layer, k, v)
        self.write_token(layer, k, v, start)

    def write_prompt(self, layer, k, v):
        b, n_tokens = self.c.block_size, k.shape[1]
        n_blocks, n_full = -(-n_tokens // b), n_tokens // b
        self.reserve(n_blocks)
        k, v = (F.pad(x, (0, 0, 0, -n_tokens % b)).unflatten(1, (n_blocks, b)) for x in (k, v))  # (Hk, N, b, D)
        blocks = torch.stack((k, v), 2)  # (Hk, N, 2, b, D)
        block_major = blocks.transpose(0, 1).contiguous()  # (N, Hk, 2, b, D)
        for first, segment in self.segments:
            part = block_major[first : min(n_full, first + segment.shape[1])]
            segment[layer, : len(part)].copy_(part, non_blocking=True)
            self.written_bytes += part.numel() * part.element_size()
        if layer < self.dense:
            self.tail[layer, :, 0] = blocks[:, -1]
            return k
        blocks = blocks.repeat_interleave(self.heads // self.n_kv_heads, 0)  # (heads, N, 2, b, D)
        for block in {*range(min(self.sink, n_blocks)), *range(max(0, n_blocks - self.ring), n_blocks)}:
            self.slots[layer - self.dense, :, self.home(block)] = blocks[:, block]
        return k

    def write_token(self, layer, k, v, position):
        block, at = divmod(position, self.c.block_size)
        self.reserve(block + 1)
        if self.side and layer >= self.dense:
            torch.cuda.current_stream(self.device).wait_event(self.ready[layer - self.dense])
        here = self.newest_block(layer, block)[:, 0]  # (heads, 2, b, D)
        kv = torch.cat((k, v), 1)  # (Hk, 2, D)
        here[:, :, at] = kv.repeat_interleave(len(here) // self.n_kv_heads, 0)
        if at == self.c.block_size - 1:  # full: written back, once
            first, segment = next(s for s in reversed(self.segments) if s[0] <= block)
            with self.on_side():
                whole = here[:: len(here) // self.n_kv_heads].contiguous()  # (Hk, 2, b, D)
                segment[layer, block - first].copy_(whole, non_blocking=True)
            self.written_bytes += whole.numel() * whole.element_size()

    def home(self, block: int) -> int:
        """The slot of a block of the sink, or of the local window."""
        return block if block < self.sink else self.sink + self.c.topk_blocks + block % self.ring

    def newest_block(self, layer, block):
        """Where the block that is being filled lies: (heads, 1, 2, b, D); Hk heads in a dense layer."""
        if layer < self.dense:
            return self.tail[layer]
        slot = self.home(block)
        return self.slots[layer - self.dense, :, slot : slot + 1]

    # Selecting and fetching

    def select(self, layer, blocks, n_tokens):
        """Have a sparse layer's blocks in slots by the time that n_tokens are attended to.

        layer   counted from the first sparse one
        blocks  (heads, A) int32: sink, selected, local; None: all that n_tokens have, where the budget covers them
        """
        n_blocks = self.c.n_blocks(n_tokens)
        start, end = self.c.middle(n_tokens)
        start, end = min(start, n_blocks), min(max(start, end), n_blocks)
        if blocks is None:
            every = torch.arange(n_blocks, dtype=torch.int32, device=self.device)
            blocks = every.expand(self.heads, -1).contiguous()  # (heads, N)
        n_local = n_blocks - end
        sink, chosen, local = blocks.tensor_split((start, blocks.shape[1] - n_local), 1)
        slots, fetch = kernels.assign_slots(chosen, self.slot_of[layer], self.block_of[layer], self.backend)
        self.fetch(layer, fetch, slots)
        self.listed[layer] = blocks
        ring = self.sink + self.c.topk_blocks + local % self.ring  # (heads, n_local)
        self.table[layer] = torch.cat([sink, self.sink + slots, ring], 1)  # (heads, A)
        if self.side:
            self.ready[layer].record()

    def fetch(self, layer, blocks, slots):
        """Copy blocks (heads, k), -1 for none, from the host into the selection slots (heads, k) of a sparse layer."""
        head = torch.arange(self.heads, dtype=torch.int32, device=self.device)[:, None]  # (heads, 1)
        kv_head = head * self.n_kv_heads // self.heads
        to = (head * self.slots.shape[2] + self.sink + slots).flatten()  # (heads * k,): rows of slots
        rows = self.slots[layer].flatten(0, 1).flatten(1)  # (heads * n_slots, 2 b D)
        for first, segment in self.segments:
            inside = (blocks >= first) & (blocks < first + segment.shape[1])
            come = torch.where(inside, (blocks - first) * self.n_kv_heads + kv_head, -1).flatten()  # (heads * k,)
            source = segment[layer + self.dense].flatten(0, 1).flatten(1)  # (blocks * Hk, 2 b D)
            kernels.copy_blocks(source, rows, come, to, self.backend)
        self.fetched += (blocks >= 0).sum()
        self.wanted += blocks.numel()

    # Attending

    def attend(self, layer, q, blocks, n_tokens, row):
        """Attention of q (Hq, D) over what `select` put in place, or over everything in a dense layer: see
        kernels.sparse_decode, whose results these are."""
        if layer < self.dense:
            parts = [
                kernels.sparse_decode(q, chunk[:, :, 0], chunk[:, :, 1], None, chunk_tokens, None, self.backend)
                for chunk, chunk_tokens in self.stream(layer, n_tokens, keys_only=False)
            ]
            out, lse = (torch.stack(x) for x in zip(*parts))  # (chunks, Hq, D), (chunks, Hq)
            share = torch.softmax(lse, 0)[..., None]  # (chunks, Hq, 1)
            return (out * share).sum(0).to(q.dtype), lse.logsumexp(0)
        layer -= self.dense
        table = self.table[layer]  # (heads, A)
        listed_tokens = table.shape[1] * self.c.block_size - (-n_tokens % self.c.block_size)
        k, v = self.slots[layer].unbind(2)  # (heads, n_slots, b, D) each
        return kernels.sparse_decode(q, k, v, table, listed_tokens, row, self.backend, self.listed[layer])

    def pool(self, layer, q, n_tokens):
        """`kernels.pool_history` of one query, q (Hq, 1, D), over all the keys, which stream through the device."""
        parts = [
            kernels.pool_history(q, chunk[:, :, 0], chunk_tokens, self.backend)
            for chunk, chunk_tokens in self.stream(layer, n_tokens, keys_only=True)
        ]
        lse = torch.stack([part for _, part in parts]).logsumexp(0)  # (Hq, 1)
        pooled = [p * torch.exp(part - lse)[..., None] for p, part in parts]
        return torch.cat(pooled, -1), lse  # (Hq, 1, N), (Hq, 1)

    def stream(self, layer, n_tokens, keys_only):
        """Yield a layer's blocks in order, in chunks on the device: (Hk, blocks, 2, b, D), and the tokens they hold.

        The block that is not full is on the device already, and comes last. A chunk is good until the next but one.
        """
        b, elements = self.c.block_size, self.c.block_size * self.head_dim
        n_full = n_tokens // b
        compute = torch.cuda.current_stream(self.device) if self.side else None
        read = [None, None]  # events: the buffer's chunk has been read
        number = 0
        for first, segment in self.segments:
            for begin in range(0, min(segment.shape[1], n_full - first), STAGED_BLOCKS):
                part = segment[layer, begin : min(begin + STAGED_BLOCKS, n_full - first)]  # (blocks, Hk, 2, b, D)
                buffer = self.staging[number % 2]
                index = torch.arange(len(part) * self.n_kv_heads * (1 if keys_only else 2), device=self.device).int()
                if keys_only:
                    source, target = (x.flatten(0, 1).flatten(1)[:, :elements] for x in (part, buffer))
                else:
                    source, target = (x.flatten(0, 2).flatten(1) for x in (part, buffer))
                if self.side:
                    self.side.wait_event(read[number % 2] or compute.record_event())
                with torch.cuda.stream(self.side) if self.side else nullcontext():
                    kernels.copy_blocks(source, target, index, index, self.backend)
                    copied = self.side.record_event() if self.side else None
                if self.side:
                    compute.wait_event(copied)
                self.streamed_bytes += index.numel() * elements * self.dtype.itemsize
                yield buffer[: len(part)].transpose(0, 1), len(part) * b
                read[number % 2] = compute.record_event() if self.side else None
                number += 1
        if n_tokens % b:
            whole = self.newest_block(layer, n_full)
            yield whole[:: len(whole) // self.n_kv_heads], n_tokens % b
