"""Every family of text models against sentence-transformers: the same folders of random weights, one text at a time there, in
every company here."""

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
from models.base import EmbeddingInput, ModelLoadError
from models.packed.forward import DecoderForward
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
from tests.support.text_oracle import SAME, TEXTS, assert_same, embed, library, library_ids, oracle
from tests.support.whole_model import WholeModel, load_model

pytestmark = pytest.mark.recorded


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def path(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("families") / family, family)


@pytest.fixture(scope="module")
def model(path: Path) -> WholeModel:
    return load_model(path)


@pytest.fixture(scope="module")
def expected(path: Path) -> Rows:
    return oracle(path, TEXTS)


def test_oracle_tells_texts_apart(expected: Rows) -> None:
    between = expected @ expected.T
    assert between[np.triu_indices(len(TEXTS), 1)].max() < 0.99


def test_vectors_alone(model: WholeModel, expected: Rows) -> None:
    assert_same(np.concatenate([embed(model, [text]) for text in TEXTS]), expected)


def test_vectors_in_company(model: WholeModel, expected: Rows) -> None:
    assert_same(embed(model, TEXTS), expected)


def test_vectors_in_any_order(model: WholeModel, expected: Rows) -> None:
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(TEXTS))
        assert_same(embed(model, [TEXTS[i] for i in order]), expected[order])


ODD = [
    *("", " ", "\n \t\r\n", "\x00\x1f", "\ufeff\u200b\u200d", "\u0300" * 9, "e\u0301é" * 3, "\u202etxet", "x\u2028y\x85z"),
    *("İẞſﬁⅣ½ＡＢ", "👨\u200d👩\u200d👧 海边", "עברית हिन्दी ก็"),
    *("a" * 300, "1234567890" * 9, "--##Ġ▁|\\\"'", "[SE P] </ s> <|im_ end|>"),
]


def test_vectors_of_odd_texts(path: Path, model: WholeModel) -> None:
    """Those about as long as the limit among them; each alone, and all in any order."""
    words = ("the river runs through old town " * 40).split()
    lengths = [len(model.prepare(EmbeddingInput((" ".join(words[:n]),), truncate=True)).token_ids) for n in range(160)]
    edges = [" ".join(words[:n]) for n in range(160) if lengths[n] >= 125][:6]
    texts = [*ODD, *edges, *(f"{text} and more" for text in ODD)]
    expected = oracle(path, texts)
    assert_same(np.concatenate([embed(model, [text]) for text in texts]), expected)
    order = np.random.default_rng(5).permutation(len(texts))
    assert_same(embed(model, [texts[i] for i in order]), expected[order])


def test_vectors_in_more_than_one_row(model: WholeModel, expected: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "ROW_TOKENS", 60)
    assert_same(embed(model, TEXTS), expected)


def test_vectors_of_repeated_texts(model: WholeModel, expected: Rows) -> None:
    assert_same(embed(model, TEXTS * 4), np.tile(expected, (4, 1)))


@pytest.mark.reference
def test_reference_gives_the_same_vectors(path: Path, expected: Rows) -> None:
    reference = load_model(path, backend="reference")
    assert isinstance(reference.model.forward, EncoderForward)  # type: ignore[attr-defined]
    assert isinstance(reference.model.forward._states, PaddedStates)  # type: ignore[attr-defined]
    assert_same(embed(reference, TEXTS * 3), np.tile(expected, (3, 1)))


def test_family_is_packed(model: WholeModel) -> None:
    states = getattr(model.model.forward, "_states", None)  # type: ignore[attr-defined]
    assert not isinstance(states, PaddedStates)


def prompt_of(family: str) -> tuple[str, str]:
    """An instruction, and what the library's prompt is for it."""
    return ("the river", "Instruct: the river\nQuery:") if family == "qwen3" else ("the river ", "the river ")


@pytest.fixture(scope="module")
def prompted(path: Path, family: str) -> Rows:
    return oracle(path, TEXTS[:12], prompt_of(family)[1])


