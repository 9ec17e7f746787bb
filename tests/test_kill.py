"""SIGKILL in the middle: the same command goes on and writes the same bytes."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY
from faults import output

import pipeline
from pipeline.testing.trees import tree_digest

MOMENTS = [
    "checkpoint at epoch 2 of 4",
    "images: 2 of 4 shards done",
    "students: 3 of 6 shards done",
]


def command(out: Path | str, executor: str) -> list[str]:
    script = (
        "import logging, pipeline, sys, json; logging.basicConfig(level='INFO', stream=sys.stdout);"
        f"pipeline.run('distill', 'digits', out={str(out)!r}, executor={executor!r},"
        f" config=json.loads({json.dumps({**TINY, 'ipc': 2})!r}))"
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


def test_killed_while_writing_to_an_object_store(whole, s3):
    kill_at(s3.url, "local", MOMENTS[1])
    assert s3.info("manifest.json") is None
    assert "images: 2 of 4 shards found finished" in finish(s3.url, "local")
    found = {name: hashlib.sha256(data).hexdigest() for name, data in output(s3).items()}
    assert found == whole
    assert len(pipeline.open(s3.url)) == 20


def test_killed_three_times_and_finished_on_ray(whole, tmp_path):
    for moment in MOMENTS:
        kill_at(tmp_path, "local", moment)
    assert "students: 3 of 6 shards found finished" in finish(tmp_path, "ray")
    assert tree_digest(tmp_path) == whole


AT_EVERY_CALL = """
import json, os, signal, sys
from pathlib import Path
from faults import FORMATS, whole_run
from pipeline.storage.store import LocalStore
from pipeline.testing import tree_digest

def die_at(number):
    calls = []
    def counted(real):
        def call(*args, **options):
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(real.__name__)
            return real(*args, **options)
        return call
    for name in ("mkdir", "fsync", "link", "replace", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))

def in_child(out, number):
    child = os.fork()
    if not child:
        code = 1
        try:
            die_at(number)
            whole_run(LocalStore(out), FORMATS[sys.argv[2]])
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

root = Path(sys.argv[1])
whole_run(LocalStore(root / "whole"), FORMATS[sys.argv[2]])  # children need import nothing
whole = tree_digest(root / "whole")
number = killed = 0
while True:
    out = root / str(number)
    code = in_child(out, number)
    if code == 0:
        break
    assert code == -signal.SIGKILL, (number, code)
    found = tree_digest(out)
    assert found.items() <= whole.items(), (number, "a wrong or extra file")
    killed += 1
    # Once more, somewhere else, and then to the end.
    again = in_child(out, number // 2)
    assert again in {0, -signal.SIGKILL}, (number, again)
    assert tree_digest(out).items() <= whole.items(), (number, "a wrong or extra file")
    assert in_child(out, -1) == 0, number
    assert tree_digest(out) == whole, number
    assert not list(out.glob(".run/unfinished/*")), number
    number += int(sys.argv[3])
print(json.dumps([killed, len(whole)]))
"""


@pytest.mark.parametrize(("fmt", "step"), [("parquet", 2), ("folder", 7)])
def test_killed_at_any_call_that_changes_the_disk(tmp_path, fmt, step):
    done = subprocess.run(
        [sys.executable, "-c", AT_EVERY_CALL, str(tmp_path), fmt, str(step)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    killed, files = json.loads(done.stdout.splitlines()[-1])
    assert killed > 20
    assert files > 8
