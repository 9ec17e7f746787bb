"""Networks by name, and weights that fit them."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from pipeline.backbones import BUILTIN, CifarResNet, build, load_weights
from pipeline.device import reproducible
from pipeline.errors import UsageError
from pipeline.labelled_images import ImageConfig, normalise
from pipeline.storage.npz import open_npz
from pipeline.storage.store import open_store
from pipeline.storage.weights import WeightsFile, read_weights
from pipeline.tensors import to_numpy


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def arrays_of(net: nn.Module) -> dict[str, Any]:
    return {name: value.numpy().copy() for name, value in net.state_dict().items()}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with reproducible(threads=1):
        yield


@pytest.mark.parametrize(
    ("name", "size", "channels"),
    [
        *((name, 4, 1) for name in BUILTIN),
        *((name, size, 3) for name in ("convnet3", "resnet20") for size in (9, 32)),
    ],
)
def test_any_image_gives_a_logit_a_class(name: str, size: int, channels: int) -> None:
    net = build(name, 7, channels).eval()
    x = torch.randn(2, channels, size, size + 1)
    with torch.inference_mode():
        both, alone = net(x), net(x[:1])
    assert both.shape == (2, 7)
    torch.testing.assert_close(both[:1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "count"), [("resnet20", 269_722), ("resnet56", 853_018)])
def test_residual_networks_have_the_published_number_of_parameters(name: str, count: int) -> None:
    assert parameters(build(name, 10, 3)) == count


def test_the_small_network_is_what_it_says() -> None:
    convolutions = 9 * (3 * 32 + 32 * 64 + 64 * 128)
    assert parameters(build("convnet3", 10, 3)) == convolutions + 2 * (32 + 64 + 128) + 1290


def test_names_are_those_of_published_state_dicts() -> None:
    names = set(build("resnet20", 10, 3).state_dict())
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"conv1.weight", "linear.weight", "linear.bias", *(f"bn1.{n}" for n in norm)}
    for stage in (1, 2, 3):
        for block in range(3):
            for part in (1, 2):
                place = f"layer{stage}.{block}"
                expected |= {f"{place}.conv{part}.weight"}
                expected |= {f"{place}.bn{part}.{n}" for n in norm}
    assert names == expected


def test_the_shortcut_subsamples_and_pads_channels_with_zeros() -> None:
    net = CifarResNet(10, 3, 3).eval()
    for index, (stage, before, width) in enumerate(((net.layer2, 16, 32), (net.layer3, 32, 64))):
        block = stage[0]
        block.bn2.weight.data.zero_()
        block.bn2.bias.data.zero_()
        x = torch.randn(2, before, 9, 8, generator=torch.Generator().manual_seed(index))
        expected = torch.zeros(2, width, 5, 4)
        quarter = (width - before) // 2
        expected[:, quarter : quarter + before] = x[:, :, ::2, ::2].clamp(min=0)
        assert torch.equal(block(x), expected)


@pytest.mark.parametrize(
    ("name", "pretrained", "code"),
    [
        ("resnet19", False, "unknown-backbone"),
        ("nobody:resnet18", False, "unknown-backbone"),
        ("", False, "unknown-backbone"),
        ("resnet20", True, "no-weights"),
    ],
)
def test_an_unknown_network_is_a_usage_error(name: str, pretrained: bool, code: str) -> None:
    with pytest.raises(UsageError, match=code):
        build(name, 10, 3, pretrained=pretrained)


@pytest.mark.parametrize("provider", ["torchvision", "timm", "hf"])
def test_a_provider_that_is_not_installed_is_named(
    provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("torchvision", "torchvision.models", "timm", "transformers"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match="missing-provider") as error:
        build(f"{provider}:resnet18", 10, 3)
    assert provider in error.value.hint


def test_weights_go_where_their_names_say() -> None:
    torch.manual_seed(1)
    source, target = build("convnet3", 4, 1), build("convnet3", 4, 1)
    arrays = arrays_of(source)
    load_weights(target, arrays, "here")
    assert all(torch.equal(v, source.state_dict()[n]) for n, v in target.state_dict().items())
    arrays["linear.bias"] += 1
    assert not torch.equal(target.linear.bias, source.linear.bias + 1)
    old = {n: a for n, a in arrays.items() if not n.endswith("num_batches_tracked")}
    load_weights(target, old, "here")
    assert torch.equal(target.linear.bias, source.linear.bias + 1)


def test_weights_that_do_not_fit_are_refused() -> None:
    net = build("convnet3", 4, 1)
    arrays = arrays_of(net)
    missing = {name: array for name, array in arrays.items() if name != "linear.bias"}
    extra = {**arrays, "head.bias": arrays["linear.bias"]}
    shape = {**arrays, "linear.bias": np.zeros(5, np.float32)}
    for wrong, reason in ((missing, "linear.bias"), (extra, "head.bias"), (shape, "linear.bias")):
        with pytest.raises(UsageError, match=reason) as error:
            load_weights(net, wrong, "file.npz")
        assert (error.value.code, error.value.where) == ("weights-mismatch", "file.npz")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_weight_files_round_trip_and_count_by_their_content(tmp_path: Path, suffix: str) -> None:
    arrays = arrays_of(build("convnet3", 4, 1))
    paths = [tmp_path / f"{name}{suffix}" for name in "ab"]
    for path in paths:
        if suffix == ".npz":
            np.savez(path, **arrays)
        else:
            save_file(arrays, path)
    found = read_weights(paths[0])
    assert found.keys() == arrays.keys()
    assert all(np.array_equal(found[name], array) for name, array in arrays.items())
    if suffix == ".safetensors":
        assert WeightsFile(paths[0]).identity == WeightsFile(paths[1]).identity
    raw = bytearray(paths[1].read_bytes())
    raw[len(raw) // 2] ^= 1
    paths[1].write_bytes(raw)
    assert WeightsFile(paths[0]).identity != WeightsFile(paths[1]).identity


class Canary:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("the canary ran",)


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin", "w.npz", "w.safetensors", "none.npz"])
def test_files_that_could_run_code_are_refused(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "w.npz":
        np.savez(tmp_path / name, weight=np.array([Canary()], dtype=object))
    elif name != "none.npz":
        (tmp_path / name).write_bytes(pickle.dumps(Canary()))
    with pytest.raises(UsageError, match="bad-weights"):
        read_weights(tmp_path / name)
    assert "canary" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "file", "least", "rows"),
    [
        ("resnet20", "resnet20-12fca82f.npz", 88, 200),
        ("resnet56", "resnet56-4bfd9763.npz", 90, 60),
    ],
)
def test_published_weights_classify_as_published(
    real_data: Path, name: str, file: str, least: float, rows: int
) -> None:
    net = build(name, 10, 3).eval()
    load_weights(net, read_weights(real_data / "weights" / file), file)
    source = open_npz(open_store(real_data), "cifar10.npz", "test")
    table = source.read(source.shards[0]).slice(0, rows)
    x = normalise(to_numpy(table["image"]), ImageConfig(size=32), torch.device("cpu"))
    with torch.inference_mode():
        hits = net(x).argmax(1).numpy() == to_numpy(table["label"])
    assert 100 * hits.mean() >= least
