"""Whether two searches that should be one found the same, where their queries went through products of different shapes.

A BLAS sums in an order that hangs on the shape, so scores of different numbers of ranks, tiers or batches differ by
rounding, and hits whose scores are that close may trade places, or trade the last place for the first one left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 5e-5  # of a score of up to about 10: what rounding makes of it in a few steps of training, and ten times more


def assert_same_hits(came: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], *, tolerance: float = TOLERANCE) -> None:
    """Compares hits query by query as sets: the same scores in order, the same ids but for near-ties.

    An id in both lists has the same score in both, and an id in one of them only has the score of the other's last hit,
    each within `tolerance`. So only hits whose scores are that close can have traded places.

    Args:
        came, expected: scores fp32 and ids int64, both [..., K], of the same queries; -1 where there is no hit.
    """
    (score, ids), (other_score, other_ids) = came, expected
    assert ids.shape == other_ids.shape and torch.equal(ids >= 0, other_ids >= 0), "as many hits"
    torch.testing.assert_close(score, other_score, rtol=0, atol=tolerance)
    both = (score, ids), (other_score, other_ids)
    for (one_score, one_ids), (two_score, two_ids) in (both, both[::-1]):
        same = one_ids[..., :, None] == two_ids[..., None, :]
        found = same.any(-1)
        twin_score = torch.where(found, two_score.gather(-1, same.int().argmax(-1)), two_score[..., -1:])
        away = ((one_score - twin_score).abs() > tolerance) & (one_ids >= 0)
        where = away.nonzero()
        assert not len(where), (f"{len(where)} of {ids.numel()} hits are others, and no near-ties: first at "
                                f"{where[0].tolist()}, id {int(one_ids[away][0])} with {float(one_score[away][0]):.6f} "
                                f"against {float(twin_score[away][0]):.6f}")
