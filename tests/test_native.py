"""The library of compiled kernels seen from Python: which file is loaded or refused, and what a call passes."""

import ctypes
import importlib.util
import json
import pathlib
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_latent_moe import native

ROOT = pathlib.Path(__file__).parent.parent
BUFFERS = {
    "rows": ((16, 64), jnp.bfloat16),
    "w": ((2, 64, 64), jnp.bfloat16),
    "group_sizes": ((2,), jnp.int32),
    "row_ids": ((0,), jnp.int32),
    "gather_weights": ((0,), jnp.float32),
}
RESULTS = (((16, 64), jnp.bfloat16), ((0, 0), jnp.bfloat16), ((2,), jnp.int32))
ATTRIBUTES = {"kernel": "sm90.fwd.bf16.128x128x6.1x2", "first_column": 0, "gathered": False, "rows_first": False}


OPERANDS = tuple(BUFFERS.values())


def matmul(operands=OPERANDS, results=RESULTS, attributes=ATTRIBUTES):
    shapes = [jax.ShapeDtypeStruct(*result) for result in results]
    return native.call("matmul", [jnp.zeros(*operand) for operand in operands], shapes, **attributes)


def generator():
    path = ROOT / "custom_calls/generate.py"
    if not path.exists():
        pytest.skip("there are no sources of the library here")
    spec = importlib.util.spec_from_file_location("generate", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_last(mapping):
    return dict(list(mapping.items())[:-1])


def test_the_build_and_the_package_hash_the_interface_alike():
    assert generator().interface_hash(native.INTERFACE) == native.interface_hash()


@pytest.mark.parametrize("part", ["operands", "results", "attributes"])
def test_the_hash_tells_interfaces_apart(part, monkeypatch):
    """A name, a type, the order, and how many there are, but not how the file is laid out."""
    before, interface = native.interface_hash(), native.INTERFACE["matmul"][part]
    assert json.loads(json.dumps(native.INTERFACE, indent=4)) == native.INTERFACE
    for other in (
        without_last(interface),
        interface | {"more": "int32"},
        interface | {next(iter(interface)): "int64"},
        dict(reversed(interface.items())),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(native.INTERFACE["matmul"], part, other)
            assert native.interface_hash() != before
    assert native.interface_hash() == before


def test_a_call_hands_over_attributes_of_the_right_types():
    """Python's and NumPy's numbers alike become the interface's types."""
    for first_column, gathered in ((8, False), (np.int64(8), np.bool_(False)), (8.0, 0)):
        attributes = ATTRIBUTES | {"first_column": first_column, "gathered": gathered}
        lowered = jax.jit(lambda attributes=attributes: matmul(attributes=attributes)).trace()
        text = lowered.lower(lowering_platforms=("cuda",)).as_text()
        assert "@latent_moe_matmul(" in text
        assert 'kernel = "sm90.fwd.bf16.128x128x6.1x2"' in text
        assert "first_column = 8 : i32" in text
        assert "gathered = false" in text
    assert [(value.shape, value.dtype) for value in jax.eval_shape(matmul)] == list(RESULTS)


def test_floats_are_float32_and_results_may_take_the_memory_of_operands():
    rows, sizes = jnp.zeros((16, 64), jnp.bfloat16), jnp.zeros(2, jnp.int32)
    nothing, weights = jnp.zeros(0, jnp.int32), jnp.zeros(16)

    def grad():
        shapes = ((16, 64), rows.dtype), ((0, 64), rows.dtype), ((1, 16), jnp.float32), RESULTS[1], RESULTS[2]
        return native.call(
            "matmul_activation_grad",
            [rows, jnp.zeros((2, 64, 64), rows.dtype), sizes, rows, weights, nothing, jnp.zeros(0)],
            [jax.ShapeDtypeStruct(*shape) for shape in shapes],
            input_output_aliases={3: 0},
            kernel="sm90.dgrad.bf16.relu2:hidden.128x192x4.1x2",
            beta=4,
            linear_beta=np.float64(25),
            gathered=False,
            rows_first=True,
        )

    text = jax.jit(grad).trace().lower(lowering_platforms=("cuda",)).as_text()
    assert "beta = 4.000000e+00 : f32" in text
    assert "linear_beta = 2.500000e+01 : f32" in text
    assert "output_operand_alias" in text


def test_attributes_that_are_missing_or_unknown_are_refused():
    for attributes in (without_last(ATTRIBUTES), ATTRIBUTES | {"tile_rows": 128}, {}):
        with pytest.raises(TypeError, match="takes the attributes kernel, first_column, gathered, rows_first, not "):
            matmul(attributes=attributes)


def test_operands_and_results_that_are_not_the_interface_s_are_refused():
    operands = list(OPERANDS)
    with pytest.raises(TypeError, match=r"matmul takes 5 operands \(rows, w, .*\), not 4"):
        matmul(operands[:-1])
    with pytest.raises(TypeError, match=r"matmul takes 3 results \(out, .*\), not 4"):
        matmul(results=[*RESULTS, RESULTS[0]])
    with pytest.raises(TypeError, match=r"group_sizes of its operands as int32 \[experts\], not float32: cast it"):
        matmul([*operands[:2], ((2,), jnp.float32), *operands[3:]])
    with pytest.raises(TypeError, match="counters of its results as int32"):
        matmul(results=[*RESULTS[:2], ((2,), jnp.float32)])


def test_without_its_file_it_says_how_to_get_it(library_at, tmp_path):
    library_at(tmp_path / native.FILE)
    assert native.library().kernels == {}
    expected = "libjax_latent_moe_cuda.so is not installed: `pip install -U 'jax-latent-moe[cuda13]'` installs it"
    assert expected in (native.library().missing or "")


def test_the_library_of_the_wheel_is_found_if_none_was_built(tmp_path, monkeypatch):
    monkeypatch.delenv(native.VARIABLE, raising=False)
    own = tmp_path / "package" / native.FILE
    monkeypatch.setattr(native, "__file__", str(own.with_name("native.py")))
    assert native.library_path() == own
    wheel = tmp_path / "site" / native.WHEEL
    wheel.mkdir(parents=True)
    (wheel / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert native.library_path() == wheel / native.FILE
    own.parent.mkdir()
    own.touch()
    assert native.library_path() == own


def test_a_file_that_is_no_library_is_named(library_at, tmp_path):
    (tmp_path / "broken.so").write_bytes(b"no library")
    library_at(tmp_path / "broken.so")
    with pytest.warns(RuntimeWarning, match="kernels are not used: its library .*broken.so cannot be loaded"):
        missing = native.library().missing or ""
    assert f"{tmp_path}/broken.so cannot be loaded (" in missing
    assert missing.endswith(f"{native.REPLACE}.")


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("int latent_moe_interface_version() { return 7; }", "of an older version"),
        ('char const* latent_moe_interface_hash() { return "0123456789abcdef"; }', "0123456789abcdef"),
    ],
)
def test_a_stale_library_is_to_be_built_anew(library_at, tmp_path, source, found):
    (tmp_path / "stale.c").write_text(source)
    stale = tmp_path / "stale.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", stale, tmp_path / "stale.c"], check=True)
    library_at(stale)
    what = f"its library {stale} has the interface {found}, not {native.interface_hash()}"
    with pytest.warns(RuntimeWarning, match=f"has the interface {found}, not"):
        assert native.library() == native.Library({}, f"{what}. {native.REPLACE}.")


