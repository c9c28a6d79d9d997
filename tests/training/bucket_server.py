"""A server that keeps objects in memory and speaks as much of Google Cloud Storage's JSON interface as clients use.

Objects have generations, which a write can ask for (ifGenerationMatch), so that two processes can write to one bucket.
"""

import itertools
import json
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Object(NamedTuple):
    generation: int
    content: bytes


class BucketServer(ThreadingHTTPServer):
    """Serves the bucket of that name until it is closed; any other does not exist."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, bucket: str):
        super().__init__(("127.0.0.1", 0), _Request)
        self.bucket, self.objects, self.lock = bucket, dict[str, Object](), threading.Lock()
        self.generations, self.uploads = itertools.count(1_000_000), dict[str, str]()
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed, or have read enough, hang up."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class _Request(BaseHTTPRequestHandler):
    server: BucketServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Nothing is printed."""

    def handle_any(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        # …/b/BUCKET, …/b/BUCKET/o, …/b/BUCKET/o/NAME; slashes of a name are escaped.
        parts = url.path.split("/storage/v1/b/", 1)[1].split("/")
        with self.server.lock:
            if parts[0] != self.server.bucket:
                self.answer(404, {"error": {"code": 404, "message": "The specified bucket does not exist."}})
            elif url.path.startswith("/upload/"):
                self.upload(body)
            elif len(parts) == 1:
                self.answer(200, {"kind": "storage#bucket", "name": parts[0], "locationType": "region"})
            elif len(parts) == 2:
                self.listing()
            else:
                self.one(urllib.parse.unquote(parts[2]))

    do_GET = do_POST = do_PUT = do_DELETE = handle_any

    def answer(self, status: int, content: dict[str, Any] | bytes = b"", **headers: Any) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def unlike(self, name: str) -> bool:
        """Answers where the object is of another generation than is asked for."""
        found = self.server.objects.get(name)
        generation = found.generation if found else 0
        if int(self.query.get("ifGenerationMatch", generation)) != generation:
            self.answer(412, {"error": {"code": 412, "message": "Precondition Failed"}})
        elif int(self.query.get("ifGenerationNotMatch", -1)) == generation:
            self.answer(304)
        else:
            return False
        return True

    def described(self, name: str) -> dict[str, Any]:
        found, when = self.server.objects[name], "2026-01-01T00:00:00.000Z"
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": self.server.bucket,
            "size": str(len(found.content)),
            "generation": str(found.generation),
            "metageneration": "1",
            "timeCreated": when,
            "updated": when,
            "contentType": "application/octet-stream",
        }

    def upload(self, body: bytes) -> None:
        kind, upload = self.query["uploadType"], self.query.get("upload_id")
        if kind == "resumable" and upload is None:
            upload = str(next(self.server.generations))
            self.server.uploads[upload] = self.query.get("name") or json.loads(body)["name"]
            self.answer(200, Location=f"{self.server.address}{self.path}&upload_id={upload}")
            return
        name = self.server.uploads[upload] if upload is not None else self.query["name"]
        if self.unlike(name):
            return
        self.server.objects[name] = Object(next(self.server.generations), body)
        self.answer(200, self.described(name))

    def listing(self) -> None:
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        items, prefixes = [], set()
        for name in sorted(self.server.objects):
            if name.startswith(prefix):
                head, more, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
                if more:
                    prefixes.add(f"{prefix}{head}{delimiter}")
                else:
                    items.append(self.described(name))
        self.answer(200, {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def one(self, name: str) -> None:
        if self.unlike(name):
            return
        if name not in self.server.objects:
            self.answer(404, {"error": {"code": 404, "message": f"No such object: {name}"}})
        elif self.command == "DELETE":
            del self.server.objects[name]
            self.answer(204)
        elif self.query.get("alt") != "media":
            self.answer(200, self.described(name))
        else:
            self.content(self.server.objects[name])

    def content(self, found: Object) -> None:
        total, asked = len(found.content), self.headers.get("Range")
        if asked is None:
            self.answer(200, found.content, x_goog_generation=found.generation)
            return
        first, last = asked.removeprefix("bytes=").split("-")
        start = int(first) if first else max(total - int(last), 0)
        end = min(int(last) + 1, total) if first and last else total
        if start >= end:
            self.answer(416, Content_Range=f"bytes */{total}")
            return
        where = f"bytes {start}-{end - 1}/{total}"
        self.answer(206, found.content[start:end], x_goog_generation=found.generation, Content_Range=where)
