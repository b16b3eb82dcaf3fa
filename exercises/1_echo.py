"""Exercise 1: echoes. Find where the end of the text occurred before.

    pytest test_kernels.py --exercise exercises/1_echo.py

First read the docstring of kernels.py: what programs, tiles and masks are. `find_echoes_reference` there is this
exercise in PyTorch; the kernel below it, from "Grid:" on, is the solution, and `find_echoes` launches yours.

For every position p of the text, count the tokens before p that equal the text's last tokens:

    run(p)   = the largest j <= MATCH_TOKENS with ids[p - 1] = ids[position], ids[p - 2] = ids[position - 1], ...,
               ids[p - j] = ids[position + 1 - j]; 0 if there is none
    score(p) = run(p) * n_ids + p   if run(p) > 0 and p <= position, else -inf: the longest match wins, then the latest

    p           0    1    2    3    4    5
    ids        the  cat  sat   .   the  cat        position = 5: the text ends with "the cat",
    run(p)      0    0    2    0    0    0         and "sat" continued that before

A block of BLOCK_SIZE positions gets the largest score of its positions, but -inf unless
start <= block < (position + 1) // BLOCK_SIZE - local_blocks.

Program i works on the positions i * TILE ... (i + 1) * TILE - 1, which are TILE // BLOCK_SIZE whole blocks:

    program            0                   1                   2
    p            0 ... TILE-1       TILE ... 2 TILE-1    2 TILE ... | n_ids: nothing to read from here on
    scores       [TILE // BLOCK_SIZE of them]  ...                ... | n_blocks: nothing to write from here on

    ids_ptr       n_ids integers: the text is ids[0] ... ids[position]; what follows must not matter
    position_ptr  one integer, in memory: load it
    scores_ptr    n_blocks floats, to be written, with n_blocks * BLOCK_SIZE >= n_ids

Hints, from vague to concrete
1. Let j run from 1 to MATCH_TOKENS and compare, for all positions of the tile at once, ids[p - j] with one token of the
   text's end. A match of length j needs one of length j - 1: keep a tile of booleans, and add it to `run` each time.
2. p - j may be negative, p may lie beyond the text, and the text may have fewer than j tokens: each load needs a mask.
   Token ids are >= 0, so other=-1 for the text's end and other=-2 for ids[p - j] equal nothing.
3. tl.max(tl.reshape(score, (TILE_BLOCKS, BLOCK_SIZE)), 1) is the largest of each block. A shape must be known when the
   kernel is compiled: `TILE_BLOCKS: tl.constexpr = TILE // BLOCK_SIZE`. Store with mask=block < n_blocks.
"""

import triton
import triton.language as tl

from kernels import MATCH_TOKENS


@triton.jit(do_not_specialize=["start", "local_blocks", "n_ids", "n_blocks"])
def _echo_kernel(
    ids_ptr, position_ptr, scores_ptr, start, local_blocks, n_ids, n_blocks,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    pass  # your code
