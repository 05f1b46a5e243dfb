"""A session in a folder: it goes on as if it had not been saved, and a folder that cannot be restored is refused by name."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffusers_bagel import PROTOCOLS, BagelPipeline, BagelSession, InterleaveProtocol
from tests.conftest import golden_image, load_processor, max_error, phone_photo
from tests.diffusers_bagel.conftest import seeded


DRAW = {"num_inference_steps": 2, "height": 48, "width": 64}
# What is written, and what is chosen between, in answers with a picture each.
SCRIPTS = {
    "plain": "<|vision_start|>done<|im_end|><|endoftext|>",
    "thinkmorph": "<think>a</think><image_start><|im_end|><answer>b</answer><|im_end|>",
    "zebra": "a circle<|im_end|>Final Answer: b<|im_end|>",
    "sot": "<think>a</think><|im_end|><assembly>b</assembly><|im_end|>",
    "canvas": " a <|im_end|><|vision_start|>b<|im_end|><|endoftext|>",
    "twiff": "a<|im_end|><ans>b</ans><|im_end|>",
    "cooper": "<segmentation>a</segmentation><|im_end|><answer>b</answer><|im_end|>",
}


def says(pipe, script: str):
    """A processor of scores by which the model says what stands in a script."""
    tokens = pipe.processor.tokenizer(script)["input_ids"]

    def force(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, tokens.pop(0)] = 0.0
        return forced

    return [force]


def parts(message: dict) -> list:
    """Texts, and pictures as numbers."""
    return [
        part["text"] if part["type"] == "text" else np.asarray(part["image"].convert("RGB")).tolist()
        for part in message["content"]
    ]


def said(session: BagelSession) -> list:
    return [(message["role"], parts(message)) for message in session.messages]


def assert_same_contexts(session: BagelSession, other: BagelSession) -> None:
    for name, context in session.contexts.items():
        again = other.contexts[name]
        assert (again.length, again.next_position) == (context.length, context.next_position)
        for segment, twin in zip(context.segments, again.segments, strict=True):
            assert segment.token_ids.tolist() == twin.token_ids.tolist()
            for ours, theirs in ((segment.pixels, twin.pixels), (segment.latents, twin.latents)):
                assert (ours is None) == (theirs is None)
                assert ours is None or torch.equal(ours, theirs)


def assert_goes_on_alike(*sessions: BagelSession) -> None:
    """The same texts, and pictures of latents that differ by the rounding of what was read in other pieces."""
    drawn = []

    def decode(latents: torch.Tensor, *args):
        drawn.append(latents)
        return BagelPipeline.decode_latents(session.pipe, latents, *args)

    texts = []
    for session in sessions:
        session.pipe = copy.copy(session.pipe)
        session.pipe.decode_latents = decode
        texts.append(session.send("what is it?", output="text", max_new_tokens=6, do_sample=False).text)
        session.send("now in blue", output="image", think=False, generator=seeded(5), **DRAW)
    assert texts[0] == texts[1]
    assert max_error(*drawn) <= 1e-5 * drawn[0].abs().max()


@pytest.fixture(scope="module")
def answered(pipe) -> BagelSession:
    """Of two turns, with a picture that was given and one that was drawn."""
    session = BagelSession(pipe)
    session.send([golden_image("wide"), "what is it?"], output="text", max_new_tokens=3)
    session.send("make it red", output="image", generator=seeded(0), **DRAW)
    return session


@pytest.fixture
def folder(answered, tmp_path) -> Path:
    answered.save_pretrained(tmp_path / "session")
    return tmp_path / "session"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_restored_session_goes_on_as_the_one_that_was_saved(name, pipe, tmp_path):
    session = BagelSession(pipe, name)
    given = [] if name == "sot" else [golden_image("tall")]
    settings = {"max_new_tokens": 60, "max_images": 1, "do_sample": False, "generator": seeded(1)} | DRAW
    if name == "twiff":
        # A size that the VAE's resizing changes.
        settings |= {"height": 48, "width": 96}
    scripts = (SCRIPTS[name], SCRIPTS[name])
    for script, text in zip(scripts, ("a red circle", "and another one"), strict=True):
        session.send([*given, text], logits_processor=says(pipe, script), **settings)
    assert len(session.messages) == 4
    session.save_pretrained(tmp_path)
    restored = BagelSession.from_pretrained(tmp_path, pipe)
    assert restored.protocol == session.protocol
    assert said(restored) == said(session)
    assert_same_contexts(session, restored)
    assert_goes_on_alike(session, restored)


def test_going_back_works_behind_a_restoration(answered, folder, pipe):
    session, restored = answered.fork(), BagelSession.from_pretrained(folder, pipe)
    for each in (session, restored):
        each.back()
    assert said(restored) == said(session) and len(session.messages) == 2
    assert_same_contexts(session, restored)
    assert_goes_on_alike(session, restored)
    restored.back(3)
    assert restored.messages == []
    with pytest.raises(ValueError, match="`turns`"):
        restored.back()


def test_nothing_was_said_yet(pipe, tmp_path):
    BagelSession(pipe, "twiff").save_pretrained(tmp_path)
    restored = BagelSession.from_pretrained(tmp_path, pipe)
    assert restored.messages == [] and restored.protocol == PROTOCOLS["twiff"]
    assert restored.send("a", output="text", max_new_tokens=2).content


def given_pictures(folder: Path) -> dict:
    wide = golden_image("wide").convert("RGB")
    alpha = Image.linear_gradient("L").resize(wide.size)
    gray16 = Image.fromarray(np.arange(wide.width * wide.height, dtype=np.uint16).reshape(wide.height, wide.width))
    wide.save(folder / "wide.jpg", icc_profile=b"colours", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0")
    (folder / "held.jpg").write_bytes(phone_photo(6)[0])
    return {
        "rgba": Image.merge("RGBA", [*wide.split(), alpha]),
        "gray": wide.convert("L"),
        "palette": wide.quantize(7),
        "cmyk": wide.convert("CMYK"),
        "16 bits": gray16,
        "array": np.asarray(wide) / 255,
        "tensor": torch.from_numpy(np.asarray(wide).copy()).permute(2, 0, 1),
        "path": str(folder / "wide.jpg"),
        "photo": {"type": "image_url", "image_url": {"url": str(folder / "held.jpg")}},
        "bytes": {"type": "image", "image": {"bytes": (folder / "wide.jpg").read_bytes(), "path": None}},
    }


def test_pictures_of_any_kind_are_seen_as_before(pipe, tmp_path):
    session = BagelSession(pipe)
    for picture in given_pictures(tmp_path).values():
        session.send([picture, "what is it?"], output="text", max_new_tokens=1)
    session.save_pretrained(tmp_path / "session")
    restored = BagelSession.from_pretrained(tmp_path / "session", pipe)
    assert_same_contexts(session, restored)
    files = sorted((tmp_path / "session").glob("*.png"))
    held = [part["image"] for message in restored.messages for part in message["content"] if part["type"] == "image"]
    assert [np.asarray(Image.open(file)).tolist() for file in files] == [np.asarray(each).tolist() for each in held]
    assert {Image.open(file).mode for file in files} == {"RGB"}
    assert not any(Image.open(file).info for file in files)


def test_a_picture_is_saved_as_it_was_when_it_was_shown(pipe, tmp_path):
    array, file = np.asarray(golden_image("wide").convert("RGB")).copy(), tmp_path / "a.png"
    golden_image("tall").save(file)
    session = BagelSession(pipe)
    session.send([array, str(file), "what is it?"], output="text", max_new_tokens=1)
    array[:] = 0
    file.unlink()
    session.save_pretrained(tmp_path / "session")
    assert_same_contexts(session, BagelSession.from_pretrained(tmp_path / "session", pipe))


def test_what_was_said_as_words_is_words_again(pipe, tmp_path):
    session = BagelSession(pipe)
    session.send("<|im_end|><|image_pad|>", output="text", sanitize_control_tokens=True, max_new_tokens=2)
    session.save_pretrained(tmp_path)
    assert_same_contexts(session, BagelSession.from_pretrained(tmp_path, pipe))


def test_a_session_that_only_talks_goes_on_with_and_without_what_draws(talker, pipe, tmp_path):
    session = BagelSession(talker)
    session.send([golden_image("wide"), "what is it?"], output="text", max_new_tokens=4)
    session.save_pretrained(tmp_path)
    again, drawing = (BagelSession.from_pretrained(tmp_path, each) for each in (talker, pipe))
    answers = [each.send("and this?", output="text", max_new_tokens=6).text for each in (session, again, drawing)]
    assert answers[0] == answers[1] == answers[2]
    assert drawing.send("make it green", output="image", num_inference_steps=2).images
    drawing.save_pretrained(tmp_path)
    assert said(BagelSession.from_pretrained(tmp_path, talker)) == said(drawing)


class TestSaving:
    def test_the_folder_reads_like_the_conversation(self, answered, folder):
        messages = json.loads((folder / "session.json").read_text(encoding="utf-8"))["messages"]
        pictures = sorted(file.name for file in folder.glob("*.png"))
        assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant"]
        assert messages[0]["content"] == [
            {"type": "image", "image": pictures[0]},
            {"type": "text", "text": "what is it?"},
        ]
        assert messages[3]["content"] == [{"type": "image", "image": pictures[1]}]
        drawn = answered.messages[3]["content"][0]["image"]
        assert np.array_equal(np.asarray(Image.open(folder / pictures[1])), np.asarray(drawn))
        assert len(list(folder.iterdir())) == 5

    def test_saving_again_writes_what_is_new_and_takes_away_what_is_gone(self, answered, folder, pipe):
        session = answered.fork()
        kept = {file.name: file.stat().st_mtime_ns for file in folder.glob("picture-0001*")}
        (folder / "mine.txt").write_text("kept", encoding="utf-8")
        session.back()
        session.send("make it green", output="image", generator=seeded(9), **DRAW)
        session.save_pretrained(folder)
        assert said(BagelSession.from_pretrained(folder, pipe)) == said(session)
        assert {file.name: file.stat().st_mtime_ns for file in folder.glob("picture-0001*")} == kept
        assert len(list(folder.iterdir())) == 6

    def test_a_file_that_was_broken_is_written_again(self, answered, folder, pipe):
        for file in folder.iterdir():
            file.write_bytes(file.read_bytes()[:50])
        answered.save_pretrained(folder)
        assert said(BagelSession.from_pretrained(folder, pipe)) == said(answered)

    @pytest.mark.parametrize("fails_at", range(3))
    def test_a_save_that_fails_leaves_what_was_there(self, fails_at, answered, folder, pipe, monkeypatch):
        session = answered.fork()
        session.send("make it green", output="image", generator=seeded(9), **DRAW)
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        replace, calls = os.replace, []

        def full(source, target):
            calls.append(target)
            if len(calls) > fails_at:
                raise OSError("the disk is full")
            replace(source, target)

        monkeypatch.setattr(os, "replace", full)
        for place in (folder, folder.parent / "new"):
            calls.clear()
            with pytest.raises(OSError, match="the disk is full"):
                session.save_pretrained(place)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
        assert not (folder.parent / "new").exists()
        assert said(BagelSession.from_pretrained(folder, pipe)) == said(answered)

    def test_a_file_is_no_folder(self, answered, tmp_path):
        (tmp_path / "file").write_text("", encoding="utf-8")
        with pytest.raises(OSError, match="`folder`.*file"):
            answered.save_pretrained(tmp_path / "file")

    def test_what_is_whole_of_an_answer_is_saved(self, pipe, tmp_path):
        session = BagelSession(pipe, "zebra")
        settings = {"output": "interleaved", "max_new_tokens": 60, "generator": seeded(2)} | DRAW
        kinds = []
        for event in session.stream("a red circle", logits_processor=says(pipe, SCRIPTS["zebra"]), **settings):
            if event.type in ("text", "image") and event.type not in kinds:
                kinds.append(event.type)
                session.save_pretrained(tmp_path / event.type)
        saved = {kind: BagelSession.from_pretrained(tmp_path / kind, pipe) for kind in kinds}
        assert [len(message["content"]) for message in saved["text"].messages] == [1]
        assert [len(message["content"]) for message in saved["image"].messages] == [1, 2]
        for restored in saved.values():
            assert restored.send("go on", output="text", max_new_tokens=2).content

    def test_forks_are_saved_on_their_own(self, answered, tmp_path, pipe):
        fork = answered.fork()
        fork.send("and now?", output="text", max_new_tokens=3)
        for name, session in (("one", answered), ("two", fork)):
            session.save_pretrained(tmp_path / name)
        sessions = [BagelSession.from_pretrained(tmp_path / name, pipe) for name in ("one", "two")]
        assert [len(session.messages) for session in sessions] == [4, 6]


class TestProtocols:
    def test_one_of_ones_own_is_in_the_file(self, pipe, tmp_path):
        mine = InterleaveProtocol(
            "mine",
            trigger=(r"<draw>", r"<paint>"),
            drawn=PROTOCOLS["twiff"].drawn,
            default_size=(48, 64),
            settings={"cfg_interval": (0.0, 0.5)},
        )
        BagelSession(pipe, mine).save_pretrained(tmp_path)
        restored = BagelSession.from_pretrained(tmp_path, pipe).protocol
        assert restored == mine.with_changes(settings={"cfg_interval": [0.0, 0.5]})

    def test_a_published_one_with_changes_keeps_its_functions(self, pipe, tmp_path):
        BagelSession(pipe, PROTOCOLS["cooper"].with_changes(max_texts=2)).save_pretrained(tmp_path)
        assert BagelSession.from_pretrained(tmp_path, pipe).protocol == PROTOCOLS["cooper"].with_changes(max_texts=2)

    @pytest.mark.parametrize("name", ["mine", "zebra"])
    def test_one_with_functions_of_ones_own_must_be_passed(self, name, pipe, tmp_path):
        mine = PROTOCOLS["zebra"].with_changes(name=name, clean=lambda text: text.lower())
        BagelSession(pipe, mine).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=rf"`protocol`.*'{name}'.*Pass it.*protocol=\.\.\."):
            BagelSession.from_pretrained(tmp_path, pipe)
        assert BagelSession.from_pretrained(tmp_path, pipe, protocol=mine).protocol is mine
        assert BagelSession.from_pretrained(tmp_path, pipe, protocol="twiff").protocol.name == "twiff"


def edited(**changes):
    """Changes of the session's file by key; a function gets the value."""

    def edit(folder: Path) -> Path:
        file = folder / "session.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        for key, change in changes.items():
            content[key] = change(content[key]) if callable(change) else change
        file.write_text(json.dumps(content), encoding="utf-8")
        return file

    return edit


