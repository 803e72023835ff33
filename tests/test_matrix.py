"""The layer with its gradients under every transformation and mode of JAX, for every router, score, norm, activation.

The routers have capacities, groups, sinkhorn, jitter, quantile balancing, or tokens rounded to tiles. Some layers have
biases and a gate of the shared expert. The experts' forward products are in float32 or FP8, and their input gradients
too. A cell compares values and gradients with the float64 oracle, or expects the documented refusal.
"""

import dataclasses
import functools
import itertools
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P, export
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding

from jax_latent_moe import InputError, Precision, RouterConfig, XlaBackend, latent_moe, total_loss
from jax_latent_moe.config import ACTIVATIONS, LATENT_NORMS, SCORE_FUNCTIONS
from tests import cases, oracle, seeds
from tests.cases import TOY
from tests.layers import cast
from tests.tolerances import assert_close, assert_trees_close

EVERY = "JAX_LATENT_MOE_WHOLE_MATRIX"
"""With this variable every family meets every mode and method. Without it, one that is drawn meets each mode."""

PARTS, TOKENS = 2, 6

LOSSES = dict(switch_loss_coef=0.3, sequence_loss_coef=0.2, z_loss_coef=0.1)
ROUTERS = {
    "grouped": RouterConfig(
        num_groups=2,
        topk_groups=2,
        per_expert_scale=True,
        capacity_factor=0.75,
        min_capacity=1,
        drop_policy="position",
        **LOSSES,
    ),
    "balanced": RouterConfig(
        selection="sinkhorn",
        correction_bias=False,
        input_jitter=0.125,
        capacity_factor=0.75,
        pad_to_capacity=True,
        global_loss_coef=0.1,
        **LOSSES,
    ),
    "quantile": RouterConfig(
        selection="logit", bias_update="quantile", logit_bias=True, capacity_factor=0.75, **LOSSES
    ),
    "tiles": RouterConfig(per_expert_scale=True, norm_topk_eps=0.25, round_to_tile=2, **LOSSES),
}
PRECISIONS = {
    "float32": None,
    "fp8 forward": Precision("fp8_block"),
    "fp8": Precision("fp8_block_pow2", "fp8_block"),
}


class Family(NamedTuple):
    """The parts of a cell's layer."""

    router: str
    score_function: str
    latent_norm: str
    activation: str
    precision: str


COLUMNS = (ROUTERS, SCORE_FUNCTIONS, LATENT_NORMS, ACTIVATIONS, PRECISIONS)
FAMILIES = [Family(*names) for names in itertools.product(*COLUMNS)]


def cells() -> list[tuple[str, Family, str]]:
    """(mode, family, method). Drawn ones have each part of a family about equally often."""
    methods = ("blocked", "ragged_dot")
    if EVERY in os.environ:
        return [(mode, family, method) for family in FAMILIES for mode, method in itertools.product(MODES, methods)]
    rng = seeds.generator("matrix")
    places = list(zip(MODES, rng.permutation(np.resize(methods, len(MODES))).tolist(), strict=True))
    columns = [rng.permutation(np.resize(list(column), len(places))) for column in COLUMNS]
    return [
        (mode, Family(*map(str, row)), method)
        for (mode, method), row in zip(places, zip(*columns, strict=True), strict=True)
    ]


@functools.cache
def drawn(family, method) -> list[cases.Case]:
    """A layer with masks, documents, capacity, losses and factors, and inputs [PARTS, TOKENS, d]."""
    router = dataclasses.replace(ROUTERS[family.router], score_function=family.score_function)
    eps = {} if family.latent_norm == "none" else {"latent_norm_eps": 1e-2}
    config = dataclasses.replace(
        TOY,
        router=router,
        latent_norm=family.latent_norm,
        activation=family.activation,
        precision=PRECISIONS[family.precision],
        shared_expert_gate=family.router in ("grouped", "tiles"),
        expert_bias=family.router in ("balanced", "tiles"),
        backend=XlaBackend(method),
        **eps,
    )
    rng = seeds.generator("matrix", *family, method)
    parts = []
    while len(parts) < PARTS:
        part = cases.random_inputs(rng, config, (1, TOKENS), masked=True)
        part = part._replace(segment_ids=rng.integers(2, size=(1, TOKENS)), seed=0 if router.input_jitter else None)
        if router.global_loss_coef:
            part = part._replace(global_counts=rng.integers(9, size=config.num_experts))
        part = part._replace(params=parts[0].params) if parts else part
        if part.is_comparable(rng):
            parts.append(part)
    return parts


