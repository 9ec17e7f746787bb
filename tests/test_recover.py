"""Recover: the losses against plain arithmetic, and images that the teacher recognises."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.backbones import ConvNet
from pipeline.dataset_distill.batchnorm import BatchNormMatching
from pipeline.dataset_distill.class_statistics import ClassStatistics, targets_of
from pipeline.dataset_distill.config import RecoverConfig
from pipeline.dataset_distill.recover import Recovered, recover
from pipeline.device import reproducible
from pipeline.errors import UsageError
from pipeline.labelled_images import ImageConfig, normalise
from pipeline.storage.digits import open_digits
from pipeline.tensors import to_numpy

Array = npt.NDArray[np.float64]
IMAGE = ImageConfig(size=12, channels=1, mean=(0.4,), std=(0.3,), flip=False)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with reproducible(threads=1):
        yield


class TwoNorms(nn.Sequential):
    """BatchNorm, 1 x 1 convolution, BatchNorm: small enough to be written out."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        generator = torch.Generator().manual_seed(0)
        for layer in (self[0], self[2]):
            width = layer.num_features
            layer.running_mean = torch.randn(width, generator=generator)
            layer.running_var = torch.rand(width, generator=generator) + 0.5
            layer.weight.data = torch.rand(width, generator=generator) + 0.5
            layer.bias.data = torch.randn(width, generator=generator)
        self.double().eval().requires_grad_(requires_grad=False)


def bn_loss(net: TwoNorms, x: Array, first: float) -> float:
    """The loss of SRe2L, written out in float64."""
    weights = {name: value.numpy() for name, value in net.state_dict().items()}
    total = 0.0
    for index, multiplier in ((0, first), (2, 1.0)):
        mean, var = weights[f"{index}.running_mean"], weights[f"{index}.running_var"]
        batch_mean = x.mean((0, 2, 3))
        batch_var = ((x - batch_mean[:, None, None]) ** 2).mean((0, 2, 3))
        distance = math.sqrt(((var - batch_var) ** 2).sum())
        total += multiplier * (distance + math.sqrt(((mean - batch_mean) ** 2).sum()))
        if index == 0:
            scale = weights["0.weight"] / np.sqrt(var + 1e-5)
            shift = weights["0.bias"] - mean * scale
            x = x * scale[:, None, None] + shift[:, None, None]
            x = np.einsum("oi,nihw->nohw", weights["1.weight"][:, :, 0, 0], x)
            x = x + weights["1.bias"][:, None, None]
    return total


def measured(net: nn.Module, x: Tensor, first: float) -> Tensor:
    loss: Tensor = BatchNormMatching(net, first)(x)[1]
    return loss


@pytest.mark.parametrize("first", [10.0, 1.0, 0.0])
def test_the_batchnorm_loss_is_the_equation(first: float) -> None:
    net, x = TwoNorms(), np.random.default_rng(0).normal(size=(5, 3, 4, 4))
    assert float(measured(net, torch.from_numpy(x), first)) == pytest.approx(
        bn_loss(net, x, first), rel=1e-12
    )


def test_its_gradient_agrees_with_finite_differences_of_the_equation() -> None:
    net, rng = TwoNorms(), np.random.default_rng(1)
    x = rng.normal(size=(5, 3, 4, 4))
    tensor = torch.from_numpy(x).requires_grad_()
    measured(net, tensor, 10.0).backward()  # type: ignore[no-untyped-call]
    assert tensor.grad is not None
    gradient = tensor.grad.numpy()
    for place in [tuple(rng.integers(0, n) for n in x.shape) for _ in range(12)]:
        step = np.zeros_like(x)
        step[place] = 1e-5
        slope = (bn_loss(net, x + step, 10.0) - bn_loss(net, x - step, 10.0)) / 2e-5
        assert gradient[place] == pytest.approx(slope, rel=1e-6, abs=1e-9)
    direction = rng.normal(size=x.shape)
    slope = bn_loss(net, x + 1e-5 * direction, 10.0) - bn_loss(net, x - 1e-5 * direction, 10.0)
    assert float((gradient * direction).sum()) == pytest.approx(slope / 2e-5, rel=1e-6)


def test_the_first_layer_is_the_first_to_run() -> None:
    class Late(TwoNorms):
        def __init__(self) -> None:
            super().__init__()
            self.insert(0, self.pop(2))  # now the module list and the order of use differ

        def forward(self, x: Tensor) -> Tensor:
            return self[0](self[2](self[1](x)))

    net, x = TwoNorms(), torch.randn(5, 3, 4, 4, dtype=torch.float64)
    late = Late()
    assert float(measured(late, x, 10.0)) == pytest.approx(float(measured(net, x, 10.0)))


