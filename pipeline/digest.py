"""Identities and random seeds that depend on content alone.

The same value gives the same digest in every process, on every machine and in every order of
insertion: nothing here looks at ``id``, ``hash``, the clock or a dictionary's order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel


def canonical(value: Any) -> Any:
    """Reduce ``value`` to plain JSON types.

    A dataclass or model becomes its fields with its class name and, where it has one, its
    ``version``. An object with an ``identity`` string (a source, an artifact) stands for that
    identity, so that where it is stored does not count.
    """
    identity = getattr(value, "identity", None)
    if isinstance(identity, str):
        return {"identity": identity}
    if isinstance(value, BaseModel):
        fields: dict[str, Any] = {name: getattr(value, name) for name in type(value).model_fields}
        return _named(value, fields)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _named(value, {f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("the names of a mapping must be strings; give it an 'identity'")
        return {key: canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"{type(value).__name__} has no canonical form; give it an 'identity'")


def _named(value: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    kind = type(value)
    named = {"type": f"{kind.__module__}.{kind.__qualname__}", "fields": canonical(fields)}
    if version := getattr(kind, "version", None):
        named["version"] = version
    return named


def dumps(value: Any) -> bytes:
    """JSON bytes of the canonical form: sorted keys, two-space indent, final newline."""
    encoder = json.JSONEncoder(sort_keys=True, indent=2, allow_nan=False)
    # Piece by piece: the manifest of a million files is not to be in memory several times.
    data = bytearray()
    for piece in encoder.iterencode(canonical(value)):
        data += piece.encode()
    return bytes(data + b"\n")


def digest(*values: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of ``values``."""
    text = json.dumps([canonical(value) for value in values], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def seed_for(*parts: Any) -> int:
    """A seed in [0, 2**63) made from ``parts``, such as (run seed, step, key)."""
    return int(digest(*parts)[:16], 16) >> 1
