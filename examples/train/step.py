"""The training step, the state that it updates, and the validation loss."""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Int32, PyTree, UInt32

from examples.train.data import Batch, ValidationWindows
from examples.train.initialising import draw, shapes
from examples.train.model import LanguageModel
from examples.train.optimizer import global_norm
from examples.train.placing import from_whole, optimizer_shardings, variable_shardings
from examples.train.reducing import ReduceDtype, shared_in
from jax_latent_moe.linen import ADAPTERS, EXPERT_CODES, encode_experts, update_correction_bias
from jax_latent_moe.linen import loads as loads_of

LOAD = "tokens_per_expert"
GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}
"""Options for XLA on a GPU: matrix products use cuBLAS only and are not merged. On an H100 this takes 1 % off a step
and a fifth off compilation."""
SMALL = 2**20
"""Elements of a gradient that costs next to nothing to write once more."""


def compiled_once[**P, R](make: Callable[P, R]) -> Callable[P, R]:
    """Caches the function that `make` returns. Runs of a process with the same model and options compile it once."""
    return cast(Callable[P, R], functools.cache(make))


class TrainState(NamedTuple):
    """The state that a step changes. A checkpoint holds it and the state of the data iterator.

    Attributes:
        step: the number of steps done.
        params: the parameters that the optimiser trains.
        correction_bias: the biases of the routers, which only the loads move. {} for a dense model.
        opt_state: the state of the optimiser.
        key: the key data of the run's random numbers.
        smoothed_loss: the moving average of the loss, in which the newest step weighs a twentieth. NaN before the first
            step.
        frozen: None, or the collections of the weights below adapters. `params` are then the adapters.
    """

    step: Int32[Array, ""]
    params: PyTree
    correction_bias: PyTree
    opt_state: PyTree
    key: UInt32[Array, " words"]
    smoothed_loss: Float[Array, ""]
    frozen: PyTree = None


class Metrics(NamedTuple):
    """The metrics of one step.

    Attributes:
        loss: the mean cross-entropy of a token in nats.
        auxiliary_loss: the sum of the layers' auxiliary losses, with their coefficients.
        grad_norm: the global norm of the gradient before clipping.
        loads: the tokens that each expert of each MoE layer read. None for a dense model.
        bad: the result of `is_bad`.
    """

    loss: Float[Array, ""]
    auxiliary_loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    loads: Int32[Array, "layers experts"] | None
    bad: Bool[Array, ""]


def init_state(
    model: LanguageModel, optimizer: optax.GradientTransformation, seed: int | UInt32[Array, ""]
) -> TrainState:
    """The state before the first step."""
    init_key, key = jax.random.split(jax.random.key(seed))
    params, correction_bias = draw(model, init_key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        correction_bias=correction_bias,
        opt_state=optimizer.init(params),
        key=jax.random.key_data(key),
        smoothed_loss=jnp.full((), jnp.nan, jnp.float32),
    )


