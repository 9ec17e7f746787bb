"""The command line: what it knows, what it refuses, and how it says so."""

import fcntl
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline.cli import main, make_parser
from pipeline.stages.select import in_test


def options(parser):
    """Every option and sub-command of a parser, as one nested mapping."""
    found = {}
    for action in parser._actions:
        if isinstance(action.choices, dict):
            found.update({name: options(sub) for name, sub in action.choices.items()})
        else:
            found["/".join(action.option_strings) or action.dest] = action.dest
    return found


RUN_OPTIONS = {
    "-h/--help": "help",
    "source": "source",
    "--set": "set",
    "--config": "config",
    "--print-config": "print_config",
    "--data": "data",
    "--selection": "selection",
    "--json": "json",
    "--executor": "executor",
    "--address": "address",
    "--workers": "workers",
    "--threads": "threads",
    "--seed": "seed",
    "--max-bad": "max_bad",
    "--resources": "resources",
    "--checkpoint-minutes": "checkpoint_minutes",
    "-v/--verbose": "verbose",
}
DISTILL = {
    **RUN_OPTIONS,
    "--out": "out",
    "--ipc": "ipc",
    "--preset": "preset",
    "--label-budget": "label_budget",
    "--teacher-weights": "teacher_weights",
    "--teacher-backbone": "teacher_backbone",
}
PRUNE = {
    **RUN_OPTIONS,
    "--out": "out",
    "--score": "score",
    "--keep": "keep",
    "--selector": "selector",
    "--dedup": "dedup",
    "--backbone": "backbone",
    "--weights": "weights",
    "--materialize": "materialize",
}
TOKENIZE = {
    **RUN_OPTIONS,
    "--out": "out",
    "--tokenizer": "tokenizer",
    "--views": "views",
    "--size": "size",
    "--tokens": "tokens",
    "--mean-bytes": "mean_bytes",
    "--min-psnr": "min_psnr",
    "--format": "format",
}
TRAIN_TOKENIZER = {
    **RUN_OPTIONS,
    "--out": "out",
    "--preset": "preset",
    "--codebook": "codebook",
}
FEATURES = {
    **RUN_OPTIONS,
    "--out": "out",
    "--preset": "preset",
    "--teacher-weights": "teacher_weights",
    "--teacher-backbone": "teacher_backbone",
    "--encoder": "encoder",
    "--beta": "beta",
    "--budget": "budget",
    "--format": "format",
}
COMPRESS = {
    **RUN_OPTIONS,
    "--out": "out",
    "--preset": "preset",
    "--teacher-weights": "teacher_weights",
    "--teacher-backbone": "teacher_backbone",
    "--k": "k",
    "--m": "m",
    "--d-tilde": "d_tilde",
}
CODEBOOK = {
    **RUN_OPTIONS,
    "--out": "out",
    "--size": "size",
    "--features": "features",
    "--features-weights": "features_weights",
}
CONVERT = {
    **RUN_OPTIONS,
    "out": "out",
    "--format": "format",
    "--shard-mb": "shard_mb",
    "--encode": "encode",
    "--quality": "quality",
    "--shorter": "shorter",
}
OUTPUT = {"-h/--help": "help", "path": "path", "--json": "json"}
SCHEDULE = {"-h/--help": "help", "--file": "file", "--json": "json"}


