"""A head's Jobs API without Ray: an HTTP server that keeps packages, runs what it is sent as plain processes, and remembers all."""

from __future__ import annotations

import io
import json
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TOKEN = "t0ken" * 12


def echoed(entrypoint: str) -> str:
    """Instead of the verb, which takes its time, a line that says it."""
    return f"echo ran: {entrypoint}" if "-m diffprune" in entrypoint else entrypoint


@dataclass
class FakeHead:
    """place: for unpacked packages and logs. shell: what is run for an entrypoint. requests: (method, path) of every call."""

    place: Path
    shell: Callable[[str], str] = echoed
    packages: dict[str, bytes] = field(default_factory=dict)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    stopped: set[str] = field(default_factory=set)
    requests: list[tuple[str, str]] = field(default_factory=list)
    before_job: Callable[[dict[str, Any]], None] = lambda job: None

    def __enter__(self) -> FakeHead:
        head = self

        class Handler(BaseHTTPRequestHandler):
            def do(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                head.requests.append((self.command, self.path))
                known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
                status, answer = head.answer(self.command, self.path, body) if known else (403, "no")
                data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = do_DELETE = do

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/api/version":
            return 200, {"ray_version": "2.60.0", "version": "4"}
        if path.startswith("/api/packages/gcs/"):
            name = path.rpartition("/")[2]
            if method == "PUT":
                self.packages[name] = body
            return (200, {}) if name in self.packages else (404, "no such package")
        if (method, path) == ("POST", "/api/jobs/"):
            return self.start(json.loads(body))
        if path == "/api/jobs/":
            return 200, [self.details(name) for name in self.jobs]
        name, _, what = path.removeprefix("/api/jobs/").partition("/")
        if name not in self.jobs or what == "logs/tail":
            return 404, "not here"
        if method == "DELETE":
            if self.processes[name].poll() is None:
                return 500, f"RuntimeError: Attempted to delete job '{name}', but it is in a non-terminal state RUNNING."
            return 200, {"deleted": bool(self.jobs.pop(name))}
        if what == "logs":
            return 200, {"logs": (self.place / f"{name}.log").read_text()}
        if what == "stop":
            self.stopped.add(name)
            self.processes[name].kill()
            return 200, {"stopped": True}
        return 200, self.details(name)

    def start(self, job: dict[str, Any]) -> tuple[int, Any]:
        self.before_job(job)
        name = job["submission_id"]
        if name in self.jobs:
            return (
                500,
                f"Traceback\nValueError: Job with submission_id {name} already exists. Please use a different submission_id.",
            )
        folder = self.place / name
        folder.mkdir()
        if working_dir := job["runtime_env"].get("working_dir"):
            zipfile.ZipFile(io.BytesIO(self.packages[working_dir.removeprefix("gcs://")])).extractall(folder)
        self.jobs[name] = job | {"start": time.time()}
        with open(self.place / f"{name}.log", "wb") as log:
            self.processes[name] = subprocess.Popen(self.shell(job["entrypoint"]), shell=True, cwd=folder, stdout=log, stderr=log)
        return 200, {"job_id": name, "submission_id": name}

    def details(self, name: str) -> dict[str, Any]:
        job, code = self.jobs[name], self.processes[name].poll()
        status = "RUNNING" if code is None else "STOPPED" if name in self.stopped else "FAILED" if code else "SUCCEEDED"
        return {
            "type": "SUBMISSION",
            "submission_id": name,
            "status": status,
            "entrypoint": job["entrypoint"],
            "message": f"exit code {code}",
            "start_time": int(job["start"] * 1000),
            "metadata": job["metadata"],
            "runtime_env": job["runtime_env"],
            "driver_exit_code": code,
        }
