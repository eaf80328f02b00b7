"""Generation: prompts of any length side by side, windows and state carried on, ends, writing, and many ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmcode import LMCODE
from lmcode.config import LMCODEConfig, MemoryConfig
from lmcode.dist import Group
from lmcode.model.generation import decode, layout
from lmcode.model.generation.decode import steppable
from lmcode.model.generation.generate import Generation, generate
from lmcode.model.generation.sampling import Decoding
from lmcode.model.generation.shortlist import Shortlist, multiplies_bf16
from lmcode.model.lm import MemoryLM
from tests.helpers.ranks import run_on_ranks

CONFIG = LMCODEConfig(vocab_size=31, hidden_size=32, num_layers=2, num_heads=2, context_length=8, short_term_memory_size=4,
                      short_term_dim=8, short_term_segment=4, memory_layers=(1,), memory_head_dim=8,
                      memory_update_rate=0.9, long_term_memory_slots=512, memory_top_k=4, memory_bias=3.0)
PROMPTS = [[7], [3, 1, 4, 1, 5], [2] * 8, [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 11, 12, 13]]
GREEDY = Decoding(max_new_tokens=12, temperature=0)
LIVELY = {"max_new_tokens": 30, "temperature": 3.0, "top_k": 0, "top_p": 1.0, "seed": 3}  # small changes change the text


TOKENS = {"memory_values": "token", "memory_key_tokens": 3}  # keys and values made from embeddings


def build(group: Group | None = None, **changes: object) -> LMCODE:
    """A model with large weights, so that tokens depend on everything, and a bank with entries of namespaces 0 to 3."""
    torch.manual_seed(0)
    model = LMCODE(CONFIG.model_copy(update=changes), memory=MemoryConfig(virtual_shards=4), group=group)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    key_HED, value_HED = torch.nn.functional.normalize(torch.randn(2, 40, 8), dim=-1), 2 * torch.randn(2, 40, 8)
    model.banks[1].write(key_HED, value_HED, torch.arange(40) % 4)
    return model


@pytest.fixture
def model() -> LMCODE:
    return build()


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[99] * (longest - len(row)) + row for row in PROMPTS])  # what stands at padding does not matter
    return ids, (ids != 99).long()


def test_the_call_of_the_original_readme(model: LMCODE) -> None:
    input_ids = torch.randint(0, CONFIG.vocab_size, (1, 10))
    generated = model.generate(input_ids, max_length=100, temperature=0.8, top_k=50, top_p=0.9)
    assert generated.shape == (1, 100) and generated.dtype == torch.int64 and torch.equal(generated[:, :10], input_ids)


def test_the_seed_decides(model: LMCODE) -> None:
    one, two, three = (model.generate(torch.tensor([PROMPTS[1]] * 2), max_new_tokens=9, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, three) and not torch.equal(one[0], one[1])
    torch.manual_seed(4)
    drawn = model.generate([PROMPTS[1]], max_new_tokens=9)
    torch.manual_seed(4)
    assert torch.equal(model.generate([PROMPTS[1]], max_new_tokens=9), drawn)


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1.3, "seed": 5},
                                      {"temperature": 0, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2}])
def test_cached_and_uncached_decoding_give_the_same_tokens(model: LMCODE, settings: dict) -> None:
    cached, whole = (model.generate(PROMPTS, max_new_tokens=25, use_cache=use_cache, **settings)
                     for use_cache in (True, False))
    assert torch.equal(cached, whole) and cached.shape == (4, 13 + 25)


@pytest.mark.parametrize("changes", [TOKENS, {"memory_key_tokens": 1}, {"memory_values": "token"},
                                     TOKENS | {"retrieval_stride": 3}, TOKENS | {"successor_values": False}])
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]])  # streams that stand at different places, and at one
def test_keys_and_values_made_from_embeddings_are_decoded_alike(changes: dict, prompts: list) -> None:
    model = build(**changes)
    cached, whole = (model.generate(prompts, use_cache=use_cache, **LIVELY)
                     for use_cache in (True, False))
    assert torch.equal(cached, whole)


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[3:]])  # four rows are packed, one is multiplied as it is
def test_long_texts_are_written_with_copies_of_the_weights(model: LMCODE, prompts: list,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "SMALL", 0)
    long = Decoding(max_new_tokens=40, temperature=0)
    cached, plain = (generate(model, prompts, long, use_cache=use_cache).tokens_BT for use_cache in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.skipif(not multiplies_bf16(), reason="this CPU does not multiply bf16")
@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 2.0, "top_k": 5, "seed": 1}])
def test_the_shortlist_of_the_head_changes_no_text(model: LMCODE, settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    long = Decoding(max_new_tokens=40, **settings)
    plain = generate(model, PROMPTS[3:], long).tokens_BT
    calls, call = [], Shortlist.__call__
    monkeypatch.setattr(decode, "worthwhile", lambda weight_VC, rows: True)
    monkeypatch.setattr(Shortlist, "__call__", lambda self, x_1C, k: (calls.append(k), call(self, x_1C, k))[1])
    assert torch.equal(generate(model, PROMPTS[3:], long).tokens_BT, plain)
    assert len(calls) > 30 and set(calls) == {long.best}


class Negated(torch.nn.Module):
    """An adapter around a layer."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -self.inner(x)


