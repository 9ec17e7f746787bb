"""CIFAR-10 and CIFAR-100 as published: the binary batches and the pickled ones of "python" version.

A pickle is a program. Here it is never run: a small interpreter knows the few instructions that
these files consist of, and where one names a function or class it finds an inert mark instead.
https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

SIDE = 32
PIXEL_BYTES = 3 * SIDE * SIDE
CLASSES = {1: (10,), 2: (20, 100)}
"""Number of classes of each label byte of a record: CIFAR-10; CIFAR-100 coarse and fine."""

MAX_PICKLE_BYTES = 256 * 2**20
MAX_INSTRUCTIONS = 10**6
"""The largest file, the training set of CIFAR-100, has some 200,000 in 148 MiB."""
MAX_KEYS = 16


def read_binary(data: bytes, label_bytes: Literal[1, 2]) -> tuple[Images, Labels]:
    """The images and labels of a batch of the binary version.

    Args:
        data: the whole file: records of labels and three planes of 32 x 32 bytes.
        label_bytes: 1 for CIFAR-10; 2 for CIFAR-100, of which the fine label is given.

    Returns:
        uint8 N x 32 x 32 x 3 and int64 N.

    Raises:
        ValueError: the file is no whole number of records or has a label that is no class.
    """
    length = label_bytes + PIXEL_BYTES
    if not data or len(data) % length:
        raise ValueError(f"{len(data)} bytes are no whole number of records of {length} bytes")
    records = np.frombuffer(data, np.uint8).reshape(-1, length)
    if (records[:, :label_bytes] >= CLASSES[label_bytes]).any():
        raise ValueError("a record's label is no class of CIFAR: this is another kind of file")
    return _images(records[:, label_bytes:]), records[:, label_bytes - 1].astype(np.int64)


def read_pickled_batch(data: bytes) -> tuple[Images, Labels]:
    """The images and labels of a batch of the "python" version: ``data_batch_1``, ``train``.

    Returns:
        uint8 N x 32 x 32 x 3 and int64 N, for CIFAR-100 the fine labels.

    Raises:
        ValueError: as ``read_pickled``, or the file is no batch.
    """
    content = read_pickled(data)
    name, classes = ("fine_labels", 100) if "fine_labels" in content else ("labels", 10)
    match content:
        case {"data": np.ndarray() as pixels, **others} if isinstance(others.get(name), list):
            labels: Any = others[name]
        case _:
            raise ValueError("the pickle holds no batch: it lacks 'data' or 'labels'")
    if len(labels) != len(pixels):
        raise ValueError(f"the batch has {len(pixels)} images and {len(labels)} labels")
    if not all(type(label) is int and 0 <= label < classes for label in labels):
        raise ValueError(f"a label of the batch is no number from 0 to {classes - 1}")
    return _images(pixels), np.array(labels, np.int64)


def read_class_names(data: bytes) -> tuple[str, ...]:
    """The class names in ``batches.meta`` or, for CIFAR-100 the fine ones, in ``meta``.

    Raises:
        ValueError: as ``read_pickled``, or the file holds no names.
    """
    content = read_pickled(data)
    names = content.get("fine_label_names", content.get("label_names"))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("the pickle holds no class names")
    return tuple(names)


def read_pickled(data: bytes) -> dict[str, object]:
    """What a pickled CIFAR file holds; nothing in it is executed or imported.

    Args:
        data: the whole file: a dictionary pickled by protocol 2 (as published), 3 or 4.

    Returns:
        Text, numbers, lists of either, and for ``data`` a read-only uint8 array N x 3072.

    Raises:
        ValueError: the pickle is damaged or holds anything else.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise ValueError(f"the pickle has {len(data)} bytes, more than {MAX_PICKLE_BYTES}")
    try:
        content = _interpret(data)
        if type(content) is not dict:
            raise ValueError("it holds no dictionary")
        return {_text(key): _value(value) for key, value in content.items()}
    except (IndexError, KeyError) as error:
        raise ValueError("the pickle is no CIFAR file: it takes what is not there") from error
    except (ValueError, DeprecationWarning) as error:  # an odd escape, where warnings are errors
        raise ValueError(f"the pickle is no CIFAR file: {error}") from error


def _interpret(data: bytes) -> object:
    """The value that the pickle leaves on its stack."""
    machine = _Machine(len(data))
    place = 0
    for count, (instruction, argument, position) in enumerate(pickletools.genops(data)):
        step = _STEPS.get(instruction.name)
        if step is None or count >= MAX_INSTRUCTIONS:
            raise ValueError(f"instruction {count} ({instruction.name}) is not admitted")
        step(machine, argument)
        place = position or 0
    if place + 1 != len(data) or len(machine.stack) != 1 or machine.below:
        raise ValueError("it does not end with one value")
    return machine.stack[0]


