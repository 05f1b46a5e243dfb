# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What the commands are asked, in their own words."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, NoReturn

from bagel_bench import BENCHMARKS

from .files import CommandError


DEFAULT_MODEL = "ByteDance-Seed/BAGEL-7B-MoT"
DTYPES = ("float32", "bfloat16", "float16")
# Of `diffusers_bagel`, which is not imported yet.
PROTOCOLS = ("plain", "thinkmorph", "zebra", "sot", "canvas", "twiff", "cooper")
DRAWING_PRESETS = (
    *("demo", "notebook", "geneval", "wise", "dpg", "gedit", "imgedit", "kris", "rise"),
    *("vlmevalkit_generate", "vlmevalkit_edit"),
)
ANSWER_PRESETS = ("ask", "vqa", "docvqa", "mme", "mmbench", "mmvp", "pope", "mmvet", "mathvista", "mmmu", "mmmu_cot")
OUTPUTS = ("auto", "text", "image", "interleaved")
PACKAGES = ("transformers", "diffusers", "torch")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} (see '{self.prog} --help')")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        libraries = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
        print(f"bagel {version('transformers-bagel')} ({libraries})")
        parser.exit()


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """
    The arguments of a command.

    Raises:
        CommandError: in a sentence, if they are wrong.
    """
    return _parser().parse_args(argv)


def setting_names() -> list[str]:
    """What [`parse_settings`] changes."""
    return list(vars(_Parser(add_help=False, parents=_chat_settings()).parse_args([])))


def parse_settings(words: Sequence[str], options: argparse.Namespace) -> argparse.Namespace:
    """
    The arguments of a chat with changed settings, such as `steps=20`, by their names on the command line.

    Raises:
        CommandError: in a sentence, if they are wrong.
    """
    parser = _Parser(prog="bagel chat", add_help=False, parents=_chat_settings())
    pairs = (word.partition("=") for word in words)
    arguments = [f"--{name.lstrip('-').replace('_', '-')}{equals}{value}" for name, equals, value in pairs]
    return parser.parse_args(arguments, argparse.Namespace(**vars(options)))


def _number(kind: Callable[[str], Any], lowest: float, highest: float) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not lowest <= value <= highest:
            names = {int: "a whole number", float: "a number"}
            bound = f"from {lowest}" + (f" to {highest}" if highest < math.inf else "")
            raise argparse.ArgumentTypeError(f"must be {names[kind]} {bound}, got '{text}'")  # type: ignore[index]
        return value

    return read


def _group() -> _Parser:
    return _Parser(add_help=False)


def _common(presets: Sequence[str]) -> _Parser:
    common = _group()
    common.add_argument(
        "--seed",
        type=_number(int, -(2**63), 2**64 - 1),
        default=0,
        help="seed of the noise or of sampled text (default: 0)",
    )
    common.add_argument(
        "--preset",
        choices=presets,
        metavar="NAME",
        help=f"published settings for all that is not asked for: {', '.join(presets)}",
    )
    common.add_argument(
        "--steps",
        type=_number(int, 1, math.inf),
        help="denoising steps of a drawing (default: 49, or the model's own)",
    )
    common.add_argument(
        "--think", action=argparse.BooleanOptionalAction, help="let the model think first, and show what it thought"
    )
    return common


def _pictures() -> _Parser:
    side, scale = _number(int, 1, math.inf), _number(float, 0, math.inf)
    pictures = _group()
    pictures.add_argument("--height", type=side, help="in pixels (default: 1024, or like the last picture)")
    pictures.add_argument("--width", type=side, help="in pixels (default: 1024, or like the last picture)")
    pictures.add_argument("--guidance-scale", type=scale, help="weight of the text (default: 4)")
    pictures.add_argument("--image-guidance-scale", type=scale, help="weight of the pictures (default: 2 in edits)")
    pictures.add_argument(
        "--guidance-tolerance",
        type=_number(float, 0, 1),
        help="leave out guidance where it changes a picture by no more, such as 0.005 (default: nowhere)",
    )
    return pictures


def _speech() -> _Parser:
    speech = _group()
    speech.add_argument("--max-new-tokens", type=_number(int, 1, math.inf), help="longest answer (default: 1024)")
    speech.add_argument(
        "--raw-tokens",
        action=argparse.BooleanOptionalAction,
        help="read <|im_end|> and the like as tokens (default: as words)",
    )
    speech.add_argument(
        "--temperature", type=_number(float, 0, math.inf), help="0 takes the likeliest word (default: 0)"
    )
    return speech


def _chat_settings() -> list[_Parser]:
    own = _group()
    own.add_argument(
        "--answer",
        choices=OUTPUTS,
        help="of what an answer is made: auto leaves it to a model that was trained to decide (default: text, or auto if "
        "there is a protocol)",
    )
    return [_common(DRAWING_PRESETS + ANSWER_PRESETS), _pictures(), _speech(), own]


def _chat() -> _Parser:
    chat = _group()
    chat.add_argument("--session", metavar="DIR", help="folder in which the conversation is kept, and goes on")
    chat.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        help="how a fine-tune answers in texts and pictures (default: that of the checkpoint's name, or plain)",
    )
    chat.add_argument(
        "--no-drawing",
        dest="draws",
        action="store_false",
        help="leave out what draws: half of the weights, and the VAE",
    )
    return chat


