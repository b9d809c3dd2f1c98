"""Small run folders for the report's tests, and a page as a browser would see it."""

from __future__ import annotations

import base64
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

ADAPTIVE = {"enabled": True, "sensitivity": 0.2, "maximum": 0.01, "momentum": 0.99}
CONFIG: dict[str, Any] = {
    "parallel": {"tp": 2, "pp": 2, "ep": 2, "etp": 1, "cp": 1},
    "moe": {"num_experts": 4, "topk": 2, "capacity_factor": 1.1, "adaptive": ADAPTIVE},
    "optim": {"clip_grad": 1.0},
    "train": {"steps": 100},
}
ROUTER = {
    "layers": [1, 3],
    "load": [[0.25, 0.25, 0.25, 0.25], [0.47, 0.30, 0.225, 0.005]],
    "drop_rate": [0.01, 0.042],
    "coefficient": [0.005, 0.0099],
    "aux_loss": [0.0, 0.1],
    "entropy": [math.log(4), 0.5 * math.log(4)],
    "max1_over_max2": [1.01, 3.0],
}


def step_record(step: int, **changes: Any) -> dict[str, Any]:
    record = {"kind": "step", "step": step, "time": 1000.0 + step, "loss": 3.0 - 0.01 * step, "grad_norm": 1.5, "learning_rate": 1e-3 / step}
    record |= {"tokens": 4096 * step, "tokens_per_second": 2000.0, "tflops_per_device": 1.5, "mfu": 0.38, "skipped": False}
    record |= {"seconds": {"data": 0.01, "forward_backward": 1.0, "step": 1.1}, "data_wait_share": 0.01, "router": ROUTER}
    return record | changes


def write_run(folder: Path, records: list[dict[str, Any]], config: dict[str, Any] | None = None, tail: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    header = {"kind": "header", "config": config or CONFIG, "world_size": 8, "parameters": {"total": 373.1e6, "active": 214.6e6}, "device": "cpu"}
    header["formulas"] = {"mfu": "tflops_per_device / 312"}
    text = "".join(json.dumps(record) + "\n" for record in [header, *records])
    (folder / "metrics.jsonl").write_text(text + tail, encoding="utf-8")
    return folder


class Page(HTMLParser):
    """What a browser would see: texts, tags, and everything that could load something."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def images(self) -> list[bytes]:
        sources = [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]
        assert all(source.startswith("data:image/png;base64,") for source in sources)
        return [base64.b64decode(source.split(",", 1)[1], validate=True) for source in sources]
