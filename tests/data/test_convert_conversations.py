"""Conversion of LLaVA's conversations: no, one or several pictures, the stream file, and each kind of wrong record."""

import json
from pathlib import Path

import pytest

from r1p_dist.data import Stream
from r1p_dist.data.convert.sources import SourceOptions, open_source
from r1p_dist.data.samples import JSON_BYTES
from r1p_dist.data.shards import ShardDataset
from r1p_dist.errors import InputError
from tests.data.converting import contents, pixels, r1p_convert, run, samples, write_photos
from tests.data.toy_conversations import turns

PICTURES = ("ant/a.00.jpg", "ant/a.01.png", "ant/a.02.webp")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos")


def record(number: int, *pictures: str, **fields) -> dict:
    image = {0: {}, 1: {"image": pictures[0] if pictures else None}}.get(len(pictures), {"image": list(pictures)})
    question = "<image>\n" * len(pictures) + f"Käfer {number}?"
    return {"id": f"q{number}", **image, "conversations": turns(question, f"Nummer {number}."), **fields}


RECORDS = [
    record(0, PICTURES[0], answers=["0", "null"], choices=["0", "1"], license="cc0"),
    record(1),
    record(2, *PICTURES),
    record(3, image=None),
    record(4, image=[]),
    record(5, image=[PICTURES[1]], conversations=turns("Which?", "The blue one.")),
]


def write(path: Path, records: list) -> Path:
    if path.suffix == ".jsonl":
        text = "\n".join(json.dumps(entry, ensure_ascii=False) for entry in records) + "\n\n"
    else:
        text = json.dumps(records)
    path.write_text(text, encoding="utf-8")
    return path


def open_records(path: Path, records: list, **options):
    return open_source(str(write(path, records)), None, SourceOptions(**options))


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_records_keep_all_but_their_pictures_paths(folder: Path, tmp_path: Path, name: str) -> None:
    index = run(open_records(tmp_path / name, RECORDS, image_folder=folder), tmp_path / "out", shard_samples=2)
    assert index["samples"] == 6 and index["metric"] == "exact_match" and index["licences"] == {"cc0": 1, "unknown": 5}
    found = {}
    for files in samples(tmp_path / "out").values():
        text = json.loads(files.pop("json"))
        found[text["id"]] = (text, files)
    for entry in RECORDS:
        text, files = found[entry["id"]]
        assert text == {key: value for key, value in entry.items() if key != "image"}
        paths = [entry.get("image")] if isinstance(entry.get("image"), str) else entry.get("image") or []
        suffixes = [path.rpartition(".")[2] for path in paths]
        names = suffixes if len(paths) == 1 else [f"{place}.{suffix}" for place, suffix in enumerate(suffixes)]
        assert files == {name: (folder / path).read_bytes() for name, path in zip(names, paths, strict=True)}


def test_the_index_has_the_lengths_that_the_headers_say(folder: Path, tmp_path: Path) -> None:
    index = run(open_records(tmp_path / "a.json", RECORDS, image_folder=folder), tmp_path / "out", shard_samples=4)
    shards = [tmp_path / "out/train" / shard["name"] for shard in index["shards"]]
    indexed = ShardDataset(shards, None)
    numbers = [indexed.read(place).number for place in range(6)]
    assert [shard["labels"] for shard in index["shards"]] == [None, None]
    assert indexed.lengths == sum((shard["lengths"] for shard in index["shards"]), [])
    # An index from before there were lengths, and none at all: the headers are read.
    path = tmp_path / "out/train/index.json"
    for shard in index["shards"]:
        del shard["lengths"]
    path.write_text(json.dumps(index))
    for _ in range(2):
        scanned = ShardDataset(shards, None)
        assert scanned.lengths == indexed.lengths and scanned.fingerprint() == indexed.fingerprint()
        assert [scanned.read(place).number for place in range(6)] == numbers
        path.unlink(missing_ok=True)
    answers = {sample.answers for sample in map(scanned.read, range(6))}
    assert answers == {("0", "null"), *((f"Nummer {number}.",) for number in (1, 2, 3, 4)), ("The blue one.",)}


def test_an_index_whose_lengths_contradict_is_refused(folder: Path, tmp_path: Path) -> None:
    index = run(open_records(tmp_path / "a.json", RECORDS, image_folder=folder), tmp_path / "out")
    for lengths, message in (([1, 2], "000000.tar: its columns or bytes contradict"), ([-1] * 6, "shards: lengths")):
        index["shards"][0]["lengths"] = lengths
        (tmp_path / "out/train/index.json").write_text(json.dumps(index))
        with pytest.raises(InputError, match=f"index.json: {message}"):
            ShardDataset([tmp_path / "out/train/000000.tar"], None)


def test_every_picture_of_a_record_is_made_smaller(folder: Path, tmp_path: Path) -> None:
    run(open_records(tmp_path / "a.json", [RECORDS[2]], image_folder=folder), tmp_path / "out", resize=8)
    (sample,) = map(ShardDataset([tmp_path / "out/train/000000.tar"], None).read, [0])
    assert [image.size for image in sample.images] == [(12, 8)] * 3
    (files,) = samples(tmp_path / "out").values()
    assert list(files) == ["0.jpg", "1.png", "2.webp", "json"]
    assert [image.tobytes() for image in sample.images] == [pixels(files[name]) for name in list(files)[:3]]


