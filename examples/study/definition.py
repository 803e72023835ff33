"""The studies: which arms, seeds and learning rates, at which size, on which text. Runs follow from rows and these."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from examples.study import data
from examples.study.arms import ARMS, Arm, Family, arm_named, model_of
from examples.train.config import Config, ModelConfig, OptimizerConfig
from examples.train.errors import TrainError

FAMILIES: dict[Family, str] = {"dense": "dense", "moe": "moe", "latent": "half"}
"""The arm of each family on which its learning rate is chosen. "half" has no norm, so a norm is not favoured."""
SWEEP_SEED = 0
"""The seed of the sweep. No other run has it, so a lucky seed of the sweep does not enter the comparison."""
NORM = ("moe", "half", "half-pre")
"""The arms that measure the effect of a norm in the latent. They are run first."""
MAIN = ("dense", *NORM)


@dataclasses.dataclass(frozen=True)
class Study:
    """What is run, in the order in which it is run.

    Attributes:
        name: the value of `--arms`.
        base: the options that all runs share. Its model is the plain MoE that `model_of` reads.
        rates: the learning rates of the sweep.
        sweep_steps: the steps of a run of the sweep, whose schedule is as long.
        blocks: arms and seeds. The runs of a block go seed by seed.
        text_sha256: the checksum of the text, from `runner.checksum`.
        validation_windows: the windows of each text that the validation at the end of a run reads. None reads all.
        linux: whether the text comes from `data.py` instead of the trainer's small text.
    """

    name: str
    base: Config
    rates: tuple[float, ...]
    sweep_steps: int
    blocks: tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]
    text_sha256: str
    validation_windows: int | None = None
    linux: bool = True

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms in the order of the tables."""
        used = {name for names, _ in self.blocks for name in names}
        return tuple(arm for arm in ARMS if arm.name in used)

    @property
    def families(self) -> dict[Family, str]:
        """The families of its arms, and the arm on which each one's learning rate is chosen."""
        used = {arm.family for arm in self.arms}
        return {family: arm for family, arm in FAMILIES.items() if family in used}


class Run(NamedTuple):
    """A run of a study. The sweep's runs have the seed `SWEEP_SEED`."""

    arm: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return f"{self.arm.replace('/', 'over')}-lr{self.learning_rate:g}-seed{self.seed}"


def shortened(base: Config) -> Config:
    """The options of a run with a quarter of the steps."""
    return dataclasses.replace(base, steps=1425, eval_every=285, checkpoint_every=475)


BASE = Config(
    data="linux",
    mlp="latent_moe",
    steps=5700,
    batch_size=64,
    log_every=50,
    eval_every=300,
    checkpoint_every=1000,
    switch_loss_coef=0.01,
    bias_update_rate=0.01,
    model=ModelConfig(
        layers=6,
        hidden_size=512,
        heads=8,
        context=1024,
        num_experts=64,
        top_k=4,
        expert_intermediate_size=256,
        dtype="bfloat16",
    ),
    optimizer=OptimizerConfig(warmup_steps=200, b2=0.95),
)
WIDE = dataclasses.replace(
    BASE, model=dataclasses.replace(BASE.model, hidden_size=768, heads=12, expert_intermediate_size=384)
)
TOY = dataclasses.replace(
    BASE,
    data="shakespeare",
    steps=16,
    batch_size=8,
    log_every=4,
    eval_every=8,
    checkpoint_every=8,
    model=ModelConfig(
        layers=2, hidden_size=32, heads=2, context=64, num_experts=8, top_k=2, expert_intermediate_size=16
    ),
    optimizer=OptimizerConfig(warmup_steps=4),
)
RATES = (1e-3, 2e-3, 4e-3)
MORE_RATES = (*RATES, 8e-3)
"""4e-3 was the best rate of `dense` in d512-short, and the highest."""
LINUX = "00b399c37e5d60134038ea2100fa80011d35b74c37a8170493c36c77d5b211d5"
PLAYS = "224942b2fc2c2d3466802e9bf0da2a23c1457d7ac7d7fc1ce4435b3469bb0255"
FIRST, DENSE = (NORM, (1, 2, 3)), (("dense",), (1, 2, 3))
OTHERS = tuple(arm.name for arm in ARMS if arm.name not in MAIN)
ALL = (FIRST, DENSE, (OTHERS, (1, 2, 3)), (MAIN, (4, 5)))
STUDIES = {
    study.name: study
    for study in (
        Study("d512", BASE, RATES, 1500, ALL, LINUX),
        Study("d512-short", shortened(BASE), MORE_RATES, 713, ALL, LINUX),
        Study("d768", WIDE, RATES, 1500, (FIRST, DENSE), LINUX),
        Study("d768-short", shortened(WIDE), RATES, 713, (FIRST, DENSE), LINUX),
        Study("toy", TOY, (2e-3, 8e-3), 16, ((MAIN, (1, 2)), (("quantile",), (1, 2))), PLAYS, 128, linux=False),
    )
}