@pytest.mark.usefixtures("few_graphs")
@pytest.mark.parametrize(("dtype", "bar"), [("float32", SAME), pytest.param("bfloat16", 0.99, marks=pytest.mark.bfloat16)])
def test_vectors_as_on_cuda(
    path: Path, family: str, expected: Rows, prompted: Rows, dtype: str, bar: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, in company and under an instruction, which a decoder computes once; its layers compiled, small batches as graphs."""
    instruction, _ = prompt_of(family)
    model = load_as_on_cuda(path, dtype, monkeypatch)
    recorder = Replayer()
    if isinstance(model.model.forward, DecoderForward):
        model.model.forward.optimize(samples(model), compiler="eager", recorder=recorder)
        monkeypatch.setattr(model.model.forward._graphs, "_eager_seconds", math.inf)
        recorder.replays = 0
    assert_same(np.concatenate([embed(model, [text]) for text in TEXTS]), expected, bar)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    assert_same(embed(model, [TEXTS[i] for i in order]), expected[order], bar)
    assert_same(embed(model, TEXTS[:12], instruction), prompted, bar)
    if family == "qwen3":
        assert recorder.replays >= 8
        # Where no graph is taken the instruction's keys are.
        model.model.forward._graphs = None
        assert_same(embed(model, TEXTS[:12], instruction), prompted, bar)
        assert len(model.model.forward.prefixes) == 1


def test_warm_up_of_a_decoder_optimizes_on_cuda_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "MIN_SECONDS", 0.001)
    folder = write_checkpoint(tmp_path / "model", "qwen3")
    asked: list[tuple[str, str, bool]] = []
    for device in ("cpu", "cuda"):
        for compile in ("auto", "layers", "off"):
            model: Any = load_model(folder, compile=compile)
            note = lambda _, *, graphs, at=(device, compile): asked.append((*at, graphs))  # noqa: E731
            monkeypatch.setattr(model.model.forward, "optimize", note)
            monkeypatch.setattr(model.model, "_device", torch.device(device))
            model.warm_up()
    assert asked == [("cuda", "auto", True), ("cuda", "layers", False)]


@pytest.mark.bfloat16
def test_dtype_of_half_precision_is_near(path: Path, expected: Rows) -> None:
    half = load_model(path, dtype="bfloat16")
    assert half.info.dtype == "bfloat16"
    rows = embed(half, TEXTS)
    assert rows.dtype == np.float32
    assert np.abs(np.linalg.norm(rows, axis=1) - 1).max() < 1e-5
    assert_same(rows, expected, 0.99)


@pytest.mark.parametrize(
    ("shape", "dtype", "by_input"),
    [
        ((1536, 384), torch.float32, True),
        ((384, 1536), torch.float32, True),
        ((4096, 1024), torch.float32, False),
        ((1536, 384), torch.bfloat16, False),
    ],
)
def test_matrix_that_is_narrow_lies_in_memory_by_its_inputs(shape: tuple[int, int], dtype: torch.dtype, by_input: bool) -> None:
    """And is the same matrix."""
    module = torch.nn.Linear(shape[1], shape[0], dtype=dtype)
    taken = Linear.from_modules(module)
    assert taken.weight.t().is_contiguous() is by_input and taken.weight.is_contiguous() is not by_input
    assert torch.equal(taken.weight, module.weight)
    rows = torch.randn(5, shape[1], dtype=dtype)
    assert torch.allclose(taken(rows), module(rows), atol=1e-5)


def test_info_is_known(model: WholeModel, family: str) -> None:
    info = model.info
    assert (info.model_type, info.width, info.max_tokens, info.dtype) == (family, WIDTH, 128, "float32")
    assert not info.supports_images
    assert info.largest_image == 0
    assert model.memory_bytes() == 0


def test_ids_are_the_stock_tokenizers(model: WholeModel, path: Path) -> None:
    for text in [*TEXTS, " a  b\n", "ÀÉ 海边", "\t"]:
        ids = model.prepare(EmbeddingInput((text,), truncate=True)).token_ids.tolist()
        assert ids == library_ids(path, text, truncation=True)


def test_warm_up_measures_a_rate(model: WholeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "MIN_SECONDS", 0.001)
    assert 1 < model.warm_up() < math.inf


# --- pooling, and what comes after it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family_of_two", ["mpnet", "qwen3"])
@pytest.mark.parametrize(
    "mode", ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", ["cls", "mean", "max"]], ids=str
)
@pytest.mark.parametrize("backend", ["packed", pytest.param("reference", marks=pytest.mark.reference)])
def test_pooling(tmp_path: Path, family_of_two: str, mode: str | list[str], backend: str) -> None:
    pooling = {"pooling_mode": mode, "embedding_dimension": WIDTH}
    folder = write_checkpoint(tmp_path / "model", family_of_two, pooling=pooling)
    model = load_model(folder, backend=backend)
    assert model.info.width == WIDTH * (len(mode) if isinstance(mode, list) else 1)
    assert_same(embed(model, TEXTS), oracle(folder, TEXTS))


def test_pooling_by_flags(tmp_path: Path) -> None:
    flags = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": True}
    folder = write_checkpoint(tmp_path / "model", pooling=flags)
    assert_same(embed(load_model(folder), TEXTS), oracle(folder, TEXTS))


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
def test_post_pooling_modules(tmp_path: Path, heads: list[Any]) -> None:
    folder = write_checkpoint(tmp_path / "model", heads=heads)
    model = load_model(folder)
    rows = embed(model, TEXTS)
    assert np.abs(np.linalg.norm(rows, axis=1) - 1).max() < 1e-5
    assert_same(rows, oracle(folder, TEXTS))


@pytest.mark.parametrize("name", ["LeakyReLU", "SELU", "Hardswish"])
def test_post_pooling_looks_an_activation_up_by_its_name(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path / "model", heads=[dense(WIDTH, 20, activation=f"activation.{name}")])
    assert_same(embed(load_model(folder), TEXTS[1:5]), oracle(folder, TEXTS[1:5]))


def test_post_pooling_loads_a_pickled_layer_if_allowed(tmp_path: Path) -> None:
    kind, config, weights = dense(WIDTH, 20)
    folder = write_checkpoint(tmp_path / "model", heads=[(kind, config, {})])
    torch.save(weights, folder / "2_Dense" / "pytorch_model.bin")
    assert_same(embed(load_model(folder, allow_pickle=True), TEXTS), oracle(folder, TEXTS))


# --- prompts -----------------------------------------------------------------------------------------------------------------

PROMPTS = {"prompts": {"query": "about the river: ", "document": ""}, "default_prompt_name": "query"}


@pytest.mark.parametrize("family_of_two", ["bert", "xlm-roberta"])
@pytest.mark.parametrize("include", [True, False], ids=["pooled", "not pooled"])
def test_prompts_are_the_librarys(tmp_path: Path, family_of_two: str, include: bool) -> None:
    modes = ["mean", "cls", "weightedmean", "max"]
    pooling = {"pooling_mode": modes, "include_prompt": include, "embedding_dimension": WIDTH}
    folder = write_checkpoint(tmp_path / "model", family_of_two, pooling=pooling, prompts=PROMPTS)
    model = load_model(folder)
    texts = [*TEXTS, "海边的小狗"]
    assert_same(embed(model, texts), oracle(folder, texts))
    assert_same(embed(model, texts, "music and rain? "), oracle(folder, texts, "music and rain? "))
    # An empty prompt takes the place of the default one, too.
    assert_same(embed(model, texts, ""), oracle(folder, texts, ""))
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
def test_prompt_that_is_not_pooled_under_other_templates(tmp_path: Path, template: str, prompt: str) -> None:
    """The library leaves one token out of its count where the last is special: whether it is the template's, and its only one, or
    the prompt's unknown word."""
    pooling = {"pooling_mode": ["cls", "mean"], "include_prompt": False, "embedding_dimension": WIDTH}
    folder = write_checkpoint(tmp_path / "model", pooling=pooling)
    write_template(folder, *WITHOUT_END[template])
    # Of no text it pools nothing, or what it reads of the prompt.
    texts = [*TEXTS[1:], "☃ town"]
    assert_same(embed(load_model(folder), texts, prompt), oracle(folder, texts, prompt))
    assert_same(embed(load_model(folder), texts), oracle(folder, texts))


def test_template_that_reads_a_text_twice_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    write_template(folder, "[CLS] $A [SEP] $A", ["[CLS]", "[SEP]"])
    with pytest.raises(ModelLoadError, match="its tokenizer does more to a text than put tokens before and after it"):
        load_model(folder)


def write_template(folder: Path, single: str, names: list[str]) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = [(name, tokenizer.token_to_id(name)) for name in names]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    tokenizer.save(str(folder / "tokenizer.json"))


def test_content_hash_of_a_text_under_two_prompts_that_are_not_pooled(tmp_path: Path) -> None:
    """The same tokens, and not the same vector."""
    pooling = {"pooling_mode": "cls", "include_prompt": False, "embedding_dimension": WIDTH}
    model = load_model(write_checkpoint(tmp_path / "model", pooling=pooling))
    one = model.prepare(EmbeddingInput((" old town",), "the river"))
    other = model.prepare(EmbeddingInput((" river old town",), "the"))
    assert one.token_ids.tolist() == other.token_ids.tolist()
    assert one.content_hash != other.content_hash
    assert cosines(model.embed([one]), model.embed([other]))[0] < 0.999


@pytest.mark.parametrize("layout", [True, False], ids=["with modules.json", "plain"])
def test_instruction_of_qwen3_is_as_its_model_card_says(tmp_path: Path, layout: bool) -> None:
    task = "Given a web search query, retrieve relevant passages that answer the query"
    prompts = {"prompts": {"query": f"Instruct: {task}\nQuery:", "document": ""}}
    folder = write_checkpoint(tmp_path / "model", "qwen3", prompts=prompts, transformer={"max_seq_length": 128})
    texts = TEXTS[:12]
    expected = oracle(folder, texts), oracle(folder, texts, "Instruct: Find music.\nQuery:")
    if not layout:
        (folder / "modules.json").unlink()
    model = load_model(folder)
    assert model.info.max_tokens == (128 if layout else 130)
    assert_same(embed(model, texts), expected[0])
    assert_same(embed(model, texts, ""), expected[0])
    # More than once: an instruction that comes again is computed once.
    for _ in range(3):
        assert_same(embed(model, texts, "Find music."), expected[1])
    assert len(model.model.forward.prefixes) == 1  # type: ignore[attr-defined]
    mixed = [model.prepare(EmbeddingInput((text,), "Find music." if i % 2 else None)) for i, text in enumerate(texts)]
    assert_same(model.embed(mixed), np.where(np.arange(len(texts))[:, None] % 2, expected[1], expected[0]))


def test_instruction_of_another_qwen3_is_its_own_prompt(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "qwen3", prompts={"prompts": {"query": "query: "}})
    assert_same(embed(load_model(folder), TEXTS, "query: "), oracle(folder, TEXTS, "query: "))


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
def test_decoder_that_is_not_causal_is_run_by_its_own_modules(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = write_checkpoint(tmp_path / "model", "qwen3")
    causal = embed(load_model(folder), TEXTS)
    write_json(folder / "config.json", {**json.loads((folder / "config.json").read_text()), **changes})
    other = embed(load_model(folder), TEXTS)
    assert_same(other, oracle(folder, TEXTS))
    assert cosines(causal, other).min() < 0.99


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_encoder_that_is_causal_is_refused(tmp_path: Path, kind: str) -> None:
    folder = write_checkpoint(tmp_path / "model", kind)
    written = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**written, "is_causal": True})
    with pytest.raises(ModelLoadError, match=r"would depend on the other inputs of its batch \(is_causal\)"):
        load_model(folder)
    write_json(folder / "config.json", {**written, "is_causal": False})
    assert_same(embed(load_model(folder), TEXTS), oracle(folder, TEXTS))


