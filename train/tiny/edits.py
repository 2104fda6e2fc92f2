"""Four kinds of edits of the tiny world: what is asked of which pictures, and what comes of it.

    edit      make the background blue; make the circle red; change the word to "HAT";
              remove the circle
    style     draw the picture in the night style
    subjects  put the circle of the first picture above the word of the second
    identity  a blue card with the emblem of the picture on the left and the white word "HAT"

Held out by a hash: words and colour pairs as of text prompts, emblems, and pairs of sources (the
first's shape and background, the second's background). A held-out edit leads to a picture whose
word and colour pairs are held out, of sources or an emblem that are; a prompt for training to none
of that.
"""

import random
from dataclasses import dataclass, replace

from duet.train.tiny.scenes import STYLES, Emblem, Scene, sample_cells
from duet.train.tiny.world import (
    ALPHABET,
    PALETTE,
    PLACES,
    SHAPES,
    TEXT_COLOURS,
    WORD_LENGTHS,
    Card,
    Shape,
    article,
    held_out,
    is_held_out_pair,
    is_held_out_word,
)

BACKGROUND, WORD = "background", "word"  # regions; the three others are named as PLACES are
MOST_SHAPES = 2


@dataclass(frozen=True)
class Edit:
    kind: str
    prompt: str
    sources: tuple[Scene, ...]
    wanted: Scene
    asked: tuple[str, ...]  # regions that the prompt speaks of; the others are to stay


def is_held_out_sources(first: Scene, second: Scene) -> bool:
    """By the shape and background of the first, the background of the second."""
    shape = first.card.shapes[0]
    return held_out(f"{shape.kind} {first.card.background}/{second.card.background}")


@dataclass(frozen=True)
class Choice:
    """What may be drawn: of training, of what is held out, or `any_pair` of colours."""

    rng: random.Random
    held_out: bool = False
    any_pair: bool = False

    def word(self) -> str:
        while True:
            length = self.rng.choice(WORD_LENGTHS)
            word = "".join(self.rng.choices(ALPHABET, k=length))
            if is_held_out_word(word) == self.held_out:
                return word

    def pair(self, background: str, colour: str) -> bool:
        """May that shape stand on that card?"""
        if background == colour:
            return False
        return self.any_pair or is_held_out_pair(background, colour) == self.held_out

    def card(self, counts: tuple[int, ...]) -> Card:
        """With so many shapes, no two of one kind."""
        rng, colours = self.rng, []
        while not colours:
            background = rng.choice(list(PALETTE))
            colours = [c for c in PALETTE if self.pair(background, c)]
        count = rng.choice(counts)
        places = sorted(rng.sample(list(PLACES), count), key=PLACES.get)
        kinds = rng.sample(SHAPES, count)
        shapes = (Shape(k, rng.choice(colours), p) for k, p in zip(kinds, places, strict=True))
        return Card(background, tuple(shapes), rng.choice(list(TEXT_COLOURS)), self.word())

    def background(self, card: Card) -> str | None:
        """Another one for the card's shapes."""
        fit = [
            b
            for b in PALETTE
            if b != card.background and all(self.pair(b, s.colour) for s in card.shapes)
        ]
        return self.rng.choice(fit) if fit else None

    def colour(self, card: Card, old: str) -> str | None:
        fit = [c for c in PALETTE if c != old and self.pair(card.background, c)]
        return self.rng.choice(fit) if fit else None


def recolour_background(choice: Choice) -> Edit | None:
    source = choice.card((1, 2))
    if choice.held_out:  # the pairs of the result are: those of its source may be any
        source = replace(source, background=choice.rng.choice(list(PALETTE)))
        if source.background in source.colours[1:]:
            return None
    colour = choice.background(source)
    if colour is None:
        return None
    wanted = replace(source, background=colour)
    prompt = f"make the background {colour}"
    return Edit("edit", prompt, (Scene(source),), Scene(wanted), (BACKGROUND,))


def recolour_shape(choice: Choice) -> Edit | None:
    source = choice.card((1, 2))
    shape = choice.rng.choice(source.shapes)
    colour = choice.colour(source, shape.colour)
    if colour is None:
        return None
    wanted = with_shape(source, replace(shape, colour=colour))
    prompt = f"make the {shape.kind} {colour}"
    return Edit("edit", prompt, (Scene(source),), Scene(wanted), (shape.place,))


def change_word(choice: Choice) -> Edit | None:
    source = choice.card((1, 2))
    word = choice.word()
    if word == source.word:
        return None
    wanted = replace(source, word=word)
    return Edit("edit", f'change the word to "{word}"', (Scene(source),), Scene(wanted), (WORD,))


def remove_shape(choice: Choice) -> Edit:
    source = choice.card((MOST_SHAPES,))
    shape = choice.rng.choice(source.shapes)
    wanted = replace(source, shapes=tuple(s for s in source.shapes if s != shape))
    prompt = f"remove the {shape.kind}"
    return Edit("edit", prompt, (Scene(source),), Scene(wanted), (shape.place,))


