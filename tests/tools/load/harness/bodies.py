"""The requests that every harness sends: one file a scenario, one request a line, its number of vectors before a tab.

    python -m tests.tools.load.harness.bodies FOLDER [--count 1000]

text: one text of 8 to 32 words. mixed: 16 texts, their lengths log-uniform from 8 to 200 words. image: one JPEG of 640 x 480.
No two requests are alike, since identical inputs that are under way at once are computed once. The draw has a fixed seed.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from tests.support.paths import CONFORMANCE
from tests.tools.load.callers import draw_text

PHOTO = CONFORMANCE / "cases" / "large.jpg"
IMAGE_SIZE = (640, 480)
MIXED_INPUTS = 16
# An image is some 100 KB in base64, and most tools hold all of a file in every thread.
MOST_IMAGES = 64


def text(rng: random.Random) -> list[Any]:
    return [draw_text(rng, 8, 32)]


def mixed(rng: random.Random) -> list[Any]:
    return [draw_text(rng, 8, 200) for _ in range(MIXED_INPUTS)]


def image(rng: random.Random) -> list[Any]:
    """A piece of a photo, cut out somewhere."""
    with Image.open(PHOTO) as photo:
        left, top = (rng.randrange(whole - part) for whole, part in zip(photo.size, IMAGE_SIZE, strict=True))
        file = io.BytesIO()
        photo.crop((left, top, left + IMAGE_SIZE[0], top + IMAGE_SIZE[1])).save(file, "JPEG", quality=90)
    return [{"image": base64.b64encode(file.getvalue()).decode()}]


SCENARIOS: Mapping[str, Callable[[random.Random], list[Any]]] = {"text": text, "mixed": mixed, "image": image}


def write(folder: Path, count: int) -> None:
    """`count` requests of every scenario, and of images no more than MOST_IMAGES."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in SCENARIOS.items():
        rng = random.Random(name)
        with (folder / f"{name}.tsv").open("w") as file:
            for _ in range(min(count, MOST_IMAGES) if draw is image else count):
                inputs = draw(rng)
                print(len(inputs), json.dumps({"input": inputs, "encoding_format": "base64"}), sep="\t", file=file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    options = parser.parse_args()
    write(options.folder, options.count)


if __name__ == "__main__":
    main()
