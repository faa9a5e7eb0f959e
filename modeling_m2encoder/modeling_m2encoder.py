"""M2-Encoder: a bilingual image-text encoder of multiway layers (arXiv 2401.15896; BEiT-3, MAGNETO).

An image or a text passes through multiway layers, where every weight exists once per modality, and then through
shared upper layers; the [CLS] state of either end is projected to the common embedding space.

Shapes: B batch, L tokens of either modality, P patches, D width, E embedding, H heads.
"""

# No `from __future__ import annotations` here: transformers and sentence-transformers read the annotations as classes.
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_m2encoder import POSITION_OFFSET, M2EncoderConfig
from .inputs_m2encoder import check_kept_patches, check_pixels, check_text, keep_end_of_text

# "vision" is expert A of the official files, "text" is expert B.
MODALITIES = ("vision", "text")
# What `M2EncoderForPreTraining` holds beyond `M2EncoderModel`; a pretraining folder serves for inference too.
PRETRAINING_KEYS = [r"^pretraining_heads\."]
# Amplitudes of initial sine-cosine positions. Beside nano's patch embeddings, of std 1.2 at first, smaller ones hardly
# count; words have the std `initializer_range` (docs/log.md).
PATCH_WAVES, TEXT_WAVES = 2.0, 2.0


@dataclass
class M2EncoderFeatures(BaseModelOutputWithPooling):
    """
    What `get_text_features` and `get_image_features` return.

    `pooler_output` [B, E] is the projected embedding, not normalised; `last_hidden_state` [B, L, D] is the output of
    the shared upper layers; `backbone_pooler_output` [B, E] is the embedding on top of the multiway layers, given only
    with `config.use_backbone_projection`.
    """

    backbone_pooler_output: torch.Tensor | None = None


@dataclass
class M2EncoderOutput(ModelOutput):
    """
    What `M2EncoderModel.forward` returns. Fields of a modality that was not given are None.

    `loss` (scalar, with `return_loss=True`): symmetric cross-entropy over this batch. `logits_per_image` [B_image,
    B_text] and
    its transpose `logits_per_text`: cosine similarities times exp(logit_scale). `text_embeds`, `image_embeds` [B, E]:
    embeddings, L2-normalised. `backbone_text_embeds`, `backbone_image_embeds` [B, E]: the same for the projections
    on the multiway layers. `text_model_output`, `vision_model_output`: the features they came from.
    """

    loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    backbone_text_embeds: torch.Tensor | None = None
    backbone_image_embeds: torch.Tensor | None = None
    text_model_output: M2EncoderFeatures | None = None
    vision_model_output: M2EncoderFeatures | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


@dataclass
class M2EncoderEncoderOutput(BaseModelOutput):
    """`last_hidden_state` [B, L, D] of the upper layers and `backbone_hidden_state` [B, L, D] of the multiway
    layers."""

    backbone_hidden_state: torch.Tensor | None = None


# ---- Embeddings ----------------------------------------------------------------------------------------------------


