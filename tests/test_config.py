"""Configurations: refused where they are built, with the value, the rule and the way out; hashable; frozen."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import (
    ConfigError,
    CutlassBackend,
    InitConfig,
    LatentMoEConfig,
    PallasBackend,
    PallasWgradTile,
    ParallelConfig,
    Precision,
    RouterConfig,
    XlaBackend,
)
from jax_latent_moe.config import CutlassTile
from tests.cases import TOY
from tests.random_configs import random_config

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
    (dict(keep_gathered_rows=1), "keep_gathered_rows=1 must be"),
    (
        dict(keep_gathered_rows=True, precision=Precision("fp8_block")),
        "keep_gathered_rows=True needs precision.fwd=None, got 'fp8_block'",
    ),
    (dict(activation="situ_glu", situ_beta=-1.0), "situ_beta=-1.0 must be more than 0"),
    (dict(activation="situ_glu", situ_linear_beta=float("nan")), "situ_linear_beta=nan must be a finite number"),
    (dict(apply_probs_on_input=True), "apply_probs_on_input needs top_k=1, got top_k=3"),
    (dict(apply_probs_on_input=1), "apply_probs_on_input=1 must be True or False"),
    (dict(apply_routed_scale_to_output="no"), "apply_routed_scale_to_output='no' must be True or False"),
    (dict(activation="gelu", gelu_approximate="tanh"), "gelu_approximate='tanh' must be True or False"),
    (dict(router=None), "router=None must be a RouterConfig"),
    (dict(init={}), "init={} must be an InitConfig: InitConfig(**fields) makes it of a dict"),
    (dict(dtype="int8"), "dtype='int8' is not supported: use one of 'float32'"),
    (dict(dtype="nonsense"), "dtype='nonsense' is not supported"),
    (dict(dtype=None), "dtype=None is not supported: use one of 'float32', 'bfloat16', 'float16', 'float64'"),
    (dict(dtype=float), "dtype=<class 'float'> is not supported: use one of 'float32'"),
    (dict(param_dtype=None), "param_dtype=None is not supported: use one of 'float32'"),
    (dict(param_dtype=int), "is not supported"),
    (dict(hidden_size=2**40), f"hidden_size={2**40} must be at most 2147483647"),
    (dict(hidden_size=np.float32(8)), "must be an integer of at least 1"),
    (dict(latent_norm="pre", latent_norm_eps=1e-30), "latent_norm_eps=1e-30 must lie between 1e-24 and 1e+24"),
    (
        dict(top_k=1),
        "top_k=1 with router.norm_topk_prob=True gives every weight 1 and the router no gradient: set router",
    ),
    (
        dict(top_k=1, router=RouterConfig(score_function="softmax_topk", norm_topk_prob=False)),
        "top_k=1 with router.score_function='softmax_topk' gives every weight 1",
    ),
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
    (dict(norm_topk_eps=1e-35), "router.norm_topk_eps=1e-35 must lie between 1e-30 and 1e+06"),
    (dict(routed_scaling_factor=2**1024), "router.routed_scaling_factor=17976931348"),
    (dict(routed_scaling_factor=1e39), "router.routed_scaling_factor=1e+39 must be 0 or of a magnitude between"),
    (dict(routed_scaling_factor=-1e-50), "router.routed_scaling_factor=-1e-50 must be 0 or of a magnitude between"),
    (dict(routed_scaling_factor=True), "router.routed_scaling_factor=True must be a finite number"),
    (dict(z_loss_coef=1e39), "router.z_loss_coef=1e+39 must be 0 or of a magnitude"),
    (dict(capacity_factor=1.0, min_capacity=2**40), f"router.min_capacity={2**40} must be at most 2147483647"),
    (dict(num_groups=2**40), f"router.num_groups={2**40} must be at most 2147483647"),
    (dict(dtype=None), "router.dtype=None is not supported: use one of 'float32', 'bfloat16', 'float64'"),
    (dict(dtype=float), "router.dtype=<class 'float'> is not supported"),
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


def test_numbers_of_numpy_are_those_of_python():
    layer = dataclasses.replace(
        TOY, hidden_size=np.int64(12), top_k=np.uint8(3), activation="situ_glu", situ_beta=np.float32(3),
        apply_routed_scale_to_output=np.bool_(True), router=RouterConfig(routed_scaling_factor=np.int32(2)),
    )  # fmt: skip
    plain = dataclasses.replace(
        TOY, activation="situ_glu", situ_beta=3.0, apply_routed_scale_to_output=True,
        router=RouterConfig(routed_scaling_factor=2.0),
    )  # fmt: skip
    assert layer == plain
    assert hash(layer) == hash(plain)
    assert repr(layer) == repr(plain)


def test_equal_configs_are_one_key():
    assert hash(TOY) == hash(dataclasses.replace(TOY))
    assert dataclasses.replace(TOY) == TOY
    assert dataclasses.replace(TOY, top_k=2) != TOY


TILED = CutlassBackend(matmul_tile=CutlassTile(128, 256, 4), fuse="never")


@pytest.mark.parametrize(
    "backend", ["auto", XlaBackend(method="ragged_dot"), PallasBackend(wgrad_tile=PallasWgradTile()), TILED], ids=str
)
def test_dicts_and_json_hold_every_config(rng, backend):
    for _ in range(20):
        config = random_config(rng, backend=backend, parallel=ParallelConfig(data_axis="dp", capacity_factor=1.5))
        config = dataclasses.replace(config, init=InitConfig(std=0.02))
        assert LatentMoEConfig.from_dict(config.to_dict()) == config
        assert LatentMoEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    few = {"hidden_size": 8, "latent_size": None, "num_experts": 4, "top_k": 2, "expert_intermediate_size": 3}
    assert LatentMoEConfig.from_dict(few) == LatentMoEConfig(**few)
    assert LatentMoEConfig.from_dict(few | {"backend": "xla"}).backend == XlaBackend()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_q": 1}, "top_q is not a field of LatentMoEConfig: use hidden_size, latent_size"),
        ({"router": {"topk": 1}}, "router.topk is not a field of RouterConfig"),
        ({"router": {"z_loss_coef": -1}}, "router.z_loss_coef=-1.0 must not be negative"),
        ({"router": [1]}, "router=[1] must be a RouterConfig"),
        ({"hidden_size": {}}, "hidden_size={} must not be a dict"),
        ({"backend": {"method": "blocked"}}, "backend.name=None is unknown: use one of 'xla', 'pallas', 'cutlass'"),
        ({"backend": {"name": "xla", "fuse": "never"}}, "backend.fuse is not a field of XlaBackend"),
    ],
)
def test_bad_dicts_are_refused(changes, message):
    assert message in refused(lambda **f: LatentMoEConfig.from_dict(TOY.to_dict() | f), changes)


def test_dicts_name_what_is_missing():
    assert "hidden_size is missing" in refused(lambda: LatentMoEConfig.from_dict({"top_k": 2}), {})
    assert "LatentMoEConfig=None must be a dict" in refused(lambda: LatentMoEConfig.from_dict(None), {})


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
