"""How fast this machine multiplies matrices: python benchmarks/machine.py"""

import time

import torch


def matmul_peak(device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = 1024) -> float:
    """GFLOP/s of products of square matrices, the best of twenty."""
    a, seconds = torch.rand(size, size, device=device).to(dtype), []
    for _ in range(20):
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the product
        seconds.append(time.perf_counter() - started)
    return 2e-9 * size**3 / min(seconds)


if __name__ == "__main__":
    print(f"float32 matmul peak {matmul_peak():.0f} GFLOP/s, {torch.get_num_threads()} threads")