class M2EncoderTextEmbeddings(nn.Module):
    """Word plus learned position embeddings; words are not scaled, and the tokenizer's own [CLS] comes first."""

    def __init__(self, config: M2EncoderConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.position_embeddings.positions_of = "text"  # for `_init_weights`

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`input_ids` [B, L] -> [B, L, D]."""
        positions = torch.arange(POSITION_OFFSET, POSITION_OFFSET + input_ids.shape[1], device=input_ids.device)
        return self.word_embeddings(input_ids) + self.position_embeddings(positions)


def sincos_waves(length: int, width: int, longest: float) -> torch.Tensor:
    """[length, width]: sine and cosine of i * w for the places i = 0, 1, ...; w falls from 1 to about 1 / `longest`."""
    half = width // 2
    angles = torch.arange(length, device="cpu").unsqueeze(1) * longest ** -(torch.arange(half, device="cpu") / half)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_patch_positions(config: M2EncoderConfig) -> torch.Tensor:
    """Patch positions [P, D], row by row: half of the width for the waves of the column, half for those of the row.

    The 2-D form of MoCo v3 (arXiv 2104.02057) and MAE, with the columns of the grid for their 10,000: waves longer than
    that look the same at every place.
    """
    side = config.image_size // config.patch_size
    columns = sincos_waves(side, config.hidden_size // 2, float(side)).expand(side, -1, -1)
    return PATCH_WAVES * torch.cat([columns, columns.transpose(0, 1)], dim=-1).flatten(0, 1)


class M2EncoderVisionEmbeddings(nn.Module):
    """Patch embedding, a class token in front, learned positions."""

    def __init__(self, config: M2EncoderConfig):
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embeddings = nn.Embedding(POSITION_OFFSET + 1 + config.num_patches, config.hidden_size)
        self.position_embeddings.positions_of = "vision"  # for `_init_weights`

    def interpolate_positions(self, height: int, width: int) -> torch.Tensor:
        """The position table for another image size: [1 + P, D], patch rows resized bicubically with antialiasing.

        Bicubic is what the field uses for running a model at another resolution. The official code's area interpolation
        belongs to reading a checkpoint of another size.
        """
        table = self.position_embeddings.weight[POSITION_OFFSET:]
        side = self.config.image_size // self.config.patch_size
        # At least fp32: half precision loses what antialiasing sums up.
        grid = table[1:].to(torch.promote_types(table.dtype, torch.float32))
        grid = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        new_side = (height // self.config.patch_size, width // self.config.patch_size)
        grid = nn.functional.interpolate(grid, size=new_side, mode="bicubic", align_corners=False, antialias=True)
        return torch.cat([table[:1], grid.flatten(2).transpose(1, 2)[0].to(table.dtype)])

    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        patch_mask: torch.Tensor | None = None,
        mask_token: torch.Tensor | None = None,
        kept_patches: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`pixel_values` [B, 3, height, width] -> [B, 1 + P, D]; `mask_token` [1, 1, D] stands in for the patches that
        are true in `patch_mask` [B, P]. With `kept_patches` [B, K] only these are left: [B, 1 + K, D]."""
        height, width = pixel_values.shape[-2:]
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        if patch_mask is not None:
            patches = torch.where(patch_mask.unsqueeze(-1), mask_token.to(patches.dtype), patches)
        hidden_states = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        if interpolate_pos_encoding and (height, width) != (self.config.image_size, self.config.image_size):
            hidden_states = hidden_states + self.interpolate_positions(height, width)
        else:
            hidden_states = hidden_states + self.position_embeddings.weight[POSITION_OFFSET:]
        if kept_patches is not None:
            kept = torch.cat([torch.zeros_like(kept_patches[:, :1]), kept_patches + 1], dim=1)  # [CLS] always
            hidden_states = hidden_states.gather(1, kept.unsqueeze(-1).expand(-1, -1, hidden_states.shape[-1]))
        return hidden_states


# ---- Layers --------------------------------------------------------------------------------------------------------


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out. [B, H, L, D/H] -> ([B, L, H, D/H], weights [B, H, L, L])."""
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    # fp32 softmax, as sdpa does inside; fp64 stays fp64.
    dtype = torch.promote_types(scores.dtype, torch.float32)
    weights = nn.functional.softmax(scores, dim=-1, dtype=dtype).to(query.dtype)
    dropped = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(dropped, value).transpose(1, 2).contiguous(), weights


class M2EncoderAttention(nn.Module):
    """Self- or cross-attention with MAGNETO's inner LayerNorm before the output projection."""

    is_causal = False  # sdpa runs causally when a module does not say so

    def __init__(self, config: M2EncoderConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.inner_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def _attention_function(self, device: torch.device) -> Callable:
        implementation = self.config._attn_implementation
        # torch's fused CPU kernel approximates exp: logits of the official tiny checkpoints move by 4.5e-6 with it
        # and by
        # 1e-6 without, and at these lengths it is not faster (docs/parity.md). On accelerators sdpa is what it says.
        if implementation == "sdpa" and device.type == "cpu":
            return eager_attention_forward
        return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        key_value_states: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, L, D] -> ([B, L, D], weights [B, H, L, K] or None). Keys and values come from `key_value_states`
        [B, K, D], or from the same states (K = L) without it."""
        input_shape = hidden_states.shape[:-1]
        sources = hidden_states if key_value_states is None else key_value_states
        query, key, value = (
            projection(states).view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2)
            for projection, states in ((self.q_proj, hidden_states), (self.k_proj, sources), (self.v_proj, sources))
        )
        attended, weights = self._attention_function(query.device)(
            self,
            # Scaled here, as the official code does: the order of roundings matters to the seventh digit.
            query * self.scaling,
            key,
            value,
            attention_mask,
            scaling=1.0,
            dropout=self.config.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        attended = self.inner_layer_norm(attended.reshape(*input_shape, -1))
        return self.out_proj(attended), weights


class M2EncoderMLP(nn.Module):
    """Feed-forward network with MAGNETO's LayerNorm between its two projections."""

    def __init__(self, config: M2EncoderConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.inner_layer_norm = nn.LayerNorm(config.intermediate_size, eps=config.layer_norm_eps)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, L, D] -> [B, L, D]."""
        return self.fc2(self.inner_layer_norm(self.activation(self.fc1(hidden_states))))


def drop_path(branch: torch.Tensor, rate: float, training: bool) -> torch.Tensor:
    """Stochastic depth: in training, drops a residual branch [B, L, D] of a whole sample with probability `rate`."""
    if not training or rate == 0:
        return branch
    kept = torch.rand(len(branch), 1, 1, device=branch.device) >= rate
    return branch * kept.to(branch.dtype) / (1 - rate)


class M2EncoderLayer(GradientCheckpointingLayer):
    """One pre-norm transformer layer with sub-LN; one expert of a multiway layer, or a shared upper layer."""

    def __init__(self, config: M2EncoderConfig, num_layers: int):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = M2EncoderAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = M2EncoderMLP(config)
        # MAGNETO section 3: the projections below carry the residual stream's variance, so their initial weights grow
        # with the depth L of their encoder. `_init_weights` reads the factor.
        for projection in (self.self_attn.v_proj, self.self_attn.out_proj, self.mlp.fc1, self.mlp.fc2):
            projection.init_scale = math.sqrt(math.log(2 * num_layers))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[B, L, D] -> [B, L, D]. The rate belongs to the depth, not to the weights, which several depths may share in
        training (`training.schedule.share_layers`)."""
        attended, _ = self.self_attn(self.layer_norm1(hidden_states), attention_mask, **kwargs)
        hidden_states = hidden_states + drop_path(attended, drop_path_rate, self.training)
        transformed = self.mlp(self.layer_norm2(hidden_states))
        return hidden_states + drop_path(transformed, drop_path_rate, self.training)


class M2EncoderMultiway(nn.ModuleDict):
    """One expert per modality; a pass uses the expert of its modality. A half model holds only its own expert."""

    def __init__(self, make_expert: Callable[[], nn.Module], modalities: Sequence[str]):
        super().__init__({modality: make_expert() for modality in modalities})

    def forward(self, hidden_states: torch.Tensor, modality: str, **kwargs: Any) -> torch.Tensor:
        return self[modality](hidden_states, **kwargs)


# ---- Models --------------------------------------------------------------------------------------------------------


class M2EncoderPreTrainedModel(PreTrainedModel):
    """Weight initialisation and what the transformers library needs to know about the family."""

    config: M2EncoderConfig
    base_model_prefix = "m2_encoder"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["M2EncoderTextEmbeddings", "M2EncoderVisionEmbeddings", "M2EncoderLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": M2EncoderLayer, "attentions": M2EncoderAttention}

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """As in transformers. Layers that training shares between depths (`training.schedule.share_layers`) are written
        once for each depth, so that the folder is that of an ordinary model."""
        parameters = dict(self.named_parameters(remove_duplicate=False))
        if state_dict is None and len(parameters) > len(set(parameters.values())):
            # safetensors refuses tensors that share memory, and transformers those that no configuration ties.
            firsts = {name for name, _ in self.named_parameters()}
            repeated = parameters.keys() - firsts
            state_dict = self.state_dict()
            state_dict = {name: value.clone() if name in repeated else value for name, value in state_dict.items()}
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Every parameter must be covered: from_pretrained builds on the meta device, and what is neither in the
        # checkpoint nor set here would be uninitialised memory.
        super()._init_weights(module)
        std = self.config.initializer_range
        if hasattr(module, "init_scale"):
            init.normal_(module.weight, std=std * module.init_scale)
        elif hasattr(module, "positions_of") and self.config.position_init == "sincos":
            # The class token's row, and those that nothing reads, stay as they have just been drawn.
            if module.positions_of == "vision":
                drawn, table = module.weight[: POSITION_OFFSET + 1], sincos_patch_positions(self.config)
            else:
                drawn, length = module.weight[:POSITION_OFFSET], self.config.max_position_embeddings - POSITION_OFFSET
                table = TEXT_WAVES * std * sincos_waves(length, self.config.hidden_size, float(length))
            init.copy_(module.weight, torch.cat([drawn, table.to(drawn)]))
        elif isinstance(module, M2EncoderVisionEmbeddings):
            init.normal_(module.cls_token, std=std)
        elif isinstance(module, M2EncoderModel):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)


