"""`ftsec init`: a commented starter sweep for a model and its fine-tuning rows.

The text is planned, and the rows are read by it, before it is written: a starter is a sweep that
`ftsec plan` accepts and whose rows `ftsec run` can read.
"""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import replace
from pathlib import Path

from ftsec_ray.cli.console import say
from ftsec_ray.cli.data_form import DataForm, form_of
from ftsec_ray.cli.starter_text import SourceRows, Starter, sweep_text
from ftsec_ray.config.faults import Faults
from ftsec_ray.config.local_files import looks_local
from ftsec_ray.config.model_entries import source_of
from ftsec_ray.config.revisions import is_commit, is_hub_id
from ftsec_ray.config.sweep import SourceSpec, SweepSpec
from ftsec_ray.config.sweep_file import load_sweep
from ftsec_ray.config.template_entries import has_template
from ftsec_ray.data.records import FORMATS, format_of
from ftsec_ray.errors import DataError, EnvironmentFault, SpecError, SpecFaults
from ftsec_ray.plan.build import build_plan
from ftsec_ray.plan.origin import known_config
from ftsec_ray.plan.shapes import gguf_header

MIN_ROWS = 10
"""Rows below which there is nothing to split into train, test and trusted rows."""
MAX_ATTACKS = 3
"""Attacks of a starter."""
TRAIN_ROWS, TEST_ROWS, TRUSTED_ROWS = 1_000, 256, 128
USER_SPLITS = ("train", "test", "trusted")


def write_starter(model: str, data: str | None, *, out: Path | None, force: bool) -> None:
    """Write the starter and print what was chosen and the next two commands; SpecError or DataError
    when there is none that could run, and then nothing is written.

    Args:
        model: As in `models` of a sweep; a path starts at the working folder.
        data: A data file, `owner/name@commit`, or None for the model's built-in task.
        out: The sweep file; None: named after the data, else after the model.
        force: Whether an existing file is replaced.
    """
    target = out or Path(f"{_slug(data or model)}.yaml")
    _check_target(target, force=force)
    base = target.absolute().parent
    starter = _fitted(_starter(model, data, base, _slug(target.stem)), base)
    text = sweep_text(starter)
    if starter.rows is not None and starter.rows.is_known:
        _check_rows(load_sweep(text, base=base))
    _write(target, text, force=force)
    _print_choices(starter, target)


def _starter(model: str, data: str | None, base: Path, name: str) -> Starter:
    source, facts, checks = _model(model, base)
    rows = None if data is None else _rows(data, base)
    return Starter(
        name=name,
        model=source,
        model_facts=facts,
        is_ladder=model.startswith("ladder:"),
        task=name if rows is None else _slug(str(data)),
        rows=rows,
        checks=(*checks, *(rows.form.checks if rows else ())),
    )


def _model(given: str, base: Path) -> tuple[dict[str, object], tuple[str, ...], tuple[str, ...]]:
    """The entry of a model, what was found about it, and what is to be checked."""
    faults = Faults("--model")
    source = source_of(given, "--model", Path.cwd(), faults)
    faults.check()
    assert source is not None
    if given.startswith("ladder:"):
        return {"source": given}, ("a small embedded model: no download, no GPU",), ()
    family, aligned = source.family, source.aligned
    facts, checks = [], []
    if source.local:
        path = Path(source.text)
        entry: dict[str, object] = {"path": _relative(path, base)}
        is_file = path.suffix == ".gguf"
        config = gguf_header(path) if is_file else known_config(source.text)
        kind = str(config.get("architecture" if is_file else "model_type") or "")
        where = "header" if is_file else "config.json"
        facts.append(f"{where}: {kind or 'names no model type'}")
        if not is_file:
            templated = has_template(path)
            facts.append("chat template: " + ("found" if templated else "none"))
            aligned = templated if aligned is None else aligned
        family = family or _slug(kind or path.stem)
    else:
        commit = f"@{source.revision}" if source.revision else ""
        entry = {"id": source.text + commit}
        facts.append("on the Hugging Face hub: downloaded by the first run")
        if not commit:
            checks.append("the model is not pinned: add @<commit>, as its files page shows it")
        family = family or source.name
    if source.aligned is None:
        checks.append("`aligned`: true for a chat model that refuses harm, false for a base model")
    entry |= {"family": family, "aligned": True if aligned is None else aligned}
    return entry, tuple(facts), tuple(checks)


def _rows(data: str, base: Path) -> SourceRows:
    """The fine-tuning rows: where they are, how many, and their form."""
    hub, _, commit = data.partition("@")
    is_file = looks_local(data) or Path(data).expanduser().exists() or bool(_format(data))
    if is_file or not is_hub_id(hub):
        return _local_rows(data, base)
    if not is_commit(commit):
        raise SpecError(
            "a data set without a commit",
            data,
            f"{hub}@<commit>, 40 hex digits, as its files page on Hugging Face shows it",
            "a branch moves; for a file on this machine give its path, such as ./rows.jsonl",
        )
    from ftsec_ray.data.sources import records_of

    source = {"dataset": hub, "revision": commit, "split": "train"}
    try:
        records = records_of(
            SourceSpec(dataset=hub, revision=commit, split="train", rows=TRAIN_ROWS)
        )
    except (DataError, EnvironmentFault) as error:
        form = DataForm(
            columns={"prompt": "prompt", "response": "response"},
            reasons=(f"the data set was not read: {error.what}",),
            checks=(
                "the names of the columns under `columns`: the data set could not be opened here",
            ),
        )
        most = TRAIN_ROWS, TEST_ROWS, TRUSTED_ROWS
        return SourceRows(source=source, form=form, counts=most, is_known=False)
    return SourceRows(source=source, form=form_of(records, hub), counts=_counts(len(records), hub))


