"""An activation that only this file defines, by its value and gradient, works wherever XLA computes it.

Kernels that are told to fuse every activation refuse it by name.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jax_latent_moe import (
    ConfigError,
    CutlassBackend,
    LatentMoEConfig,
    PallasBackend,
    UnsupportedError,
    XlaBackend,
    activations,
    latent_moe,
    linen,
    nnx,
)
from jax_latent_moe.activations import ACTIVATIONS, Activation, BoundActivation
from jax_latent_moe.expert_plan import plan_experts
from jax_latent_moe.grouped_matmul.sm90 import KERNEL_ACTIVATIONS, kernel_activation
from jax_latent_moe.plan import GPUS, make_cost_plan
from tests import cases, layers
from tests.cases import TOY
from tests.drawn import drawn
from tests.flax_layers import draw, inputs
from tests.fusing import FusingBackend
from tests.kernels import H200
from tests.oracle import activations as oracle
from tests.tolerances import assert_close


def sharp_gelu(u, *, situ_beta):
    return u * jax.nn.sigmoid(situ_beta * u)


def sharp_gelu_gradient(parts, dhidden, *, situ_beta):
    (u,) = parts
    s = jax.nn.sigmoid(situ_beta * u)
    return (dhidden * (s + situ_beta * u * s * (1 - s)),)


def reglu(gate, up):
    return jax.nn.relu(gate) * up


def reglu_gradient(parts, dhidden):
    gate, up = parts
    return jnp.where(gate > 0, up, 0) * dhidden, jax.nn.relu(gate) * dhidden


SHARP = Activation("sharp_gelu", sharp_gelu, sharp_gelu_gradient, parameters=("situ_beta",))
REGLU = Activation("reglu", reglu, reglu_gradient, gated=True)
DIFFERENTIATED = dataclasses.replace(REGLU, name="reglu_by_jax", gradient=None)


def oracle_of(config, pre):
    """Value and slope of the three, in float64."""
    if config.activation == "sharp_gelu":
        value, slope = oracle.silu(config.situ_beta * pre)
        return value / config.situ_beta, slope
    gate, up = pre
    return np.maximum(gate, 0) * up, np.stack([(gate > 0) * up, np.maximum(gate, 0)])


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    new, known = (SHARP, REGLU, DIFFERENTIATED), oracle.activation
    for activation in new:
        activations.register(activation)
    monkeypatch.setattr(
        oracle,
        "activation",
        lambda config, pre: (oracle_of if config.activation in names else known)(config, pre),
    )
    names = [activation.name for activation in new]
    yield
    for name in names:
        del ACTIVATIONS[name]


every_one = pytest.mark.parametrize("name", ["sharp_gelu", "reglu", "reglu_by_jax"])


def config_of(name, **changes) -> LatentMoEConfig:
    changes |= {"situ_beta": 1.7} if name == "sharp_gelu" else {}
    return dataclasses.replace(TOY, activation=name, **changes)


# reglu's slope jumps at 0, so that a gate which bfloat16 rounds to the other side has another gradient.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("sharp_gelu", "float32"), ("reglu", "float32"), ("reglu_by_jax", "float32"), ("sharp_gelu", "bfloat16")],
)
def test_the_layer(rng, name, dtype):
    # A norm divides by what the experts' rows leave when they cancel, and their rounding in bfloat16 grows as much.
    for latent_norm in ("none", "post") if dtype == "float32" else ("none",):
        config = config_of(name, dtype=dtype, latent_norm=latent_norm)
        layers.check_against_oracle(cases.random_inputs(rng, config, (2, 7), masked=True))


BACKENDS = [XlaBackend(method="ragged_dot"), FusingBackend(("pre",), ("pre",))]


@pytest.mark.parametrize(
    ("name", "backend"), drawn(itertools.product(["sharp_gelu", "reglu", "reglu_by_jax"], BACKENDS), 3), ids=str
)
def test_other_backends(rng, name, backend):
    """One of them fuses it, as it fuses what it is told to."""
    layers.check_against_oracle(cases.random_inputs(rng, config_of(name, backend=backend), (2, 7)))


@every_one
def test_both_flax_modules(rng, name):
    config = config_of(name)
    params, x = draw(rng, config), inputs(rng, config)
    expected, _ = latent_moe(params, x, config)
    for y in (
        linen.LatentMoE(config).apply(linen.from_params(params, config), x),
        nnx.from_params(params, config)(x),
    ):
        assert_close(y, expected, "float32")
    made = nn.unbox(linen.LatentMoE(config).init(jax.random.key(0), x))
    assert made["params"]["experts"]["w_in"].ndim == (4 if config.gated else 3)


@every_one
def test_the_cost_plan(name):
    """XLA reads and writes what kernels would keep to themselves, so it takes longer than a known activation."""
    known = "situ_glu" if config_of(name).gated else "gelu"
    sizes = dict(hidden_size=128, latent_size=64, expert_intermediate_size=128, dtype="bfloat16")
    new, known = (make_cost_plan(config_of(of, **sizes), {}, 8192, GPUS["h200"]) for of in (name, known))
    assert new.bytes >= known.bytes
    assert new.compute_ms > known.compute_ms
    assert [part.name for part in new.parts] == [part.name for part in known.parts]
    assert "kept for the backward pass" in new.memory


def test_its_own_gradient_is_taken(rng):
    """That of a step is 0 everywhere; a straight-through gradient is not."""
    steps = [
        Activation("step", lambda u: (u > 0).astype(u.dtype)),
        Activation("straight", lambda u: (u > 0).astype(u.dtype), lambda parts, dhidden: (dhidden,)),
    ]
    found = []
    for activation in steps:
        activations.register(activation)
        try:
            config = config_of(activation.name)
            params, x = draw(np.random.default_rng(3), config), inputs(np.random.default_rng(4), config)
            gradient = jax.grad(lambda params, x=x, config=config: latent_moe(params, x, config)[0].sum())(params)
            found.append(bool(np.asarray(gradient["experts"]["w_in"]).any()))
        finally:
            del ACTIVATIONS[activation.name]
    assert found == [False, True]


def plan_on_hopper(config):
    gate = 2 if config.gated else 1
    return plan_experts(config, 4096, (64, 256, gate * 512), (64, 512, 256), "bfloat16", device=H200)


@every_one
@pytest.mark.usefixtures("install_library")
@pytest.mark.parametrize("backend", [PallasBackend, CutlassBackend])
def test_kernels_that_fuse_everything_refuse_it_by_name(name, backend):
    with pytest.raises(UnsupportedError) as info:
        plan_on_hopper(config_of(name, backend=backend(fuse="always")))
    assert info.value.backend == backend.__name__.removesuffix("Backend").lower()
    refused = f"its epilogues have {', '.join(KERNEL_ACTIVATIONS)}, not {name}: leave it to XLA with fuse='measured'"
    assert refused in str(info.value)
    assert "Use backend='auto' or XlaBackend()." in str(info.value)
    for fuse in ("measured", "never"):
        plan = plan_on_hopper(config_of(name, backend=backend(fuse=fuse)))
        assert plan.residual == "pre"
        assert plan.up.problem.epilogue is plan.down_dgrad.problem.epilogue is None
    plan_on_hopper(config_of(name, backend="auto"))


def test_a_name_is_taken_once():
    for activation in (REGLU, ACTIVATIONS["relu2"]):
        with pytest.raises(ConfigError, match=f"activation '{activation.name}' is registered already: choose another"):
            activations.register(activation)


def test_an_unknown_one_is_refused_with_those_that_are_registered():
    with pytest.raises(ConfigError, match=r"activation='relu' is unknown: use one of 'relu2', .*'sharp_gelu', 'reglu'"):
        config_of("relu")


def test_kernels_know_activations_of_the_package_alone():
    """An activation of another's that is called as a kernel is not taken for the kernel's."""
    for name in ("gelu_tanh", "geglu_tanh"):
        assert kernel_activation(BoundActivation(name)) is None
    assert kernel_activation(BoundActivation("gelu_exact")) is None
    known = {
        "relu2": {},
        "gelu": {"gelu_approximate": False},
        "gelu_tanh": {"gelu_approximate": True},
        "swiglu": {},
        "geglu": {"gelu_approximate": False},
        "geglu_tanh": {"gelu_approximate": True},
        "situ_glu": {"situ_beta": 3.0, "situ_linear_beta": None},
    }
    assert tuple(known) == KERNEL_ACTIVATIONS
    for name, fields in known.items():
        config = dataclasses.replace(TOY, activation=name.removesuffix("_tanh"), **fields)
        found = kernel_activation(config.bound_activation)
        assert found is not None
        assert (found.name, found.gated) == (name, config.gated)
        assert (found.beta, found.linear_beta) == ((3.0, 0.0) if name == "situ_glu" else (0.0, 0.0))


def test_fields_that_it_does_not_read_are_refused():
    """Each field by itself: sharp_gelu reads the one of situ_glu's two."""
    assert config_of("sharp_gelu").bound_activation.parameters == (("situ_beta", 1.7),)
    with pytest.raises(ConfigError, match=r"situ_linear_beta=3\.0 has no effect without"):
        config_of("sharp_gelu", situ_linear_beta=3.0)
    with pytest.raises(ConfigError, match=r"situ_beta=3\.0 has no effect without"):
        config_of("reglu", situ_beta=3.0)


def test_a_parameter_that_is_no_field_is_refused(monkeypatch):
    monkeypatch.setitem(ACTIVATIONS, "leaky", Activation("leaky", lambda u, slope: u, parameters=("slope",)))
    with pytest.raises(ConfigError, match=r"activation='leaky' reads slope, which is not a field of LatentMoEConfig"):
        config_of("leaky")
