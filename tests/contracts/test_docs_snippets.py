"""Every snippet of README.md and docs/*.md runs, from top to bottom of each document (tests/snippets.py says how).

A tiny model stands in the place of the trained and published ones, a dozen drawings in that of photos, and `SMALL` is
appended to the commands, whose last setting wins. What cannot be run is listed in `NOT_RUN` with the reason; the
command's own parser reads it all the same.
"""

from __future__ import annotations

import configparser
import io
import re
import shlex
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from PIL import ImageDraw

from modeling_m2encoder import M2EncoderModel
from modeling_m2encoder.hub_folder import save_hub_folder
from tests.snippets import Block, blocks, python
from training.scenes import ScenesConfig, write_scenes

ROOT = Path(__file__).parents[2]
DOCUMENTS = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]

# Appended to a command that is run.
SMALL = {
    "training.scenes": "--twins 8 --train 40 --validation 8 --test 40 --task-size 8 --workers 1",
    "training.tokenizer": "--vocab-size 200",
    "training.pretrain nano": "--steps 2 --batch-size 8 --vocab-size 200 --optimizer.warmup-steps 0",
    "docs/finetune_sentence_transformers.py": "--steps 1 --batch-size 4",
    "eval run": "--limit 12",
}
# (document or "", beginning of the command) -> why it is parsed and no more.
NOT_RUN = {
    ("docs/publishing.md", "python -m"): "tests/conversion/test_push_docs.py runs the whole document against a Hub",
    ("README.md", "python -m conversion.push"): "tests/conversion/test_push_docs.py pushes to a Hub",
    ("", "python -m benchmarks.endpoint_server"): "serves until it is stopped (tests/model_cards asks it)",
    ("README.md", "python -m training.corpus"): "docs/corpus.md has it run",
    ("README.md", "python -m conversion.export"): "docs/export.md has it run",
    ("", "make"): "sets up environments; CI runs `make test`",
    ("", "pip install"): "changes the environment",
    ("", "python -m http.server"): "serves until it is stopped",
    ("", "sbatch"): "needs a SLURM cluster",
    ("", "NODES="): "needs several hosts",
    (
        "",
        "python -m conversion.convert",
    ): "the published checkpoints are not at hand (tests/conversion converts others)",
    ("", "python -m conversion.static_demo"): "fetches from npm (tests/model_cards/test_static_demo.py builds one)",
    ("docs/evaluation.md", "python -m eval run --models M2="): "downloads models and benchmarks",
    ("docs/evaluation.md", "python -m eval run --models nano="): "asks for the 1,000 photos of Flickr8k-CN",
    ("docs/evaluation.md", "python -m eval report"): "reports what was not run",
    ("docs/evaluation.md", "python -m eval compare"): "compares models that were not run",
    ("docs/evaluation.md", "python -m eval verify"): "needs the benchmarks' data",
    ("docs/evaluation.md", "python -m eval build"): "needs COCO's annotations (tests/eval/build builds small ones)",
    ("docs/fine_grained.md", "python -m eval"): "needs COCO's annotations (tests/eval/build builds small ones)",
}
# Languages that no test here runs.
OTHER_LANGUAGES = {
    "js": "tests/contracts/test_transformers_js.py and tests/model_cards/test_static_demo.py make these calls"
}
# (document, words of a Python block) -> why it is compiled and no more.
PYTHON_NOT_RUN = {
    ("docs/evaluation.md", 'load_task("flickr8k-cn")'): "asks for the 1,000 photos of Flickr8k-CN",
    ("docs/fine_grained.md", "from eval.build.probe"): "needs COCO's annotations",
}
# Wherever a document means a model folder that it has not made itself.
MODELS = ("MODEL_DIR", "DIR", "m2-encoder-0.4B", "runs/nano/model", "runs/quickstart/nano/model")
# What a document makes itself.
MADE = {"README.md": ["runs/nano"], "docs/export.md": ["DIR"]}
CLASSES = ("labelled", "tiny_imagenet_train", "tiny_imagenet_held_out")
PHOTOS = (
    "photos",
    "photos_train",
    "photos_val",
    "photos-0",
    "captions",
    "flickr8k_cn_train",
    "flickr8k_cn_val",
    *CLASSES,
)
COLOURS = {"red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "white": "白色", "black": "黑色"}
SHAPES = {"circle": ("圆形", "ellipse"), "square": ("方块", "rectangle")}

OPTION = r"(?<![\w-])--[a-zA-Z][\w.-]*"
TOOLS = [
    "python -m training.pretrain nano",
    "python -m eval.mteb_model",
    *(f"python -m training.{name}" for name in ("scenes", "tokenizer", "plot", "preflight", "corpus")),
    *(f"python -m eval {name}" for name in ("run", "verify", "build", "report", "compare", "picture")),
    *(f"python -m conversion.{name}" for name in ("convert", "export", "card", "push", "static_demo")),
    f"python {ROOT / 'docs' / 'search.py'}",
    f"python {ROOT / 'docs' / 'finetune_sentence_transformers.py'}",
]
# Options of pip, torchrun, accelerate, hf and sbatch.
OTHERS_OPTIONS = {"--no-deps", "--nproc_per_node", "--config_file", "--cpu", "--num_processes", "--rdzv_backend"}
OTHERS_OPTIONS |= {"--repo-type", "--requeue"}
TYPED = re.compile(r"^(\$ |python3? |pip |make |torchrun |accelerate |bash |sbatch |curl )", re.MULTILINE)


def draw_photos(path: Path, *, names: bool = False) -> None:
    """Twelve drawings with a label and captions in both languages, or with the names of their classes."""
    rows: dict[str, list] = {"image": [], "label": [], "caption_en": [], "caption_zh": []}
    for colour, chinese_colour in COLOURS.items():
        for shape, (chinese_shape, draw) in SHAPES.items():
            image = PILImage.new("RGB", (48, 40), "grey")
            getattr(ImageDraw.Draw(image), draw)((10, 6, 36, 32), fill=colour)
            rows["image"].append(image)
            rows["label"].append(len(rows["label"]))
            english, chinese = f"{colour} {shape}", f"{chinese_colour}的{chinese_shape}"
            rows["caption_en"].append(english if names else [f"a {english}", f"one {english}"])
            rows["caption_zh"].append(chinese if names else [chinese])
    texts = Value("string") if names else List(Value("string"))
    features = Features({"image": Image(), "label": Value("int64"), "caption_en": texts, "caption_zh": texts})
    Dataset.from_dict(rows, features=features).to_parquet(path)


@pytest.fixture(scope="module")
def hub(config, processor, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return save_hub_folder(M2EncoderModel(config).eval(), processor, tmp_path_factory.mktemp("hub") / "model")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    sizes = {"twins": 8, "train": 8, "validation": 8, "test": 40, "task_size": 8, "workers": 1}
    write_scenes(folder, ScenesConfig(**sizes))
    return folder


@pytest.fixture
def world(hub: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a reader has: the clone's folders, models, scenes, photos."""
    for name in ("training", "eval", "docs", "benchmarks", "model_cards", "Makefile"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in MODELS:
        shutil.copytree(hub, tmp_path / name)
    shutil.copytree(scenes, tmp_path / "SCENES_DIR")
    for name in PHOTOS:
        draw_photos(tmp_path / f"{name}.parquet", names=name in CLASSES)
    drawing = PILImage.new("RGB", (90, 70), "grey")
    ImageDraw.Draw(drawing).ellipse((20, 10, 60, 50), fill="red")
    for name in ("cat.jpg", "pokemon.jpeg", "photos/one.jpg", "photos/two.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        drawing.save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def reason_not_to_run(document: str, text: str, table: dict[tuple[str, str], str], *, anywhere: bool = False) -> str:
    for (where, words), reason in table.items():
        if where in ("", document) and (words in text if anywhere else text.startswith(words)):
            return reason
    return ""


def do(document: str, command: str) -> None:
    """Run a command of a document, or have it parsed."""
    not_run = bool(reason_not_to_run(document, command, NOT_RUN))
    words = shlex.split(command)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if words[0] == "make":
        targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        assert set(word for word in words[1:] if "=" not in word) <= set(targets), f"no such target: {command}"
    elif words[:2] == ["pip", "install"]:
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg", encoding="utf-8")
        asked = {extra.strip() for extras in re.findall(r"\[(.+?)\]", command) for extra in extras.split(",")}
        assert asked <= set(setup["options.extras_require"]), f"no such extra: {command}"
    elif words[0] in ("sbatch", "bash"):
        script = next(index for index, word in enumerate(words) if word.endswith(".sh"))
        assert (ROOT / words[script]).is_file(), f"no such script: {command}"
        python(["-m", "training.pretrain", *with_files(words[script + 1 :])], only_parse=True)
    elif words[0] == "torchrun":  # its own options are read, and one process started instead of several
        from torch.distributed.run import parse_args

        options = parse_args(words[1:])
        assert options.module
        python(["-m", options.training_script, *options.training_script_args, *small(words)], only_parse=not_run)
    else:
        assert words[0] == "python", f"{command}: teach tests/contracts/test_docs_snippets.py what this is"
        python([*words[1:], *small(words)], only_parse=not_run)


def with_files(words: list[str]) -> list[str]:
    """As training/launch/node.sh replaces @FILE."""
    return [part for word in words for part in ((ROOT / word[1:]).read_text().split() if word[0] == "@" else [word])]


def small(words: list[str]) -> list[str]:
    command = f"{shlex.join(words)} "
    return [word for key, extra in SMALL.items() if f" {key} " in command for word in extra.split()]


def run_python(document: str, block: Block, namespace: dict[str, object]) -> None:
    code = compile("\n" * (block.line - 1) + block.text, document, "exec")  # tracebacks name the document's line
    if not reason_not_to_run(document, block.text, PYTHON_NOT_RUN, anywhere=True):
        exec(code, namespace)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_snippets_run(document: str, world: Path, capsys: pytest.CaptureFixture[str]):
    for name in MADE.get(document, ()):
        shutil.rmtree(world / name)
    namespace: dict[str, object] = {"__name__": document}
    for block in blocks(ROOT / document):
        if block.language == "python":
            run_python(document, block, namespace)
        elif block.language == "bash":
            for command in block.commands():
                do(document, command)
        elif block.language == "console":
            (command,) = block.commands()
            shown = prints(shlex.split(command), capsys)
            assert shown.strip() == block.output().strip(), f"{document}:{block.line} shows another output"
        elif block.language:
            assert block.language in OTHER_LANGUAGES, f"{document}:{block.line}: nothing runs {block.language}"
        else:
            assert not TYPED.search(block.text), f"{document}:{block.line}: a fence with commands must say bash"


def prints(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints, its words of refusal included."""
    capsys.readouterr()
    try:
        python(words[1:])
        refusal = ""
    except AssertionError as error:
        refusal = str(error).partition(" ended with ")[2]
    return refusal + capsys.readouterr().out


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str):
    text = re.sub(r"^```.*?^```$", "", (ROOT / document).read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\((?!https?://|mailto:)([^)#]*)", text):
        assert (ROOT / document).parent.joinpath(target).exists(), f"{document} links to {target}, which is not there"


@pytest.fixture(scope="module")
def options() -> set[str]:
    """Every option of every command of ours, from its help."""
    texts = io.StringIO()
    with redirect_stdout(texts):
        for tool in TOOLS:
            python([*tool.split()[1:], "--help"])
    return set(re.findall(OPTION, texts.getvalue()))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_options_named_in_the_text_exist(document: str, options: set[str]):
    prose = re.sub(r"^```.*?^```$", "", (ROOT / document).read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    named = {option for code in re.findall(r"`([^`]+)`", prose) for option in re.findall(OPTION, code)}
    groups = {option.rpartition(".")[0] for option in options}
    assert named <= options | groups | OTHERS_OPTIONS, f"{document} names {named - options - groups - OTHERS_OPTIONS}"


@pytest.mark.parametrize("table", [NOT_RUN, PYTHON_NOT_RUN], ids=["commands", "python"])
def test_what_is_not_run_is_in_the_documents(table: dict[tuple[str, str], str]):
    """No exception outlives the snippet that it was made for."""
    for where, words in table:
        documents = [where] if where else DOCUMENTS
        texts = ["\n".join([block.text, *block.commands()]) for name in documents for block in blocks(ROOT / name)]
        assert any(words in text for text in texts), f"{words!r} is in no snippet of {where or 'any document'}"
