"""The contracts that the library's common tests check of every model."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import counted_sdpa, load_model, max_error
from tests.transformers_bagel.test_attention import with_latents


@pytest.fixture
def training_row(model):
    """A packed sequence with a text sample and a drawing, whose loss reaches every weight but the tower's."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, 400, (8,), generator=generator).tolist()
    block = [config.vision_start_token_id, *[config.latent_token_id] * 6, config.vision_end_token_id]
    ids = torch.tensor([[421, *text, 422, 421, *text, 422, *block]])
    labels = ids.clone()
    labels[:, 10:] = -100
    return {
        "input_ids": ids,
        "labels": labels,
        "document_ids": torch.tensor([[0] * 10 + [1] * (ids.shape[1] - 10)]),
        "latents": torch.randn(6, 16, generator=generator),
        "noise": torch.randn(6, 16, generator=generator),
        "latent_grid_hw": torch.tensor([[2, 3]]),
        "timesteps": torch.tensor([0.4]),
    }


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_every_weight_of_the_language_model_is_trained(training_row):
    model = load_model().train()
    out = model(**training_row)
    assert out.loss.item() == pytest.approx(out.ce_loss.item() + out.mse_loss.item())
    out.loss.backward()
    trained = {name for name, grad in gradients(model).items() if grad.abs().max() > 0}
    # The last layer's understanding output at the drawing's markers goes nowhere, but the text's does.
    seen_only = {name for name, _ in model.named_parameters() if "vision_tower" in name or "connector" in name}
    assert trained == {name for name, _ in model.named_parameters()} - seen_only


def test_gradient_checkpointing_gives_the_same_gradients(training_row):
    plain, checkpointed = load_model().train(), load_model().train()
    checkpointed.gradient_checkpointing_enable()
    losses = []
    for model in (plain, checkpointed):
        losses.append(model(**training_row).loss)
        losses[-1].backward()
    assert torch.equal(*losses)
    expected = gradients(plain)
    assert expected.keys() == gradients(checkpointed).keys()
    assert all(max_error(grad, expected[name]) <= 1e-7 for name, grad in gradients(checkpointed).items())


def test_losses_without_targets_are_zero_and_keep_the_graph(model, training_row):
    clean = dict(training_row, timesteps=torch.zeros(1))
    loss = model(**clean).mse_loss
    assert loss.item() == 0.0 and loss.requires_grad


def test_embeddings_may_be_passed(model, encode):
    inputs = encode(["@wide", "what is it?"])
    ids = inputs.pop("input_ids")
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        expected = model(input_ids=ids, **inputs).logits
        assert max_error(model(inputs_embeds=embeds, **inputs).logits, expected) <= 1e-6
        features = {"image": model.get_image_features(inputs.pop("pixel_values"), inputs.pop("image_grid_hw"))}
        assert max_error(model(input_ids=ids, mm_encoder_outputs=features, **inputs).logits, expected) <= 1e-6


def test_embeddings_with_images_need_their_places(model, encode):
    inputs = encode(["@wide", "what is it?"])
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    del inputs["mm_token_type_ids"]
    with pytest.raises(ValueError, match="mm_token_type_ids"):
        model(inputs_embeds=embeds, **inputs)


def test_ids_and_embeddings_together_are_refused(model):
    ids = torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match="exactly one of `input_ids` or `inputs_embeds`"):
        model(input_ids=ids, inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match="`position_ids` must not be negative"):
        model(input_ids=ids, position_ids=torch.tensor([[-1, 0]]))


@pytest.mark.parametrize("latents", [False, True])
def test_hidden_states_and_attentions_are_in_the_order_of_the_sequence(latents, encode):
    model = load_model(attn_implementation="eager")
    inputs = encode(["@tall", "what is it?"], generation_mode="image" if latents else "text")
    inputs = with_latents(dict(inputs)) if latents else dict(inputs)
    tokens, config = inputs["input_ids"].shape[1], model.config.text_config
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == config.num_hidden_layers + 1
    assert {tuple(states.shape) for states in out.hidden_states} == {(1, tokens, config.hidden_size)}
    assert len(out.attentions) == config.num_hidden_layers
    assert {tuple(maps.shape) for maps in out.attentions} == {(1, config.num_attention_heads, tokens, tokens)}
    assert max_error(model.lm_head(out.hidden_states[-1]), out.logits) <= 1e-6
    # The text in front of the answer is embedded, and stands last.
    embedded = model.get_input_embeddings()(inputs["input_ids"][:, -1:])
    assert torch.equal(out.hidden_states[0][:, -1:], embedded)


def test_tuples_equal_outputs(model, encode):
    inputs = encode(["what is it?"])
    with torch.no_grad():
        out, values = model(**inputs), model(**inputs, return_dict=False)
    assert torch.equal(values[0], out.logits)


def test_logits_may_be_kept_for_the_last_tokens_only(model, encode):
    inputs = encode(["what is it?"])
    with torch.no_grad():
        assert max_error(model(**inputs, logits_to_keep=2).logits, model(**inputs).logits[:, -2:]) <= 1e-5


def test_bfloat16_stays_near_float32(model, encode):
    rounded = load_model(dtype=torch.bfloat16)
    inputs = with_latents(dict(encode(["@square", "what is it?"], generation_mode="image")))
    with torch.no_grad():
        out, expected = rounded(**inputs), model(**inputs)
    assert out.logits.dtype == out.velocity.dtype == torch.bfloat16
    assert max_error(out.logits, expected.logits) <= 0.05 * expected.logits.abs().max().item()
    assert max_error(out.velocity, expected.velocity) <= 0.05 * expected.velocity.abs().max().item()


def test_the_attention_can_be_changed_after_loading(encode):
    model = load_model()
    inputs = encode(["@square", "what is it?"])
    calls = {}
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        with counted_sdpa() as calls[name]:
            model(**inputs)
    assert calls["eager"] == [0]
    assert calls["sdpa"][0] >= sum(
        part.num_hidden_layers for part in (model.config.text_config, model.config.vision_config)
    )


@torch.no_grad()
def test_whoever_calls_may_lead_through_the_layers(model, encode):
    inputs = encode(["a red circle"])
    led: list[int] = []

    def run(layers, hidden_states: torch.Tensor, **given) -> torch.Tensor:
        for layer in layers:
            led.append(layer.layer_idx)
            hidden_states = layer(hidden_states, **given)
        return hidden_states

    assert torch.equal(model(**inputs, run_layers=run).logits, model(**inputs).logits)
    assert led == [0, 1, 2]
    assert not torch.equal(
        model(**inputs, run_layers=lambda layers, states, **_: states).logits, model(**inputs).logits
    )
