"""Exercise 6: prediction. Two convolutions fused, on tensor cores, with nothing between them in memory.

    pytest test_kernels.py --exercise exercises/6_predict.py

    p = sum over c of w3[c] * relu(conv2(relu(conv1(image))))[c]       conv1: 1 -> 16 channels, conv2: 16 -> 32; 3 x 3

`contributions_reference` in kernels.py is this in PyTorch. `predict` launches your kernel for strips of the image, rows
top ... bottom - 1 and columns left ... end - 1, and takes the mean over rows. Read the section's first comment.

The image is the columns start ... end - 1 of the history_len rows of `history`; around it both convolutions see zeros.
Grid: (heads, tiles of TILE columns, chunks of ROWS rows of the strip). A program walks down the rows. Row r of conv1
enters three rows of conv2, through the bottom, middle and top row of conv2's taps, so three sums are alive:

    conv1's row      conv2's rows, as far as they are complete
                     r - 1           r             r + 1
    r                + bottom taps   + middle      + top taps, after the bias
                     is complete     becomes       becomes
                     now: write p    the r - 1     the r          of the next step

Both are matrix products. conv1 at a cell: its 3 x 3 patch, row by row, 9 of 16 entries and the others zero, times w1,
(16 taps, 16 channels). conv2, for each of its 9 taps: conv1's (TILE, 16) at the cells one column to the left, in the
middle, or to the right, times that tap's (16, 32).

    history_ptr        (heads, history_len, capacity): stride_hh, stride_hr, 1. Outside the image it may be NaN
    contributions_ptr  the same shape: stride_ph, stride_pr, 1. Write the program's own rows, columns < end
    w1_ptr, b1_ptr     (16 taps, 16 channels) without gaps, (16,)
    w2_ptr, b2_ptr     (3 rows of taps, 3 columns of taps, 16, 32) without gaps, (32,)
    w3_ptr             (32,)

Hints, from vague to concrete
1. The program's rows of p are first_row = top + program_id(2) * ROWS up to, not including, last_row = min(first_row +
   ROWS, bottom). It needs conv1's rows first_row - 1 ... last_row, one more on each side.
2. For dx in 0, 1, 2: conv1 is needed at x_column = column + dx - 1. Tap t of its patch is the cell in row
   row - 1 + t // 3 and column x_column - 1 + t % 3; mask it by t < 9 and by the image. x = tl.dot(patch, w1,
   input_precision=PRECISION) + b1, relu; and then zero where x_column or row lies outside the image, because conv2 pads
   with zeros, not with conv1's bias.
3. Each sum begins as b2, broadcast to (TILE, 32). In step row, add with tl.dot(x, taps, sum, input_precision=PRECISION)
   the taps (2, dx) to the sum of row - 1, (1, dx) to that of row, (0, dx) to that of row + 1. If row > first_row, the
   first of them is complete: p = tl.sum(relu(sum) * w3, 1) goes to row - 1. Then the sums move up.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["left", "end", "top", "bottom"])
def _contributions_kernel(
    history_ptr, contributions_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, w3_ptr,
    stride_hh, stride_hr, stride_ph, stride_pr, start, left, end, top, bottom, history_len,
    ROWS: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pass  # your code
