"""Published checkpoints <-> the Hub format: `python -m conversion.convert CHECKPOINT OUT_DIR --sp-model sp.model`."""
