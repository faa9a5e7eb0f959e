"""The masked losses of pretraining: against torch's own on whole logits, by hand, their memory, bad input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modeling_m2encoder.modeling_m2encoder_pretraining import masked_image_loss, masked_language_loss
from tests.training.test_losses import LiveElements, relative_error

# ---- Masked language loss


def language_case(
    places: int, dtype: torch.dtype = torch.float64, width: int = 8, vocabulary: int = 37
) -> tuple[list[Tensor], Tensor]:
    """States, weight and bias as leaves, and targets."""
    generator = torch.Generator().manual_seed(places)
    shapes = [(places, width), (vocabulary, width), (vocabulary,)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    targets = torch.randint(vocabulary, (places,), generator=generator)
    return [x.requires_grad_() for x in inputs], targets


def on_whole_logits(inputs: list[Tensor], targets: Tensor) -> Tensor:
    hidden_states, weight, bias = inputs
    return F.cross_entropy(F.linear(hidden_states, weight, bias), targets)


@pytest.mark.parametrize("chunk", [1, 4, 10, 11, 256])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_chunked_equals_whole(dtype: torch.dtype, limit: float, chunk: int) -> None:
    inputs, targets = language_case(10, dtype)
    loss = masked_language_loss(*inputs, targets, chunk=chunk)
    got = torch.autograd.grad(3 * loss, inputs)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    reference = on_whole_logits(doubles, targets)
    expected = torch.autograd.grad(3 * reference, doubles)
    assert relative_error(loss.detach(), reference.detach()) < limit
    for mine, its in zip(got, expected, strict=True):
        assert mine.dtype == dtype and relative_error(mine, its) < limit


def test_masked_language_loss_by_hand() -> None:
    """Two places over three tokens: logits (0, ln 2, ln 4) and all equal."""
    states = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).double()
    weight = torch.tensor([[0.0, 9.0], [math.log(2), 9.0], [math.log(4), 9.0]], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    loss = masked_language_loss(states, weight, bias, torch.tensor([2, 0]))
    assert loss.item() == pytest.approx((math.log(7 / 4) + math.log(3)) / 2)
    loss.backward()
    assert bias.grad.tolist() == pytest.approx([(1 / 7 - 2 / 3) / 2, (2 / 7 + 1 / 3) / 2, (-3 / 7 + 1 / 3) / 2])
    assert weight.grad[:, 0].tolist() == pytest.approx([1 / 14, 1 / 7, -3 / 14])


def test_huge_logits_stay_finite() -> None:
    (states, weight, bias), targets = language_case(5, torch.float32)
    loss = masked_language_loss(states * 1e4, weight, bias, targets)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(weight.grad).all()


def test_nothing_masked_is_zero_with_zero_gradients() -> None:
    inputs, targets = language_case(0)
    loss = masked_language_loss(*inputs, targets)
    loss.backward()
    assert loss.item() == 0 and not inputs[1].grad.any() and inputs[0].grad.shape == (0, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_states_have_fp32_logits(dtype: torch.dtype) -> None:
    inputs, targets = language_case(40, dtype, width=64)
    loss = masked_language_loss(*inputs, targets, chunk=16)
    got = torch.autograd.grad(loss, inputs)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(on_whole_logits(doubles, targets), doubles)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(on_whole_logits(doubles, targets).item(), rel=1e-2)
    for mine, its in zip(got, expected, strict=True):
        assert mine.dtype == dtype and relative_error(mine, its) < 5e-2


def test_autocast_multiplies_in_its_dtype_and_sums_in_fp32() -> None:
    inputs, targets = language_case(40, torch.float32, width=64)
    plain = masked_language_loss(*inputs, targets)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = masked_language_loss(*inputs, targets)
    gradients = [torch.autograd.grad(loss, inputs) for loss in (plain, mixed)]
    assert mixed.dtype == torch.float32 and 0 < abs(mixed.item() - plain.item()) < 0.1
    for exact, rounded in zip(*gradients, strict=True):
        assert rounded.dtype == torch.float32 and 1e-5 < relative_error(rounded, exact) < 5e-2


def test_without_gradients_none_are_made() -> None:
    """The published vocabulary as it is: one chunk of logits [8, V] at a time (and the weight [V, 8], which the counter
    sees when it is transposed), no gradient [V, 8]."""
    (states, weight, bias), targets = language_case(64, torch.float32, vocabulary=115_244)
    with torch.no_grad(), LiveElements() as memory:
        masked_language_loss(states, weight, bias, targets, chunk=8)
    assert 16 * 115_244 < memory.peak < 20 * 115_244


def test_memory_has_no_logits_of_the_batch() -> None:
    """512 places, 20,000 tokens, width 8: whole logits are 10.2 M elements, a chunk of 16 is 0.32 M, the weight's
    gradient 0.16 M."""
    inputs, targets = language_case(512, torch.float32, vocabulary=20_000)
    with LiveElements() as ours:
        masked_language_loss(*inputs, targets, chunk=16).backward()
    with LiveElements() as naive:
        on_whole_logits(inputs, targets).backward()
    assert 320_000 < ours.peak < 1_300_000
    assert naive.peak > 20_000_000  # the counter sees what it should


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({0: torch.ones(10, 9)}, "one width"),
        ({0: torch.ones(2, 5, 8)}, "two dimensions"),
        ({2: torch.ones(36)}, r"bias must be \[V = 37\]"),
        ({3: torch.zeros(9, dtype=torch.long)}, r"targets \[M = 10\]"),
        ({3: torch.zeros(10)}, "int64"),
        ({3: torch.full((10,), 37)}, r"lie in \[0, 36\], got 37"),
        ({3: torch.full((10,), -100)}, "got -100"),
    ],
)
def test_bad_arguments_of_the_language_loss(changed: dict[int, Tensor], message: str) -> None:
    inputs, targets = language_case(10, torch.float32)
    arguments = dict(enumerate([*inputs, targets])) | changed
    with pytest.raises(ValueError, match=message):
        masked_language_loss(*arguments.values())
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        masked_language_loss(*inputs, targets, chunk=0)


# ---- Masked image loss


def test_masked_image_loss_by_hand() -> None:
    """One channel, 2 x 4 pixels, two patches of 2 x 2: (0, 1, 4, 5) on the left, (2, 3, 6, 7) on the right."""
    image = torch.arange(8.0).reshape(1, 1, 2, 4)
    nothing = torch.zeros(1, 2, 4)
    left, right, both = (torch.tensor([mask]) for mask in ([True, False], [False, True], [True, True]))
    raw = {"patch_size": 2, "normalize_pixels": False}
    assert masked_image_loss(nothing, image, left, **raw).item() == (0 + 1 + 16 + 25) / 4
    assert masked_image_loss(nothing, image, right, **raw).item() == (4 + 9 + 36 + 49) / 4
    assert masked_image_loss(nothing, image, both, **raw).item() == (42 + 98) / 8
    assert masked_image_loss(torch.tensor([[[0.0, 1, 4, 5], [9, 9, 9, 9]]]), image, left, **raw).item() == 0
    # Either patch is (-2.5, -1.5, 1.5, 2.5) around its mean; the unbiased variance is 17 / 3.
    normalised = torch.tensor([-2.5, -1.5, 1.5, 2.5]) / math.sqrt(17 / 3)
    assert masked_image_loss(normalised.expand(1, 2, 4), image, both, patch_size=2).item() < 1e-10
    assert masked_image_loss(nothing, image, both, patch_size=2).item() == pytest.approx(3 / 4, rel=1e-5)
    assert masked_image_loss(nothing, image, left & right, patch_size=2).item() == 0


def test_patches_have_the_order_of_the_patch_embedding() -> None:
    """Against torch's own: a convolution whose weights are a patch, and unfold."""
    image = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    unfolded = F.unfold(image, 4, stride=4).transpose(1, 2)
    mask = torch.ones(2, 6, dtype=torch.bool)
    assert masked_image_loss(unfolded, image, mask, patch_size=4, normalize_pixels=False).item() == 0
    weight = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(unfolded @ weight.flatten(), F.conv2d(image, weight, stride=4).flatten(1))


