"""The output head and the cross-entropy as one function, which never holds all logits at once.

The forward pass goes over the positions in chunks. It computes the logits of a chunk and their gradient, and drops
both. It keeps the gradients of the head's input and kernel. The loss is one number, so the backward pass only scales
these two. The method is from Liger Kernel (Hsu et al., arXiv 2410.10989).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LOGITS = 2**27
"""The largest number of logits that a device holds at once. In float32 they take half a gigabyte."""


@jax.custom_vjp
def cross_entropy(
    x: Float[Array, "batch time d"],
    kernel: Float[Array, "d v"],
    targets: Int[Array, "batch time"],
    weights: Float[Array, "batch time"],
) -> Float[Array, ""]:
    """The sum over positions of weight times -log softmax(x @ kernel)[target], in nats.

    The operands are read in x's dtype. Logits, softmax and sum are float32.

    Args:
        x: the input of the head.
        kernel: the kernel of the head, in the dtype of the parameters.
        targets: the next token of each position.
        weights: the weight of each position, in float32. Weights get no gradient.
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
    """The loss of a chunk, and its gradient with respect to the logits in the kernel's dtype."""
    logits = jnp.einsum("btd,dv->btv", x, kernel, preferred_element_type=jnp.float32)
    hot = targets[..., None] == jnp.arange(kernel.shape[1])
    normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    nats = normaliser[..., 0] - jnp.sum(jnp.where(hot, logits, 0), axis=-1)
    gradient = weights[..., None] * (jnp.exp(logits - normaliser) - hot)
    return jnp.sum(weights * nats), gradient.astype(kernel.dtype)


def chunk_count(batch: int, time: int, vocabulary: int, devices: int = 1) -> int:
    """The smallest number of equal chunks of the time axis such that a device holds at most `LOGITS` logits."""
    enough = (n for n in range(1, time + 1) if time % n == 0 and batch * (time // n) * vocabulary <= LOGITS * devices)
    return next(enough, time)


def _over_chunks(add, total, parts, kernel):
    """Scans `add` over chunks of the time axis. Returns the total, and the other results joined along that axis."""
    batch, time = parts[1].shape
    mesh = jax.sharding.get_abstract_mesh()
    count = chunk_count(batch, time, kernel.shape[1], 1 if mesh.empty else mesh.size)
    if count == 1:
        return add(total, parts)
    split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(batch, count, -1, *x.shape[2:]), 1, 0), parts)
    total, made = jax.lax.scan(add, total, split)
    return total, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, time, *x.shape[3:]), made)
