"""One token's routed part in one call: its values, emulated on the CPU, where it is chosen, and its gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_latent_moe import (
    CutlassBackend,
    ParallelConfig,
    RouterConfig,
    XlaBackend,
    init_params,
    latent_moe,
    lora,
    native,
    one_token,
    presets,
    quantize,
)
from jax_latent_moe.formats import ScaledArray, decoded
from jax_latent_moe.one_token import OneToken, plan_token
from jax_latent_moe.params import param_shapes
from jax_latent_moe.plan import GPUS, make_cost_plan, render
from tests import emulated
from tests.few_tokens import BACKEND, SMALL, WEIGHINGS, layer, use_small
from tests.kernels import A100, H100
from tests.oracle import layer as oracle
from tests.tolerances import assert_close

TARGET = "latent_moe_decode_token"
emulates = pytest.mark.skipif(emulated.missing() is not None, reason=f"{emulated.missing()}")


@pytest.fixture
def emulation(monkeypatch, install_library):
    """The kernels run on the CPU, as if it were a Hopper GPU with a library."""
    monkeypatch.setattr(native, "call", emulated.call)
    use_small(monkeypatch)


def token_layer(**changes):
    router = RouterConfig(routed_scaling_factor=2.5)
    config = layer("relu2", 40, 16, 9, 48, router=router, dtype="bfloat16", param_dtype="bfloat16")
    return dataclasses.replace(config, **changes)


def layer_params(config, seed=0):
    """Parameters with a bias that changes the choice."""
    params = init_params(jax.random.key(seed), config)
    if config.router.correction_bias:
        bias = jax.random.normal(jax.random.key(seed + 1), (config.num_experts,), jnp.float32)
        params["router"]["bias"] = bias
    return params


def in_float64(config, params):
    """The parameters as the oracle reads them, codes decoded."""
    wide = jax.tree.map(
        lambda leaf: np.asarray(decoded(leaf, jnp.float32), np.float64),
        params,
        is_leaf=lambda leaf: isinstance(leaf, ScaledArray),
    )
    w_in = wide["experts"]["w_in"]
    halves = (2,) if config.gated else ()
    wide["experts"]["w_in"] = w_in.reshape(*w_in.shape[:2], *halves, config.expert_intermediate_size)
    return wide


def check_layer(rng, config, params):
    """The call's outputs are those of the float64 oracle."""
    x = jnp.asarray(rng.normal(size=(1, config.hidden_size)), config.dtype)
    y, aux = jax.jit(latent_moe, static_argnums=2)(params, x, config)
    wanted = oracle.forward(in_float64(config, params), np.asarray(x, np.float64), config)
    np.testing.assert_array_equal(aux.expert_ids, wanted.expert_ids)
    np.testing.assert_array_equal(aux.tokens_per_expert, wanted.tokens_per_expert)
    np.testing.assert_allclose(aux.weights, wanted.weights, rtol=1e-4)
    assert_close(np.asarray(y, np.float64), wanted.y, config.dtype)


SELECTIONS = {
    "by the logits alone": RouterConfig(correction_bias=False),
    "by biased logits": RouterConfig(selection="logit"),
    **WEIGHINGS,
}


@emulates
@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("name", SELECTIONS)
def test_routers(rng, name):
    config = token_layer(router=SELECTIONS[name])
    assert isinstance(plan_token(config, 1, "bfloat16", layer_params(config)), OneToken)
    check_layer(rng, config, layer_params(config))


CHANGES = {
    "gated": dict(activation="swiglu"),
    "no latents": dict(latent_size=None),
    "latents as wide as tokens": dict(latent_size=64),
    "a norm behind the sum": dict(latent_norm="post"),
    "a factor behind the sum": dict(apply_routed_scale_to_output=True),
    "a shared expert": dict(shared_expert_intermediate_size=24),
    "float16": dict(dtype="float16", param_dtype="float16"),
    "a router in float32": dict(param_dtype="float32"),
    "all experts": dict(num_experts=16, top_k=16),
    "two experts": dict(num_experts=8, top_k=2),
    "many experts": dict(num_experts=520, top_k=22),
}


