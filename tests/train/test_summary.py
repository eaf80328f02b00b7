"""The closing summary says every figure a person asked for, whatever the run was."""

from __future__ import annotations

from pathlib import Path

from lmcode.eval.held_out import EvalResult
from lmcode.jobs.clock import PHASES
from lmcode.train.summary import RunFacts, render

FACTS = RunFacts(steps=550, skipped_steps=3, training_seconds=301.2, tokens_per_s=3712.4,
              results={"on": EvalResult(3.5012, 90000, 2.1034, 40000), "off": EvalResult(3.7023, 90000, 2.3045, 40000),
                       "shuffled": EvalResult(3.6056, 90000, 2.2067, 40000)}, void={},
              filled_by_rank={2: [32768, 32700]}, slots=65536, memory_groups=1, recall_by_layer={2: 0.9987},
              hits_by_rank=[[30, 10], [25, 75]],
              phase_ms=dict.fromkeys(PHASES, 10.0), bytes_per_step=4775439.0, prompt_tail="def f():", sample="    return",
              checkpoint=Path("runs/x/checkpoints/step-00000550"), run_folder=Path("runs/x"))


def test_every_figure_is_there() -> None:
    text = render(FACTS)
    for words in ("5 min 01 s", "3,712 tokens/s", "3 skipped", "3.5012", "3.7023", "3.6056", "2.1034", "rank 0 32,768",
                  "rank 1 32,700", "75.0 % from rank 0", "25.0 % from rank 1", "4,775,439 bytes", "layer 2 0.9987", "  > ",
                  "runs/x/checkpoints/step-00000550", "tensorboard --logdir runs/x/tensorboard"):
        assert words in text, words


def test_what_was_not_measured_has_no_number() -> None:
    from dataclasses import replace

    assert "layer 2 not measured" in render(replace(FACTS, recall_by_layer={2: None}))


def test_a_run_without_a_bank_says_so() -> None:
    from dataclasses import replace

    text = render(replace(FACTS, results={"on": EvalResult(3.7, 90000, None, 0)}, filled_by_rank={}, hits_by_rank=[[0]]))
    assert "no bank" in text and "far is not measurable: no held-out document was read as far as 16 windows" in text


def test_a_control_that_says_nothing_has_a_reason_and_no_number() -> None:
    from dataclasses import replace

    results = {mode: result for mode, result in FACTS.results.items() if mode != "shuffled"}
    text = render(replace(FACTS, results=results, void={"shuffled": "there is one document"}))
    assert "not measurable: there is one document" in text and "3.6056" not in text
