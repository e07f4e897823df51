"""How the digests of a plan are computed; the builder and the verification of archives use the same
functions.

Digests contain no source code. A stage or method of this package is identified by its VERSION, and
`stages/versions.lock` checks that code changes come with a new VERSION. A method of another package
has no entry there; its digest contains the hash of its file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ftsec_ray.identity.canonical import FORMAT_VERSION, canonical, digest, digest_text

METHODS = "methods"
"""Key of a stage's params that holds its methods, as {"kind", "name", "params"}."""


def of_method(
    kind: str, name: str, params: object, *, version: int, file: str | None = None
) -> str:
    """Digest of a method.

    Args:
        kind: `attack` or `defense`.
        name: Its name in the registry.
        params: Its parameters: the method itself, or their JSON values.
        version: Its VERSION.
        file: Token hash of its file, for a method of another package.
    """
    return digest([kind, name, version, file, params])


def of_head(
    kind: str,
    version: int,
    methods: Sequence[str],
    params: Mapping[str, Any],
    *,
    form: int = FORMAT_VERSION,
) -> str:
    """Digest of a stage's kind, VERSION, methods (by digest) and params; methods in `params` are
    left out, since their digests already cover them.
    """
    own = {name: value for name, value in params.items() if name != METHODS}
    return digest_text(
        canonical(
            {
                "kind": kind,
                "version": version,
                "format": form,
                "methods": list(methods),
                "params": own,
            }
        )
    )


def of_stage(head: str, inputs: Iterable[tuple[str, str]], seed: int | None) -> str:
    """Digest of a stage: its head, its ordered inputs as (role, digest), and its seed."""
    given = " ".join(f"{role}={made_by}" for role, made_by in inputs)
    return digest_text(f"stage {head} inputs {given} seed {seed}")


def of_recipe(methods: Sequence[str]) -> str:
    """Digest of an attack and a defense stack, given by their digests."""
    return digest(list(methods))


def of_cell(
    recipe: str,
    *,
    model: str,
    task: str,
    seed: int,
    answers: Iterable[str],
    search: str | None = None,
    trial: int | None = None,
) -> str:
    """Digest of a cell: its recipe, the names of model and task, its seed, the stages that the
    results read, and its part in a search.
    """
    role = (
        ""
        if search is None
        else f" search {search} {'chosen' if trial is None else f'trial {trial}'}"
    )
    return digest_text(
        f"cell {recipe} model {model!r} task {task!r} seed {seed} answers {' '.join(answers)}{role}"
    )
