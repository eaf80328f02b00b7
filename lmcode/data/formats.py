"""How the documents of one file are read: text, JSON, JSON lines and Parquet, the first three also compressed.

Text is UTF-8 without NUL bytes, kept verbatim; a file that cannot be read so is refused by name, a row by its line.
A document is called after its file, with ':line' (or ':row') where a file may hold several.
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from lmcode.config import ConfigError, TextConfig, near_match
from lmcode.data.instructions import instruction_of, is_instruction
from lmcode.data.parquet import read_column
from lmcode.data.text_files import TextFile
from lmcode.data.zstd import open_zstd

PROSE_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst", ".tex")
CODE_SUFFIXES = (".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cxx", ".hh", ".hpp", ".cu", ".cuh", ".cs", ".d", ".dart", ".el",
                 ".erl", ".ex", ".f90", ".fs", ".go", ".hs", ".java", ".jl", ".js", ".jsx", ".kt", ".lisp", ".lua", ".m",
                 ".ml", ".mjs", ".nim", ".php", ".pl", ".ps1", ".r", ".rb", ".rs", ".s", ".scala", ".scm", ".sh", ".sql",
                 ".swift", ".ts", ".tsx", ".v", ".vhd", ".zig")
LINES_SUFFIXES = (".jsonl", ".ndjson")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
READ_IN_FOLDERS = (*PROSE_SUFFIXES, *LINES_SUFFIXES, ".json", ".parquet", "source code", "all but .parquet also .gz, .zst")

BLANKS = " \t\r\n"  # between the values of JSON
NO_BLANK = re.compile(f"[^{BLANKS}]")

Document = tuple[str, str]  # name, text


class Format(NamedTuple):
    """How a file is to be read, as its name tells. kind: text, code, lines, json, parquet, or other."""

    kind: str
    compression: str | None = None


class LacksText(ConfigError):
    """A row that is no object with the wanted field."""


def format_of(name: str) -> Format:
    """What the suffixes of a file's name say."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    last = (suffixes[:-1] if compression else suffixes)[-1:]
    kinds = {"text": PROSE_SUFFIXES, "code": CODE_SUFFIXES, "lines": LINES_SUFFIXES, "json": (".json",),
             "parquet": (".parquet",)}
    kind = next((kind for kind, some in kinds.items() if last and last[0] in some), "other")
    return Format("other" if compression and kind == "parquet" else kind, compression)


def read_documents(file: TextFile, config: TextConfig) -> Iterator[Document]:
    """The documents of one file.

    Raises:
        ConfigError: for what cannot be read, is damaged, not text, or lacks the field; a `LacksText` if it is a row.
    """
    kind, compression = format_of(file.name)
    if kind == "parquet":
        for number, text in enumerate(read_column(file.path, config.text_field), start=1):
            yield f"{file.name}:{number}", _checked(text, config.text_field, f"{file.path}:{number}")
        return
    with _opened(file.path, compression) as stream:
        if kind == "lines":
            yield from _read_lines(stream, file, config.text_field)
        elif kind == "json":
            yield from _read_json(stream, file, config.text_field)
        else:
            yield from _read_text(stream.read(), file, config.document_separator)


