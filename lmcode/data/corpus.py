"""Text to a token file: splits off the held-out documents, trains the tokenizer, tokenizes everything once.

A prepared corpus is a folder named by the fingerprint of everything that decided its content. It is written to a temporary
folder and renamed, so it exists whole or not at all, and a second call only opens it:

    <fingerprint>/meta.json                      counts, dtype, digest of the tokens
                  tokenizer/                     what `load_tokenizer` reads
                  {train,held_out}.tokens        uint16 or uint32, native order: [end] text [end] of each document
                  {train,held_out}.offsets.npy   int64, where each document starts, and the end of the last
                  {train,held_out}.names.json    relative path of each document, with ':line' for JSONL
                  {train,held_out}.counted       uint8 for each token, 1 if it is a target; of instruction data only

Whether a document is held out is decided by a hash of its name, so it depends neither on the order of the files, nor on the
machine, nor on other documents (except that neither part may stay empty). Of a single text file the end is held out instead;
and `data.held_out` names the held-out documents explicitly. Any process may call `prepare_corpus` at any time; to do the
work only once, let one process finish it before the others call.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from lmcode.config import ConfigError, DataConfig, RunConfig, SourceConfig, TextConfig, expanded, near_match
from lmcode.data.formats import Document
from lmcode.data.instructions import parts_of
from lmcode.data.sources import Source, open_held_out, open_source
from lmcode.data.text_files import PassedOver
from lmcode.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, check_vocab, load_tokenizer
from lmcode.files import durable

log = logging.getLogger("lmcode")

FORMAT = 2
SIDES = ("train", "held_out")
SAMPLE_CHARACTERS = 8_000_000  # of training text that BPE learns from
PIECE_CHARACTERS = 16_384  # unit in which that sample is spread over the text
CHUNK_CHARACTERS = 1_000_000  # of text tokenized in one call

Progress = Callable[[int, int], None]
Placed = tuple[str, str, str]  # name, text, side


@dataclass(frozen=True)
class Documents:
    """Token sequences of one side of a corpus.

    tokens: uint16 or uint32, memory-mapped; all documents one after the other, each [end] text [end].
    offsets: int64, len(self) + 1 ascending positions in `tokens`.
    names: one for each document.
    sources: by name, how many documents each source has; one follows the other. None: there is one, without a name.
    counted: uint8, like `tokens`, 1 for those that are targets. None: all are.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    names: Sequence[str]
    sources: Mapping[str, int] | None = None
    counted: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def document(self, index: int) -> np.ndarray:
        """All tokens of one document, both end marks included; a view."""
        return self.tokens[self.offsets[index]:self.offsets[index + 1]]

    def num_counted(self, start: int, end: int) -> int:
        """How many of the tokens from `start` to `end` are targets."""
        return end - start if self.counted is None else int(np.count_nonzero(self.counted[start:end]))

    def identity(self, index: int) -> int:
        """63 bits that stand for what a document says: equal for equal tokens, in any corpus and on any machine. Computed
        when it is first asked for."""
        if index not in self._identities:
            tokens = np.ascontiguousarray(self.document(index), dtype="<i8")
            digest = hashlib.blake2b(tokens.data, digest_size=8).digest()
            self._identities[index] = int.from_bytes(digest, "little") >> 1
        return self._identities[index]

    @cached_property
    def _identities(self) -> dict[int, int]:
        return {}

    @property
    def end_id(self) -> int:
        """The end mark, which every document starts with."""
        return int(self.tokens[0])


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus, opened.

    meta: its title; how it was split; counts of documents and characters; names of what was passed over, by reason; and for
        each side documents, tokens, bytes of text and left_out (too short). `meta["digest"]` is equal on two machines if
        and only if their tokens are.
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
        sources = ", ".join(f"{name} {tokens:,}" for name, (_, tokens) in train["sources"].items() if name)
        answers = f", {train['counted']:,} of them targets" if "counted" in train else ""
        return (f"{self.meta['title']}: {train['documents']:,} documents, {train['tokens']:,} tokens to train on"
                f"{f' ({sources})' if sources else ''}{answers}, "
                f"{held_out['documents']:,} documents, {held_out['tokens']:,} tokens held out ({self.meta['split']}), "
                f"{too_short:,} documents too short, {self.passed_over.describe()}; "
                f"vocabulary {self.tokenizer.vocab_size:,}, {train['bytes'] / train['tokens']:.2f} bytes per token")

    @property
    def passed_over(self) -> PassedOver:
        """What was not read, and why."""
        return PassedOver(self.meta["passed_over"])