def adapt(model: LMCODE) -> None:
    model.layers[0].feed_forward = Negated(model.layers[0].feed_forward)


def replace_forward(model: LMCODE) -> None:
    own = model.layers[0].feed_forward.input
    own.forward = lambda x: -torch.nn.functional.linear(x, own.weight)


def hook(model: LMCODE) -> None:
    model.layers[1].attention.register_forward_hook(lambda module, inputs, output: -output)


@pytest.mark.parametrize("change", [adapt, replace_forward, hook])
def test_layers_that_are_not_as_we_made_them_are_called(model: LMCODE, change: Any) -> None:
    """Whole windows are read, and the text is theirs."""
    assert steppable(model)
    plain = generate(model, PROMPTS, GREEDY).tokens_BT
    change(model)
    assert not steppable(model)
    cached, whole = (generate(model, PROMPTS, GREEDY, use_cache=use_cache).tokens_BT for use_cache in (True, False))
    assert torch.equal(cached, whole) and not torch.equal(cached, plain)


def test_weights_that_lie_elsewhere_are_not_looked_for(model: LMCODE) -> None:
    model.layers[0].attention_norm.weight.data = torch.empty(0)  # as ZeRO-3 leaves it
    assert not steppable(model)


@pytest.mark.parametrize("use_cache", [True, False])
def test_each_prompt_of_a_batch_gets_what_it_gets_alone(model: LMCODE, use_cache: bool) -> None:
    ids, mask = padded()
    together = generate(model, ids, GREEDY, attention_mask=mask, use_cache=use_cache)
    assert torch.equal(together.tokens_BT[:, :13], ids) and torch.equal(together.valid_BT[:, :13], mask.bool())
    for b, row in enumerate(together.rows()):
        alone = generate(model, [PROMPTS[b]], GREEDY, namespace_B=torch.tensor([b]), use_cache=use_cache)
        assert row == alone.tokens_BT[0].tolist() and row[:len(PROMPTS[b])] == PROMPTS[b]
    assert together.rows() == generate(model, PROMPTS, GREEDY).rows()


def test_the_bank_is_read_and_reading_leaves_it_as_it_is(model: LMCODE) -> None:
    before = model.banks[1].content_hash()
    with_bank = model.generate(PROMPTS, max_new_tokens=20, temperature=0)
    with model.reading_from({}):
        without = model.generate(PROMPTS, max_new_tokens=20, temperature=0)
    other = model.generate(PROMPTS, max_new_tokens=20, temperature=0, namespace=[3, 2, 1, 0])
    assert not torch.equal(with_bank, without) and not torch.equal(with_bank, other)
    assert model.banks[1].content_hash() == before


def test_streams_end_and_all_stop_when_the_last_one_has(model: LMCODE) -> None:
    free = generate(model, PROMPTS, GREEDY)
    eos_id = free.rows()[3][13 + 4]  # what the last stream says fifth
    done = generate(model, PROMPTS, Decoding(max_new_tokens=12, temperature=0, eos_id=eos_id))
    for row, free_row, prompt in zip(done.rows(), free.rows(), PROMPTS, strict=True):
        added = free_row[len(prompt):]
        end = added.index(eos_id) + 1 if eos_id in added else len(added)
        assert row[len(prompt):] == added[:end]
    added_BT, valid_BT = done.tokens_BT[:, 13:], done.valid_BT[:, 13:]
    assert bool((added_BT[~valid_BT] == eos_id).all()) and bool(valid_BT[:, 0].all())
    alone = generate(model, PROMPTS[3:], Decoding(max_new_tokens=12, temperature=0, eos_id=eos_id),
                     namespace_B=torch.tensor([3]))
    assert 13 < alone.tokens_BT.shape[1] <= 13 + 5 and alone.rows() == done.rows()[3:]


def test_every_step_is_streamed(model: LMCODE) -> None:
    steps: list[torch.Tensor] = []
    tokens = model.generate(PROMPTS, max_new_tokens=6, seed=0, on_token=steps.append)
    assert torch.equal(torch.stack(steps, dim=1), tokens[:, 13:])


