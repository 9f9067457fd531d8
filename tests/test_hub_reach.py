"""A hub that does not answer is told in seconds; cached files are still taken; proxies count."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.data import folder
from harness.data.sources import Source, choose_tasks
from vlmamba_core import hub
from vlmamba_core.errors import UserError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def refusing() -> str:
    """An address of this machine at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def test_a_server_that_listens_can_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert hub.unreachable(f"http://127.0.0.1:{server.getsockname()[1]}") is None


def test_why_a_server_cannot_be_reached(refusing, monkeypatch):
    assert "refused" in hub.unreachable(refusing)
    assert "no address" in hub.unreachable("nonsense")
    assert "no address" in hub.unreachable("http://host:port")
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: time.sleep(30))
    started = time.perf_counter()
    assert hub.unreachable("http://192.0.2.1", 0.2) == "no answer in 0.2 s"
    assert time.perf_counter() - started < 2


def test_the_proxy_is_asked_where_there_is_one(refusing, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub.unreachable("https://nowhere.invalid") is None
        monkeypatch.setenv("https_proxy", refusing)
        assert "refused" in hub.unreachable("https://nowhere.invalid")


@pytest.mark.parametrize(
    "command",
    [
        ("harness.run", "--tasks", "pope", "--data", "hub", "--limit", "2", "--out", "o"),
        ("harness.run", "--tasks", "pope", "--model", "org/name", "--limit", "2", "--out", "o"),
        ("vlmamba.ask", "p.png", "What?", "--model", "org/name"),
    ],
)
def test_commands_say_so_at_once(command, refusing, tmp_path):
    """Seconds of processor time: a machine under load may take longer, but not by waiting."""
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
    offline = {name: value for name, value in os.environ.items() if name not in hub.OFFLINE}
    kept = {"HF_ENDPOINT": refusing, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)}
    started, used = time.perf_counter(), os.times()
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=tmp_path,
        env=offline | kept,
        capture_output=True,
        text=True,
    )
    spent, now = time.perf_counter() - started, os.times()
    worked = now.children_user + now.children_system - used.children_user - used.children_system
    assert done.returncode == 2, done.stderr
    assert f"the hub ({refusing}) cannot be reached" in done.stderr
    assert "error: " in done.stderr and "Traceback" not in done.stderr
    assert spent < 5 + 10 * worked  # 29 s of waiting before


def test_a_folder_without_a_tasks_data_names_a_few_data_files(tmp_path):
    assert folder.whats_there(tmp_path) == "no data file"
    for name in ("a.parquet", "b.json", "c.tsv", "d.jsonl", "e.csv", "photo.jpg", ".secret"):
        (tmp_path / name).write_text("")
    (tmp_path / "folder.json").mkdir()
    assert folder.whats_there(tmp_path) == "a.parquet, b.json, c.tsv and 2 more"
    with pytest.raises(UserError, match=r"found a.parquet, b.json, c.tsv and 2 more$"):
        choose_tasks("pope", Source.parse(str(tmp_path)))
