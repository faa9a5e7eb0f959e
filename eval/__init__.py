"""Measuring a bilingual image-text encoder: `python -m eval run --model DIR --scenes SCENES_DIR --output OUT_DIR`."""
