"""M2-Encoder with its pretraining heads: cross-modal masked language and image modelling, CMLM and CMIM (arXiv
2401.15896, section 2). Tested by `pytest tests/modeling/test_pretraining_model.py` and `test_pretraining_losses.py`.

The masked text is completed by an image-to-text decoder that looks at the image, the masked image by a text-to-image
decoder that looks at the text. No training code was published; what the paper leaves open is decided here and said so.

Shapes: B batch, L text tokens, P patches, D width, V vocabulary, M masked tokens of the batch, C values per patch.
"""

# No `from __future__ import annotations` here, as in modeling_m2encoder.py.
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import can_return_tuple

from .configuration_m2encoder import M2EncoderConfig
from .inputs_m2encoder import count_patches
from .modeling_m2encoder import (
    M2EncoderAttention,
    M2EncoderMLP,
    M2EncoderModel,
    M2EncoderOutput,
)


@dataclass
class M2EncoderForPreTrainingOutput(M2EncoderOutput):
    """
    What `M2EncoderForPreTraining.forward` returns: the fields of `M2EncoderOutput`, and with the masks also

    `loss_cmlm`, `loss_cmim` (scalars); `text_decoder_states` [B, L, D], which `pretraining_heads.text_head` turns into
    logits over the vocabulary; `predicted_patches` [B, P, C].
    """

    loss_cmlm: torch.Tensor | None = None
    loss_cmim: torch.Tensor | None = None
    text_decoder_states: torch.Tensor | None = None
    predicted_patches: torch.Tensor | None = None


# ---- Losses --------------------------------------------------------------------------------------------------------


def masked_language_loss(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    targets: torch.Tensor,
    *,
    chunk: int = 256,
) -> torch.Tensor:
    """Mean cross-entropy of masked tokens over the vocabulary, without the [M, V] logits.

    `chunk` rows of logits exist at a time (256 x 115,244 are 118 MB in fp32). The gradients are made in the same pass,
    while a chunk's probabilities are at hand: exact, no logits made twice; they take as much memory as `hidden_states`,
    `weight` and `bias`. Products are computed in autocast's dtype, or else in that of `hidden_states`; logits,
    probabilities and sums in fp32 (fp64 for fp64).

    Args:
        hidden_states: [M, D], the states at the masked places only. M = 0 gives the loss 0, with zero gradients.
        weight, bias: [V, D] and [V] of the head.
        targets: [M] integers in [0, V), the tokens that were masked.
        chunk: rows at a time; changes memory and speed only.

    Returns:
        The 0-d mean over these M places. Over several processes the mean of the ranks' values weighs every rank
        equally, however many places it has masked.

    Raises:
        ValueError: for shapes or dtypes that do not fit, or a target outside the vocabulary (seen on the CPU only).
    """
    if hidden_states.ndim != 2 or weight.ndim != 2 or hidden_states.shape[1] != weight.shape[1]:
        raise ValueError(
            "hidden_states [M, D] and weight [V, D] must have two dimensions and one width, got "
            f"{list(hidden_states.shape)} and {list(weight.shape)}."
        )
    if bias.shape != weight.shape[:1] or targets.shape != hidden_states.shape[:1]:
        raise ValueError(
            f"bias must be [V = {len(weight)}] and targets [M = {len(hidden_states)}], got {list(bias.shape)} and "
            f"{list(targets.shape)}."
        )
    if targets.dtype != torch.long:
        raise ValueError(f"targets must be torch.int64 token ids, got {targets.dtype}.")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}.")
    if (
        targets.device.type == "cpu"
        and len(targets)
        and not 0 <= int(targets.min()) <= int(targets.max()) < len(weight)
    ):
        raise ValueError(
            f"targets must lie in [0, {len(weight) - 1}], got {int(targets.min())} to {int(targets.max())}."
        )
    return _ChunkedCrossEntropy.apply(hidden_states, weight, bias, targets, chunk, torch.is_grad_enabled())


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        targets: torch.Tensor,
        chunk: int,
        learns: bool,
    ) -> torch.Tensor:
        device = hidden_states.device.type
        sums = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
        loss = torch.zeros((), dtype=sums, device=hidden_states.device)
        inputs = (hidden_states, weight, bias)
        gradients = [torch.zeros_like(x, dtype=sums) for x in inputs] if learns else None
        with torch.autocast(device, enabled=False):
            rows, table = hidden_states.to(dtype), weight.to(dtype)
            for part in (slice(start, start + chunk) for start in range(0, len(rows), chunk)):
                # One buffer is in turn the logits, their exponentials, the probabilities and the gradient.
                buffer = (rows[part] @ table.T).to(sums).add_(bias.to(sums))
                buffer -= buffer.amax(dim=1, keepdim=True)
                picked = buffer.gather(1, targets[part, None])
                totals = buffer.exp_().sum(dim=1, keepdim=True)
                loss += (totals.log() - picked).sum()
                if gradients is not None:
                    buffer /= totals
                    buffer.scatter_add_(1, targets[part, None], -torch.ones_like(picked))
                    _add_gradients(gradients, part, buffer, rows[part], table)
                del buffer  # or two would exist while the next is made
        places = max(len(rows), 1)
        if gradients is not None:
            # Divided here and not in the chunks: 1 / M times a small probability would vanish in fp16.
            gradients = [total.div_(places).to(x.dtype) for total, x in zip(gradients, inputs, strict=True)]
            ctx.save_for_backward(*gradients)
        return loss / places

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *(gradient * grad_output.to(gradient.dtype) for gradient in ctx.saved_tensors), None, None, None


