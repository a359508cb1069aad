"""A stand-in for the Hub: a threaded HTTP server on loopback with in-memory repositories.

It answers what huggingface_hub, transformers and datasets call for creating, pushing, branching, tagging, listing and
downloading, with the statuses and headers of the real one. `requests` logs (method, path); `fail(method, pattern,
*statuses)` answers those statuses first.

    with HubDouble() as hub:
        HfApi(endpoint=hub.endpoint, token=hub.token).create_repo("me/model")
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".parquet", ".gz", ".bin", ".arrow", "tokenizer.json")


@dataclass
class Commit:
    """One commit: title and the whole tree (path -> content)."""

    oid: str
    title: str
    files: dict[str, bytes]


@dataclass
class Repository:
    """Commits in order, and what branches and tags point to."""

    kind: str
    name: str
    private: bool
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, title: str, files: dict[str, bytes]) -> Commit:
        """Add a commit to a branch."""
        seed = f"{self.kind} {self.name} {branch} {len(self.commits)} {title}"
        made = Commit(hashlib.sha1(seed.encode()).hexdigest(), title, files)
        self.commits.append(made)
        self.branches[branch] = made.oid
        return made

    def at(self, revision: str) -> Commit | None:
        """The commit of a branch, tag or full oid."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return next((commit for commit in self.commits if commit.oid == oid), None)


