"""The service as a process: killed clients, signals, and its page in a real browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, chromium

from peftkit.artifacts.inference import load_predictor


class Process:
    """`peftkit serve` on a free port."""

    def __init__(self, log: Path, *arguments: str, **environment: str) -> None:
        self.log = log
        command = [sys.executable, "-m", "peftkit.cli", "serve", *arguments, "--port", "0"]
        with log.open("w") as stream:
            self.process = subprocess.Popen(command, stdout=stream, stderr=stream, env=os.environ | environment)
        self.address = self._address()

    def _address(self) -> str:
        until = time.monotonic() + 120
        while time.monotonic() < until and self.process.poll() is None:
            if found := re.search(r"http://[\d.:]+", self.log.read_text()):
                try:
                    urllib.request.urlopen(f"{found[0]}/ready", timeout=5).close()
                except OSError:
                    time.sleep(0.05)
                    continue
                return found[0]
            time.sleep(0.05)
        self.process.kill()
        raise AssertionError(self.log.read_text())

    def ask(self, name: str, body: dict[str, Any], route: str = "predict") -> tuple[int, Any]:
        request = urllib.request.Request(
            f"{self.address}/v1/adapters/{name}/{route}",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())

    def figures(self) -> str:
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=30) as answer:
            return str(answer.read().decode())

    def stop(self, how: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(60)


@pytest.fixture(scope="module")
def service(small_run: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    log = tmp_path_factory.mktemp("service") / "log"
    runs = [str(small_run(name)) for name in ("reader", "writer")]
    process = Process(log, *runs, "--timeout", "20")
    yield process
    assert process.stop() == 0, log.read_text()
    assert log.read_text().endswith("stopped\n")


def sent(service: Process, name: str, body: dict[str, Any], route: str) -> socket.socket:
    """A connection over which a request was sent, whose answer nobody has read."""
    host, _, port = service.address.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    text = json.dumps(body).encode()
    head = f"POST /v1/adapters/{name}/{route} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connection.sendall(head.encode() + f"Content-Length: {len(text)}\r\n\r\n".encode() + text)
    return connection


def test_killed_clients_and_broken_requests_do_no_harm(service: Process, small_run: Callable[[str], Path]) -> None:
    expected = load_predictor(small_run("reader"))(["a good film"])[0]["label"]
    for _ in range(5):
        sent(service, "writer", {"text": "the film", "max_new_tokens": 30}, "stream").close()
        sent(service, "reader", {"texts": ["a film"] * 20}, "predict").close()
    host, _, port = service.address.removeprefix("http://").partition(":")
    for nonsense in (b"\x00\xff" * 50 + b"\r\n\r\n", b"GET /" + b"a" * 100_000, b"POST /v1/reload HTTP/1.1\r\n"):
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(nonsense)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: service.ask("reader", {"texts": ["a good film"]}), range(24)))
    assert {status for status, _ in answers} == {200}
    assert {answer["predictions"][0]["label"] for _, answer in answers} == {expected}
    until = time.monotonic() + 20
    while "peftkit_requests_in_flight 1.0" not in service.figures():
        assert time.monotonic() < until  # all that is being answered is the request for these figures
        time.sleep(0.05)
    assert "peftkit_queue_examples 0.0" in service.figures()
    assert "Traceback" not in service.log.read_text()


def test_sighup_reloads_and_sigterm_lets_requests_finish(small_run: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "live"
    shutil.copytree(small_run("writer"), folder)
    service = Process(tmp_path / "log", str(folder), "--wait-ms", "1000")
    shutil.rmtree(folder)
    shutil.copytree(small_run("writer_two"), folder)
    service.process.send_signal(signal.SIGHUP)
    until = time.monotonic() + 30
    while '"reloaded": ["live"]' not in service.log.read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(service.ask, "live", {"texts": ["the sad film of secretwords"]})
        while "peftkit_queue_examples 1.0" not in service.figures():
            assert time.monotonic() < until
            time.sleep(0.02)
        assert service.stop() == 0, service.log.read_text()
        status, answer = asking.result()
    assert status == 200
    assert answer["predictions"] == load_predictor(small_run("writer_two"))(["the sad film of secretwords"])
    log = service.log.read_text()
    assert log.endswith("stopped\n") and '"status": 200' in log
    assert "secretwords" not in log and "Traceback" not in log


@pytest.mark.skipif(chromium() is None, reason="no Chromium here: the page is not tried in a browser")
def test_the_page_in_a_browser(service: Process, tmp_path: Path, small_run: Callable[[str], Path]) -> None:
    with Browser(tmp_path / "profile") as page:
        page.open(f"{service.address}/")
        page.wait("document.querySelectorAll('#adapter option').length === 2")
        page.wait("document.querySelectorAll('#routes tbody tr').length >= 7")
        assert "2 adapters over" in page.value("document.getElementById('about').textContent")
        page.run("document.getElementById('text').value = 'a good <b>film</b>'")
        page.run("document.getElementById('send').click()")
        page.wait("document.querySelectorAll('#answers .bar').length === 2")
        label = load_predictor(small_run("reader"))(["a good <b>film</b>"])[0]["label"]
        assert page.value("document.querySelector('#answers .result p').textContent") == label
        page.run("document.getElementById('adapter').value = 'writer'")
        page.run("document.getElementById('adapter').dispatchEvent(new Event('change'))")
        page.run("document.getElementById('text').value = 'the sad film'")
        page.run("document.getElementById('stream').click()")
        written = load_predictor(small_run("writer"))(["the sad film"])[0]["completion"]
        page.wait("document.querySelector('#answers .result details') !== null")
        assert page.value("document.querySelector('#answers .result p').textContent") == written
        page.run("document.getElementById('text').value = 'film '.repeat(3000)")
        page.run("fetch = async () => { throw new Error('no network') }")
        page.run("document.getElementById('send').click()")
        page.wait("document.querySelector('#answers .error') !== null")
        picture = page.screenshot()
        (tmp_path / "page.png").write_bytes(picture)
        assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
        assert page.problems == []  # neither errors of the script nor what its policy refused
        assert page.requested and all(url.startswith(service.address) or url == "data:," for url in page.requested)
