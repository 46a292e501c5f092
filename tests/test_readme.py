"The README says what the committed run found, and names the two commands."

from conftest import ROOT
from readme_results import updated

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_results_are_those_of_the_committed_run():
    assert updated(README) == README, "run tools/readme_results.py"


def test_the_two_commands_are_named():
    assert "make book " in README and "make test " in README
