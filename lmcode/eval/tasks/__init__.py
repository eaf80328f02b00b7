"""Tasks that ask a model for what it has read: each is one file, and a line in `TASKS`."""

from __future__ import annotations

from lmcode.eval.tasks.recall import KeyValueRecall
from lmcode.eval.tasks.task import Task

TASKS: dict[str, Task] = {"recall": KeyValueRecall()}
