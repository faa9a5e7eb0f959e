"""What the models take: checks of their inputs, in words that say what to do, and the cutting of long texts.

Shapes: B batch, L tokens, P patches, K kept patches.
"""

import torch

from .configuration_m2encoder import M2EncoderConfig, nearest_multiple


def keep_end_of_text(
    limit: int, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Cuts rows to `limit` tokens as the tokenizer would: [CLS] stays, the beginning goes, the end stays.

    The stock zero-shot pipeline never truncates, so that the model has to.
    """
    if input_ids.shape[1] <= limit:
        return input_ids, attention_mask
    if attention_mask is None:
        return torch.cat([input_ids[:, :1], input_ids[:, 1 - limit :]], dim=1), None
    lengths = attention_mask.long().sum(dim=1, keepdim=True)
    first = (lengths - (limit - 1)).clamp(min=1)
    kept = first + torch.arange(limit - 1, device=input_ids.device)
    kept = torch.cat([torch.zeros_like(first), kept], dim=1)
    return input_ids.gather(1, kept), attention_mask.gather(1, kept)


def check_text(config: M2EncoderConfig, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    """Raises ValueError for token ids or a mask that `get_text_features` cannot take."""
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must have the shape [batch, tokens], got {tuple(input_ids.shape)}.")
    if input_ids.is_floating_point():
        raise ValueError(f"input_ids must be integers, got {input_ids.dtype}.")
    if input_ids.shape[1] == 0:
        raise ValueError("input_ids has no tokens: even an empty text is [CLS] and the end token.")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids {tuple(input_ids.shape)}, "
            f"got {tuple(attention_mask.shape)}."
        )
    # Reading values would stall an accelerator and cannot be traced; on the CPU it is free.
    if torch.compiler.is_compiling() or input_ids.device.type != "cpu" or input_ids.numel() == 0:
        return
    if attention_mask is not None and not bool(attention_mask[:, 0].all()):
        raise ValueError(
            "attention_mask hides the first token of a row, but the embedding is read at [CLS], which comes first: "
            "pad on the right (tokenizer.padding_side = 'right')."
        )
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"input_ids must lie in [0, {config.vocab_size - 1}], got {low if low < 0 else high}: "
            "was the text tokenised with another model's tokenizer?"
        )


def check_pixels(config: M2EncoderConfig, pixel_values: torch.Tensor, interpolate_pos_encoding: bool) -> None:
    """Raises ValueError for images that `get_image_features` cannot take."""
    if pixel_values.ndim != 4 or pixel_values.shape[1] != config.num_channels:
        raise ValueError(
            f"pixel_values must have the shape [batch, {config.num_channels}, height, width], "
            f"got {tuple(pixel_values.shape)}."
        )
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"pixel_values must be the floating-point output of the image processor, got {pixel_values.dtype}."
        )
    height, width = pixel_values.shape[-2:]
    if interpolate_pos_encoding:
        if height < 1 or width < 1 or height % config.patch_size or width % config.patch_size:
            nearest = " x ".join(str(nearest_multiple(side, config.patch_size)) for side in (height, width))
            raise ValueError(
                f"Image sides must be multiples of the patch size {config.patch_size}, got {height} x {width}; the "
                f"nearest is {nearest}."
            )
    elif (height, width) != (config.image_size, config.image_size):
        raise ValueError(
            f"This model takes images of {config.image_size} x {config.image_size} pixels, got {height} x {width}. "
            "Use the image processor of the checkpoint, or pass interpolate_pos_encoding=True."
        )


def check_kept_patches(config: M2EncoderConfig, kept_patches: torch.Tensor, pixel_values: torch.Tensor) -> None:
    """Raises ValueError unless `kept_patches` [B, K] are numbers of patches of `pixel_values`."""
    rows, num_patches = len(pixel_values), count_patches(config, pixel_values)
    shape = tuple(kept_patches.shape)
    if kept_patches.dtype != torch.long or len(shape) != 2 or shape[0] != rows or not 1 <= shape[1] <= num_patches:
        raise ValueError(
            f"kept_patches must be torch.int64 [{rows}, 1 to {num_patches}], one row of patch numbers for each image, "
            f"got {kept_patches.dtype} {list(shape)}."
        )
    if torch.compiler.is_compiling() or kept_patches.device.type != "cpu":
        return
    low, high = int(kept_patches.min()), int(kept_patches.max())
    if low < 0 or high >= num_patches:
        raise ValueError(f"kept_patches must lie in [0, {num_patches - 1}], got {low} to {high}.")


def count_patches(config: M2EncoderConfig, pixel_values: torch.Tensor) -> int:
    """Patches P of images [B, 3, height, width], whatever their size."""
    height, width = pixel_values.shape[-2:]
    return (height // config.patch_size) * (width // config.patch_size)
