"""The sequence loss by documents of packed sequences, and the global loss over microbatches, against the oracle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import InputError, RouterConfig, init_params, latent_moe
from jax_latent_moe.config import SCORE_FUNCTIONS
from jax_latent_moe.inputs import small_ids
from jax_latent_moe.routing.losses import auxiliary_losses, document_numbers
from tests import cases, layers
from tests.cases import TOY
from tests.oracle import losses as oracle_losses
from tests.tolerances import assert_close

PACKED = RouterConfig(sequence_loss_coef=1.0, switch_loss_coef=0.5)
GLOBAL = RouterConfig(global_loss_coef=1.0)


def layer(router, experts=8, top_k=3):
    return dataclasses.replace(TOY, num_experts=experts, top_k=top_k, router=router)


def drawn_logits(rng, shape, experts=8):
    """Distinct multiples of 1/4 in each row: no ties, and no choice that rounding could change."""
    values = np.broadcast_to(np.arange(experts) / 4.0, (*shape, experts))
    return rng.permuted(values, axis=-1).astype(np.float32)


def losses_of(config, logits, mask=None, **optional):
    """The library's losses, counts and the gradient of the sum of the losses."""

    @jax.jit
    def run(logits, mask, optional):
        def total(logits):
            losses, counts = auxiliary_losses(logits, config.router, config.top_k, mask, **optional)
            return sum(losses.values()), (losses, counts)

        return jax.value_and_grad(total, has_aux=True)(logits)

    (_, (losses, counts)), gradient = run(logits, mask, optional)
    return losses, counts, gradient


def check(config, logits, mask, segment_ids=None, global_counts=None):
    given = {"segment_ids": segment_ids, "global_counts": global_counts}
    found, counts, gradient = losses_of(config, logits, mask, **{k: v for k, v in given.items() if v is not None})
    values, gradients, _, wanted_counts = oracle_losses.losses(
        config, np.float64(logits), mask, segment_ids, global_counts
    )
    assert set(found) == set(values)
    for name, value in values.items():
        assert_close(found[name], value, "float32", name)
    np.testing.assert_allclose(gradient, sum(gradients.values()), rtol=1e-5, atol=1e-7)
    if counts is not None:
        np.testing.assert_array_equal(counts, wanted_counts)


DTYPES = ("uint8", "int8", "int32", "uint32")


@pytest.mark.parametrize(("function", "dtype"), list(zip(SCORE_FUNCTIONS, DTYPES, strict=True)))
def test_documents_in_any_order_of_any_integer_type(rng, function, dtype):
    """Ids need not be sorted, contiguous or small; some documents are wholly masked."""
    limits = np.iinfo(dtype)
    ids = rng.choice([limits.min, limits.max, 1, 2], size=(2, 9)).astype(dtype)
    mask = (rng.random((2, 9)) < 0.8) & (ids != 2)
    router = dataclasses.replace(PACKED, score_function=function)
    check(layer(router), drawn_logits(rng, (2, 9)), mask, segment_ids=ids)


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_ids_of_64_bits_are_read_whole(dtype):
    """JAX would cut them to 32 bits, and documents whose ids differ by 2^32 would be one."""
    small = np.array([[0, 1, 1, 0, 2, 2]] * 2, dtype)
    wide = small << np.array(32, dtype)
    np.testing.assert_array_equal(document_numbers(small_ids(wide)), document_numbers(small))
    assert small_ids(small) is small
    config, x = layer(PACKED), np.asarray(jax.random.normal(jax.random.key(1), (2, 6, 12)))
    params = init_params(jax.random.key(0), config)

    @jax.jit
    def losses():
        return [latent_moe(params, x, config, segment_ids=ids)[1].losses["sequence"] for ids in (small, wide)]

    wanted, found = losses()
    assert found == wanted


@pytest.mark.parametrize("masked", [False, True])
def test_one_document_a_sequence_is_the_sequence_loss(rng, masked):
    logits, mask = drawn_logits(rng, (3, 5)), np.ones((3, 5), bool)
    mask[1] = not masked
    ids = np.array([[7] * 5, [7] * 5, [0] * 5])
    packed, _, gradient = losses_of(layer(PACKED), logits, mask, segment_ids=ids)
    plain, _, plain_gradient = losses_of(layer(PACKED), logits, mask)
    assert_close(packed["sequence"], plain["sequence"], "float32")
    assert_close(gradient, plain_gradient, "float32")


