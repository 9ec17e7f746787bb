"""Parts that the reports of several recipes have in common."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import version
from typing import Any

import yaml

from pipeline import __version__
from pipeline.report import html_table, paragraph
from pipeline.storage.artifact import ArtifactSource


def accounting(sources: Sequence[ArtifactSource]) -> str:
    """A table of the samples of each step: in, out, filtered, quarantined, and why."""
    rows = []
    for manifest in (source.artifact.manifest for source in sources):
        counts = manifest["counts"]
        sides = (counts["filtered"], counts["quarantined"])
        why = ", ".join(f"{n:,} {reason}" for side in sides for reason, n in sorted(side.items()))
        left_out = [sum(side.values()) for side in sides]
        rows.append((manifest["step"], counts["in"], counts["out"], *left_out, why))
    return html_table(("step", "in", "out", "filtered", "quarantined", "why"), rows)


def provenance(about: Mapping[str, Any], products: Mapping[str, str]) -> str:
    """What the output was made of: data set, seed, identities, versions and configuration."""
    packages = ("torch", "numpy", "zarr", "pyarrow")
    versions = {"pipeline": __version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in packages}
    config = yaml.safe_dump(about["config"], sort_keys=True, allow_unicode=True)
    return "\n".join(
        [
            paragraph(f"Data set {about['dataset']}, seed {about['seed']}."),
            html_table(("product", "identity"), list(products.items())),
            html_table(("package", "version"), list(versions.items())),
            f"<details><summary>Configuration</summary><pre>{escape(config)}</pre></details>",
        ]
    )
