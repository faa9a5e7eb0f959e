"""The image-text contrastive loss, exact over a group of processes. Tested by `pytest tests/training/test_losses.py`.

Shapes: b rows (samples) of this rank, g ranks in the group, N = g * b rows in the loss, E embedding size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# torch 2.13 renamed the collective and warns about the old name, which is the only one that older versions know.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def grouped_itc_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    tile: int = 1024,
    gathered: Tensor | None = None,
) -> Tensor:
    """Symmetric image-text cross-entropy over the N = g * b samples of a process group (Grouped-ITC, section 2.3).

    For image rows v, text rows t and s = exp(logit_scale) the group's loss is
    `L = 1/(2N) sum_i [logsumexp_j(s v_i.t_j) + logsumexp_j(s t_i.v_j) - 2 s v_i.t_i]`. Equation (1) of the paper
    (arXiv 2401.15896) lacks the minus sign before its logarithms and has the image-to-text direction in both terms;
    this is the symmetric cross-entropy that it means.

    Every rank returns the mean over its OWN b rows, so the mean of the ranks' values is the mean of the groups' losses.
    Gradients are exact in the same sense: each rank receives g * dL/d(own rows) and its share of dL/d(logit_scale),
    so that the mean over all ranks, which DDP and FSDP take anyway, is the gradient of the mean of the groups' losses.
    A rank's gradient is therefore not the derivative of its own returned value alone: other ranks' rows depend on its
    features too.

    Communication, inside the group only: the sizes (four integers per rank), the features in their own dtype (2 b E
    elements per rank), and in backward two numbers per sample. Memory: the gathered features (2 N E), and tiles of
    tile * tile: no [b, N] matrix exists. Logits and log-sum-exp are fp32, or fp64 for fp64 features, whatever autocast
    says. Checking the sizes waits for the device once per call.

    Args:
        image_embeds: [b, E], this rank's rows, L2-normalised by the caller (not checked).
        text_embeds: [b, E], row i belongs to image row i; same dtype and device.
        logit_scale: tensor of one element, the logarithm of 1/temperature.
        group: process group to contrast over. `None`: all ranks if `torch.distributed` is initialised, else this
            process alone.
        tile: rows and columns of the logits that exist at a time; changes memory and speed only.
        gathered: [N, 2E], the group's image and text rows side by side, ranks in group order, where the caller has
            gathered them already (and so knows that the ranks agree); `None`: they are gathered here.

    Returns:
        The 0-d loss of this rank's rows, fp32 (fp64 for fp64 features).

    Raises:
        ValueError: on every rank of the group, when any rank's arguments have wrong or different shapes, batch sizes or
            dtypes (no rank is left waiting in a collective).
    """
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    error = _argument_error(image_embeds, text_embeds, logit_scale, tile)
    if (
        gathered is None
        and group is not None
        and group is not dist.GroupMember.NON_GROUP_MEMBER
        and dist.get_world_size(group) > 1
    ):
        _check_ranks_agree(image_embeds, error, group)
    if error:
        raise ValueError(error)
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("This rank is not a member of the process group it was given.")
    if gathered is not None:
        rows = len(image_embeds) * (1 if group is None else dist.get_world_size(group))
        if gathered.shape != (rows, 2 * image_embeds.shape[1]):
            raise ValueError(f"gathered must be {[rows, 2 * image_embeds.shape[1]]}, got {list(gathered.shape)}.")
    return _GroupedITC.apply(image_embeds, text_embeds, logit_scale, group, tile, gathered)


def _argument_error(image: Tensor, text: Tensor, logit_scale: Tensor, tile: int) -> str | None:
    """What is wrong with one rank's arguments, or None."""
    if image.ndim != 2 or text.ndim != 2 or image.shape != text.shape or 0 in image.shape:
        return (
            "image_embeds and text_embeds must both be [b, E] with the same b >= 1 and E >= 1, got "
            f"{list(image.shape)} and {list(text.shape)}."
        )
    if image.dtype not in _DTYPES or image.dtype != text.dtype:
        return f"image_embeds and text_embeds must have one floating dtype, got {image.dtype} and {text.dtype}."
    if logit_scale.numel() != 1 or not logit_scale.is_floating_point():
        return f"logit_scale must be one floating-point element, got {list(logit_scale.shape)} of {logit_scale.dtype}."
    if image.device != text.device or image.device != logit_scale.device:
        return f"All tensors must be on one device, got {image.device}, {text.device} and {logit_scale.device}."
    if tile < 1:
        return f"tile must be at least 1, got {tile}."
    return None


