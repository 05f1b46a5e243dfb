# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What a GPU is asked, in ten minutes: are the answers right, and how fast is it? `bash scripts/gpu_check.sh`.

First the golden set and the tests of an accelerator (`tests/gpu/`), then the 7B model's sizes with random weights (`gpu.py`).
What is lost with its process, or would take too long, leaves the rest its turn. A JSON file and a table say what passed,
failed, was skipped and why. The exit status is 1 if something failed, or a test was not reached in time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from gpu_check_part import ROOT, Part, is_of
from gpu_check_report import checks_of, is_good, table
from lines import Lines
from machine import machine
from refusals import need_output
from timing import default_device


TESTS = [
    *(f"tests/transformers_bagel/test_golden_{name}.py" for name in ("text", "training")),
    *(f"tests/diffusers_bagel/test_golden_{name}.py" for name in ("images", "bfloat16")),
    *(
        f"tests/gpu/test_{name}.py"
        for name in ("attention", "compiled", "drawing", "generators", "offload", "quantized")
    ),
    # What starts processes takes longest.
    *(f"tests/gpu/test_{name}.py" for name in ("two_cards", "waiting", "training", "commands")),
]
SECTIONS = ["drawing", "few_steps", "text", "compiled", "training"]
# Seconds of all and of the tests, whose rest the figures have; and of what is not heard of.
TOTAL, TESTS_LIMIT, ITEM_LIMIT = 585.0, 380.0, 120.0
# Bytes of the weights and of a picture's step.
NEEDED = 36e9


def memory_of(device: torch.device) -> int:
    """Bytes of an accelerator."""
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return torch.cuda.get_device_properties(device).total_memory


def tests(device: torch.device, small: bool, files: list[str]) -> Part:
    """The golden set and `tests/gpu`, with their models on a device."""
    own = ["-p", "gpu_check_tests", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers", "--rootdir", str(ROOT)]
    own += ["-q", "--tb=short", "--disable-warnings", "--continue-on-collection-errors"]
    own += ["-m", "not slow"] if small else []
    paths = [str(ROOT / "src"), str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    environment = {"BAGEL_TEST_DEVICE": device.type, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return Part(lambda items: [sys.executable, "-m", "pytest", *own, *items], files, environment)


def unknown_tests(device: torch.device, names: list[str]) -> list[str]:
    """Of names of tests, files and folders those that name none: beside one of them pytest would run none of the others."""
    unknown = [name for name in names if not _is_place(ROOT / name.partition("::")[0])]
    files = list(dict.fromkeys(name.partition("::")[0] for name in names if "::" in name and name not in unknown))
    if not files:
        return unknown
    # Which tests a file has, and with which parameters, pytest alone knows.
    part = tests(device, False, files)
    with tempfile.TemporaryDirectory() as folder:
        lines = Lines(Path(folder, "lines"))
        command = part.command(["--collect-only", "-q", *files, "--lines", str(lines.file)])
        subprocess.run(command, cwd=ROOT, env=os.environ | part.environment, stdout=sys.stderr)
        found = [item for line in lines.read() for item in line.get("items", ())]
    return [
        name for name in names if name in unknown or ("::" in name and not any(is_of(item, name) for item in found))
    ]


def _is_place(path: Path) -> bool:
    """Whether it is a file or a folder of this repository that may have tests."""
    place = Path(os.path.normpath(path))
    return ROOT in place.parents and (place.is_dir() or (place.is_file() and place.suffix == ".py"))


def _own_name(test: str) -> str:
    """The name that pytest has for what is asked for."""
    file, mark, name = test.partition("::")
    return os.path.relpath(ROOT / file, ROOT) + mark + name


def figures(device: torch.device, small: bool, sections: list[str]) -> Part:
    """Times of `gpu.py`; none where the model has no room."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", device.type, *["--small"] * small]
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    part = Part(lambda items: [*command, "--sections", *items], sections, environment)
    if not small and memory_of(device) < NEEDED:
        reason = f"needs {NEEDED / 1e9:.0f} GB, and the device has {memory_of(device) / 1e9:.0f}"
        part.results = {section: {"outcome": "skipped", "reason": reason, "seconds": 0.0} for section in sections}
    return part


def check(device: torch.device, small: bool, files: list[str], sections: list[str]) -> dict[str, Any]:
    """All that is asked, as the file has it."""
    start = time.monotonic()
    first, second = tests(device, small, files), figures(device, small, sections)
    if small:
        # Times say nothing here, so that the two may run beside each other.
        beside = threading.Thread(target=first.run, args=(start + TESTS_LIMIT, ITEM_LIMIT))
        beside.start()
        second.run(start + TOTAL, ITEM_LIMIT)
        beside.join()
    else:
        first.run(start + TESTS_LIMIT, ITEM_LIMIT)
        second.run(start + TOTAL, ITEM_LIMIT)
    return machine(None) | {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "small": small,
        "is_good": is_good(first, second),
        "seconds": time.monotonic() - start,
        "checks": checks_of(first),
        "figures": second.rows,
        "sections": second.results,
        "tests": first.results,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"), default=default_device().type)
    parser.add_argument("--small", action="store_true", help="tiny models in the place of the 7B model's sizes")
    parser.add_argument("--tests", nargs="*", default=TESTS, metavar="TEST", help="these files or tests only")
    parser.add_argument("--sections", nargs="*", choices=SECTIONS, default=SECTIONS, help="these figures only")
    parser.add_argument(
        "--output", type=Path, default=Path("gpu_check"), help="name of the two files, before .json and .md"
    )
    args = parser.parse_args(arguments)
    if args.device not in ("cpu", default_device().type):
        parser.error(f"--device is {args.device}, and this machine has {default_device().type}.")
    need_output(parser, "output", *(Path(f"{args.output}{ending}") for ending in (".json", ".md")))
    if not args.tests and not args.sections:
        parser.error("--tests and --sections name nothing: there is nothing to do.")
    own = {test: _own_name(test) for test in args.tests}
    unknown = unknown_tests(torch.device(args.device), list(own.values()))
    if wrong := [repr(test) for test, name in own.items() if name in unknown]:
        parser.error(f"--tests names {', '.join(wrong)}, but no test, and no file or folder of tests, is called so.")
    if args.device == "cpu" and not args.small:
        args.small = True
        print("No accelerator: the small form runs, on the CPU.", file=sys.stderr)
    report = check(torch.device(args.device), args.small, list(dict.fromkeys(own.values())), args.sections)
    Path(f"{args.output}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    Path(f"{args.output}.md").write_text(table(report), encoding="utf-8")
    print(table(report))
    sys.exit(not report["is_good"])


if __name__ == "__main__":
    main()
