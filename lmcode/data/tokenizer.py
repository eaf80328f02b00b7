"""Text to token ids and back. A tokenizer belongs to a model: it is saved with it and never replaced by another.

The only importer of `tokenizers`, and only for byte-level BPE; `ByteTokenizer` needs nothing. `tokenizer.json` holds a
tokenizer; beside it `tokenizer_config.json` names the end token, as Hugging Face does. Text never turns into a special
token: a document that contains '<|endoftext|>' is encoded as those characters, so it cannot end itself.

The end token of a foreign tokenizers file is, in this order: `eos_token` of the tokenizer_config.json beside it; the
first of `END_TOKENS` in its vocabulary; else '<|endoftext|>' is added to it as a new token.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from lmcode.config import ConfigError

END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|im_end|>", "<|eot_id|>", "[SEP]")
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
MIN_BPE_VOCAB = 257  # 256 bytes and the end token: nothing smaller can spell every text


class Tokenizer(Protocol):
    """What the project asks of a tokenizer. Ids lie in 0..vocab_size-1; `end_id` marks both ends of a document."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def end_id(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without end marks; decode(encode(text)) == text. ValueError for lone surrogates."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """encode() of each text, over all cores where that helps."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of any ids; special tokens and ids beyond the vocabulary (a model may have more) vanish, bytes that are not
        UTF-8 become U+FFFD."""
        ...

    def save(self, folder: str | Path) -> None:
        """Writes what `load_tokenizer(folder)` reads; makes the folder if need be."""
        ...


class ByteTokenizer:
    """Ids 0..255 are the bytes of the text's UTF-8 form, 256 is the end of a document."""

    vocab_size = 257
    end_id = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < self.end_id).decode("utf-8", errors="replace")

    def save(self, folder: str | Path) -> None:
        _save(Path(folder), {TOKENIZER_FILE: {"lmcode": "bytes"}})


