"""Pictures as a dataset's records give them → finished pictures of the recipe's size, or the reason why not.

    bytes, `data:` address, or a file's name ──prepare.images──▶ bytes ──decoder processes──▶ JPEG, sha256, phash

Equal bytes are decoded once for a part.  A picture that is finished already (a JPEG of the recipe's size) stays as it
is, byte for byte.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import posixpath
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote_to_bytes

from tinyvlm import images, schema, storage
from tinyvlm.data import hub
from tinyvlm.data.decoding import Decoded, Decoders
from tinyvlm.data.sources import GivenImage, StoredImage

_COCO = re.compile(r"(?:COCO_(?:train|val)2014_)?(\d{12}\.jpg)")
"""COCO's pictures are called by their number alone since 2017; in 2014 their names said the split too."""
_LINK = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_MAX_NAME = 120
"""Characters of a name in a sentence."""
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
            image: _known(image, body, self._kept(body, coming[body].result()))
            if isinstance(body, bytes)
            else Decoded(status=body.status, detail=body.detail)
            for image, body in bodies.items()
        }

    def read(self, image: GivenImage) -> bytes | Unreadable:
        """The bytes of a picture."""
        if isinstance(image, bytes):
            return image
        if isinstance(image, StoredImage):
            if image.name is None:
                return Unreadable("no_picture", "its row came without the picture")
            # As if prepare.images had no other folder for it.
            beside = {"": storage.address(image.folder)} if image.folder else {}
            return self._of_file(image.name, {**beside, **self.folders})
        if image[:5].lower() == "data:":
            return _of_data_address(image)
        return self._of_file(image, self.folders)

    def close(self) -> None:
        """End the decoder processes."""
        self._decoders.close()

    def _kept(self, body: bytes, decoded: Decoded) -> Decoded:
        if decoded.status == schema.OK and images.is_finished(body, self.picture):
            return replace(decoded, image=body)
        return decoded

    def _of_file(self, name: str, folders: Mapping[str, Path]) -> bytes | Unreadable:
        found = _place(name, folders)
        if isinstance(found, Unreadable):
            return found
        shown, names = name[:_MAX_NAME], _names_of(found.name)
        for path in (found.with_name(each) for each in names):
            try:
                status = path.stat()
                if not stat.S_ISREG(status.st_mode):  # a pipe would never end
                    return Unreadable("unreadable", f"{shown} is no file")
                if status.st_size > self.limits.max_bytes:
                    return Unreadable("too_large", f"{status.st_size} bytes, {self.limits.max_bytes} allowed")
                return storage.read(path)
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:  # ValueError: a NUL in the name
                return Unreadable("unreadable", f"{shown}: {getattr(error, 'strerror', None) or error}")
        tried = f", nor {' or '.join(names[1:])}" if names[1:] else ""
        return Unreadable("no_picture", f"{shown} is not in {found.parent}{tried}")


def _place(name: str, folders: Mapping[str, Path]) -> Path | Unreadable:
    """Where a named picture lies; a name never leads out of its folder."""
    said = name[:_MAX_NAME]
    if _LINK.match(name):
        return Unreadable("no_picture", f"{said} is a link, and prepare fetches none: download it, and name the file")
    clean = posixpath.normpath(name.replace("\\", "/"))
    fitting = [prefix for prefix in folders if not prefix or f"{clean.strip('/')}/".startswith(f"{prefix}/")]
    if not fitting:
        known = ", ".join(repr(prefix) for prefix in folders) or "none"
        return Unreadable("no_picture", f"{said} is under no folder of prepare.images (there are {known})")
    prefix = max(fitting, key=len)
    folder = folders[prefix]
    if hub.is_pinned(folder):
        return Unreadable("no_picture", f"{said} lies on the hub, beside its file: `hf download` it all, and read that")
    if clean.startswith("/") and not storage.is_object(folder):  # whole paths are taken when they lead there
        whole, root = Path(clean), folder.absolute()
        if whole.is_relative_to(root):
            return whole
    rest = clean.strip("/").removeprefix(prefix).lstrip("/")
    if rest == ".." or rest.startswith("../") or rest in ("", "."):
        return Unreadable("no_picture", f"{said} leads out of {folder}")
    return folder / rest


def _known(image: GivenImage, body: bytes, decoded: Decoded) -> Decoded:
    """With the hashes of the picture that a finished one was made of, if the record has them and they are its own."""
    if not isinstance(image, StoredImage) or image.sha256 is None or image.name is None:
        return decoded
    is_its_own = PurePosixPath(image.name).stem == hashlib.sha256(body).hexdigest()
    phash = decoded.phash if image.phash is None else image.phash
    return replace(decoded, sha256=image.sha256, phash=phash) if is_its_own else decoded


def _names_of(name: str) -> list[str]:
    """A file's name, and the other names that a picture of COCO has."""
    found = _COCO.fullmatch(name)
    if found is None:
        return [name]
    number = found[1]
    return list(dict.fromkeys([name, number, f"COCO_train2014_{number}", f"COCO_val2014_{number}"]))


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
