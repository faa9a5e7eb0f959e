"""Tiny, randomly initialised models of every class that has an adapter, with tokenizers made on the fly, as folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import sentencepiece
import torch
import transformers as t
from tokenizers import pre_tokenizers

WORDS = ["a", "red", "green", "blue", "circle", "square", "photo", "of", "the", "dog", "cat", "two", "big"]
CHARACTERS = list("一张红色绿蓝的狗猫照片圆方块只")

VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP_PIXELS = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
SQUARE = {"size": {"height": 32, "width": 32}}


def save_tiny(kind: str, folder: Path) -> Path:
    """A folder with the random model called `kind`, one of TINY, and its processor."""
    torch.manual_seed(0)
    model, processor = TINY[kind](folder)
    # With the library's own initial weights different inputs give nearly the same output.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2 if parameter.ndim == 2 else parameter[0].numel() ** -0.5)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _clip(folder: Path) -> tuple[t.PreTrainedModel, t.ProcessorMixin]:
    tokenizer = _clip_tokenizer()
    text = {**TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": 77, **_special(tokenizer)}
    config = t.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=12)
    return t.CLIPModel(config), t.CLIPProcessor(t.CLIPImageProcessorPil(**CLIP_PIXELS), tokenizer)


def _metaclip_2(folder: Path) -> tuple[t.PreTrainedModel, t.ProcessorMixin]:
    tokenizer = _unigram_tokenizer()
    text = {**TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": 77, **_special(tokenizer)}
    config = t.MetaClip2Config(text_config=text, vision_config=VISION, projection_dim=12)
    return t.MetaClip2Model(config), t.CLIPProcessor(t.CLIPImageProcessorPil(**CLIP_PIXELS), tokenizer)


def _chinese_clip(folder: Path) -> tuple[t.PreTrainedModel, t.ProcessorMixin]:
    tokenizer = _bert_tokenizer()
    text = {**TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": 128, "pad_token_id": 0}
    config = t.ChineseCLIPConfig(text_config=text, vision_config=VISION, projection_dim=12)
    images = t.ChineseCLIPImageProcessorPil(**CLIP_PIXELS)
    return t.ChineseCLIPModel(config), t.ChineseCLIPProcessor(images, tokenizer)


def _altclip(folder: Path) -> tuple[t.PreTrainedModel, t.ProcessorMixin]:
    tokenizer = _unigram_tokenizer()
    text = {**TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": 130, "project_dim": 16}
    config = t.AltCLIPConfig(text_config={**text, **_special(tokenizer)}, vision_config=VISION, projection_dim=12)
    return t.AltCLIPModel(config), t.AltCLIPProcessor(t.CLIPImageProcessorPil(**CLIP_PIXELS), tokenizer)


def _align(folder: Path) -> tuple[t.PreTrainedModel, t.ProcessorMixin]:
    tokenizer = _bert_tokenizer()
    vision = {
        "image_size": 32,
        "width_coefficient": 1.0,
        "depth_coefficient": 0.3,
        "hidden_dim": 24,
        "kernel_sizes": [3, 3],
        "in_channels": [32, 16],
        "out_channels": [16, 24],
        "strides": [1, 2],
        "num_block_repeats": [1, 1],
        "expand_ratios": [1, 6],
        "depthwise_padding": [],
    }
    text = {**TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": 128, "pad_token_id": 0}
    config = t.AlignConfig(text_config=text, vision_config=vision, projection_dim=24)
    images = t.EfficientNetImageProcessorPil(**SQUARE, do_center_crop=False, include_top=False)
    return t.AlignModel(config), t.AlignProcessor(images, tokenizer)


def _flava(folder: Path) -> tuple[t.PreTrainedModel, t.ProcessorMixin]:
    tokenizer = _bert_tokenizer()
    text = {**TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": 128, "pad_token_id": 0}
    config = t.FlavaConfig(
        text_config=text, image_config=VISION, multimodal_config=TEXT, projection_dim=12, hidden_size=16
    )
    images = t.FlavaImageProcessorPil(size=SQUARE["size"], crop_size=SQUARE["size"])
    return t.FlavaModel(config), t.FlavaProcessor(images, tokenizer)


def _siglip(folder: Path) -> tuple[t.PreTrainedModel, t.ProcessorMixin]:
    tokenizer = _siglip_tokenizer(folder)
    return _siglip_model(tokenizer), t.SiglipProcessor(t.SiglipImageProcessorPil(**SQUARE), tokenizer)


def _siglip_2_fixed(folder: Path) -> tuple[t.PreTrainedModel, t.ProcessorMixin]:
    """SigLIP 2 of fixed resolution is a SigLIP with another tokenizer."""
    tokenizer = _gemma_tokenizer(t.GemmaTokenizer)
    return _siglip_model(tokenizer), t.SiglipProcessor(t.SiglipImageProcessorPil(**SQUARE), tokenizer)


def _siglip_2(folder: Path) -> tuple[t.PreTrainedModel, t.ProcessorMixin]:
    tokenizer = _gemma_tokenizer(t.Siglip2Tokenizer)
    text = {**TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": 64, "projection_size": 16}
    vision = {**{k: v for k, v in VISION.items() if k != "image_size"}, "num_patches": 16}
    config = t.Siglip2Config(text_config=text, vision_config=vision)
    images = t.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
    return t.Siglip2Model(config), t.Siglip2Processor(images, tokenizer)


TINY: dict[str, Callable[[Path], tuple[t.PreTrainedModel, t.ProcessorMixin]]] = {
    "clip": _clip,
    "metaclip_2": _metaclip_2,
    "chinese_clip": _chinese_clip,
    "altclip": _altclip,
    "align": _align,
    "flava": _flava,
    "siglip": _siglip,
    "siglip, tokenizer of SigLIP 2": _siglip_2_fixed,
    "siglip2": _siglip_2,
}


def _siglip_model(tokenizer: t.PreTrainedTokenizerBase) -> t.SiglipModel:
    text = {**TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": 64, "projection_size": 16}
    return t.SiglipModel(t.SiglipConfig(text_config=text, vision_config=VISION))


def _special(tokenizer: t.PreTrainedTokenizerBase) -> dict[str, int]:
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _clip_tokenizer() -> t.PreTrainedTokenizerBase:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return t.CLIPTokenizer(vocab={token: i for i, token in enumerate(vocab)}, merges=[], model_max_length=77)


def _bert_tokenizer() -> t.PreTrainedTokenizerBase:
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *CHARACTERS, '"', "“", "”"]
    return t.BertTokenizer(vocab={token: i for i, token in enumerate(vocab)}, do_lower_case=True)


def _unigram_tokenizer() -> t.PreTrainedTokenizerBase:
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *("▁" + word for word in WORDS), "▁", *CHARACTERS]
    return t.XLMRobertaTokenizer(vocab=[(piece, 0.0 if i < 4 else -float(i)) for i, piece in enumerate(pieces)])


def _gemma_tokenizer(kind: type) -> t.PreTrainedTokenizerBase:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ", *CHARACTERS]
    vocab = {token: i for i, token in enumerate([*special, *(f"<0x{byte:02X}>" for byte in range(256)), *letters])}
    return kind(vocab=vocab, merges=[], padding_side="right", add_bos_token=False, add_eos_token=True)


def _siglip_tokenizer(folder: Path) -> t.PreTrainedTokenizerBase:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))] + ["".join(CHARACTERS)] * 4
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "spiece"),
        vocab_size=60,
        hard_vocab_limit=False,
        character_coverage=1.0,
        minloglevel=2,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    return t.SiglipTokenizer(vocab_file=str(folder / "spiece.model"))
