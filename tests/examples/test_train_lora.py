"""`examples/train_lora.py`: resuming, precision, what it writes, its arguments."""

from __future__ import annotations

import pytest
import torch
import train_full
import train_lora

from diffusers_bagel import BagelPipeline
from tests.conftest import CHECKPOINT, run_snippets
from tests.examples.conftest import (
    PROMPT,
    arguments,
    assert_same,
    changed,
    checkpoint_state,
    checkpoints,
    drawn,
    full_disk,
    last_metrics,
    load_card,
    saved_weights,
    validation_picture,
    write_lines,
)


RESUMABLE = {
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "gradient_accumulation_steps": 2,
    "lr_scheduler": "cosine",
    "rank": 4,
    # It takes random numbers of its own at every step.
    "lora_dropout": 0.3,
    "validation_prompt": PROMPT,
    "validation_steps": 1,
}


@pytest.fixture(scope="module")
def uninterrupted(train, tmp_path_factory):
    return train(train_lora, tmp_path_factory.mktemp("run"), **RESUMABLE)


@pytest.fixture(scope="module")
def plain(train, tmp_path_factory):
    """Two steps without anything special."""
    return train(train_lora, tmp_path_factory.mktemp("plain"), rank=4)


# A worker and a measured peak take random numbers as well, and the resumed run does both anew.
@pytest.mark.parametrize("settings", [{}, {"dataloader_num_workers": 1, "peak_tflops": None}], ids=["plain", "worker"])
def test_resumed_after_a_full_disk_equals_uninterrupted(train, uninterrupted, tmp_path, settings):
    settings = RESUMABLE | settings
    with full_disk(step=4):
        train(train_lora, tmp_path, **settings)
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    train(train_lora, tmp_path, **settings, resume_from_checkpoint="latest")
    for name in ("checkpoint-2", "checkpoint-4"):
        assert_same(checkpoint_state(tmp_path / name), checkpoint_state(uninterrupted / name))
    assert_same(saved_weights(tmp_path), saved_weights(uninterrupted))
    for step in (1, 2, 3, 4):
        assert validation_picture(tmp_path, step) == validation_picture(uninterrupted, step)


def test_dropout_and_seed_decide(train, plain, uninterrupted, tmp_path):
    """Comparisons of runs mean something: other random numbers give other weights."""
    for name, settings in {"dropout": {"lora_dropout": 0.3}, "seed": {"seed": 1}}.items():
        assert changed(saved_weights(train(train_lora, tmp_path / name, rank=4, **settings)), saved_weights(plain))
    assert_same(saved_weights(train(train_lora, tmp_path / "again", rank=4)), saved_weights(plain))


def test_checkpoint_leaves_out_the_frozen_weights(uninterrupted):
    state = checkpoint_state(uninterrupted / "checkpoint-4")
    weights = {place for place in state if place.startswith("/weights/model/") and "pos_embed" not in place}
    assert len(weights) == len(saved_weights(uninterrupted))
    assert all("lora" in place for place in weights)


def test_saved_folder_draws_the_validation_picture_again(uninterrupted, checkpoint):
    pipe = BagelPipeline.from_pretrained(checkpoint)
    without = drawn(pipe)
    pipe.load_lora_weights(uninterrupted)
    assert drawn(pipe) == validation_picture(uninterrupted, 4) != without


def test_alpha_is_saved(train, checkpoint, tmp_path):
    """The file's own scale, which the weights do not show."""
    train(train_lora, tmp_path, rank=4, lora_alpha=16, validation_prompt=PROMPT)
    pipe = BagelPipeline.from_pretrained(checkpoint)
    pipe.load_lora_weights(tmp_path)
    assert drawn(pipe) == validation_picture(tmp_path, 2)


def test_card(uninterrupted):
    card = load_card(uninterrupted)
    assert "base_model" not in card.data.to_dict(), "a folder of this machine"
    assert "lora" in card.data.tags
    assert card.data.instance_prompt == "a shape"
    widgets = [(widget["text"], widget["output"]["url"]) for widget in card.data.widget]
    assert widgets == [(PROMPT, "validation/step_4_0.png")]
    assert "LoRA of rank 4 for BAGEL, trained for 4 steps on 8 samples (text-to-image)" in card.text
    assert "- lr_scheduler: cosine\n" in card.text
    assert f'load_lora_weights("{uninterrupted}")' in card.text
    variables = run_snippets(card.text)
    assert "lora_A" in "".join(name for name, _ in variables["model"].named_parameters())
    assert variables["ids"].shape[1] > variables["inputs"]["input_ids"].shape[1]


