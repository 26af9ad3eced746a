"""Small models of transformers with random weights, and the same models as emitted programs."""

from __future__ import annotations

import os
import runpy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import Tensor, nn

from mlmdsl.compile import compile_spec
from mlmdsl.huggingface.config import read_config, recognise
from mlmdsl.huggingface.exporting import export_checkpoint
from mlmdsl.huggingface.importing import import_checkpoint
from mlmdsl.huggingface.layouts import Exchange, exchange
from mlmdsl.runtime import checkpoint, mesh
from mlmdsl.runtime.exchange import blocks_of
from mlmdsl.runtime.parallel import public_name
from mlmdsl.runtime.pieces import Piece

transformers: Any = import_module("transformers")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCAB, ROWS, LENGTH = 96, 3, 24
_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Case:
    """`kind` and `head` name transformers' classes: <kind>Config, <kind>ForCausalLM."""

    family: str
    kind: str
    settings: dict[str, Any]
    head: str = "ForCausalLM"


def _case(family: str, kind: str, **settings: Any) -> Case:
    return Case(family, kind, _SMALL | settings)


_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 64, "vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2}
_FALCON = {name: value for name, value in _SMALL.items() if name != "intermediate_size"} | {"alibi": False}
_FALCON_11B = {
    "new_decoder_architecture": True,
    "num_kv_heads": 2,
    "num_ln_in_parallel_attn": 1,
    "tie_word_embeddings": False,
    "ffn_hidden_size": 80,
}
_QWEN3_MOE = {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "intermediate_size": 24,
    "router_aux_loss_coef": 0.0,
}
_DEEPSEEK = {
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "num_mtp_layers": 0,
}
_DEEPSEEK_OTHER = _DEEPSEEK | {
    "first_k_dense_replace": 2,
    "v_head_dim": 12,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "rope_interleave": False,
    "tie_word_embeddings": True,
}

_BERT = {name: value for name, value in _SMALL.items() if not name.endswith(("bos_token_id", "eos_token_id"))}
_T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 56,
    "num_heads": 4,
    "num_layers": 3,
    "vocab_size": VOCAB,
    "n_positions": 512,
    "decoder_start_token_id": 0,
}
_T5_V1P1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "relative_attention_num_buckets": 8}

