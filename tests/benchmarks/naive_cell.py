"""One cell of a sweep the naive way: alone, from imports to verdicts, with `trl.SFTTrainer` and
`model.generate`.

`python tests/benchmarks/naive_cell.py CELL.json RESULT.json`: the first file is an `Asked`, the
second gets the metrics and the seconds of every part. What a method itself does at its hooks is the
method's own code; tuning, generation and reading a class off a generated answer are done as the
scripts beside papers do them. TRL has no hook for methods of `shape_training`, so those tune with
the package's own loop. Nothing is kept from one cell to the next. An answer that is no label word
counts as wrong here, where a forward pass would take the likeliest label: `cacc` may be lower.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ftsec_ray.config.sweep import EvaluationConfig, TrainingConfig
from ftsec_ray.context import Chat, LoadedModel, ModelInfo, Runtime, StageContext, TaskData
from ftsec_ray.conversation import answer_of
from ftsec_ray.method import Method, Probe
from ftsec_ray.registry import ATTACKS, DEFENSES, name_of

if TYPE_CHECKING:
    import pyarrow as pa

    from ftsec_ray.models.generator import Generator


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the cell is; every field a JSON value."""

    models: dict[str, str]
    """`reference`, and `unaligned` where there is one -> folder of the model."""
    info: dict[str, Any]
    """ModelInfo of the reference."""
    task: dict[str, Any]
    """The plan's task stage."""
    methods: list[dict[str, Any]]
    """Kind, name and parameters of the attack and then of the defenses."""
    training: dict[str, Any]
    evaluation: dict[str, Any]
    seed: int
    device: str = "cpu"
    batch: int = 1
    """Prompts per call of generate."""


@dataclass
class Clock:
    """Seconds per part."""

    parts: dict[str, float] = field(default_factory=dict)
    last: float = field(default_factory=time.perf_counter)

    def lap(self, part: str) -> None:
        """Book the time since the last lap under a part."""
        now = time.perf_counter()
        self.parts[part] = self.parts.get(part, 0.0) + now - self.last
        self.last = now


@dataclass
class Cell:
    """A cell at work: its settings, and the models that its methods may ask for."""

    asked: Asked
    task: TaskData
    scratch: Path
    training: TrainingConfig
    evaluation: EvaluationConfig
    methods: list[Method]
    roles: dict[str, LoadedModel] = field(default_factory=dict)
    """Models in memory: `reference`, `unaligned`, `start`, `clean_bank:<i>`."""

    def acting(self, hook: str) -> list[Any]:
        """The methods with a hook, the attack first."""
        return [method for method in self.methods if hasattr(method, hook)]

    def context(self, name: str) -> StageContext:
        """What a hook may ask, with a scratch folder of its own."""
        workdir = self.scratch / name
        workdir.mkdir()
        return StageContext(
            seed=self.asked.seed,
            task=self.task,
            runtime=Runtime(device=self.asked.device),
            workdir=workdir,
            load=self.model,
            training=self.training,
        )

    def model(self, role: str) -> LoadedModel:
        """The model of a role, loaded with transformers when first asked."""
        if role not in self.roles:
            self.roles[role] = load(self.asked.models[role], self.asked)
        return self.roles[role]


