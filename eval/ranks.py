"""The only scorer: exact, tie-aware retrieval ranks, the chance level beside each, and multiple-choice accuracy.

    ranks = retrieval_ranks(image_embeds, text_embeds, text_to_image)
    ranks.recall(1).text_to_image, ranks.chance(1).text_to_image

Letters: N images, M texts, P pairs of a text and an image that is right for it, d embedding size, R multiple-choice
rows, S all their candidates together.

Recall needs no sorting, only the number of wrong answers that score above the best right one, and the number that
score the same. Both are counted for both directions from one tiled fp32 matrix product; no N x M matrix is ever held.
A matrix product rounds differently from one tile shape, thread count or device to the next, so scores that it cannot
tell from the right answer's are compared again as fp64 dot products: the counts, ties included, do not depend on how
the tiles were cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Literal, NamedTuple

import numpy as np
import torch

# The cut-offs of the field, whose six values (three per direction) are averaged to the mean recall.
RECALL_AT = (1, 5, 10)

# A dot product of length d computed in precision u is off by at most c sqrt(d) u |a||b| with probability
# 1 - 2 exp(-c^2 / 2) (Higham and Mary, "A new approach to probabilistic rounding error analysis", 2019): 1 - 3e-14 for
# c = 8.
ROUNDING_CONSTANT = 8.0

# What torch.compile calls for a linear layer on the CPU. torch.mm goes to MKL, which leaves AVX-512 unused on AMD: this
# takes half the time there (0.86 instead of 1.78 s for 5,000 x 25,000 x 768 on one thread of an EPYC, torch 2.13).
ONEDNN_LINEAR = "_linear_pointwise"

# fp64 copies of this many pairs of rows are made at a time: what a core's own cache holds.
PAIRS_AT_ONCE = 128

Ties = Literal["expected", "optimistic", "pessimistic"]


class Recall(NamedTuple):
    """One fraction in [0, 1] per direction of retrieval."""

    image_to_text: float
    text_to_image: float


@dataclass(frozen=True)
class RetrievalRanks:
    """Where the right answers stand, as counts: all that recall at any K needs. Fields are int64 tensors on the CPU.

    An image without a right text asks no question: it is a wrong answer for every text and not counted in
    `image_to_text`. The same holds for texts without a right image.
    """

    captions: torch.Tensor
    """[N] texts that are right for each image."""
    image_greater: torch.Tensor
    """[N] wrong texts that score above the image's best right one."""
    image_equal: torch.Tensor
    """[N] wrong texts that tie with the image's best right one."""
    image_best: torch.Tensor
    """[N] right texts that tie for the image's best, itself included."""
    text_images: torch.Tensor
    """[M] images that are right for each text."""
    text_greater: torch.Tensor
    """[M] wrong images that score above the text's best right one."""
    text_equal: torch.Tensor
    """[M] wrong images that tie with the text's best right one."""
    text_best: torch.Tensor
    """[M] right images that tie for the text's best, itself included."""

    @property
    def num_images_without_text(self) -> int:
        """Images that no text is right for."""
        return int((self.captions == 0).sum())

    @property
    def num_texts_without_image(self) -> int:
        """Texts that no image is right for."""
        return int((self.text_images == 0).sum())

    @property
    def num_tied_queries(self) -> int:
        """Queries of both directions whose right answer ties with a wrong one; many mean degenerate embeddings."""
        return int((self.image_equal > 0).sum() + (self.text_equal > 0).sum())

    def recall(self, k: int, ties: Ties = "expected") -> Recall:
        """The fraction of queries with a right answer among the first `k` (any-hit: one of an image's texts is enough).

        Args:
            k: how many answers are looked at; one larger than the gallery looks at all of it.
            ties: answers that score the same are in random order ("expected": the exact mean over all orders), or the
                right ones come first ("optimistic") or last ("pessimistic"). Without ties all three are the same.

        Raises:
            ValueError: for a `k` that is no whole number >= 1, or another value of `ties`.
        """
        asks = self.captions > 0
        images = _hits(self.image_greater[asks], self.image_equal[asks], self.image_best[asks], k, ties)
        asks = self.text_images > 0
        texts = _hits(self.text_greater[asks], self.text_equal[asks], self.text_best[asks], k, ties)
        return Recall(image_to_text=images.mean().item(), text_to_image=texts.mean().item())

    def chance(self, k: int) -> Recall:
        """The exact expectation of `recall(k)` for random rankings: 1 - C(M-c, k) / C(M, k) for an image with c texts,
        1 - C(N-c, k) / C(N, k) for a text with c images.

        Raises:
            ValueError: for `k` < 1.
        """
        return Recall(
            image_to_text=_chance(self.captions, len(self.text_images), k),
            text_to_image=_chance(self.text_images, len(self.captions), k),
        )

    def mean_recall(self, ties: Ties = "expected") -> float:
        """The mean of R@1, R@5 and R@10 of both directions, in [0, 1]."""
        return float(np.mean([self.recall(k, ties) for k in RECALL_AT]))

    def mean_recall_chance(self) -> float:
        """The mean recall of random rankings, in [0, 1]."""
        return float(np.mean([self.chance(k) for k in RECALL_AT]))


