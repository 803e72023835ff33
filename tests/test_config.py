"""Configurations: refused where they are built, with the value, the rule and the way out; hashable; frozen."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import (
    ConfigError,
    CutlassBackend,
    InitConfig,
    LatentMoEConfig,
    PallasBackend,
    RouterConfig,
    XlaBackend,
)
from tests.cases import TOY

BAD_LAYERS = [
    (dict(hidden_size=0), "hidden_size=0 must be an integer of at least 1"),
    (dict(hidden_size=2.0), "hidden_size=2.0 must be an integer"),
    (dict(hidden_size=True), "hidden_size=True must be an integer"),
    (dict(latent_size=0), "latent_size=0 must be"),
    (dict(latent_size=-4), "latent_size=-4 must be"),
    (dict(num_experts=0), "num_experts=0 must be"),
    (dict(top_k=0), "top_k=0 must be"),
    (dict(top_k=9), "top_k=9 is more than num_experts=8"),
    (dict(expert_intermediate_size="5"), "expert_intermediate_size='5' must be"),
    (dict(shared_expert_intermediate_size=-1), "shared_expert_intermediate_size=-1 must be"),
    (dict(activation="relu"), "activation='relu' is unknown: use one of 'relu2', 'gelu'"),
    (dict(activation=None), "activation=None is unknown"),
    (dict(latent_norm="both"), "latent_norm='both' is unknown: use one of 'none', 'pre', 'post'"),
    (dict(latent_norm="pre", latent_norm_eps=0.0), "latent_norm_eps=0.0 must be more than 0"),
    (dict(activation="situ_glu", situ_beta=-1.0), "situ_beta=-1.0 must be more than 0"),
    (dict(activation="situ_glu", situ_linear_beta=float("nan")), "situ_linear_beta=nan must be a finite number"),
    (dict(apply_probs_on_input=True), "apply_probs_on_input needs top_k=1, got top_k=3"),
    (dict(apply_probs_on_input=1), "apply_probs_on_input=1 must be True or False"),
    (dict(apply_routed_scale_to_output="no"), "apply_routed_scale_to_output='no' must be True or False"),
    (dict(activation="gelu", gelu_approximate="tanh"), "gelu_approximate='tanh' must be True or False"),
    (dict(router=None), "router=None must be a RouterConfig"),
    (dict(init={}), "init={} must be a InitConfig"),
    (dict(dtype="int8"), "dtype='int8' is not supported: use one of 'float32'"),
    (dict(dtype="nonsense"), "dtype='nonsense' is not supported"),
    (dict(param_dtype=int), "is not supported"),
    (dict(backend="cuda"), "backend='cuda' is unknown: use one of 'auto', 'xla', 'pallas', 'cutlass'"),
    (dict(backend=XlaBackend), "is unknown"),
    (dict(router=RouterConfig(num_groups=3)), "num_experts=8 must be a multiple of router.num_groups=3"),
    (dict(router=RouterConfig(num_groups=8)), "router.group_score_topk=2 is more than the 1 experts of a group"),
    (dict(router=RouterConfig(num_groups=4)), "top_k=3 is more than the 2 experts in router.topk_groups=1"),
]

BAD_ROUTERS = [
    (dict(score_function="tanh"), "router.score_function='tanh' is unknown: use one of 'softmax'"),
    (dict(selection="bias"), "router.selection='bias' is unknown: use one of 'score', 'logit'"),
    (dict(drop_policy="random", capacity_factor=1.0), "router.drop_policy='random' is unknown"),
    (dict(norm_topk_prob=None), "router.norm_topk_prob=None must be True or False"),
    (dict(correction_bias="yes"), "router.correction_bias='yes' must be True or False"),
    (dict(per_expert_scale=0), "router.per_expert_scale=0 must be True or False"),
    (dict(num_groups=0), "router.num_groups=0 must be"),
    (dict(topk_groups=1.0), "router.topk_groups=1.0 must be"),
    (dict(topk_groups=2), "router.topk_groups=2 is more than router.num_groups=1"),
    (dict(num_groups=2, group_score_topk=0), "router.group_score_topk=0 must be"),
    (dict(norm_topk_eps=-1.0), "router.norm_topk_eps=-1.0 must not be negative"),
    (dict(routed_scaling_factor=float("inf")), "router.routed_scaling_factor=inf must be a finite number"),
    (dict(switch_loss_coef=-0.1), "router.switch_loss_coef=-0.1 must not be negative"),
    (dict(sequence_loss_coef="a"), "router.sequence_loss_coef='a' must be a finite number"),
    (dict(z_loss_coef=None), "router.z_loss_coef=None must be a finite number"),
    (dict(bias_update_rate=-1e-3), "router.bias_update_rate=-0.001 must not be negative"),
    (dict(capacity_factor=-1.0), "router.capacity_factor=-1.0 must not be negative"),
    (dict(capacity_factor=1.0, min_capacity=-1), "router.min_capacity=-1 must be an integer of at least 0"),
    (dict(dtype="float16"), "router.dtype='float16' is not supported: use one of 'float32', 'bfloat16', 'float64'"),
]

# A setting that nothing would read is refused: ignoring it would be a wrong result.
UNREAD = [
    (dict(gelu_approximate=True), "gelu_approximate=True has no effect without activation='gelu' or 'geglu'"),
    (dict(situ_beta=2.0), "situ_beta=2.0 has no effect without activation='situ_glu'"),
    (dict(situ_linear_beta=None), "situ_linear_beta=None has no effect"),
    (dict(latent_norm_eps=1e-6), "latent_norm_eps=1e-06 has no effect"),
]
UNREAD_ROUTERS = [
    (dict(norm_topk_prob=False, norm_topk_eps=0.0), "router.norm_topk_eps=0.0 has no effect"),
    (dict(correction_bias=False, bias_update_rate=0.1), "router.bias_update_rate=0.1 has no effect"),
    (dict(group_score_topk=1), "router.group_score_topk=1 has no effect"),
    (dict(min_capacity=4), "router.min_capacity=4 has no effect without capacity_factor"),
    (dict(drop_policy="position"), "router.drop_policy='position' has no effect without capacity_factor"),
]


def refused(build, fields) -> str:
    with pytest.raises(ConfigError) as info:
        build(**fields)
    assert isinstance(info.value, ValueError)
    return str(info.value)


@pytest.mark.parametrize(("fields", "message"), BAD_LAYERS + UNREAD)
def test_bad_layer_is_refused(fields, message):
    assert message in refused(lambda **f: dataclasses.replace(TOY, **f), fields)


@pytest.mark.parametrize(("fields", "message"), BAD_ROUTERS + UNREAD_ROUTERS)
def test_bad_router_is_refused(fields, message):
    assert message in refused(RouterConfig, fields)


@pytest.mark.parametrize(
    ("build", "fields", "message"),
    [
        (InitConfig, dict(std=-1.0), "init.std=-1.0 must not be negative"),
        (InitConfig, dict(output_scale=float("nan")), "init.output_scale=nan must be a finite number"),
        (InitConfig, dict(scale_expert_output=2), "init.scale_expert_output=2 must be True or False"),
        (XlaBackend, dict(method="dense"), "XlaBackend.method='dense' is unknown: use one of 'blocked', 'ragged_dot'"),
        (XlaBackend, dict(block_rows=0), "XlaBackend.block_rows=0 must be"),
        (XlaBackend, dict(method="ragged_dot", block_rows=8), "XlaBackend.block_rows=8 needs method='blocked'"),
        (PallasBackend, dict(fuse="sometimes"), "PallasBackend.fuse='sometimes' is unknown: use one of 'measured'"),
        (CutlassBackend, dict(fuse="sometimes"), "CutlassBackend.fuse='sometimes' is unknown: use one of 'measured'"),
    ],
)
def test_bad_parts_are_refused(build, fields, message):
    assert message in refused(build, fields)


def test_an_unknown_field_is_an_error_of_python():
    with pytest.raises(TypeError, match="top_q"):
        dataclasses.replace(TOY, top_q=2)


def test_equal_configs_are_one_key():
    assert hash(TOY) == hash(dataclasses.replace(TOY))
    assert dataclasses.replace(TOY) == TOY
    assert dataclasses.replace(TOY, top_k=2) != TOY


def test_configs_are_frozen():
    for config, field in [(TOY, "top_k"), (TOY.router, "num_groups"), (TOY.init, "std"), (XlaBackend(), "method")]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field, 1)


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, jnp.dtype("bfloat16")])
def test_dtypes_are_names(dtype):
    config = dataclasses.replace(TOY, dtype=dtype, param_dtype=np.float64)
    assert (config.dtype, config.param_dtype) == ("bfloat16", "float64")
    assert RouterConfig(dtype=dtype) == RouterConfig(dtype="bfloat16")


@pytest.mark.parametrize(
    ("name", "backend"), [("xla", XlaBackend()), ("pallas", PallasBackend()), ("cutlass", CutlassBackend())]
)
def test_backends_by_name(name, backend):
    assert dataclasses.replace(TOY, backend=name) == dataclasses.replace(TOY, backend=backend)


def test_derived_properties():
    assert TOY.latent_width == TOY.latent_size == 6
    assert dataclasses.replace(TOY, latent_size=None).latent_width == TOY.hidden_size
    gated = {name for name in ("relu2", "gelu", "swiglu", "geglu", "situ_glu") if _with_activation(name).gated}
    assert gated == {"swiglu", "geglu", "situ_glu"}


def _with_activation(name) -> LatentMoEConfig:
    return dataclasses.replace(TOY, activation=name)


def test_layers_of_one_model_may_differ():
    layers = [dataclasses.replace(TOY, expert_intermediate_size=m, top_k=k) for m, k in [(4, 2), (9, 5)]]
    assert [(c.expert_intermediate_size, c.top_k) for c in layers] == [(4, 2), (9, 5)]
