import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from spectrim.errors import DataError, ModelError, NumericalError
from spectrim.evaluation import speed
from spectrim.evaluation.perplexity import generate, perplexity, quantize_model_
from spectrim.evaluation.speed import peak_bytes, throughput, to_fastest, weight_bytes
from spectrim.models.modules import compressible_linears
from tests import tiny

FAMILIES = tuple(tiny.FAMILIES)


def draw_windows(n_windows: int = 5, seq_len: int = 12, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, tiny.VOCABULARY, (n_windows, seq_len), generator=generator)


def naive_perplexity(model: PreTrainedModel, windows: Tensor) -> float:
    """One window, one token at a time, float64 after the logits."""
    losses = []
    for window in windows:
        logits = model(input_ids=window[None]).logits[0].double()
        for position in range(len(window) - 1):
            probabilities = logits[position].exp() / logits[position].exp().sum()
            losses.append(-probabilities[window[position + 1]].log().item())
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_equals_the_naive_sum_over_every_next_token(family: str) -> None:
    model, windows = tiny.model(family), draw_windows()
    result = perplexity(model, windows)
    assert result["perplexity"] == pytest.approx(naive_perplexity(model, windows), rel=1e-5)
    assert result["n_tokens"] == 5 * 11


def test_equal_logits_have_the_vocabulary_size_as_perplexity() -> None:
    model = tiny.model("qwen2")
    nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, draw_windows())["perplexity"] == pytest.approx(tiny.VOCABULARY, rel=1e-6)


