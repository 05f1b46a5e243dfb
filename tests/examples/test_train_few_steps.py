"""`examples/train_few_steps.py`: what the student learns, on prompts and on datasets, resumed, and what its file says."""

from __future__ import annotations

import gc
import json
import shutil
import weakref

import pytest
import torch
import train_few_steps
from bagel_training.data import PromptSamples
from bagel_training.distillation import Distillation, DistillingCollator
from datasets import Dataset
from peft import LoraConfig

from diffusers_bagel import BagelPipeline
from tests.conftest import golden_image, load_processor, turn
from tests.diffusers_bagel.test_lora import make_pipe
from tests.examples.conftest import (
    PROMPT,
    arguments,
    assert_same,
    card_text,
    checkpoints,
    files_of,
    image,
    saved_weights,
    talk,
    text,
    write_lines,
)
from tests.transformers_bagel.test_adapters import randomise
from transformers_bagel import BagelForConditionalGeneration
from transformers_bagel.segments import GENERATION_THINK_PROMPT


GUIDANCE = {"guidance_scale": 4.0, "image_guidance_scale": 2.0}
SAMPLES = {
    "a drawing": [turn("user", "a red circle"), turn("assistant", golden_image("square"))],
    "an edit": [turn("user", golden_image("tall"), "make it green"), turn("assistant", golden_image("wide"))],
    "a plan": [
        turn("system", GENERATION_THINK_PROMPT),
        turn("user", "a red circle"),
        turn("assistant", "a circle", golden_image("square")),
    ],
}


@pytest.fixture(scope="module")
def pipe() -> BagelPipeline:
    """With an adapter that changes what it draws."""
    pipe = make_pipe()
    pipe.transformer.add_adapter(LoraConfig(r=4))
    randomise(pipe.transformer, 0)
    return pipe


@pytest.fixture
def prompts(tmp_path) -> str:
    file = tmp_path / "prompts.txt"
    file.write_text(f"{PROMPT}\n\na blue square\n", encoding="utf-8")
    return str(file)


def collator(pipe: BagelPipeline, num_steps: int, teacher_steps: int) -> DistillingCollator:
    distillation = Distillation(num_steps, teacher_steps, *GUIDANCE.values())
    return DistillingCollator(pipe, distillation, processor=load_processor(), vae_sample_mode="argmax")


def learned(batch: dict) -> list[tuple[float, torch.Tensor, torch.Tensor]]:
    """Of each noised block its sigma, its latents, and the velocity to learn."""
    counts = batch["latent_grid_hw"].prod(-1).tolist()
    rows = zip(batch["timesteps"], batch["latents"].split(counts), batch["noise"].split(counts), strict=True)
    return [
        (float(sigma), (1 - sigma) * clean + sigma * noise, noise - clean) for sigma, clean, noise in rows if sigma > 0
    ]


def steps_of_pipeline(
    pipe: BagelPipeline, prompt: list[dict], batch: dict, num_steps: int, **settings
) -> list[torch.Tensor]:
    """The latents behind each step of a drawing from what stands before the picture, and from the first place's noise."""
    steps = []

    def note(call, step, timestep, tensors):
        steps.append(tensors["latents"][0].clone())
        return tensors

    height, width = (16 * batch["latent_grid_hw"][-1]).tolist()
    settings |= {"height": height, "width": width, "output_type": "latent", "vae_sample_mode": "argmax"}
    noise = learned(batch)[0][1][None]
    pipe(
        messages=prompt,
        latents=noise,
        num_inference_steps=num_steps,
        callback_on_step_end=note,
        **settings,
    )
    return steps


@pytest.mark.parametrize("name", ["a drawing", "an edit"])
def test_the_only_step_of_a_student_is_the_whole_way_of_the_teacher(pipe, name):
    batch = collator(pipe, 1, 4)([{"messages": SAMPLES[name]}])
    ((sigma, noise, velocity),) = learned(batch)
    scales = GUIDANCE if name == "an edit" else {"guidance_scale": 4.0}
    teacher = steps_of_pipeline(pipe, SAMPLES[name][:-1], batch, 4, attention_kwargs={"scale": 0.0}, **scales)
    assert sigma == 1
    assert (noise - velocity - teacher[-1]).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["a drawing", "an edit"])
