"""Kill a run again and again, and compare what it ends with to a run that nobody disturbed.

    python tools/dev/chaos.py --kills 50 --json chaos.json
    python tools/dev/chaos.py --kills 8 --tasks 2 --ranks 2 --seed 1

Two runs of `deepspeed launchers/train.py` with the same configuration: one is left alone, the other one is started,
killed with SIGKILL and started again until it was killed often enough, then left to finish. Moments and victims (one
rank, all ranks, the launcher) are drawn from the seed; the kills are spread over the tasks and, within each, over four
phases: step, save, merge and evaluation. What counts is the phase that the run's files show after the kill; a phase
that was missed too often is aimed at again. Merged experts, accuracy matrix and logs must be equal bit for bit. Exit
code 0; 1 where they differ or a phase was met too seldom.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from r1p_dist.data import Stream
from r1p_dist.files import write_atomically

ROOT = Path(__file__).resolve().parents[2]
PHASES = ("step", "save", "merge", "evaluation")
# Ranks notice that their launcher is gone at the next step, so without it they would end a merge or an evaluation.
VICTIMS = {phase: ("rank 0", "rank 1", "all ranks") for phase in PHASES}
VICTIMS["step"] = VICTIMS["save"] = ("rank 0", "rank 1", "all ranks", "launcher")
STATES = {"training": "step", "merging": "merge", "evaluating": "evaluation", "saving": "save"}
LONGEST_DELAY_S = {"step": 0.5, "save": 0.01, "merge": 0.01, "evaluation": 0.3}
MORE_TRIES = 10  # in a phase of a task that was met too seldom
TASKS = ("playing_cards", "animal_silhouettes", "country_flags", "fashion")
SETTINGS = (
    "train.iterations=24 train.global_batch_size=8 train.lr=1e-2 checkpoint.every_steps=4 log.every_steps=3 "
    "options.dropout=0.1"
).split()
PATIENCE_S = 300


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign; return 0 when nothing was lost."""
    head, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--per-phase", type=int, metavar="N", help="kills in each phase at least (kills / 6)")
    parser.add_argument("--tasks", type=int, default=4, choices=range(1, 5))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/chaos"), help="emptied first")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="laid over the recipe mini_mtil")
    arguments = parser.parse_args(argv)
    result = campaign(arguments)
    text = json.dumps(result, indent=1)
    if arguments.json is not None:
        write_atomically(arguments.json, text + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "kills"}, indent=1))
    return 0 if result["is_equal"] and not result["phases_met_too_seldom"] else 1


