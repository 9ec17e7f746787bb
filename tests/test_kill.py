"""SIGKILL in the middle: the same command goes on and writes the same bytes."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import TINY
from faults import FORMATS, Noting, output, whole_run
from kills import POINTS, SNAPSHOT_POINTS, Figures, Story
from samples import attempt, keyed, local_run
from test_ray_training import Task

import pipeline
from pipeline.orchestration import lease
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.store import LocalStore, Store
from pipeline.testing.trees import tree_digest

MOMENTS = [
    "checkpoint at epoch 2 of 4",
    "checkpoint at iteration 7 of 12",
    "images: 2 of 4 shards done",
    "students: 3 of 6 shards done",
]
FOUND = r"(\d+ of \d+|all \d+) shards found finished"


def command(out: Path | str, executor: str) -> list[str]:
    script = (
        "import logging, pipeline, sys, json; logging.basicConfig(level='INFO', stream=sys.stdout);"
        f"pipeline.run('distill', 'digits', out={str(out)!r}, executor={executor!r},"
        f" config=json.loads({json.dumps({**TINY, 'ipc': 2})!r}), checkpoint_minutes=0)"
    )
    return [sys.executable, "-u", "-c", script]


def kill_at(out: Path | str, executor: str, moment: str) -> None:
    process = subprocess.Popen(
        command(out, executor), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout
    seen = next((line for line in process.stdout if moment in line), None)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert seen, f"the run ended before '{moment}'"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    pipeline.run("distill", "digits", out=out, config={**TINY, "ipc": 2})
    return tree_digest(out)


def finish(out: Path | str, executor: str) -> str:
    done = subprocess.run(command(out, executor), check=True, capture_output=True, text=True)
    return done.stdout


@pytest.mark.parametrize(
    ("moment", "recovered"),
    [
        # It goes on until the signal is there.
        (MOMENTS[0], r"training goes on from epoch [234] of 4, step \d+ of \d+"),
        (MOMENTS[1], r"synthesis goes on from iteration ([89]|1[012])"),
        (MOMENTS[2], r"images: (2 of 4|3 of 4|all 4) shards found finished"),
        (MOMENTS[3], r"students: ([345] of 6|all 6) shards found finished"),
    ],
)
def test_killed_once(whole, tmp_path, moment, recovered):
    kill_at(tmp_path, "local", moment)
    assert not (tmp_path / "manifest.json").exists()
    assert re.search(recovered, finish(tmp_path, "local"))
    assert tree_digest(tmp_path) == whole


def test_killed_while_writing_to_an_object_store(whole, s3):
    kill_at(s3.url, "local", MOMENTS[2])
    assert s3.info("manifest.json") is None
    assert re.search(FOUND, finish(s3.url, "local"))
    found = {name: hashlib.sha256(data).hexdigest() for name, data in output(s3).items()}
    assert found == whole
    assert len(pipeline.open(s3.url)) == 20


def test_killed_three_times_and_finished_on_ray(whole, tmp_path):
    for moment in MOMENTS:
        kill_at(tmp_path, "local", moment)
    assert re.search(FOUND, finish(tmp_path, "ray"))
    assert tree_digest(tmp_path) == whole


def killed(how: str, root: Path, story: Story, number: int) -> Figures:
    """Kill runs in a process of its own: see :mod:`kills`."""
    words = [how, str(root), json.dumps(asdict(story)), str(number)]
    done = subprocess.run(
        [sys.executable, "-c", "import kills; kills.main()", *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Figures(**json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(("fmt", "step"), [("parquet", 12), ("folder", 25)])
def test_killed_at_any_call_that_changes_the_disk(tmp_path: Path, fmt: str, step: int) -> None:
    figures = killed("calls", tmp_path, Story(fmt), step)
    assert set(figures.points) >= POINTS
    assert figures.runs == figures.first > 30
    assert figures.recovered > figures.runs / 2
    assert figures.partly > 0


def test_killed_at_any_call_while_a_snapshot_succeeds_another(tmp_path: Path) -> None:
    figures = killed("calls", tmp_path, Story("webdataset", grown=True), 30)
    assert set(figures.points) >= POINTS | SNAPSHOT_POINTS
    assert figures.recovered > figures.runs / 2
    assert figures.partly > 0


@pytest.mark.parametrize(
    ("grown", "times"),
    [(False, 25), (True, 10), pytest.param(False, 100, marks=pytest.mark.slow)],
)
def test_killed_at_random_times(tmp_path: Path, grown: bool, times: int) -> None:
    figures = killed("times", tmp_path, Story("webdataset", grown=grown), times)
    assert figures.runs == times
    assert figures.first >= 0.6 * times
    assert figures.recovered >= 0.2 * times
    # A source that has grown has two shards of its own, and ten kills may all miss the time between
    # them: there the test above, which kills at chosen calls, sees that a part was found.
    assert grown or figures.partly > 0


def test_a_late_attempt_changes_nothing(tmp_path: Path) -> None:
    late = Noting()
    whole_run(LocalStore(tmp_path / "maps"), FORMATS["webdataset"], late)
    task = Task("noisy", workers=1)
    fits = local_run(tmp_path / "fits", threads=1)
    fits.executor = late
    model = fits.fit("model", task, data=keyed(2, 3))
    fits.publish("models", {"model": model}, {})
    assert {type(work).__name__ for work, _ in late.work} == {"MapWork", "FitWork"}
    before = [tree_digest(out) for out in tmp_path.iterdir()]
    names = set(tmp_path.rglob("*"))
    for work, unit in late.work:
        assert "error" not in attempt(work, unit)
    assert [tree_digest(out) for out in tmp_path.iterdir()] == before
    assert set(tmp_path.rglob("*")) == names


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "disk":
        return LocalStore(tmp_path / "out")
    store: ObjectStore = request.getfixturevalue("s3")
    return store


def convert(out: Store) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "import sys; from pipeline.cli import main; sys.exit(main())"]
    words = ["convert", "digits", out.url, "--shard-mb", "1"]
    return subprocess.Popen([*command, *words], stderr=subprocess.PIPE, text=True)


def test_of_two_commands_on_one_output_one_wins(place: Store, tmp_path: Path) -> None:
    both = (convert(place), convert(place))
    live = place.below(".run/live")
    try:
        while not (holder := lease.newest(live, lease.names(live))[1]):
            assert [process.poll() for process in both] == [None, None]
            time.sleep(0.005)
        winner, loser = sorted(both, key=lambda process: process.pid != holder.pid)
        # However fast it is, it must not end before the other one comes.
        winner.send_signal(signal.SIGSTOP)
        _, told = loser.communicate()
        assert loser.returncode == 1
        assert "[output-busy]" in told
        assert f"process {winner.pid}" in told
        winner.send_signal(signal.SIGCONT)
        _, told = winner.communicate()
        assert winner.returncode == 0, told
    finally:
        for process in both:
            process.kill()
            process.wait()
            if process.stderr:
                process.stderr.close()
    pipeline.run("convert", "digits", out=tmp_path / "alone", config={"shard_mb": 1})
    assert output(place) == output(LocalStore(tmp_path / "alone"))
