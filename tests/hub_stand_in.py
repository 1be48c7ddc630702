"""A stand-in for the data sets' hub and for a shop's picture server, on loopback, with faults."""

import hashlib
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from PIL import Image


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def picture_bytes(color: str, kind: str = "PNG", size=(40, 30)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, kind)
    return stream.getvalue()


class StandIn(ThreadingHTTPServer):
    """`commits[repository]` is a list of (commit, {path: bytes}), the last one is main. `pictures[path]` is a function of
    the handler that answers. `cuts[path]` counts how many more answers break off, `cut_at` bytes into the body.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits: dict[str, list] = {}
        self.pictures: dict = {}
        self.cuts: dict[str, int] = {}
        self.cut_at = 0
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.stalls: set[str] = set()  # paths whose broken answers do not end before `release`
        self.release = threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def netloc(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def ranges(self, path: str) -> list[str | None]:
        """The Range headers of the GETs of a hub file, in order."""
        return [range_ for method, name, range_ in self.requests if method == "GET" and name.endswith("/" + path)]

    def handle_error(self, request, client_address):
        """A client that hangs up is what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer()

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        parts = path.strip("/").split("/")
        if parts[0] == "pictures":
            self.server.pictures[parts[1]](self)
        elif parts[:2] == ["api", "datasets"]:
            self.listing("/".join(parts[2:4]), parts[4:])
        elif parts[0] == "datasets" and parts[3] == "resolve":
            self.file("/".join(parts[1:3]), parts[4], "/".join(parts[5:]))
        else:
            self.send(404)

    def find(self, repository: str, revision: str):
        commits = self.server.commits.get(repository, [])
        wanted = [item for item in commits if item[0] == revision] or (commits[-1:] if revision == "main" else [])
        return wanted[0] if wanted else (None, None)

    def listing(self, repository: str, rest: list[str]):
        commit, files = self.find(repository, rest[1] if len(rest) > 1 else "main")
        if commit is None:
            return self.send(404, headers={"X-Error-Code": "RevisionNotFound" if repository in self.server.commits
                                           else "RepoNotFound"})  # fmt: skip
        siblings = []
        for path, content in files.items():
            large = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            lfs = {"lfs": large | {"sha256": large["oid"]}} if path.endswith(".parquet") else {}
            siblings.append({"rfilename": path, "path": path, "type": "file", "size": len(content), "oid": blob_id(content),
                             "blobId": blob_id(content)} | lfs)  # fmt: skip
        if rest[:1] == ["paths-info"]:
            found = [file for file in siblings if file["path"].startswith("/".join(rest[2:]))]
        elif rest[:1] == ["tree"]:
            prefix = "/".join([*rest[2:], ""])
            below = [file for file in siblings if file["path"].startswith(prefix)]
            inside = {file["path"].removeprefix(prefix).partition("/")[::2] for file in below}
            folders = sorted({prefix + name for name, rest in inside if rest})
            found = [{"type": "directory", "path": path, "oid": blob_id(path.encode()), "size": 0} for path in folders]
            found += [file for file in below if "/" not in file["path"].removeprefix(prefix)]
        else:
            found = {"id": repository, "sha": commit, "siblings": siblings, "cardData": {"license": "openrail"},
                     "tags": [], "private": False, "downloads": 0, "likes": 0, "disabled": False}  # fmt: skip
        self.send(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def file(self, repository: str, revision: str, path: str):
        commit, files = self.find(repository, revision)
        if commit is None or path not in files:
            return self.send(404, headers={"X-Error-Code": "EntryNotFound"})
        content, range_ = files[path], self.headers.get("Range")
        headers = {"ETag": f'"{blob_id(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not range_:
            return self.send(200, content, headers, path)
        first, last = range_.removeprefix("bytes=").split("-")
        first, last = int(first), min(int(last or len(content) - 1), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self.send(206, content[first : last + 1], headers, path)

    def send(self, status: int, body: bytes = b"", headers: dict | None = None, path: str | None = None, length=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.server.cuts.get(path):
            self.server.cuts[path] -= 1
            self.wfile.write(body[: self.server.cut_at])
            self.wfile.flush()
            if path in self.server.stalls:
                self.server.release.wait(60)
            self.close_connection = True
        else:
            self.wfile.write(body)
