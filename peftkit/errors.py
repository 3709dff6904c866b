"""Everything peftkit refuses, as one tree.

    PeftkitError                exit code 1: the work failed
    ├── UsageError              exit code 2: what was asked for is wrong
    │   └── ConfigError         one or more problems in a configuration, reported together
    ├── DataError               rows, columns, labels
    ├── BackboneError           weights, tokenizer, architecture
    │   └── FetchError          a bundled backbone or data set could not be had
    ├── MethodError             a method that cannot be attached, saved or loaded
    │   └── NotMergeable        the method has no merged form
    ├── TrainingError           a run that would be worthless if it went on
    ├── JobError                a process of several that failed, died or hung; its own exit code
    └── ArtifactError           a run folder, adapter or merged model

Every message says what is wrong, where, and how to mend it.
"""

from __future__ import annotations

from collections.abc import Sequence

MOST_TOLD = 100
"""Problems of one configuration that are told; whoever has more has given the wrong file."""


class PeftkitError(Exception):
    """Base of all errors that peftkit raises on purpose. `exit_code` is the command line's."""

    exit_code = 1


class UsageError(PeftkitError):
    """The request itself is wrong: an argument, a file name, a configuration."""

    exit_code = 2


class ConfigError(UsageError):
    """One or more problems in a configuration, all of them at once."""

    def __init__(self, problems: Sequence[str]) -> None:
        more = [f"… and more than these {MOST_TOLD}; mend them first"] if len(problems) > MOST_TOLD else []
        self.problems = (*problems[:MOST_TOLD], *more)
        super().__init__("\n".join(self.problems))


class DataError(PeftkitError):
    """Rows that cannot be read, or that would make the run worthless."""


class BackboneError(PeftkitError):
    """A pretrained model that cannot be had, read or understood."""


class FetchError(BackboneError):
    """A bundled file that could not be downloaded, verified or unpacked."""


class MethodError(PeftkitError):
    """A fine-tuning method that cannot be attached, saved or loaded."""


class NotMergeable(MethodError):
    """The method has no merged form; the message says what to ship instead."""


class TrainingError(PeftkitError):
    """A run that would be worthless if it went on."""


class JobError(PeftkitError):
    """A process of several that failed, and ended the others with it; the message and the code are that process's."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        self.exit_code = exit_code
        super().__init__(message)


class ArtifactError(PeftkitError):
    """A run folder, adapter or merged model that cannot be written, read or trusted."""


def first_line(error: BaseException) -> str:
    """The first line of another library's error, or its kind where it says nothing; cut at 200 characters."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return first if len(first) <= 200 else f"{first[:199]}…"