def test_the_command_line_is_frozen():
    assert options(make_parser()) == {
        "-h/--help": "help",
        "--version": "version",
        "run": {
            "-h/--help": "help",
            "distill": DISTILL,
            "prune": PRUNE,
            "compress-features": FEATURES,
            "compress-model": COMPRESS,
            "codebook": CODEBOOK,
            "tokenize": TOKENIZE,
            "train-tokenizer": TRAIN_TOKENIZER,
        },
        "convert": CONVERT,
        "plan": {
            "-h/--help": "help",
            "distill": {**DISTILL, "--gpu": "gpu"},
            "prune": PRUNE,
            "compress-features": FEATURES,
            "compress-model": COMPRESS,
            "codebook": CODEBOOK,
            "tokenize": TOKENIZE,
            "train-tokenizer": TRAIN_TOKENIZER,
            "convert": CONVERT,
        },
        "status": {**OUTPUT, "--watch": "watch"},
        "logs": OUTPUT,
        "cancel": OUTPUT,
        "inspect": {**OUTPUT, "--all": "all", "--sheet": "sheet", "--data": "data"},
        "diff": {"-h/--help": "help", "a": "a", "b": "b", "--data": "data", "--json": "json"},
        "verify": {**OUTPUT, "--deep": "deep", "--subset": "subset"},
        "repair": {**OUTPUT, "-v/--verbose": "verbose"},
        "retry": {**OUTPUT, "--reason": "reason", "-v/--verbose": "verbose"},
        "gc": {
            **OUTPUT,
            "--delete": "delete",
            "--intermediate": "intermediate",
            "--snapshots": "snapshots",
        },
        "export": {
            "-h/--help": "help",
            "tokenizer": {**OUTPUT, "--out": "out", "--format": "format"},
            "tokens": {**OUTPUT, "--out": "out", "--format": "format", "--split": "split"},
        },
        "schedule": {
            "-h/--help": "help",
            "add": {
                **SCHEDULE,
                "name": "name",
                "--cron": "cron",
                "--run": "run",
                "--timezone": "timezone",
                "--start": "start",
                "--missed": "missed",
                "--overlap": "overlap",
                "--deadline": "deadline",
                "--replace": "replace",
            },
            "remove": {**SCHEDULE, "name": "name"},
            "list": SCHEDULE,
            "tick": {**SCHEDULE, "--only": "only", "--now": "now", "--dry-run": "dry_run"},
            "serve": SCHEDULE,
            "export": {
                **SCHEDULE,
                "name": "name",
                "--to": "to",
                "--image": "image",
                "--out": "out",
            },
        },
    }


def test_every_registered_recipe_has_a_command():
    from pipeline.recipes import recipes

    known = options(make_parser())
    assert {*known["run"], *known} >= set(recipes)


@pytest.mark.parametrize(
    ("text", "value"), [("0", 0), ("25", 25), ("1%", 0.01), ("0.5", 0.5), ("1.0", 1.0)]
)
def test_max_bad_is_a_count_or_a_share(text, value):
    parsed = make_parser().parse_args(["convert", "a", "b", "--max-bad", text]).max_bad
    assert (parsed, type(parsed)) == (value, type(value))


@pytest.mark.parametrize("text", ["101%", "1.5", "-1", "many"])
def test_a_max_bad_that_is_neither_is_refused(text):
    with pytest.raises(SystemExit):
        make_parser().parse_args(["convert", "a", "b", f"--max-bad={text}"])


def test_printed_configuration_reads_back_to_itself(capsys, tmp_path):
    settings = ["--ipc", "3", "--set", "recover.lr=0.1", "--set", "image.flip=true"]
    assert main(["run", "distill", "digits", *settings, "--print-config"]) == 0
    printed = capsys.readouterr().out
    values = yaml.safe_load(printed)
    assert (values["ipc"], values["recover"]["lr"], values["image"]["flip"]) == (3, 0.1, True)
    (tmp_path / "config.yaml").write_text(printed)
    assert main(["run", "distill", "digits", "--config", str(tmp_path / "config.yaml"),
                 "--print-config"]) == 0  # fmt: skip
    assert capsys.readouterr().out == printed


def image_folder(root, counts):
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 255, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


REFUSALS = {
    "unknown data set": (2, "unknown-dataset", "Did you mean 'imagenet-1k'?"),
    "empty folder": (2, "unknown-form", "Accepted are"),
    "data set that is not there": (2, "no-data", "https://www.image-net.org"),
    "class with one image": (1, "small-class", "'lonely' has"),
    "ipc 0": (2, "bad-config", "ipc: Input should be greater than or equal to 1"),
    "unknown setting": (2, "bad-config", "recover.sped"),
    "unwritable output": (2, "unwritable-output", "that you can write"),
    "busy output": (1, "output-busy", "Another run is writing"),
    "missing weights": (2, "bad-weights", "weights"),
    "other weights": (2, "weights-mismatch", "do not fit the network"),
    "unknown network": (2, "unknown-backbone", "Built in: convnet3"),
    "network that is not installed": (2, "missing-provider", "'timm'"),
    "damaged weights": (2, "bad-weights", "safetensors"),
    "bad assignment": (2, "bad-assignment", "--set recover.lr=0.1"),
    "workers without Ray": (2, "bad-executor-option", "--executor ray"),
}


