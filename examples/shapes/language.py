# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""English about the world: descriptions, prompts, riddles, edits, questions. All lower case, without commas."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from world import CELLS, COLOURS, SHAPES, SIZES, UNSEEN_PAIRS, Scene, Thing, is_held_out, placed, random_thing


PLACES = ("at the top left", "at the top", "at the top right", "at the left", "in the middle", "at the right") + (
    "at the bottom left",
    "at the bottom",
    "at the bottom right",
)
NUMBERS = ("no", "one", "two", "three")
# Things that have a colour, and what has a shape: riddles about the world.
THINGS_OF_COLOUR = {
    "red": ("blood", "a ripe tomato", "a fire truck"),
    "orange": ("a carrot", "a pumpkin"),
    "yellow": ("a lemon", "the sun", "a ripe banana"),
    "green": ("grass", "a frog", "spinach"),
    "blue": ("the sky", "the sea"),
    "purple": ("a plum", "lavender"),
    "white": ("snow", "milk"),
    "black": ("coal", "the night"),
}
HINTS_OF_SHAPE = {
    "circle": ("the shape of a wheel", "the shape of a coin"),
    "square": ("four equal sides and four right angles", "the shape of a chess board"),
    "triangle": ("three sides", "the shape of a pyramid"),
    "diamond": ("the shape of a kite",),
    "star": ("five points",),
    "cross": ("the shape of a plus sign",),
}


def phrase(thing: Thing, size: bool = True, place: bool = True) -> str:
    """`a small red circle at the top left`, or less."""
    words = f"{thing.size} {thing.colour} {thing.shape}" if size else f"{thing.colour} {thing.shape}"
    return f"{with_article(words)} {PLACES[thing.cell]}" if place else with_article(words)


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def joined(parts: list[str]) -> str:
    return " and ".join(parts)


def layout(scene: Scene) -> str:
    """The whole scene in one fixed form, which [`parse_layout`] reads."""
    objects = joined([phrase(thing) for thing in scene.things])
    return f"{objects} on {with_article(scene.background)} background"


def parse_layout(text: str) -> Scene | None:
    """The scene that [`layout`] put into words, or `None`."""
    objects, _, rest = text.strip().partition(" on a")
    background = re.fullmatch(r"n? (\w+) background\.?", rest)
    things = []
    for part in objects.split(" and "):
        words = re.fullmatch(r"an? (\w+) (\w+) (\w+) ((?:at|in) the [\w ]+)", part)
        if words is None or words[4] not in PLACES:
            return None
        things.append(Thing(PLACES.index(words[4]), words[2], words[3], words[1]))
    known = all(thing.colour in COLOURS and thing.shape in SHAPES and thing.size in SIZES for thing in things)
    if background is None or background[1] not in COLOURS or not known:
        return None
    return Scene(background[1], tuple(sorted(things)))


@dataclass(frozen=True)
class Wish:
    """What a picture must show; `None` leaves it open.

    Attributes:
        things: Of each object what is asked for, as pairs of an attribute of [`Thing`] and its value.
        background (`str`, *optional*)
        relation (`str`, *optional*): Where the first object stands from the second, of `RELATIONS`.
    """

    things: tuple[tuple[tuple[str, object], ...], ...]
    background: str | None = None
    relation: str | None = None


RELATIONS: dict[str, Callable[[Thing, Thing], bool]] = {
    "left of": lambda first, second: first.column < second.column,
    "right of": lambda first, second: first.column > second.column,
    "above": lambda first, second: first.row < second.row,
    "below": lambda first, second: first.row > second.row,
}


def wish_for(scene: Scene, size: bool = True, place: bool = True, background: bool = True) -> Wish:
    things = []
    for thing in scene.things:
        known: dict[str, object] = {"colour": thing.colour, "shape": thing.shape}
        if size:
            known["size"] = thing.size
        if place:
            known["cell"] = thing.cell
        things.append(tuple(known.items()))
    return Wish(tuple(things), scene.background if background else None)


def grants(scene: Scene, wish: Wish) -> bool:
    """Whether a scene shows all that was asked for, and no other object."""
    if wish.background is not None and scene.background != wish.background:
        return False
    if len(scene.things) != len(wish.things):
        return False
    matched = []
    for known in wish.things:
        fits = [thing for thing in scene.things if all(getattr(thing, name) == value for name, value in known)]
        if len(fits) != 1:
            return False
        matched.append(fits[0])
    return wish.relation is None or RELATIONS[wish.relation](matched[0], matched[1])


