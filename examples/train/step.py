"""One training step and the state it carries; the validation loss."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Int32, Key, PyTree, UInt8, UInt32

from examples.train.data import ValidationWindows
from examples.train.model import LanguageModel
from examples.train.placing import from_whole, optimizer_shardings, variable_shardings
from jax_latent_moe import update_correction_bias


def compiled_once[**P, R](make: Callable[P, R]) -> Callable[P, R]:
    """One compiled function for equal models and options, however many runs of a process ask for it."""
    return cast(Callable[P, R], functools.cache(make))


class TrainState(NamedTuple):
    """All that a step changes, and all that a checkpoint must hold beside the data iterator.

    Attributes:
        step: steps done.
        params: what the optimiser trains.
        correction_bias: the routers' biases, moved by the load alone; {} for a dense model.
        opt_state: the optimiser's.
        key: key data of the run's random numbers.
        smoothed_loss: of the good steps, each weighing a twentieth; NaN before the first.
    """

    step: Int32[Array, ""]
    params: PyTree
    correction_bias: PyTree
    opt_state: PyTree
    key: UInt32[Array, " words"]
    smoothed_loss: Float[Array, ""]


class Metrics(NamedTuple):
    """What one step says of itself; loads are tokens per expert of each MoE layer, bad whether `is_bad` says so."""

    loss: Float[Array, ""]
    auxiliary_loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    loads: Int32[Array, "layers experts"] | None
    bad: Bool[Array, ""]


def initialise(model: LanguageModel) -> Callable[[Key[Array, ""]], PyTree]:
    """A function of a key that gives the model's variables, boxed; its one sequence is not split over any mesh."""
    moe = None if model.moe is None else dataclasses.replace(model.moe, parallel=None)
    alone = LanguageModel(model.model, moe)
    return lambda key: alone.init(key, jnp.zeros((1, model.model.context), jnp.int32))


def init_state(model: LanguageModel, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step."""
    init_key, key = jax.random.split(jax.random.key(seed))
    variables = nn.unbox(jax.jit(initialise(model))(init_key))
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        correction_bias=variables.get("correction_bias", {}),
        opt_state=optimizer.init(params),
        key=jax.random.key_data(key),
        smoothed_loss=jnp.full((), jnp.nan, jnp.float32),
    )


@compiled_once
def state_shardings(model: LanguageModel, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Where each part of the state lies on a mesh: shardings in the state's tree."""
    boxed = jax.eval_shape(initialise(model), jax.random.key(0))
    variables = variable_shardings(boxed, mesh)
    opt_state = jax.eval_shape(optimizer.init, nn.unbox(boxed["params"]))
    whole: Any = NamedSharding(mesh, PartitionSpec())
    return TrainState(
        step=whole,
        params=variables["params"],
        correction_bias=variables.get("correction_bias", {}),
        opt_state=optimizer_shardings(opt_state, variables["params"], mesh),
        key=whole,
        smoothed_loss=whole,
    )


def init_state_on(model: LanguageModel, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh) -> TrainState:
    """The state before the first step, the same values as `init_state`, born where it lies on the mesh."""
    shardings = state_shardings(model, optimizer, mesh)
    return jax.jit(lambda: init_state(model, optimizer, seed), out_shardings=shardings)()


def is_bad(loss: Float[Array, ""], grad_norm: Float[Array, ""], smoothed: Float[Array, ""], spike_factor: float):
    """Whether a step's loss or gradient is not finite, or its loss more than spike_factor times the smoothed one."""
    bad = ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))
    return bad | (loss > spike_factor * smoothed) if spike_factor else bad  # nothing is more than NaN


def next_byte_loss(logits: Float[Array, "*batch v"], targets: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Cross-entropy in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def predict(
    model: LanguageModel, state: TrainState, tokens: Int[Array, "batch time"]
) -> Float[Array, "batch time vocabulary"]:
    """Logits of the byte after each position."""
    return cast(Array, model.apply({"params": state.params, "correction_bias": state.correction_bias}, tokens))


@compiled_once
def make_train_step(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    skip_bad: bool = False,
    spike_factor: float = 0.0,
) -> Callable[[TrainState, UInt8[Array, "batch context+1"]], tuple[TrainState, Metrics]]:
    """The compiled step: gradients, the optimiser, then the correction bias from the step's loads.

    With skip_bad a step that `is_bad` changes nothing but the count of steps.
    """
    placed, whole = state_shardings(model, optimizer, mesh), NamedSharding(mesh, PartitionSpec())

    def loss_fn(params, state, batch):
        dropout_key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        output = model.apply(
            {"params": params, "correction_bias": state.correction_bias},
            batch[:, :-1],
            deterministic=False,
            rngs={"dropout": dropout_key},
            mutable=["losses", "intermediates"],
        )
        logits, sown = cast(tuple[Array, dict[str, Any]], output)
        loss = jnp.mean(next_byte_loss(logits, batch[:, 1:]))
        auxiliary = sum(jax.tree.leaves(sown.get("losses", {})), start=jnp.zeros(()))
        loads = [block["mlp"]["tokens_per_expert"][0] for _, block in sorted(sown.get("intermediates", {}).items())]
        return loss + auxiliary, (loss, auxiliary, loads)

    @functools.partial(jax.jit, donate_argnames="state", out_shardings=(placed, whole))
    def train_step(state, batch):
        batch, before = batch.astype(jnp.int32), state
        gradients, (loss, auxiliary, loads) = jax.grad(loss_fn, has_aux=True)(state.params, state, batch)
        grad_norm = optax.tree.norm(gradients)
        bad = is_bad(loss, grad_norm, state.smoothed_loss, spike_factor)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        rate = model.moe.router.bias_update_rate if model.moe else 0.0
        biases, structure = jax.tree.flatten(state.correction_bias)
        biases = [update_correction_bias(bias, load, rate) for bias, load in zip(biases, loads, strict=True)]
        smoothed = jnp.where(jnp.isnan(state.smoothed_loss), loss, 0.95 * state.smoothed_loss + 0.05 * loss)
        state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            correction_bias=jax.tree.unflatten(structure, biases),
            opt_state=opt_state,
            key=state.key,
            smoothed_loss=smoothed,
        )
        if skip_bad:
            kept = jax.tree.map(functools.partial(jnp.where, bad), before, state)
            state = kept._replace(step=state.step)
        return state, Metrics(loss, auxiliary, grad_norm, jnp.stack(loads) if loads else None, bad)

    return train_step


@jax.jit
def all_finite(tree: PyTree) -> Array:
    """Whether no floating leaf holds NaN or infinity."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


@compiled_once
def make_bits_per_byte(
    model: LanguageModel, batch_size: int, mesh: Mesh
) -> Callable[[TrainState, ValidationWindows], float]:
    """A function that gives the mean bits which the model needs for a scored byte of the windows."""

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
    def nats(state, inputs, targets, scored):
        losses = next_byte_loss(predict(model, state, inputs.astype(jnp.int32)), targets.astype(jnp.int32))
        return jnp.sum(losses * scored)

    def bits_per_byte(state, windows):
        total = 0.0
        for start in range(0, len(windows.inputs), batch_size):
            batch = [part[start : start + batch_size] for part in (windows.inputs, windows.targets, windows.scored)]
            missing = batch_size - len(batch[0])
            padded = (from_whole(np.pad(part, ((0, missing), (0, 0))), mesh) for part in batch)
            total += float(nats(state, *padded))
        return total / int(windows.scored.sum()) / math.log(2)

    return bits_per_byte
