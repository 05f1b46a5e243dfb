"""Repositories of fine-tunes as others publish them: names of files, what is missing, what is not quite JSON."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from tests.conftest import CHECKPOINT, load_model, max_error
from transformers_bagel import BagelConfig, BagelForConditionalGeneration, BagelProcessor
from transformers_bagel.fine_tunes import fine_tune_of, image_settings
from transformers_bagel.weights import find_weights


WEIGHTS = load_file(CHECKPOINT / "ema.safetensors")
TUNED = {name: tensor * 1.5 if name.endswith("lm_head.weight") else tensor for name, tensor in WEIGHTS.items()}
HEAD = "language_model.lm_head.weight"
INDEX = "model.safetensors.index.json"
IDS = torch.tensor([[1, 2, 3, 4]])


@pytest.fixture
def repository(tmp_path):
    """`repository({name: weights}, drop=...)`: the golden checkpoint, with other files of weights than its own."""

    def make(
        weights: dict[str, dict[str, torch.Tensor]], drop: tuple[str, ...] = (INDEX,), name: str = "repo"
    ) -> Path:
        folder = tmp_path / name
        shutil.copytree(CHECKPOINT, folder, ignore=shutil.ignore_patterns("ema.safetensors", *drop))
        for file, tensors in weights.items():
            save_file(tensors, folder / file)
        return folder

    return make


@pytest.fixture
def weights_alone(tmp_path):
    """`weights_alone(name, tensors)`: a folder with a single file."""

    def make(name: str, tensors: dict[str, torch.Tensor]) -> Path:
        folder = tmp_path / "weights"
        folder.mkdir()
        save_file(tensors, folder / name)
        return folder

    return make


def head(folder: Path | str, **kwargs) -> torch.Tensor:
    return BagelForConditionalGeneration.from_pretrained(folder, **kwargs).lm_head.weight


def is_tuned(weight: torch.Tensor) -> bool:
    assert torch.equal(weight, TUNED[HEAD]) or torch.equal(weight, WEIGHTS[HEAD])
    return torch.equal(weight, TUNED[HEAD])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def halves(stem: str, tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    names = sorted(tensors)
    parts = names[:70], names[70:]
    return {
        f"{stem}-0000{number}-of-00002.safetensors": {name: tensors[name] for name in own}
        for number, own in enumerate(parts, 1)
    }


ALONE = {
    "model_bf16": {"model_bf16.safetensors": TUNED},
    "a_name_of_its_own": {"rvr.safetensors": TUNED},
    "no_index_needed": {"model.safetensors": TUNED},
    "shards_whose_index_is_missing": halves("model", TUNED),
    "shards_of_another_name": halves("twiff", TUNED),
}


@pytest.mark.parametrize("files", ALONE)
def test_weights_are_found_under_any_name(files, repository, caplog):
    with caplog.at_level(logging.WARNING):
        assert is_tuned(head(repository(ALONE[files])))
    assert "several files of weights" not in caplog.text


@pytest.mark.parametrize("name", ["model_bf16.safetensors", "tuned.safetensors"])
def test_an_index_that_names_files_no_more_is_passed_by_aloud(name, repository, caplog):
    """As after uploading again: the publisher's index, whose file is gone, and another file."""
    with caplog.at_level(logging.WARNING):
        assert is_tuned(head(repository({name: TUNED}, drop=())))
    assert f"{name} is read" in caplog.text and f"{INDEX} names 'ema.safetensors', which is not there" in caplog.text


BOTH = {
    # What lies there, and whether the fine-tune is read.
    "average_and_last": ({"ema.safetensors": TUNED, "model.safetensors": WEIGHTS}, "ema.safetensors"),
    "beside_bagels_own": ({"ema.safetensors": WEIGHTS, "rvr.safetensors": TUNED}, "rvr.safetensors"),
    "shards_beside_bagels_own": (
        {"ema.safetensors": WEIGHTS, **halves("rvr", TUNED)},
        "rvr-00001-of-00002.safetensors",
    ),
    "pushed_whole_over_shards": ({"model.safetensors": TUNED, **halves("model", WEIGHTS)}, "model.safetensors"),
    "an_eight_bit_copy": ({"ema.safetensors": TUNED, "ema-FP8.safetensors": WEIGHTS}, "ema.safetensors"),
}


