"""Runs of schedules: once each, whatever happens to the processes."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pipeline.cli import main
from pipeline.orchestration import schedule_runs
from pipeline.orchestration.schedule import ON_TIME, Schedule, due_times
from pipeline.orchestration.schedule_file import ScheduleFile
from pipeline.orchestration.schedule_runs import Runs
from pipeline.orchestration.schedule_tick import Tick

START = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
SOON = timedelta(seconds=0.3)


def shell(words):
    return ["/bin/sh", "-c", words[0]]


def make_tick(folder, now, run="echo ran", patience=timedelta(seconds=20), **more):
    """A tick of one schedule, due each minute, whose command is one of the shell."""
    values = {"cron": "* * * * *", "start": START, "run": (run,), **more}
    return Tick({"job": Schedule(**values)}, folder, now, folder, shell, patience)


def records(folder):
    runs = Runs(folder / "job")
    return [record for due in runs.known() if (record := runs.record(due))]


def outcomes(folder):
    return [record.outcome for record in records(folder)]


def executions(folder):
    """How often the command of each due time was started and went to its end."""
    return {path.parent.name: path.read_text().count("ran") for path in folder.rglob("log.txt")}


def wait_for(condition):
    for _ in range(12_000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("what was waited for did not come")


class Policies(RuleBasedStateMachine):
    """Time goes by, ticks come or do not, and some of them die: nothing is run twice or lost."""

    @initialize(missed=st.sampled_from(["skip", "run-once", "run-all"]))
    def begin(self, missed):
        self.missed, self.now, self.ticked, self.crashed = missed, START, START, 0
        self.folder = Path(os.environ["TMPDIR_OF_TEST"]) / os.urandom(8).hex()
        self.folder.mkdir()

    @rule(seconds=st.integers(1, 200) | st.integers(200, 2000))
    def time_goes_by(self, seconds):
        self.now += timedelta(seconds=seconds)

    @rule()
    def tick(self):
        before = len(executions(self.folder))
        make_tick(self.folder, self.now, missed=self.missed).run()
        due = list(due_times(Schedule(cron="* * * * *", run="x"), self.ticked, self.now))
        if self.missed == "run-all":
            assert len(executions(self.folder)) - before == len(due)
        elif self.missed == "run-once" or (due and self.now - due[-1] <= ON_TIME):
            assert len(executions(self.folder)) - before == bool(due)
        self.ticked = self.now

    @rule()
    @precondition(lambda self: self.now > self.ticked)
    def tick_that_dies_before_it_records(self):
        """A process that dies lets go of its locks, and leaves what it wrote."""
        tick = make_tick(self.folder, self.now, missed=self.missed)
        _, claim = tick._take("job")
        if claim:
            claim.release()
            self.crashed += 1
            make_tick(self.folder, self.now, missed=self.missed).run()
        self.ticked = self.now

    @invariant()
    def each_due_time_is_accounted_for_once(self):
        due = list(due_times(Schedule(cron="* * * * *", run="x"), START, self.ticked))
        found = records(self.folder)
        assert sum(record.count for record in found) == len(due)
        assert {record.outcome for record in found} <= {"done", "skipped"}
        done = [record for record in found if record.outcome == "done"]
        assert all(count == 1 for count in executions(self.folder).values())
        assert len(done) == len(executions(self.folder))
        if self.missed == "run-all":
            assert len(done) == len(due)


def test_policies_hold_through_any_history(tmp_path, monkeypatch):
    from hypothesis.stateful import run_state_machine_as_test

    monkeypatch.setenv("TMPDIR_OF_TEST", str(tmp_path))
    run_state_machine_as_test(
        Policies,
        settings=settings(
            max_examples=12, stateful_step_count=8, suppress_health_check=list(HealthCheck)
        ),
    )


def test_what_came_due_before_the_first_tick_counts_as_missed(tmp_path):
    make_tick(tmp_path, START + 10 * MINUTE).run()
    assert [(r.outcome, r.count) for r in records(tmp_path)] == [("skipped", 9), ("done", 1)]


def test_without_a_start_nothing_before_the_first_tick_counts(tmp_path):
    now = START + timedelta(seconds=30)
    assert [r.outcome for _, r in make_tick(tmp_path, now, cron="0 * * * *", start=None).run()] == [
        "done"  # on time, though this is the first that is heard of it
    ]
    other = tmp_path / "other"
    other.mkdir()
    make_tick(other, START + 10 * MINUTE, cron="0 12 * * *", start=None).run()
    make_tick(other, START + 23 * 60 * MINUTE, cron="0 12 * * *", start=None).run()
    assert records(other) == []
    make_tick(other, START + 25 * 60 * MINUTE, cron="0 12 * * *", start=None).run()
    assert outcomes(other) == ["done"]


def test_a_run_that_fails_is_recorded_and_not_repeated(tmp_path):
    for _ in range(2):
        make_tick(tmp_path, START + MINUTE, run="echo ran; exit 3").run()
    assert [(r.outcome, r.exit_code) for r in records(tmp_path)] == [("failed", 3)]
    assert list(executions(tmp_path).values()) == [1]


def test_a_dry_run_changes_nothing(tmp_path):
    for start in (START, None):
        tick = make_tick(tmp_path, START + 3 * MINUTE, start=start)
        assert [each.run for each in tick.decisions("job")][-1:] == [True]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["lock"]


def test_schedules_are_run_by_due_time_one_after_the_other(tmp_path):
    one = Schedule(cron="* * * * *", start=START, run=("echo begin; sleep 0.05; echo end",))
    other = Schedule(cron="*/2 * * * *", start=START, run=one.run)

    def logged(words):
        return ["/bin/sh", "-c", f"({words[0]}) >> {shlex.quote(str(tmp_path / 'all'))}"]

    tick = Tick({"b": one, "a": other}, tmp_path, START + 3 * MINUTE, tmp_path, logged)
    done = [(name, record.due[11:16]) for name, record in tick.run() if record.outcome == "done"]
    assert done == [("a", "12:02"), ("b", "12:03")]
    assert (tmp_path / "all").read_text().split() == ["begin", "end"] * 2


DYING_TICK = """
import os, signal, sys
from pathlib import Path
from test_schedule_tick import START, MINUTE, make_tick
from pipeline.orchestration.schedule_runs import Runs
Runs.settle = lambda self, record: os.kill(os.getpid(), signal.SIGKILL)
make_tick(Path(sys.argv[1]), START + MINUTE, sys.argv[2]).run()
"""


def dying_tick(folder, run="echo ran"):
    """A process that ticks and is killed before it can record anything."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", DYING_TICK, str(folder), run],
        env={**os.environ, "PYTHONPATH": path},
    )


