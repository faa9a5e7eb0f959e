"""A page to try an M2-Encoder: text-to-image search, zero-shot classification, and the two languages side by side.

    python app.py --model runs/quickstart/nano/model --data "runs/quickstart/scenes/test-*.parquet" --port 7860

On a Space the same settings come from its variables: MODEL, DATA, INDEX, EXAMPLES, PORT. Nothing is sent anywhere, and
the page asks no other server for anything.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Read when the libraries are imported.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr
import numpy as np
import page
from encoder import TEMPLATES, Encoder, open_image, split_labels
from gradio.utils import get_upload_folder
from PIL import Image
from search_index import Found, SearchIndex, load_or_build, open_images
from tqdm import tqdm

EXAMPLES = (
    "海滩上的一只狗|a dog on the beach;雪山|snowy mountains;一碗面条|a bowl of noodles;夜晚的城市|a city at night"
)
TOP, MOST = 12, 48
THUMBNAIL = 384  # longest side of the pictures on the page, in pixels
MAX_QUERY = 500  # characters

Picture = tuple[str, str]
"""A file of the gallery and its caption."""


class App:
    """What the buttons of the page do."""

    def __init__(self, encoder: Encoder, index: SearchIndex):
        self.encoder = encoder
        self.index = index
        # gradio's own copies of pictures can be read while another visitor's request still writes them.
        self._folder = tempfile.TemporaryDirectory(prefix="m2-encoder-")
        gr.set_static_paths([self._folder.name])

    def search(self, query: str, top: float = TOP) -> tuple[list[Picture], str]:
        """The pictures nearest to a query, best first."""
        if not query.strip():
            return [], page.problem("Type what you are looking for, in Chinese or in English.")
        found = self._find(query, top)
        return self._pictures(found), page.note(
            f"The {len(found)} nearest of {len(self.index.numbers):,} images to {page.in_its_language(query.strip())}, "
            f"with their cosine: from {found[0].cosine:.3f} to {found[-1].cosine:.3f}."
        )

    def classify(
        self, image: str | None, labels: str, english: str = TEMPLATES["en"], chinese: str = TEMPLATES["zh"]
    ) -> str:
        """Which label fits an image (the path of an uploaded file) best."""
        if image is None:
            return page.problem("Choose an image first.")
        try:
            scores = self.encoder.classify(image, split_labels(labels), {"en": english, "zh": chinese})
        except ValueError as error:
            return page.problem(str(error))
        return page.score_table(scores)

    def compare(self, chinese: str, english: str, top: float = TOP) -> tuple[list[Picture], list[Picture], str]:
        """The same question in two languages: both results, and what they have in common."""
        if not chinese.strip() or not english.strip():
            return [], [], page.problem("Type the query in both languages.")
        both = [self._find(query, top) for query in (chinese, english)]
        places = [{each.number: place for place, each in enumerate(found, start=1)} for found in both]
        common = places[0].keys() & places[1].keys()
        zh, en = self.encoder.texts([chinese, english])
        same_first = "the same" if both[0][0].number == both[1][0].number else "different"
        return (
            self._pictures(both[0], places[1], "en"),
            self._pictures(both[1], places[0], "zh"),
            page.note(
                f"<b>{len(common)} of {len(both[0])}</b> images are in both results, the first ones are {same_first}. "
                f"The cosine of the two queries is <b>{float(zh @ en):.3f}</b>."
            ),
        )

    def uploaded_file(self, upload: Any) -> str | None:
        """The path of an uploaded file, unopened: gradio would open it, whatever its size, and only say "Error".

        gradio checks the paths that a request marks as files, and no others; here a request can name only an upload, or
        an example.
        """
        if upload is None or not upload.path:
            return None
        file = Path(upload.path).resolve()
        if not any(file.is_relative_to(Path(folder).resolve()) for folder in (get_upload_folder(), self._folder.name)):
            raise gr.Error("This image was not uploaded here.")
        return str(file)

    def _find(self, query: str, top: float) -> list[Found]:
        return self.index.search(self.encoder.texts([query.strip()])[0], int(np.clip(top, 1, MOST)))

    def _pictures(self, found: Sequence[Found], other: dict[int, int] | None = None, tongue: str = "") -> list[Picture]:
        """With a caption of the cosine, the image's place in the `other` result where it is there, and its name."""
        pictures = []
        for each in found:
            place = f", {tongue} #{other[each.number]}" if other and each.number in other else ""
            caption = f"{each.cosine:.3f}{place}\n{self.index.images.label(each.number)}"
            pictures.append((self._thumbnail(each.number), caption))
        return pictures

    def _thumbnail(self, number: int) -> str:
        """The file of a small picture of an image; grey where the image can no longer be read."""
        file = Path(self._folder.name) / f"{number}.webp"
        if not file.exists():
            try:
                image = open_image(self.index.images.source(number)).convert("RGB")
            except ValueError:
                image = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "grey")
            image.thumbnail((THUMBNAIL, THUMBNAIL))
            beside = file.with_suffix(f".{threading.get_ident()}")
            image.save(beside, "WEBP", quality=90)
            os.replace(beside, file)
        return str(file)


