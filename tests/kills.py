"""Runs in forked children, ended by a real SIGKILL: at a call that changes the disk, or at a time.

For a process of its own, which has no other threads: ``python -c 'import kills; kills.main()'``.
Children need import nothing, so that hundreds of them take a minute.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import re
import select
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from faults import FORMATS, SOURCE, samples, whole_run

from pipeline.storage.store import LocalStore
from pipeline.testing.trees import tree_digest

GROWN = samples(4, 1, 3, 2, 5)
"""Begins with the shards of ``SOURCE``."""

CHANGES = ("mkdir", "fsync", "link", "replace", "unlink", "rmdir")
"""What Python's ``os`` has for changing a disk, and the pipeline uses."""

POINTS = {
    "before write",
    "during write",
    "after write",
    "after fsync",
    "after link",
    "before ledger record",
    "after ledger record",
    "before step manifest",
    "after step manifest",
    "before run manifest",
    "after run manifest",
}
"""The moments of the protocol, in their order."""

SNAPSHOT_POINTS = {"before adoption", "after adoption", "before snapshot", "after snapshot"}
"""What a run over a source that has grown has besides."""


@dataclass(frozen=True)
class Story:
    """A run to be killed.

    Attributes:
        fmt: format of its first step; the second writes Parquet.
        grown: whether it runs over a source that has grown, in an output that has been published.
    """

    fmt: str
    grown: bool = False

    def begin(self, out: Path) -> None:
        """Put in place what an earlier run left."""
        if self.grown:
            whole_run(LocalStore(out), FORMATS[self.fmt], source=SOURCE)

    def run(self, out: Path) -> None:
        whole_run(LocalStore(out), FORMATS[self.fmt], source=GROWN)


class Child:
    """A forked process with a session of its own, whose clock starts when it is there."""

    def __init__(self, work: Callable[[Callable[[str], object]], object]) -> None:
        self._pipe, end = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            self._live(work, end)
        os.close(end)
        os.read(self._pipe, 1)
        self.began = time.monotonic()

    def _live(self, work: Callable[[Callable[[str], object]], object], end: int) -> None:
        code = 1
        try:
            os.setsid()
            os.write(end, b"!")
            work(lambda text: os.write(end, text.encode()))
            code = 0
        except BaseException:  # noqa: BLE001 - it must not go on as its parent
            traceback.print_exc()
        finally:
            os._exit(code)

    def kill(self, after: float, *, group: bool) -> None:
        """SIGKILL after so many seconds, if it has not ended before."""
        handle = os.pidfd_open(self.pid)
        ended, _, _ = select.select([handle], [], [], max(0.0, after))
        os.close(handle)
        if not ended:
            (os.killpg if group else os.kill)(self.pid, signal.SIGKILL)

    def end(self) -> tuple[int, str]:
        """Its exit code and what it told."""
        with os.fdopen(self._pipe, "rb") as pipe:
            told = pipe.read().decode()
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.seconds = time.monotonic() - self.began
        assert code in {0, -signal.SIGKILL}, code
        return code, told


