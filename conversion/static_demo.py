"""A Hub folder -> a web page that runs the model in the visitor's browser: files only, no server of ours.

    python -m conversion.static_demo MODEL_DIR SITE          # SITE holds all it needs, the model too
    python -m http.server --directory SITE

model_cards/static/ is the page; the two ONNX towers come from conversion.export, transformers.js and its WebAssembly
from npm, at the versions below (needs `npm`, which is asked for files only: no package's script runs). SITE is also a
Space of the Hub as it is (sdk: static).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from transformers import AutoModel

from modeling_m2encoder.hub_folder import complete_or_absent

from .export import export

PAGE = Path(__file__).parents[1] / "model_cards" / "static"
# Each npm package with what of it a browser loads. The version of onnxruntime-web is what transformers.js asks for.
LIBRARIES = {
    "@huggingface/transformers@4.3.1": ["dist/transformers.min.js"],
    "onnxruntime-web@1.31.0-dev.20260914-8d85527a0": [
        "dist/ort-wasm-simd-threaded.asyncify.mjs",
        "dist/ort-wasm-simd-threaded.asyncify.wasm",
    ],
}
# transformers.js' dtypes that the export writes, and how their files end.
DTYPES = {"fp32": "model.onnx", "q8": "model_quantized.onnx"}


def build_site(
    model_dir: str | Path, site: str | Path, *, dtype: str = "fp32", hub: str | None = None, name: str | None = None
) -> None:
    """Writes the page for the model in `model_dir` to the new folder `site`.

    Args:
        dtype: the weights that visitors load: "fp32" or "q8" (int8, a quarter of the bytes).
        hub: a model id of the Hub that has its `onnx/`: visitors load the weights from there, and `site` has none.
        name: what the page calls the model; the name of the folder, or the id, by default.

    Raises:
        ValueError: for an unknown dtype, a folder that holds no whole model of ours, an existing `site`, or when npm
            does not give the packages. Nothing is written then.
        ImportError: without the packages of the `export` extra.
    """
    model_dir = Path(model_dir)
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; there are {', '.join(DTYPES)}.")
    if not (model_dir / "config.json").is_file():
        raise ValueError(f"No Hub folder at {model_dir}: it has no config.json.")
    settings = {"name": name or hub or model_dir.resolve().name, "hub": hub, "dtype": dtype}
    settings["logit_scale"] = logit_scale(model_dir)
    with complete_or_absent(site) as folder:
        shutil.copytree(PAGE, folder)
        fetch_libraries(folder / "lib")
        if hub is None:
            export(model_dir, folder / "model")
            drop_other_dtypes(folder / "model" / "onnx", dtype)
        (folder / "site.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"Wrote {site}. To see it: python -m http.server --directory {site}")


def logit_scale(model_dir: Path) -> float:
    """What cosines are multiplied with before the softmax; it is in neither tower."""
    model, info = AutoModel.from_pretrained(model_dir, output_loading_info=True)
    if info["missing_keys"]:  # made up by transformers
        raise ValueError(
            f"{model_dir} does not hold both halves of a model, which the page needs: "
            f"{len(info['missing_keys'])} weights are missing."
        )
    return model.logit_scale.exp().item()


def drop_other_dtypes(onnx_dir: Path, dtype: str) -> None:
    for other, ending in DTYPES.items():
        if other != dtype:
            for path in [*onnx_dir.glob(f"*{ending}"), *onnx_dir.glob(f"*{ending}_data")]:
                path.unlink()


def fetch_libraries(lib: Path) -> None:
    """Downloads the packages with npm, which checks their hashes, and keeps what a browser loads."""
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError("npm is not installed; it fetches transformers.js (https://nodejs.org, or apt install npm).")
    lib.mkdir()
    with tempfile.TemporaryDirectory() as scratch:
        for package, files in LIBRARIES.items():
            command = [
                npm,
                "pack",
                package,
                "--json",
                "--prefer-offline",
                "--ignore-scripts",
                "--pack-destination",
                scratch,
            ]
            done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, encoding="utf-8")
            if done.returncode:
                raise ValueError(f"npm does not give {package}: {done.stderr.strip() or done.stdout.strip()}")
            with tarfile.open(Path(scratch, json.loads(done.stdout)[0]["filename"])) as archive:
                for name in files:
                    content = archive.extractfile(f"package/{name}")
                    (lib / Path(name).name).write_bytes(content.read())


def main(arguments: list[str] | None = None) -> None:
    """The command line; a mistake of the user is one line on stderr and exit status 1."""
    parser = argparse.ArgumentParser(
        prog="python -m conversion.static_demo", description="Write a web page that runs a model in the browser."
    )
    parser.add_argument("model_dir", metavar="MODEL_DIR", help="a Hub folder with both halves of the model")
    parser.add_argument("site", metavar="SITE", help="the new folder")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="the weights that visitors load (fp32)")
    parser.add_argument("--hub", metavar="ID", help="visitors load the model from the Hub; SITE then holds no weights")
    parser.add_argument("--name", help="what the page calls the model")
    args = parser.parse_args(arguments)
    try:
        build_site(args.model_dir, args.site, dtype=args.dtype, hub=args.hub, name=args.name)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