@compiled_once
def state_shardings(model: LanguageModel, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The sharding of each part of the state on a mesh, as a tree of the state's form."""
    boxed = shapes(model)
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
    """The state before the first step, made on the mesh. It has the values of `init_state`."""
    return make_init(model, optimizer, mesh)(np.uint32(seed))


@compiled_once
def make_init(
    model: LanguageModel, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Callable[[np.uint32], TrainState]:
    """The compiled `init_state_on`."""
    # The seed is an argument because XLA would evaluate a program without arguments while it compiles it.
    return jax.jit(
        functools.partial(init_state, model, optimizer), out_shardings=state_shardings(model, optimizer, mesh)
    )


def state_shapes(model: LanguageModel, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state on the mesh."""
    return jax.eval_shape(make_init(model, optimizer, mesh), np.uint32(0))


def is_bad(loss: Float[Array, ""], grad_norm: Float[Array, ""], smoothed: Float[Array, ""], spike_factor: float):
    """Whether loss or gradient are not finite, or the loss exceeds spike_factor times the smoothed loss."""
    bad = ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))
    return bad | (loss > spike_factor * smoothed) if spike_factor else bad  # a comparison with NaN is False


def predict(
    model: LanguageModel, state: TrainState, tokens: Int[Array, "batch time"]
) -> Float[Array, "batch time vocabulary"]:
    """The logits of the token after each position."""
    return cast(Array, model.apply(variables_of(state), tokens))


def variables_of(state: TrainState) -> dict[str, PyTree]:
    """The variables of the model in Flax's collections."""
    frozen = state.frozen
    weights = {"params": state.params} if frozen is None else frozen | {ADAPTERS: state.params}
    return weights | {"correction_bias": state.correction_bias}


def codes_of(model: LanguageModel, state: TrainState) -> dict[str, PyTree]:
    """The collection of the experts' codes, {} unless they multiply in FP8. All parts of a step's batch read it."""
    if model.moe is None or model.moe.precision is None:
        return {}
    return {EXPERT_CODES: encode_experts(variables_of(state), model.moe)[EXPERT_CODES]}


@compiled_once
def make_train_step(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    skip_bad: bool = False,
    spike_factor: float = 0.0,
    accumulate: int = 1,
    reduce_dtype: ReduceDtype = "float32",
    adapters: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The compiled step. It computes gradients, applies the optimiser and moves the correction bias by the loads.

    Args:
        model: the network.
        optimizer: trains the parameters.
        mesh: the mesh of state and batch.
        skip_bad: whether a step that `is_bad` changes only the number of steps.
        spike_factor: see `is_bad`.
        accumulate: the number of parts of a batch, which are computed one after the other. Their gradients and loads
            are added up.
        reduce_dtype: the dtype in which devices add up the gradients of kernels, and a device those of two parts.
            bfloat16 needs a model that computes in it and encodes no weights.
        adapters: whether the state holds adapters and frozen weights. It then lies on one device.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    placed = whole if adapters else state_shardings(model, optimizer, mesh)

    def objective(params, state, codes, part, key, scored):
        tokens, targets, weights, documents = part
        output = model.apply(
            variables_of(state._replace(params=params)) | codes,
            tokens,
            deterministic=False,
            targets=targets,
            weights=weights / scored,
            documents=documents,
            rngs={"dropout": key},
            mutable=["losses", "intermediates"],
        )
        loss, sown = cast(tuple[Array, dict[str, Any]], output)
        auxiliary = sum(map(jnp.sum, jax.tree.leaves(sown.get("losses", {}))), start=jnp.zeros(())) / accumulate
        return loss + auxiliary, (loss, auxiliary, loads_of(sown)["intermediates"])

    def wide(grads, sown):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), grads), sown

    def gradients(state, batch):
        """Gradients of the whole batch, with the loss, the auxiliary loss and the loads."""
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        parts = inputs_and_targets(batch)
        scored = jnp.sum(parts[2])
        shared = shared_in(state.params, reduce_dtype)
        of_part = functools.partial(jax.grad(objective, has_aux=True), shared, state, codes_of(model, state))
        if accumulate == 1:
            return wide(*of_part(parts, key, scored))

        def add(total, part_and_key):
            part = of_part(*part_and_key, scored)
            # Two parts are added in the dtype of their gradients, which XLA then sums over the devices once and in that
            # dtype. A sum of more parts would lose bits.
            return jax.tree.map(jnp.add, total, part if accumulate == 2 else wide(*part)), None

        keys = jax.random.split(key, accumulate)
        parts = jax.tree.map(functools.partial(_microbatches, count=accumulate), parts)
        first, others = (jax.tree.map(operator.itemgetter(i), (parts, keys)) for i in (0, slice(1, None)))
        # The first part outside of the loop saves zeros and a sum in float32. With two parts XLA needs no loop at all,
        # so both read the same casts of the parameters.
        total = of_part(*first, scored)
        total = total if accumulate == 2 else wide(*total)
        return wide(*jax.lax.scan(add, *_in_turn(total, others))[0])

    options = GPU_OPTIONS if jax.default_backend() == "gpu" else None

    @functools.partial(jax.jit, donate_argnames="state", out_shardings=(placed, whole), compiler_options=options)
    def train_step(state, batch):
        before = state
        grads, (loss, auxiliary, loads) = gradients(state, batch)
        grad_norm = global_norm(grads)
        bad = is_bad(loss, grad_norm, state.smoothed_loss, spike_factor)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        rate = model.moe.router.bias_update_rate if model.moe else 0.0
        smoothed = jnp.where(jnp.isnan(state.smoothed_loss), loss, 0.95 * state.smoothed_loss + 0.05 * loss)
        state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            correction_bias=update_correction_bias(state.correction_bias, loads, rate),
            opt_state=opt_state,
            key=state.key,
            smoothed_loss=smoothed,
            frozen=state.frozen,
        )
        if skip_bad:
            kept = jax.tree.map(functools.partial(jnp.where, bad), before, state)
            state = kept._replace(step=state.step)
        return state, Metrics(loss, auxiliary, grad_norm, _by_layer(loads), bad)

    return train_step


def inputs_and_targets(batch: Batch) -> tuple[Array, Array, Array, Array | None]:
    """The inputs, targets and weights [batch, context], and the documents' numbers or None.

    The first token of a document is the separator. As a target it has the weight 0.
    """
    tokens = batch.tokens.astype(jnp.int32)
    if batch.starts is None:
        return tokens[:, :-1], tokens[:, 1:], jnp.ones(tokens[:, 1:].shape, jnp.float32), None
    documents = jnp.cumsum(batch.starts[:, :-1], axis=1, dtype=jnp.int32)
    return tokens[:, :-1], tokens[:, 1:], (~batch.starts[:, 1:]).astype(jnp.float32), documents


def _microbatches(x, count):
    """[batch, ...] -> [count, batch / count, ...]. Each part takes an equal share of every device's rows."""
    return jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0)


