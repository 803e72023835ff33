"""Derivatives that a custom rule refuses, or takes of a part of its inputs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jax_latent_moe.errors import InputError
from jax_latent_moe.varying import zeros_of


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
        out = function(*tree.unflatten([next(moved) if leaf.perturbed else leaf.value for leaf in leaves]))
        return [leaf for leaf in jax.tree.leaves(out) if jnp.issubdtype(leaf.dtype, jnp.inexact)], out

    moved = [leaf.value for leaf in leaves if leaf.perturbed]
    _, pullback, out = jax.vjp(of_perturbed, moved, has_aux=True)
    # Residuals are arrays, but None and () are parts of their structure.
    return out, (pullback, tree.unflatten([() if leaf.perturbed else None for leaf in leaves]))


def gradients_of_perturbed(residuals: Any, cotangents: Any) -> Any:
    """The gradients of the primals of `vjp_of_perturbed`, None for those that are not differentiated."""
    pullback, perturbed = residuals
    leaves = jax.tree.leaves(cotangents, is_leaf=lambda leaf: isinstance(leaf, SymbolicZero))
    of_floats = [leaf for leaf in leaves if leaf.dtype != jax.dtypes.float0]  # an integer has no gradient
    given = [zeros_of(leaf.aval) if isinstance(leaf, SymbolicZero) else leaf for leaf in of_floats]
    moved = iter(pullback(given)[0])
    return jax.tree.map(
        lambda mark: None if mark is None else next(moved), perturbed, is_leaf=lambda node: node is None or node == ()
    )
