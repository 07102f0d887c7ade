"""A small Hugging Face Hub for tests: real HTTP on 127.0.0.1, everything in memory, standard library only.

    with HubServer(tokens={"hf_alice": "alice"}) as hub:
        hub.create("alice/model", files={"config.json": b"{}"})
        subprocess.run(command, env=hub.environment(cache_folder, token="hf_alice"))

What the real Hub's clients need is there: repositories of all types, visibility, gates, branches and tags, commits with
LFS upload, listings, downloads with redirects and ranges. Large files lie on a second port, as they lie on another host
in reality. Xet is not offered. `fail` and `cut` make the next answers go wrong. The clients read `HF_ENDPOINT` when
they are imported, so they must run in a process of their own.
"""

import base64
import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


LFS_SUFFIXES = (".safetensors", ".so", ".bin", ".png", ".parquet")
DATE = "2025-01-01T00:00:00.000Z"

KIND = r"(?P<kind>models|datasets|spaces|kernels)"
REPO = r"(?P<repo>[^/]+(?:/[^/]+)??)"  # without a slash: ids as the Hub once had them
REVISION = r"(?P<revision>[^/]+)"
WEB = r"(?:(?P<kind>datasets|spaces|kernels)/)?" + REPO
ROUTES = tuple(
    (method, re.compile(pattern), name)
    for method, pattern, name in (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate_card"),
        ("POST", r"/api/repos/create", "create_repository"),
        ("DELETE", r"/api/repos/delete", "delete_repository"),
        ("GET", rf"/api/{KIND}/{REPO}/refs", "list_refs"),
        ("PUT", rf"/api/{KIND}/{REPO}/settings", "change_settings"),
        ("GET", rf"/api/{KIND}/{REPO}/revision/{REVISION}", "repository_info"),
        ("GET", rf"/api/{KIND}/{REPO}/commits/{REVISION}", "list_commits"),
        ("GET", rf"/api/{KIND}/{REPO}/tree/{REVISION}(?:/(?P<path>.+))?", "list_tree"),
        ("POST", rf"/api/{KIND}/{REPO}/paths-info/{REVISION}", "describe_paths"),
        ("POST", rf"/api/{KIND}/{REPO}/preupload/{REVISION}", "choose_upload_modes"),
        ("POST", rf"/api/{KIND}/{REPO}/commit/{REVISION}", "make_commit"),
        ("POST", rf"/api/{KIND}/{REPO}/branch/(?P<name>[^/]+)", "create_branch"),
        ("DELETE", rf"/api/{KIND}/{REPO}/branch/(?P<name>[^/]+)", "delete_branch"),
        ("POST", rf"/api/{KIND}/{REPO}/tag/{REVISION}", "create_tag"),
        ("GET", rf"/api/{KIND}/{REPO}", "repository_info"),
        ("POST", rf"/{WEB}\.git/info/lfs/objects/batch", "offer_lfs_uploads"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "store_lfs_object"),
        ("POST", r"/lfs/verify", "verify_lfs_object"),
        ("GET", r"/lfs/(?P<oid>[0-9a-f]{64})", "send_lfs_object"),
        ("GET", rf"/{WEB}/resolve/{REVISION}/(?P<path>.+)", "send_file"),
    )
)


class RefusalError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status.
        message: for the client's user.
        code: what the Hub's clients tell errors apart by (`X-Error-Code`).
        headers: further ones.
    """

    def __init__(self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers or {}

    def answer(self) -> "Answer":
        codes = {"X-Error-Code": self.code} if self.code else {}
        headers = {"X-Error-Message": str(self), **codes, **self.headers}
        return Answer(self.status, json.dumps({"error": str(self)}).encode(), headers)


@dataclass(frozen=True)
class File:
    """A file's content, and the names that git and LFS have for it."""

    content: bytes
    is_lfs: bool

    @property
    def git_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git_id


@dataclass(frozen=True)
class Commit:
    """A state of the repository's files; its id depends on everything before it."""

    title: str
    files: dict[str, File]
    parent: "Commit | None" = None

    @property
    def id(self) -> str:
        lines = [self.title, self.parent.id if self.parent else ""]
        lines += [f"{path} {file.git_id}" for path, file in sorted(self.files.items())]
        return hashlib.sha1("\n".join(lines).encode()).hexdigest()


