"""A chat reads each turn once, remembers what was said and drawn, and survives what it cannot take."""

from __future__ import annotations

import codecs
import io
import json
import os
import pty
import re
import select
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from bagel_cli import arguments, main
from bagel_cli.arguments import parse
from bagel_cli.chat import COMMANDS, Chat
from bagel_cli.files import CommandError, typed_paths
from diffusers_bagel import PRESETS, PROTOCOLS, BagelPipeline, BagelSession
from diffusers_bagel.session import OUTPUTS
from tests.conftest import CHECKPOINT, golden_image, load_model
from transformers_bagel import BagelProcessor


TURNS = [(["square"], "what is it?"), ([], "and its colour?"), (["wide", "tall"], "which of these?"), ([], "why?")]
DRAWING = ["--steps", "2", "--height", "48", "--width", "64", "--max-new-tokens", "3"]


@pytest.fixture
def talk(saved, monkeypatch, tmp_path, capsys):
    """`talk(lines, arguments)`: what a chat prints on the standard output and as errors, if lines are piped into it."""
    monkeypatch.chdir(tmp_path)

    def piped(lines: list[str], options: list[str] | None = None, model: str = saved) -> tuple[list[str], list[str]]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        assert main(["chat", "--model", model, *(DRAWING if options is None else options)]) == 0
        said = capsys.readouterr()
        return said.out.splitlines(), [line for line in said.err.splitlines() if line.startswith("error: ")]

    return piped


@pytest.fixture
def asked(monkeypatch) -> list[tuple[list, str, dict]]:
    """What a session was asked, which answers as always: content, output, settings."""
    calls: list[tuple[list, str, dict]] = []
    stream = BagelSession.stream

    def spied(self, content, output, **settings):
        calls.append((content, output, settings))
        return stream(self, content, output, **settings)

    monkeypatch.setattr(BagelSession, "stream", spied)
    return calls


@pytest.mark.parametrize("think", [False, True])
def test_every_turn_is_answered_as_if_all_was_read_at_once(think, talker):
    read, messages, session = [], [], BagelSession(talker)
    hook = talker.transformer.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: read.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
        with_kwargs=True,
    )
    chat = Chat(session, parse(["chat", "--max-new-tokens", "6", *["--think"] * think]))
    for names, text in TURNS:
        images = [golden_image(name) for name in names]
        chat.answer([*images, text], "text")
        parts = [{"type": "image", "image": image} for image in images]
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": text}]})
        counted = len(read)
        settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        prompt = talker.processor.apply_chat_template(messages, think=think, **settings)
        expected = talker.transformer.generate(**prompt, do_sample=False, max_new_tokens=6)
        del read[counted:]
        written = talker.processor.decode(expected[0, prompt["input_ids"].shape[1] :]).split("<|im_end|>")[0]
        messages.append(session.messages[-1])
        assert messages[-1]["content"] == [{"type": "text", "text": written}]
    hook.remove()
    # An answer is read once more where its tokens are not those that its text has.
    assert prompt["input_ids"].shape[1] <= sum(read) <= prompt["input_ids"].shape[1] + 7 * len(TURNS)


def test_a_turn_that_fails_leaves_the_conversation_as_it_was(talker, monkeypatch):
    def conversation(fails: bool) -> list[dict]:
        session = BagelSession(talker)
        chat = Chat(session, parse(["chat", "--max-new-tokens", "6"]))
        chat.images = [golden_image("square")]
        chat.turn("what is it?", "text")
        if fails:
            with monkeypatch.context() as patch:
                patch.setattr(
                    talker.transformer, "generate", lambda **kwargs: (_ for _ in ()).throw(KeyboardInterrupt)
                )
                with pytest.raises(KeyboardInterrupt):
                    chat.turn("and this?", "text")
            # Of the published sizes, which are too large for the tiny model.
            with monkeypatch.context() as patch:
                patch.setattr(talker, "processor", BagelProcessor.from_pretrained(CHECKPOINT))
                chat.images = [golden_image("wide")]
                with pytest.raises(CommandError, match="position table"):
                    chat.turn("x", "text")
        chat.turn("why?", "text")
        return session.messages

    failed, calm = conversation(fails=True), conversation(fails=False)
    assert [message["content"][-1] for message in failed] == [message["content"][-1] for message in calm]


