"""The GPU benchmark at sizes of a CPU: its errors, the libraries that it leaves out, and its records."""

import contextlib
import dataclasses
import json
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.profiler import ProfileData

from benchmarks import (
    fp8,
    fp8_layers,
    fusing,
    gpu,
    layers,
    loading,
    logits,
    matmuls,
    shared,
    steps,
    swapped,
    train_table,
    widen,
)
from benchmarks import train as training
from benchmarks.measure import WRONG, Row, Run, Session
from benchmarks.peers import jax_layer, sonicmoe_layer
from benchmarks.problems import DECODE_KERNELS, KERNELS, LAYERS, SUPER, Grouped
from examples.train import corpus, flops, presets
from examples.train import train as trainer
from examples.train.model import language_model
from examples.train.text import Corpus, Text
from jax_latent_moe import init_params, latent_moe, ragged_dot, shared_expert
from jax_latent_moe.grouped_matmul import reference
from jax_latent_moe.grouped_matmul.tuning.timing import Call, jax_candidate, prepare, time_in_turn
from tests.fusing import FusingBackend
from tests.tolerances import assert_close

SMALL = Grouped(20, 3, 8, 16, 24)
SMALL_LAYER = dataclasses.replace(
    SUPER, hidden_size=32, latent_size=16, num_experts=8, top_k=2, expert_intermediate_size=24
)


@pytest.fixture
def run(tmp_path):
    return Run("some-gpu", tmp_path)


@pytest.fixture
def session(run):
    return Session(run, rate=1e12, bandwidth=1e11, rounds=1, without=frozenset({"lax_ragged_dot"}))


def rows_of(run) -> list[dict]:
    return [json.loads(line) for line in run.path.read_text().splitlines()]


@pytest.mark.parametrize("shape", [SMALL, DECODE_KERNELS["super_up_t8"], Grouped(500, 4, 32, 8, 8, 1.5, 0.5)])
def test_group_sizes_are_those_of_tokens_with_distinct_experts(rng, shape):
    sizes = shape.group_sizes(rng)
    assert sizes.shape == (shape.num_experts,)
    assert sizes.sum() == shape.rows
    assert sizes.max() <= shape.tokens
    assert (sizes == 0).sum() >= int(shape.empty * shape.num_experts)


@pytest.mark.parametrize("pass_", matmuls.PASSES)
def test_the_error_of_a_kernel(rng, pass_):
    sizes = SMALL.group_sizes(rng)
    sizes[-1] += sizes[0]
    sizes[0] = 0
    x, w, dout = (np.asarray(a, np.float32) for a in SMALL.operands(int(rng.integers(2**31))))
    right = {
        "forward": lambda: reference.grouped_matmul(x, w, sizes),
        "dgrad": lambda: reference.grouped_matmul(dout, w, sizes, transpose_w=True),
        "wgrad": lambda: reference.grouped_wgrad(x, dout, sizes),
    }[pass_]()
    args = matmuls.reference(pass_, *map(jnp.asarray, (x, w, dout)), sizes), sizes
    assert matmuls.max_error(pass_, jnp.asarray(right), *args) < 1e-6
    assert 0.009 < matmuls.max_error(pass_, jnp.asarray(1.01 * right), *args) < 0.011
    assert matmuls.max_error(pass_, jnp.asarray(np.full_like(right, np.nan)), *args) == np.inf
    if pass_ == "wgrad":
        assert matmuls.max_error(pass_, jnp.asarray(right + 1e-3), *args) == np.inf  # expert 0 has no rows


def test_what_fails_is_left_out_and_said(capsys):
    def lowers_not():
        raise ModuleNotFoundError("No module named 'peer'")

    def compiles_not():
        raise RuntimeError("no memory\nfor this")

    def runs_not():
        raise ValueError("not on this device")

    good = jax_candidate(lambda x: x @ x, jnp.ones((4, 4)))
    calls = prepare(
        {"a": lowers_not, "b": lambda: compiles_not, "good": good, "c": lambda: lambda: Call(runs_not)},
    )
    assert calls.keys() == {"good"}
    printed = capsys.readouterr().out
    assert "left out a: ModuleNotFoundError: No module named 'peer'" in printed
    assert "left out b: RuntimeError: no memory\n" in printed
    assert "left out c: ValueError: not on this device" in printed
    assert time_in_turn(calls, 2, 3)["good"] > 0


def test_what_fails_while_it_is_timed_is_left_out_and_said(capsys):
    memory = iter([1, 2, 3])
    calls = {"hungry": Call(lambda: next(memory)), "good": Call(lambda: 1)}
    assert time_in_turn(calls, 2, 3).keys() == {"good"}
    assert "left out hungry: StopIteration" in capsys.readouterr().out


