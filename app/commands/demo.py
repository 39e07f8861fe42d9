"""`python -m app demo`: the service on a demo checkpoint, asked one real question of every kind over HTTP."""

from __future__ import annotations

import asyncio
import base64
import io
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import numpy.typing as npt
from aiohttp import web
from PIL import Image, ImageDraw

from app.http.keys import ENGINE, LIFECYCLE, SCHEDULER
from app.http.server import bind, serve
from app.lifecycle import ExitCode
from app.main import create_app
from app.settings import ApiKey, Settings
from scheduler.scheduler import State

TEXT = "A dog plays on the beach at sunset."
LIKE_IT = "At dusk a puppy runs along the shore."
OTHER = "The quarterly report is due on Friday."


@dataclass(frozen=True, slots=True)
class Question:
    """A request of one kind."""

    kind: str
    body: dict[str, Any]
    has_image: bool = False
    compared: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: `vectors` is float32 of shape (items, dimension), empty if the request failed. `compared` ones are in
    the table of cosines."""

    kind: str
    compared: bool
    status: int
    milliseconds: float
    tokens: int
    vectors: npt.NDArray[np.float32]

    @property
    def good(self) -> bool:
        lengths = np.linalg.norm(self.vectors, axis=1)
        return self.status == 200 and len(lengths) > 0 and bool(np.allclose(lengths, 1.0, atol=1e-3))


def picture() -> bytes:
    """Draws a small PNG: a sun over a sea."""
    image = Image.new("RGB", (320, 240), (250, 190, 120))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 150, 320, 240), fill=(40, 90, 150))
    draw.ellipse((130, 90, 190, 150), fill=(255, 90, 40))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def questions(image_url: str, png: bytes, with_images: bool) -> list[Question]:
    """Makes one question of every kind that the model takes."""
    data_uri = "data:image/png;base64," + base64.b64encode(png).decode()
    every = [
        Question("text", {"input": TEXT}, compared=True),
        Question("related text", {"input": LIKE_IT}, compared=True),
        Question("unrelated text", {"input": OTHER}, compared=True),
        Question("batch of 3", {"input": [TEXT, OTHER, ""]}),
        Question("image by URL", {"input": {"type": "image_url", "image_url": {"url": image_url}}}, True, compared=True),
        Question("image by base64", {"input": data_uri}, True),
        Question("mixed: text, image", {"input": [TEXT, {"type": "image", "image": data_uri}]}, True),
        Question("fused: image + text", {"input": {"text": TEXT, "image": data_uri}}, True, compared=True),
        Question("instruction", {"input": TEXT, "instruction": "Retrieve images or text relevant to the user's query."}),
        Question("16 dimensions", {"input": TEXT, "dimensions": 16}),
        Question("base64 encoding", {"input": TEXT, "encoding_format": "base64"}),
    ]
    return [question for question in every if with_images or not question.has_image]


async def ask(session: aiohttp.ClientSession, question: Question) -> Answer:
    """Sends one request, and reads its vectors."""
    started = time.perf_counter()
    async with session.post("/v1/embeddings", json=question.body) as reply:
        body = await reply.json()
    milliseconds = (time.perf_counter() - started) * 1000
    rows = [read_vector(row["embedding"]) for row in body.get("data", [])]
    vectors = np.array(rows, dtype=np.float32).reshape(len(rows), -1)
    tokens = body.get("usage", {}).get("total_tokens", 0)
    return Answer(question.kind, question.compared, reply.status, milliseconds, tokens, vectors)


def read_vector(embedding: list[float] | str) -> list[float]:
    """Reads a vector in either encoding."""
    return np.frombuffer(base64.b64decode(embedding), "<f4").tolist() if isinstance(embedding, str) else embedding


def show(answers: list[Answer], random_weights: bool) -> None:
    """Prints the table of answers, and the cosines between the first vectors of full dimension."""
    print(f"\n{'request':<22}{'status':>7}{'ms':>10}{'tokens':>8}  vectors")
    for answer in answers:
        shape = " x ".join(map(str, answer.vectors.shape)) if answer.good else "FAILED"
        print(f"{answer.kind:<22}{answer.status:>7}{answer.milliseconds:>10.1f}{answer.tokens:>8}  {shape}")
    compared = [answer for answer in answers if answer.good and answer.compared]
    rows = np.array([answer.vectors[0] for answer in compared])
    print("\ncosines" + " " * 15 + "".join(f"{answer.kind[:14]:>16}" for answer in compared))
    for answer, cosines in zip(compared, rows @ rows.T if len(rows) else rows, strict=True):
        print(f"{answer.kind:<22}" + "".join(f"{cosine:>16.3f}" for cosine in cosines))
    if random_weights:
        print("\nThe demo's weights are random: these vectors carry no meaning. `make run` serves the real model.")


async def image_host(png: bytes) -> tuple[web.AppRunner, str]:
    """Starts a host of our own on the loopback, with one image; returns its runner and the image's URL."""

    async def image(_: web.Request) -> web.Response:
        return web.Response(body=png, content_type="image/png")

    app = web.Application()
    app.router.add_get("/sunset.png", image)
    runner = web.AppRunner(app)
    await runner.setup()
    (sock,) = bind("127.0.0.1", 0)
    await web.SockSite(runner, sock).start()
    return runner, f"http://127.0.0.1:{sock.getsockname()[1]}/sunset.png"


async def run_demo(model_path: Path, port: int, once: bool, random_weights: bool) -> int:
    """Serves, asks, shows; goes on serving unless `once`. The exit code is not 0 if a request failed."""
    png = picture()
    host, image_url = await image_host(png)
    key = f"sk-demo-{secrets.token_hex(8)}"
    settings = Settings(
        api_keys=(ApiKey("demo", key.encode()),),
        host="127.0.0.1",
        port=port,
        model_path=model_path,
        device="auto",
        embedding_dimension=None,
        image_url_allowed_hosts=frozenset({image_url.split("/")[2]}),
        log_level="WARNING",
    )
    app = create_app(settings)
    serving = asyncio.create_task(serve(app))
    while app[SCHEDULER].state is State.LOADING and not serving.done():
        await asyncio.sleep(0.05)
    failed = True
    if app[SCHEDULER].state is State.READY:
        url = f"http://127.0.0.1:{port}"
        async with aiohttp.ClientSession(url, headers={"Authorization": f"Bearer {key}"}) as session:
            asked = questions(image_url, png, app[ENGINE].preparer.info.supports_images)
            answers = [await ask(session, question) for question in asked]
        show(answers, random_weights)
        failed = not all(answer.good for answer in answers)
        if not once:
            print(f"\nServing until Ctrl-C. A page to try it and to watch it, with the key {key}:\n\n  {url}/\n\nOr:\n")
            print(f"  curl {url}/v1/embeddings -H 'Authorization: Bearer {key}' -d '{{\"input\": \"hello\"}}'\n", flush=True)
    if once:
        app[LIFECYCLE].end(ExitCode.DRAINED)
    code = await serving
    await host.cleanup()
    return int(code) or int(failed)
