"""Files that lie beside `src` in a checkout and inside the package in a wheel: scripts, the Space, the card's template.

pyproject.toml says which (`force-include`): so nothing is kept twice, and what a checkout can do a wheel can do too.
"""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def find_shipped(name: str) -> Path:
    """The path of a shipped file or folder.

    Args:
        name: relative to the top of a checkout, such as `"training/train.py"`.

    Raises:
        FileNotFoundError: when neither a checkout nor the package has it.
    """
    for top in (PACKAGE, PACKAGE.parents[1]):
        if (top / name).exists():
            return top / name
    raise FileNotFoundError(f"{name} is missing beside the package: install diffusionad_pipe again")
