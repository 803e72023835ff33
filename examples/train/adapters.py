"""Fine-tuning: low-rank adapters (Hu et al., arXiv 2106.09685) beside the frozen weights of a finished run.

The adapters take the place of the parameters in the training state, and the frozen weights lie beside them. A
checkpoint holds both, so it does not need the base run.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Key, PyTree

from examples.train.config import Config
from examples.train.errors import TrainError
from examples.train.model import LanguageModel
from examples.train.placing import LAYERS
from examples.train.run_folder import FILE, read_config
from examples.train.step import TrainState
from jax_latent_moe import linen, lora, quantize

MAY_DIFFER = {"dropout", "backend", "dtype"}
"""Fields of the model's shape that do not change its parameters."""


def adapt(
    model: LanguageModel, optimizer: optax.GradientTransformation, config: Config, base: TrainState
) -> TrainState:
    """The state before the first step of fine-tuning. It predicts what the base does, but for the rounding of codes.

    Args:
        model: the network, with MoE layers.
        optimizer: trains the adapters.
        config: gives rank, alpha, format and seed.
        base: the state of the base run.

    Raises:
        jax_latent_moe.errors.ConfigError: the format does not fit the sizes of the experts.
    """
    adapter_key, key = jax.random.split(jax.random.key(config.seed))
    params, codes, adapters = dict(base.params), {}, {}
    for index, name in enumerate(sorted(base.correction_bias)):  # the blocks with experts
        block = params[name]
        router = block["mlp"]["router"] | base.correction_bias[name]["mlp"]["router"]
        variables = _adapt_layers(
            model, config, jax.random.fold_in(adapter_key, index), block["mlp"] | {"router": router}, name == LAYERS
        )
        params[name] = block | {"mlp": variables["params"]}
        adapters[name] = {"mlp": variables[linen.ADAPTERS]}
        if linen.CODES in variables:
            codes[name] = {"mlp": variables[linen.CODES]}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=adapters,
        correction_bias=base.correction_bias,
        opt_state=optimizer.init(adapters),
        key=jax.random.key_data(key),
        smoothed_loss=jnp.full((), jnp.nan, jnp.float32),
        frozen={"params": params} | ({linen.CODES: codes} if codes else {}),
    )


def make_adapt(
    model: LanguageModel, optimizer: optax.GradientTransformation, config: Config, mesh: Mesh
) -> Callable[[TrainState], TrainState]:
    """The compiled `adapt`, for a mesh of one device."""
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(functools.partial(adapt, model, optimizer, config), out_shardings=whole)


def _adapt_layers(model, config: Config, key: Key, layer: PyTree, stacked: bool) -> PyTree:
    """The linen variables of a layer with adapters, or of stacked layers."""

    def one(key, layer):
        weights = layer if config.base_format == "dense" else quantize(layer, model.moe, config.base_format)
        adapted = lora.adapt(key, weights, model.moe, rank=config.lora, alpha=config.lora_alpha)
        return linen.from_params(adapted, model.moe, axis_names=None)

    if not stacked:
        return one(key, layer)
    return jax.vmap(one)(jax.random.split(key, model.model.layers - 1), layer)


def check_base(folder: Path, config: Config):
    """Refuses a base that the options cannot fine-tune.

    Args:
        folder: the folder of the base run.
        config: the options of the new run.

    Raises:
        TrainError: the folder holds no run, the run has adapters itself, or its model has another shape.
    """
    base = read_config(folder)
    if base.lora:
        raise TrainError(f"--base {folder} has adapters itself: give the run that it was fine-tuned from.")
    before, now = _shape(base), _shape(config)
    changed = [f"{name}={before[name]}, here {now[name]}" for name in now if before[name] != now[name]]
    if changed:
        raise TrainError(
            f"--base {folder} was trained with {'; '.join(changed)}: give --config {folder / FILE}, which has its "
            "options, and --run for the new folder."
        )


def _shape(config: Config) -> dict[str, object]:
    """The options that must be those of the base run."""
    sizes = dataclasses.asdict(config.model)
    names = [name for name in sizes if name not in MAY_DIFFER]
    run = {"mlp": config.mlp, "tokenizer": config.tokenizer, "scan_layers": config.scan_layers}
    return run | {f"model.{name}": sizes[name] for name in names}
