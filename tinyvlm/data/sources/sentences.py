"""Short answers made into sentences by rules: what a question says already is said again around the answer.

    "Is there a dog in the picture?"  + "no"     ─▶ "No, there is no dog in the picture."
    "What color is the man's shirt?"  + "blue"   ─▶ "The man's shirt is blue."
    "How many cats are on the bed?"   + "2"      ─▶ "There are 2 cats on the bed."
    "What is the man holding?"        + "kite"   ─▶ "It's kite."             (the published system's only rule)
    "Why is she smiling?"             + "happy"  ─▶ "Happy."

English is not turned round by rules in general, so each rule takes few forms of question, whose grammar it can keep
(but for "It's …", which knows no articles); all others get the answer alone, with a capital letter and a full stop.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_UNSAFE = re.compile(r"[?!;:,]|\b(?:or|not|no|without|than|you|your)\b|n't\b")
"""In what would be said again: more than one thing asked, or a sense that yes and no do not simply give back."""
_NOT_AFFIRMED = re.compile(r"\b(?:any\w*|ever|yet|either|at all)\b")
_NOT_DENIED = re.compile(r"\b(?:and|some\w*|already|too|also|no (?:lot|few|little|bit|couple|pair|number|more))\b")
"""Words that change when a question becomes a statement, or a denial."""
_DENIED = (("is", "a"), ("is", "an"), ("is", "any"), ("is", "some"), ("are", "any"), ("are", "some"))
"""What "no" takes the place of."""
_ENDS_OPEN = re.compile(r"(?:ing|ed|\b(?:is|are|was|were|be|do|does|did|have|has|most))$")
"""The last word of a "thing" that was no thing: "what color is the man wearing"."""


def to_sentence(question: str, answer: str) -> str:
    """The answer as a sentence; "" for an empty answer.  Its words stand in it as they are but for a capital letter."""
    answer = " ".join(answer.split())
    asked = " ".join(question.split()).rstrip(" ?.").strip()
    if not answer:
        return ""
    if answer.lower() in ("yes", "no"):
        said = _affirmed(asked, answer.lower() == "yes")
        return _closed(f"{answer}, {said}" if said else answer)
    for rule in _RULES:
        sentence = rule(asked, answer)
        if sentence:
            return _closed(sentence)
    return _closed(answer)


def _affirmed(asked: str, is_so: bool) -> str:
    """What yes or no means, as a clause; "" where no rule is safe."""
    if _UNSAFE.search(asked.lower()):
        return ""
    clause = _turned_round(asked, is_so)
    beyond = _NOT_AFFIRMED if is_so else _NOT_DENIED
    return "" if beyond.search(clause.lower()) else clause


def _turned_round(asked: str, is_so: bool) -> str:
    if found := re.fullmatch(r"(is|are) there (?:(an?|any|some) )?(.+)", asked, re.IGNORECASE):
        verb, article, thing = found[1].lower(), (found[2] or "").lower(), found[3]
        if is_so:
            return f"there {verb} {'' if article in ('', 'any') else f'{article} '}{thing}"
        return f"there {verb} no {thing}" if (verb, article) in _DENIED else ""
    if found := re.fullmatch(r"is (this|that|it) (an?|the) (.+)", asked, re.IGNORECASE):
        subject, article, thing = found[1].lower(), found[2].lower(), found[3]
        return f"{subject} is {'' if is_so else 'not '}{article} {thing}"
    if found := re.fullmatch(r"(is|are|was|were|can|will) (it|he|she|they) (.+)", asked, re.IGNORECASE):
        verb, subject, rest = found[1].lower(), found[2].lower(), found[3]
        denied = "cannot" if verb == "can" else f"{verb} not"
        return f"{subject} {verb if is_so else denied} {rest}"
    return ""


def _of_color(asked: str, answer: str) -> str:
    found = re.fullmatch(
        r"what colou?r (is|are|was|were) ((?:the|this|that|these|those|his|her|their) .+)", asked, re.I
    )
    if found is None or _UNSAFE.search(found[2].lower()) or _ENDS_OPEN.search(found[2].lower()):
        return ""
    return f"{found[2]} {found[1].lower()} {answer}"


def _of_number(asked: str, answer: str) -> str:
    """Not of one: "1 dogs" wants grammar."""
    found = re.fullmatch(r"how many ((?!of\b)[\w'-]+(?: [\w'-]+){0,2}?) are (.+)", asked, re.IGNORECASE)
    if found is None or not answer.isdecimal() or answer == "1" or _UNSAFE.search(found[2].lower()):
        return ""
    place = re.fullmatch(
        r"(?:there|visible|shown|pictured|present)|(?:(?:there|visible|shown|pictured|present) )?"
        r"(?:in|on|at|under|behind|near|inside|outside) .+",
        found[2],
        re.IGNORECASE,
    )
    if place is None:
        return ""
    rest = re.sub(r"^there\b ?", "", found[2], flags=re.IGNORECASE)
    return f"there are {answer} {found[1]} {rest}".rstrip()


def _of_thing(asked: str, answer: str) -> str:
    """The published system's "It's …", for what is one thing and no reason, person or number."""
    if re.match(r"what (?:is|\w+ is|(?:kind|type|color|colour|brand|sort) of \w+ is)\b", asked, re.IGNORECASE):
        is_whole = re.match(r"(?:it|they|he|she|there|yes|no|i|you)\b", answer, re.IGNORECASE)
        return "" if answer.isdecimal() or is_whole or asked.lower().endswith("doing") else f"it's {answer}"
    return ""


_RULES: tuple[Callable[[str, str], str], ...] = (_of_color, _of_number, _of_thing)


def _closed(words: str) -> str:
    """With a capital letter and a full stop."""
    return words[:1].upper() + words[1:] + ("" if words[-1] in ".!?" else ".")
