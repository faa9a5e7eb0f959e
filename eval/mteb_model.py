"""A model for MTEB (`pip install -e ".[mteb]"`): registered under a name, or given to `mteb.evaluate` as it is.

    python -m eval.mteb_model --model DIR --task XM3600T2IRetrieval --task Flickr30kT2IRetrieval --output runs/mteb

    model = mteb_model(load(DIR))                                     # in Python
    mteb.evaluate(model, mteb.get_tasks(tasks=["XM3600T2IRetrieval"]))

MTEB's `recall_at_k` is the share of all right answers that are found; what the image-text literature calls R@K (any
hit) is its `hit_rate_at_k`. MTEB's command line and `mteb.get_model` refuse every image model while torchvision is
missing, which ours does not need; giving `mteb.evaluate` the model itself does not.

Letters: n inputs, E embedding size.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch.nn import functional as F

from .embed import Encoder
from .files import write_text
from .models import Adapter, load

try:
    import mteb
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_implementations import MODEL_REGISTRY
    from mteb.models.model_meta import ModelMeta
except ImportError as error:
    raise ImportError('eval.mteb_model needs mteb: pip install -e ".[mteb]"') from error


class MtebModel(AbsEncoder):
    """An adapter as MTEB calls it. Embeddings are fp32, on the CPU, of length 1."""

    def __init__(self, adapter: Adapter):
        self.adapter = self.model = adapter  # MTEB looks for `model`

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The embeddings of a data loader's inputs, [n, E].

        Args:
            inputs: batches are dicts of lists: `text`, or `image` (PIL), or both, whose embeddings are then added, as
                MTEB's CLIP models do.

        Raises:
            ValueError: for inputs of neither kind.
        """
        columns = [name for name in ("text", "image") if name in inputs.dataset.features]
        if not columns:
            raise ValueError(f"{task_metadata.name} has neither text nor images: {list(inputs.dataset.features)}.")
        texts, parts = [], []
        for batch in inputs:
            if "text" in columns:
                texts += list(batch["text"])
            if "image" in columns:
                parts.append(F.normalize(self.adapter.encode_images(batch["image"]).float(), dim=-1).cpu())
        # All texts at once, so that each distinct one is encoded once and among others of its length.
        embeds = Encoder(self.adapter, kwargs.get("batch_size", 32)).texts(texts) if texts else torch.zeros(1)
        return F.normalize(embeds + torch.cat(parts), dim=-1) if parts else embeds


def mteb_model(adapter: Adapter, *, name: str | None = None, **about: Any) -> MtebModel:
    """A loaded model with what MTEB wants to know of it, for `mteb.evaluate(model, tasks)`.

    Args:
        name: ORGANISATION/MODEL, under which MTEB files the results; made from the adapter's if left out.
        about: further fields of MTEB's `ModelMeta`, e.g. `training_datasets={"MSCOCO"}` or `license="apache-2.0"`.
    """
    model = MtebModel(adapter)
    model.mteb_model_meta = _meta(adapter, name, about)
    return model


def register(
    name_or_path: str | Path, *, revision: str | None = None, name: str | None = None, **about: Any
) -> ModelMeta:
    """Enter a folder or Hub id into MTEB's registry: `mteb.get_model(name)` loads it (for torchvision see above).

    The model is loaded once to see its sizes. Arguments as for `mteb_model`.

    Raises:
        ValueError: for what `eval.models.load` cannot load, or a name that MTEB knows already.
    """

    def loader(model_name: str, device: str | None = None, **_: Any) -> MtebModel:
        return MtebModel(load(name_or_path, revision=revision, device=device))

    meta = _meta(load(name_or_path, revision=revision), name, {"loader": loader, **about})
    if meta.name in MODEL_REGISTRY:
        raise ValueError(f"MTEB knows a model called {meta.name} already: give another name.")
    MODEL_REGISTRY[meta.name] = meta
    return meta


def _meta(adapter: Adapter, name: str | None, about: dict[str, Any]) -> ModelMeta:
    seen = adapter.describe()
    label = str(seen["name"]).removeprefix("open_clip:")
    if label.count("/") != 1 or Path(label).exists():
        label = f"local/{Path(label).resolve().name}"
    size = {"float32": 4, "bfloat16": 2, "float16": 2}[seen["dtype"]]
    fields = {
        "loader": None,
        "name": name or label,
        # Where there is no commit, the content itself says which one it is.
        "revision": seen["revision"] or seen["fingerprint"][:16],
        "release_date": None,
        "languages": ["eng-Latn", "zho-Hans"],
        "n_parameters": seen["parameters"],
        "memory_usage_mb": seen["parameters"] * size / 2**20,
        "max_tokens": seen["max_text_length"],
        "embed_dim": adapter.encode_texts(["a"]).shape[-1],
        "license": None,
        "open_weights": True,
        "public_training_code": None,
        "public_training_data": None,
        "framework": ["PyTorch"],
        "similarity_fn_name": "cosine",
        "use_instructions": False,
        "training_datasets": None,
        "modalities": ["image", "text"],
    }
    return ModelMeta(**{**fields, **about})


@dataclass(frozen=True)
class Run:
    """Run MTEB tasks on a model: prints and writes each task's scores, OUTPUT/TASK.json."""

    model: str
    """A folder, a Hub id or open_clip:ARCHITECTURE/WEIGHTS."""
    task: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """A task of MTEB; may be repeated."""
    output: str
    name: str | None = None
    """ORGANISATION/MODEL for the results."""
    batch_size: int = 64

    def __call__(self) -> None:
        try:
            tasks = mteb.get_tasks(tasks=list(self.task))
        except KeyError as error:  # its message suggests names that are nearly the same
            raise ValueError(str(error.args[0])) from error
        run_tasks(mteb_model(load(self.model), name=self.name), tasks, self.output, batch_size=self.batch_size)


def run_tasks(model: MtebModel, tasks: Sequence[Any], output: str | Path, *, batch_size: int = 64) -> dict[str, float]:
    """Evaluate on MTEB tasks and write OUTPUT/TASK.json for each as soon as it is done. Returns the main scores.

    Raises:
        Whatever a task raises; the files of those before it stay.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    scores: dict[str, float] = {}
    for task in tasks:
        result = mteb.evaluate(model, task, cache=None, encode_kwargs={"batch_size": batch_size}, co2_tracker=False)
        (task_result,) = result.task_results
        document = {"model": model.adapter.describe(), **task_result.to_dict()}
        text = json.dumps(document, indent=1, ensure_ascii=False, default=str) + "\n"
        write_text(output / f"{task.metadata.name}.json", text)
        scores[task.metadata.name] = task_result.get_score()
        print(f"{task.metadata.name}: {scores[task.metadata.name]:.4f} ({task.metadata.main_score})")
    return scores


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; a user's mistakes end it with one line."""
    try:
        tyro.cli(Run, args=arguments, prog="python -m eval.mteb_model", description=__doc__)()
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
