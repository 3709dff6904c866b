"""The options of `peftkit plan`, and its answer."""

from __future__ import annotations

import argparse
import json


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """What may stand behind the configuration and its overrides."""
    parser.add_argument(
        "--gpus", metavar="[N×]NAME", help="plan for these, such as 4xA100-80GB (default: this machine)"
    )
    parser.add_argument("--accelerate", choices=("ddp", "fsdp2"), help="how several processes share the work")
    parser.add_argument("--processes", type=int, metavar="N", help="default: one a GPU; one on a CPU")
    parser.add_argument("--memory", metavar="SIZE", help="what a process may take, such as 24GiB")
    parser.add_argument(
        "--compare", metavar="METHOD,…", help="the same run with these methods, such as lora,qlora,full"
    )
    parser.add_argument("--json", action="store_true")


def answer(options: argparse.Namespace) -> str:
    """The plan as text, or as JSON."""
    from peftkit.config import load_run
    from peftkit.planning.plan import plan
    from peftkit.planning.show import shown

    found = plan(
        load_run(options.config, options.overrides),
        on=options.gpus,
        sharding=options.accelerate,
        processes=options.processes,
        memory=options.memory,
        compare=[name for name in (options.compare or "").split(",") if name],
    )
    return json.dumps(found.as_dict(), indent=2) if options.json else shown(found)