@settings(max_examples=8, deadline=None)
@given(batch_size=st.integers(1, 9), order=st.permutations(range(5)))
def test_perplexity_depends_neither_on_batches_nor_on_the_order_of_windows(batch_size: int, order: list[int]) -> None:
    model, windows = tiny.model("llama"), draw_windows()
    expected = perplexity(model, windows)["perplexity"]
    assert perplexity(model, windows[order], batch_size=batch_size)["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_perplexity_of_two_parts_is_their_geometric_mean() -> None:
    model, windows = tiny.model("llama"), draw_windows(n_windows=6)
    first, second = (perplexity(model, part)["perplexity"] for part in (windows[:2], windows[2:]))
    joined = perplexity(model, windows)["perplexity"]
    assert joined == pytest.approx(first ** (2 / 6) * second ** (4 / 6), rel=1e-5)


def test_losses_are_float32_even_when_the_model_computes_in_16_bit() -> None:
    """Negative control: the same cross-entropy taken in bfloat16 is off by more than a hundred times as much."""
    model, windows = tiny.model("llama").bfloat16(), draw_windows()
    logits = model(input_ids=windows).logits[:, :-1].detach()
    targets = windows[:, 1:].flatten()
    exact = nn.functional.cross_entropy(logits.double().flatten(0, 1), targets)
    rough = nn.functional.cross_entropy(logits.flatten(0, 1), targets).double()
    ours = math.log(perplexity(model, windows, batch_size=5)["perplexity"])
    assert ours == pytest.approx(float(exact), abs=1e-5)
    assert abs(rough - exact) > 1e-3


def test_progress_sees_every_batch() -> None:
    seen: list[int] = []
    perplexity(tiny.model("llama"), draw_windows(), batch_size=2, progress=lambda starts: seen.extend(starts) or starts)
    assert seen == [0, 2, 4]


@pytest.mark.parametrize("shape", [(0, 8), (3, 1), (8,)])
def test_windows_without_a_next_token_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"at least one window of at least two tokens"):
        perplexity(tiny.model("llama"), torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("token", [-1, tiny.VOCABULARY])
def test_a_token_of_another_tokenizer_is_named(token: int) -> None:
    windows = draw_windows()
    windows[1, 3] = token
    with pytest.raises(DataError, match=f"token {token} in the windows; the model knows tokens 0 to 319"):
        perplexity(tiny.model("llama"), windows)


@pytest.mark.parametrize(
    ("family", "broken"),
    [("llama", "model.layers.1.mlp.down_proj"), ("opt", "model.decoder.layers.1.fc1"), ("qwen2", "lm_head")],
)
def test_a_non_finite_loss_names_the_first_module(family: str, broken: str) -> None:
    model = tiny.model(family)
    model.get_submodule(broken).weight.data[0, 0] = math.nan
    with pytest.raises(NumericalError, match=rf"^{broken}: its output is the first .* 11 of 11 losses in window 0"):
        perplexity(model, draw_windows())


def test_a_non_finite_loss_names_the_window_and_is_not_skipped() -> None:
    model, windows = tiny.model("qwen2"), draw_windows() % 100
    windows[3, 5] = 200
    model.get_input_embeddings().weight.data[200] = math.inf
    assert perplexity(model, windows[:3])["n_tokens"] == 33
    with pytest.raises(NumericalError, match=r"^model\.embed_tokens: .* losses in window 3 "):
        perplexity(model, windows, batch_size=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_continues_the_prompt_greedily(family: str) -> None:
    model, tokenizer = tiny.model(family), tiny.tokenizer()
    written = generate(model, tokenizer, "the river crosses", 5)
    tokens = tokenizer("the river crosses")["input_ids"]
    assert written.startswith("the river crosses")
    for _ in range(5):
        tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == tokenizer.eos_token_id:
            break
    assert written == tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize(("n_bits", "group_size"), [(8, None), (4, 16)])
def test_quantization_moves_every_weight_by_at_most_half_a_step(n_bits: int, group_size: int | None) -> None:
    model, original = tiny.model("opt"), tiny.model("opt")
    size = quantize_model_(model, n_bits, group_size=group_size)
    before, after = compressible_linears(original), compressible_linears(model)
    top, bytes_ = 2 ** (n_bits - 1) - 1, 0
    for name, linear in after.items():
        grouped = before[name].weight.unflatten(1, (-1, group_size or linear.in_features))
        half_step = grouped.abs().amax(-1, keepdim=True) / top / 2
        moved = (linear.weight - before[name].weight).unflatten(1, grouped.shape[1:]).abs()
        assert (moved <= half_step * 1.02 + top * half_step * 2**-10).all()  # and the rounding of the 16-bit scale
        assert torch.equal(linear.bias, before[name].bias)
        bytes_ += linear.weight.numel() * n_bits // 8 + 2 * half_step.numel()
    assert size == {"bytes": bytes_, "dense_bytes": size["dense_bytes"], "ratio": bytes_ / size["dense_bytes"]}
    assert size["dense_bytes"] == 2 * sum(linear.weight.numel() for linear in after.values())
    others = [name for name in original.state_dict() if name.removesuffix(".weight") not in before]
    assert all(torch.equal(model.state_dict()[name], original.state_dict()[name]) for name in others)


def test_ratios_of_the_usual_baselines() -> None:
    """DESIGN's model in small: int8 is just over a half; int4 by groups of 64 is 1/4 + 2/128 of the bytes."""
    assert quantize_model_(tiny.model("llama"), 4, group_size=32)["ratio"] == 0.25 + 2 / 32 / 2
    assert 0.5 < quantize_model_(tiny.model("llama"), 8)["ratio"] < 0.52


def test_fewer_bits_hurt_more() -> None:
    windows = draw_windows(n_windows=8)
    exact = perplexity(tiny.model("llama"), windows)["perplexity"]
    change = []
    for n_bits, group_size in ((8, None), (4, 16), (2, None)):
        model = tiny.model("llama")
        quantize_model_(model, n_bits, group_size=group_size)
        change.append(abs(math.log(perplexity(model, windows)["perplexity"] / exact)))
    assert change[0] < change[1] < change[2]


def test_excluded_linears_are_neither_changed_nor_counted() -> None:
    model, original = tiny.model("llama"), tiny.model("llama")
    size = quantize_model_(model, 4, group_size=16, exclude=["*.mlp.*"])
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, original.model.layers[0].mlp.up_proj.weight)
    assert size["dense_bytes"] == 2 * 3 * (2 * 64 * 64 + 2 * 32 * 64)
    with pytest.raises(ModelError, match=r"matches all 21 nn\.Linear"):
        quantize_model_(model, 8, exclude=["*"])


def test_a_non_finite_weight_cannot_be_quantized() -> None:
    model = tiny.model("llama")
    model.model.layers[2].mlp.gate_proj.weight.data[1, 1] = math.nan
    with pytest.raises(NumericalError, match=r"^model\.layers\.2\.mlp\.gate_proj: "):
        quantize_model_(model, 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_take_turns_with_a_cache_after_a_warm_up(family: str) -> None:
    models = {"dense": tiny.model(family), "compressed": tiny.model(family, seed=1)}
    calls: list[tuple[str, int, int]] = []
    for name, model in models.items():

        def note(_module: nn.Module, _args: object, options: dict, name: str = name) -> None:
            cache = options.get("past_key_values")
            calls.append((name, options["input_ids"].shape[1], cache.get_seq_length() if cache is not None else 0))

        model.register_forward_pre_hook(note, with_kwargs=True)
    measured = throughput(models, prefill_tokens=16, decode_tokens=2, repeats=2)
    one_pass = [(16, 0), (1, 16), (1, 17)]
    assert calls == 3 * [(name, *call) for name in models for call in one_pass]
    assert all(measured[phase][name] > 0 for phase in ("prefill", "decode") for name in models)
    assert set(measured) == {"prefill", "decode"}


def test_throughput_is_tokens_over_the_median_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-up 100 s, then 2, 4 and 30 s of prefill, and 1 s per token of decode: 8/4 and 1 token a second."""
    for batch_size in (1, 3):  # prompts of a batch all count
        clock = iter([0, 100, 102, 200, 202, 204, 300, 304, 306, 400, 430, 432])
        monkeypatch.setattr("spectrim.evaluation.speed.perf_counter", lambda clock=clock: float(next(clock)))
        lengths = {"prefill_tokens": 8, "decode_tokens": 2, "repeats": 3, "batch_size": batch_size}
        measured = throughput({"m": tiny.model("llama")}, **lengths)
        assert measured == {"prefill": {"m": 2.0 * batch_size}, "decode": {"m": 1.0 * batch_size}}


def test_tied_weights_count_once() -> None:
    tied, untied = tiny.model("llama"), tiny.model("qwen2")
    assert weight_bytes(tied) == sum(
        t.nbytes for t in (*tied.parameters(), *tied.buffers())
    )  # these yield a tensor once
    embedding = untied.get_input_embeddings().weight
    assert untied.lm_head.weight.data_ptr() != embedding.data_ptr()
    before = weight_bytes(untied)
    untied.lm_head.weight = embedding
    assert before == weight_bytes(untied) + embedding.nbytes


@pytest.mark.parametrize("family", FAMILIES)
def test_peak_memory_is_what_the_allocator_saw(family: str) -> None:
    """Against torch's profiler, which counts every allocation; more than 1 % of difference would be a missed tensor."""
    model, seen = tiny.model(family), 0
    lengths = {"prefill_tokens": 48, "decode_tokens": 3}
    peak_bytes(model, **lengths)  # whatever is allocated once and kept
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        throughput({"m": model}, **lengths, repeats=1)
    now = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            seen = max(seen, now)
    extra = peak_bytes(model, **lengths) - weight_bytes(model)
    assert extra == pytest.approx(seen, rel=0.01)
    assert extra == peak_bytes(model, **lengths) - weight_bytes(model)  # the same every time


def test_peak_memory_grows_with_the_prompt() -> None:
    model = tiny.model("llama")
    short, long = (peak_bytes(model, prefill_tokens=tokens, decode_tokens=1) for tokens in (8, 64))
    assert weight_bytes(model) < short < long


def test_a_speed_test_longer_than_the_context_is_refused() -> None:
    model = tiny.model("opt")
    with pytest.raises(DataError, match=r"of 129 tokens; the model's context is 128 tokens: lower speed\."):
        throughput({"dense": model}, prefill_tokens=127, decode_tokens=2, repeats=1)
    with pytest.raises(DataError, match="OPTForCausalLM"):
        peak_bytes(model, prefill_tokens=127, decode_tokens=2)


@pytest.mark.parametrize("fast", [torch.float32, torch.bfloat16])
def test_a_model_is_run_in_what_it_answers_soonest_in(fast: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(model: PreTrainedModel, prefill_tokens: int, decode_tokens: int) -> tuple[float, float]:
        return (1.0, 8.0) if model.dtype == fast else (5.0, 6.0)

    monkeypatch.setattr(speed, "_run", run)
    model, lengths = tiny.model("llama"), {"prefill_tokens": 4, "decode_tokens": 8}
    assert to_fastest(model, [torch.float32, torch.bfloat16], **lengths) == fast == model.dtype
    assert to_fastest(model, [torch.float16], **lengths) == torch.float16 == model.dtype
