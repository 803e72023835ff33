"""Low-rank adapters: gradients by the chain rule from the oracle's, merged weights, and every place of a tree."""

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
    hf,
    latent_moe,
    lora,
    merge_state,
    quantize,
    split_state,
    trainable_mask,
)
from jax_latent_moe.low_rank import LowRank
from tests import oracle
from tests.flax_layers import draw
from tests.programs import floating_arrays
from tests.test_quantization import GATED, PLAIN, same_trees
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")

RANK, ALPHA = 3, 6.0
SCALE = ALPHA / RANK
BASES = {"dense": dataclasses.replace(PLAIN, expert_bias=True), "mxfp4": GATED}
every_base = pytest.mark.parametrize("base", BASES)


@functools.cache
def adapted(base):
    """Parameters with adapters on all targets, whose b is not 0; the router keeps expert 5 without tokens."""
    config = BASES[base]
    params = draw(np.random.default_rng(3), config)
    params["router"]["bias"] = params["router"]["bias"].at[5].set(-100.0)
    params = params if base == "dense" else quantize(params, config, base)
    params = lora.adapt(jax.random.key(1), params, config, rank=RANK, alpha=ALPHA)
    keys = iter(jax.random.split(jax.random.key(2), 4))

    def with_b(leaf):
        if not isinstance(leaf, LowRank):
            return leaf
        return dataclasses.replace(leaf, b=0.2 * jax.random.normal(next(keys), leaf.b.shape))

    return jax.tree.map(with_b, params, is_leaf=lambda node: not isinstance(node, dict))


def value(adapters, rest, x, dy, config):
    y, aux = latent_moe(merge_state(adapters, rest), x, config)
    return jnp.sum(y * dy), (y, aux)


@every_base
def test_values_and_gradients(base, rng):
    """Those of the merged weights; d a = scale * dW b^T and d b = scale * a^T dW. An idle expert gets exact zeros."""
    config, params = BASES[base], adapted(base)
    x, dy = (jnp.asarray(rng.normal(size=(2, 5, 12)), jnp.float32) for _ in range(2))
    adapters, rest = lora.split(params)
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(adapters))
    run = jax.jit(jax.value_and_grad(value, (0, 2), has_aux=True), static_argnums=4)
    (_, (y, aux)), (grads, dx) = run(adapters, rest, x, dy, config)
    merged = jax.tree.map(np.float64, lora.merge(params, config))
    expected = oracle.forward(merged, np.float64(x), config)
    assert aux.tokens_per_expert[5] == 0
    wanted, wanted_x = oracle.backward(merged, config, expected, np.float64(dy))
    assert_close(y, expected.y, "float32")
    assert_close(dx, wanted_x, "float32")
    for part, leaves in adapters.items():
        for name, leaf in leaves.items():
            a, dw = np.float64(leaf.a), wanted[part][name]
            b = np.float64(leaf.b).reshape(*leaf.b.shape[: a.ndim - 1], -1)
            dw = dw.reshape(*a.shape[:-1], -1)
            assert_close(grads[part][name].a, SCALE * dw @ b.swapaxes(-1, -2), "float32", f"{part}/{name} a")
            db = np.asarray(grads[part][name].b).reshape(b.shape)
            assert_close(db, SCALE * a.swapaxes(-1, -2) @ dw, "float32", f"{part}/{name} b")
    for leaf in jax.tree.leaves(grads["experts"]):
        assert not np.asarray(leaf)[5].any()


