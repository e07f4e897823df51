"""What a stage asks the cluster for: memory by arithmetic, and from that a share of a GPU or several of them.

Nobody knows a model's shape before it is loaded, so width and depth are guessed from the count of weights. Few shares are
given out (1/8, 1/4, 1/2, 1, n), since a worker is only reused by stages that ask for exactly the same.

Bytes per weight of a single process that trains in float32 under bf16 autocast: 4 weight, 4 gradient, 8 AdamW, 2 bf16
copy; an adapter spares the frozen weights gradient and optimizer. Beside them lie activations (by tokens, width, depth),
logits (by tokens and vocabulary), the models that a worker keeps, and what CUDA itself takes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from ftsec_ray.data.tasks import TASKS
from ftsec_ray.errors import SpecError
from ftsec_ray.method import Method
from ftsec_ray.plan.cost import parameters_of
from ftsec_ray.plan.stage import ROLES
from ftsec_ray.spec.sweep import MicroworldOptions, ModelSpec, SweepSpec, TaskSpec
from ftsec_ray.training.encode import MAX_MICRO_BATCH_TOKENS

Adapter = Literal["lora", "full"]
SHARES = (0.125, 0.25, 0.5, 1.0)
"""Shares of one GPU that are given out; above them whole GPUs."""
DEFAULT_GPU_MEMORY_GIB = 80.0
CUDA_GIB = 1.0
"""Context, kernels and fragments of one process on a GPU."""
MAX_VOCABULARY = 128_256
_WEIGHT, _GRADIENT, _ADAMW, _AUTOCAST = 4, 4, 8, 2
_ACTIVATION = 60
"""Bytes of activations per token, unit of width and layer: bf16 products, float32 residuals and norms, nothing recomputed."""
_GIB = 2**30
_ROW, _PACKED_ROW = 64, 16
"""Bytes of a short row in a file, as text and packed."""


def width_and_depth(parameters: int) -> tuple[float, float]:
    """A decoder's usual width and layers: 12 x width^2 weights per layer, and 100 units of width per layer."""
    width = (100 * parameters / 12) ** (1 / 3)
    return width, max(1.0, width / 100)


def vocabulary_of(parameters: int) -> float:
    """Tokens of a vocabulary: the embedding takes a third of a small model, and is seldom above that of Llama 3."""
    return min(MAX_VOCABULARY, parameters / (3 * width_and_depth(parameters)[0]))


def memory_gib(parameters: int, adapter: Adapter, max_length: int, micro_batch: int, zero_stage: int = 0, workers: int = 1,
               *, rank: int = 8) -> float:
    """GiB that one process of a tune takes on its GPU, without what it keeps of other models.

    Args:
        parameters: weights of the model.
        adapter: `lora` trains factors beside frozen weights, `full` every weight.
        max_length: tokens per row, at most.
        micro_batch: rows per forward pass.
        zero_stage: DeepSpeed ZeRO, 0..3: what is split over the workers (1 optimizer, 2 gradients too, 3 weights too).
        workers: processes of the tune, one GPU each.
        rank: of the LoRA factors.
    """
    width, depth = width_and_depth(parameters)
    # Seven linear layers per block: four of width x width, three of width x 8/3 width.
    trained = parameters if adapter == "full" else rank * depth * 19 * width
    added = 0.0 if adapter == "full" else trained
    split = [workers if zero_stage >= stage else 1 for stage in (3, 2, 1)]
    weights = (parameters + added) * (_WEIGHT + _AUTOCAST) / split[0]
    optimizer = trained * (_GRADIENT / split[1] + _ADAMW / split[2])
    tokens = micro_batch * max_length
    logits = 3 * 4 * vocabulary_of(parameters)  # in float32: the logits, their log-softmax, their gradient
    return (weights + optimizer + tokens * (_ACTIVATION * width * depth + logits)) / _GIB + CUDA_GIB


def inference_gib(parameters: int, *, models: int, batch: int, prompt_tokens: int, new_tokens: int) -> float:
    """GiB of a stage that runs or rewrites models in float32: their weights, the key-value cache, the logits of the prompts."""
    width, depth = width_and_depth(parameters)
    cache = batch * (prompt_tokens + new_tokens) * 2 * 4 * width * depth
    logits = batch * prompt_tokens * 4 * vocabulary_of(parameters)
    return (models * parameters * _WEIGHT + cache + logits) / _GIB + CUDA_GIB


