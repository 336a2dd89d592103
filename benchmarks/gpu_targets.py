"""Describes GPUs to XLA, so that it compiles for them without a device.

XLA reads a device description as text: limits of a block, a core and the device, clocks, and the
operations per clock of a core's units. The numbers are from NVIDIA's data sheets and its CUDA
programming guide. Only `jax-cuda13-plugin` and `nvidia-nvvm` have to be installed, no CUDA.
"""

import importlib.util
import pathlib
from typing import NamedTuple

GIB = 2**30
CUDNN = (9, 10, 0)
CORE_CLOCK, TENSOR_CLOCK = 1.98, 1.8295201  # GHz
# Of a core, by XLA's number of the kind of numbers: operations a clock. 2 and 6 are of eight bits,
# 10 half, 11 single, 12 double precision, 16 bfloat16; the others are narrow floats.
SCALAR_UNITS = {4: (64, 1), 8: (64, 1), 10: (128, 2), 11: (128, 1), 12: (64, 1), 16: (128, 2)}
TENSOR_UNITS = {2: 1024, 6: 1024, 10: 512, 11: 256, 12: 32, 16: 512}
TENSOR_UNITS |= dict.fromkeys((19, 20, 23, 24, 25, 28, 29, 33, 35, 36), 1024)


class Gpu(NamedTuple):
    name: str  # as a device of this kind calls itself
    gib: float  # for programs
    memory: int  # bytes
    bandwidth: int  # bytes a second
    memory_clock: int  # kHz


GPUS = {
    "h200": Gpu("NVIDIA H200", 139.0, 151397597184, 4800000000000, 3750000),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 79.0, 84942979072, 3352320000000, 2619000),
}


def devices(gpu: Gpu, count: int):
    """Returns devices of one process, as compilation targets."""
    from jax._src.cudnn import fused_attention_stablehlo
    from jax.experimental import topologies

    # jax's attention asks for the cuDNN of this process, which is to have none.
    major, minor, patch = CUDNN
    fused_attention_stablehlo.check_cudnn_version = lambda: 10000 * major + 100 * minor + patch
    options = {"topology": f"1x1x{count}", "target_config": target_config(gpu)}
    return topologies.get_topology_desc(platform="cuda", **options).devices


def target_config(gpu: Gpu) -> str:
    """Returns the target description of a Hopper GPU with 132 cores."""
    major, minor, patch = CUDNN
    model = f"sm_9.0a with {gpu.memory}B RAM, 132 cores, 1980000KHz clock, "
    model += f"{gpu.memory_clock}KHz mem clock, 52428800B L2$"
    return f"""gpu_device_info {{
  name: "{gpu.name}" device_vendor: "NVIDIA Corporation" model_str: "{model}"
  platform_version: "Compute Capability 9.0a"
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 l2_cache_size: 52428800
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: {CORE_CLOCK}
  device_memory_size: {gpu.memory} memory_bandwidth: {gpu.bandwidth}
  device_address_bits: 64 ecc_enabled: true pcie_bandwidth: 34359738368
  device_interconnect_info {{ active_links: 18 }} collective_memory_granularity: 2097152
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
  dnn_version: "{major}.{minor}.{patch}" cub_version: "3.1.2"
  {_rates("scalar", {key: (CORE_CLOCK, *unit) for key, unit in SCALAR_UNITS.items()})}
  {_rates("matrix", {key: (_clock(key), 4, ops) for key, ops in TENSOR_UNITS.items()})}
}}
platform_name: "CUDA"
dnn_version_info {{ major: {major} minor: {minor} patch: {patch} }}
device_description_str: "{gpu.name}"
"""


def _clock(kind: int) -> float:
    return CORE_CLOCK if kind == 12 else TENSOR_CLOCK


def _rates(unit: str, rates: dict[int, tuple]) -> str:
    texts = (
        f"rate_infos {{ key: {key} value {{ clock_rate_ghz: {clock} units_per_core: {units} "
        f"ops_per_clock: {operations} }} }}"
        for key, (clock, units, operations) in rates.items()
    )
    return f"{unit}_unit_description {{ {' '.join(texts)} }}"


def library_flags() -> str:
    """Returns XLA's flag for the device library of `nvidia-nvvm`; without it XLA searches for
    CUDA.
    """
    package = importlib.util.find_spec("nvidia")
    for root in package.submodule_search_locations if package else ():
        folder = pathlib.Path(root) / "cu13"
        if any(folder.rglob("libdevice*.bc")):
            return f"--xla_gpu_cuda_data_dir={folder}"
    return ""
