"""The kernels that list the rows of each expert: what they compute, emulated on the CPU, and where they are chosen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import decode, expert_plan, init_params, latent_moe, native, presets, projections, quantize
from jax_latent_moe.config import RouterConfig, XlaBackend
from jax_latent_moe.decode import Decode, decoded_experts, plan_decode
from jax_latent_moe.errors import InputError
from jax_latent_moe.formats import ScaledArray
from jax_latent_moe.grouped_matmul.cutlass_sm90.codes import CODES
from tests import emulated
from tests.few_tokens import BACKEND, SMALL, check, expected, experts_of, layer
from tests.kernels import H200
from tests.tolerances import assert_close

FORMATS = tuple(CODES)
SUPER = dataclasses.replace(presets.NEMOTRON_3_SUPER, backend=BACKEND)
emulates = pytest.mark.skipif(emulated.missing() is not None, reason=f"{emulated.missing()}")


@pytest.fixture
def emulation(monkeypatch, install_library):
    """The kernels run on the CPU, as if it were a Hopper GPU with a library. Every call lists its rows."""
    monkeypatch.setattr(native, "call", emulated.call)
    monkeypatch.setattr(decode, "MOST_TOKENS_UNLISTED", {1: 0, 2: 0})
    monkeypatch.setattr(decode, "MOST_LISTED_OF_AN_EXPERT", 1 << 20)
    for module in (decode, expert_plan, projections):
        monkeypatch.setattr(module, "current_device", lambda: SMALL)


def checked(*arguments, **options):
    plan = check(*arguments, **options)
    assert plan.rows
    return plan


@emulates
@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("format", FORMATS)
def test_formats(rng, format):
    """Passes of 8 and of 16 rows, several tiles, and experts without rows."""
    assert checked(rng, layer("relu2", 256, 40, 3, 384), format, 16).rows == 8
    assert checked(rng, layer("swiglu", 128, 4, 2, 128), format, 21).rows == 16


@emulates
@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "geglu", "geglu_tanh", "situ_glu"])
def test_activations(rng, name):
    checked(rng, layer(name, 96, 3, 2, 32), "mxfp4", 5)
    if name == "situ_glu":
        config = dataclasses.replace(layer(name, 96, 3, 2, 32), situ_linear_beta=None, situ_beta=0.5)
        checked(rng, config, "fp8_block", 5)


@emulates
@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize(("format", "latent", "inner"), [("fp8_block", 208, 176), ("mxfp4", 96, 160), ("int8", 48, 16)])
def test_sizes_that_no_tile_divides(rng, format, latent, inner):
    for name, tokens in (("relu2", 1), ("swiglu", 19)):
        checked(rng, layer(name, latent, 9, 5, inner), format, tokens)


@emulates
@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("format", ["fp8_block", "mxfp4"])
def test_all_tokens_on_one_expert(rng, format):
    """More rows than a pass, and the same expert several times among the choices of a token."""
    config = layer("swiglu", 96, 4, 3, 32)
    checked(rng, config, format, 15, ids=np.full((15, 3), 2))
    checked(rng, dataclasses.replace(config, num_experts=60), format, 4, ids=np.full((4, 3), 59))
    checked(rng, config, format, 1, ids=[[1, 1, 1]])


@emulates
@pytest.mark.usefixtures("emulation")
def test_every_pattern_of_experts_without_rows(rng):
    """All patterns of 6 experts, and no expert at all."""
    config = layer("relu2", 32, 6, 4, 32)
    for pattern in range(1 << 6):
        chosen = [expert for expert in range(6) if pattern >> expert & 1] or [-1, 6]
        checked(rng, config, "int8", 3, ids=rng.choice(chosen, (3, 4)))


@emulates
@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("tokens", [16, 64, 256])
def test_numbers_of_tokens(rng, tokens):
    checked(rng, layer("relu2", 32, 300, 6, 32), "int4_32_zero", tokens)


@emulates
@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("format", ["int8", "nvfp4"])
def test_more_inputs_than_shared_memory_holds_at_once(rng, format):
    """Passes of both heights, and blocks whose tiles have the same rows."""
    assert checked(rng, layer("relu2", 3072 + 160, 30, 2, 160), format, 3).rows == 8
    assert checked(rng, layer("relu2", 3072 + 160, 2, 2, 160), format, 5).rows == 16


@emulates
@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("format", ["fp8_block", "int8", "mxfp4", "nvfp4", "int4_32_zero"])
@pytest.mark.parametrize("inner", [1184, 3072 + 544])
def test_units_in_two_pieces(rng, format, inner):
    """8 or 4 blocks share 10 units of the second product."""
    config = layer("relu2", 160, 5, 2, inner)
    assert checked(rng, config, format, 5, ids=np.arange(10).reshape(5, 2) % 5).rows == 8
    assert checked(rng, config, format, 40, ids=np.arange(80).reshape(40, 2) % 5).rows == 16


@emulates
@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize(("format", "inner"), [("mxfp4", 2688), ("nvfp4", 1792)])
def test_units_in_two_pieces_of_large_blocks(rng, format, inner):
    """4 blocks of 512 threads share 5 units."""
    checked(rng, layer("relu2", 160, 5, 2, inner), format, 5, ids=np.arange(10).reshape(5, 2) % 5)


@emulates
@pytest.mark.usefixtures("emulation")
def test_pieces_are_in_any_order(rng):
    """8 blocks share 9 units, so the second piece may be stored first. With fewer units than blocks, none is cut."""
    config = layer("relu2", 128, 9, 1, 1184)
    checked(rng, config, "int8", 9, ids=np.arange(9)[:, None])
    checked(rng, dataclasses.replace(config, num_experts=2), "int8", 1, ids=[[0]])


@emulates
@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize(
    ("format", "name", "latent", "inner"),
    [
        ("mxfp4", "relu2", 1024, 160),
        ("mxfp4", "swiglu", 2048, 32),
        ("mxfp4", "relu2", 2688, 288),
        ("nvfp4", "swiglu", 512, 96),
        ("nvfp4", "relu2", 1792, 32),
    ],
)
def test_scales_in_shared_memory(rng, format, name, latent, inner):
    """Features' scales with gaps behind them and without, in blocks of 256 and of 512 threads."""
    checked(rng, layer(name, latent, 3, 2, inner), format, 4)


