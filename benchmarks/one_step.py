"""One-step, norm-guided reconstruction against iterative denoising with the same network.

    python benchmarks/one_step.py --model pretrained/hazelnut --images training/data/hazelnut_toy/hazelnut/test/good

Both start from the same pictures noised to the large scale t_b. The one step calls the UNet once for both scales; the
classical way walks down from t_b with diffusers' DDPMScheduler (every timestep) or DDIMScheduler (every 20th). Times
are taken in turns, A B C A B C, and the medians reported; the error is the mean absolute difference to the good
picture, in grey levels of 255.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DDIMScheduler, DDPMScheduler
from tqdm.auto import tqdm

from diffusionad_pipe import DiffusionADPipeline, find_images, open_image
from diffusionad_pipe.files.single_files import write_file


@torch.inference_mode()
def one_step(pipe: DiffusionADPipeline, images: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Norm-guided reconstruction `[B, 3, H, W]` and the number of UNet calls, counted for B pictures each."""
    config = pipe.scheduler.config
    timesteps = torch.tensor([config.small_timestep, config.large_timestep], device=images.device)
    timesteps = timesteps.repeat_interleave(len(images))
    noised = pipe.scheduler.add_noise(torch.cat([images, images]), torch.cat([noise, noise]), timesteps)
    return pipe.scheduler.step(pipe.unet(noised, timesteps).sample, timesteps, noised).prev_sample, 2


@torch.inference_mode()
def iterative(
    pipe: DiffusionADPipeline, images: torch.Tensor, noise: torch.Tensor, scheduler_class: Any, grid: int
) -> tuple[torch.Tensor, int]:
    """Reconstruction by walking down from t_b over a grid of `grid` timesteps of the whole schedule."""
    scheduler = scheduler_class.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(grid)
    timesteps = [t for t in scheduler.timesteps if t <= pipe.scheduler.config.large_timestep]
    generator = torch.Generator(images.device).manual_seed(0)
    sample = scheduler.add_noise(images, noise, timesteps[0][None])
    for timestep in tqdm(timesteps, desc=f"{scheduler_class.__name__}, grid of {grid}", leave=False):
        model_output = pipe.unet(sample, timestep.to(images.device)).sample
        sample = scheduler.step(model_output, timestep, sample, generator=generator).prev_sample
    return sample, len(timesteps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pretrained/hazelnut")
    parser.add_argument("--images", default="training/data/hazelnut_toy/hazelnut/test/good")
    parser.add_argument("--count", type=int, default=2, help="pictures, in one batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args()

    pipe = DiffusionADPipeline.from_pretrained(arguments.model).to(PartialState().device)
    if pipe.scheduler.config.distilled:
        parser.error(f"{arguments.model} is distilled: give its teacher, whose steps are compared")
    size = pipe.config.image_size
    files = find_images(arguments.images)[: arguments.count]
    images, _ = pipe.image_processor.preprocess([open_image(file) for file in files], size, size)
    images = images.to(pipe.device)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(pipe.device)

    methods = {
        "one step, norm-guided": lambda: one_step(pipe, images, noise),
        "DDIM, grid of 50": lambda: iterative(pipe, images, noise, DDIMScheduler, 50),
        "DDPM, grid of 1000": lambda: iterative(pipe, images, noise, DDPMScheduler, 1000),
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    results: dict[str, dict[str, float]] = {}
    one_step(pipe, images, noise)  # the first call sets up the kernels
    for _ in range(arguments.rounds):
        for name, method in methods.items():
            started = time.perf_counter()
            reconstruction, calls = method()
            if images.is_cuda:
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
            error = 255 * (reconstruction.clamp(0, 1) - images).abs().mean().item()
            results[name] = {"unet_passes": calls, "mean_absolute_error": error}
    fastest = statistics.median(seconds["one step, norm-guided"])
    print(f"{len(images)} pictures of {size} px, {torch.get_num_threads()} threads, medians of {arguments.rounds}\n")
    print(
        "| reconstruction | UNet passes a picture | seconds a picture | times one step | mean absolute error of 255 |"
    )
    print("|---|---|---|---|---|")
    for name, result in results.items():
        median = statistics.median(seconds[name])
        result |= {"seconds_per_image": median / len(images), "times_one_step": median / fastest}
        print(
            f"| {name} | {result['unet_passes']} | {result['seconds_per_image']:.3f} | "
            f"{result['times_one_step']:.1f} | {result['mean_absolute_error']:.2f} |"
        )
    if arguments.output:
        text = json.dumps(results, indent=2) + "\n"
        write_file(arguments.output, lambda path: path.write_text(text, encoding="utf-8"), "benchmark")


if __name__ == "__main__":
    main()
