"""The propositions, and a ledger of what their checks found."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hypothesis.strategies import SearchStrategy

import proofs_checks


@dataclass(frozen=True)
class Proposition:
    """A statement under check.

    `check(problem, subject)` answers errors by name, each relative to its tolerance: it holds where
    none exceeds 1. `subject` is what the statement is about (the library's functions, or the
    statement's own formula); a mutant is the same with a deliberate error.
    """

    name: str
    title: str
    problems: SearchStrategy
    check: Callable[[Any, Any], dict[str, float]]
    subject: Any
    mutants: Mapping[str, Any]

    def worst(self, problem, subject) -> float:
        return max(self.check(problem, subject).values())


@dataclass
class Record:
    """What one run found of one proposition."""

    examples: int = 0
    worst: float = 0.0
    caught: int = 0


REGISTRY: dict[str, Proposition] = {}
LEDGER: dict[str, Record] = {}


def register(proposition: Proposition) -> None:
    if len(proposition.mutants) < 2:
        raise ValueError(f"{proposition.name} needs at least two mutants.")
    REGISTRY[proposition.name] = proposition
    LEDGER[proposition.name] = Record()


def load() -> dict[str, Proposition]:
    """Every proposition, in the order of its number."""
    for module in sorted(m.name for m in pkgutil.iter_modules(proofs_checks.__path__)):
        if module.startswith("p") and module[1:3].isdigit():
            importlib.import_module(f"proofs_checks.{module}")
    return dict(sorted(REGISTRY.items(), key=lambda item: int(item[0][1:])))
