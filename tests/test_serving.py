"""Many adapters over one backbone: what a mixed batch computes, and what the service answers."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import shutil
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import sentiment_rows
from starlette.testclient import TestClient

from peftkit.artifacts.inference import load_predictor
from peftkit.artifacts.loading import load_run
from peftkit.backbones.modules import linears
from peftkit.cli import main
from peftkit.data.collate import collate
from peftkit.errors import ArtifactError, PeftkitError, UsageError
from peftkit.serving import command
from peftkit.serving.asking import _sure
from peftkit.serving.batching import Batcher, Job, Stopped, Unit
from peftkit.serving.computing import Computer, lane_of
from peftkit.serving.mixing import Mixer, Share
from peftkit.serving.options import Access, Limits, access_of, named_folders
from peftkit.serving.registry import Registry
from peftkit.serving.resident import Adapter, Resident
from peftkit.serving.routes import build

READERS = ("sentiment", "other", "mean", "entities", "answers", "head")
APART = ("prefix", "prompt", "bottleneck", "dora")
TEXTS = ["a good film", "the sad , sad story was very dark and poor . the music is fine", "alice went to paris"]
CONTEXTS = ["the film was good", "bob met alice in rome with music and a very very bright story", "a"]
KEY = "a-key-of-many-characters"


def pairs_of(name: str) -> list[str] | None:
    return CONTEXTS if name == "answers" else None


def asked(name: str, texts: list[str] = TEXTS) -> dict[str, Any]:
    return {"texts": texts} | ({"pairs": CONTEXTS[: len(texts)]} if name == "answers" else {})


@pytest.fixture(scope="module")
def readers(small_run: Callable[[str], Path]) -> Registry:
    """Adapters of every task of an encoder, on one BERT."""
    folders = {name: small_run(name) for name in (*READERS, *APART)}
    registry = Registry(Resident(folders, torch.device("cpu")), folders)
    registry.load()
    return registry


@pytest.fixture(scope="module")
def writers(small_run: Callable[[str], Path]) -> Registry:
    """Adapters that write, and one that reads, on one Llama; the reader comes first."""
    folders = {name: small_run(name) for name in ("reader", "writer", "writer_two", "writer_prefix")}
    registry = Registry(Resident(folders, torch.device("cpu")), folders)
    registry.load()
    return registry


@pytest.fixture
def open_client() -> Iterator[Callable[..., TestClient]]:
    """Starts a service in this process; keyword arguments are limits."""
    clients: list[TestClient] = []

    def start(registry: Registry, access: Access | None = None, **limits: Any) -> TestClient:
        gate, service = build(registry, Limits(**limits), access or Access(), stop_seconds=10)
        client = TestClient(gate, base_url="http://127.0.0.1")
        client.service = service  # type: ignore[attr-defined]
        client.__enter__()
        clients.append(client)
        return client

    yield start
    for client in clients:
        client.__exit__(None, None, None)


# --- what a mixed batch computes ----------------------------------------------------------------------------------


def units_of(registry: Registry, names: tuple[str, ...], texts: list[str] = TEXTS) -> list[Unit]:
    units: list[Unit] = []
    for name in names:
        adapter = adapter_of(registry, name)
        task, saved = adapter.saved.run.task, adapter.saved
        encoded = task.encode(task.rows_from_text(texts, pairs_of(name)), saved.tokenizer, saved.head.labels, False)
        job = Job(adapter, task, encoded.examples, lane_of(adapter, task, encoded.examples[0]))
        units += [Unit(job, index, 0.0) for index in range(len(encoded.examples))]
    return units


def adapter_of(registry: Registry, name: str) -> Adapter:
    found = registry.get(name)
    assert found is not None
    return found


class Calls:
    """Counts the calls of every linear layer inside the blocks of models."""

    def __init__(self, models: dict[str, Any]) -> None:
        self.counts: dict[tuple[str, str], int] = {}
        self.handles = []
        for owner, model in models.items():
            for name, layer in linears(model):
                if "layer" in name and "lora_" not in name:
                    self.counts[owner, name] = 0
                    self.handles.append(layer.register_forward_hook(self._counting(owner, name)))

    def _counting(self, owner: str, name: str) -> Callable[..., None]:
        def count(*given: Any) -> None:
            self.counts[owner, name] += 1

        return count

    def of(self, owner: str) -> set[int]:
        return {count for (whose, _), count in self.counts.items() if whose == owner}

    def stop(self) -> None:
        for handle in self.handles:
            handle.remove()


def test_a_mixed_batch_is_one_forward_pass_and_equals_each_adapter_alone(readers: Registry) -> None:
    units = units_of(readers, READERS)
    assert len({unit.job.lane for unit in units}) == 1
    calls = Calls({"resident": readers.resident.model} | {one.name: one.saved.model for one in readers})
    Computer(readers.resident, lambda *figures: None)(units)
    calls.stop()
    assert calls.of("resident") == {1}
    assert all(calls.of(name) == {0} for name in READERS)
    for name in READERS:
        job = next(unit.job for unit in units if unit.job.adapter.name == name)
        rows = job.task.rows_from_text(TEXTS, pairs_of(name))
        saved = job.adapter.saved
        encoded = job.task.encode(rows, saved.tokenizer, saved.head.labels, False)
        joined = job.task.join(job.answer.result(0), encoded, rows, saved.tokenizer)
        mixed = [job.task.describe(one, record) for one, record in zip(joined, rows.records, strict=True)]
        alone = load_predictor(saved.folder)
        for index, one in enumerate(mixed):
            expected = alone(TEXTS[index : index + 1], pairs_of(name) and CONTEXTS[index : index + 1])
            assert close(one, expected[0]), name


def close(one: Any, other: Any) -> bool:
    """Equal, with numbers to 1e-5."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(close, one, other))
    return bool(one == pytest.approx(other, abs=1e-5)) if isinstance(one, float) else bool(one == other)


