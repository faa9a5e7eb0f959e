"""ONNX graphs: equal to torch on sizes they were not traced with, named as transformers.js asks, complete or absent.

Tracing and quantising take seconds, so one export serves the whole file; where a test needs another folder with the
same weights, `traced` hands out the graphs that are there already, and all the rest runs for real.
"""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import AutoConfig, AutoModel

onnx = pytest.importorskip("onnx", reason="needs the packages of the export extra")
onnx_ir = pytest.importorskip("onnx_ir", reason="needs the packages of the export extra")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the packages of the export extra")

import conversion.export as export_module  # noqa: E402
from conversion.export import export, main  # noqa: E402
from modeling_m2encoder import M2EncoderModel, M2EncoderTextModel  # noqa: E402
from modeling_m2encoder.hub_folder import save_hub_folder  # noqa: E402
from tests.full_disk import file_size_limit  # noqa: E402

GRAPHS = ["text_model.onnx", "text_model_quantized.onnx", "vision_model.onnx", "vision_model_quantized.onnx"]


@pytest.fixture(scope="module")
def torch_model(config) -> M2EncoderModel:
    """Weights that bfloat16 holds exactly, large enough that different inputs get different embeddings."""
    torch.manual_seed(0)
    model = M2EncoderModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * (4 if parameter.ndim > 1 else 1)).bfloat16())
    return model


@pytest.fixture(scope="module")
def exported(torch_model, processor, tmp_path_factory) -> Path:
    folder = save_hub_folder(torch_model, processor, tmp_path_factory.mktemp("export") / "hub")
    shutil.copytree(folder, tmp_path_factory.mktemp("before") / "hub")
    main([str(folder)])
    return folder


@pytest.fixture
def traced(exported, monkeypatch) -> None:
    def quantized(program):
        name = "text_model" if program.graph.inputs[0].name == "input_ids" else "vision_model"
        return onnx_ir.load(exported / "onnx" / f"{name}_quantized.onnx")

    def graph(model, tower):
        return onnx_ir.load(exported / "onnx" / f"{tower.name}.onnx")

    monkeypatch.setattr(export_module, "_trace", graph)
    monkeypatch.setattr(export_module, "_quantize", quantized)


@pytest.fixture
def hub(torch_model, processor, tmp_path) -> Path:
    """A folder with the same weights, before its export."""
    return save_hub_folder(torch_model, processor, tmp_path / "hub")


