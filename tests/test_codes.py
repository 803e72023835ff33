"""Codes that a training step makes once: their bytes, the calls that read them, and codes of other weights."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jax_latent_moe.linen
import jax_latent_moe.nnx
from jax_latent_moe import (
    InputError,
    LatentMoEConfig,
    Precision,
    RouterConfig,
    encode_experts,
    formats,
    init_params,
    latent_moe,
    lora,
    quantize,
)
from jax_latent_moe import experts as experts_module
from jax_latent_moe.formats import both_layouts
from tests.oracle import formats as oracle
from tests.programs import e4m3_arrays

pytestmark = pytest.mark.usefixtures("quick_compilation")
FP8, POW2 = "fp8_block", "fp8_block_pow2"
BOTH = Precision(FP8, FP8)
TOKENS, EXPERTS, K = 17, 12, 9
CONFIG = LatentMoEConfig(24, 130, EXPERTS, K, 136, precision=BOTH)
TWO = dataclasses.replace(CONFIG, num_experts=2, top_k=2)
SMALL = LatentMoEConfig(16, 24, 4, 2, 40, router=RouterConfig(correction_bias=False), precision=BOTH)
encode = jax.jit(encode_experts, static_argnums=1)


def layer_of(config, seed=0):
    return init_params(jax.random.key(seed), config)


def weights(rng, config):
    """The experts' weights, of blocks with different scales."""
    experts = layer_of(config)["experts"]
    return {name: np.asarray(w) * rng.uniform(0.1, 3, w.shape).astype(np.float32) for name, w in experts.items()}


def check_codes(codes, config, w_in, w_out):
    """Blocks of gate and up do not mix in the forward layout. In the other, they lie one after the other."""
    precision, flat = config.precision, w_in.reshape(*w_in.shape[:2], -1)
    for e in range(len(w_in)):
        parts = np.split(flat[e], 2 if config.gated else 1, axis=1)
        layouts = {
            "fwd_in": (precision.fwd, [part.T for part in parts]),
            "fwd_out": (precision.fwd, [w_out[e].T]),
            "dgrad_in": (precision.dgrad, [flat[e]]),
            "dgrad_out": (precision.dgrad, [w_out[e]]),
        }
        for name, (format, matrices) in layouts.items():
            found = getattr(codes, name)
            if format is None:
                assert found is None
                continue
            assert found.format == format
            assert found.codes.shape[1] == len(matrices)
            for part, matrix in enumerate(matrices):
                wanted, scales = oracle.fp8_block(matrix, power_of_two=format == POW2)
                np.testing.assert_array_equal(found.codes[e, part], wanted, name)
                np.testing.assert_array_equal(found.scales["block"][e, part], scales["block"])


@pytest.mark.parametrize(
    "precision", [BOTH, Precision(POW2, POW2), Precision(FP8, POW2), Precision(dgrad=FP8)], ids=str
)
@pytest.mark.parametrize(("activation", "inner"), [("relu2", 136), ("swiglu", 136), ("swiglu", 256)])
def test_both_layouts_to_the_bit(rng, activation, inner, precision):
    config = dataclasses.replace(TWO, activation=activation, expert_intermediate_size=inner, precision=precision)
    experts = weights(rng, config)
    check_codes(encode({"experts": experts}, config), config, **experts)


def test_the_scale_is_rounded_before_its_reciprocal(rng):
    """Values halfway between two codes, where 448 / amax in place of 1 / (amax / 448) gives the other one."""
    amax = rng.uniform(1, 2, 20_000).astype(np.float32)
    inverse, once = np.float32(1) / (amax / np.float32(448)), np.float32(448) / amax
    value = np.float32(17) / inverse
    differ = oracle.nearest_e4m3(value * inverse) != oracle.nearest_e4m3(value * once)
    amax, value = amax[differ][:16], value[differ][:16]
    assert len(amax) == 16
    matrix = np.zeros((16, 128, 128), np.float32)
    matrix[:, 0, 0], matrix[:, 0, 1] = amax, value
    matrix = np.concatenate(list(matrix), axis=1)
    found = jax.jit(formats.encode, static_argnums=1)(matrix, FP8)
    np.testing.assert_array_equal(found.codes[0].T, oracle.fp8_block(matrix)[0])


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_both_layouts_of_a_compiled_kernel(rng, activation, monkeypatch):
    """A kernel that does what custom_calls/src/formats/encode_blocks.h says."""

    def kernel(target, operands, results, *, power_of_two):
        assert target == "encode_blocks"
        encoded = [oracle.fp8_block(np.asarray(matrix), power_of_two=power_of_two) for matrix in operands[0]]
        codes, scales = (np.stack(parts) for parts in zip(*((codes, s["block"]) for codes, s in encoded), strict=True))
        found = codes, np.swapaxes(codes, 1, 2), scales
        assert [(array.shape, array.dtype) for array in found] == [(out.shape, out.dtype) for out in results]
        return [jnp.asarray(array) for array in found]

    monkeypatch.setattr(experts_module, "compiled_runs", lambda backend: backend == "auto")
    monkeypatch.setattr(both_layouts.native, "call", kernel)
    config = dataclasses.replace(
        TWO, latent_size=128, activation=activation, expert_intermediate_size=256, precision=Precision(POW2, POW2)
    )
    experts = weights(rng, config)
    check_codes(encode_experts({"experts": experts}, config), config, **experts)


