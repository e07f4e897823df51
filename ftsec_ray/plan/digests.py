"""How the digests of a plan are made from what decides them: the builder makes them so, and who
checks a plan makes them again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ftsec_ray.identity import FORMAT_VERSION, canonical, digest, digest_text
from ftsec_ray.numerics import NumericsMode


def of_method(identity: Mapping[str, object], imports: str) -> str:
    """Digest of a method (see registry.identity_of) with the fingerprint of the code that it
    imports.
    """
    return digest([digest(identity), imports])


def numerics_params(kind: str, mode: NumericsMode, *, on_model: bool) -> dict[str, NumericsMode]:
    """What the numerics of a sweep add to the params of a stage: nothing where it only reads a task
    or loads a model (`on_model` is False for a source that does not train).
    """
    is_computed = on_model if kind == "source" else kind != "task"
    return {"numerics": mode} if is_computed else {}


def of_head(
    kind: str,
    code: str,
    methods: Sequence[str],
    params: Mapping[str, Any],
    *,
    form: int = FORMAT_VERSION,
) -> str:
    """Digest of what all stages of one kind, code, methods (by digest) and params share."""
    return digest_text(
        canonical(
            {"kind": kind, "code": code, "format": form, "methods": list(methods), "params": params}
        )
    )


def of_stage(head: str, inputs: Iterable[tuple[str, str]], seed: int | None) -> str:
    """Digest of a stage: its head, its inputs as (role, digest) in their order, and its seed."""
    given = " ".join(f"{role}={found}" for role, found in inputs)
    return digest_text(f"stage {head} inputs {given} seed {seed}")


def of_recipe(methods: Sequence[str]) -> str:
    """Digest of an attack and a stack of defenses, each by its digest."""
    return digest(list(methods))


def of_cell(
    recipe: str,
    *,
    model: str,
    task: str,
    seed: int,
    evaluate: str,
    search: str | None = None,
    trial: int | None = None,
) -> str:
    """Digest of a cell: its recipe, the names of model and task, its seed, the stage that measures
    it, and what it is in a search.
    """
    role = (
        ""
        if search is None
        else f" search {search} {'chosen' if trial is None else f'trial {trial}'}"
    )
    return digest_text(
        f"cell {recipe} model {model!r} task {task!r} seed {seed} evaluate {evaluate}{role}"
    )
