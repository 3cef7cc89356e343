"""How fast training goes: images and operations a second, waiting for data, memory."""

import resource
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.loader import LoaderTiming

# Dense bfloat16, in teraflops, by what CUDA calls the device; of the vendor's data sheets.
_PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "A10G": 70.0}


@dataclass(slots=True)
class Pace:
    """Turns what the loader measured into numbers of all workers together."""

    device: torch.device
    global_batch_size: int
    batches_per_step: int  # micro-batches of one worker
    num_workers: int = 1
    peak_tflops: float | None = None  # of one worker's device
    step_tflops: float | None = None  # that one worker computes in a step, once it was counted

    def numbers(self, timing: LoaderTiming) -> dict[str, float]:
        """Return what is known; no two runs have it equal."""
        pace = {"memory_gib": memory_gib(self.device), "num_workers": float(self.num_workers)}
        if not timing.num_batches or not timing.elapsed_seconds:
            return pace
        steps_per_second = timing.num_batches / self.batches_per_step / timing.elapsed_seconds
        pace |= {
            "images_per_second": steps_per_second * self.global_batch_size,
            "data_wait_share": timing.wait_share,
        }
        if self.step_tflops is not None:
            pace["tflops_per_second"] = self.step_tflops * steps_per_second  # of one worker
            if (peak := self.peak_tflops or known_peak_tflops(self.device)) is not None:
                pace["mfu"] = pace["tflops_per_second"] / peak
        return pace


def known_peak_tflops(device: torch.device) -> float | None:
    """Return the dense bfloat16 peak of a known GPU, None for anything else."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in _PEAK_TFLOPS.items() if known in name), None)


def memory_gib(device: torch.device) -> float:
    """Return the most memory used so far: of the GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts kilobytes


def counted_tflops(run: Callable[[], object]) -> float:
    """Return the floating-point operations of `run`, counted as it goes, in 10^12."""
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return float(counter.get_total_flops()) / 1e12
