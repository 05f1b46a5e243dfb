"""`bagel_training/data.py`, through the scripts: every source and task, packing, and bad samples."""

from __future__ import annotations

import io
import re
import shutil

import datasets
import pytest
import torch
import train_lora
from bagel_training.data import load_samples
from PIL import Image

from tests.examples.conftest import (
    SHAPES,
    arguments,
    assert_same,
    card_text,
    image,
    last_metrics,
    picture,
    save_pictures,
    saved_weights,
    talk,
    text,
    write_lines,
)
from transformers_bagel import BagelConfig


CAPTIONS = [f"a {shape}" for shape in SHAPES]
SETTINGS = {"rank": 2, "max_train_steps": 1}


@pytest.fixture
def folder(tmp_path):
    """A new one with the eight pictures."""
    save_pictures(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def files():
    return [f"{shape.replace(' ', '_')}.png" for shape in SHAPES]


@pytest.fixture
def first_sample(checkpoint):
    """Of the data that the arguments name, its images opened."""

    def load(**settings):
        base = {"pretrained_model_name_or_path": checkpoint, "output_dir": "unused"}
        sample = load_samples(train_lora.parse_args(arguments(**(base | settings))))[0]
        images = [opened(item) for item in sample.get("images", [])]
        turns = []
        for message in sample["messages"]:
            content = [text(message["content"])] if isinstance(message["content"], str) else message["content"]
            parts = [part["text"] if part["type"] == "text" else opened(part) for part in content]
            turns.append((message["role"], [images.pop(0) if part is None else part for part in parts]))
        return turns

    return load


def opened(part):
    """The pixels of an image or of an image part; `None` for a part without one."""
    source = part
    if isinstance(part, dict) and "type" in part:
        source = part.get("image") or part.get("path")
    if isinstance(source, dict):
        source = io.BytesIO(source["bytes"]) if source.get("bytes") else source["path"]
    return None if source is None else Image.open(source).convert("RGB").tobytes()


def pixels(shape):
    return picture(shape).tobytes()


def image_bytes(shape):
    stream = io.BytesIO()
    picture(shape).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


def assert_trained(output_dir, task, samples=8):
    """The task's loss, and no other, was learned from."""
    assert f"on {samples} samples ({task})" in card_text(output_dir)
    metrics = last_metrics(output_dir)
    assert metrics["loss"] == pytest.approx(metrics["ce_loss"] + metrics["mse_loss"], rel=1e-4)
    assert (metrics["ce_loss"] > 0) == (task == "understanding")
    assert (metrics["mse_loss"] > 0) == (task in ("text-to-image", "editing"))


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_folder_with_metadata(train, first_sample, folder, files, tmp_path, kind):
    rows = [{"file_name": name, "text": caption} for name, caption in zip(files, CAPTIONS, strict=True)]
    if kind == "jsonl":
        write_lines(folder / "metadata.jsonl", rows)
    else:
        lines = ["file_name,text", *(f"{row['file_name']},{row['text']}" for row in rows)]
        (folder / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")
    source = {"instance_data_dir": folder}
    assert first_sample(**source) == [("user", [CAPTIONS[0]]), ("assistant", [pixels(SHAPES[0])])]
    train(train_lora, tmp_path / "out", **source, **SETTINGS, instance_prompt=None)
    assert_trained(tmp_path / "out", "text-to-image")


def test_folder_with_a_prompt(train, first_sample, folder, tmp_path):
    (folder / "notes.txt").write_text("no image", encoding="utf-8")
    source = {"instance_data_dir": folder, "instance_prompt": "a shape"}
    assert first_sample(**source) == [("user", ["a shape"]), ("assistant", [pixels("black circle")])]
    train(train_lora, tmp_path / "out", **source, **SETTINGS)
    assert_trained(tmp_path / "out", "text-to-image")


def test_prompt_stands_in_for_a_missing_caption(first_sample, folder, files):
    write_lines(
        folder / "metadata.jsonl", [{"file_name": files[0], "text": None}, {"file_name": files[1], "text": "b"}]
    )
    turns = first_sample(instance_data_dir=folder, instance_prompt="a shape")
    assert turns[0] == ("user", ["a shape"])


def test_parquet_of_edits(train, first_sample, tmp_path):
    columns = {
        "before": [image_bytes(shape) for shape in SHAPES],
        "instruction": [f"make it {caption}" for caption in CAPTIONS],
        "after": [image_bytes(shape) for shape in SHAPES[::-1]],
    }
    features = {"before": datasets.Image(), "instruction": datasets.Value("string"), "after": datasets.Image()}
    path = tmp_path / "edits.parquet"
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path)
    source = {
        "train_data_file": [path],
        "cond_image_column": "before",
        "caption_column": "instruction",
        "image_column": "after",
    }
    assert first_sample(**source) == [
        ("user", [pixels(SHAPES[0]), f"make it {CAPTIONS[0]}"]),
        ("assistant", [pixels(SHAPES[-1])]),
    ]
    train(train_lora, tmp_path / "out", **source, **SETTINGS)
    assert_trained(tmp_path / "out", "editing")


@pytest.mark.parametrize("has_images", [True, False])
def test_jsonl_of_questions(train, first_sample, folder, files, tmp_path, has_images):
    rows = [
        {"question": "what is this?", "answer": caption} | ({"image": name} if has_images else {})
        for name, caption in zip(files, CAPTIONS, strict=True)
    ]
    source = {"train_data_file": [write_lines(folder / "questions.jsonl", rows)], "question_column": "question"}
    seen = [pixels(SHAPES[0])] if has_images else []
    assert first_sample(**source) == [("user", [*seen, "what is this?"]), ("assistant", [CAPTIONS[0]])]
    train(train_lora, tmp_path / "out", **source, **SETTINGS)
    assert_trained(tmp_path / "out", "understanding")


@pytest.mark.parametrize("key", ["image", "path"])
def test_jsonl_of_messages_with_relative_paths(train, first_sample, folder, files, tmp_path, key):
    rows = [
        talk([image(files[index], key), text("turn it")], [text("here"), image(files[index - 1], key)])
        for index in range(8)
    ]
    source = {"train_data_file": [write_lines(folder / "talks.jsonl", rows)]}
    assert first_sample(**source) == [
        ("user", [pixels(SHAPES[0]), "turn it"]),
        ("assistant", ["here", pixels(SHAPES[-1])]),
    ]
    train(train_lora, tmp_path / "out", **source, **SETTINGS)
    metrics = last_metrics(tmp_path / "out")
    assert metrics["ce_loss"] > 0 and metrics["mse_loss"] > 0


def test_jsonl_of_messages_with_relative_images_column(first_sample, folder, files):
    row = talk([{"type": "image"}, text("what?")], [text("a circle")], images=[files[0]])
    assert first_sample(train_data_file=[write_lines(folder / "talks.jsonl", [row])]) == [
        ("user", [pixels(SHAPES[0]), "what?"]),
        ("assistant", ["a circle"]),
    ]


def test_messages_may_be_plain_texts(train, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}] * 2
    train(train_lora, tmp_path / "out", train_data_file=[write_lines(tmp_path / "talks.jsonl", rows)], **SETTINGS)
    assert last_metrics(tmp_path / "out")["ce_loss"] > 0


