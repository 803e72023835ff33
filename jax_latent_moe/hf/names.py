"""How each system calls the tensors of an MoE layer, and which block of which parameter each one holds."""

import dataclasses
import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.errors import ConfigError
from jax_latent_moe.params import param_shapes

Layer = int | str
"""A layer's index, or "mtp.1" for the second layer of NemotronH's multi-token predictor."""


@dataclasses.dataclass(frozen=True)
class Names:
    """Tensor names of one system; {e} is the expert. Matrices are [out, in] there.

    Where gate and up have one name they are one tensor: gate rows first, then up rows. An expert's name without {e} is
    that of one tensor [E, out, in], which holds all experts.

    Attributes:
        roots: what may stand before "layers.{i}.": the first that occurs in the checkpoint is taken. The first is the
            hub's, the last that of transformers' own modules.
        blocks: what may follow, likewise.
    """

    roots: tuple[str, ...]
    blocks: tuple[str, ...]
    router: str
    router_bias: str
    w_gate: str
    w_up: str
    w_out: str
    shared_gate: str
    shared_up: str
    shared_out: str
    shared_expert_gate: str = ""
    down_proj: str = ""
    latent_norm: str = ""
    up_proj: str = ""

    def __post_init__(self):
        for field in ("w_gate", "w_up", "w_out"):
            name = getattr(self, field)
            try:
                name.format(e=0)
            except (AttributeError, LookupError, ValueError) as error:
                raise ConfigError(
                    f"Names.{field}={name!r} must be text in which {{e}} stands for the expert's number."
                ) from error

    def prefix(self, layer: Layer, present: Collection[str]) -> str:
        """What the names of this layer's tensors begin with, among the names that are present.

        Raises:
            ValueError: the layer is neither an index nor such as "mtp.1".
        """
        roots, index = self.roots, layer
        if isinstance(layer, str):
            match = re.fullmatch(r"([a-z_]+)\.([0-9]+)", layer)
            if match is None:
                raise ValueError(f'{layer!r} names no layer: give its index, or "mtp.1" for one of the predictor\'s.')
            roots, index = (f"{match[1]}.",), match[2]
        prefixes = [f"{root}layers.{index}.{block}." for root in roots for block in self.blocks]
        used = (prefix for prefix in prefixes if any(name.startswith(prefix) for name in present))
        return next(used, prefixes[0])

    def stacked(self, gated: bool) -> "Names":
        """The names of transformers' own modules from version 5 on, which hold a layer's experts in two tensors.

        Args:
            gated: whether the experts have a gate, which is stored in one tensor with up.
        """
        w_in = "experts.gate_up_proj" if gated else "experts.up_proj"
        return dataclasses.replace(
            self,
            roots=self.roots[::-1],
            blocks=self.blocks[::-1],
            w_gate=w_in,
            w_up=w_in,
            w_out="experts.down_proj",
        )


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
    blocks=("mixer",),
    **_GATE,
    **_GATE_UP_DOWN,
    **_SHARED,
    down_proj="fc1_latent_proj.weight",
    up_proj="fc2_latent_proj.weight",
)
KIMI = Names(
    roots=("language_model.model.", "model."),
    blocks=("block_sparse_moe", "mlp"),
    **_GATE,
    **_W1_W3_W2,
    **_SHARED,
    down_proj="routed_expert_down_proj.weight",
    latent_norm="routed_expert_norm.weight",
    up_proj="routed_expert_up_proj.weight",
)
DEEPSEEK_V3 = Names(roots=("model.",), blocks=("mlp",), **_GATE, **_GATE_UP_DOWN, **_SHARED)
KIMI_K25 = dataclasses.replace(DEEPSEEK_V3, roots=("language_model.model.", "model.language_model."))
QWEN3_MOE = DEEPSEEK_V3
QWEN3_NEXT = dataclasses.replace(
    DEEPSEEK_V3,
    shared_gate="shared_expert.gate_proj.weight",
    shared_up="shared_expert.up_proj.weight",
    shared_out="shared_expert.down_proj.weight",
    shared_expert_gate="shared_expert_gate.weight",
)
MIXTRAL = Names(roots=("model.",), blocks=("block_sparse_moe", "mlp"), **_GATE, **_W1_W3_W2, **_SHARED)
MEGATRON = Names(
    roots=("decoder.",),
    blocks=("mlp",),
    router="router.weight",
    router_bias="router.expert_bias",
    w_gate="experts.linear_fc1.weight{e}",
    w_up="experts.linear_fc1.weight{e}",
    w_out="experts.linear_fc2.weight{e}",
    shared_gate="shared_experts.linear_fc1.weight",
    shared_up="shared_experts.linear_fc1.weight",
    shared_out="shared_experts.linear_fc2.weight",
    shared_expert_gate="shared_experts.gate_weight",
    down_proj="fc1_latent_proj.weight",
    up_proj="fc2_latent_proj.weight",
)


