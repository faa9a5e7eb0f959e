"""The Hub folder: complete, whole or not at all, and loadable in every way that its users have."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
)

import modeling_m2encoder
from modeling_m2encoder import (
    M2EncoderForPreTraining,
    M2EncoderModel,
    M2EncoderProcessor,
    M2EncoderTextModel,
    M2EncoderVisionModel,
)
from modeling_m2encoder.hub_folder import MODEL_CODE, complete_or_absent, remote_code, save_hub_folder


@pytest.fixture
def hub(model, processor, tmp_path) -> Path:
    return save_hub_folder(model, processor, tmp_path / "hub")


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_what_lies_in_it(hub):
    files = {str(path.relative_to(hub)) for path in hub.rglob("*") if path.is_file()}
    assert files == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "processor_config.json",
        "preprocessor_config.json",
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "1_Normalize/config.json",
        "configuration_m2encoder.py",
        "inputs_m2encoder.py",
        "modeling_m2encoder.py",
        "modeling_m2encoder_pretraining.py",
        "image_processing_m2encoder.py",
        "processing_m2encoder.py",
    }
    for path in [hub, *hub.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644), path
    assert list(hub.parent.iterdir()) == [hub]


def test_the_auto_maps_name_classes_that_exist(hub):
    config, processor = read(hub / "config.json"), read(hub / "processor_config.json")
    preprocessor = read(hub / "preprocessor_config.json")
    assert config["auto_map"] == MODEL_CODE and config["architectures"] == ["M2EncoderModel"]
    # transformers.js reads one, transformers 5 the other
    own = ("auto_map", "processor_class")
    assert {key: value for key, value in preprocessor.items() if key not in own} == {
        key: value for key, value in processor["image_processor"].items() if key not in own
    }
    entries = [*config["auto_map"].values(), *processor["auto_map"].values(), *preprocessor["auto_map"].values()]
    named = [name for entry in entries for name in (entry if isinstance(entry, list) else [entry])]
    assert len(named) == 8
    for module, name in (entry.split(".") for entry in named):
        assert (hub / f"{module}.py").is_file() and hasattr(modeling_m2encoder, name)


def test_the_code_is_the_installed_code_and_stands_alone(hub):
    for file in remote_code():
        assert (hub / file.name).read_bytes() == file.read_bytes()
        assert "import_module" not in file.read_text() and "from modeling_m2encoder" not in file.read_text()


def test_with_the_package_no_trust_is_asked_for(hub, model, processor, images, captions):
    assert type(AutoModel.from_pretrained(hub)) is M2EncoderModel
    assert type(AutoModelForZeroShotImageClassification.from_pretrained(hub)) is M2EncoderModel
    loaded = AutoProcessor.from_pretrained(hub, backend="pil")
    assert type(loaded) is M2EncoderProcessor
    batch = loaded(text=captions, images=images, return_tensors="pt")
    expected = processor(text=captions, images=images, return_tensors="pt")
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    with torch.no_grad():
        seen = AutoModel.from_pretrained(hub)(**batch).logits_per_image
        torch.testing.assert_close(seen, model(**expected).logits_per_image, atol=1e-5, rtol=0)


REMOTE = """
import sys
sys.modules["modeling_m2encoder"] = None  # not installed
import json, torch, numpy as np
from PIL import Image
from transformers import (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForZeroShotImageClassification,
                          AutoProcessor, AutoTokenizer, pipeline)
folder, trust = sys.argv[1], dict(trust_remote_code=True)
model = AutoModel.from_pretrained(folder, **trust)
processor = AutoProcessor.from_pretrained(folder, **trust, backend="pil")
image = Image.fromarray(np.arange(3 * 40 * 50, dtype=np.uint8).reshape(40, 50, 3))
batch = processor(text=["a red circle", "蓝色"], images=[image], return_tensors="pt")
classify = pipeline("zero-shot-image-classification", model=folder, **trust)
scores = classify(image, candidate_labels=["red", "blue"], hypothesis_template="a {}")
others = (AutoConfig, AutoTokenizer, AutoModelForZeroShotImageClassification)
names = [type(model), type(processor), type(AutoImageProcessor.from_pretrained(folder, **trust, backend="pil"))]
names = [kind.__name__ for kind in names + [type(auto.from_pretrained(folder, **trust)) for auto in others]]
texts = pipeline("feature-extraction", model=folder, **trust)("red")
model.save_pretrained("again"); processor.save_pretrained("again")
again = AutoModel.from_pretrained("again", **trust)(**batch).logits_per_image
print(json.dumps({"names": names, "logits": model(**batch).logits_per_image.tolist(), "again": again.tolist(),
                  "scores": [s["score"] for s in scores], "texts": len(texts[0]), "module": type(model).__module__}))
