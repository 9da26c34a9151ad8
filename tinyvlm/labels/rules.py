"""What makes a label a good one: new to the whole file, described by what one sees, and short enough for CLIP.

Two names are the same when only case, accents, punctuation, spaces, articles or the plural differ.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

from tinyvlm.labels import Label, LabelFile

MAX_NAME_CHARS = 40
MAX_DESCRIPTION_BYTES = 120
"""CLIP reads 77 tokens of name, description and template; English has about four letters a token."""
CATEGORY_SIZES = (50, 100)
"""Labels that a category of the base file has, from and to."""

_ARTICLES = {"a", "an", "the"}
_SINGULARS = {
    **{"people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse", "geese": "goose"},
    **{"feet": "foot", "teeth": "tooth", "leaves": "leaf", "knives": "knife", "wolves": "wolf", "loaves": "loaf"},
    **{"calves": "calf", "shelves": "shelf", "halves": "half", "scarves": "scarf", "wives": "wife", "shoes": "shoe"},
    **{"canoes": "canoe", "buses": "bus", "lenses": "lens", "lens": "lens", "glasses": "glasses", "cacti": "cactus"},
}
_QUOTES = "\"'`“”‘’«».,;:!*_ "


def words_of(text: str) -> list[str]:
    """The words by which texts are compared: lower case, singular, without accents, punctuation and articles."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    plain = "".join(char for char in plain if not unicodedata.combining(char)).replace("'", "").replace("’", "")
    words = re.findall(r"\w+", plain.replace("_", " "))
    return [_singular(word) for word in words if word not in _ARTICLES] or words


def key_of(text: str) -> str:
    """Equal for texts that differ only in how they are written; "T-shirts" and "a t shirt" share theirs."""
    return "".join(words_of(text))


def _singular(word: str) -> str:
    if word in _SINGULARS:
        return _SINGULARS[word]
    if len(word) <= 3 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies") and len(word) > 4 and word not in ("cookies", "movies", "brownies"):
        return word[:-3] + "y"
    return word[:-2] if word.endswith(("sses", "xes", "zes", "ches", "shes", "oes")) else word[:-1]


def clean_name(text: str) -> str:
    """A name as label files have it: lower case, single spaces, no quotes or full stop around it."""
    return " ".join(text.split()).strip(_QUOTES).lower()


def clean_description(text: str) -> str:
    """A description that goes on after "a photo of": no full stop, no "a photo of", no capital article."""
    text = " ".join(text.split()).strip('"“”` ').rstrip(".;, ")
    text = re.sub(r"^(an?|the) (photo|photograph|picture|image) of ", "", text, flags=re.IGNORECASE)
    return re.sub(r"^(A|An|The)(?= )", lambda article: article[0].lower(), text)


class Catalogue:
    """The labels so far, and whether another one may join them."""

    def __init__(self, labels: Iterable[Label] = ()) -> None:
        self._names: dict[str, Label] = {}
        self._descriptions: dict[str, Label] = {}
        for label in labels:
            self.add(label)

    def add(self, label: Label) -> None:
        self._names.setdefault(key_of(label.name), label)
        self._descriptions.setdefault(key_of(label.description), label)

    def refusal(self, name: str, description: str) -> str | None:
        """Why a label may not join, or None."""
        if not key_of(name) or len(name) > MAX_NAME_CHARS:
            return f"its name has {len(name)} characters, 1 to {MAX_NAME_CHARS} are allowed"
        if not (name + description).isprintable():
            return "it has unprintable characters"
        if twin := self._names.get(key_of(name)):
            return f"the same as {twin.name!r} in {twin.category!r}"
        if not key_of(description):
            return "no description"
        size = len(description.encode())
        if size > MAX_DESCRIPTION_BYTES:
            return f"its description has {size} bytes, {MAX_DESCRIPTION_BYTES} are allowed"
        if twin := self._descriptions.get(key_of(description)):
            return f"described just as {twin.name!r} in {twin.category!r}"
        return None


def only_repeats(name: str, description: str) -> bool:
    """Whether a description says nothing that the name does not ("toaster": "a toaster")."""
    return not set(words_of(description)) - set(words_of(name))


def review(file: LabelFile) -> tuple[list[str], list[str]]:
    """What is wrong with a label file, and what could be better, a sentence each."""
    catalogue = Catalogue()
    wrong, better = [], []
    for label in file.labels:
        if why := catalogue.refusal(label.name, label.description):
            wrong.append(f"{label.name!r} in {label.category!r}: {why}.")
        elif only_repeats(label.name, label.description):
            better.append(f"{label.name!r} in {label.category!r}: its description only repeats the name.")
        catalogue.add(label)
    fewest, most = CATEGORY_SIZES
    for category, size in Counter(label.category for label in file.labels).items():
        if not fewest <= size <= most:
            better.append(f"{category!r} has {size} labels; {fewest} to {most} are usual.")
    return wrong, better