@emulates
@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("loud", [slice(None, None, 3), slice(41, 42)])
def test_scales_that_take_two_factors(rng, loud):
    """In all units, and in one of several."""

    def louder(w_in):
        scales = w_in.scales["block"]
        return dataclasses.replace(w_in, scales={"block": scales.at[:, :, loud].add(20)})

    checked(rng, layer("relu2", 256, 3, 2, 64), "mxfp4", 4, change=louder)
    checked(rng, layer("relu2", 3232, 3, 2, 64), "mxfp4", 1, change=louder)


@emulates
@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("format", ["fp8_block", "int8", "mxfp4"])
def test_nan_stays_where_it_is(rng, format):
    """In the token that has it, and in the experts whose codes have it. Padding rows leak nowhere."""
    config = layer("relu2", 160, 4, 2, 96)
    w_in, w_out = experts_of(rng, config, format)
    if format != "int8":
        # The last codes of the contracted axis, behind which a step ends early, and a neighbour's scale.
        assert isinstance(w_in, ScaledArray)
        codes, scales = w_in.codes, w_in.scales
        codes = codes.at[1, :, :, -1].set(0x7F) if format == "fp8_block" else codes
        scales = scales if format == "fp8_block" else {"block": scales["block"].at[1, :, :, -1].set(255)}
        w_in = ScaledArray(codes, scales, w_in.format)
    plan = plan_decode(config, 6, 2, "bfloat16", w_in, w_out, device=SMALL)
    assert isinstance(plan, Decode), plan
    assert plan.rows
    x = jnp.asarray(rng.normal(size=(6, 160)), jnp.bfloat16).at[jnp.asarray([1, 4, 5])].set(jnp.nan)
    ids = np.asarray([[3, 0], [3, 0], [-1, 4], [0, 2], [-1, -7], [4, 1 << 30]], np.int32)
    weights = jnp.asarray(rng.normal(size=(6, 2)), jnp.float32).at[jnp.asarray([2, 4, 5])].set(jnp.nan)
    out = np.asarray(decoded_experts(plan, x, weights, jnp.asarray(ids), w_in, w_out), np.float64)
    assert np.isnan(out[1]).all()
    assert (out[[2, 4, 5]] == 0).all()
    wanted = expected(config, x, weights, ids, w_in, w_out)
    assert_close(out[[0, 3]], wanted[[0, 3]], "bfloat16")
    if format != "int8":
        ids[0] = [1, 0]
        out = np.asarray(decoded_experts(plan, x, weights, jnp.asarray(ids), w_in, w_out), np.float64)
        assert np.isnan(out[0]).all()
        assert_close(out[3], wanted[3], "bfloat16")


