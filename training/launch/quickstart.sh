#!/usr/bin/env bash
# The main job end to end, as `make quickstart` runs it: scenes -> nano -> from_pretrained -> scores and a picture.
# A part whose result is there already is not done again; an interrupted training starts over.
set -euo pipefail
PYTHON=${PYTHON:-python}
OUT=${OUT:-runs/quickstart}
started=$SECONDS

step() { printf '\n== %s (%d s)\n' "$1" $((SECONDS - started)); }

if [ ! -e "$OUT/scenes" ]; then
  step "Drawing scenes"
  "$PYTHON" -m training.scenes "$OUT/scenes"
fi

if [ ! -e "$OUT/tokenizer" ]; then
  step "Learning the tokenizer"
  "$PYTHON" -m training.tokenizer "$OUT/tokenizer" --data "$OUT/scenes" --vocab-size 2000
fi

# Relations first: among all the scenes at once they are never learned (docs/log.md).
if [ ! -e "$OUT/twins/model" ]; then
  step "Pretraining nano: twins that differ in a relation"
  rm -rf "$OUT/twins"
  "$PYTHON" -m training.pretrain nano --output-dir "$OUT/twins" --data.files "$OUT/scenes/twins-*.parquet" \
    --tokenizer "$OUT/tokenizer" --steps 700 --optimizer.min-lr-ratio 1
fi

if [ ! -e "$OUT/nano/model" ]; then
  step "Pretraining nano: all scenes"
  rm -rf "$OUT/nano"
  "$PYTHON" -m training.pretrain nano --output-dir "$OUT/nano" --data.files "$OUT/scenes/train-*.parquet" \
    --init-from "$OUT/twins/model" --steps 1300 --optimizer.lr 1.2e-3 --optimizer.warmup-steps 50
fi

step "Evaluating on scenes whose combinations of colour and shape were never seen"
"$PYTHON" -m eval run --model "$OUT/nano/model" --scenes "$OUT/scenes" --output "$OUT/evaluation"

step "Searching in two languages"
"$PYTHON" -m eval picture --model "$OUT/nano/model" --data "$OUT/scenes/test-*.parquet" --output "$OUT/search.png" \
  --query "a red circle to the left of a blue square" --query "红色的圆在蓝色方块的左边" \
  --query "three yellow stars" --query "三颗黄色的星星"

step "Zero-shot classification with the transformers pipeline"
"$PYTHON" docs/zero_shot.py "$OUT/nano/model" "$OUT/scenes"

step "Done. Model: $OUT/nano/model, scores: $OUT/evaluation, picture: $OUT/search.png"
