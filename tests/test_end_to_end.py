"""The distillation of the digits: same bytes everywhere, found again, opened in one line."""

import hashlib
import json
import logging
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from conftest import TINY
from faults import output
from torch.utils.data import DataLoader

import pipeline
from pipeline.dataset_distill.config import SqueezeConfig
from pipeline.dataset_distill.squeeze import Squeeze
from pipeline.labelled_images import ImageConfig
from pipeline.orchestration.checkpoint import Checkpoint
from pipeline.orchestration.training import train
from pipeline.storage.npz import open_npz
from pipeline.storage.store import LocalStore
from pipeline.storage.weights import WeightsFile
from pipeline.testing.trees import tree_digest


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    out = tmp_path_factory.mktemp("local")
    summary = pipeline.run("distill", "digits", out=out, config={**TINY, "ipc": 2})
    return out, summary


@pytest.mark.parametrize("workers", [1, 2])
def test_ray_writes_the_bytes_that_local_writes(local, tmp_path, workers):
    pipeline.run(
        "distill",
        "digits",
        out=tmp_path,
        config={**TINY, "ipc": 2},
        executor="ray",
        workers=workers,
    )
    assert tree_digest(tmp_path) == tree_digest(local[0])


def test_workers_write_to_an_object_store_the_bytes_that_a_folder_gets(s3, tmp_path):
    pipeline.run("convert", "digits", out=tmp_path)
    pipeline.run("convert", "digits", out=s3.url, executor="ray", workers=2)
    found = {name: hashlib.sha256(data).hexdigest() for name, data in output(s3).items()}
    assert found == tree_digest(tmp_path)


def test_a_finished_run_is_found_and_left_alone(local, caplog):
    out, summary = local
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if ".run" not in p.parts}
    with caplog.at_level(logging.INFO):
        again = pipeline.run("distill", "digits", out=out, config={**TINY, "ipc": 2})
    after = {p: p.stat().st_mtime_ns for p in out.rglob("*") if ".run" not in p.parts}
    assert after == before
    assert again == summary
    assert "nothing to do" in caplog.text


def test_a_report_that_was_deleted_comes_back(local):
    report = local[0] / "report.html"
    before = report.read_bytes()
    report.unlink()
    pipeline.run("distill", "digits", out=local[0], config={**TINY, "ipc": 2})
    assert report.read_bytes() == before


def test_another_seed_gives_other_images(local, tmp_path):
    pipeline.run("distill", "digits", out=tmp_path, config={**TINY, "ipc": 2}, seed=1)
    old, new = (
        [d for p, d in sorted(tree_digest(root).items()) if p.endswith(".tar")]
        for root in (local[0], tmp_path)
    )
    assert len(old) == len(new) == 4
    assert not set(old) & set(new)


def test_manifest_leads_to_products_that_others_can_read(local):
    out, summary = local
    manifest = json.loads((out / "manifest.json").read_bytes())
    images = out / manifest["products"]["images"]
    names = []
    for shard in pq.read_table(images / "shards.index").to_pylist():
        with tarfile.open(images / shard["files"][0]["path"]) as tar:
            names += tar.getnames()
    assert len(names) == 3 * 20  # a PNG, a label and a JSON member for each of 20 images
    labels = out / manifest["products"]["labels"]
    group = zarr.open_group(labels / "data.zarr", mode="r")
    assert group["logits"].shape == (20, 3, 10)
    assert group["logits"].dtype == np.float16
    evaluation = out / manifest["products"]["evaluation"]
    rows = pq.read_table(evaluation / "evaluation.parquet").to_pylist()
    assert [row["arm"] for row in rows] == [
        "distilled-soft",
        "random-real-soft",
        "noise-soft",
        "teacher",
    ]
    assert rows == summary["evaluation"]
    html = (out / "report.html").read_text()
    assert html.count("data:image/png;base64,") >= 10


def test_every_step_accounts_for_its_samples(local):
    for path in local[0].glob("*/manifest.json"):
        manifest = json.loads(path.read_bytes())
        if manifest["kind"] == "table":
            counts = manifest["counts"]
            left_out = sum(counts["filtered"].values()) + sum(counts["quarantined"].values())
            assert counts["in"] == counts["out"] + left_out
            index = pq.read_table(path.parent / "shards.index")
            assert len(index) == manifest["shards"]
            assert counts["out"] == sum(index["rows"].to_pylist())


def test_open_gives_a_torch_dataset_of_the_stored_views(local):
    data = pipeline.open(local[0]).to_torch()
    assert len(data) == 20
    images, logits, keys = next(iter(DataLoader(data, batch_size=8)))
    assert images.shape == (8, 1, 16, 16)
    assert logits.shape == (8, 10)
    assert list(keys) == data.keys[:8]
    first = torch.stack([data[i][0] for i in range(20)])
    data.set_epoch(1)
    second = torch.stack([data[i][0] for i in range(20)])
    assert not torch.equal(first, second)
    data.set_epoch(3)  # three views are stored: epoch 3 shows view 0 again
    assert torch.equal(torch.stack([data[i][0] for i in range(20)]), first)
    with pytest.raises(IndexError):
        data[20]


def test_a_product_whose_manifest_was_changed_is_not_opened(local, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(local[0], out)
    manifest = next(out.glob("labels-*")) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"labels"', '"labelz"'))
    with pytest.raises(pipeline.RunError, match="missing or damaged"):
        pipeline.open(out)


def test_a_step_is_opened_as_what_it_is(local, tmp_path):
    images = pipeline.open(next(local[0].glob("images-*")))
    assert (images.kind, len(images), images[0]["image"].shape) == ("images", 20, (16, 16, 1))
    with pytest.raises(pipeline.UsageError, match="holds 'models'"):
        pipeline.open(next(local[0].glob("teacher-*")))
    with pytest.raises(pipeline.UsageError) as caught:
        pipeline.open(tmp_path)
    assert caught.value.code == "unknown-form"


def test_cifar10_teacher_scores_its_published_accuracy(real_data, tmp_path):
    source = open_npz(LocalStore(real_data), "cifar10.npz", "test")
    weights = WeightsFile(real_data / "weights" / "resnet20-12fca82f.npz")
    config = SqueezeConfig(backbone="resnet20", weights=weights.name)
    task = Squeeze(config, ImageConfig(size=32), 10, weights)
    test = pa.concat_tables(source.tables())
    result = train(task, {"test": test}, 0, Checkpoint(LocalStore(tmp_path), "checkpoint"))
    assert result.metrics == {"accuracy": 91.73, "images": 10000}


@pytest.mark.slow
def test_digits_beat_random_digits_with_class_labels(tmp_path):
    summary = pipeline.run("distill", "digits", out=tmp_path)
    rows = {row["arm"]: row for row in summary["evaluation"]}
    ours, theirs = rows["distilled-soft"], rows["random-real-hard"]
    assert ours["accuracy"] - theirs["accuracy"] > max(ours["spread"], theirs["spread"])
