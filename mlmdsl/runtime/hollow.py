"""CPU tensors that have sizes and no memory, and operations on them.

A hollow tensor is to autograd, to hooks and to views what any tensor is; its storage has bytes and no address. What an
operation returns torch's FakeTensorMode says, once for each kind of arguments (sizes, strides, types, settings); from then on
it is looked up. Views are taken as they are: they don't look at values. An operation that no mode sees would look for values
at no address, so that a program is to run under one that answers with `Results.of`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

_FAKE = torch._C._TorchDispatchModeKey.FAKE
_NATIVE = {"profiler"}


class _Shell(Tensor):
    """How torch lets a storage without memory be made."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} asks for the values of a tensor that has none")


@dataclass(frozen=True)
class _New:
    """A result with a storage of its own."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class _Given:
    """A result that is one of the arguments, by its place among their tensors."""

    place: int


@dataclass(frozen=True)
class _View:
    """A result in the storage of one of the arguments."""

    place: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, x: Tensor) -> Tensor:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return x.as_strided(self.size, self.stride, self.offset)


def hollow(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch._C._DisableTorchDispatch(), torch._C._AutoDispatchBelowADInplaceOrView():
        if device.type == "meta":
            return torch.empty_strided(size, stride, dtype=dtype, device=device)
        shell = Tensor._make_wrapper_subclass(_Shell, size, stride, 0, dtype=dtype, device=device)
        return torch.ops.aten.alias.default(shell)


def resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
    """In place of UntypedStorage.resize_, which refuses storages without memory. FSDP2 lets go of all, or takes it back."""
    assert size in (0, storage.nbytes()), "a storage is let go of, or taken back"
    storage.let_go = size == 0  # type: ignore[attr-defined]
    return storage


def size(storage: torch.UntypedStorage) -> int:
    """In place of UntypedStorage.size."""
    return 0 if getattr(storage, "let_go", False) else storage.nbytes()


class Results:
    """What operations return for hollow tensors."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.known: dict[Any, Any] = {}
        self.native: dict[Any, bool] = {}
        self.composite: dict[Any, bool] = {}

    def is_composite(self, func: Any) -> bool:
        """Whether torch has no kernel of it but writes it as other operations, of which some may be views. Within an operation
        of our own, where autograd is done with, it hands such ones on as they are."""
        found = self.composite.get(func)
        if found is None:
            composed, kernel = (
                torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key) for key in ("CompositeImplicitAutograd", "CPU")
            )
            found = self.composite[func] = func.namespace == "aten" and composed and not kernel
        return found

    def of(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        native = self.native.get(func)
        if native is None:
            native = self.native[func] = func.namespace in _NATIVE or func.is_view or torch.Tag.inplace_view in func.tags
        if native or torch._C._get_dispatch_mode(_FAKE) is not None:  # DTensor asks a fake mode of its own
            return func(*args, **kwargs)
        tensors: list[Tensor] = []
        key = (func, _key(args, tensors), _key(tuple(kwargs.items()), tensors) if kwargs else ())
        try:
            made = self.known[key]
        except KeyError:
            made = self.known[key] = self._found(func, args, kwargs)
        return made(tensors)

    def _found(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Callable[[list[Tensor]], Any]:
        """How the results are made out of the arguments' tensors."""
        storages: dict[int, torch.UntypedStorage] = {}
        places: dict[int, int] = {}
        fakes: list[Tensor] = []

        def faked(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            fake = self._fake(x, storages)
            places[id(fake)] = len(fakes)
            fakes.append(fake)
            return fake

        args, kwargs = tree_map(faked, args), tree_map(faked, dict(kwargs))
        with self.mode:
            out = func(*args, **kwargs)
        owners: dict[int, int] = {}
        for place, fake in enumerate(fakes):
            owners.setdefault(fake.untyped_storage()._cdata, place)
        made: set[int] = set()

        def described(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if id(x) in places:
                return _Given(places[id(x)])
            storage = x.untyped_storage()._cdata
            if (owner := owners.get(storage)) is not None:
                assert x.dtype == fakes[owner].dtype, f"{func} looks at a storage as another type"
                return _View(owner, tuple(x.shape), x.stride(), int(x.storage_offset()))
            assert storage not in made and not x.storage_offset(), f"results of {func} share a storage"
            made.add(storage)
            return _New(tuple(x.shape), x.stride(), x.dtype, x.device)

        return _maker(tree_map(described, out))

    def _fake(self, x: Tensor, storages: dict[int, torch.UntypedStorage]) -> FakeTensor:
        """A fake tensor like x, of the storage that stands for x's."""
        with _disable_current_modes():
            whole = x.untyped_storage()
            if whole._cdata not in storages:
                storages[whole._cdata] = torch.empty(whole.nbytes(), dtype=torch.uint8, device="meta").untyped_storage()
            like = torch.empty(0, dtype=x.dtype, device="meta")
            like.set_(storages[whole._cdata], x.storage_offset(), x.shape, x.stride())
            return FakeTensor(self.mode, like, x.device)


def _key(value: Any, tensors: list[Tensor]) -> Any:
    """What the results depend on; the tensors in it are noted in order."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.shape, value.stride(), value.storage_offset(), value.dtype, value.device
    if isinstance(value, list | tuple):
        return tuple([_key(x, tensors) for x in value])
    if isinstance(value, torch.ScriptObject):
        return None  # a process group, or how to add up
    return type(value), value  # 1, 1.0 and True are equal


def _maker(out: Any) -> Callable[[list[Tensor]], Any]:
    if isinstance(out, _New):
        size, stride, dtype, device = out.size, out.stride, out.dtype, out.device
        return lambda tensors: hollow(size, stride, dtype, device)
    if isinstance(out, _Given):
        return lambda tensors: tensors[out.place]
    if isinstance(out, _View):
        return lambda tensors: out.of(tensors[out.place])
    if isinstance(out, list | tuple):
        makers, kind = [_maker(x) for x in out], type(out)
        return lambda tensors: kind([maker(tensors) for maker in makers])
    return lambda tensors: out