def test_each_pass_is_measured_alone_and_the_network_is_left_as_it_was() -> None:
    net, x = TwoNorms(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    before = net(x)
    matching = BatchNormMatching(net, 1.0)
    once = matching(x)[1]
    assert torch.equal(matching(x)[1], once)
    torch.testing.assert_close(matching(x)[0], before)
    assert torch.equal(net(x), before)
    assert not any(layer._forward_pre_hooks for layer in net.modules())


class Activated(nn.BatchNorm2d):
    """What some providers have: a layer that normalises and goes on."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


def test_what_a_kind_of_batchnorm_does_beside_normalising_is_kept() -> None:
    torch.manual_seed(0)
    layer = Activated(3)
    layer.running_mean, layer.running_var = torch.randn(3), torch.rand(3) + 0.5
    layer.weight.data = torch.rand(3) + 0.5
    net = nn.Sequential(layer).double().eval()
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    output, loss = BatchNormMatching(net, 1.0)(x)
    torch.testing.assert_close(output, net(x))
    assert (output == 0).any()
    mean, var = layer.running_mean.double(), layer.running_var.double()
    expected = (x.mean((0, 2, 3)) - mean).norm() + (x.var((0, 2, 3), correction=0) - var).norm()
    torch.testing.assert_close(loss, expected)


def test_statistics_far_from_zero_keep_their_digits() -> None:
    net = nn.Sequential(nn.BatchNorm2d(2)).eval()
    mean, spread = torch.tensor([1000.0, -3.0]), torch.tensor([0.1, 2.0])
    net[0].running_mean, net[0].running_var = mean, spread.square()
    x = torch.randn(8, 2, 16, 16) * spread.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)
    assert float(measured(net, x, 1.0)) == pytest.approx(
        float(measured(net.double(), x.double(), 1.0)), rel=1e-3
    )


def test_bfloat16_activations_are_measured_in_float32() -> None:
    net, x = TwoNorms().float(), torch.randn(6, 3, 8, 8, requires_grad=True)
    matching = BatchNormMatching(net, 10.0)
    exact = matching(x)[1]
    with torch.autocast("cpu", torch.bfloat16):
        rough = matching(x)[1]
    rough.backward()  # type: ignore[no-untyped-call]
    assert rough.dtype == torch.float32
    assert float(rough.detach()) == pytest.approx(float(exact.detach()), rel=0.02)
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_a_network_without_batchnorm_cannot_teach() -> None:
    net = nn.Sequential(nn.Flatten(), nn.LayerNorm(144), nn.Linear(144, 2))
    with pytest.raises(UsageError, match=r"no BatchNorm layers.*resnet18") as error:
        synthesise(net, classes=2)
    assert error.value.code == "no-batchnorm"


def smooth(count: int, seed: int) -> Tensor:
    """Normalised images with structure, to stand for real ones."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 3, 3, generator=generator)
    x = F.interpolate(coarse, (12, 12), mode="bilinear", align_corners=False)
    return (x - 0.4) / 0.3


def teacher(classes: int = 5) -> nn.Module:
    """A random network whose BatchNorm layers have seen smooth images."""
    torch.manual_seed(0)
    net = ConvNet(classes, 1, (8, 16))
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # a plain average
    for seed in range(8):
        net(smooth(50, seed))
    net.linear.weight.data *= 20
    return net.eval().requires_grad_(requires_grad=False)


def synthesise(
    net: nn.Module, classes: int = 5, seed: int = 0, image: ImageConfig = IMAGE, **values: Any
) -> Recovered:
    base = {"iterations": 150, "lr": 0.1, "r_bn": 0.5, "jitter": 1, "crop_floor": 0.5}
    config = RecoverConfig(**{**base, **values})
    return recover(
        [net], torch.arange(classes), noise_of(classes, image, seed), seed, config, image
    )


def noise_of(rows: int, image: ImageConfig = IMAGE, seed: int = 0) -> Tensor:
    shape = (rows, image.channels, image.size, image.size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def statistics(net: nn.Module, x: Tensor) -> float:
    return float(measured(net, x, 10.0))


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network trained on handwritten digits, and the digits."""
    table = pa.concat_tables(open_digits().tables()).slice(0, 1000)
    raw = F.interpolate(normalise(to_numpy(table["image"]), IMAGE, CPU), (12, 12), mode="bilinear")
    labels = torch.from_numpy(to_numpy(table["label"]).copy())
    return trained(0, (16, 32), raw, labels), raw, labels


def trained(seed: int, widths: tuple[int, ...], raw: Tensor, labels: Tensor) -> nn.Module:
    with reproducible(threads=1):
        torch.manual_seed(seed)
        net = ConvNet(10, 1, widths)
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        for _ in range(6):
            for rows in torch.randperm(1000).split(50):
                optimizer.zero_grad()
                F.cross_entropy(net(raw[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    return net.eval().requires_grad_(requires_grad=False)


def test_recovered_images_are_recognised_and_look_real_to_batchnorm(
    digits: tuple[nn.Module, Tensor, Tensor],
) -> None:
    net, raw, labels = digits
    assert (net(raw).argmax(1) == labels).float().mean() > 0.85
    result = synthesise(net, classes=10, r_bn=0.5)
    assert result.images.shape == (10, 12, 12, 1)
    assert result.images.dtype == np.uint8
    x = normalise(result.images, IMAGE, CPU)
    assert net(x).argmax(1).tolist() == list(range(10))
    first = torch.stack([raw[labels == label][0] for label in range(10)])
    assert statistics(net, x) < 0.3 * statistics(net, noise_of(10))
    assert statistics(net, x) < 3 * statistics(net, first)
    # Another network, of another width and seed, knows them too: they are no mere trick.
    other = trained(10, (24, 24), raw, labels)
    assert (other(x).argmax(1) == torch.arange(10)).sum() >= 7
    plain = synthesise(net, classes=10, r_bn=0.0)
    assert statistics(net, normalise(plain.images, IMAGE, CPU)) > 3 * statistics(net, x)


def test_what_is_reported_is_what_was_made() -> None:
    net = teacher()
    result = synthesise(net, lr=2.0)
    x = normalise(result.images, IMAGE, CPU)
    labels = torch.arange(5)
    # Only if the optimised images were held in [0, 1] do their bytes score the same.
    assert result.final["batchnorm"] == pytest.approx(statistics(net, x), rel=0.02)
    ce = float(F.cross_entropy(net(x), labels))
    assert result.final["cross_entropy"] == pytest.approx(ce, rel=0.05, abs=0.02)
    assert [row[0] for row in result.trace] == [0, 50, 100]
    whole = synthesise(net, curriculum="step", jitter=0)
    start = [float(F.cross_entropy(net(noise_of(5)), labels)), statistics(net, noise_of(5))]
    assert whole.trace[0][1:] == pytest.approx(start, rel=1e-5)


def test_the_same_seed_gives_the_same_bytes() -> None:
    net = teacher()
    first, second = synthesise(net, iterations=20), synthesise(net, iterations=20)
    assert first.images.tobytes() == second.images.tobytes()
    assert (first.trace, first.final) == (second.trace, second.final)
    assert synthesise(net, iterations=20, seed=1).images.tobytes() != first.images.tobytes()


def test_the_optimiser_is_adam_under_a_cosine_with_clamped_pixels() -> None:
    net = teacher()
    values = {"iterations": 12, "lr": 0.3, "jitter": 0, "curriculum": "step", "r_bn": 0.2}
    found = synthesise(net, **values)
    x, labels = noise_of(5).double(), torch.arange(5)
    net = net.double()
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    low, high = (0 - 0.4) / 0.3, (1 - 0.4) / 0.3
    for step in range(12):
        leaf = x.clone().requires_grad_()
        loss = F.cross_entropy(net(leaf), labels) + 0.2 * measured(net, leaf, 10.0)
        (gradient,) = torch.autograd.grad(loss, leaf)
        m, v = 0.5 * m + 0.5 * gradient, 0.9 * v + 0.1 * gradient**2
        lr = 0.3 * (1 + math.cos(math.pi * step / 12)) / 2
        size = (m / (1 - 0.5 ** (step + 1))) / ((v / (1 - 0.9 ** (step + 1))).sqrt() + 1e-8)
        x = (x - lr * size).clamp(low, high)
    expected = ((x * 0.3 + 0.4) * 255).numpy().transpose(0, 2, 3, 1)
    assert np.abs(found.images - expected).max() < 0.75


SEEN: list[Tensor] = []


class Recorder(nn.Module):
    """Notes what it is shown; its gradient is next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(x.detach().clone())
        return self.norm(x).mean((2, 3)).expand(-1, 2)


def shown(image: ImageConfig, **values: Any) -> tuple[Tensor, list[Tensor]]:
    net = Recorder().eval().requires_grad_(requires_grad=False)
    x = noise_of(2, image).clamp(-1, 1)
    config = RecoverConfig(**{"iterations": 80, "lr": 1e-9, "jitter": 2, **values})
    SEEN.clear()
    recover([net], torch.arange(2), x, 0, config, image)
    return x, SEEN[:-1]


@pytest.mark.parametrize("flip", [False, True])
def test_whole_images_are_shifted_and_mirrored_alike(flip: bool) -> None:
    image = IMAGE.model_copy(update={"flip": flip})
    x, seen = shown(image, curriculum="step", milestone=1.0)
    allowed = {
        (down, right, mirrored): torch.roll(x.flip(3) if mirrored else x, (down, right), (2, 3))
        for down in range(3)
        for right in range(3)
        for mirrored in ((False, True) if flip else (False,))
    }
    met = set()
    for view in seen:
        match = [name for name, made in allowed.items() if torch.allclose(view, made, atol=1e-5)]
        assert len(match) == 1
        met.add(match[0])
    assert met == set(allowed)


def test_crops_follow_the_curriculum() -> None:
    x, seen = shown(IMAGE, curriculum="linear", milestone=0.5, crop_floor=0.2, jitter=0)
    changed = [not torch.allclose(view, x, atol=1e-5) for view in seen]
    assert not changed[0]
    assert all(view.shape == x.shape for view in seen)
    assert sum(changed[40:]) > sum(changed[:10])
    assert sum(changed[40:]) > 30
    kept = [float(view.std()) for view in seen]
    assert np.mean(kept[:5]) > np.mean(kept[40:])


class Memory:
    """A checkpoint that stops the work after a number of writes."""

    due = True

    def __init__(self, stop_after: int | None = None) -> None:
        self.state: Any = None
        self.writes, self.stop_after = 0, stop_after

    def read(self) -> Any:
        return self.state

    def write(self, state: Any) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        self.state = torch.load(buffer, weights_only=True)
        self.writes += 1
        if self.writes == self.stop_after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [1, 50, 51, 119])
def test_a_synthesis_that_was_stopped_goes_on_to_the_same_bytes(stop: int) -> None:
    nets = [teacher(), teacher()]
    nets[1].linear.weight.data.neg_()
    config = RecoverConfig(iterations=120, jitter=1, crop_floor=0.5, relative=True, r_bn=1.0)

    def run(memory: Memory | None) -> Recovered:
        return recover(nets, torch.arange(5), noise_of(5), 3, config, IMAGE, checkpoint=memory)

    memory = Memory(stop)
    with pytest.raises(KeyboardInterrupt):
        run(memory)
    assert memory.state["done"] == stop
    first, second = run(memory), run(None)
    assert memory.writes == 120
    assert first.images.tobytes() == second.images.tobytes()
    assert (first.trace, first.final) == (second.trace, second.final)


def test_each_iteration_asks_one_of_several_teachers() -> None:
    nets = [Recorder().eval().requires_grad_(requires_grad=False) for _ in range(2)]
    config = RecoverConfig(iterations=60, jitter=0, curriculum="step", r_bn=0.0, lr=1e-9)
    shown = []
    for seed in range(2):
        SEEN.clear()
        recover(nets, torch.arange(2), noise_of(2), seed, config, IMAGE)
        shown.append(len(SEEN))
    assert shown == [61, 61]
    # Two teachers that want opposite things leave an image between the two.
    pair = [teacher(), teacher()]
    pair[1].linear.weight.data.neg_()
    one = recover(pair[:1], torch.arange(5), noise_of(5), 0, RecoverConfig(iterations=60), IMAGE)
    both = recover(pair, torch.arange(5), noise_of(5), 0, RecoverConfig(iterations=60), IMAGE)
    assert one.final["cross_entropy"] < both.final["cross_entropy"]


def test_a_relative_weight_carries_over_to_a_teacher_with_other_units() -> None:
    net, other = teacher(), teacher()
    # The same function with statistics ten times as large: a loss ten or a hundred times as large.
    first = next(m for m in other.modules() if isinstance(m, nn.Conv2d))
    norm = next(m for m in other.modules() if isinstance(m, nn.BatchNorm2d))
    assert norm.running_mean is not None
    assert norm.running_var is not None
    first.weight.data *= 10
    norm.running_mean *= 10
    norm.running_var *= 100
    norm.eps *= 100
    x = noise_of(5)
    torch.testing.assert_close(net(x), other(x), rtol=1e-4, atol=1e-4)
    values = {"iterations": 40, "r_bn": 1.0, "first_bn_multiplier": 10.0}
    apart = {
        relative: np.abs(
            synthesise(net, relative=relative, **values).images.astype(int)
            - synthesise(other, relative=relative, **values).images
        ).mean()
        for relative in (True, False)
    }
    assert apart[True] < 0.7 * apart[False]


def test_no_iterations_leave_the_start_as_it_is() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 12, 12, 1), np.uint8)
    start = normalise(pixels, IMAGE, CPU)
    config = RecoverConfig(iterations=0)
    found = recover([teacher()], torch.arange(5), start, 0, config, IMAGE)
    assert np.array_equal(found.images, pixels)
    assert found.trace == []