@pytest.mark.parametrize("case", BOTH)
def test_of_several_files_the_choice_is_said_aloud(case, repository, caplog):
    files, chosen = BOTH[case]
    with caplog.at_level(logging.WARNING):
        assert is_tuned(head(repository(files)))
    said = [record.message for record in caplog.records if "several files of weights" in record.message]
    assert len(said) == 1 and f"{chosen} is read" in said[0] and "`transformers_weights=`" in said[0]
    assert all(name.split("-0000")[0] in said[0] for name in files)


def test_what_the_library_saved_comes_before_a_file_that_lay_there(tmp_path, caplog):
    """A training that saves into the folder of the base."""
    shutil.copytree(CHECKPOINT, tmp_path, dirs_exist_ok=True)
    model = load_model()
    model.lm_head.weight.data.mul_(1.5)
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert is_tuned(head(tmp_path))
    assert "model.safetensors is read, and not ema.safetensors" in caplog.text


def test_of_two_files_with_names_of_their_own_one_has_to_be_named(repository):
    folder = repository({"first.safetensors": TUNED, "second.safetensors": WEIGHTS})
    with pytest.raises(ValueError, match=r"first\.safetensors, second\.safetensors.*`transformers_weights=`"):
        head(folder)
    assert is_tuned(head(folder, transformers_weights="first.safetensors"))
    assert is_tuned(head(folder / "first.safetensors"))
    assert not is_tuned(head(folder / "second.safetensors"))


@pytest.mark.parametrize("as_argument", [True, False])
def test_a_file_may_be_named_as_the_library_does_it(as_argument, repository):
    folder = repository({"ema.safetensors": WEIGHTS, "model_bf16.safetensors": TUNED})
    if as_argument:
        assert is_tuned(head(folder, transformers_weights="model_bf16.safetensors"))
        config = BagelConfig.from_pretrained(folder)
        assert is_tuned(head(folder, config=config, transformers_weights="model_bf16.safetensors"))
        return
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(settings | {"transformers_weights": "model_bf16.safetensors"}))
    assert is_tuned(head(folder))


@pytest.mark.parametrize("name", ["absent.safetensors", "../ema.safetensors"])
def test_a_name_of_no_file_is_refused_with_the_files_that_were_seen(name, repository):
    folder = repository({"ema.safetensors": WEIGHTS, "rvr.safetensors": TUNED})
    seen = "ema.safetensors, rvr.safetensors" if name.startswith("absent") else "in its folder"
    with pytest.raises((OSError, ValueError), match=seen):
        head(folder, transformers_weights=name)


@pytest.mark.parametrize("kwargs", [{"transformers_weights": "rvr.safetensors"}, {"variant": "fp16"}, {}], ids=str)
def test_auto_classes_read_the_same_file(kwargs, repository, caplog):
    folder = repository({"ema.safetensors": WEIGHTS, "rvr.safetensors": TUNED, "model.fp16.safetensors": TUNED})
    with caplog.at_level(logging.WARNING):
        assert is_tuned(AutoModelForImageTextToText.from_pretrained(folder, **kwargs).lm_head.weight)
    assert kwargs or "rvr.safetensors is read" in caplog.text


VARIANTS = {
    "one_file": {"model.fp16.safetensors": TUNED},
    "the_average": {"ema.fp16.safetensors": TUNED},
    "shards": halves("model.fp16", TUNED),
}


@pytest.mark.parametrize("files", VARIANTS)
def test_a_variant_is_read_as_the_libraries_mean_it(files, repository):
    folder = repository({"ema.safetensors": WEIGHTS} | VARIANTS[files])
    assert is_tuned(head(folder, variant="fp16"))
    with pytest.raises(OSError, match="variant"):
        head(folder, variant="bf16")


def test_an_index_of_a_variant_is_found(repository):
    parts = halves("model.fp16", TUNED)
    folder = repository({"model.safetensors": WEIGHTS} | parts)
    weight_map = {name: file for file, own in parts.items() for name in own}
    (folder / "model.safetensors.index.fp16.json").write_text(json.dumps({"weight_map": weight_map}))
    found = find_weights(folder, {}, variant="fp16")
    assert found.name == "model.safetensors.index.fp16.json" and set(found.files) == set(parts)
    assert is_tuned(head(folder, variant="fp16"))


