"""Random layers on adversarial inputs against the float64 oracle: no NaN, no wrong value, no exception.

Padding of NaN and huge numbers, replay of every integer type, capacities, tokens rounded to tiles, exact ties, factors
of zero, scores that underflow, documents, counts of earlier microbatches, jitter, experts' products in FP8 (forward,
input gradients or both; either block format; no matrix has more than one block). `JAX_LATENT_MOE_FUZZ` is the number of
cases.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import latent_moe, total_loss
from tests import cases, oracle, seeds
from tests.layers import dense
from tests.random_configs import random_config, random_precision
from tests.tolerances import RELATIVE, ROUNDOFF

CASES = int(os.environ.get("JAX_LATENT_MOE_FUZZ", "10000"))
CASES_PER_LAYER = 1000
"""A program is compiled once per layer, which takes as long as about that many cases."""

ROUNDINGS = 16 * ROUNDOFF["float32"]
POISON = np.array([np.nan, np.inf, -np.inf, 1e30, -1e20, 3e38])
ID_TYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32")
LEADING = ((4,), (2, 3), (1, 1), (3, 1))


@pytest.fixture(autouse=True)
def hurried():
    """Each program runs for a moment: compiled without costly optimisations, and dropped."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()


def program(config):
    @jax.jit
    def run(params, x, optional, dy):
        def objective(params, x):
            y, aux = latent_moe(params, x, config, **optional)
            return jnp.sum(jnp.where(optional["token_mask"][..., None], y * dy, 0)) + total_loss(aux), (y, aux)

        (_, outputs), grads = jax.value_and_grad(objective, (0, 1), has_aux=True)(params, x)
        return outputs, *grads

    return run


def dyadic(rng, shape, top):
    """Multiples of an eighth: their products and sums are exact in float32, so that ties are ties in any precision."""
    return rng.integers(-8 * top, 8 * top, size=shape, endpoint=True) / 8


def draw(rng, config, leading, id_type, packed) -> cases.Case:
    """A case in which some tokens are equal, zero or large, some factors zero, and padding is poison."""
    case = cases.draw(rng, config, leading)._replace(segment_ids=rng.integers(-2, 2, size=leading) if packed else None)
    if config.router.global_loss_coef:
        case = case._replace(global_counts=rng.integers(rng.choice([1, 9]), size=config.num_experts))
    params = {part: dict(leaves) for part, leaves in case.params.items()}
    params["router"]["kernel"] = dyadic(rng, params["router"]["kernel"].shape, 1)
    if "bias" in params["router"] and rng.random() < 0.5:
        params["router"]["bias"] = dyadic(rng, config.num_experts, 1)
    if "scale" in params["router"]:
        params["router"]["scale"] = params["router"]["scale"] * (rng.random(config.num_experts) < 0.7)
    # The slope of tanh cancels where it saturates.
    sizes = [0, 0.125, 1, 1] if config.activation == "situ_glu" else [0, 0.125, 1, 1, 1, 8, 32]
    x = dyadic(rng, case.x.shape, 1) * rng.choice(sizes, size=(*leading, 1))
    if rng.random() < 0.3:
        x = np.broadcast_to(x.reshape(-1, config.hidden_size)[0], x.shape).copy()
    mask = rng.random(leading) < rng.choice([0.0, 0.5, 0.8, 1.0])
    x = np.where(mask[..., None], x, rng.choice(POISON, size=x.shape))
    dy = np.where(mask[..., None], case.dy, rng.choice(POISON, size=x.shape))
    ids = None
    if id_type:
        limits = np.iinfo(id_type)
        ids = rng.integers(config.num_experts, size=(*leading, config.top_k))
        odd = np.clip(
            rng.choice([-2, -1, -1, config.num_experts, 127, limits.max, limits.min], ids.shape), limits.min, limits.max
        )
        ids = np.where(rng.random(ids.shape) < 0.2, odd, ids).astype(id_type)
    return case._replace(params=params, x=x, token_mask=mask, dy=dy, expert_ids=ids)


def oracle_ids(case):
    """Ids as documented: a number outside of [0, E) other than -2 means no expert."""
    if case.expert_ids is None:
        return case
    ids = case.expert_ids.astype(np.int64)
    return case._replace(expert_ids=np.where((ids >= 0) & (ids < case.config.num_experts) | (ids == -2), ids, -1))


def by_expert(routing):
    """Weights in the order of their experts. The choice is in the order of scores, some of which may be equal."""
    return np.take_along_axis(
        np.asarray(routing.weights), np.argsort(routing.expert_ids, axis=-1, stable=True), axis=-1
    )


