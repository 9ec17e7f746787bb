"""What a run shows while it works: lines in a log, or bars on a terminal."""

from __future__ import annotations

import io
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.terminal import human, printable

log = logging.getLogger(__name__)
SECONDS = 60.0
"""A line at least every so often, if anything was done."""
WIDE = 110
"""Columns of a terminal from which on there is room for bars beside the figures."""
CELLS = (
    ("shards", ""),
    ("time", ""),
    ("bad", "yellow"),
    ("failed", "red"),
    ("samples", ""),
    ("rate", ""),
    ("bytes", ""),
)
"""Figures of a step on a terminal, with their styles."""


@dataclass
class Tally:
    """How far a step is. Its size does not depend on the number of shards.

    Attributes:
        step: its name.
        shards: how many it has.
        done: how many are done, those that an earlier run did too.
        failed: how many failed.
        samples: samples that this run has read, where the step is one over samples.
        bad: those of them in quarantine.
        bytes: bytes of what came out.
    """

    step: str
    shards: int
    done: int
    failed: int = 0
    samples: int | None = None
    bad: int = 0
    bytes: int = 0
    before: int = field(init=False)
    began: float = field(default_factory=time.monotonic)
    told: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.before = self.done

    def add(self, record: Mapping[str, Any]) -> None:
        """Count a shard that is done."""
        self.done += 1
        if counts := record.get("counts"):
            self.samples = (self.samples or 0) + counts["in"]
            self.bytes += record["bytes"]
            if counts["quarantined"]:
                self.bad += sum(counts["quarantined"].values())

    def figures(self, *, ended: bool = False) -> dict[str, str]:
        """What there is to say, for people; what there is not is left out."""
        seconds = max(time.monotonic() - self.began, 1e-3)
        told = {"shards": f"{self.done:,} of {self.shards:,} shards done"}
        if self.samples is not None:
            told["samples"] = f"{self.samples:,} samples"
            rate = self.samples / seconds
            told["rate"] = f"{rate:,.0f} samples/s" if rate >= 100 else f"{rate:.2g} samples/s"
            told["bytes"] = human(self.bytes)
        if self.bad:
            told["bad"] = f"{self.bad:,} bad"
        if self.failed:
            told["failed"] = f"{self.failed:,} failed"
        if ended:
            told["time"] = f"in {clock(seconds)}"
        elif self.before < self.done < self.shards:
            each = seconds / (self.done - self.before)
            told["time"] = f"ETA {clock(each * (self.shards - self.done))}"
        return told


class Progress:
    """Tells of a run in log lines: of every shard of a small step, of every hundredth of a large
    one, and at least once a minute. Called from one thread.
    """

    def __init__(self) -> None:
        self.running: dict[str, Tally] = {}

    def begin(self, step: str, shards: int, finished: int) -> None:
        """A step of so many shards begins, of which so many were done before."""
        self.running[step] = Tally(step, shards, finished)

    def done(self, step: str, record: Mapping[str, Any]) -> None:
        """A shard is done; ``record`` is what the ledger says of it."""
        tally = self.running[step]
        tally.add(record)
        now = time.monotonic()
        if tally.done % max(1, tally.shards // 100) == 0 or now - tally.told > SECONDS:
            tally.told = now
            extra = {"step": step, "bar": True}  # a bar says the same
            log.info("%s: %s", step, ", ".join(tally.figures().values()), extra=extra)

    def failed(self, step: str, error: Mapping[str, str]) -> None:
        """A shard failed; ``error`` is its record's, with or without a traceback."""
        self.running[step].failed += 1
        text = error.get("traceback", error["message"])
        log.error("%s: %s", step, text, extra={"step": step, "shard": error["where"]})

    def end(self, step: str) -> None:
        """No shard of the step is worked on any more."""
        tally = self.running.pop(step)
        figures = ", ".join(tally.figures(ended=True).values())
        log.info("%s: %s", step, figures, extra={"step": step})

    def close(self) -> None:
        """The run has ended."""


class Bars(Progress):
    """Shows a bar for each running step at the foot of a terminal; log lines appear above it.

    Args:
        console: a ``rich.console.Console``; standard error where not given.
    """

    def __init__(self, console: Any = None) -> None:
        super().__init__()
        from rich.console import Console
        from rich.live import Live

        self._console = console or Console(stderr=True)
        self._live = Live(
            console=self._console,
            get_renderable=self._table,
            refresh_per_second=4,
            transient=True,
            redirect_stdout=False,  # it may be a file
        )
        self._moved = [
            (handler, handler.setStream(_Above(self._say)))
            for handler in logging.getLogger().handlers
            if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr
        ]
        for handler, _ in self._moved:
            handler.addFilter(_not_in_a_bar)
        self._live.start()

    def close(self) -> None:
        self._live.stop()
        for handler, stream in self._moved:
            handler.setStream(stream)
            handler.removeFilter(_not_in_a_bar)
        self._moved = []

    def _say(self, line: str) -> None:
        from rich.text import Text

        self._console.print(Text(printable(line)), soft_wrap=True, highlight=False)

    def begin(self, step: str, shards: int, finished: int) -> None:
        super().begin(step, shards, finished)
        self._live.refresh()

    def _table(self) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        bars = self._console.width >= WIDE
        table = Table.grid(padding=(0, 2))
        # Drawn by another thread, while steps begin and end.
        for tally in list(self.running.values()):
            told = tally.figures()
            told["shards"] = f"{tally.done:,}/{tally.shards:,} shards"
            cells = [Text(printable(tally.step)), *(Text(told.get(n, ""), s) for n, s in CELLS)]
            if bars:
                table.add_row(ProgressBar(max(1, tally.shards), tally.done, width=20), *cells)
            else:
                # What matters least is cut off.
                line = Text("  ").join(cell for cell in cells if cell)
                line.no_wrap, line.overflow = True, "ellipsis"
                table.add_row(line)
        return table


class _Above(io.TextIOBase):
    """A stream whose lines are shown above the bars."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def write(self, text: str) -> int:
        for line in text.removesuffix("\n").split("\n"):
            self._say(line)
        return len(text)

    def flush(self) -> None:
        """Nothing is kept back."""


def _not_in_a_bar(record: logging.LogRecord) -> bool:
    return not hasattr(record, "bar")


def on_terminal() -> Progress:
    """Bars where standard error is a terminal that can show them, lines elsewhere."""
    able = sys.stderr.isatty() and os.environ.get("TERM") not in {"dumb", "unknown"}
    return Bars() if able else Progress()


def clock(seconds: float) -> str:
    """A span of time for people: ``0:01:40``, ``2 d 3:00:00``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    day = f"{days} d " if days else ""
    return f"{day}{hours}:{minutes:02}:{rest:02}"
