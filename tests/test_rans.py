"""The entropy coder and its tables: round trips, sizes, damage, an oracle and golden streams."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.codecs import rans, rans_plain
from pipeline.codecs.entropy import StaticModel
from pipeline.codecs.rans import CorruptError
from pipeline.codecs.tables import TOTAL, Tables
from pipeline.errors import RunError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "rans.json").read_text())


def tables_of(*lengths: int, seed: int = 0, concentration: float = 0.2) -> Tables:
    draw = np.random.default_rng(seed)
    shares = [draw.dirichlet(np.full(n + 1, concentration)) for n in lengths]
    return Tables.of(shares, draw.integers(-9, 9, len(lengths)).tolist())


def symbols_of(tables: Tables, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Symbols as likely as their tables say, escapes among them."""
    draw = np.random.default_rng(seed)
    which = draw.integers(0, len(tables), count)
    symbols = np.zeros(count, np.int64)
    for table in range(len(tables)):
        entries = slice(*tables.first[table : table + 2])
        own = which == table
        place = draw.choice(
            int(tables.lengths[table]) + 1, own.sum(), p=tables.frequencies[entries] / TOTAL
        )
        symbols[own] = place + tables.offsets[table]
    return symbols, which


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("lengths", [(1,), (2, 3), (40, 1, 256), (65_535, 2)])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 1000])
def test_what_was_coded_is_decoded_and_the_plain_coder_gives_the_same_bytes(lanes, lengths, count):
    tables = tables_of(*lengths)
    symbols, which = symbols_of(tables, count)
    data = rans.encode(symbols, which, tables, lanes=lanes)
    assert data == rans_plain.encode(symbols, which, tables, lanes=lanes)
    assert (rans.decode(data, which, tables, lanes=lanes) == symbols).all()
    if max(lengths) < 1000:
        assert rans_plain.decode(data, which, tables, lanes=lanes) == symbols.tolist()


@pytest.mark.parametrize("lanes", [1, 4])
def test_a_million_symbols_take_what_the_tables_say(lanes):
    tables = tables_of(2, 3, 40, 256, 4000, concentration=1.0)
    symbols, which = symbols_of(tables, 10**6)
    data = rans.encode(symbols, which, tables, lanes=lanes)
    ideal = tables.bits(symbols[None], which) / 8
    assert ideal - 8 <= len(data) <= ideal * 1.0005 + 8 * lanes
    assert (rans.decode(data, which, tables, lanes=lanes) == symbols).all()


def test_a_symbol_of_nearly_all_slots_takes_nearly_nothing():
    tables = Tables.of([np.array([1.0, 0.0])], [7])
    assert tables.frequencies.tolist() == [65_535, 1]
    symbols = np.full(100_000, 7)
    assert len(rans.encode(symbols, np.zeros_like(symbols), tables)) <= 8


@pytest.mark.parametrize("lanes", [1, 4])
def test_symbols_without_an_entry_are_coded_as_numbers(lanes):
    tables = tables_of(3, 5)
    far = [0, 1, -1, 2**20, -(2**20), 2**31 - 1, -(2**31)]
    symbols = np.array(far * 3 + [2] * 40 + far)
    which = np.arange(len(symbols)) % 2
    data = rans.encode(symbols, which, tables, lanes=lanes)
    assert (rans.decode(data, which, tables, lanes=lanes) == symbols).all()
    assert data == rans_plain.encode(symbols, which, tables, lanes=lanes)
    assert tables.escapes(symbols[None], which) >= 24
    ideal = tables.bits(symbols[None], which) / 8
    assert ideal - 8 <= len(data) <= ideal + 8 * lanes


@pytest.mark.parametrize("lanes", [1, 4])
def test_every_cut_and_every_flipped_bit_is_found_out(lanes):
    tables = tables_of(2, 40)
    symbols, which = symbols_of(tables, 700)
    data = rans.encode(symbols, which, tables, lanes=lanes)
    for size in range(len(data)):
        with pytest.raises(CorruptError):
            rans.decode(data[:size], which, tables, lanes=lanes)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptError):
            rans.decode(bytes(damaged), which, tables, lanes=lanes)
    with pytest.raises(CorruptError):
        rans.decode(data + b"\0\0\0\0", which, tables, lanes=lanes)
    with pytest.raises(CorruptError):
        rans.decode(data, which, tables_of(2, 41), lanes=lanes)


@given(st.binary(max_size=200), st.sampled_from([1, 4]))
def test_both_coders_refuse_and_take_the_same_bytes(data, lanes):
    tables, which = tables_of(1, 2, seed=3), np.arange(9) % 2
    found = []
    for decode in (rans.decode, rans_plain.decode):
        try:
            found.append(list(decode(data, which, tables, lanes=lanes)))
        except CorruptError:
            found.append(None)
    assert found[0] == found[1]


@given(
    hnp.arrays(
        np.float64, st.integers(2, 40), elements=st.sampled_from([0, 5e-324, 1e-9, 1, 1e300])
    )
)
def test_frequencies_are_positive_and_sum_to_all_slots(shares):
    if shares.max() <= 0:
        with pytest.raises(RunError, match="probabilities"):
            Tables.of([shares], [0])
        return
    frequencies = Tables.of([shares], [0]).frequencies
    assert frequencies.min() >= 1
    assert frequencies.sum() == TOTAL
    wanted = 1 + shares / shares.max() / (shares / shares.max()).sum() * (TOTAL - len(shares))
    assert np.abs(frequencies - wanted).max() <= 1


