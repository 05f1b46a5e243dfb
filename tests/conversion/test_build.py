# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""A new model from parts: it is its parts as far as they go, starts as it should beyond them, and can be trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import build_bagel
import numpy as np
import pytest
import repositories
import torch
from build_bagel import linear_patches, main
from convert_hf_to_bagel import convert_back
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from diffusers_bagel import BagelPipeline
from diffusers_bagel.loading import load_original_vae
from tests.conftest import CHECKPOINT, golden_image, max_error, training_samples
from tests.conversion.conftest import peak_bytes
from tests.peak_memory import write_holes
from transformers_bagel import BagelDataCollator, BagelForConditionalGeneration, BagelProcessor
from transformers_bagel.image_processing_bagel import patchify
from transformers_bagel.segments import SPECIAL_TOKENS


# What Qwen2's tokenizer has of BAGEL's tokens.
QWEN2_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
NEW_TOKENS = [token for token in SPECIAL_TOKENS.values() if token not in QWEN2_TOKENS]


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """Biases that are not zero and norms that are not one, so that nothing can be lost unseen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model.eval()


def save_language_model(folder: Path, more_rows: int = 0, **settings) -> Qwen2ForCausalLM:
    """With a table as long as its tokenizer's vocabulary, or longer."""
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        ["what is it? a red circle"], 300, new_special_tokens=QWEN2_TOKENS, show_progress=False
    )
    tokenizer.chat_template = "{{ messages }}"
    sizes = {
        "vocab_size": len(tokenizer) + more_rows,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 5000.0,
        "rms_norm_eps": 1e-5,
    }
    model = randomised(Qwen2ForCausalLM(Qwen2Config(**(sizes | settings))))
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return model


def vision_config(**settings) -> SiglipVisionConfig:
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 59,
        "patch_size": 14,
    }
    return SiglipVisionConfig(**(sizes | settings))


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """Folders of parts. Tests that change one copy it."""
    folder = tmp_path_factory.mktemp("parts")
    save_language_model(folder / "language")
    randomised(SiglipVisionModel(vision_config())).save_pretrained(folder / "vision")
    load_original_vae(CHECKPOINT).save_pretrained(folder / "flux" / "vae")
    return folder


@pytest.fixture(scope="module")
def language_model(parts) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM.from_pretrained(parts / "language")


@pytest.fixture(scope="module")
def siglip(parts) -> SiglipVisionModel:
    return SiglipVisionModel.from_pretrained(parts / "vision")


def arguments(parts: Path, **changed: object) -> list[str]:
    """Of the command, without DST."""
    settings = {
        "language_model": parts / "language",
        "vision_model": parts / "vision",
        "vae": parts / "flux",
        "max_latent_size": 8,
    } | changed
    return [str(item) for key, value in settings.items() for item in (f"--{key.replace('_', '-')}", value)]


def build(parts: Path, folder: Path, *flags: str, **changed: object) -> Path:
    assert main([str(folder), *arguments(parts, **changed), "--verify", *flags]) == 0
    return folder


@pytest.fixture(scope="module")
def built(parts, tmp_path_factory) -> Path:
    return build(parts, tmp_path_factory.mktemp("built") / "bagel", max_shard_size="200KB")


@pytest.fixture(scope="module")
def built_model(built) -> BagelForConditionalGeneration:
    return BagelForConditionalGeneration.from_pretrained(built)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}


def logits(model: PreTrainedModel, vocabulary: int) -> torch.Tensor:
    ids = torch.randint(vocabulary, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids).logits[..., :vocabulary]


def full_picture(siglip: SiglipVisionModel, side: int | None = None) -> tuple[Image.Image, torch.Tensor]:
    """A picture of noise, and its pixels as SigLIP's processor gives them."""
    side = side or siglip.config.image_size // siglip.config.patch_size
    shape = (side * siglip.config.patch_size, side * siglip.config.patch_size, 3)
    picture = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(picture), torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1


def seen(model: BagelForConditionalGeneration, folder: Path, picture: Image.Image) -> torch.Tensor:
    """What the tower makes of a picture, before the connector; positions as in the whole model."""
    processor = BagelProcessor.from_pretrained(folder)
    inputs = processor.image_processor(picture, do_resize=False, return_tensors="pt")
    with torch.no_grad():
        return model.get_image_features(**inputs).last_hidden_state


