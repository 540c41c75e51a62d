"""Scoring of generated answers: each by its own sample's references, in the order of the shards."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from r1p_dist.data.batches import Reference
from r1p_dist.errors import InputError
from r1p_dist.kinds.llava.evaluation import Answerer

# by place in the split; 2 cannot be read
SAMPLES = {
    0: ("Cat.", Reference(("cat",), ()), True),
    1: ("", Reference(("cat",), ()), True),  # nothing is no part of an answer
    3: ("c", Reference(("cat",), ()), True),  # nor is its beginning
    4: ("a cat and", Reference(("a cat", "a cat and"), ()), False),
}


class Talker(nn.Module):
    """A backbone that says what the batch's numbers stand for."""

    device = torch.device("cpu")

    def answer(self, model: nn.Module, batch: dict[str, torch.Tensor], max_new_tokens: int) -> list[tuple[str, bool]]:
        assert not self.training and max_new_tokens == 5
        return [
            (text, is_finished) for text, _, is_finished in (SAMPLES[place] for place in batch["position"].tolist())
        ]


class Loader:
    dataset = range(5)

    def __init__(self, *batches: list[int]) -> None:
        self.batches = batches

    def __iter__(self):
        for places in self.batches:
            yield {"position": torch.tensor(places), "references": [SAMPLES[place][1] for place in places]}


TASK = SimpleNamespace(name="things", max_new_tokens=5, format=None, metric="exact_match")


def test_answers_are_scored_whole_and_in_the_order_of_the_shards() -> None:
    backbone = Talker()
    evaluator = Answerer(backbone, {"things": Loader([4, 1], [3, 0])})
    (result,) = evaluator.evaluate(backbone, [TASK])
    assert result.answers == ("Cat.", "", "c", "a cat and")
    assert result.scores.tolist() == [100, 0, 0, 100]
    assert (result.left_out, result.following) == (1, 50)  # one is empty, one did not end
    assert backbone.training


def test_a_task_without_a_readable_sample_is_refused() -> None:
    backbone = Talker()
    with pytest.raises(InputError, match="task things: not one of its 5 samples can be evaluated"):
        Answerer(backbone, {"things": Loader()}).evaluate(backbone, [TASK])
