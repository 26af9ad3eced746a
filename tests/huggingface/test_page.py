"""docs/huggingface.md names what there is; the family files agree with the shipped specs; no code knows a family."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mlmdsl.cli import main
from mlmdsl.compile import compile_spec
from mlmdsl.huggingface.config import recognise
from mlmdsl.huggingface.families import FOLDER, families

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "huggingface.md"
HEAD = "| family | model_type | class of transformers |\n| --- | --- | --- |\n"

SHIPPED = {
    "bert_large": "bert",
    "t5_11b": "t5",
    "t5_v1p1_xxl": "t5",
    "bloom_7b": "bloom",
    "deepseek_v3": "deepseek_v3",
    "falcon_7b": "falcon",
    "gemma2_27b": "gemma2",
    "gemma_2b": "gemma",
    "gpt2_124m": "gpt2",
    "gpt3_175b": "gpt2",
    "llama2_70b": "llama",
    "gpt_neox_20b": "gpt_neox",
    "llama3_405b": "llama",
    "llama3p1_8b": "llama",
    "llama3p2_1b": "llama",
    "mistral_7b": "mistral",
    "mixtral_8x7b": "mixtral",
    "mpt_7b": "mpt",
    "olmo_7b": "olmo",
    "qwen2p5_7b": "qwen2",
    "olmo2_7b": "olmo2",
    "pythia_6p9b": "gpt_neox",
    "qwen3_0p6b": "qwen3",
    "qwen3_30b_a3b": "qwen3_moe",
    "qwen3_32b": "qwen3",
}


def test_the_page_lists_every_family(request: pytest.FixtureRequest) -> None:
    rows = "".join(
        f"| [{name}](../mlmdsl/huggingface/families/{name}.toml) | {', '.join(family.model_types)} | {family.architecture} |\n"
        for name, family in families().items()
    )
    before, _, after = PAGE.read_text(encoding="utf-8").partition(HEAD)
    text = before + HEAD + rows + after[after.index("\n\n") + 1 if after[0] == "|" else 0 :]
    if request.config.getoption("--update-golden"):
        PAGE.write_text(text, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == text, "pytest tests/huggingface/test_page.py --update-golden"


def test_the_page_explains_every_table() -> None:
    written = {found for path in FOLDER.glob("*.toml") for found in re.findall(r"^\[+(\w+)\]+", path.read_text("utf-8"), re.M)}
    page = PAGE.read_text(encoding="utf-8")
    explained = set(re.findall(r"\[(\w+)\]", page[page.index("| table") :]))
    assert written <= explained, written - explained


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_specs_are_recognised(name: str) -> None:
    path = ROOT / "specs" / "models" / f"{name}.mlm"
    graph = compile_spec(path.read_text(encoding="utf-8"), path=str(path), until="graph").graph
    assert graph is not None
    found = recognise(graph)
    assert found.family.name == SHIPPED[name] and found.graph.parameters == graph.parameters


@pytest.mark.parametrize("name", families())
def test_the_models_of_families_are_formatted(name: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.mlm"
    path.write_text(families()[name].text, encoding="utf-8")
    assert main(["fmt", "--check", str(path)]) == 0 and main(["check", str(path)]) == 0


def test_no_code_names_a_family() -> None:
    for path in (ROOT / "mlmdsl").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for name in families():
            assert not re.search(rf"[\"']{name}[\"']", text), (path, name)
