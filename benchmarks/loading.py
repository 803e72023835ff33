"""Time and peak memory of loading a layer whose experts are stored in 4 bits: `python -m benchmarks.loading`.

The layers are one of Nemotron-3 Super in NVFP4 and one of Kimi K3 in MXFP4 (17.4 GB together), as random files under
the names of published ones. Each is imported with keep_quantized=True onto JAX's default device, in its own process and
after one reading of its files, so that they come from the system's cache if it holds them.

The rows of a layer are "files" (milliseconds to read the files through one buffer, and their bytes), "host" and, on an
accelerator, "device" (milliseconds of the import, and the peak of memory above what was in use before it). The floor is
the time of reading.
"""

import argparse
import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.checkpoints import K3_MXFP4, SUPER_NVFP4, make, read
from benchmarks.measure import RESULTS, Row, Run, show
from jax_latent_moe import hf
from jax_latent_moe.piped import piped

LAYERS = {"super_nvfp4": SUPER_NVFP4, "k3_mxfp4": K3_MXFP4}
INTERVAL = 0.002
"""Seconds between two looks at the memory in use."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What one import took.

    Attributes:
        device: name of the device.
        packed: bytes of the layer's tensors in the files.
        reading: seconds to read the files through one buffer.
        seconds: of the import.
        host: peak bytes of the process above those before the import. The import maps no file, so all are its own.
        on_device: the same of the device; None on a CPU, whose arrays are in the host's memory.
    """

    device: str
    packed: int
    reading: float
    seconds: float
    host: int
    on_device: int | None


def status(*keys: str) -> int:
    """The largest of the process's numbers with these keys, in bytes. Some kernels have no VmHWM."""
    lines = (line.split() for line in pathlib.Path("/proc/self/status").read_text().splitlines())
    return max(1024 * int(line[1]) for line in lines if line and line[0].rstrip(":") in keys)


def peak_of[T](call: Callable[[], T]) -> tuple[T, int]:
    """The result of a call, and the peak of resident bytes above those before it.

    The kernel's own peak counts from the start of the process. If it did not grow, the peak is the largest sample.
    """
    before, highest, ended = status("VmRSS"), status("VmRSS", "VmHWM"), threading.Event()
    samples = [before]

    def look():
        while not ended.wait(INTERVAL):
            samples.append(status("VmRSS"))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        result = call()
    finally:
        ended.set()
        thread.join()
    last = status("VmRSS", "VmHWM")
    return result, (last if last > highest else max(samples)) - before


def measure(folder: pathlib.Path) -> Loaded:
    """Imports the only layer of the checkpoint in this process."""
    checkpoint, device = hf.open_checkpoint(folder), jax.devices()[0]
    packed = hf.plan_layer(checkpoint, 0).nbytes
    jax.block_until_ready(jnp.ones(8) + 1)  # starts JAX
    start = time.perf_counter()
    read(folder)
    reading = time.perf_counter() - start
    before = device.memory_stats() if device.platform != "cpu" else None
    start = time.perf_counter()
    params, host = peak_of(lambda: jax.block_until_ready(hf.import_layer(checkpoint, 0, keep_quantized=True)))
    seconds = time.perf_counter() - start
    on_device = None if before is None else device.memory_stats()["peak_bytes_in_use"] - before["bytes_in_use"]
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert held >= packed, f"{held} bytes were imported, and the files hold {packed}"
    kind = device.device_kind.lower().removeprefix("nvidia ").replace(" ", "-")
    return Loaded(kind, packed, reading, seconds, host, on_device)


def rows_of(name: str, loaded: Loaded) -> list[Row]:
    """The rows of a layer."""
    measured = {
        "files": (loaded.reading, loaded.packed),
        "host": (loaded.seconds, loaded.host),
        "device": (loaded.seconds, loaded.on_device),
    }
    return [
        Row("loading", name, "import", impl, 1e3 * seconds, 0.0, 1e3 * loaded.reading, None, nbytes)
        for impl, (seconds, nbytes) in measured.items()
        if nbytes is not None
    ]


def load(folder: pathlib.Path, name: str, experts: int | None = None) -> Loaded:
    """Makes a layer's files, measures its import in another process, and removes the files."""
    start = time.perf_counter()
    try:
        make(folder, LAYERS[name], experts)
        print(f"{name}: files made in {time.perf_counter() - start:.1f} s", flush=True)
        command = [sys.executable, "-m", "benchmarks.loading", "--folder", str(folder), "--measure"]
        loaded = Loaded(**json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    finally:
        shutil.rmtree(folder)
    shares = {"host": loaded.host, "device": loaded.on_device}
    peaks = [f"{what} {peak / loaded.packed:.3f} x" for what, peak in shares.items() if peak is not None]
    print(
        f"{name}: {loaded.packed / 1e9:.2f} GB packed, read in {loaded.reading:.1f} s, imported in {loaded.seconds:.1f}"
        f" s ({loaded.packed / loaded.seconds / 1e9:.2f} GB/s); peak memory: {', '.join(peaks)}",
        flush=True,
    )
    return loaded


def main() -> None:
    """Measures, prints and records each layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layers", nargs="*", metavar="LAYER", help=f"of {', '.join(LAYERS)}; all by default")
    parser.add_argument("--folder", type=pathlib.Path, help="where to make the files; a temporary folder by default")
    parser.add_argument("--experts", type=int, help="fewer experts than the layers have")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, metavar="FOLDER", help="where the rows go")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(dataclasses.asdict(measure(options.folder))))
        return
    if unknown := set(options.layers) - LAYERS.keys():
        parser.error(f"unknown layers {', '.join(sorted(unknown))}: choose from {', '.join(LAYERS)}")
    folder, run = options.folder or pathlib.Path(tempfile.mkdtemp()) / "checkpoint", None
    for name in options.layers or LAYERS:
        loaded = load(folder, name, options.experts)
        run = run or Run(loaded.device, options.out)
        shape = name if options.experts is None else f"{name}_e{options.experts}"
        for row in rows_of(shape, loaded):
            run.add(row)
            show(row)
    print(f"recorded in {run.path}" if run else "nothing measured")


if __name__ == "__main__":
    with piped():
        main()