def test_logits_of_a_mixed_batch_are_those_of_each_adapter_alone(
    readers: Registry, small_run: Callable[[str], Path]
) -> None:
    units = units_of(readers, READERS)
    groups = {name: [unit.example for unit in units if unit.job.adapter.name == name] for name in READERS}
    shares, first = {}, 0
    for name, examples in groups.items():
        shares[name] = Share(adapter_of(readers, name).layers, first, first + len(examples))
        first += len(examples)
    with torch.no_grad():
        found = readers.resident.mixer.read(list(shares.values()), [one for g in groups.values() for one in g], 0)
    answers: dict[str, torch.Tensor] = {}
    for name, examples in groups.items():
        saved = adapter_of(readers, name).saved
        task: Any = saved.run.task
        batch = collate(examples, 0)
        with (
            torch.no_grad(),
            readers.resident.mixer.in_place(saved.model, found, shares[name], batch["input_ids"].shape[1]),
        ):
            answers[name] = task.logits(saved.model, batch)
        own = load_run(small_run(name)).model  # with a backbone of its own
        for row, example in enumerate(examples):
            alone = task.logits(own, collate([example], 0))[0]
            part = answers[name][row]
            part = part[: alone.shape[0]] if name == "entities" else part[..., : alone.shape[-1]]
            torch.testing.assert_close(part, alone, rtol=0, atol=1e-5 * max(1.0, float(alone.abs().max())))
    # these tell adapters apart, or the comparison would say nothing
    assert float((answers["sentiment"] - answers["other"]).abs().max()) > 1e-2
    assert float((answers["sentiment"] - answers["head"]).abs().max()) > 1e-2


