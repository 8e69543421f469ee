"""The command line: every command, in the order in which one needs them.

What a command does is told in the module that it comes from, and by its `--help`.
"""

from typing import Any

import typer
from typer.core import TyperGroup

from ..freed_memory import keep_freed_memory
from ..runtime.progress import silence_libraries
from .calibrate import calibrate
from .console import keep_writable
from .evaluate import evaluate
from .models import convert, export, info, push, space
from .predict import predict
from .training import check_data, preview_synthesis, train

# Training writes its settings with underscores: both spellings are taken, so that they can be copied.
UNDERSCORES = {"token_normalize_func": lambda name: name.replace("_", "-")}
# The settings of training have a parser of their own, with its own --help.
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


class Commands(TyperGroup):
    """All commands; a closed standard output, of their help too, ends none of them."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        keep_writable()
        return super().main(*arguments, **options)


# Plain text: rich would break the lines that are there to be copied.
app = typer.Typer(
    cls=Commands, rich_markup_mode=None, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


@app.callback()
def main() -> None:
    """DiffusionAD: find defects in pictures with a one-step, norm-guided diffusion model.

    `diffusionad COMMAND --help` explains a command and shows how it is used.
    """
    keep_freed_memory()
    silence_libraries()


app.command()(predict)
app.command()(check_data)
app.command(context_settings=PASSED_ON)(preview_synthesis)
app.command(context_settings=PASSED_ON)(train)
app.command(context_settings=UNDERSCORES)(evaluate)
app.command()(calibrate)
app.command()(info)
app.command()(convert)
app.command()(export)
app.command()(push)
app.command()(space)
