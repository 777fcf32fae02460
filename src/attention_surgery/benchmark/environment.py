"""The machine and the versions that a result belongs to."""

import importlib.metadata
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

import diffusers
import torch


def describe(device: torch.device, command: str) -> dict[str, str]:
    """The columns of a run: device, versions, command, date."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "diffusers": diffusers.__version__,
        "cudnn": str(torch.backends.cudnn.version()) if device.type == "cuda" else "",
        "attention_surgery": _version("attention-surgery") or "source",
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    """Such as "NVIDIA H200", or the processor and how many threads of it are used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine() or f"{os.cpu_count()} cores"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
