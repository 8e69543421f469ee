"""The training script, run as a user runs it, on real pictures at a tiny size."""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from diffusionad_pipe import DiffusionADPipeline, SegmentationUNet2DModel, open_image
from diffusionad_pipe.files.output_folder import OutputFolder
from diffusionad_pipe.runtime.acceleration import fastest_dtype
from diffusionad_pipe.training import run_folder
from diffusionad_pipe.training.launch import explain
from diffusionad_pipe.training.optimization import reference_schedule
from tests.helpers.hub_server import HubServer
from tests.helpers.script_processes import ScriptProcess, run_ranks, run_script
from tests.helpers.tiny_pipeline import build_tiny_pipeline
from tests.helpers.training_runs import (
    ENVIRONMENT,
    HAZELNUT,
    MODEL_ID,
    ROOT,
    TINY,
    assert_same_weights,
    command,
    launch,
    losses,
    run,
)


def assert_nearly_same_run(one: Path, other: Path) -> None:
    """Two runs with the same batches, however those were shared out."""
    for name in ("noise_loss", "mask_loss", "gradient_norm"):
        assert losses(one, name)[0] == pytest.approx(losses(other, name)[0], rel=1e-5), name
        assert losses(one, name) == pytest.approx(losses(other, name), rel=2e-3), name
    # Adam turns a gradient that is nearly zero into a full step of either sign, so a few weights may differ more.
    for network in ("unet", "segmentation"):
        file = f"last/{network}/diffusion_pytorch_model.safetensors"
        expected, found = load_file(other / file), load_file(one / file)
        difference = torch.cat([(value - found[key]).abs().flatten() for key, value in expected.items()])
        assert (difference > 1e-4).float().mean() < 1e-3 and difference.max() < 6 * 4e-4


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture(scope="module")
def trained(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "whole"
    result = launch(1, command(config, output))
    assert result.returncode == 0, result.stderr
    return output


def test_a_run_leaves_a_pipeline_that_decides(trained: Path) -> None:
    pipe = DiffusionADPipeline.from_pretrained(trained)
    assert 0 < pipe.config.image_threshold < 1 and 0 < pipe.config.pixel_threshold < 1
    assert pipe.scheduler.config.prediction_type == "sample" and pipe.unet.config.patch_size == 4
    output = pipe(open_image(next((HAZELNUT / "test" / "good").iterdir())))
    assert output.is_anomalous is not None and output.predicted_masks[0].size == (512, 512)


def test_a_run_is_documented(trained: Path) -> None:
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "noise_loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert all("validation_pixel_ap" in entry for entry in log if "noise_loss" not in entry)
    stored = yaml.safe_load((trained / "training_config.yaml").read_text())
    assert stored["max_train_steps"] == 6 and stored["output_dir"] == str(trained)
    # Six rows: picture, both one-step predictions, reconstruction, map, mask.
    assert Image.open(trained / "samples" / "step-0000006.png").size == (8 * 32, 6 * 32)
    assert Image.open(trained / "losses.png").size[0] > 500
    card = (trained / "README.md").read_text()
    assert "library_name: diffusers" in card and "24 good ones; 4 more held out" in card and str(ROOT) not in card
    assert sorted(p.name for p in trained.glob("checkpoint-*")) == ["checkpoint-0000004", "checkpoint-0000006"]


def test_the_best_weights_are_kept_and_the_last_beside_them(trained: Path) -> None:
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    scores = {
        entry["step"]: (entry["validation_image_auroc"] + entry["validation_pixel_ap"]) / 2
        for entry in log
        if "validation_pixel_ap" in entry
    }
    assert list(scores) == [3, 6]
    best, last = DiffusionADPipeline.from_pretrained(trained), DiffusionADPipeline.from_pretrained(trained / "last")
    same = torch.equal(best.unet.conv_out.weight, last.unet.conv_out.weight)
    assert same == (scores[6] > scores[3])


def test_a_run_starts_from_the_weights_of_a_pipeline_that_fit(trained: Path, config: Path, tmp_path: Path) -> None:
    flags = ["--pretrained_model_name_or_path", str(trained), "--block_out_channels", "32", "64"]
    still = ["--learning_rate", "0", "--segmentation_learning_rate", "0", "--max_train_steps", "1"]
    finished = run(command(config, tmp_path / "run", *flags, *still))
    assert finished.returncode == 0, finished.stderr
    equal = {}
    for network in ("unet", "segmentation"):
        file = f"{network}/diffusion_pytorch_model.safetensors"
        source, found = load_file(trained / file), load_file(tmp_path / "run" / file)
        fitting = [key for key, value in found.items() if key in source and source[key].shape == value.shape]
        assert all(torch.equal(source[key], found[key]) for key in fitting)
        equal[network] = len(fitting) / len(found)
    assert equal["segmentation"] == 1 and 0.2 < equal["unet"] < 1
    assert f"start from {trained}" in finished.stderr


def test_a_kill_in_the_middle_of_a_save_resumes_bit_exact(trained: Path, config: Path, tmp_path: Path) -> None:
    output = tmp_path / "killed"
    with ScriptProcess(command(config, output), ENVIRONMENT) as process:
        process.wait_for((output / "checkpoint-0000002").exists)
        writing, last = output / ".diffusionad" / "unfinished", output / "checkpoint-0000006"
        process.wait_for(lambda: any(writing.glob("*/*/*.safetensors")) or last.exists())
        process.send_signal(signal.SIGKILL)
        process.finish()
    result = run(command(config, output, "--resume_from_checkpoint", "latest"))
    assert result.returncode == 0 and "resumed from" in result.stderr, result.stderr
    assert_same_weights(trained, output)
    assert_same_weights(trained / "last", output / "last")
    assert not any((output / ".diffusionad" / "unfinished").glob("*/*"))


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    trained: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("checkpoint-0000004", "checkpoint-0000006"):
        shutil.copytree(trained / name, tmp_path / name)
    newest = tmp_path / "checkpoint-0000006"
    assert run_folder.find_checkpoint(tmp_path, "latest") == newest
    file = newest / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:100] if damage == "truncated" else content)
    assert run_folder.find_checkpoint(tmp_path, "latest").name == "checkpoint-0000004"
    assert "DAMAGED" in caplog.text and "model.safetensors" in caplog.text
    with pytest.raises(ValueError, match="is damaged"):
        run_folder.find_checkpoint(tmp_path, str(newest))


