"""The small world in words: what may truly be said, and asked, about a drawn scene.

    random.Random(seed) ──sample_scene──▶ Scene ──draw──▶ picture (64×64 RGB unless told otherwise)
                                            ├──caption────▶ "a small teal circle on the left"
                                            ├──describe───▶ everything that a question may ask, in words
                                            └──questions──▶ [("is there not a red shape?", "yes"), …]

The tiny CLIP and the tiny language model in `toy/weights` learned from nothing else.

Conventions that are not obvious: a square may also be called a rectangle, and "what shape …?" is answered with
"rectangle" for both; nobody is asked whether a ring is a circle, a diamond a rectangle, or a near-square a square.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from tinyvlm.toy.scenes import COLORS, KINDS, SIDE, Notice, Scene, Thing, draw, sample_scene

__all__ = [
    "COLORS", "KINDS", "NUMBERS", "Claim", "Notice", "Scene", "Thing", "caption", "checks", "claims_and_caption",
    "describe", "draw", "facts", "is_negated", "questions", "sample_scene",
]  # fmt: skip

Claim = tuple[str, str, str, str]
"""(size, colour, name, place) of one thing, "" where nothing is said; also ("count", "two", "", "") and such."""

NUMBERS = ("zero", "one", "two", "three", "four")

NEGATIONS = (" not ", " no ", "n't", " lack ", " missing", " without ", " absent")

_ALSO = {"square": "rectangle"}
_UNSURE = {"ring": ("circle",), "diamond": ("square", "rectangle"), "rectangle": ("square",)}

_NOUNS = ("picture", "image", "photo", "drawing", "scene")
_PRESENT = (
    "is there {x}?", "is there {x} in the image?", "does the image contain {x}?", "is {x} present?", "can you see {x}?",
    "does the picture show {x}?", "do you see {x} in the picture?", "is there {x} here?", "does the image have {x}?",
)  # fmt: skip
_ABSENT = (
    "is there not {x}?", "is there not {x} in the image?", "does the image not contain {x}?", "is no {bare} present?",
    "does the picture lack {x}?", "is {x} missing?", "is the picture without {x}?", "is there no {bare}?",
    "does the image not show {x}?", "is {x} absent?", "isn't there {x}?",
)  # fmt: skip
_WHAT_SHAPE = (
    "what shape is in the image?", "what shape does the image contain?", "what shape is present?", "what shape is it?",
    "which shape do you see?", "name the shape.", "what is the shape in the picture?", "what kind of shape is this?",
)  # fmt: skip
_WHAT_SHAPE_COLORED = ("what is the {color} shape?", "what shape is {color}?", "which shape is the {color} one?")
_WHAT_COLOR = (
    "what color is the {x}?", "what is the color of the {x}?", "which color does the {x} have?",
    "name the color of the {x}.", "the {x} has what color?",
)  # fmt: skip
_WHERE = ("where is the {x}?", "where in the image is the {x}?", "in which part of the picture is the {x}?")
_HOW_MANY = ("how many {x} are there?", "how many {x} are in the image?", "count the {x}.", "how many {x} do you see?")


def article(words: str) -> str:
    """ "a circle", "an orange star", "a letter A"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def where(place: str) -> str:
    """A place of the 3×3 grid as a phrase: "on the left", "at the top right", "in the center"."""
    if place == "center":
        return "in the center"
    return f"{'on' if place in ('left', 'right') else 'at'} the {place}"


def names(thing: Thing) -> tuple[str, ...]:
    """The nouns that are true of a thing, the usual one first."""
    return (thing.name, _ALSO[thing.kind]) if thing.kind in _ALSO else (thing.name,)


def facts(scene: Scene) -> frozenset[Claim]:
    """Every claim that is true of a scene."""
    return frozenset(_facts(scene))


def _facts(scene: Scene) -> Iterator[Claim]:
    yield ("backdrop", scene.backdrop, "", "")
    if scene.notice:
        yield from (("notice", text, "", "") for text in ("", scene.notice.text))
    else:
        yield ("count", NUMBERS[len(scene.things)], "", "")
    for thing in scene.things:
        for name in ("", *names(thing)):
            for size in {"", thing.size}:
                for color in ("", thing.color):
                    yield (size, color, name, "")
                    yield (size, color, name, thing.place)


def caption(scene: Scene, rng: random.Random) -> str:
    """One true sentence or phrase about a scene; it may leave things out."""
    return claims_and_caption(scene, rng)[1]


