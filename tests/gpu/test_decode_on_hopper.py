"""The kernels for few tokens on a Hopper GPU, against a float64 oracle on decoded weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import XlaBackend, init_params, latent_moe, quantize
from jax_latent_moe.decode import MOST_ASSIGNMENTS, Decode, decoded_experts, plan_decode
from jax_latent_moe.grouped_matmul.cutlass_sm90.codes import CODES
from jax_latent_moe.grouped_matmul.sm90 import KERNEL_ACTIVATIONS
from jax_latent_moe.native import library
from jax_latent_moe.projections import cluster_parts, projection
from jax_latent_moe.routing.router import route
from tests.few_tokens import BACKEND, WEIGHINGS, expected, experts_of, layer, only
from tests.gpu.grouped import float64, needs_hopper
from tests.tolerances import assert_close

pytestmark = [needs_hopper, pytest.mark.skipif(library().missing is not None, reason=f"{library().missing}")]
FORMATS = tuple(CODES)


def run(config, x, weights, ids, w_in, w_out):
    plan = plan_decode(config, ids.shape[0], ids.shape[1], x.dtype, w_in, w_out)
    assert isinstance(plan, Decode), plan
    return jax.jit(functools.partial(decoded_experts, plan))(x, weights, jnp.asarray(ids, jnp.int32), w_in, w_out)


def check(rng, config, format, tokens, dtype="bfloat16", ids=None):
    """Right values, equal bits on each run, and no reads of experts that no token chose."""
    w_in, w_out = experts_of(rng, config, format, dtype)
    experts, top_k = config.num_experts, config.top_k
    x = jnp.asarray(rng.normal(size=(tokens, config.latent_width)), dtype)
    weights = jnp.asarray(rng.normal(size=(tokens, top_k)), jnp.float32)
    ids = np.asarray(rng.integers(-1, experts + 1, (tokens, top_k)) if ids is None else ids, np.int32)
    arguments = config, x, weights, ids, only(w_in, ids), only(w_out, ids)
    out = run(*arguments)
    assert_close(float64(out), expected(*arguments), dtype, f"{format} {config.activation} T={tokens}")
    for _ in range(3):
        np.testing.assert_array_equal(float64(run(*arguments)), float64(out))


@pytest.mark.parametrize("format", [None, *FORMATS])
@pytest.mark.parametrize("name", KERNEL_ACTIVATIONS)
def test_formats_and_activations(rng, format, name):
    check(rng, layer(name, 256, 40, 22, 384), format, 3)


@pytest.mark.parametrize("format", [None, *FORMATS])
@pytest.mark.parametrize("tokens", [1, 2, 8])
def test_numbers_of_tokens_and_choices(rng, format, tokens):
    for top_k in (1, 22):
        check(rng, layer("relu2", 1024, 60, top_k, 2688), format, tokens)


@pytest.mark.parametrize(("format", "latent", "inner"), [(None, 72, 136), ("fp8_block", 208, 176), ("mxfp4", 96, 160)])
def test_sizes_that_no_tile_divides(rng, format, latent, inner):
    for name in ("relu2", "swiglu"):
        check(rng, layer(name, latent, 9, 5, inner), format, 4)


def test_float16(rng):
    for tokens in (1, 5):
        check(rng, layer("swiglu", 264, 9, 5, 136), None, tokens, "float16")


@pytest.mark.parametrize("format", [None, "fp8_block", "mxfp4"])
def test_an_expert_of_many_rows(rng, format):
    """More rows than a block multiplies at once, the same expert again among a token's choices, as many as fit."""
    config = layer("swiglu", 96, 4, 3, 32)
    check(rng, config, format, 7, ids=np.full((7, 3), 2))
    check(rng, config, format, 1, ids=[[1, 1, 1]])
    check(rng, dataclasses.replace(config, top_k=1), format, MOST_ASSIGNMENTS if format is None else 64)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("tokens", "experts"), [(16, 90), (64, 512), (100, 150), (256, 512)])
def test_listed_rows(rng, format, tokens, experts):
    """Passes of 8 rows and of 16, and experts without rows."""
    config = layer("relu2", 128, experts, 22, 256)
    ids = np.stack([rng.permutation(experts)[:22] for _ in range(tokens)])
    ids[::7, ::5] = -1
    check(rng, config, format, tokens, ids=ids)