def test_the_generated_sources_follow_the_interface_and_the_list_of_kernels(tmp_path):
    generate = generator()
    header, source = generate.header(native.INTERFACE), generate.bindings(native.INTERFACE)
    for target, parts in native.INTERFACE.items():
        assert f"LATENT_MOE_HANDLER(latent_moe_{target}," in source
        for part in parts.values():
            assert all(f" {name};" in header for name in part)
    names = ["sm90.fwd.bf16.gelu_tanh:pre.128x192x5.1x2", "sm90.wgrad.f16.128x192x4.2x1"]
    files = generate.kernel_files(names)
    assert files["sm90/kernels.inc"].splitlines() == [
        f'LATENT_MOE_KERNEL("{names[0]}", kFwd, kBf16, kGeluTanh, kPre, 128, 192, 5, 1, 2)',
        f'LATENT_MOE_KERNEL("{names[1]}", kWgrad, kF16, kNone, kNone, 128, 192, 4, 2, 1)',
    ]
    assert len(files) == 3
    with pytest.raises(SystemExit, match=r"'sm90.fwd.bf16.128x192' is not a kernel's name"):
        generate.kernel_files(["sm90.fwd.bf16.128x192"])
    with pytest.raises(SystemExit, match="must be listed only once"):
        generate.kernel_names("\n".join(names[:1] * 2), few=False)


LOADED = native.library()
needs_library = pytest.mark.skipif(LOADED.missing is not None, reason=f"{LOADED.missing}")


