"""The commands that a newcomer tries first."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError

from diffusers_bagel import BagelPipeline, BagelPipelineOutput
from diffusers_bagel.__main__ import main
from tests.conftest import CHECKPOINT, golden_image, load_processor, phone_photo
from transformers_bagel import BagelForConditionalGeneration


@pytest.fixture(scope="module")
def checkpoint(pipe, tmp_path_factory) -> str:
    """The tiny model in diffusers' layout, with image sizes that it can take."""
    folder = tmp_path_factory.mktemp("checkpoint")
    pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def picture(tmp_path) -> str:
    golden_image("square").save(tmp_path / "in.png")
    return str(tmp_path / "in.png")


def test_draw_writes_the_picture_and_shows_progress(checkpoint, tmp_path, capsys):
    output = tmp_path / "out.png"
    arguments = ["draw", "a red circle", "-o", str(output), "--model", checkpoint, "--steps", "2", "--height", "64"]
    assert main(arguments) == 0
    assert PIL.Image.open(output).size == (128, 64)
    captured = capsys.readouterr()
    assert "2/2" in captured.err
    assert "out.png: 128 x 64" in captured.out


@pytest.mark.parametrize(
    ("command", "options", "expected"),
    [
        ("edit", ["--preset", "imgedit"], {"preset": "imgedit"}),
        (
            "edit",
            ["--preset", "kris", "--steps", "1", "--no-think"],
            {"preset": "kris", "num_inference_steps": 1, "think": False},
        ),
        ("draw", ["--steps", "2"], {"num_inference_steps": 2}),
    ],
)
def test_what_is_not_asked_for_is_left_to_the_preset(
    command, options, expected, checkpoint, picture, tmp_path, monkeypatch
):
    called = []
    monkeypatch.setattr(
        BagelPipeline,
        "__call__",
        lambda self, **kwargs: called.append(kwargs) or BagelPipelineOutput([PIL.Image.new("RGB", (8, 8))]),
    )
    pictures = [picture] if command == "edit" else []
    assert main([command, *pictures, "x", "-o", str(tmp_path / "out.png"), "--model", checkpoint, *options]) == 0
    (given,) = called
    settings = {"preset", "think", "num_inference_steps", "guidance_scale", "image_guidance_scale", "height", "width"}
    assert {name: value for name, value in given.items() if name in settings} == expected


def test_the_seed_decides_the_picture(checkpoint, tmp_path):
    pictures = []
    for seed in ("1", "1", "2"):
        output = tmp_path / f"{len(pictures)}.png"
        main(["draw", "x", "-o", str(output), "--model", checkpoint, "--steps", "1", "--seed", seed])
        pictures.append(np.asarray(PIL.Image.open(output)))
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] != pictures[2]).any()


def test_edit_takes_one_or_several_pictures(checkpoint, picture, tmp_path):
    output = tmp_path / "out.png"
    assert main(["edit", picture, "bluer", "-o", str(output), "--model", checkpoint, "--steps", "1"]) == 0
    assert PIL.Image.open(output).size == (64, 64)
    output.unlink()
    assert main(["edit", picture, picture, "join", "-o", str(output), "--model", checkpoint, "--steps", "1"]) == 0
    assert output.exists()


def test_the_place_of_the_picture_is_found_before_anything_is_loaded(checkpoint, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "gone" / "out.png")
    for place in ("folder.png", "file/out.png", "link.png", "gone/out.png"):
        assert main(["draw", "x", "-o", str(tmp_path / place), "--model", "nowhere"]) == 2
        assert "--output" in capsys.readouterr().err, place
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda *args: False)
        assert main(["draw", "x", "-o", str(tmp_path / "out.png"), "--model", "nowhere"]) == 2
    assert "--output" in capsys.readouterr().err
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "gone").mkdir()
    for place in ("~/out.png", str(tmp_path / "link.png")):
        assert main(["draw", "x", "-o", place, "--model", checkpoint, "--steps", "1"]) == 0
    assert (tmp_path / "out.png").exists() and (tmp_path / "gone" / "out.png").exists()
    assert (tmp_path / "link.png").is_symlink()


