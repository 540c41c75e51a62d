"""Weights one at a time: those of every kind of file, and sharded ones without a rank that ever holds the model."""

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from r1p_dist.adapters.low_rank import full_values
from r1p_dist.backbones import Placement, load_clip
from r1p_dist.engine import start_process_group, weights_placement
from r1p_dist.errors import InputError
from r1p_dist.recipes import load_config
from tests.small_clip import CONFIG, make_clip

# 91 million parameters whose largest is far smaller than a rank's share of all
LARGER = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 768, "head_width": 64, "layers": 12},
    "text_cfg": {"context_length": 77, "vocab_size": 1000, "width": 512, "heads": 8, "layers": 2},
}


def write_folder(folder: Path, config: dict, weights: dict[str, torch.Tensor] | None = None) -> str:
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    if weights is not None:
        save_file(weights, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def plain_weights() -> dict[str, torch.Tensor]:
    """Those of open_clip's plain CLIP class, whose text tower is not a module."""
    model = make_clip()
    renamed = {name.removeprefix("text."): tensor for name, tensor in model.state_dict().items()}
    return renamed | {"logit_scale": model.logit_scale.detach()[0]}


def read_back(name: str) -> dict[str, torch.Tensor]:
    """Returns the weights of a loaded model by open_clip's names."""
    found = {
        key.removeprefix("model.").replace(".attn.in_proj.linear.", ".attn.in_proj_"): parameter.detach()
        for key, parameter in load_clip(name).named_parameters()
    }
    return {key.removeprefix("text."): tensor for key, tensor in found.items()}


@pytest.mark.parametrize("kind", ["safetensors", "bin", "wrapped", "module"])
def test_files_of_every_kind_give_the_same_weights(tmp_path: Path, kind: str) -> None:
    weights = plain_weights()
    name = write_folder(tmp_path / "model", CONFIG, weights if kind == "safetensors" else None)
    content = {f"module.{key}": tensor for key, tensor in weights.items()} if kind == "module" else weights
    if kind != "safetensors":
        torch.save({"epoch": 3, "state_dict": content} if kind == "wrapped" else content, tmp_path / "model/w.bin")
    found = read_back(name)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], tensor.view_as(found[key])) for key, tensor in weights.items())


def test_position_embeddings_of_another_picture_size_are_interpolated_as_open_clip_does(tmp_path: Path) -> None:
    larger = CONFIG | {"vision_cfg": CONFIG["vision_cfg"] | {"image_size": 32}}
    name = write_folder(tmp_path / "model", larger, plain_weights())
    expected = open_clip.create_model(name).visual.positional_embedding
    assert torch.equal(read_back(name)["visual.positional_embedding"], expected.detach())


class Executed:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize("content", ["nothing", "code"])
def test_a_file_that_is_no_tensors_is_refused(tmp_path: Path, monkeypatch, content: str) -> None:
    monkeypatch.chdir(tmp_path)
    name = write_folder(tmp_path / "model", CONFIG)
    file = tmp_path / "model/w.bin"
    file.write_bytes(b"") if content == "nothing" else torch.save({"a": Executed()}, file)
    with pytest.raises(InputError, match=r"w\.bin: not a safetensors file nor a torch file of tensors"):
        load_clip(name)
    assert not (tmp_path / "executed").exists()


def test_missing_and_further_weights_are_named(tmp_path: Path) -> None:
    weights = plain_weights()
    weights["surplus"] = weights.pop("ln_final.bias")
    with pytest.raises(InputError, match=r"Missing key.*text\.ln_final\.bias.*Unexpected key.*surplus"):
        load_clip(write_folder(tmp_path / "model", CONFIG, weights))


def test_the_model_says_which_loss_it_was_trained_with(tmp_path: Path) -> None:
    weights = plain_weights() | {"logit_bias": torch.tensor(-9.0)}
    name = write_folder(tmp_path / "model", CONFIG | {"init_logit_bias": -10.0}, weights)
    assert load_clip(name).logit_bias == -9.0 and load_clip("tiny").logit_bias is None


def anonymous_mb() -> float:
    return int(re.search(r"Pss_Anon: +(\d+)", Path("/proc/self/smaps_rollup").read_text())[1]) / 1024


def load_sharded(rank: int, world_size: int, name: str) -> dict[str, Any]:
    """Loads a model under ZeRO-3; returns what memory that took at its peak and in the end, and its weights' sums."""
    config = load_config("mini_mtil_dac", ["deepspeed.config=zero3", "train.global_batch_size=8"])
    placement = weights_placement(config, start_process_group())
    load_clip("tiny", placement=placement)  # what DeepSpeed allocates once
    before, peak, is_over = anonymous_mb(), [0.0], threading.Event()

    def watch() -> None:
        while not is_over.is_set():
            peak[0] = max(peak[0], anonymous_mb())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    backbone = load_clip(name, placement=placement)
    is_over.set()
    watcher.join()
    found = {"peak": peak[0] - before, "end": anonymous_mb() - before}
    found["shapes"] = [list(parameter.shape) for parameter in backbone.parameters()]
    found["sums"] = {key: full_values(parameter)[0].double().sum().item() for key, parameter in named(backbone).items()}
    return found


def named(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return dict(model.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("is_drawn", [False, True], ids=["from a file", "drawn"])
def test_a_rank_holds_its_share_and_one_layer(run_distributed, tmp_path: Path, is_drawn: bool) -> None:
    weights = None
    if not is_drawn:
        model = open_clip.model.CustomTextCLIP(**LARGER)
        weights = dict(model.state_dict())
        del model
    name = write_folder(tmp_path / "model", LARGER, weights)
    whole = load_clip(name, placement=Placement())
    expected = {key: parameter.double().sum().item() for key, parameter in named(whole).items()}
    size = sum(parameter.nbytes for parameter in whole.parameters()) / 2**20
    largest = max(parameter.nbytes for parameter in whole.parameters()) / 2**20
    del whole
    assert size > 300 and largest < 10
    for found in run_distributed(load_sharded, 2, name, timeout_s=1100, new_interpreter=True):
        assert all(shape == [0] for shape in found["shapes"])
        assert found["sums"] == expected
        # its share, what is on its way of one layer, and a tenth for what the allocator keeps
        assert found["peak"] < size / 2 + 3 * largest + size / 10
        assert found["end"] > size / 2 - largest, "nothing was measured"


def test_drawn_weights_depend_on_their_names_alone(tmp_path: Path) -> None:
    name = write_folder(tmp_path / "model", CONFIG)
    torch.manual_seed(1)
    one = read_back(name)
    torch.manual_seed(2)
    other = read_back(name)
    assert all(torch.equal(one[key], tensor) for key, tensor in other.items())
    assert one["logit_scale"].exp().item() == pytest.approx(1 / 0.07, rel=1e-4)
    matrices = [tensor for key, tensor in one.items() if key.endswith("in_proj_weight")]
    assert all(0.1 < tensor.std() < 0.25 for tensor in matrices)  # width 32: 0.177
    assert not torch.equal(matrices[0], matrices[1])
    load_clip(name, placement=Placement(dtype=torch.bfloat16))(torch.zeros(1, 3, 16, 16))