def test_it_talks_as_its_language_model_does(built_model, language_model):
    vocabulary = language_model.config.vocab_size
    assert max_error(logits(built_model, vocabulary), logits(language_model, vocabulary)) < 1e-5


def test_what_it_generates_is_what_its_language_model_generates(built_model, language_model):
    ids = torch.tensor([[5, 6, 7]])
    vocabulary = language_model.config.vocab_size
    # Neither an end, nor a token that the one has and the other has not.
    special = [*range(vocabulary - 3, built_model.config.text_config.vocab_size)]
    settings = {"max_new_tokens": 8, "do_sample": False}
    theirs = language_model.generate(ids, **settings, suppress_tokens=special[:3])
    assert theirs.shape == (1, 11)
    assert torch.equal(built_model.generate(ids, **settings, suppress_tokens=special), theirs)


def test_it_sees_as_its_tower_does_without_the_last_layer(built, built_model, siglip):
    picture, pixels = full_picture(siglip, side=4)
    with torch.no_grad():
        states = siglip(pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
        expected = siglip.post_layernorm(states[-2])[0]
    assert max_error(seen(built_model, built, picture), expected) < 1e-5


def test_all_layers_of_the_tower_can_be_kept(parts, tmp_path, siglip):
    folder = build(parts, tmp_path / "bagel", num_vision_layers=3)
    picture, pixels = full_picture(siglip)
    with torch.no_grad():
        expected = siglip(pixels, interpolate_pos_encoding=True).last_hidden_state[0]
    model = BagelForConditionalGeneration.from_pretrained(folder)
    assert max_error(seen(model, folder, picture), expected) < 1e-5


@pytest.mark.parametrize("channels_first", [(8, 3, 14, 14), (5, 3, 2, 2)])
def test_a_convolution_of_patches_becomes_the_same_linear_layer(channels_first):
    kernel = torch.randn(channels_first)
    patch_size = channels_first[-1]
    image = torch.randn(3, 3 * patch_size, 4 * patch_size)
    expected = torch.nn.functional.conv2d(image[None], kernel, stride=patch_size)[0].flatten(1).T
    assert max_error(patchify(image, patch_size) @ linear_patches(kernel).T, expected) < 1e-4


def test_a_tower_beside_a_text_model_is_the_same_tower(parts, tmp_path, siglip, capsys):
    text = {"hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    both = SiglipModel(SiglipConfig(vision_config=vision_config().to_dict(), text_config=text | {"vocab_size": 50}))
    both.vision_model.load_state_dict(siglip.state_dict())
    both.save_pretrained(tmp_path / "siglip")
    assert any(name.startswith("vision_model.") for name in weights_of(tmp_path / "siglip"))
    alone = weights_of(build(parts, tmp_path / "one"))
    capsys.readouterr()
    assert all(
        torch.equal(weight, alone[name])
        for name, weight in weights_of(build(parts, tmp_path / "two", vision_model=tmp_path / "siglip")).items()
    )
    assert "tensors of encoder.layers.2, head, logit_bias, logit_scale, text_model." in capsys.readouterr().out


def test_the_table_of_positions_is_resized_as_siglip_resizes_its_own(parts, tmp_path, siglip, capsys):
    folder = build(parts, tmp_path / "bagel", vit_max_num_patch_per_side=6, num_vision_layers=3)
    assert "resized from 4 a side to 6" in capsys.readouterr().out
    picture, pixels = full_picture(siglip, side=6)
    with torch.no_grad():
        expected = siglip(pixels, interpolate_pos_encoding=True).last_hidden_state[0]
    model = BagelForConditionalGeneration.from_pretrained(folder)
    assert max_error(seen(model, folder, picture), expected) < 1e-5
    assert model.config.vision_config.image_size == 84
    assert BagelProcessor.from_pretrained(folder).image_processor.size["longest_edge"] == 84


def test_the_generation_expert_starts_as_a_copy(built):
    weights = weights_of(built)
    copies = [name for name in weights if "_moe_gen" in name]
    # Seven projections, three of them with a bias, and two norms a layer; and the last norm.
    assert len(copies) == 2 * (7 + 3 + 2) + 1
    assert all(torch.equal(weights[name], weights[name.replace("_moe_gen", "")]) for name in copies)


def test_the_velocity_starts_at_zero(built):
    pipe = BagelPipeline.from_pretrained(built)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0))
    settings = {"height": 64, "width": 64, "num_inference_steps": 2}
    drawn = pipe("a red circle", latents=noise, output_type="latent", **settings).images
    assert torch.equal(drawn, noise)
    assert pipe("a red circle", **settings).images[0].size == (64, 64)
    assert pipe("make it red", image=golden_image("square"), num_inference_steps=2).images[0].width <= 128


