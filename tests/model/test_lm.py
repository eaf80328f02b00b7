"""The whole model: causality, candidates, gradients, state, checkpointing, precision and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lmcode.config import LMCODEConfig
from lmcode.model import LMCODEOutput, MemoryLM
from lmcode.protocol import Hits, NullRetriever
from tests.helpers.models import far_from_initial
from tests.helpers.oracle_retriever import OracleRetriever, random_retriever

B, T, V, MEMORY_LAYER = 3, 14, 61, 1
SHAPE = {"vocab_size": V, "hidden_size": 24, "num_heads": 3, "num_layers": 3, "context_length": 20,
         "short_term_memory_size": 5, "short_term_dim": 12, "short_term_segment": 4, "memory_layers": (MEMORY_LAYER,),
         "memory_heads": 2, "memory_head_dim": 8, "memory_top_k": 6}
READS = [{"successor_values": successor, "retrieval_stride": stride, "positions": positions}
         for successor in (True, False) for stride in (1, 4) for positions in ("rotary", "learned")]
TOKENS = {"memory_values": "token", "memory_key_tokens": 3}  # keys and values made from embeddings
READS += [READS[0] | TOKENS, READS[-1] | TOKENS]


def build(**changes: object) -> tuple[MemoryLM, OracleRetriever]:
    """A model far from its small initial values, so that every path carries weight, over a bank of random entries."""
    torch.manual_seed(3)
    config = LMCODEConfig(**(SHAPE | changes))
    retriever = random_retriever(config, num_entries=40, num_namespaces=B, value_scale=2.0)
    return far_from_initial(MemoryLM(config, {index: retriever for index in config.memory_layer_indices})), retriever


def ids(num_tokens: int = T, *, seed: int = 0) -> Tensor:
    return torch.randint(0, V, (B, num_tokens), generator=torch.Generator().manual_seed(seed))


def targets(num_tokens: int = T) -> Tensor:
    return ids(num_tokens, seed=9)


def same(one: object, other: object) -> bool:
    """Bitwise equality of nested tuples and dicts of tensors."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


# --- causality ------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", READS)
def test_no_gradient_reaches_a_later_token(changes: dict) -> None:
    model, _ = build(**changes)
    embedded: list[Tensor] = []
    model.embedding.register_forward_hook(lambda module, args, out: embedded.append(out))
    state = model(ids(seed=5)).state
    embedded.clear()
    output = model(ids(), targets_BT=targets(), state=state)
    for quantity in (output.logits.square().sum(-1), output.token_loss):
        for t in range(T):
            (gradient,) = torch.autograd.grad(quantity[:, t].sum(), embedded[0], retain_graph=True)
            by_token = gradient.abs().sum((0, 2))
            assert (by_token[:t + 1] > 0).all(), "an earlier token lost its influence"
            assert (by_token[t + 1:] == 0).all(), f"position {t} sees a later token"


@pytest.mark.parametrize("changes", READS)
def test_changing_the_future_changes_nothing_before_it(changes: dict) -> None:
    model, _ = build(**changes)
    model.eval()
    state = model(ids(seed=5)).state
    plain = model(ids(), targets_BT=targets(), state=state)
    rows = plain.memory[MEMORY_LAYER].candidates
    for cut in range(1, T):
        changed = ids()
        changed[:, cut:] = (changed[:, cut:] + 1 + torch.arange(T - cut)) % V
        other = model(changed, targets_BT=targets(), state=state)
        assert torch.equal(other.logits[:, :cut], plain.logits[:, :cut])
        assert not torch.equal(other.logits[:, cut], plain.logits[:, cut])
        assert torch.equal(other.token_loss[:, :cut], plain.token_loss[:, :cut])
        changed_rows = other.memory[MEMORY_LAYER].candidates
        last_key = cut + 1 if changes["successor_values"] else cut  # candidate i's key is that of token i - 1
        for before, after, stop in ((rows.key_HND, changed_rows.key_HND, last_key),
                                    (rows.value_HND, changed_rows.value_HND, cut)):
            before, after = before.unflatten(1, (B, T)), after.unflatten(1, (B, T))
            assert torch.equal(before[:, :, :stop], after[:, :, :stop])
            assert stop >= T or not torch.equal(before[:, :, stop], after[:, :, stop])
        assert torch.equal(rows.surprise_N.view(B, T)[:, :cut + 1], changed_rows.surprise_N.view(B, T)[:, :cut + 1])


