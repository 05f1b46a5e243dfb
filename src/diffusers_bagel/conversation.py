# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What was said, as segments: of the full context, and of those that guidance compares with it. No model is asked."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from transformers_bagel.segments import EncodedSegment


@dataclass(frozen=True)
class Update:
    """
    What a text or an image does to the contexts that guidance compares with the full one.

    Each is left alone (`"keep"`), reads it, too (`"read"`, or `"read later"`, when the user speaks again), or becomes what the
    full context was `"before"` or is `"after"` it. `"untagged"` is `"before"` with the text less what triggered its picture.
    """

    no_text: str = "keep"
    no_image: str = "keep"


@dataclass(frozen=True)
class Branch:
    """
    A context of guidance, as segments: the first ones of the full context, and its own behind them.

    Attributes:
        shared (`int`): Segments of the full context.
        own (`tuple[EncodedSegment, ...]`)
        later (`tuple[EncodedSegment, ...]`): What it reads when the next turn begins.
    """

    shared: int = 0
    own: tuple[EncodedSegment, ...] = ()
    later: tuple[EncodedSegment, ...] = ()


@dataclass(frozen=True)
class Track:
    """
    The segments of a conversation in one layout, and of the two contexts that guidance compares.

    Attributes:
        full (`tuple[EncodedSegment, ...]`): Everything.
        no_text, no_image (`Branch`): What guidance compares it with; each [`Update`] says how they grow.
    """

    full: tuple[EncodedSegment, ...] = ()
    no_text: Branch = Branch()
    no_image: Branch = Branch()

    def grown(
        self, segments: tuple[EncodedSegment, ...], update: Update, untagged: EncodedSegment | None = None
    ) -> Track:
        """The track with more segments of one text or image; `untagged` is the text without its tag."""

        def updated(branch: Branch, kind: str) -> Branch:
            if kind == "read":
                return replace(branch, own=(*branch.own, *segments))
            if kind == "read later":
                return replace(branch, later=(*branch.later, *segments))
            if kind == "untagged":
                return Branch(len(self.full), () if untagged is None else (untagged,))
            return {"keep": branch, "before": Branch(len(self.full)), "after": Branch(len(self.full) + len(segments))}[
                kind
            ]

        return Track(
            (*self.full, *segments), updated(self.no_text, update.no_text), updated(self.no_image, update.no_image)
        )

    def at_next_turn(self) -> Track:
        """The track when the user speaks again."""

        def settled(branch: Branch) -> Branch:
            return Branch(branch.shared, (*branch.own, *branch.later))

        return Track(self.full, settled(self.no_text), settled(self.no_image))

    def segments_of(self, name: str) -> tuple[EncodedSegment, ...]:
        """Those of `"full"`, `"no_text"` or `"no_image"`."""
        if name == "full":
            return self.full
        branch: Branch = getattr(self, name)
        return (*self.full[: branch.shared], *branch.own)


# Of the pipeline: against everything before the last text, and against all texts (original behaviour, point 16).
TEXT = Update("before", "read")
IMAGE = Update("after", "keep")


@dataclass(frozen=True)
class SaidText:
    """
    A text as it was said.

    Attributes:
        segment (`EncodedSegment`)
        update (`Update`): What it does to the contexts of guidance.
        untagged (`EncodedSegment`, *optional*): The same without what triggers a picture.
        is_written (`bool`): Whether the model wrote it.
    """

    segment: EncodedSegment
    update: Update
    untagged: EncodedSegment | None = None
    is_written: bool = False


@dataclass(frozen=True)
class SaidImage:
    """
    An image as it was shown.

    Attributes:
        vae, vit (`EncodedSegment`): As latents, and as it is seen.
        update (`Update`): What it does to the contexts of guidance.
        encoders (`tuple[str, ...]`): By which of them, `"vae"` and `"vit"`, pictures are drawn from it.
        is_given (`bool`): Whether the user showed it.
        is_resized (`bool`): Whether the ViT sees it as the VAE does, resized.
        images_kwargs (`dict`): Settings of the image processor other than its own.
        vae_sample_mode (`str`, *optional*): By which the VAE is to encode it; by default, that of the turn that does.
    """

    vae: EncodedSegment
    vit: EncodedSegment
    update: Update
    encoders: tuple[str, ...]
    is_given: bool
    is_resized: bool
    images_kwargs: dict[str, Any] = field(default_factory=dict)
    vae_sample_mode: str | None = None


@dataclass(frozen=True)
class Conversation:
    """
    All that was said.

    Attributes:
        seen (`Track`): With images that are seen only: what texts are written from by themselves.
        drawn_from (`Track`): With images as latents, too.
        pictures (`Track`): The same without what was written.
        given, last (`tuple[int, int]`, *optional*): Rows and columns of the last image that was given, and of any.
        turns (`tuple[tuple[SaidText | SaidImage, ...], ...]`): What was said in each turn, from which all of this follows.
    """

    seen: Track = Track()
    drawn_from: Track = Track()
    pictures: Track = Track()
    given: tuple[int, int] | None = None
    last: tuple[int, int] | None = None
    turns: tuple[tuple[SaidText | SaidImage, ...], ...] = ()

    def with_text(self, text: SaidText) -> Conversation:
        """The conversation with a text."""
        names = ("seen", "drawn_from") if text.is_written else ("seen", "drawn_from", "pictures")
        grown = {name: getattr(self, name).grown((text.segment,), text.update, text.untagged) for name in names}
        return replace(self, turns=self._turns_with(text), **grown)

    def with_image(self, image: SaidImage) -> Conversation:
        """The conversation with an image."""
        segments = tuple({"vae": image.vae, "vit": image.vit}[name] for name in image.encoders)
        return Conversation(
            self.seen.grown((image.vit,), image.update),
            self.drawn_from.grown(segments, image.update),
            self.pictures.grown(segments, image.update),
            image.vae.grid if image.is_given else self.given,
            image.vae.grid,
            self._turns_with(image),
        )

    def _turns_with(self, said: SaidText | SaidImage) -> tuple[tuple[SaidText | SaidImage, ...], ...]:
        return (*self.turns[:-1], (*self.turns[-1], said))

    def at_next_turn(self) -> Conversation:
        """The conversation when the user speaks again."""
        tracks = {name: getattr(self, name).at_next_turn() for name in ("seen", "drawn_from", "pictures")}
        return replace(self, turns=(*self.turns, ()), **tracks)

    def segment_lists(self) -> list[tuple[EncodedSegment, ...]]:
        """The segments of each context that may be written or drawn from."""
        tracks = (self.seen, self.drawn_from, self.pictures)
        return [track.segments_of(name) for track in tracks for name in ("full", "no_text", "no_image")]
