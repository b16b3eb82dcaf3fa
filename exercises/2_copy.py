"""Exercise 2: copying. Move the listed rows, however few, with a fixed number of programs.

    pytest test_kernels.py --exercise exercises/2_copy.py

    destination[to[i]] = source[from[i]]   for every i with from[i] >= 0

`copy_blocks_reference` in kernels.py is this in PyTorch; `copy_blocks` launches your kernel. It has sorted the indices:
all those with from[i] >= 0 come first. It cannot tell how many these are without waiting for the device; so every
program counts them itself. A row is WORDS integers of 4 bytes, cut into TILES = ceil(WORDS / TILE) tiles, and program i
takes every tl.num_programs(0)-th tile, so that all share the work. Two rows of three tiles each, two programs:

    from          [7,              4,              -1, -1]
    row i          0    0    0      1    1    1
    tile           0    1    2      3    4    5
    part of row    0    1    2      0    1    2     part 2 is ragged: it ends at WORDS, within the tile
    program        0    1    0      1    0    1

    source_ptr, destination_ptr              rows of WORDS integers, stride_source and stride_destination integers apart
    source_index_ptr, destination_index_ptr  n integers each: from and to

Hints, from vague to concrete
1. First count: walk over the n indices in tiles of CHUNK, and add up how many are >= 0, as int32. The last tile is
   ragged.
   Then loop: for tile in range(tl.program_id(0), n_copied * TILES, tl.num_programs(0)).
2. tile // TILES is i, and tile % TILES is the part of the row. tl.load(source_index_ptr + i) with a single integer i
   loads a single number. TILES is a constant: `TILES: tl.constexpr = tl.cdiv(WORDS, TILE)`.
3. The words are word = part * TILE + tl.arange(0, TILE), masked by word < WORDS in the load and in the store; what
   follows a row belongs to somebody else. Row numbers times strides may exceed 2^31: `.to(tl.int64)` on the number.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n"])
def _copy_kernel(
    source_ptr, destination_ptr, source_index_ptr, destination_index_ptr, n, stride_source, stride_destination,
    WORDS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    pass  # your code
