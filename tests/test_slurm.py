"""docs/slurm.sbatch under a stand-in for SLURM, which starts two tasks of two nodes on this machine."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "docs/slurm.sbatch"
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for SLURM_PROCID in 0 1; do SLURM_LOCALID=0 SLURM_PROCID=$SLURM_PROCID "$@" || exit; done
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && printf 'first\\nsecond\\n' || echo "scontrol $*"
"""
# Says what it was started with, and ends as the test wants it.
PYTHON = """#!/bin/bash
echo "$RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*"
exit "$ENDS_WITH"
"""


@pytest.mark.parametrize(
    ("status", "finished", "queued_again"), [(0, False, True), (0, True, False), (1, False, False), (1, True, False)]
)
def test_every_task_joins_and_the_job_comes_back_until_its_run_is_finished(tmp_path, status, finished, queued_again):
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", PYTHON)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    run = tmp_path / "runs/rn50"
    run.mkdir(parents=True)
    if finished:
        (run / "summary.json").touch()
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "20003", "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_CPUS_PER_TASK": "14", "ENDS_WITH": str(status),
    }  # fmt: skip
    job = subprocess.run(["bash", str(SCRIPT)], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert job.returncode == (0 if queued_again else status), job.stderr
    assert ("scontrol requeue 20003" in job.stdout) is queued_again
    tasks = [line for line in job.stdout.splitlines() if "msbreg" in line and "-m" in line]
    options = "-m msbreg pretrain --config imagenet-resnet50-100ep --data.path imagenet/ --run.dir runs/rn50"
    expected = [f"{rank} 2 0 1 first 10003 {options}" for rank in range(2)]
    assert tasks == (expected if status == 0 else expected[:1])
