"""A case of the check, run in a process of its own that may hang, crash or run out of memory without ending the rest.

The function of a case gets a `Report` and writes each result as soon as it is there, so that a case that is stopped
keeps what it found.
"""

import importlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

TOOLS = Path(__file__).resolve().parents[1]
ROOT = TOOLS.parent
# Hides every accelerator from torch and from DeepSpeed.
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
_LOG_LINES = 30  # of a case that failed, kept with its result


class NotPossibleError(Exception):
    """Raised by a case that this machine or these libraries cannot do; says why."""


@dataclass(frozen=True)
class Case:
    """function: MODULE:NAME, called with a Report and `options`. needs_s: not begun with less left."""

    name: str
    function: str
    options: Mapping[str, Any] = field(default_factory=dict)
    needs_s: float = 20.0
    on_cpu: bool = False


class Report:
    """The results of one case: a JSON object per line with its name, outcome (pass, fail, skip, figure) and figures."""

    def __init__(self, name: str, path: Path, folder: Path, device: str, quick: bool, limit_s: float):
        """folder: for files of all cases. device: cuda or cpu. quick: tiny shapes. limit_s: when the case is ended."""
        self.name, self.path, self.folder, self.device, self.quick = name, path, folder, device, quick
        self._ends = time.monotonic() + limit_s

    @property
    def seconds_left(self) -> float:
        return self._ends - time.monotonic()

    def check(self, name: str, passed: bool, **figures: Any) -> None:
        """Notes whether something is as it must be, with the figures that say so."""
        self._write(name, "pass" if passed else "fail", figures)

    def figures(self, name: str, **figures: Any) -> None:
        """Notes what was measured and cannot be wrong."""
        self._write(name, "figure", figures)

    def skip(self, name: str, reason: str) -> None:
        self._write(name, "skip", {"reason": reason})

    def _write(self, name: str, outcome: str, figures: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, "outcome": outcome, **figures}) + "\n")


def run_case(case: Case, folder: Path, device: str, quick: bool, limit_s: float) -> list[dict[str, Any]]:
    """Returns the results of a case, of which one says so where it was stopped at its limit or ended by an error."""
    device = "cpu" if case.on_cpu else device
    results, log = folder / f"{case.name}.jsonl", folder / f"{case.name}.txt"
    call = {"name": case.name, "path": str(results), "folder": str(folder), "device": device, "quick": quick}
    process = start(case.function, {**call, "limit_s": limit_s}, case.options, log)
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        code = None
        end(process)
    found = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    if code != 0:
        lines = log.read_text(errors="replace").splitlines()
        reason = (
            f"stopped at its limit of {limit_s:.0f} s" if code is None else f"ended with code {code}: {last(lines)}"
        )
        found.append({"name": case.name, "outcome": "fail", "reason": reason, "log": lines[-_LOG_LINES:]})
    return found


def start(
    function: str, call: Mapping[str, Any], options: Mapping[str, Any], log: Path, environment: Mapping[str, str] = {}
) -> subprocess.Popen:
    """Starts a function, MODULE:NAME, in a new process; call: the arguments of its Report."""
    paths = [str(TOOLS), str(TOOLS / "dev"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    hidden = ON_CPU if call["device"] == "cpu" else {}
    command = [sys.executable, "-m", "gpu_check_parts.case", function, json.dumps(call), json.dumps(dict(options))]
    with log.open("w") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **own, **hidden, **environment}
        )


def end(process: subprocess.Popen) -> None:
    """Kills a process and all that it started."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.kill()
    process.wait()


def free_port() -> int:
    """Returns a port of this machine that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def last(lines: list[str]) -> str:
    """Returns the last line of a log that says something."""
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def _main(function: str, call: str, options: str) -> None:
    arguments = json.loads(call)
    paths = {key: Path(arguments.pop(key)) for key in ("path", "folder")}
    report = Report(**paths, **arguments)
    module, _, name = function.partition(":")
    try:
        getattr(importlib.import_module(module), name)(report, **json.loads(options))
    except NotPossibleError as error:
        report.skip(report.name, str(error))


if __name__ == "__main__":
    # The module of this name has the exception that cases raise; this file, run as a program, is another one.
    importlib.import_module("gpu_check_parts.case")._main(*sys.argv[1:])
