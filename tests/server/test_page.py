"""The examples of docs/serving.md, whose output it shows."""

from __future__ import annotations

import re
from dataclasses import fields

from bagel_cli.arguments import parse
from bagel_server import Engine, ServerSettings
from tests.processes import ROOT

from .conftest import served


PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def test_the_clients_examples_print_what_the_page_says(shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    engine = Engine(shapes)
    variables: dict = {}
    with served(engine, model="shapes") as url:
        for code, output in re.findall(r"```py\n(.*?)```\n```\n(.*?)```", PAGE, flags=re.DOTALL):
            exec(compile(code.replace("http://localhost:8000", url), "page", "exec"), variables)
            assert capsys.readouterr().out == output
    engine.close()
    assert (tmp_path / "second.png").exists()


def test_the_defaults_of_the_page_are_those_of_the_settings():
    settings = ServerSettings()
    rows = re.findall(r"^\| (`--[^|]*) \| ([^|]*) \|", PAGE, flags=re.MULTILINE)
    checked = set()
    for options, defaults in rows:
        names = [name.replace("-", "_") for name in re.findall(r"--([\w-]+)", options)]
        numbers = [int(number.replace(",", "")) for number in re.findall(r"\d+(?:,\d{3})*", defaults)]
        for name, number in zip(names, numbers, strict=True):
            number *= 2**20 if "MiB" in defaults else 1
            assert getattr(settings, name, None) == number or getattr(parse(["serve"]), name) == number
            checked.add(name)
    limits = {each.name for each in fields(ServerSettings) if each.name.startswith("max_")} | {
        "timeout",
        "body_timeout",
    }
    assert checked == limits - {"max_cache_bytes"} | {"max_running", "max_waiting"}
