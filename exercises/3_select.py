"""Exercise 3: selection. Write the indices of the k best scores, in order, many programs side by side.

    pytest test_kernels.py --exercise exercises/3_select.py

`select_blocks_reference` in kernels.py is this in PyTorch; `select_blocks` launches your kernel as the last of five.
The four launches before it (`_count_kernel`, a radix select; read its section) have found the k-th largest score. Each
score is treated as an unsigned integer that sorts alike, its *key*. The best k are

    all keys > kth,   and the first `ties` of the keys = kth         (ties = k - how many are larger)

Each program scans its own chunk of the row and writes the indices it selects right after those of the programs before
it: it must know how many these are. k = 5, three programs, keys of one digit, kth = 6, ties = 2:

    program        0            1            2
    keys        3 6 9 1      8 2 6 6      6 7 0 5
    > kth           9        8              7          larger = [1, 1, 1] of each program
    = kth         6              6 6      6            equal  = [1, 2, 1] of each program: the first two are selected
    selected      6 9        8   6          7
    writes at     0 1        2   3          4          program 1 begins at larger before it + min(equal before it, ties)

Given: key = _sortable(row_ptr, index, n), of a tile of indices; and, from the counts of the launches before,
kth, ties, larger, equal = _kth_key(counts_ptr, row, rows, programs, k, 4, PROGRAMS): two numbers, and two tiles
(PROGRAMS,) with an entry for each program, 0 for those that do not exist.

Grid: (programs, rows). The ceil(n / TILE) tiles of a row are shared out: program i scans the tiles
i * tiles // programs ... (i + 1) * tiles // programs - 1.

    scores_ptr   rows of n floats, stride_row floats apart
    counts_ptr   for _kth_key only
    blocks_ptr   rows of k integers, without gaps, to be written

Hints, from vague to concrete
1. `before = tl.arange(0, PROGRAMS) < program` masks a sum over the programs before this one. From it follow where this
   program begins to write, and how many of its own keys = kth are still selected: ties - equal before it.
2. In a tile, tl.cumsum of a 0/1 tile counts the entries so far, each including itself. So the r-th tie of the tile is
   selected if its cumsum <= ties, and a selected index is written at written + cumsum(taken) - 1.
3. After each tile, carry on: lower `ties` by the tile's number of ties, raise `written` by its number of selected keys.
   Entries with index >= n have a key as well: leave them out of both. row.to(tl.int64) before it multiplies a stride.
"""

import triton
import triton.language as tl

from kernels import _kth_key, _sortable


@triton.jit(do_not_specialize=["stride_row", "n", "programs"])
def _select_kernel(
    scores_ptr, counts_ptr, blocks_ptr, stride_row, n, k, programs, TILE: tl.constexpr, PROGRAMS: tl.constexpr
):
    pass  # your code