def test_an_index_may_name_the_vae_too(repository):
    folder = repository({"ema.safetensors": TUNED})
    weight_map = dict.fromkeys(TUNED, "ema.safetensors") | {"encoder.conv_in.weight": "ae.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    assert is_tuned(head(folder))


def test_weights_that_have_the_vae_and_tables_of_the_code_in_them_load(repository):
    """As quantising tools write them: all tensors that they saw, and all buffers."""
    extra = {"encoder.conv_in.weight": torch.zeros(2, 3), "language_model.model.rotary_emb.inv_freq": torch.zeros(8)}
    assert is_tuned(head(repository({"model.safetensors": TUNED | extra})))


@pytest.mark.parametrize("layout", ["original", "own"])
@pytest.mark.parametrize("as_file", [False, True])
def test_weights_alone_take_the_rest_from_a_base(layout, as_file, weights_alone, tmp_path, model):
    base = CHECKPOINT
    if layout == "own":
        base = tmp_path / "base"
        model.save_pretrained(base)
        BagelProcessor.from_pretrained(CHECKPOINT).save_pretrained(base)
    folder = weights_alone("model.safetensors", TUNED)
    place = folder / "model.safetensors" if as_file else folder
    loaded = BagelForConditionalGeneration.from_pretrained(place, base=base)
    assert is_tuned(loaded.lm_head.weight)
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id
    assert loaded.config.text_config.bos_token_id == model.config.text_config.bos_token_id
    processor = BagelProcessor.from_pretrained(place, base=base)
    assert processor.tokenizer.get_vocab() == BagelProcessor.from_pretrained(CHECKPOINT).tokenizer.get_vocab()
    assert processor.image_processor.vae_stride == model.config.latent_stride


def test_own_settings_come_before_those_of_a_base(repository, tmp_path):
    folder = repository({"model.safetensors": TUNED}, drop=(INDEX, "tokenizer*", "vocab.json", "merges.txt"))
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(settings | {"timestep_shift": 7.0}), encoding="utf-8")
    loaded = BagelForConditionalGeneration.from_pretrained(folder, base=CHECKPOINT)
    assert loaded.config.timestep_shift == 7.0
    assert loaded.config.text_config.bos_token_id == 421


def test_weights_without_settings_ask_for_a_base(weights_alone):
    folder = weights_alone("model.safetensors", TUNED)
    for load in (BagelForConditionalGeneration.from_pretrained, BagelProcessor.from_pretrained):
        with pytest.raises(OSError, match=r"model\.safetensors\): pass `base=`"):
            load(folder)


def test_a_base_of_another_shape_is_refused_before_tensors_are_read(weights_alone, tmp_path, monkeypatch):
    narrow = load_model().config
    narrow.text_config.hidden_size, narrow.text_config.num_attention_heads = 32, 2
    narrow.save_pretrained(tmp_path / "base")
    monkeypatch.setattr("transformers_bagel.loading.check_values", lambda *args: pytest.fail("read"))
    with pytest.raises(ValueError, match=r"configuration of `base` '.*base'.*\(64,\) instead of \(32,\)"):
        head(weights_alone("model.safetensors", TUNED), base=tmp_path / "base")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gone", ["latent_pos_embed", "vit_pos_embed", "pos_embed"])
def test_position_tables_that_are_absent_are_computed(gone, dtype, repository):
    kept = {name: tensor for name, tensor in WEIGHTS.items() if f"{gone}.pos_embed" not in name}
    if gone == "pos_embed":
        kept = {name: tensor for name, tensor in WEIGHTS.items() if not name.endswith("pos_embed.pos_embed")}
    assert len(kept) < len(WEIGHTS)
    folder = repository({"model.safetensors": kept})
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(settings | {"max_latent_size": 8}), encoding="utf-8")
    loaded = BagelForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    for name in ("latent_pos_embed", "vit_pos_embed"):
        table = getattr(loaded.model, name).pos_embed
        assert table.dtype == dtype and max_error(table, WEIGHTS[f"{name}.pos_embed"].to(dtype)) <= 1e-6


def test_the_wrong_side_in_the_publishers_json_is_not_that_of_a_computed_table(repository):
    kept = {name: tensor for name, tensor in WEIGHTS.items() if "latent_pos_embed" not in name}
    folder = repository({"model.safetensors": kept})
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(settings | {"max_latent_size": 32}), encoding="utf-8")
    assert BagelConfig.from_pretrained(folder).max_latent_size == 64


