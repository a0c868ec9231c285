"""The pickles inside a `.bin`, interpreted without being executed.

Python's own unpickler calls what the file names, and even with a whitelist a short file can make it
allocate gigabytes (a memo index of 2**32) or overflow the C stack (a nested tuple as a key). So the few
instructions that `torch.save` writes are interpreted here; any other one refuses the file. Nothing is
imported, and the only "calls" are the functions of this module that `_GLOBALS` lists.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

from orchestrator.checkpoint.bin_storages import resave
from orchestrator.checkpoint.tensors import DTYPES, MAX_BYTES, MAX_DIMS
from orchestrator.checkpoint.trust import shown
from orchestrator.errors import CheckpointError

MAX_PICKLE = 16 * 2**20
"""Largest pickles of one file, in bytes: they hold names and shapes only, about 150 bytes a tensor."""

MAX_INSTRUCTIONS = 2**21
"""Most instructions of one pickle (a tensor takes 30 to 45): one of a byte can make an object of a hundred."""

MAX_NUMBER_KEY = 2**31
"""Keys that are numbers lie below: larger ones can be chosen to have one hash, and a dictionary of such hangs."""

_TENSORS_ONLY = "Only tensors are read: save the model's state_dict(), best as safetensors."


@dataclass(frozen=True)
class StorageType:
    """torch's class of a storage; `dtype` is None for untyped bytes."""

    dtype: str | None


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of elements (bytes where `dtype` is None) that the file has under `key`."""

    key: str
    dtype: str | None
    elements: int

    @property
    def nbytes(self) -> int:
        return self.elements * (DTYPES[self.dtype].size if self.dtype else 1)


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A view into a storage; offset and strides in elements."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _TorchDType:
    name: str


@dataclass(frozen=True)
class _Function:
    make: Callable[..., object]


def _sizes(value: object) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or len(value) > MAX_DIMS:
        raise ValueError("sizes that are no short tuple")
    if not all(type(size) is int and 0 <= size <= MAX_BYTES for size in value):
        raise ValueError("sizes that are negative or no integers")
    return tuple(value)


def _tensor(storage: object, dtype: str | None, offset: object, shape: object, strides: object) -> object:
    if not isinstance(storage, Storage) or dtype is None:
        raise ValueError("a tensor without a typed storage")
    (first,) = _sizes((offset,))
    sizes, steps = _sizes(shape), _sizes(strides)
    if len(sizes) != len(steps):
        raise ValueError("a tensor whose strides do not match its shape")
    return PickledTensor(storage, dtype, first, sizes, steps)


def _tensor_v2(storage: object, offset: object, shape: object, strides: object, *_: object) -> object:
    dtype = storage.dtype if isinstance(storage, Storage) else None
    return _tensor(storage, dtype, offset, shape, strides)


def _tensor_v3(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    grad: object,
    hooks: object,
    dtype: object,
    *_: object,
) -> object:
    return _tensor(storage, dtype.name if isinstance(dtype, _TorchDType) else None, offset, shape, strides)


def _parameter(data: object, *_: object) -> object:
    if not isinstance(data, PickledTensor):
        raise ValueError("a parameter that is no tensor")
    return data


class Fields(dict[Any, Any]):
    """An OrderedDict: unlike a plain dict it may be given state (`_metadata`), which is dropped."""


def _ordered() -> object:
    # Without arguments only, as torch.save writes it: items given here could be copied again and again.
    return Fields()


_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "ComplexFloatStorage": "C64",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}

_GLOBALS: dict[str, object] = {
    "torch._utils._rebuild_tensor": _Function(_tensor_v2),  # before PyTorch 0.4: without what v2 ignores here
    "torch._utils._rebuild_tensor_v2": _Function(_tensor_v2),
    "torch._utils._rebuild_tensor_v3": _Function(_tensor_v3),
    "torch._utils._rebuild_parameter": _Function(_parameter),
    "collections.OrderedDict": _Function(_ordered),
    "torch.Size": _Function(_sizes),
    "torch.storage.UntypedStorage": StorageType(None),
    **{f"torch.{name}": StorageType(dtype) for name, dtype in _STORAGES.items()},
    **{f"torch.{dtype.torch}": _TorchDType(name) for name, dtype in DTYPES.items()},
}
"""Everything that a pickle may name. Nothing else exists for it."""


def _put(target: object, key: object, value: object) -> None:
    # Text or a number only: hashing a deeply nested tuple would overflow the C stack.
    if not isinstance(target, dict) or not isinstance(key, (str, int)):
        raise ValueError("an item set where there is no dictionary, or under no plain key")
    if isinstance(key, int) and not -MAX_NUMBER_KEY <= key < MAX_NUMBER_KEY:
        raise ValueError("an item set under a number of more than 32 bits")
    target[key] = value


class _Machine:
    """The pickle machine's stack, marks and memo, and the storages that it met, by their keys."""

    def __init__(self, where: str, legacy: bool) -> None:
        self.where = where
        self.legacy = legacy
        self.storages: dict[str, Storage] = {}
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: object) -> None:
        self.stack.append(value)

    def mark(self, _: object) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def to_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def last(self, count: int) -> tuple[Any, ...]:
        if len(self.stack) < count:
            raise IndexError("stack underflow")
        items = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        return items

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def append(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("an item appended where there is no list")
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            _put(self.stack[-1], key, value)

    def find(self, name: str) -> None:
        if name not in _GLOBALS:
            raise CheckpointError(
                f"{self.where} holds a pickle that wants to call {shown(name)}: refused, nothing was executed",
                _TENSORS_ONLY,
            )
        self.push(_GLOBALS[name])

    def find_on_stack(self, _: object) -> None:
        module, name = self.last(2)
        self.find(f"{module if isinstance(module, str) else '?'}.{name if isinstance(name, str) else '?'}")

    def reduce(self, _: object) -> None:
        function, arguments = self.last(2)
        if not isinstance(function, _Function) or not isinstance(arguments, tuple):
            raise ValueError("a call of something that is no function")
        self.push(function.make(*arguments))

    def build(self, _: object) -> None:
        self.last(1)  # an OrderedDict's attributes (`_metadata`): of no use here
        if not isinstance(self.stack[-1], Fields):
            raise ValueError("state for something that is no OrderedDict")

    def storage(self, _: object) -> None:
        (found,) = self.last(1)
        fields = 6 if self.legacy else 5
        if not isinstance(found, tuple) or len(found) != fields or found[0] != "storage":
            raise ValueError("a reference that is no storage")
        kind, key, _place, elements, *view = found[1:]
        if not isinstance(kind, StorageType) or not isinstance(key, str):
            raise ValueError("a storage without a type or a key")
        if view not in ([], [None]):
            raise CheckpointError(
                f"{self.where} holds a storage that is a part of another (PyTorch before 0.4), which is not read here",
                f"Save it again: {resave(self.where, 'torch.load(f, weights_only=True)')}",
            )
        (size,) = _sizes((elements,))
        storage = Storage(key, kind.dtype, size)
        known = self.storages.setdefault(key, storage)
        # Empty ones may share a key: they have no memory that would tell them apart.
        if known != storage and (known.elements or storage.elements):
            raise ValueError("one storage with two types or sizes")
        self.push(storage)


def _nothing(machine: _Machine, _: object) -> None:
    return


_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _nothing,
    "FRAME": _nothing,
    "STOP": _nothing,
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _Machine.push),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES"), _Machine.push),
    **dict.fromkeys(("BINSTRING", "SHORT_BINSTRING"), _Machine.push),  # Python 2's text
    "MARK": _Machine.mark,
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "TUPLE1": lambda m, _: m.push(m.last(1)),
    "TUPLE2": lambda m, _: m.push(m.last(2)),
    "TUPLE3": lambda m, _: m.push(m.last(3)),
    "TUPLE": lambda m, _: m.push(tuple(m.to_mark())),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "APPEND": lambda m, _: m.append(list(m.last(1))),
    "APPENDS": lambda m, _: m.append(m.to_mark()),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "SETITEM": lambda m, _: m.set_items(list(m.last(2))),
    "SETITEMS": lambda m, _: m.set_items(m.to_mark()),
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": lambda m, _: m.put(len(m.memo)),
    "BINGET": lambda m, index: m.push(m.memo[index]),
    "LONG_BINGET": lambda m, index: m.push(m.memo[index]),
    "GLOBAL": lambda m, name: m.find(name.replace(" ", ".", 1)),
    "STACK_GLOBAL": _Machine.find_on_stack,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.storage,
}