def test_killed_between_run_and_record(tmp_path):
    assert dying_tick(tmp_path).wait() == -signal.SIGKILL
    assert list(executions(tmp_path).values()) == [1]
    assert records(tmp_path) == []
    assert [r.outcome for _, r in make_tick(tmp_path, START + MINUTE).run()] == ["done"]
    assert make_tick(tmp_path, START + MINUTE).run() == []
    assert outcomes(tmp_path) == ["done"]


GATED = "while [ ! -e go ]; do sleep 0.02; done; echo ran"


def test_killed_while_the_run_goes_on(tmp_path):
    tick = dying_tick(tmp_path, GATED)
    runs = Runs(tmp_path / "job")
    wait_for(lambda: runs.known() and runs.group(START + MINUTE))
    tick.kill()
    tick.wait()
    # The run has not noticed: it is going, and nobody else takes it up.
    assert runs.last().outcome == "going"
    assert make_tick(tmp_path, START + MINUTE, GATED).run() == []
    (tmp_path / "go").touch()
    wait_for(lambda: runs.last().outcome == "interrupted")
    assert [r.outcome for _, r in make_tick(tmp_path, START + MINUTE, GATED).run()] == ["done"]
    assert outcomes(tmp_path) == ["done"]


class Background:
    """A tick in a thread, whose run waits for the file ``go``."""

    def __init__(self, folder, now, run=GATED, **more):
        self.folder, self.result = folder, []
        tick = make_tick(folder, now, run, **more)
        self.thread = threading.Thread(target=lambda: self.result.extend(tick.run()))
        self.thread.start()
        runs = Runs(folder / "job")
        wait_for(lambda: runs.known() and runs.group(runs.known()[-1]))

    def finish(self):
        (self.folder / "go").touch()
        self.thread.join()
        return [record.outcome for _, record in self.result]


