"""The shape of a Llama model, and what params.yaml makes of it: how many numbers its parts have."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline.config.params import Params
from spectrim.maths.allocation import uniform
from spectrim.maths.budget import resolve_format, stored_bytes

WIDTH = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes of a number


@dataclass(frozen=True)
class Shape:
    """The numbers of a Llama model's config.json that decide what it takes."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Shape":
        """The shape of a config.json."""
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return cls(
            config["num_hidden_layers"], hidden, config["intermediate_size"], heads,
            config.get("num_key_value_heads") or heads, config.get("head_dim") or hidden // heads,
            config["vocab_size"], config.get("tie_word_embeddings", False),
        )  # fmt: skip

    @property
    def queries(self) -> int:
        """Width of all heads."""
        return self.heads * self.head_dim

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(m, n) of q, k, v, o, gate, up and down of one block."""
        hidden, keys, inner = self.hidden, self.kv_heads * self.head_dim, self.intermediate
        attention = [(self.queries, hidden), (keys, hidden), (keys, hidden), (hidden, self.queries)]
        return [*attention, (inner, hidden), (inner, hidden), (hidden, inner)]

    @property
    def inputs(self) -> list[int]:
        """Widths of what a block's linears read: q/k/v, o, gate/up, down."""
        return [self.hidden, self.queries, self.hidden, self.intermediate]

    @property
    def weights(self) -> int:
        """Numbers of one block's linears."""
        return sum(m * n for m, n in self.linears)

    @property
    def head(self) -> int:
        """Numbers outside the blocks: the embedding, the head unless it is the same, the last norm."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        """All numbers; two norms to a block."""
        return self.head + self.layers * (self.weights + 2 * self.hidden)

    @property
    def full(self) -> int:
        """Numbers of one block's factors at full rank, Σ k(m + n)."""
        return sum(min(m, n) * (m + n) for m, n in self.linears)


@dataclass(frozen=True)
class Plan:
    """A model and the params.yaml that it is compressed by."""

    shape: Shape
    params: Params

    @property
    def loaded(self) -> int:
        """Bytes of a number in memory."""
        return WIDTH[self.params.prepare.load_dtype]

    @property
    def stored(self) -> int:
        """Bytes of a number of the dense checkpoint."""
        return WIDTH[self.params.prepare.stored_dtype]

    @cached_property
    def ranks(self) -> list[int | None]:
        """Of one block's linears; None: dense."""
        shared, shapes = self.params.compression, self.shape.linears
        found = uniform(shapes, shared.kept, shared.format, shared.align)
        factored = [
            resolve_format(shared.format, *shape, rank) != "dense" for shape, rank in zip(shapes, found, strict=True)
        ]
        return [rank if low else None for rank, low in zip(found, factored, strict=True)]

    @property
    def factors(self) -> int:
        """Numbers of all factors, r(m + n) each."""
        pairs = zip(self.shape.linears, self.ranks, strict=True)
        return self.shape.layers * sum(rank * (m + n) for (m, n), rank in pairs if rank)

    @property
    def kept(self) -> int:
        """Numbers of all linears as the compressed model multiplies them: the factors, and what stays dense."""
        dense = (m * n for (m, n), rank in zip(self.shape.linears, self.ranks, strict=True) if rank is None)
        return self.factors + self.shape.layers * sum(dense)

    @property
    def packed(self) -> int:
        """Bytes of all linears in the checkpoint."""
        chosen, pairs = self.params.remap.format, zip(self.shape.linears, self.ranks, strict=True)
        format = self.params.compression.format if chosen == "same" else chosen
        return self.shape.layers * sum(stored_bytes(format, m, n, rank or min(m, n)) for (m, n), rank in pairs)

    def forward(self, tokens: int, seq_len: int, weights: float, head: bool = True) -> float:
        """Operations of a forward pass through ``weights`` numbers of linears, attention and the head."""
        shape = self.shape
        attention = 2 * seq_len * shape.queries * shape.layers  # scores and their sums, half of them masked
        return tokens * (2 * weights + attention + 2 * shape.vocabulary * shape.hidden * head)

    @property
    def test_tokens(self) -> int:
        settings = self.params.calibrate
        return settings.test_windows * settings.seq_len * len(self.params.data)

    @property
    def validation_tokens(self) -> int:
        return self.params.calibrate.validation_windows * self.params.calibrate.seq_len
