"""What the operator of the page set in the environment, checked before anything reads it: Gradio does at its import."""

import os
import socket
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from diffusionad_pipe.runtime.figures import import_matplotlib

LONGEST = 10**9  # seconds, some thirty years


class ServerSettings(NamedTuple):
    """How the page is served.

    Args:
        keep_seconds: how long pictures and results are kept.
        port: the one to serve on; None takes the first that is free from 7860 on.
    """

    keep_seconds: int
    port: int | None


def read_server_settings(environment: Mapping[str, str]) -> ServerSettings:
    """Check the variables.

    Args:
        environment: `DIFFUSIONAD_KEEP_SECONDS`, and Gradio's `GRADIO_SERVER_PORT`, `GRADIO_SERVER_NAME`,
            `GRADIO_TEMP_DIR`, `GRADIO_NUM_PORTS` and `GRADIO_DEBUG`.

    Raises:
        ValueError: names the variable.
    """
    keep_seconds = read_number(environment, "DIFFUSIONAD_KEEP_SECONDS", 1, LONGEST)
    port = read_number(environment, "GRADIO_SERVER_PORT", 1, 65535)
    read_number(environment, "GRADIO_NUM_PORTS", 1, 65535)
    read_number(environment, "GRADIO_DEBUG", 0, 1)
    _check_address(environment.get("GRADIO_SERVER_NAME"))
    _check_folder(environment.get("GRADIO_TEMP_DIR"))
    return ServerSettings(1800 if keep_seconds is None else keep_seconds, port)


def read_number(environment: Mapping[str, str], name: str, low: int, high: int) -> int | None:
    """A whole number in low ... high; None where the variable is not set."""
    text = environment.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and low <= int(text[:20]) <= high):
        raise ValueError(f"{name}={text} is no whole number from {low} to {high}: set it to one, or unset it")
    return int(text)


def _check_address(name: str | None) -> None:
    if name is None:
        return
    cause: object = "it is empty"
    try:
        found = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE) if name else []
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as server:
                try:
                    server.bind(address)
                    return
                except OSError as error:
                    cause = error.strerror
    except (OSError, UnicodeError) as error:
        cause = error
    raise ValueError(
        f"GRADIO_SERVER_NAME={name} is no address of this machine ({cause}): set it to 127.0.0.1, or to 0.0.0.0 to be "
        "reached from others"
    )


def _check_folder(name: str | None) -> None:
    folder = Path(tempfile.gettempdir(), "gradio") if name is None else Path(name)
    try:
        if name == "":
            raise OSError("it is empty")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        raise ValueError(
            f"pictures cannot be kept in GRADIO_TEMP_DIR={os.fspath(folder)} ({error}): set it to a folder that can be "
            "written to"
        ) from error


try:
    SERVER = read_server_settings(os.environ)
except ValueError as error:
    raise SystemExit(f"Error: {error}") from error
with suppress(ImportError):  # Gradio imports it where it is installed
    import_matplotlib()
