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
    """How right each test sample was by each figure of PAIRED, of each run, read once."""

    def __init__(self, results: Mapping[Key, Result]) -> None:
        self._read = {key: read_correct(result) for key, result in results.items()}

    def of(self, key: Key, figure: str = "last") -> Correct:
        """Raises NoIntervalError where the run has none."""
        found = self._read[key][figure]
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


def read_correct(result: Result) -> dict[str, Correct | NoIntervalError]:
    """Return how right each test sample was by each figure of PAIRED that the run has, from its correct.jsonl.

    A line has a digit per sample, or a list of score / 100 where the metric is graded. A figure that is a mean over
    evaluations (`continual_metrics`) takes the sample's mean over the same ones; a row without a line is as the row
    before. In place of what cannot be had, as where file and metrics.json disagree, stands the reason.
    """
    figures = [name for name in PAIRED if result.metrics.get(name) is not None]
    path = result.folder / CORRECT_FILE
    if not path.is_file():
        return dict.fromkeys(figures, NoIntervalError(f"{path.parent.name} has no correct.jsonl"))
    marks: dict[str, dict[int, np.ndarray]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        own = np.array([float(mark) for mark in record["correct"]])
        marks.setdefault(record["task"], {})[record["row"]] = own
    found: dict[str, Correct | NoIntervalError] = {}
    for figure in figures:
        try:
            found[figure] = _mean_marks(result, marks, figure)
        except NoIntervalError as reason:
            found[figure] = reason
    return found


def _mean_marks(result: Result, marks: Mapping[str, Mapping[int, np.ndarray]], figure: str) -> Correct:
    accuracy, found = result.metrics["accuracy"], {}
    final = len(accuracy) - 1
    for number, task in enumerate(result.metrics["tasks"]):
        rows = {"transfer": range(1, number + 1), "average": range(1, final + 1), "last": [final]}[figure]
        taken = []
        for row in rows:
            known = [earlier for earlier in marks.get(task, {}) if earlier <= row]
            own = marks[task][max(known)] if known else None
            if own is None or abs(100 * own.mean() - accuracy[row][number]) > 0.01:
                name = result.folder.name
                raise NoIntervalError(f"correct.jsonl of {name} does not agree with its metrics.json on {task}")
            taken.append(own)
        if taken:
            found[task] = np.mean(taken, axis=0)
    return found


def paired_differences(reference: str, other: str, answers: Answers, figures: Mapping[Key, Figures]) -> dict[str, Any]:
    """Return the differences reference - other of each figure in PAIRED, one per seed where both have it.

    `intervals` has `interval` of each, and `no_interval` says why one is missing that could be there.
    """
    pairs = list(answers.pairs(reference, other))
    differences: dict[str, Any] = {"seeds": [seed for seed, _, _ in pairs], "intervals": {}}
    if not pairs:
        differences["no_interval"] = "no seed was finished by both"
    for name in PAIRED:
        both = [(mine, theirs) for _, mine, theirs in pairs if None not in (figures[mine][name], figures[theirs][name])]
        differences[name] = [figures[mine][name] - figures[theirs][name] for mine, theirs in both]
        if both:
            try:
                marks = [(answers.of(mine, name), answers.of(theirs, name)) for mine, theirs in both]
                differences["intervals"][name] = interval(marks)
            except NoIntervalError as reason:
                differences["no_interval"] = str(reason)
    return differences


def interval(pairs: Sequence[tuple[Correct, Correct]]) -> list[float]:
    """Return the 95 % bootstrap interval of the difference of a figure, in points, samples drawn anew within each task.

    pairs: both methods' results, per seed. A sample's difference is its mean over the seeds, so the interval is about
    the test samples; the spread over seeds is apart from it.
    """
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
    """Return the table other method x mean difference ± sample standard deviation over seeds, and its interval."""
    header = ["Other", *(text for name in PAIRED for text in (COLUMNS[name], f"{COLUMNS[name]}, 95 %")), "Seeds"]
    rows = []
    for label, pair in differences.items():
        cells = []
        for name in PAIRED:
            bounds = pair["intervals"].get(name)
            without = "missing" if pair[name] else "–"
            cells += [cell(pair[name], is_signed=True), "{:+.1f} to {:+.1f}".format(*bounds) if bounds else without]
        rows.append([label, *cells, str(len(pair["seeds"]))])
    return Table(header, rows)