@pytest.mark.parametrize("stride", [1, 4])
def test_the_bank_changes_the_logits_and_streams_do_not_mix(stride: int) -> None:
    model, retriever = build(retrieval_stride=stride)
    with torch.no_grad():
        plain = model(ids()).logits
        with model.reading_from({}):
            without = model(ids()).logits
        retriever.value_HMD = retriever.value_HMD.clone()
        retriever.value_HMD[:, retriever.namespace_M == 1] += 1.0
        changed = model(ids()).logits
    first = 0 if stride == 1 else stride
    assert (plain[:, first:] != without[:, first:]).any(-1).all()
    assert torch.equal(plain[:, :first], without[:, :first])
    assert torch.equal(changed[[0, 2]], plain[[0, 2]]) and not torch.equal(changed[1], plain[1])


# --- gradients and initialisation -----------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"positions": "rotary"}, {"positions": "learned"}, TOKENS])
@pytest.mark.parametrize("carried", [False, True])
def test_every_parameter_gets_a_gradient_from_its_initial_value(changes: dict, carried: bool) -> None:
    torch.manual_seed(4)
    config = LMCODEConfig(**(SHAPE | changes | {"context_length": T}))
    model = MemoryLM(config, {MEMORY_LAYER: random_retriever(config, num_entries=40, num_namespaces=B)})
    state = model(ids(seed=5)).state if carried else None
    reset = torch.tensor([False, True, False]) if carried else None
    model(ids(), targets_BT=targets(), state=state, reset_B=reset).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name


def test_without_hits_and_resets_all_gradients_exist_though_some_are_zero() -> None:
    model, _ = build()
    state = model(ids(seed=5)).state
    with model.reading_from({}):
        model(ids(), targets_BT=targets(), state=state).loss.backward()
    zero = {name.split(".")[-1] for name, parameter in model.named_parameters() if not parameter.grad.any()}
    assert zero == {"initial_slots_SE", "retrieved_bias_H"}


def test_initial_loss_is_that_of_a_uniform_guess() -> None:
    torch.manual_seed(0)
    model = MemoryLM(LMCODEConfig(**(SHAPE | {"vocab_size": 512})))
    loss = model(ids(), targets_BT=targets()).loss.item()
    assert abs(loss - math.log(512)) < 0.1


def test_head_and_embedding_are_one_parameter_and_the_bank_is_none() -> None:
    class ModuleRetriever(torch.nn.Module, NullRetriever):
        def __init__(self) -> None:
            super().__init__()
            self.top_k, self.stored = 1, torch.nn.Parameter(torch.zeros(7))

    model, retriever = build()
    assert model.head.weight is model.embedding.weight
    names = set(model.state_dict())
    model.set_retrievers({MEMORY_LAYER: (bank := ModuleRetriever())})
    assert set(model.state_dict()) == names and bank not in set(model.modules())
    assert model.layers[MEMORY_LAYER].long_term_memory is bank
    assert isinstance(model.layers[0].long_term_memory, NullRetriever) and model.layers[0].long_term_read is None


def test_initialisation_is_a_function_of_the_seed() -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(6)
        models.append(MemoryLM(LMCODEConfig(**SHAPE)).state_dict())
    assert same(*models)


# --- losses, candidates, state --------------------------------------------------------------------


