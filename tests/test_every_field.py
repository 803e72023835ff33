"""Every field of every configuration is read: a change of it changes a jaxpr, or is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from jax_latent_moe import (
    CutlassBackend,
    InitConfig,
    LatentMoEConfig,
    PallasBackend,
    ParallelConfig,
    Precision,
    RouterConfig,
    UnsupportedError,
    XlaBackend,
    init_params,
    latent_moe,
    param_shapes,
    update_correction_bias,
)
from tests import cases
from tests.cases import TOY
from tests.parallel.meshes import make_mesh

GROUPS = RouterConfig(num_groups=2, topk_groups=1)
CAPACITY = RouterConfig(capacity_factor=1.0)
SINGLE = dataclasses.replace(TOY, top_k=1, router=RouterConfig(norm_topk_prob=False))
CLAMPED = dataclasses.replace(TOY, activation="clamped_swiglu")
SCALED = RouterConfig(routed_scaling_factor=2.5)

# field: (a base in which the field is read, another value)
LAYER = {
    "hidden_size": (TOY, 13),
    "latent_size": (TOY, 7),
    "num_experts": (TOY, 9),
    "top_k": (TOY, 2),
    "expert_intermediate_size": (TOY, 6),
    "shared_expert_intermediate_size": (TOY, 8),
    "shared_expert_gate": (TOY, True),
    "activation": (TOY, "gelu"),
    "gelu_approximate": (dataclasses.replace(TOY, activation="geglu"), True),
    "situ_beta": (dataclasses.replace(TOY, activation="situ_glu"), 3.0),
    "situ_linear_beta": (dataclasses.replace(TOY, activation="situ_glu"), None),
    "swiglu_alpha": (CLAMPED, 1.0),
    "swiglu_limit": (CLAMPED, 10.0),
    "swiglu_shift": (CLAMPED, 0.0),
    "expert_bias": (TOY, True),
    "latent_norm": (dataclasses.replace(TOY, latent_norm="pre"), "post"),
    "latent_norm_eps": (dataclasses.replace(TOY, latent_norm="post"), 1e-6),
    "apply_probs_on_input": (SINGLE, True),
    "apply_routed_scale_to_output": (dataclasses.replace(TOY, router=SCALED), True),
    "router": (TOY, GROUPS),
    "init": (TOY, InitConfig(std=0.1)),
    "dtype": (TOY, "bfloat16"),
    "param_dtype": (TOY, "bfloat16"),
    "backend": (TOY, XlaBackend(method="ragged_dot")),
    "precision": (TOY, Precision(fwd="fp8_block")),
    "keep_gathered_rows": (TOY, True),
    "parallel": (TOY, ParallelConfig()),
}
ROUTER = {
    "score_function": (RouterConfig(), "softmax"),
    "norm_topk_prob": (RouterConfig(), False),
    "norm_topk_eps": (RouterConfig(), 1e-9),
    "routed_scaling_factor": (RouterConfig(), 2.5),
    "correction_bias": (RouterConfig(), False),
    "selection": (RouterConfig(), "logit"),
    "input_jitter": (RouterConfig(), 0.1),
    "logit_bias": (RouterConfig(), True),
    "per_expert_scale": (RouterConfig(), True),
    "num_groups": (RouterConfig(num_groups=2, topk_groups=2), 4),
    "topk_groups": (GROUPS, 2),
    "group_score_topk": (GROUPS, 3),
    "dtype": (RouterConfig(), "bfloat16"),
    "switch_loss_coef": (RouterConfig(switch_loss_coef=0.1), 0.2),
    "sequence_loss_coef": (RouterConfig(sequence_loss_coef=0.1), 0.2),
    "global_loss_coef": (RouterConfig(global_loss_coef=0.1), 0.2),
    "z_loss_coef": (RouterConfig(z_loss_coef=0.1), 0.2),
    "bias_update_rate": (RouterConfig(), 1e-2),
    "bias_update": (RouterConfig(), "quantile"),
    "capacity_factor": (CAPACITY, 2.0),
    "min_capacity": (CAPACITY, 6),
    "drop_policy": (CAPACITY, "position"),
    "pad_to_capacity": (CAPACITY, True),
    "round_to_tile": (RouterConfig(), 4),
}
INIT = {
    "std": (InitConfig(), 0.1),
    "output_scale": (InitConfig(), 0.5),
    "scale_expert_output": (InitConfig(output_scale=0.5), False),
}
XLA = {"method": (XlaBackend(), "ragged_dot"), "block_rows": (XlaBackend(), 4)}


@functools.cache
def programs(config: LatentMoEConfig) -> tuple[str, ...]:
    """The jaxprs of all that a configuration drives: initialisation, layer with gradients, bias update."""
    params = param_shapes(config)
    x = jax.ShapeDtypeStruct((2, 5, config.hidden_size), jnp.float32)

    key = jax.random.key(0) if config.router.input_jitter else None

    def loss(params, x):
        y, aux = latent_moe(params, x, config, key=key)
        return jnp.sum(y) + sum(aux.losses.values())

    def update(bias, counts):
        return update_correction_bias(bias, counts, config.router.bias_update_rate)

    experts = config.num_experts
    return (
        str(jax.make_jaxpr(lambda key: init_params(key, config))(jax.random.key(0))),
        str(jax.make_jaxpr(jax.value_and_grad(loss))(params, x)),
        str(jax.make_jaxpr(update)(jnp.zeros(experts), jnp.zeros(experts, jnp.int32))),
    )


def assert_read(base: LatentMoEConfig, flipped: LatentMoEConfig):
    assert base != flipped
    assert programs(base) != programs(flipped)


@pytest.mark.parametrize(
    ("cls", "table"),
    [(LatentMoEConfig, LAYER), (RouterConfig, ROUTER), (InitConfig, INIT), (XlaBackend, XLA)],
)
def test_no_field_is_forgotten(cls, table):
    assert [field.name for field in dataclasses.fields(cls)] == list(table)


@pytest.mark.parametrize("field", LAYER)
def test_layer_field(field):
    base, value = LAYER[field]
    with jax.set_mesh(make_mesh(2, names=("expert",))):  # which only "parallel" reads
        assert_read(base, dataclasses.replace(base, **{field: value}))


@pytest.mark.parametrize("field", ROUTER)
def test_router_field(field):
    base, value = ROUTER[field]
    layer = dataclasses.replace(TOY, router=base)
    assert_read(layer, cases.with_router(layer, **{field: value}))


@pytest.mark.parametrize("field", INIT)
def test_init_field(field):
    base, value = INIT[field]
    flipped = dataclasses.replace(base, **{field: value})
    assert_read(dataclasses.replace(TOY, init=base), dataclasses.replace(TOY, init=flipped))


@pytest.mark.parametrize("field", XLA)
def test_xla_field(field):
    base, value = XLA[field]
    flipped = dataclasses.replace(base, **{field: value})
    assert_read(dataclasses.replace(TOY, backend=base), dataclasses.replace(TOY, backend=flipped))


@pytest.mark.parametrize("backend", [PallasBackend(), CutlassBackend()])
def test_a_backend_that_cannot_run_says_so(backend):
    with pytest.raises(UnsupportedError, match=r"cannot run this: .* Use backend='auto' or XlaBackend\(\)"):
        programs(dataclasses.replace(TOY, backend=backend))


def test_equal_configs_give_one_program():
    """The other tests rely on this: a jaxpr's text depends only on the configuration."""
    programs.cache_clear()
    first = programs(TOY)
    programs.cache_clear()
    assert programs(TOY) == first
