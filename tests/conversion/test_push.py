"""Publishing against the Hub double: real HTTP, real processes. `tests/hub_double.py` is the Hub."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import _http
from safetensors.torch import load_file, save_file

from conversion.load_check import check_loads
from conversion.push import PushError, main, push
from modeling_m2encoder.hub_folder import save_hub_folder
from tests.hub_double import HubDouble

TOKEN = "hf_dummyDUMMYdummyDUMMYdummyDUMMYdummy"  # of the form of real ones
REPO = "user/m2-encoder-tiny"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(model, processor, tmp_path) -> Path:
    return save_hub_folder(model, processor, tmp_path / "run" / "model")


@pytest.fixture
def sharded(model, processor, tmp_path) -> Path:
    """Many files, of which a few are under way at the same time."""
    return save_hub_folder(model, processor, tmp_path / "sharded" / "model", max_shard_size="20KB")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that this process sees; waits between retries are skipped."""
    with HubDouble(tmp_path / "hub", token=TOKEN) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(_http.time, "sleep", lambda _: None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def publish(folder: Path, **options):
    return push(folder, REPO, size="trained", load_check=False, **options)


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    """path -> content and time of the last change, of all files."""
    files = {path for path in folder.rglob("*") if path.is_file()}
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def process(code: str, hub: HubDouble, tmp_path: Path, *arguments: str, token: str | None = TOKEN):
    """Runs Python that does not know of this project, with the double as its Hub."""
    environment = hub.environment(tmp_path / "home", token)
    command = [sys.executable, "-I", "-c", code, *arguments]
    return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)


# A user of the page: nothing of this project; the Hub's name first, then the folder that was pushed.
USER = """
import json, sys
sys.modules["modeling_m2encoder"] = None
import torch
from huggingface_hub import snapshot_download
from PIL import Image
from transformers import AutoModel, AutoProcessor

def embed(name):
    model = AutoModel.from_pretrained(name, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
    inputs = processor(text=["a red circle", "红色的圆"], images=Image.new("RGB", (50, 40), "red"), return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs)
    return output.text_embeds.tolist(), output.image_embeds.tolist()

name, folder = sys.argv[1:]
print(json.dumps([embed(name), embed(folder), snapshot_download(name)]))
"""


def test_what_is_pushed_is_what_another_process_loads_by_name(folder, model, processor, hub, tmp_path):
    before = tree(folder)
    done = push(folder, REPO, size="trained", tag="v1")
    assert tree(folder) == before and os.listdir(folder.parent) == ["model"]

    sent = hub.files(REPO)
    assert {file.path for file in done.files} == set(sent) and {file.state for file in done.files} == {"new"}
    assert {name: content for name, (content, _) in before.items()}.items() <= sent.items()
    assert set(sent) - set(before) == {"README.md", "handler.py", "requirements.txt"}
    assert done.commit == hub.commits(REPO)[0].oid == hub.repo(REPO).resolve("v1").oid
    assert not hub.repo(REPO).private

    pulled, local, snapshot = json.loads(process(USER, hub, tmp_path, REPO, str(folder)).stdout)
    assert {name: content for name, (content, _) in tree(Path(snapshot)).items() if name != ".gitattributes"} == sent
    assert pulled == local
    with torch.no_grad():
        expected = model(**processor(text=["a red circle", "红色的圆"], return_tensors="pt")).text_embeds
    assert torch.allclose(torch.tensor(pulled[0]), expected, atol=1e-6)


def test_a_second_push_sends_nothing(folder, hub):
    first = publish(folder)
    requests, uploads = len(hub.log), list(hub.lfs_uploads)
    second = publish(folder)
    assert second.commit == first.commit and not second.changed
    assert len(hub.commits(REPO)) == 2 and hub.lfs_uploads == uploads
    later = hub.log[requests:]
    assert {method for method, path in later if path != "/api/validate-yaml"} == {"GET"}


def test_a_changed_file_goes_alone_and_old_weights_leave(sharded, folder, hub):
    publish(sharded)
    uploads = len(hub.lfs_uploads)
    assert len([name for name in hub.files(REPO) if name.startswith("model-0")]) == uploads > 2
    done = publish(folder)
    states = {file.path: file.state for file in done.changed}
    assert states.pop("model.safetensors") == "new" and states.pop("README.md", "changed") == "changed"
    assert set(states.values()) == {"deleted"} and "model.safetensors.index.json" in states
    assert [name for name in hub.files(REPO) if "safetensors" in name] == ["model.safetensors"]
    assert len(hub.lfs_uploads) == uploads + 1 and len(hub.commits(REPO)) == 3


# ---- Interruptions


