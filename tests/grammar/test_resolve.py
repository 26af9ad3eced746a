"""Text to Spec: imports, inheritance, --set and --pin; files are read from a dictionary."""

from __future__ import annotations

from typing import Any

import pytest

from mlmdsl.diagnostics import Diagnostics
from mlmdsl.grammar.modules import read_file
from mlmdsl.grammar.resolve import Resolved, resolve
from mlmdsl.graph.build import build
from mlmdsl.graph.graph import Graph

MODEL = """model tiny {
  param d: int = 64
  param layers = 2
  const heads = 4
  input tokens: int[B, S]
  tok = Embedding(tokens, vocab = 256, dim = d)
  h = tok
  repeat layers as blocks { h = h + Attention(h, heads = heads, causal = true) }
  output Linear(h, weight = tok.weight)
}
"""
CLUSTER = """cluster box {
  nodes = 1
  devices_per_node = 4
  device = cpu(memory = 2 GiB, fp32 = 40 GFLOPS)
}
"""
TRAIN = """train {
  data = text("a.txt")
  seq_len = 64 tok
  batch = 8 seq
  stop = 10 steps
  optimizer = adamw(lr = 1e-3)
  precision = fp32
}
"""
PLAN = """plan {
  minimize memory
  pin tensor = 2
  pin recompute = full
  require pipeline <= 2
}
"""
ALL = MODEL + CLUSTER + TRAIN + PLAN


def resolved(text: str, files: dict[str, str] | None = None, **options: Any) -> tuple[Resolved, Diagnostics]:
    found = Diagnostics()

    def read(path: str) -> str:
        if path.startswith("std/"):
            return read_file(path)
        if path not in (files or {}):
            raise FileNotFoundError(path)
        return (files or {})[path]

    return resolve("dir/spec.mlm", text, found, read=read, **options), found


def told(found: Diagnostics) -> list[str]:
    """`CODE file:line:column` of each."""
    return [f"{d.code} {d.span.file}:{d.span.line}:{d.span.column}" for d in found.items if d.span]


def sound(text: str, files: dict[str, str] | None = None, **options: Any) -> Resolved:
    result, found = resolved(text, files, **options)
    assert found.items == [] and result.spec is not None
    return result


def graph(result: Resolved) -> Graph:
    found = Diagnostics()
    assert result.model is not None
    made = build(result.model, found)
    assert made is not None and found.items == []
    return made


# ---- overrides ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.batch=64 seq", "train.batch", 64),
        ("train.batch=4096 tok", "train.batch", 64),
        ("train.seq_len = 128 tok", "train.seq_len", 128),
        ("train.optimizer=adamw(lr = 5e-4, clip = none)", "train.optimizer.lr", 5e-4),
        ("train.optimizer=adamw(lr = 5e-4, clip = none)", "train.optimizer.clip", None),
        ("train.precision=bf16", "train.precision", "bf16"),
        ("train.seed=2 + 3", "train.seed", 5),
        ("cluster.nodes=1", "cluster.world_size", 4),
        ("box.devices_per_node=2", "cluster.world_size", 2),
        ("cluster.devices_per_node=8", "cluster.world_size", 8),
        ("cluster.price=2 USD/gpu/hour", "cluster.usd_per_device_hour", 2.0),
        ("cluster.device=A100_SXM_80GB", "cluster.pools.0.device.name", "A100_SXM_80GB"),
    ],
)
def test_an_override_of_a_setting(override: str, path: str, value: object) -> None:
    found: Any = sound(ALL, overrides=(override,))
    for name in path.split("."):
        found = found[int(name)] if name.isdigit() else getattr(found, name)
    assert found == value


@pytest.mark.parametrize(
    ("overrides", "width", "layers"),
    [((), 64, 2), (("tiny.d=128",), 128, 2), (("tiny.d=2*64", "tiny.layers=7"), 128, 7), (("tiny.d=96", "tiny.d=32"), 32, 2)],
)
def test_an_override_of_a_param_is_built(overrides: tuple[str, ...], width: int, layers: int) -> None:
    made = graph(sound(ALL, overrides=overrides))
    assert made.weights["tok.weight"].shape == (256, width)
    assert made.layers == layers


