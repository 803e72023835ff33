"""The rows of a study in the order of its tables: arms, seeds, curves."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from examples.study.arms import Arm
from examples.study.definition import SWEEP_SEED, Run, Study, chosen_rates, missing, queue
from examples.study.rows import Row, bits_of


@dataclasses.dataclass(frozen=True)
class Results:
    """The rows that there are.

    Attributes:
        study: the definition.
        rows: the rows by their runs.
    """

    study: Study
    rows: Mapping[Run, Row]

    @property
    def rates(self) -> dict:
        """The learning rate of each family whose sweep is complete."""
        return chosen_rates(self.study, bits_of(self.rows))

    @property
    def queue(self) -> list[Run]:
        """The runs whose learning rate is known."""
        return queue(self.study, bits_of(self.rows))

    @property
    def missing(self) -> list[Run]:
        """The runs of the queue without a row."""
        return missing(self.queue, self.rows)

    def of_arm(self, arm: str) -> dict[int, Row]:
        """The rows of an arm by seed, without the sweep's."""
        found = {run.seed: row for run, row in self.rows.items() if run.arm == arm and run.seed != SWEEP_SEED}
        return dict(sorted(found.items()))

    def bits(self, arm: str) -> dict[int, float]:
        """Validation bits per byte by seed, without runs that diverged."""
        found = {seed: row["validation_bits_per_byte"] for seed, row in self.of_arm(arm).items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def diverged(self, arm: str) -> list[int]:
        """The seeds with which an arm diverged."""
        return sorted(self.of_arm(arm).keys() - self.bits(arm).keys())

    def curves(self, arm: str, field: str) -> Float[np.ndarray, "seeds points 3"]:
        """Step, seconds and value (over all layers, their mean) of a curve of the runs that did not diverge."""
        found = [self.of_arm(arm)[seed].get(field, []) for seed in self.bits(arm)]
        points = [[(step, seconds, float(np.mean(value))) for step, seconds, value in curve] for curve in found]
        return np.asarray(points, float).reshape(len(points), max(map(len, points), default=0), 3)

    @property
    def measured(self) -> tuple[Arm, ...]:
        """The arms with at least one run that did not diverge."""
        return tuple(arm for arm in self.study.arms if self.bits(arm.name))
