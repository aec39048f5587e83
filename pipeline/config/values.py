"""What single keys of params.yaml take."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field

from pipeline.config.source_syntax import parse
from spectrim.compression.methods import RANK_METHODS, UPDATE_METHODS
from spectrim.errors import SourceError
from spectrim.maths.budget import CODED, FACTORED, ROUNDED


def _source(text: str) -> str:
    try:
        parse(text)
    except SourceError as error:
        raise ValueError(str(error)) from None
    return text


def _splits(shares: dict[str, float]) -> dict[str, float]:
    if sum(shares.values()) > 1 + 1e-9:
        raise ValueError(f"the shares add up to {sum(shares.values()):g}; at most 1 is required")
    return shares


def installed(names: list[str]) -> list[str]:
    """A baseline of a library that is missing would otherwise end the run after the others were measured."""
    wanted = [name for name in names if name.startswith("bitsandbytes_")]
    if wanted and find_spec("bitsandbytes") is None:
        raise ValueError(
            f"{', '.join(wanted)} found, which the package bitsandbytes makes, and that is not installed; run "
            "`pip install 'spectrim[bitsandbytes]'`, or leave out what needs it"
        )
    return names


AtLeast0 = Annotated[int, Field(ge=0)]
AtLeast1 = Annotated[int, Field(ge=1)]
AtLeast2 = Annotated[int, Field(ge=2)]
Positive = Annotated[float, Field(gt=0)]
Kept = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
NonEmpty = Annotated[str, Field(min_length=1)]
Source = Annotated[NonEmpty, AfterValidator(_source)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]

if TYPE_CHECKING:
    MainFormat = str
    FactoredOrSame = str
    Alternative = str
    UpdateMethodName = str
    RankMethodName = str
else:  # pydantic reads Literals, mypy takes no computed ones
    MainFormat = Literal[(*FACTORED, *CODED)]
    FactoredOrSame = Literal[("same", *FACTORED)]
    Alternative = Literal[(*FACTORED, *ROUNDED)]
    UpdateMethodName = Literal[tuple(UPDATE_METHODS)]
    RankMethodName = Literal[tuple(RANK_METHODS)]

Size = Annotated[str, Field(pattern=r"^[1-9][0-9]*(KB|MB|GB)$")]
Splits = Annotated[
    dict[Literal["calibration", "validation", "test"], Annotated[float, Field(gt=0, le=1)]],
    Field(min_length=1),
    AfterValidator(_splits),
]
