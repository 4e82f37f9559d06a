"""Which weights a command runs with, before they are read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from i2am.cli.parts import part_folder
from i2am.cli.pipelines import is_folder


def weights_of(args: argparse.Namespace) -> dict[str, dict[str, list[Any]]]:
    """Identify the files of a pipeline and of what is put on it: ``{"pipeline": {file: [bytes, what else]}, …}``.

    A hub repository counts by its commit; of a LoRA of the hub nothing is known before it is loaded but its name.
    """
    from i2am.evaluate.identity import weights_identity

    found = {"pipeline": _pipeline(args.pipeline, args.revision)}
    for name, place in args.part or ():
        folder = part_folder(name, place)
        found[f"part {name}"] = weights_identity(folder) if folder else {"name": ["", place]}
    if args.ip_adapter is not None:
        found["ip_adapter"] = weights_identity(_adapter(args))
        encoder = _encoder(args)
        if encoder is not None:
            found["ip_adapter"] |= {f"{encoder.name}/{k}": v for k, v in weights_identity(encoder).items()}
    if args.lora is not None:
        local = Path(args.lora)
        found["lora"] = weights_identity(local) if local.exists() else {"name": ["", args.lora]}
    return found


def _pipeline(name: str, revision: str | None) -> dict[str, list[Any]]:
    from huggingface_hub import try_to_load_from_cache

    from i2am.evaluate.identity import weights_identity

    if is_folder(name):
        return weights_identity(Path(name))
    index = try_to_load_from_cache(name, "model_index.json", revision=revision)  # read a moment ago, so it is there
    return {"commit": ["", Path(index).parent.name if isinstance(index, str) else str(revision)]}


def _adapter(args: argparse.Namespace) -> Path:
    if is_folder(args.ip_adapter):
        return Path(args.ip_adapter, args.ip_adapter_subfolder or "", args.ip_adapter_weight)
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(args.ip_adapter, args.ip_adapter_weight, subfolder=args.ip_adapter_subfolder))


def _encoder(args: argparse.Namespace) -> Path | None:
    """Return the image encoder beside an adapter's weight file, which is loaded with it."""
    folder = Path(args.ip_adapter, args.ip_adapter_subfolder or "", "image_encoder")
    return folder if is_folder(folder) else None
