"""Networks whose weights are codes: while they are trained, and as arrays in a file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import backbones
from pipeline.codecs import rans
from pipeline.codecs.low_rank_vq import CodedLayer, Directions, Floats, cluster, sub_vectors
from pipeline.codecs.tables import SMOOTHING, Tables
from pipeline.digest import dumps
from pipeline.errors import RunError

Arrays = dict[str, npt.NDArray[Any]]
VERSION = 2
"""Of the arrays of a coded network."""
PLAN = "plan"
"""Name of the array that says what the others hold: JSON, compressed by zstd."""


class LowRankWeight(nn.Module):
    """A weight as vectors of d numbers and a basis: every sub-vector is basis @ vector.

    Args:
        layer: how the weight is coded; its k counts for nothing yet.
        weight: float32, of which the directions of most energy are taken.
    """

    def __init__(self, layer: CodedLayer, weight: Tensor) -> None:
        super().__init__()
        self.shape = layer.shape
        x = sub_vectors(weight.detach().cpu().float().numpy(), layer.m)
        basis = Directions.of(x).basis[:, : layer.d].astype(np.float32)
        self.basis = nn.Parameter(torch.from_numpy(np.ascontiguousarray(basis)))
        self.vectors = nn.Parameter(torch.from_numpy(x @ basis))

    def forward(self) -> Tensor:
        """The weight."""
        return (self.vectors @ self.basis.T).view(self.shape)


class CodedWeight(nn.Module):
    """A weight as codes, a codebook (k, d) and a basis (m, d), of which codes stay as they are.

    Args:
        layer: how the weight is coded.
        codes: int32 (n,).
        codebook: float32 (k, d).
        basis: float32 (m, d), or None where d = m.
    """

    def __init__(
        self,
        layer: CodedLayer,
        codes: npt.NDArray[np.int32],
        codebook: Floats,
        basis: Floats | None,
    ) -> None:
        super().__init__()
        self.shape = layer.shape
        self.register_buffer("codes", torch.from_numpy(codes.astype(np.int64)))
        self.codebook = nn.Parameter(torch.from_numpy(codebook.astype(np.float32)))
        own = None if basis is None else nn.Parameter(torch.from_numpy(basis.astype(np.float32)))
        self.register_parameter("basis", own)

    codes: Tensor
    basis: Tensor | None

    def forward(self) -> Tensor:
        """The weight: all that k codes can be is made once, and looked up."""
        table = self.codebook if self.basis is None else self.codebook @ self.basis.T
        return F.embedding(self.codes, table).view(self.shape)


class WithWeight(nn.Module):
    """A convolution or linear layer whose weight is made by another module."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, weight: nn.Module) -> None:
        super().__init__()
        layer.register_parameter("weight", None)
        self.layer, self.weight = layer, weight

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight()
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.layer.bias)
        # It alone knows all ways of padding.
        return cast("Tensor", self.layer._conv_forward(x, weight, self.layer.bias))  # noqa: SLF001


def put(model: nn.Module, name: str, weight: nn.Module) -> None:
    """Have ``weight`` make the weight of the layer ``name``, in place."""
    found = model.get_submodule(name)
    if isinstance(found, WithWeight):
        found.weight = weight
        return
    parent, _, last = name.rpartition(".")
    layer = cast("nn.Conv2d | nn.Linear", found)
    setattr(model.get_submodule(parent), last, WithWeight(layer, weight))


def to_low_rank(model: nn.Module, layers: Sequence[CodedLayer]) -> nn.Module:
    """Give the coded layers of a network low-rank weights, in place."""
    for layer in layers:
        weight = cast("Tensor", model.get_submodule(layer.name).weight)
        put(model, layer.name, LowRankWeight(layer, weight))
    return model


def to_codes(
    model: nn.Module, layers: Sequence[CodedLayer], seed: int, threads: int | None = None
) -> nn.Module:
    """Cluster the vectors of a network from :func:`to_low_rank`, in place.

    The basis is made orthonormal first, so that distances of vectors are those of weights.
    """
    bases, vectors = [], []
    for layer in layers:
        low = cast("LowRankWeight", cast("WithWeight", model.get_submodule(layer.name)).weight)
        q, r = np.linalg.qr(low.basis.detach().cpu().double().numpy())
        bases.append(q.astype(np.float32))
        inside = low.vectors.detach().cpu().double().numpy() @ r.T
        vectors.append(np.ascontiguousarray(inside, np.float32))
    made = cluster(vectors, [layer.k for layer in layers], seed, threads)
    for layer, codes, book, basis in zip(layers, made.codes, made.codebooks, bases, strict=True):
        parts = (book @ basis.T, None) if layer.d == layer.m else (book, basis)
        put(model, layer.name, CodedWeight(layer, codes, *parts))
    return model


