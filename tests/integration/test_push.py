"""--push against a server that speaks the Hub's protocol, through the Hub's own client."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.integration.test_force import refused
from tests.integration.test_import_export import trained_model, write_checkpoint
from tests.support.tiny_models import make_tiny
from tools.export_hf import main


class Hub(ThreadingHTTPServer):
    """Keeps what is committed; answers 403 to a commit where `refuses`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.made: list[dict[str, object]] = []
        self.files: dict[str, bytes] = {}
        self.refuses = False


class Requests(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, content: object, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        size = self.headers.get("Content-Length")
        if size is not None:
            body = self.rfile.read(int(size))
        else:
            body = b""
            while length := int(self.rfile.readline(), 16):
                body += self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
        if self.headers.get("Authorization") != "Bearer hf_right":
            self.answer({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            self.answer({"url": "https://huggingface.co/org/mine", "name": "org/mine"})
        elif self.path.endswith("/preupload/main"):
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif self.path.endswith("/commit/main") and not self.server.refuses:
            for line in body.decode().splitlines():
                one = json.loads(line)
                if one["key"] == "file":
                    self.server.files[one["value"]["path"]] = base64.b64decode(one["value"]["content"])
            seen = "https://huggingface.co/org/mine/commit/1"
            self.answer({"commitUrl": seen, "commitOid": "1", "pullRequestUrl": None})
        else:
            self.answer({"error": "Forbidden"}, 403)

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != "Bearer hf_right":
            self.answer({"error": "Invalid credentials"}, 401)
            return
        self.answer({"id": "org/mine", "sha": "0", "siblings": [], "private": True})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_export_arrives_whole_and_what_cannot_is_said_before_or_kept(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint(trained_model(make_tiny(tmp_path / "base", "llama2")), tmp_path / "checkpoint")

    def words(output: str) -> list[str]:
        named = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / output), "--format", "merged"]
        return [*named, "--no-verify", "--push"]

    assert main([*words("out"), "org/mine"]) == 0
    assert "uploaded: https://huggingface.co/org/mine/commit/1" in capsys.readouterr().out
    assert hub.made[0]["visibility"] == "private", hub.made
    kept = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.files == kept and "model.safetensors" in kept

    refused(capsys, main([*words("name"), "mine"]), "is no name of a repository")
    hub.refuses = True
    refused(capsys, main([*words("late"), "org/mine"]), f"run: hf upload org/mine {tmp_path / 'late'}")
    assert (tmp_path / "late/model.safetensors").is_file()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused(capsys, main([*words("login"), "org/mine"]), "log in (hf auth login)")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(capsys, main([*words("offline"), "org/mine"]), "log in (hf auth login)")
    assert not any((tmp_path / name).exists() for name in ("name", "login", "offline")), "said before the export"
