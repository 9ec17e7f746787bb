"""Weights as low-rank codes: sizes, errors, files, and a network that still knows its classes."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from torch import nn

import pipeline
import pipeline.api
from pipeline import backbones
from pipeline.cli import main
from pipeline.codecs import coded_model
from pipeline.codecs.coded_model import (
    CodedWeight,
    LowRankWeight,
    code_arrays,
    codes_of,
    from_arrays,
    gather,
    layer_table,
    pack,
    rebuild,
    size_of,
    spread,
    to_arrays,
    to_codes,
    to_low_rank,
    unpack,
)
from pipeline.codecs.low_rank_vq import (
    CodeConfig,
    CodedLayer,
    Curve,
    Directions,
    choose_widths,
    cluster,
    error_curves,
    estimate,
    largest_divisor,
    plan_layers,
    sub_vectors,
    usable_codes,
)
from pipeline.config import build
from pipeline.errors import PipelineError, RunError, UsageError
from pipeline.recipes.compress_model import PRESETS

RNG = np.random.default_rng(0)
LAYER = CodedLayer("x", (128, 64, 3, 3), 18, 64, 6)
ABOUT = {"model": {"backbone": "convnet3", "classes": 10, "channels": 1}}


def decaying(n: int, m: int, power: float) -> np.ndarray:
    """Vectors (n, m) whose spectrum falls as i^-power, in turned directions."""
    turn = np.linalg.qr(RNG.normal(size=(m, m)))[0]
    return (RNG.normal(size=(n, m)) * np.arange(1, m + 1) ** -power @ turn).astype(np.float32)


def test_bits_are_those_of_the_formula() -> None:
    assert LAYER.vectors == 4096
    assert LAYER.bits == {"codes": 24_576, "codebook": 6_144, "basis": 1_728}
    assert replace(LAYER, d=18).bits == {"codes": 24_576, "codebook": 18_432, "basis": 0}
    assert replace(LAYER, k=100).code_bits == 7
    assert LAYER.ratio == 128 * 64 * 9 * 32 / (24_576 + 6_144 + 1_728)


@pytest.mark.parametrize(
    ("preset", "published"),
    [
        ("resnet18-29x", 1.54),
        ("resnet18-43x", 1.03),
        ("resnet50-19x", 5.09),
        ("resnet50-31x", 3.19),
    ],
)
def test_presets_take_the_published_bytes(preset: Any, published: float) -> None:
    # MiB of product quantization, which is d = m, with statistics of BatchNorm not counted.
    with torch.device("meta"):
        network = backbones.build(preset.partition("-")[0], 1000, 3)
    network.to_empty(device="cpu").apply(lambda m: [p.data.zero_() for p in m.parameters()])
    layers, left = plan_layers(network, build(CodeConfig, PRESETS[preset]["code"]))
    assert [(one.name, one.why) for one in left] == [("conv1", "first")]
    coded = {f"{layer.name}.weight" for layer in layers}
    rest = sum(4 * p.numel() for n, p in network.named_parameters() if n not in coded)
    total = rest + sum(sum(layer.bits.values()) for layer in layers) / 8
    assert abs(total / 2**20 - published) < 0.01
    narrow = [replace(layer, d=max(1, layer.m // 3)) for layer in layers]
    assert sum(sum(layer.bits.values()) for layer in narrow) / 8 + rest < total


def test_the_two_errors_go_opposite_ways_and_end_where_they_have_to() -> None:
    layer = CodedLayer("x", (40, 4, 5, 9), 18, 16, 18)
    (curve,) = error_curves({"x": decaying(400, 18, 1.0)}, [layer], 0)
    low, clustering = np.array(curve.low_rank), np.array(curve.clustering)
    assert len(low) == len(clustering) == 18
    assert (np.diff(low) < 0).all()
    assert abs(low[-1]) < 1e-9
    assert (np.diff(clustering) > -0.02).all()
    assert clustering[0] < 0.2 * clustering[-1]


def test_errors_are_those_of_their_definition_in_float64() -> None:
    x = decaying(300, 6, 1.0)
    layer = CodedLayer("x", (50, 36), 6, 8, 6)
    (curve,) = error_curves({"x": x}, [layer], 0)
    energy = (x.astype(np.float64) ** 2).sum()
    basis = np.linalg.svd(x.astype(np.float64), full_matrices=False)[2].T
    for d in (1, 3, 5):
        rest = x - x @ basis[:, :d] @ basis[:, :d].T
        assert np.isclose(curve.low_rank[d - 1], (rest**2).sum() / energy, rtol=1e-4)
        inside = (x @ Directions.of(x).basis[:, :d]).astype(np.float32)
        made = cluster([inside], [8], 0)
        far = ((inside - made.codebooks[0][made.codes[0]]) ** 2).sum()
        assert np.isclose(curve.clustering[d - 1], far / energy, rtol=1e-4)


@pytest.mark.parametrize(
    ("power", "sums", "least", "most"),
    [
        (0.0, {6: 0.716, 9: 0.649, 12: 0.603, 18: 0.549}, 13, 18),
        (1.0, {6: 0.408, 9: 0.391, 12: 0.386, 18: 0.383}, 6, 9),
        (2.0, {9: 0.142, 12: 0.141, 18: 0.141}, 2, 6),
    ],
)
def test_the_estimate_is_low_where_the_spectrum_falls_and_high_where_it_does_not(
    power: float, sums: dict[int, float], least: int, most: int
) -> None:
    # Sums of the two errors of 8,000 vectors with 256 codes, as others measured them.
    layer = CodedLayer("x", (800, 180), 18, 256, 18)
    (curve,) = error_curves({"x": decaying(8000, 18, power / 2)}, [layer], 0)
    for d, wanted in sums.items():
        assert abs(curve.low_rank[d - 1] + curve.clustering[d - 1] - wanted) < 0.02
    assert least <= estimate(curve, CodeConfig()) <= most


def test_the_estimate_leaves_no_layer_without_most_of_its_weights() -> None:
    # Few codes leave out so much that the sum of both errors hardly depends on d.
    curve = Curve((0.80, 0.60, 0.30, 0.20, 0.0), (0.02, 0.22, 0.52, 0.61, 0.8))
    assert estimate(curve, CodeConfig()) == 4
    assert estimate(curve, CodeConfig(low_rank_error=0.1)) == 5
    assert estimate(curve, CodeConfig(low_rank_error=1)) == 1


def test_an_estimate_never_costs_more_than_the_whole_width() -> None:
    layer = CodedLayer("x", (16, 16, 3, 3), 8, 32, 8)
    flat = Curve(tuple(1 - d / 8 for d in range(1, 9)), (0.0,) * 7 + (1.0,))
    any_rank = build(CodeConfig, {"tolerance": 0.0, "low_rank_error": 1.0})
    (narrow,) = choose_widths([layer], [flat], any_rank)
    assert narrow.d == 1  # any sum is below that of d = m
    nearly = Curve((1.0,) * 6 + (0.0, 0.0), (0.0,) * 8)
    (seven,) = choose_widths([layer], [nearly], build(CodeConfig, {}))
    assert seven.d == 8  # 7 numbers and a basis are more bits than 8
    (asked,) = choose_widths([layer], [nearly], build(CodeConfig, {"d": 7}))
    assert asked.d == 7
    assert asked.ratio < seven.ratio


class Odd(nn.Module):
    """Layers of every kind that rules are about."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3)
        self.body = nn.Conv2d(32, 64, 3)
        self.point = nn.Conv2d(64, 64, 1)
        self.odd = nn.Linear(7 * 11, 200)
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)
        self.two.weight = self.one.weight
        self.tiny = nn.Linear(4, 1)


