"""The part of the Hugging Face hub's HTTP interface that fetching and publishing need, on loopback and in memory."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_test"
MODEL = r"/api/models/(?P<id>[^/]+/[^/]+)"


@dataclass
class Repository:
    """Commits by their ids, the newest last; each holds all files."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files):
        content = {**(next(reversed(self.commits.values())) if self.commits else {}), **files}
        sha = hashlib.sha1(repr((len(self.commits), sorted(content.items()))).encode()).hexdigest()
        self.commits[sha] = content
        return sha


@dataclass
class Hub:
    """What the server holds, and what was asked of it: (method, path, whether with the token)."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str, bool]] = field(default_factory=list)
    url: str = ""


class Refused(Exception):
    """An answer that is an error: status, and the hub's name for it."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format, *args):
        pass

    def _answer(self, status, body: Any = b"", **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _handle(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        self.hub.asked.append((self.command, path, known))
        try:
            for method, pattern, needs_token, handler in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and self.command in method:
                    if needs_token and not known:
                        raise Refused(401, "Unauthorized")
                    handler(self, body, **found.groupdict())
                    return
            raise Refused(404, "EntryNotFound")
        except Refused as refused:
            status, code = refused.args
            self._answer(status, {"error": code}, X_Error_Code=code)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _files(self, id, revision="main"):
        repository = self.hub.repositories.get(id)
        if repository is None:
            raise Refused(404, "RepoNotFound")
        sha = next(reversed(repository.commits), "0" * 40) if revision == "main" else revision
        if sha not in repository.commits:
            raise Refused(404, "RevisionNotFound")
        return sha, repository.commits[sha]

    def validate(self, body):
        head = json.loads(body)["content"].split("---\n")[1]
        wrong = [key for key in ("license:", "library_name:", "tags:") if key not in head]
        self._answer(400 if wrong else 200, {"errors": [{"message": key} for key in wrong], "warnings": []})

    def create(self, body):
        asked = json.loads(body)
        id = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] == "others":
            raise Refused(403, "Forbidden")
        if id in self.hub.repositories:
            self._answer(409, {"error": "there is one", "url": f"{self.hub.url}/{id}"})
            return
        private = asked.get("private", False) or asked.get("visibility") == "private"
        self.hub.repositories[id] = Repository(private=private)
        self._answer(200, {"url": f"{self.hub.url}/{id}"})

    def info(self, body, id, revision=None):
        sha, files = self._files(id, revision or "main")
        siblings = [{"rfilename": name} for name in files]
        self._answer(200, {"id": id, "modelId": id, "sha": sha, "private": False, "tags": [], "siblings": siblings})

    def tree(self, body, id, revision):
        _, files = self._files(id, revision)
        listed = [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in files.items()
        ]
        self._answer(200, listed)

    def resolve(self, body, id, revision, name):
        sha, files = self._files(id, revision)
        if self.hub.repositories[id].gated:
            raise Refused(403, "GatedRepo")
        if name not in files:
            raise Refused(404, "EntryNotFound")
        etag = hashlib.sha256(files[name]).hexdigest()
        self._answer(200, files[name], ETag=f'"{etag}"', X_Repo_Commit=sha)

    def preupload(self, body, id):
        names = [file["path"] for file in json.loads(body)["files"]]
        modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
        self._answer(
            200, {"files": [{"path": n, "uploadMode": mode, "shouldIgnore": False} for n, mode in modes.items()]}
        )

    def batch(self, body, id):
        wanted = json.loads(body)["objects"]
        actions = [{**one, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}} for one in wanted]
        self._answer(200, {"transfer": "basic", "objects": actions})

    def upload(self, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.uploads[oid] = body
        self._answer(200)

    def commit(self, body, id):
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
        sha = self.hub.repositories[id].commit(files)
        self._answer(200, {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{id}/commit/{sha}"})


# Methods, path, whether a token is needed, and what answers.
ROUTES = (
    ("POST", "/api/validate-yaml", True, _Handler.validate),
    ("POST", "/api/repos/create", True, _Handler.create),
    ("GET", MODEL, False, _Handler.info),
    ("GET", f"{MODEL}/revision/(?P<revision>[^/]+)", False, _Handler.info),
    ("GET", f"{MODEL}/tree/(?P<revision>[^/]+)", False, _Handler.tree),
    ("POST", f"{MODEL}/preupload/main", True, _Handler.preupload),
    ("POST", f"{MODEL}/commit/main", True, _Handler.commit),
    ("POST", r"/(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", True, _Handler.batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", False, _Handler.upload),
    (("GET", "HEAD"), r"/(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)", False, _Handler.resolve),
)


@contextmanager
def hub_server():
    """A hub that lasts as long as the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
