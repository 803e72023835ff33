"""Finds the operations in a traced program."""

import jax
import jax.numpy as jnp


def floating_arrays(program):
    """The shape of every floating array that a jaxpr computes, including those in its loops and calls."""
    for equation in _equations(program):
        for var in equation.outvars:
            if jnp.issubdtype(var.aval.dtype, jnp.floating):
                yield var.aval.shape


def e4m3_arrays(program):
    """The shape of every E4M3 array that a jaxpr rounds to, and whether a loop does it."""
    for equation, looped in _equations_and_loops(program, in_loop=False):
        for var in equation.outvars:
            if equation.primitive.name == "convert_element_type" and var.aval.dtype == jnp.float8_e4m3fn:
                yield var.aval.shape, looped


def _equations(program):
    return (equation for equation, _ in _equations_and_loops(program, in_loop=False))


def _equations_and_loops(program, in_loop):
    """Every equation, and whether it is within a loop."""
    for equation in program.eqns:
        yield equation, in_loop
        for inner in jax.tree.leaves(equation.params, is_leaf=_is_program):
            if _is_program(inner):
                looped = in_loop or equation.primitive.name in ("scan", "while")
                yield from _equations_and_loops(getattr(inner, "jaxpr", inner), looped)


def _is_program(node):
    return hasattr(node, "eqns")
