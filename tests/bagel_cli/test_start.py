"""What is said before a library is imported, and what is kept off the screen."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from importlib.metadata import version

import pytest

from bagel_cli import main
from tests.conftest import CHECKPOINT, golden_image


HEAVY = {"torch", "transformers", "diffusers", "numpy", "accelerate", "huggingface_hub", "safetensors"}
MODULE = ["-m", "diffusers_bagel"]
# As the installed script does.
SCRIPT = ["-c", "import sys; from bagel_cli import main; sys.exit(main())"]


def run(arguments: list[str], start: list[str], **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *start, *arguments], capture_output=True, text=True, **kwargs)


@pytest.mark.parametrize("start", [MODULE, SCRIPT], ids=["module", "script"])
@pytest.mark.parametrize(
    ("arguments", "code"), [(["--help"], 0), (["draw", "x", "--steps", "0"], 2)], ids=["help", "wrong"]
)
def test_an_answer_without_a_model_takes_less_than_a_second(start, arguments, code, tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run(arguments, ["-X", "importtime", *start], cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == code
    imported = {
        line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")
    }
    assert "argparse" in imported and not imported & HEAVY
    # Of the processor: what others on this machine do does not count.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


WRONG = [
    (["draw"], "the following arguments are required: TEXT (see 'bagel draw --help')"),
    (["dance"], "invalid choice: 'dance'"),
    (["draw", "x", "--steps", "0"], "argument --steps: must be a whole number from 1, got '0'"),
    (["draw", "x", "--steps", "many"], "argument --steps: must be a whole number from 1, got 'many'"),
    (
        ["draw", "x", "--preset", "genval"],
        "argument --preset: invalid choice: 'genval' (choose from 'demo', 'notebook',",
    ),
    (["draw", "x", "--preset", "vqa"], "argument --preset: invalid choice: 'vqa' (choose from 'demo', 'notebook',"),
    (
        ["ask", "in.png", "x", "--preset", "kris"],
        "argument --preset: invalid choice: 'kris' (choose from 'ask', 'vqa',",
    ),
    (["draw", "x", "--seed", str(2**64)], f"argument --seed: must be a whole number from {-(2**63)} to {2**64 - 1}"),
    (
        ["edit", "a.png", "x", "--guidance-tolerance", "2"],
        "argument --guidance-tolerance: must be a number from 0 to 1, got '2'",
    ),
    (["draw", "x", "--guidance-scale", "nan"], "argument --guidance-scale: must be a number from 0, got 'nan'"),
    (["chat", "--max-new-tokens", "-1"], "argument --max-new-tokens: must be a whole number from 1"),
    (["ask", "in.png", "x", "--temperature", "-1"], "argument --temperature: must be a number from 0, got '-1'"),
    (["draw", "x", "-o", "out.psd"], "an image format that can be written, such as .png"),
    (["draw", "x", "-o", "out.xbm"], "an image format that can be written, such as .png"),
    (["ask", "gone.png", "x", "--model", "."], "the picture 'gone.png' cannot be read"),
    (["edit", "~/gone.png", "x", "--model", "."], "the picture '~/gone.png' cannot be read"),
    (["chat", "--model", "./gone"], "'./gone' is no folder"),
]


def test_mistakes_are_told_in_the_words_of_the_command_before_a_library_is_imported(tmp_path):
    code = "import json, sys; from bagel_cli import main\n"
    code += "for arguments in json.loads(sys.argv[1]):\n    print(main(arguments), file=sys.stderr)\n"
    code += "print(json.dumps(list(sys.modules)))"
    done = run([json.dumps([arguments for arguments, _ in WRONG])], ["-c", code], cwd=tmp_path)
    told = done.stderr.splitlines()
    assert len(told) == 2 * len(WRONG) and set(told[1::2]) == {"2"}
    for line, (arguments, sentence) in zip(told[::2], WRONG, strict=True):
        assert line.startswith("error: ") and sentence in line, arguments
    assert not HEAVY & set(json.loads(done.stdout))


def test_the_versions_of_the_libraries_are_told(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"bagel {version('transformers-bagel')} (transformers 5.")


def test_a_script_that_imports_the_package_finds_it_registered():
    code = "import diffusers_bagel; from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES as known; "
    assert run([code + "print('transformers_bagel.modeling_bagel' in known)"], ["-c"]).stdout.strip() == "True"


@pytest.mark.slow
def test_nothing_of_other_packages_is_on_the_screen(tmp_path):
    golden_image("square").save(tmp_path / "in.png")
    environment = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = run(["ask", "in.png", "what?", "--model", str(CHECKPOINT)], MODULE, cwd=tmp_path, env=environment)
    said = [line for line in done.stderr.splitlines() if "Loading weights" not in line]
    # Without image settings the tiny model cannot take the published sizes.
    assert [line.split(":")[0] for line in said] == ["loading in float32", "error"]
    assert done.stdout == "" and done.returncode == 2