@pytest.fixture
def arguments(request, tmp_path, monkeypatch):
    monkeypatch.delenv("PIPELINE_DATA", raising=False)
    case, out = request.param, ["--out", str(tmp_path / "out")]
    if case == "empty folder":
        (tmp_path / "empty").mkdir()
    if case == "busy output":
        (tmp_path / "out" / ".run").mkdir(parents=True)
        lock = os.open(tmp_path / "out" / ".run" / "lock", os.O_CREAT | os.O_RDWR)
        fcntl.flock(lock, fcntl.LOCK_EX)  # held for as long as this process lives
    if case == "unwritable output":
        (tmp_path / "file").write_text("")
        out = ["--out", str(tmp_path / "file" / "out")]
    if case == "class with one image":
        image_folder(tmp_path / "pets", {"cat": 8, "dog": 8, "lonely": 1})
    np.savez(tmp_path / "other.npz", weight=np.zeros(3))
    (tmp_path / "bad.safetensors").write_bytes(b"bad")
    chosen = {
        "unknown data set": ["imagenet1k"],
        "empty folder": [str(tmp_path / "empty")],
        "data set that is not there": ["imagenet-1k"],
        "class with one image": [str(tmp_path / "pets"), "--ipc", "2"],
        "ipc 0": ["digits", "--ipc", "0"],
        "unknown setting": ["digits", "--set", "recover.sped=1"],
        "missing weights": ["digits", "--teacher-weights", str(tmp_path / "none.npz")],
        "other weights": ["digits", "--teacher-weights", str(tmp_path / "other.npz")],
        "unknown network": ["digits", "--teacher-backbone", "resnet21"],
        "network that is not installed": ["digits", "--teacher-backbone", "timm:resnet18"],
        "damaged weights": ["digits", "--teacher-weights", str(tmp_path / "bad.safetensors")],
        "bad assignment": ["digits", "--set", "lr"],
        "workers without Ray": ["digits", "--workers", "2"],
    }
    return case, [*chosen.get(case, ["digits"]), *out]


@pytest.mark.parametrize("arguments", REFUSALS, indirect=True)
def test_bad_input_is_one_paragraph_with_a_hint(arguments, capsys):
    case, words = arguments
    exit_code, code, part = REFUSALS[case]
    assert main(["run", "distill", *words]) == exit_code
    error = capsys.readouterr().err
    paragraph = error[error.index("pipeline: ") :]
    assert paragraph.count("\n") == 1
    assert paragraph.endswith(f"[{code}]\n")
    assert part in paragraph
    assert "Traceback" not in error


def test_the_installed_command_shows_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "run", "distill", "nothing", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("pipeline: There is no data set named 'nothing'")


def test_a_folder_with_the_name_of_a_known_data_set_is_only_a_folder(tmp_path, capsys):
    root = image_folder(tmp_path / "digits", {"cat": 2, "dog": 2})
    assert main(["run", "distill", str(root), "--print-config"]) == 0
    values = yaml.safe_load(capsys.readouterr().out)
    assert (values["teacher"]["backbone"], values["image"]["channels"]) == ("resnet20", 3)


def test_a_data_set_of_which_nothing_is_held_out_is_refused(tmp_path, capsys):
    root = image_folder(tmp_path / "pets", {"cat": 20, "dog": 20})
    for path in root.rglob("*.png"):
        if in_test(path.relative_to(root).as_posix()):
            path.unlink()
    assert main(["run", "distill", str(root), "--ipc", "2", "--out", str(tmp_path / "out")]) == 1
    assert "[no-samples]" in capsys.readouterr().err


def test_an_image_folder_is_distilled_and_bad_files_are_counted(tmp_path, capsys):
    root = image_folder(tmp_path / "pets", {"cat": 12, "dog": 12})
    (root / "cat" / "broken.png").write_bytes(b"not a picture")
    quick = {
        "image": {"size": 16},
        "teacher": {"backbone": "convnet3", "train": {"epochs": 1}},
        "recover": {"iterations": 2},
        "relabel": {"views": 2},
        "student": {"train": {"epochs": 1}},
        "seeds": 1,
    }
    (tmp_path / "quick.yaml").write_text(yaml.safe_dump(quick))
    words = ["run", "distill", str(root), "--ipc", "2", "--config", str(tmp_path / "quick.yaml")]
    words += ["--out", str(tmp_path / "out"), "--json"]
    assert main(words) == 1
    assert "could not be used" in capsys.readouterr().err
    assert main([*words, "--max-bad", "0.5"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["classes"] == ["cat", "dog"]
