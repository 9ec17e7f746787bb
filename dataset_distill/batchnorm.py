"""Distance of a batch's statistics from those that a network's BatchNorm layers remember."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from pipeline.errors import UsageError

Targets = Sequence[tuple[Tensor, Tensor]]
"""Mean and variance for the input of each layer, in the order of the network's modules."""


class BatchNormMatching(nn.Module):
    """A frozen copy of a network that measures the inputs of its BatchNorm layers.

    For the input a_l of each layer, with mean and biased variance over batch and space:
    r_l = ||target_var - var||_2 + ||target_mean - mean||_2; the sum of r_l, the first layer times
    ``first_multiplier``. Targets are the layers' running statistics, or those given. Source: SRe2L
    (Yin et al., 2023), equation 5, as CDA uses it; with statistics of one class as targets and
    images of that class in the batch, LPLD (Xiao and He, "Are Large-scale Soft Labels Necessary for
    Large-scale Dataset Distillation?", 2024).

    Normalisation and measurement are one operation with a gradient of its own: what is derived
    piece by piece goes through every activation several times more.

    Args:
        network: one that maps images (B, C, H, W) to logits, in evaluation mode.
        first_multiplier: weight of the first layer that is run.
        targets: other statistics to match; of other BatchNorm networks they have other lengths.

    Raises:
        UsageError: the network has no BatchNorm2d layer.
    """

    def __init__(
        self, network: nn.Module, first_multiplier: float, targets: Targets | None = None
    ) -> None:
        super().__init__()
        network = copy.deepcopy(network).eval().requires_grad_(requires_grad=False)
        layers = bn_layers(network)
        wanted = targets or [running_statistics(layer) for layer in layers]
        self._terms: list[Tensor] = []
        self._first_multiplier = first_multiplier
        measured = {
            id(layer): _Measured(layer, self._terms, *target)
            for layer, target in zip(layers, wanted, strict=True)
        }
        for parent in list(network.modules()):
            for name, child in list(parent.named_children()):
                if id(child) in measured:
                    setattr(parent, name, measured[id(child)])
        # A network that is one BatchNorm layer has no parent to put it into.
        self._network = measured.get(id(network), network)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, classes) float32 and the weighted sum, a scalar, for images (B, C, H, W)."""
        self._terms.clear()
        kind = x.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            logits = self._network(x.contiguous(memory_format=torch.channels_last))
        terms = torch.stack(self._terms)
        loss = terms.sum() + (self._first_multiplier - 1) * terms[0]
        return logits if logits.dtype == torch.float64 else logits.float(), loss


def bn_layers(network: nn.Module) -> list[nn.BatchNorm2d]:
    """A network's BatchNorm layers that remember statistics.

    Raises:
        UsageError: it has none.
    """
    found = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    layers = [layer for layer in found if layer.running_mean is not None]
    if not layers:
        raise UsageError(
            f"The teacher, a {type(network).__name__}, has no BatchNorm layers, and the synthesis "
            "matches their statistics.",
            hint="Choose a network with BatchNorm: --teacher-backbone resnet18, resnet18-3x3 for "
            "small images, torchvision:resnet50 and the like. Transformers and ConvNeXt have none.",
            code="no-batchnorm",
        )
    return layers


def running_statistics(layer: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a layer remembers: mean and variance by channel."""
    return cast("Tensor", layer.running_mean), cast("Tensor", layer.running_var)


class _Measured(nn.Module):
    """A BatchNorm layer in evaluation mode that adds a term to ``terms`` whenever it is run."""

    def __init__(
        self, layer: nn.BatchNorm2d, terms: list[Tensor], mean: Tensor, variance: Tensor
    ) -> None:
        super().__init__()
        self._terms = terms
        own_mean, own_variance = running_statistics(layer)
        # What a subclass does beside normalising is not known: it is only measured.
        self.rest = nn.Identity() if type(layer) is nn.BatchNorm2d else layer
        scale, shift = torch.ones_like(own_mean), own_mean.clone()
        if type(layer) is nn.BatchNorm2d:
            weight = layer.weight if layer.affine else torch.ones_like(own_mean)
            scale = weight / (own_variance + layer.eps).sqrt()
            shift = layer.bias if layer.affine else torch.zeros_like(own_mean)
        self.register_buffer("centre", own_mean.clone())
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("shift", shift.detach().clone())
        self.register_buffer("mean", mean.clone().to(own_mean))
        self.register_buffer("variance", variance.clone().to(own_variance))

    def forward(self, x: Tensor) -> Tensor:
        y, term = _NormaliseAndMeasure.apply(  # type: ignore[no-untyped-call]
            x, self.centre, self.scale, self.shift, self.mean, self.variance
        )
        self._terms.append(term)
        return cast("Tensor", self.rest(y))


class _NormaliseAndMeasure(torch.autograd.Function):
    """``shift + scale * (x - centre)``, and the distance of the statistics of x from the target.

    Sums are of x - centre, which is near 0 on average: sums of x would lose digits. The statistics'
    gradient with respect to x is affine in x, and needs nothing but what the forward pass knows.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, var: Tensor
    ) -> tuple[Tensor, Tensor]:
        # In float32 at least: bfloat16 is too coarse for a variance.
        wide = x if x.dtype == torch.float64 else x.float()
        away = wide - centre.view(_C)
        count = x.numel() // x.shape[1]
        offset = away.sum(_OVER) / count
        # Not var_mean, which takes ten times as long on a CPU.
        variance = torch.linalg.vector_norm(away, dim=_OVER).square() / count - offset.square()
        to_mean, to_var = mean - centre - offset, var - variance
        far_mean, far_var = (torch.linalg.vector_norm(v) for v in (to_mean, to_var))
        tiny = torch.finfo(wide.dtype).tiny
        slope = to_var * (-2 / count) / far_var.clamp(min=tiny)
        constant = to_mean * (-1 / count) / far_mean.clamp(min=tiny) - slope * offset
        ctx.save_for_backward(away.to(x.dtype), slope, constant, scale)
        y = torch.addcmul(shift.view(_C), away, scale.view(_C)).to(x.dtype)
        return y, far_mean + far_var

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> Any:
        of_y, of_term = gradients
        away, slope, constant, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        of_x = torch.addcmul((of_term * constant).view(_C), away, (of_term * slope).view(_C))
        of_x.addcmul_(of_y, scale.view(_C))
        return of_x.to(of_y.dtype), None, None, None, None, None


_C, _OVER = (1, -1, 1, 1), (0, 2, 3)
