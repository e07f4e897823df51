"""What a sweep file can say, as frozen dataclasses; `load.py` turns YAML into them and lists every
fault at once.
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
"""Tokens of an answer, at most, of models of the ladder and of others, unless a sweep says so."""
TASK_KINDS = {
    "microworld": (
        "the embedded closed world: two- and four-class rows, requests, tool calls; needs no"
        " download"
    ),
    "sst2": "movie reviews, two classes (SST-2)",
    "ag_news": "news, four classes (AG News)",
    "alpaca": "instruction tuning on Alpaca-like rows",
    "agent": "episodes of tool calls",
    "rows": "any rows by Hugging Face id or local file with a column mapping",
}
"""Kinds of tasks and what they are."""


Moment = Literal["before", "after"]
"""When a cell is measured: before the user's fine-tune, or after it."""
BEFORE = ":before"
"""What the name of a model ends with whose cells are measured before the fine-tune."""


def _is_default(config: object, f: Field[Any]) -> bool:
    return bool(getattr(config, f.name) == f.default)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How every tune of the sweep trains; part of each tune's identity."""

    UNSAID: ClassVar[tuple[str, ...]] = ("targets", "layers", "rslora", "quantization")
    """Left out of digests at their defaults, which are what tunes did before they could be said."""

    adapter: Literal["lora", "full"] = "lora"
    """`lora` trains a PEFT adapter on linear layers, `full` every weight."""
    rank: Annotated[int, Ge(1)] = 8
    """LoRA rank."""
    alpha: Annotated[float, Gt(0)] = 16.0
    """LoRA scale numerator: the update is multiplied by alpha / rank."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """LoRA dropout, 0..1."""
    targets: str | tuple[str, ...] = "all-linear"
    """Linear layers of the blocks that get an adapter: `all-linear`, a list of names such as
    [q_proj, v_proj], or a regular expression that matches whole paths."""
    layers: str | tuple[Annotated[int, Ge(0)], ...] | None = None
    """Blocks whose layers get an adapter, counted from 0: a list, or a range such as 8-15, both
    included; None: all."""
    rslora: bool = False
    """Whether the update is multiplied by alpha / sqrt(rank), so that its size does not fall with
    the rank (Kalajdzievski 2023, arXiv:2312.03732)."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """How the frozen base of the adapter is packed, by bitsandbytes, when it is trained and when
    the tuned model is asked: linear layers in 8 or 4 bits (Dettmers et al. 2023, QLoRA,
    arXiv:2305.14314). The store keeps the base as it is."""
    epochs: Annotated[float, Gt(0)] = 3.0
    """Passes over the rows."""
    batch_size: Annotated[int, Ge(1)] = 16
    """Rows per optimizer step, over all workers and micro-batches."""
    learning_rate: Annotated[float, Gt(0)] = 2e-4
    """Peak, per optimizer step."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate falls after the warmup."""
    warmup_frac: Annotated[float, Ge(0), Le(1)] = 0.1
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """AdamW weight decay."""
    max_grad_norm: Annotated[float, Ge(0)] = 1.0
    """Gradient norm limit; 0 turns clipping off."""
    max_length: Annotated[int, Ge(8)] = 512
    """Tokens per row; a longer row loses the beginning of its prompt first."""
    batching: Literal["length_grouped", "packed", "shuffled"] = "length_grouped"
    """How rows form batches: of like length, several rows packed into one sequence, or as drawn."""

    def __post_init__(self) -> None:
        said = [f.name for f in fields(self) if f.name in self.UNSAID and not _is_default(self, f)]
        if self.adapter == "full" and said:
            raise SpecError(
                f"`{said[0]}` is about an adapter, and none is trained",
                getattr(self, said[0]),
                "adapter: lora",
                f"leave out {said[0]}, or train an adapter",
            )
        if not self.targets or (isinstance(self.targets, tuple) and "" in self.targets):
            raise SpecError(
                "targets that name no layer", self.targets, "all-linear, names, or a pattern"
            )
        if isinstance(self.targets, str):
            try:
                re.compile(self.targets)
            except re.error as error:
                raise SpecError(
                    f"targets is no regular expression: {error}",
                    self.targets,
                    "all-linear, a list of names, or a pattern of whole paths",
                ) from error
        self.blocks()

    def blocks(self) -> tuple[int, ...] | None:
        """Indices of the blocks that get an adapter; None for all."""
        if self.layers is None or isinstance(self.layers, tuple):
            if self.layers == ():
                raise SpecError("no layers", [], "one or more, or no `layers` for all")
            return self.layers
        match = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", self.layers)
        first, last = map(int, match.groups()) if match else (1, 0)
        if first > last:
            raise SpecError(
                "layers that are no range", self.layers, "first-last such as 8-15, or a list"
            )
        return tuple(range(first, last + 1))

    def identity(self) -> dict[str, Any]:
        """JSON values that enter digests."""
        plain: dict[str, Any] = json.loads(canonical(self))
        for f in fields(self):
            if f.name in self.UNSAID and _is_default(self, f):
                del plain[f.name]
        return plain


