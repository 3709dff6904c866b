"""The service under load: 64 clients on this machine, eight adapters mixed, for ten minutes.

    python benchmarks/serving.py [--seconds 600] [--clients 64] [--backbone bundled:minilm]

Eight runs are trained for two steps each (what they know does not matter here), and served by a process of their own.
Each client asks for one text of 4 to 40 words at a time, of an adapter that is drawn anew each time, and asks again as
soon as it has its answer. Every answer is compared with what the run says of that text alone (`load_predictor`, in
this process): the same label, entities or answer. Beside it stand the same service with one client, and a plain
transformers pipeline over one of the runs, merged, one text after the other and in batches of 32, which a service that
has to wait for requests cannot form. Clients and service share the machine. The result goes to results/serving.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks.served import environment_threads, make_runs, question, sentences, served  # noqa: E402
from peftkit.artifacts.inference import load_predictor  # noqa: E402
from peftkit.environment import describe  # noqa: E402

RESULT = Path(__file__).parent / "results" / "serving.json"
TEXTS = 60
"""Of each adapter, drawn from by all clients."""
WARM = 3.0
"""Seconds at the start of a load that count for nothing."""


@dataclass
class Load:
    """What came of asking."""

    seconds: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    resident: list[tuple[float, float]] = field(default_factory=list)
    """Seconds since the start, and MiB of the service's process."""
    began: float = 0.0
    ended: float = 0.0

    def figures(self) -> dict[str, Any]:
        ordered = sorted(self.seconds)
        memory = [mib for _, mib in self.resident]
        return {
            "requests": len(ordered),
            "errors": dict(self.errors),
            "requests_a_second": round(len(ordered) / (self.ended - self.began), 1),
            "milliseconds": {
                f"p{share}": round(1000 * ordered[min(len(ordered) - 1, len(ordered) * share // 100)], 1)
                for share in (50, 90, 99)
            }
            | {"worst": round(1000 * ordered[-1], 1)},
            "by_adapter": dict(sorted(self.asked.items())),
            "resident_mib": {
                "first": round(memory[0], 1),
                "last": round(memory[-1], 1),
                "most": round(max(memory), 1),
                "mib_a_minute_in_the_second_half": round(60 * _slope(self.resident[len(self.resident) // 2 :]), 3),
            },
            "resident_mib_over_time": [[round(at), round(mib, 1)] for at, mib in _thinned(self.resident, 60)],
        }


async def load(address: str, pid: int, cases: list[tuple[str, bytes, Any]], clients: int, seconds: float) -> Load:
    """Ask with so many clients for so long."""
    found = Load()
    start = time.monotonic()
    found.began, found.ended = start + WARM, start + seconds
    watching = asyncio.create_task(_watch(found, pid, start))
    await asyncio.gather(*(_client(found, address, cases, seed) for seed in range(clients)))
    watching.cancel()
    return found


async def _client(found: Load, address: str, cases: list[tuple[str, bytes, Any]], seed: int) -> None:
    chance = random.Random(seed)
    host, _, port = address.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    while (asked := time.monotonic()) < found.ended:
        name, request, expected = chance.choice(cases)
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        answer = json.loads(await reader.readexactly(size))
        status = int(head.split()[1])
        now = time.monotonic()
        if status != 200:
            found.errors[f"{status} {answer}"] += 1
        elif _said(answer["predictions"][0]) != expected:
            found.errors[f"another answer by {name}"] += 1
        if asked >= found.began and now <= found.ended:
            found.seconds.append(now - asked)
            found.asked[name] += 1
    writer.close()
    await writer.wait_closed()


async def _watch(found: Load, pid: int, start: float) -> None:
    process = psutil.Process(pid)
    while True:
        found.resident.append((time.monotonic() - start, process.memory_info().rss / 2**20))
        await asyncio.sleep(1)


def _said(prediction: dict[str, Any]) -> Any:
    """What of a prediction is the same whichever batch it was in; probabilities may differ in their last digits."""
    entities = [[one["type"], one["start"], one["end"]] for one in prediction.get("entities", ())]
    return [prediction.get("label"), prediction.get("answer"), entities]


def _cases(runs: dict[str, Path]) -> list[tuple[str, dict[str, Any], Any]]:
    """(adapter, question, expected answer), computed by each run alone."""
    cases = []
    for seed, (name, folder) in enumerate(runs.items()):
        texts = sentences(TEXTS, seed)
        predictor = load_predictor(folder)
        bodies = [question(name, [text]) for text in texts]
        pairs = [body["pairs"][0] for body in bodies] if name == "answers" else None
        for body, prediction in zip(bodies, predictor(texts, pairs), strict=True):
            cases.append((name, body, _said(prediction)))
    return cases


def _request(name: str, body: dict[str, Any], address: str) -> bytes:
    text = json.dumps(body).encode()
    host = address.removeprefix("http://")
    head = f"POST /v1/adapters/{name}/predict HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return head.encode() + f"Content-Length: {len(text)}\r\n\r\n".encode() + text


def _batches(address: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{address}/metrics") as answer:
        lines = [line.split() for line in answer.read().decode().splitlines() if line.startswith("peftkit_batch_")]
    values = {name: float(value) for name, value in lines}
    batches = values["peftkit_batch_examples_count"]
    return {
        "batches": batches,
        "examples_a_batch": round(values["peftkit_batch_examples_sum"] / batches, 2),
        "adapters_a_batch": round(values["peftkit_batch_adapters_sum"] / batches, 2),
    }


def pipeline_alone(run: Path, folder: Path, seconds: float) -> dict[str, Any]:
    """Texts a second of transformers' pipeline over the merged run, which holds one adapter."""
    from transformers import pipeline

    merged = folder / "merged"
    command = [sys.executable, "-m", "peftkit.cli", "merge", str(run), str(merged)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=300)
    classify = pipeline("text-classification", model=str(merged), device="cpu")
    texts, figures = sentences(512, 99), {}
    for size in (1, 32):
        classify(texts[:size], batch_size=size)
        start, done, each = time.monotonic(), 0, []
        while time.monotonic() < start + seconds:
            before = time.monotonic()
            classify([texts[(done + index) % len(texts)] for index in range(size)], batch_size=size)
            each.append(time.monotonic() - before)
            done += size
        texts_a_second = done / (time.monotonic() - start)
        figures[f"batches_of_{size}"] = {
            "texts_a_second": round(texts_a_second, 1),
            "milliseconds_a_batch": round(1000 * statistics.median(each), 1),
        }
    return figures


def _slope(points: list[tuple[float, float]]) -> float:
    return statistics.linear_regression(*zip(*points, strict=True)).slope if len(points) > 2 else 0.0


def _thinned(points: list[Any], most: int) -> list[Any]:
    return points[:: max(1, len(points) // most)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--backbone", default="bundled:minilm")
    parser.add_argument("--folder", type=Path, help="where the runs are kept, so that a second call need not train")
    options = parser.parse_args()
    beside = min(60.0, options.seconds / 4)
    result: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "environment": describe() | {"threads_set": environment_threads(), "load_average_before": os.getloadavg()},
        "backbone": options.backbone,
        "clients": options.clients,
        "seconds": options.seconds,
    }
    with tempfile.TemporaryDirectory() as work:
        folder = options.folder or Path(work)
        runs = make_runs(folder, options.backbone, steps=2)
        cases = _cases(runs)
        for title, clients, seconds in (("mixed", options.clients, options.seconds), ("one_at_a_time", 1, beside)):
            with served(runs, folder / "serve.log") as (address, pid):
                requests = [(name, _request(name, body, address), said) for name, body, said in cases]
                asked = asyncio.run(load(address, pid, requests, clients, seconds))
                result[title] = asked.figures() | _batches(address)
            _save(result)
            shown = ("requests_a_second", "milliseconds", "errors")
            print(title, {name: result[title][name] for name in shown}, flush=True)
        result["transformers_pipeline"] = pipeline_alone(runs["sentiment"], Path(work), beside / 2)
    _save(result)
    print(result["transformers_pipeline"])
    if result["mixed"]["errors"] or result["one_at_a_time"]["errors"]:
        raise SystemExit("there were errors")


def _save(result: dict[str, Any]) -> None:
    """After each part, so that a run cut short leaves what it measured."""
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