def test_each_step_begins_where_the_student_comes_to(pipe, name):
    batch = collator(pipe, 3, 2)([{"messages": SAMPLES[name]}])
    sigmas, places, _ = zip(*learned(batch), strict=True)
    assert list(sigmas) == sorted(sigmas, reverse=True) and len(sigmas) == 3
    student = steps_of_pipeline(pipe, SAMPLES[name][:-1], batch, 3, guidance_scale=1.0, image_guidance_scale=1.0)
    assert max((x - after).abs().max() for x, after in zip(places[1:], student[:-1], strict=True)) < 1e-4


def test_a_plan_is_drawn_from_as_the_pipeline_does(pipe):
    asked, thinks = SAMPLES["a plan"][1:2], {"think": True, "max_think_tokens": 8, "attention_kwargs": {"scale": 0.0}}
    plan = pipe(messages=asked, num_inference_steps=1, height=32, width=32, output_type="latent", **thinks).texts[0]
    sample = [*SAMPLES["a plan"][:2], turn("assistant", plan, golden_image("square"))]
    batch = collator(pipe, 1, 4)([{"messages": sample}])
    ((_, noise, velocity),) = learned(batch)
    teacher = steps_of_pipeline(pipe, asked, batch, 4, guidance_scale=4.0, **thinks)
    assert plan
    assert (noise - velocity - teacher[-1]).abs().max() < 1e-4


def test_samples_of_a_batch_learn_what_each_would_alone(pipe):
    samples = [{"messages": messages} for messages in SAMPLES.values()]
    own = collator(pipe, 2, 2)
    together = own.pack([own.with_latents(own.encode(sample, index)) for index, sample in enumerate(samples)])
    alone = [own.pack([own.with_latents(own.encode(sample, index))]) for index, sample in enumerate(samples)]
    expected = [place for batch in alone for place in learned(batch)]
    assert len(expected) == 6
    for (sigma, x, velocity), (own_sigma, own_x, own_velocity) in zip(learned(together), expected, strict=True):
        assert sigma == own_sigma
        assert max((x - own_x).abs().max(), (velocity - own_velocity).abs().max()) < 1e-4


def test_only_the_picture_is_learned(pipe):
    batch = collator(pipe, 2, 1)([{"messages": SAMPLES["a plan"]}])
    assert (batch["labels"] == -100).all()


@pytest.mark.parametrize(
    "messages",
    [
        [turn("user", "hello"), turn("assistant", "hi")],
        [
            turn("user", "a"),
            turn("assistant", golden_image("square")),
            turn("user", "b"),
            turn("assistant", golden_image("wide")),
        ],
        [turn("user", "a"), turn("assistant", golden_image("square"), "there")],
    ],
    ids=["words", "two pictures", "words behind"],
)
def test_other_samples_are_refused(pipe, messages):
    with pytest.raises(ValueError, match="It must end in an answer that is a picture, or a text and a picture"):
        collator(pipe, 2, 1)([{"messages": messages}])


SHORT = {"instance_data_dir": None, "instance_prompt": None, "num_inference_steps": 2, "teacher_steps": 2, "rank": 4}


def test_prompts_alone_train_an_adapter_that_says_its_steps(train, defaults, prompts, tmp_path):
    output_dir = train(train_few_steps, tmp_path / "out", prompt_file=prompts, resolution=32, **SHORT)
    pipe = BagelPipeline.from_pretrained(defaults["pretrained_model_name_or_path"])
    pipe.load_lora_weights(output_dir)
    assert pipe.few_steps.num_inference_steps == 2
    # What writes is as it was.
    assert all("_moe_gen" in name for name in saved_weights(output_dir))


def test_teacher_and_student_are_one_model(train, prompts, tmp_path, monkeypatch):
    """A training takes the memory of one, and of the adapter."""
    made: weakref.WeakSet[BagelForConditionalGeneration] = weakref.WeakSet()
    make, places = BagelForConditionalGeneration.__init__, Distillation.places
    counts = []

    def count(*args):
        gc.collect()
        counts.append(len(made))
        return places(*args)

    monkeypatch.setattr(
        BagelForConditionalGeneration, "__init__", lambda self, *args: (make(self, *args), made.add(self))[0]
    )
    monkeypatch.setattr(Distillation, "places", count)
    train(train_few_steps, tmp_path / "out", prompt_file=prompts, resolution=32, **SHORT)
    assert set(counts) == {1}


