"""Every family of text models against sentence-transformers itself: the same folders of random weights, one text at a time there,
in every company here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, processors

from models import rates
from models.base import EmbeddingInput, EmbeddingModel, ModelLoadError
from models.packed.forward import DecoderForward
from models.registry import ADAPTERS
from models.text_encoder import forward
from models.text_encoder.bert import Linear
from models.text_encoder.forward import EncoderForward
from models.text_encoder.reference import PaddedStates
from tests.support.as_on_cuda import Replayer, few_graphs, load_as_on_cuda, samples  # noqa: F401 - a fixture
from tests.support.oracle import Rows, cosines
from tests.support.text_checkpoints import (
    FAMILIES,
    WIDTH,
    config_of,
    dense,
    draw_model,
    tokenizer_of,
    write_checkpoint,
    write_json,
)
from tests.support.text_oracle import SAME, TEXTS, embed, library, load, oracle, same


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def path(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("families") / family, family)


@pytest.fixture(scope="module")
def model(path: Path) -> EmbeddingModel:
    return load(path)


@pytest.fixture(scope="module")
def expected(path: Path) -> Rows:
    return oracle(path, TEXTS)


def test_every_family_of_the_registry_is_here() -> None:
    assert {name for name, adapter in ADAPTERS.items() if "text_encoder" in adapter} == set(FAMILIES)


def test_the_vectors_of_these_checkpoints_tell_texts_apart(expected: Rows) -> None:
    between = expected @ expected.T
    assert between[np.triu_indices(len(TEXTS), 1)].max() < 0.99


def test_alone(model: EmbeddingModel, expected: Rows) -> None:
    same(np.concatenate([embed(model, [text]) for text in TEXTS]), expected)


def test_in_company(model: EmbeddingModel, expected: Rows) -> None:
    same(embed(model, TEXTS), expected)


def test_in_any_order(model: EmbeddingModel, expected: Rows) -> None:
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(TEXTS))
        same(embed(model, [TEXTS[i] for i in order]), expected[order])


ODD = [
    *("", " ", "\n \t\r\n", "\x00\x1f", "\ufeff\u200b\u200d", "\u0300" * 9, "e\u0301é" * 3, "\u202etxet", "x\u2028y\x85z"),
    *("İẞſﬁⅣ½ＡＢ", "👨\u200d👩\u200d👧 海边", "עברית हिन्दी ก็"),
    *("a" * 300, "1234567890" * 9, "--##Ġ▁|\\\"'", "[SE P] </ s> <|im_ end|>"),
]


def test_odd_texts(path: Path, model: EmbeddingModel) -> None:
    """Those about as long as the limit among them; each alone, and all in any order."""
    words = ("the river runs through old town " * 40).split()
    lengths = [len(model.prepare(EmbeddingInput((" ".join(words[:n]),), truncate=True)).token_ids) for n in range(160)]
    edges = [" ".join(words[:n]) for n in range(160) if lengths[n] >= 125][:6]
    texts = [*ODD, *edges, *(f"{text} and more" for text in ODD)]
    expected = oracle(path, texts)
    same(np.concatenate([embed(model, [text]) for text in texts]), expected)
    order = np.random.default_rng(5).permutation(len(texts))
    same(embed(model, [texts[i] for i in order]), expected[order])


def test_in_more_than_one_row(model: EmbeddingModel, expected: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "ROW_TOKENS", 60)
    same(embed(model, TEXTS), expected)


def test_many_times_over(model: EmbeddingModel, expected: Rows) -> None:
    same(embed(model, TEXTS * 4), np.tile(expected, (4, 1)))


def test_the_stock_forward_gives_the_same(path: Path, expected: Rows) -> None:
    reference = load(path, backend="reference")
    assert isinstance(reference.model._forward, EncoderForward)  # type: ignore[attr-defined]
    assert isinstance(reference.model._forward._states, PaddedStates)  # type: ignore[attr-defined]
    same(embed(reference, TEXTS * 3), np.tile(expected, (3, 1)))


def test_every_family_is_packed(model: EmbeddingModel) -> None:
    states = getattr(model.model._forward, "_states", None)  # type: ignore[attr-defined]
    assert not isinstance(states, PaddedStates)


def prompt_of(family: str) -> tuple[str, str]:
    """An instruction, and what the library's prompt is for it."""
    return ("the river", "Instruct: the river\nQuery:") if family == "qwen3" else ("the river ", "the river ")