def run(path: Path, **inputs: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (embeds,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return torch.from_numpy(embeds)


def random_texts(config, lengths: list[int], padded_to: int | None = None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(17)
    places = padded_to or max(lengths)
    ids = torch.randint(config.vocab_size, (len(lengths), places), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(places) < torch.tensor(lengths)[:, None]).long()}


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# ---- ONNX = torch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "padded_to"),
    [
        ([1], None),
        ([2], None),
        ([52], None),
        ([7, 3], None),
        ([52, 1, 20], None),
        ([5, 9, 2, 30, 11], 52),
        ([53], None),  # too long: the beginning is lost, in the graph as in torch
        ([120, 53, 52, 4], None),
        ([6, 2], 77),
    ],
)
def test_text_equals_torch(lengths, padded_to, exported, torch_model, config):
    inputs = random_texts(config, lengths, padded_to)
    with torch.no_grad():
        expected = torch_model(**inputs).text_embeds
    seen = run(exported / "onnx" / "text_model.onnx", **inputs)
    assert seen.shape == (len(lengths), config.projection_dim) and seen.dtype == torch.float32
    assert (seen - expected).abs().max() < 2e-6  # measured: 5e-7
    assert cosine_similarity(run(exported / "onnx" / "text_model_quantized.onnx", **inputs), expected).min() > 0.99


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_images_equal_torch(batch, exported, torch_model, processor, images):
    inputs = processor(images=images[:batch], return_tensors="pt")
    with torch.no_grad():
        expected = torch_model(**inputs).image_embeds
    seen = run(exported / "onnx" / "vision_model.onnx", **inputs)
    assert seen.shape == expected.shape
    assert (seen - expected).abs().max() < 2e-6  # measured: 5e-7
    assert cosine_similarity(run(exported / "onnx" / "vision_model_quantized.onnx", **inputs), expected).min() > 0.99


def test_captions_in_both_languages(exported, torch_model, processor, captions):
    inputs = processor(text=captions, return_tensors="pt")
    with torch.no_grad():
        expected = torch_model(**inputs).text_embeds
    seen = run(exported / "onnx" / "text_model.onnx", **inputs)
    assert (seen - expected).abs().max() < 2e-6
    # ... which would say little if all captions had the same embedding
    assert (expected @ expected.T - torch.eye(len(captions))).max() < 0.99
    assert torch.allclose(seen.norm(dim=-1), torch.ones(len(captions)), atol=1e-5)


def test_padding_changes_nothing(exported, config):
    one = random_texts(config, [6])
    padded = {name: torch.nn.functional.pad(value, (0, 30)) for name, value in one.items()}
    path = exported / "onnx" / "text_model.onnx"
    assert (run(path, **one) - run(path, **padded)).abs().max() < 1e-6


# ---- What is written -----------------------------------------------------------------------------------------------


def test_names_and_shapes(exported, config):
    def signature(name: str) -> tuple[dict, dict]:
        session = onnxruntime.InferenceSession(exported / "onnx" / name, providers=["CPUExecutionProvider"])
        return tuple({node.name: (node.type, node.shape) for node in nodes()} for nodes in (
            session.get_inputs, session.get_outputs
        ))  # fmt: skip

    side = config.image_size
    text = {name: ("tensor(int64)", ["batch", "length"]) for name in ("input_ids", "attention_mask")}
    image = {"pixel_values": ("tensor(float)", ["batch", 3, side, side])}
    for suffix in ("", "_quantized"):
        inputs, outputs = signature(f"text_model{suffix}.onnx")
        assert inputs == text and outputs == {"text_embeds": ("tensor(float)", ["batch", config.projection_dim])}
        inputs, outputs = signature(f"vision_model{suffix}.onnx")
        assert inputs == image and outputs == {"image_embeds": ("tensor(float)", ["batch", config.projection_dim])}


def test_the_folder_is_as_before_and_has_the_graphs(exported):
    (before,) = exported.parents[1].glob("before0/hub")
    assert files(exported) == sorted([*files(before), *(f"onnx/{name}" for name in GRAPHS)])
    assert [name for name in files(before) if (exported / name).read_bytes() != (before / name).read_bytes()] == []
    assert list(exported.parent.iterdir()) == [exported]
    for path in exported.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644), path


def test_the_files_hold_no_paths_of_this_machine(exported):
    for name in GRAPHS:
        content = (exported / "onnx" / name).read_bytes()
        assert b"stack_trace" not in content and b"site-packages" not in content and b".py" not in content


def test_int8_is_int8_standard_elsewhere(exported):
    exact, quantised = (onnx.load(exported / "onnx" / name) for name in GRAPHS[:2])
    assert {node.domain for node in exact.graph.node} <= {"", "ai.onnx"}
    sizes = {kind: sum(len(t.raw_data) for t in quantised.graph.initializer if t.data_type == kind) for kind in (1, 3)}
    assert sizes[onnx.TensorProto.INT8] > 4 * sizes[onnx.TensorProto.FLOAT]
    words = [t for t in exact.graph.initializer if "word_embeddings" in t.name]
    assert [t.data_type for t in words] == [onnx.TensorProto.FLOAT]
    assert not [t for t in quantised.graph.initializer if t.name == words[0].name]


