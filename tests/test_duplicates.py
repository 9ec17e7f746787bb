"""Duplicates: planted ones are found, others are let alone, and blocks are of no consequence."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from samples import local_run

from pipeline.clustering.sharded_kmeans import ShardedKMeans
from pipeline.pruning.duplicates import exact_duplicates, near_duplicates
from pipeline.pruning.perceptual_hash import perceptual_hashes, thumbnail
from pipeline.pruning.semantic_duplicates import (
    Similarities,
    earlier_similarity,
    estimate_recall,
    order_of,
)
from pipeline.stage import ShardContext
from pipeline.stages.assign import Assign
from pipeline.stages.fingerprint import Fingerprint, Sizes
from pipeline.stages.pairwise import Pairwise
from pipeline.storage.array_artifact import read_arrays
from pipeline.storage.cluster_source import ClusterSource, cluster_ranges, count_members
from pipeline.storage.parquet import ParquetFormat
from pipeline.storage.source import Shard, TableSource
from pipeline.tensors import tensor_column, to_numpy
from pipeline.testing import check_stage


def keys_of(count: int) -> pa.Array:
    return pa.array([f"{n:05d}" for n in range(count)])


# Exact.


def test_of_samples_with_one_digest_the_first_by_key_stays() -> None:
    digests = pa.array([b"x", b"y", b"x", b"z", b"x"], pa.binary(1))
    keys = pa.array(["e", "d", "b", "c", "a"])
    assert exact_duplicates(digests, keys).tolist() == [4, -1, 4, -1, -1]
    assert exact_duplicates(digests[:0], keys[:0]).tolist() == []


@given(values=st.lists(st.integers(0, 5), min_size=1, max_size=30), seed=st.integers(0, 99))
def test_one_of_each_group_stays_in_whatever_order_they_come(values: list[int], seed: int) -> None:
    def kept(rows: Any) -> set[str]:
        digests = pa.array([bytes([values[row]]) for row in rows], pa.binary(1))
        keys = pa.array([f"{row:02d}" for row in rows])
        of = exact_duplicates(digests, keys)
        return {key for key, other in zip(keys.to_pylist(), of, strict=True) if other < 0}

    rows = np.arange(len(values))
    assert len(kept(rows)) == len(set(values))
    assert kept(rows) == kept(np.random.default_rng(seed).permutation(rows))


# Near.


def distances(hashes: Any) -> Any:
    bits = np.unpackbits(np.asarray(hashes, "<u8").view(np.uint8).reshape(-1, 8), axis=1)
    return (bits[:, None] != bits).sum(2)


def flipped(hashes: Any, seed: int, most: int) -> Any:
    """Hashes of which a few bits are others."""
    rng, made = np.random.default_rng(seed), hashes.copy()
    for row in range(len(made)):
        for bit in rng.choice(64, rng.integers(0, most + 1), replace=False):
            made[row] ^= np.uint64(1) << np.uint64(bit)
    return made


@settings(max_examples=30)
@given(bits=st.integers(0, 9), seed=st.integers(0, 999), jobs=st.integers(1, 2))
def test_near_hashes_are_those_that_comparing_all_finds(bits: int, seed: int, jobs: int) -> None:
    rng = np.random.default_rng(seed)
    own = rng.integers(0, 2**63, 40, dtype=np.uint64) * np.uint64(2)
    hashes = np.concatenate([own, flipped(own, seed, 12)])
    keys = pa.array([f"{n:02d}" for n in rng.permutation(len(hashes))])
    of, apart = near_duplicates(hashes, keys, bits, n_jobs=jobs)
    every, names = distances(hashes), np.array(keys.to_pylist())
    for row in range(len(hashes)):
        earlier = [o for o in range(len(hashes)) if names[o] < names[row] and every[row, o] <= bits]
        if not earlier:
            assert (of[row], apart[row]) == (-1, -1)
            continue
        best = min(earlier, key=lambda o: (every[row, o], names[o]))
        assert (of[row], apart[row]) == (best, every[row, best])


def scene(seed: int, size: int = 96) -> Image.Image:
    """A picture with large and small shapes, as photographs have."""
    rng = np.random.default_rng(seed)
    noise = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((size, size))
    fine = Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8))
    return Image.blend(noise, fine.filter(ImageFilter.GaussianBlur(2)), 0.3)


def jpeg(picture: Image.Image, quality: int = 92) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def moved(picture: Image.Image) -> Image.Image:
    """By one pixel, with the border repeated."""
    pixels = np.asarray(picture)
    return Image.fromarray(np.concatenate([pixels[:, :1], pixels[:, :-1]], 1))


CHANGES = {
    "copy": png,
    "re-encoded": lambda picture: jpeg(picture, 75),
    "moved": lambda picture: png(moved(picture)),
    "mirrored": lambda picture: png(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    "gray": lambda picture: png(picture.convert("L")),
}


def planted(pictures: list[Image.Image], change: str) -> pa.Table:
    """All pictures, and after them every fourth one changed."""
    files = [png(picture) for picture in pictures]
    files += [CHANGES[change](picture) for picture in pictures[::4]]
    return pa.table({"key": keys_of(len(files)), "image": pa.array(files, pa.binary())})


def found_near(table: pa.Table, bits: int = 4) -> Any:
    prints = check_stage(Fingerprint(), table, ShardContext("s", 0))
    of, _ = near_duplicates(
        to_numpy(prints["hash"]),
        prints["key"].combine_chunks(),
        bits,
        mirrored=to_numpy(prints["mirrored"]),
        told=to_numpy(prints["told"]),
    )
    return of


@pytest.mark.parametrize("change", CHANGES)
def test_planted_duplicates_are_found_and_nothing_else(change: str) -> None:
    pictures = [scene(seed) for seed in range(80)]
    of = found_near(planted(pictures, change))
    assert (of[:80] == -1).all()
    found = of[80:] == np.arange(0, 80, 4)
    assert found.mean() >= 0.95
    assert ((of[80:] == -1) | found).all()


@pytest.mark.parametrize("change", CHANGES)
def test_planted_duplicates_are_found_among_photographs(real_data: Path, change: str) -> None:
    place = real_data / "imagenette" / "train-00000-of-00001.parquet"
    images = pq.read_table(place, columns=["image"])["image"].to_pylist()[::4]
    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in images]
    of = found_near(planted(pictures, change))
    count = len(pictures)
    # What is not planted stays, but for a pair that ImageNet itself may hold twice.
    assert (of[:count] == -1).mean() > 0.99
    assert (of[count:] == np.arange(0, count, 4)).mean() > 0.9


def test_pictures_of_one_colour_are_no_near_duplicates_of_one_another() -> None:
    rng = np.random.default_rng(0)
    files = []
    for level in (10, 60, 120, 200):
        pixels = np.full((40, 40, 3), level) + rng.integers(-1, 2, (40, 40, 3))
        files.append(png(Image.fromarray(pixels.astype(np.uint8))))
    table = pa.table({"key": keys_of(4), "image": pa.array(files, pa.binary())})
    assert found_near(table, bits=16).tolist() == [-1] * 4


def test_the_hash_of_the_mirror_image_is_that_of_its_mirror() -> None:
    small = np.stack([thumbnail(np.asarray(scene(seed))) for seed in range(20)])
    plain, mirrored, told = perceptual_hashes(small)
    again, _, _ = perceptual_hashes(small[:, :, ::-1])
    assert (np.diag(distances(np.concatenate([mirrored, again]))[:20, 20:]) <= 2).all()
    assert told.all()
    assert len(set(plain.tolist())) == 20


def test_fingerprints_see_pixels_and_not_files() -> None:
    picture = scene(3)
    gray = picture.convert("L")
    files = [png(picture), jpeg(picture), png(gray), png(gray.convert("RGB")), b"no image"]
    table = pa.table(
        {"key": keys_of(5), "image": pa.array(files, pa.binary()), "label": [0, 1, 2, 3, 4]}
    )
    context = ShardContext("s", 0)
    prints = check_stage(Fingerprint(), table, context)
    assert prints["key"].to_pylist() == ["00000", "00001", "00002", "00003"]
    assert prints["bytes"].to_pylist() == [len(data) for data in files[:4]]
    one, other, *same = prints["pixels"].to_pylist()
    assert len({one, other, *same}) == 3
    assert same[0] == same[1]
    assert [bad["reason"] for bad in context.bad] == ["decode-error"]


def test_sizes_are_those_of_files_or_of_pixels() -> None:
    files = pa.table({"key": ["a", "b"], "image": pa.array([b"12", b"123"], pa.binary())})
    made = check_stage(Sizes(), files, ShardContext("s", 0))
    assert made.to_pydict() == {"key": ["a", "b"], "bytes": [2, 3]}
    pixels = tensor_column(np.zeros((2, 4, 5, 3), np.uint8))
    tensors = pa.table({"key": ["a", "b"], "image": pixels, "label": [1, 0]})
    made = check_stage(Sizes(), tensors, ShardContext("s", 0))
    assert made["bytes"].to_pylist() == [60, 60]


# Semantic.


def features(count: int, columns: int = 16, seed: int = 0) -> Any:
    """Directions in clouds; the last fifth are others with a little noise."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(8, columns))
    x = centres[rng.integers(8, size=count)] + 0.6 * rng.normal(size=(count, columns))
    copies = count // 5
    noise = rng.normal(size=(copies, columns)) * rng.choice([0, 0.003, 0.05], (copies, 1))
    x[-copies:] = x[:copies] * rng.uniform(0.5, 2, (copies, 1)) + noise
    return x.astype(np.float32)


