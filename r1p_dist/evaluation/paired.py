"""What runs on the same seeds and test samples say of each other: paired differences, ranks, bootstrap intervals."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from r1p_dist.evaluation.comparison import COLUMNS, PAIRED, ZERO_SHOT, Figures, Key, Result, Table, cell
from r1p_dist.run_files import CORRECT_FILE

BOOTSTRAP_DRAWS = 10_000
_AT_ONCE = 1 << 22  # samples that are drawn at a time

# task -> (samples,): 1.0 for the right answer, values between or above where the metric gives them (score / 100)
Correct = dict[str, np.ndarray]


class NoIntervalError(Exception):
    """Why there are no per-sample results to draw from."""


class Answers:
    """How right each test sample was in the last evaluation of each run, read once."""

    def __init__(self, results: Mapping[Key, Result]) -> None:
        self._read: dict[Key, Correct | NoIntervalError] = {}
        for key, result in results.items():
            try:
                self._read[key] = read_correct(result)
            except NoIntervalError as reason:
                self._read[key] = reason

    def of(self, key: Key) -> Correct:
        """Raises NoIntervalError where the run has none."""
        found = self._read[key]
        if isinstance(found, NoIntervalError):
            raise found
        return found

    def seeds_of(self, label: str) -> list[int]:
        """Return the seeds of the label's runs."""
        return sorted(seed for name, seed in self._read if name == label)

    def key_of(self, label: str, seed: int) -> Key | None:
        """Return the label's run that stands for a seed, None without one. Zero-shot's one run stands for all."""
        if label == ZERO_SHOT:
            seed = next(iter(self.seeds_of(label)), seed)
        return (label, seed) if (label, seed) in self._read else None

    def pairs(self, label: str, other: str) -> Iterator[tuple[int, Key, Key]]:
        """Yield each seed that both have, with their runs."""
        for seed in self.seeds_of(other if label == ZERO_SHOT else label):
            mine, theirs = self.key_of(label, seed), self.key_of(other, seed)
            if mine and theirs:
                yield seed, mine, theirs