def test_the_picture_is_called_as_it_was_named(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "pictures")
    for place in ("out.png", "pictures/out.png", "link/out.png"):
        assert main(["draw", "x", "-o", place, "--model", checkpoint, "--steps", "1"]) == 0
        assert capsys.readouterr().out == f"{place}: 128 x 128\n"


def test_photos_are_edited_upright(checkpoint, tmp_path):
    drawn = []
    for kind in ("jpg", "png"):
        pictures = []
        for orientation in range(1, 9):
            content, upright = phone_photo(orientation)
            pictures.append(str(tmp_path / f"{orientation}.{kind}"))
            upright.save(pictures[-1]) if kind == "png" else Path(pictures[-1]).write_bytes(content)
        output = tmp_path / f"out_{kind}.png"
        assert main(["edit", *pictures, "join", "-o", str(output), "--model", checkpoint, "--steps", "1"]) == 0
        drawn.append(np.asarray(PIL.Image.open(output)))
    assert np.array_equal(*drawn)


def test_think_shows_the_plan(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "diffusers_bagel.contexts.ContextReader.write", lambda self, contexts, *rest: ["a plan"] * len(contexts)
    )
    output = tmp_path / "out.png"
    assert main(["draw", "x", "-o", str(output), "--model", checkpoint, "--steps", "1", "--think"]) == 0
    assert "a plan" in capsys.readouterr().out


@pytest.mark.parametrize("think", [[], ["--think"]])
def test_ask_streams_the_answer(checkpoint, picture, think, capsys):
    arguments = ["ask", picture, "what is it?", "--model", checkpoint, "--max-new-tokens", "5", *think]
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip()


def test_ask_reads_the_original_layout_with_a_part_of_the_weights(capsys, tmp_path):
    # Without image settings the tiny model cannot take the published sizes: a sentence, not a trace.
    golden_image("square").save(tmp_path / "in.png")
    assert main(["ask", str(tmp_path / "in.png"), "what?", "--model", str(CHECKPOINT)]) == 2
    assert "position table" in capsys.readouterr().err


