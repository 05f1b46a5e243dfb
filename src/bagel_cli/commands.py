# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What the commands do, once their arguments are known to be right."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from transformers.utils import cached_file

from bagel_bench import BENCHMARKS
from bagel_bench.folder import REPORT, RunFolder
from bagel_bench.running import Run, checkpoint_hash, summary, versions
from diffusers_bagel import PRESETS, BagelPipeline, BagelSession
from diffusers_bagel.few_steps import FewSteps
from transformers_bagel import BagelConfig, BagelForConditionalGeneration, BagelProcessor
from transformers_bagel.threads import in_own_thread

from .chat import NOT_ANSWERED, Chat, upright
from .files import CommandError, description, save_picture, sentence
from .fitting import are_packed, choose, loading_arguments
from .information import describe


# Out of memory is a `RuntimeError`; those of the Hub's client are no `OSError`.
NOT_LOADED = (OSError, ValueError, ImportError, RuntimeError, MemoryError, HTTPError, SafetensorError)


def draw(options: argparse.Namespace) -> None:
    """Draw a picture of a text, or change pictures as told."""
    images = [upright(image) for image in options.images]
    settings = _drawing_settings(options)
    with _loaded(options) as pipe:
        try:
            out = pipe(
                prompt=options.prompt,
                image=images or None,
                generator=torch.Generator("cpu").manual_seed(options.seed),
                **settings,
            )
        except NOT_ANSWERED as error:
            raise CommandError(sentence(error)) from error
    if out.texts:
        print(out.texts[0])
    made_by = {"seed": options.seed} | settings
    save_picture(out.images[0], options.output, description(options.prompt, options.model, made_by))
    print(f"{options.output}: {out.images[0].width} x {out.images[0].height}")


edit = draw


def ask(options: argparse.Namespace) -> None:
    """Answer a question about pictures."""
    images = [upright(image) for image in options.images]
    with _loaded(options, draws=False) as pipe:
        Chat(BagelSession(pipe), options).answer([*images, options.prompt], "text")


def chat(options: argparse.Namespace) -> None:
    """Talk, look and draw, line by line."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Bytes that are not UTF-8 spoil their line only.
        sys.stdin.reconfigure(errors="surrogateescape")
    with _loaded(options, draws=options.draws) as pipe:
        try:
            if options.session is not None and options.session.is_dir() and any(options.session.iterdir()):
                session = BagelSession.from_pretrained(options.session, pipe, options.protocol)
            else:
                session = BagelSession(pipe, options.protocol)
        except (OSError, *NOT_ANSWERED) as error:
            raise CommandError(sentence(error)) from error
        Chat(session, options).run()


def serve(options: argparse.Namespace) -> None:
    """Answer requests by OpenAI's interfaces, until somebody ends the process."""
    if options.ray:
        return _serve_on_ray(options)
    try:
        from . import serving
    except ImportError as error:
        raise CommandError(
            f"'bagel serve' needs the extra: pip install 'transformers-bagel[serve]' ({error})"
        ) from error
    settings = serving.settings_of(options)
    with closing(serving.bound_socket(options)) as bound, _loaded(options) as pipe:
        serving.serve(pipe, options, settings, bound)


def _serve_on_ray(options: argparse.Namespace) -> None:
    try:
        from . import serving_on_ray
    except ImportError as error:
        raise CommandError(f"'--ray' needs the extra: pip install 'transformers-bagel[ray]' ({error})") from error
    serving_on_ray.serve(partial(_loaded, options), options)


def demo(options: argparse.Namespace) -> None:
    """Show a page in the browser, until somebody ends the process."""
    try:
        from . import showing
    except ImportError as error:
        raise CommandError(
            f"'bagel demo' needs the extra: pip install 'transformers-bagel[demo,serve]' ({error})"
        ) from error
    showing.check_port(options.port)
    with _loaded(options) as pipe:
        showing.show(pipe, options.port)


def bench(options: argparse.Namespace) -> None:
    """Draw the pictures that a benchmark scores: those of this process, if `accelerate launch` or `torchrun` began several."""
    rank, count = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if options.device is None and torch.cuda.is_available():
        options.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    preset = options.preset or options.benchmark
    given = _drawing_settings(options) | {"preset": preset}
    with _told(options):
        checkpoint = _checkpoint(options)
        drawing = dict(PRESETS[preset].settings) | _few_steps(options, given)
    settings = {
        "benchmark": options.benchmark,
        "settings": drawing | given,
        "samples": options.samples or BENCHMARKS[options.benchmark].samples,
        "seed": options.seed,
        "checkpoint": checkpoint,
        "dtype": options.dtype,
        "device": find_device(options.device).type,
        "versions": versions(),
    }
    folder = RunFolder(Path(os.path.expanduser(options.out)), rank)
    try:
        with folder.opened(settings):
            folder.check_pictures(options.pictures)
            with _loaded(options) as pipe:
                pipe.set_progress_bar_config(disable=True)
                run = Run(pipe, folder, given, options.seed, options.on_error == "skip")
                run.draw(options.pictures[rank::count], options.batch_size)
            # The last process to end sees that all is there.
            report = summary(folder, settings, options.pictures, options.broken)
            if report is not None:
                folder.report(report)
                skipped = f", {len(report['skipped'])} left out" if report["skipped"] else ""
                print(f"{folder.pictures}: {report['pictures']} pictures{skipped}; see {REPORT}")
    except (OSError, *NOT_ANSWERED) as error:
        raise CommandError(sentence(error)) from error


