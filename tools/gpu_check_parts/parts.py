"""The parts of the check, in order of importance, and the cases of each."""

from gpu_check_parts.case import Case

TITLES = {"a": "correctness", "b": "recipes", "c": "steps", "d": "dry run", "e": "host waits"}
PARTS = tuple(TITLES)
SHARES = {"a": 0.25, "b": 0.2, "c": 0.35, "d": 0.12, "e": 0.08}  # of the time


def cases(part: str, quick: bool) -> list[Case]:
    """Returns the cases of a part; quick: few and small ones."""
    return {"a": _correctness, "b": _recipes, "c": _steps, "d": _dry_run, "e": _host_waits}[part](quick)


def _correctness(quick: bool) -> list[Case]:
    return [
        Case("reference", "correctness:reference", on_cpu=True),
        Case("stages", "correctness:stages", {"stages": [3] if quick else [0, 1, 2, 3]}),
        Case("resume", "correctness:resume"),
        Case("two_ranks", "correctness:two_ranks", {"stages": [2] if quick else [2, 3]}),
    ]


def _recipes(quick: bool) -> list[Case]:
    settings = {
        "mini_mtil_smoke": ["tasks=[country_flags]", "train.iterations=15"],
        "mini_instruct_smoke": ["tasks=[yes_no]", "train.iterations=10"],
    }
    return [
        Case(recipe, "recipes:smoke", {"recipe": recipe, "settings": short if quick else []})
        for recipe, short in settings.items()
    ]


def _steps(quick: bool) -> list[Case]:
    return []


def _dry_run(quick: bool) -> list[Case]:
    return []


def _host_waits(quick: bool) -> list[Case]:
    return [
        Case(recipe, "host_waits:steps", {"recipe": recipe, "must_be_none": recipe == "mini_mtil_smoke"})
        for recipe in ("mini_mtil_smoke", "mini_instruct_smoke")
    ]