def test_dataset_folder_with_its_own_images_column(train, first_sample, tmp_path):
    question = [{"role": "user", "content": [{"type": "image"}, text("turn it")]}]
    messages = [*question, {"role": "assistant", "content": [{"type": "image"}]}]
    features = datasets.Features(
        {
            "messages": datasets.List(
                {
                    "role": datasets.Value("string"),
                    "content": datasets.List({"type": datasets.Value("string"), "text": datasets.Value("string")}),
                }
            ),
            "images": datasets.List(datasets.Image()),
        }
    )
    for part in (part for message in messages for part in message["content"]):
        part.setdefault("text", None)
    columns = {
        "messages": [messages] * 8,
        "images": [[image_bytes(shape), image_bytes(SHAPES[index - 1])] for index, shape in enumerate(SHAPES)],
    }
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    source = {"dataset_name": tmp_path / "data"}
    assert first_sample(**source) == [
        ("user", [pixels(SHAPES[0]), "turn it"]),
        ("assistant", [pixels(SHAPES[-1])]),
    ]
    train(train_lora, tmp_path / "out", **source, **SETTINGS)
    assert "on 8 samples (messages)" in card_text(tmp_path / "out")
    assert last_metrics(tmp_path / "out")["mse_loss"] > 0


def test_dataset_folder_of_images(train, first_sample, folder, files, tmp_path):
    """As `datasets` reads it, with an image column of its own."""
    rows = [{"file_name": name, "text": caption} for name, caption in zip(files, CAPTIONS, strict=True)]
    write_lines(folder / "metadata.jsonl", rows)
    turns = first_sample(dataset_name=folder)
    assert [role for role, _ in turns] == ["user", "assistant"]
    assert turns[1][1] == [pixels(turns[0][1][0].removeprefix("a "))]
    train(train_lora, tmp_path / "out", dataset_name=folder, **SETTINGS)
    assert_trained(tmp_path / "out", "text-to-image")