def _serve() -> _Parser:
    count, seconds = _number(int, 1, math.inf), _number(float, 0.001, math.inf)
    serve = _group()
    serve.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine alone)"
    )
    serve.add_argument(
        "--port", type=_number(int, 0, 65535), default=8000, help="default: %(default)s; 0 takes a free one"
    )
    serve.add_argument(
        "--api-key",
        default=os.environ.get("BAGEL_API_KEY"),
        help="what requests must bear (default: $BAGEL_API_KEY, or none)",
    )
    serve.add_argument("--name", help="what requests call the model (default: what --model says)")
    serve.add_argument("--allow-image-urls", action="store_true", help="fetch images from URLs of the public internet")
    serve.add_argument(
        "--raw-tokens", action="store_true", help="read <|im_end|> and the like as tokens (default: as words)"
    )
    serve.add_argument("--protocol", choices=PROTOCOLS, help="how a fine-tune answers in texts and pictures")
    serve.add_argument("--max-running", type=count, default=32, help="answers made at a time (default: %(default)s)")
    serve.add_argument(
        "--max-waiting", type=count, default=64, help="answers that wait for that (default: %(default)s)"
    )
    for name, kind, what in (
        ("timeout", seconds, "seconds from a request to the end of its answer"),
        ("body-timeout", seconds, "seconds in which a request must arrive"),
        ("max-requests", count, "requests that are read or answered at a time"),
        ("max-body-bytes", count, "of a request"),
        ("max-messages", count, "in a conversation"),
        ("max-characters", count, "of all texts of a request"),
        ("max-context-tokens", count, "of all that was said, before an answer"),
        ("max-new-tokens", count, "of each text of an answer"),
        ("max-images", count, "in a request"),
        ("max-image-pixels", count, "of each image"),
        ("max-pixels", count, "of all images of a request"),
        ("max-drawn", count, "pictures of an answer"),
        ("max-choices", count, "answers to a request"),
        ("max-steps", count, "denoising steps of a picture"),
        ("max-cache-bytes", _number(int, 0, math.inf), "of conversations that are kept in case they go on"),
    ):
        serve.add_argument(f"--{name}", type=kind, help=f"{what} (default: that of ServerSettings)")
    serve.add_argument(
        "--ray", action="store_true", help="on Ray Serve, on the cluster of $RAY_ADDRESS or on this machine"
    )
    serve.add_argument(
        "--replicas", type=count, default=1, help="processes with --ray, at least (default: %(default)s)"
    )
    serve.add_argument("--max-replicas", type=count, help="processes with --ray, at most (default: as --replicas)")
    return serve


def _demo() -> _Parser:
    demo = _group()
    demo.add_argument("--port", type=_number(int, 1, 65535), default=7860, help="of the page (default: %(default)s)")
    return demo


def _bench() -> _Parser:
    whole = _number(int, 1, math.inf)
    bench = _group()
    bench.set_defaults(low_memory=False)
    bench.add_argument("benchmark", choices=BENCHMARKS, help="whose pictures are drawn")
    bench.add_argument("--prompts", required=True, metavar="FILE", help="the prompts, as the benchmark publishes them")
    bench.add_argument("--out", required=True, metavar="DIR", help="where the run is written, and goes on")
    bench.add_argument("--images", dest="image_folder", metavar="DIR", help="pictures to edit (default: beside FILE)")
    bench.add_argument("--samples", type=whole, help="drawings of a prompt (default: the benchmark's number)")
    bench.add_argument("--batch-size", type=whole, default=1, help="pictures drawn at the same time (default: 1)")
    bench.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="what is done about a broken row, a missing picture, a double id (default: stop)",
    )
    bench.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16, whatever fits better")
    return bench


def _parser() -> _Parser:
    parser = _Parser(prog="bagel", description="Draw, edit, see and talk with BAGEL.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the versions of it and of its libraries")
    commands = parser.add_subparsers(dest="command", required=True)
    model, place, memory, output = (_group() for _ in range(4))
    model.add_argument(
        "--model",
        default=os.environ.get("BAGEL_MODEL", DEFAULT_MODEL),
        help="folder or Hub id of the checkpoint (default: $BAGEL_MODEL, or %(default)s)",
    )
    place.add_argument("--device", help="cuda, mps or cpu (default: the first that is there)")
    memory.add_argument("--dtype", choices=DTYPES, help="default: the best that fits into the memory")
    memory.add_argument(
        "--low-memory", action="store_true", help="leave most weights on the disk: slow, and 5 GB are enough"
    )
    output.add_argument(
        "-o", "--output", default="out.png", help="picture to write, in a chat with a number (default: out.png)"
    )

    drawing = [model, place, _common(DRAWING_PRESETS), memory, output, _pictures()]
    for name, parts, summary in (
        ("draw", drawing, "Draw a picture of a text."),
        ("edit", drawing, "Change one or several pictures as told."),
        ("ask", [model, place, _common(ANSWER_PRESETS), memory, _speech()], "Answer a question about pictures."),
        ("chat", [model, place, memory, _chat(), output, *_chat_settings()], "Talk, look and draw, line by line."),
        ("serve", [model, place, memory, _serve()], "Answer requests by OpenAI's interfaces."),
        ("demo", [model, place, memory, _demo()], "Show a page in the browser, on this machine alone."),
        ("bench", [_bench(), model, place, _common(DRAWING_PRESETS), _pictures()], "Draw what a benchmark scores."),
        ("info", [place], "Tell what a repository holds, and what of it would fit into this machine."),
    ):
        command = commands.add_parser(name, parents=parts, help=summary, description=summary)
        command.set_defaults(images=[])
        if name in ("edit", "ask"):
            command.add_argument("images", nargs="+", metavar="IMAGE", help="picture file")
        if name in ("draw", "edit", "ask"):
            command.add_argument("prompt", metavar="TEXT", help="what to draw, change or answer")
        if name == "info":
            command.add_argument("model", metavar="REPO", help="folder or Hub id of the checkpoint")
    return parser
