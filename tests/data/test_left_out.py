"""Nothing is left out in silence: every file, member and record that is not written is counted by its reason."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from r1p_dist.data import Stream
from r1p_dist.data.convert.left_out import LeftOut
from r1p_dist.data.convert.sources import SourceOptions, open_source
from r1p_dist.data.shards import ShardDataset
from r1p_dist.errors import InputError
from tests.data.converting import CLASSES, members, picture, pixels, r1p_convert, run, samples, write_photos
from tests.data.toy_conversations import turns
from tests.data.toy_task import write_tar

SUFFIXES = {"jpg": "JPEG", "bmp": "BMP", "gif": "GIF", "tif": "TIFF", "jfif": "JPEG", "jpe": "JPEG", "ppm": "PPM"}


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def frames(kind: str) -> bytes:
    buffer = io.BytesIO()
    first, *others = [Image.new("L", (9, 5), value) for value in (10, 200, 90)]
    first.save(buffer, kind, save_all=True, append_images=others)
    return buffer.getvalue()


def counts(index: dict) -> dict[str, int]:
    return {reason: entry["count"] for reason, entry in index["left_out"].items()}


def test_whatever_pillow_reads_is_converted(tmp_path: Path) -> None:
    contents = {name: picture(number, kind) for number, (name, kind) in enumerate(SUFFIXES.items())}
    for name, content in contents.items():
        put(tmp_path / f"photos/cat/{name}.{name.upper()}", content)
    put(tmp_path / "photos/cat/none", picture(20, "JPEG"))
    put(tmp_path / "photos/cat/wrong.txt", picture(21, "PNG"))
    index = run(open_source(str(tmp_path / "photos"), None, SourceOptions()), tmp_path / "out")
    assert index["samples"] == len(SUFFIXES) + 2 and index["left_out"] == {} and index["skipped"] == []
    written = [content for name, content in members(tmp_path / "out") if not name.endswith(".cls")]
    expected = [*contents.values(), picture(20, "JPEG"), picture(21, "PNG")]
    assert sorted(map(pixels, written)) == sorted(map(pixels, expected))
    kept = [content for content in expected if content[:2] in (b"\xff\xd8", b"\x89P")]
    assert len(kept) == 5 and set(kept) < set(written), "JPEG and PNG keep their bytes"


def test_a_folders_other_files_are_counted_by_reason(tmp_path: Path, capsys) -> None:
    photos = write_photos(tmp_path / "photos")
    put(photos / "stray.png", picture(1, "PNG"))
    put(photos / "labels.xml", b"<a/>")
    put(photos / "ant/IMG_1.HEIC", b"\0\0\0\x18ftypheic")
    put(photos / "ant/notes.txt", b"text")
    put(photos / "ant/more.txt", b"text")
    put(photos / "bee/Thumbs.db", b"x")
    put(photos / "bee/._a.jpg", b"x")
    put(photos / ".ipynb_checkpoints/a.png", picture(2, "PNG"))
    put(photos / "__MACOSX/ant/._b.png", b"x")
    (photos / "cat/gone.jpg").symlink_to("nowhere.jpg")
    (photos / "cat/loop").symlink_to(photos / "cat")
    os.mkfifo(photos / "cat/pipe.jpg")
    command = [str(photos), str(tmp_path / "out"), "--workers", "1"]
    assert r1p_convert(command) == 0
    out = capsys.readouterr().out
    index = json.loads((tmp_path / "out/train/index.json").read_text())
    assert index["samples"] == 18 and index["classes"] == 3
    expected = {
        "picture beside the classes' folders": 1,
        "no picture that Pillow reads (.xml)": 1,
        "no picture that Pillow reads (.heic)": 1,
        "no picture that Pillow reads (.txt)": 2,
        "hidden, or made by an operating system or a tool": 4,
        "link that leads nowhere": 1,
        "link to a folder that it is in": 1,
        "neither file nor folder": 1,
    }
    assert counts(index) == expected
    assert (
        f"out/train: {sum(expected.values())} left out\n" in out
        and "  2 no picture that Pillow reads (.txt): ant/" in out
    )
    assert r1p_convert(["stats", str(tmp_path / "out")]) == 0
    assert f"{sum(expected.values())} left out, from folder\n  left out: 4 hidden" in capsys.readouterr().out
    assert r1p_convert([*command[:1], str(tmp_path / "strict"), "--strict"]) == 2
    error = capsys.readouterr().err
    assert "--strict: 8 would be left out: " in error and error.count("\n") == 1
    assert "hidden" not in error, "system files are no loss"
    assert not (tmp_path / "strict").exists()


def test_linked_folders_and_files_are_read(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "elsewhere")
    (tmp_path / "photos/ant").mkdir(parents=True)
    (tmp_path / "photos/ant/part").symlink_to(photos / "ant")
    (tmp_path / "photos/bee").symlink_to(photos / "bee")
    index = run(open_source(str(tmp_path / "photos"), None, SourceOptions()), tmp_path / "out")
    assert index["samples"] == 13 and index["left_out"] == {}


def test_a_picture_that_cannot_be_read_is_a_loss_and_strict_says_so(tmp_path: Path, capsys) -> None:
    photos = write_photos(tmp_path / "photos")
    put(photos / "ant/a.00.jpg", b"no picture")
    command = [str(photos), str(tmp_path / "out"), "--workers", "1", "--shard-samples", "4"]
    assert r1p_convert([*command, "--strict"]) == 2
    assert "--strict: 1 would be left out: 1 picture missing or not decoded: ant/a.00.jpg; " in capsys.readouterr().err
    assert not (tmp_path / "out/train/index.json").exists()
    assert r1p_convert(command) == 0
    captured = capsys.readouterr()
    assert "17 samples" in captured.out and "1 picture missing or not decoded: ant/a.00.jpg" in captured.out
    assert "left out: ant/a.00.jpg: picture cannot be decoded" in captured.err
    assert r1p_convert([*command, "--strict"]) == 2, "a finished one as well"


def test_what_was_not_chosen_is_counted_and_no_loss(tmp_path: Path, capsys) -> None:
    photos = write_photos(tmp_path / "photos")
    assert r1p_convert([str(photos), str(tmp_path / "out"), "--max-samples", "5", "--strict", "--workers", "1"]) == 0
    assert "13 not chosen by --max-samples or --shots" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_of_several_frames_the_first_is_written_and_the_rest_counted(tmp_path: Path, kind: str) -> None:
    put(tmp_path / f"photos/cat/a.{kind.lower()}", frames(kind))
    put(tmp_path / "photos/cat/b.png", picture(0, "PNG"))
    index = run(open_source(str(tmp_path / "photos"), None, SourceOptions()), tmp_path / "out")
    assert index["samples"] == 2 and counts(index) == {"frames or pages behind the first one": 1}
    dataset = ShardDataset([tmp_path / "out/train/000000.tar"], ("cat",))
    sizes = {dataset.read(i).images[0].size: np.asarray(dataset.read(i).images[0]).mean() for i in range(2)}
    assert abs(sizes[9, 5] - 10) < 3


def test_pictures_are_written_as_every_reader_of_shards_sees_them(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    drawing = Image.new("RGBA", (8, 4))
    drawing.paste((0, 0, 0, 255), (0, 0, 2, 2))
    images = {"side.jpg": (Image.new("RGB", (8, 4), "red"), {"exif": exif}), "drawing.png": (drawing, {})}
    images["grey.png"] = (Image.fromarray(np.full((4, 8), 128 * 257, np.uint16)), {})
    for name, (image, options) in images.items():
        (tmp_path / "photos" / name[0]).mkdir(parents=True)
        image.save(tmp_path / "photos" / name[0] / name, **options)
    for colour in ("white", "black"):
        output = tmp_path / colour
        command = [str(tmp_path / "photos"), str(output), "--workers", "1"]
        assert r1p_convert(command + (["--background", colour] if colour == "black" else [])) == 0
        found = {}
        for files in samples(output).values():
            (content,) = (content for suffix, content in files.items() if suffix != "cls")
            with Image.open(io.BytesIO(content)) as image:  # without any rule of ours
                found["dgs"[int(files["cls"])]] = np.asarray(image.convert("RGB")).astype(int)
        assert found["s"].shape == (8, 4, 3) and (found["g"] == 128).all()
        assert found["d"][0, 0].tolist() == [0] * 3 and found["d"][3, 7].tolist() == [255 * (colour == "white")] * 3
    assert r1p_convert([*command, "--background", "whitish"]) == 2


# Tar shards


def shards(root: Path, files: list[tuple[str, bytes]]) -> Path:
    (root / "train").mkdir(parents=True, exist_ok=True)
    write_tar(root / "train/0.tar", files)
    (root / "classnames.txt").write_text("cat\ndog\n")
    return root


def test_shards_of_any_names_and_pictures_keep_every_sample(tmp_path: Path, capsys) -> None:
    files = []
    for number in range(4):
        files += [(f"img{number}.jpg", picture(number, "JPEG")), (f"img{number}.cls", b"%d" % (number % 2))]
    for number, name in enumerate(("street.v2", "street.v3", "scan.2021-05-01"), 4):
        files += [(f"{name}.jpg", picture(number, "JPEG")), (f"{name}.cls", b"1")]
    files += [("old.bmp", picture(7, "BMP")), ("old.cls", b"0")]
    files += [("x.left.png", picture(8, "PNG")), ("x.cls", b"0")]
    files += [("late.png", picture(9, "PNG"))]
    files.insert(0, ("late.cls", b"1"))  # apart from its picture
    assert r1p_convert([str(shards(tmp_path / "in", files)), str(tmp_path / "out"), "--workers", "1"]) == 0
    found = {}
    for content in samples(tmp_path / "out").values():
        (image,) = (value for suffix, value in content.items() if suffix != "cls")
        found[pixels(image)] = content["cls"]
    expected = {number: b"%d" % (number % 2) for number in range(4)} | dict.fromkeys((4, 5, 6, 9), b"1")
    kinds = {7: "BMP", 8: "PNG", 9: "PNG"}
    expected |= {7: b"0", 8: b"0"}
    assert found == {pixels(picture(n, kinds.get(n, "JPEG"))): label for n, label in expected.items()}
    assert "3 samples have dots in their names (street.v2, ...): written as one each" in capsys.readouterr().out


def test_what_of_shards_is_not_written_is_counted(tmp_path: Path) -> None:
    files = [("a.jpg", picture(0, "JPEG")), ("a.cls", b"0"), ("a.mask.png", b"x"), ("a.pth", b"x"), ("b.cls", b"1")]
    files += [("c.jpg", picture(1, "JPEG")), ("c.png", picture(1, "PNG")), ("c.cls", b"0")]
    files += [("d.in.jpg", b"x"), ("d.out.jpg", b"x"), ("d.cls", b"0"), ("README", b"x"), ("._a.jpg", b"x")]
    root = shards(tmp_path / "in", files)
    put(root / "train/more.tar.gz", b"x")
    put(root / "aside.tar", (root / "train/0.tar").read_bytes())
    put(root / "train/000000_stats.json", b"{}")
    index = run(open_source(str(root), None, SourceOptions()), tmp_path / "out")
    assert index["samples"] == 1
    assert counts(index) == {
        "file of a sample that is not read (.png)": 1,
        "file of a sample that is not read (.pth)": 1,
        "sample without a picture": 1,
        "sample with several pictures": 2,
        "member of no sample": 1,
        "hidden, or made by an operating system or a tool": 1,
        "file beside the shards": 1,
        "shard outside the splits' folders": 1,
    }


def test_a_stray_archive_does_not_make_shards_of_a_folder(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    write_tar(photos / "ant/backup.tar", [("a.jpg", b"x")])
    index = run(open_source(str(photos), None, SourceOptions()), tmp_path / "out")
    assert index["samples"] == 18 and counts(index) == {"no picture that Pillow reads (.tar)": 1}


def test_shards_of_conversations_convert_again(tmp_path: Path) -> None:
    records = [{"id": n, "conversations": turns("<image>\n" * n + "Which?", f"{n}")} for n in range(4)]
    files = []
    for number, record in enumerate(records):
        files += [(f"k{number}.json", json.dumps(record).encode())]
        names = ["jpg"] if number == 1 else [f"{place}.jpg" for place in range(number)]
        files += [(f"k{number}.{name}", picture(10 * number + place, "JPEG")) for place, name in enumerate(names)]
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in/0.tar", [*files, ("z.jpg", picture(0, "JPEG"))])
    index = run(open_source(str(tmp_path / "in"), None, SourceOptions()), tmp_path / "out")
    assert index["samples"] == 4 and index["metric"] == "exact_match"
    assert counts(index) == {"sample without a conversation": 1}
    dataset = ShardDataset([tmp_path / "out/train/000000.tar"], None)
    for sample in map(dataset.read, range(4)):
        number = int(sample.answers[0])
        assert [image.tobytes() for image in sample.images] == [
            pixels(picture(10 * number + place, "JPEG")) for place in range(number)
        ]


# Conversations


@pytest.mark.parametrize(
    "entry",
    [
        {"images": ["0.jpg"]},
        {"video": "clip.mp4"},
        {"videos": ["clip.mp4"]},
        {"audio_path": "a.wav"},
        {"image_path": "0.jpg"},
        {"Img": "0.jpg"},
        {"image": "0.jpg", "images": ["1.jpg"]},
        {"conversations": [{"from": "human", "value": "q", "image": "0.jpg"}, {"from": "gpt", "value": "a"}]},
    ],
)
def test_a_key_with_media_that_nothing_reads_is_refused(tmp_path: Path, entry: dict) -> None:
    (tmp_path / "q.json").write_text(json.dumps([{"conversations": turns("q", "a"), **entry}]))
    with pytest.raises(InputError, match=r"q.json: record 0: key '\w+'( in a turn)?: media are read from `image`"):
        open_source(str(tmp_path / "q.json"), None, SourceOptions())


def test_metadata_about_a_picture_are_no_media(tmp_path: Path) -> None:
    more = {"image_id": 7, "image_size": [3, 4], "image_url": "http://x/0.jpg", "depth": 3, "videos": [], "audio": None}
    put(tmp_path / "0.jpg", picture(0, "JPEG"))
    (tmp_path / "q.json").write_text(json.dumps([{"image": "0.jpg", "conversations": turns("q", "a"), **more}]))
    assert len(open_source(str(tmp_path / "q.json"), None, SourceOptions())) == 1


# Splits


def split_photos(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        for label, kind in enumerate(CLASSES):
            for place in range(2):
                put(root / name / kind / f"{place}.png", picture(100 * number + 10 * label + place, "PNG"))
    return root


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "valid", "TEST"), ("train", "test")])
def test_a_folder_of_splits_is_converted_in_one_call(tmp_path: Path, names: tuple[str, ...], capsys) -> None:
    root = split_photos(tmp_path / "photos", *names)
    put(root / "readme.md", b"x")
    put(root / "extra/cat/a.png", picture(0, "PNG"))
    output = tmp_path / "shards"
    assert r1p_convert([str(root), str(output), "--workers", "1"]) == 0
    (task,) = Stream.load(output).tasks
    assert task.class_names == CLASSES
    assert task.sizes == {
        split: 6 for split in ("train", "validation", "test") if split != "validation" or len(names) == 3
    }
    for number, name in enumerate(names):
        split = {"val": "validation", "valid": "validation", "Training": "train"}.get(name, name.lower())
        found = {content for suffix, content in members(output, split) if suffix.endswith("png")}
        assert found == {picture(100 * number + 10 * label + n, "PNG") for label in range(3) for n in range(2)}
    assert capsys.readouterr().out.count("left out") == 1, "what stands outside is counted once"
    assert counts(json.loads((output / "train/index.json").read_text())) == {
        "file beside the splits' folders": 1,
        "file outside the splits' folders": 1,
    }
    assert r1p_convert([str(root), str(tmp_path / "one"), "--workers", "1", "--split", "test"]) == 0
    assert [path.name for path in (tmp_path / "one").iterdir() if path.is_dir()] == ["test"]
    if len(names) == 2:
        assert r1p_convert([str(root), str(tmp_path / "one"), "--split", "validation"]) == 2
        assert "no split 'validation'; there are train, test" in capsys.readouterr().err


def test_splits_with_other_classes_are_refused_before_anything_is_written(tmp_path: Path, capsys) -> None:
    root = split_photos(tmp_path / "photos", "train", "test")
    for file in (root / "test/bee").iterdir():
        file.unlink()
    (root / "test/bee").rmdir()
    assert r1p_convert([str(root), str(tmp_path / "out")]) == 2
    assert "test and train have other classes: bee; all splits need the same" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_class_that_is_called_train_stays_one(tmp_path: Path) -> None:
    for name in ("train", "bus", "car"):
        put(tmp_path / f"vehicles/{name}/1.png", picture(1, "PNG"))
    assert open_source(str(tmp_path / "vehicles"), None, SourceOptions()).class_names == ("bus", "car", "train")
    put(tmp_path / "vehicles/train/steam/2.png", picture(2, "PNG"))
    with pytest.raises(InputError, match="train is a split by its name and bus, car is none"):
        open_source(str(tmp_path / "vehicles"), None, SourceOptions())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train/1.png", "test/2.png"], "photos/train: has 1 pictures and no folder per class; move them to .*/CLASS/"),
        (
            ["1.png", "2.jpg"],
            "photos: has 2 pictures and no folder per class; move them to .*/CLASS/, or convert a table",
        ),
        (["1.png", "list.csv"], "photos: has no folder per class but a table; convert that: .*list.csv --image-folder"),
        (["photos.zip"], "photos: has photos.zip, an archive; unpack it"),
        (["train/a/1.png", "val/a/1.png", "valid/a/1.png"], "val and valid both mean the validation split"),
        (["a/1.txt", "b/1.png"], "photos/a: no picture that Pillow reads in it; remove or fill the class"),
    ],
)
def test_a_folder_that_is_no_folder_of_classes_says_what_to_do(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        put(tmp_path / "photos" / name, picture(0, "PNG") if name.endswith(("png", "jpg")) else b"x")
    with pytest.raises(InputError, match=message):
        open_source(str(tmp_path / "photos"), None, SourceOptions())


@pytest.mark.parametrize("name", ["photos.zip", "photos.TAR.gz", "photos.7z", "photos.tar"])
def test_an_archive_says_that_it_must_be_unpacked(tmp_path: Path, name: str) -> None:
    put(tmp_path / name, b"x")
    with pytest.raises(InputError, match=f"{name}: is .*unpack it"):
        open_source(str(tmp_path / name), None, SourceOptions())


def test_shares_cut_splits_from_one_folder_the_same_every_time(tmp_path: Path, capsys) -> None:
    for label, kind in enumerate(CLASSES):
        for number in range(20):
            put(tmp_path / f"photos/{kind}/{number}.png", picture(100 * label + number, "PNG"))
    command = [str(tmp_path / "photos"), "--validation-share", "0.1", "--test-share", "0.25", "--workers", "1"]

    def cut(output: Path) -> dict[str, set[bytes]]:
        assert r1p_convert([command[0], str(output), *command[1:]]) == 0
        return {
            split: {content for name, content in members(output, split) if name.endswith("png")}
            for split in ("train", "validation", "test")
        }

    first = cut(tmp_path / "one")
    assert {split: len(found) for split, found in first.items()} == {"train": 39, "validation": 6, "test": 15}
    assert len(set.union(*first.values())) == 60
    (task,) = Stream.load(tmp_path / "one").tasks
    assert all(np.bincount(ShardDataset(shards, CLASSES).labels).min() >= 2 for shards in (task.train, task.test))
    # Which pictures go where does not depend on others: 20 more in one class leave the other classes as they were.
    for number in range(20, 40):
        put(tmp_path / f"photos/ant/{number}.png", picture(number, "PNG"))
    others = {picture(100 * label + number, "PNG") for label in (1, 2) for number in range(20)}
    assert {split: found & others for split, found in cut(tmp_path / "two").items()} == {
        split: found & others for split, found in first.items()
    }
    capsys.readouterr()
    assert r1p_convert([command[0], str(tmp_path / "x"), "--test-share", "0.6", "--validation-share", "0.4"]) == 2
    assert "nothing is left to train on" in capsys.readouterr().err
    assert r1p_convert([command[0], str(tmp_path / "x"), "--test-share", "0.1", "--split", "test"]) == 2
    root = split_photos(tmp_path / "splits", "train", "test")
    assert r1p_convert([str(root), str(tmp_path / "x"), "--test-share", "0.1"]) == 2
    assert "has a test split already" in capsys.readouterr().err
    assert r1p_convert([str(root), str(tmp_path / "cut"), "--validation-share", "0.4", "--workers", "1"]) == 0
    assert Stream.load(tmp_path / "cut").tasks[0].sizes == {"train": 3, "validation": 3, "test": 6}
    put(tmp_path / "few/a/1.png", picture(0, "PNG"))
    assert r1p_convert([str(tmp_path / "few"), str(tmp_path / "x"), "--test-share", "0.1"]) == 2
    assert "class 'a' has 1 records, too few to cut train, test from" in capsys.readouterr().err


def test_questions_about_one_picture_stay_in_one_split(tmp_path: Path) -> None:
    records = []
    for number in range(10):
        put(tmp_path / f"{number}.jpg", picture(number, "JPEG"))
        records += [{"image": f"{number}.jpg", "conversations": turns(f"q{n}", f"{number}")} for n in range(3)]
    (tmp_path / "q.json").write_text(json.dumps(records))
    command = [str(tmp_path / "q.json"), str(tmp_path / "out"), "--test-share", "0.25", "--workers", "1"]
    assert r1p_convert(command) == 0
    answers = {}
    for split in ("train", "test"):
        dataset = ShardDataset([tmp_path / f"out/{split}/000000.tar"], None)
        answers[split] = [dataset.read(i).answers for i in range(len(dataset))]
    assert len(answers["test"]) == 9 and len(answers["train"]) == 21
    assert not set(answers["train"]) & set(answers["test"])


# Tables


def table(root: Path, head: str, *rows: str) -> str:
    for number in range(4):
        put(root / f"images/{number:03d}.jpg", picture(number, "JPEG"))
    put(root / "list.csv", "\n".join([head, *rows]).encode())
    return str(root / "list.csv")


def test_a_table_like_a_competitions_says_what_to_do_and_converts(tmp_path: Path) -> None:
    path = table(tmp_path, "id,breed", *(f"{number:03d},{'ab'[number % 2]}" for number in range(4)))
    with pytest.raises(InputError, match="no column is named like .*--image-column, of id, breed"):
        open_source(path, None, SourceOptions())
    with pytest.raises(InputError, match="columns id, breed: name one of --label-column"):
        open_source(path, None, SourceOptions(image_column="id"))
    options = {"image_column": "id", "label_column": "breed"}
    with pytest.raises(InputError, match="No such file; it is in .*images: --image-folder .*images"):
        open_source(path, None, SourceOptions(**options))
    source = open_source(path, None, SourceOptions(**options, image_folder=tmp_path / "images"))
    assert [source.read(i)["picture"] for i in range(4)] == [picture(number, "JPEG") for number in range(4)]


def test_a_spreadsheets_table_is_read(tmp_path: Path) -> None:
    path = table(tmp_path, "path;label", *(rf"images\{number:03d}.jpg;a, b" for number in range(4)))
    source = open_source(path, None, SourceOptions())
    assert source.class_names == ("a, b",) and source.read(3) == {"picture": picture(3, "JPEG")}


def test_a_tables_column_of_splits_is_followed(tmp_path: Path, capsys) -> None:
    rows = [f"images/{n:03d}.jpg,{'ab'[n % 2]},{('train', 'val')[n // 2]}" for n in range(4)]
    path = table(tmp_path, "path,label,split", *rows)
    assert r1p_convert([path, str(tmp_path / "out"), "--workers", "1"]) == 0
    for split, numbers in (("train", (0, 1)), ("validation", (2, 3))):
        found = {content for name, content in members(tmp_path / "out", split) if name.endswith("jpg")}
        assert found == {picture(number, "JPEG") for number in numbers}
    path = table(tmp_path, "path,label,split", *rows[:3], "images/003.jpg,b,")
    assert r1p_convert([path, str(tmp_path / "other")]) == 2
    assert "column 'split': '' of record 3 is no split" in capsys.readouterr().err


def test_names_that_are_no_text_can_be_counted() -> None:
    left_out = LeftOut()
    for _ in range(5):
        left_out.add("why", "a\udcff.txt")
    assert json.dumps(left_out.as_json()).encode() and left_out.lines() == [
        "5 why: " + ", ".join([r"a\udcff.txt"] * 3) + ", ..."
    ]
