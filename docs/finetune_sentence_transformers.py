"""Fine-tunes a model folder on image-caption pairs with the sentence-transformers trainer, on one GPU or CPU.

    python docs/finetune_sentence_transformers.py MODEL OUT --data photos.parquet --captions caption_en caption_zh

Copy it: it needs installed packages only (the model package, sentence-transformers, accelerate, datasets).
docs/finetuning.md says how to choose the settings, and what came out on real photos.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from typing import Any

import torch
from datasets import Dataset, Image
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)

import modeling_m2encoder  # noqa: F401  registers the classes, so that no trust_remote_code is needed
from modeling_m2encoder.hub_folder import complete_or_absent, write_hub_extras

# The parameters of one side, by what their names contain. The shared upper layers belong to neither.
OWN_NAMES = {"text": ("text",), "image": ("vision", "image_projection")}


def captions_of(value: str | list[str] | None) -> list[str]:
    """A cell with one caption or a list of captions, without the blank ones."""
    return [text for text in ([value] if isinstance(value, str) else value or []) if text and text.strip()]


def load_pairs(files: list[str], image_column: str, columns: list[str]) -> Dataset:
    """One row per image. Whenever a row is read, one of its captions is drawn anew: first the column, then the caption.

    So an image never meets itself in a batch, which would be a false negative, and an epoch costs one pass over the
    images however many captions they have.
    """
    dataset = Dataset.from_parquet(files, columns=[image_column, *columns]).cast_column(image_column, Image())
    usable = dataset.filter(lambda *cells: any(map(captions_of, cells)), input_columns=columns)
    if len(usable) < len(dataset):
        print(f"{len(dataset) - len(usable)} of {len(dataset)} images have no caption and are left out.")

    def draw(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = []
        for cells in zip(*(rows[column] for column in columns), strict=True):
            texts.append(random.choice(random.choice([found for cell in cells if (found := captions_of(cell))])))
        return {"image": rows[image_column], "text": texts}

    return usable.with_transform(draw)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder or Hub id that AutoModel.from_pretrained loads")
    parser.add_argument("output", help="the new folder; must not exist")
    parser.add_argument("--data", nargs="+", required=True, help="parquet files")
    parser.add_argument("--image-column", default="image")
    parser.add_argument("--captions", nargs="+", default=["caption_en", "caption_zh"], help="columns, in equal shares")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=-1, help="instead of --epochs")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--mini-batch-size", type=int, help="what fits in memory at once, where --batch-size does not")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--train", choices=["both", "text", "image"], default="both", help="the side that may change")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    # fp32 weights whatever the folder holds: updates of 1e-5 vanish in bf16.
    settings = {"processor_kwargs": {"backend": "pil"}, "model_kwargs": {"dtype": torch.float32}}
    model = SentenceTransformer(options.model, **settings)
    encoder = model[0].model
    if options.train != "both":
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad = any(own in name for own in OWN_NAMES[options.train])

    # The model's own loss: both directions, and its learned temperature, which stays where it is.
    loss_settings: dict[str, Any] = {
        "scale": encoder.logit_scale.exp().item(),
        "directions": ("query_to_doc", "doc_to_query"),
        "partition_mode": "per_direction",
    }
    if options.mini_batch_size:
        loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=options.mini_batch_size, **loss_settings)
    else:
        loss = MultipleNegativesRankingLoss(model, **loss_settings)

    with complete_or_absent(options.output) as folder, tempfile.TemporaryDirectory() as scratch:
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                output_dir=scratch,
                num_train_epochs=options.epochs,
                max_steps=options.steps,
                per_device_train_batch_size=options.batch_size,
                dataloader_drop_last=True,
                learning_rate=options.learning_rate,
                warmup_steps=0.1,
                lr_scheduler_type="cosine",
                weight_decay=0.05,
                bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
                seed=options.seed,
                logging_steps=10,
                save_strategy="no",
                report_to=[],
            ),
            train_dataset=load_pairs(options.data, options.image_column, options.captions),
            loss=loss,
        )
        trainer.train()
        # The card that sentence-transformers would write copies three of the training images into the folder.
        model.save_pretrained(str(folder), create_model_card=False)
        write_hub_extras(folder)


if __name__ == "__main__":
    main()
