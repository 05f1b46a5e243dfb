# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What the model has read of a conversation: contexts are read into, written from, forked, and compared by guidance."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteriaList

from transformers_bagel import BagelForConditionalGeneration, BagelProcessor, GrowingCache, fork_cache
from transformers_bagel.cache import join_caches, split_cache
from transformers_bagel.segments import END, START, EncodedSegment, Segment, without_images, without_last_text
from transformers_bagel.sequence import EncodedSequence, SequenceLayout, lay_out

from .adapter_scale import AdapterScale
from .guidance import BagelGuidance
from .randomness import seeded


# Fixed cost of a forward of text, in token equivalents: more padding than this costs more than a forward of its own.
FORWARD_COST = 32
# Most new tokens, padding included, of a forward of several texts.
MAX_PREFILL_TOKENS = 1024
# Most tokens, padding and new ones included, of contexts that grow together.
MAX_JOINED_TOKENS = 32768


@dataclass(frozen=True)
class BagelContext:
    """What the model has read of a conversation.

    Attributes:
        segments (`tuple[EncodedSegment, ...]`): What was read.
        cache (`DynamicCache`, *optional*): Whose first `length` tokens are the keys and values of the segments.
        length (`int`): Tokens.
        next_position (`int`): Rope position of what comes next.
    """

    segments: tuple[EncodedSegment, ...] = ()
    cache: DynamicCache | None = None
    length: int = 0
    next_position: int = 0

    @property
    def own_cache(self) -> DynamicCache | None:
        """The cache without what another context has read behind these segments. No tensor is copied."""
        if self.cache is None or self.cache.get_seq_length() == self.length:
            return self.cache
        return split_cache(self.cache, [0], [self.length])[0]

    @property
    def token_ids(self) -> torch.Tensor:
        """Of everything, `(1, tokens)`."""
        return torch.cat([segment.token_ids for segment in self.segments])[None]

    @property
    def growing_cache(self) -> DynamicCache | None:
        """The cache itself if nothing has been read behind these segments, else a copy that grows on its own.

        A context of fewer segments in the same cache stays what it is while the cache grows.
        """
        if self.cache is None or self.cache.get_seq_length() == self.length:
            return self.cache
        return self.own_cache

    def fork(self) -> BagelContext:
        """The same context, which grows on its own. Nothing is copied until it does."""
        return self if self.cache is None else self._with(self.segments, fork_cache(self.cache))

    def first(self, num_segments: int) -> BagelContext:
        """The context of the first segments, in the same cache."""
        return self._with(self.segments[:num_segments], self.cache)

    def begins(self, other: BagelContext) -> bool:
        """Whether another context holds the same segments first: not equal ones, but the very same, with the same images."""
        count = len(self.segments)
        return count <= len(other.segments) and all(map(operator.is_, self.segments, other.segments[:count]))

    def cut(self) -> BagelContext:
        """The context without what its cache holds behind it, as a copy if there is something."""
        if self.cache is None or self.cache.get_seq_length() == self.length:
            return self
        cache = self.own_cache
        for layer in cache.layers:  # type: ignore[union-attr]  # there is one
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        return BagelContext(self.segments, cache, self.length, self.next_position)

    def grown(self, segments: Sequence[EncodedSegment], cache: DynamicCache) -> BagelContext:
        """The context with more segments, whose tokens a cache holds behind its own."""
        return self._with((*self.segments, *segments), cache)

    def _with(self, segments: tuple[EncodedSegment, ...], cache: DynamicCache | None) -> BagelContext:
        removed, added = self.segments[len(segments) :], segments[len(self.segments) :]
        length = self.length - sum(map(len, removed)) + sum(map(len, added))
        positions = sum(segment.num_positions for segment in added) - sum(item.num_positions for item in removed)
        return BagelContext(segments, cache, length, self.next_position + positions)


