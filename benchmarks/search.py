"""Vector search at scale: recall, speed and bytes of the indexes that docs/search.md offers, against exact search.

    python -m benchmarks.search --model MODEL --scenes SCENES --photos 'photos/*.parquet' --captions photos/val.parquet

Three collections: scenes (what a quickstart model knows), photos, and made-up vectors of the 0.4B and 1B models' width.
For the first two each caption of 1,000 is a query, in English and in Chinese. Recall@10 is the share of the ten best by
exact search (fp32, inner product of vectors of length 1) that an index finds among its ten. One thread; times are CPU
seconds, which other work on the machine changes little. Writes benchmarks/search.json. usearch is compared where it is
installed; it is no dependency.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np

K = 10
# name -> (faiss.index_factory's words, parameters)
INDEXES = {
    "float32, exact": ("Flat", {}),
    "float32, HNSW, ef 16": ("HNSW32", {"efSearch": 16}),
    "float32, HNSW, ef 128": ("HNSW32", {"efSearch": 128}),
    "int8": ("SQ8", {}),
    "int8, HNSW, ef 128": ("HNSW32_SQ8", {"efSearch": 128}),
    "binary": ("RaBitQ", {}),
    "binary, 4x rescored with int8": ("RaBitQ,Refine(SQ8)", {"k_factor_rf": 4}),
    "binary, 10x rescored with int8": ("RaBitQ,Refine(SQ8)", {"k_factor_rf": 10}),
    "binary, 40x rescored with int8": ("RaBitQ,Refine(SQ8)", {"k_factor_rf": 40}),
}
LARGEST_FOR_USEARCH = 100_000  # its graph takes several times as long to build
Search = Callable[[np.ndarray], np.ndarray]


def faiss_index(vectors: np.ndarray, words: str) -> tuple[Any, float, float]:
    """An index of vectors [N, d], the CPU seconds it took, and its bytes per vector on disk."""
    started = time.process_time()
    index = faiss.index_factory(vectors.shape[1], words, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    seconds = time.process_time() - started
    return index, seconds, faiss.serialize_index(index).nbytes / len(vectors)


def sign_bits(vectors: np.ndarray, times: int) -> tuple[Search, float]:
    """One bit per number, its sign, compared by Hamming distance; `times` K candidates are rescored in fp32."""
    index = faiss.IndexBinaryFlat(vectors.shape[1])
    index.add(np.packbits(vectors > 0, axis=1))

    def search(queries: np.ndarray) -> np.ndarray:
        candidates = index.search(np.packbits(queries > 0, axis=1), K * times)[1]
        scores = np.stack([vectors[found] @ query for found, query in zip(candidates, queries, strict=True)])
        return np.take_along_axis(candidates, np.argsort(-scores, axis=1)[:, :K], axis=1)

    return search, vectors.shape[1] / 8


def usearch_index(vectors: np.ndarray, dtype: str) -> tuple[Any, float, float]:
    from usearch.index import Index

    started = time.process_time()
    index = Index(ndim=vectors.shape[1], metric="ip", dtype=dtype)
    index.add(np.arange(len(vectors)), vectors, threads=1)
    return index, time.process_time() - started, index.serialized_length / len(vectors)


def measure(search: Search, queries: dict[str, np.ndarray], exact: dict[str, np.ndarray]) -> dict[str, Any]:
    """Recall per language, and queries per CPU second over all, the best of three passes."""
    found = {language: search(rows) for language, rows in queries.items()}  # warms up
    seconds = []
    for _ in range(3):
        started = time.process_time()
        for rows in queries.values():
            search(rows)
        seconds.append(time.process_time() - started)
    recall = {
        language: float(np.mean([len(set(a) & set(b)) / K for a, b in zip(ids, exact[language], strict=True)]))
        for language, ids in found.items()
    }
    return {
        "recall_at_10": {language: round(value, 4) for language, value in recall.items()},
        "queries_per_second": round(sum(map(len, queries.values())) / min(seconds)),
    }


def compare(name: str, vectors: np.ndarray, queries: dict[str, np.ndarray]) -> dict[str, Any]:
    """All indexes over one collection: vectors [N, d] and queries [Q, d] per language, of length 1."""
    results: dict[str, Any] = {}

    def note(title: str, measured: dict[str, Any], size: float, seconds: float | None = None) -> None:
        results[title] = measured | {"bytes_per_vector": round(size)}
        if seconds is not None:
            results[title]["build_seconds"] = round(seconds, 1)
        print(name, title, results[title], flush=True)

    flat, *_ = faiss_index(vectors, "Flat")
    exact = {language: flat.search(rows, K)[1] for language, rows in queries.items()}
    built: dict[str, Any] = {}
    for title, (words, parameters) in INDEXES.items():
        if words not in built:
            built = {words: faiss_index(vectors, words)}  # one at a time: the last one goes
        index, seconds, size = built[words]
        for parameter, value in parameters.items():
            faiss.ParameterSpace().set_index_parameter(index, parameter, value)
        note(title, measure(lambda rows, index=index: index.search(rows, K)[1], queries, exact), size, seconds)
    for times in (1, 10):
        search, size = sign_bits(vectors, times)
        note(f"signs, {times}x rescored with float32", measure(search, queries, exact), size)
    try:
        for dtype in ("f32", "i8") if len(vectors) <= LARGEST_FOR_USEARCH else ():
            index, seconds, size = usearch_index(vectors, dtype)
            found = measure(lambda rows, index=index: index.search(rows, K, threads=1).keys, queries, exact)
            note(f"usearch {dtype}, HNSW", found, size, seconds)
    except ImportError:
        print("usearch is not installed: not compared")
    return {"vectors": len(vectors), "dimensions": vectors.shape[1], "indexes": results}


def markdown(result: dict[str, Any]) -> str:
    """The table of docs/search.md: a row per index; recalls in percent, collections beside each other."""
    collections = result["collections"]
    heads = [_head(name, each) for name, each in collections.items()]
    lines = ["| index | bytes per vector | " + " | ".join(heads) + " | queries per second |"]
    lines.append("|---" * (len(heads) + 3) + "|")
    for title in next(iter(collections.values()))["indexes"]:
        rows = [each["indexes"].get(title) for each in collections.values()]
        measured = [row for row in rows if row]
        sizes = dict.fromkeys(f"{row['bytes_per_vector']:,}" for row in measured)
        recalls = [
            " / ".join(f"{100 * share:.1f}" for share in row["recall_at_10"].values()) if row else "" for row in rows
        ]
        speeds = " / ".join(f"{float(format(row['queries_per_second'], '.2g')):,.0f}" for row in measured)
        lines.append(f"| {title} | {' / '.join(sizes)} | {' | '.join(recalls)} | {speeds} |")
    return "\n".join(lines)


def _head(name: str, collection: dict[str, Any]) -> str:
    (exact, *_) = collection["indexes"].values()
    languages = list(exact["recall_at_10"])
    head = f"{collection['vectors']:,} {name}, {collection['dimensions']}-d"
    return f"{head}: {' / '.join(languages)}" if len(languages) > 1 else head


# ---- Collections ---------------------------------------------------------------------------------------------------


def embedded(model: Any, files: list[str] | str, captions: str, columns: dict[str, str], count: int) -> tuple[Any, Any]:
    """The images of parquet files, and the first captions of `count` rows of `captions` per language."""
    from datasets import load_dataset

    images = load_dataset("parquet", data_files=files, columns=["image"], split="train")
    vectors = np.concatenate([model.encode(batch["image"]) for batch in images.iter(256)])
    rows = load_dataset("parquet", data_files=captions, columns=list(columns.values()), split="train")[:count]
    first = {
        language: [t if isinstance(t, str) else t[0] for t in rows[column]] for language, column in columns.items()
    }
    return vectors, {language: model.encode(texts) for language, texts in first.items()}


def made_up(count: int, dimensions: int, queries: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Vectors as towers give them: clusters, few directions that matter (their spread falls as 1 / sqrt(rank)), and
    queries that lie off the vectors' cone, as texts lie off the images'."""
    generator = np.random.default_rng(seed)
    spread = np.arange(1, dimensions + 1, dtype=np.float32) ** -0.5
    turn, _ = np.linalg.qr(generator.standard_normal((dimensions, dimensions), dtype=np.float32))
    centres = generator.standard_normal((max(count // 50, 1), dimensions), dtype=np.float32) * spread
    cone = generator.standard_normal((2, dimensions), dtype=np.float32) * spread  # of images, of texts

    def draw(number: int, side: int, noise: float) -> np.ndarray:
        drawn = generator.standard_normal((number, dimensions), dtype=np.float32) * spread * noise
        drawn += centres[generator.integers(len(centres), size=number)] + cone[side]
        drawn = drawn @ turn
        return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)

    return draw(count, 0, 0.7), draw(queries, 1, 0.7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hub folder; without it only made-up vectors are measured")
    parser.add_argument("--scenes", help="a folder of training.scenes")
    parser.add_argument("--photos", nargs="+", help="parquet files")
    parser.add_argument("--captions", help="a parquet file with caption_en and caption_zh for the photos' queries")
    parser.add_argument("--made-up", type=int, default=200_000, help="vectors")
    parser.add_argument("--dimensions", type=int, default=768, help="of made-up vectors")
    parser.add_argument("--queries", type=int, default=1_000)
    parser.add_argument("--output", default=str(Path(__file__).with_suffix(".json")))
    args = parser.parse_args()

    faiss.omp_set_num_threads(1)
    collections: dict[str, Any] = {}
    if args.model:
        from sentence_transformers import SentenceTransformer

        import modeling_m2encoder  # noqa: F401  registers the classes

        model = SentenceTransformer(args.model, device="cpu", processor_kwargs={"backend": "pil"})
        sources = {}
        if args.scenes:
            captions = {"en": "captions_en", "zh": "captions_zh"}
            files = str(Path(args.scenes, "train-*.parquet")), str(Path(args.scenes, "validation-*.parquet"))
            sources["scenes"] = (*files, captions)
        if args.photos:
            sources["photos"] = (args.photos, args.captions, {"en": "caption_en", "zh": "caption_zh"})
        for name, source in sources.items():
            collections[name] = compare(name, *embedded(model, *source, args.queries))
    if args.made_up:
        vectors, queries = made_up(args.made_up, args.dimensions, args.queries)
        collections["made up"] = compare("made up", vectors, {"vectors": queries})
    versions = {"faiss": faiss.__version__, "numpy": np.__version__, "python": platform.python_version()}
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads": 1}
    result = {"versions": versions, "machine": machine, "queries": args.queries, "collections": collections}
    Path(args.output).write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(markdown(result))


if __name__ == "__main__":
    main()