def retrieval_ranks(
    image_embeds: torch.Tensor | np.ndarray,
    text_embeds: torch.Tensor | np.ndarray,
    text_to_image: torch.Tensor | np.ndarray,
    *,
    tile: int = 1024,
) -> RetrievalRanks:
    """Rank every image for every text and every text for every image by their dot product.

    Args:
        image_embeds: [N, d] of a floating type. Nothing is normalised here: unit rows give cosine similarity, and that
            is the caller's business.
        text_embeds: [M, d], on the same device.
        text_to_image: [M] integers in [0, N), the image that each text belongs to; or [P, 2] integers, pairs of a text
            in [0, M) and an image in [0, N) that are right for each other, of which a text may have several or none
            (`text_equal_pairs`, `distinct_texts`). Pairs that are repeated count once.
        tile: rows and columns of the score blocks; memory beside the embeddings is O(tile^2 + P). The result is the
            same for every value. The default suits a CPU's last-level cache.

    Returns:
        The counts on the CPU. Scores closer than fp64 rounding (about 1e-14 of the largest) are ties, so repeated rows
        always tie.

    Raises:
        ValueError: for wrong shapes or types, no images, texts or pairs, indices outside their range, values that are
            not finite.
    """
    images, texts, rounding = _checked(image_embeds, text_embeds)
    pairs = _checked_pairs(text_to_image, len(texts), len(images)).to(images.device)
    if tile < 1:
        raise ValueError(f"tile must be at least 1, not {tile}.")
    # `tiny` covers products that fp32 flushes to zero.
    margin = rounding * 2.0**-24 + torch.finfo(torch.float32).tiny
    counts = _Counts(images, texts, pairs, tie=rounding * 2.0**-53, margin=margin)
    buffers = torch.empty(2, min(tile, len(texts)) * min(tile, len(images)), device=images.device)
    with _full_fp32():
        fp32_images = images.float().contiguous()
        for row in range(0, len(texts), tile):
            block = texts[row : row + tile].float().contiguous()
            for column in range(0, len(images), tile):
                part = fp32_images[column : column + tile]
                scores, work = (buffer[: len(block) * len(part)].view(len(block), len(part)) for buffer in buffers)
                counts.add(_product(block, part, scores), row, column, work)
    return counts.result()


def distinct_texts(
    texts: Sequence[str], text_to_image: torch.Tensor | np.ndarray | Sequence[int]
) -> tuple[list[str], torch.Tensor]:
    """Equal texts merged to one query and one answer: the U distinct texts, in order of their first use, and the pairs
    [P, 2] of each with every image that owns it.

    Args:
        texts: M strings; equal means the same characters.
        text_to_image: [M] integers, the image that each of them belongs to.
    """
    owner = torch.as_tensor(text_to_image).long()
    if owner.shape != (len(texts),):
        raise ValueError(
            f"text_to_image must hold one integer for each of the {len(texts)} texts, not {list(owner.shape)}."
        )
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    pairs = torch.stack([torch.tensor([place[text] for text in texts], dtype=torch.long), owner], dim=1)
    return list(place), pairs.unique(dim=0)


def text_equal_pairs(texts: Sequence[str], text_to_image: torch.Tensor | np.ndarray | Sequence[int]) -> torch.Tensor:
    """The pairs [P, 2] of each of the M texts with every image that owns an equal one: nobody is wrong for retrieving
    the same words from another image. Arguments as for `distinct_texts`.

    The official script credits one position of a repeated text and one of its images (eval_retrieval.py), which on the
    COCO test set leaves 159 captions without any credit.
    """
    distinct, pairs = distinct_texts(texts, text_to_image)
    place = {text: i for i, text in enumerate(distinct)}
    images: list[list[int]] = [[] for _ in distinct]
    for text, image in pairs.tolist():
        images[text].append(image)
    return torch.tensor([(i, image) for i, text in enumerate(texts) for image in images[place[text]]]).view(-1, 2)


