"""The merge under every shipped DeepSpeed configuration: the model that runs afterwards has the merged weights, in each
copy that DeepSpeed keeps of them, and un-merging gives the pristine ones back."""

import json
from pathlib import Path

import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder

from r1p_dist.adapters.low_rank import full_values
from r1p_dist.backbones import load_clip
from r1p_dist.distributed import gather, rank, stored_copies, world_size
from r1p_dist.engine import TaskEngine, start_process_group, weights_placement
from r1p_dist.errors import InputError
from r1p_dist.methods import make_method
from r1p_dist.recipes import load_config
from r1p_dist.shipped import shipped_files
from tests.small_clip import make_backbone
from tests.stages import Stages

SHARDED = "deepspeed.overrides.zero_optimization.stage3_param_persistence_threshold=0"
HPZ = "deepspeed.overrides.zero_optimization.zero_hpz_partition_size=2"  # the files say 8, as of a node of 8
# what users lay over zero3, and what keeps more than one copy of a weight or keeps it elsewhere
VARIANTS = {
    "zero3 sharded": ["deepspeed.config=zero3", SHARDED],
    "zero3 on the host": [
        "deepspeed.config=zero3",
        SHARDED,
        "deepspeed.overrides.zero_optimization.offload_param={device: cpu, pin_memory: false}",
    ],
    "zero++ with a copy per node": ["deepspeed.config=zero3_hpz", SHARDED, HPZ],
}
# The quantising kernels of ZeRO++ are CUDA's.
ON_CPU = [
    name for name in shipped_files("ds_configs", ".json") if name not in ("zero3_hpz", "zero3_nvme", "zero3_plusplus")
]
CONFIGS = {name: [f"deepspeed.config={name}"] for name in ON_CPU} | VARIANTS


def train_merge_unmerge(rank_: int, world: int, overrides: list[str], copies: int) -> dict[str, bool]:
    config = load_config(
        "mini_mtil",
        [
            "train.global_batch_size=8",
            "train.lr=1e-1",
            "options.rank=6",
            "options.active=3",
            "options.merged=2",
            *overrides,
        ],
    )
    backbone = make_backbone(layers=1)
    method = make_method(config, backbone)
    prepare = backbone.preparer(["cat", "tree", "sea"])
    pristine = [adapter.linear.weight.detach().clone()[adapter.rows] for adapter in method.adapters]
    image = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)).chunk(world_size())[rank()]
    label = torch.arange(8).remainder(3).chunk(world_size())[rank()]
    facts = {}

    def weights() -> list[torch.Tensor]:
        return [full_values(adapter.linear.weight)[0][adapter.rows] for adapter in method.adapters]

    def features(engine: TaskEngine) -> torch.Tensor:
        """What the model really computes, by its own gathers, in forward and backward."""
        backbone.eval()
        with torch.no_grad():
            return engine(image=image)[0]

    stages = Stages(method, config)
    for task in range(2):
        stages.begin(task)
        engine = stages.engine
        for _ in range(2):
            loss, _ = method.loss(engine, prepare({"image": image, "label": label}))
            engine.step(loss)
            method.after_step(stages.trainer)
        stages.end()
        with stored_copies(method.adapters[0].linear.weight) as found:
            facts["copies"] = len(found) == copies
        expected = [
            before + adapter.merged_delta().to(before.device)
            for before, adapter in zip(pristine, method.adapters, strict=True)
        ]
        now = weights()
        facts[f"merged {task}"] = all(torch.allclose(a, b, atol=1e-6) for a, b in zip(now, expected, strict=True))
        facts[f"changed {task}"] = any((a - b).abs().max() > 1e-4 for a, b in zip(now, pristine, strict=True))
        facts[f"same on ranks {task}"] = all(bool((gather(w[None]) == w).all()) for w in now)
        plain = make_backbone(layers=1).eval()
        load_weights(plain, method.adapters, expected)
        with torch.no_grad():
            facts[f"runs merged {task}"] = torch.allclose(features(engine), plain(image=image)[0], atol=1e-5)
        if task == 1:
            for adapter in method.adapters:
                adapter.unmerge(0)
            first_out = [
                before + (adapter.merged[0].scaling * adapter.merged[0].B @ adapter.merged[0].A).to(before.device)
                for before, adapter in zip(pristine, method.adapters, strict=True)
            ]
            facts["first task out"] = all(
                torch.allclose(a, b, atol=1e-6) for a, b in zip(weights(), first_out, strict=True)
            )
            for adapter in method.adapters:
                adapter.unmerge_all()
            facts["pristine again"] = all(torch.equal(a, b) for a, b in zip(weights(), pristine, strict=True))
            with torch.no_grad():
                facts["runs pristine"] = torch.allclose(
                    features(engine), make_backbone(layers=1).eval()(image=image)[0], atol=1e-5
                )
        engine.close()
    return facts