def _add_gradients(
    totals: list[torch.Tensor], part: slice, logit_gradient: torch.Tensor, rows: torch.Tensor, table: torch.Tensor
) -> None:
    """Adds one chunk's share to the gradients of the states [M, D], the weight [V, D] and the bias [V]."""
    of_states, of_weight, of_bias = totals
    of_bias += logit_gradient.sum(dim=0)
    gradient = logit_gradient.to(rows.dtype)
    of_states[part] = gradient @ table
    if of_weight.dtype == rows.dtype:
        of_weight.addmm_(gradient.T, rows)
    else:
        of_weight += gradient.T @ rows


def masked_image_loss(
    predicted_patches: torch.Tensor,
    pixel_values: torch.Tensor,
    patch_mask: torch.Tensor,
    *,
    patch_size: int,
    normalize_pixels: bool = True,
) -> torch.Tensor:
    """Mean squared error of the pixels of masked patches; visible patches count nothing.

    Args:
        predicted_patches: [B, P, C], C = channels * patch_size**2 in the order of `patch_pixels`.
        pixel_values: [B, channels, height, width], as they entered the model.
        patch_mask: [B, P], true where a patch was hidden. If none is, the loss is 0.
        patch_size: side of a patch in pixels.
        normalize_pixels: the target is each patch less its mean, divided by its standard deviation (MAE, arXiv
            2111.06377, section 4.1), so that the loss is not ruled by patches of high contrast.

    Returns:
        The 0-d mean over masked patches and their pixels, in fp32 (fp64 for fp64).

    Raises:
        ValueError: for shapes that do not fit.
    """
    target = patch_pixels(pixel_values, patch_size)
    if predicted_patches.shape != target.shape or patch_mask.shape != target.shape[:2]:
        raise ValueError(
            f"Images {list(pixel_values.shape)} with patches of {patch_size} need predictions {list(target.shape)} and "
            f"a mask {list(target.shape[:2])}, got {list(predicted_patches.shape)} and {list(patch_mask.shape)}."
        )
    dtype = torch.float64 if predicted_patches.dtype == torch.float64 else torch.float32
    target = target.to(dtype)
    if normalize_pixels:
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()  # MAE's epsilon
    errors = (predicted_patches.to(dtype) - target).square().mean(dim=-1)
    # Weights rather than indexing: shapes stay known and an accelerator need not wait.
    hidden = patch_mask.to(dtype)
    return (errors * hidden).sum() / hidden.sum().clamp(min=1)


