"""A conversion is known by its input's content: what was corrected is written again, all else stays as it is."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from r1p_dist.data import Stream
from r1p_dist.data.convert import writer
from r1p_dist.data.convert.sources import SourceOptions, open_source
from r1p_dist.errors import InputError
from tests.data.converting import contents, members, picture, r1p_convert, run, write_photos
from tests.data.test_left_out import put, split_photos
from tests.data.toy_conversations import turns
from tests.data.toy_task import write_tar

COUNT = 6


def write_questions(root: Path, answer: str = "answer") -> Path:
    records = [
        {"image": f"{number}.png", "conversations": turns(f"q{number}", answer if number == 2 else f"a{number}")}
        for number in range(COUNT)
    ]
    return put(root / "q.json", json.dumps(records).encode())


def write_captions(root: Path, caption: str = "caption") -> Path:
    rows = [f"{number}.png,{caption if number == 2 else number}" for number in range(COUNT)]
    return put(root / "captions.csv", "\n".join(["path,caption", *rows]).encode())


def write_labels(root: Path, label: str = "0") -> Path:
    rows = [f"{number}.png,{label if number == 2 else number % 2},cc0" for number in range(COUNT)]
    return put(root / "labels.csv", "\n".join(["path,label,licence", *rows]).encode())


def write_shards(root: Path, label: str = "0") -> Path:
    files = []
    for number in range(COUNT):
        content = (root / f"{number}.png").read_bytes()
        files += [(f"{number}.cls", label.encode() if number == 2 else b"0"), (f"{number}.png", content)]
    (root / "in").mkdir(exist_ok=True)
    write_tar(root / "in/0.tar", files)
    put(root / "in/classnames.txt", b"a\nb\n")
    return root / "in"


WRITERS = {"llava": (write_questions, "corrected"), "captions": (write_captions, "corrected")}
WRITERS |= {"labels": (write_labels, "1"), "shards": (write_shards, "1")}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for number in range(COUNT):
        put(tmp_path / f"{number}.png", picture(number, "PNG"))
    return tmp_path


def convert(path: Path, output: Path, **options) -> dict:
    return run(open_source(str(path), None, SourceOptions()), output, shard_samples=2, **options)


def inodes(output: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in (output / "train").glob("00*.tar")}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("what", ["text", "picture"])
def test_a_corrected_input_is_written_again(pictures: Path, kind: str, what: str) -> None:
    write, corrected = WRITERS[kind]
    output = pictures / "out"
    convert(write(pictures), output)
    before, content = inodes(output), contents(output)
    convert(write(pictures), output)
    assert inodes(output) == before, "written with the same bytes, it is the same"
    if what == "picture":
        put(pictures / "2.png", picture(99, "PNG"))
        path = write(pictures)
    else:
        path = write(pictures, corrected)
    convert(path, output)
    assert sum(before[name] != inode for name, inode in inodes(output).items()) == 1, "the others stay"
    convert(path, pictures / "fresh")
    assert contents(output) == contents(pictures / "fresh") != content
    assert r1p_convert(["verify", str(output)]) == 0


def test_a_copy_of_the_same_pictures_is_the_same(pictures: Path) -> None:
    photos = write_photos(pictures / "photos")
    convert(photos, pictures / "out")
    before = inodes(pictures / "out")
    for path in photos.rglob("*.*"):
        os.utime(path, (1, 1))
    convert(photos, pictures / "out")
    assert inodes(pictures / "out") == before


def test_a_picture_of_the_same_size_and_another_time_is_read_again(pictures: Path) -> None:
    photos = write_photos(pictures / "photos")
    convert(photos, pictures / "out")
    path = photos / "ant/a.01.png"
    content = bytearray(path.read_bytes())
    state = path.stat()
    spoilt = content.replace(b"IEND", b"iEND", 1)
    path.write_bytes(spoilt)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert len(spoilt) == state.st_size
    index = convert(photos, pictures / "out")
    convert(photos, pictures / "fresh")
    assert contents(pictures / "out") == contents(pictures / "fresh")
    assert index["samples"] + len(index["skipped"]) == 18


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-512])])
def test_a_shard_that_is_gone_or_cut_off_is_written_again(pictures: Path, spoil: Callable[[Path], object]) -> None:
    path, output = write_captions(pictures), pictures / "out"
    convert(path, output)
    before = contents(output)
    spoil(output / "train/000001.tar")
    convert(path, output)
    assert contents(output) == before


def stop_after(shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the conversion end after so many shards, as a kill would: nothing is tidied up."""
    write, done = writer.write_shard_of, []

    def write_some(*arguments):
        done.append(arguments)
        if len(done) > shards:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(writer, "write_shard_of", write_some)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_killed_conversion_never_goes_on_with_a_mix(pictures: Path, kind: str, monkeypatch) -> None:
    write, corrected = WRITERS[kind]
    output = pictures / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(2, patch)
        convert(write(pictures), output)
    assert not (output / "train/index.json").exists()
    put(pictures / "4.png", picture(77, "PNG"))
    path = write(pictures, corrected)
    convert(path, output)
    convert(path, pictures / "fresh")
    assert contents(output) == contents(pictures / "fresh")