def load_weights(backbone, adapters, weights) -> None:
    """Puts weights (rows of each adapter's linear) into a backbone without adapters."""
    linears = {name: module for name, module in backbone.named_modules() if isinstance(module, torch.nn.Linear)}
    for adapter, weight in zip(adapters, weights, strict=True):
        tower, block, layer = adapter.name.split(".")
        place = {"out": "attn.out_proj", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj"}.get(layer, "attn.in_proj.linear")
        name = f"model.{'visual' if tower == 'image' else 'text'}.transformer.resblocks.{block}.{place}"
        with torch.no_grad():
            linears[name].weight[adapter.rows] = weight


def merge_under_all(rank_: int, world: int) -> dict[str, dict[str, bool]]:
    return {
        name: train_merge_unmerge(rank_, world, overrides, copies=2 if "copy per node" in name else 1)
        for name, overrides in CONFIGS.items()
    }


@pytest.fixture(scope="module")
def merged_under_all(run_distributed) -> list[dict[str, dict[str, bool]]]:
    return run_distributed(merge_under_all, 2, timeout_s=1100)


@pytest.mark.parametrize("name", CONFIGS)
def test_merge_reaches_every_copy(merged_under_all, name: str) -> None:
    for facts in merged_under_all:
        assert all(facts[name].values()) and len(facts[name]) == 12, facts[name]


@pytest.mark.slow
def test_merge_reaches_the_copies_of_both_nodes(run_distributed) -> None:
    """Four ranks in groups of two, as on two nodes: a rank's place in its group is not its rank."""
    for facts in run_distributed(train_merge_unmerge, 4, VARIANTS["zero++ with a copy per node"], 2, timeout_s=1100):
        assert all(facts.values()) and len(facts) == 12, facts


LARGER = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 768, "head_width": 64, "layers": 1},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def merge_on_disk(rank_: int, world: int, name: str, disk: str) -> dict[str, bool]:
    """Trains and merges a model whose larger weights lie in files; returns facts about its weights."""
    nvme = f"deepspeed.overrides.zero_optimization.offload_param={{nvme_path: {disk}, buffer_size: 2000000}}"
    options = ["train.global_batch_size=4", "train.lr=1e-1", "targets.layers=[q, fc1]"]
    config = load_config("mini_mtil", ["deepspeed.config=zero3_nvme", SHARDED, nvme, *options])
    backbone = load_clip(name, placement=weights_placement(config, start_process_group()))
    method = make_method(config, backbone)
    prepare = backbone.preparer(["cat", "tree", "sea"])

    def weights() -> list[torch.Tensor]:
        return [full_values(adapter.linear.weight)[0][adapter.rows] for adapter in method.adapters]

    pristine = weights()
    stages = Stages(method, config)
    stages.begin(0)
    engine = stages.engine
    for _ in range(2):
        image = torch.ones(2, 3, 32, 32) * torch.arange(2.0)[:, None, None, None]
        loss, _ = method.loss(engine, prepare({"image": image, "label": torch.tensor([0, rank() + 1])}))
        engine.step(loss)
        method.after_step(stages.trainer)
    stages.end()
    merged, deltas = weights(), [adapter.merged_delta() for adapter in method.adapters]
    on_disk = [adapter.linear.weight.ds_tensor.status.name == "NOT_AVAILABLE" for adapter in method.adapters]
    for adapter in method.adapters:
        adapter.unmerge_all()
    facts = {
        "the image tower's are in files, the text tower's too small": on_disk == [True, True, False, False],
        "merged": all(
            torch.allclose(now, before + delta, atol=1e-6)
            for now, before, delta in zip(merged, pristine, deltas, strict=True)
        ),
        "changed": all(delta.abs().max() > 1e-4 for delta in deltas),
        "pristine again": all(torch.equal(now, before) for now, before in zip(weights(), pristine, strict=True)),
    }
    engine.close()
    return facts


@pytest.mark.campaign  # the operation that DeepSpeed compiles for it takes minutes
def test_merge_reaches_weights_on_nvme(run_distributed, tmp_path: Path) -> None:
    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("DeepSpeed's asynchronous file access needs libaio: apt install libaio-dev")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/open_clip_config.json").write_text(json.dumps({"model_cfg": LARGER}))
    arguments = f"local-dir:{tmp_path / 'model'}", str(tmp_path / "disk")
    # the first time, DeepSpeed compiles an operation
    for facts in run_distributed(merge_on_disk, 2, *arguments, timeout_s=1100):
        assert all(facts.values()) and len(facts) == 4, facts


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("zero_quantized_nontrainable_weights=true", "frozen weights would lie quantised"),
    ],
)
def test_weights_that_cannot_take_a_merge_are_refused_before_training(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config("mini_mtil", ["deepspeed.config=zero3", f"deepspeed.overrides.zero_optimization.{override}"])
