"""The shipped specs against published figures: exact parameter counts, and FLOPs per token by an independent closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from mlmdsl.compile import Compilation, compile_spec

MODELS = Path(__file__).resolve().parents[2] / "specs" / "models"


@dataclass(frozen=True)
class Published:
    """hidden, layers, heads, kv heads, feed-forward, vocabulary, head dim (0: hidden / heads), window in tokens of every
    `every`th layer (0: none); `parameters` as counted in the checkpoint, or from its shapes where no checkpoint was published
    (8.3B, 175B)."""

    parameters: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    gated: bool = False
    head_dim: int = 0
    experts: int = 1
    top_k: int = 1  # experts of a token
    window: int = 0
    every: int = 1
    own_form: Callable[[int], float] | None = None  # FLOPs per token by sequence length, where the sizes above don't say


def deepseek_v3_flops_per_token(seq_len: int) -> float:
    """Latent attention: queries through a rank of 1536, keys and values through 512, 64 features turned beside the 128 of each
    of 128 heads. Three dense layers; 58 of one shared and eight routed experts of 2048."""
    latent = 7168 * 1536 + 1536 * 128 * (128 + 64) + 7168 * (512 + 64) + 512 * 128 * (128 + 128) + 128 * 128 * 7168
    scores = 128 * seq_len * ((128 + 64) + 128) / 2
    dense, sparse = 3 * 7168 * 18432, 3 * 7168 * 2048 * (1 + 8) + 7168 * 256
    return 6 * (61 * (latent + scores) + 3 * dense + 58 * sparse + 129280 * 7168)


def encoder_form(seq_len: int, *, hidden: int, layers: int, vocab: int) -> float:
    """BERT: attention over all pairs, four times as wide in the middle, and a layer before the head."""
    products = layers * (4 + 8) * hidden**2 + hidden**2 + vocab * hidden
    return 6 * products + 12 * layers * seq_len * hidden


def encoder_decoder_form(seq_len: int, *, hidden: int, layers: int, width: int, ffn: int, gated: bool = False) -> float:
    """T5, by a token of the encoder: 114 tokens of the decoder belong to 512 (arXiv:1910.10683, section 3.1.4), 120 for
    axes to divide; each of its layers reads keys and values from the encoder's tokens. `width` is that of all heads."""
    assert seq_len == 512
    targets, feed = 120 / 512, (3 if gated else 2) * hidden * ffn
    encoder = 4 * hidden * width + feed + 2 * seq_len * width
    cross = 2 * hidden * width * (1 + targets) + 2 * targets * seq_len * width
    decoder = targets * (4 * hidden * width + feed + 120 * width) + cross
    return 6 * (layers * (encoder + decoder) + targets * 32128 * hidden)


def t5(
    parameters: int, hidden: int, layers: int, heads: int, ffn: int, head_dim: int = 64, *, gated: bool = False
) -> Published:
    """`layers` of each stack."""
    sizes = {"hidden": hidden, "layers": layers, "width": heads * head_dim, "ffn": ffn, "gated": gated}
    form = partial(encoder_decoder_form, **sizes)
    return Published(parameters, hidden, layers, heads, heads, ffn, 32128, gated, head_dim, own_form=form)


def bert(parameters: int, hidden: int, layers: int, heads: int) -> Published:
    form = partial(encoder_form, hidden=hidden, layers=layers, vocab=30522)
    return Published(parameters, hidden, layers, heads, heads, 4 * hidden, 30522, own_form=form)


