"""The kernel of the projections of one token: what it computes, emulated on the CPU, and where it is chosen."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_latent_moe import (
    CutlassBackend,
    ParallelConfig,
    RouterConfig,
    XlaBackend,
    decode,
    init_params,
    latent_moe,
    native,
    presets,
    projections,
)
from jax_latent_moe import expert_plan as expert_plans
from jax_latent_moe.device import Device
from jax_latent_moe.projections import parts_of, refusal_of_projections
from jax_latent_moe.varying import _varying_axes
from tests import emulated
from tests.few_tokens import BACKEND, check_projections, layer, no_usual, projection_operands
from tests.kernels import A100, H100

SMALL = Device("gpu", "NVIDIA H100", num_sms=2)
emulates = pytest.mark.skipif(emulated.missing() is not None, reason=f"{emulated.missing()}")
SUPER = dataclasses.replace(presets.NEMOTRON_3_SUPER, backend=BACKEND)
TARGET = "latent_moe_decode_projections"


def use(monkeypatch, device):
    for module in (decode, expert_plans, projections):
        monkeypatch.setattr(module, "current_device", lambda: device)


@pytest.fixture
def emulation(monkeypatch, install_library):
    """The kernels run on the CPU, as if it were a Hopper GPU with a library."""
    monkeypatch.setattr(native, "call", emulated.call)
    use(monkeypatch, SMALL)


@emulates
@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("parts", projections.PARTS)
def test_parts_of_the_contracted_axis(rng, monkeypatch, parts):
    """Several tiles of columns; more elements than are staged at once, and too few for every part."""
    monkeypatch.setattr(projections, "parts_of", lambda weights, num_sms: parts)
    for k, experts, width in ((700, 36, 72), (2300, 4, 8), (3, 8, 136)):
        check_projections(*projection_operands(rng, k, experts, width))


@emulates
@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_types_and_one_product_alone(rng, dtype):
    for kernel_dtype in ("float32", dtype):
        for experts, width in ((72, 0), (0, 72), (8, 8)):
            check_projections(*projection_operands(rng, 64, experts, width, dtype, kernel_dtype))


@emulates
@pytest.mark.usefixtures("emulation")
def test_what_is_not_finite(rng):
    """A token of NaN gives NaN. An infinite weight stays in its column: nothing multiplies it by 0."""
    x, kernel, projection = projection_operands(rng, 64, 8, 8)
    check_projections(x * jnp.nan, kernel, projection)
    weight = jnp.asarray(projection).at[3, 2].set(jnp.inf)
    out = projections.projections(SUPER, no_usual, x, None, weight)[1]
    assert np.isfinite(np.delete(np.asarray(out, np.float32), 2, axis=1)).all()


@emulates
@pytest.mark.usefixtures("emulation")
def test_under_vmap(rng):
    x, kernel, projection = projection_operands(rng, 64, 8, 16)
    tokens = jnp.stack([x, -x, 3 * x])
    program = functools.partial(projections.projections, SUPER, no_usual)
    wanted = [program(token, kernel, projection) for token in tokens]
    each = jax.vmap(program, (0, None, None))(tokens, kernel, projection)
    jax.tree.map(lambda a, *b: np.testing.assert_array_equal(a, np.stack(b)), each, *wanted)


@pytest.mark.usefixtures("install_library")
@pytest.mark.parametrize("split", ["rows", "columns"])
def test_in_a_users_shard_map(monkeypatch, split):
    """Each device calls it with its own part, and the results vary over the axis that splits an operand."""
    use(monkeypatch, H100)
    tokens = 2 if split == "rows" else 1
    shapes = ((tokens, 64), jnp.bfloat16), ((64, 8), jnp.float32), ((64, 16), jnp.bfloat16)
    rows, columns = (P("i"), P()) if split == "rows" else (P(), P(None, "i"))
    mesh = jax.sharding.AbstractMesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))

    def call(*operands):
        found = projections.projections(SUPER, no_usual, *operands)
        assert [value.shape for value in found] == ([(1, 8), (1, 16)] if split == "rows" else [(1, 4), (1, 8)])
        assert all(_varying_axes(value) == {"i"} for value in found)
        return found

    out = P("i") if split == "rows" else P(None, "i")
    program = jax.shard_map(call, mesh=mesh, in_specs=(rows, columns, columns), out_specs=out)
    assert str(jax.make_jaxpr(program)(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))).count(TARGET) == 1


@pytest.mark.usefixtures("install_library")
def test_a_program_calls_it_without_a_gradient_alone(monkeypatch):
    use(monkeypatch, H100)
    # A bias of the logits comes between the kernels, so one call does not run them all.
    router = RouterConfig(logit_bias=True)
    config = layer("relu2", 32, 8, 3, 32, dtype="bfloat16", param_dtype="bfloat16", router=router)
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    x = jax.ShapeDtypeStruct((1, 64), jnp.bfloat16)

    def loss(params, x, config=config):
        return jnp.sum(latent_moe(params, x, config)[0].astype(jnp.float32))

    assert str(jax.make_jaxpr(loss)(params, x)).count(TARGET) == 1  # the experts' call has the up-projection
    after_scaling = functools.partial(loss, config=dataclasses.replace(config, apply_routed_scale_to_output=True))
    assert str(jax.make_jaxpr(after_scaling)(params, x)).count(TARGET) == 2
    assert TARGET not in str(jax.make_jaxpr(jax.grad(loss))(params, x))
    full_width = dataclasses.replace(config, latent_size=None)
    wide = jax.eval_shape(lambda: init_params(jax.random.key(0), full_width))
    assert str(jax.make_jaxpr(functools.partial(loss, config=full_width))(wide, x)).count(TARGET) == 1


def planned(
    config=SUPER, rows=1, dtype="bfloat16", kernel=(512, "float32"), projection=(1024, "bfloat16"), device=H100
):
    def described(rows, columns, dtype):
        return jax.ShapeDtypeStruct((rows, columns), jnp.dtype(dtype))

    weights = (None if weight is None else described(4096, *weight) for weight in (kernel, projection))
    return refusal_of_projections(config, described(rows, 4096, dtype), *weights, device=device)


REFUSALS = {
    "backend": (dict(config=dataclasses.replace(SUPER, backend=XlaBackend())), "has no kernels for few tokens"),
    "decode": (dict(config=dataclasses.replace(SUPER, backend=CutlassBackend(decode="never"))), "decode is 'never'"),
    "device": (dict(device=A100), "compiled for NVIDIA Hopper GPUs"),
    "mesh": (dict(config=dataclasses.replace(SUPER, parallel=ParallelConfig())), "config.parallel is set"),
    "rows": (dict(rows=2), "the compiled kernel multiplies one token, not 2"),
    "measured": (dict(config=dataclasses.replace(SUPER, backend="auto"), rows=2), "leaves 2 tokens"),
    "dtype": (dict(dtype="float32"), "tokens are in float32"),
    "router": (
        dict(config=dataclasses.replace(SUPER, router=RouterConfig(dtype="bfloat16"))),
        "router.dtype is 'bfloat16', not 'float32'",
    ),
    "kernel": (dict(kernel=(512, "float16")), "the router's kernel is in float16, not in float32 or bfloat16"),
    "projection": (dict(projection=(1024, "float32")), "the projection's kernel is in float32, not in bfloat16"),
    "experts": (dict(kernel=(510, "float32")), "the 510 columns of the router's kernel are not a multiple of 4"),
    "narrow": (dict(kernel=(508, "bfloat16")), "the 508 columns of the router's kernel are not a multiple of 8"),
    "width": (
        dict(projection=(1020, "bfloat16")),
        "the 1020 columns of the projection's kernel are not a",
    ),
}


@pytest.mark.usefixtures("install_library")
def test_it_is_chosen():
    assert planned() is None
    assert planned(kernel=None) is None
    assert planned(projection=None) is None
    assert planned(kernel=(512, "bfloat16")) is None


@pytest.mark.usefixtures("install_library")
@pytest.mark.parametrize("name", REFUSALS)
def test_it_is_not_chosen(name):
    arguments, reason = REFUSALS[name]
    assert reason in str(planned(**arguments))


def test_the_parts_of_super():
    """192 blocks of 32 KiB or more for its router and down-projection, and 256 for its up-projection."""
    kernel, down, up = (np.zeros((1, size), np.float16) for size in (512, 1024, 4096))
    assert [parts_of(weights, 132) for weights in ([kernel, down], [up])] == [8, 4]


@pytest.mark.usefixtures("install_library")
def test_what_multiplies_is_said_in_a_line():
    """A reason where XLA does, and once if it is the same for both launches."""

    def told(tokens=1, device=H100, **changes):
        return projections.explain(dataclasses.replace(SUPER, **changes), tokens, device=device)

    kernel = "the compiled kernel for one token multiplies"
    assert told() == f"{kernel} the router's logits and both projections."
    assert told(latent_size=None) == f"{kernel} the router's logits."
    both = "XLA multiplies the router's logits and both projections"
    assert told(2) == f"{both}: the compiled kernel multiplies one token, not 2."
    assert told(device=A100).startswith(f"{both}: these kernels are compiled for NVIDIA Hopper GPUs")
    assert told(param_dtype="float16") == (
        "XLA multiplies the router's logits and the down-projection: the router's kernel is in float16, not in float32 "
        f"or bfloat16. {kernel} the up-projection."
    )
