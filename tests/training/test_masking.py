"""Masking: counts by hand, what is never masked, words of both languages and tokenizers, determinism, bad input."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from conversion.tokenizer import glm_tokenizer
from training.masking import (
    Masker,
    MaskingConfig,
    Vocabulary,
    describe_vocabulary,
    keep_patches,
    mask_patches,
    mask_text,
    word_numbers,
)
from training.tokenizer import train_tokenizer


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def vocabulary(tokenizer) -> Vocabulary:
    return describe_vocabulary(tokenizer)


@pytest.fixture(scope="module")
def batch(tokenizer, captions) -> tuple[Tensor, Tensor]:
    encoded = tokenizer(captions, padding=True, return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"]


def words(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The words of a text, pieces joined."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    numbers = word_numbers(ids, describe_vocabulary(tokenizer))[0].tolist()
    assert numbers[0] == 0 and all(b - a in (0, 1) for a, b in zip(numbers, numbers[1:], strict=False))
    found = [""] * (numbers[-1] + 1)
    for piece, number in zip(tokenizer.convert_ids_to_tokens(ids[0].tolist()), numbers, strict=True):
        found[number] += piece.replace("▁", " ")
    return found


# ---- Text


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.5, 0.9, 0.999])
def test_special_tokens_and_padding_are_never_masked(tokenizer, vocabulary, batch, ratio, whole_words):
    ids, attention = batch
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    assert special.any() and (attention == 0).any()
    for seed in range(20):
        mask = mask_text(ids, attention, vocabulary, ratio, whole_words=whole_words, generator=generator(seed))
        assert mask.dtype == torch.bool and mask.any(dim=1).all()
        assert not (mask & special).any() and not (mask & (attention == 0)).any()


def test_exact_counts(vocabulary, batch):
    ids, attention = batch
    eligible = ((attention == 1) & ~vocabulary.special[ids]).sum(dim=1)
    for ratio in (0.001, 0.25, 0.5, 0.8):
        mask = mask_text(ids, attention, vocabulary, ratio, generator=generator())
        assert mask.sum(dim=1).tolist() == [max(1, round(ratio * n)) for n in eligible.tolist()]


def test_every_token_is_drawn_equally_often(vocabulary, batch):
    ids, attention = (rows[:1].expand(4000, -1) for rows in batch)
    mask = mask_text(ids, attention, vocabulary, 0.5, generator=generator())
    eligible = (attention[0] == 1) & ~vocabulary.special[ids[0]]
    share = mask.float().mean(dim=0)[eligible]
    assert (share - share.mean()).abs().max() < 0.04 and share.mean().item() == pytest.approx(0.5, abs=0.04)


def test_the_generator_decides(vocabulary, batch):
    ids, attention = batch
    one, same, other = (mask_text(ids, attention, vocabulary, 0.5, generator=generator(s)) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    state = torch.random.get_rng_state()
    mask_text(ids, attention, vocabulary, 0.5, generator=generator())
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("whole_words", [False, True])
def test_padding_further_changes_nothing(vocabulary, tokenizer, captions, batch, whole_words):
    padded = tokenizer(captions, padding="max_length", return_tensors="pt")
    assert padded["input_ids"].shape[1] > batch[0].shape[1]
    arguments = {"ratio": 0.5, "whole_words": whole_words}
    short = mask_text(*batch, vocabulary, **arguments, generator=generator())
    long = mask_text(padded["input_ids"], padded["attention_mask"], vocabulary, **arguments, generator=generator())
    assert torch.equal(long[:, : short.shape[1]], short) and not long[:, short.shape[1] :].any()


def test_a_text_of_special_tokens_stays_whole(vocabulary, tokenizer):
    encoded = tokenizer(["", "a star"], padding=True, return_tensors="pt")
    mask = mask_text(encoded["input_ids"], encoded["attention_mask"], vocabulary, 0.5, generator=generator())
    assert mask.any(dim=1).tolist() == [False, True]


# ---- Words


def test_words_of_our_tokenizer(captions):
    """A small vocabulary, in which an unusual word has several pieces."""
    small = train_tokenizer(captions * 3, vocab_size=260)
    english = words(small, "two green dodecahedra, above 12 man's")
    assert english == ["[CLS]", " two", " green", " dodecahedra", ",", " above", " 12", " man's", "<|endoftext|>"]
    assert len(small.tokenize("dodecahedra")) > 1
    pieces = small.tokenize("红色的圆在左边")
    assert words(small, "红色的圆在左边")[1:-1] == pieces and len(pieces) > 2 and "[UNK]" not in pieces
    mixed = words(small, "三颗star星")[1:-1]  # no blank, yet a word of its own
    assert "star" in mixed and "".join(mixed) == "三颗star星"


def test_unknown_characters_are_not_masked_and_blanks_with_their_words(captions):
    small = train_tokenizer(captions * 3, vocab_size=260)
    encoded = small("circle 鼠 红 qqq", return_tensors="pt")
    pieces = small.convert_ids_to_tokens(encoded["input_ids"][0].tolist())
    assert pieces.count("[UNK]") == 1 and pieces.count("▁") >= 3
    vocabulary = describe_vocabulary(small)
    hidden = mask_text(**encoded, vocabulary=vocabulary, ratio=0.999, whole_words=True, generator=generator())[0]
    expected = [piece for piece in pieces[1:-1] if piece != "[UNK]"]
    assert [piece for piece, is_hidden in zip(pieces, hidden.tolist(), strict=True) if is_hidden] == expected
    assert words(small, "circle 鼠 红 qqq")[1:-1] == [" circle", " ", "[UNK]", " 红", " qqq"]


def test_words_of_the_published_tokenizer(shared):
    glm = glm_tokenizer(shared / "parity" / "sp.model")
    assert words(glm, "an unbelievablyyy good man's iPhone15 (photo)!")[1:-1] == [
        " an", " unbelievablyyy", " good", " man's", " iPhone15", " (", "photo", ")!",
    ]  # fmt: skip
    assert words(glm, "红色的圆在左边，两只猫")[1:-1] == [
        p.replace("▁", " ") for p in glm.tokenize("红色的圆在左边，两只猫")
    ]
    vocabulary = describe_vocabulary(glm)
    never = ["<unk>", "<|endoftext|>", "[CLS]", "[MASK]", "[UNK]"]
    assert glm.convert_ids_to_tokens(vocabulary.special.nonzero().flatten().tolist()) == sorted(
        never, key=glm.convert_tokens_to_ids
    )
    rare = glm("𠮷 😀 ひ", return_tensors="pt")  # no such character; each behind a blank of its own
    assert rare["input_ids"].shape[1] > 5
    hidden = mask_text(**rare, vocabulary=vocabulary, ratio=0.999, whole_words=True, generator=generator())
    assert glm.convert_ids_to_tokens(rare["input_ids"][hidden].tolist()) == ["▁", "▁", "😀", "▁", "ひ"]
    assert words(glm, "𠮷 😀 ひ")[1:-1] == [" ", "<unk>", " 😀", " ひ"]
    encoded = glm(["an unbelievablyyy good man", "红色的圆在左边"], padding=True, return_tensors="pt")
    mask = mask_text(**encoded, vocabulary=vocabulary, ratio=0.5, whole_words=True, generator=generator())
    numbers = word_numbers(encoded["input_ids"], vocabulary)
    assert mask.any(dim=1).all()
    for row, its_words in zip(mask, numbers, strict=True):
        assert all(len(row[its_words == number].unique()) == 1 for number in its_words.unique())


def test_whole_words_are_masked_whole(vocabulary, batch):
    ids, attention = batch
    numbers = word_numbers(ids, vocabulary)
    single, split = 0, 0
    for seed in range(20):
        for whole_words in (True, False):
            mask = mask_text(ids, attention, vocabulary, 0.5, whole_words=whole_words, generator=generator(seed))
            for row, its_words in zip(mask, numbers, strict=True):
                parts = sum(len(row[its_words == number].unique()) == 2 for number in its_words.unique())
                single, split = (single + parts, split) if whole_words else (single, split + parts)
    assert single == 0 and split > 100  # the check sees words that are torn apart


def test_words_by_hand():
    """One word of 4 tokens and four of 1, half of them to be hidden: the long word is, when at least half of it fits,
    which is with at most 2 tokens before it."""
    table = Vocabulary(
        special=torch.tensor([True, False, False]),
        begins_word=torch.tensor([True, True, False]),  # id 1 begins a word, id 2 goes on
        ends_word=torch.tensor([True, False, False]),
        blank=torch.tensor([False, False, False]),
    )
    ids = torch.tensor([[0, 1, 2, 2, 2, 1, 1, 1, 1, 0]]).expand(2000, -1)
    assert word_numbers(ids[:1], table).tolist() == [[0, 1, 1, 1, 1, 2, 3, 4, 5, 6]]
    mask = mask_text(ids, torch.ones_like(ids), table, 0.5, whole_words=True, generator=generator())
    long, short = mask[:, 1], mask[:, 5:9].sum(dim=1)
    assert torch.equal(mask[:, 1:5].sum(dim=1), 4 * long.long())
    # Its place among the five words is 1st to 5th with probability 1/5 each; from the 4th on it does not fit.
    assert long.float().mean().item() == pytest.approx(3 / 5, abs=0.04)
    assert set(short[long].tolist()) == {0, 1, 2} and set(short[~long].tolist()) == {3, 4}
    # On average the ratio is about kept: (4 + 5 + 6 + 3 + 4) / 5 = 4.4 of 8, in a text of which one word is half.
    assert mask.sum(dim=1).float().mean().item() == pytest.approx(4.4, abs=0.1)


# ---- Patches


def test_patches_are_counted_exactly():
    for ratio, hidden in ((0.75, 147), (0.4, 78), (0.001, 1), (0.999, 195)):
        mask = mask_patches(50, 196, ratio, generator=generator())
        assert mask.shape == (50, 196) and mask.dtype == torch.bool
        assert mask.sum(dim=1).tolist() == [hidden] * 50
    assert mask_patches(3, 2, 0.9, generator=generator()).sum(dim=1).tolist() == [1, 1, 1]


def test_patches_are_drawn_equally_often_and_again_the_same():
    mask = mask_patches(4000, 16, 0.75, generator=generator(3))
    assert (mask.float().mean(dim=0) - 0.75).abs().max() < 0.03
    assert len(mask.unique(dim=0)) > 1000
    assert torch.equal(mask, mask_patches(4000, 16, 0.75, generator=generator(3)))


def test_kept_patches_are_counted_exactly():
    for ratio, kept in ((0.0, 196), (0.5, 98), (0.75, 49), (0.99, 2)):
        rows = keep_patches(50, 196, ratio, generator=generator())
        assert rows.shape == (50, kept) and rows.dtype == torch.long
        assert (rows.diff(dim=1) > 0).all() and rows.min() >= 0 and rows.max() < 196
    counts = keep_patches(4000, 16, 0.75, generator=generator(3)).flatten().bincount(minlength=16) / 4000
    assert (counts - 0.25).abs().max() < 0.03
    assert torch.equal(
        keep_patches(9, 16, 0.5, generator=generator(1)), keep_patches(9, 16, 0.5, generator=generator(1))
    )
    for arguments in ((2, 16, 1.0), (2, 16, -0.1), (2, 16, float("nan")), (2, 1, 0.6), (0, 16, 0.5)):
        with pytest.raises(ValueError, match="drop_ratio"):
            keep_patches(*arguments, generator=generator())


# ---- Bad input


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.5, float("nan")])
def test_ratios_outside_0_and_1(ratio, vocabulary, batch):
    with pytest.raises(ValueError, match="between 0 and 1"):
        mask_text(*batch, vocabulary, ratio, generator=generator())
    with pytest.raises(ValueError, match="between 0 and 1"):
        mask_patches(2, 16, ratio, generator=generator())
    for name in ("text_ratio", "image_ratio"):
        with pytest.raises(ValueError, match=f"{name} must lie between 0 and 1"):
            MaskingConfig(**{name: ratio})


def test_a_tokenizer_without_mask_token():
    with pytest.raises(ValueError, match="no mask token"):
        describe_vocabulary(SimpleNamespace(mask_token_id=None))


def test_nothing_to_mask(vocabulary, tokenizer):
    encoded = tokenizer(["", "[MASK]"], padding=True, return_tensors="pt")
    with pytest.raises(ValueError, match="all 2 texts consist of special tokens"):
        mask_text(**encoded, vocabulary=vocabulary, ratio=0.5, generator=generator())


def test_other_bad_arguments(vocabulary, batch):
    ids, attention = batch
    with pytest.raises(ValueError, match=r"\[batch, tokens\]"):
        mask_text(ids, attention[:, 1:], vocabulary, 0.5, generator=generator())
    with pytest.raises(ValueError, match="another tokenizer"):
        mask_text(ids + 500, attention, vocabulary, 0.5, generator=generator())
    with pytest.raises(ValueError, match="num_patches >= 2"):
        mask_patches(2, 1, 0.5, generator=generator())


def test_defaults():
    assert MaskingConfig() == MaskingConfig(text_ratio=0.5, image_ratio=0.75, whole_words=True)


def test_a_masker_draws_each_row_by_itself(tokenizer):
    """A row's masks are the same in any batch, so that they do not depend on the number of processes."""
    texts = ["a red circle", "two blue squares on a grey background", "一个红色的圆形"]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    ids, attention_mask = tokens["input_ids"], tokens["attention_mask"]
    masker = Masker(MaskingConfig(), describe_vocabulary(tokenizer), num_patches=16)

    def masks(rows: list[int]) -> dict[str, torch.Tensor]:
        generators = [np.random.default_rng(row) for row in rows]
        return masker(ids[rows], attention_mask[rows], generators)

    whole = masks([0, 1, 2])
    assert whole["patch_mask"].sum(dim=1).tolist() == [12] * 3 and whole["text_mask"].any(dim=1).all()
    for rows in ([1], [2, 0]):
        assert all(torch.equal(mask, whole[name][rows]) for name, mask in masks(rows).items())
    only_special = ids.masked_fill(torch.tensor([[True], [False], [False]]), tokenizer.pad_token_id)
    drawn = masker(only_special, attention_mask, [np.random.default_rng(0)] * 3)
    assert drawn["text_mask"].any(dim=1).tolist() == [False, True, True]
    assert list(Masker(MaskingConfig(), None, 0)(ids, attention_mask, [np.random.default_rng(0)] * 3)) == []