def test_a_sweep_leaves_its_fastest(monkeypatch):
    monkeypatch.setattr(matmuls, "fastest", lambda calls: min(calls, key=lambda name: calls[name].temp_bytes))
    slow, fast, default = (Call(lambda: None, temp_bytes=size) for size in (3, 2, 1))
    calls = {"dense": slow, "jax/1": slow, "jax/2": fast, "tokamax_tuned/1": slow, "tokamax": default}
    kept = matmuls.keep_fastest_of_sweeps(calls)
    assert kept == {"dense": slow, "tokamax": default, "jax": fast, "tokamax_tuned": default}


def test_kernels_are_measured_and_recorded(run, session, capsys):
    matmuls.measure(session, "kernel", {"small": SMALL})
    rows = rows_of(run)
    measured = {(row["pass"], row["impl"]) for row in rows}
    assert measured >= {(pass_, impl) for pass_ in matmuls.PASSES for impl in ("xla", "dense")}
    assert not any(impl == "lax_ragged_dot" for _, impl in measured)
    for row in rows:
        assert row.keys() == {field.name.rstrip("_") for field in dataclasses.fields(Row)} | {
            "run",
            "device",
            "versions",
        }
        assert row["max_error"] is None or row["max_error"] < 0.01
        assert row["ms"] > 0
    assert len({row["run"] for row in rows}) == 1
    printed = capsys.readouterr().out
    assert "left out pallas: its kernels are for NVIDIA Hopper GPUs" in printed


def test_fp8_is_measured_and_recorded(run, session, capsys):
    fp8.measure(dataclasses.replace(session, quick=True), "fp8", {"small": SMALL})
    rows = {(row["pass"], row["impl"]): row for row in rows_of(run)}
    products = ("product", "bfloat16"), ("product", "fp8")
    encoders = ("encode rows", "fp8_block"), ("encode weight", "fp8_block"), ("encode both", "xla")
    assert rows.keys() == {*products, *encoders}
    errors = [rows[key]["max_error"] for key in products]
    assert errors[0] < 0.01 < errors[1] < 0.1
    assert rows[products[1]]["floor_ms"] < rows[products[0]]["floor_ms"]
    assert "left out torch_scaled_grouped_mm" in capsys.readouterr().out


@pytest.mark.usefixtures("quick_compilation")
def test_fp8_layers_are_measured_and_recorded(run, session, monkeypatch, capsys):
    """Codes made beforehand give the same values as those made in the call."""
    monkeypatch.setattr(layers, "PASSES_OF_LAYERS", ("forward_backward",))
    fp8_layers.measure(session, "fp8_layer", {"small": (30, SMALL_LAYER)})
    rows = {(row["pass"], row["impl"]): row for row in rows_of(run)}
    passes = layers.PASSES_OF_LAYERS
    assert rows.keys() == {
        *((pass_, impl) for pass_ in passes for impl in ("bfloat16", "fp8", "fp8_codes")),
        *((pass_, "xla") for pass_ in ("encode_weights", "encode_rows")),
    }
    assert "left out gradient: the compiled kernel is for NVIDIA Hopper GPUs" in capsys.readouterr().out
    for pass_ in layers.PASSES_OF_LAYERS:
        dense, in_call, beforehand = (rows[pass_, impl]["max_error"] for impl in ("bfloat16", "fp8", "fp8_codes"))
        assert dense < 0.01 < in_call == beforehand < 0.1
    weights = 2 * 8 * 16 * 24
    assert rows["encode_weights", "xla"]["floor_ms"] == pytest.approx(1e3 * 6 * weights / session.bandwidth)


def test_widening_is_measured_and_recorded(run, session, capsys, monkeypatch):
    """Without a Hopper GPU, dense weights alone. The error is that of the largest group against decoded weights."""
    monkeypatch.setattr(widen, "read_rate", lambda: 1e11)
    shape = Grouped(4, 2, 8, 128, 64, empty=0.0)
    widen.measure(dataclasses.replace(session, quick=True), "widen", {"small": shape})
    assert [row["impl"] for row in rows_of(run)] == ["bfloat16"]
    assert rows_of(run)[0]["max_error"] < 0.01
    said = capsys.readouterr().out
    assert all(f"left out small mxfp4{kernel}: UnsupportedError" in said for kernel in ("", " compiled"))
    w, sizes = widen.encoded(shape.weights(0), "mxfp4"), widen.draws(shape)
    rows = jax.random.normal(jax.random.key(0), (shape.rows, shape.in_features), jnp.bfloat16)
    out = widen.several("auto", rows, w, sizes)
    assert sizes.shape == (widen.DRAWS, 8)
    assert widen.error_of(out, rows, w, sizes) < 0.01
    assert 0.01 < widen.error_of(1.05 * out, rows, w, sizes) < 0.1
    assert widen.traffic(shape, w, sizes) < widen.traffic(shape, shape.weights(0), sizes)


