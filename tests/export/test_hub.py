"""`r1p export --push` against a hub of this machine, and the model card's machine-readable part as the hub reads it."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

from r1p_dist.errors import InputError
from r1p_dist.export import export_run
from r1p_dist.export.main import main

TOKEN = "hf_of_the_test"


class Hub(BaseHTTPRequestHandler):
    """The few answers of the hub that an upload needs; its repositories are {name: {"is_private": …, "files": …}}."""

    def do_GET(self) -> None:
        self._answer({"name": "me"} if self.path == "/api/whoami-v2" else None)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        repositories = self.server.repositories
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            is_private = asked.get("private") or asked.get("visibility") == "private"  # by the library's version
            repositories.setdefault(name, {"is_private": is_private, "files": {}})
            self._answer({"url": f"{self.server.address}/{name}"})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif "/commit/" in self.path:
            name = self.path.removeprefix("/api/models/").split("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    repositories[name]["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer({"commitUrl": f"{self.server.address}/{name}/commit/1", "commitOid": "1", "hookOutput": ""})
        else:
            self._answer(None)

    def _answer(self, content: dict | None) -> None:
        is_known = self.headers.get("authorization") == f"Bearer {TOKEN}" or self.path == "/api/validate-yaml"
        self.send_response(401 if not is_known else 404 if content is None else 200)
        body = json.dumps(content or {}).encode()
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repositories, server.address = {}, f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_folder_is_uploaded_as_it_is_into_a_private_repository(
    run: Path, hub: ThreadingHTTPServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("r1p export", [str(run), "--to", "open_clip", "--push", "me/small"]) == 0
    folder = run / "export/open_clip"
    assert capsys.readouterr().out.splitlines()[-2:] == [str(folder), f"{hub.address}/me/small"]
    repository = hub.repositories["me/small"]
    assert repository["is_private"]
    written = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert repository["files"] == written and len(written) > 3


def test_without_the_flag_nothing_is_asked(run: Path, hub: ThreadingHTTPServer) -> None:
    assert main("r1p export", [str(run), "--to", "open_clip"]) == 0
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("name", "token", "offline", "words"),
    [
        ("a/b/c", TOKEN, False, "is no name of the hub"),
        ("me/small", None, False, "nobody is logged in"),
        ("me/small", "hf_of_somebody", False, "the hub refuses or cannot be reached: Invalid user token"),
        ("me/small", TOKEN, True, "HF_HUB_OFFLINE is set; unset it"),
    ],
)
def test_what_cannot_be_pushed_is_said_before_anything_is_written(
    run: Path, hub, monkeypatch: pytest.MonkeyPatch, name: str, token: str | None, offline: bool, words: str
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(InputError, match=f"--push {name}: {words}"):
        main("r1p export", [str(run), "--to", "open_clip", "--push", name])
    assert not (run / "export").exists()


def test_the_card_has_each_tasks_score_where_the_hub_looks_for_it(run: Path, tmp_path: Path) -> None:
    card = ModelCard.load(export_run(run, "open_clip", tmp_path / "whole") / "README.md")
    assert card.data.library_name == "open_clip" and card.data.pipeline_tag == "zero-shot-image-classification"
    found = {result.dataset_name: result for result in card.data.eval_results}
    assert {task: (result.metric_type, result.metric_value) for task, result in found.items()} == {
        "fashion": ("accuracy", 37.5),
        "country_flags": ("accuracy", 52.5),
    }
    assert {(result.dataset_type, result.dataset_split) for result in found.values()} == {("mini_mtil", "test")}
    assert "dac" in card.data.tags

    part = ModelCard.load(export_run(run, "open_clip", tmp_path / "part", tasks=["fashion"]) / "README.md")
    assert part.data.eval_results is None, "of another model"
