"""The head of a report: the sentence that says how a run went, its facts, its key figures and what they mean."""

from r1p_dist.evaluation.score_matrix import change_from, mean_of, pad_row
from r1p_dist.page.parts import Part, Table, Text, Tile, number
from r1p_dist.report.run import RunFiles

MEANINGS = {
    "transfer": ("Transfer", "{quantity} on tasks not trained yet: how much zero-shot ability is kept"),
    "average": ("Average", "mean over all tasks and all moments of the stream"),
    "last": ("Last", "mean over all tasks after the last one"),
    "mft": ("Own task (MFT)", "mean {quantity} on each task right after its own training"),
    "mfn": ("Final (MFN)", "the same number as Last, under the name of the multimodal benchmarks"),
    "maa": ("MAA", "mean over the stream of the mean over the tasks seen so far"),
    "bwt": ("Backward transfer", "change of the earlier tasks since their own training, 1/(T-1)"),
    "bwt_coin": ("Backward transfer (CoIN)", "the same, with the last task counted, 1/T: MFN - MFT"),
    "forgetting": ("Forgetting", "loss of the earlier tasks since their best moment; lower is better"),
}
_ENDINGS = {"stopped": "The run was stopped. ", "failed": "The run failed. "}


def title(run: RunFiles) -> str:
    count = len(run.matrix.tasks)
    return f"{_method(run)} on {count} task{'s' * (count != 1)}"


def _method(run: RunFiles) -> str:
    return str(run.metrics.get("method") or run.config.get("method") or "run")


def sentence(run: RunFiles) -> str:
    """Return how the run went or goes: stream, method, Last against zero-shot, forgetting, what the merge cost."""
    matrix, metrics = run.matrix, run.metrics
    method, tasks = _method(run), len(matrix.tasks)
    stream = str(run.config.get("stream", "")).removesuffix("/stream.yaml").rstrip("/").rpartition("/")[2]
    stream = f" of {stream}" if stream else ""
    zero_shot, now = mean_of(matrix.zero_shot), mean_of(matrix.now)
    state = "" if run.has_ended else _progress(run)
    state = _ENDINGS.get(run.status.get("state", ""), state)
    if not matrix.trained:
        known = "" if zero_shot is None else f"; zero-shot is {number(zero_shot)} {matrix.unit}"
        return f"{state}Nothing is learnt yet of {tasks} task{'s' * (tasks != 1)}{stream}{known}."
    done = tasks if matrix.is_joint else len(matrix.trained)
    count = f"{done}" if done == tasks else f"{done} of {tasks}"
    # what is left of the stream counts as well: this is Last, of the moment
    what = f"{count} task{'s' * (tasks != 1)}{stream}"
    change = change_from(zero_shot, now)
    clauses = []
    if now is not None and change is not None:
        name = "Last" if done == tasks else "the mean over all tasks"
        by = number(change, signed=True)
        clauses.append(f"{name} is {number(now)} {matrix.unit} against {number(zero_shot)} zero-shot ({by})")
    if metrics.get("forgetting") is not None:
        clauses.append(f"forgetting is {number(metrics['forgetting'])} points")
    if (cost := merge_cost(run)) is not None:
        clauses.append(f"the merge cost {number(cost)} points per task" if cost > 0.05 else "the merge cost nothing")
    text = "; ".join(clauses)
    minutes = f" in {_duration(metrics['wall_seconds'])}" if metrics.get("wall_seconds") is not None else ""
    return f"{state}{method} learnt {what}{minutes}{': ' if text else ''}{text}."


def _progress(run: RunFiles) -> str:
    status = run.status
    task = f" {status['task']}" if status.get("task") else ""
    step = f" at step {status['step']}" if status.get("step") is not None else ""
    left = f", {status['steps_left']:,} steps to go" if isinstance(status.get("steps_left"), int) else ""
    return f"The run is {status.get('state', 'going on')}{task}{step}{left}. "


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def merge_cost(run: RunFiles) -> float | None:
    """Return how many points the merge took from a task, on average over those that were merged; None where unknown."""
    matrix = run.matrix
    before = pad_row(run.metrics.get("before_merge"), len(matrix.tasks))
    pairs = [(value, own) for value, own in zip(before, matrix.own, strict=True) if None not in (value, own)]
    return mean_of(value - own for value, own in pairs)


def tiles(run: RunFiles) -> list[Tile]:
    """Return the key figures, of what has been trained by now."""
    matrix, metrics = run.matrix, run.metrics
    zero_shot, now = mean_of(matrix.zero_shot), mean_of(matrix.now)
    found = [
        Tile("Zero-shot", number(zero_shot), f"{matrix.unit}, all tasks"),
        Tile("Last", number(now), f"{number(change_from(zero_shot, now), signed=True)} against zero-shot"),
        Tile("Own task", number(metrics.get("mft")), "right after its training"),
        Tile("Forgetting", number(metrics.get("forgetting")), "points, since the best moment"),
        Tile("Transfer", number(metrics.get("transfer")), "tasks not trained yet"),
        Tile("Merge cost", number(merge_cost(run)), "points per task"),
    ]
    return [tile for tile in found if tile.value != "–"]


def facts(run: RunFiles) -> list[str]:
    """Return what a reader wants to know of the circumstances."""
    metrics = run.metrics
    looks = {
        "seed": "seed {}",
        "world_size": "world size {}",
        "zero_stage": "ZeRO stage {}",
        "trainable_parameters": "{:,} trainable parameters",
    }
    found = [look.format(metrics[key]) for key, look in looks.items() if metrics.get(key) is not None]
    if collectives := metrics.get("collectives_per_step"):
        calls, sent = (sum(entry[key] for entry in collectives.values()) for key in ("calls", "bytes"))
        found.append(f"{calls} collective{'s' * (calls != 1)} with {sent / 1e6:.2f} MB per step")
    return found


def figures(run: RunFiles) -> list[Part]:
    """Return the figures of the continual-learning literature, and what could not be used."""
    metrics, matrix = run.metrics, run.matrix
    rows = [
        [name, number(metrics.get(key)), meaning.format(quantity=matrix.quantity)]
        for key, (name, meaning) in MEANINGS.items()
        if metrics.get(key) is not None
    ]
    zero_shot = mean_of(matrix.zero_shot)
    if not rows and zero_shot is None:
        return []
    rows.append(
        ["Zero-shot", number(zero_shot), "mean over all tasks before any training, the reference for all above"]
    )
    parts: list[Part] = [Table(["Figure", matrix.unit, "Meaning"], rows, frozenset({1}), 2)]
    return parts + _bad_samples(run)


def _bad_samples(run: RunFiles) -> list[Part]:
    """Return a line on samples that could not be used; nothing where all could."""
    bad = run.metrics.get("bad_samples", {})
    kind = "pictures" if run.matrix.quantity == "accuracy" else "conversations"
    left_out = [
        f"{count} {kind} of {task}"
        for task, count in zip(run.matrix.tasks, bad.get("evaluation", []), strict=False)
        if count
    ]
    parts = [f"left out of the evaluation: {', '.join(left_out)}"] if left_out else []
    if sum(bad.get("train", [])):
        parts.append(f"replaced by their neighbours in training: {sum(bad['train'])}")
    return [Text(f"Samples that cannot be decoded; {'; '.join(parts)}.")] if parts else []
