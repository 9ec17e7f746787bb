import os
from pathlib import Path

import pytest
from hypothesis import settings

# Machines are shared: how long an example takes says nothing.
settings.register_profile("pipeline", deadline=None)
settings.load_profile("pipeline")

TINY = {
    "teacher": {"train": {"epochs": 4, "checkpoint_epochs": 1}},
    "recover": {"iterations": 12, "batch_size": 5},
    "relabel": {"views": 3},
    "student": {"train": {"epochs": 3, "batch_size": 10, "checkpoint_epochs": 1}},
    "seeds": 2,
}
"""A distillation of the digits that has every step and takes seconds."""


@pytest.fixture
def real_data() -> Path:
    """The folder of real image data; without it the test is left out."""
    if "PIPELINE_DATA" not in os.environ:
        pytest.skip("PIPELINE_DATA names no folder of real data")
    return Path(os.environ["PIPELINE_DATA"])
