"""Latents and gradients that travel to the experts as codes, against the oracle that rounds them too."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_latent_moe import ConfigError, ParallelConfig, Precision, RouterConfig, latent_moe, presets
from jax_latent_moe.cost import exchange_bytes
from jax_latent_moe.device import Device
from jax_latent_moe.parallel import choice, explain
from jax_latent_moe.parallel.round_trip import RoundTrip, to_experts
from tests import cases, layers, oracle
from tests.cases import with_router
from tests.oracle.rounding import LEAST_OF_ROWS, fp8
from tests.parallel import ragged
from tests.parallel.meshes import BASE, make_mesh
from tests.parallel.test_values import with_dispatch, without_overflow
from tests.tolerances import assert_close, assert_trees_close


def sent_in(config, format):
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, dispatch_format=format))


WIDE = dataclasses.replace(BASE, latent_size=160, top_k=3)  # two blocks of a row, one of them partial
CASES = {
    "all_gather": (with_dispatch(sent_in(BASE, "fp8_block"), "all_gather"), (1, 2, 2, 2)),
    "all_gather, wide": (with_dispatch(sent_in(WIDE, "fp8_block_pow2"), "all_gather"), (1, 1, 4, 1)),
    "all_to_all": (with_dispatch(sent_in(BASE, "fp8_block_pow2"), "all_to_all"), (1, 1, 4, 2)),
    "all_to_all, wide": (with_dispatch(sent_in(WIDE, "fp8_block"), "all_to_all"), (1, 1, 4, 1)),
    "after a norm": (
        dataclasses.replace(sent_in(BASE, "fp8_block"), latent_norm="pre", latent_norm_eps=1e-2),
        (2, 1, 4, 1),
    ),
    "weights on inputs": (
        dataclasses.replace(
            sent_in(BASE, "fp8_block"), top_k=1, apply_probs_on_input=True, router=RouterConfig(norm_topk_prob=False)
        ),
        (1, 1, 8, 1),
    ),
    "products in FP8 too": (
        dataclasses.replace(sent_in(BASE, "fp8_block"), precision=Precision("fp8_block", "fp8_block")),
        (1, 1, 2, 1),
    ),
}


@pytest.mark.parametrize(("config", "sizes"), CASES.values(), ids=CASES)
def test_values_and_gradients(rng, config, sizes):
    case = cases.random_inputs(rng, config, (8, 3), masked=True)
    with jax.set_mesh(make_mesh(*sizes)):
        layers.check_against_oracle(case)


@pytest.mark.parametrize("dispatch", ["all_gather", "all_to_all"])
def test_experts_without_tokens(rng, dispatch):
    """Their gradients are zeros, and so are the rows that a buffer leaves free."""
    case = cases.random_inputs(rng, with_dispatch(sent_in(BASE, "fp8_block"), dispatch), (8, 1))
    case.params["router"]["bias"][:3] += 8
    with jax.set_mesh(make_mesh(1, 1, 8, 1)):
        layers.check_against_oracle(case)
        _, dparams, _ = layers.run(case)
    for leaf in dparams["experts"].values():
        assert np.any(leaf[:3])
        assert not np.any(leaf[3:])


@pytest.mark.parametrize("dispatch", ["all_gather", "all_to_all"])
def test_overflow(rng, dispatch):
    """Capacity drops the same rows as without codes."""
    config = with_router(with_dispatch(sent_in(BASE, "fp8_block"), dispatch, 0.5), norm_topk_prob=False)
    drawn = (cases.draw(rng, config, (4, 16)) for _ in range(100))
    kept, dropped = next(kept for kept in (without_overflow(case, 4) for case in drawn) if kept[0].is_comparable(rng))
    case = kept._replace(expert_ids=None)
    wanted = kept.oracle()
    dparams_wanted, dx_wanted = oracle.backward(case.params, config, wanted, case.dy)
    with jax.set_mesh(make_mesh(1, 1, 4, 1)):
        (y, aux), dparams, dx = layers.run(case)
    np.testing.assert_array_equal(aux.dropped_per_expert, dropped)
    assert_close(y, wanted.y, "float32")
    assert_trees_close(dparams, dparams_wanted, "float32")
    assert_close(dx, dx_wanted, "float32")


def test_ragged(rng, monkeypatch):
    monkeypatch.setattr(choice, "current_device", lambda: Device("gpu", "NVIDIA H200"))
    monkeypatch.setattr(lax, "ragged_all_to_all", ragged.ragged_all_to_all)
    case = cases.random_inputs(rng, with_dispatch(sent_in(BASE, "fp8_block"), "ragged_all_to_all"), (8, 3))
    with jax.set_mesh(make_mesh(1, 1, 4, 1)):
        layers.compiled.cache_clear()
        layers.check_against_oracle(case)
    layers.compiled.cache_clear()


@pytest.mark.parametrize("dispatch", ["all_gather", "all_to_all"])
def test_a_nan_stays_in_its_token(rng, dispatch):
    config = with_dispatch(sent_in(BASE, "fp8_block"), dispatch)
    case = cases.draw(rng, config, (8, 3))
    x = case.x.astype(np.float32)
    x[3, 1, 2] = np.nan
    params = layers.cast(case.params, "float32")
    with jax.set_mesh(make_mesh(1, 1, 4, 1)):
        y, _ = jax.jit(latent_moe, static_argnums=2)(params, x, config)
    assert np.isnan(y[3, 1]).all()
    assert np.isfinite(np.delete(y.reshape(24, -1), 10, axis=0)).all()


@pytest.mark.parametrize(
    ("dtype", "format", "value"),
    [("float16", "fp8_block_pow2", 65000), ("float16", "fp8_block", 65504), ("bfloat16", "fp8_block_pow2", 3.38e38)],
)
def test_the_largest_numbers_stay_finite(dtype, format, value):
    """The nearest code may stand for more than the dtype's largest number. A row arrives within 1/16 of its values."""
    row = jnp.full((1, 130), value, dtype).at[0, 3].set(1.0)
    arrived = jax.jit(to_experts, static_argnums=0)(
        RoundTrip(lambda leaf, _: leaf, lambda rows, _: rows, format), row, None
    )
    assert arrived.dtype == dtype
    np.testing.assert_allclose(np.delete(np.float64(arrived), 3), np.delete(np.float64(row), 3), rtol=1 / 16)


