"""Tokens of images, and their bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.errors import RunError

VERSION = 1
"""Of the packing: token after token from bit 0 on, low bits of a byte first, zeros at the end."""
MOST_ID_BITS = 62


@dataclass(frozen=True)
class TokenForm:
    """What one token is.

    Attributes:
        kind: ``bits`` for vectors of 0 and 1, ``ids`` for numbers below ``vocabulary``.
        bits: bits of one token on disk.
        vocabulary: number of different tokens; ``None`` where only bits are told apart.
        max_tokens: tokens of an image at most.
    """

    kind: Literal["bits", "ids"]
    bits: int
    vocabulary: int | None
    max_tokens: int

    def bytes_of(self, length: int) -> int:
        """Bytes that ``length`` tokens take, packed."""
        return -(-length * self.bits // 8)


@dataclass(frozen=True)
class Tokens:
    """Tokens of n images. What lies behind an image's length means nothing.

    Attributes:
        values: uint8 (n, N, B) of 0 and 1, or int64 (n, N).
        lengths: int64 (n,), from 1 to N.
        form: what a token is.
    """

    values: Tensor
    lengths: Tensor
    form: TokenForm

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def bits(self) -> Tensor:
        """uint8 (n, N, B): bit j of an id has the value 2^j."""
        if self.form.kind == "bits":
            return self.values
        places = torch.arange(self.form.bits, device=self.values.device)
        return ((self.values[..., None] >> places) & 1).to(torch.uint8)

    @property
    def kept(self) -> Tensor:
        """Bool (n, N): which tokens count."""
        return first(self.values.shape[1], self.lengths)

    def cut(self, lengths: Tensor | int) -> Tokens:
        """The first tokens of each image: all of them share a length, or (n,) has one for each."""
        wanted = torch.as_tensor(lengths, device=self.lengths.device).expand(len(self))
        return Tokens(self.values, torch.minimum(wanted, self.lengths), self.form)

    def pack(self) -> list[bytes]:
        """The bytes of each image: tokens in order, each from bit 0 on, zeros at the end."""
        bits = torch.where(self.kept[..., None], self.bits, 0).cpu().numpy()
        packed = np.packbits(bits.reshape(len(self), -1), axis=1, bitorder="little")
        sizes = [self.form.bytes_of(length) for length in self.lengths.tolist()]
        return [row[:size].tobytes() for row, size in zip(packed, sizes, strict=True)]

    @classmethod
    def unpack(cls, rows: Sequence[bytes], lengths: npt.ArrayLike, form: TokenForm) -> Tokens:
        """What :meth:`pack` was given, with zeros behind each image's length.

        Raises:
            RunError: a row's size or padding does not belong to its length, or an id is not
                below the vocabulary.
        """
        numbers = np.asarray(lengths, np.int64)
        size = form.bytes_of(form.max_tokens)
        data = np.zeros((len(rows), size), np.uint8)
        for row, (packed, length) in enumerate(zip(rows, numbers.tolist(), strict=True)):
            if not 1 <= length <= form.max_tokens or len(packed) != form.bytes_of(length):
                raise _damaged(f"{len(packed)} bytes do not hold {length} tokens of an image")
            data[row, : len(packed)] = np.frombuffer(packed, np.uint8)
        flat = np.unpackbits(data, axis=1, bitorder="little")
        if flat[np.arange(flat.shape[1]) >= numbers[:, None] * form.bits].any():
            raise _damaged("what follows the last token of an image is not zero")
        whole = flat[:, : form.max_tokens * form.bits]
        bits = torch.from_numpy(whole.reshape(len(rows), form.max_tokens, form.bits).copy())
        return cls.of_bits(bits, torch.from_numpy(numbers.copy()), form)

    @classmethod
    def of_bits(cls, bits: Tensor, lengths: Tensor, form: TokenForm) -> Tokens:
        """From bits uint8 (n, N, B), whatever the form."""
        if form.kind == "bits":
            return cls(bits, lengths, form)
        # Summed as integers: a float loses the low bits of a long id.
        places = torch.arange(form.bits, device=bits.device)
        ids = (bits.to(torch.int64) << places).sum(-1)
        if form.vocabulary is not None and bool((ids >= form.vocabulary).any()):
            raise _damaged(f"an id is not below the vocabulary of {form.vocabulary}")
        return cls(ids, lengths, form)


def first(count: int, lengths: Tensor) -> Tensor:
    """Bool (n, count): which of ``count`` places are among the first ``lengths`` (n,)."""
    return torch.arange(count, device=lengths.device) < lengths[:, None]


def form_of_vocabulary(vocabulary: int, max_tokens: int) -> TokenForm:
    """The form of ids below ``vocabulary``, in as few bits as hold them."""
    return TokenForm("ids", max(1, (vocabulary - 1).bit_length()), vocabulary, max_tokens)


def form_of_bits(bits: int, max_tokens: int) -> TokenForm:
    """The form of vectors of bits; of up to 62 bits they are ids as well."""
    return TokenForm("bits", bits, 1 << bits if bits <= MOST_ID_BITS else None, max_tokens)


def _damaged(problem: str) -> RunError:
    return RunError(
        f"These tokens are damaged: {problem}.",
        hint="Tokenize the images again, or check the files with pipeline verify.",
        code="damaged-tokens",
    )