@dataclass(frozen=True)
class TextSettings:
    """
    How a text is written.

    Attributes:
        max_new_tokens (`int`)
        do_sample, temperature: Of its tokens.
        seed (`int`, *optional*): Of sampling.
        logits_processor (`LogitsProcessorList`): Changes the scores from which tokens are chosen.
        stopping_criteria (`StoppingCriteriaList`): What else ends it.
        streamer (`BaseStreamer`, *optional*): Gets the tokens.
    """

    max_new_tokens: int = 1023
    do_sample: bool = False
    temperature: float = 1.0
    seed: int | None = None
    logits_processor: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    stopping_criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)
    streamer: Any = None

    def of_generate(self) -> dict[str, Any]:
        sampling = {"do_sample": True, "temperature": self.temperature} if self.do_sample else {"do_sample": False}
        names = ("max_new_tokens", "logits_processor", "stopping_criteria", "streamer")
        return {name: getattr(self, name) for name in names} | sampling

    def choose(self, ids: torch.Tensor, scores: torch.Tensor) -> int:
        """A token by its scores, as `generate` would choose it."""
        scores = self.logits_processor(ids, scores.float())
        if not self.do_sample:
            return int(scores.argmax())
        return int(torch.multinomial((scores / self.temperature).softmax(-1), 1))


@dataclass(frozen=True)
class Written:
    """
    A text as it was written.

    Attributes:
        tokens (`list[int]`): Behind the start token; the one that ends it included, if it came that far.
        cache (`DynamicCache`): Of the context, the start token and all but the last of these.
    """

    tokens: list[int]
    cache: DynamicCache


class ReadContexts:
    """Contexts that were read. One that begins like another goes on from there."""

    def __init__(self, contexts: Sequence[BagelContext] = ()):
        self._contexts = list(contexts)

    def fork(self) -> ReadContexts:
        return ReadContexts(self._contexts)

    def context(self, reader: ContextReader, segments: Sequence[EncodedSegment]) -> BagelContext:
        """The context of some segments; what no other has read is read now."""
        nearest = self.nearest(segments)
        missing = segments[len(nearest.segments) :]
        if not missing:
            return nearest
        (context,) = reader.read([nearest], [missing])
        self.keep(context)
        return context

    def nearest(self, segments: Sequence[EncodedSegment]) -> BagelContext:
        """The context of as many of the segments as any has read."""
        best = BagelContext()
        for context in self._contexts:
            pairs = zip(context.segments, segments, strict=False)
            common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] is pair[1], pairs))
            if common > len(best.segments):
                best = context if common == len(context.segments) else context.first(common)
        return best

    def forget_all_but(self, segments: Sequence[Sequence[EncodedSegment]]) -> None:
        """Forget what none of these lists of segments begins with, with its keys and values."""
        wanted = [self.nearest(own) for own in segments]
        self._contexts = []
        for context in sorted(wanted, key=lambda context: -context.length):
            if context.segments and not any(context.begins(other) for other in self._contexts):
                self._contexts.append(context.cut())

    def keep(self, context: BagelContext) -> None:
        """Remember a context, and none that it begins with: its cache has their tokens."""
        self._contexts = [other for other in self._contexts if not other.begins(context)] + [context]


