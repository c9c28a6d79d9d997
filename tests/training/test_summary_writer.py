"""TensorBoard's files are written without torch, which tensorboardX would import for nothing."""

import subprocess
import sys

CODE = """
import sys
from pathlib import Path
from lora_gen_jax.training.progress import summary_writer
writer = summary_writer(Path(sys.argv[1]), 3)
writer.add_scalar("loss", 1.5, 3)
writer.close()
assert "torch" not in sys.modules
import torch
assert torch.tensor([2.0]).item() == 2.0
"""


def test_torch_is_not_imported_and_can_be_afterwards(tmp_path):
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert b"loss" in events.read_bytes()
