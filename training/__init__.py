"""Pretraining: data, losses, optimizers, the loop and the tools around them. Run from a clone: docs/training.md."""
