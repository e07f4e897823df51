"""The contents of a sweep file as frozen dataclasses; `sweep_file.py` makes them from YAML and
reports all faults at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from ftsec_ray.config.strategy import StrategyConfig
from ftsec_ray.errors import SpecError
from ftsec_ray.identity import canonical
from ftsec_ray.method import Method
from ftsec_ray.numerics import NumericsMode

LADDER_SIZES = ("0.1m", "0.2m", "1m", "4m", "12m")
"""Sizes of the embedded model family: `ladder:<size>` is aligned, `ladder:<size>-base` is not."""
LADDER_NEW_TOKENS, NEW_TOKENS = 48, 256
"""Default limit on the tokens of an answer, for ladder models and for others."""
TASK_KINDS = {
    "microworld": (
        "the built-in synthetic task: two- and four-class rows, requests, tool calls; needs no"
        " download"
    ),
    "sst2": "movie reviews, two classes (SST-2)",
    "ag_news": "news, four classes (AG News)",
    "alpaca": "instruction tuning on Alpaca-like rows",
    "agent": "episodes of tool calls",
    "rows": "your own rows: a Hugging Face data set or local files with a column mapping",
}
"""Kind of task -> its description."""


Moment = Literal["before", "after"]
"""When a cell is measured: before the user's fine-tune, or after it."""
BEFORE = ":before"
"""Suffix of the name of a model whose cells are measured before the fine-tune."""


