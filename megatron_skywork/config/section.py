"""What a section of the settings is: names that are checked, values of the right type, rules between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]

# Given as the context of a validation: check every value by itself, and leave out `Section.rules`.
VALUES_ONLY = "values only"


class Section(BaseModel):
    """A group of settings: unknown names are errors, `true` is not an int, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def rules(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Rules between settings of this section that are broken: the settings that a rule reads, and a sentence that begins with one of them."""
        yield from ()

    @model_validator(mode="after")
    def _keep_rules(self, info: ValidationInfo) -> Section:
        problems = [] if info.context == VALUES_ONLY else [sentence for _, sentence in self.rules()]
        if problems:
            raise ValueError("\n".join(problems))
        return self