def test_large_weights_lie_beside_where_transformers_js_looks(traced, hub, torch_model, config):
    (hub / "config.json").write_text(
        json.dumps(json.loads((hub / "config.json").read_text()) | {"transformers.js_config": {"dtype": "fp32"}})
    )
    export(hub, largest_file=120_000)  # the fp32 weights are larger, the int8 ones are not
    assert sorted(path.name for path in (hub / "onnx").iterdir()) == sorted(
        [*GRAPHS, "text_model.onnx_data", "vision_model.onnx_data"]
    )
    locations = {
        entry.value
        for tensor in onnx.load(hub / "onnx" / "text_model.onnx", load_external_data=False).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert locations == {"text_model.onnx_data"}
    named = json.loads((hub / "config.json").read_text())["transformers.js_config"]
    assert named == {
        "dtype": "fp32",
        "use_external_data_format": {"text_model.onnx": True, "vision_model.onnx": True},
    }
    inputs = random_texts(config, [3, 8])
    with torch.no_grad():  # and Python goes on loading the folder, and keeps the entry when it saves
        model = AutoModel.from_pretrained(hub)
        expected = model(**inputs).text_embeds
    assert torch.equal(expected, torch_model(**inputs).text_embeds)
    moved = hub.rename(hub.with_name("moved"))
    assert (run(moved / "onnx" / "text_model.onnx", **inputs) - expected).abs().max() < 2e-6
    model.config.save_pretrained(moved / "again")
    assert AutoConfig.from_pretrained(moved / "again").to_dict()["transformers.js_config"] == named
    # a later export that embeds everything takes the entry back
    shutil.rmtree(moved / "onnx")
    export(moved)
    assert json.loads((moved / "config.json").read_text())["transformers.js_config"] == {"dtype": "fp32"}


def test_a_folder_of_its_own(traced, hub, tmp_path):
    before = {name: (hub / name).read_bytes() for name in files(hub)}
    main([str(hub), "--output", str(tmp_path / "js")])
    beside = ["config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert files(tmp_path / "js") == sorted([*beside, *(f"onnx/{name}" for name in GRAPHS)])
    assert {name: (hub / name).read_bytes() for name in files(hub)} == before
    assert all((tmp_path / "js" / name).read_bytes() == before[name] for name in beside[1:])


# ---- Other folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_become_fp32_graphs(dtype, traced, torch_model, processor, tmp_path, config):
    model = M2EncoderModel(config)
    model.load_state_dict(torch_model.state_dict())
    hub = save_hub_folder(model.to(dtype), processor, tmp_path / "half")
    agreement = export(hub)
    assert agreement["text_model.onnx"] < 1e-5 and agreement["vision_model.onnx"] < 1e-5
    assert json.loads((hub / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_a_text_only_folder(traced, processor, hub, tmp_path, capsys):
    M2EncoderTextModel.from_pretrained(hub).save_pretrained(tmp_path / "text")
    processor.tokenizer.save_pretrained(tmp_path / "text")
    main([str(tmp_path / "text")])
    printed = capsys.readouterr()
    assert "holds a M2EncoderTextModel: only text_model is written" in printed.out
    assert "WARNING" not in printed.err
    assert sorted(path.name for path in (tmp_path / "text" / "onnx").iterdir()) == GRAPHS[:2]


def test_a_folder_without_tokenizer_is_exported_and_says_so(traced, hub, capsys):
    for name in ("tokenizer.json", "preprocessor_config.json"):
        (hub / name).unlink()
    main([str(hub), "--output", str(hub.with_name("js"))])
    assert "hub has no tokenizer.json, preprocessor_config.json, which transformers.js reads" in capsys.readouterr().err
    assert "tokenizer_config.json" in files(hub.with_name("js"))


def test_a_text_only_folder_that_does_not_say_so(traced, hub, tmp_path):
    text = tmp_path / "text"
    M2EncoderTextModel.from_pretrained(hub).save_pretrained(text)
    config = json.loads((text / "config.json").read_text())
    (text / "config.json").write_text(json.dumps(config | {"architectures": None}))
    with pytest.raises(ValueError, match=r"does not hold the whole vision_model: encoder\.\S+, .* are missing"):
        export(text)
    assert not (text / "onnx").exists()


# ---- Mistakes, and complete or absent ------------------------------------------------------------------------------


def refused(folder: Path, message: str) -> None:
    before = files(folder.parent)
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        main([str(folder)])
    assert files(folder.parent) == before and not [path for path in folder.parent.rglob(".*") if path.is_dir()]


def test_not_a_model_folder(tmp_path):
    (tmp_path / "a").mkdir()
    refused(tmp_path / "a", "No Hub folder at .*a: it has no config.json")
    refused(tmp_path / "nowhere", "No Hub folder at")
    (tmp_path / "a" / "config.json").write_text('{"model_type": "clip"}')
    refused(tmp_path / "a", ".*a holds a model of type 'clip', not 'm2_encoder'")
    (tmp_path / "a" / "config.json").write_text("{")
    refused(tmp_path / "a", "")


def test_half_folders(hub, torch_model, tmp_path):
    weights = (hub / "model.safetensors").read_bytes()
    (hub / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused(hub, ".*hub does not hold weights that fit its config.json")
    (hub / "model.safetensors").unlink()
    refused(hub, ".*model.safetensors")
    torch_model.save_pretrained(hub, max_shard_size="100KB")
    next(hub.glob("model-00002*")).unlink()
    refused(hub, "")


def test_weights_of_another_size(hub):
    config = json.loads((hub / "config.json").read_text())
    (hub / "config.json").write_text(json.dumps(config | {"projection_dim": 16}))
    refused(hub, ".*hub does not hold weights that fit its config.json")


def test_what_exists_is_refused_untouched(hub, tmp_path):
    (hub / "onnx").mkdir()
    (hub / "onnx" / "text_model.onnx").write_text("mine")
    refused(hub, ".*onnx exists already: choose another name or remove it first")
    assert (hub / "onnx" / "text_model.onnx").read_text() == "mine"
    with pytest.raises(ValueError, match="js exists already"):
        (tmp_path / "js").mkdir()
        export(hub, tmp_path / "js")


def test_missing_packages_are_named_with_their_extra(hub, monkeypatch):
    monkeypatch.setattr(export_module, "PACKAGES", ("onnx", "onnx_that_is_not_there"))
    with pytest.raises(ImportError, match="needs onnx_that_is_not_there"):
        export(hub)
    refused(hub, r"The export needs onnx_that_is_not_there: .*\[export\]")


def test_a_graph_of_other_weights_is_refused(traced, hub, torch_model, processor):
    other = M2EncoderModel(torch_model.config)
    other.load_state_dict(torch_model.state_dict())
    other.encoder.upper_layers[0].mlp.fc2.bias.data[3] += 1e-2
    other.save_pretrained(hub)
    refused(hub, "Verification failed: text_model.onnx differs from torch by")


def test_a_poor_int8_graph_is_refused(traced, hub, monkeypatch):
    monkeypatch.setattr(export_module, "INT8_COSINE", 1.1)
    refused(hub, "Verification failed: text_model_quantized.onnx has cosine")


def test_not_a_number_is_refused(traced, hub, monkeypatch):
    def last_is_nan(path, tower, cases):
        *right, last = embeds(path, tower, cases)
        return [*right, torch.full_like(last, torch.nan)]

    embeds = export_module._onnx_embeds
    monkeypatch.setattr(export_module, "_onnx_embeds", last_is_nan)
    refused(hub, "Verification failed: text_model.onnx differs from torch by nan")


def test_a_full_disk_leaves_nothing(traced, hub):
    with file_size_limit(50_000):
        refused(hub, "")


def test_ctrl_c_half_way_leaves_nothing(traced, hub, monkeypatch):
    def interrupted(program):
        raise KeyboardInterrupt

    before = files(hub.parent)
    monkeypatch.setattr(export_module, "_quantize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main([str(hub)])
    assert files(hub.parent) == before
