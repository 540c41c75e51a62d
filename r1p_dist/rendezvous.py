"""Where the ranks of a job meet: torch.distributed's variables, from what SLURM or submitit say about the job."""

import hashlib
import os

from submitit import JobEnvironment
from submitit.helpers import TorchDistributedEnvironment
from submitit.slurm.slurm import SlurmJobEnvironment

# Below the ports that Linux hands out for outgoing connections.
_PORTS = range(12000, 32000)
_THIS_NODE = "127.0.0.1"


def is_plain_srun() -> bool:
    """Whether this process is a rank that srun started, with no launcher in between that would have set RANK."""
    return "RANK" not in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ


def export_rendezvous() -> None:
    """Sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT from the job's environment.

    The port depends on the job and on how often it was restarted, so that a restart never meets what the start before
    it left behind.
    """
    if is_plain_srun():
        os.environ["SUBMITIT_EXECUTOR"] = SlurmJobEnvironment.name()  # srun alone does not say it
    job = JobEnvironment()
    restart = os.environ.get("SLURM_RESTART_COUNT", "0")
    step = os.environ.get("SLURM_STEP_ID", "0")
    os.environ["MASTER_PORT"] = str(port_of(job.job_id, step, restart))
    # All ranks may use all devices of their node: DeepSpeed picks LOCAL_RANK's.
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    if job.num_nodes == 1:
        os.environ["MASTER_ADDR"] = _THIS_NODE
    os.environ["LOCAL_SIZE"] = os.environ["LOCAL_WORLD_SIZE"]  # DeepSpeed's name for it, read by its CPU collectives


def port_of(*job: str) -> int:
    """Returns a port for what is told apart by these words; the same on all ranks."""
    digest = hashlib.sha256("/".join(job).encode()).digest()
    return _PORTS[int.from_bytes(digest[:4], "big") % len(_PORTS)]
