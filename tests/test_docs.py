"""What the README says runs, and every public name is documented."""

import re
from pathlib import Path

import jax
import pytest

import influx

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_run_and_links_lead_somewhere(page, capsys):
    text, names = page.read_text(), {}
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            exec(compile(block, page.name, "exec"), names)
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (page.parent / link).exists(), link


def test_every_public_name_has_a_docstring():
    constants = {"LABELS", "VERDICTS"}
    names = [name for name in dir(influx) if name[0] != "_" and name not in constants]
    assert not [name for name in names if not (getattr(influx, name).__doc__ or "").strip()]
