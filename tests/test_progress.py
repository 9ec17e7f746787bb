"""What a run shows while it works."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
import subprocess
import sys
import tracemalloc
from typing import Any

import pytest
from rich.console import Console

from pipeline.orchestration import progress
from pipeline.orchestration.progress import Bars, Progress, Tally, clock, on_terminal


def record(name: str, rows: int = 100, bad: int = 0) -> dict[str, Any]:
    counts = {"in": rows, "out": rows - bad, "filtered": {}, "quarantined": {"bad": bad}}
    return {"name": name, "rows": rows - bad, "bytes": 1000 * rows, "counts": counts}


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "pipeline")
    return caplog


def test_every_shard_of_a_small_step_has_a_line(lines: pytest.LogCaptureFixture) -> None:
    told = Progress()
    told.begin("images", 4, 1)
    for name in ("b", "c", "d"):
        told.done("images", record(name, bad=name == "c"))
    told.end("images")
    messages = [r.message for r in lines.records]
    assert [m.partition(",")[0] for m in messages] == [
        "images: 2 of 4 shards done",
        "images: 3 of 4 shards done",
        "images: 4 of 4 shards done",
        "images: 4 of 4 shards done",
    ]
    assert re.search(r"100 samples, [\d,]+ samples/s, 100 kB, ETA 0:00:00", messages[0])
    assert "200 samples" in messages[1]
    assert "1 bad" in messages[1]
    assert "ETA" not in messages[2]
    assert "300 samples" in messages[3]
    assert messages[3].endswith("1 bad, in 0:00:00")
    assert {r.step for r in lines.records} == {"images"}  # type: ignore[attr-defined]
    told.close()


def test_models_have_no_samples(lines: pytest.LogCaptureFixture) -> None:
    told = Progress()
    told.begin("students", 2, 0)
    told.done("students", {"name": "0", "metrics": {}})
    assert lines.records[0].message == "students: 1 of 2 shards done, ETA 0:00:00"


def test_a_failed_shard_is_an_error_with_its_place(lines: pytest.LogCaptureFixture) -> None:
    told = Progress()
    told.begin("images", 2, 0)
    told.failed("images", {"message": "It is bad.", "where": "s1"})
    told.failed("images", {"message": "It is bad.", "where": "s2", "traceback": "Traceback"})
    told.end("images")
    assert [r.levelname for r in lines.records] == ["ERROR", "ERROR", "INFO"]
    assert lines.messages[:2] == ["images: It is bad.", "images: Traceback"]
    assert lines.records[0].shard == "s1"  # type: ignore[attr-defined]
    assert "2 failed" in lines.messages[2]


def test_a_large_step_has_a_line_a_percent(lines: pytest.LogCaptureFixture) -> None:
    told = Progress()
    told.begin("images", 10_000, 0)
    for number in range(10_000):
        told.done("images", record(str(number)))
    assert len(lines.records) == 100
    assert lines.messages[0].startswith("images: 100 of 10,000 shards done")


def test_a_slow_step_has_a_line_a_minute(
    lines: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    told = Progress()
    told.running["images"] = Tally("images", 1_000_000, 0, began=now[0], told=now[0])
    for _ in range(10):
        now[0] += 25
        told.done("images", record("x"))
    assert [m.partition(" of")[0] for m in lines.messages] == [f"images: {n}" for n in (3, 6, 9)]
    assert "4 samples/s" in lines.messages[0]
    assert clock(25 * 999_997) in lines.messages[0]


def test_a_million_shards_keep_memory_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.log, "info", lambda *_, **__: None)
    told = Progress()
    told.begin("images", 10**6, 0)
    one = record("x", bad=1)
    for _ in range(100):
        told.done("images", one)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(10**6 - 100):
        told.done("images", one)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 20_000
    assert told.running["images"].samples == 10**8


def screen(width: int = 140) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [140, 80])
def test_a_bar_says_how_far_a_step_is(width: int) -> None:
    console = screen(width)
    bars = Bars(console)
    bars.begin("images", 4, 0)
    bars.begin("students", 6, 1)
    bars.done("images", record("a", 1500, bad=3))
    bars.failed("images", {"message": "No.", "where": "b"})
    bars._live.refresh()
    text = shown(console)
    bars.close()
    for part in ("images", "1/4 shards", "1,500 samples", "ETA 0:00:0", "3 bad", "1 failed"):
        assert part in text, part
    assert "students" in text
    assert "1/6 shards" in text
    if width > progress.WIDE:
        assert "1.5 MB" in text
        assert "━" in text


def test_marks_and_codes_in_names_do_no_harm() -> None:
    console = screen()
    bars = Bars(console)
    bars.begin("[bold]a[/bold] [/] \x1b[2J", 4, 0)
    bars._say("[red]key[/] \x1b[1A")
    bars._live.refresh()
    bars.close()
    assert "[bold]a[/bold] [/] \\x1b[2J" in shown(console)
    assert "[red]key[/] \\x1b[1A\n" in shown(console)
    assert "\x1b[2J" not in shown(console)


ON_TERMINAL = """
import logging, sys
from pipeline.orchestration.logs import show
from pipeline.orchestration.progress import on_terminal
show()
told = on_terminal()
print(type(told).__name__)
told.begin("images", 300, 0)
for number in range(300):
    counts = {"in": 5, "out": 5, "filtered": {}, "quarantined": {}}
    told.done("images", {"name": str(number), "rows": 5, "bytes": 10, "counts": counts})
    if number == 150:
        logging.getLogger("pipeline.x").warning("look [here]")
        logging.getLogger("pipeline.x").error("two\\nlines")
told.end("images")
told.close()
logging.getLogger("pipeline.x").info("afterwards")
"""


def on_a_terminal(term: str) -> tuple[str, str]:
    """What comes out of a process whose standard error is a terminal."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ON_TERMINAL],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": term},
        stdout=subprocess.PIPE,
        stderr=slave,
        text=True,
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            data = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        shown += data
    os.close(master)
    return process.communicate()[0], shown.decode()


def test_on_a_terminal_there_are_bars_and_the_log_is_above_them() -> None:
    kind, text = on_a_terminal("xterm")
    assert kind == "Bars\n"
    assert "images" in text
    assert "/300 shards" in text
    assert "shards done, 755" not in text
    for line in ("look [here]\r\n", "two\r\n", "lines\r\n", "afterwards\r\n"):
        assert line in text, line
    assert re.search(r"images: 300 of 300 shards done, 1,500 samples, .*in 0:00:0\d\r\n", text)
    assert "Traceback" not in text


def test_a_terminal_that_cannot_move_its_cursor_has_lines() -> None:
    kind, text = on_a_terminal("dumb")
    assert kind == "Progress\n"
    assert "images: 3 of 300 shards done, 15 samples" in text
    assert "\x1b" not in text


def test_without_a_terminal_there_are_lines() -> None:
    assert type(on_terminal()) is Progress


def test_spans_of_time() -> None:
    assert [clock(s) for s in (0, 59.6, 3661, 86400 * 2 + 60)] == [
        "0:00:00",
        "0:01:00",
        "1:01:01",
        "2 d 0:01:00",
    ]