class ContextReader:
    """
    Reads segments into contexts and writes texts behind them, several at a time where that pays.

    Args:
        transformer ([`BagelForConditionalGeneration`]): The model.
        processor ([`BagelProcessor`]): Whose tokenizer decodes what is written.
        device (`torch.device`): Where the model computes.
        attention_kwargs (`dict`, *optional*): Passed on to the attention layers; `scale` is that of the adapters.
    """

    def __init__(
        self,
        transformer: BagelForConditionalGeneration,
        processor: BagelProcessor,
        device: torch.device,
        attention_kwargs: dict[str, Any] | None = None,
    ):
        self.transformer = transformer
        self.processor = processor
        self.device = device
        self.adapters = AdapterScale(transformer, attention_kwargs)

    def read(
        self, contexts: Sequence[BagelContext], segments: Sequence[Sequence[EncodedSegment]]
    ) -> list[BagelContext]:
        """
        Contexts with more segments, each in one forward, which short texts share.

        A text joins those shorter than it while the padding costs less than a forward of its own would. Images are read
        one conversation at a time, since their many tokens gain nothing together.

        Args:
            contexts (`Sequence[BagelContext]`): The contexts, which stay as they are.
            segments (`Sequence[Sequence[EncodedSegment]]`):
                What each is to read; of images as latents, the VAE's `latents` are needed.
        """
        read = list(contexts)
        texts: dict[bool, list[int]] = {True: [], False: []}
        batches = []
        for index, (context, new) in enumerate(zip(contexts, segments, strict=True)):
            if any(segment.grid is not None for segment in new):
                batches.append([index])
            elif new:
                texts[context.cache is None].append(index)
        new_tokens = [sum(map(len, new)) for new in segments]
        for indices in texts.values():
            lengths = [contexts[index].length + new_tokens[index] for index in indices]
            for places in bucket_by_length(lengths, MAX_JOINED_TOKENS):
                joined = [indices[place] for place in places]
                shared = bucket_by_length([new_tokens[index] for index in joined], MAX_PREFILL_TOKENS, FORWARD_COST)
                batches += [[joined[place] for place in batch] for batch in shared]
        for batch in batches:
            grown, _ = self._read_together([contexts[index] for index in batch], [segments[index] for index in batch])
            for index, context in zip(batch, grown, strict=True):
                read[index] = context
        return read

    def _read_together(
        self, contexts: list[BagelContext], segments: list[Sequence[EncodedSegment]]
    ) -> tuple[list[BagelContext], torch.Tensor]:
        """One forward of texts, or of one conversation with images, and the last scores `(contexts, vocabulary)`."""
        sequences = [lay_out(new) for new in segments]
        past = [context.length for context in contexts]
        cache: Any = contexts[0].growing_cache
        if len(contexts) > 1:
            cache = join_caches([context.own_cache for context in contexts if context.own_cache is not None])
        if cache is None:
            cache = GrowingCache(self.transformer.config)
        longest = max(past)
        padding = [longest - length for length in past]
        # Behind a text, causality hides the padding; before a context, a mask does.
        ids, types = (
            pad([getattr(sequence, name) for sequence in sequences], 0) for name in ("input_ids", "token_types")
        )
        mask = None
        if any(padding):
            mask = (
                (torch.arange(longest + ids.shape[1]) >= torch.tensor(padding)[:, None])
                .long()
                .to(self.device, non_blocking=True)
            )
        with self.adapters.applied():
            outputs = self.transformer(
                input_ids=ids.to(self.device, non_blocking=True),
                attention_mask=mask,
                position_ids=self._positions(contexts, sequences, ids.shape[1]).to(self.device, non_blocking=True),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                **self._images([segment for new in segments for segment in new], types),
                **self.adapters.attention_kwargs,
            )
        lengths = [length + len(sequence.input_ids) for length, sequence in zip(past, sequences, strict=True)]
        caches = split_cache(cache, padding, lengths)
        grown = [context.grown(new, own) for context, new, own in zip(contexts, segments, caches, strict=True)]
        return grown, outputs.logits[:, -1]

    def _positions(self, contexts: list[BagelContext], sequences: list[EncodedSequence], length: int) -> torch.Tensor:
        """Rope positions `(contexts, length)`, which go on behind the tokens of the shorter texts."""
        rows = []
        for context, sequence in zip(contexts, sequences, strict=True):
            own = sequence.position_ids
            rows.append(torch.cat([own, own[-1] + 1 + torch.arange(length - len(own))]) + context.next_position)
        return torch.stack(rows)

    def _images(self, segments: list[EncodedSegment], token_types: torch.Tensor) -> dict[str, Any]:
        """What forward is told of the images of segments, in the order of their placeholders."""
        seen = [segment for segment in segments if segment.segment.type == "vit_image"]
        drawn = [segment for segment in segments if segment.segment.type == "vae_image"]
        layout = SequenceLayout(token_types, image_grid_hw=_grids(seen), latent_grid_hw=_grids(drawn))
        inputs: dict[str, Any] = {"layout": layout}
        if seen:
            inputs["pixel_values"] = torch.cat([segment.pixels for segment in seen]).to(self.device, non_blocking=True)
        if drawn:
            inputs["latents"] = torch.cat([segment.latents for segment in drawn]).to(self.device, non_blocking=True)
            inputs["timesteps"] = torch.zeros(len(drawn), device=self.device)
        return inputs

    def write(
        self,
        contexts: Sequence[BagelContext],
        max_new_tokens: int,
        do_sample: bool = False,
        temperature: float = 1.0,
        seeds: Sequence[int | None] | None = None,
    ) -> list[str]:
        """
        What the model writes behind each context; to remember it, read it.

        Greedy texts are written together. Sampled ones are written one by one, since `generate` draws for all from one
        random state, and each is to be what its own seed gives it alone.

        Args:
            contexts (`Sequence[BagelContext]`): The contexts, which stay as they are.
            max_new_tokens (`int`): Most tokens of a text.
            do_sample, temperature: Of the text.
            seeds (`Sequence[int | None]`, *optional*): Of each sampled text; without one the global state is used.
        """
        sampling = {"do_sample": True, "temperature": temperature} if do_sample else {"do_sample": False}
        lengths = [context.length + max_new_tokens for context in contexts]
        batches = [[index] for index in range(len(contexts))]
        if not do_sample:
            batches = bucket_by_length(lengths, MAX_JOINED_TOKENS)
        texts = [""] * len(contexts)
        for batch in batches:
            seed = None if seeds is None or not do_sample else seeds[batch[0]]
            with seeded(seed, self.device):
                written = self._write_together([contexts[index] for index in batch], max_new_tokens, **sampling)
            for index, text in zip(batch, written, strict=True):
                texts[index] = text
        return texts

    def _write_together(self, contexts: list[BagelContext], max_new_tokens: int, **sampling: Any) -> list[str]:
        cache = join_caches([context.own_cache for context in contexts if context.own_cache is not None])
        written, _ = self._generate(contexts, cache, max_new_tokens=max_new_tokens, **sampling)
        stops = self.transformer.generation_config.eos_token_id
        stops = set(stops if isinstance(stops, list) else [stops])
        texts = [self.processor.tokenizer.decode(_until_stop(tokens, stops)) for tokens in written]
        return [text.split(END)[0].split(START)[0] for text in texts]

    def _generate(
        self, contexts: list[BagelContext], cache: DynamicCache | None, **settings: Any
    ) -> tuple[list[list[int]], DynamicCache]:
        """The tokens that `generate` writes behind each context and a start token, and the cache of all of them."""
        tokenizer = self.processor.tokenizer
        start_ids = torch.tensor([tokenizer.convert_tokens_to_ids(START)])
        ids = [torch.cat([*(item.token_ids for item in context.segments), start_ids]) for context in contexts]
        types = [
            torch.cat([*(item.token_types for item in context.segments), torch.zeros_like(start_ids)])
            for context in contexts
        ]
        masks = [torch.ones_like(own) for own in ids]
        prompt, token_types, mask = (
            pad(values, padding, side="left").to(self.device, non_blocking=True)
            for values, padding in ((ids, tokenizer.pad_token_id), (types, 0), (masks, 0))
        )
        with self.adapters.applied():
            out = self.transformer.generate(
                input_ids=prompt,
                mm_token_type_ids=token_types,
                attention_mask=mask,
                past_key_values=cache,
                return_dict_in_generate=True,
                **settings,
            )
        return out.sequences[:, prompt.shape[1] :].tolist(), out.past_key_values

    def read_to_the_end(
        self, context: BagelContext, segments: Sequence[EncodedSegment]
    ) -> tuple[BagelContext, torch.Tensor]:
        """One context with more segments, and the scores of the token behind them, `(1, vocabulary)`."""
        (grown,), scores = self._read_together([context], [segments])
        return grown, scores

    def write_on(self, context: BagelContext, settings: TextSettings) -> Written:
        """
        What the model writes behind one context, which stays as it is.

        The cache of what is written holds its tokens, too, so that it can be read without a second forward.
        """
        with seeded(settings.seed, self.device):
            (tokens,), cache = self._generate([context], context.growing_cache, **settings.of_generate())
        return Written(tokens, cache)

    def end(
        self, context: BagelContext, segment: EncodedSegment, written: Written
    ) -> tuple[BagelContext, torch.Tensor]:
        """A context that has read what was written behind it, of which only the last token is new, and the next scores."""
        last = segment.token_ids[-1:]
        with self.adapters.applied():
            outputs = self.transformer(
                input_ids=last[None].to(self.device, non_blocking=True),
                position_ids=torch.tensor([[context.next_position + len(segment) - 1]]).to(
                    self.device, non_blocking=True
                ),
                past_key_values=written.cache,
                use_cache=True,
                logits_to_keep=1,
                **self.adapters.attention_kwargs,
            )
        return context.grown([segment], written.cache), outputs.logits[:, -1]

    def encode_text(self, text: str) -> list[EncodedSegment]:
        """A text as what a context reads."""
        return self.processor.encode_segments([Segment("text", text)])