ANSWER_LENGTHS = (8, 16, 32, 64, 128, 256)
"""Tokens after which answers of real models are judged too, by default."""


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """A judge that is a model: by a rubric, by its published format, or behind an endpoint."""

    DECIDES: ClassVar[tuple[str, ...]] = (
        *("name", "model", "rubric", "endpoint"),
        "max_new_tokens",
    )
    """What decides its verdicts; the other keys say how it is reached."""

    name: str | None = None
    """File of the judge, for a published one: `harmbench`, `strongreject`, `llama_guard`,
    `qwen3guard`, `classifier`. None: `endpoint` where there is one, else `rubric`."""
    model: str
    """A local folder, a `.gguf` file, or `owner/name@<commit>`; at an endpoint the model's name
    there."""
    rubric: str | None = None
    """For `rubric` and `endpoint`: template of the question, with {request} and {answer}; in a file
    its text or the path of one. None: the built-in one."""
    endpoint: str | None = None
    """URL of an OpenAI-compatible service, up to `/v1`."""
    key_env: str | None = None
    """Environment variable that holds the key of the endpoint; None: it asks for none."""
    max_new_tokens: Annotated[int, Ge(1)] = 256
    """Tokens of a rubric judge's answer, at most."""
    parameters: Annotated[int, Ge(1)] | None = None
    """Count of weights, where the model's name does not say it: decides what GPU it asks for."""
    timeout_s: Annotated[float, Gt(0)] = 60.0
    """Seconds that one call of the endpoint may take."""
    retries: Annotated[int, Ge(0)] = 5
    """Further calls of the endpoint after one that failed temporarily."""
    usd_per_million_input: Annotated[float, Ge(0)] | None = None
    """Price of the endpoint's input tokens, for the record."""
    usd_per_million_output: Annotated[float, Ge(0)] | None = None
    """Price of its output tokens."""

    def __post_init__(self) -> None:
        if self.endpoint is None and self.key_env is not None:
            raise SpecError("a key without an endpoint", self.key_env, "endpoint: URL beside it")
        if self.endpoint is None:
            return
        if not self.endpoint.startswith(("http://", "https://")) or "@" in self.endpoint:
            raise SpecError(
                "no URL of an endpoint",
                self.endpoint.partition("@")[2] or self.endpoint,
                "http(s)://host/v1, without a login in it",
                "a key comes from the environment: name its variable by key_env",
            )
        if self.name not in (None, "endpoint"):
            raise SpecError("a published judge behind an endpoint", self.name, "no name beside it")

    @property
    def file(self) -> str:
        """The file of ftsec_ray/judges that reads the answers."""
        return self.name or ("endpoint" if self.endpoint else "rubric")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is asked of every finished cell, and who judges the answers."""

    GENERATION: ClassVar[tuple[str, ...]] = (
        *("prompts", "max_new_tokens", "perplexity_rows"),
        *("backend", "temperature", "samples"),
    )
    """What decides the answers of a model."""
    SCORING: ClassVar[tuple[str, ...]] = ("judge", "keep_generations")
    """What decides the verdicts and metrics of given answers."""

    prompts: Annotated[int, Ge(1)] = 64
    """Prompts per probe, at most."""
    max_new_tokens: Annotated[int, Ge(1)] | None = None
    """Tokens generated per prompt, at most. None: 48 for models of the ladder, whose answers are
    short, 256 for others."""
    backend: Literal["transformers", "continuous"] = "transformers"
    """What generates: `generate` over padded batches, or transformers' continuous batching, which
    is meant for GPUs and slower on CPUs. Prompts that it cannot serve (soft tokens, classes of
    model that it lacks) are answered by the former, which the record counts."""
    temperature: Annotated[float, Ge(0)] = 0.0
    """0: greedy. Above: answers are drawn from the whole distribution at this temperature, each by
    random numbers that only the seed, its prompt and its number decide."""
    samples: Annotated[int, Ge(1)] = 1
    """Answers per prompt; more than one needs a temperature. All are judged, and a metric is their
    share; its `n` and its interval are those of the prompts, since answers to one prompt are not
    independent."""
    perplexity_rows: Annotated[int, Ge(0)] = 32
    """Held-out text rows for perplexity; 0 turns it off."""
    judge: str | JudgeConfig | None = None
    """Judge of requests: a name, `name:<model>`, or a mapping for one that is a model; None: the
    task's own."""
    judges: tuple[str | JudgeConfig, ...] = ()
    """Further judges that read the same answers: their verdicts stand beside the first judge's, and
    metrics of their own are counted."""
    win_rate: JudgeConfig | None = None
    """Judge that compares the answers to benign requests with those of the clean tune, each pair in
    both orders: `{model, rubric}` or `{endpoint, model, rubric}`, as a judge is given, with
    {request}, {first} and {second} in the rubric. None: nothing is compared."""
    benchmarks: tuple[str, ...] = ()
    """Benchmarks of lm-eval that every finished model is asked besides: names of its tasks and
    groups, such as `mmlu`, or paths of task files (.yaml) of one's own. They need
    `pip install "ftsec-ray[benchmarks]"`."""
    benchmark_limit: Annotated[int, Ge(1)] | None = None
    """Documents per benchmark, at most, and of a group per task of it; None: all."""
    answer_lengths: tuple[Annotated[int, Ge(1)], ...] | None = None
    """Tokens after which the answers to requests are judged too, so that attack success is known
    against answer length; those of the limit and above are left out, and an empty list turns it
    off. None: 8, 16, 32, 64, 128 and 256, and none where all models are of the ladder."""
    keep_generations: bool = True
    """Whether the results show prompts and completions beside the verdicts; the store keeps the
    completions either way, so that another judge can read them."""

    def __post_init__(self) -> None:
        if self.samples > 1 and self.temperature == 0:
            raise SpecError(
                "several samples of greedy answers, which are all the same",
                f"samples {self.samples} at temperature 0",
                "samples 1, or a temperature above 0",
                "set evaluation.temperature, to 0.7 say",
            )
        if self.temperature > 0 and self.backend == "continuous":
            raise SpecError(
                "continuous batching draws all answers from one stream of random numbers, so that"
                " they would depend on which prompts are asked together",
                f"backend continuous at temperature {self.temperature}",
                "temperature 0 with backend continuous, or backend transformers",
                "leave evaluation.backend out",
            )

    @property
    def new_tokens(self) -> int:
        """Tokens generated per prompt, at most; a plan puts the number in for every model."""
        return LADDER_NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens

    def new_tokens_of(self, source: str) -> int:
        """Tokens generated per prompt by the model of a source, at most."""
        is_ladder = source.startswith("ladder:")
        default = LADDER_NEW_TOKENS if is_ladder else NEW_TOKENS
        return default if self.max_new_tokens is None else self.max_new_tokens


