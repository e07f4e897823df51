"""The resources that a stage requests: a fraction of a GPU, whole GPUs, or a worker group with one
GPU per process, by an estimate of its memory.

The estimate is that of plan.memory, from the shape of the model (plan.shapes) or its number of
parameters. Only a few sizes are used (1/8, 1/4, 1/2, 1, n GPUs), because a worker is reused only by
stages that request exactly the same resources.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path

from ftsec_ray.config.sweep import MicroworldOptions, ModelSpec, SweepSpec, TaskSpec
from ftsec_ray.context import WorkerGroup
from ftsec_ray.data.raw_files import holds_more
from ftsec_ray.data.tasks import TASKS
from ftsec_ray.errors import SpecError
from ftsec_ray.lifecycle import hooks_of, roles
from ftsec_ray.method import ZERO_STAGES, Method
from ftsec_ray.plan.durations import parameters_of
from ftsec_ray.plan.memory import BYTES, inference_gib, memory_gib, weight_bytes
from ftsec_ray.plan.origin import source_dtype
from ftsec_ray.plan.shapes import shape_of
from ftsec_ray.plan.stage import is_group, is_on_gpu, workers_of
from ftsec_ray.registry import name_of
from ftsec_ray.training.encode import MAX_MICRO_BATCH_TOKENS

SHARES = (0.125, 0.25, 0.5, 1.0)
"""Fractions of one GPU that stages can request; above them, whole GPUs."""
DEFAULT_GPU_MEMORY_GIB = 80.0
MAX_WORKERS = 64
"""Largest worker group that is tried if the sweep does not set the number of workers."""
_GIB = 2**30


def gpus_for(gib: float, gpu_memory_gib: float) -> float:
    """The smallest fraction or number of GPUs with enough memory."""
    needed = gib / gpu_memory_gib
    return next((share for share in SHARES if needed <= share), float(-int(-needed // 1)))


def resource_name(gpus: float) -> str:
    """The resource class of a stage: `cpu`, `gpu` for one whole GPU, else `gpu:<amount>`."""
    return "cpu" if gpus == 0 else "gpu" if gpus == 1 else f"gpu:{gpus:g}"


def data_resource(workers: int, each: str) -> str:
    """The resource class of a stage that a data pipeline runs; its driver requests nothing.

    Args:
        workers: Number of workers of the pipeline.
        each: Resource class of each worker.
    """
    gpus = gpus_of(each)
    return f"data:{workers}" + (f":{gpus:g}" if gpus else "")


def group_name(workers: int, *, on_gpu: bool) -> str:
    """The resource class of a worker group."""
    return f"group:{workers}" if on_gpu else f"group:{workers}cpu"


def gpus_of(resource: str) -> float:
    """GPUs that a stage of a resource class uses, summed over all its processes."""
    if not is_on_gpu(resource):
        return 0.0
    if is_group(resource):
        return float(workers_of(resource))
    _, _, amount = resource.rpartition(":") if ":" in resource else ("", "", "1")
    return workers_of(resource) * float(amount)


def cpus_of(resource: str, spec: SweepSpec) -> float:
    """CPU cores that a stage of a resource class uses, summed over all its processes."""
    resources = spec.resources
    return workers_of(resource) * (
        resources.cpus_per_stage
        if is_on_gpu(resource) or is_group(resource) or not resources.wants_gpus
        else 1.0
    )


def is_large(task: TaskSpec, above: int) -> bool:
    """Whether the task's training split may have more than `above` rows. This is a guess; it
    decides only which process does the work, not the result.
    """
    source = dict(task.splits).get("train") or TASKS[task.kind].sources.get("train")
    if source is None:
        return int(dict(task.options).get("train_rows", MicroworldOptions().train_rows)) > above
    if source.rows is not None or source.path is None:
        return source.rows is None or source.rows > above
    path = Path(source.path).expanduser()
    return path.is_file() and holds_more(path, above)


def gpu_memory_of(spec: SweepSpec) -> float:
    """Memory of one GPU in GiB: by `resources`, else the smallest of the price table, else 80."""
    known = [node.gpu_memory_gib for node in spec.prices if node.gpus and node.gpu_memory_gib]
    return spec.resources.gpu_memory_gib or min(known, default=DEFAULT_GPU_MEMORY_GIB)


class Sizing:
    """The resource classes of the stages of each model of a sweep."""

    def __init__(self, spec: SweepSpec) -> None:
        self._spec = spec
        methods = [*spec.attacks, *(method for stack in spec.defenses for method in stack)]
        roles_needed = most_roles(methods)
        # The stage's model, the copy that it changes, and the models that methods compare with.
        self._models = 2 + roles_needed
        self._held = max((method.HELD_MODELS for method in methods), default=0)
        self._changes = any(
            hook in hooks_of(type(method))
            for method in methods
            for hook in ("prepare_model", "revise_model")
        )
        self._is_base_whole = bool(self._changes or roles_needed)
        self._recomputes: dict[tuple[str, bool], bool] = {}

    def resource(self, model: ModelSpec, *, trains_all: bool = False) -> str:
        """Resource class of the stages of a model that run in one process; SpecError if they do not
        fit on one GPU.

        All stages of a cell have the same class, so that a fine-tune and the stages after it form
        one unit in one worker.

        Args:
            model: The model.
            trains_all: Whether the stage pre-trains or aligns the model, so trains all weights.
        """
        wanted = self._spec.resources.gpus_per_stage
        if wanted != "auto":
            return resource_name(wanted)
        trains = trains_all or not self.is_split(model)
        recomputes = self.recomputes(model, trains_all=trains_all)
        gib = self.needed_gib(model, trains_all=trains_all, trains=trains, checkpointing=recomputes)
        card = gpu_memory_of(self._spec)
        gpus = gpus_for(gib, card)
        if gpus > 1:
            what = (
                "pre-training or alignment"
                if trains_all
                else "a stage"
                if trains
                else "a stage that does not train"
            )
            strategy = (
                " training.strategy: auto (DeepSpeed for what trains),"
                if self._spec.strategy.strategy == "single"
                else ""
            )
            less = (
                f"{strategy} training.adapter: lora, a smaller resources.micro_batch,"
                if trains
                else " a smaller"
            )
            raise SpecError(
                f"{what} of model {model.name!r} needs about {gib:.0f} GiB in one process, but one"
                f" GPU has {card:g} GiB",
                parameters_of(model),
                f"at most {card:g} GiB",
                f"use a larger resources.gpu_memory_gib,{less} resources.eval_batch or"
                " training.max_length; or set resources.gpus_per_stage: 1 to skip this check",
            )
        return resource_name(gpus)

    def is_split(self, model: ModelSpec, *, trains_all: bool = False) -> bool:
        """Whether the training of a model is sharded across a worker group: as the sweep sets it,
        else if it does not fit on one GPU.
        """
        strategy = self._spec.strategy
        if self._spec.training.quantization != "none" and not trains_all:
            return False  # quantized weights cannot be sharded
        if strategy.strategy != "auto":
            return strategy.strategy == "deepspeed"
        if strategy.deepspeed_above is not None:
            return parameters_of(model) > strategy.deepspeed_above
        if self._spec.resources.gpus_per_stage != "auto":
            return False
        card = gpu_memory_of(self._spec)
        recomputes = self._spec.strategy.gradient_checkpointing != "off"
        return (
            self.needed_gib(model, trains_all=trains_all, runs=False, checkpointing=recomputes)
            > card
        )

    def recomputes(self, model: ModelSpec, *, trains_all: bool = False) -> bool:
        """Whether training in one process uses gradient checkpointing: as the sweep sets it, else
        if it does not fit on its GPU otherwise.
        """
        key = model.name, trains_all
        if key not in self._recomputes:  # asked for every stage that trains
            chosen, share = self._spec.strategy.gradient_checkpointing, self._share()
            self._recomputes[key] = chosen == "on" or (
                chosen == "auto"
                and share is not None
                and self.needed_gib(model, trains_all=trains_all, runs=False) > share
            )
        return self._recomputes[key]

    def _share(self) -> float | None:
        """GPU memory in GiB for a stage in one process; None without a GPU."""
        gpus, card = self._spec.resources.gpus_per_stage, gpu_memory_of(self._spec)
        if gpus == "auto":
            return card
        return min(1.0, gpus) * card if gpus else None

    def worker_group(
        self, model: ModelSpec, methods: Sequence[Method] = (), *, trains_all: bool = False
    ) -> WorkerGroup:
        """The smallest worker group that can train a model: with the fewest workers, then the
        lowest ZeRO stage that all methods support. SpecError if none fits.

        Unless `gpus_per_stage` is `auto`, the sweep sets the number of workers, and a group that
        does not fit is no error.
        """
        card = gpu_memory_of(self._spec)
        stages = self._zero_stages(model, methods)
        least = (float("inf"), WorkerGroup(workers=0, zero_stage=0, micro_batch=0))
        for worker_group in self._worker_groups(model, stages, trains_all=trains_all):
            gib = self._group_gib(model, worker_group, trains_all=trains_all)
            if gib <= card:
                return worker_group
            least = min(least, (gib, worker_group), key=lambda candidate: candidate[0])
        gib, worker_group = least
        if self._spec.resources.gpus_per_stage != "auto":
            return worker_group
        narrow = [method for method in methods if method.ZERO_STAGES != ZERO_STAGES]
        because = "".join(
            f"; {method.KIND} {name_of(method)!r} supports only ZeRO stage"
            f" {_listed(method.ZERO_STAGES)}"
            for method in narrow
        )
        raise SpecError(
            f"training model {model.name!r} needs about {gib:.0f} GiB on each of"
            f" {worker_group.workers} GPUs at ZeRO stage {worker_group.zero_stage}, but one GPU has"
            f" {card:g} GiB{because}",
            parameters_of(model),
            f"at most {card:g} GiB",
            "use training.deepspeed: {offload: optimizer} (or parameters), more"
            " training.deepspeed.workers, a larger resources.gpu_memory_gib, training.adapter:"
            " lora, or a smaller training.max_length"
            + (", or exclude that method for this model" if narrow else ""),
        )

    def _zero_stages(self, model: ModelSpec, methods: Sequence[Method]) -> list[int]:
        """ZeRO stages that the sweep allows and all methods support, lowest first; SpecError names
        the first method that supports none of them.
        """
        config = self._spec.strategy.deepspeed
        floor = {"none": 0, "optimizer": 1, "parameters": 3}[config.offload]
        stages = (
            {stage for stage in ZERO_STAGES if stage >= floor}
            if config.zero_stage == "auto"
            else {config.zero_stage}
        )
        for method in methods:
            if not stages & method.ZERO_STAGES:
                name, works = name_of(method), _listed(method.ZERO_STAGES)
                raise SpecError(
                    f"{method.KIND} {name!r} does not support ZeRO stage {_listed(stages)}, which"
                    " training.deepspeed requests",
                    _listed(stages),
                    works or "one process",
                    (
                        "set training.deepspeed: {zero_stage: auto, offload: none} (the"
                        f" {method.KIND} supports stage {works}), "
                        if works
                        else "set "
                    )
                    + f"training.strategy: single, or exclude {{model: {model.name}, {method.KIND}:"
                    f" {name}}}",
                )
            stages &= method.ZERO_STAGES
        return sorted(stages)

    def _worker_groups(
        self, model: ModelSpec, stages: Sequence[int], *, trains_all: bool
    ) -> Iterator[WorkerGroup]:
        """All worker groups that the sweep allows, smallest first, each with decreasing
        micro-batches.
        """
        config, resources = self._spec.strategy.deepspeed, self._spec.resources
        length, batch = self._rows(model, trains_all=trains_all)
        gpus = resources.gpus_per_stage
        counts = (
            [2**power for power in range(MAX_WORKERS.bit_length())]
            if gpus == "auto"
            else [max(1, int(gpus))]
            if gpus
            else [2]
        )
        for workers in [config.workers] if config.workers else counts:
            if gpus == "auto" and not config.workers and workers > min(batch, MAX_WORKERS):
                return
            most = -(-batch // workers)
            given = config.micro_batch or resources.micro_batch
            largest = min(given or max(1, MAX_MICRO_BATCH_TOKENS // length), most)
            for stage in stages:
                sizes = [largest] if given else _halvings(largest)
                for recomputes, micro_batch in product(self._ways(), sizes):
                    yield WorkerGroup(
                        workers=workers,
                        zero_stage=stage,
                        micro_batch=micro_batch,
                        offload_optimizer=config.offload != "none",
                        offload_parameters=config.offload == "parameters",
                        gradient_checkpointing=recomputes,
                    )

    def _ways(self) -> tuple[bool, ...]:
        """The settings of gradient checkpointing to try in a worker group, the faster one first."""
        chosen = self._spec.strategy.gradient_checkpointing
        if chosen == "auto":
            return (False, True) if self._spec.resources.wants_gpus else (False,)
        return (chosen == "on",)

    def _group_gib(self, model: ModelSpec, worker_group: WorkerGroup, *, trains_all: bool) -> float:
        training = self._spec.training
        length, _ = self._rows(model, trains_all=trains_all)
        shape, dtype = shape_of(model), known_dtype(model)
        held = 0.0 if trains_all else self._held * weight_bytes(shape, dtype) / _GIB
        return held + memory_gib(
            shape,
            "full" if trains_all else training.adapter,
            length,
            worker_group.micro_batch,
            worker_group.zero_stage,
            worker_group.workers,
            rank=training.rank,
            dtype=dtype,
            checkpointing=worker_group.gradient_checkpointing,
            offload_optimizer=worker_group.offload_optimizer,
            offload_parameters=worker_group.offload_parameters,
        )

    def _rows(self, model: ModelSpec, *, trains_all: bool) -> tuple[int, int]:
        """Tokens per row and rows per optimizer step of a model's training."""
        config = model.align if trains_all and model.align else self._spec.training
        return config.max_length, config.batch_size

    def needed_gib(
        self,
        model: ModelSpec,
        *,
        trains_all: bool = False,
        trains: bool = True,
        runs: bool = True,
        checkpointing: bool = False,
    ) -> float:
        """GPU memory in GiB of the largest stage of a model in one process.

        Args:
            model: The model.
            trains_all: Whether the stage pre-trains or aligns the model, so trains all weights.
            trains: Whether to include stages that train.
            runs: Whether to include stages that run the model.
            checkpointing: Whether training uses gradient checkpointing.
        """
        spec, shape, dtype = self._spec, shape_of(model), known_dtype(model)
        training, resources = spec.training, spec.resources
        packed = "none" if trains_all else training.quantization
        # The unquantized base stays in host memory unless a stage needs it on the GPU.
        kept_as = "none" if self._is_base_whole else packed
        weights_gib = weight_bytes(shape, dtype, kept_as) / _GIB
        kept = max(weights_gib, min(resources.cache_gib, 4 * weights_gib))
        length, batch = self._rows(model, trains_all=trains_all)
        rows = resources.micro_batch or min(batch, max(1, MAX_MICRO_BATCH_TOKENS // length))
        train = memory_gib(
            shape,
            "full" if trains_all else training.adapter,
            length,
            rows,
            rank=training.rank,
            dtype=dtype,
            quantization=packed,
            checkpointing=checkpointing,
        )
        if trains_all:
            return kept + train
        train += self._held * weights_gib
        run = inference_gib(
            shape,
            models=self._models,
            batch=resources.eval_batch,
            prompt_tokens=training.max_length,
            new_tokens=spec.evaluation.new_tokens_of(model.source),
            dtype=dtype,
            quantization=kept_as,
            changes_weights=self._changes,
        )
        return kept + max(train if trains else 0.0, run if runs else 0.0)


def known_dtype(model: ModelSpec) -> str:
    """Dtype of a model's weights; if it is not known before the download, float32, the largest."""
    dtype = source_dtype(model, model.source)
    return dtype if dtype in BYTES else "float32"


def _halvings(number: int) -> list[int]:
    """A number and its halves down to 1."""
    return [number >> power for power in range(number.bit_length())]


def _listed(stages: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(stages)))


def most_roles(methods: Iterable[Method]) -> int:
    """The largest number of other models (roles) that one of the methods loads."""
    return max((len(method.needs() & set(roles())) for method in methods), default=0)