def check(case, outputs, rng):
    """Whether the case can be compared; what every case must fulfil is asserted for every case."""
    ((y, aux), dparams, dx), case = outputs, oracle_ids(case)
    for name, leaf in jax.tree.leaves_with_path((y, aux.weights, aux.losses, aux.bias_target, dparams, dx)):
        assert np.isfinite(leaf).all(), f"{name} is not finite"
    masked = ~case.token_mask
    assert not np.asarray(y)[masked].any()
    assert not np.asarray(dx)[masked].any()
    assert (np.asarray(aux.expert_ids)[masked] == -1).all()
    expected = case.oracle()
    if expected.margin < cases.MARGIN:
        return False
    routing, wanted = (
        dense(case.config, aux.expert_ids, aux.weights),
        dense(case.config, expected.expert_ids, expected.weights),
    )
    np.testing.assert_array_equal(np.isnan(routing), np.isnan(wanted))
    np.testing.assert_array_equal(aux.tokens_per_expert, expected.tokens_per_expert)
    np.testing.assert_array_equal(aux.dropped_per_expert, expected.dropped_per_expert)
    if case.config.router.global_loss_coef:
        np.testing.assert_array_equal(aux.global_counts, expected.global_counts)
    wanted_params, wanted_x = oracle.backward(case.params, case.config, expected, case.dy)
    # The router's gradient is a difference of terms of this size: where scores saturate, their rounding is left.
    terms = np.linalg.norm(np.where(masked[..., None], 0, case.dy)) * np.linalg.norm(expected.y)
    terms += sum(expected.losses.values())
    kernel, x = case.params["router"]["kernel"], np.where(masked[..., None], 0, case.x)
    slack = {"kernel": terms * np.linalg.norm(x), "scale": terms, "logit_bias": terms, "bias": 0.0}
    # The same holds for weights that scale the input of a norm: see `cases.nudge_sums`.
    scaling = terms * max(1, np.linalg.norm(x)) if case.config.latent_norm != "none" else 0
    pairs = [
        (y, expected.y, 0),
        (by_expert(aux), by_expert(expected), 0),
        (dx, wanted_x, terms * np.linalg.norm(kernel)),
    ]
    pairs += [(aux.losses[name], loss, 0) for name, loss in expected.losses.items()]
    # The shared expert's gate gets <dy, shared>, a sum of terms of that size too.
    gate = terms * np.linalg.norm(x)
    for part, leaves in wanted_params.items():
        sizes = slack if part == "router" else {"gate": gate} if part == "shared" else {}
        pairs += [(dparams[part][n], leaf, sizes.get(n, scaling)) for n, leaf in leaves.items()]
    errors = [
        np.linalg.norm(out - ref) / (np.linalg.norm(ref) * RELATIVE["float32"] + ROUNDINGS * size + 1e-18)
        for out, ref, size in pairs
    ]
    if max(errors) > 1:
        assert not case.is_comparable(rng), f"errors over their bounds {errors}"
        return False
    return True


@pytest.mark.parametrize("index", range(max(1, CASES // CASES_PER_LAYER)))
def test_fuzz(index):
    rng = seeds.generator("fuzz", index)
    leading = LEADING[rng.integers(len(LEADING))]
    fixed = dict(precision=random_precision(rng)) if index % 4 == 1 else {}

    def fits(config):
        """The oracle takes time. 1 + tanh leaves the approximate gelu nothing but rounding at negative numbers.

        Inputs that are multiples of an eighth are ties of FP8, unless a projection comes between.
        """
        quick = config.num_experts <= 12 and config.top_k <= 6 and not config.gelu_approximate
        in_tiles = config.router.round_to_tile is not None or index % 4 != 3
        return quick and in_tiles and (not fixed or config.latent_size is not None)

    config = next(config for config in iter(lambda: random_config(rng, **fixed), None) if fits(config))
    id_type = rng.choice(ID_TYPES).item() if rng.random() < 0.5 else None
    packed, run, compared = rng.random() < 0.5, program(config), 0
    for number in range(CASES_PER_LAYER):
        case = draw(rng, config, leading, id_type, packed)
        try:
            x, dy = np.float32(case.x), np.float32(case.dy)
            params = jax.tree.map(np.float32, case.params)
            outputs = jax.device_get(run(params, x, case.optional(), dy))
            compared += check(case, outputs, rng)
        except Exception as error:
            raise AssertionError(f"case {number} of {config}, ids {id_type}: {error}") from error
    assert compared > CASES_PER_LAYER / 5
