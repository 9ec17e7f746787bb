"""Errors that a user can cause or must act on.

PipelineError
├── UsageError   the command or configuration cannot be carried out (exit code 2)
└── RunError     the run started and could not finish (exit code 1)
"""

from __future__ import annotations

from typing import ClassVar


class PipelineError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        message: what went wrong, as one or more full sentences.
        hint: what to do next, as a full sentence.
        code: a short stable name to search for, such as ``unknown-dataset``.
        where: the file, key or option that the message is about.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str, code: str, where: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code
        self.where = where

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions with keyword-only arguments do not survive a process boundary by themselves.
        return _rebuild, (type(self), self.message, self.hint, self.code, self.where)

    def __str__(self) -> str:
        place = f" ({self.where})" if self.where else ""
        return f"{self.message}{place} {self.hint} [{self.code}]"


class UsageError(PipelineError):
    """The command or configuration cannot be carried out as asked."""

    exit_code = 2


class RunError(PipelineError):
    """The run started and could not finish."""


def _rebuild(
    kind: type[PipelineError], message: str, hint: str, code: str, where: str | None
) -> PipelineError:
    return kind(message, hint=hint, code=code, where=where)
