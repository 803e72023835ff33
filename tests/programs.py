"""What a traced program computes."""

import jax
import jax.numpy as jnp


def floating_arrays(program):
    """The shape of every floating array that a jaxpr computes, those of its loops and calls included."""
    for equation in program.eqns:
        for var in equation.outvars:
            if jnp.issubdtype(var.aval.dtype, jnp.floating):
                yield var.aval.shape
        for inner in jax.tree.leaves(equation.params, is_leaf=_is_program):
            if _is_program(inner):
                yield from floating_arrays(getattr(inner, "jaxpr", inner))


def _is_program(node):
    return hasattr(node, "eqns")
