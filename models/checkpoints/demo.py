"""Write a Qwen3-VL checkpoint with random weights, to try the service out, for tests, and to measure a shape.

`python -m models.checkpoints.demo PATH` takes seconds and no network. The vectors of such a model are like hashes: equal inputs
have equal vectors, different inputs different ones, and they carry no meaning.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.base import ModelLoadError
from models.checkpoints.complete import check_complete

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class DemoShape:
    """The sizes of a checkpoint. `vocabulary` is the number of embedding rows; the tokenizer has fewer tokens.

    `mrope_section` (time, height, width) sums to head_dim / 2. Since it is interleaved, height and width are at most a third of
    the sum each. `deepstack` has indexes of layers of the vision tower, at most as many as there are text layers.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    mrope_section: tuple[int, int, int]
    vocabulary: int
    vision_hidden: int
    vision_depth: int
    vision_heads: int
    vision_intermediate: int
    deepstack: tuple[int, ...]
    position_grid: int
    patch_size: int = 16
    max_tokens: int = 32768
    append_endoftext: bool = True
    tied: bool = True
    dtype: str = "float32"
    # The mean of the norms' weights of queries and keys. At 2 attention is sharp; in a deep model in bfloat16 it is so sharp that
    # rounding alone moves the cosine of a vector by hundredths.
    norm_mean: float = 2.0


TINY = DemoShape(
    hidden=72, layers=4, heads=3, kv_heads=1, head_dim=24, intermediate=144, mrope_section=(6, 3, 3), vocabulary=640,
    vision_hidden=48, vision_depth=4, vision_heads=2, vision_intermediate=96, deepstack=(1, 2, 3), position_grid=12,
)  # fmt: skip
# As unlike TINY as the family allows: code that works for both takes its sizes from the checkpoint.
OTHER = DemoShape(
    hidden=64, layers=3, heads=4, kv_heads=2, head_dim=32, intermediate=96, mrope_section=(7, 5, 4), vocabulary=512,
    vision_hidden=32, vision_depth=3, vision_heads=4, vision_intermediate=80, deepstack=(0, 2), position_grid=8,
    append_endoftext=False, tied=False,
)  # fmt: skip
BENCH_40M = DemoShape(
    hidden=512, layers=10, heads=8, kv_heads=4, head_dim=64, intermediate=1536, mrope_section=(12, 10, 10), vocabulary=4096,
    vision_hidden=192, vision_depth=6, vision_heads=6, vision_intermediate=768, deepstack=(1, 3), position_grid=24,
)  # fmt: skip
# Qwen3-VL-Embedding-2B, number for number.
SHAPE_2B = DemoShape(
    hidden=2048, layers=28, heads=16, kv_heads=8, head_dim=128, intermediate=6144, mrope_section=(24, 20, 20), vocabulary=151936,
    vision_hidden=1024, vision_depth=24, vision_heads=16, vision_intermediate=4096, deepstack=(5, 11, 17), position_grid=48,
    max_tokens=262144, dtype="bfloat16", norm_mean=1.0,
)  # fmt: skip
SHAPES = {"tiny": TINY, "other": OTHER, "bench-40m": BENCH_40M, "2b": SHAPE_2B}

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
# Qwen does not mark these as special: they are text that is one token each.
ADDED_TOKENS = ("<think>", "</think>")
_FILES = frozenset(
    f"{name}.json" for name in ("config", "generation_config", "processor_config", "tokenizer", "tokenizer_config")
) | {"chat_template.jinja", "model.safetensors"}
# The pre-tokenizer of Qwen2 and Qwen3.
_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' or 'image' in part or 'image_url' in part %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'video' or 'video' in part %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- elif 'text' in part %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

