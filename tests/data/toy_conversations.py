"""Small instruction tasks of noise pictures and short texts, written with plain tarfile, and an encoder for them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from r1p_dist.data.samples import BadSampleError, Sample
from r1p_dist.data.stream import Task
from tests.data.toy_task import picture, write_tar

Files = list[tuple[str, bytes]]


def turns(*texts: str) -> list[dict[str, str]]:
    """Return LLaVA's turns of these texts, human and gpt in turn."""
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


def conversation_files(number: int, pictures: int = 1, **fields: Any) -> Files:
    """Return the files of sample `number`, whose text gets longer with `number` % 7."""
    key = f"s{number:05d}"
    question = "<image>\n" * pictures + f"What is {number}?" + " please" * (number % 7)
    record = {"conversations": turns(question, f"It is {number}."), **fields}
    suffixes = ["png"] if pictures == 1 else [f"{place}.png" for place in range(pictures)]
    images = [(f"{key}.{suffix}", picture(10 * number + place)) for place, suffix in enumerate(suffixes)]
    return [*images, (f"{key}.json", json.dumps(record).encode())]


def make_instructions(folder: Path, name: str, count: int, first: int = 0) -> Task:
    """Write a task of samples first, first + 1, ... with 1, 2 or no pictures in turn, over two shards."""
    samples = [conversation_files(first + index, (1, 2, 0)[index % 3]) for index in range(count)]
    shards = tuple(
        write_tar(folder / name / f"train-{number:06d}.tar", sum(part, []))
        for number, part in enumerate((samples[: count // 2], samples[count // 2 :]))
    )
    sizes = {"train": count, "test": count}
    return Task(name, shards, (), shards, (), (), sizes, None, metric="exact_match", max_new_tokens=8)


class ToyEncoder:
    """Encodes a conversation as {"length": of its texts, "noise": the generator's first number, "pictures": how many}.

    refused: keys of samples that it cannot use.
    """

    def __init__(self, refused: Sequence[str] = ()) -> None:
        self.refused = refused

    def train(self, sample: Sample, generator: torch.Generator) -> dict[str, Any]:
        return self.evaluate(sample) | {"noise": int(torch.randint(1 << 40, (), generator=generator))}

    def evaluate(self, sample: Sample) -> dict[str, Any]:
        if sample.key in self.refused:
            raise BadSampleError(f"key {sample.key}: has too many tokens")
        return {"length": sum(len(turn.text) for turn in sample.turns), "pictures": len(sample.images)}

    def blank(self) -> dict[str, Any]:
        return {"length": 0, "pictures": 1}

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {name: torch.tensor([example[name] for example in examples]) for name in examples[0]}
