"""What rewards there are, read from their source: a list must not cost an import of torch."""

import ast
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from duet.rewards.registry import BUILT_IN, ENTRY_POINT_GROUP


@dataclass(frozen=True)
class Entry:
    name: str
    origin: str  # "built in", or the package that offers it
    purpose: str  # one line


def catalogue() -> list[Entry]:
    """Built-in rewards, then installed ones; an installed one hides a built-in of its name."""
    installed = {e.name: e for e in entry_points(group=ENTRY_POINT_GROUP)}
    built_in = {n: path.rpartition(".") for n, path in BUILT_IN.items() if n not in installed}
    return [
        *(
            Entry(n, "built in", _purpose(module, name))
            for n, (module, _, name) in built_in.items()
        ),
        *(Entry(n, e.dist.name, _purpose(e.module, e.attr)) for n, e in installed.items()),
    ]


def _purpose(module: str, name: str) -> str:
    """The first line of the class's or function's docstring, else of the module's."""
    spec = _find(module)
    if spec is None or not spec.origin:
        return f"(module {module} is missing)"
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    named = [n for n in tree.body if getattr(n, "name", None) == name]
    docs = [ast.get_docstring(node) for node in (*named, tree) if _may_have_docstring(node)]
    return next((d.splitlines()[0] for d in docs if d), "")


def _may_have_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module)


def _find(module: str) -> ModuleSpec | None:
    """Where a module lies; its parent packages are not run, as `find_spec` alone would."""
    top, *parts = module.split(".")
    spec = find_spec(top)
    for part in parts:
        if spec is None or spec.submodule_search_locations is None:
            return None
        name, folders = f"{spec.name}.{part}", spec.submodule_search_locations
        found = (finder.find_spec(name, folders) for finder in sys.meta_path)
        spec = next((s for s in found if s), None)
    return spec