def test_class_statistics_are_those_of_each_class() -> None:
    net = teacher()
    pixels = np.random.default_rng(0).integers(0, 256, (30, 12, 12, 1), np.uint8)
    labels = np.random.default_rng(1).integers(0, 3, 30)

    class Given:
        identity = "given"

        def networks(self, device: torch.device) -> list[nn.Module]:
            return [net, net]

    task = ClassStatistics(Given(), IMAGE, 4)
    state = task.begin(0)
    shards = [("a", pixels[:11], labels[:11]), ("b", pixels[11:], labels[11:])]
    parts = [task.part(state, [shard], 1) for shard in shards]
    arrays, facts = task.result(task.join(state, iter(parts), 1))
    assert facts["samples"] == [*np.bincount(labels, minlength=3).tolist(), 0]
    for label in range(3):
        x = normalise(pixels[labels == label], IMAGE, CPU)
        targets = targets_of(arrays, label, [net, net])
        assert len(targets) == 2
        for target in targets:
            # With a class's own statistics as target, its own images are at distance 0.
            loss = BatchNormMatching(net, 1.0, target)(x)[1]
            assert float(loss) < 1e-3
    other = normalise(pixels[labels == 1], IMAGE, CPU)
    assert float(BatchNormMatching(net, 1.0, targets_of(arrays, 0, [net])[0])(other)[1]) > 0.01


