"""The rules of `POST /api/validate-yaml`: what the Hub says of a README.md's metadata, as far as its documentation has
them (hub-docs, modelcard.md and datasetcard.md)."""

from __future__ import annotations

import re
from typing import Any

import yaml

FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
REPO_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual")
RELATIONS = ("adapter", "merge", "quantized", "finetune")
LICENSES = set(
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 afl-3.0 "
    "artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 "
    "cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 "
    "cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 "
    "cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 "
    "gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 "
    "postgresql ofl-1.1 ncsa unlicense zlib pddl llama3 gemma unknown other".split()
)
PIPELINE_TAGS = set(
    "text-classification token-classification table-question-answering question-answering zero-shot-classification "
    "translation summarization feature-extraction text-generation fill-mask sentence-similarity text-to-speech "
    "text-to-audio automatic-speech-recognition audio-to-audio audio-classification depth-estimation "
    "image-classification object-detection image-segmentation text-to-image image-to-text image-to-image "
    "unconditional-image-generation video-classification reinforcement-learning robotics tabular-classification "
    "tabular-regression text-ranking visual-question-answering document-question-answering "
    "zero-shot-image-classification graph-ml mask-generation zero-shot-object-detection image-feature-extraction "
    "image-text-to-text visual-document-retrieval any-to-any other".split()
)


def validate_card(content: str, repo_type: str = "model") -> dict[str, list[dict[str, str]]]:
    """`{"errors": [{"message"}], "warnings": [...]}`."""
    found = FRONT_MATTER.search(content)
    if not found:
        return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
    try:
        metadata = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return _errors([f"Invalid YAML: {error}"])
    if metadata is None:
        return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
    if not isinstance(metadata, dict):
        return _errors(["The metadata must be a mapping."])
    return _errors([*_common(metadata), *(_model(metadata) if repo_type == "model" else [])])


def _errors(messages: list[str]) -> dict[str, list[dict[str, str]]]:
    return {"errors": [{"message": message} for message in messages], "warnings": []}


def _common(metadata: dict[str, Any]) -> list[str]:
    errors = []
    for language in _listed(metadata.get("language")):
        if not isinstance(language, str) or not LANGUAGE.fullmatch(language):
            errors.append(f'"language" must be ISO 639 codes, not {language!r}')
    for license_ in _listed(metadata.get("license")):
        if license_ not in LICENSES:
            errors.append(f'"license" must be one of the known identifiers, not {license_!r}')
    if metadata.get("license") == "other" and not metadata.get("license_name"):
        errors.append('"license_name" is required when "license" is other')
    tags = metadata.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) and tag for tag in tags):
        errors.append('"tags" must be a list of strings')
    for key in ("license_link", "thumbnail"):
        if key in metadata and not isinstance(metadata[key], str):
            errors.append(f'"{key}" must be a string')
    return errors


def _model(metadata: dict[str, Any]) -> list[str]:
    errors = []
    if metadata.get("pipeline_tag", "other") not in PIPELINE_TAGS:
        errors.append(f'"pipeline_tag" is not a known task: {metadata["pipeline_tag"]!r}')
    if not isinstance(metadata.get("library_name", ""), str):
        errors.append('"library_name" must be a string')
    for key in ("base_model", "datasets"):
        for one in _listed(metadata.get(key)):
            if not isinstance(one, str) or not REPO_ID.fullmatch(one):
                errors.append(f'"{key}" must be ids of repositories, not {one!r}')
    if metadata.get("base_model_relation", "finetune") not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of {", ".join(RELATIONS)}')
    for i, example in enumerate(_listed(metadata.get("widget"))):
        if not isinstance(example, dict) or not ({"src", "text"} & set(example)):
            errors.append(f'"widget[{i}]" must have a src or a text')
    for metric in _listed(metadata.get("metrics")):
        if not isinstance(metric, str):
            errors.append(f'"metrics" must be strings, not {metric!r}')
    return errors + _model_index(metadata.get("model-index", []))


def _model_index(index: Any) -> list[str]:
    if not isinstance(index, list):
        return ['"model-index" must be a list']
    errors = []
    for m, model in enumerate(index):
        if not isinstance(model, dict) or not isinstance(model.get("name"), str) or "results" not in model:
            errors.append(f'"model-index[{m}]" needs a name and results')
            continue
        for r, result in enumerate(model["results"]):
            where = f"model-index[{m}].results[{r}]"
            for part, keys in (("task", ("type",)), ("dataset", ("type", "name"))):
                for key in keys:
                    if not isinstance(result.get(part, {}).get(key), str):
                        errors.append(f'"{where}.{part}.{key}" is required')
            for i, metric in enumerate(result.get("metrics") or [{}]):
                if not isinstance(metric.get("type"), str) or "value" not in metric:
                    errors.append(f'"{where}.metrics[{i}]" needs a type and a value')
    return errors


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
