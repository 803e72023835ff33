"""The dtype in which devices add up their gradients.

A device's matrix products give gradients in the dtype of the computation. If a parameter is cast to that dtype before
the devices share it, the gradients travel and add up in it, and the sum is cast to the parameter's dtype.
"""

from typing import Literal

import jax
from jaxtyping import PyTree

from examples.train.optimizer import is_matrix

ReduceDtype = Literal["float32", "bfloat16"]
READ_WIDE = ("embed", "head", "router")
"""Parts whose gradients are added up in float32: a router computes in it, and the two tables are small."""


def shared_in(params: PyTree, dtype: ReduceDtype) -> PyTree:
    """The parameters as the devices share them. bfloat16 casts every kernel that the model reads in bfloat16 only."""
    if dtype == "float32":
        return params

    def cast(path, leaf, matrix):
        return leaf.astype(dtype) if matrix and not {entry.key for entry in path}.intersection(READ_WIDE) else leaf

    return jax.tree_util.tree_map_with_path(cast, params, is_matrix(params))
