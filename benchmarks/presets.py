"""Accuracy against speed, in a table and a chart.

    python benchmarks/presets.py tiny small base --compile
    python benchmarks/presets.py runs/tiny runs/small --data training/data/hazelnut_toy/hazelnut --chart presets.png

Each model is timed from picture file to map, streaming the test pictures in batches, in turns with the others, in
float32, in bfloat16 where the hardware has it, with `--compile` compiled too, and with `--int8` exported to OpenVINO
and quantized by good pictures of the training split. Accuracy is that of trained models on the same pictures: presets
(tiny, small, base, paper) have random weights. Nothing is chosen by it. The share of the peak counts the convolutions
and matrix products of both networks; the peak is that of a product of two large matrices of the same dtype, measured
in the same run.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from accelerate import PartialState
from measure import (
    PRESETS,
    compile_all,
    count_flops,
    in_turns,
    load_model,
    machine,
    matrix_peak,
    print_table,
    write_json,
)

from diffusionad_pipe import DiffusionADPipeline
from diffusionad_pipe.data.loading import load_anomaly_dataset
from diffusionad_pipe.evaluation.test_set import TestImages, load_test_images
from diffusionad_pipe.export.detector import ExportedDetector, to_rgb_uint8
from diffusionad_pipe.export.export import export_detector
from diffusionad_pipe.freed_memory import keep_freed_memory
from diffusionad_pipe.metrics.exact import evaluate_maps
from diffusionad_pipe.runtime.acceleration import fastest_dtype

METRICS = ("image_auroc", "pixel_auroc", "pixel_ap", "au_pro_0.30")
FORMS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Quantized, with what is left in between in float32, and in bfloat16: in the order of FORMS.
INT8_FORMS = {"OpenVINO, int8": {}, "OpenVINO, int8 and bfloat16": {"INFERENCE_PRECISION_HINT": "bf16"}}


def draw_chart(rows: list[dict[str, Any]], metric: str, path: Path) -> None:
    """Milliseconds a picture, on a logarithmic scale, against a metric."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    markers = dict(zip(dict.fromkeys(row["form"] for row in rows), "osD^vP"))
    for model in dict.fromkeys(row["model"] for row in rows):
        points = [row for row in rows if row["model"] == model and metric in row]
        (line,) = axes.plot([1000 * p["seconds"] for p in points], [p[metric] for p in points], label=model, alpha=0.6)
        for point in points:
            axes.plot(1000 * point["seconds"], point[metric], markers[point["form"]], color=line.get_color())
    for form, marker in markers.items():
        axes.plot([], [], marker, color="grey", label=form)
    axes.set(xscale="log", xlabel="milliseconds a picture, file to map", ylabel=metric.replace("_", " "))
    for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        axis("{x:.0f}")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def accuracy(outputs: list[Any], test: TestImages, chosen: range) -> dict[str, float]:
    maps = [output.anomaly_maps[0, ..., 0] for output in outputs]
    masks = [test.mask(index, found.shape) for index, found in zip(chosen, maps)]
    with_masks = [position for position, mask in enumerate(masks) if mask is not None]
    metrics = evaluate_maps(
        [maps[position] for position in with_masks],
        [mask for mask in masks if mask is not None],
        np.array([output.anomaly_scores[0] for output in outputs])[with_masks],
        np.array([test.labels[index] for index in chosen])[with_masks],
    )
    return {key: metrics[key] for key in METRICS}


def quantized(pipe: DiffusionADPipeline, data: str) -> dict[str, ExportedDetector]:
    """The float32 pipeline in each of `INT8_FORMS`."""
    good = [to_rgb_uint8(image) for image in load_anomaly_dataset(data)["train"]["image"][:100]]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "detector.xml")
        export_detector(pipe, path, "openvino", int8=True, calibration=good)
        threads = torch.get_num_threads()
        # Of the map that is the aim, the reconstruction in the picture's own size is no part.
        return {
            form: ExportedDetector(path, threads=threads, reconstructions=False, options=options)
            for form, options in INT8_FORMS.items()
        }