def _check_ranks_agree(image: Tensor, error: str | None, group: dist.ProcessGroup) -> None:
    """Every rank learns every rank's [valid, b, E, dtype]; all raise if they differ, so that nobody waits for ever."""
    own = [0, 0, 0, 0] if error else [1, *image.shape, _DTYPES.index(image.dtype)]
    rows = gather_rows(torch.tensor([own], device=image.device), group).tolist()
    refused = [rank for rank, row in enumerate(rows) if not row[0]]
    if refused and not error:
        raise ValueError(f"Ranks {refused} of the group refused their arguments; see their message.")
    if not refused and any(row != rows[0] for row in rows):
        seen = ", ".join(f"rank {r}: [{b}, {e}] {_DTYPES[d]}" for r, (_, b, e, d) in enumerate(rows))
        raise ValueError(f"Every rank of the group must bring the same shape and dtype, got {seen}.")


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[b, ...] of every rank, one after the other in group order: [N, ...]."""
    if group is None or dist.get_world_size(group) == 1:
        return rows
    out = rows.new_empty((dist.get_world_size(group) * rows.shape[0], *rows.shape[1:]))
    _all_gather_single(out, rows.contiguous(), group=group)
    return out


def _gather_pair(image: Tensor, text: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Both modalities of the whole group with one collective; the results are views of one [N, 2E] buffer."""
    if group is None or dist.get_world_size(group) == 1:
        return image, text
    both = gather_rows(torch.cat([image, text], dim=1), group)
    return both.split(image.shape[1], dim=1)


def _tiles(length: int, tile: int) -> Iterator[slice]:
    return (slice(start, start + tile) for start in range(0, length, tile))


def _log_sum_exp(queries: Tensor, keys: Tensor, scale: Tensor, tile: int) -> Tensor:
    """log sum_j exp(scale * q_i.k_j) for every query: [b, E], [N, E] -> [b] in scale's dtype."""
    result = scale.new_full((len(queries),), -torch.inf)
    for rows in _tiles(len(queries), tile):
        query_block = queries[rows].to(scale.dtype)
        for columns in _tiles(len(keys), tile):
            logits = (query_block @ keys[columns].to(scale.dtype).T).mul_(scale)
            result[rows] = torch.logaddexp(result[rows], logits.logsumexp(dim=1))
    return result


def _direction_gradient(
    queries: Tensor, keys: Tensor, own_lse: Tensor, key_lse: Tensor, scale: Tensor, tile: int
) -> tuple[Tensor, Tensor]:
    """With w_ij = exp(s z_ij - own_lse_i) + exp(s z_ij - key_lse_j): sum_j w_ij k_j [b, E], and sum_ij w_ij z_ij.

    The first term is this query's own softmax, the second its share in every key's softmax over the queries. The key's
    owner knows that log-sum-exp; having it here is what makes a reduce-scatter of [N, E] gradients needless.
    """
    gradient = scale.new_zeros(queries.shape)
    weighted_cosines = scale.new_zeros(())
    for rows in _tiles(len(queries), tile):
        query_block = queries[rows].to(scale.dtype)
        for columns in _tiles(len(keys), tile):
            key_block = keys[columns].to(scale.dtype)
            cosines = query_block @ key_block.T
            logits = cosines * scale
            weights = (logits - own_lse[rows, None]).exp_()
            weights += logits.sub_(key_lse[None, columns]).exp_()
            gradient[rows].addmm_(weights, key_block)
            weighted_cosines += torch.dot(weights.flatten(), cosines.flatten())
    return gradient, weighted_cosines


class _GroupedITC(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        logit_scale: Tensor,
        group: dist.ProcessGroup | None,
        tile: int,
        gathered: Tensor | None,
    ) -> Tensor:
        dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
        with torch.autocast(image.device.type, enabled=False):
            scale = logit_scale.detach().reshape(()).to(dtype).exp()
            if gathered is None:
                all_images, all_texts = _gather_pair(image, text, group)
            else:
                all_images, all_texts = gathered.split(image.shape[1], dim=1)
            image_lse = _log_sum_exp(image, all_texts, scale, tile)
            text_lse = _log_sum_exp(text, all_images, scale, tile)
            positives = torch.linalg.vecdot(image.to(dtype), text.to(dtype))
            loss = ((image_lse + text_lse) / 2 - scale * positives).mean()
        ctx.save_for_backward(image, text, logit_scale, all_images, all_texts, image_lse, text_lse, positives)
        ctx.scale, ctx.group, ctx.tile = scale, group, tile
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        image, text, logit_scale, all_images, all_texts, image_lse, text_lse, positives = ctx.saved_tensors
        scale, tile, b = ctx.scale, ctx.tile, image.shape[0]
        with torch.autocast(image.device.type, enabled=False):
            lses = gather_rows(torch.stack([image_lse, text_lse], dim=1), ctx.group)
            # ds/dlogit_scale = s, so every gradient holds the same factor s / (2b).
            factor = grad_output.to(scale.dtype) * scale / (2 * b)
            d_image, weighted = _direction_gradient(image, all_texts, image_lse, lses[:, 1], scale, tile)
            d_image = d_image.sub_(text, alpha=2).mul_(factor).to(image.dtype)
            d_text, _ = _direction_gradient(text, all_images, text_lse, lses[:, 0], scale, tile)
            d_text = d_text.sub_(image, alpha=2).mul_(factor).to(text.dtype)
            # Own image rows against all texts count every pair of the group once over its ranks, in both directions.
            d_scale = (weighted - 2 * positives.sum()) * factor
        return d_image, d_text, d_scale.to(logit_scale.dtype).reshape(logit_scale.shape), None, None, None
