"""The version of the package is one that the changelog knows."""

import re
from pathlib import Path

from diffusionad_pipe import __version__


def test_the_changelog_has_the_version() -> None:
    changelog = (Path(__file__).parents[1] / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[([^]]+)\](?: - \d{4}-\d\d-\d\d)?$", changelog, re.MULTILINE)
    assert versions[0] == "Unreleased" and versions[1] == __version__
