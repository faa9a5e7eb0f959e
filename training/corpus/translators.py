"""Models that translate English to Chinese: behind a server, or loaded by transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from eval.models import LOADING_ERRORS

from .answers import as_data
from .chat import ChatClient, Question, Reply, ServerSettings
from .journal import Journal
from .pinned import OPUS_EN_ZH, model_identity, revision_of
from .scorer import DType, worker_device

# How each family is told that the text is English, and that the output is to be simplified Chinese.
_LANGUAGES = {
    "m2m_100": ("en", "zh"),
    "nllb": ("eng_Latn", "zho_Hans"),
    "mbart": ("en_XX", "zh_CN"),
}
_PREFIXES = {OPUS_EN_ZH: ">>cmn_Hans<< "}  # its card: a target language id must stand in front


@dataclass(frozen=True)
class TranslationModel:
    """A sequence-to-sequence model of transformers: Marian (OPUS-MT), M2M-100, NLLB, mBART-50, T5."""

    model: str = OPUS_EN_ZH
    revision: str | None = None
    """The commit on the Hub; of the default, the one in pinned.py."""
    prefix: str | None = None
    """In front of each text, e.g. "translate English to Chinese: " for a T5; what the default needs, if left out."""
    languages: tuple[str, ...] | None = None
    """The codes of English and of simplified Chinese in the model's tokenizer, where they cannot be told from its kind
    (NLLB: eng_Latn, zho_Hans; M2M-100: en, zh; mBART-50: en_XX, zh_CN)."""
    dtype: DType = "float32"
    batch_size: int = 32
    beams: int = 4
    max_new_tokens: int = 200
    device: str = "auto"

    def __post_init__(self) -> None:
        if min(self.batch_size, self.beams, self.max_new_tokens) < 1:
            raise ValueError("batch_size, beams and max_new_tokens are at least 1.")
        if self.languages is not None and len(self.languages) != 2:
            raise ValueError(f"languages is {list(self.languages)}; expected two codes, of English and of Chinese.")

    def identity(self) -> dict[str, Any]:
        """What decides the translations; the batch size does, by rounding, where two beams are close."""
        names = ("prefix", "languages", "dtype", "batch_size", "beams", "max_new_tokens")
        return {**model_identity(self), **{name: getattr(self, name) for name in names}}


class ServerTranslator:
    """Asks an OpenAI-compatible server, with the answers of one task in a journal."""

    def __init__(self, settings: ServerSettings, seed: int, prompt: str, answers: Path):
        self._client, self._prompt, self._answers = ChatClient(settings, seed), prompt, answers

    def __call__(self, texts: Sequence[str], ids: Sequence[str]) -> list[Reply]:
        """The answer for each text, or the reason why there is none; `ids` name them in the journal.

        Raises:
            ServerError: when the server is away.
        """
        questions = [Question(id, self._filled(text)) for text, id in zip(texts, ids, strict=True)]
        with Journal(self._answers) as journal:
            return self._client.ask(questions, journal, Question("probe", self._filled("A red circle.")))

    def _filled(self, text: str) -> str:
        return self._prompt.replace("{text}", as_data(text))


class TransformersTranslator:
    """Runs a translation model in this process."""

    def __init__(self, settings: TranslationModel):
        self.settings = settings

    def __call__(self, texts: Sequence[str], ids: Sequence[str]) -> list[Reply]:
        """The translation of each text; "cut_short" where it does not end in `max_new_tokens`.

        Raises:
            ValueError: for a model that cannot be loaded, or is not told the languages.
        """
        # Texts of about the same length together, so that little padding is computed.
        order = sorted(range(len(texts)), key=lambda place: (len(texts[place]), texts[place]))
        replies: list[Reply | None] = [None] * len(texts)
        for start in range(0, len(order), self.settings.batch_size):
            batch = order[start : start + self.settings.batch_size]
            for place, reply in zip(batch, self._batch([texts[place] for place in batch]), strict=True):
                replies[place] = reply
        return replies  # type: ignore[return-value]  # each place was filled

    @torch.inference_mode()
    def _batch(self, texts: list[str]) -> list[Reply]:
        settings = self.settings
        loaded = _loaded(settings, worker_device(settings.device))
        inputs = loaded.tokenizer([loaded.prefix + text for text in texts], padding=True, return_tensors="pt")
        limit = loaded.longest
        too_long = inputs["attention_mask"].sum(1) > limit if limit else torch.zeros(len(texts), dtype=torch.bool)
        inputs = {name: value[:, :limit].to(loaded.model.device) for name, value in inputs.items()}
        options = {"num_beams": settings.beams, "max_new_tokens": settings.max_new_tokens, "do_sample": False}
        if loaded.target is not None:
            options["forced_bos_token_id"] = loaded.target
        ids = loaded.model.generate(**inputs, **options)
        ends = torch.tensor(loaded.model.generation_config.eos_token_id, device=ids.device)
        # Some models begin with the end, and some are made to end at the last place, whatever they had to say.
        ended = torch.isin(ids[:, 1 : settings.max_new_tokens], ends).any(1).tolist()
        # The language is a token of the output, which not every tokenizer calls special.
        own = ids if loaded.target is None else ids[:, 2:]
        written = loaded.tokenizer.batch_decode(own, skip_special_tokens=True)
        return [
            Reply(text.strip(), "source_too_long" if long else None if end else "cut_short")
            for text, end, long in zip(written, ended, too_long.tolist(), strict=True)
        ]


@dataclass(frozen=True)
class _Loaded:
    model: Any
    tokenizer: Any
    prefix: str
    target: int | None
    """The first token of the output, where the model is told its language by it."""
    longest: int | None
    """Tokens that the encoder has positions for."""


@cache
def _loaded(settings: TranslationModel, device: str) -> _Loaded:
    """Once per process. Raises ValueError for a model that cannot be loaded, or that is not told the languages."""
    name, options = settings.model, {"revision": revision_of(settings)}
    try:
        config = AutoConfig.from_pretrained(name, **options)
        model, report = AutoModelForSeq2SeqLM.from_pretrained(
            name, config=config, dtype=getattr(torch, settings.dtype), output_loading_info=True, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except LOADING_ERRORS as error:
        raise ValueError(
            f"{name} is no translation model that can be loaded: {type(error).__name__}: {error}"
        ) from error
    if report["missing_keys"]:
        raise ValueError(f"{name} lacks weights, e.g. {sorted(report['missing_keys'])[0]}: it would write at random.")
    target = _set_languages(settings, config, tokenizer)
    prefix = settings.prefix if settings.prefix is not None else _PREFIXES.get(name, "")
    longest = getattr(config, "max_position_embeddings", None)
    return _Loaded(model.to(device).eval(), tokenizer, prefix, target, longest)


def _set_languages(settings: TranslationModel, config: Any, tokenizer: Any) -> int | None:
    """Tells the tokenizer the languages; returns the token that the output begins with, if the model has such."""
    if not hasattr(tokenizer, "src_lang"):
        return None
    kind = "nllb" if "nllb" in type(tokenizer).__name__.lower() else config.model_type
    if (codes := settings.languages or _LANGUAGES.get(kind)) is None:
        raise ValueError(f"{settings.model} is a {config.model_type!r} of many languages; name them in `languages`.")
    try:
        tokenizer.src_lang, tokenizer.tgt_lang = codes
        own = tokenizer.get_lang_id if hasattr(tokenizer, "get_lang_id") else tokenizer.convert_tokens_to_ids
        target = own(codes[1])
    except KeyError:
        target = None
    if target is None or target == tokenizer.unk_token_id:
        raise ValueError(f"{settings.model} does not know the languages {codes[0]!r} and {codes[1]!r}.")
    return target