def test_a_param_of_the_file() -> None:
    text = "param width = 32\nparam double = 2 * width\n" + ALL.replace("d: int = 64", "d: int = double")
    assert graph(sound(text)).weights["tok.weight"].shape == (256, 64)
    assert graph(sound(text, overrides=("width=48",))).weights["tok.weight"].shape == (256, 96)
    assert graph(sound(text, overrides=("width=48", "tiny.d=8"))).weights["tok.weight"].shape == (256, 8)


@pytest.mark.parametrize(
    ("override", "problem", "help"),
    [
        ("tiny.widht=3", "MLM0112 --set tiny.widht=3:1:1", ""),
        ("tiny.layer=3", "MLM0112 --set tiny.layer=3:1:1", "`tiny.layers`"),
        ("tiny.heads=2", "MLM0112 --set tiny.heads=2:1:1", ""),  # a const
        ("tokens=2", "MLM0112 --set tokens=2:1:1", ""),
        ("nowhere.x=2", "MLM0112 --set nowhere.x=2:1:1", "paths are model.param"),
        ("train.batches=8 seq", "MLM0211 --set train.batches=8 seq:1:1", "`batch`"),
        ("train.batch=8", "MLM0305 --set train.batch=8:1:13", "seq"),
        ("train.batch=100 tok", "MLM0401 --set train.batch=100 tok:1:13", ""),
        ("train.batch=8 sqe", "MLM0301 --set train.batch=8 sqe:1:13", "`seq`"),
        ("cluster.device=H100", "MLM0201 --set cluster.device=H100:1:16", "H100"),
        ("tiny.d=d", "MLM0201 --set tiny.d=d:1:8", ""),
        ("tiny.d=1.5", "MLM0257 --set tiny.d=1.5:1:8", ""),
        ("tiny.d", "MLM0111 --set tiny.d:1:1", "--set gpt2.d=1024"),
        ("tiny.d=", "MLM0111 --set tiny.d=:1:1", ""),
        ("=3", "MLM0111 --set =3:1:1", ""),
        ("tiny.d=3 4", "MLM0001 --set tiny.d=3 4:1:10", ""),
        ("tiny.d=(3", "MLM0004 --set tiny.d=(3:1:8", ""),
    ],
)
def test_an_override_that_does_not_go(override: str, problem: str, help: str) -> None:
    result, found = resolved(ALL, overrides=(override,))
    if result.model is not None and not found.items:
        build(result.model, found)
    assert told(found) == [problem]
    assert help in found.items[0].help
    assert found.sources[f"--set {override}"] == override


# ---- pins -----------------------------------------------------------------------------------------------------------


def pins(result: Resolved) -> dict[str, object]:
    assert result.plan is not None
    return {pin.variable: pin.value for pin in result.plan.pins}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((), {"tensor": 2, "recompute": "full"}),
        (("tensor=4",), {"tensor": 4, "recompute": "full"}),
        (("data=2", "zero=3"), {"tensor": 2, "recompute": "full", "data": 2, "zero": 3}),
        (("tensor=4", "tensor=1"), {"tensor": 1, "recompute": "full"}),
        (("schedule=1f1b",), {"tensor": 2, "recompute": "full", "schedule": "1f1b"}),
        (("recompute=none",), {"tensor": 2, "recompute": "none"}),
        (("stages=[1, 1]",), {"tensor": 2, "recompute": "full", "stages": (1, 1)}),
        (("sequence_parallel=true",), {"tensor": 2, "recompute": "full", "sequence_parallel": True}),
    ],
)
def test_pins_of_the_command_are_stronger(given: tuple[str, ...], expected: dict[str, object]) -> None:
    assert pins(sound(ALL, pins=given)) == expected


