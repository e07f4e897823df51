"""The identity and location of a judge. Local models are identified by the hash of their bytes, Hub
ids by their commit, rubrics by their text, endpoints by URL and model name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftsec_ray.config.sweep import JudgeConfig, ModelSpec, SweepSpec
from ftsec_ray.evals.judging import config_of, judge_class
from ftsec_ray.evals.model_judges import Source
from ftsec_ray.identity import canonical
from ftsec_ray.models.published_folder import check_folder
from ftsec_ray.plan.origin import weights_count
from ftsec_ray.registry import outside_hash

Plain = str | Mapping[str, Any]
"""A judge in the parameters of a stage."""


@dataclass(frozen=True, slots=True)
class JudgeOrigin:
    """One judge of a sweep."""

    plain: Plain
    """Identity of the judge."""
    where: Mapping[str, Any]
    """Identity as canonical JSON -> the judge as the sweep gives it, if that holds more."""
    version: str
    """VERSION of the judge, plus the hash of its file if it is not part of this package."""
    model: ModelSpec | None
    """The model that the stage runs; None for a judge without a model or at an endpoint."""


def judge_origin(named: str | JudgeConfig) -> JudgeOrigin:
    """Identity and location of a judge; SpecError if the judge or its model does not exist."""
    config = config_of(named)
    cls = judge_class(config.file)
    outside = outside_hash(cls.__module__)
    version = str(cls.VERSION) if outside is None else f"{cls.VERSION} {outside}"
    if not cls.IS_MODEL:
        return JudgeOrigin(config.file, {}, version, None)
    if not cls.RUNS_HERE:
        plain = _identity(config)
        return JudgeOrigin(plain, {canonical(plain): _plain(config)}, version, None)
    source = Source.of(config, config.file)
    if source.is_local and Path(source.place).is_dir():
        check_folder(Path(source.place))
    model = ModelSpec(
        name=f"judge {config.file}",
        source=source.place,
        family="judge",
        aligned=True,
        parameters=config.parameters or weights_count(source.place),
    )
    meant = replace(config, model=f"sha256:{source.sha256}") if source.is_local else config
    if isinstance(named, str):
        name = f"{config.file}:{meant.model}"
        return JudgeOrigin(
            name, {canonical(name): named} if source.is_local else {}, version, model
        )
    plain = _identity(meant)
    return JudgeOrigin(plain, {canonical(plain): _plain(config)}, version, model)


def _plain(config: JudgeConfig) -> dict[str, Any]:
    known: dict[str, Any] = json.loads(canonical(config))
    return {key: value for key, value in known.items() if value is not None}


def _identity(config: JudgeConfig) -> dict[str, Any]:
    return {key: value for key, value in _plain(config).items() if key in JudgeConfig.DECIDES}


def local_judges(spec: SweepSpec) -> list[tuple[str, Path]]:
    """The judges of a sweep whose models are local files: (name of the judge, path)."""
    given = (spec.evaluation.judge, *spec.evaluation.judges, spec.evaluation.win_rate)
    configs = [config_of(judge) for judge in given if judge is not None]
    sources = [
        (config.file, Source.of(config, config.file))
        for config in configs
        if config.model and config.endpoint is None
    ]
    return [(name, Path(source.place)) for name, source in sources if source.is_local]
