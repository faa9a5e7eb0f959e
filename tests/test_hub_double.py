"""The Hub double itself: what its clients rely on, through their own libraries."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, constants, get_session, hf_hub_download
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub_double import HubDouble


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with HubDouble(tmp_path / "hub") as hub:
        for name, value in (("ENDPOINT", hub.url), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
            monkeypatch.setattr(constants, name, value)
        yield hub


@pytest.fixture
def api(hub):
    return HfApi(token=hub.token)


def add(api: HfApi, message: str = "m", repo_id: str = "user/m", **files: bytes):
    operations = [CommitOperationAdd(name.replace("__", "/"), content) for name, content in files.items()]
    return api.create_commit(repo_id, operations, commit_message=message)


DATASET = """
import json, datasets
rows = datasets.Dataset.from_dict({"caption": ["红色的圆", "a star"] * 50, "n": list(range(100))})
rows.push_to_hub("user/pairs", private=True)
rows.select(range(7)).push_to_hub("user/pairs", split="test")
whole = datasets.load_dataset("user/pairs")
streamed = next(iter(datasets.load_dataset("user/pairs", split="test", streaming=True)))
print(json.dumps([{name: len(split) for name, split in whole.items()}, whole["train"][2], streamed]))
"""


def test_data_sets_go_there_and_come_back(hub, tmp_path):
    environment = hub.environment(tmp_path / "home")
    done = subprocess.run([sys.executable, "-c", DATASET], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    sizes, row, streamed = json.loads(done.stdout)
    assert sizes == {"train": 100, "test": 7} and row == {"caption": "红色的圆", "n": 2} and streamed["n"] == 0
    assert hub.repo("user/pairs", "dataset").private
    names = {"README.md", "data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"}
    assert set(hub.files("user/pairs", repo_type="dataset")) == names


def test_whoever_may_not_sees_what_the_hub_would_show(hub, api):
    api.create_repo("user/m", private=True)
    add(api, config=b"{}")
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=False).model_info("user/m")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("user/other")
    assert HfApi(token="hf_dummy_read").model_info("user/m").private
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi(token="hf_dummy_read").create_tag("user/m", tag="v1")
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(token="hf_unknown").whoami()
    with pytest.raises(RevisionNotFoundError):
        api.model_info("user/m", revision="v9")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("user/m", "nothing.json", token=hub.token)


def test_parts_of_files_and_states_of_repositories(hub, api, tmp_path):
    api.create_repo("user/m")
    weights = bytes(range(256)) * 100
    first = add(api, "first", folder__model_safetensors=b"x", **{"model.safetensors": weights})
    add(api, "second", **{"model.safetensors": weights[::-1]})
    url = f"{hub.url}/user/m/resolve/{first.oid}/model.safetensors"
    answer = get_session().get(url, headers={"Range": "bytes=10-19"})
    assert (answer.status_code, answer.content) == (206, weights[10:20])
    assert answer.headers["Content-Range"] == f"bytes 10-19/{len(weights)}"
    assert get_session().get(url, headers={"Range": "bytes=-4"}).content == weights[-4:]
    assert get_session().get(url, headers={"Range": f"bytes={len(weights)}-"}).status_code == 416
    assert hub.files("user/m")["model.safetensors"] == weights[::-1]
    assert [one.title for one in api.list_repo_commits("user/m")] == ["second", "first", "initial commit"]
    entries = {one.path: one for one in api.list_repo_tree("user/m", recursive=True, expand=True)}
    assert entries["folder"].last_commit.title == entries["folder/model_safetensors"].last_commit.title == "first"
    assert entries["model.safetensors"].lfs.size == len(weights)
    assert [one.path for one in api.get_paths_info("user/m", ["folder", "none"])] == ["folder"]
    assert "model.safetensors" in {one.rfilename for one in api.model_info("user/m").siblings}


def test_a_commit_is_whole_or_none(hub, api):
    api.create_repo("user/m")
    lines = [
        {"key": "header", "value": {"summary": "half"}},
        {"key": "file", "value": {"path": "a.json", "content": "e30=", "encoding": "base64"}},
        {"key": "lfsFile", "value": {"path": "model.safetensors", "algo": "sha256", "oid": "0" * 64, "size": 3}},
    ]
    body = "\n".join(map(json.dumps, lines))
    headers = {"Authorization": f"Bearer {hub.token}"}
    answer = get_session().post(f"{hub.url}/api/models/user/m/commit/main", content=body.encode(), headers=headers)
    assert answer.status_code == 400 and "does not exist" in answer.json()["error"]
    assert len(hub.commits("user/m")) == 1 and not hub.files("user/m")
    with pytest.raises(HfHubHTTPError, match="412"):
        operations = [CommitOperationAdd("a", b"x")]
        api.create_commit("user/m", operations, commit_message="m", parent_commit="1" * 40)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("license: [", "Invalid YAML"),
        ("license: mine", "license"),
        ("license: other", "license_name"),
        ("language: Chinese", "language"),
        ("pipeline_tag: reading-minds", "pipeline_tag"),
        ("base_model_relation: copy", "base_model_relation"),
        ("tags: m2", "tags"),
        (
            "model-index:\n- name: m\n  results:\n  - task: {type: t}\n    dataset: {type: d}\n    metrics: []",
            "dataset.name",
        ),
    ],
)
def test_bad_metadata_is_refused_before_anything_is_sent(hub, api, metadata, message):
    api.create_repo("user/m")
    ModelCard("---\nlicense: mit\n---\n# Title").validate()
    with pytest.raises(ValueError, match=message):
        add(api, **{"README.md": f"---\n{metadata}\n---\n# Title".encode(), "model.safetensors": b"x"})
    assert not hub.lfs_uploads and len(hub.commits("user/m")) == 1


def test_an_upload_needs_its_address(hub, api):
    api.create_repo("user/m")
    answer = get_session().put(f"{hub.url}/_lfs/{'0' * 64}", content=b"x")
    assert answer.status_code == 403
    answer = get_session().put(f"{hub.url}/_lfs/{'0' * 64}?key={hub.upload_key}", content=b"x")
    assert answer.status_code == 400 and not hub.lfs_uploads  # the content has another SHA-256
    with pytest.raises(BadRequestError):
        hub.fail("/api/models/", status=400)
        api.model_info("user/m")