@pytest.mark.parametrize(
    ("pin", "problem"),
    [
        ("tensors=2", "MLM0212 --pin tensors=2:1:1"),
        ("tensor=two", "MLM0201 --pin tensor=two:1:8"),
        ("tensor=0", "MLM0320 --pin tensor=0:1:8"),
        ("tensor=2.0", "MLM0320 --pin tensor=2.0:1:8"),
        ("zero=4", "MLM0320 --pin zero=4:1:6"),
        ("schedule=gpip", "MLM0201 --pin schedule=gpip:1:10"),
        ("stages=3", "MLM0320 --pin stages=3:1:8"),
        ("sequence_parallel=1", "MLM0320 --pin sequence_parallel=1:1:19"),
        ("tensor", "MLM0111 --pin tensor:1:1"),
        ("tensor==2", "MLM0001 --pin tensor==2:1:8"),
    ],
)
def test_a_pin_that_does_not_go(pin: str, problem: str) -> None:
    _, found = resolved(ALL, pins=(pin,))
    assert told(found) == [problem]


def test_the_plan_as_written() -> None:
    plan = sound(ALL).plan
    assert plan is not None and plan.minimize == "memory"
    assert [(pin.text, pin.span.line) for pin in plan.pins] == [("pin tensor = 2", 26), ("pin recompute = full", 27)]
    assert [(rule.form, rule.text) for rule in plan.rules] == [("require", "require pipeline <= 2")]


def test_texts_of_rules_where_lines_are_odd() -> None:
    text = "# one\u2028two\x0cthree\n" + ALL.replace("pipeline <= 2", "(pipeline\n    <= 2)")
    plan = sound(text).plan
    assert plan is not None and plan.rules[0].text == "require (pipeline <= 2)"


# ---- imports --------------------------------------------------------------------------------------------------------


def test_an_import_is_relative_to_its_file() -> None:
    files = {
        "dir/lib/a.mlm": 'import "../b.mlm" as b\nconst width = b.half * 2\n'
        "block Twice(x: [B, S, d]) { output b.Once(b.Once(x)) }\n",
        "dir/b.mlm": "const half = 24\nblock Once(x: [B, S, d]) { output Linear(x, out = d) }\n",
    }
    text = 'import "lib/a.mlm" as a\n' + ALL.replace("d: int = 64", "d: int = a.width").replace(
        "h = tok\n", "h = a.Twice(tok)\n"
    )
    result = sound(text, files)
    assert set(result.sources) == {"dir/spec.mlm", "dir/lib/a.mlm", "dir/b.mlm"}
    weights = graph(result).weights
    assert weights["tok.weight"].shape == (256, 48)
    assert {key for key in weights if key.startswith("h.")} == {
        f"h.{name}.linear.{leaf}" for name in ("once", "once_2") for leaf in ("weight", "bias")
    }


def test_an_import_without_a_name_goes_by_its_file() -> None:
    files = {"dir/sizes.mlm": "const width = 40\n"}
    text = 'import "sizes.mlm"\n' + ALL.replace("d: int = 64", "d: int = sizes.width")
    assert graph(sound(text, files)).weights["tok.weight"].shape == (256, 40)


def test_a_file_that_two_import_is_read_once() -> None:
    reads: list[str] = []
    files = {"dir/a.mlm": 'import "c.mlm" as c\n', "dir/b.mlm": 'import "c.mlm" as c\n', "dir/c.mlm": "const x = 1\n"}

    def read(path: str) -> str:
        reads.append(path)
        return read_file(path) if path.startswith("std/") else files[path]

    found = Diagnostics()
    resolve("dir/spec.mlm", 'import "a.mlm" as a\nimport "b.mlm" as b\n' + ALL, found, read=read)
    assert found.items == [] and reads.count("dir/c.mlm") == 1


CIRCLE = {"dir/a.mlm": 'import "b.mlm" as b\n', "dir/b.mlm": 'import "a.mlm" as a\n'}


