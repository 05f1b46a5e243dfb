"""Which protocol a session has: the one that is asked for, else that of the fine-tune, which is said aloud."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest

from diffusers_bagel import PROTOCOLS, BagelPipeline, BagelSession
from tests.conftest import CHECKPOINT


KNOWN = {
    "ThinkMorph/ThinkMorph-7B": "thinkmorph",
    "multimodal-reasoning-lab/Bagel-Zebra-CoT": "zebra",
    "org/SoT-7B": "sot",
    "org/shape_of_thought": "sot",
    "shiwk24/BAGEL-Canvas": "canvas",
    "org/MathCanvas-7B": "canvas",
    "org/TwiFF-7B": "twiff",
    "org/COOPER_RL": "cooper",
    "models--ThinkMorph--ThinkMorph-7B/snapshots/0a1b2c": "thinkmorph",
    "org/thinkmorph-7b-diffusers/transformer": "thinkmorph",
    "ByteDance-Seed/BAGEL-7B-MoT": "plain",
    "org/UniCoT-7B-MoT": "plain",
    "org/soto": "plain",
}


@pytest.fixture
def named(own_pipe):
    """The pipeline as if it came from somewhere else."""

    def make(name: str) -> BagelPipeline:
        own_pipe.transformer.name_or_path = name
        return own_pipe

    return make


@pytest.mark.parametrize("name", KNOWN)
def test_a_fine_tune_answers_by_its_own_protocol(name, named, caplog):
    with caplog.at_level(logging.INFO):
        session = BagelSession(named(name))
    assert session.protocol is PROTOCOLS[KNOWN[name]]
    said = [record.getMessage() for record in caplog.records if "protocol" in record.getMessage()]
    if KNOWN[name] == "plain":
        assert said == []
    else:
        (message,) = said
        assert name in message and f'`protocol="{KNOWN[name]}"`' in message and '`protocol="plain"`' in message


@pytest.mark.parametrize("protocol", ["plain", "zebra", PROTOCOLS["canvas"]])
def test_what_is_asked_for_wins_and_is_not_said(protocol, named, caplog):
    pipe = named("org/TwiFF-7B")
    with caplog.at_level(logging.INFO):
        session = BagelSession(pipe, protocol).fork()
    assert session.protocol is (PROTOCOLS[protocol] if isinstance(protocol, str) else protocol)
    assert caplog.text == ""


def test_a_fine_tune_is_known_in_both_layouts(tmp_path, pipe):
    folder = tmp_path / "ThinkMorph-7B"
    folder.mkdir()
    for file in CHECKPOINT.iterdir():
        (folder / file.name).symlink_to(file)
    loaded = BagelPipeline.from_pretrained(folder)
    assert BagelSession(loaded).protocol.name == "thinkmorph"
    loaded.save_pretrained(tmp_path / "thinkmorph-saved")
    assert BagelSession(BagelPipeline.from_pretrained(tmp_path / "thinkmorph-saved")).protocol.name == "thinkmorph"


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_configuration_that_names_its_fine_tune(layout, tmp_path, pipe):
    folder = tmp_path / "mine"
    if layout == "original":
        shutil.copytree(CHECKPOINT, folder, copy_function=os.symlink)
        file = folder / "config.json"
    else:
        pipe.save_pretrained(folder)
        file = folder / "transformer" / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    file.write_text(json.dumps(settings | {"_name_or_path": "ThinkMorph/ThinkMorph-7B"}), encoding="utf-8")
    assert BagelSession(BagelPipeline.from_pretrained(Path(folder))).protocol.name == "thinkmorph"
