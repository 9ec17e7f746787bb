"""A distributed data and compression pipeline for image data sets.

    import pipeline
    pipeline.run("distill", "digits", ipc=10, out="runs/digits")
    loader = pipeline.open("runs/digits").to_torch().loader(batch_size=20)

Importing the package is cheap; what is heavy is imported when it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError, RunError, UsageError

if TYPE_CHECKING:
    from pipeline.api import plan, run
    from pipeline.open_output import (
        load_teacher,
        load_tokenizer,
        open,  # noqa: A004
    )
    from pipeline.recipes.compress_features import load_codec
    from pipeline.samples import Samples

__version__ = "0.1.0"

_LAZY = {
    "Samples": "pipeline.samples",
    "load_codec": "pipeline.recipes.compress_features",
    "load_teacher": "pipeline.open_output",
    "load_tokenizer": "pipeline.open_output",
    "open": "pipeline.open_output",
    "plan": "pipeline.api",
    "run": "pipeline.api",
}
__all__ = [
    "PipelineError",
    "RunError",
    "Samples",
    "UsageError",
    "__version__",
    "load_codec",
    "load_teacher",
    "load_tokenizer",
    "open",
    "plan",
    "run",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'pipeline' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
