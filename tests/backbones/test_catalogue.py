"""`r1p backbones` over open_clip's models, and the list of all of them in docs/backbones.md."""

import sys
from pathlib import Path

import pytest

from r1p_dist.cli import main
from r1p_dist.kinds.open_clip.catalogue import describe, names

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "dev"))
import list_backbones

# one of each make of towers, and each reason why there are none
SHOWN = ("coca_ViT-B-32", "EVA02-B-16", "MobileCLIP2-S0", "mt5-base-ViT-B-32", "PE-Core-T-16-384", "RN50")
SHOWN += ("swin_base_patch4_window7_224", "ViT-B-16-SigLIP2", "ViTamin-S", "convnext_tiny")


def the_list() -> str:
    page = list_backbones.PAGE.read_text(encoding="utf-8")
    listed = page.split(list_backbones.BEGIN)[1].split(list_backbones.END)[0].strip("\n") + "\n"
    if list_backbones.versions() not in listed:
        pytest.skip(f"the list is not of {list_backbones.versions()}")
    return listed


def test_models_are_listed_as_in_the_documentation() -> None:
    listed = the_list()
    for name, row in list_backbones.table(SHOWN).items():
        assert row in listed, name


@pytest.mark.campaign
def test_all_models_are_listed_as_in_the_documentation() -> None:
    """tools/dev/list_backbones.py writes the list again."""
    assert list_backbones.text(list_backbones.table(names())) == the_list()


def test_linears_are_those_of_the_blocks() -> None:
    """Twelve blocks with q, k, v, out, fc1 and fc2 in both towers; a gate more in each of EVA02's."""
    siglip, eva = describe(["ViT-B-16-SigLIP", "EVA02-B-16"])
    assert siglip.linears == {"image": 12 * 6, "text": 12 * 6} and siglip.loss == "sigmoid"
    assert eva.linears == {"image": 12 * 7, "text": 12 * 6} and eva.loss == "contrastive"


def test_the_command_prints_what_fits_a_pattern(capsys) -> None:
    assert main(["backbones", "rn50-quick*"]) == 0
    printed = capsys.readouterr().out
    assert printed == (
        "RN50-quickgelu  text alone: 72 linears in the text tower, contrastive loss; "
        "its image tower, a ModifiedResNet, has no linears to serve\n"
    )
    assert main(["backbones", "xlm-roberta-base"]) == 0
    assert "no; its text tower's configuration (xlm-roberta-base) and its tokenizer" in capsys.readouterr().out
    assert main(["backbones", "no-such"]) == 2
    assert "no-such: no model has that in its name; r1p backbones alone lists all" in capsys.readouterr().err
