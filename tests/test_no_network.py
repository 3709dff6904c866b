"""A run on a local model reaches for no network, in none of its processes, though nothing tells it to stay offline."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import no_network
import pytest

VERBS = """
import sys
from peftkit.cli import main

config, folder, *methods = sys.argv[1:]
run = f"{folder}/run"
verbs = [
    ["validate", config],
    ["audit", config],
    ["train", config, f"output.folder={run}"],
    ["evaluate", run],
    ["predict", run, "good film"],
    ["merge", run, f"{folder}/merged"],
    ["train", config, f"output.folder={folder}/second", f"method.start_from={run}"],
]
for kind in methods:
    named = "peft, type: LOHA" if kind == "peft" else kind
    verbs.append(["train", config, f"output.folder={folder}/{kind}", f"method={{kind: {named}}}"])
    verbs.append(["predict", f"{folder}/{kind}", "good film"])
for verb in verbs:
    code = main(verb)
    assert code == 0, (verb, code)
"""
REACH = """
import socket, subprocess, sys

for reach in (
    lambda: socket.socket().connect(("192.0.2.1", 443)),
    lambda: socket.getaddrinfo("huggingface.co", 443),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 53)),
):
    try:
        reach()
    except OSError as error:
        assert "the network was asked for" in str(error), error
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname()).close()
if len(sys.argv) < 2:
    subprocess.run([sys.executable, __file__, "child"], check=True, timeout=60)
"""


@pytest.fixture
def alone(tmp_path: Path) -> Callable[..., list[str]]:
    """Run a script in a process that has no network, nor have its children: what they tried to reach."""
    folder = tmp_path / "site"
    folder.mkdir()
    shutil.copy(no_network.__file__, folder / "sitecustomize.py")

    def run(script: str, *arguments: object, **variables: str) -> list[str]:
        attempts, file = tmp_path / "attempts", tmp_path / "script.py"
        attempts.write_text("")
        file.write_text(script)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "DISABLE_TELEM"))}
        paths = [str(folder), *filter(None, sys.path)]
        variables |= {"PYTHONPATH": os.pathsep.join(paths), no_network.ATTEMPTS: str(attempts)}
        variables["HF_HOME"] = str(tmp_path / "cache")
        done = subprocess.run(
            [sys.executable, str(file), *map(str, arguments)],
            env=kept | variables,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return attempts.read_text().splitlines()

    return run


def test_what_reaches_out_is_seen(alone: Callable[..., list[str]]) -> None:
    seen = ["connect ('192.0.2.1', 443)", "getaddrinfo huggingface.co", "sendto ('192.0.2.1', 53)"]
    assert alone(REACH) == seen * 2


def test_a_run_on_a_local_model_reaches_for_no_network(
    alone: Callable[..., list[str]], write_config: Callable[..., Path], tmp_path: Path
) -> None:
    methods = ("full", "adalora", "prefix", "bottleneck", "peft")
    config = write_config(training={"learning_rate": 0.01, "max_steps": 4, "batch_size": 8})
    folder = tmp_path / "runs"
    assert alone(VERBS, config, folder, *methods) == []
    assert (folder / "merged" / "config.json").is_file()
    assert all((folder / name / "manifest.json").is_file() for name in ("run", "second", *methods))