"""


def run_without_the_package(code: str, hub: Path, tmp_path: Path) -> dict:
    """What `code` prints last, as JSON, in another process, another working directory, with an empty module cache and
    the package blocked."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, str(hub)],
        cwd=tmp_path / "elsewhere",
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_without_the_package_as_remote_code(hub, model, processor, tmp_path):
    seen = run_without_the_package(REMOTE, hub, tmp_path)
    assert seen["module"].startswith("transformers_modules.")
    assert seen["names"] == [
        "M2EncoderModel",
        "M2EncoderProcessor",
        "M2EncoderImageProcessorPil",
        "M2EncoderConfig",
        "TokenizersBackend",
        "M2EncoderModel",
    ]
    image = Image.fromarray(np.arange(3 * 40 * 50, dtype=np.uint8).reshape(40, 50, 3))
    with torch.no_grad():
        expected = model(**processor(text=["a red circle", "蓝色"], images=[image], return_tensors="pt"))
    # Within rounding: weights mapped from a file lie at other addresses, for which some CPUs sum in another order.
    for name in ("logits", "again"):
        torch.testing.assert_close(torch.tensor(seen[name]), expected.logits_per_image, atol=1e-5, rtol=0)
    assert sum(seen["scores"]) == pytest.approx(1) and seen["texts"] == model.config.projection_dim


@pytest.fixture
def pretraining(config) -> M2EncoderForPreTraining:
    torch.manual_seed(0)
    return M2EncoderForPreTraining(config).eval()


REMOTE_PRETRAINING = """
import sys
sys.modules["modeling_m2encoder"] = None  # not installed
import json, torch
from transformers import AutoModel, AutoModelForPreTraining
pretraining, plain = (auto.from_pretrained(sys.argv[1], trust_remote_code=True)
                      for auto in (AutoModelForPreTraining, AutoModel))
ids, pixels = torch.arange(3, 12).reshape(1, 9), torch.arange(3 * 32 * 32.0).reshape(1, 3, 32, 32) / 1e3
masks = {"text_mask": (ids % 2 == 0), "patch_mask": torch.arange(16)[None] % 4 > 0}
with torch.no_grad():
    output = pretraining(ids, pixels, **masks)
    logits = plain(ids, pixels).logits_per_image.tolist()
kinds = [type(model) for model in (pretraining, plain)]
print(json.dumps({"names": [kind.__name__ for kind in kinds], "modules": [kind.__module__ for kind in kinds],
                  "losses": [output.loss_cmlm.item(), output.loss_cmim.item()], "logits": logits,
                  "embeds": output.logits_per_image.tolist()}))
"""


def test_pretraining_without_the_package_as_remote_code(pretraining, processor, tmp_path):
    hub = save_hub_folder(pretraining, processor, tmp_path / "hub")
    seen = run_without_the_package(REMOTE_PRETRAINING, hub, tmp_path)
    assert seen["names"] == ["M2EncoderForPreTraining", "M2EncoderModel"]
    assert all(module.startswith("transformers_modules.") for module in seen["modules"])
    ids, pixels = torch.arange(3, 12).reshape(1, 9), torch.arange(3 * 32 * 32.0).reshape(1, 3, 32, 32) / 1e3
    with torch.no_grad():
        output = pretraining(ids, pixels, text_mask=(ids % 2 == 0), patch_mask=torch.arange(16)[None] % 4 > 0)
    assert seen["losses"] == pytest.approx([output.loss_cmlm.item(), output.loss_cmim.item()], abs=1e-5)
    for name in ("logits", "embeds"):
        torch.testing.assert_close(torch.tensor(seen[name]), output.logits_per_image, atol=1e-5, rtol=0)


def test_a_pretraining_folder_has_the_same_auto_map(pretraining, processor, tmp_path):
    config = read(save_hub_folder(pretraining, processor, tmp_path / "hub") / "config.json")
    assert config["auto_map"] == MODEL_CODE and config["architectures"] == ["M2EncoderForPreTraining"]
    assert type(AutoModelForPreTraining.from_pretrained(tmp_path / "hub")) is M2EncoderForPreTraining
    assert type(AutoModel.from_pretrained(tmp_path / "hub")) is M2EncoderModel


