"""The Space over the network: time to the first page and to the first answer, and what many requests leave behind.

python benchmarks/space.py                    # with pretrained/hazelnut
python benchmarks/space.py --requests 200     # memory and files after 200 pictures too
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import httpx
import psutil
from gradio_client import Client, handle_file
from PIL import Image

ROOT = Path(__file__).parents[1]
KEEP_SECONDS = 6  # so that one need not wait half an hour to see that files are deleted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "pretrained" / "hazelnut"), help="folder or Hub id")
    parser.add_argument("--requests", type=int, default=0, help="pictures to send after the first one")
    arguments = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        uploads = Path(folder, "uploads")
        environment = {
            **os.environ,
            "DIFFUSIONAD_MODEL": arguments.model,
            "DIFFUSIONAD_KEEP_SECONDS": str(KEEP_SECONDS),
            "GRADIO_SERVER_PORT": str(port),
            "GRADIO_TEMP_DIR": str(uploads),
        }
        with open(Path(folder, "log.txt"), "w") as log:
            command = [sys.executable, str(ROOT / "spaces_demo" / "app.py")]
            server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            measure(server, address, arguments.requests, uploads, Path(folder))
        finally:
            server.terminate()
            server.wait()


def measure(server: subprocess.Popen[bytes], address: str, requests: int, uploads: Path, folder: Path) -> None:
    start = time.monotonic()
    while True:
        try:
            httpx.get(address, timeout=60)
            break
        except httpx.TransportError:
            if server.poll() is not None:
                raise SystemExit("the Space did not start: " + (folder / "log.txt").read_text()) from None
            time.sleep(0.1)
    print(f"from the start of the process to the first page: {time.monotonic() - start:.1f} s")

    examples = sorted((ROOT / "spaces_demo" / "examples").iterdir())
    client = Client(address, verbose=False, analytics_enabled=False, download_files=False)
    print("the first answer waits until the model is loaded, which begins when the page is there")
    for number in range(3):
        start = time.monotonic()
        client.predict(handle_file(examples[number]), api_name="/detect")
        print(f"from upload to answer, picture {number + 1}: {time.monotonic() - start:.2f} s")
    if not requests:
        return

    process, memory = psutil.Process(server.pid), []
    image = Image.open(examples[0])
    for number in range(requests):
        path = folder / "picture.jpg"
        image.rotate(number * 360 / requests).save(path)  # no two alike, as files of the same content are shared
        client.predict(handle_file(path), api_name="/detect")
        memory.append(process.memory_info().rss / 2**20)
    # The allocator fills its pools at first and takes another now and then; what is never freed needs more each time.
    quarter = max(requests // 4, 1)
    before, after = (sorted(part)[len(part) // 2] for part in (memory[quarter : 2 * quarter], memory[-quarter:]))
    grew = sum(later > earlier for earlier, later in pairwise(memory[2 * quarter :]))
    print(f"memory over {requests} requests, second and last quarter: {before:.0f} and {after:.0f} MB", end=" ")
    print(f"({100 * (after / before - 1):+.1f} %); in the second half it grew at {grew} requests")
    most = count_files(uploads)
    time.sleep(3 * KEEP_SECONDS)
    print(f"files kept: {most} after the last request, {count_files(uploads)} after another {3 * KEEP_SECONDS} s")


def count_files(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


if __name__ == "__main__":
    main()
