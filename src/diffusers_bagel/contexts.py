# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What the model has read of a conversation: contexts are read into, written from, forked, and compared by guidance."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteriaList

from transformers_bagel import BagelForConditionalGeneration, BagelProcessor, GrowingCache
from transformers_bagel.cache import copy_cache, extend_cache, join_caches, kept_whole, split_cache
from transformers_bagel.segments import END, START, EncodedSegment, Segment
from transformers_bagel.sequence import EncodedSequence, SequenceLayout, lay_out

from .adapter_scale import AdapterScale
from .randomness import seeded


# Fixed cost of a forward of text, in token equivalents: more padding than this costs more than a forward of its own.
FORWARD_COST = 32
# Most new tokens, padding included, of a forward of several texts.
MAX_PREFILL_TOKENS = 1024
# Most tokens, padding and new ones included, of contexts that grow together.
MAX_JOINED_TOKENS = 32768
# Of `generate`, for texts by the temperature alone: what a checkpoint's generation config says of these does not count.
_NO_PENALTY, _ALL_TOKENS = {"repetition_penalty": 1.0}, {"top_k": 0, "top_p": 1.0}


@dataclass(frozen=True)
class BagelContext:
    """What the model has read of a conversation.

    Attributes:
        segments (`tuple[EncodedSegment, ...]`): What was read.
        cache (`DynamicCache`, *optional*):
            Whose first `length` tokens are the keys and values of the segments. If it is shorter, the last texts, or the end
            of one, are yet to be read, with what comes next.
        length (`int`): Tokens.
        next_position (`int`): Rope position of what comes next.
        prefix (`BagelContext`, *optional*): Holds the first tokens, so that the cache holds only those behind them.
    """

    segments: tuple[EncodedSegment, ...] = ()
    cache: DynamicCache | None = None
    length: int = 0
    next_position: int = 0
    prefix: BagelContext | None = None

    @property
    def _reach(self) -> int:
        """Tokens of the prefix and in the cache, others' included."""
        return self._before + (0 if self.cache is None else self.cache.get_seq_length())

    @property
    def _before(self) -> int:
        """Tokens of the prefix."""
        return 0 if self.prefix is None else self.prefix.length

    @property
    def held(self) -> int:
        """Of its tokens, those that were read."""
        return min(self.length, self._reach)

    @property
    def own_cache(self) -> DynamicCache | None:
        """A cache of these segments alone, whatever others have read behind them. Tensors are copied for a prefix only.

        A context of fewer segments in the same cache stays what it is while the cache grows.
        """
        cache = self.cache
        if cache is not None and self._reach > self.length:
            (cache,) = split_cache(cache, [0], [self.length - self._before])
        return cache if self.prefix is None else extend_cache(self.prefix.own_cache, cache)

    def behind(self, prefix: BagelContext) -> BagelContext:
        """The same context, of which another one holds the first tokens, and its cache nothing but the rest."""
        if self.prefix is not None and self.prefix.length == prefix.length and self._reach <= self.length:
            return replace(self, prefix=prefix)
        (cache,) = split_cache(self.own_cache, [prefix.length], [self.held - prefix.length])
        return replace(self, cache=copy_cache(cache), prefix=prefix)

    def cut(self) -> BagelContext:
        """The context without what its cache holds behind it, as a copy if there is something."""
        return self if self._reach <= self.length else self.copied()

    def unread(self, more: Sequence[EncodedSegment] = ()) -> EncodedSequence:
        """The tokens that the cache does not hold, of this context and more segments, at their rope positions."""
        whole, tokens = 0, 0
        while whole < len(self.segments) and tokens + len(self.segments[whole]) <= self.held:
            tokens += len(self.segments[whole])
            whole += 1
        sequence, skipped = lay_out([*self.segments[whole:], *more]), self.held - tokens
        names = ("input_ids", "labels", "token_types", "position_ids")
        rest = EncodedSequence(*(getattr(sequence, name)[skipped:] for name in names))
        return replace(rest, position_ids=rest.position_ids + self.first(whole).next_position)

    @property
    def token_ids(self) -> torch.Tensor:
        """Of everything, `(1, tokens)`."""
        return torch.cat([segment.token_ids for segment in self.segments])[None]

    @property
    def token_types(self) -> torch.Tensor:
        """Of everything, `(1, tokens)`."""
        return torch.cat([segment.token_types for segment in self.segments])[None]

    def first(self, num_segments: int) -> BagelContext:
        """The context of the first segments, in the same cache."""
        if self.prefix is not None and num_segments <= len(self.prefix.segments):
            return self.prefix.first(num_segments)
        return replace(self._with(self.segments[:num_segments], self.cache), prefix=self.prefix)

    def common(self, segments: Sequence[EncodedSegment]) -> int:
        """With how many of the very same segments both begin, with the same images."""
        pairs = zip(self.segments, segments, strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] is pair[1], pairs))

    def begins(self, other: BagelContext) -> bool:
        """Whether another context holds the same segments first."""
        return self.common(other.segments) == len(self.segments)

    def copied(self) -> BagelContext:
        """The context with keys and values of its own."""
        cache = self.own_cache
        return self if cache is None else replace(self, cache=copy_cache(cache), prefix=None)

    def grown(self, segments: Sequence[EncodedSegment], cache: DynamicCache | None) -> BagelContext:
        """The context with more segments, whose tokens a cache holds behind its own, or the first of them."""
        return self._with((*self.segments, *segments), cache)

    def with_written(self, segment: EncodedSegment, written: Written) -> BagelContext:
        """The context with a text that was written behind it: the tokens with which it begins as it was need not be read."""
        cached = [int(segment.token_ids[0]), *written.tokens[:-1]]
        pairs = zip(cached, segment.token_ids[:-1].tolist(), strict=False)
        held = self.length + sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        written.cache.crop(held - written.cache.get_seq_length())
        return self.grown([segment], written.cache)

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
        temperature_only (`bool`): Whether nothing else counts, such as `top_k` of the generation config.
        seed (`int`, *optional*): Of sampling.
        logits_processor (`LogitsProcessorList`): Changes the scores from which tokens are chosen.
        stopping_criteria (`StoppingCriteriaList`): What else ends it.
        streamer (`BaseStreamer`, *optional*): Gets the tokens.
    """

    max_new_tokens: int = 1024
    do_sample: bool = False
    temperature: float = 1.0
    temperature_only: bool = False
    seed: int | None = None
    logits_processor: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    stopping_criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)
    streamer: Any = None

    @property
    def sampling(self) -> dict[str, Any]:
        """What `generate` is told of how tokens are chosen."""
        sampling = {"do_sample": True, "temperature": self.temperature} if self.do_sample else {"do_sample": False}
        if not self.temperature_only:
            return sampling
        return sampling | _NO_PENALTY | (_ALL_TOKENS if self.do_sample else {})

    def random_numbers(self, device: torch.device) -> torch.Generator | None:
        """Those of the global state under the seed, if there is one."""
        return None if self.seed is None else torch.Generator(device).manual_seed(self.seed)

    def choose(self, ids: torch.Tensor, scores: torch.Tensor) -> int:
        """A single token by its scores: the best one, or one that is drawn at the temperature."""
        scores = self.logits_processor(ids, scores.float())
        if not self.do_sample:
            return int(scores.argmax())
        generator = self.random_numbers(scores.device)
        return int(torch.multinomial((scores / self.temperature).softmax(-1), 1, generator=generator))


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
        self.attention_kwargs = attention_kwargs
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
        return self.read_with_scores(contexts, segments)[0]

    def read_with_scores(
        self, contexts: Sequence[BagelContext], segments: Sequence[Sequence[EncodedSegment]]
    ) -> tuple[list[BagelContext], list[torch.Tensor | None]]:
        """Like `read`, and the scores of the token behind each, `(1, vocabulary)`, where something was read."""
        read, scores = list(contexts), [None] * len(contexts)
        texts: dict[bool, list[int]] = {True: [], False: []}
        batches = []
        for index, (context, new) in enumerate(zip(contexts, segments, strict=True)):
            if any(segment.grid is not None for segment in new):
                batches.append([index])
            elif new or context.held < context.length:
                texts[context.cache is None].append(index)
        new_tokens = [
            context.length - context.held + sum(map(len, new)) for context, new in zip(contexts, segments, strict=True)
        ]
        for indices in texts.values():
            lengths = [contexts[index].held + new_tokens[index] for index in indices]
            for places in bucket_by_length(lengths, MAX_JOINED_TOKENS):
                joined = [indices[place] for place in places]
                shared = bucket_by_length([new_tokens[index] for index in joined], MAX_PREFILL_TOKENS, FORWARD_COST)
                batches += [[joined[place] for place in batch] for batch in shared]
        for batch in batches:
            grown, found = self._read_together(
                [contexts[index] for index in batch], [segments[index] for index in batch]
            )
            for place, index in enumerate(batch):
                read[index], scores[index] = grown[place], found[place : place + 1]
        return read, scores

    def _read_together(
        self, contexts: list[BagelContext], segments: list[Sequence[EncodedSegment]]
    ) -> tuple[list[BagelContext], torch.Tensor]:
        """One forward of texts, or of one conversation with images, and the last scores `(contexts, vocabulary)`."""
        sequences = [context.unread(new) for context, new in zip(contexts, segments, strict=True)]
        past = [context.held for context in contexts]
        cache: Any = contexts[0].own_cache
        if len(contexts) > 1:
            cache = join_caches([own for context in contexts if (own := context.own_cache) is not None])
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
        ends = torch.tensor([[len(sequence.input_ids) - 1] for sequence in sequences])
        with kept_whole(contexts[0].cache), self.adapters.applied():
            outputs = self.transformer(
                input_ids=ids.to(self.device, non_blocking=True),
                attention_mask=mask,
                position_ids=self._positions(sequences, ids.shape[1]).to(self.device, non_blocking=True),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=ends.to(self.device, non_blocking=True),
                **self._images([segment for new in segments for segment in new], types),
                **self.adapters.attention_kwargs,
            )
        lengths = [length + len(sequence.input_ids) for length, sequence in zip(past, sequences, strict=True)]
        caches = split_cache(cache, padding, lengths)
        grown = [context.grown(new, own) for context, new, own in zip(contexts, segments, caches, strict=True)]
        return grown, outputs.logits[:, -1]

    def _positions(self, sequences: list[EncodedSequence], length: int) -> torch.Tensor:
        """Rope positions `(contexts, length)`, which go on behind the tokens of the shorter texts."""
        each = [sequence.position_ids for sequence in sequences]
        return torch.stack([torch.cat([own, own[-1] + 1 + torch.arange(length - len(own))]) for own in each])

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
        temperature_only: bool = False,
    ) -> list[str]:
        """
        What the model writes behind each context; to remember it, read it.

        Greedy texts are written together. Sampled ones are written one by one, since `generate` draws for all from one
        random state, and each is to be what its own seed gives it alone; and those with candidates looked up in the
        prompt, which the library has for one text at a time.

        Args:
            contexts (`Sequence[BagelContext]`): The contexts, which stay as they are.
            max_new_tokens (`int`): Most tokens of a text.
            do_sample, temperature: Of the text.
            seeds (`Sequence[int | None]`, *optional*): Of each sampled text; without one the global state is used.
            temperature_only (`bool`): See [`TextSettings`].
        """
        sampling = TextSettings(max_new_tokens, do_sample, temperature, temperature_only).sampling
        lengths = [context.length + max_new_tokens for context in contexts]
        batches = [[index] for index in range(len(contexts))]
        looks_up = self.transformer.generation_config.prompt_lookup_num_tokens is not None
        if not do_sample and not looks_up:
            batches = bucket_by_length(lengths, MAX_JOINED_TOKENS)
        texts = [""] * len(contexts)
        for batch in batches:
            seed = None if seeds is None or not do_sample else seeds[batch[0]]
            with seeded(seed, self.device):
                written = self._write_together(
                    [contexts[index] for index in batch], max_new_tokens=max_new_tokens, **sampling
                )
            for index, text in zip(batch, written, strict=True):
                texts[index] = text
        return texts

    def _write_together(self, contexts: list[BagelContext], **settings: Any) -> list[str]:
        """What `generate` writes behind each context and a start token."""
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
                past_key_values=join_caches([own for context in contexts if (own := context.own_cache) is not None]),
                return_dict_in_generate=True,
                residual_dtype=self.adapters.residual_dtype,
                **settings,
            )
        stops = self.transformer.generation_config.eos_token_id
        stops = set(stops if isinstance(stops, list) else [stops])
        written = out.sequences[:, prompt.shape[1] :].tolist()
        texts = [tokenizer.decode(_until_stop(tokens, stops)) for tokens in written]
        return [text.split(END)[0].split(START)[0] for text in texts]

    def encode_text(self, text: str, sanitize_control_tokens: bool = False) -> list[EncodedSegment]:
        """A text as what a context reads; special tokens in it may be words like others."""
        segment = Segment("text", text, sanitize_control_tokens=sanitize_control_tokens)
        return self.processor.encode_segments([segment])

    @property
    def opening(self) -> EncodedSegment:
        """What a text that is to be written begins with."""
        start = self.processor.tokenizer.convert_tokens_to_ids(START)
        return EncodedSegment(Segment("text", START), torch.tensor([start]))


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
