"""A Hub on this machine: as much of the real one's protocol as `huggingface_hub` needs to read and to write.

Repositories are in memory. Weights go through LFS, all else through commits, as on the real Hub; there is no Xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


TOKEN = "hf_of_this_machine"
USER = "me"
LFS_SUFFIXES = (".safetensors", ".bin")

Files = dict[str, bytes]


class HubError(Exception):
    """An answer that is an error, with the code by which the client tells one from another."""

    def __init__(self, status: HTTPStatus, code: str, message: str):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


@dataclass
class Repository:
    """Commits with all their files, and the branches and tags that point to them."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit("main", {})

    def commit(self, branch: str, files: Files) -> str:
        content = repr((len(self.commits), sorted(files.items()))).encode()
        commit = hashlib.sha1(content).hexdigest()
        self.commits[commit] = files
        self.refs[branch] = commit
        return commit

    def resolve(self, revision: str) -> str:
        commit = self.refs.get(revision, revision)
        if commit not in self.commits:
            raise HubError(HTTPStatus.NOT_FOUND, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def files(self, revision: str = "main") -> Files:
        return self.commits[self.resolve(revision)]


@dataclass(frozen=True)
class Request:
    """What came in."""

    method: str
    path: str
    range: str | None
    status: int


def downloads(requests: list[Request], repo_id: str) -> list[str]:
    """The files of a repository whose content was sent, named once for every time."""
    pattern = re.compile(rf"/{re.escape(repo_id)}/resolve/[^/]+/(.+)")
    return [
        unquote(match[1])
        for request in requests
        if request.method == "GET" and request.status < 300 and (match := pattern.fullmatch(request.path))
    ]


class LocalHub:
    """
    The server's state, for tests to fill and to look into.

    Attributes:
        repositories (`dict[str, Repository]`): By id.
        requests (`list[Request]`): All that were answered, in order.
        breaks (`dict[str, int]`): Path of a file in a repository -> bytes after which its next download breaks off.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.breaks: dict[str, int] = {}
        self.objects: dict[str, bytes] = {}
        self.endpoint = ""

    def add(self, repo_id: str, folder: Path, branch: str = "main", **settings: bool) -> str:
        """Commit a folder, and return the commit's hash."""
        files = {
            str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()
        }
        return self.repositories.setdefault(repo_id, Repository(**settings)).commit(branch, files)

    @contextmanager
    def running(self) -> Iterator[LocalHub]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (HubHandler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class HubHandler(BaseHTTPRequestHandler):
    """One connection; `ROUTES` says which method answers what."""

    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, *args: Any) -> None:
        """Nothing: `requests` has them all."""

    def answer(self) -> None:
        path = urlsplit(self.path).path
        self.body = self.read_body()
        try:
            for method, pattern, respond in ROUTES:
                if method == self.command and (match := re.fullmatch(pattern, path)):
                    respond(self, **{name: unquote(value) for name, value in match.groupdict("").items()})
                    return
            raise HubError(HTTPStatus.NOT_IMPLEMENTED, "NotImplemented", f"{self.command} {path}")
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            self.send_json({"error": error.message}, error.status, headers)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send(
        self, content: bytes, headers: dict[str, str], status: int = HTTPStatus.OK, end: int | None = None
    ) -> None:
        """An answer, of which only the bytes before `end` leave the machine."""
        path = urlsplit(self.path).path
        self.hub.requests.append(Request(self.command, path, self.headers.get("Range"), int(status)))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:end])
        if end is not None:
            self.close_connection = True

    def send_json(self, content: Any, status: int = HTTPStatus.OK, headers: dict[str, str] | None = None) -> None:
        self.send(json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})}, status)

    @property
    def is_user(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def require_user(self) -> None:
        if not self.is_user:
            raise HubError(HTTPStatus.UNAUTHORIZED, "RepoNotFound", "Invalid username or password.")

    def repository(self, repo: str) -> Repository:
        """A repository that the client may see. The real Hub does not tell strangers that a private one exists."""
        found = self.hub.repositories.get(repo)
        if found is None or found.private:
            self.require_user()
        if found is None:
            raise HubError(HTTPStatus.NOT_FOUND, "RepoNotFound", "Repository not found")
        return found

    def info(self, repo: str, revision: str) -> None:
        found = self.repository(repo)
        commit = found.resolve(revision or "main")
        siblings = [{"rfilename": name} for name in found.commits[commit]]
        self.send_json({"id": repo, "sha": commit, "private": found.private, "tags": [], "siblings": siblings})

    def tree(self, repo: str, revision: str, folder: str) -> None:
        files = self.repository(repo).files(revision)
        found = [described(name, content) for name, content in files.items() if name.startswith(folder)]
        if not found:
            raise HubError(HTTPStatus.NOT_FOUND, "EntryNotFound", f"{folder} does not exist on {revision}")
        self.send_json(found)

    def paths_info(self, repo: str, revision: str) -> None:
        files = self.repository(repo).files(revision)
        asked = json.loads(self.body)["paths"]
        self.send_json([described(name, files[name]) for name in asked if name in files])

    def file(self, repo: str, revision: str, name: str) -> None:
        found = self.repository(repo)
        if found.gated and not self.is_user:
            raise HubError(HTTPStatus.UNAUTHORIZED, "GatedRepo", f"Access to model {repo} is restricted.")
        commit = found.resolve(revision)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if name not in found.commits[commit]:
            missing = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", **headers}
            self.send_json({"error": "Entry not found"}, HTTPStatus.NOT_FOUND, missing)
            return
        content = found.commits[commit][name]
        facts = described(name, content)
        headers["ETag"] = f'"{facts["oid"]}"'
        if "lfs" in facts:
            headers |= {"X-Linked-ETag": f'"{facts["lfs"]["oid"]}"', "X-Linked-Size": str(len(content))}
        status = HTTPStatus.OK
        if (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))) is not None:
            start, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{last}/{len(content)}"
            content, status = content[start : last + 1], HTTPStatus.PARTIAL_CONTENT
        end = self.hub.breaks.pop(f"{repo}/{name}", None) if self.command == "GET" else None
        self.send(content, headers, status, end)

    def whoami(self) -> None:
        self.require_user()
        self.send_json({"name": USER, "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def validate_yaml(self) -> None:
        self.send_json({"errors": [], "warnings": []})

    def create_repository(self) -> None:
        self.require_user()
        asked = json.loads(self.body)
        repo = f"{asked['organization'] or USER}/{asked['name']}"
        url = f"{self.hub.endpoint}/{repo}"
        if repo in self.hub.repositories:
            self.send_json({"url": url, "error": "You already created this model repo"}, HTTPStatus.CONFLICT)
            return
        self.hub.repositories[repo] = Repository(private=asked.get("visibility") == "private")
        self.send_json({"url": url, "name": repo})

    def create_branch(self, repo: str, revision: str) -> None:
        self.add_ref(repo, revision, json.loads(self.body).get("startingPoint", "main"))

    def create_tag(self, repo: str, revision: str) -> None:
        self.add_ref(repo, json.loads(self.body)["tag"], revision)

    def add_ref(self, repo: str, name: str, revision: str) -> None:
        self.require_user()
        found = self.repository(repo)
        if name in found.refs:
            raise HubError(HTTPStatus.CONFLICT, "", "Reference already exists")
        found.refs[name] = found.resolve(revision)
        self.send_json({})

    def preupload(self, repo: str, revision: str) -> None:
        self.require_user()
        files = self.repository(repo).files(revision)
        answers = []
        for asked in json.loads(self.body)["files"]:
            name = asked["path"]
            mode = "lfs" if name.endswith(LFS_SUFFIXES) else "regular"
            facts = described(name, files[name]) if name in files else {}
            known = facts.get("lfs", facts).get("oid")
            answers.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": known})
        self.send_json({"files": answers})

    def lfs_batch(self, repo: str) -> None:
        self.require_user()
        self.repository(repo)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.endpoint}/lfs/{asked['oid']}"}}
            objects.append(asked if asked["oid"] in self.hub.objects else {**asked, "actions": upload})
        self.send_json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(HTTPStatus.BAD_REQUEST, "BadRequest", "The content is not what its hash says.")
        self.hub.objects[oid] = self.body
        self.send_json({})

    def commit(self, repo: str, revision: str) -> None:
        self.require_user()
        found = self.repository(repo)
        files = dict(found.files(revision))
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        commit = found.commit(revision, files)
        url = f"{self.hub.endpoint}/{repo}/commit/{commit}"
        self.send_json({"success": True, "commitOid": commit, "commitUrl": url})


def described(name: str, content: bytes) -> dict[str, Any]:
    """A file as listings have it."""
    facts: dict[str, Any] = {"type": "file", "path": name, "size": len(content)}
    facts["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if name.endswith(LFS_SUFFIXES):
        facts["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return facts


REPO = r"(?P<repo>[^/]+/[^/]+)"
API = rf"/api/models/{REPO}"
REVISION = r"(?P<revision>[^/]+)"
FILE = rf"/{REPO}/resolve/{REVISION}/(?P<name>.+)"

ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("HEAD", FILE, HubHandler.file),
    ("GET", FILE, HubHandler.file),
    ("GET", rf"{API}(/revision/{REVISION})?", HubHandler.info),
    ("GET", rf"{API}/tree/{REVISION}/?(?P<folder>.*)", HubHandler.tree),
    ("POST", rf"{API}/paths-info/{REVISION}", HubHandler.paths_info),
    ("GET", "/api/whoami-v2", HubHandler.whoami),
    ("POST", "/api/validate-yaml", HubHandler.validate_yaml),
    ("POST", "/api/repos/create", HubHandler.create_repository),
    ("POST", rf"{API}/branch/{REVISION}", HubHandler.create_branch),
    ("POST", rf"{API}/tag/{REVISION}", HubHandler.create_tag),
    ("POST", rf"{API}/preupload/{REVISION}", HubHandler.preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", HubHandler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", HubHandler.lfs_upload),
    ("POST", rf"{API}/commit/{REVISION}", HubHandler.commit),
]
