"""Search pictures by text in Chinese or English, with a faiss index on disk. Copy it: it needs installed packages only.

python docs/search.py MODEL IMAGES photos.index --query 海滩上的狗 --query "a dog on the beach"
IMAGES is a folder or a pattern of parquet files ("photos/*.parquet"). The index is made the first time.
"""

import argparse
from glob import escape
from pathlib import Path

import faiss
import numpy as np
from datasets import load_dataset
from sentence_transformers import SentenceTransformer

import modeling_m2encoder  # noqa: F401  registers the model, so that no trust_remote_code is needed

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model"), parser.add_argument("images"), parser.add_argument("index")
parser.add_argument("--query", action="append", required=True, help="in either language; may be repeated")
parser.add_argument("--kind", default="SQ8", help="Flat, SQ8, HNSW32 or 'RaBitQ,Refine(SQ8)': see docs/search.md")
args = parser.parse_args()
folder = {"path": "imagefolder", "data_dir": escape(args.images), "drop_labels": True}
files = {"path": "parquet", "data_files": args.images, "columns": ["image"]}
images = load_dataset(**folder if Path(args.images).is_dir() else files, split="train")  # or of the Hub, by its id
model = SentenceTransformer(args.model, processor_kwargs={"backend": "pil"})  # its embeddings have length 1
if not Path(args.index).exists():
    vectors = np.concatenate([model.encode(batch["image"]) for batch in images.iter(256)])
    index = faiss.index_factory(vectors.shape[1], args.kind, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors), index.add(vectors)
    faiss.write_index(index, args.index)
index = faiss.read_index(args.index)
if hasattr(index, "k_factor"):  # of Refine: ten times the answers are compared again, with 8 bits
    index.k_factor = 10
if index.ntotal != len(images):
    parser.error(f"{args.index} holds {index.ntotal} vectors for {len(images)} images: remove it to make it anew.")
for query, scores, rows in zip(args.query, *index.search(model.encode(args.query), min(5, len(images))), strict=True):
    names = [images[int(row)]["image"].filename or f"row {row}" for row in rows]
    print(query, *(f"{score:.3f} {name}" for score, name in zip(scores, names, strict=True)), sep="\n  ")
