"""The energy that a GPU has used, read from NVML (the package nvidia-ml-py, extra `gpu`)."""

from typing import Any

import torch


class EnergyMeter:
    """Reads the energy counter of one GPU.

    Where it cannot be read, `problem` says why, and every reading is None: on a CPU, without
    nvidia-ml-py, and on GPUs before Volta.
    """

    def __init__(self, device: torch.device) -> None:
        """Find the GPU in NVML. It is found by its UUID, since CUDA_VISIBLE_DEVICES renumbers GPUs.

        Args:
            device: The device of this rank.
        """
        self.problem = ""
        self._nvml: Any = None
        self._handle: Any = None
        if device.type != "cuda":
            self.problem = "a CPU has no energy counter that NVML can read"
            return
        try:
            import pynvml
        except ImportError:
            self.problem = "nvidia-ml-py is missing: pip install 'resnet-dist[gpu]'"
            return
        uuid = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except pynvml.NVMLError as error:
            self.problem = f"NVML: {error}"
            return
        self._nvml = pynvml

    def joules(self) -> float | None:
        """The energy used since the driver was loaded; None if it cannot be read."""
        if self._nvml is None:
            return None
        millijoules = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        return float(millijoules) / 1e3