_TEXT = """\
Represent the user's input. Retrieve images or text relevant to the user's query. system user assistant
A vector search finds the documents that are nearest to a question. The query and the documents are turned into vectors of
one length, and the cosine between two of them says how near they are. A picture of a dog on the beach is near to the words
"a dog runs on the beach", though the two share no letters. The first model reads the text, the second reads the image, and
both write into one space. The longer the input is, the more time it takes; several inputs are read together in one batch.
The river runs through the old town, past the bridge, the market and the mill, and then out to the sea. In the morning the
boats come back with fish; in the evening the lights on the water look like stars. She asked them what they were reading,
and they answered that it was a book about the weather. It isn't the wind that's cold, it's the rain. We'll see, I'd say;
they've been here before, and you're right: there were 12 of them in 1998, 37 in 2004 and 256 by the end of 2025.
Where is the nearest station? How do I train a model on my own data? What is the capital of France? Which colour is it?
Red, green, blue, black and white; one, two, three, four, five, six, seven, eight, nine, ten, a hundred, a thousand.
The cat sat on the mat. The quick brown fox jumps over the lazy dog. Never odd or even. There is nothing like this here.
一个向量搜索系统会找到与问题最接近的文档。查询和文档都会变成同样长度的向量,它们之间的余弦说明它们有多接近。
图片和文字写在同一个空间里。一只狗在海边跑步的图片,与“一只狗在海边跑步”这句话很接近。今天天气很好,我们去北京看看。
这个模型可以阅读文字和图片。上海是一个很大的城市。你喜欢什么颜色?红色、绿色、蓝色、黑色还是白色?请问火车站在哪里?
我们今天学习中文,明天学习英文。这条河流过古老的城市,然后流到大海。早上,船带着鱼回来;晚上,水上的灯像星星一样。
検索モデルは文章と画像をベクトルに変えます。 Der Fluss fließt durch die Stadt. Les données sont là. Поиск по изображениям.
def cosine(left: list[float], right: list[float]) -> float:
    return sum(a * b for a, b in zip(left, right)) / (norm(left) * norm(right))

class Index:
    def __init__(self, vectors, names):
        self.vectors = vectors
        self.names = names

    def search(self, query, limit=10):
        scores = [(cosine(query, vector), name) for vector, name in zip(self.vectors, self.names)]
        for score, name in sorted(scores, reverse=True)[:limit]:
            if score > 0.5:
                print(f"{name}: {score:.3f}")
        return None

for (int i = 0; i < n; i++) { if (a[i] != b[i]) { return false; } }
const reply = await fetch("https://example.com/v1/embeddings", { method: "POST", body: JSON.stringify({ input: text }) });
SELECT id, title FROM documents WHERE created_at > '2025-01-01' ORDER BY score DESC LIMIT 10;
{"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.1, -0.2, 0.3]}], "model": "demo"}
<p class="note">The list is <b>empty</b>.</p> import numpy as np; import torch; x = np.zeros((3, 4)); print(x.shape)
"""


def write_demo_checkpoint(path: Path, *, seed: int = 0, shape: DemoShape = TINY) -> None:
    """Write a checkpoint of `shape` to `path`, whole or not at all. The same seed and shape give the same bytes.

    Raises FileExistsError unless `path` is missing or an empty folder.
    """
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise FileExistsError(f"{path} exists and is not an empty folder.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch, _quiet_transformers():
        folder = Path(scratch) / "checkpoint"
        tokenizer = _tokenizer(shape)
        _save_processor(folder, tokenizer, shape)
        _save_model(folder, tokenizer, shape, seed)
        os.rename(folder, path)


def _tokenizer(shape: DemoShape) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        # Some rows have no token, as in Qwen's own checkpoints.
        vocab_size=shape.vocabulary - len(SPECIAL_TOKENS) - len(ADDED_TOKENS) - 16,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT.splitlines(keepends=True), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED_TOKENS])
    steps: list[Any] = [processors.ByteLevel(trim_offsets=False)]
    if shape.append_endoftext:
        end = ("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))
        steps.append(processors.TemplateProcessing(single=f"$A {end[0]}", pair=f"$A $B {end[0]}", special_tokens=[end]))
    tokenizer.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token not in ("<|im_end|>", "<|endoftext|>")],
        model_max_length=shape.max_tokens,
    )


