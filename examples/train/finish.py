"""The end of a run: validation on all held-out text, a sample, the figures and the report."""

import bz2
import lzma
from collections.abc import Mapping

import jax
from jax.sharding import Mesh
from matplotlib.figure import Figure

from examples.train import heat_maps, plots, report
from examples.train.checkpoint import Snapshot
from examples.train.config import Config
from examples.train.data import ValidationWindows, held_out_windows
from examples.train.metrics import read_records, write_texts
from examples.train.model import LanguageModel
from examples.train.placing import whole_on_one_device
from examples.train.processes import is_first_process
from examples.train.progress import busy, duration
from examples.train.routing_map import count_routing
from examples.train.sampling import make_generate
from examples.train.step import TrainState, make_bits_per_byte
from examples.train.text import Corpus
from examples.train.tokenizer import Tokenizer, encode_corpus

SAMPLE, REPORT = "sample.txt", "report.html"
LOSS, LOAD, ROUTING, SPEED = (
    "Loss in training and validation",
    "Load of each expert over the steps",
    "Which expert reads which kind of text",
    "Speed",
)
FIGURES = {LOSS: "loss.png", LOAD: "expert_load.png", ROUTING: "routing.png", SPEED: "throughput.png"}
"""The files of the figures by their headings in the report."""
PROMPT_BYTES = 32


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """The bits per byte of the text after `xz -9e` and `bzip2 -9`, which see no other text."""
    sizes = {
        "xz -9e": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
        "bzip2 -9": len(bz2.compress(text, 9)),
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}


def finish(
    config: Config, model: LanguageModel, corpus: Corpus, tokenizer: Tokenizer, last: Snapshot, mesh: Mesh
) -> float:
    """Validates, then writes and prints the sample, the figures and the report. Only the first process writes.

    Args:
        config: the options of the run.
        model: the network.
        corpus: the texts as bytes.
        tokenizer: the tokenizer of the model.
        last: the state after the last step.
        mesh: the mesh of the state.

    Returns:
        Validation bits per byte. Each byte of the held-out text is scored once, after at most `context` bytes.
    """
    windows, bits = validate(config, model, corpus, tokenizer, last, mesh)
    with jax.set_mesh(mesh):
        state = whole_on_one_device(last.state)
    if not is_first_process():
        return bits[""]
    folder, step, held_out = config.folder, int(state.step), corpus.validation.tokens.tobytes()
    references = compressed_bits_per_byte(held_out)
    with busy("Writing a sample, the figures and the report"):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        generate = make_generate(model, tokenizer, config.sample_bytes)
        written = generate(state, held_out[:PROMPT_BYTES], key)
        sample = written.text.decode("utf-8", errors="replace")
        (folder / SAMPLE).write_text(sample + "\n")
        write_texts(folder, {"sample": sample}, step)
        figures = make_figures(config, model, state, windows[""], tokenizer, references, bits[""])
        for name, figure in figures.items():
            figure.savefig(folder / FIGURES[name], dpi=plots.DPI)
        result = describe_result(bits, references, step, last.seconds)
        facts = describe_run(config, state, bits, references, last.seconds)
        page = report.report_page(folder.name, result, facts, figures, sample, config)
        (folder / REPORT).write_text(page)
    files = [SAMPLE, *(FIGURES[name] for name in figures), REPORT]
    print(f"\nThe model continues the held-out text:\n{sample}\n")
    print(f"It wrote this at {written.tokens_per_second:,.0f} tokens/s.")
    print(f"{folder} holds {', '.join(files)}. Open {folder / REPORT} in a browser.")
    print(result)
    return bits[""]


def validate(
    config: Config,
    model: LanguageModel,
    corpus: Corpus,
    tokenizer: Tokenizer,
    last: Snapshot,
    mesh: Mesh,
    most: int | None = None,
) -> tuple[dict[str, ValidationWindows], dict[str, float]]:
    """The windows of each text to validate on, and the bits per byte over them.

    `finish` has the arguments but `most`, the largest number of windows of a text. None reads all.
    """
    texts = encode_corpus(corpus, tokenizer).validations
    windows = {name: held_out_windows(config, tokenizer, text) for name, text in texts.items()}
    if most is not None:
        windows = {name: found.subset(most) for name, found in windows.items()}
    with busy("Validating on held-out text"), jax.set_mesh(mesh):
        bits_per_byte = make_bits_per_byte(model, config.batch_size, mesh)
        return windows, {name: bits_per_byte(last.state, of_text) for name, of_text in windows.items()}


def make_figures(
    config: Config,
    model: LanguageModel,
    state: TrainState,
    windows: ValidationWindows,
    tokenizer: Tokenizer,
    references: Mapping[str, float],
    bits: float,
) -> dict[str, Figure]:
    """The figures of a run, by their headings. A dense model has no loads and no routing."""
    records = read_records(config.folder)
    figures = {LOSS: plots.loss_figure(records, references, bits)}
    if any("loads" in record for record in records):
        figures[LOAD] = heat_maps.load_figure(records)
        figures[ROUTING] = heat_maps.routing_figure(count_routing(model, state, windows, tokenizer))
    return figures | {SPEED: plots.throughput_figure(records)}


def describe_result(bits: Mapping[str, float], references: Mapping[str, float], step: int, seconds: float) -> str:
    """The result of a run in one line."""
    compared = ", ".join(f"{name} {value:.3f}" for name, value in references.items())
    more = "".join(f" On {name}: {value:.3f}." for name, value in bits.items() if name)
    return (
        f"Validation: {bits['']:.3f} bits per byte after {step} steps and {seconds:.0f} s of training; "
        f"the text alone takes {compared}.{more}"
    )


def describe_run(
    config: Config, state: TrainState, bits: Mapping[str, float], references: Mapping[str, float], seconds: float
) -> dict[str, str]:
    """Numbers about a run for the table of its report."""
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    losses = {f"bits per byte, {name or 'held-out text'}": f"{value:.3f}" for name, value in bits.items()}
    return {
        **losses,
        **{f"bits per byte, {name}": f"{value:.3f}" for name, value in references.items()},
        "feed-forward": config.mlp,
        "parameters": f"{size / 1e6:.2f} M" + (f" in adapters on {config.base}" if config.lora else ""),
        "text": config.data,
        "steps": f"{int(state.step)}, each of {config.batch_size} x {config.model.context} tokens",
        "training time": duration(seconds),
        "speed": plots.throughput(read_records(config.folder)),
        "device": jax.local_devices()[0].device_kind,
    }
