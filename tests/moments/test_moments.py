"""The file of moments, and what `r1p moments` measures, against the inputs of the layers themselves."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from r1p_dist.backbones import load_clip
from r1p_dist.cli import run_command
from r1p_dist.data import Stream, train_loader
from r1p_dist.data.transforms import evaluation_transform
from r1p_dist.errors import InputError
from r1p_dist.measuring.noise import noise_pairs
from r1p_dist.moments.file import MomentFile, write_moments
from r1p_dist.moments.sketch import Sketch, directions
from r1p_dist.recipes import load_config
from tests.data.toy_task import write_tar

TEXTS = ["a red square", "two dogs", "a long road by the sea at night", "no"]
FACTS = {"backbone": {"name": "m", "pretrained": None, "sha256": "12"}, "source": "nothing"}


def moment(width: int = 6, seed: int = 0) -> torch.Tensor:
    x = torch.randn(40, width, generator=torch.Generator().manual_seed(seed)) * torch.arange(1.0, width + 1)
    return x.T @ x / 40


def test_the_leading_directions_are_exact_and_the_rest_keeps_its_size(tmp_path: Path) -> None:
    C = moment()
    write_moments(tmp_path / "m", {"image.0.q": C}, {}, {"image.0.q": ["image.0.q", "image.0.k"]}, 2, FACTS)
    found = MomentFile(str(tmp_path / "m")).sketch("image.0.k").whole()
    vectors, values, _ = torch.linalg.svd(C)
    expected = vectors * torch.cat([values[:2], values[2:].mean().expand(4)]) @ vectors.T
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 * float(values[0]))
    torch.testing.assert_close(found.trace(), C.trace(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("C", [moment(), torch.zeros(6, 6), 1e9 * moment(), 1e-9 * moment()])
def test_a_moment_of_which_all_is_kept_comes_back(C: torch.Tensor, tmp_path: Path) -> None:
    sketch = Sketch.of(C, 9)
    assert sketch.factor.shape == (6, 6) and sketch.rest == 0
    write_moments(tmp_path / "m", {"a": C}, {"b": 2 * C}, {"a": ["a"]}, 9, FACTS)
    file, size = MomentFile(str(tmp_path / "m")), 2e-3 * float(C.trace())
    torch.testing.assert_close(file.sketch("a").whole(), C, rtol=0, atol=size)
    torch.testing.assert_close(file.gradient("b").whole(), 2 * C, rtol=0, atol=2 * size)


def test_a_sketch_of_any_size_can_be_made_one_of_a_mean_eigenvalue_of_one() -> None:
    sketch = Sketch.of(1e-6 * moment(), 3)
    expected = sketch.whole() * 6 / sketch.whole().trace()
    torch.testing.assert_close(sketch.normalised().whole(), expected)
    assert not Sketch.of(torch.zeros(6, 6), 3).normalised().whole().any()


def test_a_product_with_a_sketch_is_that_with_its_matrix() -> None:
    sketch, A = Sketch.of(moment(), 3), torch.randn(2, 6)
    torch.testing.assert_close(sketch.times(A), A @ sketch.whole())


def test_the_mean_of_sketches_is_the_sketch_of_their_mean() -> None:
    sketches = [Sketch.of(moment(seed=seed), 3) for seed in range(3)]
    mean = (2 * sketches[0].whole() + sketches[1].whole() + sketches[2].whole()) / 4
    every = Sketch.mean(sketches, [2, 1, 1], 6)
    torch.testing.assert_close(every.whole(), mean)
    few = Sketch.mean(sketches, [2, 1, 1], 2)
    torch.testing.assert_close(few.whole(), Sketch.of(mean, 2).whole(), rtol=1e-4, atol=1e-3)


def spread(width: int = 80, samples: int = 500) -> torch.Tensor:
    """Returns a moment whose eigenvalues fall as 1 / n^2."""
    x = torch.randn(samples, width, generator=torch.Generator().manual_seed(0)) / torch.arange(1.0, width + 1)
    return x.T @ x / samples


def test_of_a_wide_input_the_leading_directions_are_found_without_all_of_them(monkeypatch) -> None:
    C = spread()
    exact = Sketch.of(C, 8)
    halves = [Sketch.of(C, 8), Sketch.of(C.flip(0, 1), 8)]
    mean = Sketch.mean(halves, [3, 1], 8)
    monkeypatch.setattr("r1p_dist.moments.sketch._EXACT", 10)
    wide = Sketch.of(C, 8)
    torch.testing.assert_close(wide.whole(), exact.whole(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(wide.whole().trace(), C.trace())
    torch.testing.assert_close(Sketch.mean(halves, [3, 1], 8).whole(), mean.whole(), rtol=1e-4, atol=1e-5)


def test_a_product_with_few_directions_is_enough_for_a_sketch() -> None:
    C = spread()
    found, exact = Sketch.of_product(C @ directions(80, 8), C.trace(), 8), Sketch.of(C, 8)
    torch.testing.assert_close(found.trace(), C.trace())
    # off by little more than the best sketch is
    assert (found.whole() - C).norm() < 1.1 * (exact.whole() - C).norm()
    narrow = spread(12)
    whole = Sketch.of_product(narrow @ directions(12, 8), narrow.trace(), 8)  # 32 directions would be more than all
    torch.testing.assert_close(whole.whole(), Sketch.of(narrow, 8).whole(), rtol=1e-4, atol=1e-5)


def test_few_tokens_or_none_have_a_sketch_from_products_too() -> None:
    few = spread(samples=3)
    sketch = Sketch.of_product(few @ directions(80, 8), few.trace(), 8)
    torch.testing.assert_close(sketch.whole(), few, rtol=1e-3, atol=1e-5)
    nothing = Sketch.of_product(torch.zeros(80, 32), torch.zeros(()), 8)
    assert not nothing.whole().any()


def test_what_is_no_such_file_or_of_other_weights_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no such file of moments; .* shipped is that of tiny"):
        MomentFile("nowhere")
    save_file({"x": torch.ones(1)}, tmp_path / "other")
    (tmp_path / "text").write_text("moments")
    for name in ("other", "text"):
        with pytest.raises(InputError, match=f"{name}: is no file of `r1p moments`"):
            MomentFile(str(tmp_path / name))
    write_moments(tmp_path / "m", {"image.0.q": moment()}, {}, {"image.0.q": ["image.0.q"]}, 2, FACTS)
    file = MomentFile(str(tmp_path / "m"))
    file.check(FACTS["backbone"], ["image.0.q"], with_gradients=False)
    with pytest.raises(InputError, match=r"m: measured on other weights \(backbone.name=m, .*tiny"):
        file.check({"name": "tiny", "pretrained": None, "sha256": "34"}, [], with_gradients=False)
    with pytest.raises(InputError, match="has no moment of image.0.fc1's input"):
        file.check(FACTS["backbone"], ["image.0.q", "image.0.fc1"], with_gradients=False)
    with pytest.raises(InputError, match="no moment of the gradients at image.0.q's output; measure it again"):
        file.check(FACTS["backbone"], ["image.0.q"], with_gradients=True)


@pytest.fixture
def pairs(tmp_path: Path) -> list[Path]:
    """Two shards of two pairs each."""
    shards = []
    for number in range(2):
        files = []
        for key in range(2):
            picture = io.BytesIO()
            Image.effect_noise((20 + key, 30), 90 + number).convert("RGB").save(picture, "PNG")
            files += [(f"{key}.png", picture.getvalue()), (f"{key}.txt", TEXTS[2 * number + key].encode())]
        shards.append(write_tar(tmp_path / f"{number}.tar", files))
    return shards


def inputs_of_first_block(model: torch.nn.Module, *calls: dict) -> dict[str, torch.Tensor]:
    """Returns by tower what the first block's attention reads, (samples, tokens, in) of each call."""
    seen: dict[str, list[torch.Tensor]] = {"image": [], "text": []}
    for tower, module in (("image", model.model.visual), ("text", model.model.text)):
        norm = module.transformer.resblocks[0].ln_1
        norm.register_forward_hook(lambda module, args, output, tower=tower: seen[tower].append(output))
    model.eval()
    with torch.no_grad():
        for call in calls:
            model(**call)
    return seen


