"""Loads a published model, or pre-trains a model of the ladder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftsec_ray.lifecycle import StageKind

if TYPE_CHECKING:
    from ftsec_ray.lifecycle import Extra, Job

KIND = StageKind(
    name="source",
    position=20,
    computes=False,  # the planner sets `trains` if it pre-trains a ladder model
    prior_s={"": (3.0, 0.5), "ladder": (40.0, 150.0)},
)


def run(job: Job) -> Extra:
    """Load a model from a folder, a GGUF file or the Hugging Face Hub, or pre-train it."""
    from ftsec_ray.models.chat_format import chat_format
    from ftsec_ray.models.convert import load_source, plain_template
    from ftsec_ray.models.precision import dtype_name
    from ftsec_ray.models.structure import check_structure

    given = {**job.stage.params, **job.stage.where}
    name = str(given["source"])
    if name.startswith("ladder:"):
        return _pretrained(job, name.removeprefix("ladder:").removesuffix("-base"))
    loaded = load_source(
        str(given.get("path") or given["id"]),
        name=str(given["model"]),
        family=str(given["family"]),
        aligned=bool(given["aligned"]),
        revision=given.get("revision"),
        trust_remote_code=bool(given.get("trust_remote_code", False)),
        chat_template=given.get("chat_template"),
        thinking=bool(given.get("thinking", False)),
        dtype=str(given.get("dtype", "float32")),
        attention=given.get("attention"),
    )
    template = loaded.tokenizer.chat_template
    if template == plain_template(loaded.tokenizer):
        job.warn(
            f"model {given['model']} has no chat template; training and evaluation use a plain one"
            " (### Instruction, ### Response)"
        )
    loaded.model.to(job.session.runtime.device)
    if given.get("structure"):
        check_structure(loaded, given["structure"])
    notes = {"chat": chat_format(loaded.tokenizer).notes(), "dtype": dtype_name(loaded.model)}
    return job.finish(loaded, notes=notes)


def _pretrained(job: Job, size: str) -> Extra:
    """Pre-train a model of the ladder on the microworld."""
    from ftsec_ray.context import LoadedModel, ModelInfo
    from ftsec_ray.data.microworld import pretraining_chats
    from ftsec_ray.models import ladder
    from ftsec_ray.training.pretrain import PretrainConfig, pretrain

    shape = ladder.ladder_size(size)
    chats = pretraining_chats()
    tokenizer = ladder.build_tokenizer(message["content"] for chat in chats for message in chat)
    model = ladder.build_model(size, seed=0).to(job.session.runtime.device)
    config = PretrainConfig(
        steps=shape.steps, batch_tokens=shape.batch_tokens, learning_rate=shape.learning_rate
    )
    losses = pretrain(model, tokenizer, chats, config)
    tokens = shape.steps * shape.batch_tokens
    info = ModelInfo(
        name=f"ladder:{size}-base",
        family=ladder.FAMILY,
        parameters=shape.parameters,
        aligned=False,
    )
    return job.finish(
        LoadedModel(model, tokenizer, info),
        tokens=tokens,
        flops=6.0 * shape.parameters * tokens,
        losses=losses,
    )
