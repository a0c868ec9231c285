"""What each tensor of an adapter does to a tensor of the base, as data: nothing is read or computed here.

s is the adapter's scale (`LoraConfig.scale_of`). The formulas are those of PEFT's merge_and_unload.
"""

from dataclasses import dataclass

from orchestrator.checkpoint.tensors import TensorInfo


@dataclass(frozen=True)
class LoraTarget:
    """W += s * B@A on the base's `tensor`; the product is transposed where W is stored as (in, out).

    An embedding's W (tokens, hidden) += s * (B@A)^T is the latter, with A (r, tokens) and B (hidden, r).

    With a `magnitude` m (DoRA, arXiv:2402.09353): V = W + s * B@A; W = m / |V| * V, the norm being taken for each
    output (for an embedding: for each hidden dimension), so over rows, or over columns where transposed.
    """

    tensor: str
    module: str
    a: TensorInfo
    b: TensorInfo
    scale: float
    transposed: bool
    magnitude: TensorInfo | None = None

    @property
    def consumed(self) -> tuple[str, ...]:
        """The adapter's tensors that this uses up."""
        return (self.a.name, self.b.name, *((self.magnitude.name,) if self.magnitude else ()))


@dataclass(frozen=True)
class ExpertsTarget:
    """W[e] += s * B[:, :, e] @ A[e] for each of `experts` stacked in W (experts, out, in).

    A (experts * r, in) is seen as (experts, r, in), B (out, r * experts) as (out, r, experts). Where W is stored
    as (experts, in, out), `transposed`, each product is transposed.
    """

    tensor: str
    module: str
    a: TensorInfo
    b: TensorInfo
    scale: float
    transposed: bool
    experts: int

    @property
    def consumed(self) -> tuple[str, ...]:
        """The adapter's tensors that this uses up."""
        return (self.a.name, self.b.name)


@dataclass(frozen=True)
class BiasTarget:
    """bias += s * value (lora_bias)."""

    tensor: str
    module: str
    value: TensorInfo
    scale: float

    @property
    def consumed(self) -> tuple[str, ...]:
        """The adapter's tensors that this uses up."""
        return (self.value.name,)


@dataclass(frozen=True)
class RowsTarget:
    """W[rows[i]] = value[i]: values, not differences (trainable_token_indices)."""

    tensor: str
    module: str
    value: TensorInfo
    rows: tuple[int, ...]

    @property
    def consumed(self) -> tuple[str, ...]:
        """The adapter's tensors that this uses up."""
        return (self.value.name,)


@dataclass(frozen=True)
class ReplaceTarget:
    """The base's `tensor` becomes `value`: a saved module, bias, embedding or head.

    `own`: the module was trained as a copy of its own (modules_to_save), which a tied module did not share.
    """

    tensor: str
    module: str
    value: TensorInfo
    own: bool = False

    @property
    def consumed(self) -> tuple[str, ...]:
        """The adapter's tensors that this uses up."""
        return (self.value.name,)


Target = LoraTarget | ExpertsTarget | BiasTarget | RowsTarget | ReplaceTarget
