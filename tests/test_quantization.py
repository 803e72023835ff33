"""Layers whose experts are codes: against the float64 oracle on the decoded weights, and in every place of a tree."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import jax_latent_moe.linen
import jax_latent_moe.nnx
from jax_latent_moe import (
    ConfigError,
    InputError,
    LatentMoEConfig,
    RouterConfig,
    after_step,
    dequantize,
    formats,
    latent_moe,
    merge_state,
    native,
    quantize,
    split_state,
    trainable_mask,
)
from jax_latent_moe.formats import ScaledArray
from tests import oracle
from tests.flax_layers import draw
from tests.programs import floating_arrays
from tests.tolerances import assert_close, assert_trees_close

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")

PLAIN = LatentMoEConfig(
    hidden_size=12,
    latent_size=32,
    num_experts=12,
    top_k=9,
    expert_intermediate_size=64,
    shared_expert_intermediate_size=7,
    router=RouterConfig(bias_update_rate=0.25),
    dtype="float32",
)
GATED = dataclasses.replace(PLAIN, activation="swiglu")
CASES = {"mxfp4": GATED, "fp8_block": GATED, "int8": PLAIN}
every_case = pytest.mark.parametrize(("name", "config"), CASES.items(), ids=CASES)


@functools.cache
def quantised(name, config):
    """Parameters drawn from a fixed seed, quantised in a jitted call."""
    params = draw(np.random.default_rng(3), config)
    return params, jax.jit(quantize, static_argnums=(1, 2))(params, config, name)


def loss(trainable, state, x, dy, config):
    y, aux = latent_moe(merge_state(trainable, state), x, config)
    return jnp.sum(y * dy), (y, aux)


@every_case
def test_values_and_gradients_are_those_of_the_decoded_weights(name, config, rng):
    """One expert gets no token, and the codes get no gradient."""
    _, params = quantised(name, config)
    bias = params["router"]["bias"].at[5].set(-100.0)
    params |= {"router": params["router"] | {"bias": bias}}
    x, dy = (jnp.asarray(rng.normal(size=(2, 5, 12)), jnp.float32) for _ in range(2))
    trainable, state = split_state(params)
    run = jax.jit(jax.value_and_grad(loss, (0, 2), has_aux=True), static_argnums=4)
    (_, (y, aux)), (dparams, dx) = run(trainable, state, x, dy, config)
    decoded = jax.tree.map(np.float64, dequantize(params, config))
    expected = oracle.forward(decoded, np.float64(x), config)
    assert aux.tokens_per_expert[5] == 0
    wanted, wanted_x = oracle.backward(decoded, config, expected, np.float64(dy))
    assert_close(y, expected.y, "float32")
    assert_close(dx, wanted_x, "float32")
    assert not dparams["experts"]
    for part, leaves in dparams.items():
        assert_trees_close(leaves, {leaf: wanted[part][leaf] for leaf in leaves}, "float32", part)


def test_nothing_computes_the_gradient_of_codes():
    """Only a dense layer's program has products of the experts' shape. Codes have no gradient."""
    config = dataclasses.replace(PLAIN, num_experts=1000)
    shapes = jax_latent_moe.param_shapes(config)
    x = jax.ShapeDtypeStruct((2, 5, 12), jnp.float32)

    def total(params, x):
        return jnp.sum(latent_moe(params, x, config)[0])

    def of_experts(params):
        program = jax.make_jaxpr(jax.grad(total, (0, 1), allow_int=True))(params, x)
        return [shape for shape in floating_arrays(program) if np.prod(shape) >= 1000 * 32 * 64]

    codes = jax.eval_shape(lambda params: quantize(params, config, "mxfp4"), shapes)
    assert of_experts(shapes)
    assert not of_experts(codes)
    gradient = jax.eval_shape(jax.grad(total, allow_int=True), codes, x)["experts"]["w_in"]
    assert gradient.codes.dtype == gradient.scales["block"].dtype == jax.dtypes.float0


@pytest.mark.parametrize("name", formats.FORMATS)
def test_shapes_bytes_and_the_way_back(name):
    """Only by shapes: each format's tree, and dequantize to the parameters' shapes and dtypes."""
    config = dataclasses.replace(GATED, latent_size=128, expert_intermediate_size=256, param_dtype="bfloat16")
    shapes = jax_latent_moe.param_shapes(config)
    codes = jax.eval_shape(lambda params: quantize(params, config, name), shapes)
    back = jax.eval_shape(lambda params: dequantize(params, config), codes)
    assert back == shapes
    assert {part: codes[part] for part in codes if part != "experts"} == {
        part: shapes[part] for part in shapes if part != "experts"
    }
    bits = {"mxfp4": 4.25, "nvfp4": 4.5, "int4_32": 4.5, "int4_128": 4.125, "int4_32_zero": 4.75}
    expected = bits | {"int4_128_zero": 4.1875}
    for leaf, weight in codes["experts"].items():
        assert weight.codes.shape[1] == (2 if leaf == "w_in" else 1)
        per_weight = 8 * weight.nbytes / np.prod(shapes["experts"][leaf].shape)
        assert per_weight == pytest.approx(
            expected.get(name, 8), rel=0.035 if name in ("int8", "fp8_channel") else 2e-3
        )


def test_a_round_trip_is_stable():
    """Decoded weights encode to the same codes, so quantising twice loses nothing more."""
    _, params = quantised("mxfp4", GATED)
    again = quantize(dequantize(params, GATED), GATED, "mxfp4")
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_refusals():
    params, codes = quantised("mxfp4", GATED)
    with pytest.raises(InputError, match=r"experts/w_in is in format mxfp4 already: dequantize params first"):
        quantize(codes, GATED, "int8")
    with pytest.raises(ConfigError, match="format='fp5' is unknown: registered are fp8_block, "):
        quantize(params, GATED, "fp5")
    with pytest.raises(ConfigError, match="K=32 of a weight of 32 x 64 is not a multiple of 128"):
        quantize(params, GATED, "int4_128")
    w_in = codes["experts"]["w_in"]

    def check(match, part="experts", leaf="w_in", **changes):
        broken = codes | {part: codes[part] | {leaf: dataclasses.replace(w_in, **changes)}}
        with pytest.raises(InputError, match=match):
            latent_moe(broken, jnp.ones((2, 12)), GATED)

    check("only the experts' weights can be quantised", part="up_proj", leaf="kernel")
    check("registered formats are", format="fp5")
    check(
        r"codes of shape \(12, 1, 128, 16\), which must be \(12, 2, 64, 16\)", codes=w_in.codes.reshape(12, 1, 128, 16)
    )
    check(r"scales of shape \(12, 2, 64, 2\), which must be \(12, 2, 64, 1\)", scales=jnp.ones((12, 2, 64, 2)))
    check(r"scales of shape \(11, 2, 64, 1\)", scales=w_in.scales["block"][:11])


def test_split_state_mask_and_after_step():
    """Codes are state, also in a model's dicts and lists, and also without a correction bias."""
    _, codes = quantised("int8", PLAIN)
    without = {part: dict(leaves) for part, leaves in codes.items()}
    del without["router"]["bias"]
    model = {"layers": [codes, without], "head": jnp.ones(3)}
    trainable, state = split_state(model)
    assert not any(isinstance(leaf, ScaledArray) for leaf in _leaves(trainable))
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(trainable))
    merged = merge_state(trainable, state)
    assert jax.tree.structure(merged) == jax.tree.structure(model)
    aux = {"layers": [jnp.arange(12, dtype=jnp.int32), None]}
    moved = after_step(state, aux, 0.5)
    assert (moved["layers"][0]["router"]["bias"] != codes["router"]["bias"]).any()
    assert moved["layers"][0]["experts"] is state["layers"][0]["experts"]
    assert moved["layers"][1] is state["layers"][1]
    mask = trainable_mask(model)
    assert jax.tree.structure(mask) == jax.tree.structure(model)
    frozen = jax.tree.leaves([mask["layers"][0]["experts"], mask["layers"][0]["router"]["bias"]])
    assert not any(frozen)
    assert mask["head"]
    assert mask["layers"][1]["router"]["kernel"]


