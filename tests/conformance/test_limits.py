"""Group sizes may be any int32 numbers."""

import numpy as np
import pytest

from tests.conformance import suite
from tests.conformance.rows import every_row

EXPERTS, ROWS = 5, 20
BIG = 2**31 - 1


@every_row
@pytest.mark.parametrize(
    "sizes",
    [(BIG, 1, 1, 1, 1), (BIG, BIG, 3, 1, 1), (4, BIG, BIG, BIG, BIG), (3, -(2**31), 2, BIG, 7), (2, -5, 30, 1, BIG)],
    ids=str,
)
def test_sums_beyond_int32_are_cut_to_the_rows(rng, row, sizes):
    """Under jit a negative size counts as 0 and rows that do not exist are left out."""
    rows, w, dout = suite.draw(row, rng, rows=ROWS, experts=EXPERTS)
    ends = np.minimum(np.cumsum(np.maximum(np.int64(sizes), 0)), ROWS)
    suite.check(row, rows, w, sizes, dout, counted=np.diff(ends, prepend=0))
