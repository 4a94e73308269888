"""The README's code runs as it stands, and its table names every file."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_code_runs(capsys, promotion_as_users_have_it):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert "dot_general" in capsys.readouterr().out
    assert names["state"].step == 1


def test_every_module_is_in_the_table_of_files():
    for path in (ROOT / "jax_apt").glob("*.py"):
        if path.name != "__init__.py":
            assert f"`jax_apt/{path.name}`" in README, path.name


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
