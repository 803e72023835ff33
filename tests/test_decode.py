"""The kernels for few tokens: what they compute, emulated on the CPU, and where they are chosen."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_latent_moe import (
    PallasBackend,
    ParallelConfig,
    Precision,
    RouterConfig,
    XlaBackend,
    decode,
    expert_plan,
    init_params,
    latent_moe,
    native,
    presets,
    projections,
    quantize,
)
from jax_latent_moe.decode import MOST_ASSIGNMENTS, Decode, decoded_experts, plan_decode
from jax_latent_moe.expert_plan import plan_experts
from jax_latent_moe.grouped_matmul.cutlass_sm90.codes import CODES
from jax_latent_moe.grouped_matmul.registry import AUTO
from jax_latent_moe.routing import compiled
from jax_latent_moe.routing.permute import first_rows, make_dispatch_plan
from jax_latent_moe.routing.router import route
from jax_latent_moe.routing.top_k import compiled_top_k_ids
from tests import emulated
from tests.few_tokens import BACKEND, SMALL, WEIGHINGS, check, experts_of, layer
from tests.kernels import A100, CPU, H100, H200
from tests.oracle.formats import e2m1, e4m3, packed
from tests.tolerances import assert_close

FORMATS = tuple(CODES)
emulates = pytest.mark.skipif(emulated.missing() is not None, reason=f"{emulated.missing()}")
SUPER = dataclasses.replace(presets.NEMOTRON_3_SUPER, backend=BACKEND)


@pytest.fixture
def emulation(monkeypatch, install_library):
    """The kernels run on the CPU, as if it were a Hopper GPU with a library."""
    monkeypatch.setattr(native, "call", emulated.call)
    for module in (decode, expert_plan, projections):
        monkeypatch.setattr(module, "current_device", lambda: SMALL)


@emulates
@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("format", [None, *FORMATS])
def test_formats(rng, format):
    """Several tiles and parts of the inner width, whose last is shorter; two tokens may share an expert."""
    assert check(rng, layer("relu2", 256, 5, 2, 384), format, 1).splits == 2
    check(rng, layer("swiglu", 128, 4, 2, 128), format, 2)


@emulates
@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "geglu", "geglu_tanh", "situ_glu"])
def test_activations(rng, name):
    config = layer(name, 136, 3, 2, 72)
    check(rng, config, None, 2, "float16")
    check(rng, layer(name, 96, 3, 2, 32), "mxfp4", 2)
    if name == "situ_glu":
        check(rng, dataclasses.replace(config, situ_linear_beta=None, situ_beta=0.5), None, 2)


@emulates
@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("format", [None, "fp8_block", "mxfp4"])
def test_one_expert_has_more_rows_than_a_block_multiplies_at_once(rng, format):
    """The same expert several times among the choices of a token, too; and sizes that no tile divides."""
    config = layer("swiglu", 96, 4, 3, 32)
    check(rng, config, format, 7, ids=np.full((7, 3), 2))
    check(rng, config, format, 1, ids=[[1, 1, 1]])


@emulates
@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("format", ["int8", "int4_32_zero"])
def test_more_inputs_than_shared_memory_holds_at_once(rng, format, tokens):
    """Blocks of one token hold half as many as those of more."""
    check(rng, layer("relu2", 2048 + 160, 3, 2, 32), format, tokens)


@emulates
@pytest.mark.usefixtures("emulation")
def test_scales_that_take_two_factors(rng):
    """Some of the scales of a matrix are above 2."""

    def louder(w_in):
        scales = w_in.scales["block"]
        return dataclasses.replace(w_in, scales={"block": scales.at[:, :, ::3].add(20)})

    config = layer("relu2", 256, 3, 2, 64)
    assert louder(experts_of(rng, config, "mxfp4")[0]).scales["block"].max() > 129
    check(rng, config, "mxfp4", 2, change=louder)


@emulates
@pytest.mark.usefixtures("emulation")
def test_as_many_assignments_as_fit(rng):
    check(rng, layer("relu2", 16, 3, 1, 16), None, MOST_ASSIGNMENTS)
    assert not check(rng, layer("relu2", 16, 33, 32, 16), "fp8_block", 8).rows


@emulates
@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("top_k", [128, 130])
def test_one_token_with_as_many_choices_as_a_small_block_has_threads_or_more(rng, top_k):
    """Most experts have more rows than a block multiplies at once."""
    check(rng, layer("swiglu", 80, 140, top_k, 32), "int8", 1, ids=rng.integers(-1, 7, (1, top_k)))


@emulates
@pytest.mark.usefixtures("emulation")
def test_no_expert_adds_nothing_and_a_nan_stays_in_its_token(rng):
    config = layer("relu2", 32, 4, 2, 32)
    for format in (None, "int8"):
        w_in, w_out = experts_of(rng, config, format)
        plan = plan_decode(config, 3, 2, "bfloat16", w_in, w_out, device=SMALL)
        assert isinstance(plan, Decode)
        x = jnp.asarray(rng.normal(size=(3, 32)), jnp.bfloat16).at[1].set(jnp.nan)
        ids = jnp.asarray([[3, 0], [3, 0], [-1, 4]], jnp.int32)
        weights = jnp.asarray([[0.5, 2.0], [0.5, 2.0], [jnp.nan, jnp.inf]], jnp.float32)
        out = np.asarray(decoded_experts(plan, x, weights, ids, w_in, w_out), np.float64)
        assert np.isfinite(out[0]).all()
        assert np.isnan(out[1]).all()
        assert (out[2] == 0).all()


@emulates
@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("format", [None, "nvfp4"])
def test_the_layer_runs_them_where_nothing_is_differentiated(rng, format):
    """As the portable backend computes it, dropped and masked tokens included."""
    router = RouterConfig(capacity_factor=0.5, norm_topk_prob=False)
    config = layer("relu2", 32, 8, 3, 32, router=router, dtype="bfloat16", param_dtype="bfloat16")
    params = init_params(jax.random.key(0), config)
    params = params if format is None else quantize(params, config, format)
    x, mask = jnp.asarray(rng.normal(size=(3, 64)), jnp.bfloat16), jnp.asarray([True, False, True])
    ids = jnp.asarray([[0, 1, 2], [3, 4, 5], [1, 2, 5]], jnp.int32)  # experts keep one token each
    y, aux = jax.jit(latent_moe, static_argnums=2)(params, x, config, token_mask=mask, expert_ids=ids)
    portable = dataclasses.replace(config, backend=XlaBackend())
    wanted, _ = latent_moe(params, x, portable, token_mask=mask, expert_ids=ids)
    assert aux.dropped_per_expert.sum() == 2
    assert (y[1] == 0).all()
    assert_close(y.astype(jnp.float32), wanted.astype(jnp.float32), "bfloat16")


@emulates
@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize(
    ("experts", "k"), [(1, 1), (33, 5), (100, 22), (128, 32), (40, 33), (128, 128), (300, 22), (512, 64)]
)
def test_the_choice_is_a_stable_sort_from_the_best(rng, experts, k):
    """Equal scores, infinities, NaN and zeros of either sign as XLA orders them; all equal; the best in one lane."""
    some = np.round(rng.normal(size=(6, experts)), 1)
    some[rng.random(some.shape) < 0.2] = -np.inf
    odd = rng.choice([np.nan, -np.nan, -0.0, 0.0, np.inf, 1e-40], size=(2, experts))
    ascending = np.arange(experts)[None] / 7
    by_lane = np.where(np.arange(experts) % 32 == 5, 9.0, -ascending)
    scores = jnp.asarray(np.concatenate([some, odd, np.zeros((1, experts)), ascending, by_lane]), jnp.float32)
    np.testing.assert_array_equal(compiled_top_k_ids(scores, k), jax.lax.top_k(scores, k)[1])


@emulates
@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize(("tokens", "k"), [(5, 22), (65, 9), (257, 5)])
@pytest.mark.parametrize("name", WEIGHINGS)
def test_the_choice_and_its_weights_are_one_kernel(rng, name, tokens, k):
    """As XLA makes them, logits that underflow included. Blocks choose for few tokens, and warps for more."""
    config, experts = WEIGHINGS[name], 70
    logits = jnp.asarray(rng.normal(size=(tokens, experts)) * np.logspace(-1, 2, tokens)[:, None], jnp.float32)
    logits = logits.at[1].add(-95)
    bias = jnp.asarray(rng.normal(size=experts), jnp.float32) / 8 if config.correction_bias else None
    program = functools.partial(route, config=config, top_k=k, bias=bias)
    assert "top_k_weights" not in str(jax.make_jaxpr(program)(logits))
    routing = jax.jit(functools.partial(program, backend=BACKEND))(logits)
    wanted = jax.jit(program)(logits)
    np.testing.assert_array_equal(routing.expert_ids, wanted.expert_ids)
    np.testing.assert_allclose(routing.weights, wanted.weights, rtol=2e-5)


@pytest.mark.usefixtures("install_library")
@pytest.mark.parametrize(
    ("changes", "experts", "k"),
    [
        (dict(score_function="sqrt_softplus"), 70, 4),
        (dict(norm_topk_prob=False), 70, 4),
        (dict(score_function="softmax"), 70, 4),
        ({}, 1025, 4),
        ({}, 70, 33),
    ],
)
def test_other_weights_are_not_made_by_the_kernel(monkeypatch, changes, experts, k):
    monkeypatch.setattr(decode, "current_device", lambda: H100)
    program = functools.partial(route, config=RouterConfig(**changes), top_k=k, backend=BACKEND)
    assert "top_k_weights" not in str(jax.make_jaxpr(program)(jnp.zeros((2, experts))))


@pytest.mark.usefixtures("install_library")
def test_the_kernel_makes_the_weights_of_up_to_64_tokens_and_always_of_8192_choices(monkeypatch):
    for module in (decode, compiled):
        monkeypatch.setattr(module, "current_device", lambda: H100)
    program = functools.partial(route, config=RouterConfig(), top_k=22, backend="auto")
    always = functools.partial(program, backend=BACKEND)
    for tokens, *has_weights in (
        (1, True, True),
        (64, True, True),
        (65, False, True),
        (372, False, True),
        (373, False, False),
    ):
        logits = jnp.zeros((tokens, 512))
        assert ["top_k_weights" in str(jax.make_jaxpr(route)(logits)) for route in (program, always)] == has_weights


@pytest.mark.usefixtures("install_library")
def test_gradients_do_not_run_them(monkeypatch):
    """A forward pass calls them; one with a gradient calls only the grouped matmuls."""
    for module in (decode, expert_plan):
        monkeypatch.setattr(module, "current_device", lambda: H100)
    config = layer(
        "relu2", 32, 6, 3, 32, dtype="bfloat16", param_dtype="bfloat16", backend="auto", router=RouterConfig()
    )
    monkeypatch.setitem(AUTO, "gpu", (BACKEND,))
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    x = jax.ShapeDtypeStruct((2, 64), jnp.bfloat16)

    def loss(params, x):
        return jnp.sum(latent_moe(params, x, config)[0].astype(jnp.float32))

    forward, both = str(jax.make_jaxpr(loss)(params, x)), str(jax.make_jaxpr(jax.grad(loss))(params, x))
    for target in ("latent_moe_decode_experts", "latent_moe_top_k_weights"):
        assert target in forward
        assert target not in both


@pytest.mark.usefixtures("install_library")
def test_gradients_through_listed_codes_do_not_run_them(monkeypatch):
    """The gradient of x. Codes have none."""
    for module in (decode, expert_plan):
        monkeypatch.setattr(module, "current_device", lambda: H100)
    config = layer("relu2", 32, 6, 3, 32, dtype="bfloat16", backend="auto", router=RouterConfig())
    monkeypatch.setitem(AUTO, "gpu", (BACKEND, XlaBackend()))
    params = jax.eval_shape(lambda: quantize(init_params(jax.random.key(0), config), config, "mxfp4"))
    x = jax.ShapeDtypeStruct((32, 64), jnp.bfloat16)

    def loss(x, params):
        return jnp.sum(latent_moe(params, x, config)[0].astype(jnp.float32))

    target = "latent_moe_decode_listed_experts"
    assert target in str(jax.make_jaxpr(loss)(x, params))
    assert target not in str(jax.make_jaxpr(jax.grad(loss))(x, params))


def weights_of(config, format=None, dtype="bfloat16"):
    def make():
        params = init_params(jax.random.key(0), config)
        params = params if format is None else quantize(params, config, format)
        return params["experts"]["w_in"], params["experts"]["w_out"]

    w_in, w_out = jax.eval_shape(make)
    flat = jax.ShapeDtypeStruct((*w_in.shape[:2], 5376), w_in.dtype) if config.gated and format is None else w_in
    return flat, w_out


def planned(config, tokens=1, dtype="bfloat16", format=None, device=H100, scales=None):
    w_in, w_out = weights_of(config, format)
    if scales is not None:
        w_out = dataclasses.replace(w_out, scales=w_out.scales | scales)
    return plan_decode(config, tokens, config.top_k, dtype, w_in, w_out, device=device)


@pytest.mark.usefixtures("install_library")
@pytest.mark.parametrize(("format", "most"), [(None, 1), ("fp8_block", 64), ("mxfp4", 64)])
def test_the_most_tokens_by_themselves(format, most):
    config = dataclasses.replace(SUPER, backend="auto")
    assert isinstance(planned(config, most, format=format), Decode)
    refused = planned(config, most + 1, format=format)
    assert f"'measured' leaves {most + 1} tokens to the grouped matmuls: 'always' takes them." in refused


@pytest.mark.usefixtures("install_library")
def test_the_plan_of_super():
    """One token of it has 528 blocks in the second product: four for each SM of an H100."""
    plan = planned(SUPER)
    assert isinstance(plan, Decode)
    assert (plan.tokens, plan.choices, plan.in_code, plan.out_code, plan.splits) == (1, 22, "dense", "dense", 3)
    for tokens, splits in ((2, 2), (8, 1)):
        found = planned(SUPER, tokens, format="mxfp4", device=H200)
        assert isinstance(found, Decode)
        assert (found.in_code, found.out_code, found.splits) == ("mxfp4", "mxfp4", splits)
    for format in FORMATS:
        assert isinstance(planned(SUPER, format=format), Decode)
    assert isinstance(planned(dataclasses.replace(SUPER, activation="swiglu"), format="fp8_block"), Decode)
    told = str(
        plan_experts(SUPER, 22, (512, 1024, 2688), (512, 2688, 1024), "bfloat16", device=H100, decode=plan)
    ).splitlines()
    assert told[1] == (
        "without a gradient, two kernels for few tokens: 1 tokens with 22 choices each, w_in dense, w_out dense, the "
        "inner width in 3 parts"
    )


CHANGES = {
    "backend xla": (dict(backend=XlaBackend()), {}, "has no kernels for few tokens on gpu"),
    "backend pallas": (dict(backend=PallasBackend()), {}, "has no kernels for few tokens on gpu"),
    "not asked": (dict(backend=dataclasses.replace(BACKEND, decode="never")), {}, "CutlassBackend.decode is 'never'"),
    "device": ({}, dict(device=A100), "compiled for NVIDIA Hopper GPUs (H100, H200), not 'NVIDIA A100-SXM4-80GB'"),
    "cpu": ({}, dict(device=CPU), "compiled for NVIDIA Hopper GPUs"),
    "mesh": (dict(parallel=ParallelConfig()), {}, "config.parallel is set, and these kernels run on one device"),
    "bias": (dict(expert_bias=True), {}, "config.expert_bias is True, and these kernels add no bias"),
    "precision": (dict(precision=Precision(fwd="fp8_block")), {}, "do not round tokens to precision.fwd='fp8_block'"),
    "many": ({}, dict(tokens=12), "12 tokens with 22 choices each are not 1 to 256 assignments"),
    "none": ({}, dict(tokens=0), "0 tokens with 22 choices each are not 1 to 256 assignments"),
    "activation": (dict(activation="clamped_swiglu"), {}, "not clamped_swiglu"),
    "dtype": ({}, dict(dtype="float32"), "tokens are in float32"),
    "codes in float16": ({}, dict(dtype="float16", format="int8"), "widen to bfloat16, not to float16"),
    "inputs": (dict(latent_size=1004), {}, "the 1004 inputs of w_in are not a positive multiple of 8"),
    "half a group": (
        dict(latent_size=1040),
        dict(format="nvfp4"),
        "the 1040 inputs of w_in are not a positive multiple of 32",
    ),
    "inner": (dict(expert_intermediate_size=2696), dict(format="fp8_block"), "2696 outputs of w_in are not a"),
    "scales": (
        {},
        dict(format="int4_32", scales={"block": jax.ShapeDtypeStruct((512, 1, 1024, 84), jnp.float16)}),
        "the scales 'block' of w_out are float16, not bfloat16",
    ),
}


@pytest.mark.usefixtures("install_library")
@pytest.mark.parametrize("name", CHANGES)
def test_they_are_not_chosen(name):
    changes, arguments, reason = CHANGES[name]
    found = planned(dataclasses.replace(SUPER, **changes), **arguments)
    assert isinstance(found, str)
    assert reason in found


def test_they_are_not_chosen_without_the_library(library_at, tmp_path):
    library_at(tmp_path / "nothing.so")
    assert "is not installed" in str(planned(SUPER))


def test_only_the_plan_of_all_assignments_has_their_experts(rng):
    """A plan with rows cut off or padded has rows that are not the choices of tokens."""
    ids = jnp.asarray(rng.integers(-1, 5, (4, 3)), jnp.int8)
    plan = make_dispatch_plan(ids, 4)
    np.testing.assert_array_equal(plan.expert_ids, ids)
    assert plan.expert_ids is not None
    assert plan.expert_ids.dtype == jnp.int32
    assert make_dispatch_plan(ids, 4, row_multiple=4).expert_ids is None
    assert first_rows(plan, 4).expert_ids is None


def bfloat16(values):
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float64).astype(ml_dtypes.bfloat16).astype(np.float32)


def first_word(name, eight):
    """The first word of 32 codes, which holds these eight by pairs."""
    codes = np.zeros((4, 4, 2), np.uint8)
    codes[:, 0] = np.reshape(eight, (4, 2))
    return int(packed(name, codes.reshape(-1)).view("<u4")[0])


@emulates
def test_every_code_is_widened_with_every_scale(rng):
    """Against the published definitions in float64. A product of a code and a scale is exact but for int4."""
    eights = [list(range(8)), list(range(8, 16))[::-1], list(rng.integers(0, 16, 8))]
    values = np.asarray([[e2m1(code) for code in codes] for codes in eights])
    for scale in range(256):
        power = np.nan if scale == 255 else 2.0 ** (scale - 127)
        block = e4m3(scale)
        for eight, codes in zip(eights, values, strict=True):
            word = first_word("mxfp4", eight)
            np.testing.assert_array_equal(emulated.widened("mxfp4", word, scale), bfloat16(codes * power))
            np.testing.assert_array_equal(emulated.widened("nvfp4", word, scale), bfloat16(codes * block / 1024))
        four = [(scale + place) % 256 for place in range(4)]
        word = sum(code << 8 * place for place, code in enumerate(four))
        np.testing.assert_array_equal(emulated.widened("e4m3", word), bfloat16([e4m3(code) for code in four]))
        np.testing.assert_array_equal(emulated.widened("int8", word), np.asarray(four, np.uint8).view(np.int8))
    for zero in range(16):
        scale = np.float32(rng.normal()).astype(ml_dtypes.bfloat16)
        for eight in eights:
            word = first_word("int4", eight)
            found = emulated.widened("int4", word, int(scale.view(np.uint16)), zero)
            np.testing.assert_array_equal(found, bfloat16((np.asarray(eight) - zero) * np.float64(scale)))
