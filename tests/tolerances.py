"""The tolerances of comparisons: one measure, one table."""

import math

import numpy as np

ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Half a unit in the last place, relative."""

RELATIVE = {"float64": 1e-12, "float32": 1e-5, "float16": 4 * ROUNDOFF["float16"], "bfloat16": 4 * ROUNDOFF["bfloat16"]}
"""Bound on `relative_error`, by the type of the computation."""


def relative_error(out, ref) -> float:
    """||out - ref|| / ||ref|| in float64; where ref is all zero, 0 if out is too and infinity if not."""
    out, ref = np.asarray(out, np.float64), np.asarray(ref, np.float64)
    assert out.shape == ref.shape, f"shape {out.shape} is not the reference's {ref.shape}"
    if not ref.size:
        return 0.0
    if not np.isfinite(out).all():
        return math.inf
    difference, size = np.linalg.norm(out - ref), np.linalg.norm(ref)
    if size == 0:
        return 0.0 if difference == 0 else math.inf
    return float(difference / size)


def assert_close(out, ref, dtype: str, name: str = "output"):
    """Fail unless out is within the tolerance of dtype from ref."""
    error = relative_error(out, ref)
    assert error <= RELATIVE[dtype], f"{name}: relative error {error:.3g} is over {RELATIVE[dtype]:.3g} ({dtype})"


def assert_trees_close(out, ref, dtype: str, name: str = "tree"):
    """`assert_close` on each leaf of two nested dicts with the same keys."""
    if not isinstance(ref, dict):
        return assert_close(out, ref, dtype, name)
    assert set(out) == set(ref), f"{name}: keys {sorted(out)} are not {sorted(ref)}"
    for key in ref:
        assert_trees_close(out[key], ref[key], dtype, f"{name}.{key}")
