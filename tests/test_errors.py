"""Errors keep what they say on their way between processes."""

from __future__ import annotations

import pickle

import pytest

from pipeline.errors import PipelineError, RunError, UsageError
from pipeline.testing import pickled


@pytest.mark.parametrize("kind", [PipelineError, RunError, UsageError])
@pytest.mark.parametrize("where", [None, "folder/file"])
def test_every_part_survives_pickling(kind: type[PipelineError], where: str | None) -> None:
    error = kind("It broke.", hint="Mend it.", code="broken", where=where)
    copy = pickled(error)
    assert type(copy) is kind
    assert vars(copy) == vars(error)
    assert str(copy) == str(error)
    assert pickle.dumps(copy) == pickle.dumps(error)


def test_the_message_ends_with_what_to_do_and_the_code() -> None:
    error = RunError("It broke.", hint="Mend it.", code="broken", where="here")
    assert str(error) == "It broke. (here) Mend it. [broken]"
    assert str(UsageError("It broke.", hint="Mend it.", code="b")) == "It broke. Mend it. [b]"


def test_exit_codes_tell_a_wrong_command_from_a_failed_run() -> None:
    assert (PipelineError.exit_code, RunError.exit_code, UsageError.exit_code) == (1, 1, 2)
