"""Other programs read the shards that we write, and we read theirs; each runs in a process of its own.

Their packages stand in peers.txt. `make test` installs them into a folder of the virtual environment and sets
R1P_PEERS: a test that needs them then fails where they are missing, and is skipped otherwise.
"""

import functools
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from r1p_dist.data.convert.sources import SourceOptions, open_source
from r1p_dist.data.convert.tar_shards import TEMPLATES
from r1p_dist.data.shards import ShardDataset
from tests.data.converting import CLASSES, pixels, run, samples, write_photos

TWO_TEMPLATES = ("a photo of a {c}.", "ein Käfer: {c}")


@pytest.fixture(scope="module")
def peers() -> Path:
    return folder_of_peers("peers")


def folder_of_peers(name: str) -> Path:
    """Returns a folder of the virtual environment that `make test` fills; without it the test ends here."""
    folder = Path(sys.prefix) / name
    if not folder.is_dir():
        reason = f"{folder} is missing; `make test` installs it"
        pytest.fail(reason) if os.environ.get("R1P_PEERS") else pytest.skip(reason)
    return folder


def run_python(script: str, *arguments: object, path: tuple[Path, ...] = ()) -> str:
    """Runs a script with folders first on its module path; returns the last line that it printed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "no_proxy": "127.0.0.1"}
    command = [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1] if result.stdout else ""


def look(content: bytes) -> str:
    return hashlib.sha256(pixels(content)).hexdigest()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


def photo_files(photos: Path) -> list[Path]:
    return sorted(path for path in photos.rglob("*.*") if path.is_file())


@pytest.fixture(scope="module")
def labelled(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our shards of the photos and their classes."""
    output = tmp_path_factory.mktemp("labelled")
    (output / TEMPLATES).write_text("\n".join(TWO_TEMPLATES) + "\n", encoding="utf-8")
    run(open_source(str(photos), None, SourceOptions()), output, shard_samples=5, split="test")
    return output


