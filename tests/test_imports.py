"""Imports go down one list only, and the base install needs no extra."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "influx"
ORDER = (
    "_custom_types", "_extras", "_agreement", "_checks", "_equations", "_loop_body", "_chunks",
    "_cost", "_linalg", "_loss", "_data", "_risk", "_validate",
    "_restriction", "_gradients", "_jacobian", "_solver", "_train", "_truth", "_measurement",
    "_taps", "_curvature", "_engine", "_response", "_scale", "_effect", "_influence", "_transform",
    "_coverage", "_plan", "_memorization", "_value", "_removal", "_top_k", "_influential_subset",
    "_certify",
    "_restriction_bound", "_diagnose", "testing", "plot", "extend", "_demo", "cli",
)  # fmt: skip
BLIND = {
    "_gradients",
    "_jacobian",
    "_solver",
    "_measurement",
    "_curvature",
    "_response",
    "_influence",
}


def imported(path: Path) -> set[str]:
    """Top-level parts of influx that a module imports, those for type checkers apart."""
    parts = path.relative_to(PACKAGE).parts
    found = set()
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in typing_only:
            base = list(parts[: len(parts) - node.level])
            names = (node.module or "").split(".") if node.module else []
            if base + names:
                found.add((base + names)[0])
    return found


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("part", ORDER)
def test_imports_go_down_one_list(part):
    files = [p for p in PACKAGE.rglob("*.py") if part_of(p) == part]
    assert files, f"{part} is not there"
    for path in files:
        for other in imported(path) - {part}:
            assert ORDER.index(other) < ORDER.index(part), f"{path.name} imports {other}"


def test_the_list_is_complete():
    assert {part_of(p) for p in PACKAGE.rglob("*.py")} == {*ORDER, "__init__", "__main__"}


def test_truth_shares_no_code_with_what_it_judges():
    for path in (PACKAGE / "_truth").glob("*.py"):
        assert not imported(path) & BLIND, path.name


def test_no_private_module_of_jax():
    assert not [p for p in PACKAGE.rglob("*.py") if "jax._src" in p.read_text()]


def test_the_base_install_imports_no_extra():
    extras = ("matplotlib", "sklearn", "rich", "typer")
    code = f"import sys, influx; print([m for m in {extras} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
