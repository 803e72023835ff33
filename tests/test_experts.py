"""The routed block: its gradients by another route, and what it keeps for the backward pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import XlaBackend, experts
from jax_latent_moe.activations import activate
from jax_latent_moe.experts import routed_experts
from jax_latent_moe.grouped_matmul.xla import Xla
from jax_latent_moe.routing.permute import make_dispatch_plan
from tests.cases import TOY
from tests.tolerances import assert_close

TOKENS, K, EXPERTS, LATENT, INNER = 7, 3, 8, 6, 5
GATED = dataclasses.replace(TOY, activation="swiglu")


class KeepsGate:
    """Fuses swiglu as the compiled kernels do: gate and hidden rows side by side are what its gradient is made of."""

    def keeps_gate(self, activation):
        return activation.name == "swiglu"

    def matmul_activation(self, rows, w, group_sizes, *, activation, keep_pre):
        pre = XLA.matmul(rows, w, group_sizes, transpose_w=False)
        gate, hidden = pre[:, : pre.shape[1] // 2], activate(pre, GATED).astype(pre.dtype)
        return (jnp.concatenate([gate, hidden], axis=1), None) if keep_pre else (None, hidden)

    def matmul_activation_grad(self, dout, w, group_sizes, kept, row_weights, *, activation):
        dhidden = XLA.matmul(dout, w, group_sizes, transpose_w=True)
        gate, hidden = jnp.split(kept, 2, axis=1)
        value, slope = jax.jvp(jax.nn.silu, (gate,), (jnp.ones_like(gate),))
        up = jnp.where(value == 0, 0, hidden / jnp.where(value == 0, 1, value))
        dpre = jnp.concatenate([slope * up * dhidden, value * dhidden], axis=1)
        return row_weights[:, None] * dpre, None, jnp.sum(dhidden * hidden, axis=1), dout


XLA = Xla(XlaBackend())


@pytest.fixture(params=["plain", "gated", "gate kept"])
def config(request, monkeypatch):
    """A relu2 layer, a swiglu layer, and one whose backend keeps gate and hidden rows."""
    if request.param == "gate kept":
        monkeypatch.setattr(experts, "_fusing", lambda config, contraction, rows, w: KeepsGate())
    return TOY if request.param == "plain" else GATED


def draw(rng, config):
    gate = (2,) if config.gated else ()
    shapes = (TOKENS, LATENT), (TOKENS, K), (EXPERTS, LATENT, *gate, INNER), (EXPERTS, INNER, LATENT)
    ids = rng.integers(-1, EXPERTS, size=(TOKENS, K))
    tokens, weights, w_in, w_out = (jnp.float32(rng.normal(size=shape)) for shape in shapes)
    return ids, (tokens, jnp.where(ids < 0, 0, weights), w_in, w_out)


def dense(config, ids, tokens, weights, w_in, w_out):
    """Every expert on every token, one-hot weights: what autodiff then makes of it shares no rule with the library."""
    one_hot = jnp.asarray(np.eye(EXPERTS + 1, dtype=np.float32)[ids][..., :EXPERTS])
    pre = jnp.einsum("tl,el...->te...", tokens, w_in).reshape(TOKENS, EXPERTS, -1)
    out = jnp.einsum("tem,eml->tel", activate(pre, config), w_out)
    return jnp.einsum("tk,tke,tel->tl", weights, one_hot, out)


def test_gradients_equal_those_of_a_dense_formulation(rng, config):
    ids, arrays = draw(rng, config)
    dout = rng.normal(size=(TOKENS, LATENT)).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def outputs(function, *arrays):
        out, pullback = jax.vjp(function, *arrays)
        return out, *pullback(dout)

    def ours(*arrays):
        return routed_experts(config, *arrays, make_dispatch_plan(jnp.asarray(ids), EXPERTS))

    names = ("out", "tokens", "weights", "w_in", "w_out")
    expected = outputs(functools.partial(dense, config, ids), *arrays)
    for name, value, wanted in zip(names, outputs(ours, *arrays), expected, strict=True):
        wanted = np.where(ids < 0, 0, wanted) if name == "weights" else wanted
        value = np.where(ids < 0, 0, value) if name == "weights" else value
        assert_close(value, wanted, "float32", name)


def test_gradients_of_weights_hold_for_the_smallest(rng, config):
    """Where gradients are weighted before the product, a weight's is a quotient, and 0 for a weight of 0."""
    ids, arrays = draw(rng, config)
    ids = np.abs(ids)
    tokens, weights, w_in, w_out = arrays
    small = np.full(weights.shape, 1.0, np.float32)
    small[::2], small[1, 1] = 1e-25, 0.0
    arrays = tokens, weights * small, w_in, w_out

    def gradient(function):
        return jax.grad(lambda weights: jnp.sum(function(tokens, weights, w_in, w_out)))(arrays[1])

    ours = gradient(lambda *arrays: routed_experts(config, *arrays, make_dispatch_plan(jnp.asarray(ids), EXPERTS)))
    wanted = gradient(functools.partial(dense, config, ids))
    if config.activation == "relu2" or experts._fusing(config, "dgrad", tokens, w_out):
        wanted = jnp.where(arrays[1] == 0, 0, wanted)
    assert_close(ours, wanted, "float32")


def test_residuals_are_tokens_weights_routing_and_one_array_of_rows(rng, config):
    """No gathered copy of the tokens, not both pre-activations and hidden rows, no expert outputs."""
    ids, arrays = draw(rng, config)
    plan = make_dispatch_plan(jnp.asarray(ids), EXPERTS)
    _, pullback = jax.vjp(lambda *arrays: routed_experts(config, *arrays, plan), *arrays)
    rows, gate = TOKENS * K, 2 if config.gated else 1
    kept = {leaf.shape for leaf in jax.tree.leaves(pullback) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    allowed = {(TOKENS, LATENT), (TOKENS, K), (rows, gate * INNER), (EXPERTS, LATENT, gate * INNER), arrays[3].shape}
    assert kept <= allowed
    assert sum(leaf.shape[:1] == (rows,) and leaf.ndim == 2 for leaf in jax.tree.leaves(pullback)) == 1


def test_no_expert_at_all_gives_zeros(rng):
    _, arrays = draw(rng, TOY)
    plan = make_dispatch_plan(jnp.full((TOKENS, K), -1), EXPERTS)
    out, pullback = jax.vjp(lambda *arrays: routed_experts(TOY, *arrays, plan), *arrays)
    assert not np.asarray(out).any()
    for gradient in pullback(jnp.ones_like(out)):
        assert not np.asarray(gradient).any()


def test_what_no_kernel_would_read_is_not_kept(rng, monkeypatch):
    """Where the gradient is left to XLA, a backend that would keep the gate does not make hidden rows either."""
    ids, arrays = draw(rng, GATED)
    monkeypatch.setattr(
        experts, "_fusing", lambda config, contraction, rows, w: KeepsGate() if contraction == "fwd" else None
    )
    plan = make_dispatch_plan(jnp.asarray(ids), EXPERTS)
    out, pullback = jax.vjp(lambda *arrays: routed_experts(GATED, *arrays, plan), *arrays)
    wanted, dense_pullback = jax.vjp(functools.partial(dense, GATED, ids), *arrays)
    assert_close(out, wanted, "float32")
    for value, expected in zip(pullback(wanted)[2:], dense_pullback(wanted)[2:], strict=True):
        assert_close(value, expected, "float32")
