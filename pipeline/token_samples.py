"""Token stores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.epoch_order import Rows
from pipeline.errors import UsageError
from pipeline.image_tensors import labels_of
from pipeline.loaders import TorchSamples, items_of
from pipeline.samples import Samples
from pipeline.storage.artifact import Artifact, ArtifactSource
from pipeline.storage.shard_reader import Places
from pipeline.tensors import to_numpy
from pipeline.tokenizers.tokenizer import Tokenizer
from pipeline.tokenizers.tokens import TokenForm, Tokens


class TokenSamples(Samples):
    """The tokens of a data set's images; they are held, packed.

    Attributes:
        form: what a token is.
        tokenizer: digest of the tokenizer that made them.
        views: how many there are of each image.
    """

    kind = "tokens"

    def __init__(self, artifact: Artifact, split: Artifact, place: str) -> None:
        source, told = ArtifactSource(split), artifact.manifest["tokens"]
        tables = list(source.tables())
        table = pa.concat_tables(tables)
        keys = table["key"].combine_chunks()
        places = Places.counted([len(part) for part in tables], keys)
        super().__init__(source, place=place, artifact=artifact, places=places)
        names = ("kind", "bits", "vocabulary", "max_tokens")
        self.form = TokenForm(**{name: told[name] for name in names})
        self.tokenizer: str = artifact.manifest["tokenizer"]["digest"]
        self._labels = labels_of(table)
        self._lengths = torch.from_numpy(to_numpy(table["length"]).astype(np.int64))
        self._packed = to_numpy(table["tokens"])
        self.views = int(self._lengths.shape[1])

    @property
    def _every(self) -> Rows:
        return self.rows_of(np.arange(len(self)))

    @property
    def labels(self) -> Tensor:
        """Class of each image, int64 (n,); -1 where there is none."""
        return self._labels[self._every]

    @property
    def lengths(self) -> Tensor:
        """Tokens of each image in each view, int64 (n, V)."""
        return self._lengths[self._every]

    def labels_and_keys(self, rows: Rows) -> tuple[Tensor, list[str]]:
        """Labels int64 (B,) and keys of some images."""
        return self._labels[self.rows_of(rows)], [self.keys[row] for row in rows.tolist()]

    def tokens(self, rows: Sequence[int] | Rows, view: int = 0) -> Tokens:
        """Tokens of some images, as :meth:`Tokenizer.decode` takes them.

        Raises:
            RunError: they are damaged.
        """
        own = self.rows_of(np.asarray(rows, np.int64)).tolist()
        lengths = self._lengths[own, view]
        packed = [
            self._packed[row, view, : self.form.bytes_of(length)].tobytes()
            for row, length in zip(own, lengths.tolist(), strict=True)
        ]
        return Tokens.unpack(packed, lengths.numpy(), self.form)

    def check(self, tokenizer: Tokenizer) -> None:
        """Refuse a tokenizer that did not make these tokens.

        Raises:
            UsageError: it is another one.
        """
        if tokenizer.digest != self.tokenizer:
            raise UsageError(
                f"These tokens were made by another tokenizer ({self.tokenizer[:12]}, and this one "
                f"is {tokenizer.digest[:12]}): decoded with this one they are noise.",
                hint="Load the tokenizer that the run was given.",
                code="other-tokenizer",
            )

    def to_torch(self, *, ragged: bool = False) -> TokenTensors:  # type: ignore[override]
        """A torch data set of (tokens, length, label, key).

        Args:
            ragged: give the tokens of a batch one after the other, (sum of lengths, ...), and not
                filled up with zeros to the longest that there may be.
        """
        return TokenTensors(self, ragged)


class TokenBatch(NamedTuple):
    """Tokens of images.

    Attributes:
        tokens: int64 ids (B, N) or uint8 bits (B, N, bits), with zeros behind the length: a loss
            leaves them out. Of ragged batches (T, ...), with T the sum of the lengths.
        length: (B,) int64.
        label: (B,) int64; -1 where there is none.
        key: B strings.
    """

    tokens: Tensor
    length: Tensor
    label: Tensor
    key: list[str]


class TokenTensors(TorchSamples[TokenBatch]):
    """Item i is the tokens of image i. Epoch e shows view e mod V of every image."""

    samples: TokenSamples

    def __init__(self, samples: TokenSamples, ragged: bool) -> None:
        super().__init__(samples)
        self.ragged = ragged

    def batch(self, rows: Rows, epoch: int) -> TokenBatch:
        found = self.samples.tokens(rows, epoch % self.samples.views)
        values = found.values[found.kept] if self.ragged else found.values
        labels, keys = self.samples.labels_and_keys(rows)
        return TokenBatch(values, found.lengths, labels, keys)

    def __getitems__(self, rows: Sequence[int]) -> list[TokenBatch]:
        """Several items at once, as a ``DataLoader`` asks for them."""
        found = self.batch(np.asarray(rows, np.int64), self.epoch)
        if not self.ragged:
            return items_of(found)
        parts = torch.split(found.tokens, found.length.tolist())
        return [
            item._replace(tokens=part)
            for item, part in zip(items_of(found._replace(tokens=found.length)), parts, strict=True)
        ]
