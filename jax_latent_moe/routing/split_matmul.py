"""float32 products on matrix units that multiply bfloat16: the router's matmul on a GPU.

A float32 number is the sum of three bfloat16 numbers, and a product of two bfloat16 numbers is exact in float32, so a
float32 matmul with one operand in bfloat16 is three bfloat16 matmuls (Henry, Tang, Heinecke, arXiv 1904.06376),
where XLA runs a float32 one outside of the matrix units.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


@jax.custom_vjp
def split_matmul(x: Float[Array, "t d"], kernel: Float[Array, "d e"]) -> Float[Array, "t e"]:
    """The product x @ kernel in float32, for x in bfloat16 and a kernel in float32 or bfloat16.

    The product is as exact as a float32 matmul. The kernel's gradient reads that of the product to 16 bits; the
    gradient of x, which is returned in bfloat16, is made of bfloat16 operands, as that of any matmul in bfloat16 is.
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
    """split_matmul(x, kernel) and x @ other, all but the kernel in bfloat16.

    The gradient of x is one matmul of both products' gradients beside each other: autodiff would add those of two.
    """
    return split_matmul(x, kernel), x @ other


def _forward_beside(x, kernel, other):
    return split_matmul_beside(x, kernel, other), (x, kernel, other)


def _backward_beside(residuals, gradients):
    x, kernel, other = residuals
    # Each is there before they are joined, or XLA might compute it for each reader anew.
    dlogits, dproduct = jax.lax.optimization_barrier(gradients)
    both = jnp.concatenate([dlogits.astype(x.dtype), dproduct], axis=1)
    dx = both @ jnp.concatenate([kernel.astype(x.dtype), other], axis=1).T
    return dx, _kernel_gradient(x, kernel, dlogits), x.T @ dproduct


split_matmul_beside.defvjp(_forward_beside, _backward_beside)


def _kernel_gradient(x, kernel, dlogits):
    parts = _split(dlogits, 2)
    return _sum_of_parts(_matmul(x.T, jnp.concatenate(parts, axis=1)), len(parts)).astype(kernel.dtype)


def _split(values, count) -> list[Float[Array, "a b"]]:
    """Bfloat16 arrays that add up to the values' 8 * count highest bits; one where the values are bfloat16."""
    if values.dtype == jnp.bfloat16:
        return [values]
    parts = []
    for _ in range(count):
        # Written as a rounding to 8 bits, since the compiler may drop a cast to bfloat16 and back.
        part = lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        values = values - part
    return parts


def _matmul(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _sum_of_parts(product, count):
    """The product with [d, count * e] parts beside each other, added from the smallest up."""
    parts = jnp.split(product, count, axis=1)
    total = parts[-1]
    for part in parts[-2::-1]:
        total += part
    return total
