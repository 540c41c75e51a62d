"""The commands about a cluster: submit a run or a sweep, see how runs stand, read logs, cancel.

What submits and asks is imported once the arguments are read.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1p_dist.arguments import RECIPE_HELP, Parser, parse_with_overrides
from r1p_dist.errors import InputError
from r1p_dist.run_files import JOBS

if TYPE_CHECKING:
    from r1p_dist.cluster.profile import ClusterProfile
    from r1p_dist.cluster.runs import RunState
    from r1p_dist.cluster.search import Search
    from r1p_dist.cluster.sweep import Point, Sweep

_PROFILE_FLAGS = {
    "cluster": dict(choices=("slurm", "local", "debug"), help="where (default: slurm)"),
    "partition": dict(help="partition of the cluster"),
    "account": dict(help="account that pays"),
    "time": dict(metavar="D-H:M:S", help="time limit of a start; a run that needs more is queued again (24:00:00)"),
    "nodes": dict(type=int, metavar="N", help="nodes (1)"),
    "gpus_per_node": dict(type=int, metavar="N", help="accelerators per node, with one rank each"),
    "tasks_per_node": dict(type=int, metavar="N", help="ranks per node, where they are not one per accelerator"),
    "cpus_per_task": dict(type=int, metavar="N", help="processors per rank"),
    "signal_delay_s": dict(type=int, metavar="S", help="how long before the time limit the run saves (300)"),
}


def main(prog: str, argv: Sequence[str]) -> int:
    """Submits a run, or does what the first word says; 1 where a run that was waited for did not finish."""
    commands = {"sweep": submit_sweep, "status": print_status, "logs": print_log, "cancel": cancel_jobs}
    if argv and argv[0] in commands:
        return commands[argv[0]](f"{prog} {argv[0]}", argv[1:])
    return submit_run(prog, argv)


def submit_run(prog: str, argv: Sequence[str]) -> int:
    """Submits a run."""
    parser = Parser(
        prog=prog,
        usage=f"{prog} --recipe RECIPE [--profile PROFILE] [flags] [key.sub=value ...]\n"
        f"       {prog} sweep | status | logs | cancel --help",
        description="Submit a run to a cluster.",
    )
    parser.add_argument("--recipe", required=True, help=RECIPE_HELP)
    _add_flags(parser)
    arguments, words = parse_with_overrides(parser, argv)
    from r1p_dist.checks import check_run
    from r1p_dist.recipes import load_config

    profile = _profile(arguments)
    # before the submission what every rank would refuse after hours in the queue
    config = load_config(arguments.recipe, words, partial(check_run, ranks=profile.world_size))
    if arguments.dry_run:
        from r1p_dist.cluster.submission import dry_run

        print(dry_run(1, profile, config.run_dir / JOBS, _job_name(config.run_dir)))
        return 0
    from r1p_dist.cluster.submission import Submission, submit

    jobs = submit([Submission(config)], profile, config.run_dir / JOBS, _job_name(config.run_dir))
    print(f"job {jobs[0].job_id}: {config.run_dir}", flush=True)
    if profile.cluster == "debug":
        jobs[0].results()
    return _wait([config.run_dir]) if arguments.wait else 0


def submit_sweep(prog: str, argv: Sequence[str]) -> int:
    """Submits the points of a sweep; 1 where one that was waited for did not finish."""
    parser = Parser(
        prog=prog,
        usage=f"{prog} --recipe RECIPE [flags] key=a,b,c [key.sub=value ...]\n       {prog} --file SWEEP.yaml [flags]",
        description="Train a recipe at many points. The same command again submits what failed, and only that.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--recipe", help=RECIPE_HELP)
    source.add_argument(
        "--file", type=Path, help="a YAML file with recipe and parameters; see r1p_dist/cluster/sweep.py"
    )
    parser.add_argument("--folder", type=Path, help="gets a folder per point (runs/<recipe>-sweep)")
    parser.add_argument("--parallel", type=int, metavar="N", help="points that run at a time")
    parser.add_argument("--samples", type=int, metavar="N", help="draw N points instead of all combinations")
    parser.add_argument("--sweep-seed", type=int, default=0, metavar="N", help="of the drawing (0)")
    parser.add_argument(
        "--sampler", choices=("tpe", "random"), help="choose each point by those before (tpe), by Optuna; waits for all"
    )
    parser.add_argument("--prune", action="store_true", help="end a point that falls behind the others; tpe by default")
    _add_flags(parser)
    arguments, words = parse_with_overrides(parser, argv)
    for flag, value in (("--parallel", arguments.parallel), ("--samples", arguments.samples)):
        if value is not None and value < 1:
            parser.error(f"{flag} {value}: must be at least 1")
    profile = _profile(arguments)
    from r1p_dist.cluster.submission import dry_run
    from r1p_dist.cluster.sweep import Sweep, SweepFile

    if arguments.file is None:
        sweep = Sweep.parse(arguments.recipe, words, arguments.samples, arguments.sweep_seed)
    elif words or arguments.samples or arguments.sweep_seed:
        parser.error("--file holds the whole sweep; write overrides, samples and seed into it")
    else:
        sweep = Sweep.load(SweepFile.load(arguments.file))
    stem = (arguments.file or Path(sweep.recipe)).stem
    folder = arguments.folder or Path("runs") / f"{stem}-sweep"
    if not (arguments.sampler or arguments.prune):
        return _submit_all(sweep, folder, profile, arguments)
    if arguments.dry_run:
        print(dry_run(1, profile, folder / JOBS, _job_name(folder)))
        return 0
    search = _search_class()(
        sweep,
        folder,
        profile,
        _job_name(folder),
        arguments.sampler or "tpe",
        arguments.parallel or 1,
        arguments.prune,
    )
    return _end_sweep(folder, search.run(), is_over=True)


def _search_class() -> type[Search]:
    try:
        from r1p_dist.cluster.search import Search
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        raise InputError("--sampler, --prune: need Optuna; pip install 'r1p-dist[sweep]' brings it") from error
    return Search


def _submit_all(sweep: Sweep, folder: Path, profile: ClusterProfile, arguments: argparse.Namespace) -> int:
    """Submits the points of a grid or a random sweep."""
    from r1p_dist.cluster.runs import wait_for
    from r1p_dist.cluster.submission import dry_run
    from r1p_dist.cluster.sweep import make_points
    from r1p_dist.cluster.sweep_table import write_sweep_file
    from r1p_dist.cluster.sweeping import submit_points

    points = make_points(sweep, folder, profile.world_size)
    good = [point for point in points if point.config is not None]
    if not good:
        _print_refusals(points)
        raise InputError(f"none of the {len(points)} points can be trained; see the reasons above")
    if arguments.dry_run:
        _print_refusals(points)
        print(dry_run(len(good), profile, folder / JOBS, _job_name(folder), arguments.parallel))
        return 0
    refused = {point.name: point.refused for point in points if point.refused is not None}
    splits = {point.name: point.config.data.evaluate_on for point in good}
    write_sweep_file(folder, {point.name: point.values for point in points}, refused, splits)
    submitted = submit_points(good, folder, profile, _job_name(folder), arguments.parallel)
    print(f"{len(points)} points, {len(submitted)} submitted now: {folder}", flush=True)
    if arguments.wait:
        wait_for([point.config.run_dir for point in good])
    return _end_sweep(folder, points, is_over=arguments.wait)


def _end_sweep(folder: Path, points: Sequence[Point], is_over: bool) -> int:
    """Writes the table and prints how the points stand; 1 where all should have ended and one failed."""
    from r1p_dist.cluster.runs import describe_runs
    from r1p_dist.cluster.sweep_table import best_of, pruned_points, split_in_words, write_best, write_sweep_table

    _print_refusals(points)
    rows = write_sweep_table(folder, ask_cluster=True)
    print_states(describe_runs([point.config.run_dir for point in points if point.config is not None]))
    if (best := best_of(rows)) is not None:
        print(f"best by Last: {best.name}: {best.best_metric:.1f} on {split_in_words(best.split)}")
        print(f"the table: {folder / 'sweep.csv'}; the best as a recipe: {write_best(folder, best)}")
    pruned = pruned_points(folder)
    return 0 if not is_over or all(row.state in ("finished", "refused") or row.name in pruned for row in rows) else 1


def _print_refusals(points: Sequence[Point]) -> None:
    for point in points:
        if point.refused is not None:
            print(f"refused: {point.name}: {point.refused}")


def print_status(prog: str, argv: Sequence[str]) -> int:
    """Prints a line per run."""
    parser = Parser(prog=prog, description="Say how runs stand.")
    parser.add_argument("folders", type=Path, nargs="*", default=[Path("runs")], help="with runs in them (runs)")
    arguments = parser.parse_args(argv)
    from r1p_dist.cluster.runs import describe_runs, find_runs

    states = describe_runs(find_runs(arguments.folders))
    if not states:
        raise InputError(f"{', '.join(map(str, arguments.folders))}: no run and no job in there")
    print_states(states)
    return 0


def print_log(prog: str, argv: Sequence[str]) -> int:
    """Prints what a run's job printed."""
    parser = Parser(prog=prog, description="Print what a run's job printed.")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the job ends")
    parser.add_argument("--rank", type=int, default=0, help="which rank's (0)")
    arguments = parser.parse_args(argv)
    from r1p_dist.cluster.runs import read_log

    for part in read_log(arguments.run, arguments.rank, arguments.follow):
        print(part, end="", flush=True)
    return 0