def flops_of_a_image(pipe: DiffusionADPipeline) -> int:
    """Of the UNet's passes and the segmentation network."""
    size, scales = pipe.config.image_size, pipe.scheduler.num_scales
    noised, pair = (
        torch.zeros(count, channels, size, size, device=pipe.device) for count, channels in ((scales, 3), (1, 6))
    )
    return count_flops(lambda: pipe.unet(noised, 200)) + count_flops(lambda: pipe.segmentation(pair))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders of saved pipelines, or presets")
    parser.add_argument("--data", default="training/data/hazelnut_toy/hazelnut", help="a dataset with one category")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--images", type=int, help="use only so many test pictures, spread over all")
    parser.add_argument("--compile", action="store_true", help="also compiled: takes minutes before")
    parser.add_argument("--int8", action="store_true", help="also exported to OpenVINO and quantized")
    parser.add_argument("--peak_side", type=int, help="of the matrices that the peak is measured with")
    parser.add_argument("--chart", type=Path, help="also draw the chart into this PNG file")
    parser.add_argument("--metric", choices=METRICS, default="pixel_ap", help="of the chart")
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args()
    keep_freed_memory()  # as the command line does

    device = PartialState().device
    test = load_test_images(arguments.data, None)[0]
    chosen = range(0, len(test), -(-len(test) // (arguments.images or len(test))))
    forms = {form: dtype for form, dtype in FORMS.items() if dtype in (torch.float32, fastest_dtype(device))}
    pipes: dict[tuple[str, str], DiffusionADPipeline | ExportedDetector] = {}
    flops, sides = {}, {}
    for model in arguments.models:
        in_float32 = load_model(model, device)
        flops[model], sides[model] = flops_of_a_image(in_float32), in_float32.config.image_size
        for form, dtype in forms.items():
            pipes[model, form] = load_model(model, device, dtype)
            compiled = load_model(model, device, dtype) if arguments.compile else None
            if compiled is not None and compile_all(compiled):
                pipes[model, f"{form}, compiled"] = compiled
        if arguments.int8:
            found = quantized(in_float32, arguments.data)
            pipes |= {(model, form): found[form] for form in list(INT8_FORMS)[: len(forms)]}

    def stream(pipe: DiffusionADPipeline | ExportedDetector) -> Callable[[], list[Any]]:
        return lambda: list(
            pipe.stream((test.image(i) for i in chosen), batch_size=arguments.batch_size, output_type="np")
        )

    timings = in_turns({"|".join(key): stream(pipe) for key, pipe in pipes.items()}, arguments.rounds, device)
    with torch.inference_mode():
        peaks = {form: matrix_peak(device, dtype, arguments.peak_side) for form, dtype in forms.items()}
    rows: list[dict[str, Any]] = []
    for (model, form), pipe in pipes.items():
        seconds = [value / len(chosen) for value in timings[f"{model}|{form}"]]
        peak = peaks.get(form.partition(",")[0])  # of int8 none was measured
        rows.append(
            {
                "model": model if model in PRESETS else Path(model).name,
                "form": form,
                "image_size": sides[model],
                "flops": flops[model],
                "seconds": seconds[0],
                "seconds_lowest": seconds[1],
                "seconds_highest": seconds[2],
                "share_of_peak": flops[model] / seconds[0] / peak if peak else None,
                **({} if model in PRESETS else accuracy(stream(pipe)(), test, chosen)),
            }
        )

    results = {"machine": machine(device), "data": Path(arguments.data).name, "pictures": len(chosen), "models": rows}
    results["peak_flops"] = peaks
    shown_peaks = ", ".join(f"{form} {peak / 1e9:.4g} GFLOP/s" for form, peak in peaks.items())
    print(f"{len(chosen)} pictures, batches of {arguments.batch_size}, {results['machine']}, peaks: {shown_peaks}\n")
    columns = ("model", "form", "px", "GFLOP", "ms a picture", "pictures a second", "of the peak", *METRICS)
    shown = []
    for row in rows:
        speed = (
            f"{1000 * row['seconds']:.4g} ({1000 * row['seconds_lowest']:.4g} ... {1000 * row['seconds_highest']:.4g})",
            f"{1 / row['seconds']:.3g}",
            f"{row['share_of_peak']:.0%}" if row["share_of_peak"] else "",
        )
        metrics = (f"{row[key]:.4f}" if key in row else "" for key in METRICS)
        shown.append((row["model"], row["form"], row["image_size"], f"{row['flops'] / 1e9:.4g}", *speed, *metrics))
    print_table(columns, shown)
    if arguments.chart:
        draw_chart(rows, arguments.metric, arguments.chart)
    write_json(arguments.output, results)


if __name__ == "__main__":
    main()