@emulates
@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("name", CHANGES)
def test_layers(rng, name):
    config = token_layer(**CHANGES[name])
    params = layer_params(config)
    assert isinstance(plan_token(config, 1, config.dtype, params), OneToken)
    check_layer(rng, config, params)


@emulates
@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("sms", [2, 132])
@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "int4_32_zero", "int8", "fp8_block"])
def test_codes(rng, monkeypatch, format, activation, sms):
    """The inner width in several parts, halves with scales of their own, and both kernels of the first product."""
    monkeypatch.setattr(emulated, "SMS", sms)
    config = token_layer(latent_size=128, expert_intermediate_size=384, num_experts=8, top_k=2, activation=activation)
    params = layer_params(config)
    if activation == "swiglu":
        params["experts"]["w_in"] *= jnp.asarray([1, 16], jnp.bfloat16)[:, None]
    params = quantize(params, config, format)
    plan = plan_token(config, 1, "bfloat16", params)
    assert isinstance(plan, OneToken)
    assert plan.decode.splits > 1
    check_layer(rng, config, params)


@emulates
@pytest.mark.usefixtures("emulation")
def test_it_reads_no_other_expert_and_a_nan_reaches_the_output(rng):
    config = token_layer()
    params = layer_params(config)
    x = jnp.asarray(rng.normal(size=(1, 64)), jnp.bfloat16)
    chosen = np.asarray(latent_moe(params, x, config)[1].expert_ids)[0]
    unread = np.setdiff1d(np.arange(16), chosen)
    poisoned = params | {"experts": {name: w.at[unread].set(jnp.nan) for name, w in params["experts"].items()}}
    np.testing.assert_array_equal(*(latent_moe(each, x, config)[0].astype(jnp.float32) for each in (params, poisoned)))
    assert np.isnan(np.asarray(latent_moe(params, x.at[0, 3].set(jnp.nan), config)[0], np.float32)).all()


@pytest.mark.usefixtures("install_library")
@pytest.mark.parametrize("format", [None, "mxfp4"])
def test_gradients_are_those_of_separate_calls(rng, monkeypatch, format):
    """And the program that has them makes no such call."""
    config = token_layer(backend=XlaBackend(), latent_size=64, expert_intermediate_size=64)
    params = layer_params(config)
    params = params if format is None else quantize(params, config, format)
    x = jnp.asarray(rng.normal(size=(1, 64)), jnp.bfloat16)

    def loss(params, x):
        y, aux = latent_moe(params, x, config)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))) + aux.losses["z"] + jnp.sum(aux.weights**2)

    gradient = functools.partial(jax.grad, argnums=(0, 1), allow_int=True)(loss)
    apart = gradient(params, x)
    unused = np.setdiff1d(np.arange(16), np.asarray(latent_moe(params, x, config)[1].expert_ids))
    assert unused.size
    plan = plan_token(dataclasses.replace(config, backend=BACKEND), 1, "bfloat16", params, device=SMALL)
    assert isinstance(plan, OneToken)
    used = []
    monkeypatch.setattr("jax_latent_moe.layer.plan_token", lambda *_: used.append(True) or plan)
    together = gradient(params, x)
    assert used
    jax.tree.map(np.testing.assert_array_equal, together, apart)
    assert TARGET not in str(jax.make_jaxpr(gradient)(params, x))
    if format is None:
        assert not any(np.asarray(together[0]["experts"][name])[unused].any() for name in ("w_in", "w_out"))