def test_overlap_forbidden(tmp_path):
    first = Background(tmp_path, START + MINUTE)
    later = make_tick(tmp_path, START + 3 * MINUTE).run()
    assert [(r.outcome, r.count) for _, r in later] == [("skipped", 2)]
    assert "12:01 UTC is still going" in later[0][1].reason
    assert first.finish() == ["done"]
    assert [r.outcome for _, r in make_tick(tmp_path, START + 4 * MINUTE).run()] == ["done"]
    assert outcomes(tmp_path) == ["done", "skipped", "done"]


def test_overlap_forbidden_where_each_is_to_run(tmp_path):
    first = Background(tmp_path, START + 2 * MINUTE, missed="run-all")
    assert make_tick(tmp_path, START + 3 * MINUTE, missed="run-all").run() == []
    assert first.finish() == ["done", "done"]
    make_tick(tmp_path, START + 3 * MINUTE, missed="run-all").run()
    assert outcomes(tmp_path) == ["done"] * 3


def test_overlap_allowed(tmp_path):
    first = Background(tmp_path, START + MINUTE, overlap="allow")
    later = make_tick(tmp_path, START + 2 * MINUTE, overlap="allow").run()
    assert [r.outcome for _, r in later] == ["done"]
    assert not first.result
    assert first.finish() == ["done"]


@pytest.mark.parametrize("stubborn", [False, True])
def test_overlap_replaces(tmp_path, stubborn):
    run = f"trap '' INT; {GATED}" if stubborn else GATED
    first = Background(tmp_path, START + MINUTE, run, overlap="replace")
    patience = SOON if stubborn else 60 * MINUTE
    later = make_tick(tmp_path, START + 2 * MINUTE, patience=patience, overlap="replace").run()
    assert [r.outcome for _, r in later] == ["done"]
    first.thread.join()
    assert [r.outcome for _, r in first.result] == ["replaced"]
    sent = -signal.SIGKILL if stubborn else -signal.SIGINT
    assert first.result[0][1].exit_code == sent
    assert outcomes(tmp_path) == ["replaced", "done"]
    assert sum(executions(tmp_path).values()) == 1


def test_a_process_that_took_over_the_number_of_a_run_is_not_signalled(tmp_path):
    innocent = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        assert dying_tick(tmp_path).wait() == -signal.SIGKILL
        runs = Runs(tmp_path / "job")
        lock = runs.folder_of(START + MINUTE) / "lock"
        lock.write_text(f"{innocent.pid} {lock.read_text().partition(' ')[2]}")
        make_tick(tmp_path, START + 2 * MINUTE, patience=SOON, overlap="replace").run()
        assert outcomes(tmp_path) == ["replaced", "done"]
        assert innocent.poll() is None
    finally:
        innocent.kill()
        innocent.wait()


def test_old_records_are_deleted_and_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule_runs, "KEPT", 3)
    for minutes in range(1, 8):
        make_tick(tmp_path, START + minutes * MINUTE).run()
    assert [record.due[14:16] for record in records(tmp_path)] == ["05", "06", "07"]
    assert make_tick(tmp_path, START + 7 * MINUTE).run() == []
    assert not list(tmp_path.rglob("old-*"))


def test_a_damaged_record_counts_as_one(tmp_path):
    make_tick(tmp_path, START + MINUTE).run()
    (result,) = tmp_path.rglob("result.json")
    result.write_bytes(result.read_bytes().replace(b"done", b"gone"))
    assert make_tick(tmp_path, START + MINUTE).run() == []
    assert outcomes(tmp_path) == ["unknown"]


# With the real command


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(Path(p).absolute()) for p in sys.path))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "schedules.yaml"


def schedule(*words):
    return [sys.executable, "-m", "pipeline.cli", "schedule", *words]


