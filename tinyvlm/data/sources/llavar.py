"""LLaVAR: talks about pictures with much text in them, in files whose first rows are LLaVA's.

    llava_instruct_150k_llavar_16k.json, …_20k.json, chat_llavar.json
        ├─ rows of prepare.known, or of another file given ─▶ duplicate
        ├─ rows about a picture of COCO or CC3M ──▶ source "llavar/llava": look into the report before mixing both
        └─ the others, LLaVAR's own ──▶ pictures under the name "llavar/…", if prepare.images has such a folder

LLaVAR's pictures have made-up names in the manner of COCO and CC3M.  Their numbers lie above those of the real
pictures, which is how the two are told apart: COCO's start with 000000, LLaVAR's with 1000 (seen in accounts of the
files, SALT-NLP/LLaVAR#21 among them, not in the files).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tinyvlm.data.sources import Outline
from tinyvlm.data.sources.llava import Given, Llava, images_of

if TYPE_CHECKING:
    from tinyvlm.data.prepare import PrepareConfig

NAMESPACE = "llavar"
"""The beginning of a name in `prepare.images` that stands for LLaVAR's own pictures."""
LAST_NUMBERS = {"": 581_929, "GCC_train_": 3_318_333}
"""Beginning of a picture's name → the last number that COCO 2017 and CC3M's training list give such a picture."""
_NUMBERED = re.compile(r"(GCC_train_|)(\d+)\.\w+")


class Llavar(Llava):
    """The reader; schema and rules are LLaVA's."""

    name = "llavar"

    def __init__(self, config: PrepareConfig) -> None:
        super().__init__(config)
        self._whose: Counter[str] = Counter()
        self._is_apart = any(prefix.strip("/") == NAMESPACE for prefix in config.images)

    def outline(self, record: Mapping[str, Any], file: str) -> Outline:
        """As LLaVA's, and counted by whose row it is."""
        if file not in self.config.known:
            self._whose["llava" if is_llavas(images_of(record.get("image"))) else "llavar"] += 1
        return super().outline(record, file)

    def subset(self, images: Sequence[Given], file: str) -> str:
        """ "llava" for rows that are probably LLaVA's."""
        return "llava" if is_llavas(images) else "" if images else "text"

    def picture_name(self, image: str) -> str:
        """In a folder of its own when there is one."""
        if not self._is_apart or is_llavas([image]) or image.startswith(f"{NAMESPACE}/"):
            return image
        return f"{NAMESPACE}/{image}"

    def account(self) -> Mapping[str, Any]:
        """How many turns were left out, and whose rows they are by the names of their pictures, duplicates included."""
        return {**super().account(), "rows_of": dict(self._whose)}


def is_llavas(images: Sequence[Given]) -> bool:
    """Whether a row's picture is by its name one of COCO's or CC3M's, so that the row is probably LLaVA's."""
    name = images[0].split("/")[-1] if images and isinstance(images[0], str) else ""
    found = _NUMBERED.fullmatch(name)
    return found is not None and int(found[2]) <= LAST_NUMBERS[found[1]]
