"""Classification of a split: by the weights alone, of pictures as they are, against plain open_clip."""

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import nn

from r1p_dist import attach_pool
from r1p_dist.backbones import ClipBackbone
from r1p_dist.config import DataConfig
from r1p_dist.data import Task, evaluation_loaders
from r1p_dist.data.shards import ShardDataset
from r1p_dist.evaluation.make import make_evaluator
from r1p_dist.evaluation.results import CONFUSIONS, confusions_of
from r1p_dist.recipes import load_config
from tests.data.toy_task import make_task
from tests.small_clip import make_backbone, make_clip, tokenize

CLASSES, TEMPLATES = ["apple", "fig", "pear", "plum"], ("{c}", "a {c}")


def pictures_of(shards: tuple[Path, ...]) -> tuple[torch.Tensor, list[int]]:
    data, transform = ShardDataset(shards, CLASSES), image_transform_v2(PreprocessCfg(size=16), is_train=False)
    samples = [data.read(index) for index in range(len(data))]
    return torch.stack([transform(sample.images[0]) for sample in samples]), [sample.label for sample in samples]


@torch.no_grad()
def make_model(pictures: torch.Tensor) -> nn.Module:
    """A CLIP without what all pictures' features have in common, so that it does not see one class everywhere."""
    model = make_clip().eval()
    mean = nn.functional.normalize(model.encode_image(pictures).mean(0), dim=0)
    model.visual.proj.sub_(model.visual.proj @ mean[:, None] * mean)
    return model


@torch.no_grad()
def expected_scores(model: nn.Module, shards: tuple[Path, ...]) -> list[float]:
    """100 for every picture that a plain model of open_clip gives its label, else 0."""
    texts = [tokenize([template.format(c=name) for template in TEMPLATES]) for name in CLASSES]
    means = [model.encode_text(tokens, normalize=True).mean(0) for tokens in texts]
    classes = torch.stack([mean / mean.norm() for mean in means])
    pictures, labels = pictures_of(shards)
    found = [int((classes @ features).argmax()) for features in model.encode_image(pictures)]
    assert len(set(found)) > 2
    return [100.0 * (one == label) for one, label in zip(found, labels, strict=True)]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_split_is_scored_by_the_weights_alone_on_whole_pictures(tmp_path: Path, split: str) -> None:
    labels = [index * 7 % 4 for index in range(40)]
    one, other = (make_task(tmp_path, name, labels, CLASSES, first) for name, first in (("one", 0), ("other", 100)))
    task = replace(one, templates=TEMPLATES, validation=other.train, sizes={})
    plain = make_model(pictures_of(one.train)[0])
    backbone = ClipBackbone(copy.deepcopy(plain), tokenize, {"size": 16})
    for adapter in attach_pool(backbone, rank=6, active=3, merged=2, dropout=0.5).adapters:
        nn.init.normal_(adapter.B)
    config = load_config("mini_mtil", [f"data.evaluate_on={split}", "evaluation.batch_size=7"])
    assert config.data.augment, "or nothing could be cropped"
    loaders = evaluation_loaders(config, [task], backbone.encoder(config.data))
    evaluator = make_evaluator(config.evaluation, backbone, loaders)
    backbone.train()
    (result,) = evaluator.evaluate(backbone, [task])
    expected = {name: expected_scores(plain, getattr(task, name)) for name in ("validation", "test")}
    assert result.scores.tolist() == expected[split] and expected["validation"] != expected["test"]
    assert all(module.training for module in backbone.modules()), "the training goes on"
    # in training it would be another model
    evaluator.backbone.eval = lambda: None
    assert evaluator.evaluate(backbone, [task])[0].scores.tolist() != result.scores.tolist()


def test_each_task_is_evaluated_with_the_model_that_is_selected_for_it(tmp_path: Path) -> None:
    tasks = [make_task(tmp_path, name, [0, 1], ["apple", "fig"]) for name in ("one", "other")]
    backbone, selected, seen = make_backbone(), [], []
    config = load_config("mini_mtil", [])
    tasks = [replace(task, test=task.train, sizes={}) for task in tasks]
    loaders = evaluation_loaders(config, tasks, backbone.encoder(config.data))
    evaluator = make_evaluator(config.evaluation, backbone, loaders)

    @contextmanager
    def select(task: Task) -> Iterator[None]:
        selected.append(task.name)
        yield
        selected.pop()

    evaluator.select = select
    evaluator.evaluate_task = lambda model, task, loader: seen.append((task.name, [*selected]))
    evaluator.evaluate(backbone, tasks)
    assert seen == [("one", ["one"]), ("other", ["other"])] and not selected


def test_training_pictures_are_cropped_only_where_that_is_asked_for(tmp_path: Path) -> None:
    task = make_task(tmp_path, "fruit", [0, 1], ["apple", "fig"])
    sample = ShardDataset(task.train, task.class_names).read(0)
    whole = image_transform_v2(PreprocessCfg(size=16), is_train=False)(sample.images[0])
    backbone = make_backbone()
    for augment in (True, False):
        encoder = backbone.encoder(DataConfig(augment=augment))
        drawn = [encoder.train(sample, torch.Generator().manual_seed(seed))["image"] for seed in range(4)]
        assert [torch.equal(image, whole) for image in drawn] == [not augment] * 4
        assert torch.equal(encoder.evaluate(sample)["image"], whole)


def test_confusions_are_the_most_frequent_wrong_predictions() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(9, (400,), generator=generator)
    predicted = torch.randint(-1, 9, (400,), generator=generator)  # -1: not seen
    pairs = [*zip(labels.tolist(), predicted.tolist(), strict=True)]
    counts = Counter((label, guess) for label, guess in pairs if guess not in (-1, label))
    found = confusions_of(labels, predicted)
    assert len(found) == CONFUSIONS < len(counts)
    assert [count for *_, count, _ in found] == sorted(counts.values(), reverse=True)[:CONFUSIONS]
    for label, guess, count, first in found:
        assert counts[label, guess] == count and pairs.index((label, guess)) == first
    assert confusions_of(labels, labels) == ()
