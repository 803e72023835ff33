"""The routed block: its gradients against a float64 loop, and what it keeps for the backward pass."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe.experts import routed_experts
from jax_latent_moe.formats import FORMATS, encode
from jax_latent_moe.grouped_matmul import Bound
from jax_latent_moe.routing.permute import make_dispatch_plan
from tests.cases import TOY
from tests.conformance.test_new_rows import COLUMNS
from tests.drawn import drawn
from tests.fusing import FusingBackend
from tests.oracle.experts import routed
from tests.test_activations import VARIANTS
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOKENS, K, EXPERTS, LATENT, INNER = 7, 9, 11, 6, 5
WITHOUT_TOKENS = 4
GATED = dataclasses.replace(TOY, activation="swiglu")
GATE_KEPT = dataclasses.replace(GATED, backend=FusingBackend(("gate_hidden",), ("gate_hidden",)))
ROWS_KEPT = dataclasses.replace(TOY, keep_gathered_rows=True)
CONFIGS = {
    "plain": TOY,
    "gated": GATED,
    "gate kept": GATE_KEPT,
    "rows kept": ROWS_KEPT,
    "rows kept of a kernel": dataclasses.replace(
        ROWS_KEPT, backend=FusingBackend(("hidden",), ("hidden",), in_place=True)
    ),
}


every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def draw(rng, config):
    """Ids that reach no expert among them, and one expert without tokens."""
    gate = (2,) if config.gated else ()
    shapes = (TOKENS, LATENT), (TOKENS, K), (EXPERTS, LATENT, *gate, INNER), (EXPERTS, INNER, LATENT)
    ids = rng.integers(-1, EXPERTS, size=(TOKENS, K))
    ids[ids == WITHOUT_TOKENS] = 0
    tokens, weights, w_in, w_out = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return ids, (tokens, np.where(ids < 0, 0, weights), w_in, w_out)


@functools.cache
def compiled(config):
    @jax.jit
    def run(ids, arrays, dout):
        plan = make_dispatch_plan(ids, EXPERTS)
        out, pullback = jax.vjp(lambda *arrays: routed_experts(config, *arrays, plan), *arrays)
        alone = routed_experts(config, *arrays, plan)
        return out, *pullback(dout), alone

    return run


def check(config, ids, arrays, dout):
    """Everything against the loop; the gradient of a weight that reaches no expert is not the block's."""
    *found, alone = compiled(config)(ids, arrays, dout)
    for (name, expected), value in zip(routed(config, ids, *arrays, dout).items(), found, strict=True):
        if name == "weights":
            value, expected = np.where(ids < 0, 0, value), np.where(ids < 0, 0, expected)
        assert_close(value, expected, "float32", name)
    np.testing.assert_allclose(alone, found[0], rtol=1e-5, atol=1e-5)
    reached = np.isin(np.arange(EXPERTS), ids)
    for gradient in found[3:]:
        assert not np.asarray(gradient)[~reached].any(), "experts without tokens have a gradient"


@every_config
def test_gradients(rng, config):
    ids, arrays = draw(rng, config)
    assert not (ids == WITHOUT_TOKENS).any()
    check(config, ids, arrays, rng.normal(size=(TOKENS, LATENT)).astype(np.float32))


@every_config
def test_gradients_where_one_expert_has_all_tokens(rng, config):
    ids, (tokens, weights, *experts) = draw(rng, config)
    arrays = tokens, np.where(ids < 0, 0.5, weights).astype(np.float32), *experts
    check(config, np.full_like(ids, EXPERTS - 1), arrays, rng.normal(size=(TOKENS, LATENT)).astype(np.float32))


@every_config
def test_gradients_of_one_token(rng, config):
    ids, (tokens, weights, *experts) = draw(rng, config)
    dout = rng.normal(size=(1, LATENT)).astype(np.float32)
    check(config, ids[:1], (tokens[:1], weights[:1], *experts), dout)


