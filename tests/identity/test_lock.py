"""The lock: no edit of the code slips by under an unchanged VERSION, and none that changes nothing
moves a digest.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ftsec_ray import code_versions
from ftsec_ray.discovery import modules_in
from ftsec_ray.errors import EnvironmentFault, IdentityError
from ftsec_ray.identity.import_closure import ImportGraph
from ftsec_ray.identity.lock import (
    LOCK_FILE,
    ROOT,
    Entry,
    edited_files,
    lock_faults,
    read_lock,
)
from ftsec_ray.lifecycle import kinds
from ftsec_ray.plan.build import build_plan
from ftsec_ray.registry import ATTACKS, DEFENSES, _module_hash, outside_hash
from tests.plan.test_build_plan import only, sweep

DIGESTS = """\
from tests.plan.test_build_plan import build_plan, sweep
plan = build_plan(sweep(attacks=("none", "badnets"), defenses=((), ("onion", "safe_lora"))))
print(plan.digest, *plan.stages)
"""


def copy_with(folder: Path, path: str, old: str, new: str) -> Path:
    """A copy of the package in which one file is edited."""
    copy = folder / "ftsec_ray"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("__pycache__"))
    text = (copy / path).read_text(encoding="utf-8")
    assert old in text
    (copy / path).write_text(text.replace(old, new), encoding="utf-8")
    return copy


def faults_of(root: Path) -> list[str]:
    return list(lock_faults(read_lock(), code_versions.lock_of(root)))


def digests_under(folder: Path) -> str:
    """The digests of a plan as the package in a folder makes them."""
    tests = Path(__file__).parents[2]
    path = os.pathsep.join([str(folder), str(tests)])
    done = subprocess.run(
        [sys.executable, "-c", f"import ftsec_ray; print(ftsec_ray.__file__)\n{DIGESTS}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
    )
    where, digests = done.stdout.split("\n", 1)
    assert Path(where).is_relative_to(folder)
    return digests


@pytest.fixture(scope="module")
def now():
    return code_versions.lock_of()


def test_the_code_is_what_the_lock_says(now):
    assert list(lock_faults(read_lock(), now)) == []
    assert LOCK_FILE.read_text(encoding="utf-8") == now.text(), "run `make lock`"
    assert edited_files(read_lock()) == []


def test_every_kind_of_stage_and_every_method_stands_in_the_lock():
    entries = set(read_lock().entries)
    assert entries == {
        *(f"stage:{kind}" for kind in kinds()),
        *(f"judge:{name}" for name in modules_in("ftsec_ray.judges")),
        *(f"attack:{name}" for name in ATTACKS.names()),
        *(f"defense:{name}" for name in DEFENSES.names()),
    }


@pytest.mark.parametrize(
    ("path", "old", "new", "owner"),
    [
        ("stages/source.py", "build_model(size, seed=0)", "build_model(size, seed=1)", "source"),
        ("context.py", "unit_interval(self.seed, ", "unit_interval(self.seed + 1, ", "craft"),
        ("method.py", "for batch in batches]", "for batch in batches[:1]]", "craft"),
        ("evals/judging.py", "MIN_DISTINCT_FRAC, MIN_WORD_CHAR_FRAC = 40, 0.3", None, "score"),
    ],
)
def test_an_edit_of_the_engine_is_told_with_its_file(tmp_path, path, old, new, owner):
    new = new or old.replace("0.3", "0.4")
    faults = faults_of(copy_with(tmp_path, path, old, new))
    told = next(fault for fault in faults if owner in re.split("[ ,;]+", fault))
    assert told.startswith("the code of stage")
    assert f"changed (files {path}): increase VERSION, or run `make lock` if results are" in told
    assert edited_files(read_lock(), tmp_path / "ftsec_ray") == [path]


def test_the_engine_that_all_methods_share_is_part_of_theirs(tmp_path):
    root = copy_with(tmp_path, "context.py", "unit_interval(self.seed, ", "unit_interval(")
    changed = code_versions.lock_of(root)
    locked = read_lock().entries
    assert all(changed.entries[name].code != entry.code for name, entry in locked.items())


def test_a_helper_of_one_method_leaves_the_others_alone(tmp_path):
    root = copy_with(tmp_path, "defenses/onion.py", 'self.render == "chat"', "True")
    changed = code_versions.lock_of(root)
    other = {name for name, entry in read_lock().entries.items() if changed.entries[name] != entry}
    assert other == {"defense:onion"}


def test_renaming_a_local_variable_of_a_judge_moves_no_digest(tmp_path):
    (tmp_path / "same").mkdir()
    (tmp_path / "renamed").mkdir()
    copy_with(tmp_path / "same", "judges/qi2023.py", "plain", "plain")
    root = copy_with(tmp_path / "renamed", "judges/qi2023.py", "plain", "straight")
    assert edited_files(read_lock(), root) == ["judges/qi2023.py"]
    assert digests_under(tmp_path / "renamed") == digests_under(tmp_path / "same")


def test_a_comment_and_a_docstring_are_no_change(tmp_path):
    root = copy_with(
        tmp_path, "training/losses.py", '"""Loss functions', '# Why.\n"""Reworded loss functions'
    )
    assert faults_of(root) == []


