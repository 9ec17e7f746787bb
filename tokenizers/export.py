"""Tokenizers for those who do not have this package: Hugging Face folders, ONNX, torch.export."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.digest import dumps
from pipeline.errors import RunError, UsageError
from pipeline.tokenizers.tokenizer import CONFIG, WEIGHTS, Tokenizer, load_tokenizer
from pipeline.tokenizers.tokens import VERSION, Tokens

Kind = Literal["hf", "onnx", "pt2"]
Example = tuple[Tensor, Tensor, Tensor]
"""Images, the values of their tokens, and lengths."""
Encode = Callable[[Tensor], Tensor]
Decode = Callable[[Tensor, Tensor], Tensor]
TOKENS, CHECK, VECTORS, CARD = (
    "tokens.json",
    "check.safetensors",
    "vectors.safetensors",
    "README.md",
)
_CHECKED = 8
"""Images whose tokens travel with an export."""
_CLOSE = 1e-3
"""Largest difference of decoded pixels in [0, 1] between an export and the tokenizer."""
_SPECIAL = ("eos", "pad", "bos", "mask")


class EncoderGraph(nn.Module):
    """Images float (n, C, H, W) in [0, 1] to tokens: ids int64 (n, N) or bits int64 (n, N, B)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.network = tokenizer

    def forward(self, images: Tensor) -> Tensor:
        return self.network.encode_values(images)[0].to(torch.int64)


class DecoderGraph(nn.Module):
    """Tokens as :class:`EncoderGraph` gives them, and lengths int64 (n,), to images in [0, 1]."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.network = tokenizer

    def forward(self, values: Tensor, lengths: Tensor) -> Tensor:
        size = (self.network.size, self.network.size)
        return self.network.decode_values(values, lengths, size)


def contract(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a generator needs to know of the tokens, as plain JSON types.

    Ids that mean something else follow those of the vocabulary; a length says how many tokens
    count, so nothing is filled with an id that means an image's token.
    """
    form = tokenizer.form
    special = {}
    if form.vocabulary is not None:
        special = {name: form.vocabulary + n for n, name in enumerate(_SPECIAL)}
    return {
        **asdict(form),
        "min_tokens": 1,
        "length_policy": "prefix",
        "special_ids": special,
        "packing": {"version": VERSION, "order": "token-major", "bit_order": "little"},
        "image": {
            "channels": tokenizer.channels,
            "size": tokenizer.size,
            "multiple_of": tokenizer.multiple,
            "range": [0, 1],
            "resize": "largest centred square, then to size",
        },
        "digest": tokenizer.digest,
    }


def export(tokenizer: Tokenizer, kind: Kind, folder: Path) -> dict[str, Any]:
    """Write an export into an empty folder, and check that it makes the same tokens and images.

    Returns:
        What was found: ``tokens``, share of equal tokens, and ``pixels``, the largest difference.

    Raises:
        UsageError: a package that this kind of export needs is not installed.
        RunError: the export does not do what the tokenizer does.
    """
    images = _pictures(tokenizer)
    tokens = tokenizer.encode(images)
    lengths = torch.arange(_CHECKED) % tokenizer.form.max_tokens + 1
    decoded = tokenizer.decode(tokens.cut(lengths))
    wanted = tokens.values.to(torch.int64)
    encode, decode = _WRITERS[kind](tokenizer, folder, (images, wanted, lengths))
    values, seen = encode(images), decode(wanted, lengths)
    found = {
        "tokens": float((values == wanted).double().mean()),
        "pixels": float((seen - decoded).abs().max()),
    }
    if found["tokens"] < 1 or found["pixels"] > _CLOSE:
        raise RunError(
            f"The export makes other tokens ({100 * found['tokens']:.2f}% are equal) or other "
            f"images (pixels differ by up to {found['pixels']:.2g}).",
            hint="Report this with the versions of torch, onnx and onnxruntime.",
            code="export-differs",
        )
    check = {"images": images, "values": wanted, "lengths": lengths, "decoded": decoded}
    save_file({name: value.contiguous() for name, value in check.items()}, folder / CHECK)
    save_file({"vectors": tokenizer.token_vectors().contiguous()}, folder / VECTORS)
    (folder / TOKENS).write_bytes(dumps(contract(tokenizer)))
    (folder / CARD).write_text(_card(tokenizer, kind), encoding="utf-8")
    return found


def _pictures(tokenizer: Tokenizer) -> Tensor:
    """Images to check an export with: smooth shapes and some noise, float in [0, 1]."""
    side, channels = tokenizer.size, tokenizer.channels
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(_CHECKED, channels, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, (side, side), mode="bilinear")
    return (smooth + 0.1 * torch.rand(smooth.shape, generator=generator)).clamp(0, 1)


def _write_hf(tokenizer: Tokenizer, folder: Path, _: Example) -> tuple[Encode, Decode]:
    tokenizer.save(folder)
    config = json.loads((folder / CONFIG).read_bytes())
    (folder / CONFIG).write_bytes(dumps({"model_type": "image-tokenizer", **config}))
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": tokenizer.size, "width": tokenizer.size},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": False,
        "do_convert_rgb": tokenizer.channels == 3,
    }
    (folder / "preprocessor_config.json").write_bytes(dumps(preprocessor))
    files = [(folder / name).read_bytes() for name in (CONFIG, WEIGHTS)]
    again = load_tokenizer(files[0], files[1], str(folder))

    def encode(images: Tensor) -> Tensor:
        return again.encode(images).values.to(torch.int64)

    def decode(values: Tensor, lengths: Tensor) -> Tensor:
        return again.decode(Tokens(values, lengths, again.form))

    return encode, decode


