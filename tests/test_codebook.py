"""Codebooks: the search for the nearest code, and what of one is used."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import pipeline
from pipeline import backbones
from pipeline.clustering.kmeans import KMeans
from pipeline.codecs import codebook
from pipeline.codecs.codebook import nearest_code, usage
from pipeline.config import build
from pipeline.errors import PipelineError, UsageError
from pipeline.labelled_images import ImageConfig
from pipeline.recipes.codebook import open_codebook
from pipeline.recipes.tokenize import open_tokenizer
from pipeline.stage import ShardContext
from pipeline.stages.decode import Decode
from pipeline.stages.patch_features import NearestCodes, PatchFeatures
from pipeline.stages.tokenize import read_tokenizer
from pipeline.storage.artifact import Artifact
from pipeline.storage.digits import open_digits
from pipeline.storage.store import open_store
from pipeline.tensors import to_numpy
from pipeline.testing import check_tokenizer
from pipeline.testing.stages import check_stage
from pipeline.tokenizers.config import GridConfig
from pipeline.tokenizers.grid import GridTokenizer
from pipeline.tokenizers.quantizers import VQ


@pytest.mark.parametrize(("count", "width"), [(31, 4), (3000, 8), (700, 100)])
def test_the_nearest_code_is_that_of_brute_force(count: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(70, 3, width, generator=generator)
    codes = torch.randn(count, width, generator=generator)
    codes[7] = codes[3]  # of equal ones the first
    vectors[0, 0] = codes[7]
    far = torch.cdist(vectors.double().view(-1, width), codes.double())
    found = nearest_code(vectors, codes)
    assert found.dtype == torch.int64
    assert torch.equal(found, far.argmin(1).view(70, 3))
    assert int(found[0, 0]) == 3
    assert torch.equal(nearest_code(vectors[5:9], codes), found[5:9])


def test_a_device_without_a_search_of_its_own_finds_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vectors, codes = torch.randn(70, 3, 4), torch.randn(31, 4)
    codes[7] = codes[3]
    wanted = nearest_code(vectors, codes)
    whole = codebook._least(vectors.view(-1, 4), codes).view(70, 3)
    assert torch.equal(whole, wanted)
    monkeypatch.setattr("torch.compiler.is_exporting", lambda: True)
    assert torch.equal(nearest_code(vectors, codes), wanted)


def test_no_matrix_of_all_distances_is_made() -> None:
    import resource

    vectors, codes = torch.randn(40_000, 8), torch.randn(20_000, 8)
    nearest_code(vectors[:10], codes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    nearest_code(vectors, codes)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (after - before) * 1024 < 100 * 2**20  # all distances would be 3.2 GB


def test_usage_is_by_its_definition() -> None:
    found = usage([4, 0, 4, 0])
    assert found["used"] == 0.5
    assert math.isclose(found["perplexity"], 2)
    assert usage([0, 0])["used"] == 0
    skewed = usage([98, 1, 1])
    assert skewed["used"] == 1
    entropy = -(0.98 * math.log(0.98) + 0.02 * math.log(0.01))
    assert math.isclose(skewed["perplexity"], math.exp(entropy))


SETTINGS = {"size": 60, "image": {"size": 8}, "features": {"patch": 2}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("codebook")
    pipeline.run("codebook", "digits", out=out, config=SETTINGS)
    return out


def patches() -> np.ndarray:
    """Normalised 2 x 2 patches of the digits at 8 x 8 pixels, (n, 16, 4)."""
    table = pa.concat_tables(open_digits().tables()).select(["key", "image"])
    images = to_numpy(Decode(8, 1)(table, ShardContext("", 0))["image"])[..., 0]
    x = (images.astype(np.float32) / 255 - np.float32(0.305)) / np.float32(0.376)
    return x.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(len(x), 16, 4)


def test_a_codebook_is_what_k_means_finds_in_the_patches(made: Path) -> None:
    (codes,) = open_codebook(str(made)).arrays().values()
    x = patches().reshape(-1, 4)
    assert codes.shape == (60, 4)
    far = np.sqrt(((x[:, None] - codes) ** 2).sum(-1))
    labels = far.argmin(1)
    told = json.loads((made / "manifest.json").read_text())["codes"]
    counts = np.bincount(labels, minlength=60)
    assert told["features"] == len(x) == 1797 * 16
    assert told["places"] == 16
    assert math.isclose(told["used"], (counts > 0).mean())
    assert math.isclose(told["squared_error"], (far.min(1) ** 2).mean() / 4, rel_tol=1e-3)
    means = np.stack([x[labels == code].mean(0) for code in range(60)])
    # An iteration more moves codes by little.
    assert np.abs(means - codes).mean() < 0.02
    flat = KMeans(60, random_state=0).fit(x).inertia_ / x.size
    assert told["squared_error"] < 1.1 * flat


def test_the_report_shows_how_codes_are_used(made: Path) -> None:
    text = (made / "report.html").read_text()
    for heading in ("Use of the codes", "Most and least used codes"):
        assert f"<h2>{heading}</h2>" in text
    assert text.count("<img") == 2


def test_a_run_that_is_done_is_found(made: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        pipeline.run("codebook", "digits", out=made, config=SETTINGS)
    assert "nothing to do" in caplog.text


def test_features_of_a_network_are_those_of_its_last_map(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = backbones.build("convnet3", 10, 1).eval()
    save_file(network.state_dict(), tmp_path / "net.safetensors")
    features = {"network": "convnet3", "weights": str(tmp_path / "net.safetensors"), "pool": 2}
    config = {"size": 30, "image": {"size": 16}, "features": features}
    pipeline.run("codebook", "digits", out=tmp_path / "out", config=config)
    (codes,) = open_codebook(str(tmp_path / "out")).arrays().values()
    assert codes.shape == (30, 128)
    told = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert told["codes"]["places"] == 4
    assert told["config"]["features"]["weights"] == "net.safetensors"


def test_maps_of_convolutions_and_of_transformers() -> None:
    x = torch.randn(3, 1, 16, 16)
    network = backbones.build("convnet3", 10, 1).eval()
    torch.testing.assert_close(backbones.feature_maps(network, x), network.features(x))

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Identity()
            self.head = nn.Linear(16, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = F.pixel_unshuffle(x, 4).flatten(2).transpose(1, 2)
            seen = self.layers(torch.cat([tokens.mean(1, keepdim=True), tokens], 1))
            return self.head(seen[:, 0])

    torch.testing.assert_close(backbones.feature_maps(Patches(), x), F.pixel_unshuffle(x, 4))
    with pytest.raises(UsageError) as caught:
        backbones.feature_maps(nn.Sequential(nn.Flatten(), nn.Linear(256, 2)), x)
    assert caught.value.code == "no-features"


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"size": 100_000, "features": {"patch": 2}}, "too-many-codes"),
        ({"features": {"patch": 3}}, "bad-image-size"),
        ({"features": {"network": "convnet3"}}, "no-weights"),
        ({"features": {"network": "nothing", "weights": "x.npz"}}, "bad-weights"),
        ({"size": 1}, "bad-config"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, config: dict[str, Any], code: str) -> None:
    with pytest.raises(PipelineError) as caught:
        pipeline.run("codebook", "digits", out=tmp_path, config={"image": {"size": 8}, **config})
    assert caught.value.code == code
    assert caught.value.hint


GRID = {
    "preset": "tiny-grid",
    "tokenizer": {"size": 8, "patch": 1, "width": 8, "latent": 16},
    "training": {"train": {"epochs": 1, "batch_size": 64}},
    "predictor": {"epochs": 2},
    "measured": 100,
}


def test_a_tokenizer_takes_the_codes_and_leaves_them_as_they_are(
    made: Path, tmp_path: Path
) -> None:
    config = {**GRID, "codebook": str(made)}
    pipeline.run("train-tokenizer", "digits", out=tmp_path / "a", config=config)
    tokenizer = read_tokenizer(open_tokenizer(tmp_path / "a").files, torch.device("cpu"))
    assert tokenizer.form.vocabulary == 60
    assert isinstance(tokenizer, GridTokenizer)
    quantizer = tokenizer.quantizer
    assert isinstance(quantizer, VQ)
    (codes,) = open_codebook(str(made)).arrays().values()
    wanted = (codes - codes.mean(0)) / codes.std(0, ddof=1)
    np.testing.assert_allclose(quantizer.frozen.numpy(), wanted, atol=1e-4)
    # A file with the same codes is as good.
    save_file({"codes": torch.from_numpy(codes)}, tmp_path / "codes.safetensors")
    config = {**GRID, "codebook": str(tmp_path / "codes.safetensors")}
    pipeline.run("train-tokenizer", "digits", out=tmp_path / "b", config=config)
    again = read_tokenizer(open_tokenizer(tmp_path / "b").files, torch.device("cpu"))
    assert again.digest == tokenizer.digest


def test_what_is_no_codebook_is_refused(made: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "two.npz", a=np.zeros((4, 2)), b=np.zeros((4, 2)))
    for config, code in [
        ({**GRID, "codebook": str(tmp_path)}, "no-codebook"),
        ({**GRID, "codebook": str(tmp_path / "two.npz")}, "no-codebook"),
        ({**GRID, "preset": "tiny", "tokenizer": {}, "codebook": str(made)}, "no-use"),
    ]:
        with pytest.raises(UsageError) as caught:
            pipeline.run("train-tokenizer", "digits", out=tmp_path / "out", config=config)
        assert caught.value.code == code


def test_a_grid_keeps_what_tokenizers_promise() -> None:
    torch.manual_seed(0)
    config = build(GridConfig, {"size": 16, "channels": 1, "width": 8, "latent": 16})
    tokenizer = GridTokenizer(config)
    images = torch.randint(256, (24, 1, 16, 16), dtype=torch.uint8)
    for _ in range(20):
        tokenizer(images / 127.5 - 1, torch.full((24,), 16))
    check_tokenizer(tokenizer.eval(), images)
    with pytest.raises(UsageError, match="32 x 32"):
        tokenizer.encode(torch.rand(1, 1, 32, 32))


def test_stages_of_codebooks_are_stages(made: Path) -> None:
    table = pa.concat_tables(open_digits().tables()).select(["key", "image"]).slice(0, 9)
    table = Decode(8, 1)(table, ShardContext("", 0))
    image = ImageConfig(size=8, channels=1, mean=(0.305,), std=(0.376,))
    found = check_stage(PatchFeatures(None, image, 2), table, ShardContext("0", 0))
    np.testing.assert_allclose(to_numpy(found["features"]), patches()[:9], atol=1e-6)
    artifact = Artifact.open(open_store(made)).product("codebook")
    check_stage(NearestCodes(artifact), found, ShardContext("0", 0))