@pytest.fixture(scope="module")
def captioned(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our shards of the photos and a caption each, the path of the photo."""
    folder = tmp_path_factory.mktemp("captioned")
    names = [path.relative_to(photos).as_posix() for path in photo_files(photos)]
    table = pyarrow.table({"image": names, "caption": [f"Käfer, {name}" for name in names]})
    pyarrow.parquet.write_table(table, folder / "list.parquet")
    source = open_source(str(folder / "list.parquet"), None, SourceOptions(image_folder=photos))
    run(source, folder / "out", shard_samples=5)
    return folder / "out"


def labels_of(photos: Path) -> list[list]:
    """The look and the label of every photo, sorted."""
    return sorted(
        [look(path.read_bytes()), CLASSES.index(path.relative_to(photos).parts[0])] for path in photo_files(photos)
    )


def captions_of(photos: Path) -> list[list[str]]:
    return sorted(
        [look(path.read_bytes()), f"Käfer, {path.relative_to(photos).as_posix()}"] for path in photo_files(photos)
    )


def test_webdataset_reads_our_shards(labelled: Path, photos: Path) -> None:
    """The version that we are installed with; it leaves its last file open, hence the other process."""
    script = """
import hashlib, json, sys, webdataset
dataset = webdataset.WebDataset(sys.argv[1:], shardshuffle=False).decode("pil")
samples = dataset.to_tuple("__key__", "jpg;png;webp", "cls")
print(json.dumps([[key, hashlib.sha256(image.tobytes()).hexdigest(), label] for key, image, label in samples]))
"""
    found = json.loads(run_python(script, *sorted((labelled / "test").glob("??????.tar"))))
    assert [key for key, *_ in found] == list(samples(labelled, "test"))
    assert sorted(pair for _, *pair in found) == labels_of(photos)


def test_open_clips_training_data_reads_our_shards(captioned: Path, photos: Path, peers: Path) -> None:
    """Its pipelines for training, shuffled and in full batches, and for validation."""
    script = """
import argparse, hashlib, json, sys
import numpy as np
from open_clip_train.data import get_wds_dataset
shards = sys.argv[1] + "/{000000..000003}.tar"
args = argparse.Namespace(
    train_data=shards, val_data=shards, train_num_samples=None, val_num_samples=18, dataset_resampled=False,
    train_data_upsampling_factors=None, seed=0, batch_size=6, workers=0, world_size=1,
)
found = []
for is_train in (True, False):
    info = get_wds_dataset(args, np.asarray, is_train, tokenizer=lambda text: [text])
    batches = list(info.dataloader)
    assert info.dataloader.num_batches == len(batches) == 3
    found.append([
        [hashlib.sha256(np.asarray(image).tobytes()).hexdigest(), text] for images, texts in batches
        for image, text in zip(images, texts)
    ])
print(json.dumps(found))
"""
    train, validation = json.loads(run_python(script, captioned / "train", path=(peers,)))
    assert sorted(train) == sorted(validation) == captions_of(photos)


CLIP_BENCHMARK = """
import hashlib, json, multiprocessing, sys
from pathlib import Path
from PIL import Image
from clip_benchmark.datasets.builder import build_wds_dataset
from clip_benchmark.webdataset_builder import PIL_to_bytes, convert_dataset, convert_retrieval_dataset, path_to_bytes

class Photos(list):
    pass

labelled, captioned, photos, written = sys.argv[1:]
look = lambda image: hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()
classes = build_wds_dataset("wds/labelled", look, split="test", data_dir=labelled)
captions = build_wds_dataset("wds/captioned", look, split="train", data_dir=captioned)
read = {"names": classes.classes, "templates": classes.templates, "classes": list(classes), "captions": list(captions)}

multiprocessing.set_start_method("fork", force=True)  # its loader's collate function cannot be pickled
paths = sorted(path for path in Path(photos).rglob("*.*") if path.is_file())
label = lambda path: classes.classes.index(path.relative_to(photos).parts[0])
files = Photos((str(path), label(path)) for path in paths)
files.classes, files.templates = classes.classes, ["a photo of a {c}."]
convert_dataset(files, "train", written + "/files", transform=path_to_bytes, max_count=7)
images = Photos((Image.open(path).convert("RGB"), label(path)) for path in paths)
images.classes = classes.classes
convert_dataset(images, "test", written + "/images", transform=PIL_to_bytes("webp"), max_count=7)
texts = Photos((str(path), [path.name, "Käfer"]) for path in paths)
convert_retrieval_dataset(texts, "train", written + "/texts", transform=path_to_bytes, max_count=7)
print(json.dumps(read))
"""


@pytest.fixture(scope="module")
def clip_benchmark(labelled: Path, captioned: Path, photos: Path, peers: Path, tmp_path_factory) -> tuple[dict, Path]:
    """What clip_benchmark read of our shards, and the folder of those that it wrote."""
    written = tmp_path_factory.mktemp("clip_benchmark")
    return json.loads(run_python(CLIP_BENCHMARK, labelled, captioned, photos, written, path=(peers,))), written


def test_clip_benchmark_reads_our_shards(clip_benchmark: tuple[dict, Path], photos: Path) -> None:
    read, _ = clip_benchmark
    assert read["names"] == list(CLASSES) and read["templates"] == list(TWO_TEMPLATES)
    assert sorted(read["classes"]) == labels_of(photos)
    assert sorted([image, *texts] for image, texts in read["captions"]) == captions_of(photos)


@pytest.mark.parametrize(("name", "split"), [("files", "train"), ("images", "test")])
def test_we_read_and_convert_clip_benchmarks_shards(
    name: str, split: str, clip_benchmark: tuple[dict, Path], photos: Path, tmp_path: Path
) -> None:
    root = clip_benchmark[1] / name
    shards = [root / split / f"{number}.tar" for number in range(int((root / split / "nshards.txt").read_text()))]
    dataset = ShardDataset(shards, CLASSES)
    read = [dataset.read(index) for index in range(len(dataset))]
    assert len(shards) == 3
    assert sorted([hashlib.sha256(s.images[0].tobytes()).hexdigest(), s.label] for s in read) == labels_of(photos)

    source = open_source(str(root), None, SourceOptions(split=split))
    assert source.class_names == CLASSES and source.templates == (TWO_TEMPLATES[:1] if name == "files" else None)
    run(source, tmp_path / "out", split=split)
    found = []
    for files in samples(tmp_path / "out", split).values():
        label = int(files.pop("cls"))
        found.append([look(*files.values()), label])
    assert sorted(found) == labels_of(photos)


def test_we_convert_clip_benchmarks_captions(clip_benchmark: tuple[dict, Path], photos: Path, tmp_path: Path) -> None:
    run(open_source(str(clip_benchmark[1] / "texts"), None, SourceOptions()), tmp_path / "out")
    found = []
    for files in samples(tmp_path / "out").values():
        text = files.pop("txt").decode()
        found.append((*files.values(), text))
    assert sorted(found) == sorted((path.read_bytes(), f"{path.name}\nKäfer") for path in photo_files(photos))


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Serves tmp_path/pictures and yields its address."""
    (tmp_path / "pictures").mkdir()
    handler = functools.partial(_Quiet, directory=tmp_path / "pictures")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


IMG2DATASET = """
import sys
from img2dataset import download
download(
    sys.argv[1], input_format="parquet", url_col="url", caption_col="caption", save_additional_columns=["license"],
    output_folder=sys.argv[2], output_format="webdataset", resize_mode="no", processes_count=1, thread_count=4,
    number_sample_per_shard=6, timeout=30,
)
"""


def test_we_convert_what_img2dataset_downloads(server: str, peers: Path, tmp_path: Path) -> None:
    """Five smooth pictures, which it encodes anew as JPEG, and one that is not there."""
    rows = {"url": [], "caption": [], "license": []}
    served = {}
    for number in range(6):
        caption, kind = f"ein Käfer, {number}", ("png", "jpg", "webp")[number % 3]
        if number != 4:
            ramp = 3 * np.add.outer(np.arange(20), np.arange(30))
            served[caption] = np.stack([ramp, ramp + 20 * number, 255 - ramp], axis=-1).astype(np.uint8)
            Image.fromarray(served[caption]).save(tmp_path / "pictures" / f"{number}.{kind}", quality=95)
        rows["url"].append(f"{server}/{number}.{kind}")
        rows["caption"].append(caption)
        rows["license"].append(None if number == 5 else "cc-by-4.0")
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "list.parquet")
    # It imports both at its start; neither is used where there is nothing to track and to resize.
    for name in ("wandb", "albumentations"):
        (tmp_path / "unused").mkdir(exist_ok=True)
        (tmp_path / "unused" / f"{name}.py").write_text("")
    path = (peers, tmp_path / "unused")
    run_python(IMG2DATASET, tmp_path / "list.parquet", tmp_path / "laion", path=path)

    theirs = {}
    with tarfile.open(tmp_path / "laion/00000.tar") as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            theirs.setdefault(key, {})[suffix] = tar.extractfile(member).read()
    index = run(open_source(str(tmp_path / "laion"), None, SourceOptions()), tmp_path / "out")
    ours = samples(tmp_path / "out")
    assert Counter(map(str, ours.values())) == Counter(map(str, theirs.values())) and len(ours) == 5
    assert index["licences"] == {"cc-by-4.0": 4, "unknown": 1} and index["classes"] is None
    for files in ours.values():
        expected = served.pop(files["txt"].decode()).astype(int)
        difference = np.frombuffer(pixels(files["jpg"]), np.uint8).reshape(expected.shape) - expected
        assert np.abs(difference).mean() < 4
        assert json.loads(files["json"])["url"].startswith(server)
    assert not served
