"""The checks that every row passes: values, gradients, padding rows, empty experts, determinism."""

import itertools

import jax
import numpy as np

from tests.conformance.oracle import compiled, oracle_run, random_group_sizes
from tests.conformance.rows import DTYPES, Row
from tests.tolerances import relative_error

EXPERTS, K, N, ROWS = 8, 5, 7, 24


def draw(row: Row, rng, dtype=None, rows=ROWS, experts=EXPERTS, k=K, n=N, transpose_w=False):
    """Rows, weights as the row stores them, and output gradient."""
    k, n, dtype = row.size(k), row.size(n), DTYPES[dtype or row.dtype]
    a, b = (n, k) if transpose_w else (k, n)
    left, w, dout = (rng.normal(size=shape).astype(dtype) for shape in ((rows, a), (experts, k, n), (rows, b)))
    return left, row.weight(w), dout


def check(row: Row, rows, w, group_sizes, dout, dtype=None, transpose_w=False, counted=None):
    """Compares every result with the oracle's. `counted` are the sizes that take effect, if they differ."""
    sizes = group_sizes if counted is None else counted
    total = int(np.sum(sizes))
    clean = [np.array(array) for array in (rows, dout)]
    for array in clean:
        array[total:] = 0
    expected = oracle_run(row.values_of_rows(clean[0]), row.values(w), sizes, clean[1], transpose_w)
    out = compiled(row, transpose_w)(rows, w, np.asarray(group_sizes, np.int32), dout)
    for name, value in out.items():
        assert value.dtype == rows.dtype, name
        error = relative_error(value, expected[name])
        assert error <= row.tolerance[dtype or row.dtype], f"{row} {name}: error {error:.3g} for sizes {list(sizes)}"
        assert not np.asarray(value)[~np.isfinite(np.float64(value))].size, name
    for name in {"out", "gradient of rows"} & set(out):
        assert not np.asarray(out[name])[total:].any(), f"{row} {name}: padding rows are not zero"
    for name in ("gradient of w", "wgrad"):
        if name in out:
            assert not np.asarray(out[name])[np.asarray(sizes) == 0].any(), f"{row} {name}: experts without rows"


def check_random_groups(row, rng):
    """Group sizes that add up to fewer rows or to all, every dtype, both orders of the weight."""
    for dtype, transpose_w in itertools.product(row.dtypes, (False, True)[: 1 + row.transposes]):
        for total in (ROWS, ROWS - 5):
            rows, w, dout = draw(row, rng, dtype, transpose_w=transpose_w)
            check(row, rows, w, random_group_sizes(rng, EXPERTS, total), dout, dtype, transpose_w)


def check_sizes_that_no_block_divides(row, rng):
    """One row, more experts than rows, sizes that no tile divides, no rows."""
    shapes = [(1, 1, 1, 1), (1, 5, 3, 2), (97, 3, 33, 17), (40, 20, 16, 1), (6, 1, 4, 4)]
    for count, experts, k, n in [*shapes, *([(0, 4, 3, 2)] * row.any_rows)]:
        rows, w, dout = draw(row, rng, rows=count, experts=experts, k=k, n=n)
        check(row, rows, w, random_group_sizes(rng, experts, count), dout)


def check_every_pattern_of_empty_experts(row, rng):
    """2^8 patterns; experts without rows have exactly zero gradients."""
    rows, w, dout = draw(row, rng, **({"k": 1, "n": 1} if row.row_format else {}))  # a block of codes is wide enough
    for pattern in itertools.product([0, 1], repeat=EXPERTS):
        present = np.flatnonzero(pattern)
        sizes = np.zeros(EXPERTS, np.int32)
        if present.size:
            more = rng.integers(present.size, size=ROWS - present.size)
            sizes[present] = 1 + np.bincount(more, minlength=present.size)
        check(row, rows, w, sizes, dout)


def check_all_rows_on_one_expert(row, rng):
    """Each expert in turn has all rows."""
    rows, w, dout = draw(row, rng)
    for expert in range(EXPERTS):
        check(row, rows, w, (ROWS * np.eye(EXPERTS, dtype=np.int32))[expert], dout)


def check_padding_rows_leak_nowhere(row, rng):
    """Padding rows hold NaN or infinity, which must not reach any other result."""
    for total, poison in itertools.product((0, 1, ROWS - 1), (np.nan, np.inf)):
        rows, w, dout = draw(row, rng)
        rows[total:], dout[total:] = poison, poison
        check(row, rows, w, random_group_sizes(rng, EXPERTS, total), dout)


def check_a_nan_row_poisons_its_own_row_alone(row, rng):
    """Rows of the same expert keep their values."""
    rows, w, dout = draw(row, rng)
    sizes, index = random_group_sizes(rng, EXPERTS, ROWS), int(rng.integers(ROWS))
    expected = oracle_run(row.values_of_rows(rows), row.values(w), sizes, dout)["out"]
    rows[index] = np.nan
    out = np.float64(compiled(row)(rows, w, sizes, dout)["out"])
    assert np.isnan(out[index]).all()
    assert relative_error(np.delete(out, index, 0), np.delete(expected, index, 0)) <= row.tolerance[row.dtype]


def check_group_sizes_are_cut_under_jit(row, rng):
    """A negative size counts as 0, and groups are cut at the last row."""
    rows, w, dout = draw(row, rng)
    for given, counted in (
        ([20, 20, 0, 0, 0, 0, 0, 3], [20, 4, 0, 0, 0, 0, 0, 0]),
        ([4, -3, 5, 0, 0, 0, 0, 2], [4, 0, 5, 0, 0, 0, 0, 2]),
        ([-(2**31), 24, 0, 0, 0, 0, 0, 0], [0, 24, 0, 0, 0, 0, 0, 0]),
        ([2**31 - 1, 1, 1, 1, 1, 0, 0, 0], [24, 0, 0, 0, 0, 0, 0, 0]),
        ([3, 2**31 - 1, 2**31 - 1, 1, 1, 0, 0, 2**31 - 1], [3, 21, 0, 0, 0, 0, 0, 0]),
    ):
        check(row, rows, w, given, dout, counted=counted)


def check_two_runs_give_equal_bits(row, rng):
    """Two runs give equal bits, because values are not summed by atomics."""
    rows, w, dout = draw(row, rng)
    arguments = rows, w, random_group_sizes(rng, EXPERTS, ROWS), dout
    for first, second in zip(*(jax.tree.leaves(compiled(row)(*arguments)) for _ in range(2)), strict=True):
        assert np.asarray(first).tobytes() == np.asarray(second).tobytes()


CHECKS = (
    check_random_groups,
    check_sizes_that_no_block_divides,
    check_every_pattern_of_empty_experts,
    check_all_rows_on_one_expert,
    check_padding_rows_leak_nowhere,
    check_a_nan_row_poisons_its_own_row_alone,
    check_group_sizes_are_cut_under_jit,
    check_two_runs_give_equal_bits,
)
