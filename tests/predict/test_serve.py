"""The page of `r1p serve`, by a real server on 127.0.0.1: what it shows, what it refuses, and one picture at a time."""

import http.client
import io
import json
import shlex
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest
from PIL import Image

from r1p_dist import cli
from r1p_dist.predict.model import PredictingModel
from r1p_dist.predict.request import make_request
from r1p_dist.predict.source import open_source
from tests.browser import Tab
from tests.export.fake_run import TASKS

uvicorn = pytest.importorskip("uvicorn")

from r1p_dist.serve import app as serving  # noqa: E402
from r1p_dist.serve.local import make_server  # noqa: E402
from r1p_dist.serve.port import listening  # noqa: E402


@contextmanager
def served(model: PredictingModel) -> Iterator[int]:
    """Serves a model from a thread; gives the port."""
    with listening(0) as listener:
        server = make_server(serving.make_app(model))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(timeout=60)


@pytest.fixture(scope="module")
def model(run: Path) -> PredictingModel:
    return PredictingModel(open_source(run))


@pytest.fixture(scope="module")
def port(model: PredictingModel) -> Iterator[int]:
    with served(model) as port:
        yield port


def ask(port: int, method: str, path: str, body=None, **headers: str) -> tuple[int, str]:
    """Returns status and text; every answer must have the headers that keep it from other pages."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-frame-options"] == "DENY" and answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in answer.headers
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_the_page_is_whole_and_asks_nobody_else(port: int) -> None:
    status, page = ask(port, "GET", "/")
    assert status == 200 and '<script src="/page.js" defer>' in page
    for path in ("/page.js", "/page.css"):
        status, text = ask(port, "GET", path)
        assert status == 200
        page += text
    assert "//" not in page.replace("\n// ", "\n").replace(";  // ", "").replace("  // ", ""), "an address"
    assert "innerHTML" not in page
    facts = {"name": "run", "answers": False, "most_bytes": 20 << 20}
    assert json.loads(ask(port, "GET", "/model.json")[1]) == facts


def test_a_picture_gets_the_shares_within_each_task(
    port: int, run: Path, model: PredictingModel, pictures: list[Path]
) -> None:
    status, text = ask(port, "POST", "/predict", pictures[0].read_bytes(), Origin=f"http://127.0.0.1:{port}")
    assert status == 200
    results = json.loads(text)["tasks"]
    assert [result["task"] for result in results] == list(TASKS)
    for result in results:
        asked = make_request(model.source, [result["task"]])
        with Image.open(pictures[0]) as image:
            upright = image.transpose(Image.Transpose.ROTATE_270)
        (found,) = model.predict(asked, [model.encode(asked, upright)])  # a softmax over this task alone
        for state in ("before", "after"):
            of = dict(zip((name for _, name in asked.names), found[state], strict=True))
            for line in result["classes"]:
                assert line[state] == pytest.approx(of[line["class"]], abs=1e-5)
        assert result["classes"][0]["after"] == pytest.approx(max(found["after"]), abs=1e-5)


def test_words_of_ones_own_are_classes(port: int, pictures: list[Path]) -> None:
    words = "cat, hot dog,<b>&"
    status, text = ask(port, "POST", f"/predict?classes={quote(words)}", pictures[0].read_bytes())
    (result,) = json.loads(text)["tasks"]
    assert status == 200 and result["task"] is None
    assert {line["class"] for line in result["classes"]} == {"cat", "hot dog", "<b>&"}
    assert sum(line["before"] for line in result["classes"]) == pytest.approx(1)


def test_the_page_in_a_browser_shows_before_and_after(
    port: int, tab: Tab, pictures: list[Path], tmp_path: Path
) -> None:
    address = f"http://127.0.0.1:{port}/"
    shown = """[...document.querySelectorAll('#results table')].map((table) => [table.caption?.textContent ?? null,
        ...[...table.querySelectorAll('tr')].map((row) => [...row.cells].map((cell) => cell.textContent))])"""

    def said(query: str, picture: Path) -> list:
        """What the page is to show, from the server's answer to somebody else."""
        _, text = ask(port, "POST", f"/predict{query}", picture.read_bytes())
        head = ["class", "before", "after"]
        return [
            [task["task"], head]
            + [[line["class"], *(f"{100 * line[state]:.1f} %" for state in head[1:])] for line in task["classes"]]
            for task in json.loads(text)["tasks"]
        ]

    tab.open(address, width=400)
    tab.wait("document.title === 'run'")
    tab.choose("#file", pictures[0])
    tab.wait("document.querySelectorAll('#results table').length")
    assert tab.run(shown) == said("", pictures[0]) and len(said("", pictures[0])) == len(TASKS)
    assert tab.run("document.getElementById('preview').naturalWidth > 0")
    tab.run("document.getElementById('classes').focus()")
    words = "cat, hot dog, <b>&, " + "x" * 60
    tab.ask("Input.insertText", text=words)
    tab.press("Enter", 13)
    tab.wait("document.querySelectorAll('#results table').length === 1")
    assert tab.run(shown) == said(f"?classes={quote(words)}", pictures[0])
    with Image.open(pictures[1]) as image:
        image.save(tmp_path / "other.jpg")
    other = said(f"?classes={quote(words)}", tmp_path / "other.jpg")
    tab.drop("#drop", tmp_path / "other.jpg")
    tab.wait(f"JSON.stringify({shown}) === {json.dumps(json.dumps(other, separators=(',', ':')))}")
    grounds = set()
    for width, dark in ((400, False), (400, True), (2560, False), (2560, True)):
        tab.size(width, dark)
        assert tab.run("document.documentElement.scrollWidth") <= width
        grounds.add(tab.run("getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2  # light and dark
    assert tab.run("[...document.querySelectorAll('input')].every((input) => input.labels.length === 1)")
    assert tab.complaints() == [] and all(url.startswith(address) for url in tab.requests())
    (tmp_path / "page.jpg").write_text("<script>alert(1)</script>")
    tab.choose("#file", tmp_path / "page.jpg")
    tab.wait("document.getElementById('state').textContent.includes('no JPEG, PNG, WEBP file')")
    assert tab.run("document.querySelectorAll('#results *').length") == 0
    assert all("status of 400" in complaint for complaint in tab.complaints())


def bomb(side: int) -> bytes:
    """A PNG of so many pixels a side in few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def written(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, kind)
    return buffer.getvalue()


HOSTILE = {
    "a name of somebody else": ("GET", "/", None, {"Host": "evil.example"}, 400, "Invalid host"),
    "a name that begins like ours": ("GET", "/", None, {"Host": "127.0.0.1.evil.example"}, 400, "Invalid host"),
    "another origin": ("POST", "/predict", b"x", {"Origin": "http://evil.example"}, 403, "its own"),
    "another port's origin": ("POST", "/predict", b"x", {"Origin": "http://127.0.0.1:1"}, 403, "its own"),
    "no origin to speak of": ("POST", "/predict", b"x", {"Origin": "null"}, 403, "its own"),
    "another origin's question": ("GET", "/model.json", None, {"Origin": "http://evil.example"}, 403, "its own"),
    "a way up": ("GET", "/../../../../etc/passwd", None, {}, 404, "Not Found"),
    "a way up in disguise": ("GET", "/%2e%2e/%2e%2e/etc/passwd", None, {}, 404, "Not Found"),
    "a file of the package": ("GET", "/page.html", None, {}, 404, "Not Found"),
    "a path as a picture": ("POST", "/predict?picture=/etc/passwd", b"", {}, 400, "this file: picture cannot be"),
    "another method": ("PUT", "/predict", b"x", {}, 405, "Method Not Allowed"),
    "a look without a picture": ("GET", "/predict", None, {}, 405, "Method Not Allowed"),
    "text": ("POST", "/predict", b"<script>alert(1)</script>", {}, 400, "no JPEG, PNG, WEBP file"),
    "half a picture": ("POST", "/predict", written("JPEG")[:300], {}, 400, "this file: picture cannot be decoded"),
    "a format with a past": ("POST", "/predict", written("TIFF"), {}, 400, "no JPEG, PNG, WEBP file"),
    "a program for a printer": ("POST", "/predict", written("EPS"), {}, 400, "no JPEG, PNG, WEBP file"),
    "a bomb": ("POST", "/predict", bomb(50_000), {}, 400, "too large to decode safely"),
    "more than one may send": ("POST", "/predict", b"", {"Content-Length": "99999999999"}, 413, "may have 20 MB"),
    "no end of classes": ("POST", f"/predict?classes={'a,' * 6000}", b"x", {}, 413, "more than 10,000 letters"),
    "an empty class": ("POST", "/predict?classes=a,,b", b"x", {}, 400, '"classes: an empty class'),
    "a question to a CLIP": ("POST", "/predict?ask=what", b"x", {}, 400, "answers no questions"),
}


@pytest.mark.parametrize(("method", "path", "body", "headers", "status", "words"), HOSTILE.values(), ids=HOSTILE)
def test_what_is_hostile_is_refused(
    port: int, method: str, path: str, body: bytes | None, headers: dict[str, str], status: int, words: str
) -> None:
    found, text = ask(port, method, path, body, **headers)
    assert (found, words in text) == (status, True), text
    assert "Traceback" not in text and "r1p_dist/" not in text


def test_a_picture_without_a_stated_size_is_cut_off_at_the_limit(port: int) -> None:
    sent = 0
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        piece = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
        try:
            while sent < 100 << 20:
                connection.sendall(piece)
                sent += 1 << 20
        except OSError:
            pass  # it hung up
    assert serving.MOST_BYTES <= sent < 100 << 20
    assert ask(port, "GET", "/")[0] == 200


def test_who_does_not_send_is_not_waited_for(port: int, monkeypatch: pytest.MonkeyPatch, pictures: list[Path]) -> None:
    monkeypatch.setattr(serving, "_PATIENCE_S", 0.05)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\nslow")
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\ngone")
    assert ask(port, "POST", "/predict", pictures[0].read_bytes())[0] == 200


class CountingModel:
    """Counts how many pictures are looked at at once; fails on demand."""

    def __init__(self, model: PredictingModel) -> None:
        self.source, self.encode, self._predict = model.source, model.encode, model.predict
        self.now = self.most = self.calls = 0
        self.fault: Exception | None = None

    def predict(self, asked, examples):
        if self.fault is not None:
            raise self.fault
        self.now, self.calls = self.now + 1, self.calls + 1
        self.most = max(self.most, self.now)
        time.sleep(0.05)
        found = self._predict(asked, examples)
        self.now -= 1
        return found


def test_pictures_are_looked_at_one_after_another_and_a_failure_is_not_the_end(
    model: PredictingModel, pictures: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    counting, together = CountingModel(model), threading.Barrier(4)
    statuses = []

    def send() -> None:
        together.wait()
        statuses.append(ask(port, "POST", "/predict?classes=cat,dog", pictures[0].read_bytes())[0])

    with served(counting) as port:
        threads = [threading.Thread(target=send) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert statuses == [200] * 4 and (counting.calls, counting.most) == (4, 1)
        counting.fault = RuntimeError("secret")
        status, text = ask(port, "POST", "/predict", pictures[0].read_bytes())
        assert status == 500 and "secret" not in text and "its terminal says more" in text
        assert "secret" in caplog.text
        counting.fault = None
        assert ask(port, "POST", "/predict", pictures[0].read_bytes())[0] == 200


def test_the_command_of_the_documentation_serves_the_page_until_it_is_ended(
    run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (Path(__file__).parents[2] / "docs/predict.md").read_text().splitlines()
    (command,) = [shlex.split(line)[1:] for line in lines if line.startswith(".venv/bin/r1p serve")]
    assert command == ["serve", "runs/mini_mtil", "--port", "8000"]
    serve, found = uvicorn.Server.run, []

    def serve_briefly(server, sockets: list[socket.socket]) -> None:
        thread = threading.Thread(target=serve, args=(server, sockets))
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        found.extend([sockets[0].getsockname(), ask(sockets[0].getsockname()[1], "GET", "/")[0]])
        server.should_exit = True
        thread.join(timeout=60)
        raise KeyboardInterrupt  # as uvicorn does behind a Ctrl-C

    monkeypatch.setattr(uvicorn.Server, "run", serve_briefly)
    assert cli.main([{"runs/mini_mtil": str(run), "8000": "0"}.get(word, word) for word in command]) == 0
    (host, port), status = found
    assert (host, status) == ("127.0.0.1", 200)
    assert capfd.readouterr().out == f"http://127.0.0.1:{port}/  (Ctrl-C ends it)\n"


def test_a_port_that_is_taken_and_a_missing_library_are_told_first(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with listening(0) as taken:
        taken.listen()
        number = taken.getsockname()[1]
        assert cli.main(["serve", str(run), "--port", str(number)]) == 2
    assert capsys.readouterr().err.startswith(f"error: --port {number}: cannot be used: ")
    assert cli.main(["serve", str(run), "--port", "99999"]) == 2
    assert "name another, or 0 for one that is free" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["serve", str(run)]) == 2
    assert "r1p serve needs starlette and uvicorn: pip install 'r1p-dist[serve]'" in capsys.readouterr().err