@pytest.mark.parametrize("targets, suffix", [("und", ""), ("gen", "_moe_gen")])
def test_targets(train, tmp_path, targets, suffix):
    train(train_lora, tmp_path, rank=2, lora_targets=targets)
    assert {"_moe_gen" in name for name in saved_weights(tmp_path)} == {bool(suffix)}


def test_layers_by_name(train, tmp_path):
    train(train_lora, tmp_path, rank=2, lora_layers="q_proj_moe_gen,v_proj_moe_gen")
    names = saved_weights(tmp_path)
    assert {name.split(".lora")[0].split(".")[-1] for name in names} == {"q_proj_moe_gen", "v_proj_moe_gen"}


def test_bf16_keeps_float32_masters(train, plain, checkpoint, tmp_path):
    train(train_lora, tmp_path, rank=4, mixed_precision="bf16", checkpointing_steps=2, validation_prompt=PROMPT)
    weights = saved_weights(tmp_path)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    # Not just wide, but used: some values need more bits than bfloat16 has.
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in weights.values())
    state = checkpoint_state(tmp_path / "checkpoint-2")
    assert {tensor.dtype for place, tensor in state.items() if "lora" in place} == {torch.float32}
    assert last_metrics(tmp_path)["loss"] == pytest.approx(last_metrics(plain)["loss"], rel=0.03)
    assert changed(weights, saved_weights(plain))


def test_fp16_is_refused_on_the_cpu(train, tmp_path):
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        train(train_lora, tmp_path, mixed_precision="fp16")


def test_gradient_checkpointing_changes_nothing(train, tmp_path):
    """Also with dropout, whose masks recomputation must draw again."""
    settings = {"rank": 4, "lora_dropout": 0.3}
    runs = [train(train_lora, tmp_path / str(on), **settings, gradient_checkpointing=on) for on in (False, True)]
    assert_same(*map(saved_weights, runs))


def test_cached_latents_change_nothing(train, plain, tmp_path):
    # Two epochs, so that the second one reads the cache.
    runs = [train(train_lora, tmp_path / str(on), rank=4, max_train_steps=8, cache_latents=on) for on in (False, True)]
    assert_same(*map(saved_weights, runs))
    assert len(list((runs[1] / "latents").rglob("*.*"))) == 8


def test_scaled_learning_rate(train, tmp_path):
    train(train_lora, tmp_path, scale_lr=True, gradient_accumulation_steps=3)
    assert last_metrics(tmp_path)["lr"] == pytest.approx(1e-3 * 3 * 2)


def test_limit_keeps_the_newest(train, tmp_path):
    train(train_lora, tmp_path, max_train_steps=3, checkpointing_steps=1, checkpoints_total_limit=1)
    assert checkpoints(tmp_path) == ["checkpoint-3"]


@pytest.mark.parametrize("report_to", ["none", "tensorboard"])
def test_report_to(train, tmp_path, report_to):
    train(train_lora, tmp_path, max_train_steps=1, report_to=report_to)
    assert bool(list(tmp_path.rglob("events.out.tfevents*"))) == (report_to == "tensorboard")
    assert (tmp_path / "pytorch_lora_weights.safetensors").exists()


def test_hub_token_is_not_logged(train, tmp_path):
    train(train_lora, tmp_path, max_train_steps=1, report_to="tensorboard", hub_token="a-secret-token")
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert [file for file in files if b"a-secret-token" in file.read_bytes()] == []


