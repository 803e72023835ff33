"""`python -m jax_latent_moe.hf` lists, checks and converts the MoE layers of a checkpoint folder."""

import argparse
import pathlib
import re
import sys
from collections.abc import Iterator

import jax

from jax_latent_moe import cost
from jax_latent_moe.config import COMPUTE_DTYPES
from jax_latent_moe.errors import LatentMoEError
from jax_latent_moe.hf.checkpoint import Checkpoint, open_checkpoint, plan_layer
from jax_latent_moe.hf.exporting import differing_tensors, write_layers
from jax_latent_moe.hf.importing import import_layer
from jax_latent_moe.hf.names import MEGATRON, Layer
from jax_latent_moe.hf.outputs import check_new
from jax_latent_moe.hf.quantised import can_keep
from jax_latent_moe.hf.tensor_file import read_json
from jax_latent_moe.params import Params
from jax_latent_moe.piped import piped

TO = "names to write: the model's own on the hub, Megatron's, or transformers 5's (all experts in one tensor)"


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        with jax.enable_x64(True):  # without it, JAX would narrow float64 weights
            return options.run(open_checkpoint(options.folder, naming=options.naming), options)
    except (LatentMoEError, OSError) as error:
        print(_printable(error), file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jax_latent_moe.hf", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for run, name, text in (
        (_inspect, "inspect", "list the MoE layers; check names, shapes and dtypes without reading weights"),
        (_verify, "verify", "import every layer and check that it exports to the same bytes"),
        (
            _convert,
            "convert",
            "import layers and write them unquantised, with the names of the hub, of Megatron or of transformers 5",
        ),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("folder", help="checkpoint folder: config.json and *.safetensors")
        command.add_argument("--naming", choices=("hf", "megatron"), default="hf", help="names used in the folder")
        command.add_argument("--layers", help="for example 1,3,mtp.1; all layers by default")
        command.set_defaults(run=run)
        if name == "convert":
            command.add_argument("output", help="folder to create")
            command.add_argument("--to", choices=("hf", "megatron", "stacked"), default="hf", help=TO)
            command.add_argument("--dtype", choices=COMPUTE_DTYPES, help="dtype to write; as stored by default")
    return parser


def _layers(checkpoint: Checkpoint, options) -> list[Layer]:
    if options.layers is None:
        return list(checkpoint.layers)
    return [int(layer) if re.fullmatch(r"[0-9]{1,9}", layer) else layer for layer in options.layers.split(",")]


def _printable(message: object) -> str:
    """The message as text that any terminal accepts: file names may hold bytes that are not valid UTF-8."""
    return str(message).encode(errors="backslashreplace").decode()


def _inspect(checkpoint: Checkpoint, options) -> int:
    for layer in _layers(checkpoint, options):
        plan = plan_layer(checkpoint, layer)
        config, stored = plan.config, " and ".join(plan.quantised) or "unquantised"
        print(
            f"layer {layer}: d {config.hidden_size}, l {config.latent_size}, experts {config.num_experts}, k "
            f"{config.top_k}, m {config.expert_intermediate_size}, shared {config.shared_expert_intermediate_size}, "
            f"{config.activation}: {cost.parameters(config) / 1e9:.3f} B parameters, {plan.nbytes / 1e9:.2f} GB, "
            f"{stored}"
        )
    return 0


def _read(checkpoint: Checkpoint, options, dtype=None, keep=False) -> Iterator[tuple[Layer, Params]]:
    layers = _layers(checkpoint, options)
    for number, layer in enumerate(layers, 1):
        report = _progress(f"[{number}/{len(layers)}] {layer}")
        keep_quantized = keep and can_keep(plan_layer(checkpoint, layer))
        yield layer, import_layer(checkpoint, layer, dtype=dtype, keep_quantized=keep_quantized, report=report)


def _progress(what: str):
    """Prints a line to stderr for each complete parameter, and every 512 MB within a large one."""
    printed = 0

    def report(name: str, done: int, total: int):
        nonlocal printed
        printed = min(printed, done)
        if done == total or done - printed >= 2**29:
            printed = done % total
            print(f"layer {what}: {name} {done / 1e6:.1f} of {total / 1e6:.1f} MB", file=sys.stderr, flush=True)

    return report


def _verify(checkpoint: Checkpoint, options) -> int:
    status = 0
    for layer, params in _read(checkpoint, options, keep=True):
        plan = plan_layer(checkpoint, layer)
        if not can_keep(plan):
            print(f"layer {layer}: complete and finite; {' and '.join(plan.quantised)}, which is not written back")
        elif differing := differing_tensors(plan, params):
            status = 1
            print(f"layer {layer}: differs in {', '.join(differing)}")
        else:
            print(f"layer {layer}: {len(plan.tensors)} tensors come back bit for bit")
    return status


def _convert(checkpoint: Checkpoint, options) -> int:
    check_new(options.output, checkpoint.folder.path)
    own = open_checkpoint(options.folder)  # gives the names of the model's family, even if the folder uses Megatron's
    names = {"hf": own.names, "stacked": own.stacked_names, "megatron": MEGATRON}[options.to]
    layers = _read(checkpoint, options, options.dtype)
    described = read_json(pathlib.Path(options.folder, "config.json"))
    write_layers(options.output, layers, checkpoint.configs, names, config_json=described)
    print(_printable(f"wrote {options.output}"))
    return 0


if __name__ == "__main__":
    with piped():
        sys.exit(main())
