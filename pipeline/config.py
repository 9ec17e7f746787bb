"""Configuration as typed, frozen objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from pipeline.errors import UsageError

C = TypeVar("C", bound=BaseModel)


class Config(BaseModel):
    """Base of every configuration: frozen, and an unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TrainConfig(Config):
    """How the training loop optimises a model."""

    epochs: int = Field(default=30, ge=1)
    batch_size: int = Field(default=128, ge=1)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(default=1e-3, gt=0, description="peak learning rate, decayed by a cosine")
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_epochs: int = Field(default=0, ge=0, description="in which the learning rate grows")
    zeta: float = Field(
        default=1.0,
        ge=1,
        description="the cosine ends at this multiple of the epochs: 1 at zero, 2 at half",
    )
    ema: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="decay of the averaged weights that are kept; 0: the last ones",
    )
    evaluations: int = Field(
        default=1, ge=1, description="how often it is measured, the last time at the end"
    )
    workers: int = Field(
        default=1, ge=1, description="processes that share every batch; the weights depend on it"
    )


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``over`` put in its place, mapping by mapping."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """``["recover.lr=0.1", ...]`` as a nested mapping; values are read as YAML scalars.

    Raises:
        UsageError: an assignment is not of the form ``a.b=value``.
    """
    result: dict[str, Any] = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not all(path.split(".")):
            raise UsageError(
                f"'--set {assignment}' is not an assignment.",
                hint="Write it as --set section.name=value, for example --set recover.lr=0.1.",
                code="bad-assignment",
            )
        try:
            value: Any = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        for name in reversed(path.split(".")):
            value = {name: value}
        result = merge(result, value)
    return result


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UsageError: the file cannot be read, is not YAML or holds something else.
    """
    hint = "Start from what --print-config prints."
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).replace("\n", " ")
        raise UsageError(
            f"The configuration file cannot be read: {reason}.",
            hint=hint,
            code="bad-config-file",
            where=str(path),
        ) from error
    if not isinstance(values, dict):
        raise UsageError(
            "The configuration file does not hold a mapping of names to values.",
            hint=hint,
            code="bad-config-file",
            where=str(path),
        )
    return values


def build(kind: type[C], values: Mapping[str, Any]) -> C:
    """``kind(**values)`` with messages meant for a person.

    Raises:
        UsageError: a name is unknown or a value is out of its range.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, item['loc'])) or 'configuration'}: {item['msg']}"
            f" (given: {item['input']!r})"
            for item in error.errors(include_url=False)
        ]
        raise UsageError(
            f"The configuration does not hold: {'; '.join(problems)}.",
            hint="--print-config shows every name with its present value.",
            code="bad-config",
        ) from error


def preset_of(kind: type[Config], values: Mapping[str, Any]) -> str:
    """The preset that ``values`` name for a configuration, or its own where they name none.

    Raises:
        UsageError: there is no such preset.
    """
    field = kind.model_fields["preset"]
    annotation: Any = field.annotation
    only = create_model("Preset", __base__=Config, preset=(annotation, field))
    given = {"preset": values["preset"]} if "preset" in values else {}
    return str(build(only, given).model_dump()["preset"])


def dump_yaml(config: BaseModel) -> str:
    """``config`` as a YAML document that :func:`read_yaml` takes back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