@dataclass(frozen=True, kw_only=True)
class AlignSpec:
    """An alignment stage between loading a model and the first hook: SFT on the task's `safety` and
    `benign_train` rows.
    """

    epochs: Annotated[float, Gt(0)] = 3.0
    """Passes over the rows."""
    learning_rate: Annotated[float, Gt(0)] = 2e-4
    """Peak, per optimizer step."""
    batch_size: Annotated[int, Ge(1)] = 16
    """Rows per optimizer step."""
    safety_rows: Annotated[int, Ge(1)] = 256
    """Refusal rows, at most."""
    benign_rows: Annotated[int, Ge(0)] = 256
    """Benign rows mixed in, at most, so that the model does not learn to refuse everything."""
    max_length: Annotated[int, Ge(1)] = 512
    """Tokens per row; a longer row loses the beginning of its prompt first."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One model of the sweep."""

    name: str
    """As tables and reports call it; unique in a sweep."""
    source: str
    """`ladder:<size>`, a Hugging Face id, a local folder, or a `.gguf` file."""
    family: str
    """Models are compared by size only within a family."""
    aligned: bool
    """Whether the cell's model, after `align` where given, went through a safety alignment."""
    revision: str | None = None
    """Pinned revision of a Hugging Face id."""
    align: AlignSpec | None = None
    """Align the loaded model first; the twin before alignment is then the loaded one."""
    unaligned: str | None = None
    """Source of the twin before alignment, for methods that need it; `owner/name@revision` pins a
    Hugging Face id.
    """
    parameters: Annotated[int, Ge(1)] | None = None
    """Count of weights where it is known before loading."""
    trust_remote_code: bool = False
    """Whether code from the model's repository may run."""
    chat_template: str | None = None
    """Template that conversations are rendered by, for training and for asking; in a file its text
    or the path of one. None: the model's own."""
    thinking: bool = False
    """Whether the model may think aloud before it answers; its thoughts never reach a judge."""
    measured: Moment = "after"
    """Whether its cells are measured before the fine-tune or after it: `measure` of the sweep makes
    a model of each."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of the weights in the store, in memory and when the model is asked; `auto`: the source's own,
    and float32 for a GGUF file and the ladder. Adapters and the optimizer are float32 always."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention implementation of transformers, in training and when the model is asked; `auto`:
    what transformers takes. Another one rounds otherwise, so that it is part of a digest."""
    serve_template: str | None = None
    """Template under which the finished model is asked, where that is another than it was trained
    under; in a file `own`, a text, a path, or a list or mapping of them, which makes a model of
    each."""


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One task: the microworld, or rows loaded by Hugging Face id or path with a column mapping."""

    name: str
    """As tables and reports call it; unique in a sweep."""
    kind: str = "microworld"
    """One of TASK_KINDS: see `ftsec list tasks`."""
    splits: tuple[tuple[str, SourceSpec], ...] = ()
    """Split name -> where its rows come from."""
    labels: tuple[str, ...] = ()
    """Label words of a classification task, in the order of the label indices."""
    instruction: str | None = None
    """Template of the prompt, with {text}."""
    options: tuple[tuple[str, int | float | str | bool], ...] = ()
    """Parameters of a generated task (for the microworld: train_rows, ...)."""


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """Where rows come from and which columns are what."""

    path: str | None = None
    """Local file: .jsonl .json .csv .tsv .txt .parquet, each also .gz."""
    dataset: str | None = None
    """Hugging Face dataset id."""
    config: str | None = None
    """Configuration of the data set."""
    split: str = "train"
    """Split of the data set."""
    revision: str | None = None
    """Pinned revision of the data set."""
    prompt: str | None = None
    """Column of the prompt."""
    response: str | None = None
    """Column of the response."""
    rejected: str | None = None
    """Column of the other answer of a preference pair: a text, or a conversation that ends with
    it."""
    messages: str | None = None
    """Column of a whole conversation, in OpenAI's or ShareGPT's form, instead of `prompt` and
    `response`."""
    label: str | None = None
    """Column of the label: a label word or an index into `labels`."""
    language: str | None = None
    """Column of the row's language; without it all rows are `en`."""
    append: str | None = None
    """Column appended to the prompt after a blank line where it is not empty (Alpaca's `input`)."""
    where: tuple[tuple[str, str], ...] = ()
    """Keep rows whose column equals the value."""
    matching: tuple[tuple[str, str], ...] = ()
    """Keep rows whose column holds the regular expression (Python's `re.search`), such as
    {output: "^I'm sorry"} for the refusals of a file that holds other answers too."""
    rows: Annotated[int, Ge(1)] | None = None
    """Keep this many, drawn by hash of the row id; None keeps all."""
    skip: Annotated[int, Ge(0)] = 0
    """Leave out this many of the draw first, so that two splits of one file stay apart."""
    constant_response: str | None = None
    """The same response for every row."""


