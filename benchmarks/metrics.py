"""Metrics of a test set: exact, streamed, the authors' way, and scikit-learn's for the same pixels.

    python benchmarks/metrics.py
    python benchmarks/metrics.py --large

The maps are random, smooth and squeezed towards 0 as a segmentation network's are, with one to four defects in three
pictures of four. Times are taken in turns, A B C A B C, and the medians reported, in seconds and in multiples of the
exact AU-PRO. `--large` streams 1,725 maps of 1024 px instead, drawn one at a time, and prints the peak memory.
"""

import argparse
import resource
import statistics
import sys
import time

import numpy as np
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from tqdm.auto import tqdm

from diffusionad_pipe.metrics import au_pro, evaluate_maps
from diffusionad_pipe.metrics_streaming import StreamingAnomalyMetrics


def draw_picture(index: int, size: int) -> tuple[np.ndarray, np.ndarray]:
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


def stream(count: int, size: int) -> None:
    """Stream pictures that are drawn one at a time, and print the time of the metrics alone and the peak memory."""
    streaming, seconds = StreamingAnomalyMetrics(), 0.0
    for index in tqdm(range(count), unit="map"):
        anomaly_map, mask = draw_picture(index, size)
        started = time.perf_counter()
        streaming.update(anomaly_map, mask, float(anomaly_map.max()))
        seconds += time.perf_counter() - started
    started = time.perf_counter()
    metrics = streaming.compute()
    seconds += time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{count} maps of {size} px: {seconds:.1f} s, peak memory {peak / 2**20:.0f} MiB\n")
    print("| metric | streamed | error at most |\n|---|---|---|")
    for name in (name for name in metrics if f"{name}_error" in metrics):
        print(f"| {name} | {metrics[name]:.6f} | {metrics[f'{name}_error']:.6f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, help="maps; 83, or 1725 with --large")
    parser.add_argument("--size", type=int, help="of a map; 256, or 1024 with --large")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", action="store_true", help="stream many large maps, and print the peak memory")
    arguments = parser.parse_args()
    count = arguments.count or (1725 if arguments.large else 83)
    size = arguments.size or (1024 if arguments.large else 256)
    if arguments.large:
        stream(count, size)
        return

    maps, masks = map(list, zip(*(draw_picture(index, size) for index in range(count))))
    methods = {
        "exact AU-PRO alone": lambda: au_pro(maps, masks),
        "exact": lambda: evaluate_maps(maps, masks),
        "streaming": lambda: evaluate_maps(maps, masks, method="streaming"),
        "reference": lambda: evaluate_maps(maps, masks, method="reference"),
        "scikit-learn: AUROC, AP and F1 alone": lambda: scikit_learn(maps, masks),
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for turn in tqdm(range(arguments.rounds + 1), desc="rounds, the first not counted"):
        for name, method in methods.items():
            started = time.perf_counter()
            method()
            if turn > 0:
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{count} maps of {size} px, medians of {arguments.rounds} rounds; all pixel metrics unless told\n")
    print("| method | seconds | times exact AU-PRO |\n|---|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {median:.3f} | {median / medians['exact AU-PRO alone']:.2f} |")

    exact, reference = evaluate_maps(maps, masks), evaluate_maps(maps, masks, method="reference")
    streamed = evaluate_maps(maps, masks, method="streaming")
    print("\n| metric | exact | reference | streamed | its error | at most |\n|---|---|---|---|---|---|")
    for name, value in exact.items():
        error = abs(streamed[name] - value)
        print(
            f"| {name} | {value:.6f} | {reference[name]:.6f} | {streamed[name]:.6f} | {error:.6f} | "
            f"{streamed[f'{name}_error']:.6f} |"
        )


if __name__ == "__main__":
    main()
