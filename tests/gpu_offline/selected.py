"""The verdicts of one process over all cases of a module that were selected: importing torch and triton costs more than a case."""

import json
import os
import subprocess
import sys
from pathlib import Path


def verdicts(request, program: str, **environment) -> dict:
    """Verdict by id, from `program`, a script beside this file, which takes ids on standard input and prints a line of JSON for each."""
    wanted = [item.callspec.params["name"] for item in request.session.items
              if item.path == request.path and "name" in getattr(getattr(item, "callspec", None), "params", {})]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore", **environment}
    done = subprocess.run([sys.executable, str(Path(__file__).parent / program), "-"], input="\n".join(wanted), capture_output=True,
                          text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return {verdict["id"]: verdict for verdict in map(json.loads, done.stdout.splitlines())}