def test_windows_carry_state_and_are_committed_once_each(model: LMCODE) -> None:
    """Greedy tokens equal those of reading the text by hand in windows of the context length."""
    committed: list[Any] = []
    written = generate(model, PROMPTS[3:], Decoding(max_new_tokens=8, temperature=0), commit=committed.append).tokens_BT
    assert len(committed) == 2
    model.eval()
    state, expected = None, []
    with torch.no_grad():
        for start in range(0, 20, 8):
            output = model(written[:, start:start + 8], state=state)
            state = output.state
            expected += output.logits[0].argmax(-1).tolist()
    assert written[0, 13:].tolist() == expected[12:20]


def test_a_dialogue_goes_on_from_its_state(model: LMCODE) -> None:
    """With windows closed at the same places, two calls with the state between them are one reading."""
    first = model.generate([[5, 6, 7]], max_new_tokens=5, temperature=0, return_state=True)
    assert isinstance(first, Generation) and first.tokens_BT.shape == (1, 8)
    second = model.generate([[1, 2]], state=first.state, **LIVELY)
    whole = [*first.tokens_BT[0].tolist(), 1, 2]
    assert second[0, 2:].tolist() == model.generate([whole], **LIVELY)[0, 10:].tolist()
    ids = torch.tensor([[1, 2]])
    assert not torch.allclose(model(ids, state=first.state).logits, model(ids).logits, atol=1e-2)


@pytest.mark.parametrize("use_cache", [True, False])
def test_all_that_was_read_and_produced_is_written_under_its_namespace(model: LMCODE, use_cache: bool) -> None:
    bank, before = model.banks[1], model.banks[1].stats()["live"]
    tokens = model.generate([PROMPTS[3], PROMPTS[1]], max_new_tokens=9, seed=1, write_memory=True, namespace=[77, 78],
                            step=6, use_cache=use_cache)
    columns, live = bank.shard.columns, bank.shard.live_M
    count = {n: int(((columns["namespace"] == n) & live).sum()) for n in (77, 78)}
    assert count == {77: 13 + 9 - 1, 78: 5 + 9 - 1}  # a first token follows nothing
    assert bank.stats()["live"] == before + sum(count.values()) and tokens.shape == (2, 22)
    assert set(columns["step"][live & (columns["namespace"] >= 77)].tolist()) == {6}


def test_what_was_written_is_read_in_the_next_call(model: LMCODE) -> None:
    ids, namespace_B = torch.tensor([PROMPTS[1]]), torch.tensor([77])
    before = model(ids, namespace_B=namespace_B)
    model.generate([PROMPTS[3]], max_new_tokens=9, seed=1, write_memory=True, namespace=77)
    after = model(ids, namespace_B=namespace_B)
    assert not before.memory[1].hits.valid_HNK.any() and after.memory[1].hits.valid_HNK.all()
    assert not torch.allclose(before.logits, after.logits, atol=1e-3)


def test_the_mode_is_left_as_it_was(model: LMCODE) -> None:
    for training in (True, False):
        model.train(training)
        model.generate([[0]], max_new_tokens=1)
        with pytest.raises(RuntimeError, match="enough"):
            model.generate([[0]], max_new_tokens=1, on_token=_enough)
        assert model.training is training


def _enough(token_B: torch.Tensor) -> None:
    raise RuntimeError("enough")


