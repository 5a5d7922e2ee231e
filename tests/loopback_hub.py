"""
A Hub on loopback for tests: what `huggingface_hub` needs to make a repository, upload files (LFS included), commit, and read
them back. `LoopbackHub().url` is the `HF_ENDPOINT` of the process that is tested; `repos` holds what arrived.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".png")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class LoopbackHub:
    """
    Attributes:
        repos (`dict[str, dict[str, bytes]]`): By repository, the files by their path.
        requests (`list[tuple[str, str]]`): Method and path of every request.
        strangers (`list[str]`): Paths that nothing here answers.
        tokens (`set[str]`): The tokens that were sent.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.requests: list[tuple[str, str]] = []
        self.strangers: list[str] = []
        self.tokens: set[str] = set()
        self.objects: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                hub.answer(self, "POST")

            def do_PUT(self) -> None:
                hub.answer(self, "PUT")

            def do_GET(self) -> None:
                hub.answer(self, "GET")

            def do_HEAD(self) -> None:
                hub.answer(self, "HEAD")

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, method: str) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(request.path).path)
        self.requests.append((method, path))
        if token := request.headers.get("Authorization"):
            self.tokens.add(token.removeprefix("Bearer "))
        status, headers, data = self._route(method, path, body)
        request.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "X-Repo-Commit": COMMIT, **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        if method != "HEAD":
            request.wfile.write(data)

    def _route(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        def as_json(value: object, status: int = 200) -> tuple[int, dict[str, str], bytes]:
            return status, {"Content-Type": "application/json"}, json.dumps(value).encode()

        if path == "/api/whoami-v2":
            return as_json({"type": "user", "name": "me", "orgs": [], "auth": {"type": "access_token"}})
        if path == "/api/validate-yaml":
            return as_json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.private[name] = bool(asked.get("private"))
            self.repos.setdefault(name, {})
            return as_json({"url": f"{self.url}/{name}", "name": name})
        if path.startswith("/objects/"):
            self.objects[path.removeprefix("/objects/")] = body
            return 200, {}, b""
        if path.endswith("/info/lfs/objects/batch"):
            return as_json(
                {"transfer": "basic", "objects": [self._upload(one) for one in json.loads(body)["objects"]]}
            )
        if path.startswith("/api/models/"):
            owner, name, *rest = path.removeprefix("/api/models/").split("/")
            repo = f"{owner}/{name}"
            if repo not in self.repos:
                return as_json({"error": "Repository not found"}, 404)
            if rest[:1] == ["preupload"]:
                files = [
                    {"path": f["path"], "shouldIgnore": False, "uploadMode": self._mode(f["path"])}
                    for f in json.loads(body)["files"]
                ]
                return as_json({"files": files})
            if rest[:1] == ["commit"]:
                self._commit(repo, body)
                url = f"{self.url}/{repo}/commit/{COMMIT}"
                return as_json({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})
            if not rest or rest[0] == "revision":
                siblings = [{"rfilename": name} for name in self.repos[repo]]
                return as_json({"id": repo, "modelId": repo, "sha": COMMIT, "private": False, "siblings": siblings})
            if rest[0] == "tree":
                return as_json(
                    [{"type": "file", "path": n, "size": len(d), "oid": "0"} for n, d in self.repos[repo].items()]
                )
        owner, _, rest_of_path = path.lstrip("/").partition("/")
        name, _, tail = rest_of_path.partition("/resolve/")
        file = tail.partition("/")[2]
        data = self.repos.get(f"{owner}/{name}", {}).get(file)
        if data is not None:
            return 200, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'}, data
        if tail:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        self.strangers.append(f"{method} {path}")
        return 404, {}, b"not found"

    @staticmethod
    def _mode(path: str) -> str:
        return "lfs" if path.endswith(LFS_SUFFIXES) else "regular"

    def _upload(self, asked: dict) -> dict:
        if asked["oid"] in self.objects:  # known already: no action
            return {**asked, "authenticated": True}
        action = {"upload": {"href": f"{self.url}/objects/{asked['oid']}", "header": {}}}
        return {**asked, "authenticated": True, "actions": action}

    def _commit(self, repo: str, body: bytes) -> None:
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                data = self.objects[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"], "an LFS file whose hash is another one"
                self.repos[repo][value["path"]] = data
            elif entry["key"] == "deletedFile":
                self.repos[repo].pop(value["path"], None)
