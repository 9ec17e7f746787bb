"""Opened outputs: every sample once, in any topology, and from wherever a training stopped."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import pipeline
from pipeline.config import merge
from pipeline.epoch_order import EpochOrder, Steps
from pipeline.errors import RunError, UsageError
from pipeline.labelled_images import ImageConfig
from pipeline.loaders import TorchSamples
from pipeline.storage.artifact import ArtifactSource
from pipeline.storage.cached_store import CachedStore
from pipeline.storage.images import encode_png
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.store import LocalStore

KINDS = ["images", "pruned", "distilled", "tokens", "features"]
SIDE = {"width": 32, "depth": 1}
TOKENIZER = {"size": 8, "patch": 2, "tokens": 4, "quantizer": {"bits": 8}}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An output of every kind."""
    folder = tmp_path_factory.mktemp("outputs")
    out = {kind: folder / kind for kind in (*KINDS, "tokenizer")}
    pipeline.run("convert", noise(folder / "noise.parquet"), out=out["images"], shard_mb=1)
    pipeline.run("prune", "digits", out=out["pruned"], keep=200, selector="random")
    pipeline.run("distill", "digits", out=out["distilled"], config=merge(TINY, {"ipc": 2}))
    tokenizer = {**TOKENIZER, "encoder": SIDE, "decoder": SIDE}
    training = {"train": {"epochs": 1}}
    pipeline.run(
        "train-tokenizer", "digits", out=out["tokenizer"], tokenizer=tokenizer, training=training
    )
    chosen = {"tokenizer": str(out["tokenizer"]), "views": "10crop", "mean_bytes": 3.0}
    pipeline.run("tokenize", "digits", out=out["tokens"], **chosen)
    few = {"teacher": {"train": {"epochs": 1}}, "mimic": {"epochs": 1}, "tail": {"epochs": 1}}
    pipeline.run("compress-features", "digits", out=out["features"], baselines=[], **few)
    return out