def test_messages_mix_texts_and_parts(first_sample, folder, files):
    rows = [
        {"messages": [{"role": "user", "content": "draw"}, {"role": "assistant", "content": [image(files[0])]}]},
        talk([text("draw")], [image(files[1])]),
    ]
    source = {"train_data_file": [write_lines(folder / "talks.jsonl", rows)]}
    assert first_sample(**source) == [("user", ["draw"]), ("assistant", [pixels(SHAPES[0])])]


def samples_read(output_dir):
    """How many samples the first step took, by its checkpoint."""
    return torch.load(output_dir / "checkpoint-1" / "rank_0.pt")["loader"]["offset"]


def test_packing_keeps_the_budget(train, tmp_path):
    """All samples here have the same length, which the complaint about a budget tells."""
    packed = {"rank": 2, "max_train_steps": 1, "checkpointing_steps": 1, "train_batch_size": None, "text_dropout": 0}
    with pytest.raises(ValueError, match="more than `max_tokens`") as refused:
        train(train_lora, tmp_path / "refused", **packed, max_tokens=1)
    length = int(re.search(r"It takes (\d+) tokens", str(refused.value))[1])
    for budget, samples in ((length, 1), (3 * length - 1, 2), (3 * length, 3)):
        train(train_lora, tmp_path / str(budget), **packed, max_tokens=budget)
        assert samples_read(tmp_path / str(budget)) == samples
    # Packed or not, it is the same batch.
    train(train_lora, tmp_path / "batch", **packed | {"train_batch_size": 3})
    assert_same(saved_weights(tmp_path / "batch"), saved_weights(tmp_path / str(3 * length)))


def test_packing_with_accumulation_counts_micro_batches(train, tmp_path):
    settings = {"rank": 2, "max_train_steps": 1, "checkpointing_steps": 1, "gradient_accumulation_steps": 3}
    train(train_lora, tmp_path, **settings, max_tokens=500, train_batch_size=1)
    assert samples_read(tmp_path) == 3


def damaged(folder):
    (folder / "damaged.png").write_bytes((folder / "red_circle.png").read_bytes()[:60])
    return "damaged.png"


