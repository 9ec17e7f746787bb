"""Schedules for other schedulers: what is written, read by those schedulers where they are here."""

import re
import shlex
import shutil
import subprocess
import sys
import types
from datetime import UTC, datetime, timedelta

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from test_schedule import CHANGES, ZONES, crons, scheduled

from pipeline.cli import main
from pipeline.errors import UsageError
from pipeline.orchestration.schedule import Schedule, due_times
from pipeline.orchestration.schedule_export import export

WAKE = ["/opt/py thon", "-m", "pipeline.cli", "schedule", "tick", "--file", "/a/50%$x.yaml"]
START = datetime(2026, 5, 1, tzinfo=UTC)
needs_systemd = pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed"
)


def exported(to, schedule, image="registry/pipeline:1"):
    return export(to, "nightly", schedule, WAKE, image)


def job(cron="30 2 * * *", run="verify s3://b/x --subset 5%", **more):
    return Schedule(cron=cron, run=run, timezone="Europe/Berlin", **more)


def calendar(schedule):
    timer = exported("systemd", schedule)["pipeline-nightly.timer"]
    return re.findall("OnCalendar=(.*)", timer)


def elapses(expressions, after, until):
    """When systemd says that a timer elapses."""
    found = set()
    for expression in expressions:
        minutes = expression.split(":")[1]
        each_hour = 60 if minutes == "*" else minutes.count(",") + 1
        most = 1 + each_hour * ((until - after) // timedelta(hours=1))
        done = subprocess.run(
            ["systemd-analyze", "calendar", f"--iterations={most}",
             f"--base-time={after:%Y-%m-%d %H:%M:%S} UTC", expression],
            env={"TZ": "UTC"}, capture_output=True, text=True, check=False,  # it loops at times
        )  # fmt: skip
        for text in re.findall(r"(?:elapse|#\d+): \w+ ([\d: -]+) UTC", done.stdout):
            found.add(datetime.fromisoformat(text).replace(tzinfo=UTC))
    return {each for each in found if after < each <= until}


@needs_systemd
@given(cron=crons(), zone=st.sampled_from(ZONES), data=st.data())
@settings(max_examples=8)
def test_a_timer_elapses_at_every_due_time_near_a_change_of_clocks(cron, zone, data):
    # Until 2011 a gap in Newfoundland ended at 1:01; the timer is there at half past.
    changes = [day for day in CHANGES[zone] if day.year > 2011]
    after = data.draw(st.sampled_from(changes or [START])) - timedelta(hours=2)
    until = after + timedelta(hours=28)
    schedule = scheduled(cron[0], zone)
    assert set(due_times(schedule, after, until)) <= elapses(calendar(schedule), after, until)


@needs_systemd
@pytest.mark.parametrize(
    "days", ["L * *", "LW * *", "* * 5L", "* * FRI#2", "13 * FRI", "*/2 * FRI", "1,15 2,3 *",
             "31 * *", "29 2 *", "1-7 * 1-5", "L * 1,5L", "* * 0,7", "* * 7#2"]
)  # fmt: skip
def test_a_timer_knows_days(days):
    schedule = scheduled(f"7 4 {days}", "America/New_York")
    after, until = START, START + timedelta(days=40)
    due = set(due_times(schedule, after, until))
    # By the translated lines alone: the last would wake it each half hour.
    *translated, _ = calendar(schedule)
    assert due <= elapses(translated, after, until)


@needs_systemd
def test_units_are_well_formed(tmp_path):
    for title, text in exported("systemd", job()).items():
        (tmp_path / title).write_text(text.replace('"/opt/py thon"', sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / "pipeline-nightly.timer"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "pipeline-nightly" not in done.stderr


def test_systemd():
    units = exported("systemd", job())
    assert "OnCalendar=*-*-* 02:30:00 Europe/Berlin\n" in units["pipeline-nightly.timer"]
    assert "Persistent=true" in units["pipeline-nightly.timer"]
    line = 'ExecStart="/opt/py thon" -m pipeline.cli schedule tick --file /a/50%%$$x.yaml\n'
    assert line in units["pipeline-nightly.service"]
    other = exported("systemd", job(missed="skip", overlap="replace"))["pipeline-nightly.timer"]
    assert "Persistent=false" in other
    assert "'overlap: replace' has no effect" in other


def test_cron():
    (text,) = exported("cron", job("0 0 L * *")).values()
    *minutes, command = text.splitlines()[-1].split(" ", 5)
    assert minutes == ["*"] * 5
    assert re.search(r"(?<!\\)%", command) is None  # which would end the command
    assert shlex.split(command.replace(r"\%", "%")) == WAKE


@pytest.mark.parametrize(
    ("policies", "fields", "comment"),
    [
        ({}, ("Forbid", None), "100 missed"),
        ({"missed": "skip"}, ("Forbid", 300), ""),
        ({"overlap": "replace", "deadline": "6h"}, ("Replace", 21_600), ""),
        ({"overlap": "allow", "missed": "run-all"}, ("Allow", None), "run-all' cannot"),
    ],
)
def test_k8s(policies, fields, comment):
    (text,) = exported("k8s", job(**policies)).values()
    found = yaml.safe_load(text)
    assert (found["apiVersion"], found["kind"]) == ("batch/v1", "CronJob")
    spec = found["spec"]
    assert (spec["schedule"], spec["timeZone"]) == ("30 2 * * *", "Europe/Berlin")
    assert (spec["concurrencyPolicy"], spec.get("startingDeadlineSeconds")) == fields
    pod = spec["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["restartPolicy"] in {"Never", "OnFailure"}
    assert pod["containers"][0]["command"] == ["pipeline", "verify", "s3://b/x", "--subset", "5%"]
    assert comment in text


def test_raycron():
    (text,) = exported("raycron", job(deadline="6h")).values()
    found = yaml.safe_load(text)
    assert (found["apiVersion"], found["kind"]) == ("ray.io/v1", "RayCronJob")
    assert set(found["spec"]) == {"schedule", "timeZone", "jobTemplate"}
    template = found["spec"]["jobTemplate"]
    assert shlex.split(template["entrypoint"])[:2] == ["pipeline", "verify"]
    cluster = template["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = {group["template"]["spec"]["containers"][0]["image"] for group in groups}
    assert images == {"registry/pipeline:1"}
    for what in ("'missed: run-once'", "'overlap: forbid'", "'deadline'"):
        assert f"{what} " in text


class Called(dict):
    """Stands for a class of Airflow: keeps what it was called with."""

    seen: list

    def __init__(self, *args, **options):
        super().__init__(options, args=args)
        type(self).seen.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def airflow(monkeypatch, text):
    """What a DAG file does, by the names that it uses."""
    kinds = {}
    for module, name in [
        ("airflow", "DAG"),
        ("airflow.timetables.trigger", "CronTriggerTimetable"),
        ("airflow.operators.bash", "BashOperator"),
    ]:
        kinds[name] = type(name, (Called,), {"seen": []})
        found = types.ModuleType(module)
        setattr(found, name, kinds[name])
        monkeypatch.setitem(sys.modules, module, found)
    exec(compile(text, "dag.py", "exec"), {})  # our own text
    return {name: kind.seen[0] for name, kind in kinds.items()}


def test_airflow(monkeypatch):
    (text,) = exported("airflow", job(start=START, run="gc 'it''s {{ here }}'")).values()
    called = airflow(monkeypatch, text)
    assert called["CronTriggerTimetable"] == {"args": ("30 2 * * *",), "timezone": "Europe/Berlin"}
    dag = called["DAG"]
    assert (dag["dag_id"], dag["catchup"], dag["max_active_runs"]) == ("nightly", False, 1)
    assert dag["start_date"] == START
    command = called["BashOperator"]["bash_command"]
    assert command == "{% raw %}pipeline gc 'its {{ here }}'{% endraw %} "
    (text,) = exported("airflow", job(start=START, missed="run-all", overlap="allow")).values()
    dag = airflow(monkeypatch, text)["DAG"]
    assert (dag["catchup"], "max_active_runs" in dag) == (True, False)


@pytest.mark.parametrize(
    ("to", "cron", "more", "code"),
    [
        ("k8s", "0 0 L * *", {}, "schedule-not-exportable"),
        ("k8s", "0 0 LW * *", {}, "schedule-not-exportable"),
        ("raycron", "0 0 * * FRI#2", {}, "schedule-not-exportable"),
        ("raycron", "0 0 * * 5l", {}, "schedule-not-exportable"),
        ("airflow", "0 0 LW * *", {}, "schedule-not-exportable"),
        ("airflow", "0 0 * * *", {"missed": "run-all"}, "schedule-not-exportable"),
        ("k8s", "0 0 * * *", {}, "no-image"),
        ("raycron", "0 0 * * *", {}, "no-image"),
    ],
)
def test_what_a_scheduler_cannot_run_at_its_times_is_refused(to, cron, more, code):
    with pytest.raises(UsageError) as error:
        exported(to, job(cron, **more), image=None)
    assert error.value.code == code


@pytest.mark.parametrize("cron", ["0 0 1 JUL *", "0 0 * * MON"])
def test_names_of_months_and_days_are_no_l(cron):
    assert exported("k8s", job(cron))
    assert exported("airflow", job(cron))


def test_the_command_writes_files(tmp_path, capsys):
    file = ["--file", str(tmp_path / "schedules.yaml")]
    for name in ("one", "two"):
        main(["schedule", "add", name, "--cron", "0 0 * * *", "--run", "gc out", *file])
    assert main(["schedule", "export", "--to", "cron", "two", *file]) == 0
    printed = capsys.readouterr().out
    assert f"--file {tmp_path}/schedules.yaml --only two\n" in printed
    assert "--only one" not in printed
    assert main(["schedule", "export", "--to", "systemd", "--out", str(tmp_path / "u"), *file]) == 0
    assert sorted(path.name for path in (tmp_path / "u").iterdir()) == [
        "pipeline-one.service", "pipeline-one.timer", "pipeline-two.service", "pipeline-two.timer",
    ]  # fmt: skip
