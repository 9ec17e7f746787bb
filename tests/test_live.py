"""One writer at a time, on disks and in object stores, and how to stop it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pipeline.errors import RunError, UsageError
from pipeline.orchestration import lease, live
from pipeline.orchestration.lease import Holder
from pipeline.orchestration.live import cancel, hold, holder
from pipeline.storage import atomic
from pipeline.storage.atomic import exclusive
from pipeline.storage.locks import is_locked
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.store import LocalStore, Store, open_store

PROCESS = """
import signal, sys, time
from pipeline.orchestration import lease, live
from pipeline.storage.store import open_store
lease.BEAT, lease.WATCH = 0.2, 1.0
live.POLL = live.POLL_REMOTE = 0.05
if sys.argv[3] == "background":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
try:
    with live.hold(open_store(sys.argv[1]).below(".run"), "run test", "local") as taken:
        print(taken.run, flush=True)
        if sys.argv[2] == "loop":
            while True:
                time.sleep(0.01)
        time.sleep(600)
except BaseException as error:
    print(type(error).__name__, getattr(error, "code", ""), error, flush=True)
"""


@pytest.fixture(params=["disk", "s3"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return LocalStore(tmp_path) if request.param == "disk" else request.getfixturevalue("s3")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.2)
    monkeypatch.setattr(lease, "WATCH", 1.0)
    monkeypatch.setattr(live, "POLL", 0.05)
    monkeypatch.setattr(live, "POLL_REMOTE", 0.05)


def work(out: Store) -> Store:
    return out.below(".run")


def wait_until(true: object) -> None:
    while not true():  # type: ignore[operator]
        time.sleep(0.02)


def start(out: Store, how: str = "sleep", where: str = "front") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, out.url, how, where],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )


@contextmanager
def another(
    out: Store, how: str = "sleep", where: str = "front"
) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the output; its run's name is in ``args``."""
    process = start(out, how, where)
    try:
        assert process.stdout
        process.args = process.stdout.readline().strip()
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def planted(out: Store, silent: float = 0.0, **other: object) -> Holder:
    """The lease of a holder on another computer."""
    beat = datetime.now(UTC) - timedelta(seconds=silent)
    found = replace(
        Holder.here("run elsewhere", "ray"),
        host="elsewhere",
        machine="elsewhere",
        beat=beat.isoformat(timespec="milliseconds"),
        **other,
    )
    put(out, found)
    return found


def put(out: Store, found: Holder, number: int = 1) -> None:
    text = json.dumps(vars(found)).encode()
    work(out).below("live").replace(f"{number:09d}.json", text)


def test_who_holds_an_output_is_known_while_it_does(out: Store) -> None:
    assert holder(work(out)) is None
    with hold(work(out), "run test", "ray") as taken:
        found = holder(work(out))
        assert found
        assert (found.run, found.command, found.executor) == (taken.run, "run test", "ray")
        assert found.pid == os.getpid()
        first = found.beat
        wait_until(lambda: holder(work(out)).beat != first)  # type: ignore[union-attr]
        taken.check()
    assert holder(work(out)) is None
    assert [name for name in (f.name for f in out.files()) if "live" in name] == []


def test_an_error_lets_go_of_the_output(out: Store) -> None:
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), hold(work(out), "run"):
            raise error
    with hold(work(out), "run"):
        pass


def test_of_two_processes_one_wins_and_the_other_says_who_did(out: Store) -> None:
    with another(out) as first:
        for _ in range(2):
            with pytest.raises(RunError) as error, hold(work(out), "run"):
                pass
        assert error.value.code == "output-busy"
        assert error.value.where == out.url
        assert f"process {first.pid}, since 20" in error.value.message
        found = holder(work(out))
        assert found
        assert found.run == first.args
        second = start(out)
        told = second.communicate()[0]
        assert told.startswith("RunError output-busy")
        assert first.poll() is None


def test_one_process_cannot_hold_an_output_twice(out: Store) -> None:
    with hold(work(out), "run") as taken:
        with pytest.raises(RunError, match="output-busy"), hold(work(out), "run"):
            pass
        taken.check()