@pytest.mark.parametrize(
    ("shape", "parts", "dtype", "format", "takes"),
    [
        ((512, 1024, 2688), 1, "float32", FP8, True),
        ((48, 512, 1024, 2688), 1, "bfloat16", POW2, True),
        ((4, 128, 384), 2, "float32", FP8, False),
        ((4, 64, 256), 1, "float32", FP8, False),
        ((0, 128, 128), 1, "float32", FP8, False),
        ((4, 128, 128), 1, "int32", FP8, False),
        ((4, 128, 128), 1, "float32", "fp8_tensor", False),
    ],
)
def test_what_the_kernel_encodes(shape, parts, dtype, format, takes):
    weight: Any = jax.ShapeDtypeStruct(shape, dtype)
    assert both_layouts.kernel_encodes(weight, format, parts) == takes


def gradients(config):
    """A jitted function of params, x, the output's gradient, codes and ids: y, and the gradients of params and x."""

    def run(params, x, dy, codes, ids):
        mask = jnp.arange(TOKENS) != 3
        y, pullback = jax.vjp(
            lambda params, x: latent_moe(params, x, config, token_mask=mask, expert_ids=ids, codes=codes)[0], params, x
        )
        return y, pullback(dy)

    return jax.jit(run)


def inputs(rng):
    """Tokens with padding full of NaN, the output's gradient, and ids that leave two experts without tokens."""
    x, dy = (rng.normal(size=(TOKENS, 24)).astype(np.float32) for _ in range(2))
    x[3] = np.nan
    ids = np.stack([rng.choice(EXPERTS - 2, size=K, replace=False) for _ in range(TOKENS)]).astype(np.int32)
    return x, jnp.asarray(dy, jnp.bfloat16), ids


@pytest.mark.parametrize(
    ("activation", "expert_bias", "precision"),
    [("swiglu", False, BOTH), ("relu2", True, Precision(FP8, POW2))],
    ids=str,
)
def test_the_same_bits_as_encoding_in_the_call(rng, activation, expert_bias, precision):
    config = dataclasses.replace(CONFIG, activation=activation, expert_bias=expert_bias, precision=precision)
    params, (x, dy, ids), run = layer_of(config), inputs(rng), gradients(config)
    in_call, before = run(params, x, dy, None, ids), run(params, x, dy, encode(params, config), ids)
    for one, other in zip(jax.tree.leaves(in_call), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(np.float32(one), np.float32(other))
    grads = before[1][0]["experts"]
    assert grads["w_in"].dtype == jnp.float32
    reached = np.asarray(grads["w_in"]).reshape(EXPERTS, -1).any(axis=1)
    assert reached.tolist() == [True] * (EXPERTS - 2) + [False] * 2


def test_weights_are_rounded_once(rng):
    """From float32 to FP8, although the layer computes in bfloat16."""
    params, (x, _, ids) = layer_of(CONFIG), inputs(rng)
    x = np.nan_to_num(x)
    run = jax.jit(lambda params, x: latent_moe(params, x, forward, expert_ids=ids)[0])
    forward = dataclasses.replace(CONFIG, precision=Precision(fwd=FP8))
    y = run(params, x)
    np.testing.assert_array_equal(y, run(quantize(params, CONFIG, FP8), x))
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params["experts"])
    assert (encode(params, CONFIG).fwd_in.codes != encode({"experts": narrow}, CONFIG).fwd_in.codes).any()
    assert (y != run(params | {"experts": narrow}, x)).any()


