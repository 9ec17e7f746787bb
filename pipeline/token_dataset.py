"""Token stores as torch data sets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.errors import UsageError
from pipeline.storage.artifact import Artifact, ArtifactSource
from pipeline.tensors import to_numpy
from pipeline.tokenizers.tokenizer import Tokenizer
from pipeline.tokenizers.tokens import TokenForm, Tokens


class TokenDataset(Dataset[tuple[Tensor, int, int]]):
    """The tokens of a data set's images: item i is values, length and label of image i.

    Values are int64 ids (N,) or uint8 bits (N, B), with zeros behind the length: a loss leaves them
    out. The label is -1 where there are none. Tokens are held packed.

    Attributes:
        form: what a token is.
        classes: class names by label.
        keys: the images' keys.
        labels: (n,) int64.
        lengths: (n, V) int64, of each view.
        tokenizer: digest of the tokenizer that made them.
    """

    def __init__(self, artifact: Artifact, split: str = "train") -> None:
        if split not in artifact.products:
            raise UsageError(
                f"There are no tokens of a split '{split}' here.",
                hint=f"There are: {', '.join(artifact.products)}.",
                code="no-split",
                where=str(artifact.store),
            )
        source, told = ArtifactSource(artifact.product(split)), artifact.manifest["tokens"]
        table = pa.concat_tables(source.tables())
        names = ("kind", "bits", "vocabulary", "max_tokens")
        self.form = TokenForm(**{name: told[name] for name in names})
        self.classes = source.classes
        self.keys: list[str] = table["key"].to_pylist()
        labelled = "label" in table.column_names
        labels = to_numpy(table["label"]) if labelled else np.full(len(table), -1)
        self.labels = torch.from_numpy(labels.astype(np.int64))
        self.lengths = torch.from_numpy(to_numpy(table["length"]).astype(np.int64))
        self.tokenizer: str = artifact.manifest["tokenizer"]["digest"]
        self._packed = to_numpy(table["tokens"])
        self._view = 0

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def views(self) -> int:
        """How many views there are of each image."""
        return int(self.lengths.shape[1])

    def set_epoch(self, epoch: int) -> None:
        """Choose the view that items show: epoch e shows view e mod V of every image."""
        self._view = epoch % self.views

    def __getitem__(self, row: int) -> tuple[Tensor, int, int]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: list[int]) -> list[tuple[Tensor, int, int]]:
        """Several items at once, as a ``DataLoader`` asks for them."""
        tokens, labels = self.tokens(rows, self._view), self.labels[rows]
        return list(zip(tokens.values, tokens.lengths.tolist(), labels.tolist(), strict=True))

    def tokens(self, rows: Sequence[int], view: int = 0) -> Tokens:
        """Tokens of some images, as :meth:`Tokenizer.decode` takes them.

        Raises:
            RunError: they are damaged.
        """
        lengths = self.lengths[list(rows), view]
        packed = [
            self._packed[row, view, : self.form.bytes_of(length)].tobytes()
            for row, length in zip(rows, lengths.tolist(), strict=True)
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
