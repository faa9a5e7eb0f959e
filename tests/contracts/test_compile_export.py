"""torch.compile and torch.export take both towers with any batch and any length, and give what eager gives."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from modeling_m2encoder import M2EncoderConfig, M2EncoderModel, M2EncoderTextModel, M2EncoderVisionModel
from modeling_m2encoder.hub_folder import save_hub_folder

# Rows and tokens. The first is no other size of the model (as 3 rows are to 3 channels): torch would take them for one.
SHAPES = [(5, 9), (2, 30), (6, 52), (1, 3)]


def text_batch(config, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Random texts, the first of them full length, the others padded."""
    generator = torch.Generator().manual_seed(100 * rows + length)
    ids = torch.randint(7, config.vocab_size, (rows, length), generator=generator)
    lengths = torch.randint(2, length + 1, (rows, 1), generator=generator)
    lengths[0] = length
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < lengths).long()}


def image_batch(config, rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return {"pixel_values": torch.randn(rows, 3, config.image_size, config.image_size, generator=generator)}


@pytest.fixture
def folder(model, processor, tmp_path) -> Path:
    return save_hub_folder(model, processor, tmp_path / "hub")


# ---- torch.compile -------------------------------------------------------------------------------------------------


class Counting:
    """A backend that counts the graphs it is given. Everything but the code generator runs: dynamo traces the model
    and aot_autograd its operators; what inductor makes of these for this processor is torch's own affair, and takes
    ten times as long."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> object:
        self.graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


@pytest.fixture
def fresh_dynamo():
    trace = logging.getLogger("torch.__trace")
    level = trace.level
    trace.setLevel(logging.CRITICAL)  # pytest would collect every record, and torch writes one per operator
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    trace.setLevel(level)


@torch.no_grad()
def test_a_few_graphs_for_every_shape(fresh_dynamo, config):
    config = M2EncoderConfig(**{**config.to_dict(), "num_hidden_layers": 1})  # tracing takes seconds per layer
    torch.manual_seed(0)
    model, backend = M2EncoderModel(config).eval(), Counting()
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend=backend)
    new_shapes = [(4, 8), (7, 41), (1, 20)]
    for rows, length in SHAPES + new_shapes:
        batch = {**text_batch(config, rows, length), **image_batch(config, rows)}
        seen, expected = compiled(**batch), model(**batch)
        for name in ("text_embeds", "image_embeds", "logits_per_image"):
            assert (seen[name] - expected[name]).abs().max() <= 1e-6, (rows, length, name)
        # torch makes a graph of its own for a batch of one, and one more where it met a size twice; then no more.
        if (rows, length) == SHAPES[-1]:
            enough = backend.graphs
    assert backend.graphs == enough <= 3


@torch.no_grad()
def test_the_feature_methods_compile(fresh_dynamo, model, config):
    texts, images = text_batch(config, 3, 9), image_batch(config, 2)
    text = torch.compile(model.get_text_features, fullgraph=True, backend="aot_eager")(**texts).pooler_output
    image = torch.compile(model.get_image_features, fullgraph=True, backend="aot_eager")(**images).pooler_output
    assert (text - model.get_text_features(**texts).pooler_output).abs().max() <= 1e-6
    assert (image - model.get_image_features(**images).pooler_output).abs().max() <= 1e-6


def test_gradients_of_the_compiled_model(fresh_dynamo, model, config):
    batch = {**text_batch(config, 4, 12), **image_batch(config, 4)}
    model(**batch, return_loss=True).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(**batch, return_loss=True).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max() + 1e-7, name


@pytest.mark.parametrize("unwrapped", [False, True])
@torch.no_grad()
def test_saved_from_the_compiled_model(fresh_dynamo, unwrapped, model, processor, config, tmp_path):
    compiled = torch.compile(model, backend="aot_eager")
    batch = {**text_batch(config, 2, 9), **image_batch(config, 2)}
    expected = compiled(**batch).logits_per_image
    source = compiled._orig_mod if unwrapped else compiled
    source.save_pretrained(tmp_path / "plain")
    save_hub_folder(source, processor, tmp_path / "hub")
    for folder in ("plain", "hub"):
        loaded, report = AutoModel.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert type(loaded) is M2EncoderModel and loaded.config.architectures == ["M2EncoderModel"]
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert (loaded(**batch).logits_per_image - expected).abs().max() <= 1e-6


# ---- torch.export --------------------------------------------------------------------------------------------------

ROWS, LENGTH = torch.export.Dim("rows"), torch.export.Dim("length", max=52)


@torch.no_grad()
def test_the_text_tower_is_exported(folder, config, tmp_path):
    tower = M2EncoderTextModel.from_pretrained(folder)
    axes = {0: ROWS, 1: LENGTH}
    program = torch.export.export(
        tower,
        (),
        text_batch(config, 5, 9),
        dynamic_shapes={"input_ids": axes, "attention_mask": axes},
    )
    torch.export.save(program, tmp_path / "text.pt2")
    loaded = torch.export.load(tmp_path / "text.pt2").module()
    for rows, length in SHAPES:
        batch = text_batch(config, rows, length)
        expected = tower(**batch).text_embeds
        assert (program.module()(**batch).text_embeds - expected).abs().max() <= 1e-6, (rows, length)
        assert (loaded(**batch).text_embeds - expected).abs().max() <= 1e-6, (rows, length)


@torch.no_grad()
def test_the_vision_tower_is_exported(folder, config, tmp_path):
    tower = M2EncoderVisionModel.from_pretrained(folder)
    program = torch.export.export(tower, (), image_batch(config, 5), dynamic_shapes={"pixel_values": {0: ROWS}})
    torch.export.save(program, tmp_path / "vision.pt2")
    loaded = torch.export.load(tmp_path / "vision.pt2").module()
    for rows in (5, 1, 3):
        batch = image_batch(config, rows)
        expected = tower(**batch).image_embeds
        assert (program.module()(**batch).image_embeds - expected).abs().max() <= 1e-6, rows
        assert (loaded(**batch).image_embeds - expected).abs().max() <= 1e-6, rows
