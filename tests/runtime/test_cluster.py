"""What a scheduler or another program left in the environment decides nothing, or is named."""

import os
import socket
from pathlib import Path

import pytest
from accelerate import PartialState
from PIL import Image

from diffusionad_pipe.runtime.acceleration import RANK_VARIABLES, join_processes
from tests.helpers.script_processes import run_script
from tests.helpers.tiny_pipeline import build_tiny_pipeline

ALONE = [
    {"LOCAL_RANK": "0"},
    {"LOCAL_RANK": "3", "RANK": "3"},
    {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"},
    {"WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"},
    {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
    {"PMI_SIZE": "1", "PMI_RANK": "0"},
    {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "2"},
]
REFUSED = [
    ({"WORLD_SIZE": "4", "RANK": "1"}, "WORLD_SIZE=4.*MASTER_ADDR and MASTER_PORT are not set"),
    ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT are not set"),
    ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_SIZE=2"),
    ({"PMI_SIZE": "2"}, "PMI_SIZE=2"),
    ({"LOCAL_RANK": "first"}, "LOCAL_RANK=first is no number"),
    ({"WORLD_SIZE": ""}, "WORLD_SIZE= is no number"),
    ({"LOCAL_RANK": "0", "WORLD_SIZE": "2.5"}, "WORLD_SIZE=2.5 is no number"),
    ({"ACCELERATE_USE_CPU": "maybe"}, "ACCELERATE_USE_CPU.*invalid truth value"),
    ({"ACCELERATE_TORCH_DEVICE": "tpu9"}, "ACCELERATE_TORCH_DEVICE"),
]


@pytest.fixture
def environment(monkeypatch):
    """Only what a test sets, and accelerate as it is before its first use."""
    for name in [*RANK_VARIABLES, "MASTER_ADDR", "MASTER_PORT", *filter(lambda n: "ACCELERATE" in n, os.environ)]:
        monkeypatch.delenv(name, raising=False)
    before = dict(PartialState._shared_state)
    PartialState._reset_state()
    yield monkeypatch
    PartialState._reset_state()
    PartialState._shared_state.update(before)


@pytest.mark.parametrize("variables", ALONE)
def test_a_process_that_is_alone_works_alone(environment, variables):
    for name, value in variables.items():
        environment.setenv(name, value)
    state = join_processes()
    assert (state.num_processes, state.process_index, state.is_main_process) == (1, 0, True)
    assert {name: os.environ.get(name) for name in variables} == variables  # they may be meant for somebody else


@pytest.mark.parametrize(("variables", "said"), REFUSED)
def test_what_cannot_be_followed_is_named(environment, variables, said):
    for name, value in variables.items():
        environment.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        join_processes()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_tiny_pipeline().save_pretrained(folder)
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    return folder


@pytest.mark.parametrize(
    ("variables", "code", "said"),
    [
        ({"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}, 0, ""),
        ({"WORLD_SIZE": "2", "RANK": "0"}, 2, "WORLD_SIZE=2"),
    ],
)
def test_predict_among_them(model, tmp_path, variables, code, said):
    script = tmp_path / "diffusionad.py"
    script.write_text("from diffusionad_pipe.cli import app\napp()\n")
    arguments = ["predict", model / "a.png", "--model", model, "--output", tmp_path / "out", "--device", "cpu"]
    done = run_script([script, *arguments], os.environ | variables)
    assert done.returncode == code and said in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


JOIN = """
from datetime import timedelta
from diffusionad_pipe.runtime import acceleration

acceleration.JOINING = timedelta(seconds=1)
acceleration.join_processes()
"""


def test_processes_that_never_come_are_not_waited_for_for_ever(tmp_path: Path) -> None:
    """Variables that another job left behind are complete, and nothing listens at the address."""
    script = tmp_path / "join.py"
    script.write_text(JOIN)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    done = run_script([script], {**os.environ, **there, "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"})
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "cannot be joined as the variables" in last and "WORLD_SIZE" in last, done.stderr