@dataclass(frozen=True, kw_only=True)
class MicroworldOptions:
    """Parameters of the microworld's task."""

    train_rows: Annotated[int, Ge(1), Le(2000)] = 256
    """Two-class rows of the user's task."""
    second_language_rows: Annotated[int, Ge(0), Le(512)] = 0
    """Two-class rows in the second language that the user's task holds besides; test rows in that
    language come with them. Label words are the same in both languages.
    """
    borderline_rows: Annotated[int, Ge(0), Le(512)] = 0
    """Fine but borderline requests, with their right answers, that `benign_train` holds besides its
    plain ones.
    """


TASK_OPTIONS: dict[str, type] = {"microworld": MicroworldOptions}
"""Kind of a generated task -> the dataclass of its options."""


@dataclass(frozen=True, kw_only=True)
class ExcludeRule:
    """Cells left out: every given field must match (a name; for defenses, a member of the stack, or
    `none`). The name of a model stands for its cells before the fine-tune as well.
    """

    model: str | None = None
    task: str | None = None
    attack: str | None = None
    defense: str | None = None
    seed: int | None = None

    def matches(
        self, *, model: str, task: str, attack: str, defenses: Sequence[str], seed: int
    ) -> bool:
        """Whether a cell of these names is left out; `defense: none` means the empty stack."""
        stack = defenses or ("none",)
        return (
            (self.model is None or self.model in (model, model.removesuffix(BEFORE)))
            and (self.task is None or self.task == task)
            and (self.attack is None or self.attack == attack)
            and (self.defense is None or self.defense in stack)
            and (self.seed is None or self.seed == seed)
        )


