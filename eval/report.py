"""Scores to what people and the Hub read.

OUTPUT/results.json                            everything, fractions in [0, 1]
OUTPUT/results.md                              the tables
OUTPUT/plots/BENCHMARK.png, overview.png       one plot per benchmark, and one like the paper's Figure 1
OUTPUT/hub/MODEL/model-index.yaml              for the front matter of the model's README.md
OUTPUT/hub/MODEL/.eval_results/TASK.yaml       for the model's repository: tasks whose data set is on the Hub
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .files import slug, write_json, write_text
from .run import collect
from .systems import systems
from .tables import markdown
from .tasks import Task, load_task, select_tasks, task_names

TASK_TYPES = {
    "retrieval": ("image-text-retrieval", "Image-text retrieval"),
    "fine-grained": ("image-text-retrieval", "Fine-grained image-text retrieval"),
    "classification": ("zero-shot-image-classification", "Zero-shot image classification"),
    "scenes": ("image-text-retrieval", "Image-text retrieval and multiple choice on drawn scenes"),
}
METRIC_TYPES = {"top-1": "accuracy", "top-5": "accuracy"}


def results(output: Path, tasks: Sequence[Task] = ()) -> dict[str, Any]:
    """All scores of an output folder, and what others published on the same tasks.

    Args:
        tasks: tasks that are not in eval/tasks; those that are need not be named.

    Raises:
        ValueError: for a folder without scores, or a damaged file.
    """
    document = collect(output)
    scored = [one["task"]["name"] for model in document["models"] for one in model["tasks"]]
    known = {task.name: task for task in tasks}
    known |= {name: load_task(name) for name in scored if name in task_names() and name not in known}
    published = [
        {"task": name, **_published(entry)}
        for name in dict.fromkeys(scored)
        if name in known
        for entry in known[name].published
    ]
    created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"created": created, **document, "published": published, "systems": _others(document)}


def write_results(output: Path, document: Mapping[str, Any]) -> None:
    """results.json and results.md.

    Raises:
        ValueError: for a folder that cannot be written.
    """
    write_json(output / "results.json", document)
    write_text(output / "results.md", markdown(document))


def write_report(output: Path) -> list[Path]:
    """Everything in the list above; returns the files.

    Raises:
        ValueError: for a folder without scores, or one that cannot be written.
    """
    from .plots import benchmark_plots, overview_plot

    document = results(output)
    write_results(output, document)
    written = [output / "results.json", output / "results.md"]
    written += benchmark_plots(document, output / "plots")
    written += overview_plot(document, output / "plots" / "overview.png")
    for model in document["models"]:
        folder = output / "hub" / slug(model["name"])
        write_text(folder / "model-index.yaml", _yaml({"model-index": model_index(model)}))
        written.append(folder / "model-index.yaml")
        for task, entries in eval_results(model).items():
            path = folder / ".eval_results" / f"{task}.yaml"
            write_text(path, _yaml(entries))
            written.append(path)
    return written


def model_index(model: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The `model-index` of a model card, from one model of results.json: values in percent with their interval.

    The Hub knows a data set and its metrics, but no benchmarks within a data set: their names go before the metrics'.
    """
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    entries = []
    for task in model["tasks"]:
        about = task["task"]
        task_type, task_name = TASK_TYPES[about["kind"]]
        for benchmark in task["benchmarks"]:
            within = "" if benchmark["name"] == about["name"] else f"{benchmark['name']} "
            for metric, scores in benchmark["metrics"].items():
                for language, score in scores.items():
                    entries.append(
                        EvalResult(
                            task_type=task_type,
                            task_name=task_name,
                            dataset_type=about["data"] or about["name"],
                            dataset_name=f"{about['title']} ({language})",
                            dataset_config=language,
                            dataset_split=about["split"],
                            dataset_revision=task["revision"],
                            metric_type=METRIC_TYPES.get(metric, metric.partition("/")[0]),
                            metric_name=f"{within}{metric} ({language})",
                            metric_value=_points(score["value"]),
                            metric_args={"protocol": benchmark["protocol"], **_interval(score)},
                        )
                    )
    return eval_results_to_model_index(Path(model["name"]).name, entries)


def eval_results(model: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """task -> the entries of its `.eval_results` file. The Hub shows them only for data sets that it has."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    files: dict[str, list[EvalResultEntry]] = {}
    for task in model["tasks"]:
        if task["task"]["data"] is None:
            continue
        for benchmark in task["benchmarks"]:
            for metric, scores in benchmark["metrics"].items():
                for language, score in scores.items():
                    entry = EvalResultEntry(
                        dataset_id=task["task"]["data"],
                        task_id=f"{benchmark['name']}_{language}_{metric}".replace("/", "_").replace("@", "_at_"),
                        value=_points(score["value"]),
                        dataset_revision=task["revision"],
                        date=task["created"],
                        notes=_notes(benchmark, score, task),
                    )
                    files.setdefault(task["task"]["name"], []).append(entry)
    return {name: eval_result_entries_to_yaml(entries) for name, entries in files.items()}


def _others(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The systems of the comparison that were not run here: why, and all numbers of them that were published: those of
    every task, scored here or not, and those that belong to no task of ours."""
    ran = {model["name"] for model in document["models"]}
    of_tasks: dict[str, list[dict[str, Any]]] = {}
    for task in select_tasks(["all"]):
        for entry in task.published:
            what = f"{task.name}, {entry.language}: {entry.metric}"
            number = {"what": what, "value": entry.value, "source": entry.source, "note": entry.note}
            of_tasks.setdefault(entry.system, []).append({**number, "task": task.name})
    return [
        {
            "name": system.name,
            "languages": list(system.languages),
            "paper": system.where,
            "adapter": system.adapter,
            "loads": system.model or system.convert,
            "why": system.published_only or f"not run here ({system.adapter}: {system.model or system.convert})",
            "notes": list(system.notes),
            "other_weights": system.other_weights,
            "published": [
                *({**dataclasses.asdict(number), "note": None, "task": None} for number in system.published),
                *of_tasks.get(system.name, ()),
            ],
        }
        for system in systems().values()
        if system.name not in ran
    ]


def _published(entry: Any) -> dict[str, Any]:
    return {
        "system": entry.system,
        "language": entry.language,
        "metric": entry.metric,
        "value": round(entry.value / 100, 6),
        "source": entry.source,
        "note": entry.note,
    }


def _notes(benchmark: Mapping[str, Any], score: Mapping[str, float], task: Mapping[str, Any]) -> str:
    notes = [benchmark["protocol"]]
    if "low" in score:
        notes.append(f"95 % interval {_points(score['low'])} to {_points(score['high'])} (bootstrap over images)")
    notes.append(f"chance {100 * score['chance']:.3g}")
    if task.get("limit"):
        notes.append(f"only {task['limit']} rows")
    return "; ".join(notes)


def _interval(score: Mapping[str, float]) -> dict[str, Any]:
    if "low" not in score:
        return {}
    return {"interval": [_points(score["low"]), _points(score["high"])], "confidence": 0.95}


def _points(value: float) -> float:
    return round(100 * value, 2)


def _yaml(document: Any) -> str:
    return yaml.safe_dump(document, allow_unicode=True, sort_keys=False, width=120)
