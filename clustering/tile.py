"""The innermost loop: a tile of rows against a tile of centroids, written as vector instructions.

A score is ``|c|^2 / 2 - x . c``, so ``|x - c|^2 = |x|^2 + 2 * score``. Scores of a tile stay in
registers from the first product to what is made of them: a bit for each that is small enough, or
the smallest of each lane. The N x K matrix is written nowhere, which a GEMM would do, and the loop
runs at the rate of the machine's multiply-add units, for few columns too, where a GEMM does not.

Compilers do not keep an array of accumulators in registers, so the loop is built as instructions of
LLVM. They are vectors of 16 lanes, which LLVM cuts to what the processor has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

LANES = 16
"""Centroids of a panel: one vector."""

WIDE = binding.get_host_cpu_features().get("avx512f", False)

ROWS = 8 if WIDE else 6
"""Rows of a tile: with the panels, as many accumulators as there are registers for."""

PANELS = 2 if WIDE else 1
"""Panels of a tile."""

_F32, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_F32, LANES)
_INDICES = ir.VectorType(_I32, LANES)


def _fused(b: Any, x: Any, y: Any, z: Any) -> Any:
    """Multiply and add with one rounding."""
    name = f"llvm.fma.v{LANES}f32"
    known = b.module.globals.get(name)
    made = known or ir.Function(b.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), name)
    return b.call(made, [x, y, z])


def _splat(b: Any, kind: Any, value: Any) -> Any:
    """A vector with ``value`` in each lane."""
    nothing = ir.Constant(kind, ir.Undefined)
    first = b.insert_element(nothing, value, _I32(0))
    return b.shuffle_vector(first, nothing, ir.Constant(_INDICES, [0] * LANES))


def _load(b: Any, pointer: Any, kind: Any = _VECTOR) -> Any:
    value = b.load(b.bitcast(pointer, kind.as_pointer()))
    value.align = 4
    return value


def _store(b: Any, value: Any, pointer: Any) -> None:
    b.store(value, b.bitcast(pointer, value.type.as_pointer())).align = 4


class _Array:
    """An array argument of an intrinsic."""

    def __init__(self, context: Any, b: Any, kind: Any, value: Any) -> None:
        made = context.make_array(kind)(context, b, value=value)
        self.b, self.data, self.shape = b, made.data, made.shape

    def size(self, axis: int) -> Any:
        return self.b.extract_value(self.shape, axis)

    def at(self, offset: Any) -> Any:
        return self.b.gep(self.data, [offset])


def _scores(b: Any, x: _Array, row: Any, panels: _Array, half: _Array | None, panel: Any) -> Any:
    """The scores of a tile, or products alone: a list of vectors for each row."""
    depth = x.size(1)
    rows = [x.at(b.mul(b.add(row, _I64(r)), depth)) for r in range(ROWS)]
    numbers = [b.add(panel, _I64(p)) for p in range(PANELS)]
    starts = [panels.at(b.mul(b.mul(n, depth), _I64(LANES))) for n in numbers]
    nothing = ir.Constant(_VECTOR, [0.0] * LANES)
    halves = [_load(b, half.at(b.mul(n, _I64(LANES)))) if half else nothing for n in numbers]
    before = b.block
    body, after = b.append_basic_block("products"), b.append_basic_block("scores")
    b.branch(body)
    b.position_at_end(body)
    k = b.phi(_I64)
    k.add_incoming(_I64(0), before)
    sums = [[b.phi(_VECTOR) for _ in range(PANELS)] for _ in range(ROWS)]
    columns = [_load(b, b.gep(start, [b.mul(k, _I64(LANES))])) for start in starts]
    done = []
    for r in range(ROWS):
        value = _splat(b, _VECTOR, b.load(b.gep(rows[r], [k])))
        done.append([_fused(b, value, columns[p], sums[r][p]) for p in range(PANELS)])
    following = b.add(k, _I64(1))
    k.add_incoming(following, body)
    for r in range(ROWS):
        for p in range(PANELS):
            sums[r][p].add_incoming(halves[p], before)
            sums[r][p].add_incoming(done[r][p], body)
    b.cbranch(b.icmp_signed("<", following, depth), body, after)
    b.position_at_end(after)
    return done


def _arrays(context: Any, b: Any, kinds: Any, values: Any) -> list[_Array]:
    pairs = zip(kinds, values, strict=True)
    return [_Array(context, b, k, v) for k, v in pairs if isinstance(k, types.Array)]


@intrinsic  # type: ignore[untyped-decorator]
def mark(
    _: Any, x: Any, row: Any, panels: Any, half: Any, panel: Any, bound: Any, bits: Any
) -> Any:
    """``mark(x, row, panels, half, panel, bound, bits)``: which scores are no more than a bound.

    Args:
        x: float32 (N, depth).
        row: the first of ROWS.
        panels: float32 (P, depth, LANES), centroids with their sign changed.
        half: float32 (P, LANES), half of their squared norms; infinite where there is no centroid.
        panel: the first of PANELS.
        bound: float32 (N,).
        bits: uint16 (ROWS, P); bit j of a word is for lane j.
    """

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        rows, columns, halves, limits, marks = _arrays(context, b, signature.args, args)
        done = _scores(b, rows, args[1], columns, halves, args[4])
        for r in range(ROWS):
            limit = _splat(b, _VECTOR, b.load(limits.at(b.add(args[1], _I64(r)))))
            for p in range(PANELS):
                small = b.bitcast(b.fcmp_ordered("<=", done[r][p], limit), _I16)
                place = b.add(b.mul(_I64(r), marks.size(1)), b.add(args[4], _I64(p)))
                b.store(small, marks.at(place))
        return context.get_dummy_value()

    return types.void(x, types.int64, panels, half, types.int64, bound, bits), build


@intrinsic  # type: ignore[untyped-decorator]
def best(
    _: Any, x: Any, row: Any, panels: Any, half: Any, panel: Any, score: Any, number: Any
) -> Any:
    """``best(x, row, panels, half, panel, score, number)``: the smallest score of each lane so far.

    Args:
        x: as for :func:`mark`.
        row: the first of ROWS.
        panels: as for :func:`mark`.
        half: as for :func:`mark`.
        panel: the first of PANELS.
        score: float32 (ROWS, LANES), changed where a score is smaller.
        number: int32 (ROWS, LANES), the panel that it was found in.
    """

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        rows, columns, halves, scores, numbers = _arrays(context, b, signature.args, args)
        done = _scores(b, rows, args[1], columns, halves, args[4])
        for r in range(ROWS):
            place = _I64(r * LANES)
            small, which = _load(b, scores.at(place)), _load(b, numbers.at(place), _INDICES)
            for p in range(PANELS):
                this = _splat(b, _INDICES, b.trunc(b.add(args[4], _I64(p)), _I32))
                less = b.fcmp_ordered("<", done[r][p], small)
                small = b.select(less, done[r][p], small)
                which = b.select(less, this, which)
            _store(b, small, scores.at(place))
            _store(b, which, numbers.at(place))
        return context.get_dummy_value()

    return types.void(x, types.int64, panels, half, types.int64, score, number), build


@intrinsic  # type: ignore[untyped-decorator]
def products(_: Any, x: Any, panels: Any, panel: Any, made: Any) -> Any:
    """``products(x, panels, panel, made)``: of each row with each lane.

    Args:
        x: float32 (ROWS, depth).
        panels: float32 (P, depth, LANES).
        panel: the first of PANELS.
        made: float32 (ROWS, P * LANES), written.
    """

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        rows, columns, written = _arrays(context, b, signature.args, args)
        done = _scores(b, rows, _I64(0), columns, None, args[2])
        for r in range(ROWS):
            for p in range(PANELS):
                lane = b.mul(b.add(args[2], _I64(p)), _I64(LANES))
                place = b.add(b.mul(_I64(r), written.size(1)), lane)
                _store(b, done[r][p], written.at(place))
        return context.get_dummy_value()

    return types.void(x, panels, types.int64, made), build


@intrinsic  # type: ignore[untyped-decorator]
def distance(_: Any, x: Any, i: Any, y: Any, j: Any) -> Any:
    """``distance(x, i, y, j)``: the squared distance of row i of ``x`` from row j of ``y``.

    The order of the sum is written out, so that it is the same on each kind of processor and
    wherever a compiler puts it.

    Args:
        x: float32 (N, D).
        i: a row of it.
        y: float32 (M, D).
        j: a row of it.
    """

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        first, second = _arrays(context, b, signature.args, args)
        depth = first.size(1)
        left, right = first.at(b.mul(args[1], depth)), second.at(b.mul(args[3], depth))
        nothing = ir.Constant(_VECTOR, [0.0] * LANES)

        def added(sums: list[Any], k: Any) -> list[Any]:
            made = []
            for number, value in enumerate(sums):
                place = b.add(k, _I64(number * LANES))
                apart = b.fsub(_load(b, b.gep(left, [place])), _load(b, b.gep(right, [place])))
                made.append(_fused(b, apart, apart, value))
            return made

        wide, k = _loop(b, _I64(0), depth, 4 * LANES, [nothing] * 4, added)
        folded = b.fadd(b.fadd(wide[0], wide[1]), b.fadd(wide[2], wide[3]))
        narrow, k = _loop(b, k, depth, LANES, [folded], added)
        total = narrow[0]
        for width in (8, 4, 2, 1):
            picks = ir.Constant(_INDICES, [(lane + width) % LANES for lane in range(LANES)])
            total = b.fadd(total, b.shuffle_vector(total, total, picks))

        def rest(sums: list[Any], k: Any) -> list[Any]:
            apart = b.fsub(b.load(b.gep(left, [k])), b.load(b.gep(right, [k])))
            return [b.fadd(sums[0], b.fmul(apart, apart))]

        last, _ = _loop(b, k, depth, 1, [b.extract_element(total, _I32(0))], rest)
        return last[0]

    return types.float32(x, types.int64, y, types.int64), build


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(_: Any, x: Any, i: Any) -> Any:
    """``prefetch(x, i)``: have the beginning of row i of ``x`` fetched."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        rows = _Array(context, b, signature.args[0], args[0])
        text = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [text, _I32, _I32, _I32])
        name = "llvm.prefetch.p0i8" if text.intrinsic_name == "p0i8" else "llvm.prefetch.p0"
        call = b.module.globals.get(name) or ir.Function(b.module, kind, name)
        start = rows.at(b.mul(args[1], rows.size(1)))
        b.call(call, [b.bitcast(start, text), _I32(0), _I32(3), _I32(1)])
        return context.get_dummy_value()

    return types.void(x, types.int64), build