def _graphs(
    tokenizer: Tokenizer, example: Example
) -> list[tuple[str, nn.Module, tuple[Tensor, ...], tuple[dict[int, Any], ...]]]:
    """Name, module, arguments and dynamic sizes of both graphs: any number of images."""
    images, values, lengths = example
    batch = {0: torch.export.Dim("batch", min=1, max=4096)}
    return [
        ("encoder", EncoderGraph(tokenizer).eval(), (images,), (batch,)),
        ("decoder", DecoderGraph(tokenizer).eval(), (values, lengths), (batch, batch)),
    ]


def _write_pt2(tokenizer: Tokenizer, folder: Path, example: Example) -> tuple[Encode, Decode]:
    found: list[Any] = []
    for name, module, arguments, sizes in _graphs(tokenizer, example):
        program = torch.export.export(module, arguments, dynamic_shapes=sizes)
        torch.export.save(program, folder / f"{name}.pt2")
        found.append(torch.export.load(folder / f"{name}.pt2").module())
    return found[0], found[1]


def _write_onnx(tokenizer: Tokenizer, folder: Path, example: Example) -> tuple[Encode, Decode]:
    try:
        import onnxruntime  # type: ignore[import-untyped]
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError as error:
        raise UsageError(
            f"An export to ONNX needs a package that is not installed: {error.name}.",
            hint='Install it with pip install -c constraints.txt -e ".[onnx]".',
            code="no-onnx",
        ) from error
    names = {"encoder": (["images"], "tokens"), "decoder": (["tokens", "lengths"], "images")}
    found: list[Any] = []
    # It tells of every operator of packages that are not here.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    for name, module, arguments, sizes in _graphs(tokenizer, example):
        given, made = names[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what torch does to itself
            torch.onnx.export(
                module,
                arguments,
                folder / f"{name}.onnx",
                dynamo=True,
                dynamic_shapes=sizes,
                input_names=given,
                output_names=[made],
                external_data=False,
                verbose=False,
            )
        session = onnxruntime.InferenceSession(
            folder / f"{name}.onnx", providers=["CPUExecutionProvider"]
        )

        def call(*inputs: Tensor, session: Any = session, given: list[str] = given) -> Tensor:
            feed = {n: value.numpy() for n, value in zip(given, inputs, strict=True)}
            return torch.from_numpy(session.run(None, feed)[0])

        found.append(call)
    return found[0], found[1]


_WRITERS: Mapping[Kind, Callable[[Tokenizer, Path, Example], tuple[Encode, Decode]]] = {
    "hf": _write_hf,
    "onnx": _write_onnx,
    "pt2": _write_pt2,
}
_USE: Mapping[Kind, str] = {
    "hf": """from pathlib import Path
from pipeline.tokenizers.tokenizer import load_tokenizer

files = [Path(name).read_bytes() for name in ("config.json", "model.safetensors")]
tokenizer = load_tokenizer(*files, ".")
tokens = tokenizer.encode(images)  # uint8, or float in [0, 1], (n, C, H, W)
images = tokenizer.decode(tokens.cut(8))  # from the first 8 tokens of each""",
    "onnx": """import onnxruntime

encoder = onnxruntime.InferenceSession("encoder.onnx")
(tokens,) = encoder.run(None, {"images": images})  # float32 in [0, 1], (n, C, S, S)
decoder = onnxruntime.InferenceSession("decoder.onnx")
(images,) = decoder.run(None, {"tokens": tokens, "lengths": lengths})  # lengths int64 (n,)""",
    "pt2": """import torch

encoder = torch.export.load("encoder.pt2").module()
tokens = encoder(images)  # float32 in [0, 1], (n, C, S, S)
decoder = torch.export.load("decoder.pt2").module()
images = decoder(tokens, lengths)  # lengths int64 (n,)""",
}


def _card(tokenizer: Tokenizer, kind: Kind) -> str:
    """A model card."""
    form, side, channels = tokenizer.form, tokenizer.size, tokenizer.channels
    special = contract(tokenizer)["special_ids"]
    ids = ", ".join(f"{name} {value:,}" for name, value in special.items())
    if form.kind == "bits":
        what, shape = f"{form.bits} bits", f"(n, {form.max_tokens}, {form.bits}) of 0 and 1"
    else:
        what, shape = f"an id below {form.vocabulary:,}", f"(n, {form.max_tokens})"
    return f"""---
tags:
- image-tokenizer
---

# An image tokenizer

Up to {form.max_tokens:,} tokens an image, each {what}: {form.bytes_of(form.max_tokens):,} bytes at
most. Any first tokens are the image, coarser, if the tokenizer was trained with tail drop. Images
have {channels} channels and {side} x {side} pixels.

```python
{_USE[kind]}
```

Tokens are int64 {shape}. `{TOKENS}` has all that a generator needs to know of them.
{f"Special ids: {ids}." if ids else "They have no ids: predict each bit by itself."}
`{VECTORS}` has what the decoder makes of tokens, to start embeddings with. Of `{CHECK}`, `images`
have to give `values`, and `values` with `lengths` the images `decoded`.

Tokens of another tokenizer are noise to this one, whose digest is `{tokenizer.digest}`.
"""
