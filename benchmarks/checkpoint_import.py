"""Compares the import of one layer of Nemotron-3 Super's shape (5.8 GB of files) with reading the same files.

    python -m benchmarks.checkpoint_import FOLDER [--experts 512]

FOLDER is created, filled with a synthetic checkpoint and removed again. Three things are measured: reading the files in
order through one buffer, reading them into memory that is kept, and importing the layer. Each runs from the disk (the
files are dropped from the system's cache first) and from the cache, in its own process, which gives its peak memory.
"""

import argparse
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import time

import numpy as np

from benchmarks.checkpoints import BUFFER, SUPER, make, read
from jax_latent_moe import hf
from jax_latent_moe.piped import piped


def forget(folder: pathlib.Path) -> None:
    """Drops the files from the system's cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())  # a page that is not written yet stays
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(folder: pathlib.Path) -> int:
    """Reads the files into fresh memory and keeps them, the least that any import does."""
    paths = sorted(folder.glob("*.safetensors"))
    memory = np.empty(sum(path.stat().st_size for path in paths), np.uint8)
    view = memoryview(memory)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(view[:BUFFER]):
                view = view[count:]
    return memory.nbytes


def import_only_layer(folder: pathlib.Path) -> int:
    """Imports the layer; returns its bytes."""
    params = hf.import_layer(hf.open_checkpoint(folder), 0)
    return sum(leaf.nbytes for leaves in params.values() for leaf in leaves.values())


MEASURED = {"read": read, "load": load, "import": import_only_layer}


def measure(what: str, folder: pathlib.Path) -> dict:
    """Runs one measurement in this process."""
    start = time.perf_counter()
    nbytes = MEASURED[what](folder)
    seconds = time.perf_counter() - start
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return dict(seconds=seconds, nbytes=nbytes, cpu=usage.ru_utime + usage.ru_stime, peak=1024 * usage.ru_maxrss)


def main() -> None:
    """Runs all measurements, and prints a line for each and the two ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--experts", type=int, default=SUPER.config.num_experts)
    parser.add_argument("--measure", choices=MEASURED, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.folder)))
        return
    options.folder.mkdir(parents=True)
    try:
        make(options.folder, SUPER, options.experts)
        for source in ("disk", "cache"):
            rows = {}
            for what in MEASURED:
                if source == "disk":
                    forget(options.folder)
                command = [sys.executable, "-m", "benchmarks.checkpoint_import", str(options.folder), "--measure", what]
                rows[what] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                seconds, gigabytes = rows[what]["seconds"], rows[what]["nbytes"] / 1e9
                print(
                    f"{source:5} {what:6} {seconds:6.2f} s {gigabytes / seconds:6.2f} GB/s "
                    f"({rows[what]['cpu']:.1f} s of CPU time, including imports of modules)",
                    flush=True,
                )
            layer = rows["import"]["nbytes"]
            to_read, to_load = (rows["import"]["seconds"] / rows[what]["seconds"] for what in ("read", "load"))
            print(
                f"{source}: import takes {to_read:.2f} x the time of reading, {to_load:.2f} x reading into memory; "
                f"peak memory of its process {rows['import']['peak'] / layer:.3f} x the layer ({layer / 1e9:.2f} GB)"
            )
    finally:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    with piped():
        main()
