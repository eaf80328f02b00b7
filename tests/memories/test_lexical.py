"""Keys from text alone: the same everywhere, of length 1, close where texts share words."""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcode.memories.lexical import _WORD, features_of, text_key

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).filter(lambda text: text.strip())
WORDS = "red green blue one two three north south east west up down in out left right".split()


def sentence(rng: np.random.Generator, words: int = 12) -> str:
    return " ".join(rng.choice(WORDS, words))


@settings(max_examples=100, deadline=None)
@given(TEXT, st.sampled_from([1, 7, 64, 256]))
def test_a_key_has_length_one_and_depends_on_the_text_alone(text: str, dim: int) -> None:
    key = text_key(text, dim)
    assert key.dtype == np.float32 and key.shape == (dim,)
    assert abs(np.linalg.norm(key) - 1) < 1e-6
    assert (key == text_key(f"  {text}\n", dim)).all()


def test_keys_are_pinned() -> None:
    """Saved keys must mean the same for ever: a change of the hash is a change of the file format."""
    key = text_key("This is important information to remember", 256)
    assert np.flatnonzero(key)[:5].tolist() == [7, 19, 27, 36, 38]
    assert np.sign(key[[7, 19, 27, 36, 38]]).tolist() == [1, 1, 1, 1, -1]


def test_the_score_estimates_the_share_of_features_in_common() -> None:
    rng = np.random.default_rng(0)
    differences = []
    for _ in range(200):
        one, other = sentence(rng), sentence(rng)
        first, second = features_of(one), features_of(other)
        cosine = len(np.intersect1d(first, second)) / np.sqrt(len(first) * len(second))
        differences.append(float(text_key(one, 256) @ text_key(other, 256)) - cosine)
    assert abs(np.mean(differences)) < 0.02 and np.std(differences) < 0.1


def test_half_a_sentence_finds_the_whole() -> None:
    rng = np.random.default_rng(1)
    sentences = [sentence(rng) for _ in range(500)]
    keys = np.stack([text_key(one, 256) for one in sentences])
    asked = np.stack([text_key(" ".join(one.split()[:6]), 256) for one in sentences])
    assert ((asked @ keys.T).argmax(1) == np.arange(500)).mean() > 0.95


def test_the_order_of_words_counts() -> None:
    assert (text_key("dog bites man", 256) != text_key("man bites dog", 256)).any()


@pytest.mark.parametrize("text", ["", " \n\t", "\u2028"])
def test_white_space_has_no_key(text: str) -> None:
    with pytest.raises(ValueError, match="must hold more than white space"):
        text_key(text, 256)


# --- other scripts -------------------------------------------------------------------------------------------------

STORED = {
    "Latin": ["the key is under the mat", "the cat sleeps on the sofa", "the train leaves at noon"],
    "Cyrillic": ["ключ лежит под ковриком", "кошка спит на диване", "поезд уходит в полдень"],
    "Arabic": ["المفتاح تحت السجادة", "القطة تنام على الأريكة", "القطار يغادر عند الظهر"],
    "Devanagari": ["चाबी चटाई के नीचे है", "बिल्ली सोफ़े पर सोती है", "रेलगाड़ी दोपहर को जाती है"],
    "Korean": ["열쇠는 매트 아래에 있다", "고양이는 소파에서 잔다", "기차는 정오에 떠난다"],
    "Chinese": ["钥匙在门口的垫子下面", "那只猫睡在沙发上", "开往北京的火车中午出发"],
    "Japanese": ["鍵はマットの下にあります", "猫はソファーで寝ている", "東京行きの電車は正午に出る"],
    "Thai": ["กุญแจอยู่ใต้พรมเช็ดเท้า", "แมวนอนหลับบนโซฟา", "รถไฟออกเดินทางตอนเที่ยง"],
}
ASKED = {"Latin": "the train", "Cyrillic": "поезд уходит", "Arabic": "القطار", "Devanagari": "रेलगाड़ी", "Korean": "기차는",
         "Chinese": "北京", "Japanese": "電車", "Thai": "รถไฟ"}


def scores(query: str, texts: list[str]) -> np.ndarray:
    return np.stack([text_key(text, 256) for text in texts]) @ text_key(query, 256)


@pytest.mark.parametrize("script", STORED)
def test_a_word_finds_its_text_in_every_script(script: str) -> None:
    everything = [text for texts in STORED.values() for text in texts]
    found = scores(ASKED[script], everything)
    assert everything[found.argmax()] == STORED[script][2] and found.max() > 0.1
    for text in STORED[script]:
        assert everything[scores(text[:len(text) // 2], everything).argmax()] == text


@pytest.mark.parametrize("query, text", [
    ("猫", "那只猫睡在沙发上"), ("すし", "昨日はすしを食べました"), ("ปลา", "ฉันชอบกินปลาย่าง"),
    ("北京 train", "the train to北京leaves"), ("emoji 🎉", "a text with an emoji 🎉🎉 in it")])
def test_short_words_inside_a_text_without_spaces_share_features(query: str, text: str) -> None:
    assert np.isin(features_of(query), features_of(text)).sum() >= len(query.split()) and scores(query, [text])[0] > 0.1


@settings(max_examples=100, deadline=None)
@given(TEXT | st.text("aéç\u0301\u0308\u0327カ\u3099가\u1100\u1161กำ\u0e35ड\u093cש\u05c1👍🏽\u200dİΐ", min_size=1,
                      max_size=20).filter(lambda text: text.strip()))
def test_letters_composed_and_taken_apart_are_the_same(text: str) -> None:
    composed, apart = (text_key(unicodedata.normalize(form, text), 64) for form in ("NFC", "NFD"))
    assert (composed == apart).all() and (composed == text_key(text, 64)).all()


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(max_codepoint=0x24F), min_size=1, max_size=60).filter(lambda text: text.strip()))
def test_the_words_of_latin_text_are_runs_of_letters_and_single_signs(text: str) -> None:
    """As they were before other scripts had words: keys that are stored go on to be found."""
    words = re.findall(r"\w+|[^\w\s]", " ".join(text.casefold().split()))
    assert _WORD.findall(" ".join(text.casefold().split())) == words


def test_words_keep_their_marks() -> None:
    assert _WORD.findall("हिन्दी में لُغَة") == ["हिन्दी", "में", "لُغَة"]
    assert _WORD.findall("รถไฟ ที่นี่") == ["ร", "ถ", "ไ", "ฟ", "ที่", "นี่"]
    assert _WORD.findall("x\u0304 カメラ3台") == ["x", "\u0304", "カ", "メ", "ラ", "3", "台"]
