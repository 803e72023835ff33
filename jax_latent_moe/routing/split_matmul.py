"""The router's float32 matmul on a GPU, made of bfloat16 products for its matrix units.

A float32 number is the sum of three bfloat16 numbers, and the product of two bfloat16 numbers is exact in float32. So a
float32 matmul with one bfloat16 operand is three bfloat16 matmuls (Henry, Tang, Heinecke, arXiv 1904.06376). XLA
computes a float32 matmul without the matrix units.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


@jax.custom_vjp
def split_matmul(x: Float[Array, "t d"], kernel: Float[Array, "d e"]) -> Float[Array, "t e"]:
    """The product x @ kernel in float32, for x in bfloat16 and a kernel in float32 or bfloat16.

    The kernel is split without loss. Sums are rounded as the matrix units round them: on an H200 the relative error at
    d = 4096 is 4e-6, and that of XLA's float32 matmul is 1e-6. The gradient of a float32 kernel reads the product's
    gradient to 16 bits. The gradients of x and of a bfloat16 kernel read it in bfloat16, as in any bfloat16 matmul.
    """
    parts = _split(kernel, 3)
    return _sum_of_parts(_matmul(x, jnp.concatenate(parts, axis=1)), len(parts))


def _forward(x, kernel):
    return split_matmul(x, kernel), (x, kernel)


def _backward(residuals, dlogits):
    x, kernel = residuals
    return jnp.matmul(dlogits.astype(x.dtype), kernel.astype(x.dtype).T), _kernel_gradient(x, kernel, dlogits)


split_matmul.defvjp(_forward, _backward)


@jax.custom_vjp
def split_matmul_beside(
    x: Float[Array, "t d"], kernel: Float[Array, "d e"], other: Float[Array, "d l"]
) -> tuple[Float[Array, "t e"], Float[Array, "t l"]]:
    """split_matmul(x, kernel) and x @ other. All but the kernel are bfloat16.

    All gradients are two matmuls with the concatenated gradients of both products: one for x, one for both kernels.
    """
    return split_matmul(x, kernel), x @ other


def _forward_beside(x, kernel, other):
    return split_matmul_beside(x, kernel, other), (x, kernel, other)


def _backward_beside(residuals, gradients):
    x, kernel, other = residuals
    # Without the barrier, XLA may recompute each gradient for each of its readers.
    dlogits, dproduct = jax.lax.optimization_barrier(gradients)
    parts = _split(dlogits, _gradient_parts(kernel))
    narrow = kernel.astype(x.dtype)
    all_parts = jnp.concatenate([dproduct, *parts], axis=1)
    dx = all_parts @ jnp.concatenate([other] + [narrow] * len(parts), axis=1).T
    dother, dkernel = jnp.split(_matmul(x.T, all_parts), [other.shape[1]], axis=1)
    return dx, _sum_of_parts(dkernel, len(parts)).astype(kernel.dtype), dother.astype(other.dtype)


split_matmul_beside.defvjp(_forward_beside, _backward_beside)


def _gradient_parts(kernel) -> int:
    """Parts of the product's gradient that the kernel's gradient reads: no more than the kernel's dtype can show."""
    return 1 if kernel.dtype == jnp.bfloat16 else 2


def _kernel_gradient(x, kernel, dlogits):
    parts = _split(dlogits, _gradient_parts(kernel))
    return _sum_of_parts(_matmul(x.T, jnp.concatenate(parts, axis=1)), len(parts)).astype(kernel.dtype)


def _split(values, count) -> list[Float[Array, "a b"]]:
    """Bfloat16 arrays whose sum is the 8 * count highest bits of the values. Bfloat16 values are one array."""
    if values.dtype == jnp.bfloat16:
        return [values]
    parts = []
    for _ in range(count):
        # A rounding to 8 bits. The compiler may drop a cast to bfloat16 and back.
        part = lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        values = values - part
    return parts


def _matmul(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _sum_of_parts(product, count):
    """The sum of the `count` parts of a product [d, count * e], from the smallest part up."""
    parts = jnp.split(product, count, axis=1)
    total = parts[-1]
    for part in parts[-2::-1]:
        total += part
    return total