@pytest.fixture(scope="module")
def prompted(path: Path, family: str) -> Rows:
    return oracle(path, TEXTS[:12], prompt_of(family)[1])


@pytest.mark.usefixtures("few_graphs")
@pytest.mark.parametrize(("dtype", "bar"), [("float32", SAME), ("bfloat16", 0.99)])
def test_as_on_cuda(
    path: Path, family: str, expected: Rows, prompted: Rows, dtype: str, bar: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, in company and under an instruction, which a decoder computes once; its layers compiled, small batches as graphs."""
    instruction, _ = prompt_of(family)
    model = load_as_on_cuda(path, dtype, monkeypatch)
    recorder = Replayer()
    if isinstance(model.model._forward, DecoderForward):
        model.model._forward.optimize(samples(model), compiler="eager", recorder=recorder)
        monkeypatch.setattr(model.model._forward._graphs, "_eager_seconds", math.inf)
        recorder.replays = 0
    same(np.concatenate([embed(model, [text]) for text in TEXTS]), expected, bar)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    same(embed(model, [TEXTS[i] for i in order]), expected[order], bar)
    same(embed(model, TEXTS[:12], instruction), prompted, bar)
    if family == "qwen3":
        assert recorder.replays >= 8
        # Where no graph is taken the instruction's keys are.
        model.model._forward._graphs = None
        same(embed(model, TEXTS[:12], instruction), prompted, bar)
        assert len(model.model._forward.prefixes) == 1


def test_the_warm_up_of_a_decoder_optimizes_on_cuda_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "ENOUGH_SECONDS", 0.001)
    folder = write_checkpoint(tmp_path / "model", "qwen3")
    asked: list[tuple[str, str, bool]] = []
    for device in ("cpu", "cuda"):
        for compile in ("auto", "layers", "off"):
            model: Any = load(folder, compile=compile)
            note = lambda _, *, graphs, at=(device, compile): asked.append((*at, graphs))  # noqa: E731
            monkeypatch.setattr(model.model._forward, "optimize", note)
            monkeypatch.setattr(model.model, "_device", torch.device(device))
            model.warm_up()
    assert asked == [("cuda", "auto", True), ("cuda", "layers", False)]


def test_half_precision_is_near(path: Path, expected: Rows) -> None:
    half = load(path, dtype="bfloat16")
    assert half.info.dtype == "bfloat16"
    rows = embed(half, TEXTS)
    assert rows.dtype == np.float32
    assert np.abs(np.linalg.norm(rows, axis=1) - 1).max() < 1e-5
    same(rows, expected, 0.99)


@pytest.mark.parametrize(
    ("shape", "dtype", "by_input"),
    [
        ((1536, 384), torch.float32, True),
        ((384, 1536), torch.float32, True),
        ((4096, 1024), torch.float32, False),
        ((1536, 384), torch.bfloat16, False),
    ],
)
def test_a_narrow_matrix_lies_in_memory_by_its_inputs(shape: tuple[int, int], dtype: torch.dtype, by_input: bool) -> None:
    """And is the same matrix."""
    module = torch.nn.Linear(shape[1], shape[0], dtype=dtype)
    taken = Linear.take(module)
    assert taken.weight.t().is_contiguous() is by_input and taken.weight.is_contiguous() is not by_input
    assert torch.equal(taken.weight, module.weight)
    rows = torch.randn(5, shape[1], dtype=dtype)
    assert torch.allclose(taken(rows), module(rows), atol=1e-5)


def test_info(model: EmbeddingModel, family: str) -> None:
    info = model.info
    assert (info.model_type, info.width, info.max_tokens, info.dtype) == (family, WIDTH, 128, "float32")
    assert not info.supports_images
    assert info.largest_image == 0
    assert model.memory_bytes() == 0


def test_ids_are_the_stock_tokenizers(model: EmbeddingModel, path: Path) -> None:
    stock = library(path).tokenizer
    for text in [*TEXTS, " a  b\n", "ÀÉ 海边", "\t"]:
        ids = model.prepare(EmbeddingInput((text,), truncate=True)).token_ids.tolist()
        assert ids == stock(text, truncation=True)["input_ids"]


def test_warm_up_measures_a_rate(model: EmbeddingModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "ENOUGH_SECONDS", 0.001)
    assert 1 < model.warm_up() < math.inf


# --- pooling, and what comes after it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family_of_two", ["mpnet", "qwen3"])
@pytest.mark.parametrize(
    "mode", ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", ["cls", "mean", "max"]], ids=str
)
@pytest.mark.parametrize("backend", ["packed", "reference"])
def test_pooling(tmp_path: Path, family_of_two: str, mode: str | list[str], backend: str) -> None:
    pooling = {"pooling_mode": mode, "embedding_dimension": WIDTH}
    folder = write_checkpoint(tmp_path / "model", family_of_two, pooling=pooling)
    model = load(folder, backend=backend)
    assert model.info.width == WIDTH * (len(mode) if isinstance(mode, list) else 1)
    same(embed(model, TEXTS), oracle(folder, TEXTS))


def test_the_flags_of_old_are_modes(tmp_path: Path) -> None:
    flags = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": True}
    folder = write_checkpoint(tmp_path / "model", pooling=flags)
    same(embed(load(folder), TEXTS), oracle(folder, TEXTS))


NORM = (
    "LayerNorm",
    {"dimension": WIDTH},
    {"norm.weight": torch.linspace(0.5, 2, WIDTH), "norm.bias": torch.linspace(-1, 1, WIDTH)},
)


@pytest.mark.parametrize(
    "heads",
    [
        pytest.param([], id="none: normalised all the same"),
        pytest.param([dense(WIDTH, 20)], id="dense"),
        pytest.param([dense(WIDTH, 20, bias=False, activation="linear.Identity"), ("Normalize", {}, {})], id="no bias"),
        pytest.param([dense(WIDTH, 64, activation="activation.ReLU"), dense(64, 16, activation="activation.GELU")], id="two"),
        pytest.param([("Normalize", {}, {}), dense(WIDTH, 20), ("Normalize", {}, {})], id="normalised before"),
        pytest.param([("Dropout", {"dropout": 0.5}, {}), NORM], id="layer norm"),
        pytest.param([dense(WIDTH, WIDTH, residual=True), dense(WIDTH, 20, residual=True)], id="residuals"),
    ],
)
def test_what_comes_after_pooling(tmp_path: Path, heads: list[Any]) -> None:
    folder = write_checkpoint(tmp_path / "model", heads=heads)
    model = load(folder)
    rows = embed(model, TEXTS)
    assert np.abs(np.linalg.norm(rows, axis=1) - 1).max() < 1e-5
    same(rows, oracle(folder, TEXTS))


@pytest.mark.parametrize("name", ["LeakyReLU", "SELU", "Hardswish"])
def test_an_activation_is_looked_up_by_its_name(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path / "model", heads=[dense(WIDTH, 20, activation=f"activation.{name}")])
    same(embed(load(folder), TEXTS[1:5]), oracle(folder, TEXTS[1:5]))


def test_a_pickled_layer_only_where_allowed(tmp_path: Path) -> None:
    kind, config, weights = dense(WIDTH, 20)
    folder = write_checkpoint(tmp_path / "model", heads=[(kind, config, {})])
    torch.save(weights, folder / "2_Dense" / "pytorch_model.bin")
    same(embed(load(folder, allow_pickle=True), TEXTS), oracle(folder, TEXTS))


# --- prompts -----------------------------------------------------------------------------------------------------------------

PROMPTS = {"prompts": {"query": "about the river: ", "document": ""}, "default_prompt_name": "query"}


@pytest.mark.parametrize("family_of_two", ["bert", "xlm-roberta"])
@pytest.mark.parametrize("include", [True, False], ids=["pooled", "not pooled"])
def test_prompts(tmp_path: Path, family_of_two: str, include: bool) -> None:
    modes = ["mean", "cls", "weightedmean", "max"]
    pooling = {"pooling_mode": modes, "include_prompt": include, "embedding_dimension": WIDTH}
    folder = write_checkpoint(tmp_path / "model", family_of_two, pooling=pooling, prompts=PROMPTS)
    model = load(folder)
    texts = [*TEXTS, "海边的小狗"]
    same(embed(model, texts), oracle(folder, texts))
    same(embed(model, texts, "music and rain? "), oracle(folder, texts, "music and rain? "))
    # An empty prompt takes the place of the default one, too.
    same(embed(model, texts, ""), oracle(folder, texts, ""))
    assert cosines(embed(model, texts, ""), embed(model, texts)).min() < 0.99


WITHOUT_END = {
    "nothing": ("$A", []),
    "no end": ("[CLS] $A", ["[CLS]"]),
    "two ends": ("[CLS] $A [SEP] [MASK]", ["[CLS]", "[SEP]", "[MASK]"]),
    "a word at the end": ("[CLS] $A river", ["[CLS]", "river"]),
    "a word before": ("[CLS] the a $A a [SEP]", ["[CLS]", "the", "a", "[SEP]"]),
}


@pytest.mark.parametrize("template", WITHOUT_END)
@pytest.mark.parametrize("prompt", ["the river ", "the unknown ☃ "])
def test_a_prompt_that_is_not_pooled_under_other_templates(tmp_path: Path, template: str, prompt: str) -> None:
    """The library leaves one token out of its count where the last is special: whether it is the template's, and its only one, or
    the prompt's unknown word."""
    pooling = {"pooling_mode": ["cls", "mean"], "include_prompt": False, "embedding_dimension": WIDTH}
    folder = write_checkpoint(tmp_path / "model", pooling=pooling)
    write_template(folder, *WITHOUT_END[template])
    # Of no text it pools nothing, or what it reads of the prompt.
    texts = [*TEXTS[1:], "☃ town"]
    same(embed(load(folder), texts, prompt), oracle(folder, texts, prompt))
    same(embed(load(folder), texts), oracle(folder, texts))


def test_a_template_that_reads_a_text_twice_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    write_template(folder, "[CLS] $A [SEP] $A", ["[CLS]", "[SEP]"])
    with pytest.raises(ModelLoadError, match="its tokenizer does more to a text than put tokens before and after it"):
        load(folder)


def write_template(folder: Path, single: str, names: list[str]) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = [(name, tokenizer.token_to_id(name)) for name in names]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    tokenizer.save(str(folder / "tokenizer.json"))


def test_one_text_under_two_prompts_that_are_not_pooled_is_two_inputs(tmp_path: Path) -> None:
    """The same tokens, and not the same vector."""
    pooling = {"pooling_mode": "cls", "include_prompt": False, "embedding_dimension": WIDTH}
    model = load(write_checkpoint(tmp_path / "model", pooling=pooling))
    one = model.prepare(EmbeddingInput((" old town",), "the river"))
    other = model.prepare(EmbeddingInput((" river old town",), "the"))
    assert one.token_ids.tolist() == other.token_ids.tolist()
    assert one.identity != other.identity
    assert cosines(model.embed([one]), model.embed([other]))[0] < 0.999


@pytest.mark.parametrize("layout", [True, False], ids=["with modules.json", "plain"])
def test_qwen3_reads_an_instruction_as_its_model_card_says(tmp_path: Path, layout: bool) -> None:
    task = "Given a web search query, retrieve relevant passages that answer the query"
    prompts = {"prompts": {"query": f"Instruct: {task}\nQuery:", "document": ""}}
    folder = write_checkpoint(tmp_path / "model", "qwen3", prompts=prompts, transformer={"max_seq_length": 128})
    texts = TEXTS[:12]
    expected = oracle(folder, texts), oracle(folder, texts, "Instruct: Find music.\nQuery:")
    if not layout:
        (folder / "modules.json").unlink()
    model = load(folder)
    assert model.info.max_tokens == (128 if layout else 130)
    same(embed(model, texts), expected[0])
    same(embed(model, texts, ""), expected[0])
    # More than once: an instruction that comes again is computed once.
    for _ in range(3):
        same(embed(model, texts, "Find music."), expected[1])
    assert len(model.model._forward.prefixes) == 1  # type: ignore[attr-defined]
    mixed = [model.prepare(EmbeddingInput((text,), "Find music." if i % 2 else None)) for i, text in enumerate(texts)]
    same(model.embed(mixed), np.where(np.arange(len(texts))[:, None] % 2, expected[1], expected[0]))


def test_another_model_of_that_type_has_prompts_of_its_own(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "qwen3", prompts={"prompts": {"query": "query: "}})
    same(embed(load(folder), TEXTS, "query: "), oracle(folder, TEXTS, "query: "))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"is_causal": False}, id="both ways"),
        pytest.param(
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            },
            id="a window",
        ),
    ],
)
def test_a_decoder_that_sees_otherwise_is_run_by_its_own_modules(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = write_checkpoint(tmp_path / "model", "qwen3")
    causal = embed(load(folder), TEXTS)
    write_json(folder / "config.json", {**json.loads((folder / "config.json").read_text()), **changes})
    other = embed(load(folder), TEXTS)
    same(other, oracle(folder, TEXTS))
    assert cosines(causal, other).min() < 0.99


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_an_encoder_that_sees_only_what_is_before(tmp_path: Path, kind: str) -> None:
    """The library's vector of a text alone is another than that of the same text in company: neither is given."""
    folder = write_checkpoint(tmp_path / "model", kind)
    written = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**written, "is_causal": True})
    theirs = library(folder).encode(TEXTS[4:7], normalize_embeddings=True)
    assert cosines(theirs, oracle(folder, TEXTS[4:7])).min() < 0.99
    with pytest.raises(ModelLoadError, match=r"would depend on the other inputs of its batch \(is_causal\)"):
        load(folder)
    write_json(folder / "config.json", {**written, "is_causal": False})
    same(embed(load(folder), TEXTS), oracle(folder, TEXTS))


