"""Shards: random access against plain tarfile and webdataset, few-shot choice, and each kind of bad input."""

import gzip
import io
import pickle
import random
import struct
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from r1p_dist.data.convert.shard_writer import ConvertOptions
from r1p_dist.data.convert.sources import SourceOptions, open_source
from r1p_dist.data.convert.writer import convert
from r1p_dist.data.index import index_shard
from r1p_dist.data.samples import BadSampleError
from r1p_dist.data.shards import JointDataset, ShardDataset
from r1p_dist.errors import InputError
from tests.data.toy_task import picture, read_webdataset, sample_files, write_tar

CLASSES = ("apple", "fig", "pear")


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def test_reading_equals_plain_tarfile_and_webdataset(tmp_path: Path):
    files = [
        ("sub/a.JPG", picture(0, kind="JPEG")),
        ("sub/a.cls", b"2\n"),
        ("sub/a.json", b"{}"),
        ("b.cls", b"0"),
        ("b.webp", picture(1, kind="WEBP")),
        ("b.seg.png", b"a file with another suffix"),
        ("c.png", picture(2)),
        ("c.cls", b"1"),
    ]
    shard = write_tar(tmp_path / "a.tar", files)
    dataset = ShardDataset([shard], CLASSES)
    assert (len(dataset), dataset.labels) == (3, [2, 0, 1])
    for index, name in [(2, "c.png"), (0, "sub/a.JPG"), (1, "b.webp"), (0, "sub/a.JPG")]:
        sample = dataset.read(index)
        (image,) = sample.images
        with tarfile.open(shard) as tar:
            expected = pixels(tar.extractfile(name).read())
        assert image.mode == "RGB" and sample.label == dataset.labels[index]
        np.testing.assert_array_equal(np.asarray(image), expected)

    plain = read_webdataset(shard)
    assert [int(sample["cls"]) for sample in plain] == dataset.labels
    assert [sample["__key__"] for sample in plain] == [sample.key for sample in index_shard(shard)]


def test_other_members_are_passed_over(tmp_path: Path):
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as tar:
        folder = tarfile.TarInfo("x.d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in [("README", b"no suffix"), ("__meta.png__", b"meta"), *sample_files(0, 1)]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert [sample.key for sample in index_shard(shard)] == ["s00000"]


def test_links_are_not_followed(tmp_path: Path):
    shard = tmp_path / "a.tar"
    (tmp_path / "secret.png").write_bytes(picture(0))
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        with tarfile.open(shard, "w") as tar:
            link = tarfile.TarInfo("a.png")
            link.type, link.linkname = kind, str(tmp_path / "secret.png")
            tar.addfile(link)
            label = tarfile.TarInfo("a.cls")
            label.size = 1
            tar.addfile(label, io.BytesIO(b"0"))
        with pytest.raises(InputError, match="key a: needs one picture"):
            ShardDataset([shard], CLASSES)


def test_a_pickled_dataset_reads_the_same(tmp_path: Path):
    dataset = ShardDataset([write_tar(tmp_path / "a.tar", sample_files(0, 0) + sample_files(1, 1))], CLASSES)
    before, after = dataset.read(1), pickle.loads(pickle.dumps(dataset)).read(1)
    np.testing.assert_array_equal(np.asarray(after.images[0]), np.asarray(before.images[0]))
    assert after.number == before.number


def test_few_open_files_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("r1p_dist.data.shards._OPEN_SHARDS", 2)
    shards = [write_tar(tmp_path / f"{number}.tar", sample_files(number, 0)) for number in range(5)]
    dataset = ShardDataset(shards, CLASSES)
    for index in (0, 1, 2, 3, 4, 0, 3):
        np.testing.assert_array_equal(np.asarray(dataset.read(index).images[0]), pixels(picture(index)))
    assert len(dataset._files) == 2


def identity(dataset: ShardDataset) -> list[tuple[bytes, int]]:
    return [(sample.images[0].tobytes(), sample.label) for sample in map(dataset.read, range(len(dataset)))]


def test_few_shots_are_fixed_by_the_seed_whatever_the_shards(tmp_path: Path):
    labels = [index % 3 for index in range(30)]
    samples = [sample_files(index, label) for index, label in enumerate(labels)]
    one = [write_tar(tmp_path / "one.tar", sum(samples, []))]
    four = [
        write_tar(tmp_path / f"four-{start}.tar", sum(samples[start:stop], []))
        for start, stop in [(0, 1), (1, 14), (14, 20), (20, 30)]
    ]
    dealt = [write_tar(tmp_path / f"dealt-{start}.tar", sum(samples[start::2], [])) for start in (0, 1)]

    chosen = identity(ShardDataset(one, CLASSES, shots=4, seed=5))
    assert Counter(label for _, label in chosen) == {0: 4, 1: 4, 2: 4}
    assert set(chosen) < set(identity(ShardDataset(one, CLASSES)))
    assert identity(ShardDataset(one, CLASSES, shots=4, seed=5)) == chosen
    assert identity(ShardDataset(four, CLASSES, shots=4, seed=5)) == chosen
    assert sorted(identity(ShardDataset(dealt, CLASSES, shots=4, seed=5))) == sorted(chosen)
    assert set(identity(ShardDataset(one, CLASSES, shots=4, seed=6))) != set(chosen)
    # More shots only add samples, so that a study over shots has nested training sets.
    assert set(chosen) < set(identity(ShardDataset(one, CLASSES, shots=5, seed=5)))


def test_more_shots_than_the_smallest_class_has(tmp_path: Path):
    shard = write_tar(tmp_path / "a.tar", sum((sample_files(i, [0, 0, 1, 2, 2][i]) for i in range(5)), []))
    assert len(ShardDataset([shard], CLASSES, shots=1)) == 3
    for shots in (2, 0):
        with pytest.raises(InputError, match=rf"a.tar: shots={shots} .*'fig' \(label 1\) has 1 samples"):
            ShardDataset([shard], CLASSES, shots=shots)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], ["empty shard"]),
        ([("README", b"hello")], ["empty shard"]),
        ([("k.cls", b"0")], ["key k", "picture", ".jpg", "has files .cls"]),
        ([("k.png", picture(0))], ["key k", "no label", "k.cls"]),
        ([("k.png", picture(0)), ("k.jpg", picture(0)), ("k.cls", b"0")], ["key k", "one picture", ".png, .jpg"]),
        ([("k.png", picture(0)), ("k.PNG", picture(0)), ("k.cls", b"0")], ["key k", "k.PNG stands twice"]),
        ([("k.png", picture(0)), ("k.cls", b"3")], ["key k", "label 3", "3 classes"]),
        ([("k.png", picture(0)), ("k.cls", b"-1")], ["key k", "'-1'"]),
        ([("k.png", picture(0)), ("k.cls", b"fig")], ["key k", "'fig'"]),
        ([("k.png", picture(0)), ("k.cls", b"1.0")], ["key k", "'1.0'"]),
        ([("k.png", picture(0)), ("k.cls", b"")], ["key k", "''"]),
        ([("k.png", picture(0)), ("k.cls", b"\xff\xfe1")], ["key k", "not a class number"]),
        ([("k.png", picture(0)), ("k.cls", b"1" * 10**6)], ["key k", "not a class number"]),
    ],
)
def test_a_bad_sample_is_named_at_construction(tmp_path: Path, files: list, words: list[str]):
    shard = write_tar(tmp_path / "bad.tar", files)
    check_message(lambda: ShardDataset([shard], CLASSES), [str(shard), *words])