@pytest.mark.parametrize("format", FORMATS)
def test_listed_units_in_two_pieces(rng, format):
    """An H200 has 528 blocks with passes of 8 rows and 264 with 16, for 640 units of several rounds at least."""
    config = layer("relu2", 2048, 48, 10, 640)
    check(rng, config, format, 9, ids=np.arange(90).reshape(9, 10) % 40)
    check(rng, config, format, 30)


@pytest.mark.parametrize("name", KERNEL_ACTIVATIONS)
def test_activations_of_listed_rows(rng, name):
    for format, tokens in (("mxfp4", 20), ("fp8_block", 70)):
        check(rng, layer(name, 256, 40, 4, 384), format, tokens)


@pytest.mark.parametrize(
    ("format", "latent", "inner"), [("fp8_block", 208, 176), ("mxfp4", 96, 160), ("int8", 3232, 48)]
)
def test_listed_rows_of_sizes_that_no_tile_divides(rng, format, latent, inner):
    for name in ("relu2", "swiglu"):
        check(rng, layer(name, latent, 30, 5, inner), format, 19)


@pytest.mark.parametrize("format", ["fp8_block", "mxfp4", "nvfp4"])
@pytest.mark.parametrize(("latent", "inner"), [(1024, 2688), (3232, 3232)])
def test_listed_rows_of_one_expert(rng, format, latent, inner):
    """The inputs fit into shared memory, or do not. Passes of 16 rows and of 8."""
    config = layer("relu2", latent, 20, 4, inner)
    check(rng, config, format, 64, ids=np.full((64, 4), 19))
    check(rng, config, format, 40)
    check(rng, config, format, 18)


@pytest.mark.parametrize("format", ["fp8_block", "mxfp4", "nvfp4"])
def test_padding_rows_of_nan_leak_nowhere(rng, format):
    config = layer("relu2", 256, 60, 4, 384)
    w_in, w_out = experts_of(rng, config, format)
    x = jnp.asarray(rng.normal(size=(70, 256)), jnp.bfloat16).at[40:].set(jnp.nan)
    weights = jnp.asarray(rng.normal(size=(70, 4)), jnp.float32).at[40:].set(jnp.nan)
    ids = rng.integers(0, 60, (70, 4)).astype(np.int32)
    ids[40:] = rng.choice([-1, 60, 1 << 30], (30, 4))
    out = float64(run(config, x, weights, ids, w_in, w_out))
    assert (out[40:] == 0).all()
    wanted = expected(config, x[:40], weights[:40], ids[:40], w_in, w_out)
    assert_close(out[:40], wanted, "bfloat16")


@pytest.mark.parametrize("format", [None, "int8", "nvfp4"])
def test_a_nan_stays_in_its_token(rng, format):
    config = layer("relu2", 64, 4, 2, 64)
    w_in, w_out = experts_of(rng, config, format)
    x = jnp.asarray(rng.normal(size=(3, 64)), jnp.bfloat16).at[1].set(jnp.nan)
    ids = np.asarray([[3, 0], [3, 0], [-1, 4]])
    weights = jnp.asarray([[0.5, 2.0], [0.5, 2.0], [jnp.nan, jnp.inf]], jnp.float32)
    out = float64(run(config, x, weights, ids, w_in, w_out))
    assert np.isfinite(out[0]).all()
    assert np.isnan(out[1]).all()
    assert (out[2] == 0).all()


def test_weights_beyond_two_to_the_31_elements(rng):
    """The experts at both ends of them."""
    experts, latent, inner = 520, 2048, 2112
    config = layer("relu2", latent, experts, 4, inner)
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    w_in = draw(jax.random.key(0), (experts, latent, inner), jnp.bfloat16) / 32
    w_out = draw(jax.random.key(1), (experts, inner, latent), jnp.bfloat16) / 32
    x, weights = jnp.asarray(rng.normal(size=(2, latent)), jnp.bfloat16), jnp.ones((2, 4))
    ids = np.asarray([[0, 519, 518, 259], [519, 1, 260, 261]])
    out = run(config, x, weights, ids, w_in, w_out)
    chosen = np.unique(ids)
    places = np.searchsorted(chosen, ids)
    wanted = expected(config, x, weights, places, w_in[chosen], w_out[chosen])
    assert_close(float64(out), wanted, "bfloat16")