@pytest.mark.live
@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_encoder_that_is_causal_has_no_vector_of_a_text_alone(tmp_path: Path, kind: str) -> None:
    """The library's vector of a text alone is another than that of the same text in company: neither is given."""
    folder = write_checkpoint(tmp_path / "model", kind)
    write_json(folder / "config.json", {**json.loads((folder / "config.json").read_text()), "is_causal": True})
    model = library(folder)
    alone = [model.encode([text], normalize_embeddings=True)[0] for text in TEXTS[4:7]]
    assert cosines(model.encode(TEXTS[4:7], normalize_embeddings=True), np.stack(alone)).min() < 0.99


@pytest.mark.parametrize("causal", [None, 0])
def test_decoder_of_unclear_attention_is_refused(tmp_path: Path, causal: Any) -> None:
    """As a number the library's modules take it in some batches alone; as null they see both ways in those that have padding."""
    folder = write_checkpoint(tmp_path / "model", "qwen3")
    write_json(folder / "config.json", {**json.loads((folder / "config.json").read_text()), "is_causal": causal})
    with pytest.raises(ModelLoadError, match=r"would depend on the other inputs of its batch \(is_causal\)"):
        load_model(folder)


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
def test_config_is_followed(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    plain = config_of(kind, tokenizer_of(kind)).to_dict()
    if "layer_types" not in changes and kind == "modernbert":
        plain.pop("layer_types")
    config = type(config_of(kind, tokenizer_of(kind)))(**{**plain, **changes})
    folder = write_checkpoint(tmp_path / "model", kind, model=draw_model(config))
    model = load_model(folder)
    test_family_is_packed(model)
    rows = embed(model, TEXTS)
    assert_same(rows, oracle(folder, TEXTS))
    # What is changed does matter.
    written = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**written, **{name: plain.get(name) for name in changes if name in MATTERS}})
    if MATTERS & changes.keys():
        assert cosines(embed(load_model(folder), TEXTS), rows).min() < 0.9999