@dataclass
class Repository:
    """One repository; `gated` files are for members of its namespace only."""

    id: str
    type: str = "model"
    private: bool = False
    gated: bool = False
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)

    def commit(self, title: str, changes: Mapping[str, File | None], branch: str = "main") -> Commit:
        """Put a commit on a branch; None removes a file."""
        parent = self.branches.get(branch)
        files = {**(parent.files if parent else {}), **changes}
        commit = Commit(title, {path: file for path, file in files.items() if file is not None}, parent)
        self.branches[branch] = commit
        return commit

    def at(self, revision: str) -> Commit:
        """The commit of a branch, a tag or an id."""
        named = {**self.tags, **self.branches}
        if revision in named:
            return named[revision]
        for commit in named.values():
            while commit is not None:
                if commit.id == revision:
                    return commit
                commit = commit.parent
        raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


@dataclass(frozen=True)
class Answer:
    """What is sent; most handlers return something for JSON instead."""

    status: int
    content: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Fault:
    """What goes wrong with requests whose "METHOD /path" the pattern is found in, and how often yet."""

    pattern: re.Pattern
    times: float
    refusal: RefusalError | None = None
    cut_after: int | None = None


@dataclass(frozen=True)
class Request:
    """A request that came in, and the answer's status."""

    line: str
    headers: dict[str, str]
    status: int


