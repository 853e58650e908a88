"""A stand-in for the Hugging Face hub on loopback: one model of several revisions, and what is pushed to it."""

import base64
import hashlib
import http.server
import json
import re
import threading
from contextlib import contextmanager
from pathlib import Path


class Hub:
    """Content of the stand-in, and the requests that it saw."""

    def __init__(self):
        self.revisions: dict[str, dict[str, bytes]] = {}
        """Files of the model by revision."""
        self.pushed: dict[str, bytes] = {}
        """Files of the last commit."""
        self.created: list[dict] = []
        """Requests to create a model."""
        self.served: list[str] = []
        """File and range of each download."""
        self.cut_after: int | None = None
        """Bytes after which downloads of a larger file break off; the rest is then refused."""
        self.address = ""

    def commit(self, revision):
        return hashlib.sha1(revision.encode()).hexdigest()

    def named(self, revision):
        """The revision of a name or of a commit's hash."""
        return next((name for name in self.revisions if revision in (name, self.commit(name))), None)


@contextmanager
def serving(name: str):
    """Yield a `Hub` that serves the model `name`."""
    hub = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def reply(self, body, status=200, **headers):
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for key, value in ({"Content-Length": len(body)} | headers).items():
                self.send_header(key.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def missing(self, code):
            self.reply({"error": code}, 404, X_Error_Code=code)

        def do_GET(self):
            path = self.path.partition("?")[0]
            if not path.startswith((f"/api/models/{name}", f"/{name}/")):
                return self.missing("RepoNotFound")
            asked = re.search(r"/(?:revision|tree|resolve)/([^/]+)", path)
            revision = hub.named(asked[1] if asked else "main")
            if revision is None:
                return self.missing("RevisionNotFound")
            files, commit = hub.revisions[revision], hub.commit(revision)
            if "/tree/" in path:
                entries = [{"type": "file", "path": file, "size": len(files[file]), "oid": file} for file in files]
                return self.reply(entries)
            if "/resolve/" in path:
                return self.file(path.rpartition(f"/resolve/{asked[1]}/")[2], files, commit)
            siblings = [{"rfilename": file} for file in files]
            return self.reply({"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": []})

        do_HEAD = do_GET

        def file(self, file, files, commit):
            if file not in files:
                return self.missing("EntryNotFound")
            content, about = (
                files[file],
                {"ETag": f'"{hashlib.sha256(files[file]).hexdigest()}"', "X_Repo_Commit": commit},
            )
            begin = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(begin[1]) if begin else 0
            if self.command == "GET":
                hub.served.append(f"{file}@{start}")
            if begin:
                about["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            if self.command == "GET" and hub.cut_after is not None and len(content) > hub.cut_after:
                if begin:
                    return self.missing("EntryNotFound")
                self.send_response(200)
                for key, value in ({"Content_Length": len(content)} | about).items():
                    self.send_header(key.replace("_", "-"), str(value))
                self.end_headers()
                self.wfile.write(content[: hub.cut_after])
                self.wfile.flush()
                self.close_connection = True
                return None
            return self.reply(content[start:], 206 if begin else 200, **about)

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Authorization") != "Bearer secret-token":
                return self.reply({"error": "Invalid username or password."}, 401)
            if self.path.endswith("/repos/create"):
                hub.created.append(json.loads(body))
                return self.reply({"url": f"{hub.address}/{name}", "name": name, "id": name})
            if "/preupload/" in self.path:
                files = [
                    {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                    for each in json.loads(body)["files"]
                ]
                return self.reply({"files": files})
            if "/commit/" in self.path:
                lines = [json.loads(line) for line in body.splitlines()]
                hub.pushed = {
                    line["value"]["path"]: base64.b64decode(line["value"]["content"])
                    for line in lines
                    if line["key"] == "file"
                }
                commit = hub.commit("pushed")
                url = f"{hub.address}/{name}/commit/{commit}"
                return self.reply({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})
            return self.reply({"errors": [], "warnings": []})

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def files_of(folder: Path) -> dict[str, bytes]:
    """Content of each file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