def _drawing_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, by the names of the pipeline's call."""
    names = ("height", "width", "guidance_scale", "image_guidance_scale", "guidance_tolerance", "preset", "think")
    settings = {name: getattr(options, name) for name in names} | {"num_inference_steps": options.steps}
    return {name: value for name, value in settings.items() if value is not None}


def _few_steps(options: argparse.Namespace, given: dict[str, Any]) -> dict[str, Any]:
    """What a model of few steps draws with beside what was asked for; nothing of others."""
    name, subfolder = _place(options, "transformer")
    settings = BagelConfig.from_pretrained(name, **subfolder).few_steps
    if settings is None:
        return {}
    return FewSteps.from_settings(settings, "`few_steps` in config.json").over(
        {}, given, FlowMatchEulerDiscreteScheduler()
    )


def _checkpoint(options: argparse.Namespace) -> str:
    """The name of a checkpoint, and the commit of a Hub repository or a hash of a folder."""
    name = Path(os.path.expanduser(options.model))
    if name.is_dir():
        return f"{name.resolve().name}@{checkpoint_hash(name)}"
    found = cached_file(options.model, "model_index.json", _raise_exceptions_for_missing_entries=False)
    return f"{options.model}@{Path(found or cached_file(options.model, 'config.json')).parent.name}"


def info(options: argparse.Namespace) -> None:
    """Tell what a repository holds, and what of it would fit into this machine."""
    with _quiet():
        try:
            print(describe(os.path.expanduser(options.model), find_device(options.device)))
        except NOT_LOADED as error:
            raise CommandError(f"'{options.model}' cannot be read: {sentence(error)}") from error


def find_device(name: str | None) -> torch.device:
    """
    The device that was asked for, or the first that is there.

    Raises:
        CommandError: if it cannot be used.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"--device '{name}' cannot be used here: {sentence(error)}") from error
    return device


@contextmanager
def _loaded(options: argparse.Namespace, draws: bool = True) -> Iterator[BagelPipeline]:
    """The pipeline in the way that fits; if the model is to draw, or can, with the half of the weights that does."""
    device = find_device(options.device)
    with _quiet():
        config = _load(options, BagelConfig, component="transformer")
        draws = draws and config.visual_gen
        with _told(options):
            packed = are_packed(*_place(options, "transformer"), config)
        way = in_own_thread(choose, config, device, draws, options.dtype, options.low_memory, packed).result()
        with loading_arguments(way, config, draws, device) as arguments:
            if draws and not way.on_disk:
                yield _load(options, BagelPipeline, device=device, **arguments)
                return
            place = None if way.on_disk else device
            loader = BagelForConditionalGeneration
            model = _load(options, loader, "transformer", place, visual_gen=draws, **arguments)
            if draws:
                # diffusers puts no part of a component on the disk.
                pipe = _load(options, BagelPipeline, transformer=model, dtype=way.dtype)
                pipe.vae.to(device)
            else:
                processor = _load(options, BagelProcessor, "processor")
                pipe = BagelPipeline(model, None, FlowMatchEulerDiscreteScheduler(), processor)
            yield pipe


def _load(
    options: argparse.Namespace,
    loader: Any,
    component: str | None = None,
    device: torch.device | None = None,
    **kwargs: Any,
) -> Any:
    """Load a pipeline; or one component, which diffusers' layout keeps in a folder of its own."""
    with _told(options):
        name, subfolder = _place(options, component)
        loaded = in_own_thread(partial(loader.from_pretrained, name, **subfolder, **kwargs)).result()
        return loaded if device is None else loaded.to(device)


def _place(options: argparse.Namespace, component: str | None) -> tuple[str, dict[str, str]]:
    """The folder or Hub id, and the `subfolder` of a component if it has one."""
    name = os.path.expanduser(options.model) if os.path.isdir(os.path.expanduser(options.model)) else options.model
    if component is None:
        return name, {}
    file = {"transformer": "config.json", "processor": "processor_config.json"}[component]
    found = cached_file(name, file, subfolder=component, _raise_exceptions_for_missing_entries=False)
    return name, {"subfolder": component} if found else {}


@contextmanager
def _told(options: argparse.Namespace) -> Iterator[None]:
    """What loading fails on, as one sentence."""
    try:
        yield
    except NOT_LOADED as error:
        what = "the folder" if os.path.isdir(os.path.expanduser(options.model)) else "the Hub repository"
        raise CommandError(
            f"no BAGEL checkpoint could be loaded from {what} '{options.model}': {sentence(error)}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of the libraries, whose loggers have handlers of their own."""
    before = transformers.logging.get_verbosity(), diffusers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    diffusers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before[0])
        diffusers.logging.set_verbosity(before[1])
