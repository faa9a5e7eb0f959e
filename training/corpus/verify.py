"""`python -m training.corpus.verify FOLDER`: compares shards with their index; status 1 if any is damaged."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .manifest import verify


def main(arguments: list[str] | None = None) -> None:
    """Prints one line per shard that is wrong."""
    parser = argparse.ArgumentParser(prog="python -m training.corpus.verify", description=__doc__)
    parser.add_argument("folder", type=Path, help="the folder with index.json")
    try:
        folder = parser.parse_args(arguments).folder
        wrong = verify(folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for line in wrong:
        print(line)
    if wrong:
        sys.exit(1)
    print(f"{folder}: every shard is what the index says.")


if __name__ == "__main__":
    main()
