"""Runs the checks of a test file in Triton's interpreter, which has to be chosen before Triton is imported."""

import json
import os
import subprocess
import sys


def run_checks(file: str) -> dict[str, str]:
    """{check: traceback, or "" if it passed}, from one child process that executes the file."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    child = subprocess.run([sys.executable, "-W", "ignore", file], env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])