def load_corpus(config: RunConfig, progress: Progress | None = None, *, whole: bool = False) -> Corpus:
    """The tokenized corpus of a run, prepared unless it already is; in `data.cache`, or runs/corpora beside the runs."""
    folder = expanded("data.cache", config.data.cache) if config.data.cache else Path("runs") / "corpora"
    return prepare_corpus(config.data, vocab_size=config.model.vocab_size, folder=folder, progress=progress, whole=whole)


def prepare_corpus(config: DataConfig, *, vocab_size: int, folder: Path, progress: Progress | None = None,
                   whole: bool = False) -> Corpus:
    """Opens the tokenized corpus that `config` describes; makes it first, under `folder`, if it is not there.

    Args:
        config: the data section of a run.
        vocab_size: of the model; BPE is trained to this size, any other tokenizer must fit into it.
        folder: where prepared corpora are kept; shared by runs, safe for several processes at once.
        progress: called with (documents done, documents in all) while tokenizing; what it raises ends the preparation.
        whole: hold out every document of `config`, for text that a model is only measured on.

    Raises:
        ConfigError: if the source is missing, empty, not text, lacks the text field, or is too small to split; if the
            tokenizer cannot be read or does not fit; if the prepared corpus was damaged.
    """
    splits = {part.name if isinstance(part, SourceConfig) else "": _open_split(part, config.held_out_share, whole)
              for part in config.sources or (config,)}
    home = Path(folder) / _fingerprint(config, splits, vocab_size)
    if not _is_there(home):
        draft = home.with_name(f".preparing-{uuid.uuid4().hex}")
        try:
            draft.mkdir(parents=True)
            _prepare(config, splits, vocab_size, draft, progress)
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