@pytest.mark.usefixtures("install_library")
@pytest.mark.parametrize("changes", [{}, dict(latent_norm="post"), dict(latent_size=None)])
def test_frozen_experts_have_no_weight_gradient(changes, monkeypatch):
    """XLA drops that of w_in. That of w_out would be kept behind a barrier."""
    use_small(monkeypatch)
    config = token_layer(**changes)
    params = jax.eval_shape(lambda: layer_params(config))
    x = jax.ShapeDtypeStruct((1, 64), jnp.bfloat16)

    def loss(params, x):
        return jnp.sum(latent_moe(params, x, config)[0].astype(jnp.float32))

    for argument, count in ((0, 2), (1, 1)):
        gradient = jax.grad(loss, argnums=argument)
        assert str(jax.make_jaxpr(gradient)(params, x)).count("latent_moe_wgrad") == count


@pytest.mark.usefixtures("install_library")
def test_each_projection_has_its_own_parts(rng, monkeypatch):
    use_small(monkeypatch)
    called, config = [], token_layer()

    def call(target, operands, results, **attributes):
        called.append((target, attributes["parts"], attributes["up_parts"]))
        return [jnp.zeros(result.shape, result.dtype) for result in results]

    monkeypatch.setattr(native, "call", call)
    latent_moe(layer_params(config), jnp.ones((1, 64), jnp.bfloat16), config)
    assert called == [("decode_token", 1, 2)]


@pytest.mark.usefixtures("install_library")
def test_a_program_makes_one_call(monkeypatch):
    use_small(monkeypatch)
    config = token_layer()
    params = jax.eval_shape(lambda: layer_params(config))
    x = jax.ShapeDtypeStruct((1, 64), jnp.bfloat16)
    program = str(jax.make_jaxpr(lambda params, x: latent_moe(params, x, config)[0])(params, x))
    assert program.count("latent_moe_") == program.count(TARGET) == 1


@pytest.mark.usefixtures("install_library")
@pytest.mark.parametrize("changes", [{}, dict(latent_norm="post"), dict(latent_size=None)])
def test_a_scan_in_a_shard_map(changes, monkeypatch):
    """The carry keeps its type, which says over which axes of the mesh it varies."""
    use_small(monkeypatch)
    config = token_layer(**changes)
    params = jax.eval_shape(lambda: layer_params(config))
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))

    def steps(params, x):
        return jax.lax.scan(lambda x, _: (latent_moe(params, x, config)[0], None), x, None, length=2)[0]

    mapped = jax.shard_map(steps, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P("batch"))
    assert TARGET in str(jax.make_jaxpr(mapped)(params, jax.ShapeDtypeStruct((2, 64), jnp.bfloat16)))


@emulates
@pytest.mark.usefixtures("emulation")
def test_under_vmap(rng):
    """Each token makes its own call."""
    config = token_layer()
    params = layer_params(config)
    tokens = jnp.asarray(rng.normal(size=(3, 1, 64)), jnp.bfloat16)
    each = jax.vmap(lambda x: latent_moe(params, x, config)[0])(tokens)
    wanted = jnp.stack([latent_moe(params, x, config)[0] for x in tokens])
    np.testing.assert_array_equal(each.astype(jnp.float32), wanted.astype(jnp.float32))