def test_resuming_from_the_checkpoint_before_a_damaged_one(trained: Path, config: Path, tmp_path: Path) -> None:
    output = tmp_path / "damaged"
    shutil.copytree(trained, output)
    (output / "checkpoint-0000006" / "optimizer.bin").write_bytes(b"")
    result = run(command(config, output, "--resume_from_checkpoint", "latest"))
    assert result.returncode == 0 and "DAMAGED" in result.stderr and "at step 4" in result.stderr, result.stderr
    assert_same_weights(trained, output)
    assert run_folder.find_checkpoint(output, "latest") == output / "checkpoint-0000006"
    aside = output / "checkpoint-0000006-set-aside-1"  # what was not as it was written is not deleted
    assert [path.name for path in aside.iterdir()] == ["optimizer.bin"] and str(aside) in result.stderr


@pytest.mark.parametrize("processes, batch, accumulation", [(1, 1, 4), pytest.param(2, 2, 1, marks=pytest.mark.slow)])
def test_accumulation_and_processes_equal_one_big_batch(
    trained: Path, config: Path, tmp_path: Path, processes: int, batch: int, accumulation: int
) -> None:
    output = tmp_path / "parts"
    flags = ["--train_batch_size", str(batch), "--gradient_accumulation_steps", str(accumulation)]
    arguments = command(config, output, *flags)
    result = launch(processes, arguments) if processes > 1 else run(arguments)
    assert result.returncode == 0, result.stderr
    assert_nearly_same_run(output, trained)


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_sharding_is_refused(config: Path, tmp_path: Path, name: str) -> None:
    result = run_script(command(config, tmp_path / "sharded"), ENVIRONMENT | {f"ACCELERATE_USE_{name}": "true"})
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1, result.stderr
    assert "is not supported: launch with --multi_gpu" in result.stderr and not (tmp_path / "sharded").exists()


