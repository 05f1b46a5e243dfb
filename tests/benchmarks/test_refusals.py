"""What a benchmark cannot measure, or write, it refuses before it begins."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffusers_bagel import BagelPipeline
from transformers_bagel import BagelForConditionalGeneration


ROOT = Path(__file__).parents[2]
NUMBERS = {
    "assisted": [("num", 1), ("tokens", 1)],
    "bench_overhead": [("num", 1), ("repeats", 1), ("steps", 1)],
    "engine": [("clients", 1), ("drawings", 1), ("repeats", 1), ("steps", 1), ("threads", 1), ("tokens", 1)],
    "growth": [("repeats", 1)],
    "guidance": [("num", 1), ("repeats", 1), ("steps", 1)],
    "memory": [("steps", 1)],
    "operators": [("repeats", 1), ("threads", 1)],
    "pictures": [("num", 0), ("side", 0)],
    "replicas": [("clients", 1), ("seconds", 1)],
    "run": [("repeats", 1), ("threads", 1)],
    "serving": [("batch", 1), ("clients", 1), ("repeats", 1), ("seconds", 1), ("text-clients", 1), ("tokens", 1)],
    "sessions": [("repeats", 1), ("sessions", 1), ("threads", 1), ("tokens", 1), ("turns", 0)],
    "split": [("latents", 1), ("repeats", 1)],
    "step_caches": [("num", 0), ("side", 0)],
    "watch": [("repeats", 1)],
}
OUTPUTS = {
    "assisted": "json",
    "compare": "json",
    "engine": "json",
    "full_size": "json",
    "gpu": "json",
    "gpu_check": "output",
    "growth": "output",
    "guidance": "json",
    "memory": "json",
    "pictures": "json",
    "replicas": "log",
    "run": "json",
    "serving": "json",
    "sessions": "json",
    "step_caches": "json",
}
# What must be named in any case.
POSITIONAL = {"compare": [str(ROOT)], "operators": ["denoise"]}


@pytest.fixture
def refused(monkeypatch, capsys):
    """What a script says to arguments that it refuses, with no model made."""
    for folder in (ROOT / "examples" / "shapes", ROOT / "benchmarks"):
        monkeypatch.syspath_prepend(str(folder))
    for model in (BagelPipeline, BagelForConditionalGeneration):
        monkeypatch.setattr(model, "__init__", lambda self, *args, **kwargs: pytest.fail("a model was made"))
        monkeypatch.setattr(model, "from_pretrained", lambda *args, **kwargs: pytest.fail("a model was read"))

    def call(script: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, *POSITIONAL.get(script, []), *arguments])
        with pytest.raises(SystemExit) as error:
            importlib.import_module(script).main()
        assert error.value.code == 2
        return capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    ("script", "name", "least"), [(script, *number) for script, numbers in NUMBERS.items() for number in numbers]
)
def test_numbers_that_measure_nothing(script, name, least, refused):
    said = refused(script, f"--{name}", str(least - 1))
    assert f"{script}: error: --{name} must be at least {least}, got {least - 1}" in said


@pytest.mark.parametrize(("script", "name"), OUTPUTS.items())
def test_files_that_cannot_be_written(script, name, refused, tmp_path):
    said = refused(script, f"--{name}", str(tmp_path / "nowhere" / "file"))
    assert f"error: --{name}: '{tmp_path}/nowhere/file" in said and f"there is no folder '{tmp_path}/nowhere'." in said


def test_every_script_that_has_such_arguments_is_tried():
    names = set(NUMBERS) | set(OUTPUTS)
    scripts = {file.stem: file.read_text(encoding="utf-8") for file in (ROOT / "benchmarks").glob("*.py")}
    for script, code in scripts.items():
        assert ("need_at_least(" in code or "need_output(" in code) <= (script in names | {"refusals"}), script
        assert ('"--json"' in code) <= (script in OUTPUTS), script


@pytest.mark.parametrize("script", ["pictures", "step_caches"])
def test_tables_of_which_one_could_not_be_measured(script, refused):
    assert "--side must be a multiple of 16, got 40." in refused(script, "--side", "40")
    assert "--num and --side are both 0" in refused(script, "--num", "0", "--side", "0")


@pytest.mark.parametrize("script", ["pictures", "step_caches"])
def test_tables_are_written_where_that_is_asked_for_alone(script, refused, monkeypatch, tmp_path):
    """A short look is not to replace what is in benchmarks/results."""
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "middle", lambda side: {})
    write, written = Path.write_text, []
    monkeypatch.setattr(Path, "write_text", lambda file, *args, **kw: written.append(file) or write(file, *args, **kw))
    module.main(["--num", "0", "--json", str(tmp_path / "tables.json")])
    assert written == [tmp_path / "tables.json"]
    monkeypatch.setattr(Path, "write_text", lambda file, *args, **kw: written.append(file))
    module.main(["--num", "0"])
    assert written == [tmp_path / "tables.json"]


def test_a_client_that_there_is_none_of_is_refused_before_any_is_installed():
    environment = os.environ | {"PYTHON": "false"}
    command = ["bash", str(ROOT / "scripts" / "clients.sh"), "no_such_client"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "there is no examples/clients/no_such_client.py." in done.stderr


def test_folders_and_files_of_others_are_no_outputs(refused, monkeypatch, tmp_path, capsys):
    from refusals import need_output

    parser, file = argparse.ArgumentParser(), tmp_path / "file"
    need_output(parser, "json", None)
    need_output(parser, "json", file)
    file.write_text("", encoding="utf-8")
    need_output(parser, "json", file)
    with pytest.raises(SystemExit):
        need_output(parser, "json", tmp_path)
    assert "for it is a folder." in capsys.readouterr().err
    # A superuser may write anywhere.
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    for place in (file, tmp_path / "new"):
        with pytest.raises(SystemExit):
            need_output(parser, "json", place)
        assert f"'{place}' cannot be written by who runs this." in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
