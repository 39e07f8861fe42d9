"""The demo checkpoint: transformers loads it, a seed decides its bytes, and it is written whole or not at all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen3VLForConditionalGeneration
from transformers.utils import logging as transformers_logging

from models.checkpoints import demo
from models.checkpoints.complete import check_complete
from models.checkpoints.demo import (
    ADDED_TOKENS,
    BENCH_40M,
    OTHER,
    SHAPE_2B,
    SHAPES,
    SPECIAL_TOKENS,
    TINY,
    DemoShape,
    write_demo_checkpoint,
)
from tests.support import forkserver
from tests.support.paths import CHECKPOINT

TEXTS = [
    "", "hello world", "a dog runs on the beach", "a cat sits on the mat", "where is the nearest station?", "一只狗在海边跑步",
    "def search(self, query): ...", "The quick brown fox jumps over the lazy dog. " * 5,
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("demo")
    for name, shape in (("tiny", TINY), ("other", OTHER)):
        write_demo_checkpoint(root / name, shape=shape)
    return {name: root / name for name in ("tiny", "other")}


@pytest.fixture(scope="module", params=["tiny", "other"])
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


@pytest.fixture(scope="module")
def tiny(folders: dict[str, Path]) -> Path:
    return folders["tiny"]


def processor_of(folder: Path) -> Any:
    return AutoProcessor.from_pretrained(folder)


def conversation(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    system = {"role": "system", "content": [{"type": "text", "text": "Represent the user's input."}]}
    return [system, {"role": "user", "content": list(parts)}]


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


# Loading


def test_demo_is_a_whole_checkpoint(folder: Path) -> None:
    check_complete(folder, allow_pickle=False)
    assert {entry.name for entry in folder.iterdir()} == demo._FILES


def test_demo_files_have_one_mode(folder: Path) -> None:
    assert len({entry.stat().st_mode for entry in folder.iterdir()}) == 1


def test_processor_is_qwens(folder: Path) -> None:
    processor = processor_of(folder)
    assert type(processor).__name__ == "Qwen3VLProcessor"
    images = processor.image_processor
    assert (images.patch_size, images.merge_size, images.temporal_patch_size) == (16, 2, 2)
    assert list(images.image_mean) == list(images.image_std) == [0.5, 0.5, 0.5]
    assert processor.video_processor.patch_size == 16


@pytest.mark.parametrize("name", ["tiny", "other"])
def test_weights_are_all_in_the_file(name: str, folders: dict[str, Path]) -> None:
    model, report = Qwen3VLForConditionalGeneration.from_pretrained(folders[name], output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    tied = model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert tied == SHAPES[name].tied


def test_weights_are_all_drawn(folder: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert not [name for name, parameter in model.named_parameters() if parameter.float().std() < 0.02]


def test_vectors_are_spread(folder: Path) -> None:
    processor = processor_of(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).model.eval()

    def vector(*parts: dict[str, Any], images: list[Image.Image] | None = None) -> np.ndarray:
        prompt = processor.apply_chat_template(conversation(*parts), tokenize=False, add_generation_prompt=True)
        with torch.inference_mode():
            hidden = model(**processor(text=[prompt], images=images, return_tensors="pt")).last_hidden_state[0, -1]
        return torch.nn.functional.normalize(hidden, dim=0).numpy()

    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")] + [Image.radial_gradient("L").convert("RGB")]
    vectors = [vector(text(value)) for value in TEXTS]
    vectors += [vector({"type": "image"}, images=[picture]) for picture in pictures]
    vectors += [vector({"type": "image"}, text("a red square"), images=pictures[:1])]
    cosines = np.array([left @ right for number, left in enumerate(vectors) for right in vectors[:number]])
    assert cosines.max() < 0.95
    assert np.median(cosines) < 0.8
    assert np.ptp(cosines) > 0.3, "all are equally far from each other"


# The tokenizer and the template


def test_tokenizer_has_a_token_for_each_special_one(folder: Path) -> None:
    tokenizer = processor_of(folder).tokenizer
    size = json.loads((folder / "config.json").read_bytes())["text_config"]["vocab_size"]
    for token in (*SPECIAL_TOKENS, *ADDED_TOKENS):
        (token_id,) = tokenizer.encode(token, add_special_tokens=False)
        assert tokenizer.decode([token_id]) == token and token_id < size
        assert tokenizer.added_tokens_decoder[token_id].special == (token in SPECIAL_TOKENS)
    assert len(tokenizer) < size


def test_config_has_the_ids_of_the_tokenizer(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    ids = processor_of(folder).tokenizer.convert_tokens_to_ids
    for key, token in (("image_token_id", "<|image_pad|>"), ("video_token_id", "<|video_pad|>")):
        assert config[key] == ids(token)
    for key, token in (("vision_start_token_id", "<|vision_start|>"), ("vision_end_token_id", "<|vision_end|>")):
        assert config[key] == ids(token)


@pytest.mark.parametrize(("name", "appended"), [("tiny", ["<|endoftext|>"]), ("other", [])])
def test_tokenizer_appends_what_the_shape_says(name: str, appended: list[str], folders: dict[str, Path]) -> None:
    tokenizer = processor_of(folders[name]).tokenizer
    plain = tokenizer.encode("hello", add_special_tokens=False)
    added = tokenizer.encode("hello")[len(plain) :]
    assert tokenizer.convert_ids_to_tokens(added) == appended


@pytest.mark.parametrize("value", ["it's 12.5 km,\n\n  and\t back", "一只狗🙂", "Größe données поиск", "x" * 300, "\x00\x7f"])
def test_tokenizer_decodes_any_text_to_itself(value: str, folder: Path) -> None:
    tokenizer = processor_of(folder).tokenizer
    assert tokenizer.decode(tokenizer.encode(value, add_special_tokens=False)) == value


def test_tokenizer_normalises_and_splits_as_qwens(tiny: Path) -> None:
    backend = processor_of(tiny).tokenizer.backend_tokenizer
    assert backend.normalizer.normalize_str("e\u0301") == "é"
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("We're 123\n go")]
    assert pieces == ["We", "'re", "Ġ", "1", "2", "3", "Ċ", "Ġgo"]


def test_tokenizer_has_a_token_for_each_common_word(tiny: Path) -> None:
    assert processor_of(tiny).tokenizer.tokenize(" the vector is") == ["Ġthe", "Ġvector", "Ġis"]


RENDERED = {
    "text": (
        conversation(text("hello")),
        "<|im_start|>system\nRepresent the user's input.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
    ),
    "image and text": (
        conversation({"type": "image", "image": "x"}, text("a"), {"type": "image"}, text(" {{ b }}\n")),
        "<|im_start|>system\nRepresent the user's input.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>a<|vision_start|><|image_pad|><|vision_end|> {{ b }}\n<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    "strings": (
        [{"role": "user", "content": "\n <b>hi</b> "}, {"role": "assistant", "content": "ok"}],
        "<|im_start|>user\n\n <b>hi</b> <|im_end|>\n<|im_start|>assistant\nok<|im_end|>\n<|im_start|>assistant\n",
    ),
}


@pytest.mark.parametrize("kind", RENDERED)
def test_template_renders_as_qwens(kind: str, tiny: Path) -> None:
    messages, expected = RENDERED[kind]
    processor = processor_of(tiny)
    assert processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected
    without = processor.apply_chat_template(messages, tokenize=False)
    assert without == expected.removesuffix("<|im_start|>assistant\n")


def test_template_renders_as_the_references(tiny: Path) -> None:
    reference = processor_of(CHECKPOINT)
    messages = conversation(text("a\n"), {"type": "image", "image": "x"}, {"type": "video", "video": "x"}, text("一"))
    ours, theirs = (p.apply_chat_template(messages, add_generation_prompt=True) for p in (processor_of(tiny), reference))
    assert ours == theirs


# Shapes and seeds


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes_can_be_built(shape: DemoShape) -> None:
    assert sum(shape.mrope_section) * 2 == shape.head_dim
    assert max(shape.mrope_section[1:]) * 3 <= shape.head_dim // 2
    assert shape.heads % shape.kv_heads == 0
    assert shape.vision_hidden % shape.vision_heads == 0 and shape.vision_hidden // shape.vision_heads % 4 == 0
    assert max(shape.deepstack) < shape.vision_depth and len(shape.deepstack) <= shape.layers


def parameters(shape: DemoShape) -> tuple[int, int]:
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(demo._config(demo._tokenizer(TINY), shape))
    return sum(p.numel() for p in model.parameters()), sum(p.numel() for p in model.model.language_model.parameters())


def test_shape_of_the_bench_is_mostly_text() -> None:
    total, text_tower = parameters(BENCH_40M)
    assert 35e6 < total < 45e6 and text_tower > 0.7 * total


def test_shape_of_the_2b_has_its_parameters() -> None:
    assert parameters(SHAPE_2B)[0] == 2_127_532_032


def test_shapes_tiny_and_other_are_unlike(folders: dict[str, Path]) -> None:
    one, two = (json.loads((folders[name] / "config.json").read_bytes()) for name in ("tiny", "other"))
    for tower, key in (
        ("text_config", "num_attention_heads"),
        ("text_config", "head_dim"),
        ("text_config", "hidden_size"),
        ("text_config", "vocab_size"),
        ("vision_config", "num_heads"),
        ("vision_config", "deepstack_visual_indexes"),
    ):
        assert one[tower][key] != two[tower][key]
    assert len(two["vision_config"]["deepstack_visual_indexes"]) == 2
    assert one["text_config"]["rope_parameters"]["mrope_section"] != two["text_config"]["rope_parameters"]["mrope_section"]
    assert one["image_token_id"] != two["image_token_id"]


def test_seed_gives_the_same_bytes_in_another_process(tiny: Path, tmp_path: Path) -> None:
    environment = forkserver.clean_environment()
    finished = forkserver.run("models.checkpoints.demo", str(tmp_path / "again"), folder=tmp_path, environment=environment)
    assert finished.returncode == 0, finished.stderr
    assert "random" in finished.stdout and "no meaning" in finished.stdout and not finished.stderr
    for file in tiny.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_seed_changes_the_weights_alone(tiny: Path, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    write_demo_checkpoint(tmp_path / "seed", seed=1)
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers were disturbed"
    differing = {file.name for file in tiny.iterdir() if file.read_bytes() != (tmp_path / "seed" / file.name).read_bytes()}
    assert differing == {"model.safetensors"}


def test_dtype_of_the_shape_is_that_of_the_file(tmp_path: Path) -> None:
    write_demo_checkpoint(tmp_path / "half", shape=replace(TINY, dtype="bfloat16"))
    assert json.loads((tmp_path / "half" / "config.json").read_bytes())["dtype"] == "bfloat16"
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "half")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


# Writing


def test_demo_is_written_without_a_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    try:
        transformers_logging.set_verbosity_info()
        transformers_logging.enable_progress_bar()
        write_demo_checkpoint(tmp_path / "quiet")
        assert capfd.readouterr() == ("", "")
        assert transformers_logging.get_verbosity() == transformers_logging.INFO
        assert transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.set_verbosity(before[0])
        if not before[1]:
            transformers_logging.disable_progress_bar()


def test_demo_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "_save_model", fail)
    assert demo.main([str(tmp_path / "new")]) == 1
    assert not list(tmp_path.iterdir())


def test_demo_refuses_a_folder_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        write_demo_checkpoint(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


def test_command_leaves_a_checkpoint_alone_unless_forced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new"
    path.mkdir()
    assert demo.main([str(path)]) == 0
    assert "random" in capsys.readouterr().out
    first = (path / "model.safetensors").read_bytes()
    assert demo.main([str(path), "--seed", "1"]) == 0
    assert "left as it is" in capsys.readouterr().out
    assert (path / "model.safetensors").read_bytes() == first
    assert demo.main([str(path), "--seed", "1", "--force"]) == 0
    assert (path / "model.safetensors").read_bytes() != first


def test_command_never_removes_what_is_no_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new"
    assert demo.main([str(path)]) == 0
    (path / "README.md").write_text("real weights")
    assert demo.main([str(path), "--force"]) == 1
    assert "left alone" in capsys.readouterr().err
    assert (path / "model.safetensors").exists() and (path / "README.md").exists()


def test_command_refuses_a_broken_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert demo.main([str(tmp_path)]) == 1
    assert "incomplete" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]