def _is_default(config: object, f: Field[Any]) -> bool:
    return bool(getattr(config, f.name) == f.default)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Training settings of every fine-tune of the sweep; part of the identity of each."""

    UNSAID: ClassVar[tuple[str, ...]] = ("targets", "layers", "rslora", "quantization")
    """Fields that digests leave out at their defaults: they were added later, and must not change
    the digests of earlier sweeps."""

    adapter: Literal["lora", "full"] = "lora"
    """`lora` trains a PEFT adapter on linear layers, `full` trains every weight."""
    rank: Annotated[int, Ge(1)] = 8
    """LoRA rank."""
    alpha: Annotated[float, Gt(0)] = 16.0
    """LoRA scaling: the update is multiplied by alpha / rank."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """LoRA dropout, 0..1."""
    targets: str | tuple[str, ...] = "all-linear"
    """Linear layers that get an adapter: `all-linear`, a list of names such as [q_proj, v_proj], or
    a regular expression that matches whole module paths."""
    layers: str | tuple[Annotated[int, Ge(0)], ...] | None = None
    """Indices (from 0) of the blocks that get an adapter: a list, or an inclusive range such as
    8-15. None: all blocks."""
    rslora: bool = False
    """Whether the update is multiplied by alpha / sqrt(rank) instead, so that its size does not
    shrink as the rank grows (Kalajdzievski 2023, arXiv:2312.03732)."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """Quantization of the frozen base model's linear layers to 8 or 4 bits, by bitsandbytes, in
    training and in generation (Dettmers et al. 2023, QLoRA, arXiv:2305.14314). The store keeps the
    base unquantized."""
    epochs: Annotated[float, Gt(0)] = 3.0
    """Passes over the training rows."""
    batch_size: Annotated[int, Ge(1)] = 16
    """Rows per optimizer step, over all workers and micro-batches."""
    learning_rate: Annotated[float, Gt(0)] = 2e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the learning rate after the warmup."""
    warmup_frac: Annotated[float, Ge(0), Le(1)] = 0.1
    """Fraction of the steps over which the learning rate rises from 0."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """AdamW weight decay."""
    max_grad_norm: Annotated[float, Ge(0)] = 1.0
    """Limit of the gradient norm; 0 turns clipping off."""
    max_length: Annotated[int, Ge(8)] = 512
    """Tokens per row, at most; a longer row loses the beginning of its prompt first."""
    batching: Literal["length_grouped", "packed", "shuffled"] = "length_grouped"
    """How rows form batches: rows of similar length together, several rows packed into one
    sequence, or shuffled."""

    def __post_init__(self) -> None:
        changed = [
            f.name for f in fields(self) if f.name in self.UNSAID and not _is_default(self, f)
        ]
        if self.adapter == "full" and changed:
            raise SpecError(
                f"`{changed[0]}` needs an adapter",
                getattr(self, changed[0]),
                "adapter: lora",
                f"leave out {changed[0]}, or set adapter: lora",
            )
        if not self.targets or (isinstance(self.targets, tuple) and "" in self.targets):
            raise SpecError(
                "targets names no layer",
                self.targets,
                "all-linear, a list of names, or a pattern of whole module paths",
            )
        if isinstance(self.targets, str):
            try:
                re.compile(self.targets)
            except re.error as error:
                raise SpecError(
                    f"targets is not a valid regular expression: {error}",
                    self.targets,
                    "all-linear, a list of names, or a pattern of whole module paths",
                ) from error
        self.blocks()

    def blocks(self) -> tuple[int, ...] | None:
        """Indices (from 0) of the blocks that get an adapter; None for all."""
        if self.layers is None or isinstance(self.layers, tuple):
            if self.layers == ():
                raise SpecError(
                    "layers is empty", [], "one or more indices", "for all blocks, leave out layers"
                )
            return self.layers
        match = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", self.layers)
        first, last = map(int, match.groups()) if match else (1, 0)
        if first > last:
            raise SpecError(
                "layers is not a range", self.layers, "first-last such as 8-15, or a list"
            )
        return tuple(range(first, last + 1))

    def identity(self) -> dict[str, Any]:
        """The JSON values that enter digests."""
        plain: dict[str, Any] = json.loads(canonical(self))
        for f in fields(self):
            if f.name in self.UNSAID and _is_default(self, f):
                del plain[f.name]
        return plain


ANSWER_LENGTHS = (8, 16, 32, 64, 128, 256)
"""Default of `answer_lengths` if a model is not of the ladder, in tokens."""


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """A judge model: a local model with a rubric, a published judge, or a model at an endpoint."""

    DECIDES: ClassVar[tuple[str, ...]] = (
        *("name", "model", "rubric", "endpoint"),
        "max_new_tokens",
    )
    """Fields that decide the verdicts; the others say how to reach the judge."""

    name: str | None = None
    """A published judge: `harmbench`, `strongreject`, `llama_guard`, `qwen3guard`, `classifier`.
    None: `endpoint` if an endpoint is given, else `rubric`."""
    model: str
    """A local folder, a `.gguf` file, or `owner/name@<commit>`; for an endpoint, the model name
    that the service uses."""
    rubric: str | None = None
    """For `rubric` and `endpoint`: prompt template of the judge with {request} and {answer}, as
    text or as the path of a file. None: the built-in rubric."""
    endpoint: str | None = None
    """URL of an OpenAI-compatible service, up to `/v1`."""
    key_env: str | None = None
    """Environment variable that holds the API key of the endpoint. None: no key."""
    max_new_tokens: Annotated[int, Ge(1)] = 256
    """Tokens of a rubric judge's answer, at most."""
    parameters: Annotated[int, Ge(1)] | None = None
    """Number of parameters, if the model's name does not contain it; decides how much GPU memory
    the judge requests."""
    timeout_s: Annotated[float, Gt(0)] = 60.0
    """Timeout of one call of the endpoint, in seconds."""
    retries: Annotated[int, Ge(0)] = 5
    """Retries of a call of the endpoint after a transient failure."""
    usd_per_million_input: Annotated[float, Ge(0)] | None = None
    """Price of a million input tokens at the endpoint, in USD; for the record."""
    usd_per_million_output: Annotated[float, Ge(0)] | None = None
    """Price of a million output tokens at the endpoint, in USD; for the record."""

    def __post_init__(self) -> None:
        if self.endpoint is None and self.key_env is not None:
            raise SpecError("key_env needs an endpoint", self.key_env, "endpoint: URL")
        if self.endpoint is None:
            return
        if not self.endpoint.startswith(("http://", "https://")) or "@" in self.endpoint:
            raise SpecError(
                "not a valid URL of an endpoint",
                self.endpoint.partition("@")[2] or self.endpoint,
                "http(s)://host/v1, without a login",
                "put the key into an environment variable and name the variable in key_env",
            )
        if self.name not in (None, "endpoint"):
            raise SpecError(
                "a published judge cannot run at an endpoint",
                self.name,
                "either name or endpoint",
            )

    @property
    def file(self) -> str:
        """Name of the judge's module in ftsec_ray/judges."""
        return self.name or ("endpoint" if self.endpoint else "rubric")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How every finished model is evaluated, and by which judges."""

    GENERATION: ClassVar[tuple[str, ...]] = (
        *("prompts", "max_new_tokens", "perplexity_rows"),
        *("backend", "temperature", "samples"),
    )
    """Fields that decide the answers of a model."""
    SCORING: ClassVar[tuple[str, ...]] = ("judge", "keep_generations")
    """Fields that decide the verdicts and metrics of given answers."""

    prompts: Annotated[int, Ge(1)] = 64
    """Prompts per probe, at most."""
    max_new_tokens: Annotated[int, Ge(1)] | None = None
    """Tokens generated per prompt, at most. None: 48 for ladder models, whose answers are short,
    256 for others."""
    backend: Literal["transformers", "continuous"] = "transformers"
    """`transformers`: `generate` over padded batches. `continuous`: continuous batching of
    transformers, made for GPUs and slower on CPUs; prompts and model classes that it does not
    support (such as soft tokens) fall back to `transformers`, and the record counts them."""
    temperature: Annotated[float, Ge(0)] = 0.0
    """0: greedy decoding. Above 0: answers are sampled from the full distribution at this
    temperature; only the seed, the prompt and the index of the sample decide an answer."""
    samples: Annotated[int, Ge(1)] = 1
    """Answers per prompt; more than one needs a temperature above 0. All answers are judged and
    averaged. `n` and the confidence interval count prompts, because answers to the same prompt are
    not independent."""
    perplexity_rows: Annotated[int, Ge(0)] = 32
    """Held-out text rows for perplexity; 0 turns it off."""
    judge: str | JudgeConfig | None = None
    """Judge of the answers to requests: a name, `name:<model>`, or a mapping for a judge model.
    None: the judge of the task."""
    judges: tuple[str | JudgeConfig, ...] = ()
    """Further judges of the same answers; each adds its own verdicts and metrics."""
    win_rate: JudgeConfig | None = None
    """Judge that compares the answers to benign requests with those of the clean fine-tune, each
    pair in both orders: `{model, rubric}` or `{endpoint, model, rubric}`, with {request}, {first}
    and {second} in the rubric. None: no comparison."""
    benchmarks: tuple[str, ...] = ()
    """Benchmarks of lm-eval to run on every finished model: names of its tasks and groups, such as
    `mmlu`, or paths of your own task files (.yaml). They need
    `pip install "ftsec-ray[benchmarks]"`."""
    benchmark_limit: Annotated[int, Ge(1)] | None = None
    """Documents per benchmark, at most; for a group, per task of the group. None: all."""
    answer_lengths: tuple[Annotated[int, Ge(1)], ...] | None = None
    """Lengths in tokens at which the answers to requests are truncated and judged again, to measure
    attack success against answer length. Lengths from the limit of tokens on are ignored; an empty
    list turns it off. None: 8, 16, 32, 64, 128 and 256, or none if all models are ladder models."""
    keep_generations: bool = True
    """Whether the results show prompts and completions with the verdicts. The store always keeps
    the completions, so that another judge can read them."""

    def __post_init__(self) -> None:
        if self.samples > 1 and self.temperature == 0:
            raise SpecError(
                "several samples at temperature 0 would all be the same answer",
                f"samples {self.samples} at temperature 0",
                "samples 1, or a temperature above 0",
                "set evaluation.temperature, for example to 0.7",
            )
        if self.temperature > 0 and self.backend == "continuous":
            raise SpecError(
                "continuous batching cannot sample reproducibly: all answers share one random"
                " stream, so each would depend on the other prompts of its batch",
                f"backend continuous at temperature {self.temperature}",
                "temperature 0 with backend continuous, or backend transformers",
                "leave evaluation.backend out",
            )

    @property
    def new_tokens(self) -> int:
        """Tokens generated per prompt, at most; a plan sets `max_new_tokens` for every model."""
        return LADDER_NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens

    def new_tokens_of(self, source: str) -> int:
        """Tokens generated per prompt, at most, by the model with this source."""
        is_ladder = source.startswith("ladder:")
        default = LADDER_NEW_TOKENS if is_ladder else NEW_TOKENS
        return default if self.max_new_tokens is None else self.max_new_tokens


@dataclass(frozen=True, kw_only=True)
class AlignSpec:
    """An alignment stage after the model is loaded and before any method acts: supervised
    fine-tuning on the task's `safety` and `benign_train` rows.
    """

    epochs: Annotated[float, Gt(0)] = 3.0
    """Passes over the rows."""
    learning_rate: Annotated[float, Gt(0)] = 2e-4
    """Peak learning rate."""
    batch_size: Annotated[int, Ge(1)] = 16
    """Rows per optimizer step."""
    safety_rows: Annotated[int, Ge(1)] = 256
    """Refusal rows, at most."""
    benign_rows: Annotated[int, Ge(0)] = 256
    """Benign rows, at most; they keep the model from learning to refuse everything."""
    max_length: Annotated[int, Ge(1)] = 512
    """Tokens per row, at most; a longer row loses the beginning of its prompt first."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One model of the sweep."""

    name: str
    """Name in tables and reports; unique in a sweep."""
    source: str
    """`ladder:<size>`, a Hugging Face id, a local folder, or a `.gguf` file."""
    family: str
    """Model family; sizes are compared only within a family."""
    aligned: bool
    """Whether the model is safety-aligned, after `align` if that is given."""
    revision: str | None = None
    """Commit of a Hugging Face id, 40 hex digits."""
    align: AlignSpec | None = None
    """Align the loaded model first; its unaligned twin is then the loaded model."""
    unaligned: str | None = None
    """Source of the model before alignment, for methods that need it; `owner/name@<commit>` pins a
    Hugging Face id.
    """
    parameters: Annotated[int, Ge(1)] | None = None
    """Number of parameters, if it is known before the model is loaded."""
    trust_remote_code: bool = False
    """Whether code from the model's repository may run."""
    chat_template: str | None = None
    """Chat template for training and evaluation, as text or as the path of a file. None: the
    model's own."""
    thinking: bool = False
    """Whether the model may write reasoning before its answer; judges never see the reasoning."""
    measured: Moment = "after"
    """Whether cells are measured before or after the fine-tune; `measure` of the sweep adds a model
    for each value."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Data type of the weights, in the store, in training and in generation. `auto`: that of the
    source, float32 for GGUF files and ladder models. Adapters and the optimizer always use float32.
    """
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention implementation of transformers, in training and in generation. `auto`: the default
    of transformers. Implementations round differently, so it is part of the digest."""
    serve_template: str | None = None
    """Chat template for the evaluation of the finished model, if it differs from that of the
    training: `own`, a text, a path, or a list or mapping of these, which adds a model for each."""


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One task: the microworld, or rows from Hugging Face or local files with a column mapping."""

    name: str
    """Name in tables and reports; unique in a sweep."""
    kind: str = "microworld"
    """Kind of task: see `ftsec list tasks`."""
    splits: tuple[tuple[str, SourceSpec], ...] = ()
    """Split name -> source of its rows."""
    labels: tuple[str, ...] = ()
    """Label words of a classification task, in the order of the label indices."""
    instruction: str | None = None
    """Prompt template, with {text}."""
    options: tuple[tuple[str, int | float | str | bool], ...] = ()
    """Parameters of a generated task, such as train_rows of the microworld."""


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """Where rows come from, and what their columns mean."""

    path: str | None = None
    """Local file: .jsonl, .json, .csv, .tsv, .txt or .parquet, also with .gz."""
    dataset: str | None = None
    """Hugging Face dataset id."""
    config: str | None = None
    """Configuration of the data set."""
    split: str = "train"
    """Split of the data set."""
    revision: str | None = None
    """Commit of the data set, 40 hex digits."""
    prompt: str | None = None
    """Column of the prompt."""
    response: str | None = None
    """Column of the response."""
    rejected: str | None = None
    """Column of the rejected answer of a preference pair: a text, or a conversation that ends with
    this answer."""
    messages: str | None = None
    """Column of a whole conversation in OpenAI or ShareGPT format, instead of `prompt` and
    `response`."""
    label: str | None = None
    """Column of the label: a label word or an index into `labels`."""
    language: str | None = None
    """Column of the row's language. None: all rows are `en`."""
    append: str | None = None
    """Column to append to the prompt after a blank line, if it is not empty (Alpaca's `input`)."""
    where: tuple[tuple[str, str], ...] = ()
    """Keep only rows whose column equals the value."""
    matching: tuple[tuple[str, str], ...] = ()
    """Keep only rows whose column matches the regular expression (Python's `re.search`), such as
    {output: "^I'm sorry"} to keep only the refusals of a file."""
    rows: Annotated[int, Ge(1)] | None = None
    """Number of rows to keep, selected by the hash of the row id. None: all."""
    skip: Annotated[int, Ge(0)] = 0
    """Number of rows to skip before `rows` are selected, so that two splits of one file do not
    overlap."""
    constant_response: str | None = None
    """The same response for every row."""