def test_the_vocabulary_has_the_missing_tokens(built, built_model, parts, language_model):
    processor = BagelProcessor.from_pretrained(built)
    ids = {name: processor.tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL_TOKENS.items()}
    old = language_model.config.vocab_size
    assert sorted(processor.tokenizer.convert_tokens_to_ids(NEW_TOKENS)) == [*range(old, old + 4)]
    config = built_model.config
    own = config.text_config
    assert own.vocab_size == old + 4
    for name, token_id in ids.items():
        assert getattr(own if hasattr(own, name) else config, name) == token_id
    generation = built_model.generation_config
    assert (generation.bos_token_id, generation.eos_token_id) == (ids["bos_token_id"], ids["eos_token_id"])
    text = processor.apply_chat_template([{"role": "user", "content": "a red circle"}])
    assert text == "<|im_start|>a red circle<|im_end|>"


def test_new_tokens_start_at_the_mean_of_the_old(built_model, language_model):
    old = language_model.config.vocab_size
    for table, theirs in (
        (built_model.get_input_embeddings(), language_model.get_input_embeddings()),
        (built_model.lm_head, language_model.lm_head),
    ):
        assert torch.equal(table.weight[:old], theirs.weight)
        assert max_error(table.weight[old:], theirs.weight.mean(0).expand(4, -1)) < 1e-6


def test_the_mean_is_the_same_in_pieces(built, parts, tmp_path, monkeypatch):
    monkeypatch.setattr(build_bagel, "PIECE", 3000)
    again = weights_of(build(parts, tmp_path / "bagel"))
    assert all(torch.equal(weight, again[name]) for name, weight in weights_of(built).items())


def test_new_tokens_take_rows_that_are_there(parts, tmp_path, capsys):
    language = save_language_model(tmp_path / "language", more_rows=20)
    model = BagelForConditionalGeneration.from_pretrained(
        build(parts, tmp_path / "bagel", language_model=tmp_path / "language")
    )
    assert torch.equal(model.get_input_embeddings().weight, language.get_input_embeddings().weight)
    assert torch.equal(model.lm_head.weight, language.lm_head.weight)
    said = capsys.readouterr().out
    assert f"New in the vocabulary: {', '.join(NEW_TOKENS)}." in said and "grow" not in said


@pytest.mark.parametrize("more_rows", [0, 20])
def test_a_language_model_with_one_table_gets_a_head_of_its_own(more_rows, parts, tmp_path):
    language = save_language_model(tmp_path / "language", more_rows=more_rows, tie_word_embeddings=True)
    assert "lm_head.weight" not in weights_of(tmp_path / "language")
    folder = build(parts, tmp_path / "bagel", language_model=tmp_path / "language")
    model = BagelForConditionalGeneration.from_pretrained(folder)
    assert not model.config.tie_word_embeddings
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    vocabulary = language.config.vocab_size
    assert max_error(logits(model, vocabulary), logits(language, vocabulary)) < 1e-5


def test_queries_and_keys_are_normalised_if_asked_for(parts, tmp_path, built_model):
    assert not built_model.config.text_config.qk_norm
    folder = build(parts, tmp_path / "bagel", "--qk-norm")
    norms = {name: weight for name, weight in weights_of(folder).items() if "q_norm" in name or "k_norm" in name}
    assert len(norms) == 8
    assert all(torch.equal(weight, torch.ones(16)) for weight in norms.values())
    model = BagelForConditionalGeneration.from_pretrained(folder)
    assert model.config.text_config.qk_norm
    assert max_error(logits(model, 250), logits(built_model, 250)) > 1e-3


def test_it_loads_with_nothing_missing_and_nothing_left_over(built):
    for loader in (BagelForConditionalGeneration, AutoModelForImageTextToText):
        _, info = loader.from_pretrained(built, output_loading_info=True)
        assert not any(info.values()), info


