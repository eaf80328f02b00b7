"""LMCODE: a transformer that reads and writes one long-term memory, sliced over all ranks, inside the training step."""

from __future__ import annotations

__version__ = "0.1.0"