@needs_library
def test_the_library_names_kernels_of_each_kind():
    generate, kinds, most = generator(), set(), {}
    for name, max_experts in LOADED.kernels.items():
        kernel = generate.KERNEL.fullmatch(name)
        assert kernel is not None, name
        kinds.add((kernel["contraction"], kernel["activation"] is not None))
        kind = name.rsplit(".", 2)[0]
        most[kind] = max(most.get(kind, 0), max_experts)
    assert kinds == {("fwd", False), ("dgrad", False), ("wgrad", False), ("fwd", True), ("dgrad", True)}
    assert min(most.values()) >= 896, "Kimi K3's experts fit beside the stages of no tile"


@needs_library
def test_xla_accepts_the_handlers():
    """Registering asks a handler for the version of its interface, which must not be newer than XLA's."""
    loaded = ctypes.CDLL(str(native.library_path()))
    for target in native.INTERFACE:
        jax.ffi.register_ffi_target(f"test_{target}", native.handlers(loaded, target), platform="cpu")


@pytest.fixture(scope="module")
def on_the_cpu():
    """The handlers answer on the CPU too: they decode a call, and miss a GPU's stream alone, operand 0."""
    loaded = ctypes.CDLL(str(native.library_path()))
    for target in native.INTERFACE:
        execute = {"execute": native.handlers(loaded, target)["execute"]}
        jax.ffi.register_ffi_target(native.PREFIX + target, execute, platform="cpu")


def buffers(described):
    dtypes = (description.split()[0] for description in described.values())
    return [jnp.zeros(2, "bfloat16" if dtype == "format" else dtype) for dtype in dtypes]


@needs_library
@pytest.mark.parametrize("target", native.INTERFACE)
def test_the_library_understands_what_call_hands_over(target, on_the_cpu):
    interface, values = native.INTERFACE[target], {"string": "none", "bool": True, "int32": 3, "float32": 0.5}
    attributes = {name: values[type_] for name, type_ in interface["attributes"].items()}
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"\(bad operands at: 0\)"):
        jax.block_until_ready(
            native.call(target, buffers(interface["operands"]), buffers(interface["results"]), **attributes)
        )


HANDED_OVER = {
    name: native.CASTS[native.INTERFACE["matmul"]["attributes"][name]](ATTRIBUTES[name]) for name in ATTRIBUTES
}


def unchecked_matmul(num_operands=5, num_results=3, **attributes):
    """The call as another version of the package might make it."""
    interface = native.INTERFACE["matmul"]
    function = jax.ffi.ffi_call("latent_moe_matmul", buffers(interface["results"])[:num_results])
    jax.block_until_ready(function(*buffers(interface["operands"])[:num_operands], **attributes))


@needs_library
@pytest.mark.parametrize("name", ATTRIBUTES)
def test_the_library_refuses_an_attribute_that_is_missing_or_of_another_type(name, on_the_cpu):
    with pytest.raises(jax.errors.JaxRuntimeError, match="Wrong number of attributes: expected 4 but got 3"):
        unchecked_matmul(**{other: value for other, value in HANDED_OVER.items() if other != name})
    for value in (np.float32(1), np.int16(1), np.int32(1) if name == "kernel" else "1"):
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"\(bad operands at: 0, \d+\)"):
            unchecked_matmul(**HANDED_OVER | {name: value})


@needs_library
def test_the_library_refuses_a_call_with_too_many_or_too_few_parts(on_the_cpu):
    for changes, reason in (
        ({"more": 1}, "Wrong number of attributes: expected 4 but got 5"),
        ({"num_operands": 2}, "Wrong number of arguments: expected 5 but got 2"),
        ({"num_results": 1}, "Wrong number of results: expected 3 but got 1"),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match=reason):
            unchecked_matmul(**HANDED_OVER, **changes)


def test_every_target_may_be_exported_on_request():
    """JAX refuses to export custom calls that it does not know, unless each is named."""

    @jax.jit
    def choose(scores):
        return native.call("top_k", [scores], [jax.ShapeDtypeStruct((4, 2), jnp.int32)])[0]

    scores = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    with pytest.raises(ValueError, match="no compatibility guarantees"):
        jax.export.export(choose, platforms=("cuda",))(scores)
    exported = jax.export.export(choose, platforms=("cuda",), disabled_checks=native.export_checks())(scores)
    assert "latent_moe_top_k" in exported.mlir_module()
    assert len(native.export_checks()) == len(native.INTERFACE)