REFUSALS = {
    "two tokens": (dict(), dict(tokens=2), "take one token, not 2"),
    "backend": (dict(backend=XlaBackend()), {}, "has no kernels for few tokens"),
    "decode": (dict(backend=CutlassBackend(decode="never")), {}, "decode is 'never'"),
    "device": ({}, dict(device=A100), "compiled for NVIDIA Hopper GPUs"),
    "mesh": (dict(parallel=ParallelConfig()), {}, "config.parallel is set"),
    "the tokens' dtype": ({}, dict(dtype="float32"), "the router reads float32, and the experts read bfloat16"),
    "groups": (dict(router=RouterConfig(num_groups=4, topk_groups=3)), {}, "router.num_groups"),
    "sinkhorn": (dict(router=RouterConfig(selection="sinkhorn", correction_bias=False)), {}, "router.selection"),
    "a bias of logits": (dict(router=RouterConfig(logit_bias=True)), {}, "router.logit_bias"),
    "scales": (dict(router=RouterConfig(per_expert_scale=True)), {}, "router.per_expert_scale"),
    "capacity": (dict(router=RouterConfig(capacity_factor=1.5)), {}, "router.capacity_factor"),
    "rounding": (dict(router=RouterConfig(round_to_tile=8)), {}, "router.round_to_tile"),
    "a norm in between": (dict(latent_norm="pre"), {}, "latent_norm"),
    "weights of no kernel": (
        dict(router=RouterConfig(norm_topk_prob=False)),
        {},
        "no compiled kernel makes this router's choice",
    ),
    "many experts": (dict(num_experts=1032), {}, "no compiled kernel makes this router's choice"),
    "expert biases": (dict(expert_bias=True), {}, "config.expert_bias is True"),
    "softmax and a bias": (
        dict(router=RouterConfig(score_function="softmax", norm_topk_eps=0.0)),
        {},
        "router.score_function",
    ),
    "the columns of a projection": (dict(latent_size=44), {}, "the 44 columns of the projection's kernel"),
    "the router's kernel": (dict(param_dtype="float16"), {}, "the router's kernel is in float16"),
    "the router's dtype": (dict(router=RouterConfig(dtype="bfloat16")), {}, "router.dtype is 'bfloat16'"),
    "widths": (dict(expert_intermediate_size=50), {}, "are not a positive multiple of 8"),
}


@pytest.mark.usefixtures("install_library")
@pytest.mark.parametrize("name", REFUSALS)
def test_it_is_not_chosen(name):
    changes, arguments, reason = REFUSALS[name]
    config = token_layer(**changes)
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    arguments = dict(tokens=1, dtype="bfloat16", params=params, device=H100) | arguments
    assert reason in str(plan_token(config, **arguments))


@pytest.mark.usefixtures("install_library")
def test_adapters_run_in_separate_calls_but_for_one_on_the_up_projection():
    config = token_layer()
    adapted = lora.adapt(jax.random.key(1), init_params(jax.random.key(0), config), config, rank=4)
    assert "adapters" in str(plan_token(config, 1, "bfloat16", adapted, device=H100))
    plain = init_params(jax.random.key(0), config)
    plain["up_proj"] = adapted["up_proj"]
    assert isinstance(plan_token(config, 1, "bfloat16", plain, device=H100), OneToken)


@pytest.mark.usefixtures("install_library")
@pytest.mark.parametrize("name", ["mask", "ids", "jitter"])
def test_what_a_call_may_have_besides_tokens(name, monkeypatch):
    use_small(monkeypatch)
    config = token_layer(router=RouterConfig(input_jitter=0.1)) if name == "jitter" else token_layer()
    given = {
        "mask": dict(token_mask=jnp.ones(1, bool)),
        "ids": dict(expert_ids=jnp.zeros((1, 9), jnp.int32)),
        "jitter": dict(key=jax.random.key(0)),
    }[name]
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    x = jax.ShapeDtypeStruct((1, 64), jnp.bfloat16)
    program = str(jax.make_jaxpr(lambda params, x: latent_moe(params, x, config, **given)[0])(params, x))
    assert TARGET not in program
    assert "latent_moe_decode_experts" in program


@pytest.mark.usefixtures("install_library")
def test_what_runs_is_said_in_a_line():
    """Also in the plan of a layer. If several calls run, it says why."""
    config = dataclasses.replace(presets.NEMOTRON_3_SUPER, backend=BACKEND)
    params = param_shapes(config)
    told = functools.partial(one_token.explain, params=params, device=H100)
    one = "router, experts and projections run in one call: each kernel is launched while the one before runs."
    assert told(config, 1) == one
    apart = "router, experts and projections run in separate calls: "
    assert told(config, 2) == f"{apart}these kernels take one token, not 2."
    normed = dataclasses.replace(config, latent_norm="pre")
    line = one_token.explain(normed, 1, param_shapes(normed), device=H100)
    assert line == f"{apart}XLA computes a step between the kernels because of latent_norm."
    plan = make_cost_plan(config, {}, 1, GPUS["h200"], format="mxfp4")
    assert plan.one_token == one
    assert f"without a gradient, {one}" in render(plan)
