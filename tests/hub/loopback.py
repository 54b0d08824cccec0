"""A Hub on 127.0.0.1: a real HTTP server that speaks as much of the Hub's API as a push and a
download need, with its repositories in memory."""

from __future__ import annotations

import base64
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub.loopback_faults import Fault
from hub.loopback_store import Entry, Refused, Repo, Store
from hub.loopback_yaml import validate

WRITER = "token-that-writes"
READER = "token-that-reads"
_USERS = {WRITER: "me", READER: "reader"}
_LARGE = (".safetensors", ".bin", ".png", ".pt", ".gguf")
_LARGE_BYTES = 10 * 2**20
_DATE = "2026-01-01T00:00:00.000Z"
_REPO = r"(?P<repo>[^/]+/[^/]+)"


class LoopbackHub:
    """`store`: what it holds. `requests`: `METHOD path` of everything asked. `faults`: to come."""

    def __init__(self) -> None:
        self.store = Store()
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.url = ""

    def repo(self, name: str) -> Repo:
        return self.store.repos[name]

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, request)) for request in self.requests)

    def fault_for(self, request: str) -> Fault | None:
        with self.store.lock:
            self.requests.append(request)
            return next((fault for fault in self.faults if fault.strikes(request)), None)


@contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    hub = LoopbackHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        fault = self.hub.fault_for(f"{self.command} {unquote(parts.path)}")
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.status is None and not fault.done:
            self.rfile.read(min(fault.cut_after, length))
            self._cut()
            return
        self.body = self._read(length)
        if fault is not None and not fault.done:
            self._answer(fault.status or 500, {"error": "a fault"}, fault.headers)
            return
        status, content, headers = self._work(parts.path)
        if fault is None:
            self._answer(status, content, headers)
        elif fault.status is None:
            self._cut()
        else:
            self._answer(fault.status, {"error": "a fault"}, fault.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

    def _read(self, length: int) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(length)
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _work(self, path: str) -> tuple[int, Any, dict[str, str]]:
        try:
            with self.hub.store.lock:
                for pattern, action in _ROUTES:
                    if found := re.fullmatch(pattern, f"{self.command} {path}"):
                        values = {name: unquote(text) for name, text in found.groupdict().items()}
                        return action(self, **values)
            raise Refused(404, "Not found")
        except Refused as refused:
            headers = {"X-Error-Message": refused.message}
            if refused.code:
                headers["X-Error-Code"] = refused.code
            return refused.status, {"error": refused.message}, headers

    def _answer(self, status: int, content: Any, headers: Any) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _cut(self) -> None:
        # Zero linger: the client is told at once that the connection is gone.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RD)
        self.connection.close()

    @property
    def user(self) -> str | None:
        return _USERS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def writer(self) -> str:
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        if self.user != "me":
            raise Refused(403, "You don't have the rights to do this")
        return self.user

    def json(self) -> dict[str, Any]:
        return json.loads(self.body)


Answer = tuple[int, Any, dict[str, str]]


def _ok(content: Any) -> Answer:
    return 200, content, {"Content-Type": "application/json"}


def _whoami(request: _Handler) -> Answer:
    if request.user is None:
        raise Refused(401, "Invalid username or password.")
    return _ok({"name": request.user, "type": "user", "orgs": []})


def _create(request: _Handler) -> Answer:
    wanted = request.json()
    name = f"{wanted.get('organization') or request.writer()}/{wanted['name']}"
    request.writer()
    try:
        request.hub.store.create(name, wanted.get("visibility") == "private")
    except Refused as refused:
        return 409, {"error": refused.message, "url": f"{request.hub.url}/{name}"}, {}
    return _ok({"url": f"{request.hub.url}/{name}", "name": name, "id": "0"})


def _validate(request: _Handler) -> Answer:
    errors = validate(request.json()["content"])
    answer = {"errors": [{"message": error} for error in errors], "warnings": []}
    return (400 if errors else 200), answer, {}


def _info(request: _Handler, repo: str, revision: str = "main") -> Answer:
    found = request.hub.store.repo(repo, request.user)
    tree = found.tree(revision)
    siblings = [{"rfilename": path} for path in sorted(tree)]
    ids = {"id": repo, "modelId": repo, "sha": found.oid(revision), "private": found.private}
    rest = {"gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
    return _ok({**ids, **rest, "lastModified": _DATE, "createdAt": _DATE, "siblings": siblings})


def _refs(request: _Handler, repo: str) -> Answer:
    refs = request.hub.store.repo(repo, request.user).refs
    pulls = {ref: oid for ref, oid in refs.items() if ref.startswith("refs/pr/")}
    branches = {f"refs/heads/{ref}": oid for ref, oid in refs.items() if ref not in pulls}
    rows = [
        [{"name": r.rpartition("/")[2], "ref": r, "targetCommit": o} for r, o in part.items()]
        for part in (branches, pulls)
    ]
    return _ok({"branches": rows[0], "converts": [], "tags": [], "pullRequests": rows[1]})


def _branch(request: _Handler, repo: str, branch: str) -> Answer:
    request.writer()
    start = json.loads(request.body or b"{}").get("startingPoint")
    request.hub.store.repo(repo, request.user).branch(branch, start)
    return _ok({})


def _drop_branch(request: _Handler, repo: str, branch: str) -> Answer:
    request.writer()
    request.hub.store.repo(repo, request.user).refs.pop(branch)
    return _ok({})


def _preupload(request: _Handler, repo: str, revision: str) -> Answer:
    request.writer()
    tree = request.hub.store.repo(repo, request.user).tree(revision)
    answers = []
    for file in request.json()["files"]:
        large = file["path"].endswith(_LARGE) or file["size"] > _LARGE_BYTES
        there = tree.get(file["path"])
        answers.append(
            {
                "path": file["path"],
                "uploadMode": "lfs" if large else "regular",
                "shouldIgnore": _is_ignored(request, tree, file["path"]),
                "oid": there.etag if there else None,
            }
        )
    return _ok({"files": answers})


def _is_ignored(request: _Handler, tree: dict[str, Entry], path: str) -> bool:
    own = tree[".gitignore"].content.decode() if ".gitignore" in tree else ""
    rules = request.json().get("gitIgnore") or own
    return any(line and path.endswith(line.lstrip("*")) for line in rules.split("\n"))


def _tree(request: _Handler, repo: str, revision: str, path: str = "") -> Answer:
    tree = request.hub.store.repo(repo, request.user).tree(revision)
    inside = {name: e for name, e in tree.items() if not path or name.startswith(f"{path}/")}
    if path and not inside:
        raise Refused(404, f"{path} does not exist", "EntryNotFound")
    return _ok([_listed(name, entry) for name, entry in sorted(inside.items())])


def _listed(path: str, entry: Entry) -> dict[str, Any]:
    row = {"type": "file", "path": path, "oid": entry.blob_id, "size": len(entry.content)}
    if entry.sha256:
        large = {"oid": entry.sha256, "size": len(entry.content), "pointerSize": 130}
        return {**row, "lfs": large}
    return row


def _batch(request: _Handler, repo: str) -> Answer:
    request.writer()
    large = request.hub.store.repo(repo, request.user).large
    objects = []
    for wanted in request.json()["objects"]:
        answer = {**wanted, "authenticated": True}
        if wanted["oid"] not in large:
            home = f"{request.hub.url}/large/{repo}"
            answer["actions"] = {
                "upload": {"href": f"{home}/{wanted['oid']}", "header": {}},
                "verify": {"href": f"{home}/verify", "header": {}},
            }
        objects.append(answer)
    return _ok({"transfer": "basic", "objects": objects})


def _put(request: _Handler, repo: str, oid: str) -> Answer:
    request.hub.repo(repo).large[oid] = request.body
    return _ok({})


def _verify(request: _Handler, repo: str) -> Answer:
    wanted = request.json()
    if len(request.hub.repo(repo).large.get(wanted["oid"], b"")) != wanted["size"]:
        raise Refused(422, "the file is not whole")
    return _ok({})


def _commit(request: _Handler, repo: str, revision: str) -> Answer:
    lines = [json.loads(line) for line in request.body.splitlines()]
    for line in lines:
        if line["key"] == "file":
            line["value"]["content"] = base64.b64decode(line["value"]["content"])
    create_pr = "create_pr" in request.query
    if not create_pr:
        request.writer()
    made = request.hub.store.repo(repo, request.user).commit(revision, lines, create_pr)
    home = f"{request.hub.url}/{repo}"
    answer = {"success": True, "commitOid": made["oid"], "hookOutput": "", "pullRequestUrl": None}
    if create_pr:
        answer["pullRequestUrl"] = f"{home}/discussions/{made['ref'].rpartition('/')[2]}"
    return _ok({**answer, "commitUrl": f"{home}/commit/{made['oid']}"})


def _resolve(request: _Handler, repo: str, revision: str, path: str) -> Answer:
    found = request.hub.store.repo(repo, request.user)
    commit = {"X-Repo-Commit": found.oid(revision)}
    entry = found.tree(revision).get(path)
    if entry is None:
        return 404, {"error": "Entry not found"}, {**commit, "X-Error-Code": "EntryNotFound"}
    size = str(len(entry.content))
    headers = {**commit, "ETag": f'"{entry.etag}"', "Content-Length": size}
    if entry.sha256:
        # The Hub sends the client on to its storage; here the storage is this server.
        headers |= {"X-Linked-Size": size, "X-Linked-ETag": f'"{entry.etag}"'}
    return 200, entry.content, headers


_MODEL = rf"/api/models/{_REPO}"
_ROUTES: list[tuple[str, Callable[..., Answer]]] = [
    (r"GET /api/whoami-v2", _whoami),
    (r"POST /api/repos/create", _create),
    (r"POST /api/validate-yaml", _validate),
    (rf"GET {_MODEL}/revision/(?P<revision>[^/]+)", _info),
    (rf"GET {_MODEL}/refs", _refs),
    (rf"GET {_MODEL}/tree/(?P<revision>[^/]+)", _tree),
    (rf"GET {_MODEL}/tree/(?P<revision>[^/]+)/(?P<path>.+)", _tree),
    (rf"GET {_MODEL}", _info),
    (rf"POST {_MODEL}/branch/(?P<branch>[^/]+)", _branch),
    (rf"DELETE {_MODEL}/branch/(?P<branch>[^/]+)", _drop_branch),
    (rf"POST {_MODEL}/preupload/(?P<revision>[^/]+)", _preupload),
    (rf"POST {_MODEL}/commit/(?P<revision>[^/]+)", _commit),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _batch),
    (rf"PUT /large/{_REPO}/(?P<oid>\w+)", _put),
    (rf"POST /large/{_REPO}/verify", _verify),
    (rf"(GET|HEAD) /{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _resolve),
]
