"""The one importer of deepspeed: a model, an optimizer and ZeRO behind five verbs.

`forward`, `backward`, `step`, `parameters`, `load` mean the same for ZeRO 0-3 and offload. `step` says whether the update
was applied, because a bank is written only after an applied update (a skipped step must leave no trace). `parameters` gives
out weights and optimizer state parameter by parameter, whole, so that a checkpoint knows neither stages nor ranks.
"""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lmcode.backbone import Backbone
from lmcode.config import ConfigError, RunConfig
from lmcode.train.ds_config import resolve

MOMENTS = ("exp_avg", "exp_avg_sq")  # of torch's AdamW


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; vectors, scalars and embeddings do not (the usual rule, e.g. GPT-3's training code)."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decay: list[nn.Parameter] = []
    keep: list[nn.Parameter] = []
    for parameter in (one for one in model.parameters() if one.requires_grad):
        (keep if parameter.ndim < 2 or id(parameter) in embeddings else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class Masters:
    """What an engine leaves on its model as `masters`: the fp32 weight behind each parameter, for `save_pretrained`.

    A copy of the model, or a pickle of it, has None there: what is copied are the parameters.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __call__(self, parameter: nn.Parameter) -> Tensor:
        """See `Engine.exact_weight`. A collective."""
        return self._engine.exact_weight(parameter)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()


class Engine:
    """DeepSpeed's engine for one run. Make it on every rank, after `dist.start`. The model keeps it alive."""

    def __init__(self, model: Backbone, config: RunConfig, *, world_size: int) -> None:
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError("there is nothing to train: the backbone is frozen and the recipe has no weights; set "
                              "model.train_backbone=true, or measure it as it is by lmcode eval")
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        import deepspeed

        # DeepSpeed calls functions that new versions of torch rename; our users can do nothing about it.
        warnings.filterwarnings("ignore", message=r"`torch.distributed.\w+_tensor` is deprecated", category=FutureWarning)
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
        self._dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        model.masters = Masters(self)

    @property
    def module(self) -> Backbone:
        """The model; call it directly for evaluation (ZeRO-3 gathers weights around each submodule)."""
        model: Backbone = self._engine.module
        return model

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

    @property
    def learning_rate(self) -> float:
        """The rate that the optimizer has now."""
        return float(self._engine.optimizer.param_groups[0]["lr"])

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
        """Clips the averaged gradients, which are the same on every rank; False if their norm is not finite.

        The norm is summed in fp64, as DeepSpeed does: torch's own in fp32 is off by 7e-6, and after 50 steps that was
        2e-4 of the loss.
        """
        parameters = [parameter for parameter in self.module.parameters() if parameter.grad is not None]
        norms = [torch.linalg.vector_norm(parameter.grad, dtype=torch.float64) for parameter in parameters]
        norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
        self._norm = float(norm)
        if math.isfinite(self._norm) and self._clip:
            nn.utils.clip_grads_with_norm_(parameters, self._clip, norm.float())
        return math.isfinite(self._norm)

    def gradient_norm(self) -> float:
        """Global gradient norm of the last step, before clipping; NaN when unknown."""
        if self._plain:
            return self._norm
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else math.nan

    @property
    def updates(self) -> int:
        """Updates that the optimizer has applied; the same on every rank."""
        return max((int(state["step"]) for state in self._optimizer.state.values()), default=0)

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        """torch's own, inside whatever DeepSpeed has put around it."""
        inner: torch.optim.Optimizer = getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)
        return inner

    def parameters(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Name and whole state of each parameter: fp32 "weight" (the master weight in bf16) and, after the first update,
        "exp_avg" and "exp_avg_sq" unless it is frozen. A collective for each; the order is that of the model."""
        moments = MOMENTS if self.updates else ()
        self._link_moments()
        for name, parameter in self.module.kept_parameters():
            state = {"weight": self._whole_weight(parameter)}
            if parameter.requires_grad:
                state.update({moment: self._whole_moment(parameter, moment) for moment in moments})
            yield name, state

    def weights(self) -> dict[str, Tensor]:
        """All weights, fp32 on the CPU, on every rank. A collective."""
        return {name: self._whole_weight(parameter) for name, parameter in self.module.kept_parameters()}

    def exact_weight(self, parameter: nn.Parameter) -> Tensor:
        """The fp32 weight behind a parameter of the model, whole and on the CPU, on every rank. A collective.

        Where somebody has changed the parameter since the last update, in which it was the rounded weight, it is the
        parameter that counts, element by element.
        """
        whole = self._whole_weight(parameter)
        if parameter.shape != whole.shape:  # ZeRO-3 has it in parts, which nobody else changes
            return whole
        now = parameter.detach().cpu()
        return whole.where(whole.to(self._dtype).to(now.dtype) == now, now.float())

    def _whole_weight(self, parameter: nn.Parameter) -> Tensor:
        import deepspeed

        if self.stage == 0:
            return self._master(parameter).detach().float().cpu().clone()
        whole: Tensor | None = deepspeed.utils.safe_get_full_fp32_param(parameter)
        if whole is None:  # a frozen parameter
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
                return parameter.detach().float().cpu().clone()
        return whole.cpu()

    def _whole_moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        import deepspeed

        if self.stage == 0:
            own: Tensor = self._optimizer.state[self._master(parameter)][moment]
            return own.cpu().clone()
        whole: Tensor = deepspeed.utils.safe_get_full_optimizer_state(parameter, moment)
        return whole.cpu()

    def load(self, updates: int, read: Callable[[str], dict[str, Tensor]]) -> None:
        """Sets all weights and the optimizer to a state of `parameters`, saved by any stage on any number of ranks.

        Args:
            updates: what `updates` was.
            read: from the name of a parameter to its state; called once for each, in order. A collective.
        """
        if updates:
            self._make_moments(updates)
        for name, parameter in self.module.kept_parameters():
            state = read(name)
            self._set_weight(parameter, state["weight"])
            for moment in MOMENTS if updates and parameter.requires_grad else ():
                self._set_moment(parameter, moment, state[moment])

    def _make_moments(self, updates: int) -> None:
        """What the optimizer and DeepSpeed would make in the first step, so that there is something to load into."""
        in_groups = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        # ZeRO-3 hands its partitions to the optimizer only while it steps.
        for parameter in getattr(self._engine.optimizer, "fp32_partitioned_groups_flat", in_groups):
            self._optimizer.state[parameter] = {"step": torch.tensor(float(updates)),
                                                **{moment: torch.zeros_like(parameter) for moment in MOMENTS}}
        self._link_moments()

    def _link_moments(self) -> None:
        """Makes ZeRO 1 and 2 find each parameter's moments. DeepSpeed does that when it has stepped the first of its
        parameter groups, while the others have no moments yet, and never again."""
        if hasattr(self._engine.optimizer, "_lazy_init_hp_params_optimizer_state") and self.updates:
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _master(self, parameter: nn.Parameter) -> Tensor:
        """The tensor that the optimizer updates where nothing is sharded: the parameter, or in bf16 its fp32 copy."""
        outer = self._engine.optimizer
        pairs = zip(getattr(outer, "fp16_groups", ()), getattr(outer, "fp32_groups", ()), strict=True)
        copies: dict[int, Tensor] = {id(low): high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}
        return copies.get(id(parameter), parameter)

    @torch.no_grad()
    def _set_weight(self, parameter: nn.Parameter, whole: Tensor) -> None:
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.stage == 3):
            parameter.copy_(whole)
        if self.stage == 0:
            self._master(parameter).copy_(whole)
        elif parameter.requires_grad:
            self._set_sharded(parameter, whole, deepspeed.utils.safe_set_full_fp32_param,
                              deepspeed.utils.safe_set_local_fp32_param)

    @torch.no_grad()
    def _set_moment(self, parameter: nn.Parameter, moment: str, whole: Tensor) -> None:
        import deepspeed

        if self.stage == 0:
            self._optimizer.state[self._master(parameter)][moment].copy_(whole)
            return
        self._set_sharded(parameter, whole,
                          functools.partial(deepspeed.utils.safe_set_full_optimizer_state, optim_state_key=moment),
                          functools.partial(deepspeed.utils.safe_set_local_optimizer_state, optim_state_key=moment))

    def _set_sharded(self, parameter: nn.Parameter, whole: Tensor, set_full: Callable[..., None],
                     set_local: Callable[..., None]) -> None:
        """Hands each rank its part. ZeRO-3 is given the part itself: its own division fails where R does not divide it."""
        whole = whole.to(self.device)
        if self.stage < 3:
            set_full(parameter, whole)
            return
        part: Tensor = getattr(parameter, "ds_tensor")  # noqa: B009  (DeepSpeed puts it there, unknown to torch's types)
        size = part.numel()
        flat = nn.functional.pad(whole.flatten(), (0, size * self._engine.dp_world_size - whole.numel()))
        set_local(parameter, flat.narrow(0, size * self._engine.global_rank, size))


def count_parameters(parameters: Iterable[nn.Parameter]) -> int:
    """Number of weights, also of those that ZeRO-3 has partitioned (their own `numel` is 0)."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in parameters)


def synchronise(device: torch.device) -> None:
    """Waits for the GPU, so that a clock read afterwards measures work and not its submission."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


