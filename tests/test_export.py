"""Exports do what the tokenizer does, and leave nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import pipeline
from pipeline.cli import main
from pipeline.config import build
from pipeline.errors import RunError
from pipeline.recipes.tokenize import CPU, open_tokenizer
from pipeline.stages.tokenize import read_tokenizer
from pipeline.tokenizers import export as exporting
from pipeline.tokenizers.config import LatentConfig
from pipeline.tokenizers.export import export
from pipeline.tokenizers.tokenizer import LatentTokenizer

QUANTIZERS: list[dict[str, Any]] = [
    {"kind": "bsq", "bits": 12},
    {"kind": "bernoulli", "bits": 70},
    {"kind": "fsq", "levels": [8, 5, 5]},
    {"kind": "vq", "vocabulary": 100, "width": 6},
]
SHAPE = {
    "size": 16,
    "tokens": 6,
    "encoder": {"width": 32, "depth": 1},
    "decoder": {"width": 32, "depth": 1},
}


def tokenizer(quantizer: dict[str, Any]) -> LatentTokenizer:
    torch.manual_seed(0)
    made = LatentTokenizer(build(LatentConfig, {**SHAPE, "quantizer": quantizer}))
    for _ in range(20):  # of running statistics
        made(torch.rand(32, 3, 16, 16) * 2 - 1, torch.full((32,), 6))
    return made.eval().requires_grad_(requires_grad=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tokenizer({"kind": "bsq", "bits": 12}).save(folder)
    return folder


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: str(q["kind"]))
def test_a_graph_gives_the_tokens_and_images_of_the_network(
    quantizer: dict[str, Any], tmp_path: Path
) -> None:
    made = tokenizer(quantizer)
    assert export(made, "pt2", tmp_path)["tokens"] == 1
    encode = torch.export.load(tmp_path / "encoder.pt2").module()
    decode = torch.export.load(tmp_path / "decoder.pt2").module()
    for count in (1, 5):  # any number of images
        images = torch.rand(count, 3, 16, 16)
        tokens = made.encode(images).cut(torch.arange(count) % 6 + 1)
        assert torch.equal(encode(images), tokens.values.to(torch.int64))
        seen = decode(tokens.values.to(torch.int64), tokens.lengths)
        torch.testing.assert_close(seen, made.decode(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: str(q["kind"]))
def test_what_the_decoder_makes_of_tokens_is_exported(
    quantizer: dict[str, Any], tmp_path: Path
) -> None:
    made = tokenizer(quantizer)
    export(made, "hf", tmp_path)
    vectors = load_file(tmp_path / "vectors.safetensors")["vectors"]
    tokens = made.encode(torch.rand(3, 3, 16, 16))
    if tokens.form.kind == "ids":
        found = vectors[tokens.values]
    else:
        bit = torch.arange(tokens.form.bits)
        found = vectors[tokens.values.to(torch.int64), bit].sum(2)
    wanted = made.quantizer.vectors(tokens.values)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_onnx_needs_nothing_of_ours(saved: Path, tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    out = tmp_path / "onnx"
    assert main(["export", "tokenizer", str(saved), "--format", "onnx", "--out", str(out)]) == 0
    check = {name: value.numpy() for name, value in load_file(out / "check.safetensors").items()}
    encoder, decoder = (ort.InferenceSession(out / f"{n}.onnx") for n in ("encoder", "decoder"))
    (tokens,) = encoder.run(None, {"images": check["images"][:3]})
    assert np.array_equal(tokens, check["values"][:3])
    (images,) = decoder.run(None, {"tokens": check["values"], "lengths": check["lengths"]})
    np.testing.assert_allclose(images, check["decoded"], atol=1e-4)
    garbage = check["values"].copy()
    behind = np.arange(6) >= check["lengths"][:, None]
    garbage[behind] = 1 - garbage[behind]
    (same,) = decoder.run(None, {"tokens": garbage, "lengths": check["lengths"]})
    assert np.array_equal(same, images)


def test_a_hugging_face_folder_is_a_tokenizer(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    assert main(["export", "tokenizer", str(saved), "--out", str(out)]) == 0
    before, after = (read_tokenizer(open_tokenizer(p).files, CPU) for p in (saved, out))
    assert before.digest == after.digest
    about = json.loads((out / "tokens.json").read_text())
    assert about["digest"] == before.digest
    assert (about["vocabulary"], about["bits"], about["max_tokens"]) == (4096, 12, 6)
    assert sorted(about["special_ids"].values()) == [4096, 4097, 4098, 4099]
    assert json.loads((out / "config.json").read_text())["model_type"] == "image-tokenizer"
    assert json.loads((out / "preprocessor_config.json").read_text())["size"]["height"] == 16
    assert before.digest in (out / "README.md").read_text()


def test_an_export_that_differs_is_refused_and_leaves_nothing(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = exporting._write_hf

    def wrong(*arguments: Any) -> Any:
        encode, decode = write(*arguments)
        return (lambda images: 1 - encode(images)), decode

    monkeypatch.setattr(exporting, "_WRITERS", {"hf": wrong})
    out = tmp_path / "hf"
    assert main(["export", "tokenizer", str(saved), "--out", str(out)]) == RunError.exit_code
    assert "export-differs" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_replaced(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("mine")
    assert main(["export", "tokenizer", str(saved), "--out", str(tmp_path)]) == 2
    assert "out-exists" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    gray = {"kind": "bsq", "bits": 12}
    torch.manual_seed(0)
    config = {**SHAPE, "size": 8, "channels": 1, "quantizer": gray}
    LatentTokenizer(build(LatentConfig, config)).save(folder / "tokenizer")
    config = {"tokenizer": str(folder / "tokenizer"), "views": "10crop"}
    pipeline.run("tokenize", "digits", out=folder / "run", config=config)
    return folder / "run"


def test_tokens_as_llamagen_reads_them(tokens: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert main(["export", "tokens", str(tokens), "--format", "llamagen", "--out", out]) == 0
    store = pipeline.open(tokens)
    assert len(list((tmp_path / "out" / "codes").iterdir())) == len(store) == 1797
    codes = np.load(tmp_path / "out" / "codes" / "7.npy")
    assert (codes.dtype, codes.shape) == (np.int64, (1, 10, 6))
    bits = store.tokens([7], 3).values[0].numpy()
    assert codes[0, 3].tolist() == [int("".join(map(str, row[::-1])), 2) for row in bits]
    label = np.load(tmp_path / "out" / "labels" / "7.npy")
    assert (label.dtype, label.tolist()) == (np.int64, [int(store.labels[7])])


def test_tokens_as_titok_reads_them(tokens: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert main(["export", "tokens", str(tokens), "--format", "titok", "--out", out]) == 0
    lines = (tmp_path / "out" / "pretokenized.jsonl").read_text().splitlines()
    assert len(lines) == 17970
    found = json.loads(lines[73])
    store = pipeline.open(tokens)
    assert found["class_id"] == int(store.labels[7])
    assert len(found["tokens"]) == 6
    assert all(0 <= token < 4096 for token in found["tokens"])


@pytest.mark.parametrize("path", ["tokenizer", "nowhere"])
def test_what_holds_no_tokens_is_refused(tokens: Path, tmp_path: Path, path: str) -> None:
    place = str(tokens.parent / path)
    out = str(tmp_path / "out")
    assert main(["export", "tokens", place, "--format", "titok", "--out", out]) == 2
    assert not (tmp_path / "out").exists()
