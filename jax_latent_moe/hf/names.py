"""How each system calls the tensors of an MoE layer, and which block of which parameter each one holds."""

import dataclasses
import re
from collections.abc import Iterable
from typing import NamedTuple

from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.errors import ConfigError
from jax_latent_moe.params import param_shapes

Layer = int | str
"""A layer's index, or "mtp.1" for the second layer of NemotronH's multi-token predictor."""


@dataclasses.dataclass(frozen=True)
class Names:
    """Tensor names of one system; {e} is the expert. Matrices are [out, in] there.

    Where gate and up have one name they are one tensor: gate rows first, then up rows.

    Attributes:
        roots: what may stand before "layers.{i}.": the first that occurs in the checkpoint is taken.
        block: what follows.
    """

    roots: tuple[str, ...]
    block: str
    router: str
    router_bias: str
    w_gate: str
    w_up: str
    w_out: str
    shared_gate: str
    shared_up: str
    shared_out: str
    down_proj: str = ""
    latent_norm: str = ""
    up_proj: str = ""

    def __post_init__(self):
        for field in ("w_gate", "w_up", "w_out"):
            name = getattr(self, field)
            try:
                distinct = name.format(e=0) != name.format(e=1)
            except (AttributeError, LookupError, ValueError):
                distinct = False
            if not distinct:
                raise ConfigError(f"Names.{field}={name!r} must be text in which {{e}} stands for the expert's number.")

    def prefix(self, layer: Layer, present: Iterable[str]) -> str:
        """What the names of this layer's tensors begin with, among the names that are present.

        Raises:
            ValueError: the layer is neither an index nor such as "mtp.1".
        """
        if isinstance(layer, str):
            match = re.fullmatch(r"([a-z_]+)\.([0-9]+)", layer)
            if match is None:
                raise ValueError(f'{layer!r} names no layer: give its index, or "mtp.1" for one of the predictor\'s.')
            return f"{match[1]}.layers.{match[2]}.{self.block}."
        prefixes = [f"{root}layers.{layer}.{self.block}." for root in self.roots]
        used = [prefix for prefix in prefixes if any(name.startswith(prefix) for name in present)]
        return used[0] if used else prefixes[0]


_GATE_UP_DOWN = dict(
    w_gate="experts.{e}.gate_proj.weight",
    w_up="experts.{e}.up_proj.weight",
    w_out="experts.{e}.down_proj.weight",
)
_W1_W3_W2 = dict(w_gate="experts.{e}.w1.weight", w_up="experts.{e}.w3.weight", w_out="experts.{e}.w2.weight")
_SHARED = dict(
    shared_gate="shared_experts.gate_proj.weight",
    shared_up="shared_experts.up_proj.weight",
    shared_out="shared_experts.down_proj.weight",
)
_GATE = dict(router="gate.weight", router_bias="gate.e_score_correction_bias")

NEMOTRON_H = Names(
    roots=("backbone.", "model."),
    block="mixer",
    **_GATE,
    **_GATE_UP_DOWN,
    **_SHARED,
    down_proj="fc1_latent_proj.weight",
    up_proj="fc2_latent_proj.weight",
)
KIMI = Names(
    roots=("language_model.model.", "model."),
    block="block_sparse_moe",
    **_GATE,
    **_W1_W3_W2,
    **_SHARED,
    down_proj="routed_expert_down_proj.weight",
    latent_norm="routed_expert_norm.weight",
    up_proj="routed_expert_up_proj.weight",
)
DEEPSEEK_V3 = Names(roots=("model.",), block="mlp", **_GATE, **_GATE_UP_DOWN, **_SHARED)
QWEN3_MOE = DEEPSEEK_V3
MIXTRAL = Names(roots=("model.",), block="block_sparse_moe", **_GATE, **_W1_W3_W2, **_SHARED)
MEGATRON = Names(
    roots=("decoder.",),
    block="mlp",
    router="router.weight",
    router_bias="router.expert_bias",
    w_gate="experts.linear_fc1.weight{e}",
    w_up="experts.linear_fc1.weight{e}",
    w_out="experts.linear_fc2.weight{e}",
    shared_gate="shared_experts.linear_fc1.weight",
    shared_up="shared_experts.linear_fc1.weight",
    shared_out="shared_experts.linear_fc2.weight",
    down_proj="fc1_latent_proj.weight",
    up_proj="fc2_latent_proj.weight",
)


class Slot(NamedTuple):
    """One block of a parameter and the rows of a tensor that hold it, transposed.

    Attributes:
        tensor: name within the layer.
        first_row: of the tensor's rows.
        path: (part, leaf) of the parameter tree.
        expert: index on the leaf's first axis; None where it has no experts.
        half: 0 for the gate and 1 for the up half of a gated w_in; None elsewhere.
    """

    tensor: str
    first_row: int
    path: tuple[str, str]
    expert: int | None = None
    half: int | None = None


def layer_slots(config: LatentMoEConfig, naming: Names) -> list[Slot]:
    """Every block of the layer's parameters.

    Raises:
        ValueError: the system has no name for a parameter of this configuration.
    """
    simple = {
        ("router", "kernel"): naming.router,
        ("router", "bias"): naming.router_bias,
        ("down_proj", "kernel"): naming.down_proj,
        ("latent_norm", "scale"): naming.latent_norm,
        ("up_proj", "kernel"): naming.up_proj,
        ("shared", "w_out"): naming.shared_out,
    }
    slots = []
    for part, leaves in param_shapes(config).items():
        for leaf, struct in leaves.items():
            path = (part, leaf)
            experts = range(config.num_experts) if part == "experts" else (None,)
            if leaf == "w_in":
                gate, up = (naming.shared_gate, naming.shared_up) if part == "shared" else (naming.w_gate, naming.w_up)
                up_row = struct.shape[-1] if config.gated and gate == up else 0
                for e in experts:
                    if config.gated:
                        slots.append(Slot(gate.format(e=e), 0, path, e, 0))
                    slots.append(Slot(up.format(e=e), up_row, path, e, 1 if config.gated else None))
            elif path == ("experts", "w_out"):
                slots += [Slot(naming.w_out.format(e=e), 0, path, e) for e in experts]
            elif simple.get(path):
                slots.append(Slot(simple[path], 0, path))
            else:
                raise ValueError(f"{part}/{leaf} has no name in this system: only the configuration without it fits.")
    return slots


def tensor_shapes(config: LatentMoEConfig, slots: Iterable[Slot]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that the slots name: [out, in], or [n] for a bias or a scale."""
    shapes = param_shapes(config)
    tensors: dict[str, tuple[int, ...]] = {}
    for slot in slots:
        shape = block_shape(shapes[slot.path[0]][slot.path[1]].shape, slot)
        if len(shape) == 1:
            tensors[slot.tensor] = shape
        else:
            tensors[slot.tensor] = (slot.first_row + shape[1], shape[0])  # slots of one tensor come in order of rows
    return tensors


def block_shape(leaf_shape: tuple[int, ...], slot: Slot) -> tuple[int, ...]:
    """Shape [in, out], or [n], of a slot's block of its leaf."""
    shape = leaf_shape if slot.expert is None else leaf_shape[1:]
    return shape if slot.half is None else (shape[0], shape[2])
