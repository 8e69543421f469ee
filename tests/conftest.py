"""Fixtures shared by all tests: a tiny pipeline, and a Hugging Face Hub on this machine."""

import os

os.environ.pop("HF_HUB_OFFLINE", None)
os.environ.pop("HF_ENDPOINT", None)
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"  # tests look for no credentials and send none
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # two workers have a core each

import base64  # noqa: E402
import hashlib  # noqa: E402
import json  # noqa: E402
import shutil  # noqa: E402
import threading  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402
from urllib.parse import unquote, urlsplit  # noqa: E402

import huggingface_hub  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from diffusionad_pipe import (  # noqa: E402
    DiffusionADImageProcessor,
    DiffusionADPipeline,
    DiffusionADUNet2DModel,
    NormGuidedOneStepScheduler,
    SegmentationUNet2DModel,
)

pytest_plugins = ["run_guard"]

# Two workers take file after file: begun last, one of these would keep a single worker busy at the end.
LONG_FILES = ["test_wheel", "test_training", "test_space", "test_space_browser", "test_export", "test_readme"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    names = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: names.get(item.path.stem, len(names)))


def randomize(network: nn.Module) -> None:
    """Random numbers where a new network has zeros or ones, so that outputs vary and no tensor can be left out."""
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point() and tensor.unique().numel() == 1:
                tensor.add_(torch.randn_like(tensor), alpha=0.1)


@pytest.fixture
def tiny_pipeline() -> DiffusionADPipeline:
    """A pipeline of a few thousand parameters that works at 32 pixels."""
    return build_tiny_pipeline()


def build_tiny_pipeline() -> DiffusionADPipeline:
    """What the fixture `tiny_pipeline` returns, for fixtures of a wider scope."""
    torch.manual_seed(0)
    unet = DiffusionADUNet2DModel(
        sample_size=32, block_out_channels=(8, 8), attention=(False, True), num_attention_heads=2, norm_num_groups=4
    )
    segmentation = SegmentationUNet2DModel(base_channels=4)
    randomize(unet)
    randomize(segmentation)
    return DiffusionADPipeline(unet.eval(), segmentation.eval(), NormGuidedOneStepScheduler(), image_size=32)


@pytest.fixture
def tiny_segformer() -> nn.Module:
    """transformers' SegFormer as a segmentation network."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        num_channels=6,
        num_labels=1,
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 8],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 1],
        mlp_ratios=[1, 1],
        decoder_hidden_size=8,
        initializer_range=0.3,
    )
    segformer = transformers.SegformerForSemanticSegmentation(config)
    randomize(segformer)
    return segformer.eval()


class HubServer:
    """As much of the Hub's API as downloads and uploads of models, and uploads of Spaces, need.

    Args:
        root: an empty folder; every commit of a repository becomes a folder `root/user/model/<commit>`, or
            `root/spaces/user/name/<commit>`.

    Attributes:
        requests: method and path of every request so far.
    """

    def __init__(self, root: Path):
        self.root = root
        self.refs: dict[str, dict[str, str]] = {}  # repository -> branch -> commit
        self.requests: list[tuple[str, str]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (HubRequestHandler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def commit(self, repo: str, files: dict[str, bytes], branch: str = "main", keep: bool = False) -> str:
        """Add a commit with these files, and those of the branch's last one if they are to be kept."""
        branches = self.refs.setdefault(repo, {})
        parent = self.root / repo / branches.get(branch, "none")
        commit = hashlib.sha1(f"{repo} {branch} {parent.name} {sorted(files)}".encode()).hexdigest()
        folder = self.root / repo / commit
        if keep and parent.is_dir():
            shutil.copytree(parent, folder)
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        branches[branch] = commit
        return commit

    def publish(self, repo: str, source: Path, branch: str = "main") -> str:
        """Add a commit that holds just the files of a folder."""
        files = {str(p.relative_to(source)): p.read_bytes() for p in sorted(source.rglob("*")) if p.is_file()}
        return self.commit(repo, files, branch)

    def find_commit(self, repo: str, revision: str) -> Path | None:
        """The folder of a branch or a commit."""
        folder = self.root / repo / self.refs.get(repo, {}).get(revision, revision)
        return folder if folder.is_dir() else None

    @property
    def downloaded(self) -> set[str]:
        """Names of the files whose content was requested."""
        paths = (path for method, path in self.requests if method == "GET" and "/resolve/" in path)
        return {path.split("/resolve/")[1].partition("/")[2] for path in paths}


