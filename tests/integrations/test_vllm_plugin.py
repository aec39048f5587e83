"""vLLM's side of a checkpoint: what a fused layer holds, loads, refuses and computes; and vLLM itself where it is.

vLLM is not among the locked packages, so that the last tests skip in the usual environment. They ran with vLLM 0.32.0
built for a CPU.
"""

import importlib.metadata
import json
import pickle
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from spectrim.checkpoint.layout import Matrix, read_config
from spectrim.errors import CheckpointError, ModelError
from spectrim.integrations import vllm_plugin
from spectrim.integrations.vllm_plugin import FusedLinear, part_names, register
from tests import tiny
from tests.checkpoints import FORMATS, RANK, build, packed_weight, prepare, stored_linear
from tests.tiny import REPOSITORY, process_environment

LLAMA = tiny.FAMILIES["llama"]
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
MIXED = {"q_proj": "pifa", "k_proj": "int4_residual", "v_proj": "remap"}  # the ranks differ, too


def wide_llama() -> Any:
    """The tiny Llama with biases, and with heads as wide as vLLM's attention on a CPU requires."""
    config = LLAMA()
    config.head_dim, config.attention_bias = 32, True
    return config


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """format -> checkpoint of a tiny Llama; read only."""
    root = tmp_path_factory.mktemp("vllm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "FAMILIES", {"llama": wide_llama})
        dense = prepare("llama", root / "dense")
    made = {format: root / format for format in FORMATS}
    for format, folder in made.items():
        build(dense, folder, format)
    return made


def mixed() -> tuple[FusedLinear, dict[str, dict[str, Tensor]], Tensor, Tensor]:
    """q, k, v in three formats and a part that the checkpoint does not list; what goes into them, x, and y."""
    draw = torch.Generator().manual_seed(3)
    x, weight = torch.randn(5, 64, generator=draw), torch.randn(16, 64, generator=draw)
    tensors, outputs = {"other": {"weight": weight}}, [x @ weight.T]
    matrices: dict[str, Matrix | None] = {"other": None}
    for size, (name, format) in zip((96, 48, 128), MIXED.items(), strict=True):
        tensors[name] = dict(packed_weight(torch.randn(size, 64, generator=draw), format).tensors)
        matrices[name] = Matrix(format, RANK)
        outputs.append(stored_linear(tensors[name], format, (size, 64)).float()(x))
    layer = FusedLinear(matrices, 64, [16, 96, 48, 128], torch.float16, torch.float32)
    return layer, tensors, x, torch.cat(outputs, -1)


def test_a_layer_joins_parts_of_any_format() -> None:
    layer, tensors, x, y = mixed()
    assert len(layer.missing) == sum(map(len, tensors.values()))
    for shard, part in enumerate(tensors.values()):
        for suffix, tensor in part.items():
            layer.load(suffix, torch.empty(0), tensor, shard)
    assert not layer.missing
    torch.testing.assert_close(layer(x), y)
    assert not any(tensor.requires_grad for tensor in layer.parameters())


@pytest.mark.parametrize("format", FORMATS)
def test_a_layer_from_the_files_computes_what_transformers_does(format: str, checkpoints: dict[str, Path]) -> None:
    folder = checkpoints[format]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = [f"{MLP}.{part}" for part in PACKED["gate_up_proj"]]
    modules = [model.get_submodule(name) for name in names]
    listed = read_config(folder).listed
    layer = FusedLinear({name: listed[name] for name in names}, 64, [96, 96], torch.float16, torch.float32)
    for key, tensor in load_file(folder / "model.safetensors").items():
        name, _, suffix = key.rpartition(".")
        if name in names:
            layer.load(suffix, torch.empty(0), tensor, names.index(name))
    x = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(1))
    assert not layer.missing
    torch.testing.assert_close(layer(x), torch.cat([module(x) for module in modules], -1))


def test_the_only_part_of_a_layer_needs_no_shard() -> None:
    weight = torch.randn(8, 16)
    layer = FusedLinear({"down_proj": Matrix("dense", 8)}, 16, [8], torch.float16, torch.float32)
    layer.load("weight", torch.empty(0), weight.half())
    assert torch.equal(layer(torch.eye(16)), weight.half().float().T)


@pytest.mark.parametrize(
    ("suffix", "shard", "change", "message"),
    [
        ("left", 1, lambda t: t[:-1], rf"left: is torch\.float16 \({95 - RANK}, .*s torch\.float16 \({96 - RANK}, "),
        ("left", 1, lambda t: t.bfloat16(), r"q_proj\.left: is torch\.bfloat16"),
        ("left", 1, lambda t: t.float(), r"q_proj\.left: is torch\.float32"),
        ("order", 2, lambda t: t, r"k_proj\.order: not part of the format"),
        ("left", 4, lambda t: t, r"part 4 of other, q_proj, k_proj, v_proj"),
        ("left", None, lambda t: t, r"part None of"),
        ("left", (0, 1), lambda t: t, r"part \(0, 1\) of"),
    ],
)
def test_a_tensor_that_does_not_belong_is_refused(suffix: str, shard: object, change: Any, message: str) -> None:
    layer, tensors, *_ = mixed()
    before = set(layer.missing)
    with pytest.raises(CheckpointError, match=message):
        layer.load(suffix, torch.empty(0), change(tensors["q_proj"][suffix]), shard)
    assert layer.missing == before