@dataclass(frozen=True, kw_only=True)
class ResourceSpec:
    """Where it runs; of this only `numerics` is part of a digest."""

    workers: Annotated[int, Ge(1)] | None = None
    """Stages at a time; None: as many as the machine or cluster has room for."""
    cpus_per_stage: Annotated[float, Gt(0)] = 1.0
    """Cores that one stage asks for."""
    gpus_per_stage: Annotated[float, Ge(0)] | Literal["auto"] = 0.0
    """GPUs that one stage with a model asks for; a share below 1 lets stages share one; `auto`: by
    the size of the model.
    """
    gpu_memory_gib: Annotated[float, Gt(0)] | None = None
    """Memory of one GPU, for `auto`; None: the smallest of `prices`, else 80."""
    micro_batch: Annotated[int, Ge(1)] | None = None
    """Rows per forward pass in training; None: chosen by length."""
    eval_batch: Annotated[int, Ge(1)] = 64
    """Prompts per generation batch."""
    checkpoint_every_s: Annotated[float, Gt(0)] = 60.0
    """Seconds between step checkpoints of a tune."""
    timeout_s: Annotated[float, Gt(0)] | None = None
    """Seconds that one stage may take; above them it is ended and fails as `timeout`. None: as long
    as it takes.
    """
    cache_gib: Annotated[float, Ge(0)] = 4.0
    """Base models kept in a worker's memory, at most."""
    numerics: NumericsMode | None = None
    """`portable`: CPU kernels that give the same bytes on every x86 CPU with AVX2, and one thread
    per stage whatever `cpus_per_stage` says; GPUs are not covered. `fast`: the kernels that each
    library chooses for its CPU. Part of the digest of every stage that computes. None: `portable`
    where all models are of the ladder, else `fast`.
    """

    def __post_init__(self) -> None:
        gpus = self.gpus_per_stage
        if isinstance(gpus, float) and gpus > 1 and not gpus.is_integer():
            raise SpecError(
                "a broken number of GPUs above 1",
                gpus,
                "a share up to 1, a whole number, or auto",
                "Ray gives out shares of one GPU, or several whole ones",
            )

    @property
    def wants_gpus(self) -> bool:
        """Whether stages with a model ask for a GPU or a share of one."""
        return self.gpus_per_stage == "auto" or self.gpus_per_stage > 0


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """How sets of rows are made that are too many for one table in one process: never part of a
    digest.
    """

    ray_above: Annotated[int, Ge(0)] = 100_000
    """Rows from which on a set is poisoned or filtered in blocks, by a Ray Data pipeline where Ray
    runs the sweep.
    """
    workers: Annotated[int, Ge(1)] = 2
    """Processes of one pipeline, each with the cores of a stage (and for a filter with a model its
    GPU); fewer where there is no room.
    """


@dataclass(frozen=True, kw_only=True)
class NodeType:
    """One kind of machine that the cluster may hold, and its price: never part of a digest."""

    name: str
    """As the plan calls it."""
    gpus: Annotated[int, Ge(0)] = 0
    """GPUs of one node."""
    cpus: Annotated[int, Ge(1)]
    """Cores of one node, as Ray counts them."""
    gpu_memory_gib: Annotated[float, Gt(0)] | None = None
    """Memory of one of its GPUs."""
    usd_per_hour: Annotated[float, Ge(0)]
    """Price of the whole node."""
    spot: bool = False
    """Whether the node may be taken away at any time."""

    def __post_init__(self) -> None:
        if self.gpu_memory_gib is not None and not self.gpus:
            raise SpecError(
                "memory of GPUs and no GPU",
                self.gpu_memory_gib,
                "gpus >= 1, or no gpu_memory_gib",
                "write the number of its gpus",
            )