def test_labels_are_shifted_and_targets_are_not() -> None:
    model, _ = build()
    tokens = ids()
    aligned = torch.cat([tokens[:, 1:], torch.full((B, 1), -100)], dim=1)
    by_labels, by_targets = model(tokens, tokens), model(tokens, targets_BT=aligned)
    assert same(by_labels, by_targets)
    expected = torch.nn.functional.cross_entropy(by_labels.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(by_labels.loss, expected)
    assert (by_labels.token_loss[:, -1] == 0).all()


def test_loss_is_the_mean_over_counted_targets() -> None:
    model, _ = build()
    some = targets()
    some[0], some[1, 3:] = -100, -100
    output = model(ids(), targets_BT=some)
    assert (output.token_loss[some == -100] == 0).all() and (output.token_loss[some != -100] > 0).all()
    torch.testing.assert_close(output.loss, output.token_loss.sum() / (some != -100).sum())
    nothing = model(ids(), targets_BT=torch.full((B, T), -100)).loss
    nothing.backward()
    assert nothing == 0


def test_without_targets_there_is_no_loss_and_no_surprise() -> None:
    output = build()[0](ids())
    assert output.loss is None and output.token_loss is None
    assert (output.memory[MEMORY_LAYER].candidates.surprise_N == 0).all()
    assert (output.state.pending_surprise_B == 0).all()


@pytest.mark.parametrize("successor", [True, False])
def test_surprise_is_the_loss_of_the_tokens_own_prediction_across_windows(successor: bool) -> None:
    model, _ = build(successor_values=successor)
    first = model(ids(), targets_BT=targets())
    second = model(ids(seed=1), targets_BT=targets(), state=first.state, reset_B=torch.tensor([False, True, False]))
    surprise = second.memory[MEMORY_LAYER].candidates.surprise_N.view(B, T)
    assert torch.equal(surprise[:, 1:], second.token_loss[:, :-1].detach())
    assert torch.equal(surprise[[0, 2], 0], first.token_loss[[0, 2], -1].detach()) and surprise[1, 0] == 0


def test_pending_key_becomes_the_next_windows_first_candidate() -> None:
    model, _ = build()
    first = model(ids(), namespace_B=torch.tensor([7, 8, 9]))
    rows = first.memory[MEMORY_LAYER].candidates
    assert not rows.valid_N.view(B, T)[:, 0].any() and rows.valid_N.view(B, T)[:, 1:].all()
    second = model(ids(seed=1), state=first.state, reset_B=torch.tensor([False, True, False]),
                   namespace_B=torch.tensor([7, 5, 9]), document_B=torch.tensor([70, -1, 90]))
    assert (rows.document_N == -1).all(), "unknown, unless it is told"
    rows = second.memory[MEMORY_LAYER].candidates
    assert torch.equal(rows.key_HND.unflatten(1, (B, T))[:, :, 0].transpose(0, 1), first.state.pending_key[0])
    assert rows.valid_N.view(B, T)[:, 0].tolist() == [True, False, True]
    assert rows.namespace_N.view(B, T)[:, 0].tolist() == [7, 5, 9]
    assert torch.equal(rows.document_N.view(B, T), torch.tensor([70, -1, 90])[:, None].expand(B, T))
    assert rows.namespace_N.shape == rows.valid_N.shape == rows.surprise_N.shape == (B * T,)


def test_reset_makes_one_stream_new_and_leaves_the_others_bit_identical() -> None:
    model, _ = build()
    model.eval()
    state = model(ids(seed=5), targets_BT=targets()).state
    reset = torch.tensor([False, True, False])
    kept = model(ids(), targets_BT=targets(), state=state)
    fresh = model(ids(), targets_BT=targets())
    mixed = model(ids(), targets_BT=targets(), state=state, reset_B=reset)
    for part in ("logits", "token_loss"):
        assert torch.equal(getattr(mixed, part)[~reset], getattr(kept, part)[~reset])
        assert torch.equal(getattr(mixed, part)[reset], getattr(fresh, part)[reset])
    assert not torch.equal(kept.logits[reset], fresh.logits[reset])
    for layer in range(3):
        assert torch.equal(mixed.state.slots[layer][~reset], kept.state.slots[layer][~reset])
        assert torch.equal(mixed.state.slots[layer][reset], fresh.state.slots[layer][reset])


def test_resetting_all_equals_starting_afresh() -> None:
    model, _ = build()
    state = model(ids(seed=5), targets_BT=targets()).state
    again = model(ids(), targets_BT=targets(), state=state, reset_B=torch.ones(B, dtype=torch.bool))
    fresh = model(ids(), targets_BT=targets())
    assert torch.equal(again.logits, fresh.logits) and same(again.state, fresh.state)
    rows, fresh_rows = again.memory[MEMORY_LAYER].candidates, fresh.memory[MEMORY_LAYER].candidates
    assert same(rows[3:], fresh_rows[3:])


def test_padding_is_as_if_the_tokens_were_not_there() -> None:
    model, _ = build()
    model.eval()
    before = model(ids(seed=5), targets_BT=targets()).state
    length = 9
    valid = torch.arange(T) < torch.tensor([T, length, 0])[:, None]
    output = model(ids(), targets_BT=targets(), state=before, valid_BT=valid)
    short = model(ids()[:, :length], targets_BT=targets()[:, :length], state=before)
    torch.testing.assert_close(output.logits[1, :length], short.logits[1], atol=1e-5, rtol=1e-5)
    assert (output.token_loss[~valid] == 0).all()
    torch.testing.assert_close(output.loss, output.token_loss[valid].mean())
    for after, expected in zip(output.state.slots + output.state.pending_key,
                               short.state.slots + short.state.pending_key, strict=True):
        torch.testing.assert_close(after[1], expected[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.state.pending_surprise_B[1], short.state.pending_surprise_B[1])
    for after, carried in zip(output.state.slots + output.state.pending_key + output.state[2:4],
                              before.slots + before.pending_key + before[2:4], strict=True):
        assert torch.equal(after[2], carried[2])
    rows = output.memory[MEMORY_LAYER].candidates
    assert torch.equal(rows.valid_N.view(B, T), valid)


def test_labels_of_padding_are_not_counted() -> None:
    model, _ = build()
    valid = torch.arange(T) < torch.tensor([T, 9, 0])[:, None]
    loss = model(ids(), ids(), valid_BT=valid).token_loss
    assert torch.equal(loss > 0, torch.arange(T) < torch.tensor([T - 1, 8, 0])[:, None])


def test_state_and_memory_are_detached_and_a_forward_pass_repeats_exactly() -> None:
    model, _ = build()
    first, second = (model(ids(), targets_BT=targets()) for _ in range(2))
    assert same(first, second)
    flat = [*first.state.slots, *first.state.pending_key, *first.state[2:4], *first.memory[MEMORY_LAYER].candidates]
    assert not any(tensor.requires_grad for tensor in flat)


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 20])
@pytest.mark.parametrize("stride", [1, 4])
def test_any_window_length_works(num_tokens: int, stride: int) -> None:
    model, _ = build(retrieval_stride=stride, memory_layers="all")
    output = model(ids(num_tokens), targets_BT=targets(num_tokens), state=model(ids()).state)
    output.loss.backward()
    assert output.logits.isfinite().all() and sorted(output.memory) == [0, 1, 2]
    N = B * -(-num_tokens // stride)
    for layer in output.memory.values():
        assert layer.hits.id_HNK.shape == (2, N, 6) and layer.share_HN.shape == layer.null_share_HN.shape == (2, N)
        assert layer.candidates.valid_N.shape == (B * num_tokens,) and layer.gate_BT.shape == (B, num_tokens)


def test_model_without_any_memory_is_a_plain_transformer() -> None:
    output = build(short_term_memory_size=0, memory_layers=())[0](ids(), targets_BT=targets())
    assert output.memory == {} and output.state.slots == () and output.state.pending_key == ()
    output.loss.backward()


# --- retrievers -----------------------------------------------------------------------------------


def test_each_memory_layer_searches_once_whatever_the_data() -> None:
    model, retriever = build(memory_layers="all")
    model(ids())
    assert retriever.num_searches == retriever.num_attends == 3
    model(ids(), valid_BT=torch.zeros(B, T, dtype=torch.bool), namespace_B=torch.full((B,), -1))
    assert retriever.num_searches == retriever.num_attends == 6


def test_namespaces_default_to_the_streams_own_numbers() -> None:
    model, retriever = build()
    model(ids())
    assert torch.equal(retriever.queries[0][1], torch.arange(B).repeat_interleave(T))


def test_reading_from_is_undone_even_after_an_error() -> None:
    model, retriever = build()
    layer = model.layers[MEMORY_LAYER]
    other = random_retriever(model.config, num_entries=5, num_namespaces=1)
    with pytest.raises(RuntimeError, match="stop"), model.reading_from({MEMORY_LAYER: other}):
        assert layer.long_term_memory is other
        raise RuntimeError("stop")
    assert layer.long_term_memory is retriever
    with model.reading_from({}):
        assert isinstance(layer.long_term_memory, NullRetriever)
    assert layer.long_term_memory is retriever


# --- activation checkpointing and precision -------------------------------------------------------


def run_once(model: MemoryLM, state: object, **arguments: Tensor) -> tuple[LMCODEOutput, dict[str, Tensor]]:
    torch.manual_seed(8)
    model.zero_grad()
    output = model(ids(), targets_BT=targets(), state=state, **arguments)
    output.loss.backward()
    return output, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("changes", [{}, {"retrieval_stride": 4, "memory_layers": "all", "dropout": 0.2},
                                     TOKENS | {"memory_layers": "all"}])
def test_activation_checkpointing_changes_no_number_and_searches_once(changes: dict) -> None:
    model, retriever = build(**changes)
    num_layers = len(model.config.memory_layer_indices)
    state = model(ids(seed=5), targets_BT=targets()).state
    arguments = {"reset_B": torch.tensor([False, True, False]),
                 "valid_BT": torch.arange(T) < torch.tensor([[T], [9], [T]])}
    plain, gradients = run_once(model, state, **arguments)
    model.activation_checkpointing = True
    retriever.num_searches = retriever.num_attends = 0
    recomputed, recomputed_gradients = run_once(model, state, **arguments)
    assert retriever.num_searches == num_layers and retriever.num_attends == 2 * num_layers
    assert same(plain, recomputed)
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed_gradients[name], gradient, msg=name)
    model.eval()
    model(ids(), targets_BT=targets(), state=state)
    assert retriever.num_attends == 3 * num_layers


