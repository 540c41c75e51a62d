"""Where things lie in the folder of a run. People and other tools rely on these names."""

from pathlib import Path

CONFIG_FILE = "config.yaml"
TASKS_FILE = "tasks.json"  # what each task asks of the model, without its data; an export has it too
METRICS_FILE = "metrics.json"
LOG_FILE = "log.jsonl"
CORRECT_FILE = "correct.jsonl"
ANSWERS_FILE = "answers.jsonl"
STATUS_FILE = "status.json"
REPORT_FILE = "report.html"
LAUNCH_LOG = "launch.log"  # what DeepSpeed, torch and the compiler print
JOB_FILE = "job.json"
CHECKPOINTS = "checkpoints"
METHOD_FILE = "method.safetensors"  # of each checkpoint: what its method counts
JOBS = "jobs"
ADAPTERS = "adapters"
# of each folder in ADAPTERS
UPDATES_FILE = "adapter.safetensors"
MEMORY_FILE = "memory.safetensors"
FACTS_FILE = "adapter.json"


def stage_folder(run_dir: Path, index: int, name: str) -> Path:
    """Returns the folder of what a finished stage left."""
    return run_dir / ADAPTERS / f"{index:02d}-{name}"


def last_stage_folder(run_dir: Path) -> Path | None:
    """Returns the folder of the last stage that left one; None where none did."""
    folders = (run_dir / ADAPTERS).glob("[0-9]*-*")
    return max(folders, key=lambda folder: int(folder.name.partition("-")[0]), default=None)