def to_empty_codes(model: nn.Module, layers: Sequence[CodedLayer]) -> nn.Module:
    """Give a network codes that are all 0, in place, for a state dict to fill."""
    for layer in layers:
        codes = np.zeros(layer.vectors, np.int32)
        book = np.zeros((layer.k, layer.d), np.float32)
        basis = np.zeros((layer.m, layer.d), np.float32) if layer.d < layer.m else None
        put(model, layer.name, CodedWeight(layer, codes, book, basis))
    return model


def rebuild(arrays: Mapping[str, npt.NDArray[Any]], *, look_up: bool = False) -> nn.Module:
    """A network from the arrays of :func:`to_arrays`, in evaluation mode.

    Args:
        arrays: as ``safetensors.numpy.load_file`` reads them.
        look_up: keep codes, and make each weight when its layer is asked; otherwise weights are
            made once.

    Raises:
        RunError: the arrays are none of a coded network.
    """
    about, named = spread(arrays)
    state = _dense(about, named)
    spec = about["model"]
    model = backbones.build(spec["backbone"], spec["classes"], spec["channels"])
    backbones.load_weights(model, state, "a coded network")
    if look_up:
        for layer in about["layers"]:
            table, codes = layer_table(named, layer)
            whole = replace(layer, d=layer.m)
            put(model, layer.name, CodedWeight(whole, codes.astype(np.int32), table, None))
    return model.eval().requires_grad_(requires_grad=False)


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that the network had before its weights were codes."""
    state = {}
    for name, module in model.named_modules():
        if isinstance(module, WithWeight):
            state[f"{name}.weight"] = module.weight().detach()
            if module.layer.bias is not None:
                state[f"{name}.bias"] = module.layer.bias.detach()
    inside = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, WithWeight))
    rest = {
        n: v.detach() for n, v in model.state_dict().items() if not n.startswith(inside or ("\0",))
    }
    return rest | state


@dataclass(frozen=True)
class Size:
    """Bytes of a coded network.

    Attributes:
        codes: packed or entropy-coded, with their frequencies.
        codebooks: float16.
        bases: float16.
        rest: what is not coded, float32: first layer, normalisation, biases.
        dense: all of the network in float32.
    """

    codes: int
    codebooks: int
    bases: int
    rest: int
    dense: int


def to_arrays(model: nn.Module, layers: Sequence[CodedLayer], about: Mapping[str, Any]) -> Arrays:
    """A network from :func:`to_codes` as arrays: all that there is to it.

    Codes are packed, or entropy-coded where that takes less; codebooks and bases are float16; the
    rest is as it is, and counters of batches are left out.

    Args:
        model: the network.
        layers: how its weights are coded.
        about: plain JSON types that say how to build the network.
    """
    named: Arrays = {}
    for layer in layers:
        module = cast("CodedWeight", cast("WithWeight", model.get_submodule(layer.name)).weight)
        codes = module.codes.cpu().numpy()
        named |= {f"{layer.name}:{kind}": v for kind, v in code_arrays(codes, layer.k).items()}
        for name, value in (("codebook", module.codebook), ("basis", module.basis)):
            if value is not None:
                half = value.detach().cpu().to(torch.float16).numpy()
                named[f"{layer.name}:{name}"] = half
    weights = {f"{layer.name}.weight" for layer in layers}
    for name, value in dense_state(model).items():
        if name not in weights and not name.endswith("num_batches_tracked"):
            named[name] = value.cpu().numpy()
    return gather(named, {"layers": [asdict(layer) for layer in layers], **about})


def gather(named: Mapping[str, npt.NDArray[Any]], about: Mapping[str, Any]) -> Arrays:
    """Named arrays as one of each type, and the plan that says which is where.

    In a file each array costs a hundred bytes, and a network in 100 kB has hundreds of them.
    """
    entries = [(name, value.dtype.name, value.shape) for name, value in sorted(named.items())]
    told = dumps({"version": VERSION, "arrays": entries, **about})
    found = {PLAN: np.frombuffer(pa.compress(told, "zstd", asbytes=True), np.uint8)}
    for kind in sorted({dtype for _, dtype, _ in entries}):
        found[kind] = np.concatenate([named[n].ravel() for n, dtype, _ in entries if dtype == kind])
    return found


def spread(arrays: Mapping[str, npt.NDArray[Any]]) -> tuple[dict[str, Any], Arrays]:
    """What a coded network says of itself, ``layers`` among it, and its arrays by name.

    Raises:
        RunError: the arrays are none of a coded network.
    """
    try:
        told = pa.CompressedInputStream(pa.py_buffer(arrays[PLAN].tobytes()), "zstd").read()
        about: dict[str, Any] = json.loads(told)
        if about["version"] != VERSION:
            raise ValueError(f"version {about['version']}")
        named, places = {}, dict.fromkeys(arrays, 0)
        for name, kind, shape in about.pop("arrays"):
            start = places[kind]
            places[kind] += math.prod(shape)
            named[name] = arrays[kind][start : places[kind]].reshape(shape)
        layers = [
            CodedLayer(**{**layer, "shape": tuple(layer["shape"])}) for layer in about["layers"]
        ]
    except (KeyError, ValueError, TypeError, OSError) as error:
        raise RunError(
            f"This is no coded network: {error}.",
            hint="Give the output of 'pipeline run compress-model'.",
            code="no-coded-model",
        ) from error
    return {**about, "layers": layers}, named


def from_arrays(arrays: Mapping[str, npt.NDArray[Any]]) -> tuple[dict[str, Any], Arrays]:
    """What a coded network says of itself, and its state dict with whole weights, float32.

    Raises:
        RunError: the arrays are none of a coded network.
    """
    about, named = spread(arrays)
    return about, _dense(about, named)


def _dense(about: Mapping[str, Any], named: Arrays) -> Arrays:
    state = {n: v for n, v in named.items() if ":" not in n}
    for layer in about["layers"]:
        table, codes = layer_table(named, layer)
        state[f"{layer.name}.weight"] = table[codes].reshape(layer.shape)
    return state


def layer_table(
    named: Mapping[str, npt.NDArray[Any]], layer: CodedLayer
) -> tuple[Floats, npt.NDArray[np.int64]]:
    """All sub-vectors that a layer has, float32 (k, m), and which of them each one is (n,)."""
    codebook = named[f"{layer.name}:codebook"].astype(np.float32)
    basis = named.get(f"{layer.name}:basis")
    table = codebook if basis is None else codebook @ basis.astype(np.float32).T
    return table, codes_of(named, layer)


def code_arrays(codes: npt.NDArray[Any], k: int) -> Arrays:
    """Codes below k packed, or coded by their frequencies with these beside them, if that is less.

    Returns:
        ``codes``, and with them ``frequencies``, less 1, where they are coded.
    """
    packed = pack(codes, (k - 1).bit_length())
    counts = np.bincount(codes, minlength=k) + SMOOTHING
    tables = Tables.of([np.append(counts, 0.0)], [0])
    coded = np.frombuffer(rans.encode(codes, np.zeros_like(codes), tables), np.uint8)
    frequencies = tables.to_arrays()["frequencies"]
    if coded.nbytes + frequencies.nbytes < packed.nbytes:
        return {"codes": coded, "frequencies": frequencies}
    return {"codes": packed}


def codes_of(named: Mapping[str, npt.NDArray[Any]], layer: CodedLayer) -> npt.NDArray[np.int64]:
    """The codes of a layer (n,).

    Raises:
        RunError: they are damaged.
    """
    data, kept = named[f"{layer.name}:codes"], named.get(f"{layer.name}:frequencies")
    if kept is None:
        return unpack(data, layer.code_bits, layer.vectors)
    frequencies = kept.astype(np.uint32) + 1
    tables = Tables(np.array([layer.k], np.int32), np.zeros(1, np.int32), frequencies)
    try:
        which = np.zeros(layer.vectors, np.uint16)
        return rans.decode(data.tobytes(), which, tables).astype(np.int64)
    except rans.CorruptError:
        raise RunError(
            f"The codes of the layer '{layer.name}' are damaged.",
            hint="Fetch the file again.",
            code="bad-codes",
        ) from None


def size_of(arrays: Mapping[str, npt.NDArray[Any]]) -> Size:
    """What a coded network takes, without names and the plan."""
    parts = dict.fromkeys(("codes", "frequencies", "codebook", "basis"), 0)
    rest = 0
    about, named = spread(arrays)
    for name, value in named.items():
        _, colon, kind = name.rpartition(":")
        if colon:
            parts[kind] += value.nbytes
        else:
            rest += value.nbytes
    dense = rest + sum(4 * layer.vectors * layer.m for layer in about["layers"])
    codes = parts["codes"] + parts["frequencies"]
    return Size(codes, parts["codebook"], parts["basis"], rest, dense)


def pack(codes: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    """Codes of so many bits one after the other, low bits first."""
    places = np.arange(bits)
    return np.packbits((codes[:, None] >> places & 1).astype(np.uint8), bitorder="little")


def unpack(data: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.int64]:
    """The codes that :func:`pack` was given."""
    found = np.unpackbits(data, count=count * bits, bitorder="little").reshape(count, bits)
    values: npt.NDArray[np.int64] = (found.astype(np.int64) << np.arange(bits)).sum(1)
    return values
