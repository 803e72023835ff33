"""The tensor names of an MoE layer in each system, and the block of a parameter that each tensor holds."""

import dataclasses
import math
import re
from collections.abc import Collection, Iterable
from typing import Any, Literal, NamedTuple

from jax_latent_moe.config import LatentMoEConfig
from jax_latent_moe.errors import ConfigError
from jax_latent_moe.params import param_shapes

Layer = int | str
"""A layer's index, or "mtp.1" for layer 1 of NemotronH's multi-token predictor."""


@dataclasses.dataclass(frozen=True)
class Names:
    """Tensor names of one system, in which {e} stands for the expert's number. Stored matrices are [out, in].

    If gate and up have the same name, they are one tensor: the gate rows come first, then the up rows. An expert's name
    without {e} names one tensor [E, out, in] that holds all experts, or [E, in, out] if interleaved.

    Attributes:
        roots: prefixes that may come before "layers.{i}.". The first that occurs in the checkpoint is used. The hub's
            prefix is listed first, and the prefix of transformers' own modules last.
        blocks: prefixes that may come after it, in the same order.
        interleaved: whether the experts' tensors are [E, in, out], and gate and up columns alternate (gpt-oss).
        token_experts: the table [vocabulary, k] that gives the experts of each token id, in layers whose choice is
            given (DeepSeek-V4). It is not a parameter.
        modules: the names of transformers' own modules, if they differ in more than the experts.
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
    router_logit_bias: str = ""
    b_in: str = ""
    b_out: str = ""
    token_experts: str = ""
    interleaved: bool = False
    modules: "Names | None" = None

    def __post_init__(self):
        for field in ("w_gate", "w_up", "w_out"):
            name = getattr(self, field)
            try:
                name.format(e=0)
            except (AttributeError, LookupError, ValueError) as error:
                raise ConfigError(
                    f"Names.{field}={name!r} must be text with {{e}} in place of the expert's number, and no other "
                    "braces."
                ) from error

    def prefix(self, layer: Layer, present: Collection[str]) -> str:
        """The prefix of this layer's tensor names: the first candidate that occurs among the names present.

        Raises:
            ValueError: the layer is neither an index nor a name like "mtp.1".
        """
        roots, index = self.roots, layer
        if isinstance(layer, str):
            match = re.fullmatch(r"([a-z_]+)\.([0-9]+)", layer)
            if match is None:
                raise ValueError(f'{layer!r} names no layer: give an index, or "mtp.1" for layer 1 of the predictor.')
            roots, index = (f"{match[1]}.",), match[2]
        prefixes = [f"{root}layers.{index}.{block}." for root in roots for block in self.blocks]
        used = (prefix for prefix in prefixes if any(name.startswith(prefix) for name in present))
        return next(used, prefixes[0])

    def stacked(self, gated: bool) -> "Names":
        """The names of transformers' own modules since version 5, which hold a layer's experts in two tensors.

        Args:
            gated: whether the experts have a gate; gate and up then share one tensor.
        """
        if self.interleaved:  # the hub's names are the modules' own
            return self
        w_in = "experts.gate_up_proj" if gated else "experts.up_proj"
        return dataclasses.replace(
            self.modules or self,
            roots=self.roots[::-1],
            blocks=self.blocks[::-1],
            w_gate=w_in,
            w_up=w_in,
            w_out="experts.down_proj",
        )


_GATE_UP_DOWN: dict[str, Any] = dict(
    w_gate="experts.{e}.gate_proj.weight",
    w_up="experts.{e}.up_proj.weight",
    w_out="experts.{e}.down_proj.weight",
)
_W1_W3_W2: dict[str, Any] = dict(
    w_gate="experts.{e}.w1.weight", w_up="experts.{e}.w3.weight", w_out="experts.{e}.w2.weight"
)
_SHARED: dict[str, Any] = dict(
    shared_gate="shared_experts.gate_proj.weight",
    shared_up="shared_experts.up_proj.weight",
    shared_out="shared_experts.down_proj.weight",
)
_GATE: dict[str, Any] = dict(router="gate.weight", router_bias="gate.e_score_correction_bias")

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
GPT_OSS = Names(
    roots=("model.",),
    blocks=("mlp",),
    router="router.weight",
    router_bias="",
    router_logit_bias="router.bias",
    w_gate="experts.gate_up_proj",
    w_up="experts.gate_up_proj",
    w_out="experts.down_proj",
    b_in="experts.gate_up_proj_bias",
    b_out="experts.down_proj_bias",
    shared_gate="",
    shared_up="",
    shared_out="",
    interleaved=True,
)
DEEPSEEK_V4 = dataclasses.replace(
    DEEPSEEK_V3,
    roots=("", "model."),
    blocks=("ffn", "mlp"),
    router_bias="gate.bias",
    **_W1_W3_W2,
    shared_gate="shared_experts.w1.weight",
    shared_up="shared_experts.w3.weight",
    shared_out="shared_experts.w2.weight",
    token_experts="gate.tid2eid",
    modules=dataclasses.replace(DEEPSEEK_V3, token_experts="gate.tid2eid"),
)
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


class Block(NamedTuple):
    """One block of a parameter, and the rows of a tensor that hold its transpose.

    Attributes:
        tensor: the tensor's name within the layer.
        first_row: the first row of the tensor that belongs to the block. A tensor [E, out, in] counts E * out rows.
        path: (part, leaf) of the parameter tree.
        expert: index on the leaf's first axis; None if the leaf has no axis of experts.
        half: 0 for the gate and 1 for the up half of a gated w_in; None otherwise.
        stacked: whether the tensor holds all experts, [E, out, in] or [E, in, out].
        layout: "transposed" if the tensor's rows are the block's columns; "same" if they are its rows; "pairs" if they
            are its rows and gate and up alternate on the last axis, while the block has a separate axis for them.
    """

    tensor: str
    first_row: int
    path: tuple[str, str]
    expert: int | None = None
    half: int | None = None
    stacked: bool = False
    layout: Literal["transposed", "same", "pairs"] = "transposed"


def layer_blocks(config: LatentMoEConfig, naming: Names) -> list[Block]:
    """Every block of the layer's parameters.

    Raises:
        ValueError: the system has no name for a parameter of this configuration.
    """
    if config.num_physical_experts != config.num_experts:
        raise ValueError("its experts have copies: parallel.collapse gives the parameters without them.")
    simple = {
        ("router", "kernel"): naming.router,
        ("router", "bias"): naming.router_bias,
        ("router", "logit_bias"): naming.router_logit_bias,
        ("experts", "b_in"): naming.b_in,
        ("experts", "b_out"): naming.b_out,
        ("down_proj", "kernel"): naming.down_proj,
        ("latent_norm", "scale"): naming.latent_norm,
        ("up_proj", "kernel"): naming.up_proj,
        ("shared", "w_out"): naming.shared_out,
        ("shared", "gate"): naming.shared_expert_gate,
    }
    blocks = []
    for part, leaves in param_shapes(config).items():
        for leaf, struct in leaves.items():
            path = (part, leaf)
            if simple.get(path):
                block = Block(simple[path], 0, path)
                biases = {"b_in": block._replace(layout="pairs"), "b_out": block._replace(layout="same")}
                blocks.append(biases.get(leaf, block))
            elif leaf in ("w_in", "w_out") and part == "experts":
                blocks += _expert_blocks(config, naming, path, struct.shape)
            elif leaf == "w_in":
                blocks += _matrix_blocks(config, naming.shared_gate, naming.shared_up, path, struct.shape[-1])
            else:
                raise ValueError(f"{part}/{leaf} has no name in this system: choose a configuration without it.")
    return blocks


def _matrix_blocks(config, gate, up, path, rows, expert=None) -> list[Block]:
    """The blocks of a w_in, whose gate and up halves have `rows` rows each."""
    if not config.gated:
        return [Block(up, 0, path, expert)]
    return [Block(gate, 0, path, expert, 0), Block(up, rows if gate == up else 0, path, expert, 1)]


def _expert_blocks(config, naming, path, shape) -> list[Block]:
    if naming.interleaved:
        first = Block(naming.w_out, 0, path, 0, None, True, "same")
        if path[1] == "w_in":
            first = first._replace(tensor=naming.w_up, layout="pairs")
        return [first._replace(first_row=e * shape[1], expert=e) for e in range(config.num_experts)]
    blocks = []
    for e in range(config.num_experts):
        if path[1] == "w_out":
            of_expert = [Block(naming.w_out.format(e=e), 0, path, e)]
        else:
            gate, up = naming.w_gate.format(e=e), naming.w_up.format(e=e)
            of_expert = _matrix_blocks(config, gate, up, path, shape[-1], e)
        rows = {block.tensor: block.first_row + shape[-1] for block in of_expert}
        for block in of_expert:
            stacked = block.tensor in (naming.w_gate, naming.w_up, naming.w_out)
            first_row = block.first_row + e * rows[block.tensor] if stacked else block.first_row
            blocks.append(block._replace(first_row=first_row, stacked=stacked))
    return blocks


def tensor_shapes(config: LatentMoEConfig, blocks: Iterable[Block]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that the blocks name: [out, in], [E, out, in], or [n] for a bias or a scale.

    An interleaved tensor is [E, in, out], and an expert's bias [E, out].
    """
    shapes = param_shapes(config)
    tensors: dict[str, tuple[int, ...]] = {}
    for block in blocks:
        shape = block_shape(shapes[block.path[0]][block.path[1]].shape, block)
        if len(shape) == 1:
            tensors[block.tensor] = shape
            continue
        if block.layout != "transposed":
            stack = (config.num_experts,) if block.stacked else ()
            tensors[block.tensor] = (*stack, shape[0], math.prod(shape[1:]))
            continue
        rows = block.first_row + shape[1]  # blocks of one tensor come in order of rows
        stack = (config.num_experts, rows // config.num_experts) if block.stacked else (rows,)
        tensors[block.tensor] = (*stack, shape[0])
    return tensors


def block_shape(leaf_shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """Shape of a block of a leaf: [in, out], [in, 2, out] if its layout is "pairs", or [n]."""
    shape = leaf_shape if block.expert is None else leaf_shape[1:]
    return shape if block.half is None else (shape[0], shape[2])
