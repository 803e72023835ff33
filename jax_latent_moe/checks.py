"""Checks of configuration values: each raises `ConfigError` with the name, the value and the rule."""

import dataclasses
import math

import jax.numpy as jnp

from jax_latent_moe.errors import ConfigError


def one_of(name, value, allowed):
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{name}={value!r} is unknown: use one of {', '.join(map(repr, allowed))}.")


def instance(name, value, cls):
    if not isinstance(value, cls):
        raise ConfigError(f"{name}={value!r} must be a {cls.__name__}.")


def boolean(name, value):
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} must be True or False.")


LARGEST_INT = 2**31 - 1
"""Of an int32, in which rows and experts are counted."""
LARGEST_FLOAT = (2 - 2**-23) * 2.0**127
"""Of a float32, in which scores and weights are computed."""


def positive_int(name, value):
    integer_from(name, value, 1)


def integer_from(name, value, least):
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={_shown(value)} must be an integer of at least {least}.")
    if value > LARGEST_INT:
        raise ConfigError(f"{name}={_shown(value)} must be at most {LARGEST_INT}: it is computed with in int32.")


def finite(name, value):
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) == math.inf:
        raise ConfigError(f"{name}={value!r} must be a finite number.")
    if abs(value) > LARGEST_FLOAT:
        raise ConfigError(
            f"{name}={_shown(value)} must be at most {LARGEST_FLOAT:.3g}: it is computed with in float32."
        )


def _shown(value):
    """A value as a message shows it; Python refuses to print integers of many digits."""
    long = isinstance(value, int) and value.bit_length() > 64
    return f"<an integer of {value.bit_length()} bits>" if long else repr(value)


def floats(config):
    """Makes floats of the integers given for float fields: XLA would compute with them in int32."""
    for field in dataclasses.fields(config):
        if field.type in (float, float | None) and type(getattr(config, field.name)) is int:
            object.__setattr__(config, field.name, float(getattr(config, field.name)))


def non_negative(name, value):
    finite(name, value)
    if value < 0:
        raise ConfigError(f"{name}={value!r} must not be negative.")


def positive(name, value):
    finite(name, value)
    if value <= 0:
        raise ConfigError(f"{name}={value!r} must be more than 0.")


def dtype_name(name, value, allowed):
    try:
        dtype = jnp.dtype(value).name
    except TypeError:
        dtype = value
    if dtype not in allowed:
        raise ConfigError(f"{name}={value!r} is not supported: use one of {', '.join(map(repr, allowed))}.")
    return dtype


def refuse_unused(config, prefix, fields, used, needs):
    """Refuses a field that was set although nothing would read it: an ignored setting is a wrong result."""
    if used:
        return
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in fields:
        if getattr(config, name) != defaults[name]:
            raise ConfigError(
                f"{prefix}{name}={getattr(config, name)!r} has no effect without {needs}: set that, or leave {name} at "
                f"{defaults[name]!r}."
            )
