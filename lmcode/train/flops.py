"""How much of a processor a run uses: floating point operations that the model needs, and the most memory it has taken."""

from __future__ import annotations

import resource
import sys

import torch

from lmcode.config import LMCODEConfig

MIB = 2**20
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes in which getrusage counts


def flops_per_token(parameters: int, config: LMCODEConfig, sequence_length: int) -> float:
    """Operations that training on one token needs, forward and backward: 6 N + 12 L C T.

    N weights, each in one product (the tied embedding in that of the head; learned positions in none), L layers of width C,
    T tokens to attend to. What a recomputation of activations costs is not in it, nor the search of a bank: these are means
    of ours, not the model's need. Source: Chowdhery et al., "PaLM", 2022, appendix B.
    """
    products = parameters - (config.context_length * config.hidden_size if config.positions == "learned" else 0)
    return 6.0 * products + 12.0 * config.num_layers * config.hidden_size * sequence_length


def peak_memory_mib(device: torch.device) -> float:
    """The most that this process has held so far: allocated by torch on its GPU; without one, resident in the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / MIB
