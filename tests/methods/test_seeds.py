"""What a stage begins with is drawn anew for every seed, stage and layer, and is the same for the same ones."""

from itertools import combinations

import pytest
import torch

from r1p_dist.methods import make_method
from r1p_dist.recipes import load_config
from tests.methods.test_conformance import options_of
from tests.small_clip import make_backbone

# those that draw A for every stage, and those that do so for the first one alone
EVERY_STAGE = {"dac": [], "o_lora": [], "lora": ["options.restart=true"]}
FIRST_STAGE = {"lora": [], "slao": [], "ewc": []}


def drawn(name: str, overrides: list[str], seed: int, stages: int) -> list[list[torch.Tensor]]:
    """Returns all that is random of each layer, as one vector, after the preparation of so many stages."""
    method = make_method(load_config("mini_mtil_dac", [*options_of(name), *overrides, f"seed={seed}"]), make_backbone())
    torch.seed()  # nothing may come from the global state
    for stage in range(stages):
        method.prepare(stage)
    layers = []
    for adapter in method.adapters:
        parts = [adapter.A, *(adapter.router.parameters() if name == "dac" else ())]
        layers.append(torch.cat([part.detach().flatten() for part in parts]))
        assert not adapter.B.any()
    return layers


@pytest.mark.parametrize(("name", "overrides"), [*EVERY_STAGE.items(), *FIRST_STAGE.items()])
def test_every_layer_and_seed_has_its_own_numbers(name: str, overrides: list[str]) -> None:
    first, again, other = (drawn(name, overrides, seed, 1) for seed in (0, 0, 1))
    assert all(torch.equal(one, same) for one, same in zip(first, again, strict=True))
    # a layer's numbers scaled to its width: unlike in every pair of layers, of one seed or of two
    units = [(vector / vector.abs().max())[:96] for vector in [*first, *other]]
    assert all((one - two).abs().max() > 0.5 for one, two in combinations(units, 2))


@pytest.mark.parametrize(("name", "overrides"), EVERY_STAGE.items())
def test_every_stage_has_its_own_numbers(name: str, overrides: list[str]) -> None:
    stages = [drawn(name, overrides, 0, count) for count in (1, 2)]
    assert all((one - two).abs().max() > 0.01 for one, two in zip(*stages, strict=True))
