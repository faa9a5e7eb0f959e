"""The two usual ways to contrast over several processes, to measure `grouped_itc_loss` by; no training uses them.

Both give its loss and its gradients after the mean over ranks (`pytest tests/benchmarks/test_itc_baselines.py`); they
differ in what they keep and send. Shapes: b rows of this rank, n ranks, N = n * b, E embedding size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy


def naive_itc_loss(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Every rank makes the whole [N, N] logits of the whole loss (CLIP, arXiv 2103.00020, figure 3, after a gather; the
    default of open_clip and Chinese-CLIP, here with gradients through the gather).

    Args:
        image_embeds, text_embeds: [b, E], L2-normalised.
        logit_scale: one element, the logarithm of 1/temperature.
        group: processes to contrast over; `None`: all, or this one alone.

    Returns:
        The 0-d loss of the whole group, the same on every rank.
    """
    images, texts = _gather_with_gradients(image_embeds, group), _gather_with_gradients(text_embeds, group)
    logits = _logits(images, texts, logit_scale)
    targets = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, targets) + cross_entropy(logits.T, targets)) / 2


def local_itc_loss(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Every rank makes the [b, N] logits of its own rows, in both directions (open_clip's `--local-loss
    --gather-with-grad`, the best of its modes).

    Arguments as for `naive_itc_loss`; returns the 0-d mean over this rank's rows.
    """
    images, texts = _gather_with_gradients(image_embeds, group), _gather_with_gradients(text_embeds, group)
    b = len(image_embeds)
    rank = 0 if _ranks(group) == 1 else dist.get_rank(group)
    targets = torch.arange(rank * b, (rank + 1) * b, device=image_embeds.device)
    per_image = cross_entropy(_logits(image_embeds, texts, logit_scale), targets)
    per_text = cross_entropy(_logits(text_embeds, images, logit_scale), targets)
    return (per_image + per_text) / 2


def _logits(queries: Tensor, keys: Tensor, logit_scale: Tensor) -> Tensor:
    """Products in the features' dtype, as autocast has them in those projects, and fp32 or better from there on."""
    logits = (queries * logit_scale.exp().to(queries.dtype)) @ keys.T
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _ranks(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


def _gather_with_gradients(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    return rows if _ranks(group) == 1 else _Gather.apply(rows, group)


class _Gather(torch.autograd.Function):
    """[b, E] -> [N, E]. Backward sums the ranks' gradients and hands each its rows, by one reduce-scatter.

    Not torch.distributed.nn.functional.all_gather: on gloo its backward is an all-to-all of [N, E] per rank.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        out = rows.new_empty((_ranks(group) * len(rows), *rows.shape[1:]))
        dist.all_gather_into_tensor(out, rows.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        out = gradient.new_empty((len(gradient) // _ranks(ctx.group), *gradient.shape[1:]))
        dist.reduce_scatter_tensor(out, gradient.contiguous(), group=ctx.group)
        return out, None


LOSSES = {"naive": naive_itc_loss, "local": local_itc_loss}
