"""A stand-in for the Hugging Face Hub: serves the requests that an upload makes, over HTTP, and injects faults.

It keeps branches as lists of commits, and large files by hash. It refuses what the Hub refuses: no token, a commit of a
large file that was not uploaded, a wrong hash.
"""

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
from urllib.parse import unquote, urlsplit

TOKEN = "hf_stand-in-token-that-nothing-may-write-down"


class Hub:
    """The state of the stand-in, for tests to read."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, list[dict[str, Any]]]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: list[tuple[str, str]] = []
        """(pattern of "METHOD path", fault), each for one request: a status, "cut" (the body is read half, then the
        connection closed) or "mute" (the request is carried out, the connection closed without an answer)."""
        self.lock = threading.Lock()

    def files(self, name: str, branch: str) -> dict[str, bytes]:
        """The content of a branch, by path."""
        files = self.repositories[name][branch][0]["files"]
        return {path: self.large[held] if isinstance(held, str) else held for path, held in files.items()}

    def titles(self, name: str, branch: str) -> list[str]:
        """The titles of a branch's commits, newest first."""
        return [commit["title"] for commit in self.repositories[name][branch]]

    def take_fault(self, request: str) -> str | None:
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if re.fullmatch(fault[0], request):
                    self.faults.remove(fault)
                    return fault[1]
        return None


@contextmanager
def serving() -> Iterator[tuple[Hub, str]]:
    """Run a stand-in; yields its state and its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "refused", **more: str) -> None:
        super().__init__(message)
        self.status, self.code, self.more = status, code, more


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.error_code = ""
        fault = self.hub.take_fault(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length") or 0)
        if fault == "cut":
            self.rfile.read(length // 2)
            self._hang_up()
            return
        body = self.rfile.read(length)
        if fault and fault.isdigit():
            self._answer(int(fault), {"error": "injected"})
            return
        try:
            with self.hub.lock:
                status, answer = 200, self._carry_out(path, body)
        except _Refused as error:
            status, answer = error.status, {"error": str(error), **error.more}
            self.error_code = error.code
        if fault == "mute":
            self._hang_up()
            return
        self._answer(status, answer)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _answer(self, status: int, answer: Any) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status != 200 and self.error_code:
            self.send_header("X-Error-Code", self.error_code)
            self.send_header("X-Error-Message", answer["error"])
        self.end_headers()
        self.wfile.write(body)

    # The interface

    def _carry_out(self, path: str, body: bytes) -> Any:
        if path.startswith("/large/"):  # a signed address of the storage: no token
            return self._store_large(path.rpartition("/")[2], body)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise _Refused(401, message="Invalid username or password.")
        content = json.loads(body) if body and not path.partition("/commit/")[1] else None
        if path == "/api/repos/create":
            return self._create(content)
        if path == "/api/validate-yaml":
            return {}
        if found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            return self._large_batch(found[1], content)
        if re.fullmatch(r"/api/models/[^/]+/[^/]+", path):  # asked for where a repository may not be made
            raise _Refused(404, "RepoNotFound")
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/([^/]+)(?:/.*)?", path)
        assert found, path
        name, verb, revision = found.groups()
        if name not in self.hub.repositories:
            raise _Refused(404, "RepoNotFound")
        if verb != "branch" and revision not in self.hub.repositories[name]:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return getattr(self, f"_{verb}")(self.hub.repositories[name], revision, content if content else body)

    def _create(self, asked: dict[str, Any]) -> Any:
        if asked["organization"] != "lsx":
            raise _Refused(403, message="You don't have the rights to create a model under this namespace")
        name = f"{asked['organization']}/{asked['name']}"
        address = f"http://{self.headers['Host']}/{name}"
        if name in self.hub.repositories:
            raise _Refused(409, message="You already created this model repo", url=address)
        self.hub.private[name] = asked.get("private") is True or asked.get("visibility") == "private"
        first = {"id": "0" * 40, "title": "initial commit", "files": {".gitattributes": b"*.safetensors filter=lfs"}}
        self.hub.repositories[name] = {"main": [first]}
        return {"url": address, "name": name}

    def _commits(self, branches: dict[str, Any], revision: str, _: Any) -> Any:
        made = {"authors": [], "date": "2026-01-01T00:00:00.000Z", "message": ""}
        return [{"id": commit["id"], "title": commit["title"], **made} for commit in branches[revision]]

    def _branch(self, branches: dict[str, Any], revision: str, _: Any) -> Any:
        if revision in branches:
            raise _Refused(409, message="Reference already exists")
        branches[revision] = list(branches["main"])
        return {}

    def _revision(self, branches: dict[str, Any], revision: str, _: Any) -> Any:
        """huggingface_hub before 1.0 asks here how to upload large files: not in chunks (Xet)."""
        return {"id": "lsx/model", "sha": branches[revision][0]["id"], "xetEnabled": False}

    def _tree(self, branches: dict[str, Any], revision: str, _: Any) -> Any:
        files = branches[revision][0]["files"]
        return [{"type": "file", "path": path, "size": 1, "oid": "0" * 40} for path in files]

    def _preupload(self, _branches: dict[str, Any], _revision: str, asked: Any) -> Any:
        modes = {True: "lfs", False: "regular"}
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": modes[file["path"].endswith((".safetensors", ".png"))],
                    "shouldIgnore": False,
                }
                for file in asked["files"]
            ]
        }

    def _large_batch(self, _name: str, asked: dict[str, Any]) -> Any:
        address = f"http://{self.headers['Host']}/large/"
        objects = [
            {**wanted}
            if wanted["oid"] in self.hub.large
            else {**wanted, "actions": {"upload": {"href": address + wanted["oid"]}}}
            for wanted in asked["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def _store_large(self, oid: str, body: bytes) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400, message="the hash differs")
        self.hub.large[oid] = body
        return {}

    def _commit(self, branches: dict[str, Any], revision: str, body: bytes) -> Any:
        header, *operations = (json.loads(line) for line in body.splitlines())
        files = dict(branches[revision][0]["files"])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if len(self.hub.large.get(value["oid"], b"")) != value["size"]:
                    raise _Refused(400, message=f"{value['path']} was not uploaded")
                files[value["path"]] = value["oid"]
            else:
                assert operation["key"] == "deletedFile", operation
                del files[value["path"]]
        number = hashlib.sha1(body).hexdigest()
        commit = {"id": number, "title": header["value"]["summary"], "files": files}
        branches[revision] = [commit, *branches[revision]]
        address = f"http://{self.headers['Host']}{self.path.removeprefix('/api/models')}"
        return {"commitUrl": address, "commitOid": number}