class HubRequestHandler(BaseHTTPRequestHandler):
    """Answers the requests of huggingface_hub."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests.append((self.command, path))
        if path.startswith(("api/models/", "api/spaces/")):
            user, model, *rest = path.split("/", 2)[2].split("/")
            user = f"spaces/{user}" if path.startswith("api/spaces/") else user
            # /api/models/user/model[/revision/main] and /api/models/user/model/tree/main
            what, revision = (rest[0], rest[1]) if len(rest) > 1 else ("revision", "main")
            if folder := self.find(f"{user}/{model}", revision):
                files = sorted(p for p in folder.rglob("*") if p.is_file())
                names = [p.relative_to(folder).as_posix() for p in files]
                if what == "tree":
                    entries = [{"type": "file", "path": name} for name in names]
                    for entry, file in zip(entries, files, strict=True):
                        entry |= {"size": file.stat().st_size, "oid": self.etag(file)}
                    self.answer(entries)
                else:
                    siblings = [{"rfilename": name} for name in names]
                    self.answer({"id": f"{user}/{model}", "sha": folder.name, "siblings": siblings, "tags": []})
        elif "/resolve/" in path:
            repo, _, rest = path.partition("/resolve/")
            revision, _, name = rest.partition("/")
            if folder := self.find(repo, revision):
                self.send_file(folder, folder / name)
        else:
            self.answer({"error": f"{path} is not known here"}, 404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif path == "api/repos/create":
            payload = json.loads(body)
            repo = f"{payload['organization'] or 'user'}/{payload['name']}"
            repo = f"spaces/{repo}" if payload.get("type") == "space" else repo
            exists = repo in self.hub.refs
            if not exists:
                self.hub.commit(repo, {".gitattributes": b""})
            self.answer({"url": f"{self.hub.url}/{repo}"}, 409 if exists else 200)
        elif "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self.answer({"files": modes})
        elif "/commit/" in path:
            repo, _, branch = path.removeprefix("api/").removeprefix("models/").partition("/commit/")
            lines = [json.loads(line) for line in body.splitlines()]
            values = [line["value"] for line in lines if line["key"] == "file"]
            files = {value["path"]: base64.b64decode(value["content"]) for value in values}
            commit = self.hub.commit(repo, files, branch, keep=True)
            self.answer({"commitOid": commit, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit}"})
        else:
            self.answer({"error": f"{path} is not known here"}, 404)

    def find(self, repo: str, revision: str) -> Path | None:
        folder = self.hub.find_commit(repo, revision)
        if folder is None:
            missing = "RevisionNotFound" if repo in self.hub.refs else "RepoNotFound"
            self.answer({"error": missing}, 404, {"X-Error-Code": missing})
        return folder

    def send_file(self, folder: Path, path: Path) -> None:
        commit = {"X-Repo-Commit": folder.name}
        if not path.is_file():
            self.answer({"error": "EntryNotFound"}, 404, {"X-Error-Code": "EntryNotFound", **commit})
            return
        content, status, headers = path.read_bytes(), 200, {"ETag": f'"{self.etag(path)}"', **commit}
        if wanted := self.headers.get("Range"):  # bytes=100-, when a download goes on
            start, total = int(wanted.removeprefix("bytes=").split("-")[0]), len(content)
            content, status = content[start:], 206
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        self.answer(content, status, headers)

    def etag(self, path: Path) -> str:
        content = path.read_bytes()
        return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on this machine with which huggingface_hub, and all that stands on it, speaks during a test."""
    hub = HubServer(tmp_path / "hub")
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf_home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf_home" / "hub"))
    # create_repo and upload_folder are methods of one object that read the endpoint when it was imported.
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture
def processor() -> DiffusionADImageProcessor:
    return DiffusionADImageProcessor()


@pytest.fixture
def saved(tiny_pipeline: DiffusionADPipeline, tmp_path: Path) -> Path:
    """The folder of the saved tiny pipeline."""
    tiny_pipeline.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def saved_segformer(tiny_pipeline: DiffusionADPipeline, tiny_segformer: nn.Module, tmp_path: Path) -> Path:
    """The folder of the tiny pipeline with a SegFormer, saved."""
    tiny_pipeline.register_modules(segmentation=tiny_segformer)
    tiny_pipeline.save_pretrained(tmp_path / "segformer")
    return tmp_path / "segformer"


@pytest.fixture
def assert_same() -> Callable[[DiffusionADPipeline, DiffusionADPipeline], None]:
    """Checks that two pipelines have the same weights, bit by bit, the same config and the same outputs."""

    def check(first: DiffusionADPipeline, second: DiffusionADPipeline) -> None:
        for name in ("unet", "segmentation"):
            one, other = getattr(first, name).state_dict(), getattr(second, name).state_dict()
            assert one.keys() == other.keys()
            for key, tensor in one.items():
                assert tensor.dtype == other[key].dtype and torch.equal(tensor, other[key]), key
        for one, other in ((first, second), (first.scheduler, second.scheduler)):
            one, other = ({k: v for k, v in c.config.items() if not k.startswith("_")} for c in (one, other))
            assert one == other
        pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        one, other = first(pictures, output_type="pt"), second(pictures, output_type="pt")
        assert one.anomaly_maps.std() > 1e-3  # a constant map would compare equal whatever was loaded
        for field in ("anomaly_maps", "anomaly_scores", "reconstructions"):
            assert torch.equal(one[field], other[field]), field

    return check


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, driven by Playwright."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()
