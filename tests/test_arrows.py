"""Imports run one way: the diagram under "Arrows" of docs/architecture.md, as a list that is compared with every file."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("celo2", "models", "data", "configs", "launch", "train")
# What each may import of the project, besides itself. Within launch/ the order of this list: a part imports those before it.
BASES = {
    "celo2": (),
    "celo2/training": (),
    "celo2/metatrain": ("celo2", "celo2/training"),
    "models": (),
    "data": (),
    "configs": ("celo2/training", "data", "models"),
}
LAUNCH = (
    ("launch",),  # launch/__init__.py
    ("launch/monitoring",),
    ("launch/private",),
    ("launch/optimizers",),
    ("launch/distributed",),
    ("launch/checkpoint",),
    ("launch/run", "launch/command"),
    ("launch/planning", "launch/sample", "launch/evaluate"),
    ("launch/train_command",),
    ("train",),
    ("launch/benchmark", "launch/compare", "launch/fault_injection"),
    ("launch/torture",),
)
# The documented names of files of launch/ import them when they are called.
EXCEPTIONS = {("models/export.py", "launch/checkpoint"), ("models/sample.py", "launch/sample")}


def part_of(module: str) -> str:
    """The part of the diagram that a dotted module belongs to."""
    first, *rest = module.split(".")
    if first == "launch" and rest:
        return f"launch/{rest[0]}"
    if first == "celo2" and rest and rest[0] in ("training", "metatrain"):
        return f"celo2/{rest[0]}"
    return first


def imported(path: Path) -> set[str]:
    """The modules of the project that a file imports, anywhere in it; TYPE_CHECKING blocks count too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(f"{node.module}.{node.names[0].name}" if node.module in ("launch", "celo2") else node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {module for module in found if module.split(".")[0] in OURS}


def allowed(part: str) -> set[str]:
    """The parts that `part` may import."""
    if part in BASES:
        return {part, *BASES[part]}
    level = next(number for number, parts in enumerate(LAUNCH) if part in parts)
    return {part, *BASES, *(name for parts in LAUNCH[:level] for name in parts)}


def files() -> list[Path]:
    own = [path for name in OURS[:-1] for path in sorted((ROOT / name).rglob("*.py"))]
    return [*own, ROOT / "train.py"]


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_runs_against_the_arrows(path):
    name = str(path.relative_to(ROOT))
    part = part_of(name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    wrong = {part_of(module) for module in imported(path)} - allowed(part)
    assert not {other for other in wrong if (name, other) not in EXCEPTIONS}


def test_the_optimizer_imports_neither_meta_training_nor_what_that_shares_with_launch():
    for path in (ROOT / "celo2").glob("*.py"):
        assert {part_of(module) for module in imported(path)} <= {"celo2"}, path