VERBS = ("", "", "draw ", "paint ", "show me ", "i want ", "please draw ", "make a picture of ")


@dataclass(frozen=True)
class Prompt:
    """What is asked for.

    Attributes:
        text (`str`)
        wish ([`Wish`]): What the picture must show.
        scene ([`Scene`]): One that does, its objects in the order in which the text names them.
    """

    text: str
    wish: Wish
    scene: Scene


def full_prompt(generator: random.Random, scene: Scene) -> Prompt:
    """A prompt that says everything."""
    scene = _in_any_order(generator, scene)
    text = joined([phrase(thing) for thing in scene.things])
    return Prompt(_with_background(generator, text, scene.background), wish_for(scene), scene)


def ordinary_prompt(generator: random.Random, scene: Scene) -> Prompt:
    """A prompt that leaves the places, and sometimes more, to the painter."""
    scene = _in_any_order(generator, scene)
    size, background = generator.random() < 0.5, generator.random() < 0.7
    text = joined([phrase(thing, size, place=False) for thing in scene.things])
    text = _with_background(generator, text, scene.background if background else None)
    return Prompt(text, wish_for(scene, size, place=False, background=background), scene)


def relation_prompt(generator: random.Random, scene: Scene) -> Prompt | None:
    """A prompt that says how two objects stand to each other, if there are two."""
    if len(scene.things) != 2:
        return None
    scene = _in_any_order(generator, scene)
    first, second = scene.things
    relation = generator.choice([name for name, holds in RELATIONS.items() if holds(first, second)])
    size, background = generator.random() < 0.5, generator.random() < 0.7
    text = f"{phrase(first, size, place=False)} {relation} {phrase(second, size, place=False)}"
    text = _with_background(generator, text, scene.background if background else None)
    wish = wish_for(scene, size, place=False, background=background)
    return Prompt(text, replace(wish, relation=relation), scene)


def riddle_prompt(generator: random.Random, scene: Scene) -> Prompt | None:
    """A prompt that paraphrases an object's colour, shape, or both; of a picture with one object."""
    if len(scene.things) != 1:
        return None
    (thing,) = scene.things
    colour, shape = generator.choice(THINGS_OF_COLOUR[thing.colour]), generator.choice(HINTS_OF_SHAPE[thing.shape])
    kind = generator.choice(("colour", "shape", "both"))
    if kind == "colour":
        text = f"a {thing.shape} in the colour of {colour}"
    elif kind == "shape":
        text = f"{with_article(thing.colour)} thing with {shape}"
    else:
        text = f"something with {shape} in the colour of {colour}"
    background = generator.random() < 0.5
    text = _with_background(generator, text, scene.background if background else None)
    return Prompt(text, wish_for(scene, size=False, place=False, background=background), scene)


def _in_any_order(generator: random.Random, scene: Scene) -> Scene:
    return replace(scene, things=tuple(generator.sample(scene.things, len(scene.things))))


def _with_background(generator: random.Random, objects: str, background: str | None) -> str:
    verb = generator.choice(VERBS)
    if background is None:
        return verb + objects
    form = generator.choice(("on", "on background", "background", "first"))
    if form == "on":
        return f"{verb}{objects} on {background}"
    if form == "on background":
        return f"{verb}{objects} on {with_article(background)} background"
    if form == "background":
        return f"{verb}{objects} with {with_article(background)} background"
    return f"{background} background with {objects}"


def plan(prompt: Prompt) -> str:
    """What is thought before a prompt is drawn: the whole layout, in the order of the prompt."""
    return f"<think>{layout(prompt.scene)}</think>"


