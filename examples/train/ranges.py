"""The ranges of all numbers among the options, and the checks of text and of options that belong together."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin

import numpy as np

from examples.train.errors import TrainError
from jax_latent_moe.errors import ConfigError
from jax_latent_moe.parallel import mesh_sizes

LARGEST_INT = 2**31 - 1
LARGEST_FLOAT = float(np.finfo(np.float32).max)


class Range(NamedTuple):
    """The numbers from `low` to `high`. An end belongs to the range unless it is open.

    Attributes:
        low: the lower end.
        high: the upper end. Floats are rounded to float32 before they are compared.
        low_open: whether `low` itself is excluded.
        high_open: whether `high` itself is excluded.
    """

    low: float
    high: float
    low_open: bool = False
    high_open: bool = False

    def __str__(self) -> str:
        low = f"more than {self.low:g}" if self.low_open else f"at least {self.low:g}"
        if self.high == LARGEST_INT:
            return f"{low}, an integer that fits an int32"
        if self.high == LARGEST_FLOAT:
            return f"{low}, a number that fits a float32"
        return f"{low} and {'below' if self.high_open else 'at most'} {self.high:.10g}"

    def holds(self, value: float) -> bool:
        """Whether the value lies in the range. NaN lies in no range."""
        above = value > self.low if self.low_open else value >= self.low
        return above and (value < self.high if self.high_open else value <= self.high)


COUNT = Range(1, LARGEST_INT)
COUNT_OR_NONE = Range(0, LARGEST_INT)
POSITIVE = Range(0, LARGEST_FLOAT, low_open=True)
NOT_NEGATIVE = Range(0, LARGEST_FLOAT)
BELOW_ONE = Range(0, 1, high_open=True)

MODEL = {
    **dict.fromkeys(("layers", "hidden_size", "heads", "context", "latent_size", "num_experts", "top_k"), COUNT),
    "expert_intermediate_size": COUNT,
    "shared_expert_intermediate_size": COUNT_OR_NONE,
    "routed_scaling_factor": POSITIVE,
    "dropout": BELOW_ONE,
}
OPTIMIZER = {
    "learning_rate": POSITIVE,
    "final_fraction": Range(0, 1),
    "warmup_steps": COUNT_OR_NONE,
    "weight_decay": NOT_NEGATIVE,
    **dict.fromkeys(("b1", "b2", "momentum"), BELOW_ONE),
    "clip": POSITIVE,
}
RUN = {
    **dict.fromkeys(("steps", "batch_size", "log_every", "eval_every", "checkpoint_every", "sample_bytes"), COUNT),
    "accumulate": COUNT,
    "seed": Range(0, 2**32 - 1),
    **dict.fromkeys(("switch_loss_coef", "sequence_loss_coef", "bias_update_rate", "spike_factor"), NOT_NEGATIVE),
    "processes": COUNT,
    "process": COUNT_OR_NONE,
    "lora": COUNT_OR_NONE,
    "lora_alpha": POSITIVE,
}


def check_numbers(options, prefix: str, ranges: dict[str, Range]):
    """Refuses every int or float field whose value is not a number in its range.

    Args:
        options: a dataclass with a range for each int and float field.
        prefix: the text before a field's name in messages, such as "model.".
        ranges: the range of each field.

    Raises:
        TrainError: a value is refused. The message names the option, the value and the range.
    """
    for field in dataclasses.fields(options):
        if field.type in (int, float):
            value = getattr(options, field.name)
            check_number(f"{prefix}{field.name}", value, ranges[field.name], integer=field.type is int)


def check_number(name: str, value: object, allowed: Range, *, integer: bool = True):
    """Refuses a value that is not a number in the range.

    Raises:
        TrainError: the value is refused. The message names the option, the value and the range.
    """
    if type(value) not in ((int,) if integer else (int, float)) or not allowed.holds(_held(value, integer)):
        raise TrainError(f"{name}={value!r} must be {allowed}.")


def _held(value, integer) -> float:
    """The number as the computation holds it. A float is rounded to float32, where 1 - 1e-10 is 1 and 1e-50 is 0."""
    if integer:
        return value
    try:
        with np.errstate(over="ignore", under="ignore"):
            return float(np.float32(value))
    except OverflowError:  # a Python integer that is too large
        return math.inf


def check_choices(options, prefix: str):
    """Refuses a field whose value is not one of its choices. A configuration file may hold any value.

    Args:
        options: a dataclass. Fields of type Literal, bool, str and tuple are checked.
        prefix: the text before a field's name in messages, such as "model.".

    Raises:
        TrainError: a value is refused. The message names the option, the value and the choices.
    """
    for field in dataclasses.fields(options):
        value, kind = getattr(options, field.name), field.type
        if get_origin(kind) is Literal and value not in get_args(kind):
            raise TrainError(f"{prefix}{field.name}={value!r} must be one of {', '.join(get_args(kind))}.")
        if kind in (bool, str) and type(value) is not kind:
            name = {bool: "true or false", str: "text"}[kind]
            raise TrainError(f"{prefix}{field.name}={value!r} must be {name}.")


def check_validation(named: tuple[str, ...]):
    """Refuses entries of --validation that are not NAME=PATH with different names.

    Raises:
        TrainError: an entry is malformed, or a name comes twice.
    """
    names = [entry.partition("=")[0] for entry in named if re.fullmatch(r"[\w.-]+=.+", entry)]
    if len(set(names)) < len(named):
        raise TrainError(
            f"--validation {' '.join(named)} must be NAME=PATH with different names of letters, digits, dots and "
            "dashes, such as code=src wiki=wiki.txt."
        )


def check_text(option: str, value: str | Path):
    """Refuses text that cannot be written into config.json, metrics and messages.

    Raises:
        TrainError: the text is not UTF-8, or holds a NUL.
    """
    try:
        usable = b"\0" not in str(value).encode()
    except UnicodeEncodeError:
        usable = False
    if not usable:
        raise TrainError(f"--{option} {str(value)!a} must be UTF-8 without NUL: give other text.")


def check_processes(coordinator: str, processes: int, process: int):
    """Refuses --processes and --process if they do not fit the coordinator, or if nothing would read them.

    Raises:
        TrainError: an option is refused.
    """
    given = [f"--processes {processes}"] * (processes != 1) + [f"--process {process}"] * (process != 0)
    if not coordinator and given:
        raise TrainError(f"{given[0]} needs --coordinator HOST:PORT, the address of process 0.")
    if coordinator == "auto" and given:
        raise TrainError(f"{given[0]} has no effect with --coordinator auto, which finds the number: leave it out.")
    if coordinator in ("", "auto"):
        return
    port = re.fullmatch(r"[^\s]+:([0-9]{1,5})", coordinator)
    if port is None or not 1 <= int(port[1]) < 2**16:
        raise TrainError(f"--coordinator {coordinator} must be HOST:PORT, such as host0:9000, or auto.")
    if not 0 <= process < processes:
        raise TrainError(f"--process {process} must be at least 0 and below --processes {processes}.")


def check_mesh(text: str):
    """Refuses text that does not describe a mesh.

    Raises:
        TrainError: the text is malformed.
    """
    try:
        mesh_sizes(text)
    except ConfigError as error:
        raise TrainError(str(error)) from error


def check_unused(options, prefix: str, fields: tuple[str, ...], used: bool, needs: str):
    """Refuses options that are set although nothing reads them.

    Raises:
        TrainError: an option is refused. The message names it, its value, and the option that it needs.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    for name in () if used else fields:
        if getattr(options, name) != defaults[name]:
            raise TrainError(
                f"{prefix}{name}={getattr(options, name)!r} has no effect without {needs}: leave it out or give that."
            )
