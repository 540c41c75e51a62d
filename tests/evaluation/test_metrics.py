"""continual_metrics against values worked out by hand and the published MTIL tables."""

import pytest

from r1p_dist.evaluation import continual_metrics

NAMES = ["transfer", "average", "last", "bwt", "bwt_coin", "forgetting", "mft", "mfn", "maa"]
MATRIX = [
    [10.0, 20.0, 30.0, 40.0],
    [50.0, 22.0, 28.0, 44.0],
    [46.0, 62.0, 26.0, 40.0],
    [48.0, 54.0, 70.0, 36.0],
    [40.0, 58.0, 64.0, 80.0],
]
FIGURES = {
    # task 2: 22; task 3: (28 + 26) / 2 = 27; task 4: (44 + 40 + 36) / 3 = 40
    "transfer": (22 + 27 + 40) / 3,
    # row sums 144, 174, 208, 242
    "average": 768 / 16,
    "last": 242 / 4,
    # 40 - 50, 58 - 62, 64 - 70
    "bwt": (-10 - 4 - 6) / 3,
    "bwt_coin": (-10 - 4 - 6 + 0) / 4,
    # best before the end: 50, 62, 70
    "forgetting": (10 + 4 + 6) / 3,
    "mft": (50 + 62 + 70 + 80) / 4,
    "mfn": 242 / 4,
    # 50; (46 + 62) / 2 = 54; (48 + 54 + 70) / 3 = 172 / 3; 242 / 4
    "maa": (50 + 54 + 172 / 3 + 60.5) / 4,
}

# ViT-B/16, order I: Aircraft, Caltech101, CIFAR100, DTD, EuroSAT, Flowers, Food, MNIST, OxfordPet, StanfordCars, SUN397
ZERO_SHOT = [24.3, 88.4, 68.2, 44.6, 54.9, 71.0, 88.5, 59.4, 89.0, 64.7, 65.2]
# 5-shot: (Transfer, Average, Last), Transfer of tasks 2..11, Last of tasks 1..11
PUBLISHED = {
    "Continual-FT": (
        (51.2, 58.5, 67.1),
        [72.8, 53.0, 36.4, 35.4, 43.3, 68.4, 47.4, 72.6, 30.0, 52.7],
        [27.8, 86.9, 60.1, 58.4, 56.6, 75.7, 73.8, 93.1, 82.5, 57.0, 66.8],
    ),
    "LwF": (
        (50.0, 49.2, 46.5),
        [72.1, 49.2, 35.9, 44.5, 41.1, 66.6, 50.5, 69.0, 19.0, 51.7],
        [22.1, 58.2, 17.9, 32.1, 28.1, 66.7, 46.0, 84.3, 64.1, 31.5, 60.1],
    ),
    "LwF-VR": (
        (60.1, 62.5, 66.9),
        [82.2, 62.5, 40.1, 40.1, 56.3, 80.0, 60.9, 77.6, 40.5, 60.8],
        [22.9, 89.8, 59.3, 57.1, 57.6, 79.2, 78.3, 77.7, 83.6, 60.1, 69.8],
    ),
    "WiSE-FT": (
        (57.7, 63.7, 71.9),
        [77.6, 60.0, 41.3, 39.4, 53.0, 76.6, 58.1, 75.5, 37.3, 58.2],
        [30.8, 88.9, 59.6, 60.3, 80.9, 81.7, 77.1, 94.9, 83.2, 62.8, 70.0],
    ),
    "ZSCL": (
        (65.3, 64.4, 67.4),
        [84.0, 68.1, 44.8, 46.8, 63.6, 84.9, 61.4, 81.4, 55.5, 62.2],
        [26.8, 88.5, 63.7, 55.7, 60.2, 82.1, 82.6, 58.6, 85.9, 66.7, 70.4],
    ),
    "MoE-Adapters": (
        (68.9, 71.4, 76.1),
        [87.9, 68.2, 44.1, 48.1, 64.7, 88.8, 69.0, 89.1, 64.5, 65.1],
        [30.1, 89.3, 74.9, 64.0, 82.3, 89.4, 87.1, 89.0, 89.1, 69.5, 72.5],
    ),
}
# 5-shot: the column means of the trained rows, tasks 1..11
PUBLISHED_AVERAGE = {
    "Continual-FT": [28.1, 86.4, 59.1, 52.8, 55.8, 62.0, 70.2, 64.7, 75.5, 35.0, 54.0],
    "WiSE-FT": [32.0, 87.7, 61.0, 55.8, 68.1, 69.3, 76.8, 71.5, 77.6, 42.0, 59.3],
    "ZSCL": [28.2, 88.6, 66.5, 53.5, 56.3, 73.4, 83.1, 56.4, 82.4, 57.5, 62.9],
    "MoE-Adapters": [30.0, 89.6, 73.9, 58.7, 69.3, 79.3, 88.1, 76.5, 89.1, 65.3, 65.8],
}
# Lists rounded to 0.1 have a mean within 0.05 of the true one, which is itself printed rounded to 0.1.
ROUNDING = 0.1


def all_none() -> dict[str, None]:
    return dict.fromkeys(NAMES)


def test_every_figure_of_a_hand_made_matrix() -> None:
    metrics = continual_metrics(MATRIX)
    assert list(metrics) == NAMES
    assert metrics == pytest.approx(FIGURES)


