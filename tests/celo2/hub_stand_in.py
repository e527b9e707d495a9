"""A stand-in for the Hugging Face Hub on 127.0.0.1, as far as huggingface_hub needs it: lists, files, uploads, refusals."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """Commits of files, branches and tags, and who may read them: "all", "gated" (listed, not downloaded), "private"."""

    access: str = "all"
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], ref: str = "main", message: str = "") -> str:
        """Add `files` to those of `ref`; returns the hash."""
        before = self.commits.get(self.refs.get(ref, self.refs.get("main", "")), {})
        sha = hashlib.sha1(repr((ref, message, len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[sha] = before | files
        self.refs[ref] = sha
        self.messages.append(message)
        return sha


class Hub:
    """Repositories by name, and what was asked: (method, path)."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.down = False  # it answers 503
        self.token = "hf_right"  # the one that may read what is private or gated, and write
        self.created: list[dict] = []
        self.url = ""

    def add(self, name: str, files: dict[str, bytes], **options: str) -> str:
        """A repository with one commit, whose hash is returned."""
        return self.repositories.setdefault(name, Repository(**options)).commit(files)

    def downloads(self) -> list[str]:
        """Files that were fetched, and not only asked for."""
        return [path for method, path in self.requests if method == "GET" and not path.startswith("/api/")]


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def answer(self, status: int, content: bytes | dict | list = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str = "", **headers: str) -> None:
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message, **headers)

    def allowed(self) -> bool:
        return self.headers.get("authorization") == f"Bearer {self.hub.token}"

    def repository(self, name: str) -> Repository | None:
        """The repository, or None after a refusal, which is the same for a private one and a missing one."""
        found = self.hub.repositories.get(name)
        if found is None or (found.access == "private" and not self.allowed()):
            self.refuse(404 if self.allowed() else 401, "RepoNotFound", "Repository not found")
            return None
        return found

    def commit_of(self, repository: Repository, revision: str) -> str | None:
        sha = repository.refs.get(revision, revision)
        if sha not in repository.commits:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return sha

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, unquote(path)))
        parts = path.strip("/").split("/")
        if self.hub.down:
            return self.refuse(503, "", "down")
        if parts[0] == "api":  # api/models/OWNER/NAME[/revision/REV | /tree/REV]
            return self.list(parts[2:])
        repository = self.repository("/".join(parts[:2]))
        sha = repository and self.commit_of(repository, unquote(parts[3]))
        if not repository or not sha:
            return None
        if repository.access == "gated" and not self.allowed():
            return self.refuse(403, "GatedRepo", "Access to this model is restricted")
        content = repository.commits[sha].get(unquote("/".join(parts[4:])))
        if content is None:
            return self.refuse(404, "EntryNotFound", "Entry not found", X_Repo_Commit=sha)
        self.answer(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=sha)

    do_HEAD = do_GET

    def list(self, parts: list[str]) -> None:
        name = "/".join(parts[:2])
        repository = self.repository(name)
        sha = repository and self.commit_of(repository, unquote(parts[3]) if len(parts) > 3 else "main")
        if not repository or not sha:
            return
        files = repository.commits[sha]
        if parts[2:3] == ["tree"]:
            return self.answer(200, [{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in files.items()])
        siblings = [{"rfilename": p, "size": len(c), "blobId": "0"} for p, c in files.items()]
        self.answer(200, {"id": name, "modelId": name, "sha": sha, "siblings": siblings, "private": False})

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        body = self.body()
        parts = path.strip("/").split("/")
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if not self.allowed():
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        if path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given.get('organization') or 'me'}/{given['name']}"
            if name in self.hub.repositories:
                return self.answer(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
            self.hub.created.append(given)
            self.hub.add(name, {}, access="private" if given.get("private") or given.get("visibility") == "private" else "all")
            return self.answer(200, {"url": f"{self.hub.url}/{name}"})
        name, what, revision = "/".join(parts[2:4]), parts[4], "/".join(parts[5:])
        repository = self.repository(name)
        if repository is None:
            return None
        if self.commit_of(repository, revision) is None:
            return None
        if what == "preupload":
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            return self.answer(200, {"files": files})
        pull_request = "create_pr=1" in self.path
        lines = [json.loads(line) for line in body.splitlines()]
        added = [line["value"] for line in lines if line["key"] == "file"]
        files = {file["path"]: base64.b64decode(file["content"]) for file in added}
        sha = repository.commit(files, "refs/pr/1" if pull_request else revision, lines[0]["value"]["summary"])
        answer = {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha}
        self.answer(200, answer | ({"pullRequestUrl": f"{self.hub.url}/{name}/discussions/1"} if pull_request else {}))

    def body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)


@contextmanager
def serve() -> Iterator[Hub]:
    """The stand-in, until the end of the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfThis", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def use(monkeypatch, hub: Hub, home: Path) -> None:
    """Make this process's huggingface_hub ask `hub`, cache below `home`, and have no token."""
    from huggingface_hub import constants, hf_api

    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """The environment that makes another process do the same."""
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
