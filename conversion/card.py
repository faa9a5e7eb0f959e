"""A model folder and what was measured of it -> README.md and `.eval_results` for the Hub.

python -m conversion.card runs/quickstart/nano/model --results runs/quickstart/evaluation/results.json
python -m conversion.card m2-encoder-0.4B --repo-id user/m2-encoder-0.4b --output README.md

The text is model_cards/template.md with a YAML file per size beside it. Every number is taken from a file: of the model
itself, of results.json, of eval/tasks/*.yaml. The same files give the same card, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.repocard_data import eval_results_to_model_index

from conversion.card_settings import (
    FOLDER,
    CardSettings,
    choose_card,
    load_settings,
    scenes_manifest,
    training_settings,
)
from conversion.card_sources import bm_6b_sources, of_these_weights, read_cosines, read_results
from conversion.card_tables import Section, cosine_tables, published_number, results_table, sections
from conversion.hub_contents import model_facts, read_config
from eval.files import write_text
from eval.report import METRIC_TYPES, TASK_TYPES, eval_results, model_index

PIPELINE_TAG = "zero-shot-image-classification"


@dataclass(frozen=True)
class Card:
    """What the Hub shows of a model."""

    readme: str
    """README.md, metadata and text."""
    eval_results: dict[str, str]
    """`.eval_results/TASK.yaml` -> its text."""
    example: Path | None
    """A picture that the page and its first snippet use."""
    why: str
    """Which card it is, and why."""


def render_card(
    folder: str | Path,
    repo_id: str,
    *,
    size: str = "auto",
    results: str | Path | None = None,
    cosines: str | Path | None = None,
) -> Card:
    """The card of a model folder.

    Args:
        repo_id: where it will be, as in the snippets: NAMESPACE/NAME.
        size: whose card: "nano", "0.4B", "1B", "10B", or "trained" for any other training; "auto" looks at the folder.
        results: the results.json of an evaluation of these very weights.
        cosines: the JSON of `python -m benchmarks.pair_cosines` on these very weights.

    Raises:
        ValueError: for a folder without a model, for settings or results that are damaged or incomplete, and for
            numbers that were measured with other weights.
    """
    folder = Path(folder)
    config = read_config(folder)
    name, why = choose_card(folder, config) if size == "auto" else (size, "it was asked for")
    settings = load_settings(name)
    document = read_results(results)
    model = of_these_weights(folder, document["models"], str(results)) if document else None
    found = sections(settings.name, settings.system, document, model)
    metadata = _metadata(settings, repo_id, model, found, bool(list(folder.glob("onnx/*.onnx"))))
    body = _body(settings, folder, repo_id, name, found, model, read_cosines(folder, cosines))
    files = _eval_result_files(settings, model, found)
    readme = f"---\n{metadata.to_yaml()}\n---\n\n{body}"
    ModelCard(readme)  # raises ValueError for metadata that the Hub's own library cannot read
    example = FOLDER / settings.example if settings.example else None
    return Card(readme, files, example, f"{name} ({why})")


# ---- Metadata


def _metadata(
    settings: CardSettings, repo_id: str, model: Mapping[str, Any] | None, found: Mapping[str, Section], onnx: bool
) -> ModelCardData:
    index = model_index({**model, "name": settings.name})[0]["results"] if model else []
    published = [
        EvalResult(
            task_type=TASK_TYPES[task.kind][0],
            task_name=TASK_TYPES[task.kind][1],
            dataset_type=task.data.id or task.name,
            dataset_name=f"{task.title} ({entry.language})",
            dataset_config=entry.language,
            dataset_split=task.data.split,
            metric_type=METRIC_TYPES.get(entry.metric, entry.metric),
            metric_name=f"{entry.metric} ({entry.language}), published, not measured here",
            metric_value=entry.value,
            metric_args={"protocol": task.protocol},
            source_name=entry.source,
            source_url=settings.paper["url"],
        )
        for task, entry in _published(settings, found)
    ]
    index = index + (eval_results_to_model_index(settings.name, published)[0]["results"] if published else [])
    tags = [*settings.tags, *(["onnx", "transformers.js"] if onnx else [])]
    return ModelCardData(
        language=["zh", "en"],
        library_name="transformers",
        pipeline_tag=PIPELINE_TAG,
        tags=tags,
        metrics=sorted({_metric(one["type"]) for result in index for one in result["metrics"]}) or None,
        **settings.metadata,
        **({"model-index": [{"name": settings.name, "results": index}]} if index else {}),
    )


def _metric(kind: str) -> str:
    return "recall" if "R@" in kind or "recall" in kind else kind


def _published(settings: CardSettings, found: Mapping[str, Section]) -> list[tuple[Any, Any]]:
    """(task, entry) of the numbers that were published for this model."""
    tasks = [section.task for section in found.values() if section.task]
    return [
        (task, one) for task in tasks for one in task.published if settings.system and one.system == settings.system
    ]


def _eval_result_files(
    settings: CardSettings, model: Mapping[str, Any] | None, found: Mapping[str, Section]
) -> dict[str, str]:
    """`.eval_results/*.yaml`: the measured ones of each data set on the Hub, and apart from them the published ones."""
    files = eval_results(model) if model else {}
    entries: dict[str, list[EvalResultEntry]] = {}
    for task, entry in _published(settings, found):
        if task.data.id:
            metric = entry.metric.replace("/", "_").replace("@", "_at_")
            entries.setdefault(f"{task.name}-published", []).append(
                EvalResultEntry(
                    dataset_id=task.data.id,
                    task_id=f"{task.name}_{entry.language}_{metric}",
                    value=entry.value,
                    dataset_revision=task.data.revision,
                    source_url=settings.paper["url"],
                    source_name=entry.source,
                    notes=f"{task.protocol}; published, not measured here",
                )
            )
    files = {**files, **{name: eval_result_entries_to_yaml(own) for name, own in entries.items()}}
    return {f".eval_results/{name}.yaml": _yaml(own) for name, own in files.items()}


def _yaml(document: Any) -> str:
    return yaml.safe_dump(document, allow_unicode=True, sort_keys=False, width=120)


# ---- Text


def _body(
    settings: CardSettings,
    folder: Path,
    repo_id: str,
    card: str,
    found: Mapping[str, Section],
    model: Mapping[str, Any] | None,
    cosines: Mapping[str, Any] | None,
) -> str:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters["python"] = lambda value: json.dumps(value, ensure_ascii=False)
    table, notes = results_table(settings.name, settings.system, found)
    spread, thresholds = cosine_tables(cosines) if cosines else ("", "")
    runs, data_notes = _training(folder)
    values = {
        "facts": model_facts(folder),
        "repo_id": repo_id,
        "published": published_number,
        "results_table": table,
        "results_notes": notes,
        "measured": model is not None,
        "cosines": cosines,
        "cosines_table": spread,
        "thresholds_table": thresholds,
        "cosines_counts": _counts(cosines) if cosines else "",
        "bm_6b_sources": bm_6b_sources() if settings.origin == "published" else [],
        "runs": runs,
        "data_notes": data_notes,
        "handler": (FOLDER / "handler.py").is_file(),
    }

    def fill(value: Any) -> Any:
        if isinstance(value, str):
            return environment.from_string(value).render(values).strip()
        return [fill(one) for one in value] if isinstance(value, list) else value

    own = {name: fill(value) for name, value in vars(settings).items()}
    own["reproduce"] = own["reproduce"] or _commands(settings, card, repo_id).strip()
    try:
        template = environment.from_string((FOLDER / "template.md").read_text(encoding="utf-8"))
        return re.sub(r"\n{3,}", "\n\n", template.render({**values, **own}).strip()) + "\n"
    except jinja2.TemplateError as error:
        raise ValueError(f"{FOLDER / 'template.md'} and {card}.yaml do not fit together: {error}.") from error


def _commands(settings: CardSettings, card: str, repo_id: str) -> str:
    if settings.origin == "published":
        return (
            f"python -m conversion.convert {settings.checkpoint} FOLDER --sp-model sp.model --size {card} --verify\n"
            "python -m conversion.export FOLDER               # onnx/\n"
            "python -m eval run --models M2=FOLDER --tasks all --output scores\n"
            f"python -m conversion.push FOLDER {repo_id} --results scores/results.json\n"
        )
    return (
        "python -m training.pretrain PRESET --output-dir RUN --data.files FILES   # the settings are above\n"
        "python -m eval run --models RUN/model --tasks all --output scores\n"
        f"python -m conversion.push RUN/model {repo_id} --results scores/results.json\n"
    )


def _training(folder: Path) -> tuple[list[str], list[str]]:
    """One line for each training that led to these weights, the first one first, and what is known of the data."""
    lines, notes, seen = [], [], set()
    while (run := training_settings(folder)) is not None and folder not in seen:
        seen.add(folder)
        lines.insert(0, _run_line(run))
        manifest = scenes_manifest(run)
        if manifest:
            notes = [_scenes_line(manifest)]
        if not run.get("init_from"):
            break
        folder = Path(run["init_from"])
    return lines, notes


def _run_line(run: Mapping[str, Any]) -> str:
    pairs, optimizer, objective = run["steps"] * run["batch_size"], run["optimizer"], run["objective"]
    masked = [f"{objective[key]:g} {key[:4].upper()}" for key in ("cmlm_weight", "cmim_weight") if objective.get(key)]
    begin = f"from the weights of `{_tail(run['init_from'])}`" if run.get("init_from") else "from random weights"
    # The last two parts of a path say what the data are; where they lay is nobody's business.
    files = ", ".join(f"`{_tail(pattern)}`" for pattern in run["data"].get("files", ()))
    return (
        f"{begin[0].upper()}{begin[1:]}: {run['steps']:,} steps of {run['batch_size']:,} pairs ({pairs:,} in all) of "
        f"{files}; {' + '.join(['ITC', *masked])}; {optimizer['name']}, learning rate {optimizer['lr']:g}, weight "
        f"decay {optimizer['weight_decay']:g}; seed {run['seed']}."
    )


def _scenes_line(manifest: Mapping[str, Any]) -> str:
    own = manifest["settings"]
    return (
        f"The scenes are drawn by `python -m training.scenes` (version {manifest['version']}, seed {own['seed']}): "
        f"{own['train']:,} pictures for training and {own['twins']:,} of a first lesson on relations, "
        f"{own['image_size']} pixels wide, with captions in Chinese and English. {len(manifest['held_out_pairs'])} "
        "pairs of colour and shape never occur in training; every test picture holds one. No photograph was used, and "
        "no text that anybody wrote."
    )


def _tail(path: str) -> str:
    return "/".join(Path(path).parts[-2:])


def _counts(cosines: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{language} {own['right_pairs']:,} right and {own['wrong_pairs']:,} wrong pairs"
        for language, own in cosines["languages"].items()
    )


# ---- Command line


def main(arguments: list[str] | None = None) -> None:
    """The command line; a mistake of the user is one line on stderr and exit status 1."""
    parser = argparse.ArgumentParser(
        prog="python -m conversion.card", description="Render the model card of a Hub folder, to look at it."
    )
    parser.add_argument("folder", metavar="FOLDER", help="a model folder, as training and conversion write it")
    add_card_options(parser)
    parser.add_argument("--repo-id", default="user/m2-encoder", metavar="ID", help="for the snippets")
    parser.add_argument("--output", metavar="FILE", help="write it there instead of to the terminal")
    args = parser.parse_args(arguments)
    try:
        card = render_card(args.folder, args.repo_id, size=args.size, results=args.results, cosines=args.cosines)
        if args.output is None:
            print(card.readme)
        else:
            write_text(Path(args.output), card.readme)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def add_card_options(parser: argparse.ArgumentParser) -> None:
    """What decides the text of a card."""
    parser.add_argument(
        "--size",
        choices=["auto", "nano", "0.4B", "1B", "10B", "trained"],
        default="auto",
        help="whose card it gets: of a published size (converted, not fine-tuned), of the quickstart's nano, or of any "
        "other training (default: look)",
    )
    parser.add_argument("--results", metavar="FILE", help="results.json of an evaluation of these weights")
    parser.add_argument("--cosines", metavar="FILE", help="what benchmarks.pair_cosines wrote for these weights")


if __name__ == "__main__":
    main()
