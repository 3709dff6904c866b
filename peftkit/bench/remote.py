"""A run on a machine of a cluster, which shares no folder with the one that keeps the results. Knows nothing of Ray."""

from __future__ import annotations

import os
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path

from peftkit.backbones.bundled import cache_folder
from peftkit.bench.probes import listed
from peftkit.bench.processes import Worker, how_it_ended
from peftkit.bench.source import source_sha256
from peftkit.bench.store import ANSWERS, Answers, Record, Store
from peftkit.bench.worker import Job
from peftkit.data.mix import missing_files
from peftkit.environment import versions

PROBES = "probes"
"""The folder beside the results in which a worker keeps what it knows of an untouched backbone."""


@dataclass(frozen=True)
class Origin:
    """What is true of the machine that gives the job, and has to be of the one that does it."""

    folder: str
    """Relative paths start here."""
    code: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Reply:
    """What came of a job: a record; or how its process ended without one; or why it was not begun."""

    record: str = ""
    answers: str = ""
    exit_code: int = 0
    told: str = ""
    refused: str = ""

    def results(self) -> tuple[Record, Answers | None]:
        """As the worker stored them."""
        answers = Answers.model_validate_json(self.answers) if self.answers else None
        return Record.model_validate_json(self.record), answers


def origin() -> Origin:
    """Of this machine."""
    return Origin(str(Path.cwd()), source_sha256(), versions())


def make(text: str, threads: int, asked: Origin) -> Reply:
    """Make a run in a process of its own, which ends when this one does.

    Args:
        text: the JSON of a `Job`, whose folder is not this machine's.
    """
    job = Job.model_validate_json(text)
    if Path(asked.folder).is_dir():
        os.chdir(asked.folder)
    if wrong := _wrong(job, asked):
        return Reply(refused=f"{platform.node()}: {wrong}")
    with tempfile.TemporaryDirectory(prefix="peftkit-bench-") as folder:
        probes = cache_folder() / PROBES  # which runs of this machine share
        probes.mkdir(parents=True, exist_ok=True)
        (Path(folder) / PROBES).symlink_to(probes)
        code, said = Worker(["peftkit.bench.tethered", str(os.getpid())], threads).make(
            job.model_copy(update={"folder": folder})
        )
        store = Store(Path(folder))
        record = store.find(job.id)
        if record is None:
            return Reply(exit_code=code, told=f"{how_it_ended(code, said)} (on {platform.node()})")
        answers = store.answers(job.id).model_dump_json() if (store.folder / ANSWERS).is_dir() else ""
        return Reply(record.model_dump_json(), answers)


def _wrong(job: Job, asked: Origin) -> str:
    """Why results of this machine could not stand beside the others; empty where they can."""
    here = Origin(asked.folder, source_sha256(), versions())
    if here.code != asked.code:
        return "its peftkit has other code than the machine that gives the runs; install the same there"
    for name, version in asked.versions.items():
        if here.versions[name] != version:
            return f"it has {name} {here.versions[name]}, and the machine that gives the runs {version}"
    read = [job.run.task.data, *job.elsewhere.values(), *(one.data for one in listed(job.probe))]
    missing = [problem for one in read for problem in missing_files(one)]
    return f"{missing[0]}; every machine needs the data at the same path" if missing else ""