def test_its_settings_are_those_of_its_parts(built, built_model):
    text, vision = built_model.config.text_config, built_model.config.vision_config
    assert (text.rope_parameters["rope_theta"], text.rms_norm_eps) == (5000.0, 1e-5)
    assert (vision.num_hidden_layers, vision.image_size, vision.patch_size) == (2, 56, 14)
    written = json.loads((built / "config.json").read_text())
    assert (written["llm_config"]["rope_theta"], written["vit_config"]["num_hidden_layers"]) == (5000.0, 3)
    assert written["vae_config"] == {"z_channels": 4, "downsample": 8}
    assert (built_model.config.latent_channels, built_model.config.latent_downsample) == (4, 8)
    assert (built_model.config.max_latent_size, built_model.config.vit_max_num_patch_per_side) == (8, 4)


def test_it_can_be_trained(built):
    pipe = BagelPipeline.from_pretrained(built)
    collator = BagelDataCollator(pipe.processor, vae=pipe.vae, text_dropout=0.0, vit_dropout=0.0, vae_dropout=0.0)
    model = pipe.transformer.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        torch.manual_seed(0)
        output = model(**collator(training_samples("draw", "look", "talk")))
        losses.append(output.loss.item())
        optimizer.zero_grad()
        output.loss.backward()
        if len(losses) == 1:
            assert model.model.llm2vae.weight.grad.abs().max() > 0
            assert model.model.connector.fc1.weight.grad.abs().max() > 0
        optimizer.step()
    # Once the head is off zero the gradient reaches the generation expert too.
    assert model.model.language_model.layers[0].mlp_moe_gen.up_proj.weight.grad.abs().max() > 0
    assert losses[-1] < losses[0]


def test_weights_are_in_shards_of_the_size_asked_for(built):
    index = json.loads((built / "model.safetensors.index.json").read_text())
    files = {file.name for file in built.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files and len(files) > 2
    assert all((built / file).stat().st_size < 220_000 for file in files)
    assert set(index["weight_map"]) == set(weights_of(built))


def test_memory_does_not_grow_with_the_parts(parts, tmp_path):
    config = save_language_model(tmp_path / "language", num_hidden_layers=1).config
    config.intermediate_size = 500_000
    config.save_pretrained(tmp_path / "language")
    with torch.device("meta"):
        wide = Qwen2ForCausalLM(config).state_dict()
    write_holes(tmp_path / "language" / "model.safetensors", wide, "F32", torch.float32)
    size = (tmp_path / "language" / "model.safetensors").stat().st_size
    assert size > 380e6
    command = [str(tmp_path / "bagel"), *arguments(parts, language_model=tmp_path / "language"), "--verify"]
    # A small build takes something, too.
    idle = peak_bytes("build_bagel", str(tmp_path / "small"), *arguments(parts))
    peak = peak_bytes("build_bagel", *command)
    assert peak - idle < 150e6, f"{(peak - idle) / 1e6:.0f} MB for {size / 1e6:.0f} MB"


def test_the_same_seed_builds_the_same_and_another_seed_does_not(built, parts, tmp_path):
    weights, again = weights_of(built), weights_of(build(parts, tmp_path / "again"))
    other = weights_of(build(parts, tmp_path / "other", seed=1))
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())
    differs = {name.split(".")[0] for name, weight in weights.items() if not torch.equal(weight, other[name])}
    assert differs == {"connector", "vae2llm", "time_embedder"}


def test_the_type_of_the_weights_is_the_language_models_or_the_one_asked_for(parts, tmp_path, language_model):
    shutil.copytree(parts / "language", tmp_path / "language")
    rounded = Qwen2ForCausalLM.from_pretrained(parts / "language", dtype=torch.bfloat16)
    rounded.save_pretrained(tmp_path / "language")
    build(parts, tmp_path / "own", language_model=tmp_path / "language")
    build(parts, tmp_path / "asked", dtype="bfloat16")
    own, asked = weights_of(tmp_path / "own"), weights_of(tmp_path / "asked")
    assert {weight.dtype for weight in (*own.values(), *asked.values())} == {torch.bfloat16}
    # The mean of the rows is taken before or after they are rounded.
    tables = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
    assert all(torch.equal(weight, asked[name]) for name, weight in own.items() if name not in tables)
    assert all(max_error(own[name], asked[name]) < 1e-2 for name in tables)
    assert BagelForConditionalGeneration.from_pretrained(tmp_path / "own", dtype="auto").dtype == torch.bfloat16
    vaes = [next(iter(weights_of(tmp_path / name / "vae").values())).dtype for name in ("own", "asked")]
    assert vaes == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("kind", ["vae folder", "folder of the original layout", "original file"])