def campaign(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns every kill, the kills by phase, and whether the two runs ended equal."""
    generator = random.Random(arguments.seed)
    tasks = [task.name for task in Stream.load("mini_mtil", tasks=TASKS[: arguments.tasks]).tasks]
    shutil.rmtree(arguments.folder, ignore_errors=True)
    arguments.folder.mkdir(parents=True)
    calm, hunted = arguments.folder / "calm", arguments.folder / "hunted"
    _finish(calm, tasks, arguments)
    least = arguments.kills // 6 if arguments.per_phase is None else arguments.per_phase
    kills: list[dict[str, Any]] = []
    for task, phase, count in _aims(arguments.kills, tasks):
        tries = hits = 0
        while tries < count or (hits * len(tasks) < least and tries < count + MORE_TRIES):
            delay = generator.uniform(0, LONGEST_DELAY_S[phase])
            victim = generator.choice([name for name in VICTIMS[phase] if arguments.ranks > 1 or name != "rank 1"])
            kill = _kill_once(hunted, tasks, task, phase, victim, delay, arguments)
            if kill["phase"] is None:
                break
            kills.append({"number": len(kills) + 1, "aimed_at": phase, "victim": victim, "delay_s": round(delay, 4)})
            kills[-1].update(kill)
            print(json.dumps(kills[-1]), flush=True)
            tries += 1
            hits += (kill["phase"], kill["task"]) == (phase, task)
    _finish(hunted, tasks, arguments)
    by_phase = Counter(kill["phase"] for kill in kills if kill["phase"])
    differences = compare(calm, hunted)
    return {
        "seed": arguments.seed,
        "ranks": arguments.ranks,
        "tasks": tasks,
        "killed": sum(by_phase.values()),
        "by_phase": {phase: by_phase[phase] for phase in PHASES},
        "by_victim": dict(Counter(kill["victim"] for kill in kills)),
        "phases_met_too_seldom": [phase for phase in PHASES if by_phase[phase] < least],
        "is_equal": not differences,
        "differences": differences,
        "kills": kills,
    }


def _aims(kills: int, tasks: Sequence[str]) -> list[tuple[str, str, int]]:
    """Returns (task, phase, kills), task by task, and in each task phase by phase, as the run passes them."""
    places = [(task, phase) for task in tasks for phase in PHASES]
    return [
        (task, phase, kills // len(places) + (place < kills % len(places)))
        for place, (task, phase) in enumerate(places)
    ]


def _command(run_dir: Path, tasks: Sequence[str], arguments: argparse.Namespace) -> list[str]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(arguments.ranks)]
    settings = [f"tasks=[{', '.join(tasks)}]", f"run_dir={run_dir.resolve()}", *SETTINGS, *arguments.settings]
    return [*launcher, "--master_port", str(port), "launchers/train.py", "--recipe", "mini_mtil", *settings]


def _start(run_dir: Path, tasks: Sequence[str], arguments: argparse.Namespace) -> subprocess.Popen:
    log = open(arguments.folder / f"{run_dir.name}.log", "ab")
    with log:
        return subprocess.Popen(_command(run_dir, tasks, arguments), cwd=ROOT, stdout=log, stderr=log)


def _finish(run_dir: Path, tasks: Sequence[str], arguments: argparse.Namespace) -> None:
    process = _start(run_dir, tasks, arguments)
    if process.wait() != 0:
        log = arguments.folder / f"{run_dir.name}.log"
        raise SystemExit(f"error: an undisturbed start ended with code {process.returncode}; see {log}")


def _kill_once(
    run_dir: Path,
    tasks: Sequence[str],
    task: str,
    phase: str,
    victim: str,
    delay: float,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Starts the run, kills the victim in a phase of a task, and returns where the run's files say that it was."""
    (run_dir / "status.json").unlink(missing_ok=True)
    for partial in _partial_saves(run_dir):  # what the kill before left would be taken for a new one
        shutil.rmtree(partial)
    process = _start(run_dir, tasks, arguments)
    _wait(process, (run_dir / "status.json").exists, 0.005)
    everyone = _family(process)  # looked up early: a save or a merge is over in a moment
    preys = _victims(everyone, victim)
    pause = 0.0005 if phase in ("save", "merge") else 0.005
    if not _wait(process, lambda: _is_reached(run_dir, tasks, task, phase), pause):
        return {"phase": None, "task": None, "step": None}  # finished: later phases are not there any more
    time.sleep(delay)
    for prey in preys:
        with contextlib.suppress(psutil.NoSuchProcess):
            prey.send_signal(signal.SIGKILL)
    status = json.loads((run_dir / "status.json").read_text(encoding="utf-8"))
    found = "save" if _partial_saves(run_dir) else STATES.get(status["state"])
    # the others notice by themselves, or are told by their launcher
    _, alive = psutil.wait_procs(everyone, timeout=90)
    for prey in alive:
        prey.kill()
    process.wait()
    return {"phase": found, "task": status["task"], "step": status["step"], "had_to_be_ended": len(alive)}


def _wait(process: subprocess.Popen, is_reached: Callable[[], bool], pause: float) -> bool:
    """Returns whether it was reached before the process ended."""
    started = time.monotonic()
    while not is_reached():
        if process.poll() is not None:
            return False
        if time.monotonic() - started > PATIENCE_S:
            raise SystemExit(f"error: what the next kill waits for was not reached in {PATIENCE_S} s")
        time.sleep(pause)
    return True


def _is_reached(run_dir: Path, tasks: Sequence[str], task: str, phase: str) -> bool:
    try:
        status = json.loads((run_dir / "status.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    if status["task"] is None or tasks.index(status["task"]) < tasks.index(task):
        return False
    return bool(_partial_saves(run_dir)) if phase == "save" else STATES.get(status["state"]) == phase


def _partial_saves(run_dir: Path) -> list[Path]:
    return list(run_dir.glob("checkpoints/*/.*.partial"))


def _family(process: subprocess.Popen) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def _victims(everyone: Sequence[psutil.Process], victim: str) -> list[psutil.Process]:
    ranks, launchers = {}, []
    for process in everyone:
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            if "deepspeed.launcher.launch" in command:
                launchers.append(process)
            elif any(word.endswith("launchers/train.py") for word in command):
                ranks.setdefault(process.environ()["RANK"], process)
    if victim == "launcher":
        return launchers
    return list(ranks.values()) if victim == "all ranks" else [ranks[victim.split()[1]]]


def compare(calm: Path, hunted: Path) -> list[str]:
    """Returns what differs between two finished runs: experts, metrics, logs; speeds, times and memory left out."""
    one, other = _essence(calm), _essence(hunted)
    return [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]


def _essence(run_dir: Path) -> dict[str, str]:
    contents = {str(path.relative_to(run_dir)): path.read_bytes() for path in run_dir.glob("adapters/*/*")}
    metrics = json.loads((run_dir / "metrics.json").read_text(encoding="utf-8"))
    metrics.pop("wall_seconds")
    contents["metrics.json"] = json.dumps(metrics, sort_keys=True).encode()
    contents["correct.jsonl"] = (run_dir / "correct.jsonl").read_bytes()
    for number, line in enumerate((run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()):
        record = json.loads(line)
        for name in ("samples_per_second", "data_wait", "memory_gb"):
            record.pop(name, None)
        contents[f"log.jsonl line {number + 1}"] = json.dumps(record).encode()
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
