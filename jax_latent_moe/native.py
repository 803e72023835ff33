"""Finds and loads the library of compiled kernels, registers it with XLA, and calls it."""

import functools
from typing import NamedTuple

import jax


class Library(NamedTuple):
    kernels: dict[str, int]
    missing: str | None


@functools.cache
def library() -> Library:
    return Library({}, "its compiled library is not there.")


def call(target, operands, results, *, input_output_aliases=None, **attributes):
    return jax.ffi.ffi_call(
        f"latent_moe_{target}", results, vmap_method="sequential", input_output_aliases=input_output_aliases
    )(*operands, **attributes)