def test_pairs_are_measured_on_real_tokens_alone(pairs: list[Path], tmp_path: Path, capsys) -> None:
    out = tmp_path / "m.safetensors"
    words = ["--recipe", "mini_mtil_dac", "--pairs", *map(str, pairs), "targets.layers=[k, fc1]", "--samples", "3"]
    assert run_command("moments", [*words, "--keep", "192", "--out", str(out)]) == 0
    assert "moments of 3 samples" in capsys.readouterr().out
    model = load_clip("tiny")
    transform = evaluation_transform(model.preprocess)
    pictures = []
    for shard in pairs:
        with tarfile.open(shard) as tar:
            pictures += [Image.open(io.BytesIO(tar.extractfile(f"{key}.png").read())) for key in range(2)]
    image = torch.stack([transform(picture) for picture in pictures[:3]])  # the first two, and one of the second shard
    texts = [{"tokens": model.tokenize([text])} for text in TEXTS[:3]]  # trimmed, so there is no padding
    seen = inputs_of_first_block(model, {"image": image}, *texts)
    file = MomentFile(str(out))
    for tower, inputs in seen.items():
        x = torch.cat([value.flatten(0, 1) for value in inputs])
        torch.testing.assert_close(file.sketch(f"{tower}.0.k").whole(), x.T @ x / len(x), rtol=0.01, atol=2e-3)
    with pytest.raises(InputError, match="no moment of image.0.out"):
        file.check(file.backbone, ["image.0.k", "image.0.out"], with_gradients=True)
    assert file.backbone["name"] == "tiny" and "3 pairs" in json.loads(file._file.metadata()["source"])


