"""Measuring bilingual image-text encoders: `python -m eval run --models A,B --tasks all --output OUT_DIR`."""
