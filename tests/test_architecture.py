"""Who may import whom: configs <- {rewards, inference} <- train <- launch."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = {
    "configs": {"configs"},
    "rewards": {"configs", "rewards"},
    "inference": {"configs", "inference"},
    "train": {"configs", "rewards", "inference", "train"},
    "launch": {"configs", "rewards", "inference", "train", "launch"},
}
FILES = [p for room in ALLOWED for p in sorted((ROOT / room).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
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
        "Makefile",
        "runs",
        "duet.egg-info",
    }
    seen = {p.name for p in ROOT.iterdir() if not p.name.startswith(".")}
    assert seen <= allowed | {"shared", "build"}
