"""Every type that transformers has a causal language model for, in a size for tests: what works, what is refused.

    python -m benchmarks.families > docs/families.md

Every model has random weights in a tiny size. The table says what the probe of `prepare` says, and which share of the
blocks' parameters compression reaches.
"""

import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import transformers
import typer
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from spectrim.compression.probe import probe
from spectrim.errors import SpectrimError
from spectrim.models.linearise import matrices_of
from spectrim.models.modules import decoder_blocks

LARGEST = 5_000_000
"""Parameters."""

LONGEST = 160
"""Characters of an outcome."""

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "dff"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("max_position_embeddings", "max_target_positions", "n_positions", "n_ctx"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "bos_token_id"), 1),
    "index_n_heads": 2,
    "index_head_dim": 16,
    "vocab_size": 128,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 8,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
"""What is made small, by the name that a configuration has for it."""

MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}  # heads · head_dim = expand · hidden_size
LATENT = {"num_key_value_heads": 4}  # attention with a latent for keys and values has as many as there are heads
HEADS = {"head_dim": 8}  # declared as None
FOUR = {"num_hidden_layers": 4}  # of which the last attends
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), LATENT),
    **dict.fromkeys(("glm_moe_dsa", "longcat_flash", "minicpm3", "youtu"), LATENT),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), HEADS),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "lfm3"), FOUR),
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"]},
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    **dict.fromkeys(("dots3_note", "dots3_note_text"), LATENT),
    "mamba2": {"num_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "zamba": {"num_hidden_layers": 3, "layer_types": ["mamba", "hybrid", "mamba"]},
    "dots1": {"n_shared_experts": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "bailing_hybrid": {"num_hidden_layers": 8},
    "jamba": {"num_hidden_layers": 8},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "attention_head_size": 8},
    "roc_bert": {"pronunciation_vocab_size": 128, "shape_vocab_size": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba2": MAMBA | {"num_hidden_layers": 3, "layer_types": ["mamba", "hybrid", "mamba"]},
    "deepseek_v4": {  # few windows are as long as what it compresses otherwise
        "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    },
    "dbrx": {"ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}},
}
"""What one type needs besides."""


def small_config(kind: str) -> Any:
    """The configuration of model type ``kind`` with SIZES; of several parts only the text's is changed."""
    config: Any = AutoConfig.for_model(kind)
    text = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:  # of which the decoder alone is a language model
        text = config
    declared, renamed = text.to_dict(), getattr(type(text), "attribute_map", {})
    sizes = {name: size for name, size in SIZES.items() if name in declared or name in renamed}
    if declared.get("head_dim") is None:
        sizes.pop("head_dim", None)
    if "is_decoder" in declared:
        sizes["is_decoder"] = True
    sizes |= OWN.get(kind, {})
    if config.is_encoder_decoder:
        sizes["is_encoder_decoder"] = False
    if text is config:
        return type(config)(**sizes)
    return type(config)(text_config=type(text)(**sizes).to_dict())


def small_model(kind: str) -> PreTrainedModel:
    """A model of it with nothing left at its initial 0 or 1: norms, biases and persistent buffers are drawn, too."""
    torch.manual_seed(0)
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(small_config(kind)).num_parameters()
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters in this size")
    model: Any = AutoModelForCausalLM.from_config(small_config(kind)).eval()
    saved = model.state_dict().keys()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name in saved and buffer.is_floating_point() and "decay" not in name:  # which says who sees whom
                buffer.add_(0.5 * torch.rand_like(buffer))
    return model


def share_reached(model: PreTrainedModel, unreached: Iterable[str]) -> float:
    """How much of the parameters in the decoder blocks compression reaches, without the linears ``unreached``."""
    places = [place for name, place in matrices_of(model).items() if name not in set(unreached)]
    reached = sum(place.of(model.get_parameter(place.name)).numel() for place in places)
    return reached / sum(parameter.numel() for parameter in decoder_blocks(model)[1].parameters())


def outcome(kind: str) -> tuple[str, float | None]:
    """``works``, or why it is refused, and the share of the blocks that is reached."""
    with TemporaryDirectory() as folder:
        model = small_model(kind)
        model.save_pretrained(folder, save_original_format=False)
        try:
            unreached, obstacle = probe(Path(folder))
            return "works, as a whole" if obstacle else "works", share_reached(model, unreached)
        except SpectrimError as error:
            return str(error), None


HEAD = """# What works

Every type that transformers {version} has a causal language model for, with random weights in a tiny size, as
`python -m benchmarks.families` tries them: {counts}.

A type works where the probe of `prepare` finds all that Spectrim assumes. "Reached" is the share of the parameters in
the blocks that is compressed. "As a whole": its blocks cannot be run one by one, see `capture.walk`. What is not tried
cannot be built in that size here.

| type | outcome | reached |
|---|---|---|"""


def main(
    types: Annotated[list[str] | None, typer.Argument(metavar="TYPE", help="Model types; all without any.")] = None,
) -> None:
    """Print the page."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows, counts = [], Counter[str]()
    for kind in tqdm(types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), unit="type", disable=None):
        try:
            with redirect_stdout(sys.stderr):  # some architectures print
                what, share = outcome(kind)
            counts["work" if share is not None else "refused"] += 1
        except Exception as error:  # transformers cannot build it this small
            what, share = f"not tried: {type(error).__name__}: {error}", None
            counts["not tried"] += 1
        text = re.sub(r"\s+", " ", what).replace("|", "\\|")
        rows.append(f"| {kind} | {text[:LONGEST]} | {'–' if share is None else f'{share:.3f}'} |")
    listed = ", ".join(f"{count} {what}" for what, count in counts.most_common())
    print(HEAD.format(version=transformers.__version__, counts=listed), *rows, sep="\n")


if __name__ == "__main__":
    typer.run(main)
