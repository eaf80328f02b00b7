"""Half precision and autocast: scores, softmaxes and log-sum-exps are fp32, padding works, and decoding does not notice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lmcode import LMCODE
from lmcode.config import LMCODEConfig, MemoryConfig
from lmcode.model import long_term
from lmcode.model.cache import Cache
from lmcode.model.generation.decode import Decoder
from lmcode.model.generation.generate import generate
from lmcode.model.generation.sampling import Decoding
from lmcode.model.reading import read_texts
from lmcode.precision import without_autocast

V = 61
SHAPE = {"vocab_size": V, "hidden_size": 24, "num_heads": 3, "num_layers": 2, "context_length": 12,
         "short_term_memory_size": 5, "short_term_dim": 12, "short_term_segment": 4, "memory_layers": "all",
         "memory_heads": 2, "memory_head_dim": 8, "memory_top_k": 6, "long_term_memory_slots": 64, "memory_bias": 0.0}
SHAPES = {"a bank everywhere": {}, "strides, learned positions": {"retrieval_stride": 4, "positions": "learned"},
          "own values, no bank": {"successor_values": False, "long_term_memory_slots": 0},
          "no slots": {"short_term_memory_size": 0, "memory_layers": (1,)}}
FETCHES = ("sums", "rows")
HALVES = (torch.float16, torch.bfloat16)
PROMPTS = [[7], [3, 1, 4, 1, 5], list(range(17))]
SUMMED = {"aten::bmm", "aten::_softmax", "aten::_log_softmax", "aten::logsumexp", "aten::exp"}
ROUNDING = {torch.float16: 0.01, torch.bfloat16: 0.06}  # of the root mean square, over two layers


def build(fetch: str = "sums", **changes: Any) -> LMCODE:
    """A model far from its small initial values, so that every path carries weight, with entries of namespaces 0 to 2."""
    torch.manual_seed(3)
    model = LMCODE(LMCODEConfig(**(SHAPE | changes)), memory=MemoryConfig(virtual_shards=4, fetch=fetch))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    for bank in model.banks.values():
        key_HED = torch.nn.functional.normalize(torch.randn(2, 30, 8), dim=-1)
        bank.write(key_HED, 2 * torch.randn(2, 30, 8), torch.arange(30) % 3)
    return model.eval()


def batch(num_tokens: int = 11) -> dict[str, Tensor]:
    """Streams of 11, 6 and no tokens."""
    generator = torch.Generator().manual_seed(1)
    ids, targets = torch.randint(0, V, (2, 3, num_tokens), generator=generator)
    valid = torch.arange(num_tokens) < torch.tensor([[11], [6], [0]])
    return {"input_ids": ids, "targets_BT": targets, "valid_BT": valid}


def gradients(model: LMCODE) -> dict[str, Tensor]:
    return {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


class Spy(TorchDispatchMode):
    """The dtypes that scores, softmaxes and their like are computed in, below autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = function.name().split(".")[0]
        if name in SUMMED:
            self.seen.setdefault(name, set()).update(one.dtype for one in args if isinstance(one, Tensor))
        return function(*args, **(kwargs or {}))


@pytest.fixture(params=SHAPES.items(), ids=SHAPES.keys())
def changes(request: pytest.FixtureRequest) -> Iterator[dict]:
    yield request.param[1]


def relative(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach().float(), expected.detach()
    return float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp(min=1e-6))