def test_forgetting_takes_the_best_row_since_the_task_was_trained() -> None:
    matrix = [[0.0] * 3, [50.0, 99.0, 0.0], [60.0, 40.0, 0.0], [45.0, 42.0, 70.0]]
    metrics = continual_metrics(matrix)
    # task 1: max(50, 60) - 45; task 2: 40 - 42, its 99 came before its own training
    assert metrics["forgetting"] == pytest.approx((15 - 2) / 2)
    assert metrics["bwt"] == pytest.approx((-5 + 2) / 2)


def test_zero_shot_row_is_no_part_of_any_figure() -> None:
    assert continual_metrics([None, *MATRIX[1:]]) == pytest.approx(FIGURES)


def test_model_that_never_changes_has_the_published_zero_shot_figures() -> None:
    metrics = continual_metrics([ZERO_SHOT] * 12)
    assert metrics["transfer"] == pytest.approx(sum(ZERO_SHOT[1:]) / 10)
    assert round(metrics["transfer"], 1) == 69.4
    assert round(metrics["average"], 1) == round(metrics["last"], 1) == 65.3
    assert metrics["average"] == pytest.approx(metrics["last"])
    assert metrics["bwt"] == metrics["bwt_coin"] == metrics["forgetting"] == 0.0


@pytest.mark.parametrize("method", PUBLISHED)
def test_published_transfer_and_last(method: str) -> None:
    (transfer, _, last), transfers, lasts = PUBLISHED[method]
    metrics = continual_metrics(published_matrix(transfers, lasts, averages=None))
    assert metrics["transfer"] == pytest.approx(transfer, abs=ROUNDING)
    assert metrics["last"] == pytest.approx(last, abs=ROUNDING)


@pytest.mark.parametrize("method", PUBLISHED_AVERAGE)
def test_published_average(method: str) -> None:
    (_, average, _), transfers, lasts = PUBLISHED[method]
    metrics = continual_metrics(published_matrix(transfers, lasts, PUBLISHED_AVERAGE[method]))
    # A column's mean is met through rows i..T-1; the last column has none, so its rounding comes on top.
    assert metrics["average"] == pytest.approx(average, abs=ROUNDING)


def published_matrix(
    transfers: list[float], lasts: list[float], averages: list[float] | None
) -> list[list[float] | None]:
    """A matrix with the given Transfer per task (2..T), last row and, where given, mean of every column."""
    tasks = len(lasts)
    rows = [[0.0] * tasks for _ in range(tasks)]
    for i in range(tasks):
        for t in range(tasks):
            if t < i:
                rows[t][i] = transfers[i - 1]
            elif t == tasks - 1:
                rows[t][i] = lasts[i]
            elif averages is not None:
                before = transfers[i - 1] * i if i else 0.0
                rows[t][i] = (tasks * averages[i] - before - lasts[i]) / (tasks - 1 - i)
    return [None, *rows]


def test_coin_backward_transfer_of_the_published_lora_row() -> None:
    after_training = [82.45, 49.99, 96.05, 56.40, 55.45, 31.27, 62.20, 57.08]
    final = [21.26, 28.74, 10.25, 36.78, 32.45, 0.83, 42.50, 57.08]
    rows = [[value if i == t else 0.0 for i, value in enumerate(after_training)] for t in range(7)]
    metrics = continual_metrics([None, *rows, final])
    assert round(metrics["mft"], 2) == 61.36
    assert round(metrics["mfn"], 2) == 28.74
    assert round(metrics["bwt_coin"], 2) == -32.62


def test_figures_that_need_rows_not_reached_are_none() -> None:
    for reached in (MATRIX[:3], [*MATRIX[:3], None, None], MATRIX[:1], [MATRIX[0], None, None, None, None]):
        assert continual_metrics(reached) == all_none()
    # Transfer reads the rows before each task's own, so the last row is not needed.
    partial = continual_metrics(MATRIX[:4])
    assert partial == all_none() | {"transfer": pytest.approx(FIGURES["transfer"])}


def test_first_task_of_several_is_not_taken_for_joint_training() -> None:
    assert continual_metrics([*MATRIX[:2], None, None, None]) == all_none()


def test_missing_entry_undefines_only_the_figures_that_read_it() -> None:
    seen_only = [MATRIX[0]] + [
        [value if i <= t else None for i, value in enumerate(row)] for t, row in enumerate(MATRIX[1:])
    ]
    assert continual_metrics(seen_only) == {
        name: None if name in ("transfer", "average") else pytest.approx(value) for name, value in FIGURES.items()
    }


def test_single_task() -> None:
    metrics = continual_metrics([[20.0], [70.0]])
    assert metrics == {
        "transfer": None,
        "average": 70.0,
        "last": 70.0,
        "bwt": None,
        "bwt_coin": 0.0,
        "forgetting": None,
        "mft": 70.0,
        "mfn": 70.0,
        "maa": 70.0,
    }


def test_joint_training_has_only_a_last_row() -> None:
    metrics = continual_metrics([MATRIX[0], [60.0, 70.0, 80.0, 90.0]])
    assert metrics == all_none() | {"last": 75.0, "mfn": 75.0}
    # With two tasks its row holds every entry that Transfer reads, which still is no transfer.
    assert continual_metrics([[10.0, 20.0], [60.0, 70.0]]) == all_none() | {"last": 65.0, "mfn": 65.0}


def test_empty_matrix_has_no_figures() -> None:
    assert continual_metrics([]) == all_none()


def test_malformed_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"different lengths \[1, 2\]"):
        continual_metrics([[1.0, 2.0], [1.0]])
    with pytest.raises(ValueError, match="4 rows for 2 tasks"):
        continual_metrics([[1.0, 2.0]] * 4)