def without(key: str):
    def edit(folder: Path) -> Path:
        file = folder / "session.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        del content[key]
        file.write_text(json.dumps(content), encoding="utf-8")
        return file

    return edit


def rewritten(pattern: str, change):
    """Another content of the second file of a kind."""

    def edit(folder: Path) -> Path:
        file = sorted(folder.glob(pattern))[-1]
        change(file)
        return file

    return edit


def record(**changes):
    """Changes of what the file says of the first image."""

    def edit(turns: list) -> list:
        turns[0][0] |= changes
        return turns

    return edited(turns=edit)


BROKEN = {
    "no session": (rewritten("session.json", Path.unlink), "is missing. Name a folder"),
    "cut JSON": (rewritten("session.json", lambda file: os.truncate(file, 100)), "cannot be read as JSON"),
    "another JSON": (rewritten("session.json", lambda file: file.write_text("[]")), "JSON object.*copy"),
    "another version": (edited(version=2), "`version`.*2.*reads 1"),
    "no version": (without("version"), "`version`"),
    "no turns": (without("turns"), "'turns' is missing.*copy"),
    "no messages": (without("messages"), "'messages' is missing.*copy"),
    "no protocol": (without("protocol"), "'protocol' is missing.*copy"),
    "an unknown role": (edited(messages=lambda old: [old[0] | {"role": "cat"}, *old[1:]]), "role.*copy"),
    "fewer messages": (edited(messages=lambda old: old[:1]), "describes no session.*copy"),
    "fewer turns": (edited(turns=lambda old: old[:1]), "describes no session.*copy"),
    "an unknown update": (record(update={"no_text": "paint", "no_image": "keep"}), "describes no session.*copy"),
    "an unknown encoder": (record(encoders=["ear"]), "describes no session.*copy"),
    "a number for a text": (edited(turns=lambda old: [[old[0][0], old[0][1] | {"text": 3}], *old[1:]]), "no session"),
    "a file elsewhere": (record(latents="../latents-0001-0123456789abcdef.safetensors"), "no file of a session.*copy"),
    "no picture": (rewritten("*.png", Path.unlink), "is missing, and the session needs it.*copy"),
    "cut picture": (rewritten("*.png", lambda file: os.truncate(file, 100)), "is broken.*copy"),
    "another picture": (rewritten("*.png", lambda file: golden_image("tall").save(file)), "changed.*copy"),
    "no latents": (rewritten("*.safetensors", Path.unlink), "is missing, and the session needs it.*copy"),
    "cut latents": (rewritten("*.safetensors", lambda file: os.truncate(file, 100)), "is broken.*copy"),
    "latents of another shape": (
        rewritten("*.safetensors", lambda file: save_file({"latents": torch.zeros(3, 16)}, file)),
        r"of shape \(3, 16\).*another model's, or.*broken",
    ),
    "other latents": (
        rewritten("*.safetensors", lambda file: save_file({"latents": torch.zeros(20, 16)}, file)),
        "changed.*copy",
    ),
    "nameless latents": (
        rewritten("*.safetensors", lambda file: save_file({"a": torch.zeros(20, 16)}, file)),
        "is broken.*copy",
    ),
}


