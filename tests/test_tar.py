"""Tar archives: as tarfile and GNU tar write them, damaged, and made to deceive."""

from __future__ import annotations

import gzip
import io
import itertools
import shutil
import subprocess
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.storage import tar
from pipeline.storage.tar import BLOCK, Member, TarError, open_tar, read_members

END = bytes(2 * BLOCK)
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


class Drip:
    """A stream with ``read`` alone, which gives at most ``most`` bytes at a time."""

    def __init__(self, raw: bytes, most: int) -> None:
        self.file = io.BytesIO(raw)
        self.most = most

    def read(self, size: int, /) -> bytes:
        return self.file.read(min(size, self.most))


def members(raw: bytes, most: int = 2**20) -> list[Member]:
    return list(read_members(Drip(raw, most)))


def refused(raw: bytes, match: str) -> None:
    with pytest.raises(TarError, match=match):
        members(raw)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def summed(block: bytes, signed: bool = False) -> bytes:
    """A header block with its checksum set right."""
    spaced = block[:148] + b" " * 8 + block[156:]
    total = sum(byte - 256 * (signed and byte > 127) for byte in spaced)
    return block[:148] + b"%06o\0 " % total + block[156:]


def header(
    name: bytes = b"a.png",
    size: int | bytes = 0,
    kind: bytes = b"0",
    *,
    prefix: bytes = b"",
    magic: bytes = b"ustar\x0000",
    signed: bool = False,
) -> bytes:
    size = b"%011o\0" % size if isinstance(size, int) else size
    fields = [(name, 100), (b"0000644\0" * 3, 24), (size, 12), (b"00000000000\0", 12), (b"", 8)]
    fields += [(kind, 1), (b"", 100), (magic, 8), (b"", 80), (prefix, 155), (b"", 12)]
    return summed(b"".join(value.ljust(width, b"\0") for value, width in fields), signed)


def entry(name: bytes, data: bytes, kind: bytes = b"0") -> bytes:
    return header(name, len(data), kind) + padded(data)


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    total = length + len(str(length))
    total = length + len(str(total))
    return b"%d %s=%s\n" % (total, key, value)


def pax(*records: bytes, kind: bytes = b"x") -> bytes:
    return entry(b"pax", b"".join(records), kind)


def written(files: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


A, B = Member("a.png", b"A" * 700), Member("b.cls", b"1")
TWO = written([(A.name, A.data or b""), (B.name, B.data or b"")])


# As others write it


NAMES = st.binary(min_size=1, max_size=300).filter(
    lambda name: b"\0" not in name and not name.endswith(b"/")
)
DATA = st.one_of(st.binary(max_size=40), st.sampled_from([511, 512, 513, 1024, 1025]).map(bytes))


@settings(max_examples=200)
@given(
    files=st.lists(st.tuples(NAMES, DATA), max_size=6),
    form=st.sampled_from(FORMATS),
    most=st.sampled_from([1, 100, 512, 700, 2**20]),
)
def test_it_reads_what_tarfile_reads(
    files: list[tuple[bytes, bytes]], form: int, most: int
) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name.decode("utf-8", "surrogateescape"))
            info.size = len(data)
            try:
                archive.addfile(info, io.BytesIO(data))
            except ValueError:
                assert form == tarfile.USTAR_FORMAT  # it has no room for the name
    raw = file.getvalue()
    with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as archive:
        expected = []
        for info in archive:
            name = info.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            content = archive.extractfile(info)
            assert content
            expected.append(Member(name, content.read()))
    assert members(raw, most) == expected
    compressed = io.BytesIO(gzip.compress(raw))
    assert list(read_members(open_tar(compressed, "x.tar.gz"))) == expected


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_no_plain_file_has_no_data(form: int) -> None:
    kinds = [
        ("link.png", tarfile.LNKTYPE),
        ("soft.png", tarfile.SYMTYPE),
        ("char.png", tarfile.CHRTYPE),
        ("block.png", tarfile.BLKTYPE),
        ("fifo.png", tarfile.FIFOTYPE),
        ("folder.png", tarfile.DIRTYPE),
        ("n" * 200 + "/" + "m" * 90, tarfile.SYMTYPE),
    ]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name, kind in kinds:
            info = tarfile.TarInfo(name if form != tarfile.USTAR_FORMAT else name[-100:])
            info.type, info.linkname = kind, "/etc/" + "p" * (90 if form == FORMATS[0] else 200)
            archive.addfile(info)
    found = members(file.getvalue() + bytes(BLOCK))
    assert [m.name[-90:] for m in found] == [
        name[-90:] for name, kind in kinds if kind != tarfile.DIRTYPE
    ]
    assert all(member.data is None for member in found)