def test_documents_apart_or_packed_have_the_same_loss(rng):
    """Three documents in one sequence, and the same three as padded sequences."""
    lengths, logits = (2, 5, 1), drawn_logits(rng, (1, 8))
    apart, mask = np.zeros((3, 5, 8), np.float32), np.zeros((3, 5), bool)
    for row, (start, length) in enumerate(zip((0, 2, 7), lengths, strict=True)):
        apart[row, :length], mask[row, :length] = logits[0, start : start + length], True
    ids = np.repeat(np.arange(3), lengths)[None]
    packed = losses_of(layer(PACKED), logits, segment_ids=ids)[0]["sequence"]
    assert_close(packed, losses_of(layer(PACKED), apart, mask)[0]["sequence"], "float32")


def test_all_tokens_masked(rng):
    logits, mask = drawn_logits(rng, (2, 3)), np.zeros((2, 3), bool)
    losses, counts, gradient = losses_of(
        layer(dataclasses.replace(PACKED, global_loss_coef=1.0)), logits, mask, segment_ids=np.zeros((2, 3), int)
    )
    assert not any(map(float, losses.values()))
    assert not counts.any()
    assert not gradient.any()


def test_numbers_of_documents():
    numbers = np.asarray(document_numbers(jnp.array([[5, 5, -1, 5, 9], [0, 0, 0, 0, 0]])))
    np.testing.assert_array_equal(numbers, [[1, 1, 0, 1, 2], [0, 0, 0, 0, 0]])


@pytest.mark.parametrize("function", SCORE_FUNCTIONS)
def test_global_loss_counts_the_microbatches_before(rng, function):
    router = dataclasses.replace(GLOBAL, score_function=function, switch_loss_coef=0.5)
    mask = rng.random((2, 6)) < 0.7
    check(layer(router), drawn_logits(rng, (2, 6)), mask, global_counts=rng.integers(0, 50, 8))
    check(layer(router), drawn_logits(rng, (2, 6)), np.ones((2, 6), bool))


def test_global_loss_over_equal_microbatches_is_megatrons(rng):
    """Megatron: E / (k T^2) * sum_e mean_of_microbatches(n_e) * sum_t P[t, e]."""
    config = layer(dataclasses.replace(GLOBAL, score_function="softmax"))
    counts, so_far = None, np.zeros(8)
    for step in range(1, 4):
        logits = drawn_logits(rng, (1, 6))
        optional = {} if counts is None else {"global_counts": counts}
        losses, counts, _ = losses_of(config, logits, **optional)
        probabilities = np.exp(np.float64(logits[0])) / np.exp(np.float64(logits[0])).sum(axis=1, keepdims=True)
        for row in probabilities:
            so_far[np.argsort(-row)[:3]] += 1
        expected = 8 / (3 * 6**2) * np.sum(so_far / step * probabilities.sum(axis=0))
        assert_close(losses["global"], expected, "float32")
    np.testing.assert_array_equal(counts, so_far)


def test_global_loss_of_one_batch_is_the_switch_loss(rng):
    both = layer(dataclasses.replace(GLOBAL, switch_loss_coef=1.0))
    losses, _, _ = losses_of(both, drawn_logits(rng, (2, 5)), rng.random((2, 5)) < 0.8)
    assert_close(losses["global"], losses["switch"], "float32")


def test_the_layer_passes_both_on(rng):
    """Leading axes of two batches, l != d, masked padding of NaN."""
    router = dataclasses.replace(PACKED, global_loss_coef=0.3, z_loss_coef=0.1)
    case = cases.random_inputs(rng, layer(router), (2, 2, 4), masked=True)
    case = case._replace(segment_ids=rng.integers(2, size=(2, 2, 4)), global_counts=np.arange(8))
    padded = np.where(case.token_mask[..., None], case.x, np.nan)
    layers.check_against_oracle(case)
    (y, aux), *_ = layers.run(case._replace(x=padded))
    (clean, expected), *_ = layers.run(case)
    np.testing.assert_array_equal(y, clean)
    assert aux.losses == expected.losses


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"segment_ids": np.zeros((2, 4), int)}, r"segment_ids of shape \(2, 4\).* must be integers of shape \(2, 3\)"),
        ({"segment_ids": np.zeros((2, 3))}, "segment_ids .* dtype float64 must be integers"),
        ({"segment_ids": "ab"}, "segment_ids"),
        ({"global_counts": np.zeros(8, int)}, "global_counts has no effect without router.global_loss_coef"),
    ],
)
def test_what_does_not_fit_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        latent_moe(init_params(jax.random.key(0), TOY), jnp.zeros((2, 3, 12)), TOY, **given)


def test_counts_of_another_shape_are_refused():
    config = layer(GLOBAL)
    with pytest.raises(InputError, match=r"global_counts of shape \(7,\)"):
        latent_moe(init_params(jax.random.key(0), config), jnp.zeros((2, 12)), config, global_counts=np.zeros(7, int))