def test_the_stage_starts_each_image_from_its_own_key(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.digest import seed_for
    from pipeline.stage import ShardContext
    from pipeline.stages import recover as module
    from pipeline.tensors import tensor_column

    seen: list[Any] = []

    def record(nets: Any, labels: Tensor, start: Tensor, seed: int, *more: Any, **_: Any) -> Any:
        seen.append((labels, start, seed, more[0].iterations))
        return Recovered(np.zeros((len(labels), 12, 12, 1), np.uint8), [[0.0, 1.0, 2.0]], {"a": 1})

    monkeypatch.setattr(module, "default_device", lambda: CPU)
    monkeypatch.setattr(module, "read_model", lambda *_: None)
    monkeypatch.setattr(module, "recover", record)
    stage = module.Recover(None, ("model",), RecoverConfig(), IMAGE)  # type: ignore[arg-type]
    table = pa.table({"key": ["a", "b"], "label": pa.array([4, 2], pa.int64())})
    context = ShardContext("00003", 11)
    result = stage(table, context)
    stage(table.take([1]), ShardContext("00004", 11))
    stage(table, ShardContext("00003", 12))
    assert result.column_names == ["key", "label", "image"]
    assert context.metrics == {"trace": [[0.0, 1.0, 2.0]], "final": {"a": 1}}
    assert seen[0][0].tolist() == [4, 2]
    for index, key in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed_for(11, key))
        assert torch.equal(seen[0][1][index], torch.randn(1, 12, 12, generator=generator))
    assert torch.equal(seen[1][1][0], seen[0][1][1])
    assert not torch.equal(seen[2][1], seen[0][1])
    assert len({one[2] for one in seen}) == 3
    assert seen[0][3] == 4000
    pixels = np.full((2, 12, 12, 1), 51, np.uint8)
    table = table.append_column("iterations", pa.array([7, 7], pa.int64()))
    result = stage(table.append_column("image", tensor_column(pixels)), context)
    assert torch.allclose(seen[3][1], torch.full((2, 1, 12, 12), (0.2 - 0.4) / 0.3))
    assert seen[3][3] == 7
    assert result.column_names == ["key", "label", "iterations", "image"]
