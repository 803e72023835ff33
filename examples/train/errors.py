"""The trainer's exception for problems that the user can solve. `main` prints its message and exits."""


class TrainError(Exception):
    """An option is wrong, data is missing, or a run has diverged or is damaged. The message says what to do.

    It is not a ValueError, because tyro catches ValueErrors and prints them in its own box.
    """


class Diverged(TrainError):
    """The loss or the parameters of a run are not finite, or it had a bad step."""