@dataclass
class Calls:
    """Counts the moments at which a run can be killed, and dies at one of them.

    Args:
        out: the output folder.
        tell: is told the name of the moment at which the process dies.
        at: name of the moment at which it dies, and how many of that name come before it.
    """

    out: Path
    tell: Callable[[str], object]
    at: tuple[str, int] | None = None
    seen: list[str] = field(default_factory=list)
    _lock: Any = field(default_factory=threading.Lock)

    def hit(self, point: str, before_death: Callable[[], object] = lambda: None) -> None:
        with self._lock:  # shards are taken over by several threads
            if self.at == (point, self.seen.count(point)):
                before_death()
                self.tell(point)
                os.kill(os.getpid(), signal.SIGKILL)
            self.seen.append(point)

    def watch(self) -> None:
        """Count from now on, in this process and for ever."""
        for name in CHANGES:
            setattr(os, name, self._counted(name, getattr(os, name)))
        for kind in {type(fmt) for fmt in FORMATS.values()}:
            kind.write = self._writing(kind.write)  # type: ignore[method-assign]

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            before, after = self._points(name, args)
            self.hit(before)
            result = real(*args, **options)
            if after:
                self.hit(after)
            return result

        return call

    def _writing(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def write(fmt: Any, table: Any, directory: Path, region: Any) -> None:
            self.hit("before write")
            real(fmt, table, directory, region)
            self.hit("during write", lambda: halve(directory))

        return write

    def _points(self, name: str, args: tuple[Any, ...]) -> tuple[str, str | None]:
        """What the moments before and after a call are called."""
        unfinished = str(self.out / ".run" / "unfinished")
        if name == "fsync":
            path = Path(f"/proc/self/fd/{args[0]}").readlink()
            # What is put in another's place is written there too, under a hidden name.
            own = str(path).startswith(unfinished) and not path.name.startswith(".")
            return ("after write" if own and path.is_file() else name), None
        if name == "link":
            taken_over = not str(args[0]).startswith(unfinished)
            return (
                ("before adoption", "after adoption")
                if taken_over
                else (
                    "after fsync",
                    "after link",
                )
            )
        if name == "replace":
            parts = Path(args[1]).relative_to(self.out).parts
            if parts[-1] == "manifest.json":
                what = {1: "run manifest", 2: "step manifest", 3: "snapshot"}[len(parts)]
                return f"before {what}", f"after {what}"
            if "shards" in parts:
                return "before ledger record", "after ledger record"
        return name, None


def halve(directory: Path) -> None:
    """Cut every file in half, as a write that was interrupted leaves it."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size // 2)


def memory(out: Path) -> set[str]:
    """The files of a run's memory whose names do not depend on when it ran."""
    names = {path.relative_to(out).as_posix() for path in out.glob(".run/**/*") if path.is_file()}
    return {name for name in names if not re.match(r"\.run/(logs/|[^/]+/ledger/parts/)", name)}


def recovered(out: Path) -> tuple[int, int]:
    """Of how many steps the last start found shards finished, and of how many a part of them."""
    log = max(out.glob(".run/logs/*.jsonl"), key=lambda path: path.stat().st_mtime_ns).read_text()
    # Shards that it took over from an earlier snapshot are told of as found, once they are.
    taken = dict(re.findall(r"(\w+): (\d+) shards taken over", log))
    found = re.findall(r"(\w+): (?:all )?(\d+) (of \d+ )?shards found finished", log)
    own = [part for step, count, part in found if int(count) > int(taken.get(step, 0))]
    return len(own), sum(map(bool, own))


@dataclass
class Figures:
    """What became of a number of runs.

    Attributes:
        runs: how many there were, each killed and resumed until it ended.
        first: those that were killed the first time, not merely meant to be.
        kills: all kills.
        recovered: runs whose last start found shards finished.
        partly: those where it found a part of a step's shards, and did the rest.
        points: the moments of the first kills, where they are known.
    """

    runs: int = 0
    first: int = 0
    kills: int = 0
    recovered: int = 0
    partly: int = 0
    points: list[str] = field(default_factory=list)


class Trial:
    """One story, told undisturbed once, and then with kills.

    Args:
        root: where outputs lie.
        story: what is run.
    """

    def __init__(self, root: Path, story: Story) -> None:
        self.root, self.story, self.figures = root, story, Figures()
        (root / "warm").mkdir()
        story.begin(root / "warm")
        self.early = tree_digest(root / "warm")
        self._begun = root / "begun"
        shutil.copytree(root / "warm", self._begun)
        story.run(root / "warm")  # children need import nothing
        gc.freeze()  # nor copy what the collector would touch
        self.whole = tree_digest(root / "warm")
        self.memory = memory(root / "warm")

    def fresh(self, name: str) -> Path:
        """The folder of one more run."""
        shutil.copytree(self._begun, self.root / name)
        return self.root / name

    def check(self, out: Path) -> None:
        """What holds at any time: nothing is wrong, and nothing is there that does not belong."""
        found = tree_digest(out)
        assert found.items() <= self.whole.items() | self.early.items(), "a wrong or extra file"

    def check_finished(self, out: Path) -> None:
        """What holds at the end. Counts whether something was recovered."""
        assert tree_digest(out) == self.whole
        assert not list(out.glob(".run/unfinished/*"))
        assert memory(out) == self.memory
        steps, parts = recovered(out)
        self.figures.runs += 1
        self.figures.recovered += steps > 0
        self.figures.partly += parts > 0
        shutil.rmtree(out)

    def at_call(self, out: Path, at: tuple[str, int] | None) -> tuple[int, str]:
        """Run, and die at a moment; the exit code and the moment's name, or those of all."""

        def work(tell: Callable[[str], object]) -> None:
            calls = Calls(out, tell, at)
            calls.watch()
            self.story.run(out)
            tell(json.dumps(calls.seen))

        return Child(work).end()

    def at_time(self, out: Path, after: float | None, *, group: bool = False) -> tuple[int, float]:
        """Run, and be killed after so many seconds; the exit code, and how long it took."""
        child = Child(lambda _: self.story.run(out))
        if after is not None:
            child.kill(after, group=group)
        code, _ = child.end()
        return code, child.seconds


def chosen(seen: Sequence[str], step: int) -> list[tuple[str, int]]:
    """Every so many moments, and the first and the last of each name."""
    last = {point: number for number, point in enumerate(seen)}
    numbers = {*range(0, len(seen), step), *last.values(), *map(seen.index, last)}
    # Not by number: how often several threads find a folder missing differs from run to run.
    return [(seen[number], seen[:number].count(seen[number])) for number in sorted(numbers)]


def at_every_call(trial: Trial, step: int) -> None:
    """Kill at every ``step``-th moment; once more somewhere else; then let it come to its end."""
    code, told = trial.at_call(trial.fresh("counted"), None)
    assert code == 0
    moments = chosen(json.loads(told), step)
    somewhere = random.Random(step)
    for number, moment in enumerate(moments):
        out = trial.fresh(str(number))
        code, point = trial.at_call(out, moment)
        if code:
            trial.figures.points.append(point)
        trial.check(out)
        again, _ = trial.at_call(out, somewhere.choice(moments))
        trial.figures.first += code != 0
        trial.figures.kills += (code != 0) + (again != 0)
        trial.check(out)
        assert trial.at_time(out, None)[0] == 0, moment
        trial.check_finished(out)


def at_random_times(trial: Trial, times: int) -> None:
    """Kill at ``times`` moments, then up to two times more; then let it come to its end."""
    moments = random.Random(times)
    seconds = 0.0
    for number in range(times):
        if number % 10 == 0:  # how long it takes depends on what else the machine does
            _, seconds = trial.at_time(trial.fresh(f"timed{number}"), None)
        out = trial.fresh(str(number))
        for start in range(1 + moments.randrange(3)):
            after = moments.uniform(0.0, seconds)
            code, took = trial.at_time(out, after, group=bool(number % 2))
            trial.figures.first += code != 0 and not start
            trial.figures.kills += code != 0
            trial.check(out)
            if code == 0:
                seconds = min(seconds, took) if not start else seconds
                break
        assert trial.at_time(out, None)[0] == 0, number
        trial.check_finished(out)


def main() -> None:
    """Arguments: ``calls`` or ``times``, a folder, the story as JSON, and a number."""
    logging.getLogger().addHandler(logging.NullHandler())
    how, root, story, number = sys.argv[1:]
    # What the kernel has been given is there when its process is killed: nothing has to be forced.
    os.fsync = lambda _: None
    trial = Trial(Path(root), Story(**json.loads(story)))
    {"calls": at_every_call, "times": at_random_times}[how](trial, int(number))
    print(json.dumps(asdict(trial.figures)))
