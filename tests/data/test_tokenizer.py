"""A tokenizer returns text verbatim, never chokes on ids of its vocabulary, and says what is wrong with a file."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inner
from tokenizers import models, pre_tokenizers, processors, trainers

from lmcode import LMCODE, LMCODEConfig, MemoryDataset
from lmcode.config import ConfigError
from lmcode.data.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    as_tokenizer,
    check_vocab,
    load_tokenizer,
    same_tokenizer,
    save_for_transformers,
)

TEXTS = ["def f(x):\n    return x + 1\n" * 20, "the cat sat on the mat, the dog on the log " * 20, "naïve 😀 日本語"]
BPE = BPETokenizer.train(TEXTS, 300)
BOTH = pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])


def word_level(words: list[str]) -> Inner:
    return Inner(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))


@BOTH
@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_round_trip_is_verbatim(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.end_id not in ids


@BOTH
@pytest.mark.parametrize("text", [
    "", " ", "\n", "\0", "   \t\n  ", "😀👩‍👩‍👧", "a\r\nb\r", "\ufeffx", "<|endoftext|>", "a </s>b"])
def test_round_trip_of_odd_texts(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.end_id not in tokenizer.encode(text)


@BOTH
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_decode_takes_any_ids_of_the_vocabulary(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    assert isinstance(tokenizer.decode(ids), str)
    tokenizer.decode(ids).encode("utf-8")  # printable: no lone surrogates


@BOTH
def test_end_marks_vanish_and_batches_equal_single_texts(tokenizer):
    ids = tokenizer.encode(TEXTS[0])
    assert tokenizer.decode([tokenizer.end_id, *ids, tokenizer.end_id]) == TEXTS[0]
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_batch([]) == []


@BOTH
def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(ValueError, match="surrogates"):
        tokenizer.encode("a\ud800")


@BOTH
def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "deep" / "folder")
    for path in (tmp_path / "deep" / "folder", tmp_path / "deep" / "folder" / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert type(loaded) is type(tokenizer)
        assert (loaded.vocab_size, loaded.end_id) == (tokenizer.vocab_size, tokenizer.end_id)
        text = "".join(TEXTS) + "<|endoftext|>"
        assert loaded.encode(text) == tokenizer.encode(text)


def test_training_shortens_text_keeps_to_its_size_and_repeats():
    assert BPE.vocab_size == 300
    assert len(BPE.encode(TEXTS[0])) < len(ByteTokenizer().encode(TEXTS[0])) / 2
    again = BPETokenizer.train(TEXTS, 300)
    assert all(again.encode(text) == BPE.encode(text) for text in TEXTS)
    assert BPETokenizer.train(["ab"], 1000).vocab_size < 1000


def test_training_below_the_byte_alphabet_is_refused():
    with pytest.raises(ConfigError, match="at least 257: got 256"):
        BPETokenizer.train(TEXTS, 256)


@pytest.mark.parametrize(("words", "end_id", "vocab_size"), [(["a", "</s>", "b"], 1, 3), (["a", "b"], 2, 3)])
def test_end_token_of_a_foreign_file_is_known_or_added(tmp_path, words, end_id, vocab_size):
    word_level(words).save(str(tmp_path / "foreign.json"))
    tokenizer = load_tokenizer(tmp_path / "foreign.json")
    assert (tokenizer.end_id, tokenizer.vocab_size) == (end_id, vocab_size)
    tokenizer.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").end_id == end_id


@pytest.mark.parametrize("eos", ["b", {"content": "b"}])
def test_configured_end_token_wins(tmp_path, eos):
    word_level(["a", "</s>", "b"]).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    assert load_tokenizer(tmp_path).end_id == 2


@pytest.mark.parametrize(("eos", "message"), [("nope", "vocabulary: got 'nope'"), (7, "must be a string: got 7")])
def test_impossible_end_token_is_refused(tmp_path, eos, message):
    word_level(["a", "b"]).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(tmp_path)


def test_vocabulary_with_gaps_counts_to_its_largest_id():
    gaps = Inner(models.WordLevel({"a": 0, "</s>": 5, "b": 9}, unk_token="a"))
    tokenizer = BPETokenizer(gaps)
    assert tokenizer.vocab_size == 10
    assert isinstance(tokenizer.decode(range(10)), str)
    with pytest.raises(ConfigError, match="gaps"):
        BPETokenizer(Inner(models.WordLevel({"a": 0, "b": 2}, unk_token="a")))


def test_foreign_truncation_padding_and_marks_are_off():
    inner = word_level(["a", "</s>"])
    inner.enable_truncation(2)
    inner.enable_padding(length=8)
    inner.post_processor = processors.TemplateProcessing(single="</s> $A </s>", special_tokens=[("</s>", 1)])
    assert BPETokenizer(inner).encode_batch(["a"] * 2) == [[0], [0]]
    BPE._inner.enable_truncation(3)
    try:
        assert len(BPETokenizer(BPE._inner).encode(TEXTS[0])) > 3
    finally:
        BPE._inner.no_truncation()


@pytest.mark.parametrize("text", ["{}", "[1]", "not json", '{"model": {"type": "BPE"}}', "\xff"])
def test_json_that_is_no_tokenizer_is_refused_by_name(tmp_path, text):
    (tmp_path / "tokenizer.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"tokenizer\.json") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "missing.json"])
def test_missing_file_is_refused_by_name(tmp_path, name):
    with pytest.raises(ConfigError, match="there is no tokenizer file"):
        load_tokenizer(tmp_path / name)


@pytest.mark.parametrize("kind", ["tokenizers", "transformers"])
def test_foreign_tokenizers_are_taken_and_stay_as_they_were(kind, tmp_path):
    inner = Inner(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<stop>", "</s>"]))
    inner.enable_truncation(3)
    theirs, end = inner, "</s>"
    if kind == "transformers":
        transformers = pytest.importorskip("transformers")
        theirs, end = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<stop>"), "<stop>"
    model = LMCODE(LMCODEConfig(vocab_size=256, hidden_size=16, num_layers=1, num_heads=2, context_length=16,
                                short_term_memory_size=0, memory_head_dim=8, long_term_memory_slots=64))
    model.tokenizer = theirs
    text = "the cat sat on the mat"
    ids = model.tokenizer.encode(text)
    assert len(ids) > 3 == len(inner.encode(text).ids) and model.tokenizer.end_id == inner.token_to_id(end)
    model.store_experience(text)
    model.save_pretrained(tmp_path / "model")
    again = LMCODE.from_pretrained(tmp_path / "model")
    assert again.tokenizer.encode(text) == ids and again.query_memory("cat sat")[0][0].text == text
    samples = MemoryDataset([text, text], tokenizer=theirs)
    assert samples[0].tolist() == [model.tokenizer.end_id, *ids, model.tokenizer.end_id]


@pytest.mark.parametrize("wrong", ["bpe", str, object()])
def test_what_is_no_tokenizer_is_refused(wrong):
    with pytest.raises(ConfigError, match="a tokenizer must be one of lmcode's, .* got (str|type|object)"):
        as_tokenizer(wrong)


@BOTH
def test_vocabulary_must_fit_the_model(tokenizer):
    check_vocab(tokenizer, tokenizer.vocab_size)
    with pytest.raises(ConfigError, match=f"{tokenizer.vocab_size - 1} < {tokenizer.vocab_size}"):
        check_vocab(tokenizer, tokenizer.vocab_size - 1)


@BOTH
def test_a_file_of_somebody_else_is_not_replaced(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    tokenizer.save(tmp_path)
    for name in [path.name for path in tmp_path.iterdir()]:
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_text('{"chat_template": "mine"}')
        with pytest.raises(ConfigError, match="exists, with another content, and is not replaced"):
            tokenizer.save(tmp_path)
        assert (tmp_path / name).read_text() == '{"chat_template": "mine"}'
        (tmp_path / name).write_bytes(before)


def test_bytes_do_not_need_the_tokenizers_package(tmp_path):
    ByteTokenizer().save(tmp_path)
    program = ("import sys; sys.modules['tokenizers'] = None\n"
               "from lmcode.data.tokenizer import load_tokenizer\n"
               f"assert load_tokenizer({str(tmp_path)!r}).vocab_size == 257")
    subprocess.run([sys.executable, "-c", program], check=True)


def test_only_a_tokenizer_file_is_taken_for_bytes(tmp_path):
    ByteTokenizer().save(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    save_for_transformers(ByteTokenizer(), tmp_path, max_length=8)
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)
    with pytest.raises(ConfigError, match="config.json' is not a tokenizers JSON file"):
        load_tokenizer(tmp_path / "config.json")


def test_tokenizers_are_compared_by_what_they_are():
    assert same_tokenizer(BPE, BPETokenizer.train(TEXTS, 300)) and same_tokenizer(ByteTokenizer(), ByteTokenizer())
    assert not same_tokenizer(BPE, BPETokenizer.train(TEXTS, 280)) and not same_tokenizer(BPE, ByteTokenizer())
    assert not same_tokenizer(ByteTokenizer(), None)