class _Mark:
    """What stands for a function or class that a pickle names."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Array:
    """What stands for an array: its bytes, once they are known."""

    def __init__(self) -> None:
        self.content: Images | None = None


class _Dtype:
    """What stands for the element type uint8, the only one."""


_RECONSTRUCT = _Mark("numpy.core.multiarray _reconstruct")
_NDARRAY = _Mark("numpy ndarray")
_DTYPE = _Mark("numpy dtype")
_ENCODE = _Mark("_codecs encode")
_MARKS = {mark.name: mark for mark in (_RECONSTRUCT, _NDARRAY, _DTYPE, _ENCODE)}
_MARKS["numpy._core.multiarray _reconstruct"] = _RECONSTRUCT


class _Machine:
    """The stack of a pickle's instructions; wrong stacks raise ``IndexError`` or ``ValueError``."""

    def __init__(self, text_budget: int) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each mark
        self.memo: dict[int, Any] = {}
        self.text_left = text_budget

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def push_bytes(self, text: str) -> None:
        self.push(text.encode("latin-1"))  # as pickletools decodes strings of Python 2

    def mark(self, _: object) -> None:
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.below.pop()
        return items

    def remember(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def tuple_of(self, count: int) -> None:
        items = [self.stack.pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("items are put into what is no list")
        self.stack[-1].extend(items)

    def update(self, items: list[Any]) -> None:
        into = self.stack[-1]
        if type(into) is not dict:
            raise ValueError("pairs are put into what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Any other key would be hashed, and a nested one without end.
            if type(key) not in (str, bytes) or len(into) >= MAX_KEYS:
                raise ValueError("a dictionary has a key that is no text or too many keys")
            into[key] = value

    def last_two(self) -> list[Any]:
        second, first = self.stack.pop(), self.stack.pop()
        return [first, second]

    def named(self, name: str) -> None:
        if name not in _MARKS:
            raise ValueError(f"it names {name[:80]!r}")
        self.push(_MARKS[name])

    def named_by_stack(self, _: object) -> None:
        module, name = self.last_two()
        if type(module) is not str or type(name) is not str:
            raise ValueError("a name is no text")
        self.named(f"{module} {name}")

    def reduce(self, _: object) -> None:
        function, arguments = self.last_two()
        if function is _RECONSTRUCT and _equal(arguments, (_NDARRAY, (0,), "b")):
            self.push(_Array())
        elif function is _DTYPE and _equal(arguments, ("u1", 0, 1)):
            self.push(_Dtype())
        elif (
            function is _ENCODE and type(arguments) is tuple and _equal(arguments[1:], ("latin1",))
        ):
            self.push(self.encoded(arguments[0]))
        else:
            raise ValueError("it calls something with other arguments than a CIFAR file")

    def encoded(self, text: object) -> bytes:
        # One string encoded again and again would be many bytes out of few.
        if type(text) is not str or len(text) > self.text_left:
            raise ValueError("its strings are no text or larger than the file")
        self.text_left -= len(text)
        return text.encode("latin-1")

    def build(self, _: object) -> None:
        target, state = self.stack[-2], self.stack.pop()
        if type(target) is _Dtype:
            if not _equal(state, (3, "|", None, None, None, -1, -1, 0)):
                raise ValueError("an array has elements other than uint8")
        elif type(target) is _Array and target.content is None:
            target.content = _content(state)
        else:
            raise ValueError("it sets the state of what has none")


def _content(state: Any) -> Images:
    """The array that the state of an ndarray describes."""
    if type(state) is tuple and len(state) == 5:
        version, shape, dtype, by_column, raw = state
        rows = shape[0] if type(shape) is tuple and shape else None
        plain = _equal(version, 1) and type(by_column) in (bool, int) and type(dtype) is _Dtype
        right = type(rows) is int and type(raw) is bytes and len(raw) == rows * PIXEL_BYTES
        if plain and right and rows and _equal(shape, (rows, PIXEL_BYTES)):
            order: Literal["F", "C"] = "F" if by_column else "C"
            return np.frombuffer(raw, np.uint8).reshape((rows, PIXEL_BYTES), order=order)
    raise ValueError(f"an array is not N x {PIXEL_BYTES} of uint8, or cut short")


def _equal(value: object, wanted: object) -> bool:
    """Equality as deep as ``wanted`` alone; byte strings are text, and truth values numbers."""
    if isinstance(wanted, tuple):
        if not isinstance(value, tuple) or len(value) != len(wanted):
            return False
        return all(map(_equal, value, wanted))
    if type(value) is bytes and type(wanted) is str:
        return value == wanted.encode()
    return value is wanted or (type(value) in (str, int, bool) and value == wanted)


def _value(value: object) -> object:
    if type(value) is _Array and value.content is not None:
        return value.content
    if type(value) is list and all(type(item) is int for item in value):
        return value
    if type(value) is list:
        return [_text(item) for item in value]
    return value if type(value) is int else _text(value)


def _text(value: object) -> str:
    if type(value) is str:
        return value
    if type(value) is bytes:
        return value.decode("utf-8", "backslashreplace")
    raise ValueError(f"it holds a {type(value).__name__} among text")


def _images(rows: npt.NDArray[np.uint8]) -> Images:
    """Rows of three planes as N x 32 x 32 x 3."""
    return np.ascontiguousarray(rows.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))


_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda _machine, _argument: None),
    **dict.fromkeys(("BININT", "BININT1", "BININT2"), _Machine.push),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE"), _Machine.push),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES"), _Machine.push),
    **dict.fromkeys(("BINSTRING", "SHORT_BINSTRING"), _Machine.push_bytes),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, place: m.push(m.memo[place])),
    "MEMOIZE": lambda m, _: m.remember(len(m.memo)),
    "NONE": lambda m, _: m.push(None),
    "INT": _Machine.push,
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "MARK": _Machine.mark,
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "LIST": lambda m, _: m.push(m.since_mark()),
    "TUPLE": lambda m, _: m.push(tuple(m.since_mark())),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "APPEND": lambda m, _: m.extend([m.stack.pop()]),
    "APPENDS": lambda m, _: m.extend(m.since_mark()),
    "SETITEM": lambda m, _: m.update(m.last_two()),
    "SETITEMS": lambda m, _: m.update(m.since_mark()),
    "GLOBAL": _Machine.named,
    "STACK_GLOBAL": _Machine.named_by_stack,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
}
"""What each admitted instruction does."""
