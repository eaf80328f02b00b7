"""transformers' view of a saved model: Auto classes, padding, stopping, pipelines, and what evaluation programs call."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from patience import PATIENCE_S
from torch import Tensor
from torch.nn import functional as F

from lmcode import LMCODE, BPETokenizer, ByteTokenizer, LMCODEConfig, MemoryConfig

transformers = pytest.importorskip("transformers")
import lmcode.hf  # noqa: E402, F401  (registers the Auto classes)

CONFIG = LMCODEConfig(vocab_size=330, hidden_size=32, num_layers=2, num_heads=2, context_length=32, short_term_memory_size=4,
                      short_term_dim=8, long_term_memory_slots=256, memory_head_dim=8, memory_top_k=4, memory_bias=2.0)
TEXT = "the quick brown fox jumps over the lazy dog"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = LMCODE(CONFIG, memory=MemoryConfig(virtual_shards=4, experience_slots=64))
    model.tokenizer = BPETokenizer.train([TEXT] * 4, 300)
    model.store_experience(["the lazy dog sleeps", "a fox"], namespace=[0, 5])
    place = tmp_path_factory.mktemp("hf") / "model"
    model.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def model(folder: Path) -> lmcode.hf.LMCODEForCausalLM:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> object:
    return transformers.AutoTokenizer.from_pretrained(folder)


def prompts() -> tuple[Tensor, Tensor]:
    """Two rows of different lengths, padded on the left with an id outside the vocabulary, and the mask."""
    torch.manual_seed(1)
    ids_BT = torch.randint(0, 300, (2, 9))
    mask_BT = torch.ones_like(ids_BT)
    ids_BT[1, :4], mask_BT[1, :4] = 99_999, 0
    return ids_BT, mask_BT


# --- loading -------------------------------------------------------------------------------------------------------


def test_the_auto_classes_load_model_memory_and_tokenizer(folder: Path, model: lmcode.hf.LMCODEForCausalLM,
                                                          tokenizer: object) -> None:
    ours = LMCODE.from_pretrained(folder)
    assert type(model) is lmcode.hf.LMCODEForCausalLM and not model.training
    assert model.lmcode.banks[0].content_hash() == ours.banks[0].content_hash() and model.lmcode.has_experiences
    assert tokenizer(TEXT).input_ids == ours.tokenizer.encode(TEXT)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == ours.tokenizer.end_id == model.config.eos_token_id
    assert model.config.max_position_embeddings == tokenizer.model_max_length == CONFIG.context_length
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model.tie_weights()


def test_the_memory_can_be_left_out_and_a_dtype_chosen(folder: Path) -> None:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, include_memory=False, dtype="bfloat16",
                                                               device_map={"": "cpu"})
    assert loaded.lmcode.banks[0].stats()["live"] == 0 and loaded.dtype == torch.bfloat16


def test_what_is_saved_again_is_the_same(folder: Path, model: lmcode.hf.LMCODEForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "again", safe_serialization=True)
    for path in folder.rglob("*"):
        assert path.is_dir() or path.read_bytes() == (tmp_path / "again" / path.relative_to(folder)).read_bytes()
    with pytest.raises(ValueError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "again", push_to_hub=True)


@pytest.mark.parametrize("text", ["", "plain", "h\u00e9llo \u4e2d\n\t \x00\x7f\xad", "two  spaces"])
def test_bytes_are_the_same_bytes_there(text: str, tmp_path: Path) -> None:
    model = LMCODE(CONFIG.model_copy(update={"long_term_memory_slots": 0}))
    assert isinstance(model.tokenizer, ByteTokenizer)
    model.save_pretrained(tmp_path / "m")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert theirs(text).input_ids == ByteTokenizer().encode(text)
    assert theirs.decode(ByteTokenizer().encode(text)) == text and theirs.eos_token_id == ByteTokenizer.end_id


def test_a_program_that_does_not_know_us_trusts_the_code_in_the_folder(folder: Path, tmp_path: Path) -> None:
    code = f"""
import os
os.environ["HF_HOME"] = {str(tmp_path)!r}
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
try:
    AutoConfig.from_pretrained({str(folder)!r}, trust_remote_code=False)
except ValueError:
    print("refused")