def test_logits_are_measured_and_recorded(run, session):
    logits.measure(session, "logits", {"small": logits.Logits(16, 32, 8)})
    rows = rows_of(run)
    found = {(row["pass"], row["impl"]) for row in rows}
    assert found >= {
        (name, impl) for name in ("forward", "forward_backward") for impl in ("split_matmul", "F32_F32_F32")
    }
    assert all(row["max_error"] < 1e-6 for row in rows if row["max_error"] is not None and "BF16" not in row["impl"])


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_layers_are_measured_and_recorded(run, session, activation):
    config = dataclasses.replace(SMALL_LAYER, activation=activation)
    layers.measure(session, "layer", {"small": (30, config)})
    rows = rows_of(run)
    assert {row["pass"] for row in rows if row["impl"] == "xla"} == {"forward", "forward_backward"}
    assert all(row["max_error"] < 0.03 for row in rows)
    forward, both = (next(row for row in rows if row["pass"] == name) for name in ("forward", "forward_backward"))
    assert both["floor_ms"] == pytest.approx(3 * forward["floor_ms"])


def test_a_plain_layer_is_measured_on_both_functions(run, session):
    session = dataclasses.replace(session, without=frozenset({"latent_moe"}))  # as in the suite "layer"
    swapped.measure(session, "ragged_dot", {"small": (30, SMALL_LAYER)})
    rows = rows_of(run)
    assert {(row["pass"], row["impl"]) for row in rows} == {
        (pass_, impl)
        for pass_ in layers.PASSES_OF_LAYERS
        for impl in ("jax_lax_ragged_dot", "jax_latent_moe_ragged_dot")
    }
    assert all(row["max_error"] < 0.03 for row in rows)


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_activations_are_measured_and_recorded(run, session, monkeypatch, activation):
    """On a CPU no kernel fuses: a fake one stands in, once as it fuses nothing and once as it fuses all."""
    kept = ("gate_hidden",) if activation == "swiglu" else ("hidden",)
    ways = {"fake": FusingBackend(), "fake_fused": FusingBackend(kept, kept, in_place=True)}
    monkeypatch.setattr(fusing, "backends", lambda config, shape: ways)
    fusing.measure(session, "fused", {"small": (30, dataclasses.replace(SMALL_LAYER, activation=activation))})
    rows = rows_of(run)
    assert [(row["pass"], row["impl"]) for row in rows] == [
        (pass_, impl) for pass_ in ("forward", "forward_backward") for impl in ways
    ]
    assert all(row["max_error"] < 0.01 for row in rows)
    forward, both = rows[0], rows[2]
    products = 1.5 if activation == "swiglu" else 2  # the whole block's, in up-projections
    assert both["floor_ms"] == pytest.approx(3 * products * forward["floor_ms"])


def test_shared_experts_are_measured_and_recorded(run, session, monkeypatch):
    """A fake kernel stands in, which must run from few tokens on."""
    monkeypatch.setattr(shared_expert, "LEAST_ROWS", 1)
    monkeypatch.setattr(shared, "WAYS", {"xla": FusingBackend(), "fused": FusingBackend(("hidden",), ("hidden",))})
    shared.measure(
        session, "shared", {"small": (30, dataclasses.replace(SMALL_LAYER, shared_expert_intermediate_size=8))}
    )
    rows = rows_of(run)
    assert [(row["pass"], row["impl"]) for row in rows] == [
        (pass_, impl) for pass_ in layers.PASSES_OF_LAYERS for impl in ("xla", "fused")
    ]
    assert all(row["max_error"] < 0.02 for row in rows)
    assert rows[2]["floor_ms"] == pytest.approx(3 * rows[0]["floor_ms"])


def test_without_a_backend_that_fuses_nothing_is_recorded(run, session, capsys):
    fusing.measure(session, "fused", {"small": (30, SMALL_LAYER)})
    assert not run.path.exists()
    assert "left out pallas: its kernels are for NVIDIA Hopper GPUs" in capsys.readouterr().out


