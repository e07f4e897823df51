"""Training one model in several processes with DeepSpeed ZeRO: the same loop, parts and checkpoints
as a single process.

Every process of a worker group runs the same stage and joins the others inside `loop.run`. The
function `sharded` assigns the micro-batches of a step, each with the weight of its tokens in the
whole step, so that loss, gradients and the rows of a step are those of a single process up to the
order of float32 sums. DeepSpeed decides which process holds what, but the results do not depend on
it: checkpoints hold whole tensors, and the trained weights are written to the plain model, whose
artifact is that of a single process. So a fine-tune may resume with another number of processes, or
with one.

Precision. Weights, gradients, moments and messages between processes are float32, and matrix
products run in bf16 with autocast if the GPU supports it, exactly as in a single process; adapters
and full weights alike. From stage 1 on, DeepSpeed also keeps a second, partitioned float32 copy of
the trained weights, the master copy, and each step writes the weights from it. Code that writes
weights between steps must write both:

- `after_step` hooks are the only place where a method may write weights. After them, the master
  copy is read back from the weights (`Member.after`). At stage 3 the weights are whole while the
  hooks run, and then they are sharded again with the values of process 0. No method of this package
  writes weights there: `lisa` only reads them.
- `objective` and `backward` may read weights at stages 0 to 2 only: at stage 3 weights are empty
  outside a layer's own forward pass. `lisa` reads them (its proximal term), hence its ZERO_STAGES.
  `vaccine` reads none, but differentiates by hidden states in a forward pass of the bare model,
  without DeepSpeed's engine; at stage 3 the engine's own hooks would have to take part in that, so
  it supports stages 0 to 2 as well. The norm of its perturbation, which depends on all rows of a
  step, is summed over the processes with `Step.summed`.
- A checkpoint's weights are copied into the model before DeepSpeed wraps it, so that both copies
  start from them.
- `revise_model`, `badedit` and other edits of finished models run outside training, on plain
  models.
"""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ftsec_ray.errors import EnvironmentFault
from ftsec_ray.training.setup import AfterStep, Backward, Batch, Objective, Saved, Step

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.config.sweep import TrainingConfig
    from ftsec_ray.context import WorkerGroup

BUCKET = 50_000_000
"""Maximum number of float32 numbers that are reduced or gathered in one message."""
LIVE = 100_000_000
"""Maximum number of weights that stage 3 keeps whole, besides the current layer."""