def guidance_contexts(
    reader: ContextReader,
    prompts: Sequence[Sequence[EncodedSegment]],
    full: Sequence[BagelContext],
    guidance: Sequence[BagelGuidance],
) -> list[dict[str, BagelContext]]:
    """
    The contexts that guidance compares (original behaviour, points 14-16).

    `full` is everything; `no_text` the same before the last text of the prompt, unless an image follows it; `no_image`
    all texts but the plan. A context that equals `full` is the same object, and its velocity is not computed twice.

    Args:
        reader (`ContextReader`): Reads the texts of `no_image`.
        prompts (`Sequence[Sequence[EncodedSegment]]`): What each image is drawn from, without the plan.
        full (`Sequence[BagelContext]`): The context of each prompt and its plan.
        guidance (`Sequence[BagelGuidance]`): By which scales of at most 1 need no context.
    """
    texts = [without_images(prompt) for prompt in prompts]
    compared = [
        index
        for index, settings in enumerate(guidance)
        if settings.text_scale > 1 and settings.image_scale > 1 and len(texts[index]) < len(full[index].segments)
    ]
    read = reader.read([BagelContext()] * len(compared), [texts[index] for index in compared])
    no_image = dict(zip(compared, read, strict=True))
    contexts = []
    for index, (prompt, context, settings) in enumerate(zip(prompts, full, guidance, strict=True)):
        branches = {"full": context}
        if settings.text_scale > 1:
            kept = len(without_last_text(prompt))
            branches["no_text"] = context if kept == len(context.segments) else context.first(kept)
            branches["no_image"] = no_image.get(index, context)
        contexts.append(branches)
    return contexts