@pytest.mark.parametrize("causal", [None, 0])
def test_a_decoder_that_does_not_say_what_it_sees(tmp_path: Path, causal: Any) -> None:
    """As a number the library's modules take it in some batches alone; as null they see both ways in those that have padding."""
    folder = write_checkpoint(tmp_path / "model", "qwen3")
    write_json(folder / "config.json", {**json.loads((folder / "config.json").read_text()), "is_causal": causal})
    with pytest.raises(ModelLoadError, match=r"would depend on the other inputs of its batch \(is_causal\)"):
        load(folder)


def yarn(factor: float) -> dict[str, Any]:
    return {"rope_type": "yarn", "rope_theta": 5000.0, "factor": factor, "original_max_position_embeddings": 32}


TWO_THETAS = {"full_attention": {"rope_type": "default", "rope_theta": 90.0}, "sliding_attention": {"rope_theta": 7.0}}
# config.json of a checkpoint as transformers 4 wrote it: what has another name today, and what it was.
OF_OLD = {
    "modernbert": ({"rope_parameters", "layer_types"},
                   {"global_rope_theta": 90.0, "local_rope_theta": 7.0, "global_attn_every_n_layers": 2}),
    "qwen3": ({"rope_parameters", "layer_types"}, {"rope_theta": 5000.0, "rope_scaling": yarn(3.0)}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("bert", {"hidden_act": "silu", "layer_norm_eps": 1e-3, "num_attention_heads": 2}),
        ("bert", {"type_vocab_size": 4}),
        ("distilbert", {"sinusoidal_pos_embds": True, "activation": "relu"}),
        ("modernbert", {"rope_parameters": TWO_THETAS, "global_attn_every_n_layers": 2, "mlp_bias": True}),
        ("modernbert", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"] + ["full_attention"] * 2}),
        ("modernbert", {"local_attention": 8, "norm_bias": False, "attention_bias": False, "hidden_activation": "silu"}),
        ("mpnet", {"hidden_act": "relu", "layer_norm_eps": 1e-3}),
        ("qwen3", {"rope_parameters": yarn(3.0), "attention_bias": True}),
        ("qwen3", {"num_key_value_heads": 1, "head_dim": 32, "rms_norm_eps": 1e-3}),
        ("xlm-roberta", {"type_vocab_size": 1}),
    ],
)
def test_what_config_json_may_say(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    plain = config_of(kind, tokenizer_of(kind)).to_dict()
    if "layer_types" not in changes and kind == "modernbert":
        plain.pop("layer_types")
    config = type(config_of(kind, tokenizer_of(kind)))(**{**plain, **changes})
    folder = write_checkpoint(tmp_path / "model", kind, model=draw_model(config))
    model = load(folder)
    test_every_family_is_packed(model)
    rows = embed(model, TEXTS)
    same(rows, oracle(folder, TEXTS))
    # What is changed does matter.
    written = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**written, **{name: plain.get(name) for name in changes if name in MATTERS}})
    if MATTERS & changes.keys():
        assert cosines(embed(load(folder), TEXTS), rows).min() < 0.9999