@pytest.mark.parametrize(
    ("lines", "files", "problems"),
    [
        ('import "no.mlm" as a', {}, ["MLM0101 dir/spec.mlm:1:8"]),
        ('import "spec.mlm" as a', {}, ["MLM0102 dir/spec.mlm:1:8"]),
        ('import "a.mlm" as a', CIRCLE, ["MLM0102 dir/b.mlm:1:8"]),
        ('import "a.mlm" as a', {"dir/a.mlm": "const x = = 1\n"}, ["MLM0001 dir/a.mlm:1:11"]),
        ('import "a.mlm" as a', {"dir/a.mlm": "const x = y\n"}, ["MLM0201 dir/a.mlm:1:11"]),
        ('import "a.mlm" as a\nconst x = a.z', {"dir/a.mlm": "const y = 1\n"}, ["MLM0201 dir/spec.mlm:2:13"]),
        ('import "a.mlm" as a\nimport "b.mlm" as a', {"dir/a.mlm": "", "dir/b.mlm": ""}, ["MLM0104 dir/spec.mlm:2:1"]),
        ('import "a.mlm" as tiny', {"dir/a.mlm": ""}, ["MLM0104 dir/spec.mlm:2:7"]),
    ],
)  # fmt: skip
def test_an_import_that_does_not_go(lines: str, files: dict[str, str], problems: list[str]) -> None:
    _, found = resolved(f"{lines}\n{ALL}", files)
    assert told(found) == problems


# ---- inheritance ----------------------------------------------------------------------------------------------------


def test_a_model_of_other_sizes() -> None:
    text = ALL.replace("model tiny", "model big from base.tiny { param d = 32 }\nmodel unused", 1)
    text = text[: text.index("model unused")] + CLUSTER + TRAIN
    made = graph(sound('import "base.mlm" as base\n' + text, {"dir/base.mlm": MODEL}))
    assert (made.model, made.layers, made.weights["tok.weight"].shape) == ("big", 2, (256, 32))


def test_an_override_reaches_an_inherited_param() -> None:
    text = 'import "base.mlm" as base\nmodel big from base.tiny { param d = 32 }\n' + CLUSTER + TRAIN
    files = {"dir/base.mlm": MODEL}
    made = graph(sound(text, files, overrides=("big.layers=5", "big.d=16")))
    assert (made.layers, made.weights["tok.weight"].shape) == (5, (256, 16))
    _, found = resolved(text, files, overrides=("tiny.layers=5",))
    assert told(found) == ["MLM0112 --set tiny.layers=5:1:1"]


def test_settings_are_inherited_one_by_one() -> None:
    files = {"dir/base.mlm": CLUSTER + TRAIN.replace("train {", "train short {")}
    text = 'import "base.mlm" as base\n' + MODEL
    text += "cluster more from base.box { devices_per_node = 2 }\ntrain from base.short { stop = 99 steps }\n"
    result = sound(text, files)
    assert result.cluster is not None and result.train is not None
    assert (result.cluster.name, result.cluster.world_size) == ("more", 2)
    assert result.cluster.pools[0].device.memory_bytes == 2 * 2**30
    assert (result.train.steps, result.train.batch, result.train.optimizer.lr) == (99, 8, 1e-3)
    changed = sound(text, files, overrides=("train.stop=7 steps", "more.devices_per_node=3"))
    assert changed.train is not None and changed.cluster is not None
    assert (changed.train.steps, changed.cluster.world_size) == (7, 3)