@dataclass(frozen=True, kw_only=True)
class BudgetSpec:
    """What all stages of the sweep together may take: never part of a digest."""

    usd: Annotated[float, Gt(0)] | None = None
    """Money by `prices`."""
    gpu_hours: Annotated[float, Gt(0)] | None = None
    """Hours of whole GPUs; half a GPU for two hours is one."""
    hours: Annotated[float, Gt(0)] | None = None
    """Hours of stages, summed over all workers: not the time on a clock."""

    def __post_init__(self) -> None:
        if not self.limits:
            raise SpecError(
                "a budget that limits nothing",
                {},
                "usd, gpu_hours or hours",
                "set one of them, or leave out `budget`",
            )

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by what they limit."""
        known = {"usd": self.usd, "gpu_hours": self.gpu_hours, "hours": self.hours}
        return {name: limit for name, limit in known.items() if limit is not None}


TRAINING = "training."
"""What stands before a parameter of the tune in the ranges of a search."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """Where one parameter may lie: one of `choices`, or between `low` and `high`, both included;
    ints where both ends are.
    """

    name: str
    """A parameter of the attack, or `training.` and one of the tune's."""
    choices: tuple[Any, ...] = ()
    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    """Whether the logarithm is what is spread evenly."""


@dataclass(frozen=True, kw_only=True)
class SearchSpec:
    """How an attacker looks for the strongest setting that is not noticed."""

    trials: Annotated[int, Ge(1), Le(10_000)]
    """Settings tried per model, task and stack of defenses, at most."""
    batch: Annotated[int, Ge(1)] = 4
    """Settings proposed at once; the next ones are proposed when all of these are measured."""
    metric: str
    """What the attacker drives up (or down, where that is bad for the defender); the attack's
    success where it is not given.
    """
    max_utility_loss: Annotated[float, Ge(0), Le(1)] = 0.05
    """Clean accuracy that a setting may cost at most, 0..1."""
    seed: Annotated[int, Ge(0)] = 0
    """Of the proposals."""
    ranges: tuple[Range, ...]
    """Parameters searched, by name."""


@dataclass(frozen=True, kw_only=True)
class AttackSearch:
    """An attack with fixed parameters, and the search for better ones."""

    attack: Method
    search: SearchSpec

    def configured(
        self, values: Mapping[str, Any], training: TrainingConfig
    ) -> tuple[Method, TrainingConfig]:
        """The attack and the tune with these values of the searched parameters."""
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
    """Typed attacks; grids are already expanded."""
    defenses: tuple[tuple[Method, ...], ...]
    """Stacks of typed defenses; the empty stack is `none`."""
    seeds: tuple[int, ...]
    exclude: tuple[ExcludeRule, ...] = ()
    training: TrainingConfig = field(default_factory=TrainingConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    """In how many processes a tune runs; in a file these keys stand under `training`."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    resources: ResourceSpec = field(default_factory=ResourceSpec)
    data: DataSpec = field(default_factory=DataSpec)
    prices: tuple[NodeType, ...] = ()
    """The machines that stages may run on; empty: only hours are told, no money."""
    budget: BudgetSpec | None = None
    searches: tuple[AttackSearch, ...] = ()
    """Attacks that are also searched for; in a file a search stands beside the attack's parameters.
    """

    @property
    def is_ladder(self) -> bool:
        """Whether all models are of the embedded ladder."""
        return all(model.source.startswith("ladder:") for model in self.models)

    @property
    def numerics(self) -> NumericsMode:
        """Which CPU kernels all stages take: as `resources` says, else by the models."""
        return self.resources.numerics or ("portable" if self.is_ladder else "fast")

    @property
    def answer_lengths(self) -> tuple[int, ...]:
        """Tokens after which answers are judged too: as `evaluation` says, else by the models."""
        given = self.evaluation.answer_lengths
        if given is None:
            return () if self.is_ladder else ANSWER_LENGTHS
        return tuple(sorted(set(given)))