def test_the_vae_comes_from_either_layout(kind, built, parts, tmp_path):
    shutil.copy(CHECKPOINT / "ae.safetensors", tmp_path / "renamed.safetensors")
    source = {
        "vae folder": parts / "flux" / "vae",
        "folder of the original layout": CHECKPOINT,
        "original file": tmp_path / "renamed.safetensors",
    }[kind]
    weights = weights_of(build(parts, tmp_path / "bagel", vae=source) / "vae")
    expected = weights_of(built / "vae")
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())


def test_it_goes_to_the_original_layout_too(built, built_model, tmp_path):
    convert_back(str(built), tmp_path / "original")
    pipe = BagelPipeline.from_pretrained(tmp_path / "original")
    assert torch.equal(logits(pipe.transformer, 250), logits(built_model, 250))
    assert pipe.transformer.config.vision_config.num_hidden_layers == 2


def test_the_card_names_the_parts_and_not_where_they_were(built, parts):
    card = ModelCard.load(built / "README.md")
    assert card.data.base_model == ["language", "vision", "flux"]
    assert "built from `language`, `vision`, `flux`" in card.text and "untrained" in card.text
    assert str(parts) not in (built / "README.md").read_text()


def test_a_killed_build_goes_on_if_it_is_the_same(parts, tmp_path, monkeypatch, capsys):
    write, written = repositories.write_shard, []

    def killed(shard, *args):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard.name)
        write(shard, *args)

    monkeypatch.setattr(repositories, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        build(parts, tmp_path / "bagel", max_shard_size="200KB")
    monkeypatch.undo()
    before = [(tmp_path / "bagel" / name).stat().st_mtime_ns for name in written]
    other = arguments(parts, max_shard_size="200KB", seed=1)
    assert main([str(tmp_path / "bagel"), *other]) == 2
    assert "another conversion" in capsys.readouterr().err
    build(parts, tmp_path / "bagel", max_shard_size="200KB")
    assert [(tmp_path / "bagel" / name).stat().st_mtime_ns for name in written] == before
    BagelForConditionalGeneration.from_pretrained(tmp_path / "bagel")


def refused(parts: Path, folder: Path, capsys, **changed: object) -> str:
    """The error of a build that must fail before it writes."""
    assert main([str(folder / "bagel"), *arguments(parts, **changed)]) == 2
    assert not (folder / "bagel").exists()
    return capsys.readouterr().err


def edited(source: Path, folder: Path, **settings: object) -> Path:
    """A copy of a part whose config.json says something else; `None` takes a setting away."""
    copy = Path(shutil.copytree(source, folder / "edited"))
    said = json.loads((copy / "config.json").read_text()) | settings
    (copy / "config.json").write_text(json.dumps({key: value for key, value in said.items() if value is not None}))
    return copy


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        ("language", {"model_type": "qwen3"}, "of the type 'qwen3', and 'qwen2' is wanted"),
        ("language", {"model_type": None}, "of the type None"),
        ("language", {"use_sliding_window": True}, "`use_sliding_window`"),
        ("language", {"hidden_size": 66}, "`hidden_size` is 66"),
        ("language", {"num_attention_heads": 3}, "heads"),
        ("language", {"num_key_value_heads": 3}, "`num_key_value_heads` (3)"),
        ("language", {"num_attention_heads": 0}, "`num_attention_heads`"),
        ("language", {"hidden_size": "wide"}, "hidden_size"),
        ("language", {"intermediate_size": 80}, "mlp.gate_proj.weight has the shape (96, 64) instead of (80, 64)"),
        ("language", {"num_hidden_layers": 3, "layer_types": None}, "lacks model.layers.2."),
        ("language", {"num_hidden_layers": 1, "layer_types": None}, "has the unknown model.layers.1."),
        ("language", {"num_hidden_layers": 3}, "layer_types"),
        ("vision", {"model_type": "siglip2"}, "of the type 'siglip2', and 'siglip'"),
        ("vision", {"num_attention_heads": 5}, "heads"),
        ("vision", {"image_size": [56, 70]}, "squares of 3 channels"),
        ("vision", {"num_channels": 1}, "squares of 3 channels"),
        ("vision", {"num_hidden_layers": 1}, "has 1 layers, and 0 are asked for"),
        ("vision", {"image_size": 100}, "position_embedding.weight has the shape (16, 48) instead of (49, 48)"),
        ("vae", {"_class_name": "AutoencoderKLFlux2"}, "'AutoencoderKL' is wanted"),
        ("vae", {"shift_factor": None}, "`shift_factor` of None"),
        ("vae", {"block_out_channels": [32, 32, 32, 64]}, "does not fit its config.json"),
    ],
)
def test_a_part_of_another_kind_is_refused(part, settings, message, parts, tmp_path, capsys):
    argument = {"language": "language_model", "vision": "vision_model", "vae": "vae"}[part]
    source = edited(parts / "flux" / "vae" if part == "vae" else parts / part, tmp_path, **settings)
    said = refused(parts, tmp_path, capsys, **{argument: source})
    assert f"--{argument.replace('_', '-')} '{source}': " in said and message in said


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("max_latent_size", 0, "--max-latent-size must be at least 1, got 0"),
        ("vit_max_num_patch_per_side", -3, "--vit-max-num-patch-per-side must be at least 1, got -3"),
        ("num_vision_layers", 0, "--num-vision-layers must be at least 1, got 0"),
        ("num_vision_layers", 4, "has 3 layers, and 4 are asked for. Pass --num-vision-layers."),
        ("max_shard_size", "big", "big"),
        ("language_model", "/nowhere", "--language-model '/nowhere': '/nowhere' is no file, no folder"),
        ("vision_model", "/nowhere", "--vision-model '/nowhere'"),
        ("vae", "/nowhere", "--vae '/nowhere'"),
    ],
)
def test_an_argument_that_cannot_be_is_named(argument, value, message, parts, tmp_path, capsys):
    assert message in refused(parts, tmp_path, capsys, **{argument: value})


