"""The shortlist's best logits are those of the whole product, whatever the rows look like."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmcode.model.generation import shortlist
from lmcode.model.generation.sampling import Decoding
from lmcode.model.generation.shortlist import Shortlist, multiplies_bf16, worthwhile

V, C = 20000, 64
pytestmark = pytest.mark.skipif(not multiplies_bf16(), reason="this CPU does not multiply bf16")


def weights(kind: str) -> Tensor:
    """Rows as at the start of training, of very different lengths, with twins everywhere, or all nearly alike."""
    torch.manual_seed(0)
    weight_VC = torch.randn(V, C)
    if kind == "lengths":
        return weight_VC * torch.rand(V, 1).exp() ** 4
    if kind == "twins":
        return weight_VC[torch.randint(500, (V,))]
    return weight_VC[:1] + 1e-4 * weight_VC if kind == "alike" else 0.02 * weight_VC


@pytest.mark.parametrize("k", [1, 50, V])
@pytest.mark.parametrize("kind", ["new", "lengths", "twins", "alike"])
def test_the_best_are_right_and_no_other_is_better(kind: str, k: int) -> None:
    weight_VC, ruled_out = weights(kind), 0
    best = Shortlist(weight_VC)
    for _ in range(20):
        x_1C = 5 * torch.randn(1, C)
        exact_1V, got_1V = x_1C @ weight_VC.t(), best(x_1C, k)
        kept_1V = got_1V > -torch.inf
        torch.testing.assert_close(got_1V[kept_1V], exact_1V[kept_1V])
        assert bool(kept_1V[exact_1V >= exact_1V.topk(k).values[0, -1]].all())
        assert got_1V.argmax() == exact_1V.argmax() or kind == "twins" or k > 1
        ruled_out += int((~kept_1V).sum())
    assert (ruled_out > 0) == (k < V and kind != "alike"), "where all are alike, all are computed"


def test_rough_logits_are_no_rougher_than_they_are_said_to_be() -> None:
    weight_VC = weights("lengths")
    best, worst = Shortlist(weight_VC), 0.0
    for _ in range(20):
        x_1C = 5 * torch.randn(1, C)
        rough_1V = torch.ops.mkldnn._linear_pointwise(x_1C.bfloat16(), best._rough, None, "none", [], "").double()
        off_1V = (rough_1V - x_1C.double() @ weight_VC.double().t()).abs() / (weight_VC.norm(dim=1) * x_1C.norm())
        worst = max(worst, float(off_1V.max()))
    assert 1e-4 < worst < shortlist.ROUGHNESS


def test_numbers_that_are_not_finite_come_out_as_from_the_product() -> None:
    weight_VC = weights("new")
    x_1C = torch.full((1, C), torch.nan)
    assert bool(Shortlist(weight_VC)(x_1C, 1).isnan().all())


def test_where_it_is_not_used() -> None:
    weight_VC = weights("new")
    assert not worthwhile(weight_VC, 2) and not worthwhile(weight_VC.bfloat16(), 1) and not worthwhile(weight_VC[:999], 1)
    assert (Decoding(temperature=0).best, Decoding(top_k=7).best, Decoding(top_k=0).best) == (1, 7, None)
    assert Decoding(repetition_penalty=1.1).best is None and Decoding(no_repeat_ngram_size=3).best is None