class ForgetfulRetriever(OracleRetriever):
    """Finds everything the first time and nothing later: a bank that changes between forward and recomputation."""

    def search(self, query_HND: Tensor, namespace_N: Tensor, document_N: Tensor | None = None) -> Hits:
        hits = super().search(query_HND, namespace_N, document_N)
        return hits if self.num_searches == 1 else NullRetriever(self.top_k).search(query_HND, namespace_N)


def test_checkpointing_replays_hits_with_a_frozen_embedding_too() -> None:
    gradients = []
    for checkpointing in (False, True):
        model, oracle = build()
        model.embedding.weight.requires_grad_(False)
        model.activation_checkpointing = checkpointing
        model.set_retrievers({MEMORY_LAYER: ForgetfulRetriever(oracle.key_HMD, oracle.value_HMD, oracle.namespace_M,
                                                               top_k=oracle.top_k)})
        model(ids(), targets_BT=targets()).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
    assert gradients[1]["layers.1.long_term_read.retrieved_bias_H"].any()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bf16_trains_with_fp32_loss_and_state(checkpointing: bool) -> None:
    model, _ = build()
    exact = model(ids(), targets_BT=targets())
    model = model.to(torch.bfloat16)
    model.activation_checkpointing = checkpointing
    output = model(ids(), targets_BT=targets(), state=model(ids(seed=5)).state, reset_B=torch.ones(B, dtype=torch.bool))
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.dtype == output.token_loss.dtype == torch.float32
    assert all(tensor.dtype == torch.float32 for tensor in output.state.slots + output.state.pending_key)
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(output.loss, exact.loss, atol=0.1, rtol=0.05)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "message"), [
    ({"input_ids": torch.zeros(B, T)}, "integer"),
    ({"input_ids": torch.zeros(T, dtype=torch.int64)}, r"\[B, T\]"),
    ({"input_ids": torch.zeros(B, 0, dtype=torch.int64)}, "at least one token"),
    ({"input_ids": torch.zeros(B, 21, dtype=torch.int64)}, "context_length = 20.*got 21"),
    ({"input_ids": torch.full((B, T), V)}, r"0\.\.60: got 61\.\.61"),
    ({"input_ids": torch.full((B, T), -1)}, r"input_ids must lie in 0\.\.60"),
    ({"labels": ids(), "targets_BT": ids()}, "not both"),
    ({"targets_BT": ids(T - 1)}, "targets must be"),
    ({"labels": torch.full((B, T), V)}, r"labels must lie in 0\.\.60"),
    ({"targets_BT": torch.full((B, T), -1)}, r"targets must lie in 0\.\.60"),
    ({"reset_B": torch.zeros(B)}, "reset_B must be torch.bool"),
    ({"reset_B": torch.zeros(B + 1, dtype=torch.bool)}, r"reset_B must be torch.bool \[3\]: got torch.bool \[4\]"),
    ({"namespace_B": torch.zeros(B)}, "namespace_B must be torch.int64"),
    ({"valid_BT": torch.ones(B, T)}, "valid_BT must be torch.bool"),
    ({"valid_BT": torch.arange(T).expand(B, T) != 3}, "padding must trail"),
])
def test_refuses_what_cannot_be_meant(arguments: dict, message: str) -> None:
    model, retriever = build()
    with pytest.raises(ValueError, match=message):
        model(**({"input_ids": ids()} | arguments))
    assert retriever.num_searches == 0


