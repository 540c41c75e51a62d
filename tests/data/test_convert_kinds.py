"""Conversion from parquet tables, saved Hugging Face data sets and torchvision's classes, each from real files."""

import io
import json
import pickle
import shutil
import struct
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from r1p_dist.data.convert.sources import Source, SourceOptions, open_source
from r1p_dist.errors import InputError
from tests.data.converting import CLASSES, contents, picture, pixels, r1p_convert, run, samples, write_photos
from tests.data.toy_conversations import turns

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
NUMBERS = [3, 10, 2, 10, 3, 2]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    datasets.disable_progress_bars()


def open_pickled(path: Path | str, kind: str | None = None, **options) -> Source:
    """The source as a worker gets it."""
    return pickle.loads(pickle.dumps(open_source(str(path), kind, SourceOptions(**options))))


def pairs(output: Path, class_names: tuple[str, ...] | None, split: str = "train") -> list[tuple[bytes, str]]:
    """What the shards hold, sorted: the look of each picture, and its class or caption."""
    found = []
    for files in samples(output, split).values():
        (image,) = (content for suffix, content in files.items() if suffix in ("jpg", "png", "webp"))
        found.append((pixels(image), class_names[int(files["cls"])] if class_names else files["txt"].decode()))
    return sorted(found)


def pictures() -> list[bytes]:
    return [picture(number, kind) for number, kind in enumerate(FORMATS)]


def dataset(**columns) -> datasets.Dataset:
    """A data set of six pictures of six formats, stored as the bytes that they are."""
    stored = [{"bytes": content, "path": None} for content in pictures()]
    made = datasets.Dataset.from_dict({"picture": stored, **columns})
    return made.cast_column("picture", datasets.Image())


# Parquet


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    root = write_photos(tmp_path / "photos")
    return sorted(path for path in root.rglob("*.*") if path.is_file())


def write_parquet(photos: list[Path], **columns) -> Path:
    table = photos[0].parents[1] / "list.parquet"
    names = [path.relative_to(table.parent).as_posix() for path in photos]
    pyarrow.parquet.write_table(pyarrow.table({"filepath": names, **columns}), table)
    return table


@pytest.mark.parametrize("kind", ["string", "dictionary", "number"])
def test_a_parquet_of_classes(kind: str, photos: list[Path], tmp_path: Path) -> None:
    names = [path.relative_to(tmp_path / "photos").parts[0] for path in photos]
    values = names if kind != "number" else [9 + CLASSES.index(name) for name in names]
    column = pyarrow.array(values).dictionary_encode() if kind == "dictionary" else pyarrow.array(values)
    source = open_pickled(write_parquet(photos, label=column))
    assert source.class_names == (CLASSES if kind != "number" else ("9", "10", "11"))
    assert run(source, tmp_path / "out")["samples"] == 18
    expected = sorted((pixels(path.read_bytes()), name) for path, name in zip(photos, names, strict=True))
    assert pairs(tmp_path / "out", CLASSES) == expected


