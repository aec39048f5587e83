"""What runs on a GPU computes what the same code computes on the CPU, and stays as small there."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from spectrim.compression import statistics as captured
from spectrim.compression.refinement import LearningRates, StoredTraining, attach_factors
from spectrim.compression.truncated import GatedLinear, attach_truncated
from spectrim.evaluation.perplexity import perplexity
from spectrim.evaluation.speed import peak_bytes, throughput, weight_bytes
from spectrim.maths.budget import Format
from spectrim.maths.lowrank import asvd, closed_form, plain_svd, svd_llm_cholesky, svd_llm_v2, truncate, two_sided
from spectrim.models.blocks import BlockModel, leaving
from spectrim.models.modules import compressible_linears
from tests import reference, tiny
from tests.checkpoints import FORMATS, TOKENS, Folders, build_all, logits, truncated
from tests.training import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return build_all(tmp_path_factory.mktemp("models"))


def statistics(folder: Path, device: str) -> dict[str, Tensor]:
    """What `capture` keeps of every block of a model, and the spectra of the first one."""
    model = BlockModel(folder, device)
    blocks: list[dict[str, Tensor]] = []
    input_of: list[dict[str, str]] = []
    hidden = [model.embed(TOKENS).cpu()]
    for index in range(len(model.names)):
        tensors, owners, output = captured.input_statistics(model, index, hidden[index], 2)
        blocks.append(tensors)
        input_of.append(owners)
        hidden.append(output)
    gradient = captured.loss_gradient(model, TOKENS, hidden[-1])
    for index in reversed(range(len(model.names))):
        tensors, gradient = captured.gradient_statistics(model, index, hidden[index], gradient, 2)
        blocks[index] |= tensors
    n_tokens = TOKENS.numel()
    made = captured.decompose(model.weights(0), blocks[0], input_of[0], n_tokens, n_tokens, 1e-4, 1e-2)
    blocks.append({name: tensor for name, tensor in made.items() if name.startswith("two_sided.")})
    return {f"{index}.{name}": tensor for index, tensors in enumerate(blocks) for name, tensor in tensors.items()}


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_the_captured_statistics_are_the_same(family: str, model_folders: dict[str, Path]) -> None:
    found, expected = (statistics(model_folders[family], device) for device in ("cuda", "cpu"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4 * float(tensor.abs().max()))


def test_the_optima_are_the_same() -> None:
    weight, x = reference.draw(0, 12, 9, 36)
    gram, gradient_gram = reference.gram(x), reference.gram(reference.draw(1, 1, 12, 48)[1])
    for method, metric in (
        (plain_svd, ()), (asvd, (x.abs().mean(0),)), (closed_form, (gram,)), (svd_llm_cholesky, (gram,)),
        (svd_llm_v2, (gram,)), (two_sided, (gram, gradient_gram)),
    ):  # fmt: skip
        found = truncate(method(weight.cuda(), *(one.cuda() for one in metric)), 4)
        expected = truncate(method(weight, *metric), 4)
        tolerance = 1e-7 if method is asvd else 1e-6
        torch.testing.assert_close(
            (found.left @ found.right).cpu(), expected.left @ expected.right, rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
def test_a_checkpoint_gives_the_same_logits_and_stays_packed(
    format: Format, dtype: torch.dtype, folders: Folders
) -> None:
    folder = folders["llama", format]
    exact = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cuda")
    on_cpu = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert model.device.type == "cuda" and weight_bytes(model) == weight_bytes(on_cpu)
    with torch.inference_mode():
        tolerance = 1e-4 if dtype == torch.float32 else 5e-2
        for tokens, expected in ((TOKENS, exact), (TOKENS[:1, :3], exact[:1, :3])):
            found = model(tokens.cuda()).logits.float().cpu()
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(exact.abs().max()))
    back = model.cpu()
    torch.testing.assert_close(logits(back), logits(on_cpu))


@pytest.mark.parametrize("steps_before", [0, 2])
def test_refinement_in_bfloat16_falls_as_on_the_cpu_and_goes_on_where_it_was(steps_before: int) -> None:
    def run(device: str) -> StoredTraining:
        model, dense = tiny.model("llama"), tiny.model("llama")
        factors = {
            name: truncated(linear.weight.detach(), min(linear.weight.shape) // 3)
            for name, linear in compressible_linears(model).items()
        }
        modules = attach_factors(model.to(device), factors)
        with torch.no_grad():
            expected, _ = leaving(dense, TOKENS)
        return StoredTraining(
            model, modules, {}, TOKENS, expected.__getitem__, steps=6, batch_size=2,
            learning_rates=LearningRates(3e-3, 3e-3, 3e-4), kl_weight=1.0, seed=0,
        )  # fmt: skip

    on_cpu, first, second = run("cpu"), run("cuda"), run("cuda")
    expected, found = [on_cpu.advance() for _ in range(6)], [first.advance() for _ in range(steps_before)]
    second.restore(first.state(), steps_before)
    found += [second.advance() for _ in range(6 - steps_before)]
    assert found == pytest.approx(expected, rel=0.05) and found[-1] < found[0]


def test_gates_learn_the_same_ranks() -> None:
    def ranks(device: str) -> dict[str, float]:
        model = tiny.model("llama").requires_grad_(False).to(device)
        linears = compressible_linears(model)
        modules, costs = {}, {}
        for name, linear in linears.items():
            factors = truncated(linear.weight, min(linear.weight.shape))
            modules[name] = GatedLinear(factors, linear.weight, linear.bias)
            costs[name] = float(sum(linear.weight.shape) * min(linear.weight.shape))
        attach_truncated(model, modules)
        start = {name: 0.4 * module.full_rank for name, module in modules.items()}
        settings = {"steps": 8, "batch_size": 2, "learning_rate": 0.05, "width": 0.1, "beta": 10.0, "seed": 0}
        return train(model, modules, costs, start, TOKENS, **settings)  # type: ignore[arg-type]

    found, expected = ranks("cuda"), ranks("cpu")
    assert found == pytest.approx(expected, abs=0.2)


def test_perplexity_speed_and_memory_are_measured() -> None:
    expected = perplexity(tiny.model("llama"), TOKENS)
    model = tiny.model("llama").cuda()
    assert perplexity(model, TOKENS)["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-4)
    assert weight_bytes(model) < peak_bytes(model, prefill_tokens=16, decode_tokens=2) < 100 * weight_bytes(model)
    speed = throughput({"dense": model}, prefill_tokens=16, decode_tokens=2, repeats=2)
    assert min(speed["prefill"]["dense"], speed["decode"]["dense"]) > 0
