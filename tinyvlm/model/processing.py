"""One road into the model: messages and pictures → tensors, for training, evaluation, serving and the command line.

    messages ──chat.render──▶ segments ──tokenizer──▶ input_ids, supervised (T,)
                                                                                 ╲
                                                                                  Sample ──collate──▶ left-padded batch
                                                                                 ╱
    pictures ──decode──square──for_tower──▶ pixels (N,S,S,3) uint8 ─────────────

Typed text is tokenised apart from the layout around it, by a tokenizer that knows no special tokens, so nothing that
anyone types can become one.

`TinyVLMProcessor` is a transformers processor as well: saved beside the weights with its picture settings, loaded by
`AutoProcessor`, called as `processor(images=…, text=…)` or through `apply_chat_template`.

Shapes: T tokens of a sample, N its pictures, S side of the tower's input in pixels, B batch, K tokens of one picture.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BatchFeature
from transformers.image_utils import load_image
from transformers.processing_utils import ProcessorMixin

from tinyvlm import chat, config, images
from tinyvlm.chat import Message, Segment
from tinyvlm.errors import CheckpointError, InputError
from tinyvlm.images import LimitConfig, PictureConfig

CACHE_SIZE = 4096
"""Typed texts whose tokens are remembered: questions and answers repeat."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One conversation, encoded."""

    input_ids: NDArray[np.int32]
    """(T,)"""
    supervised: NDArray[np.bool_]
    """(T,) true where the loss counts: the assistant's words and its end-of-turn token."""
    pixels: NDArray[np.uint8]
    """(N,S,S,3), in the order in which they stand in the conversation."""


