"""Small text models of random weights, written in the layout of sentence-transformers: one of every family and tokenizer.

The weights are drawn so that a vector tells of all that was read; see models/checkpoints/demo.py for why the usual ones do not.

    python -m tests.support.text_checkpoints

trains the tokenizers anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    BertConfig,
    DistilBertConfig,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    RobertaConfig,
    XLMRobertaConfig,
)

from tests.support.paths import ROOT

_SOME = (
    "the river runs through old town and then out to sea boats come back with fish in morning lights on water are like stars "
    "a dog plays beach report is due friday kettle descale vinegar boil cat sleeps window rain falls over mountains while "
    "people talk about music 海 边 的 小 狗 Straße naïve 12 345 ! ? , . ( ) / < > [ ] | _"
)
WORDS = _SOME.split()
CORPUS = [" ".join(np.random.default_rng(seed).choice(WORDS, 24)) for seed in range(200)]
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 130,
}
WIDTH = 48
LIBRARY = "sentence_transformers.models"


BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MPNET_SPECIALS = ("<s>", "<pad>", "</s>", "[UNK]", "<mask>")
ROBERTA_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
QWEN_SPECIALS = ("<|endoftext|>", "<|im_end|>")


def _special(names: Sequence[str], tokenizer: Tokenizer) -> list[tuple[str, int]]:
    return [(name, tokenizer.token_to_id(name)) for name in names]


def _around(tokenizer: Tokenizer, first: str, last: str) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=_special((first, last), tokenizer)
    )
    return tokenizer


def _train_word_piece(specials: tuple[str, ...], first: str, last: str) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=250, special_tokens=list(specials)))
    return _around(tokenizer, first, last)


def _train_byte_pairs(specials: tuple[str, ...], first: str, last: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=list(specials), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    if first:
        return _around(tokenizer, first, last)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {last}", special_tokens=_special((last,), tokenizer))
    return tokenizer


def _train_unigram() -> Tokenizer:
    """As XLM-R's: its special tokens are pieces of the vocabulary, and the text </s> would be read as one."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(CORPUS, trainers.UnigramTrainer(vocab_size=250, special_tokens=specials, unk_token="<unk>"))
    return _around(tokenizer, "<s>", "</s>")


# By family; how each was trained, and its padding. Two trainings on one corpus differ, so that the tokenizers are files.
TOKENIZERS = ROOT / "tests" / "support" / "tokenizers"
TRAININGS: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "bert": (partial(_train_word_piece, BERT_SPECIALS, "[CLS]", "[SEP]"), "[PAD]"),
    "modernbert": (partial(_train_byte_pairs, BERT_SPECIALS, "[CLS]", "[SEP]"), "[PAD]"),
    "mpnet": (partial(_train_word_piece, MPNET_SPECIALS, "<s>", "</s>"), "<pad>"),
    "qwen3": (partial(_train_byte_pairs, QWEN_SPECIALS, "", "<|endoftext|>"), "<|endoftext|>"),
    "roberta": (partial(_train_byte_pairs, ROBERTA_SPECIALS, "<s>", "</s>"), "<pad>"),
    "xlm-roberta": (_train_unigram, "<pad>"),
}


def train_tokenizers() -> None:
    """Write the tokenizers anew. The vectors that were recorded of them are then of no use: see tests/support/text_oracle.py."""
    TOKENIZERS.mkdir(exist_ok=True)
    for name, (train, _) in TRAININGS.items():
        train().save(str(TOKENIZERS / f"{name}.json"), pretty=False)


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    name = "bert" if family == "distilbert" else family
    made, padding = Tokenizer.from_file(str(TOKENIZERS / f"{name}.json")), TRAININGS[name][1]
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=padding,
        extra_special_tokens=[token.content for token in made.get_added_tokens_decoder().values() if token.content != padding],
        model_max_length=512,
    )