def test_an_override_of_nodes_puts_the_first_pool_in_the_place_of_all() -> None:
    inner = "devices_per_node = 4\n device = A100_SXM_80GB\n intra = nvlink(bandwidth = 300 GB/s per gpu)"
    pools = f"pool old {{ nodes = 2\n {inner} }}\n pool new {{ nodes = 3\n {inner.replace('A100', 'H100')} }}"
    text = MODEL + TRAIN + f"cluster mixed {{ inter = ethernet(bandwidth = 1 GB/s per gpu)\n {pools}\n}}\n"
    whole = sound(text)
    assert whole.cluster is not None and [pool.name for pool in whole.cluster.pools] == ["old", "new"]
    one = sound(text, overrides=("cluster.nodes=1", "mixed.devices_per_node=8")).cluster
    assert one is not None and [(pool.name, pool.nodes, pool.devices_per_node) for pool in one.pools] == [("old", 1, 8)]
    assert one.pools[0].device.name == "A100_SXM_80GB" and one.inter is not None
    found = sound(text, overrides=("cluster.price=2 USD/gpu/hour",)).cluster
    assert found is not None and len(found.pools) == 2


def test_inheritance_goes_through_several_files() -> None:
    files = {
        "dir/a.mlm": CLUSTER,
        "dir/b.mlm": 'import "a.mlm" as a\ncluster middle from a.box { devices_per_node = 2 }\n',
    }
    text = 'import "b.mlm" as b\n' + MODEL + TRAIN + "cluster last from b.middle { price = 1 USD/gpu/hour }\n"
    cluster = sound(text, files).cluster
    assert cluster is not None
    assert (cluster.name, cluster.world_size, cluster.usd_per_device_hour) == ("last", 2, 1.0)


@pytest.mark.parametrize(
    ("item", "problem"),
    [
        ("model big from base.tyni { param d = 32 }", "MLM0108"),
        ("model big from bas.tiny { param d = 32 }", "MLM0108"),
        ("model big from base.tiny { param width = 32 }", "MLM0214"),
        ("model big from base.tiny { param d = 32\n  input more: int[B, S] }", "MLM0109"),
        ("model big from big { }", "MLM0110"),
    ],
)
def test_inheritance_that_does_not_go(item: str, problem: str) -> None:
    _, found = resolved(f'import "base.mlm" as base\n{item}\n{CLUSTER}{TRAIN}', {"dir/base.mlm": MODEL})
    assert [d.code for d in found.items] == [problem]
    assert found.items[0].span is not None and found.items[0].span.line in (2, 3)


# ---- the whole ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("without", "word"), [(MODEL, "model"), (CLUSTER, "cluster"), (TRAIN, "train")], ids=["model", "cluster", "train"]
)
def test_a_missing_item(without: str, word: str) -> None:
    result, found = resolved(ALL.replace(without, ""))
    assert told(found) == ["MLM0105 dir/spec.mlm:1:1"] and f"`{word}`" in found.items[0].message
    assert result.spec is None


@pytest.mark.parametrize("extra", [MODEL.replace("tiny", "tiny2"), CLUSTER.replace("box", "box2"), TRAIN])
def test_an_item_too_many(extra: str) -> None:
    _, found = resolved(ALL + extra)
    assert [d.code for d in found.items] == ["MLM0106"] and found.items[0].secondary


def test_the_plan_may_be_missing() -> None:
    assert sound(ALL.replace(PLAN, "")).plan == sound(ALL.replace(PLAN, "plan { }\n")).plan


def test_parts_resolve_without_one_another() -> None:
    result, found = resolved(ALL.replace("64 tok", "64").replace("d: int = 64", "d: int = wide"))
    assert [d.code for d in found.items] == ["MLM0305"]  # the model's own are the builder's
    assert (result.train, result.spec) == (None, None)
    assert result.cluster is not None and result.plan is not None and result.model is not None


def test_the_fingerprint_is_of_files_and_overrides() -> None:
    files = {"dir/a.mlm": "const x = 1\n"}
    text = 'import "a.mlm" as a\n' + ALL
    prints = [
        sound(text, files).sha256,
        sound(text + "# more\n", files).sha256,
        sound(text, {"dir/a.mlm": "const x = 2\n"}).sha256,
        sound(text, files, overrides=("tiny.d=64",)).sha256,
    ]
    assert len(set(prints)) == 4
    assert prints[0] == sound(text, files).sha256 == sound("\ufeff" + text, files).sha256
    assert prints[0] == sound(text, files, pins=("tensor=1",)).sha256
