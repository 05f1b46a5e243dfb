# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""`transformers serve`, asked by OpenAI's client and by `transformers chat`.

    python examples/clients/openai_server.py

`python -m transformers_bagel serve FOLDER` is `transformers serve FOLDER` after `import transformers_bagel`. A folder that
`conversion/convert_bagel_to_hf.py` has written needs no wrapper: `transformers serve FOLDER --trust-remote-code`; try
`--program transformers.cli.transformers --checkpoint FOLDER --trust-remote-code`.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from openai import OpenAI
from PIL import Image, ImageDraw


CHECKPOINT = Path(__file__).parents[1] / "shapes" / "checkpoint"


@contextmanager
def served(program: str, checkpoint: str, *flags: str) -> Iterator[str]:
    """The address of a server of its own, which ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", program, "serve", checkpoint, "--device", "cpu", "--port", str(port), *flags]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    try:
        for _ in range(300):
            if server.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} has ended.")
            try:
                urlopen(f"http://localhost:{port}/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.4)
        yield f"http://localhost:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


def picture() -> dict[str, Any]:
    image, content = Image.new("RGB", (64, 64), "white"), io.BytesIO()
    ImageDraw.Draw(image).ellipse((20, 20, 44, 44), fill="red")
    image.save(content, "PNG")
    url = "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default="transformers_bagel")
    parser.add_argument("--checkpoint", default=str(CHECKPOINT))
    parser.add_argument("--trust-remote-code", action="store_true")
    args = parser.parse_args()
    flags = ["--trust-remote-code"] if args.trust_remote_code else []
    with served(args.program, args.checkpoint, *flags) as address:
        client = OpenAI(base_url=address, api_key="none", timeout=60, max_retries=0)

        def ask(name: str, *messages: dict[str, Any]) -> str:
            reply = client.chat.completions.create(model=args.checkpoint, messages=list(messages), max_tokens=24)  # type: ignore[arg-type]
            said = reply.choices[0].message.content or ""
            print(f"{name:14} {said!r}")
            return said

        question = {"role": "user", "content": [picture(), {"type": "text", "text": "what colour is the circle?"}]}
        said = ask("image", question)
        assert said == "red"
        chunks: Any = client.chat.completions.create(
            model=args.checkpoint,
            messages=[question],  # type: ignore[list-item]
            max_tokens=24,
            stream=True,
        )
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        print(f"{'streamed':14} {streamed!r}")
        assert streamed == said
        answered = {"role": "assistant", "content": said}
        ask("history", question, answered, {"role": "user", "content": "what size is the circle?"})
        plan = client.chat.completions.create(
            model=args.checkpoint,
            messages=[{"role": "user", "content": "a large red circle"}],
            max_tokens=40,
            temperature=0,
        )
        thought = plan.choices[0].message.model_dump().get("reasoning_content") or ""
        print(f"{'reasoning':14} {thought!r} {plan.choices[0].message.content!r}")
        assert thought.startswith("a large red circle") and not plan.choices[0].message.content
        empty = {"role": "system", "content": ""}
        assert ask("empty system", empty, question) == said
        ask("developer", {"role": "developer", "content": "be brief"}, question)
        call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
        called = {"role": "assistant", "content": None, "tool_calls": [call]}
        ask("tool", question, called, {"role": "tool", "tool_call_id": "1", "content": "red"})
        response = client.responses.create(
            model=args.checkpoint,
            input=[
                {
                    "role": "user",
                    "content": [
                        {"type": "input_image", "image_url": picture()["image_url"]["url"], "detail": "auto"},
                        {"type": "input_text", "text": "what colour is the circle?"},
                    ],
                }
            ],
            max_output_tokens=24,
            stream=False,
        )
        print(f"{'responses':14} {response.output_text!r}")
        assert response.output_text == said
        chat = [sys.executable, "-m", "transformers.cli.transformers", "chat", args.checkpoint, address]
        typed = "what colour is the circle?\n!exit\n"
        # The library's chat asks its server through the Hub's session, which offline refuses.
        online = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        settings = ["do_sample=False", "max_new_tokens=48"]
        shown = subprocess.run(
            [*chat, *settings], input=typed, capture_output=True, text=True, timeout=120, env=online
        )
        assert shown.returncode == 0, shown.stderr[-2000:]
        lines = [line.strip() for line in shown.stdout.splitlines() if line.strip()]
        print("transformers chat:", *lines[-5:], sep="\n    ")
        assert any("tok/s" in line for line in lines)


if __name__ == "__main__":
    main()
