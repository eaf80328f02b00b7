"""The one importer of deepspeed: a model, an optimizer and ZeRO behind five verbs.

`forward`, `backward`, `step`, `save`, `load` mean the same for ZeRO 0-3 and offload. `step` says whether the update was
applied, because a bank is written only after an applied update (a skipped step must leave no trace).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmcode.config import RunConfig
from lmcode.train.ds_config import resolve


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; vectors, scalars and embeddings do not (the usual rule, e.g. GPT-3's training code)."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decay, keep = [], []
    for parameter in model.parameters():
        (keep if parameter.ndim < 2 or id(parameter) in embeddings else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]


class Engine:
    """DeepSpeed's engine for one run. Make it on every rank, after `dist.start`."""

    def __init__(self, model: nn.Module, config: RunConfig, *, world_size: int) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        import deepspeed

        deepspeed.utils.logger.setLevel(logging.WARNING)
        self.ds_config = resolve(config, world_size)
        self.stage = self.ds_config["zero_optimization"]["stage"]
        # Stage 0 in fp32 is plain torch inside DeepSpeed: it would apply a gradient that is not finite. So clipping, the
        # norm and the refusal are ours there.
        self._plain = self.stage == 0 and config.train.precision == "fp32"
        settings = {**self.ds_config, "gradient_clipping": 0.0} if self._plain else self.ds_config
        self._clip, self._norm = config.train.gradient_clip, math.nan
        # DeepSpeed would compile a shared-memory kernel at the first start on a CPU (most of a minute, and it needs a C++
        # compiler). It serves inference_all_reduce only, which nothing here calls.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_init_required=False)
        self._engine, _, _, _ = deepspeed.initialize(
            model=model, model_parameters=parameter_groups(model, config.train.weight_decay),
            config=settings, dist_init_required=False)
        self.skipped_steps = 0

    @property
    def module(self) -> nn.Module:
        """The model; call it directly for evaluation (ZeRO-3 gathers weights around each submodule)."""
        return self._engine.module

    @property
    def device(self) -> torch.device:
        return torch.device(self._engine.device)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass in training mode."""
        self._engine.train()
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradient of `loss` / accumulation steps, averaged over ranks."""
        self._engine.backward(loss)

    def set_learning_rate(self, rate: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate

    def step(self) -> bool:
        """Updates the weights at an accumulation boundary; True if the update was applied.

        A gradient with a non-finite norm is dropped on every rank alike. Within an accumulation this counts the
        micro-batch and returns False.
        """
        boundary = self._engine.is_gradient_accumulation_boundary()
        refused = boundary and self._plain and not self._clip_gradients()
        if refused:
            for parameter in self.module.parameters():
                parameter.grad = None  # the optimizer passes over parameters without a gradient
        self._engine.step()
        applied = boundary and not refused and self._engine.was_step_applied()
        self.skipped_steps += int(boundary and not applied)
        return applied

    def _clip_gradients(self) -> bool:
        """Clips the averaged gradients, which are the same on every rank; False if their norm is not finite."""
        limit = self._clip or math.inf
        self._norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), limit))
        return math.isfinite(self._norm)

    def gradient_norm(self) -> float:
        """Global gradient norm of the last step, before clipping; NaN when unknown."""
        if self._plain:
            return self._norm
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else math.nan

    def full_state_dict(self) -> dict[str, Tensor]:
        """All weights in fp32 on the CPU, on every rank; under ZeRO-3 a collective that gathers one module at a time."""
        if self.stage < 3:
            return {name: p.detach().float().cpu().clone() for name, p in self.module.named_parameters()}
        import deepspeed

        state = {}
        for name, parameter in self.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                state[name] = parameter.detach().float().cpu().clone()
        return state

    def save(self, folder: Path) -> list[Path]:
        """Writes optimizer and sharded weights under `folder` (DeepSpeed's own files); returns this rank's. A collective.

        An error on one rank is raised when all ranks are past DeepSpeed's barriers; the others would hang otherwise.

        Raises:
            OSError, RuntimeError: what this rank's file system refused; torch wraps some OSErrors.
        """
        inner, written, problems = self._engine, [], []
        writer = inner.checkpoint_engine
        write = writer.save

        def guarded(state_dict: Any, path: str) -> None:
            try:
                write(state_dict, path)
                written.append(Path(path))
            except (OSError, RuntimeError) as error:
                problems.append(error)

        writer.save, inner._copy_recovery_script = guarded, lambda folder: None  # no programs among the data, either
        try:
            inner.save_checkpoint(str(folder), tag="zero", save_latest=False, client_state={})
        finally:
            del writer.save, inner._copy_recovery_script
        if problems:
            raise problems[0]
        return written

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote with the same number of ranks; a collective."""
        loaded, _ = self._engine.load_checkpoint(str(folder), tag="zero")
        if loaded is None:
            raise ValueError(f"no ZeRO state in {folder}")


def count_parameters(parameters: Iterable[nn.Parameter]) -> int:
    """Number of weights, also of those that ZeRO-3 has partitioned (their own `numel` is 0)."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in parameters)


def synchronise(device: torch.device) -> None:
    """Waits for the GPU, so that a clock read afterwards measures work and not its submission."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


