"""Checkpoints of a run. A checkpoint gets its final name when it is complete, so a kill leaves the one before it."""

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
    """The content of a checkpoint.

    Attributes:
        state: parameters, correction biases, optimiser state, step and key.
        data: state of the data iterator.
        seconds: training time of the run so far.
    """

    state: TrainState
    data: dict[str, Any]
    seconds: float


class Checkpoints:
    """The checkpoints of one run. A background thread writes them."""

    def __init__(self, folder: Path):
        logging.getLogger("absl").setLevel(logging.ERROR)
        # asyncio would log the error that `_written` raises once more for each parameter.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        self.folder = folder
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    @property
    def newest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def drop_newest(self):
        """Deletes the newest checkpoint. The one before it becomes the newest.

        Raises:
            TrainError: the folder holds fewer than two checkpoints.
        """
        steps = sorted(self._manager.all_steps())
        if len(steps) < 2:
            raise TrainError(
                f"--restore previous needs two checkpoints, and {self.folder} holds {len(steps)}: start a new run in "
                "another folder with --run."
            )
        self._manager.delete(steps[-1])

    def save(self, snapshot: Snapshot):
        """Starts to write a checkpoint. If there is one of the same step, nothing happens.

        Raises:
            TrainError: this checkpoint, or the one before it, could not be written.
        """
        step = int(snapshot.state.step)
        if step == self.newest:
            return
        with self._written():
            progress = {"data": snapshot.data, "seconds": snapshot.seconds}
            arguments = ocp.args.Composite(
                state=ocp.args.StandardSave(_parts(snapshot.state)), progress=ocp.args.JsonSave(progress)
            )
            self._manager.save(step, args=arguments)

    def restore(self, like: TrainState) -> Snapshot:
        """The newest complete checkpoint.

        Args:
            like: a state with the shapes that the configuration gives, or only these shapes.

        Raises:
            TrainError: the checkpoint cannot be read, or has other shapes.
        """
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or device), _parts(like)
        )
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(shapes), progress=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(self.newest, args=arguments)
        except Exception as error:  # orbax and tensorstore raise many kinds of errors for a damaged file
            damaged = self.folder / str(self.newest)
            raise TrainError(
                f"The checkpoint {damaged} is damaged or was written with other options ({type(error).__name__}): "
                "--restore previous deletes it and resumes from the one before it, and --run starts a new run in "
                "another folder."
            ) from error
        return Snapshot(TrainState(**restored["state"]), **restored["progress"])

    def close(self):
        """Waits until all checkpoints are on disk.

        Raises:
            TrainError: a checkpoint could not be written.
        """
        with self._written():
            self._manager.wait_until_finished()
            self._manager.close()

    @contextlib.contextmanager
    def _written(self):
        try:
            yield
        except Exception as error:  # orbax and tensorstore raise many kinds of errors on a full disk
            raise TrainError(
                f"A checkpoint cannot be written to {self.folder} ({first_line(error)}): free some space there and run "
                "the same command again. It resumes from the newest complete checkpoint."
            ) from error


def has_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a complete checkpoint. It is named after its step, and an incomplete one is not."""
    return any(path.name.isdigit() for path in folder.glob("*"))


def _parts(state: TrainState) -> dict[str, Any]:
    """The parts of a state by their names. Only fine-tuning has frozen weights."""
    return {name: part for name, part in state._asdict().items() if part is not None}
