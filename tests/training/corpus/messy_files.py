"""The files of the sources of the messy corpus: every form in which image-text pairs are published.

Each writer takes a folder and a source, and returns the source's entry in the configuration.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from tests.training.corpus.messy import Item, Source

ROW_GROUP = 64
_FEATURES = json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})


def strings(values: Sequence[str | bytes | None], kind: pa.DataType | None = None) -> pa.Array:
    """Texts as `kind` (string, large_string), with bytes that are no UTF-8 as they are."""
    encoded = [value.encode() if isinstance(value, str) else value for value in values]
    large = kind == pa.large_string()
    return pa.array(encoded, pa.large_binary() if large else pa.binary()).view(kind or pa.string())


def structs(images: Sequence[bytes | None]) -> pa.Array:
    """Images as the feature of `datasets`; one without bytes is null or holds null, in turn."""
    values = [
        None if image is None and number % 2 else {"bytes": image, "path": f"{number}.jpg"}
        for number, image in enumerate(images)
    ]
    return pa.array(values, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def write_guard(path: Path, images: Sequence[bytes]) -> None:
    _write(path, {"image": structs(images)}, marked=True)


def parquet_with_lists(place: Path, source: Source) -> dict:
    """Structs of images, and lists of captions."""
    for file, items in enumerate(source.split()):
        flat, offsets, null = [], [0], []
        for item in items:
            flat += [text.value for text in item.texts or ()]
            offsets.append(len(flat))
            null.append(item.texts is None)
        captions = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), strings(flat), mask=pa.array(null))
        columns = {"image": structs([item.image for item in items]), "captions": captions}
        _write(place / f"{file:03}.parquet", columns, marked=True)
    return {"adapter": "parquet", "files": [str(place / "*.parquet")], "image": "image", "text": "captions"}


def parquet_with_structs(place: Path, source: Source) -> dict:
    """What `datasets` writes: the `Image` feature and a text."""
    for file, items in enumerate(source.split()):
        columns = {"image": structs([item.image for item in items]), "text": strings(_texts(items))}
        _write(place / f"train-{file:05}.parquet", columns, marked=True)
    return {"adapter": "parquet", "files": [str(place)], "licence": "research only"}


def parquet_with_binary(place: Path, source: Source) -> dict:
    """Images as bare bytes."""
    for file, items in enumerate(source.split()):
        columns = {
            "img": pa.array([item.image for item in items], pa.binary()),
            "name": strings(_texts(items), pa.large_string()),
            "licence": strings([item.licence for item in items]).dictionary_encode(),
        }
        _write(place / f"{file}.parquet", columns)
    columns = {"image": "img", "text": "name", "licence_column": "licence"}
    return {"adapter": "parquet", "files": [str(place / f"{file}.parquet") for file in range(source.files)]} | columns


def parquet_of_many_types(place: Path, source: Source) -> dict:
    """Files of one source whose columns have other types: dictionaries and structs, then large strings and bytes."""
    for file, items in enumerate(source.split()):
        images, texts = [item.image for item in items], _texts(items)
        words = strings(texts, pa.large_string())
        if file % 2 == 0:
            words = strings(texts).dictionary_encode()
        pictures = structs(images) if file % 2 == 0 else pa.array(images, pa.large_binary())
        addresses = strings([f"https://镜像.example/{file}/{number}.jpg" for number in range(len(items))])
        _write(place / f"部分 {file}.parquet", {"图像": pictures, "文本": words, "url": addresses})
    columns = {"image": "图像", "text": "文本", "url": "url"}
    return {"adapter": "parquet", "files": [str(place / "部分 *.parquet")]} | columns


def webdataset(place: Path, source: Source) -> dict:
    """Tars of pairs `key.png`, `key.txt`; what is null is not there."""
    for file, items in enumerate(source.split()):
        with _tar(place / f"{file:06}.tar") as tar:
            for record, item in enumerate(items):
                _add(tar, f"{record:08}.png", item.image)
                _add(tar, f"{record:08}.txt", _text(item))
    return {"adapter": "tar", "files": [str(place / "*.tar")], "image": "png", "text": "txt"}


def img2dataset(place: Path, source: Source) -> dict:
    """The list of addresses of a LAION subset, and beside it what `img2dataset --output_format webdataset` makes of it:
    tars with the image, the text and a JSON, and a table and statistics of each."""
    urls, done = place / "urls.parquet", place / "downloaded"
    done.mkdir()
    addresses = [f"https://example.com/{number}.jpg" for number in range(len(source.items))]
    _write(urls, {"URL": strings(addresses), "TEXT": strings(_texts(source.items))})
    for file, items in enumerate(source.split()):
        keys = [f"{file:05}{record:04}" for record in range(len(items))]
        with _tar(done / f"{file:05}.tar") as tar:
            for record, (key, item) in enumerate(zip(keys, items, strict=True)):
                text = _text(item)
                about = {"key": key, "url": f"https://example.com/{file}/{record}.jpg", "status": "success"}
                _add(tar, f"{key}.jpg", item.image)
                _add(tar, f"{key}.txt", text)
                # The text goes in as it is: JSON of bytes that are no UTF-8 is as broken as the text.
                said = b"null" if text is None else b'"' + _escaped(text) + b'"'
                _add(tar, f"{key}.json", json.dumps(about)[:-1].encode() + b', "caption": ' + said + b"}")
        _write(done / f"{file:05}.parquet", {"key": strings(keys), "caption": strings(_texts(items))})
        (done / f"{file:05}_stats.json").write_text(json.dumps({"count": len(items), "successes": len(items)}))
    return {"adapter": "laion-2b-en", "files": [str(urls)], "images": [str(done)]}


def _escaped(text: bytes) -> bytes:
    out = text.replace(b"\\", b"\\\\").replace(b'"', b'\\"')
    return b"".join(b"\\u%04x" % byte if byte < 32 else bytes([byte]) for byte in out)


def nested_tar(place: Path, source: Source) -> dict:
    """Folders in a tar, extensions in capitals, the text before the image, names that USTAR cannot hold."""
    for file, items in enumerate(source.split()):
        with _tar(place / f"网页 {file}.tar", tarfile.PAX_FORMAT) as tar:
            for record, item in enumerate(items):
                key = f"爬取/2026.11/{'深' * 40}/{record:05}"
                _add(tar, f"{key}.TXT", _text(item))
                _add(tar, f"{key}.JPG", item.image)
    return {"adapter": "tar", "files": [str(place)], "image": "jpg", "text": "txt"}


def _text(item: Item) -> bytes | None:
    value = item.texts[0].value if item.texts else None
    return value.encode() if isinstance(value, str) else value


def _texts(items: Sequence[Item]) -> list[str | bytes | None]:
    return [item.texts[0].value if item.texts else None for item in items]


def _tar(path: Path, format: int = tarfile.USTAR_FORMAT) -> tarfile.TarFile:
    return tarfile.open(path, "w", format=format)


def _add(tar: tarfile.TarFile, name: str, data: bytes | None) -> None:
    if data is None:
        return
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _write(path: Path, columns: dict[str, pa.Array], marked: bool = False) -> None:
    table = pa.table(columns)
    if marked:
        table = table.replace_schema_metadata({"huggingface": _FEATURES})
    pq.write_table(table, path, row_group_size=ROW_GROUP)