def test_a_dataset_of_drawings_edits_and_plans_trains(train, pictures, tmp_path):
    names = [f"{pictures}/red_circle.png", f"{pictures}/blue_square.png"]
    rows = [
        talk([text("a red circle")], [image(names[0])]),
        talk([image(names[0]), text("make it blue")], [image(names[1])]),
        talk([text("a shape")], [text("a blue square"), image(names[1])]),
    ]
    data = write_lines(tmp_path / "rows.jsonl", rows)
    output_dir = train(train_few_steps, tmp_path / "out", train_data_file=data, **SHORT)
    assert saved_weights(output_dir)


def test_resumed_equals_uninterrupted(train, prompts, tmp_path):
    settings = SHORT | {"prompt_file": prompts, "resolution": 32, "checkpointing_steps": 2, "lora_dropout": 0.2}
    whole = train(train_few_steps, tmp_path / "whole", max_train_steps=4, **settings)
    train(train_few_steps, tmp_path / "two", max_train_steps=2, **settings)
    assert checkpoints(tmp_path / "two") == ["checkpoint-2"]
    halves = train(train_few_steps, tmp_path / "two", max_train_steps=4, resume_from_checkpoint="latest", **settings)
    assert_same(saved_weights(halves), saved_weights(whole))


def test_another_number_of_steps_is_no_resumed_training(train, prompts, tmp_path):
    settings = SHORT | {"prompt_file": prompts, "resolution": 32, "checkpointing_steps": 2}
    train(train_few_steps, tmp_path / "out", **settings)
    with pytest.raises(ValueError, match="--num_inference_steps 2, but this training has 3"):
        train(
            train_few_steps, tmp_path / "out", resume_from_checkpoint="latest", **settings | {"num_inference_steps": 3}
        )


def test_validation_draws_in_the_adapters_steps_without_guidance(train, prompts, tmp_path, monkeypatch):
    asked, call = [], BagelPipeline.__call__

    def watched(pipe, **settings):
        asked.append((settings["num_inference_steps"], settings["guidance_scale"]))
        return call(pipe, **settings)

    monkeypatch.setattr(BagelPipeline, "__call__", watched)
    settings = SHORT | {"prompt_file": prompts, "resolution": 32, "validation_prompt": PROMPT}
    settings["validation_inference_steps"] = None
    output_dir = train(train_few_steps, tmp_path / "out", **settings)
    assert asked == [(SHORT["num_inference_steps"], 1.0)]
    assert [file.name for file in (output_dir / "validation").iterdir()] == ["step_2_0.png"]