MATTERS = {"hidden_act", "activation", "rope_parameters", "layer_types", "hidden_activation"}


@pytest.mark.parametrize("activation", ["prelu", "xielu"])
@pytest.mark.parametrize("kind", ["bert", "modernbert", "mpnet", "xlm-roberta"])
def test_activation_with_weights_of_its_own(tmp_path: Path, kind: str, activation: str) -> None:
    plain = config_of(kind, tokenizer_of(kind))
    name = "hidden_activation" if kind == "modernbert" else "hidden_act"
    model = draw_model(type(plain)(**{**plain.to_dict(), name: activation}))
    folder = write_checkpoint(tmp_path / "model", kind, model=model)
    assert_same(embed(load_model(folder), TEXTS), oracle(folder, TEXTS))


def test_activation_under_the_name_of_another_family_is_ignored(tmp_path: Path) -> None:
    """DistilBERT's is `activation`."""
    folder = write_checkpoint(tmp_path / "model", "distilbert")
    write_json(folder / "config.json", {**json.loads((folder / "config.json").read_text()), "hidden_act": "relu"})
    assert_same(embed(load_model(folder), TEXTS), oracle(folder, TEXTS))


@pytest.mark.parametrize(
    ("kind", "padding"), [("roberta", 0), ("xlm-roberta", 5), pytest.param("xlm-roberta", 3, id="the unknown"), ("mpnet", 8)]
)
def test_padding_token_that_texts_have(tmp_path: Path, kind: str, padding: int) -> None:
    """These models count no position for config.json's padding token, and here texts have it."""
    plain = config_of(kind, tokenizer_of(kind))
    config = type(plain)(**{**plain.to_dict(), "pad_token_id": padding})
    folder = write_checkpoint(tmp_path / "model", kind, model=draw_model(config), transformer={"max_seq_length": 100})
    model = load_model(folder)
    texts = [*TEXTS, "☃ on a window"]
    ids = {id for text in texts for id in model.prepare(EmbeddingInput((text,), truncate=True)).token_ids.tolist()}
    assert padding in ids
    test_family_is_packed(model)
    expected = oracle(folder, texts)
    assert_same(embed(model, texts), expected)
    assert_same(np.concatenate([embed(model, [text]) for text in texts]), expected)


@pytest.mark.parametrize("kind", OF_OLD)
def test_config_as_transformers_4_wrote_it(tmp_path: Path, kind: str) -> None:
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
    assert_same(embed(load_model(folder), TEXTS), expected)
    assert_same(oracle(folder, TEXTS), expected)


def test_lower_case_is_the_librarys(tmp_path: Path) -> None:
    settings = {"max_seq_length": 128, "do_lower_case": True}
    folder = write_checkpoint(tmp_path / "model", "roberta", transformer=settings)
    model = load_model(folder)
    shouted = [text.upper() for text in TEXTS[:10]]
    assert_same(embed(model, shouted), embed(model, [text.lower() for text in shouted]))
    assert_same(embed(model, shouted), oracle(folder, shouted))


def test_truncation_is_the_librarys(path: Path, model: WholeModel) -> None:
    long = ["the river runs through the old town and then out to sea " * n for n in (12, 40, 400)]
    assert_same(embed(model, long), oracle(path, long))