def test_an_unlisted_part_may_have_any_precision_and_no_integers() -> None:
    layer = FusedLinear({"a": None}, 4, [2], torch.float16, torch.float32)
    with pytest.raises(CheckpointError, match=r"a\.weight: is torch\.int8"):
        layer.load("weight", torch.empty(0), torch.zeros(2, 4, dtype=torch.int8))
    for dtype in (torch.float16, torch.float32):
        layer.load("weight", torch.empty(0), torch.ones(2, 4, dtype=dtype))
        assert layer.parts[0].weight.sum() == 8


def test_a_layer_must_have_one_part_for_each_linear() -> None:
    with pytest.raises(ModelError, match="gate, up: a layer of 3 parts"):
        FusedLinear({"gate": None, "up": None}, 4, [2, 2, 2], torch.float16, torch.float32)
    with pytest.raises(ModelError, match="rank 5 of a"):
        FusedLinear({"gate": Matrix("int8", 5)}, 4, [8], torch.float16, torch.float32)


@pytest.mark.parametrize(
    ("prefix", "listed", "expected"),
    [
        (f"{ATTENTION}.qkv_proj", [f"{ATTENTION}.k_proj"], [f"{ATTENTION}.{part}" for part in PACKED["qkv_proj"]]),
        ("model.layers.1.mlp.gate_up_proj", [], ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"]),
        ("model.layers.1.mlp.down_proj", [], ["model.layers.1.mlp.down_proj"]),
        (f"{ATTENTION}.qkv_proj", [f"{ATTENTION}.qkv_proj"], [f"{ATTENTION}.qkv_proj"]),  # fused in the files, too
        ("qkv_proj", [], ["q_proj", "k_proj", "v_proj"]),
    ],
)
def test_the_linears_behind_a_layer_of_vllm(prefix: str, listed: list[str], expected: list[str]) -> None:
    assert part_names(prefix, PACKED, dict.fromkeys(listed)) == expected


def test_the_entry_point_is_the_function() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    group = "vllm.general_plugins"
    assert project["entry-points"][group] == {"spectrim": "spectrim.integrations.vllm_plugin:register"}
    entry = importlib.metadata.EntryPoint("spectrim", project["entry-points"][group]["spectrim"], group)
    assert entry.load() is register


def test_without_vllm_the_file_imports_and_registering_says_what_is_required() -> None:
    code = (
        "import sys; sys.modules['vllm'] = None\n"
        "from spectrim.integrations import vllm_plugin\nfrom spectrim.errors import SpectrimError\n"
        "try: vllm_plugin.register()\nexcept SpectrimError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, env=process_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "vLLM is required" in done.stdout and "pip install vllm" in done.stdout


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """vLLM with this process as its only one, and the plugin registered; skips without vLLM."""
    pytest.importorskip("vllm")
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.model_executor.layers.quantization import get_quantization_config

    register()
    register()  # vLLM may call it again
    with set_current_vllm_config(VllmConfig()):
        file = tmp_path_factory.mktemp("world") / "store"
        init_distributed_environment(1, 0, f"file://{file}", 0, backend="gloo")
        initialize_model_parallel(1, 1)
        yield get_quantization_config("spectrim")
        cleanup_dist_env_and_memory()


def config_of(kind: Any, folder: Path) -> Any:
    """The config as vLLM makes it for a Llama."""
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    config = kind.from_config(fields)
    config.packed_modules_mapping.update(PACKED)
    return config


def test_the_config_is_checked_and_survives_a_process_border(world: Any, checkpoints: dict[str, Path]) -> None:
    config = config_of(world, checkpoints["pifa"])
    again = pickle.loads(pickle.dumps(config))
    assert type(again) is type(config) is vllm_plugin.StoredConfig  # type: ignore[attr-defined]
    assert again.listed == config.listed == read_config(checkpoints["pifa"]).listed
    assert config.get_name() == "spectrim" and torch.float32 in config.get_supported_act_dtypes()
    with pytest.raises(CheckpointError, match="version is 2"):
        world.from_config({"quant_method": "spectrim", "version": 2})


class Block(nn.Module):
    """The linears of one block under vLLM's names, in float32."""

    def __init__(self, config: Any) -> None:
        from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

        super().__init__()
        common: dict[str, Any] = {"params_dtype": torch.float32, "quant_config": config}
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        self.self_attn.qkv_proj = QKVParallelLinear(64, 32, 4, 2, prefix=f"{ATTENTION}.qkv_proj", **common)
        self.self_attn.o_proj = RowParallelLinear(128, 64, prefix=f"{ATTENTION}.o_proj", **common)
        common["bias"] = False
        self.mlp.gate_up_proj = MergedColumnParallelLinear(64, [96, 96], prefix=f"{MLP}.gate_up_proj", **common)
        self.mlp.down_proj = RowParallelLinear(96, 64, prefix=f"{MLP}.down_proj", **common)

    def layers(self) -> Iterator[Any]:
        yield from (self.self_attn.qkv_proj, self.self_attn.o_proj, self.mlp.gate_up_proj, self.mlp.down_proj)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """As vLLM loads a Llama."""
        from vllm.model_executor.models.llama import LlamaModel
        from vllm.model_executor.models.utils import AutoWeightsLoader

        AutoWeightsLoader(self).load_weights(iter(tensors.items()), mapper=LlamaModel.hf_to_vllm_mapper)
        for layer in self.layers():
            layer.quant_method.process_weights_after_loading(layer)


def tensors_of_block(folder: Path) -> dict[str, Tensor]:
    tensors = load_file(folder / "model.safetensors")
    first = {name.removeprefix("model.layers.0."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in first.items() if name.startswith(("self_attn.", "mlp."))}


@pytest.mark.parametrize("format", FORMATS)
def test_vllms_layers_compute_what_transformers_does(world: Any, format: str, checkpoints: dict[str, Path]) -> None:
    folder = checkpoints[format]
    block = Block(config_of(world, folder))
    block.load(tensors_of_block(folder))
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model.layers[0]
    attention, mlp = hf.self_attn, hf.mlp
    parts = [
        [attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj], [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    ]  # fmt: skip
    for layer, modules in zip(block.layers(), parts, strict=True):
        x = torch.randn(5, layer.input_size, generator=torch.Generator().manual_seed(1))
        y, bias = layer(x)
        assert bias is None  # none is left for the caller to add
        torch.testing.assert_close(y, torch.cat([module(x) for module in modules], -1), atol=1e-5, rtol=1e-5)


def test_vllm_refuses_a_file_without_a_listed_tensor(world: Any, checkpoints: dict[str, Path]) -> None:
    tensors = tensors_of_block(checkpoints["pifa"])
    del tensors["mlp.up_proj.order"]
    block = Block(config_of(world, checkpoints["pifa"]))
    with pytest.raises(CheckpointError, match=r"^model\.layers\.0\.mlp\.up_proj\.order: missing"):
        block.load(tensors)


def test_vllm_refuses_tensor_parallelism_and_layers_that_are_not_linear(
    world: Any, checkpoints: dict[str, Path]
) -> None:
    from vllm.model_executor.layers.linear import ColumnParallelLinear, UnquantizedLinearMethod

    config = config_of(world, checkpoints["int8"])
    common: dict[str, Any] = {"bias": False, "quant_config": config, "tp_rank": 0}
    with pytest.raises(ModelError, match="tensor_parallel_size is 2"):
        ColumnParallelLinear(64, 128, prefix=f"{ATTENTION}.q_proj", tp_size=2, **common)
    other = ColumnParallelLinear(64, 128, prefix="model.unlisted", tp_size=2, **common)
    assert isinstance(other.quant_method, UnquantizedLinearMethod)
    assert config.get_quant_method(nn.Identity(), f"{ATTENTION}.attn") is None
    with pytest.raises(ModelError, match=r"mlp\.\w+: in a Identity of vLLM"):
        config.get_quant_method(nn.Identity(), "model.layers.0.mlp")


ENGINE = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    limits = {"max_model_len": 64, "max_num_seqs": 2, "max_num_batched_tokens": 128}
    engine = LLM(sys.argv[1], dtype="float32", enforce_eager=True, **limits)
    sampling = SamplingParams(temperature=0, max_tokens=4, logprobs=5, ignore_eos=True)
    (answer,) = engine.generate([{"prompt_token_ids": list(range(2, 22))}], sampling)
    steps = [{token: entry.logprob for token, entry in step.items()} for step in answer.outputs[0].logprobs]
    print("ANSWER", json.dumps([list(answer.outputs[0].token_ids), steps]))
"""


def test_a_whole_engine_answers_as_transformers_does(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """The entry point alone leads vLLM to the plugin here: nothing in the process names Spectrim."""
    pytest.importorskip("vllm")
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("float32 attention: a vLLM built for a CPU")
    if "spectrim" not in {entry.name for entry in importlib.metadata.entry_points(group="vllm.general_plugins")}:
        pytest.skip("Spectrim was installed before it had the entry point: `pip install -e .` again")
    script = tmp_path / "engine.py"
    script.write_text(ENGINE, encoding="utf-8")
    environment = process_environment(VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", PYTHONPATH=str(REPOSITORY))
    command = [sys.executable, str(script), str(checkpoints["pifa_int8"])]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    tokens, steps = json.loads(line.removeprefix("ANSWER "))
    model = AutoModelForCausalLM.from_pretrained(checkpoints["pifa_int8"], dtype=torch.float32)
    context = list(range(2, 22))
    for token, step in zip(tokens, steps, strict=True):
        with torch.inference_mode():
            expected = model(input_ids=torch.tensor([context])).logits[0, -1].log_softmax(-1)
        found = torch.tensor(list(step.values()))
        torch.testing.assert_close(found, expected[[int(key) for key in step]], atol=1e-4, rtol=0)
        assert expected[token] >= expected.max() - 1e-4
        context.append(token)
