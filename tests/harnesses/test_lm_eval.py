"""The command of lm-evaluation-harness, with BAGEL known to transformers."""

from __future__ import annotations

import subprocess
import sys

from tests.harnesses.conftest import MODEL


# In a process where nothing else has told transformers of BAGEL; the harness' command stands for what it does first.
COMMAND = """
import gc, runpy, sys, types
from transformers import AutoConfig
main = types.ModuleType("lm_eval.__main__")
main.cli_evaluate = lambda: print(AutoConfig.from_pretrained(sys.argv[1]).model_type, gc.get_freeze_count() > 10_000)
sys.modules |= {"lm_eval": types.ModuleType("lm_eval"), "lm_eval.__main__": main}
runpy.run_module("bagel_harnesses.lm_eval", run_name="__main__")
"""


def test_the_harness_command_runs_where_transformers_knows_the_model():
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, MODEL["pretrained"]], capture_output=True, text=True, check=False
    )
    # Garbage is not looked for among what was imported.
    assert done.stdout.split() == ["bagel", "True"], done.stderr
