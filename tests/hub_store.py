"""The state behind `tests.hub_double`: repositories with refs and commits, and their files by content.

Blobs lie on disk by their hash, as on the Hub: small text by its git id, everything else (LFS) by its SHA-256.
"""

from __future__ import annotations

import base64
import datetime
import fnmatch
import hashlib
import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REGULAR_LIMIT = 10 * 2**20  # bytes; larger files are LFS whatever their name

# What the Hub puts into a new repository, shortened to the names that can occur here.
LFS_PATTERNS = (
    "*.7z *.arrow *.bin *.bz2 *.ckpt *.gz *.h5 *.model *.msgpack *.npy *.npz *.onnx *.parquet *.pickle *.pkl *.pt "
    "*.pth *.safetensors *.tar *.tar.* *.tgz *.wasm *.xz *.zip *.zst *tfevents*"
).split()
DATASET_LFS_PATTERNS = "*.png *.jpg *.jpeg *.webp *.gif *.wav *.mp3 *.mp4".split()


class HubError(Exception):
    """What the Hub answers instead: a status, its code for clients, and a sentence for people."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass(frozen=True)
class File:
    lfs: bool
    oid: str
    """The git id of a regular file, the SHA-256 of an LFS file."""
    size: int

    @property
    def blob_id(self) -> str:
        """The git id of what lies in git: the file, or the pointer to it."""
        return git_id(self.pointer()) if self.lfs else self.oid

    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.oid}\nsize {self.size}\n".encode()


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    message: str
    date: str
    files: dict[str, File]


@dataclass
class Repo:
    type: str
    id: str
    private: bool
    refs: dict[str, str] = field(default_factory=dict)
    """refs/heads/main, refs/tags/v1, refs/pr/1 -> commit."""
    commits: dict[str, Commit] = field(default_factory=dict)

    def resolve(self, revision: str) -> Commit:
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        for oid, commit in self.commits.items():
            if len(revision) >= 7 and oid.startswith(revision):
                return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def branch(self, revision: str) -> str:
        """The ref that a commit goes to."""
        for ref in (f"refs/heads/{revision}", revision):
            if ref in self.refs and not ref.startswith("refs/tags/"):
                return ref
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def file(self, revision: str, path: str) -> tuple[Commit, File]:
        commit = self.resolve(revision)
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        return commit, commit.files[path]

    def history(self, revision: str) -> list[Commit]:
        """Newest first."""
        found = [self.resolve(revision)]
        while found[-1].parent:
            found.append(self.commits[found[-1].parent])
        return found

    def last_change(self, commit: Commit, path: str) -> Commit:
        """The last commit that changed a file, or anything below a folder."""

        def below(one: Commit) -> dict[str, File]:
            return {name: file for name, file in one.files.items() if name == path or name.startswith(f"{path}/")}

        while commit.parent and below(self.commits[commit.parent]) == below(commit):
            commit = self.commits[commit.parent]
        return commit


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Store:
    """All repositories of one Hub."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.repos: dict[tuple[str, str], Repo] = {}
        self.trusted = False
        """Whether a commit may name content that came by Xet: it is kept, but cannot be downloaded from here."""
        for name in ("git", "lfs", "incoming"):
            (root / name).mkdir(parents=True, exist_ok=True)

    # ---- Blobs

    def blob(self, file: File) -> Path:
        return self.root / ("lfs" if file.lfs else "git") / file.oid

    def has_lfs(self, oid: str) -> bool:
        return (self.root / "lfs" / oid).is_file()

    def put_regular(self, content: bytes) -> File:
        oid = git_id(content)
        (self.root / "git" / oid).write_bytes(content)
        return File(False, oid, len(content))

    def put_lfs(self, oid: str, chunks: Iterable[bytes]) -> None:
        """Keeps the content only if it is complete and has that SHA-256."""
        sha, incoming = hashlib.sha256(), self.root / "incoming" / secrets.token_hex(8)
        with incoming.open("wb") as file:
            for chunk in chunks:
                sha.update(chunk)
                file.write(chunk)
        if sha.hexdigest() != oid:
            incoming.unlink()
            raise HubError(400, f"The content has the SHA-256 {sha.hexdigest()}, not {oid}.")
        incoming.replace(self.root / "lfs" / oid)

    def _lfs_size(self, value: dict[str, Any]) -> int:
        path = self.root / "lfs" / value["oid"]
        return path.stat().st_size if path.is_file() else value["size"]

    # ---- Repositories

    def create(self, kind: str, repo_id: str, private: bool) -> Repo:
        repo = self.repos[kind, repo_id] = Repo(kind, repo_id, private)
        patterns = LFS_PATTERNS + (DATASET_LFS_PATTERNS if kind == "dataset" else [])
        attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in patterns)
        self._add(repo, "refs/heads/main", {".gitattributes": self.put_regular(attributes.encode())}, "initial commit")
        return repo

    def is_lfs(self, repo: Repo, revision: str, path: str, size: int, sample: bytes) -> bool:
        """By .gitattributes, by size, and for whatever is not text."""
        attributes = repo.resolve(revision).files.get(".gitattributes")
        lines = self.blob(attributes).read_text().splitlines() if attributes else []
        patterns = [line.split()[0] for line in lines if "filter=lfs" in line]
        named = any(fnmatch.fnmatch(name, p) for p in patterns for name in (path, path.rsplit("/", 1)[-1]))
        return named or size > REGULAR_LIMIT or b"\0" in sample

    def commit(self, repo: Repo, revision: str, lines: Iterable[dict[str, Any]]) -> Commit:
        """Applies what `/commit` gets: a header, and one operation a line; all of them or none."""
        ref = repo.branch(revision)
        files, header = dict(repo.commits[repo.refs[ref]].files), {"summary": "", "description": ""}
        for line in lines:
            kind, value = line["key"], line["value"]
            if kind == "header":
                header = value
                parent = value.get("parentCommit")
                if parent and not repo.refs[ref].startswith(parent):
                    raise HubError(412, f"Parent commit is not {parent}, the branch has moved on.")
            elif kind == "file":
                files[value["path"]] = self.put_regular(decode(value))
            elif kind == "lfsFile":
                if not self.has_lfs(value["oid"]) and not self.trusted:
                    raise HubError(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                size = self._lfs_size(value)
                if value.get("size", size) != size:
                    raise HubError(400, f"{value['path']} has {size} bytes, not {value['size']}.")
                files[value["path"]] = File(True, value["oid"], size)
            elif kind in ("deletedFile", "deletedFolder"):
                gone = [n for n in files if n == value["path"] or n.startswith(value["path"].rstrip("/") + "/")]
                if not gone:
                    raise HubError(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")
                for name in gone:
                    del files[name]
            else:
                raise HubError(400, f"Unknown operation {kind}")
        return self._add(repo, ref, files, header["summary"], header.get("description", ""))

    def _add(self, repo: Repo, ref: str, files: dict[str, File], title: str, message: str = "") -> Commit:
        now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        parent = repo.refs.get(ref)
        content = [parent, title, message, len(repo.commits), {n: f.oid for n, f in sorted(files.items())}]
        oid = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        repo.commits[oid] = Commit(oid, parent, title, message, now, dict(sorted(files.items())))
        repo.refs[ref] = oid
        return repo.commits[oid]


def decode(value: dict[str, str]) -> bytes:
    if value.get("encoding") == "base64":
        return base64.b64decode(value["content"], validate=True)
    return value["content"].encode()
