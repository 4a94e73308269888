"""The code of README and docs runs as it stands, links lead somewhere, and the table names every file."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


PAGES = sorted(ROOT.glob("docs/*.md"))


def run_code(page, text):
    """The names that a page's Python blocks define, run one after the other."""
    names = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, page, "exec"), names)
    return names


def test_code_runs(capsys, promotion_as_users_have_it):
    names = run_code("README.md", README)
    assert "dot_general" in capsys.readouterr().out
    assert names["state"].step == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_of_docs_runs(page, promotion_as_users_have_it, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_code(page.name, page.read_text())


def test_every_module_is_in_the_table_of_files():
    for path in (ROOT / "jax_apt").glob("*.py"):
        if path.name != "__init__.py":
            assert f"`jax_apt/{path.name}`" in README, path.name


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_page_of_docs_is_linked():
    for page in PAGES:
        assert f"(docs/{page.name})" in README, page.name