def test_refuses_the_state_of_other_streams_or_another_model() -> None:
    model, _ = build()
    with pytest.raises(ValueError, match="slots must have shapes"):
        model(ids(), state=model(ids()[:2]).state)
    with pytest.raises(ValueError, match="slots must have shapes"):
        model(ids(), state=build(num_layers=2)[0](ids()).state)
    with pytest.raises(ValueError, match="pending_key must have shapes"):
        model(ids(), state=build(memory_layers="all")[0](ids()).state)


def test_refuses_a_retriever_for_a_layer_without_memory() -> None:
    model, _ = build()
    with pytest.raises(ValueError, match=r"one of \(1,\): got layer 0"):
        model.set_retrievers({0: NullRetriever()})
    with pytest.raises(ValueError, match="got layer 2"):
        MemoryLM(model.config, {2: NullRetriever()})


def test_memory_heads_begin_by_matching_equal_contexts() -> None:
    """A query equals the key of the same context at the start: an untrained head looks back to where the context recurs."""
    torch.manual_seed(0)
    model = MemoryLM(LMCODEConfig(vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, context_length=16))
    for layer in model.layers:
        query_PC, key_PC, _ = layer.long_term_read.query_key_value.weight.chunk(3)
        assert torch.equal(query_PC, key_PC)


