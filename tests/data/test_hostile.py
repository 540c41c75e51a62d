"""Hostile shards, one test for each kind: what is in them is never run, trusted, or followed out of the archive."""

import inspect
import io
import json
import os
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from webdataset.tariterators import base_plus_ext, tar_file_iterator

from r1p_dist.data import Stream
from r1p_dist.data.convert.shard_writer import ConvertOptions
from r1p_dist.data.convert.shard_writer import write_tar as write_tar_of_samples
from r1p_dist.data.convert.sources import SourceOptions, open_source
from r1p_dist.data.convert.writer import convert
from r1p_dist.data.index import SAMPLE_BYTES, index_shard
from r1p_dist.data.samples import BadSampleError, key_and_suffix, split_sample
from r1p_dist.data.shards import ShardDataset
from r1p_dist.errors import InputError
from tests.data.toy_task import picture, sample_files, write_tar

CLASSES = ("ant", "bee", "cat")


def header(name: str | bytes, size: int, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    """Return a tar header with a right checksum, whatever it claims."""
    info = tarfile.TarInfo("placeholder")
    info.size, info.type, info.linkname = size, kind, link
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT)[-512:])
    raw = name if isinstance(name, bytes) else name.encode()
    block[:100] = raw.ljust(100, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


def member(name: str | bytes, content: bytes, **options) -> bytes:
    return header(name, len(content), **options) + content.ljust(-(-len(content) // 512) * 512, b"\0")


def write_raw(path: Path, *parts: bytes) -> Path:
    path.write_bytes(b"".join(parts) + b"\0" * 1024)
    return path


def refusal(shard: Path) -> str:
    with pytest.raises(InputError) as caught:
        ShardDataset([shard], CLASSES)
    message = str(caught.value)
    assert str(shard) in message and "\n" not in message
    message.encode()  # a message that cannot be printed would hide the reason
    return message


@pytest.mark.parametrize("name", ["/etc/a.png", "../a.png", "x/../../a.png"])
def test_names_that_leave_the_archive_are_refused(tmp_path: Path, name: str):
    shard = write_raw(tmp_path / "a.tar", member(name, picture(0)), member(name[:-3] + "cls", b"0"))
    assert "leaves the archive" in refusal(shard)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_no_pictures(tmp_path: Path, kind: bytes):
    (tmp_path / "secret.png").write_bytes(picture(1))
    link = header("a.png", 0, kind, str(tmp_path / "secret.png"))
    shard = write_raw(tmp_path / "a.tar", link, member("a.cls", b"0"))
    assert "key a: needs one picture" in refusal(shard)


@pytest.mark.parametrize("size", [10 * 2**30, 8**11 - 1, 2**40])
def test_a_header_that_claims_gigabytes_is_refused_at_once(tmp_path: Path, size: int):
    assert f"no sample has over {SAMPLE_BYTES}" in refusal(
        write_raw(tmp_path / "a.tar", header("a.png", size), picture(0))
    )


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_long_name_or_extension_of_gigabytes_is_refused(tmp_path: Path, kind: bytes):
    shard = write_raw(tmp_path / "a.tar", header("a.png", 10 * 2**30, kind), *([member("b.png", picture(0))] * 2))
    refusal(shard)


def test_a_file_that_really_has_gigabytes_is_refused_unread(tmp_path: Path):
    shard = tmp_path / "a.tar"
    with open(shard, "wb") as file:
        file.write(header("a.png", 10 * 2**30))
        file.seek(10 * 2**30, os.SEEK_CUR)  # a hole: takes no room on the disk
        file.write(member("a.cls", b"0") + b"\0" * 1024)
    assert f"no sample has over {SAMPLE_BYTES}" in refusal(shard)


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path):
    shard = write_raw(tmp_path / "a.tar", member(b"\xff\xfe.png", picture(0)), member(b"\xff\xfe.cls", b"0"))
    assert "not UTF-8" in refusal(shard)


def test_class_names_and_templates_that_are_not_utf8_are_refused(tmp_path: Path):
    write_tar(tmp_path / "a.tar", sample_files(0, 0))
    (tmp_path / "stream.yaml").write_text(
        "name: x\ntasks: [{name: t, train: [a.tar], test: [a.tar], class_names: c.txt, templates: p.txt}]\n"
    )
    (tmp_path / "c.txt").write_bytes(b"K\xe4fer\n")
    (tmp_path / "p.txt").write_text("a {c}\n")
    with pytest.raises(InputError, match="c.txt: line 1 is no UTF-8 text"):
        Stream.load(tmp_path)
    (tmp_path / "c.txt").write_text("Käfer\n")
    (tmp_path / "p.txt").write_bytes(b"ein \xe4 {c}\n")
    with pytest.raises(InputError, match="p.txt: line 1 is no UTF-8 text"):
        Stream.load(tmp_path)


def test_an_empty_file_is_no_shard(tmp_path: Path):
    (tmp_path / "a.tar").write_bytes(b"")
    refusal(tmp_path / "a.tar")


class _Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", ["pkl", "pickle", "pyd", "pth", "pt", "npy", "npz"])
def test_members_with_code_are_never_opened(tmp_path: Path, suffix: str):
    payload = pickle.dumps(_Payload(tmp_path / "ran"))
    shard = write_tar(tmp_path / "a.tar", [*sample_files(0, 1), (f"s00000.{suffix}", payload)])
    sample = ShardDataset([shard], CLASSES).read(0)
    np.testing.assert_array_equal(np.asarray(sample.images[0]), np.asarray(Image.open(io.BytesIO(picture(0)))))
    assert sample.label == 1
    assert set(split_sample(shard.read_bytes(), "s00000", "")) == {"png", "cls"}
    (tmp_path / "classnames.txt").write_text("ant\nbee\ncat\n")
    convert(open_source(str(tmp_path), "shards", SourceOptions()), tmp_path / "out", ConvertOptions(), name="x")
    with tarfile.open(tmp_path / "out/train/000000.tar") as tar:
        assert {Path(name).suffix for name in tar.getnames()} <= {".png", ".cls"}
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("url", ["pipe:touch {}", "exec:touch {}", "ssh://host/a.tar", "file:{}", "htgs://x/a.tar"])
def test_commands_and_other_addresses_are_refused(tmp_path: Path, url: str):
    url = url.format(tmp_path / "ran")
    (tmp_path / "stream.yaml").write_text(
        f"name: x\ntasks: [{{name: t, train: ['{url}'], test: ['{url}'], class_names: c, templates: p}}]\n"
    )
    with pytest.raises(InputError, match="commands are never run"):
        Stream.load(tmp_path)
    assert "missing" in refusal(Path(url))
    assert not (tmp_path / "ran").exists()


def test_dots_in_names_cut_the_key_as_webdataset_does_and_clash_loudly(tmp_path: Path):
    files = [("v1.0/a.small.png", picture(0)), ("v1.0/a.cls", b"0")]
    shard = write_tar(tmp_path / "a.tar", files)
    assert "key v1.0/a: needs one picture" in refusal(shard), "its suffix is small.png"
    files = [("a.1.png", picture(0)), ("a.1.cls", b"0"), ("a.2.png", picture(1)), ("a.2.cls", b"0")]
    assert "key a: needs one picture" in refusal(write_tar(tmp_path / "b.tar", files))
    files = [("v1.0/a.png", picture(0)), ("v1.0/a.cls", b"2")]
    assert ShardDataset([write_tar(tmp_path / "c.tar", files)], CLASSES).labels == [2]


@pytest.mark.parametrize(
    "name",
    "a.jpg a.B.JPG .a a. a v1.0/a.jpg v1.0/a v1.0/.a v1.0/ ./a.cls a//b.txt /a.x a/b.c/d.e.f __a__/b.c __a__ "
    "a/__b__.c x__a__.c __a__.c ..a .a.b a..b /.x.y".split()
    + ["", "/", ".", "a\nb.c", "a.\n", "a/b\n.c"],
)
def test_keys_and_suffixes_are_those_of_webdataset(name: str) -> None:
    key, suffix = base_plus_ext(name)
    is_meta = re.match(inspect.signature(tar_file_iterator).parameters["skip_meta"].default, name)
    assert key_and_suffix(name) == (None if key is None or is_meta else (key, suffix.lower()))


def test_written_bytes_are_those_of_webdataset(tmp_path: Path) -> None:
    samples = [
        {"__key__": f"s{i:09d}", "cls": b"%d" % i, "jpg": bytes(i * 511), "0.png": b"x" * 512 * i} for i in range(30)
    ]
    theirs = io.BytesIO()
    with webdataset.TarWriter(theirs, encoder=False, mtime=0, user="root", group="root") as writer:
        for sample in samples:
            writer.write(sample)
    ours = io.BytesIO()
    write_tar_of_samples(ours, samples)
    assert ours.getvalue() == theirs.getvalue() and len(samples) == 30


def test_files_of_a_sample_that_stand_apart_are_refused_with_the_remedy(tmp_path: Path):
    files = [("a.png", picture(0)), ("b.png", picture(1)), ("a.cls", b"0"), ("b.cls", b"0")]
    shard = write_tar(tmp_path / "a.tar", files)
    assert "key a: its files stand apart from one another" in refusal(shard)
    assert "tools/convert_shards.py" in refusal(shard)
    twice = [("a.png", picture(0)), ("a.cls", b"0"), ("b.png", picture(1)), ("b.cls", b"0"), ("a.png", picture(0))]
    assert "the key is used twice" in refusal(write_tar(tmp_path / "b.tar", twice))


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    for index in range(6):
        path = tmp_path / "photos" / CLASSES[index % 3] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(index))
    convert(
        open_source(str(tmp_path / "photos"), None, SourceOptions()), tmp_path / "out", ConvertOptions(), name="insects"
    )
    return tmp_path / "out/train"


def _edit(key: str, value: object) -> Callable[[dict], None]:
    return lambda index: index["shards"][0].__setitem__(key, value)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_edit("offsets", [0, 10, 20, 30, 40, 50]), "contradict"),
        (_edit("offsets", [0] * 6), "contradict"),
        (_edit("offsets", [0, -1, 20, 30, 40, 50]), "0.offsets|offsets.1|offsets"),
        (_edit("offsets", ["0"] * 6), "offsets"),
        (_edit("keys", ["a"]), "contradict"),
        (_edit("keys", 3), "keys"),
        (_edit("crc32", [0]), "contradict"),
        (_edit("labels", [0, 1, 2]), "contradict"),
        (_edit("labels", [0, 1, 2, 0, 1, 3]), "label 3 is outside the class list"),
        (_edit("name", "../../etc/passwd"), "name"),
        (_edit("bytes", 2**62), "bytes, .*index.json says|contradict"),
        (_edit("sha256", "x"), "sha256"),
        (lambda index: index.pop("shards"), "no index of shards"),
        (lambda index: index["shards"].append(7), "dictionary"),
    ],
)
def test_an_index_that_lies_is_refused(converted: Path, edit: Callable[[dict], object], words: str):
    path = converted / "index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match=words) as caught:
        ShardDataset([converted / "000000.tar"], CLASSES)
    assert "index.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_an_index_that_is_none_is_refused(converted: Path, content: bytes):
    (converted / "index.json").write_bytes(content)
    with pytest.raises(InputError, match="index.json: is no index of shards"):
        ShardDataset([converted / "000000.tar"], CLASSES)


