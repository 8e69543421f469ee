"""Exported detectors against the pipeline: milliseconds, differences, and accuracy.

    python benchmarks/export.py --model pretrained/hazelnut --data training/data/hazelnut_toy/hazelnut --compile

Writes the model in every format, in float32 and int8 (calibrated on the good pictures of the training split), and times
one picture from uint8 pixels to map and score, in turns; in bfloat16 too where the processor has it. Differences are to
the pipeline in float32, over the test pictures; so are the areas under the curves. Nothing is chosen by them.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import compile_all, in_turns, load_model, machine, print_table, write_json
from tqdm.auto import tqdm

from diffusionad_pipe.data.loading import load_anomaly_dataset
from diffusionad_pipe.evaluation.test_set import load_test_images
from diffusionad_pipe.export.detector import ExportedDetector, to_rgb_uint8
from diffusionad_pipe.export.export import export_detector
from diffusionad_pipe.freed_memory import keep_freed_memory
from diffusionad_pipe.metrics.exact import evaluate_maps
from diffusionad_pipe.runtime.acceleration import fastest_dtype

METRICS = ("image_auroc", "pixel_auroc", "pixel_ap")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pretrained/hazelnut")
    parser.add_argument("--data", default="training/data/hazelnut_toy/hazelnut", help="a dataset with one category")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--images", type=int, help="use only so many test pictures, spread over all")
    parser.add_argument("--calibration", type=int, default=100, help="good training pictures for int8, at most")
    parser.add_argument("--compile", action="store_true", help="also the compiled pipeline")
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args()
    keep_freed_memory()  # as the command line does

    device = torch.device("cpu")
    pipe = load_model(arguments.model, device)
    test = load_test_images(arguments.data, None)[0]
    chosen = range(0, len(test), -(-len(test) // (arguments.images or len(test))))
    images = [to_rgb_uint8(test.image(index)) for index in chosen]
    masks = [test.mask(index, image.shape[:2]) for index, image in zip(chosen, images)]
    labels = np.array([test.labels[index] for index in chosen])
    good = load_anomaly_dataset(arguments.data)["train"]["image"][: arguments.calibration]
    calibration = [to_rgb_uint8(image) for image in good]

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        detectors: dict[str, Callable[..., Any]] = {"pipeline, float32": pipe}
        multiplies_in_bfloat16 = fastest_dtype(device) == torch.bfloat16
        if multiplies_in_bfloat16:
            detectors["pipeline, bfloat16"] = load_model(arguments.model, device, torch.bfloat16)
        if arguments.compile:
            compiled = load_model(arguments.model, device)
            compiled.fold_batch_norm()
            if compile_all(compiled):
                detectors["pipeline, float32, compiled"] = compiled
        export_detector(pipe, folder / "detector.pt2", "torch")
        detectors["torch.export, float32"] = ExportedDetector(folder / "detector.pt2")
        for runtime, format, suffix in (("ONNX Runtime", "onnx", ".onnx"), ("OpenVINO", "openvino", ".xml")):
            for precision in ("float32", "int8"):
                path = folder / f"{precision}{suffix}"
                export_detector(pipe, path, format, int8=precision == "int8", calibration=calibration)
                threads = torch.get_num_threads()
                detectors[f"{runtime}, {precision}"] = ExportedDetector(path, threads=threads)
                if format == "openvino" and multiplies_in_bfloat16:
                    form = "bfloat16" if precision == "float32" else "int8 and bfloat16"
                    options = {"INFERENCE_PRECISION_HINT": "bf16"}
                    detectors[f"{runtime}, {form}"] = ExportedDetector(path, threads=threads, options=options)

        def call(detector: Callable[..., Any]) -> Callable[[], object]:
            return lambda: detector(images[0], output_type="np", batch_size=1)

        timings = in_turns({name: call(d) for name, d in detectors.items()}, arguments.rounds, device)
        found = {}
        for name, detector in detectors.items():
            bar = tqdm(images, desc=name)
            outputs = [detector(image, output_type="np", batch_size=1) for image in bar]
            found[name] = [o.anomaly_maps[0, ..., 0] for o in outputs], np.array([o.anomaly_scores[0] for o in outputs])

    results: dict[str, Any] = {"machine": machine(device), "model": arguments.model, "pictures": len(images)}
    print(f"{arguments.model}, {len(images)} test pictures, {results['machine']}, medians of {arguments.rounds}\n")
    maps, scores = found["pipeline, float32"]
    with_masks = [index for index, mask in enumerate(masks) if mask is not None]
    rows = []
    for name, (own_maps, own_scores) in found.items():
        timing = timings[name]
        metrics = evaluate_maps(
            [own_maps[index] for index in with_masks],
            [mask for mask in masks if mask is not None],
            own_scores[with_masks],
            labels[with_masks],
        )
        map_difference = max(float(np.abs(own - other).max()) for own, other in zip(own_maps, maps))
        score_difference = float(np.abs(own_scores - scores).max())
        ratio = timings["pipeline, float32"].median / timing.median
        results[name] = {
            **timing._asdict(),
            "speedup": ratio,
            "map_difference": map_difference,
            "score_difference": score_difference,
            **{key: metrics[key] for key in METRICS},
        }
        differences = f"{score_difference:.2g}", f"{map_difference:.2g}"
        rows.append((name, timing, f"{ratio:.3g}", *differences, *(f"{metrics[key]:.4f}" for key in METRICS)))
    columns = ("form", "seconds", "times float32", "score differs", "map differs", *METRICS)
    print_table(columns, rows)
    write_json(arguments.output, results)


if __name__ == "__main__":
    main()