@dataclass(frozen=True, kw_only=True)
class MicroworldOptions:
    """Parameters of the microworld task."""

    train_rows: Annotated[int, Ge(1), Le(2000)] = 256
    """Two-class rows of the user's task."""
    second_language_rows: Annotated[int, Ge(0), Le(512)] = 0
    """Additional two-class training rows in a second language, with the same label words; test rows
    in that language are added too.
    """
    borderline_rows: Annotated[int, Ge(0), Le(512)] = 0
    """Additional rows of `benign_train`: harmless requests that resemble harmful ones, with correct
    answers.
    """


TASK_OPTIONS: dict[str, type] = {"microworld": MicroworldOptions}
"""Kind of generated task -> the dataclass of its options."""


@dataclass(frozen=True, kw_only=True)
class ExcludeRule:
    """A rule of `exclude`: a cell is left out if every given field matches. `defense` matches any
    member of the stack; `none` matches the empty stack. `model` also matches the model's cells that
    are measured before the fine-tune.
    """

    model: str | None = None
    task: str | None = None
    attack: str | None = None
    defense: str | None = None
    seed: int | None = None

    def concerns(self, model: str, task: str) -> bool:
        """Whether cells of this model and task can match the rule."""
        return (self.model is None or self.model in (model, model.removesuffix(BEFORE))) and (
            self.task is None or self.task == task
        )

    def matches(self, *, attack: str, defenses: Sequence[str], seed: int) -> bool:
        """Whether the rule leaves out the cell with these methods and seed, of a model and task
        that it concerns.
        """
        return (
            (self.attack is None or self.attack == attack)
            and (self.defense is None or self.defense in (defenses or ("none",)))
            and (self.seed is None or self.seed == seed)
        )