class Answer(Exception):
    """Ends the handling of a request."""

    def __init__(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        self.status, self.body, self.headers = status, body, headers or {}


class HubDouble:
    """The server; also the way to put things in and look at what happened."""

    def __init__(self, *, user: str = "me", token: str = "hf_testtokentesttoken", role: str = "write") -> None:
        self.user, self.token, self.role = user, token, role
        #: What whoami says of organisations, and of a token with the role `fineGrained`.
        self.orgs: list[dict[str, str]] = []
        self.scopes: list[dict[str, Any]] = []
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()
        #: Told of "METHOD /path" before a request is handled, and (True) when it was, before the answer goes.
        self.on_request: Callable[[str, bool], None] = lambda request, is_done: None
        self._faults: list[tuple[str, str, list[int]]] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> HubDouble:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, kind: str, name: str, files: dict[str, bytes], *, private: bool = False) -> str:
        """Put a repository (kind `model` or `dataset`) with one commit on main; its commit's oid."""
        repository = Repository(kind, name, private)
        self.repositories[kind, name] = repository
        return repository.commit("main", "initial commit", dict(files)).oid

    def fail(self, method: str, pattern: str, *statuses: int) -> None:
        """Answer the next requests of `method` whose path matches `pattern` with `statuses`, one each."""
        self._faults.append((method, pattern, list(statuses)))

    def fault(self, method: str, path: str) -> int | None:
        """The status to fail this request with."""
        for wanted, pattern, statuses in self._faults:
            if statuses and wanted == method and re.search(pattern, path):
                return statuses.pop(0)
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: HubDouble
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        url = urlsplit(self.path)
        self.url_path, self.query = unquote(url.path), parse_qs(url.query)
        body = self._body()
        with self.hub.lock:
            self.hub.requests.append((self.command, self.url_path))
            told = f"{self.command} {self.url_path}"
            try:
                self.hub.on_request(told, False)
                status = self.hub.fault(self.command, self.url_path)
                if status is not None:
                    raise Answer(status, {"error": f"fault {status}"})
                self._route(body)
                raise Answer(404, {"error": f"the double has no {self.command} {self.url_path}"})
            except Answer as answer:
                self.hub.on_request(told, True)
                with contextlib.suppress(ConnectionError):  # the client may have been killed
                    self._send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def log_message(self, *_: object) -> None:
        """Quiet: `requests` is the log."""

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, answer: Answer) -> None:
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        headers = dict(answer.headers)
        if "Content-Type" not in headers:
            headers["Content-Type"] = (
                "application/octet-stream" if isinstance(answer.body, bytes) else "application/json"
            )
        self.send_response(answer.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # What is asked for, in the order of a push and then of a download.

    def _route(self, body: bytes) -> None:
        path, method = self.url_path, self.command
        routes: list[tuple[str, str, Callable[..., None]]] = [
            ("GET", r"/api/whoami-v2", self._whoami),
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", self._validate_yaml),
            ("PUT", r"/lfs/([0-9a-f]{64})", self._lfs_put),
            ("POST", r"/lfs-verify", self._lfs_verify),
            ("POST", r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._lfs_batch),
            ("POST", r"/api/(model|dataset)s/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
            ("POST", r"/api/(model|dataset)s/([^/]+/[^/]+)/commit/(.+)", self._commit),
            ("POST", r"/api/(model|dataset)s/([^/]+/[^/]+)/branch/(.+)", self._branch),
            ("POST", r"/api/(model|dataset)s/([^/]+/[^/]+)/tag/(.+)", self._tag),
            ("POST", r"/api/(model|dataset)s/([^/]+/[^/]+)/paths-info/([^/]+)", self._paths_info),
            ("GET", r"/api/(model|dataset)s/([^/]+/[^/]+)/refs", self._refs),
            ("GET", r"/api/(model|dataset)s/([^/]+/[^/]+)/commits/(.+)", self._commits),
            ("GET", r"/api/(model|dataset)s/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", self._tree),
            ("GET", r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/revision/(.+))?", self._info),
            ("GET", r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
            ("HEAD", r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
        ]
        for wanted, pattern, handle in routes:
            match = re.fullmatch(pattern, path)
            if wanted == method and match:
                handle(body, *match.groups())

    def _json(self, body: bytes) -> Any:
        # Some clients send JSON of a form-encoded size; an empty body is an empty object.
        return json.loads(body or b"{}")

    def _authenticate(self, *, needed: bool = True) -> bool:
        given = self.headers.get("Authorization")
        if given is None and not needed:
            return False
        if given != f"Bearer {self.hub.token}":
            raise Answer(401, {"error": "Invalid credentials in Authorization header"})
        return True

    def _writable(self) -> None:
        self._authenticate()
        if self.hub.role == "read":
            raise Answer(403, {"error": "token has no write permission"}, {"X-Error-Message": "no write permission"})

    def _repository(self, kind: str, name: str) -> Repository:
        known = self._authenticate(needed=False)
        repository = self.hub.repositories.get((kind, name))
        if repository is None or (repository.private and not known):
            raise Answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return repository

    def _at(self, repository: Repository, revision: str) -> Commit:
        commit = repository.at(revision)
        if commit is None:
            message = f"Invalid rev id: {revision}"
            raise Answer(404, {"error": message}, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": message})
        return commit

    def _whoami(self, _body: bytes) -> None:
        self._authenticate()
        token: dict[str, Any] = {"displayName": "test", "role": self.hub.role}
        if self.hub.role == "fineGrained":
            token["fineGrained"] = {"canReadGatedRepos": True, "global": [], "scoped": self.hub.scopes}
        auth = {"type": "access_token", "accessToken": token}
        raise Answer(200, {"type": "user", "name": self.hub.user, "orgs": self.hub.orgs, "auth": auth})

    def _create(self, body: bytes) -> None:
        self._writable()
        asked = self._json(body)
        name = f"{asked.get('organization') or self.hub.user}/{asked['name']}"
        kind = asked.get("type") or "model"
        url = f"{self.hub.endpoint}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if not name.startswith(f"{self.hub.user}/"):
            raise Answer(403, {"error": "not your namespace"})
        if (kind, name) in self.hub.repositories:
            raise Answer(409, {"error": "You already created this repo", "url": url})
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        repository = Repository(kind, name, private)
        repository.commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.hub.repositories[kind, name] = repository
        raise Answer(200, {"url": url, "name": name, "id": name})

    def _validate_yaml(self, body: bytes) -> None:
        if "license: my-own" in self._json(body)["content"]:
            message = '"license" must be one of [apache-2.0, mit, ...]'
            raise Answer(400, {"error": message, "errors": [{"message": message}], "warnings": []})
        raise Answer(200, {"errors": [], "warnings": []})

    def _preupload(self, body: bytes, kind: str, name: str, revision: str) -> None:
        self._writable()
        commit = self._at(self._repository(kind, name), revision)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
                "oid": _oid(file["path"], commit.files[file["path"]]) if file["path"] in commit.files else None,
            }
            for file in self._json(body)["files"]
        ]
        raise Answer(200, {"files": files})

    def _lfs_batch(self, body: bytes, datasets: str | None, name: str) -> None:
        self._writable()
        self._repository("dataset" if datasets else "model", name)
        objects = []
        for item in self._json(body)["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.lfs:
                answer["actions"] = {
                    "upload": {"href": f"{self.hub.endpoint}/lfs/{item['oid']}", "header": {}},
                    "verify": {"href": f"{self.hub.endpoint}/lfs-verify", "header": {}},
                }
            objects.append(answer)
        content_type = {"Content-Type": "application/vnd.git-lfs+json"}
        raise Answer(200, json.dumps({"transfer": "basic", "objects": objects}).encode(), content_type)

    def _lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Answer(400, {"error": "content does not match its sha256"})
        self.hub.lfs[oid] = body
        raise Answer(200, b"")

    def _lfs_verify(self, body: bytes) -> None:
        asked = self._json(body)
        whole = len(self.hub.lfs.get(asked["oid"], b"")) == asked["size"]
        raise Answer(200 if whole else 404, {"message": "ok" if whole else "unknown object"})

    def _commit(self, body: bytes, kind: str, name: str, branch: str) -> None:
        self._writable()
        repository = self._repository(kind, name)
        if branch not in repository.branches:
            self._at(repository, "a branch that does not exist")
        head = self._at(repository, branch)
        files, title = dict(head.files), ""
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, head.oid):
                    raise Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    raise Answer(400, {"error": f"unknown LFS object {value['oid']}"})
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif item["key"] == "deletedFile":
                files.pop(value["path"], None)
            elif item["key"] == "deletedFolder":
                files = {path: data for path, data in files.items() if not path.startswith(value["path"])}
        made = repository.commit(branch, title, files)
        raise Answer(
            200,
            {
                "success": True,
                "commitOid": made.oid,
                "commitUrl": f"{self.hub.endpoint}/{name}/commit/{made.oid}",
                "hookOutput": "",
            },
        )

    def _branch(self, body: bytes, kind: str, name: str, branch: str) -> None:
        self._writable()
        repository = self._repository(kind, name)
        if branch in repository.branches:
            raise Answer(409, {"error": "Reference already exists"})
        start = self._json(body).get("startingPoint") or "main"
        repository.branches[branch] = self._at(repository, start).oid
        raise Answer(200, {})

    def _tag(self, body: bytes, kind: str, name: str, revision: str) -> None:
        self._writable()
        repository = self._repository(kind, name)
        tag = self._json(body)["tag"]
        if tag in repository.tags:
            raise Answer(409, {"error": "Tag reference exists already"})
        repository.tags[tag] = self._at(repository, revision).oid
        raise Answer(200, {})

    def _refs(self, _body: bytes, kind: str, name: str) -> None:
        repository = self._repository(kind, name)

        def entries(points: dict[str, str], prefix: str) -> list[dict[str, str]]:
            return [{"name": ref, "ref": f"refs/{prefix}/{ref}", "targetCommit": oid} for ref, oid in points.items()]

        raise Answer(
            200,
            {
                "branches": entries(repository.branches, "heads"),
                "tags": entries(repository.tags, "tags"),
                "converts": [],
            },
        )

    def _commits(self, _body: bytes, kind: str, name: str, revision: str) -> None:
        repository = self._repository(kind, name)
        head = self._at(repository, revision)
        upto = repository.commits[: repository.commits.index(head) + 1]
        listed = [
            {"id": commit.oid, "title": commit.title, "message": "", "authors": [], "date": "2025-01-01T00:00:00.000Z"}
            for commit in reversed(upto)
        ]
        raise Answer(200, listed)

    def _info(self, _body: bytes, kind: str, name: str, revision: str | None) -> None:
        repository = self._repository(kind, name)
        commit = self._at(repository, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        raise Answer(
            200,
            {
                "_id": "0" * 24,
                "id": name,
                "modelId": name,
                "author": name.split("/")[0],
                "sha": commit.oid,
                "private": repository.private,
                "gated": False,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "lastModified": "2025-01-01T00:00:00.000Z",
                "createdAt": "2025-01-01T00:00:00.000Z",
                "siblings": siblings,
            },
        )

    def _tree(self, _body: bytes, kind: str, name: str, revision: str, folder: str | None) -> None:
        commit = self._at(self._repository(kind, name), revision)
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        inside = {path: data for path, data in commit.files.items() if path.startswith(prefix)}
        if folder and not inside:
            raise Answer(404, {"error": f"{folder} does not exist"}, {"X-Error-Code": "EntryNotFound"})
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        raise Answer(200, _entries(inside, prefix, recursive=recursive))

    def _paths_info(self, body: bytes, kind: str, name: str, revision: str) -> None:
        commit = self._at(self._repository(kind, name), revision)
        if self.headers.get("Content-Type", "").startswith("application/x-www-form-urlencoded"):
            paths = parse_qs(body.decode()).get("paths", [])
        else:
            paths = self._json(body)["paths"]
        entries = _entries(commit.files, "", recursive=True)
        raise Answer(200, [entry for entry in entries if entry["path"] in [path.strip("/") for path in paths]])

    def _resolve(self, _body: bytes, datasets: str | None, name: str, revision: str, path: str) -> None:
        repository = self._repository("dataset" if datasets else "model", name)
        commit = self._at(repository, revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            message = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            raise Answer(404, {"error": "Entry not found"}, headers | message)
        data = commit.files[path]
        oid = _oid(path, data)
        headers |= {
            "ETag": f'"{oid}"',
            "X-Linked-Etag": f'"{oid}"',
            "X-Linked-Size": str(len(data)),
            "Accept-Ranges": "bytes",
        }
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and self.command == "GET":
            first, last = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
            if first >= len(data):
                raise Answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            raise Answer(206, data[first : last + 1], headers)
        raise Answer(200, data, headers)


def _oid(path: str, data: bytes) -> str:
    """As git (regular files) or LFS (sha256) names a content."""
    if path.endswith(LFS_SUFFIXES):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entries(files: dict[str, bytes], prefix: str, *, recursive: bool) -> list[dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = {}
    for path, data in sorted(files.items()):
        rest = path[len(prefix) :].split("/")
        for depth in range(1, len(rest) if recursive else min(2, len(rest))):
            folder = prefix + "/".join(rest[:depth])
            entries[folder] = {
                "type": "directory",
                "oid": hashlib.sha1(folder.encode()).hexdigest(),
                "size": 0,
                "path": folder,
            }
        if recursive or len(rest) == 1:
            oid = _oid(path, data)
            entry: dict[str, Any] = {"type": "file", "oid": oid[:40], "size": len(data), "path": path}
            if len(oid) == 64:
                entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
            entries[path] = entry
    return list(entries.values())