def sharded(batches: Sequence[Batch], member: int, workers: int) -> list[Batch]:
    """The micro-batches of one process, assigned in turn; all processes get the same number, some
    with a last one of weight 0.

    DeepSpeed averages over processes, so weights are multiplied by their number.
    """
    rounds = -(-len(batches) // workers)
    mine = list(batches[member::workers])
    return [replace(batch, weight=batch.weight * workers) for batch in mine] + [
        replace(batches[0], weight=0.0)
    ] * (rounds - len(mine))


def deepspeed_config(
    worker_group: WorkerGroup, max_grad_norm: float, *, bf16: bool
) -> dict[str, Any]:
    """DeepSpeed's own configuration; it needs no compiled operator."""
    zero: dict[str, Any] = {
        "stage": worker_group.zero_stage,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    if worker_group.zero_stage == 3:  # noqa: PLR2004
        zero |= {
            "stage3_max_live_parameters": LIVE,
            "stage3_max_reuse_distance": LIVE,
            "stage3_prefetch_bucket_size": BUCKET,
        }
    if worker_group.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if worker_group.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
        "zero_optimization": zero,
    }
    # No module is declared safe for messages in bf16: they stay float32, like the sums in a single
    # process.
    return (
        {
            **config,
            "torch_autocast": {
                "enabled": True,
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            },
        }
        if bf16
        else config
    )


def backward(engine: Any, batches: list[Batch], objective: Objective, step: Step) -> float:
    """The plain backward pass of one process of a group, with DeepSpeed's engine."""
    total = 0.0
    for index, batch in enumerate(batches):
        engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
        loss = objective(engine, batch, step) * batch.weight
        engine.backward(loss)
        total += float(loss.detach())
    return total


class Member:
    """One process of a worker group; same interface as `loop.SingleProcess`. torch.distributed must
    be initialised.
    """

    backward: Backward = staticmethod(backward)

    def __init__(self, worker_group: WorkerGroup, device: str, *, has_bf16: bool) -> None:
        import torch.distributed as dist

        self._worker_group, self._device, self._has_bf16 = worker_group, device, has_bf16
        self._rank = dist.get_rank()
        self.salt = (self._rank,)

    # Agreement.

    def agreed(self, saved: Saved | None) -> Saved | None:
        """The checkpoint of process 0; the other processes cannot read its folder."""
        import torch
        import torch.distributed as dist

        message: list[Any] = [
            (
                None
                if saved is None
                else (
                    saved.state,
                    {name: (tensor.shape, tensor.dtype) for name, tensor in saved.tensors.items()},
                )
            )
        ]
        dist.broadcast_object_list(message, src=0)
        if message[0] is None:
            return None
        state, shapes = message[0]
        tensors = {}
        for name, (shape, dtype) in shapes.items():
            tensor = (
                saved.tensors[name].to(self._device)
                if saved is not None
                else torch.empty(shape, dtype=dtype, device=self._device)
            )
            dist.broadcast(tensor, src=0)
            tensors[name] = tensor.cpu()
        return Saved(state, tensors)

    def mean(self, loss: float) -> float:
        """The loss of the whole step: the mean over all processes, see `sharded`."""
        return self.summed(loss) / self._worker_group.workers

    def is_due(self, due: bool) -> bool:  # noqa: FBT001
        """Whether process 0 wants a checkpoint now; all processes must help to gather it."""
        return self.summed(float(due and self._rank == 0)) > 0

    def summed(self, number: float) -> float:
        """A number summed over all processes."""
        import torch
        import torch.distributed as dist

        total = torch.tensor(number, dtype=torch.float64, device=self._device)
        dist.all_reduce(total)
        return float(total)

    # Training.

    def begin(self, model: Any, config: TrainingConfig, saved: Saved | None) -> None:
        """Let DeepSpeed shard a copy of the model, with the moments of a checkpoint; `model` stays
        unsharded.
        """
        import torch

        deepspeed = _deepspeed(self._device)
        self._plain, trained = model, copy.deepcopy(model).train()
        moving = [parameter for parameter in trained.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(
            moving, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.model, *_ = deepspeed.initialize(
            model=trained,
            optimizer=self._optimizer,
            dist_init_required=False,
            config=deepspeed_config(self._worker_group, config.max_grad_norm, bf16=self._has_bf16),
        )
        self.trainable = {
            name: parameter
            for name, parameter in self.model.module.named_parameters()
            if parameter.requires_grad
        }
        if saved is not None:
            self._take_moments(saved.tensors)

    def share(self, batches: list[Batch]) -> list[Batch]:
        """The micro-batches of a step for this process."""
        return sharded(batches, self._rank, self._worker_group.workers)

    def update(self, rate: float) -> None:
        """Clip the gradients, take an optimizer step, clear the gradients."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self.model.step()

    def after(self, hooks: Sequence[AfterStep], step: Step) -> None:
        """Run the methods' hooks after an optimizer step; weights that they write also reach
        DeepSpeed's master copy.
        """
        if not hooks:
            return
        with self._whole():
            for hook in hooks:
                hook(self.model.module, step)
        if self._worker_group.zero_stage:
            self.model.optimizer.refresh_fp32_params()

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Inside the `with` block, the trained weights are whole; afterwards all have those of
        process 0.
        """
        if self._worker_group.zero_stage < 3:  # noqa: PLR2004
            yield
            return
        with _deepspeed(self._device).zero.GatheredParameters(
            list(self.trainable.values()), modifier_rank=0
        ):
            yield

    # Results that remain after the worker group.

    def state(self) -> dict[str, Tensor]:
        """Full weights and moments by name, for a checkpoint; empty in all processes except the
        first.
        """
        import torch

        steps = torch.tensor(float(self._steps_taken()))
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.trainable.items():
            parts = {
                f"weight/{name}": self._weight(parameter),
                f"m/{name}": self._moment(parameter, "exp_avg"),
                f"v/{name}": self._moment(parameter, "exp_avg_sq"),
                f"t/{name}": steps.clone(),
            }
            if self._rank == 0:
                tensors |= {key: tensor.detach().cpu().clone() for key, tensor in parts.items()}
        return tensors

    def finish(self) -> None:
        """Leave the trained weights in the unsharded model, in every process."""
        import torch

        plain = dict(self._plain.named_parameters())
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                plain[name].copy_(self._weight(parameter))
        self._plain.eval()
        self.model.destroy()
        del self.model, self.trainable, self._optimizer

    def _weight(self, parameter: Any) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        whole: Tensor = (
            parameter.detach()
            if self._worker_group.zero_stage < 3
            else safe_get_full_fp32_param(parameter)
        )  # noqa: PLR2004
        return whole

    def _moment(self, parameter: Any, key: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        own = self._optimizer.state.get(parameter)  # at stage 0 nothing is sharded
        whole: Tensor = own[key] if own else safe_get_full_optimizer_state(parameter, key)
        return whole

    def _steps_taken(self) -> int:
        return max(int(state["step"]) for state in self._optimizer.state.values())

    def _take_moments(self, tensors: dict[str, Tensor]) -> None:
        """Write the moments of a checkpoint to where DeepSpeed keeps them; it creates them in its
        first step, so this takes a step with learning rate 0 first.
        """
        import torch
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        for group in self._optimizer.param_groups:
            group["lr"] = 0.0
        ids = torch.zeros((1, 2), dtype=torch.int64, device=self._device)
        self.model.set_gradient_accumulation_boundary(True)
        self.model.backward(self.model(input_ids=ids, use_cache=False).logits.float().sum() * 0.0)
        self.model.step()
        for state in self._optimizer.state.values():
            state["step"].fill_(
                max(float(tensor) for name, tensor in tensors.items() if name.startswith("t/"))
            )
        for name, parameter in self.trainable.items():
            for key, short in (("exp_avg", "m"), ("exp_avg_sq", "v")):
                value = tensors[f"{short}/{name}"].to(self._device)
                own = self._optimizer.state.get(parameter)
                if own:
                    own[key].copy_(value)
                elif hasattr(parameter, "ds_tensor"):
                    safe_set_local_optimizer_state(
                        parameter, self._part(value, parameter.ds_tensor.numel()), key
                    )
                else:
                    safe_set_full_optimizer_state(parameter, value, key)

    def _part(self, value: Tensor, size: int) -> Tensor:
        """The part of a tensor for this process at stage 3: equal parts, the last one padded with
        0.
        """
        from torch.nn.functional import pad

        part = value.flatten()[self._rank * size : (self._rank + 1) * size]
        padded: Tensor = pad(part, (0, size - part.numel()))
        return padded


def check_deepspeed() -> None:
    """EnvironmentFault if DeepSpeed is not installed here."""
    from importlib.util import find_spec

    if find_spec("deepspeed") is None:
        raise EnvironmentFault(
            "training with DeepSpeed needs the package deepspeed, which is not installed",
            "deepspeed",
            "the extra `deepspeed` on all nodes",
            "pip install 'ftsec-ray[deepspeed]', or set training.strategy: single",
        )


def _deepspeed(device: str) -> Any:
    """The library, set to its device and without log lines; EnvironmentFault if it is not
    installed.
    """
    if not device.startswith("cuda"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault(
        "DS_IGNORE_CUDA_DETECTION", "1"
    )  # otherwise it looks for nvcc, although nothing is compiled
    check_deepspeed()
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"torch\.distributed"
    )  # about names that torch has changed
    # On a CPU it would compile its own shared-memory messages on first use; those of gloo need no
    # compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
