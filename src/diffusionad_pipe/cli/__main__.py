"""`python -m diffusionad_pipe.cli`, which `accelerate launch -m` takes."""

from . import app

app()