@pytest.mark.parametrize("part", ["language", "vision", "vae"])
def test_pickles_are_not_read(part, parts, tmp_path, capsys):
    argument = {"language": "language_model", "vision": "vision_model", "vae": "vae"}[part]
    source = Path(shutil.copytree(parts / "flux" / "vae" if part == "vae" else parts / part, tmp_path / "source"))
    for file in source.glob("*.safetensors"):
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    assert "Only safetensors are read" in refused(parts, tmp_path, capsys, **{argument: source})
    pickle = next(source.glob("*.bin"))
    assert "is a pickle" in refused(parts, tmp_path, capsys, **{argument: pickle})


@pytest.mark.parametrize("part", ["language", "vision", "flux"])
def test_a_truncated_part_is_refused(part, parts, tmp_path, capsys):
    argument = {"language": "language_model", "vision": "vision_model", "flux": "vae"}[part]
    source = Path(shutil.copytree(parts / part, tmp_path / part))
    (file,) = source.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-10])
    said = refused(parts, tmp_path, capsys, **{argument: source})
    assert f"'{source}': The checkpoint file '{file}' is truncated" in said


def test_a_link_out_of_a_part_is_refused(parts, tmp_path, capsys):
    source = Path(shutil.copytree(parts / "language", tmp_path / "language"))
    shutil.move(source / "tokenizer.json", tmp_path / "tokenizer.json")
    (source / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    assert "leads out of" in refused(parts, tmp_path, capsys, language_model=source)


def test_a_language_model_needs_its_tokenizer(parts, tmp_path, capsys):
    source = Path(shutil.copytree(parts / "language", tmp_path / "language"))
    for file in source.glob("tokenizer.json"):
        file.write_text("{")
    assert "its tokenizer cannot be read" in refused(parts, tmp_path, capsys, language_model=source)
    (source / "tokenizer.json").unlink()
    (source / "vocab.json").unlink(missing_ok=True)
    assert "neither tokenizer.json nor vocab.json" in refused(parts, tmp_path, capsys, language_model=source)


def test_a_quantised_language_model_is_refused(parts, tmp_path, capsys):
    source = Path(shutil.copytree(parts / "language", tmp_path / "language"))
    weights = weights_of(source)
    weights["model.layers.0.mlp.up_proj.weight_scale"] = torch.ones(1)
    save_file(weights, source / "model.safetensors")
    said = refused(parts, tmp_path, capsys, language_model=source)
    assert "has the unknown model.layers.0.mlp.up_proj.weight_scale" in said


def test_a_folder_that_is_taken_is_left_alone(parts, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main([str(tmp_path), *arguments(parts)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_space_on_the_disk_is_looked_for_first(parts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("", (), {"free": 1000})())
    assert "GB free" in refused(parts, tmp_path, capsys)
