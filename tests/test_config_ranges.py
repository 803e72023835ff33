"""Numbers of configurations: refused where they are built if int32 or float32 cannot hold them."""

import dataclasses

import jax
import numpy as np
import pytest

from jax_latent_moe import (
    ConfigError,
    InitConfig,
    LatentMoEConfig,
    ParallelConfig,
    RouterConfig,
    init_params,
    latent_moe,
)
from tests.cases import TOY

NORMED = dataclasses.replace(TOY, latent_norm="pre", activation="situ_glu")
BASES = [TOY, NORMED, RouterConfig(capacity_factor=1.0, num_groups=2), InitConfig(), ParallelConfig()]
TYPES = {int: (2**31, 2**40, 10**5000), float: (1e39, -1e39, 1e308, 2**128, 2**1024, -(10**5000))}


def numbers(config, kind):
    """The fields of a configuration that hold such a number, or None in its place."""
    return [field.name for field in dataclasses.fields(config) if field.type in (kind, kind | None)]


CASES = [(base, name, kind) for base in BASES for kind in TYPES for name in numbers(base, kind)]
WHERE = r"{}=.* must (be at most .*, the largest int32|be 0 or of a magnitude .* of float32|lie between|be more than 0)"


@pytest.mark.parametrize(("base", "name", "kind"), CASES)
def test_what_32_bits_cannot_hold_is_refused(base, name, kind):
    if name in ("situ_beta", "situ_linear_beta", "latent_norm_eps"):
        base = NORMED  # elsewhere nothing reads it
    for value in TYPES[kind]:
        with pytest.raises(ConfigError, match=WHERE.format(name)):
            dataclasses.replace(base, **{name: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "1", 1j, []])
@pytest.mark.parametrize("base", BASES[1:])
def test_what_is_no_number_is_refused(base, value):
    for name in numbers(base, float):
        with pytest.raises(ConfigError, match=f"{name}=.* must be a finite number"):
            dataclasses.replace(base, **{name: value})


def test_integers_for_floats_are_floats():
    """XLA would compute with them in int32, which 2^40 overflows."""
    router = RouterConfig(routed_scaling_factor=2**40, switch_loss_coef=1, capacity_factor=2)
    for name in numbers(router, float):
        assert type(getattr(router, name)) is float, name
    config = dataclasses.replace(TOY, router=RouterConfig(routed_scaling_factor=2**40))
    x = np.ones((2, TOY.hidden_size), np.float32)
    y, _ = jax.jit(lambda params: latent_moe(params, x, config))(init_params(jax.random.key(0), config))
    assert np.isfinite(y).all()


def test_what_float32_just_holds_is_taken():
    largest = float(np.finfo(np.float32).max)
    assert RouterConfig(routed_scaling_factor=largest).routed_scaling_factor == largest
    assert LatentMoEConfig(1, None, 2**31 - 1, 2, 1).num_experts == 2**31 - 1
