"""The README's first lines run as printed, and what it names exists (docs/tutorial.ipynb: test_site.py)."""

import doctest
import re
from pathlib import Path

import torch
import transformers

from tests.helpers.models import tiny_model

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def first_code():
    return re.search(r"executed by tests/docs/test_readme.py.*?-->\n```python\n(.*?)```", README, re.S)[1]


def test_it_is_short_and_begins_with_the_patch():
    """One page: what it is, one picture, two commands to start with, one table, one block of use."""
    assert len(README.splitlines()) < 120
    languages = re.findall(r"^```(\w+)$", README, re.M)
    assert languages == ["python", "bash", "bash"]
    assert "flr.patch_model(model)" in first_code()
    assert README.index(first_code()) < 1500
    assert len(re.findall(r"^!\[", README, re.M)) == 1
    assert len(re.findall(r"^\| ?---", README, re.M)) == 1
    start = re.findall(r"^```bash\n(.*?)```", README, re.M | re.S)[0]
    assert len(start.splitlines()) == 2


def test_every_command_is_in_the_block_of_use():
    from flr.cli import COMMANDS

    use = re.findall(r"^```bash\n(.*?)```", README, re.M | re.S)[1]
    shown = re.findall(r"^flr (\w+)", use, re.M)
    assert set(shown) == set(COMMANDS) - {"quickstart", "bench"}


def test_the_first_lines_run(monkeypatch):
    model, names = tiny_model("qwen2").eval(), {}

    def from_pretrained(name):
        names["hub"] = name
        return model

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    exec(compile(first_code(), "README.md", "exec"), names)
    assert names["hub"].count("/") == 1
    ids = torch.tensor([[5, 6, 7]])
    assert model(input_ids=ids).flr is not None
    assert model.generate(ids, max_new_tokens=2, do_sample=False, eos_token_id=None).shape == (1, 5)


def test_the_number_of_families_is_that_of_the_sweep():
    page = (ROOT / "docs/families.md").read_text()
    numbers = re.search(r"equal to the two-pass .* on (\d+) of the (\d+) .*?other (\d+) are", page, re.S)
    equal, of, refused = numbers.groups()
    assert re.search(rf"on {equal} of the {of} causal-LM families .*?the other {refused} are", README, re.S)


def test_the_decoding_example_runs():
    failed, attempted = doctest.testfile(str(ROOT / "docs/decoding.md"), module_relative=False)
    assert attempted >= 8
    assert failed == 0


def test_files_flags_and_commands_in_the_documents_exist():
    from flr.cli import COMMANDS

    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = path.read_text()
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (path.parent / link).exists(), f"{path.name}: {link}"
        for command in re.findall(r"^flr (\w+)|`flr (\w+)", text, re.M):
            assert (command[0] or command[1]) in COMMANDS, f"{path.name}: flr {command}"
