"""Servers of Google's and Azure's kind for tests: the few requests that blobs are made of, as their documentation has them.

`azurite` is Azure's own emulator, where it is installed (`npm install -g azurite`). No emulator of Google's XML interface that
knows the condition of a put could be had as a package.
"""

from __future__ import annotations

import base64
import hmac
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

from diffprune.io.object_blobs import ObjectBlobs

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # of every Azurite, published
SECRET = "made-up-token-77aa"
PIECE = 2**16
LOST = 0  # in place of a status: the request takes effect, and its answer is that the server failed
DATE = "Sat, 28 Nov 2026 12:00:00 GMT"


class Server(ThreadingHTTPServer):
    """`objects` [name: (tag, bytes)] of one bucket `a-bucket`; `answers`: statuses with which the next requests are answered."""

    daemon_threads = True

    def __init__(self, kind: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.kind, self.lock = kind, threading.Lock()
        self.objects: dict[str, tuple[str, bytes]] = {}
        self.answers: list[int] = []
        self.requests: list[str] = []
        self.pause_s = 0.0  # before each 64 KiB of a body, read or written


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server
    protocol_version = "HTTP/1.1"
    lost = False

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal."""

    def do(self) -> None:
        """Any verb."""
        left, body = int(self.headers.get("Content-Length") or 0), b""
        while left > len(body) and (piece := self.rfile.read(min(PIECE, left - len(body)))):
            body += piece
            time.sleep(self.server.pause_s * len(piece) / PIECE)
        if len(body) < left:
            return None  # given up
        url = urlsplit(self.path)
        path, asked = unquote(url.path).strip("/"), parse_qs(url.query)
        with self.server.lock:
            self.server.requests.append(f"{self.command} {self.path}")
            told = self.server.answers.pop(0) if self.server.answers else None
            if told:
                return self.answer(told)
            self.lost = told == LOST
            if self.server.kind == "az":
                path = path.removeprefix(f"{ACCOUNT}/")
            bucket, _, name = path.partition("/")
            if bucket != "a-bucket":
                return self.answer(404, self.fault("NoSuchBucket", "ContainerNotFound"))
            if self.command == "POST":
                return self.post_batch(body.decode())
            if not name:
                return self.answer(200, self.listing(asked.get("prefix", [""])[0]))
            getattr(self, f"{self.command.lower()}_object")(name, body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do

    def put_object(self, name: str, body: bytes) -> None:
        """Written, or refused where the condition does not hold."""
        new = self.headers.get("x-goog-if-generation-match") == "0" or self.headers.get("If-None-Match") == "*"
        if new and name in self.server.objects:
            return self.answer(412 if self.server.kind == "gs" else 409, self.fault("PreconditionFailed", "BlobAlreadyExists"))
        self.server.objects[name] = (f'"{uuid.uuid4().hex}"', body)
        return self.answer(200 if self.server.kind == "gs" else 201, tag=self.server.objects[name][0])

    def get_object(self, name: str, _: bytes) -> None:
        """The whole object."""
        if name not in self.server.objects:
            return self.answer(404, self.fault("NoSuchKey", "BlobNotFound"))
        tag, data = self.server.objects[name]
        return self.answer(200, data, tag)

    head_object = get_object

    def delete_object(self, name: str, _: bytes) -> None:
        """Gone."""
        if self.server.objects.pop(name, None) is None:
            return self.answer(404, self.fault("NoSuchKey", "BlobNotFound"))
        return self.answer(204 if self.server.kind == "gs" else 202)

    def post_batch(self, body: str) -> None:
        """Azure's way of deleting: requests in the parts of one."""
        answers = []
        for part, url in re.findall(r"Content-ID: (\d+).*?DELETE (\S+) HTTP", body, re.DOTALL):
            name = unquote(url).strip("/").removeprefix(f"{ACCOUNT}/").partition("/")[2]
            status = "404 Not Found" if self.server.objects.pop(name, None) is None else "202 Accepted"
            answers.append(f"--batch\r\nContent-Type: application/http\r\nContent-ID: {part}\r\n\r\nHTTP/1.1 {status}\r\n\r\n\r\n")
        return self.answer(202, ("".join(answers) + "--batch--\r\n").encode(), kind="multipart/mixed; boundary=batch")

    def fault(self, google: str, azure: str) -> bytes:
        """The body of a fault."""
        code = google if self.server.kind == "gs" else azure
        return f'<?xml version="1.0" encoding="utf-8"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'.encode()

    def listing(self, prefix: str) -> bytes:
        """All objects under a prefix, in one page."""
        found = [(escape(name), *self.server.objects[name]) for name in sorted(self.server.objects) if name.startswith(prefix)]
        if self.server.kind == "gs":
            rows = "".join(
                f"<Contents><Key>{name}</Key><LastModified>2026-11-28T12:00:00.000Z</LastModified><ETag>{escape(tag)}</ETag>"
                f"<Size>{len(data)}</Size></Contents>"
                for name, tag, data in found
            )
            return f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>".encode()
        rows = "".join(
            f"<Blob><Name>{name}</Name><Properties><Last-Modified>{DATE}</Last-Modified><Content-Length>{len(data)}</Content-Length>"
            f"<Content-Type>application/octet-stream</Content-Type><Etag>{tag[1:-1]}</Etag></Properties></Blob>"
            for name, tag, data in found  # tags without their quotes, as Azure lists them
        )
        return f"<EnumerationResults><Blobs>{rows}</Blobs><NextMarker /></EnumerationResults>".encode()

    def answer(self, status: int, data: bytes = b"", tag: str = "", kind: str = "application/xml") -> None:
        """One response."""
        self.send_response(500 if self.lost else status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", kind)
        self.send_header("Last-Modified", DATE)
        if tag:
            self.send_header("ETag", tag)
            self.send_header("x-goog-generation", "1")
        self.end_headers()
        with suppress(OSError):  # given up
            for start in range(0, len(data) if self.command != "HEAD" else 0, PIECE):
                self.wfile.write(data[start : start + PIECE])
                time.sleep(self.server.pause_s)


@contextmanager
def serving(kind: str) -> Iterator[Server]:
    """One of the two, in threads of this process."""
    pytest.importorskip("obstore", reason="obstore is not installed (pip install 'diffprune[dev]')")
    with Server(kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@contextmanager
def azurite(folder: Path) -> Iterator[str]:
    """The endpoint of Azure's emulator."""
    pytest.importorskip("obstore", reason="obstore is not installed (pip install 'diffprune[dev]')")
    if not (command := shutil.which("azurite-blob")):
        pytest.skip("azurite is not installed (npm install -g azurite)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--silent", "--location", str(folder), "--blobPort", str(port), "--skipApiVersionCheck", "--disableTelemetry"]
    process = subprocess.Popen([command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with socket.socket() as there:
                if not there.connect_ex(("127.0.0.1", port)):
                    break
            time.sleep(0.1)
        make_container(port)
        yield f"http://127.0.0.1:{port}/{ACCOUNT}"
    finally:
        with process:
            process.terminate()


def make_container(port: int) -> None:
    """`a-bucket`, by a signed request, as obstore makes none."""
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
    headers = {"x-ms-date": date, "x-ms-version": "2021-12-02", "Content-Length": "0"}
    named = f"x-ms-date:{date}\nx-ms-version:2021-12-02\n/{ACCOUNT}/{ACCOUNT}/a-bucket\nrestype:container"
    told = "PUT" + "\n" * 12 + named
    mark = base64.b64encode(hmac.new(base64.b64decode(KEY), told.encode(), "sha256").digest()).decode()
    address = f"http://127.0.0.1:{port}/{ACCOUNT}/a-bucket?restype=container"
    asked = urllib.request.Request(address, method="PUT", headers=headers | {"Authorization": f"SharedKey {ACCOUNT}:{mark}"})
    with urllib.request.urlopen(asked, timeout=10) as made:
        assert made.status == 201


def place(kind: str, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a folder that nobody else uses; this process becomes a client of the server."""
    settings = {"GOOGLE_BASE_URL": endpoint, "GOOGLE_BEARER_TOKEN": SECRET}
    if kind == "az":
        settings = {f"AZURE_STORAGE_{name}": value for name, value in {**account(), "ENDPOINT": endpoint}.items()}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return str(ObjectBlobs(f"{kind}://a-bucket/{uuid.uuid4().hex}"))


def account() -> dict[str, str]:
    """Credentials for the emulator."""
    return {"ACCOUNT_NAME": ACCOUNT, "ACCOUNT_KEY": KEY}