def gpus_for(gib: float, gpu_memory_gib: float) -> float:
    """The smallest share of a GPU, or number of GPUs, whose memory is enough."""
    share = gib / gpu_memory_gib
    return next((one for one in SHARES if share <= one), float(-int(-share // 1)))


def resource_name(gpus: float) -> str:
    """The resource class of a stage: `cpu`, `gpu` for one whole GPU, else `gpu:<amount>`."""
    return "cpu" if gpus == 0 else "gpu" if gpus == 1 else f"gpu:{gpus:g}"


def data_resource(workers: int, each: str) -> str:
    """The class of a stage that a pipeline of so many workers does, each of them a stage of class `each`; its driver asks for nothing."""
    gpus = gpus_of(each)
    return f"data:{workers}" + (f":{gpus:g}" if gpus else "")


def workers_of(resource: str) -> int:
    """Workers that a resource class asks for beside the process of its stage; 0 for all but `data`."""
    name, *amounts = resource.split(":")
    return int(amounts[0]) if name == "data" else 0


def gpus_of(resource: str) -> float:
    """GPUs that a resource class asks for."""
    name, *amounts = resource.split(":")
    if name == "data":
        return int(amounts[0]) * float(amounts[1] if len(amounts) > 1 else 0)
    return 0.0 if name == "cpu" else float(amounts[0] if amounts else 1)


def cpus_of(resource: str, spec: SweepSpec) -> float:
    """Cores that a stage of a resource class asks for."""
    resources = spec.resources
    return (workers_of(resource) or 1) * (resources.cpus_per_stage if gpus_of(resource) or not resources.wants_gpus else 1.0)


def is_large(task: TaskSpec, above: int) -> bool:
    """Whether the user's rows of a task may be more than `above`, as far as a plan can tell: a guess that decides who does the work only."""
    source = dict(task.splits).get("train") or TASKS[task.kind].sources.get("train")
    if source is None:
        return int(dict(task.options).get("train_rows", MicroworldOptions().train_rows)) > above
    if source.rows is not None or source.path is None:
        return source.rows is None or source.rows > above
    path = Path(source.path).expanduser()
    packed = path.suffix in (".gz", ".parquet")
    return path.is_file() and path.stat().st_size > above * (_PACKED_ROW if packed else _ROW)


def gpu_memory_of(spec: SweepSpec) -> float:
    """GiB of one GPU: as `resources` says, else the smallest that the price table names, else 80."""
    known = [node.gpu_memory_gib for node in spec.prices if node.gpus and node.gpu_memory_gib]
    return spec.resources.gpu_memory_gib or min(known, default=DEFAULT_GPU_MEMORY_GIB)


class Sizing:
    """The resource classes of the stages of each model of a sweep."""

    def __init__(self, spec: SweepSpec) -> None:
        self._spec = spec
        methods = [*spec.attacks, *(method for stack in spec.defenses for method in stack)]
        self._models = 2 + most_roles(methods)  # the stage's own, the copy that it changes, and those that methods compare with

    def resource(self, model: ModelSpec, *, trains_all: bool = False) -> str:
        """Class of the stages of a model; SpecError when one process does not fit on one GPU.

        Stages of a cell share one class, so that a tune and what follows it stay one unit in one worker. `trains_all` are
        the stages that pre-train or align.
        """
        wanted = self._spec.resources.gpus_per_stage
        if wanted != "auto":
            return resource_name(wanted)
        gib = self.needed_gib(model, trains_all=trains_all)
        card = gpu_memory_of(self._spec)
        gpus = gpus_for(gib, card)
        if gpus > 1:
            what = "pre-training or alignment" if trains_all else "a stage"
            raise SpecError(f"{what} of model {model.name!r} needs about {gib:.0f} GiB in one process and one GPU has {card:g}",
                            parameters_of(model), f"at most {card:g} GiB",
                            "a larger resources.gpu_memory_gib, training.adapter: lora, a smaller resources.micro_batch, resources.eval_batch or "
                            "training.max_length; or gpus_per_stage: 1 if you know better")
        return resource_name(gpus)

    def needed_gib(self, model: ModelSpec, *, trains_all: bool = False) -> float:
        """GiB that the largest stage of a model takes on its GPU."""
        spec, parameters = self._spec, parameters_of(model)
        training, resources = spec.training, spec.resources
        weights_gib = parameters * _WEIGHT / _GIB
        kept = max(weights_gib, min(resources.cache_gib, 4 * weights_gib))
        length = model.align.max_length if trains_all and model.align else training.max_length
        batch = model.align.batch_size if trains_all and model.align else training.batch_size
        rows = resources.micro_batch or min(batch, max(1, MAX_MICRO_BATCH_TOKENS // length))
        train = memory_gib(parameters, "full" if trains_all else training.adapter, length, rows, rank=training.rank)
        if trains_all:
            return kept + train
        run = inference_gib(parameters, models=self._models, batch=resources.eval_batch, prompt_tokens=training.max_length,
                            new_tokens=spec.evaluation.max_new_tokens)
        return kept + max(train, run)


def most_roles(methods: Iterable[Method]) -> int:
    """Models of other roles that any one method loads, at most."""
    return max((len(method.NEEDS & set(ROLES)) for method in methods), default=0)