def _prepare(config: DataConfig, splits: Mapping[str, Split], vocab_size: int, home: Path,
             progress: Progress | None) -> None:
    documents, characters = (sum(sizes) for sizes in zip(*(split.survey() for split in splits.values()), strict=True))
    tokenizer = _make_tokenizer(config.tokenizer, splits.values(), vocab_size, characters)
    check_vocab(tokenizer, vocab_size)
    _save(tokenizer, home / "tokenizer")
    sides = {side: _SideWriter(home / side, tokenizer, config.min_document_tokens) for side in SIDES}
    done = 0
    for source, split in splits.items():
        prefix = f"{source}/" if source else ""
        for chunk in _chunks(split.read()):
            for side, writer in sides.items():
                writer.add(source, [(prefix + name, text) for name, text, its_side in chunk if its_side == side])
            done += len(chunk)
            if progress:
                progress(done, documents)
    counts = {side: writer.finish(side, needed=[name for name, split in splits.items() if side in split.sides])
              for side, writer in sides.items()}
    meta = {"format": FORMAT, "dtype": sides["train"].dtype.name, "digest": _digest(home), "documents": documents,
            "characters": characters, **_about(splits), **counts}
    (home / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _save(tokenizer: Tokenizer, folder: Path) -> None:
    """`tokenizer.save`, whose plain Exception for what the file system refuses becomes an OSError."""
    try:
        tokenizer.save(folder)
    except OSError:
        raise
    except Exception as error:  # of the tokenizers package
        raise OSError(str(error)) from None


def _about(splits: Mapping[str, Split]) -> dict[str, Any]:
    """What a person wants to know of where documents come from: titles, rules, and what was passed over."""
    labels = {name: f"{name}: " if name else "" for name in splits}
    passed_over: dict[str, list[str]] = {}
    for name, split in splits.items():
        for reason, names in split.passed_over().as_json().items():
            passed_over.setdefault(reason, []).extend(labels[name] + one for one in names)
    return {"title": "; ".join(labels[name] + split.title for name, split in splits.items()),
            "split": "; ".join(labels[name] + split.rule for name, split in splits.items()), "passed_over": passed_over}


class Split:
    """The documents of a corpus, each with the side that it falls on; known after `survey`.

    rule: how the sides were told apart, for a person.
    sides: those that must not stay empty.
    """

    sides: Sequence[str] = SIDES
    rule = "named by data.held_out"

    def __init__(self, source: Source, held_out: Source | None, share: float) -> None:
        self._source, self._held_out, self._share = source, held_out, share
        self.title = source.title

    @property
    def identity(self) -> list[Any]:
        """Changes whenever a document or its side does."""
        held_out = None if self._held_out is None else self._held_out.identity
        return [type(self).__name__, self._source.identity, held_out, self._share]

    def passed_over(self) -> PassedOver:
        """What neither side has read, and why."""
        both = PassedOver(self._source.passed_over.as_json())
        for reason, names in (self._held_out.passed_over.as_json() if self._held_out else {}).items():
            for name in names:
                both.add(reason, name)
        return both

    def survey(self) -> tuple[int, int]:
        """Reads everything once, so that refusals come before the work: documents and characters."""
        sizes = [(name, len(text)) for name, text, _ in self._all()]
        if not any(size for _, size in sizes):
            passed_over = self.passed_over()
            reason = f"; {passed_over.describe()}" if len(passed_over) else ""
            raise ConfigError(f"the corpus {self.title} is empty: {len(sizes)} documents without any text{reason}")
        self._decide(sizes)
        return len(sizes), sum(size for _, size in sizes)

    def _all(self) -> Iterator[Placed]:
        """Every document, with the side that is known before anything is decided."""
        yield from ((name, text, "train") for name, text in self._source.read())
        if self._held_out is not None:
            yield from ((name, text, "held_out") for name, text in self._held_out.read())

    def _decide(self, sizes: Sequence[tuple[str, int]]) -> None:
        """What a split finds out from the names and characters of all documents."""

    def read(self) -> Iterator[Placed]:
        """Every document and its side."""
        return self._all()


class HashSplit(Split):
    """A document is held out if the hash of its name is below a threshold: the share of the hash's range, moved just so
    far that the smallest hash lies below it and the largest does not."""

    def _decide(self, sizes: Sequence[tuple[str, int]]) -> None:
        hashes = [_hash(name) for name, size in sizes if size]  # an empty document must not be a side's only one
        smallest, largest = min(hashes), max(hashes)
        if smallest == largest:
            raise ConfigError(f"the corpus {self.title} needs at least 2 documents with text, one to train on and one to "
                              "hold out: got 1 (a line of JSON is one document)")
        self._threshold = min(max(int(self._share * 2**64), smallest + 1), largest)
        self.rule = f"{self._share:.3g} of the documents, by their names"

    def read(self) -> Iterator[Placed]:
        for name, text, _ in self._all():
            yield name, text, "held_out" if _hash(name) < self._threshold else "train"


class EndSplit(Split):
    """The end of one text file is held out: its last documents, or the last part of its only one."""

    def _decide(self, sizes: Sequence[tuple[str, int]]) -> None:
        kept = [(name, size) for name, size in sizes if size]
        before = np.cumsum([0, *(size for _, size in kept)])
        wanted = before[-1] * (1 - self._share)
        self._cut_name: str | None = None
        if len(kept) > 1:
            first = 1 + int(np.abs(before[1:-1] - wanted).argmin())
            self._held_out_names = {name for name, _ in kept[first:]}
            self.rule = f"the last {len(kept) - first:,} documents of the file, {1 - before[first] / before[-1]:.1%} of it"
            return
        if kept[0][1] < 2:
            raise ConfigError(f"the corpus {self.title} has one character: too little to train on and to hold out")
        self._cut_name, self._cut = kept[0][0], min(max(1, round(float(wanted))), kept[0][1] - 1)
        self.rule = f"the end of the file, {1 - self._cut / kept[0][1]:.1%} of it, of which it is the only document"

    def read(self) -> Iterator[Placed]:
        for name, text, side in self._all():
            if name != self._cut_name:
                yield name, text, "held_out" if self._cut_name is None and name in self._held_out_names else side
                continue
            cut = _boundary_near(text, self._cut)
            yield name, text[:cut], "train"
            yield f"{name} (end)", text[cut:], "held_out"


class WholeSplit(Split):
    """Everything is held out."""

    sides = ("held_out",)
    rule = "everything"

    def read(self) -> Iterator[Placed]:
        return ((name, text, "held_out") for name, text, _ in self._all())


def _open_split(config: TextConfig, share: float, whole: bool) -> Split:
    source = open_source(config, whole=whole)
    if whole:
        return WholeSplit(source, None, share)
    if (held_out := open_held_out(config)) is not None:
        return Split(source, held_out, share)
    return (EndSplit if source.is_text else HashSplit)(source, None, share)


def _boundary_near(text: str, place: int) -> int:
    """The start of a paragraph, line or word near `place`, within a tenth of what lies behind it; else `place`."""
    reach = max(1, min(place, len(text) - place) // 10)
    start, end = place - reach, min(place + reach, len(text) - 1)
    for mark in ("\n\n", "\n", " "):
        after = [found + len(mark) for found in (text.rfind(mark, start, place), text.find(mark, place, end)) if found >= 0]
        after = [cut for cut in after if 0 < cut < len(text)]
        if after:
            return min(after, key=lambda cut: abs(cut - place))
    return place


def _make_tokenizer(setting: str, splits: Iterable[Split], vocab_size: int, characters: int) -> Tokenizer:
    if setting == "bytes":
        return ByteTokenizer()
    if setting == "bpe":
        training = (text for split in splits for _, text, side in split.read() if side == "train")
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


def _chunks(documents: Iterable[Placed]) -> Iterator[list[Placed]]:
    chunk: list[Placed] = []
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
        self._counted: int | None = None  # targets; None: all tokens are, so far
        self._sources: dict[str, list[int]] = {}  # documents and tokens of each

    def add(self, source: str, documents: Sequence[Document]) -> None:
        """Writes documents of a source; those of one come together."""
        counted = self._sources.setdefault(source, [0, 0])
        # Part by part, so that no token is half prompt and half answer, and a prompt has the tokens it has by itself.
        encoded = iter(self._tokenizer.encode_batch([part for _, text in documents for part, _ in parts_of(text)]))
        end = self._tokenizer.end_id
        with open(f"{self._stem}.tokens", "ab") as file:
            for name, text in documents:
                parts = [(next(encoded), learned) for _, learned in parts_of(text)]
                ids = list(chain.from_iterable(ids for ids, _ in parts))
                if len(ids) < self._min_tokens:
                    self._left_out += 1
                    continue
                np.array([end, *ids, end], dtype=self.dtype).tofile(file)
                self._mark([len(ids) for ids, _ in parts], [learned for _, learned in parts])
                self._offsets.append(self._offsets[-1] + len(ids) + 2)
                self._names.append(name)
                counted[0] += 1
                counted[1] += len(ids) + 2
                self._bytes += len(text.encode("utf-8"))

    def _mark(self, lengths: Sequence[int], learned: Sequence[bool]) -> None:
        """Writes which tokens of the next document are targets, from the first document on of which some are not."""
        if self._counted is None and all(learned):
            return
        before = self._offsets[-1] if self._counted is None else 0  # all targets
        document = np.repeat(np.array([True, *learned, learned[-1]], dtype=np.uint8), [1, *lengths, 1])
        with open(f"{self._stem}.counted", "ab") as file:
            for start in range(0, before, CHUNK_CHARACTERS):
                np.ones(min(CHUNK_CHARACTERS, before - start), dtype=np.uint8).tofile(file)
            document.tofile(file)
        self._counted = (self._counted or 0) + before + int(document.sum())

    def finish(self, side: str, *, needed: Sequence[str]) -> dict[str, Any]:
        """Writes the rest of the side's files and returns its counts; refuses a `needed` source without documents."""
        for source in needed:
            if not self._sources.get(source, (0, 0))[0]:
                of_it = f" of {source}" if source else ""
                raise ConfigError(f"every {side} document{of_it} is shorter than data.min_document_tokens = "
                                  f"{self._min_tokens}: {self._left_out} were left out and none remains")
        if self._left_out:
            log.warning("left out %d %s documents shorter than %d tokens", self._left_out, side, self._min_tokens)
        np.save(f"{self._stem}.offsets.npy", np.frombuffer(self._offsets, dtype=np.int64))
        Path(f"{self._stem}.names.json").write_text(json.dumps(self._names), encoding="utf-8")
        return {"documents": len(self._names), "tokens": self._offsets[-1], "bytes": self._bytes,
                "left_out": self._left_out, "sources": self._sources,
                **({} if self._counted is None else {"counted": self._counted})}


def _move_into_place(draft: Path, home: Path) -> None:
    """Makes `draft` durable and renames it to `home`; if another process was faster, its corpus stays."""
    for path in (*(file for file in draft.rglob("*") if file.is_file()), draft):
        durable.sync(path)
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
        tokens = (np.memmap(home / f"{side}.tokens", dtype=meta["dtype"], mode="r") if expected  # an empty file has no map
                  else np.empty(0, dtype=meta["dtype"]))
        names = json.loads((home / f"{side}.names.json").read_text(encoding="utf-8"))
        counted = None
        if "counted" in meta[side]:
            if not (home / f"{side}.counted").is_file() or (home / f"{side}.counted").stat().st_size != expected:
                raise ConfigError(f"the prepared corpus '{home}' is damaged, delete it: {side}.counted should hold a byte "
                                  f"for each of {expected} tokens")
            counted = np.memmap(home / f"{side}.counted", dtype=np.uint8, mode="r")
        sources = {name: documents for name, (documents, _) in meta[side]["sources"].items() if name}
        sides[side] = Documents(tokens, np.load(home / f"{side}.offsets.npy"), names, sources or None,
                                counted)
    return Corpus(sides["train"], sides["held_out"], load_tokenizer(home / "tokenizer"), home, meta)


def _hash(name: str) -> int:
    """64 bits of a name, the same on every machine (file names may hold bytes that are no UTF-8)."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big")


def _digest(home: Path) -> str:
    total = hashlib.blake2b(digest_size=16)
    for side in SIDES:
        files = [home / f"{side}{suffix}" for suffix in (".offsets.npy", ".tokens", ".counted")]
        for path in (path for path in files if path.exists()):
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    total.update(block)
    return total.hexdigest()


def _fingerprint(config: DataConfig, splits: Mapping[str, Split], vocab_size: int) -> str:
    tokenizer = config.tokenizer
    if tokenizer not in ("bytes", "bpe"):
        path = _tokenizer_path(tokenizer)
        files = sorted((path if path.is_dir() else path.parent).glob("tokenizer*.json")) + [path] * path.is_file()
        tokenizer = "".join(hashlib.blake2b(file.read_bytes()).hexdigest() for file in files)
    identities = {name: split.identity for name, split in splits.items()}
    decided = [FORMAT, identities, tokenizer, vocab_size, config.min_document_tokens]
    return hashlib.blake2b(json.dumps(decided).encode(), digest_size=12).hexdigest()
