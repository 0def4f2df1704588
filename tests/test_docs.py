"""What the documents show runs and prints what they say; every public name is documented."""

import inspect
import re
from decimal import Decimal
from pathlib import Path
from types import ModuleType

import jax
import pytest

import influx
import influx.plot
import influx.testing

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
API = (ROOT / "docs" / "api.md").read_text()
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"[-−]?\d+(?:\.\d+)?(?:e[-+]\d+)?")
CONSTANTS = {"LABELS", "REASONS", "VERDICTS"}  # tuples carry no docstring


def public(module: ModuleType) -> list[str]:
    """The names of a module that are its own: neither private nor imported from elsewhere."""
    here = module.__name__
    return [
        name
        for name, value in vars(module).items()
        if name[0] != "_"
        and not isinstance(value, ModuleType)
        and getattr(value, "__module__", here).startswith(here)
    ]


def names() -> list[tuple[str, object]]:
    """(name as it is written after `import influx`, object) of everything public."""
    own = [(name, getattr(influx, name)) for name in public(influx)]
    own += [(f"extend.{n}", x) for n, x in vars(influx.extend).items() if n[0] != "_"]
    for module in (influx.testing, influx.plot):
        prefix = module.__name__.removeprefix("influx.")
        callables = [n for n in public(module) if callable(getattr(module, n))]
        own += [(f"{prefix}.{name}", getattr(module, name)) for name in callables]
    return own


def agree(printed: str, shown: str) -> bool:
    """The same text, and numbers that differ by at most one unit in their last printed place.

    A figure with an exponent says an order of magnitude, and may be off by one.
    """
    words = lambda text: NUMBER.sub("#", text).split()
    if words(printed) != words(shown):
        return False
    pairs = list(zip(NUMBER.findall(printed), NUMBER.findall(shown)))
    return all(near(Decimal(a.replace("−", "-")), b.replace("−", "-")) for a, b in pairs)


def near(got: Decimal, shown: str) -> bool:
    value = Decimal(shown)
    if "e" in shown:
        return got * value > 0 and abs(got.adjusted() - value.adjusted()) <= 1
    return abs(got - value) <= Decimal(1).scaleb(int(value.as_tuple().exponent))


def slug(heading: str) -> str:
    """The anchor that a heading gets on GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).strip().replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text())
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def test_agree_sees_a_wrong_number_and_a_wrong_word():
    assert agree("slope 1.054 of 3", "slope 1.053  of 3")
    assert not agree("slope 1.054", "slope 1.04")
    assert not agree("slope -1.05", "slope 1.05")
    assert not agree("slope 1.054", "Pearson 1.054")
    assert agree("error 3e-05", "error 1e-04")
    assert not agree("error 3e-03", "error 1e-05")
    assert not agree("1 2", "1")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_run_and_print_what_stands_below_them(page, capsys):
    namespace, printed = {"__name__": page.stem}, ""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        for language, block in FENCE.findall(page.read_text()):
            if language == "python":
                exec(compile(block, page.name, "exec"), namespace)
                printed = capsys.readouterr().out
            elif language == "text":
                assert agree(printed, block), f"{page.name} shows\n{block}\nbut prints\n{printed}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text())
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documents_name_only_what_is_there(page):
    used = re.findall(
        r"\b(?:ix|influx)\.((?:testing\.|plot\.|extend\.)?[A-Za-z]\w*)\b(?!\.py)", page.read_text()
    )
    known = {name for name, _ in names()} | {"testing", "plot", "extend"}
    assert not sorted(set(used) - known)


def test_every_public_name_has_a_docstring():
    lines = lambda value: (inspect.getdoc(value) or "").strip().splitlines()
    values = [(name, value) for name, value in names() if name not in CONSTANTS]
    assert not [name for name, value in values if not lines(value)]
    functions = [(name, value) for name, value in values if inspect.isfunction(value)]
    own_line = {"plot.style"}  # takes no argument: one line says it all
    assert not [n for n, value in functions if len(lines(value)) < 2 and n not in own_line]


def test_the_api_page_lists_every_public_name_and_links_to_its_source():
    rows = dict(re.findall(r"^\| \[`([\w.]+)`\]\(([^)#]+)\) \|", API, re.MULTILINE))
    expected = dict(names())
    assert sorted(rows) == sorted(expected)
    for name, link in rows.items():
        value = expected[name]
        if name not in CONSTANTS:
            source = Path(inspect.getfile(inspect.unwrap(value)))
            assert (ROOT / "docs" / link).resolve() == source.resolve(), name