RESIDUALS = [
    (variant, residual)
    for variant, fields in VARIANTS.items()
    for residual in dataclasses.replace(TOY, **fields).bound_activation.definition.residuals
]
PASSES = ["none", "fwd", "dgrad", "fwd+dgrad"]


@pytest.mark.parametrize(("residual", "fused"), drawn(itertools.product(RESIDUALS, PASSES), len(RESIDUALS)), ids=str)
def test_gradients_where_either_pass_fuses_its_activation(rng, residual, fused):
    """Each residual of each activation, kept or not by the forward pass, or read or not by the gradient."""
    variant, kept = residual
    value, gradient = "fwd" in fused, "dgrad" in fused
    backend = FusingBackend((kept,) * value, (kept,) * gradient, in_place=value)
    config = dataclasses.replace(TOY, **VARIANTS[variant], backend=backend)
    ids, arrays = draw(rng, config)
    check(config, ids, arrays, rng.normal(size=(TOKENS, LATENT)).astype(np.float32))


KEPT = {"relu2": "hidden", "swiglu": "gate_hidden", "gelu": "pre"}


@pytest.mark.parametrize(
    ("activation", "fused", "frozen"), drawn(itertools.product(KEPT, [True, False], ["w_in", "w_out", "both"]), 6)
)
def test_gradients_beside_frozen_codes(rng, monkeypatch, activation, fused, frozen):
    """Weights that are codes get no gradient, and what else there is gets the same as beside the decoded weights."""
    monkeypatch.setitem(FORMATS, COLUMNS.name, COLUMNS)
    residual = KEPT[activation]
    backend = FusingBackend((residual,), (residual,), in_place=True) if fused else "xla"
    config = dataclasses.replace(TOY, activation=activation, backend=backend)
    ids, (tokens, weights, w_in, w_out) = draw(rng, config)
    given, dout = {"w_in": w_in, "w_out": w_out}, rng.normal(size=tokens.shape).astype(np.float32)
    seen = dict(given)
    for name in given if frozen == "both" else (frozen,):
        flat = given[name].reshape(EXPERTS, given[name].shape[1], -1)
        given[name] = encode(flat, COLUMNS.name)
        seen[name] = np.asarray(given[name].decode("float32")).reshape(seen[name].shape)
    plan = make_dispatch_plan(jnp.asarray(ids), EXPERTS)
    trained = {"tokens": tokens, "weights": weights} | {
        name: weight for name, weight in given.items() if isinstance(weight, np.ndarray)
    }

    @jax.jit
    def run(trained):
        def block(trained):
            return routed_experts(config, **given | trained, dispatch=plan)

        out, pullback = jax.vjp(block, trained)
        return {"out": out} | pullback(dout)[0]

    expected = routed(config, ids, tokens, weights, seen["w_in"], seen["w_out"], dout)
    for name, value in run(trained).items():
        valid = ids >= 0 if name == "weights" else True
        assert_close(np.where(valid, value, 0), np.where(valid, expected[name], 0), "float32", name)


@every_config
def test_gradients_of_weights_hold_for_the_smallest(rng, config):
    """The gradient of a weight is not a quotient by it: it holds for tiny weights and for 0, with any residual."""
    ids, arrays = draw(rng, config)
    ids = np.abs(ids)
    tokens, weights, w_in, w_out = arrays
    small = np.full(weights.shape, 1.0, np.float32)
    small[::2], small[1, 1] = 1e-25, 0.0
    weights = np.where(weights == 0, 1, weights) * small
    dout = np.ones((TOKENS, LATENT), np.float32)
    found = compiled(config)(ids, (tokens, weights, w_in, w_out), dout)[2]
    wanted = routed(config, ids, tokens, weights, w_in, w_out, dout)["weights"]
    assert (weights == 0).sum() == 1
    assert_close(found, wanted, "float32")