def test_a_version_raised_without_a_new_lock_is_told(monkeypatch, now):
    raised_kinds = {**kinds(), "craft": replace(kinds()["craft"], version=2)}
    monkeypatch.setattr(code_versions, "kinds", lambda: raised_kinds)
    monkeypatch.setattr(ATTACKS.get("badnets"), "VERSION", 5)
    raised = {
        name: replace(now.entries[name], version=owner.version)
        for name, owner in code_versions.owners().items()
    }
    assert list(lock_faults(read_lock(), replace(now, entries=raised))) == [
        "the VERSION of stage craft is 2, but 1 in versions.lock: run `make lock`",
        "the VERSION of attack badnets is 5, but 1 in versions.lock: run `make lock`",
    ]


def test_new_and_removed_methods_are_told(now):
    entry = Entry(version=1, code="0" * 32)
    more = replace(now, entries={**now.entries, "attack:mine": entry})
    assert list(lock_faults(read_lock(), more)) == [
        "attack mine is not in versions.lock: run `make lock`"
    ]
    lock = read_lock()
    stale = replace(
        lock,
        entries={**lock.entries, "defense:gone": entry},
        files={**lock.files, "defenses/gone.py": "0" * 32},
    )
    assert list(lock_faults(stale, now)) == [
        "defense gone is in versions.lock but not in the package: run `make lock`",
        "versions.lock contains unused files (defenses/gone.py): run `make lock`",
    ]


def test_make_lock_writes_what_was_read(tmp_path, now):
    file = tmp_path / "versions.lock"
    file.write_text(now.text(), encoding="utf-8")
    lock = read_lock(file)
    assert (lock.entries, lock.files) == (now.entries, now.files)
    (tmp_path / "broken.lock").write_text("[entries", encoding="utf-8")
    for missing in ("none.lock", "broken.lock"):
        with pytest.raises(EnvironmentFault, match=r"cannot read versions\.lock"):
            read_lock(tmp_path / missing)


# What the closure of imports takes in.


def test_whatever_trains_measures_or_makes_rows_is_in_the_lock():
    locked = set(read_lock().files)
    parts = (
        *("attacks", "data", "defenses", "evals", "execute"),
        *("judges", "models", "stages", "training"),
    )
    files = {
        path.relative_to(ROOT).as_posix()
        for part in parts
        for path in ROOT.rglob("*.py")
        if path.relative_to(ROOT).parts[0] == part
    }
    assert files - locked == {"execute/watchdog.py"}
    assert {"context.py", "method.py", "schema.py", "identity/canonical.py"} <= locked


def test_every_exclusion_leaves_something_out():
    texts = [(ROOT / path).read_text(encoding="utf-8") for path in read_lock().files]
    imported = set(re.findall(r"^ *(?:from|import) (ftsec_ray\.[\w.]+)", "\n".join(texts), re.M))
    assert set(code_versions.NOT_FOLLOWED) - imported == set()


