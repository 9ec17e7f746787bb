"""Tokens as bytes: what is written, what is read back, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import RunError
from pipeline.tokenizers.tokens import TokenForm, Tokens, form_of_bits, form_of_vocabulary


def draw(form: TokenForm, count: int, seed: int) -> Tokens:
    rng = np.random.default_rng(seed)
    lengths = torch.from_numpy(rng.integers(1, form.max_tokens + 1, count))
    if form.kind == "bits":
        values = rng.integers(0, 2, (count, form.max_tokens, form.bits)).astype(np.uint8)
    else:
        values = rng.integers(0, form.vocabulary, (count, form.max_tokens))
    return Tokens(torch.from_numpy(values), lengths, form)


forms = st.one_of(
    st.builds(form_of_bits, st.integers(1, 70), st.integers(1, 9)),
    st.builds(form_of_vocabulary, st.integers(2, 2**40), st.integers(1, 9)),
)


@given(forms, st.integers(1, 5), st.integers(0, 99))
def test_packed_tokens_come_back(form: TokenForm, count: int, seed: int) -> None:
    tokens = draw(form, count, seed)
    packed = tokens.pack()
    again = Tokens.unpack(packed, tokens.lengths, form)
    assert again.pack() == packed
    assert [len(row) for row in packed] == [form.bytes_of(k) for k in tokens.lengths.tolist()]
    kept = tokens.kept
    assert torch.equal(again.values[kept], tokens.values[kept])
    assert not again.values[~kept].any()


def test_bit_zero_of_the_first_token_is_the_lowest_bit_of_the_first_byte() -> None:
    form = form_of_vocabulary(4096, 3)
    ids = torch.tensor([[0x001, 0xABC, 0x800]])
    packed = Tokens(ids, torch.tensor([3]), form).pack()[0]
    # 0x800 << 24 | 0xABC << 12 | 0x001, low byte first.
    assert packed == (0x800ABC001).to_bytes(5, "little")
    assert form.bytes_of(3) == 5
    assert form.bytes_of(2) == 3


@pytest.mark.parametrize(
    ("vocabulary", "bits"), [(2, 1), (4096, 12), (4097, 13), (64_000, 16), (100_000, 17)]
)
def test_ids_take_as_few_bits_as_hold_them(vocabulary: int, bits: int) -> None:
    assert form_of_vocabulary(vocabulary, 1).bits == bits


def test_long_ids_keep_their_low_bits() -> None:
    # A sum of floats would lose them: 2^36 - 1 has more bits than a float32.
    form = form_of_vocabulary(2**36, 1)
    ids = torch.tensor([[2**36 - 1], [2**35 + 1]])
    one = torch.ones(2, dtype=torch.int64)
    tokens = Tokens(ids, one, form)
    assert torch.equal(Tokens.unpack(tokens.pack(), one, form).values, ids)


def test_what_lies_behind_the_length_is_not_written() -> None:
    form = form_of_bits(3, 4)
    tokens = draw(form, 6, 0).cut(2)
    other = Tokens(torch.where(tokens.kept[..., None], tokens.values, 1), tokens.lengths, form)
    assert other.pack() == tokens.pack()


def test_a_cut_never_lengthens() -> None:
    tokens = draw(form_of_bits(3, 4), 6, 0)
    assert torch.equal(tokens.cut(9).lengths, tokens.lengths)
    assert tokens.cut(1).lengths.tolist() == [1] * 6


@pytest.mark.parametrize(
    ("row", "length", "form"),
    [
        (b"\x01", 3, form_of_bits(8, 4)),  # too few bytes
        (b"\x01" * 5, 5, form_of_bits(8, 4)),  # more tokens than an image has
        (b"\xff", 1, form_of_bits(3, 4)),  # bits behind the last token
        (b"\x0b", 1, form_of_vocabulary(11, 4)),  # no such id
        (b"", 0, form_of_bits(8, 4)),
    ],
)
def test_damaged_tokens_are_refused(row: bytes, length: int, form: TokenForm) -> None:
    with pytest.raises(RunError, match="damaged") as caught:
        Tokens.unpack([row], [length], form)
    assert caught.value.code == "damaged-tokens"
