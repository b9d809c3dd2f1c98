"""The section `cluster` of a file: what it may hold, and what is wrong with it in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, Field, ValidationError

from megatron_skywork.config.manual import field_words, plain_words
from megatron_skywork.config.problems import kind, nearest, shown
from megatron_skywork.config.section import NonNegativeFloat, Positive, Section

SectionType = TypeVar("SectionType", bound=Section)


class OwnGpu(Section):
    """A GPU that machines.yaml does not know."""

    name: str = Field(description="What it is called.")
    memory_bytes: Positive = Field(description="What torch can allocate from.")
    peak_flops: dict[Literal["bf16", "fp16", "fp32", "fp8"], Annotated[float, Field(gt=0)]] = Field(description="FLOP/s by precision, dense.")
    memory_bytes_per_second: float = Field(gt=0, description="Of the device's memory.")
    source: str = Field(description="Where the numbers come from.")


class OwnLink(Section):
    """A link that machines.yaml does not know; one direction, one GPU or one port."""

    name: str = Field("own", description="What it is called.")
    bytes_per_second: float = Field(gt=0, description="What collectives get.")
    latency_seconds: NonNegativeFloat = Field(description="Of one step of a ring.")
    peak_bytes_per_second: float | None = Field(None, gt=0, description="The data sheet's.")
    source: str = Field(description="Where the numbers come from.")


class Network(Section):
    """What a node has to reach others."""

    link: Any = Field(description="Of machines.yaml, or a section with bytes_per_second, latency_seconds and source: one port.")
    per: Literal["gpu", "node"] = Field(description="gpu: each GPU has these ports for itself; node: all GPUs of a node share them.")
    count: Positive = Field(1, description="Ports.")


class SustainedSection(Section):
    """What training keeps of the rates of single kernels and collectives."""

    kernels: float = Field(1.0, gt=0, le=2, description="Share of the kernels' rates; above 1 where those were guessed too low.")
    collectives: float = Field(1.0, gt=0, le=1, description="Share of the links' rates.")
    source: str = Field(description="The runs it was found with.")


class ClusterSection(Section):
    """A cluster."""

    name: str = Field(description="What to call it; unset: the file's name.")
    gpu: Any = Field(description="Its name, or a section.")
    nodes: Positive = Field(le=100_000, description="How many.")
    gpus_per_node: Positive = Field(description="GPUs that `inside` joins: of a machine, or of a whole NVLink domain.")
    inside: Any = Field(None, description="Link between the GPUs of a node.")
    between: Any = Field(None, description="Network between nodes; needed for more than one.")
    rates: Any = Field(None, description="Measured rates: a file of tools/calibrate.py, or a section.")
    sustained: SustainedSection = Field(
        SustainedSection(source=""), description="What training keeps of rates and links; python benchmarks/planning.py finds it from runs that are known."
    )
    source: str = Field("", description="Where these facts come from.")


def checked(section: type[SectionType], values: Any, key: str, problems: list[str]) -> SectionType | None:
    """The section, or None and a sentence for every problem.

    Args:
        key: dotted name of the section, for the sentences.
        problems: sentences are added here.
    """
    if not isinstance(values, dict):
        problems.append(f"{key}={shown(values)}: this must be a section with {', '.join(section.model_fields)}, not {kind(values)}")
        return None
    try:
        return section.model_validate(values)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            problems.append(_sentence(section, key, list(detail["loc"]), detail["type"], detail["input"]))
        return None


def _sentence(section: type[BaseModel], key: str, path: Sequence[int | str], type_: str, value: Any) -> str:
    parent, words = section, ""
    annotation: Any = section
    for part in path:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            parent = annotation
            field = next((field for name, field in parent.model_fields.items() if part in (name, field.alias)), None)
            words, annotation = (field_words(field), field.annotation) if field is not None else ("", None)
        else:
            annotation = get_args(annotation)[-1] if get_args(annotation) else None
            words = plain_words(annotation) if annotation is not None else ""
    name = ".".join([key, *map(str, path)])
    if type_ == "missing":
        return f"{name} is not set, and it is required: {words}"
    if type_ == "extra_forbidden":
        fields = [field.alias or field_name for field_name, field in parent.model_fields.items()]
        match = nearest(str(path[-1]), fields)
        return f"{name}={shown(value)}: there is no such setting; " + (f"did you mean {match[0]}?" if match else f"there is {', '.join(fields)}")
    return f"{name}={shown(value)}: this must be {words or 'something else'}" + (f", not {kind(value)}" if type_.endswith("_type") else "")