@every_config
def test_gradients_of_the_weights_logarithms(rng, config):
    """They are the weights times the weights' gradients, also for a weight of 0, and all else is unchanged."""
    ids, (tokens, weights, w_in, w_out) = draw(rng, config)
    ids = np.abs(ids)
    weights = np.where(weights == 0, 1, weights).astype(np.float32)
    weights[1, 1] = 0
    dout = rng.normal(size=tokens.shape).astype(np.float32)

    @jax.jit
    def run(arrays, logs):
        plan = make_dispatch_plan(jnp.asarray(ids), EXPERTS)

        def block(arrays, logs):
            return routed_experts(config, *arrays, plan, log_weights=logs)

        out, pullback = jax.vjp(block, arrays, logs)
        return out, *pullback(dout)

    out, (dtokens, dweights, *dexperts), dlogs = run((tokens, weights, w_in, w_out), weights)
    expected = routed(config, ids, tokens, weights, w_in, w_out, dout)
    names = [name for name in expected if name != "weights"]
    for name, value in zip(names, (out, dtokens, *dexperts), strict=True):
        assert_close(value, expected[name], "float32", name)
    # A plan whose residual is the pre-activation gives the weights' own gradients.
    assert_close(weights * dweights + dlogs, weights * expected["weights"], "float32")
    assert np.asarray(dlogs).any() != np.asarray(dweights).any()


@every_config
@pytest.mark.parametrize("by_log", [True, False])
def test_a_frozen_second_weight_costs_no_gradient(rng, config, by_log, monkeypatch):
    """Its product does not run, and all other gradients are the same."""
    ids, (tokens, weights, w_in, w_out) = draw(rng, config)
    ids = np.abs(ids)
    weights = np.where(weights == 0, 1, weights).astype(np.float32)
    dout, products = rng.normal(size=tokens.shape).astype(np.float32), []
    run = Bound.__call__
    monkeypatch.setattr(Bound, "__call__", lambda self, operands: products.append(self.problem) or run(self, operands))

    def block(w_out, tokens, weights, logs, w_in):
        plan = make_dispatch_plan(jnp.asarray(ids), EXPERTS)
        return routed_experts(config, tokens, weights, w_in, w_out, plan, log_weights=logs if by_log else None)

    out, pullback = jax.vjp(functools.partial(block, w_out), tokens, weights, weights, w_in)
    dtokens, dweights, dlogs, dw_in = pullback(dout)
    expected = routed(config, ids, tokens, weights, w_in, w_out, dout)
    names = [name for name in expected if name not in ("weights", "w_out")]
    for name, value in zip(names, (out, dtokens, dw_in), strict=True):
        assert_close(value, expected[name], "float32", name)
    assert_close(weights * dweights + dlogs, weights * expected["weights"], "float32")
    ran = [(problem.contraction, problem.k, problem.n) for problem in products]
    assert ("wgrad", INNER, LATENT) not in ran
    products.clear()
    jax.vjp(block, w_out, tokens, weights, weights, w_in)[1](dout)
    assert ("wgrad", INNER, LATENT) in [(problem.contraction, problem.k, problem.n) for problem in products]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["plain", "gate kept"])
def test_small_weights_keep_their_gradients(rng, name, dtype):
    """Weights of 1e-4 and gradients of 1e-2: their products have few bits in float16, and rows are not such products.

    Their own gradients then have the error of float16. Those of rows times weights had 14 to 60 times as much.
    """
    config = dataclasses.replace(CONFIGS[name], dtype=dtype)
    ids, arrays = draw(rng, config)
    ids = np.argsort(rng.random((TOKENS, EXPERTS)), axis=1)[:, :K]
    weights = jnp.asarray(rng.uniform(0.5e-4, 1.5e-4, ids.shape), jnp.float32)
    dout = 0.01 * rng.normal(size=(TOKENS, LATENT))
    rounded = [np.asarray(jnp.asarray(array, dtype), np.float32) for array in (arrays[0], *arrays[2:], dout)]

    @jax.jit
    def run(tokens, w_in, w_out, dout):
        plan = make_dispatch_plan(jnp.asarray(ids), EXPERTS)
        args = *(array.astype(dtype) for array in (tokens, w_in, w_out)), weights, weights

        def block(tokens, w_in, w_out, weights, logs):
            return routed_experts(config, tokens, weights, w_in, w_out, plan, log_weights=logs)

        return jax.vjp(block, *args)[1](dout.astype(dtype))[3:]

    dweights, dlogs = run(*rounded)
    weights = np.asarray(weights)
    found = weights * np.asarray(dweights, np.float64) + dlogs
    wanted = weights * routed(config, ids, rounded[0], weights, *rounded[1:3], rounded[3])["weights"]
    assert np.linalg.norm(found - wanted) < 4 * jnp.finfo(dtype).eps * np.linalg.norm(wanted)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", [*CONFIGS, "pre-activation kept"])
