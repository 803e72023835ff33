"""Derivatives that a custom rule refuses, or takes of a part of its inputs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from jax_latent_moe.errors import InputError


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def refused_if_differentiated(message: str, y: Any) -> Any:
    """Returns y. Differentiating it raises `InputError`."""
    del message
    return y


@refused_if_differentiated.defjvp
def _refuse(message, primals, tangents):
    raise InputError(message)


def vjp_of_perturbed(function: Callable, *primals: Any) -> tuple[Any, Any]:
    """`jax.vjp` in the forward pass of a custom rule with symbolic_zeros=True.

    Arrays that are not differentiated are constants of the function. So rules inside of it compute no gradient of them.

    Args:
        function: of the primals' values.
        *primals: trees of `CustomVJPPrimal`.

    Returns:
        The function's result, and the residuals for `gradients_of_perturbed`.
    """
    leaves, tree = jax.tree.flatten(primals)

    def of_perturbed(moved):
        moved = iter(moved)
        return function(*tree.unflatten([next(moved) if leaf.perturbed else leaf.value for leaf in leaves]))

    out, pullback = jax.vjp(of_perturbed, [leaf.value for leaf in leaves if leaf.perturbed])
    # Residuals are arrays, but None and () are parts of their structure.
    return out, (pullback, tree.unflatten([() if leaf.perturbed else None for leaf in leaves]))


def gradients_of_perturbed(residuals: Any, cotangents: Any) -> Any:
    """The gradients of the primals of `vjp_of_perturbed`, None for those that are not differentiated."""
    pullback, perturbed = residuals
    cotangents = jax.tree.map(_as_array, cotangents, is_leaf=lambda leaf: isinstance(leaf, SymbolicZero))
    moved = iter(pullback(cotangents)[0])
    return jax.tree.map(
        lambda mark: None if mark is None else next(moved), perturbed, is_leaf=lambda node: node is None or node == ()
    )


def _as_array(cotangent):
    if not isinstance(cotangent, SymbolicZero):
        return cotangent
    aval: Any = cotangent.aval
    shape, dtype = aval.shape, aval.dtype
    return np.zeros(shape, dtype) if dtype == jax.dtypes.float0 else jnp.zeros(shape, dtype)
