"""A stand-in for the Hugging Face hub on this machine: huggingface_hub itself talks to it, over HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Models = dict[str, dict[str, bytes]]
"""Name of a model -> its files."""


class _Hub(BaseHTTPRequestHandler):
    models: Models
    places: list[str]

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, content: bytes | dict[str, object], **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(200)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?(?:\?.*)?", self.path):
            files = self.models.get(found[1])
            if files is None:
                return self.refuse("RepoNotFound")
            named = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
            rest = {"private": False, "downloads": 0, "likes": 0, "tags": []}  # which clients of 2024 ask for
            return self.answer({"id": found[1], "sha": commit_of(files), "siblings": named, **rest})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/.*", self.path):
            files = self.models[found[1]]
            listed = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
            return self.answer(json.dumps(listed).encode())
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/([^?]+)", self.path):
            files = self.models.get(found[1], {})
            if found[2] not in files:
                return self.refuse("EntryNotFound")
            content = files[found[2]]
            return self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=commit_of(files))
        return self.refuse("RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.models.setdefault(name, {})
            return self.answer({"url": f"{self.places[0]}/{name}"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main(?:\?.*)?", self.path)
        if found is None:
            return self.refuse("RepoNotFound")
        if found[2] == "preupload":
            names = [each["path"] for each in json.loads(body)["files"]]
            told = [{"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for name in names]
            return self.answer({"files": told})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.models[found[1]][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        oid = commit_of(self.models[found[1]])
        return self.answer({"commitOid": oid, "commitUrl": f"{self.places[0]}/{found[1]}/commit/{oid}"})


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(b"".join(name.encode() + content for name, content in sorted(files.items()))).hexdigest()


@contextmanager
def hub() -> Iterator[tuple[str, Models]]:
    """Its address, and what is on it."""
    places: list[str] = []
    models: Models = {}
    handler = type("Hub", (_Hub,), {"models": models, "places": places})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        places.append(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield places[0], models
        finally:
            server.shutdown()
            thread.join()