def _save_processor(folder: Path, tokenizer: Any, shape: DemoShape) -> None:
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    common = {
        "patch_size": shape.patch_size,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    images = Qwen2VLImageProcessor(size={"shortest_edge": 65536, "longest_edge": 16777216}, **common)
    Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(**common), chat_template=CHAT_TEMPLATE).save_pretrained(folder)


def _config(tokenizer: Any, shape: DemoShape) -> Any:
    from transformers import Qwen3VLConfig

    token_id = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_tokens,
        "bos_token_id": token_id("<|endoftext|>"),
        "eos_token_id": token_id("<|im_end|>"),
        "tie_word_embeddings": shape.tied,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_interleaved": True,
            "mrope_section": list(shape.mrope_section),
        },
    }
    vision = {
        "hidden_size": shape.vision_hidden,
        "depth": shape.vision_depth,
        "num_heads": shape.vision_heads,
        "intermediate_size": shape.vision_intermediate,
        "out_hidden_size": shape.hidden,
        "deepstack_visual_indexes": list(shape.deepstack),
        "num_position_embeddings": shape.position_grid**2,
        "patch_size": shape.patch_size,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    ids = {f"{kind}_token_id": token_id(f"<|{kind}_pad|>") for kind in ("image", "video")}
    ids |= {f"vision_{end}_token_id": token_id(f"<|vision_{end}|>") for end in ("start", "end")}
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=shape.tied, **ids)


def _save_model(folder: Path, tokenizer: Any, shape: DemoShape, seed: int) -> None:
    import torch
    from transformers import Qwen3VLForConditionalGeneration

    # On "meta", since every parameter is drawn below: transformers' own initialisation would take most of a large shape's time.
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration._from_config(_config(tokenizer, shape), dtype=getattr(torch, shape.dtype))
    model = model.to_empty(device="cpu")
    model.tie_weights()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            _draw(name, parameter, shape.norm_mean)
    model.save_pretrained(folder)
    # safetensors makes its file readable by the owner only.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def _draw(name: str, parameter: torch.Tensor, norm_mean: float) -> None:
    """Draw the values of a parameter. The usual deviation of 0.02 would give a narrow model the same vector for all inputs. Here
    each layer outweighs the last token's embedding, and attention is sharp, so that the vector depends on the whole input. Biases
    and norms differ from 0 and 1, so that code that forgets one gives other vectors."""
    import torch

    if parameter.dim() == 1:
        mean = 0.0 if name.endswith(".bias") else norm_mean if name.endswith(("q_norm.weight", "k_norm.weight")) else 1.0
        torch.nn.init.normal_(parameter, mean=mean, std=0.1)
    elif "embed" in name and parameter.dim() == 2:
        torch.nn.init.normal_(parameter, std=0.5)
    else:
        torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and messages until the context is left."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _clear(path: Path) -> None:
    """Remove an earlier demo. Raises FileExistsError if the folder has any other file, so that real weights are never removed."""
    if path.is_symlink() or not path.is_dir() or any(entry.name not in _FILES for entry in path.iterdir()):
        raise FileExistsError(f"{path} is not a folder that this program wrote, and is left alone.")
    shutil.rmtree(path)


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m models.checkpoints.demo", description="Write a checkpoint of random weights."
    )
    parser.add_argument("path", type=Path, help="the folder to write; it must be missing or empty")
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="its sizes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal bytes (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace an earlier demo")
    options = parser.parse_args(arguments)
    path: Path = options.path
    try:
        if path.exists() and options.force:
            _clear(path)
        elif path.is_dir() and any(path.iterdir()):
            check_complete(path, allow_pickle=False)
            print(f"{path} holds a checkpoint already, and is left as it is (--force replaces a demo).")
            return 0
        write_demo_checkpoint(path, seed=options.seed, shape=SHAPES[options.shape])
    except (ModelLoadError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{path}: a Qwen3-VL of shape {options.shape!r}. Its weights are random: its vectors carry no meaning.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
