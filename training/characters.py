"""What the tokenizer and the masking both know of written characters."""

from __future__ import annotations

# SentencePiece's mark of a word's blank; our own and the published tokenizer write it.
BLANK = "▁"
# For a character class, as re has no \p{Han}: the radicals, the iteration mark and zero, the blocks of ideographs.
HAN = r"\u2e80-\u2fdf\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