def test_a_parquet_of_captions_and_licences(photos: list[Path], tmp_path: Path, capsys) -> None:
    licences = ["cc-by-4.0", "?", None] * 6
    texts = [f"Bild {number}, ü" for number in range(18)]
    table = write_parquet(photos, caption=texts, LICENSE=licences, label=["x"] * 18, blob=[b"\xff"] * 18)
    with pytest.raises(InputError, match="name one of --label-column and --caption-column"):
        open_source(str(table), None, SourceOptions())
    (photos[0]).write_bytes(b"no picture")  # a record that is left out must not count
    command = [str(table), str(tmp_path / "out"), "--caption-column", "caption", "--workers", "1"]
    assert r1p_convert(command) == 0 and r1p_convert(["stats", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "train: 17 samples, no classes" in out and "licences: unknown 6, ? 6, cc-by-4.0 5" in out
    expected = sorted((pixels(path.read_bytes()), text) for path, text in list(zip(photos, texts, strict=True))[1:])
    assert pairs(tmp_path / "out", None) == expected


def test_a_parquet_that_does_not_fit_is_refused(photos: list[Path], tmp_path: Path) -> None:
    table = write_parquet(photos, label=["a", None] * 9)
    with pytest.raises(InputError, match="column 'label': record 1: has no class; fill it in"):
        open_source(str(table), None, SourceOptions())
    stored = [{"bytes": path.read_bytes(), "path": None} for path in photos]
    table = write_parquet(photos, image=stored, label=["a"] * 18)
    with pytest.raises(InputError, match=r"column 'image' holds struct.*from_parquet\(.*\).save_to_disk"):
        open_source(str(table), None, SourceOptions())
    table.write_bytes(table.read_bytes()[:-3])
    with pytest.raises(InputError, match="list.parquet: not a parquet file"):
        open_source(str(table), None, SourceOptions())
    with pytest.raises(InputError, match="nothing.parquet: cannot be read as table: .*No such file"):
        open_source(str(tmp_path / "nothing.parquet"), "table", SourceOptions())


# Hugging Face data sets


def test_a_saved_data_set_keeps_the_bytes_of_its_pictures(tmp_path: Path) -> None:
    feature = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=list(CLASSES))})
    labels = [2, 0, 1, 2, 2, 0]
    split = dataset(kind=labels).cast(feature)
    datasets.DatasetDict({"train": split, "val": split}).save_to_disk(tmp_path / "saved")
    source = open_pickled(tmp_path / "saved")
    assert source.kind == "datasets" and source.class_names == CLASSES and source.labels == labels
    run(source, tmp_path / "kept")
    kept = dict(pair for files in samples(tmp_path / "kept").values() for pair in files.items() if pair[0] != "png")
    assert [kept["jpg"], kept["webp"]] == [pictures()[0], pictures()[2]]
    assert pictures()[1] in [content for files in samples(tmp_path / "kept").values() for content in files.values()]
    run(open_pickled(tmp_path / "saved", split="validation"), tmp_path / "out", split="validation")
    expected = sorted((pixels(content), CLASSES[label]) for content, label in zip(pictures(), labels, strict=True))
    assert pairs(tmp_path / "out", CLASSES, "validation") == expected
    with pytest.raises(InputError, match="no split 'test'; there are train, val"):
        open_source(str(tmp_path / "saved"), None, SourceOptions(split="test"))


@pytest.mark.parametrize(
    ("values", "names"), [(NUMBERS, ("2", "3", "10")), ([f"n{value}" for value in NUMBERS], ("n10", "n2", "n3"))]
)
def test_a_saved_data_set_with_plain_labels(values: list, names: tuple[str, ...], tmp_path: Path) -> None:
    """The other split has fewer classes; both count them alike."""
    saved = datasets.DatasetDict({"train": dataset(label=values), "test": dataset(label=values).select([0, 1])})
    saved.save_to_disk(tmp_path / "saved")
    source = open_pickled(tmp_path / "saved")
    assert source.class_names == names and [names[label] for label in source.labels] == list(map(str, values))
    test = open_pickled(tmp_path / "saved", split="test")
    assert test.class_names == names and [names[label] for label in test.labels] == list(map(str, values[:2]))


def test_a_saved_data_set_of_captions_and_licences(tmp_path: Path) -> None:
    texts = [f"Bild {number}, ü" for number in range(6)]
    single = dataset(caption=texts)
    single.info.license = "CC BY 4.0"
    single.with_format("numpy").save_to_disk(tmp_path / "saved")
    index = run(open_pickled(tmp_path / "saved"), tmp_path / "out")
    assert index["licences"] == {"CC BY 4.0": 6} and index["classes"] is None
    expected = sorted((pixels(content), text) for content, text in zip(pictures(), texts, strict=True))
    assert pairs(tmp_path / "out", None) == expected
    dataset(caption=texts, licence=["a", "b\n c", None, "", "a", "a"]).save_to_disk(tmp_path / "each")
    assert open_pickled(tmp_path / "each").licences == ["a", "b c", "unknown", "unknown", "a", "a"]