def run(model: LMCODE, scale: float = 64.0) -> Any:
    """Two windows, the second with state, and the backward pass; the loss is scaled as fp16 needs it."""
    first = model(**batch())
    output = model(**batch(), state=first.state, reset_B=torch.tensor([False, True, False]))
    (output.loss * scale).backward()
    return output


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_cast_model_trains_with_padding_and_sums_in_fp32(changes: dict, dtype: torch.dtype) -> None:
    exact, cast = build(**changes), build(**changes).to(dtype)
    expected = run(exact)
    with Spy() as spy:
        output = run(cast)
    assert output.logits.dtype == dtype and output.loss.dtype == torch.float32
    assert set().union(*spy.seen.values()) <= {torch.float32, torch.float64}, spy.seen
    valid = batch()["valid_BT"]
    assert relative(output.logits[valid], expected.logits[valid]) < ROUNDING[dtype]
    got, wanted = gradients(cast), gradients(exact)
    assert got.keys() == wanted.keys() and all(bool(one.isfinite().all()) for one in got.values())
    whole, whole_wanted = (torch.cat([one[name].flatten() for name in wanted]) for one in (got, wanted))
    assert relative(whole, whole_wanted) < 4 * ROUNDING[dtype]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_cast_model_continues_unequal_prompts_with_and_without_the_cache(changes: dict, dtype: torch.dtype) -> None:
    model = build(**changes).to(dtype)
    with Spy() as spy:
        for rows in (PROMPTS, PROMPTS[2:]):  # the one that is alone needs no masks
            cached = generate(model, rows, Decoding(max_new_tokens=10, temperature=0))
            assert cached.tokens_BT.shape == (len(rows), 27)
    assert set().union(*spy.seen.values()) <= {torch.float32, torch.float64}, spy.seen
    whole = generate(model, PROMPTS, Decoding(max_new_tokens=10, temperature=0), use_cache=False, finish=True)
    assert whole.tokens_BT.shape == (3, 27) and all(slots.isfinite().all() for slots in whole.state.slots)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_under_autocast_all_scores_stay_fp32(changes: dict, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, merge = [], long_term.merge_partials
    monkeypatch.setattr(long_term, "merge_partials", lambda values, lses: (parts.extend([*values, *lses]),
                                                                           merge(values, lses))[1])
    model, valid = build(**changes), batch()["valid_BT"]
    expected = model(**batch())
    exact = parts.copy()
    parts.clear()
    with torch.autocast("cpu", dtype):
        with Spy() as spy:
            output = model(**batch())
        output.loss.backward()  # inside, as one should not, but may
    assert spy.seen and set().union(*spy.seen.values()) <= {torch.float32, torch.float64}, spy.seen
    assert {"aten::bmm", "aten::_softmax", "aten::logsumexp"} <= spy.seen.keys(), "the spy is awake"
    assert output.logits.dtype == dtype, "linear maps run in autocast's dtype"
    assert relative(output.logits[valid], expected.logits[valid]) < ROUNDING[dtype]
    for got, wanted in zip(parts, exact, strict=True):  # values and log-sum-exps of own past, hits and null slot
        assert got.dtype == torch.float32 and relative(got, wanted) < ROUNDING[dtype]
    assert all(grad.dtype == torch.float32 and bool(grad.isfinite().all()) for grad in gradients(model).values())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_bank_attends_in_fp32_under_autocast(dtype: torch.dtype) -> None:
    for fetch in FETCHES:
        bank = build(fetch).banks[0]
        query = torch.randn(2, 5, 8, requires_grad=True)
        results = []
        for enabled in (False, True):
            query.grad = None
            with torch.autocast("cpu", dtype, enabled=enabled):
                value, lse = bank.attend(query, bank.search(query, torch.arange(5) % 3))
                (value.sum() + lse.sum()).backward()
                looked_up = bank.look_up(query.detach(), torch.arange(5) % 3)
            results.append((value, lse, query.grad, *looked_up))
        for plain, cast in zip(*results, strict=True):
            assert cast.dtype == torch.float32 and (fetch == "rows" or torch.equal(plain, cast))
            torch.testing.assert_close(plain, cast, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_changes_nothing_in_what_is_written_or_stored(changes: dict, dtype: torch.dtype) -> None:
    model = build(**changes)
    settings = {"max_new_tokens": 14, "temperature": 2.0, "top_k": 0, "top_p": 1.0, "seed": 3, "return_state": True}
    plain, texts = model.generate(PROMPTS, **settings), read_texts(model, PROMPTS)
    with torch.autocast("cpu", dtype):
        inside, texts_inside = model.generate(PROMPTS, **settings), read_texts(model, PROMPTS)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(inside.tokens_BT, plain.tokens_BT)
    assert all(map(torch.equal, (*inside.state.slots, *inside.state.pending_key),
                   (*plain.state.slots, *plain.state.pending_key)))
    for one, other in zip(texts, texts_inside, strict=True):
        assert all(map(torch.equal, (part for offered in one.values() for part in offered),
                       (part for offered in other.values() for part in offered)))


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_decoder_goes_on_with_a_window_that_was_read_under_autocast(changes: dict, dtype: torch.dtype) -> None:
    model, ids, valid = build(**changes), batch()["input_ids"], batch()["valid_BT"]
    valid[2, 0], namespaces, logits = True, torch.arange(3), []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype, enabled=enabled):
            cache = Cache(12)
            model(ids, valid_BT=valid, cache=cache, namespace_B=namespaces)
            decoder = Decoder(model, rows=3, copies=enabled)
            logits.append(decoder(ids[:, 0], cache, namespace_B=namespaces, valid=[True] * 3))
    assert logits[1].dtype == torch.float32 and relative(logits[1], logits[0]) < ROUNDING[dtype]


def test_a_region_without_autocast_ends_where_it_ends() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(KeyError), without_autocast():
            assert not torch.is_autocast_enabled("cpu")
            raise KeyError
        assert torch.is_autocast_enabled("cpu")
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with without_autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_products_are_in_fp32_whatever_precision_is_allowed() -> None:
    before = torch.get_float32_matmul_precision()
    bank = LMCODE(LMCODEConfig(**SHAPE), memory=MemoryConfig(virtual_shards=4, scope="global", tier="exact")).banks[0]
    key, names, seen = torch.randn(2, 40, 8), torch.zeros(40, dtype=torch.int64), set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.name() in ("aten::mm", "aten::bmm"):
                seen.add(torch.get_float32_matmul_precision())
            return function(*args, **(kwargs or {}))

    try:
        for precision in ("medium", "high", "highest"):
            torch.set_float32_matmul_precision(precision)
            with Watch():
                bank.write(key, key, names)
                bank.attend(key, bank.search(key, names))
                bank.consolidate(0.01)
            with pytest.raises(ZeroDivisionError), without_autocast():
                assert torch.get_float32_matmul_precision() == "highest"
                1 / 0  # noqa: B018  (the way out is what is tested)
            assert torch.get_float32_matmul_precision() == precision
        assert seen == {"highest"}
    finally:
        torch.set_float32_matmul_precision(before)
