"""The metrics of a run in files: metrics.jsonl and TensorBoard."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from examples.train.processes import is_first_process
from examples.train.trackers import Trackers
from examples.train.whole_file import write_whole

FILE = "metrics.jsonl"
BOARD = "tensorboard"
VALIDATION = "validation_bits_per_byte"


def validation_field(name: str) -> str:
    """The field of a text's validation loss in records. The held-out text has the empty name."""
    return f"{VALIDATION}/{name}" if name else VALIDATION


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of the run in order. A kill may cut off the last line, which is then left out."""
    path = folder / FILE
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class MetricsWriter:
    """Appends records to metrics.jsonl, to TensorBoard and to the trackers.

    It first removes the records after `step`. A run wrote them between its last checkpoint and its end, and the resumed
    run writes them again.
    """

    def __init__(self, folder: Path, step: int, trackers: Trackers):
        self._file, self._trackers = None, trackers
        if not is_first_process():
            return  # all processes have the same numbers
        kept = [json.dumps(record) + "\n" for record in read_records(folder) if record["step"] <= step]
        write_whole(folder / FILE, "".join(kept).encode())
        self._file = (folder / FILE).open("a")
        self._board = SummaryWriter(str(folder / BOARD), purge_step=step + 1)

    def write(self, record: dict[str, Any]):
        """Writes a record: a "step", numbers, and the experts' loads of each MoE layer."""
        if self._file is None:
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in record.items():
            if isinstance(value, int | float) and name != "step":
                self._board.add_scalar(name, value, record["step"])
        for layer, shares in enumerate(record.get("loads", []), 1):
            relative = len(shares) * np.asarray(shares)  # 1 is an even share
            self._board.add_scalar(f"busiest_expert/layer_{layer}", relative.max(), record["step"])
            self._board.add_histogram(f"load_over_even_share/layer_{layer}", relative, record["step"])
        self._trackers.write(record)

    def close(self):
        """Closes the files and ends the runs of the trackers."""
        if self._file is None:
            return
        self._file.close()
        self._board.close()
        self._trackers.close()


def write_texts(folder: Path, texts: Mapping[str, str], step: int):
    """Shows texts under their names in TensorBoard's tab "Text"."""
    if not is_first_process():
        return
    # A writer names its file by the second and overwrites another of the same name.
    with SummaryWriter(str(folder / BOARD), filename_suffix=f".{'-'.join(texts)}") as board:
        for name, text in texts.items():
            board.add_text(name, "```\n" + text + "\n```", step)