NOT_QUITE_JSON = {
    "trailing_comma": lambda text: text.rstrip().removesuffix("}").rstrip() + ",\n}\n",
    "comment": lambda text: '// of "ours"\n' + text.replace('"visual_gen"', '/* draws */ "visual_gen"'),
    "hash_comment": lambda text: text.replace("{", '{ # see "http://x/y",\n', 1),
    "byte_order_mark": lambda text: "\ufeff" + text,
    "trailing_comma_and_comment": lambda text: text.rstrip().removesuffix("}").rstrip() + ", // the end\n}",
}


@pytest.mark.parametrize("file", ["config.json", "llm_config.json"])
@pytest.mark.parametrize("kind", NOT_QUITE_JSON)
def test_settings_that_are_not_quite_json_are_read_with_one_warning(kind, file, repository, caplog, model):
    folder = repository({"ema.safetensors": WEIGHTS})
    if file == "llm_config.json":
        (folder / "config.json").unlink()
    text = (folder / file).read_text(encoding="utf-8")
    (folder / file).write_text(NOT_QUITE_JSON[kind](text), encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        loaded = BagelForConditionalGeneration.from_pretrained(folder)
        BagelProcessor.from_pretrained(folder)
    assert caplog.text.count(f"{file}' is no JSON") == 1
    assert loaded.config.text_config.to_dict() == model.config.text_config.to_dict()
    if file == "config.json":
        assert torch.equal(logits(loaded), logits(model))


def test_slashes_hashes_and_commas_in_texts_of_settings_stay(tmp_path):
    from transformers_bagel.checkpoints import read_json

    (tmp_path / "a.json").write_text(
        '{"a": "http://x/#y, }", "b": "\\" // ,]", /* c */ "d": [1, 2,],}', encoding="utf-8"
    )
    assert read_json(tmp_path / "a.json") == {"a": "http://x/#y, }", "b": '" // ,]', "d": [1, 2]}


KNOWN = {
    "multimodal-reasoning-lab/Bagel-Zebra-CoT": ((980, 512), (1024, 512)),
    "org/SoT-7B": ((980, 512), (1024, 512)),
    "org/Shape-of-Thought": ((980, 512), (1024, 512)),
    "org/BAGEL-Canvas": ((980, 512), (1024, 512)),
    "org/TwiFF-7B": ((518, 224), (512, 256)),
    "org/COOPER_RL": ((518, 224), (1024, 512)),
    "org/UniCoT-7B-MoT": ((980, 378), (1024, 512)),
    "org/Scone": ((980, 378), (1024, 512)),
    "org/SenseNova-Vision": ((980, 224), (1024, 512)),
    "org/SenseNova-Vision-recon3d": ((448, 224), (512, 256)),
    "org/Omni-View": ((640, 384), (1024, 512)),
    "microsoft/Another-Bagel": ((980, 224), (1024, 512)),
}


def sides(size) -> tuple[int, int]:
    return size["longest_edge"], size["shortest_edge"]


@pytest.mark.parametrize("name", KNOWN)
def test_images_of_known_fine_tunes_have_the_sizes_of_their_training(name, tmp_path, caplog):
    folder = tmp_path / Path(name).name
    shutil.copytree(CHECKPOINT, folder)
    with caplog.at_level(logging.WARNING):
        processor = BagelProcessor.from_pretrained(folder).image_processor
    assert (sides(processor.size), sides(processor.vae_size)) == KNOWN[name]
    is_usual = KNOWN[name] == ((980, 224), (1024, 512))
    assert ("is applied" in caplog.text) != is_usual
    assert bool(image_settings(name)) != is_usual


@pytest.mark.parametrize("place", ["models--org--TwiFF-7B/snapshots/0a1b2c", "TwiFF-7B/transformer"])
def test_a_fine_tune_is_known_in_the_folders_of_the_libraries(place, tmp_path):
    assert fine_tune_of(tmp_path / place) is fine_tune_of("org/TwiFF-7B") is not None
    assert fine_tune_of(tmp_path / "TwiFF-7B" / "another") is None


def test_a_known_fine_tune_of_weights_alone_has_its_own_sizes_and_the_rest_of_its_base(tmp_path):
    folder = tmp_path / "TwiFF-7B"
    folder.mkdir()
    save_file(TUNED, folder / "model.safetensors")
    processor = BagelProcessor.from_pretrained(folder, base=CHECKPOINT).image_processor
    assert (sides(processor.size), sides(processor.vae_size)) == ((518, 224), (512, 256))


def test_arguments_and_preprocessor_config_say_more_than_the_name(tmp_path, caplog):
    folder = tmp_path / "TwiFF-7B"
    shutil.copytree(CHECKPOINT, folder)
    size = {"longest_edge": 700, "shortest_edge": 224}
    assert sides(BagelProcessor.from_pretrained(folder, size=size).image_processor.size) == (700, 224)
    settings = BagelProcessor.from_pretrained(CHECKPOINT, size=size).image_processor
    settings.save_pretrained(folder)
    caplog.clear()
    assert sides(BagelProcessor.from_pretrained(folder).image_processor.size) == (700, 224)
    assert "is applied" not in caplog.text


def test_extra_modules_are_listed_and_left_out_only_when_asked(repository):
    extra = {f"depth_head.layers.{number}.weight": torch.zeros(2, 2) for number in range(5)}
    folder = repository({"model.safetensors": TUNED | extra | {"camera_token": torch.zeros(2)}})
    with pytest.raises(ValueError, match=r"unknown tensors.*camera_token, depth_head.*`ignore_unexpected_keys=True`"):
        head(folder)
    assert is_tuned(head(folder, ignore_unexpected_keys=True))


QWEN = {f"model.layers.{number}.self_attn.q_proj.weight": torch.zeros(4, 4) for number in range(3)}
LORA = {"transformer.model.language_model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 64)}
OTHERS = {
    "another_model": (
        {"model.safetensors": QWEN},
        r"another model, model\.layers\.0\.self_attn\.q_proj\.weight",
    ),
    "another_model_of_another_name": ({"qwen.safetensors": QWEN}, "another model"),
    "a_lora": ({"pytorch_lora_weights.safetensors": LORA}, "is a LoRA .*load its base"),
    "a_lora_of_another_name": ({"style.safetensors": LORA}, "is a LoRA.*load its base"),
    "a_vae": ({}, "holds a VAE alone"),
}


@pytest.mark.parametrize("has_settings", [True, False])
@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_bagel_is_called_by_its_name(kind, has_settings, repository, monkeypatch):
    files, message = OTHERS[kind]
    drop = (INDEX,) if has_settings else (INDEX, "*.json", "merges.txt")
    folder = repository(files, drop)
    monkeypatch.setattr("transformers_bagel.loading.check_values", lambda *args: pytest.fail("read"))
    kwargs = {} if has_settings else {"base": CHECKPOINT}
    with pytest.raises((OSError, ValueError), match=message) as refused:
        head(folder, **kwargs)
    assert str(folder) in str(refused.value)


def test_a_checkpoint_of_another_bagel_says_which_tensors_differ(repository):
    other = {name: tensor for name, tensor in WEIGHTS.items() if "mlp_moe_gen" not in name}
    other["vae2llm.weight"] = torch.zeros(64, 20)
    with pytest.raises(ValueError, match=r"lacks tensors .*mlp_moe_gen.*has the wrong shape of tensor"):
        head(repository({"model.safetensors": other}))


@pytest.mark.parametrize("door", ["base", "config"])
def test_the_file_that_another_repository_names_is_not_taken_here(door, repository, weights_alone, tmp_path, caplog):
    """A base that says `transformers_weights`, and a fine-tune with a file of that name beside its own."""
    base = repository({"ema.safetensors": WEIGHTS}, name="base")
    settings = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(settings | {"transformers_weights": "ema.safetensors"}))
    folder = weights_alone("rvr.safetensors", TUNED)
    save_file(WEIGHTS, folder / "ema.safetensors")
    kwargs = {"base": base} if door == "base" else {"config": BagelConfig.from_pretrained(base)}
    with caplog.at_level(logging.WARNING):
        assert is_tuned(head(folder, **kwargs))
    assert "rvr.safetensors is read" in caplog.text
    named = BagelConfig.from_pretrained(base, transformers_weights="ema.safetensors")
    assert not is_tuned(head(base, config=named))
