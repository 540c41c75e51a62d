"""Class names: what is one name stays one through files, what is none is refused, and labels are never shifted."""

import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from r1p_dist.data.convert.class_names import class_name, classes_among, named_classes
from r1p_dist.data.convert.records import Files, Source
from r1p_dist.data.convert.sources import SourceOptions, open_source
from r1p_dist.data.pictures import decode_picture
from r1p_dist.data.shards import ShardDataset
from r1p_dist.data.stream import read_class_names
from r1p_dist.errors import InputError
from tests.data.converting import picture, run
from tests.data.test_left_out import put

COMPOSED, DECOMPOSED = "K\u00e4fer", "Ka\u0308fer"


def labels_in(output: Path) -> dict[bytes, str]:
    """The class of each picture, as training reads it."""
    names = read_class_names(output / "classnames.txt")
    dataset = ShardDataset([output / "train/000000.tar"], names)
    samples = map(dataset.read, range(len(dataset)))
    return {sample.images[0].tobytes(): names[sample.label] for sample in samples}


def convert_table(root: Path, values: list[str]) -> tuple[dict[int, str], Source]:
    rows = []
    for number, value in enumerate(values):
        put(root / f"{number}.png", picture(number, "PNG"))
        rows.append(f'{number}.png,"{value}"')
    put(root / "t.csv", "\n".join(["path,label", *rows]).encode())
    source = open_source(str(root / "t.csv"), None, SourceOptions())
    run(source, root / "out")
    found = labels_in(root / "out")
    return {
        number: found[decode_picture(picture(number, "PNG"), "k").tobytes()] for number in range(len(values))
    }, source


@pytest.mark.parametrize("space", ["\r", "\r\n", "\n", "\t", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u00a0", "  "])
def test_white_space_of_any_kind_is_one_blank(tmp_path: Path, space: str) -> None:
    names = [f"big{space}cat", "dog", f"{space}emu{space}" if space.strip(" ") else " emu ", "fox"]
    found, source = convert_table(tmp_path, names)
    assert source.class_names == ("big cat", "dog", "emu", "fox")
    assert found == {0: "big cat", 1: "dog", 2: "emu", 3: "fox"}


def test_names_that_look_the_same_are_one_class(tmp_path: Path) -> None:
    found, source = convert_table(tmp_path, [COMPOSED, DECOMPOSED, f"{COMPOSED} ", f"\ufeff{COMPOSED}", "ant"])
    assert source.class_names == (COMPOSED, "ant") and set(found.values()) == {COMPOSED, "ant"}
    for number, name in enumerate((COMPOSED, DECOMPOSED, "ant")):
        put(tmp_path / "photos" / name / f"{number}.png", picture(number, "PNG"))
    source = open_source(str(tmp_path / "photos"), None, SourceOptions())
    assert source.class_names == (COMPOSED, "ant") and sorted(source.labels) == [0, 0, 1]


@pytest.mark.parametrize("missing", ["", "  ", "\r\n", "nan", "NaN", "<NA>", "\ufeff"])
def test_a_missing_label_is_no_class(tmp_path: Path, missing: str) -> None:
    with pytest.raises(InputError, match=r"t.csv: column 'label': record 1: class .* stands for none"):
        convert_table(tmp_path, ["cat", missing, "dog"])


@pytest.mark.parametrize("values", [["a", None], [1.0, float("nan")]])
def test_a_missing_label_of_a_parquet_or_saved_data_set_is_no_class(tmp_path: Path, values: list) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"path": ["a.png", "b.png"], "label": values}), tmp_path / "t.parquet")
    put(tmp_path / "a.png", picture(0, "PNG"))
    with pytest.raises(InputError, match="column 'label': record 1: has no class; fill it in or remove the record"):
        open_source(str(tmp_path / "t.parquet"), None, SourceOptions())
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"path": ["a.png", "b.png"], "label": values}).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match="column 'label': record 1: has no class; fill it in or remove the record"):
        open_source(str(tmp_path / "saved"), None, SourceOptions())


def test_words_that_may_be_classes_stay() -> None:
    assert [class_name(value, "x") for value in ("None", "NA", "null", 0, 1.5, True, "naan")] == [
        *("None", "NA", "null", "0", "1.5", "True", "naan")
    ]


@pytest.mark.parametrize("pair", [("1", "1.0"), ("1", "01"), ("7", "+7"), ("2.5", "2.50")])
def test_one_number_written_two_ways_is_refused(pair: tuple[str, str]) -> None:
    with pytest.raises(InputError, match="t: classes .* and .* are one number; write it one way"):
        classes_among(("0", *pair), "t")
    assert classes_among(("1", "10", "9", "x", "1.5"), "t") == ("1", "9", "10", "1.5", "x")


@pytest.mark.parametrize("name", ["a\0b", "a\x07", "\x1b[31mred", "\udcff"])
def test_a_name_that_is_no_text_is_refused_on_one_printable_line(name: str) -> None:
    with pytest.raises(InputError, match="x: class .* has characters that are no text; rename it") as caught:
        class_name(name, "x")
    assert str(caught.value).isprintable() and str(caught.value).encode()


def test_a_given_list_keeps_its_order_and_names_that_stand_twice() -> None:
    """ImageNet has two classes called crane."""
    assert named_classes(("crane", "bee\n", "crane"), "x") == ("crane", "bee", "crane")
    with pytest.raises(InputError, match="x: classes 'bee' and 'bee ' differ in white space alone"):
        named_classes(("bee", "ant", "bee "), "x")


@pytest.mark.parametrize(
    "names", [("a\rb", "c"), (" a", "c"), ("a", ""), ("a", "c\n"), ("\x1ca", "c"), ("\ufeffa", "c")]
)
def test_names_that_would_not_be_read_back_are_never_written(tmp_path: Path, names: tuple[str, str]) -> None:
    """A source that does not normalise its names."""
    paths = [(put(tmp_path / f"{number}.png", picture(number, "PNG")),) for number in range(2)]
    source = Source("other", ["0", "1"], Files(paths), [0, 1], names)
    with pytest.raises(InputError, match="class name .*: must be one line that is not empty"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out/classnames.txt").exists() and not (tmp_path / "out/train/index.json").exists()


def test_a_list_that_a_windows_program_wrote_is_read(tmp_path: Path) -> None:
    path = put(tmp_path / "classnames.txt", "\ufeffant\r\nbee\r\n".encode())
    assert read_class_names(path) == ("ant", "bee")


def test_the_numbers_of_labels_are_those_of_the_written_list(tmp_path: Path) -> None:
    found, source = convert_table(tmp_path, ["10", "9", "x\ry", "b", "10"])
    assert found == {0: "10", 1: "9", 2: "x y", 3: "b", 4: "10"}
    index = json.loads((tmp_path / "out/train/index.json").read_text())
    assert index["classes"] == len(source.class_names) == len(read_class_names(tmp_path / "out/classnames.txt"))