class HubServer:
    """The server; a context manager.

    Args:
        tokens: user of each token that is known.
        organizations: members of each namespace beyond the users' own.
    """

    def __init__(self, tokens: Mapping[str, str] | None = None, organizations: Mapping[str, set[str]] | None = None):
        self.tokens = dict(tokens or {})
        self.organizations = dict(organizations or {})
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.lock = threading.RLock()
        handler = type("Handler", (HubRequestHandler,), {"hub": self})
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in ("hub", "storage")]
        self._threads = [
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True) for server in self._servers
        ]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_port}"

    @property
    def storage_url(self) -> str:
        return f"http://127.0.0.1:{self._servers[1].server_port}"

    def __enter__(self) -> "HubServer":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()

    def environment(self, home: Path | str, token: str | None = None, **changes: str) -> dict[str, str]:
        """The environment for a process whose Hub client uses this server, with its cache in `home`."""
        ours = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "no_proxy": "127.0.0.1"}
        if token is not None:
            ours["HF_TOKEN"] = token
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING_FACE_", "TRANSFORMERS_"))
        }
        return {**inherited, **ours, **changes}

    def create(
        self,
        repo_id: str,
        files: Mapping[str, bytes] | None = None,
        type: str = "model",
        private: bool = False,
        gated: bool = False,
    ) -> Repository:
        """Make a repository, as the Hub does with a first commit, and a second one with `files`."""
        with self.lock:
            repository = self.repositories[type, repo_id] = Repository(repo_id, type, private, gated)
            repository.commit("initial commit", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)})
            if files:
                self.commit(repo_id, files, type)
            return repository

    def commit(self, repo_id: str, files: Mapping[str, bytes], type: str = "model", branch: str = "main") -> str:
        """Add or replace files; returns the commit's id."""
        changes = {path: File(content, is_lfs(path)) for path, content in files.items()}
        with self.lock:
            self.lfs_objects.update({file.sha256: file.content for file in changes.values() if file.is_lfs})
            return self.repositories[type, repo_id].commit("Add files", changes, branch).id

    def files(self, repo_id: str, type: str = "model", revision: str = "main") -> dict[str, bytes]:
        """What a repository holds."""
        with self.lock:
            commit = self.repositories[type, repo_id].at(revision)
            return {path: file.content for path, file in commit.files.items()}

    def fail(
        self,
        pattern: str,
        status: int,
        times: float = float("inf"),
        message: str = "as the test asked for",
        code: str = "",
    ) -> None:
        """Refuse the next requests whose "METHOD /path" has the pattern (a regular expression) in it."""
        self.faults.append(Fault(re.compile(pattern), times, RefusalError(status, message, code or None)))

    def cut(self, pattern: str, after: int, times: float = 1) -> None:
        """Close the connection after so many bytes of the body in the next answers to such requests."""
        self.faults.append(Fault(re.compile(pattern), times, cut_after=after))

    def next_fault(self, line: str) -> Fault | None:
        """The fault that applies to a request, which counts as used."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.pattern.search(line):
                    fault.times -= 1
                    return fault
        return None

    def may_write(self, user: str | None, namespace: str) -> bool:
        """Whether a user is, or belongs to, a namespace."""
        return user is not None and (user == namespace or user in self.organizations.get(namespace, ()))


class HubRequestHandler(BaseHTTPRequestHandler):
    """One connection to the server; a method for each route."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        """Tests look at `HubServer.requests`."""

    def handle_request(self) -> None:
        body = self.read_body()
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        line = f"{self.command} {url.path}"
        fault = self.hub.next_fault(line)
        try:
            if fault and fault.refusal:
                raise fault.refusal
            with self.hub.lock:
                self.user = self.authenticate()
                answer = self.route(url.path, body)
            if not isinstance(answer, Answer):
                answer = Answer(200, json.dumps(answer).encode())
        except RefusalError as refusal:
            answer = refusal.answer()
        self.hub.requests.append(Request(line, dict(self.headers), answer.status))
        self.send(answer, fault.cut_after if fault else None)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request  # noqa: N815 - http.server's names

    def route(self, path: str, body: bytes) -> Any:
        method = "GET" if self.command == "HEAD" else self.command
        for allowed_method, pattern, name in ROUTES:
            match = pattern.fullmatch(path)
            if match and method == allowed_method:
                groups = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                if "repo" in groups:
                    groups["repository"] = self.repository(groups.pop("kind", "models")[:-1], groups.pop("repo"))
                return getattr(self, name)(**groups, **({"body": body} if method in ("POST", "PUT", "DELETE") else {}))
        raise RefusalError(404, f"the test server has no {self.command} {path}")

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send(self, answer: Answer, cut_after: int | None) -> None:
        """Send an answer, less its body for HEAD, and less the rest of it where a fault cuts the connection."""
        self.send_response(answer.status)
        headers = {"Content-Length": str(len(answer.content)), "Content-Type": "application/json", **answer.headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(answer.content[:cut_after])
        if cut_after is not None:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    # Who may do what

    def authenticate(self) -> str | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if not scheme:
            return None
        if token not in self.hub.tokens:
            raise RefusalError(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def repository(self, type: str, repo_id: str) -> Repository:
        repository = self.hub.repositories.get((type, repo_id))
        if repository is None or (repository.private and not self.is_member(repository)):
            raise RefusalError(401 if self.user is None else 404, "Repository not found", "RepoNotFound")
        return repository

    def is_member(self, repository: Repository) -> bool:
        return self.hub.may_write(self.user, repository.id.partition("/")[0])

    def check_may_write(self, namespace: str) -> None:
        if self.user is None:
            raise RefusalError(401, "Invalid username or password.")
        if not self.hub.may_write(self.user, namespace):
            raise RefusalError(403, f'You don\'t have the rights to write to the namespace "{namespace}"')

    # Accounts and repositories

    def whoami(self) -> dict[str, Any]:
        if self.user is None:
            raise RefusalError(401, "Invalid username or password.")
        organizations = [{"name": name} for name, members in self.hub.organizations.items() if self.user in members]
        token = {"role": "write", "displayName": "test", "createdAt": DATE}
        auth = {"type": "access_token", "accessToken": token}
        return {"type": "user", "name": self.user, "fullname": self.user, "orgs": organizations, "auth": auth}

    def validate_card(self, body: bytes) -> dict[str, Any]:
        has_metadata = json.loads(body)["content"].startswith("---\n")
        return {"errors": [], "warnings": [] if has_metadata else [{"message": "no metadata"}]}

    def create_repository(self, body: bytes) -> Answer | dict[str, Any]:
        wanted = json.loads(body)
        namespace, type = wanted.get("organization") or self.user or "", wanted.get("type") or "model"
        self.check_may_write(namespace)
        repo_id = f"{namespace}/{wanted['name']}"
        url = self.web_url(type, repo_id)
        if (type, repo_id) in self.hub.repositories:
            return Answer(409, json.dumps({"error": f"You already created this {type} repo", "url": url}).encode())
        self.hub.create(repo_id, type=type, private=wanted.get("private") or wanted.get("visibility") == "private")
        return {"url": url, "name": repo_id, "id": repo_id}

    def delete_repository(self, body: bytes) -> None:
        wanted = json.loads(body)
        type, namespace = wanted.get("type") or "model", wanted.get("organization") or self.user or ""
        repository = self.repository(type, f"{namespace}/{wanted['name']}")
        self.check_may_write(namespace)
        del self.hub.repositories[type, repository.id]

    def change_settings(self, repository: Repository, body: bytes) -> dict[str, Any]:
        self.check_may_write(repository.id.partition("/")[0])
        wanted = json.loads(body)
        repository.private = wanted.get("private", wanted.get("visibility") == "private")
        return {"private": repository.private}

    def repository_info(self, repository: Repository, revision: str = "main") -> dict[str, Any]:
        commit = repository.at(revision)
        siblings = [{"rfilename": path} for path in commit.files]
        if "blobs" in self.query:
            for sibling, file in zip(siblings, commit.files.values(), strict=True):
                sibling |= {"size": len(file.content), "blobId": file.git_id}
                if file.is_lfs:
                    sibling["lfs"] = {"size": len(file.content), "sha256": file.sha256, "pointerSize": 130}
        return {
            "_id": "0" * 24,
            "id": repository.id,
            "author": repository.id.partition("/")[0],
            "sha": commit.id,
            "private": repository.private,
            "gated": "manual" if repository.gated else False,
            "disabled": False,
            "lastModified": DATE,
            "createdAt": DATE,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": siblings,
        }

    # Branches, tags and history

    def list_refs(self, repository: Repository) -> dict[str, Any]:
        def describe(refs: Mapping[str, Commit], folder: str) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": c.id} for n, c in refs.items()]

        return {
            "branches": describe(repository.branches, "heads"),
            "tags": describe(repository.tags, "tags"),
            "converts": [],
            "pullRequests": [],
        }

    def list_commits(self, repository: Repository, revision: str) -> list[dict[str, Any]]:
        commit, history = repository.at(revision), []
        while commit is not None:
            history.append({"id": commit.id, "title": commit.title, "message": "", "authors": [], "date": DATE})
            commit = commit.parent
        return history

    def create_branch(self, repository: Repository, name: str, body: bytes) -> dict[str, Any]:
        self.check_may_write(repository.id.partition("/")[0])
        if name in repository.branches:
            raise RefusalError(409, f"Reference already exists: {name}")
        repository.branches[name] = repository.at(json.loads(body or b"{}").get("startingPoint", "main"))
        return {}

    def delete_branch(self, repository: Repository, name: str, body: bytes) -> dict[str, Any]:
        self.check_may_write(repository.id.partition("/")[0])
        if repository.branches.pop(name, None) is None:
            raise RefusalError(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return {}

    def create_tag(self, repository: Repository, revision: str, body: bytes) -> dict[str, Any]:
        self.check_may_write(repository.id.partition("/")[0])
        tag = json.loads(body)["tag"]
        if tag in repository.tags:
            raise RefusalError(409, f"Tag {tag} already exists")
        repository.tags[tag] = repository.at(revision)
        return {}

    # Reading

    def list_tree(self, repository: Repository, revision: str, path: str = "") -> list[dict[str, Any]]:
        commit = repository.at(revision)
        prefix = f"{path}/" if path else ""
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        below = [name for name in commit.files if name.startswith(prefix)]
        folders = {parent for name in below for parent in parents(name) if parent.startswith(prefix)}
        if not below:
            raise RefusalError(404, f"{path} does not exist", "EntryNotFound", {"X-Repo-Commit": commit.id})
        names = [name for name in sorted({*below, *folders}) if recursive or "/" not in name[len(prefix) :]]
        return [describe_path(commit, name) for name in names]

    def describe_paths(self, repository: Repository, revision: str, body: bytes) -> list[dict[str, Any]]:
        commit = repository.at(revision)
        is_json = "json" in self.headers.get("Content-Type", "")
        wanted = (json.loads(body) if is_json else parse_qs(body.decode()))["paths"]
        known = {*commit.files, *(parent for name in commit.files for parent in parents(name))}
        return [describe_path(commit, path) for path in wanted if path in known]

    def send_file(self, repository: Repository, revision: str, path: str) -> Answer:
        if repository.gated and not self.is_member(repository):
            message = f"Access to model {repository.id} is restricted. You must have access to it and be authenticated."
            raise RefusalError(401 if self.user is None else 403, message, "GatedRepo")
        commit = repository.at(revision)
        file = commit.files.get(path)
        if file is None:
            raise RefusalError(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit.id})
        headers = {"X-Repo-Commit": commit.id, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if not file.is_lfs:
            return self.range_of(file.content, headers)
        linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
        return Answer(302, b"Found", {**headers, **linked, "Location": f"{self.hub.storage_url}/lfs/{file.sha256}"})

    def send_lfs_object(self, oid: str) -> Answer:
        if oid not in self.hub.lfs_objects:
            raise RefusalError(404, "Entry not found", "EntryNotFound")
        return self.range_of(self.hub.lfs_objects[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def range_of(self, content: bytes, headers: dict[str, str]) -> Answer:
        headers["Content-Type"] = "application/octet-stream"
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return Answer(200, content, headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        if first > last:
            raise RefusalError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return Answer(206, content[first : last + 1], headers)

    # Writing

    def choose_upload_modes(self, repository: Repository, revision: str, body: bytes) -> dict[str, Any]:
        self.check_may_write(repository.id.partition("/")[0])
        present = repository.at(revision).files
        files = []
        for wanted in json.loads(body)["files"]:
            path = wanted["path"]
            mode = "lfs" if is_lfs(path) else "regular"
            oid = present[path].etag if path in present else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def offer_lfs_uploads(self, repository: Repository, body: bytes) -> dict[str, Any]:
        self.check_may_write(repository.id.partition("/")[0])
        objects = []
        for wanted in json.loads(body)["objects"]:
            offer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.lfs_objects:
                upload, verify = f"{self.hub.storage_url}/lfs/{wanted['oid']}", f"{self.hub.url}/lfs/verify"
                offer["actions"] = {"upload": {"href": upload, "header": {}}, "verify": {"href": verify}}
            objects.append(offer)
        return {"transfer": "basic", "objects": objects}

    def store_lfs_object(self, oid: str, body: bytes) -> dict[str, Any]:
        if hashlib.sha256(body).hexdigest() != oid:
            raise RefusalError(400, "the content is not what its SHA-256 says")
        self.hub.lfs_objects[oid] = body
        return {}

    def verify_lfs_object(self, body: bytes) -> dict[str, Any]:
        wanted = json.loads(body)
        if len(self.hub.lfs_objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise RefusalError(404, "the object is not there, or has another size")
        return {}

    def make_commit(self, repository: Repository, revision: str, body: bytes) -> dict[str, Any]:
        self.check_may_write(repository.id.partition("/")[0])
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        parent = repository.at(revision)
        if header.get("parentCommit") not in (None, parent.id):
            raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
        changes: dict[str, File | None] = {}
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key == "file":
                changes[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.lfs_objects:
                    raise RefusalError(400, f"{value['path']} was not uploaded")
                changes[value["path"]] = File(self.hub.lfs_objects[value["oid"]], True)
            elif key == "deletedFile":
                if value["path"] not in parent.files:
                    raise RefusalError(404, "A file with this name doesn't exist", "EntryNotFound")
                changes[value["path"]] = None
            elif key == "deletedFolder":
                changes |= dict.fromkeys(
                    path for path in parent.files if path.startswith(value["path"].rstrip("/") + "/")
                )
        commit = repository.commit(header["summary"], changes, revision)
        url = f"{self.web_url(repository.type, repository.id)}/commit/{commit.id}"
        return {"success": True, "commitOid": commit.id, "commitUrl": url, "pullRequestUrl": None}

    def web_url(self, type: str, repo_id: str) -> str:
        return f"{self.hub.url}/{'' if type == 'model' else f'{type}s/'}{repo_id}"


def is_lfs(path: str) -> bool:
    """Whether the Hub keeps a file of that name outside of git."""
    return path.endswith(LFS_SUFFIXES)


def parents(path: str) -> Iterable[str]:
    """The folders that a path lies in, within the repository."""
    parts = path.split("/")
    return ("/".join(parts[:depth]) for depth in range(1, len(parts)))


def describe_path(commit: Commit, path: str) -> dict[str, Any]:
    """What listings say of a file or folder."""
    file = commit.files.get(path)
    if file is None:
        return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}
    description = {"type": "file", "path": path, "oid": file.git_id, "size": len(file.content)}
    if file.is_lfs:
        description["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 130}
    return description