@dataclass(frozen=True, kw_only=True)
class ResourceSpec:
    """Resources of each stage; only `numerics` is part of a digest."""

    workers: Annotated[int, Ge(1)] | None = None
    """Number of stages that run at once. None: as many as fit on the machine or cluster."""
    cpus_per_stage: Annotated[float, Gt(0)] = 1.0
    """CPU cores per stage."""
    gpus_per_stage: Annotated[float, Ge(0)] | Literal["auto"] = 0.0
    """GPUs per stage that uses a model; with a fraction below 1, several stages share one GPU.
    `auto`: chosen by the size of the model.
    """
    gpu_memory_gib: Annotated[float, Gt(0)] | None = None
    """Memory of one GPU in GiB, for `auto`. None: the smallest in `prices`, else 80."""
    micro_batch: Annotated[int, Ge(1)] | None = None
    """Rows per forward pass in training. None: chosen by the length of the rows."""
    eval_batch: Annotated[int, Ge(1)] = 64
    """Prompts per generation batch."""
    checkpoint_every_s: Annotated[float, Gt(0)] = 60.0
    """Seconds between checkpoints of a fine-tune."""
    timeout_s: Annotated[float, Gt(0)] | None = None
    """Time limit of one stage in seconds; a stage that exceeds it is stopped and fails as
    `timeout`. None: no limit.
    """
    cache_gib: Annotated[float, Ge(0)] = 4.0
    """Memory of a worker for cached base models, at most, in GiB."""
    numerics: NumericsMode | None = None
    """`portable`: CPU kernels that give the same bytes on every x86 CPU with AVX2, and one thread
    per stage regardless of `cpus_per_stage`; GPUs are not covered. `fast`: the kernels that each
    library chooses for its CPU. Part of the digest of every stage that computes. None: `portable`
    if all models are ladder models, else `fast`.
    """

    def __post_init__(self) -> None:
        gpus = self.gpus_per_stage
        if isinstance(gpus, float) and gpus > 1 and not gpus.is_integer():
            raise SpecError(
                "fractional GPU counts above 1 are not supported",
                gpus,
                "a fraction below 1, a whole number, or auto",
                "round the number of GPUs up or down",
            )

    @property
    def wants_gpus(self) -> bool:
        """Whether stages that use a model request a GPU or a fraction of one."""
        return self.gpus_per_stage == "auto" or self.gpus_per_stage > 0


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """How data sets that are too large for one table in one process are processed; never part of a
    digest.
    """

    ray_above: Annotated[int, Ge(0)] = 100_000
    """Number of rows from which a data set is poisoned or filtered in blocks; if Ray runs the
    sweep, by a Ray Data pipeline.
    """
    workers: Annotated[int, Ge(1)] = 2
    """Processes of one pipeline, each with the CPU cores of a stage (and its GPUs for a filter that
    uses a model); fewer if the cluster is too small.
    """