@pytest.mark.parametrize("target", ["experts/w_in", "experts/w_out"])
def test_weights_without_an_adapter_train_beside_one(target, rng):
    """The other weights, the biases and the router get the gradients of the merged layer."""
    config, (part, name) = BASES["dense"], target.split("/")
    params = lora.merge(adapted("dense"), config)
    params = lora.adapt(jax.random.key(1), params, config, rank=RANK, alpha=ALPHA, targets=[target])
    leaf = params[part][name]
    b = 0.2 * jax.random.normal(jax.random.key(2), leaf.b.shape)
    params[part][name] = dataclasses.replace(leaf, b=b)
    x, dy = (jnp.asarray(rng.normal(size=(2, 5, 12)), jnp.float32) for _ in range(2))
    trained, rest = split_state(params)
    grads, _ = jax.grad(value, has_aux=True)(trained, rest, x, dy, config)
    merged = jax.tree.map(np.float64, lora.merge(params, config))
    expected = oracle.forward(merged, np.float64(x), config)
    wanted, _ = oracle.backward(merged, config, expected, np.float64(dy))
    others = [(part, name) for part in ("experts", "router") for name in grads[part] if f"{part}/{name}" != target]
    assert {name for _, name in others} > {"b_in", "b_out", "kernel"}
    for part, name in others:
        assert_close(grads[part][name], wanted[part][name], "float32")


def test_bias_gradients_are_summed_in_float32(rng):
    """An expert has about 1500 rows. Sums in bfloat16 would be wrong by 4 %."""
    config, params = dataclasses.replace(BASES["dense"], dtype="bfloat16"), adapted("dense")
    x, dy = (jnp.asarray(rng.normal(size=(2048, 12)), jnp.bfloat16) for _ in range(2))
    trained, rest = split_state(params)
    run = jax.jit(jax.grad(value, has_aux=True), static_argnums=4)
    grads, _ = run(trained, rest, x, dy, config)
    wide = jnp.float32(x), jnp.float32(dy), BASES["dense"]
    wanted, _ = run(trained, rest, *wide)
    for name in ("b_in", "b_out"):
        assert_close(grads["experts"][name], np.float64(wanted["experts"][name]), "bfloat16", name)


@every_base
def test_merged_weights_are_base_and_product(base):
    """In float32, against float64, and the adapters' first values change nothing."""
    config, params = BASES[base], adapted(base)
    for part, leaves in lora.merge(params, config).items():
        for name, weight in leaves.items():
            given = params[part][name]
            if not isinstance(given, LowRank):
                assert weight is given
                continue
            dense = given.base if base == "dense" or part != "experts" else given.base.decode("float32")
            product = np.float64(given.a) @ np.float64(given.b).reshape(*given.b.shape[: given.a.ndim - 1], -1)
            exact = np.float64(dense).reshape(weight.shape) + SCALE * product.reshape(weight.shape)
            np.testing.assert_allclose(weight, exact, rtol=0, atol=2e-6 * np.abs(exact).max())
    fresh = lora.adapt(jax.random.key(4), draw(np.random.default_rng(0), config), config, rank=2)
    same_trees(lora.merge(fresh, config), draw(np.random.default_rng(0), config))


def test_only_the_chosen_targets_and_refusals():
    params = draw(np.random.default_rng(0), PLAIN)
    some = lora.adapt(jax.random.key(0), params, PLAIN, rank=2, targets=["experts/w_out"])
    assert [isinstance(leaf, LowRank) for leaf in some["experts"].values()] == [False, True]
    assert some["up_proj"]["kernel"] is params["up_proj"]["kernel"]
    with pytest.raises(InputError, match="targets name 'router/kernel', which is not one of 'experts/w_in'"):
        lora.adapt(jax.random.key(0), params, PLAIN, rank=2, targets=["router/kernel"])
    with pytest.raises(InputError, match=r"experts/w_out have an adapter already: lora.merge\(params, config\) first"):
        lora.adapt(jax.random.key(0), some, PLAIN, rank=2)
    for targets in ("experts/w_in", []):
        with pytest.raises(InputError, match="must be a sequence"):
            lora.adapt(jax.random.key(0), params, PLAIN, rank=2, targets=targets)
    with pytest.raises(ConfigError, match="rank=0 must be"):
        lora.adapt(jax.random.key(0), params, PLAIN, rank=0)
    with pytest.raises(InputError, match=r"experts/w_out has a low-rank adapter: lora\.merge"):
        quantize(some, PLAIN, "int8")
    adapters, _ = lora.split(some)
    leaf = some["experts"]["w_out"]

    def check(match, part="experts", name="w_out", **changes):
        broken = some | {part: some[part] | {name: dataclasses.replace(leaf, **changes)}}
        with pytest.raises(InputError, match=match):
            latent_moe(broken, jnp.ones((2, 12)), PLAIN)

    check("router/kernel cannot have an adapter", part="router", name="kernel")
    check(r"has no base: merge_state\(adapters, rest\)", base=None)
    check(
        r"has a of shape \(12, 9, 2\) and dtype float32, which must be floating of shape \(12, 64, 2\)", a=leaf.a[:, :9]
    )
    check(r"has b of shape \(12, 2, 32\) and dtype int32", b=leaf.b.astype(jnp.int32))
    assert set(adapters) == {"experts"}


