"""What instruction tasks score without any model, when every answer is the most frequent one in training."""

import string
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any

from r1p_dist.data.index import index_shard
from r1p_dist.data.remote import is_url
from r1p_dist.data.samples import BadSampleError, is_picture, parse_conversation
from r1p_dist.data.stream import Stream
from r1p_dist.errors import InputError
from r1p_dist.evaluation.answers import Answer, chosen, score


def majority_baselines(stream: Stream, split: str = "test") -> dict[str, tuple[str, float]]:
    """Return per task the most frequent answer of its training split, and what it scores on another split.

    stream: of instruction tasks with local shards. split: test or validation. Of equally frequent answers it is the
    first one in the order of their letters. For multiple_choice it is the most frequent place among the choices, as a
    letter. The value is in the scale of the task's metric, as in metrics.json.
    InputError: a shard that is remote, missing or unusable, a split without any conversation.
    """
    baselines = {}
    for task in stream.tasks:
        train, scored = (
            _read_conversations(shards, f"{stream.path}: task {task.name}")
            for shards in (task.train, getattr(task, split))
        )
        counts = Counter(_majority_key(conversation, task.metric) for conversation in train)
        answer = min(counts, key=lambda text: (-counts[text], text))
        answers = [Answer(answer, conversation["answers"], conversation["choices"]) for conversation in scored]
        baselines[task.name] = answer, fmean(score(task.metric, answers))
    return baselines


def _majority_key(conversation: dict[str, Any], metric: str) -> str:
    """Return the answer, of a choice the letter of its place where there is one."""
    index = chosen(conversation["answers"][0], conversation["choices"]) if metric == "multiple_choice" else None
    if index is None or index >= len(string.ascii_uppercase):
        return conversation["turns"][-1].text
    return string.ascii_uppercase[index]


def _read_conversations(shards: Sequence[Path | str], where: str) -> list[dict[str, Any]]:
    """Return turns, answers and choices of the samples, in the order of the shards; their pictures are not decoded."""
    conversations = [conversation for shard in shards for conversation in _read_shard(shard)]
    if not conversations:
        raise InputError(f"{where}: no conversation in its shards {list(map(str, shards))}")
    return conversations


def _read_shard(shard: Path | str) -> Iterator[dict[str, Any]]:
    if is_url(shard):
        raise InputError(f"{shard}: majority answers are counted in local shards alone; copy it and name the copy")
    samples = index_shard(shard)
    with open(shard, "rb") as file:
        for sample in samples:
            if "json" in sample.files:
                offset, size = sample.files["json"]
                file.seek(offset)
                # A run leaves out or replaces a sample that cannot be read.
                with suppress(BadSampleError):
                    pictures = sum(map(is_picture, sample.files))
                    yield parse_conversation(file.read(size), pictures, f"{shard}: key {sample.key}")
