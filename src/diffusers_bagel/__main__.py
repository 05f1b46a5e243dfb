# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The command line: `python -m diffusers_bagel draw|edit|ask|chat`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
import transformers
from transformers import TextStreamer
from transformers.utils import cached_file

from diffusers_bagel import BagelPipeline
from transformers_bagel import BagelForConditionalGeneration, BagelProcessor
from transformers_bagel.image_processing_bagel import to_rgb


DEFAULT_MODEL = "ByteDance-Seed/BAGEL-7B-MoT"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CommandError(Exception):
    """A mistake that the user can mend, told in one sentence."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(argv)
    transformers.logging.set_verbosity_error()
    try:
        options.run(options)
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


def draw(options: argparse.Namespace) -> None:
    """Draw a picture of a text, or change pictures as told."""
    image = [_open(path) for path in options.images] or None
    # Links are followed here: what is written takes the place of its name.
    output = Path(os.path.realpath(os.path.expanduser(options.output)))
    if output.suffix.lower() not in PIL.Image.registered_extensions():
        raise CommandError(f"--output must end in the name of an image format, such as .png, got '{output}'.")
    if not output.parent.is_dir():
        raise CommandError(f"--output lies in the folder '{output.parent}', which does not exist.")
    if output.is_dir() or not os.access(output.parent, os.W_OK | os.X_OK):
        raise CommandError(f"--output '{output}' cannot be written: name another file.")
    device = _device(options)
    pipe = _load(options, BagelPipeline, dtype=_dtype(options, device)).to(device)
    settings = {
        name: getattr(options, name)
        for name in ("height", "width", "guidance_scale", "image_guidance_scale")
        if getattr(options, name) is not None
    }
    try:
        out = pipe(
            prompt=options.prompt,
            image=image,
            num_inference_steps=options.steps,
            think=options.think,
            generator=torch.Generator("cpu").manual_seed(options.seed),
            **settings,
        )
    except (ValueError, TypeError) as error:
        raise CommandError(_sentence(error)) from error
    if out.texts:
        print(out.texts[0])
    _save(out.images[0], output)
    print(f"{options.output}: {out.images[0].width} x {out.images[0].height}")


def ask(options: argparse.Namespace) -> None:
    """Answer a question about pictures."""
    parts: list[dict[str, Any]] = [{"type": "image", "image": _open(path)} for path in options.images]
    parts.append({"type": "text", "text": options.prompt})
    model, processor = _load_speaker(options)
    _answer(model, processor, [{"role": "user", "content": parts}], options)


def chat(options: argparse.Namespace) -> None:
    """Talk, line by line."""
    model, processor = _load_speaker(options)
    print("Type a message. /image PATH shows a picture, /new starts over, /quit ends.")
    messages: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line == "/new":
            messages, parts = [], []
        elif line.startswith("/image"):
            try:
                parts.append({"type": "image", "image": _open(line.removeprefix("/image").strip())})
            except CommandError as error:
                print(f"error: {error}")
        elif line.startswith("/"):
            print("error: known commands are /image PATH, /new and /quit.")
        elif line:
            messages.append({"role": "user", "content": [*parts, {"type": "text", "text": line}]})
            parts = []
            answer = _answer(model, processor, messages, options)
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})


def _answer(
    model: BagelForConditionalGeneration,
    processor: BagelProcessor,
    messages: list[dict[str, Any]],
    options: argparse.Namespace,
) -> str:
    """Stream the answer to the screen, and return it."""
    torch.manual_seed(options.seed)
    sampling = {"do_sample": True, "temperature": options.temperature} if options.temperature else {"do_sample": False}
    try:
        inputs = processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            think=options.think,
            sanitize_control_tokens=not options.raw_tokens,
        ).to(model.device)
        sequence = model.generate(
            **inputs,
            **sampling,
            max_new_tokens=options.max_new_tokens,
            streamer=TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    except (ValueError, TypeError) as error:
        raise CommandError(_sentence(error)) from error
    return processor.decode(sequence[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _load_speaker(options: argparse.Namespace) -> tuple[BagelForConditionalGeneration, BagelProcessor]:
    """The model without `visual_gen`, which needs half the memory, and the processor."""
    device = _device(options)
    processor = _load(options, BagelProcessor, component="processor")
    model = _load(
        options,
        BagelForConditionalGeneration,
        component="transformer",
        dtype=_dtype(options, device),
        visual_gen=False,
    )
    return model.to(device), processor


def _load(options: argparse.Namespace, loader: Any, component: str | None = None, **kwargs: Any) -> Any:
    """Load a pipeline; or one component, which diffusers' layout keeps in a folder of its own."""
    name = options.model
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1 or os.path.exists(name)
    if looks_local and not os.path.isdir(name):
        raise CommandError(f"--model '{name}' is no folder; pass a folder with a BAGEL checkpoint, or a Hub id.")
    try:
        if component is not None:
            file = {"transformer": "config.json", "processor": "processor_config.json"}[component]
            if cached_file(name, file, subfolder=component, _raise_exceptions_for_missing_entries=False):
                kwargs["subfolder"] = component
        return loader.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        what = "the folder" if os.path.isdir(name) else "the Hub repository"
        raise CommandError(f"no BAGEL checkpoint could be loaded from {what} '{name}': {_sentence(error)}") from error


