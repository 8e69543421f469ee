"""`info`, `convert`, `push`, `space`, `calibrate` and `train`, with tiny real models and a Hub on this machine."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, SpaceCard
from PIL import Image
from typer.testing import CliRunner

from diffusionad_pipe import (
    DiffusionADPipeline,
    DiffusionADUNet2DModel,
    NormGuidedOneStepScheduler,
    SegmentationUNet2DModel,
    open_image,
    paper_unet_config,
)
from diffusionad_pipe.cli import app
from diffusionad_pipe.hub.model_card import METRIC_NAMES, write_model_card, write_results
from tests.helpers.hub_server import HubServer
from tests.helpers.script_processes import DIFFUSIONAD, run_script

ROOT = Path(__file__).parents[2]
HAZELNUT = ROOT / "training" / "data" / "hazelnut_toy" / "hazelnut"
IMAGE = HAZELNUT / "test" / "colour" / "00.jpg"


def run(*arguments: object):
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "300"})


def refusal(*arguments: object, code: int = 2) -> str:
    result = run(*arguments)
    assert result.exit_code == code and isinstance(result.exception, SystemExit), repr(result.exception)
    return result.output


@pytest.fixture
def trained(tiny_pipeline: DiffusionADPipeline, tmp_path: Path) -> Path:
    """What a training run leaves: pipeline, card with results, configuration with paths, log, pictures, checkpoints."""
    folder = tmp_path / "screw"
    tiny_pipeline.register_to_config(image_threshold=0.25, pixel_threshold=0.5)
    tiny_pipeline.save_pretrained(folder)
    config = yaml.safe_load((ROOT / "pretrained" / "hazelnut" / "training_config.yaml").read_text())
    config |= {"train_data_dir": str(tmp_path / "screws"), "dataset_title": None, "output_dir": str(folder)}
    config |= {"pretrained_model_name_or_path": None}
    for name in ("log.jsonl", "samples/step-0000002.png", "checkpoint-1/model.safetensors", "unet/weights.bin"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"{}")
    (folder / "training_config.yaml").write_text(yaml.safe_dump(config))
    write_model_card(
        folder, config, image_count=28, held_out_count=4, best_step=2, hours=1.5, hardware="1 x 2 CPU threads",
        validation={"image_auroc": 0.9},
    )  # fmt: skip
    write_results(folder, {"screws": dict.fromkeys(METRIC_NAMES, 0.875)}, "| a |", "Measured by a test.")
    return folder


def test_a_card_is_complete(trained: Path) -> None:
    card = ModelCard.load(trained / "README.md")
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("diffusers", "image-segmentation", "cc-by-4.0")
    assert {"anomaly-detection", "diffusionad"} <= set(data.tags) and data.base_model is None
    assert {r.metric_type: r.metric_value for r in data.eval_results} == dict.fromkeys(METRIC_NAMES, 0.875)
    titles = re.findall("^## (.*)$", card.text, re.MULTILINE)
    assert titles == [
        "Use", "Training", "Thresholds", "Results", "Intended use", "Limits", "Licence and citation"
    ]  # fmt: skip
    assert "(samples/step-0000002.png)" in card.text and "24 good ones; 4 more held out" in card.text
    assert "0.2500 for the image score" in card.text and "Calibrate on 99 good pictures" in card.text
    assert "| data | screws |" in card.text and str(trained.parent) not in card.text
    assert "{{" not in card.content and "{%" not in card.content and "\n\n\n" not in card.text


def test_a_dataset_of_the_hub_is_named(trained: Path) -> None:
    config = yaml.safe_load((trained / "training_config.yaml").read_text())
    for name, expected in (("user/screws", ["user/screws"]), (str(trained), None)):
        config |= {"train_data_dir": None, "dataset_name": name}
        write_model_card(
            trained, config, image_count=28, held_out_count=4, best_step=9, hours=0, hardware="", validation={}
        )
        card = ModelCard.load(trained / "README.md")
        assert card.data.to_dict().get("datasets") == expected
        assert f"| data | {'user/screws' if expected else 'screw'} |" in card.text


def test_what_a_run_was_begun_with_is_named(trained: Path) -> None:
    config = yaml.safe_load((trained / "training_config.yaml").read_text())
    for base, on_the_hub in (("user/nuts", True), (str(trained), False)):
        config |= {"pretrained_model_name_or_path": base}
        write_model_card(
            trained, config, image_count=28, held_out_count=4, best_step=9, hours=0, hardware="", validation={}
        )
        card = ModelCard.load(trained / "README.md")
        assert card.data.base_model == ("user/nuts" if on_the_hub else None)
        assert f"the weights of `{'user/nuts' if on_the_hub else 'screw'}`" in card.text


def test_the_card_of_a_student_names_its_teacher(trained: Path) -> None:
    config = yaml.safe_load((trained / "training_config.yaml").read_text())
    config |= {
        "distill": "user/teacher",
        "license_note": None,
        "soft_edge_probability": 0.5,
        "thin_line_probability": 0.2,
    }
    write_model_card(
        trained, config, image_count=28, held_out_count=4, best_step=2, hours=0, hardware="", validation={}
    )
    card = ModelCard.load(trained / "README.md")
    assert card.data.base_model == "user/teacher" and "| taught by | `user/teacher`" in card.text
    assert "and of the model that taught them" in card.text and "20 % thin lines; 50 % with soft edges" in card.text
    assert "the picture,\nthe reconstruction, the anomaly map" in card.text


def clean_environment(hub_server: HubServer, home: Path) -> dict[str, str]:
    """That of somebody who has never loaded anything."""
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "OMP_NUM_THREADS") if name in os.environ}
    return kept | {
        "HOME": str(home), "HF_ENDPOINT": hub_server.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"
    }  # fmt: skip


def test_push_and_the_lines_of_the_card(trained: Path, hub_server: HubServer, tmp_path: Path) -> None:
    """What the card of a published model says works for somebody else."""
    result = run("push", trained, "user/screw", "--space")
    assert result.exit_code == 0, result.output
    assert 'published: DiffusionADPipeline.from_pretrained("user/screw")' in result.output

    published = hub_server.find_commit("user/screw", "main")
    names = {path.relative_to(published).as_posix() for path in published.rglob("*") if path.is_file()}
    assert {"README.md", "training_config.yaml", "log.jsonl", "samples/step-0000002.png"} <= names
    assert not any("checkpoint" in name or name.endswith(".bin") for name in names)
    for name in names:
        assert str(tmp_path).encode() not in (published / name).read_bytes(), name
    assert yaml.safe_load((published / "training_config.yaml").read_text())["train_data_dir"] == "screws"

    code = re.search("```python\n(.*?)```", (published / "README.md").read_text(), re.DOTALL)[1]
    assert 'from_pretrained("user/screw")' in code
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    open_image(IMAGE).save(elsewhere / "picture.jpg")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=elsewhere, env=clean_environment(hub_server, elsewhere), text=True,
        capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = DiffusionADPipeline.from_pretrained(trained)(open_image(elsewhere / "picture.jpg"))
    assert float(done.stdout.split()[0]) == pytest.approx(float(expected.anomaly_scores[0]), abs=1e-5)

    space = hub_server.find_commit("spaces/user/screw", "main")
    assert SpaceCard.load(space / "README.md").data.models == ["user/screw"]
    assert (space / "pretrained" / "screw" / "model_index.json").is_file() and (space / "app.py").is_file()


def test_push_without_a_card_writes_one(saved: Path, hub_server: HubServer) -> None:
    result = run("push", saved, "user/plain", "--private")
    assert result.exit_code == 0 and "hint: add a line `license: ...`" in result.output
    published = hub_server.find_commit("user/plain", "main")
    text = (published / "README.md").read_text()
    assert "is not known" in text and "None is set" in text and "is_anomalous" not in text
    assert DiffusionADPipeline.from_pretrained("user/plain").config.image_threshold is None


def test_push_says_what_is_wrong(saved: Path, hub_server: HubServer, tmp_path: Path) -> None:
    assert "model_index.json is missing" in refusal("push", tmp_path / "nothing", "user/model")
    assert "a/b/c" in refusal("push", saved, "a/b/c")
    hub_server.server.shutdown()
    hub_server.server.server_close()
    assert "was not published" in refusal("push", saved, "user/model", code=1)


def test_info(trained: Path, hub_server: HubServer) -> None:
    run("push", trained, "user/screw")
    for model in (trained, "user/screw"):
        result = run("info", model)
        assert result.exit_code == 0, result.output
        for text in (str(model), "million parameters", "float32", "32 x 32", "0.2500", "0.5000", "cc-by-4.0",
                     "screws; 24 good ones", "results on screws", "image AUROC 0.8750"):  # fmt: skip
            assert text in result.output, (text, result.output)


def test_info_on_what_is_hardly_known(
    saved: Path, hub_server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_server.publish("user/bare", saved)
    for model in (saved, "user/bare"):
        output = run("info", model).output
        assert output.count("not stated") == 2 and output.count("not calibrated") == 2
    assert "model_index.json is missing" in refusal("info", tmp_path)
    assert "the Hub has no such model, or it is private" in refusal("info", "user/nothing")
    for command in ("info", "space"):
        arguments = ("--output", tmp_path / "space") if command == "space" else ()
        assert "there is no folder '/nowhere'" in refusal(command, "/nowhere", *arguments)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "no folder has the name of the model, and the Hub cannot be reached" in refusal("info", "user/far")


def test_convert_there_and_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = DiffusionADUNet2DModel(**paper_unet_config(32, base_channels=32))
    pipe = DiffusionADPipeline(
        unet.eval(), SegmentationUNet2DModel(base_channels=4).eval(), NormGuidedOneStepScheduler()
    )
    first, model, second = tmp_path / "first.pt", tmp_path / "models" / "screw", tmp_path / "second.pt"
    pipe.save_single_file(first)
    result = run("convert", first, model)
    assert result.exit_code == 0 and "calibrate sets them" in result.output, result.output
    assert "converted from `first.pt`" in (model / "README.md").read_text()
    assert "DiffusionAD, screw" in (model / "README.md").read_text()
    assert run("convert", model, second).exit_code == 0
    (tmp_path / "data").mkdir()
    one, other = (torch.load(file, weights_only=False) for file in (first, second))
    for network in ("unet_model_state_dict", "seg_model_state_dict"):
        assert all(torch.equal(tensor, other[network][key]) for key, tensor in one[network].items())
    assert {path.name for path in model.parent.iterdir()} == {"screw", ".diffusionad"}

    assert "is there already" in refusal("convert", first, model)
    assert run("convert", first, model, "--overwrite").exit_code == 0
    assert "was not written by diffusionad convert" in refusal("convert", first, tmp_path / "data", "--overwrite")
    (model / "README.md").write_text("mine")
    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    assert "README.md is no longer what diffusionad convert wrote" in refusal("convert", first, model, "--overwrite")
    assert before == {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    assert "one must be a file" in refusal("convert", first, tmp_path / "third.pt")
    assert "one must be a file" in refusal("convert", model, tmp_path / "third")
    (tmp_path / "broken.pt").write_bytes(first.read_bytes()[:1000])
    assert "broken.pt cannot be read as a checkpoint" in refusal("convert", tmp_path / "broken.pt", tmp_path / "third")
    assert not (tmp_path / "third").exists()


def test_convert_of_what_the_authors_do_not_have(saved: Path, tmp_path: Path) -> None:
    assert "authors' format holds the paper's networks only" in refusal("convert", saved, tmp_path / "new.pt")


def test_a_space_folder_is_whole(trained: Path, tmp_path: Path) -> None:
    space = tmp_path / "spaces" / "screw"
    result = run("space", trained, "--output", space, "--examples", HAZELNUT / "test" / "good")
    assert result.exit_code == 0 and f"python {space / 'app.py'}" in result.output, result.output
    names = {path.relative_to(space).as_posix() for path in space.rglob("*")}
    assert {"app.py", "diffusionad_pipe/pipeline_diffusionad.py", "pretrained/screw/unet/config.json"} <= names
    assert {"pretrained/screw/README.md", "examples/1_04.jpg"} <= names
    assert not any("checkpoint-1" in name or "__pycache__" in name or name.endswith(".bin") for name in names)
    assert sum(name.startswith("examples/") for name in names) == 6
    assert {path.name for path in space.parent.iterdir()} == {"screw", ".diffusionad"}  # and no temporary folder

    lines = (space / "requirements.txt").read_text().splitlines()
    assert any(line.startswith("torch>=") for line in lines) and any(line.startswith("gradio>=") for line in lines)
    assert not any("diffusionad" in line or ";" in line or "pytest" in line for line in lines)
    data = SpaceCard.load(space / "README.md").data
    assert (data.title, data.sdk, data.app_file, data.models) == ("DiffusionAD: screw", "gradio", "app.py", None)
    assert data.to_dict()["python_version"] == "3.12"
    assert str(tmp_path) not in "".join(p.read_text("latin-1") for p in space.rglob("*.*") if p.is_file())


def test_a_space_from_the_hub_and_wrong_usage(trained: Path, hub_server: HubServer, tmp_path: Path) -> None:
    run("push", trained, "user/screw")
    result = run("space", "user/screw", "--output", tmp_path / "space")
    assert result.exit_code == 0 and "--examples" in result.output, result.output
    assert SpaceCard.load(tmp_path / "space" / "README.md").data.models == ["user/screw"]
    assert (tmp_path / "space" / "pretrained" / "screw" / "model_index.json").is_file()

    assert "is there already" in refusal("space", trained, "--output", tmp_path / "space")
    assert "model_index.json is missing" in refusal("space", tmp_path, "--output", tmp_path / "other")
    (tmp_path / "page.png").write_text("<html>")
    command = ("space", trained, "--output", tmp_path / "other", "--examples")
    assert "page.png: this is not a picture but an HTML page" in refusal(*command, tmp_path / "page.png")
    assert not (tmp_path / "other").exists()


def test_calibrate(trained: Path, tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.mkdir()
    for index, file in enumerate(sorted((HAZELNUT / "train" / "good").iterdir())[:24]):
        open_image(file).resize((40, 40)).save(good / f"{index:02d}.png")
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    result = run("calibrate", trained, good, "--false-positive-rate", 0.1)
    assert result.exit_code == 0 and "probability of at most 10 %" in result.output, result.output
    changed = {path.name for path, content in before.items() if path.read_bytes() != content}
    assert changed - {"written.jsonl"} == {"model_index.json", "README.md"}
    assert "24 good pictures" in (trained / "README.md").read_text()

    # Of 24 scores the 23rd smallest is the quantile: ceil(25 * 0.9).
    pipe = DiffusionADPipeline.from_pretrained(trained)
    images = [open_image(file) for file in sorted(good.iterdir())]
    scores = sorted(float(pipe(image).anomaly_scores[0]) for image in images)
    assert pipe.config.image_threshold == pytest.approx(scores[22], abs=1e-5)
    tensors = pipe.image_processor.preprocess(images, 32, 32)[0]
    maps = pipe(tensors, output_type="np").anomaly_maps
    # (24 share + 1) / 25 <= 0.1, and hardly less.
    assert 0.06 < (maps > pipe.config.pixel_threshold).mean() <= 0.0625

    assert "24 good pictures cannot promise" in refusal("calibrate", trained, good)
    assert "give at least 99, or --false-positive-rate 0.04 or more" in refusal("calibrate", trained, good)
    (good / "broken.png").write_bytes(b"")
    output = refusal("calibrate", trained, good, "--false-positive-rate", 0.1, code=1)
    assert "left out" in output and "broken.png: the file is empty" in output and "24 good pictures" in output
    # The same picture again, in another format, promises nothing more.
    open_image(good / "00.png").save(good / "again.bmp")
    output = refusal("calibrate", trained, good, "--false-positive-rate", 0.1, code=1)
    assert f"again.bmp: the same picture as {good / '00.png'}" in output and "24 good pictures" in output
    said = refusal("calibrate", trained, good, "--false-positive-rate", 1 / 26)
    assert "24 good pictures, besides 1 that cannot be read and 1 that are there twice, cannot promise" in said
    (good / "again.bmp").unlink()
    # Once they cannot be read, there are too few.
    assert "besides 1 that cannot be read" in refusal("calibrate", trained, good, "--false-positive-rate", 1 / 26)


def test_calibrate_says_what_is_wrong(saved: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "one.png")
    image = tmp_path / "one.png"
    assert "must lie between 0 and 1" in refusal("calibrate", saved, image, "--false-positive-rate", 1)
    assert "is no folder" in refusal("calibrate", "user/model", image)
    assert "there is no such file or folder" in refusal("calibrate", saved, tmp_path / "nothing")
    result = run("calibrate", saved, image, "--false-positive-rate", 0.5)
    assert result.exit_code == 0 and "its model card does not say so" in result.output
    index = json.loads((saved / "model_index.json").read_text())
    assert 0 < index["image_threshold"] < 1 and 0 < index["pixel_threshold"] < 1


def test_calibrate_lists_an_image_for_which_the_networks_give_nan(
    tiny_pipeline: DiffusionADPipeline, tmp_path: Path
) -> None:
    with torch.no_grad():  # overflows where a picture is not black
        tiny_pipeline.segmentation.encoder_blocks[0][0].weight[:, :3] = 3e38
    tiny_pipeline.save_pretrained(tmp_path / "model")
    for name, color in (("black", 0), ("white", 255)):
        Image.new("L", (40, 40), color).save(tmp_path / f"{name}.png")
    before = (tmp_path / "model" / "model_index.json").read_bytes()
    command = ("calibrate", tmp_path / "model", tmp_path / "white.png", "--false-positive-rate", 0.5)
    said = refusal(*command)
    assert "0 good pictures, besides 1 that cannot be read" in said and "white.png: the networks gave NaN" in said
    assert (tmp_path / "model" / "model_index.json").read_bytes() == before
    assert "left out: " in refusal(*command, tmp_path / "black.png", code=1)
    assert json.loads((tmp_path / "model" / "model_index.json").read_text())["image_threshold"] is not None


def test_thresholds_are_written_whole_or_not_at_all(trained: Path, tmp_path: Path) -> None:
    """With a limit of file sizes that the card does not keep, and the index does."""
    card = trained / "README.md"
    card.write_text(card.read_text() + "\n" + "A long card. " * 20_000)
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    Image.new("RGB", (40, 40)).save(tmp_path / "one.png")
    command = [DIFFUSIONAD, "calibrate", trained, tmp_path / "one.png", "--false-positive-rate", 0.5]
    done = run_script(command, limits={resource.RLIMIT_FSIZE: 100_000})
    assert done.returncode == 1 and f"{card} cannot be written (File too large)" in done.stderr, done
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


def test_train_refuses_before_it_launches() -> None:
    assert "--train_data_dir (or --dataset_name) is needed" in refusal("train", "--preset", "tiny")
    assert "secrets do not belong in arguments" in refusal("train", "--hub_token=hf_x")
