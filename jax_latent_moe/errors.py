"""The errors that the library raises. Each message names the value, the rule and the way out."""

import contextlib
from collections.abc import Iterator, Sequence


class LatentMoEError(ValueError):
    """Base class of all errors that a user of this library can cause."""


class ConfigError(LatentMoEError):
    """A configuration that no backend can run. Building the config raises it."""


class InputError(LatentMoEError):
    """An array argument with a wrong shape, dtype or value."""


class NotCollectedWarning(UserWarning):
    """A Flax layer was differentiated, but its auxiliary losses or its expert loads were not collected."""


class CheckpointError(LatentMoEError):
    """A checkpoint that cannot be read or written whole. No part of it is returned.

    Attributes:
        problems: all problems found, one sentence each.
    """

    def __init__(self, where: object, problems: Sequence[str]):
        self.problems = tuple(problems)
        super().__init__("\n  ".join([f"{where}: {len(problems)} problem(s)", *problems]))


class UnsupportedError(LatentMoEError):
    """A named backend or dispatch was asked for something it cannot do.

    Attributes:
        backend: name of the backend or the dispatch.
        reason: why it cannot do it, as a sentence.
        remedy: what works instead, as a sentence.
    """

    def __init__(self, backend: str, reason: str, remedy: str, *, kind: str = "backend"):
        self.backend, self.reason, self.remedy = backend, reason, remedy
        super().__init__(f"{kind} '{backend}' cannot run this: {reason} {remedy}")


@contextlib.contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Around imports of optional packages: one that is missing names the extra of this package that installs it.

    Raises:
        ImportError: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise ImportError(
            f"this needs {package}, which is not installed: pip install 'jax-latent-moe[{extra}]'.", name=package
        ) from error