def damaged(kind: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in sample_files(0, 0) + sample_files(1, 1) + sample_files(2, 2):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    content = file.getvalue()
    with_samples = content.rstrip(b"\0")
    second = content.index(b"s00001.png")
    return {
        "gzip": gzip.compress(content),
        "no tar": b"hello" * 1000,
        "nothing": b"",
        "cut in a file": content[: second + 700],
        "cut in a header": content[: second + 100],
        "cut at a boundary": content[:second],
        "no end block": content[: -(-len(with_samples) // 512) * 512],
        "bad checksum": content[: second + 3] + b"X" + content[second + 4 :],
        "zeroed header": content[:second] + b"\0" * 512 + content[second + 512 :],
        "two joined": content + content,
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["gzip", "no tar", "nothing", "cut in a file", "cut in a header", "cut at a boundary", "no end block"]
    + ["bad checksum", "zeroed header", "two joined"],
)
def test_a_damaged_tar_is_refused(tmp_path: Path, kind: str):
    shard = tmp_path / "bad.tar"
    shard.write_bytes(damaged(kind))
    check_message(lambda: ShardDataset([shard], CLASSES), [str(shard)])


def test_a_shard_that_is_refused_is_closed(tmp_path: Path):
    shard = tmp_path / "bad.tar"
    shard.write_bytes(damaged("no tar"))
    with pytest.raises(InputError) as caught:
        ShardDataset([shard], CLASSES)
    # the error holds the data set
    assert caught.value and str(shard) not in [str(file.resolve()) for file in Path("/proc/self/fd").iterdir()]


def test_a_missing_shard_and_no_shard(tmp_path: Path):
    check_message(lambda: ShardDataset([tmp_path / "no.tar"], CLASSES), [str(tmp_path / "no.tar"), "missing"])
    check_message(lambda: ShardDataset([], CLASSES), ["no shard"])


def test_a_command_is_a_file_name_like_any_other(tmp_path: Path):
    check_message(lambda: ShardDataset([f"pipe:touch {tmp_path}/ran"], CLASSES), ["pipe:touch", "missing"])
    assert list(tmp_path.iterdir()) == []


def bomb(width: int, height: int) -> bytes:
    """Return a PNG that claims to be of this size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (bomb(60_000, 60_000), "too large"),
        (bomb(10_000, 10_000), "too large"),  # above PIL's limit, where it only warns
        (picture(0)[:-200], "cannot be decoded"),
        (picture(0, (64, 64), "JPEG")[:-400], "cannot be decoded"),
        (b"hello", "cannot be decoded"),
        (b"", "cannot be decoded"),
        (picture(0, kind="GIF"), "cannot be decoded"),  # a format outside the table
    ],
)
@pytest.mark.filterwarnings("default")
def test_a_bad_picture_is_named_when_read(tmp_path: Path, content: bytes, reason: str):
    shard = write_tar(tmp_path / "a.tar", [("k.png", content), ("k.cls", b"0"), *sample_files(0, 1)])
    dataset = ShardDataset([shard], CLASSES)
    check_message(lambda: dataset.read(0), [f"{shard}: key k", reason])
    with pytest.raises(BadSampleError):
        dataset.read(0)
    np.testing.assert_array_equal(np.asarray(dataset.read(1).images[0]), pixels(picture(0)))


def test_a_shard_that_shrinks_during_the_run(tmp_path: Path):
    shard = write_tar(tmp_path / "a.tar", sample_files(0, 1))
    dataset = ShardDataset([shard], CLASSES)
    shard.write_bytes(shard.read_bytes()[:700])
    check_message(lambda: dataset.read(0), [f"{shard}: key s00000", "shorter"])


def test_a_joint_dataset_is_the_tasks_one_after_another(tmp_path: Path):
    labels = ([0, 2, 1], [1, 0], [0, 1, 2, 3])
    counts = [3, 2, 5]
    datasets, expected = [], []
    for task, task_labels in enumerate(labels):
        samples = [sample_files(10 * task + index, label) for index, label in enumerate(task_labels)]
        shard = write_tar(tmp_path / f"{task}.tar", sum(samples, []))
        datasets.append(ShardDataset([shard], [f"class {label}" for label in range(counts[task])]))
        for index, label in enumerate(task_labels):
            expected.append((pixels(picture(10 * task + index)).tobytes(), sum(counts[:task]) + label))
    joint = JointDataset(datasets)
    assert joint.labels == [label for _, label in expected] == [0, 2, 1, 4, 3, 5, 6, 7, 8]
    assert identity(joint) == expected


def check_message(call, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("has_index", [False, True])
def test_flipped_and_cut_bytes_never_pass_for_another_picture(tmp_path: Path, has_index: bool):
    """Two thousand damaged shards: a clean error, a bad sample, or every untouched picture as it was.

    With an index.json, whose checksums tell, no touched sample passes either.
    """
    generator = random.Random(0)
    for number in range(4):
        kind = ("JPEG", "PNG")[number % 2]
        photo = tmp_path / "photos" / "abc"[number % 3] / f"{number}.{kind.lower()}"
        photo.parent.mkdir(parents=True, exist_ok=True)
        photo.write_bytes(picture(number, (40, 30), kind))
    source = open_source(str(tmp_path / "photos"), None, SourceOptions())
    convert(source, tmp_path / "out", ConvertOptions(), name="abc")
    shard = tmp_path / "out/train/000000.tar"
    whole, samples, plain = shard.read_bytes(), index_shard(shard), ShardDataset([shard], "abc")
    originals = {sample.key: plain.read(number) for number, sample in enumerate(samples)}
    # header and content of each file of a sample
    spans = {s.key: [(offset - 512, offset + size) for offset, size in s.files.values()] for s in samples}
    if not has_index:
        (shard.parent / "index.json").unlink()
    outcomes = Counter()
    for _ in range(2000):
        content = bytearray(whole)
        if generator.random() < 0.2:
            place = generator.randrange(len(content))
            del content[place:]
        else:
            place = generator.randrange(len(content))
            content[place] ^= 1 << generator.randrange(8)
        shard.write_bytes(content)
        try:
            dataset = ShardDataset([shard], "abc")
        except InputError:
            outcomes["refused"] += 1
            continue
        for index in range(len(dataset)):
            key = dataset._keys[index]
            try:
                sample = dataset.read(index)
            except BadSampleError:
                outcomes["bad"] += 1
                continue
            touched = any(start <= place < stop for start, stop in spans.get(key, []))
            if has_index or (key in originals and not touched):
                original = originals[key]
                assert sample.images[0].tobytes() == original.images[0].tobytes() and sample.label == original.label
                outcomes["compared"] += 1
    assert outcomes["refused"] > 100 and outcomes["bad"] > 100 and outcomes["compared"] > 1000, outcomes
