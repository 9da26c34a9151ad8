"""The model: picture → vision tower → pooled patches → connector → rows of the language model's input.

    pixel_values (N,3,S,S) ──vision──▶ (N,1+P,Dv) ──drop CLS, block means──▶ (N,K,Dv) ──connector──▶ (N,K,D)
                                                                               ▲                        │ a row for each
                                               image_features (cached) ────────┘                        ▼ <Image_Token>
    input_ids (B,T) ───────────────embed───────────────▶ (B,T,D) ─────────────────────────────────▶ (B,T,D)
                                                                                                        │ language
                                                            loss over supervised tokens ◀── (B,T,D) ◀───┘

The vision tower's output is its last hidden state without the CLS row and without the final layer norm.  The pictures
of a batch lie one after another in `pixel_values`, in the order in which their tokens stand in `input_ids`, row by row.

Shapes: B batch, T tokens, N pictures in the batch, S side in pixels, P patches, K tokens of one picture, Dv width of
the tower, D width of the language model, V vocabulary, L supervised tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionModel, GenerationMixin, LlamaForCausalLM
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from tinyvlm.errors import InputError
from tinyvlm.model.configuration import TinyVLMConfig

CONNECTOR_STD = 0.02
"""Connector weights start as N(0, CONNECTOR_STD), as in the published system."""

LOSS_CHUNK = 4096
"""Supervised tokens whose logits exist at one time: 4096 × 128,259 × 4 bytes are 2.1 GB."""


class Connector(nn.Module):
    """From the tower's width to the language model's."""

    def __init__(self, config: TinyVLMConfig) -> None:
        super().__init__()
        width_in, width, width_out = (
            config.vision_config.hidden_size,
            config.connector_width,
            config.text_config.hidden_size,
        )
        self.is_gated = config.connector == "swiglu"
        if self.is_gated:
            self.gate_proj = nn.Linear(width_in, width, bias=False)
        self.up_proj = nn.Linear(width_in, width, bias=not self.is_gated)
        self.down_proj = nn.Linear(width, width_out, bias=not self.is_gated)

    def forward(self, features: Tensor) -> Tensor:
        """(…, Dv) → (…, D)."""
        up = self.up_proj(features)
        hidden = F.silu(self.gate_proj(features)) * up if self.is_gated else F.gelu(up)
        return cast(Tensor, self.down_proj(hidden))


def pool_patches(patches: Tensor, num_image_tokens: int) -> Tensor:
    """(N,P,Dv) → (N,K,Dv): means over square blocks of the patch grid, in reading order."""
    num_pictures, num_patches, width = patches.shape
    grid, side = int(num_patches**0.5 + 0.5), int(num_image_tokens**0.5 + 0.5)
    block = grid // side
    blocks = patches.reshape(num_pictures, side, block, side, block, width)
    return blocks.mean(dim=(2, 4)).reshape(num_pictures, num_image_tokens, width)


@dataclass
class TinyVLMOutput(ModelOutput):  # type: ignore[misc]
    """What `forward` returns; fields that were not asked for are None."""

    loss: Tensor | None = None
    """Mean or sum over the supervised tokens, in float32."""
    logits: Tensor | None = None
    """(B,T,V), or the last rows of it (`logits_to_keep`); None when labels were given, unless `return_logits`."""
    num_supervised: int | None = None
    """L, how many tokens the loss covers."""
    token_losses: Tensor | None = None
    """(L,) float32: of each supervised token, row by row; carries no gradient."""
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class TinyVLMForConditionalGeneration(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The three parts: `vision` (CLIPVisionModel), `connector`, `language` (LlamaForCausalLM)."""

    config_class = TinyVLMConfig
    config: TinyVLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["CLIPEncoderLayer", "LlamaDecoderLayer"]  # noqa: RUF012 transformers' name
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False

    shows_every_batch = False
    """Pass the tower even for a batch without pictures outside of training, because other workers do."""

    def __init__(self, config: TinyVLMConfig) -> None:
        super().__init__(config)
        self.vision = CLIPVisionModel._from_config(config.vision_config)
        # It normalises the CLS row alone, which nothing reads: without it every weight of the tower has a gradient.
        self.vision.post_layernorm = nn.Identity()
        self.connector = Connector(config)
        self.language = LlamaForCausalLM._from_config(config.text_config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=CONNECTOR_STD)
            if module.bias is not None:
                init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        return cast(nn.Module, self.language.get_input_embeddings())

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return cast(nn.Module, self.language.get_output_embeddings())

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        return cast(nn.Module, self.language.model)

    def encode_pictures(self, pixel_values: Tensor) -> Tensor:
        """(N,3,S,S) → (N,K,Dv), the pooled output of the tower: what a feature cache stores.

        No pictures at all (N = 0) are fine, and keep a text-only batch connected to the tower's weights.
        """
        num_pictures = pixel_values.shape[0]
        if num_pictures == 0:  # transformers' tower refuses an empty batch: show it a grey picture, and use none of it
            pixel_values = pixel_values.new_zeros((1, *pixel_values.shape[1:]))
        hidden = self.vision(pixel_values=pixel_values).last_hidden_state[:num_pictures]
        return pool_patches(hidden[:, 1:], self.config.num_image_tokens)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """(N,3,S,S) → (N,K,D), the rows that take the places of the image tokens."""
        return cast(Tensor, self.connector(self.encode_pictures(pixel_values)))

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        supervised: Tensor | None = None,
        loss_reduction: Literal["mean", "sum"] = "mean",
        return_logits: bool | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> TinyVLMOutput:
        """Run the model.

        Args:
            input_ids: (B,T).
            pixel_values: (N,3,S,S), normalised; or
            image_features: (N,K,Dv), what `encode_pictures` gave for the same pictures.
            attention_mask: (B,T), 0 where a row is padded.
            position_ids: (B,T).  Packed samples are kept apart where positions start again, if there is no
                `attention_mask` and no cache.
            labels: (B,T), not shifted: the token that should stand here, or -100.  The first token of a packed
                sample must be -100, else the sample before it would be asked to guess it.
            supervised: (L,), which tokens of the flattened batch are followed by a labelled one.  Finding them in
                `labels` makes an accelerator wait, so who knows them says them.
            loss_reduction: "mean" or "sum" over the supervised tokens.
            return_logits: give logits although there are labels.
            logits_to_keep: only the logits of the last so many tokens; 0 means all.

        Raises:
            InputError: image tokens and pictures do not match in number.  Checked where looking is free, that is on CPU
                and outside training; on an accelerator in training, the collator must keep rows and pictures together.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise InputError("The model needs input_ids or inputs_embeds, and got neither.", field="input_ids")
            inputs_embeds = self._embed(input_ids, pixel_values, image_features, past_key_values)
        if labels is not None and use_cache is None:
            use_cache = False
        outputs = self.language.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss, num_supervised, token_losses, logits = None, None, None, None
        if labels is not None:
            loss, token_losses = self._loss(hidden, labels, supervised, loss_reduction)
            num_supervised = len(token_losses)
        if return_logits or labels is None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.language.lm_head(hidden[:, kept])
        return TinyVLMOutput(
            loss=loss,
            logits=logits,
            num_supervised=num_supervised,
            token_losses=token_losses,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _embed(
        self, input_ids: Tensor, pixel_values: Tensor | None, image_features: Tensor | None, past_key_values: Any
    ) -> Tensor:
        """(B,T) → (B,T,D), pictures in their places."""
        embeds = cast(Tensor, self.get_input_embeddings()(input_ids))
        if pixel_values is not None and image_features is not None:
            raise InputError("Give pixel_values or image_features, not both.", field="image_features")
        given = pixel_values if pixel_values is not None else image_features
        is_going_on = past_key_values is not None and bool(past_key_values.get_seq_length())
        if given is None and (input_ids.shape[1] == 1 or is_going_on):
            return embeds
        is_image = input_ids == self.config.image_token_id
        if not self.training or input_ids.device.type == "cpu":
            self._check_counts(is_image, 0 if given is None else given.shape[0])
        if given is None or (given.shape[0] == 0 and not self.training and not self.shows_every_batch):
            return embeds
        if pixel_values is not None:
            image_features = self.encode_pictures(pixel_values)
        rows = self.connector(cast(Tensor, image_features).to(self.connector.up_proj.weight.dtype))
        return embeds.masked_scatter(is_image.unsqueeze(-1), rows.to(embeds.dtype))

    def _check_counts(self, is_image: Tensor, num_pictures: int) -> None:
        num_each = self.config.num_image_tokens
        counts = is_image.sum(dim=1).tolist()
        if sum(counts) != num_pictures * num_each:
            raise InputError(
                f"The batch has {sum(counts)} image tokens but comes with {num_pictures} pictures, which take "
                f"{num_pictures * num_each} ({num_each} each).",
                field="pixel_values",
            )
        for row, count in enumerate(counts):
            if count % num_each:
                raise InputError(
                    f"Row {row} has {count} image tokens, which is no multiple of the {num_each} of one picture.",
                    field="input_ids",
                )

    def _loss(self, hidden: Tensor, labels: Tensor, supervised: Tensor | None, reduction: str) -> tuple[Tensor, Tensor]:
        """Cross-entropy where the next token is supervised; only those rows meet the vocabulary.

        Returns the mean or sum, and (L,), that of each token.
        """
        if supervised is None:
            before = F.pad(labels[:, 1:], (0, 1), value=-100)
            supervised = (before != -100).flatten().nonzero().squeeze(1)
        rows = hidden.flatten(0, 1).index_select(0, supervised)
        wanted = labels.flatten().index_select(0, supervised + 1)
        if len(wanted) == 0:  # still connected to every weight
            return rows.sum() * 0.0, rows.new_zeros(0, dtype=torch.float32)
        losses = _token_losses(self.language.lm_head, rows, wanted)
        return (losses.mean() if reduction == "mean" else losses.sum()), losses.detach()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,  # transformers looks for this name before it lets it in
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Hand pictures on only while their tokens are in `input_ids`: at first, and always without a cache."""
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs.pop("pixel_values", None)
            inputs.pop("image_features", None)
        return cast(dict[str, Any], inputs)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Repeat rows for beams and several answers; the pictures of a row stay together."""
        names = [name for name in ("pixel_values", "image_features") if kwargs.get(name) is not None]
        pictures = {name: kwargs.pop(name) for name in names}
        if names and input_ids is not None and expand_size > 1:
            counts = (input_ids == self.config.image_token_id).sum(dim=1) // self.config.num_image_tokens
            for name in names:
                rows: Iterable[Tensor] = torch.split(pictures[name], counts.tolist())
                pictures[name] = torch.cat([row for each in rows for row in [each] * expand_size])
        ids, expanded = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return ids, {**expanded, **pictures}


def _token_losses(lm_head: nn.Module, rows: Tensor, wanted: Tensor) -> Tensor:
    """(L,D), (L,) → (L,), cross-entropies in float32, a chunk of logits at a time."""

    def chunk_losses(chunk: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(lm_head(chunk).float(), targets, reduction="none")

    if len(wanted) <= LOSS_CHUNK:
        return chunk_losses(rows, wanted)
    made = []
    for start in range(0, len(wanted), LOSS_CHUNK):
        chunk, targets = rows[start : start + LOSS_CHUNK], wanted[start : start + LOSS_CHUNK]
        if torch.is_grad_enabled():
            made.append(cast(Tensor, checkpoint(chunk_losses, chunk, targets, use_reentrant=False)))
        else:
            made.append(chunk_losses(chunk, targets))
    return torch.cat(made)
