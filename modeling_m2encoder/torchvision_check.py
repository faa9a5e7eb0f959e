"""A torchvision that does not fit the installed torch breaks every import of transformers; this says what to do."""

from importlib.metadata import version
from importlib.util import find_spec

if find_spec("torchvision"):
    try:
        import torchvision  # noqa: F401
    # A torchvision built for another torch or for CUDA fails with whatever its binaries meet first.
    except Exception as error:
        raise ImportError(
            f"torchvision is installed, but cannot be imported with torch {version('torch')} "
            f"({type(error).__name__}: {error}). transformers imports it wherever it is installed, so nothing works. "
            "Remove it (`pip uninstall torchvision`; images are then processed with PIL), or install the build that "
            "belongs to this torch (https://pytorch.org/get-started/locally)."
        ) from error
