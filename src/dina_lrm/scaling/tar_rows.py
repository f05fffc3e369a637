"""Samples of WebDataset archives."""

import json
import posixpath
import tarfile
from collections.abc import Iterator
from itertools import islice
from typing import Any

import fsspec
import pyarrow.parquet

from dina_lrm.errors import InvalidInputError
from dina_lrm.scaling.json_rows import text_of
from dina_lrm.scaling.plan import PICTURES, Part, Plan, chunks, open_file
from dina_lrm.scaling.rows import Row, parse_row

TAR_SCHEMA = pyarrow.schema([(name, pyarrow.string()) for name in ("key", "prompt", "image", "json")])


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, list[tarfile.TarInfo]]]:
    """Neighbours with one name up to the first dot, as WebDataset groups them."""
    key, members = "", list[tarfile.TarInfo]()
    for member in tar:
        folder, base = posixpath.split(member.name)
        if not member.isfile() or base.startswith("."):
            continue
        own = posixpath.join(folder, base.partition(".")[0])
        if members and own != key:
            yield key, members
            members = []
        key = own
        members.append(member)
    if members:
        yield key, members


def scan_tar(fs: fsspec.AbstractFileSystem, path: str, every: int, digest: Any) -> tuple[int, list[int]]:
    rows, end = 0, 0
    starts: list[int] = []
    try:
        with open_file(fs, path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for _, members in _samples(tar):
                if rows % every == 0:
                    starts.append(members[0].offset)
                rows += 1
                for member in members:
                    digest.update(
                        f"{member.name}\n{member.size}\n{member.mtime}\n".encode("utf-8", "replace")
                    )
                    end = member.offset_data + member.size
    except tarfile.TarError as error:
        raise InvalidInputError(
            f"{path!r} is no tar file, or damaged after {rows} samples: {error}"
        ) from error
    if end > (fs.size(path) or 0):
        raise InvalidInputError(f"{path!r} breaks off in its sample {rows - 1}")
    return rows, starts


def tar_rows(
    fs: fsspec.AbstractFileSystem, part: Part, plan: Plan, chunk: int
) -> Iterator[tuple[pyarrow.Table, list[Row]]]:
    index = part.first_row
    with open_file(fs, part.path) as file:
        file.seek(part.start)
        with tarfile.TarFile(fileobj=file) as tar:
            for some in chunks(islice(_samples(tar), part.rows), chunk):
                read = [_tar_row(index + number, tar, *sample) for number, sample in enumerate(some)]
                columns = [cells for _, cells in read]
                yield pyarrow.Table.from_pylist(columns, plan.schema), [row for row, _ in read]
                index += len(read)


def _tar_row(
    index: int, tar: tarfile.TarFile, key: str, members: list[tarfile.TarInfo]
) -> tuple[Row, dict[str, str | None]]:
    """A sample: its picture, and its prompt from .txt, or from `prompt` or `caption` of .json."""

    def content(member: tarfile.TarInfo) -> bytes:
        file = tar.extractfile(member)
        assert file is not None
        return file.read()

    suffixes = {member: posixpath.splitext(member.name)[1].lower() for member in members}
    pictures = [member for member, suffix in suffixes.items() if suffix in PICTURES]
    texts = [member for member, suffix in suffixes.items() if suffix == ".txt"]
    records = [member for member, suffix in suffixes.items() if suffix == ".json"]
    error = None
    for name, found in (("pictures", pictures), (".txt files", texts), (".json files", records)):
        if len(found) > 1:
            error = error or f"{len(found)} {name} in one sample"
    json_text = content(records[0]).decode("utf-8", errors="replace") if records else None
    prompt = content(texts[0]).decode("utf-8", errors="replace").strip() if texts else None
    if json_text is not None and prompt is None:
        try:
            value = json.loads(json_text)
        except (ValueError, RecursionError) as damage:
            error = error or f"not JSON: {damage}"
        else:
            prompt = value.get("prompt", value.get("caption")) if isinstance(value, dict) else None
    image = content(pictures[0]) if pictures else None
    row = parse_row(index, {"prompt": prompt, "image": image})
    if error is not None:
        row = Row(index=index, prompt=row.prompt, error=error)
    cells = {
        "key": text_of(key),
        "prompt": row.prompt,
        "image": text_of(pictures[0].name) if pictures else None,
        "json": json_text,
    }
    return row, cells