def test_methods_that_change_more_than_linear_layers_go_alone(readers: Registry) -> None:
    assert {one.name for one in readers if one.alone} == set(APART)
    for name, why in {
        "prefix": "prefix.key",
        "prompt": "what the backbone is given",
        "bottleneck": "adapter",
        "dora": "lora_magnitude_vector",
    }.items():
        assert why in adapter_of(readers, name).alone
        units = units_of(readers, (name,))
        assert units[0].job.lane != units_of(readers, ("sentiment",))[0].job.lane
        Computer(readers.resident, lambda *figures: None)(units)
        alone = load_predictor(adapter_of(readers, name).folder)
        expected = alone(TEXTS)
        task = units[0].job.task
        joined = units[0].job.answer.result(0)
        rows = task.rows_from_text(TEXTS).records
        shown = [task.describe(one, record) for one, record in zip(joined, rows, strict=True)]
        assert close(shown, expected), name


def test_the_backbone_is_in_memory_once(readers: Registry) -> None:
    shared = {tensor.data_ptr() for tensor in readers.resident.model.state_dict().values()}
    for one in readers:
        tensors = {p.data_ptr(): p for p in one.saved.model.parameters()}
        own = sum(p.nbytes for place, p in tensors.items() if place not in shared)
        assert own <= one.own_bytes < readers.resident.backbone_bytes() / 2, one.name