CASES: dict[str, Case] = {
    "bert": Case("bert", "Bert", _BERT, head="ForMaskedLM"),
    "bert of three segments": Case("bert", "Bert", _BERT | {"type_vocab_size": 3, "layer_norm_eps": 1e-6}, head="ForMaskedLM"),
    "t5": Case("t5", "T5", _T5, head="ForConditionalGeneration"),
    "t5 of unlike stacks": Case("t5", "T5", _T5 | {"num_decoder_layers": 2, "d_kv": 12}, head="ForConditionalGeneration"),
    "t5 v1.1": Case("t5", "T5", _T5 | _T5_V1P1, head="ForConditionalGeneration"),
    "gpt2": Case("gpt2", "GPT2", _GPT2, head="LMHeadModel"),
    "gpt2 with another width": Case("gpt2", "GPT2", _GPT2 | {"n_inner": 80}, head="LMHeadModel"),
    "llama2": _case("llama", "Llama"),
    "llama2 grouped": _case("llama", "Llama", num_key_value_heads=2, rms_norm_eps=1e-5),
    "llama3": _case("llama", "Llama", num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}),
    "llama3.1": _case("llama", "Llama", num_key_value_heads=2, rope_parameters=_LLAMA3),
    "llama3.2 tied": _case("llama", "Llama", num_key_value_heads=1, head_dim=16, tie_word_embeddings=True),
    "qwen3": _case("qwen3", "Qwen3", num_key_value_heads=2, head_dim=16),
    "qwen3 tied": _case("qwen3", "Qwen3", num_key_value_heads=4, head_dim=8, tie_word_embeddings=True),
    "qwen2": _case("qwen2", "Qwen2", num_key_value_heads=2),
    "phi3": _case("phi3", "Phi3", num_key_value_heads=2),
    "starcoder": Case("gpt_bigcode", "GPTBigCode", _GPT2),
    "falcon 7b": Case("falcon", "Falcon", _FALCON | {"num_kv_heads": 1}),
    "falcon 40b": Case("falcon", "Falcon", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon 11b": Case("falcon", "Falcon", _FALCON | _FALCON_11B),
    "mistral": _case("mistral", "Mistral", num_key_value_heads=2, sliding_window=7),
    "mistral without a window": _case("mistral", "Mistral", num_key_value_heads=2, sliding_window=None),
    "starcoder2": _case("starcoder2", "Starcoder2", num_key_value_heads=2, sliding_window=9),
    "phi3 with a window": _case("phi3", "Phi3", num_key_value_heads=4, sliding_window=9),
    "gemma": _case("gemma", "Gemma", num_key_value_heads=1, head_dim=16),
    "gemma2": _case("gemma2", "Gemma2", num_hidden_layers=4, num_key_value_heads=2, head_dim=16, sliding_window=6),
    "gemma2 of other scales": _case(
        "gemma2",
        "Gemma2",
        num_hidden_layers=2,
        num_key_value_heads=4,
        head_dim=8,
        query_pre_attn_scalar=144,
        attn_logit_softcapping=3.0,
    ),
    "mixtral": _case("mixtral", "Mixtral", num_key_value_heads=2, num_local_experts=4),
    "qwen3 moe": _case("qwen3_moe", "Qwen3Moe", **_QWEN3_MOE),
    "qwen3 moe renormalised": _case("qwen3_moe", "Qwen3Moe", **_QWEN3_MOE, norm_topk_prob=True, tie_word_embeddings=True),
    "deepseek v3": _case("deepseek_v3", "DeepseekV3", **_DEEPSEEK),
    "deepseek v3 of other settings": _case("deepseek_v3", "DeepseekV3", **_DEEPSEEK_OTHER),
    "mpt": Case("mpt", "Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 3, "vocab_size": VOCAB, "max_seq_len": 64}),
    "bloom": Case("bloom", "Bloom", {"hidden_size": 32, "n_head": 4, "n_layer": 3, "vocab_size": VOCAB}),
    "olmo": _case("olmo", "Olmo", num_key_value_heads=2),
    "olmo2": _case("olmo2", "Olmo2", num_key_value_heads=2),
    "pythia": _case("gpt_neox", "GPTNeoX"),
    "gpt-neox 20b": _case("gpt_neox", "GPTNeoX", hidden_act="gelu_fast"),
    "pythia half": _case("gpt_neox", "GPTNeoX", rope_parameters={"rope_theta": 5000.0, "partial_rotary_factor": 0.5}),
}


def theirs(case: Case, seed: int = 0) -> nn.Module:
    """The model of transformers, with weights large enough for logits that say something."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{case.kind}Config")(**case.settings, attn_implementation="eager")
    model = getattr(transformers, f"{case.kind}{case.head}")(config).eval()
    if not getattr(config, "scale_decoder_outputs", True):  # T5 v1.1: transformers ties what its checkpoints do not tie
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            elif name == "shared.weight":
                parameter.normal_()
            else:
                parameter.normal_(0.0, 0.15)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.uniform_(-0.2, 0.2)
    return model


def saved(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


_AUTO = {"ForMaskedLM": "AutoModelForMaskedLM", "ForConditionalGeneration": "AutoModelForSeq2SeqLM"}


def loaded(folder: Path, head: str = "ForCausalLM") -> Any:
    """By the class that transformers picks itself."""
    auto = getattr(transformers, _AUTO.get(head, "AutoModelForCausalLM"))
    return auto.from_pretrained(folder, attn_implementation="eager").eval()


@dataclass(frozen=True)
class Ours:
    """An emitted program's model on this process, its loss, and how its weights are those of transformers."""

    model: nn.Module
    loss: Callable[..., Tensor]
    map: Exchange

    def gradients(self) -> dict[str, Tensor]:
        """Under transformers' names, in its layouts."""
        found = {public_name(path): parameter.grad for path, parameter in self.model.named_parameters()}
        return turned(self.map, {name: gradient for name, gradient in found.items() if gradient is not None})


def turned(map: Exchange, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under our names as tensors under theirs."""
    pieces: dict[str, list[Piece]] = {}
    for piece in map.pieces:
        pieces.setdefault(piece.theirs, []).append(piece)

    def take(piece: Piece) -> Tensor:
        offsets, sizes = piece.ours_box()
        return values[piece.ours][tuple(slice(low, low + size) for low, size in zip(offsets, sizes, strict=True))]

    return {
        name: torch.cat([block.reshape(-1) for block in blocks_of(pieces[name], shape, take)]).view(shape)
        for name, shape in map.theirs.items()
    }


def ours(run: Path) -> Ours:
    """From a run's folder, its newest checkpoint."""
    names = runpy.run_path(str(run / "program.py"))
    model = names["Stage"](0, mesh.single(torch.device("cpu")))
    folder = checkpoint.latest(run)
    assert folder is not None
    checkpoint.load_weights(model, folder)
    return Ours(model, names["loss"], map_of(run))


def map_of(run: Path) -> Exchange:
    path = run / "spec.mlm"
    graph = compile_spec(path.read_text(encoding="utf-8"), path=str(path), until="graph").graph
    assert graph is not None
    family = read_config(run).family.name if (run / "config.json").exists() else None
    return exchange(recognise(graph, family), graph)


def imported(case: Case, folder: Path, **options: Any) -> tuple[nn.Module, Path]:
    """A model of transformers, and the run that its checkpoint has become."""
    model = theirs(case)
    import_checkpoint(saved(model, folder / "theirs", **options), folder / "run", None)
    return model, folder / "run"


def exported(run: Path, folder: Path, shard_bytes: int = 10**9, dtype: str = "fp32") -> Path:
    export_checkpoint(run, folder, dtype, shard_bytes, None)
    return folder


@dataclass(frozen=True)
class Batch:
    """The same rows for both: `theirs` by name, with labels; `ours` in the order of the spec's inputs, with targets."""

    theirs: dict[str, Tensor]
    ours: tuple[Tensor, ...]
    labels: Tensor
    targets: Tensor


def batch(case: Case) -> Batch:
    """Padding included where the model is told of it."""
    rows = tokens()
    if case.head not in _AUTO:
        return Batch({"input_ids": rows}, (rows,), rows, targets_of(rows))
    valid = (torch.arange(LENGTH) < torch.tensor([LENGTH, 17, 5])[:, None]).long()
    given = {"input_ids": rows * valid, "attention_mask": valid}
    if case.head == "ForMaskedLM":
        segments = (torch.arange(LENGTH) >= 9).long().expand(ROWS, -1).contiguous()
        targets = torch.where((rows % 4 == 0) & (valid == 1), rows, -100)
        return Batch(given | {"token_type_ids": segments}, (given["input_ids"], segments, valid), targets, targets)
    targets = tokens(2)[:, :15].contiguous()
    targets[1, 7:] = -100
    shifted = torch.cat([torch.zeros_like(targets[:, :1]), targets[:, :-1].clamp(min=0)], dim=1)
    return Batch(given | {"decoder_input_ids": shifted}, (given["input_ids"], valid, shifted), targets, targets)


def tokens(seed: int = 1) -> Tensor:
    return torch.randint(3, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))


def targets_of(rows: Tensor) -> Tensor:
    """The next token of each; the last has none."""
    return torch.cat([rows[:, 1:], torch.full_like(rows[:, :1], -100)], dim=1)
