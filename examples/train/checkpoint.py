"""Checkpoints: written aside and renamed when complete, so that a run killed at any moment finds its newest one."""

import contextlib
import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from examples.train.errors import TrainError
from examples.train.processes import first_line
from examples.train.step import TrainState

KEPT = 2


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds.

    Attributes:
        state: parameters, correction biases, optimiser, step and key.
        data: state of the data iterator.
        seconds: time that the run had trained.
    """

    state: TrainState
    data: dict[str, Any]
    seconds: float


class Checkpoints:
    """The checkpoints of one run; saving goes on in the background."""

    def __init__(self, folder: Path):
        logging.getLogger("absl").setLevel(logging.ERROR)
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it repeats, once a parameter, what _written raises
        self.folder = folder
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    @property
    def newest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def drop_newest(self):
        """Deletes the newest checkpoint, so that the one before it is the newest.

        Raises:
            TrainError: there is none before it.
        """
        steps = sorted(self._manager.all_steps())
        if len(steps) < 2:
            raise TrainError(
                f"--restore previous: {self.folder} holds {len(steps)} checkpoint(s), and none before the newest: give "
                "another folder with --run to start anew."
            )
        self._manager.delete(steps[-1])

    def save(self, snapshot: Snapshot):
        """Starts to write the snapshot under its step; does nothing if that step is there.

        Raises:
            TrainError: this one, or the one before it, cannot be written.
        """
        step = int(snapshot.state.step)
        if step == self.newest:
            return
        with self._written():
            progress = {"data": snapshot.data, "seconds": snapshot.seconds}
            arguments = ocp.args.Composite(
                state=ocp.args.StandardSave(snapshot.state._asdict()), progress=ocp.args.JsonSave(progress)
            )
            self._manager.save(step, args=arguments)

    def restore(self, like: TrainState) -> Snapshot:
        """The newest complete checkpoint.

        Args:
            like: a state, or its shapes, as the configuration asks for.

        Raises:
            TrainError: it cannot be read, or holds other shapes.
        """
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or device), like._asdict()
        )
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(shapes), progress=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(self.newest, args=arguments)
        except Exception as error:  # orbax and tensorstore raise whatever they meet in a damaged file
            damaged = self.folder / str(self.newest)
            raise TrainError(
                f"The checkpoint {damaged} is damaged or was written with other options: --restore previous deletes it "
                f"and goes on from the one before it; another --run starts anew ({type(error).__name__})."
            ) from error
        return Snapshot(TrainState(**restored["state"]), **restored["progress"])

    def close(self):
        """Waits until everything is on disk.

        Raises:
            TrainError: it cannot be written.
        """
        with self._written():
            self._manager.wait_until_finished()
            self._manager.close()

    @contextlib.contextmanager
    def _written(self):
        try:
            yield
        except Exception as error:  # orbax and tensorstore raise whatever they meet on a full disk
            raise TrainError(
                f"A checkpoint cannot be written to {self.folder} ({first_line(error)}): free some space there. The "
                "same command then goes on from the newest complete one."
            ) from error
