"""The head and its loss in one: cross-entropy of the next token that never holds all logits at once.

Logits of one chunk of positions are made, their gradient is taken on the spot, and both are dropped; what stays is the
gradient of the head's input and of its kernel. As the loss is one number, its own gradient is a factor on these.
The idea is Liger Kernel's (Hsu et al., arXiv 2410.10989).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LOGITS = 2**27
"""Most logits that are held at once: half a gigabyte in float32."""


@jax.custom_vjp
def cross_entropy(
    x: Float[Array, "batch time d"],
    kernel: Float[Array, "d v"],
    targets: Int[Array, "batch time"],
    weights: Float[Array, "batch time"],
) -> Float[Array, ""]:
    """Sum over positions of weight times -log softmax(x @ kernel)[target], in nats.

    Operands are read in x's dtype; logits, their softmax and the sum are float32.

    Args:
        x: what the head reads.
        kernel: the head's, in the parameters' dtype.
        targets: tokens to come.
        weights: of each position, float32; they get no gradient.
    """
    narrow = kernel.astype(x.dtype)

    def add(total, part):
        return total + _loss_and_gradient(narrow, *part)[0], None

    return _over_chunks(add, jnp.float32(0), (x, targets, weights), kernel)[0]


def _forward(x, kernel, targets, weights):
    narrow = kernel.astype(x.dtype)

    def add(total, part):
        loss, dlogits = _loss_and_gradient(narrow, *part)
        dx = jnp.einsum("btv,dv->btd", dlogits, narrow)
        dkernel = jnp.einsum("btd,btv->dv", part[0], dlogits, preferred_element_type=jnp.float32)
        return (total[0] + loss, total[1] + dkernel), dx

    zero = jnp.float32(0), jnp.zeros(kernel.shape, jnp.float32)
    (loss, dkernel), dx = _over_chunks(add, zero, (x, targets, weights), kernel)
    return loss, (dx, dkernel.astype(kernel.dtype))


def _backward(residuals, gradient):
    dx, dkernel = residuals
    return (gradient * dx).astype(dx.dtype), (gradient * dkernel).astype(dkernel.dtype), None, None


cross_entropy.defvjp(_forward, _backward)


def _loss_and_gradient(kernel, x, targets, weights):
    """The sum of a chunk and its gradient by the logits, in the kernel's dtype."""
    logits = jnp.einsum("btd,dv->btv", x, kernel, preferred_element_type=jnp.float32)
    hot = targets[..., None] == jnp.arange(kernel.shape[1])
    normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    nats = normaliser[..., 0] - jnp.sum(jnp.where(hot, logits, 0), axis=-1)
    gradient = weights[..., None] * (jnp.exp(logits - normaliser) - hot)
    return jnp.sum(weights * nats), gradient.astype(kernel.dtype)


def chunk_count(batch: int, time: int, vocabulary: int, devices: int = 1) -> int:
    """The fewest equal parts of the time axis whose logits, on one of the devices, are at most `LOGITS`."""
    enough = (n for n in range(1, time + 1) if time % n == 0 and batch * (time // n) * vocabulary <= LOGITS * devices)
    return next(enough, time)


def _over_chunks(add, total, parts, kernel):
    """Scans `add` over chunks of the time axis; what it returns beside the total is put together along that axis."""
    batch, time = parts[1].shape
    mesh = jax.sharding.get_abstract_mesh()
    count = chunk_count(batch, time, kernel.shape[1], 1 if mesh.empty else mesh.size)
    if count == 1:
        return add(total, parts)
    split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(batch, count, -1, *x.shape[2:]), 1, 0), parts)
    total, made = jax.lax.scan(add, total, split)
    return total, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, time, *x.shape[3:]), made)
