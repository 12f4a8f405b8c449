"""Rows of Arrow and Parquet files, a few in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..quant import QuantTuneError

ROWS = 16
"""Rows of Parquet that are decoded at a time; Arrow's stay in their file until they are read."""


def rows(path: Path, choose: Callable[[Any], Sequence[str]]) -> Iterator[dict[str, Any]]:
    """Rows of an .arrow file (stream or file format) or a .parquet file.

    Args:
        path: of the file.
        choose: takes the file's Arrow schema and gives the columns to read.

    Raises:
        QuantTuneError: a damaged file, or no pyarrow.
    """
    library = arrow()
    try:
        if path.suffix == ".parquet":
            with library.parquet.ParquetFile(path, memory_map=True, pre_buffer=False) as file:
                columns = list(choose(file.schema_arrow))
                for batch in file.iter_batches(ROWS, columns=columns, use_threads=False):
                    yield from _values(batch, columns)
            return
        with library.memory_map(str(path)) as source:
            whole = source.read(6) == b"ARROW1"
            source.seek(0)
            reader = (library.ipc.open_file if whole else library.ipc.open_stream)(source)
            columns = list(choose(reader.schema))
            batches = map(reader.get_batch, range(reader.num_record_batches)) if whole else reader
            for batch in batches:
                batch = batch.select(columns)
                # Offsets of a file from elsewhere could point out of it.
                batch.validate(full=True)
                yield from _values(batch, columns)
    except QuantTuneError:
        raise
    except (library.ArrowException, OSError, ValueError, KeyError) as error:
        raise damaged(path, str(error).split("\n")[0]) from error


def is_text(kind) -> bool:
    """Whether an Arrow type is that of texts, of lists of them, or of nothing at all."""
    types = arrow().types
    if types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind)


def damaged(path: Path, reason: str) -> QuantTuneError:
    """The error for a file of a dataset that cannot be read."""
    return QuantTuneError(f"The dataset file {path.name} cannot be read ({reason or 'empty'}); "
                          "copy or download it again.")


def arrow():
    """The module pyarrow, with Parquet; raises QuantTuneError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise QuantTuneError(
            "Datasets and .parquet files are read by pyarrow, which is not there; run "
            "python -m pip install pyarrow in ComfyUI's environment and start ComfyUI again."
        ) from error
    return pyarrow


def _values(batch, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    found = {name: batch.column(name) for name in columns}
    for index in range(batch.num_rows):
        yield {name: column[index].as_py() for name, column in found.items()}
