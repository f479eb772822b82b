"""One exception family. Every message says what failed and what to do about it."""

from __future__ import annotations


class SafelightError(Exception):
    """Base of every error that Safelight raises on purpose.

    ``exit_code`` is what the command line returns for it; the numbers are stable.
    """

    exit_code = 1


class InvalidRequest(SafelightError, ValueError):
    """An argument is empty, absurd or of the wrong type. Raised before any model is loaded.

    Args:
        field: the argument's name as the caller wrote it (``"steps"``).
        problem: what is wrong with it, with the value.
        fix: what to write instead.
    """

    exit_code = 2

    def __init__(self, field: str, problem: str, fix: str = "") -> None:
        self.field, self.problem, self.fix = field, problem, fix
        super().__init__(f"{field}: {problem}" + (f" {fix}" if fix else ""))


class ModelNotFound(SafelightError, LookupError):
    """No model answers to this name, path or hub id. The message lists the alternatives."""

    exit_code = 3


class WeightsError(SafelightError):
    """A weights or config file is wrong, truncated, corrupted or of another family.

    Args:
        file: the file (or folder) at fault.
        problem: what is wrong; names the key where one is at fault.
        fix: what to do.
    """

    exit_code = 4

    def __init__(self, file: object, problem: str, fix: str = "") -> None:
        self.file, self.problem, self.fix = str(file), problem, fix
        super().__init__(f"{file}: {problem}" + (f" {fix}" if fix else ""))


class VariantNotFound(WeightsError):
    """A folder has no weights of the variant (``fp16``) that was asked for."""


class MissingExtra(SafelightError, ImportError):
    """A feature needs an optional dependency that is not installed."""

    exit_code = 5

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs an optional part: pip install 'safelight[{extra}]'")


class Cancelled(SafelightError):
    """The work was cancelled; what had been finished before is kept."""

    exit_code = 130
