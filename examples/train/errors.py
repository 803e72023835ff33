"""What the trainer raises for things its user can put right; `main` prints the sentence and leaves."""


class TrainError(Exception):
    """A wrong option, missing data, a diverged or a damaged run: one sentence with the way out.

    Not a ValueError: tyro would catch that and draw a box of its own.
    """
