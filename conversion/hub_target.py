"""A branch of a repository on the Hub, and what a folder would change in it."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from conversion.redaction import redacted

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# What the Hub keeps as LFS whatever its size: the part of a new repository's .gitattributes that occurs here. The Hub
# decides in the end; a dry run only foretells it.
LFS_PATTERNS = ("*.safetensors", "*.onnx", "*.onnx_data", "*.png")
LARGEST_REGULAR = 10 * 2**20
# Of these nothing older may stay beside what is pushed, or readers would find parts of two models.
MANAGED = ("*.safetensors", "*.safetensors.index.json", "onnx/*", ".eval_results/*")

HINTS = {
    401: "Log in with `hf auth login`, or set HF_TOKEN.",
    403: "The token lacks the right to write there: make one that has it.",
    404: "There is no such repository, or the token may not see it.",
    429: "Too many requests: wait a while.",
}

State = Literal["new", "changed", "same", "deleted"]
T = TypeVar("T")


class PushError(RuntimeError):
    """The Hub did not take it. Nothing local is lost, and the same command goes on from there."""


@dataclass(frozen=True)
class PlannedFile:
    """One line of what a push does."""

    path: str
    """In the repository."""
    size: int
    """In bytes."""
    kind: Literal["lfs", "regular"]
    state: State


@dataclass(frozen=True)
class Pushed:
    """What came of a push."""

    url: str
    commit: str | None
    """Of the branch as it is now; None after a dry run."""
    files: tuple[PlannedFile, ...]
    card: str
    """Which card it got, and why."""

    @property
    def changed(self) -> tuple[PlannedFile, ...]:
        """What was, or in a dry run would be, sent or deleted."""
        return tuple(file for file in self.files if file.state != "same")


class Target:
    """A branch of a repository."""

    def __init__(self, api: HfApi, repo_id: str, revision: str, token: str | None) -> None:
        self.api, self.repo_id, self.revision, self.token = api, repo_id, revision, token
        self.url = f"{api.endpoint}/{repo_id}"

    def look(self, private: bool) -> Any:
        """What there is: the repository's info, or None.

        Raises:
            ValueError: for a public one that is to be private.
        """
        from huggingface_hub.errors import RepositoryNotFoundError

        info = self._call(self.api.model_info, self.repo_id, default_for=(RepositoryNotFoundError,))
        if info is not None and private and not info.private:
            raise ValueError(
                f"{self.url} is public already: make it private in its settings first, or leave out private."
            )
        return info

    def push(
        self,
        staged: Path,
        info: Any,
        why: str,
        private: bool,
        tag: str | None,
        create_pr: bool,
        message: str | None,
        dry_run: bool,
    ) -> Pushed:
        """What `look` has not refused: says what would change, and changes it unless it is a dry run."""
        files = self.plan(staged, info)
        self._check_tag(tag, info, files)
        if dry_run:
            return Pushed(self.url, None, files, why)
        self._call(self._validate_card, (staged / "README.md").read_text(encoding="utf-8"))
        if info is None:
            self._call(self.api.create_repo, self.repo_id, private=private or None, exist_ok=True)
        if self.revision != "main":
            self._call(self.api.create_branch, self.repo_id, branch=self.revision, exist_ok=True)
        commit = self._upload(staged, files, create_pr, message)
        if tag:
            self._call(self.api.create_tag, self.repo_id, tag=tag, revision=commit, exist_ok=True)
        return Pushed(self.url, commit, files, why)

    def plan(self, staged: Path, info: Any) -> tuple[PlannedFile, ...]:
        """Every file of the folder, and every one that has to leave the repository, with what happens to it."""
        there = self._there(info)
        files = []
        for path in sorted(path for path in staged.rglob("*") if path.is_file()):
            name, size = path.relative_to(staged).as_posix(), path.stat().st_size
            found = there.pop(name, None)
            if found is None:
                files.append(PlannedFile(name, size, _kind(name, size), "new"))
            else:
                same = found.size == size and _hash(path, found.lfs) == _remote_hash(found)
                files.append(PlannedFile(name, size, "lfs" if found.lfs else "regular", "same" if same else "changed"))
        for name, found in there.items():
            if any(fnmatch.fnmatch(name, pattern) for pattern in MANAGED):
                files.append(PlannedFile(name, found.size, "lfs" if found.lfs else "regular", "deleted"))
        return tuple(files)

    def _there(self, info: Any) -> dict[str, Any]:
        from huggingface_hub import RepoFile
        from huggingface_hub.errors import RevisionNotFoundError

        if info is None:
            return {}

        def tree() -> list[Any]:
            return list(self.api.list_repo_tree(self.repo_id, recursive=True, revision=self.revision))

        entries = self._call(tree, default_for=(RevisionNotFoundError,))
        if entries is None:  # a branch that will be made begins as main is
            entries = self._call(lambda: list(self.api.list_repo_tree(self.repo_id, recursive=True)))
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def _check_tag(self, tag: str | None, info: Any, files: tuple[PlannedFile, ...]) -> None:
        if tag is None or info is None:
            return
        refs = self._call(self.api.list_repo_refs, self.repo_id)
        tags = {ref.name: ref.target_commit for ref in refs.tags}
        heads = {ref.name: ref.target_commit for ref in refs.branches}
        unchanged = all(file.state == "same" for file in files)
        if tag in tags and not (unchanged and tags[tag] == heads.get(self.revision)):
            raise ValueError(f"The tag {tag!r} of {self.url} stands for another state: choose a new one.")

    def _validate_card(self, content: str) -> None:
        """The library checks the metadata on one of its two ways of uploading only."""
        from huggingface_hub.utils import get_session, hf_raise_for_status

        answer = get_session().post(
            f"{self.api.endpoint}/api/validate-yaml", json={"content": content, "repoType": "model"}
        )
        if answer.status_code == 400:
            found = [str(error.get("message")) for error in answer.json().get("errors", [])]
            raise ValueError(f"The Hub does not accept the card's metadata: {'; '.join(found)}")
        hf_raise_for_status(answer)

    def _upload(self, staged: Path, files: tuple[PlannedFile, ...], create_pr: bool, message: str | None) -> str:
        if all(file.state == "same" for file in files):
            return self._call(self.api.model_info, self.repo_id, revision=self.revision).sha
        deleted = [_literal(file.path) for file in files if file.state == "deleted"]
        done = self._call(
            self.api.upload_folder,
            repo_id=self.repo_id,
            folder_path=staged,
            revision=None if create_pr else self.revision,
            create_pr=create_pr,
            delete_patterns=deleted or None,
            commit_message=message or "Upload model",
        )
        if create_pr and done.pr_url:
            self.url = done.pr_url
        return done.oid

    def _call(self, call: Callable[..., T], *args: Any, default_for: tuple[type, ...] = (), **options: Any) -> T | None:
        """A call to the Hub; what it raises comes out as one sentence that cannot hold the token."""
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return call(*args, **options)
        except default_for:
            return None
        except ValueError as error:
            if not isinstance(error, HfHubHTTPError):
                failure: Exception = ValueError(redacted(str(error), self.token))
            else:
                failure = PushError(redacted(self._sentence(error), self.token))
        except Exception as error:  # of several HTTP libraries, and of hf_xet
            failure = PushError(redacted(self._sentence(error), self.token))
        # Outside of the block above, so that no traceback shows the first error, which may repeat what was sent.
        raise failure

    def _sentence(self, error: Exception) -> str:
        cause: BaseException = error
        while cause.__cause__ is not None and not hasattr(cause, "response"):  # "Error while uploading ..." from it
            cause = cause.__cause__
        answer = getattr(cause, "response", None)
        if answer is None:
            said = next((line.strip() for line in str(cause).splitlines() if line.strip()), "no message")
            what = f"{type(cause).__name__}, {said.rstrip('.')}."
        else:
            said = getattr(cause, "server_message", None) or answer.reason_phrase
            what = f"the Hub answered {answer.status_code}, {said.rstrip('.')}. {HINTS.get(answer.status_code, '')}"
        return f"{self.url}: {what.strip()} What has arrived is kept: push again."


def _kind(name: str, size: int) -> Literal["lfs", "regular"]:
    large = size > LARGEST_REGULAR or any(fnmatch.fnmatch(name, pattern) for pattern in LFS_PATTERNS)
    return "lfs" if large else "regular"


def _hash(path: Path, lfs: Any) -> str:
    """As the Hub knows the file: its SHA-256 under LFS, its git id otherwise."""
    from huggingface_hub.utils import sha

    if not lfs:
        return sha.git_hash(path.read_bytes())
    with path.open("rb") as file:
        return sha.sha_fileobj(file).hex()


def _remote_hash(found: Any) -> str:
    return found.lfs.sha256 if found.lfs else found.blob_id


def _literal(path: str) -> str:
    """A glob pattern for one path."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in path)
