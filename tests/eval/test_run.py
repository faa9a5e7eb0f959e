"""Models x tasks: finished work is kept, an interrupted run goes on, and each kind of mistake is one clear line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from eval import models
from eval.__main__ import main
from eval.files import read_json
from eval.known_model import KnownModel
from eval.retrieval import evaluate_retrieval
from eval.run import Failure, Settings, collect, run
from eval.tasks import ClassTexts, Columns, Data, Listed, Task
from tests.distributed import run_distributed
from tests.eval.conftest import ColourModel, ColourProcessor, png
from tests.full_disk import file_size_limit

ROOT = Path(__file__).parents[2]
NAMES = ["red", "green", "blue", "white"] * 3
COLUMNS = Columns(captions={"zh": "zh", "en": "en"}, split="split")


def task(name: str, columns: Columns = COLUMNS, **options) -> Task:
    return Task(
        name, name.title(), "retrieval", f"{name}/p/fp32", Data("parquet", split="test", **options), columns, True
    )


@pytest.fixture
def photos(write):
    """Twelve images whose bytes differ."""
    images = [png((20 * i, 0, 100)) for i in range(12)]
    return write(
        "photos.parquet", images, en=[f"{name} {i}" for i, name in enumerate(NAMES)],
        zh=[[f"{name} 色 {i}"] for i, name in enumerate(NAMES)], split=["test"] * 12, image_id=list("abcdefghijkl"),
        label=[0, 1, 2, 3] * 3,
    )  # fmt: skip


@pytest.fixture
def said():
    return []


@pytest.fixture
def start(checkpoint, photos, tmp_path, said):
    """`start([task, ...])` runs the tiny checkpoint as "tiny" on tasks whose data are `photos`, unless they say."""

    def start(tasks, models=(), output=tmp_path / "out", sources=None, **options):
        sources = {one.name: str(photos) for one in tasks} | (sources or {})
        models = models or [f"tiny={checkpoint}"]
        return run(models, tasks, output, Settings(sources, **options), say=said.append)

    return start


def test_finished_work_is_kept_until_something_changes(start, said, tmp_path, photos):
    both = [task("first"), task("second")]
    assert start(both) == []
    assert [line.split(" (")[0] for line in said] == ["done: first with tiny", "done: second with tiny"]
    document = collect(tmp_path / "out")
    (model,) = document["models"]
    assert model["name"] == "tiny" and model["about"]["class"] == "M2EncoderModel"
    assert [one["task"]["name"] for one in model["tasks"]] == ["first", "second"]
    assert model["tasks"][0]["benchmarks"][0]["counts"] == {"images": 12, "zh texts": 12, "en texts": 12}
    said.clear()
    start(both)
    assert said == ["kept: first with tiny", "kept: second with tiny"]
    for changed in ({"limit": 6}, {"dtype": "bfloat16"}):
        said.clear()
        start(both[:1], **changed)
        assert said[0].startswith("done: first with tiny")
    said.clear()
    start([task("first")])
    os.utime(photos, ns=(1, 1))
    start([task("first")])
    assert [line.split(" (")[0] for line in said] == ["done: first with tiny"] * 2
    (tmp_path / "out" / "scores" / "tiny" / "first.json").write_text("{half")
    start([task("first")])
    assert said[-1].startswith("done: first")


def test_embeddings_are_shared_between_tasks_and_outputs(start, tmp_path, monkeypatch):
    start([task("first")])
    monkeypatch.setattr("eval.models.TransformersAdapter._embed", lambda *a: pytest.fail("embedded again"))
    assert start([task("second")]) == []
    assert start([task("first")], output=tmp_path / "other", cache=str(tmp_path / "out" / "embeddings")) == []


def test_a_new_output_takes_finished_scores_from_a_cache_that_it_is_given(
    start, said, tmp_path, checkpoint, monkeypatch
):
    cache = str(tmp_path / "cache")
    start([task("first")], cache=cache)
    monkeypatch.setattr("eval.score.score_task", lambda *a, **o: pytest.fail("scored again"))
    monkeypatch.setattr("eval.models.load", lambda *a, **o: pytest.fail("loaded again"))
    assert start([task("first")], [f"other={checkpoint}"], output=tmp_path / "new", cache=cache) == []
    assert said[-1] == "kept: first with other"
    old, new = (collect(tmp_path / name)["models"][0] for name in ("out", "new"))
    assert (old.pop("name"), new.pop("name")) == ("tiny", "other") and old == new
    counts = [tmp_path / name / "scores" / model / "first.npz" for name, model in (("out", "tiny"), ("new", "other"))]
    assert counts[0].read_bytes() == counts[1].read_bytes()
    # A damaged copy counts as absent.
    for path in (tmp_path / "cache" / "scores").glob("*.json"):
        path.write_text("{half")
    monkeypatch.setattr("eval.score.score_task", lambda *a, **o: (_ for _ in ()).throw(ValueError("scored again")))
    assert start([task("first")], output=tmp_path / "third", cache=cache)[0].error == "scored again"


def test_a_model_is_loaded_only_if_something_must_be_embedded(start, tmp_path, write, monkeypatch):
    cache = str(tmp_path / "cache")
    start([task("first")], cache=cache)
    loaded = []
    load = models.load
    monkeypatch.setattr("eval.models.load", lambda *a, **o: (loaded.append(a), load(*a, **o))[1])
    assert start([task("second")], cache=cache, limit=7) == [] and loaded == []
    more = write("more.parquet", ["red", "blue"], en=["new", "words"], zh=[["新"], ["字"]], split=["test", "test"])
    assert start([task("third")], cache=cache, sources={"third": str(more)}) == [] and len(loaded) == 1
    assert start([task("fourth")], cache=cache, sources={"fourth": str(more)}, dtype="bfloat16") == []
    assert len(loaded) == 2, "another dtype is another model"


def test_weights_that_were_replaced_without_a_trace_are_found_when_they_are_loaded():
    one, other = ({"name": "m", "fingerprint": fingerprint} for fingerprint in ("a", "b"))
    adapter = KnownModel(one, lambda: SimpleNamespace(describe=lambda: other))
    assert adapter.describe() == one
    with pytest.raises(ValueError, match="m is not the model that the cache knows"):
        adapter.encode_texts(["x"])


def test_what_fails_is_reported_and_the_rest_is_done(start, said, tmp_path, photos, checkpoint, write):
    """A wrong column, a missing split, a changed revision, a broken image, data that are not there, an absent package;
    and a model that does not exist."""
    broken = write("broken.parquet", ["red", b"no image"], en=["a", "b"], zh=["c", "d"], split=["test", "test"])
    revised = tmp_path / "revised"
    notes = revised / ".cache" / "huggingface" / "download" / "a.parquet.metadata"
    notes.parent.mkdir(parents=True)
    notes.write_text("b" * 40 + "\n")
    (revised / "a.parquet").write_bytes(photos.read_bytes())
    classes = ClassTexts(("a", "b", "c", "d"), Listed(package="no_such_package", file="x.py", entry="y"))
    absent = Task(
        "absent", "A", "classification", "p", Data("parquet"), Columns(label="label"), classes={"en": classes}
    )
    tasks = [
        task("column", Columns(captions={"en": "caption_en"})),
        task("split", Columns(captions={"en": "en"}, split="label")),
        task("revision", id="org/name", revision="a" * 40),
        task("image"),
        task("nowhere"),
        absent,
        task("good"),
    ]
    sources = {"revision": str(revised), "image": str(broken), "nowhere": str(tmp_path / "nowhere.parquet")}
    models = [str(tmp_path / "no-model"), f"tiny={checkpoint}"]
    failures = {(one.model, one.task): one.error for one in start(tasks, models, sources=sources)}
    for name, message in {
        "column": "No column 'caption_en' in ",
        "split": "No split 'test' in column 'label' of ",
        "revision": f"the data are at revision {'b' * 40}, the task pins {'a' * 40}",
        "image": f"row 1 of {broken} holds an image that cannot be decoded",
        "nowhere": "No file at ",
        "absent": "no_such_package, which is not installed: pip install no_such_package",
    }.items():
        assert message in failures.pop(("tiny", name))
    assert all(model == models[0] and "No checkpoint at" in error for (model, _), error in failures.items())
    assert len(failures) == len(tasks) and ("tiny", "good") not in failures
    assert sum(line.startswith(f"error: {models[0]}: No checkpoint") for line in said) == 1, "said once, not per task"
    document = collect(tmp_path / "out")
    assert [one["task"]["name"] for one in document["models"][0]["tasks"]] == ["good"]
    assert len(document["failures"]) == len(tasks) + 6
    # With the data mended, what failed is done, and what was done is kept.
    said.clear()
    assert start([task("image"), task("good")]) == []
    assert [line.split(" with")[0] for line in said] == ["kept: good", "done: image"]
    assert "image" not in [one["task"] for one in collect(tmp_path / "out")["failures"] if one["model"] == "tiny"]


def test_a_fault_of_a_library_does_not_end_the_run(start, monkeypatch, capsys):
    def fault(task, *args, **options):
        raise KeyError("a fault") if task.name == "first" else ValueError("a mistake")

    monkeypatch.setattr("eval.score.score_task", fault)
    assert start([task("first"), task("second")]) == [
        Failure("tiny", "first", "KeyError: 'a fault'"),
        Failure("tiny", "second", "a mistake"),
    ]
    assert "Traceback" in capsys.readouterr().err, "our own faults keep their traceback"


def test_an_output_that_cannot_be_written_is_found_before_anything_is_computed(start, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("eval.models.load", lambda *a, **o: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="cannot be written"):
        start([task("first")], output=tmp_path / "file" / "out")


def test_a_disk_that_fills_up_is_reported_and_leaves_whole_files(start, said, tmp_path):
    start([task("first")])
    with file_size_limit(1500):
        (failure,) = start([task("second")])
    assert "cannot be written" in failure.error
    scores = tmp_path / "out" / "scores" / "tiny"
    assert {path.name for path in scores.iterdir()} == {"first.json", "first.npz", "second.failed.json"}


def test_mistakes_in_the_command_are_named(start, checkpoint, tmp_path):
    one = [task("first")]
    with pytest.raises(ValueError, match="--data names frist, but the tasks are first"):
        start(one, sources={"frist": "x"})
    with pytest.raises(ValueError, match="a/b and a--b would both be called a--b"):
        start(one, [f"a/b={checkpoint}", f"a--b={checkpoint}"])
    assert "No checkpoint at runs/none/model (no folder)" in start(one, ["runs/none/model"])[0].error
    with pytest.raises(ValueError, match="M2-Encoder-1B is published as m2_encoder_1B.ckpt: make a folder of it"):
        start(one, ["M2-Encoder-1B"])
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        start(one, batch_size=0)
    with pytest.raises(ValueError, match="limit must be at least 1"):
        start(one, limit=0)
    with pytest.raises(ValueError, match="Name at least one model"):
        run([], one, tmp_path / "out", Settings())
    with pytest.raises(ValueError, match="--data-dir .*none is no folder"):
        start(one, data_dir=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="No scores in"):
        collect(tmp_path / "empty")
    damaged = tmp_path / "out" / "scores" / "tiny" / "first.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("[]")
    with pytest.raises(ValueError, match="first.json is not a file of scores"):
        collect(tmp_path / "out")


COMMAND = """
import sys, time
import eval.embed, eval.cache
add = eval.cache.Store.add
def slow(self, kind, keys, embeds):
    path = add(self, kind, keys, embeds)
    print("shard", flush=True)
    time.sleep(60)          # killed here
    return path