def test_saved_without_its_processor_it_names_only_its_own_class(pretraining, tmp_path):
    """`save_pretrained` alone: never the pretraining class as the `AutoModel`."""
    pretraining.save_pretrained(tmp_path)
    auto_map = read(tmp_path / "config.json").get("auto_map", {})
    assert auto_map.get("AutoModel", MODEL_CODE["AutoModel"]) == MODEL_CODE["AutoModel"]


@pytest.mark.parametrize(
    "kwargs", [{"device_map": "auto"}, {"device_map": {"": "cpu"}}, {"low_cpu_mem_usage": True}, {}]
)
@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16])
def test_device_maps_and_dtypes(kwargs, dtype, hub, model):
    loaded = AutoModel.from_pretrained(hub, dtype=dtype, **kwargs)
    assert loaded.dtype == (torch.float32 if dtype == "auto" else dtype)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(loaded.dtype)), name


def test_shards_and_low_memory(model, processor, tmp_path):
    hub = save_hub_folder(model, processor, tmp_path / "hub", max_shard_size="30KB")
    assert len(list(hub.glob("model-*.safetensors"))) > 1 and (hub / "model.safetensors.index.json").is_file()
    loaded = AutoModel.from_pretrained(hub, device_map="auto").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_saved_in_half_precision_it_loads_so(model, processor, tmp_path):
    hub = save_hub_folder(model.bfloat16(), processor, tmp_path / "hub")
    assert AutoModel.from_pretrained(hub, dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("half", [M2EncoderTextModel, M2EncoderVisionModel])
def test_a_half_holds_only_its_half(half, hub, model, processor, images, captions):
    loaded, report = half.from_pretrained(hub, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    other = "vision" if half is M2EncoderTextModel else "text"
    assert not any(f".{other}" in name or f"{other}_projection" in name for name in loaded.state_dict())
    assert loaded.num_parameters() < 0.75 * model.num_parameters()
    with torch.no_grad():
        if half is M2EncoderTextModel:
            batch = processor(text=captions, return_tensors="pt")
            assert torch.equal(loaded(**batch).text_embeds, model(**batch).text_embeds)
        else:
            batch = processor(images=images, return_tensors="pt")
            assert torch.equal(loaded(**batch).image_embeds, model(**batch).image_embeds)


def test_each_part_loads_alone(hub):
    assert AutoConfig.from_pretrained(hub).model_type == "m2_encoder"
    assert AutoTokenizer.from_pretrained(hub).model_max_length == 52
    assert AutoImageProcessor.from_pretrained(hub).size == {"height": 32, "width": 32}


# ---- Whole or not at all -------------------------------------------------------------------------------------------


def test_a_failure_leaves_nothing(model, processor, tmp_path, monkeypatch):
    monkeypatch.setattr("modeling_m2encoder.hub_folder.remote_code", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_hub_folder(model, processor, tmp_path / "deep" / "hub")
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_failure_keeps_the_older_folder(hub, model, processor, monkeypatch):
    before = {path: path.read_bytes() for path in hub.rglob("*") if path.is_file()}
    monkeypatch.setattr("modeling_m2encoder.hub_folder.remote_code", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_hub_folder(model, processor, hub, replace=True)
    assert {path: path.read_bytes() for path in hub.rglob("*") if path.is_file()} == before
    assert list(hub.parent.iterdir()) == [hub]


def test_replacing_takes_nothing_over(hub, model, processor):
    (hub / "stale.safetensors").write_text("old")
    with pytest.raises(ValueError, match="hub exists already"):
        save_hub_folder(model, processor, hub)
    model.logit_scale.data.fill_(1.5)
    save_hub_folder(model, processor, hub, replace=True)
    assert not (hub / "stale.safetensors").exists()
    assert AutoModel.from_pretrained(hub).logit_scale.item() == 1.5
    assert list(hub.parent.iterdir()) == [hub]


def test_complete_or_absent(tmp_path):
    with complete_or_absent(tmp_path / "a" / "b") as folder:
        folder.mkdir()
        (folder / "file").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "file").read_text() == "x"
    with complete_or_absent(tmp_path / "a" / "file") as file:
        file.write_text("y")
    assert (tmp_path / "a" / "file").read_text() == "y"
    with pytest.raises(KeyboardInterrupt), complete_or_absent(tmp_path / "c") as file:
        file.write_text("x")
        raise KeyboardInterrupt
    assert not (tmp_path / "c").exists() and [path.name for path in tmp_path.iterdir()] == ["a"]