def all_pairs(x: Any) -> Any:
    """In float64: the largest cosine of each row with an earlier one."""
    unit = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    products = np.tril(unit @ unit.T, -1) + np.triu(np.full((len(x), len(x)), -2.0))
    return products.max(1)


@settings(max_examples=20)
@given(count=st.integers(1, 120), block=st.integers(1, 50), seed=st.integers(0, 99))
def test_blocks_find_what_all_pairs_find(count: int, block: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(count, 5)).astype(np.float32)
    x[count // 2 :] = x[: count - count // 2]  # equal rows
    values, of = earlier_similarity(x, block)
    wanted = all_pairs(x)
    np.testing.assert_allclose(values[1:], wanted[1:], atol=1e-6)
    assert (values[0], of[0]) == (-1, -1)
    assert (of[1:] < np.arange(1, count)).all()
    equal = np.array([(x[:row] == x[row]).all(1).any() for row in range(count)])
    assert (values[equal] == 1).all()


@pytest.fixture(scope="module")
def clustered(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Features in four shards, centroids, and what assigning gives."""
    x = features(600)
    keys = [f"{n:04d}" for n in np.random.default_rng(1).permutation(600)]
    parts = []
    for start in range(0, 600, 150):
        rows = slice(start, start + 150)
        table = pa.table({"key": keys[rows], "feature": tensor_column(x[rows])})
        parts.append((f"{start:05d}", table))
    run = local_run(tmp_path_factory.mktemp("semantic"))
    source = Tensors(tuple(parts))
    centroids = run.rounds("centroids", ShardedKMeans(6, spherical=True), source, "feature")
    assigned = run.map("assigned", source, [Assign(centroids)], to=ParquetFormat())
    return run, x, keys, centroids, assigned


class Tensors(TableSource):
    """Tables with tensors, which have no place in JSON."""

    @property
    def shards(self) -> Any:  # type: ignore[override]
        return [Shard(name, name, len(table)) for name, table in self.parts]


def test_samples_know_their_two_nearest_centroids(clustered: Any) -> None:
    _, x, _, centroids, assigned = clustered
    table = pa.concat_tables(assigned.tables())
    c = read_arrays(centroids)["centroids"].astype(np.float64)
    cosine = (x @ c.T) / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(c, axis=1)
    order = np.argsort(-cosine, 1)
    assert (to_numpy(table["cluster"]) == order[:, 0]).mean() > 0.999
    assert (to_numpy(table["second"]) == order[:, 1]).mean() > 0.999
    np.testing.assert_allclose(to_numpy(table["distance"]), 1 - cosine.max(1), atol=1e-6)
    bare = next(assigned.tables()).select(["key", "feature"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.stages.assign._PRODUCTS", 7 * 6)
        again = check_stage(Assign(centroids), bare, ShardContext("s", 0))
    assert again["cluster"].to_pylist() == table["cluster"].to_pylist()[:150]


def test_every_sample_is_a_member_of_two_clusters(clustered: Any) -> None:
    _, _, keys, _, assigned = clustered
    members = count_members(assigned.tables(), 6)
    assert members.sum() == 1200
    ranges = cluster_ranges(members, 400)
    source = ClusterSource(assigned, ranges)
    assert [first for first, _ in ranges] == [0, *(end for _, end in ranges[:-1])]
    samples: list[str] = []
    for shard, (first, end) in zip(source.shards, ranges, strict=True):
        table = source.lean().read(shard)
        groups = to_numpy(table["group"])
        assert (np.diff(groups) >= 0).all()
        assert set(groups.tolist()) <= set(range(first, end))
        assert len(table) == members[first:end].sum()
        assert len(table) <= 400 or end == first + 1
        samples += table["sample"].to_pylist()
    assert sorted(samples) == sorted(keys * 2)


@pytest.mark.parametrize("rows", [1, 10, 25, 1000])
def test_ranges_hold_all_clusters_once(rows: int) -> None:
    members = np.array([0, 9, 3, 30, 0, 4, 4, 0])
    ranges = cluster_ranges(members, rows)
    covered = [cluster for first, end in ranges for cluster in range(first, end)]
    # Clusters without members need no shard.
    assert covered == list(range(len(covered)))
    assert set(np.flatnonzero(members).tolist()) <= set(covered)
    for first, end in ranges:
        assert members[first:end].sum() <= rows or np.count_nonzero(members[first:end]) == 1


def similarities(clustered: Any) -> Similarities:
    _, _, _, _, assigned = clustered
    source = ClusterSource(assigned, cluster_ranges(count_members(assigned.tables(), 6), 300))
    tables = [
        check_stage(Pairwise(16), source.read(shard), ShardContext("s", 0))
        for shard in source.shards
    ]
    return Similarities.merge(tables)


def truth(clustered: Any) -> tuple[Any, Any]:
    """Keys in the order of the whole set, and by comparing all pairs, the largest cosine."""
    _, x, keys, _, assigned = clustered
    table = pa.concat_tables(assigned.tables())
    order = order_of(to_numpy(table["distance"]), table["key"].combine_chunks())
    return [keys[row] for row in order], all_pairs(x[order])


@pytest.mark.parametrize("epsilon", [1e-4, 0.01, 0.05])
def test_clusters_find_almost_all_that_comparing_all_finds_and_nothing_else(
    clustered: Any, epsilon: float
) -> None:
    found = similarities(clustered)
    assert len(found.keys) == 600
    keys, wanted = truth(clustered)
    removed = set(found.keys.filter(pa.array(found.removed(epsilon))).to_pylist())
    true = {key for key, value in zip(keys, wanted, strict=True) if value > 1 - epsilon}
    assert removed <= true
    assert len(removed) >= 0.98 * len(true) > 30
    recall = estimate_recall(found, epsilon, clustered[4].tables, samples=600)
    assert (recall.duplicates, recall.found) == (len(true), len(removed))
    some = estimate_recall(found, epsilon, clustered[4].tables, samples=200, seed=3)
    assert some.samples == 200
    assert some.found <= some.duplicates <= len(true)


def test_more_is_removed_the_larger_epsilon_is_and_nothing_at_zero(clustered: Any) -> None:
    found = similarities(clustered)
    counts = [int(found.removed(epsilon).sum()) for epsilon in (0, 1e-6, 1e-3, 0.01, 0.1, 1, 2)]
    assert counts[0] == 0
    assert counts[1] > 0
    assert counts == sorted(counts)
    # All but the very first sample have an earlier one.
    assert counts[-1] <= 599


def test_of_a_group_of_equal_samples_the_first_stays(clustered: Any) -> None:
    _, x, keys, _, _ = clustered
    found = similarities(clustered)
    kept = set(found.keys.filter(pa.array(~found.removed(1e-5))).to_pylist())
    unit = np.round(x / np.linalg.norm(x, axis=1, keepdims=True), 4)
    groups: dict[bytes, list[str]] = {}
    for key, row in zip(keys, unit, strict=True):
        groups.setdefault(row.tobytes(), []).append(key)
    several = [group for group in groups.values() if len(group) > 1]
    assert len(several) > 20
    assert all(sum(key in kept for key in group) == 1 for group in several)


def test_what_a_duplicate_is_one_of_comes_before_it(clustered: Any) -> None:
    found = similarities(clustered)
    keys, _ = truth(clustered)
    place = {key: number for number, key in enumerate(keys)}
    for key, of in zip(found.keys.to_pylist(), found.of.to_pylist(), strict=True):
        assert of is None or place[of] < place[key]
