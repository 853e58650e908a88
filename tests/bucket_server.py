"""A stand-in for Google Cloud Storage on loopback: one bucket, by the part of the JSON API that reading it takes."""

import base64
import hashlib
import http.server
import json
import re
import threading
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


class Bucket:
    """Content of the stand-in, and the requests that it saw."""

    def __init__(self, name: str):
        self.name = name
        self.objects: dict[str, tuple[bytes, int]] = {}
        """Content and generation of each object."""
        self.served: list[str] = []
        """Name of the object of each download."""
        self.forbidden = False
        """Refuse everything, as to somebody who has not logged in."""
        self.cut_after: int | None = None
        """Bytes after which downloads of a larger object end, as if the object had no more."""
        self.before_download = lambda name: None
        """Called before each download."""
        self.address = ""

    def put(self, name: str, content: bytes) -> None:
        """Upload an object."""
        self.objects[name] = (content, 1 + max((generation for _, generation in self.objects.values()), default=0))

    def upload(self, folder: Path, prefix: str) -> None:
        """Upload the files below a folder."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder)}", path.read_bytes())

    def about(self, name: str) -> dict[str, str]:
        """The object's resource."""
        content, generation = self.objects[name]
        md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
        return {
            "kind": "storage#object",
            "bucket": self.name,
            "name": name,
            "size": str(len(content)),
            "generation": str(generation),
            "md5Hash": md5,
            "etag": f"e{generation}",
        }


@contextmanager
def serving(name: str, page: int = 3):
    """Yield a `Bucket` of that name that is served; its listings come in pages of `page` objects."""
    bucket = Bucket(name)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def reply(self, body, status=200):
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def refuse(self, status, message):
            self.reply({"error": {"code": status, "message": message}}, status)

        def do_GET(self):
            url = urlsplit(self.path)
            found = re.fullmatch(r"(/download)?/storage/v1/b/([^/]+)/o(?:/([^/]+))?", url.path)
            download, where, name = found.groups()
            if bucket.forbidden:
                return self.refuse(401, "Anonymous caller does not have storage.objects.list access to the bucket.")
            if where != bucket.name:
                return self.refuse(404, "The specified bucket does not exist.")
            if name is None:
                return self.listing({key: values[0] for key, values in parse_qs(url.query).items()})
            if (name := unquote(name)) not in bucket.objects:
                return self.refuse(404, f"No such object: {where}/{name}")
            if not download:
                return self.reply(bucket.about(name))
            bucket.before_download(name)
            bucket.served.append(name)
            return self.reply(bucket.objects[name][0][: bucket.cut_after])

        def listing(self, query):
            assert "delimiter" not in query or not query["delimiter"]  # all objects below a prefix are asked for
            names = sorted(each for each in bucket.objects if each.startswith(query.get("prefix", "")))
            start = int(query.get("pageToken", 0))
            more = {"nextPageToken": str(start + page)} if start + page < len(names) else {}
            items = [bucket.about(each) for each in names[start : start + page]]
            return self.reply({"kind": "storage#objects", "items": items} | more)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    bucket.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield bucket
    finally:
        server.shutdown()
        server.server_close()