@pytest.mark.parametrize("format", [None, "fp8_block", "mxfp4"])
def test_the_up_projection_in_the_same_call(rng, format):
    """The bits of a call of its own, on each run."""
    config = layer("relu2", 1024, 40, 22, 2688)
    w_in, w_out = experts_of(rng, config, format)
    x, weights, up_proj = (rng.normal(size=shape) for shape in ((1, 1024), (1, 22), (1024, 4096)))
    x, up_proj = jnp.asarray(x, jnp.bfloat16), jnp.asarray(up_proj / 32, jnp.bfloat16)
    weights, ids = jnp.asarray(weights, jnp.float32), jnp.asarray(rng.permutation(40)[None, :22], jnp.int32)
    combined = run(config, x, weights, ids, w_in, w_out)
    wanted = float64(jax.jit(functools.partial(projection, config))(combined, up_proj))
    assert_close(wanted, float64(combined) @ float64(up_proj), "bfloat16")
    plan = plan_decode(config, 1, 22, "bfloat16", w_in, w_out)
    assert isinstance(plan, Decode), plan
    program = jax.jit(functools.partial(decoded_experts, plan, parts=cluster_parts(up_proj)))
    for _ in range(10):
        y = program(x, weights, ids, w_in, w_out, up_proj)
        np.testing.assert_array_equal(float64(y), wanted)


@pytest.mark.parametrize(("tokens", "format"), [(1, None), (2, None), (64, "mxfp4"), (64, "fp8_block")])
def test_a_layer_in_a_compiled_loop(rng, tokens, format):
    """Each step has the tokens of the last one: as the portable backend computes it, step by step."""
    config = layer("relu2", 128, 32, 6, 256, dtype="bfloat16", param_dtype="bfloat16")
    params = init_params(jax.random.key(0), config)
    params = params if format is None else quantize(params, config, format)
    x = jnp.asarray(rng.normal(size=(tokens, 64)), jnp.bfloat16)

    def step(config, x):
        y = latent_moe(params, x, config)[0]
        return (x + y / jnp.sqrt(jnp.mean(jnp.square(y.astype(jnp.float32)), -1, keepdims=True))).astype(x.dtype)

    loop = jax.jit(lambda x: jax.lax.scan(lambda x, _: (step(config, x), x), x, length=20))
    target = "latent_moe_decode_experts" if format is None else "latent_moe_decode_listed_experts"
    assert target in loop.lower(x).as_text()
    portable = jax.jit(functools.partial(step, dataclasses.replace(config, backend=XlaBackend())))
    last, steps = loop(x)
    for before, after in zip(steps, [*steps[1:], last], strict=True):
        assert_close(float64(after), float64(portable(before)), "bfloat16")


@pytest.mark.parametrize("name", WEIGHINGS)
@pytest.mark.parametrize(("tokens", "experts"), [(1, 512), (8, 512), (5, 70), (8, 896)])
def test_the_choice_and_its_weights(rng, name, tokens, experts):
    """As XLA makes them, logits that underflow included."""
    config, k = WEIGHINGS[name], 22
    logits = jnp.asarray(rng.normal(size=(tokens, experts)) * np.logspace(-1, 2, tokens)[:, None], jnp.float32)
    logits = logits.at[-1].add(-95)
    bias = jnp.asarray(rng.normal(size=experts), jnp.float32) / 8 if config.correction_bias else None
    program = functools.partial(route, config=config, top_k=k, bias=bias)
    kernel = jax.jit(functools.partial(program, backend=BACKEND))
    assert "latent_moe_top_k_weights" in kernel.lower(logits).as_text()
    found = kernel(logits)
    wanted = jax.jit(functools.partial(program, backend=XlaBackend()))(logits)
    np.testing.assert_array_equal(found.expert_ids, wanted.expert_ids)
    np.testing.assert_allclose(found.weights, wanted.weights, rtol=2e-5)