@dataclass(frozen=True)
class Pickled:
    """What one pickle describes: dicts, lists, text, numbers and `PickledTensor`s; its storages by their keys."""

    value: object
    storages: dict[str, Storage]


class Source(Protocol):
    """Where a pickle is read from; more than these is not asked of it."""

    def read(self, size: int, /) -> bytes: ...
    def readline(self) -> bytes: ...
    def tell(self) -> int: ...


def interpret(data: Source, where: str, *, legacy: bool = False) -> Pickled:
    """The pickle that begins where `data` stands; afterwards `data` stands behind it.

    Args:
        data: asked for as much as the pickle says: whoever gives it bounds it.
        where: the file's name for messages.
        legacy: storages are referred to as before PyTorch 1.6.

    Raises:
        CheckpointError: it names something that is not on the list, uses another instruction, or is damaged.
    """
    machine = _Machine(where, legacy)
    left = MAX_INSTRUCTIONS
    try:
        for code, argument, _position in pickletools.genops(cast(Any, data)):
            if code.name not in _ACTIONS:
                raise CheckpointError(
                    f"{where} holds a pickle with the instruction {code.name}, which torch.save does not "
                    "write: refused, nothing was executed",
                    _TENSORS_ONLY,
                )
            left -= 1
            if left < 0:
                raise CheckpointError(
                    f"{where} holds a pickle of more than {MAX_INSTRUCTIONS:,} instructions: refused", _TENSORS_ONLY
                )
            _ACTIONS[code.name](machine, argument)
        return Pickled(machine.stack[-1], machine.storages)
    except (ValueError, TypeError, IndexError, KeyError, OverflowError, Warning) as error:
        # A warning comes as an exception where the user asked for that: pickletools has one about old text.
        raise CheckpointError(f"{where} holds a damaged pickle: {shown(error, 80)}", "Download it again.") from error
