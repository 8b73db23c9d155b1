"""How fast training runs: time, tokens and operations between two reports."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Throughput"]


class Throughput:
    """Measure the steps between two reports.

    It reads the host's clock only, and is asked where training waits for the device anyway, so
    that nothing waits on its account.

    Args:
        peak_tflops: What all devices of the run can do together, in 10¹² operations a second;
            None where that is not known.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        self.peak_tflops = peak_tflops
        self.resume()

    def resume(self) -> None:
        """Begin to measure, after something that is no step, such as writing a checkpoint."""
        self.steps = self.samples = self.tokens = self.flops = 0
        self.data_seconds = 0.0
        self._begun = time.perf_counter()

    @contextmanager
    def making_data(self) -> Iterator[None]:
        """Count what is done meanwhile as waiting for data."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.data_seconds += time.perf_counter() - begun

    def step(self, samples: int, tokens: int, flops: int) -> None:
        """Count a step.

        Args:
            samples: Of the global batch.
            tokens: Of the global batch.
            flops: The backbone's operations for this worker's share.
        """
        self.steps += 1
        self.samples += samples
        self.tokens += tokens
        self.flops += flops

    def numbers(self, flops: float) -> dict[str, float]:
        """Give the rates since `resume`.

        Args:
            flops: The backbone's operations since then, of all workers.

        Returns:
            `step_seconds`; `samples_per_second`, `tokens_per_second` and `tflops`, of all workers;
            `data_wait`, the share of this worker's time that went into making batches; and `mfu`,
            `tflops` over the peak, where that is known.
        """
        seconds = time.perf_counter() - self._begun
        found = {
            "step_seconds": seconds / self.steps,
            "samples_per_second": self.samples / seconds,
            "tokens_per_second": self.tokens / seconds,
            "data_wait": self.data_seconds / seconds,
            "tflops": flops / seconds / 1e12,
        }
        if self.peak_tflops is not None:
            found["mfu"] = found["tflops"] / self.peak_tflops
        return {name: float(f"{value:.6g}") for name, value in found.items()}