TABLE = {
    "bert_base": bert(109_514_298, 768, 12, 12),
    "bert_large": bert(335_174_458, 1024, 24, 16),
    "t5_small": t5(60_506_624, 512, 6, 8, 2048),
    "t5_base": t5(222_903_552, 768, 12, 12, 3072),
    "t5_large": t5(737_668_096, 1024, 24, 16, 4096),
    "t5_3b": t5(2_851_598_336, 1024, 24, 32, 16384, 128),
    "t5_11b": t5(11_307_321_344, 1024, 24, 128, 65536, 128),
    "t5_v1p1_small": t5(76_961_152, 512, 8, 6, 1024, gated=True),
    "t5_v1p1_base": t5(247_577_856, 768, 12, 12, 2048, gated=True),
    "t5_v1p1_xxl": t5(11_135_332_352, 4096, 24, 64, 10240, gated=True),
    "gpt2_124m": Published(124_439_808, 768, 12, 12, 12, 3072, 50257),
    "gpt2_355m": Published(354_823_168, 1024, 24, 16, 16, 4096, 50257),
    "gpt2_774m": Published(774_030_080, 1280, 36, 20, 20, 5120, 50257),
    "gpt2_1p5b": Published(1_557_611_200, 1600, 48, 25, 25, 6400, 50257),
    "megatron_8p3b": Published(8_317_040_640, 3072, 72, 24, 24, 12288, 51200),
    "gpt3_175b": Published(174_615_846_912, 12288, 96, 96, 96, 49152, 51200),
    "llama2_7b": Published(6_738_415_616, 4096, 32, 32, 32, 11008, 32000, True),
    "llama2_13b": Published(13_015_864_320, 5120, 40, 40, 40, 13824, 32000, True),
    "llama2_70b": Published(68_976_648_192, 8192, 80, 64, 8, 28672, 32000, True),
    "olmo2_7b": Published(7_298_617_344, 4096, 32, 32, 32, 11008, 100352, True),
    "pythia_6p9b": Published(6_857_302_016, 4096, 32, 32, 32, 16384, 50432),
    "qwen3_0p6b": Published(596_049_920, 1024, 28, 16, 8, 3072, 151936, True, 128),
    "qwen3_8b": Published(8_190_735_360, 4096, 36, 32, 8, 12288, 151936, True, 128),
    "qwen3_32b": Published(32_762_123_264, 5120, 64, 64, 8, 25600, 151936, True, 128),
    "mixtral_8x7b": Published(46_702_792_704, 4096, 32, 32, 8, 14336, 32000, True, experts=8, top_k=2),
    "qwen3_30b_a3b": Published(30_532_122_624, 2048, 48, 32, 4, 768, 151936, True, 128, experts=128, top_k=8),
    "deepseek_v3": Published(671_026_404_352, 7168, 61, 128, 128, 2048, 129280, True, own_form=deepseek_v3_flops_per_token),
    "llama3_8b": Published(8_030_261_248, 4096, 32, 32, 8, 14336, 128256, True),
    "llama3_70b": Published(70_553_706_496, 8192, 80, 64, 8, 28672, 128256, True),
    "llama3_70b_mixed": Published(70_553_706_496, 8192, 80, 64, 8, 28672, 128256, True),
    "llama3_405b": Published(405_853_388_800, 16384, 126, 128, 8, 53248, 128256, True),
    "llama3p1_8b": Published(8_030_261_248, 4096, 32, 32, 8, 14336, 128256, True),
    "llama3p2_1b": Published(1_235_814_400, 2048, 16, 32, 8, 8192, 128256, True),
    "llama3p2_3b": Published(3_212_749_824, 3072, 28, 24, 8, 8192, 128256, True),
    "mistral_7b": Published(7_241_732_096, 4096, 32, 32, 8, 14336, 32000, True, window=4096),
    "phi3_mini": Published(3_821_079_552, 3072, 32, 32, 32, 8192, 32064, True, window=2047),
    "gemma_2b": Published(2_506_172_416, 2048, 18, 8, 1, 16384, 256000, True),
    "gemma_7b": Published(8_537_680_896, 3072, 28, 16, 16, 24576, 256000, True, 256),
    "gemma2_2b": Published(2_614_341_888, 2304, 26, 8, 4, 9216, 256000, True, 256, window=4096, every=2),
    "gemma2_9b": Published(9_241_705_984, 3584, 42, 16, 8, 14336, 256000, True, 256, window=4096, every=2),
    "gemma2_27b": Published(27_227_128_320, 4608, 46, 32, 16, 36864, 256000, True, 128, window=4096, every=2),
    "falcon_7b": Published(6_921_720_704, 4544, 32, 71, 1, 18176, 65024),
    "mpt_7b": Published(6_649_286_656, 4096, 32, 32, 32, 16384, 50432),
    "bloom_7b": Published(7_069_016_064, 4096, 30, 32, 32, 16384, 250880),
    "bloom_176b": Published(176_247_271_424, 14336, 70, 112, 112, 57344, 250880),
    "pythia_1p4b": Published(1_414_647_808, 2048, 24, 16, 16, 8192, 50304),
    "gpt_neox_20b": Published(20_554_567_680, 6144, 44, 64, 64, 24576, 50432),
    "olmo_7b": Published(6_888_095_744, 4096, 32, 32, 32, 11008, 50304, True),
    "olmo2_13b": Published(13_716_198_400, 5120, 40, 40, 40, 13824, 100352, True),
    "qwen2p5_7b": Published(7_615_616_512, 3584, 28, 28, 4, 18944, 152064, True),
    "qwen3_1p7b": Published(1_720_574_976, 2048, 28, 16, 8, 6144, 151936, True, 128),
    "qwen3_4b": Published(4_022_468_096, 2560, 36, 32, 8, 9728, 151936, True, 128),
    "qwen3_14b": Published(14_768_307_200, 5120, 40, 40, 8, 17408, 151936, True, 128),
}


def compiled(name: str) -> Compilation:
    path = MODELS / f"{name}.mlm"
    return compile_spec(path.read_text(encoding="utf-8"), path=str(path), until="graph")


def closed_form(model: Published, seq_len: int) -> float:
    """Forward and backward: 6 FLOPs for each weight that multiplies, and causal attention's 6 S d (half of 12 S d) a layer,
    d being the width of all heads. A window w takes a triangle of (S - w)^2 / 2 off the S^2 / 2 of causal attention."""
    if model.own_form:
        return model.own_form(seq_len)
    head_dim = model.head_dim or model.hidden // model.heads
    width, kv = model.heads * head_dim, model.kv_heads * head_dim
    router = model.experts if model.experts > 1 else 0
    products = model.hidden * (2 * (width + kv) + (3 if model.gated else 2) * model.top_k * model.ffn + router)
    unseen = max(0, seq_len - model.window) ** 2 / seq_len if model.window else 0.0
    attention = (seq_len - unseen / model.every) * width
    return 6 * (model.layers * (products + attention) + model.vocab * model.hidden)


@pytest.mark.parametrize("name", TABLE)
def test_parameters_are_those_of_the_checkpoint(name: str) -> None:
    graph = compiled(name).graph
    assert graph is not None
    assert graph.parameters == TABLE[name].parameters


@pytest.mark.parametrize("name", TABLE)
def test_flops_per_token_are_those_of_the_closed_form(name: str) -> None:
    from mlmdsl.graph.flops import flops_per_token

    done = compiled(name)
    assert done.graph is not None and done.spec is not None
    seq_len = done.spec.train.seq_len
    assert flops_per_token(done.graph, seq_len) == pytest.approx(closed_form(TABLE[name], seq_len), rel=1e-12)


def test_every_shipped_model_stands_in_the_table() -> None:
    assert {path.stem for path in MODELS.glob("*.mlm")} == set(TABLE)
