"""Which tokens and patches pretraining hides, and which patches it drops. Tested by `pytest
tests/training/test_masking.py`.

Pure functions of their arguments and a `torch.Generator`: the same state of the generator gives the same masks.

Shapes: B batch, L text tokens, P patches, K kept patches, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .characters import BLANK, HAN

# Chinese is written without blanks: a piece of it is a word of its own; and so is kana.
_UNSPACED = re.compile(rf"[{HAN}\u3040-\u30ff]")


@dataclass(frozen=True)
class MaskingConfig:
    """How much is hidden. The paper asks for large ratios; the sources of these numbers are named below."""

    text_ratio: float = 0.5
    """Part of a text's tokens; BEiT-3's for texts that have an image (arXiv 2208.10442, section 2.2)."""
    image_ratio: float = 0.75
    """Part of an image's patches; MAE's (arXiv 2111.06377, section 4.1)."""
    whole_words: bool = True
    """Hide all pieces of a word or none; `whole_word_masking` in the official configs."""

    def __post_init__(self) -> None:
        for name in ("text_ratio", "image_ratio"):
            _check_ratio(name, getattr(self, name))


@dataclass(frozen=True)
class Vocabulary:
    """What masking knows of each entry of a tokenizer: four bool tensors [V]."""

    special: Tensor
    """Never masked: [CLS], end of text and padding, [MASK], ...; and what stands for unknown characters."""
    begins_word: Tensor
    """A blank lies before it, or it is Chinese or punctuation."""
    ends_word: Tensor
    """Nothing can continue it: it ends in Chinese or punctuation."""
    blank: Tensor
    """A blank and nothing else: whatever follows continues it, Chinese too."""


def describe_vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """The `Vocabulary` of a tokenizer whose pieces mark blanks as SentencePiece does; take it once per run.

    Words are read off the pieces and not off the pre-tokenisation, which makes one word of a whole run of Chinese in
    our own tokenizer and of the whole text in the published one. A word is a run of letters, digits and apostrophes; a
    Chinese piece is a word, because the pieces are the only segmentation there is (both vocabularies learned words of
    several characters).

    Raises:
        ValueError: when the tokenizer has no [MASK], so that no text can be masked.
    """
    if tokenizer.mask_token_id is None:
        raise ValueError("The tokenizer has no mask token: masking text needs one ([MASK]).")
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = torch.zeros(len(pieces), dtype=torch.bool)
    special[tokenizer.all_special_ids] = True
    inside = [(_in_word(piece[:1]), _in_word(piece[-1:]) or piece[-1:] == BLANK) for piece in pieces]
    first, last = torch.tensor(inside, dtype=torch.bool).unbind(1)
    # The published vocabulary has the special token [UNK], and writes unknown characters as a `<unk>` that is none.
    unknown = getattr(tokenizer.backend_tokenizer.model, "unk_token", None)
    special |= torch.tensor([piece == unknown for piece in pieces])
    blank = torch.tensor([piece == BLANK for piece in pieces])
    return Vocabulary(special=special, begins_word=special | ~first, ends_word=special | ~last, blank=blank)


def _in_word(character: str) -> bool:
    return (character.isalnum() and not _UNSPACED.match(character)) or character in ("'", "’")


def word_numbers(input_ids: Tensor, vocabulary: Vocabulary) -> Tensor:
    """The word that each token belongs to, counted from 0 in each row: [B, L] integers. A special token is a word.

    Raises:
        ValueError: for an id that the vocabulary does not have.
    """
    tables = (vocabulary.special, vocabulary.begins_word, vocabulary.ends_word, vocabulary.blank)
    special, begins, ends, blank = (_look_up(table, input_ids) for table in tables)
    begins[:, 1:] = (begins[:, 1:] & ~blank[:, :-1]) | special[:, 1:] | ends[:, :-1]
    begins[:, :1] = False  # the first word is number 0
    return begins.cumsum(dim=1)


def mask_text(
    input_ids: Tensor,
    attention_mask: Tensor,
    vocabulary: Vocabulary,
    ratio: float,
    *,
    whole_words: bool = False,
    generator: torch.Generator,
) -> Tensor:
    """The tokens to hide, drawn at random in each row: [B, L] bool.

    Of n tokens that are neither special nor padding, `ratio * n`, rounded, are hidden, and at least one. With
    `whole_words`, words are taken in random order as long as at least half of a word still fits, so that the ratio is
    about right on average; the first is always taken. Padding further does not change a row's mask. A row with nothing
    to hide (a text of special tokens) stays whole.

    Args:
        input_ids, attention_mask: [B, L] integers; 0 in the mask is padding.
        ratio: in (0, 1).
        generator: on the CPU, wherever the ids are.

    Raises:
        ValueError: for a ratio outside (0, 1), shapes that differ, an id that the vocabulary does not have, or when no
            text of the batch has anything to hide.
    """
    _check_ratio("ratio", ratio)
    if input_ids.ndim != 2 or attention_mask.shape != input_ids.shape:
        raise ValueError(
            "input_ids and attention_mask must both be [batch, tokens], got "
            f"{list(input_ids.shape)} and {list(attention_mask.shape)}."
        )
    rows, length = input_ids.shape
    can_hide = (attention_mask != 0) & ~_look_up(vocabulary.special, input_ids)
    if not can_hide.any():
        raise ValueError(f"Nothing to mask: all {rows} texts consist of special tokens only.")
    # Tokens first, rows second: further padding then draws further numbers and changes none.
    draws = torch.rand(length, rows, generator=generator).T.to(input_ids.device)
    words = word_numbers(input_ids, vocabulary) if whole_words else torch.arange(length, device=input_ids.device)
    words = words.expand(rows, length)
    order = draws.gather(1, words).masked_fill(~can_hide, 2.0)  # a number per word; what must stay comes last
    rank = order.argsort(dim=1, stable=True).argsort(dim=1)  # stable: a word's tokens stay together
    first = torch.full_like(rank, length).scatter_reduce(1, words, rank.masked_fill(~can_hide, length), "amin")
    size = torch.zeros_like(rank).scatter_add(1, words, can_hide.to(rank.dtype))
    wanted = (ratio * can_hide.sum(dim=1, keepdim=True)).round().clamp(min=1)
    taken = (first == 0) | (first + size / 2 <= wanted)
    return taken.gather(1, words) & can_hide


def mask_patches(batch_size: int, num_patches: int, ratio: float, *, generator: torch.Generator) -> Tensor:
    """The patches to hide, drawn at random in each image: [B, P] bool, on the CPU.

    Every image hides the same number, `ratio * P` rounded, but at least one and not all.

    Raises:
        ValueError: for a ratio outside (0, 1), no image, or fewer than two patches.
    """
    _check_ratio("ratio", ratio)
    if batch_size < 1 or num_patches < 2:
        raise ValueError(f"Expected batch_size >= 1 and num_patches >= 2, got {batch_size=} and {num_patches=}.")
    hidden = min(max(round(ratio * num_patches), 1), num_patches - 1)
    draws = torch.rand(batch_size, num_patches, generator=generator)
    return draws.argsort(dim=1).argsort(dim=1) < hidden


def keep_patches(batch_size: int, num_patches: int, drop_ratio: float, *, generator: torch.Generator) -> Tensor:
    """The patches that FLIP's dropping (arXiv 2212.00794) leaves of each image: [B, K] int64, rising, on the CPU.

    K = P - `drop_ratio` * P, rounded, of every image, drawn at random. The class token is not counted; it always stays.

    Raises:
        ValueError: for a ratio outside [0, 1), one that would keep no patch, or no image.
    """
    dropped = round(drop_ratio * num_patches) if 0 <= drop_ratio < 1 else num_patches
    if batch_size < 1 or dropped >= num_patches:
        raise ValueError(
            f"Expected batch_size >= 1 and a drop_ratio in [0, 1) that keeps one of num_patches, got {batch_size=}, "
            f"{num_patches=} and {drop_ratio=}."
        )
    draws = torch.rand(batch_size, num_patches, generator=generator)
    return draws.argsort(dim=1)[:, dropped:].sort(dim=1).values


@dataclass(frozen=True)
class Masker:
    """The masks of a batch, each row's from its own generator: the same on however many processes, and drawn before the
    model runs, so that a bank that runs a micro-batch twice hides and drops the same twice."""

    config: MaskingConfig
    vocabulary: Vocabulary | None
    """None: no text is masked."""
    num_patches: int
    """Patches of an image; 0: images are left alone."""
    masks_images: bool = True
    drop_patches: float = 0.0
    """Part of the patches that the contrastive features do without (`training.schedule`)."""

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, generators: Sequence[np.random.Generator]
    ) -> dict[str, Tensor]:
        """`text_mask` [B, L] and `patch_mask` [B, P], bool, and `kept_patches` [B, K], as far as they are asked for.

        A text of nothing but special tokens keeps them all.
        """
        # A seed for each kind: from one, the hidden patches would be those at the places of the hidden tokens.
        seeds = [generator.integers(2**63, size=3).tolist() for generator in generators]
        of_text, of_mask, of_drop = ([torch.Generator().manual_seed(row[i]) for row in seeds] for i in range(3))
        masks = {}
        if self.vocabulary is not None:
            text_mask = torch.zeros_like(input_ids, dtype=torch.bool)
            can_hide = ((attention_mask != 0) & ~self.vocabulary.special[input_ids]).any(dim=1)
            for row in can_hide.nonzero().flatten().tolist():
                text_mask[row] = mask_text(
                    input_ids[row, None],
                    attention_mask[row, None],
                    self.vocabulary,
                    self.config.text_ratio,
                    whole_words=self.config.whole_words,
                    generator=of_text[row],
                )[0]
            masks["text_mask"] = text_mask
        patches = self.num_patches
        if patches and self.masks_images:
            masks["patch_mask"] = torch.cat(
                [mask_patches(1, patches, self.config.image_ratio, generator=row) for row in of_mask]
            )
        if patches and self.drop_patches:
            masks["kept_patches"] = torch.cat(
                [keep_patches(1, patches, self.drop_patches, generator=row) for row in of_drop]
            )
        return masks


def _look_up(table: Tensor, input_ids: Tensor) -> Tensor:
    if (
        input_ids.numel()
        and input_ids.device.type == "cpu"
        and not 0 <= input_ids.min() <= input_ids.max() < len(table)
    ):
        raise ValueError(
            f"input_ids must lie in [0, {len(table) - 1}], got {int(input_ids.min())} to {int(input_ids.max())}: "
            "is the vocabulary that of another tokenizer?"
        )
    return table.to(input_ids.device)[input_ids]


def _check_ratio(name: str, ratio: float) -> None:
    if not 0 < ratio < 1:
        raise ValueError(f"{name} must lie between 0 and 1, both excluded, got {ratio}.")