def hit_probability(greater: torch.Tensor, equal: torch.Tensor, right: torch.Tensor, k: int) -> torch.Tensor:
    """The probability that one of `right` tied right answers is among the first `k`, elementwise, fp64 in [0, 1].

    `greater` wrong answers stand above them and `equal` wrong answers tie with them; tied answers are in random order.
    With j = k - greater places left for the `equal + right` tied ones it is 1 - C(equal, j) / C(equal + right, j),
    written as a product over the right answers so that nothing overflows.

    Raises:
        ValueError: for `k` < 1.
    """
    if not isinstance(k, Integral) or isinstance(k, bool) or k < 1:
        raise ValueError(f"Recall is defined for whole K >= 1, not {k}.")
    places = (k - greater).clamp(min=0)
    missed = torch.ones(greater.shape, dtype=torch.float64)
    for x in range(1, int(right.amax()) + 1):
        factor = (equal - places + x).clamp(min=0).double() / (equal + x).double()
        missed = torch.where(x <= right, missed * factor, missed)
    return 1 - missed


def choice_hits(
    image_embeds: torch.Tensor, candidate_embeds: torch.Tensor, sizes: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Multiple choice: the probability that the best-scoring candidate of each row is the true one.

    Args:
        image_embeds: [R, d].
        candidate_embeds: [S, d], the candidates of row 0, then those of row 1, and so on.
        sizes: [R] integers >= 1 with sum S, the candidates of each row.
        labels: [R] integers, the true candidate within each row, in [0, size).

    Returns:
        [R] fp64: 1 where the true candidate alone is best, 1/m where it shares that with m - 1 others, else 0.

    Raises:
        ValueError: for shapes or labels that do not fit together, or values that are not finite.
    """
    sizes, labels = torch.as_tensor(sizes).cpu(), torch.as_tensor(labels).cpu()
    if not len(image_embeds) == len(sizes) == len(labels) > 0 or int(sizes.sum()) != len(candidate_embeds):
        raise ValueError(
            f"{len(image_embeds)} images, {len(sizes)} sizes that sum to {int(sizes.sum())}, {len(labels)} labels and "
            f"{len(candidate_embeds)} candidates do not make one table of at least one row."
        )
    wrong = ((labels < 0) | (labels >= sizes)).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(f"Row {wrong[0]} has label {int(labels[wrong[0]])} but {int(sizes[wrong[0]])} candidates.")
    owner = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    images, candidates, rounding = _checked(image_embeds, candidate_embeds)
    scores = _exact_scores(images.cpu(), candidates.cpu(), owner, torch.arange(len(owner)))
    true = torch.cumsum(sizes, 0) - sizes + labels
    tie = rounding * 2.0**-53
    above = scores - scores[true][owner]
    greater = torch.zeros(len(sizes), dtype=torch.long).index_add_(0, owner, (above > tie).long())
    # The true candidate ties with itself.
    equal = torch.zeros(len(sizes), dtype=torch.long).index_add_(0, owner, (above.abs() <= tie).long()) - 1
    return hit_probability(greater, equal, torch.ones_like(equal), k=1)


class _Counts:
    """Running counts of both directions over the tiles of one score matrix."""

    def __init__(self, images: torch.Tensor, texts: torch.Tensor, pairs: torch.Tensor, *, tie: float, margin: float):
        self.images, self.texts, self.tie, self.margin = images, texts, tie, margin
        self.pair_text, self.pair_image = pairs.T.contiguous()  # ascending in the text
        scores = _exact_scores(texts, images, self.pair_text, self.pair_image)
        self.text_right = _Right(scores, self.pair_text, len(texts), tie)
        self.image_right = _Right(scores, self.pair_image, len(images), tie)

    def add(self, scores: torch.Tensor, row: int, column: int, work: torch.Tensor) -> None:
        """Count one tile: `scores` of texts row.. against images column.., with a float buffer of its shape."""
        rows, columns = slice(row, row + scores.shape[0]), slice(column, column + scores.shape[1])
        edges = torch.tensor([rows.start, rows.stop], device=self.pair_text.device)
        first, last = torch.searchsorted(self.pair_text, edges).tolist()
        text, image = self.pair_text[first:last] - row, self.pair_image[first:last] - column
        inside = (image >= 0) & (image < scores.shape[1])
        # A right answer competes with wrong ones only.
        scores[text[inside], image[inside]] = -math.inf
        self._count(scores, self.text_right, rows, columns, 1, work)
        self._count(scores, self.image_right, columns, rows, 0, work)

    def _count(
        self, scores: torch.Tensor, right: _Right, queries: slice, gallery: slice, axis: int, work: torch.Tensor
    ) -> None:
        """One direction of a tile: the gallery lies along `axis`, one query per line of the other."""
        best = right.best[queries]
        high, low = (best + self.margin).float().unsqueeze(axis), (best - self.margin).float().unsqueeze(axis)
        # Comparisons go into a float buffer: summing that is ten times faster on the CPU than summing booleans.
        above = torch.gt(scores, high, out=work).sum(axis)
        right.greater[queries] += above.long()
        # What is neither above for certain nor below is in doubt: in few lines, if any, and only those are searched.
        lines = (torch.ge(scores, low, out=work).sum(axis) != above).nonzero().flatten()
        if not len(lines):
            return
        part = scores.index_select(1 - axis, lines)
        limits = [limit.index_select(1 - axis, lines) for limit in (low, high)]
        where = list(_nonzero((part >= limits[0]) & (part <= limits[1])))
        where[1 - axis] = query = lines[where[1 - axis]]
        text, image = (queries, gallery) if axis else (gallery, queries)
        scored = _exact_tile_scores(self.texts[text], self.images[image], *where)
        distance = scored - best[query]
        right.greater[queries].index_add_(0, query, (distance > self.tie).long())
        right.equal[queries].index_add_(0, query, (distance.abs() <= self.tie).long())

    def result(self) -> RetrievalRanks:
        image, text = self.image_right, self.text_right
        return RetrievalRanks(
            captions=image.count.cpu(),
            image_greater=image.greater.cpu(),
            image_equal=image.equal.cpu(),
            image_best=image.tied.cpu(),
            text_images=text.count.cpu(),
            text_greater=text.greater.cpu(),
            text_equal=text.equal.cpu(),
            text_best=text.tied.cpu(),
        )


class _Right:
    """The right answers of the queries of one direction, and the counts of wrong ones so far; all [queries]."""

    def __init__(self, scores: torch.Tensor, query: torch.Tensor, queries: int, tie: float):
        """`scores` [P] fp64 of the right answers, `query` [P] the query that each belongs to."""
        best = torch.full((queries,), -math.inf, dtype=torch.float64, device=scores.device)
        best = best.scatter_reduce(0, query, scores, "amax")
        # Nothing scores above the infinite best answer of a query that has none.
        self.best = torch.where(best == -math.inf, math.inf, best)
        self.count = torch.bincount(query, minlength=queries)
        self.tied = torch.zeros_like(self.count).index_add_(0, query, (scores >= self.best[query] - tie).long())
        self.greater, self.equal = torch.zeros_like(self.count), torch.zeros_like(self.count)


def _hits(greater: torch.Tensor, equal: torch.Tensor, right: torch.Tensor, k: int, ties: Ties) -> torch.Tensor:
    if ties == "optimistic":
        equal = torch.zeros_like(equal)
    elif ties == "pessimistic":
        greater, equal = greater + equal, torch.zeros_like(equal)
    elif ties != "expected":
        raise ValueError(f'ties is one of "expected", "optimistic" and "pessimistic", not {ties!r}.')
    return hit_probability(greater, equal, right, k)


def _chance(right: torch.Tensor, gallery: int, k: int) -> float:
    """The mean probability that one of `right` answers is among `k` drawn from a gallery, over the queries with any."""
    right = right[right > 0]
    return hit_probability(torch.zeros_like(right), gallery - right, right, k).mean().item()


def _exact_scores(left: torch.Tensor, right: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """fp64 dot products of the rows `left[i]` and `right[j]`, [len(i)]."""
    parts = [
        (left[a].double() * right[b].double()).sum(-1)
        for a, b in zip(i.split(PAIRS_AT_ONCE), j.split(PAIRS_AT_ONCE), strict=True)
    ]
    return torch.cat(parts)


def _exact_tile_scores(
    texts: torch.Tensor, images: torch.Tensor, text: torch.Tensor, image: torch.Tensor
) -> torch.Tensor:
    """fp64 scores of some pairs of a tile. If they are many (collapsed embeddings), one fp64 product is cheaper."""
    if len(text) * 16 > len(texts) * len(images):
        return (texts.double() @ images.double().T)[text, image]
    return _exact_scores(texts, images, text, image)


def _nonzero(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if matrix.device.type != "cpu":
        row, column = matrix.nonzero(as_tuple=True)
        return row, column
    # On the CPU torch.nonzero of a sparse tile takes as long as the matrix product; numpy's takes a tenth of it.
    flat = torch.from_numpy(np.flatnonzero(matrix.numpy()))
    return flat // matrix.shape[1], flat % matrix.shape[1]


def _product(texts: torch.Tensor, images: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The fp32 dot products of all rows with all rows, perhaps in `out`."""
    if texts.device.type == "cpu" and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, ONEDNN_LINEAR):
        return getattr(torch.ops.mkldnn, ONEDNN_LINEAR)(texts, images, None, "none", [], "")
    return torch.mm(texts, images.T, out=out)