def test_writing_adapters_is_refused(tmp_path):
    with pytest.raises(hf.CheckpointError, match=r"has a low-rank adapter, .*lora.merge\(params, config\)"):
        hf.write_layers(tmp_path / "out", [(0, adapted("dense"))], {0: BASES["dense"]}, hf.MEGATRON)


def test_split_state_and_mask():
    """`split_state` trains adapters and the weights that have none; bases and codes are state."""
    params = adapted("mxfp4")
    trainable, state = split_state(params)
    same_trees(merge_state(trainable, state), params)
    assert trainable["experts"]["w_in"].base is None
    assert "kernel" in trainable["router"]
    mask = trainable_mask(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    leaf = mask["experts"]["w_in"]
    assert leaf.a is leaf.b is True
    assert not any(jax.tree.leaves(leaf.base))


def test_a_step_has_no_array_of_the_weights_shape():
    """With a quantised base, neither a dense weight nor its gradient exists in a step."""
    config = dataclasses.replace(GATED, num_experts=1000)
    shapes = jax_latent_moe.param_shapes(config)
    params = jax.eval_shape(
        lambda params: lora.adapt(jax.random.key(0), quantize(params, config, "mxfp4"), config, rank=2), shapes
    )
    x = jax.ShapeDtypeStruct((2, 5, 12), jnp.float32)
    program = jax.make_jaxpr(jax.grad(value, has_aux=True), static_argnums=4)(*lora.split(params), x, x, config)
    assert max(np.prod(shape) for shape in floating_arrays(program)) < 1000 * 32 * 64


def test_flax_modules_and_orbax(rng, tmp_path):
    params = adapted("mxfp4")
    x = jnp.asarray(rng.normal(size=(2, 5, 12)), jnp.float32)
    wanted = jax.jit(latent_moe, static_argnums=2)(params, x, GATED)[0]
    layer, variables = jax_latent_moe.linen.LatentMoE(GATED), jax_latent_moe.linen.from_params(params, GATED)
    same_trees(jax_latent_moe.linen.to_params(variables), params)
    b = variables["adapters"]["experts"]["w_in"].b
    assert b.names == ("expert", None, None, "expert_intermediate")
    apply = jax.jit(functools.partial(layer.apply, mutable=["losses", "intermediates"]))
    np.testing.assert_array_equal(apply(variables, x)[0], wanted)
    module = jax_latent_moe.nnx.from_params(params, GATED)
    same_trees(jax_latent_moe.nnx.to_params(module), params)
    np.testing.assert_array_equal(nnx.jit(lambda module, x: module(x))(module, x), wanted)
    assert len(jax.tree.leaves(nnx.state(module, jax_latent_moe.nnx.Adapter))) == 8
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", lora.split(params)[0])
        checkpointer.wait_until_finished()
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), lora.split(params)[0])
        restored = checkpointer.restore(tmp_path / "saved", shapes)
    same_trees(merge_state(restored, lora.split(params)[1]), params)
