"""Accuracy against speed of trained models, in a table and a chart.

    python benchmarks/presets.py runs/tiny runs/small runs/base --data training/data/hazelnut_toy/hazelnut \\
        --chart presets.png

Each model is timed from picture file to map, streaming the test pictures in batches, in turns with the others, in
float32 and bfloat16; its accuracy is measured on the same pictures. Nothing is chosen by it.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from accelerate import PartialState
from measure import count_flops, in_turns, machine, print_table, write_json

from diffusionad_pipe import DiffusionADPipeline
from diffusionad_pipe.evaluation import load_test_pictures
from diffusionad_pipe.metrics import evaluate_maps

METRICS = ("image_auroc", "pixel_auroc", "pixel_ap", "au_pro_0.30")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def draw_chart(rows: list[dict[str, Any]], metric: str, path: Path) -> None:
    """Milliseconds a picture, on a logarithmic scale, against a metric."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for dtype, marker in zip(DTYPES, "os"):
        points = [row for row in rows if row["dtype"] == dtype]
        axes.plot([1000 * p["seconds"] for p in points], [p[metric] for p in points], marker, label=dtype)
        for point in points:
            at = (1000 * point["seconds"], point[metric])
            axes.annotate(point["model"], at, (5, 5), textcoords="offset points", fontsize=9)
    axes.set(xscale="log", xlabel="milliseconds a picture, file to map", ylabel=metric.replace("_", " "))
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders of saved pipelines")
    parser.add_argument("--data", default="training/data/hazelnut_toy/hazelnut", help="a dataset with one category")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--pictures", type=int, help="use only so many test pictures, spread over all")
    parser.add_argument("--chart", type=Path, help="also draw the chart into this PNG file")
    parser.add_argument("--metric", choices=METRICS, default="pixel_ap", help="of the chart")
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args()

    device = PartialState().device
    test = load_test_pictures(arguments.data, None)[0]
    chosen = range(0, len(test), -(-len(test) // (arguments.pictures or len(test))))
    pipes = {}
    for model in arguments.models:
        for dtype in DTYPES:
            pipe = DiffusionADPipeline.from_pretrained(model, dtype=DTYPES[dtype]).to(device)
            pipe.set_progress_bar_config(disable=True)
            pipes[Path(model).name, dtype] = pipe

    def stream(pipe: DiffusionADPipeline) -> Callable[[], list[Any]]:
        return lambda: list(
            pipe.stream((test.picture(i) for i in chosen), batch_size=arguments.batch_size, output_type="np")
        )

    timings = in_turns({"|".join(key): stream(pipe) for key, pipe in pipes.items()}, arguments.rounds, device)
    rows: list[dict[str, Any]] = []
    for (model, dtype), pipe in pipes.items():
        outputs = stream(pipe)()
        maps = [output.anomaly_maps[0, ..., 0] for output in outputs]
        scores = np.array([output.anomaly_scores[0] for output in outputs])
        masks = [test.mask(index, found.shape) for index, found in zip(chosen, maps)]
        judged = [position for position, mask in enumerate(masks) if mask is not None]
        labels = np.array([test.labels[index] for index in chosen])
        metrics = evaluate_maps(
            [maps[position] for position in judged],
            [mask for mask in masks if mask is not None],
            scores[judged],
            labels[judged],
        )
        size = pipe.config.image_size
        noised = torch.zeros(2, 3, size, size, device=device, dtype=pipe.unet.dtype)
        timing = timings[f"{model}|{dtype}"]
        seconds = [value / len(outputs) for value in timing]
        rows.append(
            {
                "model": model,
                "dtype": dtype,
                "gflops_of_both_unet_passes": count_flops(lambda: pipe.unet(noised, 200)) / 1e9,  # noqa: B023
                "seconds": seconds[0],
                "seconds_lowest": seconds[1],
                "seconds_highest": seconds[2],
                **{key: metrics[key] for key in METRICS},
            }
        )

    results = {"machine": machine(device), "data": Path(arguments.data).name, "pictures": len(chosen), "models": rows}
    print(f"{len(chosen)} pictures, batches of {arguments.batch_size}, {results['machine']}\n")
    columns = ("model", "dtype", "GFLOP, both UNet passes", "ms a picture", "pictures a second", *METRICS)
    shown = []
    for row in rows:
        speed = (
            f"{1000 * row['seconds']:.4g} ({1000 * row['seconds_lowest']:.4g} ... {1000 * row['seconds_highest']:.4g})",
            f"{1 / row['seconds']:.3g}",
        )
        gflops = f"{row['gflops_of_both_unet_passes']:.4g}"
        shown.append((row["model"], row["dtype"], gflops, *speed, *(f"{row[key]:.4f}" for key in METRICS)))
    print_table(columns, shown)
    if arguments.chart:
        draw_chart(rows, arguments.metric, arguments.chart)
    write_json(arguments.output, results)


if __name__ == "__main__":
    main()
