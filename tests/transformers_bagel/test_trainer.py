"""transformers' `Trainer` and plain accelerate train on a list of conversations."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from tests.conftest import load_model, max_error, training_samples
from transformers_bagel import BagelDataLoader, BagelForConditionalGeneration, loss_totals
from transformers_bagel.training.trainer import BagelTrainer


MIXED = ("talk", "edit", "look", "draw")


@pytest.fixture(scope="session")
def loaded() -> BagelForConditionalGeneration:
    return load_model()


@pytest.fixture
def fresh(loaded) -> BagelForConditionalGeneration:
    return copy.deepcopy(loaded).train()


@pytest.fixture(autouse=True)
def own_accelerator():
    """Accelerate keeps its settings for the process; one test's are not another's."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def train(collate, tmp_path):
    def make(model, names=MIXED, collator=None, kind=Trainer, **settings) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "run"),
            remove_unused_columns=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            **({"logging_steps": 1, "save_strategy": "no", "per_device_train_batch_size": 2} | settings),
        )
        return kind(
            model,
            arguments,
            data_collator=collator or collate(),
            train_dataset=training_samples(*names),
            eval_dataset=training_samples(*names),
        )

    return make


def fixed_loss(model: BagelForConditionalGeneration, collate, names=MIXED) -> torch.Tensor:
    """Both losses on choices that stay the same."""
    collator = collate()
    batch = collator.pack([collator.encode(sample, seed) for seed, sample in enumerate(training_samples(*names))])
    with torch.no_grad():
        outputs = model.eval()(**batch)
    model.train()
    return torch.stack([outputs.ce_loss, outputs.mse_loss])


def test_the_loss_goes_down_under_trainer(fresh, train, collate):
    before = fixed_loss(fresh, collate)
    # Batches of one sample: each lacks a modality.
    trainer = train(fresh, max_steps=24, learning_rate=5e-3, per_device_train_batch_size=1, weight_decay=0.0)
    trainer.train()
    after = fixed_loss(fresh, collate)
    assert (after < 0.8 * before).all(), (before, after)
    assert len([entry for entry in trainer.state.log_history if "loss" in entry]) == 24


def test_trainer_evaluates(fresh, train):
    metrics = train(fresh, max_steps=1, per_device_eval_batch_size=1).evaluate()
    assert 0 < metrics["eval_loss"] < 20