@pytest.mark.parametrize("shares", [[1.0], [1.0, np.nan], [1.0, -1.0], [0.0, 0.0], [np.inf, 1.0]])
def test_what_is_no_distribution_is_refused(shares):
    with pytest.raises(RunError, match="These are no frequency tables"):
        Tables.of([np.array(shares)], [0])


@pytest.mark.parametrize(
    "change",
    [
        {"frequencies": np.array([TOTAL - 1, 2], np.uint32)},
        {"frequencies": np.array([TOTAL, 0], np.uint32)},
        {"frequencies": np.array([TOTAL - 2, 1, 1], np.uint32)},
        {"lengths": np.array([0], np.int32)},
        {"offsets": np.array([2**31 - 1], np.int32), "lengths": np.array([2], np.int32)},
        {"offsets": np.zeros(2, np.int32)},
    ],
)
def test_damaged_tables_are_refused(change):
    good = {
        "lengths": np.array([1], np.int32),
        "offsets": np.array([0], np.int32),
        "frequencies": np.array([TOTAL - 1, 1], np.uint32),
    }
    Tables(**good)
    with pytest.raises(RunError, match="These are no frequency tables"):
        Tables(**{**good, **change})


def test_counted_tables_cost_no_more_than_true_ones():
    draw = np.random.default_rng(0)
    scales = np.array([0.3, 1, 5, 40])
    symbols = np.rint(draw.laplace(0, scales, (20_000, 4))).astype(np.int64)
    pattern = np.arange(4)
    tables = Tables.counted(symbols, pattern)
    reach = np.arange(-2000, 2001)
    true = [np.append(np.exp(-np.abs(reach) / s), 1e-9) for s in scales]
    ideal = Tables.of(true, [-2000] * 4)
    new = np.rint(draw.laplace(0, scales, (20_000, 4))).astype(np.int64)
    assert tables.bits(new, pattern) < 1.005 * ideal.bits(new, pattern)
    assert 0 < tables.escapes(new, pattern) < 3e-4 * new.size
    assert tables.lengths.max() < 800


def test_a_table_of_far_symbols_is_where_most_of_them_are():
    symbols = np.concatenate([np.zeros(10), 10**6 + np.arange(9000) % 5000]).astype(np.int64)
    tables = Tables.counted(symbols[:, None], np.zeros(1, np.int64))
    assert tables.lengths[0] <= 4096
    assert tables.offsets[0] == 10**6


def test_tables_come_back_from_arrays_with_their_digest():
    tables = tables_of(3, 300)
    again = Tables.from_arrays(tables.to_arrays())
    assert again.digest == tables.digest
    assert (again.frequencies == tables.frequencies).all()
    assert tables_of(3, 301).digest != tables.digest
    with pytest.raises(RunError, match="no array 'offsets'"):
        Tables.from_arrays({"lengths": tables.lengths})


def test_the_library_that_others_use_takes_as_many_bytes():
    stream = pytest.importorskip("constriction").stream
    tables = tables_of(30, concentration=1.0)
    draw = np.random.default_rng(0)
    places = draw.choice(31, 100_000, p=tables.frequencies / TOTAL).clip(0, 29)
    coder = stream.stack.AnsCoder()
    model = stream.model.Categorical(tables.frequencies / TOTAL, perfect=False)
    coder.encode_reverse(places.astype(np.int32), model)
    theirs = 4 * len(coder.get_compressed())
    which = np.zeros(len(places), np.int64)
    ours = len(rans.encode(places + int(tables.offsets[0]), which, tables))
    assert abs(ours - theirs) <= 0.001 * theirs + 8


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_streams_that_were_written_once_are_read_for_ever(case):
    arrays = {name: np.array(values) for name, values in case["tables"].items()}
    tables = Tables.from_arrays(arrays)
    symbols, which = np.array(case["symbols"]), np.array(case["which"])
    data = bytes.fromhex(case["stream"])
    assert tables.digest == case["digest"]
    assert (rans.decode(data, which, tables, lanes=case["lanes"]) == symbols).all()
    assert rans.encode(symbols, which, tables, lanes=case["lanes"]) == data


def test_another_process_gives_the_same_bytes(tmp_path):
    script = (
        "import numpy as np, sys\n"
        "from pipeline.codecs.entropy import StaticModel\n"
        "x = np.random.default_rng(5).integers(-9, 9, (200, 4, 3, 3))\n"
        "m = StaticModel.counted(x, positions=True)\n"
        "sys.stdout.write(m.digest + m.encode(x.reshape(200, -1)).hex())\n"
    )
    x = np.random.default_rng(5).integers(-9, 9, (200, 4, 3, 3))
    model = StaticModel.counted(x, positions=True)
    own = model.digest + model.encode(x.reshape(200, -1)).hex()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    call = [sys.executable, "-c", script]
    found = subprocess.run(call, capture_output=True, text=True, check=True, env=environment)
    assert found.stdout == own
