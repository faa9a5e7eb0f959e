"""The official forward pass once more, in plain torch under the official names: what a converted model is checked
against.

It shares no code with `modeling_m2encoder`: a wrong entry in the key table or a change of the model shows as a
difference. Used by `python -m conversion.convert … --verify` and by the tests.

Shapes: B batch, L tokens of either modality, P patches, D width, E embedding, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, linear, normalize

VISION, TEXT = "A", "B"  # the experts


class OfficialEmbeddings(NamedTuple):
    """Both pairs of projections, L2-normalised, each [B, E]; `upper` is the published embedding. A file may lack the
    other."""

    upper: Tensor
    backbone: Tensor | None


class OfficialModel:
    """A state dict with the official keys (no prefix), run in float32.

    Args:
        state: tensors of any floating dtype; each is converted when it is used.
        heads: attention heads H.
    """

    def __init__(self, state: Mapping[str, Tensor], heads: int):
        self.state = state
        self.heads = heads

    @torch.no_grad()
    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor) -> OfficialEmbeddings:
        """`input_ids`, `attention_mask` [B, L] -> embeddings."""
        words = self.state["backbone.text_embed.weight"][input_ids].float()
        positions = self._get("backbone.encoder.embed_positions.B.weight")[2 : 2 + input_ids.shape[1]]
        return self._embed("text", words + positions, attention_mask)

    @torch.no_grad()
    def embed_images(self, pixel_values: Tensor) -> OfficialEmbeddings:
        """`pixel_values` [B, 3, side, side], normalised as the image processor does -> embeddings."""
        kernel, bias = (self._get(f"backbone.vision_embed.proj.{kind}") for kind in ("weight", "bias"))
        patches = conv2d(pixel_values, kernel, bias, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)  # [B, P, D]
        cls = self._get("backbone.vision_embed.cls_token").expand(len(patches), 1, -1)
        positions = self._get("backbone.encoder.embed_positions.A.weight")[2:]
        hidden = torch.cat([cls, patches], dim=1) + positions
        return self._embed("image", hidden, torch.ones(hidden.shape[:2], dtype=torch.long))

    def _get(self, key: str) -> Tensor:
        return self.state[key].float()

    def _embed(self, modality: str, hidden: Tensor, mask: Tensor) -> OfficialEmbeddings:
        """[B, L, D] through both encoders; the upper one runs the vision expert for texts too."""
        expert, kept = VISION if modality == "image" else TEXT, mask[..., None].float()
        hidden = self._encode("backbone.encoder", expert, hidden * kept, mask)
        backbone = self._project(f"itc_{modality}_proj", hidden)
        hidden = self._encode("backbone_vl", VISION, hidden * kept, mask)
        upper = self._project(f"itc_vl_{modality}_proj", hidden)
        assert upper is not None
        return OfficialEmbeddings(upper, backbone)

    def _project(self, head: str, hidden: Tensor) -> Tensor | None:
        if f"{head}.fc.weight" not in self.state:
            return None
        return normalize(linear(hidden[:, 0], self._get(f"{head}.fc.weight")), dim=-1)

    def _encode(self, encoder: str, expert: str, hidden: Tensor, mask: Tensor) -> Tensor:
        i = 0
        while f"{encoder}.layers.{i}.self_attn.q_proj.{expert}.weight" in self.state:
            layer = f"{encoder}.layers.{i}"
            normed = self._norm(f"{layer}.self_attn_layer_norm.{expert}", hidden)
            hidden = hidden + self._attend(f"{layer}.self_attn", expert, normed, mask)
            normed = self._norm(f"{layer}.final_layer_norm.{expert}", hidden)
            hidden = hidden + self._feed_forward(f"{layer}.ffn.{expert}", normed)
            i += 1
        return self._norm(f"{encoder}.layer_norm.{expert}", hidden)

    def _attend(self, layer: str, expert: str, hidden: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        query, key, value = (
            self._linear(f"{layer}.{name}_proj.{expert}", hidden).view(batch, length, self.heads, -1).transpose(1, 2)
            for name in "qkv"
        )
        scores = query * (width // self.heads) ** -0.5 @ key.transpose(-1, -2)  # [B, H, L, L]
        scores = scores.masked_fill(mask[:, None, None, :] == 0, float("-inf"))
        attended = (scores.softmax(dim=-1) @ value).transpose(1, 2).reshape(batch, length, width)
        return self._linear(f"{layer}.out_proj.{expert}", self._norm(f"{layer}.inner_attn_ln.{expert}", attended))

    def _feed_forward(self, layer: str, hidden: Tensor) -> Tensor:
        hidden = gelu(self._linear(f"{layer}.fc1", hidden))
        return self._linear(f"{layer}.fc2", self._norm(f"{layer}.ffn_layernorm", hidden))

    def _linear(self, key: str, hidden: Tensor) -> Tensor:
        return linear(hidden, self._get(f"{key}.weight"), self._get(f"{key}.bias"))

    def _norm(self, key: str, hidden: Tensor) -> Tensor:
        weight, bias = self._get(f"{key}.weight"), self._get(f"{key}.bias")
        return layer_norm(hidden, hidden.shape[-1:], weight, bias, eps=1e-5)
