"""From a checkpoint file to a folder and back, through the public functions and the command line."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

import conversion.convert as convert_module
from conversion.convert import convert, main, reverse, verify_folder
from conversion.official_forward import OfficialModel
from conversion.tokenizer import glm_tokenizer
from modeling_m2encoder import M2EncoderConfig, M2EncoderModel
from modeling_m2encoder.hub_folder import save_hub_folder
from tests.full_disk import file_size_limit

from .conftest import LAYOUTS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tiny_json(tiny_config, tmp_path) -> Path:
    (tmp_path / "tiny.json").write_text(json.dumps(tiny_config))
    return tmp_path / "tiny.json"


def embeddings(folder: Path, inputs: dict[str, torch.Tensor], **kwargs: Any) -> Any:
    model = AutoModel.from_pretrained(folder, **kwargs)
    pixels = (inputs["pixel_values_0_1"] - 0.5) / 0.5
    with torch.no_grad():
        return model(inputs["input_ids"], pixels, inputs["attention_mask"])


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- There ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_layout_gives_the_official_embeddings(layout, save, tiny_state, tiny_config, tiny_outputs, tokenizer):
    checkpoint = save(tiny_state, layout)
    out = checkpoint.with_name("out")
    convert(checkpoint, out, tokenizer, official_config=tiny_config, verify=True)
    seen = embeddings(out, tiny_outputs)
    for ours, theirs in (
        ("text_embeds", "text_embeds"),
        ("image_embeds", "image_embeds"),
        ("backbone_text_embeds", "text_backbone_embeds"),
        ("backbone_image_embeds", "image_backbone_embeds"),
        ("logits_per_image", "logits_per_image"),
    ):
        assert (seen[ours] - tiny_outputs[theirs]).abs().max() <= 2e-6, theirs


@pytest.fixture(scope="module")
def glm(shared):
    return glm_tokenizer(shared / "parity" / "sp.model")


@pytest.mark.parametrize("name", ["raw", "lightning", "deepspeed"])
def test_the_shared_checkpoints(name, shared, glm, tmp_path, capsys, monkeypatch):
    """The unchanged files that the official code was run on, through the command line, with the real tokenizer."""
    monkeypatch.setattr(convert_module, "glm_tokenizer", lambda path, max_length: glm)
    parity, out = shared / "parity", tmp_path / "out"
    arguments = [str(parity / f"tiny_{name}.ckpt"), str(out), "--config", str(parity / "tiny_config.json")]
    main([*arguments, "--sp-model", str(parity / "sp.model"), "--verify"])
    expected = load_file(parity / "tiny_expected.safetensors")
    seen = embeddings(out, expected)
    assert (seen.text_embeds - expected["text_embeds"]).abs().max() <= 2e-6
    assert (seen.image_embeds - expected["image_embeds"]).abs().max() <= 2e-6
    assert (seen.logits_per_image - expected["logits_per_image"]).abs().max() <= 2e-6
    assert "1,000 word embeddings" in capsys.readouterr().err


def test_the_folder_is_complete(save, tiny_state, tiny_config, tokenizer, capsys):
    checkpoint = save(tiny_state)
    out = checkpoint.with_name("out")
    convert(checkpoint, out, tokenizer, official_config=tiny_config)
    assert left_behind(checkpoint.parent) == ["checkpoint.ckpt", "out"]
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["M2EncoderModel"] and config["dtype"] == "float32"
    assert config["bos_token_id"] == tokenizer.cls_token_id and config["pad_token_id"] == tokenizer.pad_token_id
    assert AutoProcessor.from_pretrained(out).image_processor.size == {"height": 64, "width": 64}
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o644 for path in out.rglob("*") if path.is_file())
    told = capsys.readouterr().out
    assert "bare layout, 2 + 1 layers of width 48, images of 64 pixels, 0.3M parameters, torch.float32" in told
    assert "Dropped backbone_vl.layers.0.self_attn" in told and "and 21 more: text experts" in told


def test_shards(save, tiny_state, tiny_config, tiny_outputs, tokenizer):
    checkpoint = save(tiny_state)
    one, many = checkpoint.with_name("one"), checkpoint.with_name("many")
    convert(checkpoint, one, tokenizer, official_config=tiny_config)
    convert(checkpoint, many, tokenizer, official_config=tiny_config, max_shard_size="200KB", verify=True)
    files = sorted(many.glob("*.safetensors"))
    assert len(files) > 3 and all(file.stat().st_size < 260_000 for file in files)
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    whole = load_file(one / "model.safetensors")
    parts = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    a, b = embeddings(one, tiny_outputs), embeddings(many, tiny_outputs)
    assert torch.equal(a.logits_per_image, b.logits_per_image)


def test_small_maps_change_nothing(save, tiny_state, tiny_config, tokenizer, monkeypatch):
    """The checkpoint is opened anew after so many bytes; here many times, and in the middle of the largest."""
    checkpoint = save(tiny_state, "DeepSpeed")
    convert(checkpoint, checkpoint.with_name("a"), tokenizer, official_config=tiny_config)
    monkeypatch.setattr(convert_module, "MAPPED_BYTES", 20_000)
    convert(checkpoint, checkpoint.with_name("b"), tokenizer, official_config=tiny_config)
    a, b = (checkpoint.with_name(name) / "model.safetensors" for name in "ab")
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype(dtype, save, tiny_state, tiny_config, tiny_outputs, tokenizer):
    checkpoint = save(tiny_state)
    out = checkpoint.with_name("out")
    convert(checkpoint, out, tokenizer, official_config=tiny_config, dtype=dtype, verify=True)
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {dtype}
    assert AutoModel.from_pretrained(out).dtype == dtype
    seen = embeddings(out, tiny_outputs, dtype=torch.float32)
    assert (seen.text_embeds * tiny_outputs["text_embeds"]).sum(1).min() > 0.999


def test_half_precision_checkpoints_stay_so(save, tiny_state, tiny_config, tokenizer):
    checkpoint = save({key: value.bfloat16() for key, value in tiny_state.items()})
    convert(checkpoint, checkpoint.with_name("out"), tokenizer, official_config=tiny_config, verify=True)
    assert AutoModel.from_pretrained(checkpoint.with_name("out")).dtype == torch.bfloat16


def test_values_beyond_the_dtype_are_refused(save, tiny_state, tiny_config, tokenizer):
    tiny_state["itc_vl_text_proj.fc.weight"][0, 0] = 1e6
    checkpoint = save(tiny_state)
    with pytest.raises(ValueError, match="itc_vl_text_proj.*1e.06.*bfloat16"):
        convert(checkpoint, checkpoint.with_name("out"), tokenizer, official_config=tiny_config, dtype=torch.float16)
    assert left_behind(checkpoint.parent) == ["checkpoint.ckpt"]


def test_image_size(save, tiny_state, tiny_config, tiny_outputs, tokenizer, images):
    checkpoint = save(tiny_state)
    out = checkpoint.with_name("out")
    convert(checkpoint, out, tokenizer, official_config=tiny_config, image_size=96, verify=True)
    processor, model = AutoProcessor.from_pretrained(out), AutoModel.from_pretrained(out)
    batch = processor(images=images[:2], return_tensors="pt")
    assert batch["pixel_values"].shape[-2:] == (96, 96)
    assert model.get_image_features(**batch).pooler_output.shape == (2, 32)
    with pytest.raises(ValueError, match="multiple of patch_size"):
        convert(checkpoint, out.with_name("b"), tokenizer, official_config=tiny_config, image_size=100)


@pytest.mark.parametrize(("layers", "upper", "heads"), [(1, 1, 2), (3, 2, 8), (2, 3, 1)])
def test_other_sizes_against_the_official_forward_pass(layers, upper, heads, save, make_state, tokenizer):
    """Embeddings of any input, by plain torch from the official keys and by the written folder."""
    state = make_state(
        width=32, layers=layers, upper_layers=upper, ffn=128, embedding=24, words=300, image_size=48, patch_size=8
    )
    checkpoint = save(state, "Lightning")
    named = {"encoder_attention_heads": heads, "image_size": 48}
    convert(checkpoint, checkpoint.with_name("out"), tokenizer, official_config=named, verify=True)
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "input_ids": torch.randint(300, (5, 40), generator=generator),
        "attention_mask": (torch.arange(40) < torch.tensor([[1], [2], [17], [39], [40]])).long(),
        "pixel_values_0_1": torch.rand(3, 3, 48, 48, generator=generator),
    }
    seen = embeddings(checkpoint.with_name("out"), inputs)
    official = OfficialModel(state, heads)
    texts = official.embed_texts(inputs["input_ids"], inputs["attention_mask"])
    images = official.embed_images((inputs["pixel_values_0_1"] - 0.5) / 0.5)
    assert (seen.text_embeds - texts.upper).abs().max() < 2e-6
    assert (seen.image_embeds - images.upper).abs().max() < 2e-6
    assert (seen.backbone_text_embeds - texts.backbone).abs().max() < 2e-6
    assert (seen.backbone_image_embeds - images.backbone).abs().max() < 2e-6
    # and a wrong number of heads, the one thing that shapes do not tell, does show
    wrong = OfficialModel(state, 4).embed_texts(inputs["input_ids"], inputs["attention_mask"])
    assert (seen.text_embeds - wrong.upper).abs().max() > 1e-3


# ---- Verification must be able to fail -----------------------------------------------------------------------------


def converted(save, state, config, tokenizer) -> tuple[Path, convert_module.Source]:
    checkpoint = save(state)
    convert(checkpoint, checkpoint.with_name("out"), tokenizer, official_config=config)
    return checkpoint.with_name("out"), convert_module.recognise(checkpoint, official_config=config)


def test_verification_finds_a_changed_tensor(save, tiny_state, tiny_config, tokenizer):
    out, source = converted(save, tiny_state, tiny_config, tokenizer)
    verify_folder(out, source)
    model = AutoModel.from_pretrained(out)
    model.encoder.layers[1]["text"].mlp.fc2.bias.data[3] += 1e-3
    model.save_pretrained(out)
    with pytest.raises(ValueError, match="layers.1.text.mlp.fc2.bias is not backbone.encoder.layers.1.ffn.B.fc2.bias"):
        verify_folder(out, source)


def test_verification_finds_a_wrong_number_of_heads(save, tiny_state, tiny_config, tokenizer):
    out, source = converted(save, tiny_state, tiny_config, tokenizer)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"num_attention_heads": 8}))
    with pytest.raises(ValueError, match="embeddings differ from the official forward pass by text"):
        verify_folder(out, source)


def test_a_failed_verification_leaves_nothing(save, tiny_state, tiny_config, tokenizer, monkeypatch):
    monkeypatch.setattr(convert_module, "TOLERANCE", -1.0)
    checkpoint = save(tiny_state)
    with pytest.raises(ValueError, match="Verification failed"):
        convert(checkpoint, checkpoint.with_name("out"), tokenizer, official_config=tiny_config, verify=True)
    assert left_behind(checkpoint.parent) == ["checkpoint.ckpt"]


# ---- Back ----------------------------------------------------------------------------------------------------------


def test_round_trip_of_files_is_bit_exact(save, tiny_state, tiny_config, tokenizer, tmp_path):
    convert(save(tiny_state), tmp_path / "a", tokenizer, official_config=tiny_config, max_shard_size="300KB")
    reverse(tmp_path / "a", tmp_path / "back.ckpt")
    named = json.loads((tmp_path / "back.json").read_text())
    assert {key: value for key, value in named.items() if key in tiny_config} == tiny_config
    convert(tmp_path / "back.ckpt", tmp_path / "b", tokenizer, official_config=named, max_shard_size="300KB")
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) > 10
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    back = torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"]
    assert back.keys() == tiny_state.keys()
    assert all(back[key].shape == tiny_state[key].shape for key in back)
    # The text experts of the upper layers share the memory of the vision experts, in the file too.
    assert (tmp_path / "back.ckpt").stat().st_size < sum(value.nbytes for value in back.values())


def test_a_model_trained_here_runs_in_the_official_forward_pass(
    processor, images, captions, tokenizer, tmp_path, capsys
):
    config = M2EncoderConfig.from_size("nano", vocab_size=len(tokenizer), bos_token_id=0, image_size=32)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id"):
        setattr(config, name, 0)
    torch.manual_seed(0)
    model = M2EncoderModel(config).eval()
    save_hub_folder(model, processor, tmp_path / "hub")
    reverse(tmp_path / "hub", tmp_path / "official.ckpt")
    assert "the official code tokenises with its own sp.model" in capsys.readouterr().err
    official = OfficialModel(torch.load(tmp_path / "official.ckpt")["state_dict"], config.num_attention_heads)
    batch = processor(text=captions, images=images, return_tensors="pt")
    with torch.no_grad():
        seen = model(**batch)
    texts = official.embed_texts(batch["input_ids"], batch["attention_mask"])
    assert (seen.text_embeds - texts.upper).abs().max() < 2e-6
    assert (seen.image_embeds - official.embed_images(batch["pixel_values"]).upper).abs().max() < 2e-6


def test_a_full_disk_on_the_way_back(save, tiny_state, tiny_config, tokenizer, tmp_path):
    convert(save(tiny_state), tmp_path / "hub", tokenizer, official_config=tiny_config)
    with file_size_limit(100_000), pytest.raises(SystemExit, match="^error: Could not write back.ckpt"):
        main([str(tmp_path / "hub"), str(tmp_path / "back.ckpt"), "--reverse"])
    assert left_behind(tmp_path) == ["checkpoint.ckpt", "hub"]


def test_checkpoints_without_the_backbone_projections(save, tiny_state, tiny_config, tiny_outputs, tokenizer):
    del tiny_state["itc_text_proj.fc.weight"], tiny_state["itc_image_proj.fc.weight"]
    out = save(tiny_state).with_name("out")
    convert(save(tiny_state), out, tokenizer, official_config=tiny_config, verify=True)
    seen = embeddings(out, tiny_outputs)
    assert seen.backbone_text_embeds is None
    assert (seen.text_embeds - tiny_outputs["text_embeds"]).abs().max() <= 2e-6


def test_reverse_refuses(processor, model, tmp_path):
    (tmp_path / "there.ckpt").write_bytes(b"mine")
    with pytest.raises(ValueError, match="there.ckpt exists already"):
        reverse(tmp_path, tmp_path / "there.ckpt")
    with pytest.raises(ValueError, match="no config.json"):
        reverse(tmp_path, tmp_path / "new.ckpt")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match="'clip'"):
        reverse(tmp_path, tmp_path / "new.ckpt")
    save_hub_folder(model, processor, tmp_path / "hub")  # its FFN is not four times as wide as the model
    with pytest.raises(ValueError, match="intermediate_size is 64, not 128"):
        reverse(tmp_path / "hub", tmp_path / "new.ckpt")
    (tmp_path / "hub" / "model.safetensors").unlink()
    assert left_behind(tmp_path) == ["config.json", "hub", "there.ckpt"]
    assert (tmp_path / "there.ckpt").read_bytes() == b"mine"


# ---- Complete or absent --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "folder", "empty folder", "dangling link"])
def test_an_existing_out_dir_is_refused_untouched(kind, save, tiny_state, tiny_config, tokenizer):
    checkpoint = save(tiny_state)
    out = checkpoint.with_name("out")
    if kind == "file":
        out.write_text("mine")
    elif kind == "dangling link":
        out.symlink_to("nowhere")
    else:
        out.mkdir()
        if kind == "folder":
            (out / "mine").write_text("mine")
    with pytest.raises(ValueError, match="out exists already"):
        convert(checkpoint, out, tokenizer, official_config=tiny_config)
    assert left_behind(checkpoint.parent) == ["checkpoint.ckpt", "out"]
    assert kind != "folder" or (out / "mine").read_text() == "mine"


@pytest.fixture
def arguments(save, tiny_state, tiny_json, tokenizer, tmp_path, monkeypatch) -> list[str]:
    """A command line that works; the real tokenizer is not needed to see what happens on the disk."""
    monkeypatch.setattr(convert_module, "glm_tokenizer", lambda path, max_length: tokenizer)
    return [str(save(tiny_state)), str(tmp_path / "out"), "--config", str(tiny_json), "--sp-model", "sp.model"]


BEFORE = ["checkpoint.ckpt", "tiny.json"]


@pytest.mark.parametrize("limit", [100_000, 4_000])
def test_a_full_disk_is_one_line_and_leaves_nothing(limit, arguments, tmp_path):
    """Simulated by a limit on the size of files, which no weight file of these shards keeps to."""
    with file_size_limit(limit), pytest.raises(SystemExit, match="^error: Could not write model"):
        main([*arguments, "--max-shard-size", "500KB"])
    assert left_behind(tmp_path) == BEFORE
    main(arguments)


def test_too_little_space_is_said_beforehand(arguments, tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 1_000_000})
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SystemExit, match="error: The weights need 1.1 MB, and .* has 1.0 MB left"):
        main(arguments)
    assert left_behind(tmp_path) == BEFORE


def test_ctrl_c_half_way_leaves_nothing(arguments, tmp_path, monkeypatch):
    def interrupted(tensors, path, **kwargs):
        save_file(tensors, path, **kwargs)
        if path.name.startswith("model-00003"):
            raise KeyboardInterrupt

    monkeypatch.setattr(convert_module, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main([*arguments, "--max-shard-size", "200KB"])
    assert left_behind(tmp_path) == BEFORE


def test_bad_checkpoints_leave_nothing(arguments, tmp_path):
    whole = (tmp_path / "checkpoint.ckpt").read_bytes()
    for content in (whole[:1000], b"hello"):
        (tmp_path / "checkpoint.ckpt").write_bytes(content)
        with pytest.raises(SystemExit, match="^error: .* is not a checkpoint"):
            main(arguments)
        assert left_behind(tmp_path) == BEFORE


def run(arguments: list[str], tokenizer: Path, code: str) -> subprocess.Popen[str]:
    """The command line in a process of its own, after `code`, with a tokenizer that is ready."""
    program = (
        "import sys\nimport conversion.convert as c\nfrom transformers import AutoTokenizer\n"
        f"c.glm_tokenizer = lambda path, max_length: AutoTokenizer.from_pretrained({str(tokenizer)!r})\n"
        f"{code}\nc.main(sys.argv[1:])"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_kill_half_way_leaves_nothing(arguments, tokenizer, tmp_path):
    """Stopped while the shards are written: the process says when one is, and then waits."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    code = (
        "import time\n"
        "save = c.save_file\n"
        "def slow(*args, **kwargs):\n"
        "    save(*args, **kwargs); print('written', flush=True); time.sleep(60)\n"
        "c.save_file = slow\n"
    )
    process = run([*arguments, "--max-shard-size", "200KB"], tmp_path / "tokenizer", code)
    assert process.stdout is not None
    while "written" not in (line := process.stdout.readline()):
        assert line, process.communicate()[1]
    assert len(list(tmp_path.glob(".out.*/out/*.safetensors"))) == 1 and not (tmp_path / "out").exists()
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert left_behind(tmp_path) == [*BEFORE, "tokenizer"]


