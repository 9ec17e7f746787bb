"""What lies below a folder, as digests."""

from __future__ import annotations

import hashlib
from pathlib import Path

WORK = ".run"


def tree_digest(path: Path) -> dict[str, str]:
    """SHA-256 (hex) of every file below ``path`` by its relative path.

    The folder ``.run`` directly below ``path`` is left out: it is the run's own memory, not part
    of its output. Two runs of one configuration on one input give equal dictionaries.
    """
    found = {}
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path)
        if file.is_file() and relative.parts[0] != WORK:
            found[relative.as_posix()] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found