@contextmanager
def _opened(path: Path, compression: str | None) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb") as raw:
            if compression == "gzip":
                with gzip.GzipFile(fileobj=raw) as stream:
                    yield cast(BinaryIO, stream)
            elif compression == "zstd":
                yield open_zstd(raw, path)
            else:
                yield raw
    except (OSError, EOFError, zlib.error) as error:  # gzip tells of damage in three ways
        raise ConfigError(f"'{path}' cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _decode(data: bytes, place: str) -> str:
    if b"\0" in data:
        raise ConfigError(f"'{place}' is not text: it holds NUL bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"'{place}' is not UTF-8 text: byte {data[error.start]:#04x} at {error.start}") from None


def _read_text(data: bytes, file: TextFile, separator: str | None) -> Iterator[Document]:
    """The whole file, or what lies between lines that hold the separator and nothing else."""
    text = _decode(data, str(file.path))
    if separator is None or separator not in text:
        yield file.name, text
        return
    lines = text.split("\n")
    ends = [number for number, line in enumerate(lines) if line.strip() == separator]
    if not ends:
        yield file.name, text
        return
    for start, end in itertools.pairwise([-1, *ends, len(lines)]):
        # A document keeps its last newline; nothing, or one empty line, between two separators is no document.
        part = "".join(f"{line}\n" for line in lines[start + 1:end])
        if end == len(lines):
            part = part[:-1]
        if part.strip():
            yield f"{file.name}:{start + 2}", part


def _read_lines(lines: Iterable[bytes], file: TextFile, field: str, first: int = 1) -> Iterator[Document]:
    """One document per line; blank lines are passed over but counted, so that ':line' is what an editor shows."""
    for number, line in enumerate(lines, start=first):
        if line.strip():
            place = f"{file.path}:{number}"
            row = _parse(_decode(line, place).removeprefix("\ufeff"), place)
            yield f"{file.name}:{number}", text_of(row, field, place)


def _read_json(stream: BinaryIO, file: TextFile, field: str) -> Iterator[Document]:
    """JSON lines, a list of rows, or one row."""
    number, first = next(((number, line) for number, line in enumerate(stream, start=1) if line.strip()), (1, b""))
    first = first.removeprefix(b"\xef\xbb\xbf")
    if not first.lstrip().startswith(b"[") and _is_json(first):
        yield from _read_lines(itertools.chain([first], stream), file, field, number)
        return
    text = _decode(b"\n" * (number - 1) + first + stream.read(), str(file.path))
    if text.lstrip(BLANKS).startswith("["):
        for number, (line, row) in enumerate(_parse_list(text, str(file.path)), start=1):
            yield f"{file.name}:{number}", text_of(row, field, f"{file.path}:{line}")
    elif text.strip(BLANKS):
        yield file.name, text_of(_parse(text, str(file.path)), field, str(file.path))


def _parse_list(text: str, place: str) -> Iterator[tuple[int, Any]]:
    """Each value of a JSON list and the line that it begins in."""
    at, line, decoder = text.index("[") + 1, 1 + text.count("\n", 0, text.index("[")), json.JSONDecoder()

    def skip(to: int) -> tuple[int, int]:
        found = NO_BLANK.search(text, to)
        after = found.start() if found else len(text)
        return after, line + text.count("\n", at, after)

    at, line = skip(at)
    if text[at:at + 1] == "]":
        at, line = skip(at + 1)
    else:
        mark = ","
        while mark == ",":
            row, end = _guarded(lambda start: decoder.raw_decode(text, start), at, f"{place}:{line}")
            yield line, row
            at, line = skip(end)
            mark = text[at:at + 1]
            if mark not in (",", "]"):
                raise ConfigError(f"'{place}:{line}' is not valid JSON: expected ',' or ']' after a row, got '{mark}'")
            at, line = skip(at + 1)
    if at < len(text):
        raise ConfigError(f"'{place}:{line}' is not valid JSON: something follows the list")


def _is_json(line: bytes) -> bool:
    """Whether a line is JSON as a whole, though it may hold what cannot be read."""
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    except (ValueError, RecursionError):
        return True
    return True


def _parse(text: str, place: str) -> Any:
    return _guarded(json.loads, text, place)


def _guarded(parse: Callable[[Any], Any], given: Any, place: str) -> Any:
    """What `parse` makes of `given`; whatever JSON can make Python's parser raise is refused in one line."""
    try:
        return parse(given)
    except json.JSONDecodeError as error:
        raise ConfigError(f"'{place}' is not valid JSON: {error.msg} (line {error.lineno} column {error.colno})") from None
    except RecursionError:
        raise ConfigError(f"'{place}' cannot be read as JSON: it is nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise ConfigError(f"'{place}' cannot be read as JSON: {error}") from None


def text_of(row: Any, field: str, place: str) -> str:
    """The text of a row that was read from `place`; an `Instruction` if the row has messages, or a prompt and a completion,
    instead of the field.

    Raises:
        ConfigError: if the row is no object, or its field is missing or no text.
    """
    if not isinstance(row, dict):
        raise LacksText(f"'{place}' must be a JSON object with the field '{field}': got {type(row).__name__}")
    if field not in row and is_instruction(row):
        return instruction_of(row, place, lambda value, name: _checked(value, name, place))
    if field not in row:
        raise LacksText(f"'{place}' lacks the field data.text_field = '{field}'.{near_match(field, row)}")
    return _checked(row[field], field, place)


def _checked(text: Any, field: str, place: str) -> str:
    if not isinstance(text, str):
        raise ConfigError(f"field '{field}' of '{place}' must be a string: got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(f"field '{field}' of '{place}' is not text: it holds a lone surrogate") from None
    return text
