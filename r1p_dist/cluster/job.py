"""What a job runs on each of its ranks, and what it does when the cluster takes its time or its nodes away."""

import os
import signal
import sys
from pathlib import Path

from submitit import JobEnvironment
from submitit.helpers import DelayedSubmission

from r1p_dist.errors import EXIT_INTERRUPTED, Interrupted, report_errors
from r1p_dist.recipes import load_config
from r1p_dist.rendezvous import export_rendezvous

# How long a start after the first waits for ranks of the one before that outlived it, as on a node that got lost.
_LOCK_PATIENCE_S = 300.0
EXIT_REQUEUED = 255  # submitit's, on rank 0


class TrainJob:
    """Trains the run of a configuration file. submitit keeps it on the disk, so that a job that is queued again has it.

    SIGUSR2 (the time limit is near, or a preemption) and SIGTERM (cancelled, or queued again from outside) are noted;
    all ranks agree at the end of a step, save and end. Then, after SIGUSR2, rank 0 queues the job again.
    """

    def __init__(self, config_file: Path, sweep: Path | None = None) -> None:
        """sweep: the folder of the sweep that this is a point of."""
        self.config_file, self.sweep = Path(config_file).absolute(), sweep

    def __call__(self) -> None:
        """Returns when the run is finished; ends the process with one of the documented codes otherwise."""
        queue_again = signal.getsignal(signal.SIGUSR2)  # submitit's, before the run takes the signal
        export_rendezvous()
        code = report_errors(self._train)
        if self.sweep is not None and os.environ["RANK"] == "0":
            from r1p_dist.cluster.sweep_table import write_sweep_table

            write_sweep_table(self.sweep)
        if code == EXIT_INTERRUPTED and self._number == signal.SIGUSR2:
            # One more signal now would only come in between.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
            if JobEnvironment().global_rank == 0:
                queue_again(signal.SIGUSR2, None)
            sys.exit(0)
        if code:
            sys.exit(code)

    def checkpoint(self) -> DelayedSubmission:
        """Returns what submitit starts when the job was queued again: the same, which resumes from its checkpoint."""
        return DelayedSubmission(self)

    def _train(self) -> int:
        from r1p_dist.train import run

        config = load_config(self.config_file)
        is_restart = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
        try:
            run(config, _LOCK_PATIENCE_S if is_restart else 0)
        except Interrupted as interrupted:
            self._number = interrupted.number
            raise
        return 0