@pytest.mark.parametrize("name", ["w_in", "w_out"])
def test_codes_of_other_weights_give_nan(rng, name):
    """As after a step of the optimiser that moved one expert only. The codes of the new weights are right again."""
    params, (x, dy, ids), run = layer_of(CONFIG), inputs(rng), gradients(CONFIG)
    codes, experts = encode(params, CONFIG), params["experts"]
    moved = params | {"experts": experts | {name: experts[name].at[4].multiply(1.001)}}
    y, (_, dx) = run(moved, x, dy, codes, ids)
    reached = np.arange(TOKENS) != 3
    assert np.isnan(np.float32(y[reached])).all()
    assert np.isnan(dx[reached]).all()
    assert np.isfinite(np.float32(run(moved, x, dy, encode(moved, CONFIG), ids)[0])).all()
    broken = params | {"experts": experts | {name: experts[name].at[-1].set(jnp.nan)}}  # which no token reaches
    assert np.isfinite(np.float32(run(broken, x, dy, encode(broken, CONFIG), ids)[0])).all()


def test_what_does_not_fit_is_refused():
    params, x = layer_of(SMALL), jnp.ones((3, 16))
    codes = encode(params, SMALL)
    with pytest.raises(InputError, match=r"codes of type dict must be what encode_experts\(params, config\) returns"):
        latent_moe(params, x, SMALL, codes={})
    with pytest.raises(InputError, match=r"codes have no effect with config.precision=None: leave them out"):
        latent_moe(params, x, dataclasses.replace(SMALL, precision=None), codes=codes)
    for config, other, have, need in (
        (
            dataclasses.replace(SMALL, precision=Precision(fwd=FP8)),
            params,
            r"dgrad_in fp8_block \(uint8 \(4, 1, 24, 40\), float32 \(4, 1, 1, 1\)\), dgrad_out",
            "dgrad_in None, dgrad_out None",
        ),
        (
            dataclasses.replace(SMALL, precision=Precision(FP8, POW2)),
            params,
            "dgrad_in fp8_block ",
            "dgrad_in fp8_block_pow2 ",
        ),
        (
            SMALL,
            jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params) | {"router": params["router"]},
            r"of_in float32 \(4, 1, 40\), of_out float32 \(4, 1, 24\)",
            r"of_in bfloat16 \(4, 1, 40\), of_out bfloat16 \(4, 1, 24\)",
        ),
    ):
        with pytest.raises(
            InputError, match=f"codes have {have}.*, and the layer needs {need}.* for config.precision="
        ):
            latent_moe(other, x, config, codes=codes)
    assert encode_experts(params, dataclasses.replace(SMALL, precision=None)) is None
    assert encode_experts(params, dataclasses.replace(SMALL, precision=Precision())) is None
    forward = dataclasses.replace(SMALL, precision=Precision(fwd=FP8))
    with pytest.raises(InputError, match=r"experts/w_in is in fp8_block already: only dense weights are encoded"):
        encode_experts(quantize(params, SMALL, FP8), forward)
    with pytest.raises(InputError, match=r"experts/w_in is below an adapter: only dense weights are encoded"):
        encode_experts(lora.adapt(jax.random.key(1), params, SMALL, rank=2), forward)
    with pytest.raises(InputError, match=r"params have nothing at experts/w_in"):
        encode_experts(params["experts"], SMALL)
    with pytest.raises(
        InputError, match=r"w_in of shape \(2, 4, 24, 40\) and .*w_out of shape \(4, 40, 24\) must have"
    ):
        encode_experts({"experts": params["experts"] | {"w_in": jnp.ones((2, 4, 24, 40))}}, SMALL)
    with pytest.raises(InputError, match=r"experts/w_out of shape \(4, 41, 24\) must end in the shape \(4, 40, 24\)"):
        encode_experts({"experts": params["experts"] | {"w_out": jnp.ones((4, 41, 24))}}, SMALL)


def test_codes_may_be_arrays_of_numpy():
    params, x = layer_of(SMALL), jnp.ones((3, 16))
    codes = jax.tree.map(np.asarray, encode(params, SMALL))
    assert jax.eval_shape(lambda: latent_moe(params, x, SMALL, codes=codes)[0]).shape == x.shape


def test_a_step_encodes_each_weight_once():
    """Two layers under a scan, recomputed, in two microbatches: no weight is encoded within a loop."""

    def step(params, x, made_before):
        codes = encode_experts(params, SMALL) if made_before else None

        @jax.checkpoint
        def layer(x, params_and_codes):
            params, codes = params_and_codes
            return x + latent_moe(params, x, SMALL, codes=codes)[0], None

        def loss(params, x):
            return jnp.sum(jax.lax.scan(layer, x, (params, codes))[0].astype(jnp.float32))

        def microbatch(total, x):
            return jax.tree.map(jnp.add, total, jax.grad(loss)(params, x)), None

        return jax.lax.scan(microbatch, jax.tree.map(jnp.zeros_like, params), x)[0]

    params = jax.eval_shape(jax.vmap(lambda key: init_params(key, SMALL)), jax.random.split(jax.random.key(0), 2))
    x = jax.ShapeDtypeStruct((2, 5, 16), jnp.bfloat16)
    found = {}
    for made_before in (True, False):
        program = jax.make_jaxpr(step, static_argnums=2)(params, x, made_before).jaxpr
        weights = [(shape, looped) for shape, looped in e4m3_arrays(program) if len(shape) > 2]
        found[made_before] = sum(looped for _, looped in weights), sum(not looped for _, looped in weights)
    assert found[True] == (0, 2)
    assert found[False][0] >= 4
    assert found[False][1] == 0