class M2EncoderEncoder(M2EncoderPreTrainedModel):
    """Embeddings, multiway layers and shared upper layers, for both modalities or for one of them.

    `hidden_states` are the inputs of all layers and the final state (layers + 1), `attentions` one map per layer.
    """

    def __init__(self, config: M2EncoderConfig, modalities: Sequence[str] = MODALITIES):
        super().__init__(config)
        if "vision" in modalities:
            self.vision_embeddings = M2EncoderVisionEmbeddings(config)
        if "text" in modalities:
            self.text_embeddings = M2EncoderTextEmbeddings(config)
        depth, upper_depth = config.num_hidden_layers, config.num_upper_layers
        self.drop_path_rates = torch.linspace(0, config.drop_path_rate, depth + upper_depth, device="cpu").tolist()
        self.layers = nn.ModuleList(
            M2EncoderMultiway(lambda: M2EncoderLayer(config, depth), modalities) for _ in range(depth)
        )
        self.layer_norm = M2EncoderMultiway(
            lambda: nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps), modalities
        )
        self.upper_layers = nn.ModuleList(M2EncoderLayer(config, upper_depth) for _ in range(upper_depth))
        self.upper_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        patch_mask: torch.Tensor | None = None,
        mask_token: torch.Tensor | None = None,
        kept_patches: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> M2EncoderEncoderOutput:
        """One pass of one modality: either `input_ids` [B, L] with `attention_mask` [B, L], or `pixel_values`, of
        which pretraining hides the patches in `patch_mask` [B, P] behind `mask_token` [1, 1, D], or leaves out all but
        `kept_patches` [B, K]."""
        if pixel_values is not None:
            modality, padding = "vision", None
            hidden_states = self.vision_embeddings(
                pixel_values, interpolate_pos_encoding, patch_mask, mask_token, kept_patches
            )
        else:
            modality = "text"
            hidden_states = self.text_embeddings(input_ids)
            padding = None if attention_mask is None else attention_mask.unsqueeze(-1).to(hidden_states.dtype)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask)
        # Padded places are zeroed where each of the two encoders begins, and their keys are masked out in attention.
        if padding is not None:
            hidden_states = hidden_states * padding
        rates = iter(self.drop_path_rates)
        for layer in self.layers:
            hidden_states = layer(hidden_states, modality, attention_mask=mask, drop_path_rate=next(rates), **kwargs)
        backbone_hidden_state = self.layer_norm(hidden_states, modality)
        hidden_states = backbone_hidden_state if padding is None else backbone_hidden_state * padding
        for layer in self.upper_layers:
            hidden_states = layer(hidden_states, attention_mask=mask, drop_path_rate=next(rates), **kwargs)
        return M2EncoderEncoderOutput(
            last_hidden_state=self.upper_layer_norm(hidden_states), backbone_hidden_state=backbone_hidden_state
        )


