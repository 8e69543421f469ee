"""How much a picture's score and map change with the batch size.

python benchmarks/batch_size.py --model pretrained/hazelnut --images training/data/hazelnut_toy/hazelnut/test
"""

import argparse

import numpy as np
from accelerate import PartialState

from diffusionad_pipe import DiffusionADPipeline, find_images, open_image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pretrained/hazelnut")
    parser.add_argument("--images", default="training/data/hazelnut_toy/hazelnut/test")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[4, 23], help="compared with a batch size of 1")
    arguments = parser.parse_args()

    pipe = DiffusionADPipeline.from_pretrained(arguments.model).to(PartialState().device)
    images = [open_image(file) for file in find_images(arguments.images)]
    alone = pipe(images, batch_size=1, output_type="np")
    print("| batch size | largest difference of a score | of a map |\n|---|---|---|")
    for batch_size in arguments.batch_sizes:
        batched = pipe(images, batch_size=batch_size, output_type="np")
        score = np.abs(batched.anomaly_scores - alone.anomaly_scores).max()
        pixel = max(np.abs(a - b).max() for a, b in zip(batched.anomaly_maps, alone.anomaly_maps))
        print(f"| {batch_size} | {score:.1e} | {pixel:.1e} |")


if __name__ == "__main__":
    main()