if sys.argv[1] == "slow":
    eval.embed.SHARD = 4
    eval.cache.Store.add = slow
from eval.__main__ import main
main(sys.argv[2:])
"""


def test_a_killed_run_goes_on_where_it_was(checkpoint, photos, tmp_path):
    """SIGKILL after the first shard of embeddings: the second run finds it, and computes only what is missing. A third
    has nothing to do, and imports no torch for that; a fourth has nothing to embed, and imports no transformers."""
    arguments = ["run", "--models", f"tiny={checkpoint}", "--retrieval", photos, "--captions", "en=en", "zh=zh"]
    arguments = [str(one) for one in [*arguments, "--batch-size", "4", "--output", tmp_path / "out"]]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    options = {"cwd": ROOT, "env": environment, "text": True}
    process = subprocess.Popen([sys.executable, "-c", COMMAND, "slow", *arguments], stdout=subprocess.PIPE, **options)
    assert process.stdout is not None and process.stdout.readline() == "shard\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("image-*.safetensors")}
    assert len(shards) == 1 and not list((tmp_path / "out").rglob("photos.json"))
    done = subprocess.run([sys.executable, "-c", COMMAND, "fast", *arguments], capture_output=True, **options)
    assert done.returncode == 0 and "done: photos with tiny" in done.stderr, done.stderr
    assert {path: path.stat().st_mtime_ns for path in shards} == shards
    (folder,) = {path.parent for path in shards}
    assert len(list(folder.glob("image-*.safetensors"))) == 2
    code = f"import sys; from eval.__main__ import main; main({arguments!r}); sys.exit('torch' in sys.modules)"
    kept = subprocess.run([sys.executable, "-c", code], capture_output=True, **options)
    assert kept.returncode == 0 and "kept: photos with tiny" in kept.stderr, kept.stderr
    assert kept.stdout == done.stdout
    fewer = [*arguments[:-1], str(tmp_path / "new"), "--cache", str(tmp_path / "out" / "embeddings"), "--limit", "6"]
    code = f"import sys; from eval.__main__ import main; main({fewer!r}); sys.exit('transformers' in sys.modules)"
    scored = subprocess.run([sys.executable, "-c", code], capture_output=True, **options)
    assert scored.returncode == 0 and "done: photos with tiny" in scored.stderr, scored.stderr


def _share(checkpoint: str, file: str, output: str):
    group = dist.group.WORLD
    scores = evaluate_retrieval(
        ColourModel(), ColourProcessor(), [file], captions={"zh": "zh", "en": "en"}, batch_size=1, group=group
    )
    failures = run([f"tiny={checkpoint}"], [task("first")], Path(output), Settings({"first": file}), group=group)
    return scores, failures


def test_processes_share_the_work_and_the_first_writes(start, checkpoint, photos, tmp_path):
    alone = evaluate_retrieval(ColourModel(), ColourProcessor(), [photos], captions={"zh": "zh", "en": "en"})
    start([task("first")])
    results = run_distributed(_share, 2, str(checkpoint), str(photos), str(tmp_path / "shared"), timeout=180)
    assert all(scores == alone and failures == [] for scores, failures in results)
    one, two = (collect(tmp_path / name)["models"][0]["tasks"][0]["benchmarks"] for name in ("out", "shared"))
    assert one == two


def test_torchrun_gives_the_results_of_one_process(checkpoint, photos, tmp_path):
    """Launched for real: two processes over gloo, a table printed once, and the numbers of one process alone."""
    arguments = ["run", "--models", f"tiny={checkpoint}", "--retrieval", photos, "--captions", "en=en", "zh=zh"]
    arguments = [str(one) for one in [*arguments, "--batch-size", "2", "--output"]]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "datasets"), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m", "eval"]
    shared = subprocess.run(
        [*launcher, *arguments, str(tmp_path / "two")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert shared.returncode == 0, shared.stderr
    assert shared.stdout.count("written to") == 1 and shared.stderr.count("done: photos with tiny") == 1
    main([*arguments, str(tmp_path / "one")])
    one, two = (read_json(tmp_path / name / "results.json")["models"] for name in ("one", "two"))
    for models_ in (one, two):
        for task_ in models_[0]["tasks"]:
            del task_["created"], task_["seconds"]
    assert one == two