def test_bad_arguments_are_refused(prompts, tmp_path, capsys):
    line = ["--pretrained_model_name_or_path", "x", "--output_dir", str(tmp_path / "out")]
    for extra, words in (
        ([], "Pass one of --dataset_name, --train_data_file, --instance_data_dir and --prompt_file, got none"),
        (
            ["--prompt_file", prompts, "--train_data_file", prompts],
            "and --prompt_file, got --train_data_file and --prompt_file",
        ),
        (["--prompt_file", prompts, "--teacher_steps", "0"], "--teacher_steps must be at least 1"),
        (
            ["--prompt_file", prompts, "--validation_inference_steps", "0"],
            "--validation_inference_steps must be at least 1, got 0",
        ),
        (["--prompt_file", prompts, "--teacher_guidance_scale", "nan"], "--teacher_guidance_scale must be finite"),
    ):
        with pytest.raises(SystemExit):
            train_few_steps.parse_args(line + extra)
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, value",
    [
        ("timestep_shift", 7),
        ("noised_copies", 3),
        ("text_dropout", 0.5),
        ("vit_dropout", 0.9),
        ("vae_dropout", 0.9),
        ("weighting_scheme", "none"),
        ("logit_mean", 3),
        ("logit_std", 3),
        ("next_action", "all"),
        ("ce_weight", 5),
        ("question_column", "question"),
        ("answer_column", "text"),
    ],
)
def test_what_no_distillation_knows_is_not_offered(prompts, tmp_path, capsys, name, value):
    base = {"pretrained_model_name_or_path": "x", "output_dir": tmp_path / "out", "prompt_file": prompts}
    with pytest.raises(SystemExit) as stopped:
        train_few_steps.parse_args(arguments(**base, **{name: value}))
    assert stopped.value.code == 2
    assert f"unrecognized arguments: --{name} {value}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, value, company",
    [
        ("instance_prompt", "hello", "with --prompt_file"),
        ("image_column", "picture", "with --prompt_file"),
        ("cond_image_column", "before", "with --prompt_file"),
        ("messages_column", "talk", "with --prompt_file"),
        ("caption_column", "prompt", "with a --prompt_file of lines"),
    ],
)
def test_what_changes_nothing_beside_prompts_is_refused(prompts, tmp_path, capsys, name, value, company):
    base = {"pretrained_model_name_or_path": "x", "output_dir": tmp_path / "out", "prompt_file": prompts}
    with pytest.raises(SystemExit) as stopped:
        train_few_steps.parse_args(arguments(**base, **{name: value}))
    assert stopped.value.code == 2
    assert f"--{name} has no effect {company}." in capsys.readouterr().err


ROWS = [{"text": PROMPT, "other": "a green star"}, {"text": "a blue square", "other": "a red star"}]


def write_prompts(folder, name: str) -> str:
    file = folder / name
    if file.suffix.lower() == ".jsonl":
        return write_lines(file, ROWS)
    if file.suffix == ".json":
        file.write_text(json.dumps(ROWS), encoding="utf-8")
    elif file.suffix == ".csv":
        Dataset.from_list(ROWS).to_csv(file)
    elif file.suffix == ".parquet":
        Dataset.from_list(ROWS).to_parquet(file)
    else:
        file.write_text(f"{PROMPT}\r\n\r\n a blue square\r\n", encoding="utf-8-sig", newline="")
    return str(file)


def prompts_of(file: str, folder, **settings) -> list[str]:
    base = {"pretrained_model_name_or_path": "x", "output_dir": folder / "out", "prompt_file": file}
    samples = PromptSamples(train_few_steps.parse_args(arguments(**base, **settings)))
    return [samples[index]["messages"][0]["content"][0]["text"] for index in range(len(samples))]


@pytest.mark.parametrize("name", ["p.txt", "p", "p.jsonl", "P.JSONL", "p.json", "p.csv", "p.parquet"])
def test_prompts_are_the_lines_of_a_text_or_a_column_of_a_table(tmp_path, name):
    file = write_prompts(tmp_path, name)
    assert prompts_of(file, tmp_path) == [PROMPT, "a blue square"]
    assert prompts_of(file, tmp_path, max_train_samples=1, repeats=3) == [PROMPT] * 3
    if "." in name and name != "p.txt":
        assert prompts_of(file, tmp_path, caption_column="other") == ["a green star", "a red star"]


