"""The packed forward as CUDA runs it, on a CPU: the varlen kernel by a stand-in for its operator, page-locked memory by ordinary
memory, graphs by a recorder that calls what it recorded. Everything above those three is the code that a GPU runs.
"""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounterWithBackend

from models.base import EmbeddingInput, PreparedInput
from models.demo import OTHER, write_demo_checkpoint
from models.qwen3_vl import compiled, graphs, packed, staging, text
from models.qwen3_vl.adapter import Qwen3VLEmbedding
from models.qwen3_vl.graphs import TokenGraph, TokenGraphs
from models.qwen3_vl.layout import PackedRow
from models.qwen3_vl.packed import PackedForward
from models.qwen3_vl.varlen import VarlenKernel
from models.registry import load_model
from tests import varlen_cpu  # noqa: F401 - the kernel for this test's device
from tests.conformance.report import BARS, CASES, CHECKPOINT, case_input, golden
from tests.oracle import Rows, cosines


class Replayer:
    """A graph that is run anew: from the same memory, into the same memory."""

    def __init__(self) -> None:
        self.replays = 0

    def record(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        output = run()

        def replay() -> None:
            self.replays += 1
            output.copy_(run())

        return replay, output


class Stale:
    """A graph that does not read its memory again."""

    def record(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        return lambda: None, run()


@pytest.fixture(autouse=True)
def stance() -> Iterator[None]:
    """What a compilation sets for the whole process."""
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def few_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "BUCKETS", (32, 64, 128, 256, 512))


def load_as_on_cuda(path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(packed, "choose_kernel", lambda *_: VarlenKernel())
    monkeypatch.setattr(packed, "Staging", lambda device: staging.Staging(device, pinned=True))
    return load_model(path, device="cpu", dtype=dtype, max_image_width=512, max_image_height=512, allow_pickle=False)


def prepare(model: Any, *items: tuple[Any, ...]) -> list[PreparedInput]:
    return [model.prepare(EmbeddingInput(parts)) for parts in items]


def forward_of(model: Qwen3VLEmbedding) -> PackedForward:
    assert isinstance(model._forward, PackedForward)
    return model._forward


def samples(model: Any) -> list[list[PreparedInput]]:
    picture = Image.new("RGB", (64, 96), "red")
    one, two, seen = prepare(model, ("one",), ("two " * 30,), (picture, "and a word"))
    return [[one], [two, one], [seen], [one, seen, seen, two]]


@pytest.mark.parametrize("dtype", BARS)
def test_every_stored_vector_is_met_as_on_cuda(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled, in graphs, with prefixes in a cascade: alone, all together, and in random company."""
    model = load_as_on_cuda(CHECKPOINT, dtype, monkeypatch)
    recorder = Replayer()
    forward_of(model).optimize(samples(model), compiler="eager", recorder=recorder)
    # On a CPU a replay saves nothing: whatever fits is taken.
    monkeypatch.setattr(forward_of(model)._graphs, "_eager_seconds", float("inf"))
    recorder.replays = 0
    items = [model.prepare(case_input(case)) for case in CASES]
    expected = golden()
    alone = np.concatenate([model.embed([item]) for item in items])
    replays_alone = recorder.replays
    rng = np.random.default_rng(0)
    rows = {"alone": alone, "together": model.embed(items)}
    for size in (3, 32):
        order = rng.permutation(len(items))
        rows[f"by {size}"] = np.empty_like(expected)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            rows[f"by {size}"][chosen] = model.embed([items[index] for index in chosen])
    for company, found in rows.items():
        near = cosines(found, expected)
        assert near.min() >= BARS[dtype], (company, CASES[int(near.argmin())]["id"], near.min())
    assert replays_alone == sum(not item.images and 16 <= item.num_tokens <= 512 for item in items) > 20
    assert recorder.replays > replays_alone
    assert len(forward_of(model).prefixes) > 0


def test_the_cascade_serves_several_instructions_in_one_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_demo_checkpoint(tmp_path, seed=3, shape=OTHER)
    plain = load_model(tmp_path, device="cpu", dtype="float32", max_image_width=0, max_image_height=0, allow_pickle=False)
    model = load_as_on_cuda(tmp_path, "float32", monkeypatch)
    instructions = ["Find the passage.", "Represent the product with all of its properties.", None]
    batch = [model.prepare(EmbeddingInput((f"text {n} " * n,), instructions[n % 3])) for n in range(1, 13)]
    batch.append(model.prepare(EmbeddingInput((Image.new("RGB", (70, 50), "blue"), "seen"), instructions[0])))
    batch.append(model.prepare(EmbeddingInput(("once",), "An instruction that comes once.")))
    solo = np.concatenate([plain.embed([replace_prefix(item)]) for item in batch])
    found = model.embed(batch)
    assert len(forward_of(model).prefixes) == 3
    assert cosines(found, solo).min() > 0.99999


def replace_prefix(item: PreparedInput) -> PreparedInput:
    """An input that stands on nothing."""
    return PreparedInput(item.token_ids, item.images, item.positions)


# --- Graphs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    return load_as_on_cuda(CHECKPOINT, "float32", monkeypatch)


def capture(forward: PackedForward, recorder: graphs.Recorder) -> TokenGraphs:
    with torch.inference_mode():
        return TokenGraphs(forward._text, forward._staging, recorder, forward._run, 0.995)


def row_of(*lengths: int) -> PackedRow:
    rng = np.random.default_rng(len(lengths))
    batch = [PreparedInput(rng.integers(0, 400, length)) for length in lengths]
    return PackedRow.lay_out(batch, [None] * len(batch))


@pytest.mark.parametrize(
    "lengths", [[64], [1], [16, 16, 16, 16], [20, 44], [30, 20], [17]], ids=lambda lengths: "+".join(map(str, lengths))
)
def test_a_graph_gives_the_vectors_of_its_row_alone(model: Any, lengths: list[int]) -> None:
    """Full and nearly empty, after a batch that has left its own numbers in the memory."""
    forward = forward_of(model)
    with torch.inference_mode():
        graph = TokenGraph(64, forward._text, forward._staging, Replayer())
        graph(row_of(30, 34))
        row = row_of(*lengths)
        torch.testing.assert_close(graph(row).clone(), forward._run(row))


def test_a_graph_that_gives_other_vectors_is_not_used(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    found = capture(forward_of(model), Stale())
    assert len(found) == 0
    assert found.choose(30, 1, 0) is None
    assert caplog.text.count("it is not used") == 5


class Addresses:
    """As CUDA keeps it: where things were, and not the things."""

    def __init__(self) -> None:
        self.reads: list[weakref.ref[torch.Tensor]] = []

    def record(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        closed_over = inspect.getclosurevars(run).nonlocals
        attention = closed_over["attention"]
        tensors = [value for value in closed_over.values() if isinstance(value, torch.Tensor)]
        tensors += [attention._own.starts, attention._single.starts]
        self.reads = [weakref.ref(tensor) for tensor in tensors]
        return lambda: None, run()


def test_what_a_graph_reads_lives_as_long_as_the_graph(model: Any) -> None:
    forward, recorder = forward_of(model), Addresses()
    with torch.inference_mode():
        graph = TokenGraph(64, forward._text, forward._staging, recorder)
    gc.collect()
    assert len(recorder.reads) == 5
    assert all(read() is not None for read in recorder.reads)
    del graph
    gc.collect()
    assert not any(read() is not None for read in recorder.reads)


class NoMemory:
    """Fails after some graphs."""

    def __init__(self, after: int) -> None:
        self.left = after

    def record(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        self.left -= 1
        if self.left < 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Replayer().record(run)


@pytest.mark.parametrize("after", [0, 2])
def test_a_capture_that_fails_leaves_the_graphs_that_there_are(model: Any, after: int, caplog: pytest.LogCaptureFixture) -> None:
    forward = forward_of(model)
    forward.optimize(samples(model), compiler="eager", recorder=NoMemory(after))
    assert forward._graphs is not None and len(forward._graphs) == after
    assert "no graph can be captured here: OutOfMemoryError: CUDA out of memory" in caplog.text
    near = cosines(model.embed(samples(model)[3]), np.concatenate([model.embed([item]) for item in samples(model)[3]]))
    assert near.min() > 0.99999


@pytest.mark.parametrize(("noise", "same"), [(1e-6, 0.995), (1e-3, 0.995), (0.01, 0.96), (0.2, 0.9)])
def test_how_near_is_the_same_follows_from_rounding(
    model: Any, noise: float, same: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deep model rounds worse: measured by what company does to its vectors, and never so far that a mistake would pass."""
    forward = forward_of(model)
    turned = np.array([[1 - noise, np.sqrt(1 - (1 - noise) ** 2)]], dtype=np.float32)
    straight = np.array([[1.0, 0.0]], dtype=np.float32)
    monkeypatch.setattr(
        PackedForward, "__call__", lambda _, batch: np.repeat(turned if len(batch) > 1 else straight, len(batch), 0)
    )
    assert forward._same(samples(model)) == pytest.approx(same, abs=1e-5)


def test_which_batch_is_worth_a_graph(model: Any) -> None:
    found = capture(forward_of(model), Replayer())
    assert len(found) == 5
    found._seconds = {32: 0.001, 64: 0.002, 128: 0.003, 256: 0.005, 512: 0.010}
    found._eager_seconds = 0.004

    def tokens(count: int, sequences: int = 1, saved: int = 0) -> int | None:
        graph = found.choose(count, sequences, saved)
        return graph.tokens if graph else None

    assert [tokens(n) for n in (16, 32, 33, 64, 65, 128)] == [32, 32, 64, 64, 128, 128]
    assert tokens(15) is None, "the bucket would be over twice the tokens"
    assert tokens(200) == 256
    assert tokens(257) == 512
    assert tokens(513) is None, "larger than the largest"
    assert tokens(60, sequences=4) == 64
    assert tokens(60, sequences=5) is None, "more sequences than the graph has"
    assert tokens(128, saved=100) == 128, "without a graph nothing is done before 4 ms"
    assert tokens(400, saved=280) is None, "without prefixes it is sooner done in 4 ms than in 10"
    assert tokens(400, saved=100) == 512


def test_a_prefix_that_saves_much_is_taken_rather_than_a_graph(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, recorder = forward_of(model), Replayer()
    forward.optimize(samples(model), compiler="eager", recorder=recorder)
    assert forward._graphs is not None
    monkeypatch.setattr(forward._graphs, "_seconds", {32: 0.001, 64: 0.002, 128: 0.003, 256: 0.005, 512: 0.010})
    batch = prepare(model, *[(f"text {n}",) for n in range(12)])
    for floor, replays in ((0.004, 0), (0.011, 1)):
        monkeypatch.setattr(forward._graphs, "_eager_seconds", floor)
        recorder.replays = 0
        near = cosines(model.embed(batch), np.concatenate([model.embed([item]) for item in batch]))
        assert near.min() > 0.99999
        assert recorder.replays == replays + len(batch)


# --- Compiled layers --------------------------------------------------------------------------------------------------------


def embed_all(model: Any) -> list[Rows]:
    return [model.embed(sample) for sample in samples(model)]


def test_layers_are_compiled_once_for_all_layers_and_lengths(model: Any) -> None:
    forward, counter = forward_of(model), CompileCounterWithBackend("eager")
    before = forward._text.steps
    assert compiled.compile_steps(forward._text, forward._tower, lambda: embed_all(model), 0.995, counter)
    assert forward._text.steps is not before
    # Of each of the four functions one for a single row, and one for the first number of rows that turned out to vary.
    assert 4 <= counter.frame_count <= 12
    frames = counter.frame_count
    torch.compiler.set_stance("fail_on_recompile")
    for count in (1, 2, 5, 17):
        model.embed(prepare(model, *[("word " * (7 * n + 1),) for n in range(count)]))
    model.embed(prepare(model, (Image.new("RGB", (300, 200)), "x"), (Image.new("RGB", (64, 64)),)))
    assert counter.frame_count == frames


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no C compiler\nwas found")


def doubled(graph: Any, _: Any) -> Any:
    """A compiler that gets it wrong."""
    return lambda *arguments: [out * torch.linspace(1, 3, out.shape[-1], dtype=out.dtype) for out in graph.forward(*arguments)]


@pytest.mark.parametrize(("compiler", "words"), [(broken, "no C compiler was found"), (doubled, "they give other vectors")])
def test_layers_that_cannot_be_trusted_stay_as_they_were(
    model: Any, compiler: Any, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    forward = forward_of(model)
    before, expected = (forward._text.steps, forward._tower.steps), embed_all(model)
    assert not compiled.compile_steps(forward._text, forward._tower, lambda: embed_all(model), 0.995, compiler)
    assert (forward._text.steps, forward._tower.steps) == before
    assert "the layers are not compiled" in caplog.text
    assert words in caplog.text
    for one, other in zip(embed_all(model), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_warm_up_optimizes_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, bool]] = []
    for device in ("cpu", "cuda"):
        for compile in ("auto", "layers", "off"):
            model: Any = load_model(
                CHECKPOINT,
                device="cpu",
                dtype="float32",
                compile=compile,
                max_image_width=0,
                max_image_height=0,
                allow_pickle=False,
            )
            note = lambda _, *, graphs, at=(device, compile): asked.append((*at, graphs))  # noqa: E731
            monkeypatch.setattr(model._forward, "optimize", note)
            monkeypatch.setattr(model, "_device", torch.device(device))
            model.warm_up()
    assert asked == [("cuda", "auto", True), ("cuda", "layers", False)]


# --- Staging ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pinned", [False, True])
def test_what_is_sent_arrives(pinned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any shape and dtype, and also where the memory had to grow in between."""
    monkeypatch.setattr(staging, "FIRST_BYTES", 64)
    stage = staging.Staging(torch.device("cpu"), pinned=pinned)
    rng = np.random.default_rng(0)
    for _ in range(3):
        stage.begin()
        arrays = [
            rng.integers(0, 9, (3, 5)),
            np.array([1, 2, 3], dtype=np.int32),
            rng.integers(0, 255, (7, 11), dtype=np.uint8),
            np.array([[True, False], [False, True]]),
            np.broadcast_to(np.arange(4), (3, 4)),
            rng.random((100, 3)).astype(np.float32),
            np.empty((0, 4), dtype=np.float32),
        ]
        sent = [stage.send(array) for array in arrays]
        joined = stage.send_joined([arrays[2], arrays[2][:2]])
        for array, tensor in zip(arrays, sent, strict=True):
            assert tensor.shape == array.shape
            np.testing.assert_array_equal(tensor.numpy(), array)
        np.testing.assert_array_equal(joined.numpy(), np.concatenate([arrays[2], arrays[2][:2]]))


@pytest.mark.parametrize("pinned", [False, True])
def test_what_is_fetched_is_the_callers_own(pinned: bool) -> None:
    stage = staging.Staging(torch.device("cpu"), pinned=pinned)
    first = stage.fetch(torch.ones(2, 3))
    stage.begin()
    stage.fetch(torch.zeros(2, 3))
    assert first.tolist() == [[1.0] * 3] * 2


def test_the_text_model_s_steps_are_eager_by_default(model: Any) -> None:
    assert forward_of(model)._text.steps == text.Steps()
