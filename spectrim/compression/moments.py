"""Sums of second moments, as a walk through a model hands over what enters and leaves its linears.

For a linear y = W x with tokens t: gram G = Σ_t x_t x_tᵀ, mean = Σ_t x_t / n_tokens, abs_mean = Σ_t |x_t| / n_tokens
and gradient_gram D = Σ_t g_t g_tᵀ with g_t = ∂L/∂y_t. Linears that read the same tensor (q/k/v, gate/up) share their
input's statistics.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from weakref import ReferenceType, ref

import torch
from scipy.linalg.blas import ssyrk
from torch import Tensor

from spectrim.compression.expert_statistics import shrunk
from spectrim.errors import ModelError, NumericalError

SYRK_FEATURES = 1024  # below, the general product with its better threading wins


def second_moment(x: Tensor) -> Tensor:
    """xᵀx of x (tokens, features) float32, of which only the upper triangle is to be read.

    On the CPU large ones go through BLAS syrk, which computes that half alone: 1.5 times as fast at 1,536 features.
    """
    if x.device.type != "cpu" or x.shape[1] < SYRK_FEATURES:
        return x.T @ x
    return torch.from_numpy(ssyrk(1.0, x.contiguous().numpy().T))


def pack_symmetric(matrix: Tensor) -> Tensor:
    """Symmetric (n, n) -> its upper triangle, row by row, (n(n+1)/2,) float32: the precision Grams are summed from."""
    rows, columns = torch.triu_indices(*matrix.shape, device=matrix.device)
    return matrix[rows, columns].float().cpu()


def unpack_symmetric(triangle: Tensor) -> Tensor:
    """Inverse of ``pack_symmetric``: (n(n+1)/2,) -> (n, n) float64."""
    size = round(((8 * triangle.numel() + 1) ** 0.5 - 1) / 2)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    rows, columns = torch.triu_indices(size, size)
    matrix[rows, columns] = triangle.double()
    return matrix + matrix.triu(1).T


def batches(n_windows: int, batch_size: int) -> Iterator[slice]:
    """Slices of at most ``batch_size`` that cover range(n_windows) in order."""
    for start in range(0, n_windows, batch_size):
        yield slice(start, min(start + batch_size, n_windows))


class InputMoments:
    """Of the inputs of a block's linears; ``observe`` adds what one of them is given."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._totals: dict[str, Tensor] = {}
        self._owners: dict[str, str] = {}
        self._tokens: dict[str, int] = defaultdict(int)
        self._seen: list[tuple[ReferenceType[Tensor], str]] = []  # weak: a walk over many blocks keeps no activations
        self._called: set[str] = set()  # of these windows
        self._alone: set[str] = set()  # called more than once, so that their input is nobody else's
        self._part = slice(0, 0)

    def start(self, part: slice) -> None:
        """What comes now is of these windows."""
        self._part = part
        self._seen.clear()
        self._called.clear()

    def observe(self, name: str, x: Tensor) -> None:
        """Add x (..., in) that the linear ``name`` is given.

        Raises:
            NumericalError: it is not finite, naming the linear and the window.
        """
        if name in self._called and name not in self._alone:
            self._separate(name)
        self._called.add(name)
        shared = name not in self._alone
        owner = next((other for tensor, other in self._seen if tensor() is x), None) if shared else None
        if owner is None:
            if shared:
                self._seen.append((ref(x), name))
            flat = x.reshape(-1, x.shape[-1]).float()
            self._tokens[name] += len(flat)
            block = second_moment(flat)
            if not torch.isfinite(block.diagonal().sum()):
                raise NumericalError(non_finite(name, x, self._part, "input"))
            self._sums[name] = self._sums[name].add_(block) if name in self._sums else block.double()
            for total, values in ((f"mean.{name}", flat), (f"abs_mean.{name}", flat.abs())):
                added = values.sum(0).double()
                self._totals[total] = self._totals[total] + added if total in self._totals else added
        self._owners[name] = owner or name

    def _separate(self, name: str) -> None:
        """Give ``name`` sums of its own, of what it was given until now, and leave the others theirs."""
        self._alone.add(name)
        owner = self._owners[name]
        others = [other for other, found in self._owners.items() if found == owner and other != name]
        if others:
            new, old = (name, owner) if owner != name else (others[0], name)
            self._sums[new], self._tokens[new] = self._sums[old].clone(), self._tokens[old]
            for total in ("mean", "abs_mean"):
                self._totals[f"{total}.{new}"] = self._totals[f"{total}.{old}"]
            self._owners |= {name: name} if owner != name else dict.fromkeys(others, new)
            self._seen = [(x, new if found == name else found) for x, found in self._seen]

    def finished(
        self, linears: Iterable[str], experts: Iterable[Sequence[str]], n_tokens: int
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What was added, of all of ``linears``.

        Args:
            experts: the linears of one kind of a layer's experts, for each kind.
            n_tokens: how many tokens the windows have.

        Returns:
            ``{"gram.LINEAR": packed Gram, "mean.LINEAR" and "abs_mean.LINEAR": (in,) float64}`` with one entry per
            distinct input, named after the first linear that reads it; for every linear the name its input stands
            under.

        Raises:
            ModelError: a linear was given nothing.
        """
        for names in experts:
            self._sums |= shrunk(self._sums, self._tokens, names)
            for name in names:
                self._owners.setdefault(name, name)
                for total in (f"mean.{name}", f"abs_mean.{name}"):
                    self._totals.setdefault(total, self._sums[name].new_zeros(len(self._sums[name])))
        if unseen := sorted(set(linears) - self._owners.keys()):
            raise ModelError(f"{unseen[0]}: its block never calls it; name it in compression.exclude")
        tensors = {f"gram.{name}": pack_symmetric(gram) for name, gram in self._sums.items()}
        tensors |= {name: (total / n_tokens).cpu() for name, total in self._totals.items()}
        return tensors, self._owners


class GradientMoments:
    """Of the gradients of the outputs of a block's linears; ``observe`` adds one of them."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = defaultdict(int)
        self._part = slice(0, 0)

    def start(self, part: slice) -> None:
        """What comes now is of these windows."""
        self._part = part

    def observe(self, name: str, g: Tensor) -> None:
        """Add g (..., out), the gradient of the output of the linear ``name``.

        Raises:
            NumericalError: it is not finite, naming the linear and the window.
        """
        flat = g.reshape(-1, g.shape[-1]).float()
        self._tokens[name] += len(flat)
        block = second_moment(flat)
        if not torch.isfinite(block.diagonal().sum()):
            raise NumericalError(non_finite(name, g, self._part, "output gradient"))
        self._sums[name] = self._sums[name].add_(block) if name in self._sums else block.double()

    def finished(self, linears: Iterable[str], experts: Iterable[Sequence[str]]) -> dict[str, Tensor]:
        """``{"gradient_gram.LINEAR": packed D}`` of what was added; for the arguments see ``InputMoments``.

        Raises:
            ModelError: a linear's output has no gradient.
        """
        for names in experts:
            self._sums |= shrunk(self._sums, self._tokens, names)
        if unseen := sorted(set(linears) - self._sums.keys()):
            raise ModelError(
                f"{unseen[0]}: no gradient reaches it in any calibration window; raise capture.gradient_seq_len, or "
                "name it in compression.exclude"
            )
        return {f"gradient_gram.{name}": pack_symmetric(gram) for name, gram in self._sums.items()}


def non_finite(name: str, values: Tensor, part: slice, what: str) -> str:
    """The error of values (..., features) of the windows ``part`` that are not finite, or whose squares are not."""
    if values.numel() % (part.stop - part.start):  # of an expert, which sees some tokens of every window
        return (
            f"{name}: non-finite {what} in calibration windows {part.start} to {part.stop - 1}; activations must be "
            "finite: use prepare.load_dtype float32 or bfloat16, or check the model's weights"
        )
    windows = values.reshape(part.stop - part.start, -1)
    bad = next((i for i, row in enumerate(windows) if not torch.isfinite(row).all()), None)
    if bad is None:  # finite themselves, but not their squares
        return (
            f"{name}: {what} of up to {float(values.detach().abs().max()):.3g} in calibration windows {part.start} to "
            f"{part.stop - 1} overflows its Gram; check the model's weights"
        )
    return (
        f"{name}: non-finite {what} in calibration window {part.start + bad}; "
        "activations must be finite: use prepare.load_dtype float32 or bfloat16, or check the model's weights"
    )
