"""Arrays that do not fit are refused in one clear sentence: the value, the rule, the way out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import (
    InputError,
    RouterConfig,
    after_step,
    dequantize,
    encode_experts,
    init_params,
    latent_moe,
    lora,
    merge_state,
    param_shapes,
    quantize,
    ragged_dot,
    split_state,
    update_correction_bias,
)
from jax_latent_moe.grouped_matmul import GatheredRows, grouped_matmul, grouped_wgrad
from tests.cases import TOY

X = np.ones((2, 5, TOY.hidden_size), np.float32)
ROWS, W, SIZES = np.ones((6, 4), np.float32), np.ones((3, 4, 5), np.float32), np.array([1, 2, 3], np.int32)


@functools.cache
def params():
    return init_params(jax.random.key(0), TOY)


def refused(call, *arguments, **named) -> str:
    with pytest.raises(InputError) as info:
        call(*arguments, **named)
    message = str(info.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("x", "named", "words"),
    [
        (X[..., :5], {}, ["x of shape (2, 5, 5)", "hidden_size=12"]),
        (np.float32(1.0), {}, ["x of shape ()", "hidden_size=12"]),
        (X.astype(np.int32), {}, ["x of dtype int32", "floating"]),
        (X, {"token_mask": np.ones((2, 4), bool)}, ["token_mask of shape (2, 4)", "(2, 5)"]),
        (X, {"token_mask": np.ones((2, 5), np.float32)}, ["token_mask", "float32", "bool"]),
        (X, {"expert_ids": np.zeros((2, 5, 2), np.int32)}, ["expert_ids of shape (2, 5, 2)", "(2, 5, 3)"]),
        (X, {"expert_ids": np.zeros((2, 5, 3), np.float32)}, ["expert_ids", "float32", "integers"]),
        (X, {"expert_ids": np.full((2, 5, 3), 8)}, ["expert_ids between 8 and 8", "num_experts=8"]),
        (X, {"expert_ids": np.full((2, 5, 3), -3)}, ["expert_ids between -3 and -3", "-1", "-2"]),
    ],
)
def test_bad_arguments_of_the_layer(x, named, words):
    message = refused(latent_moe, params(), x, TOY, **named)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("arguments", "named", "words"),
    [
        ((None, X, TOY), {}, ["params must be a dict of dicts"]),
        (([1], X, TOY), {}, ["params must be a dict of dicts"]),
        (("router", X, None), {}, ["config of type NoneType must be a LatentMoEConfig"]),
        (("router", None, TOY), {}, ["x=None must be an array"]),
        (("router", [[1.0] * 12, [2.0]], TOY), {}, ["x of type list must be an array of numbers"]),
        (("router", "text", TOY), {}, ["x of shape ()"]),
        (("router", [["a"] * 12], TOY), {}, ["x of dtype <U1 must be floating"]),
        (("router", X, TOY), {"token_mask": [1, 0]}, ["token_mask of shape (2,)"]),
        (("router", X, TOY), {"expert_ids": np.full((2, 5, 3), 2**32 + 3)}, ["expert_ids between 4294967299"]),
    ],
)
def test_what_is_no_array_is_refused_by_name(arguments, named, words):
    tree = params() if arguments[0] == "router" else arguments[0]
    message = refused(latent_moe, tree, *arguments[1:], **named)
    assert all(word in message for word in words), message


def test_what_is_no_config_is_refused_everywhere():
    tree, key = params(), jax.random.key(0)
    for function, arguments in (
        (init_params, (key, None)),
        (param_shapes, ({},)),
        (quantize, (tree, None, "int8")),
        (dequantize, (tree, 3)),
        (encode_experts, (tree, None)),
        (lora.merge, (tree, None)),
        (functools.partial(lora.adapt, rank=2), (key, tree, None)),
    ):
        assert "must be a LatentMoEConfig" in refused(function, *arguments)


@pytest.mark.parametrize("aux", [None, 1, np.zeros(7, np.int32), [np.zeros((3, 1), np.int32)]])
def test_counts_of_another_layer_are_refused(aux):
    _, state = split_state({"block": params()})
    assert "aux of block has counts of type" in refused(after_step, state, {"block": aux}, 0.1)


def test_what_numpy_takes_is_taken():
    """Lists, and a tree of NumPy arrays that a compiled function closes over."""
    config = dataclasses.replace(TOY, router=RouterConfig(per_expert_scale=True))
    jaxs = init_params(jax.random.key(0), config)
    numpys = jax.tree.map(np.asarray, jaxs)
    mask, ids = np.arange(10).reshape(2, 5) < 7, np.arange(30).reshape(2, 5, 3) % 8
    expected, _ = jax.jit(latent_moe, static_argnums=2)(jaxs, X, config, token_mask=mask, expert_ids=ids)
    closed, _ = jax.jit(lambda x: latent_moe(numpys, x, config, token_mask=mask, expert_ids=ids))(X)
    listed, _ = latent_moe(
        {part: {name: leaf.tolist() for name, leaf in leaves.items()} for part, leaves in numpys.items()},
        X.tolist(), config, token_mask=mask.tolist(), expert_ids=ids.tolist(),
    )  # fmt: skip
    np.testing.assert_array_equal(closed, expected)
    np.testing.assert_allclose(listed, expected, rtol=1e-5)


def without(part, name=None):
    tree = {key: dict(leaves) for key, leaves in params().items()}
    tree.pop(part) if name is None else tree[part].pop(name)
    return tree


def with_leaf(part, name, value):
    return params() | {part: params().get(part, {}) | {name: value}}


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: without("up_proj"), ["missing up_proj/kernel", "init_params"]),
        (lambda: without("router", "bias"), ["missing router/bias"]),
        (lambda: with_leaf("latent_norm", "scale", jnp.ones(6)), ["not used: latent_norm/scale"]),
        (lambda: with_leaf("down_proj", "kernel", jnp.ones((6, 12))), ["down_proj/kernel", "(6, 12)", "(12, 6)"]),
        (lambda: with_leaf("experts", "w_in", jnp.ones((8, 6, 2, 5))), ["experts/w_in", "(8, 6, 2, 5)", "(8, 6, 5)"]),
        (lambda: with_leaf("up_proj", "kernel", None), ["up_proj/kernel=None"]),
        (lambda: with_leaf("up_proj", "kernel", jnp.ones((6, 12), int)), ["up_proj/kernel", "int32", "floating"]),
        (lambda: with_leaf("router", "bias", jnp.ones(8, jnp.bfloat16)), ["router/bias", "bfloat16", "float32"]),
    ],
)
def test_bad_parameters(build, words):
    message = refused(latent_moe, build(), X, TOY)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((ROWS[0], W, SIZES), ["rows of shape (4,)", "two axes"]),
        ((ROWS, W[0], SIZES), ["w of shape (4, 5)", "(6, 4)"]),
        ((ROWS, W.swapaxes(1, 2), SIZES), ["w of shape (3, 5, 4)", "(6, 4)"]),
        ((ROWS.astype(int), W, SIZES), ["rows of dtype int", "floating"]),
        ((ROWS, W.astype(np.float16), SIZES), ["rows of dtype float32", "w of dtype float16", "the same dtype"]),
        ((ROWS, W, SIZES[:2]), ["group_sizes of shape (2,)", "[3]"]),
        ((ROWS, W, SIZES[None]), ["group_sizes of shape (1, 3)"]),
        ((ROWS, W, SIZES.astype(np.float32)), ["group_sizes of dtype float32", "integers"]),
        ((ROWS, W, np.array([3, -1, 2])), ["group_sizes[1]=-1", "negative"]),
        ((ROWS, W, np.array([3, 3, 1])), ["add up to 7", "6 rows"]),
    ],
)
def test_bad_arguments_of_grouped_matmul(arguments, words):
    message = refused(grouped_matmul, *arguments)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((ROWS, ROWS[:5], SIZES), ["(6, 4)", "(5, 4)", "equal numbers of rows"]),
        ((ROWS, ROWS[0], SIZES), ["dout of shape (4,)", "two axes"]),
        ((ROWS, ROWS.astype(np.float16), SIZES), ["float32", "float16"]),
        ((ROWS, ROWS, np.array([-5, 5, 1])), ["group_sizes[0]=-5", "negative"]),
        ((ROWS, ROWS, SIZES[None]), ["group_sizes of shape (1, 3)"]),
    ],
)
def test_bad_arguments_of_grouped_wgrad(arguments, words):
    message = refused(grouped_wgrad, *arguments)
    assert all(word in message for word in words), message


def test_shapes_are_refused_under_jit_too():
    layer = jax.jit(functools.partial(latent_moe, config=TOY))
    refused(layer, params(), X[..., :5])
    refused(layer, params(), X, expert_ids=np.zeros((2, 5, 4), np.int32))
    refused(jax.jit(grouped_matmul), ROWS, W, SIZES[:2])


def test_a_parameter_tree_of_another_config_names_the_difference():
    other = dataclasses.replace(TOY, expert_intermediate_size=4)
    message = refused(latent_moe, init_params(jax.random.key(0), other), X, TOY)
    assert "experts/w_in of shape (8, 6, 4) must be of shape (8, 6, 5)" in message


NO_ARRAYS = {"none": None, "text": "a", "dict": {}, "ragged": [[1.0], [1.0, 2.0]], "objects": np.array([object()])}


@pytest.mark.parametrize("value", NO_ARRAYS.values(), ids=NO_ARRAYS)
def test_operands_that_are_no_arrays_are_refused_by_name(value):
    ids = np.arange(6)
    for name, call in {
        "lhs": lambda: ragged_dot(value, W, SIZES),
        "rhs": lambda: ragged_dot(ROWS, value, SIZES),
        "rows": lambda: grouped_matmul(value, W, SIZES),
        "w": lambda: grouped_matmul(ROWS, value, SIZES),
        "group_sizes": lambda: grouped_matmul(ROWS, W, value),
        "dout": lambda: grouped_wgrad(ROWS, value, SIZES),
        "table": lambda: grouped_matmul(GatheredRows(value, ids, None), W, SIZES),
        "row_ids": lambda: grouped_matmul(GatheredRows(ROWS, value, None), W, SIZES),
        "bias": lambda: update_correction_bias(value, SIZES, 0.1),
        "tokens_per_expert": lambda: update_correction_bias(np.zeros(3, np.float32), value, 0.1),
        "rate": lambda: after_step(split_state(params())[1], np.arange(8), value),
    }.items():
        assert refused(call) == f"{name} of type {type(value).__name__} must be an array of numbers."


def test_integers_that_int32_cannot_hold_are_refused_where_their_values_count():
    """JAX would cut 2^32 + 1 to 1."""
    wide = np.array([2**32 + 1, 2, 3])
    assert "group_sizes add up to 4294967302, more than the 6 rows" in refused(grouped_matmul, ROWS, W, wide)
    assert "add up to 18446744073709551616" in refused(grouped_matmul, ROWS, W, np.array([2**63, 2**63, 0], np.uint64))
    assert "row_ids between 2 and" in refused(grouped_matmul, GatheredRows(ROWS, np.tile(wide, 2), None), W, SIZES)
    assert "must fit into int32" in refused(update_correction_bias, np.zeros(3, np.float32), wide, 0.1)
    state = split_state(params())[1]
    assert "must fit into int32" in refused(after_step, state, [np.full(8, 2**32)], 0.1)
    config = dataclasses.replace(TOY, router=RouterConfig(global_loss_coef=1.0))
    message = refused(latent_moe, params(), X, config, global_counts=np.full(8, 2**32 + 1))
    assert "global_counts between 4294967297 and 4294967297 must fit into int32" in message


@pytest.mark.parametrize("key", [None, 0, "a", np.ones(2), jax.random.split(jax.random.key(0), 2)], ids=repr)
def test_what_is_no_key_is_refused(key):
    assert "must be a single key, as jax.random.key(seed) makes it" in refused(init_params, key, TOY)
    assert "must be a single key" in refused(lora.adapt, key, params(), TOY, rank=2)


def test_an_old_key_draws_what_a_typed_one_does():
    old = init_params(jax.random.PRNGKey(0), TOY)
    jax.tree.map(np.testing.assert_array_equal, old, params())


def test_trees_of_two_models_are_not_merged():
    trainable, state = split_state(params())
    for other in (None, 3, [state]):
        assert "give the two trees that split_state returned" in refused(merge_state, trainable, other)
    assert "give the two trees that split_state returned" in refused(merge_state, params(), state)
    assert "aux of the layer is empty" in refused(after_step, state, [], 0.1)