MATTERS = {"hidden_act", "activation", "rope_parameters", "layer_types", "hidden_activation"}


@pytest.mark.parametrize("activation", ["prelu", "xielu"])
@pytest.mark.parametrize("kind", ["bert", "modernbert", "mpnet", "xlm-roberta"])
def test_an_activation_with_weights_of_its_own(tmp_path: Path, kind: str, activation: str) -> None:
    plain = config_of(kind, tokenizer_of(kind))
    name = "hidden_activation" if kind == "modernbert" else "hidden_act"
    model = draw_model(type(plain)(**{**plain.to_dict(), name: activation}))
    folder = write_checkpoint(tmp_path / "model", kind, model=model)
    same(embed(load(folder), TEXTS), oracle(folder, TEXTS))


def test_a_name_for_the_activation_that_is_another_familys(tmp_path: Path) -> None:
    """DistilBERT's is `activation`."""
    folder = write_checkpoint(tmp_path / "model", "distilbert")
    write_json(folder / "config.json", {**json.loads((folder / "config.json").read_text()), "hidden_act": "relu"})
    same(embed(load(folder), TEXTS), oracle(folder, TEXTS))


@pytest.mark.parametrize(
    ("kind", "padding"), [("roberta", 0), ("xlm-roberta", 5), pytest.param("xlm-roberta", 3, id="the unknown"), ("mpnet", 8)]
)
def test_a_padding_token_that_is_not_the_tokenizers(tmp_path: Path, kind: str, padding: int) -> None:
    """These models count no place for config.json's padding token, and here texts have it: their own modules know."""
    plain = config_of(kind, tokenizer_of(kind))
    config = type(plain)(**{**plain.to_dict(), "pad_token_id": padding})
    folder = write_checkpoint(tmp_path / "model", kind, model=draw_model(config), transformer={"max_seq_length": 100})
    model = load(folder)
    texts = [*TEXTS, "☃ on a window"]
    ids = {id for text in texts for id in model.prepare(EmbeddingInput((text,), truncate=True)).token_ids.tolist()}
    assert padding in ids
    same(embed(model, texts), oracle(folder, texts))