@pytest.mark.parametrize(
    ("typed", "paths"),
    [
        ("a.png", ["a.png"]),
        ("'my picture.png'", ["my picture.png"]),
        ('"my picture.png" b.png', ["my picture.png", "b.png"]),
        ("my\\ picture.png", ["my picture.png"]),
        ("my picture.png", ["my picture.png"]),
        ("it's mine.png", ["it's mine.png"]),
        ("~/a.png", ["~/a.png"]),
    ],
)
def test_paths_are_typed_as_they_are_or_as_in_a_shell(typed, paths, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("my picture.png", "it's mine.png"):
        (tmp_path / name).touch()
    assert typed_paths(typed) == paths


@pytest.mark.parametrize("typed", ["", "'a.png", '"'])
def test_paths_that_cannot_be_read_are_told(typed):
    with pytest.raises(CommandError, match="/image"):
        typed_paths(typed)


def test_a_chat_goes_on_after_a_message_that_cannot_be_taken(talk, asked, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    golden_image("square").save(tmp_path / "my picture.png")
    (tmp_path / "broken.png").write_bytes(b"PNG")
    image = "/image '~/my picture.png'"
    lines = ["hello", "/image ~/broken.png", image, "what?", "and now?", "/image", "/new", image, "what?", "again"]
    # Without image settings the tiny model cannot take the published sizes.
    said, errors = talk(lines, ["--max-new-tokens", "2"], str(CHECKPOINT))
    assert ["position table" in error for error in errors] == [False, True, False, True]
    assert "broken.png' cannot be read" in errors[0] and len(said) == 3
    assert [len(content) for content, *_ in asked] == [1, 2, 1, 2, 1]


def test_pictures_are_numbered_files_drawn_from_the_whole_conversation(talk, saved, tmp_path):
    (tmp_path / "out-2.png").write_bytes(b"mine")
    golden_image("square").save(tmp_path / "in.png")
    said, errors = talk(["/draw a red circle", "/draw now make it blue", "/image in.png", "/draw make it green"])
    names = [f"out-{number}.png" for number in (1, 3, 4)]
    assert not errors and said == [f"{name}: 64 x 48" for name in names]
    assert (tmp_path / "out-2.png").read_bytes() == b"mine"
    session, generator = BagelSession(BagelPipeline.from_pretrained(saved)), torch.Generator().manual_seed(0)
    contents = (["a red circle"], ["now make it blue"], [golden_image("square"), "make it green"])
    for name, content in zip(names, contents, strict=True):
        settings = {"num_inference_steps": 2, "height": 48, "width": 64, "generator": generator}
        (expected,) = session.send(content, output="image", **settings).images
        assert np.array_equal(np.asarray(PIL.Image.open(name)), np.asarray(expected))


def test_the_output_names_the_pictures(talk, tmp_path):
    (tmp_path / "drawn").mkdir()
    said, _ = talk(["/draw a red circle"], [*DRAWING, "-o", "drawn/circle.jpg"])
    assert said == ["drawn/circle-1.jpg: 64 x 48"]


def test_a_picture_that_cannot_be_written_is_kept_elsewhere_and_the_chat_goes_on(talk, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("bagel_cli.files.os.replace", lambda *args: (_ for _ in ()).throw(OSError("full")))
    said, errors = talk(["/draw a red circle", "hello"])
    assert len(errors) == 1 and "the picture is in" in errors[0] and len(said) == 1


@pytest.mark.parametrize(
    ("options", "line", "output"),
    [
        ([], "hello", "text"),
        ([], "/draw hello", "image"),
        ([], "!draw hello", "image"),
        ([], "/both hello", "interleaved"),
        (["--answer", "auto"], "hello", "auto"),
        (["--answer", "image"], "/say hello", "text"),
        (["--protocol", "zebra"], "hello", "auto"),
        (["--protocol", "zebra"], "/say hello", "text"),
    ],
)
def test_a_line_says_what_its_answer_is_made_of(options, line, output, talk, monkeypatch):
    asked = []
    monkeypatch.setattr(
        BagelSession, "stream", lambda self, content, output, **settings: asked.append((content, output)) or iter(())
    )
    talk([line], options)
    assert asked == [(["hello"], output)]


def test_the_command_line_knows_the_names_of_the_library():
    assert tuple(PROTOCOLS) == arguments.PROTOCOLS and arguments.OUTPUTS == OUTPUTS
    named = {
        output: [name for name, preset in PRESETS.items() if preset.output == output] for output in ("image", "text")
    }
    assert list(arguments.DRAWING_PRESETS) == named["image"] and list(arguments.ANSWER_PRESETS) == named["text"]


def test_settings_are_changed_by_their_names_on_the_command_line(talk, asked):
    lines = ["a", "/set num-steps=3", "/set steps=0", "/set steps=3 guidance_scale=2 think temperature=0.5 seed=7"]
    lines += ["b", "/set no-think temperature=0 answer=image", "c", "/set protocol=zebra", "/status"]
    said, errors = talk(lines, ["--max-new-tokens", "2", "--height", "48", "--width", "64"])
    (*_, first), (*_, second), (_, output, third) = asked
    unset = {"think", "guidance_scale", "image_guidance_scale", "guidance_tolerance", "temperature", "do_sample"}
    assert not {name for name in unset if first.get(name) is not None} and first["num_inference_steps"] is None
    assert second["num_inference_steps"] == 3 and second["guidance_scale"] == 2 and second["think"] is True
    assert second["do_sample"] is True and second["temperature"] == 0.5
    assert second["generator"].initial_seed() == 7
    assert output == "image" and third["think"] is False and third["do_sample"] is False
    assert len(errors) == 3 and "--num-steps" in errors[0] and "must be a whole number from 1, got '0'" in errors[1]
    assert {"steps: 3", "protocol: plain", "seed: 7", "guidance-scale: 2.0"} <= set(said)


def test_turns_are_told_taken_back_and_forgotten(talk, asked, tmp_path):
    golden_image("square").save(tmp_path / "in.png")
    lines = [
        "/image in.png",
        "what?",
        "/draw a circle",
        "/history",
        "/back",
        "/back x",
        "/back 2",
        "/back 0",
        "/history",
    ]
    lines += ["!clear", "/history", "/back", "again"]
    said, errors = talk(lines)
    first, drawn = said[0], "out-1.png: 64 x 48"
    turn = ["in.png: 64 x 64", "> what?", first]
    assert said[1:-1] == [drawn, *turn, "> a circle", drawn, *turn]
    assert len(errors) == 4 and "got 'x'" in errors[0] and "at most 1" in errors[1]


def test_all_commands_are_told(talk):
    said, errors = talk(["/help", "!help", "/dance", "/draw"])
    assert [line.split()[0] for line in said[: len(COMMANDS)]] == [f"/{name}" for name in COMMANDS]
    assert said[: len(said) // 2] == said[len(said) // 2 :]
    assert len(errors) == 2 and "/draw" in errors[0] and "type a text" in errors[1]


def test_a_conversation_that_outgrows_the_positions_can_be_taken_back(talk):
    said, errors = talk(["a", "/set max-new-tokens=100000", "b", "/set max-new-tokens=2", "c"])
    assert len(said) == 2 and len(errors) == 1
    assert "--max-new-tokens 100000 takes 100002 rope positions" in errors[0] and "or go /back." in errors[0]


class TestSessions:
    def test_a_conversation_goes_on_where_it_ended(self, talk, asked, tmp_path):
        golden_image("square").save(tmp_path / "in.png")
        first, second = ["/image in.png", "what?", "/draw a circle", "/back"], ["/history", "why?", "/draw a square"]
        whole, _ = talk([*first, *second])
        parts = [talk(lines, [*DRAWING, "--session", "kept"]) for lines in (first, second)]
        assert not parts[0][1] and not parts[1][1]
        # Names of files are of one run.
        texts = [[line for line in lines if ": 64 x " not in line] for lines in (whole, parts[0][0] + parts[1][0])]
        assert texts[0] == texts[1] and texts[0].count("> what?") == 1
        assert sorted(path.suffix for path in (tmp_path / "kept").iterdir()) == [
            ".json",
            *[".png"] * 2,
            *[".safetensors"] * 2,
        ]

    def test_it_is_kept_after_each_turn_and_starts_over_when_told(self, talk, tmp_path, monkeypatch):
        file, kept = tmp_path / "kept" / "session.json", []
        check = "bagel_cli.chat.check_text"
        monkeypatch.setattr(
            check, lambda line: kept.append(file.exists() and len(json.loads(file.read_text())["messages"]))
        )
        talk(["a", "b", "/back", "/clear", "/help"], [*DRAWING, "--session", "kept"])
        assert kept == [False, 2, 4, 2, 0]

    def test_a_disk_that_is_full_is_told_after_the_answer(self, talk, monkeypatch, tmp_path):
        monkeypatch.setattr(BagelSession, "save_pretrained", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
        said, errors = talk(["a", "b"], [*DRAWING, "--session", "kept"])
        error = f"error: the conversation could not be kept in '{tmp_path / 'kept'}': disk full"
        assert len(said) == 2 and errors == [error] * 2

    def test_it_is_saved_elsewhere_when_told(self, talk, tmp_path):
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "file").touch()
        said, errors = talk(["a", "/save elsewhere", "/save", "/save full", "/save gone/place"])
        assert len(said) == 1 and len(errors) == 3 and all("folder" in error for error in errors)
        again, errors = talk(["/history"], [*DRAWING, "--session", "elsewhere"])
        assert again == ["> a", *said] and not errors

    @pytest.mark.parametrize(
        ("kind", "message"),
        [
            ("file", "--session '{place}' is a file"),
            ("elsewhere/place", "--session lies in the folder '{parent}'"),
            ("full", "--session '{place}' holds no conversation, but other files"),
        ],
    )
    def test_a_place_that_cannot_be_is_told_before_anything_is_loaded(self, kind, message, tmp_path, capsys):
        (tmp_path / "file").touch()
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "other").touch()
        place = tmp_path / kind
        assert main(["chat", "--model", ".", "--session", str(place)]) == 2
        assert message.format(place=place, parent=place.parent) in capsys.readouterr().err

    def test_a_broken_one_is_told(self, talk, tmp_path, saved, capsys):
        talk(["a"], [*DRAWING, "--session", "kept"])
        (tmp_path / "kept" / "session.json").write_text("{")
        assert main(["chat", "--model", saved, "--session", "kept"]) == 2
        assert "session.json' cannot be read as JSON" in capsys.readouterr().err

    def test_another_protocol_holds_from_now_on(self, talk):
        talk(["a"], [*DRAWING, "--session", "kept"])
        said, _ = talk(["/history", "/status"], [*DRAWING, "--session", "kept", "--protocol", "canvas"])
        assert said[0] == "> a" and "protocol: canvas" in said


class TestWithoutWhatDraws:
    def test_half_of_the_weights_is_left_out(self, talk, asked, saved, monkeypatch):
        loaded = []
        run = Chat.run
        monkeypatch.setattr(Chat, "run", lambda self: loaded.append(self.session.pipe) or run(self))
        said, errors = talk(["hello", "/draw a circle", "hello"], [*DRAWING, "--no-drawing"])
        assert not loaded[0].transformer.config.visual_gen and loaded[0].vae is None
        assert len(said) == 2 and errors == [
            'error: --answer must be "text": the transformer was loaded without `visual_gen=True`.'
        ]

    def test_a_checkpoint_without_it_talks(self, talk, processor, tmp_path):
        load_model(visual_gen=False).save_pretrained(tmp_path / "talker")
        processor.save_pretrained(tmp_path / "talker")
        said, errors = talk(["hello"], DRAWING, str(tmp_path / "talker"))
        assert len(said) == 1 and not errors

    def test_no_other_protocol_can_be_meant(self, saved, capsys, monkeypatch):
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
        assert main(["chat", "--model", saved, "--no-drawing", "--protocol", "zebra"]) == 2
        assert "error: --protocol: 'zebra' draws" in capsys.readouterr().err


CTRL_D = "\x04"


class Terminal:
    """A pseudo-terminal on which a chat runs, and somebody who types, or presses Ctrl+C, when it shows what it waits for.

    Args:
        steps (`list[tuple[str, str | int]]`): Patterns to wait for, and what is typed then, or the signal that comes.
    """

    def __init__(self, steps: list[tuple[str, str | int]]):
        self.steps = steps
        self.shown = ""

    def run(self, monkeypatch: pytest.MonkeyPatch, options: list[str]) -> int:
        controller, terminal = pty.openpty()
        streams = {name: os.fdopen(os.dup(terminal), mode) for name, mode in (("stdin", "r"), ("stdout", "w"))}
        os.close(terminal)
        typing = threading.Thread(target=self._type, args=(controller,))
        try:
            with monkeypatch.context() as patch:
                for name, stream in streams.items():
                    patch.setattr(sys, name, stream)
                typing.start()
                return main(["chat", *options])
        finally:
            for stream in streams.values():
                stream.close()
            typing.join()

    def _type(self, controller: int) -> None:
        place, steps = 0, list(self.steps)
        # A character may come in two pieces.
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while True:
            if not select.select([controller], [], [], 60)[0]:
                # Nothing that it waits for comes: the chat is not to wait, either.
                os.write(controller, CTRL_D.encode())
            try:
                self.shown += decoder.decode(os.read(controller, 65536))
            except OSError:
                # The chat has ended.
                os.close(controller)
                return
            while steps and (found := re.compile(steps[0][0]).search(self.shown, place)):
                place, typed = found.end(), steps.pop(0)[1]
                if isinstance(typed, int):
                    # Python looks for signals before it waits, and whoever presses keys is slower.
                    time.sleep(0.3)
                    os.kill(os.getpid(), typed)
                else:
                    os.write(controller, typed.encode())


class TestAtATerminal:
    @pytest.fixture(autouse=True)
    def place(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("TMUX", "TERM_PROGRAM", "LC_TERMINAL", "KITTY_WINDOW_ID", "KONSOLE_VERSION"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm-256color")
        # A shell that runs the tests in the background has them ignore Ctrl+C.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, before)

    @pytest.mark.parametrize("term", ["xterm-256color", "xterm-kitty"])
    def test_it_greets_prompts_and_shows_pictures_if_it_can(self, term, saved, tmp_path, monkeypatch):
        monkeypatch.setenv("TERM", term)
        terminal = Terminal([("> ", "hello\n"), ("> ", "/draw a red circle\n"), ("> ", CTRL_D)])
        assert terminal.run(monkeypatch, ["--model", saved, *DRAWING]) == 0
        assert "/draw TEXT" in terminal.shown.splitlines()[0] and terminal.shown.count("> ") == 3
        assert ("\033_G" in terminal.shown) == (term == "xterm-kitty")
        assert "\nout-1.png: 64 x 48" in terminal.shown

    def test_ctrl_c_ends_an_answer_and_the_chat_goes_on(self, saved, monkeypatch):
        conversations = []
        run = Chat.run
        monkeypatch.setattr(Chat, "run", lambda self: conversations.append(self) or run(self))
        golden_image("square").save("in.png")
        steps: list[tuple[str, str | int]] = [
            ("> ", "/image in.png\n"),
            ("> ", "hello\n"),
            ("hello\r\n.", signal.SIGINT),
        ]
        steps += [("> ", "/set max-new-tokens=2\n"), ("> ", "again\n"), ("> ", CTRL_D)]
        terminal = Terminal(steps)
        assert terminal.run(monkeypatch, ["--model", saved, "--max-new-tokens", "4000"]) == 0
        assert "(interrupted: the message is forgotten)" in terminal.shown
        (chat,) = conversations
        assert [message["role"] for message in chat.session.messages] == ["user", "assistant"]
        # The picture was to be answered, too.
        assert [part["type"] for part in chat.session.messages[0]["content"]] == ["image", "text"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_what_is_whole_of_an_interrupted_answer_is_kept(self, saved, monkeypatch, tmp_path):
        conversations = []
        run = Chat.run
        monkeypatch.setattr(Chat, "run", lambda self: conversations.append(self) or run(self))
        steps: list[tuple[str, str | int]] = [
            ("> ", "a red circle\n"),
            (r"out-1\.png: ", signal.SIGINT),
            ("> ", CTRL_D),
        ]
        terminal = Terminal(steps)
        options = ["--protocol", "zebra", "--steps", "2", "--height", "48", "--width", "64", "--temperature", "0"]
        assert terminal.run(monkeypatch, ["--model", saved, "--max-new-tokens", "40", *options]) == 0
        assert "(interrupted)" in terminal.shown
        answer = conversations[0].session.messages[1]["content"]
        assert [part["type"] for part in answer][:2] == ["text", "image"]

    def test_ctrl_c_at_the_prompt_ends_the_chat(self, saved, monkeypatch, capsys):
        terminal = Terminal([("> ", signal.SIGINT)])
        assert terminal.run(monkeypatch, ["--model", saved]) == 130


def test_piped_lines_are_turns_and_the_output_is_clean(talk):
    said, errors = talk(["hello", "", "  ", "/draw a red circle", "/exit", "not said"])
    assert len(said) == 2 and not errors
    assert (
        not [line for line in said if "> " in line or "Type a message" in line]
        and Path(said[1].split(":")[0]).exists()
    )
