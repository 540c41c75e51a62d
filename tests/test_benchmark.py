"""The benchmarks' arithmetic and files; what they measure depends on the machine and is no test's business."""

import importlib
import json
import multiprocessing
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[1] / "tools" / "dev"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    sys.path.insert(0, str(TOOLS))
    yield importlib.import_module("benchmark")
    sys.path.remove(str(TOOLS))


@pytest.fixture
def measure(tool: ModuleType) -> ModuleType:
    return importlib.import_module("benchmarks.measure")


def test_variants_run_in_turn_and_the_first_round_does_not_count(measure: ModuleType) -> None:
    calls: list[str] = []
    variants = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    seconds = measure.interleaved(variants, rounds=2)
    assert calls == list("abc" * 3) and {name: len(values) for name, values in seconds.items()} == dict.fromkeys(
        "abc", 2
    )


def test_a_ratio_is_the_median_of_the_rounds_ratios(measure: ModuleType) -> None:
    seconds = {"slow": [2.0, 30.0, 4.0], "fast": [1.0, 10.0, 8.0]}  # the second round met a slow phase
    assert measure.ratio(seconds, "slow", "fast") == 2.0
    assert measure.medians(seconds) == {"slow": 4.0, "fast": 8.0}


def test_peak_memory_sees_what_was_freed_again(measure: ModuleType) -> None:
    assert 95e6 < measure.in_fresh_process(peak_of_a_freed_block) < 300e6


def peak_of_a_freed_block() -> int:
    from benchmarks import measure

    before = measure.anonymous_bytes()
    with measure.PeakMemory() as peak:
        block = torch.ones(25_000_000)
        torch.mm(torch.ones(1500, 1500), torch.ones(1500, 1500))  # some time to look
        del block
    return peak.bytes - before


def test_live_tensors_count_each_storage_once(measure: ModuleType) -> None:
    before = measure.live_tensor_bytes()
    block = torch.ones(1000, 1000)
    views = [block[i] for i in range(10)]
    assert measure.live_tensor_bytes() - before == 4_000_000 and len(views) == 10


