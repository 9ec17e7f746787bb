"""Schedules in the languages of other schedulers.

Where the schedule file lies on the host (systemd, cron), the other scheduler only wakes
``pipeline schedule tick``, often enough; what is due, missed or overlapping is decided there. A
cluster (Kubernetes, KubeRay, Airflow) runs the command itself and decides by rules of its own; what
these cannot express is said in comments, and refused where it would run at other times.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import yaml

from pipeline.errors import UsageError
from pipeline.orchestration.schedule import Schedule
from pipeline.orchestration.schedule_systemd import systemd_units


def export(
    to: str, name: str, schedule: Schedule, wake: Sequence[str], image: str | None
) -> dict[str, str]:
    """A schedule for another scheduler: texts by file name.

    Args:
        to: ``systemd``, ``cron``, ``k8s``, ``raycron`` or ``airflow``.
        name: name of the schedule.
        schedule: the schedule.
        wake: command line that ticks this schedule on this host.
        image: container image with ``pipeline`` in it; for Kubernetes and KubeRay.

    Raises:
        UsageError: the scheduler cannot run it at its due times, or no image is given.
    """
    if to == "systemd":
        return systemd_units(name, schedule, wake)
    if to == "cron":
        return _cron(name, wake)
    if to == "airflow":
        return _airflow(name, schedule)
    _plain(to, schedule)
    if not image:
        raise UsageError(
            f"For {to} it has to be known which container image holds 'pipeline'.",
            hint="Give it with --image.",
            code="no-image",
        )
    return _k8s(name, schedule, image) if to == "k8s" else _raycron(name, schedule, image)


def _cron(name: str, wake: Sequence[str]) -> dict[str, str]:
    # cron ends a command at %.
    line = shlex.join(wake).replace("%", r"\%")
    text = (
        f"# pipeline schedule {name}. cron wakes it each minute, and it decides what is due: some\n"
        "# crons know no time zones (CRON_TZ), and none makes up for a missed run.\n"
        f"* * * * * {line}\n"
    )
    return {f"pipeline-{name}.crontab": text}


def _k8s(name: str, schedule: Schedule, image: str) -> dict[str, str]:
    latest = schedule.latest
    spec: dict[str, Any] = {
        "schedule": schedule.cron,
        "timeZone": schedule.timezone,
        "concurrencyPolicy": schedule.overlap.capitalize(),
    }
    if latest is not None:
        spec["startingDeadlineSeconds"] = int(latest.total_seconds())
    container = {"name": "pipeline", "image": image, "command": ["pipeline", *schedule.words]}
    pod = {"restartPolicy": "Never", "containers": [container]}
    spec["jobTemplate"] = {"spec": {"backoffLimit": 2, "template": {"spec": pod}}}
    notes = [
        "A pod that is lost is started again, and the command goes on from where it stopped.",
        "Relative paths count from the working directory of the image.",
        "A time that a change of clocks leaves out has no run; one that comes twice has one run",
        "or two: the CronJob controller decides.",
        *_day_note(schedule),
    ]
    if schedule.missed == "run-all":
        notes.append("'missed: run-all' cannot be expressed: only the latest missed run is run.")
    if latest is None:
        notes.append("After more than 100 missed runs nothing is started any more; a deadline in")
        notes.append("the schedule (startingDeadlineSeconds) keeps it from that.")
    return {f"{name}.cronjob.yaml": _manifest("batch/v1", "CronJob", name, spec, notes)}


def _raycron(name: str, schedule: Schedule, image: str) -> dict[str, str]:
    def group(title: str) -> dict[str, Any]:
        container = {"name": title, "image": image}
        return {"rayStartParams": {}, "template": {"spec": {"containers": [container]}}}

    workers = {"groupName": "workers", "replicas": 1, "minReplicas": 1, "maxReplicas": 1}
    spec = {
        "schedule": schedule.cron,
        "timeZone": schedule.timezone,
        "jobTemplate": {
            "entrypoint": shlex.join(["pipeline", *schedule.words]),
            "shutdownAfterJobFinishes": True,
            "rayClusterSpec": {
                "headGroupSpec": group("ray-head"),
                "workerGroupSpecs": [{**workers, **group("ray-worker")}],
            },
        },
    }
    notes = [
        "RayCronJob is in alpha: it needs KubeRay 1.6 with its feature gate on, and timeZone needs",
        "1.7. Without that, the schedule counts in the time zone of the operator.",
        "Add --executor ray to the command to use the cluster, and resources and replicas here.",
        f"'missed: {schedule.missed}' and 'overlap: {schedule.overlap}' cannot be expressed.",
        *_day_note(schedule),
    ]
    if schedule.deadline:
        notes.append("'deadline' cannot be expressed.")
    return {f"{name}.raycronjob.yaml": _manifest("ray.io/v1", "RayCronJob", name, spec, notes)}


def _manifest(version: str, kind: str, name: str, spec: dict[str, Any], notes: list[str]) -> str:
    head = "".join(f"# {note}\n" for note in notes)
    content = {"apiVersion": version, "kind": kind, "metadata": {"name": name}, "spec": spec}
    return head + yaml.safe_dump(content, sort_keys=False, width=10_000)


def _airflow(name: str, schedule: Schedule) -> dict[str, str]:
    if re.search(r"\dL|LW", schedule.cron.upper()):
        raise _inexpressible("airflow", schedule, "the last weekday of a month")
    if schedule.missed == "run-all" and not schedule.start:
        raise UsageError(
            "Airflow runs every due time since a start, and this schedule has none.",
            hint="Give the schedule a 'start'.",
            code="schedule-not-exportable",
        )
    start = (schedule.start or datetime(2000, 1, 1, tzinfo=UTC)).astimezone(UTC)
    command = shlex.join(["pipeline", *schedule.words])
    # Not to be read as a template, nor, where it ends with .sh, as the name of one.
    command = "{% raw %}" + command + "{% endraw %} "
    notes = [
        "Relative paths count from a temporary folder: give absolute ones, or URLs.",
        *_day_note(schedule),
    ]
    if schedule.overlap != "allow":
        notes.append(
            "A run that comes due while another is going waits for it, and is not left out."
        )
    if schedule.overlap == "replace":
        notes.append("'overlap: replace' cannot be expressed.")
    if schedule.missed == "skip":
        notes.append("'missed: skip' cannot be expressed: the latest missed run is run.")
    if schedule.deadline:
        notes.append("'deadline' cannot be expressed.")
    head = "".join(f"# {note}\n" for note in notes)
    runs = "" if schedule.overlap == "allow" else "    max_active_runs=1,\n"
    text = f"""{head}from datetime import datetime