def test_an_index_of_other_samples_never_passes_for_the_right_one(converted: Path):
    index = json.loads((converted / "index.json").read_text())
    for key, values, words in (
        ("keys", list(reversed(index["shards"][0]["keys"])), "stands in its place"),
        ("labels", [(label + 1) % 3 for label in index["shards"][0]["labels"]], "its label is not"),
        ("offsets", [0, *(offset + 512 for offset in index["shards"][0]["offsets"][1:])], "crc32 differs"),
        ("crc32", [0] * 6, "crc32 differs"),
    ):
        changed = json.loads(json.dumps(index))
        changed["shards"][0][key] = values
        (converted / "index.json").write_text(json.dumps(changed))
        dataset = ShardDataset([converted / "000000.tar"], CLASSES)
        for number in range(6):
            with pytest.raises(BadSampleError, match=words):
                dataset.read(number)


def test_a_shard_of_another_size_than_its_index_says_is_refused(converted: Path):
    shard = converted / "000000.tar"
    shard.write_bytes(shard.read_bytes() + b"\0" * 512)
    with pytest.raises(InputError, match="000000.tar: has .* bytes, .*index.json says .*; convert again"):
        ShardDataset([shard], CLASSES)


def test_joined_archives_are_refused_by_the_scan(tmp_path: Path):
    content = write_tar(tmp_path / "a.tar", sample_files(0, 0)).read_bytes()
    (tmp_path / "b.tar").write_bytes(content * 2)
    with pytest.raises(InputError, match="several archives in one file"):
        index_shard(tmp_path / "b.tar")