def _open(path: str) -> PIL.Image.Image:
    if os.path.exists(path) and not os.path.isfile(path):
        raise CommandError(f"the picture '{path}' cannot be read: it is no file.")
    try:
        return to_rgb(PIL.Image.open(path))
    except PIL.Image.DecompressionBombError as error:
        raise CommandError(f"the picture '{path}' is over Pillow's pixel limit.") from error
    except (OSError, ValueError) as error:
        raise CommandError(f"the picture '{path}' cannot be read: {_sentence(error)}") from error


def _save(image: PIL.Image.Image, output: Path) -> None:
    """Write the whole file, or none."""
    temporary = output.with_name(f".{output.stem}.{os.getpid()}{output.suffix}")
    try:
        image.save(temporary)
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)


def _device(options: argparse.Namespace) -> torch.device:
    name = options.device
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"--device '{name}' cannot be used here: {_sentence(error)}") from error
    return device


def _dtype(options: argparse.Namespace, device: torch.device) -> torch.dtype:
    default = "bfloat16" if device.type == "cuda" else "float32"
    return DTYPES[options.dtype or default]


def _sentence(error: BaseException) -> str:
    """The first line of an error: the libraries add advice and traces below it."""
    return str(error).strip().split("\n")[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m diffusers_bagel", description="Draw, edit, see and talk with BAGEL."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--model",
        default=os.environ.get("BAGEL_MODEL", DEFAULT_MODEL),
        help="folder or Hub id of the checkpoint (default: $BAGEL_MODEL, or %(default)s)",
    )
    common.add_argument("--seed", type=int, default=0, help="seed of the noise or of sampled text (default: 0)")
    common.add_argument("--device", help="cuda, mps or cpu (default: the first that is there)")
    common.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on cuda, else float32")
    common.add_argument("--steps", type=int, default=49, help="denoising steps of a drawing (default: 49)")
    common.add_argument("--think", action="store_true", help="let the model think first, and show what it thought")

    pictures = argparse.ArgumentParser(add_help=False)
    pictures.add_argument("-o", "--output", default="out.png", help="picture to write (default: out.png)")
    pictures.add_argument("--height", type=int, help="in pixels (default: 1024, or like the last picture)")
    pictures.add_argument("--width", type=int, help="in pixels (default: 1024, or like the last picture)")
    pictures.add_argument("--guidance-scale", type=float, help="weight of the text (default: 4)")
    pictures.add_argument("--image-guidance-scale", type=float, help="weight of the pictures (default: 2 in edits)")

    speech = argparse.ArgumentParser(add_help=False)
    speech.add_argument("--max-new-tokens", type=int, default=1024, help="longest answer (default: 1024)")
    speech.add_argument(
        "--raw-tokens", action="store_true", help="read <|im_end|> and the like as tokens (default: as words)"
    )
    speech.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest word (default: 0)")

    for name, run, kind, summary in (
        ("draw", draw, pictures, "Draw a picture of a text."),
        ("edit", draw, pictures, "Change one or several pictures as told."),
        ("ask", ask, speech, "Answer a question about pictures."),
        ("chat", chat, speech, "Talk, line by line."),
    ):
        command = commands.add_parser(name, parents=[common, kind], help=summary, description=summary)
        if name in ("edit", "ask"):
            command.add_argument("images", nargs="+", metavar="IMAGE", help="picture file")
        if name != "chat":
            command.add_argument("prompt", metavar="TEXT", help="what to draw, change or answer")
        command.set_defaults(run=run, images=[])
    return parser


if __name__ == "__main__":
    sys.exit(main())