def _loop(
    b: Any,
    start: Any,
    stop: Any,
    step: int,
    values: list[Any],
    body: Callable[[list[Any], Any], list[Any]],
) -> tuple[list[Any], Any]:
    """``while k + step <= stop``: the values that ``body`` made last, and k."""
    before = b.block
    head, inside, after = (b.append_basic_block(name) for name in ("head", "inside", "after"))
    b.branch(head)
    b.position_at_end(head)
    k = b.phi(_I64)
    k.add_incoming(start, before)
    held = [b.phi(value.type) for value in values]
    for slot, value in zip(held, values, strict=True):
        slot.add_incoming(value, before)
    b.cbranch(b.icmp_signed("<=", b.add(k, _I64(step)), stop), inside, after)
    b.position_at_end(inside)
    made = body(held, k)
    k.add_incoming(b.add(k, _I64(step)), b.block)
    for slot, value in zip(held, made, strict=True):
        slot.add_incoming(value, b.block)
    b.branch(head)
    b.position_at_end(after)
    return held, k


@intrinsic  # type: ignore[untyped-decorator]
def lowest_bit(_: Any, word: Any) -> Any:
    """``lowest_bit(word)``: the place of the lowest bit that is set, of a uint64 that is not 0."""

    def build(_context: Any, b: Any, _signature: Any, args: Any) -> Any:
        return b.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), build
