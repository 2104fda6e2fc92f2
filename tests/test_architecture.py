"""Who may import whom: configs <- {rewards, inference} <- train <- launch; what tests keep to."""

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from duet.rewards.registry import BUILT_IN

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = {
    "configs": {"configs"},
    "rewards": {"configs", "rewards"},
    "inference": {"configs", "inference"},
    "train": {"configs", "rewards", "inference", "train"},
    "launch": {"configs", "rewards", "inference", "train", "launch"},
}
FILES = [p for room in ALLOWED for p in sorted((ROOT / room).rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
PRIVATE = re.compile(r"\bduet(\.\w+)*\._(?!_)")
PORT_FOLLOWS = re.compile(r"(port|127\.0\.0\.1|localhost)$", re.IGNORECASE)
HOLDS_PORT = re.compile(r"((127\.0\.0\.1|localhost):|port[ =])[1-9]", re.IGNORECASE)


def imported(path: Path) -> set[str]:
    """Modules, and what is imported from them, by dotted names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_point_one_way(path):
    room = path.relative_to(ROOT).parts[0]
    names = [name.split(".") for name in imported(path)]
    assert {name[1] for name in names if name[0] == "duet"} <= ALLOWED[room]
    assert not {name[0] for name in names} & set(ALLOWED), "ours are imported as duet.<folder>"


def test_no_circles_between_files():
    modules = {".".join(("duet", *p.relative_to(ROOT).with_suffix("").parts)): p for p in FILES}
    uses = {name: imported(path) & set(modules) for name, path in modules.items()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"import circle: {' -> '.join([*above, name])}"
        if name not in done:
            for other in uses[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in modules:
        visit(name, ())


def test_a_reward_is_a_file_of_its_name():
    assert {name: path.split(".")[-2] for name, path in BUILT_IN.items()} == {
        n: n for n in BUILT_IN
    }


def test_configs_import_no_torch():
    heavy = {"torch", "transformers", "diffusers", "accelerate"}
    for path in (ROOT / "configs").rglob("*.py"):
        assert not {n.split(".")[0] for n in imported(path)} & heavy


def test_no_utils_and_a_tidy_top_level():
    assert not [p for p in FILES if p.stem in ("utils", "helpers", "common")]
    allowed = {
        *ALLOWED,
        "tests",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "Makefile",
        "runs",
        "duet.egg-info",
    }
    seen = {p.name for p in ROOT.iterdir() if not p.name.startswith(".")}
    assert seen <= allowed | {"shared", "build"}


def mentioned(path: Path) -> set[str]:
    """What a file imports, reaches for in what it imported, or says in text."""
    names, known = imported(path), {}
    nodes = list(ast.walk(ast.parse(path.read_text())))
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            known |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for node in nodes:
        match node:
            case ast.Constant(value=str(text)):
                names.add(text)
            case ast.Attribute():
                owner, dot, rest = ast.unparse(node).partition(".")
                names.add(known.get(owner, owner) + dot + rest)
            case ast.Call(args=[ast.Name(id=owner), ast.Constant(value=str(name)), *_]):
                names.add(f"{known.get(owner, owner)}.{name}")  # setattr and its like
    return names


def fixed_ports(path: Path) -> Iterator[str]:
    """A number behind --port or this machine's address, in the same text or in the next place."""
    for node in ast.walk(ast.parse(path.read_text())):
        pairs = []
        match node:
            case ast.Constant(value=str(text)) if HOLDS_PORT.search(text):
                yield text
            case ast.List(elts=parts) | ast.Tuple(elts=parts):
                pairs = pairwise(parts)
            case ast.Dict(keys=keys, values=values):
                pairs = zip(keys, values, strict=True)
            case ast.Call(args=parts, keywords=keywords):
                pairs = [*pairwise(parts), *((ast.Constant(k.arg), k.value) for k in keywords)]
        for pair in pairs:
            match pair:
                case ast.Constant(value=str(name)), ast.Constant(value=str() | int() as port):
                    if PORT_FOLLOWS.search(name) and str(port).isdigit() and 0 < int(port) < 2**16:
                        yield f"{name} {port}"


each_test = pytest.mark.parametrize("path", TESTS, ids=lambda p: p.stem)


@each_test
def test_no_test_needs_another(path):
    assert not [name for name in mentioned(path) if re.search(r"\btests\.test_\w", name)]


@each_test
def test_only_public_names_are_tested(path):
    assert not [name for name in mentioned(path) if PRIVATE.search(name)]


@each_test
def test_ports_are_the_systems_choice(path):
    assert not list(fixed_ports(path))
