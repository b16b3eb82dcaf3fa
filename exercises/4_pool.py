"""Exercise 4: pooling. The largest attention probability of each block, without a matrix of probabilities.

    pytest test_kernels.py --exercise exercises/4_pool.py

    logits[i, t] = scale * (q[i] . k[t])   for the keys t <= position[i], -inf for later ones
    pooled[i, n] = max over the keys t of block n of exp(logits[i, t] - lse[i])   lse: log of the sum of exp(logits)

`pool_history_reference` in kernels.py is this in PyTorch. `pool_history` launches your kernel, which passes over K
once: it writes each block's largest logit, and the log-sum-exp of the keys it saw. The launcher combines these to
`pooled`.

Grid: (row tiles, splits, KV heads). The GROUP query heads of a KV head have `rows` queries each; together they are one
matrix of GROUP * rows rows, cut into tiles of TILE_ROWS. Row i is query i % rows of the group's head i // rows, and
position = n_tokens - 1 - (rows - 1 - i % rows) * row_distance. The keys are cut into tiles of TILE_BLOCKS blocks, and
split s of a program takes the tiles s * n_tiles // splits ... (s + 1) * n_tiles // splits - 1:

               keys of n_blocks blocks, one tile of TILE = TILE_BLOCKS * BLOCK_SIZE keys after the other
               tile 0      tile 1      tile 2       tile 3      tile 4 (ragged)
    q rows   [      split 0        ]  [              split 1              ]
    m, l      running values, tile by tile; at the end m + log(l) is this split's log-sum-exp

Running softmax: m is the largest logit so far, l the sum of exp(logit - m). When a tile raises m to m_new, the old sum
is worth l * exp(m - m_new). m begins at LOWEST, not at -inf, because -inf - -inf is NaN.

    q_ptr            (query heads, rows, HEAD_DIM): stride_qh, stride_qr, 1
    k_ptr            (KV heads, blocks, BLOCK_SIZE, HEAD_DIM): stride_kh, stride_kn, stride_kt, 1; n_tokens keys
    block_max_ptr    (query heads, rows, n_blocks) without gaps, to be written: the largest logit of each block
    partial_lse_ptr  (query heads, rows, splits) without gaps, to be written

Hints, from vague to concrete
1. Row i of KV head h lies in query head h * GROUP + i // rows, and is row h * GROUP * rows + i of both outputs. Load
   the q tile (TILE_ROWS, HEAD_DIM) once, with a mask for i < GROUP * rows; then loop over the tiles of keys.
2. Load K transposed, (HEAD_DIM, TILE): k_row[None, :] + d[:, None]. logits = tl.dot(q, k, input_precision="ieee") *
   scale, with both operands cast to OPERAND. A logit counts if key <= position, even for rows and keys that do not
   exist. Keys >= n_tokens may be NaN: mask their load.
3. block_max = tl.max(tl.reshape(logits, (TILE_ROWS, TILE_BLOCKS, BLOCK_SIZE)), 2); tl.max(block_max, 1) is the tile's.
   Store with both masks, i < GROUP * rows and column < n_blocks. KV head and block multiply large strides: int64.
"""

import triton
import triton.language as tl

from kernels import LOWEST


@triton.jit(do_not_specialize=["n_tokens", "n_blocks", "splits"])
def _pool_kernel(
    q_ptr, k_ptr, block_max_ptr, partial_lse_ptr,
    n_tokens, n_blocks, splits, rows, row_distance, scale,
    stride_qh, stride_qr, stride_kh, stride_kn, stride_kt,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE_BLOCKS: tl.constexpr, TILE_ROWS: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    pass  # your code