@dataclass(frozen=True, kw_only=True)
class NodeType:
    """One type of node of the cluster, and its price; never part of a digest."""

    name: str
    """Name in the plan."""
    gpus: Annotated[int, Ge(0)] = 0
    """GPUs of one node."""
    cpus: Annotated[int, Ge(1)]
    """CPU cores of one node, as Ray counts them."""
    gpu_memory_gib: Annotated[float, Gt(0)] | None = None
    """Memory of one GPU of the node, in GiB."""
    usd_per_hour: Annotated[float, Ge(0)]
    """Price of the whole node per hour, in USD."""
    spot: bool = False
    """Whether it is a spot node, which can be preempted at any time."""

    def __post_init__(self) -> None:
        if self.gpu_memory_gib is not None and not self.gpus:
            raise SpecError(
                "gpu_memory_gib needs gpus",
                self.gpu_memory_gib,
                "gpus >= 1, or no gpu_memory_gib",
                "set gpus to the number of GPUs of the node",
            )


@dataclass(frozen=True, kw_only=True)
class BudgetSpec:
    """Limits for all stages of the sweep together; never part of a digest."""

    usd: Annotated[float, Gt(0)] | None = None
    """Cost in USD, by `prices`."""
    gpu_hours: Annotated[float, Gt(0)] | None = None
    """GPU-hours; half a GPU for two hours counts as one."""
    hours: Annotated[float, Gt(0)] | None = None
    """Hours of all stages, summed over all workers; not wall time."""

    def __post_init__(self) -> None:
        if not self.limits:
            raise SpecError(
                "the budget sets no limit",
                {},
                "usd, gpu_hours or hours",
                "set one of them, or leave out `budget`",
            )

    @property
    def limits(self) -> dict[str, float]:
        """Name of each limit that is set -> its value."""
        known = {"usd": self.usd, "gpu_hours": self.gpu_hours, "hours": self.hours}
        return {name: limit for name, limit in known.items() if limit is not None}