class BPETokenizer:
    """A `tokenizers.Tokenizer`, ours (byte-level BPE, a verbatim round trip) or a foreign one (as verbatim as it is).

    Args:
        inner: the tokenizer; its truncation, padding and added start and end marks are switched off.
        end_token: its end-of-document token; found by the rule in the module's docstring when None.

    Raises:
        ConfigError: if `end_token` is not in the vocabulary, or none can be added because ids would collide.
    """

    def __init__(self, inner: Any, *, end_token: str | None = None) -> None:
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True  # spelled-out special tokens stay text; tokenizers does not save this
        self._inner = inner
        self.end_token = end_token if end_token is not None else _find_end_token(inner)
        ids = inner.get_vocab(with_added_tokens=True)
        if self.end_token not in ids:
            raise ConfigError(f"the end token must be in the tokenizer's vocabulary: got '{self.end_token}'")
        self.end_id: int = ids[self.end_token]
        self.vocab_size: int = max(ids.values()) + 1  # not the count: foreign vocabularies have gaps

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> BPETokenizer:
        """Learns byte-level BPE of at most `vocab_size` ids (fewer when `texts` runs out of pairs).

        Raises:
            ConfigError: if `vocab_size` is below 257 (256 bytes and the end token).
        """
        if vocab_size < MIN_BPE_VOCAB:
            raise ConfigError(f"byte-level BPE needs a vocabulary of at least {MIN_BPE_VOCAB}: got {vocab_size}")
        from tokenizers import Tokenizer as Inner
        from tokenizers import decoders, models, pre_tokenizers, trainers

        inner = Inner(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_TOKENS[0]], show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        inner.train_from_iterator(texts, trainer)
        return cls(inner)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            for text in texts:
                text.encode("utf-8")  # names the lone surrogate, as ByteTokenizer does
            raise
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self._inner.decode([int(i) for i in ids], skip_special_tokens=True)
        return text

    def save(self, folder: str | Path) -> None:
        _save(Path(folder), {TOKENIZER_FILE: json.loads(self._inner.to_str()), CONFIG_FILE: {"eos_token": self.end_token}})


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a folder written by `save`, or any tokenizers JSON file, or a folder that holds one as tokenizer.json.

    Raises:
        ConfigError: missing file, no JSON, JSON that is no tokenizer, or an end token that it does not know.
    """
    path = Path(path)
    file = path / TOKENIZER_FILE if path.is_dir() else path
    values = _read_json(file)
    if values == {"lmcode": "bytes"} or file.name == TOKENIZER_FILE and _is_bytes(file.with_name(CONFIG_FILE)):
        return ByteTokenizer()
    from tokenizers import Tokenizer as Inner

    try:
        inner = Inner.from_str(json.dumps(values))
    except Exception as error:  # tokenizers raises plain Exception
        raise ConfigError(f"'{file}' is not a tokenizers JSON file: {' '.join(str(error).split())}") from None
    try:
        return BPETokenizer(inner, end_token=_configured_end_token(file.with_name(CONFIG_FILE)))
    except ConfigError as error:
        raise ConfigError(f"'{file}': {error}") from None


def as_tokenizer(tokenizer: Any) -> Tokenizer:
    """A tokenizer of this module as it is, and a copy of one that is a `tokenizers.Tokenizer` or a Hugging Face tokenizer.

    Raises:
        ConfigError: for anything else (Hugging Face's slow tokenizers hold no `tokenizers.Tokenizer`), or an end token that
            the tokenizer does not know.
    """
    if all(hasattr(tokenizer, name) for name in ("encode", "encode_batch", "decode", "save", "end_id", "vocab_size")):
        ours: Tokenizer = tokenizer
        return ours
    inner = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(inner, "to_str"):
        raise ConfigError("a tokenizer must be one of lmcode's, a tokenizers.Tokenizer or a fast tokenizer of transformers: "
                          f"got {type(tokenizer).__name__}")
    from tokenizers import Tokenizer as Inner

    return BPETokenizer(Inner.from_str(inner.to_str()), end_token=getattr(tokenizer, "eos_token", None))


def same_tokenizer(one: Tokenizer, other: Tokenizer | None) -> bool:
    """Whether both give the same ids, as far as can be told from what they are."""
    if isinstance(one, BPETokenizer) and isinstance(other, BPETokenizer):
        return (one.end_token, one._inner.to_str()) == (other.end_token, other._inner.to_str())
    return one is other or isinstance(one, ByteTokenizer) and isinstance(other, ByteTokenizer)


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuses a tokenizer whose ids do not fit the model's embedding.

    Raises:
        ConfigError: if the tokenizer's vocabulary is larger than `vocab_size`.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError("model.vocab_size must be at least the tokenizer's vocabulary: "
                          f"{vocab_size} < {tokenizer.vocab_size}")


def save_for_transformers(tokenizer: Tokenizer, folder: str | Path, *, max_length: int) -> None:
    """`save`, in such a way that transformers' AutoTokenizer reads the same ids from the folder, bytes included.

    There a spelled-out end token is the end token, and batches are padded with it on the left.
    """
    folder = Path(folder)
    tokenizer.save(folder)
    values = {"eos_token": END_TOKENS[0], "lmcode": "bytes"}
    if isinstance(tokenizer, ByteTokenizer):
        _write_json(folder, TOKENIZER_FILE, _bytes_as_bpe())
    else:
        values = _read_json(folder / CONFIG_FILE)
    _write_json(folder, CONFIG_FILE, {**values, "pad_token": values["eos_token"], "padding_side": "left",
                                      "model_max_length": max_length, "tokenizer_class": "PreTrainedTokenizerFast"})


def _bytes_as_bpe() -> Any:
    """`ByteTokenizer` as the content of a tokenizers file: byte-level BPE that merges nothing."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers

    own = {*range(33, 127), *range(161, 173), *range(174, 256)}  # bytes that ByteLevel shows as themselves (GPT-2's table)
    others = [byte for byte in range(256) if byte not in own]
    inner = Inner(models.BPE({chr(byte if byte in own else 256 + others.index(byte)): byte for byte in range(256)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([END_TOKENS[0]])
    return json.loads(inner.to_str())


def _is_bytes(file: Path) -> bool:
    """Whether the tokenizer_config.json says that the tokenizer beside it is the `ByteTokenizer`."""
    values = _read_json(file) if file.is_file() else None
    return isinstance(values, dict) and values.get("lmcode") == "bytes"


def _find_end_token(inner: Any) -> str:
    vocab = inner.get_vocab(with_added_tokens=True)
    for token in END_TOKENS:
        if token in vocab:
            return token
    inner.add_special_tokens([END_TOKENS[0]])
    if inner.token_to_id(END_TOKENS[0]) in vocab.values():  # tokenizers counts tokens, which a gap in the ids fools
        raise ConfigError("the tokenizer has no known end token and gaps in its ids, so none can be added: "
                          f"name one as eos_token in a {CONFIG_FILE} beside it")
    return END_TOKENS[0]


def _configured_end_token(file: Path) -> str | None:
    """`eos_token` of a Hugging Face tokenizer_config.json, a string or an object with 'content'; None without one."""
    if not file.is_file():
        return None
    values = _read_json(file)
    token = values.get("eos_token") if isinstance(values, dict) else None
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None and not isinstance(token, str):
        raise ConfigError(f"eos_token in '{file}' must be a string: got {token!r}")
    return token


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no tokenizer file '{file}'") from None
    except (OSError, ValueError, RecursionError) as error:  # json and UTF-8 errors are ValueErrors
        raise ConfigError(f"'{file}' cannot be read as JSON: {error}") from None


def _save(folder: Path, contents: dict[str, Any]) -> None:
    """Writes files that are not there yet, or have this content already."""
    for name, values in contents.items():
        if os.path.lexists(folder / name) and _read_json(folder / name) != values:
            raise ConfigError(f"'{folder / name}' exists, with another content, and is not replaced: give another folder")
    for name, values in contents.items():
        if not os.path.lexists(folder / name):
            _write_json(folder, name, values)


def _write_json(folder: Path, name: str, values: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
