"""The layer against the MoE blocks of transformers: outputs, routing and gradients recorded in tests/golden."""

import dataclasses
import functools
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from jax_latent_moe import hf, latent_moe
from tests.layers import dense
from tests.tolerances import assert_close, assert_trees_close

GOLDEN = pathlib.Path(__file__).parent / "golden"
CASES = sorted(folder.name for folder in GOLDEN.iterdir() if (folder / "checkpoint").is_dir())


@functools.cache
def imported(folder: pathlib.Path, dtype: str | None = None):
    """(config, parameters) of the only layer of a checkpoint."""
    checkpoint = hf.open_checkpoint(folder)
    (layer,) = checkpoint.layers
    return checkpoint.configs[layer], hf.import_layer(checkpoint, layer, dtype=dtype)


def gradients(case: str, dtype: str, folder: pathlib.Path):
    """The recorded gradients, imported as a checkpoint is: they have its names."""
    shutil.copy(GOLDEN / case / "checkpoint" / "config.json", folder)
    shutil.copy(GOLDEN / case / f"gradients_{dtype}.safetensors", folder / "model.safetensors")
    return imported(folder)[1]


@functools.cache
def compiled(config):
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles twice as fast
    def run(params, x, dy, expert_ids):
        def objective(params, x):
            y, aux = latent_moe(params, x, config, expert_ids=expert_ids)
            return jnp.sum(y.astype(jnp.float32) * dy), (y, aux)

        (_, outputs), grads = jax.value_and_grad(objective, (0, 1), has_aux=True)(params, x)
        return *outputs, *grads

    return run


def run(case: str, dtype: str):
    """Recorded values, and the layer's (y, aux, gradients of params and of x) on the same input."""
    values = load_file(GOLDEN / case / f"values_{dtype}.safetensors")
    config, params = imported(GOLDEN / case / "checkpoint", dtype)
    config = dataclasses.replace(config, dtype=dtype)
    x, dy = jnp.asarray(values["x"]), jnp.asarray(values["dy"], jnp.float32)
    expert_ids = values["expert_ids"].reshape(*x.shape[:-1], -1)
    # In bfloat16 some blocks round the logits before the choice, and may choose otherwise: the choice is replayed.
    replayed = expert_ids if dtype == "bfloat16" else None
    if config.router.selection == "given":
        checkpoint = hf.open_checkpoint(GOLDEN / case / "checkpoint")
        replayed = np.asarray(hf.import_token_experts(checkpoint, checkpoint.layers[0]))[values["token_ids"]]
    result = compiled(config)(params, x, dy, replayed)
    values["expert_ids"] = expert_ids
    values["weights"] = values["weights"].reshape(expert_ids.shape).astype(np.float32)
    return config, values, result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_the_layer_is_the_block_of_transformers(case, dtype, tmp_path):
    config, values, (y, aux, dparams, dx) = run(case, dtype)
    routing = dense(config, aux.expert_ids, aux.weights)
    wanted = dense(config, values["expert_ids"], values["weights"])
    np.testing.assert_array_equal(np.isnan(routing), np.isnan(wanted), "expert ids")
    assert_close(np.nan_to_num(routing), np.nan_to_num(wanted), dtype, "weights")
    assert_close(y, values["y"], dtype, "y")
    assert_close(dx, values["dx"], dtype, "gradient of x")
    assert_trees_close(dparams, gradients(case, dtype, tmp_path), dtype, "gradient")


@pytest.mark.parametrize("case", [case for case in CASES if (GOLDEN / case / "stacked").is_dir()])
def test_stacked_experts_are_the_same_parameters(case):
    """The same weights, as transformers wrote them under the hub's names and as its modules hold them."""
    config, params = imported(GOLDEN / case / "checkpoint")
    stacked_config, stacked = imported(GOLDEN / case / "stacked")
    assert stacked_config == config
    jax.tree.map(np.testing.assert_array_equal, stacked, params)


def test_the_cases_cover_what_the_routers_differ_in():
    configs = [imported(GOLDEN / case / "checkpoint")[0] for case in CASES]
    assert {config.latent_size is None for config in configs} == {True, False}
    assert {config.router.norm_topk_prob for config in configs} == {True, False}
    assert {config.router.num_groups for config in configs} == {1, 2, 4}
    assert {config.router.score_function for config in configs} == {
        "sigmoid",
        "softmax",
        "softmax_topk",
        "sqrt_softplus",
    }
    assert len({config.router.routed_scaling_factor for config in configs}) > 2
    assert {config.router.group_score_topk for config in configs} == {1, 2}
    assert {config.router.selection for config in configs} == {"score", "given"}
    assert {config.expert_bias for config in configs} == {True, False}
    assert {config.shared_expert_gate for config in configs} == {True, False}
    biases = [imported(GOLDEN / case / "checkpoint")[1]["router"].get("bias") for case in CASES]
    near_64 = [bias for bias in biases if bias is not None and bias.min() >= 64 and bias.max() - bias.min() < 0.25]
    assert len(near_64) > 3


@pytest.mark.parametrize("case", CASES)
def test_every_golden_file_says_what_made_it(case):
    pinned = dict(line.split("==") for line in (GOLDEN / "requirements.txt").read_text().split("\n") if "==" in line)
    for file in GOLDEN.glob(f"{case}/*.safetensors"):
        with safe_open(file, "np") as opened:
            made_by = opened.metadata()
        assert made_by["transformers"] == pinned["transformers"]
        assert made_by["torch"].split("+")[0] == pinned["torch"]
        assert made_by["seed"].isdecimal()


def test_the_golden_files_are_small():
    assert sum(file.stat().st_size for file in GOLDEN.rglob("*") if file.is_file()) < 1_250_000