@pytest.mark.parametrize("changes", [TOKENS, {}])
def test_what_followed_an_equal_context_is_likely_before_any_training(changes: dict) -> None:
    """Of 256 tokens the one that stood behind the same three; a model without these settings has to learn that."""
    torch.manual_seed(0)
    model = MemoryLM(LMCODEConfig(vocab_size=256, hidden_size=128, num_layers=2, num_heads=2, context_length=48,
                                  memory_layers=(1,), memory_temperature=16.0, short_term_memory_size=0, **changes))
    ids_BT = torch.stack([torch.randperm(256)[:48] for _ in range(8)])
    ids_BT[:, -3:] = ids_BT[:, 10:13]
    place_B = (model(ids_BT).logits[:, -1] > model(ids_BT).logits[:, -1].gather(1, ids_BT[:, 13:14])).sum(dim=1)
    assert (place_B <= 3).all() == bool(changes)  # the context itself is there, too


@pytest.mark.parametrize("size", [V + 7, V - 5])
def test_another_vocabulary_keeps_the_rows_that_stay(size: int) -> None:
    model, _ = build()
    before, old_VC = model(ids().clamp(max=V - 6)).logits, model.embedding.weight.detach().clone()
    embedding, kept = model.resize_token_embeddings(size), min(size, V)
    assert embedding is model.embedding and model.head.weight is embedding.weight and model.config.vocab_size == size
    assert (embedding.num_embeddings, model.head.out_features, len(embedding.weight)) == (size,) * 3
    assert torch.equal(embedding.weight[:kept], old_VC[:kept])
    assert torch.allclose(embedding.weight[kept:], old_VC.mean(0).expand(size - kept, -1))
    output = model(ids().clamp(max=V - 6), ids().clamp(max=V - 6))
    assert torch.allclose(output.logits[..., :kept], before[..., :kept], atol=1e-6)
    output.loss.backward()
    assert model.embedding.weight.grad is not None
    with pytest.raises(ValueError, match=f"0..{size - 1}"):
        model(torch.full((1, 2), size))


def test_a_vocabulary_that_cannot_be_leaves_the_model_as_it_was() -> None:
    model, _ = build()
    head, size = model.head, model.config.vocab_size
    for bad in (1, 0, -3, 2.5, True):
        with pytest.raises(ValueError, match="at least 2 ids"):
            model.resize_token_embeddings(bad)
    model.head = torch.nn.Sequential(head)  # as an adapter replaces it
    with pytest.raises(ValueError, match="this model's own and whole: got Embedding .* and Sequential"):
        model.resize_token_embeddings(size + 1)
    assert model.config.vocab_size == len(model.embedding.weight) == size
