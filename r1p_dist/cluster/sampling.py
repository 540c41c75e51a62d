"""Which point a sweep tries next, and which falls behind: Optuna's samplers and its pruning.

A study is made anew from what the sweep's folder holds, each time that it is asked. So the folder is all that a sweep
resumes from, and what is drawn depends on the seed and on what finished before, not on who asked when.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from r1p_dist.cluster.sweep import Range, Sweep
from r1p_dist.data.order import digest_number

_MOST_DRAWS = 50  # for a point that is not there yet
# Finished points, before one is compared with them.
_LEAST_OTHERS = 4
_SAMPLERS = {
    # points that still train count as bad ones, so that the next is tried elsewhere
    "tpe": partial(optuna.samplers.TPESampler, multivariate=True, constant_liar=True),
    "random": optuna.samplers.RandomSampler,
}


@dataclass(frozen=True)
class Outcome:
    """What came of a point by now. state: `complete`, `running`, `pruned` or `fail`.

    curve: after each task that is trained, the mean score over all tasks of the stream; its last value is Last.
    """

    values: Mapping[str, str]
    state: str
    curve: Sequence[float] = ()


def draw(sweep: Sweep, outcomes: Sequence[Outcome], sampler: str) -> dict[str, str] | None:
    """Returns key -> value of the next point; None where the sampler finds none that is not there yet."""
    known = [outcome.values for outcome in outcomes]
    study = _study(sweep, outcomes)
    for attempt in range(_MOST_DRAWS):
        study.sampler = _sampler(sampler, digest_number("sweep", sweep.seed, len(known), attempt) % 2**32)
        trial = study.ask(_distributions(sweep))
        values = {key: _as_text(sweep, key, value) for key, value in trial.params.items()}
        if values not in known:
            return values
        study.tell(trial, state=TrialState.FAIL)
    return None


def falls_behind(sweep: Sweep, outcomes: Sequence[Outcome], place: int) -> bool:
    """Returns whether the point at `place`, which trains, has a best score below the median of finished ones as far."""
    pruner = optuna.pruners.MedianPruner(n_startup_trials=_LEAST_OTHERS, n_min_trials=_LEAST_OTHERS)
    study = _study(sweep, outcomes)
    return bool(pruner.prune(study, study.trials[place]))


def _sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # options that Optuna may still change
        return _SAMPLERS[name](seed=seed)


def _study(sweep: Sweep, outcomes: Sequence[Outcome]) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    for outcome in outcomes:
        study.add_trial(
            create_trial(
                state=TrialState[outcome.state.upper()],
                params={key: _value(sweep, key, text) for key, text in outcome.values.items()},
                distributions=_distributions(sweep),
                value=outcome.curve[-1] if outcome.state in ("complete", "pruned") else None,
                intermediate_values=dict(enumerate(outcome.curve)),
            )
        )
    return study


def _distributions(sweep: Sweep) -> dict[str, BaseDistribution]:
    return {key: _distribution(values) for key, values in sweep.parameters.items()}


def _distribution(values: Sequence[str] | Range) -> BaseDistribution:
    if not isinstance(values, Range):
        return CategoricalDistribution(values)
    if values.kind == "integer":
        return IntDistribution(int(values.low), int(values.high))
    return FloatDistribution(values.low, values.high, log=values.kind == "loguniform")


def _as_text(sweep: Sweep, key: str, value: str | float) -> str:
    chosen = sweep.parameters[key]
    return chosen.as_text(value) if isinstance(chosen, Range) else value


def _value(sweep: Sweep, key: str, text: str) -> str | float:
    """Returns a value as Optuna has it; a rounded number may lie a little beyond its range."""
    chosen = sweep.parameters[key]
    if not isinstance(chosen, Range):
        return text
    number = min(max(float(text), chosen.low), chosen.high)
    return int(number) if chosen.kind == "integer" else number
