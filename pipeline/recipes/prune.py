"""Choose the samples of a data set that are worth keeping."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import merge
from pipeline.datasets import Dataset
from pipeline.orchestration.run import Run
from pipeline.pruning.budget import Budget
from pipeline.recipes import Recipe
from pipeline.recipes.convert import ConvertConfig, write_split
from pipeline.recipes.distill import UNKNOWN
from pipeline.recipes.prune_choice import Chosen, choose, needs, selector_name
from pipeline.recipes.prune_config import PruneConfig
from pipeline.recipes.prune_duplicates import Duplicates, find_duplicates
from pipeline.recipes.prune_report import Told, report
from pipeline.recipes.prune_scores import SCORES, Material
from pipeline.stages.fingerprint import Fingerprint
from pipeline.storage.artifact import Artifact, ArtifactSource
from pipeline.storage.parquet import ParquetFormat
from pipeline.storage.selected import SelectedSource

SIDE = 64
"""Largest side, in pixels, of the images that are scored where nothing else is said."""


def prune(run: Run, data: Dataset, config: PruneConfig) -> dict[str, Any]:
    """Leave out duplicates, score, select; publish scores, duplicates and the keys that are kept."""
    material = Material(run, data, config)
    budget = Budget.parse(str(config.keep))
    name = config.score or ("el2n" if data.train.classes else "prototypes")
    scored = needs_score(config, budget)
    ...
