"""A Hugging Face Hub on this machine."""

import base64
import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class HubServer:
    """As much of the Hub's API as downloads and uploads of models, and uploads of Spaces, need.

    Args:
        root: an empty folder; every commit of a repository becomes a folder `root/user/model/<commit>`, or
            `root/spaces/user/name/<commit>`.

    Attributes:
        requests: method and path of every request so far.
    """

    def __init__(self, root: Path):
        self.root = root
        self.refs: dict[str, dict[str, str]] = {}  # repository -> branch -> commit
        self.requests: list[tuple[str, str]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (HubRequestHandler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def commit(self, repo: str, files: dict[str, bytes], branch: str = "main", keep: bool = False) -> str:
        """Add a commit with these files, and those of the branch's last one if they are to be kept."""
        branches = self.refs.setdefault(repo, {})
        parent = self.root / repo / branches.get(branch, "none")
        commit = hashlib.sha1(f"{repo} {branch} {parent.name} {sorted(files)}".encode()).hexdigest()
        folder = self.root / repo / commit
        if keep and parent.is_dir():
            shutil.copytree(parent, folder)
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        branches[branch] = commit
        return commit

    def publish(self, repo: str, source: Path, branch: str = "main") -> str:
        """Add a commit that holds just the files of a folder."""
        files = {str(p.relative_to(source)): p.read_bytes() for p in sorted(source.rglob("*")) if p.is_file()}
        return self.commit(repo, files, branch)

    def find_commit(self, repo: str, revision: str) -> Path | None:
        """The folder of a branch or a commit."""
        folder = self.root / repo / self.refs.get(repo, {}).get(revision, revision)
        return folder if folder.is_dir() else None

    @property
    def downloaded(self) -> set[str]:
        """Names of the files whose content was requested."""
        paths = (path for method, path in self.requests if method == "GET" and "/resolve/" in path)
        return {path.split("/resolve/")[1].partition("/")[2] for path in paths}


class HubRequestHandler(BaseHTTPRequestHandler):
    """Answers the requests of huggingface_hub."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests.append((self.command, path))
        if path.startswith(("api/models/", "api/spaces/")):
            user, model, *rest = path.split("/", 2)[2].split("/")
            user = f"spaces/{user}" if path.startswith("api/spaces/") else user
            # /api/models/user/model[/revision/main] and /api/models/user/model/tree/main
            what, revision = (rest[0], rest[1]) if len(rest) > 1 else ("revision", "main")
            if folder := self.find(f"{user}/{model}", revision):
                files = sorted(p for p in folder.rglob("*") if p.is_file())
                names = [p.relative_to(folder).as_posix() for p in files]
                if what == "tree":
                    entries = [{"type": "file", "path": name} for name in names]
                    for entry, file in zip(entries, files, strict=True):
                        entry |= {"size": file.stat().st_size, "oid": self.etag(file)}
                    self.answer(entries)
                else:
                    siblings = [{"rfilename": name} for name in names]
                    self.answer({"id": f"{user}/{model}", "sha": folder.name, "siblings": siblings, "tags": []})
        elif "/resolve/" in path:
            repo, _, rest = path.partition("/resolve/")
            revision, _, name = rest.partition("/")
            if folder := self.find(repo, revision):
                self.send_file(folder, folder / name)
        else:
            self.answer({"error": f"{path} is not known here"}, 404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif path == "api/repos/create":
            payload = json.loads(body)
            repo = f"{payload['organization'] or 'user'}/{payload['name']}"
            repo = f"spaces/{repo}" if payload.get("type") == "space" else repo
            exists = repo in self.hub.refs
            if not exists:
                self.hub.commit(repo, {".gitattributes": b""})
            self.answer({"url": f"{self.hub.url}/{repo}"}, 409 if exists else 200)
        elif "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self.answer({"files": modes})
        elif "/commit/" in path:
            repo, _, branch = path.removeprefix("api/").removeprefix("models/").partition("/commit/")
            lines = [json.loads(line) for line in body.splitlines()]
            values = [line["value"] for line in lines if line["key"] == "file"]
            files = {value["path"]: base64.b64decode(value["content"]) for value in values}
            commit = self.hub.commit(repo, files, branch, keep=True)
            self.answer({"commitOid": commit, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit}"})
        else:
            self.answer({"error": f"{path} is not known here"}, 404)

    def find(self, repo: str, revision: str) -> Path | None:
        folder = self.hub.find_commit(repo, revision)
        if folder is None:
            missing = "RevisionNotFound" if repo in self.hub.refs else "RepoNotFound"
            self.answer({"error": missing}, 404, {"X-Error-Code": missing})
        return folder

    def send_file(self, folder: Path, path: Path) -> None:
        commit = {"X-Repo-Commit": folder.name}
        if not path.is_file():
            self.answer({"error": "EntryNotFound"}, 404, {"X-Error-Code": "EntryNotFound", **commit})
            return
        content, status, headers = path.read_bytes(), 200, {"ETag": f'"{self.etag(path)}"', **commit}
        if wanted := self.headers.get("Range"):  # bytes=100-, when a download goes on
            start, total = int(wanted.removeprefix("bytes=").split("-")[0]), len(content)
            content, status = content[start:], 206
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        self.answer(content, status, headers)

    def etag(self, path: Path) -> str:
        content = path.read_bytes()
        return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass
