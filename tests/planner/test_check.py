"""Constraints that contradict the model, the batch, the cluster or each other: what the table of diagnostics does not show."""

from __future__ import annotations

import pytest

from mlmdsl.compile import compile_spec
from mlmdsl.diagnostics import Diagnostic, MlmError, PlanError, SpecError
from mlmdsl.grammar.constraints import ORDERS
from mlmdsl.planner.schedule import V_SHAPED
from tests.parity.models import OBJECTIVES, SETTINGS, small_model
from tests.planner.small import text_of


def checked(*plan: str, text: str | None = None, **changes: int | str) -> tuple[Diagnostic, ...]:
    """Everything that the passes before the search say."""
    source = text or text_of(*plan, **changes)  # pyright: ignore[reportArgumentType]
    try:
        return compile_spec(source, path="/specs/x.mlm", until="graph").diagnostics
    except MlmError as problem:
        return tuple(problem.diagnostics)


def one(*plan: str, **changes: int | str) -> Diagnostic:
    (found,) = checked(*plan, **changes)
    return found


CONTRADICTIONS = {
    # heads: the model has 8, of them 4 for keys and values
    ("pin tensor = 8",): ("MLM0412", "tensor = 8 cannot split kv_heads = 4", "pin tensor = 4, or less"),
    # layers: the model has 6
    ("pin pipeline = 4", "pin interleave = 2"): ("MLM0414", "6 layers cannot fill 4 x 2 virtual stages", "6 is the most"),
    ("pin interleave = 8",): ("MLM0414", "6 layers cannot fill 1 x 8 virtual stages", "6 is the most"),
    ("pin pipeline = 8",): ("MLM0414", "6 layers cannot fill 8 stages", "a stage has a layer at least"),
    ("pin stages = [1, 2]",): ("MLM0417", "the stages hold 3 layers, the model has 6", "they have to add up to 6"),
    ("pin stages = [1, 2, 3]", "pin interleave = 2"): ("MLM0417", "3 stages are given for 2", "there is one number for"),
    ("pin stages = [1, 2, 3]", "pin pipeline = 2"): ("MLM0417", "3 stages are given for 2", "there is one number for"),
    # devices: 8, in two nodes
    ("pin pipeline = 3",): ("MLM0415", "pipeline 3 does not fit 8 devices", "multiply to 8"),
    ("pin data = 16",): ("MLM0415", "data 16 does not fit 8 devices", "multiply to 8"),
    ("pin tensor = 2", "pin context = 1", "pin pipeline = 2", "pin data = 1"): (
        "MLM0415", "tensor 2 x context 1 x pipeline 2 x data 1 does not fit 8 devices", "multiply to 8",
    ),
    # batch: 16
    ("pin micro_batch = 3",): ("MLM0416", "a batch of 16 cannot be split into 1 x 3 sequences", "divide the batch"),
    ("pin data = 8", "pin micro_batch = 4"): ("MLM0416", "a batch of 16 cannot be split into 8 x 4 sequences", "divide"),
    # schedules
    ("pin pipeline = 4", "pin data = 2", "pin micro_batch = 4", "pin schedule = 1f1b"): (
        "MLM0419", "1f1b over 4 stages cannot run 2 micro-batches", "a multiple of 4",
    ),
    ("pin schedule = gpipe", "pin interleave = 2"): (
        "MLM0420", "schedule = gpipe does not go with interleave = 2", "the others 1",
    ),
    ("pin schedule = interleaved_1f1b", "pin interleave = 1"): (
        "MLM0420", "schedule = interleaved_1f1b does not go with interleave = 1", "2 or more",
    ),
    ("pin recompute = [full, none]",): (
        "MLM0428", "recompute lists 2 layers, and the model has 6", "one word for each layer",
    ),
    ("pin schedule = zb_v", "pin recompute = [none, full, none, none, none, none]"): (
        "MLM0420", "schedule = zb_v does not go with recompute = full", "recompute is none",
    ),
    # axes that take their ranks from others
    ("pin replicate = 2", "pin zero = 0"): (
        "MLM0424", "replicate = 2 copies sharded weights, and zero = 0 shards none", "pin zero = 3",
    ),
    ("pin replicate = 3", "pin data = 4"): ("MLM0424", "replicate = 3 does not divide data = 4", "it has to divide data"),
    ("pin replicate = 4", "pin data = 4", "pin context = 1"): (
        "MLM0424", "replicate = 4 leaves one rank to share each copy", "leave ZeRO ranks",
    ),
    ("pin expert = 4",): ("MLM0427", "expert = 4, and the model has no experts", "take the pin away"),
    # rules
    ("pin zero = 3", "forbid zero == 3"): ("MLM0422", "`forbid zero == 3` contradicts a pin", "change one of the two"),
    ("pin tensor = 2", "pin data = 4", "require tensor * data <= 4"): (
        "MLM0422", "`require tensor * data <= 4` contradicts a pin", "change one of the two",
    ),
    ("require recompute == full", "forbid recompute in [full, selective]"): (
        "MLM0422", "`forbid recompute in [full, selective]` leaves no value for recompute", "change one of the rules",
    ),
    ("require tensor == 3",): ("MLM0422", "`require tensor == 3` leaves no value for tensor", "change one of the rules"),
    ("require micro_batch > 16",): ("MLM0422", "`require micro_batch > 16` leaves no value for micro_batch", ""),
    ("require interleave > 6",): ("MLM0422", "`require interleave > 6` leaves no value for interleave", ""),
    ("require sequence_parallel", "forbid sequence_parallel"): (
        "MLM0422", "`forbid sequence_parallel` leaves no value for sequence_parallel", "",
    ),
    ("require schedule == gpipe", "require schedule != gpipe"): (
        "MLM0422", "`require schedule != gpipe` leaves no value for schedule", "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("plan", CONTRADICTIONS, ids=" | ".join)
def test_a_contradiction_is_said_once(plan: tuple[str, ...]) -> None:
    code, message, help = CONTRADICTIONS[plan]
    found = [item for item in checked(*plan) if item.code == code]
    assert [item.message for item in found] == [message]
    assert help in found[0].help and found[0].span is not None
    if len(plan) > 1:
        assert len({item.code for item in checked(*plan)}) == 1


HARMLESS = (
    ("pin tensor = 4",),
    ("pin pipeline = 2", "pin interleave = 3"),
    ("pin stages = [1, 2, 3]", "pin interleave = 3"),
    ("pin stages = [2, 4]", "pin pipeline = 2"),
    ("pin data = 8", "pin micro_batch = 2"),
    ("pin pipeline = 4", "pin data = 2", "pin micro_batch = 4", "pin schedule = gpipe"),
    ("pin pipeline = 4", "pin data = 2", "pin micro_batch = 8", "pin schedule = interleaved_1f1b"),
    ("pin context = 2", "pin expert = 1"),
    ("pin tensor = 2", "pin pipeline = 2", "pin data = 1"),  # two ranks are left for context
    ("pin zero = 3", "require zero == 3 and memory < 1 KiB"),  # what it costs is not judged here
    ("pin tensor = 2", "require tensor == 2 or data == 3"),
    ("require pipeline <= 4", "require pipeline > 2"),
    ("require stages == [3, 3]",),
    ("prefer tensor == 3", "avoid tensor in {1, 2, 4, 8}"),  # wishes may be vain
)


@pytest.mark.parametrize("plan", HARMLESS, ids=" | ".join)
def test_nothing_is_said_of_what_may_hold(plan: tuple[str, ...]) -> None:
    assert checked(*plan) == ()


def test_where_a_pin_and_a_batch_were_written() -> None:
    found = one("pin data = 8", "pin micro_batch = 4")
    assert [label.text for label in found.secondary] == ["data is pinned here", "the batch"]
    found = one("pin pipeline = 4", "pin data = 2", "pin micro_batch = 4", "pin schedule = 1f1b")
    assert [label.text for label in found.secondary] == [
        "pipeline is pinned here",
        "data is pinned here",
        "micro_batch is pinned here",
        "the batch",
    ]


def test_a_sequence_that_tensor_ranks_cannot_split() -> None:
    """512 tokens in the small spec; here one less."""
    text = text_of("pin tensor = 2", "pin sequence_parallel = true").replace("seq_len = 512 tok", "seq_len = 511 tok")
    (found,) = checked(text=text)
    assert (found.code, found.message) == ("MLM0418", "tensor = 2 cannot split a sequence of 511")
    assert [label.text for label in found.secondary] == ["tensor is pinned here", "the sequence"]


def test_a_sequence_that_context_ranks_cannot_split() -> None:
    """512 tokens in the small spec; here as many as two ranks can split but not two tensor ranks after them."""
    pins = ("pin tensor = 4", "pin context = 2", "pin sequence_parallel = true")
    (found,) = checked(text=text_of(*pins).replace("seq_len = 512 tok", "seq_len = 500 tok"))
    assert (found.code, found.message) == ("MLM0426", "context = 2 cannot split a sequence of 500")
    assert [label.text for label in found.secondary] == ["the sequence", "tensor is pinned here"]


def test_an_odd_vocabulary_is_a_warning() -> None:
    text = text_of("pin tensor = 4").replace("2048", "2050")
    (found,) = checked(text=text)
    assert (found.code, found.severity) == ("MLM0413", "warning")
    assert "vocab = 2_052 would be split" in found.help


def test_every_contradiction_is_said_at_once() -> None:
    found = checked("pin tensor = 8", "pin pipeline = 8", "pin micro_batch = 3", "pin expert = 2", "require zero == 4")
    assert {item.code for item in found} == {"MLM0427", "MLM0412", "MLM0414", "MLM0415", "MLM0416", "MLM0422"}


@pytest.mark.parametrize(
    ("pins", "message", "help"),
    [
        (["expert=3"], "expert = 3 cannot share out 4 experts", "expert has to divide 4"),
        (["expert=4", "data=2"], "expert = 4 cannot be taken out of 2 replicas", "expert has to divide data * context"),
    ],
)
def test_experts_are_shared_out_evenly(pins: list[str], message: str, help: str) -> None:
    overrides = ("cluster.devices_per_node=8",)
    with pytest.raises(SpecError) as refused:
        compile_spec(small_model("mixtral") + SETTINGS, path="/specs/x.mlm", overrides=overrides, pins=pins, until="plan")
    (found,) = refused.value.diagnostics
    assert (found.code, found.message, found.help) == ("MLM0427", message, help)


def test_experts_are_shared_over_whole_sequences_where_stages_lie_between() -> None:
    """Two of six replicas of three context ranks: said at the pins, or by the search where the degree is free."""
    pins = ["data=2", "context=3", "pipeline=1", f"order={ORDERS[1]}"]
    text, overrides = small_model("mixtral") + SETTINGS, ("cluster.devices_per_node=6", "train.seq_len=48 tok")
    with pytest.raises(SpecError) as refused:
        compile_spec(text, path="/specs/x.mlm", overrides=overrides, pins=[*pins, "expert=2"], until="plan")
    (found,) = refused.value.diagnostics
    assert (found.code, found.message) == (
        "MLM0427", "expert = 2 takes uneven parts of context = 3 where stages lie between",
    )  # fmt: skip
    plan = compile_spec(text, path="/specs/x.mlm", overrides=overrides, pins=pins, until="plan").plan
    assert plan is not None and plan.plan.expert == 1
    assert [r.count for r in plan.search.rejected if "expert = 2 takes uneven parts of context = 3" in r.closest] == [1]


def test_experts_may_be_shared_over_parts_of_a_sequence() -> None:
    pins = ["expert=4", "data=2", "context=2", "tensor=1", "pipeline=1"]
    overrides = ("cluster.devices_per_node=4",)
    done = compile_spec(small_model("mixtral") + SETTINGS, path="/specs/x.mlm", overrides=overrides, pins=pins, until="plan")
    assert done.plan is not None and done.plan.plan.expert == 4


def t5(*plan: str) -> str:
    """A small encoder-decoder."""
    settings = SETTINGS.replace("next_token()", OBJECTIVES["t5"])
    return f"{small_model('t5')}{settings}\nplan {{\n{chr(10).join(plan)}\n}}\n"


@pytest.mark.parametrize("schedule", V_SHAPED)
def test_a_decoder_behind_an_encoder_takes_no_backward_passes_apart(schedule: str) -> None:
    (found,) = checked(text=t5(f"pin schedule = {schedule}"))
    assert found.code == "MLM0420" and found.message.startswith(
        f"schedule = {schedule} does not go with a model that begins anew"
    )
    assert found.span is not None and [label.text for label in found.secondary] == ["made of weights alone"]


def test_nor_is_it_offered_any() -> None:
    asked = t5("pin pipeline = 2", "pin tensor = 1", "pin interleave = 2", "forbid schedule == interleaved_1f1b")
    with pytest.raises(PlanError):
        compile_spec(asked, path="/specs/x.mlm")