def test_a_result_without_numbers_is_recorded_as_wrong(run):
    run.add(Row("kernel", "small", "forward", "peer", 1.0, 1.0, 1.0, float("inf"), None))
    assert rows_of(run)[0]["max_error"] == WRONG


@pytest.mark.parametrize(("latent_size", "dot"), [(16, jax.lax.ragged_dot), (None, ragged_dot)])
def test_the_plain_jax_layer_computes_the_layer(rng, latent_size, dot):
    config = dataclasses.replace(SMALL_LAYER, latent_size=latent_size, dtype="float32", param_dtype="float32")
    params = init_params(jax.random.key(int(rng.integers(2**31))), config)
    x, dy = (jnp.asarray(rng.normal(size=(30, config.hidden_size)), jnp.float32) for _ in range(2))

    def plain(params, x):
        return jax_layer.layer(params, x, config, dot)

    ours = layers.with_gradients(lambda params, x: latent_moe(params, x, config)[0])(params, x, dy)
    theirs = layers.with_gradients(plain)(params, x, dy)
    for value, expected in zip(jax.tree.leaves(theirs), jax.tree.leaves(ours), strict=True):
        assert_close(np.asarray(value), np.asarray(expected, np.float64), "float32")


def test_sonicmoe_reads_our_experts_with_gate_and_up_interleaved(rng):
    num_experts, width, inner = 3, 5, 4
    w_in = rng.normal(size=(num_experts, width, 2, inner))
    w_out = rng.normal(size=(num_experts, inner, width))
    x = rng.normal(size=(num_experts, 7, width))
    gate, up = (np.einsum("etl,elm->etm", x, w_in[:, :, i]) for i in (0, 1))
    expected = np.einsum("etm,eml->etl", gate / (1 + np.exp(-gate)) * up, w_out)
    theirs = sonicmoe_layer.expert_weights(jnp.asarray(w_in), jnp.asarray(w_out))
    theirs_in, theirs_out = (np.asarray(w, np.float64) for w in theirs)
    pre = np.einsum("etl,enl->etn", x, theirs_in)
    hidden = pre[..., 0::2] / (1 + np.exp(-pre[..., 0::2])) * pre[..., 1::2]
    assert_close(np.einsum("etm,elm->etl", hidden, theirs_out), expected, "float32")


def test_sonicmoe_is_left_out_of_layers_that_it_refuses(capsys):
    params = init_params(jax.random.key(0), SMALL_LAYER)
    x = jnp.ones((4, SMALL_LAYER.hidden_size), jnp.bfloat16)
    assert not prepare(sonicmoe_layer.candidates(SMALL_LAYER, params, x, x))
    printed = capsys.readouterr().out
    for pass_ in layers.PASSES_OF_LAYERS:
        assert f"left out {pass_}: ValueError: SonicMoE's experts run swiglu only, not relu2" in printed


def test_quick_is_a_part_of_the_whole():
    quick, whole = gpu.tables(quick=True), gpu.tables(quick=False)
    assert tuple(quick) == tuple(whole) == gpu.SUITES
    for suite in gpu.SUITES:
        for (measure, some), (same, every) in zip(quick[suite], whole[suite], strict=True):
            assert measure == same
            assert some.items() <= every.items()
    assert whole["kernel"] == [(matmuls.measure, KERNELS)]
    assert whole["layer"] == [(layers.measure, LAYERS)]


def test_compilation_is_measured_and_recorded(run, session):
    layers.measure_compilation(session, "compile", {"small": (30, SMALL_LAYER)})
    assert [(row["suite"], row["pass"], row["impl"]) for row in rows_of(run)] == [
        ("compile", "forward", "xla"),
        ("compile", "forward_backward", "xla"),
    ]


def test_steps_are_measured_and_recorded(run, session, monkeypatch):
    monkeypatch.setattr(presets, "GPU", presets.TOY)
    monkeypatch.setattr(steps, "CHECKED_STEPS", 3)
    steps.measure(session, "step", {"toy": {"steps": 7}})
    (row,) = rows_of(run)
    assert (row["suite"], row["impl"], row["max_error"]) == ("step", "xla", 0.0)


