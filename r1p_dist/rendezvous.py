"""Where the ranks of a job meet: torch.distributed's variables, from what SLURM or submitit say about the job.

And which of the devices that a rank sees is its own.
"""

import hashlib
import os

from submitit import JobEnvironment
from submitit.helpers import TorchDistributedEnvironment
from submitit.slurm.slurm import SlurmJobEnvironment

from r1p_dist.errors import InputError

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
    # Which devices a rank may see is the cluster's business; `take_device` finds its own among them.
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    if job.num_nodes == 1:
        os.environ["MASTER_ADDR"] = _THIS_NODE
    os.environ["LOCAL_SIZE"] = os.environ["LOCAL_WORLD_SIZE"]  # DeepSpeed's name for it, read by its CPU collectives


def take_device(visible: int) -> int:
    """Returns which of the `visible` devices is this rank's, and sets LOCAL_RANK to it: DeepSpeed takes it for that.

    A rank that sees one device takes it, whatever its place on the node: some clusters show each task its own alone.
    InputError: several devices, and none of this rank's number.
    """
    local_rank = int(os.environ["LOCAL_RANK"])
    index = 0 if visible == 1 else local_rank
    if index >= visible:
        raise InputError(
            f"LOCAL_RANK={local_rank}: this rank sees {visible} devices and none is left for it; start at most as many "
            "ranks on a node as it has devices, or have each rank shown one device alone"
        )
    os.environ["LOCAL_RANK"] = str(index)
    return index


def port_of(*job: str) -> int:
    """Returns a port for what is told apart by these words; the same on all ranks."""
    digest = hashlib.sha256("/".join(job).encode()).digest()
    return _PORTS[int.from_bytes(digest[:4], "big") % len(_PORTS)]
