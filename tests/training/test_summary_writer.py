"""What a run records: TensorBoard's files without torch, which tensorboardX would import for nothing; a full disk."""

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from helpers import raises

from lora_gen_jax.errors import OutputError
from lora_gen_jax.training.progress import Recorder

CODE = """
import sys
from contextlib import suppress
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


def test_a_full_disk_is_named_and_the_run_ends_with_that_error(tmp_path):
    def run(full):
        with Recorder(tmp_path, 0, 3) as recorder:
            recorder.record(1, {"loss": 2.0})
            assert recorder.file is not None
            recorder.file.close()
            recorder.file = full
            recorder.record(2, {"loss": 1.0})

    ending = raises(OutputError, "--workdir", tmp_path / "metrics.jsonl", "No space left on device", code="unwritable")
    with suppress(OSError), Path("/dev/full").open("a", encoding="utf-8") as full, ending:
        run(full)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 2.0}
