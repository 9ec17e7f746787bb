"""Networks by name: built in, or from a provider (``torchvision:``, ``timm:``, ``hf:``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import UsageError


@dataclass(frozen=True)
class ModelSpec:
    """What a classifier is made of and what it expects.

    Attributes:
        backbone: name for :func:`build`.
        classes: number of outputs.
        channels: input channels.
        mean: per channel, of pixels in [0, 1]; inputs are (x - mean) / std.
        std: per channel.
    """

    backbone: str
    classes: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Weights(Protocol):
    """Arrays of a state dict by name; ``identity`` is the digest of the file."""

    @property
    def identity(self) -> str: ...
    @property
    def name(self) -> str: ...
    def arrays(self) -> dict[str, npt.NDArray[Any]]: ...


class Teachers(Protocol):
    """Fitted classifiers; ``identity`` is that of what was fitted."""

    @property
    def identity(self) -> str: ...
    def networks(self, device: torch.device) -> list[nn.Module]: ...


class ConvNet(nn.Module):
    """Blocks of 3 x 3 convolution, BatchNorm and ReLU with 2 x 2 max pooling between them.

    Args:
        classes: number of outputs.
        channels: input channels.
        widths: output channels of each block.

    Shapes: (N, channels, H, W) -> (N, classes); any H and W >= 4.
    """

    def __init__(
        self, classes: int, channels: int, widths: tuple[int, ...] = (32, 64, 128)
    ) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for index, width in enumerate(widths):
            if index:
                blocks.append(nn.MaxPool2d(2))
            before = widths[index - 1] if index else channels
            blocks += [
                nn.Conv2d(before, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
        self.features = nn.Sequential(*blocks)
        self.linear = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.linear(self.features(x).mean((2, 3))))


class _BasicBlock(nn.Module):
    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride = stride
        self.pad = (width - before) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride > 1 or self.pad:
            x = x[:, :, :: self.stride, :: self.stride]
            x = F.pad(x, (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """ResNet for 32 x 32 images (He et al. 2016, section 4.2) with parameter-free shortcuts.

    Three stages of ``depth`` basic blocks with 16, 32 and 64 channels: 6 ``depth`` + 2 layers.
    Shortcuts between stages subsample by two and pad the missing channels with zeros (option A).

    Shapes: (N, channels, H, W) -> (N, classes).
    """

    def __init__(self, classes: int, channels: int, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, depth, 1)
        self.layer2 = self._stage(16, 32, depth, 2)
        self.layer3 = self._stage(32, 64, depth, 2)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _stage(before: int, width: int, depth: int, stride: int) -> nn.Sequential:
        first = _BasicBlock(before, width, stride)
        return nn.Sequential(first, *(_BasicBlock(width, width, 1) for _ in range(depth - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return cast("Tensor", self.linear(x.mean((2, 3))))


class _ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions, or with ``bottleneck`` 1 x 1, 3 x 3 and 1 x 1, and a shortcut."""

    def __init__(self, before: int, width: int, stride: int, *, bottleneck: bool) -> None:
        super().__init__()
        after = width * (4 if bottleneck else 1)
        sizes = [(1, 1), (3, stride), (1, 1)] if bottleneck else [(3, stride), (3, 1)]
        outputs = [width, width, after] if bottleneck else [width, width]
        inputs = [before, *outputs[:-1]]
        self.layers = len(sizes)
        for number, (have, give, (side, step)) in enumerate(
            zip(inputs, outputs, sizes, strict=True), 1
        ):
            conv = nn.Conv2d(have, give, side, step, padding=side // 2, bias=False)
            self.add_module(f"conv{number}", conv)
            self.add_module(f"bn{number}", nn.BatchNorm2d(give))
        self.downsample: nn.Module | None = None
        if stride > 1 or before != after:
            self.downsample = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for number in range(1, self.layers + 1):
            y = self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(y))
            y = F.relu(y) if number < self.layers else y
        return F.relu(y + (self.downsample(x) if self.downsample is not None else x))


