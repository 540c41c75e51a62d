"""Conversion into shards: every kind of source, the same bytes always, killed and gone on, checked again."""

import csv
import io
import random
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from r1p_dist.data import Stream
from r1p_dist.data.convert.sources import SOURCES, SourceOptions, open_source
from r1p_dist.data.shards import ShardDataset
from r1p_dist.errors import InputError
from tests.data.converting import CLASSES, contents, members, picture, r1p_convert, run, write_photos


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos")


def test_an_image_folder_becomes_shards_with_every_picture_once(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    index = run(open_source(str(folder), None, SourceOptions()), output, shard_samples=4)
    assert index["samples"] == 18 and index["classes"] == 3 and len(index["shards"]) == 5 and index["skipped"] == []
    assert (output / "classnames.txt").read_text().split() == list(CLASSES)
    files = dict(members(output))
    keys = [name.split(".")[0] for name in files]
    assert keys == sorted(keys) and len(set(keys)) == 18
    got = sorted(
        (CLASSES[int(files[f"{key}.cls"])], content) for key in set(keys) for suffix in ("jpg", "png", "webp")
        for content in [files.get(f"{key}.{suffix}")] if content
    )  # fmt: skip
    expected = sorted(
        (path.relative_to(folder).parts[0], path.read_bytes()) for path in folder.rglob("*.*") if path.is_file()
    )
    assert got == expected


def test_the_bytes_do_not_depend_on_workers_or_time(folder: Path, tmp_path: Path) -> None:
    source = open_source(str(folder), None, SourceOptions())
    run(source, tmp_path / "one", shard_samples=4)
    run(source, tmp_path / "three", workers=3, shard_samples=4)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    run(source, tmp_path / "other", shard_samples=4, seed=1)
    assert contents(tmp_path / "one") != contents(tmp_path / "other"), "the seed decides the order"


def test_the_index_says_where_each_sample_begins(folder: Path, tmp_path: Path) -> None:
    index = run(open_source(str(folder), None, SourceOptions()), tmp_path / "out", shard_samples=10)
    for shard in index["shards"]:
        content = (tmp_path / "out/train" / shard["name"]).read_bytes()
        for key, offset in zip(shard["keys"], shard["offsets"], strict=True):
            assert content[offset : offset + 100].startswith(f"{key}.".encode())


@pytest.mark.parametrize("kill_after_shards", [0, 1, 3])
def test_a_killed_conversion_goes_on_to_the_same_bytes(folder: Path, tmp_path: Path, kill_after_shards: int) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(open_source(str(folder), None, SourceOptions()), whole, shard_samples=2)
    script = f"""
import os, signal, sys
from r1p_dist.data.convert import shard_writer
write, done = shard_writer.write_atomically, []
def die_half_way(path, content):
    done.append(path)
    if len(done) > {kill_after_shards}:
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, content)
shard_writer.write_atomically = die_half_way
from r1p_dist.cli import main
main(["convert", {str(folder)!r}, {str(killed)!r}, "--shard-samples", "2", "--workers", "1", "--name", "task"])
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=500)
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()
    assert not (killed / "train/index.json").exists()
    before = {path: path.stat().st_mtime_ns for path in (killed / "train/.parts").glob("0*.json")}
    assert len(before) == kill_after_shards
    shards = {path.name: path.stat().st_ino for path in (killed / "train").glob("0*.tar")}
    run(open_source(str(folder), None, SourceOptions()), killed, shard_samples=2)
    assert contents(killed) == contents(whole)
    kept = [f"{int(path.stem):06d}.tar" for path in before]
    assert all((killed / "train" / name).stat().st_ino == shards[name] for name in kept), (
        "finished shards are not redone"
    )


def test_another_plan_in_the_same_place_is_refused(folder: Path, tmp_path: Path) -> None:
    source = open_source(str(folder), None, SourceOptions())
    run(source, tmp_path / "out", shard_samples=4)
    assert run(source, tmp_path / "out", shard_samples=4)["samples"] == 18, "the same one is done already"
    with pytest.raises(InputError, match="index.json: was written from other data or with other options"):
        run(source, tmp_path / "out", shard_samples=5)
    (tmp_path / "half/train/.parts").mkdir(parents=True)
    (tmp_path / "half/train/.parts/plan.json").write_text("{}")
    with pytest.raises(InputError, match="a conversion of other data or with other options was begun here"):
        run(source, tmp_path / "half")


def test_train_and_test_make_a_stream_that_trains(folder: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "insects"
    for split in ("train", "test"):
        assert r1p_convert([str(folder), str(output), "--split", split, "--shard-samples", "5"]) == 0
    stream = Stream.load(output)
    (task,) = stream.tasks
    assert task.name == "insects" and task.class_names == CLASSES and task.sizes == {"train": 18, "test": 18}
    dataset = ShardDataset(task.train, task.class_names)
    assert len(dataset) == 18 and all(dataset.read(i).images[0].size == (24, 16) for i in range(18))
    assert "18 samples in 4 shards, 3 classes" in capsys.readouterr().out


def test_splits_with_other_classes_are_refused(folder: Path, tmp_path: Path) -> None:
    run(open_source(str(folder), None, SourceOptions()), tmp_path / "out")
    (folder / "ant").rename(folder / "aphid")
    with pytest.raises(InputError, match="another split here has other classes"):
        run(open_source(str(folder), None, SourceOptions()), tmp_path / "out", split="test")


def test_shots_and_max_samples_are_a_prefix_of_the_seeds_order(folder: Path, tmp_path: Path) -> None:
    source = open_source(str(folder), None, SourceOptions())
    few = run(source, tmp_path / "few", shots=2)
    assert few["samples"] == 6
    labels = [content for name, content in members(tmp_path / "few") if name.endswith(".cls")]
    assert sorted(labels) == [b"0", b"0", b"1", b"1", b"2", b"2"]
    run(source, tmp_path / "all")
    run(source, tmp_path / "five", max_samples=5)
    pictures = [content for name, content in members(tmp_path / "all") if not name.endswith(".cls")]
    assert [content for name, content in members(tmp_path / "five") if not name.endswith(".cls")] == pictures[:5]
    with pytest.raises(InputError, match="--shots 6: class 'cat' has 5 samples"):
        run(source, tmp_path / "many", shots=6)


def test_resize_makes_larger_pictures_smaller_and_leaves_the_others(tmp_path: Path) -> None:
    root = tmp_path / "photos/ant"
    root.mkdir(parents=True)
    (root / "large.png").write_bytes(picture(0, "PNG", (60, 30)))
    (root / "small.jpg").write_bytes(picture(1, "JPEG", (16, 12)))
    run(open_source(str(root.parent), None, SourceOptions()), tmp_path / "out", resize=15)
    files = {Path(name).suffix: content for name, content in members(tmp_path / "out")}
    assert Image.open(io.BytesIO(files[".png"])).size == (30, 15)
    assert files[".jpg"] == (root / "small.jpg").read_bytes()


def test_a_picture_that_cannot_be_decoded_is_left_out_and_named(folder: Path, tmp_path: Path) -> None:
    (folder / "bee/a.00.jpg").write_bytes(b"not a picture")
    index = run(open_source(str(folder), None, SourceOptions()), tmp_path / "out", shard_samples=4)
    assert index["samples"] == 17 and len(index["skipped"]) == 1
    assert index["skipped"][0].startswith("bee/a.00.jpg: picture cannot be decoded")
    for path in folder.rglob("*.*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(InputError, match="not one picture could be decoded"):
        run(open_source(str(folder), None, SourceOptions()), tmp_path / "none")


def test_a_shard_whose_pictures_were_all_left_out_harms_no_other(folder: Path, tmp_path: Path) -> None:
    (folder / "bee/a.00.jpg").write_bytes(b"not a picture")
    index = run(open_source(str(folder), None, SourceOptions()), tmp_path / "out", shard_samples=1)
    assert sorted(shard["samples"] for shard in index["shards"]) == [0] + [1] * 17
    shards = [tmp_path / "out/train" / shard["name"] for shard in index["shards"] if shard["samples"]]
    dataset = ShardDataset(shards, CLASSES)
    assert len(dataset) == 17 and all(dataset.read(i).images[0].size == (24, 16) for i in range(17))


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_table_of_classes_and_one_of_captions(folder: Path, tmp_path: Path, suffix: str) -> None:
    rows = [
        {
            "filepath": path.relative_to(folder).as_posix(),
            "label": path.relative_to(folder).parts[0],
            "title": f"a, {i} ü",
        }
        for i, path in enumerate(sorted(path for path in folder.rglob("*.*") if path.is_file()))
    ]
    table = folder / f"list.{suffix}"
    with open(table, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="," if suffix == "csv" else "\t")
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(InputError, match="name one of --label-column and --caption-column"):
        open_source(str(table), None, SourceOptions())
    for column in ("label", "title"):
        for row in rows:
            row.pop("title" if column == "label" else "label", None)
    captioned = tmp_path / "captions.csv"
    with open(captioned, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["filepath", "caption"])
        writer.writeheader()
        writer.writerows({"filepath": row["filepath"], "caption": f"a, {i} ü"} for i, row in enumerate(rows))
    index = run(open_source(str(captioned), None, SourceOptions(image_folder=folder)), tmp_path / "out")
    assert index["samples"] == 18 and index["classes"] is None
    texts = {content.decode() for name, content in members(tmp_path / "out") if name.endswith(".txt")}
    assert texts == {f"a, {i} ü" for i in range(18)}
    labelled = tmp_path / "labels.csv"
    labelled.write_text(
        "image,class\n" + "".join(f"{row['filepath']},{10 if i else 9}\n" for i, row in enumerate(rows))
    )
    source = open_source(str(labelled), None, SourceOptions(image_folder=folder))
    assert source.class_names == ("9", "10"), "numbers in their own order"


def test_a_table_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "list.csv"
    table.write_text("image,label\na.jpg\n")
    with pytest.raises(InputError, match="row 2 has not as many fields as the head"):
        open_source(str(table), None, SourceOptions())
    table.write_text("picture,label\na.jpg,1\n")
    with pytest.raises(InputError, match="no column is named like image"):
        open_source(str(table), None, SourceOptions())
    with pytest.raises(InputError, match="no column 'foto'; there are picture, label"):
        open_source(str(table), None, SourceOptions(image_column="foto"))
    with pytest.raises(InputError, match="no/where.csv: no such file or folder"):
        open_source("no/where.csv", None, SourceOptions())
    table.write_text("picture,label\nmissing.jpg,1\n")
    with pytest.raises(InputError, match="missing.jpg: cannot be read: No such file"):
        run(open_source(str(table), None, SourceOptions(image_column="picture")), tmp_path / "out")


def test_converted_shards_and_others_layouts_convert_again(folder: Path, tmp_path: Path) -> None:
    run(open_source(str(folder), None, SourceOptions()), tmp_path / "first", shard_samples=4)
    (tmp_path / "first/zeroshot_classification_templates.txt").write_text("a {c}.\n")
    again = open_source(str(tmp_path / "first"), None, SourceOptions())
    assert again.kind == "shards" and again.class_names == CLASSES and again.templates == ("a {c}.",)
    index = run(again, tmp_path / "second", shard_samples=7)
    assert index["samples"] == 18 and len(index["shards"]) == 3

    img2dataset = tmp_path / "laion"
    img2dataset.mkdir()
    with tarfile.open(img2dataset / "00000.tar", "w") as tar:
        for i in range(3):
            files = {"jpg": picture(i, "JPEG"), "txt": f"caption {i}".encode(), "json": b'{"key": 1}'}
            for suffix, content in files.items():
                member = tarfile.TarInfo(f"00000000{i}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    index = run(open_source(str(img2dataset), None, SourceOptions()), tmp_path / "third")
    names = {Path(name).suffix for name, _ in members(tmp_path / "third")}
    assert index["samples"] == 3 and index["classes"] is None and names == {".jpg", ".txt", ".json"}


def test_help_names_every_command_and_kind(capsys) -> None:
    for command in ([], ["verify"], ["stats"]):
        with pytest.raises(SystemExit) as stopped:
            r1p_convert([*command, "--help"])
        assert stopped.value.code == 0
        out = capsys.readouterr().out
        assert f"r1p convert {' '.join(command)}" in out
        if not command:
            assert all(f"({kind})" in out for kind in SOURCES)
            assert "r1p convert verify OUTPUT" in out and "r1p convert stats OUTPUT" in out


def test_verify_finds_what_changed(folder: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "out"
    run(open_source(str(folder), None, SourceOptions()), output, shard_samples=4)
    assert r1p_convert(["verify", str(output)]) == 0
    assert "every shard is as it was written" in capsys.readouterr().out
    assert r1p_convert(["stats", str(output)]) == 0
    out = capsys.readouterr().out
    assert "train: 18 samples, 3 classes, 5 shards" in out and "classes: from 5 samples (cat) to 7 (ant)" in out
    assert "licences" not in out
    generator = random.Random(0)
    for _ in range(20):
        shard = output / "train" / f"{generator.randrange(5):06d}.tar"
        content = bytearray(shard.read_bytes())
        before = bytes(content)
        place = generator.randrange(len(content))
        content[place] ^= 1 << generator.randrange(8)
        shard.write_bytes(content)
        assert r1p_convert(["verify", str(output)]) == 1, place
        assert "sha256 differs" in capsys.readouterr().out
        shard.write_bytes(before)
    (output / "train/000001.tar").unlink()
    (output / "train/000002.tar").write_bytes((output / "train/000002.tar").read_bytes()[:-512])
    assert r1p_convert(["verify", str(output)]) == 1
    out = capsys.readouterr().out
    assert "000001.tar: missing" in out and "000002.tar: " in out and "the index says" in out
    assert r1p_convert(["verify", str(tmp_path)]) == 2
    assert "no SPLIT/index.json in it" in capsys.readouterr().err
