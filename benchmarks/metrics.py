"""Metrics of a test set: exact, streamed, the authors' way, and scikit-learn's for the same pixels.

    python benchmarks/metrics.py
    python benchmarks/metrics.py --large

The maps are random, smooth and squeezed towards 0 as a segmentation network's are, with one to four defects in three
pictures of four. `--large` streams 1,725 maps of 1024 px instead, as many as MVTec AD has test pictures, drawn one at a
time; its memory is the most that the whole process held, libraries included.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import GIB, Timing, in_turns, machine, print_table, write_json
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from tqdm.auto import tqdm

from diffusionad_pipe.evaluation.predicting import peak_memory
from diffusionad_pipe.metrics.exact import au_pro, evaluate_maps
from diffusionad_pipe.metrics.streaming import StreamingAnomalyMetrics

CPU = torch.device("cpu")


def sample_image(index: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """An anomaly map, float32 in [0, 1], and its mask, `[size, size]` each, from a generator of its own."""
    rng = np.random.default_rng(index)
    mask = np.zeros((size, size), dtype=bool)
    for _ in range(rng.integers(1, 5) if index % 4 else 0):
        top, left = rng.integers(0, size * 3 // 4, 2)
        height, width = rng.integers(size // 32, size // 4, 2)
        mask[top : top + height, left : left + width] = True
    logits = rng.standard_normal((size, size), dtype=np.float32)
    logits = 8 * ndimage.uniform_filter(logits, 5) + 5 * mask - 6
    return 1 / (1 + np.exp(-logits)), mask


def scikit_learn(maps: list[np.ndarray], masks: list[np.ndarray]) -> None:
    labels, scores = np.stack(masks).ravel(), np.stack(maps).ravel()
    roc_auc_score(labels, scores)
    average_precision_score(labels, scores)
    precision_recall_curve(labels, scores)


def compare(count: int, size: int, rounds: int) -> dict[str, Any]:
    """Time the methods, and print how far the others are from the exact metrics."""
    maps, masks = map(list, zip(*(sample_image(index, size) for index in range(count))))
    methods = {
        "exact AU-PRO alone": lambda: au_pro(maps, masks),
        "exact": lambda: evaluate_maps(maps, masks),
        "streaming": lambda: evaluate_maps(maps, masks, method="streaming"),
        "reference": lambda: evaluate_maps(maps, masks, method="reference"),
        "scikit-learn: AUROC, AP and F1 alone": lambda: scikit_learn(maps, masks),
    }
    seconds: dict[str, Timing] = in_turns(methods, rounds, CPU)
    print(f"\n{count} maps of {size} px, {rounds} rounds; all pixel metrics unless told\n")
    once = seconds["exact AU-PRO alone"].median
    rows = [(name, timing, f"{timing.median / once:.2f}") for name, timing in seconds.items()]
    print_table(("method", "seconds", "times exact AU-PRO"), rows)

    exact, reference = evaluate_maps(maps, masks), evaluate_maps(maps, masks, method="reference")
    streamed = evaluate_maps(maps, masks, method="streaming")
    values = [
        (name, value, reference[name], streamed[name], abs(streamed[name] - value), streamed[f"{name}_error"])
        for name, value in exact.items()
    ]
    columns = ("metric", "exact", "reference", "streamed", "its error", "at most")
    print_table(columns, [(name, *(f"{number:.6f}" for number in numbers)) for name, *numbers in values])
    return {"seconds": {name: timing._asdict() for name, timing in seconds.items()}, "metrics": values}


def stream(count: int, size: int) -> dict[str, Any]:
    """Stream pictures, and print the time of the metrics alone and the peak memory."""
    streaming, seconds = StreamingAnomalyMetrics(), 0.0
    for index in tqdm(range(count), unit="map"):
        anomaly_map, mask = sample_image(index, size)
        started = time.perf_counter()
        streaming.update(anomaly_map, mask, float(anomaly_map.max()))
        seconds += time.perf_counter() - started
    started = time.perf_counter()
    metrics = streaming.compute()
    seconds += time.perf_counter() - started
    memory = peak_memory(CPU)
    print(f"\n{count} maps of {size} px: {seconds:.1f} s, peak memory {memory / GIB:.2f} GiB\n")
    names = [name for name in metrics if f"{name}_error" in metrics]
    rows = [(name, f"{metrics[name]:.6f}", f"{metrics[f'{name}_error']:.6f}") for name in names]
    print_table(("metric", "streamed", "error at most"), rows)
    return {"seconds": seconds, "peak_memory_bytes": memory, "metrics": metrics}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, help="maps; 83, or 1725 with --large")
    parser.add_argument("--size", type=int, help="of a map; 256, or 1024 with --large")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", action="store_true", help="stream many large maps, and print the peak memory")
    parser.add_argument("--output", type=Path, help="also write the numbers here, as JSON")
    arguments = parser.parse_args()
    count = arguments.count or (1725 if arguments.large else 83)
    size = arguments.size or (1024 if arguments.large else 256)
    results = stream(count, size) if arguments.large else compare(count, size, arguments.rounds)
    write_json(arguments.output, {"machine": machine(CPU), "count": count, "size": size, **results})


if __name__ == "__main__":
    main()