def patch_pixels(pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """[B, channels, height, width] -> [B, P, C]: patches row by row, each as (channel, row, column), like a patch of
    the patch embedding's weight.

    Raises:
        ValueError: when the sides are not multiples of the patch size.
    """
    height, width = pixel_values.shape[-2:]
    if pixel_values.ndim != 4 or height % patch_size or width % patch_size:
        raise ValueError(
            f"pixel_values must be [batch, channels, height, width] with sides in multiples of {patch_size}, got "
            f"{list(pixel_values.shape)}."
        )
    grid = pixel_values.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


# ---- Decoders ------------------------------------------------------------------------------------------------------


class M2EncoderDecoderLayer(GradientCheckpointingLayer):
    """`M2EncoderLayer` with cross-attention to the other modality between its two parts."""

    def __init__(self, config: M2EncoderConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = M2EncoderAttention(config)
        self.cross_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.cross_attn = M2EncoderAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = M2EncoderMLP(config)
        # MAGNETO section 3, decoder of an encoder-decoder model: three branches per layer carry the variance.
        attentions = (self.self_attn, self.cross_attn)
        carriers = [part for attention in attentions for part in (attention.v_proj, attention.out_proj)]
        for projection in (*carriers, self.mlp.fc1, self.mlp.fc2):
            projection.init_scale = math.sqrt(math.log(3 * config.num_decoder_layers))

    def forward(
        self,
        hidden_states: torch.Tensor,
        context: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[B, L, D], context [B, K, D] -> [B, L, D]."""
        hidden_states = hidden_states + self.self_attn(self.layer_norm1(hidden_states), attention_mask)[0]
        crossed, _ = self.cross_attn(self.cross_layer_norm(hidden_states), context_mask, key_value_states=context)
        hidden_states = hidden_states + crossed
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class M2EncoderDecoder(nn.Module):
    """Completes the masked states of one modality with what the other modality knows; attention is bidirectional."""

    def __init__(self, config: M2EncoderConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(M2EncoderDecoderLayer(config) for _ in range(config.num_decoder_layers))
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        context: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        context_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[B, L, D] -> [B, L, D].

        Args:
            hidden_states: [B, L, D], the encoder's states of the masked input; they hold the positions already.
            context: [B, K, D], the encoder's states of the other modality's whole input, [CLS] first.
            attention_mask, context_attention_mask: [B, L] and [B, K], 0 for padding.
        """
        if self.config.decoder_context == "cls":
            context, context_attention_mask = context[:, :1], None
        mask = create_bidirectional_mask(self.config, hidden_states, attention_mask)
        context_mask = create_bidirectional_mask(
            self.config, hidden_states, context_attention_mask, encoder_hidden_states=context
        )
        for layer in self.layers:
            hidden_states = layer(hidden_states, context, attention_mask=mask, context_mask=context_mask)
        return self.layer_norm(hidden_states)


class M2EncoderPretrainingHeads(nn.Module):
    """All that pretraining has beyond `M2EncoderModel`: the patch mask, the two decoders and their two outputs."""

    def __init__(self, config: M2EncoderConfig):
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.image_to_text_decoder = M2EncoderDecoder(config)
        self.text_to_image_decoder = M2EncoderDecoder(config)
        self.text_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.pixel_head = nn.Linear(config.hidden_size, config.num_channels * config.patch_size**2)


# ---- Model ---------------------------------------------------------------------------------------------------------


class M2EncoderForPreTraining(M2EncoderModel):
    """`M2EncoderModel` and the heads that it is pretrained with.

    A subclass and not a wrapper: every weight of the encoder has the same name in both, so either loads the other's
    folder, and everything that takes an `M2EncoderModel` takes this. The inference classes leave the heads in the file.
    """

    _keys_to_ignore_on_load_unexpected = None  # here the heads are expected, and a left-over layer should be heard of
    _no_split_modules = [*M2EncoderModel._no_split_modules, "M2EncoderDecoderLayer"]

    def __init__(self, config: M2EncoderConfig):
        super().__init__(config)
        self.pretraining_heads = M2EncoderPretrainingHeads(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, M2EncoderPretrainingHeads):
            init.normal_(module.mask_token, std=self.config.initializer_range)

    def get_output_embeddings(self) -> nn.Module:
        return self.pretraining_heads.text_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.pretraining_heads.text_head = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        text_mask: torch.Tensor | None = None,
        patch_mask: torch.Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        kept_patches: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> M2EncoderForPreTrainingOutput:
        """
        `M2EncoderModel.forward`, and the two masked losses for the masks that are given.

        The embeddings, which the contrastive loss is made of, come from the whole inputs. Masking is a second pass of
        the same encoder: tokens in `text_mask` are replaced by [MASK], patches in `patch_mask` by a learned token (the
        published files hold one, as BEiT-3's do; MAE's dropping of patches would be cheaper). The decoder of a masked
        input looks at the *whole* input of the other modality, whose states the first pass made already: all of them,
        or only [CLS] (`config.decoder_context`; the paper names both). Both losses reach both encoders.

        Cost, as a part of the pass without masks (multiply-additions counted for 224-pixel images and texts of 20
        tokens, 9 of them masked): CMLM 21 %, 14 % and 12 % for 0.4B, 1B and 10B; CMIM 127 %, 105 % and 100 %.

        The losses are made here rather than by the caller because only in here does a sharded model have its weights
        whole. L = L_ITC + 0.3 L_CMIM + 0.3 L_CMLM is put together by the caller, who may contrast over many processes;
        `loss` stays the contrastive loss of this batch.

        Args:
            input_ids, attention_mask: [B, L], see `get_text_features`; at most `config.max_text_length` tokens.
            pixel_values: [B, 3, height, width]; row i belongs to text i.
            text_mask: [B, L] bool, true for tokens to mask (`training.masking.mask_text`); none of them padding.
            patch_mask: [B, P] bool, true for patches to mask (`training.masking.mask_patches`).
            return_loss, interpolate_pos_encoding: see `M2EncoderModel.forward`.
            kept_patches: see `get_image_features`. Only the first pass drops the others: the contrastive features and
                what CMLM's decoder sees of the image come from the kept patches, while CMIM's pass holds all P places,
                because it predicts those in `patch_mask` whether or not the first pass has seen them.

        Raises:
            ValueError: for masks of another shape or dtype, without the other modality, on padding, or without a
                `config.mask_token_id`.
        """
        whole = super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            return_loss=return_loss,
            interpolate_pos_encoding=interpolate_pos_encoding,
            kept_patches=kept_patches,
            return_dict=True,
            **kwargs,
        )
        output = M2EncoderForPreTrainingOutput(**whole)
        if text_mask is None and patch_mask is None:
            return output
        if input_ids is None or pixel_values is None or len(input_ids) != len(pixel_values):
            raise ValueError("Masked modelling is cross-modal: give input_ids and pixel_values, row by row.")
        heads = self.pretraining_heads
        text_states = whole.text_model_output.last_hidden_state
        image_states = whole.vision_model_output.last_hidden_state
        if text_mask is not None:
            self._check_text_mask(text_mask, input_ids, attention_mask)
            masked_ids = input_ids.masked_fill(text_mask, self.config.mask_token_id)
            states = self.encoder(input_ids=masked_ids, attention_mask=attention_mask).last_hidden_state
            states = heads.image_to_text_decoder(states, image_states, attention_mask=attention_mask)
            output.text_decoder_states = states
            output.loss_cmlm = masked_language_loss(
                states[text_mask], heads.text_head.weight, heads.text_head.bias, input_ids[text_mask].long()
            )
        if patch_mask is not None:
            _check_mask("patch_mask", patch_mask, (len(pixel_values), count_patches(self.config, pixel_values)))
            states = self.encoder(
                pixel_values=pixel_values,
                interpolate_pos_encoding=interpolate_pos_encoding,
                patch_mask=patch_mask,
                mask_token=heads.mask_token,
            ).last_hidden_state
            states = heads.text_to_image_decoder(states, text_states, context_attention_mask=attention_mask)
            output.predicted_patches = heads.pixel_head(states[:, 1:])
            output.loss_cmim = masked_image_loss(
                output.predicted_patches,
                pixel_values,
                patch_mask,
                patch_size=self.config.patch_size,
                normalize_pixels=self.config.normalize_pixels,
            )
        return M2EncoderForPreTrainingOutput(**output)

    def _check_text_mask(
        self, text_mask: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> None:
        _check_mask("text_mask", text_mask, tuple(input_ids.shape))
        if self.config.mask_token_id is None:
            raise ValueError("config.mask_token_id is not set: masking text needs the tokenizer's [MASK].")
        if input_ids.shape[1] > self.config.max_text_length:
            raise ValueError(
                f"A masked text may have at most config.max_text_length = {self.config.max_text_length} tokens, got "
                f"{input_ids.shape[1]}: truncate with the tokenizer, before the mask is drawn."
            )
        # On an accelerator reading values would stall it, as in modeling_m2encoder.py.
        if text_mask.device.type == "cpu" and attention_mask is not None and (text_mask & (attention_mask == 0)).any():
            raise ValueError("text_mask covers padding: only tokens with attention_mask 1 can be masked.")


def _check_mask(name: str, mask: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(mask.shape) != shape or mask.dtype != torch.bool:
        raise ValueError(f"{name} must be bool {list(shape)}, got {mask.dtype} {list(mask.shape)}.")


__all__ = ["M2EncoderForPreTraining"]