def claims_and_caption(scene: Scene, rng: random.Random) -> tuple[frozenset[Claim], str]:
    """A caption together with what it claims, so that it can be checked against the facts of any other scene."""
    if scene.notice:
        text = scene.notice.text if rng.random() < 0.7 else ""
        card = rng.choice(("a gray notice card", "a placeholder card", "a notice card", "a blank card with a notice"))
        said = rng.choice((" that says {}", " with the words {}", " saying {}")).format(text) if text else ""
        return frozenset({("notice", text, "", "")}), card + said
    claims: set[Claim] = set()
    phrases = []
    for thing in rng.sample(scene.things, len(scene.things)):
        claim, phrase = _phrase(thing, rng, bare=len(scene.things) > 1 and rng.random() < 0.5)
        claims.add(claim)
        phrases.append(phrase)
    text = _list(phrases)
    if rng.random() < 0.15:
        number = NUMBERS[len(scene.things)]
        claims.add(("count", number, "", ""))
        text = f"{number} shape{'s' * (len(scene.things) > 1)}: {text}"
    if scene.backdrop and rng.random() < 0.15:
        claims.add(("backdrop", scene.backdrop, "", ""))
        text += f" on a {scene.backdrop} background"
    opening = rng.choice(("", "", "{} of ", "{} of ", "the {} shows ", "there is ", "one sees "))
    noun = rng.choice(_NOUNS)
    opening = opening.format(article(noun) if opening == "{} of " else noun)
    return frozenset(claims), opening + text


def _phrase(thing: Thing, rng: random.Random, bare: bool) -> tuple[Claim, str]:
    """A noun phrase with a lot of or little detail; `bare` keeps it to colour and name."""
    name = rng.choice(names(thing))
    size = thing.size if not bare and rng.random() < 0.4 else ""
    place = thing.place if not bare and rng.random() < 0.35 else ""
    color = thing.color
    style = rng.random()
    if style < 0.12:
        color = ""
    elif style < 0.24:
        name = ""
    words = " ".join(word for word in (size, color, name or "shape") if word)
    words = article(words) if rng.random() < 0.9 else words
    return (size, color, name, place), words + (f" {where(place)}" if place else "")


def _list(phrases: list[str]) -> str:
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)