def noise(path: Path) -> Path:
    """300 pictures in four row groups of about 1 MB."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 64, 64, 3), np.uint8)
    label = pa.array(np.arange(300) % 10)
    key = [f"picture-{row}" for row in range(300)]
    images = pa.array(map(encode_png, pixels), pa.binary())
    table = pa.table({"key": key, "image": images, "label": label})
    pq.write_table(table, path, row_group_size=75)
    return path


@pytest.fixture(scope="module")
def opened(outputs: dict[str, Path]) -> dict[str, TorchSamples[Any]]:
    return {kind: pipeline.open(outputs[kind]).to_torch() for kind in KINDS}


# Every sample once.


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_has_every_key_once_in_every_topology(
    opened: dict[str, TorchSamples[Any]], kind: str
) -> None:
    data = opened[kind]
    assert len(set(data.keys)) == len(data) > 0
    size = max(7, len(data) // 20)
    for workers in (0, 1, 2, 4):
        for world in (1, 2, 3):
            loaders = [
                data.loader(size, num_workers=workers, threads=0, rank=rank, world=world)
                for rank in range(world)
            ]
            batches = [list(loader) for loader in loaders]
            assert len({len(found) for found in batches}) == 1  # ranks wait for one another
            keys = [key for batch in chain(*batches) for key in batch.key]
            assert sorted(keys) == sorted(data.keys)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_plain_loader_gives_is_what_items_are(
    opened: dict[str, TorchSamples[Any]], kind: str, workers: int
) -> None:
    data = opened[kind]
    data.set_epoch(1)
    plain = list(DataLoader(data, batch_size=16, num_workers=workers))
    streamed = data.stream(16, shuffle=False)
    streamed.set_epoch(1)
    ours = list(DataLoader(streamed, batch_size=None, num_workers=workers))
    assert len(plain) == len(ours)
    for one, other in zip(plain, ours, strict=True):
        assert type(one) is type(other)
        assert list(one.key) == other.key
        for a, b in zip(one[:-1], other[:-1], strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
    data.set_epoch(0)


def test_threads_and_processes_give_what_one_thread_gives(
    opened: dict[str, TorchSamples[Any]],
) -> None:
    data = opened["images"]
    ways = [{"threads": 0}, {"threads": 3}, {"num_workers": 2}]
    alone, *others = [list(data.loader(50, seed=3, **way)) for way in ways]
    for found in others:
        assert [batch.key for batch in found] == [batch.key for batch in alone]
        pairs = zip(found, alone, strict=True)
        assert all(torch.equal(a.image, b.image) for a, b in pairs)


def test_an_order_belongs_to_seed_and_epoch(opened: dict[str, TorchSamples[Any]]) -> None:
    data = opened["images"]

    def order(seed: int, epoch: int, **options: Any) -> list[str]:
        loader = data.loader(100, seed=seed, threads=0, **options)
        loader.set_epoch(epoch)
        return [key for batch in loader for key in batch.key]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(*which)) for which in [(0, 0), (0, 1), (1, 0)]}) == 3
    assert order(0, 5, shuffle=False) == data.keys
    stopped = data.loader(100, threads=0)
    next(iter(stopped))
    assert stopped.state_dict()["position"] == 100
    stopped.set_epoch(3)
    state = stopped.state_dict()
    assert (state["epoch"], state["position"]) == (3, 0)
    loader = data.loader(100, threads=0)
    epochs = [[key for batch in loader for key in batch.key] for _ in range(2)]
    assert epochs == [order(0, 0), order(0, 1)]


@settings(max_examples=200)
@given(
    counts=st.lists(st.integers(1, 20), min_size=1, max_size=12),
    window=st.integers(1, 14),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 3),
)
def test_an_order_is_a_permutation_that_holds_few_shards(
    counts: list[int], window: int, seed: int, epoch: int
) -> None:
    order = EpochOrder(tuple(counts), seed, window)
    rows = order.rows(epoch, 0, len(order))
    assert sorted(rows.tolist()) == [*range(sum(counts))]
    cut = len(order) // 3
    parts = [order.rows(epoch, 0, cut), order.rows(epoch, cut, len(order))]
    assert np.concatenate(parts).tolist() == rows.tolist()
    shard_of = np.repeat(np.arange(len(counts)), counts)[rows]
    seen = [np.flatnonzero(shard_of == shard) for shard in range(len(counts))]
    # At each place, shards that have begun and are not over are those of one window.
    held = [sum(s[0] <= at <= s[-1] for s in seen) for at in range(len(rows))]
    assert max(held) <= window


@pytest.mark.parametrize("window", [1, 3, None])
def test_an_epoch_reads_each_shard_once(
    outputs: dict[str, Path], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    plain = ArtifactSource.read

    def counting(source: ArtifactSource, shard: Any) -> pa.Table:
        reads.append(shard.name)
        return plain(source, shard)

    monkeypatch.setattr(ArtifactSource, "read", counting)
    data = pipeline.open(outputs["images"])
    data._reader.max_bytes = 0
    if window is None:
        monkeypatch.setattr("pipeline.samples.WINDOW_BYTES", 2_500_000)
        assert data.hold(None) == 2
    loader = data.to_torch().loader(10, window=window, threads=0)
    for _ in range(3):
        reads.clear()
        assert sum(len(batch.key) for batch in loader) == 300
        assert len(reads) == len(set(reads)) <= 4


def test_every_order_of_few_samples_comes_up() -> None:
    found = Counter(tuple(EpochOrder((2, 1), seed, 2).rows(0, 0, 3)) for seed in range(3000))
    assert len(found) == 6
    assert min(found.values()) > 400


# Going on.


topology = st.tuples(st.integers(1, 4), st.integers(1, 9))


@settings(max_examples=200)
@given(
    samples=st.integers(1, 120),
    stops=st.lists(st.tuples(topology, st.integers(0, 8)), max_size=4),
    last=topology,
)
def test_what_is_left_is_what_was_not_seen(
    samples: int, stops: list[tuple[tuple[int, int], int]], last: tuple[int, int]
) -> None:
    seen: list[int] = []
    position = 0
    for (world, size), taken in [*stops, (last, 10**6)]:
        ranks = [Steps(samples, position, size, rank, world) for rank in range(world)]
        for steps in ranks:
            for step in range(min(taken, len(steps))):
                low, high = steps.span(step)
                assert 0 < high - low <= size
                seen += range(low, high)
        position = ranks[0].reached(taken)
        assert sorted(seen) == [*range(position)]
    assert position == samples


@settings(max_examples=10, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    first=st.tuples(st.integers(1, 3), st.integers(3, 40), st.sampled_from([0, 2])),
    then=st.tuples(st.integers(1, 3), st.integers(3, 40), st.sampled_from([0, 2])),
    stop=st.integers(1, 4),
)
def test_a_training_goes_on_in_another_topology(
    opened: dict[str, TorchSamples[Any]],
    kind: str,
    first: tuple[int, int, int],
    then: tuple[int, int, int],
    stop: int,
) -> None:
    data = opened[kind]
    seen: list[str] = []
    states = []
    world, size, workers = first
    for rank in range(world):
        loader = data.loader(size, num_workers=workers, rank=rank, world=world, seed=1)
        loader.set_epoch(2)
        for number, batch in enumerate(loader, 1):
            seen += batch.key
            if number == stop:
                break
        states.append(loader.state_dict())
    assert all(state == states[0] for state in states)
    state = json.loads(json.dumps(states[0]))  # plain types, wherever they are kept
    if len(seen) == len(data):
        return
    world, size, workers = then
    for rank in range(world):
        loader = data.loader(size, num_workers=workers, rank=rank, world=world, seed=1)
        loader.load_state_dict(state)
        loader.set_epoch(loader.epoch)
        assert loader.epoch == 2
        seen += [key for batch in loader for key in batch.key]
        assert loader.epoch == 3
        assert sum(len(batch.key) for batch in loader) <= len(data) // world + 1
    assert sorted(seen) == sorted(data.keys)


def test_a_state_at_the_end_is_the_next_epochs_beginning(
    opened: dict[str, TorchSamples[Any]],
) -> None:
    data = opened["distilled"]
    for drop_last in (False, True):
        loader = data.loader(8, threads=0, drop_last=drop_last)
        states = [loader.state_dict() for _ in loader]
        assert len(states) == (2 if drop_last else 3)
        again = data.loader(8, threads=0, drop_last=drop_last)
        again.load_state_dict(states[-1])
        assert (again.epoch, len(again)) == (1, len(states))
        assert loader.state_dict() == again.state_dict()


def test_a_state_of_other_data_is_refused(opened: dict[str, TorchSamples[Any]]) -> None:
    state = opened["images"].loader(8).state_dict()
    others = [
        opened["pruned"].loader(8),
        opened["images"].loader(8, seed=1),
        opened["images"].samples.subset(opened["images"].keys[:20]).to_torch().loader(8),
    ]
    for other in others:
        with pytest.raises(UsageError) as caught:
            other.load_state_dict(state)
        assert caught.value.code == "other-loader"


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 2, "world": 2},
        {"batch_size": 0},
        {"window": 0},
        {"threads": -1},
        {"num_workers": 2, "persistent_workers": True},
        {"num_workers": 2, "in_order": False},
    ],
)
def test_what_makes_no_loader_is_refused(
    opened: dict[str, TorchSamples[Any]], options: dict[str, Any]
) -> None:
    with pytest.raises(UsageError) as caught:
        opened["images"].loader(**{"batch_size": 8, **options})
    assert caught.value.code == "bad-loader"
    with pytest.raises(UsageError, match="'raise' or 'skip'"):
        opened["images"].samples.to_torch(on_error="ignore")


# What an opened output is.


def test_an_output_knows_what_it_is(outputs: dict[str, Path]) -> None:
    data = pipeline.open(outputs["images"])
    assert isinstance(data, pipeline.Samples)
    assert (data.kind, len(data), data.classes) == ("images", 300, tuple("0123456789"))
    assert set(data.schema.names) == {"key", "image", "label"}
    stats = data.stats
    assert (stats["samples"], stats["classes"]) == (300, 10)
    assert stats["shards"] == len(data.counts()) == 4
    one = data[-1]
    assert (one["key"], one["label"]) == ("picture-299", 9)
    assert (one["image"].shape, one["image"].dtype) == ((64, 64, 3), np.uint8)
    assert "300 samples of 10 classes" in repr(data)
    with pytest.raises(IndexError):
        data[300]
    kinds = {kind: pipeline.open(outputs[kind]).kind for kind in KINDS}
    assert kinds == {kind: kind for kind in KINDS}


def test_items_are_those_of_the_source(outputs: dict[str, Path]) -> None:
    digits = {sample["key"]: sample for sample in pipeline.open("digits")}
    noisy = {sample["key"]: sample for sample in pipeline.open(outputs["images"])}
    for kind, size, whole in [("images", 64, noisy), ("pruned", 8, digits)]:
        data = pipeline.open(outputs[kind])
        raw, ready = data.to_torch(normalize=False, size=size), data.to_torch(size=size)
        about = data.image or ImageConfig()
        for row in (0, len(data) // 2, len(data) - 1):
            image, label, key = raw[row]
            assert (image.permute(1, 2, 0).numpy() == whole[key]["image"]).all()
            assert int(label) == whole[key]["label"]
            mean, std = (torch.tensor(v).double().view(-1, 1, 1) for v in (about.mean, about.std))
            wanted = (image.double() / 255 - mean) / std
            assert (ready[row].image.double() - wanted).abs().max() < 1e-6


def test_a_transform_is_given_whole_images(tmp_path: Path) -> None:
    from PIL import Image

    for number, size in enumerate([(20, 30), (40, 10)]):
        Image.new("RGB", size, (10, 20, 200)).save(tmp_path / f"{number}.png")
    data = pipeline.open(tmp_path)
    with pytest.raises(UsageError) as caught:
        next(iter(data.to_torch().loader(2)))
    assert caught.value.code == "unlike-images"
    seen = []

    def corner(image: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(image.shape))
        return image[:, :5, :5]

    (batch,) = data.to_torch(transform=corner, normalize=False).loader(2)
    assert sorted(seen) == [(3, 10, 40), (3, 30, 20)]
    assert batch.image.shape == (2, 3, 5, 5)
    assert batch.image[0, :, 0, 0].tolist() == [10, 20, 200]
    assert batch.label.tolist() == [-1, -1]


def test_a_part_is_chosen_by_keys(outputs: dict[str, Path]) -> None:
    for kind in KINDS:
        data = pipeline.open(outputs[kind])
        wanted = data.keys[5:15:2]
        part = data.subset(reversed(wanted)).subset(wanted[1:])
        assert part.keys == wanted[1:]
        rows = [data.keys.index(key) for key in part.keys]
        for mine, row in zip(part.to_torch(), rows, strict=True):
            other = data.to_torch()[row]
            assert mine.key == other.key
            assert torch.equal(mine[0], other[0])
            assert torch.equal(mine[1], other[1])
    with pytest.raises(UsageError, match="such as 'nobody'"):
        data.subset([*wanted, "nobody"])


def test_scores_are_joined_by_key(outputs: dict[str, Path], tmp_path: Path) -> None:
    data = pipeline.open(outputs["images"])
    keys = data.keys
    scores = pa.table({"key": keys[::-2], "hard": np.arange(len(keys[::-2])) / 7})
    joined = data.join(scores)
    assert joined.schema.names == [*data.schema.names, "hard"]
    wanted = dict(zip(scores["key"].to_pylist(), scores["hard"].to_pylist(), strict=True))
    table = joined.to_arrow()
    assert table["hard"].to_pylist() == [wanted.get(key) for key in keys]
    part = joined.subset(keys[3:9])
    assert part[2]["hard"] == wanted.get(part[2]["key"])
    pq.write_table(scores, tmp_path / "scores.parquet")
    assert data.join(tmp_path / "scores.parquet").to_arrow().equals(table)
    for bad in (scores.rename_columns(["name", "hard"]), pa.table({"key": ["x"], "a": [1]})):
        with pytest.raises(UsageError) as caught:
            data.join(bad)
        assert caught.value.code == "bad-scores"
    with pytest.raises(UsageError, match="column 'hard' already"):
        joined.join(scores)


def test_tokens_come_padded_or_ragged(outputs: dict[str, Path]) -> None:
    store = pipeline.open(outputs["tokens"])
    padded, ragged = store.to_torch(), store.to_torch(ragged=True)
    for one, other in zip(padded.loader(32), ragged.loader(32), strict=True):
        assert one.key == other.key
        kept = torch.arange(one.tokens.shape[1]) < one.length[:, None]
        assert torch.equal(one.tokens[kept], other.tokens)
        assert not one.tokens[~kept].any()
        assert len(other.tokens) == int(other.length.sum())
    assert len(ragged[3].tokens) == int(ragged[3].length)
    lengths = {int(item.length) for item in padded}
    assert len(lengths) > 1


def test_features_are_the_latents_of_their_records(outputs: dict[str, Path]) -> None:
    samples = pipeline.open(outputs["features"], split="test")
    encoder, decoder = pipeline.load_codec(str(outputs["features"]))
    batch = next(iter(samples.to_torch().loader(9, shuffle=False)))
    records = samples.table(np.arange(9))["features"].to_pylist()
    assert torch.equal(batch.latents, decoder.latents(records))
    assert torch.equal(decoder.features(batch.latents), decoder.decode(records))
    assert encoder.spec == decoder.spec


def test_models_are_loaded_in_one_line(outputs: dict[str, Path]) -> None:
    images = torch.zeros(2, 1, 16, 16)
    for kind in ("distilled", "features"):
        assert pipeline.load_teacher(outputs[kind])(images).shape == (2, 10)
    assert pipeline.load_tokenizer(outputs["tokenizer"]).form.max_tokens == 4
    for load, code in [
        (pipeline.load_teacher, "no-teacher"),
        (pipeline.load_tokenizer, "no-tokenizer"),
        (pipeline.load_codec, "no-codec"),
    ]:
        with pytest.raises(UsageError) as caught:
            load(str(outputs["images"]))
        assert caught.value.code == code


def test_what_has_no_samples_is_not_opened(outputs: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="holds 'tokenizer'"):
        pipeline.open(outputs["tokenizer"])
    with pytest.raises(UsageError, match="no data set named"):
        pipeline.open(outputs["images"] / "nothing")
    for kind in ("images", "pruned", "distilled"):
        with pytest.raises(UsageError, match="There is: train"):
            pipeline.open(outputs[kind], split="test")


# Other libraries.


def test_samples_go_to_webdataset(outputs: dict[str, Path]) -> None:
    data = pipeline.open(outputs["images"])
    found = list(data.to_webdataset().decode("rgb8").to_tuple("__key__", "png", "cls"))
    assert sorted(key for key, _, _ in found) == sorted(data.keys)
    whole = {sample["key"]: sample for sample in data}
    for key, image, label in found[::100]:
        assert (image == whole[key]["image"]).all()
        assert label == whole[key]["label"]
    loader = DataLoader(data.to_webdataset().to_tuple("__key__"), batch_size=None, num_workers=3)
    assert sorted(key for (key,) in loader) == sorted(data.keys)
    store = pipeline.open(outputs["tokens"])
    sample = next(iter(store.to_webdataset().decode()))
    assert sample["__key__"] == store.keys[0]
    assert (sample["tokens.npy"] == store[0]["tokens"]).all()
    features = pipeline.open(outputs["features"])
    sample = next(iter(features.to_webdataset()))
    assert sample["features"] == features[0]["features"]


@pytest.mark.slow
def test_samples_go_to_ray(outputs: dict[str, Path]) -> None:
    pytest.importorskip("ray.data")
    import ray

    data = pipeline.open(outputs["images"])
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        rows = data.to_ray().take_all()
    finally:
        ray.shutdown()
    assert sorted(row["key"] for row in rows) == sorted(data.keys)
    images = {row["key"]: row["image"] for row in rows}
    assert images["picture-7"] == data.to_arrow()["image"][7].as_py()


def test_samples_go_to_hugging_face(outputs: dict[str, Path]) -> None:
    pytest.importorskip("datasets")
    data = pipeline.open(outputs["images"])
    made = data.to_hf()
    assert made.features["label"].names == list(data.classes)
    assert made[7]["key"] == data.keys[7]
    assert (np.asarray(made[7]["image"]) == data[7]["image"]).all()


# Damage, and files from elsewhere.


def test_a_damaged_shard_is_an_error_or_left_out_and_counted(
    outputs: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(outputs["images"], tmp_path / "out")
    tars = sorted((tmp_path / "out").glob("train-*/*.tar"))
    tars[1].write_bytes(tars[1].read_bytes()[:-2000])
    data = pipeline.open(tmp_path / "out")
    for workers in (0, 2):
        with pytest.raises(RunError) as caught:
            list(data.to_torch().loader(64, num_workers=workers))
        assert caught.value.code == "damaged-artifact"
        loader = data.to_torch(on_error="skip").loader(64, num_workers=workers)
        keys = [key for batch in loader for key in batch.key]
        assert loader.skipped == data.counts()[1]
        assert len(set(keys)) == len(keys) == len(data) - loader.skipped
    tars[0].write_bytes(b"")
    data = pipeline.open(tmp_path / "out")
    skipping = data.to_torch(on_error="skip")
    first = sum(data.counts()[:2])
    loader = skipping.loader(8, shuffle=False)
    assert [key for batch in loader for key in batch.key] == [
        f"picture-{n}" for n in range(first, 300)
    ]
    assert loader.skipped == first
    bad = data.counts()[0]
    with pytest.raises(UsageError, match="cannot be read"):
        skipping[bad]
    assert len(skipping.__getitems__([0, bad, first])) == 1


def test_a_damaged_image_is_an_error_or_left_out_and_counted(tmp_path: Path) -> None:
    from PIL import Image

    for number in range(5):
        Image.new("L", (8, 8), number).save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:45])
    data = pipeline.open(tmp_path)
    for size in (8, None):
        with pytest.raises(RunError) as caught:
            list(data.to_torch(size=size).loader(3))
        assert caught.value.code == "bad-sample"
        loader = data.to_torch(size=size, on_error="skip").loader(3)
        assert sum(len(batch.key) for batch in loader) == 4
        assert loader.skipped == 1


def test_remote_files_are_fetched_once(
    outputs: dict[str, Path], s3: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in LocalStore(outputs["images"]).files():
        if not file.name.startswith(".run"):
            s3.create(file.name, outputs["images"] / file.name)
    fetched: Counter[str] = Counter()
    plain = ObjectStore.fetched

    def counting(store: ObjectStore, names: list[str]) -> Any:
        fetched.update(names)
        return plain(store, names)

    monkeypatch.setattr(ObjectStore, "fetched", counting)
    cache = tmp_path / "cache"
    for _ in range(2):
        data = pipeline.open(s3.url, cache=cache)
        keys = [key for batch in data.to_torch().loader(64) for key in batch.key]
        assert sorted(keys) == sorted(data.keys)
    tars = {name: count for name, count in fetched.items() if name.endswith(".tar")}
    assert set(tars.values()) == {1}
    assert not list(cache.glob("reading-*"))
    assert not list(cache.glob("unfinished-*"))
    # What was kept is checked as well.
    largest = max(cache.iterdir(), key=lambda path: path.stat().st_size)
    largest.write_bytes(b"x" * largest.stat().st_size)
    with pytest.raises(RunError) as caught:
        list(pipeline.open(s3.url, cache=cache).to_torch().loader(64))
    assert caught.value.code in {"damaged-artifact", "damaged-tar"}


def test_a_cache_keeps_to_its_size(s3: ObjectStore, tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / "file").write_bytes(bytes([number]) * 1000)
        s3.create(f"{number}", tmp_path / "file")
    store = CachedStore(s3, tmp_path / "cache", 3000)

    def kept() -> list[int]:
        return sorted(path.read_bytes()[0] for path in (tmp_path / "cache").iterdir())

    for number in (0, 1, 2, 0, 3):
        with store.open(f"{number}") as file:
            assert file.read() == bytes([number]) * 1000
        time.sleep(0.01)
    assert kept() == [0, 2, 3]  # 1 was used longest ago
    s3.replace("3", b"new")
    with store.open("3") as file:
        assert file.read() == b"new"
    with store.fetched(["4"]) as folder:
        for path in (tmp_path / "cache").glob("?" * 64):
            path.unlink()  # as another process may
        assert (folder / "4").read_bytes() == b"\x04" * 1000
    with pytest.raises(FileNotFoundError):
        store.open("nothing")
    # What a process that was killed has left.
    (tmp_path / "cache" / "reading-x").mkdir()
    (tmp_path / "cache" / "unfinished-x").write_bytes(b"x")
    for name in ("reading-x", "unfinished-x"):
        os.utime(tmp_path / "cache" / name, (0, 0))
    with store.open("5"):
        assert not list((tmp_path / "cache").glob("*-x"))


def test_a_fork_does_not_wait_for_what_its_parent_reads(outputs: dict[str, Path]) -> None:
    data = pipeline.open(outputs["images"])
    reader, source = data._reader, data.source
    begun, go_on = threading.Event(), threading.Event()

    class Slow(type(source)):  # type: ignore[misc]
        def read(self, shard: Any) -> pa.Table:
            if threading.current_thread() is not threading.main_thread():
                begun.set()
                go_on.wait(60)
            return super().read(shard)

    reader.source = Slow(source.artifact)
    thread = threading.Thread(target=data.table, args=([0],))
    thread.start()
    begun.wait(60)
    child = multiprocessing.get_context("fork").Process(target=data.table, args=([0],))
    child.start()
    child.join(30)
    go_on.set()
    thread.join()
    assert child.exitcode == 0


# Stopping.


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_leaves_nothing_behind(outputs: dict[str, Path], workers: int) -> None:
    code = f"""
import pipeline
loader = pipeline.open({str(outputs["images"])!r}).to_torch().loader(4, num_workers={workers})
while True:
    for batch in loader:
        print(".", end="", flush=True)
"""
    before = {path.name for path in Path("/dev/shm").iterdir()}
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert child.stdout
    assert child.stdout.read(20) == b"." * 20
    os.killpg(child.pid, signal.SIGINT)
    child.communicate(timeout=30)
    deadline = time.monotonic() + 10
    while _alive(child.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _alive(child.pid)
    mine = {
        name
        for name in {path.name for path in Path("/dev/shm").iterdir()} - before
        if name.startswith("torch_")
    }
    assert not mine


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_spawned_workers_read_as_forked_ones(opened: dict[str, TorchSamples[Any]]) -> None:
    data = opened["pruned"]
    context = multiprocessing.get_context("spawn")
    spawned = data.loader(64, num_workers=1, multiprocessing_context=context)
    forked = data.loader(64, num_workers=1)
    assert [b.key for b in spawned] == [b.key for b in forked]