def test_trainers_loss_is_the_models_mean(fresh, train, collate):
    """The loss and the step of two accumulated micro-batches: the mean of their losses."""
    names = ("talk", "look")
    reference = copy.deepcopy(fresh)
    losses = [reference(**collate()(training_samples(name))).loss for name in names]
    (sum(losses) / 2).backward()
    expected = {name: parameter - 0.1 * parameter.grad for name, parameter in reference.named_parameters()}
    trainer = train(
        fresh,
        names,
        max_steps=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(sum(losses).item() / 2, abs=1e-3)
    for name, parameter in fresh.named_parameters():
        assert max_error(parameter.detach(), expected[name].detach()) <= 1e-5, name


def test_bagel_trainers_loss_is_that_of_one_large_batch(fresh, train, collate):
    """Three micro-batches of which none has both kinds of targets."""
    names = ("talk", "draw", "look")
    reference = copy.deepcopy(fresh)
    collator = collate(generator=torch.Generator().manual_seed(5))
    batches = [collator([sample]) for sample in training_samples(*names)]
    totals = sum(loss_totals(batch) for batch in batches)
    losses = [reference(**batch, loss_totals=totals).loss for batch in batches]
    sum(losses).backward()
    trainer = train(
        fresh,
        names,
        collate(generator=torch.Generator().manual_seed(5)),
        BagelTrainer,
        max_steps=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=3,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(sum(losses).item(), abs=1e-3)
    for name, parameter in reference.named_parameters():
        expected = parameter.detach() - 0.1 * parameter.grad
        assert max_error(dict(fresh.named_parameters())[name].detach(), expected) <= 1e-5, name
    assert 0 < trainer.evaluate()["eval_loss"] < 20


def test_a_bad_sample_does_not_stop_trainer(fresh, train, collate):
    collator = collate(on_error="skip")
    trainer = train(fresh, MIXED, collator, max_steps=2, per_device_train_batch_size=5)
    trainer.train_dataset = [*trainer.train_dataset, {"id": "bad", "messages": [{"role": "robot", "content": "a"}]}]
    trainer.train()
    # A sample's number is its place in the batch, so its id tells which it is.
    assert {item.name.split(" (")[1] for item in collator.skipped} == {"id 'bad')"}
    assert trainer.state.global_step == 2


def test_trainer_checkpoints_activations_and_keeps_parts_frozen(fresh, train, collate):
    fresh.freeze("vit", "und")
    before = copy.deepcopy(fresh.state_dict())
    train(fresh, max_steps=2, learning_rate=1e-2, gradient_checkpointing=True).train()
    moved = {name for name, tensor in fresh.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all("_moe_gen" in name or name.split(".")[1] in GEN | {"connector"} for name in moved)
    assert {name.split(".")[1] for name in moved} >= GEN


GEN = {"vae2llm", "llm2vae", "time_embedder"}


def test_what_trainer_saved_loads_again(fresh, train, collate, tmp_path):
    trainer = train(fresh, max_steps=1, learning_rate=1e-2)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    saved = BagelForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert torch.equal(fixed_loss(saved, collate), fixed_loss(fresh, collate))


def test_the_loss_goes_down_under_plain_accelerate(fresh, collate):
    before = fixed_loss(fresh, collate)
    accelerator = Accelerator(cpu=True)
    loader = DataLoader(training_samples(*MIXED), batch_size=1, collate_fn=collate(), shuffle=True)
    model, optimizer, loader = accelerator.prepare(fresh, torch.optim.AdamW(fresh.parameters(), lr=5e-3), loader)
    for _ in range(6):
        for batch in loader:
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    after = fixed_loss(accelerator.unwrap_model(model), collate)
    assert (after < 0.8 * before).all(), (before, after)


def test_the_loss_goes_down_on_packed_rows_of_the_endless_loader(fresh, collate):
    before = fixed_loss(fresh, collate)
    accelerator = Accelerator(cpu=True)
    loader = BagelDataLoader(training_samples(*MIXED), collate(max_tokens=250))
    model, optimizer = accelerator.prepare(fresh, torch.optim.AdamW(fresh.parameters(), lr=5e-3))
    for _, batch in zip(range(12), loader, strict=False):
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    after = fixed_loss(accelerator.unwrap_model(model), collate)
    assert (after < 0.8 * before).all(), (before, after)


def test_accumulation_under_accelerate_with_totals_is_one_batch(fresh, collate):
    """The totals of all micro-batches make the step of one large batch, whatever each of them holds."""
    collator = collate()
    samples = [collator.encode(sample, seed) for seed, sample in enumerate(training_samples(*MIXED))]
    reference = copy.deepcopy(fresh)
    reference(**collator.pack(samples)).loss.backward()
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(fresh)
    batches = [collator.pack([sample]) for sample in samples]
    totals = sum(loss_totals(batch) for batch in batches)
    for batch in batches:
        accelerator.backward(model(**batch, loss_totals=totals).loss)
    for (name, ours), theirs in zip(fresh.named_parameters(), reference.parameters(), strict=True):
        assert max_error(ours.grad, theirs.grad) <= 1e-5, name


def test_low_precision_trains(fresh, collate):
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(fresh)
    outputs = model(**collate()(training_samples(*MIXED)))
    assert outputs.loss.dtype == torch.float32
    accelerator.backward(outputs.loss)
    expected = copy.deepcopy(load_model()).train()(**collate()(training_samples("talk", "look"))).ce_loss
    got = model(**collate()(training_samples("talk", "look"))).ce_loss
    assert got.item() == pytest.approx(expected.item(), abs=0.1)
    assert all(parameter.grad.isfinite().all() for parameter in fresh.parameters())


# ---- Found in review


def test_a_resumed_trainer_goes_on_with_the_weights_it_saved(fresh, loaded, train, collate, tmp_path):
    # The files have the original names of the tensors, and `Trainer` loads them by the names of the modules.
    train(fresh, max_steps=1, save_strategy="steps", save_steps=1, learning_rate=1e-2).train()
    again = copy.deepcopy(loaded).train()
    train(again, max_steps=1).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert torch.equal(fixed_loss(again, collate), fixed_loss(fresh, collate))


def test_one_bad_sample_does_not_stop_trainer_with_batches_of_one(fresh, train, collate):
    # `on_error="skip"` has nothing to go on with in such a batch, and raises.
    trainer = train(fresh, ("talk",), collate(on_error="skip"), max_steps=2, per_device_train_batch_size=1)
    trainer.train_dataset = [*trainer.train_dataset, {"messages": [{"role": "robot", "content": "a"}]}]
    trainer.train()
    assert trainer.state.global_step == 2