@pytest.mark.parametrize("form", ["gnu", "oldgnu", "posix"])
def test_gnu_tar_with_sparse_files(form: str, tmp_path: Path) -> None:
    tool = shutil.which("tar")
    if not tool or "GNU" not in subprocess.check_output([tool, "--version"], text=True):
        pytest.skip("no GNU tar")
    (tmp_path / "in").mkdir()
    long = "l" * 180 + ".png"
    for name in ("a.png", long, "z.png"):
        (tmp_path / "in" / name).write_bytes(name.encode())
    with (tmp_path / "in" / "sparse.png").open("wb") as file:
        for hole in range(60):  # more than GNU's header has room for
            file.seek(hole * 65536)
            file.write(b"x")
    (tmp_path / "in" / "soft.png").symlink_to("a.png")
    command = [tool, "-S", f"--format={form}", "--sort=name", "-cf", tmp_path / "x.tar"]
    subprocess.run([*command, "-C", tmp_path / "in", "."], check=True)
    with (tmp_path / "x.tar").open("rb") as file:
        found = {member.name: member.data for member in read_members(file)}
    plain = {f"./{name}": name.encode() for name in ("a.png", long, "z.png")}
    sparse = found.pop("./sparse.png")
    if sparse is not None:  # the file system keeps no holes
        assert len(sparse) == 59 * 65536 + 1
    assert found == {**plain, "./soft.png": None}


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_webdataset_archives(name: str, tmp_path: Path) -> None:
    from webdataset.writer import TarWriter

    with TarWriter(str(tmp_path / name)) as writer:
        for row in range(5):
            writer.write({"__key__": f"d/{row}", "cls": row, "txt": "x" * row})
    with (tmp_path / name).open("rb") as file:
        found = list(read_members(open_tar(file, name)))
    assert {m.name: m.data for m in found} == {
        **{f"d/{row}.cls": b"%d" % row for row in range(5)},
        **{f"d/{row}.txt": b"x" * row for row in range(5)},
    }


def test_the_end_blocks_and_zeros_after_them() -> None:
    body = TWO.rstrip(b"\0")
    body = padded(body)
    for zeros in (1024, 1025, 1536, 10240, 3 * 2**20):
        assert members(body + bytes(zeros)) == [A, B]
    assert members(END) == []


def test_old_headers() -> None:
    raw = header(b"v7.png", 1, b"\0", magic=b"") + padded(b"x")
    raw += header(b"folder/", 0, b"\0", magic=b"")
    raw += header(b"contiguous.png", 1, b"7") + padded(b"y")
    raw += header(b"none.png", b"\0" * 12) + header(b"spaces.png", b"          1 ") + padded(b"z")
    found = members(raw + END)
    assert [m.name for m in found] == ["v7.png", "contiguous.png", "none.png", "spaces.png"]
    assert [m.data for m in found] == [b"x", b"y", b"", b"z"]


def test_both_checksums_of_bytes_beyond_ascii() -> None:
    name = "é.png"
    for signed in (False, True):
        raw = header(name.encode(), 1, signed=signed) + padded(b"x") + END
        assert members(raw) == [Member(name, b"x")]
    refused(header(name.encode()).replace(b".png", b".pnh") + END, "checksum")


def test_a_prefix_belongs_to_ustar_alone() -> None:
    assert members(header(b"a", prefix=b"p/q") + END) == [Member("p/q/a", b"")]
    gnu = header(b"a", prefix=b"15002000000\0", magic=b"ustar  \0")
    assert members(gnu + END) == [Member("a", b"")]


def test_sizes_in_base_256() -> None:
    field = b"\x80" + (700).to_bytes(11)
    assert members(header(b"a.png", field) + padded(b"A" * 700) + END) == [A]


