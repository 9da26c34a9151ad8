"""Pictures with captions as they lie about: files with texts beside them, WebDataset tars, Parquet, the hub.

a.jpg + a.txt · metadata.csv · shard-0.tar · image + caption columns
    └─ data/pictures finds them, as for `preprocess` ─▶ caption ─▶ user: picture + prompt   assistant: the caption
"""

from __future__ import annotations

from tinyvlm.data.sources.captions import Captions


class Folder(Captions):
    """As captions of the line, about pictures that are not finished yet."""

    name = "folder"
    reads = "pictures"
    without_caption = "there is no caption beside it (.txt, .caption, .json, a metadata file or a column)"
