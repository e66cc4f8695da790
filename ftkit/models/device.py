"""The device to compute on, the precision, and the reason for both."""

from dataclasses import dataclass

import torch
from accelerate.utils import parse_flag_from_env


@dataclass(frozen=True)
class Device:
    """A device and a precision, with the reason.

    Attributes:
        device: "cuda", "mps" or "cpu".
        precision: "fp32", "bf16" or "fp16", whichever is best on that device.
        reason: one line for the reader.
    """

    device: torch.device
    precision: str
    reason: str

    def __str__(self) -> str:
        return self.reason


def choose_device() -> Device:
    """Choose CUDA, else MPS, else the CPU, and the precision; with ``ACCELERATE_USE_CPU=1`` always the CPU."""
    if parse_flag_from_env("ACCELERATE_USE_CPU"):  # parsed as accelerate does, so that model and loop agree
        why = "ACCELERATE_USE_CPU is set"
    elif torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Device(torch.device("cuda"), "bf16", f"cuda ({name}), bf16: supported, and does not overflow")
        return Device(torch.device("cuda"), "fp16", f"cuda ({name}), fp16 with loss scaling: bf16 is not supported")
    elif torch.backends.mps.is_available():
        return Device(torch.device("mps"), "fp32", "mps (Apple GPU), fp32: the safe precision on this device")
    else:
        why = "no CUDA or MPS device found"
    threads = torch.get_num_threads()
    used = f"{threads} thread{'s' * (threads != 1)}"
    return Device(torch.device("cpu"), "fp32", f"cpu, {used} ({why}), fp32: bf16 is slower on most CPUs")
