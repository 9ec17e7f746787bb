"""A hook of mkdocs: docstrings name what they mean by Sphinx' roles, and a reader sees the name."""

from __future__ import annotations

import re
from typing import Any

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):<code>~?(?:[\w.]+\.(?=[A-Za-z_]\w*<))?")


def on_page_content(html: str, **_: Any) -> str:
    """The page with ``:func:`a.b.name``` as ``name``."""
    return ROLE.sub("<code>", html)