def test_pax_headers_in_order_of_strength() -> None:
    path = record(b"path", b"p")
    both = pax(record(b"path", b"first"), path, record(b"mtime", b"1.5")) + entry(b"a", b"1")
    assert members(both + entry(b"b", b"2") + END) == [Member("p", b"1"), Member("b", b"2")]
    shared = pax(record(b"path", b"g"), record(b"comment", b"x" * 2000), kind=b"g")
    raw = shared + entry(b"a", b"1") + both + pax(record(b"path", b"")) + entry(b"c", b"3")
    assert [m.name for m in members(raw + END)] == ["g", "p", "c"]
    size = pax(record(b"size", b"700"))
    assert members(size + header(b"a.png", 0) + padded(b"A" * 700) + END) == [A]
    binary = pax(record(b"hdrcharset", b"BINARY"), record(b"path", b"\xff\n=1 \xfe"))
    assert members(binary + entry(b"a", b"1") + END)[0].name == "\\xff\n=1 \\xfe"


def test_gnu_names_and_link_names() -> None:
    name = b"n" * 4096
    raw = entry(b"././@LongLink", name + b"\0", b"L") + entry(b"short", b"1")
    raw += entry(b"././@LongLink", b"t" * 300 + b"\0", b"K") + header(b"link", 0, b"2")
    assert members(raw + END) == [Member("n" * 4096, b"1"), Member("link", None)]


def test_sparse_files_of_every_kind_have_no_data() -> None:
    after = entry(b"after", b"1") + END
    found = [Member("s.png", None), Member("after", b"1")]
    for version in (record(b"GNU.sparse.major", b"1"), record(b"GNU.sparse.size", b"9")):
        name = record(b"GNU.sparse.name", b"s.png")
        raw = pax(version, name, record(b"path", b"GNUSparseFile.0/s.png")) + entry(b"x", b"map")
        assert members(raw + after) == found
        # Where GNU's header says that its map goes on, this one's prefix does.
        raw += pax(version, name) + header(b"x", 3, prefix=b"p" * 155) + padded(b"map")
        folder = pax(version) + header(b"folder", 0, b"5")
        assert members(raw + folder + after) == [found[0], *found]
    old = bytearray(header(b"s.png", 600, b"S", magic=b"ustar  \0"))
    assert members(summed(bytes(old)) + padded(bytes(600)) + after) == found
    old[482] = 1
    more = [bytes([255]) * 504 + b"\1" + bytes(7), bytes([255]) * 504 + bytes(8)]
    assert members(summed(bytes(old)) + b"".join(more) + padded(bytes(600)) + after) == found


def test_unknown_types_are_passed_over_with_their_data() -> None:
    raw = entry(b"label", b"", b"V") + entry(b"odd", header(b"hidden"), b"Z") + entry(b"b", b"2")
    assert members(raw + END) == [Member("label", None), Member("odd", None), Member("b", b"2")]


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        (b"../../x.png", "../../x.png"),
        (b"/etc/passwd", "/etc/passwd"),
        (b"a\0hidden.png", "a"),
        (b"...", "..."),
        (b"..", ".."),
        (b"", ""),
        (b"\xff\xfe.png", "\\xff\\xfe.png"),
        (b"\xed\xa0\x80", "\\xed\\xa0\\x80"),  # half of a surrogate pair
        (b"n" * 100, "n" * 100),
    ],
)
def test_names_are_given_as_they_are(stored: bytes, name: str) -> None:
    assert members(entry(stored, b"1") + END) == [Member(name, b"1")]
    name.encode()


class Repeated:
    """A stream of the same bytes over and over, and an end."""

    def __init__(self, data: bytes, times: int, end: bytes) -> None:
        self.parts = itertools.chain(itertools.repeat(data, times), [end])
        self.left = b""

    def read(self, size: int, /) -> bytes:
        self.left = self.left or next(self.parts, b"")
        found, self.left = self.left[:size], self.left[size:]
        return found


def test_a_million_tiny_members() -> None:
    block = bytearray(header(b"000.cls", 1))
    parts = []
    for row in range(1000):
        block[:3] = b"%03d" % row
        parts += [summed(bytes(block)), padded(b"%d" % (row % 10))]
    expected = [Member(f"{row:03d}.cls", b"%d" % (row % 10)) for row in range(1000)]
    found = read_members(Repeated(b"".join(parts), 1000, END))
    for _ in range(1000):
        assert list(itertools.islice(found, 1000)) == expected
    assert not list(found)


# Damaged


