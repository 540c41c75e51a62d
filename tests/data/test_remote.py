"""Remote shards: a real HTTP server that fails in every way, a real S3 server, one cache for many processes."""

import functools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import yaml

from r1p_dist.data import Stream, Task
from r1p_dist.data.convert.shard_writer import ConvertOptions
from r1p_dist.data.convert.sources import SourceOptions, open_source
from r1p_dist.data.convert.writer import convert
from r1p_dist.data.encoders import PictureEncoder
from r1p_dist.data.loader import TrainLoader
from r1p_dist.data.remote import NotThereError, ShardCache, is_url, read_remote
from r1p_dist.data.shards import ShardDataset
from r1p_dist.errors import InputError
from tests.data.toy_task import picture

CLASSES = ("ant", "bee", "cat")
PREPROCESS = {"size": 8, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "interpolation": "bicubic"}
# The threads of fsspec and of the servers close some sockets only when they are collected.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Server(ThreadingHTTPServer):
    """Serves a folder; `faults` (path -> list of kinds) are used up one by one, `requests` counts GETs."""

    daemon_threads = True

    def __init__(self, folder: Path):
        self.faults: dict[str, list[str]] = {}
        self.requests: Counter[str] = Counter()
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # a client that was killed


class _Handler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.requests[self.path] += 1
        waiting = self.server.faults.get(self.path)
        fault = waiting.pop(0) if waiting else None
        content = Path(self.translate_path(self.path)).read_bytes() if fault else b""
        if fault in ("500", "403"):
            self.send_error(int(fault))
        elif fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
        elif fault == "changed":
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:700] + b"X" + content[701:])
        elif fault == "slow":
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            for start in range(0, len(content), len(content) // 20):
                self.wfile.write(content[start : start + len(content) // 20])
                time.sleep(0.1)
        else:
            super().do_GET()


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pictures of three classes in eight shards, as a stream."""
    root = tmp_path_factory.mktemp("remote")
    for index in range(40):
        path = root / "photos" / CLASSES[index % 3] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(index))
    for split in ("train", "test"):
        source = open_source(str(root / "photos"), None, SourceOptions())
        convert(source, root / "out", ConvertOptions(split=split, shard_samples=5), name="insects")
    return root / "out"


@pytest.fixture
def server(converted: Path) -> Iterator[Server]:
    with Server(converted) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("r1p_dist.data.remote._FIRST_WAIT_S", 0.01)


def shards(base: str | Path) -> list:
    return [f"{base}/train/{number:06d}.tar" for number in range(8)]


def identity(dataset: ShardDataset) -> list[tuple[bytes, int]]:
    return [(sample.images[0].tobytes(), sample.label) for sample in map(dataset.read, range(len(dataset)))]


def test_addresses_are_told_from_paths():
    assert all(map(is_url, ("http://h/a.tar", "https://h/a.tar", "s3://b/a.tar", "gs://b/a.tar")))
    assert not any(
        map(is_url, ("a.tar", "/a/b.tar", "pipe:curl http://h/a.tar", "file:///a.tar", Path("s3://b/a.tar")))
    )


def test_a_remote_data_set_equals_the_local_one_and_fetches_each_shard_once_when_it_is_needed(
    converted: Path, server: Server, tmp_path: Path
):
    local = ShardDataset(shards(converted), CLASSES)
    remote = ShardDataset(shards(server.url), CLASSES, cache=ShardCache(tmp_path))
    assert remote.labels == local.labels and remote.fingerprint() == local.fingerprint()
    assert set(server.requests) == {"/train/index.json"}, "the index alone says where the samples are"
    assert identity(remote) == identity(local)
    assert identity(remote) == identity(local)
    assert server.requests == {"/train/index.json": 1} | {f"/train/{number:06d}.tar": 1 for number in range(8)}
    assert identity(ShardDataset(shards(server.url), CLASSES, cache=ShardCache(tmp_path))) == identity(local)
    assert server.requests["/train/000003.tar"] == 1, "the next run has them in its cache"


def test_shards_without_an_index_are_fetched_and_scanned(converted: Path, tmp_path: Path):
    plain = tmp_path / "plain"
    plain.mkdir()
    for shard in sorted((converted / "train").glob("??????.tar")):
        (plain / shard.name).write_bytes(shard.read_bytes())
    with Server(plain) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        remote = ShardDataset(
            [f"{server.url}/{n:06d}.tar" for n in range(8)], CLASSES, cache=ShardCache(tmp_path / "cache")
        )
        assert identity(remote) == identity(ShardDataset(shards(converted), CLASSES))
        assert server.requests == {f"/{number:06d}.tar": 1 for number in range(8)} | {"/index.json": 1}
        server.shutdown()


@pytest.mark.parametrize("fault", ["500", "cut", "changed"])
def test_a_fault_of_the_network_is_tried_again_and_nothing_wrong_is_kept(
    converted: Path, server: Server, tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
):
    server.faults["/train/000002.tar"] = [fault] * 3
    remote = ShardDataset(shards(server.url), CLASSES, cache=ShardCache(tmp_path))
    with caplog.at_level(logging.WARNING, "r1p_dist.data.remote"):
        assert identity(remote) == identity(ShardDataset(shards(converted), CLASSES))
    assert server.requests["/train/000002.tar"] == 4
    assert "try 3 of 6 failed" in caplog.text and "again in" in caplog.text
    for path in tmp_path.glob("[!.]*"):
        assert path.read_bytes() == (converted / "train" / path.name.split("-")[1]).read_bytes()


def test_a_fault_that_stays_ends_in_one_line(server: Server, tmp_path: Path):
    server.faults["/train/000000.tar"] = ["changed"] * 6
    remote = ShardDataset(shards(server.url), CLASSES, cache=ShardCache(tmp_path))
    with pytest.raises(InputError, match="000000.tar: failed 6 times, the last time: its sha256 is") as caught:
        remote.read(0)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.glob("[!.]*")) == [] and list(tmp_path.glob("*.partial")) == []
    server.faults["/train/000001.tar"] = ["403"] * 6
    with pytest.raises(NotThereError, match="000001.tar: no right to read it"):
        remote.read(7)
    with pytest.raises(NotThereError, match="none.tar: no such file"):
        ShardCache(tmp_path).open(f"{server.url}/none.tar")


def test_a_missing_library_and_a_full_cache_are_named(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "aiohttp", None)
        with pytest.raises(InputError, match="pip install 'r1p-dist\\[remote\\]'"):
            read_remote(f"{server.url}/train/index.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be kept in .*data.cache_dir"):
        ShardCache(tmp_path / "file").open(f"{server.url}/train/000000.tar")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("r1p_dist.data.remote.sha256_of", full)
    with pytest.raises(InputError, match="No space left on device.*data.cache_dir"):
        ShardCache(tmp_path).open(f"{server.url}/train/000000.tar", "0" * 64)
    assert server.requests["/train/000000.tar"] == 1, "a full disk is not tried again"


def test_the_cache_keeps_to_its_limit_while_all_samples_are_read(converted: Path, server: Server, tmp_path: Path):
    sizes = [path.stat().st_size for path in (converted / "train").glob("??????.tar")]
    cache = ShardCache(tmp_path, limit_bytes=3 * max(sizes))
    remote = ShardDataset(shards(server.url), CLASSES, cache=cache)
    assert identity(remote) == identity(ShardDataset(shards(converted), CLASSES))
    assert sum(path.stat().st_size for path in tmp_path.glob("[!.]*")) <= 3 * max(sizes)
    assert len(list(tmp_path.glob("[!.]*"))) >= 2
    assert identity(remote) == identity(ShardDataset(shards(converted), CLASSES)), "removed shards were open"


READ_ALL = """
import sys, hashlib
from pathlib import Path
from r1p_dist.data.remote import ShardCache
from r1p_dist.data.shards import ShardDataset
shards = [f"{sys.argv[1]}/train/{number:06d}.tar" for number in range(8)]
dataset = ShardDataset(shards, ("ant", "bee", "cat"), cache=ShardCache(Path(sys.argv[2])))
print("ready", flush=True)
print(hashlib.sha256(b"".join(dataset.read(i).images[0].tobytes() for i in range(len(dataset)))).hexdigest())
"""


def test_processes_share_a_cache_and_a_killed_one_leaves_nothing_behind(
    converted: Path, server: Server, tmp_path: Path
):
    server.faults["/train/000000.tar"] = ["slow"] * 2
    command = [sys.executable, "-c", READ_ALL, server.url, str(tmp_path)]
    victim = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert victim.stdout.readline() == b"ready\n"
    while server.requests["/train/000000.tar"] == 0:
        time.sleep(0.02)
    time.sleep(0.3)  # in the middle of the slow answer
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    victim.stdout.close()
    assert list(tmp_path.glob("[!.]*")) == []
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
    digests = {reader.communicate(timeout=500)[0].split()[1] for reader in readers}
    assert len(digests) == 1 and all(reader.returncode == 0 for reader in readers)
    assert server.requests["/train/000000.tar"] == 2, "the killed one and one of the three"
    assert all(server.requests[f"/train/{number:06d}.tar"] == 1 for number in range(1, 8))
    assert sorted(path.name.split("-")[1] for path in tmp_path.glob("[!.]*")) == [f"{n:06d}.tar" for n in range(8)]


def load(tasks: Sequence[Task], cache: Path, iterations: int, workers: int) -> TrainLoader:
    """Returns a loader that mixes two shards at a time."""
    return TrainLoader(
        tasks,
        iterations=iterations,
        global_batch_size=5,
        gradient_accumulation_steps=1,
        rank=0,
        world_size=1,
        encoder=PictureEncoder(PREPROCESS, True),
        seed=1,
        shots=None,
        include_validation=False,
        workers=workers,
        shuffle_shards=2,
        cache=ShardCache(cache),
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_training_from_remote_shards_fetches_the_next_window_ahead(
    converted: Path, server: Server, tmp_path: Path, workers: int
):
    def batches(base: str | Path) -> list:
        mapping = yaml.safe_load((converted / "stream.yaml").read_text())
        entry = mapping["tasks"][0]
        entry["train"] = [f"{base}/train/{{000000..000007}}.tar"]
        folder = tmp_path / f"stream-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for name in (entry["class_names"], entry["templates"]):
            (folder / name).write_bytes((converted / name).read_bytes())
        entry["test"] = [f"{server.url}/test/000000.tar"]
        (folder / "stream.yaml").write_text(yaml.safe_dump(mapping))
        loader = load(Stream.load(folder).tasks, tmp_path / "cache", iterations=12, workers=workers)
        return [{name: tensor.numpy() for name, tensor in batch.items()} for batch in loader]

    for one, other in zip(batches(server.url), batches(converted), strict=True):
        np.testing.assert_array_equal(one["image"], other["image"])
        np.testing.assert_array_equal(one["label"], other["label"])
    assert all(server.requests[f"/train/{number:06d}.tar"] == 1 for number in range(8))


def test_the_next_window_is_there_before_it_is_needed(server: Server, tmp_path: Path):
    task = Task("insects", tuple(shards(server.url)), (), (), CLASSES, ("a {c}.",), {}, None)
    loader = load([task], tmp_path, iterations=1, workers=0)
    list(loader)
    deadline = time.monotonic() + 20
    while len(list(tmp_path.glob("[!.]*"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(list(tmp_path.glob("[!.]*"))) == 4, "the two of this window and the two of the next"


def test_s3(converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import boto3
    import moto.server

    for name, value in {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    s3 = moto.server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    s3.start()
    try:
        endpoint = "http://{}:{}".format(*s3.get_host_and_port())
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        client = boto3.client("s3", endpoint_url=endpoint)
        client.create_bucket(Bucket="data")
        for path in (converted / "train").iterdir():
            client.upload_file(str(path), "data", f"insects/train/{path.name}")
        client.close()
        remote = ShardDataset(shards("s3://data/insects"), CLASSES, cache=ShardCache(tmp_path))
        assert identity(remote) == identity(ShardDataset(shards(converted), CLASSES))
        with pytest.raises(NotThereError, match="none.tar: no such file"):
            ShardCache(tmp_path).open("s3://data/none.tar")
    finally:
        s3.stop()


def test_the_cache_is_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ShardCache().folder == tmp_path / "r1p_dist" / "shards"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert ShardCache().folder == Path(os.path.expanduser("~/.cache/r1p_dist/shards"))
