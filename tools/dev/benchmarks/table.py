"""Print the JSON files of a folder as the Markdown tables of docs/performance.md."""

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

from r1p_dist.errors import InputError


def run(arguments: argparse.Namespace) -> str:
    """Returns the tables of all results in the folder, by the name of the benchmark."""
    tables = []
    for name, make in TABLES.items():
        results = [
            json.loads(path.read_text(encoding="utf-8")) for path in sorted(arguments.folder.glob(f"{name}*.json"))
        ]
        if results:
            tables.append(make(results))
    if not tables:
        raise InputError(f"{arguments.folder}: no results of a benchmark; write them with --json")
    return "\n\n".join(tables)


def _step(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        dropout = f"{result['dropout']} {result['dropout_kind']}" if result["dropout"] else "none"
        for work in ("same_work", "end_to_end"):
            ratios = [result[work].get(key) for key in RATIOS]
            rows.append([result["dtype"], dropout, work.replace("_", " "), *map(_number, ratios)])
    return _markdown(["dtype", "dropout", "work", *RATIOS], rows)


def _steady(results: Sequence[dict[str, Any]]) -> str:
    rows = [
        [
            result["model"],
            str(result["batch"]),
            result["dtype"],
            work.replace("_", " "),
            _number(result[work]["steady/step"]),
        ]
        for result in results
        for work in ("same_work", "end_to_end")
    ]
    return _markdown(["model", "batch", "dtype", "work", "steady/step"], rows)


def _llava(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        for name in result["memory_mb"]:
            ratios = [result[key].get(f"{name}/packed", 1.0) for key in ("time", "memory")]
            head = [result["model"], result["dtype"], name]
            rows.append([*head, *map(_number, ratios), _number(result["memory_mb"][name])])
    return _markdown(["model", "dtype", "step", "time / packed", "memory / packed", "MB"], rows)


def _precision(results: Sequence[dict[str, Any]]) -> str:
    (result,) = results
    rows = [[name, *map(_number, values)] for name, values in result["arrives"].items()]
    return _markdown(["update / output in bf16", *(f"{size:.1e}" for size in result["update/output"])], rows)


def _inference(results: Sequence[dict[str, Any]]) -> str:
    return _markdown(["model", "merged / plain"], [[r["model"], _number(r["merged/plain"])] for r in results])


def _tasks(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        for count in result["step"]:
            rows.append([result["model"], count, *(_number(result[key][count]) for key in TASK_COLUMNS)])
    return _markdown(["model", "past tasks", *TASK_COLUMNS], rows)


def _boundary(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        begins = [_number(value) for value in result["begin"].values()]
        growth = _number(max(result["tensors_mb"].values()))
        head = [result["model"], result["method"], str(result["batch"]), _number(result["end"])]
        rows.append([*head, *begins, growth, _number(result["memory_mb"])])
    counts = [f"begin, {count}" for count in results[0]["begin"]]
    return _markdown(["model", "method", "batch", "end", *counts, "tensors_mb", "memory_mb"], rows)


def _scaling(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        for vote, speeds in result["samples_per_second"].items():
            for ranks, speed in speeds.items():
                sent = result["collectives"][vote].get(ranks, {}).values()
                calls, size = (sum(entry[key] for entry in sent) for key in ("calls", "bytes"))
                rows.append([vote, ranks, _number(speed), str(calls), _number(size / 1e6)])
    return _markdown(["vote", "ranks", "samples/s", "collectives per step", "MB per step"], rows)


def _data(results: Sequence[dict[str, Any]]) -> str:
    (result,) = results
    rows = [["loader / plain webdataset, samples per second", _number(result["loader/webdataset"])]]
    for name, values in result["pil/decoder"].items():
        if name != "pil":
            rows += [[f"speed of {name} / PIL, {what}", _number(values[what])] for what in DATA_COLUMNS]
    rows += [[f"data_wait of tiny, {n} workers", _number(share)] for n, share in result["data_wait"].items()]
    return _markdown(["pictures of 500 by 375, input 224", ""], rows)


def _checkpoint(results: Sequence[dict[str, Any]]) -> str:
    rows = [[result["model"], *(_number(result[key]) for key in CHECKPOINT_COLUMNS)] for result in results]
    return _markdown(["model", *CHECKPOINT_COLUMNS], rows)


def _gpu(results: Sequence[dict[str, Any]]) -> str:
    """Two tables: what each part of the check came to, and what part c found, both per card."""
    parts, steps = [], []
    for result in results:
        card = result["machine"]["card"]
        for part in result["parts"].values():
            outcomes = [entry["outcome"] for entry in part["results"]]
            counts = [str(outcomes.count(outcome)) for outcome in ("pass", "fail", "skip")]
            parts.append([card, part["title"], part["outcome"], *counts])
        steps += [[card, *row] for row in _gpu_steps(result["parts"].get("c", {}).get("results", []))]
    tables = [_markdown(["card", "part", "outcome", "passed", "failed", "skipped"], parts)]
    return "\n\n".join([*tables, *([_markdown(["card", "model, batch", *GPU_COLUMNS], steps)] if steps else [])])


def _gpu_steps(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    found = {entry["name"]: entry for entry in results}
    rows = []
    for name, entry in found.items():
        if "step/limit" not in entry:
            continue
        memory, forward, compiled = (found.get(f"{name}: {kind}", {}) for kind in ("memory", "forward", "compiled"))
        values = {
            **{**compiled, **entry, **memory},
            "merged/plain": forward.get("merged/plain"),
            "samples/s": entry["samples_per_second"]["step"],
            "utilisation": entry.get("utilisation", {}).get("step"),
            "GB": memory.get("gb", {}).get("step"),
        }
        rows.append([name, *(_number(values.get(key)) for key in GPU_COLUMNS)])
    return rows


RATIOS = ("step/limit", "peft/step", "flops step/limit", "memory step/limit")
TASK_COLUMNS = ("step", "switch_s", "stored_mb", "tensors_mb", "resident_mb")
CHECKPOINT_COLUMNS = ("step with a save / step", "take / step", "bytes_per_number")
DATA_COLUMNS = ("decode", "decode and transform")
GPU_COLUMNS = "samples/s utilisation GB step/limit compiled/limit steady/step peft/step".split() + [
    "memory step/limit",
    "merged/plain",
]
TABLES: dict[str, Callable[[Sequence[dict[str, Any]]], str]] = {
    "step": _step,
    "steady": _steady,
    "llava": _llava,
    "precision": _precision,
    "inference": _inference,
    "tasks": _tasks,
    "boundary": _boundary,
    "scaling": _scaling,
    "data": _data,
    "checkpoint": _checkpoint,
    "gpu/": _gpu,
}


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
