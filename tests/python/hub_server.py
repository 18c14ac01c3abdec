"""A stand-in of the Hugging Face hub: the part of its HTTP interface that huggingface_hub uses to fetch a model.

with Hub() as hub:
    hub.add("owner/name", "main", {"config.json": b"..."})   # a new commit of a branch
    os.environ["HF_ENDPOINT"] = hub.url
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote


class Hub:
    def __init__(self) -> None:
        self.revisions: dict[tuple[str, str], str] = {}  # (repository, branch) -> commit
        self.commits: dict[tuple[str, str], dict[str, bytes]] = {}  # (repository, commit) -> files
        self.gated: set[str] = set()
        self.requests: list[str] = []  # method and path
        self.refuses: int | None = None  # HTTP status of every answer
        self.breaks_after: int | None = None  # bytes of a file's body, from there on the connection is closed
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, repository: str, branch: str, files: dict[str, bytes]) -> str:
        """A commit; returns its name."""
        commit = hashlib.sha1(repr((repository, sorted(files.items()))).encode()).hexdigest()
        self.commits[repository, commit] = files
        self.revisions[repository, branch] = self.revisions[repository, commit] = commit
        return commit

    def add_folder(self, repository: str, branch: str, folder: Path) -> str:
        return self.add(repository, branch, {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()})


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(self.path.partition("?")[0])
            hub.requests.append(f"{self.command} {path}")
            parts = path.strip("/").split("/")
            if hub.refuses is not None:
                self._answer(hub.refuses, b"{}")
                return
            if parts[:2] == ["api", "models"] and parts[4:5] == ["tree"]:
                self._tree("/".join(parts[2:4]), parts[5])
            elif parts[:2] == ["api", "models"]:
                self._info("/".join(parts[2:4]), parts[5] if parts[4:5] == ["revision"] else "main")
            elif parts[2:3] == ["resolve"]:
                self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
            else:
                self._answer(404, b"{}")

        def _info(self, repository: str, revision: str) -> None:
            commit = self._commit(repository, revision)
            if commit is not None:
                siblings = [{"rfilename": name} for name in hub.commits[repository, commit]]
                about = {"id": repository, "modelId": repository, "sha": commit, "siblings": siblings, "tags": []}
                self._answer(200, json.dumps(about).encode(), {"Content-Type": "application/json"})

        def _tree(self, repository: str, revision: str) -> None:
            commit = self._commit(repository, revision)
            if commit is not None:
                files = hub.commits[repository, commit].items()
                entries = [
                    {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()} for n, d in files
                ]
                self._answer(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})

        def _commit(self, repository: str, revision: str) -> str | None:
            """Or what is wrong, as an answer, and None."""
            if repository in hub.gated and self.headers.get("Authorization") != "Bearer let-me-in":
                self._answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
            elif not any(name == repository for name, _ in hub.revisions):
                self._answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif (repository, revision) not in hub.revisions:
                self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            else:
                return hub.revisions[repository, revision]
            return None

        def _file(self, repository: str, revision: str, name: str) -> None:
            commit = self._commit(repository, revision)
            if commit is None:
                return
            data = hub.commits[repository, commit].get(name)
            if data is None:
                self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
                return
            headers = {
                "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Repo-Commit": commit,
                "Accept-Ranges": "bytes",
            }
            start = 0
            if (wanted := self.headers.get("Range", "")).startswith("bytes="):
                start = int(wanted[6:].partition("-")[0])
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self._answer(206 if start else 200, data[start:], headers)

        def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            limit = hub.breaks_after
            if limit is not None and len(body) > limit:
                self.wfile.write(body[:limit])
                self.wfile.flush()
                self.connection.close()
                self.close_connection = True
            else:
                self.wfile.write(body)

    return Handler
