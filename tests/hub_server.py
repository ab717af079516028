"""A stand-in of the Hub for one process: model repositories in memory, spoken to by the Hub's own client over HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_stand_in"


class Repositories(ThreadingHTTPServer):
    """repositories: name -> {path: bytes}; private: name -> whether it is."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, name: str) -> str:
        """A hash of what the repository holds."""
        files = self.repositories[name]
        return hashlib.sha1(b"".join(key.encode() + files[key] for key in sorted(files))).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: Repositories

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def _answer(self, found: Any, status: int = 200, **headers: str) -> None:
        body = found if isinstance(found, bytes) else json.dumps(found).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(raw)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.server.repositories.setdefault(name, {})
            self.server.private.setdefault(name, asked.get("private") or asked.get("visibility") == "private")
            return self._answer({"url": f"{self.server.address}/{name}", "id": name})
        if self.path == "/api/validate-yaml":
            head = json.loads(raw)["content"].split("---")[1].strip().splitlines()
            wrong = [{"message": f"no YAML: {line}"} for line in head if not re.fullmatch(r"\w+: \S.*", line)]
            return self._answer({"errors": wrong, "warnings": []}, 400 if wrong else 200)
        told = re.match(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", self.path)
        if told is None:
            return self._answer({"error": "Not Found"}, 404)
        name, what = told.groups()
        files = self.server.repositories[name]
        if what == "preupload":
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(raw)["files"]]
            return self._answer({"files": modes})
        for line in map(json.loads, raw.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        commit = self.server.commit(name)
        self._answer({"success": True, "commitOid": commit, "commitUrl": f"{self.server.address}/{name}/commit/{commit}"})

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if told := re.match(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?$", path):
            if told[1] not in self.server.repositories:
                return self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            names = [{"rfilename": name} for name in sorted(self.server.repositories[told[1]])]
            return self._answer({"id": told[1], "sha": self.server.commit(told[1]), "siblings": names})
        if told := re.match(r"/api/models/([^/]+/[^/]+)/tree/[^/]+$", path):
            files = self.server.repositories[told[1]].items()
            return self._answer([{"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()} for n, d in files])
        told = re.match(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)$", path)
        if told is None or told[2] not in self.server.repositories.get(told[1], {}):
            return self._answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        data = self.server.repositories[told[1]][told[2]]
        self._answer(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=self.server.commit(told[1]))

    do_HEAD = do_GET


@contextmanager
def serving() -> Iterator[Repositories]:
    """A stand-in on a free port of this machine."""
    with Repositories() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
