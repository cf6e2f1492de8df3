"""Which device a model runs on: the best there is, or the one asked for, if it is there."""

import torch


def best_device() -> str:
    """Name the fastest kind of device that this machine has."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def find_device(name: str | torch.device | None = None) -> torch.device:
    """Find "cuda", "cuda:1", "mps", "cpu", or by default the best there is; ValueError when it is not here."""
    name = name or best_device()
    try:
        device = torch.device(name)
    except RuntimeError:  # no name of a device at all
        device = None
    if device is None or not _is_there(device):
        raise ValueError(
            f"PyTorch has no device {str(name)!r} to use here: choose cuda, mps or cpu, or leave --device out for the "
            f"best there is, {best_device()}."
        )
    return device


def _is_there(device: torch.device) -> bool:
    """Look for a device without touching it: each process would take memory of its own there."""
    if device.type == "cuda":
        return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    return device.type == "cpu" or (device.type == "mps" and torch.backends.mps.is_available())
