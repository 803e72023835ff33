"""The end of a run: validation on the whole held-out text, a sample, the plots, one line."""

import bz2
import lzma

import jax
from jax.sharding import Mesh

from examples.train import plots
from examples.train.checkpoint import Snapshot
from examples.train.config import Config
from examples.train.data import held_out_windows
from examples.train.generate import make_generate
from examples.train.metrics import read_records
from examples.train.model import LanguageModel
from examples.train.placing import whole_on_one_device
from examples.train.processes import is_first_process
from examples.train.step import make_bits_per_byte
from examples.train.text import Corpus
from examples.train.tokenizer import Tokenizer

LOSS_PLOT, LOAD_PLOT, SPEED_PLOT, SAMPLE = "loss.png", "expert_load.png", "throughput.png", "sample.txt"
PROMPT_BYTES = 32


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """What `xz -9e` and `bzip2 -9` need for the text alone, without having seen any other."""
    sizes = {
        "xz -9e": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
        "bzip2 -9": len(bz2.compress(text, 9)),
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}


def finish(
    config: Config, model: LanguageModel, corpus: Corpus, tokenizer: Tokenizer, last: Snapshot, mesh: Mesh
) -> float:
    """Writes the plots and a sample, prints the sample and the last line; of several processes, the first does.

    Args:
        config: of the run.
        model: the network.
        corpus: as bytes.
        tokenizer: of the model.
        last: the state after the last step.
        mesh: where it lies.

    Returns:
        Validation bits per byte: each byte of the held-out text scored once, from at most `context` bytes before it.
    """
    windows = held_out_windows(config, tokenizer, tokenizer.corpus(corpus).validation)
    with jax.set_mesh(mesh):
        bits = make_bits_per_byte(model, config.batch_size, mesh)(last.state, windows)
        state = whole_on_one_device(last.state)
    if not is_first_process():
        return bits
    folder, records = config.folder, read_records(config.folder)
    text = corpus.validation.tokens.tobytes()
    references = compressed_bits_per_byte(text)

    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    generate = make_generate(model, tokenizer, config.sample_bytes)
    sample = generate(state, text[:PROMPT_BYTES], key).decode("utf-8", errors="replace")
    (folder / SAMPLE).write_text(sample + "\n")
    written = [LOSS_PLOT, SPEED_PLOT, SAMPLE, "checkpoints"]
    plots.plot_loss(records, references, folder / LOSS_PLOT)
    plots.plot_throughput(records, folder / SPEED_PLOT)
    if any("loads" in record for record in records):
        plots.plot_loads(records, folder / LOAD_PLOT)
        written.insert(1, LOAD_PLOT)

    print(f"\n{sample}\n\nIn {folder}: {', '.join(written)}.")
    compared = ", ".join(f"{name} {value:.3f}" for name, value in references.items())
    print(
        f"Validation: {bits:.3f} bits per byte after {int(state.step)} steps and {last.seconds:.0f} s of training; "
        f"the text alone takes {compared}."
    )
    return bits