def test_only_masked_patches_have_gradients() -> None:
    predictions = torch.zeros(3, 4, 12, requires_grad=True)
    mask = torch.tensor([[1, 0, 0, 1], [0, 0, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
    masked_image_loss(predictions, torch.randn(3, 3, 4, 4), mask, patch_size=2).backward()
    assert torch.equal(predictions.grad.abs().sum(dim=-1) > 0, mask)


def test_flat_patches_and_half_precision_stay_finite() -> None:
    mask = torch.ones(1, 4, dtype=torch.bool)
    loss = masked_image_loss(
        torch.ones(1, 4, 12, dtype=torch.bfloat16), torch.full((1, 3, 4, 4), 0.5), mask, patch_size=2
    )
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("predictions", "image", "mask", "message"),
    [
        ((1, 4, 11), (1, 3, 4, 4), (1, 4), r"need predictions \[1, 4, 12\]"),
        ((1, 4, 12), (1, 3, 4, 4), (1, 3), r"a mask \[1, 4\]"),
        ((1, 4, 12), (1, 3, 4, 5), (1, 4), "multiples of 2"),
        ((4, 12), (3, 4, 4), (1, 4), r"\[batch, channels, height, width\]"),
    ],
)
def test_bad_arguments_of_the_image_loss(predictions: tuple, image: tuple, mask: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        masked_image_loss(torch.zeros(predictions), torch.zeros(image), torch.zeros(mask) > 0, patch_size=2)
