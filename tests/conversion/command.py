"""`command.py LIMIT SCRIPT ARGUMENTS` runs a command of conversion/, which the system lets write no file beyond a limit (-1 for
none), and prints how many bytes its peak of memory adds to what the libraries take."""

from __future__ import annotations

import importlib
import resource
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2] / "conversion"))


def memory(line: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split(line)[1].split()[0])


if __name__ == "__main__":
    limit, name, *arguments = sys.argv[1:]
    main = importlib.import_module(name).main
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    # Forgets the peak so far.
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS:")
    code = main(arguments)
    print(f"peak: {memory('VmHWM:') - before}")
    sys.exit(code)