class ResNet(nn.Module):
    """ResNet for photographs (He et al. 2016, table 1); names of weights are torchvision's.

    Args:
        classes: number of outputs.
        channels: input channels.
        blocks: of each of the four stages.
        bottleneck: blocks of three convolutions (50 layers and more).
        small: the stem for images of 32 to 64 pixels: one 3 x 3 convolution, and no pooling.

    Shapes: (N, channels, H, W) -> (N, classes).
    """

    def __init__(
        self,
        classes: int,
        channels: int,
        blocks: tuple[int, ...],
        *,
        bottleneck: bool = False,
        small: bool = False,
    ) -> None:
        super().__init__()
        side, stride = (3, 1) if small else (7, 2)
        self.conv1 = nn.Conv2d(channels, 64, side, stride, padding=side // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        before = 64
        for number, count in enumerate(blocks):
            width, rest = 64 * 2**number, []
            for index in range(count):
                step = 2 if number and not index else 1
                rest.append(_ResidualBlock(before, width, step, bottleneck=bottleneck))
                before = width * (4 if bottleneck else 1)
            self.add_module(f"layer{number + 1}", nn.Sequential(*rest))
        self.fc = nn.Linear(before, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for number in range(1, 5):
            x = self.get_submodule(f"layer{number}")(x)
        return cast("Tensor", self.fc(x.mean((2, 3))))


_RESNETS: dict[str, dict[str, Any]] = {
    "resnet18": {"blocks": (2, 2, 2, 2)},
    "resnet34": {"blocks": (3, 4, 6, 3)},
    "resnet50": {"blocks": (3, 4, 6, 3), "bottleneck": True},
    "resnet101": {"blocks": (3, 4, 23, 3), "bottleneck": True},
}
BUILTIN: dict[str, Callable[[int, int], nn.Module]] = {
    "convnet3": ConvNet,
    **{f"resnet{6 * n + 2}": partial(CifarResNet, depth=n) for n in (3, 5, 7, 9, 18)},
    **{name: partial(ResNet, **shape) for name, shape in _RESNETS.items()},
    **{f"{name}-3x3": partial(ResNet, **shape, small=True) for name, shape in _RESNETS.items()},
}


def build(name: str, classes: int, channels: int, *, pretrained: bool = False) -> nn.Module:
    """A network that maps (N, channels, H, W) images to (N, classes) logits.

    Args:
        name: a built-in network, or ``torchvision:NAME``, ``timm:NAME`` or ``hf:REPOSITORY``.
        classes: number of outputs.
        channels: input channels.
        pretrained: take the provider's published weights (it downloads them).

    Raises:
        UsageError: the name is unknown, or its provider is not installed.
    """
    provider, colon, rest = name.partition(":")
    try:
        if colon and provider in _PROVIDERS:
            return _PROVIDERS[provider](rest, classes, channels, pretrained)
        if name in BUILTIN and not pretrained:
            return BUILTIN[name](classes, channels)
    except ImportError as error:
        raise UsageError(
            f"The network '{name}' needs a package that cannot be imported: {error}.",
            hint=f"Install the provider ('{provider}') beside this package.",
            code="missing-provider",
        ) from error
    except (ValueError, RuntimeError, OSError) as error:
        raise UsageError(
            f"The provider '{provider}' cannot make the network '{rest}': {error}.",
            hint="Check the name in the provider's own list of models.",
            code="unknown-backbone",
        ) from error
    if name in BUILTIN:
        raise UsageError(
            f"There are no published weights for the built-in network '{name}'.",
            hint="Give the path of a weights file.",
            code="no-weights",
        )
    raise UsageError(
        f"There is no network named '{name}'.",
        hint=f"Built in: {', '.join(BUILTIN)}; others as torchvision:NAME, timm:NAME or hf:NAME.",
        code="unknown-backbone",
    )


def embed(model: nn.Module, x: Tensor) -> Tensor:
    """Features of images: what the last linear layer of a classifier is given.

    Args:
        model: a network that maps images to logits.
        x: (N, channels, H, W).

    Returns:
        (N, D).

    Raises:
        UsageError: the network has no linear layer, or gives it more than one vector an image.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    given: list[Tensor] = []
    if layers:
        hook = layers[-1].register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
        try:
            model(x)
        finally:
            hook.remove()
    if not given or given[-1].ndim != 2 or len(given[-1]) != len(x):
        raise UsageError(
            f"The network {type(model).__name__} does not end in a linear layer that is given one "
            "vector an image.",
            hint="Choose a classifier such as resnet20, timm:resnet50 or torchvision:vit_b_16.",
            code="no-features",
        )
    return given[-1]


def feature_maps(model: nn.Module, x: Tensor) -> Tensor:
    """The last map that a network makes of images, where each place still stands for one.

    That is the last output of a module with several places: (N, D, h, w), or (N, T, D) of a
    transformer, of whose T tokens the last square number are patches.

    Args:
        model: a network that maps images to logits.
        x: (N, channels, H, W).

    Returns:
        (N, D, h, w).

    Raises:
        UsageError: there is no such output.
    """
    found: list[Tensor] = []

    def look(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor) and len(output) == len(x):
            places = output.shape[2:].numel() if output.ndim == 4 else output.shape[1]
            if output.ndim in {3, 4} and places > 1:
                found[:] = [output]

    hooks = [module.register_forward_hook(look) for module in model.modules()]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise UsageError(
            f"The network {type(model).__name__} makes no map of its images.",
            hint="Choose a network such as resnet20, timm:resnet50 or torchvision:vit_b_16, and "
            "images that are large enough for it.",
            code="no-features",
        )
    if found[0].ndim == 4:
        return found[0]
    tokens = found[0]
    side = math.isqrt(tokens.shape[1])
    patches = tokens[:, tokens.shape[1] - side * side :]
    return patches.transpose(1, 2).reshape(len(x), -1, side, side)


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def in_stages(model: nn.Module) -> dict[str, nn.Module]:
    """A classifier cut where its maps change size: each stage is a function of the one before it.

    The stages hold the network's own layers, by their names in a ResNet (``stem``, ``layer1`` and
    so on, ``head``) or ``block1`` to ``head`` of a ConvNet.

    Args:
        model: a network that maps images (N, channels, H, W) to logits.

    Raises:
        UsageError: it is of another family.
    """
    if isinstance(model, ConvNet):
        layers = list(model.features)
        starts = [0, *(i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d))]
        ends = [*starts[1:], len(layers)]
        parts = [nn.Sequential(*layers[lo:hi]) for lo, hi in zip(starts, ends, strict=True)]
        stages: dict[str, nn.Module] = {f"block{n}": part for n, part in enumerate(parts, 1)}
        return {**stages, "head": nn.Sequential(_Mean(), model.linear)}
    own = dict(model.named_children())
    names = [name for name in own if name.startswith("layer") and name[5:].isdigit()]
    last = own.get("fc", own.get("linear"))
    if not names or last is None or "conv1" not in own or "bn1" not in own:
        raise UsageError(
            f"The network {type(model).__name__} has no stages that are known here.",
            hint="Choose a ResNet, such as resnet20 or torchvision:resnet50, or convnet3.",
            code="no-stages",
        )
    pool = [own["maxpool"]] if "maxpool" in own else []
    stem = nn.Sequential(own["conv1"], own["bn1"], nn.ReLU(), *pool)
    return {
        "stem": stem,
        **{name: own[name] for name in names},
        "head": nn.Sequential(_Mean(), last),
    }


def load_weights(model: nn.Module, arrays: Mapping[str, npt.NDArray[Any]], where: str) -> None:
    """Put a state dict of plain arrays into ``model``; every name and shape must fit.

    Raises:
        UsageError: names are missing or left over, or a shape differs.
    """
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    # Counters of batches are left out by older files and are not used in evaluation.
    needed = {name for name in own if not name.endswith("num_batches_tracked")}
    other = sorted(n for n in own if n in arrays and arrays[n].shape != own[n])
    problems = {
        "missing": sorted(needed - set(arrays)),
        "not in the network": sorted(set(arrays) - set(own)),
        "of another shape": [f"{n} {_by(arrays[n].shape)} for {_by(own[n])}" for n in other],
    }
    if any(problems.values()):
        found = "; ".join(
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
            for what, names in problems.items()
            if names
        )
        raise UsageError(
            f"The weights do not fit the network: {found}.",
            hint="Choose the backbone, the data set's classes and the channels that they were made "
            "for.",
            code="weights-mismatch",
            where=where,
        )
    state = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    model.load_state_dict(state, strict=False)


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a number"


def _torchvision(name: str, classes: int, channels: int, pretrained: bool) -> nn.Module:
    from torchvision.models import get_model

    _need_rgb(channels)
    if pretrained:
        return cast("nn.Module", get_model(name, weights="DEFAULT"))
    return cast("nn.Module", get_model(name, weights=None, num_classes=classes))


def _timm(name: str, classes: int, channels: int, pretrained: bool) -> nn.Module:
    from timm import create_model

    made = create_model(name, pretrained=pretrained, num_classes=classes, in_chans=channels)
    return cast("nn.Module", made)


class _Logits(nn.Module):
    """A transformers classifier that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.model(pixel_values=x).logits)


def _hf(name: str, classes: int, channels: int, pretrained: bool) -> nn.Module:
    from transformers import (
        AutoConfig,
        AutoModelForImageClassification,
    )

    _need_rgb(channels)
    if pretrained:
        return _Logits(AutoModelForImageClassification.from_pretrained(name, use_safetensors=True))
    config = AutoConfig.from_pretrained(name, num_labels=classes)
    return _Logits(AutoModelForImageClassification.from_config(config))


def _need_rgb(channels: int) -> None:
    if channels != 3:
        raise ValueError(f"it takes images of 3 channels, not {channels}")


_PROVIDERS: dict[str, Callable[[str, int, int, bool], nn.Module]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "hf": _hf,
}