def edit(generator: random.Random, scene: Scene, kind: str) -> tuple[str, Scene] | None:
    """An instruction and what the scene becomes, or `None` if this kind of edit does not apply."""
    chosen = generator.choice(scene.things)
    name = f"{chosen.colour} {chosen.shape}"
    if kind == "background":
        taken = {thing.colour for thing in scene.things} | {scene.background}
        colour = generator.choice([colour for colour in COLOURS if colour not in taken])
        text = generator.choice(
            ("make the background {0}", "change the background to {0}", "put it on {0}", "turn the background {0}")
        )
        return text.format(colour), replace(scene, background=colour)
    if kind == "recolour":
        taken_pairs = {thing.pair for thing in scene.things}
        colours = [
            colour for colour in COLOURS if colour != scene.background and (colour, chosen.shape) not in taken_pairs
        ]
        colour = generator.choice(colours)
        text = generator.choice(("make the {0} {1}", "paint the {0} {1}", "change the {0} to {1}", "turn the {0} {1}"))
        return text.format(name, colour), _replaced(scene, chosen, replace(chosen, colour=colour))
    if kind == "remove":
        if len(scene.things) == 1:
            return None
        text = generator.choice(("remove the {0}", "take away the {0}", "delete the {0}", "erase the {0}"))
        return text.format(name), _replaced(scene, chosen, None)
    free = [cell for cell in range(len(CELLS)) if cell not in {thing.cell for thing in scene.things}]
    cell = generator.choice(free)
    if kind == "move":
        moved = placed(generator, cell, chosen.colour, chosen.shape, chosen.size)
        text = generator.choice(("move the {0} to the {1}", "put the {0} {2}", "shift the {0} to the {1}"))
        return text.format(name, CELLS[cell], PLACES[cell]), _replaced(scene, chosen, moved)
    if kind == "add":
        if len(scene.things) == 3:
            return None
        new = random_thing(generator, scene.background, list(scene.things), cell)
        text = generator.choice(("add {0}", "put {0}", "draw {0} too", "add {0} to the picture"))
        return text.format(phrase(new)), Scene(scene.background, tuple(sorted((*scene.things, new))))
    raise ValueError(f"`kind` must be one of {', '.join(EDITS)}, got {kind!r}.")


EDITS = ("recolour", "remove", "add", "move", "background")

# Asked for behind a prompt: draw, then answer.
TELL = ("{0} then tell me {1}", "{0} and then answer {1}", "{0} then say {1}")
STEPS = ("show the steps: {0}", "draw this step by step: {0}", "in steps: {0}")


def steps(scene: Scene) -> list[tuple[str, Scene]]:
    """How a scene comes to be, an object at a time and in its order: what is said before each picture, and the picture."""
    found = []
    for count, thing in enumerate(scene.things, start=1):
        so_far = Scene(scene.background, tuple(sorted(scene.things[:count])))
        found.append((f"first {layout(so_far)}" if count == 1 else f"then add {phrase(thing)}", so_far))
    return found


def words_question(generator: random.Random, scene: Scene) -> tuple[str, str]:
    """A question about a scene in words, which no picture is needed for, and its answer."""
    scene = _in_any_order(generator, scene)
    size, place = generator.random() < 0.5, generator.random() < 0.5
    kinds = {
        "just say how many things are in: {0}": NUMBERS[len(scene.things)],
        "no picture: which shapes are in: {0}?": joined([thing.shape for thing in scene.things]),
        "just name the colours of: {0}": joined([thing.colour for thing in scene.things]),
    }
    text = generator.choice(list(kinds))
    return text.format(joined([phrase(thing, size, place) for thing in scene.things])), kinds[text]


def _replaced(scene: Scene, old: Thing, new: Thing | None) -> Scene:
    others = [thing for thing in scene.things if thing is not old]
    return Scene(scene.background, tuple(sorted(others if new is None else [*others, new])))


