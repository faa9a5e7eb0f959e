#!/usr/bin/env bash
# The recipe of docs/training.md, "A recipe on real photos": nano on photos with captions in both languages, and its
# scores on images it never saw, written to benchmarks/nano_on_photos.json.
#
#   bash benchmarks/nano_on_photos.sh TRAIN.parquet VALIDATION.parquet
set -euo pipefail
PYTHON=${PYTHON:-python}
OUT=${OUT:-runs/photos}
"$PYTHON" -m training.pretrain nano --output-dir "$OUT" --data.files "$1" --data.captions en caption_en zh caption_zh \
  --vocab-size 4000 --data.augment crop --data.flip --data.neighbours 1 --steps 1500 --log-every 50
"$PYTHON" -m eval run --model "$OUT/model" --retrieval "$2" --captions en=caption_en zh=caption_zh --output "$OUT/evaluation"
cp "$OUT/evaluation/results.json" benchmarks/nano_on_photos.json
