"""`demo/` as a Space: its header, what it installs, and answers by a GPU that is lent for each."""

from __future__ import annotations

import pickle
import runpy
import sys
import tomllib
import types
from pathlib import Path

import pytest
from huggingface_hub import RepoCard
from packaging.requirements import Requirement

from bagel_demo import BagelPage, GpuCalls
from bagel_demo.talk import FORGOTTEN, Talk
from tests.demo.conftest import SHAPES
from tests.demo.test_page import CIRCLE, said, shown, things


ROOT = Path(__file__).parents[2]
SPACE = ROOT / "demo"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def lent(task):
    """A decorator as `spaces.GPU`: what goes in and comes out is pickled, and closing it closes the task."""

    def called(*args):
        events = task(*pickle.loads(pickle.dumps(args)))
        try:
            for event in events:
                yield pickle.loads(pickle.dumps(event))
        finally:
            events.close()

    return called


@pytest.fixture
def calls(engine) -> GpuCalls:
    return GpuCalls(engine.pipe, lent)


def test_the_header_is_one_of_a_gradio_space():
    header = RepoCard.load(SPACE / "README.md").data
    assert (header.sdk, header.license) == ("gradio", "apache-2.0")
    assert (SPACE / header.app_file).is_file()
    assert len(header.short_description) <= 60
    (wanted,) = [each for each in map(Requirement, PROJECT["optional-dependencies"]["demo"]) if each.name == "gradio"]
    assert wanted.specifier.contains(header.sdk_version)


def test_it_installs_what_the_packages_need():
    extras = PROJECT["optional-dependencies"]
    needed = {*PROJECT["dependencies"], *extras["serve"], *extras["demo"]}
    lines = (SPACE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    listed = {line for line in lines if not line.startswith("#")}
    assert listed >= {line for line in needed if Requirement(line).name not in ("gradio", PROJECT["name"])}


@pytest.mark.parametrize("is_lent", [False, True])
def test_the_app_is_the_page(monkeypatch, is_lent):
    monkeypatch.setenv("BAGEL_MODEL", str(SHAPES / "checkpoint"))
    decorated = []
    fake = types.ModuleType("spaces")
    fake.GPU = lambda duration: lambda task: decorated.append(task) or task
    monkeypatch.setitem(sys.modules, "spaces", fake)
    if is_lent:
        monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    app = runpy.run_path(str(SPACE / "app.py"))
    assert isinstance(app["page"], BagelPage)
    assert len(decorated) == is_lent


def test_a_conversation_goes_on_over_calls(calls, tmp_path):
    talk = Talk(tmp_path)
    drawn = shown(talk, calls, said(CIRCLE))
    assert things(drawn.parts[0]) == [("red", "circle")]
    answer = shown(talk, calls, said("what colour is the circle?", output="Words"))
    assert [part.text for part in answer.parts] == ["red"]


def test_a_call_is_stopped_and_forgotten(calls, tmp_path):
    talk = Talk(tmp_path)
    shown(talk, calls, said(CIRCLE))
    stopped = shown(talk, calls, said("make the red circle green", steps=100), after_each=talk.stop)
    assert (stopped.parts, stopped.note) == ([], FORGOTTEN)
    answer = shown(talk, calls, said("what colour is the circle?", output="Words"))
    assert [part.text for part in answer.parts] == ["red"]


def test_what_a_call_cannot_answer_is_told(calls, tmp_path):
    turn = shown(Talk(tmp_path), calls, said("a circle " * 3000))
    assert "positions" in turn.note
