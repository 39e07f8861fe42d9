"""What is measured: texts of a given number of content tokens, a mix as traffic has it, and images; drawn with a fixed seed."""

from __future__ import annotations

import io
import random
from pathlib import Path
from statistics import NormalDist

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

WORDS = "the of model river image vector search quickly train dog straße données 模型 検索 поиск 北京 query sea light"
VOCABULARY = WORDS.split()

WORDS_OF_ONE_TOKEN = (
    "the of and a to in is you that it he was for on are as with his they be at one have this from by hot word but what some we "
    "can out other were all there when up use your how said an each she which do their time if will way about many then them "
    "write would like so these her long make thing see him two has look more day could go come did number sound no most people "
    "my over know water than call first who may down side been now find any new work part take get place made live where after "
    "back little only round man year came show every good me give our under name very through just form sentence great think "
    "say help low line differ turn cause much mean before move right boy old too same tell does set three want air well also"
)
ENGLISH = WORDS_OF_ONE_TOKEN.split()
FEWEST_WORDS, MOST_WORDS = 8, 200
LENGTHS = (16, 32, 128, 512)
WORKLOADS = (*map(str, LENGTHS), "mixed", "images")
# Fewer content tokens have too few texts that differ.
SHORTEST = 8
# Queries and passages together: half under 40 content tokens, one in a hundred over 320.
MIXED = NormalDist(3.7, 0.9)
LONGEST_MIXED = 2000
IMAGE_SIDE = 512


def texts(path: Path, name: str, count: int) -> list[str]:
    """`count` texts, no two alike, of workload `name`: a number of content tokens of the checkpoint's tokenizer, or "mixed"."""
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    rng = random.Random(name)
    lengths = mixed_lengths(count) if name == "mixed" else [int(name)] * count
    rng.shuffle(lengths)
    drawn: dict[str, None] = {}
    for length in lengths:
        text = ""
        while not text or text in drawn:
            text = cut(tokenizer, " ".join(rng.choices(VOCABULARY, k=length + 1)), length)
        drawn[text] = None
    return list(drawn)


def passages(count: int) -> list[str]:
    """`count` English texts of 8 to 200 words, no two alike: a word is a token of most tokenizers, so that the longest is within
    the 256 tokens that small text models read. Their lengths are as far apart in ratio, each from the next."""
    rng = random.Random("passages")
    span = MOST_WORDS / FEWEST_WORDS
    lengths = [round(FEWEST_WORDS * span ** (place / (count - 1))) for place in range(count)]
    rng.shuffle(lengths)
    drawn: dict[str, None] = {}
    for length in lengths:
        text = ""
        while not text or text in drawn:
            text = " ".join(rng.choices(ENGLISH, k=length))
        drawn[text] = None
    return list(drawn)


def mixed_lengths(count: int) -> list[int]:
    """Content tokens of a log-normal mix: its quantiles and not draws, so that two pools of any size hold the same mix."""
    quantiles = (MIXED.inv_cdf((place + 0.5) / count) for place in range(count))
    return [min(LONGEST_MIXED, max(1, round(float(np.exp(quantile))))) for quantile in quantiles]


def cut(tokenizer: Tokenizer, text: str, tokens: int) -> str:
    """The first `tokens` tokens of a text."""
    offsets = tokenizer.encode(text, add_special_tokens=False).offsets
    return text[: offsets[min(tokens, len(offsets)) - 1][1]]


def images(count: int) -> list[bytes]:
    """JPEG files of 512 x 512 pixels, no two alike: noise over a gradient."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 200, IMAGE_SIDE, dtype=np.uint8)[:, None, None]
    noise = (rng.integers(0, 55, (IMAGE_SIDE, IMAGE_SIDE, 3), dtype=np.uint8) for _ in range(count))
    return [jpeg(Image.fromarray(ramp + grain)) for grain in noise]


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG")
    return file.getvalue()
