"""Tiny, randomly initialised models that write text, with tokenizers made on the fly, as folders that
`from_pretrained` loads: caption models (BLIP-2 with OPT and with T5, BLIP) and translation models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import sentencepiece
import torch
import transformers as t
from tokenizers import pre_tokenizers

VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
SEQ2SEQ = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
}
SENTENCES = [
    "a red circle and a blue square",
    "two dogs play in the green grass",
    "红色的圆和蓝色的方块",
    "两只狗在草地上玩",
]


def save_tiny(kind: str, folder: Path) -> Path:
    """A folder with the random model called `kind`, one of TINY, and what prepares its input."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    model, processor = TINY[kind](folder)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def byte_tokenizer() -> t.PreTrainedTokenizerBase:
    """Bytes, as the tokenizer of OPT without a merge."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: place for place, token in enumerate(["<pad>", "</s>", *letters])}
    return t.GPT2Tokenizer(
        vocab=vocab, merges=[], bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>"
    )


def _blip_2(text: t.PreTrainedConfig, tokenizer: t.PreTrainedTokenizerBase) -> tuple:
    images = t.BlipImageProcessorPil(size={"height": 32, "width": 32})
    processor = t.Blip2Processor(images, tokenizer, num_query_tokens=3)
    text.vocab_size = len(tokenizer)
    config = t.Blip2Config(
        vision_config=VISION,
        qformer_config={**LAYERS, "encoder_hidden_size": 16, "cross_attention_frequency": 1, "vocab_size": 10},
        text_config=text.to_dict(),
        num_query_tokens=3,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = t.Blip2ForConditionalGeneration(config)
    with torch.no_grad():  # zeros, as they are initialised, are the same query three times
        model.query_tokens.normal_()
    return model, processor


def _blip_2_opt(folder: Path) -> tuple:
    tokenizer = byte_tokenizer()
    special = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    text = t.OPTConfig(
        hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, **special
    )
    return _blip_2(text, tokenizer)


def _blip_2_t5(folder: Path) -> tuple:
    tokenizer = t.AutoTokenizer.from_pretrained(str(_t5_tokenizer(folder)))
    return _blip_2(_t5_config(len(tokenizer) + 1), tokenizer)


def _blip(folder: Path) -> tuple:
    words = sorted({word for sentence in SENTENCES[:2] for word in sentence.split()})
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *words, *"abcdefghijklmnopqrstuvwxyz:?.,"]
    tokenizer = t.BertTokenizer(vocab={token: place for place, token in enumerate(vocab)}, do_lower_case=True)
    text = {
        **LAYERS,
        "vocab_size": len(vocab),
        "encoder_hidden_size": 16,
        "max_position_embeddings": 128,
        "bos_token_id": 5,
        "pad_token_id": 0,
        "eos_token_id": 3,
        "sep_token_id": 3,
    }
    config = t.BlipConfig(text_config=text, vision_config=VISION, projection_dim=8)
    processor = t.BlipProcessor(t.BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer)
    return t.BlipForConditionalGeneration(config), processor


def _pieces(folder: Path, name: str, **special: int) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4),
        model_prefix=str(folder / name),
        vocab_size=80,
        hard_vocab_limit=False,
        character_coverage=1.0,
        minloglevel=2,
        **special,
    )
    return folder / f"{name}.model"


def _marian(folder: Path) -> tuple:
    source = _pieces(folder, "pieces", unk_id=0, bos_id=-1, eos_id=1, pad_id=-1)
    model = sentencepiece.SentencePieceProcessor(model_file=str(source))
    pieces = [model.id_to_piece(place) for place in range(len(model))]
    words = ["</s>", "<unk>", ">>cmn_Hans<<", *(piece for piece in pieces if not piece.startswith("<")), "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({word: place for place, word in enumerate(words)}))
    for name in ("source.spm", "target.spm"):
        (folder / name).write_bytes(source.read_bytes())
    tokenizer = t.MarianTokenizer(
        str(folder / "source.spm"), str(folder / "target.spm"), str(folder / "vocab.json"), model_max_length=64
    )
    pad = len(words) - 1
    config = t.MarianConfig(
        **SEQ2SEQ,
        vocab_size=len(words),
        pad_token_id=pad,
        eos_token_id=0,
        decoder_start_token_id=pad,
        forced_eos_token_id=0,
    )
    return t.MarianMTModel(config), tokenizer


def _m2m_100(folder: Path) -> tuple:
    source = _pieces(folder, "sentencepiece.bpe", bos_id=0, pad_id=1, eos_id=2, unk_id=3)
    model = sentencepiece.SentencePieceProcessor(model_file=str(source))
    vocab = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    for place in range(4, len(model)):
        vocab[model.id_to_piece(place)] = place
    (folder / "vocab.json").write_text(json.dumps(vocab))
    tokenizer = t.M2M100Tokenizer(str(folder / "vocab.json"), str(source))
    size = max(map(tokenizer.get_lang_id, ("en", "zh", "zu"))) + 1
    config = t.M2M100Config(**SEQ2SEQ, vocab_size=size, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2)
    return t.M2M100ForConditionalGeneration(config), tokenizer


def _nllb(folder: Path) -> tuple:
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz", *"红色的圆和蓝方块两只狗在草地上玩"]
    vocab = {token: place for place, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *letters])}
    tokenizer = t.NllbTokenizer(vocab=vocab, merges=[])
    config = t.M2M100Config(
        **SEQ2SEQ, vocab_size=len(tokenizer), pad_token_id=1, eos_token_id=2, decoder_start_token_id=2
    )
    return t.M2M100ForConditionalGeneration(config), tokenizer


def _t5_tokenizer(folder: Path) -> Path:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = "abcdefghijklmnopqrstuvwxyz:?.,ET红色的圆和蓝方块两只狗在草地上玩"
    pieces += [(letter, -3.0) for letter in letters]
    t.T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder)
    return folder


def _t5_config(size: int) -> t.T5Config:
    return t.T5Config(
        vocab_size=size,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )


def _t5(folder: Path) -> tuple:
    tokenizer = t.AutoTokenizer.from_pretrained(str(_t5_tokenizer(folder)))
    return t.T5ForConditionalGeneration(_t5_config(len(tokenizer))), tokenizer


TINY: dict[str, Callable[[Path], tuple]] = {
    "blip-2 with opt": _blip_2_opt,
    "blip-2 with t5": _blip_2_t5,
    "blip": _blip,
    "marian": _marian,
    "m2m_100": _m2m_100,
    "nllb": _nllb,
    "t5": _t5,
}
