"""Text to a token file: splits off the held-out documents, trains the tokenizer, tokenizes everything once.

A prepared corpus is a folder named by the fingerprint of everything that decided its content. It is written beside its
place and renamed into it, so it exists whole or not at all, and a second call only opens it:

    <fingerprint>/meta.json                      counts, dtype, digest of the tokens
                  tokenizer/                     what `load_tokenizer` reads
                  {train,held_out}.tokens        uint16 or uint32, native order: [end] text [end] of each document
                  {train,held_out}.offsets.npy   int64, where each document starts, and the end of the last
                  {train,held_out}.names.json    relative path of each document, with ':line' for JSONL

Which side a document falls on is decided by a hash of its name, so it depends on no order, machine or neighbour (but
for the rule that neither side stays empty). Any process may call `prepare_corpus` at any time; to do the work only
once, let one go first.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import stat
import uuid
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmcode.config import ConfigError, DataConfig, RunConfig, expanded, near_match
from lmcode.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, check_vocab, load_tokenizer
from lmcode.train.sources import Document, Source, open_source

log = logging.getLogger("lmcode")

FORMAT = 1
SIDES = ("train", "held_out")
SAMPLE_CHARACTERS = 8_000_000  # of training text that BPE learns from
PIECE_CHARACTERS = 16_384  # unit in which that sample is spread over the text
CHUNK_CHARACTERS = 1_000_000  # of text tokenized in one call

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Documents:
    """Token sequences of one side of a corpus.

    tokens: uint16 or uint32, memory-mapped; all documents one after the other, each [end] text [end].
    offsets: int64, len(self) + 1 ascending positions in `tokens`.
    names: one for each document.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def document(self, index: int) -> np.ndarray:
        """All tokens of one document, both end marks included; a view."""
        return self.tokens[self.offsets[index]:self.offsets[index + 1]]

    @property
    def end_id(self) -> int:
        """The end mark, which every document starts with."""
        return int(self.tokens[0])


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus, opened.

    meta: its title and counts: documents, characters, skipped_files; and for each side documents, tokens, bytes of text
        and left_out (too short). `meta["digest"]` is equal on two machines if and only if their tokens are.
    """

    train: Documents
    held_out: Documents
    tokenizer: Tokenizer
    folder: Path
    meta: dict[str, Any]

    def describe(self) -> str:
        """One line for a person."""
        train, held_out = self.meta["train"], self.meta["held_out"]
        too_short = train["left_out"] + held_out["left_out"]
        return (f"{self.meta['title']}: {train['documents']:,} documents, {train['tokens']:,} tokens to train on, "
                f"{held_out['documents']:,} documents, {held_out['tokens']:,} tokens held out, "
                f"{too_short:,} documents too short, {self.meta['skipped_files']:,} files not text; "
                f"vocabulary {self.tokenizer.vocab_size:,}, {train['bytes'] / train['tokens']:.2f} bytes per token")


def load_corpus(config: RunConfig, progress: Progress | None = None) -> Corpus:
    """The tokenized corpus of a run, prepared unless it already is; in `data.cache`, or runs/corpora beside the runs."""
    folder = expanded("data.cache", config.data.cache) if config.data.cache else Path("runs") / "corpora"
    return prepare_corpus(config.data, vocab_size=config.model.vocab_size, folder=folder, progress=progress)


def prepare_corpus(config: DataConfig, *, vocab_size: int, folder: Path, progress: Progress | None = None) -> Corpus:
    """Opens the tokenized corpus that `config` describes; makes it first, under `folder`, if it is not there.

    Args:
        config: the data section of a run.
        vocab_size: of the model; BPE is trained to this size, any other tokenizer must fit into it.
        folder: where prepared corpora are kept; shared by runs, safe for several processes at once.
        progress: called with (documents done, documents in all) while tokenizing; what it raises ends the preparation.

    Raises:
        ConfigError: if the source is missing, empty, not text, lacks the text field, or is too small to split; if the
            tokenizer cannot be read or does not fit; if the prepared corpus was damaged.
    """
    source = open_source(config)
    home = Path(folder) / _fingerprint(config, source, vocab_size)
    if not _is_there(home):
        draft = home.with_name(f".preparing-{uuid.uuid4().hex}")
        try:
            draft.mkdir(parents=True)
            _prepare(config, source, vocab_size, draft, progress)
            _move_into_place(draft, home)
        except OSError as error:
            raise ConfigError(f"the tokenized corpus cannot be kept in '{folder}', the folder that data.cache names: "
                              f"{error.strerror or error}") from None
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return _open(home)


def _is_there(home: Path) -> bool:
    """Whether a corpus is prepared; ConfigError if the folder does not let us see that."""
    try:
        return stat.S_ISREG(os.stat(home / "meta.json").st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise ConfigError(f"'{home.parent}', the folder that data.cache names, cannot be read: {error.strerror}") from None


def _prepare(config: DataConfig, source: Source, vocab_size: int, home: Path, progress: Progress | None) -> None:
    threshold, documents, characters = _survey(source, config.held_out_share)
    if source.skipped:
        names = ", ".join(sorted(source.skipped))
        log.warning("skipped %d files that are not UTF-8 text: %s", len(source.skipped), names)
    tokenizer = _make_tokenizer(config.tokenizer, source, vocab_size, threshold, characters)
    check_vocab(tokenizer, vocab_size)
    _save(tokenizer, home / "tokenizer")
    sides = {side: _SideWriter(home / side, tokenizer, config.min_document_tokens) for side in SIDES}
    done = 0
    for chunk in _chunks(source.read()):
        sides["train"].add([document for document in chunk if _hash(document[0]) >= threshold])
        sides["held_out"].add([document for document in chunk if _hash(document[0]) < threshold])
        done += len(chunk)
        if progress:
            progress(done, documents)
    counts = {side: writer.finish(side) for side, writer in sides.items()}
    meta = {"format": FORMAT, "title": source.title, "dtype": sides["train"].dtype.name, "digest": _digest(home),
            "documents": documents, "characters": characters, "skipped_files": len(source.skipped), **counts}
    (home / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _save(tokenizer: Tokenizer, folder: Path) -> None:
    """`tokenizer.save`, whose plain Exception for what the file system refuses becomes an OSError."""
    try:
        tokenizer.save(folder)
    except OSError:
        raise
    except Exception as error:  # of the tokenizers package
        raise OSError(str(error)) from None


def _survey(source: Source, held_out_share: float) -> tuple[int, int, int]:
    """Reads everything once, so that refusals come before the work: (threshold of the split, documents, characters).

    A document is held out if the hash of its name is below the threshold: the share of the hash's range, moved just so
    far that the smallest hash lies below it and the largest does not.
    """
    documents = characters = 0
    smallest, largest = 2**64, -1
    for name, text in source.read():
        documents += 1
        characters += len(text)
        if text:  # an empty document will be left out and must not be a side's only one
            smallest, largest = min(smallest, _hash(name)), max(largest, _hash(name))
    if largest < 0:
        raise ConfigError(f"the corpus {source.title} is empty: {documents} documents without any text")
    if smallest == largest:
        raise ConfigError(f"the corpus {source.title} needs at least 2 documents with text, one to train on and one to "
                          "hold out: got 1 (a text file is one document, a JSONL file one per line)")
    return min(max(int(held_out_share * 2**64), smallest + 1), largest), documents, characters


def _make_tokenizer(setting: str, source: Source, vocab_size: int, threshold: int, characters: int) -> Tokenizer:
    if setting == "bytes":
        return ByteTokenizer()
    if setting == "bpe":
        training = (text for name, text in source.read() if _hash(name) >= threshold)
        return BPETokenizer.train(_sample(training, min(1.0, SAMPLE_CHARACTERS / characters)), vocab_size)
    return load_tokenizer(_tokenizer_path(setting))


def _tokenizer_path(setting: str) -> Path:
    path = expanded("data.tokenizer", setting)
    if not path.exists():
        raise ConfigError("data.tokenizer must be 'bytes', 'bpe', or an existing tokenizers JSON file or folder: "
                          f"got '{setting}'.{near_match(setting, ('bytes', 'bpe'))}")
    return path


def _sample(texts: Iterable[str], share: float) -> Iterator[str]:
    """Pieces spread evenly over `texts`, never more than `share` of the characters that went by."""
    seen = taken = 0
    for text in texts:
        for start in range(0, len(text), PIECE_CHARACTERS):
            piece = text[start:start + PIECE_CHARACTERS]
            seen += len(piece)
            if taken + len(piece) <= share * seen:
                taken += len(piece)
                yield piece


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document[1])
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class _SideWriter:
    """Appends the tokens of documents to the files of one side."""

    def __init__(self, stem: Path, tokenizer: Tokenizer, min_tokens: int) -> None:
        self._stem, self._tokenizer, self._min_tokens = stem, tokenizer, min_tokens
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
        self._offsets = array("q", [0])
        self._names: list[str] = []
        self._left_out = self._bytes = 0

    def add(self, documents: Sequence[Document]) -> None:
        encoded = self._tokenizer.encode_batch([text for _, text in documents])
        end = self._tokenizer.end_id
        with open(f"{self._stem}.tokens", "ab") as file:
            for (name, text), ids in zip(documents, encoded, strict=True):
                if len(ids) < self._min_tokens:
                    self._left_out += 1
                    continue
                np.array([end, *ids, end], dtype=self.dtype).tofile(file)
                self._offsets.append(self._offsets[-1] + len(ids) + 2)
                self._names.append(name)
                self._bytes += len(text.encode("utf-8"))

    def finish(self, side: str) -> dict[str, int]:
        """Writes the rest of the side's files and returns its counts; refuses a side without documents."""
        if not self._names:
            raise ConfigError(f"every {side} document is shorter than data.min_document_tokens = {self._min_tokens}: "
                              f"{self._left_out} were left out and none remains")
        if self._left_out:
            log.warning("left out %d %s documents shorter than %d tokens", self._left_out, side, self._min_tokens)
        np.save(f"{self._stem}.offsets.npy", np.frombuffer(self._offsets, dtype=np.int64))
        Path(f"{self._stem}.names.json").write_text(json.dumps(self._names), encoding="utf-8")
        return {"documents": len(self._names), "tokens": self._offsets[-1], "bytes": self._bytes,
                "left_out": self._left_out}