@contextmanager
def _full_fp32() -> Iterator[None]:
    """No TF32 and no bf16, whatever a training loop has switched on. (Autocast leaves products with `out=` alone.)"""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _checked(
    image_embeds: torch.Tensor | np.ndarray, text_embeds: torch.Tensor | np.ndarray
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Images and texts as tensors, and the rounding error of any of their dot products in units of the precision it is
    computed in; or a ValueError that says what is wrong."""
    images, texts = _tensor("image embeddings", image_embeds), _tensor("text embeddings", text_embeds)
    largest = []
    for name, embeds in (("image", images), ("text", texts)):
        if embeds.ndim != 2 or not embeds.is_floating_point():
            seen = f"{embeds.dtype} {list(embeds.shape)}"
            raise ValueError(f"{name} embeddings must be a floating [rows, d] matrix, not {seen}.")
        if not embeds.numel():
            raise ValueError(f"There are no {name} embeddings to rank: {list(embeds.shape)}.")
        at_least_fp32 = torch.promote_types(embeds.dtype, torch.float32)
        largest.append(torch.linalg.vector_norm(embeds, dim=1, dtype=at_least_fp32).amax().item())
        if 1e-15 < largest[-1] < 1e15:
            continue
        # Squares may have left the range of fp32, if these are numbers at all.
        norms = torch.linalg.vector_norm(embeds, dim=1, dtype=torch.float64)
        bad = (~norms.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"{len(bad)} of {len(embeds)} {name} embeddings hold NaN or infinity, the first in row {bad[0]}."
            )
        largest[-1] = norms.amax().item()
    if images.shape[1] != texts.shape[1]:
        raise ValueError(
            f"Images have {images.shape[1]} dimensions and texts {texts.shape[1]}: not one embedding space."
        )
    if largest[0] * largest[1] > 1e37:
        raise ValueError(
            f"Embeddings of norm {largest[0]:.3g} and {largest[1]:.3g} overflow in fp32: normalise them first."
        )
    return images, texts, ROUNDING_CONSTANT * math.sqrt(images.shape[1]) * largest[0] * largest[1]


def _tensor(name: str, values: torch.Tensor | np.ndarray) -> torch.Tensor:
    """A view where possible. Torch takes no numpy array that runs backwards."""
    try:
        return torch.as_tensor(np.ascontiguousarray(values) if isinstance(values, np.ndarray) else values).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be a tensor or an array of numbers, not {type(values).__name__}.") from error


def _checked_pairs(text_to_image: torch.Tensor | np.ndarray, texts: int, images: int) -> torch.Tensor:
    """[P, 2] int64, distinct, ascending; or a ValueError that says what is wrong."""
    given = _tensor("text_to_image", text_to_image)
    owners, pairs = given.shape == (texts,), given.ndim == 2 and given.shape[1:] == (2,)
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool or not (owners or pairs):
        raise ValueError(
            f"text_to_image must hold one integer for each of the {texts} texts, or [P, 2] pairs of a text and an "
            f"image, not {given.dtype} {list(given.shape)}."
        )
    if not len(given):
        raise ValueError("There is no pair of a text and an image: nothing to ask.")
    given = given.long()
    found = given if pairs else torch.stack([torch.arange(texts, device=given.device), given], dim=1)
    for name, values, limit in (("texts", found[:, 0], texts), ("images", found[:, 1], images)):
        outside = ((values < 0) | (values >= limit)).nonzero().flatten().tolist()
        if outside:
            seen = given[outside[0]].tolist()
            raise ValueError(f"text_to_image[{outside[0]}] is {seen}, but there are {limit} {name}.")
    return found.unique(dim=0) if pairs else found