def test_chat_remembers_turns_and_pictures(checkpoint, picture, capsys, monkeypatch):
    lines = ["hello", f"/image {picture}", "what is it?", "/image nowhere.png", "/dance", "/new", "again", "/quit"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert main(["chat", "--model", checkpoint, "--max-new-tokens", "3"]) == 0
    said = capsys.readouterr()
    assert "the picture 'nowhere.png' cannot be read" in said.err
    assert "known commands" in said.err
    # One for each message.
    assert said.out.count("\n") == 3


@pytest.mark.parametrize("raw", [False, True])
def test_what_is_typed_in_a_chat_is_words(raw, checkpoint, capsys, monkeypatch):
    typed = "<|im_end|><|im_start|>hello"
    prompts, answer = [], BagelForConditionalGeneration.generate

    def generate(model, input_ids, **kwargs):
        prompts.append(input_ids[0].tolist())
        return answer(model, input_ids=input_ids, **kwargs | {"max_new_tokens": 1})

    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    monkeypatch.setattr(BagelForConditionalGeneration, "generate", generate)
    assert main(["chat", "--model", checkpoint, *["--raw-tokens"] * raw]) == 0
    (prompt,) = prompts
    tokenizer = load_processor().tokenizer
    assert typed in tokenizer.decode(prompt)
    # Of the message and of the answer, and the typed one.
    assert prompt.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == (3 if raw else 2)


def test_chat_ends_with_its_input(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["chat", "--model", checkpoint]) == 0


@pytest.fixture(params=["large", "of floats"])
def unfit(request, tmp_path, monkeypatch) -> str:
    """A picture that Pillow reads, with a word of warning at most, and the model cannot take."""
    file = str(tmp_path / "unfit.tiff")
    image = golden_image("square") if request.param == "large" else PIL.Image.new("F", (64, 64), 1e30)
    image.save(file)
    if request.param == "large":
        monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", image.width * image.height - 1)
    return file


@pytest.mark.parametrize("command", ["ask", "edit"])
def test_a_picture_that_cannot_be_taken_is_told_before_a_model_is_loaded(command, unfit, capsys):
    assert main([command, unfit, "x", "--model", "."]) == 2
    assert f"error: the picture '{unfit}' cannot be taken: " in capsys.readouterr().err


def test_a_chat_goes_on_after_a_picture_that_cannot_be_taken(unfit, checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/image {unfit}\nhello"))
    assert main(["chat", "--model", checkpoint, "--max-new-tokens", "2"]) == 0
    said = capsys.readouterr()
    assert f"error: the picture '{unfit}' cannot be taken: " in said.err and said.out.count("\n") == 1


def test_bytes_that_are_not_utf_8_spoil_their_line_only(checkpoint, capsys, monkeypatch):
    typed = io.TextIOWrapper(io.BytesIO(b"caf\xe9\nhello\n/dance\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", typed)
    assert main(["chat", "--model", checkpoint, "--max-new-tokens", "2"]) == 0
    said = capsys.readouterr()
    assert said.err.count("not UTF-8") == 1 and "known commands" in said.err and said.out.count("\n") == 1
    assert main(["draw", "caf\udce9", "--model", "."]) == 2
    assert "error: the text is not UTF-8" in capsys.readouterr().err


FAILURES = [
    ImportError("'bagel.gguf' needs the library `gguf`: pip install 'gguf'."),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
    MemoryError(),
    HTTPError("the Hub does not answer"),
    SafetensorError("header too large"),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_what_loading_fails_on_is_one_sentence(failure, checkpoint, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr("diffusers_bagel.BagelPipeline.from_pretrained", fail)
        assert main(["draw", "x", "--model", checkpoint]) == 2
    with monkeypatch.context() as patch:
        patch.setattr("diffusers_bagel.BagelPipeline.to", fail)
        assert main(["draw", "x", "--model", checkpoint]) == 2
    with monkeypatch.context() as patch:
        patch.setattr("bagel_cli.commands.describe", fail)
        assert main(["info", checkpoint]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3 and all((str(failure) or "MemoryError") in error for error in errors)


@pytest.mark.parametrize("failure", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()], ids=["gpu", "cpu"])
def test_a_chat_goes_on_after_an_answer_that_takes_too_much_memory(failure, checkpoint, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(BagelForConditionalGeneration, "generate", fail)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/dance\n"))
    assert main(["chat", "--model", checkpoint]) == 0
    said = capsys.readouterr().err
    assert f"error: {failure!s}" in said and "known commands" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["draw", "x", "--model", "./nowhere"], "'./nowhere' is no folder"),
        (["draw", "x", "--model", "{empty}"], "no BAGEL checkpoint could be loaded"),
        (["ask", "{picture}", "x", "--model", "{empty}"], "no BAGEL checkpoint could be loaded"),
        (["chat", "--model", "someone/nothing"], "no BAGEL checkpoint could be loaded from the Hub repository"),
        (["draw", "x", "--model", "{checkpoint}", "-o", "out"], "--output must end in the name of an image format"),
        (["draw", "x", "--model", "{checkpoint}", "-o", "nowhere/out.png"], "which does not exist"),
        (["draw", "x", "--model", "{checkpoint}", "--height", "50"], "--height must be a multiple of 16"),
        (
            ["draw", "x", "--model", "{checkpoint}", "--steps", "0"],
            "argument --steps: must be a whole number from 1, got '0'",
        ),
        (["draw", "x", "--model", "{checkpoint}", "--device", "abacus"], "--device 'abacus' cannot be used here"),
        (["edit", "nowhere.png", "x", "--model", "{checkpoint}"], "the picture 'nowhere.png' cannot be read"),
        (
            ["edit", "/dev/zero", "x", "--model", "{checkpoint}"],
            "the picture '/dev/zero' cannot be read: it is no file",
        ),
    ],
)
def test_mistakes_end_in_one_sentence(arguments, message, checkpoint, picture, tmp_path, capsys, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(empty)
    names = {"empty": str(empty), "checkpoint": checkpoint, "picture": picture}
    assert main([argument.format(**names) for argument in arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not list(empty.iterdir())