@pytest.mark.parametrize(("arguments", "message"), [
    ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "T >= 1"),
    ({"input_ids": torch.zeros(3, dtype=torch.int64)}, "integer ids .B, T."),
    ({"input_ids": torch.zeros(1, 3)}, "got torch.float32"),
    ({"input_ids": []}, "B >= 1"),
    ({"input_ids": [1, 2]}, "list of lists of ids"),
    ({"input_ids": "text"}, "list of lists of ids"),
    ({"input_ids": [[1], []]}, "every prompt must have a token"),
    ({"input_ids": [[31]]}, r"ids in 0\.\.30: got 31\.\.31"),
    ({"input_ids": [[-1]]}, "got -1"),
    ({"attention_mask": torch.tensor([[1, 0]])}, "padding must lead"),
    ({"attention_mask": torch.tensor([[0, 2]])}, "must hold 0 and 1"),
    ({"attention_mask": torch.tensor([[1]])}, r"got \[1, 1\]"),
    ({"input_ids": [[1]], "attention_mask": torch.tensor([[1]])}, "belongs to prompts in a tensor"),
    ({"max_length": 2}, "must exceed"),
    ({"max_length": 5, "max_new_tokens": 5}, "not both"),
    ({"top_p": 0.0}, "top_p must be"),
    ({"eos_id": 31}, "eos_id must lie in"),
    ({"namespace": [1, 2]}, "one for each prompt"),
    ({"write_memory": True}, "needs a bank and a namespace"),
    ({"namespace": "nowhere"}, "nothing is stored under the namespace 'nowhere'"),
    ({"namespace": 1.5}, "a namespace is a number"),
    ({"namespace": True}, "a namespace is a number"),
    ({"namespace": torch.tensor([1.7])}, "a namespace is a number"),
    ({"namespace": 2**63}, "a namespace is a number"),
    ({"namespace": [None]}, "a namespace is a number"),
    ({"max_new_tokens": 2.5}, "max_new_tokens must be an integer: got 2.5"),
    ({"max_new_tokens": True}, "max_new_tokens must be an integer"),
    ({"top_k": None}, "top_k must be an integer: got None"),
    ({"top_p": None}, "top_p must be a number: got None"),
    ({"temperature": "hot"}, "temperature must be a number: got 'hot'"),
    ({"eos_id": 1.5}, "eos_id must be an integer"),
    ({"seed": "a"}, "seed must be an integer"),
    ({"no_repeat_ngram_size": 1.5}, "no_repeat_ngram_size must be an integer"),
    ({"attention_mask": [[1, 1]]}, "attention_mask must be a tensor"),
    ({"state": 3}, "the state must be that of an output or of a Generation"),
    ({"input_ids": None}, "prompts must be"),
    ({"input_ids": torch.tensor(3)}, "prompts must be"),
    ({"write_memory": True, "namespace": -1}, "got -1"),
])
def test_what_cannot_be_is_refused(model: LMCODE, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(**({"input_ids": torch.tensor([[1, 2]])} | arguments))


def test_a_name_under_which_only_generation_has_written_is_known(model: LMCODE) -> None:
    model.generate([[1, 2, 3]], max_new_tokens=4, seed=0, write_memory=True, namespace="diary")
    assert model.generate([[1, 2, 3]], max_new_tokens=4, seed=0, namespace=["diary"]).shape == (1, 7)


def test_the_smallest_temperature_is_greedy(model: LMCODE) -> None:
    cold, greedy = (model.generate(PROMPTS, max_new_tokens=9, temperature=t, top_k=0) for t in (1e-45, 0.0))
    assert torch.equal(cold, greedy)


def test_a_state_or_window_that_does_not_fit_is_refused(model: LMCODE) -> None:
    state = model.generate([[1]], max_new_tokens=1, return_state=True).state
    with pytest.raises(ValueError, match="as many streams"):
        model.generate([[1], [2]], state=state)
    for window in (0, 9):
        with pytest.raises(ValueError, match=f"window must lie in .*got {window}"):
            generate(model, [[1]], window=window)
    with pytest.raises(ValueError, match="needs a bank"):
        LMCODE(CONFIG.model_copy(update={"long_term_memory_slots": 0})).generate([[1]], write_memory=True, namespace=0)


def test_a_model_without_memories_generates() -> None:
    config = CONFIG.model_copy(update={"short_term_memory_size": 0, "memory_layers": ()})
    model = MemoryLM(config)
    cached, whole = (generate(model, PROMPTS, GREEDY, use_cache=use_cache, finish=True) for use_cache in (True, False))
    assert cached.rows() == whole.rows() and cached.state.slots == cached.state.pending_key == ()


def _on_ranks() -> tuple[Any, ...]:
    group = Group.world()
    model, searches = build(group), []
    for name in ("search", "look_up"):
        called = getattr(model.banks[1], name)
        setattr(model.banks[1], name, lambda *arguments, name=name, called=called: (
            searches.append((name, arguments[0].shape)), called(*arguments))[1])
    torch.manual_seed(group.rank)  # the ranks would draw different tokens
    drawn = model.generate(PROMPTS, max_new_tokens=12, eos_id=3)
    torch.manual_seed(0)
    tokens = model.generate(PROMPTS, max_new_tokens=12, seed=2, write_memory=True, namespace=[4, 5, 6, 7], eos_id=3)
    refused = []
    for words in ({"input_ids": [[group.rank]]}, {"input_ids": [[0]], "namespace": ["house", None, 5][group.rank]},
                  {"input_ids": [[0]], "namespace": "nowhere"}):
        try:
            model.generate(**words, max_new_tokens=1)
        except ValueError as error:
            refused.append(str(error))
    stats = {name: count for name, count in model.banks[1].stats().items() if name != "live_by_rank"}
    return drawn.tolist(), tokens.tolist(), stats, searches, refused


def test_all_ranks_take_the_same_tokens_and_write_them_once() -> None:
    (alone,), ranks = run_on_ranks(_on_ranks, 1), run_on_ranks(_on_ranks, 2)
    for drawn, tokens, stats, searches, refused in ranks:
        assert (drawn, tokens, stats) == alone[:3] and stats["live"] > 40
        assert searches == ranks[0][3]
        assert [call for call in searches if call[0] == "look_up"] == [call for call in alone[3] if call[0] == "look_up"]
        assert all("all ranks must pass the same arguments" in one for one in refused[:2])
        assert "nothing is stored under the namespace 'nowhere'" in refused[2]
