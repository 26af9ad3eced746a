"""The statements of a model or block, evaluated: tensors become nodes, block calls are inlined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from mlmdsl.diagnostics import Label, Span
from mlmdsl.grammar import syntax as s
from mlmdsl.grammar.evaluate import POISON, Evaluator, Poison, argument_names, did_you_mean, kind_of
from mlmdsl.grammar.library import shipped
from mlmdsl.grammar.spec import BlockSource
from mlmdsl.graph.arguments import Given, bind_tensors, check_scalar, match_dims, undivided
from mlmdsl.graph.calls import OPERATORS, SIGNATURES, Signature
from mlmdsl.graph.graph import Carried, Node, Scalar
from mlmdsl.graph.ops import CATALOGUE
from mlmdsl.graph.ops.base import ShapeProblem
from mlmdsl.graph.state import MAX_STATEMENTS, State
from mlmdsl.graph.tensor import TensorType, Weight
from mlmdsl.graph.values import Scope, ScopeRef, Symbol, TensorValue, WeightRef
from mlmdsl.graph.walk import assigned_names, capitalised, dotted, mentions, nodes_in, snake

MAX_CALLS = 40  # blocks called within blocks
MAX_UNROLLED = 1024  # passes of a repeat inside a block, which is written out


class Body(Evaluator):
    """One block call (or the model itself): its variables, and the names that it can call."""

    def __init__(self, state: State, scope: dict[str, Any], blocks: Mapping[str, str], names: Scope, *, top: bool = False):
        super().__init__(scope, state.diagnostics)
        self.variables = scope
        self.state, self.blocks, self.names, self.top = state, blocks, names, top
        self.outputs: tuple[Any, ...] | None = None
        self.output_span: Span | None = None  # of the first output's expression
        self.chain: tuple[str, ...] = ()  # the blocks being called, by their qualified names
        self.origin: Span | None = None  # the call in the user's own file, while inside a shipped block
        self._expected: list[s.Expect] = []
        self._target: str | None = None  # what the call being evaluated is assigned to
        self._transparent = False  # the block call being evaluated adds no name

    def poison(self, code: str, message: str, span: Span, **more: Any) -> Poison:
        """What is wrong inside a shipped block is shown at the call of it, with the place inside as the other half."""
        self.state.mistakes += 1
        if self.origin is not None and shipped(span.file):
            others = [label for label in more.pop("secondary", ()) if not shipped(label.span.file)]
            inside = Label(span, more.pop("label", "") or "inside the shipped block")
            return super().poison(code, message, self.origin, secondary=(inside, *others), **more)
        return super().poison(code, message, span, **more)

    # ---- statements -------------------------------------------------------------------------------------------------

    def run(self, body: Sequence[s.Statement]) -> None:
        for statement in body:
            self._statement(statement, body)

    def _statement(self, statement: s.Statement, body: Sequence[s.Statement]) -> None:
        if self.state.spent:
            return
        self.state.statements += 1
        if self.state.spent:
            message = f"written out, the model has more than {MAX_STATEMENTS:_} statements"
            self.poison("MLM0523", message, self.origin or statement.span, help="a repeat of the model itself stays folded")
            return
        match statement:
            case s.Const() | s.Param():
                self.variables[statement.name] = self.defined(statement)
            case s.Input():
                self._input(statement)
            case s.Assign():
                self._assign(statement)
            case s.Repeat():
                self._repeat(statement)
            case s.If():
                self._if(statement)
            case s.Output():
                self.outputs = tuple(self.assigned(expr, None) for expr in statement.values)
                self.output_span = statement.values[0].span
            case s.Expect() if self.top:
                self._expected.append(statement)
            case s.Expect():
                self.poison(
                    "MLM0007", "`expect` stands in a model", statement.span, help="move it to the model: expect params == ..."
                )

    def assigned(self, expr: s.Expr, target: str | None) -> Any:
        """The value of an expression that is assigned to `target` as a whole."""
        self._target = target
        try:
            return self.value(expr)
        finally:
            self._target = None

    def _take_target(self) -> str | None:
        """The name for the outermost operation; those inside have none."""
        target, self._target = self._target, None
        return target

    def _input(self, statement: s.Input) -> None:
        kind = statement.type
        if not self.top:
            self.poison("MLM0514", "only a model has inputs", statement.span, help="a block takes its values as arguments")
            return
        if kind.dims is None or kind.base not in (None, "int"):
            self.poison("MLM0515", "an input is a tensor", kind.span, help=f"write input {statement.name}: int[B, S]")
            self.variables[statement.name] = POISON
            return
        shape = tuple(self._dim(dim) for dim in kind.dims)
        if POISON in shape:
            self.variables[statement.name] = POISON
            return
        type = TensorType("int" if kind.base == "int" else "float", shape)
        path = self.names.value(statement.name)
        self.state.add(Node(path, "input", (), type, variable=statement.name, span=statement.span))
        self.state.inputs.append(path)
        self.variables[statement.name] = TensorValue(path, type, statement.span)

    def _dim(self, expr: s.Expr) -> Any:
        """A dim of an input: a known number, or a symbol that it introduces."""
        if isinstance(expr, s.Name) and not isinstance(self.variables.get(expr.name), int):
            self.variables.setdefault(expr.name, Symbol(expr.name))
            return expr.name
        value = self.value(expr)
        if value is POISON or (isinstance(value, int) and value >= 1):
            return value
        return self.poison("MLM0515", f"a dim is a positive integer, not {kind_of(value)}", expr.span)

    def _assign(self, statement: s.Assign) -> None:
        value = self.assigned(statement.value, statement.names[0])
        if len(statement.names) == 1:
            self.variables[statement.names[0]] = value
            return
        values = cast(tuple[Any, ...], value) if isinstance(value, tuple) else (value,)
        if value is POISON:
            self.variables |= dict.fromkeys(statement.names, POISON)
        elif len(values) != len(statement.names):
            count = len(values)
            self.poison("MLM0516", f"{len(statement.names)} names for {count} value{'s' * (count != 1)}", statement.span)
            self.variables |= dict.fromkeys(statement.names, POISON)
        else:
            self.variables |= dict(zip(statement.names, values, strict=True))

    def _if(self, statement: s.If) -> None:
        condition = self.value(statement.condition)
        if condition is POISON:
            self._poison_assigned((statement,))
            return
        if not isinstance(condition, bool):
            self.poison("MLM0517", f"`if` wants a truth value, not {_kind(condition)}", statement.condition.span)
            self._poison_assigned((statement,))
            return
        self.run(statement.then if condition else statement.otherwise)

    # ---- repeat -----------------------------------------------------------------------------------------------------

    def _repeat(self, statement: s.Repeat) -> None:
        count: Any = self.value(statement.count)
        if count is not POISON and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            self.poison("MLM0518", f"a repeat runs a positive number of times, not {_shown(count)}", statement.count.span)
            count = POISON
        if count is POISON:
            count = 1  # for the mistakes of its body
        name = self.names.owner(statement.name or "layers").removeprefix(self.names.prefix)
        if self.top and not self.names.region:
            self._folded(statement, name, count)
        else:
            self._unrolled(statement, name, count)

    def _poison_assigned(self, body: Sequence[s.Statement]) -> None:
        """What statements that cannot be run would have given."""
        self.variables |= dict.fromkeys(assigned_names(body), POISON)
        if self.outputs is None and any(isinstance(part, s.Output) for statement in body for part in nodes_in(statement)):
            self.outputs = (POISON,)

    def unbound(self, block: s.Block) -> None:
        """Runs a block that no sound call reaches, for the mistakes that do not depend on its arguments."""
        for formal in block.formals:
            if formal.default is not None:
                self.value(formal.default)
            dims = formal.type.dims or () if formal.type else ()
            for name in (formal.name, *(dim.name for dim in dims if isinstance(dim, s.Name))):
                self.variables.setdefault(name, POISON)
        self.run(block.body)

    def _unrolled(self, statement: s.Repeat, name: str, count: int) -> None:
        if count > MAX_UNROLLED:
            self.poison(
                "MLM0518",
                f"a repeat inside a block is written out, {count} times",
                statement.count.span,
                help=f"{MAX_UNROLLED} is the most",
            )
            return
        outer = self.names
        before = self.state.mistakes
        for index in range(count):
            if self.state.spent or self.state.mistakes > before:  # the next pass has the same mistakes
                break
            self.names = Scope(f"{outer.prefix}{name}.{index}.", outer.region, outer.calls)
            self._pass(statement)
        self.names = outer

    def _folded(self, statement: s.Repeat, name: str, count: int) -> None:
        """One pass stands for all: variables of before that the body assigns are carried."""
        self.state.close_straight()
        outer, self.names = self.names, Scope(f"{name}.", name)
        before: dict[str, TensorValue] = {}
        entries: dict[str, TensorValue] = {}
        for variable in dict.fromkeys(assigned_names(statement.body)):
            value = self.variables.get(variable)
            if isinstance(value, TensorValue):
                before[variable] = value
                path = self.names.value(variable)
                self.state.add(Node(path, "carry", (), value.type, variable=variable, span=statement.span))
                entries[variable] = TensorValue(path, value.type, value.span)
                self.variables[variable] = entries[variable]
        self._pass(statement)
        carried = [c for v, old in before.items() if (c := self._carried(v, old, entries[v], name, statement)) is not None]
        self.names = outer
        self.state.close_repeat(name, count, carried)

    def _pass(self, statement: s.Repeat) -> None:
        """The body once; a block call that is the body's only owner of parameters adds no name."""
        owners = [call for part in statement.body for call in capitalised(part)]
        for part in statement.body:
            only = len(owners) == 1 and getattr(part, "value", None) is owners[0]
            self._transparent = isinstance(part, s.Assign) and only and part.names[0] in self.variables
            self._statement(part, statement.body)
            self._transparent = False

    def _carried(
        self, variable: str, before: TensorValue, entry: TensorValue, name: str, statement: s.Repeat
    ) -> Carried | None:
        after = self.variables[variable]
        if after is POISON:
            return None
        if not isinstance(after, TensorValue) or not after.path.startswith(f"{name}."):
            self.poison(
                "MLM0519",
                f"`{variable}` is not computed in the repeat that assigns it",
                statement.span,
                help="compute it in the body",
            )
            return None
        if after.type != before.type:
            self.poison(
                "MLM0505",
                f"`{variable}` goes into the repeat as {before.type} and comes out as {after.type}",
                after.span,
                label=f"{after.type}",
                secondary=(Label(before.span, f"{before.type}"),),
                help="every pass has to give what the next one takes",
            )
            self.variables[variable] = POISON
            return None
        return Carried(variable, entry.path, before.path, after.path)

    # ---- calls ------------------------------------------------------------------------------------------------------

    def call(self, expr: s.Call) -> Any:
        target, transparent = self._take_target(), self._transparent
        self._transparent = False
        name = dotted(expr.function)
        if name is None:
            return self.poison("MLM0203", "this cannot be called", expr.function.span)
        if self.variables.get(name.partition(".")[0]) is POISON:
            return POISON
        if name in self.blocks:
            return self._block(expr, self.state.model.blocks[self.blocks[name]], target, transparent)
        if name in SIGNATURES:
            return self._primitive(expr, name, SIGNATURES[name], target)
        for argument in expr.arguments:  # what is wrong inside is said too
            self.value(argument.value)
        help = did_you_mean(name, [*self.blocks, *SIGNATURES])
        return self.poison("MLM0250", f"there is no block or function `{name}`", expr.function.span, help=help)

    def _given(self, expr: s.Call) -> Given:
        positional, keywords, spans = self.arguments(expr)
        return Given(dotted(expr.function) or "", positional, keywords, spans, expr.span, argument_names(expr))

    def _block(self, expr: s.Call, source: BlockSource, target: str | None, transparent: bool) -> Any:
        if source.qualified in self.chain:  # reported where blocks are resolved
            return POISON
        if len(self.chain) >= MAX_CALLS:
            return self.poison("MLM0011", f"blocks are called within blocks more than {MAX_CALLS} deep", expr.span)
        given = self._given(expr)
        names = self._inner_names(source.block.name, target, transparent)
        inner = Body(self.state, dict(source.values), source.blocks, names)
        inner.chain = (*self.chain, source.qualified)
        if shipped(source.qualified):
            inner.origin = self.origin or expr.span
        sound = inner.formals(source.block.formals, given.positional, given.keywords, expr.span, given)
        if not sound:
            return POISON
        inner.run(source.block.body)
        self.state.called.add(source.qualified)
        if inner.outputs is None:
            if self.state.spent:
                return POISON
            span = source.block.name_span
            return self.poison(
                "MLM0510", f"the block `{source.block.name}` has no output", span, help="end it with `output` and a value"
            )
        outputs = tuple(self._renamed(value, names, expr.span) for value in inner.outputs)
        return outputs[0] if len(outputs) == 1 else outputs

    def _renamed(self, value: Any, names: Scope, span: Span) -> Any:
        """A block's output as its caller sees it: `attn.query.weight` goes by the call's name."""
        if not isinstance(value, TensorValue):
            return value
        return TensorValue(value.path, value.type, span, names.prefix.removesuffix(".") or None)

    def _inner_names(self, block: str, target: str | None, transparent: bool) -> Scope:
        outer = self.names
        if transparent:
            return replace(outer, calls=(*outer.calls, (outer.prefix.removesuffix("."), block)))
        path = outer.owner(target or snake(block))
        return Scope(f"{path}.", outer.region, (*outer.calls, (path, block)))

    def formals(
        self,
        formals: Sequence[s.Formal],
        positional: Sequence[Any],
        keywords: Mapping[str, Any],
        span: Span,
        given: Given | None = None,
    ) -> bool:
        """Binds arguments to a block's formals; False where one is wrong (reported)."""
        given = given or Given("", tuple(positional), keywords, {}, span)
        bound = given.bind([f.name for f in formals], self)
        sound = bound is not None
        for formal in formals:
            if bound is None or formal.name not in bound:
                value = self._default(formal, given) if sound else POISON  # a default may speak of what is wrong
            else:
                value = bound[formal.name]
            if value is not POISON and formal.type is not None:
                value = self._typed(formal, value, given)
            self.variables[formal.name] = value
            sound = sound and value is not POISON
        return sound

    def _default(self, formal: s.Formal, given: Given) -> Any:
        if formal.default is not None:
            return self.value(formal.default)
        return self.poison(
            "MLM0253", f"`{given.name}` needs `{formal.name}`", given.span, secondary=(Label(formal.span, "asked for here"),)
        )

    def _typed(self, formal: s.Formal, value: Any, given: Given) -> Any:
        assert formal.type is not None
        where = given.spans.get(formal.name, given.span)
        if formal.type.dims is not None:
            return match_dims(self, formal, value, where)
        if formal.name not in given.spans and undivided(self, formal, value, given):
            return POISON
        return check_scalar(self, formal, value, where)

    # ---- primitive operations ---------------------------------------------------------------------------------------

    def _primitive(self, expr: s.Call, name: str, signature: Signature, target: str | None) -> Any:
        given = self._given(expr)
        tensors, bound = bind_tensors(self, given, signature)
        if tensors is None or bound is None:
            return POISON
        scope = self.names.owner(target or snake(name)) if signature.owns else None
        weight = bound.pop("weight", None)
        bias = bound.pop("bias", None) if signature.bias else None
        if bias is None:
            bias = weight is None
        sizes = self._sizes(signature, bound, weight, given)
        if sizes is None:
            return POISON
        path = self.names.value(scope.removeprefix(self.names.prefix) if scope else target or name)
        made = self._node(expr.span, path, signature.op, tensors, bound, scope, weight, target or "", given)
        if made is POISON or not signature.bias or not bias:
            return made
        return self._node(expr.span, f"{scope}.bias", "bias", (made,), {}, scope, None, target or "", given)

    def _sizes(self, signature: Signature, bound: dict[str, Any], weight: Any, given: Given) -> dict[str, Any] | None:
        """Sizes that a tied weight decides: [out, in] of a linear, [vocab, dim] of an embedding."""
        names = {"linear": ("out",), "embedding": ("vocab", "dim")}.get(signature.op, ())
        for index, name in enumerate(names):
            if bound[name] is None and isinstance(weight, WeightRef):
                bound[name] = weight.shape[index]
            elif bound[name] is None:
                self.poison(
                    "MLM0253", f"`{given.name}` needs `{name}`", given.span, help=f"write {given.name}(..., {name} = ...)"
                )
                return None
            elif isinstance(weight, WeightRef) and bound[name] != weight.shape[index]:
                message = f"`{name}` = {bound[name]} does not fit the weight `{weight.key}` of shape {list(weight.shape)}"
                self.poison(
                    "MLM0506", message, given.spans.get(name, given.span), help=f"leave `{name}` out: the weight decides it"
                )
                return None
        return bound

    def _node(
        self,
        span: Span,
        path: str,
        op: str,
        inputs: Sequence[TensorValue],
        attributes: Mapping[str, Scalar],
        scope: str | None,
        weight: Any,
        variable: str,
        given: Given | None = None,
    ) -> Any:
        """Adds a node, with the weights that it owns or is given."""
        types = tuple(value.type for value in inputs)
        operation = CATALOGUE[op]
        try:
            type = operation.infer(types, attributes)
            specs = operation.weights(types, attributes)
        except ShapeProblem as problem:
            return self._shape_problem(problem, span, inputs, given)
        keys: list[str] = []
        for spec in specs:
            if isinstance(weight, WeightRef):
                if weight.shape != spec.shape:
                    message = f"the weight `{weight.key}` is {list(weight.shape)}, wanted is {list(spec.shape)}"
                    return self.poison("MLM0506", message, span)
                keys.append(weight.key)
                continue
            assert scope is not None
            made = Weight(
                self.names.region,
                f"{scope}.{spec.leaf}".removeprefix(f"{self.names.region}."),
                spec.shape,
                spec.init,
                spec.decay,
                spec.expert,
                spec.balance,
            )
            self.state.weights[made.key] = made
            keys.append(made.key)
        settings = tuple(sorted((k, v) for k, v in attributes.items() if k not in ("std",)))
        paths = tuple(value.path for value in inputs)
        self.state.add(Node(path, op, paths, type, settings, tuple(keys), self.names.calls, variable, self.origin or span))
        return TensorValue(path, type, span, scope)

    def _shape_problem(self, problem: ShapeProblem, span: Span, inputs: Sequence[TensorValue], given: Given | None) -> Any:
        secondary: tuple[Label, ...] = ()
        labels = [(v.span, str(v.type)) for v in inputs]
        if problem.argument is not None and labels:
            secondary = tuple(Label(where, shown) for where, shown in dict.fromkeys(labels) if where != span)
        where = span
        if given is not None and problem.argument is not None:
            where = given.spans.get(problem.argument, span)
        return self.poison(problem.code, str(problem), where, secondary=secondary, help=problem.help)

    # ---- operators --------------------------------------------------------------------------------------------------

    def binary(self, expr: s.Binary) -> Any:
        target = self._take_target()
        left = self.value(expr.left)
        if expr.operator in ("and", "or"):
            return self.logic(expr, left)
        right = self.value(expr.right)
        if left is POISON or right is POISON:
            return POISON
        if isinstance(left, TensorValue) or isinstance(right, TensorValue):
            return self._tensor_operator(expr, left, right, target)
        if isinstance(left, Symbol) or isinstance(right, Symbol):
            return self.poison("MLM0521", "a size that is known only when planning cannot be computed with", expr.span)
        return self.operate(expr, left, right)

    def _tensor_operator(self, expr: s.Binary, left: Any, right: Any, target: str | None) -> Any:
        op = OPERATORS.get(expr.operator)
        both = isinstance(left, TensorValue) and isinstance(right, TensorValue)
        if op is None or not (both or _scalable(expr.operator, left, right)):
            message = f"`{expr.operator}` does not apply to {_kind(left)} and {_kind(right)}"
            return self.poison("MLM0522", message, expr.span, help="tensors have + - * / with tensors, and with numbers")
        if both:
            path = self.names.value(target or op)
            return self._node(expr.span, path, op, (left, right), {}, None, None, target or "")
        if isinstance(left, TensorValue):
            return self._with_number(expr.span, expr.operator, left, right, target)
        return self._number_with(expr, left, right, target)

    def _number_with(self, expr: s.Binary, number: float, tensor: TensorValue, target: str | None) -> Any:
        """`1 - x` is a sum with -x, `1 / x` a product with a reciprocal."""
        if expr.operator == "-":
            return self._with_number(expr.span, "+", self._number_node(expr.span, "scale", tensor, -1.0), number, target)
        if expr.operator == "/":
            inverse = self._node(expr.span, self.names.value("reciprocal"), "reciprocal", (tensor,), {}, None, None, "")
            return self._with_number(expr.span, "*", inverse, number, target)
        return self._with_number(expr.span, expr.operator, tensor, number, target)

    def _with_number(self, span: Span, operator: str, tensor: TensorValue, number: Any, target: str | None) -> Any:
        if operator in "*/":
            return self._number_node(span, "scale", tensor, float(number) if operator == "*" else 1.0 / number, target)
        return self._number_node(span, "offset", tensor, float(number) if operator == "+" else -float(number), target)

    def _number_node(self, span: Span, op: str, tensor: TensorValue, number: float, target: str | None = None) -> Any:
        path, name = self.names.value(target or op), "factor" if op == "scale" else "term"
        return self._node(span, path, op, (tensor,), {name: number}, None, None, target or "")

    def unary(self, expr: s.Unary) -> Any:
        target = self._take_target()
        value = self.value(expr.operand)
        if expr.operator == "-" and isinstance(value, TensorValue):
            return self._number_node(expr.span, "scale", value, -1.0, target)
        return POISON if value is POISON else self.applied(expr, value)

    # ---- names ------------------------------------------------------------------------------------------------------

    def name(self, expr: s.Name) -> Any:
        if expr.name in self.variables:
            return self.variables[expr.name]
        if expr.name in self.blocks or expr.name in SIGNATURES:
            return self.poison("MLM0254", f"`{expr.name}` is called, not named", expr.span, help=f"write {expr.name}(...)")
        return self.poison(
            "MLM0201", f"there is no `{expr.name}` here", expr.span, help=did_you_mean(expr.name, self.variables)
        )

    def attribute(self, expr: s.Attribute) -> Any:
        value = self.value(expr.value)
        scope = value.path if isinstance(value, ScopeRef) else value.scope if isinstance(value, TensorValue) else None
        if not isinstance(value, ScopeRef | TensorValue):
            return POISON if value is POISON else super().attribute(expr)
        path = f"{scope}.{expr.name}"
        if scope is not None and path in self.state.weights:
            return WeightRef(path, self.state.weights[path].shape)
        below = [key for key in self.state.weights if scope is not None and key.startswith(f"{scope}.")]
        if any(key.startswith(f"{path}.") for key in below):
            return ScopeRef(path)
        known = [key.removeprefix(f"{scope}.") for key in below]
        help = did_you_mean(expr.name, known) or (f"it has {', '.join(known[:6])}" if known else "it owns no weights")
        return self.poison("MLM0255", f"there is no weight `{expr.name}` in it", expr.name_span, help=help)

    # ---- expectations -----------------------------------------------------------------------------------------------

    def expectations(self, facts: Mapping[str, int]) -> None:
        """Checks every `expect` with the finished graph's facts in scope."""
        self.variables = self.scope = {**self.variables, **facts}
        for statement in self._expected:
            value = self.value(statement.condition)
            if value is POISON or value is True:
                continue
            found = ", ".join(f"{name} = {fact:_}" for name, fact in facts.items() if mentions(statement.condition, name))
            message = "this expectation fails" + (f": {found}" if found else "")
            self.poison("MLM0520", message, statement.condition.span, help="mend the model, or the number")


def _scalable(operator: str, left: Any, right: Any) -> bool:
    """A tensor and a number, which is no divisor if it is zero."""
    number = right if isinstance(left, TensorValue) else left
    if isinstance(number, bool) or not isinstance(number, int | float):
        return False
    return not (operator == "/" and isinstance(left, TensorValue) and number == 0)


def _kind(value: object) -> str:
    if isinstance(value, TensorValue):
        return f"a tensor {value.type}"
    if isinstance(value, WeightRef):
        return "a weight"
    return kind_of(value)


def _shown(value: object) -> str:
    return str(value) if isinstance(value, int | float) else _kind(value)