from airflow import DAG
from airflow.timetables.trigger import CronTriggerTimetable

try:
    from airflow.providers.standard.operators.bash import BashOperator
except ImportError:  # Airflow 2
    from airflow.operators.bash import BashOperator

with DAG(
    dag_id={name!r},
    schedule=CronTriggerTimetable({schedule.cron!r}, timezone={schedule.timezone!r}),
    start_date=datetime.fromisoformat({start.isoformat()!r}),
    catchup={schedule.missed == "run-all"},
{runs}) as dag:
    BashOperator(task_id="pipeline", bash_command={command!r})
"""
    return {f"{name}.dag.py": text}


def _plain(to: str, schedule: Schedule) -> None:
    """Refuse what the cron expressions of Kubernetes do not know."""
    if "#" in schedule.cron or re.search(r"\bL|\dL", schedule.cron.upper()):
        raise _inexpressible(to, schedule, "'L' and '#'")


def _inexpressible(to: str, schedule: Schedule, what: str) -> UsageError:
    return UsageError(
        f"The cron expressions of {to} do not know {what}.",
        hint="Use systemd, cron or 'pipeline schedule serve', or another cron expression.",
        code="schedule-not-exportable",
        where=schedule.cron,
    )


def _day_note(schedule: Schedule) -> list[str]:
    days = schedule.cron.split()[2::2]
    if not any(day.startswith("*/") for day in days) or "*" in days:
        return []
    return [
        "Here a day has to match both day of month and day of week; this scheduler may take either."
    ]
