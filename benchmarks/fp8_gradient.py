"""relu2's gradient and its codes in FP8: in the epilogue of the product, tile by tile, and in a kernel behind it.

The epilogue overwrites the hidden rows, so a call that is timed alone first copies them. Therefore a time here is the
sum of the kernels in a trace, without the copy.
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import kernel_table
from benchmarks.layers import products
from benchmarks.measure import Row, Session
from jax_latent_moe import CutlassBackend, LatentMoEConfig
from jax_latent_moe.device import current_device
from jax_latent_moe.formats import encode, encode_rows
from jax_latent_moe.grouped_matmul import Epilogue, Operand, Operands, problem, select
from jax_latent_moe.grouped_matmul.registry import Bound
from jax_latent_moe.grouped_matmul.tuning.timing import Candidate, jax_candidate, prepare
from jax_latent_moe.row_encoders import GradientEncoder, gradient_encoder

FORMAT = "fp8_block"
KERNELS = "grouped_kernel", "_gradient_blocks"
"""Parts of the names of the kernels that count. A table of kernels has # for the numbers in a name."""
STEPS = 12


def candidates(config: LatentMoEConfig, tokens: int) -> dict[str, Candidate]:
    """The gradient by each tile, "fused/<tile>", and "apart", by the plain product and a kernel behind it."""
    shape = products(config, tokens)["down"]
    latent, inner, device = shape.out_features, shape.in_features, current_device()
    apart = gradient_encoder(
        FORMAT, config.backend, inner, jnp.bfloat16, device, activation=config.bound_activation, residual="hidden"
    )
    assert apart is not None
    if apart.refusal is not None:
        print(f"{'left out':>10} gradient: {apart.refusal}", flush=True)
        return {}
    codes, w_shape = Operand(FORMAT), (shape.num_experts, inner, latent)
    epilogue = Epilogue(config.bound_activation, "hidden", encodes=FORMAT)
    asked = problem("dgrad", shape.rows, w_shape, "bfloat16", lhs=codes, rhs=codes, epilogue=epilogue)
    plain = problem("fwd", shape.rows, (shape.num_experts, latent, inner), "bfloat16", lhs=codes, rhs=codes)
    operands = _operands(shape.rows, w_shape, jnp.asarray(shape.group_sizes(np.random.default_rng(0))))
    found = {"apart": jax_candidate(_apart(select(plain, config.backend), apart), *operands)}
    fused = select(asked, CutlassBackend(fuse="always"))
    for tile in fused.backend.tiles(asked):
        name = f"{tile.rows}x{tile.columns}x{tile.stages} {'rows' if tile.rows_first else 'columns'} first"
        bound = Bound(fused.backend, asked, tile, "the benchmark", ())
        found[f"fused/{name}"] = jax_candidate(_fused(bound), *operands)
    return found


def _operands(rows: int, w_shape, sizes):
    experts, inner, latent = w_shape

    @jax.jit
    def draw():
        keys = jax.random.split(jax.random.key(0), 4)
        dout = jax.random.normal(keys[0], (rows, latent), jnp.bfloat16)
        w = jax.random.normal(keys[1], (experts, latent, inner), jnp.bfloat16)
        hidden = jnp.square(jax.nn.relu(jax.random.normal(keys[2], (rows, inner), jnp.bfloat16)))
        return encode_rows(dout, FORMAT), encode(w, FORMAT), hidden, jax.random.uniform(keys[3], (rows,))

    dout, w, hidden, weights = draw()
    return dout, w, sizes, hidden, weights


def _fused(bound: Bound):
    def call(*operands):
        outputs = bound(Operands(*operands))
        return outputs.out, outputs.codes, outputs.row_weight_gradients

    return call


def _apart(plain: Bound, gradient: GradientEncoder):
    def call(dout, w, sizes, hidden, weights):
        return gradient(plain(Operands(dout, w, sizes)).out, hidden, weights)

    return call


def measure(session: Session, suite: str, name: str, tokens: int, config: LatentMoEConfig) -> None:
    """One row for each way on a Hopper GPU. All must give equal bits."""
    shape = products(config, tokens)["down"]
    elements = shape.rows * shape.in_features
    traffic = 5 * elements + shape.rows * shape.out_features
    traffic += shape.num_experts * shape.in_features * shape.out_features
    flops = 2 * elements * shape.out_features
    calls, first = prepare(session.wanted(candidates(config, tokens))), None
    for impl, call in calls.items():
        kernels = kernel_table.kernels(kernel_table.trace_of_calls(call, STEPS), STEPS)
        ms = sum(kernel.us for kernel in kernels if any(part in kernel.name for part in KERNELS)) / 1e3
        session.record(
            Row(suite, name, "gradient", impl, ms, flops / ms / 1e9, session.floor_ms(flops / 2, traffic), None, None)
        )
        out = call.run()
        first = out if first is None else first
        same = jax.tree.map(lambda a, b: bool((a == b).all()), out, first)
        if not all(jax.tree.leaves(same)):
            print(f"{'WRONG':>10} {impl} differs from {next(iter(calls))}: {same}", flush=True)
