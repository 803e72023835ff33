"""Experts of few tokens and projections of one token, and their outputs in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jax_latent_moe import CutlassBackend, LatentMoEConfig, RouterConfig, decode, expert_plan, projections
from jax_latent_moe.decode import Decode, decoded_experts, plan_decode
from jax_latent_moe.device import Device
from jax_latent_moe.formats import ScaledArray, decoded, encode
from tests.kernels import layer_of
from tests.oracle.fused import activation_of_rows
from tests.tolerances import assert_close

BACKEND = CutlassBackend(decode="always")
SMALL = Device("gpu", "NVIDIA H100", num_sms=2)
WEIGHINGS = {
    "sigmoid over the sum": RouterConfig(routed_scaling_factor=2.5),
    "sigmoid": RouterConfig(norm_topk_eps=0.0, correction_bias=False),
    "softmax": RouterConfig(score_function="softmax", norm_topk_eps=0.0, correction_bias=False),
    "softmax of the chosen": RouterConfig(score_function="softmax_topk", norm_topk_prob=False),
    "with a small sum": RouterConfig(norm_topk_eps=1e-3),
}
"""Routers whose weights the kernel of the choice makes."""


def use_small(monkeypatch):
    """Plans are made for `SMALL`."""
    for module in (decode, expert_plan, projections):
        monkeypatch.setattr(module, "current_device", lambda: SMALL)


def layer(activation: str, latent: int, experts: int, top_k: int, inner: int, **changes) -> LatentMoEConfig:
    """A layer that may run in the kernels for few tokens."""
    config = dataclasses.replace(layer_of(activation), router=RouterConfig(norm_topk_prob=False), backend=BACKEND)
    sizes = dict(hidden_size=64, latent_size=latent, num_experts=experts, top_k=top_k, expert_intermediate_size=inner)
    return dataclasses.replace(config, **sizes | changes)


def experts_of(rng, config, format, dtype="bfloat16"):
    """w_in and w_out, dense in dtype or in a format's codes."""
    experts, latent, inner = config.num_experts, config.latent_width, config.expert_intermediate_size
    parts = 2 if config.gated else 1
    w_in, w_out = (
        jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[1]), dtype)
        for shape in ((experts, latent, parts * inner), (experts, inner, latent))
    )
    if format is None:
        return w_in, w_out
    encoded = jax.jit(encode, static_argnames=("name", "parts"))
    return encoded(w_in, name=format, parts=parts), encoded(w_out, name=format)


def expected(config, tokens, weights, ids, w_in, w_out) -> np.ndarray:
    """The weighted sums [T, l], from decoded weights."""
    w_in, w_out = (np.asarray(decoded(w, jnp.float32), np.float64) for w in (w_in, w_out))
    tokens, out = np.asarray(tokens.astype(jnp.float32), np.float64), np.zeros(tokens.shape)
    for token, choice in np.ndindex(ids.shape):
        expert = ids[token, choice]
        if 0 <= expert < len(w_in):
            hidden = activation_of_rows(config, (tokens[token] @ w_in[expert])[None])[0][0]
            out[token] += float(weights[token, choice]) * (hidden @ w_out[expert])
    return out


def only(weight, experts):
    """The weight with NaN in every expert that is not among these."""
    unread = np.setdiff1d(np.arange(weight.shape[0]), np.asarray(experts))
    if not isinstance(weight, ScaledArray):
        return weight.at[unread].set(jnp.nan)
    nan = {"float32": jnp.nan, "bfloat16": jnp.nan, "uint8": 255}
    scales = {
        name: leaf if name == "zero" else leaf.at[unread].set(nan[leaf.dtype.name])
        for name, leaf in weight.scales.items()
    }
    return dataclasses.replace(weight, scales=scales)


def check(rng, config, format, tokens, dtype="bfloat16", ids=None, device=SMALL, change=lambda w_in: w_in):
    """Values of the emulated kernels; nothing of the experts that no token chose, which are NaN."""
    w_in, w_out = experts_of(rng, config, format, dtype)
    w_in = change(w_in)
    experts, top_k = config.num_experts, config.top_k
    x = jnp.asarray(rng.normal(size=(tokens, config.latent_width)), dtype)
    weights = jnp.asarray(rng.normal(size=(tokens, top_k)), jnp.float32)
    ids = np.asarray(rng.integers(-1, experts + 1, (tokens, top_k)) if ids is None else ids, np.int32)
    plan = plan_decode(config, tokens, top_k, dtype, w_in, w_out, device=device)
    assert isinstance(plan, Decode), plan
    w_in, w_out = only(w_in, ids), only(w_out, ids)
    out = decoded_experts(plan, x, weights, jnp.asarray(ids), w_in, w_out)
    assert out.dtype == dtype
    with np.errstate(invalid="ignore"):
        assert_close(np.asarray(out, np.float64), expected(config, x, weights, ids, w_in, w_out), dtype)
    return plan


def no_usual(*arguments):
    """In place of what runs without the kernel of projections."""
    raise AssertionError("the kernel was refused")


def projection_operands(rng, k, experts, width, dtype="bfloat16", kernel_dtype="float32"):
    """x, the router's kernel and a projection; None for a weight without columns."""
    x, kernel, projection = (rng.normal(size=shape) for shape in ((1, k), (k, experts), (k, width)))
    kernel = jnp.asarray(kernel, kernel_dtype) if experts else None
    return jnp.asarray(x, dtype), kernel, jnp.asarray(projection, dtype) if width else None


def check_projections(x, kernel, projection, again=0):
    """Logits as exact as float32 sums, and a projection that is rounded once; NaN for a token that has one.

    It has the same bits when it runs so many times again.
    """
    config = layer("relu2", 32, 8, 2, 32)
    program = jax.jit(lambda *operands: projections.projections(config, no_usual, *operands))
    found = program(x, kernel, projection)
    for _ in range(again):
        for value, same in zip(jax.tree.leaves(program(x, kernel, projection)), jax.tree.leaves(found), strict=True):
            np.testing.assert_array_equal(value.astype(jnp.float32), same.astype(jnp.float32))
    exact = np.asarray(x.astype(jnp.float32), np.float64)
    kept = np.isfinite(exact).all(1)
    for product, weight, dtype in zip(found, (kernel, projection), (jnp.float32, x.dtype), strict=True):
        if weight is None:
            assert product is None
            continue
        assert product.dtype == dtype
        product, weight = (np.asarray(value.astype(jnp.float32), np.float64) for value in (product, weight))
        wanted, size = exact[kept] @ weight, np.abs(exact[kept]) @ np.abs(weight)
        rounding = 0 if dtype == jnp.float32 else float(jnp.finfo(dtype).eps)
        assert (np.abs(product[kept] - wanted) <= rounding * np.abs(wanted) + 2e-7 * size).all()
        assert np.isnan(product[~kept]).all()