BAD = {
    "no target": (talk([text("draw")], []) | {"messages": [{"role": "user", "content": [text("draw")]}]}, "no target"),
    "image missing": (talk([text("draw")], [image("none.png")]), "none.png"),
    "image left out": (talk([text("draw")], [{"type": "image"}]), "without its image"),
    "image damaged": (talk([text("draw")], [image("damaged.png")]), "image"),
    "unknown role": ({"messages": [{"role": "wizard", "content": [text("draw")]}]}, "unknown role 'wizard'"),
    "no content": ({"messages": [{"role": "user"}]}, "without content"),
    "no messages": ({"messages": []}, "empty"),
    "null": ({"messages": None}, "must have either"),
    "unknown part": (talk([{"type": "video", "text": "draw"}], [text("no")]), "neither"),
    "over the budget": (talk([text("draw " * 300)], [text("no")]), "more than `max_tokens`"),
}


@pytest.fixture(params=BAD, ids=lambda name: name.replace(" ", "-"))
def bad_row(request, folder, files):
    """Data with a bad fourth row, and what there is to say about it."""
    row, message = BAD[request.param]
    damaged(folder)
    rows = [talk([text("draw")], [image(name)], id=name) for name in files]
    rows[3] = row | {"id": "bad"}
    return write_lines(folder / "talks.jsonl", rows), message


def test_bad_row_stops_the_training_with_its_name(train, bad_row, tmp_path):
    source, message = bad_row
    with pytest.raises((ValueError, TypeError, OSError), match=r"Sample 3 \(id 'bad'\): ") as stopped:
        train(train_lora, tmp_path / "out", train_data_file=[source], rank=2, max_tokens=200, max_train_steps=8)
    assert message in str(stopped.value)


def test_bad_row_is_left_out_with_its_name(train, bad_row, tmp_path, caplog):
    source, message = bad_row
    settings = {"rank": 2, "max_tokens": 200, "max_train_steps": 5, "checkpointing_steps": 5}
    train(train_lora, tmp_path, **settings, train_data_file=[source], on_error="skip")
    warnings = [record.getMessage() for record in caplog.records if "Left out" in record.getMessage()]
    assert len(warnings) == 1
    assert warnings[0].startswith("Left out sample 3 (id 'bad'): ")
    assert message in warnings[0]
    assert last_metrics(tmp_path)["step"] == 5


@pytest.mark.parametrize("described", [True, False], ids=["metadata", "prompt"])
def test_corrupt_file_in_the_middle_of_a_folder(train, folder, files, tmp_path, caplog, described):
    name = files[3]
    (folder / name).write_bytes(b"no picture")
    source = {"instance_data_dir": folder}
    if described:
        rows = [{"file_name": name, "text": caption} for name, caption in zip(files, CAPTIONS, strict=True)]
        write_lines(folder / "metadata.jsonl", rows)
    with pytest.raises((OSError, ValueError), match=name):
        train(train_lora, tmp_path / "raise", **source, rank=2, train_batch_size=8)
    train(train_lora, tmp_path / "skip", **source, rank=2, train_batch_size=8, on_error="skip")
    assert [name in record.getMessage() for record in caplog.records if "Left out" in record.getMessage()] == [True]


def test_corrupt_bytes_in_the_middle_of_a_table(train, tmp_path, caplog):
    columns = {"image": [image_bytes(shape) for shape in SHAPES], "text": CAPTIONS}
    columns["image"][3]["bytes"] = b"no picture"
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    path = tmp_path / "images.parquet"
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    with pytest.raises((OSError, ValueError), match="Sample 3"):
        train(train_lora, tmp_path / "raise", train_data_file=[path], rank=2, train_batch_size=8)
    train(train_lora, tmp_path / "skip", train_data_file=[path], rank=2, train_batch_size=8, on_error="skip")
    assert "Left out sample 3" in caplog.text


def test_nothing_but_bad_samples_ends(train, folder, files, tmp_path):
    for name in files:
        (folder / name).write_bytes(b"no picture")
    with pytest.raises(ValueError, match="no sample that can be used"):
        train(train_lora, tmp_path / "out", instance_data_dir=folder, on_error="skip")


