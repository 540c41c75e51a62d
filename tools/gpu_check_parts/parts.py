"""The parts of the check, in order of importance, and the cases of each."""

from typing import Any

from gpu_check_parts.case import Case

TITLES = {"a": "correctness", "b": "recipes", "c": "steps", "d": "dry run", "e": "host waits", "f": "methods"}
PARTS = tuple(TITLES)
SHARES = {"a": 0.21, "b": 0.13, "c": 0.33, "d": 0.11, "e": 0.05, "f": 0.17}  # of the time
SMOKE_RECIPES = ("mini_mtil_smoke", "mini_instruct_smoke")


def cases(part: str, quick: bool) -> list[Case]:
    """Returns the cases of a part; quick: few and small ones."""
    makers = {"a": _correctness, "b": _recipes, "c": _steps, "d": _dry_run, "e": _host_waits, "f": _methods}
    return makers[part](quick)


def _correctness(quick: bool) -> list[Case]:
    if quick:
        return [Case("one_rank", "gpu_check_parts.correctness:quick")]
    return [
        Case("reference", "gpu_check_parts.correctness:reference", on_cpu=True),
        Case("stages", "gpu_check_parts.correctness:stages", {"stages": [0, 1, 2, 3]}),
        Case("resume", "gpu_check_parts.correctness:resume"),
        Case("two_ranks", "gpu_check_parts.correctness:two_ranks", {"stages": [2, 3]}),
    ]


def _recipes(quick: bool) -> list[Case]:
    if quick:
        settings = ["tasks=[fashion]", "train.iterations=15"]
        return [
            Case(
                "mini_mtil_smoke", "gpu_check_parts.recipes:smoke", {"recipe": "mini_mtil_smoke", "settings": settings}
            )
        ]
    return [Case(recipe, "gpu_check_parts.recipes:smoke", {"recipe": recipe}) for recipe in SMOKE_RECIPES]


def _steps(quick: bool) -> list[Case]:
    if quick:
        return [Case("tiny", "gpu_check_parts.steps:tiny")]
    options: list[dict[str, Any]] = [
        {"name": "ViT-B-16", "batch": 256},
        {"name": "ViT-B-16", "batch": 32},
        {"name": "ViT-L-14", "batch": 64},
        {"name": "llava-1.5-7b", "batch": 8},
        {"name": "ViT-bigG-14", "batch": 16, "checkpointing": True},
        {"name": "ViT-B-16", "batch": 32, "dropout": 0.2},  # the paper's own settings
        {"name": "ViT-B-16", "batch": 256, "compiled": True},
        {"name": "ViT-B-16", "batch": 32, "compiled": True},
        {"name": "ViT-L-14", "batch": 64, "compiled": True},
        {"name": "llava-1.5-7b", "batch": 8, "compiled": True},
    ]
    needs_s = {"llava-1.5-7b": 50.0, "ViT-bigG-14": 40.0}  # loading alone takes so long, and a few steps
    return [
        Case(
            "-".join(str(key if value is True else value) for key, value in o.items()),
            "gpu_check_parts.steps:model",
            o,
            needs_s.get(o["name"], 20.0),
        )
        for o in options
    ]


def _dry_run(quick: bool) -> list[Case]:
    if quick:
        options = [{"name": "tiny", "recipe": "mini_mtil_dac", "ranks": 8, "batch": 2, "checkpointing": False}]
    else:
        options = [
            {"name": "ViT-bigG-14", "recipe": "mini_mtil_dac", "ranks": 64, "batch": 16, "checkpointing": True},
            {"name": "llava-1.5-7b", "recipe": "mini_instruct", "ranks": 64, "batch": 8, "checkpointing": True},
        ]
    needs_s = {"llava-1.5-7b": 90.0, "ViT-bigG-14": 40.0}  # their weights are drawn on the host, as in training
    return [
        Case(f"dry-run-{o['name']}", "gpu_check_parts.dry_run:model", o, needs_s.get(o["name"], 20.0)) for o in options
    ]


def _host_waits(quick: bool) -> list[Case]:
    clip, llava = (
        {"recipe": recipe, "must_be_none": recipe == "mini_mtil_dac"} for recipe in ("mini_mtil_dac", "mini_instruct")
    )
    return [
        Case(f"waits-{options['recipe']}", "gpu_check_parts.host_waits:steps", options)
        for options in ([clip] if quick else [clip, llava])
    ]


def _methods(quick: bool) -> list[Case]:
    function = "gpu_check_parts.methods:on_the_card"
    settings = [{"precision": "fp32", "config": "zero3"}]
    if not quick:
        settings += [{"precision": "fp32", "config": "zero0"}, {"precision": "bf16", "config": "zero2"}]
    return [
        Case("methods-reference", "gpu_check_parts.methods:reference", on_cpu=True),
        *(Case(f"methods-{'-'.join(options.values())}", function, options) for options in settings),
    ]
