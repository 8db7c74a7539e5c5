"""Host memory that an import and an export need at their peak, in a process of its own; one line of JSON, in bytes.

    python tests/distributed/memory_of_conversion.py HF_FOLDER NEW_FOLDER [--naive]

model: the weights; largest: the largest tensor; import and export: how far the peak lies above the process before it.
--naive: a whole state dict is read, and its tensors are copied into the model.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from eaopd_megatron.checkpoint.convert import single_process_group
from eaopd_megatron.checkpoint.hf_export import export_hf
from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.checkpoint.hf_import import load_hf
from eaopd_megatron.megatron.model import build_model
from tools.lib.host_memory import growth


class WholeFolder(HfFolder):
    """The naive way: every tensor is in memory before the first one is used."""

    def slice(self, name: str) -> Any:
        if not hasattr(self, "held"):
            self.held = {name: self.files.slice(name)[:] for name in self.names()}
        return self.held[name]


def main(source: str, out: str, naive: bool) -> None:
    """Import, export, print."""
    opened = HfFolder.open(source)
    folder = WholeFolder(opened.path, opened.name, opened.config, opened.family) if naive else opened
    bytes_of = [math.prod(folder.shape(name)) * folder.dtype.itemsize for name in folder.names()]
    with single_process_group() as parallel:
        model = build_model(folder.config, parallel.layout, folder.dtype)
        found = {"model": sum(bytes_of), "largest": max(bytes_of)}
        found["import"] = growth(lambda: load_hf(model, folder, parallel))
        if not naive:
            found["export"] = growth(lambda: export_hf(model, parallel, folder, Path(out)))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], naive="--naive" in sys.argv[3:])
