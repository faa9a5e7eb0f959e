"""Fine-tunes a BLIP-2 or BLIP model as the rewriter of the stage `rewrite`, from captions that people rewrote.

    python -m training.corpus.finetune_rewriter --pairs pairs.jsonl --output runs/rewriter --epochs 3

The paper trains its rewriter on captions of its annotators (section 2.2), which are not public, as the model is not;
what is here is the recipe. One JSON object a line:

    {"image": "1.jpg", "raw": "IMG_204 Rex at the beach!!", "rewritten": "Rex, a dog, on a beach.", "language": "en"}

`image` is a path relative to the file, or absolute. The model learns to write `rewritten` after the picture and the
prompt with `raw` in it: the loss is that of these tokens alone. As in BLIP-2's pre-training (arXiv 2301.12597, section
3) the language model and the vision tower stay as they are unless asked; what learns is the bridge between them.
AdamW with weight decay 0.05, peak learning rate 1e-5, linear warm-up and cosine decay are LAVIS' for captions
(caption_coco_ft.yaml). Afterwards the stage takes the folder:

    rewrite: {transformers: {model: runs/rewriter}, prompts: ...}    # those it was trained with, from prompts.yaml
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro
import yaml
from tqdm.auto import tqdm

from modeling_m2encoder.hub_folder import complete_or_absent

from ..images import UnusableImage, decode_image
from .pinned import BLIP_2
from .rewriters import BLIP_2_PROMPTS, Captioner, CaptionModel, load_captioner
from .scorer import worker_device

IGNORED = -100
"""The label of tokens that are no part of the loss."""
BRIDGE = ("query_tokens", "qformer", "language_projection")
WEIGHT_DECAY, WARM_UP = 0.05, 0.1  # the latter as a share of all steps


@dataclass(frozen=True)
class FinetuneSettings:
    """Fine-tunes a caption model as a rewriter, from pairs of raw and rewritten captions."""

    pairs: Path
    """JSON lines with `image`, `raw`, `rewritten`, `language`."""
    output: Path
    """The folder of the new model; it must not exist."""
    model: str = BLIP_2
    revision: str | None = None
    prompts: dict[str, str] = field(
        default_factory=lambda: {**BLIP_2_PROMPTS, "zh": "描述：{raw} 问题：图片里有什么？回答："}
    )
    """language -> what stands before the new caption, with {raw}."""
    train: Literal["bridge", "all"] = "bridge"
    """"bridge": Q-Former, queries and projection of a BLIP-2; "all": everything; a BLIP has no bridge."""
    epochs: int = 3
    batch_size: int = 16
    learning_rate: float = 1e-5
    held_out: float = 0.05
    """Share of the pairs that is not trained on; its loss is logged after each epoch."""
    max_tokens: int = 128
    """Of prompt and new caption; longer pairs are refused, not cut."""
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size, self.max_tokens) < 1 or self.learning_rate <= 0:
            raise ValueError("epochs, batch_size and max_tokens are at least 1, learning_rate more than 0.")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; a share from 0 to below 1.")
        for language, prompt in self.prompts.items():
            if "{raw}" not in prompt:
                raise ValueError(f"prompts.{language} has no {{raw}}, where the raw caption goes.")


class Pair(NamedTuple):
    """One line of the data."""

    image: Path
    prompt: str
    rewritten: str


def read_pairs(path: Path, prompts: dict[str, str]) -> list[Pair]:
    """The pairs of a file.

    Raises:
        ValueError: naming the line, for what is no pair, a language without a prompt, or an image that is not there.
    """
    pairs = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no readable file of pairs: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            image, raw, new, language = (str(entry[key]) for key in ("image", "raw", "rewritten", "language"))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: expected an object with image, raw, rewritten, language; {error!r}"
            ) from error
        if language not in prompts:
            raise ValueError(
                f"{path}, line {number}: no prompt for language {language!r}; there are {sorted(prompts)}."
            )
        if not new.strip():
            raise ValueError(f"{path}, line {number}: `rewritten` is empty.")
        place = path.parent / image
        if not place.is_file():
            raise ValueError(f"{path}, line {number}: there is no image {place}.")
        pairs.append(Pair(place, prompts[language].replace("{raw}", raw), new.strip()))
    if not pairs:
        raise ValueError(f"{path} holds no pairs.")
    return pairs


class Batches:
    """Pairs to what the model's `forward` takes. B pairs, L tokens of the longest; labels are IGNORED on the picture,
    the prompt and the padding."""

    def __init__(self, captioner: Captioner, max_tokens: int):
        self.captioner, self.max_tokens = captioner, max_tokens
        self.config, self.processor = captioner.model.config, captioner.processor
        self.kind = self.config.model_type
        self.encoder_decoder = self.kind == "blip-2" and not self.config.use_decoder_only_language_model

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
        """pixel_values [B, 3, height, width], input_ids, attention_mask and labels [B, L].

        Raises:
            ValueError: for an image that cannot be decoded, or a pair of more than `max_tokens`.
        """
        images = []
        for pair in pairs:
            try:
                images.append(decode_image(str(pair.image)))
            except UnusableImage as error:
                raise ValueError(f"{pair.image} cannot be used: {error}.") from error
        tokens = [self._tokens(pair) for pair in pairs]
        padding = self.processor.tokenizer.pad_token_id
        inputs, labels = _padded([ids for ids, _ in tokens], padding), _padded([own for _, own in tokens], IGNORED)
        mask = _padded([[1] * len(ids) for ids, _ in tokens], 0)
        pixels = self.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "input_ids": inputs, "attention_mask": mask, "labels": labels}

    def _tokens(self, pair: Pair) -> tuple[list[int], list[int]]:
        """The input and the labels of one pair, as the model will see and write it in the stage."""
        tokenizer = self.processor.tokenizer
        prompt = tokenizer(pair.prompt)["input_ids"]
        if self.kind == "blip-2":
            prompt = [self.config.image_token_id] * self.config.num_query_tokens + prompt
        if self.encoder_decoder:
            inputs, labels = prompt, tokenizer(pair.rewritten)["input_ids"]
        else:
            if self.kind == "blip":  # generates from [DEC] and the prompt without its end
                prompt = [self.config.text_config.bos_token_id, *prompt[1:-1]]
            # The blank is a part of the first word for tokenizers of bytes, and nothing for others.
            new = tokenizer(f" {pair.rewritten}", add_special_tokens=False)["input_ids"]
            new = [*new, self.captioner.end]
            inputs, labels = prompt + new, [IGNORED] * len(prompt) + new
        if max(len(inputs), len(labels)) > self.max_tokens:
            raise ValueError(
                f"The pair of {pair.image} has {max(len(inputs), len(labels))} tokens, more than max_tokens "
                f"({self.max_tokens})."
            )
        return inputs, labels


def finetune(settings: FinetuneSettings) -> Path:
    """Trains and saves the model with its processor, `prompts.yaml` and `log.jsonl` in `settings.output`.

    Raises:
        ValueError: for data that is none, a model that is no BLIP-2 or BLIP, a folder that exists, or a loss that is
            not finite.
    """
    pairs = read_pairs(settings.pairs, settings.prompts)
    if settings.output.exists():
        raise ValueError(f"{settings.output} exists already: choose another name or remove it first.")
    chosen = CaptionModel(settings.model, settings.revision, device=settings.device)
    loaded = load_captioner(chosen, worker_device(settings.device))
    model, processor = loaded.model, loaded.processor
    trained = _choose_trained(model, settings)
    torch.manual_seed(settings.seed)
    order = random.Random(settings.seed)
    order.shuffle(pairs)
    held_out = math.ceil(settings.held_out * len(pairs)) if len(pairs) > 1 else 0
    test, train = pairs[:held_out], pairs[held_out:]
    batches = Batches(loaded, settings.max_tokens)
    records = list(_epochs(model, trained, batches, train, test, order, settings))
    with complete_or_absent(settings.output) as folder:
        model.eval().save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        prompts = yaml.safe_dump({"prompts": settings.prompts}, allow_unicode=True, sort_keys=True)
        (folder / "prompts.yaml").write_text(prompts, encoding="utf-8")
    return settings.output


def _choose_trained(model: torch.nn.Module, settings: FinetuneSettings) -> list[torch.nn.Parameter]:
    """Lets the gradients of the trained parameters through, and no others."""
    kind = model.config.model_type
    if kind not in ("blip-2", "blip"):
        raise ValueError(f"{settings.model} is a {kind!r}; this fine-tunes BLIP-2 and BLIP models.")
    if kind == "blip" and settings.train == "bridge":
        raise ValueError(f"{settings.model} is a BLIP, which has no bridge: train all of it.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(settings.train == "all" or name.startswith(BRIDGE))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _epochs(
    model: torch.nn.Module,
    trained: list[torch.nn.Parameter],
    batches: Batches,
    train: list[Pair],
    test: list[Pair],
    order: random.Random,
    settings: FinetuneSettings,
) -> Iterator[dict[str, float]]:
    """Trains; one record per step (`step`, `loss`, `lr`) and per epoch (`epoch`, `held_out_loss`)."""
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=WEIGHT_DECAY)
    per_epoch = math.ceil(len(train) / settings.batch_size)
    total = settings.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step, total))
    step = 0
    with tqdm(total=total, desc="finetune", disable=None) as bar:
        for epoch in range(1, settings.epochs + 1):
            order.shuffle(train)
            model.train()
            for start in range(0, len(train), settings.batch_size):
                loss = _loss(model, batches(train[start : start + settings.batch_size]))
                if not loss.isfinite():
                    raise ValueError(f"The loss is {loss.item()} at step {step}: try a smaller learning rate.")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                lr = schedule.get_last_lr()[0]
                optimizer.step()
                schedule.step()
                step += 1
                bar.update()
                yield {"step": step, "loss": loss.item(), "lr": lr}
            if test:
                yield {"epoch": epoch, "held_out_loss": _held_out_loss(model, batches, test, settings.batch_size)}


def _loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    device = next(model.parameters()).device
    moved = {name: value.to(device) for name, value in batch.items()}
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
        return model(**moved).loss


@torch.no_grad()
def _held_out_loss(model: torch.nn.Module, batches: Batches, pairs: list[Pair], size: int) -> float:
    model.eval()
    chunks = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    return sum(_loss(model, batches(chunk)).item() * len(chunk) for chunk in chunks) / len(pairs)


def _schedule(step: int, total: int) -> float:
    """Of the peak learning rate: linear warm-up, then half a cosine to 0."""
    warm = max(1, round(WARM_UP * total))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def _padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def main(settings: FinetuneSettings) -> None:
    """Runs the command line; mistakes of the user end with their message."""
    try:
        print(finetune(settings))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main(tyro.cli(FinetuneSettings, prog="training.corpus.finetune_rewriter", description=__doc__))
