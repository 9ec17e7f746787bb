"""Named plug-ins, loaded when they are first used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar, cast

from pipeline.errors import UsageError

T = TypeVar("T")


class Registry(Generic[T]):
    """Names mapped to objects given as lazy ``module:attribute`` strings.

    Other distributions add entries through the entry-point group ``pipeline.<kind>s``; built-in
    names win. Nothing is imported before :meth:`get`, so listing names is cheap.

    Args:
        kind: what the entries are, in the singular (``source``, ``recipe``); used in messages.
        builtin: the names this package provides.
    """

    def __init__(self, kind: str, builtin: Mapping[str, str]) -> None:
        self.kind = kind
        self._builtin = dict(builtin)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._builtin, *self._external()}))

    def __contains__(self, name: object) -> bool:
        return name in self._builtin or name in self._external()

    def get(self, name: str) -> T:
        """Import and return the entry ``name``.

        Raises:
            UsageError: no entry has that name; the message offers the nearest ones.
        """
        if name in self._builtin:
            module, _, attribute = self._builtin[name].partition(":")
            return cast("T", getattr(import_module(module), attribute))
        external = self._external()
        if name in external:
            return cast("T", external[name].load())
        near = get_close_matches(name, list(self), n=1)
        guess = f"Did you mean '{near[0]}'? " if near else ""
        raise UsageError(
            f"There is no {self.kind} named '{name}'.",
            hint=f"{guess}Known: {', '.join(self)}.",
            code=f"unknown-{self.kind}",
        )

    def _external(self) -> dict[str, Any]:
        return {entry.name: entry for entry in entry_points(group=f"pipeline.{self.kind}s")}
