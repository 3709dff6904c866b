"""A fresh process for the contract of tasks: a command line of peftkit a line on stdin, an answer a line on stdout."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from typing import TextIO


def serve(requests: TextIO, answers: TextIO) -> None:
    """Run command lines, given as JSON lists, until there are no more."""
    from peftkit.cli import main

    for line in requests:
        output, error = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
            code = main(json.loads(line))
        answer = {"code": code, "output": output.getvalue(), "error": error.getvalue()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    replies, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    serve(sys.stdin, replies)
