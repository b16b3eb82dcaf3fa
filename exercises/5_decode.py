"""Exercise 5: sparse flash-decoding. Attention of one token to the listed blocks only.

    pytest test_kernels.py --exercise exercises/5_decode.py

    out[h] = sum of softmax(scale * (q[h] . k[t])) v[t]   over the tokens t of the blocks that the table lists for h

`sparse_decode_reference` in kernels.py is this in PyTorch. Do exercise 4 first: the running softmax is the same, with
one more running value, acc, the sum of exp(logit - m) * v.

A row of the table lists block numbers; -1 is no block. It is read as a list of tokens: token j of the list is token
j % BLOCK_SIZE of block row[j // BLOCK_SIZE], and the list ends at lengths[head]. The list is walked in tiles of TILE
tokens, cut into splits of tiles_per_split tiles. BLOCK_SIZE = 4, TILE = 8, length 18, two splits:

    row              7            2          |   -1           9          |   4
    list position    0  1  2  3   4  5  6  7 |   8  9 10 11  12 13 14 15 |  16 17 : the list ends
    cache row        28 29 30 31  8  9 10 11 |   none        36 37 38 39 |  16 17
                     [------- tile 0 -------]    [------- tile 1 -------]  [------- tile 2 --
                     [------------------- split 0 ----------------------]  [------- split 1 -

`divide_work` in kernels.py has decided which program takes which split: row p of work_ptr, without gaps, holds four
integers for program p: the head, the first tile of its split, the program that takes this head's first split, and the
number of the head's splits. Splits of a head belong to consecutive programs. A split ends where the next program's
begins, and the last one where the list ends. A head of -1: nothing to do. Write

    partial_out_ptr  (programs, GROUP, HEAD_DIM) without gaps: acc / l of this program's split, and 0 where l is 0
    partial_lse_ptr  (programs, GROUP) without gaps: m + log(l)

and call _merge_splits, which is given, with done_ptr, out_ptr, lse_ptr and the constants that it takes. It lets the
last program of a head merge what all of them wrote.

    q_ptr            (KV heads * GROUP, HEAD_DIM): stride_qh, 1. The GROUP queries of a KV head share its list
    k_ptr, v_ptr     (blocks, BLOCK_SIZE, HEAD_DIM) each: stride_n, stride_t, 1. Blocks that no list names may be NaN
    table_ptr        (KV heads, width) integers: stride_table, 1; any numbers follow the end of a list
    lengths_ptr      (KV heads,) 64-bit integers

Hints, from vague to concrete
1. The split ends at cdiv(length, TILE) tiles, or, if program_id + 1 < first_program + splits, at the first tile of the
   next row of work_ptr. tl.dot needs 16 rows or more: load the GROUP queries as a tile (GROUP_PAD, HEAD_DIM), masked.
2. In a tile, load the block numbers of its TILE tokens, other=-1 after the end of the list. `listed = block >= 0` masks
   the loads of K (transposed: (HEAD_DIM, TILE)) and of V, and the logits: -inf where nothing is listed.
3. m_new = max(m, tile's max); p = exp(logits - m_new); rescale = exp(m - m_new); l = l * rescale + sum of p;
   acc = tl.dot(p, v, acc * rescale[:, None], input_precision="ieee"). Cast q, k, p and v to OPERAND, p to v.dtype
   before. A block number multiplies a large stride: block.to(tl.int64).
"""

import triton
import triton.language as tl

from kernels import LOWEST, _merge_splits


@triton.jit
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, lengths_ptr, work_ptr, done_ptr, partial_out_ptr, partial_lse_ptr, out_ptr, lse_ptr,
    scale, stride_qh, stride_table, stride_n, stride_t,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, OPERAND: tl.constexpr, QUERIES: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    pass  # your code
