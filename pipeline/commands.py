"""What the command line does with data sets and outputs, besides running recipes.

Each function takes the parsed options and gives an exit code, a summary of plain JSON types, and
the same as text.
"""

from __future__ import annotations

import re
import time
from argparse import Namespace
from collections.abc import Iterable
from typing import Any

from pipeline.errors import PipelineError
from pipeline.orchestration.garbage import find_garbage
from pipeline.orchestration.live import cancel, hold
from pipeline.orchestration.logs import as_text, read_logs
from pipeline.orchestration.memory import WORK
from pipeline.orchestration.progress import on_terminal
from pipeline.orchestration.status import status
from pipeline.orchestration.verify import Findings, set_aside, verify
from pipeline.run_text import status_text, summary_text
from pipeline.storage.artifact import Artifact
from pipeline.storage.store import Store, open_store
from pipeline.terminal import human

WATCH = 2.0
"""Seconds from one status to the next."""
RETRY = re.compile(r"[^/]+-retry\d+/")
Done = tuple[int, dict[str, Any], str]


def run_verify(options: Namespace) -> Done:
    """``pipeline verify``: exit code 1 where anything is damaged."""
    found = verify(open_store(options.path), 1.0 if options.deep else options.subset)
    return int(bool(found.damaged)), found.summary(), _findings(found)


def run_repair(options: Namespace) -> Done:
    """``pipeline repair``: take damaged files out, make them anew, look again."""
    from pipeline.api import recorded, resume  # brings torch, which takes seconds

    store = open_store(options.path)
    repaired: dict[str, str] = {}
    recorded(store)  # refuses now what could not be made anew
    found = verify(store, 1.0)
    found.damaged |= dict.fromkeys(found.unfinished, "No finished shard vouches for it.")
    # A damaged manifest hides what is wrong with its files until it is made anew.
    while found.damaged and not set(found.damaged) & set(repaired):
        repaired |= found.damaged
        retried = _retried(store, found.damaged)
        with hold(store.below(WORK), "repair"):
            set_aside(store, list(found.damaged))
        resume(options.path, retry=retried, progress=on_terminal())
        found = verify(store, 1.0)
    head = f"{len(repaired)} damaged files were set aside and made anew.\n" if repaired else ""
    return (
        int(bool(found.damaged)),
        {**found.summary(), "repaired": repaired},
        head + _findings(found),
    )


def run_retry(options: Namespace) -> Done:
    """``pipeline retry``: take samples up from quarantine."""
    from pipeline.api import resume

    summary = resume(options.path, retry=options.reason, progress=on_terminal())
    return 0, summary, summary_text(summary)


def run_gc(options: Namespace) -> Done:
    """``pipeline gc``: say what could be deleted; delete it only if told to."""
    store = open_store(options.path)
    chosen = {"intermediate": options.intermediate, "expired": options.snapshots}
    groups = find_garbage(store, **chosen)
    if options.delete:
        with hold(store.below(WORK), "gc"):
            # Found anew: until now a run may have been writing.
            groups = find_garbage(
                store, intermediate=options.intermediate, expired=options.snapshots
            )
            for group in groups:
                for file in group.files:
                    store.delete(file.name)
    lines = [f"{len(g.files):>8,} files {human(g.bytes):>10}  {g.what}" for g in groups]
    total = sum(group.bytes for group in groups)
    deleted = "deleted" if options.delete else "could be deleted: add --delete"
    text = "\n".join([*lines, f"{human(total)} {deleted}" if groups else "There is no garbage."])
    summary = {
        "deleted": options.delete,
        "bytes": total,
        "groups": {g.what: [file.name for file in g.files] for g in groups},
    }
    return 0, summary, text


def run_inspect(options: Namespace) -> Done:
    """``pipeline inspect``: what a data set or an output holds."""
    from pipeline.inspect import inspect
    from pipeline.inspect_text import as_text

    summary = inspect(options.path, options.data, every=options.all, sheet=options.sheet)
    return 0, summary, as_text(summary)


def run_diff(options: Namespace) -> Done:
    """``pipeline diff``: exit code 1 where two data sets differ."""
    from pipeline.diff import as_text, diff

    summary = diff(options.a, options.b, options.data)
    return int(not summary["same"]), summary, as_text(summary)


def run_status(options: Namespace) -> Done:
    """``pipeline status``: with ``--watch`` it is shown anew until nobody runs it."""
    out = open_store(options.path)
    found = status(out)
    while options.watch and found.state == "running":
        print(status_text(found), flush=True)
        time.sleep(WATCH)
        found = status(out)
    return 0, found.summary(), status_text(found)


def run_logs(options: Namespace) -> Done:
    """``pipeline logs``: what all starts of a run have told."""
    lines = list(read_logs(open_store(options.path).below(WORK)))
    return 0, {"lines": lines}, "\n".join(map(as_text, lines))


def run_cancel(options: Namespace) -> Done:
    """``pipeline cancel``: ask a run to stop."""
    found = cancel(open_store(options.path).below(WORK))
    return 0, {"cancelled": vars(found)}, f"Asked to stop: {found}."


def _retried(store: Store, damaged: Iterable[str]) -> list[str] | None:
    """Reasons of the samples that damaged rounds of ``retry`` took up: they are so once more."""
    rounds = {name.partition("/")[0] for name in damaged if RETRY.match(name)}
    reasons: set[str] = set()
    for step in rounds:
        try:
            reasons |= set(Artifact.open(store.below(step)).manifest["retried"])
        except PipelineError:
            return []  # which ones is not known any more: all
    return sorted(reasons) if rounds else None


def _findings(found: Findings) -> str:
    lines = [f"damaged: {name}: {what}" for name, what in found.damaged.items()]
    if found.unlisted:
        lines.append(f"{len(found.unlisted):,} files are listed in no manifest and never read")
    read = f", {found.read:,} read through ({human(found.bytes)})" if found.read else ""
    verdict = f"{len(found.damaged):,} are damaged" if found.damaged else "all are whole"
    return "\n".join([*lines, f"{found.files:,} files looked at{read}: {verdict}"])