@pytest.mark.slow
def test_step_writes_every_ratio(
    tool: ModuleType, measure: ModuleType, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    # four processes, each with the seconds of its imports; what only a new one measures is shown above
    forkserver = multiprocessing.get_context("forkserver")
    monkeypatch.setattr(measure.multiprocessing, "get_context", lambda _: forkserver)
    path = tmp_path / "step.json"
    arguments = "step --model tiny --batch 4 --pairs 1 --dropout 0.2 --against limit,steady,peft --json"
    assert tool.main([*arguments.split(), str(path)]) == 0
    result = json.loads(path.read_text())
    assert json.loads(capsys.readouterr().out) == result
    ratios = {"step/limit", "steady/step", "peft/step", "flops step/limit", "memory step/limit"}
    for work in ("same_work", "end_to_end"):
        assert result[work].keys() == ratios and all(value > 0 for value in result[work].values())
    variants = {"step", "limit", "steady", "peft"}
    assert result["median_s"].keys() == variants | {f"{name} end_to_end" for name in variants}
    assert result["end_to_end"]["flops step/limit"] < result["same_work"]["flops step/limit"] < 1.1
    assert (result["dtype"], result["dropout"], result["model"]) == ("float32", 0.2, "tiny") and result["processor"]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny_llava", "tiny_qwen2_5_vl"])
def test_llava_compares_steps_of_the_same_conversations(tool: ModuleType, capsys, model: str) -> None:
    assert tool.main(f"llava --model {model} --batch 3 --pairs 1".split()) == 0
    result = json.loads(capsys.readouterr().out)
    first, *losses = result["loss"].values()
    assert len(losses) == 3 and losses == pytest.approx([first] * 3, rel=1e-3)
    assert 0 < result["padding"] < 0.5 and all(value > 0 for value in result["tokens_per_second"].values())
    assert result["memory"]["padded/packed"] > 1 and result["memory"]["peft/packed"] > 1


def test_precision_shows_that_small_updates_arrive(tool: ModuleType, capsys) -> None:
    assert tool.main(["precision", "--scales", "1e-4"]) == 0
    arrives = json.loads(capsys.readouterr().out)["arrives"]
    assert arrives.pop("ours")[0] > 0.9 > max(values[0] for values in arrives.values())


def test_inference_compares_equal_models(tool: ModuleType, capsys) -> None:
    assert tool.main("inference --model tiny --batch 2 --pairs 2".split()) == 0
    assert json.loads(capsys.readouterr().out)["merged/plain"] > 0


@pytest.mark.slow
def test_tasks_grow_by_their_factors(run_distributed) -> None:
    result = json.loads(run_distributed(run_tasks, 1, timeout_s=1100)[0])
    grown = result["stored_mb"]["3"] - result["stored_mb"]["1"]
    assert result["tensors_mb"]["3"] == pytest.approx(grown, rel=0.05) and grown > 1
    assert 0 < result["switch_s"]["3"] and result["step"].keys() == {"1", "3"}


def run_tasks(rank: int, world_size: int) -> str:
    return run_benchmark("tasks --batch 2 --pairs 1 --tasks 1 3")


@pytest.mark.slow
def test_the_boundary_costs_what_the_method_does_there(run_distributed) -> None:
    result = json.loads(run_distributed(run_boundary, 1, timeout_s=1100)[0])
    assert result["end"] > 0 and result["begin"].keys() == {"1", "4"} and min(result["begin"].values()) > 0
    assert abs(result["tensors_mb"]["4"]) < 0.1 and result["memory_mb"] > 20  # 192 and 768 wide moments


def run_boundary(rank: int, world_size: int) -> str:
    few = "data.evaluate_on=validation data.shots=2 train.iterations=2 train.global_batch_size=4 options.batches=1"
    return run_benchmark(f"boundary --tasks 4 -- {few}")


def run_benchmark(arguments: str) -> str:
    sys.path.insert(0, str(TOOLS))
    import contextlib
    import io

    import benchmark

    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert benchmark.main(arguments.split()) == 0
    return out.getvalue()[out.getvalue().index("{") :]


@pytest.mark.campaign
def test_scaling_counts_collectives(tool: ModuleType, capsys) -> None:
    arguments = "scaling --ranks 1 2 --votes global lagged --batch 4 --steps 1 --rounds 1"
    assert tool.main(arguments.split()) == 0
    out = capsys.readouterr().out
    result = json.loads(out[out.index("{") :])
    groups = 4 * 10  # tiny has ten blocks; q, k and v share their input
    calls = {vote: result["collectives"][vote]["2"]["allreduce"]["calls"] for vote in ("global", "lagged")}
    assert calls["global"] - calls["lagged"] == groups - 1
    assert all(value > 0 for ranks in result["samples_per_second"].values() for value in ranks.values())


@pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_data_compares_loaders_of_the_same_pictures(tool: ModuleType, capsys) -> None:
    assert tool.main("data --samples 64 --size 60 40 --input 32 --pairs 1 --steps 0".split()) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["loader/webdataset"] > 0 and result["data_wait"] == {}
    equal = {name: values["equal pixels"] for name, values in result["pil/decoder"].items()}
    assert equal == {"pil": True, "torchvision": True, "pil, draft mode": False}


@pytest.mark.slow
def test_checkpoint_times_steps_with_and_without_a_save(run_distributed) -> None:
    result = json.loads(run_distributed(run_checkpoint, 1, timeout_s=1100)[0])
    assert result["step with a save / step"] > 0 and 0 < result["take / step"] < 1
    assert 12 < result["bytes_per_number"] < 12.2


def run_checkpoint(rank: int, world_size: int) -> str:
    return run_benchmark("checkpoint --batch 2 --pairs 2")


def test_unknown_variants_are_refused(tool: ModuleType, capsys) -> None:
    assert tool.main(["step", "--against", "limits"]) == 2
    assert (
        "error: --against limits: no variant 'limits'; there are limit, compiled, steady and peft"
        in capsys.readouterr().err
    )


def test_the_published_tables_are_those_of_the_published_results(tool: ModuleType, capsys) -> None:
    docs = TOOLS.parents[1] / "docs"
    assert tool.main(["table", str(docs / "benchmarks")]) == 0
    page = (docs / "performance.md").read_text(encoding="utf-8")
    for table in capsys.readouterr().out.strip().split("\n\n"):
        assert table in page, table.splitlines()[0]


def test_a_folder_without_results_is_refused(tool: ModuleType, tmp_path: Path, capsys) -> None:
    assert tool.main(["table", str(tmp_path)]) == 2
    assert "no results of a benchmark" in capsys.readouterr().err