def test_a_killed_holder_is_followed_at_once(out: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "WATCH", 1e9)
    with another(out) as process:
        process.kill()
        # Dead, and not yet waited for by its parent.
        wait_until(
            lambda: not is_locked(work(out).root / "lock") if isinstance(out, LocalStore) else True
        )
        wait_until(lambda: lease.process_state(process.pid)[0] in {"Z", ""})
        assert holder(work(out)) is None
        with hold(work(out), "run") as taken:
            assert holder(work(out)) == lease.read(taken.store, taken.lease)


def test_a_hold_of_this_process_that_was_broken_off_is_followed_at_once(
    s3: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "WATCH", 1e9)
    put(s3, Holder.here("run", "local"))
    with hold(work(s3), "run") as taken:
        assert taken.lease == "000000002.json"


def test_a_process_id_that_is_another_process_now_is_no_holder(
    s3: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "WATCH", 1e9)
    put(s3, replace(Holder.here("run", "local"), pid=os.getppid(), process="1"))
    with hold(work(s3), "run"):
        pass


def test_a_fresh_lease_from_elsewhere_is_kept_to(s3: ObjectStore) -> None:
    other = planted(s3)
    with pytest.raises(RunError, match="'run elsewhere' on elsewhere"), hold(work(s3), "run"):
        pass
    assert holder(work(s3)) == other


@pytest.mark.parametrize("silent", [100.0, -100.0])
def test_a_lease_from_elsewhere_without_signs_of_life_is_taken_over(
    s3: ObjectStore, silent: float
) -> None:
    planted(s3, silent)
    assert holder(work(s3)) is None
    with hold(work(s3), "run") as taken:
        assert taken.lease == "000000002.json"
        assert [info.name for info in taken.store.files()] == ["000000002.json"]


@pytest.mark.parametrize("silent", [1e6, -1e6])
def test_a_holder_whose_clock_is_wrong_is_seen_to_live(
    s3: ObjectStore, silent: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "WATCH", 1e9)
    first = planted(s3, silent)
    timer = threading.Timer(0.5, planted, (s3, silent - 1), {"run": first.run})
    timer.start()
    with pytest.raises(RunError, match="output-busy"), hold(work(s3), "run"):
        pass
    timer.join()


def test_a_holder_that_ends_while_it_is_watched_is_followed(
    s3: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "WATCH", 1e9)
    planted(s3, 1e6)
    timer = threading.Timer(0.5, work(s3).below("live").delete, ("000000001.json",))
    timer.start()
    with hold(work(s3), "run"):
        pass
    timer.join()


@pytest.mark.parametrize("text", [b"", b"{}", b"[1]", b'{"run": "x"', b"\xff", b"null"])
def test_a_lease_that_says_nothing_holds_nothing(s3: ObjectStore, text: bytes) -> None:
    work(s3).below("live").replace("000000001.json", text)
    assert holder(work(s3)) is None
    with hold(work(s3), "run") as taken:
        assert taken.lease == "000000002.json"


def test_of_several_that_take_over_at_once_one_does(s3: ObjectStore) -> None:
    planted(s3, 1e6)
    ready, done = threading.Barrier(4), threading.Event()
    got: list[str] = []
    refused: list[str] = []

    def one() -> None:
        ready.wait()
        try:
            with hold(work(s3), "run") as taken:
                got.append(taken.run)
                done.wait()
                taken.check()
        except RunError as error:
            refused.append(error.code)

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(got) + len(refused) == 4)
    assert refused == ["output-busy"] * 3
    done.set()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    assert len(refused) == 3


def test_a_holder_that_lost_its_output_stops(s3: ObjectStore) -> None:
    with another(s3) as process:
        process.send_signal(signal.SIGSTOP)
        mine = lease.read(work(s3).below("live"), "000000001.json")
        assert mine
        # As on another computer: from here it is seen that the process is there.
        old = datetime.now(UTC) - timedelta(seconds=1e6)
        put(s3, replace(mine, machine="elsewhere", beat=old.isoformat()))
        with hold(work(s3), "run again") as taken:
            process.send_signal(signal.SIGCONT)
            assert process.stdout
            told = process.stdout.readline()
            assert told.startswith("RunError lost-output")
            assert "'run again'" in told
            process.wait()
            taken.check()
            assert lease.read(taken.store, taken.lease).run == taken.run  # type: ignore[union-attr]
            assert not [i for i in taken.store.files() if i.name == "000000001.json"]