def test_pairs_of_noise_differ_and_are_the_same_again() -> None:
    pairs, again = list(noise_pairs(3)), list(noise_pairs(3))
    for (sample, text), (same, same_text) in zip(pairs, again, strict=True):
        assert text == same_text and sample.images[0].tobytes() == same.images[0].tobytes()
        assert len(text.split()) == 8
    assert len({text for _, text in pairs}) == len({sample.images[0].tobytes() for sample, _ in pairs}) == 3
    # amplitudes that fall by a power from 0.6 to 1.6: ten times the frequency has a quarter of them at most
    for sample, _ in pairs:
        spectrum = np.abs(np.fft.fft2(np.asarray(sample.images[0], dtype=float).mean(2)))
        frequency = np.hypot(np.fft.fftfreq(224)[:, None], np.fft.fftfreq(224)[None])
        low, high = (spectrum[(frequency > f) & (frequency < 1.5 * f)].mean() for f in (0.02, 0.2))
        assert 10**0.6 < 1.05 * low / high < 1.1 * 10**1.6


def test_noise_is_measured_as_pairs_are(tmp_path: Path, capsys) -> None:
    out, shard = tmp_path / "m.safetensors", tmp_path / "noise.tar"
    words = ["--recipe", "mini_mtil_dac", "targets.layers=[k]", "--keep", "192", "--samples", "3"]
    assert run_command("moments", [*words, "--noise", "--out", str(out)]) == 0
    assert "moments of 3 samples" in capsys.readouterr().out
    files = []
    for sample, text in noise_pairs(3):
        picture = io.BytesIO()
        sample.images[0].save(picture, "PNG")
        files += [(f"{sample.key}.png", picture.getvalue()), (f"{sample.key}.txt", text.encode())]
    write_tar(shard, files)
    assert run_command("moments", [*words, "--pairs", str(shard), "--out", str(tmp_path / "pairs")]) == 0
    found, expected = MomentFile(str(out)), MomentFile(str(tmp_path / "pairs"))
    for layer in ("image.0.k", "text.3.k"):
        torch.testing.assert_close(found.sketch(layer).whole(), expected.sketch(layer).whole())
    assert "3 pairs of noise" in json.loads(found._file.metadata()["source"])


def test_a_stream_is_measured_over_an_epoch_without_augmentation(toy: list[str], tmp_path: Path) -> None:
    stream, name = toy[0].removeprefix("stream="), toy[1]
    out = tmp_path / "m.safetensors"
    own = [name, "train.global_batch_size=8", "targets.towers=[image]", "tasks=[playing_cards]"]
    words = ["--recipe", "mini_mtil_dac", "--stream", stream, "--keep", "192", "--out", str(out), *own]
    assert run_command("moments", words) == 0
    config = load_config("mini_mtil_dac", [*toy, "train.global_batch_size=8", "data.augment=false"])
    model = load_clip(config.backbone.name)
    tasks = Stream.load(config.stream, None, ["playing_cards"]).tasks
    loader = train_loader(config, tasks, None, model.encoder(config.data))
    batches = [{"image": batch["image"]} for step in loader.steps() for batch in step]
    assert len(batches) == (40 + 16) / 8
    x = torch.cat([value.flatten(0, 1) for value in inputs_of_first_block(model, *batches)["image"]])
    torch.testing.assert_close(MomentFile(str(out)).sketch("image.0.v").whole(), x.T @ x / len(x), rtol=0.01, atol=2e-3)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--pairs", "nowhere.tar"], "--pairs nowhere.tar: cannot be read: "),
        (["--pairs", "{pairs}", "--samples", "0"], "--samples 0: must be from 1"),
        (["--stream", "mini_mtil", "--samples", "9"], "--samples 9: --stream measures an epoch of its tasks"),
        (["--pairs", "{pairs}", "backbone.kind=llava", "backbone.name=tiny_llava"], "a text are no input of backbone"),
        (["--pairs", "{labels}"], "labels.tar: key a: has no .txt"),
        (["--pairs", "{text}"], "text: cannot be read: "),
        (["--pairs", "{empty}"], "empty.tar: no pair in it"),
        (["--pairs", "{pairs}", "backbone.name=local-dir:/nowhere"], "local-dir:/nowhere"),
        (["--stream", "nowhere"], "stream=nowhere: no such stream file"),
        ([], "one of the arguments --pairs --noise --stream is required"),
    ],
)
def test_wrong_input_is_one_line(words: list[str], error: str, pairs: list[Path], tmp_path: Path, capsys) -> None:
    labels = write_tar(tmp_path / "labels.tar", [("a.cls", b"0"), ("a.png", b"")])
    (tmp_path / "text").write_text("moments")
    files = {
        "pairs": pairs[0],
        "labels": labels,
        "text": tmp_path / "text",
        "empty": write_tar(tmp_path / "empty.tar", []),
    }
    words = [word.format(**files) for word in words]
    assert run_command("moments", ["--recipe", "mini_mtil_dac", *words, "--out", str(tmp_path / "m")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert error in lines[-1] and not (tmp_path / "m").exists()