def test_a_record_with_an_unusable_picture_is_left_out(folder: Path, tmp_path: Path) -> None:
    (folder / PICTURES[1]).write_bytes(b"not a picture")
    (folder / "b.gif").write_bytes(b"GIF89a")  # cut off
    records = [*RECORDS[:3], record(6, "b.gif")]
    index = run(open_records(tmp_path / "a.json", records, image_folder=folder), tmp_path / "out")
    assert index["samples"] == 2
    first, second = sorted(index["skipped"])
    assert first == "q2: picture cannot be decoded: of no format that Pillow reads"
    assert second.startswith("q6: picture cannot be decoded: ")
    assert index["left_out"]["picture missing or not decoded"]["count"] == 2


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (7, "needs a list `conversations` with turns"),
        ({"id": 1}, "needs a list `conversations` with turns"),
        ({"conversations": turns("a")}, "turns must alternate from human to gpt"),
        ({"conversations": turns("<image> a", "b")}, "1 <image> in its human turns and 0 pictures"),
        ({"image": "a.jpg", "conversations": turns("<image><image>", "b")}, "2 <image> in its human turns and 1 pict"),
        ({"image": 7, "conversations": turns("a", "b")}, "`image` must be a picture's path or a list of paths, is 7"),
        ({"image": ["a.jpg", 7], "conversations": turns("a", "b")}, "`image` must be a picture's path .* 7"),
        ({"conversations": turns("a", "b"), "answers": [1]}, r"answers\[0\]: must be text that is not empty, is 1"),
        ({"conversations": turns("a", "b"), "note": "\ud800"}, "holds what is no Unicode text: surrogates not allowed"),
        ({"conversations": turns("a", "b" * JSON_BYTES)}, rf"bytes, no conversation has over {JSON_BYTES}"),
    ],
)
def test_a_wrong_record_is_named_by_its_number(tmp_path: Path, entry: object, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([RECORDS[1], entry]))
    with pytest.raises(InputError, match=f"a.json: record 1: .*{message}") as caught:
        open_source(str(path), None, SourceOptions())
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"conversations": []}\n\n{"a"\n')
    with pytest.raises(InputError, match="a.jsonl: line 3: not JSON: Expecting"):
        open_source(str(tmp_path / "a.jsonl"), None, SourceOptions())
    (tmp_path / "a.jsonl").write_bytes(b'"\xff"')
    with pytest.raises(InputError, match="a.jsonl: line 1: not JSON: "):
        open_source(str(tmp_path / "a.jsonl"), None, SourceOptions())
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="a.json: not a JSON file: "):
        open_source(str(tmp_path / "a.json"), None, SourceOptions())
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(InputError, match="a.json: must be a list of conversations"):
        open_source(str(tmp_path / "a.json"), None, SourceOptions())


def test_train_and_test_make_a_stream_of_instructions(folder: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "beetles"
    table = write(tmp_path / "questions.jsonl", RECORDS)
    command = [str(table), str(output), "--image-folder", str(folder), "--workers", "1", "--metric", "vqa_accuracy"]
    assert r1p_convert([*command, "--shard-samples", "4"]) == 0
    assert not (output / "stream.yaml").exists()
    assert r1p_convert([*command[:-2], "--split", "test"]) == 2
    fault = f"error: {output}/train/index.json: was written for --metric vqa_accuracy, not exact_match; give that one"
    assert fault in capsys.readouterr().err
    assert r1p_convert([*command, "--split", "test"]) == 0
    (task,) = Stream.load(output).tasks
    assert (task.name, task.metric, task.class_names) == ("beetles", "vqa_accuracy", ())
    assert task.sizes == {"train": 6, "test": 6} and len(task.train) == 2
    assert not (output / "classnames.txt").exists() and not (output / "dataset_type.txt").exists()
    assert r1p_convert(["verify", str(output)]) == 0 and r1p_convert(["stats", str(output)]) == 0
    out = capsys.readouterr().out
    assert "every shard is as it was written" in out and "train: 6 samples, no classes, 2 shards" in out


def test_a_metric_is_for_conversations_alone(folder: Path, tmp_path: Path, capsys) -> None:
    assert r1p_convert([str(folder), str(tmp_path / "out"), "--metric", "cider", "--workers", "1"]) == 2
    assert "--metric cider: is for conversations, and folder has none; leave it out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_verify_finds_a_damaged_picture_among_several(folder: Path, tmp_path: Path, capsys) -> None:
    run(open_records(tmp_path / "a.json", RECORDS, image_folder=folder), tmp_path / "out")
    shard = tmp_path / "out/train/000000.tar"
    content = shard.read_bytes()
    webp = (folder / PICTURES[2]).read_bytes()
    assert content.count(webp) == 1
    shard.write_bytes(content.replace(webp, bytes(len(webp))))
    assert r1p_convert(["verify", str(tmp_path / "out")]) == 1
    out = capsys.readouterr().out
    assert "sha256 differs" in out and "picture cannot be decoded: no JPEG, PNG, WEBP file" in out


def test_the_bytes_do_not_depend_on_workers(folder: Path, tmp_path: Path) -> None:
    source = open_records(tmp_path / "a.json", RECORDS, image_folder=folder)
    run(source, tmp_path / "one", shard_samples=2)
    run(source, tmp_path / "two", shard_samples=2, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