def _move_into_place(draft: Path, home: Path) -> None:
    """Makes `draft` durable and renames it to `home`; if another process was faster, its corpus stays."""
    for path in (*(file for file in draft.rglob("*") if file.is_file()), draft):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    try:
        draft.rename(home)
    except OSError:
        if not (home / "meta.json").is_file():
            raise


def _open(home: Path) -> Corpus:
    meta = json.loads((home / "meta.json").read_text(encoding="utf-8"))
    sides = {}
    for side in SIDES:
        expected, size = meta[side]["tokens"], (home / f"{side}.tokens").stat().st_size
        if size != expected * np.dtype(meta["dtype"]).itemsize:
            raise ConfigError(f"the prepared corpus '{home}' is damaged, delete it: {side}.tokens should hold "
                              f"{expected} tokens of {meta['dtype']} and has {size} bytes")
        tokens = np.memmap(home / f"{side}.tokens", dtype=meta["dtype"], mode="r")
        names = json.loads((home / f"{side}.names.json").read_text(encoding="utf-8"))
        sides[side] = Documents(tokens, np.load(home / f"{side}.offsets.npy"), names)
    return Corpus(sides["train"], sides["held_out"], load_tokenizer(home / "tokenizer"), home, meta)


def _hash(name: str) -> int:
    """64 bits of a name, the same on every machine (file names may hold bytes that are no UTF-8)."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big")


def _digest(home: Path) -> str:
    total = hashlib.blake2b(digest_size=16)
    for side in SIDES:
        for suffix in (".offsets.npy", ".tokens"):
            with open(home / f"{side}{suffix}", "rb") as file:
                while block := file.read(1 << 20):
                    total.update(block)
    return total.hexdigest()


def _fingerprint(config: DataConfig, source: Source, vocab_size: int) -> str:
    tokenizer = config.tokenizer
    if tokenizer not in ("bytes", "bpe"):
        path = _tokenizer_path(tokenizer)
        files = sorted((path if path.is_dir() else path.parent).glob("tokenizer*.json")) + [path] * path.is_file()
        tokenizer = "".join(hashlib.blake2b(file.read_bytes()).hexdigest() for file in files)
    decided = [FORMAT, source.identity, tokenizer, vocab_size, config.held_out_share, config.min_document_tokens]
    return hashlib.blake2b(json.dumps(decided).encode(), digest_size=12).hexdigest()
