"""The files of the package that a module uses: the closure of its imports, computed without
importing anything.

Imports inside functions count, imports for type checkers do not. A module also uses the
`__init__.py` of the packages that contain it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGE = "ftsec_ray"


class ImportGraph:
    """The imports between the files of the package, read on demand."""

    def __init__(self, root: Path, without: Iterable[str] = ()) -> None:
        """See the class.

        Args:
            root: Folder of the package ftsec_ray.
            without: Modules, or whole packages, that are not followed.
        """
        self._root = root
        self._without = tuple(without)
        self._known: dict[str, tuple[str, ...]] = {}

    def closure(self, modules: Iterable[str]) -> list[str]:
        """Files that running the modules may use, as sorted paths below the package's folder."""
        files: set[str] = set()
        seen: set[str] = set()
        waiting = list(modules)
        while waiting:
            module = waiting.pop()
            if module in seen or any(_is_in(module, package) for package in self._without):
                continue
            seen.add(module)
            path = self._file_of(module)
            if path is not None:
                files.add(path.relative_to(self._root).as_posix())
                waiting += [*self._imports(path, module), module.rpartition(".")[0]]
        return sorted(files)

    def _file_of(self, module: str) -> Path | None:
        """The file of a module; None for the package itself, for modules of other packages, and for
        names inside modules.
        """
        first, *parts = module.split(".")
        if first != PACKAGE or not parts:
            return None
        place = self._root.joinpath(*parts)
        candidates = (place.with_suffix(".py"), place / "__init__.py")
        return next((path for path in candidates if path.is_file()), None)

    def _imports(self, path: Path, module: str) -> tuple[str, ...]:
        """Dotted names that a file imports: modules, and names in them that may be modules."""
        if module not in self._known:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            package = module if path.name == "__init__.py" else module.rpartition(".")[0]
            self._known[module] = tuple(sorted(set(_imported(tree, package))))
        return self._known[module]


def _is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _imported(node: ast.AST, package: str) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and _is_for_type_checkers(child.test):
            for other in child.orelse:
                yield from _imported(ast.Module([other], []), package)
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = package.split(".")[: -(child.level - 1) or None] if child.level else []
            source = ".".join([*base, *([child.module] if child.module else [])])
            yield source
            yield from (f"{source}.{alias.name}" for alias in child.names)
        else:
            yield from _imported(child, package)


def _is_for_type_checkers(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", "")
    return name == "TYPE_CHECKING"