def layer_with_gradients(config, params, x, optional, dy, transform=lambda function: function):
    """((y, losses), gradients of params and x) of sum(y * dy) and the losses."""
    key = jax.random.key(0) if config.router.input_jitter else None

    def objective(params, x):
        y, aux = transform(lambda params, x: latent_moe(params, x, config, key=key, **optional))(params, x)
        return jnp.sum(y.astype(dy.dtype) * dy) + total_loss(aux), (y, aux.losses)

    (_, outputs), grads = jax.value_and_grad(objective, (0, 1), has_aux=True)(params, x)
    return outputs, grads


def check(parts, found):
    """The results of each part, against the oracle; `found` holds one result for each."""
    for case, ((y, losses), (dparams, dx)) in zip(parts, found, strict=True):
        expected = case.oracle()
        wanted, wanted_x = oracle.backward(case.params, case.config, expected, case.dy)
        assert y.dtype == case.config.dtype
        assert_close(y, expected.y, "float32", "y")
        assert_trees_close(losses, expected.losses, "float32", "losses")
        assert_trees_close(dparams, wanted, "float32", "gradient")
        assert_close(dx, wanted_x, "float32", "gradient of x")


def arrays(parts):
    """params, and x, the optional arguments and dy of each part."""
    of_parts = []
    for case in parts:
        optional = {name: jnp.asarray(value) for name, value in case.optional().items() if name != "key"}
        of_parts.append((jnp.float32(case.x), optional, jnp.float32(case.dy)))
    return cast(parts[0].params, "float32"), of_parts


def one_by_one(parts, run):
    params, of_parts = arrays(parts)
    return [run(params, *part) for part in of_parts]


def stacked(parts, run):
    params, of_parts = arrays(parts)
    out = run(params, *jax.tree.map(lambda *values: jnp.stack(values), *of_parts))
    return [jax.tree.map(lambda leaf: leaf[i], out) for i in range(len(parts))]  # noqa: B023


def plain(f, parts):
    return one_by_one(parts, f)


def jitted(f, parts):
    return one_by_one(parts, jax.jit(f))


def vmapped(f, parts):
    return stacked(parts, jax.jit(jax.vmap(f, (None, 0, 0, 0))))


def scanned(f, parts):
    return stacked(parts, jax.jit(lambda params, *xs: jax.lax.map(lambda part: f(params, *part), xs)))


def rematerialised(f, parts):
    return one_by_one(parts, jax.jit(functools.partial(f, transform=jax.checkpoint)))


def in_shard_map(f, parts, check_vma):
    mesh = jax.make_mesh((PARTS,), ("parts",), axis_types=(AxisType.Auto,), devices=jax.devices()[:PARTS])
    split = P("parts")

    def local(params, *part):
        own = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, "parts", to="varying"), params) if check_vma else params
        return jax.tree.map(lambda leaf: leaf[None], f(own, *jax.tree.map(lambda value: value[0], part)))

    run = jax.shard_map(local, mesh=mesh, in_specs=(P(), split, split, split), out_specs=split, check_vma=check_vma)
    return stacked(parts, jax.jit(run))


def on_explicit_mesh(f, parts):
    mesh = jax.make_mesh((PARTS,), ("parts",), devices=jax.devices()[:PARTS])
    assert mesh.axis_types == (AxisType.Explicit,)
    with jax.set_mesh(mesh):
        split = NamedSharding(mesh, P(None, "parts"))

        def run(params, *part):
            def place(value):  # counts have no axis of tokens
                return jax.device_put(value, split) if value.ndim > 1 else value

            return jax.jit(f)(params, *jax.tree.map(place, part))

        return one_by_one(parts, run)


def exported(f, parts):
    """One program for any number of sequences and tokens."""
    params, of_parts = arrays(parts)
    batch, tokens = export.symbolic_shape("b, s")

    def symbolic(value):
        shape = (batch, tokens, *value.shape[2:]) if value.ndim > 1 else value.shape
        return jax.ShapeDtypeStruct(shape, value.dtype)

    shapes = jax.tree.map(symbolic, of_parts[0])
    program = export.export(jax.jit(f))(
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params), *shapes
    )
    return [program.call(params, *part) for part in of_parts]


def checked(f, parts, checks):
    run = jax.jit(checkify.checkify(f, errors=checks))

    def once(*arguments):
        error, out = run(*arguments)
        error.throw()
        return out

    return one_by_one(parts, once)


