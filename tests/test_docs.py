"""Every Python snippet of the documentation runs, on the tiny model."""

from __future__ import annotations

import functools
import importlib
import re
import shlex
from pathlib import Path

import accelerate
import pytest
import torch
from diffusers import DiffusionPipeline

from diffusers_bagel import BagelPipeline
from tests.conftest import CHECKPOINT, golden_image, load_processor


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """The original layout, with the image settings that the tiny model needs beside it."""
    folder = tmp_path_factory.mktemp("original")
    for file in CHECKPOINT.iterdir():
        (folder / file.name).symlink_to(file)
    load_processor().image_processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def settings_of_torch():
    """What snippets set for the whole process is taken back."""
    precision = torch.backends.mkldnn.matmul.fp32_precision
    yield
    torch.backends.mkldnn.matmul.fp32_precision = precision
    torch._dynamo.reset()


def snippets(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=lambda page: page.name)
@pytest.mark.usefixtures("settings_of_torch")
def test_snippets_of_a_page_run_one_after_the_other(page, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The snippets are written for a GPU.
    to = DiffusionPipeline.to
    monkeypatch.setattr(
        DiffusionPipeline,
        "to",
        lambda self, device, **kw: to(self, "cpu" if str(device).startswith("cuda") else device, **kw),
    )
    for name in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        offload = getattr(DiffusionPipeline, name)
        monkeypatch.setattr(
            DiffusionPipeline, name, lambda self, *args, offload=offload, **kw: offload(self, device="cpu")
        )
    group_offload = DiffusionPipeline.enable_group_offload
    monkeypatch.setattr(
        DiffusionPipeline,
        "enable_group_offload",
        lambda self, device, **kw: group_offload(self, torch.device("cpu"), **kw),
    )
    # accelerate 1.15 cannot offload any model to "cpu:0", the name that diffusers gives this stand-in for a GPU.
    cpu_offload = accelerate.cpu_offload
    monkeypatch.setattr(accelerate, "cpu_offload", lambda model, device, **kw: cpu_offload(model, "cpu", **kw))
    # A few steps run the same lines, with predictions of TaylorSeer among them.
    call = BagelPipeline.__call__
    monkeypatch.setattr(BagelPipeline, "__call__", functools.partialmethod(call, num_inference_steps=8))
    # As `torchrun` tells a process that is alone.
    for name, value in {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": 0,
    }.items():
        monkeypatch.setenv(name, str(value))
    golden_image("wide").save("cat.png")
    variables: dict = {"__name__": "snippet"}
    for snippet in snippets(page):
        code = snippet.replace("ByteDance-Seed/BAGEL-7B-MoT", checkpoint)
        code = code.replace('"examples/', f'"{ROOT}/examples/')
        exec(compile(code, f"{page.name}", "exec"), variables)
    for value in variables.values():
        if isinstance(value, BagelPipeline):
            value.remove_all_hooks()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    assert torch.is_grad_enabled()


def test_the_page_of_original_behaviour_names_code_tests_and_points_that_exist():
    page = (ROOT / "docs" / "original_behaviour.md").read_text(encoding="utf-8")
    tests = {file: file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py")}
    defined = {name for text in tests.values() for name in re.findall(r"def (test_\w+)", text)}
    assert set(re.findall(r"\btest_\w+\b(?!\.py)", page)) <= defined
    assert set(re.findall(r"\btest_\w+\.py", page)) <= {file.name for file in tests}
    packages = {"T": "transformers_bagel", "D": "diffusers_bagel"}
    for package, file, symbols in re.findall(r"\b([TD])\s+`([\w/]+\.py)`((?:,\s+`[\w.]+`)*)", page):
        code = (ROOT / "src" / packages[package] / file).read_text(encoding="utf-8")
        for symbol in re.findall(r"(\w+)`", symbols):
            assert re.search(rf"(def|class) {symbol}\b|^{symbol}\b", code, flags=re.MULTILINE), (file, symbol)
    points = [int(number) for number in re.findall(r"^(\d+)\. ", page, flags=re.MULTILINE)]
    assert points == list(range(1, len(points) + 1))
    for file in (ROOT / "src").rglob("*.py"):
        for cited in re.findall(r"points? (\d+)(?:-(\d+))?(?: and (\d+))?", file.read_text(encoding="utf-8")):
            assert {int(number) for number in cited if number} <= set(points), file


CONVERSION = (ROOT / "docs" / "conversion.md").read_text(encoding="utf-8").replace("\\\n", "")


@pytest.mark.parametrize("command", re.findall(r"^python conversion/(.*)$", CONVERSION, flags=re.MULTILINE))
def test_commands_of_the_conversion_page_have_the_arguments_of_their_scripts(command, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "conversion"))
    file, *arguments = shlex.split(command)
    script = importlib.import_module(file.removesuffix(".py"))
    work = {"convert", "convert_back", "build", "merge", "convert_lora"} & vars(script).keys()
    called = []
    for name in work:
        monkeypatch.setattr(script, name, lambda *args, **kwargs: called.append(kwargs))
    assert script.main(arguments) == 0
    assert len(called) == 1
