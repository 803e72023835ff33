"""Products of FP8 codes beside products of bfloat16, and what encoding costs: the suite "fp8" of `benchmarks.gpu`.

"product" is rows x w with operands in the format of each implementation. "hidden rows" is the product with relu2 in its
epilogue, whose result is bfloat16 or codes, where the width grows and compiled kernels run. "encode rows" and "encode
weight" make the codes, and "encode both" makes those of a weight in both layouts, as a training step does. torch's
scaled product has one scale for each row and each output, so it promotes nothing on the way.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.matmuls import keep_fastest_of_sweeps, max_error, reference
from benchmarks.measure import Row, Session
from benchmarks.peers import torch_grouped_mm
from benchmarks.problems import Grouped
from jax_latent_moe import CutlassBackend, PallasBackend, PallasFp8Tile
from jax_latent_moe.activations import BoundActivation
from jax_latent_moe.formats import encode, encode_rows
from jax_latent_moe.formats.both_layouts import kernel_encodes
from jax_latent_moe.grouped_matmul import Epilogue, Operands, grouped_matmul, operand_of, problem, select
from jax_latent_moe.grouped_matmul.cutlass_sm90 import tiles as cutlass_tiles
from jax_latent_moe.grouped_matmul.pallas_sm90.tiles import tiles
from jax_latent_moe.grouped_matmul.tuning.timing import Candidate, jax_candidate, prepare, time_in_turn
from jax_latent_moe.precision import Precision, encode_weights
from jax_latent_moe.routing.compiled import compiled_runs

FORMAT = "fp8_block"


def candidates(shape: Grouped, operands: dict, sizes, *, quick: bool) -> dict[str, Candidate]:
    """The products by name; a sweep's are named "<backend>_fp8_tuned/<tile>"."""
    found = {}
    for name in ("bfloat16", "fp8"):
        found[name] = jax_candidate(grouped_matmul, *operands[name], sizes)
    (x, dense_w), (rows, w) = operands["bfloat16"], operands["fp8"]
    asked = problem("fwd", shape.rows, w.shape, rows.dtype, lhs=operand_of(rows), rhs=operand_of(w))
    for tile in () if quick else cutlass_tiles.tiles(asked):
        call = functools.partial(grouped_matmul, backend=CutlassBackend(matmul_tile=tile))
        name = f"{tile.rows}x{tile.columns}x{tile.stages} {'rows' if tile.rows_first else 'columns'} first"
        found[f"cutlass_fp8_tuned/{name}"] = jax_candidate(call, rows, w, sizes)
    for tile in () if quick else tiles(asked):
        assert isinstance(tile, PallasFp8Tile)
        call = functools.partial(grouped_matmul, backend=PallasBackend(fp8_tile=tile))
        name = f"{tile.rows}x{tile.columns}x{tile.stages} band {tile.band} cluster {tile.cluster}"
        found[f"pallas_fp8_tuned/{name}"] = jax_candidate(call, rows, w, sizes)
    found["torch_scaled_grouped_mm"] = torch_grouped_mm.scaled_candidate(x, dense_w, sizes)
    return found


def hidden_rows(operands: dict, sizes) -> dict[str, Candidate]:
    """The products with relu2 by name. FP8 stores the hidden rows as codes, and bfloat16 as they are."""
    found = {}
    for name, (rows, w) in operands.items():
        epilogue = Epilogue(BoundActivation("relu2"), None, encodes=FORMAT if name == "fp8" else None)
        lhs, rhs = operand_of(rows), operand_of(w)
        asked = problem("fwd", rows.shape[0], w.shape, jnp.bfloat16, lhs=lhs, rhs=rhs, epilogue=epilogue)
        run = select(asked)
        found[name] = jax_candidate(lambda rows, w, sizes, run=run: run(Operands(rows, w, sizes)).out, rows, w, sizes)
    return found


def measure(session: Session, suite: str, shapes: dict[str, Grouped]) -> None:
    """One row per shape, pass and implementation. Errors are those against the dense operands, FP8's own included."""
    for name, shape in shapes.items():
        sizes = shape.group_sizes(np.random.default_rng(0))
        x, w, dout = shape.operands(0)
        encoders = {
            "encode rows": (functools.partial(encode_rows, name=FORMAT), x),
            "encode weight": (functools.partial(encode, name=FORMAT), w),
        }
        rows, codes = (jax.jit(encoder)(array) for encoder, array in encoders.values())
        operands = {"bfloat16": (x, w), "fp8": (rows, codes)}
        found = candidates(shape, operands, jnp.asarray(sizes), quick=session.quick)
        calls = keep_fastest_of_sweeps(prepare(session.wanted(found)))
        expected = reference("forward", x, w, dout, sizes)
        errors = {impl: max_error("forward", call.run(), expected, sizes) for impl, call in calls.items()}
        flops = 2 * shape.rows * shape.in_features * shape.out_features
        weights = int((sizes > 0).sum()) * shape.in_features * shape.out_features
        for impl, ms in time_in_turn(calls, 12, session.rounds).items():
            wide = impl == "bfloat16"
            traffic = (2 if wide else 1) * (
                shape.rows * shape.in_features + weights
            ) + 2 * shape.rows * shape.out_features
            floor = session.floor_ms(flops if wide else flops / 2, traffic)
            row = Row(suite, name, "product", impl, ms, flops / ms / 1e9, floor, errors[impl], calls[impl].temp_bytes)
            session.record(row)
        if shape.out_features > shape.in_features and compiled_runs("auto"):
            traffic = shape.rows * (shape.in_features + shape.out_features) + weights
            floors = {n: session.floor_ms(flops * s / 2, traffic * s) for n, s in (("bfloat16", 2), ("fp8", 1))}
            _time(session, suite, name, "hidden rows", hidden_rows(operands, jnp.asarray(sizes)), floors)
        for pass_, (encoder, array) in encoders.items():
            floors = {FORMAT: session.floor_ms(0, 3 * array.size)}
            _time(session, suite, name, pass_, {FORMAT: jax_candidate(encoder, array)}, floors)
        both = both_layouts_of(w)
        _time(session, suite, name, "encode both", both, dict.fromkeys(both, session.floor_ms(0, 4 * w.size)))


def both_layouts_of(w) -> dict[str, Candidate]:
    """The encoders of a weight in both layouts that run here, by name."""
    names = {"xla": False} | ({"cutlass": True} if compiled_runs("auto") and kernel_encodes(w, FORMAT, 1) else {})
    both = Precision(FORMAT, FORMAT)
    return {
        name: jax_candidate(lambda w, c=compiled: encode_weights(both, w, w[:0], gated=False, compiled=c), w)
        for name, compiled in names.items()
    }


def _time(session: Session, suite: str, shape: str, pass_: str, found: dict[str, Candidate], floors: dict[str, float]):
    made = prepare(session.wanted(found))
    for impl, ms in time_in_turn(made, 12, session.rounds).items():
        session.record(Row(suite, shape, pass_, impl, ms, 0.0, floors[impl], None, made[impl].temp_bytes))
