"""What an honest tokenizer does, on a small one that is trained here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from pipeline import backbones
from pipeline.config import build
from pipeline.errors import UsageError
from pipeline.orchestration.checkpoint import Checkpoint
from pipeline.orchestration.training import train
from pipeline.recipes.train_tokenizer import TrainTokenizerConfig
from pipeline.storage.store import LocalStore
from pipeline.storage.weights import WeightsFile
from pipeline.tensors import tensor_column
from pipeline.testing import check_tokenizer
from pipeline.tokenizers.adversary import Adversary, adversarial_loss
from pipeline.tokenizers.config import PRESETS, TRAINING, LatentConfig, TokenizerTrainConfig
from pipeline.tokenizers.quality import bit_health, error_curves, grid, psnr
from pipeline.tokenizers.resolution import lowered, resolution
from pipeline.tokenizers.tokenizer import LatentTokenizer, build_tokenizer, load_tokenizer
from pipeline.tokenizers.tokens import Tokens, form_of_bits
from pipeline.tokenizers.training import TokenizerTraining, TrainTokenizer, draw_lengths

SMALL = {
    "size": 8,
    "channels": 1,
    "patch": 2,
    "tokens": 16,
    "encoder": {"width": 64, "depth": 2},
    "decoder": {"width": 64, "depth": 2},
    "quantizer": {"kind": "bsq", "bits": 6},
}
TRAIN = {
    "train": {"epochs": 24, "batch_size": 64, "lr": 2e-3, "warmup_epochs": 1, "ema": 0.99},
    "flip": False,
}


def digits(part: slice) -> Tensor:
    images = np.rint(load_digits().images[part] * 255 / 16).astype(np.uint8)
    return torch.from_numpy(images)[:, None]


def table(images: Tensor) -> pa.Table:
    return pa.table({"image": tensor_column(images.permute(0, 2, 3, 1).contiguous().numpy())})


TEST = digits(slice(1400, None))


def trained(folder: Path, **changes: Any) -> LatentTokenizer:
    config = build(LatentConfig, {**SMALL, **changes})
    task = TrainTokenizer(config, build(TokenizerTrainConfig, TRAIN))
    inputs = {"train": table(digits(slice(1400))), "test": table(TEST)}
    torch.set_num_threads(1)
    result = train(task, inputs, 0, Checkpoint(LocalStore(folder), "model", 1e9))
    model = result.training.model
    assert isinstance(model, LatentTokenizer)
    return model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> LatentTokenizer:
    return trained(tmp_path_factory.mktemp("drop"))


@pytest.fixture(scope="module")
def without_drop(tmp_path_factory: pytest.TempPathFactory) -> LatentTokenizer:
    return trained(tmp_path_factory.mktemp("none"), tail_drop=None)


def curve(tokenizer: LatentTokenizer) -> Mapping[int, float]:
    """PSNR of the mean error by length."""
    lengths = grid(16)
    found = psnr(error_curves(tokenizer, TEST, lengths).double().mean(0)).tolist()
    return dict(zip(lengths, found, strict=True))


def test_a_training_that_was_stopped_ends_with_the_same_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build(LatentConfig, SMALL)
    loss = {"adversarial_weight": 0.1, "adversarial_from": 0.0}
    shape = {"epochs": 2, "batch_size": 64, "ema": 0.9}
    settings = build(TokenizerTrainConfig, {"train": shape, "loss": loss})
    inputs = {"train": table(digits(slice(300))), "test": table(TEST[:50])}
    torch.set_num_threads(1)

    def result(name: str) -> dict[str, Tensor]:
        kept = Checkpoint(LocalStore(tmp_path), name, 0.0)
        return train(TrainTokenizer(config, settings), inputs, 3, kept).training.model.state_dict()

    batch = TokenizerTraining.batch

    def stopping(self: TokenizerTraining, epoch: int, index: int) -> Any:
        if (epoch, index) in {(0, 2), (1, 1)} and (epoch, index) not in stopped:
            stopped.append((epoch, index))
            raise OSError("the power went out")
        return batch(self, epoch, index)

    whole, stopped = result("whole"), []
    monkeypatch.setattr(TokenizerTraining, "batch", stopping)
    for _ in range(2):
        with pytest.raises(OSError, match="power"):
            result("stopped")
    assert all(torch.equal(value, whole[name]) for name, value in result("stopped").items())


def test_bits_live_and_say_different_things(tokenizer: LatentTokenizer) -> None:
    found = bit_health(tokenizer.encode(TEST))
    assert found["entropy"] >= 0.85
    assert found["dead"] == 0
    assert found["copies"] <= 0.05
    assert found["effective"] >= 0.05 * found["bits"]


def test_every_token_adds_to_the_picture(tokenizer: LatentTokenizer) -> None:
    found = curve(tokenizer)
    assert found[1] < found[2] < found[4] < found[8] < found[16]
    assert found[16] >= found[8] + 0.1
    assert found[2] - found[1] > (found[16] - found[8]) / 8


def test_tail_drop_wins_with_few_tokens_and_loses_with_all(
    tokenizer: LatentTokenizer, without_drop: LatentTokenizer
) -> None:
    dropped, whole = curve(tokenizer), curve(without_drop)
    assert dropped[4] >= whole[4] + 2
    assert dropped[16] < whole[16]


def test_it_keeps_what_tokenizers_promise(tokenizer: LatentTokenizer) -> None:
    check_tokenizer(tokenizer, TEST[:20])


@pytest.mark.parametrize(
    "quantizer",
    [
        {"kind": "bernoulli", "bits": 70},
        {"kind": "lfq", "bits": 5},
        {"kind": "fsq", "levels": (8, 5)},
        {"kind": "vq", "vocabulary": 50, "width": 6},
    ],
    ids=lambda quantizer: str(quantizer["kind"]),
)
def test_so_does_each_quantizer(quantizer: Mapping[str, Any]) -> None:
    torch.manual_seed(0)
    shape = {"size": 16, "tokens": 6, "quantizer": quantizer}
    small = {"width": 32, "depth": 1}
    model = LatentTokenizer(build(LatentConfig, {**shape, "encoder": small, "decoder": small}))
    for _ in range(20):  # of running statistics
        model(torch.rand(32, 3, 16, 16) * 2 - 1, torch.full((32,), 6))
    check_tokenizer(model.eval(), torch.randint(256, (12, 3, 16, 16), dtype=torch.uint8))


class Wrong(LatentTokenizer):
    """A tokenizer with one thing wrong."""

    fault = ""

    def encode_values(self, images: Tensor) -> tuple[Tensor, Tensor]:
        values, summary = super().encode_values(images)
        if self.fault == "draws":
            return torch.bernoulli(torch.full(values.shape, 0.5)).to(torch.uint8), summary
        return values, summary

    def decode_values(self, values: Tensor, lengths: Tensor, size: tuple[int, int]) -> Tensor:
        if self.fault == "remembers":
            return torch.linspace(0, 1, len(values))[:, None, None, None].expand(-1, 1, *size)
        if self.fault == "sees all":
            lengths = torch.full_like(lengths, self.config.tokens)
        return super().decode_values(values, lengths, size) * (2 if self.fault == "bright" else 1)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("draws", "a second encoding is another"),
        ("remembers", "do not follow their tokens"),
        ("sees all", "dropped tokens are seen|bytes lose something"),
        ("bright", "not in"),
    ],
)
def test_the_suite_sees_what_is_wrong(tokenizer: LatentTokenizer, fault: str, told: str) -> None:
    wrong = Wrong(tokenizer.config)
    wrong.load_state_dict(tokenizer.state_dict())
    wrong.fault = fault
    with pytest.raises(AssertionError, match=told):
        check_tokenizer(wrong.eval(), TEST[:20])


def test_the_first_token_matters_most(tokenizer: LatentTokenizer) -> None:
    tokens = tokenizer.encode(TEST)
    before = tokenizer.decode(tokens)

    def changed(place: int) -> float:
        values = tokens.values.clone()
        values[:, place] = values[:, place].roll(1, 0)
        other = tokenizer.decode(Tokens(values, tokens.lengths, tokens.form))
        return float((other - before).abs().mean())

    assert changed(0) > 3 * changed(15)


def test_another_resolution_says_much_the_same(tokenizer: LatentTokenizer) -> None:
    small = TEST.float() / 255
    large = F.interpolate(small, (12, 12), mode="bicubic").clamp(0, 1)
    a, b = (tokenizer.encode(images).values for images in (small, large))
    assert float((a != b).float().mean()) < 0.4  # of unlike images half differ
    assert tokenizer.decode(tokenizer.encode(large), (12, 12)).shape == (len(TEST), 1, 12, 12)
    assert tokenizer.decode(tokenizer.encode(large), (8, 12)).shape == (len(TEST), 1, 8, 12)


def test_a_saved_tokenizer_is_the_same(tokenizer: LatentTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    files = [(tmp_path / name).read_bytes() for name in ("config.json", "model.safetensors")]
    again = load_tokenizer(*files, str(tmp_path))
    assert again.digest == tokenizer.digest
    assert again.encode(TEST).pack() == tokenizer.encode(TEST).pack()


@pytest.mark.parametrize("damage", [b"{}", b"[1", b'{"kind": "latent", "config": {"size": 7}}'])
def test_what_is_no_tokenizer_is_refused(damage: bytes) -> None:
    with pytest.raises(UsageError):
        load_tokenizer(damage, b"", "here")


def test_tokens_of_another_form_are_refused(tokenizer: LatentTokenizer) -> None:
    tokens = Tokens(torch.zeros(1, 16, 5, dtype=torch.uint8), torch.ones(1), form_of_bits(5, 16))
    with pytest.raises(UsageError, match="5 bits") as caught:
        tokenizer.decode(tokens)
    assert caught.value.code == "other-tokenizer"


@pytest.mark.parametrize(
    ("shape", "code"),
    [
        ((1, 3, 8, 8), "other-channels"),
        ((1, 1, 1, 8), "bad-image-size"),
        ((1, 1, 9, 8), "bad-image-size"),
    ],
)
def test_images_that_do_not_fit_are_refused(
    tokenizer: LatentTokenizer, shape: tuple[int, ...], code: str
) -> None:
    with pytest.raises(UsageError) as caught:
        tokenizer.encode(torch.zeros(shape))
    assert caught.value.code == code


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_whole(name: str) -> None:
    build(TokenizerTrainConfig, TRAINING[name])
    with torch.device("meta"):
        model = build_tokenizer(build(TrainTokenizerConfig, {"tokenizer": PRESETS[name]}).tokenizer)
    millions = sum(value.numel() for value in model.parameters()) / 1e6
    # Encoder and decoder of the published sizes: blocks alone have 12 D^2 numbers.
    least = {"tiny": 1.2, "instella-1024": 280, "one-d-piece-b-256": 165, "detailflow-128": 270}
    least |= {"tiny-grid": 0.6, "vqgan-lc-f16": 65}
    assert least[name] < millions < 1.3 * least[name]
    assert model.form.max_tokens == model.config.tokens


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_a_grid_that_changes_midway_gives_the_same_shapes(side: str) -> None:
    both = {name: {"width": 16, "heads": 2, "depth": 2} for name in ("encoder", "decoder")}
    both[side]["resample_after"] = 1
    model = LatentTokenizer(build(LatentConfig, {"size": 16, "tokens": 4, **both})).eval()
    images = torch.rand(2, 3, 16, 24)
    assert model.decode(model.encode(images), (16, 24)).shape == images.shape
    with pytest.raises(UsageError):
        model.encode(torch.rand(2, 3, 12, 16))


@pytest.mark.parametrize(
    ("most", "wanted"),
    [
        (128, {1: 1, 2: 4, 4: 9, 8: 21, 16: 44, 32: 88, 64: 164, 96: 223, 120: 251, 128: 256}),
        (256, {8: 11, 16: 23, 32: 46, 64: 89, 128: 165, 248: 254}),
        (512, {32: 23, 64: 46, 128: 89, 256: 165}),
    ],
)
def test_resolutions_are_those_of_detailflow(most: int, wanted: Mapping[int, int]) -> None:
    assert {n: resolution(n, most, 256, 1.5) for n in wanted} == wanted


def test_fewer_tokens_are_to_show_a_lower_resolution() -> None:
    images = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    seen = lowered(images, torch.tensor([1, 8, 16]), 16, 1.5)
    assert float(seen[0].std()) < 1e-5
    torch.testing.assert_close(seen[0].mean(), images[0].mean())
    assert torch.equal(seen[2], images[2])
    energy = [
        float(torch.fft.rfft2(x)[0, 8:24, 8:].abs().square().sum()) for x in (seen[1], images[1])
    ]
    assert energy[0] < 0.3 * energy[1]


def test_lengths_are_drawn_for_each_sample() -> None:
    config = build(LatentConfig, {**SMALL, "tokens": 16})
    generator = torch.Generator().manual_seed(0)
    drawn = draw_lengths(config.tail_drop, 16, 4000, generator)
    counts = torch.bincount(drawn, minlength=17)
    assert counts[0] == 0
    assert int(counts[1:].min()) > 180
    powers = build(LatentConfig, {"tail_drop": {"lengths": "pow2"}}).tail_drop
    assert set(draw_lengths(powers, 16, 400, generator).tolist()) == {1, 2, 4, 8, 16}
    few = build(LatentConfig, {"tail_drop": {"share": 0.2}}).tail_drop
    assert 0.75 < float((draw_lengths(few, 16, 4000, generator) == 16).float().mean()) < 0.87
    assert set(draw_lengths(None, 16, 9, generator).tolist()) == {16}


def test_a_network_of_your_own_judges_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = backbones.build("convnet3", 10, 1).eval()
    np.savez(tmp_path / "w.npz", **{n: v.numpy() for n, v in network.state_dict().items()})
    judge = {"backbone": "convnet3", "weights": "w.npz", "classes": 10, "weight": 3.0}
    judge |= {"mean": (0.4,), "std": (0.25,)}
    inputs = {"train": table(TEST), "test": table(TEST)}

    def loss(settings: Mapping[str, Any], weights: WeightsFile | None) -> tuple[Tensor, Any]:
        training = build(TokenizerTrainConfig, {**TRAIN, **settings})
        torch.manual_seed(0)
        task = TrainTokenizer(build(LatentConfig, SMALL), training, weights)
        prepared = task.prepare(inputs, 0, torch.device("cpu"))
        torch.manual_seed(1)
        return prepared.loss(prepared.batch(0, 0)), prepared

    judged, prepared = loss({"loss": {"perceptual": judge}}, WeightsFile(tmp_path / "w.npz"))
    plain, _ = loss({}, None)
    images, lengths, _ = prepared.batch(0, 0)
    torch.manual_seed(1)
    seen, real = (
        backbones.embed(network, (x / 2 + 0.5 - 0.4) / 0.25)
        for x in (prepared.model(images, lengths)[0], images)
    )
    wanted = 3 * (seen - real).square().mean()
    torch.testing.assert_close(judged - plain, wanted, atol=1e-5, rtol=1e-4)
    judged.backward()
    assert prepared.model.encoder.patches.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in prepared.critic.parameters())


def test_both_sides_of_the_adversarial_loss() -> None:
    """The adversary learns to tell images apart, decoded images to be taken for real."""
    torch.manual_seed(0)
    adversary, real = Adversary(1, 4), torch.rand(4, 1, 8, 8)
    decoded = torch.rand(4, 1, 8, 8, requires_grad=True)
    adversarial_loss(adversary, decoded, real, 0.5).backward()
    own = F.relu(1 - adversary(real)).mean() + F.relu(1 + adversary(decoded.detach())).mean()
    wanted = torch.autograd.grad(own, list(adversary.parameters()))
    for parameter, gradient in zip(adversary.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    fooled = torch.autograd.grad(-0.5 * adversary(decoded).mean(), decoded)[0]
    torch.testing.assert_close(decoded.grad, fooled)


def test_an_adversary_joins_in_and_is_no_part_of_the_tokenizer(tmp_path: Path) -> None:
    loss = {"adversarial_weight": 0.1, "adversarial_from": 0.5}
    short = {"train": {"epochs": 2, "batch_size": 64}, "loss": loss}
    task = TrainTokenizer(build(LatentConfig, SMALL), build(TokenizerTrainConfig, short))
    inputs = {"train": table(TEST[:128]), "test": table(TEST[:64])}
    prepared = task.prepare(inputs, 0, torch.device("cpu"))
    before = prepared.model.adversary.layers[0].weight.detach().clone()
    prepared.loss(prepared.batch(0, 0)).backward()
    assert prepared.model.adversary.layers[0].weight.grad is None
    result = train(task, inputs, 0, Checkpoint(LocalStore(tmp_path / "run"), "model", 1e9))
    assert not torch.equal(result.training.model.adversary.layers[0].weight, before)
    result.training.model.save(tmp_path / "saved")
    files = [(tmp_path / "saved" / n).read_bytes() for n in ("config.json", "model.safetensors")]
    again = load_tokenizer(*files, "here")
    assert not hasattr(again, "adversary")
    assert again.encode(TEST[:9]).pack() == result.training.model.encode(TEST[:9]).pack()
