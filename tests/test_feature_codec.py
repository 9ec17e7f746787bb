"""Feature codecs: shapes, what is trained, the bytes of records, and the stores they are in."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import zarr
from torch import nn

import pipeline
from pipeline import backbones
from pipeline.backbones import ModelSpec
from pipeline.codecs.bitstream import BitstreamError, compress, webdataset_handler
from pipeline.codecs.choose_model import choose_model
from pipeline.codecs.entropy import StaticModel
from pipeline.codecs.feature_codec import (
    Bottleneck,
    FeatureCodecConfig,
    FeatureDecoder,
    FeatureEncoder,
    decoder,
    plan,
    quantized,
)
from pipeline.codecs.hidden_tree import HiddenTree
from pipeline.codecs.zarr_codec import BitstreamCodec
from pipeline.errors import PipelineError, RunError, UsageError
from pipeline.recipes.compress_features import load_codec
from pipeline.stage import ShardContext
from pipeline.stages.feature_codec import EncodeFeatures
from pipeline.stages.recompress import Recompress, file_of
from pipeline.storage.artifact import Artifact, ArtifactSource
from pipeline.storage.models import ModelFiles
from pipeline.storage.store import open_store
from pipeline.tensors import tensor_column, to_numpy

SMALL: dict[str, Any] = {
    "teacher": {"train": {"epochs": 8}},
    "mimic": {"epochs": 4},
    "tail": {"epochs": 3},
    "baselines": ["webp:0", "int8", "channels:2"],
}


def run(out: Path, **options: Any) -> Artifact:
    config = {**SMALL, **options.pop("config", {})}
    pipeline.run("compress-features", "digits", out=out, config=config, **options)
    return Artifact.open(open_store(out))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return run(tmp_path_factory.mktemp("features"))


def parts(made: Artifact) -> tuple[FeatureEncoder, FeatureDecoder, Bottleneck]:
    files = ModelFiles.fitted(made.product("codec")).read()
    return *load_codec(str(made.store)), Bottleneck.load(*files)


def table_of(made: Artifact, role: str) -> pa.Table:
    return pa.concat_tables(ArtifactSource(made.product(role)).tables())


def pictures() -> np.ndarray:
    from sklearn.datasets import load_digits

    pixels = np.rint(load_digits().images[:200] * 255 / 16).astype(np.uint8)
    return pixels.repeat(2, 1).repeat(2, 2)


@pytest.mark.parametrize(
    ("name", "size"), [("convnet3", 16), ("resnet20", 32), ("resnet18", 64), ("resnet50-3x3", 32)]
)
def test_stages_are_the_network(name: str, size: int) -> None:
    torch.manual_seed(0)
    network = backbones.build(name, 7, 3).eval()
    x = torch.randn(2, 3, size, size)
    stages = backbones.in_stages(network)
    with torch.inference_mode():
        torch.testing.assert_close(nn.Sequential(*stages.values())(x), network(x))
    assert list(stages)[-1] == "head"


def test_a_network_of_another_family_is_refused() -> None:
    with pytest.raises(UsageError, match="no stages that are known"):
        backbones.in_stages(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))


def test_shapes_and_sizes_are_those_that_were_published() -> None:
    network = backbones.build("resnet50", 1000, 3)
    image = ModelSpec("", 1000, 3, (0.5,) * 3, (0.5,) * 3)
    spec = plan(network, FeatureCodecConfig(split="layer1", channels=24), image, 224)
    assert spec.latents == (24, 55, 55)
    assert spec.features == (256, 56, 56)
    whole = Bottleneck(spec)
    assert sum(p.numel() for p in whole.encoder.parameters()) == 138_672
    assert sum(p.numel() for p in whole.prior.parameters()) == 24 * 58
    with torch.inference_mode():
        latents = whole.encoder(torch.zeros(1, 3, 224, 224))
        assert latents.shape[1:] == spec.latents
        assert whole.decoder(latents).shape[1:] == spec.features


@pytest.mark.parametrize("split", ["stem", "layer1", "layer2", "layer3"])
def test_larger_features_are_made_from_the_same_latents(split: str) -> None:
    network = backbones.build("resnet20", 10, 3)
    image = ModelSpec("", 10, 3, (0.5,) * 3, (0.5,) * 3)
    spec = plan(network, FeatureCodecConfig(split=split, channels=8), image, 32)
    assert spec.latents == (8, 7, 7)
    assert decoder(spec)(torch.zeros(1, *spec.latents)).shape[1:] == spec.features


def test_what_is_trained_is_better_at_each_stage(made: Artifact) -> None:
    about = made.manifest
    accuracy = about["accuracy"]
    assert accuracy["teacher"] > 90
    assert accuracy["tail"] > accuracy["mimic"] + 2
    assert accuracy["tail"] > 75
    assert about["bytes"]["mean"] < 60
    kinds = {row["kind"]: row for row in about["entropy"]}
    assert kinds["channel"]["sample"] <= kinds["prior"]["sample"]
    assert set(kinds) == {"prior", "channel", "position", "tree"}


def test_fewer_channels_in_eight_bits_are_a_codec_of_their_own(made: Artifact) -> None:
    (found,) = (row for row in made.manifest["baselines"] if row["name"] == "channels:2")
    (tail,) = Path(str(made.store)).glob("channels-2-tail-*")
    (codec,) = set(Path(str(made.store)).glob("channels-2-*")) - {tail}
    files = ModelFiles.fitted(Artifact.open(open_store(codec))).read()
    network = Bottleneck.load(*files)
    _, height, width = network.spec.latents
    assert set(found["bytes"].values()) == {2 * height * width + 8}
    assert found["accuracy"] > max(50, found["mimic"])
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        exact, stored = network.encoder(x), network(x)
    for one, kept in zip(exact, stored, strict=True):
        assert len(kept.unique()) <= 256
        assert kept.min() == one.min()
        step = (one.max() - one.min()) / 255
        assert (kept - one).abs().max() <= step / 2 + 1e-6


def test_decoded_records_are_what_the_network_makes_of_rounded_latents(made: Artifact) -> None:
    encoder, features, whole = parts(made)
    images = torch.from_numpy(pictures()[:, None] / 255).float()
    records, dropped = encoder.encode(images)
    latents = encoder.latents(images)
    assert dropped == [0] * len(images)
    assert torch.equal(features.latents(records), latents.round())
    with torch.inference_mode():
        wanted = whole.decoder(latents.round())
    torch.testing.assert_close(features.decode(records), wanted, rtol=0, atol=1e-6)


def test_bytes_are_the_cross_entropy_under_the_tables(made: Artifact) -> None:
    encoder, _, _ = parts(made)
    images = torch.from_numpy(pictures()[:, None] / 255).float()
    symbols = quantized(encoder.latents(images).numpy())
    ideal = encoder.model.bits(symbols.reshape(len(symbols), -1)) / 8
    whole = compress(symbols, encoder.model, group=len(symbols))
    assert ideal <= len(whole) <= 1.001 * ideal + 60
    records, _ = encoder.encode(images)
    assert sum(map(len, records)) <= ideal + 8 * len(images)


def test_a_record_depends_on_its_image_alone(made: Artifact) -> None:
    files = ModelFiles.fitted(made.product("codec"))
    stage = EncodeFeatures(files, made.product("entropy"))
    images = tensor_column(pictures()[:, :, :, None])
    whole = pa.table({"key": [f"{n}" for n in range(200)], "image": images})

    def records(table: pa.Table) -> list[bytes]:
        return stage(table, ShardContext("s", 0, Path()))["features"].to_pylist()

    together = records(whole)
    assert records(whole.slice(17, 5)) == together[17:22]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert records(whole) == together
    torch.set_num_threads(threads)


def test_stores_hold_every_image_once_and_say_what_they_are(made: Artifact) -> None:
    assert made.manifest["kind"] == "features"
    keys = [key for role in ("train", "test") for key in table_of(made, role)["key"].to_pylist()]
    assert len(keys) == len(set(keys)) == 1797
    encoder, features, _ = parts(made)
    assert made.manifest["codec"]["model"] == encoder.model.digest
    table = table_of(made, "test")
    found = features.latents(table["features"].to_pylist())
    assert found.shape == (len(table), *encoder.spec.latents)


def test_a_damaged_record_is_found_out_and_leaves_the_others(made: Artifact) -> None:
    _, features, _ = parts(made)
    records = table_of(made, "test")["features"].to_pylist()[:5]
    records[3] = records[3][:-1] + bytes([records[3][-1] ^ 1])
    with pytest.raises(BitstreamError, match="record 3"):
        features.latents(records)
    assert len(features.latents(records[:3] + records[4:])) == 4
    other = StaticModel.counted(
        np.random.default_rng(0).integers(-3, 3, (50, *features.spec.latents))
    )
    with pytest.raises(BitstreamError):
        FeatureDecoder(features.spec, features.network, other).latents(records[:1])


@pytest.mark.parametrize("kind", ["static", "tree"])
def test_a_budget_is_kept_by_dropping_what_is_least_unusual(made: Artifact, kind: str) -> None:
    encoder, features, _ = parts(made)
    draw = torch.Generator().manual_seed(0)
    noise = torch.rand(50, 1, 16, 16, generator=draw)
    images = torch.cat([torch.from_numpy(pictures()[:150, None] / 255).float(), noise])
    if kind == "tree":
        model = HiddenTree.fit(quantized(encoder.latents(images).numpy()), states=3, epochs=2)
        encoder = FeatureEncoder(encoder.spec, encoder.network, model)
        features = FeatureDecoder(encoder.spec, features.network, model)
    free, _ = encoder.encode(images)
    sizes = np.array(list(map(len, free)))
    assert kind == "tree" or sizes[150:].mean() > sizes[:150].mean()
    budget = int(np.median(sizes))
    records, dropped = encoder.encode(images, budget)
    assert max(map(len, records)) <= budget
    symbols, typical = features.latents(free).flatten(1), torch.from_numpy(encoder.model.typical())
    found = features.latents(records).flatten(1)
    for n in range(200):
        assert (dropped[n] == 0) == (sizes[n] <= budget)
        lost = found[n] != symbols[n]
        assert int(lost.sum()) == dropped[n]
        assert torch.equal(found[n][lost], typical[lost].float())
        far = (symbols[n] - typical).abs()
        if dropped[n]:
            kept = far[~lost & (far > 0)]
            assert not len(kept) or far[lost].max() <= kept.min()
            assert len(records[n]) >= budget - 3
    with pytest.raises(UsageError, match="does not hold a typical image"):
        encoder.encode(images, 2)


def test_the_store_is_the_same_on_ray(made: Artifact, tmp_path: Path) -> None:
    out = tmp_path / "ray"
    shutil.copytree(str(made.store), out)
    for step in [*out.glob("*-features-*"), *out.glob("answers-*")]:
        shutil.rmtree(step)
    again = run(out, executor="ray", workers=2)
    for role in ("train", "test"):
        files = {name: entry.sha256 for name, entry in again.product(role).files.items()}
        assert files == {n: e.sha256 for n, e in made.product(role).files.items()}


def test_another_tail_reads_the_same_bytes(made: Artifact, tmp_path: Path) -> None:
    config = {"encoder": str(made.store), "tail": {"epochs": 1}}
    second = run(tmp_path / "tail", config=config)
    first = ModelFiles.fitted(made.product("codec"))
    assert ModelFiles.fitted(second.product("codec")).read() == first.read()
    for role in ("train", "test"):
        assert table_of(second, role)["features"] == table_of(made, role)["features"]
    assert second.manifest["config"]["encoder"] == Path(str(made.store)).name
    assert second.manifest["accuracy"]["tail"] != made.manifest["accuracy"]["tail"]


def test_a_zarr_store_is_read_by_zarr_alone(made: Artifact, tmp_path: Path) -> None:
    stored = run(tmp_path / "zarr", config={"format": "zarr"})
    _, features, _ = parts(made)
    wanted = features.latents(table_of(made, "test")["features"].to_pylist()).numpy()
    folder = Path(str(stored.product("test").store)) / "data.zarr"
    group = zarr.open(folder, mode="r")
    assert (group["latents"][:] == wanted).all()
    assert (group["latents"][3:9] == wanted[3:9]).all()
    assert stored.manifest["accuracy"] == made.manifest["accuracy"]
    about = json.loads((folder / "latents" / "zarr.json").read_text())
    assert "vision_pipeline.bitstream" in json.dumps(about["codecs"])


def test_an_array_says_what_it_was_coded_with(tmp_path: Path) -> None:
    x = np.random.default_rng(0).poisson(1.0, (300, 2, 3)).astype(np.int16)
    codec = BitstreamCodec.of(StaticModel.counted(x))
    array = zarr.create_array(
        tmp_path / "a", data=x, chunks=(100, 2, 3), serializer=codec, compressors=None
    )
    assert (zarr.open(tmp_path / "a")[:] == x).all()
    again = BitstreamCodec.from_dict(codec.to_dict())
    assert again.entropy.digest == codec.digest
    stored = sum(f.stat().st_size for f in (tmp_path / "a" / "c").rglob("*") if f.is_file())
    assert stored < 0.2 * x.nbytes
    about = codec.to_dict()
    about["configuration"] = {**about["configuration"], "digest": "0" * 64}
    with pytest.raises(RunError, match="not those that it was written with"):
        BitstreamCodec.from_dict(about)
    about["configuration"] = {**about["configuration"], "version": 9}
    with pytest.raises(RunError, match="version 9"):
        BitstreamCodec.from_dict(about)
    damaged = BitstreamCodec(codec.digest, codec.model[:40])
    with pytest.raises(RunError, match="damaged"):
        _ = damaged.entropy
    chunk = tmp_path / "a" / "c" / "1" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-3])
    with pytest.raises(BitstreamError):
        array[150]
    assert (array[50] == x[50]).all()


@pytest.mark.parametrize(
    ("shape", "chunks", "dtype"),
    [
        ((10, 2, 4), (5, 2, 4), "int16"),
        ((10, 2, 3), (5, 2, 2), "int16"),
        ((10, 2, 3), (5, 2, 3), "float32"),
    ],
)
def test_arrays_that_do_not_fit_a_codec_are_refused(tmp_path, shape, chunks, dtype) -> None:
    codec = BitstreamCodec.of(StaticModel.counted(np.zeros((4, 2, 3), np.int64)))
    with pytest.raises(UsageError, match="codes integers of samples"):
        zarr.create_array(tmp_path / "a", shape=shape, chunks=chunks, dtype=dtype, serializer=codec)


def test_webdataset_decodes_members(tmp_path: Path) -> None:
    import io
    import tarfile

    import webdataset

    x = np.random.default_rng(0).integers(0, 3, (4, 2, 3)).astype(np.uint8)
    model = StaticModel.counted(x)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for n in range(4):
            data = compress(x[n : n + 1], model)
            member = tarfile.TarInfo(f"{n}.vpbs")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    read = webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)
    found = [sample["vpbs"] for sample in read.decode(webdataset_handler(model))]
    assert (np.concatenate(found) == x).all()


def test_the_model_with_the_fewest_bytes_is_chosen() -> None:
    draw = np.random.default_rng(0)
    alike = np.repeat(draw.integers(0, 9, (3000, 1, 1)), 30, 2)
    tree, found = choose_model(alike, 10**7)
    assert isinstance(tree, HiddenTree)
    few, _ = choose_model(alike, 10)
    assert isinstance(few, StaticModel)
    assert {one.kind for one in found} == {"channel", "position", "tree"}
    ramp = np.rint(draw.normal(np.linspace(0, 60, 30), 1, (2000, 1, 30))).astype(np.int64)
    places, _ = choose_model(ramp, 2000)
    assert isinstance(places, StaticModel)
    assert len(places.tables) == 30
    noise = draw.integers(0, 9, (2000, 2, 30))
    channels, _ = choose_model(noise, 2000)
    assert isinstance(channels, StaticModel)
    assert len(channels.tables) == 2


@pytest.mark.parametrize("codec", ["jpeg", "webp", "avif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_recompressed_images_are_those_of_their_files(codec: Any, channels: int) -> None:
    draw = np.random.default_rng(0)
    smooth = np.cumsum(draw.integers(-9, 10, (6, 32, 32, channels)), 1).clip(-100, 100) + 128
    table = pa.table({"image": tensor_column(smooth.astype(np.uint8))})
    found = {q: Recompress(codec, q)(table, ShardContext("s", 0, Path())) for q in (5, 80)}
    errors = {q: np.abs(to_numpy(t["image"]) - smooth).mean() for q, t in found.items()}
    assert errors[80] < errors[5]
    for quality, seen in found.items():
        sizes = [len(file_of(image, codec, quality)) for image in to_numpy(table["image"])]
        assert seen["bytes"].to_pylist() == sizes
        assert all(0 < p < b for p, b in zip(seen["payload"].to_pylist(), sizes, strict=True))
    assert sum(found[5]["bytes"].to_pylist()) < sum(found[80]["bytes"].to_pylist())


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"codec": {"split": "layer9"}}, "no-stage"),
        ({"codec": {"strides": [8, 4]}}, "bad-split"),
        ({"baselines": ["gif:3"]}, "bad-baseline"),
        ({"baselines": ["jpeg:best"]}, "bad-baseline"),
        ({"baselines": ["channels:0"]}, "bad-baseline"),
        ({"encoder": "nowhere"}, "no-codec"),
        ({"budget": 2}, "small-budget"),
    ],
)
def test_what_cannot_be_done_is_said(
    made: Artifact, tmp_path: Path, config: Any, code: str
) -> None:
    with pytest.raises(PipelineError) as caught:
        run(tmp_path / "bad", config=config)
    assert caught.value.code in {code, "stage-failed"}
    assert code == caught.value.code or code in str(caught.value)


@pytest.mark.slow
def test_more_weight_on_bits_makes_fewer_bytes_and_lower_accuracy(tmp_path: Path) -> None:
    found = []
    for beta in (0.1, 1.0, 4.0, 12.0):
        config = {"beta": beta, "mimic": {"epochs": 20}, "tail": {"epochs": 5}}
        found.append(run(tmp_path / str(beta), config=config).manifest)
    sizes = [about["bytes"]["mean"] for about in found]
    hits = [about["accuracy"]["tail"] for about in found]
    assert all(a > b for a, b in pairwise(sizes))
    assert all(a > b - 1.5 for a, b in pairwise(hits))
    gains = [about["accuracy"]["tail"] - about["accuracy"]["mimic"] for about in found]
    assert gains[0] >= 0  # with so many bits nothing may be left to gain
    assert min(gains[1:]) > 0
    assert gains[-1] > 2
