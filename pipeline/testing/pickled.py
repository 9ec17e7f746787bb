"""Objects as another process receives them."""

from __future__ import annotations

import copy
import pickle
from functools import cached_property
from typing import TypeVar

T = TypeVar("T")


def pickled(value: T) -> T:
    """``value`` after a trip through pickle, without what it had cached.

    What is read back are bytes made here, a moment before: nothing from outside is unpickled.
    """
    fresh = copy.copy(value)
    for kind in type(value).__mro__:
        for name, attribute in vars(kind).items():
            if isinstance(attribute, cached_property):
                fresh.__dict__.pop(name, None)
    result: T = pickle.loads(pickle.dumps(fresh))  # noqa: S301
    return result
