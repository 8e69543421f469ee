"""Measure a trained pipeline on test pictures, on several processes or machines.

    accelerate launch training/evaluate.py --model pretrained/hazelnut --data training/data/hazelnut_toy/hazelnut

The command `diffusionad evaluate` in a form that accelerate can launch.
"""

import sys

from diffusionad_pipe.cli import app

if __name__ == "__main__":
    app(["evaluate", *sys.argv[1:]])