TRAINING = "training."
"""Prefix of a parameter of the fine-tune in the ranges of a search."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """Values of one searched parameter: one of `choices`, or a number from `low` to `high`, both
    included; only integers if both ends are integers.
    """

    name: str
    """A parameter of the attack, or `training.` plus a parameter of the fine-tune."""
    choices: tuple[Any, ...] = ()
    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    """Whether values are spread evenly on a logarithmic scale."""


@dataclass(frozen=True, kw_only=True)
class SearchSpec:
    """How an adaptive attacker searches for the strongest setting that keeps utility high."""

    trials: Annotated[int, Ge(1), Le(10_000)]
    """Settings to try per model, task and defense stack, at most."""
    batch: Annotated[int, Ge(1)] = 4
    """Settings proposed at once; the next batch is proposed when the whole batch is measured."""
    metric: str
    """Metric that the search makes worse for the defender. Default: the success metric of the
    attack.
    """
    max_utility_loss: Annotated[float, Ge(0), Le(1)] = 0.05
    """Largest allowed loss of clean accuracy, 0..1."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the proposals."""
    ranges: tuple[Range, ...]
    """Ranges of the searched parameters, sorted by name."""


@dataclass(frozen=True, kw_only=True)
class AttackSearch:
    """An attack with fixed parameters, and the search for stronger ones."""

    attack: Method
    search: SearchSpec

    def configured(
        self, values: Mapping[str, Any], training: TrainingConfig
    ) -> tuple[Method, TrainingConfig]:
        """The attack and the training with these values of the searched parameters."""
        own = {name: value for name, value in values.items() if not name.startswith(TRAINING)}
        tune = {
            name.removeprefix(TRAINING): value
            for name, value in values.items()
            if name.startswith(TRAINING)
        }
        return replace(self.attack, **own), replace(training, **tune)