class TextFeatures:
    """The text side of a model that holds `encoder`, `text_projection` and perhaps `backbone_text_projection`."""

    def _add_text_projections(self, config: M2EncoderConfig) -> None:
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        if config.use_backbone_projection:
            self.backbone_text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.text_embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.text_embeddings.word_embeddings = value

    @can_return_tuple
    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """
        The embedding of texts in `.pooler_output` [B, E], not normalised.

        Args:
            input_ids: [B, L] integers, starting with [CLS] and padded on the right. Rows with more than
                `config.max_text_length` real tokens lose the beginning of their text, as with the tokenizer's
                truncation.
            attention_mask: [B, L], 1 for tokens and 0 for padding. It is never guessed from the ids (the padding id is
                the end token too); without it all tokens count.

        Raises:
            ValueError: for wrong shapes, a mask that hides [CLS] (left padding), or an id outside the vocabulary.
        """
        check_text(self.config, input_ids, attention_mask)
        input_ids, attention_mask = keep_end_of_text(self.config.max_text_length, input_ids, attention_mask)
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        return _pool(output, self.text_projection, getattr(self, "backbone_text_projection", None))


class VisionFeatures:
    """The image side of a model that holds `encoder`, `image_projection` and perhaps `backbone_image_projection`."""

    def _add_image_projections(self, config: M2EncoderConfig) -> None:
        self.image_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        if config.use_backbone_projection:
            self.backbone_image_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        kept_patches: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """
        The embedding of images in `.pooler_output` [B, E], not normalised.

        Args:
            pixel_values: [B, 3, height, width], normalised as the image processor does.
            interpolate_pos_encoding: accept another size than `config.image_size` (sides in multiples of the patch
                size) by resizing the position table.
            kept_patches: [B, K] int64, for training: the patches of each image to see, the others are left out (FLIP,
                arXiv 2212.00794). The class token always stays.

        Raises:
            ValueError: for wrong shapes or sizes.
        """
        check_pixels(self.config, pixel_values, interpolate_pos_encoding)
        if kept_patches is not None:
            check_kept_patches(self.config, kept_patches, pixel_values)
        output = self.encoder(
            pixel_values=pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            kept_patches=kept_patches,
            **kwargs,
        )
        return _pool(output, self.image_projection, getattr(self, "backbone_image_projection", None))


