"""What can be typed behind `peftkit`: its verbs, and what each of them takes. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peftkit.artifact_verbs import add_combine_options, add_diff_options, add_export_options, add_extract_options
from peftkit.artifacts.merge_command import add_merge_options
from peftkit.bench.advice.command import add_advise_options
from peftkit.bench.command import add_run_options, add_status_options
from peftkit.bench.report_command import add_compare_options, add_report_options
from peftkit.console import Parser, positive
from peftkit.launch_options import add_launch_options
from peftkit.planning.command import add_plan_options
from peftkit.serving.options import add_serve_options

Command = Callable[[argparse.Namespace], None]


def parsers(commands: Mapping[str, Command]) -> tuple[Parser, dict[str, Parser]]:
    """The parser for `peftkit` alone, and that of each verb.

    Args:
        commands: what each verb does.
    """

    parser = Parser(prog="peftkit", description="Parameter-efficient fine-tuning you can check.")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, summary: str) -> Parser:
        one = verbs.add_parser(name, help=summary, description=summary)
        one.set_defaults(command=commands[name])
        return one

    for name, summary in (
        ("train", "Train, evaluate and save the run that a configuration describes."),
        ("launch", "Train over several processes: check the run, then start it through `accelerate launch`."),
        ("audit", "Look through the data of a run for faults, each with file and line."),
        ("validate", "Check a configuration: every problem at once, with file and line."),
    ):
        one = verb(name, summary)
        one.add_argument("config", type=Path, metavar="CONFIG")
        one.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="win over the file")
        if name != "validate":
            one.add_argument("--allow", action="append", default=[], metavar="NAME", help="let this finding through")
        if name == "launch":
            add_launch_options(one)
        if name == "audit":
            one.add_argument("--json", action="store_true")
            one.add_argument("--html", type=Path, metavar="FILE", help="write the report as a page with charts too")

    others: Any = {"action": "append", "type": Path, "default": [], "metavar": "RUN2", "dest": "others"}
    others["help"] = "another run of the same task; the mean of all is what counts (as often as there are runs)"
    one = verb("evaluate", "Score a saved run on its test split, or on any file with its columns.")
    one.add_argument("run", type=Path, metavar="RUN")
    one.add_argument("--with", **others)
    one.add_argument("--data", type=Path, metavar="FILE")
    one.add_argument("--json", action="store_true")

    one = verb("predict", "Labels and probabilities for texts, a file, or stdin; one JSON object a line.")
    one.add_argument("run", type=Path, metavar="RUN")
    one.add_argument("--with", **others)
    one.add_argument("texts", nargs="*", default=[], metavar="TEXT")
    one.add_argument("--text-pair", action="append", metavar="TEXT", help="the second text, once for each TEXT")
    one.add_argument("--file", type=Path, help="a table with the run's columns, or one text a line (.txt)")

    one = verb("merge", "Write a run as one plain transformers model, read it back and compare.")
    add_merge_options(one)

    add_combine_options(verb("combine", "Add up what several runs do to one backbone: ΔW by weights, TIES, DARE."))
    add_diff_options(verb("diff", "What two runs of one backbone do otherwise: ΔW by module, heads, settings."))
    add_extract_options(verb("extract", "The adapter that is nearest to what a full fine-tuning did to a model."))
    add_export_options(
        verb("export", "A run or merged model as ONNX or GGUF, or its adapter for vLLM, compared there.")
    )

    one = verb("bundle", "Write a run and its backbone as one folder, load it in a fresh process and compare.")
    one.add_argument("run", type=Path, metavar="RUN")
    one.add_argument("target", type=Path, metavar="OUT")
    one.add_argument("--data", type=Path, metavar="FILE", help="rows to compare on (default: the test split)")
    one.add_argument("--probe-rows", type=positive, default=32, metavar="N", help="compare on the first N (32)")

    one = verb("card", "A run as a model card of the Hub: data, method, counts, scores with interval, merge, loading.")
    one.add_argument("run", type=Path, metavar="RUN")
    one.add_argument(
        "--merged", type=Path, metavar="FOLDER", help="what `peftkit merge` wrote of it: the card is of that"
    )
    one.add_argument("--out", type=Path, metavar="FILE", help="write it there, as README.md (default: print it)")

    power = "what the machine drew while it trained, for an estimate of the energy"
    one.add_argument("--watts", type=float, metavar="W", help=power)
    one.add_argument("--co2-per-kwh", type=float, metavar="G", help="grams that its grid emits, for one of emissions")

    one = verb("serve", "Answer over HTTP: any number of runs or bundles over one backbone in memory.")
    add_serve_options(one)

    add_run_options(verb("bench run", "Make what is left of the runs of a grid, several at a time."))
    add_status_options(verb("bench status", "How far a grid is, cell by cell."))
    add_report_options(verb("bench report", "What a grid's results say: a page, Markdown and tables."))
    add_compare_options(verb("bench compare", "The same cells in two folders of results, such as of two versions."))

    one = verb("params", "Exact parameter counts of methods on a backbone, from its configuration alone.")
    one.add_argument("--backbone", required=True, metavar="NAME", help="a name, or a folder with config.json")
    which = one.add_mutually_exclusive_group(required=True)
    which.add_argument("--method", action="append", metavar="KIND[:key=value,…]")
    which.add_argument("--all", action="store_true", help="every published method, at its paper's setting")
    one.add_argument(
        "--budget", metavar="N", help="find the rank, size or length that trains N parameters beside the head"
    )
    one.add_argument("--task", metavar="KIND", help="put this task's head on; without it there is no head")
    one.add_argument("--labels", type=int, default=2, metavar="N", help="outputs of the head (default: 2)")
    form = one.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true")
    form.add_argument("--json", action="store_true")
    one.add_argument("--chart", type=Path, metavar="FILE", help="draw what trains, as .png, .svg or .pdf")

    one = verb("plan", "Memory, steps and time of a run, and what makes it fit, before a weight is loaded.")
    one.add_argument("config", type=Path, metavar="CONFIG")
    one.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="win over the file")
    add_plan_options(one)

    one = verb("advise", "Which method to use for a run: a comparison in miniature on its own data, within a time.")
    add_advise_options(one)

    one = verb("fetch", "Get bundled backbones and data sets ahead of time; without a name, list them.")
    one.add_argument("names", nargs="*", default=[], metavar="NAME")
    one.add_argument("--list", action="store_true", help="list what there is")

    verb("ls", "List the recipes and configurations that come with peftkit.")
    one = verb("cp", "Copy a shipped recipe or configuration here, to edit it.")
    one.add_argument("name", metavar="NAME")
    one.add_argument("target", type=Path, nargs="?", metavar="FILE")
    verb("schema", "Print the JSON Schema of configurations, for editors.")
    verb("env", "Print versions and devices, for bug reports.")
    return parser, verbs.choices
