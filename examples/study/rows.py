"""The rows of a study: one JSON object a line and run. A run that ends appends its row."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.study.definition import Run, Study, config_of, measurable
from examples.study.locks import locked
from examples.train.config import BALANCING, Config
from examples.train.config_file import to_json
from examples.train.errors import TrainError
from examples.train.run_folder import flat
from examples.train.whole_file import write_whole

FILE, LOCK = "rows.jsonl", ".lock"
Row = dict[str, Any]
MEASURED = {
    "parameters": int,
    "active_flops_per_token": int,
    "run_flops": int,
    "training": list,
    "validation": list,
    "device": str,
    "versions": dict,
}
"""The other fields of a row that every reader may rely on, and their types."""


def run_of(row: Row) -> Run:
    """The run of a row."""
    return Run(row["arm"], row["learning_rate"], row["seed"])


def definition_of(study: Study, run: Run) -> dict[str, Any]:
    """The options of a run as a row keeps them: by name, without the places of files."""
    options = flat(json.loads(to_json(config_of(study, run))))
    return _with_effect(
        {name: options[name] for name in options if name not in ("run", "config", "validation", "preset")}
    )


def _with_effect(options):
    """The options without those that a dense model does not read."""
    return {name: options[name] for name in options if options["mlp"] != "dense" or name not in BALANCING}


def read_rows(path: Path, study: Study) -> dict[Run, Row]:
    """The rows by their runs. A kill may cut off the last line, which is then left out.

    Raises:
        TrainError: a row is broken, comes twice, has no place in the queue, or belongs to another study, another
            definition of its run, or another text.
    """
    rows: dict[Run, Row] = {}
    for number, line in enumerate(_whole_lines(path), 1):
        where = f"{path}, line {number}"
        row = _parsed(line, where)
        if row["study"] != study.name:
            raise TrainError(
                f"{where} is a row of the study {row['study']!r}, not {study.name!r}: give the folder of its rows."
            )
        if row["text_sha256"] != study.text_sha256:
            raise TrainError(
                f"{where} was measured on a text with the SHA-256 {row['text_sha256']}, and the study's text has "
                f"{study.text_sha256}: fetch the pinned text, and run again in another --folder."
            )
        run = run_of(row)
        _check_definition(study, run, row["config"], where)
        if run in rows:
            raise TrainError(f"{where} is the second row of {run.name}: delete one of them.")
        rows[run] = row
    places = measurable(study, bits_of(rows))
    extra = [run.name for run in rows if run not in places]
    if extra:
        raise TrainError(
            f"{path} has a row of {extra[0]}, which is not in the queue of {study.name}: delete the row, or restore "
            "the rows of the sweep, which chooses the learning rates."
        )
    return rows


def bits_of(rows: Mapping[Run, Row]) -> dict[Run, float | None]:
    """The validation bits per byte of each run. None is a run that diverged."""
    return {run: row["validation_bits_per_byte"] for run, row in rows.items()}


def append_row(path: Path, row: Row):
    """Adds a row in one write, after it has removed a line that a kill cut off."""
    with locked(path.with_name(LOCK)):
        lines = _whole_lines(path)
        if path.exists() and path.read_bytes() != "".join(lines).encode():
            write_whole(path, "".join(lines).encode())
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _whole_lines(path):
    """The lines of the file that end in a newline."""
    if not path.exists():
        return []
    try:
        return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    except UnicodeDecodeError as error:
        raise TrainError(f"{path} does not hold text ({error}): restore it from a copy.") from error
    except OSError as error:
        raise TrainError(f"{path} cannot be read ({error}): it must be a file that you may read.") from error


def _parsed(line, where) -> Row:
    try:
        row = json.loads(line)
        types = {"study": str, "text_sha256": str, "arm": str, "learning_rate": float, "seed": int, "config": dict}
        wrong = [name for name, kind in {**types, **MEASURED}.items() if not isinstance(row[name], kind)]
        if wrong or not isinstance(row["validation_bits_per_byte"], float | None):
            raise ValueError(f"wrong type of {', '.join(wrong) or 'validation_bits_per_byte'}")
    except (ValueError, TypeError, KeyError) as error:
        raise TrainError(
            f"{where} is not a row of a study ({type(error).__name__}: {error}): restore the line or delete it, and "
            "its run is done again."
        ) from error
    return row


def _check_definition(study, run, before, where):
    """Refuses a row whose options differ from the study's. An option that the row lacks must have its default."""
    try:
        now = definition_of(study, run)
    except TrainError as error:
        raise TrainError(f"{where} has no place in the study {study.name}. {error}") from error
    defaults = flat(json.loads(to_json(Config())))
    old = _with_effect({name: before.get(name, defaults.get(name)) for name in now} | before)
    changed = [f"{name}={old[name]}, now {now.get(name)}" for name in old if old[name] != now.get(name)]
    if changed:
        raise TrainError(
            f"{where} was measured by another definition of {run.name} ({'; '.join(changed)}): restore the definition, "
            "or run again in another --folder."
        )
