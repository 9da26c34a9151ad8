"""Pictures as a dataset's records give them → finished pictures of the recipe's size, or the reason why not.

    bytes, `data:` address, or a file's name ──prepare.images──▶ bytes ──decoder processes──▶ JPEG, sha256, phash

Equal bytes are decoded once for a part.  A picture that is finished already (a JPEG of the recipe's size) stays as it
is, byte for byte.
"""

from __future__ import annotations

import base64
import binascii
import posixpath
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from tinyvlm import images, schema, storage
from tinyvlm.data.decoding import Decoded, Decoders
from tinyvlm.data.sources import GivenImage

_DATA = re.compile(r"data:[^,;]*((?:;[^,;]*)*),", re.IGNORECASE)


@dataclass(frozen=True)
class Unreadable:
    """Why a given picture has no bytes."""

    status: str
    detail: str


class GivenImages:
    """Reads and finishes pictures.

    Args:
        folders: beginning of a name → the folder (or address in an object store) that stands for it; "" stands for
            every other name.  The longest one that fits counts.
    """

    def __init__(
        self,
        folders: Mapping[str, str],
        picture: images.PictureConfig,
        limits: images.LimitConfig,
        num_processes: int = 1,
        timeout_s: float = 20.0,
    ) -> None:
        self.folders = {prefix.strip("/"): storage.address(folder) for prefix, folder in folders.items()}
        self.picture, self.limits = picture, limits
        self._decoders = Decoders(picture, limits, "finished", num_processes, timeout_s)

    def finish(self, given: Iterable[GivenImage]) -> dict[GivenImage, Decoded]:
        """What became of each picture; `image` is the finished JPEG where the status is ok."""
        bodies = {image: self.read(image) for image in dict.fromkeys(given)}
        coming = {
            body: self._decoders.submit(body) for body in dict.fromkeys(bodies.values()) if isinstance(body, bytes)
        }
        return {
            image: self._kept(body, coming[body].result())
            if isinstance(body, bytes)
            else Decoded(status=body.status, detail=body.detail)
            for image, body in bodies.items()
        }

    def read(self, image: GivenImage) -> bytes | Unreadable:
        """The bytes of a picture."""
        if isinstance(image, bytes):
            return image
        if image[:5].lower() == "data:":
            return _of_data_address(image)
        return self._of_file(image)

    def close(self) -> None:
        """End the decoder processes."""
        self._decoders.close()

    def _kept(self, body: bytes, decoded: Decoded) -> Decoded:
        if decoded.status == schema.OK and images.is_finished(body, self.picture):
            return Decoded(**{**vars(decoded), "image": body})
        return decoded

    def _of_file(self, name: str) -> bytes | Unreadable:
        found = self._place(name)
        if isinstance(found, Unreadable):
            return found
        try:
            size = storage.sizes(found.parent).get(found.name) if storage.is_object(found) else found.stat().st_size
            if size is not None and size > self.limits.max_bytes:
                return Unreadable("too_large", f"{size} bytes, {self.limits.max_bytes} allowed")
            return storage.read(found)
        except FileNotFoundError:
            return Unreadable("no_picture", f"{name} is not in {found.parent}")
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            return Unreadable("unreadable", f"{name}: {getattr(error, 'strerror', None) or error}")

    def _place(self, name: str) -> Path | Unreadable:
        """Where a named picture lies; a name never leads out of its folder."""
        clean = posixpath.normpath(name.replace("\\", "/"))
        fitting = [prefix for prefix in self.folders if not prefix or f"{clean.strip('/')}/".startswith(f"{prefix}/")]
        if not fitting:
            known = ", ".join(repr(prefix) for prefix in self.folders) or "none"
            return Unreadable("no_picture", f"{name} is under no folder of prepare.images (there are {known})")
        prefix = max(fitting, key=len)
        folder = self.folders[prefix]
        if clean.startswith("/") and not storage.is_object(folder):  # whole paths are taken when they lead there
            whole, root = Path(clean), folder.absolute()
            if whole.is_relative_to(root):
                return whole
        rest = clean.strip("/").removeprefix(prefix).lstrip("/")
        if rest.startswith("..") or not rest or rest == ".":
            return Unreadable("no_picture", f"{name} leads out of {folder}")
        return folder / rest


def _of_data_address(text: str) -> bytes | Unreadable:
    """RFC 2397."""
    found = _DATA.match(text)
    if found is None:
        return Unreadable("not_image", "a data: address without a comma")
    if ";base64" not in found[1].lower():
        return unquote_to_bytes(text[found.end() :])
    return from_base64(text[found.end() :])


def from_base64(text: Any) -> bytes | Unreadable:
    """Base64 as datasets have it: white space in it or missing padding does no harm."""
    if not isinstance(text, str):
        return Unreadable("bad_record", f"a picture is {type(text).__name__}, not base64")
    packed = "".join(text.split()).rstrip("=")
    try:
        return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    except (binascii.Error, ValueError):
        return Unreadable("corrupt", "no base64")
