"""A model folder -> a page of the Hugging Face Hub that people can use.

python -m conversion.push runs/quickstart/nano/model user/m2-encoder-nano --dry-run
python -m conversion.push runs/quickstart/nano/model user/m2-encoder-nano --results results.json --cosines cosines.json
python -m conversion.push m2-encoder-0.4B user/m2-encoder-0.4b --private --tag v1

What goes is put together in a folder of its own (links to the weights, the card, `.eval_results`, the endpoint's
handler), looked through, and loaded by another process as its users will. Running it again sends what is not there yet,
which is nothing if nothing changed. The token comes from HF_TOKEN or `hf auth login`; it is on no command line, and
whatever is printed or raised here has it taken out.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conversion.hub_contents import read_contents, refuse_secret
from conversion.hub_target import Pushed, PushError, Target
from conversion.load_check import check_loads
from conversion.redaction import redacted_logs

CARDS_FOLDER = Path(__file__).parents[1] / "model_cards"
# Git allows somewhat more; the Hub refuses a tag only after the upload.
REF_NAME = re.compile(r"(?!.*(\.\.|//|/\.|\.lock(/|$)))[A-Za-z0-9_][\w./-]*(?<![./])", re.ASCII)


def push(
    folder: str | Path,
    repo_id: str,
    *,
    size: str = "auto",
    results: str | Path | None = None,
    cosines: str | Path | None = None,
    private: bool = False,
    revision: str = "main",
    tag: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    dry_run: bool = False,
    load_check: bool = True,
    token: str | None = None,
) -> Pushed:
    """Publishes a model folder, which is left as it is.

    Args:
        folder: as training and conversion write it, with `onnx/` if it was exported.
        repo_id: NAMESPACE/NAME; created if it does not exist.
        size: whose card it gets, see `conversion.card.render_card`, as for `results` and `cosines`.
        private: create it as a private one. One that is public is refused then.
        revision: the branch; created from main if it does not exist.
        tag: a tag for what is there in the end; one that stands for something else is refused.
        create_pr: open a pull request against main instead of committing to it.
        message: of the commit.
        dry_run: only say what would go; neither the Hub nor the folder is changed.
        load_check: load what goes in another process first. Needs memory for the whole model.
        token: of the Hub, with the right to write; by default HF_TOKEN or the one of `hf auth login`.

    Raises:
        ValueError: for a folder that is not fit to be published, and for arguments that do not fit each other or the
            repository; nothing is sent then.
        PushError: when the Hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no id of a repository: {error}") from None
    if repo_id.count("/") != 1:
        raise ValueError(f"Name the repository with its namespace, as in user/{repo_id}, not {repo_id!r}.")
    for name in filter(None, (revision, tag)):
        if not REF_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a branch or tag: letters, digits and . _ - / are, as in v1.0.")
    if create_pr and revision != "main":
        raise ValueError(f"A pull request is opened against main: leave out either it or revision {revision!r}.")
    if create_pr and tag:
        raise ValueError("What is only proposed cannot have a tag: leave out either create_pr or tag.")
    token = token or get_token()
    api = HfApi(token=token or False)
    with redacted_logs(token), _staged(Path(folder), repo_id, size, results, cosines, token) as (staged, why):
        target = Target(api, repo_id, revision, token)
        info = target.look(private)  # first, since loading takes a while and the Hub may refuse
        if load_check:
            check_loads(staged)
        return target.push(staged, info, why, private, tag, create_pr, message, dry_run)


# ---- What goes


@contextmanager
def _staged(
    folder: Path, repo_id: str, size: str, results: Any, cosines: Any, token: str | None
) -> Iterator[tuple[Path, str]]:
    """A folder that holds what goes, and which card it has. It vanishes in the end."""
    from conversion.card import render_card

    contents = read_contents(folder, token=token)
    page = render_card(folder, repo_id, size=size, results=results, cosines=cosines)
    with _beside(folder) as staged:
        for name, path in contents.files.items():
            _link(path, staged / name)
        added = {"README.md": page.readme.encode(), **{name: text.encode() for name, text in page.eval_results.items()}}
        for name in ("handler.py", "requirements.txt"):
            if (CARDS_FOLDER / name).is_file():
                added[name] = (CARDS_FOLDER / name).read_bytes()
        if page.example:
            added[page.example.name] = page.example.read_bytes()
        for name, content in added.items():
            refuse_secret(name, content, token)
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            (staged / name).write_bytes(content)
        yield staged, page.why


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A new folder on the same disk, so that weights need not be copied; elsewhere if there it cannot be made."""
    try:
        made = Path(tempfile.mkdtemp(prefix=".push.", dir=folder.resolve().parent))
    except OSError:
        made = Path(tempfile.mkdtemp(prefix="m2-encoder-push."))
    try:
        staged = made / "model"
        staged.mkdir()
        yield staged
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _link(source: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), place)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, place)


# ---- Command line


def _parser() -> argparse.ArgumentParser:
    from conversion.card import add_card_options

    parser = argparse.ArgumentParser(
        prog="python -m conversion.push", description="Publish a model folder on the Hugging Face Hub."
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="a model folder, as training and conversion write it")
    add("repo_id", metavar="REPO_ID", help="NAMESPACE/NAME; created if it does not exist")
    add_card_options(parser)
    add("--private", action="store_true", help="create it as a private repository")
    add("--revision", default="main", metavar="BRANCH", help="the branch (default: %(default)s)")
    add("--tag", metavar="NAME", help="tag the result")
    add("--create-pr", action="store_true", help="open a pull request instead of committing to main")
    add("--message", metavar="TEXT", help="of the commit")
    add("--dry-run", action="store_true", help="only list what would go")
    add(
        "--no-load-check",
        dest="load_check",
        action="store_false",
        help="do not load the model in another process first",
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    """The command line; a mistake of the user, and a refusal of the Hub, is one line on stderr and exit status 1."""
    args = _parser().parse_args(arguments)
    options = {name: value for name, value in vars(args).items() if name not in ("folder", "repo_id")}
    # `kill` becomes an exception, so that the folder of links vanishes.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        done = push(args.folder, args.repo_id, **options)
    except (ValueError, OSError, PushError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: what has arrived is kept; the same command goes on from there")
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"Card: {done.card}.")
    for file in done.files:
        print(f"{file.state:<8} {file.kind:<8} {file.size:>14,}  {file.path}")
    size = sum(file.size for file in done.changed if file.state != "deleted")
    what = f"{len(done.changed)} of {len(done.files)} files, {size:,} bytes"
    if args.dry_run:
        print(f"Would send to {done.url}: {what}.")
    elif done.changed:
        print(f"Sent to {done.url}: {what}; commit {done.commit}.")
    else:
        print(f"{done.url} has it all already: commit {done.commit}.")


if __name__ == "__main__":
    main()
