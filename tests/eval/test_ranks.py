"""The scorer: exact by hand, equal to brute force with ties, and independent of how the work is cut."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from eval import ranks as ranks_module
from eval.ranks import (
    Recall,
    choice_hits,
    distinct_texts,
    hit_probability,
    retrieval_ranks,
    text_equal_pairs,
)

# Rows are 4 images, columns 8 texts; texts 2i and 2i+1 belong to image i. By hand, so that every rank can be read off.
SCORES = torch.tensor(
    [
        # 0:a  0:b  1:a  1:b  2:a  2:b  3:a  3:b
        [9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0],  # best own text first
        [8.0, 6.0, 7.0, 5.0, 1.0, 2.0, 3.0, 4.0],  # one text above the best own one
        [7.0, 8.0, 9.0, 6.0, 3.0, 5.0, 1.0, 0.0],  # four above
        [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 7.0],  # two own texts tie for first
    ]
)
OWNER = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])


def by_hand(tile: int = 2048):
    """Identity images make the text matrix the transposed score matrix."""
    return retrieval_ranks(torch.eye(4), SCORES.T.contiguous(), OWNER, tile=tile)


def test_hand_written_scores():
    ranks = by_hand()
    assert ranks.image_greater.tolist() == [0, 1, 4, 0]
    assert ranks.image_best.tolist() == [1, 1, 1, 2]
    # Images above the own one, per column: 0:a none, 0:b rows 1, 2, 3, 1:a row 2, 1:b row 2, 2:a rows 0, 3,
    # 2:b row 3 (row 0 ties), 3:a none, 3:b none (row 0 ties).
    assert ranks.text_greater.tolist() == [0, 3, 1, 1, 2, 1, 0, 0]
    assert ranks.text_equal.tolist() == [0, 0, 0, 0, 0, 1, 0, 1]
    assert ranks.recall(1) == Recall(image_to_text=2 / 4, text_to_image=2.5 / 8)
    # 2:b: one above, one tied, so two places hold it with probability 1/2.
    assert ranks.recall(2) == Recall(image_to_text=3 / 4, text_to_image=(3 + 2 + 0.5) / 8)
    assert ranks.recall(1, ties="optimistic").text_to_image == 3 / 8
    assert ranks.recall(1, ties="pessimistic").text_to_image == 2 / 8
    assert ranks.recall(5).image_to_text == 1.0
    assert ranks.num_tied_queries == 2


def test_recall_is_a_named_tuple_of_plain_floats():
    image_to_text, text_to_image = by_hand().recall(1)
    assert type(image_to_text) is float and type(text_to_image) is float


def test_mean_recall_is_the_mean_of_six():
    ranks = by_hand()
    assert ranks.mean_recall() == pytest.approx((0.5 + 1 + 1 + 2.5 / 8 + 1 + 1) / 6, abs=1e-12)


def brute_force(images: np.ndarray, texts: np.ndarray, right: np.ndarray, k: int) -> tuple[float, float]:
    """Both any-hit recalls by full argsort, averaged over all orders of the answers that tie with the best right one.
    `right` [M, N] says which images are right for which texts; queries without a right answer are left out."""

    def hit(scores: np.ndarray, right: np.ndarray) -> float:
        order = np.argsort(-scores, kind="stable")
        best = scores[right].max()
        first = int(np.flatnonzero(scores[order] == best)[0])
        group = order[first : first + int((scores == best).sum())]
        own = int(np.isin(group, np.flatnonzero(right)).sum())
        places = min(max(k - first, 0), len(group))
        # All choices of which tied answers fill the places; a miss holds none of the own ones.
        return 1 - math.comb(len(group) - own, places) / math.comb(len(group), places)

    scores = images.astype(np.float64) @ texts.astype(np.float64).T
    image_to_text = np.mean([hit(scores[i], right[:, i]) for i in range(len(images)) if right[:, i].any()])
    text_to_image = np.mean([hit(scores[:, t], right[t]) for t in range(len(texts)) if right[t].any()])
    return float(image_to_text), float(text_to_image)


@pytest.mark.parametrize("levels", [1, 2, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_equals_brute_force_with_ties(levels: int, seed: int):
    """Features on a coarse grid tie often (levels 1 and 2), those on a fine grid hardly ever."""
    rng = np.random.default_rng(seed)
    images = (rng.integers(-levels, levels + 1, (37, 5)) / levels).astype(np.float32)
    owner = rng.integers(0, 30, 90)  # some images own several texts, some none
    texts = (images[owner] + rng.integers(-levels, levels + 1, (90, 5)) / levels).astype(np.float32)
    ranks = retrieval_ranks(images, texts, owner, tile=16)
    assert ranks.num_images_without_text > 0
    assert (ranks.num_tied_queries > 20) == (levels < 1000)
    right = owner[:, None] == np.arange(37)
    for k in (1, 2, 5, 10, 36, 90, 1000):
        assert ranks.recall(k) == pytest.approx(brute_force(images, texts, right, k), abs=1e-12)


@pytest.mark.parametrize("levels", [1, 1000])
@pytest.mark.parametrize("seed", range(2))
def test_pairs_equal_brute_force_with_ties(levels: int, seed: int):
    """Texts with several right images, with one, and with none; images likewise; pairs repeated and in any order."""
    rng = np.random.default_rng(seed)
    images = (rng.integers(-levels, levels + 1, (37, 5)) / levels).astype(np.float32)
    texts = (rng.integers(-levels, levels + 1, (60, 5)) / levels).astype(np.float32)
    pairs = np.stack([rng.integers(0, 45, 120), rng.integers(0, 30, 120)], axis=1)
    pairs = np.concatenate([pairs, pairs[::3]])
    right = np.zeros((60, 37), dtype=bool)
    right[tuple(pairs.T)] = True
    ranks = retrieval_ranks(images, texts, pairs, tile=16)
    assert ranks.captions.tolist() == right.sum(0).tolist() and ranks.text_images.tolist() == right.sum(1).tolist()
    assert ranks.num_texts_without_image >= 15 and ranks.num_images_without_text >= 7
    for k in (1, 2, 5, 10, 36, 60, 1000):
        assert ranks.recall(k) == pytest.approx(brute_force(images, texts, right, k), abs=1e-12)
    constant = retrieval_ranks(np.ones((37, 2)), np.ones((60, 2)), pairs)
    for k in (1, 5, 50):
        assert constant.recall(k) == pytest.approx(ranks.chance(k), abs=1e-12)


def test_owners_are_pairs():
    pairs = torch.stack([torch.arange(8), OWNER], dim=1)
    shuffled = pairs[torch.tensor([5, 0, 7, 2, 1, 3, 6, 4])]
    other = retrieval_ranks(torch.eye(4), SCORES.T.contiguous(), shuffled)
    for name, value in dataclasses.asdict(by_hand()).items():
        assert getattr(other, name).equal(value)


def test_either_product_gives_the_same_counts(monkeypatch):
    """oneDNN on the CPU, and what is used where it is missing."""
    generator = torch.Generator().manual_seed(4)
    images, texts = torch.randn(40, 33, generator=generator), torch.randn(90, 33, generator=generator)
    first = retrieval_ranks(images, texts, torch.arange(90) % 40, tile=32)
    monkeypatch.setattr(ranks_module, "ONEDNN_LINEAR", "nothing of that name")
    second = retrieval_ranks(images, texts, torch.arange(90) % 40, tile=32)
    for name, value in dataclasses.asdict(first).items():
        assert getattr(second, name).equal(value)


# ---- Repeated captions


# Images 0, 1, 2; the caption "a dog" was written for 0 and for 2.
REPEATED, REPEATED_OWNER = ["a dog", "a cat", "a dog", "a bird"], torch.tensor([0, 1, 2, 2])
# Rows are texts: "a dog" fits image 2 best, then 1, then 0.
REPEATED_SCORES = torch.tensor([[1.0, 2.0, 3.0], [0.0, 5.0, 4.0], [1.0, 2.0, 3.0], [2.0, 0.0, 1.0]])


def test_equal_texts_by_hand():
    pairs = text_equal_pairs(REPEATED, REPEATED_OWNER)
    assert pairs.tolist() == [[0, 0], [0, 2], [1, 1], [2, 0], [2, 2], [3, 2]]
    ranks = retrieval_ranks(torch.eye(3), REPEATED_SCORES, pairs)
    assert ranks.text_images.tolist() == [2, 1, 2, 1] and ranks.captions.tolist() == [2, 1, 3]
    # Both "a dog" are right for image 0, whose best text is "a bird" (2), so one wrong text is above the two (1 and 1);
    # image 1: "a cat"; image 2: "a cat" (4) is above "a dog" (3 and 3).
    assert ranks.image_greater.tolist() == [1, 0, 1] and ranks.image_best.tolist() == [2, 1, 2]
    # Image 2 is right for either "a dog", and it is first; "a bird" has image 0 before image 2.
    assert ranks.text_greater.tolist() == [0, 0, 0, 1] and ranks.text_best.tolist() == [1, 1, 1, 1]
    assert ranks.recall(1) == Recall(image_to_text=1 / 3, text_to_image=3 / 4)


def test_owners_only_by_hand():
    """The other protocol: the first "a dog" is right for image 0 only; its twin is a wrong text there, and ties."""
    ranks = retrieval_ranks(torch.eye(3), REPEATED_SCORES, REPEATED_OWNER)
    assert ranks.text_greater.tolist() == [2, 0, 0, 1]
    assert ranks.image_greater.tolist() == [1, 0, 1] and ranks.image_equal.tolist() == [1, 0, 1]
    assert ranks.recall(1) == Recall(image_to_text=1 / 3, text_to_image=2 / 4)
    # Image 0: "a bird", then the two in either order, so that two places hold the own one half of the time; as 2.
    assert ranks.recall(2).image_to_text == pytest.approx((0.5 + 1 + 0.5) / 3)


def test_distinct_texts_by_hand():
    """One query and one answer for each distinct text."""
    texts, pairs = distinct_texts(REPEATED, REPEATED_OWNER)
    assert texts == ["a dog", "a cat", "a bird"] and pairs.tolist() == [[0, 0], [0, 2], [1, 1], [2, 2]]
    ranks = retrieval_ranks(torch.eye(3), REPEATED_SCORES[[0, 1, 3]], pairs)
    assert ranks.recall(1) == Recall(image_to_text=1 / 3, text_to_image=2 / 3)
    assert ranks.num_tied_queries == 0


def test_without_repetitions_the_protocols_agree():
    texts = [f"text {i}" for i in range(8)]
    same = retrieval_ranks(torch.eye(4), SCORES.T.contiguous(), text_equal_pairs(texts, OWNER))
    distinct, pairs = distinct_texts(texts, OWNER)
    assert distinct == texts and pairs.tolist() == [[i, int(OWNER[i])] for i in range(8)]
    for name, value in dataclasses.asdict(by_hand()).items():
        assert getattr(same, name).equal(value)


def test_a_text_without_an_image_is_a_distractor_and_not_a_question():
    texts = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    ranks = retrieval_ranks(torch.tensor([[1.0, 0.0]]), texts, torch.tensor([[0, 0]]))
    assert ranks.num_texts_without_image == 1
    assert ranks.recall(1) == Recall(image_to_text=0.0, text_to_image=1.0)
    assert ranks.chance(1) == Recall(image_to_text=0.5, text_to_image=1.0)


@pytest.mark.parametrize("threads", [1, 2])
def test_tiles_and_threads_change_nothing(threads: int):
    """Real-valued features with repeated rows: a tie must stay a tie wherever the tile edges fall."""
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(61, 96, generator=generator))
    owner = torch.randint(0, 61, (203,), generator=generator)
    texts = torch.nn.functional.normalize(images[owner] + torch.randn(203, 96, generator=generator))
    images[7], images[60], texts[11], texts[202] = images[3], images[3], texts[5], texts[5]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = retrieval_ranks(images.double(), texts.double(), owner)
        # Two threads on two busy cores wait for each other at every product.
        for tile in (7, 32, 61, 203) if threads == 1 else (61,):
            for dtype in (torch.float32, torch.float64):
                ranks = retrieval_ranks(images.to(dtype), texts.to(dtype), owner, tile=tile)
                for name, value in dataclasses.asdict(whole).items():
                    assert getattr(ranks, name).equal(value), (name, tile, dtype)
    finally:
        torch.set_num_threads(before)
    repeated = torch.isin(owner, torch.tensor([3, 7, 60]))
    assert (whole.text_equal[repeated] == 2).all() and (whole.text_equal[~repeated] == 0).all()


def test_scores_that_fp32_cannot_separate_are_compared_exactly():
    """Two images whose scores differ by 2^-30 of their size: equal in any fp32 product, ordered in fp64."""
    images = torch.tensor([[1.0, 2.0**-15], [1.0, 0.0]])
    texts = torch.tensor([[1.0, 2.0**-15], [1.0, 2.0**-15]])
    assert (texts @ images.T).unique().numel() == 1
    ranks = retrieval_ranks(images, texts, torch.tensor([0, 1]))
    assert ranks.text_greater.tolist() == [0, 1] and ranks.text_equal.tolist() == [0, 0]


def test_a_constant_model_scores_exactly_chance():
    """Every embedding the same: nothing but ties, so the expected recall is the chance level, whatever the captions."""
    owner = torch.tensor([0] * 1 + [1] * 2 + [2] * 5 + [4] * 3)
    ranks = retrieval_ranks(torch.ones(6, 8), torch.ones(11, 8), owner, tile=4)
    for k in (1, 5, 10, 20):
        assert ranks.recall(k) == pytest.approx(ranks.chance(k), abs=1e-12)
    assert ranks.mean_recall() == pytest.approx(ranks.mean_recall_chance(), abs=1e-12)
    assert ranks.recall(1, ties="optimistic") == (1, 1) and ranks.recall(1, ties="pessimistic") == (0, 0)


def test_collapsed_real_embeddings_tie_too():
    """Rows that are equal but round differently in a matrix product and a sum: ties up to fp64 rounding."""
    generator = torch.Generator().manual_seed(3)
    images, texts = torch.randn(1, 768, generator=generator), torch.randn(1, 768, generator=generator)
    owner = torch.arange(40) // 2
    ranks = retrieval_ranks(images.expand(20, -1), texts.expand(40, -1), owner, tile=16)
    assert (ranks.text_equal == 19).all() and (ranks.image_equal == 38).all() and (ranks.image_best == 2).all()


@pytest.mark.parametrize(("captions", "others"), [(1, 4), (2, 4), (3, 2), (5, 1)])
def test_chance_equals_enumeration_of_all_rankings(captions: int, others: int):
    texts = captions + others
    ranks = retrieval_ranks(torch.ones(2, 3), torch.ones(texts, 3), torch.tensor([0] * captions + [1] * others))
    for k in range(1, texts + 2):
        rankings = list(itertools.permutations(range(texts)))
        first = sum(any(text < captions for text in ranking[:k]) for ranking in rankings) / len(rankings)
        second = sum(any(text >= captions for text in ranking[:k]) for ranking in rankings) / len(rankings)
        assert ranks.chance(k).image_to_text == pytest.approx((first + second) / 2, abs=1e-12)
        assert ranks.chance(k).text_to_image == min(k / 2, 1)


def test_hit_probability_by_hand():
    greater, equal, right = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 3, 2]), torch.tensor([1, 1, 2, 1])
    # k = 3: in; one place of two and the other also free; one place for 2 right among 5; three places for three.
    assert hit_probability(greater, equal, right, 3).tolist() == pytest.approx([1, 1, 1 - 3 / 5, 1])


def test_one_image_one_text_and_k_beyond_the_gallery():
    ranks = retrieval_ranks(torch.ones(1, 2), -torch.ones(1, 2), torch.tensor([0]))
    assert ranks.recall(1) == ranks.recall(100) == ranks.chance(1) == ranks.chance(100) == (1.0, 1.0)


def test_an_image_without_a_text_is_a_distractor_and_not_a_question():
    images = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    ranks = retrieval_ranks(images, torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert ranks.num_images_without_text == 1
    assert ranks.recall(1) == Recall(image_to_text=1.0, text_to_image=0.0)
    assert ranks.chance(1) == Recall(image_to_text=1.0, text_to_image=0.5)


def test_scale_does_not_matter_and_low_precision_is_scored_in_fp32():
    generator = torch.Generator().manual_seed(1)
    images, texts = torch.randn(30, 16, generator=generator), torch.randn(60, 16, generator=generator)
    owner = torch.arange(60) // 2
    plain = retrieval_ranks(images, texts, owner)
    for scale in (1e-25, 1e15):
        assert retrieval_ranks(images * scale, texts, owner).recall(5) == plain.recall(5)
    half = retrieval_ranks(images.bfloat16(), texts.bfloat16(), owner)
    assert half.recall(5) == retrieval_ranks(images.bfloat16().float(), texts.bfloat16().float(), owner).recall(5)


def test_a_training_loop_s_precision_settings_do_not_reach_the_scores(monkeypatch):
    """Not every machine has bf16 products for fp32 input, so the setting during the product is looked at too."""
    product, seen = ranks_module._product, []
    monkeypatch.setattr(
        ranks_module, "_product", lambda *args: (seen.append(torch.get_float32_matmul_precision()), product(*args))[1]
    )
    generator = torch.Generator().manual_seed(2)
    images, texts = torch.randn(64, 64, generator=generator), torch.randn(64, 64, generator=generator)
    plain = retrieval_ranks(images, texts, torch.arange(64))
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            ranks = retrieval_ranks(images.requires_grad_(), texts, torch.arange(64))
        assert torch.get_float32_matmul_precision() == "medium" and set(seen) == {"highest"}
    finally:
        torch.set_float32_matmul_precision("highest")
    assert ranks.text_greater.equal(plain.text_greater) and ranks.image_greater.equal(plain.image_greater)


@pytest.mark.parametrize(
    ("images", "texts", "owner", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0, 2]), r"text_to_image\[1\] is 2, but there are 2 images"),
        (torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0, -1]), r"text_to_image\[1\] is -1"),
        (torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0]), r"one integer for each of the 2 texts.*\[1\]"),
        (torch.ones(2, 3), torch.ones(2, 3), torch.tensor([[0, 0, 0]]), r"pairs of a text and an image.*\[1, 3\]"),
        (torch.ones(2, 3), torch.ones(3, 3), torch.tensor([[0, 0], [2, 2]]), r"\[1\] is \[2, 2\], but .* 2 images"),
        (torch.ones(2, 3), torch.ones(3, 3), torch.tensor([[3, 0]]), r"\[0\] is \[3, 0\], but there are 3 texts"),
        (torch.ones(2, 3), torch.ones(3, 3), torch.zeros(0, 2).long(), "nothing to ask"),
        (torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0.0, 1.0]), "float32"),
        (torch.ones(2, 3), torch.ones(2, 3), torch.tensor([True, False]), "bool"),
        (torch.ones(2, 3), torch.ones(2, 4), torch.tensor([0, 1]), "3 dimensions and texts 4"),
        (torch.ones(2, 3, 1), torch.ones(2, 3), torch.tensor([0, 1]), r"image embeddings.*\[2, 3, 1\]"),
        (torch.ones(2, 3).long(), torch.ones(2, 3), torch.tensor([0, 1]), "floating"),
        (torch.ones(0, 3), torch.ones(2, 3), torch.tensor([0, 1]), "no image embeddings"),
        (torch.ones(2, 3), torch.ones(0, 3), torch.zeros(0, dtype=torch.long), "no text embeddings"),
        (torch.tensor([[1.0], [math.nan]]), torch.ones(2, 1), torch.tensor([0, 1]), "NaN.*row 1"),
        (
            torch.ones(2, 1),
            torch.tensor([[math.inf], [1.0]]),
            torch.tensor([0, 1]),
            "text embeddings hold NaN or infinity",
        ),
        (torch.full((2, 3), 1e30), torch.full((2, 3), 1e30), torch.tensor([0, 1]), "overflow"),
    ],
)
def test_bad_input_is_named(images, texts, owner, message):
    with pytest.raises(ValueError, match=message):
        retrieval_ranks(images, texts, owner)


def test_arrays_of_any_layout_and_things_that_are_no_arrays():
    texts = SCORES.T.contiguous()
    backwards = retrieval_ranks(torch.eye(4).numpy()[:, ::-1], texts.numpy()[:, ::-1], OWNER.numpy().astype(np.uint8))
    strided = retrieval_ranks(torch.eye(4).T, SCORES.T, OWNER.tolist())
    for name, value in dataclasses.asdict(by_hand()).items():
        assert getattr(backwards, name).equal(value) and getattr(strided, name).equal(value)
    for arguments in (("x", texts, OWNER), (torch.eye(4), None, OWNER), (torch.eye(4), texts, ["a"] * 8)):
        with pytest.raises(ValueError, match="must be a tensor or an array of numbers, not (str|NoneType|list)"):
            retrieval_ranks(*arguments)


def test_bad_k_ties_and_tile_are_named():
    with pytest.raises(ValueError, match="not 0"):
        by_hand().recall(0)
    for k in (-1, 1.5, True):
        with pytest.raises(ValueError, match=f"whole K >= 1, not {k}"):
            by_hand().chance(k)
    assert by_hand().recall(np.int64(5)) == by_hand().recall(5)
    with pytest.raises(ValueError, match="lucky"):
        by_hand().recall(1, ties="lucky")
    with pytest.raises(ValueError, match="tile"):
        by_hand(tile=0)


def test_repeated_captions_need_their_owners():
    for function in (distinct_texts, text_equal_pairs):
        with pytest.raises(ValueError, match=r"one integer for each of the 2 texts, not \[1\]"):
            function(["a", "b"], [0])


def test_choice_by_hand():
    images = torch.eye(3)
    candidates = torch.tensor(
        [
            [2.0, 0, 0], [1.0, 0, 0],  # row 0, true 0: right
            [0, 1.0, 0], [0, 1.0, 0], [0, 0.5, 0],  # row 1, true 1: shares the best with one other
            [0, 0, 3.0], [0, 0, 1.0],  # row 2, true 1: wrong
        ]
    )  # fmt: skip
    hits = choice_hits(images, candidates, torch.tensor([2, 3, 2]), torch.tensor([0, 1, 1]))
    assert hits.tolist() == [1.0, 0.5, 0.0]


def test_choice_input_is_checked():
    with pytest.raises(ValueError, match="label 2 but 2 candidates"):
        choice_hits(torch.eye(1), torch.ones(2, 1), torch.tensor([2]), torch.tensor([2]))
    with pytest.raises(ValueError, match="do not make one table"):
        choice_hits(torch.eye(1), torch.ones(2, 1), torch.tensor([3]), torch.tensor([0]))