def _local_rows(data: str, base: Path) -> SourceRows:
    from ftsec_ray.data.records import read_records

    path = Path(data).expanduser()
    if path.is_dir() or not path.exists():
        raise SpecError(
            "no such data file" if not path.exists() else "a folder, not a data file",
            data,
            "a file " + " ".join(FORMATS) + ", each also .gz, or owner/name@<commit>",
            f"looked for {path.name!r} in {path.absolute().parent}",
        )
    records = read_records(str(path))
    return SourceRows(
        source={"path": _relative(path.resolve(), base)},
        form=form_of(records, str(path)),
        counts=_counts(len(records), str(path)),
    )


def _format(data: str) -> str:
    kind, _ = format_of(data)
    return kind if kind in FORMATS else ""


def _counts(rows: int, place: str) -> tuple[int, int, int]:
    """Rows of train, test and trusted, of so many."""
    if rows < MIN_ROWS:
        raise DataError(
            f"{place} has too few rows to fine-tune and to test on",
            rows,
            f"{MIN_ROWS} rows or more",
            "give more rows; hundreds are usual",
        )
    test, trusted = min(TEST_ROWS, rows // 5), min(TRUSTED_ROWS, rows // 10)
    return min(TRAIN_ROWS, rows - test - trusted), test, trusted


def _fitted(starter: Starter, base: Path) -> Starter:
    """The starter with the methods that `ftsec plan` accepts; SpecFaults when it refuses the sweep
    even without any.
    """
    wanted = replace(starter, attacks=starter.attacks[:MAX_ATTACKS])
    if _faults(wanted, base) is None:
        return wanted
    bare = replace(starter, attacks=(), defenses=())
    fault = _faults(bare, base)
    if fault is not None:
        raise fault
    left_out = []
    attacks, defenses = [], []
    for attack in starter.attacks:
        fault = _faults(replace(bare, attacks=(attack,)), base)
        attacks += [] if fault else [attack]
        left_out += [f"{attack.name}: {_first(fault)}"] if fault else []
    for pair in starter.defenses:
        fault = _faults(replace(bare, defenses=(pair,)), base)
        defenses += [] if fault else [pair]
        left_out += [f"{pair.name}: {_first(fault)}"] if fault else []
    return replace(
        starter,
        attacks=tuple(attacks[:MAX_ATTACKS]),
        defenses=tuple(defenses),
        left_out=tuple(left_out),
    )


def _faults(starter: Starter, base: Path) -> SpecError | None:
    try:
        build_plan(load_sweep(sweep_text(starter), base=base))
    except SpecError as fault:
        return fault
    return None


def _first(fault: SpecError) -> str:
    return fault.faults[0][1].what if isinstance(fault, SpecFaults) else fault.what


def _check_rows(spec: SweepSpec) -> None:
    """DataError when a row of the user's splits cannot be read as the sweep says."""
    from ftsec_ray.data.sources import read_source

    task = spec.tasks[0]
    for split, source in task.splits:
        if split in USER_SPLITS:
            read_source(source, split_name=split, labels=task.labels, instruction=task.instruction)


def _check_target(target: Path, *, force: bool) -> None:
    if target.is_dir():
        raise SpecError("--out is a folder", str(target), "the file to write, such as mine.yaml")
    if not target.parent.is_dir():
        raise SpecError(
            "--out is in a folder that does not exist",
            str(target),
            "a file in an existing folder",
            f"mkdir -p {shlex.quote(str(target.parent))}",
        )
    if target.exists() and not force:
        raise SpecError(
            "the sweep file exists already",
            str(target),
            "the name of a new file",
            "give another --out, or --force to overwrite it",
        )


def _write(target: Path, text: str, *, force: bool) -> None:
    try:
        with target.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise SpecError(
            "the sweep file cannot be written", str(target), "a writable place", str(error)
        ) from error


def _print_choices(starter: Starter, target: Path) -> None:
    say(f"wrote {target}", err=True)
    for line in starter.rows.form.reasons if starter.rows else ():
        say(f"data: {line}", err=True)
    for line in starter.checks:
        say(f"check: {line}", err=True)
    for line in starter.left_out:
        say(f"left out: {line}", err=True)
    say("next:", err=True)
    for verb in ("plan", "run"):
        say(f"ftsec {verb} {shlex.quote(str(target))}")


def _relative(path: Path, base: Path) -> str:
    """A path as the sweep file names it: from the folder of the file; SpecError for a name that no
    UTF-8 file can hold.
    """
    text = os.path.relpath(path, base.resolve())
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SpecError(
            "a path whose name is not UTF-8",
            text.encode("utf-8", "replace").decode(),
            "UTF-8",
            "rename the file",
        ) from error
    return text if text.startswith((".", "/")) else f"./{text}"


def _slug(text: str) -> str:
    """A name of a sweep or task from a path or an id."""
    stem = Path(text.partition("@")[0]).name
    for suffix in (".gz", *FORMATS, ".yaml", ".yml", ".gguf"):
        stem = stem.removesuffix(suffix)
    plain = re.sub(r"[^a-z0-9_-]+", "-", stem.lower()).strip("-_")
    return plain[:60] or "starter"
