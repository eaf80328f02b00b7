"""Reading one column of a Parquet file; the only importer of pyarrow, which the extra 'data' installs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmcode.config import ConfigError, near_match

ROWS = 1024  # read at a time


def read_column(path: Path, field: str) -> Iterator[Any]:
    """The values of column `field`, row by row.

    Raises:
        ConfigError: without the package; for a file that is damaged or no Parquet, or that lacks the column.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ConfigError(f"'{path}' needs the package pyarrow: pip install 'lmcode[data]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise ConfigError(f"'{path}' lacks the column data.text_field = '{field}'."
                                  f"{near_match(field, file.schema_arrow.names)}")
            for batch in file.iter_batches(batch_size=ROWS, columns=[field]):
                yield from batch.column(0).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"'{path}' cannot be read: {' '.join(str(error).split())}") from None