def build_page(app: App, pairs: Sequence[tuple[str, str]]) -> gr.Blocks:
    """The three tabs; `pairs` are queries in Chinese and English that people may click on."""
    with gr.Blocks(title="M2-Encoder", analytics_enabled=False) as blocks:
        index = app.index
        gr.HTML(page.head(app.encoder.name, index.images.name, len(index.numbers), index.bad), elem_id="head")
        with gr.Tab("Search"):
            _search_tab(app, blocks, pairs)
        with gr.Tab("Classify"):
            _classify_tab(app, pairs)
        with gr.Tab("Compare"):
            _compare_tab(app, pairs)
    return blocks


def _search_tab(app: App, blocks: gr.Blocks, pairs: Sequence[tuple[str, str]]) -> None:
    with gr.Row(equal_height=True):
        query = gr.Textbox(
            pairs[0][0], label="Query, in Chinese or English", max_length=MAX_QUERY, scale=6, min_width=240
        )
        top = _top_slider()
        button = gr.Button("Search", variant="primary", elem_classes="ask", scale=1, min_width=120)
    note, pictures = gr.HTML(render=False), _gallery("Images found")
    ask = {"fn": app.search, "outputs": [pictures, note]}
    # Before the examples, which would take the name of the function.
    gr.on([button.click, query.submit], inputs=[query, top], api_name="search", **ask)
    queries = [[query] for pair in pairs for query in pair]
    gr.Examples(queries, [query], label="Examples", run_on_click=True, **ask)
    note.render()
    pictures.render()
    blocks.load(inputs=[query, top], api_visibility="private", **ask)


def _classify_tab(app: App, pairs: Sequence[tuple[str, str]]) -> None:
    with gr.Row():
        with gr.Column(min_width=280):
            image = gr.Image(type="filepath", label="Image", sources=["upload", "clipboard"], height=280, buttons=[])
            image.preprocess = app.uploaded_file
            labels = gr.Textbox(
                "，".join(chinese for chinese, _ in pairs),
                label="Labels, in either language",
                info="Separated by commas: , ， or 、",
                lines=2,
                max_length=20_000,
            )
            with gr.Row():
                english = gr.Textbox(TEMPLATES["en"], label="Template for English", min_width=140)
                chinese = gr.Textbox(TEMPLATES["zh"], label="Template for Chinese", min_width=140)
            button = gr.Button("Classify", variant="primary")
        with gr.Column(min_width=280):
            scores = gr.HTML(page.note("Choose an image and labels."))
    inputs = [image, labels, english, chinese]
    gr.on([button.click, labels.submit], app.classify, inputs, scores, api_name="classify")
    all_labels = ["，".join(chinese for chinese, _ in pairs), ", ".join(english for _, english in pairs)]
    # The image nearest to each query.
    files = [app.search(chinese, 1)[0][0][0] for chinese, _ in pairs]
    examples = [[file, all_labels[number % 2]] for number, file in enumerate(files)]
    gr.Examples(examples, [image, labels], label="Examples", fn=app.classify, outputs=scores, run_on_click=True)


