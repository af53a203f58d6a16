"""A small Hugging Face Hub: the part of its HTTP interface that ``huggingface_hub`` uses to find and download models."""

import base64
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_token_of_the_test"
_LARGE = (".safetensors", ".bin", ".h5")
"""Suffixes of files in large file storage, which are answered by a redirection to another path."""


@dataclass
class Repository:
    """A model or dataset of the hub.

    Attributes:
        commits: Folder of each commit by its hash, oldest first.
        access: ``public``, ``private`` or ``gated``; the last two need `TOKEN`.
    """

    commits: dict[str, Path] = field(default_factory=dict)
    access: str = "public"

    def commit_of(self, revision: str) -> str | None:
        """Return the hash of a revision; ``main`` is the last commit."""
        return [*self.commits][-1] if revision == "main" else revision if revision in self.commits else None


class HubServer(ThreadingHTTPServer):
    """The server. `requests` lists the method and path of each request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.uploads = Path()
        """Folder for the files of commits over HTTP."""
        self.requests: list[str] = []
        self.status: int | None = None
        """Status of every answer, for a hub that is out of order."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, name: str, folder: Path, access: str = "public") -> str:
        """Publish a folder as the next commit of a repository, and return the hash of the commit."""
        repository = self.repositories.setdefault(name, Repository(access=access))
        commit = hashlib.sha1(f"{name} {len(repository.commits)}".encode()).hexdigest()
        repository.commits[commit] = folder
        return commit

    def downloaded(self) -> list[str]:
        """Return the sorted names of the files whose content was requested."""
        return sorted(
            {line.rpartition("/")[2] for line in self.requests if line.startswith("GET") and "/api/" not in line}
        )


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"POST {path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(403, b"{}")
        if path == "/api/validate-yaml":
            return self._send_json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            access = "private" if wanted.get("visibility") == "private" else "public"
            self.server.repositories[name] = Repository(access=access)
            return self._send_json({"url": f"{self.server.endpoint}/{name}"})
        parts = path.strip("/").split("/")
        name, action = "/".join(parts[2:4]), parts[4]
        if action == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._send_json({"files": files})
        assert action == "commit"
        repository = self.server.repositories[name]
        folder = self.server.uploads / f"{len(self.server.requests)}"
        if repository.commits:
            shutil.copytree([*repository.commits.values()][-1], folder)
        for line in map(json.loads, body.decode().splitlines()):
            if line["key"] == "file":
                file = folder / line["value"]["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(base64.b64decode(line["value"]["content"]))
            elif line["key"] == "deletedFile":
                (folder / line["value"]["path"]).unlink()
        commit = self.server.add(name, folder)
        return self._send_json({"commitOid": commit, "commitUrl": f"{self.server.endpoint}/{name}/commit/{commit}"})

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if self.server.status is not None:
            return self._send(self.server.status, b"out of order")
        if parts[0] == "storage":
            return self._send_file(Path("/" + "/".join(parts[1:])), {})
        if parts[:2] in (["api", "models"], ["api", "datasets"]):
            name, rest = "/".join(parts[2:4]), parts[4:] or ["revision", "main"]
        elif parts[0] == "datasets":
            name, rest = "/".join(parts[1:3]), parts[3:]
        else:
            name, rest = "/".join(parts[:2]), parts[2:]
        repository = self.server.repositories.get(name)
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository.access == "private" and not allowed):
            # Like the hub, which does not tell strangers whether a private repository exists.
            return self._send(404 if allowed else 401, b"{}", {"X-Error-Code": "RepoNotFound"})
        commit = repository.commit_of(rest[1])
        if commit is None:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        folder = repository.commits[commit]
        files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
        if rest[0] == "revision":
            siblings = [{"rfilename": path} for path in files]
            return self._send_json({"id": name, "sha": commit, "siblings": siblings})
        if rest[0] == "tree":
            return self._send_json(
                [
                    {"type": "file", "path": path, "size": file.stat().st_size, "oid": _digest(file)}
                    for path, file in files.items()
                ]
            )
        if repository.access == "gated" and not allowed:
            return self._send(401, b"{}", {"X-Error-Code": "GatedRepo"})
        found = files.get("/".join(rest[2:]))
        if found is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_digest(found)}"'}
        if not found.name.endswith(_LARGE):
            return self._send_file(found, headers)
        headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(found.stat().st_size)}
        return self._send(
            302, b"", headers | {"Location": f"http://localhost:{self.server.server_port}/storage{found}"}
        )

    def _send_json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send_file(self, file: Path, headers: dict[str, str]) -> None:
        content = file.read_bytes()
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            part = content[int(first) : int(last) + 1 if last else None]
            headers = headers | {"Content-Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"}
            return self._send(206, part, headers)
        return self._send(200, content, headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@contextmanager
def running_hub() -> Iterator[HubServer]:
    """Run a hub while the block runs."""
    server = HubServer()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def use_hub(server: HubServer, cache: Path, patch: pytest.MonkeyPatch) -> None:
    """Make this process, whose ``huggingface_hub`` may be imported already, and its subprocesses use a hub and an empty cache."""
    from huggingface_hub import constants

    for name, value in {
        "HF_ENDPOINT": server.endpoint,
        "HF_HUB_CACHE": str(cache),
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }.items():
        patch.setenv(name, value)
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        patch.delenv(name, raising=False)
    patch.setattr(constants, "ENDPOINT", server.endpoint)
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
