"""Classification of a split: by the weights alone, of pictures as they are, against plain open_clip."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import nn

from r1p_dist import attach_pool
from r1p_dist.config import DataConfig
from r1p_dist.data import evaluation_loaders
from r1p_dist.data.shards import ShardDataset
from r1p_dist.evaluation.make import make_evaluator
from r1p_dist.recipes import load_config
from tests.data.toy_task import make_task
from tests.small_clip import make_backbone, make_clip, tokenize

CLASSES, TEMPLATES = ["apple", "fig", "pear", "plum"], ("{c}", "a {c}")


@torch.no_grad()
def expected_scores(shards: tuple[Path, ...]) -> list[float]:
    """100 for every picture that plain open_clip's model gives its label, else 0."""
    model, data = make_clip().eval(), ShardDataset(shards, CLASSES)
    transform = image_transform_v2(PreprocessCfg(size=16), is_train=False)
    texts = [tokenize([template.format(c=name) for template in TEMPLATES]) for name in CLASSES]
    means = [model.encode_text(tokens, normalize=True).mean(0) for tokens in texts]
    classes = torch.stack([mean / mean.norm() for mean in means])
    samples = [data.read(index) for index in range(len(data))]
    features = [model.encode_image(transform(sample.images[0])[None])[0] for sample in samples]
    return [
        100.0 * (int((classes @ image).argmax()) == sample.label)
        for image, sample in zip(features, samples, strict=True)
    ]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_split_is_scored_by_the_weights_alone_on_whole_pictures(tmp_path: Path, split: str) -> None:
    labels = [index * 7 % 4 for index in range(40)]
    one, other = (make_task(tmp_path, name, labels, CLASSES, first) for name, first in (("one", 0), ("other", 100)))
    task = replace(one, templates=TEMPLATES, validation=other.train, sizes={})
    backbone = make_backbone()
    for adapter in attach_pool(backbone, rank=6, active=3, merged=2, dropout=0.5):
        nn.init.normal_(adapter.B)
    config = load_config("mini_mtil", [f"data.evaluate_on={split}", "evaluation.batch_size=7"])
    assert config.data.augment, "or nothing could be cropped"
    loaders = evaluation_loaders(config, [task], backbone.encoder(config.data))
    evaluator = make_evaluator(config.evaluation, backbone, loaders)
    backbone.train()
    (result,) = evaluator.evaluate(backbone, [task])
    assert result.scores.tolist() == expected_scores(getattr(task, split))
    assert 0 < result.score < 100
    assert all(module.training for module in backbone.modules()), "the training goes on"
    # in training it would be another model
    evaluator.backbone.eval = lambda: None
    assert evaluator.evaluate(backbone, [task])[0].scores.tolist() != result.scores.tolist()


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