def _compare_tab(app: App, pairs: Sequence[tuple[str, str]]) -> None:
    with gr.Row(equal_height=True):
        chinese, english = (
            gr.Textbox(
                query,
                label=f"Query in {name}",
                max_length=MAX_QUERY,
                scale=3,
                min_width=200,
                html_attributes=gr.InputHTMLAttributes(lang=code),
            )
            for query, name, code in zip(pairs[0], ("Chinese", "English"), ("zh", "en"), strict=True)
        )
        top = _top_slider()
        button = gr.Button("Compare", variant="primary", elem_classes="ask", scale=1, min_width=120)
    note, left, right = (
        gr.HTML(render=False),
        _gallery("Found by the Chinese query"),
        _gallery("Found by the English query"),
    )
    ask = {"fn": app.compare, "outputs": [left, right, note]}
    gr.on([button.click, chinese.submit, english.submit], inputs=[chinese, english, top], api_name="compare", **ask)
    gr.Examples([list(pair) for pair in pairs], [chinese, english], label="Examples", run_on_click=True, **ask)
    note.render()
    with gr.Row(elem_classes="results"):
        for gallery in (left, right):
            with gr.Column(min_width=300):
                gr.HTML(page.heading(gallery.label))
                gallery.render()


def _top_slider() -> gr.Slider:
    return gr.Slider(4, MOST, TOP, step=4, label="Images to show", scale=3, min_width=220, buttons=[])


def _gallery(label: str) -> gr.Gallery:
    """To be rendered where it belongs on the page."""
    return gr.Gallery(
        label=label,
        show_label=False,
        columns=6,
        object_fit="contain",
        elem_classes="pictures",
        buttons=[],
        interactive=False,
        render=False,
    )


def parse_pairs(text: str) -> list[tuple[str, str]]:
    """`"雪山|snowy mountains;..."` as pairs of a Chinese and an English query.

    Raises:
        ValueError: when it is anything else.
    """
    pairs = [tuple(part.strip() for part in line.split("|")) for line in text.split(";") if line.strip()]
    if not pairs or any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise ValueError(f'EXAMPLES must be like "雪山|snowy mountains;...", not {text!r}.')
    return pairs


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    environment = os.environ.get
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=environment("MODEL"), help="a model's folder, or owner/name on the Hub")
    parser.add_argument(
        "--data",
        default=environment("DATA"),
        help="a folder of images, parquet files (a pattern), or owner/name:split on the Hub",
    )
    parser.add_argument("--index", default=environment("INDEX", "index"), help="where embeddings are kept")
    parser.add_argument("--examples", default=environment("EXAMPLES") or EXAMPLES, help='"中文|English;中文|English"')
    parser.add_argument("--port", type=int, default=int(environment("PORT", 7860)))
    settings = parser.parse_args(arguments)
    if not settings.model or not settings.data:
        parser.error("say which model and which images: --model and --data, or MODEL and DATA in the environment")
    return settings


def make_app(settings: argparse.Namespace) -> App:
    """Loads the model and the index; builds the index, with progress, where it is not kept yet.

    Raises:
        ValueError: for images that are not there; see `open_images`.
    """
    images, encoder = open_images(settings.data), Encoder(settings.model)
    with tqdm(total=len(images), desc=f"Embedding {images.name}", unit=" images", disable=None) as bar:
        index = load_or_build(encoder, images, settings.index, lambda done, _: bar.update(done - bar.n))
    for label, why in index.bad.items():
        print(f"Passed over {label}: {why}")
    return App(encoder, index)


def main(arguments: Sequence[str] | None = None) -> None:
    settings = parse_arguments(arguments)
    try:
        pairs = parse_pairs(settings.examples)
        app = make_app(settings)
    except (ValueError, OSError) as error:  # OSError: no such model
        raise SystemExit(f"error: {error}") from error
    launch(build_page(app, pairs), settings.port)


def launch(blocks: gr.Blocks, port: int) -> None:
    """On 127.0.0.1, or where GRADIO_SERVER_NAME says, as on a Space; returns when the server is stopped."""
    _, address, _ = blocks.launch(
        server_port=port,
        share=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        max_file_size="20mb",
        theme=page.THEME,
        css_paths=page.STYLE,
        head=page.HEAD,
        quiet=True,
        prevent_thread_lock=True,
    )
    print(f"The page is at {address} (Ctrl+C stops it)", flush=True)
    blocks.block_thread()


if __name__ == "__main__":
    main()