def test_rules_of_what_is_coded() -> None:
    config = build(CodeConfig, {"m": 10, "m_pointwise": 4, "k": 64, "skip": ["point"]})
    layers, left = plan_layers(Odd(), config)
    assert {one.name: one.why for one in left} == {
        "first": "first",
        "point": "named",
        "one": "shared",
        "two": "shared",
        "tiny": "small",
    }
    found = {layer.name: (layer.m, layer.k) for layer in layers}
    # 32 x 3 x 3 = 288 is no multiple of 10, and 77 = 7 x 11 has no larger divisor than 7.
    assert found == {"body": (9, 64), "odd": (7, 64)}
    point = build(CodeConfig, {"m": 10, "m_pointwise": 4, "skip_first": False})
    layers, _ = plan_layers(Odd(), point)
    assert {"first", "point"} <= {layer.name for layer in layers}
    assert next(layer.m for layer in layers if layer.name == "point") == 4


def test_divisors_and_codes_that_are_few_enough() -> None:
    assert [largest_divisor(27, m) for m in (1, 4, 9, 18, 100)] == [1, 3, 9, 9, 27]
    assert [usable_codes(256, n) for n in (4, 100, 1023, 1024, 10_000)] == [2, 16, 128, 256, 256]
    assert usable_codes(100, 10_000) == 100


def test_what_cannot_be_coded_is_refused() -> None:
    broken = Odd()
    broken.body.weight.data[0, 0, 0, 0] = float("nan")
    for model, config, code in [
        (broken, {}, "not-finite"),
        (Odd(), {"skip": ["bodies"]}, "unknown-layer"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), {}, "nothing-to-code"),
    ]:
        with pytest.raises(UsageError) as caught:
            plan_layers(model, build(CodeConfig, config))
        assert caught.value.code == code
        assert caught.value.hint


