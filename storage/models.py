"""Models on disk: safetensors and a small JSON file that says how to build the network."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import nn

from pipeline import backbones
from pipeline.backbones import ModelSpec
from pipeline.digest import dumps
from pipeline.storage.artifact import Artifact
from pipeline.storage.store import Store

WEIGHTS, SPEC = "weights.safetensors", "network.json"
UNIT = "model"  # the folder of the one model that a fit step makes


def write_model(directory: Path, model: nn.Module, spec: ModelSpec) -> None:
    """Write the weights and the specification into ``directory``."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    (directory / WEIGHTS).write_bytes(save(state))
    (directory / SPEC).write_bytes(dumps(asdict(spec)))


def read_spec(artifact: Artifact) -> ModelSpec:
    """The specification of a fitted model."""
    fields = json.loads(artifact.read(f"{UNIT}/{SPEC}"))
    mean, std = tuple(fields["mean"]), tuple(fields["std"])
    return ModelSpec(fields["backbone"], fields["classes"], fields["channels"], mean, std)


def read_model(artifact: Artifact, device: torch.device) -> nn.Module:
    """The frozen model of an artifact, in evaluation mode; one copy a process and device."""
    return _read(artifact.store, artifact.identity, device)


@lru_cache(maxsize=2)
def _read(store: Store, _identity: str, device: torch.device) -> nn.Module:
    artifact = Artifact.open(store)
    spec = read_spec(artifact)
    model = backbones.build(spec.backbone, spec.classes, spec.channels)
    model.load_state_dict(load(artifact.read(f"{UNIT}/{WEIGHTS}")))
    return model.to(device).eval().requires_grad_(requires_grad=False)
