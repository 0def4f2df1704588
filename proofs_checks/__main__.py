"""`python -m proofs_checks [P1 P9 …]`: run the checks and print what they found."""

import re
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).parent


def main(names: list[str]) -> int:
    known = [f"P{int(path.name[1:3])}" for path in sorted(FOLDER.glob("p[0-9][0-9]_*.py"))]
    chosen = [name.upper() for name in names] or known
    if unknown := [name for name in chosen if name not in known]:
        print(f"Unknown propositions {unknown}: choose from {known}.", file=sys.stderr)
        return 2
    # In one process (no -n), where the ledger is.
    options = ["-o", "addopts=-q", "--no-header"]
    code = pytest.main([str(FOLDER / "test_proofs.py"), *options], plugins=[_Select(set(chosen))])
    Console().print(_table(chosen))
    return int(code)


class _Select:
    """Keeps the tests of some propositions: their names stand first in a test's brackets."""

    def __init__(self, names: set[str]):
        self.names = names

    def pytest_collection_modifyitems(self, items):
        items[:] = [i for i in items if re.search(r"\[(P\d+)", i.name).group(1) in self.names]


def _table(chosen: list[str]) -> Table:
    # Imported last: the numerics are set by conftest.py, which pytest reads first.
    from proofs_checks._registry import LEDGER, load

    propositions = load()
    table = Table("proposition", "", "examples", "worst error / tolerance", "mutants caught")
    for name in chosen:
        record, total = LEDGER[name], len(propositions[name].mutants)
        good = record.examples > 0 and record.worst <= 1 and record.caught == total
        table.add_row(
            f"[{'green' if good else 'red'}]{name}[/]", propositions[name].title,
            str(record.examples), f"{record.worst:.1e}", f"{record.caught}/{total}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
