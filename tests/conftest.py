import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import unheld
from hypothesis import settings

from pipeline.storage.object_store import ObjectStore

# Machines are shared: how long an example takes says nothing.
settings.register_profile("pipeline", deadline=None)
settings.load_profile("pipeline")

# Ray gives its workers a low priority: beside the tests of another process they would hardly run.
os.environ.setdefault("RAY_worker_niceness", "0")

TINY = {
    "teacher": {"train": {"epochs": 4}},
    "recover": {"iterations": 12, "batch_size": 5},
    "relabel": {"views": 3},
    "student": {"train": {"epochs": 3, "batch_size": 10}},
    "seeds": 2,
    "arms": ["distilled-soft", "random-real-soft", "noise-soft"],
}
"""A distillation of the digits that has every step and takes seconds."""


@pytest.fixture(scope="module")
def without_hold_and_patience() -> Iterator[None]:
    """What is published is right without a hold on the output, and faults are met at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.orchestration.run.hold", unheld)
        patch.setattr("pipeline.orchestration.executor.PAUSES", ())
        yield


@pytest.fixture
def real_data() -> Path:
    """The folder of real image data; without it the test is left out."""
    if "PIPELINE_DATA" not in os.environ:
        pytest.skip("PIPELINE_DATA names no folder of real data")
    return Path(os.environ["PIPELINE_DATA"])


@pytest.fixture(scope="session")
def s3_bucket() -> Iterator[str]:
    """A bucket of an S3 server in this process; the environment leads other processes there."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    host, port = server.get_host_and_port()
    values = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        import fsspec

        fsspec.filesystem("s3", use_listings_cache=False).mkdir("bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture
def s3(s3_bucket: str) -> ObjectStore:
    """A prefix that no other test has."""
    return ObjectStore(f"{s3_bucket}/{uuid.uuid4().hex}")
