"""Lists of URLs: what is fetched, what is refused, and what becomes of the rest."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from layouts import IMAGES, column, rows_of, write, write_images, write_parquet
from samples import local_run

from pipeline.errors import UsageError
from pipeline.stages.decode import Decode
from pipeline.storage.artifact import ArtifactSource
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.open_source import open_source
from pipeline.storage.parquet import ParquetFormat, read_table
from pipeline.storage.regroup import GroupedSource
from pipeline.storage.store import LocalStore
from pipeline.storage.urls import UrlSource
from pipeline.testing import check_source


@dataclass
class Server:
    """Serves images under their numbers; a path of three digits gives that status."""

    url: str
    asked: list[str] = field(default_factory=list)
    failing: dict[str, int] = field(default_factory=dict)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    known = Server("")

    class Handler(BaseHTTPRequestHandler):
        def respond(self, body: bool) -> None:
            name = self.path.lstrip("/").partition("?")[0]
            if body:
                known.asked.append(self.path)
            status = int(name) if len(name) == 3 else 200
            if known.failing.get(self.path, 0) > 0:
                known.failing[self.path] -= body
                status = 503
            data = IMAGES[int(name[0])] if status == 200 else b"no"
            self.send_response(status)
            if "unsized" not in name:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

        def do_GET(self) -> None:
            self.respond(body=True)

        def do_HEAD(self) -> None:
            self.respond(body=False)

        def log_message(self, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    known.url = f"http://127.0.0.1:{http.server_port}"
    yield known
    http.shutdown()
    thread.join()
    http.server_close()


def listed(root: Path, *lines: str) -> UrlSource:
    write(root / "list.txt", "\n".join(lines))
    source = open_source(root / "list.txt", "train")
    assert isinstance(source, UrlSource)
    return source


def test_urls_are_fetched_in_their_order(tmp_path: Path, server: Server) -> None:
    urls = [f"{server.url}/{row}.png" for row in (3, 0, 5)]
    source = listed(tmp_path, *urls)
    assert source.classes == ()
    assert rows_of(source) == [
        {"key": url, "url": url, "image": IMAGES[row], "error": None}
        for url, row in zip(urls, (3, 0, 5), strict=True)
    ]
    check_source(source)
    assert open_source(tmp_path / "list.txt", "test") is None


def test_a_server_need_not_say_how_long_a_file_is(tmp_path: Path, server: Server) -> None:
    assert column(listed(tmp_path, f"{server.url}/4unsized.png"), "image") == IMAGES[4:5]


def test_classes_stand_behind_a_tab(tmp_path: Path, server: Server) -> None:
    source = listed(
        tmp_path,
        "# a comment",
        f"{server.url}/1.png\tzebra",
        "",
        f"  {server.url}/2.png?a=b&c=%20\t ant \textra",
        f"{server.url}/3.png",
    )
    assert source.classes == ("ant", "zebra")
    assert column(source, "label") == [1, 0, None]
    assert column(source, "key")[1] == f"{server.url}/2.png?a=b&c=%20"
    check_source(source, may_lack=["label"])


def test_take_fetches_no_more_than_it_must(tmp_path: Path, server: Server) -> None:
    urls = [f"{server.url}/{row}.png" for row in range(5)]
    for source in (listed(tmp_path, *urls), GroupedSource(listed(tmp_path, *urls), 1)):
        server.asked.clear()
        table = source.take(source.shards[0], urls[1:3])
        assert table["image"].to_pylist() == IMAGES[1:3]
        assert set(server.asked) == {"/1.png", "/2.png"}


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_a_refusal_is_final(tmp_path: Path, server: Server, status: int) -> None:
    source = listed(tmp_path, f"{server.url}/{status}", f"{server.url}/1.png")
    bad, good = rows_of(source)
    assert bad["image"] is None
    assert bad["error"]
    assert (good["image"], good["error"]) == (IMAGES[1], None)
    assert server.asked.count(f"/{status}") <= 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_in_trouble_is_asked_again(tmp_path: Path, server: Server, status: int) -> None:
    server.failing["/2.png"] = 2
    source = listed(tmp_path, f"{server.url}/{status}", f"{server.url}/2.png")
    bad, good = rows_of(source)
    assert str(status) in bad["error"]
    assert server.asked.count(f"/{status}") == 3
    assert (good["image"], good["error"]) == (IMAGES[2], None)


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("file:///etc/passwd", "'file://' is not fetched"),
        ("FILE:///etc/passwd", "is not fetched"),
        ("local:///etc/passwd", "is not fetched"),
        ("ftp://127.0.0.1/x", "is not fetched"),
        ("memory://x/y", "is not fetched"),
        ("simplecache::file:///etc/passwd", "is not fetched"),
        ("github://a:b@c/d", "is not fetched"),
        ("/etc/passwd", "below the list's own folder"),
        ("../secret.png", "below the list's own folder"),
        ("images/../../secret.png", "below the list's own folder"),
        ("//etc/passwd", "below the list's own folder"),
        ("s3://bucket", "names no file"),
        ("s3://bucket/", "names no file"),
        ("http://127.0.0.1", "names no file"),
        ("http://127.0.0.1:1/x.png", "Connect call failed"),
        ("s3:/bucket/x", "FileNotFoundError"),
        ("~/x.png", "FileNotFoundError"),
        ("data:image/png;base64,AAAA", "FileNotFoundError"),
        ("gone.png", "FileNotFoundError"),
        ("folder", "IsADirectoryError"),
        ("nul\0.png", "ValueError"),
        ("x" * 5000, "File name too long"),
    ],
)
def test_what_must_not_or_cannot_be_read_has_an_error(
    tmp_path: Path, server: Server, url: str, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "list" / "folder").mkdir(parents=True)
    write_images(tmp_path, "secret.png", "list/1.png", "s3:/x", "list/list.txt")
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "s3:/bucket", b"local")
    source = UrlSource(LocalStore(tmp_path / "list"), (url, "1.png"))
    bad, good = rows_of(source)
    assert bad["image"] is None
    assert error in bad["error"]
    assert good["image"] == IMAGES[1]


def test_a_file_beyond_the_limit_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.urls.MAX_BYTES", len(IMAGES[0]) - 1)
    write_images(tmp_path, "1.png")
    assert "more than" in rows_of(listed(tmp_path, "1.png"))[0]["error"]
    monkeypatch.setattr("pipeline.storage.urls.MAX_BYTES", len(IMAGES[0]))
    assert column(listed(tmp_path, "1.png"), "image") == IMAGES[:1]


def test_objects_are_fetched_from_their_store(tmp_path: Path, s3: ObjectStore) -> None:
    for name in ("a/1.png", "a/[2] #%20?.png"):
        s3.replace(name, name.encode())
    names = [f"{s3.url}/a/1.png", f"{s3.url}/a/[2] #%20?.png", f"{s3.url}/a/3.png"]
    found = rows_of(listed(tmp_path, *names))
    assert [row["image"] for row in found] == [b"a/1.png", b"a/[2] #%20?.png", None]
    assert "FileNotFoundError" in found[2]["error"]


def test_what_was_not_fetched_is_quarantined_and_can_be_retried(
    tmp_path: Path, server: Server
) -> None:
    server.failing["/2.png"] = 3
    lines = [f"{server.url}/{name}\tant" for name in ("1.png", "404", "2.png")]
    source = listed(tmp_path, *lines, "file:///etc/passwd\tant")
    step = local_run(tmp_path / "out", max_bad=3).map(
        "decode", source, [Decode(8, 3)], to=ParquetFormat()
    )
    assert isinstance(step, ArtifactSource)
    assert step.artifact.manifest["counts"]["quarantined"] == {"unreadable": 3}
    bad = read_table(next((tmp_path / "out").glob("*/quarantine/*.parquet")))
    assert bad["key"].to_pylist()[0] == f"{server.url}/404"
    assert bad["reason"].to_pylist() == ["unreadable"] * 3
    assert all(bad["detail"].to_pylist())
    again = local_run(tmp_path / "out", max_bad=3, retry=frozenset({"unreadable"}))
    step = again.map("decode", source, [Decode(8, 3)], to=ParquetFormat())
    assert column(step, "key") == [f"{server.url}/1.png", f"{server.url}/2.png"]
    assert step.artifact.manifest["counts"]["quarantined"] == {"unreadable": 2}


def test_identity_follows_urls_and_labels() -> None:
    store = LocalStore(Path("/nowhere"))
    first = UrlSource(store, ("a", "b"), (0, 1), ("x", "y"))
    assert UrlSource(LocalStore(Path("/else")), ("a", "b"), (0, 1), ("x", "y")).identity == (
        first.identity
    )
    for other in (
        UrlSource(store, ("b", "a"), (0, 1), ("x", "y")),
        UrlSource(store, ("a", "b"), (1, 0), ("x", "y")),
        UrlSource(store, ("a", "b"), (0, 1), ("y", "x")),
        UrlSource(store, ("a", "b"), (0, None), ("x", "y")),
        UrlSource(store, ("a", "b")),
    ):
        assert other.identity != first.identity


def test_lists_are_cut_into_shards_of_1000(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pipeline.storage.urls.SHARD_ROWS", 2)
    write_images(tmp_path, *(f"{row}.png" for row in range(5)))
    source = listed(tmp_path, *(f"{row}.png\tc{row % 2}" for row in range(5)))
    assert [shard.rows for shard in source.shards] == [2, 2, 1]
    assert column(source, "label") == [0, 1, 0, 1, 0]
    check_source(source)
    before = source.shards
    after = listed(tmp_path, *(f"{row}.png\tc{row % 2}" for row in (0, 1, 2, 1, 4))).shards
    same = [a.identity == b.identity for a, b in zip(before, after, strict=True)]
    assert same == [True, False, True]


# Parquet


def table(root: Path, columns: dict[str, Any]) -> UrlSource:
    write_images(root, "1.png", "2.png", "3.png")
    write_parquet(root / "list.parquet", {"url": ["1.png", "2.png", "3.png"], **columns}, ())
    source = open_source(root, "train")
    assert isinstance(source, UrlSource)
    return source


@pytest.mark.parametrize(
    ("labels", "classes", "found"),
    [
        ([0, 2, 0], ("0", "1", "2"), [0, 2, 0]),
        ([0, None, -1], ("0",), [0, None, None]),
        (["b", "a", None], ("a", "b"), [1, 0, None]),
        ([None, None, None], (), None),
        ([-1, -1, -1], (), None),
    ],
)
def test_labels_are_numbers_or_names(
    tmp_path: Path, labels: list[Any], classes: tuple[str, ...], found: list[int | None] | None
) -> None:
    source = table(tmp_path, {"label": labels, "caption": ["x"] * 3})
    assert source.classes == classes
    if found is None:
        assert "label" not in rows_of(source)[0]
    else:
        assert column(source, "label") == found
    assert column(source, "image") == IMAGES[:3]
    check_source(source, may_lack=["label"])


def test_names_that_are_given_count_in_their_order(tmp_path: Path) -> None:
    for labels in ([1, 0, 1], ["b", "a", "b"]):
        table(tmp_path, {"label": labels})
        source = open_source(tmp_path, "train", ("c", "b", "a"))
        assert source
        assert source.classes == ("c", "b", "a")
        assert column(source, "label") == ([1, 2, 1] if "b" in labels else [1, 0, 1])
    write(tmp_path / "list.txt", "1.png\tb\n2.png\ta\n")
    source = open_source(tmp_path / "list.txt", "train", ("c", "b", "a"))
    assert column(source, "label") == [1, 2]
    with pytest.raises(UsageError, match="unknown-class"):
        open_source(tmp_path / "list.txt", "train", ("c", "b"))


def test_the_same_name_may_stand_for_two_labels(tmp_path: Path) -> None:
    source = table(tmp_path, {"label": [0, 1, 2]})
    write(tmp_path / "classes.txt", "crane\ncrane\nmaillot\n")
    source = open_source(tmp_path, "train")  # type: ignore[assignment]
    assert column(source, "label") == [0, 1, 2]
    assert source.classes == ("crane", "crane", "maillot")


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda root: write_parquet(root / "m.parquet", {"url": [1]}, ()), "bad-columns"),
        (
            lambda root: write_parquet(root / "m.parquet", {"url": ["x"], "label": [0.5]}, ()),
            "bad-c",
        ),
        (lambda root: write_parquet(root / "m.parquet", {"uri": ["x"]}, ()), "bad-columns"),
        (lambda root: write_parquet(root / "m.parquet", {"url": ["x"], "label": ["a"]}), "bad-c"),
        (lambda root: write_parquet(root / "m.parquet", {"url": ["x"], "label": [2**40]}), "bad-l"),
        (lambda root: write(root / "m.parquet", b"garbage"), "damaged-parquet"),
        (lambda root: damaged(root / "list.parquet"), "damaged-parquet"),
    ],
)
def test_a_list_that_cannot_be_used_is_an_error(
    tmp_path: Path, change: Callable[[Path], None], code: str
) -> None:
    table(tmp_path, {"label": [0, 1, 2]})
    change(tmp_path)
    with pytest.raises(UsageError, match=code):
        rows_of(open_source(tmp_path, "train"))


def test_a_missing_url_is_a_row_with_an_error(tmp_path: Path) -> None:
    write_parquet(tmp_path / "l.parquet", {"url": pa.array(["1.png", None]), "label": [0, 1]}, ())
    assert all(column(open_source(tmp_path, "train"), "error"))


@pytest.mark.parametrize("data", [b"\xff\xfe1\0", b"\x80abc"])
def test_a_list_in_another_encoding_is_an_error(tmp_path: Path, data: bytes) -> None:
    write(tmp_path / "list.txt", data)
    with pytest.raises(UsageError, match="bad-text"):
        open_source(tmp_path / "list.txt", "train")


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n"])
def test_an_empty_list_is_an_error(tmp_path: Path, text: str) -> None:
    write(tmp_path / "list.txt", text)
    with pytest.raises(UsageError, match="unknown-form"):
        open_source(tmp_path / "list.txt", "train")
