"""Opening checkpoints: the four layouts, and files that are not what they say. Nothing in a bad one may run."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from conversion.checkpoint_file import open_checkpoint

from .conftest import LAYOUTS


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_all_layouts(layout, save, tiny_state):
    tensors, name = open_checkpoint(save(tiny_state, layout))
    assert tensors.keys() == tiny_state.keys() and layout.startswith(name.strip('"'))
    assert all(torch.equal(tensors[key], tiny_state[key]) for key in tensors)


def test_tensors_are_mapped_not_read(save, tiny_state):
    """Writing into a tensor of a private map must not reach the file, and two maps share no memory."""
    path = save(tiny_state)
    first, _ = open_checkpoint(path)
    first["logit_scale"].fill_(7)
    second, _ = open_checkpoint(path)
    assert second["logit_scale"] == tiny_state["logit_scale"]


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("where", ["beside", "among the tensors", "instead of a dictionary", "bare pickle", "state"])
def test_code_is_refused_and_does_not_run(where, tmp_path, tiny_state):
    marker, path = tmp_path / "ran", tmp_path / "evil.ckpt"
    evil = Evil(marker)
    if where == "bare pickle":
        path.write_bytes(pickle.dumps({"state_dict": tiny_state, "callback": evil}))
    else:
        content = {
            "beside": {"state_dict": tiny_state, "callback": evil},
            "among the tensors": tiny_state | {"backbone.text_embed.weight": evil},
            "instead of a dictionary": evil,
            "state": {"state_dict": evil},
        }
        torch.save(content[where], path)
    told = "bare pickle, which was not opened" if where == "bare pickle" else r"system.*nothing of it has run"
    with pytest.raises(ValueError, match=told):
        open_checkpoint(path)
    assert not marker.exists()
    if where == "beside":  # the trap works
        torch.load(path, weights_only=False)
        assert marker.exists()


def test_other_classes_are_named(tmp_path, tiny_state):
    torch.save({"state_dict": tiny_state, "args": argparse.Namespace(lr=1)}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="argparse.Namespace"):
        open_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.parametrize("keep", [0.5, 0.98, 0.001])
def test_a_cut_off_file_says_so(keep, save, tiny_state):
    path = save(tiny_state)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(ValueError, match="Its end is missing: download it again"):
        open_checkpoint(path)


def test_a_damaged_pickle_is_no_crash(save, tiny_state, tmp_path):
    """Every 250th byte of the pickle flipped once: refused, or read without running anything."""
    path = save(tiny_state)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entry = next(entry for entry in archive.infolist() if entry.filename.endswith("data.pkl"))
    start = data.index(b"\x80\x02", entry.header_offset)
    refused = 0
    for at in range(start, start + entry.file_size, 250):
        broken = bytearray(data)
        broken[at] ^= 0x55
        (tmp_path / "broken.ckpt").write_bytes(broken)
        try:
            open_checkpoint(tmp_path / "broken.ckpt")
        except ValueError:
            refused += 1
    assert refused > 0


def test_a_zip_bomb_is_not_unpacked(tmp_path, save, tiny_state):
    path = save(tiny_state)
    bomb = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in source.infolist():
            packed.writestr(entry.filename, source.read(entry))
        packed.writestr("checkpoint/data/999", bytes(100_000_000))
    assert bomb.stat().st_size < 5_000_000
    with pytest.raises(ValueError, match="unpacks to 101,.* zip bomb"):
        open_checkpoint(bomb)


def test_overlapping_entries_are_a_zip_bomb_too(save, tiny_state, tmp_path):
    """Stored entries that share the same bytes (as in David Fifield's zip bombs): more inside than outside."""
    path, bomb = save(tiny_state), tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(bomb, "w") as packed:
        for entry in source.infolist():
            packed.writestr(entry.filename, source.read(entry))
        largest = max(packed.infolist(), key=lambda entry: entry.file_size)
        packed.filelist.extend([largest] * 1000)
        packed._didModify = True
    with pytest.raises(ValueError, match="zip bomb"):
        open_checkpoint(bomb)


def test_a_giant_pickle_is_not_opened(tmp_path, monkeypatch):
    monkeypatch.setattr("conversion.checkpoint_file.MAX_PICKLE_BYTES", 1000)
    torch.save({"state_dict": {f"key{i}": torch.zeros(1) for i in range(100)}}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"far more than.*not opened"):
        open_checkpoint(tmp_path / "x.ckpt")


def test_a_tensor_larger_than_its_bytes_is_refused(save, tiny_state):
    """Expanded tensors are pickled as strides of 0: four bytes that claim to be a terabyte."""
    tiny_state["backbone.text_embed.weight"] = torch.zeros(1).expand(2**20, 2**18)
    with pytest.raises(ValueError, match="text_embed.*do not fill"):
        open_checkpoint(save(tiny_state))


def test_sparse_tensors_are_refused(save, tiny_state):
    tiny_state["logit_scale"] = torch.eye(3).to_sparse()
    with pytest.raises(ValueError):
        open_checkpoint(save(tiny_state))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "begins with b''"),
        (b"<html>404 Not Found</html>", "begins with b'<html>"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"\x40\x00\x00\x00\x00\x00\x00\x00{}" + b" " * 62, "safetensors"),
    ],
)
def test_other_files_are_named(content, told, tmp_path):
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=f"bytes.* is not a checkpoint: .*{told}"):
        open_checkpoint(tmp_path / "x.ckpt")


def test_other_archives_are_named(tmp_path):
    for name, told in (("constants.pkl", "TorchScript"), ("word/document.xml", "no data.pkl")):
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            archive.writestr(f"top/{name}", b"x")
        with pytest.raises(ValueError, match=told):
            open_checkpoint(tmp_path / "x.zip")


def test_no_file_and_folders(tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        open_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(ValueError, match="it is a folder"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([torch.zeros(1)], "holds a list"),
        ({"epoch": 3, "note": "x"}, r"is none itself: it holds epoch \(int\), note \(str\)"),
        ({}, "holds nothing"),
        ({"state_dict": {"a": torch.zeros(1), "b": 3}}, r"b \(int\)"),
        ({"_forward_module.a": torch.zeros(1), "a": torch.zeros(1)}, "has a twice"),
    ],
)
def test_no_state_dict(content, told, tmp_path):
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=told):
        open_checkpoint(tmp_path / "x.ckpt")


def test_files_of_torch_before_1_6_are_refused(tmp_path, tiny_state):
    """The old format cannot be mapped: a 10B checkpoint would be read into memory at once."""
    buffer = io.BytesIO()
    torch.save(tiny_state, buffer, _use_new_zipfile_serialization=False)
    (tmp_path / "x.ckpt").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="before 1.6"):
        open_checkpoint(tmp_path / "x.ckpt")
