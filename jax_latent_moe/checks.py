"""Checks of configuration values. Each raises a `ConfigError` with the name, the value and the rule."""

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_latent_moe.errors import ConfigError

MOST = 2**31 - 1
"""The largest integer of a configuration. Sizes and counts are combined with int32 arrays."""

LEAST_FLOAT, MOST_FLOAT = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
"""The smallest and the largest magnitude of float32's normal numbers."""


def keep(config, prefix, check, names, *limits):
    """Replaces each field by what the check returns for it, which is a number or a string of Python's own types."""
    for name in names:
        object.__setattr__(config, name, check(prefix + name, getattr(config, name), *limits))


def one_of(name, value, allowed):
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{name}={value!r} is unknown: use one of {', '.join(map(repr, allowed))}.")


def instance(name, value, cls):
    if not isinstance(value, cls):
        article = "an" if cls.__name__[0] in "AEIO" else "a"
        from_dict = f": {cls.__name__}(**fields) makes it of a dict" if isinstance(value, dict) else ""
        raise ConfigError(f"{name}={value!r} must be {article} {cls.__name__}{from_dict}.")


def boolean(name, value):
    if not isinstance(value, bool | np.bool_):
        raise ConfigError(f"{name}={value!r} must be True or False.")
    return bool(value)


def positive_int(name, value):
    return integer(name, value, least=1)


def integer(name, value, least=0):
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral) or value < least:
        raise ConfigError(f"{name}={_shown(value)} must be an integer of at least {least}.")
    if int(value) > MOST:
        raise ConfigError(f"{name}={_shown(value)} must be at most {MOST}, the largest int32.")
    return int(value)


def integers(name, value):
    """A sequence of integers as a tuple."""
    if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray) or not len(value):
        raise ConfigError(f"{name}={value!r} must be a sequence of integers.")
    return tuple(integer(f"{name}[{place}]", entry) for place, entry in enumerate(value))


def finite(name, value):
    """Returns the value as a float. It must be 0 or within the normal numbers of float32."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)
    number: Any = value
    if not real or not -np.inf < number < np.inf:
        raise ConfigError(f"{name}={_shown(value)} must be a finite number.")
    if number != 0 and not LEAST_FLOAT <= abs(number) <= MOST_FLOAT:
        raise ConfigError(
            f"{name}={_shown(value)} must be 0 or of a magnitude between {LEAST_FLOAT:.3g} and {MOST_FLOAT:.3g}, the "
            "range of float32."
        )
    return float(number)


def _shown(value) -> str:
    """The value as messages show it. Python refuses to print very long integers."""
    long = isinstance(value, int) and value.bit_length() > 10_000
    return f"<an integer of {value.bit_length()} bits>" if long else repr(value)


def non_negative(name, value):
    value = finite(name, value)
    if value < 0:
        raise ConfigError(f"{name}={value!r} must not be negative.")
    return value


def positive(name, value):
    value = finite(name, value)
    if value <= 0:
        raise ConfigError(f"{name}={value!r} must be more than 0.")
    return value


def at_least_one(name, value):
    value = finite(name, value)
    if value < 1:
        raise ConfigError(f"{name}={value!r} must be at least 1. None sets no bound.")
    return value


def between(name, value, least, most):
    value = finite(name, value)
    if not least <= value <= most:
        raise ConfigError(f"{name}={value!r} must lie between {least:g} and {most:g}.")
    return value


def dtype_name(name, value, allowed):
    # NumPy reads None and Python's float as float64, which is rarely what the user means.
    python = value is None or (isinstance(value, type) and value in (float, int, bool, complex))
    try:
        dtype = value if python else jnp.dtype(value).name
    except TypeError:
        dtype = value
    if dtype not in allowed:
        raise ConfigError(f"{name}={value!r} is not supported: use one of {', '.join(map(repr, allowed))}.")
    return dtype


def refuse_unused(config, prefix, fields, used, needs):
    """Refuses a field that is set although nothing reads it. An ignored setting would be a wrong result."""
    if used:
        return
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in fields:
        if getattr(config, name) != defaults[name]:
            raise ConfigError(
                f"{prefix}{name}={getattr(config, name)!r} has no effect without {needs}: set that, or leave {name} at "
                f"{defaults[name]!r}."
            )
