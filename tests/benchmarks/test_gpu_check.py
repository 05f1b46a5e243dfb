"""`scripts/gpu_check.sh` in its small form: all of it runs on a CPU, and whatever goes wrong is said and costs the exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).parents[2]
WRONG = "tests/benchmarks/failing/wrong.py"
# A process that does each item, or ends, hangs, or fails with an item of that name.
WORKER = """
import os, subprocess, sys, time
from pathlib import Path
from lines import Lines
*items, _, file = sys.argv[1:]
lines = Lines(Path(file))
if items[0] == "forgotten":
    lines.write(items=[], abouts={})
    sys.exit(4)
for item in items:
    if item == "unusable":
        sys.exit(2)
    lines.write(began=item)
    if item == "ends":
        os._exit(3)
    if item == "hangs":
        time.sleep(60)
    if item == "leaves a process":
        subprocess.Popen(["sleep", "60"])
        sys.exit(3)
    lines.write(row={"name": item})
    lines.write(done=item, outcome="failed" if item == "fails" else "passed", reason="", seconds=0.0)
"""


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def gpu_check(output: Path, *arguments: str) -> tuple[subprocess.CompletedProcess, dict, str]:
    """How the script ended, and its two files."""
    command = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), "--device", "cpu", "--output", str(output), *arguments]
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    report = json.loads(Path(f"{output}.json").read_text(encoding="utf-8"))
    return done, report, Path(f"{output}.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return gpu_check(tmp_path_factory.mktemp("small") / "found")


@pytest.mark.slow
def test_the_small_form_passes_and_says_what_it_is(small):
    done, report, table = small
    assert done.returncode == 0, done.stderr[-3000:]
    assert report["is_good"] and report["small"]
    assert "No accelerator: the small form" in done.stderr
    assert table.strip() == done.stdout.strip() and table.startswith("cpu, torch")


@pytest.mark.slow
def test_every_file_of_tests_and_every_section_has_its_rows(small):
    from gpu_check import SECTIONS, TESTS

    _, report, table = small
    names = [Path(file).stem.removeprefix("test_").replace("_", " ") for file in TESTS]
    assert [check["name"] for check in report["checks"]] == names
    assert list(report["sections"]) == SECTIONS == list(dict.fromkeys(row["section"] for row in report["figures"][1:]))
    for name in [*names, *SECTIONS]:
        assert f"\n| {name} | " in table
    # Beside what needs a device of its own.
    ran = [check["name"] for check in report["checks"] if check["passed"]]
    assert set(names) - set(ran) == {"commands", "two cards", "waiting"}
    assert all(check["about"] for check in report["checks"])


@pytest.mark.slow
def test_figures_and_errors_are_kept(small):
    _, report, table = small
    rows = {row["name"]: row for row in report["figures"]}
    assert all(row["seconds"] > 0 and row["peak_gb"] > 0 for row in rows.values())
    for name in (
        "drawing, 64 px, 8 steps",
        "drawing, 64 px, 8 steps, TaylorSeer",
        "drawing, 64 px, 6 steps of an adapter",
    ):
        assert f"| {name} | {rows[name]['seconds']:.4g} s |" in table
    assert rows["write 4 tokens after 16, batch 1"]["tokens_per_second"] > 0
    training = next(row for row in report["figures"] if row["section"] == "training")
    assert training["tflops"] > 0 and training["mfu"].startswith("left out")
    errors = {check["name"]: check["worst_error"] for check in report["checks"]}
    assert 0 < errors["quantized"][0] <= errors["quantized"][1] == 0.1


@pytest.mark.slow
def test_what_was_skipped_has_its_reason(small):
    _, report, table = small
    skipped = [result for result in report["tests"].values() if result["outcome"] == "skipped"]
    assert skipped and all(result["reason"] for result in skipped)
    assert "- needs two CUDA devices: a model whose layers lie on two cards (2)" in table


@pytest.mark.slow
def test_failures_are_told_in_a_line_and_cost_the_exit_status(tmp_path, monkeypatch):
    """Of an assertion, of a process that ends, and of a file that cannot be read; the rest goes on."""
    # These files need nothing of the other tests, whose imports take seconds.
    monkeypatch.setenv("PYTEST_ADDOPTS", "--noconftest")
    files = [f"tests/benchmarks/failing/{name}.py" for name in ("unreadable", "wrong")]
    done, report, table = gpu_check(tmp_path / "found", "--tests", *files, "--sections")
    assert done.returncode == 1 and not report["is_good"]
    assert [check["failed"] for check in report["checks"]] == [1, 2]
    assert "a test that has its turn all the same. | 1 passed, **2 failed** |" in table
    assert f"- RuntimeError: this file cannot be read: `{files[0]}`" in table
    assert f"- assert (1 + 1) == 3: `{files[1]}::test_a_sum`" in table
    assert f"- its process ended with exit code 5: `{files[1]}::test_an_end`" in table


def test_what_is_asked_for_and_not_found_is_a_row_that_is_not_good(tmp_path, monkeypatch):
    """Nor does it take the others with it, from wherever this is called."""
    from gpu_check import tests
    from gpu_check_part import Part
    from gpu_check_report import checks_of, is_good

    monkeypatch.setenv("PYTEST_ADDOPTS", "--noconftest")
    monkeypatch.chdir(tmp_path)
    folder = "tests/benchmarks/failing"
    part = tests(torch.device("cpu"), True, [f"{folder}/empty.py", f"{WRONG}::test_the_rest", f"{folder}/left_out.py"])
    part.run(time.monotonic() + 60, 60)
    counts = {check["name"]: (check["passed"], check["failed"], check["skipped"]) for check in checks_of(part)}
    assert counts == {"empty": (0, 1, 0), "wrong": (1, 0, 0), "left out": (0, 0, 1)}
    assert part.results[f"{folder}/empty.py"]["reason"] == "nothing of it was found"
    assert part.results[f"{folder}/left_out.py::test_that_takes_long"]["reason"] == "slow: not in the small form"
    assert not is_good(part, Part(list, []))


def test_items_that_a_later_process_does_not_know_are_no_pass():
    """Such as tests whose parameters have other names each time."""
    part = run_part("a", "ends", "forgotten")
    assert part.results["forgotten"] == {"outcome": "failed", "reason": "nothing of it was found", "seconds": 0.0}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "mps"], "--device is mps, and this machine has cpu."),
        (["--output", "nowhere/found"], "--output: 'nowhere/found.json' cannot be written, for there is no folder '"),
        (["--tests", "--sections"], "--tests and --sections name nothing"),
        (["--tests", "nope.py"], "--tests names 'nope.py', but no test"),
        (["--tests", "README.md"], "--tests names 'README.md', but no test"),
        (["--tests", "/usr"], "--tests names '/usr', but no test"),
        (["--tests", "tests/gpu/test_two_cards.py", "a/b.py", "c.py"], "--tests names 'a/b.py', 'c.py', but no test"),
        (["--tests", f"{WRONG}::test_a_sum", f"{WRONG}::nope"], f"--tests names '{WRONG}::nope', but no test"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is(arguments, said, monkeypatch, capfd):
    import gpu_check

    monkeypatch.setattr(gpu_check, "default_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(gpu_check, "check", lambda *args: pytest.fail("something ran"))
    monkeypatch.setenv("PYTEST_ADDOPTS", "--noconftest")
    with pytest.raises(SystemExit) as error:
        gpu_check.main(arguments)
    assert error.value.code == 2 and said in capfd.readouterr().err


def run_part(*items: str, seconds: float = 60.0, item_limit: float = 6.0):
    from gpu_check_part import Part

    paths = {"PYTHONPATH": str(ROOT / "benchmarks")}
    part = Part(lambda items: [sys.executable, "-c", WORKER, *items], list(items), paths)
    part.run(time.monotonic() + seconds, item_limit)
    return part


def test_a_lost_process_leaves_the_rest_its_turn():
    part = run_part("a", "ends", "b", "hangs", "fails", "c")
    outcomes = {name: result["outcome"] for name, result in part.results.items()}
    assert outcomes == dict.fromkeys("abc", "passed") | {"ends": "failed", "hangs": "cut off", "fails": "failed"}
    assert part.results["ends"]["reason"] == "its process ended with exit code 3"
    assert part.results["hangs"]["reason"] == "nothing was heard of it for 6 s"
    assert [row["name"] for row in part.rows] == ["a", "b", "fails", "c"]


def test_a_process_ends_with_those_that_it_began(monkeypatch):
    """Whoever reads what they print would wait for them."""
    reader, writer = os.pipe()
    with open(reader) as printed:
        with open(writer, "w") as stream:
            monkeypatch.setattr(sys, "stderr", stream)
            part = run_part("leaves a process")
        start = time.monotonic()
        assert printed.read() == ""
    assert time.monotonic() - start < 30
    assert part.results["leaves a process"]["reason"] == "its process ended with exit code 3"


def test_a_process_that_comes_to_no_item_fails_them_all_once():
    part = run_part("unusable", "a")
    assert {result["reason"] for result in part.results.values()} == {"its process ended with exit code 2"}


def test_a_test_that_there_is_no_time_for_is_no_pass_and_a_figure_is_no_failure():
    from gpu_check_report import is_good

    cut, whole = run_part("a", "hangs", "b", seconds=4.0, item_limit=60.0), run_part("a")
    assert [result["outcome"] for result in cut.results.values()] == ["passed", "cut off", "cut off"]
    assert is_good(whole, cut) and not is_good(cut, whole)
    assert not is_good(whole, run_part("fails"))


def test_the_vendors_figure_is_of_that_card_alone():
    sys.path.insert(0, str(ROOT / "examples"))
    from training_step import peak_flops

    known = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200": 989e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA L4": 121e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA GeForce RTX 4090": 165e12,
        "AMD Instinct MI300X": 1307e12,
    }
    assert {name: peak_flops(name) for name in known} == known
    unknown = ("cpu", "NVIDIA L40", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU")
    assert not any(map(peak_flops, unknown))


def test_all_files_of_tests_of_an_accelerator_are_asked():
    from gpu_check import TESTS

    files = (ROOT / "tests" / "gpu").glob("test_*.py")
    assert {str(file.relative_to(ROOT)) for file in files} == {name for name in TESTS if name.startswith("tests/gpu/")}
    assert len(set(TESTS)) == len(TESTS) and all((ROOT / name).exists() for name in TESTS)


def test_the_model_of_the_full_form_has_the_room_that_is_asked_for():
    """Without its numbers."""
    from gpu import make_full_size
    from gpu_check import NEEDED

    pipe = make_full_size(torch.device("meta"))
    weights = [weight for part in (pipe.transformer, pipe.vae) for weight in part.state_dict().values()]
    assert 29e9 < sum(weight.nbytes for weight in weights) < 0.85 * NEEDED
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("gigabytes", [24, 80])
def test_figures_are_skipped_where_the_model_has_no_room(gigabytes, monkeypatch):
    import gpu_check

    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: gigabytes * 10**9)
    part = gpu_check.figures(torch.device("mps"), False, ["drawing"])
    reasons = {name: result["reason"] for name, result in part.results.items()}
    assert reasons == ({"drawing": "needs 36 GB, and the device has 24"} if gigabytes == 24 else {})


def test_mps_is_waited_for_and_asked_for_its_memory(monkeypatch):
    """By what torch has for it: nothing there is under a name of CUDA."""
    import timing

    calls = []
    for name in ("synchronize", "empty_cache", "driver_allocated_memory"):
        monkeypatch.setattr(torch.mps, name, lambda name=name: calls.append(name) or 7)
    device = torch.device("mps")
    timing.seconds_once(lambda: calls.append("run"), device)
    timing.forget_peak(device)
    assert timing.peak_bytes(device) == 7
    assert calls == ["synchronize", "run", "synchronize", "empty_cache", "driver_allocated_memory"]