class M2EncoderModel(TextFeatures, VisionFeatures, M2EncoderPreTrainedModel):
    """Both modalities: similarity logits, normalised embeddings, and the contrastive loss of one batch."""

    _keys_to_ignore_on_load_unexpected = PRETRAINING_KEYS

    def __init__(self, config: M2EncoderConfig):
        super().__init__(config)
        self.encoder = M2EncoderEncoder(config)
        self._add_text_projections(config)
        self._add_image_projections(config)
        # Shape [1]: torch's fully_shard refuses 0-dimensional parameters.
        self.logit_scale = nn.Parameter(torch.tensor([float(config.logit_scale_init_value)]))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        kept_patches: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> M2EncoderOutput:
        """
        Either modality alone, or both.

        Args:
            input_ids, attention_mask: [B_text, L], see `get_text_features`.
            pixel_values: [B_image, 3, height, width], see `get_image_features`.
            return_loss: also give the contrastive loss of this batch, in which row i of the texts describes image i.
            interpolate_pos_encoding, kept_patches: see `get_image_features`.

        Raises:
            ValueError: when neither modality is given, or `return_loss` is asked without as many texts as images.
        """
        if input_ids is None and pixel_values is None:
            raise ValueError("Give input_ids, pixel_values or both: there is nothing to encode.")
        output = M2EncoderOutput()
        if input_ids is not None:
            text = self.get_text_features(input_ids, attention_mask, **kwargs)
            output.text_model_output = text
            output.text_embeds = _normalize(text.pooler_output)
            output.backbone_text_embeds = _normalize(text.backbone_pooler_output)
        if pixel_values is not None:
            image = self.get_image_features(pixel_values, interpolate_pos_encoding, kept_patches, **kwargs)
            output.vision_model_output = image
            output.image_embeds = _normalize(image.pooler_output)
            output.backbone_image_embeds = _normalize(image.backbone_pooler_output)
        if input_ids is not None and pixel_values is not None:
            scale = self.logit_scale.exp().to(output.image_embeds.dtype)
            output.logits_per_image = scale * (output.image_embeds @ output.text_embeds.t())
            output.logits_per_text = output.logits_per_image.t()
        if return_loss:
            output.loss = _contrastive_loss(output.logits_per_image)
        # Rebuilt so that the fields come in their declared order, which tuples and pipelines read.
        return M2EncoderOutput(**output)