def test_an_adapter_that_a_mixed_pass_would_change_goes_alone(
    readers: Registry, small_run: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for fault in (
        lambda self, name, given, output: output,  # what an adapter adds is lost
        lambda self, name, given, output: output + 0.01,
    ):
        monkeypatch.setattr(Mixer, "add", fault)
        assert "would not compute" in readers.resident.adopt("sentiment", small_run("sentiment")).alone


def test_texts_are_written_for_several_adapters_at_once(writers: Registry) -> None:
    assert {one.name: bool(one.alone) for one in writers} == {
        "reader": False,
        "writer": False,
        "writer_two": False,
        "writer_prefix": True,
    }
    units = units_of(writers, ("writer", "writer_two"))
    assert len({unit.job.lane for unit in units}) == 1
    assert units_of(writers, ("reader",))[0].job.lane != units[0].job.lane
    calls = Calls({one.name: one.saved.model for one in writers})
    before = writers.resident.mixer.forwards
    Computer(writers.resident, lambda *figures: None)(units)
    calls.stop()
    assert calls.of("writer") == calls.of("writer_two") == {0}
    assert writers.resident.mixer.forwards - before <= 6  # one a token for all rows
    texts = {}
    for name in ("writer", "writer_two"):
        job = next(unit.job for unit in units if unit.job.adapter.name == name)
        task, saved = job.task, job.adapter.saved
        rows = task.rows_from_text(TEXTS)
        encoded = task.encode(rows, saved.tokenizer, (), False)
        texts[name] = [one["text"] for one in task.join(job.answer.result(0), encoded, rows, saved.tokenizer)]
        alone = load_predictor(saved.folder)
        assert texts[name] == [alone([text])[0]["completion"] for text in TEXTS]
    assert texts["writer"] != texts["writer_two"]


# --- the queue ----------------------------------------------------------------------------------------------------


def fake_job(lane: str, lengths: list[int]) -> Job:
    examples = [{"input_ids": [1] * length} for length in lengths]
    return Job(SimpleNamespace(), SimpleNamespace(), examples, lane)  # type: ignore[arg-type]


def test_batches_keep_to_examples_tokens_and_lanes() -> None:
    seen: list[tuple[str, list[int]]] = []

    def compute(batch: list[Unit]) -> None:
        seen.append((str(batch[0].job.lane), [unit.length for unit in batch]))
        for unit in batch:
            unit.job.take(unit.index, {})

    batcher = Batcher(Limits(batch=4, batch_tokens=40, wait=0.0), compute)
    jobs = [fake_job("a", [3, 3, 3, 3, 3]), fake_job("b", [9]), fake_job("a", [30, 9, 99])]
    for job in jobs:
        batcher.submit(job)
    batcher.start()
    assert [len(job.answer.result(5)) for job in jobs] == [5, 1, 3]
    assert batcher.stop(5)
    assert seen == [("a", [3, 3, 3, 3]), ("a", [3]), ("b", [9]), ("a", [30]), ("a", [9]), ("a", [99])]
    with pytest.raises(Stopped):
        batcher.submit(fake_job("a", [3]))


def test_a_batch_that_fails_fails_alone_and_what_nobody_waits_for_is_not_computed() -> None:
    computed: list[int] = []

    def compute(batch: list[Unit]) -> None:
        if batch[0].length == 13:
            raise RuntimeError("out of luck")
        for unit in batch:
            computed.append(unit.length)
            unit.job.take(unit.index, {})

    batcher = Batcher(Limits(wait=0.0), compute)
    bad, gone, good = fake_job("a", [13]), fake_job("b", [7]), fake_job("c", [5])
    for job in (bad, gone, good):
        batcher.submit(job)
    assert gone.answer.cancel()
    batcher.start()
    with pytest.raises(RuntimeError, match="out of luck"):
        bad.answer.result(5)
    assert good.answer.result(5) == [{}]
    assert computed == [5]
    assert batcher.stop(5)


# --- over HTTP ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*READERS, *APART])
def test_the_service_answers_as_predict_does(
    name: str,
    readers: Registry,
    open_client: Callable[..., TestClient],
    small_run: Callable[[str], Path],
    capfd: pytest.CaptureFixture[str],
) -> None:
    client = open_client(readers)
    answer = client.post(f"/v1/adapters/{name}/predict", json=asked(name))
    assert answer.status_code == 200, answer.text
    capfd.readouterr()
    extra = [part for text in CONTEXTS for part in ("--text-pair", text)] if name == "answers" else []
    assert main(["predict", str(small_run(name)), *TEXTS, *extra]) == 0
    shown = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert close(answer.json()["predictions"], shown)
    assert answer.json()["cut"] == 0 and answer.json()["tokens"] > 10


def test_the_service_answers_as_the_evaluation_did(
    readers: Registry, open_client: Callable[..., TestClient], small_run: Callable[[str], Path]
) -> None:
    client = open_client(readers)
    recorded = [json.loads(line) for line in (small_run("sentiment") / "predictions.jsonl").read_text().splitlines()]
    rows = [{"text": row["text"]} for row in sentiment_rows(24, 2)]
    answer = client.post("/v1/adapters/sentiment/predict", json={"rows": rows}).json()
    assert [one["label"] for one in answer["predictions"]] == [line["prediction"]["label"] for line in recorded]
    for one, line in zip(answer["predictions"], recorded, strict=True):
        assert one["probabilities"] == pytest.approx(line["prediction"]["probabilities"], abs=1e-5)


def test_requests_for_different_adapters_share_a_batch(
    readers: Registry, open_client: Callable[..., TestClient]
) -> None:
    client = open_client(readers, batch=len(READERS), wait=20.0)  # goes when it is full
    with ThreadPoolExecutor(len(READERS)) as pool:
        found = list(
            pool.map(lambda name: client.post(f"/v1/adapters/{name}/predict", json=asked(name, TEXTS[:1])), READERS)
        )
    assert [one.status_code for one in found] == [200] * len(READERS)
    figures = figures_of(client)
    assert figures["peftkit_batch_examples_count"] == 1
    assert figures["peftkit_batch_adapters_sum"] == len(READERS)


def figures_of(client: TestClient) -> dict[str, float]:
    lines = [line for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_what_is_wrong_with_a_request_is_said_and_the_service_goes_on(
    readers: Registry, open_client: Callable[..., TestClient]
) -> None:
    client = open_client(readers)
    path = "/v1/adapters/sentiment/predict"
    for where, body, status, said in (
        ("/v1/adapters/nobody/predict", {"texts": ["a"]}, 404, "no adapter 'nobody'"),
        (path, {}, 422, "give texts"),
        (path, {"texts": ["a"], "rows": [{"text": "a"}]}, 422, "give texts"),
        (path, {"texts": []}, 422, "texts"),
        (path, {"texts": ["  "]}, 422, "texts"),
        (path, {"texts": "a"}, 422, "texts"),
        (path, {"texts": ["a"], "model": "x"}, 422, "model"),
        (path, {"texts": ["a"], "pairs": ["b"]}, 422, "single texts"),
        (path, {"rows": [{"wrong": "a"}]}, 422, "no column 'text'"),
        (path, {"rows": [{"text": 7}]}, 422, "no text in 'text'"),
        ("/v1/adapters/answers/predict", {"texts": ["a", "b"], "pairs": ["c"]}, 422, "2 questions and 1 contexts"),
        ("/v1/adapters/entities/predict", {"rows": [{"tokens": ["a", 1]}]}, 422, "not text"),
        ("/v1/adapters/entities/stream", {"text": "a"}, 422, "does not write"),
    ):
        answer = client.post(where, json=body)
        assert (answer.status_code, said in answer.json()["error"]) == (status, True), (body, answer.text)
    for raw in (b"", b"{", b"\xff", b'{"texts": ["\\ud800"]}', b"[" * 100_000, b'{"texts": [NaN]}', b"null"):
        answer = client.post(path, content=raw, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 422), (raw[:30], answer.text)
        assert answer.json().keys() == {"error"}
    assert client.get("/v1/adapters/sentiment/predict").status_code == 405
    assert client.post(path, json={"texts": ["a good film"]}).status_code == 200


def test_limits_refuse_what_is_too_much(readers: Registry, open_client: Callable[..., TestClient]) -> None:
    client = open_client(readers, body=2000, texts=3, tokens=40)
    path = "/v1/adapters/sentiment/predict"
    for body, said in (
        ({"texts": ["a"] * 4}, "4 texts"),
        ({"texts": ["a film " * 20] * 3}, "72 tokens"),
        ({"texts": ["a" * 2000]}, "larger than 2,000 bytes"),
    ):
        answer = client.post(path, json=body)
        assert answer.status_code == 413
        assert said in answer.json()["error"], answer.text
    answer = client.post(path, content=(b"x" * 500 for _ in range(9)), headers={"content-type": "application/json"})
    assert answer.status_code == 413  # a body that does not say how long it is
    figures = figures_of(client)
    assert figures['peftkit_refused_total{limit="body"}'] == 2
    assert figures['peftkit_refused_total{limit="texts"}'] == figures['peftkit_refused_total{limit="tokens"}'] == 1
    # a text that the run itself would cut is read as predict reads it, and that is said
    assert client.post(path, json={"texts": ["film " * 30]}).json()["cut"] == 1


def test_time_and_concurrency_are_limited(
    readers: Registry, open_client: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    client: Any = open_client(readers, seconds=2.0, concurrency=1)
    begun, held, compute = threading.Event(), threading.Event(), client.service.batcher.compute

    def slowly(batch: list[Unit]) -> None:
        begun.set()
        held.wait(20)
        compute(batch)

    monkeypatch.setattr(client.service.batcher, "compute", slowly)
    path = "/v1/adapters/sentiment/predict"
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, path, json={"texts": ["a good film"]})
        assert begun.wait(20)
        second = client.post(path, json={"texts": ["a film"]})
        assert (second.status_code, second.headers["retry-after"]) == (429, "1")
        assert client.get("/health").status_code == client.get("/ready").status_code == 200
        assert first.result().status_code == 504
    held.set()
    assert client.post(path, json={"texts": ["a good film"]}).status_code == 200
    assert figures_of(client)["peftkit_abandoned_total"] == 1


def test_every_route_but_health_takes_a_key(readers: Registry, open_client: Callable[..., TestClient]) -> None:
    client = open_client(readers, Access(keys=("another-key-of-length", KEY)))
    routes = {(method, path) for path, one in document_of(client, KEY)["paths"].items() for method in one}
    assert len(routes) == 7
    for method, path in routes | {("get", "/"), ("get", "/openapi.json"), ("get", "/nothing")}:
        status = client.request(method, path.replace("{name}", "sentiment")).status_code
        assert status == (200 if path in ("/health", "/ready") else 401), path
    basic = base64.b64encode(f"anybody:{KEY}".encode()).decode()
    for headers, status in (
        ({"Authorization": f"Bearer {KEY}"}, 200),
        ({"X-API-Key": KEY}, 200),
        ({"Authorization": f"Basic {basic}"}, 200),  # what a browser sends after it asked for a password
        ({"Authorization": f"Bearer {KEY}x"}, 401),
        ({"Authorization": "Basic !"}, 401),
        ({"Authorization": "Bearer"}, 401),
        ({"X-API-Key": ""}, 401),
    ):
        assert client.get("/v1/adapters", headers=headers).status_code == status, headers


def document_of(client: TestClient, key: str = "") -> dict[str, Any]:
    return dict(client.get("/openapi.json", headers={"X-API-Key": key}).json())


def test_without_keys_only_this_machine_is_answered(readers: Registry, open_client: Callable[..., TestClient]) -> None:
    client = open_client(readers, Access(hosts=("127.0.0.1", "localhost", "::1")))
    for host, status in (("127.0.0.1:8000", 200), ("localhost", 200), ("[::1]:80", 200), ("evil.example", 400)):
        assert client.get("/health", headers={"host": host}).status_code == status


def test_logs_hold_no_text(
    readers: Registry,
    open_client: Callable[..., TestClient],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client: Any = open_client(readers)
    monkeypatch.setattr(logging.getLogger("peftkit.serving"), "propagate", True)
    caplog.set_level(logging.DEBUG)
    path = "/v1/adapters/sentiment/predict"
    assert client.post(path, json={"texts": ["secretfilm"]}).status_code == 200
    assert client.post(path, json={"texts": ["secretfilm"], "pairs": ["secretstory"]}).status_code == 422
    assert client.post(path, json={"texts": ["secretfilm", 7]}).status_code == 422

    def failing(batch: list[Unit]) -> None:
        raise ValueError("it failed at secretfilm")

    monkeypatch.setattr(client.service.batcher, "compute", failing)
    answer = client.post(path, json={"texts": ["secretfilm"]})
    assert answer.status_code == 500
    assert answer.json() == {"error": "the service failed; its log says where"}
    assert "secret" not in answer.text and "secret" not in caplog.text
    assert "ValueError" in caplog.text
    lines = [json.loads(one.getMessage()) for one in caplog.records if one.getMessage().startswith("{")]
    assert [line["status"] for line in lines] == [200, 422, 422, 500]
    assert {line["adapter"] for line in lines} == {"sentiment"}


def test_what_is_no_number_is_no_answer(
    small_run: Callable[[str], Path], open_client: Callable[..., TestClient]
) -> None:
    folders = {"sentiment": small_run("sentiment")}
    registry = Registry(Resident(folders, torch.device("cpu")), folders)
    registry.load()
    model: Any = adapter_of(registry, "sentiment").saved.model
    model.get_base_model().classifier.modules_to_save["default"].bias.data.fill_(float("nan"))
    answer = open_client(registry).post("/v1/adapters/sentiment/predict", json={"texts": ["a good film"]})
    assert (answer.status_code, "no number" in answer.json()["error"]) == (500, True)


def test_text_is_streamed_as_it_is_written(writers: Registry, open_client: Callable[..., TestClient]) -> None:
    client = open_client(writers)
    for name in ("writer", "writer_prefix"):
        whole = client.post(f"/v1/adapters/{name}/predict", json={"texts": ["the sad film"]}).json()["predictions"][0]
        assert whole == load_predictor(adapter_of(writers, name).folder)(["the sad film"])[0]
        events = events_of(client.post(f"/v1/adapters/{name}/stream", json={"text": "the sad film"}))
        assert events[-1] == ("done", whole)
        assert "".join(event["text"] for kind, event in events[:-1]) in whole["completion"]
        assert whole["completion"]
    short = events_of(client.post("/v1/adapters/writer/stream", json={"text": "the sad film", "max_new_tokens": 1}))
    assert len(short[-1][1]["completion"].split()) <= 1
    for body, said in (
        ({"text": "a", "max_new_tokens": 1000}, "1,000 new tokens"),
        ({"text": "a film " * 9, "max_new_tokens": 60}, "positions"),
    ):
        refused = client.post("/v1/adapters/writer/stream", json=body)
        assert (refused.status_code, said in refused.json()["error"]) == (413, True), refused.text


def test_the_document_says_what_the_events_of_a_stream_are(
    writers: Registry, open_client: Callable[..., TestClient]
) -> None:
    client = open_client(writers)
    answers = document_of(client)["paths"]["/v1/adapters/{name}/stream"]["post"]["responses"]
    event = answers["200"]["content"]["text/event-stream"]["schema"]
    assert (event["type"], event["required"]) == ("object", ["data"])
    assert event["properties"]["data"]["contentMediaType"] == "application/json"
    answer = client.post("/v1/adapters/writer/stream", json={"text": "the sad film"})
    kinds = [kind or event["properties"]["event"]["default"] for kind, _ in events_of(answer)]
    assert kinds[-1] == "done" and set(kinds) <= set(event["properties"]["event"]["enum"])


def events_of(answer: Any) -> list[tuple[str, dict[str, Any]]]:
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in answer.text.strip().split("\n\n"):
        name, _, data = block.rpartition("data: ")
        events.append((name.removeprefix("event: ").strip(), json.loads(data)))
    return events


@pytest.mark.parametrize(
    ("text", "stops", "sure"),
    [
        ("good mor", ("\n",), "good mor"),
        ("yes EN", ("END",), "yes "),
        ("xaba", ("b", "abab"), "x"),
        ("caf�", (), "caf"),
        ("a\n", ("\n\n",), "a"),
    ],
)
def test_what_may_change_is_held_back(text: str, stops: tuple[str, ...], sure: str) -> None:
    assert _sure(text, stops) == sure


# --- loading and reloading ----------------------------------------------------------------------------------------


def test_a_reload_drops_no_request_and_a_broken_folder_keeps_what_was(
    small_run: Callable[[str], Path], tmp_path: Path, open_client: Callable[..., TestClient]
) -> None:
    folder = tmp_path / "live"
    shutil.copytree(small_run("sentiment"), folder)
    folders = {"live": folder, "entities": small_run("entities")}
    registry = Registry(Resident(folders, torch.device("cpu")), folders)
    registry.load()
    client = open_client(registry)

    def ask() -> Any:
        return client.post("/v1/adapters/live/predict", json={"texts": TEXTS})

    before = ask().json()["predictions"]
    assert client.post("/v1/reload").json() == {"loaded": [], "kept": {}}
    shutil.rmtree(folder)
    shutil.copytree(small_run("other"), folder)
    stop = threading.Event()

    def keep_asking() -> list[int]:
        found = []
        while not stop.is_set():
            found.append(ask().status_code)
        return found

    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(keep_asking) for _ in range(2)]
        reloaded = client.post("/v1/reload")
        stop.set()
        statuses = [status for one in asking for status in one.result()]
    assert reloaded.json() == {"loaded": ["live"], "kept": {}}
    assert statuses and set(statuses) == {200}
    after = ask().json()["predictions"]
    assert close(after, load_predictor(small_run("other"))(TEXTS))
    assert not close(after, before)
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace("lora", "arol"))
    refused = client.post("/v1/reload")
    assert refused.status_code == 409
    assert "changed after it was written" in refused.json()["kept"]["live"]
    assert close(ask().json()["predictions"], after)
    assert figures_of(client)['peftkit_reloads_total{outcome="failed"}'] == 1


def test_other_backbones_and_folders_are_refused(small_run: Callable[[str], Path], tmp_path: Path) -> None:
    device = torch.device("cpu")
    with pytest.raises(UsageError, match=r"writer .* other weights .* start another `peftkit serve`"):
        Resident({"sentiment": small_run("sentiment"), "writer": small_run("writer")}, device)
    with pytest.raises(UsageError, match="no run folder"):
        Resident({"a": tmp_path / "nothing"}, device)
    resident = Resident({"sentiment": small_run("sentiment")}, device)
    with pytest.raises(UsageError, match="one process holds one backbone"):
        resident.adopt("writer", small_run("writer"))
    broken = tmp_path / "broken"
    shutil.copytree(small_run("sentiment"), broken)
    (broken / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match="changed after it was written"):
        resident.adopt("broken", broken)


# --- the command line ---------------------------------------------------------------------------------------------


def test_names_come_from_folders_or_are_given() -> None:
    found = named_folders(["runs/a", "b=runs/a=1", "runs/x=y/c/"])
    assert found == {"a": Path("runs/a"), "b": Path("runs/a=1"), "c": Path("runs/x=y/c/")}
    for runs, said in ((["a/x", "b/x"], "both be called 'x'"), (["-x=a"], "cannot be"), (["a b"], "cannot be")):
        with pytest.raises(UsageError, match=said):
            named_folders(runs)


def test_other_machines_need_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEFTKIT_API_KEYS", raising=False)
    file = tmp_path / "keys"

    def access(host: str, key_file: Path | None = None) -> Access:
        return access_of(SimpleNamespace(host=host, key_file=key_file))  # type: ignore[arg-type]

    assert access("127.0.0.1").hosts == ("127.0.0.1", "::1", "localhost")
    with pytest.raises(UsageError, match=r"0\.0\.0\.0 lets other machines ask"):
        access("0.0.0.0")
    monkeypatch.setenv("PEFTKIT_API_KEYS", KEY)
    assert access("0.0.0.0") == Access((KEY,), None)
    with pytest.raises(UsageError, match="cannot read"):
        access("0.0.0.0", file)
    file.write_text(f"{KEY}\n{KEY}\nanother-key-of-length\n")
    file.chmod(0o644)
    with pytest.raises(UsageError, match="can be read by others"):
        access("0.0.0.0", file)
    file.chmod(stat.S_IRUSR)
    assert access("0.0.0.0", file).keys == (KEY, "another-key-of-length")
    for text, said in (("", "no key"), ("short", "fewer than 16")):
        file.chmod(0o600)
        file.write_text(text)
        with pytest.raises(UsageError, match=said):
            access("127.0.0.1", file)


def test_an_answer_in_two_parts_does_not_wait_for_a_delayed_acknowledgement() -> None:
    """Headers and body are sent one after the other; with Nagle's algorithm the second waits 40 ms."""
    seen: list[int] = []

    async def exchange() -> None:
        def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted = writer.get_extra_info("socket")
            seen.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with command._bound("127.0.0.1", 0) as listening:
            async with await asyncio.start_server(answer, sock=listening):
                reader, writer = await asyncio.open_connection(*listening.getsockname())
                await reader.read()
                writer.close()

    asyncio.run(exchange())
    assert seen == [1]


def test_a_start_that_cannot_be_says_why(
    small_run: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = str(small_run("sentiment"))
    taken = command._bound("127.0.0.1", 0)
    taken.listen()
    port = str(taken.getsockname()[1])
    for arguments, said in (
        ([run, "--port", port], "cannot listen on 127.0.0.1"),
        ([run, "--port", "70000"], "not a port"),
        ([run, "--max-batch", "0"], "not a positive number"),
        ([f"{run}-not", "--port", "0"], "no run folder"),
        ([run, "--host", "0.0.0.0"], "needs API keys"),
        *([] if torch.cuda.is_available() else [([run, "--port", "0", "--device", "cuda"], "torch sees no GPU")]),
    ):
        capfd.readouterr()
        assert main(["serve", *arguments]) == 2
        assert said in capfd.readouterr().err
    taken.close()
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert main(["serve", run]) == 2
    assert "needs fastapi, uvicorn, prometheus_client: pip install 'peftkit[serve]'" in capfd.readouterr().err
    assert issubclass(Stopped, PeftkitError)