def change_style(choice: Choice) -> Edit:
    return _styled(choice, choice.rng.choice(STYLES))


def change_style_to(style: str, rng: random.Random, held_out: bool = False) -> Edit:
    return _styled(Choice(rng, held_out), style)


def _styled(choice: Choice, style: str) -> Edit:
    source = choice.card((1, 2))
    prompt = f"draw the picture in the {style} style"
    asked = tuple(s.place for s in source.shapes) if style == "outline" else (BACKGROUND,)
    return Edit("style", prompt, (Scene(source),), Scene(source, style), asked)


def join_subjects(choice: Choice) -> Edit | None:
    first = choice.card((1,))
    second = choice.card((0,))
    if choice.held_out:
        second = replace(second, background=choice.rng.choice(list(PALETTE)))
    shape = first.shapes[0]
    wanted = replace(second, shapes=(shape,))
    sources = Scene(first), Scene(second)
    if first.background == second.background or not choice.pair(second.background, shape.colour):
        return None
    if is_held_out_sources(*sources) != choice.held_out:
        return None
    prompt = f"put the {shape.kind} of the first picture above the word of the second"
    return Edit("subjects", prompt, sources, Scene(wanted), (shape.place,))


def carry_emblem(choice: Choice) -> Edit:
    source, card = choice.card((0,)), choice.card((0,))
    cells = sample_cells(choice.rng, {source.background, card.background}, choice.held_out)
    before, after = (Emblem(cells, choice.rng.choice(list(PLACES))) for _ in range(2))
    said = f"{card.background} card"
    prompt = (
        f"{article(said)} {said} with the emblem of the picture {after.place} "
        f'and the {card.text_colour} word "{card.word}"'
    )
    wanted = Scene(card, emblem=after)
    asked = BACKGROUND, WORD, *(p for p in PLACES if p != after.place)
    return Edit("identity", prompt, (Scene(source, emblem=before),), wanted, asked)


KINDS = {
    "edit": (recolour_background, recolour_shape, change_word, remove_shape),
    "style": (change_style,),
    "subjects": (join_subjects,),
    "identity": (carry_emblem,),
}


def sample_edit(
    kind: str, rng: random.Random, held_out: bool = False, any_pair: bool = False
) -> Edit:
    """One of the kind; `any_pair`: pictures of held-out colour pairs too, for pretraining."""
    choice = Choice(rng, held_out, any_pair)
    while True:
        edit = rng.choice(KINDS[kind])(choice)
        if edit is not None:
            return edit


def sample_styled(rng: random.Random) -> Scene:
    """A picture that no caption describes: in a style, or with an emblem; of any colour pairs."""
    return sample_edit(rng.choice(("style", "identity")), rng, any_pair=True).wanted


def with_shape(card: Card, shape: Shape) -> Card:
    """In the place of the one that stands there."""
    return replace(card, shapes=tuple(shape if s.place == shape.place else s for s in card.shapes))


def mistaken(edit: Edit, rng: random.Random) -> Scene:
    """What comes of it in a picture that its prompt does not tell rightly, as in data of the web:
    another colour, another style, the wrong shape gone, another place.
    """
    wanted = edit.wanted
    card = wanted.card
    if edit.kind == "style":
        source = edit.sources[0].card
        return Scene(source, rng.choice([s for s in ("plain", *STYLES) if s != wanted.style]))
    if edit.kind == "subjects":
        shape = card.shapes[0]
        colours = [c for c in PALETTE if c not in (card.background, shape.colour)]
        return Scene(with_shape(card, replace(shape, colour=rng.choice(colours))))
    if edit.kind == "identity":
        if rng.random() < 0.5:
            places = [p for p in PLACES if p != wanted.emblem.place]
            return replace(wanted, emblem=replace(wanted.emblem, place=rng.choice(places)))
        used = {card.background, *wanted.emblem.cells}
        free = [c for c in PALETTE if c not in used]
        return replace(wanted, card=replace(card, background=rng.choice(free))) if free else wanted
    return Scene(_mistaken_card(edit, rng))


def _mistaken_card(edit: Edit, rng: random.Random) -> Card:
    card, before, place = edit.wanted.card, edit.sources[0].card, edit.asked[0]
    if place in (WORD, BACKGROUND):
        free = [c for c in PALETTE if c not in card.colours]
        return replace(card, background=rng.choice(free))
    shape = next(s for s in before.shapes if s.place == place)
    if len(card.shapes) < len(before.shapes):  # it was to be removed
        others = tuple(s for s in before.shapes if s != shape)
        return rng.choice([before, replace(before, shapes=(shape,))]) if others else before
    said = next(s.colour for s in card.shapes if s.place == place)
    free = [c for c in PALETTE if c not in (said, card.background)]
    return with_shape(card, replace(shape, colour=rng.choice(free)))
