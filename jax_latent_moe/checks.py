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


def positive_int(name, value):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}={value!r} must be an integer of at least 1.")


def finite(name, value):
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{name}={value!r} must be a finite number.")


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
