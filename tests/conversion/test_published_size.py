"""The published 0.4B model's full size, with made-up weights: the same embeddings as the official forward pass."""

from __future__ import annotations

import torch

from conversion.official_forward import OfficialModel
from conversion.weights import config_from_shapes, from_official
from modeling_m2encoder import M2EncoderModel


def test_full_size_0_4b_equals_the_official_forward_pass(make_state):
    state = make_state(width=768, layers=9, upper_layers=3, ffn=3072, embedding=768, words=115_244)
    config = config_from_shapes({key: tuple(value.shape) for key, value in state.items()}, size="0.4B")
    with torch.device("meta"):
        model = M2EncoderModel(config).eval()
    model.load_state_dict(from_official(state, config), assign=True)  # the very same memory
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(115_244, (2, 52), generator=generator)
    mask = (torch.arange(52) < torch.tensor([[52], [7]])).long()
    pixels = torch.rand(1, 3, 224, 224, generator=generator) * 2 - 1
    with torch.no_grad():
        seen = model(ids, pixels, mask)
    official = OfficialModel(state, heads=12)
    texts, images = official.embed_texts(ids, mask), official.embed_images(pixels)
    pairs = {
        "text": (seen.text_embeds, texts.upper),
        "image": (seen.image_embeds, images.upper),
        "backbone text": (seen.backbone_text_embeds, texts.backbone),
        "backbone image": (seen.backbone_image_embeds, images.backbone),
        "logits": (seen.logits_per_image, state["logit_scale"].exp() * images.upper @ texts.upper.T),
    }
    worst = {name: (ours - theirs).abs().max().item() for name, (ours, theirs) in pairs.items()}
    assert all(value <= 1e-5 for value in worst.values()), worst
    # The comparison can fail: different inputs are much further apart.
    assert (texts.upper[0] - texts.upper[1]).abs().max() > 1e-2
