"""Files that say who made the package, how to cite it, and how to run it elsewhere."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    assert {"cff-version", "message", "title", "authors", "type", "license", "version"} <= cited.keys()
    assert str(cited["version"]) == re.search(r'^version = "(.*)"$', project, re.M)[1]
    assert cited["license"] == re.search(r'^license = "(.*)"$', project, re.M)[1]


@pytest.mark.skipif(not (ROOT / ".github").is_dir(), reason="a source distribution has no .github")
def test_issue_forms_are_whole():
    forms = [path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
    assert len(forms) >= 3
    for path in forms:
        form = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} <= form.keys(), path.name
        ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
        assert len(ids) == len(set(ids)) > 0, path.name
        assert all(part["attributes"]["label"] for part in form["body"] if part["type"] != "markdown"), path.name


def test_the_container_copies_what_is_there_and_is_no_root():
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    words = {"ARG", "FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}
    assert {word for word, _ in steps} <= words
    for word, rest in steps:
        if word == "COPY" and "--from" not in rest:
            assert all((ROOT / source).exists() for source in rest.split()[:-1]), rest
        if word == "FROM":
            assert re.match(r"\S+:\S*\d", rest), rest  # a version, not what is newest today
    assert [rest for word, rest in steps if word == "USER"] == ["1000"]
    extras = re.search(r"\.\[(.*?)\]", (ROOT / "Dockerfile").read_text())[1].split(",")
    project = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", project, re.M) for extra in extras)