def test_nothing_is_imported_by_a_text_but_methods_and_runners():
    by_text = re.compile(r"import_module\(|__import__\(|runpy")
    assert [
        path
        for path in read_lock().files
        if by_text.search((ROOT / path).read_text(encoding="utf-8"))
    ] == [
        "discovery.py",
        "evals/judging.py",
        "execute/unit.py",
        "lifecycle.py",
        "registry.py",
        "schema.py",
    ]


def test_the_closure_follows_all_imports_but_those_for_type_checkers(tmp_path):
    files = {
        "start.py": "from __future__ import annotations\nfrom typing import TYPE_CHECKING\n"
        "import ftsec_ray.plain\nif TYPE_CHECKING:\n    from ftsec_ray.typed import T\n"
        "else:\n    import ftsec_ray.run\n"
        "def f():\n    from ftsec_ray.inside import deep, name\n    return deep\n",
        "plain.py": "import json\n",
        "typed.py": "",
        "run.py": "from ftsec_ray import whole\n",
        "whole.py": "",
        "inside/__init__.py": "from . import sibling\n",
        "inside/deep.py": "from ..up import x\n",
        "inside/sibling.py": "from .near import y\n",
        "inside/near.py": "import ftsec_ray.left_out.module\n",
        "up.py": "import ftsec_ray.start\n",
        "left_out/__init__.py": "",
        "left_out/module.py": "",
        "unused.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    graph = ImportGraph(tmp_path, ["ftsec_ray.left_out"])
    assert set(graph.closure(["ftsec_ray.start"])) == set(files) - {
        "typed.py",
        "unused.py",
        "left_out/__init__.py",
        "left_out/module.py",
    }


# Methods from outside of the package.

PLUGIN = '''\
"""A defense from elsewhere."""
from dataclasses import dataclass
from typing import ClassVar

from ftsec_ray.method import Defense


@dataclass(frozen=True, kw_only=True)
class Mine(Defense):
    """A defense."""

    PHASE: ClassVar[str] = "post"

    def revise_model(self, model, ctx):
        """Change nothing."""
        return model
'''


def plugin(folder: Path, text: str) -> type:
    """The class in a module `plugin_of_a_test` with this text."""
    (folder / "plugin_of_a_test.py").write_text(text)
    sys.modules.pop("plugin_of_a_test", None)
    importlib.invalidate_caches()
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    _module_hash.cache_clear()
    return importlib.import_module("plugin_of_a_test").Mine


def test_the_code_of_a_method_from_elsewhere_is_in_its_digests(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))

    def revise(text: str) -> str:
        return only(build_plan(sweep(defenses=((plugin(tmp_path, text)(),),))), "revise").digest

    before = revise(PLUGIN)
    assert revise(PLUGIN.replace("Change nothing", "Leave it")) == before
    assert revise(PLUGIN.replace("return model", "return model or None")) != before
    assert outside_hash(ATTACKS.get("badnets").__module__) is None
    cls = plugin(tmp_path, PLUGIN)
    _module_hash.cache_clear()
    del sys.modules["plugin_of_a_test"]
    with pytest.raises(IdentityError, match="no source file"):
        outside_hash(cls.__module__)


def test_a_stage_is_made_by_the_code_of_its_kind_and_its_methods(monkeypatch):
    badnets = [{"kind": "attack", "name": "badnets", "params": {}}]
    other = [{"kind": "attack", "name": "tuba", "params": {}}]
    made_by = [
        code_versions.stage_code("craft"),
        code_versions.stage_code("craft", badnets),
        code_versions.stage_code("craft", other),
        code_versions.stage_code("craft", badnets + other),
        code_versions.stage_code("no such kind"),
        code_versions.stage_code("craft", [{"kind": "attack", "name": "not installed"}]),
    ]
    assert len(set(made_by)) == len(made_by)
    lock = read_lock()
    edited = {**lock.entries, "attack:badnets": Entry(version=1, code="0" * 32)}
    monkeypatch.setattr(code_versions, "read_lock", lambda: replace(lock, entries=edited))
    assert code_versions.stage_code("craft") == made_by[0]
    assert code_versions.stage_code("craft", badnets) != made_by[1]
