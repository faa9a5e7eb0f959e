"""A Hugging Face Hub on 127.0.0.1, for tests: what huggingface_hub, transformers and datasets speak, over real HTTP.

    with HubDouble(tmp_path / "hub") as hub:
        subprocess.run([...], env=hub.environment(tmp_path / "home"))    # HF_ENDPOINT and HF_TOKEN point to it
        hub.files("user/model")["config.json"]                           # what arrived, as bytes

The libraries read HF_ENDPOINT when they are imported: give `endpoint=hub.url` to a function of this process, or start
another one. Served are model, dataset and space repositories: creation, preupload, LFS, commits, branches, tags, pull
requests, trees, downloads with ranges, and the check of a card's metadata. Faults can be injected.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path

from tests.hub_server import Handler
from tests.hub_store import Commit, Repo, Store


@dataclass
class Fault:
    """What a matching request gets instead of its answer, so many times."""

    pattern: re.Pattern[str]
    method: str | None
    status: int
    times: int
    message: str
    headers: dict[str, str]


class HubDouble:
    """A running Hub, on a free port; a context manager.

    Args:
        root: a folder for its blobs.
        token: may read and write everything; its user is called "user".
        read_token: may read private repositories and write none.
    """

    def __init__(self, root: Path, token: str = "hf_dummy", read_token: str = "hf_dummy_read") -> None:
        self.store = Store(root)
        self.xet_root = root / "xet"
        """Where hf_xet puts what it uploads, in its own form (see `Store.trusted`)."""
        self.tokens = {token: "write", read_token: "read"}
        self.token = token
        self.log: list[tuple[str, str]] = []
        """(method, path without query) of every request, also of those that were refused."""
        self.lfs_uploads: list[str] = []
        """SHA-256 of every LFS object that was received completely, in that order."""
        self.lfs_bytes = 0
        """Bytes of LFS objects received, also of those that were cut off."""
        self.dead = False
        self.lock = threading.RLock()
        self.upload_key = secrets.token_hex(8)  # stands for the signature of upload addresses
        self._faults: list[Fault] = []
        self._dies_at: int | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubDouble:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    # ---- What tests look at

    def repo(self, repo_id: str, repo_type: str = "model") -> Repo:
        return self.store.repos[repo_type, repo_id]

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """path -> content, without the `.gitattributes` that every repository starts with."""
        tree = self.repo(repo_id, repo_type).resolve(revision).files
        return {path: self.store.blob(file).read_bytes() for path, file in tree.items() if path != ".gitattributes"}

    def commits(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> list[Commit]:
        """Newest first; the last one is the empty repository's."""
        return self.repo(repo_id, repo_type).history(revision)

    def requests(self, method: str, pattern: str) -> list[str]:
        """The paths of the log that match."""
        return [path for seen, path in self.log if seen == method and re.search(pattern, path)]

    def environment(self, home: Path, token: str | None = "hf_dummy", **more: str) -> dict[str, str]:
        """For a process that is to see this Hub and nothing else; its caches lie below `home`."""
        proxies = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
        ours = ("HF_", "HUGGING", "TRANSFORMERS_")
        kept = {
            name: value
            for name, value in os.environ.items()
            if name.lower() not in proxies and not name.startswith(ours)
        }
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "*",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **({"HF_TOKEN": token} if token else {}),
            **more,
        }

    # ---- Faults

    def fail(
        self,
        pattern: str,
        status: int = 500,
        times: int = 1,
        *,
        method: str | None = None,
        message: str = "injected fault",
        headers: dict[str, str] | None = None,
    ) -> None:
        """The next `times` requests whose path matches get this status; in `message`, {token} is the token sent."""
        self._faults.append(Fault(re.compile(pattern), method, status, times, message, headers or {}))

    def die_after(self, lfs_bytes: int) -> None:
        """Cuts every connection once so many further bytes of LFS objects have come, until `revive`."""
        self._dies_at = self.lfs_bytes + lfs_bytes

    def revive(self) -> None:
        """Ends every fault."""
        self.dead, self._dies_at = False, None
        self._faults.clear()

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self._faults:
                if fault.times > 0 and fault.method in (None, method) and fault.pattern.search(path):
                    fault.times -= 1
                    return fault
        return None

    def count_lfs(self, number: int) -> None:
        with self.lock:
            self.lfs_bytes += number
            if self._dies_at is not None and self.lfs_bytes >= self._dies_at:
                self.dead = True