def test_double_fire(file):
    start = (datetime.now(UTC) - 60 * MINUTE).isoformat()
    assert main(["schedule", "add", "job", "--cron=0 * * * *", "--run", "inspect digits",
                 "--start", start]) == 0  # fmt: skip
    ticks = [subprocess.Popen(schedule("tick"), stdout=subprocess.PIPE) for _ in range(2)]
    assert [tick.communicate() and tick.returncode for tick in ticks] == [0, 0]
    runs = Runs(file.parent / "schedules.runs" / "job")
    assert [runs.record(due).outcome for due in runs.known()] == ["done"]
    (log,) = file.parent.rglob("log.txt")
    assert log.read_text().count("digit-0000") == 1


def test_a_tick_that_is_told_to_stop_leaves_its_run_to_the_next(file, capsys):
    start = (datetime.now(UTC) - 60 * MINUTE).isoformat()
    words = "run distill digits --ipc 5 --out out"
    main(["schedule", "add", "job", "--cron=0 * * * *", "--run", words, "--start", start])
    tick = subprocess.Popen(schedule("tick"), stderr=subprocess.PIPE)
    wait_for(lambda: list(file.parent.glob("out/.run/*")))
    tick.send_signal(signal.SIGTERM)
    assert b"goes on from here" in tick.communicate()[1]
    assert tick.returncode == 130
    runs = Runs(file.parent / "schedules.runs" / "job")
    assert runs.last().outcome == "interrupted"
    main(["schedule", "list"])
    assert "interrupted, due" in capsys.readouterr().out
    assert main(["schedule", "tick", "--dry-run"]) == 0
    assert "would run" in capsys.readouterr().out
    # Another command, since this one would take its time.
    main(["schedule", "add", "job", "--cron=0 * * * *", "--run", "inspect digits", "--replace"])
    assert main(["schedule", "tick"]) == 0
    assert runs.last().outcome == "done"


def test_serve_runs_what_is_due_and_outlives_failures(file):
    start = (datetime.now(UTC) - 120 * MINUTE).isoformat()
    each = {"cron": "0 * * * *", "start": start, "missed": "run-once"}
    file.write_text(yaml.safe_dump({"bad": {**each, "run": "verify nothing"},
                                    "good": {**each, "run": "inspect digits"}}))  # fmt: skip
    serve = subprocess.Popen(schedule("serve"), stderr=subprocess.PIPE)
    found = [Runs(file.parent / "schedules.runs" / name) for name in ("bad", "good")]
    wait_for(lambda: all(runs.last() and runs.last().ended for runs in found))
    assert [runs.last().outcome for runs in found] == ["failed", "done"]
    assert serve.poll() is None
    serve.send_signal(signal.SIGTERM)
    assert serve.wait(60) == 0
    serve.stderr.close()


def test_serve_sleeps_until_something_is_due(file, monkeypatch):
    from pipeline import schedules

    started = []
    monkeypatch.setattr(schedules.subprocess, "Popen", lambda *a, **_: started.append(a))
    main(["schedule", "add", "job", "--cron=5 * * * *", "--run", "inspect digits",
          "--start", START.isoformat()])  # fmt: skip
    ticks = []
    # It looks at the file each minute, and is there when something is due.
    for now, wake in [(0, 60), (245, 300), (299, 300)]:
        after = START + timedelta(seconds=now)
        expected = START + timedelta(seconds=wake)
        assert schedules._serve_once(ScheduleFile(file), after, ticks) == expected
        assert not started
    schedules._serve_once(ScheduleFile(file), START + timedelta(seconds=300), ticks)
    assert len(started) == 1
    file.write_text("job: [")
    assert schedules._serve_once(ScheduleFile(file), START, ticks) == START + MINUTE


# The file

HAND_WRITTEN = """\
# Ours.
nightly:
  cron: "30 2 * * *"   # after the backup
  run: verify s3://bucket/data --subset 5%

# Once a week is enough.
weekly:
  cron: 0 3 * * SUN
  run: [gc, out, --delete]
"""


