"""Rows in rounds of bounded size give what the oracle gives, however many rounds a device needs."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import InputError, Precision, cost, init_params, latent_moe, lora, merge_state, presets, quantize
from jax_latent_moe.parallel import rounds
from jax_latent_moe.routing.permute import make_dispatch_plan, rows_from
from tests import cases, layers
from tests.parallel.meshes import BASE, make_mesh
from tests.tolerances import assert_close

DISPATCHES = ("all_gather", "all_to_all")


@pytest.fixture(autouse=True)
def rounds_of_any_size(monkeypatch):
    monkeypatch.setattr(cost, "least_round_saving", lambda config, devices: 0)


@pytest.fixture
def counted(monkeypatch):
    """The rounds that run after the first one, a number for each loop and device."""
    found, usual = [], rounds._other_rounds

    def counting(num_rows, plan, add, start):
        more = -(-jnp.sum(plan.group_sizes) // num_rows) - 1
        jax.debug.callback(lambda more: found.append(int(more)), more)
        return usual(num_rows, plan, add, start)

    monkeypatch.setattr(rounds, "_other_rounds", counting)
    return found


def with_parallel(config, **changes):
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **changes))


def to_the_first(case, experts):
    """The case with a bias that sends every token to the first experts."""
    case.params["router"]["bias"][:experts] += 8
    return case


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("first", [0, 3])
def test_values_and_gradients(rng, counted, dispatch, first):
    config = with_parallel(BASE, dispatch=dispatch, round_factor=1.0)
    case = to_the_first(cases.random_inputs(rng, config, (8, 6), masked=first == 0), first)
    with jax.set_mesh(make_mesh(1, 1, 4, 1)):
        layers.check_against_oracle(case)
    jax.effects_barrier()
    if first:  # 144 rows of 48 tokens are on two devices, 96 on the first one, in rounds of 40
        assert (min(counted), max(counted)) == (-1, 2)


def test_more_than_8_choices_with_all_tokens_on_one_device(rng, counted):
    config = dataclasses.replace(with_parallel(BASE, round_factor=1.5), num_experts=40, top_k=10, latent_size=24)
    case = to_the_first(cases.draw(rng, config, (8, 5)), 10)
    with jax.set_mesh(make_mesh(1, 1, 4, 2)):
        layers.check_against_oracle(case)
    jax.effects_barrier()
    assert max(counted) == 2  # 400 rows in rounds of 152


@pytest.mark.parametrize("backend", ["biases", "swiglu", "float16"])
def test_other_layers(rng, backend):
    changes = {
        "biases": dict(expert_bias=True, activation="swiglu"),
        "swiglu": dict(activation="swiglu", keep_gathered_rows=True),
        "float16": dict(dtype="float16", latent_norm="post"),
    }[backend]
    config = dataclasses.replace(with_parallel(BASE, round_factor=1.0), **changes)
    case = to_the_first(cases.random_inputs(rng, config, (8, 4)), 2)
    with jax.set_mesh(make_mesh(1, 1, 2, 2)):
        layers.check_against_oracle(case)


@pytest.mark.parametrize("kind", ["codes", "adapters", "adapters on codes", "fp8"])
def test_frozen_codes_adapters_and_products_in_fp8(rng, counted, kind):
    """Against the same layer without rounds."""
    config = dataclasses.replace(BASE, latent_size=32, expert_intermediate_size=64, hidden_size=128)
    if kind == "fp8":
        config = dataclasses.replace(config, precision=Precision("fp8_block", "fp8_block"))
    params = init_params(jax.random.key(0), config)
    params["router"]["bias"] = params["router"]["bias"].at[:3].add(8)
    if kind.endswith("codes"):
        params = quantize(params, config, "mxfp4")
    if kind.startswith("adapters"):
        params = lora.adapt(jax.random.key(1), params, config, rank=4)
        trained, frozen = lora.split(params)
        trained = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), trained)
    else:
        parts = [name for name in params if name != "experts" or kind == "fp8"]
        trained, frozen = {name: params[name] for name in parts}, {name: params[name] for name in params}
    x = jnp.asarray(rng.normal(size=(6, 5, 128)), jnp.float32)

    def loss(trained, x, config):
        whole = merge_state(trained, frozen) if kind.startswith("adapters") else frozen | trained
        y = latent_moe(whole, x, config)[0]
        return jnp.sum(jnp.square(y.astype(jnp.float32))), y

    results = []
    for factor in (1.0, None):
        run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=2)
        with jax.set_mesh(make_mesh(1, 1, 2, 1)):
            results.append(jax.device_get(run(trained, x, with_parallel(config, round_factor=factor))))
    jax.effects_barrier()
    assert max(counted) == 1
    (((_, y), (dtrained, dx)), ((_, y_whole), (dtrained_whole, dx_whole))) = results
    assert_close(y, y_whole, "float32")
    for found, whole in zip(*map(jax.tree.leaves, ((dtrained, dx), (dtrained_whole, dx_whole))), strict=True):
        assert_close(found, whole, "float32")


def test_an_expert_without_tokens_has_a_gradient_of_zero(rng):
    config = with_parallel(BASE, round_factor=1.0)
    case = to_the_first(cases.draw(rng, config, (8, 4)), 3)
    with jax.set_mesh(make_mesh(1, 1, 4, 1)):
        _, dparams, _ = layers.run(case)
    for leaf in dparams["experts"].values():
        assert np.any(leaf[0])
        assert not np.any(leaf[3:])


@pytest.mark.parametrize("multiple", [1, 8])
def test_rounds_hold_each_row_once(rng, multiple):
    """Rows of experts without rows, of no expert, and padding rows included."""
    ids = jnp.asarray(rng.integers(-1, 6, (33, 3)), jnp.int32)
    ids = jnp.where(ids == 2, 3, ids)
    plan = make_dispatch_plan(ids, 5, row_multiple=multiple)
    size, seen, sizes = 16, np.zeros(ids.shape, int), 0
    for begin in range(0, int(plan.group_sizes.sum()), size):
        some, inside = rows_from(plan, begin, size)
        seen += np.asarray(inside)
        sizes = sizes + some.group_sizes
        rows, count = np.asarray(some.row_of_assignment), int(some.group_sizes.sum())
        own = np.asarray(inside) & (rows < count)
        expert = np.repeat(np.arange(5), some.group_sizes)
        np.testing.assert_array_equal(expert[rows[own]], np.asarray(ids)[own])
        np.testing.assert_array_equal(
            np.asarray(some.assignment_of_row)[rows[own]], np.arange(ids.size).reshape(ids.shape)[own]
        )
        assert (rows[~np.asarray(inside)] >= count).all()
    np.testing.assert_array_equal(sizes, plan.group_sizes)
    assert (seen[(np.asarray(ids) >= 0) & (np.asarray(ids) < 5)] == 1).all()


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("factor", [1.0, None])
def test_64_bits_with_strict_promotion(rng, dispatch, factor):
    case = cases.draw(rng, with_parallel(BASE, dispatch=dispatch, round_factor=factor), (8, 2))
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.set_mesh(make_mesh(1, 1, 4, 1)):
        x = jnp.asarray(case.x, jnp.float32)
        params = layers.cast(case.params, "float32")
        found = jax.eval_shape(jax.grad(lambda x: jnp.sum(latent_moe(params, x, case.config)[0])), x)
    assert found.dtype == jnp.float32


def test_no_array_has_the_rows_of_the_worst_case():
    config = with_parallel(dataclasses.replace(BASE, latent_size=24, expert_intermediate_size=40), round_factor=1.25)
    x = jax.ShapeDtypeStruct((64, 4, config.hidden_size), jnp.float32)
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), config))

    def loss(params, x, config):
        return jnp.sum(latent_moe(params, x, config)[0])

    def most_rows(config):
        with jax.set_mesh(make_mesh(1, 1, 4, 1)):
            program = jax.jit(jax.grad(loss), static_argnums=2).lower(params, x, config).as_text()
        return max(int(rows) for rows in re.findall(r"tensor<(\d+)x(?:24|40)xf32>", program))

    # Arrays that are kept for the backward pass have the rows of all devices: 4 times 256 latents, and 4 times 248 rows
    # of a round instead of 4 times 520, as a token has at most 2 of its 3 experts on a device with 2.
    assert most_rows(config) == 4 * 256
    assert most_rows(with_parallel(config, round_factor=None)) == 4 * 520


def test_rounds_must_save_memory(monkeypatch):
    monkeypatch.undo()
    super_layer = dataclasses.replace(presets.NEMOTRON_3_SUPER, parallel=BASE.parallel)
    assert cost.rows_of_round(BASE, 4, 12, 144) == 144
    assert cost.rows_of_round(BASE, 4, 2**20, 2**22 * 3) == 3932160
    # 8192 tokens of Super have few rows for each expert: on 2 devices rounds would save 1.3 GB of rows, and a further
    # round would need 2.8 GB for the weights' gradients.
    assert cost.rows_of_round(super_layer, 2, 8192, 2 * 8192 * 22) == 2 * 8192 * 22
    assert cost.rows_of_round(super_layer, 8, 8192, 8 * 8192 * 22) == 225280


def test_second_derivatives_are_refused_with_a_way_out(rng):
    case = cases.draw(rng, with_parallel(BASE, round_factor=1.0), (8, 2))

    def norm(x, config):
        return jnp.sum(jnp.square(jax.grad(lambda x: jnp.sum(latent_moe(case.params, x, config)[0]))(x)))

    with jax.set_mesh(make_mesh(1, 1, 4, 1)):
        with pytest.raises(InputError, match=r"set parallel\.round_factor=None"):
            jax.grad(norm)(jnp.asarray(case.x, jnp.float32), case.config)
        found = jax.grad(norm)(jnp.asarray(case.x, jnp.float32), with_parallel(case.config, round_factor=None))
    assert np.isfinite(found).all()