class TestBrokenFolders:
    @pytest.fixture(autouse=True)
    def nothing_is_computed(self, answered, monkeypatch):
        transformer, vae = answered.pipe.transformer, answered.pipe.vae
        monkeypatch.setattr(transformer, "forward", lambda *args, **kwargs: pytest.fail("computed"))
        monkeypatch.setattr(vae, "encode", lambda *args, **kwargs: pytest.fail("computed"))

    @pytest.mark.parametrize("kind", BROKEN)
    def test_it_is_refused_by_the_name_of_the_file(self, kind, folder, pipe):
        edit, message = BROKEN[kind]
        file = edit(folder)
        with pytest.raises((OSError, ValueError), match=message) as refused:
            BagelSession.from_pretrained(folder, pipe)
        assert str(file) in str(refused.value)

    def test_it_is_not_there(self, pipe, tmp_path):
        with pytest.raises(OSError, match="`folder`.*nowhere"):
            BagelSession.from_pretrained(tmp_path / "nowhere", pipe)

    def test_it_is_another_models(self, folder, pipe):
        other = copy.copy(pipe)
        other.latent_dim = 64
        with pytest.raises(ValueError, match=r"latents-0001.*\(\d+, 16\).*\(\d+, 64\).*another model's"):
            BagelSession.from_pretrained(folder, other)

    @pytest.mark.parametrize(
        "sizes",
        [{"vae_size": {"shortest_edge": 64, "longest_edge": 64}}, {"size": {"shortest_edge": 14, "longest_edge": 14}}],
    )
    def test_its_images_were_of_other_sizes(self, sizes, folder, pipe):
        other = copy.copy(pipe)
        other.processor = load_processor(**sizes)
        with pytest.raises(ValueError, match="picture-0001.*Load the pipeline with the sizes of images"):
            BagelSession.from_pretrained(folder, other)

    def test_a_pipe_is_not_waited_for(self, folder, pipe):
        os.mkfifo(folder / "picture-0003-0123456789abcdef.png")
        with pytest.raises(OSError, match="is a pipe"):
            BagelSession.from_pretrained(folder, pipe)

    def test_a_copy_elsewhere_is_as_good(self, folder, pipe, tmp_path, answered):
        shutil.copytree(folder, tmp_path / "copy")
        shutil.rmtree(folder)
        assert said(BagelSession.from_pretrained(str(tmp_path / "copy"), pipe)) == said(answered)