def test_comments_survive(tmp_path):
    file = ScheduleFile(tmp_path / "schedules.yaml")
    file.path.write_text(HAND_WRITTEN)
    file.add("new", {"cron": "* * * * *", "run": "gc out"}, replace=False)
    assert file.path.read_text().startswith(HAND_WRITTEN)
    file.add("nightly", {"cron": "0 0 1 * *", "run": "gc out"}, replace=True)
    assert "after the backup" not in file.path.read_text()
    assert "# Once a week is enough.\nweekly:\n" in file.path.read_text()
    assert list(file.read()) == ["weekly", "new", "nightly"]
    assert file.read()["nightly"].cron == "0 0 1 * *"
    for name in ("weekly", "nightly", "new"):
        file.remove(name)
    assert file.read() == {}
    assert file.path.read_text().startswith("# Ours.\n")


@pytest.mark.parametrize("text", ["{}", '{old: {cron: "* * * * *", run: gc out}}', "", "# none",
                                  'old:\n  cron: "* * * * *"\n  run: gc out'])  # fmt: skip
def test_a_schedule_is_added_to_a_file_of_any_style(tmp_path, text):
    file = ScheduleFile(tmp_path / "schedules.yaml")
    file.path.write_text(text)
    old = file.read()
    new = file.add("new", {"cron": "* * * * *", "run": "gc out"}, replace=False)
    assert file.read() == {**old, "new": new}


def test_schedules_added_at_once_are_all_there(tmp_path):
    file = ScheduleFile(tmp_path / "schedules.yaml")
    values = {"cron": "* * * * *", "run": "gc out"}
    threads = [
        threading.Thread(target=file.add, args=(f"n{n}", values), kwargs={"replace": False})
        for n in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(file.read()) == sorted(f"n{n}" for n in range(12))


REFUSED = {
    "a URL": ("s3://b/schedules.yaml", "list", "schedules-not-local"),
    "not YAML": ("x: [", "list", "bad-schedule-file"),
    "an alias": ("a:\n  cron: * * * * *\n  run: gc out", "list", "bad-schedule-file"),
    "a list": ("- a", "list", "bad-schedule-file"),
    "no mapping": ("a: 5", "list", "bad-schedule"),
    "no cron": ("a: {run: gc out}", "list", "bad-schedule"),
    "a bad name": ("../a: {cron: '* * * * *', run: gc out}", "list", "bad-schedule"),
    "an unknown command": ("a: {cron: '* * * * *', run: tidy out}", "tick", "bad-schedule"),
    "an unknown option": ("a: {cron: '* * * * *', run: gc out --all}", "tick", "bad-schedule"),
    "a schedule in a schedule": ("a: {cron: '* * * * *', run: schedule tick}", "tick",
                                 "bad-schedule"),
    "a request for help": ("a: {cron: '* * * * *', run: gc --help}", "tick", "bad-schedule"),
    "an unknown name": ("{}", "tick --only a", "unknown-schedule"),
    "nothing to remove": ("{}", "remove a", "unknown-schedule"),
    "no words": ("{}", "add a --cron '* * * * *' --run ''", "bad-schedule"),
    "an open quote": ("{}", """add a --cron '* * * * *' --run "gc 'out" """, "bad-schedule"),
    "another zone": ("{}", "add a --cron '* * * * *' --run 'gc out' --timezone X", "bad-schedule"),
    "a name that is taken": ("a: {cron: '* * * * *', run: gc out}",
                             "add a --cron '* * * * *' --run 'gc out'", "schedule-exists"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_one_paragraph_with_a_hint(tmp_path, capsys, case):
    text, words, code = REFUSED[case]
    path = text if "://" in text else tmp_path / "schedules.yaml"
    if path != text:
        path.write_text(text)
    action, *rest = shlex.split(words)
    assert main(["schedule", action, "--file", str(path), *rest]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pipeline: ")
    assert error.endswith(f"[{code}]\n")
    assert error.count("\n") == 1
    assert not list(tmp_path.rglob("result.json"))


def test_list_tells_the_next_time_and_the_last_outcome(tmp_path, capsys):
    path = ["--file", str(tmp_path / "schedules.yaml")]
    main(["schedule", "add", "job", "--cron", "30 2 * * *", "--run", "gc out",
          "--timezone", "Asia/Kathmandu", "--start", "2036-01-01T00:00Z", *path])  # fmt: skip
    capsys.readouterr()
    assert main(["schedule", "list", "--json", *path]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], row["last"], row["run"]) == ("job", None, ["gc", "out"])
    assert row["next"] == "2036-01-02T02:30:00+05:45"
