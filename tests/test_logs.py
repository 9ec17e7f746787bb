"""Structured logs of a run, and how they are read."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.errors import RunError
from pipeline.orchestration import logs
from pipeline.orchestration.logs import JsonLines, PlainLines, as_text, read_logs, run_log
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.store import LocalStore, Store

log = logging.getLogger("pipeline.test")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00")


@pytest.fixture(params=["disk", "s3"])
def work(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    out = LocalStore(tmp_path) if request.param == "disk" else request.getfixturevalue("s3")
    return out.below(".run")


def told(work: Store) -> list[str]:
    return [line["message"] for line in read_logs(work)]


def test_every_line_is_json_with_what_was_said(work: Store) -> None:
    with run_log(work, "run1", {"command": ["distill", "digits"], "executor": "ray"}):
        log.info("a: %d of %d", 1, 2, extra={"step": "a", "shard": "x/1"})
        try:
            raise ValueError("of no\nuse")
        except ValueError:
            log.exception("it broke: 100 %")
    (info,) = work.below("logs").files()
    assert re.fullmatch(r"\d{8}-\d{6}-run1\.jsonl", info.name)
    first, second, third, last = map(
        json.loads, work.below("logs").read(info.name).decode().splitlines()
    )
    assert all(TIME.fullmatch(line["time"]) for line in (first, second, third, last))
    about = first["about"]
    assert about["command"] == ["distill", "digits"]
    assert about["executor"] == "ray"
    assert about["pid"] == os.getpid()
    assert {"version", "python", "torch", "host"} <= about.keys()
    del second["time"]
    assert second == {
        "level": "INFO",
        "run": "run1",
        "logger": "pipeline.test",
        "message": "a: 1 of 2",
        "step": "a",
        "shard": "x/1",
    }
    assert third["level"] == "ERROR"
    assert third["message"] == "it broke: 100 %"
    assert third["exception"].endswith("ValueError: of no\nuse")
    assert last["message"] == "run finished"


def test_two_runs_are_read_in_the_order_of_time(work: Store) -> None:
    def say(message: str) -> None:
        time.sleep(0.002)  # times are in milliseconds
        log.info(message)

    with run_log(work, "b", {}):
        say("1")
        with run_log(work, "a", {}):
            say("2")
        time.sleep(0.002)
        say("3")
    assert len(work.below("logs").files()) == 2
    found = list(read_logs(work))
    assert [line["time"] for line in found] == sorted(line["time"] for line in found)
    of_b = [line["message"] for line in found if line["run"] == "b"]
    assert of_b == ["run started", "1", "2", "3", "run finished"]
    of_a = [line["message"] for line in found if line["run"] == "a"]
    assert of_a == ["run started", "2", "run finished"]


def test_lines_that_are_not_whole_are_left_out(work: Store) -> None:
    lines = [b'{"time": "2026-01-01T00:00:00.000+00:00", "message": "a"}', b"[]", b"{}", b"\xff"]
    work.below("logs").replace("1.jsonl", b"\n".join([*lines, b'{"time": "2026-01-01T00:0']))
    work.below("logs").replace("notes.txt", lines[0])
    assert told(work) == ["a"]


def test_nothing_was_logged_yet(work: Store) -> None:
    assert list(read_logs(work)) == []


def test_how_a_run_ended_is_in_its_log(work: Store) -> None:
    errors = [
        RunError("It failed: 5 %s.", hint="Do.", code="x"),
        KeyboardInterrupt(),
        ZeroDivisionError("z"),
    ]
    for number, error in enumerate(errors):
        with pytest.raises(type(error)), run_log(work, str(number), {}):
            raise error
    ends = {line["run"]: line for line in read_logs(work) if line["level"] == "ERROR"}
    assert ends["0"]["message"] == "run stopped: It failed: 5 %s. Do. [x]"
    assert "exception" not in ends["0"]
    assert ends["1"]["message"] == "run stopped: KeyboardInterrupt"
    assert ends["2"]["exception"].startswith("Traceback")


KILLED = """
import logging, os, signal, sys, time
from pipeline.orchestration import logs
from pipeline.storage.store import open_store
logs.PERIOD = 0.05
with logs.run_log(open_store(sys.argv[1]).below(".run"), "r", {}):
    logging.getLogger("pipeline.x").info("the last words")
    time.sleep(float(sys.argv[2]))
    print("said", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_a_killed_run_leaves_a_log(
    place: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    out = LocalStore(tmp_path) if place == "disk" else request.getfixturevalue("s3")
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, out.url, "0"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout
        assert process.stdout.readline()
        while "the last words" not in told(out.below(".run")):
            assert place == "s3"
            time.sleep(0.02)
    finally:
        process.kill()
        process.communicate()
    assert told(out.below(".run")) == ["run started", "the last words"]


def test_a_log_that_cannot_be_kept_fails_no_run(
    s3: ObjectStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RunError("No network.", hint="Wait.", code="storage-error")

    monkeypatch.setattr(ObjectStore, "replace", fail)
    with run_log(s3, "r", {}):
        pass
    assert "the log could not be kept: No network." in caplog.text
    assert not [thread for thread in threading.enumerate() if thread.name == "log"]


LIBRARY = """
import logging, sys
from pathlib import Path
from pipeline.orchestration.logs import run_log
from pipeline.storage.store import LocalStore
logging.basicConfig(format="%(message)s")
logger = logging.getLogger("pipeline.x")
with run_log(LocalStore(Path(sys.argv[1])), "r", {}):
    logger.info("told to the log")
    logger.warning("told to all")
logger.info("told to nobody")
assert logging.getLogger("pipeline").level == 0 and logging.getLogger("pipeline").propagate
"""


def test_a_log_is_kept_and_nothing_more_is_shown(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIBRARY, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == "told to all\n"
    assert told(LocalStore(tmp_path)) == [
        "run started",
        "told to the log",
        "told to all",
        "run finished",
    ]


SHOW = """
import logging, os, sys, warnings
from pipeline.orchestration import logs
logs.show(verbose=sys.argv[1] == "-v")
logging.getLogger("pipeline.x").debug("details")
logging.getLogger("pipeline.x").info("a\\x1b[31m")
logging.getLogger("ray.data").warning("ray chatter")
logging.getLogger("torch.distributed").warning("torch chatter")
warnings.warn("python chatter")
logging.getLogger("ray.data").error("ray error")
print(os.environ.get("PYTHONWARNINGS"))
"""


@pytest.mark.parametrize("verbose", ["", "-v"])
def test_others_are_silent_unless_asked_for(verbose: str) -> None:
    # Another test may have called the command line in this process.
    inherited = {name: text for name, text in os.environ.items() if name != "PYTHONWARNINGS"}
    done = subprocess.run(
        [sys.executable, "-c", SHOW, verbose],
        env={**inherited, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ("chatter" in done.stderr) == bool(verbose)
    assert done.stderr.count("chatter\n") == 3 * bool(verbose)
    assert ("details" in done.stderr) == bool(verbose)
    assert "ray error" in done.stderr
    assert "a\\x1b[31m\n" in done.stderr
    assert done.stdout.strip() == ("None" if verbose else "ignore")


def test_lines_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    line = {
        "time": "2026-01-02T12:01:33.250+00:00",
        "level": "WARNING",
        "message": "images: \x1b[2J",
        "exception": "Traceback\nE",
    }
    assert as_text(line) == "12:01:33 WARNING images: \\x1b[2J\nTraceback\nE"
    first = {"time": line["time"], "run": "r", "about": {"host": "h", "pid": 3}}
    assert as_text(first) == "--- 2026-01-02 12:01:33 run r: host h, pid 3"
    monkeypatch.undo()
    time.tzset()


def test_foreign_text_moves_no_cursor() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "a\x1b[2J\nb %s", ("\r",), None)
    assert PlainLines().format(record)[9:] == "a\\x1b[2J\nb \\r"
    assert "\n" not in JsonLines("r").format(record)
    assert logs.LOGS == "logs"
