"""What a frozen vision tower makes of pictures, remembered: a picture that comes again costs nothing.

Only a tower that stays as it is may be asked this way; a hot one gives other features after every step.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from tinyvlm.images import normalise

Value = TypeVar("Value")


class Cache(Generic[Value]):
    """The most recently used values, up to a number of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._values: OrderedDict[Any, tuple[Value, int]] = OrderedDict()

    def get(self, key: Any) -> Value | None:
        """The value, or None."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key][0]

    def put(self, key: Any, value: Value, num_bytes: int) -> None:
        """Keep a value; the longest unused ones go when there is no room."""
        if key in self._values:
            self._bytes -= self._values.pop(key)[1]
        self._values[key] = (value, num_bytes)
        self._bytes += num_bytes
        while self._bytes > self._max_bytes and self._values:
            self._bytes -= self._values.popitem(last=False)[1][1]


class FrozenTower:
    """Pooled features of pictures, by the pictures' content."""

    def __init__(self, model: Any, max_bytes: int) -> None:
        self._model = model
        self._features: Cache[Tensor] = Cache(max_bytes)
        self.num_asked = self.num_encoded = 0
        """Pictures so far, and those of them that went through the tower."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """(N,S,S,3) uint8 → (N,K,Dv)."""
        keys = [hashlib.blake2b(picture.cpu().numpy().data, digest_size=16).digest() for picture in pixels]
        known = {key: features for key in keys if (features := self._features.get(key)) is not None}
        missing = {key: place for place, key in enumerate(keys) if key not in known}
        self.num_asked += len(keys)
        self.num_encoded += len(missing)
        if missing:
            device = next(self._model.parameters()).device
            with torch.no_grad():
                made = self._model.encode_pictures(normalise(pixels[list(missing.values())].to(device)))
            for key, features in zip(missing, made, strict=True):
                known[key] = features.clone()
                self._features.put(key, known[key], features.nbytes)
        return torch.stack([known[key] for key in keys])
