"""The curves of a run, from the metrics that the trainer wrote: lists of [step, seconds, value]."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from examples.study.data import HELD_OUT
from examples.study.latent_scale import FIELD
from examples.train.config import Config
from examples.train.metrics import VALIDATION, read_records, validation_field
from examples.train.progress import busiest

Records = list[dict[str, Any]]


def curves(config: Config) -> dict[str, Any]:
    """The curves of the run in the folder `config.run`, and its median speed."""
    assert config.run is not None  # `config_of` had a folder
    records = read_records(config.run)
    training = whole_intervals(
        [record for record in records if math.isfinite(record.get("loss", math.nan))], config.log_every
    )
    held_out = validation_field(HELD_OUT) if config.validation else VALIDATION
    speeds = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
    return {
        "training": _curve(training, "loss", lambda loss: round(loss, 5)),
        "validation": _curve(records, held_out, lambda bits: round(bits, 5)),
        "busiest_expert": _curve(training, "loads", lambda loads: round(busiest(loads), 3)),
        FIELD: _curve(records, FIELD),
        "tokens_per_second": round(float(np.median(speeds)), 1) if speeds else None,
    }


def _curve(records: Records, field: str, value: Callable[[Any], Any] = lambda found: found):
    return [
        [record["step"], round(record["seconds"], 2), value(record[field])] for record in records if field in record
    ]


def whole_intervals(records: Records, every: int) -> Records:
    """One record for each interval of `every` steps. A stop cuts an interval into two records, each with its means."""
    befores = [0, *(record["step"] for record in records)]
    steps = {record["step"]: record["step"] - before for before, record in zip(befores, records, strict=False)}
    whole = []
    for _, parts in itertools.groupby(records, lambda record: (record["step"] - 1) // every):
        of_interval = [*parts]
        weights = [steps[record["step"]] for record in of_interval]
        means = {
            field: np.average([record[field] for record in of_interval], axis=0, weights=weights).tolist()
            for field in ("loss", "loads")
            if field in of_interval[-1]
        }
        whole.append({**of_interval[-1], **means})
    return whole