def config_of(family: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    common = {"vocab_size": len(tokenizer) + 3, "pad_token_id": tokenizer.pad_token_id}
    match family:
        case "bert":
            return BertConfig(**SIZES, **common)
        case "roberta":
            return RobertaConfig(**SIZES, **common)
        case "xlm-roberta":
            return XLMRobertaConfig(**SIZES, **common)
        case "mpnet":
            return MPNetConfig(**SIZES, **common)
        case "distilbert":
            places = SIZES["max_position_embeddings"]
            return DistilBertConfig(dim=48, hidden_dim=96, n_layers=3, n_heads=4, max_position_embeddings=places, **common)
        case "modernbert":
            ends = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
            # The window is much shorter than a text, and of two kinds of layers there are two each.
            return ModernBertConfig(
                **{**SIZES, "num_hidden_layers": 5}, **common, **ends, local_attention=16, norm_bias=True, attention_bias=True
            )
        case _:
            return Qwen3Config(**SIZES, **common, num_key_value_heads=2, head_dim=16, eos_token_id=1, bos_token_id=0)


FAMILIES = ("bert", "distilbert", "modernbert", "mpnet", "qwen3", "roberta", "xlm-roberta")


@cache
def model_of(family: str, seed: int = 0) -> Any:
    return draw_model(config_of(family, tokenizer_of(family)), seed)


def draw_model(config: Any, seed: int = 0) -> Any:
    model = AutoModel.from_config(config, dtype=torch.float32).eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            _scatter(name, parameter)
    return model


def _scatter(name: str, parameter: torch.Tensor) -> None:
    if parameter.dim() == 1:
        torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.1)
    elif "embed" in name or "relative" in name:
        torch.nn.init.normal_(parameter, std=0.5)
    else:
        torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)


def write_checkpoint(
    path: Path,
    family: str = "bert",
    *,
    pooling: dict[str, Any] | None = None,
    heads: Sequence[tuple[str, dict[str, Any], dict[str, torch.Tensor]]] = (("Normalize", {}, {}),),
    transformer: dict[str, Any] | None = None,
    prompts: dict[str, Any] | None = None,
    model: Any = None,
) -> Path:
    """`heads` are classes of the library with their configs and weights; `transformer` is sentence_bert_config.json, `prompts`
    config_sentence_transformers.json."""
    path.mkdir(parents=True)
    tokenizer_of(family).save_pretrained(path)
    (model or model_of(family)).save_pretrained(path)
    default = {"pooling_mode_lasttoken" if family == "qwen3" else "pooling_mode_mean_tokens": True}
    config = {"word_embedding_dimension": WIDTH, **(pooling or default)}
    rows: list[tuple[str, dict[str, Any], dict[str, torch.Tensor]]] = [("Pooling", config, {}), *heads]
    modules = [{"idx": 0, "name": "0", "path": "", "type": f"{LIBRARY}.Transformer"}]
    for index, (kind, settings, weights) in enumerate(rows, start=1):
        folder = path / f"{index}_{kind}"
        folder.mkdir()
        modules.append({"idx": index, "name": str(index), "path": folder.name, "type": f"{LIBRARY}.{kind}"})
        if settings:
            write_json(folder / "config.json", settings)
        if weights:
            save_file(weights, folder / "model.safetensors")
    write_json(path / "modules.json", modules)
    write_json(path / "sentence_bert_config.json", transformer or {"max_seq_length": 128, "do_lower_case": False})
    write_json(path / "config_sentence_transformers.json", prompts or {})
    return path


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value))


def dense(inner: int, outer: int, *, bias: bool = True, activation: str = "activation.Tanh", residual: bool = False) -> Any:
    """A Dense module for `write_checkpoint`."""
    generator = torch.Generator().manual_seed(inner * 1000 + outer)
    weights = {"linear.weight": torch.randn(outer, inner, generator=generator) * inner**-0.5}
    if bias:
        weights["linear.bias"] = torch.randn(outer, generator=generator) * 0.3
    if residual and inner != outer:
        weights["residual.weight"] = torch.randn(outer, inner, generator=generator) * inner**-0.5
    config = {
        "in_features": inner, "out_features": outer, "bias": bias, "activation_function": f"torch.nn.modules.{activation}"
    }  # fmt: skip
    return ("Dense", {**config, **({"use_residual": True} if residual else {})}, weights)


if __name__ == "__main__":
    train_tokenizers()
