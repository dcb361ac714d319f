"""The main rows of test_sharded and test_sharded_trainer with nccl, on one GPU and on two."""

from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist

TOLERANCE = 1e-11  # as in test_sharded: sums in another order, of numbers near 10
SCRIPT = str(Path(__file__).with_name("nccl_run.py"))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 2])
def test_layers_and_trainer_on_gpus_give_the_numbers_of_one_process_on_a_cpu(tmp_path: Path, size: int) -> None:
    if torch.cuda.device_count() < size or not dist.is_nccl_available():
        pytest.skip(f"needs nccl and {size} GPUs")
    process = processes.torchrun(size, [SCRIPT, str(tmp_path)], timeout=300)
    assert process.returncode == 0, process.stderr
    for found in processes.results(tmp_path, size):
        assert max(found.values()) < TOLERANCE, found
