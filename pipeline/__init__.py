"""A distributed data and compression pipeline for image data sets.

    import pipeline
    pipeline.run("distill", "digits", config={"ipc": 10}, out="runs/digits")
    images = pipeline.open("runs/digits")

Importing the package is cheap; what is heavy is imported when it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError, RunError, UsageError

if TYPE_CHECKING:
    from pipeline.api import run
    from pipeline.loaders import open  # noqa: A004

__version__ = "0.1.0"
__all__ = ["PipelineError", "RunError", "UsageError", "__version__", "open", "run"]

_LAZY = {"open": "pipeline.loaders", "run": "pipeline.api"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'pipeline' has no attribute '{name}'")
