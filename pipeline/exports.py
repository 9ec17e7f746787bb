"""Exports: tokenizers and tokens for those who do not have this package."""

from __future__ import annotations

import json
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.device import reproducible
from pipeline.errors import UsageError
from pipeline.open_output import open as open_run
from pipeline.recipes.tokenize import CPU, open_tokenizer
from pipeline.stages.tokenize import read_tokenizer
from pipeline.token_samples import TokenSamples
from pipeline.tokenizers.export import export

Answer = tuple[int, dict[str, Any], str]


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into that gets its name when all is written.

    Raises:
        UsageError: something is there already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            "There is something here already, and an export replaces nothing.",
            hint="Give --out another folder, or delete this one.",
            code="out-exists",
            where=str(out),
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield made
        made.chmod(0o755)
        made.replace(out)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def run_tokenizer(arguments: Namespace) -> Answer:
    """``pipeline export tokenizer``."""
    tokenizer = read_tokenizer(open_tokenizer(arguments.path).files, CPU)
    with whole_folder(Path(arguments.out)) as folder, reproducible(1):
        found = export(tokenizer, arguments.format, folder)
    told = {"out": arguments.out, "format": arguments.format, "digest": tokenizer.digest, **found}
    text = (
        f"{arguments.out}: {arguments.format}, the same tokens, pixels differ by at most "
        f"{found['pixels']:.1e}"
    )
    return 0, told, text


def run_tokens(arguments: Namespace) -> Answer:
    """``pipeline export tokens``."""
    store = open_run(arguments.path, split=arguments.split)
    if not isinstance(store, TokenSamples) or store.form.vocabulary is None:
        raise UsageError(
            "There are no tokens with ids here.",
            hint="Give the output of 'pipeline run tokenize', with tokens of at most 62 bits.",
            code="no-ids",
            where=arguments.path,
        )
    with whole_folder(Path(arguments.out)) as folder:
        writer = write_llamagen if arguments.format == "llamagen" else write_titok
        writer(store, folder)
    told = {"out": arguments.out, "format": arguments.format, "images": len(store)}
    return 0, told, f"{arguments.out}: {len(store):,} images, {store.views} views of each"


def ids(store: TokenSamples, row: int) -> list[list[int]]:
    """Ids of the views of one image, each as long as it is; bit j of a token has the value 2^j."""
    found = []
    for view in range(store.views):
        tokens = store.tokens([row], view)
        weights = 1 << np.arange(store.form.bits, dtype=np.int64)
        values = (tokens.bits[0].numpy().astype(np.int64) * weights).sum(-1)
        found.append(values[: int(tokens.lengths[0])].tolist())
    return found


def write_llamagen(store: TokenSamples, folder: Path) -> None:
    """``codes/<i>.npy``, int64 (1, views, N), and ``labels/<i>.npy``, int64 (1,), as LlamaGen's.

    Raises:
        UsageError: images have unlike lengths, for which that layout has no place.
    """
    if int(store.lengths.min()) < int(store.lengths.max()):
        raise UsageError(
            "Images have unlike numbers of tokens, and LlamaGen's files have no place for that.",
            hint="Tokenize with --tokens N, or export with --format titok.",
            code="unlike-lengths",
        )
    for name in ("codes", "labels"):
        (folder / name).mkdir()
    for row in range(len(store)):
        np.save(folder / "codes" / f"{row}.npy", np.array([ids(store, row)], np.int64))
        np.save(folder / "labels" / f"{row}.npy", store.labels[row : row + 1].numpy())


def write_titok(store: TokenSamples, folder: Path) -> None:
    """``pretokenized.jsonl``, a line a view: ``class_id`` and ``tokens``, as TiTok's and RAR's."""
    with (folder / "pretokenized.jsonl").open("w", encoding="utf-8") as file:
        for row in range(len(store)):
            for tokens in ids(store, row):
                label = int(store.labels[row])
                file.write(json.dumps({"class_id": label, "tokens": tokens}) + "\n")
