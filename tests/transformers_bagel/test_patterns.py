"""Patterns of files: the same names as Python's own engine finds, in a bounded number of steps."""

from __future__ import annotations

import random
import re
import time

import pytest

from transformers_bagel import LORA_TARGETS
from transformers_bagel.patterns import LONGEST_PATTERN, Names


NAMES = [
    f"{root}layers.{layer}.{part}"
    for root in ("model.language_model.", "model.vision_tower.encoder.", "")
    for layer in (0, 1, 10, 27)
    for part in ("self_attn.q_proj", "self_attn.v_proj_moe_gen", "mlp.up_proj", "mlp_moe_gen.down_proj", "mlp.fc1")
]
GOOD = [
    *LORA_TARGETS.values(),
    r".*language_model.*layers.*(self_attn|mlp).*_proj.*",
    r".*\.layers\.(?:[02468]|\d[02468])\.mlp(_moe_gen)?\.\w+",
    r"(.*\.)?layers\.\d{2}\..*?[^.]+_proj",
    r"[a-z_.]*layers\.1\D.*",
    r"(?:model\.)*(?:(?:\w+\.)+)?layers\.(\d+\.){1,3}.+",
    r"^model\.(?:language_model|vision_tower)\..*(?:q|fc)[_1]\w*$",
    r"a|b||.*fc1",
    r"layers.{,3}self_attn.{6,}",
    # As other trainers write them.
    r"^(?!.*vision).*\.q_proj$",
    r"^(model\.language_model)(?!.*(lm_head|fc1|emb|down)).*",
    r"(?=.*(?:mlp|v_proj))(?!model\.vision).*",
    "",
]
BOMBS = [
    r"(a+)+$",
    r"(\w|\w\w|.)*y$",
    "m?o?" * 300 + ".?" * 200 + "q",
    r"(?:(?:(?:.{1000}){1000}){1000}){1000}b",
    "(" * 30 + ".?" + "){0,10}" * 30 + "#",
    "(" * 39 + ".*" + ")*" * 39 + "#",
    "(" * 39 + ".?" + "){2}" * 39 + "#",
    r"(.*)*(.*)*(.*)*(.*)*(.*)*(.*)*x",
    "(?:.{0,99999999}){99999999}x",
    "(?:(?=(.*)*)(?!(.*.*)*x).?)*" * 20,
]


@pytest.mark.parametrize("pattern", GOOD)
def test_a_pattern_finds_what_the_library_finds(pattern):
    assert Names(NAMES).whole(pattern) == [name for name in NAMES if re.fullmatch(pattern, name)]
    assert Names(NAMES).ends(pattern) == [name for name in NAMES if re.match(rf"(.*\.)?({pattern})$", name)]


def test_patterns_by_chance_find_what_the_library_finds():
    choose = random.Random(0)
    atoms = ["a", "b", ".", "[ab]", "(a|b)", "(?:ab|)", "(a*b)", "ba", r"\w", "(b?a)", "(?=a)", "(?!b|a.)"]
    repeats = ["", "", "", "*", "+", "?", "{2}", "{1,2}", "{,3}", "*?", "{2,}"]
    words = ["".join(choose.choices("ab.", k=choose.randrange(9))) for _ in range(40)]
    found = 0
    for _ in range(300):
        pattern = "".join(choose.choice(atoms) + choose.choice(repeats) for _ in range(choose.randrange(1, 6)))
        pattern = choose.choice(["", "^", "b|"]) + pattern + choose.choice(["", "$"])
        expected = [word for word in words if re.fullmatch(pattern, word)]
        assert Names(words).whole(pattern) == expected, pattern
        found += len(expected)
    assert found > 1000


@pytest.mark.parametrize("pattern", BOMBS, ids=range(len(BOMBS)))
def test_no_pattern_takes_long(pattern, monkeypatch):
    monkeypatch.setattr("transformers_bagel.patterns.MOST_STEPS", 300_000)
    began = time.process_time()
    names = Names(NAMES * 10)
    try:
        names.whole(pattern)
        names.ends(pattern)
    except ValueError as error:
        assert "takes too long" in str(error)
    assert time.process_time() - began < 2


def test_all_patterns_of_an_adapter_have_one_bound(monkeypatch):
    monkeypatch.setattr("transformers_bagel.patterns.MOST_STEPS", 30_000)
    names = Names(NAMES)
    with pytest.raises(ValueError, match="takes too long"):
        for _ in range(100):
            names.whole(r".*q_proj")


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?i)model",
        r"(?<=a)b",
        r"(a)\1",
        r"(?P<a>b)",
        "a**",
        "a++",
        "*a",
        "(a",
        "a)",
        "[a",
        "[z-a]",
        "a{2}{3}",
        "\\",
        "a" * (LONGEST_PATTERN + 1),
        "(" * 5000 + ")" * 5000,
    ],
)
def test_other_patterns_are_refused(pattern):
    with pytest.raises(ValueError):
        Names(NAMES).whole(pattern)