def test_a_cut_anywhere_before_the_end_is_seen() -> None:
    body = len(padded(TWO.rstrip(b"\0")))
    assert body == 4 * BLOCK + BLOCK
    cuts = {0, 1, 100, 511, body - 1, body, body + 1, body + 512, body + 1023}
    cuts |= set(range(0, body, 64)) | {3 * BLOCK}
    for cut in sorted(cuts):
        refused(TWO[:cut], "empty" if cut == 0 else "breaks off")
    assert members(TWO[: body + 1024]) == [A, B]


def test_members_before_the_cut_are_given_first() -> None:
    stream = read_members(io.BytesIO(TWO[: 3 * BLOCK]))
    assert next(stream) == A
    with pytest.raises(TarError, match=r"breaks off \(at byte 1536\)"):
        next(stream)


def test_a_lone_block_of_zeros_is_no_end() -> None:
    refused(entry(b"a", b"1") + bytes(BLOCK) + entry(b"b", b"2") + END, "lone block")


@pytest.mark.parametrize("after", [TWO, b"x", bytes(700) + b"\1", bytes(2**21) + b"x"])
def test_what_follows_the_end_is_not_lost_in_silence(after: bytes) -> None:
    refused(TWO + after, "data follow the end")
    place = len(TWO + after) - len(after.lstrip(b"\0"))
    refused(TWO + after, rf"at byte {place}\)")


def test_every_flipped_bit_in_a_header_is_seen() -> None:
    # Contents have no checksum in a tar, nor have PAX records and GNU's long names, which are
    # contents of a member: a flip there cannot be seen.
    raw = TWO[: 7 * BLOCK]
    headers = [*range(BLOCK), *range(3 * BLOCK, 4 * BLOCK), *range(5 * BLOCK, 7 * BLOCK)]
    harmless = 0
    for place in headers:
        for bit in range(8):
            flipped = bytearray(raw)
            flipped[place] ^= 1 << bit
            try:
                assert members(bytes(flipped)) == [A, B]
            except TarError:
                continue
            # A zero may be a space at the ends of the checksum, which does not count itself.
            assert 148 <= place % BLOCK < 156
            harmless += 1
    assert harmless <= 2 * 6


@pytest.mark.parametrize("level", [0, 9])
def test_a_damaged_gzip_stream_is_seen(level: int) -> None:
    raw = gzip.compress(TWO, level, mtime=0)

    def read(data: bytes) -> list[Member]:
        return list(read_members(open_tar(io.BytesIO(data), "x.TGZ")))

    assert read(raw) == [A, B]
    for cut in range(len(raw)):
        with pytest.raises(TarError):
            read(raw[:cut])
    for place in range(10, len(raw)):  # before it lie time, operating system and the like
        for bit in range(8):
            flipped = raw[:place] + bytes([raw[place] ^ 1 << bit]) + raw[place + 1 :]
            try:
                assert read(flipped) == [A, B]  # as where another repeat gives the same bytes
            except TarError:
                continue
            assert place < len(raw) - 8, "the stream's own checksum and length"
    with pytest.raises(TarError):
        read(raw + b"junk")
    with pytest.raises(TarError):
        read(TWO)


def test_an_archive_of_several_gzip_members_is_one() -> None:
    raw = gzip.compress(TWO[:1000]) + gzip.compress(TWO[1000:])
    assert list(read_members(open_tar(io.BytesIO(raw), "x.tar.gz"))) == [A, B]


def test_errors_of_the_stream_are_not_the_archives() -> None:
    class Failing(Drip):
        def read(self, size: int, /) -> bytes:
            if self.file.tell() >= 1024:
                raise ConnectionResetError
            return super().read(size)

    with pytest.raises(ConnectionResetError):
        list(read_members(Failing(TWO, 512)))


# Made to deceive


NEGATIVE = [b"\xff" * 12, b"\xff" * 10 + b"\xfe\0", b"\xc0" + bytes(11), b"-0000000512\0"]


@pytest.mark.parametrize("kind", [b"0", b"x", b"g", b"L", b"K", b"S", b"2", b"5", b"Z"])
@pytest.mark.parametrize("size", NEGATIVE)
def test_negative_sizes(kind: bytes, size: bytes) -> None:
    refused(entry(b"a", b"1") + header(b"b", size, kind) + END, "size is no number")