def test_small_weights_keep_the_gradients_of_what_follows_the_activation(rng, name, dtype):
    """w_out and b_out, from gradients of 1e-2 times weights of 1e-4, each gradient a sum of many rows or of none.

    In float16 rows times weights had 12 to 30 times the error of hidden rows times weights.
    """
    config = CONFIGS.get(name) or dataclasses.replace(TOY, activation="gelu")
    config, tokens, latent = dataclasses.replace(config, dtype=dtype), 200, 40
    biased = dataclasses.replace(config, expert_bias=True, backend="xla")
    gate = (2,) if config.gated else ()
    shapes = (tokens, latent), (EXPERTS, latent, *gate, INNER), (EXPERTS, INNER, latent)
    ids = np.argsort(rng.random((tokens, EXPERTS - 1)), axis=1)[:, :K]  # none chooses the last expert
    weights = rng.uniform(0.5e-4, 1.5e-4, ids.shape).astype(np.float32)
    drawn_arrays = *(rng.normal(size=shape) for shape in shapes), 0.01 * rng.normal(size=shapes[0])
    rows, w_in, w_out, dout = (np.asarray(jnp.asarray(array, dtype), np.float32) for array in drawn_arrays)
    zeros = jnp.zeros((EXPERTS, *gate, INNER), dtype), jnp.zeros((EXPERTS, latent), dtype)

    @jax.jit
    def run(rows, w_in, w_out, dout):
        plan = make_dispatch_plan(jnp.asarray(ids), EXPERTS)
        rows, w_in, w_out, dout = (array.astype(dtype) for array in (rows, w_in, w_out, dout))

        def block(w_out, biases):
            config_of = config if biases is None else biased
            given = jnp.asarray(weights)
            return routed_experts(config_of, rows, given, w_in, w_out, plan, biases, log_weights=given)

        plain = jax.vjp(lambda w_out: block(w_out, None), w_out)[1](dout)
        return *plain, jax.vjp(lambda biases: block(w_out, biases), zeros)[1](dout)[0][1]

    dw_out, db_out = (np.asarray(gradient, np.float64) for gradient in run(rows, w_in, w_out, dout))
    by_expert = np.zeros((tokens, EXPERTS))
    np.put_along_axis(by_expert, ids, weights.astype(np.float64), axis=1)
    wanted = routed(config, ids, rows, weights, w_in, w_out, dout)["w_out"], by_expert.T @ np.float64(dout)
    for found, expected in zip((dw_out, db_out), wanted, strict=True):
        assert np.linalg.norm(found - expected) < 4 * jnp.finfo(dtype).eps * np.linalg.norm(expected)
        assert not found[-1].any()