def _leaves(tree):
    return jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, ScaledArray))


def test_flax_modules(rng):
    """Both hold the codes as state: gradients with respect to the parameters leave them out."""
    _, params = quantised("mxfp4", GATED)
    x = jnp.asarray(rng.normal(size=(2, 5, 12)), jnp.float32)
    wanted = jax.jit(latent_moe, static_argnums=2)(params, x, GATED)[0]

    layer, variables = jax_latent_moe.linen.LatentMoE(GATED), jax_latent_moe.linen.from_params(params, GATED)
    assert set(variables["codes"]["experts"]) == {"w_in", "w_out"}
    assert "experts" not in variables["params"]
    boxed = variables["codes"]["experts"]["w_in"]
    assert boxed.codes.names == ("expert", None, "expert_intermediate", "expert_latent")
    assert boxed.scales["block"].names == ("expert", None, "expert_intermediate", None)
    apply = jax.jit(functools.partial(layer.apply, mutable=["losses", "intermediates"]))
    np.testing.assert_array_equal(apply(variables, x)[0], wanted)
    same_trees(jax_latent_moe.linen.to_params(variables), params)
    mixed = params | {"experts": params["experts"] | {"w_out": dequantize(params, GATED)["experts"]["w_out"]}}
    both = jax_latent_moe.linen.from_params(mixed, GATED, axis_names=None)
    assert set(both["params"]["experts"]) == {"w_out"}
    assert jax.eval_shape(apply, both, x)[0].shape == x.shape
    same_trees(jax_latent_moe.linen.to_params(both), mixed)

    module = jax_latent_moe.nnx.from_params(params, GATED)
    assert isinstance(module.experts["w_in"], jax_latent_moe.nnx.Codes)
    np.testing.assert_array_equal(nnx.jit(lambda module, x: module(x))(module, x), wanted)
    same_trees(jax_latent_moe.nnx.to_params(module), params)
    trained = nnx.to_flat_state(nnx.state(module, nnx.Param))
    assert not any("experts" in path for path, _ in trained)
    assert nnx.state(module, jax_latent_moe.nnx.Codes)


def same_trees(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_orbax_restores_codes(tmp_path):
    """Into the shapes of the same tree: the format is part of its structure."""
    _, params = quantised("mxfp4", GATED)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", params)
        checkpointer.wait_until_finished()
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
        restored = checkpointer.restore(tmp_path / "saved", shapes)
    same_trees(restored, params)
    for leaf, other in zip(jax.tree.leaves(restored), jax.tree.leaves(params), strict=True):
        assert leaf.dtype == other.dtype


def test_export(rng):
    """A program of the layer takes the codes; a serialised one too, where flatbuffers is installed."""
    _, params = quantised("mxfp4", GATED)
    x = jnp.asarray(rng.normal(size=(2, 5, 12)), jnp.float32)
    run = jax.jit(lambda params, x: latent_moe(params, x, GATED)[0])
    exported = jax.export.export(run, disabled_checks=native.export_checks())(params, x)
    np.testing.assert_array_equal(exported.call(params, x), run(params, x))
    pytest.importorskip("flatbuffers")
    again = jax.export.deserialize(exported.serialize(), disabled_checks=native.export_checks())
    np.testing.assert_array_equal(again.call(params, x), run(params, x))