class TinyVLMProcessor(ProcessorMixin):  # type: ignore[misc]
    """Tokenizer and picture settings of one model.

    Args:
        tokenizer: has Llama 3's control tokens and `chat.IMAGE_TOKENS`.
        picture: a `PictureConfig`, or a dict of its fields.
        num_image_tokens: K.
        chat_template: Jinja; `chat.CHAT_TEMPLATE` unless given.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        picture: PictureConfig | Mapping[str, Any] | None = None,
        num_image_tokens: int = 64,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template or chat.CHAT_TEMPLATE)
        self.picture = _picture_config(picture)
        self.num_image_tokens = num_image_tokens
        ids = tokenizer.convert_tokens_to_ids([*chat.LLAMA_TOKENS, *chat.IMAGE_TOKENS])
        self._ids_of = dict(zip((*chat.LLAMA_TOKENS, *chat.IMAGE_TOKENS), ids, strict=True))
        missing = [name for name, number in self._ids_of.items() if number is None or number == tokenizer.unk_token_id]
        if missing:
            raise CheckpointError(
                f"The tokenizer has no {', '.join(missing)}; use one of the Llama 3 family, "
                "and tinyvlm.model.build, which adds the image tokens."
            )
        self._plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._plain.encode_special_tokens = True
        self._plain.no_padding()
        self._plain.no_truncation()
        self._cache: dict[tuple[str, bool], NDArray[np.int32]] = {}

    @property
    def image_token(self) -> str:
        """The token whose positions the picture features take."""
        return chat.IMAGE_TOKEN

    @property
    def image_token_id(self) -> int:
        return int(self._ids_of[chat.IMAGE_TOKEN])

    @property
    def pad_id(self) -> int:
        return int(self._ids_of[chat.PAD])

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        names = (chat.END_OF_TURN, chat.END_OF_TEXT, "<|eom_id|>")
        numbers = {*self.tokenizer.convert_tokens_to_ids(list(names)), self.tokenizer.eos_token_id}
        return tuple(sorted(numbers - {None, self.tokenizer.unk_token_id}))

    @property
    def silent_ids(self) -> tuple[int, ...]:
        """Special tokens that an answer may not contain: all but those that end it."""
        special = (number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special)
        return tuple(sorted(set(special) - set(self.end_ids)))

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]

    def encode(
        self,
        messages: Sequence[Message],
        pictures: Sequence[Image.Image | bytes] = (),
        *,
        open_answer: bool = False,
    ) -> Sample:
        """Turn a conversation into what the model reads.

        Args:
            messages: the turns; `chat.Picture(i)` stands for `pictures[i]`.
            pictures: encoded files or PIL images, of any size.
            open_answer: end with the assistant's header, for generation.

        Raises:
            InputError: the turns are wrong, or pictures and their places differ in number (with both numbers).
            ImageError: a picture cannot be decoded.
        """
        input_ids, supervised = self.tokens(messages, len(pictures), open_answer=open_answer)
        return Sample(input_ids, supervised, self.pixels(pictures))

    def tokens(
        self, messages: Sequence[Message], num_pictures: int, *, open_answer: bool = False
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """The text half of `encode`, which needs no picture: input_ids (T,) and supervised (T,).

        Raises:
            InputError: as `encode`.
        """
        chat.check_pictures(messages, num_pictures)
        segments = chat.render(messages, self.num_image_tokens, open_answer=open_answer)
        pieces = [self._tokenise(segment) for segment in segments]
        lengths = [len(piece) for piece in pieces]
        return np.concatenate(pieces), np.repeat([segment.supervised for segment in segments], lengths)

    def pixels(self, pictures: Sequence[Image.Image | bytes]) -> NDArray[np.uint8]:
        """Decode, square and shrink pictures: (N,S,S,3)."""
        side = self.picture.tower_size
        if not pictures:
            return np.empty((0, side, side, 3), np.uint8)
        return np.stack([self._pixels_of(picture) for picture in pictures])

    def collate(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Samples → {input_ids (B,T), attention_mask (B,T), pixel_values (N,3,S,S)}, padded on the left to generate."""
        input_ids, mask = self.pad(samples)
        pixels = np.concatenate([sample.pixels for sample in samples])
        return {"input_ids": input_ids, "attention_mask": mask, "pixel_values": images.normalise(pixels)}

    def pad(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """The text half of `collate`: input_ids (B,T) and attention_mask (B,T)."""
        length = max(len(sample.input_ids) for sample in samples)
        input_ids = np.full((len(samples), length), self.pad_id, np.int64)
        mask = np.zeros((len(samples), length), np.int64)
        for row, sample in enumerate(samples):
            input_ids[row, length - len(sample.input_ids) :] = sample.input_ids
            mask[row, length - len(sample.input_ids) :] = 1
        return torch.from_numpy(input_ids), torch.from_numpy(mask)

    def decode(self, token_ids: Any, skip_special_tokens: bool = True, **kwargs: Any) -> Any:
        """Token ids → text, without the text of any marker."""
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = True, **kwargs: Any) -> list[str]:
        """One text a row, without the text of any marker."""
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        return cast(
            list[str], self.tokenizer.batch_decode(sequences, skip_special_tokens=skip_special_tokens, **kwargs)
        )

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """The call that transformers' users know: prompt texts as they are, `<IMGPLH>` where a picture belongs.

        Args:
            images: one picture, a list for one text (or, flat, for several), or a list of lists, one for each text.
                PIL images, bytes, and what transformers' `load_image` reads.
            text: one prompt or several.  A prompt that is not written by a chat template may leave out the mark of its
                only picture.
            kwargs: for the tokenizer; texts are padded on the left.

        Raises:
            InputError: marks and pictures of a text differ in number.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        if not texts:
            raise InputError("The processor needs at least one text, and got none.", field="text")
        groups = self._share_out(images, texts)
        expanded, offsets = zip(
            *(self._expand(one, len(group)) for one, group in zip(texts, groups, strict=True)), strict=True
        )
        wants_offsets = kwargs.pop("return_text_replacement_offsets", False)
        options = {"padding": True, "padding_side": "left", **kwargs}
        options.setdefault("add_special_tokens", not expanded[0].startswith(chat.BEGIN_OF_TEXT))
        data = dict(self.tokenizer(list(expanded), **options))
        if any(groups):
            data["pixel_values"] = self._pixel_values([picture for group in groups for picture in group])
        if wants_offsets:
            data["text_replacement_offsets"] = list(offsets)
        return BatchFeature(data)

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, with special-token names that people typed made harmless first."""
        if conversation and isinstance(conversation[0], Mapping):
            return super().apply_chat_template([_harmless(message) for message in conversation], *args, **kwargs)
        batch = [[_harmless(message) for message in messages] for messages in conversation]
        return super().apply_chat_template(batch, *args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """What `processor_config.json` holds; the tokenizer and the template have files of their own."""
        return {
            "picture": config.to_dict(self.picture),
            "num_image_tokens": self.num_image_tokens,
            "processor_class": type(self).__name__,
        }

    def _tokenise(self, segment: Segment) -> NDArray[np.int32]:
        key = (segment.text, segment.is_layout)
        ids = self._cache.get(key)
        if ids is None:
            if segment.is_layout:
                numbers = self.tokenizer(segment.text, add_special_tokens=False)["input_ids"]
            else:
                numbers = self._plain.encode(segment.text, add_special_tokens=False).ids
            if len(self._cache) >= CACHE_SIZE:
                self._cache.clear()
            ids = self._cache[key] = np.array(numbers, np.int32)
        return ids

    def _pixels_of(self, picture: Image.Image | bytes) -> NDArray[np.uint8]:
        image = images.decode(picture, LimitConfig()) if isinstance(picture, bytes) else _opened(picture)
        if image.size != (self.picture.size, self.picture.size):
            image, _ = images.square(image, self.picture)
        return images.for_tower(image, self.picture.tower_size)

    def _pixel_values(self, pictures: Sequence[Any]) -> Tensor:
        loaded = [load_image(picture) if isinstance(picture, str) else picture for picture in pictures]
        return images.normalise(self.pixels(loaded))

    def _share_out(self, pictures: Any, texts: Sequence[str]) -> list[list[Any]]:
        """Which pictures belong to which text."""
        if pictures is None:
            return [[] for _ in texts]
        if not isinstance(pictures, (list, tuple)):
            pictures = [pictures]
        if any(isinstance(group, (list, tuple)) for group in pictures):
            if len(pictures) != len(texts):
                raise InputError(f"There are {len(texts)} texts but {len(pictures)} lists of pictures.", field="images")
            return [list(group or []) for group in pictures]
        if len(texts) == 1:
            return [list(pictures)]
        marks = [text.count(chat.PLACEHOLDER) for text in texts]
        if sum(marks) != len(pictures):
            raise InputError(
                f"The texts have {sum(marks)} {chat.PLACEHOLDER} and come with {len(pictures)} pictures; "
                "write one for each picture, or give a list of pictures for each text.",
                field="images",
            )
        rest = iter(pictures)
        return [[next(rest) for _ in range(count)] for count in marks]

    def _expand(self, text: str, num_pictures: int) -> tuple[str, list[dict[str, Any]]]:
        """Put the image tokens where the marks are; also where each mark was and what took its place."""
        marks = text.count(chat.PLACEHOLDER)
        if marks == 0 and num_pictures == 1 and not text.startswith(chat.BEGIN_OF_TEXT):
            text, marks = chat.PLACEHOLDER + text, 1
        if marks != num_pictures:
            raise InputError(
                f"The text has {marks} {chat.PLACEHOLDER} and comes with {num_pictures} pictures; "
                f"write one {chat.PLACEHOLDER} where each picture belongs.",
                field="text",
            )
        replacement = chat.IMAGE + chat.IMAGE_TOKEN * self.num_image_tokens + chat.IMAGE_END
        gain = len(replacement) - len(chat.PLACEHOLDER)
        offsets = [
            {
                "type": "image",
                "span": match.span(),
                "new_span": (match.start() + index * gain, match.start() + index * gain + len(replacement)),
                "text": match.group(),
                "replacement": replacement,
            }
            for index, match in enumerate(re.finditer(chat.PLACEHOLDER, text))
        ]
        return text.replace(chat.PLACEHOLDER, replacement), offsets


def _picture_config(given: PictureConfig | Mapping[str, Any] | None) -> PictureConfig:
    return config.from_dict(PictureConfig, given) if isinstance(given, Mapping) else given or PictureConfig()


def _opened(picture: Image.Image) -> Image.Image:
    """A picture that the caller has opened: upright, in RGB."""
    if 0 in picture.size:
        raise InputError(f"A picture is {picture.width}×{picture.height} pixels; it must have some.", field="images")
    try:
        return images.as_rgb(picture)
    except OSError as error:  # Pillow reads the file only now
        raise images.ImageError("corrupt", str(error)) from error


def _harmless(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose texts name no special token.  In a list of parts `<IMGPLH>` is mere text: pictures are parts."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": chat.neutralise(content)}
    if not isinstance(content, Sequence):
        return dict(message)
    mark = chat.PLACEHOLDER[0] + "\u200b" + chat.PLACEHOLDER[1:]
    parts = [
        {**part, "text": chat.neutralise(part["text"]).replace(chat.PLACEHOLDER, mark)}
        if isinstance(part, Mapping) and isinstance(part.get("text"), str)
        else part
        for part in content
    ]
    return {**message, "content": parts}