def test_a_holder_never_touches_the_lease_of_another_under_its_name(s3: ObjectStore) -> None:
    other = Holder.here("run elsewhere", "ray")

    def lose() -> None:
        with hold(work(s3), "run") as taken:
            put(s3, other)
            wait_until(lambda: taken.stopped)

    with pytest.raises(RunError, match="lost-output"):
        lose()
    assert lease.read(work(s3).below("live"), "000000001.json") == other


def test_a_lease_that_was_deleted_is_put_again(s3: ObjectStore) -> None:
    with hold(work(s3), "run") as taken:
        taken.store.delete(taken.lease)
        wait_until(lambda: holder(work(s3)))
        taken.check()


@pytest.mark.parametrize("how", ["loop", "sleep"])
@pytest.mark.parametrize("where", ["front", "background"])
def test_a_cancelled_run_stops(out: Store, how: str, where: str) -> None:
    with another(out, how, where) as process:
        asked = cancel(work(out))
        assert asked.run == process.args
        assert process.stdout
        told = process.stdout.read()
        assert told.startswith("RunError cancelled The run was cancelled by process")
        assert str(os.getpid()) in told
        assert process.wait() == 0
    assert holder(work(out)) is None
    assert [i.name for i in work(out).below("live").files()] == []


def test_a_run_outside_the_main_thread_is_told_when_it_asks(out: Store) -> None:
    stopped: list[str] = []

    def run() -> None:
        try:
            with hold(work(out), "run") as taken:
                while True:
                    taken.check()
                    time.sleep(0.01)
        except RunError as error:
            stopped.append(error.code)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: holder(work(out)))
    cancel(work(out))
    thread.join()
    assert stopped == ["cancelled"]


def test_a_run_that_ended_all_the_same_is_not_cancelled(out: Store) -> None:
    before = signal.getsignal(live.SIGNAL)
    with hold(work(out), "run") as taken:
        taken._end.set()
        taken._thread.join()  # type: ignore[union-attr]
        cancel(work(out))
    assert signal.getsignal(live.SIGNAL) == before
    with hold(work(out), "run") as taken:
        time.sleep(0.2)
        taken.check()


def test_a_cancel_for_an_earlier_run_stops_no_later_one(out: Store) -> None:
    work(out).below("live").replace("0123456789ab.cancel", b"{}")
    with hold(work(out), "run") as taken:
        assert [info.name for info in taken.store.files()] == [taken.lease]
        taken.store.replace("0123456789ab.cancel", b"{}")
        time.sleep(0.2)
        taken.check()


def test_nothing_is_there_to_be_cancelled(out: Store) -> None:
    with pytest.raises(UsageError) as error:
        cancel(work(out))
    assert error.value.code == "not-running"
    assert error.value.where == out.url
    assert out.files() == []


def test_who_only_looks_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "TRIES", 10_000)
    monkeypatch.setattr(atomic, "PAUSE", 0.001)
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            holder(LocalStore(tmp_path))

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            with exclusive(LocalStore(tmp_path)):
                assert is_locked(tmp_path / "lock")
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_a_storage_that_fails_for_a_while_stops_nothing(
    s3: ObjectStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RunError("No network.", hint="Wait.", code="storage-error")

    with hold(work(s3), "run") as taken:
        with monkeypatch.context() as patch:
            patch.setattr(ObjectStore, "replace", fail)
            wait_until(lambda: caplog.records)
        before = lease.read(taken.store, taken.lease)
        wait_until(lambda: lease.read(taken.store, taken.lease) != before)
        taken.check()
    assert [r.message for r in caplog.records] == [
        "no sign of life could be given, trying again: No network. Wait. [storage-error]"
    ]


def test_stores_in_memory_are_held_as_well() -> None:
    store = open_store(f"memory://{uuid.uuid4().hex}")
    with (
        hold(work(store), "run"),
        pytest.raises(RunError, match="output-busy"),
        hold(work(store), "gc"),
    ):
        pass
    assert store.files() == []
