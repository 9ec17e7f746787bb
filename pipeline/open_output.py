"""Opening what a run wrote, or any data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import nn

from pipeline.api import recorded
from pipeline.datasets import NAMED, DatasetInfo, find_dataset
from pipeline.distilled_samples import DistilledSamples
from pipeline.errors import PipelineError, UsageError
from pipeline.feature_samples import FeatureSamples
from pipeline.labelled_images import ImageConfig
from pipeline.recipes.tokenize import open_tokenizer
from pipeline.samples import Samples
from pipeline.stages.tokenize import read_tokenizer
from pipeline.storage.artifact import MANIFEST, Artifact, ArtifactSource
from pipeline.storage.cached_store import CachedStore
from pipeline.storage.models import UNIT, read_model
from pipeline.storage.selected import selected_keys
from pipeline.storage.shard_reader import Places, keys_in
from pipeline.storage.source import Source
from pipeline.storage.store import LocalStore, Store, open_store
from pipeline.token_samples import TokenSamples
from pipeline.tokenizers.tokenizer import Tokenizer

CPU = torch.device("cpu")
CACHE_BYTES = 2**36
"""Of files that are kept: 64 GiB."""


class PrunedSamples(Samples):
    """The samples that a pruning kept, in the original shards; nothing was copied."""

    kind = "pruned"


def open(  # noqa: A001
    path: str | Path,
    *,
    split: str = "train",
    source: str | Path | None = None,
    data: str | Path | None = None,
    cache: str | Path | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> Samples:
    """Open what a run wrote, or any data set that a run takes.

    Args:
        path: path or URL of the output of a finished run, of one of its folders or of a data set;
            or the name of a data set.
        split: ``train`` or ``test``, where there are both.
        source: of a pruned data set, where its samples are read from: a name, a path or a URL of
            what was pruned or of any copy. Where not given, the shards that were materialised, or
            the place that the run itself read.
        data: where named data sets lie.
        cache: folder in which files from other machines are kept once they were read.
        cache_bytes: of what is kept there. What was used longest ago goes first.

    Returns:
        Samples of the kind that they are: ``DistilledSamples``, ``TokenSamples``,
        ``FeatureSamples``, or images.

    Raises:
        UsageError: there is nothing that can be opened, no such split, or the data set that was
            pruned is not found.
        RunError: a file is missing or damaged.
    """
    place, kept = str(path), _Cache(cache, cache_bytes)
    store = open_store(path) if "://" in place or Path(path).is_dir() else None
    if store is None or store.info(MANIFEST) is None:
        return _data_set(place, split, data, kept)
    artifact = Artifact.open(kept.store(store))
    kind = artifact.manifest["kind"]
    if split != "train" and kind in {"distilled", "pruned", "table"}:
        raise _no_split(place, split, ["train"])
    if kind == "pruned":
        return _pruned(artifact, place, source, data, kept)
    if kind in _KINDS:
        return _KINDS[kind](artifact, place, split)
    raise UsageError(
        f"This folder holds '{kind}', which has no samples.",
        hint="Give the output folder of 'convert', 'distill', 'prune', 'tokenize' or "
        "'compress-features'.",
        code="not-a-run",
        where=place,
    )


def _of_split(artifact: Artifact, place: str, split: str) -> Artifact:
    if split not in artifact.products:
        there = [name for name in ("train", "test") if name in artifact.products]
        raise _no_split(place, split, there)
    return artifact.product(split)


def _converted(artifact: Artifact, place: str, split: str) -> Samples:
    found = ArtifactSource(_of_split(artifact, place, split))
    image = _image(NAMED.get(artifact.manifest.get("dataset", "")))
    return Samples(found, place=place, artifact=artifact, image=image)


def _table(artifact: Artifact, place: str, _: str) -> Samples:
    return Samples(ArtifactSource(artifact), place=place, artifact=artifact)


def _distilled(artifact: Artifact, place: str, _: str) -> Samples:
    return DistilledSamples(artifact, place)


def _tokens(artifact: Artifact, place: str, split: str) -> Samples:
    return TokenSamples(artifact, _of_split(artifact, place, split), place)


def _features(artifact: Artifact, place: str, split: str) -> Samples:
    return FeatureSamples(artifact, _of_split(artifact, place, split), place)


_KINDS: dict[str, Callable[[Artifact, str, str], Samples]] = {
    "dataset": _converted,
    "distilled": _distilled,
    "features": _features,
    "table": _table,
    "tokens": _tokens,
}


@dataclass(frozen=True)
class _Cache:
    """Where files of other machines are kept, if they are."""

    folder: str | Path | None
    max_bytes: int

    def store(self, store: Store) -> Store:
        if self.folder is None or isinstance(store, LocalStore):
            return store
        return CachedStore(store, Path(self.folder).absolute(), self.max_bytes)

    def source(self, source: Source) -> Source:
        if not is_dataclass(source) or "store" not in {field.name for field in fields(source)}:
            return source
        changed: Any = source
        made: Source = replace(changed, store=self.store(changed.store))
        return made


def _no_split(place: str, split: str, there: list[str]) -> UsageError:
    return UsageError(
        f"There is no split '{split}' here.",
        hint=f"There is: {', '.join(there)}.",
        code="no-split",
        where=place,
    )


def _data_set(place: str, split: str, data: str | Path | None, cache: _Cache) -> Samples:
    """A data set in one of the forms that runs take."""
    found = find_dataset(place, data)
    chosen = {"train": found.train, "test": found.test}.get(split)
    if chosen is None:
        raise _no_split(place, split, ["train", *(["test"] if found.test else [])])
    return Samples(cache.source(chosen), place=place, image=_image(found.info))


def _image(info: DatasetInfo | None) -> ImageConfig | None:
    """Shape and normalisation of a data set that has a name."""
    return ImageConfig.model_validate(info.image) if info else None


def _pruned(
    artifact: Artifact,
    place: str,
    source: str | Path | None,
    data: str | Path | None,
    cache: _Cache,
) -> PrunedSamples:
    image = ImageConfig.model_validate(artifact.manifest["config"]["image"])
    if source is None and "train" in artifact.products:
        kept: Source = ArtifactSource(artifact.product("train"))
        return PrunedSamples(kept, place=place, artifact=artifact, image=image)
    if source is None:
        job = recorded(artifact.store)
        source, data = job["source"], data or job["data"]
    base = cache.source(find_dataset(str(source), data).train)
    wanted = selected_keys(artifact.product("selection"))
    places = _known_places(artifact, base) or Places.read(base)
    places = places.take(keys_in(places, wanted))
    if len(places) < len(wanted):
        missing = wanted.filter(pc.invert(pc.is_in(wanted, places.keys)))
        raise UsageError(
            f"{len(missing)} of the {len(wanted)} samples that were kept are not in '{source}', "
            f"such as '{missing[0]}'.",
            hint="Give with source= the data set that was pruned, or a copy with the same keys.",
            code="other-data",
            where=place,
        )
    return PrunedSamples(base, place=place, artifact=artifact, places=places, image=image)


def _known_places(artifact: Artifact, base: Source) -> Places | None:
    """Where samples lie by what the pruning wrote down, where it read this very source."""
    folder = next((s for s in artifact.manifest["steps"] if s.startswith("facts-")), None)
    try:
        facts = ArtifactSource(Artifact.open(artifact.store.below(folder or "")))
    except PipelineError:
        return None  # it may have been deleted; the source itself knows as well
    if facts.artifact.manifest["spec"].get("input") != base.identity:
        return None
    numbers = {shard.name: number for number, shard in enumerate(base.shards)}
    if any(shard.name not in numbers for shard in facts.shards):
        return None
    keys = [facts.read(shard)["key"].combine_chunks() for shard in facts.shards]
    shards = [
        np.full(len(part), numbers[shard.name], np.int32)
        for shard, part in zip(facts.shards, keys, strict=True)
    ]
    every = np.concatenate([np.empty(0, np.int32), *shards])
    if (np.diff(every) < 0).any():
        return None
    return Places(every, None, pa.concat_arrays([pa.array([], pa.string()), *keys]))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a run of ``train-tokenizer``, or of a folder with its two files, on the CPU.

    Raises:
        UsageError: there is none.
        RunError: a file is missing or damaged.
    """
    return read_tokenizer(open_tokenizer(path).files, CPU)


def load_teacher(path: str | Path) -> nn.Module:
    """The network that a run trained or was given as its teacher, frozen, on the CPU.

    It takes normalised images (N, C, H, W) and gives logits (N, K). Of a committee it is the first.

    Raises:
        UsageError: there is no run, or it has no teacher.
        RunError: a file is missing or damaged.
    """
    artifact = Artifact.open(open_store(path))
    if "teacher" in artifact.products:
        artifact = artifact.product("teacher")
    if artifact.manifest["kind"] != "models":
        raise UsageError(
            "There is no teacher here.",
            hint="Give the output of 'pipeline run distill', 'compress-model' or "
            "'compress-features'.",
            code="no-teacher",
            where=str(path),
        )
    units = [record["name"] for record in artifact.records()]
    return read_model(artifact, CPU, UNIT if UNIT in units else units[0])
