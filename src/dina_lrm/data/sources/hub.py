"""Public preference data from the Hugging Face hub: tables are streamed, archives are downloaded."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dina_lrm.data.comparisons import Check, Comparison, Row
from dina_lrm.data.pairs import Reject
from dina_lrm.data.row import BadRow, checked_row
from dina_lrm.data.sources.layouts import Source
from dina_lrm.data.sources.registry import LOCAL, read_source, source_files, source_split
from dina_lrm.errors import HubError, InvalidInputError

__all__ = ["read_hub"]


def read_hub(
    name: str, *, split: str | None = None, dataset: str | None = None, check_images: Check = "exists"
) -> Iterator[Comparison | Reject]:
    """What `read_source` gives, of a set that the hub has; a table is streamed and never downloaded whole.

    ImageRewardDB is archives, which cannot be streamed: those of the split are downloaded into the local
    cache of the hub once (test 1.2 GB, validation 1.1 GB, train 21 GB).

    Args:
        name: a source of `data.sources.layouts.SOURCES` with a `hub`.
        dataset: another repository of the same layout, or a local folder of its files.
        split: as of the data set; None: the source's default.

    Raises:
        InvalidInputError: no such source or split, or the source is not on the hub.
        HubError: the hub cannot be reached, or gives no access.
    """
    source, split = (None, split) if name in LOCAL else source_split(name, split)
    if source is None or source.hub is None or split is None:
        raise InvalidInputError(
            f"{name} is not published as a table that can be streamed: it needs the folder of its files"
        )
    repository = dataset or source.hub.repository
    folder = Path(dataset) if dataset is not None and Path(dataset).is_dir() else None
    try:
        if source.hub.by == "archives":
            folder = folder or _fetched(repository, source.splits[split])
            rows = read_source(name, folder, split=split, check_images=check_images)
        else:
            stream = _stream(source, split, repository, folder, own=dataset is None)
            rows = _read(source, stream, f"{repository}/{split}", check_images)
    except InvalidInputError:
        raise
    except Exception as error:  # no network, no access: each library has errors of its own
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        bad_split = isinstance(error, ValueError) and source.hub.by == "splits"
        raise (InvalidInputError if bad_split else HubError)(
            f"{name}: {repository} cannot be read from the hub: {why}"
        ) from error
    yield from rows


def _read(source: Source, stream: Any, file: str, check: Check) -> Iterator[Comparison | Reject]:
    for index, values in enumerate(stream):
        checked = checked_row(values)
        if isinstance(checked, BadRow):
            yield Reject(row=index, reason=str(checked), file=file)
        else:
            yield from Row(checked, index, None, file, Path(), check).read(source.read_row)


def _fetched(repository: str, patterns: tuple[str, ...]) -> Path:
    """A folder with the files of a split."""
    import huggingface_hub

    return Path(
        huggingface_hub.snapshot_download(repository, repo_type="dataset", allow_patterns=list(patterns))
    )


def _stream(source: Source, split: str, repository: str, folder: Path | None, *, own: bool) -> Any:
    """Rows as `datasets` streams them, with pictures as they are stored."""
    import datasets

    assert source.hub is not None
    if folder is not None:
        files = [str(file) for file in source_files(source.name, folder, split=split)]
        stream: Any = datasets.load_dataset("parquet", data_files={split: files}, split=split, streaming=True)
    elif source.hub.by == "patterns":
        files = [f"hf://datasets/{repository}/{pattern}" for pattern in source.splits[split]]
        stream = datasets.load_dataset("parquet", data_files={split: files}, split=split, streaming=True)
    else:
        config = source.hub.config if own else None
        stream = datasets.load_dataset(repository, config, split=split, streaming=True)
    for column, feature in (stream.features or {}).items():
        if isinstance(feature, datasets.Image):
            stream = stream.cast_column(column, datasets.Image(decode=False))
    return stream
