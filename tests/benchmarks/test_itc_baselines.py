"""The baselines that the benchmarks measure against are the same loss: honest opponents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.itc_baselines import LOSSES
from tests.distributed import run_distributed
from training.losses import grouped_itc_loss

B, E = 5, 7


def gradients(loss: Callable[..., Tensor], group_size: int) -> list[Tensor]:
    """The means over ranks of the loss, of the gradients of all ranks' features [n * B, E], and of logit_scale's."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    # A parameter that all ranks share stands for the model: its gradient is what DDP would average.
    whole = torch.randn(2, world_size * B, E, generator=generator, dtype=torch.float64).requires_grad_()
    scale = torch.tensor([1.7], dtype=torch.float64, requires_grad=True)
    image, text = torch.nn.functional.normalize(whole, dim=-1)[:, rank * B : (rank + 1) * B]
    group = dist.new_subgroups(group_size)[0]
    value = loss(image, text, scale, group=group)
    value.backward()
    results: list[Any] = [value.detach(), whole.grad, scale.grad]
    for result in results:
        dist.all_reduce(result)
        result /= world_size
    return results


@pytest.mark.parametrize("group_size", [4, 2])
def test_baselines_have_the_loss_and_the_gradients_of_ours(group_size: int):
    expected = run_distributed(gradients, 4, grouped_itc_loss, group_size)[0]
    assert expected[1].abs().max() > 1e-3
    for name, loss in LOSSES.items():
        for seen, wanted in zip(run_distributed(gradients, 4, loss, group_size)[0], expected, strict=True):
            torch.testing.assert_close(seen, wanted, rtol=1e-10, atol=1e-12, msg=name)
