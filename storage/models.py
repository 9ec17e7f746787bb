"""Models on disk: safetensors and a small JSON file that says how to build the network."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn

from pipeline import backbones
from pipeline.backbones import ModelSpec
from pipeline.digest import digest, dumps
from pipeline.errors import RunError
from pipeline.storage.artifact import Artifact
from pipeline.storage.store import Store

WEIGHTS, SPEC = "weights.safetensors", "network.json"
_HELD = 2**30
"""Bytes of snapshots that a process keeps in memory."""
UNIT = "model"  # the folder of the one model that a fit step makes


def write_model(directory: Path, model: nn.Module, spec: Any) -> None:
    """Write the weights and the specification, a dataclass, into ``directory``."""
    (directory / WEIGHTS).write_bytes(weights_of(model))
    (directory / SPEC).write_bytes(dumps(asdict(spec)))


def weights_of(model: nn.Module) -> bytes:
    """Weights and buffers as safetensors."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    return bytes(save(state))


def snapshot_file(unit: str, epoch: int) -> str:
    """Where an artifact has a unit's weights after an epoch, counted from 1."""
    return f"{unit}/epoch-{epoch:05d}.safetensors"


def read_spec(artifact: Artifact, unit: str = UNIT) -> ModelSpec:
    """The specification of a fitted model."""
    fields = json.loads(artifact.read(f"{unit}/{SPEC}"))
    mean, std = tuple(fields["mean"]), tuple(fields["std"])
    return ModelSpec(fields["backbone"], fields["classes"], fields["channels"], mean, std)


def read_model(artifact: Artifact, device: torch.device, unit: str = UNIT) -> nn.Module:
    """The frozen model of an artifact, in evaluation mode; one copy a process and device."""
    return _read(artifact.store, artifact.identity, device, unit)


@lru_cache(maxsize=8)
def _read(store: Store, _identity: str, device: torch.device, unit: str) -> nn.Module:
    artifact = Artifact.open(store)
    spec = read_spec(artifact, unit)
    model = backbones.build(spec.backbone, spec.classes, spec.channels)
    model.load_state_dict(load(artifact.read(f"{unit}/{WEIGHTS}")))
    return model.to(device).eval().requires_grad_(requires_grad=False)


@dataclass(frozen=True)
class ModelFiles:
    """The two files of a model, wherever they lie; what they hold is what they are.

    Attributes:
        store: the folder.
        config: name of the file that says how to build it.
        weights: name of the file of weights.
        identity: digest of what both hold.
    """

    store: Store
    config: str
    weights: str
    identity: str

    @classmethod
    def of(cls, store: Store, config: str, weights: str) -> ModelFiles:
        """The files as they are now."""
        parts = [hashlib.sha256(store.read(name)).hexdigest() for name in (config, weights)]
        return cls(store, config, weights, _joined(*parts))

    @classmethod
    def fitted(cls, artifact: Artifact) -> ModelFiles:
        """Those of the one model that a fit step made."""
        names = f"{UNIT}/{SPEC}", f"{UNIT}/{WEIGHTS}"
        identity = _joined(*(artifact.files[name].sha256 for name in names))
        return cls(artifact.store, *names, identity)

    def read(self) -> tuple[bytes, bytes]:
        """What the files hold.

        Raises:
            RunError: it is not what it was.
        """
        config, weights = (self.store.read(name) for name in (self.config, self.weights))
        parts = (hashlib.sha256(part).hexdigest() for part in (config, weights))
        if _joined(*parts) != self.identity:
            raise RunError(
                "The model has changed since the run began.",
                hint="Start the run again: what was made with the earlier one stays as it is.",
                code="model-changed",
                where=str(self.store),
            )
        return config, weights


def _joined(config: str, weights: str) -> str:
    """The identity of two files by their SHA-256, hexadecimal."""
    return hashlib.sha256(f"{config} {weights}".encode()).hexdigest()


@dataclass(frozen=True)
class FittedModels:
    """Some models of a fitted artifact, for tasks that ask them while they train another."""

    artifact: Artifact
    units: tuple[str, ...]

    @property
    def identity(self) -> str:
        return digest(self.artifact, self.units)

    def networks(self, device: torch.device) -> list[nn.Module]:
        """The frozen networks, in evaluation mode."""
        return [read_model(self.artifact, device, unit) for unit in self.units]


def snapshots(artifact: Artifact, device: torch.device, unit: str = UNIT) -> Iterator[nn.Module]:
    """One frozen model with a unit's weights after every epoch, one after the other.

    Raises:
        RunError: a file is missing or damaged.
    """
    model = copy.deepcopy(read_model(artifact, device, unit))
    files = {n: e.bytes for n, e in artifact.files.items() if n.startswith(f"{unit}/epoch-")}
    few = sum(files.values()) <= _HELD
    states = _states(artifact.store, artifact.identity, unit) if few else None
    for number, name in enumerate(sorted(files)):
        model.load_state_dict(load(states[number] if states else artifact.read(name)))
        yield model


@lru_cache(maxsize=1)
def _states(store: Store, _identity: str, unit: str) -> tuple[bytes, ...]:
    """The snapshots' bytes: a process meets them once for every shard."""
    artifact = Artifact.open(store)
    names = [name for name in artifact.files if name.startswith(f"{unit}/epoch-")]
    return tuple(artifact.read(name) for name in sorted(names))