tokenizer = AutoTokenizer.from_pretrained({str(folder)!r}, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True, dtype="auto", device_map={{"": "cpu"}})
print(model.generate(**tokenizer("the quick", return_tensors="pt"), max_new_tokens=3).shape[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S,
                          cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
    refused, length = done.stdout.split()
    assert refused == "refused" and int(length) > 3


# --- forward -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_on_either_side(model: lmcode.hf.LMCODEForCausalLM, side: str) -> None:
    torch.manual_seed(2)
    row_T, other_T = torch.randint(0, 300, (7,)), torch.randint(0, 300, (12,))
    at = slice(5, None) if side == "left" else slice(None, 7)
    ids_BT, mask_BT = torch.full((2, 12), 99_999), torch.zeros(2, 12, dtype=torch.int64)
    ids_BT[0, at], mask_BT[0, at], ids_BT[1], mask_BT[1] = row_T, 1, other_T, 1
    output = model(input_ids=ids_BT, attention_mask=mask_BT, labels=ids_BT.where(mask_BT == 1, -100))
    alone, whole = model(row_T[None], labels=row_T[None]), model(other_T[None], labels=other_T[None])
    torch.testing.assert_close(output.logits[0, at], alone.logits[0])
    torch.testing.assert_close(output.logits[1], whole.logits[0], msg="a row's place in the batch must not matter")
    torch.testing.assert_close(output.loss, (alone.loss * 6 + whole.loss * 11) / 17)


def test_the_memory_is_read_in_the_chosen_namespace(model: lmcode.hf.LMCODEForCausalLM) -> None:
    ids_BT = torch.tensor([model.lmcode.tokenizer.encode("the lazy dog")])
    with model.lmcode.reading_from({}):
        without = model(ids_BT).logits
    assert not torch.allclose(model(ids_BT).logits, without)
    torch.testing.assert_close(model(ids_BT, namespace=77).logits, without)


@pytest.mark.parametrize("extra", [{"past_key_values": object()}, {"inputs_embeds": torch.zeros(1, 2, 32)}])
def test_what_forward_does_not_have_is_refused(model: lmcode.hf.LMCODEForCausalLM, extra: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="no past_key_values and no inputs_embeds"):
        model(torch.zeros(1, 2, dtype=torch.int64), **extra)


# --- generate ------------------------------------------------------------------------------------------------------


def test_generation_is_that_of_lmcode(model: lmcode.hf.LMCODEForCausalLM) -> None:
    ids_BT, mask_BT = prompts()
    wanted = {"attention_mask": mask_BT, "namespace": 0, "eos_id": model.config.eos_token_id, "max_new_tokens": 40}
    greedy = model.generate(ids_BT, attention_mask=mask_BT, max_new_tokens=40)
    ours = model.lmcode.generate(ids_BT.where(mask_BT == 1, 0), temperature=0.0, **wanted)
    assert torch.equal(greedy[:, 9:], ours[:, 9:]) and torch.equal(greedy[:, :9], ids_BT)
    alone = model.generate(input_ids=ids_BT[1:, 4:], max_new_tokens=40)[0, 5:]
    assert torch.equal(greedy[1, 9:9 + len(alone)], alone)
    drawn = model.generate(ids_BT, attention_mask=mask_BT, max_length=49, do_sample=True, temperature=2.0, top_k=0, seed=4)
    ours = model.lmcode.generate(ids_BT.where(mask_BT == 1, 0), temperature=2.0, top_k=0, top_p=1.0, seed=4, **wanted)
    assert torch.equal(drawn[:, 9:], ours[:, 9:])


def test_a_generation_config_is_followed(model: lmcode.hf.LMCODEForCausalLM) -> None:
    ids_BT, _ = prompts()
    config = transformers.GenerationConfig(max_new_tokens=3, eos_token_id=None)
    assert model.generate(ids_BT[:1], generation_config=config, eos_token_id=None).shape == (1, 12)


class After(transformers.StoppingCriteria):
    """Row b stops `2 + 3 b` tokens after the prompt."""

    def __init__(self, start: int) -> None:
        self.start, self.asked = start, 0

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        self.asked += 1
        return torch.tensor([input_ids.shape[1] - self.start >= 2 + 3 * b for b in range(len(input_ids))])


def test_each_text_ends_where_its_criterion_is_met(model: lmcode.hf.LMCODEForCausalLM) -> None:
    ids_BT, mask_BT = prompts()
    whole = model.lmcode.generate(ids_BT.where(mask_BT == 1, 0), attention_mask=mask_BT, namespace=0, max_new_tokens=20,
                                  temperature=0.0)
    stop = After(9)
    cut = model.generate(ids_BT, attention_mask=mask_BT, max_new_tokens=20, eos_token_id=None,
                         stopping_criteria=transformers.StoppingCriteriaList([stop]))
    assert cut.shape == (2, 14) and stop.asked == 5, "nothing is generated after the last one has stopped"
    assert torch.equal(cut[0, 9:11], whole[0, 9:11]) and torch.equal(cut[1, 9:], whole[1, 9:14])
    assert (cut[0, 11:] == model.config.eos_token_id).all()


@pytest.mark.parametrize("settings, said", [
    ({"temprature": 1.0}, "Did you mean 'temperature'"), ({"num_beams": 4}, "num_beams must be 1"),
    ({"num_return_sequences": 2}, "num_return_sequences must be 1"), ({"eos_token_id": [1, 2]}, "one id"),
    ({"penalty_alpha": 0.5}, "no setting 'penalty_alpha'")])
def test_settings_that_it_does_not_have_are_refused(model: lmcode.hf.LMCODEForCausalLM, settings: dict[str, object],
                                                    said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        model.generate(torch.zeros(1, 2, dtype=torch.int64), **settings)
    with pytest.raises(ValueError, match="needs input_ids"):
        model.generate()


def test_a_pipeline_writes_text_one_by_one_and_in_batches(model: lmcode.hf.LMCODEForCausalLM, tokenizer: object) -> None:
    write = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    alone = [write(text, max_new_tokens=6, do_sample=False)[0]["generated_text"] for text in ("the quick", "a lazy dog")]
    together = write(["the quick", "a lazy dog"], batch_size=2, max_new_tokens=6, do_sample=False)
    assert [one[0]["generated_text"] for one in together] == alone and alone[0].startswith("the quick")


# --- what the lm-evaluation-harness does ---------------------------------------------------------------------------


def test_the_calls_of_an_evaluation_harness(model: lmcode.hf.LMCODEForCausalLM, tokenizer: object) -> None:
    """Log-likelihoods of continuations in right-padded batches without a mask (as its HFLM makes them), and greediness."""
    pairs = [("the quick", " brown fox"), ("the", " lazy"), ("over the", " lazy dog jumps")]
    rows = [(tokenizer.encode(context, add_special_tokens=False), tokenizer.encode(end, add_special_tokens=False))
            for context, end in pairs]
    longest = max(len(context) + len(end) - 1 for context, end in rows)
    inps = torch.stack([F.pad(torch.tensor([*context, *end][:-1]), (0, longest - len(context) - len(end) + 1))
                        for context, end in rows])
    log_softmax = F.log_softmax(model(inps).logits, dim=-1, dtype=torch.float32)
    for (context, end), row in zip(rows, log_softmax, strict=True):
        part = row[len(context) - 1:len(context) + len(end) - 1]
        score = part.gather(1, torch.tensor(end)[:, None]).sum()
        ids_1T = torch.tensor([[*context, *end]])
        labels_1T = ids_1T.clone()
        labels_1T[:, :len(context)] = -100
        torch.testing.assert_close(-score / len(end), model(ids_1T, labels=labels_1T).loss, rtol=1e-4, atol=1e-5)


def test_transformers_can_resize_the_vocabulary(folder: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(0, 300, (1, 5))
    greedy = model.generate(ids, max_new_tokens=4)
    assert model.resize_token_embeddings(337, pad_to_multiple_of=16).num_embeddings == 352
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == 352
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert greedy.tolist() == model.generate(ids, max_new_tokens=4).tolist()
    model.lmcode.generate(torch.tensor([[351]]), max_new_tokens=2)
    model.save_pretrained(tmp_path / "resized")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "resized")
    assert again.config.vocab_size == 352 and torch.equal(again.get_input_embeddings().weight,
                                                          model.get_input_embeddings().weight)
    for change in ({"new_num_tokens": 200}, {"new_num_tokens": 400, "mean_resizing": False}):  # the tokenizer has 300
        with pytest.raises(ValueError):
            model.resize_token_embeddings(**change)
        assert model.config.vocab_size == len(model.get_input_embeddings().weight) == 352
