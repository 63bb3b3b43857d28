"""``python -m benchmarks e2e`` on tiny models: everything but the numbers that matter."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks is not installed

from benchmarks import __main__ as command_line
from benchmarks import e2e, e2e_check
from benchmarks.e2e_model import MODELS, PLAIN, Decoder, attend, rotary_table
from benchmarks.e2e_step import Point, fits, measure
from benchmarks.e2e_weights import VARIANTS, dense_linear

TINY = ["--tiny", "--model", "qwen2.5-32b", "--batch", "1,3", "--context", "16", "--prompt", "24"]
POINTS = [("decode", 1, 16), ("decode", 3, 16), ("prefill", 1, 24)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More would cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch):
    """Runs a command line; its exit status."""

    def run(*arguments: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, arguments)])
        return command_line.main()

    return run


def tiny_model(variant: str, device: str = "cpu", max_length: int = 16) -> Decoder:
    sizes = MODELS["llama-3-8b"].tiny()
    return Decoder(sizes, VARIANTS[variant].make, device, max_length)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--pieces", "plain"], id="plain"),
        pytest.param(["--pieces", "compiled"], marks=pytest.mark.gpu, id="compiled"),
        pytest.param([], marks=pytest.mark.gpu, id="default"),
    ],
)
def test_table_json_and_charts(benchmarks, tmp_path: Path, capsys, options: list[str]) -> None:
    assert benchmarks("e2e", *TINY, *options, "--json", tmp_path / "new" / "e2e.json") == 0
    data = json.loads((tmp_path / "new" / "e2e.json").read_text())
    assert data["meta"]["partial"] == "tiny models"
    assert data["meta"].keys() >= {"gpu", "driver", "cuda", "torch", "commit", "date", "method"}
    rows = data["rows"]
    assert [(row["variant"], row["phase"], row["batch"], row["tokens"]) for row in rows] == [
        (variant, *point) for variant in VARIANTS for point in POINTS
    ]
    for row in rows:
        assert row["model"] == "qwen2.5-32b"
        assert row["layers"] == 2
        read = row["tokens"] if row["phase"] == "prefill" else 1
        assert row["tokens_per_s"] * row["ms"] / 1e3 == pytest.approx(row["batch"] * read, rel=0.05)
        assert row["error"] <= e2e.STEP_BOUND
        fp16 = next(
            peer
            for peer in rows
            if peer["phase"] == row["phase"]
            and peer["batch"] == row["batch"]
            and peer["variant"] == "fp16"
        )
        assert row["speedup"] == pytest.approx(fp16["ms"] / row["ms"], rel=0.05, abs=0.002)
        if torch.cuda.is_available():
            assert row["peak_bytes"] > 0
            assert row["memory"] == pytest.approx(row["peak_bytes"] / fp16["peak_bytes"], abs=1e-3)
    printed = capsys.readouterr().out
    assert "partial results: tiny models" in printed
    assert printed.count("qwen2.5-32b") == len(rows)

    pytest.importorskip("matplotlib")
    assert benchmarks("charts", "--results", tmp_path / "new") == 0
    for chart in ("e2e_speedup.svg", "e2e_tokens.svg"):
        assert "<svg" in (tmp_path / "new" / chart).read_text()


def test_charts_of_nothing(benchmarks, tmp_path: Path, capsys) -> None:
    assert benchmarks("charts", "--results", tmp_path) == 2
    assert "neither gemm.json nor e2e.json" in capsys.readouterr().out


def test_without_fp16_there_is_no_speedup(benchmarks, tmp_path: Path) -> None:
    file = tmp_path / "e2e.json"
    options = ["--pieces", "plain", "--variant", "marlin-24", "--layers", "1"]
    assert benchmarks("e2e", *TINY, *options, "--json", file) == 0
    rows = json.loads(file.read_text())["rows"]
    assert {row["variant"] for row in rows} == {"marlin-24"}
    assert all(row["speedup"] is None and row["layers"] == 1 for row in rows)


def test_a_killed_run_leaves_what_it_had(benchmarks, tmp_path: Path, monkeypatch) -> None:
    check = e2e.error_of_tiny_model

    def killed(sizes, variant, device):
        if variant == "marlin":
            raise KeyboardInterrupt
        return check(sizes, variant, device)

    monkeypatch.setattr(e2e, "error_of_tiny_model", killed)
    monkeypatch.setattr(e2e, "partial_because", lambda args: "")
    with pytest.raises(KeyboardInterrupt):
        benchmarks("e2e", *TINY, "--pieces", "plain", "--json", tmp_path / "e2e.json")
    assert [path.name for path in tmp_path.iterdir()] == ["e2e.json"]
    data = json.loads((tmp_path / "e2e.json").read_text())
    assert data["meta"]["partial"] == "unfinished"
    assert {row["variant"] for row in data["rows"]} == {"fp16"}


def test_wrong_results_are_not_timed(benchmarks, monkeypatch, capsys) -> None:
    monkeypatch.setattr(e2e, "error_of_tiny_model", lambda *_: float("nan"))
    monkeypatch.setattr(e2e, "measure_model", None)
    assert benchmarks("e2e", *TINY, "--pieces", "plain") == 1
    assert "WRONG: qwen2.5-32b, marlin-24, a tiny model's logits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "1,0"], "argument --batch: got '0'; it must be a positive integer"),
        (["--batch", ""], "argument --batch: got ''"),
        (["--context", "-5"], "argument --context: got '-5'"),
        (["--layers", "two"], "argument --layers: got 'two'"),
        (["--model", "gpt-2"], "argument --model: invalid choice: 'gpt-2'"),
        (["--pieces", "fast"], "argument --pieces: invalid choice: 'fast'"),
    ],
)
def test_bad_options(benchmarks, capsys, options: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        benchmarks("e2e", *options)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_real_sizes_need_a_gpu(benchmarks, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmarks("e2e") == 2
    assert "needs a CUDA device" in capsys.readouterr().out


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_models_compute_what_their_weights_say(variant: str, device: str) -> None:
    torch.manual_seed(0)
    error = e2e_check.error_of_tiny_model(MODELS["qwen2.5-32b"], variant, device)
    assert error <= e2e_check.BOUND


def test_the_check_finds_wrong_weights(monkeypatch) -> None:
    monkeypatch.setattr(e2e_check, "dense_linear", lambda w, bias: dense_linear(1.03 * w, bias))
    error = e2e_check.error_of_tiny_model(MODELS["llama-3-8b"], "marlin", "cpu")
    assert error > e2e_check.BOUND


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_keep_the_variance(variant: str, device: str) -> None:
    torch.manual_seed(0)
    n, k = 512, 1024
    layer = VARIANTS[variant].make(n, k, True, device)
    for x in (torch.randn(64, k), torch.ones(64, k)):  # not more from a mean that codes may have
        y = layer(x.to(device, torch.float16)).float()
        assert y.mean().abs() < 0.3
        assert 0.5 < y.std() < 2
    assert not torch.equal(
        *(VARIANTS[variant].make(n, k, False, device)(x.half().to(device)) for _ in range(2))
    )


def test_early_pieces_need_a_gpu_that_can(benchmarks, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmarks("e2e", *TINY, "--pieces", "early") == 2
    assert "--pieces early needs a GPU of compute capability 9.0" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("model", ["llama-3-8b", "qwen2.5-32b"])
def test_early_pieces(tokens: int, model: str) -> None:
    """Kernels that let the next one start early, against PyTorch, at sizes that fill no block."""
    if not e2e.starts_early():
        pytest.skip("needs programmatic dependent launch (compute capability 9.0)")
    torch.manual_seed(0)
    pieces = e2e.make_pieces("early")
    sizes = replace(MODELS[model], hidden=640, heads=MODELS[model].heads + 4, mlp=1000)
    batch, length = 3, 9
    rows, features = batch * tokens, (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.float16)

    norm = random(rows, sizes.hidden), random(rows, sizes.hidden), random(sizes.hidden)
    gate_up, qkv = random(rows, 2 * sizes.mlp), random(rows, features)
    rotary = rotary_table(sizes, length, "cuda")
    positions = torch.arange(length - tokens, length, device="cuda")
    longer = random(batch, length + 2, 2 * sizes.kv_heads, sizes.head_dim)  # as a cache is cut
    caches = [longer.clone()[:, :length] for _ in range(2)]
    computed, wanted = (
        (
            *which.add_norm(*norm),
            which.swiglu(gate_up),
            which.rotate_and_store(qkv, rotary, positions, cache),
            cache,
        )
        for which, cache in zip((pieces, PLAIN), caches, strict=True)
    )
    assert e2e_check.largest_error(computed, wanted) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 77, 512, 1000])
@pytest.mark.parametrize("batch", [1, 5, 40])
def test_attention_of_one_token(batch: int, length: int) -> None:
    """In one part and in several, with what the call before has left in the counters."""
    if not e2e.starts_early():
        pytest.skip("needs programmatic dependent launch (compute capability 9.0)")
    from benchmarks.e2e_attention import attend_one

    torch.manual_seed(0)
    for heads, kv_heads, head_dim in ((32, 8, 128), (40, 8, 128), (4, 2, 64), (16, 1, 128)):
        queries, cache = (
            torch.randn(shape, device="cuda", dtype=torch.float16)
            for shape in ((batch, 1, heads, head_dim), (batch, length + 3, 2 * kv_heads, head_dim))
        )
        cache = cache[:, :length]  # as a cache is cut
        wanted = attend(queries, cache)
        first = attend_one(queries, cache)
        assert e2e_check.largest_error([first], [wanted]) < 2e-3
        for _ in range(3):
            assert torch.equal(attend_one(queries, cache), first)


@pytest.mark.parametrize(
    ("queries", "cache", "problem"),
    [
        ((1, 1, 34, 64), (1, 9, 4, 64), "17 heads read one of the cache, more than 16"),
        ((1, 1, 5, 64), (1, 9, 4, 64), r"queries are \(1, 1, 5, 64\).*a multiple of 2"),
        ((1, 2, 4, 64), (1, 9, 4, 64), r"queries are \(1, 2, 4, 64\); they must be"),
        ((1, 1, 4, 64), (1, 0, 4, 64), r"cache is \(1, 0, 4, 64\).*for 1 token or more"),
    ],
    ids=["many-heads", "odd-heads", "two-tokens", "empty"],
)
def test_attention_refuses(queries: Sequence[int], cache: Sequence[int], problem: str) -> None:
    attention = pytest.importorskip("benchmarks.e2e_attention", reason="needs Triton")
    with pytest.raises(ValueError, match=problem):
        attention.attend_one(torch.empty(queries), torch.empty(cache))


def test_attention_refuses_strides() -> None:
    attention = pytest.importorskip("benchmarks.e2e_attention", reason="needs Triton")
    queries, cache = torch.empty(2, 1, 4, 64), torch.empty(2, 9, 4, 64)
    with pytest.raises(ValueError, match=r"cache is .* its heads must lie side by side"):
        attention.attend_one(queries, cache.transpose(1, 2).contiguous().transpose(1, 2))
    with pytest.raises(ValueError, match=r"queries are .* must be contiguous"):
        attention.attend_one(torch.empty(2, 1, 64, 4).transpose(2, 3), cache)


def test_attention_makes_no_counters_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = pytest.importorskip("benchmarks.e2e_attention", reason="needs Triton")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="call it once for these sizes before it is captured"):
        attention.counters(977, torch.device("cpu"))


def test_a_step_that_does_not_fill_its_cache_is_found() -> None:
    model = tiny_model("fp16")
    forgetful = replace(
        PLAIN,
        rotate_and_store=lambda qkv, rotary, positions, cache: PLAIN.rotate_and_store(
            qkv, rotary, positions, cache.clone()
        ),
    )
    point = Point("decode", 2, 16)
    assert measure(model, point, PLAIN).error <= e2e.STEP_BOUND
    assert measure(model, point, forgetful).error > e2e.STEP_BOUND


def test_not_a_number_is_an_error() -> None:
    good, bad = torch.ones(2), torch.tensor([1.0, float("nan")])
    for values in ((good, bad), (bad, good)):
        assert not e2e.within("this", e2e_check.largest_error(values, (good, good)), 1.0)


def test_sizes() -> None:
    """Against the published numbers of parameters."""
    billions = {name: sizes.weight_bytes(16) / 2e9 for name, sizes in MODELS.items()}
    assert billions == pytest.approx(
        {"llama-3-8b": 8.03, "qwen2.5-32b": 32.76, "llama-3-70b": 70.55}, rel=2e-3
    )
    sizes = MODELS["qwen2.5-32b"]
    cache = tiny_model("fp16").new_cache(3, 7)
    assert sizes.cache_bytes(1, 1) == 64 * 2 * 8 * 128 * 2
    assert tiny_model("fp16").sizes.cache_bytes(3, 7) == sum(kv.nbytes for kv in cache)


def test_what_has_no_room_is_left_out(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    memory = SimpleNamespace(total_memory=150_750_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: memory)
    assert fits(MODELS["qwen2.5-32b"], "fp16", Point("decode", 128, 512))
    assert not fits(MODELS["llama-3-70b"], "fp16", Point("decode", 1, 512))
    assert fits(MODELS["llama-3-70b"], "marlin", Point("decode", 128, 512))