def bucket_by_length(lengths: Sequence[int], max_tokens: int, max_padding: float = float("inf")) -> list[list[int]]:
    """
    Samples that run together, from the shortest to the longest.

    Args:
        lengths (`Sequence[int]`): Tokens of each sample.
        max_tokens (`int`): Of a batch of several samples, padding included.
        max_padding (`float`, *optional*): How much padding a sample may bring to the batch that it joins.

    Returns:
        `list[list[int]]`: Indices of the samples of each batch.
    """
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        size = len(batches[-1]) if batches else 0
        padding = size * (lengths[index] - longest)
        longest = lengths[index]
        if size and (size + 1) * longest <= max_tokens and padding <= max_padding:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def pad(sequences: Sequence[torch.Tensor], value: int, side: str = "right") -> torch.Tensor:
    """Sequences `(tokens,)` of any lengths as one tensor `(batch, longest)`."""
    return torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=value, padding_side=side)


def _grids(images: Sequence[EncodedSegment]) -> torch.Tensor:
    return torch.tensor([image.grid for image in images], dtype=torch.long).reshape(-1, 2)


def _until_stop(tokens: list[int], stops: set[int]) -> list[int]:
    """The tokens up to the first stop, it included; behind it a batch holds padding."""
    for place, token in enumerate(tokens):
        if token in stops:
            return tokens[: place + 1]
    return tokens