def test_an_optimiser_step_that_donates_trains(rng):
    """Codes are not state: params and optimiser state are donated, and the next step encodes its own params."""
    params, x = layer_of(SMALL), rng.normal(size=(20, 16)).astype(np.float32)
    optimiser = optax.adam(1e-2)

    def step(params, opt_state, x):
        codes = encode_experts(params, SMALL)

        def loss(params):
            return jnp.mean(jnp.square(latent_moe(params, x, SMALL, codes=codes)[0].astype(jnp.float32) - x))

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimiser.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    run, opt_state, losses = jax.jit(step, donate_argnums=(0, 1)), optimiser.init(params), []
    for _ in range(60):
        params, opt_state, loss = run(params, opt_state, x)
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]


def test_linen_layers_read_the_collection(rng):
    """Stacked and recomputed layers, with boxes."""
    x = jnp.bfloat16(rng.normal(size=(2, 5, 16)))

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + jax_latent_moe.linen.LatentMoE(SMALL, name="moe")(x), None

    collections = {"params": 0, jax_latent_moe.linen.EXPERT_CODES: 0}
    blocks = nn.scan(
        nn.remat(Block, prevent_cse=False),
        variable_axes=collections,
        split_rngs={"params": True},
        length=2,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )()
    variables = blocks.init(jax.random.key(0), x, None)
    coded = jax.jit(lambda variables: jax_latent_moe.linen.encode_experts(variables, SMALL))(variables)
    assert sorted(coded) == ["expert_codes", "params"]
    assert coded["expert_codes"]["moe"]["experts"].fwd_in.codes.shape == (2, 4, 1, 40, 24)

    @jax.jit
    def run(variables):
        rest = {name: leaves for name, leaves in variables.items() if name != "params"}
        return jax.grad(lambda params: jnp.sum(blocks.apply(rest | {"params": params}, x, None)[0]))(
            variables["params"]
        )

    for one, other in zip(jax.tree.leaves(run(variables)), jax.tree.leaves(run(coded)), strict=True):
        np.testing.assert_array_equal(one, other)
    # The values come from the codes of the collection: those of other weights give NaN.
    params = jax.tree.map(lambda leaf: 2 * leaf, variables["params"])
    assert np.isnan(np.float32(blocks.apply(coded | {"params": params}, x, None)[0])).all()
    dense = dataclasses.replace(SMALL, precision=None)
    assert jax_latent_moe.linen.encode_experts(variables, dense).keys() == variables.keys()
    with pytest.raises(InputError, match=r"variables with the collections moe have no experts: .*model.init"):
        jax_latent_moe.linen.encode_experts(variables["params"], SMALL)


def test_nnx_layers_read_the_codes_of_a_step(rng):
    """The model that the optimiser updates has no codes, before the step and after it."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=2)
            @nnx.vmap
            def make(rngs):
                return jax_latent_moe.nnx.LatentMoE(SMALL, rngs=rngs, axis_names=None)

            self.layers = make(rngs)

        def __call__(self, x):
            @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            @nnx.remat
            def apply(layer, x):
                return x + layer(x)

            return apply(self.layers, x)

    model, x = Model(nnx.Rngs(0)), jnp.bfloat16(rng.normal(size=(5, 16)))
    optimiser = nnx.Optimizer(model, optax.sgd(1e-2), wrt=nnx.Param)
    before = jax.tree.structure(nnx.state(model))

    def loss(model):
        return jnp.sum(model(x).astype(jnp.float32))

    @nnx.jit
    def step(model, optimiser):
        coded = jax_latent_moe.nnx.encode_experts(model)
        made = nnx.state(coded, jax_latent_moe.nnx.ExpertCodes)
        grads, wanted = nnx.grad(loss)(coded), nnx.grad(loss)(model)
        optimiser.update(model, grads)
        return grads, wanted, made, loss(coded)

    grads, wanted, made, stale = step(model, optimiser)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(one, other)
    assert made["layers"]["expert_codes"].get_value().dgrad_out.codes.shape == (2, 4, 1, 40, 24)
    assert np.isnan(stale), "the codes are not those of the weights that the optimiser has updated"
    assert jax.tree.structure(nnx.state(model)) == before
