from random import Random

import pytest
from hypothesis import Phase, find, given, settings
from hypothesis.errors import NoSuchExample

from ._registry import LEDGER, load

PROPOSITIONS = load()
MUTANTS = [(name, mutant) for name, p in PROPOSITIONS.items() for mutant in p.mutants]
# A caught mutant is not worth shrinking.
HUNT = settings(max_examples=30, phases=(Phase.generate,), database=None)


@pytest.mark.parametrize("name", PROPOSITIONS)
def test_holds(name):
    proposition, record = PROPOSITIONS[name], LEDGER[name]

    @given(proposition.problems)
    def holds(problem):
        errors = proposition.check(problem, proposition.subject)
        record.examples += 1
        record.worst = max(record.worst, *errors.values())
        broken = {part: error for part, error in errors.items() if not error <= 1}
        assert not broken, f"{name} broken, errors in units of their tolerance: {broken}"

    holds()


@pytest.mark.parametrize(("name", "mutant"), MUTANTS)
def test_mutants_fail(name, mutant):
    proposition = PROPOSITIONS[name]
    subject = proposition.mutants[mutant]

    def caught(problem):
        try:
            return not proposition.worst(problem, subject) <= 1
        except (ValueError, RuntimeError):  # refusing to answer is no wrong answer
            return False

    try:
        find(proposition.problems, caught, settings=HUNT, random=Random(0))
    except NoSuchExample:
        pytest.fail(f"{name}: the mutant {mutant!r} survives")
    LEDGER[name].caught += 1
