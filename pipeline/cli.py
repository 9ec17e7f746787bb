"""The command ``pipeline``. Imports nothing heavy before it knows what to do."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from pipeline.errors import PipelineError
from pipeline.options import FLAGS, make_parser

NOTHING_TO_DO = 3
"""Exit code of a plan of a run that is finished."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 run failed, 2 usage."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if not hasattr(arguments, "command"):
        parser.print_help()
        return 0
    try:
        return ACTIONS[arguments.command](arguments)
    except PipelineError as error:
        print(f"pipeline: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        from pipeline.storage.store import storage_error

        print(f"pipeline: {storage_error(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("pipeline: stopped. The same command goes on from here.", file=sys.stderr)
        return 130


def _run(arguments: argparse.Namespace) -> int:
    from pipeline.api import configure, run
    from pipeline.config import dump_yaml
    from pipeline.orchestration.logs import show
    from pipeline.orchestration.progress import on_terminal
    from pipeline.run_text import summary_text

    values = _values(arguments)
    if arguments.print_config:
        print(dump_yaml(configure(arguments.recipe, arguments.source, arguments.data, values)))
        return 0
    show(verbose=arguments.verbose)
    summary = run(**_job(arguments, values), progress=on_terminal())
    print(json.dumps(summary, indent=2) if arguments.json else summary_text(summary))
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from pipeline.api import plan
    from pipeline.run_text import plan_text

    summary = plan(**_job(arguments, _values(arguments)), gpu=getattr(arguments, "gpu", None))
    print(json.dumps(summary, indent=2) if arguments.json else plan_text(summary, arguments))
    return 0 if summary["todo"] else NOTHING_TO_DO


def _values(arguments: argparse.Namespace) -> dict[str, Any]:
    from pipeline.config import merge, parse_assignments, read_yaml

    values = read_yaml(arguments.config) if arguments.config else {}
    short = [
        f"{path}={json.dumps(given)}"
        for flag, path in FLAGS.items()
        if (given := getattr(arguments, flag, None)) is not None
    ]
    return merge(values, parse_assignments([*arguments.set, *short]))


def _job(arguments: argparse.Namespace, values: dict[str, Any]) -> dict[str, Any]:
    """The options of :class:`pipeline.api.Job`."""
    from pipeline.config import parse_assignments

    names = (
        "recipe source data selection out executor address workers threads checkpoint_minutes "
        "seed max_bad"
    )
    given = {name: getattr(arguments, name) for name in names.split()}
    return {**given, "config": values, "resources": parse_assignments(arguments.resources)}


def _command(arguments: argparse.Namespace) -> int:
    from pipeline import commands
    from pipeline.orchestration.logs import show

    show(verbose=getattr(arguments, "verbose", False))
    code, summary, text = getattr(commands, f"run_{arguments.name}")(arguments)
    print(json.dumps(summary, indent=2) if arguments.json else text)
    return int(code)


def _schedule(arguments: argparse.Namespace) -> int:
    from pipeline import schedules
    from pipeline.orchestration.logs import show

    show()
    code, summary, text = getattr(schedules, f"run_{arguments.action}")(arguments)
    if arguments.json or text:
        print(json.dumps(summary, indent=2) if arguments.json else text)
    return int(code)


def _export(arguments: argparse.Namespace) -> int:
    from pipeline import exports

    code, summary, text = getattr(exports, f"run_{arguments.what}")(arguments)
    print(json.dumps(summary, indent=2) if arguments.json else text)
    return int(code)


ACTIONS = {
    "run": _run,
    "plan": _plan,
    "act": _command,
    "export": _export,
    "schedule": _schedule,
}

if __name__ == "__main__":
    sys.exit(main())