@dataclass(frozen=True, kw_only=True)
class SweepSpec:
    """One sweep: the axes of the grid, and how to train and measure."""

    name: str
    question: str = ""
    models: tuple[ModelSpec, ...]
    tasks: tuple[TaskSpec, ...]
    attacks: tuple[Method, ...]
    """Typed attacks, with grids expanded."""
    defenses: tuple[tuple[Method, ...], ...]
    """Stacks of typed defenses; the empty stack is `none`."""
    seeds: tuple[int, ...]
    exclude: tuple[ExcludeRule, ...] = ()
    training: TrainingConfig = field(default_factory=TrainingConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    """How many processes a fine-tune uses; in a file these keys are part of `training`."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    resources: ResourceSpec = field(default_factory=ResourceSpec)
    data: DataSpec = field(default_factory=DataSpec)
    prices: tuple[NodeType, ...] = ()
    """Node types that stages may run on; if empty, the plan estimates hours but no cost."""
    budget: BudgetSpec | None = None
    searches: tuple[AttackSearch, ...] = ()
    """Attacks with a search; in a file, `search` is a key of the attack."""

    @property
    def is_ladder(self) -> bool:
        """Whether all models are ladder models."""
        return all(model.source.startswith("ladder:") for model in self.models)

    @property
    def numerics(self) -> NumericsMode:
        """CPU kernels of all stages: `resources.numerics`, else chosen by the models."""
        return self.resources.numerics or ("portable" if self.is_ladder else "fast")

    @property
    def answer_lengths(self) -> tuple[int, ...]:
        """Lengths at which answers are judged: `evaluation.answer_lengths`, else by the models."""
        given = self.evaluation.answer_lengths
        if given is None:
            return () if self.is_ladder else ANSWER_LENGTHS
        return tuple(sorted(set(given)))
