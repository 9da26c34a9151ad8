"""Which weights learn: freeze policy, rows of new tokens, and the proof that frozen weights stayed as they were.

rates.vision > 0 ──▶ vision.*      hot        A module's rate is 0: its weights take no gradient, and their
rates.connector  ──▶ connector.*   hot        hash before and after the stage must be equal.
rates.language   ──▶ language.*    frozen
rates.new_tokens ──▶ 3 rows of the frozen embedding, learned as a small tensor beside it
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinyvlm.errors import CheckpointError
from tinyvlm.train.adapters import MARK
from tinyvlm.train.settings import Rates

MODULES = ("vision", "connector", "language")
NEW_TOKENS = "new_tokens"


@dataclass(frozen=True)
class HotGroup:
    """The hot parameters of one module, by name, and their peak learning rate."""

    module: str
    rate: float
    parameters: dict[str, nn.Parameter]


class NewTokenRows:
    """Some rows of a frozen embedding as a parameter of their own; put in their places on the way out of the embedding.

    A language model whose output layer is tied to the embedding keeps its old rows there until `merge`; these tokens
    are never an answer.
    """

    def __init__(self, embedding: nn.Module, token_ids: Sequence[int]) -> None:
        self.embedding, self.token_ids = embedding, list(token_ids)
        self.rows = nn.Parameter(embedding.get_parameter("weight").detach()[self.token_ids].clone())
        self._handle = embedding.register_forward_hook(self._replace)

    def _replace(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        for place, token_id in enumerate(self.token_ids):
            output = torch.where((inputs[0] == token_id).unsqueeze(-1), self.rows[place].to(output.dtype), output)
        return output

    def merge(self) -> None:
        """Write the rows into the embedding and stop replacing them."""
        self._handle.remove()
        with torch.no_grad():
            self.embedding.get_parameter("weight")[self.token_ids] = self.rows.detach()


class FreezePolicy:
    """A model with its hot and frozen parts told apart."""

    def __init__(self, model: Any, rates: Rates, new_token_ids: Sequence[int], *, adapters_only: bool = False) -> None:
        """Args:
        adapters_only: of the language model, only the adapters (adapters.py) that were put into it are hot.
        """
        self.model = model
        self.groups: list[HotGroup] = []
        for name in MODULES:
            module, rate = getattr(model, name), float(getattr(rates, name))
            hot: dict[str, nn.Parameter] = {}
            for inner, parameter in module.named_parameters():
                is_frozen = rate == 0 or (adapters_only and name == "language" and MARK not in inner)
                parameter.requires_grad_(not is_frozen)
                if not is_frozen:
                    hot[f"{name}.{inner}"] = parameter
            if hot:
                self.groups.append(HotGroup(name, rate, hot))
        self.new_rows: NewTokenRows | None = None
        if rates.new_tokens > 0 and (rates.language == 0 or adapters_only) and new_token_ids:
            self.new_rows = NewTokenRows(model.get_input_embeddings(), new_token_ids)
            self.groups.append(HotGroup(NEW_TOKENS, rates.new_tokens, {f"{NEW_TOKENS}.rows": self.new_rows.rows}))
        self._frozen_before = self.frozen_hashes()

    def parameters(self) -> dict[str, nn.Parameter]:
        """All hot parameters, in one fixed order."""
        return {name: parameter for group in self.groups for name, parameter in group.parameters.items()}

    def counts(self) -> dict[str, dict[str, int]]:
        """Hot and all parameters of each module."""
        counts = {}
        for name in MODULES:
            parameters = list(getattr(self.model, name).parameters())
            hot = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
            counts[name] = {"hot": hot, "all": sum(parameter.numel() for parameter in parameters)}
        if self.new_rows is not None:
            number = self.new_rows.rows.numel()
            counts[NEW_TOKENS] = {"hot": number, "all": number}
        return counts

    def lines(self) -> list[str]:
        """The same for a person, with learning rates: `connector  12,345 of 12,345 weights at 1e-03`."""
        rates = {group.module: group.rate for group in self.groups}
        return [
            f"{name:10} {count['hot']:>14,} of {count['all']:>14,} weights"
            + (f" at {rates[name]:.0e}" if count["hot"] else ", frozen")
            for name, count in self.counts().items()
        ]

    def frozen_hashes(self) -> dict[str, str]:
        """A hash over the weights of each frozen module."""
        hashes = {}
        for name in MODULES:
            named = getattr(self.model, name).named_parameters()
            frozen = [(key, value) for key, value in named if not value.requires_grad]
            if frozen:
                hashes[name] = hash_tensors(frozen)
        return hashes

    def finish(self) -> dict[str, str]:
        """Check that the frozen weights are what they were, then write learned rows into the embedding.

        Raises:
            CheckpointError: a frozen module has changed.
        """
        after = self.frozen_hashes()
        changed = [name for name, digest in after.items() if digest != self._frozen_before[name]]
        if changed:
            raise CheckpointError(f"The frozen module {changed[0]!r} changed during training; do not use this model.")
        if self.new_rows is not None:
            self.new_rows.merge()
        return after


def hash_tensors(tensors: Sequence[tuple[str, Tensor]]) -> str:
    """64 hex digits over names and exact values."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
