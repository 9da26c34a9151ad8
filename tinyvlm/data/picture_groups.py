"""Which records share pictures, through others if need be: the held-out split takes such a group whole, or not at all.

    record 0 shows A, B ─┐
    record 1 shows B, C ─┴▶ the group of A, B, C      record 2 shows C ─▶ of that group      record 3 shows D ─▶ of none

Only records with several pictures make groups.  Pictures are numbers here, hashes of what their records call them.
"""

from __future__ import annotations

from collections.abc import Sequence

MOST_PICTURES = 100
"""Of a larger group nothing is held out, so that one draw does not decide about a large part of a dataset."""
TRAINED_ON = 0
"""Stands for such a group."""


class PictureGroups:
    """A disjoint-set forest (Galler and Fischer, 1964) in which a group's root is its smallest number."""

    def __init__(self) -> None:
        self._up: dict[int, int] = {}
        self._sizes: dict[int, int] = {}

    def join(self, pictures: Sequence[int]) -> None:
        """Note that one record shows all of these; a single one makes no group."""
        different = set(pictures)
        if len(different) < 2:
            return
        roots = {self._root(picture) for picture in different}
        root = min(roots)
        self._sizes[root] = sum(self._sizes.pop(each, 1) for each in roots)
        self._up.update((each, root) for each in roots)

    def group(self, picture: int | None) -> int | None:
        """The group's number, the same in whatever order records came; `TRAINED_ON`; None: the picture is in none."""
        if picture is None or picture not in self._up:
            return None
        root = self._root(picture)
        return root if self._sizes[root] <= MOST_PICTURES else TRAINED_ON

    def _root(self, picture: int) -> int:
        root = picture
        while (above := self._up.get(root, root)) != root:
            root = above
        while picture != root:  # the next look is short
            self._up[picture], picture = root, self._up[picture]
        return root