def test_a_masker_drops_patches_apart_from_the_masks(tokenizer):
    """Kept patches by row from its own generator; with the drop asked for, the masks are what they were without."""
    tokens = tokenizer(["a red circle"] * 300, padding=True, return_tensors="pt")
    arguments = (tokens["input_ids"], tokens["attention_mask"])

    def drawn(first: int = 0, **settings) -> dict[str, torch.Tensor]:
        masker = Masker(MaskingConfig(), None, 16, **settings)
        return masker(*(rows[first:] for rows in arguments), [np.random.default_rng(i) for i in range(first, 300)])

    both, alone = drawn(drop_patches=0.75), drawn(drop_patches=0.75, masks_images=False)
    assert both.keys() == {"patch_mask", "kept_patches"} and alone.keys() == {"kept_patches"}
    assert both["kept_patches"].shape == (300, 4) and torch.equal(both["kept_patches"], alone["kept_patches"])
    assert torch.equal(drawn(200, drop_patches=0.75)["kept_patches"], both["kept_patches"][200:])
    assert torch.equal(both["patch_mask"], drawn()["patch_mask"]) and drawn(masks_images=False) == {}
    # Independent of the mask: of the kept patches three in four are masked, as of all.
    assert both["patch_mask"].gather(1, both["kept_patches"]).float().mean().item() == pytest.approx(0.75, abs=0.04)
