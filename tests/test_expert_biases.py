"""Biases of the experts and of the router's logits: values and gradients against a float64 loop."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import CutlassBackend, RouterConfig, UnsupportedError, latent_moe, param_shapes
from jax_latent_moe.expert_plan import plan_experts
from jax_latent_moe.experts import routed_experts
from jax_latent_moe.routing.permute import make_dispatch_plan
from tests import cases, layers
from tests.cases import TOY
from tests.fusing import FusingBackend
from tests.kernels import FUSED, H200, MAX_EXPERTS, PLAIN, library
from tests.oracle.experts import routed
from tests.parallel.meshes import BASE, make_mesh
from tests.test_experts import EXPERTS, INNER, LATENT, TOKENS, WITHOUT_TOKENS, K, draw
from tests.tolerances import assert_close

BIASED = dataclasses.replace(TOY, expert_bias=True)
CONFIGS = {
    "hidden kept": BIASED,
    "gated": dataclasses.replace(BIASED, activation="clamped_swiglu"),
    "a backend that fuses": dataclasses.replace(BIASED, backend=FusingBackend(("hidden",), ("hidden",), in_place=True)),
}
GPT_OSS = RouterConfig(score_function="softmax_topk", correction_bias=False, norm_topk_prob=False, logit_bias=True)


def drawn(rng, config):
    ids, arrays = draw(rng, config)
    shapes = (EXPERTS, *arrays[2].shape[2:]), (EXPERTS, LATENT)
    return ids, arrays, tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


@functools.cache
def compiled(config):
    @jax.jit
    def run(ids, arrays, biases, dout):
        plan = make_dispatch_plan(ids, EXPERTS)
        out, pullback = jax.vjp(lambda arrays, biases: routed_experts(config, *arrays, plan, biases), arrays, biases)
        darrays, dbiases = pullback(dout)
        return out, *darrays, *dbiases

    return run


@pytest.mark.parametrize("case", ["mixed", "one expert", "one token"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradients(rng, config, case):
    """With choices of no expert, an expert without tokens, and top_k > 8."""
    ids, (tokens, weights, *experts), biases = drawn(rng, config)
    if case == "one expert":
        ids = np.where(ids < 0, ids, EXPERTS - 1)
    if case == "one token":
        ids, tokens, weights = ids[:1], tokens[:1], weights[:1]
    arrays, dout = (tokens, weights, *experts), rng.normal(size=tokens.shape).astype(np.float32)
    expected = routed(config, ids, *arrays, dout, *biases)
    for (name, wanted), value in zip(expected.items(), compiled(config)(ids, arrays, biases, dout), strict=True):
        valid = ids >= 0 if name == "weights" else True
        assert_close(np.where(valid, value, 0), np.where(valid, wanted, 0), "float32", name)
        if name in ("w_in", "w_out", "b_in", "b_out"):
            assert not np.asarray(value)[~np.isin(np.arange(EXPERTS), ids)].any()


def test_an_expert_without_tokens_may_have_a_nan_bias(rng):
    ids, arrays, (b_in, b_out) = drawn(rng, BIASED)
    plan = make_dispatch_plan(jnp.asarray(ids), EXPERTS)
    b_in[WITHOUT_TOKENS] = b_out[WITHOUT_TOKENS] = np.nan
    given = [jnp.asarray(array) for array in (*arrays, b_in, b_out)]
    out, pullback = jax.vjp(lambda *given: routed_experts(BIASED, *given[:4], plan, given[4:]), *given)
    assert all(np.isfinite(array).all() for array in (out, *pullback(jnp.ones_like(out))))


def test_no_epilogue_passes_over_a_bias():
    """A backend that fuses leaves the activation to XLA; one that insists on fusing is refused."""
    shapes = (EXPERTS, LATENT, INNER), (EXPERTS, INNER, LATENT)
    plan = plan_experts(CONFIGS["a backend that fuses"], TOKENS * K, *shapes, "float32")
    assert plan.up.problem.epilogue is plan.down_dgrad.problem.epilogue is None
    assert plan.up_without_gradient.problem.epilogue is None


def test_a_backend_that_insists_on_fusing_is_refused(install_library):
    install_library(library(*PLAIN, *FUSED, max_experts=MAX_EXPERTS))
    config = dataclasses.replace(BIASED, backend=CutlassBackend(fuse="always"))
    with pytest.raises(UnsupportedError, match=r"cutlass.*no bias of an expert.*set expert_bias=False"):
        plan_experts(config, 8192, (64, 1024, 1024), (64, 1024, 1024), "bfloat16", device=H200)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 1, 2, 2)])
@pytest.mark.parametrize("norm", ["none", "post"])
def test_gpt_oss_layer(rng, sizes, norm):
    """On one device, and with b_in split over tensor and b_out added once."""
    config = dataclasses.replace(BASE, activation="clamped_swiglu", swiglu_limit=0.5, expert_bias=True, router=GPT_OSS)
    config = dataclasses.replace(config, latent_norm=norm, latent_norm_eps=1e-2 if norm == "post" else 1e-5)
    with jax.set_mesh(make_mesh(*sizes)):
        layers.check_against_oracle(cases.random_inputs(rng, config, (4, 2), masked=True))


def test_a_layer_without_biases_has_the_program_it_had():
    plain, biased = (
        str(jax.make_jaxpr(latent_moe, static_argnums=2)(param_shapes(config), jnp.ones((3, TOY.hidden_size)), config))
        for config in (TOY, BIASED)
    )
    assert len(plain.splitlines()) < len(biased.splitlines())