@pytest.mark.parametrize("kind", [b"0", b"x", b"g", b"L", b"K", b"S", b"2", b"5", b"Z"])
@pytest.mark.parametrize("size", [b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xbf" + b"\xff" * 11])
def test_absurd_sizes(kind: bytes, size: bytes) -> None:
    refused(entry(b"a", b"1") + header(b"b", size, kind) + END, r"too many \(at byte 1024\)")


@pytest.mark.parametrize("field", [b"1_0\0", b"+10\0", b"0x10\0", b"8\0", b"1\x001\0", b"1e3\0"])
def test_sizes_that_python_would_read_and_tar_does_not(field: bytes) -> None:
    refused(header(b"b", field.ljust(12, b"\0")) + padded(bytes(8)) + END, "size is no number")


@pytest.mark.parametrize(
    "value", [b"-512", b"1_0", b"+1", b" 1", b"0x1", b"1.5", b"9" * 5000, b"\xd9\xa1"]
)
def test_pax_sizes_that_are_no_numbers(value: bytes) -> None:
    refused(pax(record(b"size", value)) + entry(b"a", b"1") + END, "size that is no number")


def test_pax_sizes_that_lie() -> None:
    hidden = entry(b"hidden", b"2")
    refused(pax(record(b"size", b"9" * 19)) + entry(b"a", b"1") + END, "too many")
    refused(pax(record(b"size", b"99999")) + entry(b"a", b"1") + END, "breaks off")
    refused(pax(record(b"size", b"0")) + entry(b"a", b"1") + END, "checksum")
    # What a header's size hides is seen by nobody; what a PAX size covers is contents.
    raw = pax(record(b"size", b"1024")) + header(b"a", 0) + hidden + END
    assert members(raw) == [Member("a", hidden)]


@pytest.mark.parametrize(
    "records",
    [
        b"0 path=x\n",
        b"00 path=x\n",
        b"1 path=x\n",
        b"2 path=x\n",
        b"-9 path=x\n",
        b"+9 path=x\n",
        b"09 path=x\n",
        b"9 path=x ",
        b"8 path=x\n",
        b"99 path=x\n",
        b"9" * 5000 + b" path=x\n",
        b"9 path:x\n",
        b"path=x\n",
        b"9 path=x\n\0",
        b" ",
    ],
)
@pytest.mark.parametrize("kind", [b"x", b"g"])
def test_damaged_pax_records(records: bytes, kind: bytes) -> None:
    refused(entry(b"pax", records, kind) + entry(b"a", b"1") + END, "PAX header is damaged")


def test_names_with_nul_where_they_have_a_length() -> None:
    for head in (
        pax(record(b"path", b"a\0b")),
        pax(record(b"path", b"a\0b"), kind=b"g"),
        pax(record(b"GNU.sparse.name", b"a\0")),
        entry(b"long", b"a\0b\0", b"L"),
    ):
        refused(head + entry(b"a", b"1") + END, "NUL")


@pytest.mark.parametrize(
    "heads",
    [
        pax(record(b"mtime", b"1")) * 2,
        pax(record(b"path", b"p")) + entry(b"l", b"q\0", b"L"),
        entry(b"l", b"q\0", b"L") * 2,
        entry(b"l", b"q\0", b"K") * 2,
        pax(record(b"mtime", b"1")) * 5000,  # a reader that recurses overflows its stack
    ],
)
def test_two_headers_that_readers_choose_between(heads: bytes) -> None:
    refused(heads + entry(b"a", b"1") + END, "two")


@pytest.mark.parametrize("head", [pax(record(b"path", b"p")), entry(b"l", b"q\0", b"L")])
def test_a_header_without_its_member(head: bytes) -> None:
    refused(head + END, "belongs to no member")


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"5", b"6"])
def test_data_after_what_is_no_file(kind: bytes) -> None:
    refused(entry(b"a", header(b"hidden"), kind) + END, "no file and has 512 bytes")
    refused(pax(record(b"size", b"512")) + header(b"a", 0, kind) + header() + END, "no file")


def test_a_folder_of_v7_has_no_data() -> None:
    refused(entry(b"a/", b"x", b"\0") + END, "no file")


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_large_extended_headers(kind: bytes) -> None:
    size = tar.MAX_EXTENSION_BYTES + 1
    refused(header(b"x", size, kind) + bytes(size) + END, "extended header has 1048577 bytes")


def test_large_members_and_archives(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TarError, match="more than 2048 bytes"):
        list(read_members(io.BytesIO(TWO), max_bytes=2048))
    with pytest.raises(TarError, match=r"member 'a\.png' has 700 bytes"):
        list(read_members(Drip(TWO, 512), max_bytes=1024))
    assert list(read_members(io.BytesIO(TWO), max_bytes=len(TWO))) == [A, B]
    monkeypatch.setattr(tar, "MAX_MEMBER_BYTES", 699)
    refused(TWO, r"member 'a\.png' has 700 bytes")
    monkeypatch.setattr(tar, "MAX_MEMBER_BYTES", 700)
    assert members(TWO) == [A, B]