def test_second_derivatives(rng):
    """Those of sum(rows^3): rounding has the gradient of the identity, and their own cotangents travel in codes too."""
    trip = RoundTrip(lambda leaf, _: leaf, lambda rows, _: rows, "fp8_block")
    x, v = np.float32(rng.normal(size=(2, 3, 130)))
    gradient = jax.grad(lambda x: jnp.sum(to_experts(trip, x, None) ** 3))
    second = jax.jit(jax.grad(lambda x: jnp.sum(gradient(x) * v)))(x)
    rows, cotangents = (fp8(part, "fp8_block", n_block=1, least=LEAST_OF_ROWS) for part in (x, v))
    assert_close(second, 6 * rows * cotangents, "float32")


def test_what_does_not_travel_is_not_rounded(rng):
    """Experts on one device, and few tokens that every device has."""
    case = cases.draw(rng, BASE, (3,))
    params = layers.cast(case.params, "float32")
    for sizes in ((2, 1, 1, 1), (1, 1, 2, 1)):
        with jax.set_mesh(make_mesh(*sizes)):
            run = jax.jit(lambda x, config: latent_moe(params, x, config)[0], static_argnums=1)
            exact, coded = (run(np.float32(case.x), config) for config in (BASE, sent_in(BASE, "fp8_block")))
        np.testing.assert_array_equal(coded, exact)


def test_bytes():
    """Super's latents are 1024 codes and eight scales instead of 2048 bytes; sums come back as they do without."""
    config = dataclasses.replace(presets.NEMOTRON_3_SUPER, parallel=ParallelConfig())
    plain, coded = (exchange_bytes(part, 8, 100) for part in (config, sent_in(config, "fp8_block")))
    ids_and_weights = 7 * 100 * 8 * config.top_k
    assert plain["all_gather"] == (7 * 100 * 2048 + ids_and_weights, 7 * 100 * 2048)
    assert coded["all_gather"] == (7 * 100 * (1024 + 8 * 4) + ids_and_weights, 7 * 100 * 2048)
    assert "fp8_block to the experts" in explain(sent_in(config, "fp8_block"), 8, 100)
    assert "to the experts" not in explain(config, 8, 100)


def test_formats_without_rows_are_refused():
    with pytest.raises(ConfigError, match=r"parallel.dispatch_format: format='int8' is for weights only"):
        ParallelConfig(dispatch_format="int8")
    with pytest.raises(ConfigError, match=r"parallel.dispatch_format: format='e4m3' is unknown"):
        ParallelConfig(dispatch_format="e4m3")


def test_program_sends_bytes():
    """Only codes and scales of latents are gathered, also in the backward pass."""
    config = with_dispatch(sent_in(WIDE, "fp8_block"), "all_gather")
    x = jax.ShapeDtypeStruct((64, BASE.hidden_size), jnp.float32)

    def loss(params, x):
        return jnp.sum(latent_moe(params, x, config)[0])

    params = jax.eval_shape(lambda: layers.cast(cases.draw(np.random.default_rng(0), config, (1,)).params, "float32"))
    with jax.set_mesh(make_mesh(1, 1, 4, 1)):
        text = jax.jit(jax.grad(loss)).lower(params, x).as_text()
    gathered = [line for line in text.splitlines() if "stablehlo.all_gather" in line]
    assert sum("x160xui8>" in line for line in gathered) == 2
    assert not any("x160xf32>" in line for line in gathered)