def cancel_jobs(prog: str, argv: Sequence[str]) -> int:
    """Ends the jobs of runs."""
    parser = Parser(prog=prog, description="End the jobs of runs; a run that trains saves first.")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of the runs")
    arguments = parser.parse_args(argv)
    from r1p_dist.cluster.scheduler import JobRecord, cancel

    for run_dir in arguments.runs:
        record = JobRecord.read(run_dir)
        if record is None:
            raise InputError(f"{run_dir}: no job was submitted for this run")
        cancel(record)
        print(f"job {record.job_id} is told to end: {run_dir}")
    return 0


def print_states(states: Sequence[RunState]) -> None:
    """Prints one line per run, and below it the error of one that ended too early."""
    header = ("run", "state", "method", "task", "step", "samples/s", "left", "limit in", "job")
    rows = [
        (
            str(state.run_dir),
            state.state,
            *("" if value is None else str(value) for value in (state.method, state.task, state.step)),
            "" if state.samples_per_second is None else f"{state.samples_per_second:.1f}",
            "" if state.seconds_left is None else _duration(state.seconds_left),
            state.job_time_left or "",
            state.job.job_id if state.job else "",
        )
        for state in states
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row, error in zip([header, *rows], [None, *(state.error for state in states)], strict=True):
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
        if error:
            print(f"    {error}")


def _wait(run_dirs: Sequence[Path]) -> int:
    from r1p_dist.cluster.runs import wait_for

    states = wait_for(run_dirs)
    print_states(states)
    return 0 if all(state.is_finished for state in states) else 1


def _add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("cluster", "laid over the profile")
    group.add_argument("--profile", help="a name in launchers/clusters or the path of a YAML file")
    for name, options in _PROFILE_FLAGS.items():
        group.add_argument(f"--{name.replace('_', '-')}", **options)
    group.add_argument(
        "--slurm", action="append", default=[], metavar="KEY=VALUE", help="any other option of sbatch; may be repeated"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch script and stop")
    parser.add_argument("--wait", action="store_true", help="wait for the end; exit code 1 if a run did not finish")


def _profile(arguments: argparse.Namespace) -> ClusterProfile:
    flags: dict[str, Any] = {name: getattr(arguments, name) for name in _PROFILE_FLAGS}
    options: dict[str, str | bool] = {}
    for word in arguments.slurm:
        key, separator, value = word.partition("=")
        options[key.removeprefix("--")] = value if separator else True
    from r1p_dist.cluster.profile import ClusterProfile

    return ClusterProfile.load(arguments.profile, flags | {"slurm": options})


def _job_name(run_dir: Path) -> str:
    return f"r1p-{run_dir.name}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    days, hours = minutes // 1440, minutes // 60 % 24
    return f"{days}-{hours:02d}:{minutes % 60:02d}" if days else f"{hours}:{minutes % 60:02d}"
