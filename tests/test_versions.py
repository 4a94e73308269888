"""Versions of JAX: one file knows of them, and CI tests the oldest that the package allows and the newest."""

import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
ASKS = re.compile(r"\bjax(lib)?\.(__version|_src|version)|hasattr\((jax|jnp|lax)\b")


def test_one_file_holds_what_differs_between_versions_of_jax():
    sources = {path: path.read_text() for path in (ROOT / "jax_apt").rglob("*.py")}
    assert [path.name for path, text in sources.items() if "before jax 0." in text] == ["_jax_versions.py"]
    assert [path.name for path, text in sources.items() if ASKS.search(text)] == []


def test_ci_takes_the_oldest_version_that_the_package_allows():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = dict(re.findall(r"(jax|jaxlib)>=([\d.]+)", " ".join(project["dependencies"])))
    ci = (ROOT / ".ci" / "run").read_text()
    for package, version in oldest.items():
        assert f"{package}=={version}\\n" in ci
    python = project["requires-python"].removeprefix(">=")
    assert f"suite oldest {python})" in ci and "suite newest 3.13)" in ci