def test_training_is_measured_and_stands_in_the_table(run, session, monkeypatch, capsys):
    monkeypatch.setattr(training, "LOOP_STEPS", 60)
    gpu_trace = ProfileData.from_text_proto('planes { name: "/device:GPU:0" }')
    monkeypatch.setattr(training.kernel_table, "read_trace", lambda folder: gpu_trace)
    session = dataclasses.replace(session, kernels=True)
    monkeypatch.setattr(training, "AXES", ("expert",))  # each is a compilation
    toy = dataclasses.replace(presets.TOY, model=dataclasses.replace(presets.TOY.model, dtype="bfloat16"))
    monkeypatch.setattr(train_table, "SIZES", {"toy": toy})
    text = Text.of(bytes(np.random.default_rng(0).integers(0, 256, 9000, np.uint8)))
    monkeypatch.setattr(corpus, "load_corpus", lambda name: Corpus(text, text))
    training.measure(session, "train", {"toy": toy})
    assert capsys.readouterr().out.count("all kernels") == 5, "one table a step"
    rows = rows_of(run)
    passes = [(name, mlp) for mlp in ("dense", "moe", "latent_moe") for name in ("compile", "text", "random")]
    assert [(row["pass"], row["impl"]) for row in rows if "=" not in row["impl"]] == [*passes, ("loop", "latent_moe")]
    meshed = {f"latent_moe expert=8 {dtype}" for dtype in ("float32", "bfloat16")}
    assert {row["impl"] for row in rows if "=" in row["impl"]} == meshed
    by_hand = flops.flops_per_token(language_model(toy)) * 8 * 32
    for row in rows:
        if row["pass"] != "compile":  # over several devices the batch grows as they do
            np.testing.assert_allclose(row["tflops"] * row["ms"] * 1e9, by_hand)
    table = train_table.train_table(rows, rows[0]["device"])
    assert table.count("`toy`") == 5
    ms = {row["impl"]: row["ms"] for row in rows if row["pass"] == "text"}
    assert f"x {ms['latent_moe'] / ms['dense']:.2f} |" in table
    assert f"{8 * 32 / ms['dense']:,.0f} k" in table


def test_a_loop_that_a_signal_stops_ends_the_benchmark(run, session, monkeypatch, capsys):
    """The signal comes while the first step is compiled, before the first line of metrics."""

    def interrupted(what):
        if what.startswith("Compiling"):
            signal.raise_signal(signal.SIGTERM)
        return contextlib.nullcontext()

    monkeypatch.setattr(trainer, "busy", interrupted)
    text = Text.of(bytes(np.random.default_rng(0).integers(0, 256, 9000, np.uint8)))
    monkeypatch.setattr(corpus, "load_corpus", lambda name: Corpus(text, text))
    with pytest.raises(SystemExit) as ended:
        training._measure_loop(session, "train", "toy", presets.TOY)
    assert ended.value.code == 128 + signal.SIGTERM
    assert "SIGTERM stopped the loop at step 1 of 120: it was not timed." in capsys.readouterr().out
    assert not run.path.exists()


def test_loading_is_measured_and_recorded(tmp_path, monkeypatch, capsys):
    """Few experts of narrow layers: the peak is mostly that of small temporaries."""
    narrow = dict(hidden_size=256, latent_size=128, expert_intermediate_size=64, shared_expert_intermediate_size=128)
    for name, stored in loading.LAYERS.items():
        config = dataclasses.replace(stored.config, **narrow)
        monkeypatch.setitem(loading.LAYERS, name, dataclasses.replace(stored, config=config))
    options = ["--folder", str(tmp_path / "made"), "--experts", "4", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["loading", *options])
    loading.main()
    (path,) = tmp_path.glob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert not (tmp_path / "made").exists()
    found = {(row["shape"], row["impl"]): row for row in rows}
    assert found.keys() == {(f"{name}_e4", impl) for name in loading.LAYERS for impl in ("files", "host")}
    for name, (codes, scales) in {"super_nvfp4": (2, 16), "k3_mxfp4": (3, 32)}.items():
        numbers = 4 * codes * 128 * 64
        assert numbers / 2 + numbers / scales < found[f"{name}_e4", "files"]["temp_bytes"] < numbers + 2**20
    assert "x the packed bytes" in capsys.readouterr().out


def test_what_was_there_is_not_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["loading", "--folder", str(tmp_path)])
    with pytest.raises(FileExistsError):
        loading.main()
    assert tmp_path.exists()


def test_the_peak_of_memory_is_that_of_the_call():
    def hungry():
        array = np.ones(2**27, np.uint8)
        time.sleep(0.1)  # for the samples
        return array.nbytes

    loading.peak_of(lambda: np.ones(2**28, np.uint8).nbytes)  # a higher peak before
    nbytes, peak = loading.peak_of(hungry)
    assert peak == pytest.approx(nbytes, rel=0.2)


def test_a_machine_without_a_gpu_is_told(monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu", "kernel"])
    with pytest.raises(SystemExit, match="`make bench` measures the CPU"):
        gpu.main()