def _in_turn(total, others):
    """Both arguments. What reads `others` starts after the backward pass of `total`, so their activations share memory.

    The last of the small gradients, that of the first block's norm, ends that pass. A barrier on the large ones would
    make XLA write them in float32, where kernels give bfloat16.
    """
    leaves, tree = jax.tree.flatten(total)
    small = [i for i, leaf in enumerate(leaves) if leaf.size <= SMALL]
    done, others = jax.lax.optimization_barrier(([leaves[i] for i in small], others))
    for i, leaf in zip(small, done, strict=True):
        leaves[i] = leaf
    return jax.tree.unflatten(tree, leaves), others


def _by_layer(loads):
    """The loads [layers, experts] in the order of the layers, from unrolled or stacked blocks."""
    flat: dict[Any, Any] = flatten_dict(loads)
    counts = [jnp.atleast_2d(sum(flat[path])) for path in sorted(flat) if path[-1] == LOAD]
    return jnp.concatenate(counts) if counts else None


@jax.jit
def all_finite(tree: PyTree) -> Array:
    """Whether no floating leaf holds NaN or infinity."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


@compiled_once
def make_bits_per_byte(
    model: LanguageModel, batch_size: int, mesh: Mesh
) -> Callable[[TrainState, ValidationWindows], float]:
    """A function that gives the model's mean bits per byte over the scored tokens of some windows."""

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
    def nats(state, batch, targets, scored):
        tokens, documents = batch.tokens.astype(jnp.int32), None
        if batch.starts is not None:
            documents = jnp.cumsum(batch.starts, axis=1, dtype=jnp.int32)
        wanted = {"targets": targets.astype(jnp.int32), "weights": scored.astype(jnp.float32), "documents": documents}
        return model.apply(variables_of(state), tokens, **wanted)

    def bits_per_byte(state, windows):
        sums = []
        for start in range(0, len(windows.scored), batch_size):
            batch = [part[start : start + batch_size] for part in jax.tree.leaves(windows.arrays)]
            missing = batch_size - len(batch[0])
            padded = [from_whole(np.pad(part, ((0, missing), (0, 0))), mesh) for part in batch]
            sums.append(nats(state, *jax.tree.unflatten(jax.tree.structure(windows.arrays), padded)))
        return float(sum(jax.device_get(sums))) / windows.num_bytes / math.log(2)

    return bits_per_byte
