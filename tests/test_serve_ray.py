"""The endpoint through a real Ray Serve: two sockets and five processes between the question and the answer."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tinyvlm.errors import ConfigError, StageError
from tinyvlm.serve.settings import ReplicaConfig, ServeConfig

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")]

QUESTION = "what shape is in the image?"
LONG = 50_000
"""Tokens that nobody here waits for: about a minute's work."""
SMALL = ReplicaConfig(num_cpus=0.1)


def save_model(folder: Path, seed: int) -> str:
    """Save a tiny random model that never ends an answer; gives what it says to `QUESTION` about picture 0."""
    import torch
    from tiny_model import ask, picture, tiny_model

    from tinyvlm.generation import Engine, Sampling

    model, processor = tiny_model(folder, seed=seed)
    model.config.text_config.max_position_embeddings = LONG + 1000
    with torch.no_grad():
        model.get_output_embeddings().weight[list(processor.end_ids)] = 0
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    sample = processor.encode(ask(QUESTION), [picture(0)], open_answer=True)
    return Engine(model, processor).generate([sample], Sampling(max_new_tokens=24))[0].text


def body(**more: Any) -> dict[str, Any]:
    from tiny_model import picture

    buffer = io.BytesIO()
    picture(0).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 24, **more}


@pytest.fixture(scope="module")
def served(local_ray: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    from ray import serve

    from ray_jobs.serve import deploy

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("served")
    wanted = save_model(folder, seed=0)
    settings = ServeConfig(port=port, max_new_tokens=LONG, ingress=SMALL, preprocess=SMALL, generate=SMALL)
    url = deploy(local_ray, folder / "model", settings)
    yield {"url": url, "wanted": wanted, "settings": settings, "ray": local_ray}
    serve.shutdown()


@pytest.fixture
def client(served: dict[str, Any]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served["url"], timeout=300) as client:
        yield client


def num_running() -> int:
    from ray import serve

    return int(serve.get_deployment_handle("Generate", "tinyvlm").num_running.remote().result())


def wait_until_idle() -> None:
    for _ in range(100):
        if num_running() == 0:
            return
        time.sleep(0.05)
    raise AssertionError("the model still works for a client that has left")


def test_answers_whole_and_streamed_are_the_models_own(served: dict[str, Any], client: httpx.Client) -> None:
    whole = client.post("/v1/chat/completions", json=body()).json()
    assert whole["choices"][0]["message"]["content"] == served["wanted"]
    with client.stream("POST", "/v1/chat/completions", json=body(stream=True)) as stream:
        lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    deltas = [json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines[:-1]]
    assert "".join(deltas) == served["wanted"]
    assert sum(map(bool, deltas)) > 5


def test_the_page_and_errors_come_through_the_proxy(client: httpx.Client) -> None:
    assert "<title>TinyVLM</title>" in client.get("/").text
    assert client.get("/nothing").json()["error"]["code"] == "unknown_url"
    for stream in (False, True):
        broken = body(stream=stream)
        broken["messages"][0]["content"][0]["image_url"]["url"] = "data:image/png;base64,aGFsbG8="
        answer = client.post("/v1/chat/completions", json=broken)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_frees_the_model(served: dict[str, Any], client: httpx.Client, stream: bool) -> None:
    long = body(stream=stream, max_tokens=LONG)
    if stream:
        with client.stream("POST", "/v1/chat/completions", json=long) as answer:
            lines = answer.iter_lines()
            next(lines)
            assert num_running() == 1
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{served['url']}/v1/chat/completions", json=long, timeout=1)
    wait_until_idle()


def test_the_same_command_again_replaces_the_model_and_loses_nothing(
    served: dict[str, Any], tmp_path: Path, client: httpx.Client
) -> None:
    from ray_jobs.serve import deploy

    wanted = save_model(tmp_path, seed=1)
    assert wanted != served["wanted"]
    answers: list[str] = []
    is_over = threading.Event()

    def keep_asking() -> None:
        while not is_over.is_set():
            answer = client.post("/v1/chat/completions", json=body())
            answers.append(answer.json()["choices"][0]["message"]["content"] if answer.is_success else answer.text)

    thread = threading.Thread(target=keep_asking)
    thread.start()
    try:
        deploy(served["ray"], tmp_path / "model", served["settings"])
    finally:
        is_over.set()
        thread.join()
    assert set(answers) <= {served["wanted"], wanted}
    assert client.post("/v1/chat/completions", json=body()).json()["choices"][0]["message"]["content"] == wanted


def test_a_port_that_is_taken_is_told_before_anything_starts(tmp_path: Path) -> None:
    from ray_jobs.serve import find_model, require_free

    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        with pytest.raises(ConfigError, match=r"serve\.port"):
            require_free(ServeConfig(port=holder.getsockname()[1]))
    with pytest.raises(StageError, match="instruct"):
        find_model([tmp_path])