def test_memory_stays_bounded(tmp_path, make_state, tokenizer):
    """The peak does not grow with the checkpoint: 190 MB through maps and shards of 20 MB."""
    state = make_state(width=512, layers=5, upper_layers=1, ffn=2048, embedding=512, words=15000)
    torch.save(state, tmp_path / "big.ckpt")
    size = (tmp_path / "big.ckpt").stat().st_size
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "c.json").write_text('{"encoder_attention_heads": 8}')
    # VmHWM, not ru_maxrss: the latter begins with what the parent process had.
    code = (
        "import atexit, re\n"
        "c.MAPPED_BYTES = 20_000_000\n"
        "peak = lambda: 1024 * int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])\n"
        "before = peak()\n"
        "atexit.register(lambda: print('grew by', peak() - before))\n"
    )
    options = ["--config", str(tmp_path / "c.json"), "--sp-model", "sp.model", "--max-shard-size", "20MB"]
    process = run([str(tmp_path / "big.ckpt"), str(tmp_path / "out"), *options], tmp_path / "tokenizer", code)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert int(out.split("grew by ")[1]) < size / 2


# ---- Command line --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["a.ckpt", "out"], 2, "--sp-model is needed"),
        (["a.ckpt", "out", "--sp-model", "sp.model", "--size", "3B"], 2, "invalid choice"),
        (["hub", "out.ckpt", "--reverse", "--dtype", "float16", "--verify"], 2, "--reverse takes no --dtype, --verify"),
        (["hub", "out.ckpt", "--reverse"], 1, "no config.json"),
        (["a.ckpt", "out", "--sp-model", "none.model"], 1, "none.model"),
    ],
)
def test_mistakes_on_the_command_line(arguments, status, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    message = capsys.readouterr().err + (exit.value.code if isinstance(exit.value.code, str) else "")
    assert told in message and (exit.value.code == 2) == (status == 2)


def test_a_broken_config_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content, told in (("{", "is not JSON"), ("[1]", "holds a list")):
        Path("c.json").write_text(content)
        with pytest.raises(SystemExit, match=told):
            main(["a.ckpt", "out", "--sp-model", "sp.model", "--config", "c.json"])