@emulates
@pytest.mark.usefixtures("emulation")
def test_the_layer_runs_them_where_nothing_is_differentiated(rng):
    """As the portable backend computes it, dropped and masked tokens included."""
    router = RouterConfig(capacity_factor=0.5, norm_topk_prob=False)
    config = layer("relu2", 32, 8, 3, 32, router=router, dtype="bfloat16", param_dtype="bfloat16")
    params = quantize(init_params(jax.random.key(0), config), config, "nvfp4")
    x, mask = jnp.asarray(rng.normal(size=(3, 64)), jnp.bfloat16), jnp.asarray([True, False, True])
    ids = jnp.asarray([[0, 1, 2], [3, 4, 5], [1, 2, 5]], jnp.int32)  # experts keep one token each
    y, aux = jax.jit(latent_moe, static_argnums=2)(params, x, config, token_mask=mask, expert_ids=ids)
    portable = dataclasses.replace(config, backend=XlaBackend())
    wanted, _ = latent_moe(params, x, portable, token_mask=mask, expert_ids=ids)
    assert aux.dropped_per_expert.sum() == 2
    assert (y[1] == 0).all()
    assert_close(y.astype(jnp.float32), wanted.astype(jnp.float32), "bfloat16")


def planned(config, tokens, format="mxfp4", experts=512):
    config = dataclasses.replace(config, num_experts=experts)

    def make():
        params = init_params(jax.random.key(0), config)
        params = params if format is None else quantize(params, config, format)
        return params["experts"]["w_in"], params["experts"]["w_out"]

    return plan_decode(config, tokens, config.top_k, "bfloat16", *jax.eval_shape(make), device=H200)


@pytest.mark.usefixtures("install_library")
def test_the_plan_of_super():
    """Lists begin at 8 tokens, in 8 bits at 9. By themselves they take up to 64, and "always" asks for more."""
    assert [planned(SUPER, tokens, "int8").rows for tokens in (8, 9)] == [0, 8]
    for tokens, rows in ((7, 0), (8, 8), (64, 8), (93, 8), (94, 16), (256, 16), (372, 16)):
        plan = planned(SUPER, tokens)
        assert isinstance(plan, Decode), plan
        assert (plan.rows, plan.splits, plan.num_sms) == (rows, 1, H200.num_sms if rows else 0)
    assert str(planned(SUPER, 64)) == ("64 tokens with 22 choices each, w_in mxfp4, w_out mxfp4, 8 listed rows at once")
    auto = dataclasses.replace(SUPER, backend="auto")
    assert planned(auto, 64) == planned(SUPER, 64)
    assert "'measured' leaves 65 tokens" in str(planned(auto, 65))


@pytest.mark.usefixtures("install_library")
@pytest.mark.parametrize("experts", [4, 8, 15])
def test_few_experts_with_many_rows_are_left_to_grouped_matmuls_unless_asked(experts):
    """Their codes would be widened again for each pass."""
    config = dataclasses.replace(SUPER, num_experts=experts, top_k=4)
    auto = dataclasses.replace(config, backend="auto")
    assert isinstance(planned(config, 64, experts=experts), Decode)
    assert "leaves 64 tokens to the grouped matmuls" in str(planned(auto, 64, experts=experts))
    assert isinstance(planned(auto, 4 * experts, experts=experts), Decode)


@pytest.mark.usefixtures("install_library")
@pytest.mark.parametrize(
    ("tokens", "format", "experts", "most"),
    [(64, None, 512, 256), (373, "mxfp4", 512, 8192), (64, "mxfp4", 64, 1024), (64, "mxfp4", 22, 352)],
)
def test_more_assignments_are_left_to_grouped_matmuls(tokens, format, experts, most):
    told = f"{tokens} tokens with 22 choices each are not 1 to {most} assignments."
    assert planned(SUPER, tokens, format, experts) == told


@pytest.mark.usefixtures("install_library")
def test_a_lane_reads_16_bytes():
    config = dataclasses.replace(SUPER, expert_intermediate_size=144)
    assert "the 144 inputs of w_out are not a positive multiple of 32" in str(planned(config, 64, "nvfp4"))
    assert isinstance(planned(config, 64, "int8"), Decode)


def test_lists_do_not_go_with_an_up_projection():
    activation = decode.kernel_activation(layer("relu2", 32, 4, 2, 32).bound_activation)
    assert activation is not None
    plan = Decode(1, 2, activation, "int8", "int8", 1, rows=8)
    one = jnp.zeros((1, 1))
    with pytest.raises(InputError, match="up_proj goes with one token without lists"):
        decoded_experts(plan, one, one, one, one, one, up_proj=one)
