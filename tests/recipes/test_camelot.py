"""Recipe camelot against attention over all keys at once."""

from __future__ import annotations

from typing import Any

import torch

from tests.helpers.recipe_models import attached, read, tokens


def test_slots_join_the_softmax_of_the_layer() -> None:
    """Against a softmax over all keys at once: slots at the constant distance, with the bias."""
    model = attached("llama", "camelot", memory_layers=(1,), memory_bias=-0.5, sinks=0, cache=0, distance=9,
                     memory_top_k=256, memory={"virtual_shards": 1, "importance_weight": 0.0})
    backbone, seen = model.lmcode, {}
    read(model, tokens(1, 12, seed=4), window=12)
    state = backbone.banks[1].state(0)
    live = state["id"] >= 0
    key_HMD, value_HMD = state["key"][:, live], state["value"][:, live]
    attend = backbone._attend

    def spied(current: Any, module: Any, query: Any, key: Any, value: Any, mask: Any, **settings: Any) -> Any:
        result = attend(current, module, query, key, value, mask, **settings)
        if module.layer_idx == 1:
            seen.update(query=query, key=key, value=value, result=result, tables=current.tables)
        return result

    backbone._attend = spied
    model(tokens(1, 7))
    query, key, value = (seen[name][0] for name in ("query", "key", "value"))
    unrotated = backbone.anatomy.rotate(seen["query"], seen["tables"], back=True)
    placed = backbone.recipe._placed(unrotated)[0]
    for head in range(4):
        own_TT = query[head] @ key[head // 2].T * 8 ** -0.5
        own_TT = own_TT.masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), -1e30)
        slot_TM = placed[head] @ key_HMD[head // 2].T - 0.5
        weight = torch.cat([own_TT, slot_TM], dim=1).softmax(dim=1)
        expected = weight @ torch.cat([value[head // 2], value_HMD[head // 2]])
        torch.testing.assert_close(seen["result"][0, :, head], expected, rtol=0, atol=1e-5)