class M2EncoderTextModel(TextFeatures, M2EncoderPreTrainedModel):
    """The text half of a checkpoint: holds and loads the text experts, the upper layers and the text projection."""

    input_modalities = ("text",)
    _no_split_modules = ["M2EncoderTextEmbeddings", "M2EncoderLayer"]
    _keys_to_ignore_on_load_unexpected = [
        *PRETRAINING_KEYS,
        r"\.vision",
        r"^(backbone_)?image_projection",
        r"^logit_scale",
    ]

    def __init__(self, config: M2EncoderConfig):
        super().__init__(config)
        self.encoder = M2EncoderEncoder(config, modalities=("text",))
        self._add_text_projections(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> M2EncoderOutput:
        """As `M2EncoderModel.forward` with texts only: normalised `text_embeds` [B, E]."""
        text = self.get_text_features(input_ids, attention_mask, **kwargs)
        return M2EncoderOutput(
            text_embeds=_normalize(text.pooler_output),
            backbone_text_embeds=_normalize(text.backbone_pooler_output),
            text_model_output=text,
        )


class M2EncoderVisionModel(VisionFeatures, M2EncoderPreTrainedModel):
    """The vision half of a checkpoint: holds and loads the vision experts, the upper layers and the image
    projection."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["M2EncoderVisionEmbeddings", "M2EncoderLayer"]
    _keys_to_ignore_on_load_unexpected = [
        *PRETRAINING_KEYS,
        r"\.text",
        r"^(backbone_)?text_projection",
        r"^logit_scale",
    ]

    def __init__(self, config: M2EncoderConfig):
        super().__init__(config)
        self.encoder = M2EncoderEncoder(config, modalities=("vision",))
        self._add_image_projections(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.vision_embeddings.patch_embedding

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False, **kwargs: Any
    ) -> M2EncoderOutput:
        """As `M2EncoderModel.forward` with images only: normalised `image_embeds` [B, E]."""
        image = self.get_image_features(pixel_values, interpolate_pos_encoding, **kwargs)
        return M2EncoderOutput(
            image_embeds=_normalize(image.pooler_output),
            backbone_image_embeds=_normalize(image.backbone_pooler_output),
            vision_model_output=image,
        )


# ---- Helpers -------------------------------------------------------------------------------------------------------


def _pool(
    output: M2EncoderEncoderOutput, projection: nn.Linear, backbone_projection: nn.Linear | None
) -> M2EncoderFeatures:
    """Projects the [CLS] states [B, L, D] -> [B, E]."""
    backbone = None if backbone_projection is None else backbone_projection(output.backbone_hidden_state[:, 0])
    return M2EncoderFeatures(
        last_hidden_state=output.last_hidden_state,
        pooler_output=projection(output.last_hidden_state[:, 0]),
        hidden_states=output.hidden_states,
        attentions=output.attentions,
        backbone_pooler_output=backbone,
    )


def _normalize(embeds: torch.Tensor | None) -> torch.Tensor | None:
    return None if embeds is None else nn.functional.normalize(embeds, dim=-1)


def _contrastive_loss(logits_per_image: torch.Tensor | None) -> torch.Tensor:
    """Symmetric cross-entropy of one batch; over several processes use training.losses.grouped_itc_loss."""
    if logits_per_image is None or logits_per_image.shape[0] != logits_per_image.shape[1]:
        seen = "one modality" if logits_per_image is None else f"{tuple(logits_per_image.shape)} images and texts"
        raise ValueError(f"return_loss needs one text for each image, row by row; got {seen}.")
    target = torch.arange(len(logits_per_image), device=logits_per_image.device)
    per_image = nn.functional.cross_entropy(logits_per_image.float(), target)
    per_text = nn.functional.cross_entropy(logits_per_image.float().t(), target)
    return (per_image + per_text) / 2


__all__ = [
    "M2EncoderModel",
    "M2EncoderPreTrainedModel",
    "M2EncoderTextModel",
    "M2EncoderVisionModel",
]