def test_while_shards_are_written_again_there_is_no_index_and_no_stream(pictures: Path, monkeypatch) -> None:
    write, output = write_labels, pictures / "out"
    for split in ("train", "test"):
        run(open_source(str(write(pictures)), None, SourceOptions()), output, shard_samples=2, split=split)
    Stream.load(output)
    for number in range(COUNT):
        put(pictures / f"{number}.png", picture(50 + number, "PNG"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(1, patch)
        convert(write(pictures), output)
    assert not (output / "stream.yaml").exists() and not (output / "train/index.json").exists()
    assert (output / "test/index.json").exists(), "the other split is whole"
    with pytest.raises(InputError, match="no such stream file"):
        Stream.load(output)
    # The pictures go back to what they were: the shard that was written again is old now.
    for number in range(COUNT):
        put(pictures / f"{number}.png", picture(number, "PNG"))
    for split in ("train", "test"):
        run(open_source(str(write(pictures)), None, SourceOptions()), output, shard_samples=2, split=split)
    stored = [content for name, content in members(output) if name.endswith("png")]
    assert sorted(stored) == sorted(picture(number, "PNG") for number in range(COUNT))
    Stream.load(output)


def test_a_corrected_class_name_counts_for_all_splits_of_the_call(tmp_path: Path, capsys) -> None:
    rows = [f"{n}.png,{('cta', 'dog')[n % 2]},{('train', 'test')[n // 4]}" for n in range(8)]
    for number in range(8):
        put(tmp_path / f"{number}.png", picture(number, "PNG"))
    path = put(tmp_path / "list.csv", "\n".join(["path,label,split", *rows]).encode())
    command = [str(path), str(tmp_path / "out"), "--workers", "1"]
    assert r1p_convert(command) == 0
    assert Stream.load(tmp_path / "out").tasks[0].class_names == ("cta", "dog")
    capsys.readouterr()
    path.write_text(path.read_text().replace("cta", "wolf"))  # sorts behind dog: the numbers change as well
    assert r1p_convert([*command, "--split", "test"]) == 2
    assert "another split here has other classes (train)" in capsys.readouterr().err
    assert r1p_convert(command) == 0
    assert "out/test: INPUT has changed, 1 of 1 shards are written again" in capsys.readouterr().err
    assert Stream.load(tmp_path / "out").tasks[0].class_names == ("dog", "wolf")
    for split, numbers in (("train", range(4)), ("test", range(4, 8))):
        files = dict(members(tmp_path / "out", split))
        found = {content: files[f"{name.partition('.')[0]}.cls"] for name, content in files.items() if "png" in name}
        assert found == {picture(n, "PNG"): b"%d" % (n % 2 == 0) for n in numbers}


def test_other_records_are_refused_with_the_remedy(pictures: Path) -> None:
    photos, output = write_photos(pictures / "photos"), pictures / "out"
    convert(photos, output)
    put(photos / "ant/new.png", picture(50, "PNG"))
    with pytest.raises(
        InputError, match="was written from other data .*; remove .*out/train to write it again, or name"
    ):
        convert(photos, output)
    shutil.rmtree(output / "train")
    assert convert(photos, output)["samples"] == 19


def test_what_is_left_out_is_that_of_the_last_call(tmp_path: Path) -> None:
    root, output = split_photos(tmp_path / "photos", "train", "test"), tmp_path / "out"
    command = [str(root), str(output), "--workers", "1"]
    assert r1p_convert(command) == 0
    before = inodes(output)
    put(root / "train/notes.txt", b"x")
    assert r1p_convert(command) == 0 and inodes(output) == before
    index = json.loads((output / "train/index.json").read_text())
    assert index["left_out"] == {"no picture that Pillow reads (.txt)": {"count": 1, "examples": ["notes.txt"]}}
    assert r1p_convert([*command, "--strict"]) == 2


def test_a_stream_file_that_was_lost_or_edited(tmp_path: Path) -> None:
    root, output = split_photos(tmp_path / "photos", "train", "test"), tmp_path / "out"
    command = [str(root), str(output), "--workers", "1"]
    assert r1p_convert(command) == 0
    stream = (output / "stream.yaml").read_text()
    (output / "stream.yaml").unlink()  # a kill just before it was written
    assert r1p_convert(command) == 0 and (output / "stream.yaml").read_text() == stream
    (output / "stream.yaml").write_text(stream + "# mine\n")
    assert r1p_convert(command) == 0 and "# mine" in (output / "stream.yaml").read_text()