def coded(d: int = 4) -> tuple[nn.Module, list[CodedLayer]]:
    torch.manual_seed(0)
    model = backbones.build("convnet3", 10, 1).eval()
    layers, _ = plan_layers(model, build(CodeConfig, {"k": 32, "m": 8}))
    layers = [replace(layer, d=min(d, layer.m)) for layer in layers]
    return to_codes(to_low_rank(model, layers), layers, 0), layers


def test_low_rank_weights_are_the_nearest_of_their_rank() -> None:
    weight = torch.from_numpy(decaying(256, 8, 1.0).reshape(32, 64))
    layer = CodedLayer("x", (32, 64), 8, 16, 3)
    made = LowRankWeight(layer, weight)().detach().double()
    u, s, v = np.linalg.svd(sub_vectors(weight.numpy(), 8).astype(np.float64), full_matrices=False)
    nearest = (u[:, :3] * s[:3] @ v[:3]).reshape(32, 64)
    np.testing.assert_allclose(made.numpy(), nearest, atol=1e-5)
    whole = LowRankWeight(replace(layer, d=8), weight)().detach()
    torch.testing.assert_close(whole, weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize("d", [4, 8])
def test_what_is_read_is_the_formula_in_float64(d: int) -> None:
    model, layers = coded(d)
    arrays = to_arrays(model, layers, ABOUT)
    _, named = spread(arrays)
    _, state = from_arrays(arrays)
    for layer in layers:
        codes = codes_of(named, layer)
        module = model.get_submodule(layer.name)
        assert isinstance(module.weight, CodedWeight)
        assert np.array_equal(codes, module.weight.codes.numpy())
        table = named[f"{layer.name}:codebook"].astype(np.float64)
        if layer.d < layer.m:
            table = table @ named[f"{layer.name}:basis"].astype(np.float64).T
        wanted = table[codes].reshape(layer.shape)
        np.testing.assert_allclose(state[f"{layer.name}.weight"], wanted, atol=1e-6)
        # float16 is all that is lost.
        np.testing.assert_allclose(module.weight().detach().numpy(), wanted, atol=2e-3)
    again = to_arrays(model, layers, ABOUT)
    assert {n: v.tobytes() for n, v in arrays.items()} == {n: v.tobytes() for n, v in again.items()}


def test_a_rebuilt_network_answers_alike_with_weights_and_with_look_ups() -> None:
    model, layers = coded()
    arrays = to_arrays(model, layers, ABOUT)
    x = torch.randn(5, 1, 16, 16)
    whole, looked_up = rebuild(arrays), rebuild(arrays, look_up=True)
    torch.testing.assert_close(whole(x), looked_up(x))
    torch.testing.assert_close(whole(x), model(x), atol=0.02, rtol=0.02)
    assert all(one.name in dict(looked_up.named_modules()) for one in layers)
    for damage in (
        {coded_model.PLAN: None},
        {"float16": None},
        {"float16": arrays["float16"][:-1]},
        {coded_model.PLAN: arrays[coded_model.PLAN][:-9]},
    ):
        damaged = {n: v for n, v in {**arrays, **damage}.items() if v is not None}
        with pytest.raises(RunError) as caught:
            rebuild(damaged)
        assert caught.value.code == "no-coded-model"


def test_training_moves_codebooks_and_bases_and_no_code() -> None:
    model, layers = coded()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    model.train()(torch.randn(8, 1, 16, 16)).square().sum().backward()
    optimizer.step()
    after = model.state_dict()
    for layer in layers:
        assert torch.equal(
            after[f"{layer.name}.weight.codes"], before[f"{layer.name}.weight.codes"]
        )
        for part in ("codebook", "basis"):
            name = f"{layer.name}.weight.{part}"
            assert not torch.equal(after[name], before[name])


@given(st.integers(1, 16), st.integers(0, 300), st.integers(0, 2**32 - 1))
def test_packing_comes_back(bits: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, count)
    packed = pack(codes, bits)
    assert packed.nbytes == -(-count * bits // 8)
    assert np.array_equal(unpack(packed, bits, count), codes)


CONFIG: dict[str, Any] = {
    "image": {"size": 8},
    "code": {"k": 32, "m": 8},
    "teacher": {"train": {"epochs": 5}},
    "low_rank": {"epochs": 2},
    "codes": {"epochs": 4},
}


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compressed")
    pipeline.run("compress-model", "digits", out=out, config=CONFIG)
    return out


def file_of(run: Path) -> Path:
    return run / json.loads((run / "manifest.json").read_text())["products"]["compressed"]


def test_a_compressed_network_knows_nearly_what_it_knew(compressed: Path) -> None:
    told = json.loads((compressed / "manifest.json").read_text())
    assert told["accuracy"]["teacher"] > 90
    assert told["accuracy"]["compressed"] > told["accuracy"]["teacher"] - 8
    assert told["bytes"]["ratio"] > 15
    about, named = spread(load_file(file_of(compressed) / "arrays.safetensors"))
    assert layer_table(named, about["layers"][0])[0].shape[1] == 8
    # With codes drawn at random it is at chance.
    for layer in about["layers"]:
        codes = RNG.integers(0, layer.k, layer.vectors)
        named |= {f"{layer.name}:{kind}": v for kind, v in code_arrays(codes, layer.k).items()}
    arrays = gather(named, {**about, "layers": [asdict(layer) for layer in about["layers"]]})
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).float()[:, None] / 16
    x = (images - 0.305) / 0.376
    right = rebuild(arrays)(x).argmax(1).numpy() == load_digits().target
    assert right.mean() < 0.35
    known = rebuild(load_file(file_of(compressed) / "arrays.safetensors"))(x).argmax(1).numpy()
    assert (known == load_digits().target).mean() > 0.85


def test_the_stated_bytes_are_those_of_the_file(compressed: Path) -> None:
    told = json.loads((compressed / "manifest.json").read_text())
    file = file_of(compressed) / "arrays.safetensors"
    assert told["bytes"]["file"] == file.stat().st_size
    size = size_of(load_file(file))
    assert {name: told["bytes"][name] for name in vars(size)} == vars(size)
    assert file.stat().st_size < sum(vars(size).values()) - size.dense + 1500  # names and shapes
    layers = from_arrays(load_file(file))[0]["layers"]
    stated = sum(sum(layer.bits.values()) for layer in layers) / 8
    assert abs(stated - (size.codes + size.codebooks + size.bases)) < len(layers)
    state = backbones.build("convnet3", 10, 1).state_dict()
    whole = sum(4 * value.numel() for name, value in state.items() if "num" not in name)
    assert size.dense == whole


@pytest.mark.parametrize(
    ("count", "even", "coded"), [(600, False, False), (40_000, False, True), (40_000, True, False)]
)
def test_codes_are_coded_where_that_takes_less(count: int, even: bool, coded: bool) -> None:
    shares = None if even else RNG.dirichlet(np.full(64, 2.0))
    codes = RNG.choice(64, count, p=shares).astype(np.int64)
    layer = replace(LAYER, name="a", shape=(count // 8, 64), m=8, k=64)
    made = {f"a:{kind}": values for kind, values in code_arrays(codes[: layer.vectors], 64).items()}
    assert ("a:frequencies" in made) == coded
    assert (codes_of(made, layer) == codes[: layer.vectors]).all()
    if coded:
        assert sum(v.nbytes for v in made.values()) < pack(codes, 6).nbytes
        made["a:codes"] = made["a:codes"][:-4]
        with pytest.raises(RunError, match="codes of the layer 'a' are damaged"):
            codes_of(made, layer)


def test_the_rebuilt_network_is_a_teacher(compressed: Path, tmp_path: Path) -> None:
    told = json.loads((compressed / "manifest.json").read_text())
    weights = compressed / told["products"]["model"] / "model" / "weights.safetensors"
    config = {**CONFIG, "teacher": {"backbone": "convnet3", "weights": str(weights)}}
    found = pipeline.run("compress-model", "digits", out=tmp_path, config=config)
    assert found["accuracy"]["teacher"] == told["accuracy"]["compressed"]


def test_a_report_tells_of_every_layer(compressed: Path) -> None:
    text = (compressed / "report.html").read_text()
    for heading in ("Accuracy", "Bytes", "Numbers of a code", "Layers"):
        assert f"<h2>{heading}</h2>" in text
    for layer in ("features.4", "features.8", "features.0"):
        assert layer in text


def test_a_plan_ends_where_widths_are_estimated(tmp_path: Path) -> None:
    found = pipeline.api.plan("compress-model", "digits", out=tmp_path, config=CONFIG)
    assert (found["until"], found["todo"]) == ("widths", True)


def test_inspect_shows_every_layer(compressed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(compressed)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    told = json.loads((compressed / "manifest.json").read_text())["layers"]
    for layer in told:
        (row,) = [line for line in lines if line[:1] == [layer["name"]]]
        assert f"{layer['ratio']:.1f}" in row
        assert f"{100 * layer['clustering']:.1f}%" in row


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"code": {"skip": ["nothing"]}}, "unknown-layer"),
        ({"code": {"k": 1}}, "bad-config"),
        ({"code": {"d": 0}}, "bad-config"),
        ({"preset": "resnet18"}, "bad-config"),
        ({"teacher": {"backbone": "nothing"}}, "unknown-backbone"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    tmp_path: Path, config: dict[str, Any], code: str
) -> None:
    with pytest.raises(PipelineError) as caught:
        pipeline.run("compress-model", "digits", out=tmp_path, config=config)
    assert caught.value.code == code