@pytest.mark.parametrize("script", [train_full, train_lora], ids=lambda script: script.__name__)
@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "got none"),
        ({"dataset_name": "a", "instance_data_dir": "b"}, "got --dataset_name and --instance_data_dir"),
        ({"instance_data_dir": "b", "max_tokens": 100}, "pass --max_train_steps"),
        ({"instance_data_dir": "b", "dataset_split": "train", "train_data_file": ["c"]}, "got --train_data_file and"),
        ({"instance_data_dir": "b", "mixed_precision": "fp8"}, "invalid choice"),
        ({"instance_data_dir": "b", "on_error": "ignore"}, "invalid choice"),
        ({"instance_data_dir": "b", "validation_image": "/nowhere/absent.png"}, "absent.png"),
        *[
            ({"instance_data_dir": "b", "max_train_steps": 1, name: 0}, f"--{name} must be at least 1, got 0")
            for name in (
                "gradient_accumulation_steps",
                "checkpointing_steps",
                "checkpoints_total_limit",
                "logging_steps",
                "num_train_epochs",
                "max_train_steps",
                "train_batch_size",
                "max_tokens",
                "resolution",
                "validation_inference_steps",
                "lr_num_cycles",
            )
        ],
        ({"instance_data_dir": "b", "validation_size": [0, 64]}, "--validation_size must be at least 1, got 0"),
    ],
)
def test_argument_errors_come_before_anything_is_loaded(script, settings, message, capsys):
    base = {"pretrained_model_name_or_path": "no/such/model", "output_dir": "no/such/folder"}
    with pytest.raises(SystemExit) as stopped:
        script.parse_args(arguments(**(base | settings)))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "script, settings, message",
    [
        (train_lora, {"rank": 0}, "--rank must be at least 1"),
        (train_lora, {"lora_targets": "vit"}, "invalid choice"),
        (train_full, {"freeze": ["all"]}, "invalid choice"),
        (train_full, {"freeze": ["vit", "connector", "und", "gen"]}, "--freeze leaves nothing to train"),
        (train_full, {"fsdp": True, "mixed_precision": "fp16"}, "--mixed_precision no or bf16"),
    ],
)
def test_argument_errors_of_one_script(script, settings, message, capsys):
    base = {"pretrained_model_name_or_path": "a", "output_dir": "b", "instance_data_dir": "c"}
    with pytest.raises(SystemExit):
        script.parse_args(arguments(**(base | settings)))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "company"),
    [
        ({"answer_column": "reply"}, "without --question_column"),
        ({"cond_image_column": "before", "question_column": "q"}, "with --question_column"),
        ({"instance_prompt": "a dog", "question_column": "q"}, "with --question_column"),
        ({"caption_column": "caption", "question_column": "q"}, "with --question_column"),
    ],
)
def test_what_the_data_would_not_be_is_refused(settings, company, capsys, tmp_path):
    base = {"pretrained_model_name_or_path": "a", "output_dir": tmp_path / "out", "train_data_file": ["c.jsonl"]}
    with pytest.raises(SystemExit) as stopped:
        train_lora.parse_args(arguments(**(base | settings)))
    assert stopped.value.code == 2
    assert f"--{next(iter(settings))} has no effect {company}." in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings",
    [
        {"lr_scheduler": "constant", "lr_warmup_steps": 5},
        {"num_train_epochs": 2, "max_train_steps": 9},
        {"lr_scheduler": "cosine", "lr_num_cycles": 2, "lr_power": 2},
        {"ema_decay": 0.9},
    ],
    ids=str,
)
def test_settings_that_others_outdo_are_taken_as_by_the_libraries_scripts(settings, tmp_path):
    base = {"pretrained_model_name_or_path": "a", "output_dir": tmp_path / "out", "train_data_file": ["c.jsonl"]}
    args = train_full.parse_args(arguments(**(base | settings)))
    assert {name: getattr(args, name) for name in settings} == settings


def test_layers_by_short_name_leave_out_the_vision_tower(train, tmp_path):
    train(train_lora, tmp_path, rank=2, lora_layers="q_proj,v_proj")
    assert all(".language_model." in name for name in saved_weights(tmp_path))


def test_a_checkpoint_loads_as_lora(uninterrupted, checkpoint):
    pipe = BagelPipeline.from_pretrained(checkpoint)
    pipe.load_lora_weights(uninterrupted / "checkpoint-2")
    assert drawn(pipe) == validation_picture(uninterrupted, 2)


@pytest.mark.parametrize("task", ["drawing", "editing"])
def test_the_original_layout_trains_within_the_models_tables(train, pictures, tmp_path, task):
    # It has no image settings, and the original sizes are far beyond the tiny model's position tables.
    names = sorted(path.name for path in pictures.glob("*.png"))
    rows = [{"image": str(pictures / name), "source": str(pictures / names[0]), "text": "a shape"} for name in names]
    data = {"train_data_file": [write_lines(tmp_path / "rows.jsonl", rows)]}
    data |= {"cond_image_column": "source"} if task == "editing" else {}
    train(train_lora, tmp_path / "run", pretrained_model_name_or_path=CHECKPOINT, rank=2, max_train_steps=1, **data)
    assert saved_weights(tmp_path / "run")