class Slot(NamedTuple):
    """One block of a parameter and the rows of a tensor that hold it, transposed.

    Attributes:
        tensor: name within the layer.
        first_row: of the tensor's rows; a tensor [E, out, in] counts as one of E * out rows.
        path: (part, leaf) of the parameter tree.
        expert: index on the leaf's first axis; None where it has no experts.
        half: 0 for the gate and 1 for the up half of a gated w_in; None elsewhere.
        stacked: whether the tensor is such a one, of all experts.
    """

    tensor: str
    first_row: int
    path: tuple[str, str]
    expert: int | None = None
    half: int | None = None
    stacked: bool = False


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
        ("shared", "gate"): naming.shared_expert_gate,
    }
    slots = []
    for part, leaves in param_shapes(config).items():
        for leaf, struct in leaves.items():
            path = (part, leaf)
            if part == "experts":
                slots += _expert_slots(config, naming, path, struct.shape)
            elif leaf == "w_in":
                slots += _matrix_slots(config, naming.shared_gate, naming.shared_up, path, struct.shape[-1])
            elif simple.get(path):
                slots.append(Slot(simple[path], 0, path))
            else:
                raise ValueError(f"{part}/{leaf} has no name in this system: only the configuration without it fits.")
    return slots


def _matrix_slots(config, gate, up, path, rows, expert=None) -> list[Slot]:
    """The blocks of a w_in; gate and up are of so many rows each."""
    if not config.gated:
        return [Slot(up, 0, path, expert)]
    return [Slot(gate, 0, path, expert, 0), Slot(up, rows if gate == up else 0, path, expert, 1)]


def _expert_slots(config, naming, path, shape) -> list[Slot]:
    slots = []
    for e in range(config.num_experts):
        if path[1] == "w_out":
            of_expert = [Slot(naming.w_out.format(e=e), 0, path, e)]
        else:
            gate, up = naming.w_gate.format(e=e), naming.w_up.format(e=e)
            of_expert = _matrix_slots(config, gate, up, path, shape[-1], e)
        rows = {slot.tensor: slot.first_row + shape[-1] for slot in of_expert}
        for slot in of_expert:
            stacked = slot.tensor in (naming.w_gate, naming.w_up, naming.w_out)
            first_row = slot.first_row + e * rows[slot.tensor] if stacked else slot.first_row
            slots.append(slot._replace(first_row=first_row, stacked=stacked))
    return slots


def tensor_shapes(config: LatentMoEConfig, slots: Iterable[Slot]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that the slots name: [out, in], [E, out, in], or [n] for a bias or a scale."""
    shapes = param_shapes(config)
    tensors: dict[str, tuple[int, ...]] = {}
    for slot in slots:
        shape = block_shape(shapes[slot.path[0]][slot.path[1]].shape, slot)
        if len(shape) == 1:
            tensors[slot.tensor] = shape
            continue
        rows = slot.first_row + shape[1]  # slots of one tensor come in order of rows
        stack = (config.num_experts, rows // config.num_experts) if slot.stacked else (rows,)
        tensors[slot.tensor] = (*stack, shape[0])
    return tensors


def block_shape(leaf_shape: tuple[int, ...], slot: Slot) -> tuple[int, ...]:
    """Shape [in, out], or [n], of a slot's block of its leaf."""
    shape = leaf_shape if slot.expert is None else leaf_shape[1:]
    return shape if slot.half is None else (shape[0], shape[2])
