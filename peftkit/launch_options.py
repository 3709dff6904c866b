"""What can be asked of `peftkit launch`; imports nothing heavy, because `peftkit --help` reads it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

PORT = 29500
"""Where the first of several machines is found; on one machine, any that is free."""


@dataclass(frozen=True)
class Asked:
    """What the command line of `peftkit launch` says; None where it leaves it to the Accelerate configuration."""

    processes: int | None = None
    """Over all machines."""
    accelerate: str | None = None
    """A shipped Accelerate configuration by name, or a file."""
    cpu: bool = False
    machines: int | None = None
    rank: int | None = None
    """Of this machine, from 0."""
    address: str | None = None
    port: int | None = None

    @classmethod
    def of(cls, options: argparse.Namespace) -> Asked:
        """What was parsed with `add_launch_options`."""
        return cls(**{name: getattr(options, name) for name in cls.__dataclass_fields__})


def add_launch_options(parser: argparse.ArgumentParser) -> None:
    """The options of `peftkit launch` beside those of `peftkit train`."""
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    parser.add_argument("--processes", **number, help="over all machines")
    parser.add_argument("--accelerate", metavar="NAME", help="an Accelerate configuration: see `peftkit ls`, or a file")
    parser.add_argument("--cpu", action="store_true", help="on the processor, even where there are GPUs")
    parser.add_argument("--machines", **number)
    parser.add_argument("--rank", **number, help="which of the machines this is, from 0")
    parser.add_argument("--address", metavar="HOST", help="where the machine of rank 0 is found")
    parser.add_argument("--port", **number, help=f"on that machine (default: {PORT}; on a single one, any free port)")
    parser.add_argument("--dry-run", action="store_true", help="print the command and start nothing")