@pytest.mark.parametrize("kind", [b"0", b"Z", b"S"])
def test_a_size_beyond_the_file_takes_no_memory(kind: bytes) -> None:
    raw = header(b"a", tar.MAX_MEMBER_BYTES, kind) + bytes(3 * 2**20)
    tracemalloc.start()
    try:
        refused(raw, "breaks off")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * 2**20


@pytest.mark.parametrize(
    "bomb",
    [
        lambda: END + bytes(2**26),
        lambda: header(b"a", 2**26, b"Z") + bytes(2**26) + END,
        lambda: header(b"a", 2**26) + bytes(2**26) + END,
        lambda: pax(record(b"comment", b"x" * 2**19), kind=b"g") * 2**7 + END,
        lambda: header(b"s", 0, b"S")[:148] + b"\1" * 2**26,
    ],
    ids=["zeros", "unknown type", "file", "headers", "garbage"],
)
def test_a_bomb_is_not_unpacked_beyond_the_limit(bomb: Callable[[], bytes]) -> None:
    file = io.BytesIO(gzip.compress(bomb(), 1))
    with pytest.raises(TarError):
        list(read_members(open_tar(file, "x.tgz"), max_bytes=2**22))
    assert file.tell() < len(file.getvalue()) / 4


def test_an_endless_sparse_map_ends_with_the_file() -> None:
    old = bytearray(header(b"s", 0, b"S", magic=b"ustar  \0"))
    old[482] = 1
    refused(summed(bytes(old)) + b"\1" * (BLOCK * 1000), "breaks off")


RICH = (
    TWO[: 5 * BLOCK]
    + pax(record(b"path", "é".encode() * 90), record(b"size", b"5"))
    + entry(b"short", b"12345")
    + entry(b"././@LongLink", b"n" * 600 + b"\0", b"L")
    + entry(b"n", b"x" * 513)
    + pax(record(b"comment", b"c"), kind=b"g")
    + header(b"link", 0, b"2")
    + header(b"sparse", 3, b"S", magic=b"ustar  \0")
    + padded(b"xyz")
    + END
)
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["set", "cut", "insert", "repeat"]),
        st.integers(0, len(RICH)),
        st.binary(min_size=1, max_size=12),
    ),
    min_size=1,
    max_size=5,
)


def changed(raw: bytes, changes: list[tuple[str, int, bytes]], refit: bool) -> bytes:
    for how, place, data in changes:
        if how == "set":
            raw = raw[:place] + data + raw[place + len(data) :]
        elif how == "cut":
            raw = raw[:place] + raw[place + len(data) * 100 :]
        elif how == "insert":
            raw = raw[:place] + padded(data) + raw[place:]
        else:
            raw = raw[:place] + raw[max(0, place - BLOCK * len(data)) :]
    if refit:  # so that what a header says is looked at
        blocks = [raw[place : place + BLOCK] for place in range(0, len(raw), BLOCK)]
        raw = b"".join(
            summed(b) if b[257:262] == b"ustar" and len(b) == BLOCK else b for b in blocks
        )
    return raw


def test_the_archive_to_be_changed_is_sound() -> None:
    found = members(RICH)
    assert [m.name[:6] for m in found] == ["a.png", "b.cls", "é" * 6, "n" * 6, "link", "sparse"]
    assert changed(RICH, [], refit=True) == RICH


@settings(max_examples=600)
@given(changes=CHANGES, refit=st.booleans(), most=st.sampled_from([300, 2**20]))
def test_changed_archives_give_members_or_an_error(
    changes: list[tuple[str, int, bytes]], refit: bool, most: int
) -> None:
    raw = changed(RICH, changes, refit)
    try:
        found = members(raw, most)
    except TarError:
        return
    assert sum(len(member.data or b"") for member in found) <= len(raw)
    assert len(found) <= len(raw) / BLOCK


@settings(max_examples=200)
@given(raw=st.binary(max_size=3000))
def test_random_bytes_give_an_error(raw: bytes) -> None:
    with pytest.raises(TarError):
        members(raw.rstrip(b"\0"))
