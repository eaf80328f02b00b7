"""A real model, where one has been made ready: `python tools/smollm2.py FOLDER`, then LMCODE_SMOLLM2=FOLDER."""

from __future__ import annotations

import os

import pytest
import torch

import lmcode

FOLDER = os.environ.get("LMCODE_SMOLLM2", "")
TEXT = "The caretaker of the lighthouse at Vardal was called Oswin Tarrabel. Every day Oswin Tarrabel climbed the stairs."


@pytest.mark.skipif(not FOLDER, reason="no real model: python tools/smollm2.py FOLDER, then LMCODE_SMOLLM2=FOLDER")
def test_what_is_stored_makes_its_words_likelier() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER).eval(), AutoTokenizer.from_pretrained(FOLDER)
    ids_BT = tokenizer("The caretaker of the lighthouse was called Oswin", return_tensors="pt")["input_ids"]
    name = tokenizer(" Tarrabel", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        plain_BTV = model(ids_BT).logits
        lmcode.attach(model, "camelot", long_term_memory_slots=512)
        torch.testing.assert_close(model(ids_BT).logits, plain_BTV, rtol=0, atol=1e-3)
        model.lmcode.store_experience(TEXT)
        before, after = (logits_BTV[0, -1].log_softmax(-1)[name] for logits_BTV in (plain_BTV, model(ids_BT).logits))
    assert float(after) > float(before) + 1.0
