"""tools/plan.py: the arithmetic of costs, its outputs, and what it says to wrong input."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from r1p_dist.planner.communication import Collective
from r1p_dist.planner.network import Network, cost, parse_network
from tests.small_vlms import make_config, make_processor

PLAN = Path(__file__).parents[2] / "tools" / "plan.py"


def run(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["plan.py", *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(PLAN), run_name="__main__")
    return ended.value.code


def test_ring_and_tree_costs() -> None:
    network = Network("own", bandwidth=100.0, latency=2.0, node_size=1)
    price = cost(Collective("all_reduce", 800, "gradients"), 8, network)
    assert (price.ring_bytes, price.ring_steps) == (2 * 800 * 7 / 8, 14)
    assert (price.tree_bytes, price.tree_steps) == (1600, 6)
    assert price.seconds == min(14 + 28, 16 + 12)
    price = cost(Collective("all_gather", 800, "weights"), 8, network)
    assert (price.ring_bytes, price.ring_steps, price.tree_bytes, price.tree_steps) == (700, 7, 700, 3)
    assert cost(Collective("all_gather", 800, "weights"), 1, network).seconds == 0


def test_inside_a_node_its_own_links_count() -> None:
    network = parse_network("bandwidth=1,latency=10,node_size=4,node_bandwidth=100,node_latency=1")
    votes = Collective("all_reduce", 96, "votes")
    assert cost(votes, 4, network).seconds < cost(votes, 5, network).seconds / 9


def test_plan_prints_and_writes_everything(monkeypatch, tmp_path: Path, capsys) -> None:
    files = ["--json", str(tmp_path / "plan.json"), "--plot", str(tmp_path / "plan.png")]
    words = ["--model", "tiny", "--gpus", "1,8,64", "--gpu-memory", "16", "--batch", "8", *files]
    assert run(monkeypatch, *words, "options.rank=6", "options.active=4") == 0
    printed = capsys.readouterr().out
    assert "predicted, not measured" in printed and "64 GPUs: best is ZeRO" in printed
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert len(plan["settings"]) == 3 * 3 * 2
    for setting in plan["settings"]:
        memory = setting["memory"]
        assert memory["total"] == sum(value for kind, value in memory.items() if kind not in ("pristine", "total"))
        purposes = {row["purpose"] for row in setting["communication"]["step"]}
        assert ("votes" in purposes) == (setting["gpus"] > 1)
    sharded = [setting for setting in plan["settings"] if setting["gpus"] == 64 and not setting["checkpointing"]]
    optimizer = [setting["memory"]["optimizer"] for setting in sharded]
    assert max(optimizer) < 1.1 * plan["parameters"]["trained"] * 12 / 64
    checkpointed = [setting["memory"]["activations"] for setting in plan["settings"] if setting["checkpointing"]]
    assert max(checkpointed) < min(s["memory"]["activations"] for s in plan["settings"] if not s["checkpointing"])
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_fits_is_said(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "--model", "tiny", "--gpus", "2", "--gpu-memory", "0.001", "--batch", "8") == 0
    assert "2 GPUs: nothing fits" in capsys.readouterr().out


def test_llava_is_planned(monkeypatch, tmp_path: Path, capsys) -> None:
    sizes = ["--tokens", "150", "--answer-tokens", "6", "--pictures", "2"]
    words = ["--model", "tiny", "--gpus", "8", "--batch", "4", "--json", str(tmp_path / "plan.json"), *sizes]
    assert run(monkeypatch, *words, "backbone.kind=llava", "options.rank=6", "options.active=4") == 0
    printed = capsys.readouterr().out
    assert "4 conversations of 150 tokens, 6 of them answers; pictures of 448 x 448 in each: 2" in printed
    assert "operations per conversation" in printed
    for setting in json.loads((tmp_path / "plan.json").read_text())["settings"]:
        calls = {row["purpose"]: row["calls"] for row in setting["communication"]["step"]}
        assert calls["votes"] == 3  # the language model's layers together, and the projector's two
        assert calls["answer tokens"] == 1
        assert ("pictures not kept" in calls) == (setting["zero"] == 3)


def test_a_folder_says_itself_what_it_holds(monkeypatch, tmp_path: Path, capsys) -> None:
    make_config("qwen2_5_vl").save_pretrained(tmp_path)
    make_processor("qwen2_5_vl").save_pretrained(tmp_path)
    own = ["--tokens", "200", "options.rank=6", "options.active=4"]
    assert run(monkeypatch, "--model", str(tmp_path), "--gpus", "8", "--batch", "4", *own) == 0
    assert "4 conversations of 200 tokens" in capsys.readouterr().out
    make_processor("internvl").save_pretrained(tmp_path)
    assert run(monkeypatch, "--model", str(tmp_path), "--gpus", "8", "--batch", "4") == 2
    assert "its processor is a InternVLProcessor" in capsys.readouterr().err


def test_packed_conversations_are_planned(monkeypatch, tmp_path: Path, capsys) -> None:
    words = ["--model", "tiny", "--gpus", "8", "--batch", "4", "--answer-tokens", "6", "--tokens", "150"]
    own, times = ["backbone.kind=llava", "options.rank=6", "options.active=4", "data.packing=true"], {}
    for mean in (None, "120"):
        sizes = [] if mean is None else ["--mean-tokens", mean]
        assert run(monkeypatch, *words, *sizes, "--json", str(tmp_path / "plan.json"), *own) == 0
        times[mean] = json.loads((tmp_path / "plan.json").read_text())["flops_per_micro_step"]["plain"]
    assert 0.7 < times["120"] / times[None] < 0.9
    assert "4 conversations of 150 tokens, 120 in the mean and packed, 6 of them answers" in capsys.readouterr().out


def test_what_a_method_scans_is_planned(monkeypatch, tmp_path: Path, capsys) -> None:
    words = ["--model", "tiny", "--gpus", "8", "--zero", "2", "--batch", "8", "--json", str(tmp_path / "plan.json")]
    found = {}
    for batches in ("2", "5", "null"):
        assert run(monkeypatch, *words, "method=steady", f"options.batches={batches}") == 0
        printed = capsys.readouterr().out
        assert "scanned batch ms*" in printed and "| scanned batch |" in printed.replace("  ", "")
        assert ("an epoch's, which 'between tasks' leaves out" in printed) == (batches == "null")
        setting = json.loads((tmp_path / "plan.json").read_text())["settings"][0]
        found[batches] = setting["predicted"]
        assert setting["memory"]["method"] and setting["scan_memory"] > setting["memory"]["total"]
    seconds = found["2"]["scanned_batch"]
    assert found["5"]["boundary"] - found["2"]["boundary"] == pytest.approx(3 * seconds)
    assert found["2"]["boundary"] - found["null"]["boundary"] == pytest.approx(2 * seconds)


LLAVA, PACKING = "backbone.kind=llava", "data.packing=true"
MEAN = ["--tokens", "300", "--mean-tokens"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--model", "ViT-bigG-15"], "--model ViT-bigG-15: open_clip has no such model; nearest: ViT-bigG-14"),
        (["--gpus", "8,x"], "--gpus 8,x: 'x' must be a whole number from 1"),
        (["--zero", "4"], "--zero 4: '4' must be one of 0, 1, 2, 3"),
        (["--batch", "0"], "--batch 0: must be from 1"),
        (["--prompts", "9"], "--prompts 9: must be from 1 to --batch 8"),
        (["--prompt-tokens", "500"], "--prompt-tokens 500: tiny reads"),
        (
            ["--tokens", "90"],
            "--tokens 90: not for tiny, of backbone.kind=open_clip; it has --prompts, --prompt-tokens",
        ),
        (["--prompts", "4", LLAVA], "--prompts 4: not for tiny, of backbone.kind=llava; it has --tokens"),
        (["--answer-tokens", "0", LLAVA], "--answer-tokens 0: must be from 1"),
        (["--pictures", "-1", LLAVA], "--pictures -1: must be from 0"),
        (["--picture-side", "0", LLAVA], "--picture-side 0: must be from 1"),
        (["--pictures", "9", LLAVA], "--pictures 9: key planned: its conversation has"),
        (["--tokens", "80", LLAVA], "--tokens 80: must be above"),
        ([*MEAN, "200", LLAVA], "--mean-tokens 200: without packing all count as the longest"),
        ([*MEAN, "200", "--batch", "1", LLAVA, PACKING], "--mean-tokens 200: of one conversation"),
        ([*MEAN, "301", LLAVA, PACKING], "--mean-tokens 301: must be from 152"),
        ([*MEAN, "151", LLAVA, PACKING], "--mean-tokens 151: must be from 152, for 1 pictures"),
        (["--model", "gemma-3-4b", PACKING], "data.packing=true: the decoder of this gemma3 is a gemma3_text"),
        (["--model", "nowhere/llava", LLAVA], "--model nowhere/llava: no such folder; use one, or tiny, llava-1.5-7b"),
        (["--model", "llava-1.5-14b"], "open_clip has no such model; nearest: llava-1.5-13b"),
        (["--gpu-memory", "-1"], "--gpu-memory -1.0: must be a number of GB above zero"),
        (["--usable", "2"], "--usable 2.0: must be above 0 and at most 1"),
        (["--network", "infiniband-40"], "--network infiniband-40: did you mean infiniband-400?"),
        (["--network", "bandwidth=5"], "--network bandwidth=5: needs both bandwidth=GB/s and latency"),
        (["--network", "bandwidth=0,latency=1"], "bandwidth=0: must be a number above zero"),
        (["--device", "h10"], "--device h10: did you mean h100?"),
        (["method=zero_shot"], "method=zero_shot: trains nothing"),
        (["deepspeed.overrides.zero_optimization.zero_hpz_partition_size=2"], "zero_hpz_partition_size=2: the planner"),
    ],
)
def test_wrong_input_is_one_line(monkeypatch, capsys, words: list[str], message: str) -> None:
    assert run(monkeypatch, "--model", "tiny", "--batch", "8", "--gpus", "8", *words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
