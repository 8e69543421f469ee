"""training/train.py under FSDP on a machine without a GPU: accelerate shards on GPUs alone, so they are called that."""

import runpy
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType

PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
script = Path(__file__).parents[2] / "training" / "train.py"
sys.path.insert(0, str(script.parent))
runpy.run_path(str(script), run_name="__main__")
