"""Generation, for evaluation and serving alike."""

from __future__ import annotations

from tinyvlm.generation.engine import Completion, Decoding, Engine, Piece
from tinyvlm.generation.sampling import Sampling

__all__ = ["Completion", "Decoding", "Engine", "Piece", "Sampling"]