def within(context, compiled=True):
    def run(f, parts):
        params, of_parts = arrays(parts)
        with context():
            return [(jax.jit(f) if compiled else f)(params, *part) for part in of_parts]

    return run


def traced(context):
    """A mode that changes no program: it refuses operations while the layer is traced."""

    def run(f, parts):
        params, (part, *_) = arrays(parts)
        for dtype in ("float32", "bfloat16"):
            config = dataclasses.replace(f.args[0], dtype=dtype)
            with context():
                jax.eval_shape(functools.partial(f.func, config), params, *part)
        return []

    return run


MODES = {
    "eager": plain,
    "jit": jitted,
    "vmap": vmapped,
    "scan": scanned,
    "remat": rematerialised,
    "shard_map": functools.partial(in_shard_map, check_vma=True),
    "shard_map without check_vma": functools.partial(in_shard_map, check_vma=False),
    "explicit mesh": on_explicit_mesh,
    "symbolic export": exported,
    "float checks": functools.partial(checked, checks=checkify.float_checks),
    "index checks": functools.partial(checked, checks=checkify.index_checks),
    "debug_nans": within(lambda: jax.debug_nans(True)),
    "debug_nans, eager": within(lambda: jax.debug_nans(True), compiled=False),
    "x64": within(lambda: jax.enable_x64(True)),
    "strict promotion": traced(lambda: jax.numpy_dtype_promotion("strict")),
    "rank promotion": traced(lambda: jax.numpy_rank_promotion("raise")),
}


@pytest.fixture(autouse=True)
def hurried(drops_programs):
    """Each program runs once or twice, so it is compiled without costly optimisations."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.parametrize(
    ("mode", "family", "method"), cells(), ids=lambda part: part if isinstance(part, str) else "-".join(part)
)
def test_cell(mode, family, method):
    parts = drawn(family, method)
    config = parts[0].config

    def cell():
        found = MODES[mode](functools.partial(layer_with_gradients, config), parts)
        check(parts[: len(found)], found)

    if mode == "symbolic export" and config.router.pad_to_capacity:
        with pytest.raises(InputError, match="Set it to False to export the layer with symbolic sizes"):
            cell()
    elif mode == "index checks" and method == "blocked":
        with pytest.raises(checkify.JaxRuntimeError, match="out-of-bounds indexing"):  # docs/backends.md
            cell()
    elif mode == "index checks" and (config.precision is not None or config.expert_bias):
        try:  # blocks again, in FP8 products and in the biases' gradients; they may all end within the rows
            cell()
        except checkify.JaxRuntimeError as error:
            if "out-of-bounds indexing" not in str(error):
                raise
    elif mode == "shard_map" and config.activation in ("gelu", "geglu") and not erfc_has_types():
        with pytest.raises(ValueError, match="Primitive polynomial requires varying manual axes to match"):
            cell()
    else:
        cell()


@functools.cache
def erfc_has_types() -> bool:
    """Whether JAX itself takes the exact gelu in a shard_map with check_vma; 0.12 does not."""
    mesh = jax.make_mesh((2,), ("parts",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    slope = jax.vmap(jax.grad(functools.partial(jax.nn.gelu, approximate=False)))
    gelu = jax.shard_map(slope, mesh=mesh, in_specs=P("parts"), out_specs=P("parts"))
    try:
        jax.eval_shape(gelu, jax.ShapeDtypeStruct((2,), jnp.float32))
    except ValueError:
        return False
    return True


def test_forward_mode_by_two_transpositions(rng):
    """The routed block has only a reverse-mode rule; the transpose of a transpose is the documented way around."""
    (case, *_) = drawn(Family("grouped", "sigmoid", "none", "swiglu", "float32"), "blocked")
    params, ((x, optional, direction), *_) = arrays([case])

    def layer(x):
        return latent_moe(params, x, case.config, **optional)[0]

    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(layer, (x,), (direction,))

    @jax.jit
    def along(x, direction):
        y, pullback = jax.vjp(layer, x)
        return jax.vjp(lambda dy: pullback(dy)[0], jnp.zeros_like(y))[1](direction)

    (tangent,) = along(x, direction)
    # <dy, J direction> is <J^T dy, direction>, and the oracle has J^T dy; the direction is dy here.
    _, wanted = oracle.backward(case.params, case.config, case.oracle(), case.dy, dlosses=0.0)
    np.testing.assert_allclose(np.sum(np.float64(tangent) * case.dy), np.sum(wanted * case.dy), rtol=1e-4, atol=1e-5)
