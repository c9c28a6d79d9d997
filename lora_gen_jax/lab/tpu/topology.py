"""TPU chips that are not there, for the compiler to compile for.

In: a name such as ``v5e:4x4``, or ``2*v5e:4x4`` for two slices. Out: their devices and published figures. libtpu has
the compiler; it needs no TPU. It logs to standard error from C++, so it is told to be quiet before it is loaded.

Source of the published figures, per chip: Google Cloud's TPU documentation, the pages "TPU v4", "TPU v5e", "TPU v5p"
and "TPU v6e" at
https://cloud.google.com/tpu/docs (their tables of key specifications). Where editions differ, the lower figure stands
here: v6e's HBM bandwidth (1600 or 1640 GB/s) and interconnect (3200 or 3584 Gbit/s).

Which part of the interconnect's figure one direction gets, the pages do not say plainly. Earlier editions give one
number in Gbit/s (v5e: 1600), later ones twice as many bytes and call them bidirectional (v5e: 400 GB/s, hence 200 GB/s
each way). Half of the EARLIER number is what a chip is taken to receive here (v5e: 100 GB/s). It is a rate over all
links: on a slice without wrap-around a corner chip reaches it at best, and along an axis that lies on one line an end
chip has half of it.

The network between slices: 6.4 Tbit/s for a pod of 256 (v5e), 25.6 Tbit/s for 256 (v6e), 50 Gbit/s a chip (v5p). The
page of v4 gives none; the least of the others is taken.
"""

import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax

from lora_gen_jax.errors import ConfigError

REMEDY = "install it with: pip install 'lora_gen_jax[tpu]'"
# libtpu asks the machine what TPU it is on, logs that there is none, and locks out a second process that loads it.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# A v4 chip has two cores, which programs use as one device unless told otherwise.
_OPTIONS = {"v4": {"chip_config_name": "megacore"}}
GIGABIT = 1e9 / 8


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a chip can do.

    Attributes:
        name: as in a topology's name.
        flops: bf16 flops a second; a multiply-add is two.
        hbm: bytes of HBM.
        hbm_rate: bytes a second between HBM and core.
        ici: bytes a second of the interconnect, all links together, as the earlier editions give it.
        dcn: bytes a second that a chip receives from other slices.
    """

    name: str
    flops: float
    hbm: float
    hbm_rate: float
    ici: float
    dcn: float

    @property
    def receive_rate(self) -> float:
        """Bytes a second that a chip is taken to receive over the interconnect."""
        return self.ici / 2


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32e9, 1228e9, 2400 * GIGABIT, 25 * GIGABIT),
        Chip("v5e", 197e12, 16e9, 819e9, 1600 * GIGABIT, 25 * GIGABIT),
        Chip("v5p", 459e12, 95e9, 2765e9, 4800 * GIGABIT, 50 * GIGABIT),
        Chip("v6e", 918e12, 32e9, 1600e9, 3200 * GIGABIT, 100 * GIGABIT),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips to compile for.

    Attributes:
        name: as given.
        chip: their published figures.
        devices: for a mesh; nothing can be put on them.
        slices: how many slices they are on.
    """

    name: str
    chip: Chip
    devices: list[Any]
    slices: int


def get_topology(name: str) -> Topology:
    """The chips of that name; ``v5e:1x1`` is one.

    Raises:
        ConfigError: for a name that is not understood or that libtpu does not know, and without libtpu.
    """
    found = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)", name)
    if found is None or found[2] not in CHIPS or (found[1] and int(found[1]) < 1):
        raise ConfigError(
            f"topology {name!r} is not understood",
            field="--topology",
            code="unknown",
            remedy="write chip:AxB, as v5e:4x4 or v5p:2x2x4, or 2*v5e:4x4 for two slices; chips are"
            f" {', '.join(CHIPS)}",
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("compiling for a TPU needs libtpu, which has the compiler", field="libtpu", remedy=REMEDY)
    _stay_on_the_host()
    from jax.experimental import topologies

    slices, chip = int(found[1] or 1), found[2]
    options = _OPTIONS.get(chip, {}) | ({"num_slices": slices} if slices > 1 else {})
    if set(found[3].split("x")) == {"1"}:  # one chip, where a host has four
        options |= {"chips_per_host_bounds": [1, 1, 1]}
    try:
        topology = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{chip}:{found[3]}",
            **options,  # pyright: ignore[reportArgumentType]
        )
    except Exception as error:
        line = str(error).splitlines()[0]
        raise ConfigError(
            f"topology {name!r} does not exist ({line})",
            field="--topology",
            code="no such size",
            remedy="choose a size that the chip is sold in",
        ) from error
    return Topology(name, CHIPS[chip], list(topology.devices), slices)


def _stay_on_the_host() -> None:
    # Nothing here runs on a device. Without this JAX would look for a TPU, or take a GPU's memory. A process that has a
    # backend already keeps it.
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")