def load(folder: str, asked: Asked) -> LoadedModel:
    """A model and its tokenizer from a folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(asked.device).eval()
    )
    return LoadedModel(model, AutoTokenizer.from_pretrained(folder), ModelInfo(**asked.info))


def sft_with_trl(
    loaded: LoadedModel,
    rows: pa.Table,
    config: TrainingConfig,
    *,
    seed: int,
    device: str,
    folder: Path,
) -> LoadedModel:
    """Tune a copy on rows with TRL: loss on the answers only, the same hyper-parameters, batches as
    TRL draws them.
    """
    import torch
    from datasets import Dataset
    from peft import (
        LoraConfig,
        get_peft_model,
        get_peft_model_state_dict,
        set_peft_model_state_dict,
    )
    from trl import SFTConfig, SFTTrainer

    from ftsec_ray.conversation import chat_of
    from ftsec_ray.models.load import merged

    data = Dataset.from_list(
        [
            {
                "prompt": chat_of(row),
                "completion": [{"role": "assistant", "content": answer_of(row)}],
            }
            for row in rows.to_pylist()
        ]
    )
    lora = (
        LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        if config.adapter == "lora"
        else None
    )
    schedule = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    settings = SFTConfig(
        output_dir=str(folder),
        seed=seed,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        num_train_epochs=config.epochs,
        lr_scheduler_type=schedule,
        warmup_steps=config.warmup_frac,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        max_length=config.max_length,
        completion_only_loss=True,
        packing=False,
        gradient_checkpointing=False,
        use_cpu=device == "cpu",
        bf16=device != "cpu" and torch.cuda.is_bf16_supported(),
        dataloader_pin_memory=device != "cpu",
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=merged(loaded).model,
        args=settings,
        train_dataset=data,
        peft_config=lora,
        processing_class=loaded.tokenizer,
    )
    trainer.train()
    tuned = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    if lora is None:
        return replace(loaded, model=tuned.eval(), base_digest=None)
    # As if saved and loaded: the trainer leaves a forward of its own on the model, and a copy of it
    # goes on reading the weights it was
    # copied from, so that a method which changes the copy would change nothing.
    fresh = get_peft_model(merged(loaded).model, lora)
    set_peft_model_state_dict(fresh, get_peft_model_state_dict(tuned))
    return replace(loaded, model=fresh.eval(), base_digest="start")


def complete(generator: Generator, chats: Sequence[Chat], *, limit: int, batch: int) -> list[str]:
    """Greedy answers by `model.generate`, `batch` prompts at a time in the order given.

    Soft tokens enter as embeddings and not as ids, so a generator with a soft suffix is asked
    through its own method.
    """
    import torch

    if generator.soft_suffix is not None:
        parts = [chats[start : start + batch] for start in range(0, len(chats), batch)]
        return [
            text
            for part in parts
            for text in generator.complete(part, max_new_tokens=limit, batch=batch)
        ]
    tokenizer, model = generator.loaded.tokenizer, generator.loaded.model.eval()
    pad, answers = tokenizer.pad_token_id, []
    for start in range(0, len(chats), batch):
        prompts = [
            head + tail for head, tail in map(generator.pieces, chats[start : start + batch])
        ]
        width = max(map(len, prompts))
        ids = torch.tensor(
            [[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device
        )
        mask = torch.tensor(
            [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts],
            device=model.device,
        )
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=limit,
                pad_token_id=pad,
                eos_token_id=tokenizer.eos_token_id,
            )
        answers += [
            text.strip()
            for text in tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        ]
    return answers


def label_in(text: str, labels: Sequence[str]) -> str:
    """The longest label word that an answer starts with, or the answer itself."""
    found = (
        label
        for label in sorted(labels, key=len, reverse=True)
        if text.casefold().startswith(label.casefold())
    )
    return next(found, text)


def judged(cell: Cell, generator: Generator, probe: Probe) -> Iterator[tuple[str, float | None]]:
    """The metrics of one probe, every prompt generated."""
    from ftsec_ray.evals.judging import get_judge
    from ftsec_ray.judges.label import Label

    name = (cell.evaluation.judge or cell.task.judge) if probe.judge == "request" else probe.judge
    whole = cell.evaluation.new_tokens
    limit = min(probe.max_new_tokens or whole, whole)
    texts = complete(
        generator, [prompt.chat for prompt in probe.prompts], limit=limit, batch=cell.asked.batch
    )
    if probe.judge == "label":
        judge: Any = Label(prefers_target="target" in probe.metrics.values())
        texts = [label_in(text, probe.labels) for text in texts]
    else:
        judge = get_judge(name, device=cell.asked.device)
    verdicts = [found.verdict for found in judge(probe.prompts, texts) if found.verdict is not None]
    for metric, verdict in probe.metrics.items():
        yield metric, verdicts.count(verdict) / len(verdicts) if verdicts else None


def tuned(cell: Cell, start: LoadedModel, rows: pa.Table) -> LoadedModel:
    """The tuned model: by TRL, or by the package's loop where a method shapes the training."""
    from ftsec_ray.training.loop import sft

    shapers, context = cell.acting("shape_training"), cell.context("finetune")
    if not shapers:
        return sft_with_trl(
            start,
            rows,
            cell.training,
            seed=cell.asked.seed,
            device=cell.asked.device,
            folder=context.workdir,
        )

    def shape(training: Any) -> Any:
        for method in shapers:
            training = method.shape_training(training, context)
        return training

    return sft(
        start,
        rows,
        cell.training,
        seed=cell.asked.seed,
        runtime=context.runtime,
        workdir=context.workdir,
        shape=shape,
        base_digest="start",
    ).loaded