def test_repeats_of_prompts_make_an_epoch_longer(train, tmp_path):
    settings = SHORT | {"resolution": 32, "max_train_steps": None, "repeats": 3}
    output_dir = train(train_few_steps, tmp_path / "out", prompt_file=write_prompts(tmp_path, "p.jsonl"), **settings)
    assert "trained for 3 steps on 6 samples" in card_text(output_dir)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.txt", b"\n\n", "p.txt' holds no prompt"),
        ("p.txt", "un café\n".encode("latin-1"), "p.txt' is no UTF-8 text .*can't decode byte 0xe9"),
        ("p.txt", "a red circle".encode("utf-16-le"), "p.txt' is no UTF-8 text .*null"),
        ("p.txt", None, "there is no file '.*p.txt'"),
        ("p.parquet", None, "there is no file '.*p.parquet'"),
        ("", None, "must be a file, but '.*' is a folder"),
        ("p.jsonl", b'{"caption": "a", "n": 1}\n', "p.jsonl' has no column 'text'. It has 'caption', 'n'"),
        ("p.jsonl", b'{"text": null}\n', "the column 'text' of '.*p.jsonl' holds no texts"),
        ("p.csv", b"text\n1\n2\n", "the column 'text' of '.*p.csv' holds no texts, but .*int64"),
        ("p.jsonl", b'{"text": "a"}\nno\n', "line 2 of '.*p.jsonl' is no JSON"),
        ("p.jsonl", b"", "p.jsonl' is empty"),
        ("p.jsonl", b'{"text": " "}\n', "p.jsonl' holds no prompt"),
        ("p.parquet", b"PAR1 no parquet PAR1", "p.parquet' cannot be read"),
    ],
)
def test_a_file_that_holds_no_prompts_is_named(train, tmp_path, name, content, message):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    # No model is there either, so that it is told before one is loaded.
    settings = SHORT | {"prompt_file": file, "pretrained_model_name_or_path": "no/such/model"}
    with pytest.raises((ValueError, OSError), match=f"--prompt_file.*{message}"):
        train(train_few_steps, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_a_row_without_a_prompt_is_a_bad_sample(train, tmp_path, caplog):
    settings = SHORT | {"prompt_file": write_lines(tmp_path / "p.jsonl", [*ROWS, {"text": None}]), "resolution": 32}
    settings |= {"train_batch_size": 3}
    message = "ample 2: The row has nothing in the column 'text'"
    with pytest.raises(ValueError, match=message):
        train(train_few_steps, tmp_path / "raise", **settings)
    train(train_few_steps, tmp_path / "skip", **settings, on_error="skip")
    assert f"Left out s{message}" in caplog.text


def test_columns_are_asked_for_by_what_is_offered(train, tmp_path):
    data = write_lines(tmp_path / "rows.jsonl", [{"caption": "a"}])
    with pytest.raises(ValueError, match="no column 'image', 'text'.* --messages_column") as refused:
        train(train_few_steps, tmp_path / "out", train_data_file=data, **SHORT)
    assert "--question_column" not in str(refused.value)


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_samples_without_a_picture_to_draw_leave_nothing_behind(train, tmp_path, on_error):
    data = write_lines(tmp_path / "rows.jsonl", [talk([text("hello")], [text("hi")])])
    settings = SHORT | {"train_data_file": data, "report_to": "tensorboard", "on_error": on_error}
    with pytest.raises(ValueError, match="must end in an answer that is a picture|no sample that can be used"):
        train(train_few_steps, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_samples_without_a_picture_to_draw_replace_nothing(train, prompts, tmp_path):
    train(train_few_steps, tmp_path / "out", prompt_file=prompts, resolution=32, **SHORT)
    before = files_of(tmp_path / "out")
    data = write_lines(tmp_path / "rows.jsonl", [talk([text("hello")], [text("hi")])])
    with pytest.raises(ValueError, match="must end in an answer that is a picture"):
        train(train_few_steps, tmp_path / "out", **SHORT, train_data_file=data, overwrite_output_dir=True)
    assert files_of(tmp_path / "out") == before


def test_another_number_of_prompts_is_no_resumed_training(train, prompts, tmp_path):
    settings = SHORT | {"resolution": 32, "checkpointing_steps": 2}
    started = train(train_few_steps, tmp_path / "out", prompt_file=prompts, **settings)
    other = tmp_path / "three.txt"
    other.write_text("a\nb\nc\n", encoding="utf-8")
    settings |= {"max_train_steps": 4, "resume_from_checkpoint": started / "checkpoint-2"}
    with pytest.raises(
        ValueError, match="checkpoint-2' was written with 2 samples, but .* has 3 of --prompt_file .*three"
    ):
        train(train_few_steps, started, prompt_file=other, **settings)
    # Of a new folder nothing is left, either.
    shutil.copytree(started / "checkpoint-2", tmp_path / "checkpoint-2")
    settings["resume_from_checkpoint"] = tmp_path / "checkpoint-2"
    with pytest.raises(ValueError, match="--max_train_samples and --repeats"):
        train(train_few_steps, tmp_path / "new", prompt_file=prompts, repeats=2, **settings)
    assert not (tmp_path / "new").exists()