def describe(scene: Scene, rng: random.Random, in_order: bool = False) -> str:
    """All of a scene in words: colour, name, size and place of every thing, so that all `questions` can be answered.

    The things come in random order, or `in_order` from the top left to the bottom right.
    """
    if scene.notice:
        return f"a gray notice card that says {scene.notice.text}"
    phrases = []
    by_place = sorted(scene.things, key=lambda thing: (3 * thing.y // SIDE, thing.x))
    for thing in by_place if in_order else rng.sample(scene.things, len(scene.things)):
        words = " ".join(word for word in (thing.size, thing.color, thing.name) if word)
        phrases.append(f"{article(words)} {where(thing.place)}")
    return _list(phrases)


def questions(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """Questions with their answers, in random phrasings and order; half of the yes/no answers are "yes", about."""
    if scene.notice:
        asked = [
            (rng.choice(("what does the card say?", "what is written here?", "read the text.")), scene.notice.text),
            (rng.choice(("what is this?", "what does the image show?")), "a notice card"),
            (_fill(rng.choice(_PRESENT), rng.choice(("circle", "triangle", "rectangle", "red shape"))), "no"),
            (_fill(rng.choice(_ABSENT), rng.choice(("circle", "triangle", "rectangle", "blue shape"))), "yes"),
        ]
    else:
        asked = [*_yes_no(scene, rng), *_open(scene, rng), *_counts(scene, rng)]
        if len(scene.things) == 2:
            asked.append(_relation(scene, rng))
    rng.shuffle(asked)
    return asked


def is_negated(question: str) -> bool:
    """Whether "yes" to this question of ours means that something is not there."""
    return any(word in question for word in NEGATIONS)


def checks(scene: Scene, rng: random.Random, num: int, level: int) -> list[tuple[str, str]]:
    """Up to `num` yes/no questions about single words, about half of them true of the scene.

    Level 0 asks in one word ("teal?"), level 1 also in phrases and sentences, level 2 in sentences, half negated.
    """
    true = {word for thing in scene.things for word in (thing.color, *names(thing))}
    unsure = {name for thing in scene.things for name in _UNSURE.get(thing.kind, ())}
    words = [*COLORS, *KINDS[:8]]
    yes = [word for word in words if word in true]
    no = [word for word in words if word not in true | unsure]
    chosen = rng.sample(yes, min(len(yes), num // 2))
    chosen += rng.sample(no, min(num - num // 2, len(chosen) + 1))
    rng.shuffle(chosen)
    return [_check(word, word in true, rng, level) for word in chosen]


def _check(word: str, present: bool, rng: random.Random, level: int) -> tuple[str, str]:
    bare = f"{word} shape" if word in COLORS else word
    if level == 2:
        return _ask(rng, bare, present)
    template = "{word}?" if level == 0 else rng.choice(("{word}?", "{x}?", rng.choice(_PRESENT)))
    return template.format(word=word, x=article(bare)), "yes" if present else "no"


def _fill(template: str, bare: str) -> str:
    return template.format(x=article(bare), bare=bare)


def _yes_no(scene: Scene, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Presence and absence of kinds, colours and both together."""
    present = {name for thing in scene.things for name in names(thing)}
    unsure = {name for thing in scene.things for name in _UNSURE.get(thing.kind, ())} - present
    colors = {thing.color for thing in scene.things}
    pairs = {(thing.color, name) for thing in scene.things for name in names(thing)}
    kinds = [kind for kind in KINDS[:8] if kind not in unsure]
    for _ in range(2):
        for wanted in (True, False):
            options = [kind for kind in kinds if (kind in present) == wanted] or kinds
            kind = rng.choice(options)
            yield _ask(rng, kind, kind in present)
            color = rng.choice([color for color in COLORS if (color in colors) == wanted])
            yield _ask(rng, f"{color} shape", color in colors)
    thing = rng.choice(scene.things)
    other_color, other_kind = rng.choice(list(COLORS)), rng.choice(kinds)
    kind, color = rng.choice([(thing.name, thing.color), (thing.name, other_color), (other_kind, thing.color)])
    yield _ask(rng, f"{color} {kind}", (color, kind) in pairs)


def _ask(rng: random.Random, bare: str, present: bool) -> tuple[str, str]:
    if rng.random() < 0.5:
        return _fill(rng.choice(_PRESENT), bare), "yes" if present else "no"
    return _fill(rng.choice(_ABSENT), bare), "no" if present else "yes"


def _open(scene: Scene, rng: random.Random) -> Iterator[tuple[str, str]]:
    """What shape, what colour, where, which letter: asked only when there is one answer."""
    for thing in scene.things:
        called = names(thing)[-1]
        same_color = [other for other in scene.things if other.color == thing.color]
        same_name = [other for other in scene.things if set(names(other)) & set(names(thing))]
        if len(scene.things) == 1:
            yield rng.choice(_WHAT_SHAPE), called
            yield rng.choice(_WHAT_COLOR).format(x="shape"), thing.color
            if thing.size:
                yield rng.choice(("is the shape small or big?", "how big is the shape?")), thing.size
        if len(same_color) == 1:
            yield rng.choice(_WHAT_SHAPE_COLORED).format(color=thing.color), called
        if len(same_name) == 1:
            yield rng.choice(_WHAT_COLOR).format(x=called), thing.color
            yield rng.choice(_WHERE).format(x=rng.choice((called, f"{thing.color} {called}"))), where(thing.place)
        if thing.text and [other.kind for other in scene.things].count(thing.kind) == 1:
            yield rng.choice((f"which {thing.kind} is in the image?", f"what {thing.kind} do you see?")), thing.text


def _counts(scene: Scene, rng: random.Random) -> Iterator[tuple[str, str]]:
    yield rng.choice(_HOW_MANY).format(x="shapes"), NUMBERS[len(scene.things)]
    color = rng.choice((rng.choice(scene.things).color, rng.choice(list(COLORS))))
    yield rng.choice(_HOW_MANY).format(x=f"{color} shapes"), NUMBERS[[t.color for t in scene.things].count(color)]


def _relation(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Which of two things lies further left, or higher: asked about the clearer of the two directions."""
    a, b = rng.sample(scene.things, 2)
    if abs(a.x - b.x) >= abs(a.y - b.y):
        word, true = rng.choice((("left of", a.x < b.x), ("right of", a.x > b.x)))
    else:
        word, true = rng.choice((("above", a.y < b.y), ("below", a.y > b.y)))
    return f"is the {a.color} {a.name} {word} the {b.color} {b.name}?", "yes" if true else "no"
