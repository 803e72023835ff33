"""Kills a training run again and again: `python -m benchmarks.kills --kills 50`.

A tiny model is trained with a checkpoint every second step. SIGKILL comes at a random moment of starting, training or
saving, and the same command starts the run again. Every start must go on from the newest complete checkpoint, and the
final bits must be those of a run that was never killed. The counts go to benchmarks/results as JSON.
"""

import argparse
import datetime
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from benchmarks.measure import RESULTS
from examples.train.generate import load
from jax_latent_moe.piped import piped

START_UP_SECONDS = (0.0, 4.0)
TRAINING_SECONDS = (0.0, 4.0)


def command(run: pathlib.Path, text: pathlib.Path, steps: int, every: int, mesh: str = "") -> list[str]:
    """The trainer's command line, with a line of metrics and a checkpoint every `every` steps."""
    options = f"--preset toy --steps {steps} --log-every {every} --checkpoint-every {every} --eval-every 100000"
    options += f" --mesh {mesh}" if mesh else ""
    return [sys.executable, "-m", "examples.train", *options.split(), "--data", str(text), "--run", str(run)]


def complete_steps(run: pathlib.Path) -> list[int]:
    """Steps of the complete checkpoints, which have their final names."""
    folder = run / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []


def start(arguments: list[str], cache: pathlib.Path, output) -> subprocess.Popen:
    """Starts a run in its own process, with the compiled programs of earlier runs."""
    environment = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
    }
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen(arguments, env=environment, stdout=output, stderr=subprocess.STDOUT)


def started_at(log: str) -> int | None:
    """The step in a run's first line; None if it was killed before that line."""
    if found := re.search(r"resumed at step (\d+)", log):
        return int(found[1])
    return 0 if ": started in" in log else None


def kill_once(arguments, cache, folder: pathlib.Path, dice: random.Random) -> tuple[str, bool]:
    """Starts the run and kills it at a random moment, in one of five cases during the start.

    Returns:
        The run's output, and whether it had ended by itself.
    """
    log = folder / "log.txt"
    with log.open("w") as output, start(arguments, cache, output) as process:
        if dice.random() < 0.2:
            time.sleep(dice.uniform(*START_UP_SECONDS))
        else:
            while process.poll() is None and not re.search(r"^step \d", log.read_text(), re.MULTILINE):
                time.sleep(0.02)
            time.sleep(dice.uniform(*TRAINING_SECONDS))
        ended = process.poll() is not None
        process.send_signal(signal.SIGKILL)
    return log.read_text(), ended


def main() -> None:
    """Kills and restarts the run, compares its bits, and records the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=2500, help="of the run; more than it does between all kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--platform", default="cpu", help="JAX's name of it, such as cpu or cuda")
    parser.add_argument("--mesh", default="", help="the trainer's --mesh")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "survival", metavar="FOLDER")
    options = parser.parse_args()
    dice = random.Random(options.seed)
    os.environ["JAX_PLATFORMS"] = options.platform if options.platform == "cpu" else f"{options.platform},cpu"
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        run, whole, text, cache = (folder / part for part in ("run", "whole", "text.txt", "cache"))
        text.write_text("".join(dice.choices("etaoin shrdlu\n", k=20_000)))
        failures, lost, saved, while_saving = [], 0, [], 0
        for kill in range(options.kills):
            before = saved[-1] if saved else 0
            log, ended = kill_once(command(run, text, options.steps, 2, options.mesh), cache, folder, dice)
            first, saved = started_at(log), complete_steps(run)
            while_saving += any("tmp" in path.name for path in run.glob("checkpoints/*"))
            lost += first is not None and first < before
            if ended or (first is not None and first != before):
                failures.append(f"kill {kill}: started at {first}, newest complete {before}: {log[-400:]}")
            print(f"kill {kill + 1}: started at {first}, newest complete {saved[-1] if saved else None}", flush=True)
        for path in (run, whole):
            # With the programs of the killed run: compiled again for a GPU, they might have other kernels.
            if status := start(command(path, text, options.steps, 500, options.mesh), cache, None).wait():
                sys.exit(f"The run in {path} ended with status {status}, so there are no bits to compare.")
        leaves, wanted = (jax.tree.leaves(load(path)[1]) for path in (run, whole))
        same = all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(leaves, wanted, strict=True))
        result = {
            "suite": "survival", "platform": options.platform, "mesh": options.mesh, "kills": options.kills,
            "seed": options.seed, "failed_restarts": len(failures),
            "restarts_behind_the_last_complete_save": lost, "killed_while_a_save_was_unfinished": while_saving,
            "steps": options.steps, "same_bits_as_an_unkilled_run": same, "versions": {"jax": jax.__version__},
        }  # fmt: skip
        print("\n".join([*failures, json.dumps(result)]))
        options.out.mkdir(parents=True, exist_ok=True)
        with (options.out / f"{options.platform}-{datetime.date.today()}.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")
        if failures or not same:
            sys.exit(1)


if __name__ == "__main__":
    with piped():
        main()
