"""What a user writes down once about a cluster: a YAML file, with command line flags laid over it."""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from r1p_dist.errors import InputError
from r1p_dist.safe_yaml import read_yaml
from r1p_dist.shipped import shipped_files

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")


def _check_time(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # minutes, as SLURM takes them
    if not isinstance(value, str) or not _TIME.fullmatch(value) or not minutes_of(value):
        raise ValueError("must be a time as SLURM writes it: minutes, hours:minutes:seconds or days-hours:minutes")
    return value


_Whole = Annotated[int, Field(strict=True, ge=0)]
_Count = Annotated[int, Field(strict=True, ge=1)]


class ClusterProfile(BaseModel):
    """Where and how jobs run; the names are sbatch's and submitit's.

    One task per accelerator: `tasks_per_node` is `gpus_per_node`, or 1, unless it is set. `setup`: shell lines that
    run before the ranks start, such as `module load`. `srun_args`: words for srun, such as `--container-image=…`.
    `python`: the interpreter in a container, a shell command. `slurm`: any other option of sbatch. `signal_delay_s`:
    how long before the time limit a job is told to save and to queue itself again. `retries`: how often a job whose
    ranks crashed starts again by itself, `timeouts`: how often one that reached its time limit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    cluster: Literal["slurm", "local", "debug"] = "slurm"
    partition: str | None = None
    account: str | None = None
    time: Annotated[str, BeforeValidator(_check_time)] = "24:00:00"
    nodes: _Count = 1
    gpus_per_node: _Whole = 0
    tasks_per_node: _Count | None = None
    cpus_per_task: _Count | None = None
    signal_delay_s: _Count = 300
    retries: _Whole = 2
    timeouts: _Whole = 100
    python: str | None = None
    setup: list[str] = []
    srun_args: list[str] = []
    slurm: dict[str, str | int | bool] = {}

    @classmethod
    def load(cls, name: str | None, flags: dict[str, Any]) -> "ClusterProfile":
        """Returns the profile NAME (shipped, or the path of a YAML file; None: the defaults) with the flags laid over.

        Flags that are None say nothing; `slurm` adds to the file's. InputError: anything is wrong in them.
        """
        content, source = {}, "command line"
        if name is not None:
            path = _find(name)
            source = str(path)
            content = read_yaml(path) or {}
            if not isinstance(content, dict):
                raise InputError(f"{source}: a cluster profile is a mapping of keys to values")
        given = {key: value for key, value in flags.items() if value is not None and value != {}}
        if "slurm" in given and isinstance(content.get("slurm"), dict):
            given["slurm"] = content["slurm"] | given["slurm"]
        try:
            profile = cls.model_validate(content | given)
        except ValidationError as error:
            raise InputError(_describe(error, source, given)) from error
        if profile.signal_delay_s >= 60 * profile.minutes:
            raise InputError(
                f"signal_delay_s={profile.signal_delay_s} must be shorter than time={profile.time}: the job is told to "
                "save so many seconds before its limit"
            )
        if profile.cluster != "slurm" and profile.nodes > 1:
            raise InputError(f"nodes={profile.nodes}: cluster={profile.cluster} has one node")
        return profile

    @property
    def minutes(self) -> int:
        """The time limit, rounded up."""
        return minutes_of(self.time)

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


def minutes_of(time: str) -> int:
    """Returns SLURM's time in minutes, rounded up: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    found = _TIME.fullmatch(time)
    parts = [int(part) for part in found["parts"].split(":")]
    if found["days"] is not None:
        hours, minutes, seconds = (parts + [0, 0])[:3]
        hours += 24 * int(found["days"])
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, (parts + [0])[:2]
    return 60 * hours + minutes + (seconds > 0)


def _find(name: str) -> Path:
    shipped = shipped_files("clusters", ".yaml")
    if name in shipped:
        return shipped[name]
    if Path(name).is_file():
        return Path(name)
    nearest = difflib.get_close_matches(name, shipped, n=1)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    raise InputError(f"profile {name!r}: no file and no shipped profile; {hint}shipped: {', '.join(shipped)}")


def _describe(error: ValidationError, source: str, flags: dict[str, Any]) -> str:
    faults = []
    for entry in error.errors(include_url=False):
        key = str(entry["loc"][0])
        where = "command line" if key in flags else source
        reason = str(entry["ctx"]["error"]) if entry["type"] == "value_error" else entry["msg"]
        if entry["type"] == "extra_forbidden":
            nearest = difflib.get_close_matches(key, ClusterProfile.model_fields, n=1)
            reason = f"no such key; did you mean {nearest[0]}?" if nearest else "no such key; put it under slurm:"
        faults.append(f"{where}: {key}={entry['input']!r}: {reason[0].lower()}{reason[1:]}")
    return "; ".join(faults)