class Uploads(list):
    """A Hub's `lfs_uploads`, which does something when the second object has come."""

    def __init__(self, then: Callable[[], object]) -> None:
        self.then = then

    def append(self, oid: str) -> None:
        super().append(oid)
        if len(self) == 2:
            self.then()


def goes_on(sharded: Path, hub: HubDouble) -> None:
    """A push after one that stopped in the middle sends what is missing, and nothing twice."""
    shards = {path.name: path.read_bytes() for path in sharded.glob("model-*.safetensors")}
    before = list(hub.lfs_uploads)
    assert 2 <= len(before) < len(shards) and len(hub.commits(REPO)) == 1  # nothing is visible of the half
    publish(sharded)
    assert len(hub.lfs_uploads) == len(set(hub.lfs_uploads)) == len(shards)
    assert hub.lfs_uploads[: len(before)] == before
    assert shards.items() <= hub.files(REPO).items()


def test_an_upload_that_was_cut_off_goes_on_where_it_stopped(sharded, hub):
    hub.lfs_uploads = Uploads(lambda: hub.die_after(1))
    with pytest.raises(PushError, match="push again"):
        publish(sharded)
    assert hub.dead and os.listdir(sharded.parent) == ["model"]
    hub.revive()
    goes_on(sharded, hub)


def test_a_process_that_was_killed_is_followed_by_one_that_goes_on(sharded, hub, tmp_path):
    """SIGKILL, as of a machine that is lost: the first process can do nothing more."""
    command = [sys.executable, "-m", "conversion.push", str(sharded), REPO, "--size", "trained", "--no-load-check"]
    first = subprocess.Popen(command, env=hub.environment(tmp_path / "home", TOKEN), cwd=ROOT, stderr=subprocess.PIPE)
    hub.lfs_uploads = Uploads(first.kill)
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    goes_on(sharded, hub)


def test_a_commit_that_failed_needs_no_second_upload(folder, hub):
    hub.fail("/commit/", status=500)
    with pytest.raises(PushError, match="500"):
        publish(folder)
    publish(folder)
    assert len(hub.lfs_uploads) == 1 and len(hub.commits(REPO)) == 2


def test_uploads_by_xet_which_is_the_default_go_on_too(folder, hub, monkeypatch):
    """hf_xet cuts files into chunks and sends those that are not there yet; the Hub is a folder to it here."""
    pytest.importorskip("hf_xet", reason="the other way of uploading is tested above")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.fail("/commit/", status=500, times=99)
    with pytest.raises(PushError, match="500"):
        publish(folder)
    sent = sum(path.stat().st_size for path in hub.xet_root.rglob("xorbs/default.*"))
    assert sent > 100_000 and len(hub.commits(REPO)) == 1  # compressed
    hub.revive()
    publish(folder)
    assert sum(path.stat().st_size for path in hub.xet_root.rglob("xorbs/default.*")) == sent
    assert not publish(folder).changed and len(hub.commits(REPO)) == 2
    assert not hub.lfs_uploads and hub.repo(REPO).resolve("main").files["model.safetensors"].lfs


def test_passing_faults_are_tried_again(folder, hub):
    hub.fail("/preupload/", status=503, times=2)
    hub.fail("/objects/batch", status=429, times=1, headers={"Retry-After": "0"})
    hub.fail("/_lfs/", status=500, times=1)
    publish(folder)
    assert len(hub.commits(REPO)) == 2


# ---- The token


@pytest.mark.parametrize("status", [400, 401, 403, 404, 500])
@pytest.mark.parametrize(
    "where",
    [
        "/api/models/[^/]+/[^/]+$",
        "/api/validate-yaml",
        "/api/repos/create",
        "/preupload/",
        "/objects/batch",
        "/_lfs/",
        "/commit/",
        "/tag/",
    ],
)
def test_the_token_appears_nowhere(folder, hub, monkeypatch, capfd, caplog, status, where):
    """Whichever request fails, with a Hub that answers with what it was sent."""
    monkeypatch.setattr(constants, "HF_DEBUG", True)  # logs every request as a curl command
    caplog.set_level(logging.DEBUG)
    hub.fail(where, status=status, times=99, message="refused to {token}", headers={"X-Note": "t"})
    try:
        main([str(folder), REPO, "--size", "trained", "--no-load-check", "--tag", "v1"])
        shown = ""
    except SystemExit as error:
        shown = "".join(traceback.format_exception(error)) + str(error.code)
        assert str(error.code).startswith("error: ")
    printed = capfd.readouterr()
    seen = shown + printed.out + printed.err + caplog.text
    assert hub.requests("GET", "/api/models/") and TOKEN not in seen
    if REPO in seen and ("model", REPO) in hub.store.repos:
        assert not any(TOKEN.encode() in content for content in hub.files(REPO).values())


