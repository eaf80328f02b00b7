"""transformers' view of a saved model: Auto classes, padding, stopping, pipelines, and what evaluation programs call."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lmcode import LMCODE, BPETokenizer, ByteTokenizer, LMCODEConfig, MemoryConfig
from lmcode.config import ConfigError
from tests.helpers.patience import PATIENCE_S
from tests.helpers.sources import CHECKOUT

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
                          cwd=CHECKOUT)
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


@pytest.mark.parametrize("extra", [
    {"past_key_values": object()}, {"cache": object()}, {"inputs_embeds": torch.zeros(1, 2, 32)}, {"return_dict": False},
    {"position_ids": torch.zeros(1, 2)}, {"output_attentions": True}, {"logits_to_keep": torch.arange(2)},
    {"shift_labels": torch.zeros(1, 2)}])
def test_what_forward_does_not_have_is_refused(model: lmcode.hf.LMCODEForCausalLM, extra: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(extra))} must be"):
        model(torch.zeros(1, 2, dtype=torch.int64), **extra)


def test_names_that_nobody_knows_are_refused(model: lmcode.hf.LMCODEForCausalLM, folder: Path, tmp_path: Path) -> None:
    ids = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="no argument 'lables'. Did you mean 'labels'"):
        model(ids, lables=ids)
    with pytest.raises(ValueError, match="no argument 'devicemap'. Did you mean 'device_map'"):
        transformers.AutoModelForCausalLM.from_pretrained(folder, devicemap="cpu")
    with pytest.raises(ValueError, match="no argument 'statedict'. Did you mean 'state_dict'"):
        model.save_pretrained(tmp_path / "m", statedict={})
    with pytest.raises(ValueError, match="it has no cache"):
        model.generate(ids, cache=object())
    neutral = dict.fromkeys(lmcode.hf.FORWARD_NEUTRAL) | {"use_cache": True, "return_dict": True, "logits_to_keep": 0}
    assert torch.equal(model(ids, **neutral).logits, model(ids).logits)


@pytest.mark.parametrize("where", ["cpu", "auto", {"": "cpu"}, {"": torch.device("cpu")}, torch.device("cpu")])
def test_a_device_map_of_one_device(folder: Path, where: object) -> None:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map=where)
    assert {weight.device.type for weight in loaded.parameters()} == {"cpu"} and loaded.lmcode.has_experiences
    with pytest.raises(ValueError, match="one device for the whole model"):
        transformers.AutoModelForCausalLM.from_pretrained(folder, device_map={"lmcode.layers": "cpu", "lmcode.head": "meta"})


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


# --- transformers' Trainer -----------------------------------------------------------------------------------------

needs_accelerate = pytest.mark.skipif(importlib.util.find_spec("accelerate") is None,
                                      reason="accelerate is not installed, and the Trainer needs it")
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
DATA = [{"input_ids": row_T, "labels": row_T.where(torch.arange(12) >= number % 5, -100)}
        for number, row_T in enumerate(torch.randint(0, 300, (8, 12), generator=torch.Generator().manual_seed(3)))]


class Spy(transformers.TrainerCallback):
    """The gradients of the first step, before the optimizer's."""

    grads: dict[str, Tensor] | None = None

    def on_pre_optimizer_step(self, args: object, state: object, control: object, *, model: torch.nn.Module,
                              **_: object) -> None:
        self.grads = self.grads or {name: weight.grad.clone() for name, weight in model.named_parameters()
                                    if weight.grad is not None}


def trainer_of(model: torch.nn.Module, place: Path, tokenizer: object = None, **settings: object) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(output_dir=str(place), **{
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "optim": "sgd", "learning_rate": 0.1, "max_steps": 4,
        "lr_scheduler_type": "constant", "per_device_train_batch_size": 2, "save_strategy": "no", "logging_steps": 1,
        "max_grad_norm": 0.0, "seed": 0} | settings)
    return transformers.Trainer(model=model, args=arguments, train_dataset=DATA, eval_dataset=DATA[:2],
                                processing_class=tokenizer)


