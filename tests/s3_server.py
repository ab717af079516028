"""An S3 server for tests: moto's, in a process of its own on 127.0.0.1, where it is installed."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from diffprune.io.s3_blobs import S3Blobs

SECRET = "made-up-secret-0f3c"  # looked for in what is printed, written and recorded


@contextmanager
def server() -> Iterator[str]:
    """Its endpoint. Skips where moto or boto3 is missing."""
    for module in ("moto", "flask", "boto3"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"no S3 server: {module} is not installed (pip install 'diffprune[dev]')")
    command = [sys.executable, "-c", SERVE]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | keys())
    try:
        assert process.stdout is not None
        port = re.match(r"(\d+)\n", process.stdout.readline())
        assert port, "the S3 server did not start"
        yield f"http://127.0.0.1:{port[1]}"
    finally:
        with process:
            process.kill()


SERVE = """
from werkzeug.serving import make_server
from moto.server import DomainDispatcherApplication, create_backend_app
# One request at a time, or its condition would be no condition.
made = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app))
print(made.port, flush=True)
made.serve_forever()
"""


def keys() -> dict[str, str]:
    """Environment of its clients, but for the endpoint."""
    return {"AWS_ACCESS_KEY_ID": "made-up-key", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}


def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a folder that nobody else uses, in a bucket that is there; this process becomes a client of the server."""
    for name, value in {**keys(), "AWS_ENDPOINT_URL_S3": endpoint}.items():
        monkeypatch.setenv(name, value)
    found = S3Blobs(f"s3://a-bucket/{uuid.uuid4().hex}")
    found.client.create_bucket(Bucket="a-bucket")
    return str(found)