def study_named(name: str) -> Study:
    """The study of that name.

    Raises:
        TrainError: there is none.
    """
    if name not in STUDIES:
        raise TrainError(f"There is no study {name!r}: use --arms {', '.join(STUDIES)}.")
    return STUDIES[name]


def sweep_of(study: Study) -> list[Run]:
    """The runs that choose the learning rates."""
    return [Run(arm, rate, SWEEP_SEED) for arm in study.families.values() for rate in study.rates]


def chosen_rates(study: Study, bits: Mapping[Run, float | None]) -> dict[Family, float]:
    """The learning rate of each family whose sweep is complete.

    Args:
        study: the study.
        bits: validation bits per byte of the runs. None is a run that diverged.

    Raises:
        TrainError: all runs of a family's sweep diverged.
    """
    chosen: dict[Family, float] = {}
    for family, arm in study.families.items():
        runs = [run for run in sweep_of(study) if run.arm == arm]
        if not all(run in bits for run in runs):
            continue
        found = {run.learning_rate: value for run in runs if (value := bits[run]) is not None}
        if not found:
            raise TrainError(f"All runs of {arm} in the sweep diverged: define lower learning rates.")
        chosen[family] = min(found, key=found.__getitem__)
    return chosen


def queue(study: Study, bits: Mapping[Run, float | None]) -> list[Run]:
    """All runs whose learning rate is known, in order: the sweep, then the arms. `chosen_rates` has the arguments."""
    runs, rates = sweep_of(study), chosen_rates(study, bits)
    if len(rates) < len(study.families):
        return runs
    for names, seeds in study.blocks:
        runs += [Run(name, rates[arm_named(name).family], seed) for seed in seeds for name in names]
    return runs


def measurable(study: Study, bits: Mapping[Run, float | None]) -> set[Run]:
    """The runs that may have a row: the sweep, and the arms at the rates that are chosen or can still be chosen.

    So a rate can be added to the sweep of a study that has rows. If the sweep then chooses another rate for a family,
    the family's other rows are refused until they are deleted. `chosen_rates` has the arguments.
    """
    rates, runs = chosen_rates(study, bits), set(sweep_of(study))
    for names, seeds in study.blocks:
        for arm in map(arm_named, names):
            chosen = (rates[arm.family],) if arm.family in rates else study.rates
            runs |= {Run(arm.name, rate, seed) for rate in chosen for seed in seeds}
    return runs


def config_of(study: Study, run: Run, text: data.Files | None = None, folder: Path | None = None) -> Config:
    """The trainer's options for a run. Without a text and a folder, they are the definition that a row keeps.

    Args:
        study: the study.
        run: the run.
        text: the files of the text. None leaves its name.
        folder: the folder of the run.
    """
    arm, base = arm_named(run.arm), study.base
    changes: dict[str, Any] = {"mlp": arm.mlp, "seed": run.seed, "run": folder, "model": model_of(arm, base.model)}
    changes["optimizer"] = dataclasses.replace(base.optimizer, learning_rate=run.learning_rate)
    if run.seed == SWEEP_SEED:
        changes["steps"] = study.sweep_steps
    if text is not None:
        changes |= {"data": str(text.train), "validation": (f"{data.HELD_OUT}={text.validation}",)}
    return dataclasses.replace(base, **changes, **dict(arm.balance))


def missing(runs: Sequence[Run], done: Mapping[Run, Any]) -> list[Run]:
    """The runs that have no row."""
    return [run for run in runs if run not in done]
