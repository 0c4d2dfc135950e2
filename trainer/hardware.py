"""What the hardware could do at best. Imports no torch."""

# Dense bf16 matrix products, FLOP/s, by a part of the device's name: from the vendors' datasheets.
_PEAK_BF16 = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A40": 150e12,
    "L40S": 362e12,
    "L4": 121e12,
    "B200": 2250e12,
    "MI300X": 1307e12,
}


def model_flops_utilization(tokens_per_second: float, parameters: int, device: str, processes: int) -> float | None:
    """MFU, 0 to 1: the FLOPs a full-rank step needs, 6 a parameter and token, over the peak of all devices in bf16.

    A low-rank method spends fewer, so this compares speeds, not efficiencies. None for a device that is not in the
    table, a CPU above all.
    """
    for name, peak in _PEAK_BF16.items():
        if name in device:
            return 6 * parameters * tokens_per_second / (peak * processes)
    return None
