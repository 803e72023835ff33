"""A torch layer as candidates: forward without a graph, and forward with all gradients."""

import functools
from collections.abc import Callable

from benchmarks.peers.torch_grouped_mm import torch_call
from jax_latent_moe.grouped_matmul.tuning.timing import Candidate


def candidates(make: Callable, x, dy) -> dict[str, Candidate]:
    """One candidate per pass: forward without a graph; forward_backward with gradients of x and of every parameter.

    Args:
        make: returns a function from tokens [T, d] to [T, d], and its parameters, a tuple of tensors. It is called when
            a pass is lowered. If it raises an error, the layer is left out.
        x: [T, d].
        dy: [T, d].
    """

    @functools.cache
    def build():
        layer, parameters = make()
        import torch  # pyright: ignore[reportMissingImports]

        return layer, parameters, *(torch.from_dlpack(array) for array in (x, dy))

    def forward():
        layer, _, tokens, _ = build()
        import torch  # pyright: ignore[reportMissingImports]

        def run():
            with torch.no_grad():
                return layer(tokens)

        call = torch_call(run)
        return lambda: call

    def forward_backward():
        layer, parameters, tokens, cotangents = build()
        import torch  # pyright: ignore[reportMissingImports]

        tokens = tokens.detach().clone().requires_grad_()

        def run():
            y = layer(tokens)
            return (y.detach(), *torch.autograd.grad(y, (tokens, *parameters), cotangents))

        call = torch_call(run)
        return lambda: call

    return {"forward": forward, "forward_backward": forward_backward}
