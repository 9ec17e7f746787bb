"""The recipes ``train-tokenizer`` and ``tokenize``: from images to a store of tokens and back."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import pipeline
import pipeline.api
from pipeline.config import merge
from pipeline.errors import PipelineError, RunError, UsageError
from pipeline.recipes.tokenize import open_tokenizer
from pipeline.stage import ShardContext
from pipeline.stages.tokenize import Tokenize, read_tokenizer, views_of
from pipeline.storage.digits import open_digits
from pipeline.storage.store import LocalStore
from pipeline.tensors import tensor_column, to_numpy
from pipeline.testing.trees import tree_digest
from pipeline.token_samples import TokenSamples
from pipeline.tokenizers.lengths import LengthRule
from pipeline.tokenizers.tokenizer import Tokenizer

CPU = torch.device("cpu")
SMALL = {
    "tokenizer": {
        "size": 8,
        "patch": 2,
        "tokens": 8,
        "encoder": {"width": 32, "depth": 1, "heads": 2},
        "decoder": {"width": 32, "depth": 1, "heads": 2},
        "quantizer": {"kind": "bsq", "bits": 5},
    },
    "training": {"train": {"epochs": 4, "batch_size": 64, "lr": 2e-3, "evaluations": 2}},
    "predictor": {"epochs": 10},
    "measured": 300,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    pipeline.run("train-tokenizer", "digits", out=out, config=SMALL)
    return out


@pytest.fixture(scope="module")
def tokenizer(trained: Path) -> Tokenizer:
    return read_tokenizer(open_tokenizer(trained).files, CPU)


def tokenized(trained: Path, out: Path, **config: Any) -> TokenSamples:
    pipeline.run("tokenize", "digits", out=out, config={"tokenizer": str(trained), **config})
    found = pipeline.open(out)
    assert isinstance(found, TokenSamples)
    return found


def digits() -> torch.Tensor:
    images = pa.concat_tables(open_digits().tables())["image"]
    return torch.from_numpy(to_numpy(images).copy()).permute(0, 3, 1, 2)


@pytest.mark.slow
def test_two_workers_of_ray_train_what_one_would(trained: Path, tmp_path: Path) -> None:
    shared = merge(SMALL, {"training": {"train": {"workers": 2}}})
    how = {"executor": "ray", "workers": 2}
    pipeline.run("train-tokenizer", "digits", out=tmp_path, config=shared, **how)
    alone, both = (
        json.loads((out / "manifest.json").read_text())["psnr"]["8"] for out in (trained, tmp_path)
    )
    assert abs(alone - both) < 0.3


def test_every_image_has_its_tokens_once(
    trained: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    store = tokenized(trained, tmp_path)
    assert len(store) == len(set(store.keys)) == 1797
    tokens = tokenizer.encode(digits())
    assert torch.equal(store.tokens(range(1797)).values, tokens.values)
    values, length, label, key = store.to_torch()[5]
    assert key == store.keys[5]
    assert torch.equal(values, tokens.values[5])
    assert (length, label) == (8, int(store.labels[5]))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["splits"]["train"] == {
        "samples": 1797,
        "tokens": 8 * 1797,
        "token_bytes": 5 * 1797,
    }
    store.check(tokenizer)


def test_a_zarr_reader_needs_nothing_of_ours(
    trained: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    import zarr

    tokenized(trained, tmp_path, tokens=3)
    product = json.loads((tmp_path / "manifest.json").read_text())["products"]["train"]
    group = zarr.open_group(tmp_path / product / "data.zarr", mode="r")
    packed, lengths = np.asarray(group["tokens"]), np.asarray(group["length"])
    assert packed.shape == (1797, 1, 5)
    assert set(lengths[:, 0].tolist()) == {3}
    bits = np.unpackbits(packed[:, 0], axis=1, bitorder="little")[:, :15].reshape(-1, 3, 5)
    assert np.array_equal(bits, tokenizer.encode(digits()).bits[:, :3].numpy())


def test_the_webdataset_library_reads_the_tokens(
    trained: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    webdataset = pytest.importorskip("webdataset")
    store = tokenized(trained, tmp_path, tokens=3, format="webdataset")
    product = json.loads((tmp_path / "manifest.json").read_text())["products"]["train"]
    urls = sorted(map(str, (tmp_path / product).glob("*.tar")))
    read = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode()
    found = list(read.to_tuple("tokens.npy", "length.npy", "cls"))
    packed, lengths, labels = (np.stack(column) for column in zip(*found, strict=True))
    bits = np.unpackbits(packed[:, 0], axis=1, bitorder="little")[:, :15].reshape(-1, 3, 5)
    wanted = tokenizer.encode(digits())
    assert np.array_equal(bits, wanted.bits[:, :3].numpy())
    assert lengths.tolist() == [[3]] * 1797
    assert labels.tolist() == store.labels.tolist()
    assert torch.equal(store.tokens(range(1797)).values[:, :3], wanted.values[:, :3])


def test_ray_and_other_shards_write_the_same_bytes(trained: Path, tmp_path: Path) -> None:
    config = {"tokenizer": str(trained), "mean_bytes": 3.5, "errors": "measured"}
    for workers in (1, 2):
        how = {"executor": "ray", "workers": workers} if workers > 1 else {}
        pipeline.run("tokenize", "digits", out=tmp_path / str(workers), config=config, **how)
    assert tree_digest(tmp_path / "1") == tree_digest(tmp_path / "2")


def test_tokens_do_not_depend_on_who_else_is_in_the_shard(trained: Path) -> None:
    files = open_tokenizer(trained).files
    stage = Tokenize(files, LengthRule("lagrangian", 1e-3, (1, 2, 4, 8)), "center", 8)
    images = digits()[:150].permute(0, 2, 3, 1).contiguous().numpy()

    def rows(of: np.ndarray) -> list[tuple[list[int], int]]:
        keys = pa.array([str(n) for n in range(len(of))])
        table = stage(pa.table({"key": keys, "image": tensor_column(of)}), ShardContext("0", 0))
        packed, length = to_numpy(table["tokens"])[:, 0], to_numpy(table["length"])[:, 0]
        return list(zip(packed.tolist(), length.tolist(), strict=True))

    whole = rows(images)
    assert whole[40:53] == rows(images[40:53])
    assert whole[149:] == rows(images[149:])


def test_a_mean_of_bytes_is_kept_and_beats_one_length(
    trained: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    images = digits().float() / 255
    found = {}
    for name, config in {
        "fixed": {"tokens": 4},
        "measured": {"mean_bytes": 4.0, "errors": "measured"},
        "predicted": {"mean_bytes": 4.0},
    }.items():
        store = tokenized(trained, tmp_path / name, **config)
        size = np.mean([store.form.bytes_of(k) + 1 for k in store.lengths[:, 0].tolist()])
        assert size <= 4.02
        decoded = tokenizer.decode(store.tokens(range(1797)))
        found[name] = float((decoded - images).square().mean())
    assert found["measured"] < found["predicted"] < found["fixed"]


def test_a_least_quality_is_reached_with_as_few_tokens_as_do(
    trained: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    store = tokenized(trained, tmp_path, min_psnr=11.0)
    images, most = digits().float() / 255, 10**-1.1
    tokens = store.tokens(range(1797))

    def errors(of: Any) -> torch.Tensor:
        return (tokenizer.decode(of) - images).square().flatten(1).mean(1)

    reached = errors(tokens) <= most
    full = tokenizer.encode(digits())
    every = torch.stack([errors(full.cut(k)) for k in (1, 2, 3, 4, 5, 6, 7, 8)])
    assert torch.equal(reached, (every <= most).any(0))
    shorter = every[(tokens.lengths - 2).clamp_min(0), torch.arange(1797)]
    assert not bool(((shorter <= most) & (tokens.lengths > 1)).any())


def test_ten_crops_are_corners_the_middle_and_their_mirror_images(
    trained: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    images = torch.arange(81.0).view(1, 1, 9, 9)
    views = views_of(images, "10crop", 8)
    assert [int(view[0, 0, 0]) for view in views[:5]] == [0, 1, 9, 10, 0]
    assert torch.equal(views[5:], views[:5].flip(3))
    store = tokenized(trained, tmp_path, views="10crop")
    assert store.views == 10
    assert len(store) == 1797
    data = store.to_torch()
    first = data[0].tokens
    data.set_epoch(7)
    assert torch.equal(data[0].tokens, store.tokens([0], 7).values[0])
    assert not torch.equal(data[0].tokens, first)


def test_a_run_is_found_again(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenized(trained, tmp_path, mean_bytes=4.0)
    with caplog.at_level(logging.INFO):
        tokenized(trained, tmp_path, mean_bytes=4.0)
    assert "nothing to do" in caplog.text


def test_tokens_of_another_tokenizer_are_refused(trained: Path, tmp_path: Path) -> None:
    store = tokenized(trained, tmp_path / "tokens")
    config = {**SMALL, "training": {"train": {"epochs": 1, "batch_size": 64}}}
    pipeline.run("train-tokenizer", "digits", out=tmp_path / "other", config=config)
    other = read_tokenizer(open_tokenizer(tmp_path / "other").files, CPU)
    with pytest.raises(UsageError) as caught:
        store.check(other)
    assert caught.value.code == "other-tokenizer"


def test_a_cut_store_is_refused(trained: Path, tmp_path: Path) -> None:
    tokenized(trained, tmp_path)
    product = json.loads((tmp_path / "manifest.json").read_text())["products"]["train"]
    chunk = next(p for p in (tmp_path / product).rglob("tokens/c/**/*") if p.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-10])
    with pytest.raises(RunError) as caught:
        pipeline.open(tmp_path)
    assert caught.value.code == "damaged-artifact"


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({}, "no-tokenizer"),
        ({"tokenizer": "nowhere"}, "no-tokenizer"),
        ({"tokens": 9}, "too-many-tokens"),
        ({"tokens": 3, "mean_bytes": 3.0}, "bad-config"),
        ({"mean_bytes": 1.0}, "budget-too-small"),
        ({"size": 1}, "bad-image-size"),
        ({"size": 9}, "bad-image-size"),
    ],
)
def test_what_cannot_be_is_refused(
    trained: Path, tmp_path: Path, config: dict[str, Any], code: str
) -> None:
    given = {"tokenizer": str(trained)} if "tokenizer" not in config and config else {}
    with pytest.raises(PipelineError) as caught:
        pipeline.run("tokenize", "digits", out=tmp_path, config={**given, **config})
    assert caught.value.code == code
    assert caught.value.hint


def test_a_folder_with_two_files_is_a_tokenizer(
    trained: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path / "saved")
    opened = open_tokenizer(tmp_path / "saved")
    assert read_tokenizer(opened.files, CPU).digest == tokenizer.digest
    with pytest.raises(UsageError) as caught:
        tokenized(tmp_path / "saved", tmp_path / "out", mean_bytes=4.0, errors="predicted")
    assert caught.value.code == "no-predictor"
    a = tokenized(tmp_path / "saved", tmp_path / "out", mean_bytes=4.0)
    b = tokenized(trained, tmp_path / "same", mean_bytes=4.0, errors="measured")
    assert a.tokenizer == b.tokenizer
    assert torch.equal(a.lengths, b.lengths)
    assert LocalStore(tmp_path / "saved").info("config.json")


def test_a_training_set_that_does_not_fit_in_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: 4096 if "SIZE" in name else 20)
    with pytest.raises(UsageError, match="To train a tokenizer") as caught:
        pipeline.run("train-tokenizer", "digits", out=tmp_path, config=SMALL)
    assert caught.value.code == "small-memory"


def test_the_report_shows_what_tokens_are_worth(trained: Path) -> None:
    text = (trained / "report.html").read_text()
    for heading in ("Reconstructions", "Quality against bytes", "What the bits are worth"):
        assert f"<h2>{heading}</h2>" in text
    rows = json.loads((trained / "manifest.json").read_text())["lengths"]
    by = {(row["tokens"], row["chooser"]): row for row in rows}
    for tokens in (3, 4):
        fixed, best = by[tokens, "fixed"], by[tokens, "lagrangian"]
        assert best["psnr_of_mean"] > fixed["psnr_of_mean"]
        assert best["bytes"] <= fixed["bytes"] + 0.1
        assert by[tokens, "threshold"]["psnr_5"] > fixed["psnr_5"]


def test_a_plan_ends_where_it_depends_on_what_is_trained(trained: Path, tmp_path: Path) -> None:
    found = pipeline.api.plan("train-tokenizer", "digits", out=tmp_path / "a", config=SMALL)
    assert (found["until"], found["todo"]) == ("tokenizer", True)
    config = {"tokenizer": str(trained), "tokens": 3}
    found = pipeline.api.plan("tokenize", "digits", out=tmp_path / "b", config=config)
    assert [step["step"] for step in found["steps"]] == ["train-tokens", "tables"]
    assert not (tmp_path / "b").exists()


def test_tokens_are_coded_where_that_takes_less_and_read_back_the_same(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The digits are too few for tables to pay.
    monkeypatch.setattr("pipeline.recipes.tokenize._pays", lambda *_: True)
    stores = {how: tokenized(trained, tmp_path / how, entropy=how) for how in ("auto", "none")}
    assert stores["auto"].keys == stores["none"].keys
    assert torch.equal(stores["auto"].lengths, stores["none"].lengths)
    rows = list(range(len(stores["auto"])))
    assert torch.equal(stores["auto"].tokens(rows).values, stores["none"].tokens(rows).values)
    for how in stores:
        folder = next((tmp_path / how).glob("train-[0-9a-f]*")) / "data.zarr" / "tokens"
        about = (folder / "zarr.json").read_text()
        assert ("vision_pipeline.bitstream" in about) == (how == "auto")


def test_tokens_of_which_none_is_likelier_are_left_to_zstd() -> None:
    from pipeline.recipes.tokenize import CountTokens

    draw = np.random.default_rng(0)
    noise = draw.integers(0, 256, (400, 1, 12)).astype(np.uint8)
    few = draw.choice(4, (4000, 1, 12), p=[0.7, 0.1, 0.1, 0.1]).astype(np.uint8)
    for values, coded in ((noise, False), (few, True)):
        table = pa.table({"tokens": tensor_column(values)})
        source: Any = SimpleNamespace(tables=lambda table=table: [table])
        assert bool(CountTokens(source).compute(0, 1)) == coded


def test_a_tokenizer_of_gray_levels_refuses_colours(
    trained: Path, real_data: Path, tmp_path: Path
) -> None:
    config = {"tokenizer": str(trained)}
    with pytest.raises(UsageError, match="knows gray levels alone, and cifar10 has colours"):
        pipeline.run("tokenize", "cifar10", data=real_data, out=tmp_path, config=config)