def test_skipping_resumes_bit_for_bit(train, folder, files, tmp_path):
    (folder / files[3]).write_bytes(b"no picture")
    settings = {"instance_data_dir": folder, "rank": 2, "on_error": "skip", "max_train_steps": 8}
    train(train_lora, tmp_path / "whole", **settings, checkpointing_steps=2)
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    train(train_lora, tmp_path / "resumed", **settings, resume_from_checkpoint="latest")
    assert_same(saved_weights(tmp_path / "resumed"), saved_weights(tmp_path / "whole"))


@pytest.mark.parametrize(
    "settings, missing, task",
    [
        ({}, "'image'", "text-to-image"),
        ({"image_column": "picture"}, "'text'", "text-to-image"),
        ({"cond_image_column": "before"}, "'before', 'text', 'image'", "editing"),
        ({"question_column": "question"}, "'question', 'answer'", "understanding"),
    ],
)
def test_missing_columns_are_named(train, tmp_path, settings, missing, task):
    source = write_lines(tmp_path / "rows.jsonl", [{"picture": "a.png", "caption": "a"}])
    with pytest.raises(ValueError, match=f"task is {task}, but the data has no column .*{missing}.* It has 'picture'"):
        train(train_lora, tmp_path / "out", train_data_file=[source], **settings)
    # It is told before anything is loaded.
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, value",
    [("question_column", "question"), ("cond_image_column", "before"), ("instance_prompt", "a shape")],
)
def test_what_conversations_do_not_need_is_refused(train, tmp_path, name, value):
    rows = [talk([text("draw")], [text("no")], question="what?", answer="it", before="a.png")]
    settings = {"train_data_file": [write_lines(tmp_path / "rows.jsonl", rows)], name: value}
    with pytest.raises(ValueError, match=f"--{name} has no effect on conversations, .* column 'messages'"):
        train(train_lora, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_conversations_are_left_out_by_another_name_of_their_column(train, tmp_path):
    rows = [talk([text("draw")], [text("no")], question="what?", answer="it")]
    settings = {"train_data_file": [write_lines(tmp_path / "rows.jsonl", rows)], "question_column": "question"}
    train(train_lora, tmp_path / "out", **settings, **SETTINGS, messages_column="none")
    assert_trained(tmp_path / "out", "understanding", samples=1)


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"instance_data_dir": "none"}, FileNotFoundError, "no folder 'none'"),
        ({"instance_data_dir": "."}, ValueError, "holds no image"),
        ({"train_data_file": ["a.jsonl", "b.jsonl"]}, FileNotFoundError, "no file a.jsonl, b.jsonl"),
        ({"train_data_file": ["a.jsonl", "b.parquet"]}, ValueError, "files of one kind"),
        ({"train_data_file": ["a.txt"]}, ValueError, "files of one kind"),
    ],
)
def test_missing_data_is_named(train, tmp_path, monkeypatch, settings, error, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        train(train_lora, tmp_path / "out", **settings)


GOOD = b'{"image": "a.png", "text": "a"}\n'


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("rows.jsonl", b"", "rows.jsonl' is empty"),
        ("rows.jsonl", b"\n\n", "rows.jsonl"),
        ("rows.jsonl", GOOD * 2 + b'{"image": "a.png", "te\n' + GOOD, "line 3 of .*rows.jsonl' is no JSON"),
        ("rows.jsonl", GOOD + b"\xff\xfe\n", "line 2 of .*rows.jsonl' is no JSON"),
        ("rows.jsonl", b"no\n", "line 1 of .*rows.jsonl' is no JSON"),
        ("rows.json", b"[{", "rows.json"),
        ("rows.parquet", b"", "rows.parquet' is empty"),
        ("rows.parquet", b"PAR1 no parquet PAR1", "rows.parquet"),
    ],
)
def test_a_broken_file_of_data_is_named(train, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"--train_data_file.*{message}"):
        train(train_lora, tmp_path / "out", train_data_file=[tmp_path / name])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("metadata.jsonl", b"", "metadata.jsonl' is empty"),
        ("metadata.jsonl", b'{"file_name": "red_circle.png"}\n{"file_name"\n', "line 2 of .*metadata.jsonl"),
        ("metadata.csv", b'file_name,text\na.png,"a\n', "metadata.csv"),
        ("metadata.csv", b"file_name,text\n", "metadata.csv.*no data"),
        ("metadata.parquet", b"no parquet", "metadata.parquet"),
    ],
)
def test_a_broken_description_of_a_folder_is_named(train, folder, tmp_path, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        train(train_lora, tmp_path / "out", instance_data_dir=folder, instance_prompt=None)


def test_an_empty_dataset_folder_is_named(train, tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises((ValueError, OSError), match="--dataset_name '.*data'"):
        train(train_lora, tmp_path / "out", dataset_name=tmp_path / "data")
    with pytest.raises(ValueError, match="--instance_data_dir: '.*data' holds no image"):
        train(train_lora, tmp_path / "out", instance_data_dir=tmp_path / "data")


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("max_tokens", [None, 200])
@pytest.mark.parametrize("column", ["image", "text"])
def test_a_row_without_a_cell_is_a_bad_sample(train, folder, files, tmp_path, caplog, column, max_tokens, num_workers):
    rows = [{"id": name, "image": name, "text": "draw"} for name in files]
    del rows[3][column]
    settings = {"train_data_file": [write_lines(folder / "rows.jsonl", rows)], "rank": 2, "max_tokens": max_tokens}
    settings |= {"dataloader_num_workers": num_workers, "train_batch_size": 8, "max_train_steps": 2}
    message = f"The row '{files[3]}' has nothing in the column '{column}'"
    if not num_workers:
        with pytest.raises(ValueError, match=f"Sample 3: {message}"):
            train(train_lora, tmp_path / "raise", **settings)
    train(train_lora, tmp_path / "skip", **settings, on_error="skip")
    assert f"Left out sample 3: {message}" in caplog.text


def test_a_sample_beyond_the_models_positions_is_left_out(train, checkpoint, tmp_path, caplog):
    bound = BagelConfig.from_pretrained(checkpoint / "transformer").get_text_config().max_position_embeddings
    rows = [talk([text("a ")], [text("b")], id=str(index)) for index in range(4)]
    rows[2]["messages"][0]["content"][0]["text"] *= bound
    source = write_lines(tmp_path / "rows.jsonl", rows)
    train(train_lora, tmp_path / "out", train_data_file=[source], rank=2, train_batch_size=4, on_error="skip")
    assert re.search(rf"Left out sample 2 \(id '2'\): It takes \d+ rope positions, .*\({bound}\)", caplog.text)


@pytest.mark.parametrize("shape", [(4000, 2), (2, 4000), (1, 1)])
def test_pictures_of_any_shape_fit_the_models_tables(train, tmp_path, shape):
    (tmp_path / "data").mkdir()
    Image.new("RGB", shape).save(tmp_path / "data" / "odd.png")
    train(train_lora, tmp_path / "out", instance_data_dir=tmp_path / "data", **SETTINGS)
    assert_trained(tmp_path / "out", "text-to-image", samples=1)


def test_an_adapter_has_matrices_alone_for_muon(train, tmp_path):
    train(
        train_lora,
        tmp_path,
        **SETTINGS | {"rank": 4, "max_train_steps": 2, "checkpointing_steps": 1},
        optimizer="muon",
    )
    whole = saved_weights(tmp_path)
    assert any(tensor.any() for name, tensor in whole.items() if "lora_B" in name)
    settings = {"rank": 4, "checkpointing_steps": 1, "optimizer": "muon"}
    train(train_lora, tmp_path, **settings, resume_from_checkpoint="checkpoint-1")
    assert_same(saved_weights(tmp_path), whole)
