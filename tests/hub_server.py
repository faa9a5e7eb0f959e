"""The HTTP side of `tests.hub_double`: one handler a connection, and the table of its routes at the end."""

from __future__ import annotations

import base64
import json
import re
import secrets
import socket
import struct
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

import yaml

from tests.hub_card_rules import FRONT_MATTER, validate_card
from tests.hub_store import Commit, File, HubError, Repo

if TYPE_CHECKING:
    from tests.hub_double import HubDouble

KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
ID = r"(?P<id>[\w.-]+/[\w.-]+)"
API = rf"/api/(?P<kind>models|datasets|spaces)/{ID}"
GIT = rf"/(?:(?P<kind>datasets|spaces)/)?{ID}"


class _Gone(Exception):
    """The Hub has died: no answer at all."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    hub: HubDouble
    protocol_version = "HTTP/1.1"
    wbufsize = 65536

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        self.query = urllib.parse.parse_qs(url.query)
        # A revision such as refs%2Fpr%2F1 is one segment, as long as it is quoted.
        path = url.path
        self.unread = True
        try:
            if self.hub.dead:
                raise _Gone
            self.hub.log.append((self.command, urllib.parse.unquote(path)))
            self._answer(path)
        except _Gone:
            self._cut()
        except HubError as error:
            self._refuse(error)
        except (ConnectionError, BrokenPipeError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do

    def _answer(self, path: str) -> None:
        fault = self.hub.take_fault(self.command, path)
        if fault:
            message = fault.message.replace("{token}", self.headers.get("Authorization", "").removeprefix("Bearer "))
            return self._json({"error": message}, fault.status, {"X-Error-Message": message, **fault.headers})
        for method, pattern, handle in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and method == self.command:
                parts = {name: urllib.parse.unquote(value) for name, value in found.groupdict().items() if value}
                return handle(self, **parts)
        raise HubError(404, f"Nothing at {self.command} {path}")

    # ---- Who asks, and what for

    def role(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        role = self.hub.tokens.get(header.removeprefix("Bearer "))
        if role is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return role

    def repo_for(self, kind: str, repo_id: str, write: bool = False) -> Repo:
        role, repo = self.role(), self.hub.store.repos.get((KINDS[kind], repo_id))
        if repo is None or (repo.private and role is None):
            raise HubError(401 if role is None else 404, "Repository not found", "RepoNotFound")
        if write:
            self.need_write()
        return repo

    def need_write(self) -> None:
        role = self.role()
        if role is None:
            raise HubError(401, "Invalid username or password.")
        if role != "write":
            raise HubError(403, "You have read access but not the required permissions for this operation")

    # ---- Repositories

    def create(self) -> None:
        self.need_write()
        body = self._body_json()
        repo_id = f"{body.get('organization') or 'user'}/{body['name']}"
        private = body.get("private") or body.get("visibility") == "private"
        kind = body.get("type") or "model"
        prefix = "" if kind == "model" else f"{kind}s/"
        answer = {"url": f"{self.hub.url}/{prefix}{repo_id}", "name": repo_id, "id": repo_id}
        with self.hub.lock:
            if (kind, repo_id) in self.hub.store.repos:  # the client wants the address of the one that is there
                return self._json({**answer, "error": f"You already created this {kind} repo"}, 409)
            self.hub.store.create(kind, repo_id, bool(private))
        self._json(answer)

    def delete(self) -> None:
        self.need_write()
        body = self._body_json()
        key = (body.get("type") or "model", f"{body.get('organization') or 'user'}/{body['name']}")
        if self.hub.store.repos.pop(key, None) is None:
            raise HubError(404, "Repository not found", "RepoNotFound")
        self._json({})

    def settings(self, kind: str, id: str) -> None:
        repo, body = self.repo_for(kind, id, write=True), self._body_json()
        if "visibility" in body or "private" in body:
            repo.private = body.get("visibility") == "private" or body.get("private") is True
        self._json({"private": repo.private})

    def whoami(self) -> None:
        role = self.role()
        if role is None:
            raise HubError(401, "Invalid username or password.")
        self._json({"type": "user", "name": "user", "orgs": [], "auth": {"accessToken": {"role": role}}})

    def auth_check(self, kind: str, id: str, write: str = "") -> None:
        self.repo_for(kind, id, write=bool(write))
        self._json({})

    def info(self, kind: str, id: str, rev: str = "main") -> None:
        repo = self.repo_for(kind, id)
        commit, blobs = repo.resolve(rev), "blobs" in self.query
        card = self._card(commit)
        self._json(
            {
                "_id": id, "id": id, "modelId": id, "author": id.partition("/")[0], "sha": commit.oid,
                "private": repo.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0,
                "createdAt": repo.history("main")[-1].date, "lastModified": commit.date, "cardData": card,
                "tags": card.get("tags", []), "pipeline_tag": card.get("pipeline_tag"),
                "library_name": card.get("library_name"),
                "siblings": [{"rfilename": p, **(self._file(p, f, "blobId") if blobs else {})}
                             for p, f in commit.files.items()],
            }
        )  # fmt: skip

    def _card(self, commit: Commit) -> dict[str, Any]:
        readme = commit.files.get("README.md")
        found = FRONT_MATTER.search(self.hub.store.blob(readme).read_text()) if readme else None
        return (yaml.safe_load(found[1]) if found else None) or {}

    def _file(self, path: str, file: File, id_key: str = "oid") -> dict[str, Any]:
        lfs = {"oid": file.oid, "sha256": file.oid, "size": file.size, "pointerSize": len(file.pointer())}
        return {"type": "file", "path": path, id_key: file.blob_id, "size": file.size,
                **({"lfs": lfs} if file.lfs else {})}  # fmt: skip

    def _entries(self, repo: Repo, commit: Commit, paths: list[str], expand: bool) -> list[dict[str, Any]]:
        """Of files and folders; those that do not exist are left out."""
        entries = []
        for path in paths:
            if path in commit.files:
                entries.append(self._file(path, commit.files[path]))
            elif any(name.startswith(f"{path}/") for name in commit.files):
                entries.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
            else:
                continue
            if expand:
                last = repo.last_change(commit, path)
                entries[-1]["lastCommit"] = {"id": last.oid, "title": last.title, "date": last.date}
        return entries

    def tree(self, kind: str, id: str, rev: str, path: str = "") -> None:
        repo = self.repo_for(kind, id)
        commit, head = repo.resolve(rev), f"{path}/" if path else ""
        below = [name for name in commit.files if name.startswith(head)]
        if path and not below:
            raise HubError(404, f"{path} does not exist on {rev}", "EntryNotFound")
        paths = dict.fromkeys(
            head + "/".join(parts[: i + 1])
            for name in below
            for parts in [name[len(head) :].split("/")]
            for i in range(len(parts) if self._flag("recursive") else 1)
        )
        self._json(self._entries(repo, commit, list(paths), self._flag("expand")))

    def paths_info(self, kind: str, id: str, rev: str) -> None:
        repo, form = self.repo_for(kind, id), urllib.parse.parse_qs(self._body().decode())
        expand = form.get("expand", ["false"])[0].lower() == "true"
        paths = [path.rstrip("/") for path in form.get("paths", [])]
        self._json(self._entries(repo, repo.resolve(rev), paths, expand))

    def refs(self, kind: str, id: str) -> None:
        repo = self.repo_for(kind, id)
        groups: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        names = {"heads": "branches", "tags": "tags", "pr": "pullRequests"}
        for ref, oid in repo.refs.items():
            group, name = ref.split("/", 2)[1:]
            groups[names[group]].append({"name": name, "ref": ref, "targetCommit": oid})
        self._json(groups)

    def history(self, kind: str, id: str, rev: str) -> None:
        commits = self.repo_for(kind, id).history(rev)
        self._json([{"id": c.oid, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": "user"}]}
                    for c in commits])  # fmt: skip

    def add_ref(self, kind: str, id: str, what: str, rev: str) -> None:
        """POST /branch/NAME, or /tag/REVISION with the tag's name in the body."""
        repo, body = self.repo_for(kind, id, write=True), self._body_json()
        name, start = (rev, body.get("startingPoint", "main")) if what == "branch" else (body["tag"], rev)
        ref = f"refs/{'heads' if what == 'branch' else 'tags'}/{name}"
        with self.hub.lock:
            if ref in repo.refs:
                raise HubError(409, f"Reference already exists: {ref}")
            repo.refs[ref] = repo.resolve(start).oid
        self._json({})

    def delete_ref(self, kind: str, id: str, what: str, rev: str) -> None:
        repo = self.repo_for(kind, id, write=True)
        if repo.refs.pop(f"refs/{'heads' if what == 'branch' else 'tags'}/{rev}", None) is None:
            raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        self._json({})

    def pull_request(self, kind: str, id: str) -> None:
        repo, body = self.repo_for(kind, id, write=True), self._body_json()
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
        repo.refs[f"refs/pr/{number}"] = repo.resolve("main").oid
        when = repo.resolve("main").date
        self._json(
            {
                "num": number, "title": body["title"], "status": body.get("status", "open"), "createdAt": when,
                "author": {"name": "user"}, "isPullRequest": True, "repo": {"name": id, "type": KINDS[kind]},
                "changes": {"base": "refs/heads/main"}, "events": [], "diff": "", "pullRequest": True,
            }
        )  # fmt: skip

    # ---- Uploads

    def preupload(self, kind: str, id: str, rev: str) -> None:
        repo = self.repo_for(kind, id, write=True)
        known, answer = repo.resolve(rev).files, []
        for one in self._body_json()["files"]:
            lfs = self.hub.store.is_lfs(repo, rev, one["path"], one["size"], base64.b64decode(one["sample"]))
            there = known.get(one["path"])
            answer.append({"path": one["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False,
                           "oid": there.oid if there else None})  # fmt: skip
        self._json({"files": answer})

    def lfs_batch(self, id: str, kind: str = "models") -> None:
        self.repo_for(kind, id, write=True)
        answer = []
        for one in self._body_json()["objects"]:
            entry = {"oid": one["oid"], "size": one["size"]}
            if not self.hub.store.has_lfs(one["oid"]):
                href = f"{self.hub.url}/_lfs/{one['oid']}?key={self.hub.upload_key}"
                entry["actions"] = {"upload": {"href": href, "header": {}}}
            answer.append(entry)
        self._json({"transfer": "basic", "objects": answer}, kind="application/vnd.git-lfs+json")

    def lfs_put(self, oid: str) -> None:
        if self.query.get("key") != [self.hub.upload_key]:
            raise HubError(403, "SignatureDoesNotMatch")

        def counted() -> Iterator[bytes]:
            for chunk in self._chunks():
                self.hub.count_lfs(len(chunk))
                if self.hub.dead:
                    raise _Gone
                yield chunk

        self.hub.store.put_lfs(oid, counted())
        self.hub.lfs_uploads.append(oid)
        self._json({})

    def xet_token(self, kind: str, id: str, rev: str) -> None:
        """Sends hf_xet to a folder instead of a server."""
        self.repo_for(kind, id, write=True)
        self.hub.xet_root.mkdir(exist_ok=True)
        self.hub.store.trusted = True
        self._json({"casUrl": f"local://{self.hub.xet_root}", "accessToken": "xet", "exp": 4102444800})

    def commit(self, kind: str, id: str, rev: str) -> None:
        repo = self.repo_for(kind, id, write=True)
        lines = [json.loads(line) for line in self._body().splitlines() if line.strip()]
        with self.hub.lock:
            number = None
            if self._flag("create_pr"):
                number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
                repo.refs[f"refs/pr/{number}"] = repo.resolve(rev).oid
                rev = f"refs/pr/{number}"
            commit = self.hub.store.commit(repo, rev, lines)
        where = f"{self.hub.url}/{id if kind == 'models' else f'{kind}/{id}'}"
        pull = f"{where}/discussions/{number}" if number else None
        self._json({"commitUrl": f"{where}/commit/{commit.oid}", "commitOid": commit.oid, "pullRequestUrl": pull})

    def validate(self) -> None:
        body = self._body_json()
        verdict = validate_card(body["content"], body.get("repoType", "model"))
        self._json(verdict, 400 if verdict["errors"] else 200)

    # ---- Downloads

    def resolve(self, id: str, rev: str, path: str, kind: str = "models") -> None:
        repo = self.repo_for(kind, id)
        commit, file = repo.file(rev, path)
        start, stop = 0, file.size
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            if wanted[1]:
                start, stop = int(wanted[1]), min(int(wanted[2] or file.size - 1) + 1, file.size)
            else:
                start = max(0, file.size - int(wanted[2]))
            if start >= stop:
                return self._send(416, b"", {"Content-Range": f"bytes */{file.size}", "X-Repo-Commit": commit.oid})
        headers = {
            "X-Repo-Commit": commit.oid,
            "ETag": f'"{file.oid}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(file.size)}
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{file.size}"
        with self.hub.store.blob(file).open("rb") as content:
            content.seek(start)
            self._send(206 if wanted else 200, content.read(stop - start), headers)

    # ---- HTTP

    def _flag(self, name: str) -> bool:
        return self.query.get(name, ["false"])[0].lower() in ("true", "1")

    def _chunks(self) -> Iterator[bytes]:
        self.unread = False
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return
        left = int(self.headers.get("Content-Length", 0))
        while left:
            chunk = self.rfile.read1(min(left, 2**16))
            if not chunk:
                raise ConnectionError("the client went away")
            left -= len(chunk)
            yield chunk

    def _body(self) -> bytes:
        return b"".join(self._chunks())

    def _body_json(self) -> dict[str, Any]:
        body = self._body()
        return json.loads(body) if body else {}

    def _refuse(self, error: HubError) -> None:
        headers = {"X-Error-Message": error.message, **({"X-Error-Code": error.code} if error.code else {})}
        self._json({"error": error.message}, error.status, headers)

    def _json(
        self, content: Any, status: int = 200, headers: dict[str, str] | None = None, kind: str = "application/json"
    ) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": kind, **(headers or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        if self.unread:  # or the rest of this request would be taken for the next one
            self._body()
        self.send_response(status)
        self.send_header("X-Request-Id", secrets.token_hex(8))
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _cut(self) -> None:
        """As when a machine goes down: reset, no answer."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


REV, PATH = r"(?P<rev>[^/]+)", r"(?P<path>.+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", "/api/repos/create", Handler.create),
    ("DELETE", "/api/repos/delete", Handler.delete),
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET", rf"{API}/auth-check(?P<write>/write)?", Handler.auth_check),
    ("PUT", rf"{API}/settings", Handler.settings),
    ("GET", rf"{API}", Handler.info),
    ("GET", rf"{API}/revision/{REV}", Handler.info),
    ("GET", rf"{API}/tree/{REV}(?:/{PATH})?", Handler.tree),
    ("POST", rf"{API}/paths-info/{REV}", Handler.paths_info),
    ("GET", rf"{API}/refs", Handler.refs),
    ("GET", rf"{API}/commits/{REV}", Handler.history),
    ("POST", rf"{API}/(?P<what>branch|tag)/{REV}", Handler.add_ref),
    ("DELETE", rf"{API}/(?P<what>branch|tag)/{REV}", Handler.delete_ref),
    ("POST", rf"{API}/discussions", Handler.pull_request),
    ("POST", rf"{API}/preupload/{REV}", Handler.preupload),
    ("GET", rf"{API}/xet-write-token/{REV}", Handler.xet_token),
    ("POST", rf"{API}/commit/{REV}", Handler.commit),
    ("POST", rf"{GIT}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/_lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_put),
    ("HEAD", rf"{GIT}/resolve/{REV}/{PATH}", Handler.resolve),
    ("GET", rf"{GIT}/resolve/{REV}/{PATH}", Handler.resolve),
]
