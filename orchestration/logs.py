"""A log for each start of a run, in lines of JSON; and less noise from others."""

from __future__ import annotations

import heapq
import json
import logging
import os
import platform
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.errors import PipelineError
from pipeline.storage.store import LocalStore, Store, make_folder
from pipeline.terminal import printable

log = logging.getLogger(__name__)
LOUD = ("asyncio", "botocore", "fsspec", "py.warnings", "ray", "torch", "urllib3")
"""Loggers of others that say more than a user of this package can act on."""
LOGS = "logs"
"""Folder of a run's memory with a file for each start."""
KEPT = ("step", "shard")
"""What a line says besides its message, where the call gave it as ``extra``."""
PERIOD = 30.0
"""Seconds from one copy of a log to an object store to the next."""


class JsonLines(logging.Formatter):
    """Each record as one line of JSON.

    Its fields are ``time`` (ISO 8601, UTC, milliseconds), ``level``, ``run``, ``logger`` and
    ``message``; where there is such, ``step``, ``shard``, ``exception`` and ``about``.
    """

    def __init__(self, run: str) -> None:
        super().__init__()
        self.run = run

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "run": self.run,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: vars(record)[name] for name in (*KEPT, "about") if name in vars(record)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class PlainLines(logging.Formatter):
    """Lines for a terminal: ``12:01:33 images: 2 of 4 shards done``. Foreign text does no harm."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


def show(*, verbose: bool = False) -> None:
    """Show on standard error what the package logs: for a command line, before anything else.

    Args:
        verbose: also details, and what other packages have to say. A worker is told so by the level
            of the logger ``pipeline``, which is then ``DEBUG``.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlainLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("pipeline").setLevel(logging.DEBUG if verbose else logging.INFO)
    if not verbose:
        quiet()


def quiet() -> None:
    """Have other packages, in this process and those that it starts, tell of errors only."""
    for name in LOUD:
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not sys.warnoptions:  # else the user has said what to do with them
        warnings.simplefilter("ignore")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")


@contextmanager
def run_log(work: Store, run: str, about: Mapping[str, Any]) -> Iterator[None]:
    """Keep a log of this start of a run, in a file that nobody else writes.

    On a disk it is appended to as it is written. To an object store it is copied twice a minute,
    so that a run that was killed leaves one too, and when the run ends.

    Args:
        work: the folder of the output for a run's memory.
        run: name of this start.
        about: what the first line says besides versions and where it runs: the command's
            arguments, the executor.
    """
    name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{run}.jsonl"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        if isinstance(work, LocalStore):
            path = work.root / LOGS / name
            make_folder(path.parent)
        handler = logging.FileHandler(path, encoding="utf-8")
        handler.setFormatter(JsonLines(run))
        handler.handle(_record(logging.INFO, "run started", about={**_here(), **about}))
        with closing(handler), _listening(handler), _copied(work.below(LOGS), path):
            try:
                yield
                handler.handle(_record(logging.INFO, "run finished"))
            except BaseException as error:
                handler.handle(_ended(error))
                raise


def _record(level: int, message: str, **extra: Any) -> logging.LogRecord:
    return log.makeRecord(log.name, level, __file__, 0, message, (), None, extra=extra)


def _ended(error: BaseException) -> logging.LogRecord:
    """A user's error says all in its message; of any other the traceback is kept."""
    told = f"run stopped: {error}" if str(error) else f"run stopped: {type(error).__name__}"
    record = _record(logging.ERROR, told)
    if not isinstance(error, PipelineError | KeyboardInterrupt):
        record.exc_info = (type(error), error, error.__traceback__)
    return record


def _here() -> dict[str, Any]:
    try:
        torch = version("torch")  # not imported: that takes seconds
    except PackageNotFoundError:
        torch = ""
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch,
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }


@contextmanager
def _listening(handler: logging.Handler) -> Iterator[None]:
    """Give ``handler`` what the package logs from INFO on, and others no more than before."""
    logger = logging.getLogger("pipeline")
    level, propagate, shown = logger.level, logger.propagate, logger.getEffectiveLevel()
    handler.setLevel(logging.INFO)
    logger.addHandler(handler)
    others = _Others(shown)
    if shown > logging.INFO:
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(others)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        if shown > logging.INFO:
            logger.removeHandler(others)
            logger.setLevel(level)
            logger.propagate = propagate


class _Others(logging.Handler):
    """Passes on what would have been shown without a log."""

    def emit(self, record: logging.LogRecord) -> None:
        logging.getLogger().callHandlers(record)


@contextmanager
def _copied(store: Store, path: Path) -> Iterator[None]:
    """Copy a growing file to an object store from time to time, and at the end."""
    if isinstance(store, LocalStore):
        yield
        return
    ended = threading.Event()

    def copy() -> float:
        """Seconds that it took."""
        began = time.monotonic()
        try:
            store.replace(path.name, path.read_bytes())
        except (OSError, PipelineError) as error:
            # What went wrong before is what the user has to know.
            log.warning("the log could not be kept: %s", error)
        return time.monotonic() - began

    def work() -> None:
        pause = PERIOD
        while not ended.wait(pause):
            # The whole log travels each time: a long one, or a slow network, takes a longer pause.
            pause = max(PERIOD, 10 * copy())

    thread = threading.Thread(target=work, daemon=True, name="log")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        copy()


def read_logs(work: Store) -> Iterator[dict[str, Any]]:
    """The lines of the logs of every start, as JSON objects in the order of time.

    A line that is not whole is left out: its writer was killed.
    """
    store = work.below(LOGS)
    names = [info.name for info in store.files() if info.has("jsonl")]
    return heapq.merge(*(_lines(store, name) for name in names), key=lambda line: line["time"])


def _lines(store: Store, name: str) -> Iterator[dict[str, Any]]:
    for text in store.read(name).split(b"\n"):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("time"), str):
            yield line


def as_text(line: Mapping[str, Any]) -> str:
    """A line of a log for people: ``12:01:33 WARNING images: ...``, by the clock of the reader."""
    when = datetime.fromisoformat(line["time"]).astimezone()
    about = line.get("about")
    told = [f"{when:%H:%M:%S} {line.get('level', '')} {line.get('message', '')}"]
    if isinstance(about, Mapping):
        facts = ", ".join(f"{name} {value}" for name, value in about.items())
        told = [f"--- {when:%Y-%m-%d %H:%M:%S} run {line.get('run', '')}: {facts}"]
    told += str(line.get("exception", "")).splitlines()
    return "\n".join(printable(text) for part in told for text in part.split("\n"))
