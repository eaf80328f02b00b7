"""What streams carry beside a backbone: who stays in the row, and who leaves it."""

from __future__ import annotations

import torch

from lmcode.recipes.carried import moves


def test_who_stays_and_who_leaves_a_row() -> None:
    """Against a list that is kept by hand, for many lengths."""
    generator = torch.Generator().manual_seed(0)
    for sinks, places, window in ((2, 5, 3), (0, 4, 6), (3, 3, 4), (0, 0, 4), (1, 6, 2)):
        held: list[list[int]] = [[], []]
        number = 0
        for _ in range(6):
            length_B = torch.randint(0, window + 1, (2,), generator=generator)
            count_B = torch.tensor([len(row) for row in held])
            moved = moves(count_B, length_B, sinks=sinks, places=places, window=window)
            for stream, row in enumerate(held):
                new = list(range(number, number + int(length_B[stream])))
                number += window
                laid = [*row, *[-1] * (places - len(row)), *new, *[-1] * (window - len(new))]
                both = [*row, *new]
                gone = both[sinks:len(both) - places + sinks] if len(both) > places else []
                kept = [one for one in both if one not in gone]
                at = [laid[place] for place in moved.kept_BM[stream][:int(moved.kept_B[stream])].tolist()]
                left = [laid[place] for place in moved.left_BT[stream][moved.left_valid_BT[stream]].tolist()]
                assert (at, left) == (kept, gone)
                held[stream] = kept
