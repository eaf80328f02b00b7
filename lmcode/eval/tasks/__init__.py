"""Tasks that ask a model for what it has read: each is one file, and a line in `TASKS`."""

from __future__ import annotations

from lmcode.eval.tasks.needles import Needles
from lmcode.eval.tasks.recall import KeyValueRecall
from lmcode.eval.tasks.shared import SharedFacts
from lmcode.eval.tasks.task import Task
from lmcode.eval.tasks.worlds import Worlds

TASKS: dict[str, Task] = {"recall": KeyValueRecall(), "last-value": KeyValueRecall(questions=16, again=16),
                          "needles": Needles(), "shared": SharedFacts(facts=64), "worlds": Worlds()}
