"""Ask a running endpoint a question: the few lines of HTTP behind `tinyvlm ask`."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Sequence

from tinyvlm.errors import ClusterError, InputError

_MAGIC = {b"\xff\xd8\xff": "jpeg", b"\x89PNG": "png", b"RIFF": "webp", b"GIF8": "gif"}


def data_uri(picture: bytes) -> str:
    """A picture's bytes as `data:image/…;base64,…`."""
    kind = next((kind for magic, kind in _MAGIC.items() if picture.startswith(magic)), "png")
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def ask(url: str, question: str, pictures: Sequence[bytes] = (), *, model: str, timeout_s: float = 120.0) -> str:
    """One question, with or without pictures, to `{url}/v1/chat/completions`; greedy.

    Raises:
        ClusterError: nobody answers at `url`.
        InputError: the server refused the request, with its own message.
    """
    content = [{"type": "image_url", "image_url": {"url": data_uri(picture)}} for picture in pictures]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return str(json.load(answer)["choices"][0]["message"]["content"])
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        try:
            text = json.loads(text)["error"]["message"]
        except (json.JSONDecodeError, KeyError, TypeError):
            pass
        raise InputError(f"{url} answered {error.code}: {text}") from None
    except OSError as error:
        raise ClusterError(
            f"Nobody answers at {url} ({error}); start a model with `python -m ray_jobs.serve`."
        ) from None