@pytest.mark.parametrize("kind", OF_OLD)
def test_a_config_as_transformers_4_wrote_it(tmp_path: Path, kind: str) -> None:
    new = {
        "modernbert": {"rope_parameters": TWO_THETAS, "global_attn_every_n_layers": 2},
        "qwen3": {"rope_parameters": yarn(3.0)},
    }
    made = config_of(kind, tokenizer_of(kind))
    plain = {name: value for name, value in made.to_dict().items() if name not in ("layer_types", "rope_parameters")}
    folder = write_checkpoint(tmp_path / "model", kind, model=draw_model(type(made)(**{**plain, **new[kind]})))
    expected = oracle(folder, TEXTS)
    without, old = OF_OLD[kind]
    written = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**{name: value for name, value in written.items() if name not in without}, **old})
    same(embed(load(folder), TEXTS), expected)
    same(oracle(folder, TEXTS), expected)


def test_lower_case(tmp_path: Path) -> None:
    settings = {"max_seq_length": 128, "do_lower_case": True}
    folder = write_checkpoint(tmp_path / "model", "roberta", transformer=settings)
    model = load(folder)
    shouted = [text.upper() for text in TEXTS[:10]]
    same(embed(model, shouted), embed(model, [text.lower() for text in shouted]))
    same(embed(model, shouted), oracle(folder, shouted))


def test_a_text_over_the_limit_is_cut_as_the_library_cuts_it(path: Path, model: EmbeddingModel) -> None:
    long = ["the river runs through the old town and then out to sea " * n for n in (12, 40, 400)]
    same(embed(model, long), oracle(path, long))