@pytest.mark.parametrize("scale", [1e-4, 1e-1])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", [*CONFIGS, "pre-activation kept"])
def test_small_weights_keep_the_gradients_of_what_comes_before_the_activation(rng, name, dtype, scale):
    """Tokens, w_in and b_in have little more error than their own rounding, which is large for numbers below 6e-5.

    In float16, where the gradient of the pre-activation had weights of 1e-4, they had 5 to 13 times the rounding's.
    """
    config = CONFIGS.get(name) or dataclasses.replace(TOY, activation="gelu")
    with_bias = name != "gate kept"  # whose epilogue adds none
    config, tokens, latent = dataclasses.replace(config, dtype=dtype, expert_bias=with_bias), 200, 40
    gate = (2,) if config.gated else ()
    shapes = (tokens, latent), (EXPERTS, latent, *gate, INNER), (EXPERTS, INNER, latent), (EXPERTS, *gate, INNER)
    ids = np.argsort(rng.random((tokens, EXPERTS - 1)), axis=1)[:, :K]  # none chooses the last expert
    ids[0] = -1  # nor does the first token choose any
    weights = np.where(ids < 0, 0, rng.uniform(0.5 * scale, 1.5 * scale, ids.shape)).astype(np.float32)
    drawn_arrays = *(rng.normal(size=shape) for shape in shapes), 0.001 * rng.normal(size=shapes[0])
    rounded = [np.asarray(jnp.asarray(array, dtype), np.float32) for array in drawn_arrays]

    @jax.jit
    def run(*given):
        rows, w_in, w_out, b_in, dout = (array.astype(dtype) for array in given)
        plan, b_out = make_dispatch_plan(jnp.asarray(ids), EXPERTS), jnp.zeros((EXPERTS, latent), dtype)

        def block(rows, w_in, b_in):
            biases = (b_in, b_out) if with_bias else None
            return routed_experts(config, rows, jnp.asarray(weights), w_in, w_out, plan, biases)

        return jax.vjp(block, rows, w_in, b_in)[1](dout)

    rows, w_in, w_out, b_in, dout = rounded
    biases = (b_in, np.zeros((EXPERTS, latent))) if with_bias else ()
    wanted = routed(config, ids, rows, weights, w_in, w_out, dout, *biases)
    for of, found in zip(("tokens", "w_in", "b_in")[: 2 + with_bias], run(*rounded), strict=False):
        rounding = np.asarray(jnp.asarray(wanted[of], dtype), np.float64) - wanted[of]
        allowed = 1.5 * np.linalg.norm(rounding) + float(jnp.finfo(dtype).eps) * np.linalg.norm(wanted[of])
        assert np.linalg.norm(np.float64(found) - wanted[of]) < allowed, of
        assert not np.asarray(found)[0 if of == "tokens" else -1].any()


@every_config
def test_residuals_are_tokens_weights_routing_and_one_array_of_rows(rng, config):
    """Gathered rows in place of tokens where asked, not both pre-activations and hidden rows, no expert outputs."""
    ids, arrays = draw(rng, config)
    arrays = tuple(map(jnp.asarray, arrays))
    plan = make_dispatch_plan(jnp.asarray(ids), EXPERTS)
    _, pullback = jax.vjp(lambda *arrays: routed_experts(config, *arrays, plan), *arrays)
    rows, gate = TOKENS * K, 2 if config.gated else 1
    kept = {leaf.shape for leaf in jax.tree.leaves(pullback) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    read = rows if config.keep_gathered_rows else TOKENS
    allowed = {(read, LATENT), (TOKENS, K), (rows, gate * INNER), (EXPERTS, LATENT, gate * INNER), arrays[3].shape}
    assert kept <= allowed
    of_rows = [leaf for leaf in jax.tree.leaves(pullback) if leaf.shape[:1] == (rows,) and leaf.ndim == 2]
    assert len(of_rows) == 1 + config.keep_gathered_rows


def test_no_expert_at_all_gives_zeros(rng):
    _, arrays = draw(rng, TOY)
    plan = make_dispatch_plan(jnp.full((TOKENS, K), -1), EXPERTS)
    out, pullback = jax.vjp(lambda *arrays: routed_experts(TOY, *arrays, plan), *map(jnp.asarray, arrays))
    assert not np.asarray(out).any()
    for gradient in pullback(jnp.ones_like(out)):
        assert not np.asarray(gradient).any()
