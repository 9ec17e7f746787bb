"""SIGKILL in the middle: the same command goes on and writes the same bytes."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY

import pipeline
from pipeline.testing.trees import tree_digest

MOMENTS = [
    "checkpoint at epoch 2 of 4",
    "images: 2 of 4 shards done",
    "students: 3 of 6 shards done",
]


def command(out: Path, executor: str) -> list[str]:
    script = (
        "import logging, pipeline, sys, json; logging.basicConfig(level='INFO', stream=sys.stdout);"
        f"pipeline.run('distill', 'digits', out={str(out)!r}, executor={executor!r},"
        f" config=json.loads({json.dumps({**TINY, 'ipc': 2})!r}))"
    )
    return [sys.executable, "-u", "-c", script]


def kill_at(out: Path, executor: str, moment: str) -> None:
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


def finish(out: Path, executor: str) -> str:
    done = subprocess.run(command(out, executor), check=True, capture_output=True, text=True)
    return done.stdout


@pytest.mark.parametrize(
    ("moment", "recovered"),
    [
        (MOMENTS[0], "training goes on from epoch 2 of 4"),
        (MOMENTS[1], "images: 2 of 4 shards found finished"),
        (MOMENTS[2], "students: 3 of 6 shards found finished"),
    ],
)
def test_killed_once(whole, tmp_path, moment, recovered):
    kill_at(tmp_path, "local", moment)
    assert not (tmp_path / "manifest.json").exists()
    assert recovered in finish(tmp_path, "local")
    assert tree_digest(tmp_path) == whole


def test_killed_three_times_and_finished_on_ray(whole, tmp_path):
    for moment in MOMENTS:
        kill_at(tmp_path, "local", moment)
    assert "students: 3 of 6 shards found finished" in finish(tmp_path, "ray")
    assert tree_digest(tmp_path) == whole
