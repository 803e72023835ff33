"""What the library raises. Each message names the value, the rule and the way out."""

from collections.abc import Sequence


class LatentMoEError(ValueError):
    """Base of every error a user of this library can cause."""


class ConfigError(LatentMoEError):
    """A configuration that no backend could run: raised where the config is built."""


class InputError(LatentMoEError):
    """An array argument whose shape, dtype or value breaks the contract of the call."""


class NotCollectedWarning(UserWarning):
    """A Flax layer was differentiated while its auxiliary losses or its loads were not collected."""


class CheckpointError(LatentMoEError):
    """A checkpoint that cannot be read or written whole; nothing of it was returned.

    Attributes:
        problems: every problem found, a sentence each.
    """

    def __init__(self, where: object, problems: Sequence[str]):
        self.problems = tuple(problems)
        super().__init__("\n  ".join([f"{where}: {len(problems)} problem(s)", *problems]))


class UnsupportedError(LatentMoEError):
    """A named backend was asked for something it cannot do.

    Attributes:
        backend: name of the backend that refused.
        reason: why, as a sentence.
        remedy: what would work instead.
    """

    def __init__(self, backend: str, reason: str, remedy: str):
        self.backend, self.reason, self.remedy = backend, reason, remedy
        super().__init__(f"backend '{backend}' cannot run this: {reason} {remedy}")
