"""Source positions, diagnostics, and the error tree.

    MlmError                  everything a user can cause; carries diagnostics, never a traceback
    ├── SpecError             the text is wrong (exit status 1)
    ├── UsageError            the command line is wrong (exit status 2)
    ├── PlanError             no plan fits, or a saved plan no longer matches (exit status 3)
    └── RunError              training failed (exit status 4)

One `Diagnostic` record feeds the terminal, `--format json`, SARIF and (later) the language server. Codes are stable and
listed in `CODES`; each has a page in docs/diagnostics.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from mlmdsl.frozen import frozen

Severity = Literal["error", "warning"]

MAX_DIAGNOSTICS = 20  # more than a screenful helps nobody; the rest is counted


@frozen
class Span:
    """A piece of source text: 1-based lines and columns, the end column exclusive."""

    file: str
    line: int
    column: int
    end_line: int
    end_column: int

    def to(self, other: Span) -> Span:
        """From the start of this span to the end of `other`."""
        return Span(self.file, self.line, self.column, other.end_line, other.end_column)


@frozen
class Label:
    """A second place in the source that takes part in the contradiction."""

    span: Span
    text: str


@frozen
class Diagnostic:
    """One problem: a stable code, what is wrong, where, and what to write instead."""

    code: str
    message: str
    span: Span | None = None
    label: str = ""
    secondary: tuple[Label, ...] = ()
    help: str = ""
    severity: Severity = "error"


class MlmError(Exception):
    """A problem that the user can mend. `exit_status` is what the command returns."""

    exit_status = 1

    def __init__(self, diagnostics: Iterable[Diagnostic], sources: Mapping[str, str] | None = None):
        self.diagnostics = tuple(diagnostics)
        self.sources = dict(sources or {})  # text of the files that the spans point into
        super().__init__("; ".join(f"{d.code}: {d.message}" for d in self.diagnostics))


class SpecError(MlmError):
    exit_status = 1


class UsageError(MlmError):
    exit_status = 2


class PlanError(MlmError):
    exit_status = 3


class RunError(MlmError):
    exit_status = 4


@dataclass(slots=True)
class Diagnostics:
    """Collects the problems of one run, in source order, without repeats. Passes report here and go on."""

    items: list[Diagnostic] = field(default_factory=list[Diagnostic])
    sources: dict[str, str] = field(default_factory=dict[str, str])  # every file read, by the path that spans name

    def report(
        self,
        code: str,
        message: str,
        span: Span | None = None,
        *,
        label: str = "",
        secondary: tuple[Label, ...] = (),
        help: str = "",
        severity: Severity = "error",
    ) -> None:
        assert code in CODES, code
        item = Diagnostic(code, message, span, label, secondary, help, severity)
        if item not in self.items:
            self.items.append(item)

    @property
    def errors(self) -> tuple[Diagnostic, ...]:
        return tuple(d for d in self.items if d.severity == "error")

    def raise_if_errors(self, kind: type[MlmError] = SpecError) -> None:
        if self.errors:
            raise kind(self.items, self.sources)


CODES: Mapping[str, str] = {
    # 00xx: characters and syntax
    "MLM0001": "a statement that cannot be read",
    "MLM0002": "a missing comma",
    "MLM0003": "a misspelt keyword",
    "MLM0004": "a bracket that is never closed",
    "MLM0005": "a string that is never closed",
    "MLM0006": "a character that means nothing",
    "MLM0007": "a statement in the wrong place",
    "MLM0008": "a closing bracket too many",
    "MLM0009": "a missing `=`",
    "MLM0010": "a word of the language as a name",
    "MLM0011": "nesting too deep",
    "MLM0012": "an edition of the language that is not there",
    # 01xx: files, imports, items
    "MLM0101": "an imported file that is not there",
    "MLM0102": "imports in a circle",
    "MLM0103": "an imported file that is no text",
    "MLM0104": "a name defined twice",
    "MLM0105": "a missing item",
    "MLM0106": "an item too many",
    "MLM0107": "a block that contains itself",
    "MLM0108": "nothing to inherit from",
    "MLM0109": "a statement that an inheriting model cannot have",
    "MLM0110": "items that inherit in a circle",
    "MLM0111": "an option that is no name=value",
    "MLM0112": "an override that finds no place",
    # 02xx: names, types, arguments
    "MLM0201": "an unknown name",
    "MLM0202": "a part of something that has none",
    "MLM0203": "a call of something that is no function",
    "MLM0204": "a positional argument after a named one",
    "MLM0205": "an argument given twice",
    "MLM0206": "an operator that does not apply",
    "MLM0207": "a division by zero",
    "MLM0208": "a number out of reach",
    "MLM0210": "an argument too many",
    "MLM0211": "an unknown setting",
    "MLM0212": "an unknown plan variable",
    "MLM0213": "an unknown objective",
    "MLM0214": "an unknown param of the inherited model",
    "MLM0250": "an unknown block or function",
    "MLM0251": "an unknown argument",
    "MLM0252": "an argument too many",
    "MLM0253": "a missing argument",
    "MLM0254": "a function that is not called",
    "MLM0255": "an unknown weight",
    "MLM0256": "something else where a tensor should stand",
    "MLM0257": "an argument of another type",
    "MLM0258": "an unknown type",
    # 03xx: quantities, units, settings
    "MLM0301": "an unknown unit",
    "MLM0302": "a percentage",
    "MLM0303": "a link that is shared per something else",
    "MLM0304": "a count where a unit should stand",
    "MLM0305": "a missing unit",
    "MLM0306": "a unit of another dimension",
    "MLM0307": "bits for bytes",
    "MLM0308": "a bandwidth without per gpu or per node",
    "MLM0309": "a bandwidth of both directions",
    "MLM0310": "a missing setting",
    "MLM0311": "a setting of another type",
    "MLM0312": "a setting out of range",
    "MLM0313": "an unknown word",
    "MLM0314": "an unknown kind",
    "MLM0315": "a setting given twice",
    "MLM0316": "data that the objective cannot read",
    "MLM0320": "a plan variable of another type",
    "MLM0321": "a rule that is no condition",
    # 04xx: divisibility, contradictions between constraints, model, batch and cluster
    "MLM0401": "a batch that is no multiple of the sequence",
    "MLM0402": "two pins that contradict each other",
    "MLM0410": "a width that the heads do not divide",
    "MLM0411": "key and value heads that do not divide the heads",
    "MLM0412": "tensor cannot split the heads",
    "MLM0413": "tensor cannot split the vocabulary",
    "MLM0414": "more stages than layers",
    "MLM0415": "degrees that do not fit the cluster",
    "MLM0416": "a batch that the data ranks cannot share",
    "MLM0417": "stages that do not hold the model",
    "MLM0418": "a sequence that tensor cannot split",
    "MLM0419": "a schedule without enough micro-batches",
    "MLM0420": "a schedule that does not go with interleave",
    "MLM0422": "a rule that contradicts another constraint",
    "MLM0424": "copies that hybrid sharding cannot make",
    "MLM0425": "a rule on cost without a price",
    "MLM0426": "a sequence that the context axis cannot split",
    "MLM0427": "experts that the expert axis cannot share out",
    "MLM0428": "recomputation of other layers than the model's",
    # 05xx: shapes, the graph, expect
    "MLM0501": "shapes that do not fit together",
    "MLM0502": "integers for floating-point values, or the other way round",
    "MLM0503": "a shape of another form",
    "MLM0504": "an output that the objective cannot use",
    "MLM0505": "a carried value that changes its shape",
    "MLM0506": "a weight that does not fit",
    "MLM0507": "another number of dims",
    "MLM0510": "a missing output",
    "MLM0511": "an output that is no tensor",
    "MLM0512": "a model without input",
    "MLM0513": "a value that is never used",
    "MLM0514": "an input inside a block",
    "MLM0515": "an input that is no tensor",
    "MLM0516": "names and values of different numbers",
    "MLM0517": "a condition that is no truth value",
    "MLM0518": "a repeat that cannot be counted",
    "MLM0519": "a carried value that is not computed",
    "MLM0520": "an expectation that fails",
    "MLM0521": "a computation with an unknown size",
    "MLM0522": "an operator that tensors do not have",
    "MLM0523": "a model of too many statements",
    "MLM0524": "an input that the objective does not feed",
    "MLM0525": "an input that the objective needs",
    "MLM0526": "inputs whose lengths differ under one name",
    "MLM0527": "documents that cannot be kept apart",
    # 06xx: planning and saved plans
    # 07xx: the run: data, tokenizers, checkpoints, processes
    "MLM0601": "no plan fits the memory of the devices",
    "MLM0602": "a rule leaves no plan",
    "MLM0603": "the pins leave no plan",
    "MLM0604": "no plan uses all devices",
    "MLM0620": "the file is not a saved plan",
    "MLM0621": "the saved plan is of another version",
    "MLM0630": "the spec has changed since the plan was made",
    "MLM0700": "no file matches the data pattern",
    "MLM0701": "the data is empty",
    "MLM0702": "the data is not UTF-8",
    "MLM0703": "a line is not valid JSON",
    "MLM0704": "the data has no such field or column",
    "MLM0705": "the data is shorter than one sequence",
    "MLM0706": "a token lies outside the model's vocabulary",
    "MLM0707": "no such Python module to read text from",
    "MLM0708": "a data file cannot be read",
    "MLM0709": "the field or column is not text",
    "MLM0710": "the tokenizer cannot be read",
    "MLM0711": "the tokenizer has no end-of-text token",
    "MLM0712": "the folder for token files cannot be written",
    "MLM0713": "the tokenizer lacks a token that the objective needs",
    "MLM0714": "a record that is no conversation",
    "MLM0715": "a chat template that fails",
    "MLM0720": "a process was killed",
    "MLM0721": "a process failed",
    "MLM0722": "the run was interrupted",
    "MLM0730": "there is nothing to sample from",
    "MLM0731": "a sampling setting is out of range",
    "MLM0732": "a model that does not go on from a prompt",
    "MLM0740": "the program was started with another number of processes",
    "MLM0741": "the folder holds checkpoints of an earlier run",
    "MLM0742": "a rank lost another rank",
    "MLM0743": "there is no whole checkpoint to go on from",
    "MLM0744": "a checkpoint is damaged",
    "MLM0745": "a checkpoint is of another model",
    "MLM0746": "a checkpoint cannot be written",
    "MLM0747": "the batch does not divide over ranks and micro-batches",
    "MLM0750": "the command cannot be carried out as written",
    "MLM0751": "no GPU of a known kind here",
    "MLM0752": "fewer GPUs here than the plan is for",
    "MLM0753": "a plan for several nodes",
    # 08xx: checkpoints of transformers
    "MLM0800": "no checkpoint of transformers",
    "MLM0801": "a checkpoint of pickles only",
    "MLM0802": "a config.json that describes no model",
    "MLM0803": "an unknown model_type",
    "MLM0804": "a variant that the family does not cover",
    "MLM0805": "a damaged file of safetensors",
    "MLM0806": "a weight that the checkpoint lacks",
    "MLM0807": "a weight that the family does not know",
    "MLM0808": "a weight of another shape",
    "MLM0809": "weights in a form that is not read",
    "MLM0810": "a spec of another model than the checkpoint",
    "MLM0811": "a model of no known family",
    "MLM0812": "a folder that cannot be written",
    "MLM0813": "fields of config.json that are not looked at",
    "MLM0814": "nothing to export",
}
