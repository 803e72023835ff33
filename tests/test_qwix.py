"""Weights to and from qwix's QArray, against qwix's own decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from jax_latent_moe import InputError, LatentMoEError, init_params, latent_moe
from jax_latent_moe.formats import encode
from jax_latent_moe.qwix import from_qarray, to_qarray
from tests.cases import TOY

EXPRESSED = [
    "fp8_tensor", "fp8_channel", "fp8_block", "fp8_block_pow2", "int8", "int4_32", "int4_128", "int4_32_zero",
    "int4_128_zero", "mxfp4",
]  # fmt: skip


def weights(rng, experts=3, k=256, n=384, parts=1):
    shape = (experts, k, n) if parts == 1 else (experts, k, parts, n)
    scale = np.exp(rng.normal(size=(experts, *(1,) * (len(shape) - 2), n)))
    return jnp.float32(rng.normal(size=shape) * scale)


def decoded(weight, parts=1):
    values = np.float32(weight.decode(jnp.float32))
    return values if parts == 1 else values.reshape(*values.shape[:2], parts, -1)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", EXPRESSED)
def test_there_and_back(name, parts, rng):
    weight = encode(weights(rng, parts=parts).reshape(3, 256, -1), name, parts=parts)
    array = to_qarray(weight)
    np.testing.assert_array_equal(qwix.dequantize(array.astype(jnp.float32)), decoded(weight, parts))
    back = from_qarray(array, parts=parts)
    assert back.format == ("fp8_block" if name == "fp8_block_pow2" else name)
    for given, found in zip(jax.tree.leaves(weight), jax.tree.leaves(back), strict=True):
        assert given.dtype == found.dtype
        np.testing.assert_array_equal(given, found)


@pytest.mark.parametrize(
    ("dtype", "settings", "name"),
    [
        (jnp.int8, dict(channelwise_axes=[0, 2]), "int8"),
        (jnp.int8, dict(channelwise_axes=[0]), "int8"),
        (jnp.int8, {}, "int8"),
        (jnp.int4, dict(channelwise_axes=[0, 2], tiled_axes={1: 32}), "int4_32"),
        (jnp.int4, dict(channelwise_axes=[0, 2], tiled_axes={1: 64}), "int4_32"),
        (jnp.int4, dict(channelwise_axes=[0, 2]), "int4_128"),
        (jnp.float8_e4m3fn, {}, "fp8_tensor"),
        (jnp.float8_e4m3fn, dict(channelwise_axes=[0, 2]), "fp8_channel"),
        (jnp.float8_e4m3fn, dict(channelwise_axes=[0], tiled_axes={1: 128, 2: 128}), "fp8_block"),
        ("mxfp4", dict(channelwise_axes=[0, 2], tiled_axes={1: 32}), "mxfp4"),
    ],
)
def test_what_qwix_quantises(dtype, settings, name, rng):
    array = qwix.quantize(weights(rng), dtype, **settings)
    weight = from_qarray(array)
    assert weight.format == name
    np.testing.assert_array_equal(decoded(weight), qwix.dequantize(array))


@pytest.mark.usefixtures("compiled_in_a_hurry")
def test_a_layer_with_them(rng):
    config = dataclasses.replace(
        TOY, latent_size=128, expert_intermediate_size=64, activation="swiglu", top_k=3, expert_bias=False
    )
    params = init_params(jax.random.key(0), config)
    x = jnp.float32(rng.normal(size=(5, config.hidden_size)))
    arrays = {
        "w_in": qwix.quantize(params["experts"]["w_in"], jnp.int8, channelwise_axes=[0, 2, 3]),
        "w_out": qwix.quantize(params["experts"]["w_out"], jnp.float8_e4m3fn, channelwise_axes=[0]),
    }

    @jax.jit
    def output(w_in, w_out):
        return latent_moe(params | {"experts": {"w_in": w_in, "w_out": w_out}}, x, config)[0]

    found = output(from_qarray(arrays["w_in"], parts=2), from_qarray(arrays["w_out"]))
    wanted = output(*map(qwix.dequantize, arrays.values()))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_scales_of_a_bfloat16_weight_become_what_kernels_read(rng):
    array = qwix.quantize(weights(rng).astype(jnp.bfloat16), jnp.int8, channelwise_axes=[0, 2])
    assert array.scale.dtype == jnp.bfloat16
    weight = from_qarray(array)
    assert weight.scales["channel"].dtype == jnp.float32
    np.testing.assert_array_equal(decoded(weight), qwix.dequantize(array.astype(jnp.float32)))


def test_under_jit(rng):
    weight = encode(weights(rng), "int4_32")
    array = jax.jit(to_qarray)(weight)
    np.testing.assert_array_equal(jax.jit(from_qarray)(array).codes, weight.codes)
    with pytest.raises(InputError, match="outside of jit"):
        jax.jit(from_qarray)(to_qarray(encode(weights(rng), "mxfp4")))


@pytest.mark.parametrize("name", ["fp8_block", "int8", "int4_32_zero", "int4_128", "mxfp4"])
def test_a_weight_without_experts(name):
    weight = encode(jnp.zeros((0, 256, 384)), name)
    array = to_qarray(weight)
    assert array.shape == (0, 256, 384)
    back = from_qarray(array)
    assert back.format == name
    assert [leaf.shape for leaf in jax.tree.leaves(back)] == [leaf.shape for leaf in jax.tree.leaves(weight)]


@pytest.mark.parametrize("name", ["fp8_tensor", "int8", "int4_32_zero"])
def test_shapes_alone(name, rng):
    weight = encode(weights(rng), name)
    shapes = jax.eval_shape(from_qarray, jax.eval_shape(to_qarray, weight))
    assert shapes.format == name
    assert jax.tree.leaves(shapes) == jax.tree.leaves(jax.eval_shape(lambda: weight))


def test_the_smallest_and_no_scales_of_mxfp4():
    codes = jnp.zeros((1, 32, 3), jnp.float4_e2m1fn)
    scales = jnp.array([2.0**-127, 2.0**127, jnp.nan], jnp.float32).reshape(1, 1, 3)
    weight = from_qarray(qwix.QArray(codes, scales))
    assert weight.scales["block"].ravel().tolist() == [0, 254, 255]
    np.testing.assert_array_equal(to_qarray(weight).scale, scales)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda w: from_qarray(w), "is of type ArrayImpl, not QArray"),
        (lambda w: to_qarray(w), "is of type ArrayImpl, not ScaledArray"),
        (lambda w: to_qarray(encode(w, "nvfp4")), "a QArray cannot hold nvfp4"),
        (lambda w: to_qarray(encode(w[:, :200], "fp8_block")), "no partial blocks"),
        (lambda w: from_qarray(qwix.quantize(w, jnp.int8, tiled_axes={1: 32})), "no format has int8 codes of shape"),
        (lambda w: from_qarray(qwix.quantize(w, jnp.int4, tiled_axes={1: 16})), "int4_32 .int4, 32 x 1.*mxfp4"),
        (lambda w: from_qarray(qwix.quantize(w, "nf4", tiled_axes={1: 32})), "no format has nf4 codes"),
        (lambda w: from_qarray(qwix.quantize(w, jnp.int8, calibration_method="minmax")), "with zero points"),
        (lambda w: from_qarray(qwix.quantize(w, jnp.float4_e2m1fn, tiled_axes={1: 32})), "no powers of two"),
        (lambda w: from_qarray(qwix.quantize(w, jnp.int8), parts=2), "parts=2: it must be"),
        (lambda w: from_qarray(qwix.quantize(w[0, 0], jnp.int8)), "it must be"),
        (lambda w: from_qarray(qwix.QArray(jnp.int8(w), w[0, 0])), r"shape \(3, 256, 384\) with .* \[\(384,\)\]"),
        (lambda w: from_qarray(qwix.QArray(jnp.int8(w), jnp.ones((3, 0, 384)))), "no format has int8"),
        (lambda w: from_qarray(qwix.quantize(w, jnp.int8), parts=2.0), "parts=2.0 must be an integer"),
        (lambda w: from_qarray(jax.eval_shape(lambda: qwix.quantize(w, jnp.int8))), r"jax.eval_shape\(from_qarray"),
        (lambda w: to_qarray(jax.eval_shape(lambda: encode(w, "int8"))), r"jax.eval_shape\(to_qarray, weight\)"),
        (lambda w: jax.vmap(from_qarray)(to_qarray(encode(w, "mxfp4"))), "outside of jit, vmap and eval_shape"),
    ],
)
def test_refusals(make, message, rng):
    with pytest.raises(LatentMoEError, match=message):
        make(weights(rng))
