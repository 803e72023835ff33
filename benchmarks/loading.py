"""Time and peak memory of loading a layer whose experts are stored in 4 bits: `python -m benchmarks.loading`.

The layers are one of Nemotron-3 Super in NVFP4 and one of Kimi K3 in MXFP4 (17.4 GB together), as random files under
the names of published ones. Each is imported with keep_quantized=True onto JAX's default device, in its own process and
after one reading of its files, so that they come from the system's cache if it holds them.

The rows of a layer are "files" (the time to read the files through one buffer, and the bytes of the layer's tensors),
"host" and, on an accelerator, "device" (the time of the import, and the peak of memory above what was in use before).
The floor is the time of reading.
"""

import argparse
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

from benchmarks.checkpoints import K3_MXFP4, SUPER_NVFP4, Stored, make, read
from benchmarks.measure import RESULTS, Row, Run, device_name, show
from jax_latent_moe import hf
from jax_latent_moe.piped import piped

LAYERS = {"super_nvfp4": SUPER_NVFP4, "k3_mxfp4": K3_MXFP4}
INTERVAL = 0.002
"""Seconds between two looks at the memory in use."""


def resident(*keys: str) -> int:
    """The largest of these numbers of /proc/self/status, in bytes. Some systems have no VmHWM."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return max(1024 * int(line.split()[1]) for line in lines if line.partition(":")[0] in keys)


def peak_of[T](call: Callable[[], T]) -> tuple[T, int]:
    """The result of a call, and the peak of resident bytes above those before it.

    The kernel's own peak, VmHWM, counts from the start of the process. If it did not grow, the largest sample is taken.
    """
    before, highest, ended = resident("VmRSS"), resident("VmRSS", "VmHWM"), threading.Event()
    samples = [before]

    def look():
        while not ended.wait(INTERVAL):
            samples.append(resident("VmRSS"))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        result = call()
    finally:
        ended.set()
        thread.join()
    last = resident("VmRSS", "VmHWM")
    return result, (last if last > highest else max(samples)) - before


def measure(folder: pathlib.Path) -> dict:
    """Imports the checkpoint's layer in this process: (milliseconds, bytes) of each row, and the device's name.

    The import maps no file, so all resident bytes are its own.
    """
    checkpoint, device = hf.open_checkpoint(folder), jax.devices()[0]
    jax.block_until_ready(jnp.ones(8) + 1)  # starts JAX
    start = time.perf_counter()
    read(folder)
    rows = {"files": (1e3 * (time.perf_counter() - start), hf.plan_layer(checkpoint, 0).nbytes)}
    before = device.memory_stats() if device.platform != "cpu" else None
    start = time.perf_counter()
    params, host = peak_of(lambda: jax.block_until_ready(hf.import_layer(checkpoint, 0, keep_quantized=True)))
    ms = 1e3 * (time.perf_counter() - start)
    rows["host"] = ms, host
    if before is not None:  # a CPU device's arrays are in the host's memory
        rows["device"] = ms, device.memory_stats()["peak_bytes_in_use"] - before["bytes_in_use"]
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert held >= rows["files"][1], f"{held} bytes were imported, fewer than the files hold"
    return {"device": device_name(), "rows": rows}


def load(folder: pathlib.Path, name: str, stored: Stored, experts: int | None) -> tuple[str, list[Row]]:
    """Makes a layer's files, measures its import in another process, and removes the files.

    Returns the device's name and the rows.
    """
    folder.mkdir(parents=True)
    try:
        start = time.perf_counter()
        make(folder, stored, experts)
        print(f"{name}: files made in {time.perf_counter() - start:.1f} s", flush=True)
        command = [sys.executable, "-m", "benchmarks.loading", "--folder", str(folder), "--measure"]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    finally:
        shutil.rmtree(folder)
    reading, packed = found["rows"]["files"]
    for impl, (ms, nbytes) in found["rows"].items():
        memory = "packed" if impl == "files" else f"at its peak, {nbytes / packed:.3f} x the packed bytes"
        print(f"{name} {impl:>6}: {ms / 1e3:.2f} s, {packed / ms / 1e6:.2f} GB/s; {nbytes / 1e9:.3f} GB {memory}")
    shape = name if experts is None else f"{name}_e{experts}"
    return found["device"], [
        Row("loading", shape, "import", impl, ms, 0.0, reading, None, nbytes)
        for impl, (ms, nbytes) in found["rows"].items()
    ]


def main() -> None:
    """Measures, prints and records each layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", choices=LAYERS, action="append", help="only this layer")
    parser.add_argument("--folder", type=pathlib.Path, help="is made and removed; in the temporary folder by default")
    parser.add_argument("--experts", type=int, help="fewer experts than the layers have")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, metavar="FOLDER", help="where the rows go")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        rows, device = [], ""
        for name in options.layer or LAYERS:
            folder = options.folder or pathlib.Path(temporary) / name
            device, measured = load(folder, name, LAYERS[name], options.experts)
            rows += measured
    run = Run(device, options.out)
    for row in rows:
        run.add(row)
        show(row)
    print(f"recorded in {run.path}")


if __name__ == "__main__":
    with piped():
        main()