def question(generator: random.Random, scene: Scene, kind: str) -> tuple[str, str] | None:
    """A question and its answer, or `None` if a question of this kind has no clear answer here."""
    chosen = generator.choice(scene.things)
    name = f"{chosen.colour} {chosen.shape}"
    shapes = [thing.shape for thing in scene.things]
    colours = [thing.colour for thing in scene.things]
    if kind == "colour":
        texts = [f"what colour is the thing {PLACES[chosen.cell]}?"]
        if shapes.count(chosen.shape) == 1:
            texts += [f"what colour is the {chosen.shape}?", f"which colour does the {chosen.shape} have?"]
        return generator.choice(texts), chosen.colour
    if kind == "shape":
        texts = [f"what shape is {PLACES[chosen.cell]}?"]
        if colours.count(chosen.colour) == 1:
            texts += [f"what shape is the {chosen.colour} thing?", f"what is {chosen.colour}?"]
        return generator.choice(texts), chosen.shape
    if kind == "size":
        return generator.choice((f"how big is the {name}?", f"what size is the {name}?")), chosen.size
    if kind == "position":
        return generator.choice((f"where is the {name}?", f"in which place is the {name}?")), PLACES[chosen.cell]
    if kind == "count":
        if generator.random() < 0.5:
            texts = ["how many things are there?", "how many shapes can you see?"]
            return generator.choice(texts), NUMBERS[len(scene.things)]
        shape = generator.choice((chosen.shape, generator.choice(SHAPES)))
        plural = "crosses" if shape == "cross" else f"{shape}s"
        return f"how many {plural} are there?", NUMBERS[shapes.count(shape)]
    if kind == "background":
        texts = ["what colour is the background?", "which colour is behind everything?"]
        return generator.choice(texts), scene.background
    if kind == "exists":
        return _exists(generator, scene, chosen)
    if kind in ("relation", "bare_relation"):
        return _related(generator, scene, is_named=kind == "relation")
    if kind == "riddle":
        return riddle_question(generator, scene)
    raise ValueError(f"`kind` must be one of {', '.join(QUESTIONS)}, got {kind!r}.")


QUESTIONS = ("colour", "shape", "size", "position", "count", "background", "exists", "relation")


def _exists(generator: random.Random, scene: Scene, chosen: Thing) -> tuple[str, str]:
    """As many yes as no; a no shares its colour or its shape with something that is there."""
    colour, shape = chosen.pair
    pairs = {thing.pair for thing in scene.things}
    if not is_held_out(scene):
        # Or training would know that the pairs which it never shows are never there.
        pairs |= UNSEEN_PAIRS
    is_there = generator.random() < 0.5
    while not is_there and (colour, shape) in pairs:
        if generator.random() < 0.5:
            colour = generator.choice([name for name in COLOURS if name != scene.background])
        else:
            shape = generator.choice(SHAPES)
    name = with_article(f"{colour} {shape}")
    return generator.choice((f"is there {name}?", f"can you see {name}?")), "yes" if is_there else "no"


# Of each relation the axis on which it compares, and what is said of two things that are level there.
AXES = {
    "left of": ("column", "neither left nor right of"),
    "right of": ("column", "neither left nor right of"),
    "above": ("row", "neither above nor below"),
    "below": ("row", "neither above nor below"),
}


def _related(generator: random.Random, scene: Scene, is_named: bool) -> tuple[str, str] | None:
    """The answer says where both things are, and then, if it is to be named, how they stand, before yes or no."""
    if len(scene.things) < 2:
        return None
    first, second = generator.sample(scene.things, 2)
    is_so = generator.random() < 0.5
    relation = generator.choice([name for name, holds in RELATIONS.items() if holds(first, second) == is_so])
    names = [f"the {thing.colour} {thing.shape}" for thing in (first, second)]
    places = joined([f"{name} is {PLACES[thing.cell]}" for name, thing in zip(names, (first, second), strict=True)])
    reason = f" so it is {_standing(first, second, relation)} it and the answer is" if is_named else " so"
    return f"is {names[0]} {relation} {names[1]}?", f"{places}{reason} {'yes' if is_so else 'no'}"


def _standing(first: Thing, second: Thing, asked: str) -> str:
    """How two things stand on the axis that is asked about."""
    axis, level = AXES[asked]
    holding = [name for name, holds in RELATIONS.items() if AXES[name][0] == axis and holds(first, second)]
    return holding[0] if holding else level


DESCRIBE = ("describe the picture", "what is in the picture?", "what do you see?", "describe this")


def riddle_question(generator: random.Random, scene: Scene) -> tuple[str, str]:
    """A question that paraphrases a colour, and its answer."""
    colour = generator.choice([name for name in COLOURS if name != scene.background])
    if generator.random() < 0.6:
        colour = generator.choice(scene.things).colour
    source = generator.choice(THINGS_OF_COLOUR[colour])
    matching = [thing for thing in scene.things if thing.colour == colour]
    if len(matching) == 1 and generator.random() < 0.5:
        return f"what shape is the thing in the colour of {source}?", matching[0].shape
    return f"is there anything in the colour of {source}?", "yes" if matching else "no"


def thought_answer(scene: Scene, answer: str) -> str:
    """What is thought about a picture, and the answer."""
    return f"<think>{layout(scene)}</think>{answer}"
