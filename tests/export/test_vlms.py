"""The exports of runs of every family: plain transformers and PEFT compute, and answer, what the run's model does."""

from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoProcessor

from r1p_dist.errors import InputError
from r1p_dist.export import export_run
from tests.export.test_llava import (
    ALL_TOWERS,
    PICTURE,
    QUESTION,
    assert_same,
    computed,
    expected,
    inputs,
    load,
    write_llava_run,
)
from tests.small_vlms import CAP, FAMILIES, make_model, make_processor

pytestmark = [
    # of PEFT's own call of transformers
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # of PaliGemma's own processor, by numpy
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_and_peft_answer_as_the_run_does(family: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    make_model(family).save_pretrained(base, max_shard_size="40KB")
    make_processor(family).save_pretrained(base)
    run = write_llava_run(tmp_path, [ALL_TOWERS], base)
    if family == "paligemma":  # it has no chat template
        batch = AutoProcessor.from_pretrained(base)(text=f"<image>{QUESTION}", images=PICTURE, return_tensors="pt")
        batch.pop("labels", None)
    else:
        batch = inputs(base)
    ours = expected(run, [0, 1], batch)
    if family == "paligemma" and CAP is not None:
        ours = (CAP * (ours[0] / CAP).tanh(), ours[1])
    assert_same(computed(load(export_run(run, "hf")), batch), ours)
    if "qwen" in family:
        with pytest.raises(InputError, match=r"image\.0\.q is a part of .*qkv\.weight, .* use --to hf"):
            export_run(run, "peft")
    else:
        adapter = export_run(run, "peft") / "all"
        assert_same(computed(PeftModel.from_pretrained(load(base), adapter).eval(), batch), ours)