def test_a_saved_data_set_of_paths(photos: list[Path], tmp_path: Path) -> None:
    names = [path.relative_to(tmp_path / "photos").as_posix() for path in photos]
    datasets.Dataset.from_dict({"path": names, "label": ["x"] * 18}).save_to_disk(tmp_path / "saved")
    source = open_pickled(tmp_path / "saved", image_folder=tmp_path / "photos")
    assert [content for index in range(18) for content in source.read(index).values()] == [
        path.read_bytes() for path in photos
    ]
    with pytest.raises(InputError, match=r"a\.00\.jpg: cannot be read: No such file"):
        open_pickled(tmp_path / "saved").read(0)


def test_a_row_without_a_usable_picture_is_left_out(tmp_path: Path) -> None:
    stored = [{"bytes": content, "path": None} for content in (pictures()[0], b"%!PS-Adobe", b"BM\0\0broken", None)]
    stored[-1] = None
    rows = datasets.Dataset.from_dict({"image": stored, "label": [0, 0, 0, 0]})
    rows.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    index = run(open_pickled(tmp_path / "saved"), tmp_path / "out")
    assert index["samples"] == 1 and len(index["skipped"]) == 3
    text = "\n".join(sorted(index["skipped"]))
    assert (
        "row 1: picture cannot be decoded: of no format that Pillow reads" in text and "row 3: has no picture" in text
    )
    assert "row 2: picture cannot be decoded" in text and " at 0x" not in text


def test_a_data_set_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    def refuse(made: datasets.Dataset, message: str, **options) -> None:
        shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        made.save_to_disk(tmp_path / "saved")
        with pytest.raises(InputError, match=message):
            open_source(str(tmp_path / "saved"), None, SourceOptions(**options))

    unlabelled = dataset(label=[-1] * 6).cast_column("label", datasets.ClassLabel(names=["a"]))
    refuse(unlabelled, "record 0: label -1 is outside the 1 classes")
    refuse(dataset(label=[[1]] * 6), "column 'label' has not one class per row")
    refuse(dataset(label=[1] * 6, caption=["a"] * 6), "name one of --label-column and --caption-column")
    refuse(dataset(label=[1] * 6), "no column 'x'; there are picture, label", label_column="x")
    refuse(datasets.Dataset.from_dict({"image": [1], "label": [1]}), "holds neither pictures nor paths")
    refuse(datasets.Dataset.from_dict({"foto": ["a"], "label": [1]}), "no column is named like image")
    (tmp_path / "saved/state.json").write_text("{")
    with pytest.raises(InputError, match="not a data set that save_to_disk wrote"):
        open_source(str(tmp_path / "saved"), None, SourceOptions())
    with pytest.raises(InputError, match="nothing: cannot be read as datasets"):
        open_source(str(tmp_path / "nothing"), "datasets", SourceOptions())


# torchvision


def write_mnist(root: Path, name: str, prefix: str, count: int) -> tuple[np.ndarray, list[int]]:
    """MNIST's idx files: a big-endian header, then bytes."""
    folder = root / name / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    labels = [index * 7 % 10 for index in range(count)]
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, *images.shape) + images.tobytes())
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, count) + bytes(labels))
    return images, labels


def grey(image: np.ndarray) -> bytes:
    return Image.fromarray(image).convert("RGB").tobytes()


