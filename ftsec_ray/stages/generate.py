"""Runs the finished model on all prompts of a cell: completions, label scores and perplexity; they
are judged later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ftsec_ray.lifecycle import StageKind

if TYPE_CHECKING:
    from ftsec_ray.context import StageContext
    from ftsec_ray.lifecycle import Extra, Job
    from ftsec_ray.method import Method
    from ftsec_ray.models.generator import Generator

_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 64, 32, 48
"""Prompts per probe, prompt tokens and new tokens to which the prior refers."""


def _amount(params: Mapping[str, Any]) -> float:
    """The amount of generation of a stage, in units of the prior."""
    asked = params["generation"]
    prompts = asked["prompts"] * asked.get("samples", 1) / _PROMPTS
    tokens = _PROMPT_TOKENS + asked["max_new_tokens"]
    return float(prompts * tokens / (_PROMPT_TOKENS + _NEW_TOKENS))


KIND = StageKind(
    name="generate",
    position=90,
    version=3,
    hooks={
        "wrap_generation": "Generator -> Generator",
        "probes": "TaskData -> list of Probe",
    },
    acts="all",
    takes=("model",),
    gives="completions",
    roles=("reference", "unaligned", "start", "clean_bank"),
    settings=("generation", "training"),
    prior_s={"": (1.0, 2.0)},
    amount_of=_amount,
)


def run(job: Job) -> Extra:
    """Run the probes of the task and of the methods, with the methods' wrappers."""
    from ftsec_ray.evals.ask import ask, write_answers
    from ftsec_ray.evals.probes import default_probes
    from ftsec_ray.models.backends import BACKENDS, unused_settings
    from ftsec_ray.models.chat_format import chat_format, served, template_hash
    from ftsec_ray.models.generator import Generator, in_words
    from ftsec_ray.models.precision import asked_notes, without_gradients
    from ftsec_ray.plan.decode import generation_of

    context = job.context()
    config = generation_of(job.stage)
    loaded = job.session.asked(job.inputs["model"])
    trained_under = template_hash(loaded.tokenizer)
    loaded = served(loaded, job.stage.params.get("serve_template"))
    generator = Generator(loaded, backend=BACKENDS[config.backend]())
    probes = default_probes(context.task, config)
    methods = job.methods()
    context.served = partial(_defended, methods, context)
    with without_gradients(generator.loaded.model):
        for method in methods:
            if hasattr(method, "wrap_generation"):
                generator = method.wrap_generation(generator, context)
            if hasattr(method, "probes"):
                probes += method.probes(context.task, context)
        answers = ask(
            generator, context.task, probes, config, runtime=context.runtime, seed=context.seed
        )
    write_answers(answers, job.out)
    tokenizer = generator.loaded.tokenizer
    notes = {
        "info": asdict(generator.loaded.info),
        "chat": chat_format(tokenizer).notes(),
        "train_template_hash": trained_under,
        "serve_template_hash": template_hash(tokenizer),
        "backend": config.backend,
        "max_new_tokens": config.new_tokens,
        **asked_notes(generator.loaded),
    }
    if generator.tally:
        notes["done_otherwise"] = dict(generator.tally)
        for text in in_words(generator.tally):
            job.warn(text)
    unused = unused_settings(generator.loaded.model)
    if unused:
        notes["generation_config_unused"] = unused
    if answers.left_out:
        notes["beyond_positions"] = dict(answers.left_out)
        for probe, count in answers.left_out.items():
            job.warn(
                f"{count} prompts of probe {probe!r} were skipped: prompt and answer would exceed"
                " the model's maximum length"
            )
    return {"notes": {**notes, **context.notes, **context.counts}}


def _defended(methods: list[Method], context: StageContext, generator: Generator) -> Generator:
    """A generator with what the defenses add when they serve it; their notes are made later, when
    they wrap the generator that answers.
    """
    aside = replace(context, notes={}, counts={}, warnings=[])
    for method in methods:
        if method.KIND == "defense" and hasattr(method, "wrap_generation"):
            generator = method.wrap_generation(generator, aside)
    return generator