def test_resuming_another_folders_checkpoint_leaves_a_pipeline(trained: Path, config: Path, tmp_path: Path) -> None:
    """Even where no later step is as good as one before the checkpoint."""
    output, checkpoint = tmp_path / "continued", tmp_path / "checkpoint-0000004"
    shutil.copytree(trained / checkpoint.name, checkpoint)
    state = torch.load(checkpoint / "custom_checkpoint_2.pkl", weights_only=True)
    torch.save(state | {"best_score": 3.0, "best_step": 3}, checkpoint / "custom_checkpoint_2.pkl")
    (checkpoint / run_folder.MANIFEST).write_text(json.dumps(run_folder._checksums(checkpoint)))
    result = run(command(config, output, "--resume_from_checkpoint", str(checkpoint)))
    assert result.returncode == 0 and "of step 6" in result.stderr, result.stderr
    assert_same_weights(trained / "last", output)


def test_sigterm_saves_and_leaves(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "stopped"
    flags = ["--max_train_steps", "100000", "--checkpointing_steps", "100000"]
    with ScriptProcess(command(config, output, *flags), ENVIRONMENT) as process:
        process.wait_for((output / "log.jsonl").exists)
        process.send_signal(signal.SIGTERM)
        result = process.finish()
    assert result.returncode == 128 + signal.SIGTERM and "go on with --resume_from_checkpoint latest" in result.stderr
    assert len(run_folder.checkpoints(output)) == 1 and run_folder.find_checkpoint(output, "latest")


@pytest.mark.slow
def test_a_signal_to_all_processes_saves_and_leaves(config: Path, tmp_path: Path) -> None:
    """As systemd and Slurm send it: the workers that make synthetic anomalies get it too."""
    output = tmp_path / "stopped"
    flags = ["--max_train_steps", "100000", "--checkpointing_steps", "100000", "--dataloader_num_workers", "1"]
    with ScriptProcess(command(config, output, *flags), ENVIRONMENT, own_session=True) as process:
        process.wait_for((output / "log.jsonl").exists)
        os.killpg(process.pid, signal.SIGTERM)
        result = process.finish()
    assert result.returncode == 128 + signal.SIGTERM and "stopped at step" in result.stderr, result.stderr
    assert run_folder.find_checkpoint(output, "latest")


@pytest.mark.slow
def test_ctrl_c_ends_an_upload_that_hangs(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "finished"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = subprocess.Popen(
            [sys.executable, *command(config, output, "--max_train_steps", "1", "--push_to_hub", *MODEL_ID)],
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT | {"HF_ENDPOINT": address, "HF_TOKEN": "hf_none", "HF_HUB_DISABLE_XET": "1"},
        )
        connection, _ = silent.accept()
        with connection:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
    assert process.returncode == 130 and (output / "README.md").exists()


def test_steps_without_a_finite_gradient_are_skipped_and_end_the_run(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "diverged"
    flags = ["--learning_rate", "1e30", "--max_grad_norm", "0", "--max_skipped_steps", "3", "--max_train_steps", "50"]
    result = run(command(config, output, *flags, "--checkpointing_steps", "1", "--validation_steps", "100"))
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert "3 steps in a row had no finite gradient" in result.stderr and "Lower --learning_rate" in result.stderr
    assert losses(output, "skipped_steps")[-1] == 2  # the third ended the run
    assert run_folder.find_checkpoint(output, "latest")


def test_a_full_disk_ends_with_one_sentence_and_keeps_what_was_there(config: Path, tmp_path: Path) -> None:
    """No file may be larger than the segmentation network but smaller than the UNet: writing stops in the middle."""
    output = tmp_path / "full"
    result = run(command(config, output), {resource.RLIMIT_FSIZE: 600_000})
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert "free some space and --resume_from_checkpoint latest" in result.stderr
    assert not any((output / ".diffusionad" / "unfinished").glob("*/*")) and not run_folder.checkpoints(output)


def test_a_full_disk_keeps_both_networks_of_the_pipeline_that_was_there(tmp_path: Path) -> None:
    """The new UNet can still be written and the segmentation network cannot: the two would not fit together."""
    output, before = tmp_path / "best", tmp_path / "before"
    pipe = build_tiny_pipeline()
    pipe.register_modules(segmentation=SegmentationUNet2DModel(base_channels=8))
    run_folder.save_pipeline(pipe, OutputFolder(output, "train"))
    shutil.copytree(output, before)
    size = (output / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    script = tmp_path / "save.py"
    script.write_text(
        "import sys\n"
        "import torch\n"
        "from diffusionad_pipe import DiffusionADPipeline\n"
        "from diffusionad_pipe.files.output_folder import OutputFolder\n"
        "from diffusionad_pipe.training import run_folder\n"
        "from diffusionad_pipe.training.launch import explain\n"
        "pipe = DiffusionADPipeline.from_pretrained(sys.argv[1])\n"
        "torch.nn.init.zeros_(pipe.unet.conv_out.weight)\n"
        "try:\n"
        "    run_folder.save_pipeline(pipe, OutputFolder(sys.argv[2], 'train'))\n"
        "except Exception as error:\n"
        "    sys.exit(explain(error))\n"
    )
    result = run([str(script), str(before), str(output)], {resource.RLIMIT_FSIZE: size + 1000})
    assert result.returncode == 1 and "the disk is full" in result.stderr, result.stderr
    assert_same_weights(before, output)
    result = run([str(script), str(before), str(output)])
    assert result.returncode == 0, result.stderr
    assert not DiffusionADPipeline.from_pretrained(output).unet.conv_out.weight.any()
    names = [".diffusionad", "model_index.json", "scheduler", "segmentation", "unet"]
    assert sorted(path.name for path in output.iterdir()) == names


@pytest.mark.slow
def test_out_of_memory_says_what_to_lower(config: Path, tmp_path: Path) -> None:
    flags = ["--train_batch_size", "3000", "--resolution", "256"]  # their pictures alone take 2.4 GB, twice
    result = run(command(config, tmp_path / "big", *flags), {resource.RLIMIT_AS: 6_000_000_000})
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert "out of memory: lower --train_batch_size" in result.stderr


@pytest.mark.slow
def test_a_dead_worker_ends_with_one_sentence(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "worker"
    flags = ["--max_train_steps", "100000", "--dataloader_num_workers", "1"]
    with ScriptProcess(command(config, output, *flags), ENVIRONMENT) as process:
        process.wait_for((output / "log.jsonl").exists)
        (worker,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(worker), signal.SIGKILL)
        result = process.finish()
    assert result.returncode == 1 and "Traceback" not in result.stderr.splitlines()[-1], result.stderr
    assert "a worker that makes synthetic anomalies died" in result.stderr
    assert "lower --dataloader_num_workers" in result.stderr


@pytest.mark.parametrize(
    "error", [RuntimeError("DataLoader worker (pid 1) is killed"), ConnectionResetError(), EOFError()]
)
def test_a_worker_may_die_while_it_hands_a_batch_over(error: Exception) -> None:
    assert "a worker that makes synthetic anomalies died" in str(explain(error))


@pytest.mark.parametrize("said", ["CUDA error: out of memory", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"])
def test_cudas_libraries_say_in_their_own_ways_that_memory_is_out(said: str) -> None:
    assert "out of memory: lower --train_batch_size" in str(explain(RuntimeError(said)))


def test_tensorboard_gets_losses_and_images(config: Path, tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = ["--report_to", "tensorboard", "--max_train_steps", "2", "--validation_steps", "2"]
    result = run(command(config, tmp_path / "tracked", *flags))
    assert result.returncode == 0, result.stderr
    events = event_accumulator.EventAccumulator(str(tmp_path / "tracked" / "diffusionad"))
    events.Reload()
    assert [event.step for event in events.Scalars("mask_loss")] == [1, 2]
    image = events.Images("held_out")[0]
    assert (image.width, image.height) == Image.open(tmp_path / "tracked" / "samples" / "step-0000002.png").size
    folder = OutputFolder(tmp_path / "tracked", "train")
    for path in (tmp_path / "tracked" / "diffusionad").rglob("*"):
        assert path.is_dir() or folder.owns(path.relative_to(folder.path).as_posix())


def test_bfloat16_where_the_processor_has_it_else_a_warning(config: Path, tmp_path: Path) -> None:
    has_it = fastest_dtype("cpu") == torch.bfloat16
    one_step = ["--max_train_steps", "1", "--mixed_precision"]
    assert run(command(config, tmp_path / "auto", *one_step, "auto")).returncode == 0
    used = yaml.safe_load((tmp_path / "auto" / "training_config.yaml").read_text())["mixed_precision"]
    assert used == ("bf16" if has_it else "no")
    result = run(command(config, tmp_path / "told", *one_step, "bf16"))
    assert result.returncode == 0 and ("emulates bfloat16" in result.stderr) != has_it


@pytest.mark.slow
def test_a_run_is_pushed_to_the_hub(config: Path, tmp_path: Path, hub_server: HubServer) -> None:
    output = tmp_path / "pushed"
    flags = ["--max_train_steps", "1", "--push_to_hub", *MODEL_ID]
    environment = ENVIRONMENT | {"HF_ENDPOINT": hub_server.url, "HF_TOKEN": "hf_none", "HF_HUB_DISABLE_XET": "1"}
    result = subprocess.run(
        [sys.executable, *command(config, output, *flags)], capture_output=True, text=True, timeout=300,
        env=environment, check=False,
    )  # fmt: skip
    assert result.returncode == 0 and "uploaded to user/model" in result.stderr, result.stderr
    pipe = DiffusionADPipeline.from_pretrained("user/model")
    assert pipe.config.image_threshold == DiffusionADPipeline.from_pretrained(output).config.image_threshold
    files = {path.name: path for path in hub_server.find_commit("user/model", "main").rglob("*") if path.is_file()}
    assert {"README.md", "training_config.yaml", "losses.png", "step-0000001.png"} <= files.keys()
    assert yaml.safe_load(files["training_config.yaml"].read_text())["train_data_dir"] == "hazelnut"
    assert not any(name.startswith("random_states") for name in files)  # no checkpoints
    for file in files.values():
        assert str(tmp_path).encode() not in file.read_bytes() and str(ROOT).encode() not in file.read_bytes(), file


@pytest.mark.parametrize(
    "flags, cause",
    [
        (["--train_data_dir", "no/such/folder"], "not a folder"),
        (["--texture_dir", "no/such/folder"], "no/such/folder"),
        (["--resume_from_checkpoint", "no/such/checkpoint"], "no checkpoint to resume from: no/such/checkpoint"),
        (["--block_out_channels", "30", "60"], "divisible"),
        (["--resolution", "40"], "multiple of 32"),
        (["--foreground", "folder"], "24 of 28 pictures have no matte"),
        (["--mixed_precision", "fp16"], "fp16 needs a GPU, and there is none: use bf16"),
    ],
)
def test_wrong_settings_end_with_one_sentence(config: Path, tmp_path: Path, flags: list[str], cause: str) -> None:
    if "24 of 28" in cause:
        data = tmp_path / "hazelnut"
        shutil.copytree(HAZELNUT / "train", data / "train")
        (data / "thresh").mkdir()
        shutil.copytree(HAZELNUT / "train" / "good", data / "thresh" / "good")
        for image in sorted((data / "thresh" / "good").iterdir())[4:]:
            image.unlink()
        flags = [*flags, "--train_data_dir", str(data)]
    result = run(command(config, tmp_path / "wrong", *flags))
    assert result.returncode == 1 and cause in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.splitlines()[-1].startswith(("Error:", "Add them"))


def test_the_reference_schedule_of_the_segmentation_network() -> None:
    """The authors' CosineAnnealingLR with T_max 10 is stepped every iteration: 1 → 0 → 1 in twenty steps."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1e-5)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    for step in range(25):
        assert reference_schedule(step) * 1e-5 == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_an_occupied_folder_and_changed_settings(config: Path, trained: Path, tmp_path: Path) -> None:
    result = run(command(config, trained))
    assert result.returncode == 1 and "is not empty" in result.stderr
    assert (trained / "model_index.json").exists()
    flags = ["--resume_from_checkpoint", "latest", "--seed", "3", "--logging_steps", "2"]
    result = run(command(config, trained, *flags))
    assert result.returncode == 1 and "seed: 0 then, 3 now" in result.stderr and "logging_steps" not in result.stderr
    assert yaml.safe_load((trained / "training_config.yaml").read_text())["seed"] == 0


def test_overwriting_takes_a_run_and_its_images(config: Path, trained: Path, tmp_path: Path) -> None:
    """Neither a typo nor a folder that is no run costs anything."""
    others = tmp_path / "pictures"
    others.mkdir()
    (others / "mine.txt").write_text("kept")
    result = run(command(config, others, "--overwrite"))
    assert result.returncode == 1 and "is no folder of a run" in result.stderr
    assert (others / "mine.txt").read_text() == "kept"

    old = Path(shutil.copytree(trained, tmp_path / "old"))
    result = run(command(config, old, "--overwrite", "--train_data_dir", str(tmp_path / "nothing")))
    assert result.returncode == 1 and (old / "model_index.json").is_file() and list(old.glob("checkpoint-*"))
    result = run(command(config, old, "--overwrite", "--max_train_steps", "1", "--validation_steps", "1"))
    assert result.returncode == 0, result.stderr
    assert [path.name for path in old.glob("checkpoint-*")] == ["checkpoint-0000001"]
    assert {json.loads(line)["step"] for line in (old / "log.jsonl").read_text().splitlines()} == {1}


def test_another_number_of_processes_is_refused(config: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    for result in run_ranks(command(config, tmp_path / "run", "--resume_from_checkpoint", "latest"), 2, ENVIRONMENT):
        assert result.returncode == 1 and "written by 1 processes, here are 2" in result.stderr, result.stderr


def test_unreadable_images_are_left_out_up_to_a_share(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree(HAZELNUT / "train" / "good", folder)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    flags = ["--train_data_dir", str(folder), "--max_train_steps", "1", "--validation_steps", "1"]
    result = run(command(config, tmp_path / "most", *flags))
    assert result.returncode == 0 and "left out" in result.stderr and "broken.png" in result.stderr, result.stderr
    result = run(command(config, tmp_path / "none", *flags, "--max_unreadable", "0.01"))
    assert result.returncode == 1 and "1 of 29 good pictures could not be read" in result.stderr, result.stderr


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_datasets(config: Path, tmp_path: Path, streaming: bool) -> None:
    import datasets

    from diffusionad_pipe.training.images import read_good_images

    paths = sorted((HAZELNUT / "train" / "good").iterdir())[:4] + sorted((HAZELNUT / "test" / "colour").iterdir())[:2]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["good", "bad"])})
    rows = {"image": [str(path) for path in paths], "label": [0] * 4 + [1] * 2}
    table = datasets.Dataset.from_dict(rows, features=features)
    (tmp_path / "parquet").mkdir()
    table.to_parquet(tmp_path / "parquet" / "train.parquet")
    images = read_good_images(None, 32, dataset_name=str(tmp_path / "parquet"), streaming=streaming)
    assert images.pixels.shape == (4, 3, 32, 32)
    assert torch.equal(images.pixels, read_good_images(str(HAZELNUT), 32).pixels[:4])


def test_help_explains() -> None:
    result = run([str(ROOT / "training" / "train.py"), "--help"])
    assert result.returncode == 0 and "share of the good pictures held out" in result.stdout