def test_torchvision_with_train_and_test(tmp_path: Path) -> None:
    written = {"train": write_mnist(tmp_path, "FashionMNIST", "train", 25)}
    written["test"] = write_mnist(tmp_path, "FashionMNIST", "t10k", 12)
    for split, (images, labels) in written.items():
        source = open_pickled(f"torchvision:FashionMNIST:{tmp_path}", split=split)
        assert source.kind == "torchvision" and source.class_names[:2] == ("T-shirt/top", "Trouser")
        run(source, tmp_path / "out", split=split)
        expected = sorted((grey(image), source.class_names[n]) for image, n in zip(images, labels, strict=True))
        assert pairs(tmp_path / "out", source.class_names, split) == expected
    with pytest.raises(InputError, match="has the splits train and test alone"):
        open_source(f"torchvision:FashionMNIST:{tmp_path}", None, SourceOptions(split="validation"))


def write_dtd(root: Path, photos: list[Path]) -> None:
    for split, chosen in {"train": photos[::3], "val": photos[1::3], "test": photos[2::3]}.items():
        lines = []
        for path in chosen:
            name = f"{path.parent.name if path.parent.name != 'more' else path.parent.parent.name}/{path.name}"
            place = root / "dtd/dtd/images" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
            lines.append(name)
        labels = root / "dtd/dtd/labels" / f"{split}1.txt"
        labels.parent.mkdir(parents=True, exist_ok=True)
        labels.write_text("\n".join(lines) + "\n")


def test_torchvision_with_named_splits_keeps_its_files(photos: list[Path], tmp_path: Path) -> None:
    write_dtd(tmp_path, photos)
    for split, first in (("train", 0), ("validation", 1), ("test", 2)):
        source = open_pickled(f"torchvision:DTD:{tmp_path}", split=split)
        assert source.class_names == CLASSES
        run(source, tmp_path / "out", split=split)
        found = [
            (CLASSES[int(files.pop("cls"))], *files.values()) for files in samples(tmp_path / "out", split).values()
        ]
        expected = [(path.relative_to(tmp_path / "photos").parts[0], path.read_bytes()) for path in photos[first::3]]
        assert sorted(found) == sorted(expected)


def test_torchvision_where_the_training_split_has_another_name(tmp_path: Path) -> None:
    base = tmp_path / "oxford-iiit-pet"
    for folder in ("images", "annotations"):
        (base / folder).mkdir(parents=True)
    for number, name in enumerate(("Abyssinian_1", "great_pyrenees_12", "Abyssinian_7")):
        (base / "images" / f"{name}.jpg").write_bytes(picture(number, "JPEG"))
    (base / "annotations/trainval.txt").write_text("Abyssinian_1 1 1 1\ngreat_pyrenees_12 2 2 1\nAbyssinian_7 1 1 1\n")
    source = open_pickled(f"torchvision:OxfordIIITPet:{tmp_path}")
    assert source.class_names == ("Abyssinian", "Great Pyrenees") and source.labels == [0, 1, 0]
    assert [source.read(index) for index in range(3)] == [{"picture": picture(number, "JPEG")} for number in range(3)]
    with pytest.raises(InputError, match="Unknown value 'validation' for argument split"):
        open_source(f"torchvision:OxfordIIITPet:{tmp_path}", None, SourceOptions(split="validation"))