def test_who_may_not_write_is_told_what_to_do(folder, hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_dummy_read")
    with pytest.raises(PushError, match="403.*lacks the right to write"):
        publish(folder)
    monkeypatch.setenv("HF_TOKEN", "hf_somebodyelse")
    with pytest.raises(PushError, match="401.*Log in with `hf auth login`") as refusal:
        publish(folder)
    assert "hf_somebodyelse" not in "".join(traceback.format_exception(refusal.value))
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(PushError, match="401.*Log in with `hf auth login`"):
        publish(folder)
    assert not hub.store.repos


def test_the_token_may_stand_in_no_file(folder, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "not-of-a-known-form")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "note": "not-of-a-known-form"}))
    with pytest.raises(ValueError, match="config.json holds what looks like a token") as refusal:
        publish(folder)
    assert "not-of-a-known-form" not in str(refusal.value) and not hub.log


# ---- Options


def test_a_dry_run_lists_and_changes_nothing(folder, hub, capsys):
    command = [str(folder), REPO, "--size", "trained", "--no-load-check"]
    main([*command, "--dry-run", "--tag", "v1"])
    lines = capsys.readouterr().out.splitlines()
    weights = (folder / "model.safetensors").stat().st_size
    assert re.match(
        rf"new +lfs +{weights:,}  model.safetensors$", next(line for line in lines if "model.safet" in line)
    )
    assert any(re.match(r"new +regular +[\d,]+  README.md$", line) for line in lines)
    assert lines[-1].startswith(f"Would send to {hub.url}/{REPO}: ")
    assert not hub.store.repos and {method for method, _ in hub.log} == {"GET"}

    main(command)
    (folder / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text() + "\n")
    capsys.readouterr()
    main([*command, "--dry-run"])
    states = {line.split()[-1]: line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert states["tokenizer_config.json"] == "changed" and states["model.safetensors"] == "same"
    assert len(hub.commits(REPO)) == 2


def test_private_repositories(folder, hub, tmp_path):
    publish(folder, private=True)
    assert hub.repo(REPO).private
    publish(folder, private=True)
    code = "import sys; from huggingface_hub import model_info; model_info(sys.argv[1])"
    seen = process(code, hub, tmp_path, REPO, token=None)
    assert "RepositoryNotFoundError" in seen.stderr
    hub.repo(REPO).private = False
    with pytest.raises(ValueError, match="is public already"):
        publish(folder, private=True)


def test_a_tag_never_moves(folder, hub):
    first = publish(folder, tag="v1")
    assert publish(folder, tag="v1").commit == first.commit
    (folder / "LICENSE").write_text("Apache-2.0")
    with pytest.raises(ValueError, match="'v1' .* stands for another state"):
        publish(folder, tag="v1")
    assert len(hub.commits(REPO)) == 2
    second = publish(folder, tag="v2")
    assert hub.repo(REPO).resolve("v1").oid == first.commit != second.commit == hub.repo(REPO).resolve("v2").oid


def test_branches_and_pull_requests(folder, hub):
    publish(folder)
    (folder / "LICENSE").write_text("Apache-2.0")
    publish(folder, revision="next", tag="rc")
    assert "LICENSE" in hub.files(REPO, "next") and "LICENSE" not in hub.files(REPO)
    done = publish(folder, create_pr=True, message="A licence")
    assert "LICENSE" in hub.files(REPO, "refs/pr/1") and "LICENSE" not in hub.files(REPO)
    assert "/discussions/1" in done.url and hub.commits(REPO, "refs/pr/1")[0].title == "A licence"


def test_a_hub_that_refuses_the_card_gets_nothing(folder, hub, monkeypatch):
    from conversion import card

    monkeypatch.setattr(card, "PIPELINE_TAG", "reading-minds")
    with pytest.raises(ValueError, match="does not accept the card's metadata.*reading-minds"):
        publish(folder)
    assert not hub.store.repos


# ---- What is not fit to be published


def link_out(folder: Path) -> None:
    (folder.parent / "elsewhere.json").write_text("{}")
    (folder / "added_tokens.json").symlink_to(folder.parent / "elsewhere.json")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


SPOILED = {
    "only safetensors": lambda f: (f / "optimizer.pt").write_bytes(b"x"),
    "no part of a model: notes.txt": lambda f: (f / "notes.txt").write_text("mine"),
    "no part of a model: training.py": lambda f: (f / "training.py").write_text(""),
    "looks like a secret by its name": lambda f: (f / ".env").write_text("HF_TOKEN=x"),
    "what looks like a token": lambda f: edit(f / "config.json", note="hf_" + "a1B2c3D4e5" * 4),
    "outside of the folder": link_out,
    "no regular file": lambda f: os.mkfifo(f / "tokenizer.model"),
    "lacks tokenizer.json": lambda f: (f / "tokenizer.json").unlink(),
    "lacks inputs_m2encoder.py": lambda f: (f / "inputs_m2encoder.py").unlink(),
    "lacks 1_Normalize/config.json": lambda f: shutil.rmtree(f / "1_Normalize"),
    "is empty": lambda f: (f / "modeling_m2encoder_pretraining.py").write_text(""),
    "not readable JSON": lambda f: (f / "tokenizer.json").write_text("{"),
    "has no model.safetensors": lambda f: (f / "model.safetensors").unlink(),
    "damaged or cut off": lambda f: cut(f / "model.safetensors"),
    "no auto_map": lambda f: edit(f / "config.json", auto_map=None),
    "auto_map must name classes": lambda f: edit(f / "config.json", auto_map=["modeling_m2encoder.M2EncoderModel"]),
    "must hold an object, not []": lambda f: (f / "processor_config.json").write_text("[]"),
    "must be a list of objects": lambda f: (f / "modules.json").write_text("[1]"),
    "no text in UTF-8": lambda f: (f / "inputs_m2encoder.py").write_bytes(b"\xff\xfe"),
    "record of a training, but its objective is None": lambda f: (f.parent / "config.json").write_text(
        '{"data": {}, "steps": 1, "batch_size": 1}'
    ),
    "a model of type 'clip'": lambda f: edit(f / "config.json", model_type="clip"),
    "No model folder": lambda f: (f / "config.json").unlink(),
}


@pytest.mark.parametrize("refusal", SPOILED)
def test_a_folder_that_is_not_fit_is_refused(folder, hub, refusal):
    SPOILED[refusal](folder)
    with pytest.raises(ValueError, match=re.escape(refusal)):
        publish(folder)
    assert not hub.log


SPOILED_SHARDS = {
    "lacks model-00002-of": lambda f: next(f.glob("model-00002-*")).unlink(),
    "but no model.safetensors.index.json": lambda f: (f / "model.safetensors.index.json").unlink(),
    "which one is the model": lambda f: shutil.copy(next(f.glob("model-00001-*")), f / "model.safetensors"),
    "does not name": lambda f: shutil.copy(next(f.glob("model-00001-*")), f / "model-00009-of-00009.safetensors"),
    "does not hold the tensors": lambda f: shutil.copy(next(f.glob("model-00001-*")), next(f.glob("model-00002-*"))),
}


@pytest.mark.parametrize("refusal", SPOILED_SHARDS)
def test_shards_that_do_not_belong_together_are_refused(sharded, hub, refusal):
    SPOILED_SHARDS[refusal](sharded)
    with pytest.raises(ValueError, match=re.escape(refusal)):
        publish(sharded)
    assert not hub.log


@pytest.mark.parametrize(
    ("repo_id", "options", "message"),
    [
        ("tiny", {}, "with its namespace"),
        ("a/b/c", {}, "no id of a repository"),
        ("user/has space", {}, "no id of a repository"),
        (REPO, {"tag": "v1 final"}, "no name of a branch or tag"),
        (REPO, {"revision": "a..b"}, "no name of a branch or tag"),
        (REPO, {"create_pr": True, "tag": "v1"}, "cannot have a tag"),
        (REPO, {"create_pr": True, "revision": "next"}, "against main"),
        (REPO, {"size": "auto"}, "--size"),
        (REPO, {"size": "2B"}, "choose one of nano"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(folder, hub, repo_id, options, message):
    with pytest.raises(ValueError, match=message):
        push(folder, repo_id, **{"size": "trained", "load_check": False, **options})
    assert not hub.log


def test_what_belongs_to_this_machine_stays_here(folder, hub):
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "x.pyc").write_bytes(b"x")
    (folder / "README.md").write_text("by sentence-transformers")
    publish(folder)
    assert "__pycache__/x.pyc" not in hub.files(REPO)
    assert b"by sentence-transformers" not in hub.files(REPO)["README.md"]


def test_weights_that_give_no_embeddings_do_not_pass_the_load_check(folder):
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "word_embeddings" in name)
    save_file({**weights, name: torch.full_like(weights[name], float("nan"))}, folder / "model.safetensors", {"format": "pt"})  # fmt: skip  # noqa: E501
    with pytest.raises(ValueError, match="text_embeds are not finite"):
        check_loads(folder)


def test_code_that_needs_this_project_does_not_pass_the_load_check(folder):
    source = folder / "processing_m2encoder.py"
    source.write_text(source.read_text().replace("from .image_processing_m2encoder", "from modeling_m2encoder"))
    with pytest.raises(ValueError, match="modeling_m2encoder"):
        check_loads(folder)