def read_correct(result: Result) -> Correct:
    """Return how right each test sample was in the run's last evaluation, from its correct.jsonl.

    A line has a digit per sample, or a list of score / 100 where the metric is graded. Raises NoIntervalError when the
    file is missing or does not agree with metrics.json.
    """
    path, metrics = result.folder / CORRECT_FILE, result.metrics
    if not path.is_file():
        raise NoIntervalError(f"{path.parent.name} has no correct.jsonl")
    latest: dict[str, tuple[int, str | list[float]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["row"] >= latest.get(record["task"], (0, ""))[0]:
            latest[record["task"]] = (record["row"], record["correct"])
    correct = {task: np.array([float(mark) for mark in marks]) for task, (_, marks) in latest.items()}
    for task, accuracy in zip(metrics["tasks"], metrics["accuracy"][-1], strict=True):
        if task not in correct or abs(100 * correct[task].mean() - accuracy) > 0.01:
            raise NoIntervalError(f"correct.jsonl of {path.parent.name} does not agree with its metrics.json on {task}")
    return {task: correct[task] for task in metrics["tasks"]}


def paired_differences(reference: str, other: str, answers: Answers, figures: Mapping[Key, Figures]) -> dict[str, Any]:
    """Return the differences reference - other of each figure in PAIRED, one per seed that both have.

    `interval` is that of `last_interval`, or `no_interval` says why there is none.
    """
    pairs = list(answers.pairs(reference, other))
    differences: dict[str, Any] = {"seeds": [seed for seed, _, _ in pairs]}
    for name in PAIRED:
        values = [(figures[mine][name], figures[theirs][name]) for _, mine, theirs in pairs]
        differences[name] = [mine - theirs for mine, theirs in values if None not in (mine, theirs)]
    try:
        differences["interval"] = last_interval([(answers.of(mine), answers.of(theirs)) for _, mine, theirs in pairs])
    except NoIntervalError as reason:
        differences["no_interval"] = str(reason)
    return differences


def last_interval(pairs: Sequence[tuple[Correct, Correct]]) -> list[float]:
    """Return the 95 % bootstrap interval of the difference of Last, in points, samples drawn anew within each task.

    pairs: both methods' results, per seed. A sample's difference is its mean over the seeds, so the interval is about
    the test samples; the spread over seeds is apart from it.
    """
    if not pairs:
        raise NoIntervalError("no seed was finished by both")
    generator = np.random.default_rng(0)
    tasks = list(pairs[0][0])
    draws = np.zeros(BOOTSTRAP_DRAWS)
    for task in tasks:
        _check_samples(task, [side for pair in pairs for side in pair])
        difference = np.mean([mine[task] - theirs[task] for mine, theirs in pairs], axis=0)  # (samples,)
        chosen = generator.integers(len(difference), size=(BOOTSTRAP_DRAWS, len(difference)))
        draws += difference[chosen].mean(axis=1) / len(tasks)
    return [float(100 * bound) for bound in np.percentile(draws, [2.5, 97.5])]


def ranks_by_last(labels: Sequence[str], answers: Answers) -> dict[str, Any]:
    """Return under `ranks` what `rank_intervals` gives for all labels that can be ranked, over the `seeds` they share.

    `missing` is why a label is not among them, by label.
    """
    missing, seeds_of = {}, {}
    for label in labels:
        seeds, reason = [], "no run is finished"
        for seed in answers.seeds_of(label):
            try:
                answers.of((label, seed))
                seeds.append(seed)
            except NoIntervalError as error:
                reason = str(error)
        if seeds:
            seeds_of[label] = seeds
        else:
            missing[label] = reason
    several = [set(seeds) for label, seeds in seeds_of.items() if label != ZERO_SHOT]
    shared = sorted(set.intersection(*several)) if several else []
    found: dict[str, Any] = {"seeds": shared, "ranks": {}, "missing": missing}
    if not shared:
        missing |= dict.fromkeys(seeds_of, "no seed is shared by all methods that have a correct.jsonl")
        return found
    keys = {label: [answers.key_of(label, seed) for seed in shared] for label in seeds_of}
    try:
        found["ranks"] = rank_intervals({label: [answers.of(key) for key in own if key] for label, own in keys.items()})
    except NoIntervalError as reason:
        missing |= dict.fromkeys(seeds_of, str(reason))
    return found


def rank_intervals(correct: Mapping[str, Sequence[Correct]]) -> dict[str, list[int]]:
    """Return of each label its rank by Last, 1 the highest, and the ends of the 95 % bootstrap interval of the rank.

    correct: the label's results per seed, of the same seeds. Samples are drawn anew within each task, the same for all
    labels; a sample's result is its mean over the seeds. Labels with the same Last share the better rank.
    """
    generator = np.random.default_rng(0)
    labels = list(correct)
    tasks = list(correct[labels[0]][0])
    last, draws = np.zeros(len(labels)), np.zeros((BOOTSTRAP_DRAWS, len(labels)))
    for task in tasks:
        _check_samples(task, [result for results in correct.values() for result in results])
        marks = np.stack([np.mean([result[task] for result in correct[label]], axis=0) for label in labels])
        samples = marks.shape[1]  # of (labels, samples)
        last += marks.mean(axis=1)
        step = max(1, _AT_ONCE // samples)
        for part in (draws[start : start + step] for start in range(0, BOOTSTRAP_DRAWS, step)):
            chosen = generator.integers(samples, size=(len(part), samples))
            places = chosen + samples * np.arange(len(part))[:, None]
            counts = np.bincount(places.ravel(), minlength=places.size).reshape(places.shape)
            part += counts @ marks.T / samples
    ranks = _ranks(draws)
    # a rank that was drawn, none between two
    low, high = np.percentile(ranks, [2.5, 97.5], axis=0, method="inverted_cdf")
    return {
        label: [int(rank) for rank in own] for label, *own in zip(labels, _ranks(last[None])[0], low, high, strict=True)
    }


def _ranks(scores: np.ndarray) -> np.ndarray:
    """Return 1 + how many of a row are higher, (draws, labels). What rounding alone tells apart is equal."""
    scores = scores.round(9)
    return 1 + (scores[:, None, :] > scores[:, :, None]).sum(axis=2)


def _check_samples(task: str, results: Sequence[Correct]) -> None:
    if any(task not in result for result in results) or len({len(result[task]) for result in results}) != 1:
        raise NoIntervalError(f"the runs were not evaluated on the same samples of {task}")


def paired_table(differences: Mapping[str, dict[str, Any]]) -> Table:
    """Return the table other method x mean difference ± sample standard deviation over seeds."""
    rows = []
    for label, pair in differences.items():
        interval = "{:+.1f} to {:+.1f}".format(*pair["interval"]) if "interval" in pair else "missing"
        cells = [cell(pair[name], is_signed=True) for name in PAIRED]
        rows.append([label, *cells, interval, str(len(pair["seeds"]))])
    return Table(["Other", *(COLUMNS[name] for name in PAIRED), "Last, 95 % over test samples", "Seeds"], rows)