def test_torchvision_where_pictures_are_of_another_format(tmp_path: Path) -> None:
    """GTSRB: labels and files in pairs, pictures as PPM."""
    folder = tmp_path / "gtsrb/GTSRB/Training"
    for label in range(2):
        (folder / f"{label:05d}").mkdir(parents=True)
        (folder / f"{label:05d}" / "00000.ppm").write_bytes(picture(label, "PPM"))
    (folder / "00001/00001.ppm").write_bytes(picture(9, "PPM")[:-50])
    source = open_pickled(f"torchvision:GTSRB:{tmp_path}")
    index = run(source, tmp_path / "out")
    assert source.class_names == ("0", "1") and index["samples"] == 2
    assert pairs(tmp_path / "out", ("0", "1")) == sorted((pixels(picture(n, "PPM")), str(n)) for n in range(2))
    assert len(index["skipped"]) == 1 and "(00001.ppm): picture cannot be decoded" in index["skipped"][0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("torchvision:MNIST", "write torchvision:CLASS:ROOT"),
        ("torchvision:Nothing:{root}", "write torchvision:CLASS:ROOT with a class of torchvision.datasets"),
        ("torchvision:mnist:{root}", "write torchvision:CLASS:ROOT with a class of torchvision.datasets"),
        ("torchvision:MNIST:{root}", "torchvision:MNIST:.*Dataset not found. nothing is downloaded here"),
        ("torchvision:CIFAR10:{root}", "torchvision:CIFAR10:.*Dataset not found or corrupted"),
        ("torchvision:ImageFolder:{root}", "has no splits to choose from; convert its pictures with --from folder"),
        ("torchvision:FashionMNIST:{root}", "FashionMNIST"),
    ],
)
def test_a_torchvision_name_that_does_not_fit_is_refused(text: str, message: str, tmp_path: Path) -> None:
    write_mnist(tmp_path, "FashionMNIST", "train", 4)
    labels = tmp_path / "FashionMNIST/raw/train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:6])  # damaged
    with pytest.raises(InputError, match=message):
        open_source(text.format(root=tmp_path), None, SourceOptions())


# All


@pytest.mark.parametrize("module", ["pyarrow.parquet", "datasets"])
def test_a_missing_package_is_named(module: str, photos: list[Path], tmp_path: Path, monkeypatch) -> None:
    path = write_parquet(photos, label=["x"] * 18)
    if module == "datasets":
        path = tmp_path / "saved"
        dataset(label=NUMBERS).save_to_disk(path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=f"need.*: pip install {module.partition('.')[0]}"):
        open_source(str(path), None, SourceOptions())


def saved(root: Path) -> Path:
    dataset(label=NUMBERS).save_to_disk(root / "saved")
    return root / "saved"


def idx(root: Path) -> str:
    for prefix in ("train", "t10k"):
        write_mnist(root, "MNIST", prefix, 6)
    return f"torchvision:MNIST:{root}"


@pytest.mark.parametrize("write", [saved, idx])
def test_workers_write_the_same_bytes(write: Callable[[Path], Path | str], tmp_path: Path) -> None:
    source = open_source(str(write(tmp_path)), None, SourceOptions())
    run(source, tmp_path / "one", shard_samples=3)
    run(source, tmp_path / "two", shard_samples=3, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_shards_with_labels_need_their_class_names(photos: list[Path], tmp_path: Path) -> None:
    run(open_source(str(tmp_path / "photos"), None, SourceOptions()), tmp_path / "out")
    (tmp_path / "out/classnames.txt").unlink()
    with pytest.raises(InputError, match="class names are missing: write .*/out/classnames.txt"):
        open_source(str(tmp_path / "out"), None, SourceOptions())


def test_the_licences_of_shards_and_conversations(photos: list[Path], tmp_path: Path) -> None:
    """img2dataset's .json has the columns that it was asked to keep; a .json that is of no use is passed over."""
    records = [
        b'{"License": "cc-by"}',
        b'{"license": null}',
        b"{",
        b"[1]",
        b'{"key": 1}',
        b'{"a": "' + bytes(1 << 20) + b'"}',
    ]
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for number, record in enumerate(records):
            for suffix, content in {"jpg": picture(number, "JPEG"), "json": record}.items():
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    assert open_source(str(tmp_path), "shards", SourceOptions()).licences == ["cc-by"] + ["unknown"] * 5
    record = {"id": "q", "image": str(photos[0]), "conversations": turns("<image>\nWhat?", "That.")}
    (tmp_path / "a.json").write_text(json.dumps([record, {**record, "license": "CC0"}]))
    assert open_source(str(tmp_path / "a.json"), None, SourceOptions()).licences == ["unknown", "CC0"]
    (tmp_path / "a.json").write_text(json.dumps([record]))
    assert open_source(str(tmp_path / "a.json"), None, SourceOptions()).licences is None