def fill_bank(cell: Cell) -> None:
    """Tune the clean models that a method of this cell compares with, on the user's own rows."""
    size = max(
        (int(getattr(m, "bank", 8)) for m in cell.methods if "clean_bank" in m.NEEDS), default=0
    )
    rows = cell.task.split("train")
    for member in range(size):
        context = cell.context(f"bank-{member}")
        cell.roles[f"clean_bank:{member}"] = sft_with_trl(
            cell.model("reference"),
            rows,
            cell.training,
            seed=1_000 * (cell.asked.seed + 1) + member,
            device=cell.asked.device,
            folder=context.workdir,
        )


def evaluated(cell: Cell, model: LoadedModel, clock: Clock) -> dict[str, float | None]:
    """All metrics of the finished model."""
    from ftsec_ray.evals.metrics import perplexity
    from ftsec_ray.evals.probes import capped, default_probes, drawn
    from ftsec_ray.models.generator import Generator

    context, generator = cell.context("generate"), Generator(model)
    probes = default_probes(cell.task, cell.evaluation)
    for method in cell.methods:
        if hasattr(method, "wrap_generation"):
            generator = method.wrap_generation(generator, context)
        if hasattr(method, "probes"):
            probes += method.probes(cell.task, context)
    clock.lap("wrap")
    metrics = dict(
        pair
        for probe in probes
        for pair in judged(cell, generator, capped(probe, cell.evaluation.prompts))
    )
    text = cell.task.splits.get("text")
    if cell.evaluation.perplexity_rows and text is not None and text.num_rows:
        rows = drawn(text, cell.evaluation.perplexity_rows)
        metrics["perplexity"] = perplexity(model, rows, batch=cell.asked.batch).value
    clock.lap("generate")
    return metrics


def run(cell: Cell, clock: Clock) -> dict[str, float | None]:
    """The cell from its base model to its metrics, hook by hook in the order of the lifecycle."""
    from ftsec_ray.models.load import copy_model

    model, rows = cell.model("reference"), cell.task.split("train")
    clock.lap("load")
    for method in cell.acting("prepare_model"):
        model = method.prepare_model(copy_model(model), cell.context(f"prepare-{name_of(method)}"))
    for method in cell.acting("craft_data"):
        rows = method.craft_data(rows, cell.context(f"craft-{name_of(method)}"))
    cell.roles["start"] = model
    clock.lap("prepare and craft")
    model = tuned(cell, model, rows)
    clock.lap("finetune")
    fill_bank(cell)
    clock.lap("bank")
    for method in cell.acting("inspect"):
        method.inspect(model, cell.context(f"inspect-{name_of(method)}"))
    for method in cell.acting("revise_model"):
        model = method.revise_model(copy_model(model), cell.context(f"revise-{name_of(method)}"))
    clock.lap("inspect and revise")
    return evaluated(cell, model, clock)


def main(asked_file: str, result_file: str) -> None:
    """Run one cell and write its metrics and timings."""
    clock = Clock()
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers
    import trl  # noqa: F401
    from pydantic import TypeAdapter

    from ftsec_ray.data.tasks import load_task
    from ftsec_ray.plan.decode import task_of
    from ftsec_ray.plan.stage import Stage

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    clock.lap("import")
    asked = Asked(**json.loads(Path(asked_file).read_text(encoding="utf-8")))
    registries = {"attack": ATTACKS, "defense": DEFENSES}
    methods = [
        TypeAdapter(registries[m["kind"]].get(m["name"])).validate_python(m["params"])
        for m in asked.methods
    ]
    training = TypeAdapter(TrainingConfig).validate_python(asked.training)
    evaluation = TypeAdapter(EvaluationConfig).validate_python(asked.evaluation)
    task = load_task(task_of(Stage.from_json(asked.task)))
    clock.lap("rows")
    with TemporaryDirectory(prefix="naive-cell-") as scratch:
        metrics = run(Cell(asked, task, Path(scratch), training, evaluation, methods), clock)
    Path(result_file).write_text(
        json.dumps({"metrics": metrics, "parts": clock.parts}), encoding="utf-8"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
