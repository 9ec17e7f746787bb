"""Objects as another process receives them."""

from __future__ import annotations

import copy
import pickle
from functools import cached_property
from typing import TypeVar

T = TypeVar("T")


def pickled(value: T) -> T:
    """A copy of ``value`` made as another process gets it, without what it had cached.

    Raises:
        Exception: it cannot be pickled.
    """
    fresh = copy.copy(value)
    for kind in type(value).__mro__:
        for name, attribute in vars(kind).items():
            if isinstance(attribute, cached_property):
                fresh.__dict__.pop(name, None)
    pickle.dumps(fresh)
    return copy.deepcopy(fresh)  # by the same protocol, and nothing is unpickled