def losses(trainer: transformers.Trainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@needs_accelerate
def test_losses_and_gradients_do_not_depend_on_how_a_batch_is_split(model: lmcode.hf.LMCODEForCausalLM,
                                                                    tmp_path: Path) -> None:
    found = []
    for size in (8, 4, 2, 1):
        trainer, spy = trainer_of(copy.deepcopy(model), tmp_path, per_device_train_batch_size=size, max_steps=1,
                                  gradient_accumulation_steps=8 // size), Spy()
        trainer.add_callback(spy)
        trainer.train()
        found.append((losses(trainer)[0], spy.grads))
    whole = model(torch.stack([row["input_ids"] for row in DATA]), labels=torch.stack([row["labels"] for row in DATA])).loss
    for loss, grads in found:
        assert loss == pytest.approx(whole.item(), rel=1e-4)
        assert grads and max(grad.abs().max() for grad in grads.values()) > 1e-3
        torch.testing.assert_close(grads, found[0][1], rtol=1e-3, atol=1e-6)


@needs_accelerate
def test_a_trainer_resumes_as_if_it_had_never_stopped_and_loads_the_best(folder: Path, tokenizer: object,
                                                                          tmp_path: Path) -> None:
    def fresh() -> lmcode.hf.LMCODEForCausalLM:
        return transformers.AutoModelForCausalLM.from_pretrained(folder)

    every = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    straight = trainer_of(fresh(), tmp_path / "a", tokenizer, **every)
    straight.train()
    resumed = trainer_of(fresh(), tmp_path / "a", tokenizer, **every)  # writes over what there is of checkpoint-4
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert losses(resumed)[-2:] == losses(straight)[-2:] and len(losses(straight)) == 4
    for (name, ours), theirs in zip(straight.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "checkpoint-4")
    assert torch.equal(saved.lmcode.head.weight, straight.model.lmcode.head.weight) and saved.lmcode.has_experiences
    assert saved.lmcode.tokenizer.encode(TEXT) == tokenizer.encode(TEXT)

    best = trainer_of(fresh(), tmp_path / "c", **every, load_best_model_at_end=True, metric_for_best_model="eval_loss",
                      greater_is_better=True)  # so the first checkpoint is the best
    best.train()
    first, last = losses(best, "eval_loss")
    assert best.evaluate()["eval_loss"] == pytest.approx(first, rel=1e-5) and first > last + 0.1


@needs_accelerate
def test_label_smoothing_looks_at_the_next_token(model: lmcode.hf.LMCODEForCausalLM, tmp_path: Path) -> None:
    trainer = trainer_of(copy.deepcopy(model), tmp_path, label_smoothing_factor=1e-6)
    batch = {name: torch.stack([row[name] for row in DATA]) for name in DATA[0]}
    wanted = model(**batch).loss.item()
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(wanted, rel=1e-4)


def test_the_weights_that_are_given_are_saved(model: lmcode.hf.LMCODEForCausalLM, tmp_path: Path) -> None:
    doubled = {name: weight * 2 for name, weight in model.state_dict().items()}
    model.save_pretrained(tmp_path / "m", state_dict=doubled)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert loaded.state_dict().keys() == doubled.keys()
    assert all(torch.equal(weight, doubled[name]) for name, weight in loaded.state_dict().items())
    saved = {name.removeprefix("lmcode."): weight for name, weight in doubled.items() if "head" not in name}
    other = copy.deepcopy(model)
    assert other.load_state_dict(saved) == ([], []) and torch.equal(other.lmcode.head.weight, loaded.lmcode.head.weight)
    with pytest.raises(ConfigError, match="there is no weight 'embeding.weight'. Did you mean 'embedding.weight'"):
        model.save_pretrained(tmp_path / "m", state_dict={**saved, "embeding.weight": saved["embedding.weight"]})
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()


@needs_accelerate
@needs_peft
def test_an_adapter_is_trained_saved_loaded_and_merged(folder: Path, tmp_path: Path) -> None:
    import peft

    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["query_key_value"], task_type="CAUSAL_LM"))
    trainer = trainer_of(adapted, tmp_path / "t", save_strategy="steps", save_steps=2, learning_rate=1.0)
    trainer.train()
    ids = DATA[0]["input_ids"][None]
    wanted = adapted.eval()(input_ids=ids).logits
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert not torch.allclose(wanted, plain(ids).logits) and torch.equal(plain.lmcode.embedding.weight,
                                                                         before["lmcode.embedding.weight"])
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "t" / "checkpoint-4")
    torch.testing.assert_close(again(input_ids=ids).logits, wanted)
    assert again.generate(input_ids=ids, max_new_tokens=3).shape == (1, 15)
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(loaded(ids).logits, wanted, rtol=1e-4, atol=1e-4)
